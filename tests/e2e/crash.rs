//! SIGKILL of gateways at random moments around the handoff: exactly one copy runs, whatever was written when.

use std::time::{Duration, Instant};

use sealane::hypervisor::RunState;

use crate::command::wait_for;
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
fn kills_of(victims: &[&[Name]], seed_of_test: u64) {
    let runs = number("SEALANE_CRASHES").unwrap_or(20) / 2;
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
        let after = Duration::from_micros(random.below(whole));
        let running = lab.start_migrate(at, &[]);
        std::thread::sleep(after);
        for role in roles {
            // A role is a name as long as the guest is on A.
            let victim = if at == A { *role } else { role.other() };
            lab.gateway_mut(victim).kill();
        }
        let copies = lab.running_copies();
        assert!(copies.len() <= 1, "run {run} of seed {seed}, {roles:?} killed after {after:?}: {copies:?}");
        for name in [A, B] {
            if !lab.gateway(name).is_up() {
                lab.gateway_mut(name).start();
            }
        }
        drop(running);
        let now = settle(&lab);
        lab.runs_only_on(now);
        moved += u64::from(now != at);
        println!("run {run}: {roles:?} of guest on {at:?} killed after {after:?}, now on {now:?}");
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
    kills_of(&[&[A], &[B]], 1);
}

#[test]
fn killing_both_gateways_at_any_moment_leaves_exactly_one_running_guest() {
    kills_of(&[&[A, B], &[B, A]], 2);
}
