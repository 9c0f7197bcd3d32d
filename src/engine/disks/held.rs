//! What the destination's disks hold already, so that it is not sent: what an earlier attempt has left there, most often.
//!
//! The destination reads its disks, so it does not matter how it came by what is there, or whether a crash took a part of it.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ring::digest::{SHA256, digest};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::serve::{BLOCK_BYTES, is_zero};
use crate::engine::EngineError;
use crate::hypervisor::Disk;
use crate::limits;
use crate::storage::nbd::{enter, read_block};

/// The beginning of a block's SHA-256.
type BlockDigest = [u8; 16];
/// A block that reads as zeroes.
const ZERO: BlockDigest = [0; 16];
/// One that has changed since, or was never told of.
const UNKNOWN: BlockDigest = [0xff; 16];

/// At the source.
#[derive(Debug, Default)]
pub(in crate::engine) struct Held(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    disks: Vec<Vec<BlockDigest>>,
    blocks: usize,
    complete: bool,
    same_bytes: u64,
}

impl Held {
    // SPEC: PROTOCOL.md#must-disk-held
    /// Takes what the destination tells.
    ///
    /// # Errors
    /// It is out of order, or not of these disks.
    pub(in crate::engine) fn take(&self, disks: &[Disk], disk: u16, blocks: &[BlockDigest], last: bool) -> Result<(), EngineError> {
        let mut state = self.lock();
        let at = usize::from(disk);
        let got = format!("{} blocks of disk {disk}", blocks.len());
        let refused = EngineError::OutOfPlace { expected: "the next blocks of a disk of the offer, once", got };
        state.disks.resize(disks.len(), Vec::new());
        let most = disks.get(at).map_or(0, |disk| disk.bytes.div_ceil(BLOCK_BYTES as u64));
        let (complete, all) = (state.complete, state.blocks + blocks.len());
        let Some(known) = state.disks.get_mut(at) else { return Err(refused) };
        if complete || all > limits::DISK_HELD_BLOCKS_MAX || (known.len() + blocks.len()) as u64 > most {
            return Err(refused);
        }
        known.extend_from_slice(blocks);
        (state.blocks, state.complete) = (all, last);
        Ok(())
    }

    /// Nothing more is told.
    pub(in crate::engine) fn close(&self) {
        self.lock().complete = true;
    }

    pub(in crate::engine) fn is_complete(&self) -> bool {
        self.lock().complete
    }

    /// Whether anything is known.
    pub(in crate::engine) fn is_empty(&self) -> bool {
        self.lock().blocks == 0
    }

    /// Bytes that were not sent.
    pub(in crate::engine) fn same_bytes(&self) -> u64 {
        self.lock().same_bytes
    }

    /// Whether a whole block holds this there; `None` is zeroes. If it does not, nothing is known of it from now on: it is sent.
    pub(super) fn is_same(&self, disk: u16, block: u64, content: Option<&[u8]>, bytes: usize) -> bool {
        let known = self.swap(disk, block, None);
        if known == UNKNOWN {
            return false;
        }
        let wanted = content.map_or(ZERO, block_digest);
        if wanted != known {
            self.swap(disk, block, Some(UNKNOWN));
            return false;
        }
        self.lock().same_bytes += bytes as u64;
        true
    }

    /// What it holds changes.
    pub(super) fn forget(&self, disk: u16, block: u64) {
        self.swap(disk, block, Some(UNKNOWN));
    }

