//! Journal, wire and effect in the right order, for running migrations and for restarted gateways.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::audit::{AuditError, AuditLog, Entry, Event, Outcome as AuditOutcome};
use crate::engine::EngineError;
use crate::engine::arbiter::{Arbiter, Ruling, transfer};
use crate::engine::link::send_within;
use crate::identity::{HolderError, Signer, verify_signature};
use crate::journal::Journal;
use crate::limits;
use crate::migration::{DestinationRecord, OfferRecord, PreparedRecord, SourceRecord};
use crate::storage::{ImageError, ImageHead, read_head, remove_image};
use crate::transport::Session;
use crate::types::{Epoch, Incarnation, MigrationId, SpiffeId, VmName, VmUuid};
use crate::wire::{Durability, FinalDigest, Handoff, HandoffMessage, Message, SignedHandoff};

/// What this gateway remembers and signs with.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// Handoff records.
    pub journal: Arc<Journal>,
    /// The audit log.
    pub audit: AuditLog,
    /// The gateway's signing key.
    pub signer: Arc<Signer>,
    /// The directory of final images.
    pub images: Arc<Path>,
    /// Who is asked before a VM changes its owner.
    pub arbiter: Arc<dyn Arbiter>,
    /// What this handoff says next; empty at first, and for one handoff only.
    pub ahead: Ahead,
}

/// The message that follows a record, signed while the record is written: the guest stands still for both, and the key is in another
/// process. It leaves when the machine says so, if it is still that message, and is forgotten otherwise.
#[derive(Debug, Clone, Default)]
pub struct Ahead(Arc<Mutex<Option<SignedAhead>>>);

type SignedAhead = (HandoffMessage, JoinHandle<Result<[u8; 64], HolderError>>);

impl Ahead {
    fn put(&self, signed: SignedAhead) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(signed);
    }

    pub(super) fn take(&self, message: &HandoffMessage) -> Option<JoinHandle<Result<[u8; 64], HolderError>>> {
        let (signed, signature) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (signed == *message).then_some(signature)
    }
}

