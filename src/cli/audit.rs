//! `sealane audit`: what is in a log, and whether it is what was written. Works from files alone.

mod collector;
mod rotation;

use std::collections::VecDeque;
use std::fmt::Write;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use serde_json::Value;

use collector::Collector;

use super::Ending;
use super::output::{Out, Tone, printable};
use super::tools::{AuditCommand, AuditFilterFlags, AuditFormat};
use crate::audit::{self, AuditError, ExportFormat, Filter, Outcome, Proof, StoredEntry, Verdict, VerifyOptions, VerifyReport};
use crate::control::Exit;
use crate::telemetry::{ErrorClass, Problem, chain, schema_tag};

schema_tag!(
    /// Schema of `audit verify --json`.
    VerifySchema = "sealane.audit-verify/1"
);
schema_tag!(
    /// Schema of `audit verify-proof --json`.
    ProofSchema = "sealane.audit-proof/1"
);

pub(super) fn audit(command: &AuditCommand, out: Out) -> Ending {
    match command {
        AuditCommand::Show { directory, last, filter, json: _ } => show(directory, *last, filter, out),
        AuditCommand::Verify { directory, checkpoint, key, peer_key, json: _ } => {
            let options = VerifyOptions {
                public_key: key.as_deref().map(public_key).transpose()?,
                checkpoint: checkpoint.as_deref().map(text).transpose()?,
                witness_keys: public_keys(peer_key)?,
            };
            Ok(verify(directory, &options, out))
        }
        AuditCommand::Prove { directory, index } => {
            out.data(&audit::prove(directory, *index).map_err(|error| problem(&error))?);
            Ok(Exit::Done)
        }
        AuditCommand::VerifyProof { proof, key, peer_key, json: _ } => {
            let (given, witnesses) = (public_key(key)?, public_keys(peer_key)?);
            Ok(verify_proof(proof, &text(proof)?, &given, &witnesses, out))
        }
        AuditCommand::RotateKey { directory, old_key, new_key } => rotation::rotate_key(directory, old_key, new_key, out),
        AuditCommand::Export { directory, format, to, filter } => export(directory, *format, to.as_deref(), filter, out),
    }
}

fn filter_of(flags: &AuditFilterFlags) -> Filter {
    Filter {
        vm: flags.vm.clone(),
        peer: flags.peer.clone(),
        migration: flags.migration,
        event: flags.event,
        since: flags.since,
        until: flags.until,
        outcome: flags.outcome,
    }
}

fn export(directory: &Path, format: AuditFormat, to: Option<&str>, flags: &AuditFilterFlags, out: Out) -> Ending {
    let collector = to.map(Collector::open).transpose()?;
    let format = match format {
        AuditFormat::Ocsf => ExportFormat::Ocsf,
        AuditFormat::Syslog => ExportFormat::Syslog,
        AuditFormat::Journal => ExportFormat::Journal,
    };
    let origin = audit::origin(directory).map_err(|error| problem(&error))?;
    for entry in audit::read(directory, filter_of(flags)).map_err(|error| problem(&error))? {
        let text = audit::export(&entry.map_err(|error| problem(&error).with_hint(DAMAGED))?, &origin, format);
        match &collector {
            Some(collector) => collector.send(&text)?,
            None => out.data(&text),
        }
    }
    Ok(Exit::Done)
}

const DAMAGED: &str = "`sealane audit verify` says what is wrong with the log as a whole";

/// A verdict, and whether it is the yes that was asked for.
fn verify_proof(path: &Path, text: &str, key: &[u8; 32], witnesses: &[[u8; 32]], out: Out) -> Exit {
    let bad = |why: String| Verdict::Bad { entry: None, why };
    let read = Proof::read(text);
    let content = match &read {
        Ok(proof) => Verdict::Good(format!("entry {} of log `{}`", proof.entry.index, proof.checkpoint.origin)),
        Err(why) => bad(why.clone()),
    };
    let signer = match &read {
        Ok(proof) => proof.check_signer(key).map_or_else(bad, |()| Verdict::Good("signed by the given key".to_owned())),
        Err(_) => Verdict::Open("there is no proof to check it on".to_owned()),
    };
    let seen = match &read {
        Ok(proof) => witnesses.iter().try_for_each(|key| proof.check_witness(key).map(drop)),
        Err(_) => Ok(()),
    };
    let witness = match seen {
        Err(why) => bad(why),
        Ok(()) if witnesses.is_empty() || read.is_err() => Verdict::Open("no key of a witness is given".to_owned()),
        Ok(()) => Verdict::Good("cosigned by every given key".to_owned()),
    };
    let passed = matches!((&content, &signer), (Verdict::Good(_), Verdict::Good(_))) && !witness.is_bad();
    if out.json {
        out.object(&ProofObject {
            schema: ProofSchema,
            proof: path.display().to_string(),
            verified: passed,
            entry: read.as_ref().ok().map(|proof| &proof.entry),
            content: VerdictObject::new(&content),
            signer: VerdictObject::new(&signer),
            witnesses: VerdictObject::new(&witness),
        });
    } else {
        out.data(&verdict_lines(&[("content", &content), ("signer", &signer), ("witnesses", &witness)], out));
        if let Ok(proof) = &read {
            print(&proof.entry, out);
        }
        let end = if passed { out.paint_talk(Tone::Good, "verified") } else { out.paint_talk(Tone::Bad, "NOT verified") };
        out.talk(&format!("audit proof `{}` {end}", path.display()));
    }
    if passed { Exit::Done } else { Exit::Failed }
}

