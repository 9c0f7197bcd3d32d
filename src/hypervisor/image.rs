//! A file, or generated content, as the RAM of a stopped VM, for benchmarks.
//!
//! *Owns:* reading an image into memory, and an empty memory that receives one. *Never:* writing to the image.
//! *Invariants:* the image is copied before the first page is read, so a file that is cut meanwhile is an error
//! and not a fault, and the disk is not measured; a source is paused from the start and only `redirty` and `write_at` dirty
//! it; every opening of an image is another generation.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::hypervisor::synthetic::{Content, generate};
use crate::hypervisor::{Generation, Guest, GuestStatus, HypervisorError, Machine, PagedDestination, PagedSource, RunState, wake_paged};
use crate::memory::{GuestRam, MemoryLayout, PageSet, RamError};
use crate::types::{PAGE_BYTES, PageNumber, VmUuid};

/// The `kind` of a memory image.
pub const IMAGE_KIND: &str = "image";
/// Device state of something that has no devices; its generation follows.
const STATE: &[u8] = b"memory image, no devices, version 2";
/// Pages copied at once.
const PIECE_PAGES: u64 = 256;
/// Where a re-dirtied page changes, and how much.
const CHANGED_BYTES: std::ops::Range<usize> = 1024..1088;
/// Between two pages that a writer changes: a prime.
const STRIDE: u128 = 1_000_003;

/// The RAM of a stopped VM, read from a file.
#[derive(Debug)]
pub struct ImageSource {
    name: String,
    machine: Machine,
    ram: Arc<GuestRam>,
    tracking: bool,
    dirty: PageSet,
    rounds: VecDeque<PageSet>,
    writer: Option<Writer>,
    state: RunState,
    generation: Generation,
}

/// A guest that goes on writing. What it has written meanwhile is written when somebody asks for it.
#[derive(Debug, Clone, Copy)]
struct Writer {
    pages_per_second: u64,
    working_set_pages: u64,
    /// Since when it writes; before that nobody watches.
    since: Option<Instant>,
    /// Pages written so far.
    written: u64,
}

impl Writer {
    /// How many pages more it has written until now.
    fn more(&mut self) -> u64 {
        let Some(since) = self.since else { return 0 };
        // Microseconds at a rate below 2^34 pages a second fit for 15 minutes; beyond that it writes no more.
        let due = (since.elapsed().as_micros() * u128::from(self.pages_per_second)) / 1_000_000;
        u64::try_from(due).unwrap_or(u64::MAX).saturating_sub(self.written)
    }
}

