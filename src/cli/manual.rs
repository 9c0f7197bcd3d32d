//! Completion scripts and manual pages, from the one definition of the flags.

use clap::CommandFactory;

use super::Ending;
use super::flags::{Cli, CompletionFlags, ManFlags};
use super::output::Out;
use crate::control::Exit;
use crate::telemetry::{ErrorClass, Problem};

pub(super) fn completion(flags: &CompletionFlags, out: Out) -> Ending {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Cli::command(), "sealane", &mut script);
    out.data(&String::from_utf8_lossy(&script));
    Ok(Exit::Done)
}

pub(super) fn man(flags: &ManFlags, out: Out) -> Ending {
    let directory = &flags.directory;
    let write = || {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(Cli::command(), directory)
    };
    write().map_err(|error| Problem::new(ErrorClass::Local, format!("cannot write manual pages to `{}`: {error}", directory.display())))?;
    out.talk(&format!("manual pages written to {}", directory.display()));
    Ok(Exit::Done)
}

#[cfg(feature = "failpoints")]
pub(super) fn failpoints(out: Out) -> Ending {
    out.data(&(crate::failpoint::ALL.join("\n") + "\n"));
    Ok(Exit::Done)
}
