//! A guest that is split: when, what its destination asks for meanwhile, and what it still lacks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Run, lock};
use crate::condense::{BackWalk, Grammar};
use crate::engine::EngineError;
use crate::engine::handoff::{blocking, joined};
use crate::engine::meter::SplitFigures;
use crate::engine::stream::back::BackIn;
use crate::engine::stream::urgent::Urgent;
use crate::engine::stream::{Broken, Whole};
use crate::hypervisor::{Later, StreamStage};
use crate::migration::{StreamSourceEvent, split_is_due};
use crate::telemetry::{Phase, chain};
use crate::types::Mode;
use crate::wire::{Message, StreamBack, StreamBackApplied, StreamEnd};

/// The way back from the destination's hypervisor.
pub(super) struct WayBack {
    mode: Mode,
    /// Whether the hypervisor was told to split its guest.
    told: bool,
    back: Arc<BackIn>,
    given: watch::Receiver<u64>,
    writing: Option<JoinHandle<Result<(), Broken>>>,
    /// Pages that are waited for, where the destination takes them beside the stream.
    urgent: Option<Urgent>,
    /// Since when the guest runs at the destination.
    serves: Option<Instant>,
}

/// What happens on it.
pub(super) enum Happened {
    /// The hypervisor was given more.
    Given(u64),
    /// A piece of what is waited for has to be said, which begins behind so many bytes.
    Urgent(u64, Vec<u8>),
    /// The channel for it has failed.
    Failed(Result<Result<(), Broken>, tokio::task::JoinError>),
    /// It takes no more.
    Ended(Result<Result<(), Broken>, tokio::task::JoinError>),
}

impl WayBack {
    pub(super) fn new(mode: Mode, grammar: Grammar) -> Self {
        let back = Arc::new(BackIn::new(BackWalk::new(grammar)));
        Self { mode, told: false, given: back.given(), back, writing: None, urgent: None, serves: None }
    }

    /// Begins to write to the hypervisor; nothing is left of the half.
    pub(super) fn open(&mut self, stream: OwnedWriteHalf) -> Option<OwnedWriteHalf> {
        let back = Arc::clone(&self.back);
        self.writing = Some(tokio::spawn(async move { back.write_to(stream).await }));
        None
    }

    /// Takes what is waited for from a channel that will come, or will not; until the stream has `ended`.
    pub(super) fn open_urgent(&mut self, channel: Option<Later>, grammar: Grammar, ended: watch::Receiver<bool>) {
        self.urgent = Some(Urgent::open(channel, grammar, ended));
    }

    /// What came of it.
    fn figures(&self) -> SplitFigures {
        SplitFigures { took: self.serves.map_or(Duration::ZERO, |since| since.elapsed()), faults: self.back.faults() }
    }
}

