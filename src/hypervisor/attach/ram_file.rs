//! Guest memory files: how a VMM makes one, and what a gateway checks before it maps one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, MemfdFlags, SealFlags};

/// Filesystem of an ordinary memfd (`TMPFS_MAGIC` in `linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A memory file of `bytes` zeroes for a guest's RAM, sealed so that gateways accept it.
///
/// # Errors
/// The kernel has no memory file to give, or not of this size.
pub fn memory_file(bytes: u64) -> io::Result<File> {
    let descriptor = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&descriptor, bytes)?;
    rustix::fs::fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(descriptor))
}

/// Whether touching `bytes` bytes of the file can never kill this process.
///
/// A mapping of a file that can shrink, or whose pages come from somewhere that can run dry (huge page
/// pools) or answer late (FUSE), would let a VMM stop its gateway.
pub(super) fn check_memory_file(descriptor: OwnedFd, bytes: u64) -> Result<File, String> {
    let seals = rustix::fs::fcntl_get_seals(&descriptor).map_err(|_| "guest memory is not a sealable memory file".to_owned())?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err("guest memory file is not sealed against shrinking".to_owned());
    }
    let stat = rustix::fs::fstat(&descriptor).map_err(|error| format!("guest memory file cannot be examined: {error}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("guest memory is not a file".to_owned());
    }
    let kind = rustix::fs::fstatfs(&descriptor).map_err(|error| format!("guest memory file cannot be examined: {error}"))?.f_type;
    if u64::try_from(kind).ok() != Some(TMPFS_MAGIC) {
        return Err("guest memory file is not of shared memory: for huge pages use shmem_enabled=advise".to_owned());
    }
    if !u64::try_from(stat.st_size).is_ok_and(|size| size >= bytes) {
        return Err(format!("guest memory file has {} bytes: the layout needs {bytes}", stat.st_size));
    }
    Ok(File::from(descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(flags: MemfdFlags, bytes: u64) -> OwnedFd {
        let descriptor = rustix::fs::memfd_create("t", flags).unwrap();
        rustix::fs::ftruncate(&descriptor, bytes).unwrap();
        descriptor
    }

    #[test]
    fn accepts_what_it_makes_and_nothing_that_can_vanish() {
        assert!(check_memory_file(memory_file(8192).unwrap().into(), 8192).is_ok());
        assert!(check_memory_file(memory_file(8192).unwrap().into(), 8193).unwrap_err().contains("8193"));
        assert!(check_memory_file(memfd(MemfdFlags::ALLOW_SEALING, 8192), 8192).unwrap_err().contains("shrinking"));
        assert!(check_memory_file(memfd(MemfdFlags::empty(), 8192), 8192).is_err());
        let grow_only = memfd(MemfdFlags::ALLOW_SEALING, 8192);
        rustix::fs::fcntl_add_seals(&grow_only, SealFlags::GROW).unwrap();
        assert!(check_memory_file(grow_only, 8192).is_err());
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(8192).unwrap();
        assert!(check_memory_file(plain.into(), 8192).is_err());
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(check_memory_file(socket.into(), 8192).is_err());
        assert!(check_memory_file(File::open("/dev/null").unwrap().into(), 0).is_err());
    }
}
