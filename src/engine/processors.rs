//! Whether processors are short: how long a thread was ready to run and had none, and how busy those of the host are.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

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

/// How busy the processors of the host were lately (`/proc/uptime`).
#[derive(Debug)]
pub(super) struct Busy {
    file: Option<File>,
    processors: f64,
    looked: Instant,
    /// Seconds that they were idle until then, all of them together.
    idle: f64,
    part: f64,
}

impl Default for Busy {
    fn default() -> Self {
        let file = File::open("/proc/uptime").ok();
        let processors = std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64);
        let mut busy = Self { file, processors, looked: Instant::now(), idle: 0.0, part: 0.0 };
        busy.idle = busy.read().unwrap_or_default();
        busy
    }
}

impl Busy {
    /// Which part of them, 0 where nobody knows.
    pub(super) fn lately(&mut self) -> f64 {
        let elapsed = self.looked.elapsed();
        if elapsed < LOOK_EVERY {
            return self.part;
        }
        if let Some(idle) = self.read() {
            self.looked += elapsed;
            let idle = idle - std::mem::replace(&mut self.idle, idle);
            self.part = (1.0 - idle / (elapsed.as_secs_f64() * self.processors)).clamp(0.0, 1.0);
        }
        self.part
    }

    fn read(&self) -> Option<f64> {
        let mut text = [0; 64];
        let read = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        // Seconds since the host was started, and seconds that processors were idle.
        std::str::from_utf8(text.get(..read)?).ok()?.split_whitespace().nth(1)?.parse().ok()
    }
}

/// WHY: the kernel tells hundredths of a second.
const LOOK_EVERY: Duration = Duration::from_millis(200);

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

    #[test]
    fn processors_are_as_busy_as_they_were_not_idle() {
        let mut busy = Busy::default();
        assert_eq!(busy.lately(), 0.0, "too early to say");
        let (idle, since) = (busy.idle, Duration::from_secs(1000));
        busy.looked = Instant::now().checked_sub(since).unwrap();
        // A quarter of the time, all of them.
        busy.idle = idle - 250.0 * busy.processors;
        let part = busy.lately();
        assert!((0.74..0.76).contains(&part), "{part}");
        busy.looked = Instant::now().checked_sub(since).unwrap();
        busy.file = None;
        assert_eq!(busy.lately(), part, "nobody says anything else");
    }
}