impl ImageSource {
    /// Reads the image at `path`; `name` is for messages.
    ///
    /// # Errors
    /// The file cannot be read, is empty, or is not a whole number of pages.
    pub fn open(path: &Path, name: &str, uuid: VmUuid) -> Result<Self, HypervisorError> {
        let local = |source| HypervisorError::Local { vm: name.to_owned(), what: "cannot read the memory image", source };
        let mut file = File::open(path).map_err(local)?;
        let bytes = file.metadata().map_err(local)?.len();
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) {
            let reason = format!("it has {bytes} bytes: expected a multiple of {PAGE_BYTES}");
            return Err(local(io::Error::new(io::ErrorKind::InvalidData, reason)));
        }
        let ram = memory(bytes / PAGE_BYTES as u64, name)?;
        for (first, mut piece) in pieces(ram.pages()) {
            file.read_exact(&mut piece).map_err(local)?;
            // Zero pages stay untouched, as in a guest that never used them.
            if piece.iter().any(|byte| *byte != 0) {
                ram.write(first, &piece).map_err(|source| HypervisorError::Ram { vm: name.to_owned(), source })?;
            }
        }
        Self::new(Arc::new(ram), name, uuid)
    }

    /// Generates RAM of `pages` pages instead of reading it.
    ///
    /// # Errors
    /// There is no memory for it, or `pages` is 0.
    pub fn generated(content: Content, pages: u64, seed: u64, name: &str, uuid: VmUuid) -> Result<Self, HypervisorError> {
        let ram = memory(pages, name)?;
        generate(content, pages, seed, |first, bytes| ram.write(first, bytes))
            .map_err(|source| HypervisorError::Ram { vm: name.to_owned(), source })?;
        Self::new(Arc::new(ram), name, uuid)
    }

    fn new(ram: Arc<GuestRam>, name: &str, uuid: VmUuid) -> Result<Self, HypervisorError> {
        let regions = ram.layout().regions().to_vec();
        let (profile, disks) = (serde_json::Value::Null, Vec::new());
        let machine = Machine {
            kind: IMAGE_KIND.to_owned(),
            uuid,
            regions,
            vcpus: 0,
            profile,
            disks,
            disks_only: false,
            mode: crate::types::Mode::Precopy,
        };
        let dirty = PageSet::empty(ram.pages());
        let (rounds, writer, state) = (VecDeque::new(), None, RunState::Paused);
        let generation = Generation::first().map_err(no_random(name))?;
        Ok(Self { name: name.to_owned(), machine, ram, tracking: false, dirty, rounds, writer, state, generation })
    }

    /// The same RAM as a VM that nobody has moved yet, so that an image is read once and moved often. Never both at once.
    ///
    /// # Errors
    /// There is no generation id for it.
    pub fn again(&self) -> Result<Self, HypervisorError> {
        Self::new(Arc::clone(&self.ram), &self.name, self.machine.uuid)
    }

    /// From the moment that dirty pages are tracked until the pause, the guest changes so many pages a second a little, all over
    /// the first `working_set_pages` pages, over and over.
    pub fn write_at(&mut self, pages_per_second: u64, working_set_pages: u64) {
        let working_set_pages = working_set_pages.clamp(1, self.ram.pages());
        self.writer = Some(Writer { pages_per_second, working_set_pages, since: None, written: 0 });
        self.state = RunState::Running;
    }

    /// What each harvest finds dirty, in turn; the pages are changed a little when they are. Afterwards none is.
    pub fn redirty(&mut self, rounds: impl IntoIterator<Item = PageSet>) {
        self.rounds.extend(rounds);
    }

    /// Writes what the guest has written meanwhile.
    fn write_on(&mut self) -> Result<(), RamError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let more = writer.more();
        let from = writer.written;
        writer.written += more;
        let mut pages = PageSet::empty(self.ram.pages());
        for visit in 0..more.min(writer.working_set_pages) {
            // A stride that shares no factor with most sizes: neighbours in time are not neighbours in memory.
            let step = (u128::from(from) + u128::from(visit)) * STRIDE % u128::from(writer.working_set_pages);
            pages.insert(PageNumber(u64::try_from(step).unwrap_or(0)));
        }
        self.change(&pages)?;
        self.dirty.merge(&pages);
        Ok(())
    }

    fn change(&self, pages: &PageSet) -> Result<(), RamError> {
        let mut page = [0; PAGE_BYTES];
        for number in pages.iter() {
            self.ram.read(number, &mut page)?;
            for byte in page.get_mut(CHANGED_BYTES).unwrap_or_default() {
                *byte = byte.wrapping_mul(5).wrapping_add(1);
            }
            self.ram.write(number, &page)?;
        }
        Ok(())
    }
}

fn memory(pages: u64, name: &str) -> Result<GuestRam, HypervisorError> {
    let layout = MemoryLayout::flat(pages).map_err(|error| HypervisorError::Local {
        vm: name.to_owned(),
        what: "no such memory",
        source: io::Error::new(io::ErrorKind::InvalidInput, error.to_string()),
    })?;
    GuestRam::anonymous(layout).map_err(|source| HypervisorError::Ram { vm: name.to_owned(), source })
}

/// Buffers of the length of each piece of RAM, with its first page.
fn pieces(pages: u64) -> impl Iterator<Item = (PageNumber, Vec<u8>)> {
    (0..pages.div_ceil(PIECE_PAGES)).map(move |index| {
        let first = index * PIECE_PAGES;
        let count = usize::try_from((pages - first).min(PIECE_PAGES)).unwrap_or(0);
        (PageNumber(first), vec![0; count * PAGE_BYTES])
    })
}

fn status_of(state: RunState, generation: Option<Generation>) -> GuestStatus {
    GuestStatus { state, exit_code: None, last_line: None, generation }
}

fn state_of(generation: Generation) -> Vec<u8> {
    [STATE, &generation.to_bytes()].concat()
}

