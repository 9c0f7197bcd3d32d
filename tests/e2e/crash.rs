//! SIGKILL of gateways at random moments around the handoff: exactly one copy runs, whatever was written when.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sealane::hypervisor::RunState;

use crate::command::{Running, wait_for};
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup};

/// SplitMix64; the seed is printed, and given back it repeats the moments.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().unwrap())
}

/// When to kill.
#[derive(Debug)]
enum Moment {
    /// This long after the command.
    After(Duration),
    /// This long after a handoff record is in the audit log of the gateway that wrote it; longer than the steps between two.
    Record(&'static str, Duration),
}

/// Handoff records, and whether the source writes them.
const RECORDS: [(&str, bool); 6] =
    [("offer", true), ("prepared", false), ("commit", true), ("run", false), ("done", true), ("closed", false)];

impl Moment {
    fn choose(random: &mut Random, whole: u64) -> Self {
        // Every third one anywhere; the others where it matters.
        if random.below(3) == 0 {
            return Self::After(Duration::from_micros(random.below(whole)));
        }
        let (record, _) = RECORDS[usize::try_from(random.below(RECORDS.len() as u64)).unwrap()];
        Self::Record(record, Duration::from_micros(random.below(6000)))
    }

    fn wait(&self, records: &Records, running: &mut Running) {
        match self {
            Self::After(time) => std::thread::sleep(*time),
            Self::Record(record, time) => {
                while !records.have(record) && !running.has_ended() {
                    std::thread::sleep(Duration::from_micros(200));
                }
                std::thread::sleep(*time);
            }
        }
    }
}

/// Audit logs of source and destination, from where they end now.
struct Records([(PathBuf, usize); 2]);

impl Records {
    fn begin(lab: &Lab, source: Name) -> Self {
        Self([source, source.other()].map(|name| {
            let path = lab.gateway(name).directory().join("audit/audit-00000000000000000000.jsonl");
            let length = std::fs::read(&path).unwrap().len();
            (path, length)
        }))
    }

    fn have(&self, record: &str) -> bool {
        let (_, by_source) = RECORDS.iter().find(|(name, _)| *name == record).unwrap();
        let (path, begin) = &self.0[usize::from(!by_source)];
        let text = std::fs::read(path).unwrap();
        String::from_utf8_lossy(&text[*begin..]).contains(&format!("\"record\":\"{record}\""))
    }
}

/// Where the guest is once both gateways are up again and nothing is open.
#[track_caller]
fn settle(lab: &Lab) -> Name {
    wait_for("one running copy", || {
        let copies = lab.running_copies();
        assert!(copies.len() <= 1, "the guest runs in {} places: {copies:?}", copies.len());
        let [one] = copies.as_slice() else { return None };
        let (here, there) = (lab.vm(*one), lab.vm(one.other()));
        (here["state"] == "running" && there["state"] == "gone").then_some(*one)
    })
}

#[track_caller]
fn kills_of(victims: &[&[Name]], share: u64, seed_of_test: u64) {
    let runs = number("SEALANE_CRASHES").unwrap_or(20) * share / 10;
    let seed = number("SEALANE_SEED").unwrap_or(seed_of_test);
    println!("seed {seed}, {runs} runs");
    let mut random = Random(seed);
    let mut lab = Setup::new().shape(|shape| (shape.working_set, shape.dirty_rate) = ("4MiB", "8MiB/s")).start();
    let mut at = A;
    lab.runs_only_on(A);
    // How long a whole migration takes here, so that kills fall all over it.
    let start = Instant::now();
    lab.migrate(at, &[]).expect_moved();
    at = at.other();
    let whole = u64::try_from(start.elapsed().as_micros()).unwrap();
    let mut moved = 0;
    for run in 0..runs {
        let roles = victims[usize::try_from(random.below(victims.len() as u64)).unwrap()];
        let moment = Moment::choose(&mut random, whole);
        let records = Records::begin(&lab, at);
        let mut running = lab.start_migrate(at, &[]);
        moment.wait(&records, &mut running);
        for role in roles {
            // A role is a name as long as the guest is on A.
            let victim = if at == A { *role } else { role.other() };
            lab.gateway_mut(victim).kill();
        }
        let copies = lab.running_copies();
        assert!(copies.len() <= 1, "run {run} of seed {seed}, {roles:?} killed {moment:?}: {copies:?}");
        for name in [A, B] {
            if !lab.gateway(name).is_up() {
                lab.gateway_mut(name).start();
            }
        }
        drop(running);
        let now = settle(&lab);
        lab.runs_only_on(now);
        moved += u64::from(now != at);
        println!("run {run}: {roles:?} of guest on {at:?} killed {moment:?}, now on {now:?}");
        at = now;
        wait_for("twins that nobody needs to go", || {
            let states: Vec<_> = [A, B].iter().flat_map(|name| lab.vmms(*name)).map(|status| status.state).collect();
            (states == [RunState::Running]).then_some(())
        });
    }
    println!("{moved} of {runs} moved");
    lab.settled_on(at);
}

#[test]
fn killing_one_gateway_at_any_moment_leaves_exactly_one_running_guest() {
    // The fewer: a survivor notices its dead peer by QUIC's idle timeout, which takes ten seconds.
    kills_of(&[&[A], &[B]], 3, 1);
}

#[test]
fn killing_both_gateways_at_any_moment_leaves_exactly_one_running_guest() {
    kills_of(&[&[A, B], &[B, A]], 7, 2);
}
