//! The destination's side of the handoff.

use super::{DestinationRecord, HandoffAction, Holding, Outcome, PreparedRecord, handoff_name, wake};
use crate::migration::Refusal;
use crate::wire::{Durability, ErrorClass, FinalDigest, Handoff};

/// The destination's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationHandoff {
    state: DestinationState,
    durability: Durability,
    holding: Holding,
}

/// Where the destination's side is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationState {
    /// Nothing is promised.
    Receiving,
    /// FINAL came and the twin equals it; policy is asked once more.
    AwaitCommitPermit {
        /// What the twin holds.
        record: Box<PreparedRecord>,
    },
    /// PREPARED is journaled; the twin is paused.
    Prepared {
        /// What the twin holds.
        digest: FinalDigest,
    },
    /// RUN is journaled.
    Running,
    /// REFUSED is journaled, or nothing was ever promised.
    Refused {
        /// Whether PREPARED may have been said before.
        promised: bool,
    },
    /// FENCED is journaled: operators gave the VM to this side, to be started from its disks.
    Fenced,
    /// CLOSED is journaled.
    Closed,
}

/// What happens to the destination's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationStep {
    /// FINAL came and the twin, restored and paused, holds exactly what it says.
    TwinComplete(Box<PreparedRecord>),
    /// Policy still permits.
    CommitPermitted,
    /// Policy or identity no longer permits.
    CommitDenied,
    /// A handoff message of the source, its signature and binding checked.
    Received(Handoff),
    /// Something here cannot go on, or somebody here wants to give up.
    GiveUp(ErrorClass),
    /// A new session with the source stands.
    Reconnected,
    /// An action that has to be durable failed; those behind it were not done.
    Failed,
    /// Operators say that the source is off for good: a VM that does not run here yet is started from its disks.
    SourceFenced,
}

type Turn = (DestinationState, Vec<HandoffAction<DestinationRecord>>);

impl Default for DestinationHandoff {
    fn default() -> Self {
        Self { state: DestinationState::Receiving, durability: Durability::None, holding: Holding::Memory }
    }
}

