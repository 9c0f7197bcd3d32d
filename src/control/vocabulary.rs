//! Requests and views of the API.

use serde::{Deserialize, Serialize};

use super::RecordView;
use crate::telemetry::{Mode, Problem, Progress, ProgressSchema, Report, ReportSchema, schema_tag};
use crate::types::{Epoch, Incarnation, MigrationId, PeerName, Side, SpiffeId, Verify, VmName, VmUuid};

schema_tag!(
    /// Schema of [`GatewayView`].
    GatewaySchema = "sealane.gateway/1"
);
schema_tag!(
    /// Schema of [`VmList`].
    VmsSchema = "sealane.vms/1"
);
schema_tag!(
    /// Schema of [`PeerList`].
    PeersSchema = "sealane.peers/1"
);
schema_tag!(
    /// Schema of [`MigrationList`].
    MigrationsSchema = "sealane.migrations/1"
);
schema_tag!(
    /// Schema of [`MigrationView`].
    MigrationSchema = "sealane.migration/1"
);
schema_tag!(
    /// Schema of [`PlanView`].
    PlanSchema = "sealane.plan/1"
);
schema_tag!(
    /// Schema of [`History`].
    HistorySchema = "sealane.history/1"
);

/// Asks for a migration. What is absent is the configuration's default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The VM, which runs here.
    pub vm: VmName,
    /// Where it goes.
    pub to: PeerName,
    /// Most that goes over the wire.
    #[serde(default)]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Longest pause wanted.
    #[serde(default)]
    pub max_downtime_seconds: Option<f64>,
    /// Longest migration.
    #[serde(default)]
    pub timeout_seconds: Option<f64>,
    /// Longest outage of the link that is waited out; the gateway's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_outage_seconds: Option<f64>,
    /// How memory moves.
    #[serde(default)]
    pub mode: Mode,
    /// Whether disks move too.
    #[serde(default)]
    pub storage: Storage,
    /// Whether what disks hold is compared in the pause, where they move too.
    #[serde(default)]
    pub verify_disks: bool,
    /// What is compared before the switch.
    #[serde(default)]
    pub verify: Option<Verify>,
    /// Whether the guest may be slowed down so that it converges.
    #[serde(default)]
    pub throttle: bool,
    /// Whether only to say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Codec of page batches.
    #[serde(default)]
    pub compress: Option<Compress>,
    /// Lanes wanted.
    #[serde(default)]
    pub lanes: Option<u16>,
    /// Channels on which a QEMU hands over pages; the gateway's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<u16>,
}

impl MigrateRequest {
    /// Everything else as the configuration has it.
    #[must_use]
    pub fn new(vm: VmName, to: PeerName) -> Self {
        Self {
            vm,
            to,
            bandwidth_bytes_per_second: None,
            max_downtime_seconds: None,
            timeout_seconds: None,
            max_outage_seconds: None,
            mode: Mode::Precopy,
            storage: Storage::None,
            verify_disks: false,
            verify: None,
            throttle: false,
            dry_run: false,
            compress: None,
            lanes: None,
            channels: None,
        }
    }
}

/// Which disks move with a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// None: they are shared, or there are none.
    #[default]
    None,
    /// All that the guest can write to, of a QEMU's.
    All,
    /// The same, and the guest stays: they are copied ahead of its migration.
    Only,
}

/// What makes pages smaller: `auto`, `none`, `lz4`, `zstd` or `zstd:LEVEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compress {
    /// Whatever gets the pages there soonest.
    Auto,
    /// Nothing.
    None,
    /// LZ4 block format.
    Lz4,
    /// Zstandard, at a level or at the default one.
    Zstd(Option<u8>),
}

impl std::fmt::Display for Compress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::None => f.pad("none"),
            Self::Lz4 => f.pad("lz4"),
            Self::Zstd(None) => f.pad("zstd"),
            Self::Zstd(Some(level)) => write!(f, "zstd:{level}"),
        }
    }
}

impl std::str::FromStr for Compress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = |level: &str| level.parse().ok().filter(|level| (1..=ZSTD_LEVEL_MAX).contains(level));
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd(None)),
            other => other.strip_prefix("zstd:").and_then(level).map(|level| Self::Zstd(Some(level))).ok_or_else(|| {
                format!("expected `auto`, `none`, `lz4`, `zstd` or `zstd:N` with N from 1 to {ZSTD_LEVEL_MAX}, got `{other}`")
            }),
        }
    }
}

impl TryFrom<String> for Compress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Compress> for String {
    fn from(compress: Compress) -> Self {
        compress.to_string()
    }
}

/// Levels above take minutes for a GiB.
const ZSTD_LEVEL_MAX: u8 = 19;

