//! What a journal says of a VM, for people: the last record that changed its owner, and what it means.

use std::collections::BTreeMap;

use crate::engine::handoff::{Binding, Evidence, JournalRecord, Placement};
use crate::engine::{Decision, EngineError};
use crate::migration::{DestinationRecord, SourceRecord};
use crate::types::{Epoch, MigrationId, Side, SpiffeId, VmName, VmUuid};

/// A handoff record in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordNote {
    /// Its name, as in the audit log.
    pub name: &'static str,
    /// What it means on this gateway.
    pub meaning: &'static str,
    /// When it was made, in milliseconds since 1970-01-01 UTC, if that is known.
    pub unix_ms: Option<i64>,
}

/// What one migration has made of its VM, by the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM's name.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The other gateway.
    pub peer: SpiffeId,
    /// Which end this gateway was.
    pub side: Side,
    /// The epoch that the record speaks of.
    pub epoch: Epoch,
    /// The last record.
    pub record: RecordNote,
    /// Whether only the peer's word, or the operators', leads on: COMMIT at a source, PREPARED at a destination.
    pub open: bool,
    /// Whether the VM has to be started from its disks.
    pub cold: bool,
}

/// What operators can decide where a VM is in doubt.
#[must_use]
pub fn decisions(side: Side) -> &'static [Decision] {
    match side {
        Side::Source => &[Decision::Reclaim, Decision::Restart, Decision::Release],
        Side::Destination => &[Decision::Restart, Decision::Refuse],
    }
}

/// What a migration has made of its VM; nothing when only its refusal is known.
///
/// # Errors
/// The journal cannot be read.
pub fn standing(evidence: &Evidence, migration: MigrationId) -> Result<Option<Standing>, EngineError> {
    let records = evidence.records(migration)?;
    let (binding, side) = match records.first() {
        Some(JournalRecord::Source(SourceRecord::Offer(offer))) => (Binding::from(offer.as_ref()), Side::Source),
        Some(JournalRecord::Destination(DestinationRecord::Prepared(record))) => (Binding::from(record.as_ref()), Side::Destination),
        _ => return Ok(None),
    };
    let Some(last) = records.last() else { return Ok(None) };
    let placement = match last {
        // It tells of the other end; RUN before it made the placement.
        JournalRecord::Destination(DestinationRecord::Closed) => JournalRecord::from(DestinationRecord::Run).placement(&binding),
        last => last.placement(&binding),
    };
    let (epoch, cold) = match placement {
        Some(Placement::Here { epoch, .. } | Placement::Given { epoch, .. } | Placement::Away { epoch, .. }) => (epoch, false),
        Some(Placement::Cold { epoch }) => (epoch, true),
        None => (binding.epoch, false),
    };
    let open =
        matches!(last, JournalRecord::Source(SourceRecord::Commit { .. }) | JournalRecord::Destination(DestinationRecord::Prepared(_)));
    let record = note(evidence, migration, records.len(), last)?;
    let Binding { vm, uuid, peer, .. } = binding;
    Ok(Some(Standing { migration, vm, uuid, peer, side, epoch, record, open, cold }))
}

/// Every migration whose VM is in doubt, by its id.
///
/// # Errors
/// The journal cannot be read.
pub fn doubts(evidence: &Evidence) -> Result<Vec<Standing>, EngineError> {
    let mut open = Vec::new();
    for migration in evidence.journal.migrations()? {
        open.extend(standing(evidence, migration)?.filter(|standing| standing.open));
    }
    Ok(open)
}

/// For each VM the migration that made its owner what it is. Attempts that changed nothing are left out.
///
/// # Errors
/// The journal cannot be read.
pub fn owners(evidence: &Evidence) -> Result<BTreeMap<VmName, Standing>, EngineError> {
    let mut owners: BTreeMap<VmName, Standing> = BTreeMap::new();
    for migration in evidence.journal.migrations()? {
        let Some(found) = standing(evidence, migration)? else { continue };
        let changed = found.cold || !matches!(found.record.name, "offer" | "abort" | "refused");
        let known = owners.get(&found.vm).map(|known| known.epoch);
        if changed && known.is_none_or(|known| known <= found.epoch) {
            owners.insert(found.vm.clone(), found);
        }
    }
    Ok(owners)
}

/// The records of a migration in words, in order.
///
/// # Errors
/// The journal cannot be read.
pub fn notes(evidence: &Evidence, migration: MigrationId) -> Result<Vec<RecordNote>, EngineError> {
    let records = evidence.records(migration)?;
    records.iter().zip(1..).map(|(record, number)| note(evidence, migration, number, record)).collect()
}

fn note(evidence: &Evidence, migration: MigrationId, number: usize, record: &JournalRecord) -> Result<RecordNote, EngineError> {
    let unix_ms = evidence.journal.added_at(migration, u64::try_from(number).unwrap_or(u64::MAX))?;
    Ok(RecordNote { name: record.name(), meaning: meaning(record), unix_ms })
}

fn meaning(record: &JournalRecord) -> &'static str {
    use {DestinationRecord as D, JournalRecord as J, SourceRecord as S};
    match record {
        J::Source(S::Offer(_)) => "the VM is offered and still owned here; it may be paused for this attempt",
        J::Source(S::Commit { .. }) => "the VM was given to the destination, whose answer is missing; the copy here stays paused",
        J::Source(S::Abort { cold: false }) => "the VM stays here",
        J::Source(S::Abort { cold: true }) => "the VM stays here, and has to be started from its disks",
        J::Source(S::Reclaim { cold: false }) => "the destination refused the VM: it is owned here again",
        J::Source(S::Reclaim { cold: true }) => {
            "the destination refused the VM: it is owned here again, and has to be started from its disks"
        }
        J::Source(S::Fenced { cold: false }) => "operators took the VM back from a destination that is off for good",
        J::Source(S::Fenced { cold: true }) | J::Destination(D::Fenced) => "operators decided that the VM is started here from its disks",
        J::Source(S::Done) => "the destination has the VM; nothing of it is left here",
        J::Destination(D::Prepared(_)) => "the twin is complete and stays paused; the source has not said whether it gives the VM",
        J::Destination(D::Run) => "the VM is owned here and runs here",
        J::Destination(D::Refused) => "this attempt's VM will never run here",
        J::Destination(D::Closed) => "the VM is owned here, and the source knows it",
    }
}
