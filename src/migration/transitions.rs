//! Every state against every event, kept in `transitions.txt`: a change of the protocol shows there.

use std::fmt::Write;
use std::time::Duration;

use super::*;
use crate::types::{Epoch, Incarnation, MigrationId, Round, VmUuid};
use crate::wire::{ErrorClass, FinalDigest, Handoff};

const DIGEST: FinalDigest = FinalDigest { state: [1; 32], lanes: [2; 32], memory: 3 };
const OTHER: FinalDigest = FinalDigest { state: [9; 32], lanes: [2; 32], memory: 3 };

pub(super) fn offer() -> Box<OfferRecord> {
    Box::new(OfferRecord {
        migration: MigrationId([1; 16]),
        vm: "vm-1".parse().unwrap(),
        uuid: VmUuid([2; 16]),
        epoch: Epoch(4),
        peer: "spiffe://dc2/gateway/b".parse().unwrap(),
        peer_incarnation: Incarnation([3; 16]),
        peer_key: [4; 32],
        policy_digest: [5; 32],
        address: "socket".into(),
    })
}

pub(super) fn prepared() -> Box<PreparedRecord> {
    Box::new(PreparedRecord {
        migration: MigrationId([1; 16]),
        vm: "vm-1".parse().unwrap(),
        uuid: VmUuid([2; 16]),
        epoch: Epoch(5),
        peer: "spiffe://dc1/gateway/a".parse().unwrap(),
        peer_incarnation: Incarnation([6; 16]),
        peer_key: [7; 32],
        digest: DIGEST,
        address: "socket".into(),
    })
}

fn messages() -> Vec<(&'static str, Handoff)> {
    vec![
        ("FINAL", Handoff::Final { digest: DIGEST, lanes: 1 }),
        ("PREPARED", Handoff::Prepared { digest: DIGEST }),
        ("PREPARED(other digest)", Handoff::Prepared { digest: OTHER }),
        ("COMMIT", Handoff::Commit),
        ("RUNNING", Handoff::Running),
        ("DONE", Handoff::Done),
        ("ABORT", Handoff::Abort { class: ErrorClass::Cancelled }),
        ("REFUSE", Handoff::Refuse { class: ErrorClass::Local }),
    ]
}

fn source_steps() -> Vec<(String, SourceStep)> {
    let mut steps = vec![
        ("finalised".into(), SourceStep::Finalised { digest: DIGEST, lanes: 1 }),
        ("commit-permitted".into(), SourceStep::CommitPermitted),
        ("commit-denied".into(), SourceStep::CommitDenied),
        ("give-up".into(), SourceStep::GiveUp(ErrorClass::Cancelled)),
        ("reconnected".into(), SourceStep::Reconnected),
    ];
    for incarnation_same in [true, false] {
        for (name, step) in messages() {
            let name = if incarnation_same { name.to_owned() } else { format!("{name} of a new journal") };
            steps.push((name, SourceStep::Received { step, incarnation_same }));
        }
    }
    steps
}

fn source_states() -> Vec<SourceHandoff> {
    vec![
        SourceHandoff::Offered,
        SourceHandoff::AwaitPrepared { digest: DIGEST, lanes: 1 },
        SourceHandoff::AwaitCommitPermit,
        SourceHandoff::Committed,
        SourceHandoff::Aborted,
        SourceHandoff::Reclaimed,
        SourceHandoff::Done,
    ]
}

fn destination_steps() -> Vec<(String, DestinationStep)> {
    let mut steps: Vec<(String, DestinationStep)> = vec![
        ("twin-complete".into(), DestinationStep::TwinComplete(prepared())),
        ("commit-permitted".into(), DestinationStep::CommitPermitted),
        ("commit-denied".into(), DestinationStep::CommitDenied),
        ("give-up".into(), DestinationStep::GiveUp(ErrorClass::Local)),
        ("reconnected".into(), DestinationStep::Reconnected),
    ];
    steps.extend(messages().into_iter().map(|(name, step)| (name.to_owned(), DestinationStep::Received(step))));
    steps
}

fn destination_states() -> Vec<DestinationHandoff> {
    vec![
        DestinationHandoff::Receiving,
        DestinationHandoff::AwaitCommitPermit { record: prepared() },
        DestinationHandoff::Prepared { digest: DIGEST },
        DestinationHandoff::Running,
        DestinationHandoff::Refused,
        DestinationHandoff::Closed,
    ]
}

fn describe<R: std::fmt::Debug>(actions: &[HandoffAction<R>]) -> String {
    let names = actions.iter().map(|action| match action {
        HandoffAction::Journal(record) => {
            let record = format!("{record:?}");
            format!("journal {}", record.split(['(', ' ']).next().unwrap_or_default().to_uppercase())
        }
        HandoffAction::Send(step) => format!("send {}", handoff::handoff_name(step)),
        HandoffAction::AskCommit => "ask policy".into(),
        HandoffAction::Resume => "RESUME".into(),
        HandoffAction::Destroy => "destroy".into(),
        HandoffAction::End(outcome) => format!("end {outcome:?}").to_lowercase(),
    });
    names.collect::<Vec<_>>().join(", ")
}

