//! Disks of a QEMU's guest are copied ahead of its migration, and the guest stays.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sealane::hypervisor::RunState;
use serde_json::{Value, json};

use crate::command::{Running, Said, wait_for};
use crate::disks::{Disks, MIB, Plan, disk_of, tool};
use crate::gateway::{A, B};
use crate::lab::{Setup, VM, replaced};
use crate::qemu_disks::{kept_at, long, moves_again};

/// What a QEMU says of its guest between `new` and `end`. Nobody else can look meanwhile.
struct Listener(BufReader<UnixStream>);

impl Listener {
    fn new(monitor: &Path) -> Self {
        let mut stream = UnixStream::connect(monitor).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
        reader.read_line(&mut line).unwrap();
        Self(reader)
    }

    fn end(self) -> Vec<String> {
        let mut names = Vec::new();
        self.0.get_ref().set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        for line in self.0.lines().map_while(Result::ok) {
            let said: Value = serde_json::from_str(&line).unwrap();
            names.extend(said["event"].as_str().map(str::to_owned));
        }
        names
    }
}

fn start_ahead(disks: &Disks, flags: &[&str]) -> Running {
    disks.lab.gateway(A).start_command(&[&["storage", "migrate", VM, "--to", "gw-b", "--compress", "none"], flags].concat())
}

fn ahead(disks: &Disks, flags: &[&str]) -> Said {
    start_ahead(disks, flags).finish()
}

#[track_caller]
fn expect_there(said: &Said) -> Value {
    said.expect(0, &[]);
    let report = said.json();
    assert_eq!((&report["state"], &report["running_on"], &report["error"]), (&"completed".into(), &"source".into(), &Value::Null));
    let disks = &report["disks"];
    assert_eq!((&disks["only"], &disks["count"], &disks["bytes"]), (&true.into(), &1.into(), &(64 * MIB).into()), "{report}");
    assert_eq!((&report["downtime_seconds"], &report["rounds"]), (&Value::Null, &0.into()), "{report}");
    report
}

fn look(disks: &Disks) -> PathBuf {
    disks.lab.gateway(A).directory().join("run/first.qmp.look")
}

#[test]
fn disks_that_were_copied_ahead_are_not_sent_again() {
    let Some(mut disks) = Disks::start(Setup::new(), Plan::small("qcow2", "raw")) else { return };
    // One that is cancelled in the middle keeps what came, and says that it is not all.
    let running = start_ahead(&disks, &["--bandwidth", "2MiB/s"]);
    let id = wait_for("disks under way", || {
        let active = disks.lab.active_migration(A)?;
        let sent = active["progress"]["wire_bytes"].as_u64().unwrap_or(0);
        (active["progress"]["phase"] == "storage" && sent > MIB).then(|| active["id"].as_str().unwrap().to_owned())
    });
    disks.lab.gateway(A).command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[]);
    disks.is_only_at(A);

    let listener = Listener::new(&look(&disks));
    let report = expect_there(&ahead(&disks, &[]));
    let events = listener.end();
    assert!(!events.iter().any(|event| event == "STOP" || event == "RESUME"), "{events:?}");
    assert!(events.iter().any(|event| event == "JOB_STATUS_CHANGE"), "{events:?}");
    let first = report["wire_bytes"].as_u64().unwrap();
    assert!(first > 8 * MIB, "{report}");
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
    assert_eq!(kept_at(&disks.lab, B).len(), 1);
    for name in [A, B] {
        disks.lab.gateway(name).audited("migration-finished", "cancelled", &[&id, "\"running_on\":\"source\""]);
        let done = ["\"disks_copied\":{", "\"only\":true", "\"running_on\":\"source\"", "completed"];
        disks.lab.gateway(name).audited("migration-finished", "done", &done);
    }

    // The same again costs nearly nothing, and so do the disks of the migration that follows.
    let report = expect_there(&ahead(&disks, &[]));
    assert!(report["disks"]["held_bytes"].as_u64().unwrap() > 54 * MIB, "{report}");
    disks.is_only_at(A);
    moves_again(&mut disks);
    assert_eq!(kept_at(&disks.lab, B), [""; 0]);
    disks.disk_is_whole();
}

#[test]
fn disks_are_not_copied_ahead_where_that_leads_nowhere() {
    let Some(mut disks) = Disks::start(Setup::new(), Plan { filled: MIB, ..Plan::small("raw", "raw") }) else { return };
    // A guest that somebody else has paused stays paused.
    disks.ask("stop", &Value::Null);
    for refused in [ahead(&disks, &[]), disks.lab.migrate(A, &["--storage", "all"])] {
        refused.expect(1, &["its guest is `paused`"]);
        assert_eq!(disks.states(A), [RunState::Paused]);
        assert_eq!(disks.ask("query-jobs", &Value::Null), json!([]));
    }
    // The other end was not asked to make files for it.
    assert!(!disks.lab.gateway(B).audit().iter().any(|entry| entry["event"] == "migration-finished"));
    disks.ask("cont", &Value::Null);
    disks.is_only_at(A);
    let gateway = disks.lab.gateway_mut(B);
    gateway.stop();
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    std::fs::write(gateway.config(), replaced(&text, "timeout = \"10m\"", "timeout = \"10m\"\nkeep_disks = \"0s\"")).unwrap();
    disks.lab.gateway_mut(B).start();
    ahead(&disks, &[]).expect_stayed(4, &["`[migration] keep_disks` is 0"]);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
}

