//! Control messages and the join of a lane, to bytes and back.

use crate::limits;
use crate::types::{Epoch, Incarnation, LaneIndex, MigrationId, RamRegion, Round, VmName, VmUuid};
use crate::wire::reader::{Reader, Writer};
use crate::wire::{
    Accept, AuditAnswer, AuditHead, Compression, CompressionScope, Durability, ErrorClass, Failure, Feature, FinalDigest, Handoff,
    HandoffMessage, Hello, Join, LaneStanding, LaneTotals, Message, Offer, Resume, Resumed, RoundApplied, RoundEnd, SignedHandoff,
    StateChunk, StreamApplied, StreamBack, StreamBackApplied, StreamEnd, StreamResumed, StreamTerms, WireError,
};
use std::num::NonZeroU64;

/// Bytes in front of the body of a control message: length and kind.
pub const CONTROL_HEADER_BYTES: usize = 5;

/// Bytes of a [`Join`].
pub const JOIN_BYTES: usize = 54;

const JOIN_MAGIC: [u8; 4] = *b"sljn";

/// What a handoff signature covers begins with this, so that it can never be taken for a
/// signature over anything else.
const HANDOFF_DOMAIN: &[u8] = b"sealane handoff v1\0";

/// The same for the digest over the lanes' totals.
const LANES_DOMAIN: &[u8] = b"sealane lanes v1\0";

/// Name of each kind of message; the kind is the place in the list, counted from 1.
const NAMES: [&str; 22] = [
    "hello",
    "offer",
    "accept",
    "round-end",
    "round-applied",
    "state-chunk",
    "handoff",
    "audit-head",
    "failure",
    "ping",
    "resume",
    "resumed",
    "audit-answer",
    "stream-end",
    "stream-applied",
    "stream-resumed",
    "disk-applied",
    "disk-end",
    "disk-digests",
    "disk-held",
    "stream-back",
    "stream-back-applied",
];

/// And for the digest over the length of a stream.
const STREAM_DOMAIN: &[u8] = b"sealane stream v1\0";

/// Kind and body length from the header of a control message.
///
/// # Errors
/// The kind is unknown or the length is over the limit; nothing has to be read or allocated for it.
pub fn decode_control_header(header: &[u8; CONTROL_HEADER_BYTES]) -> Result<(u8, usize), WireError> {
    let mut reader = Reader::new("control header", header);
    let body_bytes = reader.length("body length", 0, limits::CONTROL_BODY_BYTES_MAX)?;
    let kind = reader.u8("kind")?;
    name_of(kind)?;
    reader.finish()?;
    Ok((kind, body_bytes))
}

fn name_of(kind: u8) -> Result<&'static str, WireError> {
    let name = usize::from(kind).checked_sub(1).and_then(|index| NAMES.get(index)).copied();
    name.ok_or(WireError::Unknown { message: "control header", field: "kind", expected: "1 to 22", got: u64::from(kind) })
}

