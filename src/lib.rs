#![doc = include_str!("../ARCHITECTURE.md")]

pub mod failpoint;
pub mod limits;
pub mod types;

pub mod condense;
pub mod memory;
pub mod migration;
pub mod policy;
pub mod wire;

pub mod audit;
pub mod companion;
pub mod hypervisor;
pub mod identity;
pub mod journal;
pub mod storage;
pub mod telemetry;
pub mod transport;
pub mod vmm;

pub mod engine;

pub mod cli;
pub mod config;
pub mod control;
pub mod gateway;
