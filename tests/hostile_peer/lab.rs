//! A throw-away authority, real gateway processes and guests, and what has to hold for them after every case.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealane::audit::{self, Event, Filter, StoredEntry};
use sealane::control::Client;
use sealane::hypervisor::attach::{Timeouts, observe};
use sealane::identity::{Credentials, IdentityConfig, PostQuantum, TrustDomainConfig, authority};
use sealane::telemetry::ErrorClass;
use sealane::transport::TransportConfig;
use sealane::types::{MigrationId, SpiffeId, VmName, VmUuid};
use tempfile::TempDir;

pub const DOMAIN: &str = "hostile.sealane.invalid";
/// The gateway under test.
pub const REAL: &str = "gw-real";
/// We.
pub const EVIL: &str = "gw-evil";
/// We under another name: another configured peer.
pub const OTHER: &str = "gw-other";
/// VMs that the gateway under test knows.
pub const VMS: usize = 10;
/// What a gateway may have grown by after hostile migrations: decoders and buffers, and what the allocator keeps of them for a
/// second, not what the peer named.
const GROWTH_BYTES_MAX: u64 = 128 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

pub fn vm(index: usize) -> VmName {
    format!("vm-{index}").parse().unwrap()
}

pub fn uuid(index: usize) -> VmUuid {
    let mut bytes = [0x5e; 16];
    bytes[15] = u8::try_from(index).unwrap();
    VmUuid(bytes)
}

pub fn spiffe(name: &str) -> SpiffeId {
    format!("spiffe://{DOMAIN}/gateway/{name}").parse().unwrap()
}

/// A hang is a failure.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: nothing for {PATIENCE:?}"))
}

/// Waits until `probe` gives something.
pub async fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Certificates for everybody, and ports.
pub struct Lab {
    pub directory: TempDir,
    /// Where `gw-evil` has to listen to be offered VMs.
    pub evil_port: u16,
    other_port: u16,
}

impl Lab {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("sl").tempdir().unwrap();
        let pki = directory.path().join("pki");
        authority::init(&pki, DOMAIN).unwrap();
        for name in [REAL, EVIL, OTHER] {
            authority::issue(&pki, name, "site-1").unwrap();
        }
        let [evil_port, other_port] = [free_port(), free_port()];
        Self { directory, evil_port, other_port }
    }

    pub fn credentials(&self, name: &str) -> Arc<Credentials> {
        let pki = self.directory.path().join("pki");
        let file = |suffix: &str| pki.join(format!("{name}-{suffix}.pem"));
        let trust = vec![TrustDomainConfig {
            domain: DOMAIN.into(),
            roots: pki.join("ca-cert.pem"),
            crls: vec![pki.join("crl.pem")],
            intermediates: None,
        }];
        let config = IdentityConfig {
            certificate: file("cert"),
            key: file("key"),
            signing_key: file("signing-key"),
            trust,
            post_quantum: PostQuantum::default(),
        };
        Credentials::load(config).unwrap()
    }

    pub fn transport(&self, port: u16) -> TransportConfig {
        let listen = SocketAddr::from(([127, 0, 0, 1], port));
        TransportConfig { lane_workers: 1, socket_buffer_bytes: 1 << 20, ..TransportConfig::new(listen) }
    }

    /// The gateway under test; `guests` VMs run at it from the beginning.
    pub async fn gateway(&self, guests: usize) -> Gateway {
        let directory = self.directory.path().join(REAL);
        for path in ["state", "audit", "run", "policy.d"] {
            fs::create_dir_all(directory.join(path)).unwrap();
        }
        fs::write(directory.join("policy.d/all.cedar"), POLICY).unwrap();
        let port = free_port();
        fs::write(directory.join("gateway.toml"), self.config(port, guests)).unwrap();
        let guests = (0..guests).map(|index| Guest::start(&directory, index)).collect();
        let mut gateway = Gateway { process: start(&directory), directory, port, guests, rss_at_start: 0, orphans: Vec::new() };
        gateway.ready().await;
        gateway.rss_at_start = gateway.rss();
        gateway
    }

    fn config(&self, port: u16, guests: usize) -> String {
        let program = format!("{:?}", env!("CARGO_BIN_EXE_sealane"));
        let mut text = format!(
            r#"
[gateway]
name = "{REAL}"
site = "site-1"
listen = "127.0.0.1:{port}"
control_socket = "run/api.sock"
state_directory = "state"
audit_directory = "audit"
runtime_directory = "run"
[identity]
certificate = "../pki/{REAL}-cert.pem"
key = "../pki/{REAL}-key.pem"
signing_key = "../pki/{REAL}-signing-key.pem"
[[identity.trust]]
domain = "{DOMAIN}"
roots = "../pki/ca-cert.pem"
crls = ["../pki/crl.pem"]
[policy]
directory = "policy.d"
[migration]
max_outage = "2s"
lanes = 2
[limits]
migrations_max = 8
[incoming]
command = [{program}, "vmm", "run", "--incoming", "--socket", "{{socket}}", "--serial", "{{serial}}"]
max_memory = "64MiB"
"#
        );
        for (name, port) in [(EVIL, self.evil_port), (OTHER, self.other_port)] {
            text +=
                &format!("[[peer]]\nname = {name:?}\naddress = \"127.0.0.1:{port}\"\nspiffe = \"{}\"\nsite = \"site-1\"\n", spiffe(name));
        }
        for index in 0..VMS {
            let socket = if index < guests { format!("socket = \"run/guest-{index}.sock\"\n") } else { String::new() };
            text += &format!(
                "[[vm]]\nname = \"{}\"\nuuid = \"{}\"\n{socket}tenant = \"t\"\nclassification = \"internal\"\n",
                vm(index),
                uuid(index)
            );
            text += "home_site = \"site-1\"\nallowed_sites = [\"site-1\"]\nmigratable = true\n";
        }
        text
    }
}

