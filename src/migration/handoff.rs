//! The commit part: who owns the VM, decided by journals alone.
//!
//! Protocol and proof: `ARCHITECTURE.md`, handoff. Each side is one machine with one record a state.
//! A machine is rebuilt from its journal with `recover`, so that a restarted gateway goes on with
//! exactly the transitions that a running one has.

use serde::{Deserialize, Serialize};

use crate::migration::Refusal;
use crate::types::{Epoch, Incarnation, MigrationId, SpiffeId, VmName, VmUuid};
use crate::wire::{ErrorClass, FinalDigest, Handoff};

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM runs on the destination.
    Moved,
    /// The VM runs on the source, as before.
    Stayed,
    /// The VM was given and refused: it runs on the source again.
    Reclaimed,
}

/// What a source writes before it gives a VM away, and what it needs to go on after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferRecord {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM's name at the source.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which the source owns the VM.
    pub epoch: Epoch,
    /// The destination gateway.
    pub peer: SpiffeId,
    /// The destination's journal.
    pub peer_incarnation: Incarnation,
    /// The key that signs the destination's handoff messages.
    pub peer_key: [u8; 32],
    /// SHA-256 of the policy set that permitted the release.
    pub policy_digest: [u8; 32],
    /// Where the guest's VMM is attached.
    pub address: String,
}

/// A record of the source's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRecord {
    /// Written while the guest still runs: from now on it may be paused for this attempt.
    Offer(Box<OfferRecord>),
    /// The destination owns the VM. The source never runs it again unless it is refused.
    Commit,
    /// The VM stays. Written only while COMMIT was never said.
    Abort,
    /// The destination refused the VM after COMMIT; the source owns it again.
    Reclaim,
    /// The destination runs the VM; the old copy may be destroyed.
    Done,
}

/// What a destination writes before it says that it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedRecord {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM's name.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which the destination would own the VM.
    pub epoch: Epoch,
    /// The source gateway.
    pub peer: SpiffeId,
    /// The source's journal.
    pub peer_incarnation: Incarnation,
    /// The key that signs the source's handoff messages.
    pub peer_key: [u8; 32],
    /// What the twin holds.
    #[serde(with = "digest_text")]
    pub digest: FinalDigest,
    /// Where the twin's VMM is attached.
    pub address: String,
}

/// A record of the destination's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationRecord {
    /// The twin is complete and stays paused until COMMIT.
    Prepared(Box<PreparedRecord>),
    /// The destination owns the VM and runs it.
    Run,
    /// The destination will never run this attempt's VM.
    Refused,
    /// The source knows that the VM runs here.
    Closed,
}

/// What to do, strictly in this order; a failed `Journal` cuts off what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandoffAction<R> {
    /// Make this record durable.
    Journal(R),
    /// Tell the peer. May be lost: it is said again on each reconnect.
    Send(Handoff),
    /// Ask policy and identity whether this peer may still have, or give, the VM.
    AskCommit,
    /// Start the guest's vCPUs here.
    Resume,
    /// Destroy the copy here.
    Destroy,
    /// Nothing more follows for this migration.
    End(Outcome),
}

/// The source's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceHandoff {
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
    AwaitCommitPermit,
    /// COMMIT is journaled.
    Committed,
    /// ABORT is journaled.
    Aborted,
    /// RECLAIM is journaled.
    Reclaimed,
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
    /// A handoff message of the destination, its signature and binding checked; `incarnation_same`
    /// says whether it came from the journal that was offered the VM.
    Received {
        /// The message.
        step: Handoff,
        /// Whether the sender is the incarnation in OFFER.
        incarnation_same: bool,
    },
    /// Policy still permits.
    CommitPermitted,
    /// Policy or identity no longer permits.
    CommitDenied,
    /// Somebody or something wants to give up.
    GiveUp(ErrorClass),
    /// A new session with the destination stands.
    Reconnected,
}

type SourceTurn = (SourceHandoff, Vec<HandoffAction<SourceRecord>>);

