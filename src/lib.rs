//! Sealane: a secure gateway for live-migrating virtual machines.

pub mod limits;
pub mod types;

pub mod audit;
pub mod hypervisor;
pub mod memory;
pub mod policy;
pub mod wire;
