//! Every state against every event, kept in `transitions.txt`: a change of the protocol shows there.

use std::fmt::Write;
use std::time::Duration;

use super::*;
use crate::types::{Epoch, Incarnation, MigrationId, Round, VmUuid};
use crate::wire::{Durability, ErrorClass, FinalDigest, Handoff};

const DIGEST: FinalDigest = FinalDigest { state: [1; 32], lanes: [2; 32], memory: 3 };
const OTHER: FinalDigest = FinalDigest { state: [9; 32], lanes: [2; 32], memory: 3 };

pub(super) fn offer() -> Box<OfferRecord> {
    offer_with(Durability::None)
}

fn offer_with(durability: Durability) -> Box<OfferRecord> {
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
        durability,
    })
}

pub(super) fn prepared() -> Box<PreparedRecord> {
    prepared_with(Durability::None)
}

fn prepared_with(durability: Durability) -> Box<PreparedRecord> {
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
        durability,
    })
}

fn messages() -> Vec<(&'static str, Handoff)> {
    vec![
        ("FINAL", Handoff::Final { digest: DIGEST, lanes: 1 }),
        ("PREPARED", Handoff::Prepared { digest: DIGEST }),
        ("PREPARED(other digest)", Handoff::Prepared { digest: OTHER }),
        ("COMMIT", Handoff::Commit { digest: DIGEST }),
        ("COMMIT(other digest)", Handoff::Commit { digest: OTHER }),
        ("RUNNING", Handoff::Running),
        ("DONE", Handoff::Done),
        ("ABORT", Handoff::Abort { class: ErrorClass::Cancelled }),
        ("REFUSE", Handoff::Refuse { class: ErrorClass::Local }),
    ]
}

/// The position of the destination's journal when it had prepared.
const POSITION: u64 = 7;
/// And with one record more, as a REFUSED behind that makes it.
const LATER: u64 = POSITION + 1;

fn source_steps() -> Vec<(String, SourceStep)> {
    let mut steps: Vec<(String, SourceStep)> = vec![
        ("finalised".into(), SourceStep::Finalised { digest: DIGEST, lanes: 1 }),
        ("commit-permitted".into(), SourceStep::CommitPermitted),
        ("commit-denied".into(), SourceStep::CommitDenied),
        ("give-up".into(), SourceStep::GiveUp(ErrorClass::Cancelled)),
        ("reconnected".into(), SourceStep::Reconnected),
        ("failed".into(), SourceStep::Failed),
        ("decided reclaim".into(), SourceStep::Decided(SourceDecision::Reclaim)),
        ("decided restart".into(), SourceStep::Decided(SourceDecision::Restart)),
        ("decided release".into(), SourceStep::Decided(SourceDecision::Release)),
    ];
    for (incarnation_same, position, of) in
        [(true, LATER, ""), (true, POSITION, " of an older journal"), (false, LATER, " of a new journal")]
    {
        for (name, step) in messages() {
            steps.push((format!("{name}{of}"), SourceStep::Received { step, incarnation_same, position }));
        }
    }
    steps
}

/// Every state of the source, as the steps that lead there, and as a restart finds it.
fn source_states() -> Vec<(String, SourceHandoff)> {
    let received = |step| SourceStep::Received { step, incarnation_same: true, position: POSITION };
    let finalised = SourceStep::Finalised { digest: DIGEST, lanes: 1 };
    let to_permit = [finalised.clone(), received(Handoff::Prepared { digest: DIGEST })];
    let to_commit = [to_permit.as_slice(), &[SourceStep::CommitPermitted]].concat();
    let with = |more: SourceStep| [to_commit.as_slice(), &[more]].concat();
    let ways = [
        vec![],
        vec![finalised],
        to_permit.to_vec(),
        to_commit.clone(),
        vec![SourceStep::GiveUp(ErrorClass::Cancelled)],
        vec![SourceStep::GiveUp(ErrorClass::Cancelled), SourceStep::Failed],
        with(SourceStep::Received { step: Handoff::Refuse { class: ErrorClass::Local }, incarnation_same: true, position: LATER }),
        with(SourceStep::Decided(SourceDecision::Reclaim)),
        with(received(Handoff::Running)),
    ];
    let mut states = Vec::new();
    for durability in [Durability::None, Durability::Both] {
        for way in &ways {
            let mut machine = SourceHandoff::new(durability);
            way.iter().for_each(|step| drop(machine.step(step).unwrap()));
            let unwritten = if *machine.state() == (SourceState::Aborted { unwritten: true }) { " unwritten" } else { "" };
            states.push((format!("{}{unwritten} {}", machine.name(), durability.name()), machine));
        }
    }
    let commit = SourceRecord::Commit { digest: DIGEST, position: POSITION };
    for holding in [Holding::Image, Holding::Nothing] {
        let (machine, _) = SourceHandoff::recover(&[SourceRecord::Offer(offer_with(Durability::Both)), commit.clone()], holding).unwrap();
        states.push((format!("{} both, {holding:?} left", machine.name()), machine));
    }
    states
}