impl Message {
    /// The number of this kind of message on the wire.
    #[must_use]
    pub fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Offer(_) => 2,
            Self::Accept(_) => 3,
            Self::RoundEnd(_) => 4,
            Self::RoundApplied(_) => 5,
            Self::StateChunk(_) => 6,
            Self::Handoff(_) => 7,
            Self::AuditHead(_) => 8,
            Self::Failure(_) => 9,
            Self::Ping => 10,
            Self::Resume(_) => 11,
            Self::Resumed(_) => 12,
            Self::AuditAnswer(_) => 13,
            Self::StreamEnd(_) => 14,
            Self::StreamApplied(_) => 15,
            Self::StreamResumed(_) => 16,
            Self::DiskApplied(_) => 17,
            Self::DiskEnd(_) => 18,
            Self::DiskDigests(_) => 19,
            Self::DiskHeld(_) => 20,
            Self::StreamBack(_) => 21,
            Self::StreamBackApplied(_) => 22,
        }
    }

    /// The name of this kind of message, as errors and logs show it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        name_of(self.kind()).unwrap_or("unknown")
    }

    /// Appends the body, without the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => put_hello(out, hello),
            Self::Offer(offer) => put_offer(out, offer),
            Self::Accept(accept) => {
                out.put(&accept.migration.0);
                out.put_u16(accept.lanes);
                out.put(&accept.policy_digest);
                out.put_u64(accept.bandwidth_max.map_or(0, NonZeroU64::get));
            }
            Self::RoundEnd(end) => {
                out.put(&end.migration.0);
                out.put_u32(end.round.0);
                out.put_u8(u8::from(end.last));
                put_lanes(out, &end.lanes);
            }
            Self::RoundApplied(applied) => {
                out.put(&applied.migration.0);
                out.put_u32(applied.round.0);
                put_lanes(out, &applied.lanes);
            }
            Self::StateChunk(chunk) => {
                out.put(&chunk.migration.0);
                out.put_u64(chunk.offset);
                out.put_u64(chunk.total);
                out.put_bytes(&chunk.bytes);
            }
            Self::Handoff(signed) => {
                put_handoff(out, &signed.message);
                out.put(&signed.signature);
            }
            Self::AuditHead(head) => put_audit_head(out, head),
            Self::AuditAnswer(answer) => {
                out.put_u64(answer.entries);
                out.put_bytes(answer.cosignature.as_bytes());
            }
            Self::Failure(failure) => {
                out.put_u16(failure.class.number());
                out.put_bytes(cut(&failure.reason, limits::REASON_BYTES_MAX).as_bytes());
            }
            Self::Ping => {}
            Self::Resume(resume) => {
                out.put(&resume.migration.0);
                out.put_u32(resume.round.0);
            }
            Self::Resumed(resumed) => {
                out.put(&resumed.migration.0);
                out.put_u8(u8::from(resumed.deciding));
                out.put_u64(resumed.bandwidth_max.map_or(0, NonZeroU64::get));
                out.put_length(resumed.lanes.len());
                for lane in &resumed.lanes {
                    out.put_u32(lane.round.0);
                    out.put_u64(lane.frames);
                }
            }
            Self::StreamEnd(_) | Self::StreamApplied(_) | Self::StreamResumed(_) | Self::StreamBack(_) | Self::StreamBackApplied(_) => {
                self.put_stream(out);
            }
            Self::DiskApplied(_) | Self::DiskEnd(_) | Self::DiskDigests(_) | Self::DiskHeld(_) => self.put_disks(out),
        }
    }

    /// The body of a message about a hypervisor's stream.
    fn put_stream(&self, out: &mut Vec<u8>) {
        match self {
            Self::StreamEnd(StreamEnd { migration, bytes })
            | Self::StreamApplied(StreamApplied { migration, bytes })
            | Self::StreamBackApplied(StreamBackApplied { migration, bytes }) => {
                out.put(&migration.0);
                out.put_u64(*bytes);
            }
            Self::StreamResumed(resumed) => {
                out.put(&resumed.migration.0);
                out.put_u8(u8::from(resumed.deciding));
                out.put_u64(resumed.bytes);
            }
            Self::StreamBack(back) => {
                out.put(&back.migration.0);
                out.put_u64(back.offset);
                out.put_bytes(&back.bytes);
            }
            _ => {}
        }
    }

    /// Header and body.
    #[must_use]
    pub fn encode_framed(&self) -> Vec<u8> {
        let mut out = vec![0; CONTROL_HEADER_BYTES];
        self.encode(&mut out);
        let mut header = Vec::with_capacity(CONTROL_HEADER_BYTES);
        header.put_length(out.len().saturating_sub(CONTROL_HEADER_BYTES));
        header.put_u8(self.kind());
        for (to, from) in out.iter_mut().zip(header) {
            *to = from;
        }
        out
    }

    /// The message of a kind and a body.
    ///
    /// # Errors
    /// [`WireError`] says which field of which message breaks which rule.
    pub fn decode(kind: u8, body: &[u8]) -> Result<Self, WireError> {
        let reader = &mut Reader::new(name_of(kind)?, body);
        let message = match kind {
            1 => Self::Hello(hello(reader)?),
            2 => Self::Offer(offer(reader)?),
            3 => Self::Accept(Accept {
                migration: migration(reader)?,
                lanes: lane_count(reader, "lanes")?,
                policy_digest: reader.array("policy digest")?,
                bandwidth_max: NonZeroU64::new(reader.u64("bandwidth limit")?),
            }),
            4 => Self::RoundEnd(RoundEnd {
                migration: migration(reader)?,
                round: round(reader)?,
                last: reader.flag("last")?,
                lanes: lanes(reader)?,
            }),
            5 => Self::RoundApplied(RoundApplied { migration: migration(reader)?, round: round(reader)?, lanes: lanes(reader)? }),
            6 => Self::StateChunk(state_chunk(reader)?),
            7 => Self::Handoff(SignedHandoff { message: handoff(reader)?, signature: reader.array("signature")? }),
            8 => Self::AuditHead(audit_head(reader)?),
            9 => {
                Self::Failure(Failure { class: error_class(reader)?, reason: reader.text("reason", limits::REASON_BYTES_MAX)?.to_owned() })
            }
            11 => Self::Resume(Resume { migration: migration(reader)?, round: Round(reader.u32("round")?) }),
            12 => Self::Resumed(Resumed {
                migration: migration(reader)?,
                deciding: reader.flag("deciding")?,
                bandwidth_max: NonZeroU64::new(reader.u64("bandwidth limit")?),
                lanes: standings(reader)?,
            }),
            13 => Self::AuditAnswer(AuditAnswer {
                entries: reader.u64("entries")?,
                cosignature: reader.text("cosignature", limits::COSIGNATURE_BYTES_MAX)?.to_owned(),
            }),
            14 => Self::StreamEnd(StreamEnd { migration: migration(reader)?, bytes: reader.u64("bytes")? }),
            15 => Self::StreamApplied(StreamApplied { migration: migration(reader)?, bytes: reader.u64("bytes")? }),
            16 => Self::StreamResumed(StreamResumed {
                migration: migration(reader)?,
                deciding: reader.flag("deciding")?,
                bytes: reader.u64("bytes")?,
            }),
            21 => Self::StreamBack(stream_back(reader)?),
            22 => Self::StreamBackApplied(StreamBackApplied { migration: migration(reader)?, bytes: reader.u64("bytes")? }),
            17..=20 => super::disk::message(kind, reader)?,
            _ => Self::Ping,
        };
        reader.finish()?;
        Ok(message)
    }
}

