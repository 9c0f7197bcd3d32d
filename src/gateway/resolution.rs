//! A VM in doubt: what operators propose and approve, and how it is done.
//!
//! One operator proposes and gives evidence, another approves, policy says whether that is enough. The gateway itself holds the
//! two to be two: `INVARIANT(four-eyes)`: nobody approves a proposal of their own, and what becomes of a VM is decided only by a proposal
//! with an approval of another user id, both of whom have the role at that moment.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::audit::{Entry, Event, Outcome};
use crate::config::{Classification, Role};
use crate::control::{Choice, ChoiceView, DoubtList, DoubtView, ProposalView, RecordView, ResolutionState, ResolutionView, ResolveRequest};
use crate::engine::{self, Decision, RecordNote, Resolved, Standing};
use crate::gateway::Gateway;
use crate::gateway::judge::{Case, DisksAsked, NoPermit, hex};
use crate::gateway::outgoing::bug;
use crate::gateway::policies::{default_terms, operator_id};
use crate::limits;
use crate::migration;
use crate::policy::{Permit, Resolve};
use crate::telemetry::{Problem, RunningOn, chain};
use crate::types::{MigrationId, Mode, Side, VmName};
use crate::wire::ErrorClass;

/// How long the task that asks the peer may take to see that nothing is left to ask.
const NOTICED_WITHIN: Duration = Duration::from_secs(20);

/// What is to become of a VM in doubt, as it lies in the journal until the VM is in doubt no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proposal {
    decision: Decision,
    proposer: u32,
    evidence: Option<String>,
    unix_ms: i64,
    approvers: BTreeSet<u32>,
}

impl Proposal {
    /// A proposal that makes sense where the VM is in doubt; or what is wrong with it.
    fn new(about: &Standing, proposer: u32, choice: Choice, evidence: Option<String>) -> Result<Self, Problem> {
        let misuse = |message: String| Problem::new(ErrorClass::Misuse, message);
        let decision = decision(choice);
        if !engine::decisions(about.side).contains(&decision) {
            let (word, side, record) = (flag(decision), about.side, about.record.name.to_uppercase());
            let possible: Vec<_> = engine::decisions(about.side).iter().map(|decision| format!("`{}`", flag(*decision))).collect();
            let message = format!("`{word}` is nothing that the {side} of a migration can decide behind {record}");
            return Err(misuse(message).with_code("not-possible").with_hint(format!("possible here: {}", possible.join(", "))));
        }
        let evidence = evidence.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        if needs_evidence(decision) && evidence.is_none() {
            let message = format!("`{}` of `{}` needs evidence that `{}` cannot run it", flag(decision), about.vm, about.peer);
            return Err(misuse(message)
                .with_code("no-evidence")
                .with_hint("say with --evidence TEXT what keeps the other host from running it, e.g. \"power of host-b is off, CHG-7\""));
        }
        if let Some(text) = &evidence
            && (text.len() > limits::EVIDENCE_BYTES_MAX || text.chars().any(char::is_control))
        {
            let (bytes, most) = (text.len(), limits::EVIDENCE_BYTES_MAX);
            return Err(misuse(format!("evidence of {bytes} bytes: expected at most {most} without control characters")));
        }
        Ok(Self { decision, proposer, evidence, unix_ms: jiff::Timestamp::now().as_millisecond(), approvers: BTreeSet::new() })
    }

    fn view(&self) -> ProposalView {
        ProposalView {
            choice: choice(self.decision),
            proposer: operator_id(self.proposer),
            evidence: self.evidence.clone(),
            at: rfc3339(self.unix_ms).unwrap_or_default(),
            approvers: self.approvers.iter().map(|uid| operator_id(*uid)).collect(),
        }
    }

    /// An entry about a step of this proposal.
    fn entry(&self, about: &Standing, step: &str, by: u32, outcome: Outcome) -> Entry {
        let approvers: Vec<String> = self.approvers.iter().map(|uid| operator_id(*uid)).collect();
        let mut entry = step_entry(about, step, by, outcome)
            .detail("decision", flag(self.decision))
            .detail("proposer", operator_id(self.proposer))
            .detail("approvers", approvers);
        if let Some(evidence) = &self.evidence {
            entry = entry.detail("evidence", evidence.clone());
        }
        entry
    }
}

fn step_entry(about: &Standing, step: &str, by: u32, outcome: Outcome) -> Entry {
    let entry = Entry::new(Event::Resolution).vm(about.vm.clone(), about.uuid).migration(about.migration).peer(about.peer.to_string());
    entry.outcome(outcome).detail("step", step).detail("operator", operator_id(by))
}

