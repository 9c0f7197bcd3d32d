//! What a source is given, and how it ends.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::engine::disks::DiskOrder;
use crate::engine::handoff::Evidence;
use crate::engine::limiter::{Limiter, Share};
use crate::engine::meter::Figures;
use crate::engine::{CommonPath, EngineError, Link, PeerFacts};
use crate::hypervisor::{Machine, PagedSource};
use crate::limits;
use crate::migration::{Goal, OfferRecord, Outcome};
use crate::telemetry::Progress;
use crate::transport::Session;
use crate::types::{Epoch, MigrationId, VmName, VmUuid};
use crate::wire::{Offer, StreamTerms};

/// What is to be done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SourceOrder {
    /// This attempt.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which this gateway owns it.
    pub epoch: Epoch,
    /// Where its VMM is attached, for the journal.
    pub address: String,
    /// Downtime and throttling.
    pub goal: Goal,
    /// Bytes a second on the wire, all lanes together.
    pub bandwidth: Option<u64>,
    /// What the policies of both ends let it be at most, whatever is asked for.
    #[serde(default)]
    pub bandwidth_max: Option<u64>,
    /// What is asked of the stream.
    pub stream: StreamTerms,
    /// What the other end need not know of how that is done.
    pub manner: Manner,
    /// When to give up, from the start.
    pub timeout: Option<Duration>,
    /// How long to wait for a destination that was given the VM, lives and does not answer.
    pub resolve_timeout: Duration,
    /// The longest outage of the link that is waited out.
    pub outage_max: Duration,
    /// SHA-256 of the policy set that permitted the release.
    pub policy_digest: [u8; 32],
    /// The directory where it is written what the destination does not have yet, for a gateway that is started anew.
    pub ledger: Option<PathBuf>,
    /// How the disks of the guest's machine move with it.
    #[serde(default)]
    pub disks: Option<DiskOrder>,
}

impl SourceOrder {
    /// What is wanted, as far as policy permits it. 0 is no limit.
    pub(in crate::engine) fn limited(&self, wanted: Option<u64>) -> Option<u64> {
        wanted.filter(|bytes| *bytes > 0).into_iter().chain(self.bandwidth_max).min()
    }

    /// What it is sent with at most, bytes a second, if that is bounded.
    #[must_use]
    pub fn pace(&self) -> Option<u64> {
        self.limited(self.bandwidth)
    }

    /// Keeps a limit that the destination's policy asks for as well, from here on.
    pub(in crate::engine) fn limit_too(&mut self, most: Option<NonZeroU64>, limiter: &Limiter) {
        self.bandwidth_max = self.bandwidth_max.into_iter().chain(most.map(NonZeroU64::get)).min();
        limiter.set(self.limited(self.bandwidth));
    }

    /// What the journal keeps of an offer that this peer has accepted.
    pub(in crate::engine) fn record(&self, peer: &PeerFacts) -> OfferRecord {
        OfferRecord {
            migration: self.migration,
            vm: self.vm.clone(),
            uuid: self.uuid,
            epoch: self.epoch,
            peer: peer.spiffe.clone(),
            peer_incarnation: peer.incarnation,
            peer_key: peer.signing_key,
            policy_digest: self.policy_digest,
            address: self.address.clone(),
            durability: self.stream.durability,
        }
    }

    /// What the destination is offered: this guest, on these terms.
    pub(in crate::engine) fn offer(&self, machine: &Machine) -> Result<Offer, EngineError> {
        Ok(Offer {
            migration: self.migration,
            vm: self.vm.clone(),
            uuid: self.uuid,
            epoch: self.epoch,
            hypervisor: machine.kind.clone(),
            regions: machine.regions.clone(),
            machine: serde_json::to_vec(machine).map_err(|error| EngineError::Bug(error.to_string()))?,
            stream: self.stream.clone(),
            policy_digest: self.policy_digest,
        })
    }
}

/// How a source does what is asked of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manner {
    /// Whether all memory is read in the pause to be compared, which also finds what the guest's dirty log has missed.
    pub verify_in_pause: bool,
    /// The level of Zstandard, where that packs and it is not the default.
    pub zstd_level: Option<u8>,
    /// Most bytes of tables that find equal pages and differences: a fifth for the first, the rest for the second.
    pub table_bytes: usize,
}

impl Default for Manner {
    fn default() -> Self {
        Self { verify_in_pause: false, zstd_level: None, table_bytes: limits::TABLE_BYTES }
    }
}

/// Asks policy and identity again, at commit. The error says who denies it, or why the answer cannot be had.
pub type AskCommit<S = Session> = Arc<dyn Fn(&S) -> Result<(), EngineError> + Send + Sync>;
/// Opens a new session with the same destination, greets it, and sees to it that it may still have the VM.
pub type Redial = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Link, EngineError>> + Send>> + Send + Sync>;

/// The collaborators of one migration. `G` is the driver's shape.
pub struct SourcePorts<G: ?Sized = dyn PagedSource> {
    /// Journal, audit log, signing key.
    pub evidence: Evidence,
    /// The session with the destination.
    pub link: Link,
    /// The guest.
    pub guest: Box<G>,
    /// Policy at commit.
    pub ask_commit: AskCommit,
    /// A new session, when the old one is gone.
    pub redial: Redial,
    /// Where progress is shown.
    pub progress: watch::Sender<Progress>,
    /// What operators say meanwhile.
    pub commands: mpsc::Receiver<Command>,
    /// Its part of a bandwidth limit that is for several migrations.
    pub share: Option<Share>,
    /// What is known of the way to the destination.
    pub path: Arc<CommonPath>,
}

/// What an operator may say to a running migration.
#[derive(Debug, Clone, Copy)]
pub enum Command {
    /// Stop, with the VM running on the source.
    Cancel,
    /// Change the limit, bytes a second.
    Bandwidth(Option<u64>),
    /// Change what is asked of the pause.
    DowntimeMax(Duration),
    /// Ask again who the peer is: what it is judged by has changed, or may have expired.
    CheckPeer,
    /// At a destination: the source offers the VM anew, so an attempt whose link is lost is over.
    Superseded,
}

/// How it ended.
#[derive(Debug)]
pub struct SourceEnd {
    /// Where the VM is; `None` when that is in doubt.
    pub outcome: Option<Outcome>,
    /// False when the guest stays and could not be made to go on: its journal says that it has to.
    pub woken: bool,
    /// False when it did not move and the destination may not have heard of that.
    pub told: bool,
    /// Why it did not move.
    pub error: Option<EngineError>,
    /// The figures.
    pub figures: Figures,
    /// Whether the destination had no room for it and nothing has begun: it can be offered again, as the same migration.
    pub busy: bool,
    /// What operators say, for whoever offers it again.
    pub commands: mpsc::Receiver<Command>,
}

impl<G: ?Sized> std::fmt::Debug for SourcePorts<G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourcePorts").field("peer", &self.link.peer.spiffe).finish_non_exhaustive()
    }
}
