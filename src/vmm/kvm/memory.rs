//! The memory file behind guest RAM.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::sys;
use crate::memory::GuestRam;
use crate::vmm::config::Hugepages;
use crate::vmm::error::VmmError;

/// A file of `bytes` zeroes whose size nobody can change: a gateway that maps it never faults.
pub(super) fn create(bytes: u64, hugepages: Hugepages) -> Result<File, VmmError> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if hugepages == Hugepages::Reserved {
        flags |= MFdFlags::MFD_HUGETLB;
    }
    let file =
        File::from(memfd_create(c"sealane-guest-ram", flags).map_err(io::Error::from).map_err(VmmError::local("create guest memory"))?);
    file.set_len(bytes).map_err(VmmError::local("size guest memory"))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(io::Error::from).map_err(VmmError::local("seal the size of guest memory"))?;
    Ok(file)
}

/// Asks for huge pages where that was wanted.
pub(super) fn advise(ram: &GuestRam, hugepages: Hugepages) -> Result<(), VmmError> {
    if hugepages != Hugepages::Advise {
        return Ok(());
    }
    let bytes = usize::try_from(ram.layout().bytes()).unwrap_or(usize::MAX);
    // WHY EINVAL is fine: a kernel without transparent huge pages says so.
    match sys::advise_huge(ram.host_address(), bytes) {
        Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(VmmError::Local { what: "advise huge pages", source: error }),
        _ => Ok(()),
    }
}
