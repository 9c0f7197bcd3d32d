//! Signed policy bundles in force: what is refused leaves the one before, and the guest does not notice.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::command::{run, wait_for};
use crate::gateway::{A, B};
use crate::lab::{Lab, POLICY, Setup, VM, replaced};
use crate::signing::{Key, sha256};

const SCHEMA: &str = include_str!("../../config/sealane.cedarschema");
const TESTS: &str = r#"{ "tests": [ { "name": "nobody decides alone", "action": "resolveInDoubt", "principal": "uid:1",
    "resource": "00000000-0000-4000-8000-000000000001",
    "context": { "now": "2026-12-01T23:00:00Z", "approvers": [], "fenceEvidence": true }, "expect": "deny" } ] }"#;
const LATER: &str = "2099-01-01T00:00:00Z";

/// Those who sign, and where it lies.
struct Signers {
    keys: [Key; 2],
    directory: PathBuf,
}

impl Signers {
    /// Puts a bundle in place of the one that is there.
    fn publish(&self, version: u64, policy: &str, expires: &str) {
        let _ = fs::remove_dir_all(&self.directory);
        fs::create_dir(&self.directory).unwrap();
        let files = [("lab.cedar", policy), ("tests.json", TESTS)];
        let listed: Vec<Value> =
            files.iter().map(|(name, text)| json!({ "path": name, "bytes": text.len(), "sha256": sha256(text.as_bytes()) })).collect();
        let manifest = json!({
            "format": "sealane.policy-bundle/1", "name": "e2e", "version": version, "not_before": "2020-01-01T00:00:00Z",
            "expires": expires, "schema_sha256": sha256(SCHEMA.as_bytes()), "files": listed,
        });
        for (name, text) in files {
            fs::write(self.directory.join(name), text).unwrap();
        }
        let manifest = manifest.to_string();
        for (number, key) in self.keys.iter().enumerate() {
            fs::write(self.directory.join(format!("manifest.json.{number}.minisig")), key.sign(manifest.as_bytes(), "e2e")).unwrap();
        }
        fs::write(self.directory.join("manifest.json"), manifest).unwrap();
    }
}

