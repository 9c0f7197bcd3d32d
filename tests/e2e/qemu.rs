//! An unmodified QEMU moves: real QEMUs, real gateways, a guest that notices a page that is not its own and a beat that is missing.
//!
//! Every QEMU has a second monitor for the test to look at; the first is its gateway's alone. `SEALANE_QEMU_CRASHES=100` makes the
//! kills many, `SEALANE_SEED` repeats one, `SEALANE_QEMU_OLD=PATH` is an older QEMU to come from.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sealane::hypervisor::{RunState, qemu};
use serde_json::Value;

use crate::command::{Running, wait_for};
use crate::crash::Records;
use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, Setup};
use crate::random::{Random, number};
use crate::relay::Conditions;

const QEMU: &str = "qemu-system-x86_64";
const LOOK: Duration = Duration::from_secs(5);

/// A lab whose guest is a QEMU's.
pub struct Qemus {
    pub lab: Lab,
    first: Child,
    /// Where the guest is.
    at: Name,
    /// How much of each console was read.
    read: [u64; 2],
    last: Option<u8>,
    beats: usize,
}

fn arguments(rom: &Path) -> Vec<String> {
    let rom = rom.to_str().unwrap();
    // A machine type that every version of use has.
    let fixed = "-nodefaults -machine pc-i440fx-7.2 -accel tcg -m 64 -display none -device isa-debugcon,iobase=0xe9,chardev=console";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    arguments.extend(["-bios", rom, "-uuid", "{uuid}", "-chardev", "file,id=console,path={serial},append=on"].map(str::to_owned));
    arguments.extend(["-qmp", "unix:{socket},server=on,wait=off", "-qmp", "unix:{socket}.look,server=on,wait=off"].map(str::to_owned));
    arguments
}

/// The guest's image, made once; nothing, and a word on it, where it cannot be made or run.
fn rom() -> Option<PathBuf> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    MADE.get_or_init(make_rom).clone()
}

