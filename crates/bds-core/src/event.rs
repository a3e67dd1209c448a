//! Events of a graph: I/O errors, media, devices, nodes and graph changes, queued per subscriber.
//!
//! Emitting an event puts it into queues; it neither waits nor runs a subscriber's code, so it is
//! safe under a lock, in a release or in a graph change. Every subscriber has a queue of
//! [`QUEUE_LEN`]; a full queue drops its oldest event, and the reader gets the number of lost ones
//! ([`Event::EventsLost`]). Without subscribers events are not even built.
//!
//! Names and fields of [`Event::to_json`] are QEMU's where QEMU has such an event.

use std::fmt;
use std::sync::{Arc, OnceLock};

use bds_io::sync::broadcast::{self, error::RecvError, error::TryRecvError};
use serde_json::{Value, json};

use crate::error::Error;

/// Length of a subscriber's queue, in events. A reader that is further behind loses the oldest
/// ones.
pub const QUEUE_LEN: usize = 256;

/// What the error policy does with a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorAction {
    /// Returns the error.
    Report,
    /// Returns success.
    Ignore,
    /// Holds the request until [`crate::request::Backend::resume`].
    Stop,
}

impl ErrorAction {
    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// An event. Names are those of backends and nodes at that moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A medium failed a request: `BLOCK_IO_ERROR`.
    BlockIoError {
        /// The backend it came through.
        backend: String,
        /// The node at its root.
        node: Option<String>,
        /// True for a read; false for requests that write, and flushes.
        is_read: bool,
        /// What the error policy did.
        action: ErrorAction,
        /// True if the medium ran out of space.
        nospace: bool,
        /// The error message.
        reason: String,
    },
    /// A write exceeded the node's threshold: `BLOCK_WRITE_THRESHOLD`.
    WriteThreshold {
        /// The node.
        node: String,
        /// The threshold in bytes. It is off from now on.
        threshold: u64,
        /// By how many bytes the write exceeded it.
        amount_exceeded: u64,
    },
    /// A backend without a medium got one.
    MediumInserted {
        /// The backend.
        backend: String,
        /// The medium.
        node: String,
    },
    /// A backend lost its medium.
    MediumEjected {
        /// The backend.
        backend: String,
        /// The former medium.
        node: String,
    },
    /// A backend's root was re-pointed: to a new medium, an overlay, a filter.
    MediumReplaced {
        /// The backend.
        backend: String,
        /// The former node.
        from: String,
        /// The new node.
        node: String,
    },
    /// A device was attached to a backend.
    DeviceAttached {
        /// The backend.
        backend: String,
        /// The device.
        device: String,
    },
    /// A device was detached from a backend.
    DeviceDetached {
        /// The backend.
        backend: String,
        /// The device.
        device: String,
    },
    /// A node was opened and can be found.
    NodeOpened {
        /// Its name.
        node: String,
        /// Its driver.
        driver: String,
    },
    /// A node is closed and its name free.
    NodeClosed {
        /// Its name.
        node: String,
        /// Its driver.
        driver: String,
        /// Why data written earlier may not be durable.
        flush_error: Option<String>,
        /// Why its driver failed to close.
        close_error: Option<String>,
    },
    /// A snapshot that a filter kept of its node can no longer be read: `SNAPSHOT_BROKEN`.
    SnapshotBroken {
        /// The filter.
        node: String,
        /// First byte of the range that could not be kept.
        offset: u64,
        /// Why: an errno, positive.
        errno: i32,
    },
    /// The graph was changed.
    GraphChanged {
        /// [`crate::graph::Graph::epoch`] after that.
        epoch: u64,
    },
    /// The graph was shut down, as far as possible.
    GraphShutdown,
    /// The reader was too slow, and events were lost.
    EventsLost {
        /// How many events were lost here.
        count: u64,
    },
}

impl Event {
    pub(crate) fn node_opened(node: &str, driver: &str) -> Self {
        Self::NodeOpened { node: node.to_owned(), driver: driver.to_owned() }
    }

    pub(crate) fn node_closed(
        node: &str,
        driver: &str,
        flush_error: &Option<Error>,
        close_error: &Option<Error>,
    ) -> Self {
        let words = |error: &Option<Error>| error.as_ref().map(ToString::to_string);
        Self::NodeClosed {
            node: node.to_owned(),
            driver: driver.to_owned(),
            flush_error: words(flush_error),
            close_error: words(close_error),
        }
    }

