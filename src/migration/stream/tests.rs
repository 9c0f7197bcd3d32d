use super::*;
use crate::migration::transitions::{offer, prepared};

const DIGEST: FinalDigest = FinalDigest { state: [1; 32], lanes: [2; 32], memory: 3 };

fn received(step: Handoff, position: u64) -> StreamSourceEvent {
    StreamSourceEvent::Handoff(SourceStep::Received { step, incarnation_same: true, position })
}

fn flowing() -> StreamSource {
    let mut source = StreamSource::default();
    let actions = source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
    assert!(matches!(
        actions.as_slice(),
        [StreamSourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(_))), StreamSourceAction::Begin { lanes: 2 }]
    ));
    source
}

fn said_final() -> StreamSource {
    let mut source = flowing();
    assert_eq!(source.step(StreamSourceEvent::Stopped).unwrap(), [StreamSourceAction::GoOn]);
    let actions = source.step(StreamSourceEvent::Finalised(DIGEST)).unwrap();
    assert_eq!(actions, [StreamSourceAction::Handoff(HandoffAction::Send(Handoff::Final { digest: DIGEST, lanes: 2 }))]);
    source
}

fn mirroring() -> StreamSource {
    let mut source = StreamSource::with_disks();
    let actions = source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
    assert!(matches!(
        actions.as_slice(),
        [StreamSourceAction::Handoff(HandoffAction::Journal(SourceRecord::Offer(_))), StreamSourceAction::Mirror { lanes: 2 }]
    ));
    source
}

fn settling() -> StreamSource {
    let mut source = mirroring();
    assert_eq!(source.step(StreamSourceEvent::Mirrored).unwrap(), [StreamSourceAction::Begin { lanes: 2 }]);
    assert_eq!(source.step(StreamSourceEvent::Stopped).unwrap(), [StreamSourceAction::Settle]);
    source
}

fn names(actions: &[StreamSourceAction]) -> String {
    format!("{actions:?}")
}

#[test]
fn a_source_goes_through_the_same_handoff() {
    let mut source = said_final();
    let ask = source.step(received(Handoff::Prepared { digest: DIGEST }, 7)).unwrap();
    assert_eq!(ask, [StreamSourceAction::Handoff(HandoffAction::AskCommit)]);
    let commit = source.step(StreamSourceEvent::Handoff(SourceStep::CommitPermitted)).unwrap();
    assert!(names(&commit).contains("Journal(Commit") && source.is_committed());
    assert!(source.step(StreamSourceEvent::GiveUp(ErrorClass::Cancelled)).unwrap().is_empty(), "COMMIT is not taken back");
    let done = names(&source.step(received(Handoff::Running, 8)).unwrap());
    assert!(done.contains("Journal(Done)") && done.contains("Destroy"), "{done}");
}

#[test]
fn nothing_is_final_before_the_hypervisor_has_stopped_its_guest() {
    let mut source = flowing();
    assert!(source.step(StreamSourceEvent::Finalised(DIGEST)).is_err());
    assert!(source.step(received(Handoff::Prepared { digest: DIGEST }, 7)).is_err());
    assert_eq!(source.name(), "flowing");
}

#[test]
fn the_stream_waits_for_the_disks_and_its_end_too() {
    let mut source = mirroring();
    for early in [StreamSourceEvent::Stopped, StreamSourceEvent::Settled, StreamSourceEvent::Finalised(DIGEST)] {
        assert!(source.step(early).is_err());
    }
    let mut source = settling();
    for early in [StreamSourceEvent::Mirrored, StreamSourceEvent::Stopped, StreamSourceEvent::Finalised(DIGEST)] {
        assert!(source.step(early).is_err());
    }
    assert_eq!(source.step(StreamSourceEvent::Settled).unwrap(), [StreamSourceAction::GoOn]);
    // Without disks nothing is awaited of them.
    let mut source = flowing();
    assert!(source.step(StreamSourceEvent::Mirrored).is_err() && source.step(StreamSourceEvent::Settled).is_err());
}

#[test]
fn before_commit_whatever_goes_wrong_wakes_the_guest() {
    let ways: [fn() -> StreamSource; 4] = [flowing, said_final, mirroring, settling];
    for way in ways {
        for event in [
            StreamSourceEvent::GiveUp(ErrorClass::Local),
            received(Handoff::Refuse { class: ErrorClass::Local }, 7),
            StreamSourceEvent::Handoff(SourceStep::Failed),
        ] {
            let mut source = way();
            let actions = names(&source.step(event).unwrap());
            assert!(actions.contains("Journal(Abort") && actions.contains("Resume"), "{actions}");
            assert_eq!(source.name(), "aborted");
        }
    }
}

