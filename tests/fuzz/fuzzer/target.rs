//! Every target: the program is called as one of `harness.rs`.

#![no_main]

#[path = "../../../certs/fixtures.rs"]
mod fixtures;
#[path = "../harness.rs"]
mod harness;

// What the tests begin with is laid where `.ci/fuzz` says, so that no target begins with nothing.
libfuzzer_sys::fuzz_target!(
    init: {
        if let Some(directory) = std::env::var_os("SEALANE_SEEDS").map(std::path::PathBuf::from) {
            for (number, seed) in (harness::target(env!("CARGO_BIN_NAME")).seeds)().into_iter().enumerate() {
                std::fs::write(directory.join(format!("seed-{number}")), seed).expect("a directory for seeds");
            }
        }
    },
    |bytes: &[u8]| (harness::target(env!("CARGO_BIN_NAME")).run)(bytes)
);