fn destination_steps() -> Vec<(String, DestinationStep)> {
    let mut steps: Vec<(String, DestinationStep)> = vec![
        ("twin-complete".into(), DestinationStep::TwinComplete(prepared())),
        ("commit-permitted".into(), DestinationStep::CommitPermitted),
        ("commit-denied".into(), DestinationStep::CommitDenied),
        ("give-up".into(), DestinationStep::GiveUp(ErrorClass::Local)),
        ("reconnected".into(), DestinationStep::Reconnected),
        ("failed".into(), DestinationStep::Failed),
        ("source fenced".into(), DestinationStep::SourceFenced),
    ];
    steps.extend(messages().into_iter().map(|(name, step)| (name.to_owned(), DestinationStep::Received(step))));
    steps
}

fn destination_states() -> Vec<(String, DestinationHandoff)> {
    let commit = DestinationStep::Received(Handoff::Commit { digest: DIGEST });
    let mut states = Vec::new();
    for durability in [Durability::None, Durability::Destination] {
        let complete = DestinationStep::TwinComplete(prepared_with(durability));
        let to_prepared = [complete.clone(), DestinationStep::CommitPermitted];
        let with = |more: &[DestinationStep]| [to_prepared.as_slice(), more].concat();
        let ways = [
            vec![],
            vec![complete],
            to_prepared.to_vec(),
            with(std::slice::from_ref(&commit)),
            vec![DestinationStep::GiveUp(ErrorClass::Local)],
            with(&[DestinationStep::GiveUp(ErrorClass::Local)]),
            with(&[DestinationStep::SourceFenced]),
            with(&[commit.clone(), DestinationStep::Received(Handoff::Done)]),
        ];
        for way in &ways {
            let mut machine = DestinationHandoff::default();
            way.iter().for_each(|step| drop(machine.step(step).unwrap()));
            let promised = if *machine.state() == (DestinationState::Refused { promised: true }) { " promised" } else { "" };
            states.push((format!("{}{promised} {}", machine.name(), durability.name()), machine));
        }
    }
    let records = [DestinationRecord::Prepared(prepared_with(Durability::Destination))];
    let (machine, _) = DestinationHandoff::recover(&records, Holding::Image);
    states.push((format!("{} dest, Image left", machine.name()), machine));
    states
}

fn describe<R: std::fmt::Debug>(actions: &[HandoffAction<R>]) -> String {
    let names = actions.iter().map(|action| match action {
        HandoffAction::Journal(record) => {
            let record = format!("{record:?}");
            let cold = if record.contains("cold: true") { " cold" } else { "" };
            format!("journal {}{cold}", record.split(['(', ' ']).next().unwrap_or_default().to_uppercase())
        }
        HandoffAction::Send(step) => format!("send {}", handoff::handoff_name(step)),
        HandoffAction::Keep => "keep image".into(),
        HandoffAction::Forget => "forget image".into(),
        HandoffAction::Restore => "restore image".into(),
        HandoffAction::Renew => "renew generation".into(),
        HandoffAction::LeaveToJournal => "leave to journal".into(),
        HandoffAction::AskCommit => "ask policy".into(),
        HandoffAction::Resume => "RESUME".into(),
        HandoffAction::Destroy => "destroy".into(),
        HandoffAction::End(outcome) => format!("end {outcome:?}").to_lowercase(),
    });
    names.collect::<Vec<_>>().join(", ")
}

