//! Handoff messages that are forged, early, late, or replayed.

use sealane::telemetry::ErrorClass::{self, PeerMisbehaved};
use sealane::types::{Epoch, Incarnation, MigrationId};
use sealane::wire::{FinalDigest, Handoff, HandoffMessage, Message, SignedHandoff};

use crate::lab::{EVIL, Lab, OTHER};
use crate::source::{Attempt, Evil, LANES, case, other_uuid, random, takes_an_honest_vm, verdict};

/// FINAL as it should be, but for what `change` does to message and signature.
async fn forged_final(attempt: &mut Attempt<'_>, change: impl FnOnce(&mut HandoffMessage)) -> SignedHandoff {
    attempt.sent().await;
    attempt.send_state().await;
    let mut message = attempt.message(Handoff::Final { digest: attempt.digest(), lanes: LANES });
    change(&mut message);
    attempt.evil.sign(message)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handoff_message_is_bound_to_its_migration_and_sender() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let g = &mut gateway;
    type Change = fn(&mut HandoffMessage);
    let cases: [(&str, Change); 6] = [
        ("another migration", |message| message.migration = MigrationId(random())),
        ("another VM", |message| message.uuid = other_uuid()),
        ("an epoch too low", |message| message.epoch = Epoch(1)),
        ("an epoch too high", |message| message.epoch = Epoch(3)),
        ("another receiver", |message| message.receiver = Incarnation(random())),
        ("another journal of the sender", |message| message.sender = Incarnation(random())),
    ];
    for (name, change) in cases {
        case(g, &evil, name, PeerMisbehaved, async |a| {
            let signed = forged_final(a, change).await;
            a.say(Message::Handoff(signed)).await;
        })
        .await;
    }
    case(g, &evil, "a signature of zeroes", PeerMisbehaved, async |a| {
        let mut signed = forged_final(a, |_| {}).await;
        signed.signature = [0; 64];
        a.say(Message::Handoff(signed)).await;
    })
    .await;
    case(g, &evil, "signed by another gateway", PeerMisbehaved, async |a| {
        let message = forged_final(a, |_| {}).await.message;
        let signature = lab.credentials(OTHER).signer().sign(&message.signed_bytes()).unwrap();
        a.say(Message::Handoff(SignedHandoff { message, signature })).await;
    })
    .await;
    case(g, &evil, "a signature over another step", PeerMisbehaved, async |a| {
        let signed = forged_final(a, |_| {}).await;
        let mut message = signed.message.clone();
        message.step = Handoff::Commit { digest: a.digest() };
        a.say(Message::Handoff(SignedHandoff { message, ..signed })).await;
    })
    .await;
    case(g, &evil, "a signature of another domain", PeerMisbehaved, async |a| {
        let message = forged_final(a, |_| {}).await.message;
        let bytes = message.signed_bytes();
        let at = bytes.iter().position(|byte| *byte == 0).unwrap() + 1;
        let signature = evil.credentials.signer().sign(&bytes[at..]).unwrap();
        a.say(Message::Handoff(SignedHandoff { message, signature })).await;
    })
    .await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_out_of_order_or_a_wrong_digest_is_refused() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let g = &mut gateway;
    let nothing = FinalDigest { state: [0; 32], lanes: [0; 32], memory: 0 };
    for (name, step) in [
        ("commit first", Handoff::Commit { digest: nothing }),
        ("done first", Handoff::Done),
        ("running from the source", Handoff::Running),
        ("prepared from the source", Handoff::Prepared { digest: nothing }),
        ("refuse from the source", Handoff::Refuse { class: ErrorClass::Bug }),
    ] {
        let step = &step;
        case(g, &evil, name, PeerMisbehaved, async |a| {
            a.joined().await;
            a.step(step.clone()).await;
        })
        .await;
        case(g, &evil, &format!("{name}, after all memory"), PeerMisbehaved, async |a| {
            a.sent().await;
            a.step(step.clone()).await;
        })
        .await;
    }
    case(g, &evil, "final twice before the state", PeerMisbehaved, async |a| {
        a.sent().await;
        let digest = a.digest();
        a.step(Handoff::Final { digest, lanes: LANES }).await;
        a.step(Handoff::Final { digest, lanes: LANES }).await;
    })
    .await;
    case(g, &evil, "final for another number of lanes", PeerMisbehaved, async |a| {
        a.sent().await;
        a.send_state().await;
        let digest = a.digest();
        a.step(Handoff::Final { digest, lanes: 1 }).await;
    })
    .await;
    type Change = fn(&mut FinalDigest);
    let wrong: [(&str, Change); 3] = [
        ("wrong state digest", |digest| digest.state[0] ^= 1),
        ("wrong lane digest", |digest| digest.lanes[0] ^= 1),
        ("wrong memory digest", |digest| digest.memory ^= 1),
    ];
    for (name, change) in wrong {
        case(g, &evil, name, PeerMisbehaved, async |a| {
            a.sent().await;
            a.send_state().await;
            let mut digest = a.digest();
            change(&mut digest);
            a.step(Handoff::Final { digest, lanes: LANES }).await;
        })
        .await;
    }
    case(g, &evil, "abort", ErrorClass::Cancelled, async |a| {
        a.prepared().await;
        a.step(Handoff::Abort { class: ErrorClass::Cancelled }).await;
    })
    .await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// Every handoff message of a whole migration, said again in a session of its own: to the same gateway, then to one that
/// was restarted. The journal gains nothing, the guest runs on, nobody else can say them.
#[tokio::test(flavor = "multi_thread")]
async fn replays_change_nothing() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let other = Evil::new(&lab, OTHER, &gateway);
    let mut attempt = evil.attempt(0).await;
    attempt.moved().await;
    let (migration, said, offer) = (attempt.migration(), attempt.said.clone(), attempt.offer.clone());
    drop(attempt);
    let before = gateway.handoff_records(migration);
    assert_eq!(before, ["prepared", "run", "closed"]);
    for restarted in [false, true] {
        if restarted {
            gateway.restart_keeping_twins().await;
        }
        for by in [&evil, &other] {
            for signed in &said {
                let (session, _) = by.greet().await;
                session.send(&Message::Handoff(signed.clone())).await.unwrap();
                // Whatever it answers; it must not wait for more for ever.
                let answered = tokio::time::timeout(std::time::Duration::from_millis(300), session.receive()).await;
                if let Ok(Ok(answer)) = answered {
                    assert!(matches!(&answer, Message::Handoff(answer) if answer.message.step == Handoff::Running), "{answer:?}");
                }
            }
            let (session, _) = by.greet().await;
            session.send(&Message::Offer(offer.clone())).await.unwrap();
            let (class, reason) = verdict("the offer again", &session).await;
            assert!(matches!(class, ErrorClass::Denied | PeerMisbehaved), "{reason}");
        }
        // ABORT, signed now: too late.
        let (session, hello) = evil.greet().await;
        let step = Handoff::Abort { class: ErrorClass::Cancelled };
        let message = HandoffMessage {
            migration,
            uuid: offer.uuid,
            epoch: Epoch(2),
            sender: evil.incarnation,
            receiver: hello.incarnation,
            position: 1,
            step,
        };
        session.send(&Message::Handoff(evil.sign(message))).await.unwrap();
        drop(session);
        gateway.arrived_guest_beats("after replays", migration).await;
        assert_eq!(gateway.handoff_records(migration), before, "restarted: {restarted}");
    }
}

