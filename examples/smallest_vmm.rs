//! The smallest VMM that a gateway can attach to: no CPU, only memory that a thread keeps writing.
//!
//! `smallest_vmm SOCKET` runs a guest; `smallest_vmm SOCKET incoming` waits for one.
//! `docs/vmm-protocol.md` says what each method means; the library does the rest.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sealane::hypervisor::attach::{AttachedGuest, Refusal, bind, memory_file, serve};
use sealane::hypervisor::{Generation, GuestStatus, Machine, RunState};
use sealane::memory::{GuestRam, MemoryLayout, PageSet};
use sealane::types::{PAGE_BYTES, PageNumber, VmUuid};

const PAGES: u64 = 64;

/// The guest counts; page `n % PAGES` holds the last count `n` written to it.
struct Smallest {
    memory: File,
    ram: GuestRam,
    dirty: PageSet,
    state: RunState,
    count: u64,
    generation: Generation,
    /// Came from elsewhere and was not resumed yet.
    arrived: bool,
}

impl Smallest {
    fn new(state: RunState) -> Result<Self, Refusal> {
        let memory = memory_file(PAGES * PAGE_BYTES as u64)?;
        let ram = GuestRam::map(memory.try_clone()?, MemoryLayout::flat(PAGES)?)?;
        Ok(Self { memory, ram, dirty: PageSet::empty(PAGES), state, count: 0, generation: Generation::first()?, arrived: false })
    }

    /// One instruction of the guest. It runs under the mutex, so `pause` never falls into the middle of it.
    fn step(&mut self) -> Result<(), Refusal> {
        if self.state == RunState::Running {
            self.count += 1;
            let page = PageNumber(self.count % PAGES);
            self.ram.write(page, &self.count.to_le_bytes().repeat(PAGE_BYTES / 8))?;
            self.dirty.insert(page);
        }
        Ok(())
    }
}

impl AttachedGuest for Smallest {
    fn machine(&self) -> Result<Machine, Refusal> {
        let regions = self.ram.layout().regions().to_vec();
        let (kind, profile) = ("smallest".to_owned(), serde_json::Value::Null);
        Ok(Machine {
            kind,
            uuid: VmUuid([1; 16]),
            regions,
            vcpus: 1,
            profile,
            disks: Vec::new(),
            disks_only: false,
            mode: sealane::types::Mode::Precopy,
        })
    }
    fn memory(&self) -> Result<File, Refusal> {
        Ok(self.memory.try_clone()?)
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.dirty = PageSet::empty(PAGES);
        Ok(())
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        Ok(self.dirty.take())
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        Ok(())
    }
    fn throttle(&mut self, _percent: u8) -> Result<(), Refusal> {
        Err(Refusal::new("this guest cannot be slowed down"))
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        self.state = RunState::Paused;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        if std::mem::take(&mut self.arrived) {
            self.generation = self.generation.disrupted();
        }
        self.state = RunState::Running;
        Ok(())
    }
    fn renew(&mut self) -> Result<(), Refusal> {
        self.generation = self.generation.renewed()?;
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        Ok([&self.count.to_le_bytes()[..], &self.generation.to_bytes()].concat())
    }
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>> {
        let own = self.machine().map_err(|refusal| vec![refusal.reason().to_owned()])?;
        if *machine != own {
            return Err(vec![format!("this VMM only knows one machine of {PAGES} pages")]);
        }
        self.memory.try_clone().map_err(|error| vec![error.to_string()])
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal> {
        let (count, generation) = state.split_first_chunk().ok_or_else(|| Refusal::new("state is cut off"))?;
        self.generation = Generation::from_bytes(generation)?;
        self.count = u64::from_le_bytes(*count);
        (self.state, self.arrived) = (RunState::Paused, true);
        Ok(())
    }
    fn status(&mut self) -> GuestStatus {
        let last_line = Some(format!("count {}", self.count));
        GuestStatus { state: self.state, exit_code: None, last_line, generation: Some(self.generation) }
    }
    fn quit(&mut self) {
        self.state = RunState::Ended;
    }
}

/// Serves a guest at `socket` until a gateway asks it to quit.
pub fn run(socket: &Path, incoming: bool) -> Result<(), Refusal> {
    let state = if incoming { RunState::Incoming } else { RunState::Running };
    let guest = Arc::new(Mutex::new(Smallest::new(state)?));
    let vcpu = Arc::clone(&guest);
    std::thread::spawn(move || {
        while let Ok(mut guest) = vcpu.lock() {
            if guest.step().is_err() || guest.state == RunState::Ended {
                return;
            }
            drop(guest);
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    Ok(serve(&bind(socket)?, guest)?)
}

fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let socket = arguments.first().ok_or("expected SOCKET [incoming]")?;
    run(Path::new(socket), arguments.get(1).is_some_and(|word| word == "incoming")).map_err(|refusal| refusal.reason().to_owned())
}