/// What both ends are asked about disks is the same: what the guest has, and what the offer says of it.
#[test]
fn policies_at_both_ends_see_which_disks_are_to_move() {
    let forbid = |id: &str, action: &str, when: &str| {
        format!("@id(\"{id}\") forbid (principal, action == Sealane::Action::\"{action}\", resource) when {{ {when} }};")
    };
    let at_a = forbid("nothing-ahead", "request", "context.stream.storage == \"only\"")
        + &forbid("three-disks", "release", "context.diskCount > 2 || context.diskMiB > 64");
    let large = "context.stream.storage == \"all\" && context.diskCount == 1 && context.diskMiB > 63";
    let setup = Setup::new().with_policy(A, &at_a).with_policy(B, &forbid("small-disks", "accept", large));
    let Some(mut disks) = Disks::start(setup, Plan { filled: MIB, ..Plan::small("raw", "raw") }) else { return };
    ahead(&disks, &[]).expect_stayed(3, &["nothing-ahead"]);
    disks.lab.migrate(A, &["--storage", "all"]).expect_stayed(3, &["small-disks"]);
    disks.nothing_laid_at(B);
    let facts = ["\"storage\":\"all\"", "\"diskCount\":1", "\"diskMiB\":64"];
    disks.lab.gateway(A).audited("decision", "allow", &[&["\"action\":\"release\""], facts.as_slice()].concat());
    disks.lab.gateway(B).audited("decision", "deny", &[&["\"action\":\"accept\""], facts.as_slice()].concat());
    disks.is_only_at(A);
}

/// PREPARED has come when the source's policy is asked for the last time.
#[test]
fn disks_of_a_vm_that_was_promised_and_then_denied_do_not_stay() {
    let setup = Setup::new().without_policy(A, "commit");
    let Some(mut disks) = Disks::start(setup, Plan { filled: MIB, ..Plan::small("raw", "qcow2") }) else { return };
    disks.lab.migrate(A, &["--storage", "all", "--verify-disks"]).expect_stayed(3, &["commit"]);
    disks.is_only_at(A);
    disks.nothing_laid_at(B);
    assert_eq!(kept_at(&disks.lab, B), [""; 0]);
    let records = disks.lab.gateway(B).audit();
    let of =
        |entry: &Value| entry["event"] == "handoff" && ["prepared", "refused"].iter().any(|record| entry["detail"]["record"] == *record);
    assert_eq!(records.iter().filter(|entry| of(entry)).count(), 2, "{records:?}");
}

/// A file as a block device, as long as this lives.
struct Volume(String);

impl Volume {
    fn of(file: &Path) -> Option<Self> {
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        tool("losetup", &["--detach", &self.0]);
    }
}

/// With something else on it, as on a volume that was another's.
#[test]
fn a_disk_moves_into_a_volume_and_an_attempt_that_failed_there_is_gone_on_with() {
    let plan = Plan { drivers: ["file", "host_device"], ..Plan::small("qcow2", "raw") };
    let Some(mut disks) = Disks::start(Setup::new(), plan) else { return };
    let file = disks.lab.directory().join("volume");
    assert!(tool("qemu-img", &["create", "-q", "-f", "raw", file.to_str().unwrap(), "80M"]));
    assert!(tool("qemu-io", &["-f", "raw", "-c", &format!("write -P 165 0 {}", 80 * MIB), file.to_str().unwrap()]));
    let Some(volume) = Volume::of(&file) else { return println!("SKIPPED: no loop device can be had") };
    std::os::unix::fs::symlink(&volume.0, disk_of(&disks.lab, B)).unwrap();
    expect_there(&ahead(&disks, &[]));
    disks.is_only_at(A);
    moves_again(&mut disks);
    disks.disk_is_whole();
}

#[test]
fn a_gateway_killed_while_disks_are_copied_ahead_leaves_the_guest_alone() {
    if !long() {
        return;
    }
    let Some(mut disks) = Disks::start(Setup::new(), Plan::small("qcow2", "raw")) else { return };
    for victim in [A, B] {
        let running = start_ahead(&disks, &["--bandwidth", "2MiB/s"]);
        wait_for("disks under way", || {
            let active = disks.lab.active_migration(A)?;
            (active["progress"]["wire_bytes"].as_u64().unwrap_or(0) > MIB).then_some(())
        });
        disks.lab.gateway_mut(victim).kill();
        std::thread::sleep(Duration::from_millis(500));
        disks.lab.gateway_mut(victim).start();
        drop(running);
        disks.is_only_at(A);
        disks.nothing_laid_at(B);
    }
    expect_there(&ahead(&disks, &[]));
    moves_again(&mut disks);
    disks.disk_is_whole();
}
