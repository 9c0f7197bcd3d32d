//! Heads of peers' logs: kept in our own log, so that neither side can rewrite its own without the other noticing.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use crate::audit::entry::{Entry, Event, Outcome, StoredEntry, hex, unhex32};
use crate::audit::error::AuditError;
use crate::audit::log::AuditLog;
use crate::audit::note::{self, Checkpoint};
use crate::limits;
use crate::types::SpiffeId;

impl AuditLog {
    /// Checks a head that `peer` sent, signed by `public_key`, and keeps it. The same head again is fine and not kept twice.
    ///
    /// # Errors
    ///
    /// The head is not signed by that key; its log is smaller than, different from, or another one than the log whose head was
    /// kept last (which is recorded as refused); or it could not be recorded.
    pub fn note_peer_head(&self, peer: &SpiffeId, checkpoint: &str, public_key: &[u8; 32]) -> Result<(), AuditError> {
        let refuse = |why: String| AuditError::PeerHead { peer: peer.clone(), why };
        let head = note::open(checkpoint, public_key).map_err(refuse)?;
        let mut peers = self.inner().peers.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = Entry::new(Event::PeerHead).peer(peer.as_str()).detail("checkpoint", head.text.as_str());
        let entry = entry.detail("origin", head.origin.as_str()).detail("size", head.size).detail("root", hex(&head.root));
        let entry = entry.detail("public_key", hex(public_key));
        match peers.get(peer.as_str()) {
            Some(last) if last.head() == head.head() && last.origin == head.origin => return Ok(()),
            Some(last) => {
                if let Some(why) = went_wrong(last, &head) {
                    self.record(&entry.outcome(Outcome::Refused).detail("why", why.as_str()))?;
                    return Err(refuse(why));
                }
            }
            None if peers.len() >= limits::AUDIT_PEERS_MAX => {
                return Err(refuse(format!("heads of {} peers are kept already", limits::AUDIT_PEERS_MAX)));
            }
            None => {}
        }
        self.record(&entry.outcome(Outcome::Done))?;
        peers.insert(peer.to_string(), head);
        Ok(())
    }

    /// The last head kept from `peer`.
    #[must_use]
    pub fn peer_head(&self, peer: &SpiffeId) -> Option<Checkpoint> {
        self.inner().peers.lock().unwrap_or_else(PoisonError::into_inner).get(peer.as_str()).cloned()
    }
}

/// INVARIANT(heads-grow).
fn went_wrong(last: &Checkpoint, next: &Checkpoint) -> Option<String> {
    if last.origin != next.origin {
        return Some(format!("is of log `{}`, the one kept before is of `{}`", next.origin, last.origin));
    }
    if next.size < last.size {
        return Some(format!("the log went back from {} to {} entries", last.size, next.size));
    }
    (next.size == last.size && next.root != last.root).then(|| format!("two different logs of {} entries", next.size))
}

/// Takes up what an entry of our own log says about a peer. The entry is signed, so the text is not checked again.
pub(super) fn replay(peers: &mut BTreeMap<String, Checkpoint>, entry: &StoredEntry) {
    if entry.event != Event::PeerHead || entry.outcome != Some(Outcome::Done) {
        return;
    }
    let text = |name: &str| entry.detail.get(name).and_then(|value| value.as_str());
    let size = entry.detail.get("size").and_then(serde_json::Value::as_u64);
    let root = text("root").and_then(unhex32);
    if let (Some(peer), Some(origin), Some(size), Some(root), Some(checkpoint)) =
        (&entry.peer, text("origin"), size, root, text("checkpoint"))
    {
        peers.insert(peer.clone(), Checkpoint { origin: origin.to_owned(), size, root, text: checkpoint.to_owned() });
    }
}
