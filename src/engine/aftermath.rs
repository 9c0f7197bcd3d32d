//! What a journal says of migrations that are over or were cut off, for a gateway that starts again.

use std::sync::Arc;

use crate::engine::EngineError;
use crate::engine::handoff::{Attach, Binding, Evidence, JournalRecord, Placement, joined, wake};
use crate::hypervisor::{HypervisorError, PagedSource, RunState};
use crate::migration::{DestinationRecord, Outcome, SourceRecord};
use crate::types::{MigrationId, Side, SpiffeId, VmName};

/// A migration that a journal knows: what it was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interruption {
    /// The VM.
    pub vm: VmName,
    /// The other gateway.
    pub peer: SpiffeId,
    /// Which end this gateway was.
    pub side: Side,
    /// How it ended, once nothing is open.
    pub outcome: Option<Outcome>,
}

/// What a migration of the journal was about; nothing when only its refusal is known.
///
/// # Errors
/// The journal cannot be read.
pub fn interruption(evidence: &Evidence, migration: MigrationId) -> Result<Option<Interruption>, EngineError> {
    let records = evidence.records(migration)?;
    let outcome = match records.last() {
        Some(JournalRecord::Source(SourceRecord::Abort) | JournalRecord::Destination(DestinationRecord::Refused)) => Some(Outcome::Stayed),
        Some(JournalRecord::Source(SourceRecord::Reclaim)) => Some(Outcome::Reclaimed),
        Some(JournalRecord::Source(SourceRecord::Done) | JournalRecord::Destination(DestinationRecord::Closed)) => Some(Outcome::Moved),
        _ => None,
    };
    let about = |side, binding: Binding| Interruption { vm: binding.vm, peer: binding.peer, side, outcome };
    Ok(records.first().and_then(|first| match first {
        JournalRecord::Source(SourceRecord::Offer(offer)) => Some(about(Side::Source, offer.as_ref().into())),
        JournalRecord::Destination(DestinationRecord::Prepared(record)) => Some(about(Side::Destination, record.as_ref().into())),
        _ => None,
    }))
}

/// Whether the twin of a migration is or may become the guest, by the journal. One that is not is nobody's.
///
/// # Errors
/// The journal cannot be read.
pub fn may_own_twin(evidence: &Evidence, migration: MigrationId) -> Result<bool, EngineError> {
    use DestinationRecord::{Closed, Prepared, Run};
    let last = evidence.records(migration)?.pop();
    Ok(matches!(last, Some(JournalRecord::Destination(Prepared(_) | Run | Closed))))
}

/// Repeats the effect of a migration's last record, in case a crash came between the two: resumes a guest that stays,
/// destroys the paused copy of one that is away. Only for a gateway that starts: no migration has a guest in hand then,
/// and a record speaks for the guest only while the VM's placement is the one that it made.
///
/// # Errors
/// The journal cannot be read, or the guest does not do it.
pub async fn repeat_effect(evidence: &Evidence, attach: &Attach, migration: MigrationId) -> Result<(), EngineError> {
    let records = evidence.records(migration)?;
    let (Some(JournalRecord::Source(SourceRecord::Offer(offer))), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
    let binding = Binding::from(offer.as_ref());
    let read = |source| EngineError::Record { migration, source };
    let place = evidence.journal.vm(&binding.vm)?.map(|bytes| Placement::read(&bytes)).transpose().map_err(read)?;
    if place.is_none() || place != last.placement(&binding) {
        return Ok(());
    }
    let effect: fn(&mut dyn PagedSource) -> Result<(), HypervisorError> = match last {
        JournalRecord::Source(SourceRecord::Abort | SourceRecord::Reclaim) => |guest| match guest.status()?.state {
            RunState::Paused => wake(guest),
            _ => Ok(()),
        },
        JournalRecord::Source(SourceRecord::Done) => |guest| match guest.status()?.state {
            RunState::Paused => guest.destroy(),
            _ => Ok(()),
        },
        _ => return Ok(()),
    };
    let (attach, address) = (Arc::clone(attach), binding.address);
    let repeat = move || match attach(&address, &binding.vm) {
        Ok(mut guest) => effect(guest.as_mut()),
        // A copy that is gone needs nothing.
        Err(_) => Ok(()),
    };
    Ok(joined(tokio::task::spawn_blocking(repeat).await)??)
}