/// A lab of which gateway A has its policies from a bundle. Nothing runs yet.
fn with_bundle() -> (Lab, Signers) {
    let keys = [Key::new(1), Key::new(2)];
    let pinned = format!("bundle = \"bundle\"\nbundle_name = \"e2e\"\nkeys = [\"{}\", \"{}\"]", keys[0].public(), keys[1].public());
    let lab = Setup::new().replace(A, r#"directory = "policy.d""#, &pinned).prepare();
    let directory = lab.gateway(A).directory().join("bundle");
    (lab, Signers { keys, directory })
}

fn start(lab: &mut Lab) {
    lab.start_guest();
    for name in [A, B] {
        lab.gateway_mut(name).start();
    }
}

fn tampered(signers: &Signers) {
    signers.publish(6, POLICY, LATER);
    fs::write(signers.directory.join("lab.cedar"), "@id(\"all\") permit (principal, action, resource);").unwrap();
}

fn unsigned(signers: &Signers) {
    signers.publish(6, POLICY, LATER);
    fs::remove_file(signers.directory.join("manifest.json.0.minisig")).unwrap();
}

#[test]
fn bad_bundles_leave_the_one_in_force_and_the_guest_does_not_notice() {
    let (mut lab, signers) = with_bundle();
    signers.publish(5, POLICY, LATER);
    start(&mut lab);
    lab.gateway(A).audited("gateway-started", "done", &["\"bundle\":\"e2e\"", "\"bundle_version\":5"]);
    let never = "@id(\"stop\") forbid (principal, action, resource);";
    type Spoil = fn(&Signers);
    let cases: [(&str, Spoil); 7] = [
        ("bundle-version-older", |signers| signers.publish(4, POLICY, LATER)),
        ("bundle-version-reused", |signers| signers.publish(5, &format!("{POLICY}\n"), LATER)),
        ("bundle-expired", |signers| signers.publish(6, POLICY, "2021-01-01T00:00:00Z")),
        ("bundle-file-differs", tampered),
        ("bundle-too-few-signatures", unsigned),
        ("bundle-unreadable", |signers| fs::remove_dir_all(&signers.directory).unwrap()),
        ("bundle-policy-refused", |signers| {
            signers.publish(6, "@id(\"x\") permit (principal, action, resource) when { true };\nnonsense", LATER)
        }),
    ];
    for (code, spoil) in cases {
        spoil(&signers);
        lab.gateway(A).reload();
        lab.gateway(A).audited("policy-refused", "refused", &[&format!("\"code\":\"{code}\"")]);
    }
    // What was in force is in force.
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    let decided = lab.gateway(A).audited("decision", "allow", &["release", "\"bundle_version\":5"]);
    assert_eq!(decided["detail"]["facts"]["entities"]["vms"][0]["name"], VM, "{decided}");
    // And a good one takes over.
    signers.publish(
        6,
        &format!("{POLICY}\n\n{never}").replace("(principal, action, resource)", "(principal is Sealane::Gateway, action, resource)"),
        LATER,
    );
    lab.gateway(A).reload();
    let said = lab.gateway(A).audited("policy-refused", "refused", &["bundle-policy-refused", "never permits"]);
    assert_eq!(said["detail"]["code"], "bundle-policy-refused", "a permit that is always forbidden is a mistake");
    signers.publish(6, &POLICY.replace("\"acme\"", "\"other\""), LATER);
    lab.gateway(A).reload();
    lab.gateway(A).audited("policy-loaded", "done", &["\"bundle_version\":6"]);
}

#[test]
fn a_gateway_that_is_started_with_a_bad_bundle_goes_on_with_the_last_good_one() {
    let (mut lab, signers) = with_bundle();
    // Nothing was in force before.
    tampered(&signers);
    lab.gateway(A).start_in_vain().expect(2, &["bundle", "lab.cedar"]);
    signers.publish(5, POLICY, LATER);
    start(&mut lab);
    lab.gateway_mut(A).kill();
    tampered(&signers);
    lab.gateway_mut(A).start();
    lab.gateway(A).audited("policy-refused", "refused", &["bundle-file-differs"]);
    lab.gateway_mut(A).kill();
    fs::remove_dir_all(&signers.directory).unwrap();
    lab.gateway_mut(A).start();
    lab.gateway(A).audited("policy-refused", "refused", &["No such file"]);
    // The version is remembered, whoever dies.
    signers.publish(4, POLICY, LATER);
    lab.gateway(A).reload();
    lab.gateway(A).audited("policy-refused", "refused", &["bundle-version-older"]);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    // A copy that somebody changed is no last good one.
    lab.gateway_mut(A).stop();
    let kept =
        fs::read_dir(lab.gateway(A).directory().join("state/policy")).unwrap().flatten().find(|entry| entry.path().is_dir()).unwrap();
    fs::write(kept.path().join("lab.cedar"), POLICY.replace("acme", "others")).unwrap();
    lab.gateway(A).start_in_vain().expect(2, &["bundle", "lab.cedar"]);
}

#[test]
fn an_expired_bundle_permits_nothing_and_lets_the_gateway_run() {
    let (mut lab, signers) = with_bundle();
    // Long enough to start with, on a slow machine too.
    let expires = jiff::Timestamp::try_from(SystemTime::now() + Duration::from_secs(20)).unwrap();
    let expires = jiff::Timestamp::from_second(expires.as_second()).unwrap();
    signers.publish(1, POLICY, &expires.to_string());
    start(&mut lab);
    lab.gateway(A).command(&["plan", VM, "--to", B.gateway()]).expect(0, &[]);
    wait_for("the bundle to expire", || (jiff::Timestamp::now() > expires).then_some(()));
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "e2e", "not valid now"]);
    lab.gateway(A).audited("decision", "deny", &["request", "not valid now"]);
    // It starts with it too: what is between COMMIT and DONE has to be settled by somebody.
    lab.gateway_mut(A).stop();
    lab.gateway_mut(A).start();
    lab.gateway(A).audited("policy-refused", "refused", &["bundle-expired"]);
    lab.migrate(A, &[]).expect_stayed(3, &["not valid now"]);
    signers.publish(2, POLICY, LATER);
    lab.gateway(A).reload();
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

