//! The keys that signed a log, one after the other.
//!
//! A log begins with the key that entry 0 names. An entry `key-changed` with `next_public_key` hands over to another one: the checkpoint
//! behind it is the last of the old key, and every one from there on is signed by the new key. So a reader who trusts the first key follows
//! to the last, and one who trusts the last knows that it has signed a tree with all entries from the first.
//! INVARIANT(key-chain): nobody goes on with a log that the own key has not signed last; what it was named by alone proves nothing.

use std::sync::Arc;

use crate::audit::disk::RealDisk;
use crate::audit::entry::{Event, Outcome, StoredEntry, hex, unhex32};
use crate::audit::error::AuditError;
use crate::audit::log::AuditLog;
use crate::audit::note::{self, Checkpoint, Signer};
use crate::audit::open::{self, log_names};
use crate::audit::read;
use crate::audit::walk::{Line, Walk};
use crate::limits;

/// The keys of a log as far as it was read.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    all: Vec<[u8; 32]>,
    /// Whether the last of them has signed a commit.
    signed: bool,
}

impl Keys {
    /// A log that begins with this key.
    pub(super) fn from(first: Option<[u8; 32]>) -> Self {
        Self { all: first.into_iter().collect(), signed: false }
    }

    /// The key that the next commit must be signed by.
    pub(super) fn current(&self) -> Option<[u8; 32]> {
        self.all.last().copied()
    }

    /// A commit of the current key.
    pub(super) fn pass(&mut self, lines: &[Line]) {
        self.signed = true;
        for next in lines.iter().filter_map(|line| next_key(&line.entry)) {
            self.all.push(next);
            self.signed = false;
        }
    }

    /// Whether `key` has signed a part of the log.
    pub(super) fn has_signed(&self, key: &[u8; 32]) -> bool {
        let last = if self.signed { self.all.len() } else { self.all.len().saturating_sub(1) };
        self.all.iter().take(last).any(|one| one == key)
    }

    /// Whether `key` signed last, and is the one to go on with.
    pub(super) fn ends_with(&self, key: &[u8; 32]) -> bool {
        self.signed && self.current().as_ref() == Some(key)
    }

    /// Whether `old` signed last and named `new`, which has not signed yet.
    pub(super) fn hands_over(&self, old: &[u8; 32], new: &[u8; 32]) -> bool {
        !self.signed && self.all.ends_with(&[*old, *new])
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Opens a checkpoint with whichever of the keys signed it; the words are those about the last key.
    pub(super) fn open(&self, text: &str, open: impl Fn(&str, &[u8; 32]) -> Result<Checkpoint, String>) -> Result<Checkpoint, String> {
        let mut refused = Err("no key is given, and the log names none".to_owned());
        for key in self.all.iter().rev() {
            match open(text, key) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(why) if refused.as_ref().is_err_and(|why| why.starts_with("no key")) => refused = Err(why),
                Err(_) => {}
            }
        }
        refused
    }
}

fn next_key(entry: &StoredEntry) -> Option<[u8; 32]> {
    let named = |name: &str| unhex32(entry.detail.get(name)?.as_str()?);
    (entry.event == Event::KeyChanged).then(|| named("next_public_key")).flatten()
}

/// The key that the log says it begins with: in entry 0, or where entry 0 was pruned, in the first entry that names it. Nobody has
/// vouched for it.
pub(super) fn named_key(dir: &std::path::Path) -> Option<[u8; 32]> {
    let mut walk = Walk::new(dir).ok()?;
    let named = |line: &Line| {
        let known = matches!(line.entry.event, Event::LogCreated | Event::Pruned | Event::KeyChanged);
        known.then(|| unhex32(line.entry.detail.get("public_key")?.as_str()?)).flatten()
    };
    loop {
        let commit = walk.next();
        walk.tree().take_full();
        let lines = commit.as_ref().ok().and_then(Option::as_ref).map_or(walk.open_lines(), |commit| commit.lines.as_slice());
        if let Some(key) = lines.iter().find_map(named) {
            return Some(key);
        }
        if !matches!(commit, Ok(Some(_))) || walk.first() == 0 {
            return None;
        }
    }
}

impl AuditLog {
    /// Hands the log in `dir` over to another key: `old` signs last that `new` is the next one, and `new` signs the first entry of its
    /// own. Cut short, it is gone on with by the same call. Returns the number of entries.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open); the two keys are one.
    pub fn rotate_key(dir: &std::path::Path, old: &Arc<dyn Signer>, new: &Arc<dyn Signer>) -> Result<u64, AuditError> {
        let origin = read::origin(dir)?;
        let (from, to) = (old.public_key(), new.public_key());
        if from == to {
            return Err(AuditError::Checkpoint { of: dir.display().to_string(), why: "is signed by the new key already".to_owned() });
        }
        let disk = Arc::new(RealDisk);
        let mut opened = open::open(disk, dir, &origin, Arc::clone(old), Some(to), limits::AUDIT_SEGMENT_BYTES_MAX)?;
        let named = opened.keys.hands_over(&from, &to);
        if named {
            opened.writer.signer = Arc::clone(new);
        }
        let log = Self::with(dir, opened)?;
        if !named {
            let entry = log_names(Event::KeyChanged, &origin, old.as_ref());
            log.record_critical(&entry.detail("next_public_key", hex(&to)))?;
            log.inner().with_writer(|writer| writer.signer = Arc::clone(new));
        }
        log.record_critical(&log_names(Event::KeyChanged, &origin, new.as_ref()).outcome(Outcome::Done))?;
        log.publish();
        Ok(log.head().size)
    }
}

/// Opens a checkpoint of a log's own.
pub(super) fn open_own(text: &str, keys: &Keys) -> Result<Checkpoint, String> {
    keys.open(text, note::open_bare)
}
