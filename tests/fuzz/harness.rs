//! What strangers, peers and users can send, one function for each: it takes any bytes, and must not panic, hang, or take
//! more memory than its input justifies. What it accepts has to come out again as it was.

#[path = "logs.rs"]
mod logs;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use sealane::condense::{AgainWalk, BackWalk, Condenser, Expander, Expected, FOLLOWED_BYTES_MAX, Follow, Gather, Grammar, RamBlock};
use sealane::control::{GatewayView, MigrateRequest, MigrationView, Problem, ResolveRequest, SetRequest};
use sealane::engine::Placement;
use sealane::hypervisor::Generation;
use sealane::identity::{Credentials, IdentityConfig, PostQuantum, TrustDomainConfig};
use sealane::limits;
use sealane::memory::{Decoder, Duplicates, Effort, Encoder, GuestRam, MemoryLayout, PageSet};
use sealane::policy::{Entities, PolicyFile, PolicySet};
use sealane::types::{LaneIndex, MigrationId, PAGE_BYTES, PageNumber, Round, VmUuid};
use sealane::vmm::state_differences;
use sealane::wire::{
    CONTROL_HEADER_BYTES, Compression, CompressionScope, Durability, FRAME_HEADER_BYTES, FrameHeader, JOIN_BYTES, Join, Message,
    StreamTerms, decode_control_header, decode_round_mark,
};

use crate::fixtures::World;

/// One kind of bytes from outside.
pub struct Target {
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Good ones to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How many mutations a test tries: those that are dear get fewer.
    pub share: u64,
}

pub const TARGETS: &[Target] = &[
    Target { name: "frame-header", run: frame_header, seeds: frame_headers, share: 100 },
    Target { name: "round-mark", run: round_mark, seeds: round_marks, share: 100 },
    Target { name: "pages-none", run: |bytes| pages(bytes, NONE), seeds: || frames(NONE, Effort::None), share: 25 },
    Target { name: "pages-lz4", run: |bytes| pages(bytes, LZ4), seeds: || frames(LZ4, Effort::Lz4), share: 25 },
    Target { name: "pages-zstd", run: |bytes| pages(bytes, ZSTD), seeds: || frames(ZSTD, Effort::Zstd(3)), share: 25 },
    Target { name: "pages-stream", run: |bytes| pages(bytes, STREAM), seeds: || frames(STREAM, Effort::Zstd(3)), share: 25 },
    Target { name: "stream", run: stream, seeds: streams, share: 25 },
    Target { name: "split-stream", run: split_stream, seeds: split_streams, share: 25 },
    Target { name: "channels", run: channels, seeds: channels_together, share: 25 },
    Target { name: "way-back", run: way_back, seeds: ways_back, share: 100 },
    Target { name: "rest-of-stream", run: rest_of_stream, seeds: rests_of_streams, share: 100 },
    Target { name: "parcel", run: parcel, seeds: parcels, share: 25 },
    Target { name: "control-message", run: control_message, seeds: control_messages, share: 100 },
    Target { name: "join", run: join, seeds: joins, share: 100 },
    Target { name: "journal-place", run: journal_place, seeds: journal_places, share: 100 },
    Target { name: "vm-state", run: vm_state, seeds: vm_states, share: 25 },
    Target { name: "generation", run: generation, seeds: generations, share: 100 },
    Target { name: "config", run: config, seeds: configs, share: 5 },
    Target { name: "control-request", run: control_request, seeds: control_requests, share: 100 },
    Target { name: "policy", run: policy, seeds: policies, share: 5 },
    Target { name: "certificate", run: certificate, seeds: certificates, share: 50 },
    Target { name: "audit-log", run: logs::audit_log, seeds: logs::audit_logs, share: 5 },
    Target { name: "audit-checkpoint", run: logs::audit_checkpoint, seeds: logs::audit_checkpoints, share: 5 },
    Target { name: "audit-proof", run: logs::audit_proof, seeds: logs::audit_proofs, share: 20 },
    Target { name: "bundle-manifest", run: logs::bundle_manifest, seeds: logs::bundle_manifests, share: 50 },
    Target { name: "bundle-signature", run: logs::bundle_signature, seeds: logs::bundle_signatures, share: 2 },
    Target { name: "crl", run: crl, seeds: crls, share: 10 },
    Target { name: "qmp", run: logs::qmp, seeds: logs::qmp_conversations, share: 5 },
];

