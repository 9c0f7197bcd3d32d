//! Gateways are each other's witnesses: each keeps the heads of its peers' logs in its own, cosigns what only grows, and keeps a proof
//! of the entry by which a guest changed hands. So neither side can rewrite its log without the other noticing.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;

use crate::audit::commit::{Replace, Writer, replace};
use crate::audit::entry::{Entry, Event, Outcome, StoredEntry, hex};
use crate::audit::error::AuditError;
use crate::audit::log::AuditLog;
use crate::audit::note::{self, Checkpoint};
use crate::audit::proof::Proof;
use crate::audit::tree::{check_consistency, check_inclusion, leaf_hash, prove_consistency, prove_inclusion, root_at};
use crate::limits;
use crate::types::{MigrationId, SpiffeId};

/// What a log shows a peer about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Its head, as text.
    pub checkpoint: String,
    /// The size that the peer should know already; 0 for nothing.
    pub from: u64,
    /// That the log of that size is the beginning of this one.
    pub consistency: Vec<[u8; 32]>,
    /// That an entry about a handoff is in the log under this head, as a C2SP tlog-proof.
    pub proof: Option<String>,
}

/// What a peer makes of an announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The head of that many entries is kept; this is the signature line that says so.
    Cosigned(u64, String),
    /// The peer knows the log at another size; it wants the announcement from there.
    From(u64),
}

/// Everybody's heads.
#[derive(Debug, Default)]
pub(super) struct Known {
    peers: BTreeMap<String, Peer>,
}

#[derive(Debug, Default)]
struct Peer {
    /// The last head of its log that this one keeps.
    kept: Option<Noted>,
    /// The last head of this log that it cosigned.
    cosigned: Option<Noted>,
    /// Heads that it was shown and has not answered.
    shown: Vec<Checkpoint>,
}

/// A head as it stands in an entry of this log.
#[derive(Debug)]
struct Noted {
    head: Checkpoint,
    /// The peer's key, in hexadecimal.
    key: String,
    index: u64,
}

/// Heads that wait for an answer; a peer has few sessions that end at the same time.
const SHOWN_MAX: usize = 8;

impl AuditLog {
    /// Whether `peer` has been shown no head for [`limits::AUDIT_HEADS_EVERY`]. Waits for no disk, whatever is being recorded.
    #[must_use]
    pub fn head_is_due(&self, peer: &SpiffeId) -> bool {
        self.shown_at().get(peer).is_none_or(|at| at.elapsed() >= limits::AUDIT_HEADS_EVERY)
    }

    /// What to show `peer`: the head, that it extends what the peer knows (`from`, or what it cosigned last), and that the last entry
    /// about COMMIT or RUN of `migration` is in it.
    ///
    /// # Errors
    ///
    /// The peer knows more of this log than there is, which is recorded; or files of the log cannot be read.
    pub fn announce(&self, peer: &SpiffeId, from: Option<u64>, migration: Option<MigrationId>) -> Result<Announcement, AuditError> {
        let refuse = |why: String| AuditError::PeerHead { peer: peer.clone(), why };
        self.shown_at().insert(peer.clone(), Instant::now());
        let mut known = self.known();
        let state = known.peers.entry(peer.to_string()).or_default();
        let from = from.unwrap_or_else(|| state.cosigned.as_ref().map_or(0, |last| last.head.size));
        let head = self.head();
        if from > head.size {
            let why = format!("the peer keeps a head of {from} entries of this log, which has {}: this log went back", head.size);
            let entry = Entry::new(Event::HeadCosigned).peer(peer.as_str()).outcome(Outcome::Refused);
            self.record(&entry.detail("size", from).detail("why", why.as_str()))?;
            return Err(refuse(why));
        }
        let handoff = migration.and_then(|migration| self.handoffs().entry(migration));
        let made = self.inner().with_writer(|writer| announcement(writer, &head, from, handoff));
        let made = made.unwrap_or_else(|| Err("the log has failed".to_owned())).map_err(refuse)?;
        state.shown.retain(|shown| *shown != head);
        state.shown.push(head);
        if state.shown.len() > SHOWN_MAX {
            state.shown.remove(0);
        }
        Ok(made)
    }

