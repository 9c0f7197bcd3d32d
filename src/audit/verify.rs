//! Offline: is this log what was written, by whom, and is it all of it, and have others seen it?

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::audit::entry::{Event, hex};
use crate::audit::error::AuditError;
use crate::audit::files::Files;
use crate::audit::keys::{Keys, named_key, open_own};
use crate::audit::note::{self, Checkpoint};
use crate::audit::open::read_checkpoint;
use crate::audit::prune::pruned_by;
use crate::audit::signatures::Signatures;
use crate::audit::tree::Head;
use crate::audit::walk::{Commit, Line, Walk};
use crate::audit::witness::Witnesses;

/// What is known from elsewhere about the log to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// The key that must have signed it. Without it, the key that the log itself names is used.
    pub public_key: Option<[u8; 32]>,
    /// A checkpoint of this log that somebody else kept; the log must still contain what it covers.
    pub checkpoint: Option<String>,
    /// Keys of peers that must have cosigned this log.
    pub witness_keys: Vec<[u8; 32]>,
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
    /// The first entry that is kept; those before it were given up.
    pub first: u64,
    /// Entries that are whole, in order and under a checkpoint, those that were given up included.
    pub entries: u64,
    /// The hash that stands for them, in hexadecimal.
    pub root: String,
    /// Whether every entry is as written, in its place, and what the tree and its files say.
    pub content: Verdict,
    /// Whether the expected key signed every commit, and exactly this.
    pub signer: Verdict,
    /// Whether anything is missing at the end.
    pub completeness: Verdict,
    /// Whether peers have seen it, and what it keeps of theirs.
    pub witnesses: Verdict,
}

impl VerifyReport {
    /// Whether no answer is no.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        ![&self.content, &self.signer, &self.completeness, &self.witnesses].into_iter().any(Verdict::is_bad)
    }
}

/// Verifies the log in `dir` from its files alone. A gateway may be writing it meanwhile.
#[must_use]
pub fn verify(dir: &Path, options: &VerifyOptions) -> VerifyReport {
    let live = is_live(dir);
    // First the checkpoint: a live log only grows beyond it.
    let own = read_checkpoint(dir);
    let nothing = matches!(own, Ok(None));
    let own = own.map_err(|error| error.in_full()).and_then(|text| text.ok_or_else(|| "there is no checkpoint".to_owned()));
    let mut walk = match Walk::new(dir) {
        Ok(walk) if nothing && !walk.has_segments() => {
            let source = io::Error::new(io::ErrorKind::NotFound, "neither entries nor a checkpoint are there");
            return unreadable(&AuditError::io("find an audit log in", dir, source), own);
        }
        Ok(walk) => walk,
        Err(error) => return unreadable(&error, own),
    };
    let size_of = |text: &str| note::read(text).ok().map(|checkpoint| checkpoint.size);
    for size in own.iter().map(String::as_str).chain(options.checkpoint.as_deref()).filter_map(size_of) {
        walk.want(size);
    }
    // A log that does not begin with the given key may have been handed over to it.
    let mut read = Read { signatures: Signatures::of(named_key(dir).or(options.public_key)), ..Read::default() };
    let damage = read.run(dir, &mut walk, live);
    read.signatures.check();
    if let Some(key) = options.public_key {
        read.believe_only(&key);
    }
    let keys = read.signatures.keys.clone();
    // Behind a live log's checkpoint stands at most a commit that is being made.
    let own = own.and_then(|text| open_own(&text, &keys).map_err(|why| of_the_file(&why)));
    let published = own.as_ref().map_or(0, |own| own.size);
    let unfinished = live && walk.signed() >= published;
    let content = match damage {
        Some(error) if !(unfinished && is_torn(&error)) => {
            let entry = if let AuditError::Damaged { index, .. } = &error { *index } else { walk.signed() };
            Verdict::bad(Some(entry), error.in_full())
        }
        _ => read.content(&walk),
    };
    let head = read.head.as_ref().map_or_else(|| Head { size: walk.signed(), ..Head::EMPTY }, Checkpoint::head);
    VerifyReport {
        origin: own.as_ref().ok().or(read.head.as_ref()).map(|checkpoint| checkpoint.origin.clone()),
        first: walk.first(),
        entries: head.size,
        root: hex(&head.root),
        signer: read.signer(&walk, &own, options, unfinished),
        completeness: completeness(&walk, &own, options, &keys, &read.beyond, content.is_bad()),
        witnesses: read.witnesses.verdict(dir, &mut walk, &keys, &options.witness_keys),
        content,
    }
}

