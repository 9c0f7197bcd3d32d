//! The head of an image: what it is of, and where in the file everything lies.
//!
//! ```text
//! 0          head       magic, fixed fields, VM name, machine, zeroes; its last 32 bytes are the SHA-256 of the rest
//! n * 4096   guest RAM  page by page without the holes of the layout; zero pages are holes of the file
//!            state      device state
//!            stripes    XXH3-128 of every 2 MiB of RAM, in order
//! ```
//! Numbers are little-endian. The head holds the digest of the stripes, which is the memory digest of the handoff.

use std::path::Path;

use ring::digest::{SHA256, digest};

use crate::limits::{IMAGE_HEAD_BYTES_MAX, MACHINE_BYTES_MAX, NAME_BYTES_MAX, RAM_BYTES_MAX, STATE_BYTES_MAX, STRIPE_PAGES};
use crate::storage::ImageError;
use crate::types::{Epoch, MigrationId, PAGE_BYTES, VmName, VmUuid};
use crate::wire::FinalDigest;

/// What an image is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageHead {
    /// The attempt that it belongs to.
    pub migration: MigrationId,
    /// The VM's name.
    pub vm: VmName,
    /// The VM's UUID.
    pub uuid: VmUuid,
    /// The epoch of whoever runs the VM next.
    pub epoch: Epoch,
    /// What the source signed. With a `memory` of zero the two sides did not compare memory; the image has a digest all the same.
    pub digest: FinalDigest,
    /// The machine as JSON, at most `MACHINE_BYTES_MAX` bytes; not looked into here.
    pub machine: Vec<u8>,
}

/// A head with what places the rest of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) head: ImageHead,
    /// Pages of RAM.
    pub(super) pages: u64,
    /// Bytes of device state.
    pub(super) state_bytes: u64,
    /// Digest of the RAM, always there.
    pub(super) memory: u128,
}

impl Layout {
    /// Where RAM begins.
    pub(super) fn ram_offset(&self) -> u64 {
        let bytes = FIXED_BYTES + self.head.vm.as_str().len() + self.head.machine.len() + CHECK_BYTES;
        bytes.next_multiple_of(PAGE_BYTES) as u64
    }

    pub(super) fn state_offset(&self) -> u64 {
        self.ram_offset() + self.pages * PAGE_BYTES as u64
    }

    pub(super) fn stripes_offset(&self) -> u64 {
        self.state_offset() + self.state_bytes
    }

    /// Length of the whole file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.stripes_offset() + self.pages.div_ceil(STRIPE_PAGES) * STRIPE_DIGEST_BYTES as u64
    }

    /// The head as it stands in the file, up to where RAM begins.
    pub(super) fn encode(&self) -> Vec<u8> {
        let ImageHead { migration, vm, uuid, epoch, digest, machine } = &self.head;
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&migration.0);
        out.extend_from_slice(&uuid.0);
        out.extend_from_slice(&epoch.0.to_le_bytes());
        out.extend_from_slice(&self.pages.to_le_bytes());
        out.extend_from_slice(&self.state_bytes.to_le_bytes());
        out.extend_from_slice(&digest_bytes(digest));
        out.extend_from_slice(&self.memory.to_le_bytes());
        out.extend_from_slice(&(vm.as_str().len() as u64).to_le_bytes());
        out.extend_from_slice(&(machine.len() as u64).to_le_bytes());
        out.extend_from_slice(vm.as_str().as_bytes());
        out.extend_from_slice(machine);
        let checked_bytes = (out.len() + CHECK_BYTES).next_multiple_of(PAGE_BYTES) - CHECK_BYTES;
        out.resize(checked_bytes, 0);
        let check = sha256(&out);
        out.extend_from_slice(&check);
        out
    }

    /// Reads a head from the first bytes of a file, up to `IMAGE_HEAD_BYTES_MAX` of them.
    pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, ImageError> {
        if !bytes.starts_with(MAGIC) {
            let found = bytes.get(..MAGIC.len()).unwrap_or(bytes).escape_ascii().to_string();
            return Err(ImageError::Format { path: path.to_owned(), found });
        }
        let damaged = |why: &str| ImageError::damaged(path, why);
        let layout = Self::fields(bytes).ok_or_else(|| damaged("its head ends early or has a number out of bounds"))?;
        let checked_bytes = usize::try_from(layout.ram_offset()).map_or(usize::MAX, |offset| offset - CHECK_BYTES);
        let (checked, rest) = bytes.split_at_checked(checked_bytes).ok_or_else(|| damaged("its head ends early"))?;
        if !rest.starts_with(&sha256(checked)) {
            return Err(damaged("the checksum of its head is wrong"));
        }
        if layout.head.digest.memory != 0 && layout.head.digest.memory != layout.memory {
            return Err(damaged("it holds other memory than its final digest says"));
        }
        Ok(layout)
    }

    fn fields(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        fields.take(MAGIC.len())?;
        let migration = MigrationId(fields.array()?);
        let uuid = VmUuid(fields.array()?);
        let epoch = Epoch(fields.number(u64::MAX)?);
        let pages = fields.number(RAM_BYTES_MAX / PAGE_BYTES as u64).filter(|pages| *pages > 0)?;
        let state_bytes = fields.number(STATE_BYTES_MAX as u64)?;
        let digest = FinalDigest { state: fields.array()?, lanes: fields.array()?, memory: u128::from_le_bytes(fields.array()?) };
        let memory = u128::from_le_bytes(fields.array()?);
        let name_bytes = fields.number(NAME_BYTES_MAX as u64)?;
        let machine_bytes = fields.number(MACHINE_BYTES_MAX as u64)?;
        let name = fields.take(usize::try_from(name_bytes).ok()?)?;
        let vm = std::str::from_utf8(name).ok()?.parse().ok()?;
        let machine = fields.take(usize::try_from(machine_bytes).ok()?)?.to_vec();
        Some(Self { head: ImageHead { migration, vm, uuid, epoch, digest, machine }, pages, state_bytes, memory })
    }
}

