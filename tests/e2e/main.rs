//! Whole migrations through the command line: real gateways, real certificates, real guests, real SIGKILL.
//!
//! `lab.rs` makes two gateways and a guest; each test breaks one thing, and says where the guest has to run afterwards.
//! `SEALANE_PINGPONG=100` and `SEALANE_CRASHES=500` make the two long runs long; `SEALANE_SEED` repeats one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test may stop at the first surprise, and says what it skips"
)]

#[path = "../../certs/fixtures.rs"]
mod fixtures;

mod certificates;
mod command;
mod configuration;
mod crash;
mod disk;
mod gateway;
mod guest;
mod interruptions;
mod lab;
mod moves;
mod operators;
mod peers;
mod picky_vmm;
mod policy;
mod stranger;
