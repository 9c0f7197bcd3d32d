//! An outage as the destination sees it: the source comes back, and finds what it left.

use std::time::{Duration, Instant};

use super::messages::StateBuffer;
use super::{Return, Run};
use crate::audit::{Entry, Event, Outcome};
use crate::engine::handoff::Binding;
use crate::engine::link::send_within;
use crate::engine::{EngineError, Link};
use crate::limits;
use crate::migration::DestinationEvent;
use crate::wire::{ErrorClass, Failure, LaneStanding, Message, Offer, Resume, Resumed};

/// Waits until an outage has lasted too long; for ever when there is none.
pub(super) async fn over(lost: Option<Instant>, outage_max: Duration) {
    match lost {
        Some(since) => tokio::time::sleep_until((since + outage_max).into()).await,
        None => std::future::pending().await,
    }
}

impl Run {
    /// What an outage may explain is waited out; anything else ends the attempt.
    pub(super) async fn broken(&mut self, error: EngineError) -> Option<DestinationEvent> {
        if !error.is_outage() {
            return self.left_alone().then(|| self.give_up(error));
        }
        if self.lost.is_some() || self.ended.is_some() {
            return None;
        }
        let why = crate::telemetry::chain(&error);
        tracing::warn!(migration = %self.order.migration, state = self.machine.name(), error = why, "link lost");
        self.link.session.close(None, "the migration goes on in another session");
        self.note_outage(Event::LinkLost, "why", why.into()).await;
        crate::failpoint::hit!("destination.link-lost");
        // What is promised is the gateway's to keep, in whatever session the source comes back.
        if self.left_alone() {
            self.lost = Some(Instant::now());
        }
        None
    }

    pub(super) fn outage_too_long(&mut self) -> DestinationEvent {
        self.lost = None;
        let (vm, migration) = (self.order.vm.clone(), self.order.migration);
        self.give_up(EngineError::Outage { vm, migration, limit: self.outage_max, source: None })
    }

    /// The source comes back in a new session. One that is not the very peer of the first is sent away, and changes nothing.
    pub(super) async fn source_is_back(&mut self, back: Return) -> Option<DestinationEvent> {
        // SPEC: PROTOCOL.md#must-resume-same
        let Return { link, first } = back.of(&self.binding)?;
        match first {
            Message::Offer(offer) if offer == self.order && self.machine.has_nothing() && self.lost.is_some() => {
                self.adopt(link).await;
                if let Err(error) = self.begin_again().await {
                    return self.broken(error).await;
                }
                match self.accept().await {
                    Ok(()) => None,
                    Err(error) => self.broken(error).await,
                }
            }
            Message::Resume(resume) => {
                self.adopt(link).await;
                self.resume(&resume).await
            }
            // While the first session lives, only that speaks for the migration, unless the source says that it is lost.
            message @ Message::Handoff(_) if self.lost.is_some() => {
                self.adopt(link).await;
                self.received(Ok(message)).await
            }
            first => {
                Return { link, first }.send_away(&self.order);
                None
            }
        }
    }

    /// The new session is the one; of the old one nothing is heard any more.
    async fn adopt(&mut self, link: Link) {
        let since = self.lost.take();
        self.link = link;
        (self.watch.heard, self.watch.led_on) = (Instant::now(), Instant::now());
        let stalled = since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
        self.note_outage(Event::LinkResumed, "stalled_milliseconds", stalled.into()).await;
        crate::failpoint::hit!("destination.session-adopted");
    }

    async fn resume(&mut self, resume: &Resume) -> Option<DestinationEvent> {
        let (migration, deciding) = (self.order.migration, !self.machine.is_receiving());
        let lanes = if deciding {
            vec![LaneStanding::default(); usize::from(self.lanes)]
        } else {
            match self.begin_again().await {
                // RESUMED was lost, and nothing came since: it is said again.
                Ok(lanes)
                    if lanes.iter().all(|lane| lane.frames == 0)
                        && self.resumed.as_ref().is_some_and(|(round, _)| *round == resume.round) =>
                {
                    self.resumed.as_ref().map_or(lanes, |(_, said)| said.clone())
                }
                Ok(lanes) => lanes,
                Err(error) => return self.broken(error).await,
            }
        };
        self.resumed = Some((resume.round, lanes.clone()));
        if let Err(error) = self.say(Message::Resumed(Resumed { migration, deciding, bandwidth_max: self.bandwidth_max, lanes })).await {
            return self.broken(error).await;
        }
        crate::failpoint::hit!("destination.resumed-sent");
        Some(DestinationEvent::Resumed { round: resume.round })
    }

    /// The lanes of the old session end, and those of the new one count from 0. What each had applied until then.
    async fn begin_again(&mut self) -> Result<Vec<LaneStanding>, EngineError> {
        self.seal.close();
        drop(self.gate.take());
        // A lane that waits to report has nobody to report to any more, and gives its decoder back.
        self.reports = tokio::sync::mpsc::channel(1).1;
        let mut standings = Vec::with_capacity(self.decoders.len());
        for decoder in self.decoders.iter() {
            let mut decoder = decoder.lock().await;
            standings.push(decoder.standing());
            decoder.rejoin();
        }
        self.state = StateBuffer::default();
        self.final_said = None;
        self.expect_lanes()?;
        Ok(standings)
    }

    async fn note_outage(&self, event: Event, name: &str, value: serde_json::Value) {
        let mut entry = Entry::new(event).outcome(Outcome::Done);
        entry.vm = Some(self.order.vm.clone());
        entry.uuid = Some(self.order.uuid);
        entry.migration = Some(self.order.migration);
        entry.peer = Some(self.binding.peer.to_string());
        entry.detail.insert(name.to_owned(), value);
        self.evidence.note(entry).await;
    }
}

impl Return {
    /// What comes of the very peer of a handoff; another one is sent away.
    pub(in crate::engine) fn of(self, binding: &Binding) -> Option<Self> {
        let peer = &self.link.peer;
        if peer.spiffe == binding.peer && peer.incarnation == binding.peer_incarnation && peer.signing_key == binding.peer_key {
            return Some(self);
        }
        refuse(self.link, "the migration belongs to another peer or journal".into());
        None
    }

    /// It does not fit where the migration is.
    pub(in crate::engine) fn send_away(self, order: &Offer) {
        match self.first {
            Message::Handoff(_) => self.link.session.close(Some(ErrorClass::Local), UNDER_WAY),
            // The source may have missed its session before this side does; it comes again.
            Message::Offer(offer) if offer == *order => self.link.session.close(Some(ErrorClass::PeerUnreachable), UNDER_WAY),
            other => refuse(self.link, format!("{} does not continue the migration under way", other.name())),
        }
    }
}

const UNDER_WAY: &str = "the migration is under way in another session";

/// Sends a session away without waiting for it: it may be anybody's who knows the migration's id.
fn refuse(link: Link, why: String) {
    tokio::spawn(async move {
        let failure = Message::Failure(Failure { class: ErrorClass::PeerMisbehaved, reason: why.clone() });
        let _ = send_within(&link.session, &failure, limits::SEND_WITHIN).await;
        link.session.finish(Some(ErrorClass::PeerMisbehaved), &why, Duration::from_secs(1)).await;
    });
}