fn no_random(vm: &str) -> impl FnOnce(io::Error) -> HypervisorError {
    let vm = vm.to_owned();
    move |source| HypervisorError::Local { vm, what: "no generation id", source }
}

fn refused(vm: &str, request: &'static str, reason: &str) -> HypervisorError {
    HypervisorError::Refused { vm: vm.to_owned(), request, reason: reason.to_owned() }
}

impl Guest for ImageSource {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        wake_paged(self)
    }
    fn can_renew(&self) -> bool {
        true
    }
    fn renew(&mut self) -> Result<(), HypervisorError> {
        if self.state != RunState::Paused {
            return Err(refused(&self.name, "renew", "the guest is not paused"));
        }
        self.generation = self.generation.renewed().map_err(no_random(&self.name))?;
        Ok(())
    }
    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        Ok(status_of(self.state, Some(self.generation)))
    }
    fn destroy(&mut self) -> Result<(), HypervisorError> {
        self.state = RunState::Ended;
        Ok(())
    }
}

impl PagedSource for ImageSource {
    fn machine(&self) -> &Machine {
        &self.machine
    }
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn start_tracking(&mut self) -> Result<(), HypervisorError> {
        self.tracking = true;
        self.dirty = PageSet::empty(self.ram.pages());
        if let Some(writer) = &mut self.writer {
            (writer.since, writer.written) = (Some(Instant::now()), 0);
        }
        Ok(())
    }
    fn harvest(&mut self) -> Result<PageSet, HypervisorError> {
        if !self.tracking {
            return Err(refused(&self.name, "harvest", "dirty pages are not tracked"));
        }
        let Some(round) = self.rounds.pop_front() else {
            self.write_on().map_err(|source| HypervisorError::Ram { vm: self.name.clone(), source })?;
            return Ok(self.dirty.take());
        };
        let mut within = PageSet::empty(self.ram.pages());
        within.merge(&round);
        self.change(&within).map_err(|source| HypervisorError::Ram { vm: self.name.clone(), source })?;
        Ok(within)
    }
    fn stop_tracking(&mut self) -> Result<(), HypervisorError> {
        self.tracking = false;
        Ok(())
    }
    fn throttle(&mut self, _percent: u8) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn pause(&mut self) -> Result<(), HypervisorError> {
        // A paused guest writes nothing: rounds that were not reached are never dirty.
        self.state = RunState::Paused;
        self.rounds.clear();
        let written = self.write_on().map_err(|source| HypervisorError::Ram { vm: self.name.clone(), source });
        self.writer = None;
        written
    }
    fn resume(&mut self) -> Result<(), HypervisorError> {
        self.state = RunState::Running;
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        Ok(state_of(self.generation))
    }
}

/// Empty memory that receives an image.
#[derive(Debug)]
pub struct ImageDestination {
    name: String,
    ram: Arc<GuestRam>,
    state: RunState,
    /// `None` until there is state.
    generation: Option<Generation>,
    /// Restored and never resumed.
    arrived: bool,
}

impl ImageDestination {
    /// Memory for `machine`.
    ///
    /// # Errors
    /// It is no image, or there is no memory for it.
    pub fn prepare(name: &str, machine: &Machine) -> Result<Self, HypervisorError> {
        let incompatible = |lack| HypervisorError::Incompatible { vm: name.to_owned(), lacks: vec![lack] };
        if machine.kind != IMAGE_KIND {
            return Err(incompatible(format!("machine kind `{}`: expected `{IMAGE_KIND}`", machine.kind)));
        }
        let layout = MemoryLayout::new(machine.regions.clone()).map_err(|error| incompatible(error.to_string()))?;
        let ram = GuestRam::anonymous(layout).map_err(|source| HypervisorError::Ram { vm: name.to_owned(), source })?;
        Ok(Self { name: name.to_owned(), ram: Arc::new(ram), state: RunState::Incoming, generation: None, arrived: false })
    }

    /// Writes what was received to a new file.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub fn write_to(&self, path: &Path) -> Result<(), HypervisorError> {
        let local = |source| HypervisorError::Local { vm: self.name.clone(), what: "cannot write the memory image", source };
        let mut file = File::create_new(path).map_err(local)?;
        for (first, mut piece) in pieces(self.ram.pages()) {
            self.ram.read(first, &mut piece).map_err(|source| HypervisorError::Ram { vm: self.name.clone(), source })?;
            file.write_all(&piece).map_err(local)?;
        }
        file.sync_all().map_err(local)
    }
}

