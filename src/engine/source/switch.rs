//! The switch: journal, wire and effect of the handoff, and what is said at the end.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{Command, Run, SourceEnd, blocking, lock};
use crate::engine::EngineError;
use crate::engine::handoff::Evidence;
use crate::engine::link::{hear_why, until_abort_is_heard};
use crate::engine::witness::Exchange;
use crate::limits;
use crate::migration::{HandoffAction, Outcome, SourceEvent, SourceRecord};
use crate::storage::write_image;
use crate::telemetry::Phase;
use crate::types::MigrationId;
use crate::wire::{ErrorClass, Failure};

impl Run {
    pub(super) async fn handoff(&mut self, action: HandoffAction<SourceRecord>) -> Result<Option<SourceEvent>, EngineError> {
        let binding = self.binding.clone().ok_or_else(|| EngineError::Bug("handoff without an offer".into()))?;
        match action {
            HandoffAction::Journal(record) => self.journal(record).await.map(|()| None),
            HandoffAction::Send(step) => {
                self.evidence.send(&self.link.session, &binding, step).await;
                Ok(None)
            }
            HandoffAction::AskCommit => {
                let answer = self.commit_question.answer(&self.link.session, &mut self.error).await?;
                crate::failpoint::hit!("source.policy-asked");
                self.lap("policy");
                Ok(Some(SourceEvent::Handoff(answer.into())))
            }
            HandoffAction::Resume => {
                let guest = Arc::clone(&self.guest);
                if let Some(tracker) = self.tracker.take() {
                    // INVARIANT(no-lost-dirt): what was harvested and not applied is still owed to whoever moves this guest next;
                    // the next migration starts with every page, so the set ends here.
                    tracing::debug!(migration = %binding.migration, pages = tracker.give_back().len(), "pages given back");
                }
                crate::failpoint::hit!("source.resume");
                let woken = blocking(move || Ok(lock(&guest).wake()?)).await;
                self.lap("resume");
                if let Err(error) = woken {
                    // Worse than whatever made the attempt fail; the gateway tries on.
                    tracing::error!(vm = %binding.vm, error = %crate::telemetry::chain(&error), "guest not resumed on the source");
                    self.error = Some(error);
                    self.woken = false;
                }
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
            HandoffAction::Keep => self.keep().await.map(|()| None),
            HandoffAction::Forget => self.forget(binding.migration).await.map(|()| None),
            HandoffAction::Renew => {
                let guest = Arc::clone(&self.guest);
                blocking(move || Ok(lock(&guest).renew()?)).await.map(|()| None)
            }
            // The guest's memory is here as long as this runs.
            HandoffAction::Restore => Err(EngineError::Bug("a guest that is here is not restored".into())),
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

    async fn forget(&mut self, migration: MigrationId) -> Result<(), EngineError> {
        if matches!(self.machine.name(), "aborted" | "reclaimed" | "fenced") {
            // A VMM that died with the guest's memory needs the image yet.
            let guest = Arc::clone(&self.guest);
            blocking(move || Ok(lock(&guest).status().map(drop)?)).await?;
        }
        self.evidence.forget_image(migration).await
    }

    async fn journal(&mut self, record: SourceRecord) -> Result<(), EngineError> {
        let binding = self.binding.clone().ok_or_else(|| EngineError::Bug("a record without an offer".into()))?;
        let commit = matches!(record, SourceRecord::Commit { .. });
        let result = self.evidence.record(&binding, record).await;
        self.lap("journal");
        result?;
        if commit {
            self.doubt_ends = Some(Instant::now() + self.order.resolve_timeout);
        }
        Ok(())
    }

    /// Makes the final image durable here. The guest stands still meanwhile: that is the price of durability at both ends.
    async fn keep(&mut self) -> Result<(), EngineError> {
        let (Some(binding), Some(finals), Some(digest)) = (&self.binding, self.paused.clone(), self.digest) else {
            return Err(EngineError::Bug("an image of a guest that is not saved".into()));
        };
        let path = self.evidence.image_path(binding.migration);
        let machine = serde_json::to_vec(lock(&self.guest).machine()).map_err(|error| EngineError::Bug(error.to_string()))?;
        let (head, ram) = (Evidence::image_head(binding, &digest, machine), Arc::clone(&self.ram));
        let written = blocking(move || Ok(write_image(&path, &head, &ram, &finals.state)?));
        self.alive_through(written).await?;
        self.lap("image");
        Ok(())
    }

    pub(super) async fn finish(mut self, commands: mpsc::Receiver<Command>) -> SourceEnd {
        crate::failpoint::hit!("source.finish");
        let outcome = self.ended.flatten();
        let mut told = true;
        if let (Some(watch), Some(Outcome::Moved)) = (&self.pause, outcome) {
            self.figures.downtime = Some(watch.total());
            self.figures.breakdown = watch.laps().to_vec();
        }
        if outcome == Some(Outcome::Moved) {
            self.error = None;
            self.figures.verified = self.order.stream.verify;
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
        self.figures.pages = self.counts();
        self.figures.wire_bytes = self.carried_before + self.threads.iter().map(|handle| handle.stats().sent_bytes).sum::<u64>();
        let said_busy = matches!(&self.error, Some(EngineError::Peer { class: ErrorClass::PeerBusy, .. }));
        let busy = said_busy && self.binding.is_none();
        if !busy {
            self.phase = Phase::Done;
            self.show(|_| {});
        }
        self.lanes.clear();
        self.link.session.close(None, "migration ended");
        SourceEnd { outcome, woken: self.woken, told, error: self.error, figures: self.figures, busy, commands }
    }

    /// Heads of both audit logs behind their last entries, if the destination's comes soon.
    pub(super) async fn last_words(&mut self) {
        let migration = self.order.migration;
        self.heads = Exchange::default();
        self.evidence.show_head(&self.link, migration).await;
        self.evidence.finish_heads(&self.link, migration, &mut self.heads, false, limits::LAST_WORDS).await;
        self.figures.peer_audit_head = self.heads.theirs.take();
    }
}
