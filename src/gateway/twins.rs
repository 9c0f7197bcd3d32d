//! Empty twins of VMs that arrive: how one is started or found, and how one ends that nobody needs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::engine::Link;
use crate::gateway::Gateway;
use crate::gateway::disks::{LAID, SOCKET, files, opened_before, places};
use crate::gateway::host::LAUNCH;
use crate::gateway::incoming::Refusal;
use crate::gateway::kept::twin_file;
use crate::gateway::launcher::{ENDED, INCOMING, Launcher, Start};
use crate::hypervisor::attach::{AttachedDestination, Timeouts};
use crate::hypervisor::qemu::{self, QEMU_KIND, QemuDestination};
use crate::hypervisor::{HypervisorError, LaunchedVmm, Machine, PagedDestination, StreamDestination};
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
    Vmm,
    /// A QEMU is started, by the template of this name.
    Qemu(String),
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
            let incoming = self.config.incoming.as_ref().ok_or_else(none)?;
            return Ok(Hosting { from: From::Vmm, memory_bytes_max: incoming.max_memory.bytes });
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
        let template = name.and_then(|name| self.config.templates.iter().find(|known| known.name == *name));
        let none = || denied(format!("VM `{}` has neither `template` nor `incoming_qmp` in this gateway's configuration", offer.vm));
        let template = template.ok_or_else(none)?;
        Ok(Hosting { from: From::Qemu(template.name.to_string()), memory_bytes_max: template.max_memory.bytes })
    }

    /// Starts an empty VMM, or finds the one that waits, and lets it say what this host lacks.
    pub(super) async fn build_twin(
        &self,
        hosting: Hosting,
        offer: &Offer,
        machine: Machine,
    ) -> Result<(Twin, Option<LaunchedVmm>, Leavings, Option<LaidDisks>), Refusal> {
        let what = Start {
            template: if let From::Qemu(name) = &hosting.from { name.clone() } else { INCOMING.to_owned() },
            migration: offer.migration,
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            memory_bytes: machine.regions.iter().map(|region| region.bytes).sum(),
            vcpus: machine.vcpus,
        };
        let runtime = &self.config.gateway.runtime_directory;
        let (leavings, note) = (Leavings::of(runtime, offer.migration), twin_file(runtime, offer.migration, LAID));
        let vm = self.config.vm(&offer.vm).filter(|_| !machine.disks.is_empty());
        let places = vm.map(|vm| places(vm, &machine.disks));
        let launcher = self.launcher.clone();
        if launcher.has_ended() && (!matches!(hosting.from, From::QemuAt(_)) || places.is_some()) {
            return Err(Refusal::new(ErrorClass::Local, ENDED));
        }
        let files = files(&machine.disks, places.as_deref().unwrap_or_default());
        if matches!(hosting.from, From::QemuAt(_)) {
            opened_before(&files).map_err(|why| Refusal::new(ErrorClass::PeerIncompatible, why))?;
        }
        let built = tokio::task::spawn_blocking(move || {
            let lay = |places: Vec<_>| LaidDisks::lay(&note, what.migration, &places, |place| launcher.make_disk(what.migration, place));
            let laid = places.map(lay).transpose().map_err(|error| Refusal::new(ErrorClass::Local, telemetry::chain(&error)))?;
            match build(&launcher, &hosting.from, &what, &machine, &files) {
                Ok((twin, vmm)) => Ok((twin, vmm, laid)),
                Err(error) => {
                    laid.into_iter().for_each(LaidDisks::undo);
                    Err(Refusal::from(error))
                }
            }
        });
        match built.await.unwrap_or_else(|error| Err(Refusal::new(ErrorClass::Bug, error.to_string()))) {
            Ok((twin, vmm, laid)) => Ok((twin, vmm, leavings, laid)),
            Err(refusal) => {
                leavings.remove();
                Err(refusal)
            }
        }
    }
}

fn build(
    launcher: &Launcher,
    from: &From,
    what: &Start,
    machine: &Machine,
    files: &[(String, PathBuf)],
) -> Result<(Twin, Option<LaunchedVmm>), HypervisorError> {
    let vm = what.vm.as_str();
    if let From::QemuAt(path) = from {
        let twin = QemuDestination::prepare(path, vm, machine, files, None, qemu::ANSWER_WITHIN)?;
        return Ok((Twin::Stream(Box::new(twin)), None));
    }
    let variables = launcher.variables(what);
    let mut vmm = launcher.launch(what, LAUNCH)?;
    let twin = match from {
        From::Vmm => {
            AttachedDestination::prepare(&variables.socket, vm, machine, Timeouts::default()).map(|twin| Twin::Pages(Box::new(twin)))
        }
        From::Qemu(_) | From::QemuAt(_) => {
            QemuDestination::prepare(&variables.socket, vm, machine, files, Some(variables.log), qemu::ANSWER_WITHIN)
                .map(|twin| Twin::Stream(Box::new(twin)))
        }
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
