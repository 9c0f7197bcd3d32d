//! What policy denies. The guest goes on where it is, and whoever denied has it in its audit log.

use crate::gateway::{A, B, Name};
use crate::lab::{Lab, POLICY, Setup, VM, replaced};

/// A move that policy at `denier` denies at `action`.
#[track_caller]
fn denied(lab: &Lab, denier: Name, action: &str, words: &[&str]) {
    let said = lab.migrate(A, &[]);
    said.expect_stayed(3, &[&[VM, action], words].concat());
    lab.gateway(denier).audited("decision", "deny", &[VM, &format!("\"action\":\"{action}\"")]);
    lab.settled_on(A);
    // A refusal before there was a migration is no report.
    let object = said.json();
    if object["schema"] == "sealane.report/1" {
        assert_eq!(object["policy"]["decision"], "deny", "{object}");
    }
    assert!(lab.vmms(B).is_empty(), "an empty twin is left");
}

#[test]
fn what_no_policy_permits_to_ask_for_is_denied() {
    denied(&Setup::new().without_policy(A, "request").start(), A, "request", &["no policy permits"]);
}

#[test]
fn what_no_policy_of_the_source_releases_stays() {
    denied(&Setup::new().without_policy(A, "release").start(), A, "release", &["no policy permits"]);
}

#[test]
fn what_no_policy_of_the_destination_accepts_stays() {
    denied(&Setup::new().without_policy(B, "accept").start(), B, "accept", &["no policy permits"]);
}

#[test]
fn a_policy_of_the_source_that_forbids_wins() {
    let forbid =
        r#"@id("never-restricted") forbid (principal, action == Sealane::Action::"release", resource) when { resource.tenant == "acme" };"#;
    denied(&Setup::new().with_policy(A, forbid).start(), A, "release", &["never-restricted"]);
}

#[test]
fn a_policy_of_the_destination_that_forbids_wins() {
    let forbid = r#"@id("house-is-full") forbid (principal, action == Sealane::Action::"accept", resource);"#;
    denied(&Setup::new().with_policy(B, forbid).start(), B, "accept", &["house-is-full"]);
}

/// A VM of the strictest class, which both gateways leave to the rules that the project ships.
fn restricted() -> Setup {
    let floor = include_str!("../../config/policy.d/10-floor.cedar");
    let (from, to) = ("classification = \"internal\"", "classification = \"restricted\"");
    Setup::new().replace(A, from, to).replace(B, from, to).with_policy(A, floor).with_policy(B, floor)
}

#[test]
fn a_restricted_vm_moves_where_the_key_exchange_is_post_quantum_and_the_log_says_so() {
    let required = "[identity]\nrequire_post_quantum = true";
    let lab = restricted().replace(B, "[identity]", required).start();
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    let channel = ["\"key_exchange\":\"X25519MLKEM768\"", "\"cipher_suite\":\"TLS13_AES_256_GCM_SHA384\""];
    for (name, action) in [(A, "release"), (A, "commit"), (B, "accept"), (B, "commit")] {
        lab.gateway(name).audited("decision", "allow", &[&[VM, &format!("\"action\":\"{action}\"")], channel.as_slice()].concat());
    }
    lab.gateway(B).audited("session-opened", "done", &channel);
}

#[test]
fn what_a_policy_asks_of_the_channel_is_compared_with_what_was_agreed_on() {
    let forbid = r#"@id("chacha-only") forbid (principal, action == Sealane::Action::"release", resource)
        unless { context.channel.suite == "TLS13_CHACHA20_POLY1305_SHA256" };"#;
    denied(&Setup::new().with_policy(A, forbid).start(), A, "release", &["chacha-only"]);
}

/// True for a moment, then too large for a `Long`.
const OVERFLOW: &str = "when { context.stream.lanes * 9223372036854775807 > 0 };";

#[test]
fn a_policy_of_the_source_that_cannot_be_evaluated_denies() {
    let broken = format!(r#"@id("too-large") permit (principal, action == Sealane::Action::"release", resource) {OVERFLOW}"#);
    denied(&Setup::new().with_policy(A, &broken).start(), A, "release", &["too-large"]);
}

#[test]
fn a_limit_of_bandwidth_that_the_destination_asks_for_is_kept() {
    let permit = "@id(\"accept-from-our-gateways\")";
    let limited = format!("{permit}\n@max_bandwidth(\"64Mbit/s\")");
    let lab = Setup::new().busy().policy(B, &replaced(POLICY, permit, &limited)).start();
    let (running, id) = lab.start_slow_migration(A, &["--max-downtime", "1h"]);
    // What an operator asks for counts as far as both policies let it.
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    let report = running.finish().expect_moved();
    let (bytes, seconds) = (report["wire_bytes"].as_f64().unwrap(), report["duration_seconds"].as_f64().unwrap());
    // Twice: what was allowed to burst, and what is not counted as page frames.
    assert!(bytes / seconds < 2.0 * 8_000_000.0, "{report}");
    lab.gateway(B).audited("decision", "allow", &["\"action\":\"accept\"", "max_bandwidth=8000000 bytes/s"]);
    lab.settled_on(B);
}

#[test]
fn a_policy_of_the_destination_that_cannot_be_evaluated_denies() {
    let broken = format!(r#"@id("too-large") forbid (principal, action == Sealane::Action::"accept", resource) {OVERFLOW}"#);
    denied(&Setup::new().with_policy(B, &broken).start(), B, "accept", &["too-large"]);
}

#[test]
fn a_denial_of_the_source_at_the_switch_lets_the_guest_go_on() {
    denied(&Setup::new().without_policy(A, "commit").start(), A, "commit", &["no policy permits"]);
}

#[test]
fn a_denial_of_the_destination_at_the_switch_lets_the_guest_go_on() {
    denied(&Setup::new().without_policy(B, "commit").start(), B, "commit", &[]);
}

#[test]
fn a_policy_that_was_taken_away_while_the_guest_moves_stops_it_at_the_switch() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    let path = lab.gateway(B).directory().join("policy.d/lab.cedar");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text + r#"@id("changed-my-mind") forbid (principal, action == Sealane::Action::"commit", resource);"#).unwrap();
    lab.gateway(B).reload();
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_stayed(3, &[VM]);
    lab.gateway(B).audited("decision", "deny", &["commit", "changed-my-mind"]);
    lab.settled_on(A);
}

#[test]
fn policies_with_mistakes_keep_the_gateway_from_starting() {
    let lab = Setup::new().policy(A, r#"@id("typo") permit (principal, action, resource) when { resource.tennant == "acme" };"#).prepare();
    lab.gateway(A).start_in_vain().expect(2, &["policy.d", "lab.cedar", "tennant"]);
}

#[test]
fn a_policy_directory_without_policies_keeps_the_gateway_from_starting() {
    let lab = Setup::new().prepare();
    std::fs::remove_file(lab.gateway(A).directory().join("policy.d/lab.cedar")).unwrap();
    lab.gateway(A).start_in_vain().expect(2, &["policy.d"]);
}

#[test]
fn policies_with_mistakes_do_not_replace_those_in_force() {
    let lab = Lab::start();
    std::fs::write(lab.gateway(A).directory().join("policy.d/lab.cedar"), "permit (principal").unwrap();
    lab.gateway(A).reload();
    lab.gateway(A).audited("policy-refused", "refused", &["lab.cedar"]);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}
