//! What was read of a hypervisor's stream and is not with the other hypervisor yet.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use super::intake::Intake;
use super::kept::{Kept, Piece};
use super::{Broken, Whole};
use crate::condense::{Condenser, Parcel, Split};
use crate::limits;

/// Pieces on their way. `INVARIANT(stream-window)`: together they are at most the window.
#[derive(Debug)]
pub(super) struct Outflow {
    state: Mutex<State>,
    /// A piece waits for a lane.
    ready: Notify,
    /// There is room for another piece.
    room: Notify,
    /// Lanes have taken all there is.
    idle: Notify,
    /// What came until the stream was split, if it was.
    split: watch::Sender<Option<Whole>>,
    /// Whether one that was split was read to its end.
    ended: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    /// Parcels, which any lane may carry.
    kept: Kept,
    window: u64,
    /// What is read at once and makes a piece, where a guest waits for pages.
    piece: Option<usize>,
    /// Whether the window was full since somebody looked.
    was_full: bool,
}

impl Outflow {
    /// For a path that takes at most so many bytes a second, where that is known.
    pub(super) fn new(rate_max: Option<u64>) -> Self {
        let window = rate_max.map_or(FIRST_WINDOW_BYTES, |rate| (rate / 10).clamp(WINDOW_BYTES_MIN, FIRST_WINDOW_BYTES));
        let state = State { kept: Kept::default(), window, piece: None, was_full: false };
        let (split, ended) = (watch::Sender::new(None), watch::Sender::new(false));
        Self { state: Mutex::new(state), ready: Notify::new(), room: Notify::new(), idle: Notify::new(), split, ended }
    }

    /// Reads the hypervisor's stream to its end, no faster than there is room for what becomes of it.
    pub(super) async fn read_from(&self, mut stream: Intake, condenser: &std::sync::Mutex<Condenser>) -> Result<Whole, Broken> {
        let condenser = || condenser.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = vec![0; READ_BYTES];
        let mut filled = 0;
        loop {
            let piece = self.lock().piece;
            if let Some(bytes) = piece {
                // Whatever is read here goes ahead of a page that the guest asks for meanwhile.
                self.wait_for_room(bytes).await;
            }
            let end = piece.map_or(held.len(), |bytes| held.len().min(filled + bytes));
            match stream.try_read(held.get_mut(filled..end).unwrap_or_default())? {
                Some(0) => break,
                Some(count) => {
                    filled += count;
                    let taken = condenser().take_in(held.get(..filled).unwrap_or_default())?;
                    held.copy_within(taken..filled, 0);
                    filled -= taken;
                    self.put_all(|| condenser().parcels(piece.is_some())).await;
                    if let Some(Split { bytes, digest }) = condenser().take_split() {
                        self.split.send_replace(Some(Whole::new(bytes, digest)));
                    }
                    if condenser().has_ended() {
                        self.ended.send_replace(true);
                    }
                    // What there is to read may have no end, and others want this thread too.
                    tokio::task::yield_now().await;
                }
                None => {
                    condenser().let_tail_go()?;
                    // A parcel that is not full is worth a lane that has nothing else.
                    let idle = self.is_idle();
                    self.put_all(|| condenser().parcels(idle)).await;
                    tokio::select! {
                        ready = stream.readable() => ready?,
                        () = self.idle.notified(), if !idle => {}
                    }
                }
            }
        }
        condenser().end(held.get(..filled).unwrap_or_default())?;
        self.put_all(|| condenser().parcels(true)).await;
        Ok(Whole::new(self.read_bytes(), condenser().digest()))
    }

    async fn put_all(&self, parcels: impl Fn() -> std::vec::IntoIter<Parcel>) {
        for Parcel { bytes, pages } in parcels() {
            self.wait_for_room(bytes.len()).await;
            self.put(bytes.into(), pages);
        }
    }

    /// Tells where the stream was split.
    pub(super) fn split(&self) -> watch::Receiver<Option<Whole>> {
        self.split.subscribe()
    }

    /// Tells when the last byte of a stream that was split was read.
    pub(super) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    fn is_idle(&self) -> bool {
        !self.lock().kept.has_next()
    }

