//! A QEMU's guest that runs at the destination before all of its pages are there (post-copy).

use std::time::Duration;

use serde_json::Value;

use crate::command::{Running, Said, wait_for};
use crate::crash::Records;
use crate::gateway::{A, B};
use crate::lab::{Lab, Setup};
use crate::qemus::{OneCopy, QEMU, Qemus, processes_with};
use crate::relay::Conditions;

/// Slower than the guest writes.
const SLOW: [&str; 4] = ["--compress", "none", "--bandwidth", "2MiB/s"];
/// Slow enough for what it lacks to be a while on its way.
const SLOWER: [&str; 4] = ["--compress", "none", "--bandwidth", "1MiB/s"];
const SPLIT: [&str; 2] = ["--mode", "postcopy"];

fn start(setup: Setup) -> Option<Qemus> {
    Qemus::start(setup)
}

/// QEMU opens its channel for pages that are waited for at the split, and not with its main one, for machine types that are newer than
/// those of these tests.
fn start_newer(setup: Setup) -> Option<Qemus> {
    let newer =
        |arguments: Vec<String>| arguments.into_iter().map(|argument| argument.replace("pc-i440fx-7.2", "pc-i440fx-10.0")).collect();
    Qemus::start_as(setup, [QEMU, QEMU], newer, |arguments| arguments)
}

/// What the guest waited for came beside its stream.
#[track_caller]
fn overtook(qemus: &Qemus) {
    let log = qemus.lab.gateway(A).log();
    assert!(log.contains("overtake its stream") && log.contains("channel=true"), "{log}");
}

/// The guest runs there and lacks pages.
#[track_caller]
fn until_split(qemus: &Qemus, running: &mut Running) {
    wait_for("a guest that lacks pages", || {
        running.must_go_on();
        let active = qemus.lab.active_migration(qemus.at)?;
        (active["progress"]["phase"] == "post-copy").then_some(())
    });
}

/// Not verified: what came behind the split is not compared.
#[track_caller]
fn moved(said: &Said) -> Value {
    said.expect(0, &[]);
    let report = said.json();
    assert_eq!((&report["state"], &report["running_on"]), (&"completed".into(), &"destination".into()), "{report}");
    report
}

#[track_caller]
fn was_split(report: &Value, mode: &str) {
    assert_eq!((&report["mode"], &report["verified"]), (&mode.into(), &false.into()), "{report}");
    let (faults, seconds) = (report["post_copy"]["faults"].as_u64().unwrap(), report["post_copy"]["seconds"].as_f64().unwrap());
    // Far below what the pages took.
    let pause = report["downtime_seconds"].as_f64().unwrap();
    assert!(faults > 0 && seconds > pause, "{report}");
    println!("{mode}: pause {pause} s, {seconds} s behind it, {faults} faults, {} rounds", report["rounds"]);
}

#[test]
fn hybrid_splits_only_a_guest_that_does_not_get_there() {
    let Some(mut qemus) = start(Setup::new()) else { return };
    let report = qemus.lab.migrate(A, &["--mode", "hybrid", "--max-downtime", "2s"]).expect_moved();
    assert_eq!((&report["mode"], &report["post_copy"], &report["verified"]), (&"hybrid".into(), &Value::Null, &true.into()), "{report}");
    qemus.is_only_at(B);
    let report = moved(&qemus.lab.migrate(B, &[&SLOW[..], &["--mode", "hybrid", "--max-downtime", "300ms"]].concat()));
    was_split(&report, "hybrid");
    assert!(report["rounds"].as_u64().unwrap() >= 3, "{report}");
    qemus.is_only_at(A);
    what_a_source_that_dies_takes_along_is_said(&mut qemus);
}

