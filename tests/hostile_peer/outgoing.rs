//! What a destination may do to a source with a running guest. Before COMMIT the guest runs on; after it, only the word of the
//! gateway that was given the VM counts.

use std::time::Duration;

use sealane::audit::{Event, Filter};
use sealane::control::{Exit, exit_of_report};
use sealane::hypervisor::RunState;
use sealane::telemetry::ErrorClass::{self, InDoubt, PeerMisbehaved, TimedOut};
use sealane::telemetry::RunningOn;
use sealane::types::{Incarnation, MigrationId, Round};
use sealane::wire::{Failure, FinalDigest, Handoff, Message, RoundApplied};

use crate::destination::{Sink, Taking, migrate, report, takes_an_honest_vm};
use crate::lab::{EVIL, Gateway, Lab, OTHER, until, vm};
use crate::source::{Evil, random};

/// The migration fails with one of `expected`, and the guest beats on.
async fn case(
    gateway: &mut Gateway,
    sink: &Sink,
    name: &str,
    expected: &[ErrorClass],
    timeout: f64,
    act: impl AsyncFnOnce(&mut Taking<'_>),
) {
    let view = migrate(gateway, 0, timeout).await;
    let mut taking = sink.offered().await;
    act(&mut taking).await;
    let ended = report(gateway, name, view.id).await;
    let error = ended.error.unwrap();
    assert!(expected.contains(&error.class), "{name}: {error:?}");
    assert_eq!(ended.running_on, RunningOn::Source, "{name}");
    assert!(!error.message.chars().any(char::is_control), "{name}: {error:?}");
    drop(taking);
    gateway.recorded(name, view.id, error.class).await;
    gateway.beats_on(name, 0).await;
    gateway.is_well(name, 0).await;
    assert!(!gateway.handoff_records(view.id).iter().any(|record| record == "commit"), "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn before_commit_the_guest_runs_on_whatever_the_destination_does() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(2).await;
    let sink = Sink::new(&lab);
    let (g, s) = (&mut gateway, &sink);
    let misbehaved = &[PeerMisbehaved][..];
    for (name, lanes) in [("no lanes", 0), ("more lanes than offered", 3), ("too many lanes", 17), ("most lanes", u16::MAX)] {
        case(g, s, name, misbehaved, 30.0, async |t| t.accept(lanes).await).await;
    }
    case(g, s, "accept of another migration", misbehaved, 30.0, async |t| {
        t.offer.migration = MigrationId(random());
        t.accept(1).await;
    })
    .await;
    case(g, s, "accept twice", misbehaved, 30.0, async |t| {
        t.first_round().await;
        let accept = sealane::wire::Accept { migration: t.migration(), lanes: 2, policy_digest: [0; 32], bandwidth_max: None };
        t.say(Message::Accept(accept)).await;
    })
    .await;
    case(g, s, "an offer back", misbehaved, 30.0, async |t| t.say(Message::Offer(t.offer.clone())).await).await;
    case(g, s, "round applied before accept", misbehaved, 30.0, async |t| {
        t.say(Message::RoundApplied(RoundApplied { migration: t.migration(), round: Round(1), lanes: vec![Default::default(); 2] })).await;
    })
    .await;
    case(g, s, "round applied too early", misbehaved, 30.0, async |t| {
        t.accept(2).await;
        t.say(Message::RoundApplied(RoundApplied { migration: t.migration(), round: Round(9), lanes: vec![Default::default(); 2] })).await;
    })
    .await;
    type Change = fn(&mut RoundApplied);
    let changes: [(&str, Change); 5] = [
        ("totals too high", |applied| applied.lanes[0].pages += 1),
        ("totals of nothing", |applied| applied.lanes[1] = Default::default()),
        ("totals of fewer lanes", |applied| applied.lanes.truncate(1)),
        ("another round", |applied| applied.round.0 += 1),
        ("another migration", |applied| applied.migration = MigrationId(random())),
    ];
    for (name, change) in changes {
        case(g, s, name, misbehaved, 30.0, async |t| {
            t.first_round().await;
            let mut applied = t.applied();
            change(&mut applied);
            t.say(Message::RoundApplied(applied)).await;
        })
        .await;
    }
    case(g, s, "round applied twice", misbehaved, 30.0, async |t| {
        t.first_round().await;
        t.say(Message::RoundApplied(t.applied())).await;
        t.say(Message::RoundApplied(t.applied())).await;
    })
    .await;
    let nothing = FinalDigest { state: [0; 32], lanes: [0; 32], memory: 0 };
    for (name, step) in [
        ("prepared early", Handoff::Prepared { digest: nothing }),
        ("running early", Handoff::Running),
        ("commit from the destination", Handoff::Commit { digest: nothing }),
    ] {
        case(g, s, name, misbehaved, 30.0, async |t| {
            t.first_round().await;
            t.step(step).await;
        })
        .await;
    }
    case(g, s, "prepared before accept", misbehaved, 30.0, async |t| t.step(Handoff::Prepared { digest: nothing }).await).await;
    case(g, s, "prepared with another digest", misbehaved, 30.0, async |t| {
        t.finalised().await;
        t.step(Handoff::Prepared { digest: nothing }).await;
    })
    .await;
    case(g, s, "prepared by another journal", misbehaved, 30.0, async |t| {
        t.finalised().await;
        let mut message = t.message(Handoff::Prepared { digest: t.digest.unwrap() });
        message.sender = Incarnation(random());
        t.say(Message::Handoff(t.sink.sign(message))).await;
    })
    .await;
    case(g, s, "prepared with a signature of zeroes", misbehaved, 30.0, async |t| {
        t.finalised().await;
        let mut signed = t.sink.sign(t.message(Handoff::Prepared { digest: t.digest.unwrap() }));
        signed.signature = [0; 64];
        t.say(Message::Handoff(signed)).await;
    })
    .await;
    case(g, s, "running before commit", misbehaved, 30.0, async |t| {
        t.finalised().await;
        t.running().await;
    })
    .await;
    case(g, s, "refuse before accept", &[ErrorClass::Local], 30.0, async |t| t.refuse().await).await;
    case(g, s, "refuse", &[ErrorClass::Local], 30.0, async |t| {
        t.finalised().await;
        t.refuse().await;
    })
    .await;
    case(g, s, "refuse in rounds", &[ErrorClass::Local], 30.0, async |t| {
        t.first_round().await;
        t.refuse().await;
    })
    .await;
    case(g, s, "failure with words for a terminal", &[ErrorClass::Local], 30.0, async |t| {
        t.first_round().await;
        t.say(Message::Failure(Failure { class: ErrorClass::Local, reason: "\u{1b}]0;owned\u{7}\r\n".repeat(40) })).await;
    })
    .await;
    case(g, s, "failure of ours, in a long text", misbehaved, 30.0, async |t| {
        t.say(Message::Failure(Failure { class: ErrorClass::Bug, reason: "x".repeat(10_000) })).await;
    })
    .await;
    case(g, s, "a claim that an operator has to decide", misbehaved, 30.0, async |t| {
        t.first_round().await;
        t.step(Handoff::Refuse { class: InDoubt }).await;
    })
    .await;
    assert!(!gateway.log().contains('\u{1b}'), "{}", gateway.log());
    takes_an_honest_vm(&mut gateway, &sink, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_leaves_or_is_silent_costs_no_more_than_the_timeout() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(2).await;
    let sink = Sink::new(&lab);
    let (g, s) = (&mut gateway, &sink);
    for leaves in [true, false] {
        // One that leaves may come back: that is waited for as long as the configuration says.
        let (expected, timeout) = if leaves { (&[ErrorClass::Local][..], 30.0) } else { (&[TimedOut][..], 2.0) };
        let what = if leaves { "leaves" } else { "is silent" };
        let end = async |t: &Taking<'_>| {
            if leaves {
                t.session.close(None, "bye");
            }
        };
        case(g, s, &format!("{what} after the offer"), expected, timeout, async |t| end(t).await).await;
        case(g, s, &format!("{what} after accept"), expected, timeout, async |t| {
            t.accept(2).await;
            end(t).await;
        })
        .await;
        case(g, s, &format!("{what} after a round"), expected, timeout, async |t| {
            t.first_round().await;
            end(t).await;
        })
        .await;
        case(g, s, &format!("{what} after final"), expected, timeout, async |t| {
            t.finalised().await;
            end(t).await;
        })
        .await;
    }
    takes_an_honest_vm(&mut gateway, &sink, 1).await;
}

/// Whoever has no room is asked again, for as long as the migration may take; whoever had room has begun.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_always_full_costs_no_more_than_the_timeout() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(2).await;
    let sink = Sink::new(&lab);
    let (g, s) = (&mut gateway, &sink);
    let full = || Message::Failure(Failure { class: ErrorClass::PeerBusy, reason: "no room".into() });
    case(g, s, "full", &[TimedOut], 4.0, async |t| {
        t.say(full()).await;
        let again = t.sink.offered().await;
        assert_eq!(again.migration(), t.migration());
        again.say(full()).await;
        // It is read before the session ends.
        again.session.closed().await;
    })
    .await;
    case(g, s, "full after accept", &[ErrorClass::PeerBusy], 30.0, async |t| {
        t.accept(2).await;
        t.say(full()).await;
    })
    .await;
    takes_an_honest_vm(&mut gateway, &sink, 1).await;
}

/// A paused guest goes on by itself, however long the migration may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_ends_without_the_destination() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(1).await;
    let sink = Sink::new(&lab);
    // 30 s, and ten times the pause that is allowed and what state and comparison are expected to take.
    case(&mut gateway, &sink, "silence in the pause", &[TimedOut], 3600.0, async |t| t.finalised().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_commit_only_the_right_gateway_s_word_counts() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(3).await;
    let sink = Sink::new(&lab);

    // Another journal refuses, somebody else says that it runs: nothing changes. Then the right word.
    for (index, refuse) in [(0, true), (1, false)] {
        let view = migrate(&gateway, index, 30.0).await;
        let mut taking = sink.offered().await;
        taking.committed().await;
        for step in [Handoff::Refuse { class: ErrorClass::Local }, Handoff::Running] {
            let mut message = taking.message(step);
            message.sender = Incarnation(random());
            taking.say(Message::Handoff(taking.sink.sign(message))).await;
        }
        let mut forged = taking.sink.sign(taking.message(Handoff::Refuse { class: ErrorClass::Local }));
        forged.signature[0] ^= 1;
        taking.say(Message::Handoff(forged)).await;
        taking.say(Message::Failure(Failure { class: ErrorClass::Local, reason: "give it back".into() })).await;
        // A PREPARED is answered with COMMIT: all of the above was read.
        taking.step(Handoff::Prepared { digest: taking.digest.unwrap() }).await;
        let Message::Handoff(answer) = taking.hear("commit again").await else { panic!("no handoff message") };
        assert_eq!(answer.message.step, Handoff::Commit { digest: taking.digest.unwrap() });
        assert_eq!(gateway.guest_state(index), Some(RunState::Paused));
        assert_eq!(gateway.client().migration(view.id).await.unwrap().report, None);
        if refuse {
            taking.refuse().await;
            let ended = report(&gateway, "refused after commit", view.id).await;
            assert_eq!(ended.running_on, RunningOn::Source);
            assert_eq!(gateway.handoff_records(view.id), ["offer", "commit", "reclaim"]);
            gateway.beats_on("reclaimed", index).await;
        } else {
            taking.running().await;
            assert_eq!(report(&gateway, "running after commit", view.id).await.error, None);
            assert_eq!(gateway.handoff_records(view.id), ["offer", "commit", "done"]);
        }
    }
    takes_an_honest_vm(&mut gateway, &sink, 2).await;
}

/// COMMIT, then nothing but sessions that are taken and dropped, or live ones without a word: in doubt, in time.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_does_not_come_leaves_the_vm_in_doubt_and_paused() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(3).await;
    let sink = Sink::new(&lab);
    let mut views = Vec::new();
    let mut takings = Vec::new();
    for index in 0..2 {
        views.push(migrate(&gateway, index, 30.0).await);
        let mut taking = sink.offered().await;
        taking.committed().await;
        takings.push(taking);
    }
    // One session stays open and silent, one is closed; whoever comes again is dropped.
    takings[1].session.close(None, "bye");
    let mut dropped = 0;
    let done = async {
        let one = report(&gateway, "silence after commit", views[0].id).await;
        (one, report(&gateway, "closed after commit", views[1].id).await)
    };
    let mut done = Box::pin(done);
    let reports = loop {
        tokio::select! {
            reports = &mut done => break reports,
            _session = sink.session() => dropped += 1,
        }
    };
    drop(done);
    // Doubled pauses up to 5 s, for 30 s, and the gateway's own tries afterwards.
    assert!((1..40).contains(&dropped), "{dropped} sessions");
    for (index, ended) in [reports.0, reports.1].iter().enumerate() {
        assert_eq!(ended.error.as_ref().unwrap().class, InDoubt, "{ended:?}");
        assert_eq!(exit_of_report(ended), Exit::Unknown);
        gateway.recorded("in doubt", ended.migration_id, InDoubt).await;
        assert_eq!(gateway.guest_state(index), Some(RunState::Paused));
    }

    // Nobody gives the VM back that was given away, while the paused copy may have to go on.
    for name in [EVIL, OTHER] {
        let evil = Evil::new(&lab, name, &gateway);
        let offered = evil.attempt(0).await;
        offered.say(Message::Offer(offered.offer.clone())).await;
        assert_eq!(offered.verdict("given and offered back").await.0, ErrorClass::Denied);
    }
    // Another peer's word is not the destination's, signed or not.
    let other = Evil::new(&lab, OTHER, &gateway);
    let (session, _) = other.greet().await;
    session.send(&Message::Handoff(other.sign(takings[0].message(Handoff::Refuse { class: ErrorClass::Local })))).await.unwrap();
    crate::source::verdict("another peer's refusal", &session).await;
    assert_eq!(gateway.guest_state(0), Some(RunState::Paused));
    assert_eq!(gateway.handoff_records(views[0].id), ["offer", "commit"]);

    // The proper words, in the sessions that the gateway opens to ask.
    let mut left: Vec<MigrationId> = views.iter().map(|view| view.id).collect();
    while !left.is_empty() {
        let (session, _) = sink.greeted().await;
        let Ok(Message::Handoff(asked)) = session.receive().await else { continue };
        let index = views.iter().position(|view| view.id == asked.message.migration).unwrap();
        assert_eq!(asked.message.step, Handoff::Commit { digest: takings[index].digest.unwrap() });
        let step = if index == 0 { Handoff::Refuse { class: ErrorClass::Local } } else { Handoff::Running };
        session.send(&Message::Handoff(sink.sign(takings[index].message(step)))).await.unwrap();
        until("the word is heard", || {
            let records = gateway.handoff_records(asked.message.migration);
            records.iter().any(|record| record == "reclaim" || record == "done").then_some(())
        })
        .await;
        left.retain(|id| *id != asked.message.migration);
    }
    gateway.beats_on("refused when asked", 0).await;
    until("running when asked", || gateway.guest_state(1).is_none().then_some(())).await;
    gateway.is_well("in doubt", 0).await;
    takes_an_honest_vm(&mut gateway, &sink, 2).await;
    assert_eq!(vm(0), gateway.entries(Filter { event: Some(Event::Handoff), ..Filter::default() })[0].vm.clone().unwrap());
}

