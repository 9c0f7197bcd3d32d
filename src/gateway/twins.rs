//! Empty twins of VMs that arrive: how one is started or found, and how one ends that nobody needs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::engine::Link;
use crate::gateway::Gateway;
use crate::gateway::disks::SOCKET;
use crate::gateway::host::LAUNCH;
use crate::gateway::incoming::Refusal;
use crate::gateway::kept::twin_file;
use crate::hypervisor::attach::{AttachedDestination, Timeouts};
use crate::hypervisor::qemu::{self, QEMU_KIND, QemuDestination};
use crate::hypervisor::{HypervisorError, LaunchTemplate, LaunchVariables, LaunchedVmm, Machine, PagedDestination, StreamDestination};
use crate::storage::LaidDisks;
use crate::telemetry;
use crate::types::MigrationId;
use crate::wire::{Durability, ErrorClass, Offer, STREAM_FEATURE};

/// An empty twin, by how its guest comes.
pub(super) enum Twin {
    /// Pages, which we write.
    Pages(Box<dyn PagedDestination>),
    /// A stream, which its hypervisor loads.
    Stream(Box<dyn StreamDestination>),
}

/// Where the twin of an offer comes from.
pub(super) struct Hosting {
    from: From,
    pub(super) memory_bytes_max: u64,
}

enum From {
    /// A VMM that serves the attach protocol is started.
    Vmm(LaunchTemplate),
    /// A QEMU is started.
    Qemu(LaunchTemplate),
    /// A QEMU waits already.
    QemuAt(PathBuf),
}

/// Files that a VMM leaves behind when it ends.
pub(super) struct Leavings([PathBuf; 4]);

impl Leavings {
    pub(super) fn of(runtime: &std::path::Path, migration: MigrationId) -> Self {
        Self(["sock", "qmp", "log", SOCKET].map(|what| twin_file(runtime, migration, what)))
    }

