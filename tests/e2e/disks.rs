//! Two gateways and a real QEMU with a disk, and a guest that looks at every record it ever wrote.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use sealane::hypervisor::{RunState, qemu};
use serde_json::{Value, json};

use crate::command::{Running, wait_for};
use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, Setup};
use crate::qemus::{LOOK, QEMU, ask, assembled};

pub const MIB: u64 = 1 << 20;

/// What the disk is at each end.
#[derive(Clone)]
pub struct Plan {
    pub bytes: u64,
    /// Format and what more is said of the disk in the configuration, of A and B.
    pub ends: [(&'static str, String); 2],
    /// Bytes that are no zeroes, behind the guest's records.
    pub filled: u64,
    /// How QEMU opens the file of each.
    pub drivers: [&'static str; 2],
    /// Whether there is another disk, which the guest leaves alone: 8 MiB, raw, 3 of them filled.
    pub second: bool,
    /// Whether the image at A is encrypted; nothing can be filled then.
    pub secret: bool,
}

impl Plan {
    pub fn small(a: &'static str, b: &'static str) -> Self {
        Self {
            bytes: 64 * MIB,
            ends: [(a, String::new()), (b, String::new())],
            filled: 16 * MIB,
            drivers: ["file"; 2],
            second: false,
            secret: false,
        }
    }
}

/// What opens an encrypted image.
const SECRET: &str = "secret,id=key,data=sealane";

/// A lab whose guest is a QEMU's with a disk.
pub struct Disks {
    pub lab: Lab,
    pub first: Child,
    plan: Plan,
    /// Where the guest is.
    pub at: Name,
    read: [u64; 2],
    last: Option<u8>,
    beats: usize,
}

/// The guest's image, made once; nothing, and a word on it, where it cannot be made or run.
pub fn rom() -> Option<PathBuf> {
    static MADE: OnceLock<Option<PathBuf>> = OnceLock::new();
    MADE.get_or_init(|| assembled("qemu_disk_guest.S", &["qemu-img", "qemu-io"])).clone()
}

/// The command line of a guest's QEMU, with its variables.
pub fn arguments(plan: &Plan, name: Name) -> Vec<String> {
    let (format, file) = (plan.ends[name as usize].0, plan.drivers[name as usize]);
    let rom = rom().unwrap();
    let fixed = "-nodefaults -machine pc-i440fx-7.2 -accel tcg -m 64 -display none -device isa-debugcon,iobase=0xe9,chardev=console";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    let disk = format!("driver={format},node-name=root,discard=unmap,file.driver={file},file.discard=unmap,file.filename={{serial}}.disk");
    arguments.extend(["-bios", rom.to_str().unwrap(), "-uuid", "{uuid}"].map(str::to_owned));
    let disk = if plan.secret && name == A { disk + ",encrypt.format=luks,encrypt.key-secret=key" } else { disk };
    if plan.secret {
        arguments.extend(["-object", SECRET].map(str::to_owned));
    }
    arguments.extend(["-chardev", "file,id=console,path={serial},append=on", "-blockdev", &disk].map(str::to_owned));
    arguments.extend(["-device", "ide-hd,id=disk0,bus=ide.0,drive=root"].map(str::to_owned));
    if plan.second {
        let second = "driver=raw,node-name=second,file.driver=file,file.filename={serial}.second";
        arguments.extend(["-blockdev", second, "-device", "ide-hd,id=disk1,bus=ide.1,drive=second"].map(str::to_owned));
    }
    arguments.extend(["-qmp", "unix:{socket},server=on,wait=off", "-qmp", "unix:{socket}.look,server=on,wait=off"].map(str::to_owned));
    arguments
}

pub fn tool(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success()
}

impl Disks {
    pub fn start(setup: Setup, plan: Plan) -> Option<Self> {
        rom()?;
        let mut setup = setup;
        for name in [A, B] {
            let (format, more) = plan.ends[name as usize].clone();
            let waits = ["-incoming", "defer", "-S"].map(str::to_owned).to_vec();
            let command = [vec![QEMU.to_owned()], arguments(&plan, name), waits].concat();
            let disk = format!(
                "[[vm.disk]]\ndevice = \"disk0\"\nfile = \"run/{}.serial.disk\"\nformat = \"{format}\"\nexisting = \"set-aside\"\n{more}\n",
                crate::lab::VM
            );
            let second = format!("[[vm.disk]]\ndevice = \"disk1\"\nfile = \"run/{}.serial.second\"\nformat = \"raw\"\n", crate::lab::VM);
            let disk = if plan.second { disk + &second } else { disk };
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
        let encrypted = ["--object", SECRET, "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"];
        let more = if plan.secret { &encrypted[..] } else { &[] };
        assert!(tool("qemu-img", &[&["create", "-q", "-f", format], more, &[disk, &plan.bytes.to_string()]].concat()));
        if plan.filled > 0 {
            assert!(tool("qemu-io", &["-f", format, "-c", &format!("write -P 90 {} {}", BEHIND, plan.filled), disk]));
        }
        if plan.second {
            let second = disk.replace(".disk", ".second");
            assert!(tool("qemu-img", &["create", "-q", "-f", "raw", &second, "8M"]));
            assert!(tool("qemu-io", &["-f", "raw", "-c", "write -P 91 0 3M", &second]));
        }
        let first = Command::new(QEMU).args(arguments(&plan, A).into_iter().map(fill)).stdin(Stdio::null()).spawn().unwrap();
        wait_for("a QEMU that answers", || qemu::observe(&run.join("first.qmp.look"), "first", LOOK).ok());
        for name in [A, B] {
            lab.gateway_mut(name).start();
        }
        let mut disks = Self { lab, first, plan, at: A, read: [0; 2], last: None, beats: 0 };
        disks.beats_on(130);
        Some(disks)
    }

    pub fn monitors(&self, name: Name) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.lab.gateway(name).directory().join("run")).unwrap();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|ending| ending == "look")).collect()
    }

    pub fn states(&self, name: Name) -> Vec<RunState> {
        self.monitors(name).iter().filter_map(|path| qemu::observe(path, "vm", LOOK).ok()).map(|status| status.state).collect()
    }

    /// Every record until now follows the one before it, wherever it was written.
    #[track_caller]
    pub fn hear(&mut self, name: Name) {
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
    pub fn slow(&self, phase: &str, flags: &[&str]) -> (Running, String) {
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
    pub fn in_memory(&self, flags: &[&str]) -> (Running, String) {
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
pub const BEHIND: u64 = 16 * MIB;

pub fn disk_of(lab: &Lab, name: Name) -> PathBuf {
    let mut disk = lab.console(name).into_os_string();
    disk.push(".disk");
    disk.into()
}
