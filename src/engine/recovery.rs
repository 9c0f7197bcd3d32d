//! What becomes of a handoff that was interrupted: decided by its journal, and by the peer's word where that is needed.

use std::sync::Arc;

use crate::engine::handoff::{Binding, Evidence, JournalRecord, Placement, joined, wake};
use crate::engine::{EngineError, Link};
use crate::hypervisor::{HypervisorError, PagedSource, RunState};
use crate::identity::verify_signature;
use crate::limits;
use crate::migration::{
    DestinationHandoff, DestinationRecord, DestinationStep, HandoffAction, Outcome, SourceHandoff, SourceRecord, SourceStep,
};
use crate::transport::{Session, TransportError};
use crate::types::{MigrationId, Side, SpiffeId, VmName};
use crate::wire::{ErrorClass, Handoff, Message, SignedHandoff};

/// Re-attaches to a guest by the address in a record.
pub type Attach = Arc<dyn Fn(&str, &VmName) -> Result<Box<dyn PagedSource>, HypervisorError> + Send + Sync>;

/// What came of an interrupted handoff.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// Nothing is open: the journal is closed or was never begun.
    Settled,
    /// Ended now, this way.
    Ended(Outcome),
    /// The peer has to be asked.
    Open {
        /// The VM.
        vm: VmName,
        /// The peer gateway.
        peer: SpiffeId,
        /// Whether this gateway is the source.
        source: bool,
    },
}

/// One interrupted handoff, rebuilt from its journal.
enum Machine {
    Source(SourceHandoff),
    Destination(DestinationHandoff),
}

struct Interrupted<'a> {
    evidence: &'a Evidence,
    attach: &'a Attach,
    binding: Binding,
    machine: Machine,
    /// What the journal alone decides; not done yet.
    due: Due,
    /// Nothing more can come of it.
    settled: bool,
}

enum Due {
    Source(Vec<HandoffAction<SourceRecord>>),
    Destination(Vec<HandoffAction<DestinationRecord>>),
}

impl<'a> Interrupted<'a> {
    /// Rebuilds a handoff. Nothing is done yet: whoever asks may not be who it is about.
    fn load(evidence: &'a Evidence, attach: &'a Attach, migration: MigrationId) -> Result<Option<Self>, EngineError> {
        let records = evidence.records(migration)?;
        let sources: Vec<_> =
            records.iter().filter_map(|r| if let JournalRecord::Source(r) = r { Some(r.clone()) } else { None }).collect();
        let destinations: Vec<_> =
            records.iter().filter_map(|r| if let JournalRecord::Destination(r) = r { Some(r.clone()) } else { None }).collect();
        if let Some(SourceRecord::Offer(offer)) = sources.first() {
            let Some((machine, actions)) = SourceHandoff::recover(&sources) else { return Ok(None) };
            let mut settled = matches!(sources.last(), Some(SourceRecord::Abort | SourceRecord::Reclaim | SourceRecord::Done));
            let binding = Binding::from(offer.as_ref());
            if matches!(sources.last(), Some(SourceRecord::Offer(_))) && !evidence.is_here(&binding, offer.epoch)? {
                // Another attempt has moved the VM since; this one was never given back its end on disk.
                settled = true;
            }
            return Ok(Some(Self { evidence, attach, binding, machine: Machine::Source(machine), due: Due::Source(actions), settled }));
        }
        if let Some(DestinationRecord::Prepared(record)) = destinations.first() {
            let intact = match destinations.last() {
                Some(DestinationRecord::Prepared(_)) => attach(&record.address, &record.vm).is_ok(),
                _ => true,
            };
            let (machine, mut actions) = DestinationHandoff::recover(&destinations, intact);
            let settled = matches!(destinations.last(), Some(DestinationRecord::Refused | DestinationRecord::Closed));
            let binding = Binding::from(record.as_ref());
            if matches!(destinations.last(), Some(DestinationRecord::Run)) && !evidence.is_here(&binding, binding.epoch)? {
                // INVARIANT(single-runner): a VM that was given on since is not this handoff's to start.
                actions.clear();
            }
            let (machine, due) = (Machine::Destination(machine), Due::Destination(actions));
            return Ok(Some(Self { evidence, attach, binding, machine, due, settled }));
        }
        Ok(None)
    }

