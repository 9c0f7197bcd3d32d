//! Heads that peers send.

use super::*;
use crate::audit::chain::Head;
use crate::types::SpiffeId;

const PEER_ORIGIN: &str = "sealane/dc2.example.net/gw-b";

fn peer() -> SpiffeId {
    "spiffe://dc2.example.net/gateway/gw-b".parse().unwrap()
}

fn head(seed: u8, origin: &str, size: u64, root: u8) -> String {
    note::sign(TestSigner::new(seed).as_ref(), origin, Head { size, root: [root; 32] }).unwrap().text
}

fn note_head(log: &AuditLog, text: &str) -> Result<(), AuditError> {
    log.note_peer_head(&peer(), text, &TestSigner::new(2).public_key())
}

#[test]
fn a_peer_s_log_may_only_grow() {
    let dir = tempdir();
    let log = open(dir.path());
    note_head(&log, &head(2, PEER_ORIGIN, 5, 1)).unwrap();
    note_head(&log, &head(2, PEER_ORIGIN, 9, 2)).unwrap();
    let went_back = note_head(&log, &head(2, PEER_ORIGIN, 8, 3)).unwrap_err();
    assert!(went_back.to_string().contains("went back from 9 to 8"), "{went_back}");
    let forked = note_head(&log, &head(2, PEER_ORIGIN, 9, 3)).unwrap_err();
    assert!(forked.to_string().contains("two different logs"), "{forked}");
    let other = note_head(&log, &head(2, "sealane/new", 20, 3)).unwrap_err();
    assert!(other.to_string().contains("is of log"), "{other}");
    note_head(&log, &head(2, PEER_ORIGIN, 10, 4)).unwrap();
    assert_eq!(log.peer_head(&peer()).unwrap().size, 10);
    // Another peer is another matter.
    log.note_peer_head(&"spiffe://dc3/gw".parse().unwrap(), &head(3, "sealane/dc3", 1, 1), &TestSigner::new(3).public_key()).unwrap();
}

#[test]
fn what_was_kept_of_a_peer_survives_a_restart_and_refusals_are_evidence() {
    let dir = tempdir();
    let log = open(dir.path());
    note_head(&log, &head(2, PEER_ORIGIN, 9, 2)).unwrap();
    assert!(note_head(&log, &head(2, PEER_ORIGIN, 1, 2)).is_err());
    drop(log);
    let log = open(dir.path());
    assert_eq!(log.peer_head(&peer()).unwrap().text, head(2, PEER_ORIGIN, 9, 2));
    assert!(note_head(&log, &head(2, PEER_ORIGIN, 8, 3)).is_err());
    let before = log.head().size;
    note_head(&log, &head(2, PEER_ORIGIN, 9, 2)).unwrap();
    assert_eq!(log.head().size, before, "the same head is kept once");
    let filter = Filter { event: Some(Event::PeerHead), ..Filter::default() };
    let outcomes: Vec<_> = read(dir.path(), filter).unwrap().map(|entry| entry.unwrap().outcome.unwrap()).collect();
    assert_eq!(outcomes, [Outcome::Done, Outcome::Refused, Outcome::Refused]);
}

#[test]
fn heads_that_are_not_signed_by_the_peer_are_refused() {
    let dir = tempdir();
    let log = open(dir.path());
    let good = head(2, PEER_ORIGIN, 5, 1);
    let mut bad =
        vec![head(3, PEER_ORIGIN, 5, 1), String::new(), "x".repeat(1 << 20), good.replace("\n5\n", "\n05\n"), format!("{good}{good}")];
    bad.extend((0..good.len()).filter(|at| good.is_char_boundary(*at)).map(|at| good[..at].to_owned()));
    bad.push(good.replace("\n5\n", "\n6\n"));
    for text in bad {
        assert!(matches!(note_head(&log, &text), Err(AuditError::PeerHead { .. })), "{text:?}");
    }
    assert_eq!(log.head().size, 1, "what is not signed leaves no trace");
    note_head(&log, &good).unwrap();
}

#[test]
fn two_gateways_keep_each_other_s_heads_and_a_rewrite_shows() {
    let (a, b) = (tempdir(), tempdir());
    let log_a = open(a.path());
    let log_b = AuditLog::open(b.path(), PEER_ORIGIN, TestSigner::new(2)).unwrap();
    log_b.record(&entry(0)).unwrap();
    note_head(&log_a, &log_b.head().text).unwrap();
    drop(log_b);
    // B wipes its log and begins a new one under the same name.
    std::fs::remove_dir_all(b.path()).unwrap();
    let log_b = AuditLog::open(b.path(), PEER_ORIGIN, TestSigner::new(2)).unwrap();
    assert!(note_head(&log_a, &log_b.head().text).is_err());
    // What A kept is enough to show it offline.
    let checkpoint = log_a.peer_head(&peer()).map(|head| head.text);
    let report = verify(b.path(), &VerifyOptions { public_key: Some(TestSigner::new(2).public_key()), checkpoint });
    assert!(report.completeness.is_bad(), "{report:?}");
}
