//! What a log and its peers say about each other, offline: did peers see this log as it is, and does what it keeps of theirs hold?

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::audit::entry::{Event, Outcome, StoredEntry, hex, unhex32};
use crate::audit::keys::Keys;
use crate::audit::note::{self, Checkpoint};
use crate::audit::peers::{PROOFS, proof_name};
use crate::audit::proof::Proof;
use crate::audit::segment;
use crate::audit::tile::TilesOnDisk;
use crate::audit::tree::{Hash, Tiles, Tree, root_at, tiles_in};
use crate::audit::verify::Verdict;
use crate::audit::walk::Walk;
use crate::limits;

/// A head in an entry of the log, not believed yet.
#[derive(Debug)]
struct Noted {
    entry: u64,
    peer: String,
    key: String,
    text: String,
}

/// What a log has about its peers.
#[derive(Debug, Default)]
pub(super) struct Witnesses {
    /// Heads of this log that peers cosigned.
    cosigned: Vec<Noted>,
    /// Heads of peers' logs.
    kept: Vec<Noted>,
}

impl Witnesses {
    pub(super) fn take_in(&mut self, entry: StoredEntry) {
        let list = match entry.event {
            Event::HeadCosigned => &mut self.cosigned,
            Event::PeerHead => &mut self.kept,
            _ => return,
        };
        if entry.outcome == Some(Outcome::Done) {
            let text = |name: &str| entry.detail.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let (key, text) = (text("public_key"), text("checkpoint"));
            list.push(Noted { entry: entry.index, peer: entry.peer.unwrap_or_default(), key, text });
        }
    }

    /// Everything is checked with the keys that the entries name; `keys` are those that must be among them.
    pub(super) fn verdict(&self, dir: &Path, walk: &mut Walk, own: &Keys, keys: &[[u8; 32]]) -> Verdict {
        match self.check(dir, walk, own, keys) {
            Err((entry, why)) => Verdict::bad(entry, why),
            Ok(said) if keys.is_empty() && self.cosigned.is_empty() => Verdict::Open(format!("no peer has cosigned this log{said}")),
            Ok(said) if keys.is_empty() => {
                let by: BTreeSet<&str> = self.cosigned.iter().map(|noted| noted.peer.as_str()).collect();
                let by: Vec<String> = by.into_iter().map(|peer| format!("`{peer}`")).collect();
                Verdict::Open(format!("cosigned by keys that the log itself names for {}; give their keys{said}", by.join(", ")))
            }
            Ok(said) => match keys.iter().find(|key| !self.cosigned.iter().any(|noted| noted.key == hex(*key))) {
                Some(_) => Verdict::Open(format!("a given key has not cosigned this log{said}")),
                None => {
                    let size = keys.iter().filter_map(|key| self.last_cosigned(key)).min().unwrap_or(0);
                    Verdict::Good(format!("the owners of all given keys have seen its first {size} entries{said}"))
                }
            },
        }
    }

    fn last_cosigned(&self, key: &[u8; 32]) -> Option<u64> {
        let of_key = self.cosigned.iter().filter(|noted| noted.key == hex(key));
        of_key.filter_map(|noted| note::read(&noted.text).ok()).map(|head| head.size).max()
    }

    fn check(&self, dir: &Path, walk: &mut Walk, own: &Keys, keys: &[[u8; 32]]) -> Result<String, (Option<u64>, String)> {
        let signed = walk.signed();
        let tiles = TilesOfWalk { dir, tree: walk.tree() };
        for noted in &self.cosigned {
            let bad = |why: String| (Some(noted.entry), format!("the head that `{}` cosigned {why}", noted.peer));
            let key = unhex32(&noted.key).ok_or_else(|| bad("names no key".to_owned()))?;
            let head = if own.count() == 0 { note::read(&noted.text) } else { own.open(&noted.text, note::open) };
            let head = head.map_err(bad)?;
            note::cosigned_at(&noted.text, &key).map_err(bad)?.ok_or_else(|| bad("has no cosignature of the named key".to_owned()))?;
            let root = if head.size <= signed { root_at(&tiles, head.size).map_err(bad)? } else { [0; 32] };
            if root != head.root {
                return Err(bad(format!("of {} entries is not one of this log", head.size)));
            }
        }
        let heads = self.check_kept()?;
        for key in keys {
            if !self.kept.iter().chain(&self.cosigned).any(|noted| noted.key == hex(key)) {
                return Err((None, "the log has neither a head nor a cosignature of a given key".to_owned()));
            }
            self.one_owner(key, keys)?;
        }
        let proofs = check_proofs(dir, own, keys, &self.kept)?;
        Ok(format!("; {heads} heads of peers are signed and never go back, {proofs} proofs hold"))
    }

