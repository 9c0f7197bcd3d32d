//! A disk that fails when told and forgets what was not synced when the power goes, and one that is really full.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::storage::disk::{Disk, RealDisk};
use crate::storage::image::{remove_on, write_on};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// One operation fails with this errno; the next works.
    Once(i32),
    /// This operation and all after it fail.
    PowerCut,
}

#[derive(Default)]
struct State {
    operations: Vec<&'static str>,
    dead: bool,
    /// A file that is not durable yet.
    unsynced: Option<File>,
    /// Names as they were before they were changed, until the directory is synced.
    unsynced_names: Vec<(PathBuf, Option<Vec<u8>>)>,
}

struct FaultDisk {
    fault: Option<(usize, Fault)>,
    state: RefCell<State>,
}

impl FaultDisk {
    fn new(fault: Option<(usize, Fault)>) -> Self {
        Self { fault, state: RefCell::default() }
    }

    fn count(&self, what: &str) -> usize {
        self.state.borrow().operations.iter().filter(|done| **done == what).count()
    }

    fn gate(&self, what: &'static str) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.operations.push(what);
        let now = self.fault.filter(|(at, _)| *at == state.operations.len()).map(|(_, fault)| fault);
        state.dead |= now == Some(Fault::PowerCut);
        match now {
            Some(Fault::Once(errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ if state.dead => Err(io::Error::from_raw_os_error(nix::libc::EIO)),
            _ => Ok(()),
        }
    }

    /// The power goes: bytes that were not synced are lost, and names unless `names_kept`.
    fn cut(&self, names_kept: bool) {
        let mut state = self.state.borrow_mut();
        if let Some(file) = state.unsynced.take() {
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }
        for (path, before) in std::mem::take(&mut state.unsynced_names).into_iter().rev().filter(|_| !names_kept) {
            match before {
                Some(before) => fs::write(path, before).unwrap(),
                None => drop(fs::remove_file(path)),
            }
        }
    }

    fn changing(&self, path: &Path) {
        self.state.borrow_mut().unsynced_names.push((path.to_owned(), fs::read(path).ok()));
    }
}

impl Disk for FaultDisk {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.gate("create")?;
        self.changing(path);
        let file = RealDisk.create(path)?;
        self.state.borrow_mut().unsynced = Some(file.try_clone()?);
        Ok(file)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Err(error) = self.gate("write") {
            RealDisk.write_at(file, &bytes[..bytes.len() / 2], offset)?;
            return Err(error);
        }
        RealDisk.write_at(file, bytes, offset)
    }

    fn sync(&self, _file: &File) -> io::Result<()> {
        self.gate("sync")?;
        self.state.borrow_mut().unsynced = None;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.gate("rename")?;
        self.changing(to);
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.gate("remove")?;
        self.changing(path);
        RealDisk.remove(path)
    }

    fn sync_dir(&self, _directory: &Path) -> io::Result<()> {
        self.gate("sync_dir")?;
        self.state.borrow_mut().unsynced_names.clear();
        Ok(())
    }
}

/// RAM and the heads of an old and a new image of one migration.
struct Versions {
    ram: GuestRam,
    old: ImageHead,
    new: ImageHead,
}

impl Versions {
    fn new() -> Self {
        let ram = flat(STRIPE_PAGES + 3);
        for page in [0, 2, STRIPE_PAGES + 1] {
            ram.write(PageNumber(page), &page_of(page)).unwrap();
        }
        let (old, new) = (head_of(&ram, b"old"), head_of(&ram, b"new"));
        Self { ram, old, new }
    }

    /// A place with the old image, or with nothing.
    fn place(&self, with_old: bool) -> (TempDir, PathBuf, PathBuf) {
        let (directory, path, temporary) = place();
        if with_old {
            write_image(&path, &self.old, &self.ram, b"old").unwrap();
        }
        (directory, path, temporary)
    }

    /// Which version is there, whole; `None` for no file.
    fn found(&self, path: &Path) -> Option<&'static str> {
        let head = read_head(path).unwrap()?;
        let ram = flat(self.ram.pages());
        let state = restore_image(path, &head, &ram).unwrap();
        assert!(contents(&ram) == contents(&self.ram));
        Some(if state == b"old" { "old" } else { "new" })
    }

    /// How many operations writing takes.
    fn operations(&self) -> usize {
        let (_directory, path, _) = self.place(false);
        let disk = FaultDisk::new(None);
        write_on(&disk, &path, &self.new, &self.ram, b"new").unwrap();
        assert_eq!((disk.count("sync"), disk.count("rename"), disk.count("sync_dir")), (1, 1, 1));
        let state = disk.state.borrow();
        assert_eq!(state.operations.last(), Some(&"sync_dir"));
        state.operations.len()
    }
}

