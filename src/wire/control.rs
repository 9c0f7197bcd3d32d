//! Messages of the session's control stream. `PROTOCOL.md` specifies every byte.

use crate::types::{Epoch, Incarnation, LaneIndex, MigrationId, RamRegion, Round, VmName, VmUuid};
use crate::wire::ErrorClass;
use std::num::NonZeroU64;

/// A message of the control stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// First message of either side: what it speaks.
    Hello(Hello),
    /// Source: the VM that wants to move.
    Offer(Offer),
    /// Destination: the offer is permitted and everything for it is in place.
    Accept(Accept),
    /// Source: every frame of this round is on its lanes. Sent when the lanes have been given all of it.
    RoundEnd(RoundEnd),
    /// Destination: every page of this round is in guest RAM.
    RoundApplied(RoundApplied),
    /// Source, paused: a piece of the device state.
    StateChunk(StateChunk),
    /// A handoff message, signed by its sender's gateway key.
    Handoff(SignedHandoff),
    /// The head of the sender's audit log, to be kept in the receiver's.
    AuditHead(AuditHead),
    /// The migration ends here; the reason is the sender's claim.
    Failure(Failure),
    /// Nothing but a sign of life.
    Ping,
    /// Source, in a new session: the migration goes on.
    Resume(Resume),
    /// Destination: where it goes on.
    Resumed(Resumed),
    /// What became of the head that the receiver sent.
    AuditAnswer(AuditAnswer),
    /// Source: the hypervisor's stream has ended.
    StreamEnd(StreamEnd),
    /// Destination: so much of the stream is with its hypervisor.
    StreamApplied(StreamApplied),
    /// Destination of a stream: where it goes on.
    StreamResumed(StreamResumed),
    /// Destination: these changes are on its disks.
    DiskApplied(DiskApplied),
    /// Source, whose guest stands still: no disk changes any more.
    DiskEnd(DiskEnd),
    /// Destination: what its hypervisor writes back.
    StreamBack(StreamBack),
    /// Source: so much of that is with its hypervisor.
    StreamBackApplied(StreamBackApplied),
    /// Source: what its disks hold.
    DiskDigests(DiskDigests),
    /// Destination: what its disks hold already, before anything of them changes.
    DiskHeld(DiskHeld),
}

/// What a gateway speaks and who it is beyond its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest protocol version spoken.
    pub version_min: u16,
    /// Highest protocol version spoken.
    pub version_max: u16,
    /// Features offered or required, by name.
    pub features: Vec<Feature>,
    /// The sender's journal.
    pub incarnation: Incarnation,
    /// Ed25519 public key that signs the sender's handoff messages and audit checkpoints.
    pub signing_key: [u8; 32],
}

/// A named feature of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Its name, `a-z 0-9 -`, at most 32 bytes.
    pub name: String,
    /// Whether the peer must refuse if it does not know the name.
    pub critical: bool,
}

/// A VM that wants to move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// This attempt.
    pub migration: MigrationId,
    /// The operator's name of the VM.
    pub vm: VmName,
    /// The VM that policy is asked about.
    pub uuid: VmUuid,
    /// The epoch at which the source owns the VM.
    pub epoch: Epoch,
    /// Which driver speaks to the hypervisor: `kvm`, `synthetic`, `image`, `qemu`.
    pub hypervisor: String,
    /// Guest RAM.
    pub regions: Vec<RamRegion>,
    /// What the destination's hypervisor has to provide; opaque here.
    pub machine: Vec<u8>,
    /// What is asked of the stream.
    pub stream: StreamTerms,
    /// SHA-256 of the source's policy set.
    pub policy_digest: [u8; 32],
}

/// Terms of the page stream that both policies are asked about.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StreamTerms {
    /// Lanes wanted.
    pub lanes: u16,
    /// Codec of page batches.
    pub compression: Compression,
    /// How far back a codec may look: `page`, `batch` or `stream`.
    pub compression_scope: CompressionScope,
    /// Whether frame lengths are padded to buckets.
    pub length_padding: bool,
    /// Where the final image is on disk before the switch.
    pub durability: Durability,
    /// Whether every page and all state are compared before the switch.
    pub verify: bool,
}

/// Codec of page batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Pages as they are.
    None,
    /// LZ4 block format.
    Lz4,
    /// Zstandard.
    Zstd,
    /// Whatever gets the pages there soonest, frame by frame.
    Auto,
}

