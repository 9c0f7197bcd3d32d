//! SIGKILL of either QEMU and of either gateway, and a cancel, at each phase of a QEMU's move with its disk.
//!
//! A gateway stops itself at a failpoint, something is killed, and it goes on. `SEALANE_POINTS` and `SEALANE_BLOWS` (parts of names)
//! choose.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::{Signal, kill_process};
use sealane::hypervisor::RunState;
use serde_json::{Value, json};

use crate::command::{Running, Said, wait_for};
use crate::disks::{Disks, MIB, Plan};
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup};
use crate::place::Role::{self, Destination, Source};
use crate::qemus::{OneCopy, ask, monitors, processes_with};
use crate::run::is_stopped;

/// In the order in which a move comes by.
const PHASES: [(&str, Role); 19] = [
    ("destination.accept.after", Destination),
    ("source.lanes-open", Source),
    ("source.disks-mirrored", Source),
    ("source.paused", Source),
    ("source.disks-settled", Source),
    ("destination.disks-closed", Destination),
    ("send.FINAL.after", Source),
    ("destination.compare", Destination),
    ("destination.state-restored", Destination),
    ("record.prepared.done", Destination),
    ("send.PREPARED.after", Destination),
    ("source.policy-asked", Source),
    ("record.commit.done", Source),
    ("send.COMMIT.after", Source),
    ("record.run.done", Destination),
    ("destination.resume.after", Destination),
    ("send.RUNNING.before", Destination),
    ("record.done.begin", Source),
    ("source.destroy", Source),
];

/// What a gateway that was killed leaves of an attempt is given up soon.
pub fn impatient() -> Setup {
    let soon = |setup: Setup, name| setup.replace(name, "timeout = \"10m\"", "timeout = \"10m\"\nmax_outage = \"30s\"");
    soon(soon(Setup::new(), A), B)
}

/// What happens at a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    SourceQemu,
    DestinationQemu,
    SourceGateway,
    DestinationGateway,
    Cancel,
}

/// Where the guest has to be afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// At one of the two.
    Somewhere,
    There(Role),
    /// The only QEMU that had it is the one that was killed.
    Nowhere,
    /// There, unless the one that was killed was quicker to have the only copy.
    ThereOrNowhere(Role),
}

fn position(point: &str) -> usize {
    PHASES.iter().position(|(name, _)| *name == point).unwrap()
}

fn wanted(point: &str, blow: Blow) -> Wanted {
    let at = position(point);
    match blow {
        Blow::SourceGateway | Blow::DestinationGateway | Blow::Cancel => Wanted::Somewhere,
        // Behind FINAL the destination has all of it, and what the source has is only a copy.
        Blow::SourceQemu if at >= position("send.FINAL.after") => Wanted::There(Destination),
        // Whoever stands still there, the source goes on to its end meanwhile.
        Blow::SourceQemu if at == position("destination.disks-closed") => Wanted::ThereOrNowhere(Destination),
        Blow::SourceQemu => Wanted::Nowhere,
        Blow::DestinationQemu if at < position("send.COMMIT.after") => Wanted::There(Source),
        Blow::DestinationQemu if at == position("send.COMMIT.after") => Wanted::ThereOrNowhere(Source),
        Blow::DestinationQemu => Wanted::Nowhere,
    }
}

/// A move at whose `point` the gateway `reacher` stops itself, something is struck, and everything goes on; what its command said.
#[track_caller]
pub fn struck(lab: &mut Lab, from: Name, (point, role): (&str, Role), flags: &[&str], blow: Blow) -> Said {
    let reacher = if role == Source { from } else { from.other() };
    let armed = lab.gateway(reacher).directory().join("failpoint");
    fs::write(&armed, format!("{point}=stop")).unwrap();
    let mut running = lab.start_migrate(from, flags);
    let process = lab.gateway(reacher).process_id();
    wait_for(&format!("`{point}` to be reached"), || {
        let stopped = is_stopped(process);
        // What comes last may come behind the end of the command.
        assert!(stopped || !running.has_ended() || lab.active_migration(from).is_some(), "`{point}` is not reached");
        stopped.then_some(())
    });
    fs::remove_file(&armed).unwrap();
    let cancel = strike(lab, from, blow);
    if lab.gateway(reacher).is_up() {
        lab.gateway(reacher).signal(Signal::CONT);
    }
    drop(cancel.map(Running::finish));
    for name in [A, B] {
        if !lab.gateway(name).is_up() {
            lab.gateway_mut(name).start();
        }
    }
    running.finish()
}

