//! How long a thread was ready to run and had no processor.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What the kernel counts of one thread (`Documentation/scheduler/sched-stats.rst`, `schedstat` of a task).
#[derive(Debug)]
pub(super) struct RunDelay {
    file: Option<File>,
    counted: Duration,
}

impl RunDelay {
    /// Of the thread that asks. A kernel that does not count says that there was none.
    pub(super) fn of_this_thread() -> Self {
        let mut delay = Self { file: File::open("/proc/thread-self/schedstat").ok(), counted: Duration::ZERO };
        delay.counted = delay.read().unwrap_or_default();
        delay
    }

    /// Since this was asked last.
    pub(super) fn since_asked(&mut self) -> Duration {
        let Some(now) = self.read() else { return Duration::ZERO };
        now.saturating_sub(std::mem::replace(&mut self.counted, now))
    }

    fn read(&self) -> Option<Duration> {
        let mut text = [0; 64];
        let read = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(text.get(..read)?).ok()?;
        // Nanoseconds on a processor, nanoseconds ready and without one, times it ran.
        text.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_once_is_not_counted_again() {
        let mut delay = RunDelay::of_this_thread();
        if delay.read().is_none() {
            println!("SKIP: this kernel does not count run delays");
            return;
        }
        let first = delay.counted;
        std::thread::yield_now();
        let (more, now) = (delay.since_asked(), delay.counted);
        assert_eq!(first + more, now);
        let none = RunDelay { file: None, counted: Duration::ZERO }.since_asked();
        assert_eq!(none, Duration::ZERO);
    }
}
