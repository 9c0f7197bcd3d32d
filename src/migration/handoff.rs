//! The commit part: who owns the VM, decided by journals alone.
//!
//! Protocol and proof: `ARCHITECTURE.md`, handoff. Each side is one machine with one record a state.
//! A machine is rebuilt from its journal and from what the host still holds with `recover`, so that a restarted gateway
//! goes on with exactly the transitions that a running one has.

mod destination;
mod source;

use serde::{Deserialize, Serialize};

use crate::types::{Epoch, Incarnation, MigrationId, SpiffeId, VmName, VmUuid};
use crate::wire::{Durability, FinalDigest, Handoff};

pub use destination::{DestinationHandoff, DestinationState, DestinationStep};
pub use source::{SourceDecision, SourceHandoff, SourceState, SourceStep};

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM runs on the destination.
    Moved,
    /// The VM runs on the source, as before.
    Stayed,
    /// The VM was given and refused, or an operator took it back: it runs on the source again.
    Reclaimed,
    /// The VM belongs to this gateway and its memory is lost or not to be trusted: it has to be started from its disks.
    Cold,
}

/// What is left of a guest on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holding {
    /// A VMM with its memory.
    Memory,
    /// No VMM, but its final image on disk, whole.
    Image,
    /// Neither.
    Nothing,
}

/// What a source writes before it gives a VM away, and what it needs to go on after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferRecord {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM's name at the source.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which the source owns the VM.
    pub epoch: Epoch,
    /// The destination gateway.
    pub peer: SpiffeId,
    /// The destination's journal.
    pub peer_incarnation: Incarnation,
    /// The key that signs the destination's handoff messages.
    pub peer_key: [u8; 32],
    /// SHA-256 of the policy set that permitted the release.
    pub policy_digest: [u8; 32],
    /// Where the guest's VMM is attached.
    pub address: String,
    /// Where the final image is on disk before the switch.
    #[serde(with = "durability_text")]
    pub durability: Durability,
}

/// A record of the source's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRecord {
    /// Written while the guest still runs: from now on it may be paused for this attempt.
    Offer(Box<OfferRecord>),
    /// The destination owns the VM. The source never runs it again unless it is refused.
    Commit {
        /// What the destination has prepared.
        #[serde(with = "digest_text")]
        digest: FinalDigest,
        /// The position of the destination's journal when it said so. A REFUSED behind it makes the journal longer: a REFUSE
        /// from no later position is of a journal that was restored from a copy and has forgotten, or was said before.
        position: u64,
    },
    /// The VM stays. Written only while COMMIT was never said.
    Abort {
        /// Whether nothing is left here that could run.
        cold: bool,
    },
    /// The destination refused the VM after COMMIT; the source owns it again.
    Reclaim {
        /// Whether nothing is left here that could run.
        cold: bool,
    },
    /// An operator took the VM back from a destination that is off for good; who, and on what evidence, is in the audit log.
    Fenced {
        /// Whether the copy here is not to be trusted, because the destination may have run its own.
        cold: bool,
    },
    /// The destination runs the VM; the old copy may be destroyed.
    Done,
}

/// What a destination writes before it says that it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedRecord {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM's name.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which the destination would own the VM.
    pub epoch: Epoch,
    /// The source gateway.
    pub peer: SpiffeId,
    /// The source's journal.
    pub peer_incarnation: Incarnation,
    /// The key that signs the source's handoff messages.
    pub peer_key: [u8; 32],
    /// What the twin holds.
    #[serde(with = "digest_text")]
    pub digest: FinalDigest,
    /// Where the twin's VMM is attached.
    pub address: String,
    /// Where the final image is on disk before the switch.
    #[serde(with = "durability_text")]
    pub durability: Durability,
}

/// A record of the destination's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationRecord {
    /// The twin is complete and stays paused until COMMIT.
    Prepared(Box<PreparedRecord>),
    /// The destination owns the VM and runs it.
    Run,
    /// The destination will never run this attempt's VM.
    Refused,
    /// An operator gave the VM to the destination because the source is off for good. What was prepared may be older than
    /// what the source ran last, so it is thrown away.
    Fenced,
    /// The source knows that the VM runs here.
    Closed,
}