    /// A key is one peer's, and that peer has no other but those that are given too.
    fn one_owner(&self, key: &[u8; 32], given: &[[u8; 32]]) -> Result<(), (Option<u64>, String)> {
        let named = hex(key);
        let all = || self.kept.iter().chain(&self.cosigned);
        let Some(owner) = all().find(|noted| noted.key == named).map(|noted| noted.peer.as_str()) else { return Ok(()) };
        let other = |noted: &&Noted| {
            (noted.key == named) != (noted.peer == owner) && (noted.key == named || !given.iter().any(|key| hex(key) == noted.key))
        };
        match all().find(other) {
            Some(other) if other.key == named => {
                Err((Some(other.entry), format!("the given key is that of `{owner}`, and here that of `{}`", other.peer)))
            }
            Some(other) => Err((Some(other.entry), format!("the head of `{owner}` is signed by another key than given"))),
            None => Ok(()),
        }
    }

    /// Heads of peers are signed by the key that the entry names, and those of one peer only grow.
    fn check_kept(&self) -> Result<usize, (Option<u64>, String)> {
        let mut last: BTreeMap<&str, Checkpoint> = BTreeMap::new();
        for noted in &self.kept {
            let bad = |why: String| (Some(noted.entry), format!("the head of `{}` {why}", noted.peer));
            let key = unhex32(&noted.key).ok_or_else(|| bad("names no key".to_owned()))?;
            let head = note::open(&noted.text, &key).map_err(bad)?;
            if let Some(last) = last.get(noted.peer.as_str())
                && (head.origin != last.origin || head.size < last.size || (head.size == last.size && head.root != last.root))
            {
                return Err(bad(format!("of {} entries does not follow the one of {} kept before", head.size, last.size)));
            }
            last.insert(&noted.peer, head);
        }
        Ok(self.kept.len())
    }
}

/// Proofs of peers' entries are those that their files are called after, signed by the peer and cosigned by the owner of this log.
fn check_proofs(dir: &Path, own: &Keys, keys: &[[u8; 32]], kept: &[Noted]) -> Result<usize, (Option<u64>, String)> {
    let folder = dir.join(PROOFS);
    let bad = |what: &Path, why: &dyn std::fmt::Display| (None, format!("the proof `{}`: {why}", what.display()));
    let items = match fs::read_dir(&folder) {
        Ok(items) => items,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(bad(&folder, &error)),
    };
    // A peer has many heads and few keys, and a signature takes longer than all else.
    let mut signers: BTreeMap<String, BTreeSet<[u8; 32]>> = BTreeMap::new();
    for noted in kept {
        let Ok(head) = note::read(&noted.text) else { continue };
        signers.entry(head.origin).or_default().extend(unhex32(&noted.key));
    }
    let mut count = 0;
    for item in items {
        let path = item.map_err(|error| bad(&folder, &error))?.path();
        if path.extension().is_none_or(|extension| extension != "tlog-proof") {
            continue;
        }
        let text = segment::read_text(&path, limits::AUDIT_PROOF_BYTES_MAX).map_err(|error| bad(&path, &error))?;
        let proof = Proof::read(&text).map_err(|why| bad(&path, &why))?;
        let of = proof_name(&proof.entry);
        if path.file_name().is_none_or(|name| name != of.as_str()) {
            return Err(bad(&path, &format!("it is the one that belongs into `{of}`")));
        }
        let known = signers.get(&proof.checkpoint.origin).into_iter().flatten();
        let mut signed = Err("no key of a peer is known to check it with".to_owned());
        for key in known.chain(keys) {
            signed = proof.check_signer(key);
            if signed.is_ok() {
                break;
            }
        }
        signed.map_err(|why| bad(&path, &why))?;
        if own.count() > 0 {
            let cosigned = own.open(&text, |_, key| proof.check_witness(key).map(|_| proof.checkpoint.clone()));
            cosigned.map_err(|why| bad(&path, &format!("of the owner of this log: {why}")))?;
        }
        count += 1;
    }
    Ok(count)
}

/// The right end of a tree that was read, and the files for the rest; those were compared with it.
pub(super) struct TilesOfWalk<'a> {
    pub(super) dir: &'a Path,
    pub(super) tree: &'a Tree,
}

impl Tiles for TilesOfWalk<'_> {
    fn tile(&self, level: usize, index: u64, width: usize) -> Result<Vec<Hash>, String> {
        if index == tiles_in(self.tree.size(), level) {
            return Ok(self.tree.edge(level).to_vec());
        }
        TilesOnDisk { dir: self.dir }.tile(level, index, width)
    }
}