fn unreadable(error: &AuditError, own: Result<String, String>) -> VerifyReport {
    let why = error.in_full();
    let open = || Verdict::Open("the log cannot be read".to_owned());
    let origin = own.ok().and_then(|text| note::read(&text).ok()).map(|checkpoint| checkpoint.origin);
    let root = hex(&Head::EMPTY.root);
    VerifyReport {
        origin,
        first: 0,
        entries: 0,
        root,
        content: Verdict::bad(Some(0), why),
        signer: open(),
        completeness: open(),
        witnesses: open(),
    }
}

/// Whether the log may just not be written to its end yet.
pub(super) fn is_torn(error: &AuditError) -> bool {
    matches!(error, AuditError::Damaged { why, .. } if why == "the line has no end")
}

#[derive(Default)]
struct Read {
    /// The last checkpoint in the log.
    head: Option<Checkpoint>,
    /// The origin that the log gives itself, and where.
    origin: Option<(String, u64)>,
    signatures: Signatures,
    /// The first commit: its first entry and its checkpoint.
    begin: Option<(u64, Checkpoint)>,
    /// Up to where entries were given up, as far as the log says.
    pruned: u64,
    tiles: u64,
    beyond: Option<PathBuf>,
    witnesses: Witnesses,
}

impl Read {
    /// Reads to the end, or to the first thing that is wrong.
    fn run(&mut self, dir: &Path, walk: &mut Walk, live: bool) -> Option<AuditError> {
        let mut files = match Files::list(dir, live) {
            Ok(files) => files,
            Err(error) => return Some(error),
        };
        loop {
            match walk.next() {
                Ok(Some(commit)) => self.take_in(commit),
                Ok(None) => break,
                Err(error) => return Some(error),
            }
            if let Err(error) = files.check_full(walk.tree().take_full()) {
                return Some(error);
            }
        }
        if walk.first() > self.pruned {
            let why = format!("entries 0 to {} are missing, and no entry says that they were given up", walk.first() - 1);
            return Some(AuditError::damaged(dir, 0, why));
        }
        let checked = files.check_rest(walk);
        self.tiles = files.good;
        self.beyond = files.beyond;
        checked.err()
    }

    fn take_in(&mut self, commit: Commit) {
        let first = commit.lines.first().map_or(0, |line| line.entry.index);
        self.signatures.take_in(first, &commit);
        self.begin.get_or_insert_with(|| (first, commit.checkpoint.clone()));
        for Line { entry, .. } in commit.lines {
            let origin = || entry.detail.get("origin").and_then(|origin| origin.as_str()).map(str::to_owned);
            if matches!(entry.event, Event::LogCreated | Event::Pruned) && self.origin.is_none() {
                self.origin = origin().map(|origin| (origin, entry.index));
            }
            self.pruned = self.pruned.max(pruned_by(&entry).unwrap_or(0));
            self.witnesses.take_in(entry);
        }
        self.head = Some(commit.checkpoint);
    }

    /// Only a log that this key has signed is believed; if it has not, what it says of itself is not good either.
    fn believe_only(&mut self, key: &[u8; 32]) {
        if self.signatures.keys.has_signed(key) {
            return;
        }
        if let (Some((first, checkpoint)), None) = (&self.begin, &self.signatures.wrong)
            && let Err(why) = note::open_bare(&checkpoint.text, key)
        {
            self.signatures.wrong = Some((*first, format!("the checkpoint of {} entries in the log {why}", checkpoint.size)));
        }
        self.signatures.keys = Keys::from(Some(*key));
    }

    fn content(&self, walk: &Walk) -> Verdict {
        let entries = walk.signed().saturating_sub(walk.first());
        let pruned = match walk.first() {
            0 => String::new(),
            first => format!("; those before {first} were given up, their hashes are there"),
        };
        Verdict::Good(format!("{entries} entries are those of the tree, and {} files of tiles{pruned}", self.tiles))
    }

