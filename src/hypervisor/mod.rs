//! The gateway's side of every hypervisor: what a driver must provide, and the drivers.
//!
//! *Owns:* the driver traits, of hypervisors whose pages are seen and of those that send a stream of their own, and the drivers
//! `attach` (any VMM that serves the attach protocol), `image`, `synthetic` and `qemu`. *Never:* transport, policy, decisions
//! about a migration.
//! *Invariants:* `harvest-owned` (reading the dirty log destroys it: the set returned is owned by the
//! caller, which gives it back when it gives up), `paused-stays-paused` (only `resume` starts vCPUs), `no-past-twice` (a
//! guest that may repeat a part of its past gets a new generation id before it runs: `renew`, then `resume`).

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub mod attach;
mod generation;
pub mod image;
mod launch;
pub mod qemu;
pub mod synthetic;

pub use generation::{Generation, InvalidGeneration};
pub use launch::{LaunchTemplate, LaunchVariables, LaunchedVmm, TemplateError, VmmProcess};
pub use qemu::Later;

use crate::condense::Grammar;
use crate::memory::{GuestRam, PageSet};
use crate::types::{Mode, RamRegion, Side, VmUuid};

/// What a VM is made of: everything the destination needs to build an empty twin, and to say
/// *before memory is sent* why it cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Which family of driver can host it: `kvm`, `synthetic`, `image`, `qemu`.
    pub kind: String,
    /// The VM's UUID.
    pub uuid: VmUuid,
    /// Guest RAM.
    pub regions: Vec<RamRegion>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Driver-specific requirements (CPUID, MSRs, TSC, devices); bounded by `MACHINE_BYTES_MAX`.
    pub profile: serde_json::Value,
    /// Disks that move with it; no others are anybody's affair.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Whether they are copied and nothing else: the guest stays where it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_only: bool,
    /// How its memory moves.
    #[serde(default, skip_serializing_if = "Mode::is_precopy")]
    pub mode: Mode,
}

/// A disk of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The guest's device that it is behind, by the name that both hypervisors have for it.
    pub device: String,
    /// How long it is.
    pub bytes: u64,
}

/// Whether vCPUs execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// An empty twin, waiting for memory and state.
    Incoming,
    /// Executing.
    Running,
    /// Stopped between two instructions; continues with `resume`.
    Paused,
    /// The guest has ended by itself.
    Ended,
}

/// What a VMM says about its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Whether vCPUs execute.
    pub state: RunState,
    /// The guest's own verdict when it ended: 0 is fine.
    pub exit_code: Option<u32>,
    /// Last complete line on the serial console, if the VMM keeps it.
    pub last_line: Option<String>,
    /// The VM's generation, if there is a guest and the VMM keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
}

