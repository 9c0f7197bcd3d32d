//! A disk under a journal: what is written is in the page cache until it is synced, and a host that crashes loses any part
//! of what was not.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

use crate::chance::Chance;

/// Disks write sectors whole.
const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct State {
    /// What a process reads.
    cache: Vec<u8>,
    /// What a crash of the host leaves, with any part of `unsynced`.
    durable: Vec<u8>,
    unsynced: Vec<Unsynced>,
    /// The process that may use the disk; writes of an earlier one are those of the dead.
    process: u64,
    full: bool,
    fail_sync: Option<SyncFailure>,
    skip_sync: bool,
}

#[derive(Debug)]
enum Unsynced {
    Write { at: usize, bytes: Vec<u8> },
    Length(usize),
}

/// What becomes of the page cache when a sync fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncFailure {
    /// The pages stay to be written.
    Retried,
    /// The pages are taken for clean: processes read what is not on the disk (ext4, XFS).
    TakenForClean,
    /// The pages are dropped: processes read what is on the disk (Btrfs).
    Dropped,
}

/// One host's disk. Survives every crash.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<State>>);

/// What one process holds of the disk.
#[derive(Debug)]
pub struct Handle {
    disk: Disk,
    process: u64,
}

impl Disk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// For a new process; what the process before still holds does nothing any more.
    pub fn open(&self) -> Handle {
        let mut state = self.lock();
        state.process += 1;
        Handle { disk: self.clone(), process: state.process }
    }

    /// The process is gone; the page cache stays.
    pub fn kill_process(&self) {
        self.lock().process += 1;
    }

    /// The host is gone: of what was not synced, every sector may be there or not.
    pub fn crash(&self, chance: &mut Chance) {
        let mut state = self.lock();
        state.process += 1;
        let mut unsynced = std::mem::take(&mut state.unsynced);
        // The order in which pages were written back to the cache is not part of what a seed determines.
        unsynced.sort_by_key(|change| match change {
            Unsynced::Length(_) => 0,
            Unsynced::Write { at, .. } => *at,
        });
        let mood = chance.range(0, 4);
        for change in unsynced {
            let kept = match mood {
                0 => false,
                1 => true,
                _ => chance.percent(50),
            };
            match change {
                Unsynced::Length(length) if kept => state.durable.resize(length, 0),
                Unsynced::Write { at, bytes } if kept => write_into(&mut state.durable, at, &bytes),
                Unsynced::Write { at, bytes } if mood == 3 => tear(&mut state.durable, at, &bytes, chance),
                _ => {}
            }
        }
        state.cache = state.durable.clone();
    }

    /// The next write finds no room, and those after it neither.
    pub fn fill_up(&self) {
        self.lock().full = true;
    }

    pub fn fail_next_sync(&self, how: SyncFailure) {
        self.lock().fail_sync = Some(how);
    }

    /// The planted mistake: a disk that says that it has synced.
    pub fn skip_sync(&self) {
        self.lock().skip_sync = true;
    }

    pub fn mend(&self) {
        let mut state = self.lock();
        state.full = false;
        state.fail_sync = None;
    }

    /// A copy of the disk as it is now.
    pub fn copy(&self) -> Vec<u8> {
        self.lock().durable.clone()
    }

    pub fn restore(&self, copy: &[u8]) {
        let mut state = self.lock();
        state.process += 1;
        state.unsynced.clear();
        state.cache = copy.to_vec();
        state.durable = copy.to_vec();
    }
}

fn write_into(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

fn tear(durable: &mut Vec<u8>, at: usize, data: &[u8], chance: &mut Chance) {
    for (index, sector) in data.chunks(SECTOR).enumerate() {
        if chance.percent(50) {
            write_into(durable, at + index * SECTOR, sector);
        }
    }
}

impl Handle {
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.lock();
        if state.process == self.process { Ok(state) } else { Err(io::Error::other("a process that is gone")) }
    }
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state()?.cache.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (state, at) = (self.state()?, usize::try_from(offset).unwrap());
        let found = state.cache.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let (mut state, len) = (self.state()?, usize::try_from(len).unwrap());
        if state.full && len > state.cache.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.cache.resize(len, 0);
        state.unsynced.push(Unsynced::Length(len));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state()?;
        if state.skip_sync {
            return Ok(());
        }
        match state.fail_sync.take() {
            None => {}
            Some(SyncFailure::Retried) => return Err(io::Error::from_raw_os_error(5)),
            Some(SyncFailure::TakenForClean) => {
                state.unsynced.clear();
                return Err(io::Error::from_raw_os_error(5));
            }
            Some(SyncFailure::Dropped) => {
                state.unsynced.clear();
                state.cache = state.durable.clone();
                return Err(io::Error::from_raw_os_error(5));
            }
        }
        for change in std::mem::take(&mut state.unsynced) {
            match change {
                Unsynced::Length(length) => state.durable.resize(length, 0),
                Unsynced::Write { at, bytes } => write_into(&mut state.durable, at, &bytes),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (mut state, at) = (self.state()?, usize::try_from(offset).unwrap());
        if state.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        write_into(&mut state.cache, at, data);
        state.unsynced.push(Unsynced::Write { at, bytes: data.to_vec() });
        Ok(())
    }
}