/// The two vocabularies have the same words.
fn decision(choice: Choice) -> Decision {
    match choice {
        Choice::Reclaim => Decision::Reclaim,
        Choice::Restart => Decision::Restart,
        Choice::Release => Decision::Release,
        Choice::Refuse => Decision::Refuse,
    }
}

fn choice(decision: Decision) -> Choice {
    match decision {
        Decision::Reclaim => Choice::Reclaim,
        Decision::Restart => Choice::Restart,
        Decision::Release => Choice::Release,
        Decision::Refuse => Choice::Refuse,
    }
}

/// As on the command line.
fn flag(decision: Decision) -> &'static str {
    match decision {
        Decision::Reclaim => "reclaim",
        Decision::Restart => "restart",
        Decision::Release => "release",
        Decision::Refuse => "refuse",
    }
}

/// A destination that refuses leaves the source free; everything else answers for the other side.
fn needs_evidence(decision: Decision) -> bool {
    decision != Decision::Refuse
}

fn meaning(decision: Decision, side: Side, peer: &str) -> String {
    match (decision, side) {
        (Decision::Reclaim, _) => format!("`{peer}` is off for good and never ran the VM: the paused copy here goes on"),
        (Decision::Restart, Side::Source) => {
            format!("`{peer}` is off for good and may have run the VM: the copy here is thrown away, the VM is started here from its disks")
        }
        (Decision::Restart, Side::Destination) => {
            format!(
                "`{peer}` is off for good and may have gone on with the VM: the twin here is thrown away, the VM is started here from its disks"
            )
        }
        (Decision::Release, _) => format!("`{peer}` has the VM: the copy here is thrown away"),
        (Decision::Refuse, _) => {
            format!("this gateway will never run the VM: the twin here is thrown away, and `{peer}` may go on with it")
        }
    }
}

fn rfc3339(unix_ms: i64) -> Option<String> {
    jiff::Timestamp::from_millisecond(unix_ms).ok().map(|time| format!("{time:.3}"))
}

pub(super) fn record_view(note: &RecordNote) -> RecordView {
    RecordView { record: note.name.to_owned(), meaning: note.meaning.to_owned(), at: note.unix_ms.and_then(rfc3339) }
}

fn unreadable(error: impl std::error::Error + 'static) -> Problem {
    Problem::new(ErrorClass::Local, chain(&error))
}

impl Gateway {
    /// Every VM in doubt. One that a migration under way still waits for is not.
    pub(super) async fn doubts(self: &Arc<Self>) -> Result<DoubtList, Problem> {
        let gateway = Arc::clone(self);
        let read = move || {
            let open = engine::doubts(&gateway.evidence()).map_err(unreadable)?;
            let proposals = gateway.journal.proposals().map_err(unreadable)?;
            let view = |about: &Standing| {
                let proposal = proposals.iter().find(|(migration, _)| *migration == about.migration);
                gateway.doubt_view(about, proposal.and_then(|(_, bytes)| serde_json::from_slice(bytes).ok()).as_ref())
            };
            Ok(open.iter().filter(|about| !gateway.registry.is_under_way(about.migration)).map(view).collect())
        };
        let doubts = tokio::task::spawn_blocking(read).await.map_err(bug)?;
        Ok(DoubtList { schema: Default::default(), doubts: doubts? })
    }

    fn doubt_view(&self, about: &Standing, proposal: Option<&Proposal>) -> DoubtView {
        let peer = self.config.peer_of(&about.peer).map_or_else(|| about.peer.to_string(), |peer| peer.name.to_string());
        let choice_view = |known: &Decision| ChoiceView {
            choice: choice(*known),
            meaning: meaning(*known, about.side, &peer),
            needs_evidence: needs_evidence(*known),
        };
        DoubtView {
            migration: about.migration,
            vm: about.vm.clone(),
            uuid: about.uuid,
            side: about.side,
            epoch: about.epoch,
            last: record_view(&about.record),
            choices: engine::decisions(about.side).iter().map(choice_view).collect(),
            proposal: proposal.map(Proposal::view),
            peer,
        }
    }