/// A driver failed; the object and the reason are in the message.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The VMM cannot be reached or closed the connection.
    #[error("VMM of `{vm}` at {address} does not answer")]
    Unreachable {
        /// Which VM.
        vm: String,
        /// Where the driver looked for it.
        address: String,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The VMM refused a request.
    #[error("VMM of `{vm}` refused `{request}`: {reason}")]
    Refused {
        /// Which VM.
        vm: String,
        /// Which request.
        request: &'static str,
        /// The VMM's words, bounded.
        reason: String,
    },
    /// The VMM broke the protocol of its driver.
    #[error("VMM of `{vm}` broke its protocol: {reason}")]
    Protocol {
        /// Which VM.
        vm: String,
        /// What was expected and what came.
        reason: String,
    },
    /// This host cannot run the machine; one line for each thing it lacks.
    #[error("this host cannot run `{vm}`: {}", .lacks.join("; "))]
    Incompatible {
        /// Which VM.
        vm: String,
        /// What is missing, one by one.
        lacks: Vec<String>,
    },
    /// Guest RAM could not be mapped or accessed.
    #[error("guest RAM of `{vm}`")]
    Ram {
        /// Which VM.
        vm: String,
        /// What failed.
        #[source]
        source: crate::memory::RamError,
    },
    /// Something on this host failed.
    #[error("{what} for `{vm}`")]
    Local {
        /// Which VM.
        vm: String,
        /// What was tried.
        what: &'static str,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
}

/// What can be done with a guest, however it moves. Calls block; run them off the async threads.
pub trait Guest: Send {
    /// Lets the guest run where it is, and takes back what was set up to move it: dirty log, throttle, the hypervisor's own
    /// migration. Idempotent. The generation stays as it is.
    ///
    /// # Errors
    /// The VMM is gone, or the guest does not run.
    fn wake(&mut self) -> Result<(), HypervisorError>;
    /// Whether [`renew`](Self::renew) can be done at all.
    fn can_renew(&self) -> bool;
    /// Gives the paused guest a new generation id. Before a resume that may repeat a part of its past: when the guest may have
    /// gone on elsewhere from this moment.
    ///
    /// # Errors
    /// The VMM is gone, the guest is not paused, or the VMM cannot do it: then the guest must not be resumed.
    fn renew(&mut self) -> Result<(), HypervisorError>;
    /// How the guest is.
    ///
    /// # Errors
    /// The VMM is gone.
    fn status(&mut self) -> Result<GuestStatus, HypervisorError>;
    /// Whether the guest was given away and lacks what only this copy has.
    ///
    /// # Errors
    /// The VMM is gone.
    fn is_lacked(&mut self) -> Result<bool, HypervisorError> {
        Ok(false)
    }
    /// The other end of a new stream for a guest that was split and whose hypervisor has lost its own, which goes on with it, and what it is
    /// written in; nothing where guests are not split.
    ///
    /// # Errors
    /// The hypervisor is gone, has lost no stream, or does not go on.
    fn stream_again(&mut self, _side: Side) -> Result<Option<(Streams, Grammar)>, HypervisorError> {
        Ok(None)
    }
    /// Ends the VMM and frees the guest's memory. Only of a copy that never runs again.
    ///
    /// # Errors
    /// The VMM is gone already.
    fn destroy(&mut self) -> Result<(), HypervisorError>;
}

/// The source end of a driver that sees pages and dirty bits.
pub trait PagedSource: Guest {
    /// What the destination has to provide.
    fn machine(&self) -> &Machine;
    /// The guest's RAM.
    fn ram(&self) -> &Arc<GuestRam>;
    /// From now on every written page is recorded.
    ///
    /// # Errors
    /// The VMM is gone or cannot track.
    fn start_tracking(&mut self) -> Result<(), HypervisorError>;
    /// Pages written since the last harvest. Reading clears the record: the caller owns the set.
    ///
    /// # Errors
    /// The VMM is gone; the record is then lost and every page must be taken as dirty.
    fn harvest(&mut self) -> Result<PageSet, HypervisorError>;
    /// Recording ends.
    ///
    /// # Errors
    /// The VMM is gone.
    fn stop_tracking(&mut self) -> Result<(), HypervisorError>;
    /// Takes `percent` of vCPU time away from the guest; 0 ends it.
    ///
    /// # Errors
    /// The VMM is gone or cannot throttle.
    fn throttle(&mut self, percent: u8) -> Result<(), HypervisorError>;
    /// Stops every vCPU between two instructions. Idempotent.
    ///
    /// # Errors
    /// The VMM is gone.
    fn pause(&mut self) -> Result<(), HypervisorError>;
    /// Lets vCPUs go on. Idempotent. The generation stays as it is.
    ///
    /// # Errors
    /// The VMM is gone.
    fn resume(&mut self) -> Result<(), HypervisorError>;
    /// All vCPU and device state of the paused guest.
    ///
    /// # Errors
    /// The VMM is gone or the guest is not paused.
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError>;
}

/// [`Guest::wake`] of a guest whose pages were watched.
fn wake_paged(guest: &mut dyn PagedSource) -> Result<(), HypervisorError> {
    guest.resume()?;
    // A guest that runs matters more than what it was measured with.
    for (what, result) in [("throttle", guest.throttle(0)), ("dirty log", guest.stop_tracking())] {
        if let Err(error) = result {
            tracing::warn!(what, error = %error, "not switched off after resume");
        }
    }
    Ok(())
}

/// The destination end: an empty twin that is filled, then started or thrown away.
pub trait PagedDestination: Guest {
    /// The twin's RAM.
    fn ram(&self) -> &Arc<GuestRam>;
    /// Checks all state first, then applies it; the guest stays paused.
    ///
    /// # Errors
    /// The state is malformed or does not fit this machine; nothing was applied.
    fn restore_state(&mut self, state: &[u8]) -> Result<(), HypervisorError>;
    /// Reads the state back, for comparison with what was sent.
    ///
    /// # Errors
    /// The VMM is gone.
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError>;
    /// Sees that the VMM has not ended. The guest stands still meanwhile, so no more is asked of it than that takes.
    ///
    /// # Errors
    /// The VMM is gone.
    fn ensure_there(&mut self) -> Result<(), HypervisorError> {
        self.status().map(drop)
    }
    /// Starts vCPUs. Idempotent. The first time the VMM counts a disruption.
    ///
    /// # Errors
    /// The VMM is gone.
    fn resume(&mut self) -> Result<(), HypervisorError>;
    /// Where the running guest can be attached to from now on, for the gateway's records.
    fn address(&self) -> String;
}

/// How far the migration of a hypervisor that sends a stream of its own has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamStage {
    /// Nothing was begun.
    Idle,
    /// The guest runs and is sent, or is being loaded.
    Flowing,
    /// At the source: the guest stands still, and the rest of it waits for [`StreamSource::go_on`].
    Stopped,
    /// Everything but pages of it is in the stream, or loaded: at the source it does not run by itself any more, at the destination it
    /// can, and gets what it lacks meanwhile.
    Split,
    /// All of it is in the stream, or loaded. The guest stays paused until it is told otherwise.
    Complete,
    /// It ended without; [`failure`](StreamSource::failure) says why.
    Failed,
}