impl SourceHandoff {
    /// The state that a journal leaves; `None` when it holds no OFFER.
    /// An OFFER alone becomes ABORT: the guest may be paused, and nobody else may own it.
    #[must_use]
    pub fn recover(records: &[SourceRecord]) -> Option<SourceTurn> {
        use HandoffAction::{Destroy, End, Journal, Resume};
        let last = records.last()?;
        matches!(records.first(), Some(SourceRecord::Offer(_))).then(|| match last {
            SourceRecord::Offer(_) => (Self::Aborted, vec![Journal(SourceRecord::Abort), Resume, End(Outcome::Stayed)]),
            SourceRecord::Commit => (Self::Committed, vec![]),
            SourceRecord::Abort => (Self::Aborted, vec![Resume, End(Outcome::Stayed)]),
            SourceRecord::Reclaim => (Self::Reclaimed, vec![Resume, End(Outcome::Reclaimed)]),
            SourceRecord::Done => (Self::Done, vec![Destroy, End(Outcome::Moved)]),
        })
    }

    /// The state by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::AwaitPrepared { .. } => "await-prepared",
            Self::AwaitCommitPermit => "await-commit-permit",
            Self::Committed => "committed",
            Self::Aborted => "aborted",
            Self::Reclaimed => "reclaimed",
            Self::Done => "done",
        }
    }

    /// Whether the VM may only be given up by the destination's word: after COMMIT.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(self, Self::Committed)
    }

    fn abort(class: ErrorClass) -> SourceTurn {
        use HandoffAction::{End, Journal, Resume, Send};
        (Self::Aborted, vec![Journal(SourceRecord::Abort), Resume, Send(Handoff::Abort { class }), End(Outcome::Stayed)])
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: &SourceStep) -> Result<Vec<HandoffAction<SourceRecord>>, Refusal> {
        let (next, actions) = self.turn(event)?;
        *self = next;
        Ok(actions)
    }

    fn turn(&self, event: &SourceStep) -> Result<SourceTurn, Refusal> {
        use HandoffAction::{AskCommit, Destroy, End, Journal, Resume, Send};
        let refuse = |expected| Err(Refusal { state: self.name(), event: event.name(), expected });
        match (self, event) {
            (Self::Offered, SourceStep::Finalised { digest, lanes }) => {
                Ok((Self::AwaitPrepared { digest: *digest, lanes: *lanes }, vec![Send(Handoff::Final { digest: *digest, lanes: *lanes })]))
            }
            (
                Self::AwaitPrepared { digest, .. },
                SourceStep::Received { step: Handoff::Prepared { digest: theirs }, incarnation_same: true },
            ) => {
                if digest == theirs {
                    Ok((Self::AwaitCommitPermit, vec![AskCommit]))
                } else {
                    Ok(Self::abort(ErrorClass::PeerMisbehaved))
                }
            }
            (Self::AwaitCommitPermit, SourceStep::CommitPermitted) => {
                Ok((Self::Committed, vec![Journal(SourceRecord::Commit), Send(Handoff::Commit)]))
            }
            (Self::AwaitCommitPermit, SourceStep::CommitDenied) => Ok(Self::abort(ErrorClass::Denied)),
            (Self::Offered | Self::AwaitPrepared { .. } | Self::AwaitCommitPermit, SourceStep::GiveUp(class)) => Ok(Self::abort(*class)),
            (
                Self::Offered | Self::AwaitPrepared { .. } | Self::AwaitCommitPermit,
                SourceStep::Received { step: Handoff::Refuse { class }, .. },
            ) => Ok(Self::abort(*class)),
            (Self::Committed, SourceStep::Received { step: Handoff::Running, incarnation_same: true }) => {
                Ok((Self::Done, vec![Journal(SourceRecord::Done), Send(Handoff::Done), Destroy, End(Outcome::Moved)]))
            }
            // INVARIANT(single-runner): a journal that was wiped refuses what it forgot; only the
            // incarnation that was offered the VM can give it back.
            (Self::Committed, SourceStep::Received { step: Handoff::Refuse { .. }, incarnation_same: true }) => {
                Ok((Self::Reclaimed, vec![Journal(SourceRecord::Reclaim), Resume, End(Outcome::Reclaimed)]))
            }
            // After COMMIT a wish to give up changes nothing: the destination may run already.
            (Self::Committed, SourceStep::GiveUp(_)) => Ok((Self::Committed, vec![])),
            (Self::Committed, SourceStep::Reconnected | SourceStep::Received { step: Handoff::Prepared { .. }, .. }) => {
                Ok((Self::Committed, vec![Send(Handoff::Commit)]))
            }
            (Self::AwaitPrepared { digest, lanes }, SourceStep::Reconnected) => {
                Ok((Self::AwaitPrepared { digest: *digest, lanes: *lanes }, vec![Send(Handoff::Final { digest: *digest, lanes: *lanes })]))
            }
            (Self::Done, SourceStep::Reconnected | SourceStep::Received { step: Handoff::Running, .. }) => {
                Ok((Self::Done, vec![Send(Handoff::Done)]))
            }
            (Self::Aborted, SourceStep::Reconnected | SourceStep::Received { step: Handoff::Prepared { .. }, .. }) => {
                Ok((Self::Aborted, vec![Send(Handoff::Abort { class: ErrorClass::Cancelled })]))
            }
            (
                state @ (Self::Aborted | Self::Reclaimed | Self::Done),
                SourceStep::Received { step: Handoff::Refuse { .. }, .. } | SourceStep::GiveUp(_),
            ) => Ok((state.clone(), vec![])),
            (Self::AwaitPrepared { .. }, _) => refuse("PREPARED or REFUSE from the incarnation that was offered the VM"),
            (Self::AwaitCommitPermit, _) => refuse("the answer of policy"),
            (Self::Committed, _) => refuse("RUNNING or REFUSE from the incarnation that was offered the VM"),
            (Self::Offered, _) => refuse("the end of stop-and-copy"),
            _ => refuse("nothing: the handoff has ended"),
        }
    }
}

