//! Every message there and back, and every way to break one that we could think of.

use proptest::prelude::*;
use std::num::NonZeroU64;

use super::*;
use crate::limits;
use crate::types::{Epoch, Incarnation, LaneIndex, MigrationId, PageNumber, RamRegion, Round, VmUuid};

const MIGRATION: MigrationId = MigrationId([0xa1; 16]);

fn offer() -> Offer {
    Offer {
        migration: MIGRATION,
        vm: "web-1".parse().unwrap(),
        uuid: VmUuid([7; 16]),
        epoch: Epoch(3),
        hypervisor: "kvm".to_owned(),
        regions: vec![RamRegion { guest_base: 0, bytes: 8192 }, RamRegion { guest_base: 1 << 32, bytes: 4096 }],
        machine: b"{}".to_vec(),
        stream: StreamTerms {
            lanes: 2,
            compression: Compression::Lz4,
            compression_scope: CompressionScope::Batch,
            length_padding: true,
            durability: Durability::Both,
            verify: true,
        },
        policy_digest: [9; 32],
    }
}

fn signed(step: Handoff) -> Message {
    let message = HandoffMessage {
        migration: MIGRATION,
        uuid: VmUuid([7; 16]),
        epoch: Epoch(4),
        sender: Incarnation([1; 16]),
        receiver: Incarnation([2; 16]),
        position: 7,
        step,
    };
    Message::Handoff(SignedHandoff { message, signature: [0x5a; 64] })
}

fn head(checkpoint: &str) -> AuditHead {
    AuditHead { checkpoint: checkpoint.to_owned(), from: 0, consistency: Vec::new(), proof: String::new() }
}

/// One of every message, and of every step of the handoff.
fn every_message() -> Vec<Message> {
    let digest = FinalDigest { state: [3; 32], lanes: [4; 32], memory: 1 << 100 };
    let totals = vec![LaneTotals { frames: 1, pages: 2, bytes: 3, digest: u128::MAX }, LaneTotals::default()];
    let other_terms = StreamTerms {
        lanes: 16,
        compression: Compression::None,
        compression_scope: CompressionScope::Page,
        length_padding: false,
        durability: Durability::Destination,
        verify: false,
    };
    let feature = |name: &str, critical| Feature { name: name.to_owned(), critical };
    vec![
        Message::Hello(Hello { features: vec![feature("zstd", false), feature("x", true)], ..Hello::new(Incarnation([8; 16]), [6; 32]) }),
        Message::Offer(offer()),
        Message::Accept(Accept { migration: MIGRATION, lanes: 1, policy_digest: [1; 32], bandwidth_max: NonZeroU64::new(1 << 20) }),
        Message::RoundEnd(RoundEnd { migration: MIGRATION, round: Round(1), last: true, lanes: totals.clone() }),
        Message::RoundApplied(RoundApplied { migration: MIGRATION, round: Round(7), lanes: totals.clone() }),
        Message::StateChunk(StateChunk { migration: MIGRATION, offset: 5, total: 9, bytes: vec![1, 2, 3] }),
        Message::StateChunk(StateChunk { migration: MIGRATION, offset: 0, total: 0, bytes: vec![] }),
        signed(Handoff::Final { digest, lanes: 2 }),
        signed(Handoff::Prepared { digest }),
        signed(Handoff::Commit { digest }),
        signed(Handoff::Running),
        signed(Handoff::Done),
        signed(Handoff::Abort { class: ErrorClass::Cancelled }),
        signed(Handoff::Refuse { class: ErrorClass::InDoubt }),
        Message::AuditHead(AuditHead { from: 5, consistency: vec![[1; 32], [2; 32]], proof: "why".to_owned(), ..head("gw-a\n1\nAAAA\n") }),
        Message::Failure(Failure { class: ErrorClass::Denied, reason: "nein, danke – ✗".to_owned() }),
        Message::Ping,
        Message::Resume(Resume { migration: MIGRATION, round: Round(3) }),
        Message::Resumed(Resumed {
            migration: MIGRATION,
            deciding: false,
            bandwidth_max: None,
            lanes: vec![LaneStanding { round: Round(3), frames: 70_000 }, LaneStanding::default()],
        }),
        Message::Offer(Offer { stream: other_terms, ..offer() }),
        Message::RoundEnd(RoundEnd { migration: MIGRATION, round: Round(2), last: false, lanes: totals }),
        Message::AuditAnswer(AuditAnswer { entries: 6, cosignature: "— w AAAA\n".to_owned() }),
        Message::StreamEnd(StreamEnd { migration: MIGRATION, bytes: 1 << 40 }),
        Message::StreamApplied(StreamApplied { migration: MIGRATION, bytes: 3 }),
        Message::StreamResumed(StreamResumed { migration: MIGRATION, deciding: true, bytes: 7 }),
        Message::DiskApplied(DiskApplied { migration: MIGRATION, changes: vec![3, 1 << 40] }),
        Message::DiskEnd(DiskEnd { migration: MIGRATION, changes: 9, bytes: 1 << 40, verify: true }),
        Message::DiskDigests(DiskDigests { migration: MIGRATION, digests: vec![[1; 32], [2; 32]] }),
        Message::DiskHeld(DiskHeld { migration: MIGRATION, disk: 3, blocks: vec![[1; 16], [0; 16]], last: true }),
        Message::StreamBack(StreamBack { migration: MIGRATION, offset: 1 << 33, bytes: vec![1, 2, 3] }),
        Message::StreamBackApplied(StreamBackApplied { migration: MIGRATION, bytes: 1 << 33 }),
    ]
}