/// The target of this name.
#[allow(dead_code, reason = "the fuzzer's programs ask by name, the test takes all of them")]
pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target of this name")
}

fn frame_header(bytes: &[u8]) {
    let Some(header) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else { return };
    if let Ok(decoded) = FrameHeader::decode(header) {
        assert!(decoded.body_bytes <= limits::FRAME_BODY_BYTES_MAX);
        assert_eq!(&decoded.encode(), header);
    }
}

fn frame_headers() -> Vec<Vec<u8>> {
    frames(NONE, Effort::None).into_iter().map(|frame| frame[..FRAME_HEADER_BYTES].to_vec()).collect()
}

fn round_mark(bytes: &[u8]) {
    let _ = decode_round_mark(bytes);
}

fn round_marks() -> Vec<Vec<u8>> {
    let mut mark = Vec::new();
    Encoder::new(LaneIndex(0), 1, &terms(NONE), PAGES).round_mark(Round(1), &mut mark);
    vec![mark.split_off(FRAME_HEADER_BYTES)]
}

/// Compression and its scope.
type Terms = (Compression, CompressionScope);
const NONE: Terms = (Compression::None, CompressionScope::Batch);
const LZ4: Terms = (Compression::Lz4, CompressionScope::Batch);
const ZSTD: Terms = (Compression::Zstd, CompressionScope::Batch);
const STREAM: Terms = (Compression::Auto, CompressionScope::Stream);
/// Pages of the VM that is sent.
const PAGES: u64 = 96;

fn terms((compression, compression_scope): Terms) -> StreamTerms {
    StreamTerms { lanes: 1, compression, compression_scope, length_padding: true, durability: Durability::None, verify: true }
}

fn ram() -> GuestRam {
    GuestRam::anonymous(MemoryLayout::flat(PAGES).unwrap()).unwrap()
}

fn pages(bytes: &[u8], of: Terms) {
    apply(bytes, of);
}

/// A lane from its join on, until something is wrong; says how much of it was good.
fn apply(bytes: &[u8], of: Terms) -> usize {
    let ram = ram();
    let mut decoder = Decoder::new(LaneIndex(0), 1, &terms(of), PAGES);
    let mut rest = bytes;
    while let Some((header, behind)) = rest.split_first_chunk::<FRAME_HEADER_BYTES>() {
        let Ok(header) = FrameHeader::decode(header) else { break };
        let Some((body, behind)) = behind.split_at_checked(header.body_bytes) else { break };
        if decoder.apply(&header, body, &ram).is_err() {
            break;
        }
        rest = behind;
    }
    bytes.len() - rest.len()
}

/// What a stream of QEMU may say.
fn grammar() -> Grammar {
    grammar_of(false)
}

fn grammar_of(post_copy: bool) -> Grammar {
    let blocks = vec![RamBlock { name: "pc.ram".to_owned(), used: PAGES * 4096, max: PAGES * 4096 }];
    Grammar::Qemu(Box::new(Expected { uuid: VmUuid([7; 16]), machine: "pc".to_owned(), blocks, post_copy }))
}

/// A key as one that is drawn at random. WHY: under a key of equal bytes a page hashes as one in which two words have changed places.
fn drawn<const N: usize>() -> [u8; N] {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    })
}

/// Parcels of a stream, and both digests.
type Condensed = (Vec<Vec<u8>>, ([u8; 32], u128));

fn condensed(bytes: &[u8], grammar: Grammar) -> Option<Condensed> {
    let mut condenser = Condenser::new(grammar, [1 << 20, 1 << 18], Box::new(drawn()));
    let taken = condenser.take_in(bytes).ok()?;
    condenser.end(&bytes[taken..]).ok()?;
    Some((condenser.parcels(true).map(|parcel| parcel.bytes).collect(), condenser.digest().finish()))
}

/// What is taken of a stream comes out again as it was.
fn stream(bytes: &[u8]) {
    comes_out(bytes, &grammar());
}

fn split_stream(bytes: &[u8]) {
    comes_out(bytes, &grammar_of(true));
}

