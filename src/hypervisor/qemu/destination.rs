//! An empty QEMU that waits for a guest.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::monitor::Monitor;
use super::{ANSWER_WITHIN, disks, facts};
use crate::condense::Grammar;
use crate::hypervisor::launch::log_tail_of;
use crate::hypervisor::{Disk, Exports, Guest, GuestStatus, HypervisorError, Machine, RunState, StreamDestination, StreamStage};

/// As at the source, but for what only a destination does: the disks stay nobody's until the guest is told to go on.
const CAPABILITIES: [(&str, bool); 12] = [
    ("events", true),
    ("late-block-activate", true),
    ("multifd", false),
    ("postcopy-preempt", false),
    ("switchover-ack", false),
    ("release-ram", false),
    ("x-ignore-shared", false),
    ("x-colo", false),
    ("mapped-ram", false),
    ("validate-uuid", true),
    ("xbzrle", false),
    ("compress", false),
];

/// A QEMU at the destination.
#[derive(Debug)]
pub struct QemuDestination {
    monitor: Monitor,
    /// What was offered.
    grammar: Grammar,
    /// Whether its guest may run before all of its pages are there.
    splits: bool,
    /// Where its own output goes, if a gateway started it.
    log: Option<PathBuf>,
}

impl QemuDestination {
    /// Takes the QEMU whose monitor is at `path`, which waits for a guest (`-incoming defer`), and compares it with `machine`. `files` are
    /// the devices of disks that have to be in certain files.
    ///
    /// # Errors
    /// [`HypervisorError::Incompatible`] names each thing that differs; otherwise QEMU is gone, does not wait for a guest, or
    /// breaks the protocol.
    pub fn prepare(
        path: &Path,
        vm: &str,
        machine: &Machine,
        files: &[(String, PathBuf)],
        log: Option<PathBuf>,
        within: Duration,
    ) -> Result<Self, HypervisorError> {
        let monitor = Monitor::connect(path, vm, within)?;
        let state = facts::run_state(&monitor.qmp)?;
        if state != "inmigrate" {
            return Err(monitor
                .qmp
                .refused("migrate-incoming", &format!("it is `{state}`: expected one that was started with `-incoming defer`")));
        }
        let mut lacks = facts::lacks(machine, &facts::machine(&monitor.qmp)?);
        if !machine.disks.is_empty() {
            lacks.extend(disks::lacks(&monitor.qmp, &machine.disks, files)?);
        }
        if machine.mode.may_split() && facts::has_huge_pages(&monitor.qmp) {
            lacks.push("memory for post-copy: expected pages of 4 KiB, got huge pages".to_owned());
        }
        if !lacks.is_empty() {
            return Err(HypervisorError::Incompatible { vm: vm.to_owned(), lacks });
        }
        // INVARIANT(no-self-start): from here on it is paused once it is loaded, also without `-S`.
        monitor.qmp.execute("stop", Value::Null)?;
        let splits = machine.mode.may_split();
        let wanted: Vec<(&str, bool)> = CAPABILITIES.into_iter().chain([("return-path", splits), ("postcopy-ram", splits)]).collect();
        monitor.set_capabilities(&wanted)?;
        Ok(Self { monitor, grammar: facts::grammar(machine), splits, log })
    }
}

impl Guest for QemuDestination {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        self.monitor.go_on()?;
        // What was said of the network while the guest was loaded came too early.
        let announce = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        if let Err(error) = self.monitor.qmp.execute("announce-self", announce) {
            tracing::warn!(%error, "the network is not told where the guest is");
        }
        Ok(())
    }

    fn can_renew(&self) -> bool {
        false
    }

    fn renew(&mut self) -> Result<(), HypervisorError> {
        Err(self.monitor.qmp.refused("renew", "QEMU cannot give a guest that exists a new generation"))
    }

    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        self.monitor.status()
    }

    fn destroy(&mut self) -> Result<(), HypervisorError> {
        if self.monitor.status()?.state == RunState::Running {
            return Err(self.monitor.qmp.refused("quit", "a guest runs in it"));
        }
        self.monitor.quit()
    }
}

impl Exports for QemuDestination {
    fn export(&mut self, at: &Path, disks: &[Disk], writable: bool) -> Result<(), HypervisorError> {
        disks::export(&self.monitor, at, disks, writable)
    }

    fn end_exports(&mut self) -> Result<(), HypervisorError> {
        disks::end_exports(&self.monitor, ANSWER_WITHIN)
    }
}

impl StreamDestination for QemuDestination {
    fn grammar(&self) -> Grammar {
        self.grammar.clone()
    }

    fn begin(&mut self) -> Result<UnixStream, HypervisorError> {
        self.monitor.stream("migrate-incoming", self.splits)
    }

    fn stages(&self) -> watch::Receiver<StreamStage> {
        self.monitor.stages()
    }

    fn ensure_complete(&mut self) -> Result<(), HypervisorError> {
        self.monitor.ensure("migrate-incoming", &[("completed", "paused"), ("postcopy-active", "paused")])
    }

    fn failure(&mut self) -> HypervisorError {
        // QEMU ends when it cannot load a guest, and its last words are in its log.
        match (self.monitor.failure("migrate-incoming"), &self.log) {
            (HypervisorError::Unreachable { .. }, Some(log)) => {
                self.monitor.qmp.refused("migrate-incoming", &format!("it ended and said `{}`", log_tail_of(log)))
            }
            (error, _) => error,
        }
    }

    fn address(&self) -> String {
        self.monitor.qmp.address()
    }
}
