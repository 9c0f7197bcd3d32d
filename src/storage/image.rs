//! Writes the RAM and the device state of a paused VM into one file, and brings them back.
//!
//! The file has a temporary name until all of it is on disk. RAM goes stripe by stripe (2 MiB) through one buffer.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::limits::{IMAGE_HEAD_BYTES_MAX, MACHINE_BYTES_MAX, STATE_BYTES_MAX, STRIPE_PAGES};
use crate::memory::{GuestRam, StripeDigest, combine_digests, digest_ram, digest_stripe, stripe_count};
use crate::storage::disk::{Disk, RealDisk, open};
use crate::storage::head::{Layout, STRIPE_DIGEST_BYTES, digest_bytes, sha256};
use crate::storage::{ImageError, ImageHead};
use crate::types::{PAGE_BYTES, PageNumber};

/// Writes the image of a VM that is paused and stays so; durable when this returns `Ok`. The directory must exist.
/// An image of the same migration is replaced, at once or not at all; any other file is left alone and an error.
///
/// Restoring a state may write guest memory. So a destination calls this before it restores the twin.
///
/// # Errors
/// State or memory are not what `head` says, or the disk failed: then there is what was there before. Only when the
/// directory cannot be made durable, the new image may be there and yet be gone after a crash.
pub fn write_image(path: &Path, head: &ImageHead, ram: &GuestRam, state: &[u8]) -> Result<(), ImageError> {
    write_on(&RealDisk, path, head, ram, state)
}

/// The head of the image at `path`, `None` if there is no file. It and the length of the file are checked, the rest is not.
///
/// # Errors
/// The file cannot be read, is no image, or is damaged.
pub fn read_head(path: &Path) -> Result<Option<ImageHead>, ImageError> {
    Ok(open_image(path)?.map(|(_, layout)| layout.head))
}

/// Fills `ram`, fresh and zero, from the image at `path`, which must be the one that `head` says, and returns the device state.
/// Every stripe is checked before it is written, and what `ram` holds in the end.
///
/// # Errors
/// There is no such image, it is of something else, or it is damaged. What `ram` holds then is undefined.
pub fn restore_image(path: &Path, head: &ImageHead, ram: &GuestRam) -> Result<Vec<u8>, ImageError> {
    let missing = || ImageError::file("open", path)(io::ErrorKind::NotFound.into());
    let (file, layout) = open_image(path)?.ok_or_else(missing)?;
    compare(path, head, &layout, ram)?;
    let state = read_state(path, &file, &layout)?;
    let stripes = read_stripes(path, &file, &layout)?;
    restore_ram(path, &file, &layout, &stripes, ram)?;
    // Pages that the image does not have were trusted to be zero.
    if digest_ram(ram).map_err(ImageError::ram(path))? != layout.memory {
        return Err(ImageError::Digest { what: "restored guest memory", path: path.to_owned() });
    }
    Ok(state)
}

/// Removes the image and what a crash left of one half written; gone for good when this returns `Ok`. Fine if there is none.
///
/// # Errors
/// The disk failed.
pub fn remove_image(path: &Path) -> Result<(), ImageError> {
    remove_on(&RealDisk, path)
}

