//! A QEMU that hands its guest's pages to its gateway on several channels (`multifd`): everything else is as with one.

use std::time::Duration;

use serde_json::{Value, json};

use crate::between::{Between, Meddling};
use crate::crash::Records;
use crate::gateway::{A, B};
use crate::lab::Setup;
use crate::lies::{Change, Lie, lies_of_a_channel};
use crate::qemus::{OneCopy, QEMU, Qemus, ask, processes_with};
use crate::relay::Conditions;

const CHANNELS: [&str; 2] = ["--channels", "3"];

#[track_caller]
fn moved(report: &Value) {
    assert!(report["stream_opaque"].is_null() && report["pages"]["zero"].as_u64().unwrap() > 10_000, "{report}");
    assert_eq!((&report["verified"], &report["guest_memory_bytes"]), (&true.into(), &(64 << 20).into()), "{report}");
}

#[track_caller]
fn ask_qemu(qemus: &Qemus, command: &str, arguments: &Value) -> Value {
    let monitor = qemus.monitors(qemus.at).into_iter().find(|path| processes_with(&path.with_extension("")).len() == 1).unwrap();
    ask(&monitor, command, arguments)
}

/// Nothing is set that the driver has set, and no socket is left.
#[track_caller]
fn is_as_it_was(qemus: &Qemus) {
    let set = ask_qemu(qemus, "query-migrate-capabilities", &Value::Null);
    assert!(!set.as_array().unwrap().contains(&json!({ "capability": "multifd", "state": true })), "{set}");
    assert_eq!(ask_qemu(qemus, "query-migrate-parameters", &Value::Null)["multifd-channels"], 2);
    let run = std::fs::read_dir(qemus.lab.gateway(qemus.at).directory().join("run")).unwrap();
    let left: Vec<_> =
        run.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|end| end == "channels")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// All channels wait for each other at each section, as those of QEMU 7.2 do, and zeroes are found by the main one or by the others.
#[test]
fn a_guest_whose_pages_come_on_several_channels_moves_there_and_back() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let watch = OneCopy::watch(&qemus.lab);
    moved(&qemus.lab.migrate(A, &["--channels", "2"]).expect_moved());
    watch.end();
    qemus.is_only_at(B);
    moved(&qemus.lab.migrate(B, &["--channels", "16", "--compress", "none"]).expect_moved());
    qemus.is_only_at(A);
    ask_qemu(&qemus, "migrate-set-parameters", &json!({ "zero-page-detection": "legacy" }));
    moved(&qemus.lab.migrate(A, &CHANNELS).expect_moved());
    qemus.is_only_at(B);
}

/// Machine types since 8.1 have them wait once in each round.
#[test]
fn channels_that_wait_once_in_a_round_are_gathered_too() {
    let newer =
        |arguments: Vec<String>| arguments.into_iter().map(|argument| argument.replace("pc-i440fx-7.2", "pc-i440fx-10.0")).collect();
    let Some(mut qemus) = Qemus::start_as(Setup::new(), [QEMU, QEMU], newer, |arguments| arguments) else { return };
    moved(&qemus.lab.migrate(A, &CHANNELS).expect_moved());
    qemus.is_only_at(B);
    ask_qemu(&qemus, "migrate-set-parameters", &json!({ "zero-page-detection": "legacy" }));
    moved(&qemus.lab.migrate(B, &CHANNELS).expect_moved());
    qemus.is_only_at(A);
}

/// `SEALANE_QEMU_OLD` is an older QEMU than the one on the `PATH`.
#[test]
fn channels_of_an_older_qemu_are_gathered_for_it_and_for_a_newer_one() {
    let Ok(old) = std::env::var("SEALANE_QEMU_OLD") else { return println!("SKIPPED: SEALANE_QEMU_OLD names no older QEMU") };
    for there in [old.as_str(), QEMU] {
        let Some(mut qemus) = Qemus::start_as(Setup::new(), [&old, there], |arguments| arguments, |arguments| arguments) else { return };
        moved(&qemus.lab.migrate(A, &CHANNELS).expect_moved());
        qemus.is_only_at(B);
    }
}

