//! Disks move with a QEMU's guest: real QEMUs and gateways, and a guest that looks at every record it ever wrote.
//!
//! `SEALANE_QEMU_DISKS=1` runs those that take long.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use sealane::hypervisor::qemu;
use serde_json::{Value, json};

use crate::command::wait_for;
use crate::disks::{Disks, MIB, Plan, arguments, disk_of, tool};
use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, Setup, VM, replaced};
use crate::qemus::{LOOK, QEMU, ask};
use crate::relay::Conditions;

/// Whether the long ones are run.
pub fn long() -> bool {
    let asked = std::env::var_os("SEALANE_QEMU_DISKS").is_some();
    if !asked {
        println!("SKIPPED: takes long; SEALANE_QEMU_DISKS=1 runs it");
    }
    asked
}

#[track_caller]
fn moved(report: &Value, bytes: u64) {
    let disks = &report["disks"];
    assert_eq!((&disks["count"], &disks["bytes"]), (&1.into(), &bytes.into()), "{report}");
    let of = |name: &str| disks[name].as_u64().unwrap();
    assert!(of("changed_bytes") + of("held_bytes") >= bytes, "{report}");
}

/// A second attempt moves the guest, and nearly nothing of its disk of 64 MiB goes over the wire.
#[track_caller]
pub fn moves_again(disks: &mut Disks) {
    let bytes = 64 * MIB;
    let report = disks.lab.migrate(A, &["--storage", "all", "--verify-disks", "--compress", "none"]).expect_moved();
    moved(&report, bytes);
    // The guest's records lie in what is left, 64 blocks of 64 KiB, which change all the time.
    let (held, changed) = (report["disks"]["held_bytes"].as_u64().unwrap(), &report["disks"]["changed_bytes"]);
    assert!(held > bytes - 10 * MIB && report["disks"]["verified"] == true, "{report}");
    println!("a second attempt: {held} of {bytes} bytes were there, {changed} changed, {} on the wire", report["wire_bytes"]);
    disks.is_only_at(B);
}

/// Files of disks that are kept for another attempt.
pub fn kept_at(lab: &Lab, name: Name) -> Vec<String> {
    let entries = std::fs::read_dir(lab.gateway(name).directory().join("run")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".sealane-kept")).collect()
}

#[test]
fn a_second_attempt_sends_only_what_differs() {
    let Some(mut disks) = Disks::start(Setup::new(), Plan::small("qcow2", "qcow2")) else { return };
    let (running, id) = disks.in_memory(&[]);
    disks.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[]);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
    assert_eq!(kept_at(&disks.lab, B).len(), 1);
    moves_again(&mut disks);
    assert_eq!(kept_at(&disks.lab, B), [""; 0]);
    disks.disk_is_whole();
}

#[test]
fn a_cut_that_outlasts_the_attempt_costs_only_the_rest_of_the_disk() {
    if !long() {
        return;
    }
    for (a, b) in [("raw", "qcow2"), ("qcow2", "raw")] {
        let Some(mut disks) = Disks::start(Setup::new().through_relay(Conditions::default()), Plan::small(a, b)) else { return };
        // In the middle of the disk, then behind it.
        let (running, _) = disks.slow("storage", &["--max-outage", "3s"]);
        std::thread::sleep(Duration::from_secs(4));
        disks.lab.cut();
        running.finish().expect_stayed(1, &[]);
        disks.lab.restore();
        let (running, _) = disks.in_memory(&["--max-outage", "3s"]);
        disks.lab.cut();
        running.finish().expect_stayed(1, &[]);
        disks.lab.restore();
        disks.is_only_at(A);
        moves_again(&mut disks);
        disks.disk_is_whole();
    }
}