const POLICY: &str = "@id(\"all\")\npermit (principal, action, resource);\n";

fn free_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start(directory: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("gateway.log")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
    command.args(["gateway", "--config"]).arg(directory.join("gateway.toml"));
    // What grows has to be held memory, not what the C library keeps for each thread that there once was.
    command.env("MALLOC_ARENA_MAX", "2").env("MALLOC_TRIM_THRESHOLD_", "1048576");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// A process of this host.
struct Process {
    id: String,
    parent: String,
    state: String,
}

fn processes() -> Vec<Process> {
    let process = |entry: fs::DirEntry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut words = stat.rsplit_once(") ")?.1.split(' ').map(str::to_owned);
        Some(Process { id: entry.file_name().display().to_string(), state: words.next()?, parent: words.next()? })
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(process).collect()
}

/// A synthetic guest in its own process.
struct Guest {
    process: Child,
    socket: PathBuf,
}

impl Guest {
    fn start(directory: &Path, index: usize) -> Self {
        let socket = directory.join(format!("run/guest-{index}.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
        command.args(["vmm", "run", "--payload", "synthetic", "--memory", "8MiB", "--vcpus", "1", "--working-set", "1MiB"]);
        command.args(["--dirty-rate", "4MiB/s", "--uuid", &uuid(index).to_string(), "--socket"]).arg(&socket);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(start.elapsed() < PATIENCE, "guest {index} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { process, socket }
    }
}

/// The gateway under test.
pub struct Gateway {
    process: Child,
    pub directory: PathBuf,
    pub port: u16,
    guests: Vec<Guest>,
    rss_at_start: u64,
    /// Guests that arrived before a restart.
    orphans: Vec<String>,
}

impl Gateway {
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn client(&self) -> Client {
        Client::new(self.directory.join("run/api.sock"))
    }

    async fn ready(&mut self) {
        let start = Instant::now();
        while self.client().gateway().await.is_err() {
            assert!(start.elapsed() < PATIENCE, "the gateway does not answer: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = start(&self.directory);
        self.ready().await;
        self.rss_at_start = self.rss();
    }

    /// Ends and starts the gateway process alone; guests that arrived are nobody's children then.
    pub async fn restart_keeping_twins(&mut self) {
        self.orphans.extend(self.twins());
        self.restart().await;
    }

    /// A guest that arrived in `migration` runs, and never read what it did not write.
    pub async fn arrived_guest_beats(&self, case: &str, migration: MigrationId) {
        let socket = self.directory.join(format!("run/{migration}.sock"));
        let beat = || {
            let (_, status) = observe(&socket, "guest", Timeouts::default()).ok()?;
            assert_eq!(status.exit_code, None, "{case}: the guest found its memory changed");
            status.last_line?.strip_prefix("beat ")?.parse::<u64>().ok()
        };
        let first = until(case, beat).await;
        until(case, || beat().filter(|beat| *beat > first + 1)).await;
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("gateway.log")).unwrap_or_default()
    }

    fn rss(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.process.id())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// VMMs that the gateway's launcher started and that still run.
    fn twins(&self) -> Vec<String> {
        let own = self.process.id().to_string();
        let launchers = processes().into_iter().filter(|process| process.parent == own).map(|process| process.id);
        let launchers: Vec<_> = launchers.collect();
        let twins = processes().into_iter().filter(|process| launchers.contains(&process.parent) && process.state != "Z");
        twins.map(|process| format!("process {}", process.id)).collect()
    }

    /// Every VMM that it started ends as if the host had killed it.
    pub fn kill_twins(&self) {
        for twin in self.twins() {
            let id = twin.trim_start_matches("process ");
            assert!(std::process::Command::new("kill").args(["-KILL", id]).status().unwrap().success());
        }
    }

    /// Sockets of twins.
    fn sockets(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.join("run")).unwrap().flatten().map(|entry| entry.file_name().display().to_string());
        names.filter(|name| name.ends_with(".sock") && name != "api.sock" && !name.starts_with("guest-")).collect()
    }

    /// The gateway lives, has `twins` guests that arrived and nothing else, and did not grow.
    pub async fn is_well(&mut self, case: &str, twins: usize) {
        assert!(self.process.try_wait().unwrap().is_none(), "{case}: the gateway ended: {}", self.log());
        let start = Instant::now();
        while self.twins().len() != twins || self.sockets().len() != twins {
            let (left, sockets) = (self.twins(), self.sockets());
            assert!(start.elapsed() < PATIENCE, "{case}: expected {twins} twins: {left:?} {sockets:?}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        within(case, self.client().gateway()).await.unwrap();
        let grown = self.rss().saturating_sub(self.rss_at_start);
        assert!(grown < GROWTH_BYTES_MAX, "{case}: the gateway grew by {} MiB", grown >> 20);
        assert!(!self.log().contains("panicked"), "{case}: {}", self.log());
    }

    pub fn entries(&self, filter: Filter) -> Vec<StoredEntry> {
        audit::read(&self.directory.join("audit"), filter).unwrap().map_while(Result::ok).collect()
    }

    /// The audit log says how a migration ended, and of which class that was.
    pub async fn recorded(&self, case: &str, migration: MigrationId, class: ErrorClass) {
        self.recorded_one_of(case, migration, &[class]).await;
    }

    pub async fn recorded_one_of(&self, case: &str, migration: MigrationId, classes: &[ErrorClass]) {
        let filter = Filter { migration: Some(migration), event: Some(Event::MigrationFinished), ..Filter::default() };
        let names: Vec<_> = classes.iter().map(|class| serde_json::to_value(class).unwrap()).collect();
        let ended = |entry: &StoredEntry| entry.detail.get("class").is_some_and(|class| names.contains(class));
        let found = || self.entries(filter.clone()).into_iter().find(ended);
        let start = Instant::now();
        while found().is_none() {
            assert!(start.elapsed() < PATIENCE, "{case}: expected one of {names:?} among {:?}", self.entries(filter.clone()));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(self.entries(filter.clone()).iter().all(|entry| entry.outcome != Some(audit::Outcome::Done)), "{case}");
    }

    /// Handoff records of a migration, in order.
    pub fn handoff_records(&self, migration: MigrationId) -> Vec<String> {
        let filter = Filter { migration: Some(migration), event: Some(Event::Handoff), ..Filter::default() };
        self.entries(filter).iter().map(|entry| entry.detail["record"].as_str().unwrap().to_owned()).collect()
    }

    /// The newest beat of a guest that runs at its original place.
    pub fn beat(&self, index: usize) -> Option<u64> {
        let (_, status) = observe(&self.guests[index].socket, "guest", Timeouts::default()).ok()?;
        status.last_line?.strip_prefix("beat ")?.parse().ok()
    }

    pub fn guest_state(&self, index: usize) -> Option<sealane::hypervisor::RunState> {
        observe(&self.guests[index].socket, "guest", Timeouts::default()).ok().map(|(_, status)| status.state)
    }

    pub async fn beats_on(&self, case: &str, index: usize) {
        let first = until(case, || self.beat(index)).await;
        until(case, || self.beat(index).filter(|beat| *beat > first)).await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the gateway's log:\n{}", self.log());
        }
        // Twins first: each is a process group of its own that nobody else ends.
        for twin in self.twins().into_iter().chain(std::mem::take(&mut self.orphans)) {
            if let Some(pid) = twin.strip_prefix("process ").and_then(|pid| pid.parse().ok()).and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        for process in std::iter::once(&mut self.process).chain(self.guests.iter_mut().map(|guest| &mut guest.process)) {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
