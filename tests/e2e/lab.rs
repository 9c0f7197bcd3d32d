//! Two gateways, an authority and a guest, in processes of their own; all of it goes away with the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};

use sealane::hypervisor::RunState;
use serde_json::Value;
use tempfile::TempDir;

use crate::command::{Running, Said, run, wait_for};
use crate::gateway::{A, B, Gateway, Name};
use crate::guest::{self, Kind, Shape, UUID};
use crate::relay::{Conditions, Relay};

pub const VM: &str = "web-1";
pub const TRUST_DOMAIN: &str = "e2e.sealane.invalid";

/// Changes a configuration's text.
pub type Edit = Box<dyn FnOnce(String) -> String>;

/// What a lab is to be.
pub struct Setup {
    pub shape: Shape,
    edits: Vec<(Name, Edit)>,
    policies: [String; 2],
    link: Option<Conditions>,
}

impl Setup {
    pub fn new() -> Self {
        Self { shape: Shape::small(), edits: Vec::new(), policies: [POLICY.to_owned(), POLICY.to_owned()], link: None }
    }

    pub fn shape(mut self, change: impl FnOnce(&mut Shape)) -> Self {
        change(&mut self.shape);
        self
    }

    /// A guest that always has a few MiB dirty, so that a slow link keeps it in rounds.
    pub fn busy(self) -> Self {
        self.shape(|shape| (shape.working_set, shape.dirty_rate) = ("8MiB", "16MiB/s"))
    }

    /// Puts other text into a gateway's configuration.
    pub fn replace(self, name: Name, from: &'static str, to: &str) -> Self {
        let to = to.to_owned();
        self.edit(name, move |text| replaced(&text, from, &to))
    }

    /// Changes a gateway's configuration.
    pub fn edit(mut self, name: Name, edit: impl FnOnce(String) -> String + 'static) -> Self {
        self.edits.push((name, Box::new(edit)));
        self
    }

    /// Between the gateways is a link that can be cut: each reaches its peer through a relay.
    pub fn through_relay(mut self, conditions: Conditions) -> Self {
        self.link = Some(conditions);
        self
    }

    /// What is made durable before the switch; what the other one offers counts at a destination.
    pub fn durability(self, durability: &str) -> Self {
        let line = format!("durability = \"{durability}\"\nverify = true");
        self.replace(A, "verify = true", &line).replace(B, "verify = true", &line)
    }

    /// Another policy set for a gateway.
    pub fn policy(mut self, name: Name, text: &str) -> Self {
        self.policies[name as usize] = text.to_owned();
        self
    }

    /// The default policies without one of them, by the start of its id.
    pub fn without_policy(self, name: Name, id: &str) -> Self {
        let policies = POLICY.split("\n\n").filter(|policy| !policy.contains(&format!("@id(\"{id}")));
        let text = policies.collect::<Vec<_>>().join("\n\n");
        assert_ne!(text, POLICY, "no policy `{id}`");
        self.policy(name, &text)
    }

    /// The default policies and one more.
    pub fn with_policy(self, name: Name, more: &str) -> Self {
        self.policy(name, &format!("{POLICY}\n\n{more}"))
    }

    /// Makes files, but starts nothing.
    pub fn prepare(self) -> Lab {
        let directory = tempfile::Builder::new().prefix("e2e-").tempdir().unwrap();
        let root = directory.path();
        let pki = root.join("pki");
        pki_command(root, &["init", pki.to_str().unwrap(), "--trust-domain", TRUST_DOMAIN]);
        let network = network();
        let address = |name, port| address(name, &network, port);
        let relays = self.link.map(|conditions| {
            let start = |name| Relay::start(address(name, RELAY).parse().unwrap(), address(name, LISTEN).parse().unwrap(), conditions);
            [A, B].map(start)
        });
        let gateways = [A, B].map(|name| {
            pki_command(root, &["issue", pki.to_str().unwrap(), "--gateway", name.gateway(), "--site", name.site()]);
            let gateway = Gateway::new(root.join(name.gateway()));
            let peer = address(name.other(), if relays.is_some() { RELAY } else { LISTEN });
            fs::write(gateway.config(), config(name, &address(name, LISTEN), &peer)).unwrap();
            fs::write(gateway.directory().join("policy.d/lab.cedar"), &self.policies[name as usize]).unwrap();
            gateway
        });
        for (name, edit) in self.edits {
            let path = gateways[name as usize].config();
            fs::write(&path, edit(fs::read_to_string(&path).unwrap())).unwrap();
        }
        Lab { gateways, guest: None, shape: self.shape, network, relays, directory }
    }

