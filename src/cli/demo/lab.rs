//! The demo's surroundings: a throw-away authority, two gateways, a guest; all of it goes away again.

use std::fs;
use std::io::Read;
use std::net::UdpSocket;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom, SystemRandom};
use serde::Serialize;

use super::linux::Linux;
use super::{bug, ended, until};
use crate::control::Client;
use crate::hypervisor::attach::{AttachedSource, Timeouts, observe};
use crate::hypervisor::qemu::{self, QemuSource};
use crate::hypervisor::{Guest, GuestStatus, HypervisorError};
use crate::identity::authority;
use crate::telemetry::{ErrorClass, Problem, chain};
use crate::types::{PAGE_BYTES, Side};

use super::super::tools::{DemoFlags, DemoHypervisor};

/// The demo's VM.
pub(super) const VM: &str = "demo-vm";
const UUID: &str = "5ea1a4e0-0000-4000-8000-000000000001";
const TRUST_DOMAIN: &str = "demo.sealane.invalid";
/// What the guest keeps writing: a small part of its memory.
const WORKING_SET: &str = "8MiB";

/// Everything that the demo made.
pub(super) struct Lab {
    pub(super) source: Gateway,
    pub(super) destination: Gateway,
    directory: PathBuf,
    keep: bool,
    guest: Child,
    guest_socket: PathBuf,
    boots: bool,
}

/// One gateway process.
pub(super) struct Gateway {
    directory: PathBuf,
    process: Child,
}

/// The guest's numbered heartbeats, from both consoles.
#[derive(Debug, Serialize)]
pub(super) struct Heartbeats {
    pub(super) first_on_source: Option<u64>,
    pub(super) last_on_source: Option<u64>,
    pub(super) first_on_destination: Option<u64>,
    pub(super) last_on_destination: Option<u64>,
    /// Every number is one more than the one before, across both consoles.
    pub(super) unbroken: bool,
}

impl Lab {
    pub(super) fn set_up(flags: &DemoFlags, hypervisor: DemoHypervisor) -> Result<Self, Problem> {
        let directory = directory(flags)?;
        let program = std::env::current_exe().map_err(|error| local("find this program", &error))?;
        let pki = directory.join("pki");
        let identity = |error: crate::identity::IdentityError| Problem::new(error.class(), chain(&error));
        authority::init(&pki, TRUST_DOMAIN).map_err(identity)?;
        for (name, site) in [("gw-a", "site-a"), ("gw-b", "site-b")] {
            authority::issue(&pki, name, site).map_err(identity)?;
            let own = directory.join(name);
            for path in [own.clone(), own.join("state"), own.join("audit"), own.join("run"), own.join("policy.d")] {
                make_directory(&path)?;
            }
            write(&own.join("policy.d/demo.cedar"), POLICY)?;
        }
        let ports = [free_port()?, free_port()?];
        let guest_socket = directory.join("gw-a/run/guest.sock");
        let linux = if hypervisor == DemoHypervisor::Qemu { Some(Linux::find(&directory)?) } else { None };
        let template = linux.as_ref().map(|linux| linux.template(flags)).unwrap_or_default();
        let place = guest_socket.display().to_string();
        let here = if linux.is_some() { format!("qmp = {place:?}\n") } else { format!("socket = {place:?}\n") };
        let there = if linux.is_some() { "template = \"linux\"\n" } else { "" };
        write(&directory.join("gw-a/gateway.toml"), &(config(&program, "gw-a", ports, &here) + &template))?;
        write(&directory.join("gw-b/gateway.toml"), &(config(&program, "gw-b", ports, there) + &template))?;
        let mut guest = match &linux {
            Some(linux) => linux.start(UUID, &guest_socket, &directory.join("gw-a/run"), flags)?,
            None => start_guest(&program, &directory, &guest_socket, flags, hypervisor)?,
        };
        wait_for_socket(&guest_socket, &mut guest, &directory.join("gw-a/run/guest.log"))?;
        let source = Gateway::start(&program, directory.join("gw-a"));
        let destination = Gateway::start(&program, directory.join("gw-b"));
        match (source, destination) {
            (Ok(source), Ok(destination)) => {
                let (keep, boots) = (flags.keep.is_some(), linux.is_some());
                Ok(Self { source, destination, directory, keep, guest, guest_socket, boots })
            }
            (one, other) => {
                // Nobody will attach to it.
                let _ = guest.kill();
                for mut gateway in [one, other].into_iter().flatten() {
                    gateway.stop();
                }
                Err(Problem::new(ErrorClass::Local, "a gateway process cannot be started"))
            }
        }
    }