/// What is asked of a hypervisor that decides by itself when its guest is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamGoal {
    /// The longest pause that the guest may see.
    pub downtime_max: Duration,
    /// Whether vCPUs may be slowed down to get there.
    pub throttle: bool,
}

/// Where a stream is read from.
#[derive(Debug)]
pub struct Streams {
    /// All of it, or what frames it.
    pub main: UnixStream,
    /// Pages of it, where it has channels of their own for them.
    pub others: Vec<UnixStream>,
    /// Pages that somebody waits for, where there is a channel for these.
    pub urgent: Option<Later>,
}

impl From<UnixStream> for Streams {
    fn from(main: UnixStream) -> Self {
        Self { main, others: Vec::new(), urgent: None }
    }
}

/// What a hypervisor says of its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamProgress {
    /// Guest RAM, bytes.
    pub total_bytes: u64,
    /// What of it is not sent, bytes.
    pub remaining_bytes: u64,
    /// What the guest dirties, bytes a second.
    pub dirty_bytes_per_second: u64,
    /// Passes over dirty pages.
    pub rounds: u32,
    /// The pause to expect, once it is known.
    pub downtime_expected: Option<Duration>,
}

/// How far mirrors of disks have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MirrorProgress {
    /// What was copied and has to be, bytes; grows with what the guest writes.
    pub total_bytes: u64,
    /// What has to be copied.
    pub remaining_bytes: u64,
    /// Whether both ends were equal once, and are kept so.
    pub ready: bool,
}

/// Disks of a guest that its hypervisor lets be reached over NBD.
pub trait Exports {
    /// Lets disks be reached by the names of their devices, behind a new socket that only this user can open.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses, or has no such disk.
    fn export(&mut self, at: &Path, disks: &[Disk], writable: bool) -> Result<(), HypervisorError>;
    /// Nobody reaches them any more; what was written is with the disks. Idempotent.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn end_exports(&mut self) -> Result<(), HypervisorError>;
}

