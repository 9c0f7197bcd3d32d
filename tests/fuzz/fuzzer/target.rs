//! Every target: the program is called as one of `harness.rs`.

#![no_main]

#[path = "../../../certs/fixtures.rs"]
mod fixtures;
#[path = "../harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (harness::target(env!("CARGO_BIN_NAME")).run)(bytes));
