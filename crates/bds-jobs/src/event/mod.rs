//! Events of jobs, and the queues of their subscribers.
//!
//! `job_event` has the events with QAPI's names and fields, `queue` delivers them.

mod job_event;
mod queue;

pub use job_event::{JobEvent, JobPoint, RecordUse};
pub(crate) use queue::EventHub;
pub use queue::{JobEvents, QUEUE_LEN};