    /// Checks what `peer`, whose key is `public_key`, shows of its log, and keeps it: the head in this log, the proof beside it. The
    /// answer is for the peer. The same head again is fine and not kept twice.
    ///
    /// # Errors
    ///
    /// The head is not signed by that key; its log is not the one whose head was kept last, or not an extension of it; the proof is
    /// not one of a handoff of `migration` (all but the first are recorded as refused). Or it could not be recorded.
    pub fn keep_peer_head(
        &self,
        peer: &SpiffeId,
        public_key: &[u8; 32],
        shown: &Announcement,
        migration: Option<MigrationId>,
    ) -> Result<Answer, AuditError> {
        let refuse = |why: String| AuditError::PeerHead { peer: peer.clone(), why };
        let head = note::open(&shown.checkpoint, public_key).map_err(refuse)?;
        let mut known = self.known();
        if known.peers.len() >= limits::AUDIT_PEERS_MAX && !known.peers.contains_key(peer.as_str()) {
            return Err(refuse(format!("heads of {} peers are kept already", limits::AUDIT_PEERS_MAX)));
        }
        let state = known.peers.entry(peer.to_string()).or_default();
        let entry = |text: &str| {
            let entry = Entry::new(Event::PeerHead).peer(peer.as_str()).detail("checkpoint", text).detail("public_key", hex(public_key));
            entry.detail("origin", head.origin.as_str()).detail("size", head.size).detail("root", hex(&head.root))
        };
        let checked = grown(state.kept.as_ref().map(|last| &last.head), &head, shown);
        let checked = checked.and_then(|known| {
            let proof = shown.proof.as_deref().map(|text| handoff_proof(text, &shown.checkpoint, migration)).transpose()?;
            Ok((known, proof))
        });
        let (growth, proof) = match checked {
            Ok(checked) => checked,
            Err(why) => {
                self.record(&entry(&head.text).outcome(Outcome::Refused).detail("why", why.as_str()))?;
                return Err(refuse(why));
            }
        };
        if let Growth::From(size) = growth {
            return Ok(Answer::From(size));
        }
        let seconds = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0);
        let signed = self.inner().with_writer(|writer| {
            let line = note::cosign(writer.signer.as_ref(), &head, seconds)?;
            let kept = proof.as_ref().map(|proof| keep_proof(writer, proof, &line)).transpose()?;
            Ok::<_, String>((line, kept))
        });
        let (line, kept_as) = signed.unwrap_or_else(|| Err("the log has failed".to_owned())).map_err(refuse)?;
        if growth == Growth::Further || kept_as.is_some() {
            let text = format!("{}{line}", head.text);
            let mut entry = entry(&text).outcome(Outcome::Done);
            if let (Some(name), Some(proof)) = (kept_as, &proof) {
                entry.migration = proof.entry.migration;
                entry = entry.detail("proof", name);
            }
            let receipt = self.record(&entry)?;
            state.kept = Some(Noted { head: Checkpoint { text, ..head.clone() }, key: hex(public_key), index: receipt.index() });
        }
        Ok(Answer::Cosigned(head.size, line))
    }

    /// Keeps what `peer`, whose key is `public_key`, signed about a head that it was shown.
    ///
    /// # Errors
    ///
    /// It was not shown such a head, or did not sign it; or it could not be recorded.
    pub fn keep_cosignature(&self, peer: &SpiffeId, public_key: &[u8; 32], size: u64, line: &str) -> Result<(), AuditError> {
        let refuse = |why: String| AuditError::PeerHead { peer: peer.clone(), why };
        let mut known = self.known();
        let state = known.peers.entry(peer.to_string()).or_default();
        let shown = state.shown.iter().position(|shown| shown.size == size);
        let shown = shown.ok_or_else(|| refuse(format!("it cosigns a head of {size} entries, which it was not shown")))?;
        let mut head = state.shown.remove(shown);
        head.text.push_str(line);
        match note::cosigned_at(&head.text, public_key) {
            Ok(Some(_)) => {}
            Ok(None) => return Err(refuse("its cosignature is by another key".to_owned())),
            Err(why) => return Err(refuse(format!("the head with its cosignature {why}"))),
        }
        let entry = Entry::new(Event::HeadCosigned).peer(peer.as_str()).outcome(Outcome::Done).detail("checkpoint", head.text.as_str());
        let receipt = self.record(&entry.detail("size", size).detail("public_key", hex(public_key)))?;
        if state.cosigned.as_ref().is_none_or(|last| last.head.size < size) {
            state.cosigned = Some(Noted { head, key: hex(public_key), index: receipt.index() });
        }
        Ok(())
    }

    /// The last head kept from `peer`.
    #[must_use]
    pub fn peer_head(&self, peer: &SpiffeId) -> Option<Checkpoint> {
        self.known().peers.get(peer.as_str())?.kept.as_ref().map(|last| last.head.clone())
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.inner().known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown_at(&self) -> MutexGuard<'_, HashMap<SpiffeId, Instant>> {
        self.inner().shown_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handoffs(&self) -> MutexGuard<'_, Handoffs> {
        self.inner().handoffs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn announcement(writer: &Writer, head: &Checkpoint, from: u64, handoff: Option<(u64, String)>) -> Result<Announcement, String> {
    // Somebody may have committed meanwhile; the tree has what a smaller one needs.
    let consistency = prove_consistency(writer, from, head.size)?;
    let old = crate::audit::tree::Head { size: from, root: root_at(writer, from)? };
    // A damaged tile shows here, and not as an accusation by the peer.
    check_consistency(&consistency, old, head.head()).map_err(|why| format!("{why}; the log's tiles are damaged"))?;
    let proof = match handoff.filter(|(index, _)| *index < head.size) {
        None => None,
        Some((index, line)) => {
            let path = prove_inclusion(writer, index, head.size)?;
            check_inclusion(&path, index, leaf_hash(line.as_bytes()), head.head())
                .map_err(|why| format!("{why}; the log's tiles are damaged"))?;
            Some(Proof::text(line.as_bytes(), index, &path, &head.text))
        }
    };
    Ok(Announcement { checkpoint: head.text.clone(), from, consistency, proof })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Growth {
    /// The head is the one that is known.
    Same,
    /// The head extends what is known.
    Further,
    /// Nothing can be said before the log is shown from this size.
    From(u64),
}

/// INVARIANT(heads-grow).
fn grown(last: Option<&Checkpoint>, next: &Checkpoint, shown: &Announcement) -> Result<Growth, String> {
    let Some(last) = last else {
        return if shown.from == 0 && shown.consistency.is_empty() { Ok(Growth::Further) } else { Ok(Growth::From(0)) };
    };
    if last.origin != next.origin {
        return Err(format!("is of log `{}`, the one kept before is of `{}`", next.origin, last.origin));
    }
    if next.size < last.size {
        return Err(format!("the log went back from {} to {} entries", last.size, next.size));
    }
    if next.size == last.size {
        return if next.root == last.root { Ok(Growth::Same) } else { Err(format!("two different logs of {} entries", next.size)) };
    }
    if shown.from != last.size {
        return Ok(Growth::From(last.size));
    }
    check_consistency(&shown.consistency, last.head(), next.head())
        .map_err(|why| format!("the log of {} entries is not shown to extend the one of {} kept before: {why}", next.size, last.size))?;
    Ok(Growth::Further)
}

/// A proof that a guest was given away or taken over.
fn handoff_proof(text: &str, checkpoint: &str, migration: Option<MigrationId>) -> Result<Proof, String> {
    let proof = Proof::read(text).map_err(|why| format!("the proof beside it is none: {why}"))?;
    if proof.checkpoint.text != checkpoint {
        return Err("the proof beside it is under another head".to_owned());
    }
    let of_handoff =
        is_handover(&proof.entry) && proof.entry.migration.is_some() && migration.is_none_or(|m| proof.entry.migration == Some(m));
    if of_handoff { Ok(proof) } else { Err("the proof beside it is of an entry about something else".to_owned()) }
}

/// Whether an entry says that its gateway gave a guest away, or took it over.
fn is_handover(entry: &StoredEntry) -> bool {
    entry.event == Event::Handoff
        && entry.outcome == Some(Outcome::Done)
        && matches!(entry.detail.get("record").and_then(Value::as_str), Some("commit" | "run"))
}

/// Where proofs of peers' entries are kept.
pub(super) const PROOFS: &str = "proofs";

/// The name of the file with the proof of an entry.
pub(super) fn proof_name(entry: &StoredEntry) -> String {
    let migration = entry.migration.map(|migration| migration.to_string()).unwrap_or_default();
    let record = entry.detail.get("record").and_then(Value::as_str).unwrap_or_default();
    format!("{migration}-{record}.tlog-proof")
}

fn keep_proof(writer: &Writer, proof: &Proof, cosignature: &str) -> Result<String, String> {
    let name = proof_name(&proof.entry);
    let dir = writer.dir.join(PROOFS);
    let failed = |what: &str, path: &Path, error: std::io::Error| format!("cannot {what} `{}`: {error}", path.display());
    writer.disk.create_dir(&dir).map_err(|error| failed("create", &dir, error))?;
    let path = dir.join(&name);
    replace(writer.disk.as_ref(), &dir, &path, proof.with_signature(cosignature).as_bytes()).map_err(|error| match error {
        Replace::Before(what, error) | Replace::Fatal(what, error) => failed(what, &path, error),
    })?;
    writer.disk.sync_dir(&writer.dir).map_err(|error| failed("fsync the directory of", &dir, error))?;
    Ok(format!("{PROOFS}/{name}"))
}

impl Known {
    /// Takes up what an entry of our own log says about a peer. The entry is signed, so its signatures are not checked again.
    pub(super) fn replay(&mut self, entry: &StoredEntry) {
        if !matches!(entry.event, Event::PeerHead | Event::HeadCosigned) || entry.outcome != Some(Outcome::Done) {
            return;
        }
        let text = |name: &str| entry.detail.get(name).and_then(Value::as_str);
        let head = text("checkpoint").and_then(|text| note::read(text).ok());
        let (Some(peer), Some(head), Some(key)) = (&entry.peer, head, text("public_key")) else { return };
        let noted = Some(Noted { head, key: key.to_owned(), index: entry.index });
        let state = self.peers.entry(peer.clone()).or_default();
        match entry.event {
            Event::PeerHead => state.kept = noted,
            _ => state.cosigned = noted,
        }
    }

    /// What has to be said again before entries before `first` go: the last heads.
    pub(super) fn before(&self, first: u64) -> Vec<Entry> {
        let again = |event, peer: &str, noted: &Noted| {
            let entry = Entry::new(event).peer(peer).outcome(Outcome::Done).detail("checkpoint", noted.head.text.as_str());
            entry.detail("size", noted.head.size).detail("public_key", noted.key.as_str()).detail("again", true)
        };
        let mut entries = Vec::new();
        for (name, peer) in &self.peers {
            for (event, last) in [(Event::PeerHead, &peer.kept), (Event::HeadCosigned, &peer.cosigned)] {
                entries.extend(last.iter().filter(|noted| noted.index < first).map(|noted| again(event, name, noted)));
            }
        }
        entries
    }
}

/// By migration, the last entry about COMMIT or RUN of this gateway: its place and its line.
#[derive(Debug, Default)]
pub(super) struct Handoffs {
    by_migration: BTreeMap<MigrationId, (u64, String)>,
}

impl Handoffs {
    pub(super) fn extend(&mut self, lines: Vec<(MigrationId, u64, String)>) {
        for (migration, index, line) in lines {
            if StoredEntry::parse(line.as_bytes()).is_ok_and(|entry| is_handover(&entry)) {
                self.by_migration.insert(migration, (index, line));
            }
        }
        while self.by_migration.len() > limits::AUDIT_HANDOFFS_MAX {
            let oldest = self.by_migration.iter().min_by_key(|(_, (index, _))| *index).map(|(migration, _)| *migration);
            oldest.and_then(|oldest| self.by_migration.remove(&oldest));
        }
    }

    fn entry(&self, migration: MigrationId) -> Option<(u64, String)> {
        self.by_migration.get(&migration).cloned()
    }
}
