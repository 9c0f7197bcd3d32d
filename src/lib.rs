//! Sealane: a secure gateway for live-migrating virtual machines.

pub mod limits;
pub mod types;

pub mod memory;
pub mod migration;
pub mod policy;
pub mod cli;
pub mod config;
pub mod control;
pub mod hypervisor;
pub mod journal;
pub mod memory;
pub mod telemetry;
pub mod wire;

pub mod hypervisor;
pub mod identity;
pub mod transport;
pub mod memory;
pub mod transport;
pub mod vmm;
pub mod wire;
