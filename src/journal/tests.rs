use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use super::*;

fn journal() -> (tempfile::TempDir, Journal) {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(&directory.path().join("state/state.redb")).unwrap();
    (directory, journal)
}

const A: MigrationId = MigrationId([1; 16]);
const B: MigrationId = MigrationId([2; 16]);

#[test]
fn records_come_back_in_order_for_each_migration_after_a_restart() {
    let (_directory, journal) = journal();
    assert_eq!(journal.append(A, b"offer").unwrap(), 1);
    assert_eq!(journal.append(B, b"other").unwrap(), 1);
    assert_eq!(journal.append(A, b"commit").unwrap(), 2);
    let path = journal.path().to_owned();
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.records(A).unwrap(), vec![(1, b"offer".to_vec()), (2, b"commit".to_vec())]);
    assert_eq!(journal.migrations().unwrap(), vec![A, B]);
    journal.forget(A).unwrap();
    assert_eq!(journal.migrations().unwrap(), vec![B]);
    assert_eq!(journal.records(B).unwrap().len(), 1);
}

#[test]
fn incarnation_survives_a_restart_and_not_the_file() {
    let (_directory, journal) = journal();
    let (path, first) = (journal.path().to_owned(), journal.incarnation());
    drop(journal);
    assert_eq!(Journal::open(&path).unwrap().incarnation(), first);
    std::fs::remove_file(&path).unwrap();
    assert_ne!(Journal::open(&path).unwrap().incarnation(), first);
}