impl HandoffMessage {
    /// What the signature covers: a domain, then the encoding that is on the wire.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut out = HANDOFF_DOMAIN.to_vec();
        put_handoff(&mut out, self);
        out
    }

    /// Whether these are the signed bytes of a message, and nothing besides.
    #[must_use]
    pub fn is_signed_bytes(bytes: &[u8]) -> bool {
        let mut reader = Reader::new("HANDOFF", bytes.strip_prefix(HANDOFF_DOMAIN).unwrap_or_default());
        handoff(&mut reader).is_ok_and(|message| message.signed_bytes() == bytes)
    }
}

impl LaneTotals {
    /// What the lanes digest of the final state is taken over: a domain, then the totals of every
    /// lane in order.
    #[must_use]
    pub fn canonical_bytes(lanes: &[Self]) -> Vec<u8> {
        let mut out = LANES_DOMAIN.to_vec();
        put_lanes(&mut out, lanes);
        out
    }
}

impl StreamEnd {
    /// What the lanes digest of the final state is taken over where a stream was carried: a domain, then its length.
    #[must_use]
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut out = STREAM_DOMAIN.to_vec();
        out.put_u64(self.bytes);
        out
    }
}

impl Join {
    /// The bytes that open a lane's stream.
    #[must_use]
    pub fn encode(&self) -> [u8; JOIN_BYTES] {
        let mut bytes = Vec::with_capacity(JOIN_BYTES);
        bytes.put(&JOIN_MAGIC);
        bytes.put(&self.migration.0);
        bytes.put_u16(self.lane.0);
        bytes.put(&self.tag);
        let mut out = [0; JOIN_BYTES];
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = from;
        }
        out
    }

    /// The join in the first bytes of a lane's stream.
    ///
    /// # Errors
    /// It is no join, or its lane is over the limit.
    pub fn decode(bytes: &[u8; JOIN_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new("join", bytes);
        let magic: [u8; 4] = reader.array("magic")?;
        if magic != JOIN_MAGIC {
            return Err(reader.malformed("magic", "`sljn`", &magic));
        }
        let migration = migration(&mut reader)?;
        let lane = reader.u16("lane")?;
        let lane = LaneIndex(reader.bounded("lane", lane, 0, u64::from(limits::LANES_MAX) - 1)?);
        let tag = reader.array("tag")?;
        reader.finish()?;
        Ok(Self { migration, lane, tag })
    }
}