fn body(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn join() -> Join {
    Join { migration: MIGRATION, lane: LaneIndex(3), tag: [0x77; 32] }
}

/// A frame with every record that carries no whole page, then the mark of its round.
fn frames() -> Vec<u8> {
    let run = |first, count| Run::new(PageNumber(first), count).unwrap();
    let mut out = Vec::new();
    let mut frame = PagesFrame::begin(&mut out);
    frame.zero(run(0x0102_0304, 512));
    frame.batch(Codec::Lz4, &[run(7, 1), run(9, 2)], &[0xde, 0xad]);
    frame.finish(LaneIndex(3), Round(2), 5).unwrap();
    put_round_mark(&mut out, LaneIndex(3), Round(2), 6, &LaneTotals { frames: 6, pages: 515, bytes: 99, digest: 0xabcd });
    out
}

/// A frame with a piece of a stream.
fn piece() -> Vec<u8> {
    let mut out = Vec::new();
    StreamChunk { offset: 1 << 33, bytes: 9, codec: Some(Codec::Zstd), block: &[1, 2, 3] }.put(&mut out, LaneIndex(2), 4);
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

// SPEC: PROTOCOL.md#must-little-endian
// SPEC: PROTOCOL.md#must-kinds
#[test]
fn the_bytes_of_version_1_do_not_change() {
    let mut transcript = String::new();
    for message in every_message() {
        transcript += &format!("{} {}\n", message.name(), hex(&message.encode_framed()));
    }
    transcript += &format!("join {}\nframes {}\npiece {}\n", hex(&join().encode()), hex(&frames()), hex(&piece()));
    let Message::Handoff(signed) = signed(Handoff::Commit { digest: FinalDigest { state: [3; 32], lanes: [4; 32], memory: 5 } }) else {
        panic!()
    };
    transcript += &format!("signed-bytes {}\n", hex(&signed.message.signed_bytes()));
    let recorded = include_str!("transcript-v1.txt");
    assert!(transcript == recorded, "the encoding changed; a new protocol version?\n{transcript}");
}

#[test]
fn every_message_comes_back_as_it_was() {
    for message in every_message() {
        let framed = message.encode_framed();
        let (header, rest) = framed.split_first_chunk().unwrap();
        let (kind, body_bytes) = decode_control_header(header).unwrap();
        assert_eq!((kind, body_bytes), (message.kind(), rest.len()));
        assert_eq!(Message::decode(kind, rest).unwrap(), message);
    }
}

// SPEC: PROTOCOL.md#must-truncated
#[test]
fn every_message_truncated_at_every_byte_is_refused() {
    for message in every_message() {
        let body = body(&message);
        for end in 0..body.len() {
            let refused = Message::decode(message.kind(), &body[..end]).unwrap_err();
            assert!(matches!(refused, WireError::Truncated { message: name, .. } if name == message.name()), "{end}: {refused}");
        }
    }
}

// SPEC: PROTOCOL.md#must-no-slack
#[test]
fn every_message_with_a_byte_too_many_is_refused() {
    for message in every_message() {
        let mut body = body(&message);
        body.push(0);
        assert_eq!(Message::decode(message.kind(), &body), Err(WireError::Trailing { message: message.name(), got: 1 }));
    }
}

/// `message` with `bytes` in place of what is at `at`.
fn patched(message: &Message, at: usize, bytes: &[u8]) -> Result<Message, WireError> {
    let mut body = body(message);
    body[at..at + bytes.len()].copy_from_slice(bytes);
    Message::decode(message.kind(), &body)
}

// SPEC: PROTOCOL.md#must-known-kind
// SPEC: PROTOCOL.md#must-control-bound
#[test]
fn refuses_hostile_control_headers() {
    let header = |body_bytes: u32, kind: u8| {
        let mut header = [0; CONTROL_HEADER_BYTES];
        header[..4].copy_from_slice(&body_bytes.to_le_bytes());
        header[4] = kind;
        decode_control_header(&header).map_err(|error| error.to_string())
    };
    let max = u32::try_from(limits::CONTROL_BODY_BYTES_MAX).unwrap();
    assert_eq!(header(max, 2), Ok((2, limits::CONTROL_BODY_BYTES_MAX)));
    let length = |got: u32| Err(format!("`body length` of `control header` is out of bounds: expected 0 to {max}, got {got}"));
    assert_eq!(header(max + 1, 2), length(max + 1));
    assert_eq!(header(u32::MAX, 2), length(u32::MAX));
    for kind in [0, 23, 255] {
        let unknown = format!("`kind` of `control header` is unknown: expected 1 to 22, got {kind}");
        assert_eq!(header(0, kind), Err(unknown.clone()));
        assert_eq!(Message::decode(kind, &[]).unwrap_err().to_string(), unknown);
    }
}

// SPEC: PROTOCOL.md#must-bounded
// SPEC: PROTOCOL.md#must-known-number
#[test]
fn refuses_hostile_fields() {
    let messages = every_message();
    let [hello, offer, accept, round_end, round_applied, chunk] = [0, 1, 2, 3, 4, 5].map(|index| &messages[index]);
    let signed = |name: usize| &messages[name];
    let largest = u32::MAX.to_le_bytes();
    // Places inside the offer of `offer()`.
    let (vm, hypervisor) = (16, 16 + 4 + 5 + 16 + 8);
    let regions = hypervisor + 4 + 3;
    let machine = regions + 4 + 2 * 16;
    let terms = machine + 4 + 2;
    let epoch = hypervisor - 8;
    let cases: [(&str, &Message, usize, &[u8], &str); 47] = [
        (
            "migration",
            offer,
            0,
            &[0; 16],
            "`migration` of `offer` is malformed: expected one that was drawn at random, not all zeroes, got `0`",
        ),
        ("epoch zero", offer, epoch, &[0], "`epoch` of `offer` is out of bounds: expected 1 to 18446744073709551614, got 0"),
        (
            "epoch largest",
            offer,
            epoch,
            &[0xff; 8],
            "`epoch` of `offer` is out of bounds: expected 1 to 18446744073709551614, got 18446744073709551615",
        ),
        ("no version", hello, 0, &[0, 0], "`versions` of `hello` is malformed: expected 1 <= lowest <= highest, got `0..=1`"),
        ("versions crossed", hello, 0, &[9, 0], "`versions` of `hello` is malformed: expected 1 <= lowest <= highest, got `9..=1`"),
        ("features", hello, 52, &[65, 0], "`features` of `hello` is out of bounds: expected 0 to 64, got 65"),
        ("features largest", hello, 52, &largest, "`features` of `hello` is out of bounds: expected 0 to 64, got 4294967295"),
        ("critical", hello, 56, &[2], "`critical` of `hello` is out of bounds: expected 0 to 1, got 2"),
        ("name length", hello, 57, &[33], "`feature name` of `hello` is out of bounds: expected 0 to 32, got 33"),
        ("name not UTF-8", hello, 61, &[0xff], "`feature name` of `hello` is malformed: expected UTF-8, got `\\u{fffd}std`"),
        ("name rule", hello, 61, b"Z", "`feature name` of `hello` is malformed: expected 1 to 32 of `a-z 0-9 -`, got `Zstd`"),
        ("VM name length", offer, vm, &[64], "`VM name` of `offer` is out of bounds: expected 0 to 63, got 64"),
        ("VM name empty", offer, vm, &[0], "`VM name` of `offer` is malformed: expected 1 to 63 of `a-z A-Z 0-9 . _ -`, got ``"),
        ("VM name path", offer, vm + 4, b"../", "`VM name` of `offer` is malformed: expected 1 to 63 of `a-z A-Z 0-9 . _ -`, got `../-1`"),
        (
            "VM name ESC",
            offer,
            vm + 4,
            &[0x1b],
            "`VM name` of `offer` is malformed: expected 1 to 63 of `a-z A-Z 0-9 . _ -`, got `\\u{1b}eb-1`",
        ),
        ("hypervisor length", offer, hypervisor, &[33], "`hypervisor` of `offer` is out of bounds: expected 0 to 32, got 33"),
        ("hypervisor empty", offer, hypervisor, &[0], "`hypervisor` of `offer` is malformed: expected 1 to 32 of `a-z 0-9 _ -`, got ``"),
        ("hypervisor", offer, hypervisor + 4, b"/", "`hypervisor` of `offer` is malformed: expected 1 to 32 of `a-z 0-9 _ -`, got `/vm`"),
        ("no regions", offer, regions, &[0], "`regions` of `offer` is out of bounds: expected 1 to 64, got 0"),
        ("regions", offer, regions, &[65], "`regions` of `offer` is out of bounds: expected 1 to 64, got 65"),
        ("regions largest", offer, regions, &largest, "`regions` of `offer` is out of bounds: expected 1 to 64, got 4294967295"),
        ("machine", offer, machine, &[1, 0, 4], "`machine` of `offer` is out of bounds: expected 0 to 262144, got 262145"),
        ("no lanes", offer, terms, &[0, 0], "`lanes` of `offer` is out of bounds: expected 1 to 16, got 0"),
        ("lanes", offer, terms, &[17, 0], "`lanes` of `offer` is out of bounds: expected 1 to 16, got 17"),
        (
            "compression zero",
            offer,
            terms + 2,
            &[0],
            "`compression` of `offer` is unknown: expected 1 (none), 2 (lz4), 3 (zstd) or 4 (auto), got 0",
        ),
        (
            "compression",
            offer,
            terms + 2,
            &[5],
            "`compression` of `offer` is unknown: expected 1 (none), 2 (lz4), 3 (zstd) or 4 (auto), got 5",
        ),
        ("scope", offer, terms + 3, &[4], "`compression scope` of `offer` is unknown: expected 1 (page), 2 (batch) or 3 (stream), got 4"),
        ("padding", offer, terms + 4, &[2], "`length padding` of `offer` is out of bounds: expected 0 to 1, got 2"),
        ("durability", offer, terms + 5, &[9], "`durability` of `offer` is unknown: expected 1 (none), 2 (destination) or 3 (both), got 9"),
        ("verify", offer, terms + 6, &[255], "`verify` of `offer` is out of bounds: expected 0 to 1, got 255"),
        ("no lane granted", accept, 16, &[0, 0], "`lanes` of `accept` is out of bounds: expected 1 to 16, got 0"),
        ("lanes granted", accept, 16, &[0, 1], "`lanes` of `accept` is out of bounds: expected 1 to 16, got 256"),
        ("round zero", round_end, 16, &[0], "`round` of `round-end` is out of bounds: expected 1 to 4294967295, got 0"),
        ("last", round_end, 20, &[2], "`last` of `round-end` is out of bounds: expected 0 to 1, got 2"),
        ("lanes of a round", round_end, 21, &[17], "`lanes` of `round-end` is out of bounds: expected 1 to 16, got 17"),
        ("no lane of a round", round_applied, 20, &[0], "`lanes` of `round-applied` is out of bounds: expected 1 to 16, got 0"),
        ("state", chunk, 24, &[1, 0, 0, 4], "`total` of `state-chunk` is out of bounds: expected 0 to 67108864, got 67108865"),
        ("offset", chunk, 16, &[10], "`offset` of `state-chunk` is out of bounds: expected 0 to 9, got 10"),
        ("piece", chunk, 32, &[5], "`piece` of `state-chunk` is out of bounds: expected 1 to 4, got 5"),
        ("empty piece", chunk, 32, &[0], "`piece` of `state-chunk` is out of bounds: expected 1 to 4, got 0"),
        ("no piece of the way back", signed(29), 24, &[0], "`piece` of `stream-back` is out of bounds: expected 1 to 65536, got 0"),
        ("a long piece of it", signed(29), 24, &[1, 0, 1], "`piece` of `stream-back` is out of bounds: expected 1 to 65536, got 65537"),
        ("step zero", signed(9), 80, &[0], "`step` of `handoff` is unknown: expected 1 (final) to 7 (refuse), got 0"),
        ("step", signed(9), 80, &[8], "`step` of `handoff` is unknown: expected 1 (final) to 7 (refuse), got 8"),
        ("lanes of the final state", signed(7), 161, &[0, 0], "`lanes` of `handoff` is out of bounds: expected 1 to 16, got 0"),
        ("class of an abort", signed(12), 81, &[0, 0], "`class` of `handoff` is unknown: expected a number of the table of classes, got 0"),
        (
            "class of a failure",
            signed(15),
            0,
            &[14, 0],
            "`class` of `failure` is unknown: expected a number of the table of classes, got 14",
        ),
    ];
    for (name, message, at, bytes, expected) in cases {
        let refused = patched(message, at, bytes).unwrap_err();
        assert_eq!(refused.to_string(), expected, "{name}");
        assert_eq!(refused.class(), ErrorClass::PeerMisbehaved, "{name}");
    }
}

#[test]
fn refuses_texts_that_are_too_long_but_cuts_its_own_reason() {
    let long = "ü".repeat(limits::CHECKPOINT_BYTES_MAX);
    let checkpoint = Message::AuditHead(head(&long));
    let refused = Message::decode(8, &body(&checkpoint)).unwrap_err();
    assert_eq!(refused.to_string(), "`checkpoint` of `audit-head` is out of bounds: expected 0 to 4096, got 8192");
    let failure = Message::Failure(Failure { class: ErrorClass::Local, reason: format!("x{long}") });
    let Message::Failure(Failure { reason, .. }) = Message::decode(9, &body(&failure)).unwrap() else { panic!() };
    assert_eq!(reason.len(), limits::REASON_BYTES_MAX - 1);
    assert!(reason.starts_with("xü") && reason.ends_with('ü'));
}

#[test]
fn a_join_comes_back_and_a_broken_one_is_refused() {
    let bytes = join().encode();
    assert_eq!(Join::decode(&bytes).unwrap(), join());
    let broken = |at: usize, byte: u8| {
        let mut bytes = bytes;
        bytes[at] = byte;
        Join::decode(&bytes).map_err(|error| error.to_string())
    };
    assert_eq!(broken(0, b'S'), Err("`magic` of `join` is malformed: expected `sljn`, got `Sljn`".to_owned()));
    assert_eq!(broken(20, 16), Err("`lane` of `join` is out of bounds: expected 0 to 15, got 16".to_owned()));
}

#[test]
fn lane_totals_have_canonical_bytes_in_lane_order() {
    let totals = [LaneTotals { frames: 1, ..LaneTotals::default() }, LaneTotals { pages: 1, ..LaneTotals::default() }];
    let bytes = LaneTotals::canonical_bytes(&totals);
    assert_eq!(bytes.len(), b"sealane lanes v1\0".len() + 4 + 2 * 40);
    assert_ne!(bytes, LaneTotals::canonical_bytes(&[totals[1], totals[0]]));
}

// SPEC: PROTOCOL.md#must-sign
#[test]
fn a_handoff_signature_covers_every_field_under_its_own_domain() {
    let Message::Handoff(SignedHandoff { message, .. }) =
        signed(Handoff::Commit { digest: FinalDigest { state: [3; 32], lanes: [4; 32], memory: 5 } })
    else {
        panic!()
    };
    let bytes = message.signed_bytes();
    assert!(bytes.starts_with(b"sealane handoff v1\0"));
    let digest = FinalDigest { state: [0; 32], lanes: [0; 32], memory: 0 };
    let others = [
        HandoffMessage { migration: MigrationId([0; 16]), ..message.clone() },
        HandoffMessage { uuid: VmUuid([0; 16]), ..message.clone() },
        HandoffMessage { epoch: Epoch(5), ..message.clone() },
        HandoffMessage { sender: message.receiver, receiver: message.sender, ..message.clone() },
        HandoffMessage { position: 8, ..message.clone() },
        HandoffMessage { step: Handoff::Commit { digest }, ..message.clone() },
        HandoffMessage { step: Handoff::Done, ..message.clone() },
        HandoffMessage { step: Handoff::Prepared { digest }, ..message.clone() },
        HandoffMessage { step: Handoff::Prepared { digest: FinalDigest { memory: 1, ..digest } }, ..message.clone() },
        HandoffMessage { step: Handoff::Abort { class: ErrorClass::Bug }, ..message.clone() },
        HandoffMessage { step: Handoff::Refuse { class: ErrorClass::Bug }, ..message.clone() },
        HandoffMessage { step: Handoff::Final { digest, lanes: 1 }, ..message.clone() },
        HandoffMessage { step: Handoff::Final { digest, lanes: 2 }, ..message },
    ];
    let all: std::collections::BTreeSet<Vec<u8>> = others.iter().map(HandoffMessage::signed_bytes).chain([bytes]).collect();
    assert_eq!(all.len(), others.len() + 1);
}

proptest! {
    // What decodes encodes to the same bytes: a message has one encoding.
    #[test]
    fn random_bodies_never_panic_and_have_one_encoding(kind in any::<u8>(), bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(message) = Message::decode(kind, &bytes) {
            prop_assert_eq!(body(&message), bytes);
        }
    }

    #[test]
    fn messages_with_bytes_changed_never_panic_and_have_one_encoding(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
    ) {
        let messages = every_message();
        let message = which.get(&messages);
        let mut bytes = body(message);
        for (at, byte) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        if let Ok(message) = Message::decode(message.kind(), &bytes) {
            prop_assert_eq!(body(&message), bytes);
        }
    }

    #[test]
    fn joins_have_one_encoding(bytes in any::<[u8; JOIN_BYTES - 4]>()) {
        let bytes: [u8; JOIN_BYTES] = [b"sljn".as_slice(), &bytes].concat().try_into().unwrap();
        if let Ok(join) = Join::decode(&bytes) {
            prop_assert_eq!(join.encode(), bytes);
        }
    }
}

#[test]
fn a_piece_of_a_stream_comes_back_as_it_was_and_a_hostile_one_does_not() {
    for (codec, bytes) in [(None, 3), (Some(Codec::Lz4), 9), (Some(Codec::Zstd), 9), (Some(Codec::ZstdStart), 1)] {
        let chunk = StreamChunk { offset: 7, bytes, codec, block: &[1, 2, 3] };
        let mut frame = Vec::new();
        chunk.put(&mut frame, LaneIndex(2), 4);
        let (header, body) = frame.split_first_chunk().unwrap();
        let header = FrameHeader::decode(header).unwrap();
        assert_eq!((header.kind, header.lane, header.sequence, header.body_bytes), (FrameKind::Stream, LaneIndex(2), 4, body.len()));
        assert_eq!(StreamChunk::decode(body).unwrap(), chunk);
    }
    let body =
        |codec: u8, offset: u64, bytes: u32, block: &[u8]| [&[codec][..], &offset.to_le_bytes(), &bytes.to_le_bytes(), block].concat();
    let most = u32::try_from(limits::STREAM_CHUNK_BYTES_MAX).unwrap();
    for (body, field) in [
        (body(5, 0, 1, &[0]), "codec"),
        (body(4, 0, 2, &[0; 67]), "block"),
        (body(0, u64::MAX, 1, &[0]), "offset"),
        (body(0, 0, 0, &[]), "length"),
        (body(2, 0, most + 1, &[0]), "length"),
        (body(2, 0, u32::MAX, &[0]), "length"),
        (body(0, 0, 2, &[0]), "block"),
        (body(0, 0, 2, &[0; 3]), "block"),
        (body(1, 0, 2, &[0; 3]), "block"),
        (body(1, 0, 2, &[]), "block"),
        (vec![0; 12], "length"),
        (vec![], "codec"),
    ] {
        let refused = StreamChunk::decode(&body).unwrap_err().to_string();
        assert!(refused.contains(&format!("`{field}`")) || refused.contains(field), "{refused}: {field}");
    }
}
