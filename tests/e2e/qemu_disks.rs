//! Disks move with a QEMU's guest: real QEMUs and gateways, and a guest that looks at every record it ever wrote.
//!
//! `SEALANE_QEMU_DISKS=1` runs those that take long.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use sealane::hypervisor::{RunState, qemu};
use serde_json::{Value, json};

use crate::command::{Running, wait_for};
use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, Setup};
use crate::qemus::{LOOK, QEMU, ask};
use crate::relay::Conditions;

pub const MIB: u64 = 1 << 20;

/// What the disk is at each end.
#[derive(Clone)]
pub struct Plan {
    pub bytes: u64,
    /// Format and what more is said of the disk in the configuration, of A and B.
    pub ends: [(&'static str, String); 2],
    /// Bytes that are no zeroes, behind the guest's records.
    pub filled: u64,
}

impl Plan {
    pub fn small(a: &'static str, b: &'static str) -> Self {
        Self { bytes: 64 * MIB, ends: [(a, String::new()), (b, String::new())], filled: 16 * MIB }
    }
}

/// A lab whose guest is a QEMU's with a disk.
pub struct Disks {
    pub lab: Lab,
    first: Child,
    plan: Plan,
    at: Name,
    read: [u64; 2],
    last: Option<u8>,
    beats: usize,
}

/// The guest's image, made once; nothing, and a word on it, where it cannot be made or run.
fn rom() -> Option<PathBuf> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    MADE.get_or_init(make_rom).clone()
}

fn make_rom() -> Option<PathBuf> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-disks-{}", std::process::id() % 16));
    std::fs::create_dir_all(&directory).unwrap();
    let (object, image) = (directory.join("guest.o"), directory.join("guest.rom"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/qemu_disk_guest.S");
    let done = |command: &mut Command| command.status().is_ok_and(|status| status.success());
    let made = done(Command::new("as").args(["--32", "-o"]).args([&object, &source]))
        && done(Command::new("ld").args(["-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o"]).args([&image, &object]));
    let found = |program| Command::new(program).arg("--version").output().is_ok();
    if !made || !found(QEMU) || !found("qemu-img") || !found("qemu-io") {
        println!("SKIPPED: no {QEMU}, `qemu-img`, `qemu-io`, `as` or `ld`");
        return None;
    }
    Some(image)
}

/// Whether the long ones are run.
pub fn long() -> bool {
    let asked = std::env::var_os("SEALANE_QEMU_DISKS").is_some();
    if !asked {
        println!("SKIPPED: takes long; SEALANE_QEMU_DISKS=1 runs it");
    }
    asked
}

fn arguments(format: &str) -> Vec<String> {
    let rom = rom().unwrap();
    let fixed = "-nodefaults -machine pc-i440fx-7.2 -accel tcg -m 64 -display none -device isa-debugcon,iobase=0xe9,chardev=console";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    let disk = format!("driver={format},node-name=root,discard=unmap,file.driver=file,file.discard=unmap,file.filename={{serial}}.disk");
    arguments.extend(["-bios", rom.to_str().unwrap(), "-uuid", "{uuid}"].map(str::to_owned));
    arguments.extend(["-chardev", "file,id=console,path={serial},append=on", "-blockdev", &disk].map(str::to_owned));
    arguments.extend(["-device", "ide-hd,id=disk0,bus=ide.0,drive=root"].map(str::to_owned));
    arguments.extend(["-qmp", "unix:{socket},server=on,wait=off", "-qmp", "unix:{socket}.look,server=on,wait=off"].map(str::to_owned));
    arguments
}

fn tool(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success()
}

impl Disks {
    pub fn start(setup: Setup, plan: Plan) -> Option<Self> {
        rom()?;
        let mut setup = setup;
        for name in [A, B] {
            let (format, more) = plan.ends[name as usize].clone();
            let waits = ["-incoming", "defer", "-S"].map(str::to_owned).to_vec();
            let command = [vec![QEMU.to_owned()], arguments(format), waits].concat();
            let disk = format!(
                "[[vm.disk]]\ndevice = \"disk0\"\nfile = \"run/{}.serial.disk\"\nformat = \"{format}\"\nexisting = \"set-aside\"\n{more}\n",
                crate::lab::VM
            );
            let template = format!("\n[[template]]\nname = \"disk\"\ncommand = {command:?}\nmax_memory = \"1GiB\"\n");
            let socket = if name == A { "socket = \"run/guest.sock\"\ntenant" } else { "tenant" };
            let here = if name == A { "qmp = \"run/first.qmp\"\ntemplate = \"disk\"\ntenant" } else { "template = \"disk\"\ntenant" };
            setup = setup
                .replace(name, socket, here)
                .replace(name, "migratable = true\n", &format!("migratable = true\n{disk}"))
                .edit(name, move |text| text + &template);
        }
        let mut lab = setup.prepare();
        let run = lab.gateway(A).directory().join("run");
        let fill = |argument: String| {
            let argument = argument.replace("{uuid}", UUID).replace("{socket}", run.join("first.qmp").to_str().unwrap());
            argument.replace("{serial}", lab.console(A).to_str().unwrap())
        };
        let format = plan.ends[A as usize].0;
        let disk = disk_of(&lab, A);
        let disk = disk.to_str().unwrap();
        assert!(tool("qemu-img", &["create", "-q", "-f", format, disk, &plan.bytes.to_string()]));
        if plan.filled > 0 {
            assert!(tool("qemu-io", &["-f", format, "-c", &format!("write -P 90 {} {}", BEHIND, plan.filled), disk]));
        }
        let first = Command::new(QEMU).args(arguments(format).into_iter().map(fill)).stdin(Stdio::null()).spawn().unwrap();
        wait_for("a QEMU that answers", || qemu::observe(&run.join("first.qmp.look"), "first", LOOK).ok());
        for name in [A, B] {
            lab.gateway_mut(name).start();
        }
        let mut disks = Self { lab, first, plan, at: A, read: [0; 2], last: None, beats: 0 };
        disks.beats_on(130);
        Some(disks)
    }

    fn monitors(&self, name: Name) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.lab.gateway(name).directory().join("run")).unwrap();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|ending| ending == "look")).collect()
    }

    pub fn states(&self, name: Name) -> Vec<RunState> {
        self.monitors(name).iter().filter_map(|path| qemu::observe(path, "vm", LOOK).ok()).map(|status| status.state).collect()
    }

    /// Every record until now follows the one before it, wherever it was written.
    #[track_caller]
    fn hear(&mut self, name: Name) {
        let Ok(mut console) = File::open(self.lab.console(name)) else { return };
        console.seek(SeekFrom::Start(self.read[name as usize])).unwrap();
        let mut said = Vec::new();
        console.read_to_end(&mut said).unwrap();
        self.read[name as usize] += said.len() as u64;
        self.beats += said.len();
        for beat in said {
            if let Some(last) = self.last {
                assert_eq!(beat, last.wrapping_add(1), "record {} on {name:?}", self.beats);
            }
            self.last = Some(beat);
        }
    }

    /// The guest goes on where it is. More than 64 records are twice over its disk.
    #[track_caller]
    pub fn beats_on(&mut self, more: usize) {
        let before = self.beats;
        wait_for("records", || {
            self.hear(self.at);
            (self.beats > before + more).then_some(())
        });
    }

    /// The guest runs there and nowhere else, and nothing of ours is left at its QEMU.
    #[track_caller]
    pub fn is_only_at(&mut self, name: Name) {
        wait_for(&format!("a guest on {name:?} only: {:?} {:?}", self.states(A), self.states(B)), || {
            (self.states(name) == [RunState::Running] && self.states(name.other()).is_empty()).then_some(())
        });
        wait_for("the gateways to see it", || {
            let (here, there) = (self.lab.vm(name), self.lab.vm(name.other()));
            (here["state"] == "running" && there["state"] == "gone").then_some(())
        });
        self.hear(self.at);
        self.hear(name);
        self.at = name;
        self.beats_on(130);
        wait_for("a QEMU without anything of ours", || {
            let jobs = self.ask("query-jobs", &Value::Null);
            let nodes = self.ask("query-named-block-nodes", &json!({ "flat": true }));
            let exports = self.ask("query-block-exports", &Value::Null);
            (jobs == json!([]) && exports == json!([]) && !nodes.to_string().contains("sealane")).then_some(())
        });
        for name in [A, B] {
            self.lab.gateway(name).audit_verifies();
        }
    }

    /// What the QEMU where the guest is says to the test.
    #[track_caller]
    pub fn ask(&self, command: &str, arguments: &Value) -> Value {
        let running = self.monitors(self.at).into_iter().find(|path| qemu::observe(path, "vm", LOOK).is_ok()).unwrap();
        ask(&running, command, arguments)
    }

    /// What never changes is on the disk where the guest is; its QEMU ends.
    #[track_caller]
    pub fn disk_is_whole(mut self) {
        let (format, filled) = (self.plan.ends[self.at as usize].0, self.plan.filled);
        self.ask("quit", &Value::Null);
        wait_for("a QEMU that has ended", || {
            let _ = self.first.try_wait();
            self.states(self.at).is_empty().then_some(())
        });
        let disk = disk_of(&self.lab, self.at);
        let disk = disk.to_str().unwrap();
        assert!(tool("qemu-io", &["-f", format, "-c", &format!("read -P 90 {BEHIND} {filled}"), disk]), "the pattern");
        let (behind, rest) = (BEHIND + filled, self.plan.bytes - BEHIND - filled);
        assert!(tool("qemu-io", &["-f", format, "-c", &format!("read -P 0 {behind} {rest}"), disk]), "the zeroes");
        let checked = format == "raw" || tool("qemu-img", &["check", "-q", "-f", format, disk]);
        assert!(checked, "the {format} at {disk}");
    }

    /// A move with its disk that is slow, in this phase.
    #[track_caller]
    fn slow(&self, phase: &str, flags: &[&str]) -> (Running, String) {
        let flags = [&["--storage", "all", "--compress", "none", "--bandwidth", "2MiB/s"], flags].concat();
        let mut running = self.lab.start_migrate(self.at, &flags);
        let id = wait_for("a move under way", || {
            running.must_go_on();
            let active = self.lab.active_migration(self.at)?;
            let sent = active["progress"]["wire_bytes"].as_u64().unwrap_or(0);
            (active["progress"]["phase"] == phase && sent > 0).then(|| active["id"].as_str().unwrap().to_owned())
        });
        (running, id)
    }

    /// A move whose disk is there, and whose memory goes on for a while.
    #[track_caller]
    fn in_memory(&self, flags: &[&str]) -> (Running, String) {
        let flags = [&["--storage", "all", "--compress", "none", "--bandwidth", "8MiB/s"], flags].concat();
        let mut running = self.lab.start_migrate(self.at, &flags);
        let id = wait_for("memory under way", || {
            running.must_go_on();
            let active = self.lab.active_migration(self.at)?;
            (active["progress"]["phase"] == "memory").then(|| active["id"].as_str().unwrap().to_owned())
        });
        self.lab.gateway(self.at).command(&["set", &id, "bandwidth=1MiB/s"]).expect(0, &[]);
        (running, id)
    }

    /// Nothing is left of a disk that did not come.
    #[track_caller]
    pub fn nothing_laid_at(&self, name: Name) {
        wait_for("no file of a disk", || {
            let entries = std::fs::read_dir(self.lab.gateway(name).directory().join("run")).unwrap();
            let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            let left = |name: &String| [".disk", ".new", ".nbd", ".disks"].iter().any(|end| name.ends_with(end));
            (!names.iter().any(left)).then_some(())
        });
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

/// Where what the guest never touches begins.
const BEHIND: u64 = 16 * MIB;

fn disk_of(lab: &Lab, name: Name) -> PathBuf {
    let mut disk = lab.console(name).into_os_string();
    disk.push(".disk");
    disk.into()
}

#[track_caller]
fn moved(report: &Value, bytes: u64) {
    let disks = &report["disks"];
    assert_eq!((&disks["count"], &disks["bytes"]), (&1.into(), &bytes.into()), "{report}");
    let of = |name: &str| disks[name].as_u64().unwrap();
    assert!(of("changed_bytes") + of("held_bytes") >= bytes, "{report}");
}

/// A second attempt, of which nearly nothing of the disk goes over the wire.
#[track_caller]
pub fn moved_again(report: &Value, bytes: u64) {
    moved(report, bytes);
    // The guest's records lie in what is left, 64 blocks of 64 KiB, which change all the time.
    let (held, changed) = (report["disks"]["held_bytes"].as_u64().unwrap(), &report["disks"]["changed_bytes"]);
    assert!(held > bytes - 10 * MIB && report["disks"]["verified"] == true, "{report}");
    println!("a second attempt: {held} of {bytes} bytes were there, {changed} changed, {} on the wire", report["wire_bytes"]);
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
    let report = disks.lab.migrate(A, &["--storage", "all", "--verify-disks", "--compress", "none"]).expect_moved();
    moved_again(&report, 64 * MIB);
    disks.is_only_at(B);
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
        let report = disks.lab.migrate(A, &["--storage", "all", "--verify-disks", "--compress", "none"]).expect_moved();
        moved_again(&report, 64 * MIB);
        disks.is_only_at(B);
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
