//! The command line: flags, what each command does, how it looks, and the exit code.
//!
//! *Owns:* every flag and its help, rendering, Ctrl-C, exit codes. *Never:* decides about a migration or
//! touches a hypervisor; commands about migrations go to a gateway through `control::Client`.
//! *Invariants:* `data-on-stdout` (stdout carries data only, stderr everything else), `one-exit-table` (exit
//! codes come from `control::exit_of` and `control::exit_of_report`).
//! *Read first:* `flags.rs`, then `daemon.rs` and `follow.rs`.

mod audit;
mod bench;
mod config;
mod daemon;
mod demo;
mod doctor;
mod flags;
mod follow;
mod manual;
mod output;
mod pki;
mod policy;
mod render;
mod resolve;
#[cfg(test)]
mod tests;
mod tools;
mod vmm;

use std::process::ExitCode;

use clap::Parser;

pub use flags::{Cli, Command};
pub use tools::{
    AuditCommand, AuditFilterFlags, BenchCommand, BenchFlags, BenchListenFlags, BundleCommand, BundleVerifyFlags, ContentFlag, DemoFlags,
    DemoHypervisor, HugepagesFlag, Payload, PkiCommand, PolicyAction, PolicyCommand, PolicyExplainFlags, VmmCommand, VmmRunFlags,
};

use crate::control::{Exit, exit_of};
use crate::telemetry::Problem;
use flags::{ConfigCommand, StorageCommand};
use output::Out;

/// How a command ends: an exit code, or a problem that is still to be told.
type Ending = Result<Exit, Problem>;

/// Parses the arguments, runs the command, tells what went wrong.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are data; everything else is talk. Nobody is left to tell when writing fails.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(Exit::Usage.code()) } else { ExitCode::SUCCESS };
        }
    };
    let out = Out::new(wants_json(&cli.command));
    let exit = dispatch(cli.command, out).unwrap_or_else(|problem| {
        out.problem(&problem);
        exit_of(&problem)
    });
    ExitCode::from(exit.code())
}

fn dispatch(command: Command, out: Out) -> Ending {
    match command {
        Command::Demo(flags) => demo::demo(&flags, out),
        Command::Gateway(flags) => daemon::gateway(&flags),
        Command::Launcher => daemon::launcher(),
        Command::KeyHolder { .. } => daemon::key_holder(),
        Command::Migrate(flags) => daemon::migrate(&flags, out),
        Command::Plan(flags) => daemon::plan(&flags, out),
        Command::Storage(command) => daemon::storage(&command, out),
        Command::Vms(flags) => daemon::vms(&flags, out),
        Command::Peers(flags) => daemon::peers(&flags, out),
        Command::Status(flags) => daemon::status(&flags, out),
        Command::Watch(flags) => daemon::watch(&flags, out),
        Command::History(flags) => daemon::history(&flags, out),
        Command::Cancel(flags) => daemon::cancel(&flags, out),
        Command::Reload(flags) => daemon::reload(&flags, out),
        Command::Resolve(flags) => resolve::resolve(&flags, out),
        Command::Set(flags) => daemon::set(&flags, out),
        Command::Pki(command) => pki::pki(&command, out),
        Command::Policy(command) => policy::policy(&command, out),
        Command::Audit(command) => audit::audit(&command, out),
        Command::Vmm(command) => vmm::vmm(&command),
        Command::Bench(flags) => bench::bench(&flags, out),
        Command::Doctor(flags) => doctor::doctor(&flags, out),
        Command::Config(ConfigCommand::Check(flags)) => config::check(&flags, out),
        Command::Completion(flags) => manual::completion(&flags, out),
        Command::Man(flags) => manual::man(&flags, out),
        #[cfg(feature = "failpoints")]
        Command::Failpoints => manual::failpoints(out),
    }
}

/// Known before the command runs, because failures are objects too.
fn wants_json(command: &Command) -> bool {
    match command {
        Command::Demo(flags) => flags.json,
        Command::Bench(flags) => flags.json || matches!(&flags.command, Some(BenchCommand::Listen(listen)) if listen.json),
        Command::Migrate(flags) => flags.migration.daemon.json,
        Command::Plan(flags) => flags.daemon.json,
        Command::Storage(StorageCommand::Migrate(flags)) => flags.daemon.json,
        Command::Vms(flags) | Command::Peers(flags) | Command::History(flags) | Command::Reload(flags) => flags.json,
        Command::Status(flags) => flags.daemon.json,
        Command::Watch(flags) | Command::Cancel(flags) => flags.daemon.json,
        Command::Resolve(flags) => flags.daemon.json,
        Command::Set(flags) => flags.daemon.json,
        Command::Doctor(flags) => flags.json,
        Command::Config(ConfigCommand::Check(flags)) => flags.json,
        Command::Pki(PkiCommand::Show { json, .. })
        | Command::Policy(
            PolicyCommand::Check { json, .. }
            | PolicyCommand::Test { json, .. }
            | PolicyCommand::Explain(PolicyExplainFlags { json, .. })
            | PolicyCommand::Diff { json, .. }
            | PolicyCommand::Bundle(BundleCommand::Show { json, .. } | BundleCommand::Verify(BundleVerifyFlags { json, .. })),
        )
        | Command::Audit(AuditCommand::Show { json, .. } | AuditCommand::Verify { json, .. } | AuditCommand::VerifyProof { json, .. }) => {
            *json
        }
        #[cfg(feature = "failpoints")]
        Command::Failpoints => false,
        Command::Policy(PolicyCommand::Bundle(BundleCommand::Make { .. }))
        | Command::Audit(AuditCommand::Prove { .. } | AuditCommand::RotateKey { .. } | AuditCommand::Export { .. })
        | Command::Gateway(_)
        | Command::Launcher
        | Command::KeyHolder { .. }
        | Command::Pki(_)
        | Command::Vmm(_)
        | Command::Completion(_)
        | Command::Man(_) => false,
    }
}