/// A record as it lies in the journal: of the side that this gateway was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JournalRecord {
    /// This gateway was the source.
    Source(SourceRecord),
    /// This gateway was the destination.
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
    #[must_use]
    pub fn placement(&self, binding: &Binding) -> Option<Placement> {
        let (address, peer) = (binding.address.clone(), binding.peer.clone());
        let (given, attempt) = (binding.epoch, Some(binding.migration));
        Some(match self {
            Self::Source(SourceRecord::Offer(_) | SourceRecord::Abort { cold: false }) => {
                Placement::Here { address, epoch: Epoch(given.0.saturating_sub(1)), attempt }
            }
            Self::Source(SourceRecord::Abort { cold: true }) => Placement::Cold { epoch: Epoch(given.0.saturating_sub(1)) },
            Self::Source(SourceRecord::Commit { .. }) => Placement::Given { migration: binding.migration, peer, address, epoch: given },
            // The epoch that was given away may have touched storage: it is not used again.
            Self::Source(SourceRecord::Reclaim { cold: false } | SourceRecord::Fenced { cold: false }) => {
                Placement::Here { address, epoch: given.next(), attempt }
            }
            Self::Source(SourceRecord::Reclaim { cold: true } | SourceRecord::Fenced { cold: true })
            | Self::Destination(DestinationRecord::Fenced) => Placement::Cold { epoch: given.next() },
            Self::Source(SourceRecord::Done) => Placement::Away { peer, epoch: given },
            Self::Destination(DestinationRecord::Run) => Placement::Here { address, epoch: given, attempt },
            Self::Destination(_) => return None,
        })
    }

    /// The message that follows while the guest stands still, if one does.
    fn said_next(&self) -> Option<Handoff> {
        Some(match self {
            Self::Destination(DestinationRecord::Prepared(prepared)) => Handoff::Prepared { digest: prepared.digest },
            Self::Source(SourceRecord::Commit { digest, .. }) => Handoff::Commit { digest: *digest },
            Self::Destination(DestinationRecord::Run) => Handoff::Running,
            _ => return None,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Source(SourceRecord::Offer(_)) => "offer",
            Self::Source(SourceRecord::Commit { .. }) => "commit",
            Self::Source(SourceRecord::Abort { .. }) => "abort",
            Self::Source(SourceRecord::Reclaim { .. }) => "reclaim",
            Self::Source(SourceRecord::Fenced { .. }) | Self::Destination(DestinationRecord::Fenced) => "fenced",
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
        /// The attempt whose record says so. The records of an earlier one no longer speak for the guest: an image that this
        /// one made may lie on the disk.
        #[serde(default)]
        attempt: Option<MigrationId>,
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
    /// This gateway owns it and has no memory of it that may be used: it has to be started from its disks.
    Cold {
        /// How often ownership has moved.
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

/// A handoff message that was checked.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    pub(super) step: Handoff,
    /// Whether the sender's journal is the one that the binding names.
    pub(super) incarnation_same: bool,
    /// The position of the sender's journal.
    pub(super) position: u64,
}

/// One handoff: what its messages are bound to.
#[derive(Debug, Clone)]
pub struct Binding {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM's name here.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch that the destination would own.
    pub epoch: Epoch,
    /// The other gateway.
    pub peer: SpiffeId,
    /// Its journal.
    pub peer_incarnation: Incarnation,
    /// The key that signs its handoff messages.
    pub peer_key: [u8; 32],
    /// Where the guest's VMM is attached here.
    pub address: String,
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

impl Binding {
    /// The record of a twin that is complete and has this digest.
    pub(super) fn prepared(&self, digest: FinalDigest, durability: Durability) -> PreparedRecord {
        PreparedRecord {
            migration: self.migration,
            vm: self.vm.clone(),
            uuid: self.uuid,
            epoch: self.epoch,
            peer: self.peer.clone(),
            peer_incarnation: self.peer_incarnation,
            peer_key: self.peer_key,
            digest,
            address: self.address.clone(),
            durability,
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
    /// Makes a record durable in journal and audit log, at the same time. Nothing is written when the arbiter says that somebody
    /// else owns the VM.
    pub(super) async fn record(&self, binding: &Binding, record: impl Into<JournalRecord>) -> Result<(), EngineError> {
        let record = record.into();
        self.win(binding, &record).await?;
        let name = record.name();
        let bytes = serde_json::to_vec(&record).map_err(|source| EngineError::Record { migration: binding.migration, source })?;
        let placement = record.placement(binding).map(|placement| serde_json::to_vec(&placement)).transpose();
        let placement = placement.map_err(|source| EngineError::Record { migration: binding.migration, source })?;
        let (journal, migration, vm) = (Arc::clone(&self.journal), binding.migration, binding.vm.clone());
        crate::failpoint::fails!(EngineError::Bug("failpoint".into()), "record.{name}.begin");
        let journaled = tokio::task::spawn_blocking(move || {
            crate::failpoint::hit!("journal.{name}.before");
            let journaled = match placement {
                Some(placement) => journal.append_and_place(migration, &bytes, &vm, &placement),
                None => journal.append(migration, &bytes),
            };
            crate::failpoint::hit!("journal.{name}.after");
            journaled
        });
        let mut entry = Entry::new(Event::Handoff).outcome(AuditOutcome::Done);
        entry.vm = Some(binding.vm.clone());
        entry.uuid = Some(binding.uuid);
        entry.migration = Some(binding.migration);
        entry.peer = Some(binding.peer.to_string());
        entry.detail.insert("record".into(), name.into());
        entry.detail.insert("epoch".into(), binding.epoch.0.into());
        let undone = entry.clone().outcome(AuditOutcome::Failed);
        let audit = self.audit.clone();
        if let Some(step) = record.said_next() {
            // What the position will be if no other handoff is recorded at the same moment; if one is, it is signed again.
            let message = self.message(self.journal.position().saturating_add(1), binding, step);
            self.ahead.put((message.clone(), self.sign(&message)));
        }
        let audited = tokio::task::spawn_blocking(move || {
            crate::failpoint::hit!("audit.{name}.before");
            let audited = audit.record_critical(&entry);
            crate::failpoint::hit!("audit.{name}.after");
            audited
        });
        if let Err(error) = joined(journaled.await)? {
            // The log may say already that it was done.
            let audited = joined(audited.await)?;
            let (audit, entry) = (self.audit.clone(), undone);
            let corrected = joined(tokio::task::spawn_blocking(move || audit.record_critical(&entry)).await)?;
            for failed in [audited, corrected].into_iter().filter_map(Result::err) {
                tracing::error!(migration = %binding.migration, record = name, error = %failed, "handoff record is not in the audit log");
            }
            return Err(error.into());
        }
        // INVARIANT(journal-wire-effect): the evidence of a handoff is durable before its effect as well.
        // Past COMMIT or RUN the VM's availability wins over the log: the alarm is raised, the handoff goes on.
        if let Err(error) = joined(audited.await)? {
            match record {
                JournalRecord::Source(SourceRecord::Offer(_)) | JournalRecord::Destination(DestinationRecord::Prepared(_)) => {
                    return Err(error.into());
                }
                _ => {
                    tracing::error!(migration = %binding.migration, record = name, error = %error, "handoff record is not in the audit log");
                    self.record_later(undone.outcome(AuditOutcome::Done));
                }
            }
        }
        crate::failpoint::hit!("record.{name}.done");
        Ok(())
    }

    /// What the guest does not wait for is in the log as soon as that can be written again.
    fn record_later(&self, entry: Entry) {
        let audit = self.audit.clone();
        tokio::spawn(async move {
            for _ in 0..limits::AUDIT_LATER_MAX {
                tokio::time::sleep(RECORD_AGAIN).await;
                let (audit, entry) = (audit.clone(), entry.clone());
                let recorded = tokio::task::spawn_blocking(move || audit.record_critical(&entry)).await;
                if !matches!(recorded, Ok(Err(AuditError::Unsigned { .. } | AuditError::Disk { .. }))) {
                    return;
                }
            }
        });
    }

    /// Asks the arbiter for the change of ownership that a record makes.
    async fn win(&self, binding: &Binding, record: &JournalRecord) -> Result<(), EngineError> {
        let Some(change) = transfer(record, binding) else { return Ok(()) };
        let arbiter = Arc::clone(&self.arbiter);
        let ruling =
            if arbiter.waits() { joined(tokio::task::spawn_blocking(move || arbiter.rule(&change)).await)? } else { arbiter.rule(&change) };
        match ruling {
            Ruling::Won => Ok(()),
            Ruling::Lost(owner) => Err(EngineError::Lost { vm: binding.vm.clone(), migration: binding.migration, owner }),
        }
    }

    /// Signs and sends. A message that is lost is said again on the next session.
    pub(super) async fn send(&self, session: &Session, binding: &Binding, step: Handoff) {
        self.send_from(self.journal.position(), session, binding, step).await;
    }

    /// As [`Evidence::send`], for a journal whose position says nothing about this attempt.
    pub(super) async fn send_from(&self, position: u64, session: &Session, binding: &Binding, step: Handoff) {
        #[cfg(feature = "failpoints")]
        let name = crate::migration::handoff_name(&step);
        crate::failpoint::hit!("send.{name}.before");
        let message = self.message(position, binding, step);
        let signature = match self.signature(&message).await {
            Ok(signature) => signature,
            // As if the link had been lost: what the journals say is owed is said in the next session.
            Err(error) => {
                tracing::error!(migration = %binding.migration, %error, "handoff message not signed, so it is not sent");
                if matches!(message.step, Handoff::Final { .. } | Handoff::Prepared { .. } | Handoff::Commit { .. } | Handoff::Running) {
                    session.close(None, "what has this gateway's key did not sign");
                }
                return;
            }
        };
        let message = Message::Handoff(SignedHandoff { message, signature });
        if let Err(error) = send_within(session, &message, limits::SEND_WITHIN).await {
            tracing::debug!(migration = %binding.migration, error = %error, "handoff message not sent");
        }
        crate::failpoint::hit!("send.{name}.after");
    }

    pub(super) fn message(&self, position: u64, binding: &Binding, step: Handoff) -> HandoffMessage {
        HandoffMessage {
            migration: binding.migration,
            uuid: binding.uuid,
            epoch: binding.epoch,
            sender: self.journal.incarnation(),
            receiver: binding.peer_incarnation,
            position,
            step,
        }
    }

    /// The guest may stand still for it: a key that does not answer is asked again for a while.
    async fn signature(&self, message: &HandoffMessage) -> Result<[u8; 64], String> {
        let until = Instant::now() + limits::SIGNED_WITHIN;
        let mut signing = self.ahead.take(message).unwrap_or_else(|| self.sign(message));
        loop {
            match signing.await.map_err(|error| error.to_string())? {
                Err(error @ (HolderError::Late { .. } | HolderError::Busy { .. })) if Instant::now() < until => {
                    tracing::debug!(migration = %message.migration, %error, "handoff message not signed yet");
                    tokio::time::sleep(SIGN_AGAIN).await;
                    signing = self.sign(message);
                }
                signed => return signed.map_err(|error| error.to_string()),
            }
        }
    }

    fn sign(&self, message: &HandoffMessage) -> JoinHandle<Result<[u8; 64], HolderError>> {
        let (signer, bytes) = (Arc::clone(&self.signer), message.signed_bytes());
        tokio::task::spawn_blocking(move || signer.sign(&bytes))
    }

    /// Where the final image of a migration is.
    pub(super) fn image_path(&self, migration: MigrationId) -> PathBuf {
        self.images.join(format!("{migration}.image"))
    }

    /// The head of the image that this handoff would have here.
    pub(super) fn image_head(binding: &Binding, digest: &FinalDigest, machine: Vec<u8>) -> ImageHead {
        ImageHead {
            migration: binding.migration,
            vm: binding.vm.clone(),
            uuid: binding.uuid,
            epoch: binding.epoch,
            // How the lanes carried it differs when a part was sent again; the guest is the same.
            digest: FinalDigest { lanes: [0; 32], ..*digest },
            machine,
        }
    }

    /// The head of the final image of a handoff; nothing when there is none that is whole and of this VM.
    pub(super) fn kept_image(&self, binding: &Binding) -> Result<Option<ImageHead>, EngineError> {
        let head = match read_head(&self.image_path(binding.migration)) {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(None),
            Err(error @ ImageError::File { .. }) => return Err(error.into()),
            Err(error) => {
                tracing::error!(migration = %binding.migration, error = %crate::telemetry::chain(&error), "an image that is not used");
                return Ok(None);
            }
        };
        let same = (head.migration, &head.vm, head.uuid, head.epoch) == (binding.migration, &binding.vm, binding.uuid, binding.epoch);
        Ok(same.then_some(head))
    }

    /// Removes the final image of a migration for good.
    pub(super) async fn forget_image(&self, migration: MigrationId) -> Result<(), EngineError> {
        let path = self.image_path(migration);
        Ok(joined(tokio::task::spawn_blocking(move || remove_image(&path)).await)??)
    }

    /// Records what needs no answer; a log that fails is shouted about by the log itself.
    pub(super) async fn note(&self, entry: Entry) {
        let audit = self.audit.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || audit.record(&entry)).await {
            tracing::error!(error = %error, "audit entry not recorded");
        }
    }

    /// Checks that a handoff message is for this handoff and from its peer.
    pub(super) fn check(&self, binding: &Binding, signed: &SignedHandoff) -> Result<Heard, EngineError> {
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
        let incarnation_same = message.sender == binding.peer_incarnation;
        Ok(Heard { step: message.step.clone(), incarnation_same, position: message.position })
    }

    /// Whether the VM is still where and what a handoff left it.
    pub(super) fn is_here(&self, binding: &Binding, epoch: Epoch) -> Result<bool, EngineError> {
        let Some(bytes) = self.journal.vm(&binding.vm)? else { return Ok(false) };
        let place = Placement::read(&bytes).map_err(|source| EngineError::Record { migration: binding.migration, source })?;
        Ok(place == Placement::Here { address: binding.address.clone(), epoch, attempt: Some(binding.migration) })
    }

    /// The guest of a handoff runs here, at the binding's address, which need not be where it was.
    pub(super) async fn moved_to(&self, binding: &Binding) -> Result<(), EngineError> {
        let Some(bytes) = self.journal.vm(&binding.vm)? else { return Ok(()) };
        let read = |source| EngineError::Record { migration: binding.migration, source };
        let Placement::Here { address, epoch, attempt } = Placement::read(&bytes).map_err(read)? else { return Ok(()) };
        if address == binding.address {
            return Ok(());
        }
        let placement = serde_json::to_vec(&Placement::Here { address: binding.address.clone(), epoch, attempt }).map_err(read)?;
        let (journal, vm) = (Arc::clone(&self.journal), binding.vm.clone());
        Ok(joined(tokio::task::spawn_blocking(move || journal.put_vm(&vm, &placement)).await)??)
    }

    pub(super) fn records(&self, migration: MigrationId) -> Result<Vec<JournalRecord>, EngineError> {
        let records = self.journal.records(migration)?;
        records.iter().map(|(_, bytes)| serde_json::from_slice(bytes).map_err(|source| EngineError::Record { migration, source })).collect()
    }
}

/// What failed with an action of a migration, and so what is still to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// This end must not decide: it is not to say whose the VM is, or COMMIT or RUN is on its disk, and what is owed is done when a
    /// session or a restart comes. The guest stays as it is.
    Owed,
    /// Something had to be durable first: the machine knows what that means.
    Durable,
    /// The attempt.
    Attempt,
}

impl Failed {
    /// `durable`: whether others count on the action; `owed`: whether COMMIT at the source, or RUN at the destination, is on disk.
    pub(super) fn of(error: &EngineError, durable: bool, owed: bool) -> Self {
        match error {
            EngineError::Lost { .. } => Self::Owed,
            _ if durable => Self::Durable,
            _ if owed => Self::Owed,
            _ => Self::Attempt,
        }
    }
}

/// What a handoff message says that comes before ACCEPT, and whether it is a REFUSE, behind which the reason comes. A destination may
/// give up before it could accept; nothing hangs on who signed that.
pub(super) fn before_accept(migration: MigrationId, signed: &SignedHandoff) -> (EngineError, bool) {
    match signed.message.step {
        Handoff::Refuse { class } => (EngineError::peer(migration, class, "the destination refused the VM"), true),
        _ => (EngineError::OutOfPlace { expected: "ACCEPT", got: "a handoff message".into() }, false),
    }
}

pub(super) fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, EngineError> {
    result.map_err(|error| EngineError::Bug(error.to_string()))
}

/// Runs `work` off the async threads.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, EngineError> + Send + 'static) -> Result<T, EngineError> {
    joined(tokio::task::spawn_blocking(work).await)?
}

/// WHY: one that was late is not asked in truth until it has said something, which is found out without waiting for it.
const SIGN_AGAIN: Duration = Duration::from_millis(50);
/// WHY: whoever reads the log soon after finds it, and a log that cannot be written is not tried all the time.
const RECORD_AGAIN: Duration = Duration::from_secs(1);
