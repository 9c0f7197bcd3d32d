//! The log under ordinary use.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use super::*;

#[test]
fn a_log_begins_with_who_writes_it_and_goes_on_after_reopening() {
    let dir = written(2);
    let log = open(dir.path());
    assert_eq!(log.head().size, 3);
    let receipt = log.record(&entry(2)).unwrap();
    assert_eq!((receipt.index(), receipt.event()), (3, Event::Decision));
    assert_eq!(receipt.migration(), Some(crate::types::MigrationId([2; 16])));
    let entries: Vec<_> = read(dir.path(), Filter::default()).unwrap().map(Result::unwrap).collect();
    assert_eq!(entries[0].event, Event::LogCreated);
    assert_eq!(entries[0].detail["origin"], ORIGIN);
    assert_eq!(entries.iter().map(|entry| entry.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(entries.windows(2).all(|pair| pair[0].monotonic_ns <= pair[1].monotonic_ns));
    assert!(verify(dir.path(), &pinned()).is_ok(), "while it is open");
}

#[test]
fn a_line_is_canonical_json() {
    let dir = written(1);
    let text = std::fs::read_to_string(segment(dir.path())).unwrap();
    let line = text.lines().nth(2).unwrap();
    let value: serde_json::Value = serde_json::from_str(line).unwrap();
    let names: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert!(names.is_sorted(), "{names:?}");
    assert!(line.contains("\"text\":\"line\\nquote\\\" \u{e9}\u{7f}\""), "{line}");
    let time = value["time"].as_str().unwrap();
    assert!(time.len() == "2026-11-23T17:32:32.123456789Z".len() && time.ends_with('Z'), "{time}");
    for other in [line.replace(':', ": "), line.replacen("\"boot_id\"", "\"boot_id\":\"x\",\"boot_id\"", 1), format!(" {line}")] {
        assert!(StoredEntry::parse(other.as_bytes()).is_err(), "{other}");
    }
    assert!(StoredEntry::parse(line.as_bytes()).is_ok());
}

#[test]
fn entries_that_cannot_be_lines_are_refused_and_nothing_else_suffers() {
    let dir = tempdir();
    let log = open(dir.path());
    let deep = (0..20).fold(serde_json::Value::Null, |inner, _| serde_json::json!([inner]));
    for bad in [
        entry(0).detail("float", 1.5),
        entry(0).detail("deep", deep),
        entry(0).detail("long", "x".repeat(crate::limits::AUDIT_LINE_BYTES_MAX)),
    ] {
        assert!(matches!(log.record(&bad), Err(AuditError::Entry { .. })), "{bad:?}");
    }
    // The longest that is taken fits the longest that is read.
    let fits = (0..crate::limits::AUDIT_LINE_BYTES_MAX).rev().map(|n| entry(1).detail("long", "x".repeat(n)));
    let longest = fits.into_iter().find(|entry| entry.fields().is_ok()).unwrap();
    log.record(&longest).unwrap();
    log.record(&entry(2)).unwrap();
    assert!(verify(dir.path(), &pinned()).is_ok());
}

#[test]
fn only_one_writer_and_only_the_same_log_and_key() {
    let dir = written(1);
    let log = open(dir.path());
    let second = AuditLog::open(dir.path(), ORIGIN, TestSigner::new(1));
    assert!(matches!(second, Err(AuditError::Locked { .. })), "{second:?}");
    let handle = log.clone();
    drop(log);
    assert!(AuditLog::open(dir.path(), ORIGIN, TestSigner::new(1)).is_err(), "a handle is still there");
    drop(handle);
    for (origin, seed) in [("sealane/other", 1), (ORIGIN, 2), ("", 1), ("a b", 1), ("a\nb", 1)] {
        let opened = AuditLog::open(dir.path(), origin, TestSigner::new(seed));
        assert!(matches!(opened, Err(AuditError::Checkpoint { .. })), "{origin:?} {seed}");
    }
    open(dir.path());
}

#[test]
fn files_are_nobody_else_s_business() {
    let dir = tempdir();
    let path = dir.path().join("new/audit");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    drop(open(&path));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    open(&path).record(&entry(0)).unwrap();
    assert_eq!(mode(&path), 0o700);
    for item in std::fs::read_dir(&path).unwrap() {
        let item = item.unwrap().path();
        assert_eq!(mode(&item), if item.is_dir() { 0o700 } else { 0o600 }, "{}", item.display());
    }
}

#[test]
fn many_threads_keep_their_order_and_every_receipt_is_on_disk() {
    const THREADS: usize = 8;
    const EACH: usize = 25;
    let dir = tempdir();
    let log = open(dir.path());
    let receipts: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let log = log.clone();
                scope.spawn(move || {
                    let record = |n: usize| {
                        let index = log.record(&entry(thread * 1000 + n)).unwrap().index();
                        assert!(log.head().size > index, "acknowledged before the checkpoint covered it");
                        index
                    };
                    (0..EACH).map(record).collect()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    drop(log);
    let kept = numbers(dir.path());
    assert_eq!(kept.len(), THREADS * EACH);
    for (thread, indices) in receipts.iter().enumerate() {
        assert!(indices.is_sorted());
        for (n, index) in indices.iter().enumerate() {
            assert_eq!(kept[usize::try_from(*index).unwrap() - 1], (thread * 1000 + n) as u64);
        }
    }
    assert!(verify(dir.path(), &pinned()).is_ok());
}

/// Signs like the test signer, but waits for a word before each signature once it is told to.
struct Gate {
    signer: Arc<TestSigner>,
    waits: Mutex<Option<(SyncSender<()>, std::sync::mpsc::Receiver<()>)>>,
}

impl Signer for Gate {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        if let Some((arrived, go)) = self.waits.lock().unwrap().take() {
            arrived.send(()).unwrap();
            go.recv().unwrap();
        }
        self.signer.sign(bytes)
    }
    fn public_key(&self) -> [u8; 32] {
        self.signer.public_key()
    }
    fn name(&self) -> &str {
        self.signer.name()
    }
}

#[test]
fn one_commit_serves_everybody_who_waits() {
    const WAITING: usize = 20;
    let dir = tempdir();
    let gate = Arc::new(Gate { signer: TestSigner::new(1), waits: Mutex::new(None) });
    let log = AuditLog::open(dir.path(), ORIGIN, Arc::clone(&gate) as _).unwrap();
    let before = gate.signer.signed.load(Ordering::SeqCst);
    let (arrived, first_is_committing) = sync_channel(1);
    let (go, wait) = sync_channel(1);
    *gate.waits.lock().unwrap() = Some((arrived, wait));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| log.record(&entry(0)).unwrap());
        first_is_committing.recv().unwrap();
        let others: Vec<_> = (0..WAITING)
            .map(|n| {
                scope.spawn({
                    let log = &log;
                    move || log.record(&entry(n + 1)).unwrap()
                })
            })
            .collect();
        while log.inner().waiting() < WAITING {
            std::thread::yield_now();
        }
        go.send(()).unwrap();
        first.join().unwrap();
        for other in others {
            other.join().unwrap();
        }
    });
    assert_eq!(gate.signer.signed.load(Ordering::SeqCst) - before, 2);
    assert_eq!(numbers(dir.path()).len(), WAITING + 1);
}

