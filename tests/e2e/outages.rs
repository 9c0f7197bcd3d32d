//! The link breaks, in any phase, for a while or for good: a migration waits and goes on from where it was.
//!
//! Each lab reaches its peer through a relay that can be cut. Tests here mostly sleep, so a test runs several labs side by side.

use std::time::Duration;

use sealane::hypervisor::RunState;
use serde_json::Value;

use crate::command::{Running, Said, wait_for};
use crate::crash::Records;
use crate::gateway::{A, B, Name};
use crate::guest;
use crate::lab::{Lab, Setup, VM};
use crate::one_copy::{OneCopy, settle};
use crate::random::{Random, number};
use crate::relay::{Conditions, Way};

/// QUIC bridges this by itself: its idle timeout is 10 s.
const SHORT: Option<Duration> = Some(Duration::from_secs(3));
/// Until both ends have lost the link.
const LONG: Option<Duration> = None;

/// How far a migration is, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// The destination has permitted the offer and builds the twin.
    Offered,
    Rounds,
    /// The guest is paused for the last round.
    Paused,
    /// The source has said FINAL.
    Final,
    /// The destination has the record, and has said PREPARED.
    Prepared,
    /// The source has the record, and has said COMMIT.
    Commit,
    /// The destination has the record, resumes the guest and says RUNNING.
    Run,
}

const MOMENTS: [Moment; 7] =
    [Moment::Offered, Moment::Rounds, Moment::Paused, Moment::Final, Moment::Prepared, Moment::Commit, Moment::Run];

impl Moment {
    /// A delay that leaves what was just said on its way when the link is cut.
    fn delay(self) -> Duration {
        Duration::from_millis(match self {
            Self::Rounds => 5,
            // It is seen in progress, which is shown every 200 ms.
            Self::Final => 300,
            _ => 100,
        })
    }
}

/// A migration that is under way.
pub struct Attempt<'a> {
    lab: &'a Lab,
    from: Name,
    records: Records,
    running: Running,
}

impl<'a> Attempt<'a> {
    pub fn start(lab: &'a Lab, from: Name, flags: &[&str]) -> Self {
        Self { lab, from, records: Records::begin(lab, from), running: lab.start_migrate(from, flags) }
    }

    /// With a limit that keeps it in rounds until [`faster`](Self::faster).
    fn start_slow(lab: &'a Lab, from: Name, bandwidth: &str, flags: &[&str]) -> Self {
        // The guest's pages would be next to nothing compressed.
        Self::start(lab, from, &[&["--compress", "none", "--bandwidth", bandwidth], flags].concat())
    }

    fn has_reached(&self, moment: Moment) -> bool {
        match moment {
            Moment::Offered => self.records.have_accepted(),
            Moment::Rounds => self.progress("wire_bytes").is_some_and(|bytes| bytes > 0),
            Moment::Paused => self.lab.vmms(self.from).iter().any(|guest| guest.state == RunState::Paused),
            Moment::Final => self.phase().is_some_and(|phase| phase == "verify"),
            Moment::Prepared => self.records.have("prepared"),
            Moment::Commit => self.records.have("commit"),
            Moment::Run => self.records.have("run"),
        }
    }

