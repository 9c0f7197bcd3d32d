//! Offline: is this log what was written, by whom, and is it all of it? And reading it for people.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::audit::chain::Head;
use crate::audit::entry::{Event, StoredEntry, hex, unhex32};
use crate::audit::error::AuditError;
use crate::audit::note::{self, Checkpoint};
use crate::audit::open::read_checkpoint;
use crate::audit::walk::Walk;
use crate::limits;
use crate::types::{MigrationId, VmName};

/// What is known from elsewhere about the log to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// The key that must have signed it. Without it, the key that the log itself names is used.
    pub public_key: Option<[u8; 32]>,
    /// A checkpoint of this log that somebody else kept; the log must still contain what it covers.
    pub checkpoint: Option<String>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Good(String),
    /// Nothing speaks against it, and nothing proves it.
    Open(String),
    /// No.
    Bad {
        /// The first entry that is wrong or missing, where there is one.
        entry: Option<u64>,
        /// What is wrong.
        why: String,
    },
}

impl Verdict {
    /// Whether the answer is no.
    #[must_use]
    pub fn is_bad(&self) -> bool {
        matches!(self, Self::Bad { .. })
    }

    pub(super) fn bad(entry: Option<u64>, why: impl Into<String>) -> Self {
        Self::Bad { entry, why: why.into() }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good(why) => write!(f, "good: {why}"),
            Self::Open(why) => write!(f, "not proven: {why}"),
            Self::Bad { entry: Some(entry), why } => write!(f, "bad at entry {entry}: {why}"),
            Self::Bad { entry: None, why } => write!(f, "bad: {why}"),
        }
    }
}

/// Everything that can be said about a log from its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The log's name, from its checkpoint.
    pub origin: Option<String>,
    /// Entries that are whole and in order.
    pub entries: u64,
    /// The hash that stands for them, in hexadecimal.
    pub root: String,
    /// Whether every entry is as written and follows the one before.
    pub content: Verdict,
    /// Whether the expected key signed exactly this.
    pub signer: Verdict,
    /// Whether anything is missing at the end.
    pub completeness: Verdict,
}

impl VerifyReport {
    /// Whether no answer is no.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        ![&self.content, &self.signer, &self.completeness].into_iter().any(Verdict::is_bad)
    }
}

/// Verifies the log in `dir` from its files alone. A gateway may be writing it meanwhile.
#[must_use]
pub fn verify(dir: &Path, options: &VerifyOptions) -> VerifyReport {
    let live = is_live(dir);
    // First the checkpoint: a live log only grows beyond it.
    let own = read_checkpoint(dir);
    let mut roots = Roots::default();
    roots.want(0);
    roots.want_of(own.as_ref().ok().and_then(Option::as_deref));
    roots.want_of(options.checkpoint.as_deref());
    let mut read = Read { walk: Walk::new(dir), first: None, roots };
    let damage = read.run();
    let head = read.head();
    let key = options.public_key.or_else(|| read.named_key());
    let opened = open_own(&own, key);
    let signed = opened.as_ref().ok().map_or(0, |checkpoint| checkpoint.size);
    // Behind a live log's checkpoint stands at most a commit that is being made.
    let unfinished = live && head.size >= signed;
    let content = match &damage {
        None => Verdict::Good(format!("{} entries, each follows the one before", head.size)),
        Some(_) if unfinished => Verdict::Good(format!("{signed} entries, and a commit in the making")),
        Some(error) => {
            let why = error.to_string();
            Verdict::bad(Some(head.size), why)
        }
    };
    let completeness = completeness(&read, &opened, options, key, damage.is_some());
    VerifyReport {
        origin: opened.as_ref().ok().map(|checkpoint| checkpoint.origin.clone()),
        entries: head.size,
        root: hex(&head.root),
        content,
        signer: signer(&read, &opened, options, unfinished),
        completeness,
    }
}