fn split_streams() -> Vec<Vec<u8>> {
    // The passes of a stream, then a package with one device, and an end.
    let mut stream = streams().remove(0);
    let tail = stream.windows(8).rposition(|window| window == b"\x04\0\0\0\x05\x03cp").expect("a device");
    let device = stream.split_off(tail)[..19].to_vec();
    let last = stream.windows(5).rposition(|window| window == b"\x03\0\0\0\x01").expect("a last section");
    stream[last] = 2;
    let package = [b"\x08\0\x04\0\0".as_slice(), &device, b"\x08\0\x05\0\0"].concat();
    let head = [b"\x08\0\x07\0\x04".as_slice(), &u32::try_from(package.len()).unwrap().to_be_bytes()].concat();
    let rest = b"\x08\0\x02\0\x04\0\0\0\x04\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01\0";
    let split = [stream, head, package, rest.to_vec()].concat();
    assert!(condensed(&split, grammar_of(true)).is_some());
    vec![split]
}

/// Pieces of channels: which, how long, and what it says. What comes out of them is followed to where it stops.
fn channels(bytes: &[u8]) {
    let Grammar::Qemu(expected) = grammar() else { panic!("no grammar") };
    let mut gather = Gather::new(*expected, 2);
    let (mut held, mut out, mut rest) = (vec![Vec::new(); 3], Vec::new(), bytes);
    while let Some((head, more)) = rest.split_first_chunk::<3>() {
        let piece = &more[..more.len().min(usize::from(u16::from_le_bytes([head[1], head[2]])))];
        rest = &more[piece.len()..];
        held[usize::from(head[0]) % 3].extend_from_slice(piece);
        loop {
            let mut taken = 0;
            for (index, held) in held.iter_mut().enumerate() {
                let took = if index == 0 { gather.take_main(held) } else { gather.take_channel(index - 1, held) };
                let Ok(took) = took else { return };
                held.drain(..took);
                taken += took;
            }
            out.append(gather.gathered());
            if taken == 0 {
                break;
            }
        }
    }
    let mut condenser = Condenser::new(grammar(), [1 << 20, 1 << 18], Box::new(drawn()));
    condenser.take_in(&out).expect("a stream as it may be");
}