    /// An operator's step about a VM in doubt. Who asks has the role.
    pub(super) async fn resolve(
        self: &Arc<Self>,
        by: u32,
        migration: MigrationId,
        request: ResolveRequest,
    ) -> Result<ResolutionView, Problem> {
        // One step at a time: two proposals at once would both be the first.
        let _steps = self.proposals.lock().await;
        let about = self.standing(migration).await?;
        if self.registry.is_under_way(migration) {
            let message = format!("migration `{migration}` of `{}` is under way: its end is not in doubt yet", about.vm);
            let hint = "the gateway waits for its peer by itself, for as long as `max_outage` says";
            return Err(Problem::new(ErrorClass::Misuse, message).with_code("under-way").with_hint(hint));
        }
        if !about.open {
            self.drop_proposal(migration).await?;
            return Ok(settled_meanwhile(&about));
        }
        let proposal = self.proposal(migration).await?;
        match request {
            ResolveRequest::Propose { choice, evidence } => self.propose(&about, proposal, by, choice, evidence).await,
            ResolveRequest::Approve => self.approve(about, proposal, by).await,
            ResolveRequest::Withdraw => self.withdraw(&about, proposal, by).await,
        }
    }

    async fn propose(
        self: &Arc<Self>,
        about: &Standing,
        open: Option<Proposal>,
        by: u32,
        choice: Choice,
        evidence: Option<String>,
    ) -> Result<ResolutionView, Problem> {
        let vm = &about.vm;
        if let Some(open) = open {
            let message = format!("`{}` of `{vm}` is proposed already, by `{}`", flag(open.decision), operator_id(open.proposer));
            let problem = Problem::new(ErrorClass::Misuse, message).with_code("proposed-already");
            return Err(self
                .refused(about, "propose", by, problem.with_hint("approve it with --approve, or take it back with --withdraw"))
                .await);
        }
        let proposal = match Proposal::new(about, by, choice, evidence) {
            Ok(proposal) => proposal,
            Err(problem) => return Err(self.refused(about, "propose", by, problem).await),
        };
        self.recorded(proposal.entry(about, "propose", by, Outcome::Done)).await?;
        self.keep_proposal(about.migration, &proposal).await?;
        let message = format!("`{}` of `{vm}` is proposed; it needs the approval of another operator", flag(proposal.decision));
        Ok(self.view_of(about, ResolutionState::Proposed, message, Some(&proposal)))
    }

    async fn withdraw(self: &Arc<Self>, about: &Standing, open: Option<Proposal>, by: u32) -> Result<ResolutionView, Problem> {
        let Some(proposal) = open else { return Err(self.refused(about, "withdraw", by, nothing_proposed(about)).await) };
        self.recorded(proposal.entry(about, "withdraw", by, Outcome::Cancelled)).await?;
        self.drop_proposal(about.migration).await?;
        let message = format!("`{}` of `{}` is no longer proposed; the VM is still in doubt", flag(proposal.decision), about.vm);
        Ok(self.view_of(about, ResolutionState::Withdrawn, message, None))
    }

    async fn approve(self: &Arc<Self>, about: Standing, open: Option<Proposal>, by: u32) -> Result<ResolutionView, Problem> {
        let Some(mut proposal) = open else { return Err(self.refused(&about, "approve", by, nothing_proposed(&about)).await) };
        if proposal.proposer == by {
            let message =
                format!("`{}` of `{}` is proposed by `{}`, who cannot approve it too", flag(proposal.decision), about.vm, operator_id(by));
            let problem = Problem::new(ErrorClass::Denied, message).with_code("own-proposal");
            return Err(self.refused(&about, "approve", by, problem.with_hint("another operator has to approve it")).await);
        }
        proposal.approvers.insert(by);
        self.recorded(proposal.entry(&about, "approve", by, Outcome::Done)).await?;
        self.keep_proposal(about.migration, &proposal).await?;
        let turn = self.registry.resolving(about.migration).await;
        // The peer may have answered while its turn was waited for.
        let about = self.standing(about.migration).await?;
        if !about.open {
            drop(turn);
            self.drop_proposal(about.migration).await?;
            return Ok(settled_meanwhile(&about));
        }
        let permit = self.permit(&about, &proposal, by).await?;
        let entry = proposal.entry(&about, "decide", by, Outcome::Allow).detail("policy_ids", permit.policy_ids().to_vec());
        // INVARIANT(evidence-first): why the VM gets another owner is in the log before it does.
        self.recorded(entry.detail("policy_digest", hex(permit.set_digest()))).await?;
        let resolved = engine::decide(&self.evidence(), &self.host(), about.migration, proposal.decision).await;
        drop(turn);
        self.decided(&about, &proposal, by, resolved).await
    }

