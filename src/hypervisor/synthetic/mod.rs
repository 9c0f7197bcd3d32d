//! A guest without a CPU: seeded threads that write memory and check what they wrote before.
//!
//! *Owns:* `SyntheticGuest` (in this process) and `SyntheticVmm` (the same behind the attach protocol, in its
//! own process). *Never:* KVM, timing promises. *Invariants:* `no-write-missed` (a page is marked dirty
//! after it was written), `exact-continuation` (memory and state determine every later write; a page that
//! does not hold what was last written ends the guest with exit code 1).
//! *Read first:* `pattern.rs`, `writers.rs`; `content.rs` is RAM content for measurements.

mod content;
mod pattern;
mod vmm;
mod writers;

use std::fs::File;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use content::{Content, generate};
pub use vmm::SyntheticVmm;
use writers::{Plan, Progress, Writers};

use crate::hypervisor::attach::memory_file;
use crate::hypervisor::{Generation, Guest, GuestStatus, HypervisorError, Machine, PagedDestination, PagedSource, RunState, wake_paged};
use crate::limits;
use crate::memory::{GuestRam, MemoryLayout, PageSet};
use crate::types::{PAGE_BYTES, RamRegion, VmUuid};

/// The `kind` of a synthetic machine.
pub const SYNTHETIC_KIND: &str = "synthetic";
const STATE_SCHEMA: u32 = 2;
/// Counters start below this, so that they never come to their end.
const VISITS_MAX: u64 = 1 << 60;

/// What a synthetic guest is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntheticConfig {
    /// Decides every byte and the order of every write.
    pub seed: u64,
    /// The VM's UUID; from the seed if not given.
    pub uuid: Option<VmUuid>,
    /// Guest RAM.
    pub pages: u64,
    /// Pages that are written over and over, from page 0; at most `pages`.
    pub working_set_pages: u64,
    /// Threads that write.
    pub writers: u32,
    /// Pages written each second by all threads together; 0 writes none.
    pub pages_per_second: u64,
}

impl SyntheticConfig {
    /// A guest that writes all of its `pages`.
    #[must_use]
    pub fn new(seed: u64, pages: u64, writers: u32, pages_per_second: u64) -> Self {
        Self { seed, uuid: None, pages, working_set_pages: pages, writers, pages_per_second }
    }
}

/// `profile` of a synthetic machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    seed: u64,
    working_set_pages: u64,
    pages_per_second: u64,
}

/// Device state of a synthetic guest; the same guest state always gives the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    schema: u32,
    seed: u64,
    beats: u64,
    visits: Vec<u64>,
    generation: Generation,
}

/// A synthetic guest in this process.
#[derive(Debug)]
pub struct SyntheticGuest {
    name: String,
    machine: Machine,
    plan: Plan,
    memory: File,
    ram: Arc<GuestRam>,
    /// `None` until an incoming guest has its state, and when it was destroyed.
    writers: Option<Writers>,
    destroyed: bool,
    /// `None` until there is state.
    generation: Option<Generation>,
    /// Restored and never resumed.
    arrived: bool,
}

impl SyntheticGuest {
    /// Starts a guest; `name` is for messages.
    ///
    /// # Errors
    /// The configuration is out of bounds, or memory or threads cannot be had.
    pub fn start(name: &str, config: &SyntheticConfig) -> Result<Self, HypervisorError> {
        let profile = Profile { seed: config.seed, working_set_pages: config.working_set_pages, pages_per_second: config.pages_per_second };
        let machine = Machine {
            kind: SYNTHETIC_KIND.to_owned(),
            uuid: config.uuid.unwrap_or_else(|| VmUuid(writers::uuid_of(config.seed))),
            regions: vec![RamRegion { guest_base: 0, bytes: config.pages.saturating_mul(PAGE_BYTES as u64) }],
            vcpus: config.writers,
            profile: serde_json::json!(profile),
            disks: Vec::new(),
            disks_only: false,
            mode: crate::types::Mode::Precopy,
        };
        let mut guest = Self::incoming(name, &machine)?;
        writers::fill(&guest.ram, config.seed).map_err(|source| HypervisorError::Ram { vm: name.to_owned(), source })?;
        let visits = (0..config.writers).map(|_| 0).collect();
        guest.start_writers(&Progress { visits, beats: 0 })?;
        guest.generation = Some(Generation::first().map_err(|source| guest.no_random(source))?);
        guest.start_or_go_on()?;
        Ok(guest)
    }