#[test]
fn an_outage_only_delays() {
    for (mut source, again) in [(flowing(), ""), (mirroring(), ""), (settling(), ""), (said_final(), "Send(Final")] {
        let name = source.name();
        assert_eq!(source.step(StreamSourceEvent::LinkLost).unwrap(), [StreamSourceAction::Reconnect]);
        assert!(source.step(StreamSourceEvent::LinkLost).unwrap().is_empty());
        assert!(names(&source.step(StreamSourceEvent::Resumed(Standing::Receiving)).unwrap()).contains(again));
        assert_eq!(source.name(), name);
    }
    let mut source = StreamSource::default();
    source.step(StreamSourceEvent::LinkLost).unwrap();
    assert_eq!(source.step(StreamSourceEvent::Resumed(Standing::Unknown)).unwrap(), [StreamSourceAction::Offer]);
    assert!(flowing().step(StreamSourceEvent::Resumed(Standing::Deciding)).is_err());
}

#[test]
fn a_guest_that_stops_in_an_outage_is_sent_on_all_the_same() {
    let mut source = flowing();
    source.step(StreamSourceEvent::LinkLost).unwrap();
    assert_eq!(source.step(StreamSourceEvent::Stopped).unwrap(), [StreamSourceAction::GoOn]);
    assert_eq!(source.step(StreamSourceEvent::Resumed(Standing::Receiving)).unwrap(), []);
}

#[test]
fn a_source_that_was_split_keeps_what_the_destination_lacks() {
    let committed = || {
        let mut source = StreamSource::default();
        source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
        source.step(StreamSourceEvent::Stopped).unwrap();
        assert!(source.step(StreamSourceEvent::Emptied).is_err());
        source.step(StreamSourceEvent::Split(DIGEST)).unwrap();
        source.step(received(Handoff::Prepared { digest: DIGEST }, 7)).unwrap();
        assert!(!source.is_committed());
        source.step(StreamSourceEvent::Handoff(SourceStep::CommitPermitted)).unwrap();
        source
    };
    let mut source = committed();
    assert_eq!(source.step(received(Handoff::Running, 8)).unwrap(), []);
    assert!(source.is_serving() && source.is_committed());
    for nothing in [
        received(Handoff::Running, 8),
        received(Handoff::Refuse { class: ErrorClass::Local }, 9),
        StreamSourceEvent::GiveUp(ErrorClass::Cancelled),
        StreamSourceEvent::Handoff(SourceStep::Failed),
    ] {
        assert_eq!(source.step(nothing).unwrap(), []);
    }
    assert_eq!(source.step(StreamSourceEvent::LinkLost).unwrap(), [StreamSourceAction::Reconnect]);
    assert_eq!(source.step(StreamSourceEvent::Resumed(Standing::Deciding)).unwrap(), []);
    assert!(source.is_serving());
    let done = names(&source.step(StreamSourceEvent::Emptied).unwrap());
    assert!(done.contains("Journal(Done)") && done.contains("Destroy"), "{done}");
    // It may have everything before it runs.
    let mut source = committed();
    assert_eq!(source.step(StreamSourceEvent::Emptied).unwrap(), []);
    assert!(names(&source.step(received(Handoff::Running, 8)).unwrap()).contains("Destroy"));
    // Given back, it is no more than any other.
    let mut source = committed();
    let reclaimed = names(&source.step(received(Handoff::Refuse { class: ErrorClass::Local }, 8)).unwrap());
    assert!(reclaimed.contains("Reclaim") && reclaimed.contains("Resume"), "{reclaimed}");
    // Nobody else waits for it.
    assert!(said_final().step(StreamSourceEvent::Emptied).is_err());
}

#[test]
fn a_guest_is_split_when_its_mode_says_so() {
    let (soon, late) = (Duration::from_secs(1), Duration::from_secs(40));
    let limit = Some(Duration::from_secs(60));
    for (mode, passes, elapsed, due) in [
        (Mode::Precopy, 99, late, false),
        (Mode::Postcopy, 0, soon, true),
        (Mode::Hybrid, 2, soon, false),
        (Mode::Hybrid, 3, soon, true),
        (Mode::Hybrid, 1, late, true),
    ] {
        assert_eq!(split_is_due(mode, passes, elapsed, limit), due, "{mode:?} {passes}");
    }
    assert!(!split_is_due(Mode::Hybrid, 1, late, None));
}

