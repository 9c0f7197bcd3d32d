//! How handoffs reach the guests of this host, and build one from its image: always over the attach protocol.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Host;
use crate::gateway::Gateway;
use crate::gateway::kept::twin_file;
use crate::hypervisor::attach::{AttachedDestination, AttachedSource, LaunchTemplate, LaunchVariables, Timeouts, discard, observe};
use crate::hypervisor::{HypervisorError, Machine, PagedDestination, PagedSource};
use crate::storage::ImageHead;

/// How long a VMM may take to listen.
pub(super) const LAUNCH: Duration = Duration::from_secs(10);

impl Gateway {
    pub(super) fn host(&self) -> Host {
        let runtime: Arc<Path> = self.config.gateway.runtime_directory.clone().into();
        let (template, files) = (self.incoming.clone(), Arc::clone(&runtime));
        Host {
            attach: Arc::new(|address, vm| {
                let source = AttachedSource::attach(Path::new(address), vm.as_str(), Timeouts::default())?;
                Ok(Box::new(source) as Box<dyn PagedSource>)
            }),
            look: Arc::new(|address, vm| Ok(observe(Path::new(address), vm.as_str(), Timeouts::default())?.1.state)),
            rebuild: Arc::new(move |address, head| rebuild(template.as_ref(), &files, Path::new(address), head)),
            rebuilt_at: Arc::new(move |migration| twin_file(&runtime, migration, "sock").display().to_string()),
        }
    }
}

fn rebuild(
    template: Option<&LaunchTemplate>,
    runtime: &Path,
    address: &Path,
    head: &ImageHead,
) -> Result<Box<dyn PagedDestination>, HypervisorError> {
    let vm = head.vm.as_str();
    let local = |what, why: &str| HypervisorError::Local { vm: vm.to_owned(), what, source: std::io::Error::other(why.to_owned()) };
    let template = template.ok_or_else(|| local("cannot build the guest from its image", "the configuration has no [incoming]"))?;
    let machine: Machine =
        serde_json::from_slice(&head.machine).map_err(|error| local("cannot read the machine of an image", &error.to_string()))?;
    // What an earlier try left there never ran; one that runs refuses.
    match discard(address, vm, Timeouts::default()) {
        Ok(()) | Err(HypervisorError::Unreachable { .. }) => {}
        Err(error) => return Err(error),
    }
    let _ = std::fs::remove_file(address);
    let variables = LaunchVariables {
        socket: address.to_owned(),
        vm: head.vm.clone(),
        uuid: head.uuid,
        memory_bytes: machine.regions.iter().map(|region| region.bytes).sum(),
        vcpus: machine.vcpus,
        serial: runtime.join(format!("{vm}.serial")),
        log: twin_file(runtime, head.migration, "log"),
    };
    let mut vmm = template.launch(&variables, LAUNCH)?;
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
