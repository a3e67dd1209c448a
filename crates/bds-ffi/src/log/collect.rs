//! Collects the library's log events (tracing) for the sinks of contexts.
//!
//! The shared library has a tracing of its own, to which no other code can subscribe. In a Rust
//! program that links this crate and has a subscriber, that one stays.

use std::fmt::{self, Write as _};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::abi::{BDS_LOG_DEBUG, BDS_LOG_ERROR, BDS_LOG_INFO, BDS_LOG_TRACE, BDS_LOG_WARNING};

struct Collector {
    last_span: AtomicU64,
    outlet: Outlet,
}

/// Where the events go.
pub(super) struct Outlet {
    /// The least important level that is wanted; 0: nothing is.
    pub(super) wanted: fn() -> u32,
    /// Takes an event: level, target, text. Must not wait.
    pub(super) push: fn(u32, &str, String),
}

/// Subscribes, once in a process, and takes note of the levels that sinks want.
pub(super) fn begin(outlet: Outlet) {
    static SUBSCRIBED: Once = Once::new();
    SUBSCRIBED.call_once(|| {
        let collector = Collector { last_span: AtomicU64::new(0), outlet };
        // An error: the program has a subscriber, and this library does not take its place.
        let _kept = tracing::subscriber::set_global_default(collector);
    });
    // Asks for `max_level_hint` anew.
    tracing::callsite::rebuild_interest_cache();
}

fn number(level: &Level) -> u32 {
    match *level {
        Level::ERROR => BDS_LOG_ERROR,
        Level::WARN => BDS_LOG_WARNING,
        Level::INFO => BDS_LOG_INFO,
        Level::DEBUG => BDS_LOG_DEBUG,
        Level::TRACE => BDS_LOG_TRACE,
    }
}

fn filter(wanted: u32) -> LevelFilter {
    match wanted {
        0 => LevelFilter::OFF,
        BDS_LOG_ERROR => LevelFilter::ERROR,
        BDS_LOG_WARNING => LevelFilter::WARN,
        BDS_LOG_INFO => LevelFilter::INFO,
        BDS_LOG_DEBUG => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("bds")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(filter((self.outlet.wanted)()))
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(self.last_span.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let level = number(metadata.level());
        if level > (self.outlet.wanted)() {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        (self.outlet.push)(level, metadata.target(), line.text());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// One line of an event: its message, then its fields.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn text(self) -> String {
        match (self.message.is_empty(), self.fields.is_empty()) {
            (_, true) => self.message,
            (true, false) => self.fields.trim_start().to_owned(),
            (false, false) => format!("{} ({})", self.message, self.fields.trim_start()),
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // A write to a String does not fail.
        let _done = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            _ => self.record_debug(field, &value),
        }
    }
}
