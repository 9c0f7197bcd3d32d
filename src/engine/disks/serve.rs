//! The gateway's NBD server at the source: its only clients are the mirrors of the guest's hypervisor.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::held::Held;
use super::outgoing::{Change, DiskOut};
use crate::hypervisor::Disk;
use crate::limits;
use crate::storage::nbd::{NbdAsked, NbdExport, next_request, reply, welcome};
use crate::wire::DiskChange;

/// Serves until it is dropped; whatever is asked then fails.
#[derive(Debug)]
pub(in crate::engine) struct DiskServer {
    task: JoinHandle<()>,
    at: PathBuf,
}

impl DiskServer {
    /// Listens at `at`, for this user alone.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(in crate::engine) fn start(at: &Path, disks: &[Disk], out: Arc<DiskOut>, held: Arc<Held>) -> io::Result<Self> {
        // One that a gateway that was killed has left.
        let _ = std::fs::remove_file(at);
        let listener = UnixListener::bind(at)?;
        std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o600))?;
        let exports: Arc<[NbdExport]> = disks.iter().map(|disk| NbdExport { name: disk.device.clone(), bytes: disk.bytes }).collect();
        Ok(Self { task: tokio::spawn(accept(listener, exports, out, held)), at: at.to_owned() })
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.at);
    }
}

async fn accept(listener: UnixListener, exports: Arc<[NbdExport]>, out: Arc<DiskOut>, held: Arc<Held>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < limits::NBD_CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, Arc::clone(&exports), Arc::clone(&out), Arc::clone(&held)))),
                Err(error) => {
                    tracing::warn!(%error, "a hypervisor's connection for its disks is not taken");
                    tokio::time::sleep(limits::GREETING_WITHIN / 10).await;
                }
            },
            Some(ended) = connections.join_next() => {
                if let Ok(Err(error)) = ended {
                    tracing::debug!(%error, "a hypervisor's connection for its disks ended");
                }
            }
        }
    }
}

async fn serve(mut stream: UnixStream, exports: Arc<[NbdExport]>, out: Arc<DiskOut>, held: Arc<Held>) -> io::Result<()> {
    let chosen = tokio::time::timeout(limits::GREETING_WITHIN, welcome(&mut stream, &exports)).await??;
    let Some((disk, export)) = chosen.and_then(|index| Some((u16::try_from(index).ok()?, exports.get(index)?))) else { return Ok(()) };
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let (replies, mut replied) = mpsc::channel(limits::DISK_CHANGES_MAX);
    let ask = async {
        loop {
            match next_request(&mut reader, export).await? {
                NbdAsked::Disconnect => return Ok(()),
                NbdAsked::Refused { cookie, error } => {
                    // Its task is the other half of this one.
                    let _ = replies.send((cookie, error)).await;
                }
                NbdAsked::Change { cookie, change, offset, bytes, data } => {
                    let changes = cut((disk, export.bytes), change, offset, bytes, data.into(), &held);
                    if changes.is_empty() {
                        // All of it is there.
                        let _ = replies.send((cookie, 0)).await;
                        continue;
                    }
                    if !out.submit(changes, cookie, replies.clone()).await {
                        return Err(io::Error::other("nothing is taken any more"));
                    }
                }
            }
        }
    };
    let answer = async {
        while let Some((cookie, error)) = replied.recv().await {
            writer.write_all(&reply(cookie, error)).await?;
        }
        Ok(())
    };
    tokio::select! {
        asked = ask => asked,
        answered = answer => answered,
    }
}

