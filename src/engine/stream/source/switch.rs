//! What the destination says, the switch, what is shown, and what is said at the end.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::disks::Disks;
use super::{Run, lock};
use crate::engine::EngineError;
use crate::engine::handoff::{Binding, Heard, before_accept, blocking};
use crate::engine::link::{hear_why, until_abort_is_heard};
use crate::engine::source::{Command, SourceEnd};
use crate::engine::witness::Exchange;
use crate::limits;
use crate::migration::{HandoffAction, Outcome, SourceRecord, SourceStep, StreamSourceEvent};
use crate::telemetry::{Phase, Progress, chain};
use crate::transport::TransportError;
use crate::wire::{ErrorClass, Failure, Handoff, Message, SignedHandoff};

impl Run {
    pub(super) async fn received(&mut self, message: Result<Message, TransportError>) -> Option<StreamSourceEvent> {
        let message = match message {
            Ok(message) => message,
            Err(source) => return Some(self.broken(EngineError::Transport { migration: self.order.migration, source })),
        };
        match message {
            Message::Accept(accept)
                if self.binding.is_none()
                    && accept.migration == self.order.migration
                    && (1..=self.order.stream.lanes).contains(&accept.lanes) =>
            {
                let offer = Box::new(self.order.record(&self.link.peer));
                self.binding = Some(offer.as_ref().into());
                self.order.limit_too(accept.bandwidth_max, &self.limiter);
                Some(StreamSourceEvent::Accepted { offer, lanes: accept.lanes })
            }
            Message::StreamApplied(applied) if applied.migration == self.order.migration => {
                if self.flow.applied(applied.bytes) {
                    // Something came of this session.
                    self.patience = None;
                    return None;
                }
                let got = format!("{} bytes applied", applied.bytes);
                Some(self.give_up(EngineError::OutOfPlace { expected: "bytes of the stream that were sent", got }))
            }
            Message::DiskApplied(applied) if self.are_applied(&applied) => {
                self.patience = None;
                None
            }
            Message::StreamBack(piece) if piece.migration == self.order.migration => self.back_came(&piece),
            Message::StreamBackApplied(applied) if applied.migration == self.order.migration => self.urgent_applied(applied.bytes),
            Message::DiskHeld(said) => self.disk_held(&said).await,
            Message::Handoff(signed) => self.handoff_received(&signed),
            other => {
                let aside = self.evidence.hear_aside(&self.link, self.order.migration, &mut self.heads, self.machine.name(), other).await;
                aside.err().map(|error| self.give_up(error))
            }
        }
    }

    fn handoff_received(&mut self, signed: &SignedHandoff) -> Option<StreamSourceEvent> {
        let Some(binding) = &self.binding else {
            let (error, refused) = before_accept(self.order.migration, signed);
            self.refused = refused;
            return Some(self.give_up(error));
        };
        let heard = match self.evidence.check(binding, signed) {
            Ok(heard) => heard,
            Err(error) if self.machine.is_committed() => {
                tracing::warn!(migration = %self.order.migration, error = %error, "ignored after COMMIT");
                return None;
            }
            Err(error) => return Some(self.give_up(error)),
        };
        let Heard { step, incarnation_same, position } = heard;
        let prepared = matches!(step, Handoff::Prepared { .. });
        if let Some(watch) = &mut self.pause {
            watch.heard(&step, self.link.session.stats().rtt);
        }
        let said = self.split.borrow().or(self.whole);
        if matches!(&step, Handoff::Prepared { digest } if said.is_none_or(|whole| whole.final_digest() != *digest)) {
            let error = EngineError::Digest { vm: self.order.vm.clone(), what: "the final digest" };
            self.error.get_or_insert(error);
        }
        if prepared && !self.machine.is_committed() {
            self.patience = None;
        }
        if matches!(step, Handoff::Running) && self.machine.is_committed() {
            self.serves();
        }
        if let (Handoff::Refuse { class }, None) = (&step, &self.error) {
            self.error = Some(EngineError::peer(self.order.migration, *class, "the destination refused the VM"));
            self.refused = true;
        }
        Some(StreamSourceEvent::Handoff(SourceStep::Received { step, incarnation_same, position }))
    }

