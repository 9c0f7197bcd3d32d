//! How handoffs reach the guests of this host, whatever holds them, and build one from its image.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::config;
use crate::engine::Host;
use crate::gateway::Gateway;
use crate::gateway::departures::noted;
use crate::gateway::kept::twin_file;
use crate::gateway::launcher::{INCOMING, Launcher, Start};
use crate::hypervisor::attach::{self, AttachedDestination, AttachedSource, Timeouts};
use crate::hypervisor::qemu::{self, QemuSource};
use crate::hypervisor::{Address, Guest, GuestStatus, HypervisorError, Machine, PagedDestination, RunState};
use crate::storage::ImageHead;

/// How long a VMM may take to listen.
pub(super) const LAUNCH: Duration = Duration::from_secs(10);

impl Gateway {
    pub(super) fn host(&self) -> Host {
        let runtime: Arc<Path> = self.config.gateway.runtime_directory.clone().into();
        let channels = Arc::clone(&runtime);
        let (notes, usual) = (Arc::clone(&runtime), self.config.migration.bandwidth.map(|limit| limit.bytes_per_second));
        let launcher = self.config.incoming.is_some().then(|| self.launcher.clone());
        Host {
            attach: Arc::new(move |address, vm| {
                Ok(match Address::parse(address) {
                    Address::Attach(path) => Box::new(AttachedSource::attach(&path, vm.as_str(), Timeouts::default())?) as Box<dyn Guest>,
                    Address::Qemu(path) => {
                        let guest = QemuSource::attach(&path, vm.as_str(), qemu::ANSWER_WITHIN)?;
                        Box::new(guest.connecting_at(channels.join(format!("{vm}.channels"))))
                    }
                })
            }),
            look: Arc::new(|address, vm| observe(&Address::parse(address), vm.as_str())),
            rebuild: Arc::new(move |address, head| rebuild(launcher.as_ref(), Path::new(address), head)),
            rebuilt_at: Arc::new(move |migration| twin_file(&runtime, migration, "sock").display().to_string()),
            pace: Arc::new(move |migration| noted(&notes, migration).map_or(usual, |note| note.order.pace())),
        }
    }
}

/// Where a VM is that is here by the configuration.
pub(super) fn home(vm: &config::Vm) -> Option<String> {
    let attach = vm.socket.clone().map(Address::Attach);
    attach.or_else(|| vm.qmp.clone().map(Address::Qemu)).map(|address| address.to_string())
}

/// How the guest at an address is, without taking control of it.
pub(super) fn observe(address: &Address, vm: &str) -> Result<RunState, HypervisorError> {
    match address {
        Address::Attach(path) => Ok(attach::observe(path, vm, Timeouts::default())?.1.state),
        Address::Qemu(path) => Ok(qemu::observe(path, vm, qemu::ANSWER_WITHIN)?.state),
    }
}

/// The same, and what the guest is made of, where the VMM tells; and whether it was split and lacks pages that nobody sends.
pub(super) fn inspect(address: &Address, vm: &str) -> Result<(Option<Machine>, GuestStatus, bool), HypervisorError> {
    match address {
        Address::Attach(path) => attach::inspect(path, vm, Timeouts::default()).map(|(machine, status)| (machine, status, false)),
        Address::Qemu(path) => qemu::inspect(path, vm, qemu::LOOK_WITHIN).map(|(machine, status, lacks)| (Some(machine), status, lacks)),
    }
}

/// Ends a VMM in which no guest runs.
pub(super) fn discard(address: &Address, vm: &str) -> Result<(), HypervisorError> {
    match address {
        Address::Attach(path) => attach::discard(path, vm, Timeouts::default()),
        Address::Qemu(path) => qemu::discard(path, vm, qemu::ANSWER_WITHIN),
    }
}

fn rebuild(launcher: Option<&Launcher>, address: &Path, head: &ImageHead) -> Result<Box<dyn PagedDestination>, HypervisorError> {
    let vm = head.vm.as_str();
    let local = |what, why: &str| HypervisorError::Local { vm: vm.to_owned(), what, source: std::io::Error::other(why.to_owned()) };
    let launcher = launcher.ok_or_else(|| local("cannot build the guest from its image", "the configuration has no [incoming]"))?;
    let machine: Machine =
        serde_json::from_slice(&head.machine).map_err(|error| local("cannot read the machine of an image", &error.to_string()))?;
    // What an earlier try left there never ran; one that runs refuses.
    match attach::discard(address, vm, Timeouts::default()) {
        Ok(()) | Err(HypervisorError::Unreachable { .. }) => {}
        Err(error) => return Err(error),
    }
    let _ = std::fs::remove_file(address);
    let what = Start {
        template: INCOMING.to_owned(),
        migration: head.migration,
        vm: head.vm.clone(),
        uuid: head.uuid,
        memory_bytes: machine.regions.iter().map(|region| region.bytes).sum(),
        vcpus: machine.vcpus,
    };
    if launcher.variables(&what).socket != std::path::absolute(address).unwrap_or_default() {
        return Err(local("cannot build the guest from its image", "it was to be in another runtime directory"));
    }
    let mut vmm = launcher.launch(&what, LAUNCH)?;
    crate::failpoint::hit!("recovery.rebuilt-launched");
    match AttachedDestination::prepare(address, vm, &machine, Timeouts::default()) {
        Ok(twin) => Ok(Box::new(twin)),
        Err(error) => {
            // An empty twin is nobody's guest.
            let _ = vmm.kill();
            Err(error)
        }
    }
}
