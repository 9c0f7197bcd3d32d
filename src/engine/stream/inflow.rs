//! What came of a stream and is not with the hypervisor yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Notify, watch};

use super::back::BackIn;
use super::{Broken, Whole};
use crate::condense::{Expander, Expected, Splice};
use crate::engine::EngineError;
use crate::limits;

/// Pieces that wait for those before them.
#[derive(Debug)]
pub(super) struct Inflow {
    state: Mutex<State>,
    arrived: Notify,
    /// Bytes that the hypervisor was given.
    given: watch::Sender<u64>,
    /// What was given until the stream was split, if it was.
    split: watch::Sender<Option<Whole>>,
    /// Whether the hypervisor was given the state of devices, and so loads the guest.
    loads: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    pieces: BTreeMap<u64, Bytes>,
    given: u64,
    end: Option<u64>,
}

impl Inflow {
    pub(super) fn new() -> Self {
        let (given, split, loads) = (watch::Sender::new(0), watch::Sender::new(None), watch::Sender::new(false));
        Self { state: Mutex::default(), arrived: Notify::new(), given, split, loads }
    }

    // SPEC: PROTOCOL.md#must-stream-window
    // SPEC: PROTOCOL.md#must-no-overlap
    /// Takes a piece from a lane. One that was there before is dropped: an outage brings it again.
    ///
    /// # Errors
    /// It lies outside of the window, or overlaps another one.
    pub(super) fn take_in(&self, offset: u64, bytes: Bytes) -> Result<(), EngineError> {
        let mut state = self.lock();
        let refuse = |got: String| Err(EngineError::OutOfPlace { expected: "a piece of the stream within its window", got });
        let end = offset.saturating_add(bytes.len() as u64);
        if end > state.given.saturating_add(limits::STREAM_WINDOW_BYTES) || state.end.is_some_and(|last| end > last) {
            return refuse(format!("{} bytes at {offset}, where {} are applied", bytes.len(), state.given));
        }
        if end <= state.given || state.pieces.get(&offset).is_some_and(|there| there.len() == bytes.len()) {
            return Ok(());
        }
        let before = state.pieces.range(..=offset).next_back().map_or(state.given, |(at, there)| at + there.len() as u64);
        let after = state.pieces.range(offset..).next().map_or(u64::MAX, |(at, _)| *at);
        if offset < before || end > after {
            return refuse(format!("{} bytes at {offset}, which overlap others", bytes.len()));
        }
        state.pieces.insert(offset, bytes);
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    /// The stream has so many bytes.
    ///
    /// # Errors
    /// More came already, or it was said to have another end.
    pub(super) fn ends_at(&self, end: u64) -> Result<(), EngineError> {
        let mut state = self.lock();
        let came = state.pieces.last_key_value().map_or(state.given, |(at, piece)| at + piece.len() as u64);
        if end < came || state.end.is_some_and(|before| before != end) {
            let got = format!("one of {end} bytes, where {came} came");
            return Err(EngineError::OutOfPlace { expected: "the end of the stream", got });
        }
        state.end = Some(end);
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    // SPEC: PROTOCOL.md#must-any-lane
    /// Gives the hypervisor the stream, to its end. `INVARIANT(in-order-once)`. Where it was split, pages that come beside it overtake it.
    pub(super) async fn write_to(&self, mut stream: OwnedWriteHalf, mut expander: Expander, mut beside: Beside) -> Result<Whole, Broken> {
        loop {
            let piece = tokio::select! {
                piece = self.next() => piece,
                pages = beside.next() => {
                    beside.put(&pages, &mut stream).await?;
                    continue;
                }
            };
            let Some(piece) = piece else { break };
            let count = piece.len() as u64;
            expander.begin(piece);
            while let Some(bytes) = expander.expand()? {
                match &mut beside.splice {
                    None => stream.write_all(bytes).await?,
                    Some(splice) => {
                        splice.take_in(bytes)?;
                        stream.write_all(splice.out()).await?;
                        splice.out().clear();
                    }
                }
            }
            let devices = expander.let_tail_go()?;
            if !devices.is_empty() {
                stream.write_all(&devices).await?;
                self.loads.send_replace(true);
            }
            let given = {
                let mut state = self.lock();
                state.given += count;
                state.given
            };
            self.given.send_replace(given);
            if let Some(digest) = expander.take_split() {
                self.split.send_replace(Some(Whole::new(given, digest)));
                beside.begin();
            }
        }
        if let Some(splice) = &beside.splice {
            splice.end()?;
        }
        let (rest, digest) = expander.end()?;
        stream.write_all(&rest).await?;
        stream.shutdown().await?;
        if let Some(why) = expander.why_opaque() {
            tracing::info!(why, "the stream is not understood to its end");
        }
        Ok(Whole::new(self.given_bytes(), digest))
    }

    /// The piece that the hypervisor lacks; nothing at the end.
    async fn next(&self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.lock();
                let given = state.given;
                if let Some(piece) = state.pieces.remove(&given) {
                    return Some(piece);
                }
                if state.end == Some(given) {
                    return None;
                }
            }
            self.arrived.notified().await;
        }
    }

