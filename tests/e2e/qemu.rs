//! An unmodified QEMU moves: real QEMUs, real gateways, and a guest that beats.
//!
//! `SEALANE_QEMU_CRASHES=100` makes the kills many, `SEALANE_SEED` repeats one, `SEALANE_QEMU_OLD=PATH` is an older QEMU to come
//! from.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sealane::hypervisor::{RunState, qemu};
use serde_json::Value;

use crate::command::wait_for;
use crate::crash::Records;
use crate::gateway::{A, B};
use crate::guest::UUID;
use crate::lab::Setup;
use crate::qemus::{LOOK, OneCopy, QEMU, Qemus, arguments, ask, processes_with, rom};
use crate::random::{Random, number};
use crate::relay::Conditions;

#[track_caller]
fn moved(report: &Value) {
    assert!(report["stream_opaque"].is_null() && report["pages"]["zero"].as_u64().unwrap() > 10_000, "{report}");
    assert_eq!((&report["hypervisor"], &report["mode"]), (&"qemu".into(), &"precopy".into()), "{report}");
    assert!(report["downtime_seconds"].as_f64().unwrap() > 0.0 && report["wire_bytes"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["guest_memory_bytes"], 64 << 20, "{report}");
}

#[test]
fn a_running_qemu_moves_there_and_back() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let plan = qemus.lab.gateway(A).command(&["plan", crate::lab::VM, "--to", "gw-b"]);
    assert_eq!(plan.json()["possible"], true, "{plan:?}");
    moved(&qemus.lab.migrate(A, &[]).expect_moved());
    qemus.is_only_at(B);
    moved(&qemus.lab.migrate(B, &["--compress", "lz4", "--lanes", "4"]).expect_moved());
    qemus.is_only_at(A);
    moved(&qemus.lab.migrate(A, &["--compress", "none", "--lanes", "1"]).expect_moved());
    qemus.is_only_at(B);
    let left: Vec<_> =
        std::fs::read_dir(qemus.lab.gateway(A).directory().join("run")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!left.iter().any(|path| path.extension().is_some_and(|ending| ending == "departure")), "{left:?}");
}

#[test]
fn a_cancelled_move_leaves_the_guest_as_it_was() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let (running, id) = qemus.slow(&[]);
    qemus.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[]);
    qemus.is_only_at(A);
    // It can be tried again.
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}

#[test]
fn cancelled_at_any_record_one_copy_runs() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    for record in ["offer", "prepared", "commit", "run"] {
        let from = qemus.at;
        let watch = OneCopy::watch(&qemus.lab);
        let records = Records::begin(&qemus.lab, from);
        let mut running = qemus.lab.start_migrate(from, &[]);
        while !records.have(record) && !running.has_ended() {
            std::thread::sleep(Duration::from_micros(200));
        }
        if let Some(active) = qemus.lab.active_migration(from) {
            // It may have ended by now, or be beyond that.
            let _ = qemus.lab.gateway(from).command(&["cancel", active["id"].as_str().unwrap()]);
        }
        drop(running.finish());
        watch.end();
        println!("cancelled behind `{record}`, from {from:?}: on {:?}", qemus.settle());
    }
}

#[test]
fn a_guest_that_cannot_be_sent_in_time_stays() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    // One that somebody has paused stays paused.
    let look = qemus.lab.gateway(A).directory().join("run/first.qmp.look");
    ask(&look, "stop", &Value::Null);
    qemus.lab.migrate(A, &[]).expect(1, &["its guest is `paused`"]);
    assert_eq!(qemus.states(A), [RunState::Paused]);
    ask(&look, "cont", &Value::Null);
    let (running, _) = qemus.slow(&["--timeout", "3s"]);
    running.finish().expect_stayed(7, &[]);
    qemus.is_only_at(A);
}

#[test]
fn policy_denies_a_qemu_at_each_question() {
    for (name, policy, code) in [(A, "release", 3), (B, "accept", 3), (A, "commit", 3), (B, "commit", 3)] {
        let Some(mut qemus) = Qemus::start(Setup::new().without_policy(name, policy)) else { return };
        qemus.lab.migrate(A, &[]).expect_stayed(code, &[]);
        qemus.is_only_at(A);
    }
}

