//! SIGKILL of gateways at random moments around the handoff: exactly one copy runs, whatever was written when.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sealane::hypervisor::{Generation, RunState};

use crate::command::{Running, wait_for};
use crate::gateway::{A, B, Name};
use crate::guest::Shape;
use crate::lab::{Lab, Setup};
use crate::one_copy::{OneCopy, settle};
use crate::random::{Random, durabilities, number};

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
        let (record, _) = random.pick(&RECORDS);
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
pub struct Records([(PathBuf, usize); 2]);

impl Records {
    pub fn begin(lab: &Lab, source: Name) -> Self {
        Self([source, source.other()].map(|name| {
            let path = lab.gateway(name).directory().join("audit/audit-00000000000000000000.jsonl");
            let length = std::fs::read(&path).unwrap().len();
            (path, length)
        }))
    }

    pub fn have(&self, record: &str) -> bool {
        let (_, by_source) = RECORDS.iter().find(|(name, _)| *name == record).unwrap();
        self.side_has(*by_source, &format!("\"record\":\"{record}\""))
    }

    /// Whether the destination has permitted the offer.
    pub fn have_accepted(&self) -> bool {
        self.side_has(false, "\"action\":\"accept\"")
    }

    fn side_has(&self, source: bool, words: &str) -> bool {
        let (path, begin) = &self.0[usize::from(!source)];
        let text = std::fs::read(path).unwrap();
        String::from_utf8_lossy(&text[*begin..]).contains(words)
    }
}

#[track_caller]
fn kills_of(victims: &[&[Name]], share: u64, seed_of_test: u64) {
    let runs = number("SEALANE_CRASHES").unwrap_or(20) * share / 10;
    let seed = number("SEALANE_SEED").unwrap_or(seed_of_test);
    for durability in durabilities() {
        kills_with(&durability, victims, runs, seed);
    }
}

#[track_caller]
fn kills_with(durability: &str, victims: &[&[Name]], runs: u64, seed: u64) {
    println!("durability {durability}, seed {seed}, {runs} runs");
    let mut random = Random(seed);
    let shape = |shape: &mut Shape| (shape.working_set, shape.dirty_rate) = ("4MiB", "8MiB/s");
    let mut lab = Setup::new().shape(shape).durability(durability).start();
    let mut copies = OneCopy::watch(&lab);
    let mut at = A;
    lab.runs_only_on(A);
    let first = lab.generation(A);
    // How long a whole migration takes here, so that kills fall all over it.
    let start = Instant::now();
    lab.migrate(at, &[]).expect_moved();
    at = at.other();
    let whole = u64::try_from(start.elapsed().as_micros()).unwrap();
    let (mut moved, mut kills, mut in_doubt) = (0, 0, 0);
    for run in 0..runs {
        let roles = *random.pick(victims);
        let moment = Moment::choose(&mut random, whole);
        let records = Records::begin(&lab, at);
        let mut running = lab.start_migrate(at, &[]);
        moment.wait(&records, &mut running);
        for role in roles {
            // A role is a name as long as the guest is on A.
            let victim = if at == A { *role } else { role.other() };
            lab.gateway_mut(victim).kill();
            kills += 1;
        }
        let running_now = lab.running_copies();
        assert!(running_now.len() <= 1, "run {run} of seed {seed}, {roles:?} killed {moment:?}: {running_now:?}");
        for name in [A, B] {
            if !lab.gateway(name).is_up() {
                lab.gateway_mut(name).start();
            }
        }
        let now = settle(&lab);
        lab.runs_only_on(now);
        in_doubt += u64::from(running.finish().code == 6);
        moved += u64::from(now != at);
        println!("run {run}: {roles:?} of guest on {at:?} killed {moment:?}, now on {now:?}");
        at = now;
        wait_for("twins that nobody needs to go", || {
            let states: Vec<_> = [A, B].iter().flat_map(|name| lab.vmms(*name)).map(|status| status.state).collect();
            (states == [RunState::Running]).then_some(())
        });
        copies.is_there();
    }
    let last = lab.generation(at);
    assert_eq!(last.disruptions, 1 + moved, "each move counts once, whoever crashed");
    if durability == "none" {
        // Where images are made, paused memory that a restart finds may be from one, and is a new generation.
        assert_eq!(last, Generation { disruptions: last.disruptions, ..first });
    }
    lab.settled_on(at);
    lab.migrate(at, &[]).expect_moved();
    lab.settled_on(at.other());
    copies.was_there();
    println!(
        "random kills, durability {durability}: {runs} runs, {kills} kills, moved {moved}, stayed {}, in doubt {in_doubt}, violations 0",
        runs - moved
    );
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