/// A request as changes that each fit a frame. What is written as zeroes becomes a hole: a mirror reads what its disk holds, and
/// takes everything that was ever written for data. What the destination holds already is no change.
fn cut((disk, disk_bytes): (u16, u64), change: DiskChange, offset: u64, bytes: u32, data: Bytes, held: &Held) -> Vec<Change> {
    let nothing_known = held.is_empty();
    if change == DiskChange::Flush || (change != DiskChange::Write && nothing_known) {
        return vec![Change { disk, change, offset, bytes, data }];
    }
    let (mut changes, mut here, end): (Vec<Change>, _, _) = (Vec::new(), offset, offset + u64::from(bytes));
    while here < end {
        // Blocks are those of the disk, wherever a request begins.
        let (number, into) = (here / BLOCK_BYTES as u64, here % BLOCK_BYTES as u64);
        let length = (BLOCK_BYTES as u64 - into).min(end - here);
        let (at, next) = (here - offset, here + length);
        let slice = |from: u64, to: u64| data.slice(usize::try_from(from).unwrap_or(0)..usize::try_from(to).unwrap_or(0));
        let block = if change == DiskChange::Write { slice(at, at + length) } else { Bytes::new() };
        let kind = if change == DiskChange::Write && is_zero(&block) { DiskChange::Zero } else { change };
        let begins = here;
        here = next;
        if !nothing_known {
            let whole = into == 0 && (length == BLOCK_BYTES as u64 || next == disk_bytes);
            let content = (kind == DiskChange::Write).then_some(&block[..]);
            if whole && kind != DiskChange::Discard && held.is_same(disk, number, content, usize::try_from(length).unwrap_or(0)) {
                continue;
            }
            held.forget(disk, number);
        }
        let more = u32::try_from(length).unwrap_or(0);
        match changes.last_mut() {
            Some(last)
                if last.change == kind
                    && last.offset + u64::from(last.bytes) == begins
                    && (kind != DiskChange::Write || last.data.len() + block.len() <= PIECE_BYTES_MAX) =>
            {
                last.bytes += more;
                if kind == DiskChange::Write {
                    last.data = slice(last.offset - offset, at + length);
                }
            }
            _ => {
                let data = if kind == DiskChange::Write { block } else { Bytes::new() };
                changes.push(Change { disk, change: kind, offset: begins, bytes: more, data });
            }
        }
    }
    changes
}

pub(super) fn is_zero(block: &[u8]) -> bool {
    block.chunks(ZEROES.len()).all(|part| ZEROES.starts_with(part))
}

