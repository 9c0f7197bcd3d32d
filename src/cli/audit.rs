//! `sealane audit`: what is in a log, and whether it is what was written. Works from files alone.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::io::Read;
use std::path::Path;

use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use serde_json::Value;

use super::Ending;
use super::output::{Out, Tone, printable};
use super::tools::{AuditCommand, AuditFilterFlags};
use crate::audit::{self, AuditError, Filter, Outcome, StoredEntry, Verdict, VerifyOptions, VerifyReport};
use crate::control::Exit;
use crate::telemetry::{ErrorClass, Problem, chain, schema_tag};

schema_tag!(
    /// Schema of `audit verify --json`.
    VerifySchema = "sealane.audit-verify/1"
);

pub(super) fn audit(command: &AuditCommand, out: Out) -> Ending {
    match command {
        AuditCommand::Show { directory, last, filter, json: _ } => show(directory, *last, filter, out),
        AuditCommand::Verify { directory, checkpoint, key, peer_key, json: _ } => {
            let given = Given {
                options: VerifyOptions {
                    public_key: key.as_deref().map(public_key).transpose()?,
                    checkpoint: checkpoint.as_deref().map(text).transpose()?,
                },
                peer_key: peer_key.as_deref().map(public_key).transpose()?,
            };
            Ok(verify(directory, &given, out))
        }
    }
}

fn show(directory: &Path, last: Option<usize>, flags: &AuditFilterFlags, out: Out) -> Ending {
    let filter =
        Filter { vm: flags.vm.clone(), peer: flags.peer.clone(), migration: flags.migration, event: flags.event, since: flags.since };
    let entries = audit::read(directory, filter).map_err(|error| problem(&error))?;
    let mut kept = VecDeque::new();
    let mut damage = None;
    for entry in entries {
        match (entry, last) {
            (Ok(entry), None) => print(&entry, out),
            (Ok(entry), Some(last)) => {
                kept.push_back(entry);
                if kept.len() > last {
                    kept.pop_front();
                }
            }
            (Err(error), _) => damage = Some(error),
        }
    }
    kept.iter().for_each(|entry| print(entry, out));
    match damage {
        Some(error) => Err(problem(&error).with_hint("`sealane audit verify` says what is wrong with the log as a whole")),
        None => Ok(Exit::Done),
    }
}

fn problem(error: &AuditError) -> Problem {
    let missing = matches!(error, AuditError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
    Problem::new(if missing { ErrorClass::Misuse } else { ErrorClass::Local }, chain(error)).with_code("audit")
}

fn print(entry: &StoredEntry, out: Out) {
    out.data(&if out.json { line_of(entry) } else { words_of(entry, out) });
}

/// The line as it is in the file: sorted by name, without spaces.
fn line_of(entry: &StoredEntry) -> String {
    let Ok(Value::Object(fields)) = serde_json::to_value(entry) else { return String::new() };
    let sorted: BTreeMap<String, Value> = fields.into_iter().collect();
    serde_json::to_string(&sorted).unwrap_or_default()
}

fn words_of(entry: &StoredEntry, out: Out) -> String {
    let mut text = format!("{:>6}  {:.3}  {:<18}", entry.index, entry.time, entry.event.as_str());
    if let Some(outcome) = entry.outcome {
        let tone = match outcome {
            Outcome::Done | Outcome::Allow => Tone::Good,
            Outcome::Cancelled => Tone::Doubtful,
            Outcome::Deny | Outcome::Refused | Outcome::Failed | Outcome::InDoubt => Tone::Bad,
        };
        let word = serde_json::to_value(outcome).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default();
        let _ = write!(text, "  {}", out.paint(tone, &word));
    }
    let mut add = |name: &str, value: String| {
        let _ = write!(text, "  {name}={value}");
    };
    if let Some(vm) = &entry.vm {
        add("vm", vm.to_string());
    }
    if let Some(migration) = entry.migration {
        add("migration", super::render::short(migration));
    }
    if let Some(peer) = &entry.peer {
        add("peer", one_line(peer));
    }
    for (name, value) in &entry.detail {
        match value {
            Value::String(value) => add(name, one_line(value)),
            other => add(name, one_line(&other.to_string())),
        }
    }
    text
}

/// Signed heads and reasons may have several lines; an entry has one.
fn one_line(text: &str) -> String {
    printable(text.trim_end()).split('\n').filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" / ")
}

/// What is known from elsewhere.
struct Given {
    options: VerifyOptions,
    peer_key: Option<[u8; 32]>,
}

