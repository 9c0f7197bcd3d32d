//! An outage: the link is gone, the destination is looked for, and the stream goes on where its hypervisor is.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::Run;
use crate::audit::{Entry, Event, Outcome as AuditOutcome};
use crate::engine::EngineError;
use crate::engine::search::{Back, Outage, Search, Wanted, changed};
use crate::hypervisor::StreamStage;
use crate::limits;
use crate::migration::{Standing, StreamSourceEvent};
use crate::telemetry::chain;
use crate::types::Round;
use crate::wire::{Message, Resumed, StreamResumed};

impl Run {
    /// Ends what is left of the link, and begins to look for the destination.
    pub(super) async fn link_lost(&mut self) {
        if self.outage.is_some() {
            return;
        }
        let now = Instant::now();
        let cause = self.lost.take();
        let why = cause.as_ref().map(|error| chain(error)).unwrap_or_default();
        self.drop_lanes();
        self.link.session.close(None, "the migration goes on in another session");
        let again = self.patience.is_some();
        let ends = *self.patience.get_or_insert(now + self.order.outage_max);
        self.outage = Some(Outage { since: now, ends, search: self.search(again), cause });
        self.note_outage(Event::LinkLost, &[("state", self.machine.name().into()), ("why", why.into())]).await;
        crate::failpoint::hit!("source.link-lost");
        self.show();
    }

    /// The lanes' threads end, and what they say from now on is not heard.
    pub(super) fn drop_lanes(&mut self) {
        self.carried_before += self.threads.iter().map(|handle| handle.stats().sent_bytes).sum::<u64>();
        (self.failures_in, self.failures) = mpsc::channel(usize::from(limits::LANES_MAX));
        self.threads.clear();
    }

    pub(super) fn search(&self, again: bool) -> Search<StreamResumed> {
        let wanted = Wanted {
            redial: Arc::clone(&self.redial),
            migration: self.order.migration,
            round: self.binding.is_some().then_some(Round(1)),
            committed: self.machine.is_committed(),
            again,
            answer: |message| match message {
                Message::StreamResumed(resumed) => Ok(resumed),
                // A gateway that has only its journal left of it knows no more than that the handoff decides.
                Message::Resumed(Resumed { migration, deciding: true, .. }) => Ok(StreamResumed { migration, deciding: true, bytes: 0 }),
                other => Err(other),
            },
        };
        wanted.search(None)
    }

    /// The search has ended.
    pub(super) async fn back(&mut self, back: Result<Back<StreamResumed>, EngineError>) -> Option<StreamSourceEvent> {
        let outage = self.outage.take()?;
        let Back { link, resumed } = match back {
            Ok(back) => back,
            Err(error) => return Some(self.give_up(error)),
        };
        let changed = changed(&self.link, &link).filter(|_| !self.machine.is_committed());
        self.link = link;
        if let Some(what) = changed {
            return Some(self.give_up(EngineError::Changed { migration: self.order.migration, what }));
        }
        let stalled = outage.since.elapsed();
        match self.take_standing(resumed).await {
            Ok(standing) => {
                self.figures.reconnects += 1;
                self.figures.stalled += stalled;
                let milliseconds = u64::try_from(stalled.as_millis()).unwrap_or(u64::MAX);
                self.note_outage(Event::LinkResumed, &[("stalled_milliseconds", milliseconds.into())]).await;
                self.doubt_ends = self.doubt_ends.map(|at| at + stalled);
                Some(StreamSourceEvent::Resumed(standing))
            }
            // It was gone again before the lanes stood. After COMMIT it is asked for as long as it takes, whatever it says.
            Err(error) if error.is_outage() || self.machine.is_committed() => {
                self.drop_lanes();
                let search = self.search(true);
                self.outage = Some(Outage { search, cause: Some(error), ..outage });
                None
            }
            Err(error) => Some(self.give_up(error)),
        }
    }

    pub(super) async fn take_standing(&mut self, resumed: Option<StreamResumed>) -> Result<Standing, EngineError> {
        let out_of_place = |expected, got: String| Err(EngineError::OutOfPlace { expected, got });
        let Some(resumed) = resumed else { return Ok(Standing::Unknown) };
        if resumed.migration != self.order.migration {
            return out_of_place("RESUMED of this migration", format!("one of `{}`", resumed.migration));
        }
        if resumed.deciding && !self.lacks_some() {
            return Ok(Standing::Deciding);
        }
        if resumed.deciding {
            return self.serve_again(resumed.bytes).await;
        }
        if self.machine.is_committed() {
            return out_of_place("a destination that decides", "one that takes more of the stream, after COMMIT".into());
        }
        if !self.flow.applied(resumed.bytes) {
            return out_of_place("bytes of the stream that were sent", format!("{} in RESUMED", resumed.bytes));
        }
        self.figures.resent_bytes += self.flow.send_again();
        self.figures.resent_bytes += self.disks.as_ref().map_or(0, |disks| disks.out.send_again());
        self.open_lanes().await?;
        self.say_back_again().await?;
        self.disks_resumed().await?;
        self.say_disks().await?;
        if let Some(whole) = self.whole.filter(|_| self.is_split() || *self.stages.borrow() == StreamStage::Complete) {
            self.say_end(whole).await?;
        }
        crate::failpoint::hit!("source.lanes-reopened");
        Ok(Standing::Receiving)
    }

    /// Whether pages of a guest that was split have to be sent.
    fn lacks_some(&self) -> bool {
        self.is_split() && !self.has_all()
    }

    /// The handoff goes on, and so does the stream.
    async fn serve_again(&mut self, bytes: u64) -> Result<Standing, EngineError> {
        if !self.flow.applied(bytes) {
            let error = EngineError::OutOfPlace {
                expected: "a destination that has what it was given of a guest that lacks pages",
                got: format!("one that has {bytes} bytes of the stream: it was started anew"),
            };
            if !self.machine.is_committed() {
                return Err(error);
            }
            self.left_without(&error);
            return Ok(Standing::Deciding);
        }
        self.figures.resent_bytes += self.flow.send_again();
        self.open_lanes().await?;
        self.say_back_again().await?;
        if let Some(whole) = self.whole {
            self.say_end(whole).await?;
        }
        Ok(Standing::Deciding)
    }

    pub(super) async fn note_outage(&self, event: Event, detail: &[(&str, serde_json::Value)]) {
        let mut entry = Entry::new(event).outcome(AuditOutcome::Done);
        entry.vm = Some(self.order.vm.clone());
        entry.uuid = Some(self.order.uuid);
        entry.migration = Some(self.order.migration);
        entry.peer = Some(self.link.peer.spiffe.to_string());
        entry.detail.extend(detail.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        self.evidence.note(entry).await;
    }
}