    /// Whether policy finds the approvals enough. The answer is recorded.
    async fn permit(self: &Arc<Self>, about: &Standing, proposal: &Proposal, by: u32) -> Result<Permit<Resolve>, Problem> {
        let classification = self.config.vm(&about.vm).map(|vm| vm.classification);
        let case = Case {
            migration: about.migration,
            vm: about.vm.clone(),
            uuid: about.uuid,
            // A VM that the configuration no longer has is judged by the terms that give the least away.
            terms: default_terms(&self.config.migration, classification.unwrap_or(Classification::Restricted)),
            mode: Mode::Precopy,
            memory_bytes: 0,
            disks: DisksAsked::default(),
            bandwidth_max: None,
            side: about.side,
        };
        // A role may have gone since.
        let approvers: Vec<String> =
            proposal.approvers.iter().filter(|uid| self.may(**uid, Role::Operator)).map(|uid| operator_id(*uid)).collect();
        if !self.may(proposal.proposer, Role::Operator) {
            let message = format!("`{}`, who proposed it, has no role any more that may", operator_id(proposal.proposer));
            let problem = Problem::new(ErrorClass::Denied, message).with_hint("withdraw it, and propose it anew");
            return Err(self.refused(about, "decide", by, problem).await);
        }
        let (judge, proposer, fenced) = (Arc::clone(&self.judge), operator_id(proposal.proposer), proposal.evidence.is_some());
        let answer = tokio::task::spawn_blocking(move || judge.resolve(&proposer, &case, approvers, fenced)).await.map_err(bug)?;
        match answer {
            Ok(permit) => Ok(permit),
            Err(NoPermit::Denied { denial, .. }) => {
                let entry = proposal.entry(about, "decide", by, Outcome::Deny).detail("why", denial.why.to_string());
                self.recorded(entry.detail("policy_ids", denial.policy_ids.clone()).detail("policy_digest", hex(&*denial.set_digest)))
                    .await?;
                let message = format!("`{}` of `{}` is not permitted: {}", flag(proposal.decision), about.vm, chain(&denial));
                Err(Problem::new(ErrorClass::Denied, message)
                    .with_hint("the proposal stays open: policy may want the approval of somebody else, or more evidence"))
            }
            Err(no) => Err(no.problem()),
        }
    }

    /// Says what came of a decision, once the gateway has taken it in.
    async fn decided(
        self: &Arc<Self>,
        about: &Standing,
        proposal: &Proposal,
        by: u32,
        resolved: Result<Resolved, engine::EngineError>,
    ) -> Result<ResolutionView, Problem> {
        let (vm, word) = (&about.vm, flag(proposal.decision));
        let now = self.standing(about.migration).await?;
        if now.open {
            let why = resolved.err().map_or_else(|| "nothing came of it".to_owned(), |error| chain(&error));
            self.recorded(proposal.entry(about, "decide", by, Outcome::Failed).detail("why", why.clone())).await?;
            let message = format!("VM `{vm}` is still in doubt, `{word}` was not done: {why}");
            return Err(Problem::new(ErrorClass::InDoubt, message).with_running_on(RunningOn::NeitherYet));
        }
        self.drop_proposal(about.migration).await?;
        self.load_places();
        self.noticed(vm, about.migration).await;
        match resolved {
            Ok(Resolved::Ended(outcome)) => {
                let message = format!("`{word}` of `{vm}` is decided: {}", ending(outcome));
                Ok(self.view_of(&now, ResolutionState::Decided, message, None))
            }
            Ok(_) => Ok(settled_meanwhile(&now)),
            Err(error) => {
                let message = format!("`{word}` of `{vm}` is decided and journaled, and not yet done: {}", chain(&error));
                Err(Problem::new(ErrorClass::Local, message).with_hint("the gateway tries on; `sealane vms` tells"))
            }
        }
    }