    /// The directory, when it stays.
    pub(super) fn kept(&self) -> Option<PathBuf> {
        self.keep.then(|| self.directory.clone())
    }

    /// Whether the guest is an operating system, which has to start first.
    pub(super) fn boots(&self) -> bool {
        self.boots
    }

    fn console(&self, side: Side) -> PathBuf {
        match side {
            Side::Source => self.directory.join("gw-a/run").join(format!("{VM}.serial")),
            Side::Destination => self.directory.join("gw-b/run").join(format!("{VM}.serial")),
        }
    }

    /// Heartbeats on a console, in order. A synthetic guest has no console: its last line is asked for.
    fn beats(&self, side: Side) -> Vec<u64> {
        numbers(&self.said(side))
    }

    /// All that a console has.
    fn said(&self, side: Side) -> String {
        fs::read(self.console(side)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until the guest has printed `count` more heartbeats there; returns the last number.
    pub(super) async fn wait_for_beats(&self, side: Side, count: u64, patience: Duration) -> Result<u64, Problem> {
        let first = self.newest_beat(side);
        let enough = until(patience, || {
            let newest = self.newest_beat(side)?;
            (newest >= first.unwrap_or(0) + count).then_some(newest)
        });
        enough.await.ok_or_else(|| {
            let status = self.guest_status(side).map_or_else(|error| chain(&error), |status| format!("{status:?}"));
            Problem::new(ErrorClass::Local, format!("the guest does not beat on the {side}: {status}"))
        })
    }

    fn newest_beat(&self, side: Side) -> Option<u64> {
        match self.beats(side).last() {
            Some(beat) => Some(*beat),
            None => crate::vmm::heartbeat_number(self.guest_status(side).ok()?.last_line?.as_str()),
        }
    }

    pub(super) fn heartbeats(&self) -> Heartbeats {
        let (source, destination) = (self.beats(Side::Source), self.beats(Side::Destination));
        // A line that was begun on one console may end on the other.
        let all = numbers(&(self.said(Side::Source) + &self.said(Side::Destination)));
        let followed = all.windows(2).all(|pair| matches!(pair, [one, next] if *next == one + 1));
        Heartbeats {
            first_on_source: source.first().copied(),
            last_on_source: source.last().copied(),
            first_on_destination: destination.first().copied().or_else(|| self.newest_beat(Side::Destination)),
            last_on_destination: destination.last().copied().or_else(|| self.newest_beat(Side::Destination)),
            unbroken: followed,
        }
    }

    fn address(&self, side: Side) -> Option<PathBuf> {
        match side {
            Side::Source => Some(self.guest_socket.clone()),
            Side::Destination => {
                let entries = fs::read_dir(self.directory.join("gw-b/run")).ok()?;
                entries
                    .flatten()
                    .map(|entry| entry.path())
                    .find(|path| path.extension().is_some_and(|ending| ending == "sock" || ending == "qmp") && !path.ends_with("api.sock"))
            }
        }
    }

    pub(super) fn guest_status(&self, side: Side) -> Result<GuestStatus, HypervisorError> {
        let nowhere = || HypervisorError::Unreachable {
            vm: VM.to_owned(),
            address: "(none)".to_owned(),
            source: std::io::Error::from(std::io::ErrorKind::NotFound),
        };
        let address = self.address(side).ok_or_else(nowhere)?;
        if self.boots { qemu::observe(&address, VM, qemu::ANSWER_WITHIN) } else { Ok(observe(&address, VM, Timeouts::default())?.1) }
    }

    /// CPU time of both gateways so far.
    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        Some(self.source.cpu_seconds()? + self.destination.cpu_seconds()?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for gateway in [&mut self.source, &mut self.destination] {
            gateway.stop();
        }
        for side in [Side::Source, Side::Destination] {
            let Some(path) = self.address(side) else { continue };
            let timeouts = Timeouts { request: Duration::from_secs(2), state: Duration::from_secs(2) };
            let guest: Result<Box<dyn Guest>, HypervisorError> = if self.boots {
                QemuSource::attach(&path, VM, timeouts.request).map(|guest| Box::new(guest) as _)
            } else {
                AttachedSource::attach(&path, VM, timeouts).map(|guest| Box::new(guest) as _)
            };
            if let Ok(mut guest) = guest {
                // The demo is over; nobody needs the guest.
                let _ = guest.destroy();
            }
        }
        let _ = self.guest.kill();
        let _ = self.guest.wait();
        if !self.keep {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

impl Gateway {
    fn start(program: &Path, directory: PathBuf) -> Result<Self, Problem> {
        let log = fs::File::create(directory.join("gateway.log")).map_err(|error| local("write a log", &error))?;
        let process = Command::new(program)
            .args(["gateway", "--config"])
            .arg(directory.join("gateway.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| local("start a gateway", &error))?;
        Ok(Self { directory, process })
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join("run/api.sock")
    }

    pub(super) fn audit_directory(&self) -> PathBuf {
        self.directory.join("audit")
    }

    /// Waits until the gateway answers.
    pub(super) async fn ready(&self, client: &Client) -> Result<(), Problem> {
        let start = Instant::now();
        loop {
            match client.gateway().await {
                Ok(_) => return Ok(()),
                Err(error) if start.elapsed() > Duration::from_secs(10) => {
                    let log = fs::read_to_string(self.directory.join("gateway.log")).unwrap_or_default();
                    return Err(Problem::new(ErrorClass::Local, format!("a gateway does not answer: {}: {log}", chain(&error))));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn cpu_seconds(&self) -> Option<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).ok()?;
        // proc(5): fields 14 and 15, counted behind the parenthesised name, in ticks of 10 ms on every Linux.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(ticks as f64 / 100.0)
    }

    fn stop(&mut self) {
        if let Some(pid) = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(super) fn local(what: &str, error: &dyn std::error::Error) -> Problem {
    Problem::new(ErrorClass::Local, format!("cannot {what}: {}", chain(error)))
}

fn directory(flags: &DemoFlags) -> Result<PathBuf, Problem> {
    if let Some(keep) = &flags.keep {
        make_directory(keep)?;
        let own = keep.canonicalize().map_err(|error| local("use the directory to keep", &error))?;
        if fs::read_dir(&own).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Problem::new(ErrorClass::Misuse, format!("--keep `{}`: the directory is not empty", keep.display())));
        }
        return Ok(own);
    }
    let mut random = [0; 6];
    SystemRandom::new().fill(&mut random).map_err(|_| bug("no random numbers"))?;
    let name: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = std::env::temp_dir().join(format!("sealane-demo-{name}"));
    make_directory(&path)?;
    Ok(path)
}

fn make_directory(path: &Path) -> Result<(), Problem> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| local(&format!("make `{}`", path.display()), &error))
}

fn write(path: &Path, text: &str) -> Result<(), Problem> {
    fs::write(path, text).map_err(|error| local(&format!("write `{}`", path.display()), &error))
}

/// A UDP port that is free now.
fn free_port() -> Result<u16, Problem> {
    let socket = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    socket.map(|address| address.port()).map_err(|error| local("find a free UDP port", &error))
}

fn start_guest(program: &Path, directory: &Path, socket: &Path, flags: &DemoFlags, hypervisor: DemoHypervisor) -> Result<Child, Problem> {
    if !flags.memory.bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(Problem::new(
            ErrorClass::Misuse,
            format!("--memory of {} bytes: expected a multiple of {PAGE_BYTES}", flags.memory.bytes),
        ));
    }
    let run = directory.join("gw-a/run");
    let log = fs::File::create(run.join("guest.log")).map_err(|error| local("write a log", &error))?;
    let payload = match hypervisor {
        DemoHypervisor::Kvm => "heartbeat",
        DemoHypervisor::Synthetic | DemoHypervisor::Qemu => "synthetic",
    };
    let mut command = Command::new(program);
    command
        .args(["vmm", "run", "--payload", payload, "--working-set", WORKING_SET, "--uuid", UUID])
        .args(["--dirty-rate", &format!("{}B/s", flags.dirty_rate.bytes_per_second)])
        .args(["--memory", &format!("{}B", flags.memory.bytes), "--vcpus", &flags.vcpus.to_string()])
        .arg("--socket")
        .arg(socket)
        .arg("--serial")
        .arg(run.join(format!("{VM}.serial")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    command.spawn().map_err(|error| local("start the guest", &error))
}

fn wait_for_socket(socket: &Path, guest: &mut Child, log: &Path) -> Result<(), Problem> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        if let Ok(Some(status)) = guest.try_wait() {
            let mut text = String::new();
            let _ = fs::File::open(log).and_then(|file| file.take(2000).read_to_string(&mut text));
            return Err(ended("the guest's VMM", status, text.trim()));
        }
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = guest.kill();
    Err(Problem::new(ErrorClass::Local, "the guest's VMM does not listen"))
}

/// Numbers of the heartbeats in a console's text; its last line may still be growing.
fn numbers(text: &str) -> Vec<u64> {
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().filter_map(crate::vmm::heartbeat_number).collect()
}

/// `guest` says where the VM is, or how one is started for it.
fn config(program: &Path, name: &str, ports: [u16; 2], guest: &str) -> String {
    let (other, site, other_site, own_port, other_port) =
        if name == "gw-a" { ("gw-b", "site-a", "site-b", ports[0], ports[1]) } else { ("gw-a", "site-b", "site-a", ports[1], ports[0]) };
    let program = format!("{:?}", program.display().to_string());
    format!(
        r#"# Made by `sealane demo`; not for production.
[gateway]
name = "{name}"
site = "{site}"
listen = "127.0.0.1:{own_port}"
control_socket = "run/api.sock"
state_directory = "state"
audit_directory = "audit"
runtime_directory = "run"

[identity]
certificate = "../pki/{name}-cert.pem"
key = "../pki/{name}-key.pem"
signing_key = "../pki/{name}-signing-key.pem"

[[identity.trust]]
domain = "{TRUST_DOMAIN}"
roots = "../pki/ca-cert.pem"
crls = ["../pki/crl.pem"]

[policy]
directory = "policy.d"

[migration]
lanes = 2

[[peer]]
name = "{other}"
address = "127.0.0.1:{other_port}"
spiffe = "spiffe://{TRUST_DOMAIN}/gateway/{other}"
site = "{other_site}"

[[vm]]
name = "{VM}"
uuid = "{UUID}"
{guest}tenant = "demo"
classification = "internal"
home_site = "site-a"
allowed_sites = ["site-a", "site-b"]
migratable = true

[incoming]
command = [{program}, "vmm", "run", "--incoming", "--overcommit", "--socket", "{{socket}}", "--serial", "{{serial}}"]
max_memory = "1024GiB"
"#
    )
}

/// The two gateways of the demo may give each other VMs of tenant `demo`, over a fresh and authenticated channel.
const POLICY: &str = r#"// Made by `sealane demo`; see config/policy.d for examples to start from.
@id("demo-operators-may-ask")
permit (principal, action == Sealane::Action::"request", resource)
when { resource.tenant == "demo" };

@id("demo-gateways-may-move")
permit (
  principal is Sealane::Gateway,
  action in [Sealane::Action::"release", Sealane::Action::"accept", Sealane::Action::"commit"],
  resource
)
when {
  principal.trustDomain == "demo.sealane.invalid" &&
  resource.tenant == "demo" &&
  resource.allowedSites.contains(context.route.dstSite) &&
  context.channel.tls == "1.3" && context.channel.crlFresh
};
"#;
