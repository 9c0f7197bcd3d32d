//! A guest that is split: what its hypervisor asks the source for, and what it needs until it lacks nothing.

use std::sync::Arc;

use tokio::net::unix::OwnedReadHalf;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use super::Run;
use crate::condense::{BackWalk, Grammar, UrgentWalk};
use crate::engine::EngineError;
use crate::engine::handoff::joined;
use crate::engine::stream::back::{BackIn, BackOut};
use crate::engine::stream::{Broken, Whole};
use crate::migration::StreamDestinationEvent;
use crate::telemetry::chain;
use crate::wire::{Message, StreamBack, StreamBackApplied};

/// The way back to the source's hypervisor.
pub(super) struct WayBack {
    back: Arc<BackOut>,
    reading: Option<JoinHandle<Result<(), Broken>>>,
    /// Pages that overtake the stream, and how much of them the hypervisor was given.
    urgent: Option<(Arc<BackIn>, watch::Receiver<u64>)>,
}

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Some(reading) = &self.reading {
            reading.abort();
        }
    }
}

/// What happens on it.
pub(super) enum Happened {
    /// A piece has to be said, which begins behind so many bytes.
    Piece(u64, Vec<u8>),
    /// It was given more of what overtakes the stream.
    Given,
    /// The hypervisor says nothing more.
    Ended(Result<Result<(), Broken>, tokio::task::JoinError>),
}

impl WayBack {
    pub(super) fn open(stream: OwnedReadHalf, grammar: Grammar) -> Self {
        let back = Arc::new(BackOut::default());
        let out = Arc::clone(&back);
        let reading = Some(tokio::spawn(async move { out.read_from(stream, BackWalk::new(grammar)).await }));
        Self { back, reading, urgent: None }
    }

    /// Takes pages that overtake the stream, in this grammar; where they come.
    pub(super) fn take_urgent(&mut self, grammar: Grammar) -> Arc<BackIn> {
        let urgent = Arc::new(BackIn::new(UrgentWalk::new(grammar)));
        self.urgent = Some((Arc::clone(&urgent), urgent.given()));
        urgent
    }
}

/// Waits for news of the way back; for ever when there is none. May be dropped and called again.
pub(super) async fn happened(way_back: &mut Option<WayBack>) -> Happened {
    let Some(WayBack { back, reading, urgent }) = way_back else { return std::future::pending().await };
    let ended = async {
        match reading {
            Some(reading) => reading.await,
            None => std::future::pending().await,
        }
    };
    let given = async {
        match urgent {
            Some((_, given)) => super::changed(given).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        (offset, piece) = back.next() => Happened::Piece(offset, piece),
        () = given => Happened::Given,
        ended = ended => Happened::Ended(ended),
    }
}

impl Run {
    /// What FINAL is about: all until the stream was split, if it was.
    pub(super) fn promised(&self) -> Option<Whole> {
        self.split.borrow().or(self.whole)
    }

    /// Whether the hypervisor was not given all that a guest that was split needs.
    pub(super) fn lacks_some(&self) -> bool {
        self.split.borrow().is_some() && self.whole.is_none()
    }

    pub(super) async fn way_back_happened(&mut self, happened: Happened) -> Option<StreamDestinationEvent> {
        match happened {
            Happened::Piece(offset, bytes) => {
                let migration = self.order.migration;
                match self.say(Message::StreamBack(StreamBack { migration, offset, bytes })).await {
                    Ok(()) => None,
                    Err(error) => self.broken(error).await,
                }
            }
            Happened::Given => self.say_urgent_applied().await,
            Happened::Ended(ended) => {
                if let Some(way_back) = &mut self.way_back {
                    way_back.reading = None;
                }
                let why = match joined(ended) {
                    Ok(Ok(())) => return None,
                    Ok(Err(broken)) => broken.of_hypervisor(&self.order.vm, "cannot read the hypervisor's way back").into(),
                    Err(error) => error,
                };
                if self.machine.is_receiving() {
                    return Some(self.give_up(why));
                }
                tracing::warn!(migration = %self.order.migration, error = %chain(&why), "the way back has ended");
                None
            }
        }
    }

    /// What the hypervisor was given of what overtakes the stream, if anything.
    pub(super) async fn say_urgent_applied(&mut self) -> Option<StreamDestinationEvent> {
        let (urgent, given) = self.way_back.as_ref()?.urgent.as_ref()?;
        let bytes = *given.borrow();
        if bytes == 0 {
            return None;
        }
        urgent.acknowledge(bytes);
        let migration = self.order.migration;
        match self.say(Message::StreamBackApplied(StreamBackApplied { migration, bytes })).await {
            Ok(()) => None,
            Err(error) => self.broken(error).await,
        }
    }

    pub(super) fn urgent_came(&mut self, piece: &StreamBack) -> Option<StreamDestinationEvent> {
        let taken = match self.way_back.as_ref().and_then(|way_back| way_back.urgent.as_ref()) {
            Some((urgent, _)) => urgent.take_in(piece.offset, &piece.bytes),
            None => Err(EngineError::OutOfPlace { expected: "no pages beside the stream", got: "a piece of them".to_owned() }),
        };
        match taken {
            Ok(()) => None,
            Err(error) if self.machine.is_running() => self.left_without(&error),
            Err(error) => Some(self.give_up(error)),
        }
    }

    pub(super) fn back_applied(&mut self, bytes: u64) -> Option<StreamDestinationEvent> {
        if self.way_back.as_ref().is_some_and(|way_back| way_back.back.applied(bytes)) {
            return None;
        }
        let error = EngineError::OutOfPlace { expected: "bytes of the way back that were said", got: format!("{bytes} applied") };
        if self.machine.is_receiving() {
            return Some(self.give_up(error));
        }
        tracing::warn!(migration = %self.order.migration, error = %chain(&error), "ignored behind FINAL");
        None
    }

    /// Another session has heard nothing.
    pub(super) fn say_back_again(&self) {
        if let Some(way_back) = &self.way_back {
            way_back.back.say_again();
        }
    }

    /// A guest that lacks pages executes, or cannot. RUN is on disk, so it is nobody else's either way.
    pub(super) fn was_woken(&mut self, woken: Result<Result<(), EngineError>, JoinError>) -> Option<StreamDestinationEvent> {
        self.waking = None;
        crate::failpoint::hit!("destination.resume.after");
        joined(woken).and_then(|woken| woken).err().and_then(|error| self.left_without(&error))
    }

    /// The guest runs here and its hypervisor takes no more of what it lacks.
    pub(super) fn left_without(&mut self, why: &EngineError) -> Option<StreamDestinationEvent> {
        tracing::error!(migration = %self.order.migration, vm = %self.order.vm, error = %chain(why), "the guest lacks pages and gets no more");
        self.error.get_or_insert(EngineError::Lacking { vm: self.order.vm.clone(), why: chain(why) });
        self.ended = Some(None);
        None
    }
}