struct Panicking(Arc<TestSigner>, AtomicBool);

impl Signer for Panicking {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        assert!(!self.1.load(Ordering::SeqCst), "the key is gone");
        self.0.sign(bytes)
    }
    fn public_key(&self) -> [u8; 32] {
        self.0.public_key()
    }
    fn name(&self) -> &str {
        self.0.name()
    }
}

#[test]
fn a_signer_that_panics_fails_the_log_and_hangs_nobody() {
    let dir = tempdir();
    let signer = Arc::new(Panicking(TestSigner::new(1), false.into()));
    let log = AuditLog::open(dir.path(), ORIGIN, Arc::clone(&signer) as _).unwrap();
    signer.1.store(true, Ordering::SeqCst);
    let other = log.clone();
    assert!(std::thread::spawn(move || other.record(&entry(0))).join().is_err());
    assert!(matches!(log.record(&entry(1)), Err(AuditError::Failed { .. })));
    drop(log);
    assert!(verify(dir.path(), &pinned()).is_ok());
}

/// The same key, which does not sign while it is told so.
struct Unwilling(Arc<TestSigner>, AtomicBool);

impl Signer for Unwilling {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        if self.1.load(Ordering::SeqCst) { Err("the process that holds it has ended".to_owned()) } else { self.0.sign(bytes) }
    }
    fn public_key(&self) -> [u8; 32] {
        self.0.public_key()
    }
    fn name(&self) -> &str {
        self.0.name()
    }
}