impl DestinationHandoff {
    /// The state that a journal leaves, given what this host holds of the twin, and what follows from that alone. An empty
    /// journal never promised anything and refuses.
    #[must_use]
    pub fn recover(records: &[DestinationRecord], holding: Holding) -> (Self, Vec<HandoffAction<DestinationRecord>>) {
        use HandoffAction::{Destroy, Forget, Journal};
        let (durability, digest) = match records.first() {
            Some(DestinationRecord::Prepared(record)) => (record.durability, Some(record.digest)),
            _ => (Durability::None, None),
        };
        let mut machine = Self { state: DestinationState::Refused { promised: true }, durability, holding };
        let kept = machine.keeps().then_some(Forget);
        let (state, actions) = match (records.last(), digest) {
            (Some(DestinationRecord::Prepared(_)), Some(_)) if holding == Holding::Nothing => {
                (DestinationState::Refused { promised: true }, [Journal(DestinationRecord::Refused)].into_iter().chain(kept).collect())
            }
            (Some(DestinationRecord::Prepared(_)), Some(digest)) => (DestinationState::Prepared { digest }, vec![]),
            // Memory that a restart finds may be what the gateway before has just restored from the image.
            (Some(DestinationRecord::Run), _) => (DestinationState::Running, wake(holding, machine.keeps(), machine.keeps())),
            (Some(DestinationRecord::Closed), _) => (DestinationState::Closed, vec![]),
            (Some(DestinationRecord::Fenced), _) => (DestinationState::Fenced, [Destroy].into_iter().chain(kept).collect()),
            _ => (DestinationState::Refused { promised: true }, [Destroy].into_iter().chain(kept).collect()),
        };
        machine.state = state;
        (machine, actions)
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &DestinationState {
        &self.state
    }

    /// The state by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.state {
            DestinationState::Receiving => "receiving",
            DestinationState::AwaitCommitPermit { .. } => "await-commit-permit",
            DestinationState::Prepared { .. } => "prepared",
            DestinationState::Running => "running",
            DestinationState::Refused { .. } => "refused",
            DestinationState::Fenced => "fenced",
            DestinationState::Closed => "closed",
        }
    }

    /// Whether the outcome now depends on the source's word, or the operators', alone.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        matches!(self.state, DestinationState::Prepared { .. })
    }

    /// Whether this side makes an image.
    fn keeps(&self) -> bool {
        self.durability != Durability::None
    }

    fn refuse(&self, promised: bool, class: ErrorClass) -> Turn {
        use HandoffAction::{Destroy, End, Forget, Journal, Send};
        let kept = self.keeps().then_some(Forget);
        let actions = [Journal(DestinationRecord::Refused), Destroy, Send(Handoff::Refuse { class })].into_iter().chain(kept);
        (DestinationState::Refused { promised }, actions.chain([End(Outcome::Stayed)]).collect())
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: &DestinationStep) -> Result<Vec<HandoffAction<DestinationRecord>>, Refusal> {
        if let (DestinationState::Receiving, DestinationStep::TwinComplete(record)) = (&self.state, event) {
            self.durability = record.durability;
        }
        let turn = match event {
            DestinationStep::TwinComplete(record) => self.complete(record),
            DestinationStep::CommitPermitted => self.permitted(),
            DestinationStep::CommitDenied => {
                matches!(self.state, DestinationState::AwaitCommitPermit { .. }).then(|| self.refuse(false, ErrorClass::Denied))
            }
            DestinationStep::Received(step) => self.received(step),
            DestinationStep::GiveUp(class) => Some(self.given_up(*class)),
            DestinationStep::Reconnected => self.reconnected(),
            DestinationStep::Failed => self.failed(),
            DestinationStep::SourceFenced => self.source_fenced(),
        };
        let refusal = || Refusal { state: self.name(), event: event.name(), expected: self.expects() };
        let (next, actions) = turn.ok_or_else(refusal)?;
        self.state = next;
        Ok(actions)
    }

    fn complete(&self, record: &PreparedRecord) -> Option<Turn> {
        let next = DestinationState::AwaitCommitPermit { record: Box::new(record.clone()) };
        (self.state == DestinationState::Receiving).then(|| (next, vec![HandoffAction::AskCommit]))
    }

    fn permitted(&self) -> Option<Turn> {
        use HandoffAction::{Journal, Keep, Send};
        let DestinationState::AwaitCommitPermit { record } = &self.state else { return None };
        let digest = record.digest;
        let keep = self.keeps().then_some(Keep);
        let promise = [Journal(DestinationRecord::Prepared(record.clone())), Send(Handoff::Prepared { digest })];
        Some((DestinationState::Prepared { digest }, keep.into_iter().chain(promise).collect()))
    }

    fn given_up(&self, class: ErrorClass) -> Turn {
        match &self.state {
            DestinationState::Receiving | DestinationState::AwaitCommitPermit { .. } => self.refuse(false, class),
            DestinationState::Prepared { .. } => self.refuse(true, class),
            state => (state.clone(), vec![]),
        }
    }

    fn received(&self, step: &Handoff) -> Option<Turn> {
        use HandoffAction::{End, Journal, Send};
        let same = |actions| (self.state.clone(), actions);
        Some(match (&self.state, step) {
            (
                DestinationState::Receiving | DestinationState::AwaitCommitPermit { .. } | DestinationState::Prepared { .. },
                Handoff::Abort { class },
            ) => self.given_up(*class),
            // What is run is what the source gave: it says which state that is.
            (DestinationState::Prepared { digest }, Handoff::Commit { digest: given }) if digest == given => {
                let mut actions = vec![Journal(DestinationRecord::Run)];
                actions.extend(wake(self.holding, self.keeps(), false));
                actions.push(Send(Handoff::Running));
                (DestinationState::Running, actions)
            }
            (DestinationState::Prepared { digest }, Handoff::Final { .. }) => same(vec![Send(Handoff::Prepared { digest: *digest })]),
            (DestinationState::Running, Handoff::Done) => {
                (DestinationState::Closed, vec![Journal(DestinationRecord::Closed), End(Outcome::Moved)])
            }
            (DestinationState::Running | DestinationState::Closed | DestinationState::Fenced, Handoff::Commit { .. }) => {
                same(vec![Send(Handoff::Running)])
            }
            (DestinationState::Closed | DestinationState::Fenced, Handoff::Done) => same(vec![]),
            (DestinationState::Refused { .. }, Handoff::Final { .. } | Handoff::Commit { .. }) => {
                same(vec![Send(Handoff::Refuse { class: ErrorClass::Local })])
            }
            (DestinationState::Refused { .. }, Handoff::Abort { .. }) => same(vec![]),
            _ => return None,
        })
    }

    fn reconnected(&self) -> Option<Turn> {
        let said = match &self.state {
            DestinationState::Prepared { digest } => Handoff::Prepared { digest: *digest },
            DestinationState::Running => Handoff::Running,
            DestinationState::Refused { .. } => Handoff::Refuse { class: ErrorClass::Local },
            _ => return None,
        };
        Some((self.state.clone(), vec![HandoffAction::Send(said)]))
    }

    fn failed(&self) -> Option<Turn> {
        use HandoffAction::{Destroy, End, LeaveToJournal, Send};
        Some(match &self.state {
            // PREPARED was not said, so nothing was promised.
            DestinationState::Prepared { .. } => self.refuse(false, ErrorClass::Local),
            // Without PREPARED there is no COMMIT: a promise that was never said needs no withdrawal on disk.
            DestinationState::Refused { promised: false } => {
                let actions = vec![Destroy, Send(Handoff::Refuse { class: ErrorClass::Local }), End(Outcome::Stayed)];
                (DestinationState::Refused { promised: false }, actions)
            }
            // The VM runs here; that the source knows it is written when it says so again.
            DestinationState::Closed => (DestinationState::Closed, vec![End(Outcome::Moved)]),
            state @ (DestinationState::Refused { promised: true } | DestinationState::Running | DestinationState::Fenced) => {
                (state.clone(), vec![LeaveToJournal])
            }
            DestinationState::Receiving | DestinationState::AwaitCommitPermit { .. } => return None,
        })
    }

    /// The source may have aborted and run on before it went off, so what was prepared may be stale. A VM that runs here was
    /// given by the source: nobody is left who could say DONE, and nothing is left to wait for.
    fn source_fenced(&self) -> Option<Turn> {
        use HandoffAction::{Destroy, End, Forget, Journal};
        if self.state == DestinationState::Running {
            return Some((DestinationState::Closed, vec![Journal(DestinationRecord::Closed), End(Outcome::Moved)]));
        }
        let kept = self.keeps().then_some(Forget);
        let actions = [Journal(DestinationRecord::Fenced), Destroy].into_iter().chain(kept).chain([End(Outcome::Cold)]);
        self.is_prepared().then(|| (DestinationState::Fenced, actions.collect()))
    }

    fn expects(&self) -> &'static str {
        match self.state {
            DestinationState::Receiving => "FINAL or ABORT",
            DestinationState::AwaitCommitPermit { .. } => "the answer of policy, or ABORT",
            DestinationState::Prepared { .. } => "COMMIT of what was prepared, or ABORT",
            DestinationState::Running => "DONE",
            _ => "nothing: the handoff has ended",
        }
    }
}

impl DestinationStep {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::TwinComplete(_) => "twin-complete",
            Self::CommitPermitted => "commit-permitted",
            Self::CommitDenied => "commit-denied",
            Self::Received(step) => handoff_name(step),
            Self::GiveUp(_) => "give-up",
            Self::Reconnected => "reconnected",
            Self::Failed => "failed",
            Self::SourceFenced => "source-fenced",
        }
    }
}