#[test]
fn what_differs_is_said_before_anything_is_sent() {
    let other = |arguments: Vec<String>| [arguments, ["-device", "e1000", "-smp", "2"].map(str::to_owned).to_vec()].concat();
    let Some(mut qemus) = Qemus::start_with(Setup::new(), QEMU, other) else { return };
    qemus.lab.migrate(A, &[]).expect_stayed(4, &["vCPUs", "child<e1000>"]);
    qemus.is_only_at(A);
    let log = qemus.lab.gateway(A).log();
    assert!(!log.contains("hypervisor stage=Flowing"), "{log}");
}

/// Started by somebody else, and without `-S`: it waits for COMMIT all the same.
#[test]
fn a_guest_moves_into_a_qemu_that_waits_already() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let gateway = qemus.lab.gateway_mut(B);
    gateway.stop();
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    std::fs::write(gateway.config(), crate::lab::replaced(&text, "template = \"small\"", "incoming_qmp = \"run/waits.qmp\"")).unwrap();
    gateway.start();
    qemus.lab.migrate(A, &[]).expect_stayed(1, &["waits.qmp"]);
    qemus.is_only_at(A);
    let run = qemus.lab.gateway(B).directory().join("run");
    let fill = |argument: String| {
        let argument = argument.replace("{uuid}", UUID).replace("{socket}", run.join("waits.qmp").to_str().unwrap());
        argument.replace("{serial}", qemus.lab.console(B).to_str().unwrap())
    };
    let arguments = arguments(&rom().unwrap()).into_iter().map(fill).chain(["-incoming".to_owned(), "defer".to_owned()]);
    let mut waits = Command::new(QEMU).args(arguments).stdin(Stdio::null()).spawn().unwrap();
    wait_for("a QEMU that waits", || qemu::observe(&run.join("waits.qmp.look"), "waits", LOOK).ok());
    moved(&qemus.lab.migrate(A, &[]).expect_moved());
    qemus.is_only_at(B);
    waits.kill().unwrap();
    waits.wait().unwrap();
}

/// `SEALANE_QEMU_OLD` is an older QEMU than the one on the `PATH`.
#[test]
fn a_guest_of_an_older_qemu_moves_to_a_newer_one_and_not_back() {
    let Ok(old) = std::env::var("SEALANE_QEMU_OLD") else { return println!("SKIPPED: SEALANE_QEMU_OLD names no older QEMU") };
    let Some(mut qemus) = Qemus::start_with(Setup::new(), &old, |arguments| arguments) else { return };
    moved(&qemus.lab.migrate(A, &[]).expect_moved());
    qemus.is_only_at(B);
    qemus.lab.migrate(B, &[]).expect_stayed(4, &["QEMU: expected", "or later, got 7.2"]);
    qemus.is_only_at(B);
}

#[test]
fn the_demo_moves_linux() {
    let directory = tempfile::tempdir().unwrap();
    let said = crate::command::run(directory.path(), &["demo", "--hypervisor", "qemu", "--memory", "128MiB", "--vcpus", "1", "--json"]);
    if said.code == 1 && said.stderr.contains("missing") {
        return println!("SKIPPED: {}", said.stderr.trim());
    }
    let report = said.expect_moved();
    assert_eq!(report["heartbeat"]["unbroken"], true, "{report}");
    assert_eq!((&report["guest"]["ok"], &report["hypervisor"]), (&true.into(), &"qemu".into()), "{report}");
}

#[test]
fn what_is_not_built_for_a_stream_is_refused() {
    let Some(mut qemus) = Qemus::start(Setup::new().durability("dest")) else { return };
    qemus.lab.migrate(A, &[]).expect_stayed(2, &["not built"]);
    qemus.is_only_at(A);
}

#[test]
fn an_outage_in_the_stream_is_waited_out() {
    for pause in [Duration::from_secs(3), Duration::from_secs(14)] {
        let Some(mut qemus) = Qemus::start(Setup::new().through_relay(Conditions::default())) else { return };
        let (mut running, id) = qemus.slow(&[]);
        std::thread::sleep(Duration::from_millis(500));
        qemus.lab.cut();
        std::thread::sleep(pause);
        running.must_go_on();
        qemus.lab.restore();
        qemus.lab.gateway(A).command(&["set", &id, "bandwidth=100MiB/s"]).expect(0, &[]);
        running.finish().expect_moved();
        qemus.is_only_at(B);
    }
}