#[test]
fn what_is_not_signed_is_not_recorded_and_the_log_goes_on_when_it_is_again() {
    let dir = tempdir();
    let signer = Arc::new(Unwilling(TestSigner::new(1), AtomicBool::new(false)));
    let log = AuditLog::open(dir.path(), ORIGIN, Arc::clone(&signer) as Arc<dyn Signer>).unwrap();
    log.record(&entry(0)).unwrap();
    let before = std::fs::read(segment(dir.path())).unwrap();
    signer.1.store(true, Ordering::SeqCst);
    for refused in [log.record(&entry(1)), log.record_critical(&entry(2))] {
        assert!(matches!(&refused, Err(AuditError::Unsigned { why, .. }) if why.contains("has ended")), "{refused:?}");
    }
    assert_eq!(std::fs::read(segment(dir.path())).unwrap(), before);
    signer.1.store(false, Ordering::SeqCst);
    assert_eq!(log.record(&entry(3)).unwrap().index(), 2);
    drop(log);
    assert_eq!(numbers(dir.path()), [0, 3]);
    assert!(verify(dir.path(), &pinned()).is_ok());
}

#[test]
fn a_clock_that_is_stepped_by_a_year_either_way_changes_no_order_and_no_verdict() {
    const YEAR: i64 = 366 * 86_400;
    let dir = tempdir();
    for steps in [[0, YEAR, -YEAR, 0], [-YEAR, YEAR, 0, -YEAR]] {
        let log = open(dir.path());
        for step in steps {
            log.step_clock(step);
            log.record(&entry(usize::try_from(log.head().size).unwrap())).unwrap();
        }
    }
    let entries: Vec<_> =
        read(dir.path(), Filter { event: Some(Event::Decision), ..Filter::default() }).unwrap().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 8);
    assert!(entries.is_sorted_by_key(|entry| entry.index) && entries.is_sorted_by_key(|entry| entry.monotonic_ns));
    assert!(!entries.is_sorted_by_key(|entry| entry.time), "the times are those of the clock");
    assert!(verify(dir.path(), &pinned()).is_ok());
    // What is asked for by its time is found by what the clock said.
    let since = Some(jiff::Timestamp::now() + jiff::SignedDuration::from_secs(YEAR / 2));
    let found = read(dir.path(), Filter { event: Some(Event::Decision), since, ..Filter::default() }).unwrap();
    assert_eq!(found.count(), 2);
}

