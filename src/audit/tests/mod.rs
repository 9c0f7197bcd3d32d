//! The log under use, under tampering, and on disks that fail.

mod crash;
mod damage;
mod fault;
mod oracle;
mod peers;
mod rotation;
mod tamper;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tempfile::TempDir;

use super::*;

const ORIGIN: &str = "sealane/dc1.example.net/gw-a";

struct TestSigner {
    key: Ed25519KeyPair,
    signed: AtomicUsize,
}

impl TestSigner {
    fn new(seed: u8) -> Arc<Self> {
        Arc::new(Self { key: Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap(), signed: AtomicUsize::new(0) })
    }
}

impl Signer for TestSigner {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        self.signed.fetch_add(1, Ordering::SeqCst);
        Ok(self.key.sign(bytes).as_ref().try_into().unwrap())
    }

    fn public_key(&self) -> [u8; 32] {
        self.key.public_key().as_ref().try_into().unwrap()
    }

    fn name(&self) -> &str {
        "spiffe://dc1.example.net/gateway/gw-a"
    }
}

fn open(dir: &Path) -> AuditLog {
    AuditLog::open(dir, ORIGIN, TestSigner::new(1)).unwrap()
}

fn entry(number: usize) -> Entry {
    Entry::new(Event::Decision)
        .vm("vm-1".parse().unwrap(), crate::types::VmUuid([1; 16]))
        .migration(crate::types::MigrationId([2; 16]))
        .peer("spiffe://dc2.example.net/gateway/gw-b")
        .outcome(Outcome::Allow)
        .detail("number", number)
        .detail("text", "line\nquote\" \u{e9}\u{7f}")
}

/// In memory where there is such a file system: these tests are about order and contents, not about the disk.
fn tempdir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A closed log with this many entries after entry 0.
fn written(entries: usize) -> TempDir {
    let dir = tempdir();
    let log = open(dir.path());
    for number in 0..entries {
        log.record(&entry(number)).unwrap();
    }
    dir
}

fn pinned() -> VerifyOptions {
    VerifyOptions { public_key: Some(TestSigner::new(1).public_key()), ..VerifyOptions::default() }
}

fn segment(dir: &Path) -> PathBuf {
    segment::segment_path(dir, 0)
}

fn numbers(dir: &Path) -> Vec<u64> {
    let entries = read(dir, Filter { event: Some(Event::Decision), ..Filter::default() }).unwrap();
    entries.map(|entry| entry.unwrap().detail["number"].as_u64().unwrap()).collect()
}
