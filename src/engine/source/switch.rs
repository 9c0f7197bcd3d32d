//! The switch: journal, wire and effect of the handoff, and what is said at the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Run, SourceEnd, blocking, lock};
use crate::engine::EngineError;
use crate::engine::handoff::{joined, wake};
use crate::migration::{HandoffAction, Outcome, SourceEvent, SourceRecord, SourceStep};
use crate::telemetry::Phase;
use crate::wire::{AuditHead, ErrorClass, Failure, Handoff, Message, SignedHandoff};

impl Run {
    /// COMMIT was said and the session is gone: only the destination knows. Ask until it answers.
    pub(super) async fn reconnect(&mut self) -> Option<SourceEvent> {
        let deadline = self.doubt_ends.unwrap_or_else(Instant::now);
        // The destination may still hold the old session for alive.
        self.link.session.close(None, "the handoff goes on in another session");
        self.show(|progress| progress.stalled_because = Some("the destination was given the VM and does not answer".into()));
        while Instant::now() + self.reconnect_pause < deadline {
            // A destination that takes sessions and drops them is not asked any faster than one that is gone.
            tokio::time::sleep(self.reconnect_pause).await;
            self.reconnect_pause = (self.reconnect_pause * 2).min(RECONNECT_LONGEST);
            match tokio::time::timeout_at(deadline.into(), (self.redial)()).await {
                Ok(Ok(link)) if link.peer.spiffe == self.link.peer.spiffe => {
                    self.link = link;
                    return Some(SourceEvent::Handoff(SourceStep::Reconnected));
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(error = %error, "destination not reached"),
                Err(_) => break,
            }
        }
        self.in_doubt();
        None
    }

    pub(super) async fn handoff(&mut self, action: HandoffAction<SourceRecord>) -> Result<Option<SourceEvent>, EngineError> {
        let binding = self.binding.clone().ok_or_else(|| EngineError::Bug("handoff without an offer".into()))?;
        match action {
            HandoffAction::Journal(record) => {
                let (abort, commit) = (record == SourceRecord::Abort, record == SourceRecord::Commit);
                let result = self.evidence.record(&binding, record).await;
                self.lap("journal");
                match result {
                    // An ABORT that cannot be written is implied: COMMIT was never attempted, and a restart
                    // makes ABORT of an OFFER. The guest's life does not wait for the disk.
                    Err(error) if abort => {
                        tracing::error!(migration = %binding.migration, error = %error, "ABORT is not on disk; a restart will repeat it")
                    }
                    result => result?,
                }
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
                let ask = Arc::clone(&self.ask_commit);
                let answer = joined(tokio::task::spawn_blocking(move || ask()).await)?;
                self.lap("policy");
                Ok(Some(SourceEvent::Handoff(match answer {
                    Ok(()) => SourceStep::CommitPermitted,
                    Err(why) => {
                        let class = why.class();
                        self.error.get_or_insert(why);
                        if class == ErrorClass::Denied { SourceStep::CommitDenied } else { SourceStep::GiveUp(class) }
                    }
                })))
            }
            HandoffAction::Resume => {
                let guest = Arc::clone(&self.guest);
                if let Some(tracker) = self.tracker.take() {
                    // INVARIANT(no-lost-dirt): what was harvested and not applied is still owed to whoever moves this guest next;
                    // the next migration starts with every page, so the set ends here.
                    tracing::debug!(migration = %binding.migration, pages = tracker.give_back().len(), "pages given back");
                }
                let woken = blocking(move || Ok(wake(lock(&guest).as_mut())?)).await;
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
                if let Err(error) = blocking(move || Ok(lock(&guest).destroy()?)).await {
                    tracing::warn!(vm = %binding.vm, error = %error, "the old copy is gone already");
                }
                Ok(None)
            }
            HandoffAction::End(outcome) => {
                self.ended = Some(Some(outcome));
                Ok(None)
            }
        }
    }

    pub(super) async fn finish(mut self) -> SourceEnd {
        let outcome = self.ended.flatten();
        if let (Some(watch), Some(Outcome::Moved)) = (&self.pause, outcome) {
            self.figures.downtime = Some(watch.total());
            self.figures.breakdown = watch.laps().to_vec();
        }
        if outcome == Some(Outcome::Moved) {
            self.error = None;
            self.figures.verified = self.order.stream.verify;
            self.phase = Phase::Cleanup;
            let head = self.evidence.audit.head().text;
            let _ = self.say(Message::AuditHead(AuditHead { checkpoint: head })).await;
            self.last_words().await;
        } else if outcome.is_some() {
            if self.refused {
                self.hear_why().await;
            }
            self.say_failure().await;
            if self.binding.is_some() && !self.refused {
                self.until_abort_is_heard().await;
            }
        }
        self.figures.pages = self.counts();
        self.phase = Phase::Done;
        self.show(|_| {});
        self.lanes.clear();
        self.link.session.close(None, "migration ended");
        SourceEnd { outcome, woken: self.woken, error: self.error, figures: self.figures }
    }

    /// A close that overtakes ABORT would leave a destination that has prepared waiting for a word; it answers with REFUSE.
    async fn until_abort_is_heard(&mut self) {
        let listen = async {
            while let Ok(message) = self.link.session.receive().await {
                if let Message::Handoff(SignedHandoff { message, .. }) = message
                    && matches!(message.step, Handoff::Refuse { .. })
                {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, listen).await;
    }

    /// REFUSE has a class and no words; the words follow, if they come soon.
    async fn hear_why(&mut self) {
        let listen = async {
            while let Ok(message) = self.link.session.receive().await {
                if let Message::Failure(failure) = message {
                    return Some(failure);
                }
            }
            None
        };
        if let Ok(Some(Failure { class, reason })) = tokio::time::timeout(LAST_WORDS, listen).await {
            self.error = Some(EngineError::peer(self.order.migration, class, &reason));
        }
    }

    /// The destination's audit head behind its last entry, if it comes soon.
    pub(super) async fn last_words(&mut self) {
        let listen = async {
            while let Ok(message) = self.link.session.receive().await {
                if let Message::AuditHead(head) = message {
                    return self.keep_peer_head(head).await;
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, listen).await;
    }
}

pub(super) const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_LONGEST: Duration = Duration::from_secs(5);
const LAST_WORDS: Duration = Duration::from_secs(2);
