//! Every change to a closed log is seen by `verify`, and a gateway does not build on it.

use super::*;
use crate::audit::tree::{Tree, leaf_hash};
use crate::audit::walk::{checkpoint_line, is_checkpoint_line};

/// `verify` finds it and `open` refuses it.
fn assert_seen(dir: &Path, what: &str) {
    let report = verify(dir, &pinned());
    assert!(!report.is_ok(), "{what}: {report:?}");
    assert!(AuditLog::open(dir, ORIGIN, TestSigner::new(1)).is_err(), "{what}: opened");
}

#[test]
fn an_untouched_log_is_good_and_what_is_not_proven_is_said() {
    let dir = written(4);
    let report = verify(dir.path(), &pinned());
    assert_eq!((report.entries, report.origin.as_deref()), (5, Some(ORIGIN)));
    assert!(matches!(report.content, Verdict::Good(_)), "{report:?}");
    assert!(matches!(report.signer, Verdict::Good(_)), "{report:?}");
    assert!(matches!(report.completeness, Verdict::Open(_)), "{report:?}");
    let report = verify(dir.path(), &VerifyOptions::default());
    assert!(report.is_ok() && matches!(report.signer, Verdict::Open(_)), "{report:?}");
}

#[test]
fn a_flip_of_any_byte_is_seen() {
    let dir = written(2);
    for path in [segment(dir.path()), segment::checkpoint_path(dir.path())] {
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= [0x01, 0x20, 0x80][at % 3];
            std::fs::write(&path, &bad).unwrap();
            assert_seen(dir.path(), &format!("{} byte {at}", path.display()));
        }
        std::fs::write(&path, &good).unwrap();
    }
    assert!(verify(dir.path(), &pinned()).is_ok());
}

#[test]
fn a_cut_at_any_byte_is_seen() {
    let dir = written(2);
    let path = segment(dir.path());
    let good = std::fs::read(&path).unwrap();
    for length in 0..good.len() {
        std::fs::write(&path, &good[..length]).unwrap();
        assert_seen(dir.path(), &format!("{} cut to {length} of {}", path.display(), good.len()));
    }
    std::fs::write(&path, &good).unwrap();
    // A power cut may leave a part of this one, so a gateway does not mind.
    let path = segment::checkpoint_path(dir.path());
    let good = std::fs::read(&path).unwrap();
    for length in 0..good.len() {
        std::fs::write(&path, &good[..length]).unwrap();
        assert!(verify(dir.path(), &pinned()).signer.is_bad(), "checkpoint cut to {length} of {}", good.len());
        drop(open(dir.path()));
        assert_eq!(std::fs::read(&path).unwrap(), good);
    }
}