    /// Waits until the task that asks the peer has let the VM go.
    async fn noticed(&self, vm: &VmName, migration: MigrationId) {
        let waited = async {
            while self.registry.moving(vm) == Some(migration) {
                // It may be between two waits when it is told.
                self.taken_up.notify_waiters();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(NOTICED_WITHIN, waited).await.is_err() {
            tracing::error!(%vm, %migration, "decided by operators, and still waiting for the peer");
        }
    }

    /// A VM that is in doubt no more needs no proposal.
    pub(super) async fn close_proposal(self: &Arc<Self>, migration: MigrationId) {
        let _steps = self.proposals.lock().await;
        let closed = async {
            let (Some(proposal), about) = (self.proposal(migration).await?, self.standing(migration).await?) else { return Ok(()) };
            if about.open {
                return Ok(());
            }
            self.recorded(proposal.entry(&about, "settled-meanwhile", proposal.proposer, Outcome::Cancelled)).await?;
            self.drop_proposal(migration).await
        };
        if let Err::<(), Problem>(problem) = closed.await {
            tracing::warn!(%migration, why = problem.message, "the proposal for a VM that is settled is still there");
        }
    }

    /// Proposals whose VM was settled while the gateway was down.
    pub(super) async fn close_proposals(self: &Arc<Self>) {
        for (migration, _) in self.journal.proposals().unwrap_or_default() {
            self.close_proposal(migration).await;
        }
    }

    async fn standing(self: &Arc<Self>, migration: MigrationId) -> Result<Standing, Problem> {
        let evidence = self.evidence();
        let found = tokio::task::spawn_blocking(move || engine::standing(&evidence, migration)).await.map_err(bug)?.map_err(unreadable)?;
        found.ok_or_else(|| {
            Problem::new(ErrorClass::Misuse, format!("the journal has no migration `{migration}`"))
                .with_code("unknown-migration")
                .with_hint("`sealane resolve` lists VMs in doubt")
        })
    }

    async fn proposal(self: &Arc<Self>, migration: MigrationId) -> Result<Option<Proposal>, Problem> {
        let journal = Arc::clone(&self.journal);
        let all = tokio::task::spawn_blocking(move || journal.proposals()).await.map_err(bug)?.map_err(unreadable)?;
        let found = all.into_iter().find(|(known, _)| *known == migration).map(|(_, bytes)| serde_json::from_slice(&bytes));
        found.transpose().map_err(|error| Problem::new(ErrorClass::Local, format!("the proposal for migration `{migration}`: {error}")))
    }

    async fn keep_proposal(self: &Arc<Self>, migration: MigrationId, proposal: &Proposal) -> Result<(), Problem> {
        let (journal, bytes) = (Arc::clone(&self.journal), serde_json::to_vec(proposal).map_err(unreadable)?);
        tokio::task::spawn_blocking(move || journal.put_proposal(migration, &bytes)).await.map_err(bug)?.map_err(unreadable)
    }

    async fn drop_proposal(self: &Arc<Self>, migration: MigrationId) -> Result<(), Problem> {
        let journal = Arc::clone(&self.journal);
        tokio::task::spawn_blocking(move || journal.remove_proposal(migration)).await.map_err(bug)?.map_err(unreadable)
    }

    /// INVARIANT(evidence-first): what cannot be recorded is not done.
    async fn recorded(self: &Arc<Self>, entry: Entry) -> Result<(), Problem> {
        let audit = self.audit.clone();
        tokio::task::spawn_blocking(move || audit.record(&entry).map(drop)).await.map_err(bug)?.map_err(unreadable)
    }

    /// A step that is refused is recorded as well.
    async fn refused(self: &Arc<Self>, about: &Standing, step: &str, by: u32, problem: Problem) -> Problem {
        let entry = step_entry(about, step, by, Outcome::Refused).detail("why", problem.message.clone());
        self.recorded(entry).await.err().unwrap_or(problem)
    }

    fn view_of(&self, about: &Standing, state: ResolutionState, message: String, proposal: Option<&Proposal>) -> ResolutionView {
        let doubt = about.open.then(|| self.doubt_view(about, proposal));
        ResolutionView { schema: Default::default(), migration: about.migration, vm: about.vm.clone(), state, message, doubt }
    }
}

fn settled_meanwhile(about: &Standing) -> ResolutionView {
    let (vm, record, meaning) = (&about.vm, about.record.name.to_uppercase(), about.record.meaning);
    ResolutionView {
        schema: Default::default(),
        migration: about.migration,
        vm: vm.clone(),
        state: ResolutionState::SettledMeanwhile,
        message: format!("VM `{vm}` was settled meanwhile, nothing is to be decided: {record}, {meaning}"),
        doubt: None,
    }
}

fn nothing_proposed(about: &Standing) -> Problem {
    Problem::new(ErrorClass::Misuse, format!("nothing is proposed for VM `{}`", about.vm))
        .with_code("nothing-proposed")
        .with_hint("`sealane resolve` shows what is possible")
}

fn ending(outcome: migration::Outcome) -> &'static str {
    match outcome {
        migration::Outcome::Moved => "the destination has it",
        migration::Outcome::Stayed => "this gateway will never run it, and the source may go on with it",
        migration::Outcome::Reclaimed => "it runs here",
        migration::Outcome::Cold => "it belongs here, and has to be started from its disks",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Epoch, VmUuid};

    fn in_doubt(side: Side) -> Standing {
        let name = if side == Side::Source { "commit" } else { "prepared" };
        Standing {
            migration: MigrationId([7; 16]),
            vm: "web".parse().unwrap(),
            uuid: VmUuid([1; 16]),
            peer: "spiffe://dc2.example.net/gateway/gw-b".parse().unwrap(),
            side,
            epoch: Epoch(5),
            record: RecordNote { name, meaning: "", unix_ms: None },
            open: true,
            cold: false,
        }
    }

    fn propose(side: Side, choice: Choice, evidence: Option<&str>) -> Result<Proposal, Problem> {
        Proposal::new(&in_doubt(side), 0, choice, evidence.map(str::to_owned))
    }

    #[test]
    fn each_side_can_decide_its_own_and_says_what_it_could() {
        use Choice::{Reclaim, Refuse, Release, Restart};
        let off = Some("power of host-b is off, CHG-7");
        for (side, choice) in [
            (Side::Source, Reclaim),
            (Side::Source, Restart),
            (Side::Source, Release),
            (Side::Destination, Restart),
            (Side::Destination, Refuse),
        ] {
            let proposal = propose(side, choice, off).unwrap();
            assert_eq!((proposal.evidence.as_deref(), proposal.approvers.len()), (off, 0), "{side} {choice:?}");
        }
        for (side, choice) in [(Side::Source, Refuse), (Side::Destination, Reclaim), (Side::Destination, Release)] {
            let problem = propose(side, choice, off).unwrap_err();
            assert_eq!((problem.code.as_str(), problem.class), ("not-possible", ErrorClass::Misuse), "{side} {choice:?}");
            assert!(problem.message.contains(&side.to_string()) && problem.hint.unwrap().contains("`restart`"), "{}", problem.message);
        }
    }

    #[test]
    fn whoever_answers_for_the_other_side_has_evidence() {
        for (side, choice) in [(Side::Source, Choice::Reclaim), (Side::Source, Choice::Release), (Side::Destination, Choice::Restart)] {
            for missing in [None, Some(""), Some(" \t ")] {
                assert_eq!(propose(side, choice, missing).unwrap_err().code, "no-evidence", "{choice:?} {missing:?}");
            }
        }
        assert_eq!(propose(Side::Destination, Choice::Refuse, None).unwrap().evidence, None);
    }

    #[test]
    fn evidence_is_short_and_has_no_control_characters() {
        let most = "x".repeat(limits::EVIDENCE_BYTES_MAX);
        assert!(propose(Side::Source, Choice::Reclaim, Some(&most)).is_ok());
        for bad in [format!("{most}x"), "off\u{1b}[2J".into(), "off\nCHG-7".into()] {
            let problem = propose(Side::Source, Choice::Reclaim, Some(&bad)).unwrap_err();
            assert!(problem.message.contains("expected at most 1024 without control characters"), "{}", problem.message);
        }
    }

    #[test]
    fn a_proposal_is_read_back_from_the_journal_and_its_entry_names_everybody() {
        let mut proposal = propose(Side::Source, Choice::Reclaim, Some("off")).unwrap();
        proposal.approvers.extend([1001, 7]);
        assert_eq!(serde_json::from_slice::<Proposal>(&serde_json::to_vec(&proposal).unwrap()).unwrap(), proposal);
        let entry = proposal.entry(&in_doubt(Side::Source), "approve", 1001, Outcome::Done);
        let detail = serde_json::to_value(&entry.detail).unwrap();
        let expected = serde_json::json!({"step": "approve", "operator": "uid:1001", "decision": "reclaim", "proposer": "uid:0",
            "approvers": ["uid:7", "uid:1001"], "evidence": "off"});
        assert_eq!((detail, entry.event), (expected, Event::Resolution));
    }

    #[test]
    fn every_choice_of_a_side_is_explained_with_its_peer() {
        for side in [Side::Source, Side::Destination] {
            for known in engine::decisions(side) {
                assert!(meaning(*known, side, "gw-b").contains("`gw-b`"), "{known:?}");
                assert_eq!(decision(choice(*known)), *known);
                assert_eq!(serde_json::to_value(choice(*known)).unwrap(), flag(*known));
            }
        }
    }
}
