//! The way back of a stream: what the destination's hypervisor writes, on its way to the source's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, watch};

use super::Broken;
use super::kept::Kept;
use crate::condense::{FOLLOWED_BYTES_MAX, Follow};
use crate::engine::EngineError;
use crate::limits;

/// At the destination: what was written and is not with the other hypervisor. `INVARIANT(stream-window)`: bounded, so the hypervisor is not
/// read beyond that.
#[derive(Debug, Default)]
pub(super) struct BackOut {
    kept: Mutex<Kept>,
    ready: Notify,
    room: Notify,
}

impl BackOut {
    /// Reads what the hypervisor writes back, to its end.
    pub(super) async fn read_from(&self, mut stream: OwnedReadHalf, mut walk: impl Follow) -> Result<(), Broken> {
        let (mut held, mut filled) = (vec![0; READ_BYTES + FOLLOWED_BYTES_MAX], 0);
        loop {
            while self.lock().under_way() + held.len() as u64 > limits::STREAM_BACK_WINDOW_BYTES {
                self.room.notified().await;
            }
            match stream.read(held.get_mut(filled..).unwrap_or_default()).await? {
                0 => return Ok(()),
                count => filled += count,
            }
            let taken = walk.take_in(held.get(..filled).unwrap_or_default())?;
            if taken > 0 {
                self.lock().put(Bytes::copy_from_slice(held.get(..taken).unwrap_or_default()), 0);
                self.ready.notify_one();
            }
            held.copy_within(taken..filled, 0);
            filled -= taken;
        }
    }

    /// Says so much more, once there is room for it; it may be none of the hypervisor's.
    pub(super) async fn put(&self, bytes: &[u8]) {
        while self.lock().under_way() + bytes.len() as u64 > limits::STREAM_BACK_WINDOW_BYTES {
            self.room.notified().await;
        }
        self.lock().put(Bytes::copy_from_slice(bytes), 0);
        self.ready.notify_one();
    }

    /// Whether the other hypervisor has all that was put here.
    pub(super) fn is_applied(&self) -> bool {
        self.lock().under_way() == 0
    }

    /// The next piece to say, and where it begins. May be dropped and called again.
    pub(super) async fn next(&self) -> (u64, Vec<u8>) {
        loop {
            let piece = self.lock().next();
            match piece {
                Some(piece) => return (piece.offset, piece.bytes.to_vec()),
                None => self.ready.notified().await,
            }
        }
    }

    /// The other hypervisor has so much. False when that cannot be.
    #[must_use]
    pub(super) fn applied(&self, bytes: u64) -> bool {
        if !self.lock().applied(bytes) {
            return false;
        }
        self.room.notify_one();
        true
    }

