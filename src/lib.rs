//! Sealane: a secure gateway for live-migrating virtual machines.

pub mod limits;
pub mod types;

pub mod hypervisor;
pub mod memory;
pub mod vmm;
pub mod wire;
