//! Policy bundles that are bad in one way each, shown to `sealane policy bundle verify` as they lie on disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "bundles/signing.rs"]
mod signing;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use signing::{Key, sha256};
use tempfile::TempDir;

const SCHEMA: &str = include_str!("../config/sealane.cedarschema");
const POLICY: &str = "@id(\"lab\") permit (principal is Sealane::Gateway, action == Sealane::Action::\"release\", resource)\n\
    when { context.stream.lanes <= 4 };\n";
const TESTS: &str = r#"{
  "context": {
    "now": "2026-12-01T23:00:00Z", "route": { "srcSite": "dc1", "dstSite": "dc2", "peerIp": "10.0.0.1" },
    "channel": { "tls": "1.3", "kx": "X25519MLKEM768", "suite": "TLS13_AES_256_GCM_SHA384", "crlFresh": true, "peerCertDaysLeft": 9 },
    "stream": { "mode": "precopy", "compression": "auto", "compressionScope": "stream", "lengthPadding": false,
                "durability": "none", "lanes": 2 },
    "memoryMiB": 64
  },
  "tests": [
    { "name": "a few lanes", "action": "release", "principal": "spiffe://example.net/gateway/gw-b",
      "resource": "00000000-0000-4000-8000-000000000001", "expect": "allow", "policy": "lab" }
  ]
}
"#;
const NOW: &str = "2026-11-15T00:00:00Z";

/// A bundle on disk that is good until a test makes it bad.
struct Bundle {
    place: TempDir,
    manifest: Value,
    alice: Key,
    bob: Key,
    mallory: Key,
}

impl Bundle {
    fn new() -> Self {
        let bundle = Self {
            place: tempfile::tempdir().unwrap(),
            manifest: json!({
                "format": "sealane.policy-bundle/1", "name": "fleet", "version": 7,
                "not_before": "2026-11-01T00:00:00Z", "expires": "2026-12-01T00:00:00Z",
                "schema_sha256": sha256(SCHEMA.as_bytes()), "files": []
            }),
            alice: Key::new(1),
            bob: Key::new(2),
            mallory: Key::new(3),
        };
        fs::create_dir(bundle.path("")).unwrap();
        bundle.write("lab.cedar", POLICY);
        bundle.write("tests.json", TESTS);
        bundle
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join("bundle").join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn list(&mut self, names: &[&str]) {
        let listed = |name: &&str| {
            let bytes = fs::read(self.path(name)).unwrap_or_default();
            json!({ "path": name, "bytes": bytes.len(), "sha256": sha256(&bytes) })
        };
        self.manifest["files"] = names.iter().map(listed).collect();
    }

    fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.manifest[key] = value.into();
    }

    fn text(&self) -> String {
        serde_json::to_string_pretty(&self.manifest).unwrap()
    }

    /// Writes these bytes as the manifest, and signs them.
    fn seal_as(&self, manifest: &[u8]) {
        self.write("manifest.json", manifest);
        self.write("manifest.json.alice.minisig", self.alice.sign(manifest, "alice"));
        self.write("manifest.json.bob.minisig", self.bob.sign(manifest, "bob"));
    }

    fn seal(&self) {
        self.seal_as(self.text().as_bytes());
    }

    fn manifest_bytes(&self) -> Vec<u8> {
        fs::read(self.path("manifest.json")).unwrap()
    }
}

/// Runs `sealane` and gives exit code and object.
fn sealane(args: &[&str]) -> (i32, Value, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sealane")).args(args).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), serde_json::from_str(&text).unwrap_or_default(), format!("{text}{said}"))
}

fn verify(bundle: &Bundle, at: &str) -> (i32, Value, String) {
    let (alice, bob, path) = (bundle.alice.public(), bundle.bob.public(), bundle.path(""));
    let path = path.to_str().unwrap();
    sealane(&["policy", "bundle", "verify", path, "--key", &alice, "--key", &bob, "--name", "fleet", "--at", at, "--json"])
}

