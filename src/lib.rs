//! Sealane: a secure gateway for live-migrating virtual machines.

pub mod limits;
pub mod types;

pub mod memory;
pub mod migration;
pub mod policy;
pub mod wire;

pub mod hypervisor;
pub mod identity;
pub mod transport;
