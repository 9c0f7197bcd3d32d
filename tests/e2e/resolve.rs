//! A VM in doubt, and what two operators decide.
//!
//! The second operator is another user id, which only root can take; without root these tests say that they are skipped.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use sealane::hypervisor::RunState;
use serde_json::Value;

use crate::command::{Running, Said, sealane, wait_for};
use crate::crash::Records;
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup, VM};
use crate::relay::Conditions;

/// Operators by configuration; root needs no entry.
const ALICE: u32 = 1001;
const BOB: u32 = 1002;
const VIEWER: u32 = 1003;

const OPERATORS: &str = r#"
[[operator]]
name = "alice"
uid = 1001
roles = ["operator"]

[[operator]]
name = "bob"
uid = 1002
roles = ["operator"]

[[operator]]
name = "victor"
uid = 1003
roles = ["viewer"]
"#;

/// Somebody else than the proposer, and evidence, unless the destination only refuses.
const FOUR_EYES: &str = r#"@id("resolve-with-four-eyes")
permit (principal, action == Sealane::Action::"resolveInDoubt", resource)
when {
  context.fenceEvidence && context.approvers.contains(Sealane::Operator::"uid:1001") && !context.approvers.contains(principal)
};

@id("refuse-with-four-eyes")
permit (principal, action == Sealane::Action::"resolveInDoubt", resource)
when { !context.fenceEvidence && context.approvers.contains(Sealane::Operator::"uid:1001") };"#;

/// A policy that asks for nothing: what is refused then, the gateway refuses.
const ANYTHING: &str = r#"@id("resolve-anyhow") permit (principal, action == Sealane::Action::"resolveInDoubt", resource);"#;

/// Both have to agree.
const SIX_EYES: &str = r#"@id("resolve-with-six-eyes")
permit (principal, action == Sealane::Action::"resolveInDoubt", resource)
when {
  context.fenceEvidence &&
  context.approvers.contains(Sealane::Operator::"uid:1001") && context.approvers.contains(Sealane::Operator::"uid:1002")
};"#;

const EVIDENCE: &str = "BMC of host-b: power is off, ticket CHG-7";

fn can_be_two(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: {test}: a second operator needs a second user id, and so root");
    }
    root
}

/// A lab whose link was cut with COMMIT on its way: the source has given the VM, the destination is prepared. The id of
/// the migration.
#[track_caller]
fn cut_at_commit(policy: &str) -> (Lab, Running, String) {
    let mut setup = Setup::new().through_relay(Conditions { delay: Duration::from_millis(100), ..Conditions::default() });
    for name in [A, B] {
        setup = setup.with_policy(name, policy).edit(name, |text| text + OPERATORS);
        setup = setup.replace(name, "timeout = \"10m\"", "timeout = \"10m\"\nmax_outage = \"2s\"");
    }
    let lab = setup.start();
    // Other users run commands there; the socket is for its group, which they are in.
    fs::set_permissions(lab.directory(), fs::Permissions::from_mode(0o711)).unwrap();
    lab.runs_only_on(A);
    let records = Records::begin(&lab, A);
    let mut running = lab.start_migrate(A, &[]);
    while !records.have("commit") {
        running.must_go_on();
        std::thread::sleep(Duration::from_millis(1));
    }
    lab.cut();
    assert!(!records.have("run"), "COMMIT was on its way");
    let id = lab.active_migration(A).expect("a migration that waits for its destination")["id"].as_str().unwrap().to_owned();
    (lab, running, id)
}

/// The same with the destination's host lost: gateway, VMM and journal.
#[track_caller]
fn lost_destination(policy: &str) -> (Lab, String) {
    let (mut lab, running, id) = cut_at_commit(policy);
    let early = resolve(&lab, A, &[&id, "--reclaim", "--evidence", EVIDENCE]);
    early.expect(2, &["under way", "max_outage"]);
    lab.gateway_mut(B).kill();
    lab.kill_vmms_of(B);
    let state = lab.gateway(B).directory().join("state");
    fs::remove_dir_all(&state).unwrap();
    fs::create_dir(&state).unwrap();
    running.finish().expect(6, &[VM, "in doubt", "sealane resolve"]);
    wait_for("a VM in doubt", || (doubts(&lab, A).len() == 1).then_some(()));
    (lab, id)
}

