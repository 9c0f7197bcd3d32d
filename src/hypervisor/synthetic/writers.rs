//! The threads of a synthetic guest, its gate and its dirty bitmap.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pattern::{Course, mix, untouched, written};
use crate::memory::{GuestRam, PageSet};
use crate::types::{PAGE_BYTES, PageNumber};

/// Between two heartbeats.
const BEAT_EVERY: Duration = Duration::from_millis(10);
/// A writer that was held up does not catch up with more than this at once.
const BURST: Duration = Duration::from_millis(20);

/// One bit a page. `INVARIANT(no-write-missed)`: a writer marks *after* it wrote, so a harvest that
/// takes the mark is followed by a read that sees the write.
#[derive(Debug)]
pub(super) struct DirtyBitmap {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl DirtyBitmap {
    fn new(pages: u64) -> Self {
        Self { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), pages }
    }
    fn mark(&self, page: u64) {
        if let Some(word) = usize::try_from(page / 64).ok().and_then(|index| self.words.get(index)) {
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }
    fn take(&self) -> PageSet {
        let words: Vec<u64> = self.words.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect();
        PageSet::from_words(self.pages, &words)
    }
}

/// Who may write now. Writers look at it before every page.
#[derive(Debug, Default)]
struct Gate {
    paused: bool,
    ended: bool,
    parked: u32,
    running: u32,
}

/// What makes a synthetic guest go on exactly where it stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) visits: Vec<u64>,
    pub(super) beats: u64,
}

#[derive(Debug)]
struct Shared {
    ram: Arc<GuestRam>,
    seed: u64,
    courses: Vec<Course>,
    pages_per_second: u64,
    dirty: DirtyBitmap,
    gate: Mutex<Gate>,
    turn: Condvar,
    visits: Vec<AtomicU64>,
    beats: AtomicU64,
    throttle_percent: AtomicU64,
    corrupt: AtomicBool,
}

/// Running writers over a guest's RAM.
#[derive(Debug)]
pub(super) struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// How a guest is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) writers: u32,
    pub(super) working_set_pages: u64,
    pub(super) pages_per_second: u64,
}

/// Fills RAM with what it holds before the first write.
pub(super) fn fill(ram: &GuestRam, seed: u64) -> Result<(), crate::memory::RamError> {
    let mut page = [0; PAGE_BYTES];
    for number in 0..ram.pages() {
        untouched(seed, number, &mut page);
        ram.write(PageNumber(number), &page)?;
    }
    Ok(())
}

impl Writers {
    /// Starts threads that wait at the gate.
    pub(super) fn start_paused(ram: Arc<GuestRam>, plan: Plan, progress: &Progress) -> std::io::Result<Self> {
        let courses = (0..plan.writers).map(|writer| Course::new(plan.seed, writer, plan.writers, plan.working_set_pages)).collect();
        let shared = Arc::new(Shared {
            dirty: DirtyBitmap::new(ram.pages()),
            ram,
            seed: plan.seed,
            courses,
            pages_per_second: plan.pages_per_second / u64::from(plan.writers.max(1)),
            gate: Mutex::new(Gate { paused: true, ..Gate::default() }),
            turn: Condvar::new(),
            visits: progress.visits.iter().copied().map(AtomicU64::new).collect(),
            beats: AtomicU64::new(progress.beats),
            throttle_percent: AtomicU64::new(0),
            corrupt: AtomicBool::new(false),
        });
        let mut writers = Self { shared, threads: Vec::new() };
        for index in 0..writers.shared.courses.len() {
            let shared = Arc::clone(&writers.shared);
            shared.lock().running += 1;
            let spawned = std::thread::Builder::new().name(format!("writer-{index}")).spawn({
                let shared = Arc::clone(&shared);
                move || shared.write_until_ended(index)
            });
            match spawned {
                Ok(thread) => writers.threads.push(thread),
                Err(error) => {
                    shared.lock().running -= 1;
                    return Err(error);
                }
            }
        }
        Ok(writers)
    }

