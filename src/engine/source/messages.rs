//! What the destination says, as events for the machine.

use super::Run;
use crate::engine::EngineError;
use crate::engine::handoff::{Heard, before_accept};
use crate::migration::{SourceEvent, SourceStep};
use crate::transport::TransportError;
use crate::wire::{Handoff, Message, SignedHandoff};

impl Run {
    pub(super) async fn received(&mut self, message: Result<Message, TransportError>) -> Option<SourceEvent> {
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
                Some(SourceEvent::Accepted { offer, lanes: accept.lanes })
            }
            Message::RoundApplied(applied) if applied.migration == self.order.migration => {
                self.round_applied(applied.round, &applied.lanes).await
            }
            Message::Handoff(signed) => self.handoff_received(&signed),
            other => {
                let aside = self.evidence.hear_aside(&self.link, self.order.migration, &mut self.heads, self.machine.name(), other).await;
                aside.err().map(|error| self.give_up(error))
            }
        }
    }

    fn handoff_received(&mut self, signed: &SignedHandoff) -> Option<SourceEvent> {
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
        if let Some(watch) = &mut self.pause {
            watch.heard(&step, self.link.session.stats().rtt);
        }
        if matches!(&step, Handoff::Prepared { digest } if self.machine.name() == "await-prepared" && self.digest != Some(*digest)) {
            let error = EngineError::Digest { vm: self.order.vm.clone(), what: "the final digest" };
            self.error.get_or_insert(error);
        }
        if matches!(step, Handoff::Prepared { .. }) && !self.machine.is_committed() {
            self.all_applied = true;
            self.patience = None;
        }
        if let (Handoff::Refuse { class }, None) = (&step, &self.error) {
            self.error = Some(EngineError::peer(self.order.migration, *class, "the destination refused the VM"));
            self.refused = true;
        }
        Some(SourceEvent::Handoff(SourceStep::Received { step, incarnation_same, position }))
    }
}
