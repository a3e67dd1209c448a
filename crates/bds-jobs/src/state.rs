//! States of a job and the verbs each accepts: one table, and the checks that read it.
//!
//! ```text
//!              ┌────────► paused        ┌────────► standby
//!              │            │           │             │
//! created ─► running ◄──────┘         ready ◄─────────┘
//!    │         │  └────────────────────►│
//!    │         │                        │
//!    │         └──────► waiting ◄───────┘
//!    │                    │
//!    │                  pending ─────────────► concluded ─► null
//!    ▼                    │                        ▲
//! aborting ◄──── (running, ready, waiting, pending)│
//!    └─────────────────────────────────────────────┘
//! ```
//! A paused job runs again before anything else happens to it.

use std::fmt;

use bds_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// State of a job. Names are QAPI's (`JobStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Before registration; never seen.
    Undefined,
    /// Registered, not started.
    Created,
    /// Works.
    Running,
    /// Stopped at a pause point; was running.
    Paused,
    /// Source and target are in sync; works until it is completed or cancelled.
    Ready,
    /// Stopped at a pause point; was ready.
    Standby,
    /// Its work succeeded; other jobs of its group still work.
    Waiting,
    /// The work of its whole group succeeded; it is not finalized.
    Pending,
    /// Failed or cancelled; it gives back what it holds.
    Aborting,
    /// Over; holds nothing. Its result can be read until it is dismissed.
    Concluded,
    /// Dismissed.
    Null,
}

/// A command to a job. Names are QAPI's (`JobVerb`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobVerb {
    /// Ends it.
    Cancel,
    /// Lets it stop at its next pause point.
    Pause,
    /// Undoes a pause.
    Resume,
    /// Limits its speed.
    SetSpeed,
    /// Ends a ready job as intended.
    Complete,
    /// Makes the effect of a pending group visible.
    Finalize,
    /// Forgets a concluded job.
    Dismiss,
    /// Changes an option of its type.
    Change,
}

use JobStatus as S;
use JobVerb as V;

/// A row of the table: a state, the states that may follow, and the verbs it accepts.
type Row = (JobStatus, &'static [JobStatus], &'static [JobVerb]);

const WORKING: &[JobVerb] = &[V::Cancel, V::Pause, V::Resume, V::SetSpeed, V::Change];
const IN_SYNC: &[JobVerb] = &[V::Cancel, V::Pause, V::Resume, V::SetSpeed, V::Change, V::Complete];

const TABLE: [Row; 11] = [
    (S::Undefined, &[S::Created], &[]),
    (S::Created, &[S::Running, S::Aborting, S::Null], WORKING),
    (S::Running, &[S::Paused, S::Ready, S::Waiting, S::Aborting], WORKING),
    (S::Paused, &[S::Running], WORKING),
    (S::Ready, &[S::Standby, S::Waiting, S::Aborting], IN_SYNC),
    (S::Standby, &[S::Ready], IN_SYNC),
    (S::Waiting, &[S::Pending, S::Aborting], &[V::Cancel]),
    (S::Pending, &[S::Aborting, S::Concluded], &[V::Cancel, V::Finalize]),
    (S::Aborting, &[S::Aborting, S::Concluded], &[]),
    (S::Concluded, &[S::Null], &[V::Dismiss]),
    (S::Null, &[], &[]),
];

impl JobStatus {
    /// All states, in the order of a job's life.
    pub const ALL: [JobStatus; 11] = [
        S::Undefined,
        S::Created,
        S::Running,
        S::Paused,
        S::Ready,
        S::Standby,
        S::Waiting,
        S::Pending,
        S::Aborting,
        S::Concluded,
        S::Null,
    ];

