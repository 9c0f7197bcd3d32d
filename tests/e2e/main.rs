//! Whole migrations through the command line: real gateways, real certificates, real guests, real SIGKILL.
//!
//! `lab.rs` makes two gateways and a guest; each test breaks one thing, and says where the guest has to run afterwards.
//! `SEALANE_PINGPONG=100`, `SEALANE_SOAK=1000`, `SEALANE_CRASHES=500` and `SEALANE_OUTAGES=50` make the long runs long;
//! `SEALANE_FLEET=100` sends off that many guests at once. `SEALANE_FLOOD=10000` is how many strangers a second a flood has;
//! `flood.rs` says how it is measured. `SEALANE_SEED` repeats one. `SEALANE_PROGRAM=target/release/sealane` is another build to test.
//! `SEALANE_ROTATIONS=1000` is how often certificates and CRLs change under one migration.
//! `SEALANE_START_STEP=1` is how many milliseconds lie between two points at which a gateway that starts is told to stop.
//! `SEALANE_DURABILITIES=none,dest,both` chooses what the crashes are run with.

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

#[path = "../bundles/signing.rs"]
mod signing;

mod between;
mod bundles;
mod certificates;
mod command;
mod configuration;
mod crash;
mod disk;
mod disks;
mod durability;
mod flood;
mod forger;
mod gateway;
mod guest;
mod interruptions;
mod keys;
mod lab;
mod lies;
mod moves;
mod one_copy;
mod operators;
mod outages;
mod peers;
mod picky_vmm;
mod policy;
mod qemu;
mod qemu_channels;
mod qemu_disks;
mod qemu_network;
mod qemu_split;
mod qemu_storage;
mod qemu_streams;
mod qemus;
mod queue;
mod random;
mod relay;
mod resolve;
mod sandbox;
mod soak;
mod starts;
mod stranger;
mod tokens;