/// The guest is the destination's by then, so nobody starts it at the source, and nobody says that it is well.
#[track_caller]
fn what_a_source_that_dies_takes_along_is_said(qemus: &mut Qemus) {
    let watch = OneCopy::watch(&qemus.lab);
    let mut running = qemus.lab.start_migrate(A, &[&SLOW[..], &SPLIT].concat());
    until_split(qemus, &mut running);
    for pid in qemus.monitors(A).iter().flat_map(|monitor| processes_with(&monitor.with_extension(""))) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    let said = running.finish();
    said.expect(6, &["lacks pages", "does not answer"]);
    assert_eq!((&said.json()["running_on"], &said.json()["error"]["code"]), (&"destination".into(), &"lacks-pages".into()), "{said:?}");
    let there = wait_for("a guest that lacks pages", || {
        let view = qemus.lab.vm(B);
        (view["state"] == "lacks-pages").then_some(view)
    });
    assert!(there["why"].as_str().unwrap().contains("has to be started from its disks"), "{there}");
    wait_for("a source that has given it", || (qemus.lab.vm(A)["state"] == "gone").then_some(()));
    // Also not by one that is started anew.
    qemus.lab.gateway_mut(A).kill();
    qemus.lab.gateway_mut(A).start();
    assert_eq!(qemus.lab.vm(A)["state"], "gone");
    watch.end();
    assert_eq!(qemus.states(A), []);
}

/// The cut is longer than a session lives.
#[test]
fn a_guest_that_is_split_misses_no_beat_and_a_cut_behind_that_is_waited_out() {
    let Some(mut qemus) = start(Setup::new().through_relay(Conditions::default())) else { return };
    let watch = OneCopy::watch(&qemus.lab);
    let mut running = qemus.lab.start_migrate(A, &[&SLOW[..], &SPLIT].concat());
    until_split(&qemus, &mut running);
    qemus.lab.cut();
    std::thread::sleep(Duration::from_secs(14));
    running.must_go_on();
    qemus.lab.restore();
    let report = moved(&running.finish());
    watch.end();
    was_split(&report, "postcopy");
    overtook(&qemus);
    assert!(report["reconnects"].as_u64().unwrap() >= 1, "{report}");
    qemus.is_only_at(B);
    // And back, as any other.
    let report = qemus.lab.migrate(B, &[]).expect_moved();
    assert_eq!((&report["mode"], &report["post_copy"]), (&"precopy".into(), &Value::Null));
    qemus.is_only_at(A);
}

#[test]
fn a_guest_that_was_split_and_stays_goes_on() {
    for (name, start) in [(A, start as fn(Setup) -> Option<Qemus>), (B, start_newer)] {
        let Some(mut qemus) = start(Setup::new().without_policy(name, "commit")) else { return };
        let watch = OneCopy::watch(&qemus.lab);
        qemus.lab.migrate(A, &[&SLOW[..], &SPLIT].concat()).expect_stayed(3, &[]);
        watch.end();
        qemus.is_only_at(A);
        // Its QEMU is as it was: the next attempt gets as far.
        qemus.lab.migrate(A, &[&SLOW[..], &SPLIT].concat()).expect_stayed(3, &[]);
        qemus.is_only_at(A);
    }
}

/// Behind RUN the guest is the destination's, and both QEMUs have lost their streams: the gateways give them new ones. Once that is cut too,
/// for longer than a session lives.
#[test]
fn a_gateway_killed_behind_the_split_goes_on_with_what_is_missing() {
    for killed in [&[B][..], &[A, B]] {
        let start = if killed == [B] { start } else { start_newer };
        let Some(mut qemus) = start(Setup::new().through_relay(Conditions::default())) else { return };
        let watch = OneCopy::watch(&qemus.lab);
        let slow = if killed == [B] { SLOW } else { SLOWER };
        let mut running = qemus.lab.start_migrate(A, &[&slow[..], &SPLIT].concat());
        until_split(&qemus, &mut running);
        killed.iter().for_each(|name| qemus.lab.gateway_mut(*name).kill());
        killed.iter().for_each(|name| qemus.lab.gateway_mut(*name).start());
        if killed == [B] {
            let said = running.finish();
            said.expect(6, &["lacks pages"]);
            assert_eq!(said.json()["running_on"], "destination");
        } else {
            until_sent_again(&qemus, 1);
            std::thread::sleep(Duration::from_secs(1));
            qemus.lab.cut();
            std::thread::sleep(Duration::from_secs(14));
            wait_for("a guest that lacks pages", || (qemus.lab.vm(B)["state"] == "lacks-pages").then_some(()));
            qemus.lab.restore();
            until_sent_again(&qemus, 2);
            drop(running.finish());
        }
        overtook(&qemus);
        qemus.is_only_at(B);
        watch.end();
    }
}