/// How far back a codec may look for repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionScope {
    /// Each page by itself.
    Page,
    /// Pages of one batch.
    Batch,
    /// Everything this VM has sent.
    Stream,
}

/// Where the final image is on disk before the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// Nowhere.
    None,
    /// At the destination.
    Destination,
    /// At both ends.
    Both,
}

impl Durability {
    /// Its name in journals and policies.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Destination => "dest",
            Self::Both => "both",
        }
    }

    /// The durability of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::None, Self::Destination, Self::Both].into_iter().find(|durability| durability.name() == name)
    }
}

/// The destination takes the offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The attempt.
    pub migration: MigrationId,
    /// Lanes granted, at least one and at most as many as wanted.
    pub lanes: u16,
    /// SHA-256 of the destination's policy set.
    pub policy_digest: [u8; 32],
    /// Bytes a second of UDP payload that the source may send at most.
    pub bandwidth_max: Option<NonZeroU64>,
}

/// What one lane carried since its join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaneTotals {
    /// Frames.
    pub frames: u64,
    /// Pages.
    pub pages: u64,
    /// Bytes of frames, headers included.
    pub bytes: u64,
    /// Running XXH3-128 over the frame bytes, in order.
    pub digest: u128,
}

impl std::fmt::Display for LaneTotals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { frames, pages, bytes, digest } = self;
        write!(f, "{frames} frames, {pages} pages, {bytes} bytes (digest {digest:032x})")
    }
}

/// The end of a round at the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundEnd {
    /// The attempt.
    pub migration: MigrationId,
    /// The round.
    pub round: Round,
    /// Whether the guest was paused before this round's pages were read.
    pub last: bool,
    /// Totals since the join, by lane, the mark of this round included.
    pub lanes: Vec<LaneTotals>,
}

/// The end of a round at the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundApplied {
    /// The attempt.
    pub migration: MigrationId,
    /// The round.
    pub round: Round,
    /// Totals since the join, by lane; equal to the source's or the round is not applied.
    pub lanes: Vec<LaneTotals>,
}

/// A piece of device state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChunk {
    /// The attempt.
    pub migration: MigrationId,
    /// Offset of this piece.
    pub offset: u64,
    /// Length of the whole state.
    pub total: u64,
    /// The piece.
    pub bytes: Vec<u8>,
}

/// The digests that the source signs and the destination has to reproduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FinalDigest {
    /// SHA-256 over the device state.
    pub state: [u8; 32],
    /// SHA-256 over [`LaneTotals::canonical_bytes`] of the last round.
    pub lanes: [u8; 32],
    /// XXH3-128 tree over every page, when both sides compare memory; zero when they do not.
    pub memory: u128,
}

/// One step of the handoff (design section 7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handoff {
    /// Source: paused; this is the final state.
    Final {
        /// Digest of what the destination must hold.
        digest: FinalDigest,
        /// How many lanes carried it.
        lanes: u16,
    },
    /// Destination: holds exactly that, durable, not running.
    Prepared {
        /// The digest it computed.
        digest: FinalDigest,
    },
    /// Source: the destination owns the VM.
    Commit {
        /// What it is given: the digest that it prepared.
        digest: FinalDigest,
    },
    /// Destination: the VM runs here.
    Running,
    /// Source: the old copy is gone.
    Done,
    /// Source, before COMMIT: the VM stays on the source.
    Abort {
        /// Why.
        class: ErrorClass,
    },
    /// Destination, before RUN: never will.
    Refuse {
        /// Why.
        class: ErrorClass,
    },
}

/// A handoff message with what binds it to one attempt and one pair of gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandoffMessage {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch that the destination would own.
    pub epoch: Epoch,
    /// The sender's journal.
    pub sender: Incarnation,
    /// The receiver's journal.
    pub receiver: Incarnation,
    /// How many handoff records the sender's journal has ever held: a journal that was restored from a copy says a number
    /// that is too low. 0 from a journal that does not know the attempt.
    pub position: u64,
    /// The step.
    pub step: Handoff,
}

/// A handoff message and the Ed25519 signature over its encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedHandoff {
    /// The message.
    pub message: HandoffMessage,
    /// Signature by the sender's gateway key over `HandoffMessage::signed_bytes`.
    pub signature: [u8; 64],
}