/// The longest beginning of `text` that has at most `bytes_max` bytes.
fn cut(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    end.and_then(|end| text.get(..end)).unwrap_or_default()
}

fn audit_head(reader: &mut Reader<'_>) -> Result<AuditHead, WireError> {
    let checkpoint = reader.text("checkpoint", limits::CHECKPOINT_BYTES_MAX)?.to_owned();
    let from = reader.u64("known size")?;
    let count = reader.length("consistency proof", 0, limits::AUDIT_PROOF_HASHES_MAX)?;
    let mut consistency = Vec::with_capacity(count);
    for _ in 0..count {
        consistency.push(reader.array("hash")?);
    }
    let proof = reader.text("proof", limits::AUDIT_PROOF_BYTES_MAX)?.to_owned();
    Ok(AuditHead { checkpoint, from, consistency, proof })
}

fn put_hello(out: &mut Vec<u8>, hello: &Hello) {
    out.put_u16(hello.version_min);
    out.put_u16(hello.version_max);
    out.put(&hello.incarnation.0);
    out.put(&hello.signing_key);
    out.put_length(hello.features.len());
    for feature in &hello.features {
        out.put_u8(u8::from(feature.critical));
        out.put_bytes(feature.name.as_bytes());
    }
}

fn hello(reader: &mut Reader<'_>) -> Result<Hello, WireError> {
    let version_min = reader.u16("lowest version")?;
    let version_max = reader.u16("highest version")?;
    let incarnation = Incarnation(reader.array("incarnation")?);
    let signing_key = reader.array("signing key")?;
    let count = reader.length("features", 0, limits::FEATURES_MAX)?;
    let mut features = Vec::with_capacity(count);
    for _ in 0..count {
        let critical = reader.flag("critical")?;
        let name = reader.text("feature name", limits::FEATURE_NAME_BYTES_MAX)?.to_owned();
        features.push(Feature { name, critical });
    }
    let hello = Hello { version_min, version_max, features, incarnation, signing_key };
    hello.check()?;
    Ok(hello)
}

