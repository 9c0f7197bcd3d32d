//! The commands that need no gateway, run as a person or a script runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use sealane::audit::{Answer, AuditLog, Entry, Event, Outcome, Signer};
use sealane::identity::{Signer as Key, authority};
use serde_json::Value;
use tempfile::TempDir;

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "one object on one line: {}", self.stdout);
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// Checks the exit code, and that all words are on stdout or stderr.
    fn says(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stdout.contains(word) || self.stderr.contains(word), "{word:?} is not in:\n{}{}", self.stdout, self.stderr);
        }
        self
    }
}

fn sealane(dir: &Path, line: &str) -> Ran {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_sealane")).args(line.split_whitespace()).current_dir(dir).output().unwrap();
    Ran {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn here() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The repository's own configuration.
fn example(name: &str) -> String {
    format!("{}/config/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn with_authority() -> TempDir {
    let dir = here();
    sealane(dir.path(), "pki init ca --trust-domain dc1.example.net").says(0, &["ca-cert.pem", "crl.pem", "ca-key.pem", "SECRET"]);
    sealane(dir.path(), "pki issue ca --gateway gw-a --site dc1").says(0, &["gw-a-key.pem"]);
    dir
}

#[test]
fn what_pki_prints_on_stdout_belongs_into_a_configuration() {
    let dir = here();
    let init = sealane(dir.path(), "pki init ca --trust-domain dc1.example.net");
    let table: toml::Table = init.stdout.parse().unwrap();
    let roots = table["identity"]["trust"][0]["roots"].as_str().unwrap();
    assert!(Path::new(roots).is_absolute() && Path::new(roots).exists(), "{roots}");

    let issue = sealane(dir.path(), "pki issue ca --gateway gw-a --site dc1").says(0, &["spiffe://dc1.example.net/gateway/gw-a"]);
    let table: toml::Table = issue.stdout.parse().unwrap();
    let identity = &table["identity"];
    for key in ["certificate", "key", "signing_key"] {
        assert!(Path::new(identity[key].as_str().unwrap()).exists(), "{key}");
    }
    let key = Path::new(identity["key"].as_str().unwrap());
    assert_eq!(key.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // With the rest of the commented example, it is a configuration.
    let example = std::fs::read_to_string(example("gateway.toml")).unwrap();
    let (before, after) = (example.split("[identity]").next().unwrap(), example.split("[policy]").nth(1).unwrap());
    let after = after.replace("spiffe://dc2.", "spiffe://dc1.");
    std::fs::write(dir.path().join("gateway.toml"), format!("{before}{}\n[policy]{after}", issue.stdout)).unwrap();
    sealane(dir.path(), "config check --text-only gateway.toml").says(0, &["gw-a-cert.pem"]);
    // What is for peers is there as a comment, and right.
    let peer: String = issue.stdout.lines().skip_while(|line| !line.contains("[[peer]]")).map(|line| line[2..].to_owned() + "\n").collect();
    let peer: toml::Table = peer.parse().unwrap();
    assert_eq!(peer["peer"][0]["site"].as_str(), Some("dc1"));
}

#[test]
fn an_authority_or_a_certificate_is_never_overwritten() {
    let dir = with_authority();
    sealane(dir.path(), "pki init ca --trust-domain dc1.example.net").says(2, &["exists: refusing to overwrite"]);
    sealane(dir.path(), "pki issue ca --gateway gw-a --site dc1").says(2, &["gw-a-cert.pem", "--renew"]);
    let before = std::fs::read(dir.path().join("ca/gw-a-signing-key.pem")).unwrap();
    let certificate = std::fs::read(dir.path().join("ca/gw-a-cert.pem")).unwrap();
    sealane(dir.path(), "pki issue ca --gateway gw-a --renew").says(0, &["gw-a", "SIGHUP"]);
    assert_eq!(std::fs::read(dir.path().join("ca/gw-a-signing-key.pem")).unwrap(), before);
    assert_ne!(std::fs::read(dir.path().join("ca/gw-a-cert.pem")).unwrap(), certificate);
    sealane(dir.path(), "pki issue ca --gateway gw-a --site dc2 --renew").says(2, &["cannot be used with"]);
    sealane(dir.path(), "pki issue ca --gateway gw-b").says(2, &["--site"]);
    sealane(dir.path(), "pki init x --trust-domain NOT_A_DOMAIN!").says(2, &["NOT_A_DOMAIN!", "hint:"]);
}

#[test]
fn a_revocation_shows_in_the_list() {
    let dir = with_authority();
    let serial = sealane(dir.path(), "pki show ca/gw-a-cert.pem --json").json()["objects"][0]["serial"].as_str().unwrap().to_owned();
    sealane(dir.path(), "pki revoke ca gw-a").says(0, &["revoked every certificate of gateway `gw-a`", "crl.pem", "good until"]);
    let crl = sealane(dir.path(), "pki show ca/crl.pem --json").json();
    assert_eq!((crl["schema"].as_str(), crl["objects"][0]["kind"].as_str()), (Some("sealane.pki/1"), Some("CRL")));
    assert!(crl["objects"][0]["revoked"][0].as_str().unwrap().starts_with(&serial), "{crl}");
    sealane(dir.path(), "pki revoke ca gw-a").says(2, &["`gw-a`", "issued.json"]);
    sealane(dir.path(), "pki refresh-crl ca").says(0, &["crl.pem"]);
    let number = |crl: Value| crl["objects"][0]["number"].as_str().unwrap().parse::<u64>().unwrap();
    assert!(number(sealane(dir.path(), "pki show ca/crl.pem --json").json()) > number(crl));
}

#[test]
fn show_names_what_a_file_is_and_never_shows_a_key() {
    let dir = with_authority();
    let certificate = sealane(dir.path(), "pki show ca/gw-a-cert.pem");
    certificate.says(0, &["certificate", "uri", "spiffe://dc1.example.net/gateway/gw-a", "valid until"]);
    let key = sealane(dir.path(), "pki show ca/gw-a-key.pem").says(0, &["private key (not shown)"]);
    assert!(key.stdout.len() < 40, "{}", key.stdout);
    std::fs::write(dir.path().join("x"), "nothing").unwrap();
    sealane(dir.path(), "pki show x").says(2, &["`x`", "expected certificates, CRLs or keys"]);
    sealane(dir.path(), "pki show none").says(1, &["`none`"]);
}

#[test]
fn policy_check_says_every_error_with_its_place() {
    let dir = here();
    std::fs::create_dir(dir.path().join("p")).unwrap();
    std::fs::write(dir.path().join("p/a.cedar"), "// fine\n\npermit (principal, action, resource);\n").unwrap();
    std::fs::write(dir.path().join("p/b.cedar"), "@id(\"b\")\npermit (principal, action, resource)\nwhen { resource.nam == \"x\" };\n")
        .unwrap();
    let check = sealane(dir.path(), "policy check p").says(2, &["p/a.cedar:3:1: ", "@id", "p/b.cedar:3:", "policy `b`", "nam", "2 errors"]);
    assert!(check.stdout.is_empty(), "{}", check.stdout);
    let object = sealane(dir.path(), "policy check p --json").says(2, &[]).json();
    assert_eq!((object["schema"].as_str(), object["valid"].as_bool()), (Some("sealane.policy-check/1"), Some(false)));
    assert_eq!((object["errors"][0]["file"].as_str(), object["errors"][0]["line"].as_u64()), (Some("p/a.cedar"), Some(3)));
    sealane(dir.path(), "policy check none").says(2, &["`none`"]);
    std::fs::remove_file(dir.path().join("p/a.cedar")).unwrap();
    std::fs::remove_file(dir.path().join("p/b.cedar")).unwrap();
    sealane(dir.path(), "policy check p").says(2, &["no policy"]);
}

#[test]
fn policy_check_warns_of_names_only_against_a_configuration() {
    let dir = here();
    let policies = example("policy.d");
    let alone = sealane(dir.path(), &format!("policy check {policies}")).says(0, &["7 policies", "p1-acme-dc1-to-dc2", "digest"]);
    assert!(!alone.stderr.contains("warning"), "{}", alone.stderr);
    let line = format!("policy check {policies} --config {} --json", example("gateway.toml"));
    let against = sealane(dir.path(), &line).says(0, &["warning:", "20-tenant-acme.cedar:4:1", "dc2-gateways"]).json();
    assert_eq!((against["valid"].as_bool(), against["policies"].as_array().unwrap().len()), (Some(true), 7));
    assert_eq!(against["digest"].as_str().unwrap().len(), 64);
    assert!(against["warnings"].as_array().unwrap().iter().any(|warning| warning["policy"] == "p5-sre-window"), "{against}");
}

#[test]
fn policy_tests_pass_or_name_the_one_that_failed() {
    let dir = here();
    sealane(dir.path(), &format!("policy test {}", example("policy.d"))).says(0, &["61 of 61 tests", "pass  no approver"]);
    std::fs::create_dir(dir.path().join("p")).unwrap();
    std::fs::write(dir.path().join("p/a.cedar"), "@id(\"a\") permit (principal, action, resource);").unwrap();
    sealane(dir.path(), "policy test p").says(2, &["p/tests.json", "hint:"]);
    let tests = std::fs::read_to_string(example("policy.d/tests.json")).unwrap();
    std::fs::write(dir.path().join("p/tests.json"), tests).unwrap();
    sealane(dir.path(), "policy test p").says(1, &["FAIL  a gateway of another site gets nothing: allow: permitted by `a`"]);
    let object = sealane(dir.path(), "policy test p --json").says(1, &[]).json();
    assert_eq!(object["schema"].as_str(), Some("sealane.policy-test/1"));
    assert_eq!(object["failed"].as_u64().unwrap() + object["passed"].as_u64().unwrap(), 61);
    assert_eq!(object["tests"].as_array().unwrap().len(), 61);
    std::fs::write(dir.path().join("p/tests.json"), "{}").unwrap();
    sealane(dir.path(), "policy test p").says(1, &["FAIL", "missing field"]);
}

const EXPLAINED: &str = r#"
@id("out") permit (principal in Sealane::GatewayGroup::"production", action in [Sealane::Action::"release", Sealane::Action::"commit"], resource)
when { context.route.dstSite == "dc2" && context.memoryMiB <= 2048 };
@id("night") permit (principal in Sealane::Team::"vm-operators", action == Sealane::Action::"request", resource)
when { context.now < datetime("2026-01-01T06:00:00Z") };
@id("lanes") forbid (principal, action == Sealane::Action::"release", resource) when { context.stream.lanes > 4 };
"#;

#[test]
fn explain_says_who_decided_with_the_facts_of_the_configuration() {
    let dir = here();
    std::fs::create_dir(dir.path().join("p")).unwrap();
    std::fs::write(dir.path().join("p/a.cedar"), EXPLAINED).unwrap();
    std::fs::copy(example("gateway.toml"), dir.path().join("gateway.toml")).unwrap();
    let line = "policy explain p --config gateway.toml --vm web-1 --peer gw-b";
    let run = |more: &str| sealane(dir.path(), &format!("{line} {more}"));
    run("").says(
        0,
        &["`web-1` from `gw-a` to `gw-b`: permitted", "permits: `out` at a.cedar:2:1", "from `gw-b` to `gw-a`: denied", "--operator"],
    );
    run("--operator alice --at 2026-01-01T05:00:00Z").says(0, &["permits: `night`"]);
    run("--operator alice --at 2026-01-01T07:00:00Z").says(3, &["DENY    request  no policy permits"]);
    run("--action release").says(0, &["permit  release"]);
    run("--action release --memory 4GiB").says(3, &["DENY    release", "4.0 GiB of memory"]);
    run("--action accept").says(3, &["DENY    accept"]);
    let object = run("--json --operator alice --at 2026-01-01T05:00:00Z --peer-ip 10.1.2.3").json();
    assert_eq!((object["schema"].as_str(), object["permitted"][0].as_str()), (Some("sealane.policy-explain/1"), Some("leaving")));
    assert_eq!((object["facts"]["peer_ip"].as_str(), object["facts"]["memory_bytes"].as_u64()), (Some("10.1.2.3"), Some(1 << 30)));
    let questions: Vec<_> =
        object["questions"].as_array().unwrap().iter().map(|q| (q["action"].as_str().unwrap(), q["decision"].as_str().unwrap())).collect();
    assert_eq!(questions, [("request", "allow"), ("release", "allow"), ("commit", "allow"), ("accept", "deny"), ("commit", "deny")]);
    assert_eq!(object["questions"][1]["policies"][0]["id"].as_str(), Some("out"));
    // A forbid is shown beside the permit that it overrules.
    let config = std::fs::read_to_string(example("gateway.toml")).unwrap().replace("lanes = 2", "lanes = 8");
    std::fs::write(dir.path().join("gateway.toml"), config).unwrap();
    run("--action release").says(3, &["forbidden by `lanes`", "forbids: `lanes`", "permits: `out`", "8 lanes"]);
    let other = "policy explain p --config gateway.toml --vm web-2 --peer gw-b";
    sealane(dir.path(), other).says(2, &["no VM `web-2` in `gateway.toml`", "there are: web-1"]);
    run("--operator bob").says(2, &["no operator `bob`", "there are: alice"]);
    run("--action request").says(2, &["--operator"]);
}

/// Signs with the key of a gateway that `pki issue` made.
struct AsGateway(Key, String);

impl AsGateway {
    fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(format!("ca/{name}-signing-key.pem"));
        Self(Key::from_pkcs8_pem(&std::fs::read(&path).unwrap(), &path).unwrap(), format!("spiffe://dc1.example.net/gateway/{name}"))
    }
}

impl Signer for AsGateway {
    fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.0.sign(bytes)
    }
    fn public_key(&self) -> [u8; 32] {
        self.0.public_key()
    }
    fn name(&self) -> &str {
        &self.1
    }
}

/// Logs of `gw-a` and `gw-b`; `gw-a`'s keeps two heads of `gw-b`'s, and `head` is one of `gw-a`'s own.
fn with_logs() -> TempDir {
    let dir = with_authority();
    let at = dir.path();
    authority::issue(&at.join("ca"), "gw-b", "dc1").unwrap();
    let open = |name: &str| {
        let signer = AsGateway::new(at, name);
        AuditLog::open(&at.join(name), &signer.1.clone(), Arc::new(signer)).unwrap()
    };
    let (a, b) = (open("gw-a"), open("gw-b"));
    let peer = "spiffe://dc1.example.net/gateway/gw-b".parse().unwrap();
    let own = "spiffe://dc1.example.net/gateway/gw-a".parse().unwrap();
    let key = |name: &str| AsGateway::new(at, name).public_key();
    for number in 0..3 {
        a.record(&Entry::new(Event::Operator).detail("number", number)).unwrap();
        b.record(&Entry::new(Event::Handoff).migration(MIGRATION).outcome(Outcome::Done).detail("record", "run")).unwrap();
        let shown = b.announce(&own, None, Some(MIGRATION)).unwrap();
        let Answer::Cosigned(size, line) = a.keep_peer_head(&peer, &key("gw-b"), &shown, None).unwrap() else { panic!() };
        b.keep_cosignature(&own, &key("gw-a"), size, &line).unwrap();
    }
    let shown = a.announce(&peer, None, None).unwrap();
    let Answer::Cosigned(size, line) = b.keep_peer_head(&own, &key("gw-a"), &shown, None).unwrap() else { panic!() };
    a.keep_cosignature(&peer, &key("gw-b"), size, &line).unwrap();
    std::fs::write(at.join("head"), a.head().text).unwrap();
    let vm: sealane::types::VmName = "web-1".parse().unwrap();
    a.record(&Entry::new(Event::Decision).vm(vm, sealane::types::VmUuid([1; 16])).outcome(Outcome::Deny).detail("why", "no policy"))
        .unwrap();
    dir
}

const MIGRATION: sealane::types::MigrationId = sealane::types::MigrationId([7; 16]);

const KEYS: &str = "--key ca/gw-a-signing-pub.pem --peer-key ca/gw-b-signing-pub.pem --checkpoint head";

fn segment(dir: &Path) -> std::path::PathBuf {
    std::fs::read_dir(dir.join("gw-a"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .unwrap()
}

#[test]
fn audit_show_prints_entries_for_people_and_as_they_are() {
    let dir = with_logs();
    let all = sealane(dir.path(), "audit show gw-a --json").says(0, &[]);
    let text = std::fs::read_to_string(segment(dir.path())).unwrap();
    let entries: Vec<&str> = text.lines().filter(|line| !line.starts_with("{\"checkpoint\"")).collect();
    assert_eq!(all.stdout.lines().collect::<Vec<_>>(), entries);
    let last = sealane(dir.path(), "audit show gw-a --last 2").says(0, &["decision", "deny", "vm=web-1", "why=no policy", "head-cosigned"]);
    assert_eq!(last.stdout.lines().count(), 2);
    for (filter, lines) in [
        ("--vm web-1", 1),
        ("--vm other", 0),
        ("--event operator", 3),
        ("--peer spiffe://dc1.example.net/gateway/gw-b", 4),
        ("--outcome deny", 1),
        ("--outcome done --event peer-head", 3),
        ("--since 2100-01-01T00:00:00Z", 0),
        ("--until 2100-01-01T00:00:00Z", 9),
        ("--until 2000-01-01T00:00:00Z", 0),
    ] {
        assert_eq!(sealane(dir.path(), &format!("audit show gw-a {filter}")).says(0, &[]).stdout.lines().count(), lines, "{filter}");
    }
    sealane(dir.path(), "audit show gw-a --event nonsense").says(2, &["nonsense"]);
    sealane(dir.path(), "audit show gw-a --outcome nonsense").says(2, &["nonsense"]);
    sealane(dir.path(), "audit show none").says(2, &["`none`"]);
    let text = std::fs::read_to_string(segment(dir.path())).unwrap();
    std::fs::write(segment(dir.path()), text.replace("\"number\":1", "\"number\":7")).unwrap();
    let damaged = sealane(dir.path(), "audit show gw-a").says(1, &["damaged at entry 3", "audit verify"]);
    assert_eq!(damaged.stdout.lines().count(), 3, "what is before the damage is shown: {}", damaged.stdout);
}

#[test]
fn a_whole_log_is_verified_with_everything_that_is_known() {
    let dir = with_logs();
    sealane(dir.path(), "audit verify gw-a")
        .says(0, &["content       good", "signer        not proven", "completeness  not proven", "verified"]);
    let all = sealane(dir.path(), &format!("audit verify gw-a {KEYS}"));
    all.says(
        0,
        &[
            "signer        good",
            "completeness  good",
            "witnesses     good: the owners of all given keys have seen its first 7 entries",
            "3 heads of peers",
            "1 proofs hold",
        ],
    );
    let object = sealane(dir.path(), &format!("audit verify gw-a {KEYS} --json")).says(0, &[]).json();
    assert_eq!((object["schema"].as_str(), object["verified"].as_bool()), (Some("sealane.audit-verify/1"), Some(true)));
    for check in ["content", "signer", "completeness", "witnesses"] {
        assert_eq!(object[check]["verdict"].as_str(), Some("good"), "{check}");
    }
    assert_eq!(sealane(dir.path(), "audit verify gw-a --json").json()["witnesses"]["verdict"].as_str(), Some("not-proven"));
}

#[test]
fn each_verdict_fails_for_its_own_reason() {
    let dir = with_logs();
    let verify = |more: &str| sealane(dir.path(), &format!("audit verify gw-a {more}"));
    verify("--key ca/gw-b-signing-pub.pem").says(1, &["signer        bad", "content       good", "NOT verified"]);
    verify("--peer-key ca/gw-a-signing-pub.pem").says(1, &["witnesses     bad: the log has neither a head nor a cosignature"]);
    verify("--key ca/gw-a-cert.pem").says(2, &["`ca/gw-a-cert.pem`", "Ed25519"]);
    verify("--checkpoint none").says(2, &["`none`"]);
    let (path, text) = (segment(dir.path()), std::fs::read_to_string(segment(dir.path())).unwrap());
    let changed = |from: &str, to: &str| std::fs::write(&path, text.replace(from, to)).unwrap();
    changed("\"number\":2", "\"number\":9");
    let object = verify(&format!("{KEYS} --json")).says(1, &[]).json();
    assert_eq!((object["content"]["verdict"].as_str(), object["content"]["entry"].as_u64()), (Some("bad"), Some(5)), "{object}");
    // A log cut back behind its checkpoint: every line that is left is good.
    let short: String = text.split_inclusive('\n').take(10).collect();
    std::fs::write(&path, short).unwrap();
    verify(KEYS).says(1, &["content       good", "completeness  bad at entry 5"]);
    std::fs::remove_dir_all(dir.path().join("gw-a")).unwrap();
    verify("").says(1, &["NOT verified"]);
}

#[test]
fn a_log_that_was_written_anew_does_not_extend_a_kept_checkpoint() {
    let dir = with_logs();
    std::fs::remove_dir_all(dir.path().join("gw-a")).unwrap();
    let signer = AsGateway::new(dir.path(), "gw-a");
    let log = AuditLog::open(&dir.path().join("gw-a"), &signer.1.clone(), Arc::new(signer)).unwrap();
    for _ in 0..20 {
        log.record(&Entry::new(Event::GatewayStarted)).unwrap();
    }
    drop(log);
    let forged = sealane(dir.path(), "audit verify gw-a --key ca/gw-a-signing-pub.pem --checkpoint head");
    forged.says(1, &["content       good", "signer        good", "completeness  bad"]);
}

#[test]
fn a_proof_is_made_and_checked_without_the_log() {
    let dir = with_logs();
    let made = sealane(dir.path(), "audit prove gw-a 3").says(0, &["c2sp.org/tlog-proof@v1", "index 3"]);
    std::fs::write(dir.path().join("p"), &made.stdout).unwrap();
    let check = |more: &str| sealane(dir.path(), &format!("audit verify-proof {more}"));
    check("p --key ca/gw-a-signing-pub.pem").says(0, &["content       good: entry 3", "signer        good", "verified", "operator"]);
    check("p --key ca/gw-b-signing-pub.pem").says(1, &["content       good", "signer        bad", "another key", "NOT verified"]);
    check("p --key ca/gw-a-signing-pub.pem --peer-key ca/gw-b-signing-pub.pem").says(1, &["witnesses     bad", "no cosignature"]);
    sealane(dir.path(), "audit prove gw-a 99").says(1, &["does not have this entry"]);
    // What gw-a keeps of gw-b's handoff is signed by both.
    let kept = format!("gw-a/proofs/{MIGRATION}-run.tlog-proof --key ca/gw-b-signing-pub.pem --peer-key ca/gw-a-signing-pub.pem");
    check(&kept).says(0, &["signer        good", "witnesses     good", "record=run"]);
    let object = check(&format!("{kept} --json")).says(0, &[]).json();
    assert_eq!((object["schema"].as_str(), object["verified"].as_bool()), (Some("sealane.audit-proof/1"), Some(true)));
    assert_eq!(object["entry"]["detail"]["record"], "run");
    std::fs::write(dir.path().join("p"), made.stdout.replace("index 3", "index 4")).unwrap();
    check("p --key ca/gw-a-signing-pub.pem").says(1, &["content       bad", "is of entry 4", "NOT verified"]);
}

#[test]
fn a_log_is_exported_for_collectors() {
    let dir = with_logs();
    let export = |format: &str| sealane(dir.path(), &format!("audit export gw-a --format {format}")).says(0, &[]).stdout;
    let objects: Vec<serde_json::Value> = export("ocsf").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 9);
    for object in &objects {
        // What the schema requires of every event.
        let number = |name: &str| object[name].as_u64().unwrap();
        assert_eq!(number("type_uid"), number("class_uid") * 100 + number("activity_id"), "{object}");
        assert!(number("time") > 1_600_000_000_000 && number("severity_id") > 0 && object["metadata"]["version"] == "1.9.0");
        assert!(object["api"]["operation"].is_string() && object["actor"].is_object() && object["src_endpoint"].is_object());
    }
    let denied = &objects[8];
    assert_eq!((&denied["status"], &denied["resources"][0]["name"]), (&"Failure".into(), &"web-1".into()), "{denied}");
    let syslog = export("syslog");
    let last = syslog.lines().last().unwrap();
    assert!(syslog.starts_with("<110>1 20") && last.starts_with("<108>1 20"), "{last}");
    assert!(last.split_once("@cee: ").unwrap().1.contains("\"why\":\"no policy\""), "{last}");
    let journal = export("journal");
    assert_eq!(journal.matches("__REALTIME_TIMESTAMP=").count(), 9);
    assert_eq!(journal.matches("\n\n").count(), 9, "an empty line ends each entry");
    assert!(journal.contains("\nPRIORITY=4\n") && journal.contains("\nSEALANE_OUTCOME=deny\n"));
}

/// Zero pages, repetitive ones and noise.
fn image(dir: &Path, pages: usize) {
    let mut noise = 1_u64;
    let mut bytes = vec![0; pages * 4096];
    for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
        for (at, byte) in page.iter_mut().enumerate() {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = match number / 50 % 3 {
                0 => 0,
                1 => (at / 64).to_le_bytes()[0],
                _ => noise.to_be_bytes()[0],
            };
        }
    }
    std::fs::write(dir.join("ram.img"), bytes).unwrap();
}

#[test]
fn bench_moves_an_image_and_reports_the_median() {
    let dir = here();
    image(dir.path(), 4096);
    let bench = sealane(dir.path(), "bench --image ram.img --rounds 2 --compress lz4 --json");
    let bench = bench.says(0, &["warm-up", "compared: equal", "run 2 of 2", "GiB/s"]);
    let object = bench.json();
    assert_eq!((object["schema"].as_str(), object["link"].as_str()), (Some("sealane.bench/1"), Some("loopback")));
    assert_eq!((object["image_bytes"].as_u64(), object["compression"].as_str()), (Some(16 << 20), Some("lz4")));
    assert_eq!((object["warm_up_verified"].as_bool(), object["durations_seconds"].as_array().unwrap().len()), (Some(true), 2));
    assert!(object["gib_per_second"].as_f64().unwrap() > 0.0 && object["cpu_seconds"].is_f64());
    let report = &object["report"];
    assert_eq!((report["schema"].as_str(), report["state"].as_str()), (Some("sealane.report/1"), Some("completed")));
    assert_eq!((report["running_on"].as_str(), report["verified"].as_bool()), (Some("destination"), Some(false)));
    let pages = |kind: &str| report["pages"][kind].as_u64().unwrap();
    assert_eq!(pages("zero") + pages("raw") + pages("compressed") + pages("duplicate"), 4096, "{report}");
    assert!(pages("zero") > 1300 && pages("duplicate") > 1000 && pages("raw") > 100, "{report}");
    assert!((5 << 20..12 << 20).contains(&report["wire_bytes"].as_u64().unwrap()), "{report}");
    assert!(report["audit"]["source_head"].as_str().unwrap().contains("spiffe://bench.sealane/gateway/source"));
}

#[test]
fn bench_verifies_when_asked_and_can_leave_pages_as_they_are() {
    let dir = here();
    image(dir.path(), 600);
    let object = sealane(dir.path(), "bench --image ram.img --rounds 1 --lanes 3 --compress none --verify --json").says(0, &[]).json();
    assert_eq!((object["report"]["verified"].as_bool(), object["lanes"].as_u64()), (Some(true), Some(3)));
    assert_eq!(object["report"]["pages"]["compressed"].as_u64(), Some(0));
    sealane(dir.path(), "bench --image ram.img --rounds 1").says(0, &["ram.img: 2.3 MiB at", "median of 1 runs"]);
}

#[test]
fn bench_refuses_what_is_no_image_and_leaves_nothing_behind() {
    let dir = here();
    sealane(dir.path(), "bench --image none").says(2, &["`none`"]);
    std::fs::write(dir.path().join("odd.img"), [1; 5000]).unwrap();
    let scratch = dir.path().join("tmp");
    std::fs::create_dir(&scratch).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
    let output = command.args(["bench", "--image", "odd.img"]).current_dir(dir.path()).env("TMPDIR", &scratch).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`odd.img`"), "{output:?}");
    assert_eq!(scratch.read_dir().unwrap().count(), 0, "keys are removed");
}

#[test]
fn bench_generates_the_memory_when_asked() {
    let dir = here();
    let bench = |flags: &str| {
        sealane(dir.path(), &format!("bench --memory 16MiB --rounds 1 --compress lz4 --json --content {flags}")).says(0, &[]).json()
    };
    let object = bench("realistic --verify");
    assert_eq!((object["content"]["kind"].as_str(), object["content"]["seed"].as_u64()), (Some("realistic"), Some(1)));
    assert_eq!((object["image"].is_null(), object["image_bytes"].as_u64()), (true, Some(16 << 20)));
    let pages = |object: &Value, kind: &str| object["report"]["pages"][kind].as_u64().unwrap();
    assert!((800..2400).contains(&pages(&object, "zero")), "{object}");
    assert!((2 << 20..7 << 20).contains(&object["report"]["wire_bytes"].as_u64().unwrap()), "{object}");
    let again = bench("realistic");
    assert_eq!(pages(&again, "zero"), pages(&object, "zero"), "the seed decides");
    assert_eq!(pages(&bench("zero"), "zero"), 4096);
    assert_eq!(pages(&bench("incompressible"), "raw"), 4096);
    let heavy = bench("write-heavy --dirty-rate 20MiB/s --verify");
    assert_eq!(heavy["content"]["dirty_bytes_per_second"].as_u64(), Some(20 << 20));
    assert_eq!(heavy["report"]["verified"].as_bool(), Some(true), "what was written meanwhile arrived");
}

#[test]
fn bench_wants_an_image_or_content_and_says_what_does_not_fit() {
    let dir = here();
    image(dir.path(), 16);
    for (flags, words) in [
        ("", ["--image", "--content"]),
        ("--image ram.img --content zero", ["cannot be used with", "--content"]),
        ("--image ram.img --memory 1GiB", ["cannot be used with", "--image"]),
        ("--content zero --memory 5", ["hint:", "5"]),
        ("--content zero --memory 5000B", ["5000", "multiple of 4096"]),
        ("--content zero --dirty-rate 1MiB/s", ["`zero`", "write-heavy"]),
        ("--content zero --to 127.0.0.1:1", ["--pki", "required"]),
        ("--content zero --memory 1MiB --to 127.0.0.1:1 --pki none", ["`source`", "bench listen --pki none"]),
        ("listen --at 127.0.0.1:0", ["--pki", "required"]),
        ("listen --at localhost --pki ca", ["--at", "localhost"]),
    ] {
        sealane(dir.path(), &format!("bench {flags}")).says(2, &words);
    }
}

/// `bench listen` in a process of its own.
struct Listener {
    process: std::process::Child,
    address: String,
}

impl Listener {
    fn start(dir: &Path, flags: &str) -> Self {
        let line = format!("bench listen --at 127.0.0.1:0 --pki ca {flags}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
        let piped = std::process::Stdio::piped;
        let mut process = command.args(line.split_whitespace()).current_dir(dir).stdout(piped()).stderr(piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        let line = lines.find(|line| line.starts_with("listening at ")).unwrap();
        // Whatever it says later has somewhere to go.
        std::thread::spawn(move || lines.count());
        let address = line["listening at ".len()..].split(';').next().unwrap().to_owned();
        Self { process, address }
    }

    /// Ends it as an operator does: its exit code, and what it printed on stdout.
    fn end(mut self) -> (i32, String) {
        Command::new("kill").args(["-INT", &self.process.id().to_string()]).status().unwrap();
        let mut stdout = String::new();
        self.process.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        (self.process.wait().unwrap().code().unwrap(), stdout)
    }
}

#[test]
fn bench_runs_between_two_processes_and_each_says_its_own_cpu_time() {
    let dir = here();
    let listener = Listener::start(dir.path(), "--json");
    let to = format!("--to {} --pki ca --rounds 2 --json", listener.address);
    let object = sealane(dir.path(), &format!("bench --content realistic --memory 8MiB {to}")).says(0, &["compared: equal"]).json();
    assert_eq!((object["link"].as_str(), object["cpu_of"].as_str()), (Some(listener.address.as_str()), Some("source")));
    assert!(object["report"]["cpu_seconds"].is_null() && object["cpu_seconds"].is_f64(), "{object}");
    // The next source, with other memory, finds the same listener.
    sealane(dir.path(), &format!("bench --content zero --memory 4MiB {to}")).says(0, &["compared: equal"]);
    let (code, stdout) = listener.end();
    assert_eq!(code, 0);
    let arrivals: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(arrivals.len(), 6, "{stdout}");
    let ids: Vec<_> = object["timed_runs"].as_array().unwrap().iter().map(|run| &run["migration_id"]).collect();
    assert_eq!(ids, [&arrivals[1]["migration_id"], &arrivals[2]["migration_id"]]);
    for arrival in &arrivals {
        assert_eq!((arrival["schema"].as_str(), arrival["arrived"].as_bool()), (Some("sealane.bench-arrival/1"), Some(true)), "{arrival}");
    }
}

#[test]
fn bench_listen_refuses_what_is_too_large_and_who_is_not_the_source() {
    let dir = here();
    let listener = Listener::start(dir.path(), "--max-memory 1MiB");
    let to = format!("bench --content zero --memory 2MiB --rounds 1 --to {}", listener.address);
    let ran = sealane(dir.path(), &format!("{to} --pki ca"));
    assert!(ran.code != 0 && ran.stderr.contains("--max-memory"), "{}{}", ran.stdout, ran.stderr);
    sealane(dir.path(), "pki init other --trust-domain other.example.net").says(0, &[]);
    sealane(dir.path(), "pki issue other --gateway source --site x").says(0, &[]);
    sealane(dir.path(), &format!("{to} --pki other")).says(3, &[]);
    assert_eq!(listener.end().1, "");
}