#[track_caller]
fn resolve(lab: &Lab, name: Name, arguments: &[&str]) -> Said {
    lab.gateway(name).command(&[&["resolve"], arguments].concat())
}

/// The same by another user.
#[track_caller]
fn resolve_as(user: u32, lab: &Lab, name: Name, arguments: &[&str]) -> Said {
    let gateway = lab.gateway(name).directory();
    let mut command = sealane();
    command.arg("resolve").args(arguments).arg("--json").arg("--socket").arg(gateway.join("run/api.sock")).uid(user);
    Running::start(command, gateway).finish()
}

#[track_caller]
fn doubts(lab: &Lab, name: Name) -> Vec<Value> {
    let said = resolve(lab, name, &[]);
    said.expect(0, &[]);
    let list = said.json();
    assert_eq!(list["schema"], "sealane.doubts/1");
    list["doubts"].as_array().unwrap().clone()
}

#[track_caller]
fn expect_state(said: &Said, state: &str) {
    said.expect(0, &[]);
    assert_eq!(said.json()["state"], state, "{said:?}");
}

/// Nobody runs the guest, and the copy here waits.
#[track_caller]
fn stands_still(lab: &Lab, name: Name) {
    let states: Vec<_> = lab.vmms(name).iter().map(|vmm| vmm.state).collect();
    assert_eq!((states, lab.running_copies()), (vec![RunState::Paused], vec![]));
}