    /// Performs what the journal alone decides.
    async fn settle(&mut self) -> Result<Resolved, EngineError> {
        let due = std::mem::replace(&mut self.due, Due::Source(Vec::new()));
        if self.settled {
            return Ok(Resolved::Settled);
        }
        let ended = match due {
            Due::Source(actions) => self.perform(actions, None).await?,
            Due::Destination(actions) => self.perform(actions, None).await?,
        };
        Ok(match ended {
            Some(outcome) => Resolved::Ended(outcome),
            None => Resolved::Open {
                vm: self.binding.vm.clone(),
                peer: self.binding.peer.clone(),
                source: matches!(self.machine, Machine::Source(_)),
            },
        })
    }

    async fn with_guest(&self, what: fn(&mut dyn PagedSource) -> Result<(), HypervisorError>) -> Result<(), EngineError> {
        let (attach, address, vm) = (Arc::clone(self.attach), self.binding.address.clone(), self.binding.vm.clone());
        joined(tokio::task::spawn_blocking(move || what(attach(&address, &vm)?.as_mut())).await)?.map_err(EngineError::from)
    }

    async fn perform<R: Into<JournalRecord>>(
        &self,
        actions: Vec<HandoffAction<R>>,
        session: Option<&Session>,
    ) -> Result<Option<Outcome>, EngineError> {
        for action in actions {
            match action {
                HandoffAction::Journal(record) => self.evidence.record(&self.binding, record).await?,
                HandoffAction::Send(step) => {
                    if let Some(session) = session {
                        self.evidence.send(session, &self.binding, step).await;
                    }
                }
                HandoffAction::Resume => match (self.with_guest(wake).await, &self.machine) {
                    // RUN is the fact, whatever became of the guest since; the source has to hear it.
                    (Err(error), Machine::Destination(_)) => {
                        tracing::error!(vm = %self.binding.vm, error = %crate::telemetry::chain(&error), "the guest is not resumed");
                    }
                    (result, _) => result?,
                },
                HandoffAction::Destroy => {
                    if let Err(error) = self.with_guest(|guest| guest.destroy()).await {
                        tracing::warn!(vm = %self.binding.vm, error = %error, "the copy that is no longer needed is gone already");
                    }
                }
                // Only asked before PREPARED or COMMIT, which an interrupted handoff is past.
                HandoffAction::AskCommit => return Err(EngineError::Bug("policy asked during recovery".into())),
                HandoffAction::End(outcome) => return Ok(Some(outcome)),
            }
        }
        Ok(None)
    }

    async fn step(&mut self, event: Step, session: &Session) -> Result<Option<Outcome>, EngineError> {
        match (&mut self.machine, event) {
            (Machine::Source(machine), event) => {
                let step = match event {
                    Step::Reconnected => SourceStep::Reconnected,
                    Step::Received(step, incarnation_same) => SourceStep::Received { step, incarnation_same },
                };
                let actions = machine.step(&step)?;
                self.perform(actions, Some(session)).await
            }
            (Machine::Destination(machine), event) => {
                let step = match event {
                    Step::Reconnected => DestinationStep::Reconnected,
                    Step::Received(step, _) => DestinationStep::Received(step),
                };
                let actions = machine.step(&step)?;
                self.perform(actions, Some(session)).await
            }
        }
    }

    fn is_settled(&self) -> bool {
        match &self.machine {
            Machine::Source(machine) => !machine.is_committed(),
            Machine::Destination(machine) => !matches!(machine, DestinationHandoff::Prepared { .. } | DestinationHandoff::Running),
        }
    }

