//! The source's side of the handoff.

use super::{HandoffAction, Holding, OfferRecord, Outcome, SourceRecord, handoff_name, wake};
use crate::migration::Refusal;
use crate::wire::{Durability, ErrorClass, FinalDigest, Handoff};

/// The source's side.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceHandoff {
    state: SourceState,
    durability: Durability,
    holding: Holding,
    rebuilt: bool,
}

/// Where the source's side is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// OFFER is journaled; FINAL has not been said.
    Offered,
    /// Paused, FINAL said.
    AwaitPrepared {
        /// What the destination has to hold.
        digest: FinalDigest,
        /// Lanes that carried it.
        lanes: u16,
    },
    /// PREPARED came; policy is asked once more.
    AwaitCommitPermit {
        /// What the destination holds.
        digest: FinalDigest,
        /// The position of its journal.
        position: u64,
    },
    /// COMMIT is journaled.
    Committed {
        /// What the destination was given.
        digest: FinalDigest,
        /// The position of its journal when it had prepared that.
        position: u64,
    },
    /// ABORT is journaled.
    Aborted {
        /// Whether writing it failed.
        unwritten: bool,
    },
    /// RECLAIM is journaled.
    Reclaimed,
    /// FENCED is journaled: an operator took the VM back.
    Fenced,
    /// DONE is journaled.
    Done,
}

/// What happens to the source's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceStep {
    /// The guest is paused and all of it is on its way.
    Finalised {
        /// What the destination has to hold.
        digest: FinalDigest,
        /// Lanes that carried it.
        lanes: u16,
    },
    /// A handoff message of the destination, its signature and binding checked.
    Received {
        /// The message.
        step: Handoff,
        /// Whether it came from the journal that was offered the VM.
        incarnation_same: bool,
        /// The position of the sender's journal.
        position: u64,
    },
    /// Policy still permits.
    CommitPermitted,
    /// Policy or identity no longer permits.
    CommitDenied,
    /// Somebody or something wants to give up.
    GiveUp(ErrorClass),
    /// A new session with the destination stands.
    Reconnected,
    /// An action that has to be durable failed; those behind it were not done.
    Failed,
    /// Operators have decided what nobody else can.
    Decided(SourceDecision),
}

/// What operators may decide when the destination was given the VM and cannot be asked any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceDecision {
    /// The destination is off for good and never ran the VM: the copy here goes on, as a new generation.
    Reclaim,
    /// The destination is off for good and may have run the VM: the copy here is thrown away, the VM is started from its disks.
    Restart,
    /// The destination has the VM: the copy here is thrown away.
    Release,
}

type Turn = (SourceState, Vec<HandoffAction<SourceRecord>>);

impl SourceHandoff {
    /// OFFER is about to be journaled; the guest runs here.
    #[must_use]
    pub fn new(durability: Durability) -> Self {
        Self { state: SourceState::Offered, durability, holding: Holding::Memory, rebuilt: false }
    }

