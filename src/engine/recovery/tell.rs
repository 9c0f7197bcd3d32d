//! A destination is told of attempts that ended without it.

use super::{Host, Interrupted, Records};
use crate::engine::handoff::{Binding, Evidence};
use crate::engine::{EngineError, Link};
use crate::limits;
use crate::migration::{Holding, SourceHandoff, SourceState, SourceStep};
use crate::transport::TransportError;
use crate::types::{Epoch, MigrationId, SpiffeId, VmName, VmUuid};
use crate::wire::{ErrorClass, Handoff, Message};

/// Tells the destination of an attempt that ended with ABORT, and waits until it has heard it: it may hold a twin for it.
///
/// # Errors
/// The journal cannot be read, or the peer is not the one or does not answer.
pub async fn tell(evidence: &Evidence, host: &Host, migration: MigrationId, link: &Link) -> Result<(), EngineError> {
    let Some(mut interrupted) = Interrupted::load(evidence, host, migration)? else { return Ok(()) };
    let Records::Source(records) = &interrupted.records else { return Ok(()) };
    // What is held here has no part in what is said.
    let Some((mut machine, _)) = SourceHandoff::recover(records, Holding::Memory) else { return Ok(()) };
    if link.peer.spiffe != interrupted.binding.peer || !matches!(machine.state(), SourceState::Aborted { .. }) {
        return Ok(());
    }
    interrupted.perform(machine.step(&SourceStep::Reconnected)?, Some(&link.session)).await?;
    until_abort_is_heard(migration, link).await
}

/// An offer that was made, and of which the journal says nothing because its answer did not come.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Withdrawal {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which this gateway owns it.
    pub epoch: Epoch,
    /// To whom it was offered.
    pub peer: SpiffeId,
}

/// Tells a destination that an offer is withdrawn which it may still wait for.
///
/// # Errors
/// The peer is not the one or does not answer.
pub async fn withdraw(evidence: &Evidence, withdrawal: &Withdrawal, link: &Link) -> Result<(), EngineError> {
    let Withdrawal { migration, vm, uuid, epoch, peer } = withdrawal.clone();
    if link.peer.spiffe != peer {
        return Err(EngineError::NotAuthentic { migration, why: "session peer" });
    }
    let (peer_incarnation, peer_key) = (link.peer.incarnation, link.peer.signing_key);
    let binding = Binding { migration, vm, uuid, epoch: epoch.next(), peer, peer_incarnation, peer_key, address: String::new() };
    evidence.send(&link.session, &binding, Handoff::Abort { class: ErrorClass::Cancelled }).await;
    until_abort_is_heard(migration, link).await
}

async fn until_abort_is_heard(migration: MigrationId, link: &Link) -> Result<(), EngineError> {
    let answer = async {
        loop {
            match link.session.receive().await {
                Ok(Message::Handoff(signed)) if matches!(signed.message.step, Handoff::Refuse { .. }) => return Ok(()),
                // It knows nothing of the migration any more.
                Err(TransportError::Closed { class: None, .. }) => return Ok(()),
                Ok(_) => {}
                Err(source) => return Err(EngineError::Transport { migration, source }),
            }
        }
    };
    let timed_out = EngineError::Silent { migration, expected: "REFUSE", limit: limits::ANSWER_WITHIN };
    tokio::time::timeout(limits::ANSWER_WITHIN, answer).await.unwrap_or(Err(timed_out))
}
