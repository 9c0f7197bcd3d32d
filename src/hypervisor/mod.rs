//! The gateway's side of every hypervisor: what a driver must provide, and the drivers.
//!
//! *Owns:* the paged driver traits and the drivers `attach` (any VMM that serves the attach
//! protocol), `image` and `synthetic`. *Never:* transport, policy, decisions about a migration.
//! *Invariants:* `harvest-owned` (reading the dirty log destroys it: the set returned is owned by the
//! caller, which gives it back when it gives up), `paused-stays-paused` (only `resume` starts vCPUs), `no-past-twice` (a
//! guest that may repeat a part of its past gets a new generation id before it runs: `renew`, then `resume`).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub mod attach;
mod generation;
pub mod image;
pub mod synthetic;

pub use generation::{Generation, InvalidGeneration};

use crate::memory::{GuestRam, PageSet};
use crate::types::{RamRegion, VmUuid};

/// What a VM is made of: everything the destination needs to build an empty twin, and to say
/// *before memory is sent* why it cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Which family of driver can host it: `kvm`, `synthetic`, `image`.
    pub kind: String,
    /// The VM's UUID.
    pub uuid: VmUuid,
    /// Guest RAM.
    pub regions: Vec<RamRegion>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Driver-specific requirements (CPUID, MSRs, TSC, devices); bounded by `MACHINE_BYTES_MAX`.
    pub profile: serde_json::Value,
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
    /// The VMM broke the attach protocol.
    #[error("VMM of `{vm}` broke the attach protocol: {reason}")]
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

/// The source end of a driver that sees pages and dirty bits. Calls block; run them off the
/// async threads.
pub trait PagedSource: Send {
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
    /// Gives the paused guest a new generation id. Before a resume that may repeat a part of its past: when the guest may have
    /// gone on elsewhere from this moment.
    ///
    /// # Errors
    /// The VMM is gone, the guest is not paused, or the VMM cannot do it: then the guest must not be resumed.
    fn renew(&mut self) -> Result<(), HypervisorError>;
    /// All vCPU and device state of the paused guest.
    ///
    /// # Errors
    /// The VMM is gone or the guest is not paused.
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError>;
    /// How the guest is.
    ///
    /// # Errors
    /// The VMM is gone.
    fn status(&mut self) -> Result<GuestStatus, HypervisorError>;
    /// Ends the VMM and frees the guest's memory. Only after the destination runs it.
    ///
    /// # Errors
    /// The VMM is gone already.
    fn destroy(&mut self) -> Result<(), HypervisorError>;
}

/// The destination end: an empty twin that is filled, then started or thrown away.
pub trait PagedDestination: Send {
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
    /// Starts vCPUs. Idempotent. The first time the VMM counts a disruption.
    ///
    /// # Errors
    /// The VMM is gone.
    fn resume(&mut self) -> Result<(), HypervisorError>;
    /// Gives the restored guest a new generation id. Before it is resumed from state that may have been resumed before, such as
    /// an image on disk.
    ///
    /// # Errors
    /// As [`PagedSource::renew`].
    fn renew(&mut self) -> Result<(), HypervisorError>;
    /// How the guest is.
    ///
    /// # Errors
    /// The VMM is gone.
    fn status(&mut self) -> Result<GuestStatus, HypervisorError>;
    /// Throws the twin away.
    ///
    /// # Errors
    /// The VMM is gone already.
    fn destroy(&mut self) -> Result<(), HypervisorError>;
    /// Where the running guest can be attached to from now on, for the gateway's records.
    fn address(&self) -> String;
}