    pub(super) async fn handoff(&mut self, action: HandoffAction<SourceRecord>) -> Result<Option<StreamSourceEvent>, EngineError> {
        let binding = self.binding.clone().ok_or_else(|| EngineError::Bug("handoff without an offer".into()))?;
        match action {
            HandoffAction::Journal(record) => {
                let commit = matches!(record, SourceRecord::Commit { .. });
                let result = self.evidence.record(&binding, record).await;
                self.lap("journal");
                result?;
                if commit {
                    self.doubt_ends = Some(Instant::now() + self.order.resolve_timeout);
                }
                Ok(None)
            }
            HandoffAction::Send(step) => {
                self.evidence.send(&self.link.session, &binding, step).await;
                Ok(None)
            }
            HandoffAction::AskCommit => {
                let answer = self.commit_question.answer(&self.link.session, &mut self.error).await?;
                crate::failpoint::hit!("source.policy-asked");
                self.lap("policy");
                Ok(Some(StreamSourceEvent::Handoff(answer.into())))
            }
            HandoffAction::Resume => {
                self.wake(&binding).await;
                Ok(None)
            }
            HandoffAction::Destroy => {
                let guest = Arc::clone(&self.guest);
                crate::failpoint::hit!("source.destroy");
                if let Err(error) = blocking(move || Ok(lock(&guest).destroy()?)).await {
                    tracing::warn!(vm = %binding.vm, error = %error, "the old copy is gone already");
                }
                Ok(None)
            }
            HandoffAction::Renew => {
                let guest = Arc::clone(&self.guest);
                blocking(move || Ok(lock(&guest).renew()?)).await.map(|()| None)
            }
            HandoffAction::Keep | HandoffAction::Forget | HandoffAction::Restore => {
                Err(EngineError::Bug("a stream has no image on disk".into()))
            }
            HandoffAction::End(outcome) => {
                self.ended = Some(Some(outcome));
                Ok(None)
            }
            HandoffAction::LeaveToJournal => {
                self.ended = Some(None);
                Ok(None)
            }
        }
    }

    /// The guest goes on here.
    async fn wake(&mut self, binding: &Binding) {
        // A hypervisor that waits for its socket hears nothing else; without it, it gives up by itself. Its mirrors too.
        self.stop_disks();
        self.close_way_back().await;
        if let Some(reading) = self.reading.take() {
            reading.abort();
            let _ = reading.await;
        }
        let guest = Arc::clone(&self.guest);
        crate::failpoint::hit!("source.resume");
        if let Err(error) = blocking(move || Ok(lock(&guest).wake()?)).await {
            // Worse than whatever made the attempt fail; the gateway tries on.
            tracing::error!(vm = %binding.vm, error = %chain(&error), "guest not resumed on the source");
            self.error = Some(error);
            self.woken = false;
        }
        self.lap("resume");
    }

    pub(super) fn show(&mut self) {
        let total = self.said.total_bytes;
        let (read, wire) = (self.flow.read_bytes(), self.meter.frame_bytes());
        let elapsed = self.started.elapsed().as_secs_f64();
        let sent = total.saturating_sub(self.said.remaining_bytes);
        let mut next = Progress::new(self.order.migration);
        next.phase = self.phase;
        next.round = self.said.rounds;
        next.memory_total_bytes = total;
        next.memory_sent_bytes = sent;
        next.memory_remaining_bytes = self.said.remaining_bytes;
        next.wire_bytes = wire;
        next.elapsed_seconds = elapsed;
        next.dirty_bytes_per_second = self.said.dirty_bytes_per_second;
        next.send_bytes_per_second = crate::engine::meter::per_second(read, elapsed);
        next.wire_bytes_per_second = crate::engine::meter::per_second(wire, elapsed);
        next.expected_downtime_seconds = self.said.downtime_expected.map(|expected| expected.as_secs_f64());
        next.faults = self.faults();
        if let Some(disks) = &self.disks {
            (next.disk_total_bytes, next.disk_remaining_bytes) = (disks.said.total_bytes, disks.said.remaining_bytes);
        }
        next.phase_fraction = match self.phase {
            Phase::Memory | Phase::PostCopy => part(sent, total),
            Phase::Storage => part(next.disk_total_bytes.saturating_sub(next.disk_remaining_bytes), next.disk_total_bytes),
            _ => 0.0,
        };
        self.progress.send_replace(next);
    }