#[test]
fn disks_are_not_kept_for_longer_than_they_may_be() {
    if !long() {
        return;
    }
    for (line, denied) in [("keep_disks = \"3s\"", false), ("keep_disks = \"0s\"", false), ("keep_disks = \"1h\"", true)] {
        let setup = Setup::new().replace(B, "timeout = \"10m\"", &format!("timeout = \"10m\"\n{line}"));
        let setup = if denied { setup.without_policy(B, "commit") } else { setup };
        let Some(mut disks) = Disks::start(setup, Plan { filled: MIB, ..Plan::small("raw", "raw") }) else { return };
        if denied {
            disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(3, &[]);
        } else {
            let (running, id) = disks.in_memory(&[]);
            disks.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
            running.finish().expect_stayed(5, &[]);
        }
        disks.is_only_at(A);
        disks.nothing_laid_at(B);
        wait_for("nothing that is kept", || kept_at(&disks.lab, B).is_empty().then_some(()));
    }
}

#[test]
fn a_guest_moves_with_its_disk_into_another_format_and_back() {
    let mut plan = Plan::small("qcow2", "raw");
    plan.ends[0].1 = "cluster_size = \"4KiB\"".to_owned();
    let Some(mut disks) = Disks::start(Setup::new(), plan) else { return };
    let report = disks.lab.migrate(A, &["--storage", "all", "--verify-disks", "--compress", "zstd"]).expect_moved();
    moved(&report, 64 * MIB);
    assert!(report["disks"]["verified"] == true && report["disks"]["verify_seconds"].as_f64().unwrap() > 0.0, "{report}");
    // 16 MiB are one byte, and the rest is holes.
    assert!(report["wire_bytes"].as_u64().unwrap() < 8 * MIB, "{report}");
    disks.is_only_at(B);
    // And back, to where an old one lies.
    let report = disks.lab.migrate(B, &["--storage", "all"]).expect_moved();
    moved(&report, 64 * MIB);
    assert_eq!(report["disks"]["verified"], false, "{report}");
    disks.is_only_at(A);
    disks.disk_is_whole();
}

/// Its disk is whole before it is split: where the guest goes on, whichever end that is, it has all that it wrote.
#[test]
fn a_guest_that_is_split_has_its_disk_there_or_here() {
    const SPLIT: [&str; 6] = ["--storage", "all", "--mode", "postcopy", "--compress", "lz4"];
    let plan = || Plan { filled: MIB, ..Plan::small("qcow2", "raw") };
    let Some(mut disks) = Disks::start(Setup::new().without_policy(B, "commit"), plan()) else { return };
    disks.lab.migrate(A, &[&SPLIT[..], &["--bandwidth", "2MiB/s"]].concat()).expect_stayed(3, &["commit"]);
    disks.is_only_at(A);
    disks.disk_is_whole();
    // One that writes little for a moment may be there before it can be split.
    for attempt in 1..=5 {
        let Some(mut disks) = Disks::start(Setup::new(), plan()) else { return };
        let said = disks.lab.migrate(A, &[&SPLIT[..], &["--bandwidth", "2MiB/s", "--verify-disks"]].concat());
        said.expect(0, &[]);
        let report = said.json();
        moved(&report, 64 * MIB);
        assert_eq!((&report["disks"]["verified"], &report["mode"]), (&true.into(), &"postcopy".into()), "{report}");
        let (behind, pause) = (report["post_copy"]["seconds"].as_f64().unwrap(), report["downtime_seconds"].as_f64().unwrap());
        disks.is_only_at(B);
        disks.disk_is_whole();
        if report["post_copy"]["faults"].as_u64().unwrap() > 0 && behind > 0.0 {
            return println!("split with its disk: pause {pause} s, {behind} s behind it, attempt {attempt}");
        }
    }
    panic!("a guest with a disk was never split");
}

