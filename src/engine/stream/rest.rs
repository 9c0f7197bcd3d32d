//! The rest of a guest that was split, when a gateway was started anew behind the switch: both directions between the two hypervisors, in
//! the session in which the handoff is settled.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::back::{BackIn, BackOut};
use super::{Broken, urgent};
use crate::condense::{AgainWalk, BackWalk, Grammar, Splice};
use crate::engine::EngineError;
use crate::engine::handoff::joined;
use crate::engine::limiter::Limiter;
use crate::engine::link::send_within;
use crate::hypervisor::Streams;
use crate::limits;
use crate::transport::Session;
use crate::types::{MigrationId, Side, VmName};
use crate::wire::{Message, StreamBack, StreamBackApplied};

/// What goes to and fro until it ends. Dropped, the hypervisor loses its stream, and waits for another.
pub(in crate::engine) struct Rest {
    migration: MigrationId,
    vm: VmName,
    out: Arc<BackOut>,
    back: Arc<BackIn>,
    reading: Option<JoinHandle<Result<(), Broken>>>,
    /// Puts pages that are waited for into the stream.
    splicing: Option<JoinHandle<Result<(), Broken>>>,
    writing: Option<JoinHandle<Result<(), Broken>>>,
    /// What may be sent.
    limiter: Limiter,
}

impl Drop for Rest {
    fn drop(&mut self) {
        for task in [self.reading.take(), self.splicing.take(), self.writing.take()].into_iter().flatten() {
            task.abort();
        }
    }
}

impl Rest {
    /// Between the session and the hypervisor of this side, the other end of whose stream this is. At most `pace` bytes a second are sent.
    ///
    /// # Errors
    /// The stream cannot be used.
    pub(in crate::engine) fn open(
        (migration, vm, side): (MigrationId, VmName, Side),
        streams: Streams,
        grammar: Grammar,
        pace: Option<u64>,
    ) -> Result<Self, EngineError> {
        let local = |source: std::io::Error| Broken::from(source).of_hypervisor(&vm, "cannot use the hypervisor's stream");
        streams.main.set_nonblocking(true).map_err(local)?;
        let (mut read, write) = UnixStream::from_std(streams.main).map_err(local)?.into_split();
        let mut splicing = None;
        if let (Some(channel), Grammar::Qemu(expected)) = (streams.urgent, &grammar) {
            let (spliced, into) = UnixStream::pair().map_err(local)?;
            let rest = std::mem::replace(&mut read, spliced.into_split().0);
            let splice = urgent::splice(rest, channel, Splice::again(expected.clone()), into.into_split().1);
            splicing = Some(tokio::spawn(splice));
        }
        let out = Arc::new(BackOut::default());
        let (reader, again, asked) = (Arc::clone(&out), AgainWalk::new(grammar.clone()), BackWalk::new(grammar));
        let (back, reading) = match side {
            Side::Source => (BackIn::new(asked), tokio::spawn(async move { reader.read_from(read, again).await })),
            Side::Destination => (BackIn::new(again), tokio::spawn(async move { reader.read_from(read, asked).await })),
        };
        let back = Arc::new(back);
        let writer = Arc::clone(&back);
        let writing = tokio::spawn(async move { writer.write_to(write).await });
        Ok(Self { migration, vm, out, back, reading: Some(reading), splicing, writing: Some(writing), limiter: Limiter::new(pace, None) })
    }

    /// Carries both directions until the peer says something else, which is given back; or, where that ends it, until the hypervisor has
    /// ended its stream.
    ///
    /// # Errors
    /// The session or the hypervisor is gone, or what came is not sound.
    pub(in crate::engine) async fn carry(
        &mut self,
        session: &Session,
        first: Option<StreamBack>,
        ends_with_stream: bool,
    ) -> Result<Option<Message>, EngineError> {
        let (mut given, mut still) = (self.back.given(), tokio::time::Instant::now() + STILL_MAX);
        if let Some(piece) = first {
            self.back.take_in(piece.offset, &piece.bytes)?;
        }
        loop {
            let said = tokio::select! {
                // A hypervisor that does not go on may do so with other streams.
                () = tokio::time::sleep_until(still), if ends_with_stream => {
                    let why = format!("nothing was sent of them for {} s", STILL_MAX.as_secs());
                    return Err(EngineError::Lacking { vm: self.vm.clone(), why });
                }
                (offset, bytes) = self.out.next() => {
                    // Pieces are small: what comes meanwhile waits for one at most.
                    self.limiter.acquire(bytes.len()).await;
                    Message::StreamBack(StreamBack { migration: self.migration, offset, bytes })
                }
                Ok(()) = given.changed() => {
                    let bytes = *given.borrow_and_update();
                    self.back.acknowledge(bytes);
                    Message::StreamBackApplied(StreamBackApplied { migration: self.migration, bytes })
                }
                ended = ended(&mut self.reading) => {
                    self.reading = None;
                    self.went_well(ended)?;
                    if ends_with_stream {
                        return Ok(None);
                    }
                    continue;
                }
                ended = ended(&mut self.splicing) => {
                    self.splicing = None;
                    self.went_well(ended)?;
                    continue;
                }
                ended = ended(&mut self.writing) => {
                    self.writing = None;
                    self.went_well(ended)?;
                    continue;
                }
                message = session.receive() => {
                    if let Some(other) = self.heard(message.map_err(|source| EngineError::Transport { migration: self.migration, source })?)? {
                        return Ok(Some(other));
                    }
                    continue;
                }
            };
            let sent = send_within(session, &said, limits::SEND_WITHIN).await;
            sent.map_err(|source| EngineError::Transport { migration: self.migration, source })?;
            still = tokio::time::Instant::now() + STILL_MAX;
        }
    }

    fn went_well(&self, ended: Result<Result<(), Broken>, tokio::task::JoinError>) -> Result<(), EngineError> {
        joined(ended)?.map_err(|broken| broken.of_hypervisor(&self.vm, "cannot go on with the hypervisor's stream").into())
    }

    /// A message that is none of this is given back.
    fn heard(&self, message: Message) -> Result<Option<Message>, EngineError> {
        match message {
            Message::StreamBack(piece) if piece.migration == self.migration => self.back.take_in(piece.offset, &piece.bytes)?,
            Message::StreamBackApplied(applied) if applied.migration == self.migration => {
                if !self.out.applied(applied.bytes) {
                    let got = format!("{} bytes applied", applied.bytes);
                    return Err(EngineError::OutOfPlace { expected: "bytes that were said", got });
                }
            }
            Message::Ping => {}
            other => return Ok(Some(other)),
        }
        Ok(None)
    }
}

/// How long nothing may be sent. WHY: longer than a piece waits at the slowest rate that makes sense.
const STILL_MAX: Duration = Duration::from_secs(60);

async fn ended(task: &mut Option<JoinHandle<Result<(), Broken>>>) -> Result<Result<(), Broken>, tokio::task::JoinError> {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}