    /// The event's name, in QAPI's alphabet.
    pub fn name(&self) -> &'static str {
        match self {
            Self::BlockIoError { .. } => "BLOCK_IO_ERROR",
            Self::WriteThreshold { .. } => "BLOCK_WRITE_THRESHOLD",
            Self::MediumInserted { .. } => "BLOCK_MEDIUM_INSERTED",
            Self::MediumEjected { .. } => "BLOCK_MEDIUM_EJECTED",
            Self::MediumReplaced { .. } => "BLOCK_MEDIUM_REPLACED",
            Self::DeviceAttached { .. } => "BLOCK_DEVICE_ATTACHED",
            Self::DeviceDetached { .. } => "BLOCK_DEVICE_DETACHED",
            Self::NodeOpened { .. } => "BLOCK_NODE_OPENED",
            Self::NodeClosed { .. } => "BLOCK_NODE_CLOSED",
            Self::SnapshotBroken { .. } => "SNAPSHOT_BROKEN",
            Self::GraphChanged { .. } => "BLOCK_GRAPH_CHANGED",
            Self::GraphShutdown => "BLOCK_GRAPH_SHUTDOWN",
            Self::EventsLost { .. } => "BLOCK_EVENTS_LOST",
        }
    }

    /// `{"event": …, "data": {…}}`.
    ///
    /// ```
    /// let event = bds_core::event::Event::GraphChanged { epoch: 3 };
    /// assert_eq!(
    ///     event.to_json().to_string(),
    ///     r#"{"event":"BLOCK_GRAPH_CHANGED","data":{"epoch":3}}"#
    /// );
    /// ```
    pub fn to_json(&self) -> Value {
        let data = match self {
            Self::BlockIoError { backend, node, is_read, action, nospace, reason } => {
                let mut data = json!({"device": backend});
                if let Some(node) = node {
                    data["node-name"] = json!(node);
                }
                data["operation"] = json!(if *is_read { "read" } else { "write" });
                data["action"] = json!(action.as_str());
                data["nospace"] = json!(nospace);
                data["reason"] = json!(reason);
                data
            }
            Self::WriteThreshold { node, threshold, amount_exceeded } => json!({
                "node-name": node,
                "amount-exceeded": amount_exceeded,
                "write-threshold": threshold,
            }),
            Self::MediumInserted { backend, node } | Self::MediumEjected { backend, node } => {
                json!({"device": backend, "node-name": node})
            }
            Self::MediumReplaced { backend, from, node } => {
                json!({"device": backend, "from": from, "node-name": node})
            }
            Self::DeviceAttached { backend, device } | Self::DeviceDetached { backend, device } => {
                json!({"device": backend, "id": device})
            }
            Self::NodeOpened { node, driver } => json!({"node-name": node, "driver": driver}),
            Self::NodeClosed { node, driver, flush_error, close_error } => {
                let mut data = json!({"node-name": node, "driver": driver});
                for (key, error) in [("flush-error", flush_error), ("close-error", close_error)] {
                    if let Some(error) = error {
                        data[key] = json!(error);
                    }
                }
                data
            }
            Self::SnapshotBroken { node, offset, errno } => {
                json!({"node-name": node, "offset": offset, "errno": errno})
            }
            Self::GraphChanged { epoch } => json!({"epoch": epoch}),
            Self::EventsLost { count } => json!({"count": count}),
            Self::GraphShutdown => return json!({"event": self.name()}),
        };
        json!({"event": self.name(), "data": data})
    }
}

/// Sends events to subscribers. Clones share the subscribers. Does not reference the graph.
#[derive(Clone, Default)]
pub(crate) struct EventHub(Arc<OnceLock<broadcast::Sender<Event>>>);

impl fmt::Debug for EventHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let readers = self.0.get().map_or(0, broadcast::Sender::receiver_count);
        write!(f, "EventHub({readers} readers)")
    }
}

impl EventHub {
    /// Puts an event into every subscriber's queue. Without subscribers the event is not built.
    pub(crate) fn emit(&self, event: impl FnOnce() -> Event) {
        if let Some(sender) = self.0.get()
            && sender.receiver_count() > 0
        {
            // Fails if the last subscriber was just dropped: the event is not needed then.
            let _unwanted = sender.send(event());
        }
    }

    pub(crate) fn subscribe(&self) -> Events {
        Events(self.0.get_or_init(|| broadcast::Sender::new(QUEUE_LEN)).subscribe())
    }
}

/// Sends a driver's events. Made by the graph for [`crate::driver::OpenContext::events`]; the
/// default has no subscribers.
#[derive(Clone, Debug, Default)]
pub struct EventSender(pub(crate) EventHub);

impl EventSender {
    /// Puts an event into every subscriber's queue. Neither waits nor runs a subscriber's code.
    pub fn emit(&self, event: Event) {
        self.0.emit(|| event);
    }
}

/// A subscriber's queue of events. Made by [`crate::graph::Graph::events`].
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Event>);

impl Events {
    /// Waits for the next event. `None`: the graph is gone and the queue is empty.
    ///
    /// Dropping the future loses no event.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::{Graph, GraphConfig};
    ///
    /// let graph = Graph::new(GraphConfig::new(bds_drivers::registry().into()));
    /// # bds_io::block_on(async {
    /// let mut events = graph.events();
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let event = events.next().await.expect("the graph exists");
    /// assert_eq!(event.to_json()["data"]["node-name"], "disk");
    /// # disk.close().await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn next(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(count)) => Some(Event::EventsLost { count }),
            Err(RecvError::Closed) => None,
        }
    }

    /// The next event, if there is one now.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::event::{Event, QUEUE_LEN};
    /// use bds_core::graph::{Graph, GraphConfig};
    ///
    /// let graph = Graph::new(GraphConfig::new(bds_drivers::registry().into()));
    /// # bds_io::block_on(async {
    /// let mut events = graph.events();
    /// for _ in 0..=QUEUE_LEN / 2 {
    ///     graph.open(Options::parse("driver=mem")?).await?.close().await?; // two events each
    /// }
    /// assert_eq!(
    ///     events.try_next(),
    ///     Some(Event::EventsLost { count: 2 }),
    ///     "the oldest are dropped"
    /// );
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn try_next(&mut self) -> Option<Event> {
        match self.0.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Lagged(count)) => Some(Event::EventsLost { count }),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
        }
    }
}