    /// The state that a journal leaves, given what this host holds of the guest, and what follows from that alone; `None`
    /// when the journal holds no OFFER. An OFFER alone becomes ABORT: the guest may be paused, and nobody else may own it.
    #[must_use]
    pub fn recover(records: &[SourceRecord], holding: Holding) -> Option<(Self, Vec<HandoffAction<SourceRecord>>)> {
        use HandoffAction::{Destroy, End, Forget};
        let Some(SourceRecord::Offer(offer)) = records.first() else { return None };
        let OfferRecord { durability, .. } = **offer;
        let mut machine = Self { state: SourceState::Offered, durability, holding, rebuilt: true };
        let (state, actions) = match records.last()? {
            SourceRecord::Offer(_) => machine.abort(ErrorClass::Local),
            SourceRecord::Commit { digest, position } => (SourceState::Committed { digest: *digest, position: *position }, vec![]),
            SourceRecord::Abort { .. } => (SourceState::Aborted { unwritten: false }, machine.awake(false, Outcome::Stayed)),
            SourceRecord::Reclaim { .. } => (SourceState::Reclaimed, machine.awake(false, Outcome::Reclaimed)),
            SourceRecord::Fenced { cold: false } => (SourceState::Fenced, machine.awake(true, Outcome::Reclaimed)),
            SourceRecord::Fenced { cold: true } => (SourceState::Fenced, vec![Destroy, Forget, End(Outcome::Cold)]),
            SourceRecord::Done => (SourceState::Done, vec![Destroy, Forget, End(Outcome::Moved)]),
        };
        machine.state = state;
        Some((machine, actions))
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// The state by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.state {
            SourceState::Offered => "offered",
            SourceState::AwaitPrepared { .. } => "await-prepared",
            SourceState::AwaitCommitPermit { .. } => "await-commit-permit",
            SourceState::Committed { .. } => "committed",
            SourceState::Aborted { .. } => "aborted",
            SourceState::Reclaimed => "reclaimed",
            SourceState::Fenced => "fenced",
            SourceState::Done => "done",
        }
    }

    /// Whether the VM may only be given up by the destination's word, or the operators': after COMMIT.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(self.state, SourceState::Committed { .. })
    }

    /// Whether FINAL was said and PREPARED is awaited.
    #[must_use]
    pub fn awaits_prepared(&self) -> bool {
        matches!(self.state, SourceState::AwaitPrepared { .. })
    }

    /// Whether this side makes an image.
    fn keeps(&self) -> bool {
        self.durability == Durability::Both
    }

    /// The guest goes on here, or has to be started cold when nothing is left of it.
    fn awake(&self, renew: bool, outcome: Outcome) -> Vec<HandoffAction<SourceRecord>> {
        let outcome = if self.is_cold() { Outcome::Cold } else { outcome };
        // Memory that a restart finds may be what the gateway before has just restored from the image.
        let mut actions = wake(self.holding, self.keeps(), renew || (self.rebuilt && self.keeps()));
        actions.push(HandoffAction::End(outcome));
        actions
    }

    fn is_cold(&self) -> bool {
        self.holding == Holding::Nothing
    }

    fn abort(&self, class: ErrorClass) -> Turn {
        let mut actions = vec![HandoffAction::Journal(SourceRecord::Abort { cold: self.is_cold() })];
        actions.extend(self.awake(false, Outcome::Stayed));
        actions.insert(actions.len() - 1, HandoffAction::Send(Handoff::Abort { class }));
        (SourceState::Aborted { unwritten: false }, actions)
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: &SourceStep) -> Result<Vec<HandoffAction<SourceRecord>>, Refusal> {
        let (next, actions) = match event {
            SourceStep::Received { step, incarnation_same: true, position } => self.received(step, *position),
            SourceStep::Received { step, .. } => self.received_of_stranger(step),
            SourceStep::Failed => self.failed(),
            SourceStep::Decided(decision) => self.decided(*decision),
            SourceStep::Reconnected => self.reconnected(),
            SourceStep::Finalised { digest, lanes } => self.finalised(*digest, *lanes),
            SourceStep::CommitPermitted => self.permitted(),
            SourceStep::CommitDenied => matches!(self.state, SourceState::AwaitCommitPermit { .. }).then(|| self.abort(ErrorClass::Denied)),
            SourceStep::GiveUp(class) => Some(self.given_up(*class)),
        }
        .ok_or_else(|| Refusal { state: self.name(), event: event.name(), expected: self.expects() })?;
        self.state = next;
        Ok(actions)
    }

    /// FINAL is said again, with other totals, when a part of what it is about was lost on the way. The guest was paused all
    /// the time, so every FINAL is about the same memory and state, and there is one image.
    fn finalised(&self, digest: FinalDigest, lanes: u16) -> Option<Turn> {
        use HandoffAction::{Keep, Send};
        let first = match self.state {
            SourceState::Offered => true,
            SourceState::AwaitPrepared { .. } => false,
            _ => return None,
        };
        let keep = (first && self.keeps()).then_some(Keep);
        let actions = keep.into_iter().chain([Send(Handoff::Final { digest, lanes })]).collect();
        Some((SourceState::AwaitPrepared { digest, lanes }, actions))
    }

    fn permitted(&self) -> Option<Turn> {
        use HandoffAction::{Journal, Send};
        let SourceState::AwaitCommitPermit { digest, position } = self.state else { return None };
        let actions = vec![Journal(SourceRecord::Commit { digest, position }), Send(Handoff::Commit { digest })];
        Some((SourceState::Committed { digest, position }, actions))
    }

    fn given_up(&self, class: ErrorClass) -> Turn {
        match &self.state {
            SourceState::Offered | SourceState::AwaitPrepared { .. } | SourceState::AwaitCommitPermit { .. } => self.abort(class),
            // After COMMIT a wish to give up changes nothing: the destination may run already.
            state => (state.clone(), vec![]),
        }
    }

    fn received(&self, step: &Handoff, from: u64) -> Option<Turn> {
        use HandoffAction::{AskCommit, Destroy, End, Forget, Journal, Send};
        Some(match (&self.state, step) {
            (SourceState::AwaitPrepared { digest, .. }, Handoff::Prepared { digest: theirs }) if digest == theirs => {
                (SourceState::AwaitCommitPermit { digest: *digest, position: from }, vec![AskCommit])
            }
            (SourceState::AwaitPrepared { .. }, Handoff::Prepared { .. }) => self.abort(ErrorClass::PeerMisbehaved),
            (SourceState::Committed { .. }, Handoff::Running) => {
                let kept = self.keeps().then_some(Forget);
                let actions = [Journal(SourceRecord::Done), Send(Handoff::Done), Destroy].into_iter().chain(kept);
                (SourceState::Done, actions.chain([End(Outcome::Moved)]).collect())
            }
            // INVARIANT(single-runner): a journal that was wiped or went back refuses what it forgot; only the one that was
            // offered the VM can give it back, with a REFUSED behind its PREPARED.
            (SourceState::Committed { position, .. }, Handoff::Refuse { .. }) if from > *position => {
                let mut actions = vec![Journal(SourceRecord::Reclaim { cold: self.is_cold() })];
                actions.extend(self.awake(false, Outcome::Reclaimed));
                (SourceState::Reclaimed, actions)
            }
            (SourceState::Committed { digest, .. }, Handoff::Prepared { digest: theirs }) if digest == theirs => {
                (self.state.clone(), vec![Send(Handoff::Commit { digest: *digest })])
            }
            (SourceState::Done, Handoff::Running) => (SourceState::Done, vec![Send(Handoff::Done)]),
            _ => return self.received_of_stranger(step),
        })
    }

    /// What is heard from any journal of the destination.
    fn received_of_stranger(&self, step: &Handoff) -> Option<Turn> {
        use HandoffAction::Send;
        Some(match (&self.state, step) {
            // It never had the VM.
            (
                SourceState::Offered | SourceState::AwaitPrepared { .. } | SourceState::AwaitCommitPermit { .. },
                Handoff::Refuse { class },
            ) => self.abort(*class),
            // It was prepared for a VM that stays here.
            (SourceState::Aborted { .. } | SourceState::Reclaimed | SourceState::Fenced, Handoff::Prepared { .. }) => {
                (self.state.clone(), vec![Send(Handoff::Abort { class: ErrorClass::Cancelled })])
            }
            (SourceState::Aborted { .. } | SourceState::Reclaimed | SourceState::Fenced | SourceState::Done, Handoff::Refuse { .. }) => {
                (self.state.clone(), vec![])
            }
            _ => return None,
        })
    }

    fn reconnected(&self) -> Option<Turn> {
        use HandoffAction::Send;
        let said = match &self.state {
            SourceState::AwaitPrepared { digest, lanes } => Handoff::Final { digest: *digest, lanes: *lanes },
            SourceState::Committed { digest, .. } => Handoff::Commit { digest: *digest },
            SourceState::Aborted { .. } => Handoff::Abort { class: ErrorClass::Cancelled },
            SourceState::Done => Handoff::Done,
            _ => return None,
        };
        Some((self.state.clone(), vec![Send(said)]))
    }

    fn failed(&self) -> Option<Turn> {
        use HandoffAction::{End, LeaveToJournal, Send};
        Some(match &self.state {
            SourceState::Offered | SourceState::AwaitPrepared { .. } => self.abort(ErrorClass::Local),
            // An ABORT that cannot be written is implied: COMMIT was never attempted, and a restart makes ABORT of an OFFER.
            // The guest's life does not wait for the disk, unless an older image of it stays behind there, or it may have been
            // restored from that image already.
            SourceState::Aborted { unwritten: false } if self.holding != Holding::Image => {
                let mut actions = self.awake(false, Outcome::Stayed);
                actions.insert(actions.len() - 1, Send(Handoff::Abort { class: ErrorClass::Local }));
                (SourceState::Aborted { unwritten: true }, actions)
            }
            // The destination said that it runs the VM; what is not written or removed here is at the next start.
            SourceState::Done => (SourceState::Done, vec![End(Outcome::Moved)]),
            SourceState::AwaitCommitPermit { .. } => return None,
            state => (state.clone(), vec![LeaveToJournal]),
        })
    }

    /// `INVARIANT(single-runner)`: operators answer for a destination that cannot be asked. Where it may have run the VM, the
    /// copy here is older than the VM's disks and is thrown away.
    fn decided(&self, decision: SourceDecision) -> Option<Turn> {
        use HandoffAction::{Destroy, End, Forget, Journal};
        if !self.is_committed() {
            return None;
        }
        let kept = self.keeps().then_some(Forget);
        Some(match decision {
            SourceDecision::Reclaim if !self.is_cold() => {
                let mut actions = vec![Journal(SourceRecord::Fenced { cold: false })];
                actions.extend(self.awake(true, Outcome::Reclaimed));
                (SourceState::Fenced, actions)
            }
            SourceDecision::Reclaim | SourceDecision::Restart => {
                let actions = [Journal(SourceRecord::Fenced { cold: true }), Destroy].into_iter().chain(kept);
                (SourceState::Fenced, actions.chain([End(Outcome::Cold)]).collect())
            }
            SourceDecision::Release => {
                let actions = [Journal(SourceRecord::Done), Destroy].into_iter().chain(kept);
                (SourceState::Done, actions.chain([End(Outcome::Moved)]).collect())
            }
        })
    }

    fn expects(&self) -> &'static str {
        match self.state {
            SourceState::Offered => "the end of stop-and-copy",
            SourceState::AwaitPrepared { .. } => "PREPARED or REFUSE from the journal that was offered the VM",
            SourceState::AwaitCommitPermit { .. } => "the answer of policy",
            SourceState::Committed { .. } => "RUNNING or REFUSE from the journal that was offered the VM",
            _ => "nothing: the handoff has ended",
        }
    }
}

impl SourceStep {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Finalised { .. } => "finalised",
            Self::Received { step, incarnation_same: true, .. } => handoff_name(step),
            Self::Received { .. } => "message of another incarnation",
            Self::CommitPermitted => "commit-permitted",
            Self::CommitDenied => "commit-denied",
            Self::GiveUp(_) => "give-up",
            Self::Reconnected => "reconnected",
            Self::Failed => "failed",
            Self::Decided(_) => "decided",
        }
    }
}
