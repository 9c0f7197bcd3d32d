//! How fast an audit log is verified, in entries a minute: one that was written without hurry (a commit for each entry) and one that was
//! written by many at once.
//!
//! `cargo bench --bench audit -- [--entries 50000]`: a table on stderr, one JSON object on stdout. The log is in memory (`/dev/shm`), where
//! an fsync costs nothing; what is measured is `sealane audit verify --key`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people: the table and the object are its output")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ring::signature::{Ed25519KeyPair, KeyPair};
use sealane::audit::{AuditLog, Entry, Event, Outcome, Signer, VerifyOptions, verify};

struct Key(Ed25519KeyPair);

impl Signer for Key {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        Ok(self.0.sign(bytes).as_ref().try_into().unwrap_or([0; 64]))
    }

    fn public_key(&self) -> [u8; 32] {
        self.0.public_key().as_ref().try_into().unwrap_or([0; 32])
    }

    fn name(&self) -> &str {
        "spiffe://example.net/gateway/gw-a"
    }
}

/// As long as those of decisions are.
fn entry(number: usize) -> Result<Entry, Box<dyn Error>> {
    let entry = Entry::new(Event::Decision).outcome(Outcome::Allow).peer("spiffe://example.net/gateway/gw-b");
    let entry = entry.vm("web-1".parse()?, sealane::types::VmUuid([7; 16])).migration(sealane::types::MigrationId([9; 16]));
    let facts = serde_json::json!({"context": {"now": "2026-01-01T00:00:00.000Z", "memoryMiB": 4096, "route": {"srcSite": "dc1", "dstSite": "dc2"}}});
    Ok(entry
        .detail("action", "release")
        .detail("policy_ids", serde_json::json!(["tenant-acme"]))
        .detail("number", number)
        .detail("facts", facts))
}

fn write(directory: &Path, entries: usize, writers: usize) -> Result<[u8; 32], Box<dyn Error>> {
    let key = Arc::new(Key(Ed25519KeyPair::from_seed_unchecked(&[7; 32]).map_err(|error| error.to_string())?));
    let public = key.public_key();
    let log = AuditLog::open(directory, "sealane/example.net/gw-a", key)?;
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..writers)
            .map(|writer| {
                let log = log.clone();
                scope.spawn(move || {
                    for number in (writer..entries).step_by(writers) {
                        log.record(&entry(number).map_err(|error| error.to_string())?).map_err(|error| error.to_string())?;
                    }
                    Ok::<_, String>(())
                })
            })
            .collect();
        all.into_iter().try_for_each(|writer| writer.join().unwrap_or_else(|_| Err("a writer stopped".to_owned())))
    })?;
    Ok(public)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut entries = 50_000;
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next().map(|value| value.parse::<usize>())) {
            ("--entries", Some(Ok(number))) => entries = number.clamp(100, 5_000_000),
            _ => return Err(format!("`{argument}`: expected `--entries NUMBER`").into()),
        }
    }
    let mut rows = Vec::new();
    eprintln!("{:<24} {:>10} {:>12} {:>18}", "log", "entries", "seconds", "entries a minute");
    for (name, writers) in [("one entry a commit", 1), ("64 writers", 64)] {
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
        let key = write(directory.path(), entries, writers)?;
        let began = Instant::now();
        let report = verify(directory.path(), &VerifyOptions { public_key: Some(key), ..VerifyOptions::default() });
        let seconds = began.elapsed().as_secs_f64();
        if !report.is_ok() || report.entries != entries as u64 + 1 {
            return Err(format!("the log is not good: {report:?}").into());
        }
        let per_minute = report.entries as f64 / seconds * 60.0;
        eprintln!("{name:<24} {:>10} {seconds:>12.2} {per_minute:>18.0}", report.entries);
        rows.push(serde_json::json!({"log": name, "entries": report.entries, "seconds": seconds, "entries_per_minute": per_minute}));
    }
    println!("{}", serde_json::json!({"schema": "sealane.bench-audit/1", "results": rows}));
    Ok(())
}
