//! What can go wrong in the reference VMM.

use std::io;

use super::kvm::StateError;
use crate::memory::{LayoutError, RamError};

/// The reference VMM refused a request or failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The configuration cannot be built.
    #[error("invalid `{field}`: {reason}")]
    Config {
        /// Which setting.
        field: &'static str,
        /// What was expected and what was given.
        reason: String,
    },
    /// `/dev/kvm` is missing or may not be used.
    #[error("cannot use `/dev/kvm`")]
    NoKvm(#[source] io::Error),
    /// The kernel lacks something that the VMM cannot do without.
    #[error("this kernel's KVM lacks `{capability}`")]
    MissingCapability {
        /// The capability as the kernel documents it.
        capability: &'static str,
    },
    /// This host cannot run the machine; one line for each thing it lacks.
    #[error("this host cannot run the machine: {}", .lacks.join("; "))]
    Incompatible {
        /// What is missing, one by one.
        lacks: Vec<String>,
    },
    /// A KVM request failed.
    #[error("KVM refused `{request}`")]
    Kvm {
        /// Which request.
        request: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something on this host failed.
    #[error("cannot {what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The synthetic guest cannot be built.
    #[error("cannot build a synthetic guest")]
    Synthetic(#[source] crate::hypervisor::HypervisorError),
    /// The memory layout is not one.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest RAM could not be mapped or accessed.
    #[error("guest RAM")]
    Ram(#[source] RamError),
    /// A guest image does not fit or is not what it was said to be.
    #[error("cannot boot `{image}`: {reason}")]
    Boot {
        /// Which image.
        image: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// Saved state that was refused; nothing was applied.
    #[error("state refused, nothing was applied")]
    State(#[source] StateError),
    /// State that the kernel refused half-way: this VM can only be thrown away.
    #[error("KVM refused restored `{part}` of vCPU {vcpu}: this VM cannot run")]
    Apply {
        /// Which part of the state.
        part: &'static str,
        /// Which vCPU; 0 for parts that belong to the VM.
        vcpu: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The request does not fit the VM's state.
    #[error("cannot {request}: the guest is {actual}, expected {expected}")]
    Misuse {
        /// What was asked for.
        request: &'static str,
        /// What state allows it.
        expected: &'static str,
        /// The state the guest is in.
        actual: &'static str,
    },
    /// vCPUs did not stop within the bound.
    #[error("{running} vCPUs did not stop within {milliseconds} ms")]
    StuckVcpus {
        /// vCPUs that still run.
        running: usize,
        /// How long the VMM waited.
        milliseconds: u128,
    },
}

impl VmmError {
    pub(super) fn kvm(request: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> Self {
        move |source| Self::Kvm { request, source: source.into() }
    }

    pub(super) fn local(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Local { what, source }
    }
}
