//! The commands that need no gateway, run as a person or a script runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod bench;
mod policy;

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

/// Signs with the key of a gateway that `pki issue` made.
struct AsGateway(Key, String);

impl AsGateway {
    fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(format!("ca/{name}-signing-key.pem"));
        Self(Key::from_pkcs8_pem(&std::fs::read(&path).unwrap(), &path).unwrap(), format!("spiffe://dc1.example.net/gateway/{name}"))
    }
}

impl Signer for AsGateway {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        Ok(self.0.sign(bytes).unwrap())
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
    // A collector's socket gets the same, one entry at a time.
    let path = dir.path().join("log");
    let collector = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let received = |format: &str| {
        sealane(dir.path(), &format!("audit export gw-a --format {format} --to log")).says(0, &[]);
        let mut all = Vec::new();
        for _ in 0..9 {
            let mut bytes = vec![0; 65_536];
            let length = collector.recv(&mut bytes).unwrap();
            all.push(String::from_utf8(bytes[..length].to_vec()).unwrap());
        }
        all
    };
    assert_eq!(received("syslog"), export("syslog").lines().collect::<Vec<_>>());
    for entry in received("journal") {
        assert!(
            entry.starts_with("MESSAGE=") && entry.ends_with("}\n") && !entry.contains("\n_") && entry.contains("\nSEALANE_INDEX="),
            "{entry}"
        );
    }
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    sealane(dir.path(), &format!("audit export gw-a --format syslog --event decision --to udp:{}", udp.local_addr().unwrap())).says(0, &[]);
    let mut bytes = vec![0; 65_536];
    let length = udp.recv(&mut bytes).unwrap();
    assert!(bytes[..length].starts_with(b"<1") && bytes[..length].ends_with(b"}"));
    sealane(dir.path(), "audit export gw-a --format syslog --to nobody").says(2, &["cannot send to `nobody`", "/dev/log"]);
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
