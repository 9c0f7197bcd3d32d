//! Journal, wire and effect in the right order, for running migrations and for restarted gateways.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::audit::{AuditLog, Entry, Event, Outcome as AuditOutcome};
use crate::engine::link::send_within;
use crate::engine::{EngineError, Link};
use crate::hypervisor::{HypervisorError, PagedSource};
use crate::identity::{Signer, verify_signature};
use crate::journal::Journal;
use crate::limits;
use crate::migration::{
    DestinationHandoff, DestinationRecord, DestinationStep, HandoffAction, OfferRecord, Outcome, PreparedRecord, SourceHandoff,
    SourceRecord, SourceStep,
};
use crate::transport::{Session, TransportError};
use crate::types::{Epoch, Incarnation, MigrationId, SpiffeId, VmName, VmUuid};
use crate::wire::{ErrorClass, Handoff, HandoffMessage, Message, SignedHandoff};

/// What this gateway remembers and signs with.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// Handoff records.
    pub journal: Arc<Journal>,
    /// The audit log.
    pub audit: AuditLog,
    /// The gateway's signing key.
    pub signer: Arc<Signer>,
}

/// A record as it lies in the journal: of the side that this gateway was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum JournalRecord {
    Source(SourceRecord),
    Destination(DestinationRecord),
}

impl From<SourceRecord> for JournalRecord {
    fn from(record: SourceRecord) -> Self {
        Self::Source(record)
    }
}

impl From<DestinationRecord> for JournalRecord {
    fn from(record: DestinationRecord) -> Self {
        Self::Destination(record)
    }
}

impl JournalRecord {
    /// What the record makes of the VM's placement; `None` when it changes nothing.
    pub(super) fn placement(&self, binding: &Binding) -> Option<Placement> {
        let (address, peer) = (binding.address.clone(), binding.peer.clone());
        let given = binding.epoch;
        Some(match self {
            Self::Source(SourceRecord::Offer(_) | SourceRecord::Abort) => {
                Placement::Here { address, epoch: Epoch(given.0.saturating_sub(1)) }
            }
            Self::Source(SourceRecord::Commit) => Placement::Given { migration: binding.migration, peer, address, epoch: given },
            // The epoch that was given away may have touched storage: it is not used again.
            Self::Source(SourceRecord::Reclaim) => Placement::Here { address, epoch: given.next() },
            Self::Source(SourceRecord::Done) => Placement::Away { peer, epoch: given },
            Self::Destination(DestinationRecord::Run) => Placement::Here { address, epoch: given },
            Self::Destination(_) => return None,
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Source(SourceRecord::Offer(_)) => "offer",
            Self::Source(SourceRecord::Commit) => "commit",
            Self::Source(SourceRecord::Abort) => "abort",
            Self::Source(SourceRecord::Reclaim) => "reclaim",
            Self::Source(SourceRecord::Done) => "done",
            Self::Destination(DestinationRecord::Prepared(_)) => "prepared",
            Self::Destination(DestinationRecord::Run) => "run",
            Self::Destination(DestinationRecord::Refused) => "refused",
            Self::Destination(DestinationRecord::Closed) => "closed",
        }
    }
}

/// Where a VM is, as far as this gateway knows; kept with the handoff records that change it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// This gateway owns it.
    Here {
        /// Where its VMM is attached.
        address: String,
        /// How often ownership has moved.
        epoch: Epoch,
    },
    /// COMMIT was journaled and the destination's answer is missing.
    Given {
        /// The attempt.
        migration: MigrationId,
        /// To whom.
        peer: SpiffeId,
        /// Where the paused copy is.
        address: String,
        /// The epoch that the destination owns.
        epoch: Epoch,
    },
    /// Another gateway owns it.
    Away {
        /// Which.
        peer: SpiffeId,
        /// The epoch that it owns.
        epoch: Epoch,
    },
}