fn matrix() -> String {
    let mut out = String::from("Every state of the handoff against every event. `-` is refused and changes nothing.\n\nSOURCE\n");
    for state in source_states() {
        for (name, step) in source_steps() {
            let mut next = state.clone();
            match next.step(&step) {
                Ok(actions) => writeln!(out, "{:20} {name:34} => {:20} {}", state.name(), next.name(), describe(&actions)).unwrap(),
                Err(_) => {
                    assert_eq!(next, state, "a refused event changed the state");
                    writeln!(out, "{:20} {name:34} -", state.name()).unwrap();
                }
            }
        }
    }
    out.push_str("\nDESTINATION\n");
    for state in destination_states() {
        for (name, step) in destination_steps() {
            let mut next = state.clone();
            match next.step(&step) {
                Ok(actions) => writeln!(out, "{:20} {name:34} => {:20} {}", state.name(), next.name(), describe(&actions)).unwrap(),
                Err(_) => {
                    assert_eq!(next, state, "a refused event changed the state");
                    writeln!(out, "{:20} {name:34} -", state.name()).unwrap();
                }
            }
        }
    }
    out
}

#[test]
fn the_matrix_is_the_committed_one() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/migration/transitions.txt");
    let now = matrix();
    if std::env::var_os("SEALANE_BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(now == committed, "the handoff changed; read the difference and run with SEALANE_BLESS=1:\n{now}");
}

#[test]
fn a_source_resumes_only_behind_a_journaled_abort_or_reclaim() {
    for state in source_states() {
        for (name, step) in source_steps() {
            let Ok(actions) = state.clone().step(&step) else { continue };
            if let Some(at) = actions.iter().position(|a| *a == HandoffAction::Resume) {
                let before = &actions[..at];
                let journaled = before.iter().any(|a| matches!(a, HandoffAction::Journal(SourceRecord::Abort | SourceRecord::Reclaim)));
                assert!(journaled, "{} + {name} resumes without a record", state.name());
            }
        }
    }
}

#[test]
fn after_commit_a_source_resumes_only_on_refuse_from_the_same_journal() {
    for (name, step) in source_steps() {
        let resumes = matches!(&SourceHandoff::Committed.step(&step), Ok(actions) if actions.contains(&HandoffAction::Resume));
        assert_eq!(resumes, name == "REFUSE", "{name}");
    }
}

#[test]
fn a_destination_resumes_only_on_commit_and_behind_run() {
    for state in destination_states() {
        for (name, step) in destination_steps() {
            let Ok(actions) = state.clone().step(&step) else { continue };
            if let Some(at) = actions.iter().position(|a| *a == HandoffAction::Resume) {
                assert_eq!((state.name(), name.as_str()), ("prepared", "COMMIT"));
                assert!(actions[..at].contains(&HandoffAction::Journal(DestinationRecord::Run)));
            }
        }
    }
}

#[test]
fn a_journal_says_what_a_restarted_gateway_does() {
    let offer = SourceRecord::Offer(offer());
    assert_eq!(SourceHandoff::recover(&[]), None);
    assert_eq!(SourceHandoff::recover(&[SourceRecord::Commit]), None);
    let (state, actions) = SourceHandoff::recover(std::slice::from_ref(&offer)).unwrap();
    assert_eq!((state, &actions[0]), (SourceHandoff::Aborted, &HandoffAction::Journal(SourceRecord::Abort)));
    let (state, actions) = SourceHandoff::recover(&[offer.clone(), SourceRecord::Commit]).unwrap();
    assert_eq!((state, actions), (SourceHandoff::Committed, vec![]));
    let (state, actions) = SourceHandoff::recover(&[offer, SourceRecord::Commit, SourceRecord::Done]).unwrap();
    assert!(state == SourceHandoff::Done && actions.contains(&HandoffAction::Destroy));

    let prepared = DestinationRecord::Prepared(prepared());
    let twin = std::slice::from_ref(&prepared);
    assert_eq!(DestinationHandoff::recover(twin, true), (DestinationHandoff::Prepared { digest: DIGEST }, vec![]));
    assert_eq!(DestinationHandoff::recover(twin, false).0, DestinationHandoff::Refused);
    assert_eq!(DestinationHandoff::recover(&[], true).0, DestinationHandoff::Refused);
    assert_eq!(
        DestinationHandoff::recover(&[prepared, DestinationRecord::Run], true),
        (DestinationHandoff::Running, vec![HandoffAction::Resume])
    );
}

