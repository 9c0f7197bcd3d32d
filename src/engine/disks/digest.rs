//! What a disk holds, read through its hypervisor, in a number that both ends can compare.

use std::io;
use std::path::Path;

use ring::digest::{Context, SHA256};
use tokio::net::UnixStream;

use super::serve::{BLOCK_BYTES, is_zero};
use crate::hypervisor::Disk;
use crate::storage::nbd::{enter, read_block};

/// SHA-256 of each disk behind the socket at `at`, as `PROTOCOL.md` has it.
///
/// # Errors
/// The hypervisor is gone or cannot read it, or it is shorter than it has to be.
pub(in crate::engine) async fn digest_disks(at: &Path, disks: &[Disk]) -> io::Result<Vec<[u8; 32]>> {
    let mut digests = Vec::with_capacity(disks.len());
    for disk in disks {
        digests.push(digest(at, disk).await?);
    }
    Ok(digests)
}

async fn digest(at: &Path, disk: &Disk) -> io::Result<[u8; 32]> {
    let mut stream = UnixStream::connect(at).await?;
    let there = enter(&mut stream, &disk.device, false).await?;
    if there < disk.bytes {
        return Err(io::Error::other(format!("disk `{}` has {there} bytes: expected {}", disk.device, disk.bytes)));
    }
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; READ_BYTES];
    let mut offset = 0;
    while offset < disk.bytes {
        let count = usize::try_from(disk.bytes - offset).unwrap_or(READ_BYTES).min(READ_BYTES);
        let part = buffer.get_mut(..count).unwrap_or_default();
        read_block(&mut stream, offset, part).await?;
        for (index, block) in part.chunks(BLOCK_BYTES).enumerate() {
            if !is_zero(block) {
                context.update(&(offset + (index * BLOCK_BYTES) as u64).to_le_bytes());
                context.update(block);
            }
        }
        offset += count as u64;
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    Ok(digest)
}

const READ_BYTES: usize = 16 * BLOCK_BYTES;