    /// A peer could fill the runtime directory with them.
    pub(super) fn remove(&self) {
        for path in &self.0 {
            // Whichever of them was made.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// How long a VMM may take to quit.
const TWIN_QUITS: Duration = Duration::from_secs(5);

impl Gateway {
    /// How this gateway would host what is offered, by what drives it.
    pub(super) fn hosting(&self, offer: &Offer, link: &Link) -> Result<Hosting, Refusal> {
        let denied = |why: String| Refusal::new(ErrorClass::Denied, why);
        if offer.hypervisor != QEMU_KIND {
            let none = || denied("this gateway accepts no VMs: its configuration has no [incoming]".into());
            let (template, incoming) = self.incoming.clone().zip(self.config.incoming.as_ref()).ok_or_else(none)?;
            return Ok(Hosting { from: From::Vmm(template), memory_bytes_max: incoming.max_memory.bytes });
        }
        let incompatible =
            |why: &str| Err(Refusal::new(ErrorClass::PeerIncompatible, format!("VM `{}` comes as a stream: {why}", offer.vm)));
        if !link.negotiated.has(STREAM_FEATURE) {
            return incompatible("its gateway did not name the feature");
        }
        if offer.stream.durability != Durability::None || offer.stream.length_padding {
            return incompatible("no image of it can be kept, and its frames are not padded");
        }
        let vm = self.config.vm(&offer.vm);
        if let Some(path) = vm.and_then(|vm| vm.incoming_qmp.clone()) {
            return Ok(Hosting { from: From::QemuAt(path), memory_bytes_max: u64::MAX });
        }
        let name = vm.and_then(|vm| vm.template.as_ref());
        let template = name.and_then(|name| self.templates.get(name).zip(self.config.templates.iter().find(|known| known.name == *name)));
        let none = || denied(format!("VM `{}` has neither `template` nor `incoming_qmp` in this gateway's configuration", offer.vm));
        let (template, configured) = template.ok_or_else(none)?;
        Ok(Hosting { from: From::Qemu(template.clone()), memory_bytes_max: configured.max_memory.bytes })
    }

    /// Starts an empty VMM, or finds the one that waits, and lets it say what this host lacks.
    pub(super) async fn build_twin(
        &self,
        hosting: Hosting,
        offer: &Offer,
        machine: Machine,
    ) -> Result<(Twin, Option<LaunchedVmm>, Leavings, Option<LaidDisks>), Refusal> {
        let runtime = &self.config.gateway.runtime_directory;
        // A Unix socket's path has at most 107 bytes: the id alone names it, and says whose twin it is.
        let file = |what| twin_file(runtime, offer.migration, what);
        let variables = LaunchVariables {
            socket: file(if matches!(hosting.from, From::Vmm(_)) { "sock" } else { "qmp" }),
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            memory_bytes: machine.regions.iter().map(|region| region.bytes).sum(),
            vcpus: machine.vcpus,
            serial: runtime.join(format!("{}.serial", offer.vm)),
            log: file("log"),
        };
        let leavings = Leavings::of(runtime, offer.migration);
        let laid = self.lay(offer, &machine)?;
        let built = tokio::task::spawn_blocking(move || build(&hosting.from, &variables, &machine)).await;
        let built = match built {
            Ok(built) => built.map_err(Refusal::from),
            Err(error) => Err(Refusal::new(ErrorClass::Bug, error.to_string())),
        };
        match built {
            Ok((twin, vmm)) => Ok((twin, vmm, leavings, laid)),
            Err(refusal) => {
                leavings.remove();
                laid.into_iter().for_each(LaidDisks::undo);
                Err(refusal)
            }
        }
    }

    /// Files for the disks that come.
    fn lay(&self, offer: &Offer, machine: &Machine) -> Result<Option<LaidDisks>, Refusal> {
        let vm = self.config.vm(&offer.vm).filter(|_| !machine.disks.is_empty());
        let Some(vm) = vm else { return Ok(None) };
        let laid = self.lay_disks(offer.migration, vm, &machine.disks);
        laid.map(Some).map_err(|error| Refusal::new(ErrorClass::Local, telemetry::chain(&error)))
    }
}

fn build(from: &From, variables: &LaunchVariables, machine: &Machine) -> Result<(Twin, Option<LaunchedVmm>), HypervisorError> {
    let (socket, vm) = (variables.socket.clone(), variables.vm.as_str());
    let template = match from {
        From::Vmm(template) | From::Qemu(template) => template,
        From::QemuAt(path) => {
            let twin = QemuDestination::prepare(path, vm, machine, None, qemu::ANSWER_WITHIN)?;
            return Ok((Twin::Stream(Box::new(twin)), None));
        }
    };
    let mut vmm = template.launch(variables, LAUNCH)?;
    let twin = match from {
        From::Vmm(_) => AttachedDestination::prepare(&socket, vm, machine, Timeouts::default()).map(|twin| Twin::Pages(Box::new(twin))),
        From::Qemu(_) | From::QemuAt(_) => QemuDestination::prepare(&socket, vm, machine, Some(variables.log.clone()), qemu::ANSWER_WITHIN)
            .map(|twin| Twin::Stream(Box::new(twin))),
    };
    match twin {
        Ok(twin) => Ok((twin, Some(vmm))),
        Err(error) => {
            // An empty twin is nobody's guest.
            let _ = vmm.kill();
            Err(error)
        }
    }
}

/// A twin that will never run was told to quit; one that does not is ended, with the guest's memory that it holds.
pub(super) async fn end_twin(mut vmm: LaunchedVmm) {
    let ended = tokio::task::spawn_blocking(move || {
        let told = Instant::now();
        while told.elapsed() < TWIN_QUITS {
            if !matches!(vmm.try_wait(), Ok(None)) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        vmm.kill()
    });
    match ended.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "a twin that nobody needs is not ended"),
        Err(error) => tracing::error!(%error, "task of a twin's end"),
    }
}