#[test]
fn a_deleted_inserted_doubled_or_swapped_line_is_named() {
    let dir = written(5);
    let text = std::fs::read_to_string(segment(dir.path())).unwrap();
    let good: Vec<&str> = text.lines().collect();
    assert_eq!(good.len(), 12, "each entry was a commit");
    let check = |lines: &[&str], first_bad: usize, what: String| {
        std::fs::write(segment(dir.path()), lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        let report = verify(dir.path(), &pinned());
        assert!(!report.is_ok(), "{what}: {report:?}");
        // What only adds behind the signed end is set aside when the log is opened (see `crash.rs`).
        if first_bad < 6 {
            assert_seen(dir.path(), &what);
        }
        let named = [&report.content, &report.signer, &report.completeness].into_iter().find_map(|verdict| match verdict {
            Verdict::Bad { entry: Some(entry), .. } => Some(*entry),
            _ => None,
        });
        assert_eq!(named, Some(first_bad as u64), "{what}: {report:?}");
    };
    for at in 0..good.len() {
        let (entry, ends_commit) = (at / 2, at % 2);
        let mut lines = good.clone();
        lines.remove(at);
        check(&lines, entry, format!("line {at} deleted"));
        let mut lines = good.clone();
        lines.insert(at + 1, good[at]);
        check(&lines, entry + 1, format!("line {at} doubled"));
        let mut lines = good.clone();
        lines.insert(at, "{}");
        check(&lines, entry + ends_commit, format!("a line before line {at}"));
        if at + 1 < good.len() {
            let mut lines = good.clone();
            lines.swap(at, at + 1);
            check(&lines, entry + ends_commit, format!("lines {at} and {} swapped", at + 1));
        }
    }
}

/// Rewrites the log with entry 2 changed, the tree made right again, and no tiles; signs anew with `signer`.
pub(super) fn forge(dir: &Path, signer: &TestSigner) {
    let text = std::fs::read_to_string(segment(dir)).unwrap();
    let (mut tree, mut forged, mut since) = (Tree::default(), String::new(), 0);
    for line in text.lines() {
        if is_checkpoint_line(line.as_bytes()) {
            let checkpoint = note::sign(signer, ORIGIN, tree.head()).unwrap();
            forged += &(checkpoint_line(&checkpoint, since) + "\n");
            std::fs::write(segment::checkpoint_path(dir), checkpoint.text).unwrap();
            since = tree.size();
        } else {
            let line = if tree.size() == 2 { line.replace("\"outcome\":\"allow\"", "\"outcome\":\"deny\"") } else { line.to_owned() };
            tree.append(leaf_hash(line.as_bytes()));
            forged += &(line + "\n");
        }
    }
    assert_ne!(forged, text);
    std::fs::write(segment(dir), forged).unwrap();
    std::fs::remove_dir_all(dir.join("tile")).unwrap();
}

#[test]
fn a_rewritten_log_needs_the_key_and_even_then_a_kept_checkpoint_shows_it() {
    let dir = written(4);
    forge(dir.path(), &TestSigner::new(9));
    assert_seen(dir.path(), "written anew and signed by another key");
    assert!(!verify(dir.path(), &VerifyOptions::default()).is_ok(), "entry 0 names the key");

    let dir = written(4);
    let kept = std::fs::read_to_string(segment::checkpoint_path(dir.path())).unwrap();
    forge(dir.path(), &TestSigner::new(1));
    assert!(verify(dir.path(), &pinned()).is_ok(), "nothing inside the log shows a stolen key");
    let report = verify(dir.path(), &VerifyOptions { checkpoint: Some(kept), ..pinned() });
    assert!(report.completeness.is_bad(), "{report:?}");
}

#[test]
fn a_log_cut_back_with_its_checkpoint_is_shown_by_one_that_was_kept() {
    let dir = tempdir();
    let log = open(dir.path());
    log.record(&entry(0)).unwrap();
    let old = log.head();
    let bytes = std::fs::read(segment(dir.path())).unwrap();
    log.record(&entry(1)).unwrap();
    let new = log.head();
    drop(log);
    // An older checkpoint is contained in the longer log.
    let with = |checkpoint: &Checkpoint| VerifyOptions { checkpoint: Some(checkpoint.text.clone()), ..pinned() };
    assert!(matches!(verify(dir.path(), &with(&old)).completeness, Verdict::Good(_)));
    assert!(matches!(verify(dir.path(), &with(&new)).completeness, Verdict::Good(_)));
    // Cut back.
    std::fs::write(segment(dir.path()), bytes).unwrap();
    std::fs::write(segment::checkpoint_path(dir.path()), &old.text).unwrap();
    std::fs::remove_dir_all(dir.path().join("tile")).unwrap();
    assert!(verify(dir.path(), &pinned()).is_ok());
    let report = verify(dir.path(), &with(&new));
    assert!(matches!(report.completeness, Verdict::Bad { entry: Some(2), .. }), "{report:?}");
}

#[test]
fn a_given_checkpoint_of_another_log_or_key_proves_nothing() {
    let dir = written(2);
    let own = std::fs::read_to_string(segment::checkpoint_path(dir.path())).unwrap();
    let head = note::open(&own, &TestSigner::new(1).public_key()).unwrap().head();
    let elsewhere = note::sign(TestSigner::new(1).as_ref(), "sealane/elsewhere", head).unwrap().text;
    let other_key = note::sign(TestSigner::new(2).as_ref(), ORIGIN, head).unwrap().text;
    for text in [elsewhere, other_key, String::new(), own.replace('\n', " "), "x".repeat(100_000)] {
        let report = verify(dir.path(), &VerifyOptions { checkpoint: Some(text), ..pinned() });
        assert!(report.completeness.is_bad(), "{report:?}");
    }
}

/// The name of a signature is not signed itself. Under another one it would be none for other programs.
#[test]
fn a_signature_under_another_name_is_none() {
    let dir = written(4);
    let (path, published) = (segment(dir.path()), segment::checkpoint_path(dir.path()));
    let renamed = |text: &str| {
        let id = |name: &str| {
            let key = [name.as_bytes(), b"\n\x01", &TestSigner::new(1).public_key()].concat();
            ring::digest::digest(&ring::digest::SHA256, &key).as_ref()[..4].to_vec()
        };
        let (body, line) = text.trim_end().split_once("\n\n").unwrap();
        let blob = note::unbase64(line.rsplit(' ').next().unwrap()).unwrap();
        assert_eq!(blob[..4], id(ORIGIN));
        format!("{body}\n\n— elsewhere {}\n", note::base64(&[&id("elsewhere"), &blob[4..]].concat()))
    };
    let (log, own) = (std::fs::read_to_string(&path).unwrap(), std::fs::read_to_string(&published).unwrap());
    let lines = log.lines().map(|line| match serde_json::from_str::<serde_json::Value>(line).unwrap() {
        mut commit if is_checkpoint_line(line.as_bytes()) => {
            commit["checkpoint"] = renamed(commit["checkpoint"].as_str().unwrap()).into();
            commit.to_string() + "\n"
        }
        _ => line.to_owned() + "\n",
    });
    let other: String = lines.collect();
    assert_ne!(other, log);
    let wrong = |what: &str, report: &VerifyReport| {
        let all = [&report.content, &report.signer, &report.completeness];
        assert!(
            all.iter().any(|verdict| verdict.is_bad() && verdict.to_string().contains("under the name `elsewhere`")),
            "{what}: {report:#?}"
        );
    };
    std::fs::write(&path, other).unwrap();
    wrong("all commits", &verify(dir.path(), &pinned()));
    wrong("all commits, no key", &verify(dir.path(), &VerifyOptions::default()));
    std::fs::write(&path, &log).unwrap();
    std::fs::write(&published, renamed(&own)).unwrap();
    wrong("what is published", &verify(dir.path(), &pinned()));
    std::fs::write(&published, &own).unwrap();
    wrong("what was kept", &verify(dir.path(), &VerifyOptions { checkpoint: Some(renamed(&own)), ..pinned() }));
    assert!(verify(dir.path(), &pinned()).is_ok());
}

#[test]
fn a_directory_without_a_log_is_none_and_what_cannot_be_read_is_said_with_its_reason() {
    let report = verify(tempdir().path(), &VerifyOptions::default());
    assert!(report.content.is_bad() && report.content.to_string().contains("neither entries nor a checkpoint"), "{report:#?}");
    let dir = written(2);
    std::fs::write(segment::checkpoint_path(dir.path()), "x".repeat(1 << 20)).unwrap();
    let report = verify(dir.path(), &pinned());
    assert!(report.signer.is_bad() && report.signer.to_string().contains("longer than"), "{report:#?}");
    std::fs::remove_file(segment(dir.path())).unwrap();
    std::os::unix::fs::symlink("/dev/zero", segment(dir.path())).unwrap();
    let report = verify(dir.path(), &pinned());
    assert!(report.content.is_bad() && report.content.to_string().contains("symbolic links"), "{report:#?}");
}

#[test]
fn missing_files_and_links_are_refused() {
    let dir = written(2);
    let aside = tempdir();
    let moved = |path: PathBuf| {
        let to = aside.path().join("moved");
        std::fs::rename(&path, &to).unwrap();
        assert_seen(dir.path(), &format!("{} is gone", path.display()));
        std::os::unix::fs::symlink(&to, &path).unwrap();
        assert_seen(dir.path(), &format!("{} is a link", path.display()));
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&to, &path).unwrap();
    };
    moved(segment(dir.path()));
    std::fs::remove_file(segment::checkpoint_path(dir.path())).unwrap();
    assert!(verify(dir.path(), &pinned()).signer.is_bad());
    drop(open(dir.path()));
    assert!(verify(dir.path(), &pinned()).is_ok());
    std::fs::write(dir.path().join("audit-7.jsonl"), "").unwrap();
    assert_seen(dir.path(), "a file that is named like a segment");
    assert!(!verify(&dir.path().join("nowhere"), &pinned()).is_ok());
}

#[test]
fn a_segment_in_the_middle_cannot_be_left_out() {
    let dir = tempdir();
    let log = AuditLog::open_on(std::sync::Arc::new(disk::RealDisk), dir.path(), ORIGIN, TestSigner::new(1), 1200).unwrap();
    for number in 0..8 {
        log.record(&entry(number)).unwrap();
    }
    drop(log);
    assert!(verify(dir.path(), &pinned()).is_ok());
    let segments = segment::list(dir.path()).unwrap();
    assert!(segments.len() >= 4, "{segments:?}");
    for segment in segments {
        let bytes = std::fs::read(&segment.path).unwrap();
        std::fs::remove_file(&segment.path).unwrap();
        assert_seen(dir.path(), &format!("{} is gone", segment.path.display()));
        std::fs::write(&segment.path, bytes).unwrap();
    }
    assert!(verify(dir.path(), &pinned()).is_ok());
}
