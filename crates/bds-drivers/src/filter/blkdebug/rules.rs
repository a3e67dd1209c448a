//! Error rules and the state that events move: decides which requests fail, and how.
//!
//! A rule matches by kind of request, byte range, event and state. It fires once or always, at once
//! or after its first `x-skip` matches. No I/O here, so every case is a table.

use std::ops::Range;

use bds_core::{Error, ErrorKind, Options, Result};
use serde_json::Value;

use super::config::FileRules;

/// Kind of a request, as rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
    Status,
}

impl Kind {
    fn bit(self) -> u8 {
        1 << self as u8
    }

    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "read" => Self::Read,
            "write" => Self::Write,
            "write-zeroes" => Self::Zero,
            "discard" => Self::Discard,
            "flush" => Self::Flush,
            "block-status" => Self::Status,
            _ => return None,
        })
    }
}

/// The events that this filter can see. QEMU's further events are raised inside its formats, where
/// a filter below cannot see them.
const EVENTS: [&str; 5] = ["none", "pwritev", "pwritev_zero", "flush_to_os", "flush_to_disk"];

/// A failure that a rule demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) errno: i32,
    /// Fail before the first await.
    pub(super) is_immediate: bool,
}

#[derive(Clone, Debug)]
struct Inject {
    event: usize,
    kinds: u8,
    errno: i32,
    /// `None`: anywhere.
    at: Option<u64>,
    once: bool,
    is_immediate: bool,
    /// 0: in any state.
    state: u64,
    skip: u64,
    is_used_up: bool,
}

#[derive(Clone, Copy, Debug)]
struct SetState {
    event: usize,
    state: u64,
    new_state: u64,
}

/// All rules of one filter and their state.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    injects: Vec<Inject>,
    set_states: Vec<SetState>,
    state: u64,
}

impl Rules {
    /// Parses the options `inject-error` and `set-state`.
    pub(super) fn parse(inject: Option<Value>, set_state: Option<Value>) -> Result<Self> {
        let injects =
            list("inject-error", inject)?.into_iter().map(parse_inject).collect::<Result<_>>()?;
        let set_states = list("set-state", set_state)?
            .into_iter()
            .map(parse_set_state)
            .collect::<Result<_>>()?;
        Ok(Self { injects, set_states, state: 1 })
    }

    /// Adds the rules of a file.
    pub(super) fn add(&mut self, file: &FileRules) -> Result<()> {
        let list = |rules: &[Value]| Some(Value::Array(rules.to_vec()));
        let more = Self::parse(list(&file.inject), list(&file.set_state))?;
        self.injects.extend(more.injects);
        self.set_states.extend(more.set_states);
        Ok(())
    }

    /// True if nothing can ever fire.
    pub(super) fn is_empty(&self) -> bool {
        self.injects.is_empty()
    }

    /// Raises an event: the state may change.
    pub(super) fn event(&mut self, name: &str) {
        let Some(event) = EVENTS.iter().position(|e| *e == name) else { return };
        // All rules match the state before the event, so their order does not matter.
        let before = self.state;
        for rule in &self.set_states {
            if rule.event == event && (rule.state == 0 || rule.state == before) {
                self.state = rule.new_state;
            }
        }
    }

    /// Returns the failure if this request must fail. `events` are those that it raises itself.
    pub(super) fn match_request(
        &mut self,
        kind: Kind,
        range: Range<u64>,
        events: &[&str],
    ) -> Option<Fault> {
        let state = self.state;
        self.injects.iter_mut().find_map(|rule| {
            let event_fits = rule.event == 0 || events.contains(&EVENTS[rule.event]);
            let place_fits = rule.at.is_none_or(|at| range.contains(&at));
            let state_fits = rule.state == 0 || rule.state == state;
            let fits = rule.kinds & kind.bit() != 0 && event_fits && place_fits && state_fits;
            if !fits || rule.is_used_up {
                return None;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                return None;
            }
            rule.is_used_up = rule.once;
            Some(Fault { errno: rule.errno, is_immediate: rule.is_immediate })
        })
    }
}

/// Parses a list of trees; from `key=value` options it comes as an object with the keys "0", "1",
/// ….
fn list(name: &'static str, value: Option<Value>) -> Result<Vec<Options>> {
    let items = match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(Value::Object(map)) => map.into_iter().map(|(_, item)| item).collect(),
        Some(other) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("option '{name}' must be a list of rules"),
            )
            .field(name, other));
        }
    };
    items.into_iter().map(Options::from_json).collect()
}

fn parse_event(options: &mut Options) -> Result<usize> {
    let word = options.take_str("event")?.unwrap_or_else(|| "none".to_owned());
    EVENTS.iter().position(|e| *e == word).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("the event is not one that happens here; there are: {}", EVENTS.join(", ")),
        )
        .field("event", word)
    })
}