fn channels_together() -> Vec<Vec<u8>> {
    let packet = |sync: u8, pages: &[u64]| {
        let count = u8::try_from(pages.len()).unwrap();
        let mut bytes =
            [b"\x11\x22\x33\x44\0\0\0\x01\0\0\0".as_slice(), &[sync, 0, 0, 0, 128, 0, 0, 0, count, 0, 0, count * 16, 0]].concat();
        // A number, and one page of zeroes.
        bytes.extend_from_slice(b"\0\0\0\0\0\0\0\x07\0\0\0\x01");
        bytes.resize(64, 0);
        bytes.extend_from_slice(b"pc.ram");
        bytes.resize(320, 0);
        pages.iter().chain(&[33]).for_each(|page| bytes.extend_from_slice(&(page * 4096).to_be_bytes()));
        bytes.resize(1344 + pages.len() * PAGE_BYTES, 5);
        bytes
    };
    let sync = || [b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x01".as_slice(), &[0; 1332]].concat();
    let greeting = |id: u8| [b"\x11\x22\x33\x44\0\0\0\x01".as_slice(), &[7; 16], &[id], &[0; 39]].concat();
    // Four sections, at whose ends all of them wait.
    let first = [greeting(0), sync(), packet(0, &[21, 22]), packet(1, &[23]), sync(), sync()].concat();
    let second = [greeting(1), sync(), packet(1, &[24, 25, 26]), sync(), packet(0, &[27]), sync()].concat();
    let pieces = |pieces: &[(u8, &[u8])]| {
        let piece = |(channel, bytes): &(u8, &[u8])| {
            let cut = bytes.chunks(20_000).map(|part| [&[*channel][..], &u16::try_from(part.len()).unwrap().to_le_bytes(), part].concat());
            cut.collect::<Vec<_>>().concat()
        };
        pieces.iter().map(piece).collect::<Vec<_>>().concat()
    };
    let main = streams().remove(0);
    vec![pieces(&[(0, &main), (1, &first), (2, &second)]), pieces(&[(2, &second), (1, &first), (0, &main)])]
}

fn way_back(bytes: &[u8]) {
    followed(bytes, || BackWalk::new(grammar_of(true)));
}

fn rest_of_stream(bytes: &[u8]) {
    followed(bytes, || AgainWalk::new(grammar_of(true)));
}

fn followed<W: Follow>(bytes: &[u8], begin: impl Fn() -> W) {
    let mut walk = begin();
    let Ok(taken) = walk.take_in(bytes) else { return };
    assert!(bytes.len() - taken < FOLLOWED_BYTES_MAX);
    // However it is cut, it is taken alike.
    let (mut again, mut held, mut count) = (begin(), Vec::new(), 0);
    for piece in bytes.chunks(7) {
        held.extend_from_slice(piece);
        let taken = again.take_in(&held).unwrap();
        held.drain(..taken);
        count += taken;
    }
    assert_eq!((count, again.faults()), (taken, walk.faults()));
}

fn ways_back() -> Vec<Vec<u8>> {
    let asks = b"\0\x02\0\x04\0\0\0\x01\0\x03\0\x13\0\0\0\0\0\0\x10\0\0\0\x10\0\x06pc.ram\0\x04\0\x0c\0\0\0\0\0\0\x20\0\0\0\x10\0\0\x01\0\x04\0\0\0\0";
    vec![asks.to_vec()]
}

fn rests_of_streams() -> Vec<Vec<u8>> {
    // Which pages are there is asked, and the last pass of a stream follows.
    let asks = b"\x08\0\x0a\0\x07\x06pc.ram\x08\0\x02\0\x04\0\0\0\x07\x08\0\x09\0\0";
    let stream = streams().remove(0);
    let begin = stream.windows(5).rposition(|window| window == b"\x03\0\0\0\x01").expect("a last section");
    let end = stream.windows(8).rposition(|window| window == b"\x04\0\0\0\x05\x03cp").expect("a device");
    let rest = [asks.as_slice(), &stream[begin..end], b"\0"].concat();
    assert_eq!(AgainWalk::new(grammar_of(true)).take_in(&rest).expect("a good rest"), rest.len());
    vec![rest]
}

fn comes_out(bytes: &[u8], grammar: &Grammar) {
    let Some((parcels, digest)) = condensed(bytes, grammar.clone()) else { return };
    let mut expander = Expander::new(grammar.clone());
    let mut back = Vec::new();
    for parcel in parcels {
        expander.begin(parcel.into());
        while let Some(bytes) = expander.expand().unwrap() {
            back.extend_from_slice(bytes);
        }
        back.extend(expander.let_tail_go().unwrap());
    }
    let (rest, found) = expander.end().unwrap();
    back.extend_from_slice(&rest);
    assert!(back == bytes && found.finish() == digest);
}

fn streams() -> Vec<Vec<u8>> {
    let head = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05\x12configuration/uuid\0\0\0\x01\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07";
    let size = (PAGES * 4096).to_be_bytes();
    let sized = ((PAGES * 4096) | 4).to_be_bytes();
    let end: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";
    let mut stream = [head, b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".as_slice(), &sized, b"\x06pc.ram", &size, end].concat();
    for (section, changed) in [(2, 0), (2, 9), (3, 17)] {
        stream.extend_from_slice(&[section, 0, 0, 0, 1]);
        for page in 0..20_u64 {
            let flag = if page % 4 == 0 { 2 } else { 8 };
            let (flag, name): (u64, &[u8]) = if page == 0 { (flag, b"\x06pc.ram") } else { (flag | 0x20, b"") };
            stream.extend_from_slice(&((page * 4096) | flag).to_be_bytes());
            stream.extend_from_slice(name);
            let mut content = [u8::try_from(page % 7).unwrap(); PAGE_BYTES];
            content[usize::try_from(page).unwrap()] = changed;
            stream.extend_from_slice(if page % 4 == 0 { &[0] } else { &content });
        }
        stream.extend_from_slice(end);
    }
    let text = br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"fields":[{"size":4}]}]}"#;
    let length = u32::try_from(text.len()).unwrap().to_be_bytes();
    stream.extend_from_slice(b"\x04\0\0\0\x05\x03cpu\0\0\0\0\0\0\0\x01good\x7e\0\0\0\x05\0\x06");
    stream.extend_from_slice(&[&length, text.as_slice()].concat());
    vec![stream]
}

fn parcel(bytes: &[u8]) {
    expand(bytes);
}

/// Expands a parcel as the first of a stream, until something is wrong; whether nothing was.
fn expand(bytes: &[u8]) -> bool {
    let mut expander = Expander::new(grammar());
    expander.begin(bytes.to_vec().into());
    loop {
        match expander.expand() {
            Ok(Some(_)) => {}
            Ok(None) => return expander.let_tail_go().is_ok() && expander.end().is_ok(),
            Err(_) => return false,
        }
    }
}