impl SourceStep {
    /// The event by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Finalised { .. } => "finalised",
            Self::Received { step, incarnation_same: true } => handoff_name(step),
            Self::Received { .. } => "message of another incarnation",
            Self::CommitPermitted => "commit-permitted",
            Self::CommitDenied => "commit-denied",
            Self::GiveUp(_) => "give-up",
            Self::Reconnected => "reconnected",
        }
    }
}

/// A handoff message by name.
pub(crate) fn handoff_name(step: &Handoff) -> &'static str {
    match step {
        Handoff::Final { .. } => "FINAL",
        Handoff::Prepared { .. } => "PREPARED",
        Handoff::Commit => "COMMIT",
        Handoff::Running => "RUNNING",
        Handoff::Done => "DONE",
        Handoff::Abort { .. } => "ABORT",
        Handoff::Refuse { .. } => "REFUSE",
    }
}

/// The destination's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationHandoff {
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
    Refused,
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
    /// Something here cannot go on.
    GiveUp(ErrorClass),
    /// A new session with the source stands.
    Reconnected,
}

type DestinationTurn = (DestinationHandoff, Vec<HandoffAction<DestinationRecord>>);

impl DestinationHandoff {
    /// The state that a journal leaves; an empty journal never promised anything and refuses.
    /// `twin_intact` says whether the prepared twin still exists with its memory.
    #[must_use]
    pub fn recover(records: &[DestinationRecord], twin_intact: bool) -> DestinationTurn {
        use HandoffAction::{Destroy, Journal, Resume};
        match (records.first(), records.last()) {
            (Some(DestinationRecord::Prepared(record)), Some(DestinationRecord::Prepared(_))) => {
                if twin_intact {
                    (Self::Prepared { digest: record.digest }, vec![])
                } else {
                    (Self::Refused, vec![Journal(DestinationRecord::Refused)])
                }
            }
            (_, Some(DestinationRecord::Run)) => (Self::Running, vec![Resume]),
            (_, Some(DestinationRecord::Closed)) => (Self::Closed, vec![]),
            _ => (Self::Refused, vec![Destroy]),
        }
    }