/// A destination, or any other configured peer, speaks about a migration that is under way in another session.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_resumes_a_paused_guest_from_another_session() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(2).await;
    let sink = Sink::new(&lab);
    let view = migrate(&gateway, 0, 60.0).await;
    let mut taking = sink.offered().await;
    taking.finalised().await;
    for name in [EVIL, OTHER] {
        let evil = Evil::new(&lab, name, &gateway);
        for step in [Handoff::Prepared { digest: taking.digest.unwrap() }, Handoff::Refuse { class: ErrorClass::Local }, Handoff::Running] {
            let (session, _) = evil.greet().await;
            session.send(&Message::Handoff(evil.sign(taking.message(step)))).await.unwrap();
            crate::source::verdict("from another session", &session).await;
        }
    }
    assert_eq!(gateway.guest_state(0), Some(RunState::Paused));
    assert_eq!(gateway.handoff_records(view.id), ["offer"]);
    taking.step(Handoff::Prepared { digest: taking.digest.unwrap() }).await;
    let Message::Handoff(commit) = taking.hear("commit").await else { panic!("no handoff message") };
    assert_eq!(commit.message.step, Handoff::Commit { digest: taking.digest.unwrap() });
    taking.running().await;
    assert_eq!(report(&gateway, "moved in spite of it", view.id).await.error, None);
    drop(taking);
    tokio::time::timeout(Duration::from_secs(10), async { while gateway.beat(0).is_some() {} }).await.unwrap();
    takes_an_honest_vm(&mut gateway, &sink, 1).await;
}
