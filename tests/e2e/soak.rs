//! One live guest moves back and forth for hours, or its gateways change their certificates and CRLs a thousand times while it moves:
//! nothing piles up in the gateways.

use std::fs;
use std::time::Duration;

use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup};
use crate::one_copy::OneCopy;
use crate::random::number;

/// A session's last words, its close and its lanes' threads take at most that long.
const ENDS_WITHIN: Duration = Duration::from_secs(4);
/// Open files and threads that may come and go: a VMM's pipe, a blocking task's thread that the runtime keeps for a while.
const SLACK: u64 = 8;
/// What may be added after the warm-up. The history and the places in memory have bounds that are reached by then; an
/// allocator that several threads use keeps more than it needs, and its arenas fill for a while.
const GROWTH_KIB: i64 = 16 << 10;

/// What a gateway holds at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub rss_kib: u64,
    /// Of it what is the gateway's own, without guests' memory.
    pub own_kib: u64,
    files: u64,
    threads: u64,
}

impl Sample {
    #[track_caller]
    pub fn of(lab: &Lab, name: Name) -> Self {
        let process = format!("/proc/{}", lab.gateway(name).process_id());
        let status = fs::read_to_string(format!("{process}/status")).unwrap();
        let figure = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        let files = fs::read_dir(format!("{process}/fd")).unwrap().count() as u64;
        Self { rss_kib: figure("VmRSS:"), own_kib: figure("RssAnon:"), files, threads: figure("Threads:") }
    }
}

/// The largest less the smallest.
fn spread(figures: impl Iterator<Item = u64> + Clone) -> u64 {
    figures.clone().max().unwrap() - figures.min().unwrap()
}

/// What was held after each so many moves, at both gateways.
struct Held(Vec<(u64, [Sample; 2])>);

impl Held {
    fn take(&mut self, lab: &Lab, moves: u64) {
        std::thread::sleep(ENDS_WITHIN);
        let samples = [A, B].map(|name| Sample::of(lab, name));
        let [a, b] = samples.map(|s| format!("{:>8} KiB {:>4} files {:>4} threads", s.rss_kib, s.files, s.threads));
        println!("{moves:>6} moves  gw-a {a}   gw-b {b}");
        self.0.push((moves, samples));
    }

    /// What the last third of the moves holds on average beyond the first: what an allocator keeps for later goes up and down by
    /// more from one moment to the next than a leak of a thousand moves.
    fn growth_kib(&self, name: Name) -> i64 {
        let third = self.0.len().div_ceil(3);
        let mean = |samples: &[(u64, [Sample; 2])]| {
            let sum: u64 = samples.iter().map(|(_, samples)| samples[name as usize].rss_kib).sum();
            (sum / samples.len() as u64) as i64
        };
        mean(&self.0[self.0.len() - third..]) - mean(&self.0[..third])
    }

    /// The first one was taken when the warm-up had ended.
    #[track_caller]
    fn is_flat(&self) {
        // Buffers and the allocator's arenas fill for some 20 moves; a short run has only files and threads to show.
        let warm = self.0[0].0 >= 20;
        for name in [A, B] {
            let of = self.0.iter().map(|(_, samples)| samples[name as usize]);
            let (files, threads) = (spread(of.clone().map(|s| s.files)), spread(of.clone().map(|s| s.threads)));
            assert!(files <= SLACK, "open files of {name:?} vary by {files}");
            assert!(threads <= SLACK, "threads of {name:?} vary by {threads}");
            let growth = self.growth_kib(name);
            assert!(!warm || growth <= GROWTH_KIB, "{name:?} grew by {growth} KiB behind the warm-up");
        }
    }
}

#[test]
fn a_guest_that_moves_back_and_forth_for_long_leaves_nothing_behind() {
    let moves = number("SEALANE_SOAK").unwrap_or(12);
    let (warm_up, every) = if moves > 200 { (100, 50) } else { (moves / 3, (moves / 3).max(1)) };
    let lab = Setup::new().busy().shape(|shape| shape.vcpus = 2).start();
    let copies = OneCopy::watch(&lab);
    lab.runs_only_on(A);
    let (mut at, mut held) = (A, Held(Vec::new()));
    for done in 1..=moves {
        lab.migrate(at, &[]).expect_moved();
        at = at.other();
        lab.runs_only_on(at);
        if done >= warm_up && (done - warm_up) % every == 0 {
            held.take(&lab, done);
        }
    }
    lab.settled_on(at);
    copies.was_there();
    held.is_flat();
    let grown = [A, B].map(|name| held.growth_kib(name));
    println!("soak: {moves} moves, all verified, heartbeat unbroken, behind {warm_up} moves: RSS {grown:?} KiB, files and threads flat");
}

/// Certificates, keys and CRLs of both gateways are replaced again and again while one guest moves: the migration keeps its session, and
/// new sessions are taken all the time.
#[test]
fn a_thousand_certificates_and_crls_change_under_one_migration() {
    let rotations = number("SEALANE_ROTATIONS").unwrap_or(25);
    let by_hand = |setup: Setup, name| setup.replace(name, "[gateway]", "[gateway]\nwatch_files = false");
    let lab = by_hand(by_hand(Setup::new().busy(), A), B).start();
    let (mut running, id) = lab.start_slow_migration(A, &[]);
    let pki = lab.pki();
    let clients = [A, B].map(|name| sealane::control::Client::new(lab.gateway(name).directory().join("run/api.sock")));
    let runtime = crate::stranger::runtime();
    let set_bandwidth = |bytes_per_second: u64| {
        let wish = serde_json::from_value(serde_json::json!({ "bandwidth_bytes_per_second": bytes_per_second })).unwrap();
        runtime.block_on(clients[0].set(id.parse().unwrap(), &wish)).unwrap();
    };
    // So slow that it is under way after a thousand, too.
    set_bandwidth(100_000);
    let mut held = Held(Vec::new());
    let every = (rotations / 5).max(1);
    for done in 1..=rotations {
        for name in [A, B] {
            sealane::identity::authority::renew(&pki, name.gateway()).unwrap();
        }
        sealane::identity::authority::refresh_crl(&pki).unwrap();
        for client in &clients {
            runtime.block_on(client.reload()).unwrap();
        }
        if done % every == 0 {
            // A session of its own, with what was just issued.
            lab.gateway(A).command(&["plan", crate::lab::VM, "--to", "gw-b"]);
            let samples = [A, B].map(|name| Sample::of(&lab, name));
            println!("{done:>6} rotations  {samples:?}");
            held.0.push((done, samples));
        }
    }
    running.must_go_on();
    held.is_flat();
    set_bandwidth(1_000_000_000);
    let report = running.finish().expect_moved();
    assert_eq!(report["reconnects"], 0, "{report}");
    lab.settled_on(B);
    for name in [A, B] {
        let log = lab.gateway(name).audit();
        let loaded = log.iter().filter(|entry| entry["event"] == "policy-loaded").count() as u64;
        assert_eq!(loaded, rotations, "{name:?}");
        assert!(log.iter().all(|entry| entry["event"] != "session-refused" && entry["event"] != "link-lost"), "{log:#?}");
    }
}
