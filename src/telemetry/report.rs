//! The report of a finished migration. Its JSON field names are a contract (design section 5).

use serde::{Deserialize, Serialize};

use super::{Problem, ReportSchema};
use crate::memory::PageCounts;
pub use crate::types::Mode;
use crate::types::{MigrationId, SpiffeId, VmName};

/// What a finished migration did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this object.
    pub schema: ReportSchema,
    /// The attempt.
    pub migration_id: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// How it ended.
    pub state: Outcome,
    /// Where the VM runs now.
    pub running_on: RunningOn,
    /// The driver: `kvm`, `synthetic`, `image`.
    pub hypervisor: String,
    /// How memory moved.
    pub mode: Mode,
    /// Passes over dirty pages.
    pub rounds: u32,
    /// Guest RAM.
    pub guest_memory_bytes: u64,
    /// Bytes of UDP payload sent by the source.
    pub wire_bytes: u64,
    /// From the request to the end.
    pub duration_seconds: f64,
    /// From the last guest instruction at the source to the first at the destination; absent when the guest was never paused.
    pub downtime_seconds: Option<f64>,
    /// Where the downtime went.
    pub downtime_breakdown: Option<DowntimeBreakdown>,
    /// CPU time of both gateways; absent when only one is ours to measure.
    pub cpu_seconds: Option<f64>,
    /// How often the link was lost and stood again.
    #[serde(default)]
    pub reconnects: u32,
    /// How long the link was away, all outages together.
    #[serde(default)]
    pub stalled_seconds: f64,
    /// Bytes of page frames that were sent again because an outage took them.
    #[serde(default)]
    pub resent_bytes: u64,
    /// Most that the source's tables of equal pages, of earlier versions and of codecs took, bytes.
    #[serde(default)]
    pub table_bytes: u64,
    /// Pages by how they were sent.
    pub pages: PageCounts,
    /// Why some of a hypervisor's own stream went as it is, not as pages, if it did.
    #[serde(default)]
    pub stream_opaque: Option<String>,
    /// True only when destination memory and device state were compared with the source's.
    pub verified: bool,
    /// What came behind the switch; absent when nothing did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyReport>,
    /// Disks that moved too; absent when none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DiskReport>,
    /// Who was authenticated as whom.
    pub authenticated: Authenticated,
    /// What policy said.
    pub policy: PolicyVerdict,
    /// Heads of both audit logs after the last entry of this migration.
    pub audit: AuditHeads,
    /// Why it did not complete.
    pub error: Option<Problem>,
}

impl Report {
    /// A report with nothing measured yet: the VM runs on the source.
    #[must_use]
    pub fn new(migration_id: MigrationId, vm: VmName, state: Outcome, running_on: RunningOn) -> Self {
        Self {
            schema: ReportSchema,
            migration_id,
            vm,
            state,
            running_on,
            hypervisor: String::new(),
            mode: Mode::Precopy,
            rounds: 0,
            guest_memory_bytes: 0,
            wire_bytes: 0,
            duration_seconds: 0.0,
            downtime_seconds: None,
            downtime_breakdown: None,
            cpu_seconds: None,
            reconnects: 0,
            stalled_seconds: 0.0,
            resent_bytes: 0,
            table_bytes: 0,
            pages: PageCounts::default(),
            stream_opaque: None,
            verified: false,
            post_copy: None,
            disks: None,
            authenticated: Authenticated::default(),
            policy: PolicyVerdict::default(),
            audit: AuditHeads::default(),
            error: None,
        }
    }
}

/// What a guest that ran at the destination before all of its pages were there got behind the switch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Until it lacked nothing.
    pub seconds: f64,
    /// Pages that it has waited for.
    pub faults: u64,
}

/// What moved of disks.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DiskReport {
    /// Whether they were copied and nothing else, ahead of a migration.
    #[serde(default)]
    pub only: bool,
    /// How many.
    pub count: usize,
    /// How long they are, all together.
    pub bytes: u64,
    /// Ranges that were written, zeroed or discarded at the destination.
    pub changed_bytes: u64,
    /// What was there already, from an earlier attempt, and was not sent.
    #[serde(default)]
    pub held_bytes: u64,
    /// True only when all that they hold was read at both ends in the pause, and was equal.
    pub verified: bool,
    /// What that took of the pause.
    pub verify_seconds: Option<f64>,
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM runs at the destination; or only its disks were to be copied, and they are there.
    Completed,
    /// It failed; the VM stays on the source.
    Failed,
    /// Somebody stopped it; the VM stays on the source.
    Cancelled,
    /// An operator must decide.
    InDoubt,
}