/// The hash at some sizes, noted in passing.
#[derive(Default)]
struct Roots {
    at: BTreeMap<u64, Option<[u8; 32]>>,
}

impl Roots {
    fn want(&mut self, size: u64) {
        self.at.insert(size, None);
    }

    /// The size that a checkpoint names, believed or not.
    fn want_of(&mut self, text: Option<&str>) {
        if let Some(size) = text.and_then(|text| text.lines().nth(1)?.parse().ok()) {
            self.want(size);
        }
    }

    fn note(&mut self, head: Head) {
        if let Some(root) = self.at.get_mut(&head.size) {
            *root = Some(head.root);
        }
    }
}

struct Read {
    walk: Result<Walk, AuditError>,
    first: Option<StoredEntry>,
    roots: Roots,
}

impl Read {
    /// Reads to the end, or to the first entry that is wrong.
    fn run(&mut self) -> Option<AuditError> {
        let walk = match &mut self.walk {
            Ok(walk) => walk,
            Err(error) => return Some(error.clone()),
        };
        self.roots.note(walk.head());
        loop {
            match walk.next() {
                Ok(Some(entry)) => {
                    self.first.get_or_insert(entry);
                    self.roots.note(walk.head());
                }
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
        }
    }

    fn head(&self) -> Head {
        self.walk.as_ref().map_or(Head::EMPTY, Walk::head)
    }

    fn detail(&self, name: &str) -> Option<&str> {
        self.first.as_ref().filter(|entry| entry.event == Event::LogCreated)?.detail.get(name)?.as_str()
    }

    /// The key that entry 0 names.
    fn named_key(&self) -> Option<[u8; 32]> {
        unhex32(self.detail("public_key")?)
    }

    /// Whether the log contains exactly what a checkpoint covers.
    fn covers(&self, checkpoint: &Checkpoint) -> Covered {
        if checkpoint.size > self.head().size {
            return Covered::Missing;
        }
        match self.roots.at.get(&checkpoint.size) {
            Some(Some(root)) if *root == checkpoint.root => Covered::Yes,
            _ => Covered::Other,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Covered {
    Yes,
    Other,
    Missing,
}

fn open_own(own: &Result<Option<String>, AuditError>, key: Option<[u8; 32]>) -> Result<Checkpoint, String> {
    let text = own.as_ref().map_err(ToString::to_string)?.as_deref().ok_or("there is no checkpoint")?;
    let key = key.ok_or("no key is given, and the log names none")?;
    note::open(text, &key).map_err(|why| format!("the checkpoint {why}"))
}

fn signer(read: &Read, own: &Result<Checkpoint, String>, options: &VerifyOptions, unfinished: bool) -> Verdict {
    let checkpoint = match own {
        Ok(checkpoint) => checkpoint,
        Err(why) => return Verdict::bad(None, why.as_str()),
    };
    let origin = read.detail("origin");
    if read.head().size > 0 && origin != Some(checkpoint.origin.as_str()) {
        return Verdict::bad(
            Some(0),
            format!("the checkpoint is of log `{}`, entry 0 names `{}`", checkpoint.origin, origin.unwrap_or("none")),
        );
    }
    match read.covers(checkpoint) {
        Covered::Missing => return Verdict::Open("the checkpoint covers entries that are not there".to_owned()),
        Covered::Other => {
            let last = checkpoint.size.saturating_sub(1);
            return Verdict::bad(Some(last), "the signature is over other entries");
        }
        Covered::Yes => {}
    }
    if read.head().size > checkpoint.size && !unfinished {
        return Verdict::bad(Some(checkpoint.size), "nothing signed covers the entries from here on");
    }
    match options.public_key {
        Some(_) => Verdict::Good("signed by the given key".to_owned()),
        None => Verdict::Open("signed by the key that the log itself names; give the key to prove whose it is".to_owned()),
    }
}

fn completeness(read: &Read, own: &Result<Checkpoint, String>, options: &VerifyOptions, key: Option<[u8; 32]>, damaged: bool) -> Verdict {
    let missing = |size: u64| {
        let have = read.head().size;
        let what = if damaged { "are not readable" } else { "are missing" };
        Verdict::bad(Some(have), format!("a checkpoint covers {size} entries, those from {have} on {what}"))
    };
    if let Ok(own) = own
        && read.covers(own) == Covered::Missing
    {
        return missing(own.size);
    }
    let Some(text) = &options.checkpoint else {
        return Verdict::Open("no checkpoint from elsewhere is given; a log cut back with its own would not show".to_owned());
    };
    let Some(key) = key else { return Verdict::bad(None, "no key to check the given checkpoint with") };
    let given = match note::open(text, &key) {
        Ok(given) => given,
        Err(why) => return Verdict::bad(None, format!("the given checkpoint {why}")),
    };
    if own.as_ref().is_ok_and(|own| own.origin != given.origin) {
        return Verdict::bad(None, format!("the given checkpoint is of log `{}`", given.origin));
    }
    match read.covers(&given) {
        Covered::Yes => Verdict::Good(format!("contains the {} entries that the given checkpoint covers", given.size)),
        Covered::Missing => missing(given.size),
        Covered::Other => Verdict::bad(None, format!("the first {} entries are not those that the given checkpoint covers", given.size)),
    }
}

/// Whether a gateway holds the log open now.
fn is_live(dir: &Path) -> bool {
    let Ok(file) = File::open(dir) else { return false };
    matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, nix::errno::Errno::EWOULDBLOCK)))
}

/// Which entries to show; what is not given matches everything.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// The VM, by name.
    pub vm: Option<VmName>,
    /// The peer, exactly as recorded.
    pub peer: Option<String>,
    /// The attempt.
    pub migration: Option<MigrationId>,
    /// What happened.
    pub event: Option<Event>,
    /// Not before this time.
    pub since: Option<jiff::Timestamp>,
}