    async fn wait_for_room(&self, bytes: usize) {
        loop {
            // Told or not since: whoever makes room leaves a permit.
            let room = {
                let mut state = self.lock();
                let under_way = state.kept.under_way();
                // One that is larger than a window that became small goes alone.
                let room = under_way == 0 || state.window.saturating_sub(under_way) >= bytes as u64;
                state.was_full |= !room;
                room
            };
            if room {
                return;
            }
            self.room.notified().await;
        }
    }

    fn put(&self, bytes: Bytes, pages: u64) {
        self.lock().kept.put(bytes, pages);
        self.ready.notify_one();
    }

    /// The next piece for a lane. May be dropped and called again.
    pub(super) async fn next(&self) -> Piece {
        loop {
            let (piece, more) = {
                let mut state = self.lock();
                (state.kept.next(), state.kept.has_next())
            };
            // One permit is kept at most, and there may be more pieces than that.
            if more {
                self.ready.notify_one();
            } else {
                self.idle.notify_one();
            }
            match piece {
                Some(piece) => return piece,
                None => self.ready.notified().await,
            }
        }
    }

    /// The other hypervisor has so much. False when that cannot be.
    #[must_use]
    pub(super) fn applied(&self, bytes: u64) -> bool {
        if !self.lock().kept.applied(bytes) {
            return false;
        }
        self.room.notify_one();
        true
    }

    /// Everything that is not applied goes out again, on new lanes. How many bytes that is of what was sent before.
    pub(super) fn send_again(&self) -> u64 {
        let again = self.lock().kept.send_again();
        self.ready.notify_one();
        again
    }

    /// Whether all that was read until now is applied.
    pub(super) fn read_bytes(&self) -> u64 {
        self.lock().kept.read_bytes()
    }

    pub(super) fn applied_bytes(&self) -> u64 {
        self.lock().kept.applied_bytes()
    }

    /// Sets how much may be on its way, within its bounds.
    pub(super) fn set_window(&self, bytes: u64) {
        self.lock().window = bytes.clamp(WINDOW_BYTES_MIN, limits::STREAM_WINDOW_BYTES);
        self.room.notify_one();
    }

    /// The same, where a guest waits for pages: pieces of about so many bytes are taken, and a few may be on their way besides.
    pub(super) fn set_split_window(&self, bytes: u64, piece: u64, pieces: u64) {
        let piece = piece.clamp(PIECE_BYTES_MIN, limits::STREAM_CHUNK_BYTES_MAX as u64);
        let mut state = self.lock();
        state.piece = usize::try_from(piece).ok();
        state.window = (bytes + pieces * piece).min(limits::STREAM_WINDOW_BYTES);
        drop(state);
        self.room.notify_one();
    }

