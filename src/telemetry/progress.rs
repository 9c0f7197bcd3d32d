//! How far a migration is, in a form that never runs backwards.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ProgressSchema;
use crate::types::MigrationId;

/// The named phases of a migration, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It waits for its turn; nothing was sent.
    Queued,
    /// Checks on this host.
    Prepare,
    /// The session, the offer and the lanes.
    Connect,
    /// Disks are copied while the guest runs.
    Storage,
    /// Rounds of dirty pages while the guest runs.
    Memory,
    /// The guest is paused; last pages and device state.
    Switchover,
    /// Both sides compare memory and state.
    Verify,
    /// The guest runs at the destination, and gets the pages that it lacks.
    PostCopy,
    /// The source's copy goes away.
    Cleanup,
    /// Over.
    Done,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 10] = [
        Self::Queued,
        Self::Prepare,
        Self::Connect,
        Self::Storage,
        Self::Memory,
        Self::Switchover,
        Self::Verify,
        Self::PostCopy,
        Self::Cleanup,
        Self::Done,
    ];

    /// The name as shown and as written in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Prepare => "prepare",
            Self::Connect => "connect",
            Self::Storage => "storage",
            Self::Memory => "memory",
            Self::Switchover => "switchover",
            Self::Verify => "verify",
            Self::PostCopy => "post-copy",
            Self::Cleanup => "cleanup",
            Self::Done => "done",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How far a migration is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Version of this object.
    pub schema: ProgressSchema,
    /// The attempt.
    pub migration_id: MigrationId,
    /// Where in the sequence of phases.
    pub phase: Phase,
    /// How much of this phase is done, 0 to 1; never falls within a phase.
    pub phase_fraction: f64,
    /// Which pass over dirty pages; 0 before the first.
    pub round: u32,
    /// Guest memory sent so far, all rounds.
    pub memory_sent_bytes: u64,
    /// Guest RAM.
    pub memory_total_bytes: u64,
    /// Guest memory that the destination still lacks.
    pub memory_remaining_bytes: u64,
    /// What mirrors of disks copied and have to, with what the guest wrote meanwhile.
    #[serde(default)]
    pub disk_total_bytes: u64,
    /// What of it the destination lacks.
    #[serde(default)]
    pub disk_remaining_bytes: u64,
    /// Pages that a guest that runs at the destination has waited for.
    #[serde(default)]
    pub faults: u64,
    /// Bytes of UDP payload sent so far.
    pub wire_bytes: u64,
    /// How fast the guest dirties memory.
    pub dirty_bytes_per_second: u64,
    /// How fast guest memory is sent.
    pub send_bytes_per_second: u64,
    /// How fast bytes go over the wire.
    pub wire_bytes_per_second: u64,
    /// The pause to expect if the switch came now.
    pub expected_downtime_seconds: Option<f64>,
    /// Time to the end, if it can be told.
    pub eta_seconds: Option<f64>,
    /// Why nothing moves, when nothing moves.
    pub stalled_because: Option<String>,
    /// Its place in the queue, while it waits for its turn; 1 is next.
    #[serde(default)]
    pub queue_position: Option<u32>,
    /// Since it began, which is when it left the queue.
    pub elapsed_seconds: f64,
}

impl Progress {
    /// The beginning: prepare, nothing sent.
    #[must_use]
    pub fn new(migration_id: MigrationId) -> Self {
        Self {
            schema: ProgressSchema,
            migration_id,
            phase: Phase::Prepare,
            phase_fraction: 0.0,
            round: 0,
            memory_sent_bytes: 0,
            memory_total_bytes: 0,
            memory_remaining_bytes: 0,
            disk_total_bytes: 0,
            disk_remaining_bytes: 0,
            faults: 0,
            wire_bytes: 0,
            dirty_bytes_per_second: 0,
            send_bytes_per_second: 0,
            wire_bytes_per_second: 0,
            expected_downtime_seconds: None,
            eta_seconds: None,
            stalled_because: None,
            queue_position: None,
            elapsed_seconds: 0.0,
        }
    }
}

/// Holds back whatever would make progress run backwards.
///
/// INVARIANT(no-step-back): phase, and within a phase fraction, round and totals, never fall. Rates,
/// remaining memory, expected downtime and ETA may go either way: they say whether it converges.
#[derive(Debug, Clone, Default)]
pub struct Monotone {
    last: Option<Progress>,
}

impl Monotone {
    /// Nothing shown yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What may be shown for `next`.
    pub fn admit(&mut self, mut next: Progress) -> Progress {
        next.phase_fraction = if next.phase_fraction.is_finite() { next.phase_fraction.clamp(0.0, 1.0) } else { 0.0 };
        if let Some(last) = self.last.as_ref().filter(|last| last.migration_id == next.migration_id) {
            if next.phase <= last.phase {
                next.phase_fraction = if next.phase < last.phase { 0.0 } else { next.phase_fraction }.max(last.phase_fraction);
                next.phase = last.phase;
            }
            next.round = next.round.max(last.round);
            next.memory_sent_bytes = next.memory_sent_bytes.max(last.memory_sent_bytes);
            next.wire_bytes = next.wire_bytes.max(last.wire_bytes);
            next.elapsed_seconds = next.elapsed_seconds.max(last.elapsed_seconds);
        }
        self.last = Some(next.clone());
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn phase_names_are_their_json_names_and_in_order() {
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.name());
        }
        assert!(Phase::ALL.is_sorted());
    }

    #[test]
    fn a_new_migration_starts_from_the_beginning() {
        let mut monotone = Monotone::new();
        let mut end = Progress::new(MigrationId([1; 16]));
        end.phase = Phase::Done;
        monotone.admit(end);
        assert_eq!(monotone.admit(Progress::new(MigrationId([2; 16]))).phase, Phase::Prepare);
    }

    proptest! {
        #[test]
        fn nothing_shown_ever_runs_backwards(steps in prop::collection::vec((0usize..9, -1.0f64..2.0, 0u32..9, 0u64..99), 1..60)) {
            let mut monotone = Monotone::new();
            let mut last: Option<Progress> = None;
            for (phase, fraction, round, wire) in steps {
                let mut next = Progress::new(MigrationId([1; 16]));
                (next.phase, next.phase_fraction, next.round, next.wire_bytes) = (Phase::ALL[phase], fraction, round, wire);
                let shown = monotone.admit(next);
                prop_assert!((0.0..=1.0).contains(&shown.phase_fraction));
                if let Some(last) = last {
                    prop_assert!(shown.phase >= last.phase && shown.round >= last.round && shown.wire_bytes >= last.wire_bytes);
                    prop_assert!(shown.phase > last.phase || shown.phase_fraction >= last.phase_fraction);
                }
                last = Some(shown);
            }
        }
    }
}
