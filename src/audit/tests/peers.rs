//! Gateways as each other's witnesses.

use super::*;
use crate::types::{MigrationId, SpiffeId};

const PEER_ORIGIN: &str = "sealane/dc2.example.net/gw-b";
const MIGRATION: MigrationId = MigrationId([2; 16]);

fn peer() -> SpiffeId {
    "spiffe://dc2.example.net/gateway/gw-b".parse().unwrap()
}

fn own() -> SpiffeId {
    "spiffe://dc1.example.net/gateway/gw-a".parse().unwrap()
}

fn key(seed: u8) -> [u8; 32] {
    TestSigner::new(seed).public_key()
}

/// The peer's log.
fn open_peer(dir: &Path) -> AuditLog {
    AuditLog::open(dir, PEER_ORIGIN, TestSigner::new(2)).unwrap()
}

fn handover(record: &str) -> Entry {
    Entry::new(Event::Handoff).migration(MIGRATION).outcome(Outcome::Done).detail("record", record)
}

/// `from` shows itself to `to`, until it is cosigned; returns how often it had to.
fn exchange(from: (&AuditLog, u8, &SpiffeId), to: (&AuditLog, u8, &SpiffeId), migration: Option<MigrationId>) -> Result<usize, AuditError> {
    let mut start = None;
    for times in 1..4 {
        let shown = from.0.announce(to.2, start, migration)?;
        match to.0.keep_peer_head(from.2, &key(from.1), &shown, migration)? {
            Answer::Cosigned(size, line) => {
                from.0.keep_cosignature(to.2, &key(to.1), size, &line)?;
                return Ok(times);
            }
            Answer::From(size) => start = Some(size),
        }
    }
    panic!("no end of it");
}

struct Pair {
    dirs: (TempDir, TempDir),
    a: AuditLog,
    b: AuditLog,
}

impl Pair {
    fn new() -> Self {
        let dirs = (tempdir(), tempdir());
        let (a, b) = (open(dirs.0.path()), open_peer(dirs.1.path()));
        Self { dirs, a, b }
    }

    fn b_to_a(&self, migration: Option<MigrationId>) -> Result<usize, AuditError> {
        exchange((&self.b, 2, &peer()), (&self.a, 1, &own()), migration)
    }

    fn a_to_b(&self, migration: Option<MigrationId>) -> Result<usize, AuditError> {
        exchange((&self.a, 1, &own()), (&self.b, 2, &peer()), migration)
    }
}

fn witnesses(dir: &Path, keys: &[u8]) -> Verdict {
    let own = if dir.join("proofs").exists() || keys.first() == Some(&2) { 1 } else { 2 };
    let options = VerifyOptions {
        public_key: Some(key(own)),
        witness_keys: keys.iter().map(|seed| key(*seed)).collect(),
        ..VerifyOptions::default()
    };
    verify(dir, &options).witnesses
}

#[test]
fn after_a_handoff_both_hold_the_other_s_proof_and_cosignature() {
    let pair = Pair::new();
    pair.a.record(&handover("commit")).unwrap();
    pair.b.record(&handover("run")).unwrap();
    for log in [&pair.a, &pair.b] {
        log.record(&entry(1)).unwrap();
    }
    assert_eq!((pair.a_to_b(Some(MIGRATION)).unwrap(), pair.b_to_a(Some(MIGRATION)).unwrap()), (1, 1));
    let Pair { dirs, a, b } = pair;
    drop((a, b));
    for (dir, record, owner, witness) in [(&dirs.0, "run", 2, 1), (&dirs.1, "commit", 1, 2)] {
        let text = std::fs::read_to_string(dir.path().join(format!("proofs/{MIGRATION}-{record}.tlog-proof"))).unwrap();
        let proof = Proof::read(&text).unwrap();
        assert_eq!((proof.entry.event, proof.entry.migration), (Event::Handoff, Some(MIGRATION)));
        assert_eq!(proof.entry.detail["record"], record);
        proof.check_signer(&key(owner)).unwrap();
        assert!(proof.check_witness(&key(witness)).unwrap() > 1_600_000_000);
        assert!(proof.check_signer(&key(witness)).is_err() && proof.check_witness(&key(owner)).is_err());
        let options = VerifyOptions { public_key: Some(key(witness)), witness_keys: vec![key(owner)], ..VerifyOptions::default() };
        let report = verify(dir.path(), &options);
        assert!(matches!(&report.witnesses, Verdict::Good(why) if why.contains("1 proofs hold")), "{report:?}");
    }
}

