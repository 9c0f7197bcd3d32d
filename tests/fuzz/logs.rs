//! Audit logs, their checkpoints and proofs, bundles of policies, and what a monitor says: bytes that a user, a disk or a QEMU may have
//! changed. A log or a bundle that was changed must not pass for a good one, whatever the change.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use sealane::audit::{self, AuditLog, Entry, Event, Outcome, Proof, Signer, Verdict, VerifyOptions};
use sealane::identity;
use sealane::policy::bundle::{BundleSource, BundleTrust, Manifest};
use tempfile::TempDir;

struct Key(identity::Signer);

impl Signer for Key {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        Ok(self.0.sign(bytes).unwrap())
    }

    fn public_key(&self) -> [u8; 32] {
        self.0.public_key()
    }

    fn name(&self) -> &str {
        "spiffe://dc1.test/gateway/a"
    }
}

/// A log that is whole, and what is in its files.
struct Log {
    directory: TempDir,
    key: [u8; 32],
    lines: Vec<u8>,
    checkpoint: Vec<u8>,
    proof: Vec<u8>,
}

impl Log {
    fn segment(&self) -> PathBuf {
        self.directory.path().join("audit-00000000000000000000.jsonl")
    }

    fn options(&self) -> VerifyOptions {
        VerifyOptions { public_key: Some(self.key), ..VerifyOptions::default() }
    }
}

/// Each target has a log of its own, since it writes into it.
fn log() -> Log {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    // Another one each time: what the seeds of an earlier process are signed with is nobody's here, and the log is another one too.
    let pem = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem();
    let signer = Arc::new(Key(identity::Signer::from_pkcs8_pem(pem.as_bytes(), Path::new("fuzz")).unwrap()));
    let key = signer.public_key();
    let log = AuditLog::open(directory.path(), "sealane/dc1.test/a", signer).unwrap();
    for number in 0..6 {
        let entry = Entry::new(Event::Decision).outcome(Outcome::Allow).peer("spiffe://dc1.test/gateway/b");
        log.record(&entry.detail("number", number).detail("text", "a \"line\"\n\u{e9}")).unwrap();
    }
    drop(log);
    let proof = audit::prove(directory.path(), 3).unwrap().into_bytes();
    let read = |name: &str| fs::read(directory.path().join(name)).unwrap();
    let (lines, checkpoint) = (read("audit-00000000000000000000.jsonl"), read("checkpoint"));
    Log { directory, key, lines, checkpoint, proof }
}

static OF_LINES: LazyLock<Log> = LazyLock::new(log);
static OF_CHECKPOINTS: LazyLock<Log> = LazyLock::new(log);

/// Any bytes as the lines of a log.
pub fn audit_log(bytes: &[u8]) {
    let log = &*OF_LINES;
    fs::write(log.segment(), bytes).unwrap();
    let report = audit::verify(log.directory.path(), &log.options());
    assert_eq!(report.is_ok(), bytes == log.lines, "{report:#?}");
    let Ok(entries) = audit::read(log.directory.path(), audit::Filter::default()) else { return };
    for entry in entries.flatten() {
        assert!(!audit::canonical_line(&entry).is_empty());
    }
}

pub fn audit_logs() -> Vec<Vec<u8>> {
    vec![OF_LINES.lines.clone()]
}

/// Any bytes as a log's file `checkpoint`, and as a checkpoint that somebody kept.
pub fn audit_checkpoint(bytes: &[u8]) {
    let log = &*OF_CHECKPOINTS;
    fs::write(log.directory.path().join("checkpoint"), bytes).unwrap();
    let report = audit::verify(log.directory.path(), &log.options());
    // Signatures of others may stand behind the log's own.
    assert!(report.is_ok() || bytes != log.checkpoint, "{report:#?}");
    assert!(!report.is_ok() || bytes.starts_with(&log.checkpoint), "{report:#?}");
    fs::write(log.directory.path().join("checkpoint"), &log.checkpoint).unwrap();
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let report = audit::verify(log.directory.path(), &VerifyOptions { checkpoint: Some(text.to_owned()), ..log.options() });
    let body = |text: &[u8]| text.windows(2).position(|pair| pair == b"\n\n").map(|at| text[..at].to_vec());
    let same = OWN_CHECKPOINTS.iter().any(|own| body(bytes) == body(own));
    assert!(same || !matches!(report.completeness, Verdict::Good(_)), "{report:#?}");
}

/// The log's, and those that it had when it was shorter: every commit has its checkpoint in a line behind its entries.
static OWN_CHECKPOINTS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let log = &*OF_CHECKPOINTS;
    let lines = log.lines.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
    let kept = lines.filter_map(|line| Some(line.get("checkpoint")?.as_str()?.as_bytes().to_vec()));
    [log.checkpoint.clone()].into_iter().chain(kept).collect()
});