    /// An empty twin of `machine`.
    ///
    /// # Errors
    /// [`HypervisorError::Incompatible`] names everything that keeps it from running here.
    pub fn incoming(name: &str, machine: &Machine) -> Result<Self, HypervisorError> {
        let incompatible = |lacks| HypervisorError::Incompatible { vm: name.to_owned(), lacks };
        let (plan, layout) = check(machine).map_err(incompatible)?;
        let local = |source| HypervisorError::Local { vm: name.to_owned(), what: "cannot get guest RAM", source };
        let memory = memory_file(layout.bytes()).map_err(local)?;
        let ram = memory.try_clone().map_err(local)?;
        let ram = GuestRam::map(ram, layout).map_err(|source| HypervisorError::Ram { vm: name.to_owned(), source })?;
        let (name, machine, ram) = (name.to_owned(), machine.clone(), Arc::new(ram));
        Ok(Self { name, machine, plan, memory, ram, writers: None, destroyed: false, generation: None, arrived: false })
    }

    fn start_writers(&mut self, progress: &Progress) -> Result<(), HypervisorError> {
        let started = Writers::start_paused(Arc::clone(&self.ram), self.plan, progress);
        let writers = started.map_err(|source| HypervisorError::Local { vm: self.name.clone(), what: "cannot start writers", source })?;
        self.writers = Some(writers);
        Ok(())
    }

    fn refused(&self, request: &'static str, reason: &str) -> HypervisorError {
        HypervisorError::Refused { vm: self.name.clone(), request, reason: reason.to_owned() }
    }

    fn no_random(&self, source: io::Error) -> HypervisorError {
        HypervisorError::Local { vm: self.name.clone(), what: "no generation id", source }
    }

    fn writers(&self, request: &'static str) -> Result<&Writers, HypervisorError> {
        let reason = if self.destroyed { "the guest was destroyed" } else { "no state was restored" };
        self.writers.as_ref().ok_or_else(|| self.refused(request, reason))
    }

    /// The file that holds guest RAM, for another process.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn memory(&self) -> io::Result<File> {
        self.memory.try_clone()
    }

    /// Compares every page of the paused guest with what it must hold; returns how many do not.
    ///
    /// # Errors
    /// The guest is not paused.
    pub fn wrong_pages(&self) -> Result<u64, HypervisorError> {
        let writers = self.paused("verify")?;
        writers.wrong_pages().map_err(|source| HypervisorError::Ram { vm: self.name.clone(), source })
    }

    fn paused(&self, request: &'static str) -> Result<&Writers, HypervisorError> {
        let writers = self.writers(request)?;
        if writers.is_paused() { Ok(writers) } else { Err(self.refused(request, "the guest is not paused")) }
    }

    fn read_status(&self) -> GuestStatus {
        let Some(writers) = &self.writers else {
            let state = if self.destroyed { RunState::Ended } else { RunState::Incoming };
            return GuestStatus { state, exit_code: None, last_line: None, generation: None };
        };
        let corrupt = writers.is_corrupt();
        let state = match (corrupt, writers.is_paused()) {
            (true, _) => RunState::Ended,
            (false, true) => RunState::Paused,
            (false, false) => RunState::Running,
        };
        let beat = writers.progress().beats;
        GuestStatus { state, exit_code: corrupt.then_some(1), last_line: Some(format!("beat {beat}")), generation: self.generation }
    }

    fn encode_state(&self) -> Result<Vec<u8>, HypervisorError> {
        let progress = self.paused("save-state")?.progress();
        let generation = self.generation.ok_or_else(|| self.refused("save-state", "no state was restored"))?;
        let state = State { schema: STATE_SCHEMA, seed: self.plan.seed, beats: progress.beats, visits: progress.visits, generation };
        serde_json::to_vec(&state).map_err(|_| self.refused("save-state", "state cannot be written"))
    }

    fn apply_state(&mut self, bytes: &[u8]) -> Result<(), HypervisorError> {
        let refuse = |reason| Err(self.refused("restore-state", reason));
        if self.destroyed {
            return refuse("the guest was destroyed");
        }
        if self.writers.is_some() {
            return refuse("the guest has its state already");
        }
        let Ok(state) = serde_json::from_slice::<State>(bytes) else { return refuse("state is malformed") };
        if state.schema != STATE_SCHEMA {
            return refuse("state has another schema than 2");
        }
        if state.seed != self.plan.seed {
            return refuse("state belongs to another guest");
        }
        if state.visits.len() as u64 != u64::from(self.plan.writers) {
            return refuse("state has another number of writers");
        }
        if state.visits.iter().any(|visits| *visits > VISITS_MAX) {
            return refuse("state has more visits than a guest can make");
        }
        if let Err(error) = state.generation.checked() {
            return refuse(&error.to_string());
        }
        self.start_writers(&Progress { visits: state.visits, beats: state.beats })?;
        (self.generation, self.arrived) = (Some(state.generation), true);
        Ok(())
    }

    fn start_or_go_on(&mut self) -> Result<(), HypervisorError> {
        self.writers("resume")?;
        if std::mem::take(&mut self.arrived) {
            self.generation = self.generation.map(Generation::disrupted);
        }
        self.writers("resume")?.resume();
        Ok(())
    }

    fn take_new_generation(&mut self) -> Result<(), HypervisorError> {
        self.paused("renew")?;
        let generation = self.generation.ok_or_else(|| self.refused("renew", "no state was restored"))?;
        self.generation = Some(generation.renewed().map_err(|source| self.no_random(source))?);
        Ok(())
    }
}