#[test]
fn records_survive_the_journal() {
    for record in [SourceRecord::Offer(offer()), SourceRecord::Commit, SourceRecord::Abort, SourceRecord::Reclaim, SourceRecord::Done] {
        let text = serde_json::to_vec(&record).unwrap();
        assert_eq!(serde_json::from_slice::<SourceRecord>(&text).unwrap(), record);
    }
    let record = DestinationRecord::Prepared(prepared());
    assert_eq!(serde_json::from_slice::<DestinationRecord>(&serde_json::to_vec(&record).unwrap()).unwrap(), record);
}

fn goal() -> Goal {
    Goal { downtime_max: Duration::from_millis(300), throttle: false, fixed_cost: Duration::ZERO }
}

fn measure(dirty_pages: u64) -> RoundMeasure {
    RoundMeasure { content_pages: 100_000, duration: Duration::from_secs(1), dirty_pages }
}

#[test]
fn a_whole_migration_walks_the_states() {
    let mut source = Source::new(goal());
    let actions = source.step(SourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
    assert!(matches!(
        &actions[..],
        [
            SourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(_))),
            SourceAction::Begin { lanes: 2 },
            SourceAction::SendRound(Round(1))
        ]
    ));
    assert_eq!(source.step(SourceEvent::RoundApplied(measure(60_000))).unwrap(), [SourceAction::SendRound(Round(2))]);
    assert_eq!(source.step(SourceEvent::RoundApplied(measure(10))).unwrap(), [SourceAction::Pause]);
    assert_eq!(source.step(SourceEvent::Paused).unwrap(), [SourceAction::SendLast(Round(3))]);
    source.step(SourceEvent::Finalised(DIGEST)).unwrap();

    let mut destination = Destination::default();
    for (round, last) in [(1, false), (2, false), (3, true)] {
        let actions = destination.step(DestinationEvent::RoundComplete { round: Round(round), last }).unwrap();
        assert_eq!(actions, [DestinationAction::ConfirmRound(Round(round))]);
    }
    assert!(destination.step(DestinationEvent::RoundComplete { round: Round(4), last: true }).is_err());
    assert_eq!(destination.step(DestinationEvent::Final(DIGEST)).unwrap(), [DestinationAction::Compare(DIGEST)]);
    destination.step(DestinationEvent::Handoff(DestinationStep::TwinComplete(prepared()))).unwrap();
    destination.step(DestinationEvent::Handoff(DestinationStep::CommitPermitted)).unwrap();
    assert!(destination.is_prepared());

    let receive = |step| SourceEvent::Handoff(SourceStep::Received { step, incarnation_same: true });
    source.step(receive(Handoff::Prepared { digest: DIGEST })).unwrap();
    source.step(SourceEvent::Handoff(SourceStep::CommitPermitted)).unwrap();
    assert!(source.is_committed());
    let actions = destination.step(DestinationEvent::Handoff(DestinationStep::Received(Handoff::Commit))).unwrap();
    assert_eq!(actions[1], DestinationAction::Handoff(HandoffAction::Resume));
    source.step(receive(Handoff::Running)).unwrap();
    assert_eq!((source.name(), destination.name()), ("done", "running"));
}

// SPEC: PROTOCOL.md#must-order
#[test]
fn a_refused_event_changes_nothing() {
    let mut source = Source::new(goal());
    assert_eq!(source.step(SourceEvent::Paused).unwrap_err().expected, "ACCEPT");
    assert_eq!(source.name(), "await-accept");
    source.step(SourceEvent::Accepted { offer: offer(), lanes: 1 }).unwrap();
    let early = SourceEvent::Handoff(SourceStep::Received { step: Handoff::Running, incarnation_same: true });
    assert!(source.step(early).is_err());
    assert_eq!(source.name(), "precopy");
    let mut destination = Destination::default();
    assert!(destination.step(DestinationEvent::Final(DIGEST)).is_err());
    assert!(destination.step(DestinationEvent::RoundComplete { round: Round(2), last: false }).is_err());
    assert_eq!(destination.name(), "receiving");
}

#[test]
fn giving_up_before_commit_leaves_the_guest_running_on_the_source() {
    let mut source = Source::new(goal());
    source.step(SourceEvent::Accepted { offer: offer(), lanes: 1 }).unwrap();
    source.step(SourceEvent::RoundApplied(measure(1))).unwrap();
    source.step(SourceEvent::Paused).unwrap();
    let actions = source.step(SourceEvent::GiveUp(ErrorClass::Cancelled)).unwrap();
    assert_eq!(
        actions[..2],
        [SourceAction::Handoff(HandoffAction::Journal(SourceRecord::Abort)), SourceAction::Handoff(HandoffAction::Resume)]
    );
    let mut declined = Source::new(goal());
    assert!(declined.step(SourceEvent::GiveUp(ErrorClass::Cancelled)).unwrap().is_empty());
}