fn parcels() -> Vec<Vec<u8>> {
    let parcels = streams().iter().map(|stream| condensed(stream, grammar()).expect("a good stream").0.concat()).collect::<Vec<_>>();
    assert!(parcels.iter().all(|parcel| expand(parcel)));
    parcels
}

/// Whether the seeds of pages are taken to their end: those that are refused at their beginning would test little.
#[allow(dead_code, reason = "for the test")]
pub fn good_lanes_are_taken() {
    for (of, effort) in [(NONE, Effort::None), (LZ4, Effort::Lz4), (ZSTD, Effort::Zstd(3)), (STREAM, Effort::Zstd(3))] {
        for lane in frames(of, effort) {
            assert_eq!(apply(&lane, of), lane.len(), "{of:?}");
        }
    }
}

/// Two rounds of pages of every kind: zero, equal, alike, text and noise.
fn frames(of: Terms, effort: Effort) -> Vec<Vec<u8>> {
    let (ram, terms) = (ram(), terms(of));
    let mut encoder = Encoder::new(LaneIndex(0), 1, &terms, PAGES);
    if of.0 != Compression::None {
        let duplicates = Arc::new(Duplicates::new(PAGES, 1 << 20, drawn::<{ sealane::memory::DUPLICATES_KEY_BYTES }>()));
        encoder = encoder.knowing(duplicates, 1 << 20, &terms);
        encoder.set_effort(effort);
    }
    let mut lane = Vec::new();
    for round in 1..=2u8 {
        for page in 0..PAGES {
            let mut content = [0; PAGE_BYTES];
            match page % 5 {
                0 => {}
                1 => content.fill(round),
                2 => content.iter_mut().zip(0u64..).for_each(|(byte, at)| *byte = ((at * at * (page + 3)) >> 3).to_le_bytes()[0]),
                3 => content.iter_mut().zip(b"what a guest says again and again. ".iter().cycle()).for_each(|(byte, text)| *byte = *text),
                _ => content[usize::from(round)] = 9,
            }
            ram.write(PageNumber(page), &content).unwrap();
        }
        let mut from = Some(PageNumber(0));
        while let Some(first) = from {
            let mut frame = Vec::new();
            from = encoder.encode_frame(&ram, Round(u32::from(round)), &PageSet::full(PAGES), first, &mut frame).unwrap();
            lane.extend(frame);
        }
        let mut mark = Vec::new();
        encoder.round_mark(Round(u32::from(round)), &mut mark);
        lane.extend(mark);
    }
    vec![lane]
}

fn control_message(bytes: &[u8]) {
    let Some((header, body)) = bytes.split_first_chunk::<CONTROL_HEADER_BYTES>() else { return };
    let Ok((kind, length)) = decode_control_header(header) else { return };
    assert!(length <= limits::CONTROL_BODY_BYTES_MAX);
    let Some(body) = body.get(..length) else { return };
    if let Ok(message) = Message::decode(kind, body) {
        assert_eq!(message.encode_framed(), bytes[..CONTROL_HEADER_BYTES + length], "{} has two encodings", message.name());
    }
}

/// Every message of the committed transcript.
fn control_messages() -> Vec<Vec<u8>> {
    let transcript = include_str!("../../src/wire/transcript-v1.txt");
    let hex = |line: &str| {
        let digits = line.split_whitespace().last()?;
        let even = digits.len() % 2 == 0 && digits.len() > 2 * CONTROL_HEADER_BYTES;
        even.then(|| (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect())?
    };
    transcript.lines().filter_map(hex).collect()
}

fn join(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<JOIN_BYTES>() else { return };
    if let Ok(join) = Join::decode(bytes) {
        assert_eq!(&join.encode(), bytes);
    }
}

fn joins() -> Vec<Vec<u8>> {
    vec![Join { migration: MigrationId([5; 16]), lane: LaneIndex(1), tag: [9; 32] }.encode().to_vec()]
}

fn journal_place(bytes: &[u8]) {
    let _ = Placement::read(bytes);
}

fn journal_places() -> Vec<Vec<u8>> {
    let peer = "spiffe://dc1.test/gateway/b".parse().unwrap();
    let places = [Placement::Away { peer, epoch: sealane::types::Epoch(3) }, Placement::Cold { epoch: sealane::types::Epoch(1) }];
    places.iter().map(|place| serde_json::to_vec(place).unwrap()).collect()
}

fn vm_state(bytes: &[u8]) {
    let _ = state_differences(bytes, bytes);
}

/// The header of state and the beginning of a section; whole states are only had from KVM.
fn vm_states() -> Vec<Vec<u8>> {
    let mut state = b"SEALVMST".to_vec();
    state.extend(2u16.to_le_bytes());
    state.extend(9u16.to_le_bytes());
    state.extend(512u32.to_le_bytes());
    for tag in 1..=9u16 {
        state.extend(tag.to_le_bytes());
        state.extend([0, 0]);
        state.extend(40u32.to_le_bytes());
        state.extend([0; 40]);
    }
    state.resize(512, 0);
    vec![state]
}

fn generation(bytes: &[u8]) {
    let _ = Generation::from_bytes(bytes);
}

fn generations() -> Vec<Vec<u8>> {
    vec![vec![1; 64], vec![0; 4096]]
}

fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = sealane::config::parse(text, Path::new("/nowhere/gateway.toml"));
    }
}