    pub(super) fn given_bytes(&self) -> u64 {
        self.lock().given
    }

    /// Tells where the stream was split.
    pub(super) fn split(&self) -> watch::Receiver<Option<Whole>> {
        self.split.subscribe()
    }

    /// Tells when the hypervisor begins to load the guest, if that is known.
    pub(super) fn loads(&self) -> watch::Receiver<bool> {
        self.loads.subscribe()
    }

    /// Tells how much the hypervisor was given.
    pub(super) fn given(&self) -> watch::Receiver<u64> {
        self.given.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages that overtake a stream that was split.
#[derive(Debug, Default)]
pub(super) struct Beside {
    /// Where they come, and what the stream has to say.
    coming: Option<(Arc<BackIn>, Box<Expected>)>,
    splice: Option<Splice>,
}

impl Beside {
    pub(super) fn of(pages: Arc<BackIn>, expected: Box<Expected>) -> Self {
        Self { coming: Some((pages, expected)), splice: None }
    }

    /// The stream was split here.
    fn begin(&mut self) {
        self.splice = self.coming.as_ref().map(|(_, expected)| Splice::behind_split(expected.clone()));
    }

    /// The next ones, when there is a place for them. May be dropped and called again.
    async fn next(&self) -> Vec<u8> {
        match (&self.coming, &self.splice) {
            (Some((pages, _)), Some(splice)) if splice.takes_urgent() => pages.next().await,
            _ => std::future::pending().await,
        }
    }

    async fn put(&mut self, pages: &[u8], stream: &mut OwnedWriteHalf) -> Result<(), Broken> {
        if let (Some((coming, _)), Some(splice)) = (&self.coming, &mut self.splice) {
            splice.take_urgent(pages)?;
            stream.write_all(splice.out()).await?;
            splice.out().clear();
            coming.was_given(pages.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::condense::Grammar;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    fn piece(bytes: &[u8]) -> Bytes {
        Bytes::copy_from_slice(bytes)
    }

    #[tokio::test]
    async fn the_hypervisor_gets_every_byte_once_and_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flow = Arc::new(Inflow::new());
        let writing = tokio::spawn({
            let flow = Arc::clone(&flow);
            async move { flow.write_to(ours.into_split().1, Expander::new(Grammar::Opaque), Beside::default()).await.unwrap() }
        });
        let entry = |text: &[u8]| piece(&[&[1, u8::try_from(text.len()).unwrap(), 0, 0, 0], text].concat());
        flow.take_in(10, entry(b"world")).unwrap();
        flow.take_in(10, entry(b"world")).unwrap();
        flow.take_in(0, entry(b"hello")).unwrap();
        let mut given = flow.given();
        given.wait_for(|given| *given == 20).await.unwrap();
        flow.take_in(0, entry(b"HELLO")).unwrap();
        flow.ends_at(26).unwrap();
        flow.ends_at(26).unwrap();
        flow.take_in(20, entry(b"!")).unwrap();
        let mut text = String::new();
        theirs.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "helloworld!");
        let whole = writing.await.unwrap();
        assert_eq!((whole.bytes, whole.framing), (26, crate::engine::digest::sha256(b"helloworld!\x0b\0\0\0\0\0\0\0")));
    }

    #[test]
    fn pieces_out_of_the_window_or_over_others_are_refused() {
        let flow = Inflow::new();
        flow.take_in(10, piece(b"0123456789")).unwrap();
        for (offset, bytes) in [
            (limits::STREAM_WINDOW_BYTES, piece(b"x")),
            (u64::MAX - 1, piece(b"xx")),
            (5, piece(b"012345")),
            (10, piece(b"012345678")),
            (15, piece(b"01")),
            (19, piece(b"0123")),
        ] {
            let refused = flow.take_in(offset, bytes.clone()).unwrap_err();
            assert_eq!(refused.class(), crate::wire::ErrorClass::PeerMisbehaved, "{offset}: {refused}");
        }
        flow.take_in(limits::STREAM_WINDOW_BYTES - 1, piece(b"x")).unwrap();
    }

    #[test]
    fn an_end_before_what_came_and_a_second_one_are_refused() {
        let flow = Inflow::new();
        flow.take_in(10, piece(b"01234")).unwrap();
        assert!(flow.ends_at(14).is_err());
        flow.ends_at(15).unwrap();
        assert!(flow.ends_at(16).is_err());
        assert!(flow.take_in(15, piece(b"x")).is_err());
    }
}