/// What is under way then is the answer's command.
fn strike(lab: &mut Lab, source: Name, blow: Blow) -> Option<Running> {
    match blow {
        Blow::SourceQemu => kill_qemu(lab, source),
        Blow::DestinationQemu => kill_qemu(lab, source.other()),
        Blow::SourceGateway => lab.gateway_mut(source).kill(),
        Blow::DestinationGateway => lab.gateway_mut(source.other()).kill(),
        Blow::Cancel => {
            let run = fs::read_dir(lab.gateway(source).directory().join("run")).unwrap();
            let names: Vec<_> = run.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            let id = names.iter().find_map(|name| name.strip_suffix(".departure")).expect("a note of what is offered");
            return Some(lab.gateway(source).start_command(&["cancel", id]));
        }
    }
    None
}

fn kill_qemu(lab: &Lab, name: Name) {
    for monitor in monitors(lab.gateway(name).directory()) {
        for pid in processes_with(&monitor) {
            kill_process(pid, Signal::KILL).unwrap();
        }
    }
}

struct Scene(Disks);

impl Scene {
    fn start() -> Option<Self> {
        let plan = Plan { filled: MIB, ..Plan::small("qcow2", "raw") };
        Disks::start(impatient(), plan).map(Self)
    }

    /// Whether the guest is somewhere still.
    #[track_caller]
    fn play(&mut self, point: &str, reacher: Role, blow: Blow, channels: &str) -> bool {
        let from = self.0.at;
        let copies = OneCopy::watch(&self.0.lab);
        let said = struck(&mut self.0.lab, from, (point, reacher), &["--storage", "all", "--channels", channels], blow);
        // The first QEMU is a child of this process.
        let _ = self.0.first.try_wait();
        let there = self.look(wanted(point, blow), from, &said);
        copies.end();
        there
    }

    #[track_caller]
    fn look(&mut self, wanted: Wanted, from: Name, said: &Said) -> bool {
        let to = from.other();
        match wanted {
            Wanted::Somewhere => self.settle(),
            Wanted::There(Source) => self.0.is_only_at(from),
            Wanted::There(Destination) => self.0.is_only_at(to),
            Wanted::Nowhere => return self.is_nowhere(said),
            Wanted::ThereOrNowhere(role) => {
                let running = wait_for("the guest, or the end of it", || {
                    let _ = self.0.first.try_wait();
                    let states = [A, B].map(|name| self.0.states(name));
                    let over = self.0.lab.active_migration(from).is_none();
                    (over && states.concat().iter().all(|state| *state == RunState::Running)).then(|| states.concat().len())
                });
                if running == 0 {
                    return false;
                }
                self.0.is_only_at(if role == Source { from } else { to });
            }
        }
        is_as_it_was(&self.0.lab, self.0.at, &["pause-before-switchover", "multifd"]);
        true
    }

    /// Where it runs once nothing is open.
    #[track_caller]
    fn settle(&mut self) {
        let name = wait_for("one running copy", || {
            let running = [A, B].map(|name| self.0.states(name).contains(&RunState::Running));
            let name = match running {
                [true, false] => A,
                [false, true] => B,
                [false, false] => return None,
                [true, true] => panic!("it runs twice"),
            };
            let (here, there) = (self.0.lab.vm(name), self.0.lab.vm(name.other()));
            (here["state"] == "running" && there["state"] == "gone").then_some(name)
        });
        self.0.is_only_at(name);
    }

