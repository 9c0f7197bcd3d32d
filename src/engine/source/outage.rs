//! An outage: the link is gone, the destination is looked for, and the migration goes on where it was.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::rounds::RoundUnderWay;
use super::{Run, blocking, lock};
use crate::audit::{Entry, Event, Outcome};
use crate::engine::search::{Back, Outage, Search, Wanted, changed};
use crate::engine::{EngineError, Link};
use crate::limits;
use crate::memory::{PageCounts, PageSet};
use crate::migration::{SourceEvent, Standing};
use crate::telemetry::Phase;
use crate::types::Round;
use crate::wire::{Message, Resumed};

impl Run {
    /// What the link was lost of; the first that was seen.
    pub(super) fn note_cause(&mut self, error: EngineError) {
        tracing::warn!(migration = %self.order.migration, state = self.machine.name(), error = %crate::telemetry::chain(&error), "link lost");
        match &mut self.outage {
            Some(outage) => drop(outage.cause.get_or_insert(error)),
            None => self.lost = Some(error),
        }
    }

    /// Ends what is left of the link, and begins to look for the destination.
    pub(super) async fn link_lost(&mut self) {
        let now = Instant::now();
        let cause = self.lost.take();
        let why = cause.as_ref().map(|error| crate::telemetry::chain(error)).unwrap_or_default();
        self.drop_lanes();
        self.count_first_round();
        // The destination may still hold the old session for alive.
        self.link.session.close(None, "the migration goes on in another session");
        // One outage after the other, with nothing that came of it between them, is one.
        let again = self.patience.is_some();
        let ends = *self.patience.get_or_insert(now + self.order.outage_max);
        self.outage = Some(Outage { since: now, ends, search: self.search(again, None), cause });
        self.note_outage(Event::LinkLost, &[("state", self.machine.name().into()), ("why", why.into())]).await;
        crate::failpoint::hit!("source.link-lost");
        self.show(|_| {});
    }

    /// Where the lanes never stood, the first round counts as begun, with nothing of it sent.
    pub(super) fn count_first_round(&mut self) {
        if let Some(tracker) = self.tracker.as_mut().filter(|tracker| tracker.round() == Round(0)) {
            let (round, _) = tracker.begin_round();
            tracker.interrupted();
            self.round = RoundUnderWay::new(round, false, self.encoders.len(), 0);
        }
    }

    /// The lanes' threads end, and what they say from now on is not heard.
    fn drop_lanes(&mut self) {
        self.left = self.threads.iter().map(|handle| handle.stats().sent_bytes).collect();
        self.carried_before += self.left.iter().sum::<u64>();
        self.carried.iter_mut().for_each(|(_, bytes)| *bytes = 0);
        // In this order: a lane whose orders end takes that for a good end, unless nobody listens to it any more.
        (self.reports_in, self.reports) = mpsc::channel(usize::from(limits::LANES_MAX) * 2);
        self.threads.clear();
        self.lanes.clear();
    }

    /// With `first` a session stands already, and is the one that is tried first.
    pub(super) fn search(&self, again: bool, first: Option<Link>) -> Search<Resumed> {
        let migration = self.order.migration;
        let wanted = Wanted {
            redial: Arc::clone(&self.redial),
            migration,
            round: self.binding.is_some().then(|| self.tracker.as_ref().map_or(Round(0), |tracker| tracker.round())),
            committed: self.machine.is_committed(),
            again,
            answer: |message| match message {
                Message::Resumed(resumed) => Ok(resumed),
                other => Err(other),
            },
        };
        wanted.search(first)
    }

    /// The search has ended.
    pub(super) async fn back(&mut self, back: Result<Back<Resumed>, EngineError>) -> Option<SourceEvent> {
        let outage = self.outage.take()?;
        let Back { link, resumed } = match back {
            Ok(back) => back,
            Err(error) => return Some(self.give_up(error)),
        };
        if let (Some(what), false) = (changed(&self.link, &link), self.machine.is_committed()) {
            let migration = self.order.migration;
            self.link = link;
            return Some(self.give_up(EngineError::Changed { migration, what }));
        }
        self.link = link;
        let stalled = outage.since.elapsed();
        match self.take_standing(resumed).await {
            Ok(standing) => {
                self.figures.reconnects += 1;
                self.figures.stalled += stalled;
                let milliseconds = u64::try_from(stalled.as_millis()).unwrap_or(u64::MAX);
                self.note_outage(Event::LinkResumed, &[("stalled_milliseconds", milliseconds.into())]).await;
                // What is left is left.
                self.pause_ends = self.pause_ends.map(|at| at + stalled);
                self.doubt_ends = self.doubt_ends.map(|at| at + stalled);
                Some(SourceEvent::Resumed(standing))
            }
            // It was gone again before the lanes stood. After COMMIT it is asked for as long as it takes, whatever it says.
            Err(error) if error.is_outage() || self.machine.is_committed() => {
                self.drop_lanes();
                let search = self.search(true, None);
                self.outage = Some(Outage { search, cause: Some(error), ..outage });
                None
            }
            Err(error) => Some(self.give_up(error)),
        }
    }