/// At least one, and at most `most`.
pub(super) fn list<T>(
    reader: &mut Reader<'_>,
    field: &'static str,
    most: usize,
    item: impl Fn(&mut Reader<'_>) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let count = reader.length(field, 1, most)?;
    let mut items = Vec::with_capacity(count);
    for _ in 0..count {
        items.push(item(reader)?);
    }
    Ok(items)
}

fn put_audit_head(out: &mut Vec<u8>, head: &AuditHead) {
    out.put_bytes(head.checkpoint.as_bytes());
    out.put_u64(head.from);
    out.put_length(head.consistency.len());
    head.consistency.iter().for_each(|hash| out.put(hash));
    out.put_bytes(head.proof.as_bytes());
}

fn put_offer(out: &mut Vec<u8>, offer: &Offer) {
    out.put(&offer.migration.0);
    out.put_bytes(offer.vm.as_str().as_bytes());
    out.put(&offer.uuid.0);
    out.put_u64(offer.epoch.0);
    out.put_bytes(offer.hypervisor.as_bytes());
    out.put_length(offer.regions.len());
    for region in &offer.regions {
        out.put_u64(region.guest_base);
        out.put_u64(region.bytes);
    }
    out.put_bytes(&offer.machine);
    out.put_u16(offer.stream.lanes);
    out.put_u8(number_of(&COMPRESSIONS, offer.stream.compression));
    out.put_u8(number_of(&SCOPES, offer.stream.compression_scope));
    out.put_u8(u8::from(offer.stream.length_padding));
    out.put_u8(number_of(&DURABILITIES, offer.stream.durability));
    out.put_u8(u8::from(offer.stream.verify));
    out.put(&offer.policy_digest);
}

fn offer(reader: &mut Reader<'_>) -> Result<Offer, WireError> {
    let migration = MigrationId(reader.drawn("migration")?);
    let vm = reader.text("VM name", limits::NAME_BYTES_MAX)?;
    let vm: VmName = vm.parse().map_err(|_| reader.malformed("VM name", "1 to 63 of `a-z A-Z 0-9 . _ -`", vm.as_bytes()))?;
    let uuid = VmUuid(reader.array("VM UUID")?);
    let epoch = Epoch(reader.u64("epoch").and_then(|epoch| reader.bounded("epoch", epoch, 1, limits::EPOCH_MAX))?);
    let hypervisor = reader.text("hypervisor", limits::HYPERVISOR_NAME_BYTES_MAX)?;
    if hypervisor.is_empty() || !hypervisor.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_')) {
        return Err(reader.malformed("hypervisor", "1 to 32 of `a-z 0-9 _ -`", hypervisor.as_bytes()));
    }
    let hypervisor = hypervisor.to_owned();
    let count = reader.length("regions", 1, limits::RAM_REGIONS_MAX)?;
    let mut regions = Vec::with_capacity(count);
    for _ in 0..count {
        regions.push(RamRegion { guest_base: reader.u64("region base")?, bytes: reader.u64("region length")? });
    }
    let machine = reader.bytes("machine", limits::MACHINE_BYTES_MAX)?.to_vec();
    let stream = StreamTerms {
        lanes: lane_count(reader, "lanes")?,
        compression: choice(reader, "compression", "1 (none), 2 (lz4), 3 (zstd) or 4 (auto)", &COMPRESSIONS)?,
        compression_scope: choice(reader, "compression scope", "1 (page), 2 (batch) or 3 (stream)", &SCOPES)?,
        length_padding: reader.flag("length padding")?,
        durability: choice(reader, "durability", "1 (none), 2 (destination) or 3 (both)", &DURABILITIES)?,
        verify: reader.flag("verify")?,
    };
    let policy_digest = reader.array("policy digest")?;
    Ok(Offer { migration, vm, uuid, epoch, hypervisor, regions, machine, stream, policy_digest })
}

/// The numbers of enumerated values count from 1, in these orders.
const COMPRESSIONS: [Compression; 4] = [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Auto];
const SCOPES: [CompressionScope; 3] = [CompressionScope::Page, CompressionScope::Batch, CompressionScope::Stream];
const DURABILITIES: [Durability; 3] = [Durability::None, Durability::Destination, Durability::Both];

fn number_of<T: PartialEq + Copy>(values: &[T], value: T) -> u8 {
    values.iter().position(|known| *known == value).and_then(|index| u8::try_from(index + 1).ok()).unwrap_or(0)
}

fn choice<T: Copy>(reader: &mut Reader<'_>, field: &'static str, expected: &'static str, values: &[T]) -> Result<T, WireError> {
    let number = reader.u8(field)?;
    let value = usize::from(number).checked_sub(1).and_then(|index| values.get(index)).copied();
    reader.known(field, expected, u64::from(number), value)
}

fn put_lanes(out: &mut Vec<u8>, lanes: &[LaneTotals]) {
    out.put_length(lanes.len());
    for lane in lanes {
        out.put_totals(lane);
    }
}

fn lanes(reader: &mut Reader<'_>) -> Result<Vec<LaneTotals>, WireError> {
    let count = reader.length("lanes", 1, usize::from(limits::LANES_MAX))?;
    let mut lanes = Vec::with_capacity(count);
    for _ in 0..count {
        lanes.push(reader.totals()?);
    }
    Ok(lanes)
}

fn standings(reader: &mut Reader<'_>) -> Result<Vec<LaneStanding>, WireError> {
    let count = reader.length("lanes", 1, usize::from(limits::LANES_MAX))?;
    let mut lanes = Vec::with_capacity(count);
    for _ in 0..count {
        lanes.push(LaneStanding { round: Round(reader.u32("round")?), frames: reader.u64("frames")? });
    }
    Ok(lanes)
}

