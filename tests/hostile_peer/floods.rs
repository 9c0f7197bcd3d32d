//! Too much of everything.

use sealane::audit::{Event, Filter};
use sealane::telemetry::ErrorClass;
use sealane::wire::Message;

use crate::lab::{EVIL, Lab, OTHER, until};
use crate::source::{Evil, takes_an_honest_vm, verdict};

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_holds_all_its_sessions_keeps_nobody_out() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let (evil, other) = (Evil::new(&lab, EVIL, &gateway), Evil::new(&lab, OTHER, &gateway));
    let mut held = Vec::new();
    for _ in 0..sealane::limits::SESSIONS_PER_PEER_MAX {
        let session = evil.connect().await;
        session.send(&Message::Hello(evil.hello())).await.unwrap();
        held.push(session);
    }
    for _ in 0..10 {
        let session = evil.connect().await;
        let _ = session.send(&Message::Hello(evil.hello())).await;
        assert_eq!(verdict("one more", &session).await.0, ErrorClass::PeerBusy);
    }
    takes_an_honest_vm(&mut gateway, &other, 9, 1).await;
    drop(held);
    gateway.is_well("many sessions", 1).await;
}

/// Every session costs an entry or more; those beyond a rate cost a number in one.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_sessions_does_not_flood_the_audit_log() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let (evil, other) = (Evil::new(&lab, EVIL, &gateway), Evil::new(&lab, OTHER, &gateway));
    let burst = sealane::limits::SESSIONS_BURST as usize;
    for _ in 0..burst * 2 {
        let session = evil.connect().await;
        let _ = session.send(&Message::Ping).await;
        verdict("a flood", &session).await;
    }
    let refused = Filter { event: Some(Event::SessionRefused), peer: Some(crate::lab::spiffe(EVIL).to_string()), ..Filter::default() };
    let counted = until("a number", || gateway.entries(refused.clone()).iter().find_map(|entry| entry.detail.get("count")?.as_u64())).await;
    // How many is a question of how fast this host shakes hands: what is allowed grows again meanwhile.
    assert!(counted > 8, "{counted}");
    let entries = gateway.entries(Filter::default()).len();
    assert!(entries < 4 * burst, "{entries} entries of {} sessions", 2 * burst);
    takes_an_honest_vm(&mut gateway, &other, 9, 1).await;
}

/// All at once: no more migrations than allowed, each VM once.
#[tokio::test(flavor = "multi_thread")]
async fn many_offers_at_once_are_admitted_up_to_the_limit() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let (evil, other) = (Evil::new(&lab, EVIL, &gateway), Evil::new(&lab, OTHER, &gateway));
    let mut attempts = Vec::new();
    for index in 0..9 {
        attempts.push(evil.attempt(index).await);
        attempts.push(other.attempt(index).await);
    }
    for attempt in &attempts {
        attempt.say(Message::Offer(attempt.offer.clone())).await;
    }
    let (mut accepted, mut refused) = (Vec::new(), 0);
    for attempt in attempts {
        match attempt.hear("an answer").await {
            Message::Accept(_) => accepted.push(attempt),
            Message::Failure(_) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((accepted.len(), refused), (8, 10));
    let mut vms: Vec<_> = accepted.iter().map(|attempt| attempt.offer.vm.clone()).collect();
    vms.dedup();
    assert_eq!(vms.len(), 8, "{vms:?}");
    drop(accepted);
    gateway.is_well("many offers", 0).await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}