#[test]
fn reading_filters_by_every_field() {
    let dir = tempdir();
    let log = open(dir.path());
    log.record(&entry(0)).unwrap();
    log.record(&Entry::new(Event::SessionRefused).peer("10.0.0.1:4433").outcome(Outcome::Refused)).unwrap();
    log.record(&Entry::new(Event::Handoff).migration(crate::types::MigrationId([3; 16])).detail("record", "commit")).unwrap();
    let show = |filter: Filter| -> Vec<u64> { read(dir.path(), filter).unwrap().map(|entry| entry.unwrap().index).collect() };
    let all = Filter::default;
    assert_eq!(show(all()), [0, 1, 2, 3]);
    assert_eq!(show(Filter { vm: Some("vm-1".parse().unwrap()), ..all() }), [1]);
    assert_eq!(show(Filter { peer: Some("10.0.0.1:4433".to_owned()), ..all() }), [2]);
    assert_eq!(show(Filter { migration: Some(crate::types::MigrationId([3; 16])), ..all() }), [3]);
    assert_eq!(show(Filter { event: Some(Event::SessionRefused), ..all() }), [2]);
    assert_eq!(show(Filter { since: Some(jiff::Timestamp::now()), ..all() }), Vec::<u64>::new());
    let third = read(dir.path(), all()).unwrap().nth(2).unwrap().unwrap().time;
    assert_eq!(show(Filter { since: Some(third), ..all() }), [2, 3]);
    for event in Event::ALL {
        assert_eq!(event.as_str().parse::<Event>().unwrap(), *event);
        assert_eq!(serde_json::to_value(event).unwrap(), event.as_str());
    }
}

#[test]
fn reading_stops_at_the_first_entry_that_is_wrong() {
    let dir = written(4);
    let text = std::fs::read_to_string(segment(dir.path())).unwrap();
    std::fs::write(segment(dir.path()), text.replacen("\"number\":2", "\"number\":7", 1)).unwrap();
    let shown: Vec<_> = read(dir.path(), Filter::default()).unwrap().collect();
    assert_eq!(shown.len(), 4);
    assert!(shown[..3].iter().all(Result::is_ok));
    assert!(matches!(shown[3], Err(AuditError::Damaged { index: 3, .. })), "{:?}", shown[3]);
}

#[test]
fn tiles_follow_the_log_and_nothing_stays_behind_of_earlier_ones() {
    let dir = tempdir();
    let mut log = open(dir.path());
    let files = || {
        let files = tile::list(dir.path()).unwrap().into_iter().map(Result::unwrap);
        let mut files: Vec<String> = files.map(|name| name.path(Path::new("")).display().to_string()).collect();
        files.sort();
        files
    };
    for (size, expected) in [
        (3, vec!["tile/0/000.p/3", "tile/entries/000.p/3"]),
        (5, vec!["tile/0/000.p/5", "tile/entries/000.p/5"]),
        (256, vec!["tile/0/000", "tile/1/000.p/1", "tile/entries/000"]),
        (258, vec!["tile/0/000", "tile/0/001.p/2", "tile/1/000.p/1", "tile/entries/000", "tile/entries/001.p/2"]),
    ] {
        while log.head().size < size {
            log.record(&entry(0)).unwrap();
        }
        log.publish();
        assert_eq!(files(), expected, "published");
        drop(log);
        assert_eq!(files(), expected, "closed");
        log = open(dir.path());
        assert_eq!(files(), expected, "opened");
        assert!(verify(dir.path(), &pinned()).is_ok(), "{:?}", verify(dir.path(), &pinned()));
    }
    // All of it comes from the segments.
    drop(log);
    std::fs::remove_dir_all(dir.path().join("tile")).unwrap();
    log = open(dir.path());
    assert_eq!(files().len(), 5);
    assert!(verify(dir.path(), &pinned()).is_ok());
    drop(log);
}

#[test]
fn one_commit_is_one_write_and_one_sync_before_the_receipt() {
    let dir = tempdir();
    let disk = Arc::new(super::fault::FaultDisk::default());
    let log = AuditLog::open_on(Arc::clone(&disk) as _, dir.path(), ORIGIN, TestSigner::new(1), 1 << 30).unwrap();
    let before = disk.syncs();
    log.record(&entry(0)).unwrap();
    assert_eq!(disk.syncs() - before, 1);
}