/// Messages of one migration in another one.
#[tokio::test(flavor = "multi_thread")]
async fn messages_of_one_migration_are_worth_nothing_in_another() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let mut first = evil.attempt(1).await;
    first.moved().await;
    let said = first.said.clone();
    drop(first);
    for signed in &said {
        let mut attempt = evil.attempt(0).await;
        attempt.sent().await;
        attempt.send_state().await;
        attempt.say(Message::Handoff(signed.clone())).await;
        assert_eq!(attempt.verdict("replayed into another").await.0, PeerMisbehaved);
        let migration = attempt.migration();
        drop(attempt);
        gateway.recorded("replayed into another", migration, PeerMisbehaved).await;
        gateway.is_well("replayed into another", 1).await;
    }
    // After PREPARED a foreign COMMIT is not ours.
    let mut attempt = evil.attempt(0).await;
    attempt.prepared().await;
    attempt.say(Message::Handoff(said[1].clone())).await;
    let migration = attempt.migration();
    attempt.step(Handoff::Abort { class: ErrorClass::Cancelled }).await;
    attempt.verdict("a foreign commit").await;
    drop(attempt);
    gateway.is_well("a foreign commit", 1).await;
    assert!(!gateway.handoff_records(migration).iter().any(|record| record == "run"));
}

