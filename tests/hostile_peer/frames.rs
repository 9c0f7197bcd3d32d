//! Frames that are wrong in every way that `PROTOCOL.md` names, on a real lane.

use lz4_flex::block::compress;
use sealane::telemetry::ErrorClass::PeerMisbehaved;

use crate::lab::{EVIL, Lab};
use crate::source::{Evil, LANES, PAGES, case, takes_an_honest_vm};

fn run(first: u64, count: u64) -> Vec<u8> {
    (first | count << 40).to_le_bytes().to_vec()
}

fn zero(first: u64, count: u64) -> Vec<u8> {
    [vec![1], run(first, count)].concat()
}

fn batch(codec: u8, first: u64, count: u64, block: &[u8]) -> Vec<u8> {
    let mut out = vec![3, codec, 1, 0];
    out.extend(run(first, count));
    out.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
    out.extend(block);
    out
}

/// A frame of lane 0, every field free.
#[derive(Clone)]
struct Frame {
    kind: u8,
    reserved: u8,
    lane: u16,
    round: u32,
    sequence: u64,
    records: u32,
    body_bytes: Option<u32>,
    body: Vec<u8>,
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![self.kind, self.reserved];
        out.extend(self.lane.to_le_bytes());
        out.extend(self.round.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.records.to_le_bytes());
        out.extend(self.body_bytes.unwrap_or(u32::try_from(self.body.len()).unwrap()).to_le_bytes());
        out.extend(&self.body);
        out
    }
}

fn pages(records: &[Vec<u8>]) -> Frame {
    let body = records.concat();
    let records = u32::try_from(records.len()).unwrap();
    Frame { kind: 1, reserved: 0, lane: 0, round: 1, sequence: 0, records, body_bytes: None, body }
}

fn frames() -> Vec<(&'static str, Vec<Frame>)> {
    let good = pages(&[zero(0, 1)]);
    let mark = Frame { kind: 2, records: 0, body: vec![0; 40], ..good.clone() };
    let packed = compress(&[7; 4096]);
    vec![
        ("unknown kind", vec![Frame { kind: 3, ..good.clone() }]),
        ("reserved byte", vec![Frame { reserved: 1, ..good.clone() }]),
        ("the other lane", vec![Frame { lane: 1, ..good.clone() }]),
        ("a lane beyond all", vec![Frame { lane: 16, ..good.clone() }]),
        ("round zero", vec![Frame { round: 0, ..good.clone() }]),
        ("a gap in the sequence", vec![good.clone(), Frame { sequence: 2, ..pages(&[zero(1, 1)]) }]),
        ("a frame twice", vec![good.clone(), good.clone()]),
        ("no records", vec![Frame { records: 0, ..good.clone() }]),
        ("more records than fit", vec![Frame { records: u32::MAX, ..good.clone() }]),
        ("fewer records than named", vec![Frame { records: 2, ..good.clone() }]),
        ("oversize body", vec![Frame { body_bytes: Some((512 << 10) + 1), ..good.clone() }]),
        ("largest body", vec![Frame { body_bytes: Some(u32::MAX), ..good.clone() }]),
        ("empty body", vec![Frame { body: vec![], ..good.clone() }]),
        ("page out of range", vec![pages(&[zero(PAGES, 1)])]),
        ("page far out of range", vec![pages(&[zero((1 << 40) - 1, 1)])]),
        ("run of no pages", vec![pages(&[zero(0, 0)])]),
        ("run over its limit", vec![pages(&[zero(0, 65_537)])]),
        ("page of the other lane", vec![pages(&[zero(512, 1)])]),
        ("run into the other lane", vec![pages(&[zero(511, 2)])]),
        ("duplicate page", vec![pages(&[zero(5, 1), zero(5, 1)])]),
        ("duplicate page in another frame", vec![good.clone(), Frame { sequence: 1, ..good.clone() }]),
        ("LZ4 garbage", vec![pages(&[batch(1, 0, 1, &[0xff; 200])])]),
        ("LZ4 of fewer pages", vec![pages(&[batch(1, 0, 2, &packed)])]),
        ("LZ4 of more pages", vec![pages(&[batch(1, 0, 1, &compress(&[7; 8192]))])]),
        ("unknown codec", vec![pages(&[batch(9, 0, 1, &packed)])]),
        ("unknown record", vec![pages(&[vec![5; 9]])]),
        ("padding that is not zero", vec![pages(&[zero(0, 1), vec![4, 1, 0, 0, 0, 1]])]),
        ("a mark that lies", vec![mark.clone()]),
        ("a mark of another round", vec![good.clone(), Frame { sequence: 1, round: 2, ..mark.clone() }]),
        ("a mark with records", vec![Frame { records: 1, ..mark }]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_frame_ends_the_migration() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    for (name, frames) in frames() {
        case(&mut gateway, &evil, name, PeerMisbehaved, async |a| {
            a.joined().await;
            a.lane(0, frames.iter().flat_map(Frame::bytes).collect());
        })
        .await;
    }
    case(&mut gateway, &evil, "a lane that ends inside a frame", PeerMisbehaved, async |a| {
        a.joined().await;
        let bytes = pages(&[zero(0, 1)]).bytes();
        a.lane(0, bytes[..bytes.len() - 3].to_vec());
        a.lanes.remove(0);
    })
    .await;
    case(&mut gateway, &evil, "a lane that ends inside a header", PeerMisbehaved, async |a| {
        a.joined().await;
        a.lane(1, vec![1, 0, 1]);
        a.lanes.truncate(1);
    })
    .await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// What comes behind the last round would be written into a guest that runs.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_behind_the_last_round() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    case(&mut gateway, &evil, "pages behind the last round", PeerMisbehaved, async |a| {
        a.sent().await;
        a.pages(2);
    })
    .await;
    let mut attempt = evil.attempt(0).await;
    attempt.prepared().await;
    let digest = attempt.digest();
    attempt.pages(2);
    attempt.step(sealane::wire::Handoff::Commit { digest }).await;
    assert_eq!(attempt.heard_step("running").await, sealane::wire::Handoff::Running);
    // Zeroes over all of the guest's memory, which checks what it reads.
    let zeroes = Frame { round: 3, sequence: attempt.totals()[0].frames, ..pages(&[zero(0, 512), zero(1024, 512)]) };
    attempt.lane(0, zeroes.bytes());
    attempt.step(sealane::wire::Handoff::Done).await;
    let migration = attempt.migration();
    assert_eq!(LANES, 2);
    drop(attempt);
    gateway.arrived_guest_beats("after frames behind the last round", migration).await;
    gateway.is_well("frames behind the last round", 1).await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 2).await;
}
