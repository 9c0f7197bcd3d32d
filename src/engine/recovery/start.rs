//! What a gateway that starts reads from its journal, repeats, and clears away.

use super::{Host, Interrupted, Records};
use crate::engine::EngineError;
use crate::engine::handoff::{Binding, Evidence, JournalRecord, Placement};
use crate::engine::witness::Exchange;
use crate::hypervisor::RunState;
use crate::migration::{DestinationRecord, HandoffAction, Holding, OfferRecord, Outcome, SourceHandoff, SourceRecord};
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
    use {DestinationRecord as D, JournalRecord as J, SourceRecord as S};
    let records = evidence.records(migration)?;
    let outcome = match records.last() {
        Some(J::Source(S::Abort { cold: true } | S::Reclaim { cold: true } | S::Fenced { cold: true }) | J::Destination(D::Fenced)) => {
            Some(Outcome::Cold)
        }
        Some(J::Source(S::Abort { .. }) | J::Destination(D::Refused)) => Some(Outcome::Stayed),
        Some(J::Source(S::Reclaim { .. } | S::Fenced { .. })) => Some(Outcome::Reclaimed),
        Some(J::Source(S::Done) | J::Destination(D::Closed)) => Some(Outcome::Moved),
        _ => None,
    };
    let about = |side, binding: Binding| Interruption { vm: binding.vm, peer: binding.peer, side, outcome };
    Ok(records.first().and_then(|first| match first {
        J::Source(S::Offer(offer)) => Some(about(Side::Source, offer.as_ref().into())),
        J::Destination(D::Prepared(record)) => Some(about(Side::Destination, record.as_ref().into())),
        _ => None,
    }))
}

/// The offer of a migration of which the journal says nothing more, while the VM is still where it was: FINAL may have been said,
/// and nobody else may run the guest.
///
/// # Errors
/// The journal cannot be read.
pub fn unfinished(evidence: &Evidence, migration: MigrationId) -> Result<Option<OfferRecord>, EngineError> {
    match evidence.records(migration)?.as_slice() {
        [JournalRecord::Source(SourceRecord::Offer(offer))] if evidence.is_here(&offer.as_ref().into(), offer.epoch)? => {
            Ok(Some(offer.as_ref().clone()))
        }
        _ => Ok(None),
    }
}

/// Whether the twin of a migration is or may become the guest, by the journal. One that is not is nobody's.
///
/// # Errors
/// The journal cannot be read.
pub fn may_own_twin(evidence: &Evidence, migration: MigrationId) -> Result<bool, EngineError> {
    use DestinationRecord::{Closed, Prepared, Run};
    let last = evidence.records(migration)?.pop();
    // A guest that had to be built from its image is where a twin would be.
    let rebuilt = matches!(
        last,
        Some(JournalRecord::Source(
            SourceRecord::Abort { cold: false } | SourceRecord::Reclaim { cold: false } | SourceRecord::Fenced { cold: false }
        ))
    );
    Ok(rebuilt || matches!(last, Some(JournalRecord::Destination(Prepared(_) | Run | Closed))))
}

/// Whether the guest that came with this migration has the disks that were made for it: it runs or ran here, or it never will.
/// Nothing as long as the source has to say.
///
/// # Errors
/// The journal cannot be read.
pub fn has_disks(evidence: &Evidence, migration: MigrationId) -> Result<Option<bool>, EngineError> {
    use DestinationRecord::{Closed, Fenced, Prepared, Run};
    Ok(match evidence.records(migration)?.pop() {
        Some(JournalRecord::Destination(Prepared(_))) => None,
        Some(JournalRecord::Destination(Run | Closed | Fenced)) => Some(true),
        _ => Some(false),
    })
}

/// Repeats the effect of a migration's last record, in case a crash came between the two: resumes a guest that stays,
/// destroys the paused copy of one that is away. Only for a gateway that starts: no migration has a guest in hand then,
/// and a record speaks for the guest only while the VM's placement is the one that it made.
///
/// # Errors
/// The journal cannot be read, or the guest does not do it.
pub async fn repeat_effect(evidence: &Evidence, host: &Host, migration: MigrationId) -> Result<(), EngineError> {
    let records = evidence.records(migration)?;
    let (Some(JournalRecord::Source(SourceRecord::Offer(offer))), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
    let binding = Binding::from(offer.as_ref());
    let read = |source| EngineError::Record { migration, source };
    let place = evidence.journal.vm(&binding.vm)?.map(|bytes| Placement::read(&bytes)).transpose().map_err(read)?;
    if place.is_none() || place != last.placement(&binding) {
        return Ok(());
    }
    let sources: Vec<SourceRecord> =
        records.iter().filter_map(|record| if let JournalRecord::Source(record) = record { Some(record.clone()) } else { None }).collect();
    let mut interrupted = Interrupted {
        evidence: evidence.clone(),
        host: host.clone(),
        binding,
        records: Records::Source(Vec::new()),
        heads: Exchange::default(),
    };
    let holding = interrupted.locate().await?;
    let state = if holding == Holding::Memory { Some(interrupted.state_at(&interrupted.binding.address).await?) } else { None };
    let Some((_, mut actions)) = SourceHandoff::recover(&sources, holding) else { return Ok(()) };
    let awake = actions.contains(&HandoffAction::Resume);
    match state {
        // A guest that runs may still be slowed down and watched.
        Some(RunState::Running) if awake => {}
        Some(RunState::Paused) | None => {}
        // What runs, has ended or waits for a guest is not the copy that the record speaks of.
        Some(_) => actions.retain(|action| *action == HandoffAction::Forget),
    }
    crate::failpoint::hit!("recovery.repeat.before");
    interrupted.perform(actions, None).await?;
    crate::failpoint::hit!("recovery.repeat.after");
    Ok(())
}

/// Removes the images of migrations that are over: what a journal does not promise anything to. For a gateway that starts, once
/// everything else is settled.
///
/// # Errors
/// The directory cannot be read.
pub fn sweep_images(evidence: &Evidence) -> std::io::Result<()> {
    use {DestinationRecord as D, JournalRecord as J, SourceRecord as S};
    for path in std::fs::read_dir(&evidence.images)?.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split('.').next()).map(str::parse::<MigrationId>);
        let Some(Ok(migration)) = name else { continue };
        let promises = |last: &JournalRecord| {
            let stays = matches!(last, J::Source(S::Abort { cold: false } | S::Reclaim { cold: false } | S::Fenced { cold: false }));
            stays || matches!(last, J::Source(S::Offer(_) | S::Commit { .. }) | J::Destination(D::Prepared(_) | D::Run))
        };
        // A journal that cannot be read may promise anything.
        let needed = evidence.records(migration).map_or(true, |records| records.last().is_some_and(promises));
        if !needed && let Err(error) = crate::storage::remove_image(&evidence.image_path(migration)) {
            tracing::warn!(%migration, error = %crate::telemetry::chain(&error), "an image of nobody stays behind");
        }
    }
    Ok(())
}