static ZEROES: [u8; 4096] = [0; 4096];
/// What zeroes are looked for in. WHY: smaller holes are none to most formats of disks.
pub(super) const BLOCK_BYTES: usize = 64 * 1024;
const PIECE_BYTES_MAX: usize = limits::STREAM_CHUNK_BYTES_MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::nbd::{enter, read_reply, request};

    fn shape(changes: &[Change]) -> Vec<(DiskChange, u64, u32, usize)> {
        changes.iter().map(|change| (change.change, change.offset, change.bytes, change.data.len())).collect()
    }

    #[test]
    fn a_write_is_cut_into_data_and_holes() {
        use DiskChange::{Write as W, Zero as Z};
        let block = 65_536_u32;
        let mut data = vec![0_u8; 8 * BLOCK_BYTES];
        data[3 * BLOCK_BYTES + 5] = 1;
        data[4 * BLOCK_BYTES] = 2;
        let (held, disk) = (Held::default(), (1, 1 << 40));
        let changes = cut(disk, W, 1 << 30, 8 * block, data.clone().into(), &held);
        let third = (1 << 30) + 3 * u64::from(block);
        assert_eq!(
            shape(&changes),
            [(Z, 1 << 30, 3 * block, 0), (W, third, 2 * block, 2 * BLOCK_BYTES), (Z, third + 2 * u64::from(block), 3 * block, 0)]
        );
        assert_eq!(changes[1].data, data[3 * BLOCK_BYTES..5 * BLOCK_BYTES]);
        // Blocks are the disk's.
        let changes = cut(disk, W, 512, block, vec![7; BLOCK_BYTES].into(), &held);
        assert_eq!(shape(&changes), [(W, 512, block, BLOCK_BYTES)]);
        let changes = cut(disk, W, 512, block, vec![0; BLOCK_BYTES].into(), &held);
        assert_eq!(shape(&changes), [(Z, 512, block, 0)]);
        let changes = cut(disk, W, 0, 9 * block, vec![7; 9 * BLOCK_BYTES].into(), &held);
        assert_eq!(
            shape(&changes),
            [
                (W, 0, 4 * block, 4 * BLOCK_BYTES),
                (W, 4 * u64::from(block), 4 * block, 4 * BLOCK_BYTES),
                (W, 8 * u64::from(block), block, BLOCK_BYTES)
            ]
        );
        let zero = cut(disk, Z, 9, u32::MAX, Bytes::new(), &held);
        assert_eq!(shape(&zero), [(Z, 9, u32::MAX, 0)]);
    }

    #[test]
    fn what_is_there_already_is_no_change() {
        use DiskChange::{Discard as D, Write as W, Zero as Z};
        let (held, block) = (Held::default(), BLOCK_BYTES as u64);
        let disks = [Disk { device: "disk0".to_owned(), bytes: 4 * block }];
        held.take(&disks, 0, &[[0; 16]; 4], true).unwrap();
        let mut data = vec![0; 4 * BLOCK_BYTES];
        data[2 * BLOCK_BYTES] = 1;
        let cut = |change, offset, bytes: u64, data: Vec<u8>| {
            shape(&super::cut((0, 4 * block), change, offset, u32::try_from(bytes).unwrap(), data.into(), &held))
        };
        assert_eq!(cut(Z, 0, 4 * block, Vec::new()), []);
        assert_eq!(cut(W, 0, 4 * block, data.clone()), [(W, 2 * block, 65_536, BLOCK_BYTES)]);
        // It is on its way, and so is what comes behind it.
        assert_eq!(cut(Z, 0, 4 * block, Vec::new()), [(Z, 2 * block, 65_536, 0)]);
        assert_eq!(cut(Z, 512, block, Vec::new()), [(Z, 512, 65_536, 0)]);
        assert_eq!(cut(D, 3 * block, block, Vec::new()), [(D, 3 * block, 65_536, 0)]);
        assert_eq!(cut(W, 0, 4 * block, data), [(Z, 0, 131_072, 0), (W, 2 * block, 65_536, BLOCK_BYTES), (Z, 3 * block, 65_536, 0)]);
    }

    #[tokio::test]
    async fn a_client_writes_and_is_answered_when_it_is_applied() {
        let directory = tempfile::tempdir().unwrap();
        let (at, out) = (directory.path().join("nbd"), Arc::new(DiskOut::default()));
        out.has_begun();
        let disks = [Disk { device: "disk0".to_owned(), bytes: 1 << 20 }];
        let server = DiskServer::start(&at, &disks, Arc::clone(&out), Arc::default()).unwrap();
        assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o600);
        let mut client = UnixStream::connect(&at).await.unwrap();
        assert_eq!(enter(&mut client, "disk0", true).await.unwrap(), 1 << 20);
        client.write_all(&request(5, DiskChange::Write, 4096, 3)).await.unwrap();
        client.write_all(b"abc").await.unwrap();
        client.write_all(&request(6, DiskChange::Flush, 9, 9)).await.unwrap();
        let (number, settled, change) = out.next().await;
        assert_eq!((number, settled, change.offset, &change.data[..]), (0, 0, 4096, b"abc".as_slice()));
        assert_eq!(read_reply(&mut client).await.unwrap().0, 6, "what makes no sense is refused at once");
        assert!(out.applied(&[0]));
        assert_eq!(read_reply(&mut client).await.unwrap().0, 5);
        client.write_all(&request(7, DiskChange::Zero, 0, 1 << 20)).await.unwrap();
        let _under_way = out.next().await;
        drop(server);
        assert!(read_reply(&mut client).await.is_err() && !at.exists());
    }
}
