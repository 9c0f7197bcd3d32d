//! What the source says, as events for the machine.

use std::sync::Arc;

use ring::digest::{Context, SHA256};

use super::{Run, lock};
use crate::engine::EngineError;
use crate::engine::digest::digest_bytes;
use crate::engine::handoff::{Heard, blocking};
use crate::limits;
use crate::migration::{DestinationEvent, DestinationStep};
use crate::transport::TransportError;
use crate::wire::{Handoff, Message, StateChunk};

/// Device state as it arrives, in order and bounded.
pub(super) struct StateBuffer {
    bytes: Vec<u8>,
    total: Option<u64>,
    /// WHY: SHA-256 of it takes a part of the pause, and while it arrives nothing else is done.
    hash: Context,
}

impl Default for StateBuffer {
    fn default() -> Self {
        Self { bytes: Vec::new(), total: None, hash: Context::new(&SHA256) }
    }
}

impl Run {
    pub(super) async fn received(&mut self, message: Result<Message, TransportError>) -> Option<DestinationEvent> {
        let message = match message {
            Ok(message) => message,
            Err(source) => return self.broken(EngineError::Transport { migration: self.order.migration, source }).await,
        };
        match message {
            Message::RoundEnd(end) if end.migration == self.order.migration && end.lanes.len() == usize::from(self.lanes) => {
                if self.rounds.said.is_some() {
                    return Some(
                        self.give_up(EngineError::OutOfPlace {
                            expected: "the end of the round under way",
                            got: "another ROUND-END".into(),
                        }),
                    );
                }
                self.rounds.said = Some((end.round, end.last, end.lanes));
                self.round_complete()
            }
            Message::StateChunk(chunk) if chunk.migration == self.order.migration => match self.state.take_in(&chunk) {
                Ok(()) => self.final_when_ready(),
                Err(error) => Some(self.give_up(error)),
            },
            Message::Handoff(signed) => match self.evidence.check(&self.binding, &signed) {
                Ok(heard) if !heard.incarnation_same => {
                    Some(self.give_up(EngineError::NotAuthentic { migration: self.order.migration, why: "sender's journal" }))
                }
                Ok(Heard { step: Handoff::Final { digest, lanes }, .. }) if lanes == self.lanes && self.final_said.is_none() => {
                    self.final_said = Some(digest);
                    self.final_when_ready()
                }
                Ok(Heard { step: step @ Handoff::Commit { .. }, .. }) if self.machine.is_prepared() => Some(self.committed(step).await),
                Ok(Heard { step, .. }) => {
                    if let (Handoff::Abort { class }, None) = (&step, &self.error) {
                        self.error = Some(EngineError::peer(self.order.migration, *class, "the source keeps the VM"));
                    }
                    Some(DestinationEvent::Handoff(DestinationStep::Received(step)))
                }
                Err(error) => Some(self.give_up(error)),
            },
            other => {
                let aside = self.evidence.hear_aside(&self.link, self.order.migration, &mut self.heads, self.machine.name(), other).await;
                aside.err().map(|error| self.give_up(error))
            }
        }
    }

    /// RUN is written for a guest that can run: one whose VMM has ended since PREPARED is given back.
    async fn committed(&mut self, step: Handoff) -> DestinationEvent {
        let twin = Arc::clone(&self.twin);
        match blocking(move || Ok(lock(&twin).ensure_there()?)).await {
            Ok(()) => DestinationEvent::Handoff(DestinationStep::Received(step)),
            Err(error) => self.give_up(error),
        }
    }
}

impl StateBuffer {
    fn take_in(&mut self, chunk: &StateChunk) -> Result<(), EngineError> {
        let refuse = |got: String| Err(EngineError::OutOfPlace { expected: "the next piece of the device state", got });
        if chunk.total == 0 || chunk.total > limits::STATE_BYTES_MAX as u64 || *self.total.get_or_insert(chunk.total) != chunk.total {
            return refuse(format!("a state of {} bytes", chunk.total));
        }
        let next = self.bytes.len() as u64;
        if chunk.offset != next || chunk.bytes.is_empty() || chunk.offset + chunk.bytes.len() as u64 > chunk.total {
            return refuse(format!("{} bytes at {}", chunk.bytes.len(), chunk.offset));
        }
        self.bytes.extend_from_slice(&chunk.bytes);
        self.hash.update(&chunk.bytes);
        Ok(())
    }

    /// The state and its SHA-256; nothing is left.
    pub(super) fn take(&mut self) -> (Vec<u8>, [u8; 32]) {
        let Self { bytes, hash, .. } = std::mem::take(self);
        (bytes, digest_bytes(&hash.finish()))
    }

    pub(super) fn is_complete(&self) -> bool {
        self.total == Some(self.bytes.len() as u64)
    }
}