    pub(super) async fn finish(mut self, commands: mpsc::Receiver<Command>) -> SourceEnd {
        crate::failpoint::hit!("source.finish");
        let outcome = self.ended.flatten();
        let mut told = true;
        let there_alone = self.error.is_none() && self.disks.as_ref().is_some_and(Disks::are_there_alone);
        self.figures.disks.only = there_alone && outcome == Some(Outcome::Stayed);
        self.stop_disks();
        self.count_split();
        self.close_way_back().await;
        if let Some(reading) = self.reading.take() {
            reading.abort();
        }
        if let (Some(watch), Some(Outcome::Moved)) = (&self.pause, outcome) {
            self.figures.downtime = Some(watch.total());
            self.figures.breakdown = watch.laps().to_vec();
        }
        if outcome == Some(Outcome::Moved) {
            self.error = None;
            // What came behind the split is not compared.
            self.figures.verified = self.figures.split.is_none();
            self.phase = Phase::Cleanup;
            self.last_words().await;
        } else if outcome.is_some() {
            if self.refused
                && let Some(Failure { class, reason }) = hear_why(&self.link.session).await
            {
                self.error = Some(EngineError::peer(self.order.migration, class, &reason));
            }
            self.say_failure().await;
            if self.binding.is_some() && !self.refused {
                told = until_abort_is_heard(&self.link.session).await;
            }
        }
        // Nothing was journaled of an offer that was not answered; the destination may have it all the same.
        told &= self.binding.is_some() || self.outage.is_none();
        self.figures.rounds = self.said.rounds;
        self.count_pages();
        self.figures.wire_bytes = self.carried_before + self.threads.iter().map(|handle| handle.stats().sent_bytes).sum::<u64>();
        let said_busy = matches!(&self.error, Some(EngineError::Peer { class: ErrorClass::PeerBusy, .. }));
        let busy = said_busy && self.binding.is_none();
        if !busy {
            self.phase = Phase::Done;
            self.show();
        }
        self.link.session.close(None, "migration ended");
        SourceEnd { outcome, woken: self.woken, told, error: self.error, figures: self.figures, busy, commands }
    }

    /// What became of pages, in parcels and then in codecs.
    fn count_pages(&mut self) {
        let condenser = self.condenser();
        let (mut pages, opaque, bytes) = (condenser.counts(), condenser.why_opaque(), condenser.bytes());
        drop(condenser);
        // Those that were sent again behind an outage were packed again.
        pages.compressed = self.meter.pages().min(pages.raw);
        pages.raw -= pages.compressed;
        if let Some(why) = opaque {
            tracing::info!(migration = %self.order.migration, why, "the stream is not understood to its end");
        }
        (self.figures.pages, self.figures.opaque, self.figures.table_bytes) = (pages, opaque, bytes as u64);
    }

    /// Heads of both audit logs behind their last entries, if the destination's comes soon.
    async fn last_words(&mut self) {
        let migration = self.order.migration;
        self.heads = Exchange::default();
        self.evidence.show_head(&self.link, migration).await;
        self.evidence.finish_heads(&self.link, migration, &mut self.heads, false, limits::LAST_WORDS).await;
        self.figures.peer_audit_head = self.heads.theirs.take();
    }
}

fn part(done: u64, total: u64) -> f64 {
    if total == 0 { 0.0 } else { (done as f64 / total as f64).min(1.0) }
}
