//! A client of a Linux guest keeps its one TCP connection while the guest moves there and back with its disk: a bridge, two taps and a
//! client in a network namespace. What the guest was told it writes to its memory and to its disk, numbered, before it answers.
//!
//! `SEALANE_QEMU_OLD` is an older QEMU, whose guests move too: to the same, and to the one on the `PATH`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sealane::hypervisor::{RunState, qemu};
use serde_json::Value;

use crate::command::wait_for;
use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, Setup};
use crate::qemus::{LOOK, QEMU, ask};

const GUEST: &str = "10.77.0.2";
const DISK_BYTES: u64 = 16 << 20;
/// Numbers that are kept at once, each in another block of the disk.
const KEPT: u64 = 64;
const BLOCK: usize = 4096;

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /tmp
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
for m in failover net_failover virtio_net virtio_blk; do /bin/busybox insmod /$m.ko; done
/bin/busybox ip link set eth0 up
/bin/busybox ip addr add 10.77.0.2/24 dev eth0
while :; do /bin/busybox nc -l -p 7000 -e /talk; done
"#;

/// Says each line back with how many there were, once that number is where it belongs, in place of the one 64 before.
const TALK: &str = r#"#!/bin/busybox sh
n=0
while read -r line; do
  n=$((n + 1)) f=/tmp/$((n % 64)) at=$((n % 64))
  if [ $n -gt 64 ]; then
    [ "$(/bin/busybox cat $f)" = $((n - 64)) ] || exec echo "memory lost $n"
    [ "$(/bin/busybox dd if=/dev/vda bs=4096 skip=$at count=1 2>/dev/null | /bin/busybox head -n 1)" = $((n - 64)) ] || exec echo "disk lost $n"
  fi
  echo $n >$f
  { echo $n; /bin/busybox head -c 4096 /dev/zero; } | /bin/busybox dd of=/dev/vda bs=4096 seek=$at count=1 iflag=fullblock conv=notrunc,fsync 2>/dev/null
  echo "$line $n"
done
"#;

/// What the guest is made of; nothing, and a word on it, where a part is missing.
fn parts() -> Option<(PathBuf, PathBuf)> {
    let skip = |why: &str| {
        println!("SKIPPED: {why}");
        None
    };
    let tools = [(QEMU, "--version"), ("qemu-img", "--version"), ("busybox", "true"), ("ip", "-V")];
    for (program, argument) in tools {
        if Command::new(program).arg(argument).output().is_err() {
            return skip(&format!("no `{program}`"));
        }
    }
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
        return skip("a bridge and taps need root and /dev/net/tun");
    }
    let kernel =
        fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path()).filter(|path| path.display().to_string().contains("/vmlinuz-"));
    let Some(kernel) = kernel.max() else { return skip("no kernel in /boot") };
    let release = kernel.display().to_string().replace("/boot/vmlinuz-", "");
    let drivers = Path::new("/lib/modules").join(release).join("kernel");
    let mut files = vec![("bin".to_owned(), 0o040_755, Vec::new())];
    files.push(("bin/busybox".to_owned(), 0o100_755, fs::read("/bin/busybox").ok()?));
    files.push(("init".to_owned(), 0o100_755, INIT.into()));
    files.push(("talk".to_owned(), 0o100_755, TALK.into()));
    for driver in ["net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net", "drivers/block/virtio_blk"] {
        let path = drivers.join(format!("{driver}.ko.xz"));
        let unpacked = Command::new("busybox").arg("xzcat").arg(&path).output().unwrap();
        if !unpacked.status.success() {
            return skip(&format!("no `{}`", path.display()));
        }
        files.push((format!("{}.ko", path.file_name()?.to_str()?.strip_suffix(".ko.xz")?), 0o100_644, unpacked.stdout));
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-network-{}", std::process::id() % 16));
    fs::create_dir_all(&directory).unwrap();
    let initramfs = directory.join("initramfs");
    fs::write(&initramfs, archive(&files)).unwrap();
    Some((kernel, initramfs))
}