fn show(directory: &Path, last: Option<usize>, flags: &AuditFilterFlags, out: Out) -> Ending {
    let entries = audit::read(directory, filter_of(flags)).map_err(|error| problem(&error))?;
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
        Some(error) => Err(problem(&error).with_hint(DAMAGED)),
        None => Ok(Exit::Done),
    }
}

fn problem(error: &AuditError) -> Problem {
    let missing = matches!(error, AuditError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
    Problem::new(if missing { ErrorClass::Misuse } else { ErrorClass::Local }, chain(error)).with_code("audit")
}

fn print(entry: &StoredEntry, out: Out) {
    out.data(&if out.json { audit::canonical_line(entry) } else { words_of(entry, out) });
}

fn words_of(entry: &StoredEntry, out: Out) -> String {
    let mut text = format!("{:>6}  {:.3}  {:<18}", entry.index, entry.time, entry.event.as_str());
    if let Some(outcome) = entry.outcome {
        let tone = match outcome {
            Outcome::Done | Outcome::Allow => Tone::Good,
            Outcome::Cancelled => Tone::Doubtful,
            Outcome::Deny | Outcome::Refused | Outcome::Failed | Outcome::InDoubt => Tone::Bad,
        };
        let _ = write!(text, "  {}", out.paint(tone, outcome.as_str()));
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

fn verify(directory: &Path, options: &VerifyOptions, out: Out) -> Exit {
    let report = audit::verify(directory, options);
    // What was given has to prove something: not proven is good enough only where nothing was given.
    let proven = |given: bool, verdict: &Verdict| matches!(verdict, Verdict::Good(_)) || (!given && !verdict.is_bad());
    let passed = proven(true, &report.content)
        && proven(options.public_key.is_some(), &report.signer)
        && proven(options.checkpoint.is_some(), &report.completeness)
        && proven(!options.witness_keys.is_empty(), &report.witnesses);
    if out.json {
        out.object(&VerifyObject::new(directory, &report, passed));
    } else {
        out.data(&verdicts(directory, &report, out));
        let end = if passed { out.paint_talk(Tone::Good, "verified") } else { out.paint_talk(Tone::Bad, "NOT verified") };
        out.talk(&format!("audit log `{}` {end}", directory.display()));
    }
    if passed { Exit::Done } else { Exit::Failed }
}

fn verdicts(directory: &Path, report: &VerifyReport, out: Out) -> String {
    let VerifyReport { entries, root, content, signer, completeness, witnesses, .. } = report;
    let name = report.origin.as_ref().map_or_else(|| "log".to_owned(), |origin| format!("log `{}`", printable(origin)));
    let head = format!("{name} in `{}`: {entries} entries, root {root}\n", directory.display());
    let all = [("content", content), ("signer", signer), ("completeness", completeness), ("witnesses", witnesses)];
    head + &verdict_lines(&all, out)
}

fn verdict_lines(all: &[(&str, &Verdict)], out: Out) -> String {
    let mut text = String::new();
    for (name, verdict) in all {
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
    /// The first entry that is kept; those before it were given up.
    first: u64,
    entries: u64,
    root: &'a str,
    verified: bool,
    content: VerdictObject<'a>,
    signer: VerdictObject<'a>,
    completeness: VerdictObject<'a>,
    witnesses: VerdictObject<'a>,
}

#[derive(Serialize)]
struct ProofObject<'a> {
    schema: ProofSchema,
    proof: String,
    verified: bool,
    entry: Option<&'a StoredEntry>,
    content: VerdictObject<'a>,
    signer: VerdictObject<'a>,
    witnesses: VerdictObject<'a>,
}

impl<'a> VerifyObject<'a> {
    fn new(directory: &Path, report: &'a VerifyReport, verified: bool) -> Self {
        Self {
            schema: VerifySchema,
            directory: directory.display().to_string(),
            origin: report.origin.as_deref(),
            first: report.first,
            entries: report.entries,
            root: &report.root,
            verified,
            content: VerdictObject::new(&report.content),
            signer: VerdictObject::new(&report.signer),
            completeness: VerdictObject::new(&report.completeness),
            witnesses: VerdictObject::new(&report.witnesses),
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

fn public_keys(paths: &[PathBuf]) -> Result<Vec<[u8; 32]>, Problem> {
    paths.iter().map(|path| public_key(path)).collect()
}

fn public_key(path: &Path) -> Result<[u8; 32], Problem> {
    let der = SubjectPublicKeyInfoDer::from_pem_slice(text(path)?.as_bytes()).ok();
    let key = der.as_ref().and_then(|der| der.as_ref().strip_prefix(&ED25519_SPKI)?.try_into().ok());
    key.ok_or_else(|| {
        let hint = "`sealane pki issue` writes it as NAME-signing-pub.pem";
        misuse(path, "expected one Ed25519 public key in PEM").with_hint(hint)
    })
}