fn matrix() -> String {
    let mut out = String::from("Every state of the handoff against every event. `-` is refused and changes nothing.\n\nSOURCE\n");
    for (from, state) in source_states() {
        for (name, step) in source_steps() {
            let mut next = state.clone();
            match next.step(&step) {
                Ok(actions) => writeln!(out, "{from:28} {name:38} => {:20} {}", next.name(), describe(&actions)).unwrap(),
                Err(_) => {
                    assert_eq!(next, state, "a refused event changed the state");
                    writeln!(out, "{from:28} {name:38} -").unwrap();
                }
            }
        }
    }
    out.push_str("\nDESTINATION\n");
    for (from, state) in destination_states() {
        for (name, step) in destination_steps() {
            let mut next = state.clone();
            match next.step(&step) {
                Ok(actions) => writeln!(out, "{from:28} {name:38} => {:20} {}", next.name(), describe(&actions)).unwrap(),
                Err(_) => {
                    assert_eq!(next, state, "a refused event changed the state");
                    writeln!(out, "{from:28} {name:38} -").unwrap();
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

fn resumes<R: PartialEq>(actions: &[HandoffAction<R>]) -> Option<&[HandoffAction<R>]> {
    actions.iter().position(|action| *action == HandoffAction::Resume).map(|at| &actions[..at])
}

#[test]
fn a_source_resumes_only_behind_a_record_that_says_so() {
    for (from, state) in source_states() {
        for (name, step) in source_steps() {
            let Ok(actions) = state.clone().step(&step) else { continue };
            let Some(before) = resumes(&actions) else { continue };
            let journaled = before.iter().any(|action| {
                matches!(
                    action,
                    HandoffAction::Journal(
                        SourceRecord::Abort { .. } | SourceRecord::Reclaim { .. } | SourceRecord::Fenced { cold: false }
                    )
                )
            });
            // Only an ABORT may be implied.
            let implied = from.starts_with("aborted") && step == SourceStep::Failed;
            assert!(journaled || implied, "{from} + {name} resumes without a record");
        }
    }
}

#[test]
fn after_commit_a_source_resumes_only_on_refuse_from_the_same_journal_or_by_decision() {
    for (from, state) in source_states().into_iter().filter(|(_, state)| state.is_committed()) {
        for (name, step) in source_steps() {
            let resumes = matches!(&state.clone().step(&step), Ok(actions) if resumes(actions).is_some());
            let may = matches!(name.as_str(), "REFUSE" | "decided reclaim") && !from.contains("Nothing");
            assert_eq!(resumes, may, "{from} + {name}");
        }
    }
}

#[test]
fn a_destination_resumes_only_on_the_commit_of_what_it_prepared_and_behind_run() {
    for (from, state) in destination_states() {
        for (name, step) in destination_steps() {
            let Ok(actions) = state.clone().step(&step) else { continue };
            if let Some(before) = resumes(&actions) {
                assert_eq!((state.name(), name.as_str()), ("prepared", "COMMIT"), "{from}");
                assert!(before.contains(&HandoffAction::Journal(DestinationRecord::Run)));
            }
        }
    }
}

// INVARIANT(image-once)
#[test]
fn an_image_is_gone_before_its_guest_runs_and_what_comes_from_one_is_a_new_generation() {
    fn check<R: PartialEq + std::fmt::Debug>(from: &str, actions: &[HandoffAction<R>]) {
        if let Some(before) = resumes(actions) {
            assert!(before.contains(&HandoffAction::Forget), "{from}: {actions:?}");
            assert_eq!(before.contains(&HandoffAction::Restore), from.contains("Image"), "{from}: {actions:?}");
            assert!(!from.contains("Image") || before.contains(&HandoffAction::Renew), "{from}: {actions:?}");
        }
    }
    for (from, state) in source_states().iter().filter(|(from, _)| from.contains("both")) {
        source_steps().iter().filter_map(|(_, step)| state.clone().step(step).ok()).for_each(|actions| check(from, &actions));
    }
    for (from, state) in destination_states().iter().filter(|(from, _)| from.contains("dest")) {
        destination_steps().iter().filter_map(|(_, step)| state.clone().step(step).ok()).for_each(|actions| check(from, &actions));
    }
}

#[test]
fn a_journal_says_what_a_restarted_gateway_does() {
    use HandoffAction::{Destroy, End, Forget, Journal, Renew, Restore, Resume};
    let offer = SourceRecord::Offer(offer_with(Durability::Both));
    let commit = SourceRecord::Commit { digest: DIGEST, position: POSITION };
    let recover = |records: &[SourceRecord], holding| SourceHandoff::recover(records, holding).map(|(machine, due)| (machine.name(), due));
    assert_eq!(recover(&[], Holding::Memory), None);
    assert_eq!(recover(std::slice::from_ref(&commit), Holding::Memory), None);
    let (state, due) = recover(std::slice::from_ref(&offer), Holding::Image).unwrap();
    assert_eq!(state, "aborted");
    assert_eq!(due[..5], [Journal(SourceRecord::Abort { cold: false }), Restore, Renew, Forget, Resume]);
    // What of it was done before one failed, only the next start can tell: nothing is restored twice.
    let (mut machine, _) = SourceHandoff::recover(std::slice::from_ref(&offer), Holding::Image).unwrap();
    assert_eq!(machine.step(&SourceStep::Failed).unwrap(), [HandoffAction::LeaveToJournal]);
    let (_, due) = recover(&[offer.clone(), SourceRecord::Abort { cold: false }], Holding::Memory).unwrap();
    assert_eq!(due[..3], [Renew, Forget, Resume], "the memory may have been restored just before");
    let (_, due) = recover(std::slice::from_ref(&offer), Holding::Nothing).unwrap();
    assert_eq!((&due[0], &due[due.len() - 1]), (&Journal(SourceRecord::Abort { cold: true }), &End(Outcome::Cold)));
    assert_eq!(recover(&[offer.clone(), commit.clone()], Holding::Memory), Some(("committed", vec![])));
    let (state, due) = recover(&[offer, commit, SourceRecord::Done], Holding::Memory).unwrap();
    assert!(state == "done" && due.contains(&Destroy));

    let prepared = DestinationRecord::Prepared(prepared_with(Durability::Destination));
    let recover = |records: &[DestinationRecord], holding| {
        let (machine, due) = DestinationHandoff::recover(records, holding);
        (machine.name(), due)
    };
    let twin = std::slice::from_ref(&prepared);
    assert_eq!(recover(twin, Holding::Memory), ("prepared", vec![]));
    assert_eq!(recover(twin, Holding::Image), ("prepared", vec![]));
    assert_eq!(recover(twin, Holding::Nothing), ("refused", vec![Journal(DestinationRecord::Refused), Forget]));
    assert_eq!(recover(&[], Holding::Memory).0, "refused");
    let run = [prepared, DestinationRecord::Run];
    assert_eq!(recover(&run, Holding::Memory), ("running", vec![Renew, Forget, Resume]));
    assert_eq!(recover(&run, Holding::Image), ("running", vec![Restore, Renew, Forget, Resume]));
}

#[test]
fn records_survive_the_journal() {
    let commit = SourceRecord::Commit { digest: DIGEST, position: POSITION };
    let [abort, reclaim, fenced] =
        [SourceRecord::Abort { cold: true }, SourceRecord::Reclaim { cold: false }, SourceRecord::Fenced { cold: false }];
    for record in [SourceRecord::Offer(offer_with(Durability::Both)), commit, abort, reclaim, fenced, SourceRecord::Done] {
        let text = serde_json::to_vec(&record).unwrap();
        assert_eq!(serde_json::from_slice::<SourceRecord>(&text).unwrap(), record);
    }
    let record = DestinationRecord::Prepared(prepared_with(Durability::Destination));
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

    let receive = |step| SourceEvent::Handoff(SourceStep::Received { step, incarnation_same: true, position: POSITION });
    source.step(receive(Handoff::Prepared { digest: DIGEST })).unwrap();
    source.step(SourceEvent::Handoff(SourceStep::CommitPermitted)).unwrap();
    assert!(source.is_committed());
    let actions = destination.step(DestinationEvent::Handoff(DestinationStep::Received(Handoff::Commit { digest: DIGEST }))).unwrap();
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
    let early = SourceEvent::Handoff(SourceStep::Received { step: Handoff::Running, incarnation_same: true, position: 0 });
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
        [SourceAction::Handoff(HandoffAction::Journal(SourceRecord::Abort { cold: false })), SourceAction::Handoff(HandoffAction::Resume)]
    );
    let mut declined = Source::new(goal());
    assert!(declined.step(SourceEvent::GiveUp(ErrorClass::Cancelled)).unwrap().is_empty());
}

fn to_round_2() -> Source {
    let mut source = Source::new(goal());
    source.step(SourceEvent::Accepted { offer: offer(), lanes: 1 }).unwrap();
    assert_eq!(source.step(SourceEvent::RoundApplied(measure(60_000))).unwrap(), [SourceAction::SendRound(Round(2))]);
    source
}

#[test]
fn an_outage_ends_the_round_and_the_next_one_carries_the_rest() {
    let mut source = to_round_2();
    assert_eq!(source.step(SourceEvent::LinkLost).unwrap(), [SourceAction::Reconnect]);
    assert_eq!(source.step(SourceEvent::LinkLost).unwrap(), [], "one outage is one search");
    assert_eq!(source.step(SourceEvent::Resumed(Standing::Receiving)).unwrap(), [SourceAction::SendRound(Round(3))]);
    let mut destination = Destination::default();
    destination.step(DestinationEvent::RoundComplete { round: Round(1), last: false }).unwrap();
    assert_eq!(destination.step(DestinationEvent::Resumed { round: Round(2) }).unwrap(), []);
    assert!(destination.step(DestinationEvent::RoundComplete { round: Round(2), last: false }).is_err());
    destination.step(DestinationEvent::RoundComplete { round: Round(3), last: false }).unwrap();
}

#[test]
fn a_guest_that_was_paused_for_nothing_goes_on_during_an_outage() {
    let mut source = to_round_2();
    source.step(SourceEvent::RoundApplied(measure(1))).unwrap();
    assert_eq!(source.step(SourceEvent::Paused).unwrap(), [SourceAction::SendLast(Round(3))]);
    assert_eq!(source.step(SourceEvent::LinkLost).unwrap(), [SourceAction::GoOn, SourceAction::Reconnect]);
    assert_eq!(source.step(SourceEvent::Resumed(Standing::Receiving)).unwrap(), [SourceAction::SendRound(Round(4))]);
    // A destination that had its last round takes further ones.
    let mut destination = Destination::default();
    destination.step(DestinationEvent::RoundComplete { round: Round(1), last: true }).unwrap();
    destination.step(DestinationEvent::Resumed { round: Round(1) }).unwrap();
    destination.step(DestinationEvent::RoundComplete { round: Round(2), last: true }).unwrap();
    assert_eq!(destination.name(), "await-final");
}

#[test]
fn behind_final_the_guest_stays_paused_through_an_outage_and_final_is_said_anew() {
    let mut source = to_round_2();
    source.step(SourceEvent::RoundApplied(measure(1))).unwrap();
    source.step(SourceEvent::Paused).unwrap();
    source.step(SourceEvent::Finalised(DIGEST)).unwrap();
    assert_eq!(source.step(SourceEvent::LinkLost).unwrap(), [SourceAction::Reconnect]);
    assert_eq!(source.step(SourceEvent::Resumed(Standing::Receiving)).unwrap(), [SourceAction::SendLastAgain(Round(4))]);
    let again = source.step(SourceEvent::Finalised(OTHER)).unwrap();
    assert_eq!(again, [SourceAction::Handoff(HandoffAction::Send(Handoff::Final { digest: OTHER, lanes: 1 }))]);
    source.step(SourceEvent::LinkLost).unwrap();
    let said = source.step(SourceEvent::Resumed(Standing::Deciding)).unwrap();
    assert_eq!(said, again, "a destination that has everything only missed the word");
}

#[test]
fn an_offer_that_was_not_answered_is_made_again() {
    let mut source = Source::new(goal());
    assert_eq!(source.step(SourceEvent::LinkLost).unwrap(), [SourceAction::Reconnect]);
    assert_eq!(source.step(SourceEvent::Resumed(Standing::Unknown)).unwrap(), [SourceAction::Offer]);
    assert!(to_round_2().step(SourceEvent::Resumed(Standing::Unknown)).is_err(), "what was accepted is not offered again");
}