/// What to do, strictly in this order. When one of the first four fails, those behind it are not done, and the machine is
/// told with `Failed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandoffAction<R> {
    /// Make this record durable.
    Journal(R),
    /// Make the final image durable on this host.
    Keep,
    /// Remove the final image for good: from here on the guest may run past it.
    Forget,
    /// Build the guest from its image, paused.
    Restore,
    /// Give the guest a new generation id: it may have been here before. One that runs has what it needs and keeps its own.
    Renew,
    /// Tell the peer. May be lost: it is said again on each reconnect.
    Send(Handoff),
    /// Ask policy and identity whether this peer may still have, or give, the VM.
    AskCommit,
    /// Start the guest's vCPUs here.
    Resume,
    /// Destroy the copy here.
    Destroy,
    /// Nothing more follows for this migration.
    End(Outcome),
    /// A record may or may not be on disk: nothing more is done until the journal has been read again.
    LeaveToJournal,
}

impl<R> HandoffAction<R> {
    /// Whether those behind this one count on it: the disk that fails it ends the list.
    #[must_use]
    pub const fn is_durable(&self) -> bool {
        matches!(self, Self::Journal(_) | Self::Keep | Self::Forget | Self::Restore)
    }
}

/// A handoff message by name.
pub(crate) fn handoff_name(step: &Handoff) -> &'static str {
    match step {
        Handoff::Final { .. } => "FINAL",
        Handoff::Prepared { .. } => "PREPARED",
        Handoff::Commit { .. } => "COMMIT",
        Handoff::Running => "RUNNING",
        Handoff::Done => "DONE",
        Handoff::Abort { .. } => "ABORT",
        Handoff::Refuse { .. } => "REFUSE",
    }
}

/// How a guest comes to life from what is left of it; `kept` says whether this side has an image on disk, `renew` whether
/// the guest may have run elsewhere since. `INVARIANT(image-once)`: an image is gone for good before its guest runs, so that
/// nobody resumes it when the guest has run past it; what comes from an image has a new generation.
fn wake<R>(holding: Holding, kept: bool, renew: bool) -> Vec<HandoffAction<R>> {
    use HandoffAction::{Forget, Renew, Restore, Resume};
    let steps = match holding {
        Holding::Nothing => vec![(kept, Forget)],
        Holding::Image => vec![(true, Restore), (true, Renew), (true, Forget), (true, Resume)],
        Holding::Memory => vec![(renew, Renew), (kept, Forget), (true, Resume)],
    };
    steps.into_iter().filter_map(|(needed, action)| needed.then_some(action)).collect()
}

mod durability_text {
    //! A durability in the journal, by its name.
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::wire::Durability;

    pub(super) fn serialize<S: Serializer>(durability: &Durability, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(durability.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Durability, D::Error> {
        let name = String::deserialize(deserializer)?;
        Durability::from_name(&name).ok_or_else(|| D::Error::custom("expected `none`, `dest` or `both`"))
    }
}

mod digest_text {
    //! A digest in the journal, as three hexadecimal words.
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::wire::FinalDigest;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
        let mut out = [0; N];
        if text.len() != 2 * N || !text.is_ascii() {
            return None;
        }
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(out)
    }

    pub(super) fn serialize<S: Serializer>(digest: &FinalDigest, serializer: S) -> Result<S::Ok, S::Error> {
        let text = format!("{} {} {}", hex(&digest.state), hex(&digest.lanes), hex(&digest.memory.to_be_bytes()));
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FinalDigest, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut words = text.split(' ');
        let mut parse = || {
            let state = unhex(words.next()?)?;
            let lanes = unhex(words.next()?)?;
            let memory = u128::from_be_bytes(unhex(words.next()?)?);
            Some(FinalDigest { state, lanes, memory })
        };
        parse().ok_or_else(|| D::Error::custom("expected three hexadecimal digests"))
    }
}
