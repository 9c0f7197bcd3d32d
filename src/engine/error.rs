//! Why a migration did not go through.

use std::time::Duration;

use crate::audit::AuditError;
use crate::hypervisor::HypervisorError;
use crate::journal::JournalError;
use crate::limits;
use crate::memory::{DecodeError, LayoutError, RamError};
use crate::migration::{Refusal, Verdict};
use crate::transport::TransportError;
use crate::types::{LaneIndex, MigrationId, SpiffeId, VmName};
use crate::wire::{ErrorClass, WireError};

/// Of a session of which nobody has said yet which migration it is for.
pub(super) const NO_MIGRATION: MigrationId = MigrationId([0; 16]);

fn of_tunnel(migration: MigrationId) -> String {
    if migration == NO_MIGRATION { "the session failed".to_owned() } else { format!("the tunnel of migration `{migration}` failed") }
}

fn of_bytes(error: &WireError) -> &'static str {
    if error.class() == ErrorClass::PeerIncompatible {
        "the gateways do not understand each other"
    } else {
        "the peer sent a malformed message"
    }
}

/// Why a migration did not go through.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The session or a lane failed.
    #[error("{}", of_tunnel(*.migration))]
    Transport {
        /// The attempt; [`NO_MIGRATION`] before a peer has said what it is about.
        migration: MigrationId,
        /// What failed.
        #[source]
        source: TransportError,
    },
    /// The peer sent bytes that are no message or not the one that has to come.
    #[error("{}", of_bytes(.0))]
    Wire(#[source] WireError),
    /// The peer sent a message or frame out of place.
    #[error("the peer broke the protocol: expected {expected}, got {got}")]
    OutOfPlace {
        /// What had to come.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// A machine refused an event.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A page frame was refused.
    #[error("lane {lane} sent a frame that was refused")]
    Frame {
        /// Which lane.
        lane: LaneIndex,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// What the lanes carried is not what both sides counted.
    #[error("round totals differ on lane {lane}: the source sent {sent} frames, {applied} were applied")]
    Totals {
        /// Which lane.
        lane: LaneIndex,
        /// Frames by the source's count.
        sent: u64,
        /// Frames by the destination's count.
        applied: u64,
    },
    /// The peer sent a stream that its hypervisor would not have sent.
    #[error("the stream of `{vm}` was refused")]
    Unsound {
        /// Which VM.
        vm: VmName,
        /// Why.
        #[source]
        source: crate::condense::Unsound,
    },
    /// The final comparison failed.
    #[error("{what} of `{vm}` at the destination differs from the source's")]
    Digest {
        /// Which VM.
        vm: VmName,
        /// `device state`, `guest memory` or `lane totals`.
        what: &'static str,
    },
    /// The driver failed.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A disk could not be read or written through its hypervisor.
    #[error("disks of `{vm}`: {what}")]
    Disk {
        /// Which VM.
        vm: VmName,
        /// Which of them, and what was tried.
        what: String,
        /// What the operating system or the hypervisor said.
        #[source]
        source: std::io::Error,
    },
    /// Guest RAM could not be read or written.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The offered memory layout makes no sense.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The audit log failed.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// A record of the journal cannot be read.
    #[error("journal of migration `{migration}` holds a record that this version cannot read")]
    Record {
        /// The attempt.
        migration: MigrationId,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The peer gave up; its words are a claim.
    #[error("the peer ended migration `{migration}`: it says `{reason}`")]
    Peer {
        /// The attempt.
        migration: MigrationId,
        /// Its class.
        class: ErrorClass,
        /// Its words, bounded and without control characters.
        reason: String,
    },
    /// The guest dirties faster than can be sent.
    #[error("migration of `{vm}` {verdict}")]
    NotConverging {
        /// Which VM.
        vm: VmName,
        /// The numbers.
        verdict: Verdict,
    },
    /// Policy or identity no longer permits at commit.
    #[error("the switch of `{vm}` was denied: {why}")]
    Denied {
        /// Which VM.
        vm: VmName,
        /// Policy's words.
        why: String,
    },
    /// A handoff message is not from the gateway it has to be from.
    #[error("a handoff message of migration `{migration}` is not authentic: {why}")]
    NotAuthentic {
        /// The attempt.
        migration: MigrationId,
        /// Which binding is broken.
        why: &'static str,
    },
    /// Took too long.
    #[error("migration of `{vm}` did not end within {} s", .limit.as_secs_f64())]
    TimedOut {
        /// Which VM.
        vm: VmName,
        /// The deadline given.
        limit: Duration,
    },
    /// The link was away for too long.
    #[error("the link of migration `{migration}` of `{vm}` was away for more than {} s", .limit.as_secs_f64())]
    Outage {
        /// Which VM.
        vm: VmName,
        /// The attempt.
        migration: MigrationId,
        /// The longest outage allowed.
        limit: Duration,
        /// What was seen last.
        #[source]
        source: Option<Box<Self>>,
    },
    /// The destination was not reached again.
    #[error("migration `{migration}` cannot go on: {why}")]
    NotBack {
        /// The attempt.
        migration: MigrationId,
        /// Whose fault.
        class: ErrorClass,
        /// What came of the last try.
        why: String,
    },
    /// A destination that comes back without the journal that was offered the VM.
    #[error("the peer of migration `{migration}` came back as another: its {what} changed")]
    Changed {
        /// The attempt.
        migration: MigrationId,
        /// `identity`, `journal` or `signing key`.
        what: &'static str,
    },
    /// A final image could not be made, removed or used.
    #[error(transparent)]
    Image(#[from] crate::storage::ImageError),
    /// How far a lane has come cannot be noted.
    #[error("progress of migration `{migration}` cannot be noted")]
    Progress {
        /// The attempt.
        migration: MigrationId,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// Somebody asked to stop.
    #[error("migration of `{vm}` was cancelled")]
    Cancelled {
        /// Which VM.
        vm: VmName,
    },
    /// What the peer proved at the beginning is not good any more.
    #[error("peer `{peer}` would not be admitted any more")]
    NotAdmitted {
        /// The other end.
        peer: SpiffeId,
        /// Why not.
        #[source]
        source: TransportError,
    },
    /// This gateway was told to stop while a VM came in.
    #[error("the gateway is shutting down and takes `{vm}` no further")]
    ShuttingDown {
        /// Which VM.
        vm: VmName,
    },
    /// COMMIT is journaled and the destination's answer is missing.
    #[error("migration `{migration}` of `{vm}` is in doubt: the destination was given the VM and has not answered")]
    InDoubt {
        /// Which VM.
        vm: VmName,
        /// The attempt.
        migration: MigrationId,
    },
    /// A guest that was split lacks pages, and gets no more of them by itself.
    #[error("the guest of `{vm}` was given to the destination, lacks pages that only the source has, and gets no more of them: {why}")]
    Lacking {
        /// Which VM.
        vm: VmName,
        /// What happened.
        why: String,
    },
    /// The arbiter did not let the VM change its owner; nothing was written.
    #[error("migration `{migration}` of `{vm}` is in doubt: the arbiter says that the owner is {owner}")]
    Lost {
        /// Which VM.
        vm: VmName,
        /// The attempt.
        migration: MigrationId,
        /// Who owns it, in the arbiter's words.
        owner: String,
    },
    /// The guest stands still and the destination takes too long.
    #[error("the switch of `{vm}` did not end within {} s of its pause", .limit.as_secs_f64())]
    PausedTooLong {
        /// Which VM.
        vm: VmName,
        /// The deadline.
        limit: Duration,
    },
    /// PREPARED is journaled and the source's word is missing.
    #[error("migration `{migration}` of `{vm}` is in doubt: the twin is prepared and the source has not decided")]
    Undecided {
        /// Which VM.
        vm: VmName,
        /// The attempt.
        migration: MigrationId,
    },
    /// The peer lives and does not go on.
    #[error("the peer of migration `{migration}` is silent: expected {expected} within {} s", .limit.as_secs_f64())]
    Silent {
        /// The attempt.
        migration: MigrationId,
        /// What had to come.
        expected: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Our own broken invariant.
    #[error("internal error: {0}; please report it")]
    Bug(String),
}

/// A destination that was started anew knows none of its lanes; whether it knows the migration it says when asked.
pub(super) fn may_be_forgotten(error: &EngineError) -> bool {
    matches!(error, EngineError::Transport { source: TransportError::Closed { class: Some(ErrorClass::Unauthenticated), .. }, .. })
}

impl EngineError {
    /// The peer gave up. What it says reaches terminals and logs, so it does so without control characters.
    pub(super) fn peer(migration: MigrationId, class: ErrorClass, words: &str) -> Self {
        // What only we can say of ourselves, and above all that an operator has to decide, is not the peer's to claim.
        let class = match class {
            ErrorClass::InDoubt | ErrorClass::Bug | ErrorClass::Misuse => ErrorClass::PeerMisbehaved,
            class => class,
        };
        let plain = |c: char| if c.is_control() { c.escape_default().collect() } else { vec![c] };
        Self::Peer { migration, class, reason: words.chars().flat_map(plain).take(limits::REASON_BYTES_MAX).collect() }
    }

    /// Whether this may be nothing but an outage of the link.
    pub(super) fn is_outage(&self) -> bool {
        matches!(self, Self::Transport { source, .. } if source.is_outage())
    }

    /// Whose fault.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Transport { source, .. } | Self::NotAdmitted { source, .. } => source.class(),
            Self::Wire(error) => error.class(),
            Self::OutOfPlace { .. } | Self::Refused(_) | Self::Frame { .. } | Self::Totals { .. } | Self::Digest { .. } => {
                ErrorClass::PeerMisbehaved
            }
            Self::Layout(_) | Self::NotAuthentic { .. } | Self::Changed { .. } | Self::Unsound { .. } => ErrorClass::PeerMisbehaved,
            Self::Hypervisor(HypervisorError::Incompatible { .. }) => ErrorClass::PeerIncompatible,
            // The network between the two is nobody's fault and nobody's to mend but the operator's.
            Self::Outage { .. } | Self::Progress { .. } | Self::Image(_) | Self::Disk { .. } => ErrorClass::Local,
            Self::Hypervisor(_) | Self::Ram(_) | Self::Journal(_) | Self::Audit(_) | Self::Record { .. } => ErrorClass::Local,
            Self::Peer { class, .. } | Self::NotBack { class, .. } => *class,
            Self::NotConverging { .. } => ErrorClass::NotConverged,
            Self::Denied { .. } => ErrorClass::Denied,
            Self::TimedOut { .. } | Self::PausedTooLong { .. } | Self::Silent { .. } => ErrorClass::TimedOut,
            Self::Cancelled { .. } => ErrorClass::Cancelled,
            // To the source this gateway is one that cannot be reached any more.
            Self::ShuttingDown { .. } => ErrorClass::PeerUnreachable,
            Self::InDoubt { .. } | Self::Undecided { .. } | Self::Lacking { .. } | Self::Lost { .. } => ErrorClass::InDoubt,
            Self::Bug(_) => ErrorClass::Bug,
        }
    }
}
