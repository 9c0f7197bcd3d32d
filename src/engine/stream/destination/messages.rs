//! What the source says, as events for the machine.

use std::sync::Arc;

use super::{Run, lock};
use crate::engine::EngineError;
use crate::engine::handoff::{Heard, blocking};
use crate::hypervisor::{HypervisorError, RunState};
use crate::migration::{DestinationStep, StreamDestinationEvent};
use crate::transport::TransportError;
use crate::wire::{Handoff, Message};

impl Run {
    pub(super) async fn received(&mut self, message: Result<Message, TransportError>) -> Option<StreamDestinationEvent> {
        let message = match message {
            Ok(message) => message,
            Err(source) => return self.broken(EngineError::Transport { migration: self.order.migration, source }).await,
        };
        match message {
            Message::StreamEnd(end) if end.migration == self.order.migration => match self.flow.ends_at(end.bytes) {
                Ok(()) => None,
                Err(error) => Some(self.give_up(error)),
            },
            Message::StreamBackApplied(applied) if applied.migration == self.order.migration => self.back_applied(applied.bytes),
            Message::StreamBack(piece) if piece.migration == self.order.migration => self.urgent_came(&piece),
            Message::DiskEnd(end) if end.migration == self.order.migration => self.disks_end(end),
            Message::DiskDigests(digests) if digests.migration == self.order.migration => self.disks_digests(digests),
            Message::Handoff(signed) => match self.evidence.check(&self.binding, &signed) {
                Ok(heard) if !heard.incarnation_same => {
                    Some(self.give_up(EngineError::NotAuthentic { migration: self.order.migration, why: "sender's journal" }))
                }
                // Until it is loaded it may be said again, by a source that lost its link.
                Ok(Heard { step: Handoff::Final { digest, lanes }, .. })
                    if !self.disks_only
                        && lanes == self.lanes
                        && self.final_said.is_none_or(|said| said == digest)
                        && !self.machine.is_prepared() =>
                {
                    self.final_said = Some(digest);
                    self.final_when_ready()
                }
                Ok(Heard { step: step @ Handoff::Commit { .. }, .. }) if self.machine.is_prepared() => Some(self.committed(step).await),
                Ok(Heard { step, .. }) => {
                    if let (Handoff::Abort { class }, None) = (&step, &self.error)
                        && !self.have_disks_alone()
                    {
                        self.error = Some(EngineError::peer(self.order.migration, *class, "the source keeps the VM"));
                    }
                    Some(StreamDestinationEvent::Handoff(DestinationStep::Received(step)))
                }
                Err(error) => Some(self.give_up(error)),
            },
            other => {
                let aside = self.evidence.hear_aside(&self.link, self.order.migration, &mut self.heads, self.machine.name(), other).await;
                aside.err().map(|error| self.give_up(error))
            }
        }
    }

    /// RUN is written for a guest that can run: one whose hypervisor has ended since PREPARED is given back, and so is one that would lack pages
    /// for good.
    async fn committed(&mut self, step: Handoff) -> StreamDestinationEvent {
        let twin = Arc::clone(&self.twin);
        let state = blocking(move || Ok(lock(&twin).status()?.state)).await;
        let refused = match state {
            Ok(RunState::Paused) if self.cut_off => {
                let (vm, reason) = (self.order.vm.to_string(), "the guest lacks pages, and the source was started anew".to_owned());
                HypervisorError::Refused { vm, request: "cont", reason }.into()
            }
            Ok(RunState::Paused | RunState::Running) => return StreamDestinationEvent::Handoff(DestinationStep::Received(step)),
            Ok(state) => {
                let (vm, reason) = (self.order.vm.to_string(), format!("the guest is `{state:?}`: expected `Paused`"));
                HypervisorError::Refused { vm, request: "cont", reason }.into()
            }
            Err(error) => error,
        };
        self.give_up(refused)
    }
}