#[test]
fn two_operators_take_a_vm_back_from_a_destination_that_is_lost() {
    if !can_be_two("two_operators_take_a_vm_back_from_a_destination_that_is_lost") {
        return;
    }
    let (mut lab, id) = lost_destination(FOUR_EYES);
    let doubt = doubts(&lab, A).remove(0);
    assert_eq!((&doubt["vm"], &doubt["migration"], &doubt["side"]), (&VM.into(), &id.as_str().into(), &"source".into()));
    assert_eq!((&doubt["last"]["record"], &doubt["peer"], &doubt["proposal"]), (&"commit".into(), &"gw-b".into(), &Value::Null));
    assert!(doubt["last"]["at"].is_string(), "since when: {doubt}");
    let vm = lab.vm(A);
    assert_eq!(vm["state"], "in-doubt");
    assert!(vm["why"].as_str().unwrap().contains(&format!("`sealane resolve {}`", &id[..8])), "{vm}");
    let records = lab.gateway(A).command(&["status", &id[..8]]).json()["records"].clone();
    assert_eq!([&records[0]["record"], &records[1]["record"]], ["offer", "commit"]);

    resolve(&lab, A, &[VM, "--refuse"]).expect(2, &["source", "`reclaim`, `restart`, `release`"]);
    resolve(&lab, A, &[VM, "--reclaim"]).expect(2, &["evidence", "--evidence TEXT"]);
    resolve(&lab, A, &[VM, "--approve"]).expect(2, &["nothing is proposed"]);
    resolve_as(VIEWER, &lab, A, &[VM, "--reclaim", "--evidence", EVIDENCE]).expect(3, &["role `operator`"]);
    expect_state(&resolve(&lab, A, &[&id[..8], "--reclaim", "--evidence", EVIDENCE]), "proposed");
    resolve_as(ALICE, &lab, A, &[VM, "--restart", "--evidence", EVIDENCE]).expect(2, &["proposed already", "uid:0"]);
    resolve(&lab, A, &[VM, "--approve"]).expect(3, &["cannot approve it too"]);
    resolve_as(VIEWER, &lab, A, &[VM, "--approve"]).expect(3, &["role `operator`"]);
    stands_still(&lab, A);

    lab.gateway_mut(A).kill();
    lab.gateway_mut(A).start();
    let proposal = resolve(&lab, A, &[VM]).json()["doubt"]["proposal"].clone();
    assert_eq!((&proposal["choice"], &proposal["evidence"]), (&"reclaim".into(), &EVIDENCE.into()), "a restart forgets nothing");
    stands_still(&lab, A);

    expect_state(&resolve_as(ALICE, &lab, A, &[VM, "--approve"]), "decided");
    lab.runs_only_on(A);
    lab.heartbeat_is_unbroken();
    assert!(doubts(&lab, A).is_empty());
    assert!(lab.vm(A)["why"].as_str().unwrap().contains("FENCED"), "{}", lab.vm(A));
    expect_state(&resolve(&lab, A, &[&id, "--approve"]), "settled-meanwhile");
    resolve(&lab, A, &[VM, "--approve"]).expect(2, &["not in doubt"]);
    let view = wait_for("a report", || Some(lab.gateway(A).command(&["status", &id]).json()).filter(|view| view["state"] == "failed"));
    assert_eq!(view["report"]["running_on"], "source");

    let gateway = lab.gateway(A);
    gateway.audited("resolution", "done", &["\"step\":\"propose\"", "\"operator\":\"uid:0\"", "\"decision\":\"reclaim\"", EVIDENCE]);
    gateway.audited("resolution", "refused", &["\"step\":\"approve\"", "\"operator\":\"uid:0\""]);
    gateway.audited("resolution", "refused", &["\"step\":\"propose\"", "`refuse`"]);
    gateway.audited("resolution", "done", &["\"step\":\"approve\"", "\"operator\":\"uid:1001\""]);
    gateway.audited("decision", "allow", &["resolveInDoubt", "uid:0"]);
    let words = ["\"step\":\"decide\"", "\"proposer\":\"uid:0\"", "\"approvers\":[\"uid:1001\"]", EVIDENCE, "resolve-with-four-eyes"];
    let decided = gateway.audited("resolution", "allow", &words);
    let fenced = gateway.audited("handoff", "done", &["\"record\":\"fenced\""]);
    assert!(decided["index"].as_u64() < fenced["index"].as_u64(), "the reason is recorded before the effect");

    lab.restore();
    lab.gateway_mut(B).start();
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    // Taken back at epoch 3, and given away again.
    let (here, there) = (lab.vm(B), lab.vm(A));
    assert!(here["why"].as_str().unwrap().contains("from gw-a at epoch 4"), "{here}");
    assert!(there["why"].as_str().unwrap().contains("away since DONE of migration"), "{there}");
}

#[test]
fn a_vm_that_the_lost_destination_may_have_run_is_started_from_its_disks_once_all_who_have_to_agree_do() {
    if !can_be_two("a_vm_that_the_lost_destination_may_have_run_is_started_from_its_disks_once_all_who_have_to_agree_do") {
        return;
    }
    let (mut lab, id) = lost_destination(SIX_EYES);
    expect_state(&resolve_as(BOB, &lab, A, &[VM, "--release", "--evidence", "gw-b has it"]), "proposed");
    expect_state(&resolve_as(ALICE, &lab, A, &[VM, "--withdraw"]), "withdrawn");
    expect_state(&resolve(&lab, A, &[VM, "--restart", "--evidence", EVIDENCE]), "proposed");
    let denied = resolve_as(ALICE, &lab, A, &[VM, "--approve"]);
    denied.expect(3, &["no policy permits", "the proposal stays open"]);
    assert_eq!(resolve(&lab, A, &[VM]).json()["doubt"]["proposal"]["approvers"], serde_json::json!(["uid:1001"]));
    stands_still(&lab, A);
    expect_state(&resolve_as(BOB, &lab, A, &[VM, "--approve"]), "decided");
    wait_for("the copy to go", || lab.vmms(A).is_empty().then_some(()));
    let vm = lab.vm(A);
    assert_eq!(vm["state"], "cold", "{vm}");
    assert!(vm["why"].as_str().unwrap().contains("start it from its disks"), "{vm}");
    let view = wait_for("a report", || Some(lab.gateway(A).command(&["status", &id]).json()).filter(|view| view["state"] == "failed"));
    assert_eq!(view["report"]["error"]["code"], "cold", "{view}");

    let gateway = lab.gateway(A);
    gateway.audited("resolution", "cancelled", &["\"step\":\"withdraw\"", "\"operator\":\"uid:1001\"", "\"proposer\":\"uid:1002\""]);
    gateway.audited("resolution", "deny", &["\"step\":\"decide\"", "\"approvers\":[\"uid:1001\"]"]);
    gateway.audited("resolution", "allow", &["\"step\":\"decide\"", "\"approvers\":[\"uid:1001\",\"uid:1002\"]"]);
    gateway.audit_verifies();

    lab.start_guest();
    wait_for("the VM to be seen again", || (lab.vm(A)["state"] == "running").then_some(()));
}