/// Its own, those of the log when it was shorter, and each with signatures of others, in more than one form, beside the own.
pub fn audit_checkpoints() -> Vec<Vec<u8>> {
    let log = &*OF_CHECKPOINTS;
    let mut seeds = OWN_CHECKPOINTS.clone();
    let of_others = [
        "\u{2014} example.org/witness jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n",
        "\u{2014} sealane/dc1.test/a AAAAAA==\n",
        "\u{2014} sealane/dc2.test/b /////wAAAABpL2h4\n",
    ];
    let own = log.checkpoint.clone();
    seeds.extend(of_others.iter().map(|line| [&own[..], line.as_bytes()].concat()));
    seeds.push([&own[..], of_others.concat().as_bytes()].concat());
    seeds.push([&own[..own.len() / 2], b"\nan extension line\n", &own[own.len() / 2..]].concat());
    seeds
}

/// Any bytes as a proof that an entry is in a log.
pub fn audit_proof(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(proof) = Proof::read(text) else { return };
    let log = &*OF_CHECKPOINTS;
    if proof.check_signer(&log.key).is_ok() {
        let good = Proof::read(std::str::from_utf8(&log.proof).unwrap()).unwrap();
        assert_eq!((proof.entry, proof.line), (good.entry, good.line), "a proof of something that is not in the log");
    }
    let _ = Proof::read(text).map(|proof| proof.check_witness(&log.key));
}

pub fn audit_proofs() -> Vec<Vec<u8>> {
    vec![OF_CHECKPOINTS.proof.clone()]
}

/// Any bytes as the manifest of a bundle, as somebody reads it who only looks.
pub fn bundle_manifest(bytes: &[u8]) {
    let source = BundleSource { manifest: bytes.to_vec(), signatures: vec![], files: vec![] };
    let _ = source.manifest_unverified();
    assert!(source.open(&TRUST).is_err(), "a bundle that nobody signed");
}

pub fn bundle_manifests() -> Vec<Vec<u8>> {
    let files = [("10-floor.cedar".to_owned(), b"permit".to_vec()), ("tests.json".to_owned(), b"{}".to_vec())];
    let manifest = Manifest::describe("fleet", 7, "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z", &files).unwrap();
    vec![serde_json::to_vec_pretty(&manifest).unwrap(), SIGNED.to_vec()]
}

/// Any bytes as a signature, by the stock tool's format.
pub fn bundle_signature(bytes: &[u8]) {
    let source = |manifest: &[u8]| {
        let signatures = vec![("manifest.json.a.minisig".to_owned(), bytes.to_vec())];
        BundleSource { manifest: manifest.to_vec(), signatures, files: vec![] }
    };
    // What is signed is no whole manifest, so it is refused for that, and for its signature if that was changed.
    assert!(source(SIGNED).open(&TRUST).is_err());
    assert!(source(b"{}").open(&TRUST).is_err());
}

pub fn bundle_signatures() -> Vec<Vec<u8>> {
    vec![SIGNATURE.to_vec()]
}

static TRUST: LazyLock<BundleTrust> =
    LazyLock::new(|| BundleTrust::new("fleet", &["RWSv+dmefet78nOT+nc5qlXkphPA0EfivbZ85j77JybobkB/3+pc2evE".to_owned()], 1).unwrap());

/// Signed by `minisign` 0.11 with a key that was thrown away.
const SIGNED: &[u8] = b"{\"format\":\"sealane-bundle/1\"}";
const SIGNATURE: &[u8] = b"untrusted comment: signature from minisign secret key
RUSv+dmefet78li0NYMgdM3sSQGxC3Yja7lgZE2BLc4r82aj/nTdvQ0btUxbIMZvPwWeiVrI9LAlIKP1ltF8hUZ4FvWoQCn4bAw=
trusted comment: of the fuzz target
ailxYwcj+3i8ZswfcsDLnVk0ACvugKZgB67DyHPLT4LchjGzSOW0/aHcSLI5yd6I1Dsn1kkmS5LT4T63iZeOAg==
";

/// Any bytes as all that a monitor ever says.
pub fn qmp(bytes: &[u8]) {
    static PLACE: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
    let path = PLACE.path().join("qmp.sock");
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let _ = sealane::hypervisor::qemu::inspect(&path, "fuzz", Duration::from_secs(5));
    });
}

pub fn qmp_conversations() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian 1:10.0.2"}, "capabilities": ["oob"]}}"#,
        r#"{"return": {}, "id": 1}"#,
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
        r#"{"return": {"status": "running", "running": true}, "id": 2}"#,
        r#"{"return": {"UUID": "00000000-0000-0000-0000-000000000001"}, "id": 3}"#,
        r#"{"return": {"base-memory": 134217728, "plugged-memory": 0}, "id": 4}"#,
        r#"{"return": [{"cpu-index": 0, "thread-id": 7, "props": {}}], "id": 5}"#,
        r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 6}"#,
    ];
    vec![lines.join("\r\n").into_bytes()]
}
