//! Two gateways and a real QEMU, with a guest that notices a page that is not its own and a beat that is missing.
//!
//! Every QEMU has a second monitor for the test to look at; the first is its gateway's alone.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sealane::hypervisor::{RunState, qemu};
use serde_json::{Value, json};

use crate::command::{Running, wait_for};
use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, Setup};

pub const QEMU: &str = "qemu-system-x86_64";
pub const LOOK: Duration = Duration::from_secs(5);

/// A lab whose guest is a QEMU's.
pub struct Qemus {
    pub lab: Lab,
    pub first: Child,
    /// Where the guest is.
    pub at: Name,
    /// How much of each console was read.
    read: [u64; 2],
    last: Option<u8>,
    beats: usize,
}

pub fn arguments(rom: &Path) -> Vec<String> {
    let rom = rom.to_str().unwrap();
    // A machine type that every version of use has.
    let fixed = "-nodefaults -machine pc-i440fx-7.2 -accel tcg -m 64 -display none -device isa-debugcon,iobase=0xe9,chardev=console";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    arguments.extend(["-bios", rom, "-uuid", "{uuid}", "-chardev", "file,id=console,path={serial},append=on"].map(str::to_owned));
    arguments.extend(["-qmp", "unix:{socket},server=on,wait=off", "-qmp", "unix:{socket}.look,server=on,wait=off"].map(str::to_owned));
    arguments
}

/// The guest's image, made once; nothing, and a word on it, where it cannot be made or run.
pub fn rom() -> Option<PathBuf> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    MADE.get_or_init(|| assembled("qemu_guest.S", &[])).clone()
}

/// The image that a file of these tests assembles to, where QEMU and `also` are there to run it.
pub fn assembled(source: &str, also: &[&str]) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e").join(source);
    let stem = source.file_stem().unwrap().to_str().unwrap();
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{stem}-{}", std::process::id() % 16));
    std::fs::create_dir_all(&directory).unwrap();
    let (object, image) = (directory.join("guest.o"), directory.join("guest.rom"));
    let done = |command: &mut Command| command.status().is_ok_and(|status| status.success());
    let made = done(Command::new("as").args(["--32", "-o"]).args([&object, &source]))
        && done(Command::new("ld").args(["-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o"]).args([&image, &object]));
    let found = |program: &&str| Command::new(program).arg("--version").output().is_ok();
    if !made || ![QEMU].iter().chain(also).all(found) {
        println!("SKIPPED: no {QEMU}, `as` or `ld`, or one of {also:?}");
        return None;
    }
    Some(image)
}

impl Qemus {
    pub fn start(setup: Setup) -> Option<Self> {
        Self::start_with(setup, QEMU, |arguments| arguments)
    }

    /// `here` is A's QEMU; `there` changes how B starts one.
    pub fn start_with(setup: Setup, here: &str, there: fn(Vec<String>) -> Vec<String>) -> Option<Self> {
        Self::start_as(setup, [here, QEMU], |arguments| arguments, there)
    }

    /// The QEMUs of A and B, what changes both, and what changes B's alone.
    pub fn start_as(
        setup: Setup,
        [here, program_there]: [&str; 2],
        both: fn(Vec<String>) -> Vec<String>,
        there: fn(Vec<String>) -> Vec<String>,
    ) -> Option<Self> {
        let rom = rom()?;
        let arguments = |rom: &Path| both(arguments(rom));
        let template = |program: &str, arguments: Vec<String>| {
            let waits = ["-incoming", "defer", "-S"].map(str::to_owned).to_vec();
            let command = [vec![program.to_owned()], arguments, waits].concat();
            format!("\n[[template]]\nname = \"small\"\ncommand = {command:?}\nmax_memory = \"1GiB\"\n")
        };
        let program = here;
        let (here, there) = (template(program, arguments(&rom)), template(program_there, there(arguments(&rom))));
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
    pub fn monitors(&self, name: Name) -> Vec<PathBuf> {
        monitors(self.lab.gateway(name).directory())
    }

    pub fn states(&self, name: Name) -> Vec<RunState> {
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

    /// The guest goes on where it is, and no other QEMU is there.
    #[track_caller]
    pub fn stays(&mut self, case: &str) {
        let alone = |here: &Self| here.states(here.at) == [RunState::Running] && here.states(here.at.other()).is_empty();
        wait_for(&format!("{case}: a guest on {:?} only", self.at), || alone(self).then_some(()));
        let before = self.beats;
        wait_for(&format!("{case}: a beat"), || {
            self.hear(&[self.at]);
            (self.beats > before).then_some(())
        });
    }

    /// Where it runs once nothing is open.
    #[track_caller]
    pub fn settle(&mut self) -> Name {
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
    pub fn slow(&self, flags: &[&str]) -> (Running, String) {
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

/// Monitors of the QEMUs at a gateway, for looking.
pub fn monitors(gateway: &Path) -> Vec<PathBuf> {
    // A lab that is gone has none.
    let entries = std::fs::read_dir(gateway.join("run")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|ending| ending == "look")).collect()
}

/// Of those that live.
fn states(gateway: &Path) -> Vec<RunState> {
    monitors(gateway).iter().filter_map(|path| qemu::observe(path, "vm", LOOK).ok()).map(|status| status.state).collect()
}

/// Looks all the time whether two copies run at once. The monitors are its own while it does.
pub struct OneCopy {
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<bool>>,
}

impl OneCopy {
    pub fn watch(lab: &Lab) -> Self {
        let directories = [A, B].map(|name| lab.gateway(name).directory().to_owned());
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
    pub fn end(mut self) {
        self.ended.store(true, Ordering::SeqCst);
        assert!(!self.thread.take().unwrap().join().unwrap(), "two copies ran at once");
    }
}

/// Processes whose command line names a path.
pub fn processes_with(path: &Path) -> Vec<rustix::process::Pid> {
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

/// What a monitor answers.
#[track_caller]
pub fn ask(monitor: &Path, command: &str, arguments: &Value) -> Value {
    let mut answer = Value::Null;
    let mut stream = UnixStream::connect(monitor).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut asked = json!({ "execute": command });
    if !arguments.is_null() {
        asked["arguments"] = arguments.clone();
    }
    for command in [json!({ "execute": "qmp_capabilities" }), asked] {
        stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        loop {
            line.clear();
            // One that quits may say nothing more.
            if reader.read_line(&mut line).unwrap() == 0 {
                return Value::Null;
            }
            answer = serde_json::from_str(&line).unwrap();
            if answer.get("event").is_none() {
                break;
            }
        }
    }
    answer["return"].clone()
}
