//! Changes that came and are not on the destination's disk yet, and those that the source may not know to be.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

use super::outgoing::Change;
use crate::engine::EngineError;
use crate::hypervisor::Disk;
use crate::limits;
use crate::storage::nbd::{read_reply, request};
use crate::wire::{DiskChange, DiskChunk};

/// Changes of a migration at its destination. `INVARIANT(disk-once)`
#[derive(Debug)]
pub(in crate::engine) struct DiskIn {
    disks: Vec<(Disk, mpsc::Sender<(u64, Change)>)>,
    state: Mutex<State>,
    /// The source has to be told something.
    tell: Notify,
    /// Nothing is under way.
    idle: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// What the hypervisor was asked to do, and what that writes.
    under_way: BTreeMap<u64, usize>,
    /// What was done, and the source may not know.
    done: BTreeSet<u64>,
    to_tell: BTreeSet<u64>,
    settled: u64,
    bytes: usize,
    changes: u64,
    changed_bytes: u64,
    /// No change is taken any more.
    ended: bool,
}

/// Numbers from here on are our own.
const OWN: u64 = u64::MAX - limits::DISKS_MAX as u64;

impl DiskIn {
    /// For these disks, and where the changes of each come out.
    pub(in crate::engine) fn new(disks: &[Disk]) -> (Arc<Self>, Vec<mpsc::Receiver<(u64, Change)>>) {
        let (inputs, outputs): (Vec<_>, Vec<_>) = disks
            .iter()
            .map(|disk| {
                // One more for what is our own.
                let (input, output) = mpsc::channel(limits::DISK_CHANGES_MAX + 1);
                ((disk.clone(), input), output)
            })
            .unzip();
        (Arc::new(Self { disks: inputs, state: Mutex::default(), tell: Notify::new(), idle: Notify::new() }), outputs)
    }

    // SPEC: PROTOCOL.md#must-disk-bounds
    // SPEC: PROTOCOL.md#must-disk-once
    /// Takes a change from a lane. One that was there before is not made again: an outage brings it.
    ///
    /// # Errors
    /// It is out of the window or not of this VM's disks.
    pub(in crate::engine) fn take_in(&self, chunk: &DiskChunk<'_>, data: Bytes) -> Result<(), EngineError> {
        let refuse = |got: String| Err(EngineError::OutOfPlace { expected: "a change of a disk of the offer, within its window", got });
        let mut state = self.lock();
        let number = chunk.number;
        if number >= OWN {
            return refuse(format!("change {number}"));
        }
        state.settled = state.settled.max(chunk.settled);
        let settled = state.settled;
        state.done = state.done.split_off(&settled);
        // One that was sent again beside its answer, and overtaken.
        if number < settled {
            return Ok(());
        }
        if state.done.contains(&number) {
            state.to_tell.insert(number);
            self.tell.notify_one();
            return Ok(());
        }
        if state.under_way.contains_key(&number) {
            return Ok(());
        }
        if state.ended {
            return refuse(format!("change {number} behind their end"));
        }
        let Some((disk, input)) = self.disks.get(usize::from(chunk.disk)) else { return refuse(format!("disk {}", chunk.disk)) };
        if chunk.offset.saturating_add(u64::from(chunk.bytes)) > disk.bytes {
            return refuse(format!("{} bytes at {} of disk `{}`", chunk.bytes, chunk.offset, disk.device));
        }
        if state.bytes + data.len() > limits::DISK_WINDOW_BYTES || state.under_way.len() >= limits::DISK_CHANGES_MAX {
            return refuse(format!("{} more bytes, where {} are under way", data.len(), state.bytes));
        }
        state.under_way.insert(number, data.len());
        state.bytes += data.len();
        state.changes += 1;
        state.changed_bytes = state.changed_bytes.wrapping_add(u64::from(chunk.bytes));
        let change = Change { disk: chunk.disk, change: chunk.change, offset: chunk.offset, bytes: chunk.bytes, data };
        // There is room; a writer that is gone has said why elsewhere.
        let _ = input.try_send((number, change));
        Ok(())
    }