/// What the guest lacks is on its way for so many times.
#[track_caller]
fn until_sent_again(qemus: &Qemus, times: usize) {
    wait_for("pages that are sent again", || {
        (qemus.lab.gateway(A).log().matches("lacks pages of the guest, which follow now").count() >= times).then_some(())
    });
}

#[test]
fn both_policies_are_asked_of_the_mode() {
    let forbid = "@id(\"opt-in\") forbid (principal, action in [Sealane::Action::\"request\", Sealane::Action::\"release\", \
        Sealane::Action::\"accept\"], resource) when { context.stream.mode != \"precopy\" && !resource.postcopyOk };";
    for name in [A, B] {
        let Some(mut qemus) = start(Setup::new().with_policy(name, forbid)) else { return };
        for mode in ["postcopy", "hybrid"] {
            qemus.lab.migrate(A, &["--mode", mode]).expect_stayed(3, &["opt-in"]);
        }
        qemus.is_only_at(A);
        qemus.lab.migrate(A, &[]).expect_moved();
        qemus.is_only_at(B);
    }
}

#[test]
fn what_cannot_be_split_stays_and_so_does_a_guest_whose_twin_dies_before_it_is_given() {
    let lab = Lab::start();
    lab.migrate(A, &SPLIT).expect_stayed(2, &["`--mode precopy` is the only one that is built for it"]);
    lab.runs_only_on(A);
    let Some(mut qemus) = start(Setup::new()) else { return };
    let records = Records::begin(&qemus.lab, A);
    let mut running = qemus.lab.start_migrate(A, &[&["--compress", "none", "--bandwidth", "200KiB/s"], &SPLIT[..]].concat());
    let twin = wait_for("the twin's process", || {
        running.must_go_on();
        qemus.monitors(B).iter().flat_map(|monitor| processes_with(monitor)).next()
    });
    while !records.have("offer") && !running.has_ended() {
        std::thread::sleep(Duration::from_micros(100));
    }
    rustix::process::kill_process(twin, rustix::process::Signal::KILL).unwrap();
    running.finish().expect_stayed(1, &[]);
    qemus.is_only_at(A);
}

#[test]
fn a_qemu_that_cannot_split_its_guest_says_so() {
    let Ok(old) = std::env::var("SEALANE_QEMU_OLD") else { return println!("SKIPPED: SEALANE_QEMU_OLD names no older QEMU") };
    let Some(mut qemus) = Qemus::start_with(Setup::new(), &old, |arguments| arguments) else { return };
    qemus.lab.migrate(A, &SPLIT).expect_stayed(4, &["expected QEMU 10.0 or later"]);
    qemus.is_only_at(A);
}

/// QEMU sends a huge page as one that is waited for, so a guest on them is not split; it moves all the same.
#[test]
fn a_guest_on_huge_pages_is_not_split_wherever_they_are() {
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = free.lines().find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse::<u32>().ok()).unwrap_or(0);
    if free < HUGE_PAGES {
        return println!("SKIPPED: {free} huge pages are free, of {HUGE_PAGES} (`vm.nr_hugepages`)");
    }
    let huge: fn(Vec<String>) -> Vec<String> = |arguments| {
        let on_them = |argument: String| if argument == "pc-i440fx-7.2" { format!("{argument},memory-backend=pc.ram") } else { argument };
        let memory = ["-object", "memory-backend-memfd,id=pc.ram,size=64M,hugetlb=on,hugetlbsize=2M"].map(str::to_owned);
        arguments.into_iter().map(on_them).chain(memory).collect()
    };
    let Some(mut qemus) = Qemus::start_as(Setup::new(), [QEMU, QEMU], |arguments| arguments, huge) else { return };
    qemus.lab.migrate(A, &SPLIT).expect_stayed(4, &["expected pages of 4 KiB, got huge pages"]);
    qemus.is_only_at(A);
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
    qemus.lab.migrate(B, &SPLIT).expect_stayed(4, &["expected memory in pages of 4 KiB, got huge pages"]);
    qemus.is_only_at(B);
}

/// Two guests of 64 MiB.
const HUGE_PAGES: u32 = 64;