#[test]
fn the_file_is_for_its_owner_only() {
    let (_directory, journal) = journal();
    assert_eq!(std::fs::metadata(journal.path()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_second_opening_is_refused_by_name() {
    let (_directory, journal) = journal();
    let error = Journal::open(journal.path()).unwrap_err();
    assert!(matches!(error, JournalError::InUse { .. }), "{error}");
}

#[test]
fn another_kind_of_file_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let text = "this is not a database\n".repeat(1000);
    std::fs::write(&path, &text).unwrap();
    let error = Journal::open(&path).unwrap_err();
    assert!(matches!(error, JournalError::NotAJournal { .. }), "{error:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn placements_are_replaced_and_removed_by_name() {
    let (_directory, journal) = journal();
    let (web, db): (VmName, VmName) = ("web".parse().unwrap(), "db".parse().unwrap());
    journal.put_vm(&web, b"here").unwrap();
    journal.put_vm(&db, b"here").unwrap();
    assert_eq!(journal.append_and_place(A, b"run", &web, b"gone").unwrap(), 1);
    assert_eq!(journal.vms().unwrap(), vec![(db.clone(), b"here".to_vec()), (web.clone(), b"gone".to_vec())]);
    journal.remove_vm(&db).unwrap();
    assert_eq!((journal.vm(&db).unwrap(), journal.vm(&web).unwrap()), (None, Some(b"gone".to_vec())));
}

#[test]
fn history_keeps_the_newest() {
    let (_directory, journal) = journal();
    for number in 0u8..10 {
        journal.put_history(&[number], 3).unwrap();
    }
    assert_eq!(journal.history().unwrap(), vec![vec![9], vec![8], vec![7]]);
}

#[test]
fn the_position_counts_every_record_and_survives_and_reserving_changes_nothing_of_it() {
    let (directory, journal) = journal();
    for record in [A, B, A] {
        journal.append(record, b"record").unwrap();
    }
    journal.reserve().unwrap();
    assert_eq!((journal.position(), journal.records(A).unwrap().len()), (3, 2));
    let path = journal.path().to_owned();
    drop(journal);
    assert_eq!(Journal::open(&path).unwrap().position(), 3);
    drop(directory);
}

#[test]
fn a_record_beyond_the_limit_is_refused_before_it_is_written() {
    let (_directory, journal) = journal();
    let error = journal.append(A, &vec![0; JOURNAL_RECORD_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, JournalError::TooLarge { .. }), "{error}");
    assert!(journal.records(A).unwrap().is_empty());
}

/// Not a test of its own: the process that the next test kills.
#[test]
fn writes_until_killed_when_told_to() {
    let Some(path) = std::env::var_os("SEALANE_TEST_JOURNAL") else { return };
    let journal = Journal::open(Path::new(&path)).unwrap();
    let mut out = std::io::stdout();
    loop {
        let number = journal.append(A, b"record").unwrap();
        writeln!(out, "acknowledged {number}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_a_killed_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let mut acknowledged = 0;
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "journal::tests::writes_until_killed_when_told_to", "--nocapture"])
            .env("SEALANE_TEST_JOURNAL", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut count = 0;
        while count < 20 {
            let mut line = String::new();
            assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the writer ended by itself");
            count += usize::from(line.contains("acknowledged"));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        acknowledged += count + rest.matches("acknowledged").count();
        let records = Journal::open(&path).unwrap().records(A).unwrap();
        // One more may be durable without its acknowledgement having been read.
        assert!(records.len() >= acknowledged, "{} acknowledged, {} found", acknowledged, records.len());
        assert!(records.iter().zip(1..).all(|((number, _), expected)| *number == expected));
        acknowledged = records.len();
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_and_loses_nothing_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("small");
    std::fs::create_dir(&place).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&place).stderr(Stdio::null()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("SKIPPED: a_full_disk_is_said_and_loses_nothing_acknowledged: this user cannot mount a tmpfs");
        return;
    }
    let _mounted = Mounted(place.clone());
    let path = place.join("state.redb");
    let journal = Journal::open(&path).unwrap();
    let record = vec![7; 64 * 1024];
    let mut acknowledged = 0;
    let error = loop {
        match journal.append(A, &record) {
            Ok(number) => acknowledged = number,
            Err(error) => break error,
        }
        assert!(acknowledged < 1000, "the disk never filled");
    };
    assert!(error.is_disk_full(), "{error:?}");
    assert!(error.to_string().contains("state.redb"), "{error}");
    assert!(acknowledged > 0);
    assert!(journal.append(A, b"x").is_err(), "fail-stop: no write after a failed one");
    drop(journal);
    let grown = Command::new("mount").args(["-o", "remount,size=32m"]).arg(&place).status().unwrap();
    assert!(grown.success());
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.records(A).unwrap().len() as u64, acknowledged);
    assert_eq!(journal.append(A, b"after").unwrap(), acknowledged + 1);
}

#[test]
fn a_proposal_is_kept_over_a_restart_replaced_and_dropped() {
    let (_directory, journal) = journal();
    journal.put_proposal(A, b"first").unwrap();
    journal.put_proposal(B, b"other").unwrap();
    journal.put_proposal(A, b"second").unwrap();
    let path = journal.path().to_owned();
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.proposals().unwrap(), vec![(A, b"second".to_vec()), (B, b"other".to_vec())]);
    journal.remove_proposal(A).unwrap();
    journal.remove_proposal(A).unwrap();
    assert_eq!(journal.proposals().unwrap(), vec![(B, b"other".to_vec())]);
    let error = journal.put_proposal(A, &vec![0; JOURNAL_RECORD_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, JournalError::TooLarge { .. }), "{error}");
}

#[test]
fn a_record_has_the_time_at_which_it_was_added() {
    let (_directory, journal) = journal();
    let before = now_unix_ms();
    journal.append(A, b"offer").unwrap();
    let added = journal.added_at(A, 1).unwrap().unwrap();
    assert!((before..=now_unix_ms()).contains(&added), "{added}");
    assert_eq!((journal.added_at(A, 2).unwrap(), journal.added_at(B, 1).unwrap()), (None, None));
    journal.forget(A).unwrap();
    assert_eq!(journal.added_at(A, 1).unwrap(), None);
}