fn parse_inject(mut options: Options) -> Result<Inject> {
    let event = parse_event(&mut options)?;
    let kinds = match options.take_str("iotype")? {
        // By default status queries do not fail, as in QEMU.
        None => [Kind::Read, Kind::Write, Kind::Zero, Kind::Discard, Kind::Flush]
            .into_iter()
            .fold(0, |mask, kind| mask | kind.bit()),
        Some(word) => Kind::parse(&word).map(Kind::bit).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                "option 'iotype' must be read, write, write-zeroes, discard, flush or block-status",
            )
            .field("iotype", word)
        })?,
    };
    let errno = options.take_u64("errno")?.unwrap_or(5);
    let errno = i32::try_from(errno).ok().filter(|e| *e > 0).ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "option 'errno' must be a positive error number")
            .field("errno", errno)
    })?;
    let sector = take_place(&mut options, "sector")?;
    let offset = take_place(&mut options, "x-offset")?;
    let at = match (sector, offset) {
        (Some(sector), _) => Some(sector.checked_mul(512).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, "option 'sector' is too large")
                .field("sector", sector)
        })?),
        (None, offset) => offset,
    };
    let rule = Inject {
        event,
        kinds,
        errno,
        at,
        once: options.take_bool("once")?.unwrap_or(false),
        is_immediate: options.take_bool("immediately")?.unwrap_or(false),
        state: options.take_u64("state")?.unwrap_or(0),
        skip: options.take_u64("x-skip")?.unwrap_or(0),
        is_used_up: false,
    };
    options.finish("an inject-error rule")?;
    Ok(rule)
}

/// Takes a number, or -1 for anywhere.
fn take_place(options: &mut Options, key: &'static str) -> Result<Option<u64>> {
    let is_anywhere = match options.peek(key) {
        Some(Value::Number(n)) => n.as_i64() == Some(-1),
        Some(Value::String(s)) => s == "-1",
        _ => false,
    };
    if is_anywhere {
        options.take(key);
        return Ok(None);
    }
    options.take_u64(key)
}

fn parse_set_state(mut options: Options) -> Result<SetState> {
    let event = parse_event(&mut options)?;
    let state = options.take_u64("state")?.unwrap_or(0);
    let new_state = options.take_u64("new_state")?.ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, "a set-state rule needs the option 'new_state'")
    })?;
    options.finish("a set-state rule")?;
    Ok(SetState { event, state, new_state })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(inject: Value, set_state: Value) -> Rules {
        Rules::parse(Some(inject), Some(set_state)).unwrap()
    }

    fn errno(rules: &mut Rules, kind: Kind, range: Range<u64>) -> Option<i32> {
        rules.match_request(kind, range, &[]).map(|f| f.errno)
    }

    #[test]
    fn a_rule_matches_by_kind_and_place() {
        let mut r = rules(json!([{"iotype": "read", "sector": 2, "errno": 28}]), json!([]));
        for (kind, range, expected) in [
            (Kind::Read, 0..1024, None),
            (Kind::Read, 0..1025, Some(28)),
            (Kind::Read, 1024..1536, Some(28)),
            (Kind::Read, 1536..2048, None),
            (Kind::Write, 1024..1536, None),
        ] {
            assert_eq!(errno(&mut r, kind, range.clone()), expected, "{kind:?} {range:?}");
        }
    }

    #[test]
    fn a_rule_that_fires_once_is_used_up() {
        let mut r = rules(json!([{"once": true, "sector": -1}]), json!([]));
        assert_eq!(errno(&mut r, Kind::Flush, 0..0), Some(5));
        assert_eq!(errno(&mut r, Kind::Flush, 0..0), None);
    }

    #[test]
    fn a_rule_lets_its_first_matches_pass() {
        let mut r = rules(json!([{"x-skip": 2}]), json!([]));
        let hits: Vec<_> = (0..4).map(|_| errno(&mut r, Kind::Write, 0..1).is_some()).collect();
        assert_eq!(hits, [false, false, true, true]);
    }

    #[test]
    fn an_event_moves_the_state_that_arms_a_rule() {
        let mut r = rules(
            json!([{"state": 2}]),
            json!([{"event": "flush_to_disk", "state": 1, "new_state": 2}]),
        );
        assert_eq!(errno(&mut r, Kind::Write, 0..1), None);
        r.event("flush_to_disk");
        assert_eq!(errno(&mut r, Kind::Write, 0..1), Some(5));
    }

    #[test]
    fn wrong_rules_are_refused_by_name() {
        for (inject, word) in [
            (json!([{"event": "l2_load"}]), "l2_load"),
            (json!([{"iotype": "seek"}]), "seek"),
            (json!([{"errno": 0}]), "errno"),
            (json!([{"sektor": 1}]), "sektor"),
            (json!(7), "inject-error"),
        ] {
            let text = Rules::parse(Some(inject), None).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }
}