#[test]
fn two_disks_move_each_into_its_own_place() {
    let Some(mut disks) = Disks::start(Setup::new(), Plan { second: true, ..Plan::small("raw", "qcow2") }) else { return };
    let report = disks.lab.migrate(A, &["--storage", "all", "--verify-disks"]).expect_moved();
    let moved = &report["disks"];
    assert_eq!((&moved["count"], &moved["bytes"], &moved["verified"]), (&2.into(), &(72 * MIB).into(), &true.into()), "{report}");
    disks.is_only_at(B);
    let second = disk_of(&disks.lab, B).with_extension("second");
    let second = second.to_str().unwrap();
    // Its QEMU has it, and nothing of what was written is only there.
    assert!(tool("qemu-io", &["-r", "-U", "-f", "raw", "-c", "read -P 91 0 3M", "-c", "read -P 0 3M 5M", second]));
    disks.disk_is_whole();
}

/// It waits already, and somebody else uses its NBD server.
#[test]
fn a_destination_that_cannot_take_disks_says_why() {
    let plan = Plan { filled: MIB, ..Plan::small("raw", "raw") };
    let Some(mut disks) = Disks::start(Setup::new(), plan.clone()) else { return };
    let gateway = disks.lab.gateway_mut(B);
    gateway.stop();
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    let text = replaced(&text, "template = \"disk\"\ntenant", "incoming_qmp = \"run/waits.qmp\"\ntenant");
    std::fs::write(gateway.config(), &text).unwrap();
    gateway.start();
    // Before it is asked for its disks, and before a file is made that it cannot have open.
    disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(4, &["disk `disk0`", "`incoming_qmp`"]);
    disks.nothing_laid_at(B);
    let gateway = disks.lab.gateway_mut(B);
    gateway.stop();
    let place = format!("file = \"run/{VM}.serial.disk\"\nformat = \"raw\"\nexisting = \"set-aside\"\n");
    std::fs::write(gateway.config(), replaced(&text, &place, "")).unwrap();
    gateway.start();
    let (run, disk) = (gateway.directory().join("run"), disk_of(&disks.lab, B));
    assert!(tool("qemu-img", &["create", "-q", "-f", "raw", disk.to_str().unwrap(), &(64 * MIB).to_string()]));
    let fill = |argument: String| {
        let argument = argument.replace("{uuid}", UUID).replace("{socket}", run.join("waits.qmp").to_str().unwrap());
        argument.replace("{serial}", disks.lab.console(B).to_str().unwrap())
    };
    let arguments = arguments(&plan, B).into_iter().map(fill).chain(["-incoming", "defer", "-S"].map(str::to_owned));
    let mut waits = Command::new(QEMU).args(arguments).stdin(Stdio::null()).spawn().unwrap();
    let look = run.join("waits.qmp.look");
    wait_for("a QEMU that waits", || qemu::observe(&look, "waits", LOOK).ok());
    ask(&look, "nbd-server-start", &json!({ "addr": { "type": "unix", "data": { "path": run.join("theirs") } } }));
    disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(1, &["server already running"]);
    waits.wait().unwrap();
    disks.is_only_at(A);
}

/// Not what the configuration names: nothing of it was asked for.
#[test]
fn a_file_that_only_the_template_names_is_never_written() {
    let Some(mut disks) = Disks::start(Setup::new(), Plan { filled: MIB, ..Plan::small("raw", "raw") }) else { return };
    let gateway = disks.lab.gateway_mut(B);
    gateway.stop();
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    std::fs::write(gateway.config(), replaced(&text, "{serial}.disk", "{serial}.other")).unwrap();
    gateway.start();
    let disk = disk_of(&disks.lab, B);
    let other = disk.with_extension("other");
    let name = other.to_str().unwrap();
    assert!(tool("qemu-img", &["create", "-q", "-f", "raw", name, &(64 * MIB).to_string()]));
    assert!(tool("qemu-io", &["-f", "raw", "-c", &format!("write -P 119 0 {}", 64 * MIB), name]));
    let says = ["disk `disk0`", ".serial.disk` open (`[[vm.disk]] file`), got `", ".serial.other`", "template"];
    disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(4, &says);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
    assert!(tool("qemu-io", &["-f", "raw", "-c", &format!("read -P 119 0 {}", 64 * MIB), name]), "the other file");
    // By another name it is the same file.
    std::fs::remove_file(&other).unwrap();
    std::os::unix::fs::symlink(&disk, &other).unwrap();
    moved(&disks.lab.migrate(A, &["--storage", "all", "--verify-disks"]).expect_moved(), 64 * MIB);
    disks.is_only_at(B);
    disks.disk_is_whole();
}

