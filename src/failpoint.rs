//! Named places at which tests end, stop or fail this process. Without the feature `failpoints` nothing of it is compiled:
//! no name, no variable of the environment, no branch.
//!
//! What is armed is one line, `NAME[@N][=kill|late|stop|error]`: at the N-th time that the place is reached (the first, where
//! nothing else is said) the process sends itself SIGKILL, the same when what goes on beside the place has had its time, or
//! SIGSTOP; or the place fails, where it can. The line is the
//! environment variable `SEALANE_FAILPOINT`, or the contents of the file that `SEALANE_FAILPOINT_FILE` names, which is read
//! at every place and so can be changed while the process runs. Another line counts from 1 again.

/// A place that has a name, which may be put together as with `format!`.
macro_rules! hit {
    ($($name:tt)+) => {
        #[cfg(feature = "failpoints")]
        let _ = $crate::failpoint::reached(::std::format_args!($($name)+));
    };
}

/// A place that can fail with `$error`.
macro_rules! fails {
    ($error:expr, $($name:tt)+) => {
        #[cfg(feature = "failpoints")]
        if $crate::failpoint::reached(::std::format_args!($($name)+)) {
            return Err($error);
        }
    };
}

pub(crate) use {fails, hit};

#[cfg(feature = "failpoints")]
pub use armed::{ALL, reached};

#[cfg(feature = "failpoints")]
mod armed {
    use std::fmt::Arguments;
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    /// Every name, in the order in which a migration comes by.
    pub const ALL: &[&str] = &[
        "source.attached",
        "source.released",
        "destination.offer-judged",
        "destination.twin-launched",
        "destination.accept.before",
        "destination.accept.after",
        "record.offer.begin",
        "journal.offer.before",
        "journal.offer.after",
        "audit.offer.before",
        "audit.offer.after",
        "record.offer.done",
        "source.begin",
        "source.tracking",
        "source.lanes-open",
        "source.round-sent",
        "destination.frame-applied",
        "destination.round-complete",
        "destination.round-confirmed",
        "source.round-applied",
        "source.harvested",
        "source.disks-mirrored",
        "source.paused",
        "source.disks-settled",
        "destination.disks-closed",
        "source.state-saved",
        "source.last-harvest",
        "source.state-sent",
        "source.final-ready",
        "send.FINAL.before",
        "send.FINAL.after",
        "destination.compare",
        "destination.compared",
        "destination.state-restored",
        "destination.policy-asked",
        "record.prepared.begin",
        "journal.prepared.before",
        "journal.prepared.after",
        "audit.prepared.before",
        "audit.prepared.after",
        "record.prepared.done",
        "send.PREPARED.before",
        "send.PREPARED.after",
        "source.policy-asked",
        "record.commit.begin",
        "journal.commit.before",
        "journal.commit.after",
        "audit.commit.before",
        "audit.commit.after",
        "record.commit.done",
        "send.COMMIT.before",
        "send.COMMIT.after",
        "record.run.begin",
        "journal.run.before",
        "journal.run.after",
        "audit.run.before",
        "audit.run.after",
        "record.run.done",
        "destination.resume.before",
        "destination.resume.after",
        "send.RUNNING.before",
        "send.RUNNING.after",
        "record.done.begin",
        "journal.done.before",
        "journal.done.after",
        "audit.done.before",
        "audit.done.after",
        "record.done.done",
        "send.DONE.before",
        "send.DONE.after",
        "source.destroy",
        "record.closed.begin",
        "journal.closed.before",
        "journal.closed.after",
        "audit.closed.before",
        "audit.closed.after",
        "record.closed.done",
        "source.finish",
        "record.abort.begin",
        "journal.abort.before",
        "journal.abort.after",
        "audit.abort.before",
        "audit.abort.after",
        "record.abort.done",
        "source.resume",
        "send.ABORT.before",
        "send.ABORT.after",
        "record.refused.begin",
        "journal.refused.before",
        "journal.refused.after",
        "audit.refused.before",
        "audit.refused.after",
        "record.refused.done",
        "destination.destroy.before",
        "destination.destroy.after",
        "send.REFUSE.before",
        "send.REFUSE.after",
        "record.reclaim.begin",
        "journal.reclaim.before",
        "journal.reclaim.after",
        "audit.reclaim.before",
        "audit.reclaim.after",
        "record.reclaim.done",
        "record.fenced.begin",
        "journal.fenced.before",
        "journal.fenced.after",
        "audit.fenced.before",
        "audit.fenced.after",
        "record.fenced.done",
        "source.link-lost",
        "source.redialled",
        "source.resume-sent",
        "source.resumed-heard",
        "source.lanes-reopened",
        "source.goes-on",
        "source.continues",
        "destination.link-lost",
        "destination.session-adopted",
        "destination.resumed-sent",
        "recovery.begin",
        "recovery.settle",
        "recovery.settled",
        "recovery.effect.before",
        "recovery.effect.after",
        "recovery.repeat.before",
        "recovery.repeat.after",
        "recovery.rebuilt-launched",
        "recovery.asks",
        "recovery.answers",
        "recovery.sweep",
        "recovery.end",
    ];

    /// The line that was armed when any place was last reached, and how often its own was reached since.
    static SEEN: Mutex<(String, u64)> = Mutex::new((String::new(), 0));

    /// How long a write to disk takes at most, nearly always.
    const LATE: Duration = Duration::from_millis(150);

    /// Does what is armed for a place; true when it has to fail.
    pub fn reached(name: Arguments<'_>) -> bool {
        let name = name.to_string();
        if !ALL.contains(&name.as_str()) {
            tracing::error!(name, "this failpoint is not in the list");
        }
        tracing::debug!(name, "failpoint");
        let line = line();
        let (place, action) = line.split_once('=').unwrap_or((&line, "kill"));
        let (place, nth) = place.split_once('@').unwrap_or((place, "1"));
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.0 != line {
            *seen = (line.clone(), 0);
        }
        if place != name {
            return false;
        }
        seen.1 += 1;
        let due = nth.parse() == Ok(seen.1);
        drop(seen);
        due && act(action)
    }

    fn act(action: &str) -> bool {
        tracing::error!(action, "failpoint reached");
        let signal = match action {
            "error" => return true,
            "stop" => Signal::STOP,
            _ => Signal::KILL,
        };
        if action == "late" {
            std::thread::sleep(LATE);
        }
        if let Err(error) = kill_process(getpid(), signal) {
            tracing::error!(%error, "failpoint without effect");
        }
        // The signal may reach another thread first, and this one would go on until it is told. And whoever stood still sees
        // first what has happened meanwhile.
        (0..2).for_each(|_| std::thread::sleep(LATE));
        if signal == Signal::KILL { std::process::abort() } else { false }
    }

    fn line() -> String {
        let of_file = || std::fs::read_to_string(std::env::var_os("SEALANE_FAILPOINT_FILE")?).ok();
        of_file().or_else(|| std::env::var("SEALANE_FAILPOINT").ok()).unwrap_or_default().trim().to_owned()
    }
}
