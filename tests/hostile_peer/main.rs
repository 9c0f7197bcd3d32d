//! A peer with a valid certificate that does what no gateway of ours does, against real gateway processes.
//!
//! `source.rs` and `destination.rs` are the two ends, played with the library; the other files are what they do
//! wrong. After every case the gateway lives, has no twin left, has not grown, and has said why in its audit log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]
#![allow(clippy::cast_possible_truncation, reason = "tests with small numbers")]

mod destination;
mod floods;
mod frames;
mod greeting;
mod handoff;
mod kvm;
mod lab;
mod offers;
mod order;
mod outgoing;
mod source;
