//! Requests and views about VMs in doubt.

use serde::{Deserialize, Serialize};

use crate::telemetry::schema_tag;
use crate::types::{Epoch, MigrationId, Side, VmName, VmUuid};

schema_tag!(
    /// Schema of [`DoubtList`].
    DoubtsSchema = "sealane.doubts/1"
);
schema_tag!(
    /// Schema of [`ResolutionView`].
    ResolutionSchema = "sealane.resolution/1"
);

/// What can become of a VM in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The paused copy at the source goes on.
    Reclaim,
    /// It is started here from its disks.
    Restart,
    /// The destination has it.
    Release,
    /// The destination will never run it.
    Refuse,
}

/// What an operator does about a VM in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step", deny_unknown_fields)]
pub enum ResolveRequest {
    /// Proposes what is to become of it.
    Propose {
        /// What.
        choice: Choice,
        /// What shows that the other gateway cannot run it.
        #[serde(default)]
        evidence: Option<String>,
    },
    /// Agrees with what another operator has proposed.
    Approve,
    /// Takes the proposal back.
    Withdraw,
}

/// A handoff record in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordView {
    /// Its name, as in the audit log.
    pub record: String,
    /// What it means on this gateway.
    pub meaning: String,
    /// When it was made, RFC 3339, if that is known.
    #[serde(default)]
    pub at: Option<String>,
}

/// All VMs in doubt on a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DoubtList {
    /// Version of this object.
    pub schema: DoubtsSchema,
    /// By migration.
    pub doubts: Vec<DoubtView>,
}

/// A VM that only its peer's word, or operators, can lead on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoubtView {
    /// The attempt.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// Its UUID.
    pub uuid: VmUuid,
    /// Which end this gateway is.
    pub side: Side,
    /// The other gateway, by its name here or its identity.
    pub peer: String,
    /// The epoch at which the destination would own the VM.
    pub epoch: Epoch,
    /// The last record in the journal.
    pub last: RecordView,
    /// What is possible.
    pub choices: Vec<ChoiceView>,
    /// What has been proposed.
    #[serde(default)]
    pub proposal: Option<ProposalView>,
}

/// What is possible, and what it says and does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceView {
    /// What.
    pub choice: Choice,
    /// What whoever chooses it says, and what happens then.
    pub meaning: String,
    /// Whether it needs evidence of fencing.
    pub needs_evidence: bool,
}

/// A proposal that waits for approval.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProposalView {
    /// What is to become of the VM.
    pub choice: Choice,
    /// Whose proposal, e.g. `uid:1000`.
    pub proposer: String,
    /// What shows that the other gateway cannot run it.
    #[serde(default)]
    pub evidence: Option<String>,
    /// When, RFC 3339.
    pub at: String,
    /// Others who have agreed.
    pub approvers: Vec<String>,
}

/// What came of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolutionView {
    /// Version of this object.
    pub schema: ResolutionSchema,
    /// The attempt.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// What came of it.
    pub state: ResolutionState,
    /// The same in words.
    pub message: String,
    /// The VM, while it is still in doubt.
    #[serde(default)]
    pub doubt: Option<DoubtView>,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResolutionState {
    /// It is proposed, and waits for another operator.
    Proposed,
    /// The proposal is gone.
    Withdrawn,
    /// It is decided and done.
    Decided,
    /// The peer had answered before.
    SettledMeanwhile,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_by_its_name_and_has_no_other_keys() {
        let propose: ResolveRequest = serde_json::from_str(r#"{"step":"propose","choice":"refuse"}"#).unwrap();
        assert_eq!(propose, ResolveRequest::Propose { choice: Choice::Refuse, evidence: None });
        for step in [propose, ResolveRequest::Approve, ResolveRequest::Withdraw] {
            assert_eq!(serde_json::from_str::<ResolveRequest>(&serde_json::to_string(&step).unwrap()).unwrap(), step);
        }
        for bad in [
            "{}",
            r#"{"step":"propose"}"#,
            r#"{"step":"propose","choice":"win"}"#,
            r#"{"step":"propose","choice":"refuse","force":true}"#,
            r#"{"step":"decide"}"#,
        ] {
            assert!(serde_json::from_str::<ResolveRequest>(bad).is_err(), "{bad}");
        }
    }
}
