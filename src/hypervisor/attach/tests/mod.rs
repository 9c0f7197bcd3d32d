//! Both ends of the attach protocol against each other, and each against a hostile other.

mod conversation;
mod hostile_gateway;
mod hostile_vmm;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::*;
use crate::hypervisor::{Generation, GuestStatus, Machine, RunState};
use crate::memory::PageSet;
use crate::types::{PageNumber, RamRegion, VmUuid};

/// A number of pages that does not fill the last word of a bitmap.
const PAGES: u64 = 130;

fn machine() -> Machine {
    let region = |guest_base, pages| RamRegion { guest_base, bytes: pages * 4096 };
    Machine {
        kind: "test".to_owned(),
        uuid: VmUuid([5; 16]),
        regions: vec![region(0, 100), region(1 << 32, PAGES - 100)],
        vcpus: 2,
        profile: serde_json::json!({"cpu": "x"}),
        disks: Vec::new(),
        disks_only: false,
        mode: crate::types::Mode::Precopy,
    }
}

fn timeouts() -> Timeouts {
    Timeouts { request: Duration::from_secs(5), state: Duration::from_secs(5) }
}

/// A guest made of plain fields, so that tests see what a VMM was made to do.
#[derive(Debug)]
struct Plain {
    machine: Machine,
    memory: File,
    state: RunState,
    dirty: PageSet,
    device_state: Vec<u8>,
    calls: Vec<String>,
    slow: Duration,
    panics: bool,
    generation: Option<Generation>,
}

impl Plain {
    fn running() -> Self {
        Self {
            machine: machine(),
            memory: memory_file(PAGES * 4096).unwrap(),
            state: RunState::Running,
            dirty: PageSet::empty(PAGES),
            device_state: vec![9; 1000],
            calls: Vec::new(),
            slow: Duration::ZERO,
            panics: false,
            generation: None,
        }
    }
    fn incoming() -> Self {
        Self { state: RunState::Incoming, device_state: Vec::new(), ..Self::running() }
    }
    fn note(&mut self, call: &str) -> Result<(), Refusal> {
        self.calls.push(call.to_owned());
        std::thread::sleep(self.slow);
        Ok(())
    }
}

impl AttachedGuest for Plain {
    fn machine(&self) -> Result<Machine, Refusal> {
        Ok(self.machine.clone())
    }
    fn memory(&self) -> Result<File, Refusal> {
        Ok(self.memory.try_clone()?)
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.dirty = PageSet::empty(PAGES);
        self.note("start_tracking")
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        self.note("harvest")?;
        Ok(self.dirty.take())
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.note("stop_tracking")
    }
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal> {
        self.note(&format!("throttle {percent}"))
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        assert!(!self.panics, "planted");
        self.state = RunState::Paused;
        self.note("pause")
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        self.state = RunState::Running;
        self.note("resume")
    }
    fn renew(&mut self) -> Result<(), Refusal> {
        self.generation = Some(self.generation.map_or_else(Generation::first, Generation::renewed)?);
        self.note("renew")
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        self.note("save_state")?;
        Ok(self.device_state.clone())
    }
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>> {
        if machine.vcpus > 8 {
            return Err(vec!["vcpus: 9, at most 8".to_owned(), "cpuid: no \u{1b}avx".to_owned()]);
        }
        self.machine = machine.clone();
        self.calls.push("prepare".to_owned());
        self.memory.try_clone().map_err(|error| vec![error.to_string()])
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal> {
        if state.first() != Some(&9) {
            return Err(Refusal::new("state is malformed"));
        }
        self.device_state = state.to_vec();
        self.state = RunState::Paused;
        self.note("restore_state")
    }
    fn status(&mut self) -> GuestStatus {
        GuestStatus {
            state: self.state,
            exit_code: None,
            last_line: Some(format!("beat\u{7} {}", "x".repeat(1000))),
            generation: self.generation,
        }
    }
    fn quit(&mut self) {
        self.calls.push("quit".to_owned());
    }
}

/// A served guest; both sides live in this process, on their own threads.
struct Served<G> {
    _dir: tempfile::TempDir,
    path: PathBuf,
    guest: Arc<Mutex<G>>,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl<G: AttachedGuest + 'static> Served<G> {
    fn new(guest: G) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.sock");
        let listener = bind(&path).unwrap();
        let guest = Arc::new(Mutex::new(guest));
        let shared: Arc<Mutex<dyn AttachedGuest>> = guest.clone();
        let server = std::thread::spawn(move || serve(&listener, shared));
        Self { _dir: dir, path, guest, server: Some(server) }
    }
    fn path(&self) -> &Path {
        &self.path
    }
    fn guest(&self) -> std::sync::MutexGuard<'_, G> {
        self.guest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
    fn join(&mut self) {
        self.server.take().unwrap().join().unwrap().unwrap();
    }
}

impl Served<Plain> {
    fn touch(&self, page: u64) {
        assert!(self.guest().dirty.insert(PageNumber(page)));
    }
    fn calls(&self) -> Vec<String> {
        self.guest().calls.clone()
    }
}