/// Changes a migration under way. What is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// Most that goes over the wire.
    #[serde(default)]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Longest pause wanted.
    #[serde(default)]
    pub max_downtime_seconds: Option<f64>,
}

/// The gateway itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GatewayView {
    /// Version of this object.
    pub schema: GatewaySchema,
    /// Its name.
    pub name: PeerName,
    /// Its site.
    pub site: String,
    /// Version of the program.
    pub version: String,
    /// Who it proves to be.
    pub spiffe: Option<SpiffeId>,
    /// Where peers reach it, with the port in use.
    pub listen: String,
    /// Its journal.
    pub incarnation: Incarnation,
    /// When its certificate ends, RFC 3339.
    pub certificate_expires: Option<String>,
    /// SHA-256 of its policy set, hexadecimal.
    pub policy_digest: Option<String>,
    /// Migrations under way, without those that wait for their turn.
    pub migrations_active: u32,
    /// Departures that wait for their turn.
    #[serde(default)]
    pub migrations_queued: u32,
    /// What it has given up for its own safety.
    #[serde(default)]
    pub sandbox: Option<SandboxView>,
    /// What it cannot do until it is restarted, for people; nothing when all is well.
    #[serde(default)]
    pub impaired: Option<String>,
}

/// What a gateway has given up since it started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SandboxView {
    /// `gateway.sandbox` of its configuration: `require`, `auto` or `off`.
    pub setting: String,
    /// The version of Landlock's interface by which files are confined; absent where the kernel has none.
    pub landlock_abi: Option<u32>,
    /// Whether system calls are filtered.
    pub seccomp: bool,
    /// Whether the gateway's process could read its own private keys all the same: their files are where it needs others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keys_readable: bool,
}

/// All VMs that the gateway knows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct VmList {
    /// Version of this object.
    pub schema: VmsSchema,
    /// By name.
    pub vms: Vec<VmView>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: VmName,
    /// Its UUID.
    pub uuid: VmUuid,
    /// How it is.
    pub state: VmState,
    /// `here`, or the peer it went to.
    #[serde(rename = "where")]
    pub place: String,
    /// `kvm`, `synthetic`, `image`.
    pub driver: String,
    /// The epoch of its owner.
    pub owner_epoch: Epoch,
    /// Guest RAM, when its VMM answers.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// vCPUs, when its VMM answers.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// Why it is so: what makes this gateway or another its owner, and what keeps it from running.
    #[serde(default)]
    pub why: Option<String>,
}

/// How a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Executing here.
    Running,
    /// Here and stopped.
    Paused,
    /// Executing here, and leaving.
    Leaving,
    /// On its way here; not executing here.
    Arriving,
    /// Runs on a peer.
    Gone,
    /// The guest has ended by itself.
    Ended,
    /// Its VMM does not answer.
    Unreachable,
    /// Here, and it gets no further than to the first page of its memory that it lacks.
    LacksPages,
    /// An operator must decide where it runs.
    InDoubt,
    /// It belongs here, and no memory of it is left: it has to be started from its disks.
    Cold,
}

/// All peers of the configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PeerList {
    /// Version of this object.
    pub schema: PeersSchema,
    /// By name.
    pub peers: Vec<PeerView>,
}

/// A peer gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    /// Its name here.
    pub name: PeerName,
    /// Where it listens.
    pub address: String,
    /// Who it must prove to be.
    pub spiffe: SpiffeId,
    /// Its site.
    pub site: String,
    /// Whether the last try reached and authenticated it; absent before the first.
    #[serde(default)]
    pub reachable: Option<bool>,
    /// Round-trip time of the last try.
    #[serde(default)]
    pub rtt_seconds: Option<f64>,
    /// Why it was not reached.
    #[serde(default)]
    pub why: Option<String>,
}

/// Migrations, newest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MigrationList {
    /// Version of this object.
    pub schema: MigrationsSchema,
    /// Newest first.
    pub migrations: Vec<MigrationView>,
}

/// A migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationView {
    /// Version of this object.
    pub schema: MigrationSchema,
    /// The attempt.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// The other gateway.
    pub peer: PeerName,
    /// Which end this gateway is.
    pub side: Side,
    /// How it is.
    pub state: MigrationState,
    /// How far, while it is under way.
    #[serde(default)]
    pub progress: Option<Progress>,
    /// How it ended.
    #[serde(default)]
    pub report: Option<Report>,
    /// What the journal has of it, where that matters: it was interrupted, is in doubt or has failed. Only for one by its id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<RecordView>,
}

/// How a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// Under way.
    Active,
    /// Under way, and asked to stop.
    Cancelling,
    /// The VM runs at the destination.
    Completed,
    /// It failed; the VM stays on the source.
    Failed,
    /// Somebody stopped it.
    Cancelled,
    /// An operator must decide.
    InDoubt,
}

