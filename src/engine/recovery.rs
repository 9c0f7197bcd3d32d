//! What becomes of a handoff that was interrupted: decided by its journal, by the peer's word where that is needed, and by
//! operators where the peer has none.

mod rest;
mod start;
mod tell;

use std::sync::Arc;

use crate::engine::handoff::{Binding, Evidence, JournalRecord, joined};
use crate::engine::witness::Exchange;
use crate::engine::{EngineError, Link};
use crate::hypervisor::{Address, Guest, HypervisorError, PagedDestination, RunState};
use crate::identity::verify_signature;
use crate::limits;
use crate::migration::{
    DestinationHandoff, DestinationRecord, DestinationState, DestinationStep, HandoffAction, Holding, Outcome, SourceDecision,
    SourceHandoff, SourceRecord, SourceStep,
};
use crate::storage::{ImageHead, restore_image};
use crate::transport::{Session, TransportError};
use crate::types::{MigrationId, SpiffeId, VmName};
use crate::wire::{ErrorClass, FinalDigest, Handoff, Message, SignedHandoff};

pub use start::{Interruption, has_disks, interruption, may_own_twin, repeat_effect, sweep_images, unfinished};
pub use tell::{Withdrawal, tell, withdraw};

/// Re-attaches to a guest by the address in a record.
pub type Attach = Arc<dyn Fn(&str, &VmName) -> Result<Box<dyn Guest>, HypervisorError> + Send + Sync>;
/// Looks at the VMM at an address, without taking control of it.
pub type Look = Arc<dyn Fn(&str, &VmName) -> Result<RunState, HypervisorError> + Send + Sync>;
/// Starts a VMM at an address and lets it build an empty twin of what an image is of. One that an earlier try left there,
/// and that never ran, is ended first.
pub type Rebuild = Arc<dyn Fn(&str, &ImageHead) -> Result<Box<dyn PagedDestination>, HypervisorError> + Send + Sync>;

/// How guests are reached on this host, and built again.
#[derive(Clone)]
pub struct Host {
    /// Re-attaches.
    pub attach: Attach,
    /// How the VMM at an address is; one without a twin is `Incoming`.
    pub look: Look,
    /// Starts a VMM.
    pub rebuild: Rebuild,
    /// Where the guest of a migration is that had to be built from its image.
    pub rebuilt_at: Arc<dyn Fn(MigrationId) -> String + Send + Sync>,
    /// How many bytes a second may be sent of what a guest lacks that was split, if that is bounded.
    pub pace: Arc<dyn Fn(MigrationId) -> Option<u64> + Send + Sync>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

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

/// What operators decide about a VM in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// At the source: the destination is off for good and never ran the VM; the paused guest goes on as a new generation.
    Reclaim,
    /// The peer is off for good and may have run the VM: it is started here from its disks.
    Restart,
    /// At the source: the destination has the VM; the copy here is thrown away.
    Release,
    /// At the destination: it will never run the VM. Takes no evidence about the source, which is free to go on.
    Refuse,
}

/// One interrupted handoff, as its journal has it.
struct Interrupted {
    evidence: Evidence,
    host: Host,
    /// Its address is where the guest is, or was.
    binding: Binding,
    records: Records,
    /// Heads of audit logs.
    heads: Exchange,
}

enum Records {
    Source(Vec<SourceRecord>),
    Destination(Vec<DestinationRecord>),
}

/// A side's machine, rebuilt, and what its journal alone decides.
enum Machine {
    Source(SourceHandoff, Vec<HandoffAction<SourceRecord>>),
    Destination(DestinationHandoff, Vec<HandoffAction<DestinationRecord>>),
}

/// What happens to an interrupted handoff.
enum Step {
    Reconnected,
    Received { step: Handoff, incarnation_same: bool, position: u64 },
    Decided(Decision),
}

impl Interrupted {
    /// Reads it. Nothing is done and nobody is asked yet: whoever comes may not be who it is about.
    fn load(evidence: &Evidence, host: &Host, migration: MigrationId) -> Result<Option<Self>, EngineError> {
        let (mut sources, mut destinations) = (Vec::new(), Vec::new());
        for record in evidence.records(migration)? {
            match record {
                JournalRecord::Source(record) => sources.push(record),
                JournalRecord::Destination(record) => destinations.push(record),
            }
        }
        let (binding, records) = match (sources.first(), destinations.first()) {
            (Some(SourceRecord::Offer(offer)), _) => (Binding::from(offer.as_ref()), Records::Source(sources)),
            (_, Some(DestinationRecord::Prepared(record))) => (Binding::from(record.as_ref()), Records::Destination(destinations)),
            _ => return Ok(None),
        };
        Ok(Some(Self { evidence: evidence.clone(), host: host.clone(), binding, records, heads: Exchange::default() }))
    }