    /// The state by name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::AwaitCommitPermit { .. } => "await-commit-permit",
            Self::Prepared { .. } => "prepared",
            Self::Running => "running",
            Self::Refused => "refused",
            Self::Closed => "closed",
        }
    }

    /// Whether the outcome now depends on the source's word alone.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        matches!(self, Self::Prepared { .. })
    }

    fn refuse_vm(class: ErrorClass) -> DestinationTurn {
        use HandoffAction::{Destroy, End, Journal, Send};
        (Self::Refused, vec![Journal(DestinationRecord::Refused), Destroy, Send(Handoff::Refuse { class }), End(Outcome::Stayed)])
    }

    /// One step.
    ///
    /// # Errors
    /// [`Refusal`] when the event has no place in this state; the state is then unchanged.
    pub fn step(&mut self, event: &DestinationStep) -> Result<Vec<HandoffAction<DestinationRecord>>, Refusal> {
        let (next, actions) = self.turn(event)?;
        *self = next;
        Ok(actions)
    }

    fn turn(&self, event: &DestinationStep) -> Result<DestinationTurn, Refusal> {
        use HandoffAction::{AskCommit, End, Journal, Resume, Send};
        let refuse = |expected| Err(Refusal { state: self.name(), event: event.name(), expected });
        match (self, event) {
            (Self::Receiving, DestinationStep::TwinComplete(record)) => {
                Ok((Self::AwaitCommitPermit { record: record.clone() }, vec![AskCommit]))
            }
            (Self::AwaitCommitPermit { record }, DestinationStep::CommitPermitted) => {
                let digest = record.digest;
                let actions = vec![Journal(DestinationRecord::Prepared(record.clone())), Send(Handoff::Prepared { digest })];
                Ok((Self::Prepared { digest }, actions))
            }
            (Self::AwaitCommitPermit { .. }, DestinationStep::CommitDenied) => Ok(Self::refuse_vm(ErrorClass::Denied)),
            (Self::Receiving | Self::AwaitCommitPermit { .. } | Self::Prepared { .. }, DestinationStep::GiveUp(class)) => {
                Ok(Self::refuse_vm(*class))
            }
            (
                Self::Receiving | Self::AwaitCommitPermit { .. } | Self::Prepared { .. },
                DestinationStep::Received(Handoff::Abort { class }),
            ) => Ok(Self::refuse_vm(*class)),
            (Self::Prepared { .. }, DestinationStep::Received(Handoff::Commit)) => {
                Ok((Self::Running, vec![Journal(DestinationRecord::Run), Resume, Send(Handoff::Running)]))
            }
            (Self::Prepared { digest }, DestinationStep::Reconnected | DestinationStep::Received(Handoff::Final { .. })) => {
                Ok((Self::Prepared { digest: *digest }, vec![Send(Handoff::Prepared { digest: *digest })]))
            }
            (Self::Running, DestinationStep::Received(Handoff::Done)) => {
                Ok((Self::Closed, vec![Journal(DestinationRecord::Closed), End(Outcome::Moved)]))
            }
            (state @ (Self::Running | Self::Closed), DestinationStep::Received(Handoff::Commit)) => {
                Ok((state.clone(), vec![Send(Handoff::Running)]))
            }
            (Self::Running, DestinationStep::Reconnected) => Ok((Self::Running, vec![Send(Handoff::Running)])),
            (Self::Closed, DestinationStep::Received(Handoff::Done)) => Ok((Self::Closed, vec![])),
            (state @ (Self::Running | Self::Closed), DestinationStep::GiveUp(_)) => Ok((state.clone(), vec![])),
            (Self::Refused, DestinationStep::Received(Handoff::Final { .. } | Handoff::Commit) | DestinationStep::Reconnected) => {
                Ok((Self::Refused, vec![Send(Handoff::Refuse { class: ErrorClass::Cancelled })]))
            }
            (Self::Refused, DestinationStep::Received(Handoff::Abort { .. }) | DestinationStep::GiveUp(_)) => Ok((Self::Refused, vec![])),
            (Self::Receiving, _) => refuse("FINAL or ABORT"),
            (Self::AwaitCommitPermit { .. }, _) => refuse("the answer of policy, or ABORT"),
            (Self::Prepared { .. }, _) => refuse("COMMIT or ABORT"),
            (Self::Running, _) => refuse("DONE"),
            _ => refuse("nothing: the handoff has ended"),
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
        }
    }
}

mod digest_text {
    //! A digest in the journal, as three hexadecimal words.
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::wire::FinalDigest;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
        let mut out = [0; N];
        if text.len() != 2 * N || !text.is_ascii() {
            return None;
        }
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(out)
    }

    pub(super) fn serialize<S: Serializer>(digest: &FinalDigest, serializer: S) -> Result<S::Ok, S::Error> {
        let text = format!("{} {} {}", hex(&digest.state), hex(&digest.lanes), hex(&digest.memory.to_be_bytes()));
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FinalDigest, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut words = text.split(' ');
        let mut parse = || {
            let state = unhex(words.next()?)?;
            let lanes = unhex(words.next()?)?;
            let memory = u128::from_be_bytes(unhex(words.next()?)?);
            Some(FinalDigest { state, lanes, memory })
        };
        parse().ok_or_else(|| D::Error::custom("expected three hexadecimal digests"))
    }
}