    /// Whatever is not applied is said again, in another session.
    pub(super) fn say_again(&self) {
        self.lock().send_again();
        self.ready.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At the source: what came, and is not with the hypervisor.
#[derive(Debug)]
pub(super) struct BackIn {
    state: Mutex<In>,
    arrived: Notify,
    given: watch::Sender<u64>,
}

#[derive(Debug)]
struct In {
    walk: Box<dyn Follow>,
    /// The beginning of a message.
    held: Vec<u8>,
    /// Whole messages for the hypervisor.
    queue: Vec<u8>,
    received: u64,
    acknowledged: u64,
}

impl BackIn {
    pub(super) fn new(walk: impl Follow + 'static) -> Self {
        let state = In { walk: Box::new(walk), held: Vec::new(), queue: Vec::new(), received: 0, acknowledged: 0 };
        Self { state: Mutex::new(state), arrived: Notify::new(), given: watch::Sender::new(0) }
    }

    // SPEC: PROTOCOL.md#must-back-once
    /// Takes a piece. What was there before is dropped: an outage brings it again. `INVARIANT(in-order-once)`
    ///
    /// # Errors
    /// It leaves a gap or lies outside of the window, or what it says is not sound.
    pub(super) fn take_in(&self, offset: u64, bytes: &[u8]) -> Result<(), EngineError> {
        let mut state = self.lock();
        let end = offset.saturating_add(bytes.len() as u64);
        if offset > state.received || end > state.acknowledged.saturating_add(limits::STREAM_BACK_WINDOW_BYTES) {
            let got = format!("{} bytes at {offset}, where {} came", bytes.len(), state.received);
            return Err(EngineError::OutOfPlace { expected: "the next piece of the way back", got });
        }
        let known = usize::try_from(state.received - offset).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(known..).filter(|new| !new.is_empty()) else { return Ok(()) };
        state.received += new.len() as u64;
        state.held.extend_from_slice(new);
        let In { walk, held, queue, .. } = &mut *state;
        let taken =
            walk.take_in(held).map_err(|unsound| EngineError::OutOfPlace { expected: "a sound way back", got: unsound.to_string() })?;
        queue.extend(held.drain(..taken));
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    /// Gives the hypervisor what comes, for as long as it is asked to.
    pub(super) async fn write_to(&self, mut stream: OwnedWriteHalf) -> Result<(), Broken> {
        loop {
            let next = self.next().await;
            stream.write_all(&next).await?;
            self.was_given(next.len());
        }
    }

    /// What has come and was not taken. May be dropped and called again.
    pub(super) async fn next(&self) -> Vec<u8> {
        loop {
            let next = std::mem::take(&mut self.lock().queue);
            if !next.is_empty() {
                return next;
            }
            self.arrived.notified().await;
        }
    }

    /// The hypervisor was given so much more.
    pub(super) fn was_given(&self, bytes: usize) {
        self.given.send_modify(|given| *given += bytes as u64);
    }

    /// Tells how much the hypervisor was given.
    pub(super) fn given(&self) -> watch::Receiver<u64> {
        self.given.subscribe()
    }

    /// The destination is told that so much was given.
    pub(super) fn acknowledge(&self, bytes: u64) {
        self.lock().acknowledged = bytes;
    }

    /// Pages that were asked for.
    pub(super) fn faults(&self) -> u64 {
        self.lock().walk.faults()
    }

    fn lock(&self) -> MutexGuard<'_, In> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// WHY: a request has some 20 bytes, and none waits for others.
const READ_BYTES: usize = 16 * 1024;
const _: () = assert!(READ_BYTES + FOLLOWED_BYTES_MAX <= limits::STREAM_BACK_PIECE_BYTES_MAX);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::condense::{BackWalk, Grammar};
    use tokio::net::UnixStream;

    const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];

    #[tokio::test]
    async fn what_is_written_back_comes_once_and_in_order_whatever_is_said_again() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let (out, back) = (Arc::new(BackOut::default()), Arc::new(BackIn::new(BackWalk::new(Grammar::Opaque))));
        let reading = tokio::spawn({
            let out = Arc::clone(&out);
            async move { out.read_from(ours.into_split().0, BackWalk::new(Grammar::Opaque)).await }
        });
        let (source, mut qemu) = UnixStream::pair().unwrap();
        let writing = tokio::spawn({
            let back = Arc::clone(&back);
            async move { back.write_to(source.into_split().1).await }
        });
        let (_read, mut write) = theirs.into_split();
        // A message in two parts is one piece.
        write.write_all(&PONG[..3]).await.unwrap();
        write.write_all(&PONG[3..]).await.unwrap();
        let (offset, piece) = out.next().await;
        assert_eq!((offset, piece.as_slice()), (0, PONG.as_slice()));
        back.take_in(offset, &piece).unwrap();
        let mut given = back.given();
        given.wait_for(|given| *given == 8).await.unwrap();
        back.acknowledge(8);
        write.write_all(&[0, 1, 0, 4, 0, 0, 0, 0]).await.unwrap();
        let (offset, shut) = out.next().await;
        assert_eq!(offset, 8);
        out.say_again();
        assert_eq!(out.next().await.0, 0, "nothing was named");
        back.take_in(0, &PONG).unwrap();
        back.take_in(4, &[&PONG[4..], &shut].concat()).unwrap();
        assert!(out.applied(16) && !out.applied(15) && !out.applied(17));
        let mut all = [0; 16];
        qemu.read_exact(&mut all).await.unwrap();
        assert_eq!(all, [PONG, [0, 1, 0, 4, 0, 0, 0, 0]].concat().as_slice());
        drop(write);
        reading.await.unwrap().unwrap();
        writing.abort();
    }

    // SPEC: PROTOCOL.md#must-back-once
    #[test]
    fn a_gap_and_more_than_the_window_are_refused() {
        let back = BackIn::new(BackWalk::new(Grammar::Opaque));
        back.take_in(0, &PONG).unwrap();
        for (offset, bytes) in [(9, PONG.to_vec()), (u64::MAX, PONG.to_vec()), (0, vec![0; 1 + (1 << 20)]), (8, vec![9; 4])] {
            let refused = back.take_in(offset, &bytes).unwrap_err();
            assert_eq!(refused.class(), crate::wire::ErrorClass::PeerMisbehaved, "{offset}: {refused}");
        }
    }
}