#[test]
fn what_a_permit_asks_of_the_stream_is_done_by_both_ends() {
    let permit = "@id(\"release-to-our-gateways\")";
    let obliged = "@id(\"release-to-our-gateways\")\n@require_durability(\"both\")\n@require_compression(\"none\")\n@max_lanes(\"1\")\n\
        @require_compression_scope(\"page\")\n@require_length_padding(\"true\")\n@require_post_quantum(\"true\")\n@max_bandwidth(\"800Mbit/s\")";
    let lab = Setup::new().policy(A, &replaced(POLICY, permit, obliged)).start();
    let plan = lab.gateway(A).command(&["plan", VM, "--to", B.gateway()]);
    assert!(plan.stdout.contains("require_durability=both") && plan.stdout.contains("max_lanes=1"), "{}", plan.stdout);
    lab.migrate(A, &["--lanes", "2", "--compress", "zstd"]).expect_moved();
    lab.settled_on(B);
    let stream = json!({
        "mode": "precopy", "compression": "none", "compressionScope": "page", "lengthPadding": true, "durability": "both", "lanes": 1,
        "storage": "none"
    });
    let accepted = lab.gateway(B).audited("decision", "allow", &["\"action\":\"accept\""]);
    assert_eq!(accepted["detail"]["facts"]["context"]["stream"], stream, "what was offered");
    let committed = lab.gateway(A).audited("decision", "allow", &["\"action\":\"commit\""]);
    assert_eq!(committed["detail"]["facts"]["context"]["stream"], stream, "what is judged at the switch");
    lab.gateway(A).audited("decision", "allow", &["\"action\":\"release\"", "max_bandwidth=100000000 bytes/s"]);
    // The decisions of this log under policies that ask for more of the destination.
    let new = lab.gateway(A).directory().join("new");
    fs::create_dir(&new).unwrap();
    fs::write(new.join("lab.cedar"), POLICY.replace("resource.tenant == \"acme\"", "resource.tenant == \"other\"")).unwrap();
    let path = |name: &str| lab.gateway(A).directory().join(name).to_str().unwrap().to_owned();
    let diff = |new: &str| {
        let line = ["policy", "diff", &path("policy.d"), &path(new), "--audit", &path("audit"), "--json"];
        run(lab.gateway(A).directory(), &line)
    };
    let said = diff("new");
    said.expect(1, &[]);
    assert_eq!((said.json()["changed"][0]["action"].as_str(), said.json()["skipped"].as_u64()), (Some("request"), Some(0)));
    let said = diff("policy.d");
    said.expect(0, &[]);
    assert_eq!(said.json()["changed"], json!([]));
}

#[test]
fn what_a_destination_asks_of_the_stream_and_is_not_offered_is_denied() {
    let permit = "@id(\"accept-from-our-gateways\")";
    let policy = replaced(POLICY, permit, &format!("{permit}\n@require_durability(\"dest\")"));
    let lab = Setup::new().policy(B, &policy).start();
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "accept", "asks for durability `dest`"]);
    lab.gateway(B).audited("decision", "deny", &["asks for durability `dest`"]);
    lab.settled_on(A);
    // Fewer lanes it grants by itself.
    let lanes = replaced(POLICY, permit, &format!("{permit}\n@max_lanes(\"1\")"));
    let lab = Setup::new().policy(B, &lanes).start();
    lab.migrate(A, &["--lanes", "2"]).expect_moved();
    let committed = lab.gateway(B).audited("decision", "allow", &["\"action\":\"commit\""]);
    assert_eq!(committed["detail"]["facts"]["context"]["stream"]["lanes"], 1);
    lab.settled_on(B);
}

#[test]
fn a_machine_other_than_the_configured_one_neither_leaves_nor_arrives() {
    for name in [A, B] {
        for (pin, words) in [("vcpus = 7", "expected 7"), ("devices = [\"disk@/dev/vg/web\"]", "disk@/dev/vg/web")] {
            let lab = Setup::new().replace(name, "migratable = true", &format!("migratable = true\n{pin}")).start();
            lab.migrate(A, &[]).expect_stayed(3, &[VM, words]);
            lab.settled_on(A);
        }
    }
    let lab = Setup::new().start();
    lab.migrate(A, &[]).expect_moved();
    let machine = lab.gateway(A).audited("migration-offered", "done", &[])["detail"]["machine"].as_str().unwrap().to_owned();
    assert_eq!(machine.len(), 64, "{machine}");
}