/// The head of an audit log, and what ties it to what the receiver knows. Bounded, and opaque here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditHead {
    /// The sender's signed checkpoint as text.
    pub checkpoint: String,
    /// The size of the log that the receiver should know; 0 for none.
    pub from: u64,
    /// That the log of that size is the beginning of this one (RFC 6962 section 2.1.2).
    pub consistency: Vec<[u8; 32]>,
    /// The sender's entry about COMMIT or RUN with its proof as text; empty without.
    pub proof: String,
}

/// What became of a head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditAnswer {
    /// The size of the log whose head the sender of this keeps.
    pub entries: u64,
    /// The signature line by which it witnesses that head; empty when it wants to be shown the log from there first.
    pub cosignature: String,
}

/// The sender gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Whose fault, as the sender sees it.
    pub class: ErrorClass,
    /// Bounded text for people.
    pub reason: String,
}

/// A session was lost and the migration goes on in this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The attempt.
    pub migration: MigrationId,
    /// The last round that was begun; 0 when none was.
    pub round: Round,
}

/// What the destination is at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    /// The attempt.
    pub migration: MigrationId,
    /// Whether FINAL and all that it is about came, so that the handoff decides; else pages are taken.
    pub deciding: bool,
    /// As in [`Accept`], by the policy that holds now.
    pub bandwidth_max: Option<NonZeroU64>,
    /// What each lane has applied.
    pub lanes: Vec<LaneStanding>,
}

/// All of a hypervisor's stream was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamEnd {
    /// The attempt.
    pub migration: MigrationId,
    /// Bytes of the whole stream.
    pub bytes: u64,
}

/// How much of a stream the destination's hypervisor was given, without a gap from its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamApplied {
    /// The attempt.
    pub migration: MigrationId,
    /// Bytes.
    pub bytes: u64,
}

/// What the destination of a stream is at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamResumed {
    /// The attempt.
    pub migration: MigrationId,
    /// Whether FINAL and all of the stream came, so that the handoff decides.
    pub deciding: bool,
    /// What its hypervisor was given, bytes; the stream goes on behind that.
    pub bytes: u64,
}

/// A piece of what the destination's hypervisor writes back to the source's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBack {
    /// The attempt.
    pub migration: MigrationId,
    /// Bytes of the way back before it.
    pub offset: u64,
    /// The piece.
    pub bytes: Vec<u8>,
}

/// How much of the way back the source's hypervisor was given, without a gap from its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBackApplied {
    /// The attempt.
    pub migration: MigrationId,
    /// Bytes.
    pub bytes: u64,
}

/// Changes that are on the destination's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskApplied {
    /// The attempt.
    pub migration: MigrationId,
    /// Their numbers, in any order.
    pub changes: Vec<u64>,
}

/// Every change to a disk was sent and applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskEnd {
    /// The attempt.
    pub migration: MigrationId,
    /// How many changes there were.
    pub changes: u64,
    /// Bytes of their ranges, all together.
    pub bytes: u64,
    /// Whether both sides read all disks, and the source says what its own hold.
    pub verify: bool,
}

/// What the source's disks hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskDigests {
    /// The attempt.
    pub migration: MigrationId,
    /// SHA-256 of each disk, in the order of the offer (`PROTOCOL.md`, disks).
    pub digests: Vec<[u8; 32]>,
}

/// The next blocks of a disk of the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskHeld {
    /// The attempt.
    pub migration: MigrationId,
    /// Which disk of the offer.
    pub disk: u16,
    /// The beginnings of their digests (`PROTOCOL.md`, disks).
    pub blocks: Vec<[u8; 16]>,
    /// Whether nothing more comes, of any disk.
    pub last: bool,
}

/// What one lane has applied since its last join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaneStanding {
    /// The round of its last frame; 0 when it had none.
    pub round: Round,
    /// Frames, marks included.
    pub frames: u64,
}

/// The first message on a lane's stream binds it to the session (`PROTOCOL.md`, lanes).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// The attempt.
    pub migration: MigrationId,
    /// Which lane.
    pub lane: LaneIndex,
    /// HMAC-SHA-256 keyed by the session's exporter over lane number and the lane's exporter.
    pub tag: [u8; 32],
}
