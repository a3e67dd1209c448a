//! The log sinks of contexts: messages wait in a bounded queue, and one thread hands them to C.
//!
//! Messages come from anywhere, also from drivers that hold locks; so no sink is called where a
//! message arises. A context's own messages go to its sink, those of the library's drivers and jobs
//! (tracing's events) to the sinks of all contexts, because nothing says for which one they were.
//!
//! Lock order: `QUEUE`, then nothing. A sink's own lock is held while it is called, and taken by
//! the end of its context, which returns only when the sink is not being called any more.

mod collect;

use std::collections::VecDeque;
use std::ffi::CString;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use self::collect::Outlet;
use crate::abi::{BDS_LOG_ERROR, BDS_LOG_TRACE, BDS_LOG_WARNING, bds_log_fn};
use crate::failure::Failure;
use crate::fault;

/// Messages that wait for the thread; the oldest are dropped beyond that.
const MAX_WAITING: usize = 4096;

/// C's function.
struct Callback {
    function: extern "C" fn(u64, i32, *const std::ffi::c_char, *const std::ffi::c_char),
    user_data: u64,
}

/// A context's sink. Ends with the context.
pub(crate) struct Sink {
    level: u32,
    /// `None` once the context has ended.
    callback: Mutex<Option<Callback>>,
}

/// Where a context's messages go.
#[derive(Clone, Default)]
pub(crate) struct Log(Option<Arc<Sink>>);

struct Message {
    level: u32,
    target: String,
    text: String,
    /// The context's own, or all.
    to: Option<Weak<Sink>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Message>,
    dropped: u64,
    sinks: Vec<Weak<Sink>>,
    has_thread: bool,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    waiting: VecDeque::new(),
    dropped: 0,
    sinks: Vec::new(),
    has_thread: false,
});
static ADDED: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    /// The log of a context with this sink; `level` 0 stands for warnings.
    pub(crate) fn new(function: bds_log_fn, user_data: u64, level: u32) -> Result<Self, Failure> {
        let Some(function) = function else { return Ok(Self(None)) };
        let level = if level == 0 { BDS_LOG_WARNING } else { level };
        let callback = Mutex::new(Some(Callback { function, user_data }));
        let sink = Arc::new(Sink { level, callback });
        let mut queue = lock();
        if !queue.has_thread {
            thread::Builder::new().name("bds-log".to_owned()).spawn(deliver_all)?;
            queue.has_thread = true;
        }
        queue.sinks.retain(|sink| sink.strong_count() > 0);
        queue.sinks.push(Arc::downgrade(&sink));
        drop(queue);
        let push = |level, target: &str, text| {
            push(Message { level, target: target.to_owned(), text, to: None })
        };
        collect::begin(Outlet { wanted: wanted_level, push });
        Ok(Self(Some(sink)))
    }

    /// An error that no call returns.
    pub(crate) fn error(&self, target: &str, text: &str) {
        if let Some(sink) = &self.0 {
            fault::point("log");
            let (target, text) = (target.to_owned(), text.to_owned());
            let to = Some(Arc::downgrade(sink));
            push(Message { level: BDS_LOG_ERROR, target, text, to });
        }
    }

    /// The context has ended: the sink is not called any more once this returns.
    pub(crate) fn end(&self) {
        if let Some(sink) = &self.0 {
            *sink.lock() = None;
        }
    }
}

impl Sink {
    fn lock(&self) -> MutexGuard<'_, Option<Callback>> {
        self.callback.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, level: u32, target: &str, text: &str) {
        let c_text = |text: &str| {
            CString::new(text.replace('\0', "").replace('\n', " ")).unwrap_or_default()
        };
        let (target, text) = (c_text(target), c_text(text));
        let level = i32::try_from(level).unwrap_or(i32::MAX);
        if let Some(callback) = &*self.lock() {
            (callback.function)(callback.user_data, level, target.as_ptr(), text.as_ptr());
        }
    }
}

fn push(message: Message) {
    let mut queue = lock();
    if queue.waiting.len() == MAX_WAITING {
        queue.waiting.pop_front();
        queue.dropped += 1;
    }
    queue.waiting.push_back(message);
    drop(queue);
    ADDED.notify_one();
}

/// The least important level that some sink wants; 0: there is no sink.
fn wanted_level() -> u32 {
    let queue = lock();
    let sinks = queue.sinks.iter().filter_map(Weak::upgrade);
    sinks.map(|sink| sink.level).max().unwrap_or(0).min(BDS_LOG_TRACE)
}

/// The thread: hands messages to sinks, in order, one at a time.
fn deliver_all() {
    loop {
        let mut queue = lock();
        while queue.waiting.is_empty() && queue.dropped == 0 {
            queue = ADDED.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let dropped = std::mem::take(&mut queue.dropped);
        let message = match dropped {
            0 => queue.waiting.pop_front(),
            count => Some(Message {
                level: BDS_LOG_WARNING,
                target: "bds_ffi::log".to_owned(),
                text: format!("{count} messages were dropped, because the sink took too long"),
                to: None,
            }),
        };
        let all: Vec<Arc<Sink>> = queue.sinks.iter().filter_map(Weak::upgrade).collect();
        drop(queue);
        let Some(Message { level, target, text, to }) = message else { continue };
        let sinks = match to {
            None => all,
            Some(sink) => sink.upgrade().into_iter().collect(),
        };
        for sink in sinks.iter().filter(|sink| level <= sink.level) {
            sink.call(level, &target, &text);
        }
    }
}