pub(super) fn remove_on(disk: &dyn Disk, path: &Path) -> Result<(), ImageError> {
    disk.remove(path).map_err(ImageError::file("remove", path))?;
    disk.remove(&temporary(path)).map_err(ImageError::file("remove what is half written of", path))?;
    match disk.sync_dir(directory(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(ImageError::file("fsync the directory of", path)),
    }
}

/// INVARIANT(whole-or-none): the order of syncs and the rename is what it stands on.
pub(super) fn write_on(disk: &dyn Disk, path: &Path, head: &ImageHead, ram: &GuestRam, state: &[u8]) -> Result<(), ImageError> {
    check(path, head, state)?;
    if let Some(found) = read_head(path)?.map(|there| there.migration).filter(|found| *found != head.migration) {
        return Err(ImageError::Occupied { path: path.to_owned(), expected: head.migration, found });
    }
    let temporary = temporary(path);
    disk.remove(&temporary).map_err(ImageError::file("remove what is half written of", path))?;
    let file = disk.create(&temporary).map_err(ImageError::file("create", path))?;
    let written = fill(disk, path, &file, head, ram, state)
        .and_then(|()| disk.sync(&file).map_err(ImageError::file("fsync", path)))
        .and_then(|()| disk.rename(&temporary, path).map_err(ImageError::file("rename", path)));
    if let Err(error) = written {
        // Only to give the space back: nobody reads a temporary file, and the next writer removes it.
        let _ = disk.remove(&temporary);
        return Err(error);
    }
    disk.sync_dir(directory(path)).map_err(ImageError::file("fsync the directory of", path))
}

fn check(path: &Path, head: &ImageHead, state: &[u8]) -> Result<(), ImageError> {
    for (what, bytes, bytes_max) in
        [("machine description", head.machine.len(), MACHINE_BYTES_MAX), ("device state", state.len(), STATE_BYTES_MAX)]
    {
        if bytes > bytes_max {
            return Err(ImageError::TooLarge { what, path: path.to_owned(), bytes, bytes_max });
        }
    }
    if sha256(state) != head.digest.state {
        return Err(ImageError::Digest { what: "device state", path: path.to_owned() });
    }
    Ok(())
}

/// The head comes last: it holds the digest of what was written.
fn fill(disk: &dyn Disk, path: &Path, file: &File, head: &ImageHead, ram: &GuestRam, state: &[u8]) -> Result<(), ImageError> {
    let mut layout = Layout { head: head.clone(), pages: ram.pages(), state_bytes: state.len() as u64, memory: 0 };
    let digests = write_ram(disk, path, file, &layout, ram)?;
    layout.memory = combine_digests(&digests);
    if head.digest.memory != 0 && head.digest.memory != layout.memory {
        return Err(ImageError::Digest { what: "guest memory", path: path.to_owned() });
    }
    let stripes: Vec<u8> = digests.iter().flat_map(|digest| digest.0.to_le_bytes()).collect();
    for (bytes, offset) in [(state, layout.state_offset()), (&stripes, layout.stripes_offset()), (&layout.encode(), 0)] {
        disk.write_at(file, bytes, offset).map_err(ImageError::file("write", path))?;
    }
    Ok(())
}

fn write_ram(disk: &dyn Disk, path: &Path, file: &File, layout: &Layout, ram: &GuestRam) -> Result<Vec<StripeDigest>, ImageError> {
    let mut buffer = vec![0; STRIPE_BYTES];
    let hole = digest_stripe(&buffer);
    let mut digests = Vec::new();
    let mut written = ram.next_written(PageNumber(0));
    for stripe in 0..stripe_count(ram) {
        let first = PageNumber(stripe * STRIPE_PAGES);
        let bytes = of_stripe(&mut buffer, layout.pages, stripe);
        if written.is_some_and(|written| written < first) {
            written = ram.next_written(first);
        }
        let end = first.0 + STRIPE_PAGES;
        if bytes.len() == STRIPE_BYTES && written.is_none_or(|written| written.0 >= end) {
            digests.push(hole);
            continue;
        }
        // What is written is what was digested, whatever guest memory is by then.
        ram.read_written(first, bytes).map_err(ImageError::ram(path))?;
        digests.push(digest_stripe(bytes));
        let offset = layout.ram_offset() + first.0 * PAGE_BYTES as u64;
        for run in written_runs(bytes) {
            let at = offset + run.start as u64;
            disk.write_at(file, bytes.get(run).unwrap_or_default(), at).map_err(ImageError::file("write", path))?;
        }
    }
    Ok(digests)
}

/// Opens an image and checks its head and length.
fn open_image(path: &Path) -> Result<Option<(File, Layout)>, ImageError> {
    let Some(file) = open(path).map_err(ImageError::file("open", path))? else { return Ok(None) };
    let read = ImageError::file("read", path);
    let mut bytes = Vec::new();
    let length = match (&file).take(IMAGE_HEAD_BYTES_MAX as u64).read_to_end(&mut bytes).and_then(|_| file.metadata()) {
        Ok(metadata) => metadata.len(),
        Err(error) => return Err(read(error)),
    };
    let layout = Layout::decode(path, &bytes)?;
    let expected = layout.file_bytes();
    if length != expected {
        return Err(ImageError::damaged(path, format!("it has {length} bytes: expected {expected}")));
    }
    Ok(Some((file, layout)))
}

/// Whether the image is the one that was asked for, and fits.
fn compare(path: &Path, asked: &ImageHead, layout: &Layout, ram: &GuestRam) -> Result<(), ImageError> {
    let found = &layout.head;
    for (what, expected, found) in [
        ("migration", asked.migration.to_string(), found.migration.to_string()),
        ("UUID", asked.uuid.to_string(), found.uuid.to_string()),
        ("VM", asked.vm.to_string(), found.vm.to_string()),
        ("epoch", asked.epoch.to_string(), found.epoch.to_string()),
        ("final digest", short(&digest_bytes(&asked.digest)), short(&digest_bytes(&found.digest))),
        ("machine", short(&asked.machine), short(&found.machine)),
        ("pages", ram.pages().to_string(), layout.pages.to_string()),
    ] {
        if expected != found {
            return Err(ImageError::Other { path: path.to_owned(), what, expected, found });
        }
    }
    Ok(())
}

/// Enough to tell two apart in a message.
fn short(bytes: &[u8]) -> String {
    sha256(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn read_state(path: &Path, file: &File, layout: &Layout) -> Result<Vec<u8>, ImageError> {
    // Bounded by STATE_BYTES_MAX when the head was read.
    let mut state = vec![0; usize::try_from(layout.state_bytes).unwrap_or(0)];
    file.read_exact_at(&mut state, layout.state_offset()).map_err(ImageError::file("read", path))?;
    if sha256(&state) != layout.head.digest.state {
        return Err(ImageError::damaged(path, "its device state is not what its final digest says"));
    }
    Ok(state)
}

fn read_stripes(path: &Path, file: &File, layout: &Layout) -> Result<Vec<StripeDigest>, ImageError> {
    // As many as guest RAM has, which is mapped already.
    let bytes = layout.file_bytes() - layout.stripes_offset();
    let mut stripes = vec![0; usize::try_from(bytes).unwrap_or(0)];
    file.read_exact_at(&mut stripes, layout.stripes_offset()).map_err(ImageError::file("read", path))?;
    let (stripes, _) = stripes.as_chunks::<STRIPE_DIGEST_BYTES>();
    let stripes: Vec<_> = stripes.iter().map(|digest| StripeDigest(u128::from_le_bytes(*digest))).collect();
    if combine_digests(&stripes) != layout.memory {
        return Err(ImageError::damaged(path, "its stripe digests are not what its head says"));
    }
    Ok(stripes)
}

/// INVARIANT(checked-before-ram): the one place where an image reaches guest RAM.
fn restore_ram(path: &Path, file: &File, layout: &Layout, stripes: &[StripeDigest], ram: &GuestRam) -> Result<(), ImageError> {
    let mut buffer = vec![0; STRIPE_BYTES];
    let hole = digest_stripe(&buffer);
    for (stripe, expected) in (0..).zip(stripes) {
        let first = PageNumber(stripe * STRIPE_PAGES);
        let bytes = of_stripe(&mut buffer, layout.pages, stripe);
        let offset = layout.ram_offset() + first.0 * PAGE_BYTES as u64;
        let held = if bytes.len() == STRIPE_BYTES && is_hole(file, offset..offset + STRIPE_BYTES as u64) {
            hole
        } else {
            file.read_exact_at(bytes, offset).map_err(ImageError::file("read", path))?;
            digest_stripe(bytes)
        };
        if held != *expected {
            let last = first.0 + (bytes.len() / PAGE_BYTES) as u64 - 1;
            return Err(ImageError::damaged(path, format!("pages {first} to {last} are not what was written")));
        }
        if held == hole {
            continue;
        }
        for run in written_runs(bytes) {
            let page = PageNumber(first.0 + (run.start / PAGE_BYTES) as u64);
            ram.write(page, bytes.get(run).unwrap_or_default()).map_err(ImageError::ram(path))?;
        }
    }
    Ok(())
}

/// The part of `buffer` that a stripe fills; the last stripe may be short.
fn of_stripe(buffer: &mut [u8], pages: u64, stripe: u64) -> &mut [u8] {
    let left = pages.saturating_sub(stripe * STRIPE_PAGES).min(STRIPE_PAGES);
    let bytes = usize::try_from(left).unwrap_or(0) * PAGE_BYTES;
    buffer.get_mut(..bytes).unwrap_or_default()
}

/// Runs of pages that are not zero, as ranges of bytes.
fn written_runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        if page == ZERO_PAGE {
            continue;
        }
        let at = index * PAGE_BYTES;
        match runs.last_mut() {
            Some(run) if run.end == at => run.end = at + page.len(),
            _ => runs.push(at..at + page.len()),
        }
    }
    runs
}

/// Whether the file has nothing there. Reading a hole would fill the page cache with zeroes.
fn is_hole(file: &File, bytes: Range<u64>) -> bool {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(bytes.start)) {
        Ok(data) => data >= bytes.end,
        Err(error) => error == rustix::io::Errno::NXIO,
    }
}

/// Beside the image, so that a rename is enough.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Bytes of a whole stripe.
const STRIPE_BYTES: usize = 2 << 20;
const ZERO_PAGE: &[u8] = &[0; PAGE_BYTES];

const _: () = assert!(STRIPE_BYTES as u64 == STRIPE_PAGES * PAGE_BYTES as u64);