/// QEMU sends what the guest reads, so it would arrive in the clear.
#[test]
fn an_encrypted_disk_does_not_move() {
    let plan = Plan { filled: 0, secret: true, ..Plan::small("qcow2", "qcow2") };
    let Some(mut disks) = Disks::start(Setup::new(), plan) else { return };
    let says = ["disk `disk0`", "is encrypted at the source", "in the clear"];
    disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(1, &says);
    disks.lab.gateway(A).command(&["storage", "migrate", VM, "--to", "gw-b"]).expect_stayed(1, &says);
    disks.lab.gateway(A).command(&["plan", VM, "--to", "gw-b", "--storage", "all"]).expect(1, &says);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
    // Nobody was asked to take it.
    assert!(!disks.lab.gateway(B).audit().iter().any(|entry| entry["event"] == "migration-finished"));
}

#[test]
fn what_cannot_be_taken_of_disks_is_said_before_anything_is_sent() {
    let mut plan = Plan::small("raw", "raw");
    plan.ends[1].1 = "max_size = \"63MiB\"".to_owned();
    let Some(mut disks) = Disks::start(Setup::new(), plan) else { return };
    disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(3, &["67108864 bytes", "at most 66060288 may move"]);
    disks.lab.migrate(A, &["--verify-disks"]).expect_stayed(2, &["expected `--storage all`"]);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
}

#[test]
fn a_sparse_gigabyte_is_no_gigabyte_on_the_wire() {
    if !long() {
        return;
    }
    for (a, b) in [("raw", "qcow2"), ("qcow2", "raw")] {
        let plan = Plan { bytes: 1024 * MIB, ..Plan::small(a, b) };
        let Some(mut disks) = Disks::start(Setup::new(), plan) else { return };
        let report = disks.lab.migrate(A, &["--storage", "all", "--verify-disks", "--compress", "none"]).expect_moved();
        moved(&report, 1024 * MIB);
        println!("1 GiB, {a} to {b}: {report}");
        // The filled part, the memory, and little more.
        assert!(report["wire_bytes"].as_u64().unwrap() < (16 + 64 + 8) * MIB, "{report}");
        disks.is_only_at(B);
        // Holes are holes there.
        use std::os::unix::fs::MetadataExt;
        let there = std::fs::metadata(disk_of(&disks.lab, B)).unwrap().blocks() * 512;
        assert!(there < 64 * MIB, "{there} bytes on disk");
        disks.disk_is_whole();
    }
}

#[test]
fn a_link_that_is_cut_while_disks_are_copied_is_waited_for() {
    if !long() {
        return;
    }
    for pause in [Duration::from_secs(3), Duration::from_secs(14)] {
        let setup = Setup::new().through_relay(Conditions::default());
        let Some(mut disks) = Disks::start(setup, Plan::small("qcow2", "raw")) else { return };
        let (mut running, id) = disks.slow("storage", &["--verify-disks"]);
        std::thread::sleep(Duration::from_millis(700));
        disks.lab.cut();
        std::thread::sleep(pause);
        running.must_go_on();
        disks.lab.restore();
        disks.lab.gateway(A).command(&["set", &id, "bandwidth=100MiB/s"]).expect(0, &[]);
        let report = running.finish().expect_moved();
        // QUIC bridges a short cut by itself.
        let reconnects = report["reconnects"].as_u64().unwrap();
        assert!((reconnects > 0 || pause < Duration::from_secs(10)) && report["disks"]["verified"] == true, "{report}");
        println!("cut for {pause:?}: {report}");
        disks.is_only_at(B);
        disks.disk_is_whole();
    }
}