    fn applied(&self, number: u64) {
        let mut state = self.lock();
        let Some(bytes) = state.under_way.remove(&number) else { return };
        state.bytes -= bytes;
        if number < OWN {
            state.done.insert(number);
            state.to_tell.insert(number);
            self.tell.notify_one();
        }
        if state.under_way.is_empty() {
            self.idle.notify_one();
        }
    }

    /// Waits until there is something to tell. May be dropped and called again.
    pub(in crate::engine) async fn to_tell(&self) {
        while self.lock().to_tell.is_empty() {
            self.tell.notified().await;
        }
    }

    /// What the source is to be told now.
    pub(in crate::engine) fn take_to_tell(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().to_tell).into_iter().take(limits::DISK_CHANGES_MAX).collect()
    }

    /// A new session: whatever the source does not know it sends again.
    pub(in crate::engine) fn begin_again(&self) {
        self.lock().to_tell.clear();
    }

    // SPEC: PROTOCOL.md#must-disk-end
    /// Nothing changes any more, and this is what there was.
    ///
    /// # Errors
    /// There was something else.
    pub(in crate::engine) fn end(&self, changes: u64, bytes: u64) -> Result<(), EngineError> {
        let mut state = self.lock();
        if (changes, bytes) != (state.changes, state.changed_bytes) || !state.under_way.is_empty() {
            let open = state.under_way.len();
            let got =
                format!("{changes} of {bytes} bytes, where {} of {} bytes came and {open} are open", state.changes, state.changed_bytes);
            return Err(EngineError::OutOfPlace { expected: "the totals of all changes", got });
        }
        state.ended = true;
        Ok(())
    }

    /// Makes everything durable.
    pub(in crate::engine) async fn flush(&self) {
        for (index, (_, input)) in self.disks.iter().enumerate() {
            let number = OWN + index as u64;
            self.lock().under_way.insert(number, 0);
            let flush = Change { disk: 0, change: DiskChange::Flush, offset: 0, bytes: 0, data: Bytes::new() };
            let _ = input.send((number, flush)).await;
        }
        while !self.is_idle() {
            self.idle.notified().await;
        }
    }

    /// Whether nothing is under way.
    pub(in crate::engine) fn is_idle(&self) -> bool {
        self.lock().under_way.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the changes of one disk, on an export that was entered, until something fails.
    ///
    /// # Errors
    /// The hypervisor is gone, or a change could not be made.
    pub(in crate::engine) async fn write(&self, stream: UnixStream, mut changes: mpsc::Receiver<(u64, Change)>) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let ask = async {
            while let Some((number, Change { change, offset, bytes, data, .. })) = changes.recv().await {
                writer.write_all(&request(number, change, offset, bytes)).await?;
                writer.write_all(&data).await?;
            }
            Ok(())
        };
        let hear = async {
            loop {
                let (number, result) = read_reply(&mut reader).await?;
                result?;
                self.applied(number);
            }
        };
        tokio::select! {
            asked = ask => asked,
            heard = hear => heard,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::nbd::{NbdAsked, NbdExport, next_request, reply, welcome};
    use crate::wire::ErrorClass;

    fn disks() -> [Disk; 1] {
        [Disk { device: "disk0".to_owned(), bytes: 1 << 20 }]
    }

    fn chunk(number: u64, settled: u64, offset: u64) -> DiskChunk<'static> {
        DiskChunk { disk: 0, change: DiskChange::Write, number, settled, offset, bytes: 3, codec: None, block: b"abc" }
    }

    fn take(disks: &DiskIn, chunk: &DiskChunk<'_>) -> Result<(), EngineError> {
        disks.take_in(chunk, Bytes::copy_from_slice(chunk.block))
    }

    // SPEC: PROTOCOL.md#must-disk-once
    #[tokio::test]
    async fn a_change_is_made_once_and_named_as_often_as_it_is_sent() {
        let (disks, mut outputs) = DiskIn::new(&disks());
        take(&disks, &chunk(0, 0, 0)).unwrap();
        take(&disks, &chunk(1, 0, 3)).unwrap();
        take(&disks, &chunk(0, 0, 0)).unwrap();
        assert_eq!((outputs[0].recv().await.unwrap().0, outputs[0].recv().await.unwrap().0), (0, 1));
        disks.applied(0);
        disks.to_tell().await;
        assert_eq!(disks.take_to_tell(), [0]);
        // The answer was lost with its session.
        disks.begin_again();
        take(&disks, &chunk(0, 0, 0)).unwrap();
        take(&disks, &chunk(1, 0, 3)).unwrap();
        assert_eq!(disks.take_to_tell(), [0]);
        assert!(outputs[0].try_recv().is_err(), "made twice");
        disks.applied(1);
        assert_eq!(disks.take_to_tell(), [1]);
        take(&disks, &chunk(2, 2, 6)).unwrap();
        assert!(disks.lock().done.is_empty(), "what is settled is forgotten");
        take(&disks, &chunk(1, 1, 3)).unwrap();
        assert_eq!(outputs[0].recv().await.unwrap().0, 2, "and one that was overtaken is nothing new");
        disks.applied(2);
        disks.end(3, 9).unwrap();
        assert!(take(&disks, &chunk(3, 3, 9)).is_err(), "behind the end");
    }

    // SPEC: PROTOCOL.md#must-disk-bounds
    // SPEC: PROTOCOL.md#must-disk-window
    // SPEC: PROTOCOL.md#must-disk-end
    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let (disks, _outputs) = DiskIn::new(&disks());
        for hostile in [
            DiskChunk { disk: 1, ..chunk(0, 0, 0) },
            chunk(0, 0, (1 << 20) - 2),
            chunk(0, 0, u64::MAX),
            chunk(u64::MAX - 1, u64::MAX - 1, 0),
        ] {
            let refused = take(&disks, &hostile).unwrap_err();
            assert_eq!(refused.class(), ErrorClass::PeerMisbehaved, "{refused}");
        }
        take(&disks, &chunk(0, 0, 0)).unwrap();
        assert!(disks.end(1, 3).is_err(), "one is under way");
        disks.applied(0);
        assert!(disks.end(1, 4).is_err() && disks.end(2, 3).is_err());
        let piece = Bytes::from(vec![0; limits::STREAM_CHUNK_BYTES_MAX]);
        let mut number = 1;
        let refused = loop {
            match disks.take_in(&chunk(number, 1, 0), piece.clone()) {
                Ok(()) => number += 1,
                Err(refused) => break refused,
            }
        };
        assert!(disks.lock().bytes <= limits::DISK_WINDOW_BYTES, "{refused}");
    }

    #[tokio::test]
    async fn a_disk_that_is_full_ends_its_writer() {
        let (disks, outputs) = DiskIn::new(&disks());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writing = tokio::spawn({
            let (disks, output) = (Arc::clone(&disks), outputs.into_iter().next().unwrap());
            async move {
                let mut ours = ours;
                crate::storage::nbd::enter(&mut ours, "disk0", true).await.unwrap();
                disks.write(ours, output).await
            }
        });
        let export = NbdExport { name: "disk0".to_owned(), bytes: 1 << 20 };
        welcome(&mut theirs, std::slice::from_ref(&export)).await.unwrap();
        for (number, error) in [(0, 0), (1, 28)] {
            take(&disks, &chunk(number, 0, number * 3)).unwrap();
            let NbdAsked::Change { cookie, data, .. } = next_request(&mut theirs, &export).await.unwrap() else { panic!() };
            assert_eq!((cookie, data.as_slice()), (number, b"abc".as_slice()));
            theirs.write_all(&reply(cookie, error)).await.unwrap();
        }
        let failed = writing.await.unwrap().unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::StorageFull);
        assert_eq!(disks.take_to_tell(), [0]);
    }
}