/// RUN is for a guest that can run: the source has a whole one, which it may not wake behind a RUN.
#[tokio::test(flavor = "multi_thread")]
async fn a_twin_that_died_behind_prepared_is_given_back_at_commit() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let mut attempt = evil.attempt(0).await;
    attempt.prepared().await;
    gateway.kill_twins();
    attempt.step(Handoff::Commit { digest: attempt.digest() }).await;
    assert!(matches!(attempt.heard_step("refuse").await, Handoff::Refuse { .. }));
    let migration = attempt.migration();
    drop(attempt);
    gateway.is_well("a twin that died", 0).await;
    assert_eq!(gateway.handoff_records(migration), ["prepared", "refused"]);
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// A second session speaks for a migration that is under way on the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_session_does_not_speak_for_a_migration_under_way() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    // COMMIT on another session while pages still arrive: nothing was promised, so nothing may be refused for ever either.
    let mut attempt = evil.attempt(0).await;
    attempt.joined().await;
    let commit = evil.sign(attempt.message(Handoff::Commit { digest: attempt.digest() }));
    let (session, _) = evil.greet().await;
    session.send(&Message::Handoff(commit)).await.unwrap();
    verdict("commit on another session", &session).await;
    assert_eq!(gateway.handoff_records(attempt.migration()), Vec::<String>::new());
    // COMMIT there and ABORT here, after PREPARED: one of them is heard.
    let totals = attempt.pages(1);
    attempt.end_round(1, true, totals).await;
    attempt.applied().await;
    attempt.send_state().await;
    let digest = attempt.digest();
    attempt.step(Handoff::Final { digest, lanes: LANES }).await;
    assert_eq!(attempt.heard_step("prepared").await, Handoff::Prepared { digest });
    let commit = evil.sign(attempt.message(Handoff::Commit { digest: attempt.digest() }));
    let (session, _) = evil.greet().await;
    session.send(&Message::Handoff(commit)).await.unwrap();
    verdict("commit on another session", &session).await;
    attempt.step(Handoff::Abort { class: ErrorClass::Cancelled }).await;
    attempt.verdict("abort").await;
    let migration = attempt.migration();
    drop(attempt);
    gateway.is_well("two sessions", 0).await;
    assert_eq!(gateway.handoff_records(migration), ["prepared", "refused"]);
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// While a twin waits for the word of one source, nobody brings the same VM again.
#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_vm_is_not_taken_a_second_time() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let other = Evil::new(&lab, OTHER, &gateway);
    let mut first = evil.attempt(0).await;
    first.prepared().await;
    let (migration, commit) = (first.migration(), evil.sign(first.message(Handoff::Commit { digest: first.digest() })));
    drop(first);
    gateway.recorded("source gone after prepared", migration, ErrorClass::InDoubt).await;
    for restarted in [false, true] {
        if restarted {
            gateway.restart_keeping_twins().await;
        }
        let second = other.attempt(0).await;
        second.say(Message::Offer(second.offer.clone())).await;
        assert_eq!(second.verdict("the same VM").await.0, ErrorClass::Denied, "restarted: {restarted}");
    }
    // Its own source still gets what it was promised.
    let (session, _) = evil.greet().await;
    session.send(&Message::Handoff(commit)).await.unwrap();
    loop {
        match session.receive().await.unwrap() {
            Message::Handoff(answer) => {
                assert_eq!(answer.message.step, Handoff::Running);
                break;
            }
            Message::AuditHead(_) | Message::AuditAnswer(_) => {}
            other => panic!("{other:?}"),
        }
    }
    drop(session);
    gateway.arrived_guest_beats("after the second source", migration).await;
}