    fn row(self) -> &'static Row {
        let row = TABLE.iter().find(|row| row.0 == self);
        row.expect("every state has a row; a test counts them")
    }

    /// True if `next` may follow.
    ///
    /// ```
    /// use bds_jobs::JobStatus;
    ///
    /// assert!(JobStatus::Running.may_become(JobStatus::Ready));
    /// assert!(!JobStatus::Paused.may_become(JobStatus::Aborting), "it runs again first");
    /// ```
    pub fn may_become(self, next: JobStatus) -> bool {
        self.row().1.contains(&next)
    }

    /// True if a job in this state accepts the verb. Further conditions may refuse it.
    pub fn accepts(self, verb: JobVerb) -> bool {
        self.row().2.contains(&verb)
    }

    /// True if source and target are in sync: `ready` and `standby`.
    pub fn is_ready(self) -> bool {
        matches!(self, S::Ready | S::Standby)
    }

    /// True if it stopped at a pause point: `paused` and `standby`.
    pub fn is_paused(self) -> bool {
        matches!(self, S::Paused | S::Standby)
    }

    /// True if its work is over.
    pub fn is_completed(self) -> bool {
        matches!(self, S::Waiting | S::Pending | S::Aborting | S::Concluded | S::Null)
    }

    /// True if it holds nothing any more: `concluded` and `null`.
    pub fn is_over(self) -> bool {
        matches!(self, S::Concluded | S::Null)
    }

    /// QAPI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            S::Undefined => "undefined",
            S::Created => "created",
            S::Running => "running",
            S::Paused => "paused",
            S::Ready => "ready",
            S::Standby => "standby",
            S::Waiting => "waiting",
            S::Pending => "pending",
            S::Aborting => "aborting",
            S::Concluded => "concluded",
            S::Null => "null",
        }
    }

    /// Checks that a job in this state accepts the verb.
    pub(crate) fn check(self, id: &str, verb: JobVerb) -> Result<()> {
        if self.accepts(verb) {
            return Ok(());
        }
        let message = format!("Job '{id}' in state '{self}' cannot accept command verb '{verb}'");
        Err(Error::new(ErrorKind::InvalidInput, message))
    }
}

impl JobVerb {
    /// All verbs.
    pub const ALL: [JobVerb; 8] = [
        V::Cancel,
        V::Pause,
        V::Resume,
        V::SetSpeed,
        V::Complete,
        V::Finalize,
        V::Dismiss,
        V::Change,
    ];

    /// QAPI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            V::Cancel => "cancel",
            V::Pause => "pause",
            V::Resume => "resume",
            V::SetSpeed => "set-speed",
            V::Complete => "complete",
            V::Finalize => "finalize",
            V::Dismiss => "dismiss",
            V::Change => "change",
        }
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for JobVerb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_one_row() {
        for status in JobStatus::ALL {
            assert_eq!(TABLE.iter().filter(|row| row.0 == status).count(), 1, "{status}");
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
        for verb in JobVerb::ALL {
            assert_eq!(serde_json::to_value(verb).unwrap(), verb.as_str());
        }
    }

    /// QEMU 10.0's tables, as they are printed in its documentation: a row a state, a column a
    /// state that may follow, respectively a verb.
    #[test]
    fn transitions_are_those_of_the_documented_matrix() {
        let matrix = "
            undefined .o.........
            created   ..o.....o.o
            running   ...oo.o.o..
            paused    ..o........
            ready     .....oo.o..
            standby   ....o......
            waiting   .......oo..
            pending   ........oo.
            aborting  ........oo.
            concluded ..........o
            null      ...........";
        for (from, line) in JobStatus::ALL.iter().zip(matrix.trim().lines()) {
            let (name, cells) = line.trim().split_once(' ').unwrap();
            assert_eq!(name, from.as_str());
            for (to, cell) in JobStatus::ALL.iter().zip(cells.trim().chars()) {
                assert_eq!(from.may_become(*to), cell == 'o', "{from} -> {to}");
            }
        }
    }

    #[test]
    fn verbs_are_those_of_the_documented_matrix_and_refusals_name_both() {
        let matrix = "
            cancel    .ooooooo...
            pause     .ooooo.....
            resume    .ooooo.....
            set-speed .ooooo.....
            complete  ....oo.....
            finalize  .......o...
            dismiss   .........o.
            change    .ooooo.....";
        for (verb, line) in JobVerb::ALL.iter().zip(matrix.trim().lines()) {
            let (name, cells) = line.trim().split_once(' ').unwrap();
            assert_eq!(name, verb.as_str());
            for (status, cell) in JobStatus::ALL.iter().zip(cells.trim().chars()) {
                let outcome = status.check("j", *verb).map_err(|error| error.to_string());
                let refusal =
                    format!("Job 'j' in state '{status}' cannot accept command verb '{verb}'");
                let expected = if cell == 'o' { Ok(()) } else { Err(refusal) };
                assert_eq!(outcome, expected, "{status}: {verb}");
            }
        }
    }
}