fn state_chunk(reader: &mut Reader<'_>) -> Result<StateChunk, WireError> {
    let migration = migration(reader)?;
    let offset = reader.u64("offset")?;
    let total = reader.u64("total")?;
    let total = reader.bounded("total", total, 0, limits::STATE_BYTES_MAX as u64)?;
    let offset = reader.bounded("offset", offset, 0, total)?;
    // An empty piece is only right for an empty state: a peer cannot keep us busy with nothing.
    let piece_max = usize::try_from(total - offset).unwrap_or(usize::MAX).min(limits::STATE_CHUNK_BYTES_MAX);
    let count = reader.length("piece", usize::from(total != 0), piece_max)?;
    let bytes = reader.take("piece", count)?.to_vec();
    Ok(StateChunk { migration, offset, total, bytes })
}

fn stream_back(reader: &mut Reader<'_>) -> Result<StreamBack, WireError> {
    let (migration, offset) = (migration(reader)?, reader.u64("offset")?);
    let count = reader.length("piece", 1, limits::STREAM_BACK_PIECE_BYTES_MAX)?;
    Ok(StreamBack { migration, offset, bytes: reader.take("piece", count)?.to_vec() })
}

fn put_handoff(out: &mut Vec<u8>, message: &HandoffMessage) {
    out.put(&message.migration.0);
    out.put(&message.uuid.0);
    out.put_u64(message.epoch.0);
    out.put(&message.sender.0);
    out.put(&message.receiver.0);
    out.put_u64(message.position);
    match &message.step {
        Handoff::Final { digest, lanes } => {
            out.put_u8(1);
            put_digest(out, digest);
            out.put_u16(*lanes);
        }
        Handoff::Prepared { digest } => {
            out.put_u8(2);
            put_digest(out, digest);
        }
        Handoff::Commit { digest } => {
            out.put_u8(3);
            put_digest(out, digest);
        }
        Handoff::Running => out.put_u8(4),
        Handoff::Done => out.put_u8(5),
        Handoff::Abort { class } => {
            out.put_u8(6);
            out.put_u16(class.number());
        }
        Handoff::Refuse { class } => {
            out.put_u8(7);
            out.put_u16(class.number());
        }
    }
}

fn handoff(reader: &mut Reader<'_>) -> Result<HandoffMessage, WireError> {
    let migration = migration(reader)?;
    let uuid = VmUuid(reader.array("VM UUID")?);
    let epoch = Epoch(reader.u64("epoch")?);
    let sender = Incarnation(reader.array("sender")?);
    let receiver = Incarnation(reader.array("receiver")?);
    let position = reader.u64("position")?;
    let step = match reader.u8("step")? {
        1 => Handoff::Final { digest: digest(reader)?, lanes: lane_count(reader, "lanes")? },
        2 => Handoff::Prepared { digest: digest(reader)? },
        3 => Handoff::Commit { digest: digest(reader)? },
        4 => Handoff::Running,
        5 => Handoff::Done,
        6 => Handoff::Abort { class: error_class(reader)? },
        7 => Handoff::Refuse { class: error_class(reader)? },
        other => return reader.known("step", "1 (final) to 7 (refuse)", u64::from(other), None),
    };
    Ok(HandoffMessage { migration, uuid, epoch, sender, receiver, position, step })
}

fn put_digest(out: &mut Vec<u8>, digest: &FinalDigest) {
    out.put(&digest.state);
    out.put(&digest.lanes);
    out.put_u128(digest.memory);
}

fn digest(reader: &mut Reader<'_>) -> Result<FinalDigest, WireError> {
    Ok(FinalDigest { state: reader.array("state digest")?, lanes: reader.array("lanes digest")?, memory: reader.u128("memory digest")? })
}

pub(super) fn migration(reader: &mut Reader<'_>) -> Result<MigrationId, WireError> {
    reader.array("migration").map(MigrationId)
}

fn round(reader: &mut Reader<'_>) -> Result<Round, WireError> {
    let round = reader.u32("round")?;
    reader.bounded("round", round, 1, u64::from(u32::MAX)).map(Round)
}

fn lane_count(reader: &mut Reader<'_>, field: &'static str) -> Result<u16, WireError> {
    let lanes = reader.u16(field)?;
    reader.bounded(field, lanes, 1, u64::from(limits::LANES_MAX))
}

fn error_class(reader: &mut Reader<'_>) -> Result<ErrorClass, WireError> {
    let number = reader.u16("class")?;
    reader.known("class", "a number of the table of classes", u64::from(number), ErrorClass::from_number(number))
}
