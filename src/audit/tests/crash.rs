//! Every write, fsync and rename fails once, in every way.

use std::sync::Arc;

use super::fault::{Fault, FaultDisk};
use super::*;

/// Small, so that the scenario rotates.
const SEGMENT: u64 = 2000;
/// Recorded between two openings.
const ENTRIES: usize = 4;

/// Opens, records, opens again, records; returns what was acknowledged.
fn scenario(disk: &Arc<FaultDisk>, dir: &Path) -> Vec<u64> {
    let mut acknowledged = Vec::new();
    for from in [0, ENTRIES] {
        let Ok(log) = AuditLog::open_on(Arc::clone(disk) as _, dir, ORIGIN, TestSigner::new(1), SEGMENT) else { continue };
        for number in from..from + ENTRIES {
            let recorded = if number % 2 == 0 { log.record(&entry(number)) } else { log.record_critical(&entry(number)) };
            if recorded.is_ok() {
                acknowledged.push(number as u64);
            }
        }
    }
    acknowledged
}

fn operations() -> usize {
    let (disk, dir) = (Arc::new(FaultDisk::default()), tempdir());
    assert_eq!(scenario(&disk, dir.path()), (0..8).collect::<Vec<_>>());
    assert!(segment::list(dir.path()).unwrap().len() >= 3, "{:?}", segment::list(dir.path()));
    disk.operations()
}

/// What must hold whatever happened before: it opens, nothing acknowledged is missing, and it verifies.
fn assert_whole(dir: &Path, acknowledged: &[u64], what: &str) {
    let log = AuditLog::open_on(Arc::new(FaultDisk::default()), dir, ORIGIN, TestSigner::new(1), SEGMENT)
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    log.record(&entry(99)).unwrap();
    drop(log);
    let report = verify(dir, &pinned());
    assert!(report.is_ok(), "{what}: {report:?}");
    let kept = numbers(dir);
    assert!(acknowledged.iter().all(|number| kept.contains(number)), "{what}: acknowledged {acknowledged:?}, kept {kept:?}");
    assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "{what}: {kept:?}");
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_that_was_acknowledged() {
    for at in 1..=operations() {
        for (kept, rename_lost) in [(0, true), (0, false), (100, true), (100, false), (u64::MAX, true), (u64::MAX, false)] {
            let dir = tempdir();
            let disk = Arc::new(FaultDisk::failing(at, Fault::PowerCut));
            let acknowledged = scenario(&disk, dir.path());
            disk.cut(kept, rename_lost);
            let what = format!("power cut at operation {at}, {kept} unsynced bytes kept, renames lost: {rename_lost}");
            assert_whole(dir.path(), &acknowledged, &what);
        }
    }
}

#[test]
fn an_error_at_any_operation_loses_nothing_that_was_acknowledged() {
    for at in 1..=operations() {
        for errno in [nix::libc::ENOSPC, nix::libc::EIO] {
            let dir = tempdir();
            let disk = Arc::new(FaultDisk::failing(at, Fault::Once(errno)));
            let acknowledged = scenario(&disk, dir.path());
            assert_whole(dir.path(), &acknowledged, &format!("errno {errno} at operation {at}"));
        }
    }
}

#[test]
fn after_a_failed_fsync_nothing_is_recorded_until_the_log_is_opened_again() {
    let mut failed = 0;
    for at in 1..=operations() {
        let dir = tempdir();
        let disk = Arc::new(FaultDisk::failing(at, Fault::Once(nix::libc::EIO)));
        let Ok(log) = AuditLog::open_on(disk, dir.path(), ORIGIN, TestSigner::new(1), SEGMENT) else { continue };
        let results: Vec<_> = (0..ENTRIES).map(|number| log.record(&entry(number))).collect();
        let first = results.iter().position(|result| matches!(result, Err(AuditError::Failed { .. })));
        if let Some(first) = first {
            failed += 1;
            assert!(results[first..].iter().all(|result| matches!(result, Err(AuditError::Failed { .. }))), "operation {at}: {results:?}");
            assert!(matches!(log.record_critical(&entry(7)), Err(AuditError::Failed { .. })));
        }
    }
    assert!(failed >= ENTRIES, "only {failed} of the operations made the log fail");
}

#[test]
fn a_full_disk_refuses_ordinary_entries_and_keeps_room_for_critical_ones() {
    let dir = tempdir();
    let disk = Arc::new(FaultDisk::default());
    let log = AuditLog::open_on(Arc::clone(&disk) as _, dir.path(), ORIGIN, TestSigner::new(1), 1 << 30).unwrap();
    log.record(&entry(0)).unwrap();
    let before = std::fs::read(segment(dir.path())).unwrap();
    disk.set_free(Some(10));
    assert!(matches!(log.record(&entry(1)), Err(AuditError::Disk { .. })));
    assert_eq!(std::fs::read(segment(dir.path())).unwrap(), before, "a partial line survived");
    // The reserve goes to what is critical, once, and ordinary entries do not eat it.
    log.record_critical(&entry(2)).unwrap();
    assert!(!dir.path().join("reserve").exists());
    assert!(matches!(log.record(&entry(3)), Err(AuditError::Disk { .. })));
    log.record_critical(&entry(4)).unwrap();
    disk.set_free(Some(10));
    assert!(matches!(log.record_critical(&entry(5)), Err(AuditError::Disk { .. })), "the reserve is not endless");
    // Space comes back: so does the reserve.
    disk.set_free(None);
    log.record(&entry(6)).unwrap();
    assert!(dir.path().join("reserve").exists());
    drop(log);
    assert_eq!(numbers(dir.path()), [0, 2, 4, 6]);
    assert!(verify(dir.path(), &pinned()).is_ok());
}

