//! The switch: what is promised, and what becomes of the twin.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Run, Twin, lock};
use crate::engine::EngineError;
use crate::engine::handoff::{blocking, joined};
use crate::engine::witness::Exchange;
use crate::hypervisor::StreamStage;
use crate::limits;
use crate::migration::{DestinationRecord, DestinationStep, HandoffAction, Outcome, StreamDestinationAction, StreamDestinationEvent};

impl Run {
    pub(super) async fn perform(&mut self, action: StreamDestinationAction) -> Result<Option<StreamDestinationEvent>, EngineError> {
        match action {
            StreamDestinationAction::Load(said) => {
                crate::failpoint::hit!("destination.compare");
                let differs = |what| EngineError::Digest { vm: self.order.vm.clone(), what };
                let held = self.promised().ok_or_else(|| EngineError::Bug("FINAL of a stream that is not there".into()))?.final_digest();
                if held != said {
                    return Err(differs("stream"));
                }
                self.commit_question.ask_ahead(&self.link.session);
                self.loading = Some(tokio::spawn(load(Arc::clone(&self.twin), self.stages.clone())));
                // What is promised has to be kept, also on a disk that fills up. Nothing is promised yet.
                self.make_room();
                if let Some(reserving) = self.reserving.take() {
                    joined(reserving.await)??;
                }
                Ok(None)
            }
            StreamDestinationAction::Handoff(action) => self.handoff(action).await,
        }
    }

    /// WHY: it takes two syncs, and a guest that stands still waits for its hypervisor as long.
    pub(super) fn make_room(&mut self) {
        let journal = &self.evidence.journal;
        self.reserving.get_or_insert_with(|| {
            let journal = Arc::clone(journal);
            tokio::task::spawn_blocking(move || journal.reserve())
        });
    }

    /// `INVARIANT(loaded-before-prepared)`
    pub(super) fn complete(&mut self) -> Option<StreamDestinationEvent> {
        crate::failpoint::hit!("destination.state-restored");
        let digest = self.promised()?.final_digest();
        Some(StreamDestinationEvent::Handoff(DestinationStep::TwinComplete(Box::new(
            self.binding.prepared(digest, self.order.stream.durability),
        ))))
    }

    async fn handoff(&mut self, action: HandoffAction<DestinationRecord>) -> Result<Option<StreamDestinationEvent>, EngineError> {
        match action {
            HandoffAction::Journal(record) => self.evidence.record(&self.binding, record).await.map(|()| None),
            HandoffAction::Send(step) => {
                self.evidence.send(&self.link.session, &self.binding, step).await;
                Ok(None)
            }
            HandoffAction::AskCommit => {
                let answer = self.commit_question.answer(&self.link.session, &mut self.error).await?;
                crate::failpoint::hit!("destination.policy-asked");
                Ok(Some(StreamDestinationEvent::Handoff(answer.into())))
            }
            HandoffAction::Resume => {
                let twin = Arc::clone(&self.twin);
                crate::failpoint::hit!("destination.resume.before");
                let woken = blocking(move || Ok(lock(&twin).wake()?));
                if self.lacks_some() {
                    // It may need pages for that, which come only beside.
                    self.waking = Some(tokio::spawn(woken));
                    return Ok(None);
                }
                woken.await?;
                crate::failpoint::hit!("destination.resume.after");
                Ok(None)
            }
            HandoffAction::Destroy => {
                drop(self.way_back.take());
                // One that is still being loaded ends with its socket.
                if let Some(writing) = self.writing.take() {
                    writing.abort();
                    let _ = writing.await;
                }
                let twin = Arc::clone(&self.twin);
                crate::failpoint::hit!("destination.destroy.before");
                if let Err(error) = blocking(move || Ok(lock(&twin).destroy()?)).await {
                    tracing::warn!(vm = %self.order.vm, error = %error, "the twin is gone already");
                }
                crate::failpoint::hit!("destination.destroy.after");
                Ok(None)
            }
            HandoffAction::End(outcome) => {
                if outcome == Outcome::Moved {
                    self.heads = Exchange::default();
                    self.evidence.show_head(&self.link, self.order.migration).await;
                }
                self.ended = Some(Some(outcome));
                Ok(None)
            }
            HandoffAction::Renew => {
                let twin = Arc::clone(&self.twin);
                blocking(move || Ok(lock(&twin).renew()?)).await.map(|()| None)
            }
            HandoffAction::Keep | HandoffAction::Forget | HandoffAction::Restore => {
                Err(EngineError::Bug("a stream has no image on disk".into()))
            }
            HandoffAction::LeaveToJournal => {
                self.ended = Some(None);
                Ok(None)
            }
        }
    }
}

/// Waits until the hypervisor has loaded what it was given, and sees for itself that the guest is paused.
async fn load(twin: Twin, mut stages: watch::Receiver<StreamStage>) -> Result<(), EngineError> {
    let ends = |stage: &StreamStage| matches!(stage, StreamStage::Complete | StreamStage::Split | StreamStage::Failed);
    let waited = tokio::time::timeout(limits::STALL_MAX, async { stages.wait_for(ends).await.map(|stage| *stage) }).await;
    let complete = matches!(waited, Ok(Ok(StreamStage::Complete | StreamStage::Split)));
    blocking(move || {
        let mut twin = lock(&twin);
        if complete { Ok(twin.ensure_complete()?) } else { Err(twin.failure().into()) }
    })
    .await
}
