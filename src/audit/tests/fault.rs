//! A disk that fails when told, fills up, and forgets what was not synced when the power goes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::audit::disk::{Disk, DiskFile, RealDisk};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// One operation fails with this errno; the next works.
    Once(i32),
    /// This operation and all after it fail.
    PowerCut,
}

#[derive(Debug, Default)]
struct State {
    operations: usize,
    syncs: usize,
    fault: Option<(usize, Fault)>,
    dead: bool,
    /// Bytes that are free; unlimited if none.
    free: Option<u64>,
    /// Length that survives a power cut, by file.
    durable: BTreeMap<PathBuf, u64>,
    /// What renames replaced, the latest first, until their directory is synced.
    replaced: Vec<(PathBuf, Option<Vec<u8>>)>,
    /// Names that a power cut may take away.
    new_names: BTreeSet<PathBuf>,
}

#[derive(Debug, Default)]
pub(super) struct FaultDisk {
    state: Mutex<State>,
}

impl FaultDisk {
    pub(super) fn failing(at: usize, fault: Fault) -> Self {
        Self { state: Mutex::new(State { fault: Some((at, fault)), ..State::default() }) }
    }

    pub(super) fn set_free(&self, bytes: Option<u64>) {
        self.state.lock().unwrap().free = bytes;
    }

    pub(super) fn operations(&self) -> usize {
        self.state.lock().unwrap().operations
    }

    pub(super) fn syncs(&self) -> usize {
        self.state.lock().unwrap().syncs
    }

    /// The power goes: of bytes that were not synced all but `kept` are lost, and renames if `rename_lost`.
    pub(super) fn cut(&self, kept: u64, rename_lost: bool) {
        let mut state = self.state.lock().unwrap();
        state.dead = true;
        if rename_lost {
            for (path, old) in std::mem::take(&mut state.replaced) {
                match old {
                    Some(old) => drop(std::fs::write(path, old)),
                    None => drop(std::fs::remove_file(path)),
                }
            }
        }
        for (path, durable) in &state.durable {
            let Ok(metadata) = std::fs::metadata(path) else { continue };
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(metadata.len().min(durable.saturating_add(kept))).unwrap();
        }
        for path in std::mem::take(&mut state.new_names) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn gate(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.operations += 1;
        if state.dead {
            return Err(io::Error::from_raw_os_error(nix::libc::EIO));
        }
        match state.fault {
            Some((at, Fault::Once(errno))) if at == state.operations => Err(io::Error::from_raw_os_error(errno)),
            Some((at, Fault::PowerCut)) if at == state.operations => {
                state.dead = true;
                Err(io::Error::from_raw_os_error(nix::libc::EIO))
            }
            _ => Ok(()),
        }
    }

    fn take(&self, bytes: u64) -> Result<(), u64> {
        let mut state = self.state.lock().unwrap();
        match &mut state.free {
            Some(free) if *free < bytes => Err(std::mem::take(free)),
            Some(free) => {
                *free -= bytes;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn give(&self, bytes: u64) {
        if let Some(free) = &mut self.state.lock().unwrap().free {
            *free += bytes;
        }
    }
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

impl Disk for FaultDisk {
    fn open(&self, path: &Path) -> io::Result<DiskFile> {
        self.gate()?;
        let new = !path.exists();
        let file = RealDisk.open(path)?;
        let mut state = self.state.lock().unwrap();
        if new {
            state.new_names.insert(path.to_owned());
            state.durable.insert(path.to_owned(), 0);
        } else {
            state.durable.entry(path.to_owned()).or_insert(length(path));
        }
        Ok(file)
    }

    fn append(&self, file: &DiskFile, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.gate() {
            RealDisk.append(file, &bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        if let Err(free) = self.take(bytes.len() as u64) {
            RealDisk.append(file, &bytes[..usize::try_from(free).unwrap()])?;
            return Err(io::Error::from_raw_os_error(nix::libc::ENOSPC));
        }
        RealDisk.append(file, bytes)
    }

    fn sync(&self, file: &DiskFile) -> io::Result<()> {
        self.gate()?;
        let mut state = self.state.lock().unwrap();
        state.syncs += 1;
        state.durable.insert(file.path.clone(), length(&file.path));
        Ok(())
    }

    fn truncate(&self, file: &DiskFile, bytes: u64) -> io::Result<()> {
        self.gate()?;
        self.give(length(&file.path).saturating_sub(bytes));
        RealDisk.truncate(file, bytes)
    }

    fn allocate(&self, file: &DiskFile, bytes: u64) -> io::Result<()> {
        self.gate()?;
        self.take(bytes).map_err(|free| {
            self.give(free);
            io::Error::from_raw_os_error(nix::libc::ENOSPC)
        })?;
        RealDisk.truncate(file, bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.gate()?;
        self.give(length(to));
        let old = std::fs::read(to).ok();
        RealDisk.rename(from, to)?;
        let mut state = self.state.lock().unwrap();
        state.new_names.remove(from);
        state.replaced.insert(0, (to.to_owned(), old));
        let durable = state.durable.remove(from).unwrap();
        state.durable.insert(to.to_owned(), durable);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.gate()?;
        self.give(length(path));
        self.state.lock().unwrap().new_names.remove(path);
        RealDisk.remove(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.gate()?;
        RealDisk.create_dir(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.gate()?;
        let mut state = self.state.lock().unwrap();
        state.syncs += 1;
        state.new_names.retain(|name| name.parent() != Some(dir));
        state.replaced.retain(|(name, _)| name.parent() != Some(dir));
        Ok(())
    }
}