/// Waits until the place is seen where the stream is split; for ever where it is not.
pub(super) async fn seen(split: &mut watch::Receiver<Option<Whole>>) {
    if split.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for news of the way back; for ever when there is none. May be dropped and called again.
pub(super) async fn happened(way_back: &mut Option<WayBack>) -> Happened {
    let Some(WayBack { given, writing, urgent, .. }) = way_back else { return std::future::pending().await };
    let ended = async {
        match writing {
            Some(writing) => writing.await,
            None => std::future::pending().await,
        }
    };
    let out = urgent.as_ref().map(|urgent| Arc::clone(&urgent.out));
    let piece = async {
        match &out {
            Some(out) => out.next().await,
            None => std::future::pending().await,
        }
    };
    let failed = async {
        match urgent {
            Some(urgent) => urgent.failed().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        (offset, piece) = piece => Happened::Urgent(offset, piece),
        failed = failed => Happened::Failed(failed),
        ended = ended => Happened::Ended(ended),
        Ok(()) = given.changed() => Happened::Given(*given.borrow_and_update()),
    }
}

impl Run {
    /// Whether the guest can run at the destination though it lacks pages.
    pub(super) fn is_split(&self) -> bool {
        self.split.borrow().is_some()
    }

    /// Whether the destination's hypervisor was given all there is.
    pub(super) fn has_all(&self) -> bool {
        let beside = self.way_back.as_ref().and_then(|way_back| way_back.urgent.as_ref());
        self.whole.is_some_and(|whole| whole.bytes == self.flow.applied_bytes()) && beside.is_none_or(|urgent| urgent.out.is_applied())
    }

    /// FINAL can be said when the stream has ended or was split, and the hypervisor says itself that its guest does not run by itself any more.
    /// Of one that was split what it has written behind that says so: it may write the rest now, and then answers nothing.
    pub(super) async fn finalised(&mut self) -> Option<StreamSourceEvent> {
        let stage = *self.stages.borrow();
        if self.finalised {
            // Whichever of the two came last, this is said once as well.
            let all = self.whole.is_some() && stage == StreamStage::Complete && self.is_split();
            return (all && !std::mem::replace(&mut self.emptied, all)).then_some(StreamSourceEvent::Emptied);
        }
        let split = *self.split.borrow();
        let whole = match split {
            Some(_) => split.filter(|_| matches!(stage, StreamStage::Complete | StreamStage::Split))?,
            None => self.whole.filter(|_| stage == StreamStage::Complete)?,
        };
        // Whichever of the two came last, this is said once.
        self.stages.borrow_and_update();
        if split.is_none() {
            let guest = Arc::clone(&self.guest);
            if let Err(error) = blocking(move || Ok(lock(&guest).ensure_complete()?)).await {
                return Some(self.give_up(error));
            }
        }
        // A journal that cannot be written any more is found before COMMIT, behind which only a restart could tell who owns the guest.
        if let Some(reserving) = self.reserving.take()
            && let Err(error) = joined(reserving.await).and_then(|reserved| Ok(reserved?))
        {
            return Some(self.give_up(error));
        }
        self.lap("last-pages");
        self.finalised = true;
        if let Some(whole) = self.whole
            && let Err(error) = self.say_end(whole).await
        {
            // It is said again with FINAL when the link stands.
            let lost = self.broken(error);
            if !matches!(lost, StreamSourceEvent::LinkLost) {
                return Some(lost);
            }
            self.link_lost().await;
        }
        self.phase = Phase::Verify;
        let digest = whole.final_digest();
        Some(if split.is_some() { StreamSourceEvent::Split(digest) } else { StreamSourceEvent::Finalised(digest) })
    }

    pub(super) async fn say_end(&mut self, whole: Whole) -> Result<(), EngineError> {
        if self.outage.is_some() {
            return Ok(());
        }
        self.say(Message::StreamEnd(StreamEnd { migration: self.order.migration, bytes: whole.bytes })).await
    }

    /// Has the hypervisor split its guest, if it is time.
    pub(super) async fn split_when_due(&mut self) {
        let Some(way_back) = self.way_back.as_ref().filter(|way_back| !way_back.told && self.phase == Phase::Memory) else { return };
        if self.reading.is_none() || !split_is_due(way_back.mode, self.said.rounds, self.started.elapsed(), self.order.timeout) {
            return;
        }
        match self.beside(|guest| guest.split()).await {
            Ok(()) => {
                if let Some(way_back) = &mut self.way_back {
                    way_back.told = true;
                }
            }
            // It has not quite begun, or has just ended.
            Err(error) => tracing::debug!(migration = %self.order.migration, error = %chain(&error), "not split yet"),
        }
    }

    /// The guest runs at the destination. How long it was paused is known now.
    pub(super) fn serves(&mut self) {
        if !self.is_split() || self.has_all() {
            return;
        }
        if let Some(way_back) = self.way_back.as_mut().filter(|way_back| way_back.serves.is_none()) {
            way_back.serves = Some(Instant::now());
            self.phase = Phase::PostCopy;
            self.limiter.set_final(false);
            if let Some(watch) = self.pause.take() {
                self.figures.downtime = Some(watch.total());
                self.figures.breakdown = watch.laps().to_vec();
            }
        }
    }

    /// Pages that were waited for until now.
    pub(super) fn faults(&self) -> u64 {
        self.way_back.as_ref().map_or(0, |way_back| way_back.back.faults())
    }

    /// What came behind the switch.
    pub(super) fn count_split(&mut self) {
        self.figures.split = self.way_back.as_ref().filter(|_| self.is_split()).map(WayBack::figures);
    }

    pub(super) fn back_came(&mut self, piece: &StreamBack) -> Option<StreamSourceEvent> {
        let taken = match &self.way_back {
            Some(way_back) => way_back.back.take_in(piece.offset, &piece.bytes),
            None => Err(EngineError::OutOfPlace { expected: "no way back", got: "a piece of one".to_owned() }),
        };
        match taken {
            Ok(()) => {
                self.patience = None;
                None
            }
            Err(error) if self.machine.is_committed() => self.left_without(&error),
            Err(error) => Some(self.give_up(error)),
        }
    }

    pub(super) async fn way_back_happened(&mut self, happened: Happened) -> Option<StreamSourceEvent> {
        match happened {
            Happened::Given(bytes) => {
                if let Some(way_back) = &self.way_back {
                    way_back.back.acknowledge(bytes);
                }
                match self.say_back_applied(bytes).await {
                    Ok(()) => None,
                    Err(error) => Some(self.broken(error)),
                }
            }
            Happened::Urgent(offset, bytes) => {
                // It waits for nobody; lanes wait the longer.
                self.limiter.owe(bytes.len());
                let migration = self.order.migration;
                match self.say(Message::StreamBack(StreamBack { migration, offset, bytes })).await {
                    Ok(()) => None,
                    Err(error) => Some(self.broken(error)),
                }
            }
            Happened::Failed(failed) => {
                let error = match joined(failed) {
                    Ok(Ok(())) => return None,
                    Ok(Err(broken)) => broken.of_hypervisor(&self.order.vm, "cannot read the pages that are waited for").into(),
                    Err(error) => error,
                };
                if self.machine.is_committed() { self.left_without(&error) } else { Some(self.give_up(error)) }
            }
            Happened::Ended(ended) => {
                if let Some(way_back) = &mut self.way_back {
                    way_back.writing = None;
                }
                let why = match joined(ended) {
                    Ok(Ok(())) => return None,
                    Ok(Err(broken)) => broken.of_hypervisor(&self.order.vm, "cannot write the hypervisor's way back").into(),
                    Err(error) => error,
                };
                // One that has everything takes nothing more, and says so itself.
                tracing::debug!(migration = %self.order.migration, error = %chain(&why), "the way back has ended");
                None
            }
        }
    }

    async fn say_back_applied(&mut self, bytes: u64) -> Result<(), EngineError> {
        self.say(Message::StreamBackApplied(StreamBackApplied { migration: self.order.migration, bytes })).await
    }

    /// The destination's hypervisor has so much of what is waited for.
    pub(super) fn urgent_applied(&mut self, bytes: u64) -> Option<StreamSourceEvent> {
        let urgent = self.way_back.as_ref().and_then(|way_back| way_back.urgent.as_ref());
        if urgent.is_some_and(|urgent| urgent.out.applied(bytes)) {
            self.patience = None;
            return None;
        }
        let error = EngineError::OutOfPlace { expected: "bytes that were said", got: format!("{bytes} applied") };
        if self.machine.is_committed() { self.left_without(&error) } else { Some(self.give_up(error)) }
    }

    /// In a new session, where what was said of it may not have come.
    pub(super) async fn say_back_again(&mut self) -> Result<(), EngineError> {
        if let Some(urgent) = self.way_back.as_ref().and_then(|way_back| way_back.urgent.as_ref()) {
            urgent.out.say_again();
        }
        match self.way_back.as_ref().map(|way_back| *way_back.given.borrow()) {
            Some(bytes) => self.say_back_applied(bytes).await,
            None => Ok(()),
        }
    }

    /// The way back ends with the stream.
    pub(super) async fn close_way_back(&mut self) {
        if let Some(writing) = self.way_back.as_mut().and_then(|way_back| way_back.writing.take()) {
            writing.abort();
            let _ = writing.await;
        }
    }

    /// The destination was given a guest that lacks pages, and they cannot be had from here any more. It is not started here for that.
    pub(super) fn left_without(&mut self, why: &EngineError) -> Option<StreamSourceEvent> {
        tracing::error!(migration = %self.order.migration, vm = %self.order.vm, error = %chain(why), "the destination lacks pages of the guest");
        self.error.get_or_insert(EngineError::Lacking { vm: self.order.vm.clone(), why: chain(why) });
        self.ended = Some(None);
        None
    }
}