#[test]
fn a_log_on_a_full_disk_opens_for_what_is_critical() {
    let dir = written(2);
    std::fs::remove_file(dir.path().join("reserve")).unwrap();
    let disk = Arc::new(FaultDisk::default());
    disk.set_free(Some(4000));
    let log = AuditLog::open_on(disk, dir.path(), ORIGIN, TestSigner::new(1), 1 << 30).unwrap();
    assert!(matches!(log.record(&entry(2)), Err(AuditError::Disk { .. })));
    log.record_critical(&entry(3)).unwrap();
}

#[test]
fn a_torn_tail_is_set_aside_and_said_so() {
    for tail in ["{\"half\":", "{\"whole\":1}\n", "\n", "{\"a\":1}\n{\"b\""] {
        let dir = written(3);
        let mut bytes = std::fs::read(segment(dir.path())).unwrap();
        bytes.extend_from_slice(tail.as_bytes());
        std::fs::write(segment(dir.path()), &bytes).unwrap();
        assert!(!verify(dir.path(), &pinned()).is_ok(), "{tail:?}");
        open(dir.path()).record(&entry(3)).unwrap();
        assert!(verify(dir.path(), &pinned()).is_ok());
        assert_eq!(numbers(dir.path()), [0, 1, 2, 3]);
        let filter = Filter { event: Some(Event::Recovered), ..Filter::default() };
        let recovered: Vec<_> = read(dir.path(), filter).unwrap().map(Result::unwrap).collect();
        assert_eq!((recovered.len(), recovered[0].index), (1, 4), "{tail:?}");
        assert_eq!(recovered[0].detail["dropped_bytes"], tail.len());
        let kept = dir.path().join(recovered[0].detail["kept_as"].as_str().unwrap());
        assert_eq!(std::fs::read(kept).unwrap(), tail.as_bytes());
    }
}

#[test]
fn a_tail_longer_than_one_commit_is_no_crash() {
    let bytes_max = "x".repeat(crate::limits::AUDIT_BATCH_BYTES_MAX + 1);
    let entries_max = "{}\n".repeat(crate::limits::AUDIT_BATCH_ENTRIES_MAX + 1);
    for tail in [bytes_max, entries_max] {
        let dir = written(1);
        let mut bytes = std::fs::read(segment(dir.path())).unwrap();
        bytes.extend_from_slice(tail.as_bytes());
        std::fs::write(segment(dir.path()), &bytes).unwrap();
        let error = AuditLog::open(dir.path(), ORIGIN, TestSigner::new(1)).unwrap_err();
        assert!(matches!(error, AuditError::Damaged { index: 2, .. }), "{error}");
        assert_eq!(std::fs::read(segment(dir.path())).unwrap().len(), bytes.len(), "evidence was destroyed");
    }
}

/// Small, so that there is something to give up.
const PRUNED_SEGMENT: u64 = 40_000;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let (from, to) = (item.as_ref().unwrap().path(), to.join(item.unwrap().file_name()));
        if from.is_dir() { copy(&from, &to) } else { assert!(std::fs::copy(from, to).is_ok()) }
    }
}

#[test]
fn a_crash_while_entries_are_given_up_loses_no_other_and_no_proof() {
    let whole = tempdir();
    let open =
        |disk: &Arc<FaultDisk>, dir: &Path| AuditLog::open_on(Arc::clone(disk) as _, dir, ORIGIN, TestSigner::new(1), PRUNED_SEGMENT);
    let log = open(&Arc::default(), whole.path()).unwrap();
    let mut kept = String::new();
    for number in 0..300 {
        log.record(&entry(number)).unwrap();
        if number == 20 {
            kept = log.head().text;
        }
    }
    drop(log);
    let prune = |disk: &Arc<FaultDisk>, dir: &Path| {
        let log = open(disk, dir).unwrap();
        let opened = disk.operations();
        let pruned = log.prune(jiff::Timestamp::now());
        (opened, pruned)
    };
    let (disk, dir) = (Arc::default(), tempdir());
    copy(whole.path(), dir.path());
    let (opened, pruned) = prune(&disk, dir.path());
    assert!(pruned.unwrap() > 0);
    let mut given_up = 0;
    for at in opened + 1..=disk.operations() {
        for fault in [Fault::PowerCut, Fault::Once(nix::libc::EIO)] {
            let dir = tempdir();
            copy(whole.path(), dir.path());
            let disk = Arc::new(FaultDisk::failing(at, fault));
            drop(prune(&disk, dir.path()));
            if fault == Fault::PowerCut {
                disk.cut(0, true);
            }
            drop(open(&Arc::default(), dir.path()).unwrap_or_else(|error| panic!("operation {at}, {fault:?}: {error}")));
            let report = verify(dir.path(), &VerifyOptions { checkpoint: Some(kept.clone()), ..pinned() });
            assert!(report.is_ok() && matches!(report.completeness, Verdict::Good(_)), "operation {at}, {fault:?}: {report:?}");
            given_up += usize::from(report.first > 0);
            let numbers = numbers(dir.path());
            assert_eq!((numbers.last(), numbers.len() as u64), (Some(&299), 300 - report.first.saturating_sub(1)), "operation {at}");
        }
    }
    assert!(given_up > 0);
}