/// Where a VM runs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunningOn {
    /// On the source.
    Source,
    /// On the destination.
    Destination,
    /// On neither side until the outcome is known.
    NeitherYet,
}

/// Where the downtime went.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DowntimeBreakdown {
    /// Stopping the vCPUs.
    pub pause_seconds: f64,
    /// The last dirty pages.
    pub last_pages_seconds: f64,
    /// Saving, sending and restoring device state.
    pub state_seconds: f64,
    /// Comparing memory and state.
    pub verify_seconds: f64,
    /// Making handoff records durable.
    pub journal_seconds: f64,
    /// Waiting for messages to arrive.
    pub network_seconds: f64,
    /// Starting the vCPUs.
    pub resume_seconds: f64,
}

/// Who was authenticated as whom.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Authenticated {
    /// The source gateway.
    pub source: Option<SpiffeId>,
    /// The destination gateway.
    pub destination: Option<SpiffeId>,
}

/// What policy said.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PolicyVerdict {
    /// `allow` or `deny`; absent when policy was not asked.
    pub decision: Option<String>,
    /// The policies that decided.
    pub policy_ids: Vec<String>,
}

/// Heads of both audit logs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AuditHeads {
    /// The source's.
    pub source_head: Option<String>,
    /// The destination's.
    pub destination_head: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ErrorClass;

    fn full() -> Report {
        let mut report = Report::new(MigrationId([7; 16]), "vm-1".parse().unwrap(), Outcome::InDoubt, RunningOn::NeitherYet);
        report.downtime_breakdown = Some(DowntimeBreakdown::default());
        report.error = Some(Problem::new(ErrorClass::InDoubt, "x"));
        report
    }

    fn paths(prefix: &str, value: &serde_json::Value, into: &mut Vec<String>) {
        let serde_json::Value::Object(members) = value else {
            into.push(prefix.to_owned());
            return;
        };
        for (key, member) in members {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            paths(&path, member, into);
        }
    }

    #[test]
    fn the_field_names_are_the_contract() {
        let mut found = Vec::new();
        paths("", &serde_json::to_value(full()).unwrap(), &mut found);
        found.sort();
        let expected = "audit.destination_head audit.source_head authenticated.destination authenticated.source cpu_seconds \
            downtime_breakdown.journal_seconds downtime_breakdown.last_pages_seconds downtime_breakdown.network_seconds \
            downtime_breakdown.pause_seconds downtime_breakdown.resume_seconds downtime_breakdown.state_seconds \
            downtime_breakdown.verify_seconds downtime_seconds duration_seconds error.class error.code error.hint error.message \
            error.running_on guest_memory_bytes hypervisor migration_id mode pages.compressed pages.delta pages.duplicate pages.raw \
            pages.zero policy.decision policy.policy_ids reconnects resent_bytes rounds running_on schema stalled_seconds state stream_opaque table_bytes verified vm wire_bytes";
        assert_eq!(found.join(" "), expected.split_whitespace().collect::<Vec<_>>().join(" "));
    }

    #[test]
    fn states_are_spelled_as_in_the_contract() {
        let json = serde_json::to_value(full()).unwrap();
        assert_eq!(
            (&json["state"], &json["running_on"], &json["schema"]),
            (&"in-doubt".into(), &"neither-yet".into(), &"sealane.report/1".into())
        );
        for (outcome, text) in [(Outcome::Completed, "completed"), (Outcome::Failed, "failed"), (Outcome::Cancelled, "cancelled")] {
            assert_eq!(serde_json::to_value(outcome).unwrap(), text);
        }
        for (place, text) in [(RunningOn::Source, "source"), (RunningOn::Destination, "destination")] {
            assert_eq!(serde_json::to_value(place).unwrap(), text);
        }
    }

    #[test]
    fn a_report_reads_back_and_another_schema_does_not() {
        let mut json = serde_json::to_value(full()).unwrap();
        assert_eq!(serde_json::from_value::<Report>(json.clone()).unwrap(), full());
        json["schema"] = "sealane.report/2".into();
        let refused = serde_json::from_value::<Report>(json).unwrap_err().to_string();
        assert!(refused.contains("expected schema `sealane.report/1`, got `sealane.report/2`"), "{refused}");
    }
}