    async fn converse(mut self, link: &Link, first: Step) -> Result<Resolved, EngineError> {
        let mut event = first;
        loop {
            if let Some(outcome) = self.step(event, &link.session).await? {
                return Ok(Resolved::Ended(outcome));
            }
            event = loop {
                let received = tokio::time::timeout(limits::ANSWER_WITHIN, link.session.receive()).await.unwrap_or_else(|_| {
                    let (address, after) = (link.session.peer_address(), limits::ANSWER_WITHIN);
                    Err(TransportError::TimedOut { address, awaited: "go on with the handoff", after })
                });
                match received {
                    Ok(Message::Handoff(signed)) => {
                        let (step, same) = self.evidence.check(&self.binding, &signed)?;
                        break Step::Received(step, same);
                    }
                    Ok(Message::Ping | Message::AuditHead(_)) => {}
                    Ok(other) => return Err(EngineError::OutOfPlace { expected: "a handoff message", got: other.name().to_owned() }),
                    Err(_) if self.is_settled() => return Ok(Resolved::Settled),
                    Err(source) => return Err(EngineError::Transport { migration: self.binding.migration, source }),
                }
            };
        }
    }
}

enum Step {
    Reconnected,
    Received(Handoff, bool),
}

/// A migration that a journal knows: what it was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interruption {
    /// The VM.
    pub vm: VmName,
    /// The other gateway.
    pub peer: SpiffeId,
    /// Which end this gateway was.
    pub side: Side,
    /// How it ended, once nothing is open.
    pub outcome: Option<Outcome>,
}

/// What a migration of the journal was about; nothing when only its refusal is known.
///
/// # Errors
/// The journal cannot be read.
pub fn interruption(evidence: &Evidence, migration: MigrationId) -> Result<Option<Interruption>, EngineError> {
    let records = evidence.records(migration)?;
    let outcome = match records.last() {
        Some(JournalRecord::Source(SourceRecord::Abort) | JournalRecord::Destination(DestinationRecord::Refused)) => Some(Outcome::Stayed),
        Some(JournalRecord::Source(SourceRecord::Reclaim)) => Some(Outcome::Reclaimed),
        Some(JournalRecord::Source(SourceRecord::Done) | JournalRecord::Destination(DestinationRecord::Closed)) => Some(Outcome::Moved),
        _ => None,
    };
    let about = |side, binding: Binding| Interruption { vm: binding.vm, peer: binding.peer, side, outcome };
    Ok(records.first().and_then(|first| match first {
        JournalRecord::Source(SourceRecord::Offer(offer)) => Some(about(Side::Source, offer.as_ref().into())),
        JournalRecord::Destination(DestinationRecord::Prepared(record)) => Some(about(Side::Destination, record.as_ref().into())),
        _ => None,
    }))
}

/// Whether the twin of a migration is or may become the guest, by the journal. One that is not is nobody's.
///
/// # Errors
/// The journal cannot be read.
pub fn may_own_twin(evidence: &Evidence, migration: MigrationId) -> Result<bool, EngineError> {
    use DestinationRecord::{Closed, Prepared, Run};
    let last = evidence.records(migration)?.pop();
    Ok(matches!(last, Some(JournalRecord::Destination(Prepared(_) | Run | Closed))))
}