impl Filter {
    fn matches(&self, entry: &StoredEntry) -> bool {
        self.vm.as_ref().is_none_or(|vm| entry.vm.as_ref() == Some(vm))
            && self.peer.as_ref().is_none_or(|peer| entry.peer.as_ref() == Some(peer))
            && self.migration.is_none_or(|migration| entry.migration == Some(migration))
            && self.event.is_none_or(|event| entry.event == event)
            && self.since.is_none_or(|since| entry.time >= since)
    }
}

/// The entries of the log in `dir` that match, oldest first. Ends at the first line that is wrong, with the error.
///
/// # Errors
///
/// The directory cannot be read.
pub fn read(dir: &Path, filter: Filter) -> Result<Entries, AuditError> {
    Ok(Entries { walk: Some(Walk::new(dir)?), live: is_live(dir), filter, dir: dir.to_owned() })
}

/// Entries of a log, in order.
#[derive(Debug)]
pub struct Entries {
    walk: Option<Walk>,
    live: bool,
    filter: Filter,
    dir: PathBuf,
}

impl Iterator for Entries {
    type Item = Result<StoredEntry, AuditError>;

    fn next(&mut self) -> Option<Self::Item> {
        let walk = self.walk.as_mut()?;
        loop {
            match walk.next() {
                Ok(Some(entry)) if self.filter.matches(&entry) => return Some(Ok(entry)),
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => {
                    // A live log's last line may be in the making.
                    let unfinished = self.live && self.walk.take().is_some_and(|walk| is_behind_checkpoint(&self.dir, walk.head().size));
                    self.walk = None;
                    return (!unfinished).then_some(Err(error));
                }
            }
        }
    }
}

fn is_behind_checkpoint(dir: &Path, size: u64) -> bool {
    let text = read_checkpoint(dir).ok().flatten().filter(|text| text.len() <= limits::AUDIT_CHECKPOINT_BYTES_MAX);
    text.and_then(|text| text.lines().nth(1)?.parse::<u64>().ok()).is_some_and(|signed| size >= signed)
}