/// As the kernel unpacks it (kernel documentation, `driver-api/early-userspace/buffer-format`).
fn archive(files: &[(String, u32, Vec<u8>)]) -> Vec<u8> {
    let end = ("TRAILER!!!".to_owned(), 0, Vec::new());
    let mut out = Vec::new();
    for (index, (path, mode, bytes)) in files.iter().chain([&end]).enumerate() {
        let numbers = [index + 1, *mode as usize, 0, 0, 1, 0, bytes.len(), 0, 0, 0, 0, path.len() + 1, 0];
        out.extend_from_slice(b"070701");
        out.extend(numbers.iter().flat_map(|number| format!("{number:08x}").into_bytes()));
        out.extend(path.bytes().chain([0]));
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

#[track_caller]
fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A bridge with a tap for each gateway's QEMU and a client in a namespace.
struct Network(String);

impl Network {
    fn start(number: u32) -> Self {
        let name = format!("sl{:x}n{number}", std::process::id());
        let network = Self(name.clone());
        ip(&format!("netns add {name}"));
        ip(&format!("link add {name}b type bridge"));
        ip(&format!("link add {name}v type veth peer name client netns {name}"));
        for tap in [A, B].map(|name| network.tap(name)) {
            ip(&format!("tuntap add dev {tap} mode tap"));
        }
        for port in [format!("{name}v"), network.tap(A), network.tap(B)] {
            ip(&format!("link set {port} master {name}b up"));
        }
        ip(&format!("link set {name}b up"));
        ip(&format!("-n {name} addr add 10.77.0.1/24 dev client"));
        ip(&format!("-n {name} link set client up"));
        network
    }

    fn tap(&self, name: Name) -> String {
        format!("{}t{}", self.0, name as usize)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let name = &self.0;
        for gone in [format!("link del {name}b"), format!("link del {name}v"), format!("netns del {name}")] {
            let _ = Command::new("ip").args(gone.split(' ')).output();
        }
        for tap in [A, B].map(|name| self.tap(name)) {
            let _ = Command::new("ip").args(["tuntap", "del", "dev", &tap, "mode", "tap"]).output();
        }
    }
}

/// One connection.
struct Connection {
    child: Child,
    to: ChildStdin,
    from: Receiver<String>,
}

impl Connection {
    fn open(network: &str) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", network, "busybox", "nc", GUEST, "7000"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let (to, out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (lines, from) = sync_channel(64);
        std::thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).for_each(|line| drop(lines.send(line))));
        Self { child, to, from }
    }

    /// What is answered; nothing when the connection has ended or is silent for that long.
    fn ask(&mut self, number: u64, within: Duration) -> Option<String> {
        self.to.write_all(format!("{number}\n").as_bytes()).ok()?;
        self.from.recv_timeout(within).ok()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Talks to the guest all the time.
struct Client {
    ends: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    /// The longest wait for an answer.
    longest: Arc<Mutex<Duration>>,
    thread: Option<JoinHandle<Result<u64, String>>>,
}

impl Client {
    #[track_caller]
    fn start(network: &str) -> Self {
        let mut connection = wait_for("a guest that answers", || {
            let mut connection = Connection::open(network);
            (connection.ask(1, Duration::from_secs(5))? == "1 1").then_some(connection)
        });
        let (ends, answered, longest) = (Arc::<AtomicBool>::default(), Arc::new(AtomicU64::new(1)), Arc::<Mutex<Duration>>::default());
        let shared = (Arc::clone(&ends), Arc::clone(&answered), Arc::clone(&longest));
        let thread = std::thread::spawn(move || {
            let (ends, answered, longest) = shared;
            let mut number = 1;
            loop {
                number += 1;
                let asked = Instant::now();
                let answer = connection.ask(number, Duration::from_secs(60));
                if answer.as_deref() != Some(format!("{number} {number}").as_str()) {
                    return Err(format!("{number} was answered with {answer:?}"));
                }
                let mut longest = longest.lock().unwrap();
                *longest = asked.elapsed().max(*longest);
                answered.store(number, Ordering::SeqCst);
                if ends.load(Ordering::SeqCst) {
                    return Ok(number);
                }
            }
        });
        Self { ends, answered, longest, thread: Some(thread) }
    }

    /// It goes on: more than once around the guest's records.
    #[track_caller]
    fn goes_on(&self, more: u64) {
        let before = self.answered.load(Ordering::SeqCst);
        wait_for("answers", || {
            let now = self.answered.load(Ordering::SeqCst);
            assert!(!self.thread.as_ref().unwrap().is_finished() || now >= before + more, "the connection has ended behind {now}");
            (now >= before + more).then_some(())
        });
    }

    /// How many were answered.
    #[track_caller]
    fn end(mut self) -> u64 {
        self.ends.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap().unwrap()
    }
}

struct Linux {
    lab: Lab,
    first: Child,
    network: Network,
}

impl Drop for Linux {
    fn drop(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

impl Linux {
    /// With the program of each gateway's QEMUs.
    fn start(programs: [&str; 2], number: u32) -> Option<Self> {
        let (kernel, initramfs) = parts()?;
        let network = Network::start(number);
        let arguments = |tap: &str| {
            let fixed = "-nodefaults -no-reboot -machine pc-i440fx-7.2 -accel tcg -cpu qemu64,-cx16 -m 128 -display none";
            let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
            let disk = "driver=raw,node-name=root,discard=unmap,file.driver=file,file.filename={serial}.disk";
            let net = format!("tap,id=net,ifname={tap},script=no,downscript=no");
            let own = [
                ("-kernel", kernel.to_str().unwrap()),
                ("-initrd", initramfs.to_str().unwrap()),
                ("-append", "console=ttyS0 quiet panic=-1"),
                ("-uuid", "{uuid}"),
                ("-chardev", "file,id=console,path={serial},append=on"),
                ("-serial", "chardev:console"),
                ("-blockdev", disk),
                ("-device", "virtio-blk-pci,id=disk0,drive=root"),
                ("-netdev", &net),
                // Without a ROM there is none that differs between versions.
                ("-device", "virtio-net-pci,id=net0,netdev=net,mac=52:54:00:77:00:02,romfile="),
                ("-qmp", "unix:{socket},server=on,wait=off"),
                ("-qmp", "unix:{socket}.look,server=on,wait=off"),
            ];
            arguments.extend(own.iter().flat_map(|(name, value)| [(*name).to_owned(), (*value).to_owned()]));
            arguments
        };
        let mut setup = Setup::new();
        for name in [A, B] {
            let waits = ["-incoming", "defer", "-S"].map(str::to_owned).to_vec();
            let command = [vec![programs[name as usize].to_owned()], arguments(&network.tap(name)), waits].concat();
            let template = format!("\n[[template]]\nname = \"linux\"\ncommand = {command:?}\n");
            let disk = format!(
                "migratable = true\n[[vm.disk]]\ndevice = \"disk0\"\nfile = \"run/{}.serial.disk\"\nexisting = \"set-aside\"\n",
                crate::lab::VM
            );
            let socket = if name == A { "socket = \"run/guest.sock\"\ntenant" } else { "tenant" };
            let here = if name == A { "qmp = \"run/first.qmp\"\ntemplate = \"linux\"\ntenant" } else { "template = \"linux\"\ntenant" };
            setup = setup.replace(name, socket, here).replace(name, "migratable = true\n", &disk).edit(name, move |text| text + &template);
        }
        let mut lab = setup.prepare();
        let run = lab.gateway(A).directory().join("run");
        let fill = |argument: String| {
            let argument = argument.replace("{uuid}", UUID).replace("{socket}", run.join("first.qmp").to_str().unwrap());
            argument.replace("{serial}", lab.console(A).to_str().unwrap())
        };
        fs::File::create(disk_of(&lab, A)).unwrap().set_len(DISK_BYTES).unwrap();
        let arguments = arguments(&network.tap(A)).into_iter().map(fill);
        let first = Command::new(programs[0]).args(arguments).stdin(Stdio::null()).spawn().unwrap();
        wait_for("a QEMU that answers", || qemu::observe(&run.join("first.qmp.look"), "first", LOOK).ok());
        for name in [A, B] {
            lab.gateway_mut(name).start();
        }
        Some(Self { lab, first, network })
    }

    /// Moves, with the disk, as often; and then once more, which has to be refused where an older QEMU would have to take it.
    #[track_caller]
    fn moves(mut self, moves: usize, refused: bool) {
        let client = Client::start(&self.network.0);
        client.goes_on(KEPT + 8);
        let (mut at, mut paused) = (A, Vec::new());
        for _ in 0..moves {
            let report = self.lab.migrate(at, &["--storage", "all", "--verify-disks"]).expect_moved();
            paused.push(report["downtime_seconds"].as_f64().unwrap());
            at = at.other();
            client.goes_on(KEPT + 8);
        }
        if refused {
            self.lab.migrate(at, &["--storage", "all"]).expect_stayed(4, &["QEMU: expected", "or later"]);
            client.goes_on(8);
        }
        let longest = *client.longest.lock().unwrap();
        let answered = client.end();
        self.disk_holds(at, answered);
        println!("one TCP connection over {moves} moves: {answered} answers, the longest after {longest:?}, pauses {paused:?} s");
    }

    /// Every number that was answered is on the disk where the guest is, whose QEMU ends.
    #[track_caller]
    fn disk_holds(&mut self, at: Name, last: u64) {
        let run = fs::read_dir(self.lab.gateway(at).directory().join("run")).unwrap().map(|entry| entry.unwrap().path());
        let running = |path: &PathBuf| qemu::observe(path, "vm", LOOK).is_ok_and(|status| status.state == RunState::Running);
        let monitor = run.filter(|path| path.extension().is_some_and(|ending| ending == "look")).find(running).unwrap();
        ask(&monitor, "quit", &Value::Null);
        wait_for("a QEMU that has ended", || {
            let _ = self.first.try_wait();
            qemu::observe(&monitor, "vm", LOOK).is_err().then_some(())
        });
        let disk = fs::read(disk_of(&self.lab, at)).unwrap();
        for number in last - KEPT + 1..=last {
            let block = &disk[usize::try_from(number % KEPT).unwrap() * BLOCK..][..BLOCK];
            let text = String::from_utf8_lossy(&block[..block.iter().position(|byte| *byte == b'\n').unwrap_or(0)]).into_owned();
            assert_eq!(text, number.to_string(), "on the disk of {at:?}");
        }
    }
}

fn disk_of(lab: &Lab, name: Name) -> PathBuf {
    let mut disk = lab.console(name).into_os_string();
    disk.push(".disk");
    disk.into()
}

#[test]
fn a_tcp_connection_outlives_moves_there_and_back() {
    let Some(linux) = Linux::start([QEMU, QEMU], 0) else { return };
    linux.moves(3, false);
}

/// `SEALANE_QEMU_OLD` is an older QEMU than the one on the `PATH`.
#[test]
fn a_tcp_connection_outlives_moves_between_versions() {
    let Ok(old) = std::env::var("SEALANE_QEMU_OLD") else { return println!("SKIPPED: SEALANE_QEMU_OLD names no older QEMU") };
    let Some(linux) = Linux::start([&old, &old], 1) else { return };
    linux.moves(2, false);
    let Some(linux) = Linux::start([&old, QEMU], 2) else { return };
    linux.moves(1, true);
}
