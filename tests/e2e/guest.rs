//! The guest: what it is, how it is started, what it says on its consoles.

use std::fs::{self, File};
use std::path::Path;
use std::process::Child;
use std::sync::OnceLock;
use std::time::Duration;

use sealane::hypervisor::GuestStatus;
use sealane::hypervisor::attach::{Timeouts, observe};
use sealane::vmm::generation_number;

use crate::command::{sealane, wait_for};

pub const UUID: &str = "5ea1a4e0-0000-4000-8000-0000000000e2";

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Kvm,
    Synthetic,
}

impl Kind {
    /// KVM where it works; where it does not, that is said once.
    pub fn best() -> Self {
        static BEST: OnceLock<Kind> = OnceLock::new();
        *BEST.get_or_init(|| match sealane::vmm::usable() {
            Ok(()) => Self::Kvm,
            Err(error) => {
                println!("SKIPPED: KVM guests, because {error}; guests are synthetic");
                Self::Synthetic
            }
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Synthetic => "synthetic",
        }
    }
}

/// What a guest is to be.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub kind: Kind,
    pub memory: &'static str,
    pub vcpus: u32,
    pub working_set: &'static str,
    pub dirty_rate: &'static str,
}

impl Shape {
    /// Small and calm: most tests are about something else.
    pub fn small() -> Self {
        Self { kind: Kind::best(), memory: "32MiB", vcpus: 1, working_set: "1MiB", dirty_rate: "2MiB/s" }
    }

    /// Starts a guest and waits until it can be attached to.
    pub fn start(&self, socket: &Path, serial: &Path) -> Child {
        self.start_as(UUID, socket, serial)
    }

    /// The same with another UUID.
    pub fn start_as(&self, uuid: &str, socket: &Path, serial: &Path) -> Child {
        let payload = match self.kind {
            Kind::Kvm => "heartbeat",
            Kind::Synthetic => "synthetic",
        };
        let log = socket.with_extension("log");
        let mut command = sealane();
        command.args(["vmm", "run", "--payload", payload, "--uuid", uuid, "--memory", self.memory]);
        command.args(["--vcpus", &self.vcpus.to_string(), "--working-set", self.working_set, "--dirty-rate", self.dirty_rate]);
        command.arg("--socket").arg(socket).arg("--serial").arg(serial);
        let output = File::create(&log).unwrap();
        let mut child = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
        wait_for("a guest", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the guest's VMM ended with {status}: {}", fs::read_to_string(&log).unwrap());
            }
            status(socket)
        });
        child
    }
}

/// What the VMM behind a socket says of its guest; nothing when nobody listens.
pub fn status(socket: &Path) -> Option<GuestStatus> {
    let timeouts = Timeouts { request: Duration::from_secs(20), ..Timeouts::default() };
    observe(socket, "guest", timeouts).ok().map(|(_, status)| status)
}

/// The number of a heartbeat.
pub fn beat(line: &str) -> Option<u64> {
    line.strip_prefix("beat ")?.parse().ok()
}

/// Heartbeats on a console, in order. Every line has to be one, or tell of a generation higher than the one before: a
/// guest that finds a fault says so there.
#[track_caller]
pub fn beats(console: &Path) -> Vec<u64> {
    let text = complete_lines(console);
    let (mut beats, mut generation) = (Vec::new(), 1);
    for line in text.lines() {
        match (beat(line), generation_number(line)) {
            (Some(beat), _) => beats.push(beat),
            (_, Some(next)) if next > generation => generation = next,
            _ => panic!("the guest says `{line}`"),
        }
    }
    beats
}

/// Generations that the guest told of on a console.
pub fn generations(console: &Path) -> Vec<u64> {
    complete_lines(console).lines().filter_map(generation_number).collect()
}

/// The last line may still be growing.
fn complete_lines(console: &Path) -> String {
    let mut text = fs::read_to_string(console).unwrap_or_default();
    text.truncate(text.rfind('\n').unwrap_or(0));
    text
}
