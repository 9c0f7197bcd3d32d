//! The `sealane` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    sealane::cli::run()
}
