//! Starts VMMs, makes the files of disks, and opens certificates and CRLs, for a gateway that can do none of it itself.
//!
//! *Owns:* the process `sealane launcher`, which is there before the gateway has read a byte from outside, and stays out of its sandbox;
//! the messages between the two. *Never:* a command line or a path that the configuration does not have: the gateway names a template
//! or a disk, and the places of other files follow from the migration.
//! *Invariants:* `templates-once` (what can be started or made was fixed before the first message), `own-children-only` (only what this
//! launcher started is ended by it). VMMs outlive both.
//! *Read first:* [`Request`] and [`Answer`], then `process.rs` and `client.rs`.

mod client;
mod process;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(super) use client::{ENDED, Launcher};
pub use process::run;

use crate::config::{Config, Trust};
use crate::gateway::disks::longest;
use crate::gateway::kept::twin_file;
use crate::hypervisor::{LaunchTemplate, LaunchVariables};
use crate::storage::DiskPlace;
use crate::telemetry::Problem;
use crate::types::{MigrationId, VmName, VmUuid};
use crate::wire::ErrorClass;

/// What the gateway says.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// A VMM is to be started.
    Start { number: u64, what: Start },
    /// A file is to be made for a disk that comes with a migration.
    Make { number: u64, migration: MigrationId, place: DiskPlace },
    /// One of the files that are no secret is to be opened, by its place in the list.
    Open { number: u64, file: usize },
    /// The VMM of this number is to be ended, and all that it has started.
    End { number: u64 },
}

/// What the launcher says. It answers every [`Request`] but the last, and that with [`Answer::Ended`].
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// First, and once: it is who it is to be, and has its templates.
    Ready,
    Started {
        number: u64,
        pid: u32,
    },
    Made {
        number: u64,
        /// Of an attempt that came to nothing.
        kept: bool,
    },
    /// The file comes along.
    Opened {
        number: u64,
    },
    /// The file cannot be opened, as the system says it.
    NotOpened {
        number: u64,
        errno: i32,
    },
    Refused {
        number: u64,
        why: String,
    },
    /// Ended, by itself or by request; the status as `wait` gives it.
    Ended {
        number: u64,
        status: i32,
    },
}

/// Everything that can ever be started and made.
#[derive(Debug, Serialize, Deserialize)]
struct Registration {
    runtime_directory: PathBuf,
    user: Option<String>,
    templates: BTreeMap<String, Registered>,
    /// With the longest that they may be.
    disks: Vec<DiskPlace>,
    /// Certificates, roots and CRLs: what lies beside keys, and a gateway may still see.
    files: Vec<PathBuf>,
}

/// One template of the configuration.
#[derive(Debug, Serialize, Deserialize)]
struct Registered {
    command: Vec<String>,
    max_memory_bytes: u64,
}

/// One VMM to start: all that can be chosen about it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Start {
    /// A template's name, or [`INCOMING`].
    pub(super) template: String,
    pub(super) migration: MigrationId,
    pub(super) vm: VmName,
    pub(super) uuid: VmUuid,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u32,
}

/// The template of `[incoming]`; no `[[template]]` can have this name.
pub(super) const INCOMING: &str = "[incoming]";

/// How the files end by which a VMM and a QEMU are reached.
const ATTACH: &str = "sock";
const MONITOR: &str = "qmp";

impl Registration {
    fn of(config: &Config) -> Self {
        let one = |command: &[String], max_memory_bytes| Registered { command: command.to_owned(), max_memory_bytes };
        let incoming = config.incoming.iter().map(|it| (INCOMING.to_owned(), one(&it.command, it.max_memory.bytes)));
        let named = config.templates.iter().map(|it| (it.name.to_string(), one(&it.command, it.max_memory.bytes)));
        Self {
            // It has a directory of its own to be relative to, and it may be another one.
            runtime_directory: std::path::absolute(&config.gateway.runtime_directory).unwrap_or_default(),
            user: config.gateway.user.clone(),
            templates: incoming.chain(named).collect(),
            files: config.identity.trust.iter().flat_map(Trust::files).chain([&config.identity.certificate]).cloned().collect(),
            disks: config.vms.iter().flat_map(|vm| &vm.disks).filter_map(longest).collect(),
        }
    }

    /// The templates, ready to be filled, and how much memory each may be started with.
    fn templates(&self) -> Result<BTreeMap<String, (LaunchTemplate, u64)>, Problem> {
        let checked = |(name, Registered { command, max_memory_bytes }): (&String, &Registered)| {
            let wrong = |error| Problem::new(ErrorClass::Misuse, format!("template `{name}`: {error}")).with_code("configuration");
            Ok((name.clone(), (LaunchTemplate::new(command).map_err(wrong)?, *max_memory_bytes)))
        };
        self.templates.iter().map(checked).collect()
    }
}

impl Start {
    /// What the placeholders of the template stand for. Both ends come to the same.
    pub(super) fn variables(&self, runtime: &Path) -> LaunchVariables {
        let socket = if self.template == INCOMING { ATTACH } else { MONITOR };
        LaunchVariables {
            // A Unix socket's path has at most 107 bytes: the id alone names it, and says whose twin it is.
            socket: twin_file(runtime, self.migration, socket),
            vm: self.vm.clone(),
            uuid: self.uuid,
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            serial: runtime.join(format!("{}.serial", self.vm)),
            log: twin_file(runtime, self.migration, "log"),
        }
    }
}

#[cfg(test)]
mod tests;