#[test]
fn an_outage_around_the_switch_is_waited_out() {
    for record in ["prepared", "commit", "run"] {
        let Some(mut qemus) = Qemus::start(Setup::new().through_relay(Conditions::default())) else { return };
        let records = Records::begin(&qemus.lab, A);
        let mut running = qemus.lab.start_migrate(A, &[]);
        while !records.have(record) && !running.has_ended() {
            std::thread::sleep(Duration::from_micros(200));
        }
        qemus.lab.cut();
        std::thread::sleep(Duration::from_secs(14));
        qemus.lab.restore();
        drop(running.finish());
        assert_eq!(qemus.settle(), B, "cut behind `{record}`");
    }
}

#[test]
fn a_qemu_that_dies_takes_only_its_own_end_along() {
    // The destination's: the guest stays.
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let (running, _) = qemus.slow(&[]);
    for monitor in qemus.monitors(B) {
        let twin = monitor.with_extension("");
        let pid = wait_for("the twin's process", || processes_with(&twin).into_iter().next());
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    running.finish().expect_stayed(1, &[]);
    qemus.is_only_at(A);
    // The source's: nothing is left to run, and no twin pretends to.
    let (running, _) = qemus.slow(&[]);
    qemus.first.kill().unwrap();
    qemus.first.wait().unwrap();
    let said = running.finish();
    said.expect(6, &["no copy of the guest is known to run"]);
    assert_eq!(said.json()["running_on"], "neither-yet", "{said:?}");
    wait_for("no twin", || qemus.states(B).is_empty().then_some(()));
}

/// A disk, a socket or a busy host may keep a QEMU from answering for longer than its gateway waits: that ends the attempt, and no guest.
#[test]
fn a_qemu_that_is_silent_for_a_while_keeps_its_guest() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let (running, _) = qemus.slow(&[]);
    let pid = rustix::process::Pid::from_child(&qemus.first);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    // Its gateway asks once a second, and waits 10 s.
    std::thread::sleep(Duration::from_secs(13));
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    running.finish().expect_stayed(1, &[]);
    qemus.stays("silent for a while");
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}

/// Every moment of it is in `tests/crash_points/qemu.rs`.
#[test]
fn a_twin_that_dies_behind_its_promise_gives_the_guest_back() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let records = Records::begin(&qemus.lab, A);
    let mut running = qemus.lab.start_migrate(A, &[]);
    let twin = wait_for("the twin's process", || {
        running.must_go_on();
        qemus.monitors(B).iter().flat_map(|monitor| processes_with(monitor)).next()
    });
    while !records.have("prepared") && !running.has_ended() {
        std::thread::sleep(Duration::from_micros(100));
    }
    rustix::process::kill_process(twin, rustix::process::Signal::KILL).unwrap();
    let said = running.finish();
    if records.have("run") {
        // Its only copy was killed.
        wait_for("no QEMU that runs", || qemus.states(B).is_empty().then_some(()));
        return println!("killed behind RUN");
    }
    said.expect_stayed(1, &[]);
    qemus.is_only_at(A);
    println!("killed in front of RUN: {}", said.stderr.trim());
}

/// SIGKILL of either gateway, or both, anywhere: one copy runs, at any time and in the end, and misses no beat.
#[test]
fn gateways_killed_at_random_never_run_a_qemu_twice() {
    const RECORDS: [&str; 6] = ["offer", "prepared", "commit", "run", "done", "closed"];
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let seed = number("SEALANE_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("SEALANE_SEED={seed}");
    let mut random = Random(seed);
    let (mut moved, mut stayed) = (0, 0);
    let runs = number("SEALANE_QEMU_CRASHES").unwrap_or(6);
    for run in 0..runs {
        let from = qemus.at;
        let watch = OneCopy::watch(&qemus.lab);
        let records = Records::begin(&qemus.lab, from);
        let mut running = qemus.lab.start_migrate(from, &[]);
        let record = *random.pick(&RECORDS);
        let began = Instant::now();
        while !records.have(record) && !running.has_ended() && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_micros(200));
        }
        // Behind the offer a stream takes a second; the others are close together.
        let more = if record == "offer" { 1_500_000 } else { 20_000 };
        std::thread::sleep(Duration::from_micros(random.below(more)));
        let victims = *random.pick(&[&[A][..], &[B][..], &[A, B][..]]);
        for name in victims {
            qemus.lab.gateway_mut(*name).kill();
        }
        println!("run {run}: from {from:?}, behind `{record}`, killed {victims:?}");
        for name in victims {
            qemus.lab.gateway_mut(*name).start();
        }
        drop(running);
        watch.end();
        if qemus.settle() == from { stayed += 1 } else { moved += 1 }
    }
    println!("QEMU and killed gateways: {runs} runs, moved {moved}, stayed {stayed}, violations 0");
}
