//! Bytes from outside, changed at random: `harness.rs` has a function for each kind of them.
//!
//! The same functions are targets of cargo-fuzz (`tests/fuzz/fuzzer`). What it finds is kept in `corpus/TARGET/`, and tried here
//! first. `SEALANE_FUZZ=100` tries a hundred times as many changes, `SEALANE_SEED` others.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test may stop at the first surprise, and prints its counts"
)]

#[path = "../../certs/fixtures.rs"]
mod fixtures;
mod harness;
#[path = "../e2e/random.rs"]
#[allow(dead_code, reason = "it has more for others")]
mod random;

use std::fs;
use std::path::Path;

use harness::{TARGETS, Target};
use peak_alloc::PeakAlloc;
use random::{Random, number};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// What one connection may take up, whatever it sends.
const HEAP_MIB: f32 = 64.0;

/// Numbers that are at an edge of something.
const EDGES: &[u64] = &[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x1_0000_0000, u64::MAX >> 1, u64::MAX];

fn kept(target: &Target) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target.name);
    let mut files: Vec<_> = fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Changes `bytes` in one to four places.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let length = bytes.len() as u64;
        let mut place = |room: u64| usize::try_from(random.below((length + 1).saturating_sub(room).max(1))).unwrap();
        let at = place(0).min(bytes.len());
        let width = [1, 2, 4, 8][place(0) % 4].min(bytes.len() - at);
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next().to_le_bytes()[0],
            2 | 3 => {
                let edge = random.pick(EDGES).wrapping_add(random.below(3)).wrapping_sub(1).to_le_bytes();
                bytes[at..at + width].copy_from_slice(&edge[..width]);
            }
            4 => bytes.truncate(at),
            5 => bytes.extend_from_slice(&random.next().to_le_bytes()),
            6 => {
                let piece = other.get(at..).unwrap_or(other);
                let piece = &piece[..piece.len().min(64)];
                bytes.splice(at..at, piece.iter().copied());
            }
            _ => drop(bytes.drain(at..at + width)),
        }
    }
}

/// How many changes were tried, and the most memory that an input took beyond what was there.
fn attack(target: &Target) -> (u64, f32) {
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty() && seeds.iter().all(|seed| !seed.is_empty()), "{} has nothing to begin with", target.name);
    let inputs: Vec<Vec<u8>> = seeds.into_iter().chain(kept(target)).collect();
    let seed = number("SEALANE_SEED").unwrap_or(1);
    let mut random = Random(seed);
    let tries = target.share * 100 * number("SEALANE_FUZZ").unwrap_or(1);
    let mut most = 0f32;
    let mut try_one = |bytes: &[u8]| {
        let before = HEAP.current_usage_as_mb();
        HEAP.reset_peak_usage();
        (target.run)(bytes);
        most = most.max(HEAP.peak_usage_as_mb() - before);
    };
    inputs.iter().for_each(|input| try_one(input));
    for _ in 0..tries {
        let mut bytes = random.pick(&inputs).clone();
        let other = random.pick(&inputs).clone();
        mutate(&mut bytes, &other, &mut random);
        try_one(&bytes);
    }
    (tries, most)
}

/// One after the other: memory is counted for the whole process.
#[test]
fn no_bytes_from_outside_panic_or_take_more_memory_than_a_connection_may() {
    let mut all = 0;
    for target in TARGETS {
        let (tries, most) = attack(target);
        println!("fuzz: {}: {tries} changed inputs, at most {most:.2} MiB of heap", target.name);
        assert!(most <= HEAP_MIB, "{} takes {most} MiB", target.name);
        all += tries;
    }
    println!("fuzz: {} targets, {all} changed inputs, 0 failures", TARGETS.len());
}

#[test]
fn good_bytes_are_taken() {
    harness::good_lanes_are_taken();
    assert!((harness::target("control-message").seeds)().len() > 10);
}