fn make_rom() -> Option<PathBuf> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-{}", std::process::id() % 16));
    std::fs::create_dir_all(&directory).unwrap();
    let (object, image) = (directory.join("guest.o"), directory.join("guest.rom"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/qemu_guest.S");
    let done = |command: &mut Command| command.status().is_ok_and(|status| status.success());
    let made = done(Command::new("as").args(["--32", "-o"]).args([&object, &source]))
        && done(Command::new("ld").args(["-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o"]).args([&image, &object]));
    if !made || Command::new(QEMU).arg("--version").output().is_err() {
        println!("SKIPPED: no {QEMU}, `as` or `ld`");
        return None;
    }
    Some(image)
}

impl Qemus {
    pub fn start(setup: Setup) -> Option<Self> {
        Self::start_with(setup, QEMU, |arguments| arguments)
    }

    /// `here` is A's QEMU; `there` changes how B starts one.
    fn start_with(setup: Setup, here: &str, there: fn(Vec<String>) -> Vec<String>) -> Option<Self> {
        let rom = rom()?;
        let template = |program: &str, arguments: Vec<String>| {
            let waits = ["-incoming", "defer", "-S"].map(str::to_owned).to_vec();
            let command = [vec![program.to_owned()], arguments, waits].concat();
            format!("\n[[template]]\nname = \"small\"\ncommand = {command:?}\nmax_memory = \"1GiB\"\n")
        };
        let program = here;
        let (here, there) = (template(program, arguments(&rom)), template(QEMU, there(arguments(&rom))));
        let setup = setup
            .replace(A, "socket = \"run/guest.sock\"\n", "qmp = \"run/first.qmp\"\ntemplate = \"small\"\n")
            .edit(A, move |text| text + &here)
            .replace(B, "tenant = \"acme\"", "template = \"small\"\ntenant = \"acme\"")
            .edit(B, move |text| text + &there);
        let mut lab = setup.prepare();
        let run = lab.gateway(A).directory().join("run");
        let fill = |argument: String| {
            let argument = argument.replace("{uuid}", UUID).replace("{socket}", run.join("first.qmp").to_str().unwrap());
            argument.replace("{serial}", lab.console(A).to_str().unwrap())
        };
        let first = Command::new(program).args(arguments(&rom).into_iter().map(fill)).stdin(Stdio::null()).spawn().unwrap();
        wait_for("a QEMU that answers", || qemu::observe(&run.join("first.qmp.look"), "first", LOOK).ok());
        for name in [A, B] {
            lab.gateway_mut(name).start();
        }
        let mut qemus = Self { lab, first, at: A, read: [0; 2], last: None, beats: 0 };
        qemus.beats_on();
        Some(qemus)
    }

    /// Monitors of the QEMUs at a gateway, for looking.
    fn monitors(&self, name: Name) -> Vec<PathBuf> {
        monitors(self.lab.gateway(name).directory())
    }

    fn states(&self, name: Name) -> Vec<RunState> {
        states(self.lab.gateway(name).directory())
    }

    /// Every beat until now follows the one before it, wherever it was said.
    #[track_caller]
    fn hear(&mut self, order: &[Name]) {
        for name in order {
            let Ok(mut console) = File::open(self.lab.console(*name)) else { continue };
            console.seek(SeekFrom::Start(self.read[*name as usize])).unwrap();
            let mut said = Vec::new();
            console.read_to_end(&mut said).unwrap();
            self.read[*name as usize] += said.len() as u64;
            self.beats += said.len();
            for beat in said {
                if let Some(last) = self.last {
                    assert_eq!(beat, last.wrapping_add(1), "beat {} on {name:?}", self.beats);
                }
                self.last = Some(beat);
            }
        }
    }

    /// The guest beats where it is.
    #[track_caller]
    fn beats_on(&mut self) {
        let before = self.beats;
        wait_for("beats", || {
            self.hear(&[self.at]);
            (self.beats > before + 20).then_some(())
        });
    }

    /// The guest runs there and nowhere else, as both gateways say, and has missed and repeated nothing.
    #[track_caller]
    pub fn is_only_at(&mut self, name: Name) {
        wait_for(&format!("a guest on {name:?} only: {:?} {:?}", self.states(A), self.states(B)), || {
            (self.states(name) == [RunState::Running] && self.states(name.other()).is_empty()).then_some(())
        });
        wait_for("the gateways to see it", || {
            let (here, there) = (self.lab.vm(name), self.lab.vm(name.other()));
            (here["state"] == "running" && here["driver"] == "qemu" && there["state"] == "gone").then_some(())
        });
        self.hear(&[self.at, name]);
        self.at = name;
        self.beats_on();
        let there = self.read[name.other() as usize];
        let length = std::fs::metadata(self.lab.console(name.other())).map_or(0, |file| file.len());
        assert_eq!(length, there, "another copy beats");
        for name in [A, B] {
            self.lab.gateway(name).audit_verifies();
        }
    }

    /// Where it runs once nothing is open.
    #[track_caller]
    fn settle(&mut self) -> Name {
        let name = wait_for("one running copy", || {
            let running = [A, B].map(|name| self.states(name).contains(&RunState::Running));
            let name = match running {
                [true, false] => A,
                [false, true] => B,
                [false, false] => return None,
                [true, true] => panic!("it runs twice"),
            };
            let (here, there) = (self.lab.vm(name), self.lab.vm(name.other()));
            (here["state"] == "running" && there["state"] == "gone").then_some(name)
        });
        self.is_only_at(name);
        name
    }

    #[track_caller]
    fn slow(&self, flags: &[&str]) -> (Running, String) {
        let mut running = self.lab.start_migrate(self.at, &[&["--compress", "none", "--bandwidth", "1MiB/s"], flags].concat());
        let id = wait_for("a stream", || {
            running.must_go_on();
            let active = self.lab.active_migration(self.at)?;
            let sent = active["progress"]["wire_bytes"].as_u64().unwrap_or(0);
            (active["progress"]["phase"] == "memory" && sent > 0).then(|| active["id"].as_str().unwrap().to_owned())
        });
        (running, id)
    }
}

impl Drop for Qemus {
    fn drop(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

fn monitors(gateway: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(gateway.join("run")).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|ending| ending == "look")).collect()
}

/// Of those that live.
fn states(gateway: &Path) -> Vec<RunState> {
    monitors(gateway).iter().filter_map(|path| qemu::observe(path, "vm", LOOK).ok()).map(|status| status.state).collect()
}

/// Looks all the time whether two copies run at once. The monitors are its own while it does.
struct OneCopy {
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<bool>>,
}

impl OneCopy {
    fn watch(qemus: &Qemus) -> Self {
        let directories = [A, B].map(|name| qemus.lab.gateway(name).directory().to_owned());
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let running = || {
                let looked = directories.iter().flat_map(|directory| monitors(directory));
                looked
                    .filter(|path| qemu::observe(path, "vm", LOOK).is_ok_and(|status| status.state == RunState::Running))
                    .collect::<Vec<_>>()
            };
            while !seen.load(Ordering::SeqCst) {
                let before = running();
                // One look is not at one time: a guest may move between. Who ran before and runs after ran meanwhile.
                let after = if before.len() > 1 { running() } else { Vec::new() };
                if after.iter().filter(|path| before.contains(path)).count() > 1 {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            false
        });
        Self { ended, thread: Some(thread) }
    }

    #[track_caller]
    fn end(mut self) {
        self.ended.store(true, Ordering::SeqCst);
        assert!(!self.thread.take().unwrap().join().unwrap(), "two copies ran at once");
    }
}

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
        let watch = OneCopy::watch(&qemus);
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
    assert_ne!(said.code, 0, "{said:?}");
    wait_for("no twin", || qemus.states(B).is_empty().then_some(()));
}

fn processes_with(path: &Path) -> Vec<rustix::process::Pid> {
    let wanted = path.to_str().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let arguments = std::fs::read(entry.path().join("cmdline")).ok()?;
        let mine = String::from_utf8_lossy(&arguments).contains(wanted);
        mine.then(|| rustix::process::Pid::from_raw(pid)).flatten()
    });
    pids.collect()
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
        let watch = OneCopy::watch(&qemus);
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