    /// Whether the window has held the hypervisor up since this was asked last.
    pub(super) fn was_full(&self) -> bool {
        std::mem::take(&mut self.lock().was_full)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// WHY: what waits here when the guest is paused goes out before the rest of it, so it is no more than the path needs; what that
/// is shows within a few looks.
const FIRST_WINDOW_BYTES: u64 = 4 << 20;
/// WHY: more than a socket holds, so that the hypervisor goes on writing while this is looked at.
const READ_BYTES: usize = 512 * 1024;
/// WHY: less costs more for each byte than it saves a page that waits behind it.
const PIECE_BYTES_MIN: u64 = 16 * 1024;
/// WHY: one piece.
const WINDOW_BYTES_MIN: u64 = limits::STREAM_CHUNK_BYTES_MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    async fn filled(bytes: usize) -> (Outflow, UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let flow = Outflow::new(None);
        for piece in vec![7; bytes].chunks(1000) {
            flow.put(Bytes::copy_from_slice(piece), 0);
        }
        (flow, ours, theirs)
    }

    #[tokio::test]
    async fn pieces_go_out_once_in_order_and_again_only_when_they_were_lost() {
        let (flow, ..) = filled(2500).await;
        let offsets = [flow.next().await.offset, flow.next().await.offset];
        assert_eq!(offsets, [0, 1000]);
        assert!(flow.applied(1000));
        assert_eq!(flow.send_again(), 1000, "one of the two that were sent");
        assert_eq!(flow.next().await.offset, 1000);
        let last = flow.next().await;
        assert_eq!((last.offset, last.bytes.len()), (2000, 500));
    }

    #[tokio::test]
    async fn a_part_of_a_piece_keeps_all_of_it() {
        let (flow, ..) = filled(2000).await;
        flow.next().await;
        assert!(flow.applied(999));
        flow.send_again();
        assert_eq!(flow.next().await.offset, 0);
    }

    #[tokio::test]
    async fn what_cannot_have_been_applied_is_refused() {
        let (flow, ..) = filled(1000).await;
        assert!(!flow.applied(1001));
        assert!(flow.applied(700) && flow.applied(700) && !flow.applied(699));
    }

    /// `INVARIANT(stream-window)`
    #[tokio::test]
    async fn a_full_window_is_felt_by_the_writer() {
        let (flow, ours, mut theirs) = filled(0).await;
        flow.set_window(0);
        let flow = std::sync::Arc::new(flow);
        let reading = tokio::spawn({
            let flow = std::sync::Arc::clone(&flow);
            let condenser = std::sync::Mutex::new(Condenser::new(crate::condense::Grammar::Opaque, [0, 0], Box::new([0; 192])));
            async move { flow.read_from(Intake::One(ours.into_split().0), &condenser).await.unwrap() }
        });
        let piece = vec![1; 64 * 1024];
        let writing = tokio::spawn(async move {
            for _ in 0..64 {
                theirs.write_all(&piece).await.unwrap();
            }
        });
        while flow.read_bytes() == 0 {
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert!(flow.read_bytes() <= WINDOW_BYTES_MIN);
        // Nobody takes the pieces, and what is applied makes room only for as much.
        while flow.read_bytes() < 2 * WINDOW_BYTES_MIN {
            assert!(flow.applied(flow.read_bytes()));
            while flow.read_bytes() - flow.applied_bytes() < WINDOW_BYTES_MIN / 8 {
                flow.next().await;
                tokio::task::yield_now().await;
            }
        }
        assert!(!writing.is_finished() && flow.was_full());
        while !reading.is_finished() {
            assert!(flow.applied(flow.read_bytes()));
            let _ = tokio::time::timeout(std::time::Duration::from_millis(1), flow.next()).await;
        }
        let whole = reading.await.unwrap();
        // Entries have heads.
        assert!(whole.bytes > 64 * 64 * 1024);
        let mut expected = ring::digest::Context::new(&ring::digest::SHA256);
        expected.update(&vec![1; 64 * 64 * 1024]);
        expected.update(&(64_u64 * 64 * 1024).to_le_bytes());
        assert_eq!(whole.framing, expected.finish().as_ref());
    }

    /// Where a guest waits for pages little is read ahead of them, in small pieces, and no window is too small for one of these.
    #[tokio::test]
    async fn little_goes_ahead_of_pages_that_are_waited_for() {
        let (flow, ours, mut theirs) = filled(0).await;
        let piece = PIECE_BYTES_MIN;
        flow.set_split_window(2 * piece, 0, 2);
        let flow = std::sync::Arc::new(flow);
        let reading = tokio::spawn({
            let flow = std::sync::Arc::clone(&flow);
            let condenser = std::sync::Mutex::new(Condenser::new(crate::condense::Grammar::Opaque, [0, 0], Box::new([0; 192])));
            async move { flow.read_from(Intake::One(ours.into_split().0), &condenser).await.unwrap() }
        });
        let writing = tokio::spawn(async move { theirs.write_all(&vec![1; 1 << 20]).await.unwrap() });
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        let read = flow.read_bytes();
        assert!(read > 0 && read <= 4 * piece && !writing.is_finished() && flow.was_full(), "{read}");
        // A window that is nothing at all lets one after the other go.
        flow.set_split_window(0, 0, 0);
        let mut sent = 0;
        while !reading.is_finished() {
            if let Ok(next) = tokio::time::timeout(std::time::Duration::from_millis(1), flow.next()).await {
                assert!(next.bytes.len() as u64 <= piece + 64);
                sent += next.bytes.len() as u64;
            }
            assert!(flow.applied(sent));
        }
        assert!(reading.await.unwrap().bytes > 1 << 20);
        writing.await.unwrap();
    }
}