/// The source end of a hypervisor that sends its guest itself.
pub trait StreamSource: Guest + Exports {
    /// Begins to copy disks to the NBD exports of their names behind a socket, and whatever the guest writes to them from now on.
    /// With `in_place` nothing is zeroed before it is copied: much of it may be there already.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn mirror(&mut self, at: &Path, disks: &[Disk], in_place: bool) -> Result<(), HypervisorError>;
    /// How far that has come.
    ///
    /// # Errors
    /// It has failed, or the hypervisor is gone.
    fn mirror_progress(&mut self) -> Result<MirrorProgress, HypervisorError>;
    /// The guest writes no more than this to each of these disks from now on, until it is woken or has left.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn slow_writes(&mut self, disks: &[Disk], bytes_per_second: u64) -> Result<(), HypervisorError>;
    /// Ends the copying of disks with both ends equal: for good when the guest is [`Stopped`](StreamStage::Stopped), else for a moment.
    ///
    /// # Errors
    /// It has failed or takes longer than `within`, or the hypervisor is gone.
    fn end_mirror(&mut self, within: Duration) -> Result<(), HypervisorError>;
    /// What the destination has to provide.
    fn machine(&self) -> &Machine;
    /// What its stream is written in, and has to say of the guest.
    fn grammar(&self) -> Grammar;
    /// Begins to send the guest, which runs on; where its stream is read from. With `beside`, what the other hypervisor asks for behind a
    /// split comes on a channel of its own, if this one can do that.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn begin(&mut self, goal: StreamGoal, beside: bool) -> Result<Streams, HypervisorError>;
    /// How far it has come, from now on. Ends with the driver.
    fn stages(&self) -> watch::Receiver<StreamStage>;
    /// Lets a guest that is [`Stopped`](StreamStage::Stopped) be sent to its end.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn go_on(&mut self) -> Result<(), HypervisorError>;
    /// Has the guest stopped soon, and what is not sent by then sent behind the switch. Only where its machine's mode says so.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn split(&mut self) -> Result<(), HypervisorError>;
    /// Changes what is asked of the pause.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn set_goal(&mut self, goal: StreamGoal) -> Result<(), HypervisorError>;
    /// Says what the path takes, bytes a second, also ahead of [`begin`](Self::begin): the socket takes more for a moment.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn set_path_rate(&mut self, bytes_per_second: u64) -> Result<(), HypervisorError>;
    /// What it says of the stream.
    ///
    /// # Errors
    /// The hypervisor is gone.
    fn progress(&mut self) -> Result<StreamProgress, HypervisorError>;
    /// Sees for itself that all of the guest is in the stream, but for pages of one that is split, and that it does not run by itself any
    /// more.
    ///
    /// # Errors
    /// It may run, or the hypervisor is gone.
    fn ensure_complete(&mut self) -> Result<(), HypervisorError>;
    /// Why it failed.
    fn failure(&mut self) -> HypervisorError;
}

/// The destination end: an empty hypervisor that loads a stream, then runs the guest or is thrown away.
pub trait StreamDestination: Guest + Exports {
    /// What the stream that it loads is written in, and has to say of the guest that was offered.
    fn grammar(&self) -> Grammar;
    /// Begins to load; where the stream is written to.
    ///
    /// # Errors
    /// The hypervisor is gone or refuses.
    fn begin(&mut self) -> Result<UnixStream, HypervisorError>;
    /// How far it has come, from now on. Ends with the driver.
    fn stages(&self) -> watch::Receiver<StreamStage>;
    /// Sees for itself that the guest is loaded, but for pages of one that is split, and paused.
    ///
    /// # Errors
    /// It is not, or the hypervisor is gone.
    fn ensure_complete(&mut self) -> Result<(), HypervisorError>;
    /// Why it failed.
    fn failure(&mut self) -> HypervisorError;
    /// Where the guest can be reached from now on, for the gateway's records.
    fn address(&self) -> String;
}

/// Where a guest is, as a gateway keeps it: which driver reaches it, and its socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A VMM that serves the attach protocol.
    Attach(std::path::PathBuf),
    /// The monitor of a QEMU.
    Qemu(std::path::PathBuf),
}

/// What stands in front of the path of a QEMU's monitor. Without, a path is one of the attach protocol.
const QEMU_SCHEME: &str = "qmp:";

impl Address {
    /// The address in a record.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.strip_prefix(QEMU_SCHEME) {
            Some(path) => Self::Qemu(path.into()),
            None => Self::Attach(text.into()),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Attach(path) => write!(f, "{}", path.display()),
            Self::Qemu(path) => write!(f, "{QEMU_SCHEME}{}", path.display()),
        }
    }
}
