//! A log whose signing key was changed.

use super::*;

fn key(seed: u8) -> Arc<dyn Signer> {
    TestSigner::new(seed)
}

fn with_key(seed: u8) -> VerifyOptions {
    VerifyOptions { public_key: Some(key(seed).public_key()), ..VerifyOptions::default() }
}

fn record(dir: &Path, seed: u8, numbers: std::ops::Range<usize>) {
    let log = AuditLog::open(dir, ORIGIN, key(seed)).unwrap();
    for number in numbers {
        log.record(&entry(number)).unwrap();
    }
}

#[track_caller]
fn good(dir: &Path, seed: u8) {
    let report = verify(dir, &with_key(seed));
    assert!(report.is_ok() && matches!(report.signer, Verdict::Good(_)), "{report:#?}");
}

#[track_caller]
fn bad(dir: &Path, seed: u8) {
    let report = verify(dir, &with_key(seed));
    assert!(report.signer.is_bad(), "{report:#?}");
}

#[test]
fn a_log_goes_on_with_another_key_and_both_vouch_for_all_of_it() {
    let dir = written(5);
    let kept = std::fs::read_to_string(dir.path().join("checkpoint")).unwrap();
    AuditLog::rotate_key(dir.path(), &key(1), &key(2)).unwrap();
    record(dir.path(), 2, 5..9);
    for seed in [1, 2] {
        good(dir.path(), seed);
        let report = verify(dir.path(), &VerifyOptions { checkpoint: Some(kept.clone()), ..with_key(seed) });
        assert!(matches!(report.completeness, Verdict::Good(_)), "{report:#?}");
    }
    bad(dir.path(), 3);
    assert!(verify(dir.path(), &VerifyOptions::default()).is_ok());
    let error = AuditLog::open(dir.path(), ORIGIN, key(1)).unwrap_err().to_string();
    assert!(error.contains("another key"), "{error}");
    AuditLog::rotate_key(dir.path(), &key(2), &key(3)).unwrap();
    record(dir.path(), 3, 9..11);
    [1, 2, 3].into_iter().for_each(|seed| good(dir.path(), seed));
    assert_eq!(numbers(dir.path()), (0..11).collect::<Vec<_>>());
    assert!(AuditLog::rotate_key(dir.path(), &key(1), &key(4)).is_err(), "only the last key hands over");
    assert!(AuditLog::rotate_key(dir.path(), &key(3), &key(3)).is_err());
}

/// The new key has not signed: whoever wrote the log may have named it without being asked.
#[test]
fn a_key_that_was_only_named_vouches_for_nothing() {
    let dir = written(5);
    let before = std::fs::read(dir.path().join("checkpoint")).unwrap();
    AuditLog::rotate_key(dir.path(), &key(1), &key(2)).unwrap();
    // As after a crash between the two signatures: the last commit, an entry and its checkpoint, was never written.
    let text = std::fs::read_to_string(segment(dir.path())).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    std::fs::write(segment(dir.path()), lines[..lines.len() - 2].join("\n") + "\n").unwrap();
    std::fs::write(dir.path().join("checkpoint"), before).unwrap();
    for seed in [1, 2] {
        let error = AuditLog::open(dir.path(), ORIGIN, key(seed)).unwrap_err().to_string();
        assert!(error.contains("key"), "{error}");
    }
    bad(dir.path(), 2);
    AuditLog::rotate_key(dir.path(), &key(1), &key(2)).unwrap();
    record(dir.path(), 2, 5..6);
    [1, 2].into_iter().for_each(|seed| good(dir.path(), seed));
}

#[test]
fn a_forged_past_that_names_the_real_key_is_not_taken_up() {
    // All of it by a thief's own key, which hands over to the real one.
    let dir = tempdir();
    record(dir.path(), 66, 0..3);
    let log = AuditLog::open(dir.path(), ORIGIN, key(66)).unwrap();
    let public = key(1).public_key();
    log.record(
        &Entry::new(Event::KeyChanged).detail("next_public_key", public.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
    )
    .unwrap();
    drop(log);
    assert!(AuditLog::open(dir.path(), ORIGIN, key(1)).is_err());
    bad(dir.path(), 1);
    // The same with what the thief signs in the name of the real key.
    assert!(AuditLog::open(dir.path(), ORIGIN, key(66)).is_err());
}

#[test]
fn a_change_of_any_byte_of_a_log_with_two_keys_is_seen() {
    let dir = written(2);
    AuditLog::rotate_key(dir.path(), &key(1), &key(2)).unwrap();
    record(dir.path(), 2, 2..4);
    let whole = std::fs::read(segment(dir.path())).unwrap();
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        std::fs::write(segment(dir.path()), changed).unwrap();
        for seed in [1, 2] {
            assert!(!verify(dir.path(), &with_key(seed)).is_ok(), "byte {at} with key {seed}");
        }
    }
}