impl Placement {
    /// The placement that a journal holds.
    ///
    /// # Errors
    /// It was written by another version.
    pub fn read(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// One handoff: what its messages are bound to.
#[derive(Debug, Clone)]
pub(super) struct Binding {
    pub(super) migration: MigrationId,
    pub(super) vm: VmName,
    pub(super) uuid: VmUuid,
    /// The epoch that the destination would own.
    pub(super) epoch: Epoch,
    pub(super) peer: SpiffeId,
    pub(super) peer_incarnation: Incarnation,
    pub(super) peer_key: [u8; 32],
    /// Where the guest's VMM is attached here.
    pub(super) address: String,
}

impl From<&OfferRecord> for Binding {
    fn from(offer: &OfferRecord) -> Self {
        Self {
            migration: offer.migration,
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            epoch: offer.epoch.next(),
            peer: offer.peer.clone(),
            peer_incarnation: offer.peer_incarnation,
            peer_key: offer.peer_key,
            address: offer.address.clone(),
        }
    }
}

impl From<&PreparedRecord> for Binding {
    fn from(record: &PreparedRecord) -> Self {
        Self {
            migration: record.migration,
            vm: record.vm.clone(),
            uuid: record.uuid,
            epoch: record.epoch,
            peer: record.peer.clone(),
            peer_incarnation: record.peer_incarnation,
            peer_key: record.peer_key,
            address: record.address.clone(),
        }
    }
}

impl Evidence {
    /// Makes a record durable in journal and audit log, at the same time.
    pub(super) async fn record(&self, binding: &Binding, record: impl Into<JournalRecord>) -> Result<(), EngineError> {
        let record = record.into();
        let name = record.name();
        let bytes = serde_json::to_vec(&record).map_err(|source| EngineError::Record { migration: binding.migration, source })?;
        let placement = record.placement(binding).map(|placement| serde_json::to_vec(&placement)).transpose();
        let placement = placement.map_err(|source| EngineError::Record { migration: binding.migration, source })?;
        let (journal, migration, vm) = (Arc::clone(&self.journal), binding.migration, binding.vm.clone());
        let journaled = tokio::task::spawn_blocking(move || match placement {
            Some(placement) => journal.append_and_place(migration, &bytes, &vm, &placement),
            None => journal.append(migration, &bytes),
        });
        let mut entry = Entry::new(Event::Handoff).outcome(AuditOutcome::Done);
        entry.vm = Some(binding.vm.clone());
        entry.uuid = Some(binding.uuid);
        entry.migration = Some(binding.migration);
        entry.peer = Some(binding.peer.to_string());
        entry.detail.insert("record".into(), name.into());
        entry.detail.insert("epoch".into(), binding.epoch.0.into());
        let audit = self.audit.clone();
        let audited = tokio::task::spawn_blocking(move || audit.record_critical(&entry));
        joined(journaled.await)??;
        // INVARIANT(journal-wire-effect): the evidence of a handoff is durable before its effect as well.
        // Past COMMIT or RUN the VM's availability wins over the log: the alarm is raised, the handoff goes on.
        if let Err(error) = joined(audited.await)? {
            match record {
                JournalRecord::Source(SourceRecord::Offer(_)) | JournalRecord::Destination(DestinationRecord::Prepared(_)) => {
                    return Err(error.into());
                }
                _ => {
                    tracing::error!(migration = %binding.migration, record = name, error = %error, "handoff record is not in the audit log")
                }
            }
        }
        Ok(())
    }

    /// Signs and sends. A message that is lost is said again on the next session.
    pub(super) async fn send(&self, session: &Session, binding: &Binding, step: Handoff) {
        let message = HandoffMessage {
            migration: binding.migration,
            uuid: binding.uuid,
            epoch: binding.epoch,
            sender: self.journal.incarnation(),
            receiver: binding.peer_incarnation,
            step,
        };
        let signature = self.signer.sign(&message.signed_bytes());
        let message = Message::Handoff(SignedHandoff { message, signature });
        if let Err(error) = send_within(session, &message, limits::SEND_WITHIN).await {
            tracing::debug!(migration = %binding.migration, error = %error, "handoff message not sent");
        }
    }

    /// Checks that a handoff message is for this handoff and from its peer. Returns the step and
    /// whether the sender's journal is the one that the binding names.
    pub(super) fn check(&self, binding: &Binding, signed: &SignedHandoff) -> Result<(Handoff, bool), EngineError> {
        let message = &signed.message;
        let not_authentic = |why| EngineError::NotAuthentic { migration: binding.migration, why };
        if !verify_signature(&binding.peer_key, &message.signed_bytes(), &signed.signature) {
            return Err(not_authentic("signature"));
        }
        if message.migration != binding.migration || message.uuid != binding.uuid {
            return Err(not_authentic("migration or VM"));
        }
        if message.epoch != binding.epoch {
            return Err(not_authentic("epoch"));
        }
        if message.receiver != self.journal.incarnation() {
            return Err(not_authentic("receiver"));
        }
        Ok((message.step.clone(), message.sender == binding.peer_incarnation))
    }

    /// Whether the VM is still where and what a handoff left it.
    fn is_here(&self, binding: &Binding, epoch: Epoch) -> Result<bool, EngineError> {
        let Some(bytes) = self.journal.vm(&binding.vm)? else { return Ok(false) };
        let place = Placement::read(&bytes).map_err(|source| EngineError::Record { migration: binding.migration, source })?;
        Ok(place == Placement::Here { address: binding.address.clone(), epoch })
    }

    pub(super) fn records(&self, migration: MigrationId) -> Result<Vec<JournalRecord>, EngineError> {
        let records = self.journal.records(migration)?;
        records.iter().map(|(_, bytes)| serde_json::from_slice(bytes).map_err(|source| EngineError::Record { migration, source })).collect()
    }
}

pub(super) fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, EngineError> {
    result.map_err(|error| EngineError::Bug(error.to_string()))
}

/// Runs `work` off the async threads.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, EngineError> + Send + 'static) -> Result<T, EngineError> {
    joined(tokio::task::spawn_blocking(work).await)?
}

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
                HandoffAction::Resume => self.with_guest(wake).await?,
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

/// Lets a guest go on as if nothing had happened.
pub(super) fn wake(guest: &mut dyn PagedSource) -> Result<(), HypervisorError> {
    guest.resume()?;
    // A guest that runs matters more than what it was measured with.
    for (what, result) in [("throttle", guest.throttle(0)), ("dirty log", guest.stop_tracking())] {
        if let Err(error) = result {
            tracing::warn!(what, error = %error, "not switched off after resume");
        }
    }
    Ok(())
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
