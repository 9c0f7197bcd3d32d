//! One run: a migration comes by a failpoint, gateways are killed there and started again, and one copy of the guest goes on.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sealane::hypervisor::RunState;

use crate::command::{Running, wait_for};
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup};
use crate::one_copy::{OneCopy, settle};
use crate::place::{Blow, Place, Role, Source, Way};
use crate::relay::Conditions;
use crate::tally::Run;

/// A point behind the end of a command is reached soon after it.
const GRACE: Duration = Duration::from_secs(4);
/// Lanes end by then; the session, which has said something later, sometimes does not.
const OUTAGE: Duration = Duration::from_secs(12);
/// What a gateway logs of a place that fails.
const FAILED: &str = "action=\"error\"";
/// How long a point may take to be reached.
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab, and where its guest is.
pub struct Scene {
    copies: OneCopy,
    lab: Lab,
    at: Name,
}

/// How a gateway is found at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Dead,
    Stopped,
    Failed,
    /// The migration ended without coming by.
    Nowhere,
}

impl Scene {
    pub fn start(durability: &str) -> Self {
        let shape = |shape: &mut crate::guest::Shape| (shape.working_set, shape.dirty_rate) = ("4MiB", "8MiB/s");
        // A twin whose source has said its last word unheard goes when that is over.
        let soon = |setup: Setup, name| setup.replace(name, "timeout = \"10m\"", "timeout = \"10m\"\nmax_outage = \"30s\"");
        let setup = soon(soon(Setup::new().shape(shape).durability(durability), A), B);
        let lab = setup.through_relay(Conditions::default()).start();
        lab.runs_only_on(A);
        let copies = OneCopy::watch(&lab);
        Self { copies, lab, at: A }
    }

