//! Twins that outlive a gateway: what a gateway that is started anew needs to go on receiving where it was killed.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::engine::{Link, PeerFacts};
use crate::gateway::Gateway;
use crate::gateway::incoming::{Arrival, Refusal};
use crate::gateway::judge::{Case, DisksAsked};
use crate::gateway::registry::Claim;
use crate::gateway::twins::{Leavings, Twin};
use crate::hypervisor::RunState;
use crate::hypervisor::attach::{AttachedDestination, Timeouts, discard, observe};
use crate::identity::verify_signature;
use crate::limits;
use crate::telemetry::chain;
use crate::types::{Incarnation, MigrationId, Side, SpiffeId, VmName};
use crate::wire::{ErrorClass, Failure, Handoff, Message, Offer, SignedHandoff, StreamTerms};

/// What is written beside a twin when its offer is accepted. No promise: it only saves sending again.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// The offer as it came, kind and body.
    offer: (u8, Vec<u8>),
    lanes: u16,
    peer: SpiffeId,
    incarnation: [u8; 16],
    signing_key: [u8; 32],
}

/// A twin that waits for its source.
#[derive(Debug)]
pub(super) struct Kept {
    offer: Offer,
    lanes: u16,
    peer: PeerFacts,
    claim: Claim,
}

/// The twins that an earlier gateway left, by migration.
#[derive(Debug, Default)]
pub(super) struct KeptTwins(Mutex<BTreeMap<MigrationId, Kept>>);

impl KeptTwins {
    pub(super) fn has(&self, migration: MigrationId) -> bool {
        self.lock().contains_key(&migration)
    }

    fn take_if(&self, migration: MigrationId, wanted: impl FnOnce(&Kept) -> bool) -> Option<Kept> {
        let mut kept = self.lock();
        if kept.get(&migration).is_some_and(wanted) { kept.remove(&migration) } else { None }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<MigrationId, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The files beside a twin, by what they hold.
pub(super) fn twin_file(runtime: &Path, migration: MigrationId, what: &str) -> PathBuf {
    runtime.join(format!("{migration}.{what}"))
}

const NOTE: &str = "arrival";
pub(super) const PROGRESS: &str = "progress";

impl Gateway {
    /// Notes an accepted offer beside its twin.
    pub(super) fn note_arrival(&self, offer: &Offer, lanes: u16, peer: &PeerFacts) -> std::io::Result<()> {
        let message = Message::Offer(offer.clone());
        let mut body = Vec::new();
        message.encode(&mut body);
        let (incarnation, signing_key) = (peer.incarnation.0, peer.signing_key);
        let note = Note { offer: (message.kind(), body), lanes, peer: peer.spiffe.clone(), incarnation, signing_key };
        let path = twin_file(&self.config.gateway.runtime_directory, offer.migration, NOTE);
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(&serde_json::to_vec(&note)?)
    }

    /// The note and the progress of a migration that ended, or that the journal speaks for now.
    pub(super) fn forget_arrival(&self, migration: MigrationId) {
        for what in [NOTE, PROGRESS] {
            // Whichever of them was made.
            let _ = std::fs::remove_file(twin_file(&self.config.gateway.runtime_directory, migration, what));
        }
    }

    /// Finds the twins that an earlier gateway was filling, and keeps them for their sources as long as an outage may last.
    pub(super) fn find_kept(self: &Arc<Self>) {
        let Ok(entries) = std::fs::read_dir(&self.config.gateway.runtime_directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ending| ending == NOTE)) {
            let name = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse::<MigrationId>().ok());
            let Some(migration) = name else { continue };
            match self.keep(migration, &path) {
                Some(kept) => {
                    tracing::warn!(%migration, vm = %kept.offer.vm, peer = %kept.peer.spiffe, "a twin waits for its source to come back");
                    self.kept.lock().insert(migration, kept);
                    self.drop_later(migration);
                }
                None => self.forget_arrival(migration),
            }
        }
    }

    fn keep(self: &Arc<Self>, migration: MigrationId, path: &Path) -> Option<Kept> {
        let note: Note = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let (kind, body) = &note.offer;
        let Ok(Message::Offer(offer)) = Message::decode(*kind, body) else { return None };
        // What the journal knows is the journal's.
        if offer.migration != migration || !self.journal.records(migration).ok()?.is_empty() {
            return None;
        }
        let socket = twin_file(&self.config.gateway.runtime_directory, migration, "sock");
        let (_, status) = observe(&socket, offer.vm.as_str(), Timeouts::default()).ok()?;
        // One whose state was restored already cannot take pages any more.
        if status.state != RunState::Incoming {
            return None;
        }
        let claim = self.registry.claim_waiting(&offer.vm, migration);
        let peer = PeerFacts { spiffe: note.peer, incarnation: Incarnation(note.incarnation), signing_key: note.signing_key };
        Some(Kept { offer, lanes: note.lanes, peer, claim })
    }