fn configs() -> Vec<Vec<u8>> {
    vec![include_bytes!("../../config/gateway.toml").to_vec()]
}

fn control_request(bytes: &[u8]) {
    let _ = serde_json::from_slice::<MigrateRequest>(bytes);
    let _ = serde_json::from_slice::<SetRequest>(bytes);
    let _ = serde_json::from_slice::<ResolveRequest>(bytes);
    // The other way: what a command is told by whoever has the socket.
    let _ = serde_json::from_slice::<MigrationView>(bytes);
    let _ = serde_json::from_slice::<GatewayView>(bytes);
    let _ = serde_json::from_slice::<Problem>(bytes);
}

fn control_requests() -> Vec<Vec<u8>> {
    let requests = [
        r#"{"vm":"web-1","to":"gw-b","mode":"precopy","lanes":4,"max_downtime_seconds":0.3,"dry_run":false}"#,
        r#"{"bandwidth_bytes_per_second":1000000,"max_downtime_seconds":0.5}"#,
        r#"{"choice":"reclaim","evidence":"power is off"}"#,
    ];
    requests.map(|request| request.as_bytes().to_vec()).to_vec()
}

fn policy(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let file = PolicyFile { name: "fuzz.cedar".to_owned(), text: text.to_owned() };
        let _ = PolicySet::parse(&[file], &Entities::default());
    }
}

fn policies() -> Vec<Vec<u8>> {
    let files = [
        include_str!("../../config/policy.d/10-floor.cedar"),
        include_str!("../../config/policy.d/20-tenant-acme.cedar"),
        include_str!("../../config/policy.d/30-operators.cedar"),
    ];
    files.into_iter().chain(GRAMMAR.iter().copied()).map(|text| text.as_bytes().to_vec()).collect()
}

/// Every construct that policies are made of, which the examples do not all use; and what is refused late.
const GRAMMAR: &[&str] = &[
    "@id(\"a\") permit (principal == Sealane::Gateway::\"g\", action, resource in Sealane::VmGroup::\"v\")\nwhen { if resource.migratable then \
     [1, 2, 3].containsAll([context.stream.lanes]) else !(context.memoryMiB * 2 >= -3) };",
    "@id(\"b\") forbid (principal is Sealane::Gateway in Sealane::GatewayGroup::\"g\", action in [Sealane::Action::\"release\"], resource)\n\
     unless { resource has tenant && resource.tenant like \"a*\\*\" || {x: context.route}.x.peerIp == ip(\"::1/128\") };",
    "@id(\"c\") @max_lanes(\"2\") @require_post_quantum(\"true\") @max_bandwidth(\"1Mbit/s\")\npermit (principal, action == Sealane::Action::\"accept\", \
     resource) when { context.now.offset(duration(\"-1h30m\")) < datetime(\"2026-12-01T22:00:00.000+0100\").toDate() };",
    "@id(\"d\") permit (principal, action == Sealane::Action::\"resolveInDoubt\", resource)\nwhen { context.approvers.containsAny([principal, \
     Sealane::Operator::\"\\u{e9}\\x41\\0\"]) && context.fenceEvidence && \"\" != \"\\\\\\\"\\n\" };",
    "@id(\"e\") permit (principal == ?principal, action, resource);\n@id(\"f\") permit (principal, action, resource) when { context[\"now\"] == \
     decimal(\"1.0001\") } unless { principal.site == \"x\" } when { true };\n// the end",
];