/// What has not been read yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn number(&mut self, max: u64) -> Option<u64> {
        self.array().map(u64::from_le_bytes).filter(|number| *number <= max)
    }
}

/// A final digest as it stands in the head.
pub(super) fn digest_bytes(digest: &FinalDigest) -> Vec<u8> {
    [digest.state.as_slice(), &digest.lanes, &digest.memory.to_le_bytes()].concat()
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

const MAGIC: &[u8] = b"sealane.image/1\n";
/// Everything in front of the VM's name.
const FIXED_BYTES: usize = 16 + 2 * 16 + 3 * 8 + 2 * 32 + 2 * 16 + 2 * 8;
const CHECK_BYTES: usize = 32;
pub(super) const STRIPE_DIGEST_BYTES: usize = 16;

const _: () =
    assert!(IMAGE_HEAD_BYTES_MAX >= (FIXED_BYTES + NAME_BYTES_MAX + MACHINE_BYTES_MAX + CHECK_BYTES).next_multiple_of(PAGE_BYTES));

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        let digest = FinalDigest { state: [3; 32], lanes: [4; 32], memory: 7 };
        let head = ImageHead {
            migration: MigrationId([1; 16]),
            vm: "web".parse().unwrap(),
            uuid: VmUuid([2; 16]),
            epoch: Epoch(9),
            digest,
            machine: b"{}".to_vec(),
        };
        Layout { head, pages: 513, state_bytes: 5, memory: 7 }
    }

    fn decode(bytes: &[u8]) -> Result<Layout, ImageError> {
        Layout::decode(Path::new("x.image"), bytes)
    }

    #[test]
    fn a_head_comes_back_from_its_bytes_with_the_largest_machine_too() {
        for machine_bytes in [0, 2, 3800, 4000, MACHINE_BYTES_MAX] {
            let mut layout = layout();
            layout.head.machine = vec![b'x'; machine_bytes];
            let bytes = layout.encode();
            assert_eq!(bytes.len() as u64, layout.ram_offset(), "{machine_bytes}");
            assert!(bytes.len() <= IMAGE_HEAD_BYTES_MAX && bytes.len().is_multiple_of(PAGE_BYTES));
            assert_eq!(decode(&bytes).unwrap(), layout);
        }
        assert_eq!(layout().file_bytes(), 4096 + 513 * 4096 + 5 + 2 * 16);
    }

    #[test]
    fn numbers_out_of_bounds_are_refused_although_the_checksum_is_right() {
        type Change = fn(&mut Layout);
        let cases: [Change; 6] = [
            |layout| layout.pages = 0,
            |layout| layout.pages = RAM_BYTES_MAX / PAGE_BYTES as u64 + 1,
            |layout| layout.pages = u64::MAX,
            |layout| layout.state_bytes = STATE_BYTES_MAX as u64 + 1,
            |layout| layout.head.machine = vec![0; MACHINE_BYTES_MAX + 1],
            |layout| layout.memory = 8,
        ];
        for (index, change) in cases.into_iter().enumerate() {
            let mut layout = layout();
            change(&mut layout);
            assert!(matches!(decode(&layout.encode()), Err(ImageError::Damaged { .. })), "{index}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = layout().encode();
        bytes[14] = b'2';
        let error = decode(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "`x.image` begins with `sealane.image/2\\n`: expected a `sealane.image/1`");
    }
}
