//! What a destination is given, and how it ends.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::engine::handoff::Evidence;
use crate::engine::source::{AskCommit, Command};
use crate::engine::{DiskFigures, EngineError, Link};
use crate::hypervisor::PagedDestination;
use crate::migration::Outcome;
use crate::types::Round;
use crate::wire::{Message, Offer};

/// What is to be received. `T` is the driver's shape.
pub struct DestinationOrder<T: ?Sized = dyn PagedDestination> {
    /// The offer, permitted by policy.
    pub offer: Offer,
    /// Lanes granted.
    pub lanes: u16,
    /// Journal, audit log, signing key.
    pub evidence: Evidence,
    /// The session with the source.
    pub link: Link,
    /// The empty twin.
    pub twin: Box<T>,
    /// Policy at commit.
    pub ask_commit: AskCommit,
    /// SHA-256 of the policy set that permitted the offer.
    pub policy_digest: [u8; 32],
    /// Bytes a second that the source is told to send at most.
    pub bandwidth_max: Option<NonZeroU64>,
    /// [`Command::Cancel`] says that this gateway is shutting down; everything else is steered at the source.
    pub commands: mpsc::Receiver<Command>,
    /// New sessions in which the source comes back for this migration.
    pub returns: mpsc::Receiver<Return>,
    /// The longest outage of the link that is waited out.
    pub outage_max: Duration,
    /// Where it is noted how far each lane has come, for a gateway that is started anew; nowhere without.
    pub progress: Option<PathBuf>,
    /// The round in which the source comes back to a twin that an earlier gateway left.
    pub comes_back_in: Option<Round>,
    /// Where the hypervisor lets the gateway reach its disks.
    pub disk_socket: PathBuf,
    /// Disks of the offer that may hold something already.
    pub held_disks: Vec<u16>,
}

/// The source comes back in a new session, with this as its first message.
#[derive(Debug)]
pub struct Return {
    /// The session.
    pub link: Link,
    /// OFFER, RESUME or a handoff message.
    pub first: Message,
}

/// How it ended here.
#[derive(Debug)]
pub struct DestinationEnd {
    /// `Moved`: the VM runs here. `Stayed`: it never will, from this attempt. `None`: the twin is
    /// prepared and the source has to say; the journal knows.
    pub outcome: Option<Outcome>,
    /// Why it did not move.
    pub error: Option<EngineError>,
    /// Where the twin's VMM is attached.
    pub address: String,
    /// Time that lanes spent to make pages of frames, all of them together.
    pub decode: Duration,
    /// Disks that came alone, with their guest left where it is: all of them, unless an error says otherwise.
    pub disks: DiskFigures,
}

impl<T: ?Sized> std::fmt::Debug for DestinationOrder<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DestinationOrder").field("migration", &self.offer.migration).field("vm", &self.offer.vm).finish_non_exhaustive()
    }
}

impl<T: ?Sized> DestinationOrder<T> {
    /// The same, into another twin.
    #[must_use]
    pub fn into_twin<U: ?Sized>(self, twin: Box<U>) -> DestinationOrder<U> {
        let Self {
            offer,
            lanes,
            evidence,
            link,
            ask_commit,
            policy_digest,
            bandwidth_max,
            commands,
            returns,
            outage_max,
            progress,
            comes_back_in,
            disk_socket,
            held_disks,
            ..
        } = self;
        DestinationOrder {
            offer,
            lanes,
            evidence,
            link,
            twin,
            ask_commit,
            policy_digest,
            bandwidth_max,
            commands,
            returns,
            outage_max,
            progress,
            comes_back_in,
            disk_socket,
            held_disks,
        }
    }
}