#[test]
fn a_cancel_in_each_phase_leaves_the_guest_with_its_disk() {
    if !long() {
        return;
    }
    let Some(mut disks) = Disks::start(Setup::new(), Plan { filled: 4 * MIB, ..Plan::small("qcow2", "qcow2") }) else { return };
    for phase in ["storage", "memory"] {
        let (running, id) = disks.slow(phase, &[]);
        disks.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
        running.finish().expect_stayed(5, &[]);
        disks.is_only_at(A);
        disks.nothing_laid_at(B);
    }
    moved(&disks.lab.migrate(A, &["--storage", "all", "--verify-disks"]).expect_moved(), 64 * MIB);
    disks.is_only_at(B);
    disks.disk_is_whole();
}

#[test]
fn a_gateway_killed_while_disks_are_copied_leaves_the_guest_with_its_disk() {
    if !long() {
        return;
    }
    let Some(mut disks) = Disks::start(Setup::new(), Plan::small("qcow2", "raw")) else { return };
    for victim in [A, B] {
        for phase in ["storage", "memory"] {
            let (running, _) = disks.slow(phase, &[]);
            disks.lab.gateway_mut(victim).kill();
            std::thread::sleep(Duration::from_millis(500));
            disks.lab.gateway_mut(victim).start();
            drop(running);
            disks.is_only_at(A);
            disks.nothing_laid_at(B);
            println!("killed {victim:?} in {phase}: the guest stays");
        }
    }
    moved(&disks.lab.migrate(A, &["--storage", "all", "--verify-disks"]).expect_moved(), 64 * MIB);
    disks.is_only_at(B);
    disks.disk_is_whole();
}

/// Its records are small and lie in 64 blocks, which is more than the link takes of what changes.
#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_and_then_not_any_more() {
    if !long() {
        return;
    }
    let Some(mut disks) = Disks::start(Setup::new(), Plan { filled: MIB, ..Plan::small("raw", "raw") }) else { return };
    let flags = ["--storage", "all", "--compress", "none", "--bandwidth", "2MiB/s"];
    let running = disks.lab.start_migrate(A, &flags);
    let limited = |disks: &Disks| !disks.ask("query-block", &Value::Null)[0]["inserted"]["group"].is_null();
    wait_for("a guest that is slowed down", || limited(&disks).then_some(()));
    let id = disks.lab.active_migration(A).unwrap()["id"].as_str().unwrap().to_owned();
    disks.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[]);
    disks.is_only_at(A);
    assert!(!limited(&disks));
    moved(&disks.lab.migrate(A, &[&flags[..], &["--verify-disks"]].concat()).expect_moved(), 64 * MIB);
    disks.is_only_at(B);
    assert!(!limited(&disks));
    disks.disk_is_whole();
}

/// A file system of 8 MiB, as long as this lives.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let mounted = tool("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", at.to_str().unwrap()]);
        mounted.then_some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        tool("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

#[test]
fn a_destination_out_of_disk_leaves_the_guest_where_it_is() {
    if !long() {
        return;
    }
    let Some(mut disks) = Disks::start(Setup::new(), Plan::small("qcow2", "raw")) else { return };
    // The runtime directory, where the disk goes too, is on it.
    let gateway = disks.lab.gateway_mut(B);
    gateway.stop();
    let run = gateway.directory().join("run");
    let Some(_small) = Small::mount(run) else { return println!("SKIPPED: no tmpfs can be mounted") };
    disks.lab.gateway_mut(B).start();
    let said = disks.lab.migrate(A, &["--storage", "all", "--compress", "none"]);
    said.expect_stayed(1, &["`disk0` cannot be written", "No space left"]);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
}