/// Everything that keeps `machine` from being a synthetic guest here.
fn check(machine: &Machine) -> Result<(Plan, MemoryLayout), Vec<String>> {
    let mut lacks = Vec::new();
    if machine.kind != SYNTHETIC_KIND {
        lacks.push(format!("machine kind `{}`: this VMM runs `{SYNTHETIC_KIND}`", machine.kind));
    }
    if !(1..=limits::SYNTHETIC_WRITERS_MAX).contains(&machine.vcpus) {
        lacks.push(format!("{} writers: expected 1 to {}", machine.vcpus, limits::SYNTHETIC_WRITERS_MAX));
    }
    let layout = MemoryLayout::new(machine.regions.clone()).map_err(|error| lacks.push(error.to_string()));
    let profile = serde_json::from_value::<Profile>(machine.profile.clone()).map_err(|error| lacks.push(format!("profile: {error}")));
    if let (Ok(layout), Ok(profile)) = (&layout, &profile)
        && profile.working_set_pages > layout.pages()
    {
        lacks.push(format!("working set of {} pages: the guest has {}", profile.working_set_pages, layout.pages()));
    }
    match (layout, profile) {
        (Ok(layout), Ok(profile)) if lacks.is_empty() => {
            let Profile { seed, working_set_pages, pages_per_second } = profile;
            Ok((Plan { seed, writers: machine.vcpus, working_set_pages, pages_per_second }, layout))
        }
        _ => Err(lacks),
    }
}

impl Guest for SyntheticGuest {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        wake_paged(self)
    }
    fn can_renew(&self) -> bool {
        true
    }
    fn renew(&mut self) -> Result<(), HypervisorError> {
        self.take_new_generation()
    }
    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        Ok(self.read_status())
    }
    fn destroy(&mut self) -> Result<(), HypervisorError> {
        (self.writers, self.destroyed) = (None, true);
        Ok(())
    }
}

impl PagedSource for SyntheticGuest {
    fn machine(&self) -> &Machine {
        &self.machine
    }
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn start_tracking(&mut self) -> Result<(), HypervisorError> {
        // Writers always mark; what they marked until now was written before tracking began.
        self.writers("track-start")?.harvest();
        Ok(())
    }
    fn harvest(&mut self) -> Result<PageSet, HypervisorError> {
        Ok(self.writers("harvest")?.harvest())
    }
    fn stop_tracking(&mut self) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn throttle(&mut self, percent: u8) -> Result<(), HypervisorError> {
        self.writers("throttle")?.throttle(percent);
        Ok(())
    }
    fn pause(&mut self) -> Result<(), HypervisorError> {
        self.writers("pause")?.pause();
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HypervisorError> {
        self.start_or_go_on()
    }
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        self.encode_state()
    }
}

impl PagedDestination for SyntheticGuest {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), HypervisorError> {
        self.apply_state(state)
    }
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        self.encode_state()
    }
    fn resume(&mut self) -> Result<(), HypervisorError> {
        self.start_or_go_on()
    }
    fn address(&self) -> String {
        format!("synthetic:{}", self.machine.uuid)
    }
}

#[cfg(test)]
mod tests;
