//! An outage as the destination sees it: the source comes back, and finds what it left.

use std::time::{Duration, Instant};

use super::Run;
use crate::audit::{Entry, Event, Outcome as AuditOutcome};
use crate::engine::destination::Return;
use crate::engine::{EngineError, Link};
use crate::migration::StreamDestinationEvent;
use crate::telemetry::chain;
use crate::wire::{Message, StreamResumed};

/// Waits until an outage has lasted too long; for ever when there is none.
pub(super) async fn over(lost: Option<Instant>, outage_max: Duration) {
    match lost {
        Some(since) => tokio::time::sleep_until((since + outage_max).into()).await,
        None => std::future::pending().await,
    }
}

impl Run {
    /// What an outage may explain is waited out; anything else ends the attempt.
    pub(super) async fn broken(&mut self, error: EngineError) -> Option<StreamDestinationEvent> {
        let lacks_some = self.lacks_some();
        if !error.is_outage() && !lacks_some {
            return self.left_alone().then(|| self.give_up(error));
        }
        if self.lost.is_some() || self.ended.is_some() {
            return None;
        }
        let why = chain(&error);
        tracing::warn!(migration = %self.order.migration, state = self.machine.name(), error = why, "link lost");
        self.link.session.close(None, "the migration goes on in another session");
        self.note_outage(Event::LinkLost, "why", why.into()).await;
        crate::failpoint::hit!("destination.link-lost");
        // A guest that lacks pages needs its source, however long that takes.
        if lacks_some || self.left_alone() {
            self.lost = Some(Instant::now());
        }
        None
    }

    pub(super) fn outage_too_long(&mut self) -> StreamDestinationEvent {
        self.lost = None;
        let (vm, migration) = (self.order.vm.clone(), self.order.migration);
        self.give_up(EngineError::Outage { vm, migration, limit: self.outage_max, source: None })
    }

    /// The source comes back in a new session. One that is not the very peer of the first is sent away, and changes nothing.
    pub(super) async fn source_is_back(&mut self, back: Return) -> Option<StreamDestinationEvent> {
        // SPEC: PROTOCOL.md#must-resume-same
        let back = back.of(&self.binding)?;
        let Return { link, first } = back;
        match first {
            Message::Offer(offer) if offer == self.order && self.flow.given_bytes() == 0 && self.lost.is_some() => {
                self.adopt(link).await;
                self.final_said = None;
                self.say_back_again();
                if let Some(disks) = &mut self.disks {
                    disks.tell_again();
                }
                match self.begin_again() {
                    Ok(()) => {}
                    Err(error) => return self.broken(error).await,
                }
                match self.accept().await {
                    Ok(()) => None,
                    Err(error) => self.broken(error).await,
                }
            }
            Message::Resume(_) => {
                self.adopt(link).await;
                self.resume().await
            }
            // While the first session lives, only that speaks for the migration, unless the source says that it is lost.
            message @ Message::Handoff(_) if self.lost.is_some() => {
                self.adopt(link).await;
                // It has only its journal left.
                self.cut_off = self.lacks_some();
                if self.cut_off && self.machine.is_running() {
                    let got = "one that was started anew".to_owned();
                    return self
                        .left_without(&EngineError::OutOfPlace { expected: "a source that sends the pages that the guest lacks", got });
                }
                self.received(Ok(message)).await
            }
            first => {
                Return { link, first }.send_away(&self.order);
                None
            }
        }
    }

    /// The new session is the one; of the old one nothing is heard any more.
    pub(super) async fn adopt(&mut self, link: Link) {
        let since = self.lost.take();
        self.link = link;
        (self.watch.heard, self.watch.led_on) = (Instant::now(), Instant::now());
        let stalled = since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
        self.note_outage(Event::LinkResumed, "stalled_milliseconds", stalled.into()).await;
        crate::failpoint::hit!("destination.session-adopted");
    }

    pub(super) async fn resume(&mut self) -> Option<StreamDestinationEvent> {
        let (migration, deciding) = (self.order.migration, !self.machine.is_receiving());
        if let Some(disks) = &mut self.disks {
            disks.tell_no_more();
        }
        if !deciding {
            self.final_said = None;
        }
        if (!deciding || self.lacks_some())
            && let Err(error) = self.begin_again()
        {
            return self.broken(error).await;
        }
        self.say_back_again();
        self.acknowledged = self.flow.given_bytes();
        let resumed = StreamResumed { migration, deciding, bytes: self.acknowledged };
        if let Err(error) = self.say(Message::StreamResumed(resumed)).await {
            return self.broken(error).await;
        }
        if let Some(lost) = self.say_urgent_applied().await {
            return Some(lost);
        }
        crate::failpoint::hit!("destination.resumed-sent");
        Some(StreamDestinationEvent::Resumed)
    }

    /// The lanes of the old session end, and new ones may join. What came out of order stays.
    pub(super) fn begin_again(&mut self) -> Result<(), EngineError> {
        drop(self.gate.take());
        if let Some(disks) = &self.disks {
            disks.incoming.begin_again();
        }
        self.expect_lanes()
    }

    pub(super) async fn note_outage(&self, event: Event, name: &str, value: serde_json::Value) {
        let mut entry = Entry::new(event).outcome(AuditOutcome::Done);
        entry.vm = Some(self.order.vm.clone());
        entry.uuid = Some(self.order.uuid);
        entry.migration = Some(self.order.migration);
        entry.peer = Some(self.binding.peer.to_string());
        entry.detail.insert(name.to_owned(), value);
        self.evidence.note(entry).await;
    }
}