fn verify(directory: &Path, given: &Given, out: Out) -> Exit {
    let report = audit::verify(directory, &given.options);
    let peer = given.peer_key.map(|key| audit::verify_peer_heads(directory, &key));
    // What was given has to prove something: not proven is good enough only where nothing was given.
    let proven = |given: bool, verdict: &Verdict| matches!(verdict, Verdict::Good(_)) || (!given && !verdict.is_bad());
    let passed = proven(false, &report.content)
        && proven(given.options.public_key.is_some(), &report.signer)
        && proven(given.options.checkpoint.is_some(), &report.completeness)
        && peer.as_ref().is_none_or(|peer| proven(true, peer));
    if out.json {
        out.object(&VerifyObject::new(directory, &report, peer.as_ref(), passed));
    } else {
        out.data(&verdicts(directory, &report, peer.as_ref(), out));
        let end = if passed { out.paint_talk(Tone::Good, "verified") } else { out.paint_talk(Tone::Bad, "NOT verified") };
        out.talk(&format!("audit log `{}` {end}", directory.display()));
    }
    if passed { Exit::Done } else { Exit::Failed }
}

fn verdicts(directory: &Path, report: &VerifyReport, peer: Option<&Verdict>, out: Out) -> String {
    let mut text = match &report.origin {
        Some(origin) => {
            format!("log `{}` in `{}`: {} entries, root {}\n", printable(origin), directory.display(), report.entries, report.root)
        }
        None => format!("log in `{}`: {} entries, root {}\n", directory.display(), report.entries, report.root),
    };
    let all = [
        ("content", Some(&report.content)),
        ("signer", Some(&report.signer)),
        ("completeness", Some(&report.completeness)),
        ("peer", peer),
    ];
    for (name, verdict) in all.into_iter().filter_map(|(name, verdict)| Some((name, verdict?))) {
        let tone = match verdict {
            Verdict::Good(_) => Tone::Good,
            Verdict::Open(_) => Tone::Doubtful,
            Verdict::Bad { .. } => Tone::Bad,
        };
        let _ = writeln!(text, "  {name:<13} {}", out.paint(tone, &printable(&verdict.to_string())));
    }
    text
}

#[derive(Serialize)]
struct VerdictObject<'a> {
    verdict: &'static str,
    /// The first entry that is wrong or missing.
    entry: Option<u64>,
    why: &'a str,
}

impl<'a> VerdictObject<'a> {
    fn new(verdict: &'a Verdict) -> Self {
        match verdict {
            Verdict::Good(why) => Self { verdict: "good", entry: None, why },
            Verdict::Open(why) => Self { verdict: "not-proven", entry: None, why },
            Verdict::Bad { entry, why } => Self { verdict: "bad", entry: *entry, why },
        }
    }
}

#[derive(Serialize)]
struct VerifyObject<'a> {
    schema: VerifySchema,
    directory: String,
    origin: Option<&'a str>,
    entries: u64,
    root: &'a str,
    verified: bool,
    content: VerdictObject<'a>,
    signer: VerdictObject<'a>,
    completeness: VerdictObject<'a>,
    /// Absent when no peer's key was given.
    peer: Option<VerdictObject<'a>>,
}

impl<'a> VerifyObject<'a> {
    fn new(directory: &Path, report: &'a VerifyReport, peer: Option<&'a Verdict>, verified: bool) -> Self {
        Self {
            schema: VerifySchema,
            directory: directory.display().to_string(),
            origin: report.origin.as_deref(),
            entries: report.entries,
            root: &report.root,
            verified,
            content: VerdictObject::new(&report.content),
            signer: VerdictObject::new(&report.signer),
            completeness: VerdictObject::new(&report.completeness),
            peer: peer.map(VerdictObject::new),
        }
    }
}

fn misuse(path: &Path, why: &str) -> Problem {
    Problem::new(ErrorClass::Misuse, format!("cannot read `{}`: {why}", path.display())).with_code("audit")
}

/// A small file of text.
fn text(path: &Path) -> Result<String, Problem> {
    let most = crate::limits::PEM_FILE_BYTES_MAX;
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(most + 1).read_to_string(&mut text));
    read.map_err(|error| misuse(path, &error.to_string()))?;
    if text.len() as u64 > most { Err(misuse(path, &format!("it has more than {most} bytes"))) } else { Ok(text) }
}

/// RFC 8410: what stands before the 32 bytes of an Ed25519 public key.
const ED25519_SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

fn public_key(path: &Path) -> Result<[u8; 32], Problem> {
    let der = SubjectPublicKeyInfoDer::from_pem_slice(text(path)?.as_bytes()).ok();
    let key = der.as_ref().and_then(|der| der.as_ref().strip_prefix(&ED25519_SPKI)?.try_into().ok());
    key.ok_or_else(|| {
        let hint = "`sealane pki issue` writes it as NAME-signing-pub.pem";
        misuse(path, "expected one Ed25519 public key in PEM").with_hint(hint)
    })
}