// SPEC: PROTOCOL.md#must-head-grows
#[test]
fn a_peer_s_log_may_only_grow() {
    let Pair { dirs, a, b } = Pair::new();
    for number in 0..5 {
        b.record(&entry(number)).unwrap();
        exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap();
    }
    let last = a.peer_head(&peer()).unwrap();
    let known = last.size;
    let refused = |log: &AuditLog, words: &str| {
        let shown = log.announce(&own(), Some(0), None).unwrap();
        let error = a.keep_peer_head(&peer(), &key(2), &Announcement { from: known, ..shown }, None).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    // Written anew: shorter, as long, longer.
    let other = tempdir();
    let anew = open_peer(other.path());
    refused(&anew, "went back");
    while anew.head().size < known {
        anew.record(&entry(7)).unwrap();
    }
    refused(&anew, "two different logs");
    anew.record(&entry(8)).unwrap();
    refused(&anew, "not shown to extend");
    let shown = anew.announce(&own(), None, None).unwrap();
    assert_eq!(a.keep_peer_head(&peer(), &key(2), &shown, None).unwrap(), Answer::From(known), "from where it is known");
    // The fork's own proof from there is as good as any, and leads elsewhere.
    let shown = anew.announce(&own(), Some(known), None).unwrap();
    let forked = a.keep_peer_head(&peer(), &key(2), &shown, None).unwrap_err();
    assert!(forked.to_string().contains("does not begin with the log as it was"), "{forked}");
    let named = tempdir();
    refused(&AuditLog::open(named.path(), "sealane/new", TestSigner::new(2)).unwrap(), "is of log");
    assert_eq!(a.peer_head(&peer()).unwrap().text, last.text);
    // The true one goes on, and another peer is another matter.
    b.record(&entry(9)).unwrap();
    assert_eq!(exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap(), 1);
    exchange((&anew, 2, &"spiffe://dc3/gw".parse().unwrap()), (&a, 1, &own()), None).unwrap();
    drop((a, b));
    let filter = Filter { event: Some(Event::PeerHead), outcome: Some(Outcome::Refused), ..Filter::default() };
    assert_eq!(read(dirs.0.path(), filter).unwrap().count(), 5, "refusals are evidence");
}

#[test]
fn whoever_forgot_is_shown_the_log_from_where_it_is() {
    let Pair { dirs, a, b } = Pair::new();
    exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap();
    b.record(&entry(1)).unwrap();
    // A lost its log: B begins with what A cosigned once.
    drop(a);
    std::fs::remove_dir_all(dirs.0.path()).unwrap();
    let a = open(dirs.0.path());
    assert_eq!(exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap(), 2);
    // B lost its own, and hears that it did.
    drop(b);
    std::fs::remove_dir_all(dirs.1.path()).unwrap();
    let b = open_peer(dirs.1.path());
    let error = exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap_err();
    assert!(error.to_string().contains("went back"), "{error}");
}

#[test]
fn a_gateway_whose_log_was_cut_back_says_so_itself() {
    let Pair { dirs, a, b } = Pair::new();
    exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap();
    let known = a.peer_head(&peer()).unwrap().size;
    drop(b);
    std::fs::remove_dir_all(dirs.1.path()).unwrap();
    let b = open_peer(dirs.1.path());
    let error = b.announce(&own(), Some(known + 5), None).unwrap_err();
    assert!(error.to_string().contains("this log went back"), "{error}");
    let filter = Filter { event: Some(Event::HeadCosigned), outcome: Some(Outcome::Refused), ..Filter::default() };
    assert_eq!(read(dirs.1.path(), filter).unwrap().count(), 1);
}

#[test]
fn what_is_known_of_peers_survives_a_restart() {
    let Pair { dirs, a, b } = Pair::new();
    exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap();
    exchange((&a, 1, &own()), (&b, 2, &peer()), None).unwrap();
    let head = a.peer_head(&peer()).unwrap();
    drop(a);
    let a = open(dirs.0.path());
    assert_eq!(a.peer_head(&peer()).unwrap(), head);
    // The same head again is kept once, and cosigned again.
    let shown = Announcement { checkpoint: head.text.clone(), from: head.size, consistency: Vec::new(), proof: None };
    let before = a.head().size;
    assert!(matches!(a.keep_peer_head(&peer(), &key(2), &shown, None).unwrap(), Answer::Cosigned(size, _) if size == head.size));
    assert_eq!(a.head().size, before);
    assert_eq!(exchange((&a, 1, &own()), (&b, 2, &peer()), None).unwrap(), 1, "it knows what was cosigned");
    assert_eq!(exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap(), 1);
}

#[test]
fn announcements_that_are_not_the_peer_s_are_refused() {
    let Pair { dirs: _dirs, a, b } = Pair::new();
    b.record(&handover("run")).unwrap();
    let good = b.announce(&own(), None, Some(MIGRATION)).unwrap();
    let text = &good.checkpoint;
    let mut bad =
        vec![String::new(), "x".repeat(1 << 20), text.replace("\n2\n", "\n02\n"), text.replace("\n2\n", "\n3\n"), format!("{text}{text}")];
    bad.extend((0..text.len()).filter(|at| text.is_char_boundary(*at)).map(|at| text[..at].to_owned()));
    for checkpoint in bad {
        let shown = Announcement { checkpoint: checkpoint.clone(), ..good.clone() };
        assert!(a.keep_peer_head(&peer(), &key(2), &shown, None).is_err(), "{checkpoint:?}");
    }
    assert!(a.keep_peer_head(&peer(), &key(3), &good, None).is_err());
    assert_eq!(a.head().size, 1, "what is not signed leaves no trace");
    // Proofs of something else.
    let proof = good.proof.clone().unwrap();
    b.record(&handover("abort")).unwrap();
    b.record(&handover("run").migration(MigrationId([9; 16]))).unwrap();
    let of_other = b.announce(&own(), None, Some(MigrationId([9; 16]))).unwrap();
    assert!(b.announce(&own(), None, Some(MigrationId([8; 16]))).unwrap().proof.is_none());
    for (shown, words) in [
        (Announcement { proof: Some(proof.clone()), ..of_other.clone() }, "under another head"),
        (of_other.clone(), "about something else"),
        (Announcement { proof: Some(proof.replace("index 1", "index 0")), ..good.clone() }, "is of entry 0"),
        (Announcement { proof: Some(proof.replace("extra ", "extra A")), ..good.clone() }, "not base64"),
        (Announcement { proof: Some(String::new()), ..good.clone() }, "first line"),
    ] {
        let error = a.keep_peer_head(&peer(), &key(2), &shown, Some(MIGRATION)).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    let unasked = Announcement { consistency: vec![[0; 32]], ..good.clone() };
    assert_eq!(a.keep_peer_head(&peer(), &key(2), &unasked, Some(MIGRATION)).unwrap(), Answer::From(0));
    a.keep_peer_head(&peer(), &key(2), &good, Some(MIGRATION)).unwrap();
}

#[test]
fn a_cosignature_counts_only_from_whom_and_for_what_it_was_asked() {
    let Pair { dirs: _dirs, a, b } = Pair::new();
    let shown = b.announce(&own(), None, None).unwrap();
    let Answer::Cosigned(size, line) = a.keep_peer_head(&peer(), &key(2), &shown, None).unwrap() else { panic!() };
    let head = note::read(&shown.checkpoint).unwrap();
    let other = note::cosign(TestSigner::new(3).as_ref(), &head, 5).unwrap();
    assert!(b.keep_cosignature(&own(), &key(1), size + 1, &line).unwrap_err().to_string().contains("was not shown"));
    for bad in [other.as_str(), "", "junk\n"] {
        b.announce(&own(), None, None).unwrap();
        let error = b.keep_cosignature(&own(), &key(1), size, bad).unwrap_err();
        assert!(matches!(error, AuditError::PeerHead { .. }), "{error}");
    }
    assert!(b.keep_cosignature(&own(), &key(1), size, &line).unwrap_err().to_string().contains("was not shown"));
    b.announce(&own(), None, None).unwrap();
    b.keep_cosignature(&own(), &key(1), size, &line).unwrap();
}

#[test]
fn a_log_sealed_anew_with_the_stolen_key_is_shown_by_what_the_peer_kept() {
    let Pair { dirs, a, b } = Pair::new();
    b.record(&entry(0)).unwrap();
    exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap();
    drop(b);
    std::fs::remove_dir_all(dirs.1.path()).unwrap();
    let b = open_peer(dirs.1.path());
    for number in 5..9 {
        b.record(&entry(number)).unwrap();
    }
    drop(b);
    let checkpoint = a.peer_head(&peer()).map(|head| head.text);
    let report = verify(dirs.1.path(), &VerifyOptions { public_key: Some(key(2)), checkpoint, ..VerifyOptions::default() });
    assert!(report.completeness.is_bad(), "{report:?}");
    assert!(!report.content.is_bad() && !report.signer.is_bad(), "{report:?}");
}

#[test]
fn the_witnesses_verdict_says_what_is_proven() {
    let Pair { dirs, a, b } = Pair::new();
    assert!(matches!(witnesses(dirs.0.path(), &[]), Verdict::Open(_)));
    assert!(witnesses(dirs.0.path(), &[2]).is_bad(), "a key that is nobody's");
    b.record(&handover("run")).unwrap();
    exchange((&b, 2, &peer()), (&a, 1, &own()), Some(MIGRATION)).unwrap();
    let only_kept = witnesses(dirs.0.path(), &[2]);
    assert!(matches!(&only_kept, Verdict::Open(why) if why.contains("has not cosigned")), "{only_kept:?}");
    exchange((&a, 1, &own()), (&b, 2, &peer()), None).unwrap();
    assert!(matches!(witnesses(dirs.0.path(), &[2]), Verdict::Good(_)));
    let missing = witnesses(dirs.0.path(), &[2, 3]);
    assert!(missing.is_bad(), "{missing:?}");
}

#[test]
fn a_head_of_a_peer_under_another_key_is_not_taken_for_the_peer_s() {
    let Pair { dirs, a, b } = Pair::new();
    exchange((&b, 2, &peer()), (&a, 1, &own()), None).unwrap();
    exchange((&a, 1, &own()), (&b, 2, &peer()), None).unwrap();
    assert!(matches!(witnesses(dirs.0.path(), &[2]), Verdict::Good(_)));
    // Whoever holds our own key can write into our log what a peer never signed.
    let head = tree::Head { size: 900, root: [1; 32] };
    let forged = note::sign(TestSigner::new(3).as_ref(), PEER_ORIGIN, head).unwrap();
    let entry = Entry::new(Event::PeerHead).peer(peer().as_str()).outcome(Outcome::Done).detail("checkpoint", forged.text);
    a.record(&entry.detail("public_key", entry::hex(&key(3)))).unwrap();
    let verdict = witnesses(dirs.0.path(), &[2]);
    assert!(matches!(&verdict, Verdict::Bad { why, .. } if why.contains("by another key than given")), "{verdict:?}");
}

/// The engine asks on threads that serve everybody, also while a head is being recorded on a slow disk.
#[test]
fn whether_a_head_is_due_is_answered_while_heads_are_recorded() {
    let dir = tempdir();
    let log = open(dir.path());
    assert!(log.head_is_due(&peer()));
    log.announce(&peer(), None, None).unwrap();
    let recording = log.known();
    let (said, hear) = std::sync::mpsc::sync_channel(1);
    let asked = log.clone();
    std::thread::spawn(move || said.send((asked.head_is_due(&peer()), asked.head_is_due(&own()))));
    let answer = hear.recv_timeout(std::time::Duration::from_secs(60)).expect("an answer although heads are being recorded");
    assert_eq!(answer, (false, true));
    drop(recording);
}
