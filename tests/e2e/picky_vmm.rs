//! A VMM whose machine lacks two CPU features of every guest that is offered to it.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use sealane::hypervisor::attach::{AttachedGuest, Refusal, bind, serve};
use sealane::hypervisor::{GuestStatus, Machine, RunState};
use sealane::memory::PageSet;

struct Picky(RunState);

fn empty<T>() -> Result<T, Refusal> {
    Err(Refusal::new("there is no guest"))
}

impl AttachedGuest for Picky {
    fn machine(&self) -> Result<Machine, Refusal> {
        empty()
    }
    fn memory(&self) -> Result<File, Refusal> {
        empty()
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        empty()
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        empty()
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        empty()
    }
    fn throttle(&mut self, _: u8) -> Result<(), Refusal> {
        empty()
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        empty()
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        empty()
    }
    fn renew(&mut self) -> Result<(), Refusal> {
        empty()
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        empty()
    }
    fn prepare(&mut self, _: &Machine) -> Result<File, Vec<String>> {
        Err(vec!["CPU feature `avx512_bf16`".to_owned(), "CPU feature `la57`".to_owned()])
    }
    fn restore_state(&mut self, _: &[u8]) -> Result<(), Refusal> {
        empty()
    }
    fn status(&mut self) -> GuestStatus {
        GuestStatus { state: self.0, exit_code: None, last_line: None, generation: None }
    }
    fn quit(&mut self) {
        self.0 = RunState::Ended;
    }
}

pub fn run(socket: &Path) {
    serve(&bind(socket).unwrap(), Arc::new(Mutex::new(Picky(RunState::Incoming)))).unwrap();
}