/// What ends an attempt leaves the guest as it was; what is a short outage is waited out.
#[test]
fn a_guest_that_stays_is_as_it_was_on_several_channels() {
    let configured = |setup: Setup| setup.replace(A, "[migration]\n", "[migration]\nchannels = 3\n");
    let Some(mut qemus) = Qemus::start(configured(Setup::new().through_relay(Conditions::default()))) else { return };
    let (running, id) = qemus.slow(&[]);
    let multifd = json!({ "capability": "multifd", "state": true });
    assert!(ask_qemu(&qemus, "query-migrate-capabilities", &Value::Null).as_array().unwrap().contains(&multifd));
    qemus.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[]);
    qemus.is_only_at(A);
    is_as_it_was(&qemus);
    // A gateway that is killed has no time for that.
    let (running, _) = qemus.slow(&[]);
    qemus.lab.gateway_mut(A).kill();
    qemus.lab.gateway_mut(A).start();
    drop(running);
    qemus.is_only_at(A);
    let set = ask_qemu(&qemus, "query-migrate-capabilities", &Value::Null);
    assert!(!set.as_array().unwrap().contains(&multifd), "{set}");
    let (mut running, id) = qemus.slow(&[]);
    qemus.lab.cut();
    std::thread::sleep(Duration::from_secs(3));
    running.must_go_on();
    qemus.lab.restore();
    qemus.lab.gateway(A).command(&["set", &id, "bandwidth=100MiB/s"]).expect(0, &[]);
    moved(&running.finish().expect_moved());
    qemus.is_only_at(B);
}

#[test]
fn several_channels_are_refused_where_they_cannot_be() {
    let Some(mut qemus) = Qemus::start(Setup::new().without_policy(B, "commit")) else { return };
    qemus.lab.migrate(A, &["--channels", "2", "--mode", "hybrid"]).expect_stayed(2, &["cannot be sent on several channels"]);
    // Behind the last page, with everything sent.
    let records = Records::begin(&qemus.lab, A);
    qemus.lab.migrate(A, &CHANNELS).expect_stayed(3, &[]);
    assert!(records.have("offer"));
    qemus.is_only_at(A);
    is_as_it_was(&qemus);
}

/// Somebody between a QEMU and its gateway changes what is said on a channel: whatever it is, the guest goes on and its QEMU is as it was.
#[test]
fn a_channel_that_lies_leaves_the_guest_where_it_is() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let between = Between::put_before(&mut qemus);
    let mut wrong = Vec::new();
    let lies = lies_of_a_channel();
    for Lie { name, change, expected } in &lies {
        between.set(Meddling::Channel(change.clone()));
        let said = qemus.lab.migrate(A, &["--channels", "2"]);
        if said.code != 1 || !said.stderr.contains(expected) {
            wrong.push(format!("{name}: expected `{expected}`, got {}: {}", said.code, said.stderr));
        }
        qemus.stays(name);
        is_as_it_was(&qemus);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("QEMU and channels that lie: {} refused", lies.len());
    // And the main channel of several.
    between.set(Meddling::Main(Change::Replace(vec![(b"QEVM".to_vec(), b"QIMG".to_vec())])));
    qemus.lab.migrate(A, &CHANNELS).expect_stayed(1, &["version 3"]);
    is_as_it_was(&qemus);
    between.set(Meddling::Main(Change::Nothing));
    moved(&qemus.lab.migrate(A, &CHANNELS).expect_moved());
    qemus.is_only_at(B);
}

/// Another process connects first where channels are waited for.
#[test]
fn a_stranger_where_channels_are_waited_for_is_none_of_them() {
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        return println!("SKIPPED: no python3");
    }
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let between = Between::put_before(&mut qemus);
    between.set(Meddling::Stranger(2));
    moved(&qemus.lab.migrate(A, &CHANNELS).expect_moved());
    qemus.is_only_at(B);
}