#[test]
fn a_vm_that_operators_leave_to_its_destination_is_gone_here() {
    if !can_be_two("a_vm_that_operators_leave_to_its_destination_is_gone_here") {
        return;
    }
    let (lab, _) = lost_destination(ANYTHING);
    expect_state(&resolve(&lab, A, &[VM, "--release", "--evidence", "gw-b was restored from its disks and has it"]), "proposed");
    // Whatever policy permits, two are two.
    resolve(&lab, A, &[VM, "--approve"]).expect(3, &["cannot approve it too"]);
    stands_still(&lab, A);
    expect_state(&resolve_as(ALICE, &lab, A, &[VM, "--approve"]), "decided");
    wait_for("the copy to go", || lab.vmms(A).is_empty().then_some(()));
    let vm = lab.vm(A);
    assert_eq!((&vm["state"], &vm["where"]), (&"gone".into(), &"gw-b".into()), "{vm}");
    lab.gateway(A).audit_verifies();
}

#[test]
fn a_prepared_destination_that_operators_let_refuse_sets_the_source_free() {
    if !can_be_two("a_prepared_destination_that_operators_let_refuse_sets_the_source_free") {
        return;
    }
    let (lab, running, id) = cut_at_commit(FOUR_EYES);
    running.finish().expect(6, &[VM, "in doubt"]);
    let doubt = wait_for("a VM in doubt on the destination", || doubts(&lab, B).pop());
    assert_eq!((&doubt["side"], &doubt["last"]["record"]), (&"destination".into(), &"prepared".into()), "{doubt}");
    let vm = lab.vm(B);
    assert_eq!(vm["state"], "in-doubt", "{vm}");
    for decision in ["--reclaim", "--release"] {
        resolve(&lab, B, &[VM, decision, "--evidence", EVIDENCE]).expect(2, &["destination", "`restart`, `refuse`"]);
    }
    // The source's operators begin as well; the destination's are faster.
    expect_state(&resolve(&lab, A, &[VM, "--reclaim", "--evidence", EVIDENCE]), "proposed");
    expect_state(&resolve(&lab, B, &[VM, "--refuse"]), "proposed");
    expect_state(&resolve_as(ALICE, &lab, B, &[VM, "--approve"]), "decided");
    wait_for("the twin to go", || lab.vmms(B).is_empty().then_some(()));
    stands_still(&lab, A);
    lab.restore();
    lab.runs_only_on(A);
    lab.heartbeat_is_unbroken();
    expect_state(&resolve_as(ALICE, &lab, A, &[&id, "--approve"]), "settled-meanwhile");
    lab.gateway(A).audited("resolution", "cancelled", &["settled-meanwhile", "reclaim"]);
    assert!(doubts(&lab, A).is_empty() && doubts(&lab, B).is_empty());
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}