    async fn take_standing(&mut self, resumed: Option<Resumed>) -> Result<Standing, EngineError> {
        let Some(resumed) = resumed else { return Ok(Standing::Unknown) };
        if resumed.migration != self.order.migration {
            return Err(EngineError::OutOfPlace { expected: "RESUMED of this migration", got: format!("one of `{}`", resumed.migration) });
        }
        if resumed.deciding {
            return Ok(Standing::Deciding);
        }
        if self.machine.is_committed() {
            return Err(EngineError::OutOfPlace {
                expected: "a destination that decides",
                got: "one that takes pages, after COMMIT".into(),
            });
        }
        self.order.limit_too(resumed.bandwidth_max, &self.limiter);
        self.owe_again(&resumed).await?;
        self.open_lanes().await?;
        crate::failpoint::hit!("source.lanes-reopened");
        Ok(Standing::Receiving)
    }

    /// The destination keeps what it has; the rest of the round in flight is owed again, with what the guest wrote meanwhile.
    async fn owe_again(&mut self, resumed: &Resumed) -> Result<(), EngineError> {
        let round = self.round.round;
        if resumed.lanes.len() != self.encoders.len() {
            return Err(EngineError::OutOfPlace { expected: "every lane in RESUMED", got: format!("{} lanes", resumed.lanes.len()) });
        }
        let pages = self.tracker.as_ref().and_then(|tracker| tracker.in_flight());
        let mut missing = PageSet::empty(self.ram.pages());
        self.packing.duplicates.clear();
        let left = std::mem::take(&mut self.left).into_iter().chain(std::iter::repeat(0));
        let mut arrived = 0;
        for (((lane, standing), left), carried) in self.encoders.iter().zip(&resumed.lanes).zip(left).zip(&mut self.carried) {
            let mut lane = lane.lock().await;
            // A gateway that was killed between two rounds left nothing in flight.
            if let Some(pages) = &pages {
                let Some(outstanding) = lane.outstanding(round, *standing) else {
                    return Err(EngineError::OutOfPlace { expected: "frames that were sent", got: format!("{standing:?} in RESUMED") });
                };
                // What waited in this host's buffers is not sent again: it never was.
                self.figures.resent_bytes += outstanding.lost_bytes.min(left.saturating_sub(outstanding.arrived_bytes));
                if let Some(from) = outstanding.from {
                    lane.add_missing(pages, from, &mut missing);
                }
                arrived += outstanding.arrived_bytes;
            }
            // What was made for the round that is over is no measure of the next.
            carried.0 = lane.counts();
            lane.rejoin();
        }
        if arrived > 0 && self.pause.is_none() {
            self.patience = None;
        }
        let guest = Arc::clone(&self.guest);
        let dirty = blocking(move || Ok(lock(&guest).harvest()?)).await?;
        if let Some(tracker) = &mut self.tracker {
            tracker.resumed(&missing);
        }
        self.owe(&dirty)
    }

    /// The guest was paused and the switch did not begin: it goes on, still watched.
    pub(super) async fn go_on(&mut self) -> Result<(), EngineError> {
        if let Some(task) = self.finals.take() {
            task.abort();
        }
        (self.paused, self.digest, self.pause, self.pause_ends) = (None, None, None, None);
        self.phase = Phase::Memory;
        self.limiter.set_final(false);
        let guest = Arc::clone(&self.guest);
        crate::failpoint::hit!("source.goes-on");
        blocking(move || Ok(lock(&guest).resume()?)).await
    }

    pub(super) fn outage_too_long(&mut self) -> EngineError {
        let source = self.outage.as_mut().and_then(|outage| outage.cause.take()).map(Box::new);
        EngineError::Outage { vm: self.order.vm.clone(), migration: self.order.migration, limit: self.order.outage_max, source }
    }

    pub(super) async fn note_outage(&self, event: Event, detail: &[(&str, serde_json::Value)]) {
        let mut entry = Entry::new(event).outcome(Outcome::Done);
        entry.vm = Some(self.order.vm.clone());
        entry.uuid = Some(self.order.uuid);
        entry.migration = Some(self.order.migration);
        entry.peer = Some(self.link.peer.spiffe.to_string());
        entry.detail.extend(detail.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        self.evidence.note(entry).await;
    }

    /// Pages by how they were sent, of all lanes.
    pub(super) fn counts(&self) -> PageCounts {
        let mut sum = PageCounts::default();
        for (counts, _) in &self.carried {
            sum.add(counts);
        }
        sum
    }
}