/// What a migration would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanView {
    /// Version of this object.
    pub schema: PlanSchema,
    /// The VM.
    pub vm: VmName,
    /// Where it would go.
    pub to: PeerName,
    /// Whether it would be started.
    pub possible: bool,
    /// What was looked at, in order.
    pub checks: Vec<Check>,
    /// How long and how much, if that can be told.
    #[serde(default)]
    pub estimate: Option<Estimate>,
    /// The first thing that makes it impossible.
    #[serde(default)]
    pub error: Option<Problem>,
}

/// One thing that was looked at before a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What, e.g. `policy`.
    pub name: String,
    /// What came out.
    pub verdict: CheckVerdict,
    /// In words.
    pub detail: String,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
}

/// What a check said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckVerdict {
    /// Fine.
    Pass,
    /// It works, but.
    Warn,
    /// It does not work.
    Fail,
    /// Not looked at, because something before it failed.
    Skipped,
}

/// How long and how much.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// From start to end.
    pub duration_seconds: f64,
    /// The pause.
    pub downtime_seconds: f64,
    /// Over the wire.
    pub wire_bytes: u64,
}

/// Reports of finished migrations.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct History {
    /// Version of this object.
    pub schema: HistorySchema,
    /// Newest first.
    pub reports: Vec<Report>,
}

/// One line of a migration's event stream: the bare object, told apart by its `schema`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Event {
    /// How far.
    Progress(Box<Progress>),
    /// How it ended; the last line.
    Report(Box<Report>),
}

/// A line that is not an event.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// Not JSON, or not of that schema.
    #[error("event that does not read as its schema")]
    Json(#[from] serde_json::Error),
    /// A schema that this program does not know.
    #[error("event of schema `{schema}`: expected `{}` or `{}`", ProgressSchema::TEXT, ReportSchema::TEXT)]
    Schema {
        /// As given, cut to a printable length.
        schema: String,
    },
}

impl Event {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no event of a schema that this program knows.
    pub fn from_line(line: &[u8]) -> Result<Self, EventError> {
        #[derive(Deserialize)]
        struct Head {
            schema: String,
        }
        match serde_json::from_slice::<Head>(line)?.schema.as_str() {
            ProgressSchema::TEXT => Ok(Self::Progress(serde_json::from_slice(line)?)),
            ReportSchema::TEXT => Ok(Self::Report(serde_json::from_slice(line)?)),
            other => Err(EventError::Schema { schema: other.chars().take(60).flat_map(char::escape_default).collect() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Outcome, RunningOn};

    #[test]
    fn a_request_may_leave_out_all_but_vm_and_peer_and_has_no_other_keys() {
        let least: MigrateRequest = serde_json::from_str(r#"{"vm":"web","to":"gw-b"}"#).unwrap();
        assert_eq!(least, MigrateRequest::new("web".parse().unwrap(), "gw-b".parse().unwrap()));
        assert_eq!(serde_json::from_str::<MigrateRequest>(&serde_json::to_string(&least).unwrap()).unwrap(), least);
        for bad in [
            r#"{"vm":"web"}"#,
            r#"{"vm":"a b","to":"x"}"#,
            r#"{"vm":"web","to":"x","path":"/etc"}"#,
            r#"{"vm":"web","to":"x","mode":"warp"}"#,
        ] {
            assert!(serde_json::from_str::<MigrateRequest>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn events_are_told_apart_by_their_schema() {
        let id = MigrationId([3; 16]);
        let progress = Event::Progress(Box::new(Progress::new(id)));
        let report = Event::Report(Box::new(Report::new(id, "web".parse().unwrap(), Outcome::Failed, RunningOn::Source)));
        for event in [progress, report] {
            let line = serde_json::to_vec(&event).unwrap();
            assert_eq!(Event::from_line(&line).unwrap(), event);
        }
        let other = Event::from_line(br#"{"schema":"sealane.progress/2"}"#).unwrap_err().to_string();
        assert_eq!(other, "event of schema `sealane.progress/2`: expected `sealane.progress/1` or `sealane.report/1`");
        assert!(Event::from_line(b"{").is_err());
    }

    #[test]
    fn a_vm_says_where_it_is_under_the_key_where() {
        let vm = VmView {
            name: "web".parse().unwrap(),
            uuid: VmUuid([1; 16]),
            state: VmState::InDoubt,
            place: "here".to_owned(),
            driver: "kvm".to_owned(),
            owner_epoch: Epoch(3),
            memory_bytes: None,
            vcpus: None,
            why: None,
        };
        let json = serde_json::to_value(vm).unwrap();
        assert_eq!((&json["where"], &json["state"], &json["owner_epoch"]), (&"here".into(), &"in-doubt".into(), &3.into()));
    }
}