    /// Starts the guest on A, then both gateways.
    pub fn start(self) -> Lab {
        let mut lab = self.prepare();
        lab.start_guest();
        for name in [A, B] {
            lab.gateway_mut(name).start();
        }
        lab
    }
}

/// Everything that was made.
pub struct Lab {
    gateways: [Gateway; 2],
    guest: Option<Child>,
    pub shape: Shape,
    network: String,
    relays: Option<[Relay; 2]>,
    directory: TempDir,
}

impl Lab {
    pub fn start() -> Self {
        Setup::new().start()
    }

    pub fn start_guest(&mut self) {
        let run = self.gateway(A).directory().join("run");
        self.guest = Some(self.shape.start(&run.join("guest.sock"), &self.console(A)));
    }

    pub fn gateway(&self, name: Name) -> &Gateway {
        &self.gateways[name as usize]
    }

    pub fn gateway_mut(&mut self, name: Name) -> &mut Gateway {
        &mut self.gateways[name as usize]
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn pki(&self) -> PathBuf {
        self.directory.path().join("pki")
    }

    /// Where a gateway listens.
    pub fn address(&self, name: Name) -> String {
        address(name, &self.network, LISTEN)
    }

    /// What stands in front of a gateway.
    pub fn relay(&self, name: Name) -> &Relay {
        &self.relays.as_ref().expect("a lab through a relay")[name as usize]
    }

    /// From now on the gateways do not reach each other.
    pub fn cut(&self) {
        self.relay(A).cut();
        self.relay(B).cut();
    }

    /// Waits until both gateways say that they have lost a link so often. A session lives for 10 s without one, and for longer where
    /// round trips take long, as on a busy machine.
    #[track_caller]
    pub fn until_lost(&self, times: usize) {
        for name in [A, B] {
            let lost = || self.gateway(name).audit_text().matches("\"event\":\"link-lost\"").count() >= times;
            wait_for(&format!("a link that is lost at {name:?}"), || lost().then_some(()));
        }
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.relay(A).restore();
        self.relay(B).restore();
    }

    /// `sealane migrate` from this gateway to the other.
    #[track_caller]
    pub fn migrate(&self, from: Name, flags: &[&str]) -> Said {
        self.start_migrate(from, flags).finish()
    }

    /// The same, while the test goes on. On two lanes unless `flags` say otherwise, however small the guest is.
    pub fn start_migrate(&self, from: Name, flags: &[&str]) -> Running {
        let lanes: &[&str] = if flags.contains(&"--lanes") { &[] } else { &["--lanes", "2"] };
        let arguments = [&["migrate", VM, "--to", from.other().gateway()], lanes, flags].concat();
        self.gateway(from).start_command(&arguments)
    }

    /// Starts a migration on a slow link and waits until pages go over it; the command and the migration's id.
    #[track_caller]
    pub fn start_slow_migration(&self, from: Name, flags: &[&str]) -> (Running, String) {
        // The guest's pages would be next to nothing compressed.
        let mut running = self.start_migrate(from, &[&["--compress", "none", "--bandwidth", "1MiB/s"], flags].concat());
        let id = wait_for("a migration in its rounds", || {
            running.must_go_on();
            let active = self.active_migration(from)?;
            let sent = active["progress"]["wire_bytes"].as_u64().unwrap_or(0);
            (active["progress"]["phase"] == "memory" && sent > 0).then(|| active["id"].as_str().unwrap().to_owned())
        });
        (running, id)
    }

    /// The migration that is under way at a gateway. Asked without a command, so that it can be asked often.
    #[track_caller]
    pub fn active_migration(&self, name: Name) -> Option<Value> {
        let client = sealane::control::Client::new(self.gateway(name).directory().join("run/api.sock"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let list = serde_json::to_value(runtime.block_on(client.migrations()).unwrap()).unwrap();
        list["migrations"].as_array().unwrap().iter().find(|migration| migration["state"] == "active").cloned()
    }

    /// The VM as a gateway sees it.
    #[track_caller]
    pub fn vm(&self, name: Name) -> Value {
        let list = self.gateway(name).command(&["vms"]);
        list.expect(0, &[]);
        list.json()["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == VM).unwrap().clone()
    }

    pub fn console(&self, name: Name) -> PathBuf {
        self.gateway(name).directory().join("run").join(format!("{VM}.serial"))
    }

    /// Where copies of the guest run, by their VMMs.
    pub fn running_copies(&self) -> Vec<Name> {
        let at = |name: Name| self.gateway(name).vmm_sockets().into_iter().map(move |socket| (name, socket));
        let all = at(A).chain(at(B));
        all.filter(|(_, socket)| guest::status(socket).is_some_and(|status| status.state == RunState::Running))
            .map(|(name, _)| name)
            .collect()
    }

    /// SIGKILL to every VMM at a gateway.
    pub fn kill_vmms_of(&self, name: Name) {
        let processes = self.vmm_processes(name);
        assert!(!processes.is_empty(), "no VMM to kill");
        for pid in processes {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
    }

    /// Processes of the VMMs at a gateway.
    pub fn vmm_processes(&self, name: Name) -> Vec<rustix::process::Pid> {
        self.gateway(name).vmm_sockets().iter().flat_map(|socket| processes_with(socket)).collect()
    }

    /// VMMs that answer, in any state.
    pub fn vmms(&self, name: Name) -> Vec<sealane::hypervisor::GuestStatus> {
        self.gateway(name).vmm_sockets().iter().filter_map(|socket| guest::status(socket)).collect()
    }

    /// The generation of the guest that runs at a gateway.
    #[track_caller]
    pub fn generation(&self, name: Name) -> sealane::hypervisor::Generation {
        let running = self.vmms(name).into_iter().find(|status| status.state == RunState::Running);
        running.and_then(|status| status.generation).unwrap_or_else(|| panic!("no running guest with a generation on {name:?}"))
    }

    /// The newest heartbeat at a gateway.
    #[track_caller]
    pub fn newest_beat(&self, name: Name) -> Option<u64> {
        if self.shape.kind == Kind::Kvm {
            return guest::beats(&self.console(name)).last().copied();
        }
        let lines = self.vmms(name).into_iter().filter(|status| status.state == RunState::Running).filter_map(|status| status.last_line);
        lines.filter_map(|line| guest::beat(&line)).max()
    }

    /// The guest beats at this gateway and nowhere else, and both gateways say so.
    #[track_caller]
    pub fn runs_only_on(&self, name: Name) {
        wait_for(&format!("a guest that runs on {name:?} only: {:?}", self.running_copies()), || {
            (self.running_copies() == [name]).then_some(())
        });
        let before = self.newest_beat(name).unwrap_or(0);
        wait_for(&format!("a heartbeat on {name:?}"), || self.newest_beat(name).filter(|now| *now >= before + 2));
        let vm = wait_for("the gateway to see it", || Some(self.vm(name)).filter(|vm| vm["state"] == "running"));
        assert_eq!(vm["where"], "here", "{vm}");
    }

    /// Heartbeats over all consoles: each number once, none missing.
    #[track_caller]
    pub fn heartbeat_is_unbroken(&self) {
        if self.shape.kind == Kind::Synthetic {
            return;
        }
        let consoles = [A, B].map(|name| guest::beats(&self.console(name)));
        for beats in &consoles {
            assert!(beats.is_sorted_by(|one, next| one < next), "a console goes backwards: {beats:?}");
        }
        let mut all = consoles.concat();
        all.sort_unstable();
        assert!(all.iter().copied().eq(1..=all.len() as u64), "heartbeats are missing or doubled: {consoles:?}");
    }

    /// What has to be so after every test, whatever happened: one copy, no gap, and evidence that holds.
    #[track_caller]
    pub fn settled_on(&self, name: Name) {
        self.runs_only_on(name);
        self.heartbeat_is_unbroken();
        for name in [A, B] {
            self.gateway(name).audit_verifies();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for gateway in &mut self.gateways {
            gateway.kill();
        }
        if let Some(guest) = &mut self.guest {
            let _ = guest.kill();
            let _ = guest.wait();
        }
        // VMMs that a gateway started are nobody's children now; the lab's directory in their arguments says whose they are.
        for pid in processes_with(self.directory.path()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Processes whose command line names a path that only one lab has.
fn processes_with(path: &Path) -> Vec<rustix::process::Pid> {
    let path = path.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&arguments).contains(path) {
            found.extend(rustix::process::Pid::from_raw(pid));
        }
    }
    found
}

#[track_caller]
pub fn pki_command(directory: &Path, arguments: &[&str]) {
    run(directory, &[&["pki"], arguments].concat()).expect(0, &[]);
}

/// Loopback addresses of this lab alone: no port is ever shared, whoever else runs.
fn network() -> String {
    static LABS: AtomicU32 = AtomicU32::new(0);
    let lab = LABS.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id();
    format!("127.{}.{}.{}", 1 + (process >> 8) % 254, process % 256, 2 * (lab % 120))
}

/// Ports of a gateway, and of the relay in front of it.
const LISTEN: u16 = 4433;
const RELAY: u16 = 4434;

fn address(name: Name, network: &str, port: u16) -> String {
    let (head, last) = network.rsplit_once('.').unwrap();
    format!("{head}.{}:{port}", last.parse::<u32>().unwrap() + 1 + name as u32)
}

/// Replaces text that has to be there.
#[track_caller]
pub fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "`{from}` is not in\n{text}");
    text.replace(from, to)
}

fn config(name: Name, listen: &str, peer: &str) -> String {
    let (own, other, other_site) = (name.gateway(), name.other().gateway(), name.other().site());
    let site = name.site();
    let socket = if name == A { "socket = \"run/guest.sock\"\n" } else { "" };
    let program = crate::command::program();
    format!(
        r#"[gateway]
name = "{own}"
site = "{site}"
listen = "{listen}"
control_socket = "run/api.sock"
state_directory = "state"
audit_directory = "audit"
runtime_directory = "run"

[identity]
certificate = "../pki/{own}-cert.pem"
key = "../pki/{own}-key.pem"
signing_key = "../pki/{own}-signing-key.pem"

[[identity.trust]]
domain = "{TRUST_DOMAIN}"
roots = "../pki/ca-cert.pem"
crls = ["../pki/crl.pem"]

[policy]
directory = "policy.d"

[migration]
lanes = 2
verify = true
max_downtime = "2s"
timeout = "10m"

[[peer]]
name = "{other}"
address = "{peer}"
spiffe = "spiffe://{TRUST_DOMAIN}/gateway/{other}"
site = "{other_site}"

[[vm]]
name = "{VM}"
uuid = "{UUID}"
{socket}tenant = "acme"
classification = "internal"
home_site = "site-a"
allowed_sites = ["site-a", "site-b"]
migratable = true

[incoming]
command = [{program:?}, "vmm", "run", "--incoming", "--socket", "{{socket}}", "--serial", "{{serial}}"]
max_memory = "4GiB"
"#
    )
}

pub const POLICY: &str = r#"@id("request-by-anybody")
permit (principal, action == Sealane::Action::"request", resource)
when { resource.tenant == "acme" };

@id("release-to-our-gateways")
permit (principal is Sealane::Gateway, action == Sealane::Action::"release", resource)
when { principal.trustDomain == "e2e.sealane.invalid" && resource.allowedSites.contains(context.route.dstSite) };

@id("accept-from-our-gateways")
permit (principal is Sealane::Gateway, action == Sealane::Action::"accept", resource)
when { principal.trustDomain == "e2e.sealane.invalid" && context.channel.crlFresh };

@id("commit-with-our-gateways")
permit (principal is Sealane::Gateway, action == Sealane::Action::"commit", resource)
when { principal.trustDomain == "e2e.sealane.invalid" && context.channel.crlFresh };"#;