/// Repeats the effect of a migration's last record, in case a crash came between the two: resumes a guest that stays,
/// destroys the paused copy of one that is away. Only for a gateway that starts: no migration has a guest in hand then,
/// and a record speaks for the guest only while the VM's placement is the one that it made.
///
/// # Errors
/// The journal cannot be read, or the guest does not do it.
pub async fn repeat_effect(evidence: &Evidence, attach: &Attach, migration: MigrationId) -> Result<(), EngineError> {
    let records = evidence.records(migration)?;
    let (Some(JournalRecord::Source(SourceRecord::Offer(offer))), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
    let binding = Binding::from(offer.as_ref());
    let read = |source| EngineError::Record { migration, source };
    let place = evidence.journal.vm(&binding.vm)?.map(|bytes| Placement::read(&bytes)).transpose().map_err(read)?;
    if place.is_none() || place != last.placement(&binding) {
        return Ok(());
    }
    let effect: fn(&mut dyn PagedSource) -> Result<(), HypervisorError> = match last {
        // A guest that runs may still be slowed down and watched.
        JournalRecord::Source(SourceRecord::Abort | SourceRecord::Reclaim) => |guest| match guest.status()?.state {
            RunState::Paused | RunState::Running => wake(guest),
            RunState::Incoming | RunState::Ended => Ok(()),
        },
        JournalRecord::Source(SourceRecord::Done) => |guest| match guest.status()?.state {
            RunState::Paused => guest.destroy(),
            _ => Ok(()),
        },
        _ => return Ok(()),
    };
    let (attach, address) = (Arc::clone(attach), binding.address);
    let repeat = move || match attach(&address, &binding.vm) {
        Ok(mut guest) => effect(guest.as_mut()),
        // A copy that is gone needs nothing; one that is busy does.
        Err(HypervisorError::Unreachable { source, .. }) if is_gone(&source) => Ok(()),
        Err(error) => Err(error),
    };
    Ok(joined(tokio::task::spawn_blocking(repeat).await)??)
}

/// Whether nobody listens where a VMM was: its process, and with it the guest, is gone.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused)
}

/// Performs what the journal alone decides about a migration, and says whether the peer must be asked.
/// With a `link` to that peer it asks.
///
/// # Errors
/// The journal cannot be read, the guest cannot be reached, or the peer misbehaves; nothing was decided then.
pub async fn resolve(evidence: &Evidence, attach: &Attach, migration: MigrationId, link: Option<&Link>) -> Result<Resolved, EngineError> {
    let Some(mut interrupted) = Interrupted::load(evidence, attach, migration)? else { return Ok(Resolved::Settled) };
    let resolved = interrupted.settle().await?;
    match (&resolved, link) {
        (Resolved::Open { peer, .. }, Some(link)) => {
            if link.peer.spiffe != *peer {
                return Err(EngineError::NotAuthentic { migration, why: "session peer" });
            }
            interrupted.converse(link, Step::Reconnected).await
        }
        _ => Ok(resolved),
    }
}

/// Answers a peer that comes back for an interrupted handoff.
///
/// # Errors
/// As [`resolve`].
pub async fn answer(evidence: &Evidence, attach: &Attach, link: &Link, signed: &SignedHandoff) -> Result<Resolved, EngineError> {
    let migration = signed.message.migration;
    let Some(mut interrupted) = Interrupted::load(evidence, attach, migration)? else {
        // Nothing was ever promised for this migration, and never will be.
        if !verify_signature(&link.peer.signing_key, &signed.message.signed_bytes(), &signed.signature) {
            return Err(EngineError::NotAuthentic { migration, why: "signature" });
        }
        let binding = Binding {
            migration,
            vm: placeholder_name(migration)?,
            uuid: signed.message.uuid,
            epoch: signed.message.epoch,
            peer: link.peer.spiffe.clone(),
            peer_incarnation: signed.message.sender,
            peer_key: link.peer.signing_key,
            address: String::new(),
        };
        if matches!(signed.message.step, Handoff::Commit | Handoff::Final { .. }) {
            if evidence.records(migration)?.is_empty() {
                evidence.record(&binding, DestinationRecord::Refused).await?;
            }
            evidence.send(&link.session, &binding, Handoff::Refuse { class: ErrorClass::Local }).await;
        }
        return Ok(Resolved::Settled);
    };
    if link.peer.spiffe != interrupted.binding.peer {
        return Err(EngineError::NotAuthentic { migration, why: "session peer" });
    }
    // Only now is it known that the right peer asks.
    let (step, same) = evidence.check(&interrupted.binding, signed)?;
    interrupted.settle().await?;
    interrupted.converse(link, Step::Received(step, same)).await
}

/// A name for the audit entry about a migration that this gateway knows nothing of.
fn placeholder_name(migration: MigrationId) -> Result<VmName, EngineError> {
    format!("unknown-{migration}").parse().map_err(|error| EngineError::Bug(format!("{error}")))
}