    /// Waits for the moment; false when the migration has ended before.
    fn reaches(&mut self, moment: Moment) -> bool {
        while !self.has_reached(moment) {
            if self.running.has_ended() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits for the moment, and cuts the link.
    #[track_caller]
    pub fn cut_at(&mut self, moment: Moment) {
        while !self.has_reached(moment) {
            self.running.must_go_on();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.lab.cut();
    }

    fn phase(&self) -> Option<Value> {
        Some(self.lab.active_migration(self.from)?["progress"]["phase"].clone())
    }

    /// A figure of the rounds.
    fn progress(&self, figure: &str) -> Option<u64> {
        let active = self.lab.active_migration(self.from)?;
        (active["progress"]["phase"] == "memory").then(|| active["progress"][figure].as_u64())?
    }

    /// Ends the limit.
    #[track_caller]
    fn faster(&mut self) {
        let active = loop {
            match self.lab.active_migration(self.from) {
                Some(active) => break active,
                None if self.running.has_ended() => return,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let said = self.lab.gateway(self.from).command(&["set", active["id"].as_str().unwrap(), "bandwidth=1GiB/s"]);
        assert!(said.code == 0 || self.running.has_ended(), "{said:?}");
    }

    /// The command alone, for a test that changes the lab meanwhile.
    pub fn into_command(self) -> Running {
        self.running
    }

    #[track_caller]
    fn finish(self) -> Said {
        self.running.finish()
    }
}

/// Runs cases at once, each with a lab of its own, and says which failed.
#[track_caller]
fn side_by_side<T: Sync + std::fmt::Debug>(cases: &[T], run: impl Fn(&T) + Sync) {
    let failed: Vec<_> = std::thread::scope(|scope| {
        let run = &run;
        // A thread that panics says its name.
        let start = |case| std::thread::Builder::new().name(format!("{case:?}")).spawn_scoped(scope, move || run(case)).unwrap();
        let threads: Vec<_> = cases.iter().map(|case| (case, start(case))).collect();
        threads.into_iter().filter_map(|(case, thread)| thread.join().is_err().then_some(case)).collect()
    });
    assert!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), cases.len());
}

fn delayed(delay: Duration) -> Conditions {
    Conditions { delay, ..Conditions::default() }
}

/// What was on its way may be sent again. A quarter of the guest's memory for each cut is far more than that, and far less than
/// everything.
#[track_caller]
fn resent_little(report: &Value, cuts: u64) -> u64 {
    let (resent, memory) = (report["resent_bytes"].as_u64(), report["guest_memory_bytes"].as_u64().unwrap());
    let resent = resent.unwrap_or_else(|| panic!("no `resent_bytes`: {report}"));
    assert!(resent <= cuts * memory / 4, "{resent} bytes sent again of {memory} with {cuts} cuts: {report}");
    resent
}

/// The report of a migration whose sessions ended says so, and so do both audit logs.
#[track_caller]
fn tells_of_outages(lab: &Lab, report: &Value, least: u64) {
    assert!(report["reconnects"].as_u64().is_some_and(|count| count >= least), "{least} or more `reconnects`: {report}");
    let stalled = report["stalled_seconds"].as_f64().unwrap_or_else(|| panic!("no `stalled_seconds`: {report}"));
    assert!(stalled > 0.0 && stalled <= report["duration_seconds"].as_f64().unwrap(), "{report}");
    resent_little(report, 1);
    for name in [A, B] {
        let entries = lab.gateway(name).audit();
        for event in ["link-lost", "link-resumed"] {
            let count = entries.iter().filter(|entry| entry["event"] == event && entry["migration"] == report["migration_id"]).count();
            assert!(count as u64 >= least, "{least} or more `{event}` at {name:?}: {entries:#?}");
        }
    }
}

/// One outage in one migration, and how long it lasts.
#[derive(Debug)]
struct Outage(Moment, Option<Duration>);

/// Waits until a cut has lasted.
#[track_caller]
fn outlast(lab: &Lab, length: Option<Duration>) {
    match length {
        Some(length) => std::thread::sleep(length),
        None => lab.until_lost(1),
    }
}

#[track_caller]
fn is_bridged(&Outage(moment, length): &Outage) {
    let slow = moment == Moment::Rounds;
    let setup = if slow { Setup::new().busy() } else { Setup::new() };
    let lab = setup.through_relay(delayed(moment.delay())).start();
    let copies = OneCopy::watch(&lab);
    let mut attempt = if slow { Attempt::start_slow(&lab, A, "1MiB/s", &[]) } else { Attempt::start(&lab, A, &[]) };
    attempt.cut_at(moment);
    outlast(&lab, length);
    lab.restore();
    if slow {
        attempt.faster();
    }
    let report = attempt.finish().expect_moved();
    lab.settled_on(B);
    copies.was_there();
    if length == LONG {
        tells_of_outages(&lab, &report, 1);
    }
}

#[test]
fn a_migration_waits_for_a_link_that_is_cut_in_any_phase_and_goes_on() {
    let cases = MOMENTS.map(|moment| Outage(moment, if moment == Moment::Final { SHORT } else { LONG }));
    side_by_side(&cases, is_bridged);
}

#[test]
fn a_short_cut_during_rounds_is_bridged() {
    is_bridged(&Outage(Moment::Rounds, SHORT));
}

#[test]
fn a_migration_outlives_several_outages_during_rounds() {
    let lab = Setup::new().busy().through_relay(delayed(Moment::Rounds.delay())).start();
    let copies = OneCopy::watch(&lab);
    let mut attempt = Attempt::start_slow(&lab, A, "1MiB/s", &[]);
    for times in 1..=3 {
        let before = attempt.progress("wire_bytes").unwrap_or(0);
        wait_for("pages to go over the link again", || {
            attempt.running.must_go_on();
            attempt.progress("wire_bytes").filter(|now| *now > before + (256 << 10))
        });
        lab.cut();
        lab.until_lost(times);
        lab.restore();
    }
    attempt.faster();
    let report = attempt.finish().expect_moved();
    lab.settled_on(B);
    copies.was_there();
    tells_of_outages(&lab, &report, 3);
}

#[test]
fn a_migration_outlives_that_a_nat_gives_the_source_new_ports() {
    let lab = Setup::new().busy().through_relay(delayed(Moment::Rounds.delay())).start();
    let mut attempt = Attempt::start_slow(&lab, A, "1MiB/s", &[]);
    attempt.reaches(Moment::Rounds);
    for _ in 0..3 {
        let relay = lab.relay(B);
        relay.rebind();
        let before = [Way::In, Way::Out].map(|way| relay.forwarded_bytes(way));
        wait_for("pages to go through the new ports, and answers to come back", || {
            attempt.running.must_go_on();
            let [to, back] = [Way::In, Way::Out].map(|way| relay.forwarded_bytes(way));
            (to > before[0] + (256 << 10) && back > before[1] + 1000).then_some(())
        });
    }
    attempt.faster();
    attempt.finish().expect_moved();
    lab.settled_on(B);
}

#[test]
fn a_guest_moves_over_a_slow_link_that_loses_datagrams_and_comes_back() {
    let link = Conditions { bits_per_second: Some(100_000_000), lost_per_million: 1000, ..delayed(Duration::from_millis(10)) };
    let lab = Setup::new().busy().through_relay(link).start();
    for from in [A, B] {
        lab.runs_only_on(from);
        let report = lab.migrate(from, &["--compress", "none"]).expect_moved();
        let (wire, through) = (report["wire_bytes"].as_u64().unwrap(), lab.relay(from.other()).forwarded_bytes(Way::In));
        assert!(wire > 1 << 20 && through > wire / 2, "{wire} bytes sent and {through} forwarded");
        lab.settled_on(from.other());
    }
}

/// The link is cut and stays so.
fn ends_without_a_link(&moment: &Moment) {
    // Once by flag, for one side; once by configuration, for both.
    let committed = moment == Moment::Commit;
    let setup = Setup::new().busy().through_relay(delayed(moment.delay()));
    let limit = "timeout = \"10m\"\nmax_outage = \"5s\"";
    let both = |setup: Setup| setup.replace(A, "timeout = \"10m\"", limit).replace(B, "timeout = \"10m\"", limit);
    let lab = if committed { setup } else { both(setup) }.start();
    let copies = OneCopy::watch(&lab);
    let mut attempt =
        if committed { Attempt::start(&lab, A, &["--max-outage", "5s"]) } else { Attempt::start_slow(&lab, A, "1MiB/s", &[]) };
    attempt.cut_at(moment);
    let said = attempt.finish();
    if committed {
        said.expect(6, &[VM]);
        assert_eq!(said.json()["state"], "in-doubt");
        lab.restore();
        let now = settle(&lab);
        lab.settled_on(now);
    } else {
        said.expect_stayed(1, &[VM, "5 s"]);
        // While the link is still away.
        lab.runs_only_on(A);
        wait_for("the twin to go", || lab.vmms(B).is_empty().then_some(()));
        lab.restore();
        lab.settled_on(A);
        lab.migrate(A, &[]).expect_moved();
        lab.settled_on(B);
    }
    copies.was_there();
}

#[test]
fn an_outage_that_lasts_too_long_ends_with_exactly_one_running_copy() {
    side_by_side(&[Moment::Rounds, Moment::Commit], ends_without_a_link);
}

/// A migration of memory that compresses badly and is new all the time is cut off in its first round, twice where it says so, by
/// SIGKILL of `victims`. It goes on with what the twin has.
fn goes_on_when_killed(victims: &[Name], times: u64) {
    // Three quarters of its memory are not zero, and all of that is new all the time.
    let shape = |shape: &mut guest::Shape| (shape.working_set, shape.dirty_rate) = ("24MiB", "24MiB/s");
    let mut lab = Setup::new().shape(shape).start();
    let copies = OneCopy::watch(&lab);
    wait_for("a guest that has written all of it", || lab.newest_beat(A).filter(|beat| *beat >= 30));
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway(A).command(&["set", &id, "bandwidth=8MiB/s"]).expect(0, &[]);
    let mut twins = Vec::new();
    for time in 1..=times {
        wait_for("more of the memory to be sent", || {
            let active = lab.active_migration(A)?;
            // Each gateway counts from its own start.
            let sent = active["progress"]["memory_sent_bytes"].as_u64().filter(|_| active["progress"]["phase"] == "memory")?;
            (sent >= (24 << 20) / times).then_some(())
        });
        twins.push(lab.vmm_processes(B));
        for victim in victims {
            lab.gateway_mut(*victim).kill();
        }
        for victim in victims {
            lab.gateway_mut(*victim).start();
        }
        let again = wait_for("the migration to be shown again", || lab.active_migration(A));
        assert_eq!(again["id"], id.as_str(), "after kill {time}");
    }
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    let report = running.finish().expect_moved();
    twins.push(lab.vmm_processes(B));
    assert!(twins.iter().all(|twin| *twin == twins[0] && twin.len() == 1), "the guest runs in the twin that was there: {twins:?}");
    assert!(report["reconnects"].as_u64().is_some_and(|count| count >= 1), "{report}");
    assert_eq!(report["verified"], true, "{report}");
    resent_little(&report, 1);
    lab.settled_on(B);
    copies.was_there();
}

#[test]
fn a_destination_gateway_that_is_killed_during_rounds_goes_on_with_the_memory_that_its_twin_has() {
    goes_on_when_killed(&[B], 1);
}

#[test]
fn a_source_gateway_that_is_killed_during_rounds_goes_on_where_it_was() {
    goes_on_when_killed(&[A], 2);
}

#[test]
fn both_gateways_killed_at_once_during_rounds_go_on_where_they_were() {
    goes_on_when_killed(&[A, B], 1);
}

#[test]
fn a_source_gateway_that_comes_back_to_a_new_vmm_does_not_go_on() {
    let mut lab = Setup::new().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway_mut(A).kill();
    // Another life of the same VM at the same place: its pages are not those that the twin has.
    lab.kill_vmms_of(A);
    lab.start_guest();
    lab.gateway_mut(A).start();
    running.finish().expect_stayed(1, &["interrupted"]);
    assert_eq!(lab.active_migration(A), None, "migration {id}");
    lab.runs_only_on(A);
}

#[test]
fn a_source_gateway_that_comes_back_can_be_told_to_cancel_while_it_looks_for_the_destination() {
    let mut lab = Setup::new().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway_mut(A).kill();
    lab.gateway_mut(B).kill();
    lab.gateway_mut(A).start();
    assert_eq!(wait_for("the migration to be shown again", || lab.active_migration(A))["id"], id.as_str());
    lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &["cancelled"]);
    lab.gateway_mut(B).start();
    lab.settled_on(A);
}

/// Cuts of one migration of the drill, in the order in which they are made.
fn choose_cuts(random: &mut Random, most: u64, lengths: &[Duration]) -> Vec<Outage> {
    let count = 1 + random.below(most);
    let mut cuts: Vec<_> = (0..count).map(|_| Outage(*random.pick(&MOMENTS), Some(*random.pick(lengths)))).collect();
    cuts.sort_by_key(|cut| cut.0);
    cuts
}

/// Makes the cuts, as many as the migration lives to see; how many those were.
fn make_cuts(attempt: &mut Attempt<'_>, cuts: &[Outage], random: &mut Random) -> u64 {
    let mut made = 0;
    let mut last = None;
    for Outage(moment, length) in cuts {
        if *moment > Moment::Rounds && last.is_none_or(|last| last <= Moment::Rounds) {
            attempt.faster();
        }
        if !attempt.reaches(*moment) {
            break;
        }
        if last == Some(*moment) || *moment == Moment::Rounds {
            std::thread::sleep(Duration::from_millis(200 + random.below(1300)));
        }
        attempt.lab.cut();
        outlast(attempt.lab, *length);
        attempt.lab.restore();
        (made, last) = (made + 1, Some(*moment));
    }
    attempt.faster();
    made
}

#[test]
fn outages_at_random_moments_fail_no_migration() {
    let many = number("SEALANE_OUTAGES");
    let seed = number("SEALANE_SEED").unwrap_or(4);
    let migrations = many.unwrap_or(1);
    let (most, lengths) = if many.is_some() { (10, [5, 30, 120].as_slice()) } else { (3, [1, 3].as_slice()) };
    let lengths: Vec<_> = lengths.iter().copied().map(Duration::from_secs).collect();
    println!("seed {seed}, {migrations} migrations");
    let mut random = Random(seed);
    let link = Conditions { bits_per_second: Some(100_000_000), lost_per_million: 100, seed, ..delayed(Duration::from_millis(50)) };
    let longer = |setup: Setup, name| setup.replace(name, "timeout = \"10m\"", "timeout = \"12h\"");
    let lab = longer(longer(Setup::new().busy(), A), B).through_relay(link).start();
    let copies = OneCopy::watch(&lab);
    let (mut at, mut cuts, mut resent, mut memory) = (A, 0, 0, 0);
    for run in 0..migrations {
        let chosen = choose_cuts(&mut random, most, &lengths);
        println!("migration {run} from {at:?}: {chosen:?}");
        // Longer than the pause is without the limit, shorter than with it.
        let mut attempt = Attempt::start_slow(&lab, at, "1MiB/s", &["--max-downtime", "5s"]);
        let made = make_cuts(&mut attempt, &chosen, &mut random);
        let report = attempt.finish().expect_moved();
        cuts += made;
        resent += resent_little(&report, made);
        memory += report["guest_memory_bytes"].as_u64().unwrap();
        at = at.other();
        lab.settled_on(at);
    }
    copies.was_there();
    let percent = 100.0 * resent as f64 / memory as f64;
    println!("outages: {migrations} migrations, {cuts} cuts, all complete, re-sent {resent} bytes ({percent:.1} % of the guests' memory)");
}