    /// No QEMU is left, and nobody says that one is.
    #[track_caller]
    fn is_nowhere(&mut self, said: &Said) -> bool {
        wait_for("no QEMU", || {
            let _ = self.0.first.try_wait();
            [A, B].iter().all(|name| self.0.states(*name).is_empty()).then_some(())
        });
        // Where RUN was said the guest has moved, and was killed there.
        let report = said.json();
        assert!(report["running_on"] != "source", "{report}");
        false
    }
}

/// None of these capabilities, and nothing of ours, is at the guest's QEMU, and nothing of the other one is left.
#[track_caller]
pub fn is_as_it_was(lab: &Lab, at: Name, capabilities: &[&str]) {
    let monitor = monitors(lab.gateway(at).directory()).into_iter().find(|path| !processes_with(path).is_empty()).unwrap();
    wait_for("a QEMU as it was", || {
        let set = ask(&monitor, "query-migrate-capabilities", &Value::Null);
        let mut ours = capabilities.iter().map(|name| json!({ "capability": name, "state": true }));
        let left = ours.any(|ours| set.as_array().unwrap().contains(&ours));
        let jobs = [ask(&monitor, "query-jobs", &Value::Null), ask(&monitor, "query-block-exports", &Value::Null)];
        (!left && jobs == [json!([]), json!([])]).then_some(())
    });
    wait_for("one QEMU", || (processes_with(lab.directory()).len() == 1 + 2).then_some(()));
}

#[test]
fn a_qemu_or_a_gateway_killed_at_any_phase_leaves_one_copy_or_says_that_none_is_left() {
    play_all("1");
}

#[test]
fn on_four_channels_a_qemu_or_a_gateway_killed_at_any_phase_leaves_one_copy_or_says_that_none_is_left() {
    play_all("4");
}

/// With every point and blow that was chosen, on so many channels.
fn play_all(channels: &str) {
    let chosen = |variable: &str| std::env::var(variable).unwrap_or_default();
    let (points, blows) = (chosen("SEALANE_POINTS"), chosen("SEALANE_BLOWS"));
    let has = |wanted: &str, name: &str| wanted.split(',').any(|part| name.contains(part));
    let (mut scene, mut runs, mut lost, mut violations) = (None, 0, 0, Vec::new());
    for (point, reacher) in PHASES.into_iter().filter(|(point, _)| has(&points, point)) {
        for blow in [Blow::SourceGateway, Blow::DestinationGateway, Blow::Cancel, Blow::DestinationQemu, Blow::SourceQemu] {
            if !has(&blows, &format!("{blow:?}")) {
                continue;
            }
            if scene.is_none() {
                scene = Scene::start();
            }
            let Some(playing) = &mut scene else { return };
            runs += 1;
            let from = playing.0.at;
            match catch_unwind(AssertUnwindSafe(|| playing.play(point, reacher, blow, channels))) {
                Ok(true) => println!("{point}, {blow:?}: from {from:?}, on {:?}", playing.0.at),
                Ok(false) => {
                    println!("{point}, {blow:?}: from {from:?}, nowhere");
                    (scene, lost) = (None, lost + 1);
                }
                Err(panic) => {
                    let why = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                    for name in [A, B] {
                        let log = playing.0.lab.gateway(name).log();
                        let lines: Vec<_> = log.lines().filter(|line| !line.contains("quinn")).collect();
                        println!("--- {name:?}\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
                    }
                    violations.push(format!("{point}, {blow:?}: from {from:?}: {}", why.unwrap_or("a panic without words")));
                    scene = None;
                }
            }
        }
    }
    if let Some(Scene(disks)) = scene {
        disks.disk_is_whole();
    }
    println!("QEMU killed at each phase, channels {channels}: {runs} runs, its only copy killed {lost}, violations {}", violations.len());
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}
