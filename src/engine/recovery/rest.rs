//! A guest that was split, and runs at the destination while its pages are at the source, when a gateway was started anew: the two go on with
//! the rest of it before the handoff ends. `INVARIANT(served-first)`

use std::sync::Arc;
use std::time::Duration;

use super::{Interrupted, is_gone};
use crate::engine::EngineError;
use crate::engine::handoff::joined;
use crate::engine::stream::Rest;
use crate::hypervisor::{Guest, HypervisorError};
use crate::transport::Session;
use crate::types::Side;
use crate::wire::{Message, StreamBack};

impl Interrupted {
    /// At the source: sends what the guest lacks, if there is something.
    pub(super) async fn send_rest(&self, session: Option<&Session>) -> Result<(), EngineError> {
        if !self.is_lacked().await? {
            return Ok(());
        }
        let lacking = |why: &str| EngineError::Lacking { vm: self.binding.vm.clone(), why: why.to_owned() };
        let session = session.ok_or_else(|| lacking("the destination is not there"))?;
        tracing::warn!(vm = %self.binding.vm, migration = %self.binding.migration, "the destination lacks pages of the guest, which follow now");
        if let Some(other) = self.rest(Side::Source).await?.carry(session, None, true).await? {
            return Err(EngineError::OutOfPlace { expected: "what the destination lacks", got: other.name().to_owned() });
        }
        for _ in 0..ENDS_WITHIN {
            if !self.is_lacked().await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(lacking("its hypervisor has ended the stream before its end"))
    }

    /// At the destination: takes what the source sends, of which this is the first, until it says something else.
    pub(super) async fn take_rest(&self, session: &Session, first: StreamBack) -> Result<Message, EngineError> {
        let other = self.rest(Side::Destination).await?.carry(session, Some(first), false).await?;
        other.ok_or_else(|| EngineError::Bug("the rest of a guest that has no end".into()))
    }

    async fn rest(&self, side: Side) -> Result<Rest, EngineError> {
        let (streams, grammar) = self.ask(move |guest| guest.stream_again(side)).await?.ok_or_else(|| {
            let (vm, reason) = (self.binding.vm.to_string(), "its hypervisor has no stream of its own".to_owned());
            EngineError::Hypervisor(HypervisorError::Refused { vm, request: "migrate", reason })
        })?;
        let pace = if side == Side::Source { (self.host.pace)(self.binding.migration) } else { None };
        Rest::open((self.binding.migration, self.binding.vm.clone(), side), streams, grammar, pace)
    }

    /// Whether the destination's guest lacks what this copy has. One that is gone has nothing.
    async fn is_lacked(&self) -> Result<bool, EngineError> {
        match self.ask(|guest| guest.is_lacked()).await {
            Err(EngineError::Hypervisor(HypervisorError::Unreachable { source, .. })) if is_gone(&source) => {
                tracing::warn!(vm = %self.binding.vm, "its hypervisor is gone: what the destination's guest may lack is lost with it");
                Ok(false)
            }
            asked => asked,
        }
    }

    async fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut dyn Guest) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let (attach, address, vm) = (Arc::clone(&self.host.attach), self.binding.address.clone(), self.binding.vm.clone());
        Ok(joined(tokio::task::spawn_blocking(move || what(attach(&address, &vm)?.as_mut())).await)??)
    }
}

/// Looks, a tenth of a second apart: a hypervisor closes its stream a moment before it says that it is done.
const ENDS_WITHIN: u32 = 50;