    fn drop_later(self: &Arc<Self>, migration: MigrationId) {
        let gateway = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(gateway.config.migration.max_outage.duration).await;
            gateway.drop_kept(migration, |_| true).await;
        });
    }

    /// Ends a twin whose source does not come back, or offers its VM anew.
    pub(super) async fn drop_kept(self: &Arc<Self>, migration: MigrationId, wanted: impl FnOnce(&PeerFacts) -> bool) {
        if let Some(kept) = self.kept.take_if(migration, |kept| wanted(&kept.peer)) {
            self.end_kept(migration, kept.offer.vm.clone()).await;
            drop(kept);
        }
    }

    async fn end_kept(&self, migration: MigrationId, vm: VmName) {
        let socket = twin_file(&self.config.gateway.runtime_directory, migration, "sock");
        let ended = tokio::task::spawn_blocking(move || discard(&socket, vm.as_str(), Timeouts::default())).await;
        if let Ok(Err(error)) = ended {
            tracing::warn!(%migration, error = %chain(&error), "a twin of nobody is not ended");
        }
        self.forget_arrival(migration);
    }

    /// A source comes back to a twin that an earlier gateway left, in the round that it was at, or with the offer that was not
    /// answered; back comes a session that does not.
    pub(super) async fn resume_kept(self: Arc<Self>, link: Link, first: &Message) -> Option<Link> {
        let (migration, comes_back_in, offered) = match first {
            Message::Resume(resume) => (resume.migration, Some(resume.round), None),
            Message::Offer(offer) => (offer.migration, None, Some(offer)),
            _ => return Some(link),
        };
        let facts = link.peer.clone();
        // SPEC: PROTOCOL.md#must-resume-same
        let same = |peer: &PeerFacts| {
            peer.spiffe == facts.spiffe && peer.incarnation == facts.incarnation && peer.signing_key == facts.signing_key
        };
        let (Some(kept), Some(peer)) = (
            self.kept.take_if(migration, |kept| same(&kept.peer) && offered.is_none_or(|offer| *offer == kept.offer)),
            self.config.peer_of(&facts.spiffe),
        ) else {
            return Some(link);
        };
        let (peer, vm) = (peer.clone(), kept.offer.vm.clone());
        match self.arrive_again(&link, kept).await {
            Ok(arrival) => self.receive(link, &peer, arrival, SystemTime::now(), comes_back_in).await,
            Err(refusal) => {
                self.end_kept(migration, vm).await;
                let failure = Message::Failure(Failure { class: refusal.class, reason: refusal.reason });
                let said = link.session.send(&failure);
                let _ = tokio::time::timeout(limits::SEND_WITHIN, said).await;
                link.session.close(Some(refusal.class), "the migration does not go on");
            }
        }
        None
    }

    /// The source of a kept twin says that the VM stays.
    pub(super) async fn aborted_kept(self: &Arc<Self>, link: &Link, signed: &SignedHandoff) -> bool {
        let message = &signed.message;
        if !matches!(message.step, Handoff::Abort { .. }) || !self.kept.has(message.migration) {
            return false;
        }
        let authentic = verify_signature(&link.peer.signing_key, &message.signed_bytes(), &signed.signature);
        let same = |peer: &PeerFacts| authentic && peer.spiffe == link.peer.spiffe && peer.signing_key == link.peer.signing_key;
        self.drop_kept(message.migration, same).await;
        true
    }

    async fn arrive_again(self: &Arc<Self>, link: &Link, kept: Kept) -> Result<Arrival, Refusal> {
        let Kept { offer, lanes, claim, .. } = kept;
        claim.go_on();
        // What the journal knows is the journal's.
        if !self.journal.records(offer.migration).is_ok_and(|records| records.is_empty()) {
            return Err(Refusal::new(ErrorClass::Local, "the journal knows this migration"));
        }
        let (machine, memory_bytes) = self.read_offer(&offer)?;
        // It goes on with the lanes that it was granted, so they are what is judged.
        let terms = StreamTerms { lanes, ..offer.stream.clone() };
        let mut case = Case {
            migration: offer.migration,
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            terms,
            mode: machine.mode,
            memory_bytes,
            disks: DisksAsked::default(),
            bandwidth_max: None,
            side: Side::Destination,
        };
        let permit = self.ask_accept(&case, link).await?;
        if permit.stream().is_none_or(|stream| stream.lanes < lanes) {
            return Err(Refusal::new(ErrorClass::Denied, format!("policy has come to permit fewer lanes than the {lanes} it was granted")));
        }
        case.bandwidth_max = permit.obligations().bandwidth_max();
        let runtime = &self.config.gateway.runtime_directory;
        let leavings = Leavings::of(runtime, offer.migration);
        let (socket, vm) = (twin_file(runtime, offer.migration, "sock"), offer.vm.clone());
        let attached = tokio::task::spawn_blocking(move || AttachedDestination::reattach(&socket, vm.as_str(), Timeouts::default())).await;
        let (twin, machine) = attached.map_err(|error| Refusal::new(ErrorClass::Bug, error.to_string()))??;
        if machine.uuid != offer.uuid || machine.regions != offer.regions {
            return Err(Refusal::new(ErrorClass::Local, "the twin is not of the VM that was offered"));
        }
        let (policy_digest, policy_ids) = (*permit.set_digest(), permit.policy_ids().to_vec());
        let twin = Twin::Pages(Box::new(twin));
        Ok(Arrival { offer, lanes, case, twin, vmm: None, leavings, laid: None, policy_digest, policy_ids, claim })
    }
}