    fn swap(&self, disk: u16, block: u64, new: Option<BlockDigest>) -> BlockDigest {
        let mut state = self.lock();
        let known = state.disks.get_mut(usize::from(disk)).and_then(|blocks| blocks.get_mut(usize::try_from(block).ok()?));
        let Some(known) = known else { return UNKNOWN };
        let before = *known;
        *known = new.unwrap_or(before);
        before
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn block_digest(block: &[u8]) -> BlockDigest {
    if is_zero(block) {
        return ZERO;
    }
    let mut beginning = ZERO;
    beginning.iter_mut().zip(digest(&SHA256, block).as_ref()).for_each(|(to, from)| *to = *from);
    beginning
}

/// Reads disks of the destination behind the socket at `at`, and tells of every block in order.
///
/// # Errors
/// The hypervisor is gone or cannot read them.
pub(in crate::engine) async fn tell_held(
    at: &Path,
    disks: &[Disk],
    held: &[u16],
    tell: &mpsc::Sender<(u16, Vec<BlockDigest>)>,
) -> io::Result<()> {
    let mut left = limits::DISK_HELD_BLOCKS_MAX;
    let mut buffer = vec![0; READ_BYTES];
    for (index, disk) in held.iter().filter_map(|index| Some((*index, disks.get(usize::from(*index))?))) {
        let mut stream = UnixStream::connect(at).await?;
        enter(&mut stream, &disk.device, false).await?;
        let mut offset = 0;
        while offset < disk.bytes && left > 0 {
            let count = usize::try_from(disk.bytes - offset).unwrap_or(READ_BYTES).min(READ_BYTES);
            let part = buffer.get_mut(..count).unwrap_or_default();
            read_block(&mut stream, offset, part).await?;
            let blocks: Vec<_> = part.chunks(BLOCK_BYTES).take(left).map(block_digest).collect();
            left -= blocks.len();
            offset += count as u64;
            if tell.send((index, blocks)).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// WHY: a message for each 4 MiB costs little, and says soon enough how it goes on.
const READ_BYTES: usize = 64 * BLOCK_BYTES;

const _: () = assert!(READ_BYTES / BLOCK_BYTES <= limits::DISK_HELD_PART);

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> [Disk; 2] {
        ["disk0", "disk1"].map(|device| Disk { device: device.to_owned(), bytes: 3 * BLOCK_BYTES as u64 - 1 })
    }

    fn digests(parts: &[&[u8]]) -> Vec<BlockDigest> {
        parts.iter().map(|part| block_digest(part)).collect()
    }

    #[test]
    fn what_is_the_same_there_is_known_until_it_changes() {
        let (held, block) = (Held::default(), vec![7; BLOCK_BYTES]);
        held.take(&disks(), 1, &digests(&[&block, &[0; BLOCK_BYTES]]), false).unwrap();
        assert!(!held.is_complete() && !held.is_empty());
        held.take(&disks(), 1, &digests(&[&[5; BLOCK_BYTES - 1]]), true).unwrap();
        assert!(held.is_complete());
        assert!(held.is_same(1, 0, Some(&block), BLOCK_BYTES) && held.is_same(1, 0, Some(&block), BLOCK_BYTES));
        assert!(held.is_same(1, 1, None, BLOCK_BYTES) && held.is_same(1, 1, Some(&[0; BLOCK_BYTES]), BLOCK_BYTES));
        assert!(held.is_same(1, 2, Some(&[5; BLOCK_BYTES - 1]), BLOCK_BYTES - 1));
        assert_eq!(held.same_bytes(), 5 * BLOCK_BYTES as u64 - 1);
        assert!(!held.is_same(0, 0, None, 1) && !held.is_same(1, 3, None, 1) && !held.is_same(9, 0, None, 1), "never told");
        assert!(!held.is_same(1, 0, Some(&[8; BLOCK_BYTES]), BLOCK_BYTES));
        assert!(!held.is_same(1, 0, Some(&block), BLOCK_BYTES), "it was sent, and is on its way");
        held.forget(1, 1);
        assert!(!held.is_same(1, 1, None, BLOCK_BYTES));
    }

    // SPEC: PROTOCOL.md#must-disk-held
    #[test]
    fn what_is_told_out_of_order_is_refused() {
        let held = Held::default();
        let refused = |result: Result<(), EngineError>| assert_eq!(result.unwrap_err().class(), crate::wire::ErrorClass::PeerMisbehaved);
        refused(held.take(&disks(), 2, &[], true));
        held.take(&disks(), 0, &[ZERO; 3], false).unwrap();
        refused(held.take(&disks(), 0, &[ZERO; 1], false));
        refused(held.take(&disks(), 1, &[ZERO; 4], false));
        held.take(&disks(), 1, &[ZERO; 3], true).unwrap();
        refused(held.take(&disks(), 1, &[], true));
    }
}