    /// The ends of both gateways' logs.
    pub fn last_words(&self) -> String {
        let tail = |name| {
            let log = self.lab.gateway(name).log();
            let lines: Vec<_> = log.lines().filter(|line| !line.contains("quinn")).collect();
            format!("{name:?}:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"))
        };
        format!("{}\n{}", tail(A), tail(B))
    }

    fn name(&self, role: Role) -> Name {
        if role == Source { self.at } else { self.at.other() }
    }

    #[track_caller]
    pub fn play(&mut self, place: &Place, blow: Blow, run: &mut Run) {
        let line = format!("{}={}", place.point, action(place.point, blow));
        let reacher = self.name(place.reacher);
        let failures = self.lab.gateway(reacher).log().matches(FAILED).count();
        let mut running = self.lead(place, &line, run);
        let found = self.wait_at(reacher, blow, failures, &mut running);
        run.reached = found != Found::Nowhere;
        run.kills += u64::from(found == Found::Dead);
        for name in [A, B] {
            self.disarm(name);
        }
        self.strike(reacher, blow, found, run);
        self.lab.restore();
        let said = self.come_back(place.way, running);
        let now = self.settled();
        run.in_doubt |= said == 6;
        run.moved = now != self.at;
        self.at = now;
        self.moves_on();
    }

    /// Brings a migration to where the point is next.
    #[track_caller]
    fn lead(&mut self, place: &Place, line: &str, run: &mut Run) -> Running {
        let (source, destination) = (self.at, self.at.other());
        match place.way {
            Way::Move => {
                self.arm(self.name(place.reacher), line);
                self.lab.start_migrate(source, &[])
            }
            Way::Cancel => {
                let (running, id) = self.lab.start_slow_migration(source, &[]);
                self.arm(self.name(place.reacher), line);
                self.lab.gateway(source).command(&["cancel", &id]);
                running
            }
            Way::Outage => {
                let (running, _) = self.lab.start_slow_migration(source, &[]);
                self.arm(self.name(place.reacher), line);
                self.lab.cut();
                std::thread::sleep(OUTAGE);
                self.lab.restore();
                running
            }
            Way::OutageInPause => {
                let running = self.first(source, "source.paused=stop", Found::Stopped);
                self.lab.cut();
                std::thread::sleep(OUTAGE);
                self.arm(source, line);
                self.lab.gateway(source).signal(Signal::CONT);
                running
            }
            Way::TwinLost => {
                let running = self.first(source, "record.commit.done=kill", Found::Dead);
                self.lab.gateway_mut(destination).kill();
                self.lab.kill_vmms_of(destination);
                run.kills += 2;
                self.lab.gateway_mut(destination).start();
                self.arm(self.name(place.reacher), line);
                self.lab.gateway_mut(source).launch();
                running
            }
            Way::Restart(point) => {
                let name = self.name(place.reacher);
                let running = self.first(name, &format!("{point}=kill"), Found::Dead);
                run.kills += 1;
                self.arm(name, line);
                self.lab.gateway_mut(name).launch();
                running
            }
            Way::RestartBoth => {
                let running = self.first(source, "record.commit.done=kill", Found::Dead);
                self.lab.gateway_mut(destination).kill();
                run.kills += 2;
                self.arm(destination, line);
                self.lab.gateway_mut(destination).launch();
                self.lab.gateway_mut(source).start();
                running
            }
        }
    }

    /// Starts a migration that ends a gateway at a first point.
    #[track_caller]
    fn first(&mut self, name: Name, line: &str, expected: Found) -> Running {
        self.arm(name, line);
        let mut running = self.lab.start_migrate(self.at, &[]);
        let found = self.wait_at(name, Blow::Reacher, 0, &mut running);
        assert_eq!(found, expected, "`{line}` on the way");
        self.disarm(name);
        running
    }

    fn path(&self, name: Name) -> std::path::PathBuf {
        self.lab.gateway(name).directory().join("failpoint")
    }

    fn arm(&self, name: Name, line: &str) {
        let path = self.path(name);
        fs::write(path.with_extension("new"), line).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    fn disarm(&self, name: Name) {
        let _ = fs::remove_file(self.path(name));
    }

    /// Waits until the gateway has come to what it is armed with, or the migration has ended.
    fn wait_at(&mut self, name: Name, blow: Blow, failures: usize, running: &mut Running) -> Found {
        let (start, mut ended) = (Instant::now(), None);
        loop {
            let gateway = self.lab.gateway_mut(name);
            if gateway.has_died() {
                return Found::Dead;
            }
            if is_stopped(gateway.process_id()) {
                return Found::Stopped;
            }
            if running.has_ended() {
                ended.get_or_insert_with(Instant::now);
            }
            let late = start.elapsed() > PATIENCE;
            if late || ended.is_some_and(|at: Instant| at.elapsed() > GRACE) {
                if blow == Blow::Error && self.lab.gateway(name).log().matches(FAILED).count() > failures {
                    return Found::Failed;
                }
                if late || self.is_calm() {
                    return Found::Nowhere;
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether nothing is under way any more.
    fn is_calm(&self) -> bool {
        let idle = |name| self.lab.gateway(name).answers() && self.lab.active_migration(name).is_none();
        self.lab.running_copies().len() == 1 && [A, B].into_iter().all(idle)
    }

    /// Kills whom the blow is for, and lets the other one go on.
    fn strike(&mut self, reacher: Name, blow: Blow, found: Found, run: &mut Run) {
        let victims: &[Name] = match (blow, found) {
            (Blow::Peer, Found::Stopped) => &[reacher.other()],
            (Blow::Both, Found::Stopped) => &[reacher, reacher.other()],
            // What was not written is known to a restart alone.
            (Blow::Error, _) => &[reacher],
            _ => &[],
        };
        for name in victims {
            run.kills += u64::from(blow != Blow::Error);
            self.lab.gateway_mut(*name).kill();
        }
        if found == Found::Stopped && self.lab.gateway(reacher).is_up() {
            self.lab.gateway(reacher).signal(Signal::CONT);
        }
    }

    /// Starts whoever is down. The exit code of the command that began it.
    #[track_caller]
    fn come_back(&mut self, way: Way, running: Running) -> i32 {
        for name in [A, B] {
            if !self.lab.gateway(name).is_up() {
                self.lab.gateway_mut(name).launch();
            }
        }
        for name in [A, B] {
            wait_for("a gateway that answers", || {
                assert!(!self.lab.gateway_mut(name).has_died(), "a gateway ended");
                self.lab.gateway(name).answers().then_some(())
            });
        }
        if matches!(way, Way::Cancel | Way::Outage)
            && let Some(active) = self.lab.active_migration(self.at)
        {
            self.lab.gateway(self.at).command(&["set", active["id"].as_str().unwrap(), "bandwidth=1GiB/s"]);
        }
        running.finish().code
    }

    /// Everything that has to be so, whatever happened.
    #[track_caller]
    fn settled(&mut self) -> Name {
        let now = settle(&self.lab);
        self.lab.settled_on(now);
        wait_for("twins that nobody needs to go", || {
            let states: Vec<_> = [A, B].iter().flat_map(|name| self.lab.vmms(*name)).map(|status| status.state).collect();
            (states == [RunState::Running]).then_some(())
        });
        self.copies.is_there();
        now
    }

    /// The next migration works.
    #[track_caller]
    fn moves_on(&mut self) {
        let mut last = None;
        wait_for("a migration that works", || {
            let said = self.lab.migrate(self.at, &[]);
            let moved = said.code == 0;
            last = (!moved).then_some(said);
            // Who asks about an interrupted one has the VM until the answer.
            assert!(last.as_ref().is_none_or(|said| said.stderr.contains("moving already")), "the next migration: {last:#?}");
            moved.then_some(())
        });
        self.at = self.at.other();
        self.lab.runs_only_on(self.at);
        self.copies.is_there();
    }
}

/// What is done at a point.
fn action(point: &str, blow: Blow) -> &'static str {
    let beside = (point.starts_with("journal.") || point.starts_with("audit.")) && point.ends_with(".before");
    match blow {
        // Of two writes side by side the other one is done then.
        Blow::Reacher if beside => "late",
        Blow::Reacher => "kill",
        Blow::Peer | Blow::Both => "stop",
        Blow::Error => "error",
    }
}

/// Whether SIGSTOP has stopped it.
pub fn is_stopped(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}