/// A gateway that trusts the fixtures.
static GATEWAY: LazyLock<(Arc<Credentials>, Vec<Vec<u8>>)> = LazyLock::new(|| {
    let (world, directory) = (World::new(), tempfile::tempdir().unwrap());
    let own = crate::fixtures::write_gateway(directory.path(), "a", &world.good_a);
    let trust = world.write_trust(directory.path()).into_iter();
    let config = IdentityConfig {
        certificate: own.certificate,
        key: own.key,
        signing_key: own.signing_key,
        trust: trust
            .map(|files| TrustDomainConfig { domain: files.domain, roots: files.roots, crls: files.crls, intermediates: None })
            .collect(),
        post_quantum: PostQuantum::Preferred,
    };
    let leaves = world.variants.iter().map(|variant| &variant.leaf).chain([&world.good_a, &world.good_b]);
    let certificates = leaves.filter_map(|leaf| leaf.chain.first()).map(|certificate| certificate.as_ref().to_vec());
    let seeds = certificates.filter(|certificate: &Vec<u8>| !certificate.is_empty()).collect();
    (Credentials::load(config).unwrap(), seeds)
});

fn certificate(bytes: &[u8]) {
    let (gateway, good) = &*GATEWAY;
    let known = good.iter().any(|certificate| certificate == bytes);
    let found = gateway.identify(&[bytes.to_vec().into()]);
    assert!(known || found.is_err(), "a certificate that nobody signed is believed");
}

/// Any bytes as the CRL of a trust domain: nobody who was revoked comes back by it.
fn crl(bytes: &[u8]) {
    let Revoker { gateway, path, revoked, .. } = &*REVOKER;
    std::fs::write(path, bytes).unwrap();
    let _ = gateway.reload();
    assert!(gateway.identify(&revoked.chain).is_err(), "a CRL that nobody signed is believed");
}

/// Good ones with few and with many entries, as DER and as PEM, and every one that is wrong in one place.
fn crls() -> Vec<Vec<u8>> {
    REVOKER.seeds.clone()
}

/// A gateway, the file of its CRL, and who is on it.
struct Revoker {
    gateway: Arc<Credentials>,
    path: std::path::PathBuf,
    revoked: crate::fixtures::Leaf,
    seeds: Vec<Vec<u8>>,
}

static REVOKER: LazyLock<Revoker> = LazyLock::new(|| {
    let (world, directory) = (World::new(), tempfile::tempdir().unwrap());
    let own = crate::fixtures::write_gateway(directory.path(), "a", &world.good_a);
    let files = world.write_trust(directory.path()).remove(0);
    let path = directory.path().join("fuzz.crl");
    let first = world.root.crl(9, 0, 30, &[&world.good_b.serial]);
    std::fs::write(&path, &first).unwrap();
    let many: Vec<Vec<u8>> = (1..20_u8).map(|serial| vec![serial; usize::from(serial)]).chain([world.good_b.serial.clone()]).collect();
    let many = world.root.crl(10, -1, 30, &many.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let partition = world.root.crl_with(11, crate::fixtures::days(0), crate::fixtures::days(30), &[], Some("http://dc1.test/crl"));
    let below = crate::fixtures::pem("X509 CRL", &world.intermediate.crl(7, 0, 30, &[&world.good_b.serial]));
    let both = crate::fixtures::pem("X509 CRL", &first) + &below;
    let mut seeds = vec![first, many, partition, both.into_bytes()];
    seeds.extend(crate::fixtures::raw::crls(&world.root, "root 1").into_iter().map(|(_, crl, _)| crl).filter(|crl| !crl.is_empty()));
    let trust = vec![TrustDomainConfig { domain: files.domain, roots: files.roots, crls: vec![path.clone()], intermediates: None }];
    let config = IdentityConfig {
        certificate: own.certificate,
        key: own.key,
        signing_key: own.signing_key,
        trust,
        post_quantum: PostQuantum::Preferred,
    };
    // Kept as long as the process lives.
    let _ = directory.keep();
    Revoker { gateway: Credentials::load(config).unwrap(), path, revoked: world.good_b, seeds }
});

fn certificates() -> Vec<Vec<u8>> {
    GATEWAY.1.clone()
}