#[test]
fn a_destination_promises_what_it_has_loaded() {
    let mut destination = StreamDestination::default();
    let early = StreamDestinationEvent::Handoff(DestinationStep::TwinComplete(prepared()));
    assert!(destination.step(early.clone()).is_err() && destination.is_receiving());
    assert_eq!(destination.step(StreamDestinationEvent::Final(DIGEST)).unwrap(), [StreamDestinationAction::Load(DIGEST)]);
    assert!(destination.step(StreamDestinationEvent::Final(DIGEST)).is_err());
    assert_eq!(destination.step(early).unwrap(), [StreamDestinationAction::Handoff(HandoffAction::AskCommit)]);
    destination.step(StreamDestinationEvent::Handoff(DestinationStep::CommitPermitted)).unwrap();
    assert!(destination.is_prepared());
    let actions = format!("{:?}", destination.step(StreamDestinationEvent::Resumed).unwrap());
    assert!(actions.contains("Send(Prepared"), "{actions}");
    let commit = DestinationStep::Received(Handoff::Commit { digest: DIGEST });
    let actions = format!("{:?}", destination.step(StreamDestinationEvent::Handoff(commit)).unwrap());
    assert!(actions.contains("Journal(Run), Handoff") || actions.contains("Journal(Run)"), "{actions}");
    assert!(destination.is_running());
}

#[test]
fn a_destination_that_has_promised_nothing_can_always_refuse() {
    for events in [vec![], vec![StreamDestinationEvent::Final(DIGEST)]] {
        for last in [
            StreamDestinationEvent::GiveUp(ErrorClass::Local),
            StreamDestinationEvent::Handoff(DestinationStep::Received(Handoff::Abort { class: ErrorClass::Cancelled })),
        ] {
            let mut destination = StreamDestination::default();
            events.iter().for_each(|event: &StreamDestinationEvent| drop(destination.step(event.clone()).unwrap()));
            let actions = format!("{:?}", destination.step(last).unwrap());
            assert!(actions.contains("Journal(Refused)") && actions.contains("Destroy"), "{actions}");
        }
    }
}

#[test]
fn disks_alone_are_mirrored_and_settled_and_then_the_guest_stays() {
    let alone = || {
        let mut source = StreamSource::disks_only();
        source.step(StreamSourceEvent::Accepted { offer: offer(), lanes: 2 }).unwrap();
        source
    };
    let mut source = alone();
    assert!(source.step(StreamSourceEvent::Stopped).is_err() && source.step(StreamSourceEvent::Settled).is_err());
    assert_eq!(source.step(StreamSourceEvent::Mirrored).unwrap(), [StreamSourceAction::Settle]);
    for early in [StreamSourceEvent::Stopped, StreamSourceEvent::Finalised(DIGEST), received(Handoff::Prepared { digest: DIGEST }, 7)] {
        assert!(source.step(early).is_err());
    }
    let actions = names(&source.step(StreamSourceEvent::Settled).unwrap());
    assert!(actions.contains("Journal(Abort") && actions.contains("Resume") && !actions.contains("Begin"), "{actions}");
    assert_eq!(source.name(), "aborted");
    let actions = names(&alone().step(StreamSourceEvent::GiveUp(ErrorClass::Local)).unwrap());
    assert!(actions.contains("Journal(Abort"), "{actions}");
}

// SPEC: PROTOCOL.md#must-disks-alone
#[test]
fn a_destination_of_disks_alone_takes_no_guest() {
    let digest = DIGEST;
    for guest in [
        StreamDestinationEvent::Final(digest),
        StreamDestinationEvent::Handoff(DestinationStep::Received(Handoff::Final { digest, lanes: 1 })),
        StreamDestinationEvent::Handoff(DestinationStep::TwinComplete(prepared())),
        StreamDestinationEvent::Handoff(DestinationStep::CommitPermitted),
        StreamDestinationEvent::Handoff(DestinationStep::Received(Handoff::Commit { digest })),
    ] {
        let mut destination = StreamDestination::disks_only();
        assert!(destination.step(guest).is_err() && destination.is_receiving());
        assert_eq!(destination.step(StreamDestinationEvent::Resumed).unwrap(), []);
        let abort = DestinationStep::Received(Handoff::Abort { class: ErrorClass::Cancelled });
        let actions = format!("{:?}", destination.step(StreamDestinationEvent::Handoff(abort)).unwrap());
        assert!(actions.contains("Journal(Refused)") && actions.contains("Destroy"), "{actions}");
    }
}