    /// Returns when no writer is inside a page.
    pub(super) fn pause(&self) {
        let mut gate = self.shared.lock();
        gate.paused = true;
        self.shared.turn.notify_all();
        while gate.parked < gate.running {
            gate = self.shared.turn.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.turn.notify_all();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.shared.lock().paused
    }

    pub(super) fn throttle(&self, percent: u8) {
        self.shared.throttle_percent.store(u64::from(percent.min(99)), Ordering::Relaxed);
    }

    pub(super) fn harvest(&self) -> PageSet {
        self.shared.dirty.take()
    }

    /// Exact only while paused.
    pub(super) fn progress(&self) -> Progress {
        let visits = self.shared.visits.iter().map(|visits| visits.load(Ordering::SeqCst)).collect();
        Progress { visits, beats: self.shared.beats.load(Ordering::SeqCst) }
    }

    pub(super) fn is_corrupt(&self) -> bool {
        self.shared.corrupt.load(Ordering::SeqCst)
    }

    /// Pages that do not hold what the guest last wrote. Only while paused.
    pub(super) fn wrong_pages(&self) -> Result<u64, crate::memory::RamError> {
        self.shared.wrong_pages()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.turn.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a synthetic writer panicked");
            }
        }
    }
}

/// A writer that ends, even by a panic, is waited for no longer.
struct Retire<'a>(&'a Shared);

impl Drop for Retire<'_> {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
        self.0.turn.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `due` and until the gate is open; false when the guest is over. Never inside a page.
    fn pass_gate(&self, due: Instant) -> bool {
        let mut gate = self.lock();
        loop {
            if gate.ended {
                return false;
            }
            if gate.paused {
                gate.parked += 1;
                self.turn.notify_all();
                while gate.paused && !gate.ended {
                    gate = self.turn.wait(gate).unwrap_or_else(PoisonError::into_inner);
                }
                gate.parked -= 1;
                continue;
            }
            let now = Instant::now();
            if now >= due {
                return true;
            }
            gate = self.turn.wait_timeout(gate, due - now).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn write_until_ended(&self, index: usize) {
        let _retire = Retire(self);
        let (Some(course), Some(visits)) = (self.courses.get(index), self.visits.get(index)) else { return };
        let mut due = Instant::now();
        let mut beat_due = due;
        let writes = self.pages_per_second > 0 && course.pages() > 0;
        while self.pass_gate(if index == 0 { due.min(beat_due) } else { due }) {
            let now = Instant::now();
            if index == 0 && now >= beat_due {
                self.beats.fetch_add(1, Ordering::SeqCst);
                beat_due = now + BEAT_EVERY;
            }
            if now < due {
                continue;
            }
            if writes && !self.visit(course, visits) {
                self.corrupt.store(true, Ordering::SeqCst);
                self.lock().ended = true;
                self.turn.notify_all();
                return;
            }
            due = due.max(now.checked_sub(BURST).unwrap_or(now)) + self.interval();
        }
    }

    fn interval(&self) -> Duration {
        let share = 100 - self.throttle_percent.load(Ordering::Relaxed).min(99);
        let rate = self.pages_per_second.saturating_mul(share) / 100;
        1_000_000_000u64.checked_div(rate).map_or(BEAT_EVERY, Duration::from_nanos)
    }

    /// Checks the next page, writes it, marks it; false when it does not hold what was written last.
    fn visit(&self, course: &Course, visits: &AtomicU64) -> bool {
        let visit = visits.load(Ordering::SeqCst);
        let number = course.page(visit);
        let (mut expected, mut found) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        match course.before(visit) {
            Some(before) => written(self.seed, number, before, &mut expected),
            None => untouched(self.seed, number, &mut expected),
        }
        if self.ram.read(PageNumber(number), &mut found).is_err() || found != expected {
            return false;
        }
        written(self.seed, number, visit, &mut expected);
        if self.ram.write(PageNumber(number), &expected).is_err() {
            return false;
        }
        self.dirty.mark(number);
        visits.store(visit + 1, Ordering::SeqCst);
        true
    }

    fn wrong_pages(&self) -> Result<u64, crate::memory::RamError> {
        let mut last = vec![None; usize::try_from(self.ram.pages()).unwrap_or(0)];
        for (course, visits) in self.courses.iter().zip(&self.visits) {
            let visits = visits.load(Ordering::SeqCst);
            for visit in visits.saturating_sub(course.pages())..visits {
                if let Some(last) = usize::try_from(course.page(visit)).ok().and_then(|number| last.get_mut(number)) {
                    *last = Some(visit);
                }
            }
        }
        let (mut expected, mut found) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let mut wrong = 0;
        for (number, last) in (0u64..).zip(last) {
            match last {
                Some(visit) => written(self.seed, number, visit, &mut expected),
                None => untouched(self.seed, number, &mut expected),
            }
            self.ram.read(PageNumber(number), &mut found)?;
            wrong += u64::from(found != expected);
        }
        Ok(wrong)
    }
}

/// A UUID that belongs to a seed.
pub(super) fn uuid_of(seed: u64) -> [u8; 16] {
    (u128::from(mix(seed)) << 64 | u128::from(mix(seed ^ 1))).to_be_bytes()
}