    fn signer(&self, walk: &Walk, own: &Result<Checkpoint, String>, options: &VerifyOptions, unfinished: bool) -> Verdict {
        if self.signatures.keys.current().is_none() {
            return Verdict::bad(None, "no key is given, and the log names none");
        }
        if let Some((entry, why)) = &self.signatures.wrong {
            return Verdict::bad(Some(*entry), why.as_str());
        }
        let own = match own {
            Ok(own) => own,
            Err(why) => return Verdict::bad(None, why.as_str()),
        };
        for checkpoint in [Some(own), self.head.as_ref()].into_iter().flatten() {
            match &self.origin {
                Some((origin, entry)) if *origin != checkpoint.origin => {
                    let why = format!("the checkpoint is of log `{}`, entry {entry} names `{origin}`", checkpoint.origin);
                    return Verdict::bad(Some(*entry), why);
                }
                _ => {}
            }
        }
        let signed = walk.signed();
        if own.size <= signed && walk.root_at(own.size) != Some(own.root) {
            return Verdict::bad(own.size.checked_sub(1), "the signature of the file `checkpoint` is over other entries");
        }
        if !unfinished && own.size < signed {
            let why = format!("the file `checkpoint` is of {} entries, the log has a checkpoint of {signed}: it is an older one", own.size);
            return Verdict::bad(Some(own.size), format!("{why} (a crash leaves that, until the gateway opens the log again)"));
        }
        if !unfinished && !walk.open_lines().is_empty() {
            return Verdict::bad(Some(signed), "nothing signed covers the entries from here on");
        }
        match (options.public_key, self.signatures.keys.count()) {
            (Some(_), 2..) => {
                let keys = self.signatures.keys.count();
                Verdict::Good(format!("signed by {keys} keys, each of which named the next one, and the given key is one of them"))
            }
            (Some(_), _) => Verdict::Good("every commit is signed by the given key".to_owned()),
            (None, _) => Verdict::Open("signed by the key that the log itself names; give the key to prove whose it is".to_owned()),
        }
    }
}

fn of_the_file(why: &str) -> String {
    if why.starts_with("no key") { why.to_owned() } else { format!("the file `checkpoint` {why}") }
}

fn completeness(
    walk: &Walk,
    own: &Result<Checkpoint, String>,
    options: &VerifyOptions,
    keys: &Keys,
    beyond: &Option<PathBuf>,
    damaged: bool,
) -> Verdict {
    let have = walk.signed();
    let missing = |size: u64| {
        let what = if damaged { "are not readable" } else { "are missing" };
        Verdict::bad(Some(have), format!("a checkpoint covers {size} entries, those from {have} on {what}"))
    };
    if let Ok(own) = own
        && own.size > have
    {
        return missing(own.size);
    }
    if let Some(path) = beyond {
        return Verdict::bad(Some(have), format!("`{}` is of entries that the log of {have} does not have", path.display()));
    }
    let Some(text) = &options.checkpoint else {
        return Verdict::Open("no checkpoint from elsewhere is given; a log cut back with its own would not show".to_owned());
    };
    if keys.current().is_none() {
        return Verdict::bad(None, "no key to check the given checkpoint with");
    }
    let given = match keys.open(text, note::open) {
        Ok(given) => given,
        Err(why) => return Verdict::bad(None, format!("the given checkpoint {why}")),
    };
    if let Some(own) = own.as_ref().ok().filter(|own| own.origin != given.origin) {
        return Verdict::bad(None, format!("the given checkpoint is of log `{}`, this is `{}`", given.origin, own.origin));
    }
    if given.size > have {
        return missing(given.size);
    }
    if walk.root_at(given.size) == Some(given.root) {
        Verdict::Good(format!("contains the {} entries that the given checkpoint covers", given.size))
    } else {
        Verdict::bad(None, format!("the first {} entries are not those that the given checkpoint covers", given.size))
    }
}

/// Whether a gateway holds the log open now.
pub(super) fn is_live(dir: &Path) -> bool {
    let Ok(file) = File::open(dir) else { return false };
    matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, nix::errno::Errno::EWOULDBLOCK)))
}