    /// Whether nothing more can come of it by itself.
    fn is_settled(&self) -> Result<bool, EngineError> {
        use {DestinationRecord as D, SourceRecord as S};
        Ok(match &self.records {
            Records::Source(records) => match records.last() {
                // Another attempt may have moved the VM since; this one was never given its end on disk.
                Some(S::Offer(offer)) => !self.evidence.is_here(&self.binding, offer.epoch)?,
                Some(S::Commit { .. }) | None => false,
                Some(S::Abort { .. } | S::Reclaim { .. } | S::Fenced { .. } | S::Done) => true,
            },
            Records::Destination(records) => match records.last() {
                // A VM that was given on since waits for no word of the source that it came from.
                Some(D::Run) => !self.evidence.is_here(&self.binding, self.binding.epoch)?,
                last => matches!(last, Some(D::Refused | D::Closed | D::Fenced)),
            },
        })
    }

    /// What this host holds of the guest, and where. A VMM that answers with trouble is one that is there.
    async fn locate(&mut self) -> Result<Holding, EngineError> {
        if self.is_settled()? {
            // Nothing is done with it any more.
            return Ok(Holding::Memory);
        }
        // An earlier gateway may have built the guest anew before it was killed.
        for address in [self.binding.address.clone(), (self.host.rebuilt_at)(self.binding.migration)] {
            match self.state_at(&address).await {
                // Without its state it is no guest. A QEMU's was loaded before RUN, and may lack pages.
                Ok(RunState::Incoming) if !(self.is_running_here() && matches!(Address::parse(&address), Address::Qemu(_))) => {}
                Ok(_) => {
                    self.binding.address = address;
                    return Ok(Holding::Memory);
                }
                Err(HypervisorError::Unreachable { source, .. }) if is_gone(&source) => {}
                // Whether the guest can be reached now changes nothing of what the peer has to hear.
                Err(error) if self.is_past_doubt() => {
                    tracing::warn!(vm = %self.binding.vm, error = %crate::telemetry::chain(&error), "the guest's VMM is there and does not answer");
                    return Ok(Holding::Memory);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let (evidence, binding) = (self.evidence.clone(), self.binding.clone());
        let image = joined(tokio::task::spawn_blocking(move || evidence.kept_image(&binding)).await)??;
        let wanted = self.committed_digest();
        let fits = |head: &ImageHead| wanted.is_none_or(|digest| (digest.state, digest.memory) == (head.digest.state, head.digest.memory));
        Ok(if image.as_ref().is_some_and(fits) { Holding::Image } else { Holding::Nothing })
    }

    async fn state_at(&self, address: &str) -> Result<RunState, HypervisorError> {
        let (look, address, vm) = (Arc::clone(&self.host.look), address.to_owned(), self.binding.vm.clone());
        let asked = tokio::task::spawn_blocking(move || look(&address, &vm)).await;
        let lost = |error: tokio::task::JoinError| std::io::Error::other(error.to_string());
        let source = match asked {
            Ok(answer) => return answer,
            Err(error) => lost(error),
        };
        Err(HypervisorError::Local { vm: self.binding.vm.to_string(), what: "the task that asks the VMM", source })
    }

    fn is_running_here(&self) -> bool {
        matches!(&self.records, Records::Destination(records) if matches!(records.last(), Some(DestinationRecord::Run)))
    }

    /// COMMIT or RUN is journaled.
    fn is_past_doubt(&self) -> bool {
        match &self.records {
            Records::Source(records) => matches!(records.last(), Some(SourceRecord::Commit { .. })),
            Records::Destination(_) => self.is_running_here(),
        }
    }

    /// What an image has to be of, where the journal says so.
    fn committed_digest(&self) -> Option<FinalDigest> {
        match &self.records {
            Records::Source(records) => records.iter().find_map(|record| match record {
                SourceRecord::Commit { digest, .. } => Some(*digest),
                _ => None,
            }),
            Records::Destination(records) => records.iter().find_map(|record| match record {
                DestinationRecord::Prepared(record) => Some(record.digest),
                _ => None,
            }),
        }
    }

    /// Builds the guest from its image, paused, in a VMM of its own.
    async fn restore(&mut self) -> Result<(), EngineError> {
        let address = (self.host.rebuilt_at)(self.binding.migration);
        let (evidence, host, binding, at) = (self.evidence.clone(), self.host.clone(), self.binding.clone(), address.clone());
        let restored = tokio::task::spawn_blocking(move || {
            let gone = || EngineError::Bug("the image that was there is gone".into());
            let head = evidence.kept_image(&binding)?.ok_or_else(gone)?;
            let mut twin = (host.rebuild)(&at, &head)?;
            let built = restore_image(&evidence.image_path(binding.migration), &head, twin.ram())
                .map_err(EngineError::from)
                .and_then(|state| Ok(twin.restore_state(&state)?));
            if built.is_err() {
                // It holds a part of the guest, which is nobody's.
                let _ = twin.destroy();
            }
            built
        });
        joined(restored.await)??;
        tracing::warn!(vm = %self.binding.vm, migration = %self.binding.migration, "the guest is built from its final image");
        self.binding.address = address;
        Ok(())
    }

    async fn machine(&mut self) -> Result<Option<Machine>, EngineError> {
        let holding = self.locate().await?;
        Ok(match &self.records {
            Records::Source(records) => SourceHandoff::recover(records, holding).map(|(machine, due)| Machine::Source(machine, due)),
            Records::Destination(records) => {
                let (machine, due) = DestinationHandoff::recover(records, holding);
                Some(Machine::Destination(machine, due))
            }
        })
    }

    /// Performs what the journal alone decides; the machine, for whoever has to ask the peer.
    async fn settle(&mut self) -> Result<(Resolved, Option<Machine>), EngineError> {
        let (settled, Some(mut machine)) = (self.is_settled()?, self.machine().await?) else { return Ok((Resolved::Settled, None)) };
        if settled {
            // INVARIANT(single-runner): a VM that was given on since is not this handoff's to start.
            return Ok((Resolved::Settled, Some(machine)));
        }
        crate::failpoint::hit!("recovery.settle");
        let ended = match &mut machine {
            Machine::Source(_, due) => self.perform(std::mem::take(due), None).await?,
            Machine::Destination(_, due) => self.perform(std::mem::take(due), None).await?,
        };
        crate::failpoint::hit!("recovery.settled");
        let source = matches!(machine, Machine::Source(..));
        let (vm, peer) = (self.binding.vm.clone(), self.binding.peer.clone());
        let resolved = match ended {
            Some(outcome) => Resolved::Ended(outcome),
            // A twin that is lost refuses: the source has to hear it, and will ask.
            None => Resolved::Open { vm, peer, source },
        };
        Ok((resolved, Some(machine)))
    }

    async fn with_guest(&self, what: fn(&mut dyn Guest) -> Result<(), HypervisorError>) -> Result<(), EngineError> {
        let (attach, address, vm) = (Arc::clone(&self.host.attach), self.binding.address.clone(), self.binding.vm.clone());
        crate::failpoint::hit!("recovery.effect.before");
        joined(tokio::task::spawn_blocking(move || what(attach(&address, &vm)?.as_mut())).await)??;
        crate::failpoint::hit!("recovery.effect.after");
        Ok(())
    }

    async fn perform<R: Into<JournalRecord>>(
        &mut self,
        actions: Vec<HandoffAction<R>>,
        session: Option<&Session>,
    ) -> Result<Option<Outcome>, EngineError> {
        let mut ended = None;
        for action in actions {
            match action {
                HandoffAction::Journal(record) => self.evidence.record(&self.binding, record).await?,
                HandoffAction::Send(step) => {
                    if let Some(session) = session {
                        self.evidence.send(session, &self.binding, step).await;
                    }
                }
                HandoffAction::Resume => match (self.with_guest(|guest| guest.wake()).await, &self.records) {
                    // RUN is the fact, whatever became of the guest since; the source has to hear it.
                    (Err(error), Records::Destination(_)) => {
                        tracing::error!(vm = %self.binding.vm, error = %crate::telemetry::chain(&error), "the guest is not resumed");
                    }
                    (result, _) => {
                        result?;
                        self.evidence.moved_to(&self.binding).await?;
                    }
                },
                HandoffAction::Destroy => {
                    if let Err(error) = self.with_guest(|guest| guest.destroy()).await {
                        tracing::warn!(vm = %self.binding.vm, error = %error, "the copy that is no longer needed is gone already");
                    }
                }
                HandoffAction::Restore => self.restore().await?,
                HandoffAction::Renew => self.with_guest(renew).await?,
                HandoffAction::Forget => self.evidence.forget_image(self.binding.migration).await?,
                HandoffAction::Keep => return Err(EngineError::Bug("an image made during recovery".into())),
                // Only asked before PREPARED or COMMIT, which an interrupted handoff is past.
                HandoffAction::AskCommit => return Err(EngineError::Bug("policy asked during recovery".into())),
                HandoffAction::End(outcome) => ended = Some(outcome),
                HandoffAction::LeaveToJournal => return Ok(None),
            }
        }
        Ok(ended)
    }

    async fn step(&mut self, machine: &mut Machine, event: Step, session: Option<&Session>) -> Result<Option<Outcome>, EngineError> {
        match machine {
            Machine::Source(machine, _) => {
                if matches!(event, Step::Received { step: Handoff::Running, .. }) && machine.is_committed() {
                    self.send_rest(session).await?;
                }
                let step = match event {
                    Step::Reconnected => SourceStep::Reconnected,
                    Step::Received { step, incarnation_same, position } => SourceStep::Received { step, incarnation_same, position },
                    Step::Decided(Decision::Reclaim) => SourceStep::Decided(SourceDecision::Reclaim),
                    Step::Decided(Decision::Restart) => SourceStep::Decided(SourceDecision::Restart),
                    Step::Decided(Decision::Release | Decision::Refuse) => SourceStep::Decided(SourceDecision::Release),
                };
                let actions = machine.step(&step)?;
                self.perform(actions, session).await
            }
            Machine::Destination(machine, _) => {
                let step = match event {
                    Step::Reconnected => DestinationStep::Reconnected,
                    Step::Received { step, .. } => DestinationStep::Received(step),
                    Step::Decided(Decision::Restart) => DestinationStep::SourceFenced,
                    Step::Decided(_) => DestinationStep::GiveUp(ErrorClass::Cancelled),
                };
                let actions = machine.step(&step)?;
                self.perform(actions, session).await
            }
        }
    }

    async fn converse(&mut self, mut machine: Machine, link: &Link, first: Step) -> Result<Resolved, EngineError> {
        let mut event = first;
        // A peer that goes on and on holds up everybody who waits to settle this handoff.
        for _ in 0..limits::HANDOFF_MESSAGES_MAX {
            if let Some(outcome) = self.step(&mut machine, event, Some(&link.session)).await? {
                return Ok(Resolved::Ended(outcome));
            }
            let until = tokio::time::Instant::now() + limits::ANSWER_WITHIN;
            event = loop {
                let received = tokio::time::timeout_at(until, link.session.receive()).await.unwrap_or_else(|_| {
                    let (address, after) = (link.session.peer_address(), limits::ANSWER_WITHIN);
                    Err(TransportError::TimedOut { address, awaited: "go on with the handoff", after })
                });
                let received = match received {
                    Ok(Message::StreamBack(first)) if machine.is_running() => Ok(self.take_rest(&link.session, first).await?),
                    received => received,
                };
                match received {
                    Ok(Message::Handoff(signed)) => {
                        let heard = self.evidence.check(&self.binding, &signed)?;
                        break Step::Received { step: heard.step, incarnation_same: heard.incarnation_same, position: heard.position };
                    }
                    Ok(Message::Ping) => {}
                    Ok(message @ (Message::AuditHead(_) | Message::AuditAnswer(_))) => {
                        self.evidence.hear_of_heads(link, self.binding.migration, &mut self.heads, message).await;
                    }
                    Ok(other) => return Err(EngineError::OutOfPlace { expected: "a handoff message", got: other.name().to_owned() }),
                    Err(_) if machine.is_settled() => return Ok(Resolved::Settled),
                    Err(source) => return Err(EngineError::Transport { migration: self.binding.migration, source }),
                }
            };
        }
        Err(EngineError::OutOfPlace { expected: "an end of the handoff", got: "another message".into() })
    }
}

impl Interrupted {
    /// As at the end of a migration that nothing interrupted: each side keeps what the other's audit log is bound to, if it comes
    /// soon. Whoever was called stays until the caller goes, or its own might not get there.
    async fn exchange_heads(&mut self, link: &Link, called: bool) {
        let migration = self.binding.migration;
        self.evidence.show_head(link, migration).await;
        self.evidence.finish_heads(link, migration, &mut self.heads, called, limits::LAST_WORDS).await;
    }
}

/// One that runs has what it needs: it was renewed before it ran.
fn renew(guest: &mut dyn Guest) -> Result<(), HypervisorError> {
    match guest.status()?.state {
        RunState::Running => Ok(()),
        _ => guest.renew(),
    }
}

impl Machine {
    /// Whether the guest runs here, as the destination's.
    fn is_running(&self) -> bool {
        matches!(self, Self::Destination(machine, _) if matches!(machine.state(), DestinationState::Running))
    }

    fn is_settled(&self) -> bool {
        match self {
            Self::Source(machine, _) => !machine.is_committed(),
            Self::Destination(machine, _) => !matches!(machine.state(), DestinationState::Prepared { .. } | DestinationState::Running),
        }
    }
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
pub async fn resolve(evidence: &Evidence, host: &Host, migration: MigrationId, link: Option<&Link>) -> Result<Resolved, EngineError> {
    let Some(mut interrupted) = Interrupted::load(evidence, host, migration)? else { return Ok(Resolved::Settled) };
    let (resolved, machine) = interrupted.settle().await?;
    match (&resolved, link, machine) {
        (Resolved::Open { peer, .. }, Some(link), Some(machine)) => {
            if link.peer.spiffe != *peer {
                return Err(EngineError::NotAuthentic { migration, why: "session peer" });
            }
            crate::failpoint::hit!("recovery.asks");
            let resolved = interrupted.converse(machine, link, Step::Reconnected).await?;
            if resolved == Resolved::Ended(Outcome::Moved) {
                interrupted.exchange_heads(link, false).await;
            }
            Ok(resolved)
        }
        _ => Ok(resolved),
    }
}

/// Answers a peer that comes back for an interrupted handoff.
///
/// # Errors
/// As [`resolve`].
pub async fn answer(evidence: &Evidence, host: &Host, link: &Link, signed: &SignedHandoff) -> Result<Resolved, EngineError> {
    let migration = signed.message.migration;
    let Some(mut interrupted) = Interrupted::load(evidence, host, migration)? else {
        return refuse_unknown(evidence, link, signed).await;
    };
    if link.peer.spiffe != interrupted.binding.peer {
        return Err(EngineError::NotAuthentic { migration, why: "session peer" });
    }
    // Only now is it known that the right peer asks.
    let heard = evidence.check(&interrupted.binding, signed)?;
    crate::failpoint::hit!("recovery.answers");
    let (_, Some(machine)) = interrupted.settle().await? else { return Ok(Resolved::Settled) };
    let first = Step::Received { step: heard.step, incarnation_same: heard.incarnation_same, position: heard.position };
    let resolved = interrupted.converse(machine, link, first).await?;
    if resolved == Resolved::Ended(Outcome::Moved) {
        interrupted.exchange_heads(link, true).await;
    }
    Ok(resolved)
}

/// Nothing was ever promised for this migration, and never will be.
async fn refuse_unknown(evidence: &Evidence, link: &Link, signed: &SignedHandoff) -> Result<Resolved, EngineError> {
    let migration = signed.message.migration;
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
    if matches!(signed.message.step, Handoff::Commit { .. } | Handoff::Final { .. }) {
        if evidence.records(migration)?.is_empty() {
            evidence.record(&binding, DestinationRecord::Refused).await?;
        }
        // INVARIANT(single-runner): a journal that was restored from a copy may have forgotten what it promised, and be as long
        // as it was then by other migrations' records. What it does not know it refuses from before every promise.
        evidence.send_from(0, &link.session, &binding, Handoff::Refuse { class: ErrorClass::Local }).await;
    }
    Ok(Resolved::Settled)
}

/// Performs what operators have decided about a VM in doubt. `INVARIANT(single-runner)`: whoever calls has two approvers and
/// recorded evidence; a decision that has no place in the state that the journal left is refused.
///
/// # Errors
/// The journal cannot be read, nothing is in doubt, or the decision is not one of this side's.
pub async fn decide(evidence: &Evidence, host: &Host, migration: MigrationId, decision: Decision) -> Result<Resolved, EngineError> {
    let Some(mut interrupted) = Interrupted::load(evidence, host, migration)? else { return Ok(Resolved::Settled) };
    let (resolved, machine) = interrupted.settle().await?;
    match (&resolved, machine) {
        (Resolved::Open { .. }, Some(mut machine)) => {
            // INVARIANT(no-past-twice): a guest that cannot be given a new generation is not one that may go on here.
            if decision == Decision::Reclaim && interrupted.locate().await? == Holding::Memory {
                interrupted.with_guest(|guest| if guest.can_renew() { Ok(()) } else { guest.renew() }).await?;
            }
            let ended = interrupted.step(&mut machine, Step::Decided(decision), None).await?;
            Ok(ended.map_or(resolved, Resolved::Ended))
        }
        _ => Ok(resolved),
    }
}

/// A name for the audit entry about a migration that this gateway knows nothing of.
fn placeholder_name(migration: MigrationId) -> Result<VmName, EngineError> {
    format!("unknown-{migration}").parse().map_err(|error| EngineError::Bug(format!("{error}")))
}