#[test]
fn old_entries_can_be_given_up_and_everything_signed_stays_provable() {
    let dir = tempdir();
    let log = AuditLog::open_on(Arc::new(disk::RealDisk), dir.path(), ORIGIN, TestSigner::new(1), 40_000).unwrap();
    for number in 0..200 {
        log.record(&entry(number)).unwrap();
    }
    let old = log.head();
    let now = jiff::Timestamp::now();
    assert_eq!(log.prune(now).unwrap(), 0, "the tile over the end is not full");
    for number in 200..400 {
        log.record(&entry(number)).unwrap();
    }
    let first = log.prune(now).unwrap();
    assert!((100..200).contains(&first), "{first}");
    assert_eq!(segment::list(dir.path()).unwrap()[0].first, first);
    let with_old = || VerifyOptions { checkpoint: Some(old.text.clone()), ..pinned() };
    for _ in 0..2 {
        let report = verify(dir.path(), &with_old());
        assert!(report.is_ok() && report.first == first && matches!(report.completeness, Verdict::Good(_)), "{report:?}");
    }
    assert!(verify(dir.path(), &VerifyOptions::default()).is_ok(), "the entry names the key");
    drop(log);
    let log = open(dir.path());
    log.record(&entry(400)).unwrap();
    let peer: crate::types::SpiffeId = "spiffe://dc3/gw".parse().unwrap();
    // From where a peer knows it, long before what is kept.
    let shown = log.announce(&peer, Some(old.size), None).unwrap();
    let new = note::read(&shown.checkpoint).unwrap();
    assert_eq!(tree::check_consistency(&shown.consistency, old.head(), new.head()), Ok(()));
    drop(log);
    let report = verify(dir.path(), &with_old());
    assert!(report.is_ok() && report.first == first, "{report:?}");
    assert_eq!(numbers(dir.path()).last(), Some(&400));
    // Without the entry that says so it is a hole; and a hash of what was given up cannot be changed either.
    let path = tile::Name::hashes(0, 0, 256).path(dir.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(verify(dir.path(), &pinned()).content.is_bad());
    assert!(AuditLog::open(dir.path(), ORIGIN, TestSigner::new(1)).is_err());
}

/// Prints how many entries a minute are verified when each was a commit of its own, which is the slowest there is:
/// `cargo test --release --lib audit -- --ignored --nocapture verification_speed`.
#[test]
#[ignore = "a measurement"]
fn verification_speed() {
    let entries = std::env::var("SEALANE_AUDIT_ENTRIES").ok().and_then(|count| count.parse().ok()).unwrap_or(100_000);
    let dir = written(entries);
    let began = std::time::Instant::now();
    let report = verify(dir.path(), &pinned());
    let elapsed = began.elapsed().as_secs_f64();
    assert!(report.is_ok(), "{report:?}");
    println!("audit verify: {entries} entries in {elapsed:.2} s, {:.0} a minute", entries as f64 / elapsed * 60.0);
}

/// A guest stands still while its handoff is recorded, and nothing depends on the files for other programs.
#[test]
fn an_entry_of_a_handoff_does_not_wait_for_the_files_of_others() {
    let dir = tempdir();
    let log = open(dir.path());
    let shown = || note::read(&std::fs::read_to_string(dir.path().join("checkpoint")).unwrap()).unwrap().size;
    log.record(&entry(0)).unwrap();
    let before = log.head().size;
    assert_eq!(shown(), before);
    log.record_critical(&entry(1)).unwrap();
    assert_eq!((shown(), log.head().size), (before, before + 1), "it is on disk, and not shown yet");
    log.publish();
    assert_eq!(shown(), before + 1);
    log.record_critical(&entry(2)).unwrap();
    drop(log);
    assert_eq!(shown(), before + 2, "nothing is left behind when it is closed");
    assert!(verify(dir.path(), &pinned()).is_ok());
}