#[test]
fn a_failed_operation_leaves_the_old_image_or_none_and_is_not_tried_again() {
    let versions = Versions::new();
    let operations = versions.operations();
    for with_old in [false, true] {
        let old = with_old.then_some("old");
        for (at, errno) in (1..=operations).flat_map(|at| [(at, nix::libc::EIO), (at, nix::libc::ENOSPC)]) {
            let (_directory, path, temporary) = versions.place(with_old);
            let disk = FaultDisk::new(Some((at, Fault::Once(errno))));
            let error = write_on(&disk, &path, &versions.new, &versions.ram, b"new").unwrap_err();
            let ImageError::File { what, source, .. } = &error else { panic!("{at}: {error}") };
            assert_eq!(source.raw_os_error(), Some(errno), "{at}");
            assert_eq!(error.is_disk_full(), errno == nix::libc::ENOSPC);
            // The last operation is the directory's fsync: the new image is there, and nobody was told that it stays.
            let expected = if *what == "fsync the directory of" { Some("new") } else { old };
            assert_eq!(versions.found(&path), expected, "{at}: {error}");
            assert!(!temporary.exists(), "{at}: {error}");
            assert!(disk.count("sync") <= 1 && disk.count("sync_dir") <= 1, "{at}: {error}");
        }
    }
}

#[test]
fn a_power_cut_at_any_operation_leaves_a_whole_image_or_none() {
    let versions = Versions::new();
    let operations = versions.operations();
    for with_old in [false, true] {
        let old = with_old.then_some("old");
        for (at, names_kept) in (1..=operations + 1).flat_map(|at| [(at, false), (at, true)]) {
            let (_directory, path, temporary) = versions.place(with_old);
            let disk = FaultDisk::new(Some((at, Fault::PowerCut)));
            let written = write_on(&disk, &path, &versions.new, &versions.ram, b"new");
            disk.cut(names_kept);
            let found = versions.found(&path);
            assert_eq!(written.is_ok(), at > operations, "{at}");
            assert!(found == Some("new") || (found == old && written.is_err()), "{at}: {found:?}");
            // The next one goes through whatever is left.
            write_image(&path, &versions.new, &versions.ram, b"new").unwrap();
            assert_eq!(versions.found(&path), Some("new"), "{at}");
            assert!(!temporary.exists());
        }
    }
}

#[test]
fn a_removed_image_stays_away_after_a_power_cut() {
    let versions = Versions::new();
    for at in 1..=4 {
        let (_directory, path, temporary) = versions.place(true);
        std::fs::write(&temporary, "half").unwrap();
        let disk = FaultDisk::new(Some((at, Fault::PowerCut)));
        let removed = remove_on(&disk, &path);
        disk.cut(false);
        assert_eq!(removed.is_ok(), at == 4, "{at}");
        assert_eq!(versions.found(&path), if at == 4 { None } else { Some("old") }, "{at}");
        assert_eq!(temporary.exists(), at < 4, "{at}");
    }
}

/// The part that runs on the small disk; without one it looks for one.
#[test]
fn a_disk_that_is_really_full_leaves_the_old_image_and_says_so() {
    let Ok(directory) = std::env::var(SMALL_DISK) else { return on_a_small_disk() };
    let path = Path::new(&directory).join("web.image");
    let versions = Versions::new();
    write_image(&path, &versions.old, &versions.ram, b"old").unwrap();
    let large = flat(STRIPE_PAGES);
    for page in 0..STRIPE_PAGES {
        large.write(PageNumber(page), &page_of(page)).unwrap();
    }
    let error = write_image(&path, &head_of(&large, STATE), &large, STATE).unwrap_err();
    assert!(matches!(error, ImageError::File { what: "write", .. }) && error.is_disk_full(), "{error:?}");
    assert_eq!(versions.found(&path), Some("old"));
    assert_eq!(fs::read_dir(directory).unwrap().count(), 1, "half an image is left");
    println!("{SMALL_DISK}: the disk was full");
}

/// Runs this test again where a file system of 512 KiB is mounted, in a mount namespace of its own.
fn on_a_small_disk() {
    let directory = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let script = "mount -t tmpfs -o size=512k none \"$0\" || exit 77; exec \"$@\"";
    let name = "storage::tests::fault::a_disk_that_is_really_full_leaves_the_old_image_and_says_so";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(directory.path()).arg(program);
    command.args(["--exact", name, "--nocapture"]).env(SMALL_DISK, directory.path());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => return println!("skipped {name}: unshare: {error}"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    if !text.contains("running 1 test") {
        return println!("skipped {name}: no file system of its own: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    assert!(output.status.success() && text.contains("the disk was full"), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

const SMALL_DISK: &str = "SEALANE_TEST_SMALL_DISK";