type Spoil = fn(&mut Bundle);
/// What is done before it is sealed and after, the code, and words of the reason.
type Case = (&'static str, Spoil, Spoil, &'static str, &'static str);

fn nothing(_: &mut Bundle) {}

/// Replaces text of the manifest, whatever JSON it makes, and signs that.
fn reseal(bundle: &Bundle, from: &str, to: &str) {
    let text = bundle.text();
    assert!(text.contains(from), "{from} in {text}");
    bundle.seal_as(text.replacen(from, to, 1).as_bytes());
}

fn policy(bundle: &mut Bundle, text: &str) {
    bundle.write("lab.cedar", text);
    bundle.list(&["lab.cedar", "tests.json"]);
}

fn permit(bundle: &mut Bundle, condition: &str) {
    let text = format!("{POLICY}@id(\"more\") permit (principal, action == Sealane::Action::\"commit\", resource) when {{ {condition} }};");
    policy(bundle, &text);
}

fn annotated(bundle: &mut Bundle, annotation: &str, head: &str) {
    policy(bundle, &format!("{POLICY}@id(\"more\")\n{annotation}\n{head};"));
}

const RELEASE: &str = "permit (principal, action == Sealane::Action::\"release\", resource)";

#[rustfmt::skip]
const BAD: &[Case] = &[
    // Signatures.
    ("unsigned", nothing, |b| { for n in ["alice", "bob"] { fs::remove_file(b.path(&format!("manifest.json.{n}.minisig"))).unwrap(); } }, "bundle-unsigned", "no signature"),
    ("one of two", nothing, |b| fs::remove_file(b.path("manifest.json.bob.minisig")).unwrap(), "bundle-too-few-signatures", "1 of 2"),
    ("the same key twice", nothing, |b| { fs::remove_file(b.path("manifest.json.bob.minisig")).unwrap(); b.write("manifest.json.2.minisig", b.alice.sign(&b.manifest_bytes(), "again")); }, "bundle-too-few-signatures", "too"),
    ("a stranger for one", nothing, |b| b.write("manifest.json.bob.minisig", b.mallory.sign(&b.manifest_bytes(), "bob")), "bundle-too-few-signatures", "not pinned"),
    ("a stranger with a pinned id", nothing, |b| b.write("manifest.json.bob.minisig", b.mallory.with_id_of(&b.bob).sign(&b.manifest_bytes(), "bob")), "bundle-signature-wrong", "does not fit"),
    ("a signature of another manifest", nothing, |b| b.write("manifest.json.bob.minisig", b.bob.sign(b"{}", "bob")), "bundle-signature-wrong", "does not fit"),
    ("a manifest that was changed", nothing, |b| b.write("manifest.json", b.text().replace("fleet", "fleeT")), "bundle-signature-wrong", "does not fit"),
    ("a manifest with a byte more", nothing, |b| { let mut m = b.manifest_bytes(); m.push(b'\n'); b.write("manifest.json", m); }, "bundle-signature-wrong", "does not fit"),
    ("a trusted comment that was changed", nothing, |b| { let s = b.bob.sign(&b.manifest_bytes(), "bob"); b.write("manifest.json.bob.minisig", s.replace("comment: bob", "comment: bab")); }, "bundle-signature-wrong", "does not fit"),
    ("a legacy signature", nothing, |b| b.write("manifest.json.bob.minisig", b.bob.sign_legacy(&b.manifest_bytes())), "bundle-signature-legacy", "legacy"),
    ("an empty signature", nothing, |b| b.write("manifest.json.bob.minisig", ""), "bundle-signature-malformed", "4 lines"),
    ("a signature cut off", nothing, |b| { let s = b.bob.sign(&b.manifest_bytes(), "bob"); b.write("manifest.json.bob.minisig", &s[..s.len() - 30]); }, "bundle-signature-malformed", "base64"),
    ("a signature without its second half", nothing, |b| { let s = b.bob.sign(&b.manifest_bytes(), "bob"); b.write("manifest.json.bob.minisig", s.lines().take(2).collect::<Vec<_>>().join("\n")); }, "bundle-signature-malformed", "4 lines"),
    ("a signature with a line more", nothing, |b| { let s = b.bob.sign(&b.manifest_bytes(), "bob"); b.write("manifest.json.bob.minisig", s + "x\n"); }, "bundle-signature-malformed", "4 lines"),
    ("a signature of another algorithm", nothing, |b| { let s = b.bob.sign(&b.manifest_bytes(), "bob"); b.write("manifest.json.bob.minisig", s.replace("\nRUQ", "\nRUR").replace("\nRU", "\nQU")); }, "bundle-signature-malformed", "algorithm"),
    ("a signature that is not text", nothing, |b| b.write("manifest.json.bob.minisig", [0xff, 0xfe, 0]), "bundle-signature-malformed", "not text"),
    ("a signature without comments", nothing, |b| { let s = b.bob.sign(&b.manifest_bytes(), "bob"); b.write("manifest.json.bob.minisig", s.replace("trusted comment: bob", "comment: bob")); }, "bundle-signature-malformed", "comment"),
    ("an endless signature", nothing, |b| b.write("manifest.json.bob.minisig", "x".repeat(20_000)), "bundle-too-large", "more than"),
    ("too many signatures", nothing, |b| { for n in 0..40 { b.write(&format!("manifest.json.{n}.minisig"), b.alice.sign(&b.manifest_bytes(), "n")); } }, "bundle-too-large", "signatures"),
    ("a good bundle with a signature that is none beside", nothing, |b| b.write("manifest.json.eve.minisig", "hello"), "bundle-signature-malformed", "eve"),
    // The manifest.
    ("no manifest", nothing, |b| fs::remove_file(b.path("manifest.json")).unwrap(), "bundle-manifest-missing", "manifest.json"),
    ("an empty manifest", nothing, |b| b.seal_as(b""), "bundle-manifest-malformed", "EOF"),
    ("a manifest that is no JSON", nothing, |b| b.seal_as(b"version: 7"), "bundle-manifest-malformed", "expected"),
    ("a manifest with a tail", nothing, |b| b.seal_as(format!("{} {{}}", b.text()).as_bytes()), "bundle-manifest-malformed", "trailing"),
    ("a manifest with a byte order mark", nothing, |b| b.seal_as(format!("\u{feff}{}", b.text()).as_bytes()), "bundle-manifest-malformed", "expected value"),
    ("a manifest that is a list", nothing, |b| b.seal_as(b"[\"sealane.policy-bundle/1\",\"fleet\",7,\"2026-11-01T00:00:00Z\",\"2026-12-01T00:00:00Z\",\"00\",[]]"), "bundle-manifest-malformed", "object"),
    ("a manifest that is not UTF-8", nothing, |b| b.seal_as(b"{\"format\": \"\xff\"}"), "bundle-manifest-malformed", "manifest.json"),
    ("a manifest that is nested without end", nothing, |b| b.seal_as("[".repeat(10_000).as_bytes()), "bundle-manifest-malformed", "recursion"),
    ("an endless manifest", nothing, |b| b.seal_as(" ".repeat(600 << 10).as_bytes()), "bundle-too-large", "manifest.json"),
    ("a key that nobody knows", |b| b.set("extra", 1), nothing, "bundle-manifest-malformed", "extra"),
    ("a key that is missing", |b| { b.manifest.as_object_mut().unwrap().remove("expires"); }, nothing, "bundle-manifest-malformed", "expires"),
    ("a key that stands twice", nothing, |b| reseal(b, "\"version\": 7", "\"version\": 7,\n  \"version\": 8"), "bundle-manifest-malformed", "duplicate"),
    ("another format", |b| b.set("format", "sealane.policy-bundle/2"), nothing, "bundle-format-unknown", "policy-bundle/2"),
    ("another name", |b| b.set("name", "fleet-2"), nothing, "bundle-name-wrong", "expected `fleet`"),
    ("a name that is a path", |b| b.set("name", "../fleet"), nothing, "bundle-name-wrong", "letters"),
    ("an empty name", |b| b.set("name", ""), nothing, "bundle-name-wrong", "letters"),
    ("version 0", |b| b.set("version", 0), nothing, "bundle-version-wrong", "version 0"),
    ("a version below 0", |b| b.set("version", -1), nothing, "bundle-manifest-malformed", "-1"),
    ("a version with a fraction", |b| b.set("version", 7.5), nothing, "bundle-manifest-malformed", "7.5"),
    ("a version as text", |b| b.set("version", "7"), nothing, "bundle-manifest-malformed", "string"),
    ("a version too large for JSON", |b| b.set("version", 1_u64 << 53), nothing, "bundle-version-wrong", "9007199254740992"),
    ("a version too large for anything", nothing, |b| reseal(b, "\"version\": 7", "\"version\": 99999999999999999999"), "bundle-manifest-malformed", "floating point"),
    // Time.
    ("no longer valid", |b| b.set("expires", "2026-11-14T23:59:59Z"), nothing, "bundle-expired", "2026-11-14T23:59:59Z"),
    ("expired this very moment", |b| b.set("expires", NOW), nothing, "bundle-expired", NOW),
    ("not yet valid", |b| b.set("not_before", "2026-11-15T00:00:01Z"), nothing, "bundle-not-yet-valid", "2026-11-15T00:00:01Z"),
    ("valid never", |b| b.set("expires", "2026-11-01T00:00:00Z"), nothing, "bundle-validity-wrong", "never"),
    ("valid backwards", |b| b.set("expires", "2025-01-01T00:00:00Z"), nothing, "bundle-validity-wrong", "never"),
    ("a time without a zone", |b| b.set("expires", "2026-12-01T00:00:00"), nothing, "bundle-validity-wrong", "expires"),
    ("a time in another zone", |b| b.set("expires", "2026-12-01T00:00:00+01:00"), nothing, "bundle-validity-wrong", "expires"),
    ("a time with a fraction", |b| b.set("expires", "2026-12-01T00:00:00.5Z"), nothing, "bundle-validity-wrong", "expires"),
    ("a time that is no time", |b| b.set("not_before", "2026-02-30T00:00:00Z"), nothing, "bundle-validity-wrong", "not_before"),
    ("a time as a number", |b| b.set("expires", 1_796_083_200), nothing, "bundle-manifest-malformed", "string"),
    // Schema and files.
    ("another schema", |b| b.set("schema_sha256", sha256(b"another")), nothing, "bundle-schema-differs", "schema"),
    ("no schema", |b| b.set("schema_sha256", ""), nothing, "bundle-schema-differs", "schema"),
    ("a file that is not listed", nothing, |b| b.write("more.cedar", POLICY), "bundle-file-extra", "more.cedar"),
    ("a note that is not listed", nothing, |b| b.write("README", "hi"), "bundle-file-extra", "README"),
    ("a hidden file", nothing, |b| b.write(".hidden.cedar", POLICY), "bundle-file-extra", ".hidden"),
    ("a file that is missing", nothing, |b| fs::remove_file(b.path("lab.cedar")).unwrap(), "bundle-file-missing", "lab.cedar"),
    ("a byte that was changed", nothing, |b| b.write("lab.cedar", POLICY.replace("<= 4", "<= 9")), "bundle-file-differs", "SHA-256"),
    ("a file cut off", nothing, |b| b.write("lab.cedar", &POLICY[..20]), "bundle-file-differs", "20 bytes"),
    ("a file with a byte more", nothing, |b| b.write("lab.cedar", format!("{POLICY} ")), "bundle-file-differs", "bytes"),
    ("a length that is wrong", |b| b.manifest["files"][0]["bytes"] = json!(1), nothing, "bundle-file-differs", "expected 1"),
    ("a digest in capitals", |b| { let s = b.manifest["files"][0]["sha256"].as_str().unwrap().to_uppercase(); b.manifest["files"][0]["sha256"] = json!(s); }, nothing, "bundle-manifest-malformed", "hex"),
    ("a digest cut off", |b| b.manifest["files"][0]["sha256"] = json!("00"), nothing, "bundle-manifest-malformed", "64 digits"),
    ("a file listed twice", |b| { let first = b.manifest["files"][0].clone(); b.manifest["files"].as_array_mut().unwrap().insert(0, first); }, nothing, "bundle-manifest-malformed", "once"),
    ("files out of order", |b| b.list(&["tests.json", "lab.cedar"]), nothing, "bundle-manifest-malformed", "order"),
    ("a file as a list", |b| { let digest = sha256(POLICY.as_bytes()); b.manifest["files"][0] = json!(["lab.cedar", POLICY.len(), digest]); }, nothing, "bundle-manifest-malformed", "object"),
    ("a path upwards", |b| { b.manifest["files"][0]["path"] = json!("../lab.cedar"); }, nothing, "bundle-file-name", "../lab.cedar"),
    ("a path from the root", |b| { b.manifest["files"][0]["path"] = json!("/etc/x.cedar"); }, nothing, "bundle-file-name", "/etc/x.cedar"),
    ("a path into a directory", |b| { b.manifest["files"][0]["path"] = json!("a/lab.cedar"); }, nothing, "bundle-file-name", "a/lab.cedar"),
    ("a hidden path", |b| { b.manifest["files"][0]["path"] = json!(".cedar"); }, nothing, "bundle-file-name", ".cedar"),
    ("a path with a zero", |b| { b.manifest["files"][0]["path"] = json!("lab\u{0}.cedar"); }, nothing, "bundle-file-name", "letters"),
    ("another kind of file", |b| { b.write("x.sh", ""); b.list(&["lab.cedar", "tests.json", "x.sh"]); }, nothing, "bundle-file-name", "x.sh"),
    ("a link instead of a file", nothing, |b| { let away = b.place.path().join("away"); fs::rename(b.path("lab.cedar"), &away).unwrap(); symlink(away, b.path("lab.cedar")).unwrap(); }, "bundle-not-a-file", "lab.cedar"),
    ("a link instead of the manifest", nothing, |b| { let away = b.place.path().join("away"); fs::rename(b.path("manifest.json"), &away).unwrap(); symlink(away, b.path("manifest.json")).unwrap(); }, "bundle-not-a-file", "manifest.json"),
    ("a directory", nothing, |b| fs::create_dir(b.path("more.cedar")).unwrap(), "bundle-not-a-file", "more.cedar"),
    ("a pipe that nobody writes", nothing, |b| { fs::remove_file(b.path("lab.cedar")).unwrap(); assert!(Command::new("mkfifo").arg(b.path("lab.cedar")).status().unwrap().success()); }, "bundle-not-a-file", "lab.cedar"),
    ("an endless file", nothing, |b| b.write("lab.cedar", "/".repeat(9 << 20)), "bundle-too-large", "lab.cedar"),
    // Policies and tests.
    ("no tests", |b| { fs::remove_file(b.path("tests.json")).unwrap(); b.list(&["lab.cedar"]); }, nothing, "bundle-no-tests", "tests.json"),
    ("tests that are empty", |b| { b.write("tests.json", "{\"tests\": []}"); b.list(&["lab.cedar", "tests.json"]); }, nothing, "bundle-test-fails", "no test"),
    ("tests that are no JSON", |b| { b.write("tests.json", "tests"); b.list(&["lab.cedar", "tests.json"]); }, nothing, "bundle-test-fails", "expected"),
    ("a test that fails", |b| { b.write("tests.json", TESTS.replace("\"lanes\": 2", "\"lanes\": 5")); b.list(&["lab.cedar", "tests.json"]); }, nothing, "bundle-test-fails", "a few lanes"),
    ("a test that another policy passes", |b| { b.write("tests.json", TESTS.replace("\"policy\": \"lab\"", "\"policy\": \"other\"")); b.list(&["lab.cedar", "tests.json"]); }, nothing, "bundle-test-fails", "other"),
    ("no policy", |b| { fs::remove_file(b.path("lab.cedar")).unwrap(); b.list(&["tests.json"]); }, nothing, "bundle-policy-refused", "no policy"),
    ("a policy that is no text", |b| { b.write("lab.cedar", [0xff, 0xfe]); b.list(&["lab.cedar", "tests.json"]); }, nothing, "bundle-policy-refused", "UTF-8"),
    ("a policy that does not parse", |b| policy(b, "permit (principal"), nothing, "bundle-policy-refused", "lab.cedar:1"),
    ("a policy without a name", |b| policy(b, RELEASE), nothing, "bundle-policy-refused", "lab.cedar"),
    ("two policies with one name", |b| policy(b, &format!("{POLICY}{POLICY}")), nothing, "bundle-policy-refused", "is taken"),
    ("an attribute that is misspelt", |b| permit(b, "context.stream.mod == \"precopy\""), nothing, "bundle-policy-refused", "mod"),
    ("a word that is misspelt", |b| permit(b, "context.stream.mode == \"precpy\""), nothing, "bundle-policy-refused", "precpy"),
    ("arithmetic that can overflow", |b| permit(b, "context.memoryMiB * 2 < 100"), nothing, "bundle-policy-refused", "uses `*`"),
    ("an entity that may not be there", |b| permit(b, "Sealane::Operator::\"ghost\".mfa"), nothing, "bundle-policy-refused", "ghost"),
    ("a condition that is never so", |b| permit(b, "resource.tenant == \"a\" && resource.tenant == \"b\""), nothing, "bundle-policy-refused", "never matches"),
    ("a policy that another makes needless", |b| annotated(b, "", &format!("{} when {{ resource.tenant == \"a\" && context.stream.lanes <= 4 }}", RELEASE.replace("(principal,", "(principal is Sealane::Gateway,"))), nothing, "bundle-policy-refused", "is shadowed"),
    ("a permit that is always forbidden", |b| annotated(b, "", "forbid (principal, action, resource)"), nothing, "bundle-policy-refused", "never permits"),
    ("a template", |b| policy(b, &format!("{POLICY}@id(\"t\") permit (principal == ?principal, action, resource);")), nothing, "bundle-policy-refused", "template"),
    ("an obligation that nobody knows", |b| annotated(b, "@max_lane(\"2\")", RELEASE), nothing, "bundle-policy-refused", "max_lane"),
    ("an obligation that is not built", |b| annotated(b, "@require_mode(\"postcopy\")", RELEASE), nothing, "bundle-policy-refused", "no other mode can be asked for"),
    ("an obligation without a unit", |b| annotated(b, "@max_bandwidth(\"100\")", RELEASE), nothing, "bundle-policy-refused", "Mbit/s"),
    ("an obligation of a forbid", |b| annotated(b, "@max_lanes(\"2\")", "forbid (principal, action == Sealane::Action::\"accept\", resource)"), nothing, "bundle-policy-refused", "a forbid cannot"),
    ("an obligation where there is no stream", |b| annotated(b, "@max_lanes(\"2\")", "permit (principal, action == Sealane::Action::\"resolveInDoubt\", resource)"), nothing, "bundle-policy-refused", "no stream"),
];

#[test]
fn every_bad_bundle_is_refused_for_its_own_reason() {
    let mut wrong = Vec::new();
    for (name, before, after, code, words) in BAD {
        let mut bundle = Bundle::new();
        bundle.list(&["lab.cedar", "tests.json"]);
        before(&mut bundle);
        bundle.seal();
        after(&mut bundle);
        let (exit, object, said) = verify(&bundle, NOW);
        let reason = object["error"].as_str().unwrap_or_default();
        if exit != 2 || object["code"] != *code || !reason.contains(words) || object["valid"] != json!(false) {
            wrong.push(format!("{name}: exit {exit}, expected {code} with {words:?}, got {said}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), BAD.len(), wrong.join("\n"));
    assert!(BAD.len() >= 50, "{}", BAD.len());
    println!("bad bundles: {} of {} refused for the expected reason", BAD.len(), BAD.len());
}

#[test]
fn a_good_bundle_is_good_and_says_who_signed_it() {
    let mut bundle = Bundle::new();
    bundle.list(&["lab.cedar", "tests.json"]);
    bundle.seal();
    // A signature that others count is no harm here.
    bundle.write("manifest.json.mallory.minisig", bundle.mallory.sign(&bundle.manifest_bytes(), "mallory"));
    let (exit, object, said) = verify(&bundle, NOW);
    assert_eq!(exit, 0, "{said}");
    assert_eq!((&object["valid"], &object["manifest"]["version"], &object["policies"][0]), (&json!(true), &json!(7), &json!("lab")));
    assert_eq!((&object["signers"][0]["trusted_comment"], object["signers"].as_array().unwrap().len()), (&json!("alice"), 2));
    // And at any time that it is valid.
    for at in ["2026-11-01T00:00:00Z", "2026-11-30T23:59:59Z"] {
        assert_eq!(verify(&bundle, at).0, 0, "{at}");
    }
    // Through a link to the directory, as whoever swaps bundles at once has it.
    let link = bundle.place.path().join("current");
    symlink(bundle.path(""), &link).unwrap();
    let key = bundle.alice.public();
    let path = link.to_str().unwrap();
    let (exit, ..) = sealane(&["policy", "bundle", "verify", path, "--key", &key, "--name", "fleet", "--at", NOW]);
    assert_eq!(exit, 0);
}

#[test]
fn every_byte_of_a_bundle_counts() {
    let mut bundle = Bundle::new();
    bundle.list(&["lab.cedar", "tests.json"]);
    bundle.seal();
    let mut tried = 0;
    for name in ["manifest.json", "lab.cedar", "tests.json"] {
        let good = fs::read(bundle.path(name)).unwrap();
        for place in (0..good.len()).step_by(47) {
            let mut bad = good.clone();
            bad[place] ^= 0x20;
            bundle.write(name, bad);
            assert_eq!(verify(&bundle, NOW).0, 2, "byte {place} of {name}");
            bundle.write(name, &good[..place]);
            assert_eq!(verify(&bundle, NOW).0, 2, "{name} cut at {place}");
            tried += 2;
        }
        bundle.write(name, good);
    }
    assert_eq!(verify(&bundle, NOW).0, 0);
    println!("bundle bytes: {tried} flips and cuts, all refused");
}

#[test]
fn what_make_writes_can_be_signed_and_is_good() {
    let bundle = Bundle::new();
    let path = bundle.path("").to_str().unwrap().to_owned();
    let make =
        |path: &str| sealane(&["policy", "bundle", "make", path, "--name", "fleet", "--version", "3", "--expires", "2036-01-01T00:00:00Z"]);
    let (exit, _, said) = make(&path);
    assert_eq!((exit, said.contains("minisign -S -m")), (0, true), "{said}");
    let manifest = bundle.manifest_bytes();
    bundle.write("manifest.json.alice.minisig", bundle.alice.sign(&manifest, "alice"));
    bundle.write("manifest.json.bob.minisig", bundle.bob.sign(&manifest, "bob"));
    let (exit, object, said) = verify(&bundle, "2035-01-01T00:00:00Z");
    assert_eq!((exit, &object["manifest"]["version"]), (0, &json!(3)), "{said}");
    let (exit, shown, _) = sealane(&["policy", "bundle", "show", &path, "--json"]);
    assert_eq!((exit, &shown["manifest"], shown.get("valid")), (0, &object["manifest"], None));
    // Signatures of another manifest would only look like some.
    let (exit, _, said) = make(&path);
    assert_eq!((exit, said.contains("already")), (2, true), "{said}");
    // What a gateway would refuse is not even described.
    let spoilt = Bundle::new();
    spoilt.write("lab.cedar", "permit (principal, action, resource);");
    let (exit, _, said) = make(spoilt.path("").to_str().unwrap());
    assert_eq!((exit, said.contains("no name")), (2, true), "{said}");
    assert!(fs::read_to_string(Path::new(&spoilt.path("")).join("manifest.json")).unwrap_or_default().is_empty());
}
