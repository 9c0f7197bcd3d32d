//! The signatures of a log that is verified: each of them, many at a time, on all processors.
//!
//! A signature takes longer than all else about an entry, and a log that was written without hurry has one for each. They do not depend on
//! each other, so they are collected and checked together. Which of those that are wrong is the first does not depend on that.

use std::thread;

use crate::audit::keys::Keys;
use crate::audit::note;
use crate::audit::walk::Commit;

/// Checkpoints that are checked at once: some 40 ms of work on one processor, and some 500 KiB.
const BATCH: usize = 1024;
/// As few as this are not worth another thread.
const SHARE_MIN: usize = 64;

#[derive(Default)]
pub(super) struct Signatures {
    /// The keys that must have signed, one after the other.
    pub(super) keys: Keys,
    /// The first checkpoint that is not signed as it must be: its first entry, and why.
    pub(super) wrong: Option<(u64, String)>,
    /// The log that the first checkpoint is of.
    origin: Option<String>,
    waiting: Vec<Waiting>,
}

struct Waiting {
    /// The first entry that it covers and none before does.
    first: u64,
    size: u64,
    text: String,
    key: [u8; 32],
}

impl Signatures {
    pub(super) fn of(first: Option<[u8; 32]>) -> Self {
        Self { keys: Keys::from(first), ..Self::default() }
    }

    /// A commit: the checkpoint behind the entries from `first`. INVARIANT(key-chain): what an entry says of keys counts if the key before
    /// signed it, which is checked later, but before anything is said of the log.
    pub(super) fn take_in(&mut self, first: u64, commit: &Commit) {
        // What stands behind a wrong one says nothing more.
        let Some(key) = self.keys.current().filter(|_| self.wrong.is_none()) else { return };
        let checkpoint = &commit.checkpoint;
        self.waiting.push(Waiting { first, size: checkpoint.size, text: checkpoint.text.clone(), key });
        self.origin.get_or_insert_with(|| checkpoint.origin.clone());
        self.keys.pass(&commit.lines);
        if self.waiting.len() >= BATCH {
            self.check();
        }
    }

    /// Checks those that were taken in so far.
    pub(super) fn check(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let share = waiting.len().div_ceil(processors).max(SHARE_MIN);
        let mut shares = waiting.chunks(share);
        let own = shares.next().unwrap_or_default();
        let origin = self.origin.as_deref().unwrap_or_default();
        let wrong = thread::scope(|scope| {
            let others: Vec<_> = shares.map(|share| (share, scope.spawn(move || first_wrong(origin, share)))).collect();
            let mut wrong = first_wrong(origin, own);
            for (share, other) in others {
                // A thread that could not do its share leaves it to this one.
                let theirs = other.join().unwrap_or_else(|_| first_wrong(origin, share));
                wrong = wrong.or(theirs);
            }
            wrong
        });
        self.wrong = self.wrong.take().or(wrong);
    }
}

fn first_wrong(origin: &str, share: &[Waiting]) -> Option<(u64, String)> {
    share.iter().find_map(|waiting| {
        let why = match note::open_bare(&waiting.text, &waiting.key) {
            Ok(checkpoint) if checkpoint.origin == origin => return None,
            Ok(checkpoint) => format!("is of log `{}`, those before are of `{origin}`", checkpoint.origin),
            Err(why) => why,
        };
        Some((waiting.first, format!("the checkpoint of {} entries in the log {why}", waiting.size)))
    })
}
