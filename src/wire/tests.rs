//! Every message there and back, and every way to break one that we could think of.

use proptest::prelude::*;

use super::*;
use crate::limits;
use crate::types::{Epoch, Incarnation, LaneIndex, MigrationId, RamRegion, Round, VmUuid};

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
        step,
    };
    Message::Handoff(SignedHandoff { message, signature: [0x5a; 64] })
}

/// One of every message, and of every step of the handoff.
fn every_message() -> Vec<Message> {
    let digest = FinalDigest { state: [3; 32], lanes: [4; 32], memory: 1 << 100 };
    let totals = vec![LaneTotals { frames: 1, pages: 2, bytes: 3, digest: u128::MAX }, LaneTotals::default()];
    let feature = |name: &str, critical| Feature { name: name.to_owned(), critical };
    vec![
        Message::Hello(Hello { features: vec![feature("zstd", false), feature("x", true)], ..Hello::new(Incarnation([8; 16]), [6; 32]) }),
        Message::Offer(offer()),
        Message::Accept(Accept { migration: MIGRATION, lanes: 1, policy_digest: [1; 32] }),
        Message::RoundEnd(RoundEnd { migration: MIGRATION, round: Round(1), last: true, lanes: totals.clone() }),
        Message::RoundApplied(RoundApplied { migration: MIGRATION, round: Round(7), lanes: totals }),
        Message::StateChunk(StateChunk { migration: MIGRATION, offset: 5, total: 9, bytes: vec![1, 2, 3] }),
        Message::StateChunk(StateChunk { migration: MIGRATION, offset: 0, total: 0, bytes: vec![] }),
        signed(Handoff::Final { digest, lanes: 2 }),
        signed(Handoff::Prepared { digest }),
        signed(Handoff::Commit),
        signed(Handoff::Running),
        signed(Handoff::Done),
        signed(Handoff::Abort { class: ErrorClass::Cancelled }),
        signed(Handoff::Refuse { class: ErrorClass::InDoubt }),
        Message::AuditHead(AuditHead { checkpoint: "gw-a\n1\nAAAA\n".to_owned() }),
        Message::Failure(Failure { class: ErrorClass::Denied, reason: "nein, danke – ✗".to_owned() }),
        Message::Ping,
    ]
}

fn body(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
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

#[test]
fn every_message_with_a_byte_too_many_is_refused() {
    for message in every_message() {
        let mut body = body(&message);
        body.push(0);
        assert_eq!(Message::decode(message.kind(), &body), Err(WireError::Trailing { message: message.name(), got: 1 }));
    }
}