impl Guest for ImageDestination {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        self.resume()
    }
    fn can_renew(&self) -> bool {
        true
    }
    fn renew(&mut self) -> Result<(), HypervisorError> {
        let (RunState::Paused, Some(generation)) = (self.state, self.generation) else {
            return Err(refused(&self.name, "renew", "the guest is not paused"));
        };
        self.generation = Some(generation.renewed().map_err(no_random(&self.name))?);
        Ok(())
    }
    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        Ok(status_of(self.state, self.generation))
    }
    fn destroy(&mut self) -> Result<(), HypervisorError> {
        self.state = RunState::Ended;
        Ok(())
    }
}

impl PagedDestination for ImageDestination {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), HypervisorError> {
        let generation = state.strip_prefix(STATE).and_then(|bytes| Generation::from_bytes(bytes).ok());
        if generation.is_none() {
            return Err(refused(&self.name, "restore-state", "state is not that of a memory image"));
        }
        (self.state, self.generation, self.arrived) = (RunState::Paused, generation, true);
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        self.generation.map(state_of).ok_or_else(|| refused(&self.name, "save-state", "no state was restored"))
    }
    fn resume(&mut self) -> Result<(), HypervisorError> {
        if self.state == RunState::Incoming {
            return Err(refused(&self.name, "resume", "no state was restored"));
        }
        if std::mem::take(&mut self.arrived) {
            self.generation = self.generation.map(Generation::disrupted);
        }
        self.state = RunState::Running;
        Ok(())
    }
    fn address(&self) -> String {
        format!("image:{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: VmUuid = VmUuid([3; 16]);

    fn image(dir: &Path, pages: usize) -> std::path::PathBuf {
        let path = dir.join("ram.img");
        let byte = |at: usize| if (at / PAGE_BYTES).is_multiple_of(3) { 0 } else { u8::try_from(at / 7 % 251).unwrap() };
        let bytes: Vec<u8> = (0..pages * PAGE_BYTES).map(byte).collect();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn copy(pages: &PageSet, from: &GuestRam, to: &GuestRam) {
        let mut page = [0; PAGE_BYTES];
        for number in pages.iter() {
            from.read(number, &mut page).unwrap();
            to.write(number, &page).unwrap();
        }
    }

    #[test]
    fn an_image_arrives_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 600);
        let mut source = ImageSource::open(&path, "vm-1", UUID).unwrap();
        let mut destination = ImageDestination::prepare("vm-1", source.machine()).unwrap();
        source.start_tracking().unwrap();
        copy(&PageSet::full(600), source.ram(), destination.ram());
        assert!(source.harvest().unwrap().is_empty(), "nothing runs, so nothing is dirty");
        assert!(destination.resume().is_err());
        assert!(destination.renew().is_err() && destination.save_state().is_err());
        let state = source.save_state().unwrap();
        destination.restore_state(&state).unwrap();
        assert_eq!(destination.save_state().unwrap(), state);
        destination.resume().unwrap();
        let copied = dir.path().join("copy.img");
        destination.write_to(&copied).unwrap();
        assert_eq!(std::fs::read(&copied).unwrap(), std::fs::read(&path).unwrap());
        assert!(destination.write_to(&copied).is_err(), "no file is overwritten");
    }

    #[test]
    fn an_image_keeps_its_generation_when_it_moves_and_every_opening_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 3);
        let open = || ImageSource::open(&path, "vm-1", UUID).unwrap();
        let (mut source, mut other) = (open(), open());
        let mut destination = ImageDestination::prepare("vm-1", source.machine()).unwrap();
        let first = source.status().unwrap().generation.unwrap();
        assert_ne!(other.status().unwrap().generation.unwrap().id, first.id);
        destination.restore_state(&source.save_state().unwrap()).unwrap();
        assert_eq!(destination.status().unwrap().generation, Some(first));
        for _ in 0..2 {
            destination.resume().unwrap();
            assert_eq!(destination.status().unwrap().generation, Some(first.disrupted()));
        }
        assert!(destination.renew().is_err(), "it runs");
        source.resume().unwrap();
        assert!(source.renew().is_err(), "it runs");
        assert_eq!(source.status().unwrap().generation, Some(first));
        source.pause().unwrap();
        source.renew().unwrap();
        let renewed = source.status().unwrap().generation.unwrap();
        assert!(renewed.id != first.id && renewed.count == 2, "{renewed:?}");
    }

    #[test]
    fn state_that_is_not_of_an_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = ImageSource::open(&image(dir.path(), 3), "vm-1", UUID).unwrap();
        let mut destination = ImageDestination::prepare("vm-1", source.machine()).unwrap();
        let state = source.save_state().unwrap();
        let without_id = [&state[..STATE.len()], &[0; Generation::BYTES]].concat();
        for bad in [&state[1..], &state[..state.len() - 1], &[&state[..], b"x"].concat(), STATE, &without_id] {
            assert!(destination.restore_state(bad).is_err(), "{bad:?}");
            assert_eq!(destination.status().unwrap().state, RunState::Incoming);
        }
        destination.restore_state(&state).unwrap();
    }

    #[test]
    fn redirtied_pages_really_change_round_by_round_until_the_pause() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 10);
        let mut source = ImageSource::open(&path, "vm-1", UUID).unwrap();
        let destination = ImageDestination::prepare("vm-1", source.machine()).unwrap();
        let mut two = PageSet::empty(12);
        two.insert(PageNumber(1));
        two.insert(PageNumber(11));
        source.redirty([two, PageSet::full(10), PageSet::full(10)]);
        source.start_tracking().unwrap();
        copy(&PageSet::full(10), source.ram(), destination.ram());
        let first = source.harvest().unwrap();
        assert_eq!((first.len(), first.pages()), (1, 10), "pages beyond the image are none");
        let (mut was, mut now) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        destination.ram().read(PageNumber(1), &mut was).unwrap();
        source.ram().read(PageNumber(1), &mut now).unwrap();
        assert_ne!(was, now);
        assert_eq!(source.harvest().unwrap().len(), 10);
        source.pause().unwrap();
        assert!(source.harvest().unwrap().is_empty());
        assert_eq!(std::fs::read(&path).unwrap()[PAGE_BYTES..2 * PAGE_BYTES], was, "the image itself is not written to");
    }

    #[test]
    fn a_writer_writes_between_the_harvests_and_not_when_paused() {
        let mut source = ImageSource::generated(Content::Realistic, 300, 1, "vm-1", UUID).unwrap();
        let destination = ImageDestination::prepare("vm-1", source.machine()).unwrap();
        source.write_at(1_000_000, 40);
        source.start_tracking().unwrap();
        copy(&PageSet::full(300), source.ram(), destination.ram());
        std::thread::sleep(std::time::Duration::from_millis(2));
        let dirty = source.harvest().unwrap();
        assert_eq!((dirty.len(), dirty.iter().all(|page| page.0 < 40)), (40, true));
        copy(&dirty, source.ram(), destination.ram());
        std::thread::sleep(std::time::Duration::from_millis(2));
        source.pause().unwrap();
        let last = source.harvest().unwrap();
        assert!(!last.is_empty(), "what was written before the pause");
        copy(&last, source.ram(), destination.ram());
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(source.harvest().unwrap().is_empty());
        let digest = |ram: &GuestRam| crate::memory::digest_ram(ram).unwrap();
        assert_eq!(digest(source.ram()), digest(destination.ram()));
        let again = source.again().unwrap();
        assert_eq!(digest(again.ram()), digest(source.ram()));
        assert!(ImageSource::generated(Content::Zero, 0, 1, "vm-1", UUID).is_err());
    }

    #[test]
    fn files_that_are_no_image_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for bytes in [0, 1, PAGE_BYTES + 1] {
            std::fs::write(&path, vec![1; bytes]).unwrap();
            assert!(ImageSource::open(&path, "vm-1", UUID).is_err());
        }
        assert!(ImageSource::open(dir.path(), "vm-1", UUID).is_err());
        assert!(ImageSource::open(&dir.path().join("none"), "vm-1", UUID).is_err());
    }
}
