//! Messages at the wrong time, and totals that lie.

use sealane::telemetry::ErrorClass::{PeerMisbehaved, TimedOut, Unauthenticated};
use sealane::transport::TransportError;
use sealane::types::{MigrationId, Round};
use sealane::wire::{Accept, Handoff, LaneTotals, Message, RoundApplied, RoundEnd, StateChunk};

use crate::lab::{EVIL, Lab};
use crate::source::{Evil, LANES, case, random, takes_an_honest_vm};

#[tokio::test(flavor = "multi_thread")]
async fn a_message_out_of_place_ends_the_migration() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let g = &mut gateway;
    let none = vec![LaneTotals::default(); usize::from(LANES)];

    case(g, &evil, "a second offer", PeerMisbehaved, async |a| {
        a.accepted().await;
        a.say(Message::Offer(a.offer.clone())).await;
    })
    .await;
    case(g, &evil, "hello in a migration", PeerMisbehaved, async |a| {
        a.accepted().await;
        a.say(Message::Hello(evil.hello())).await;
    })
    .await;
    case(g, &evil, "accept from the source", PeerMisbehaved, async |a| {
        a.accepted().await;
        a.say(Message::Accept(Accept { migration: a.migration(), lanes: 1, policy_digest: [0; 32], bandwidth_max: None })).await;
    })
    .await;
    case(g, &evil, "round applied from the source", PeerMisbehaved, async |a| {
        a.joined().await;
        a.say(Message::RoundApplied(RoundApplied { migration: a.migration(), round: Round(1), lanes: none.clone() })).await;
    })
    .await;
    case(g, &evil, "round end twice before the lanes", PeerMisbehaved, async |a| {
        a.accepted().await;
        a.end_round(1, true, none.clone()).await;
        a.end_round(1, true, none.clone()).await;
    })
    .await;
    case(g, &evil, "round end for another number of lanes", PeerMisbehaved, async |a| {
        a.joined().await;
        a.end_round(1, true, vec![LaneTotals::default(); 1]).await;
    })
    .await;
    case(g, &evil, "round end of another migration", PeerMisbehaved, async |a| {
        a.joined().await;
        let lanes = a.pages(1);
        a.say(Message::RoundEnd(RoundEnd { migration: MigrationId(random()), round: Round(1), last: true, lanes })).await;
    })
    .await;
    case(g, &evil, "the first round is 2", PeerMisbehaved, async |a| {
        a.joined().await;
        let lanes = a.pages(2);
        a.end_round(2, true, lanes).await;
    })
    .await;
    case(g, &evil, "a round again", PeerMisbehaved, async |a| {
        a.joined().await;
        let lanes = a.pages(1);
        a.end_round(1, false, lanes.clone()).await;
        a.applied().await;
        a.end_round(1, false, lanes).await;
    })
    .await;
    case(g, &evil, "a round after the last", PeerMisbehaved, async |a| {
        a.sent().await;
        let lanes = a.pages(2);
        a.end_round(2, true, lanes).await;
    })
    .await;
    case(g, &evil, "totals that lie in the round end", PeerMisbehaved, async |a| {
        a.joined().await;
        let mut lanes = a.pages(1);
        lanes[1].pages += 1;
        a.end_round(1, true, lanes).await;
    })
    .await;
    case(g, &evil, "totals of lanes exchanged", PeerMisbehaved, async |a| {
        a.joined().await;
        let mut lanes = a.pages(1);
        lanes.reverse();
        a.end_round(1, true, lanes).await;
    })
    .await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn device_state_comes_once_and_in_order() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let g = &mut gateway;
    let total = 64 << 20;
    /// Offset, total and length of each piece.
    type Pieces = Vec<(u64, u64, usize)>;
    let cases: [(&str, Pieces); 8] = [
        ("a gap", vec![(0, 100, 10), (11, 100, 10)]),
        ("an overlap", vec![(0, 100, 10), (9, 100, 10)]),
        ("the same piece", vec![(0, 100, 10), (0, 100, 10)]),
        ("not from the beginning", vec![(1, 100, 10)]),
        ("another total", vec![(0, 100, 10), (10, 101, 10)]),
        ("more than the total", vec![(0, 10, 10), (10, 10, 1)]),
        ("a total over the limit", vec![(0, total + 1, 10)]),
        ("a total of nothing", vec![(0, 0, 0)]),
    ];
    for (name, chunks) in cases {
        case(g, &evil, name, PeerMisbehaved, async |a| {
            a.sent().await;
            for (offset, total, bytes) in chunks {
                a.chunk(offset, total, vec![7; bytes]).await;
            }
        })
        .await;
    }
    case(g, &evil, "state of another migration", PeerMisbehaved, async |a| {
        a.sent().await;
        a.say(Message::StateChunk(StateChunk { migration: MigrationId(random()), offset: 0, total: 9, bytes: vec![1; 9] })).await;
    })
    .await;
    case(g, &evil, "state that does not end and is then taken back", PeerMisbehaved, async |a| {
        a.sent().await;
        for piece in 0..20u64 {
            a.chunk(piece << 19, total, vec![7; 1 << 19]).await;
        }
        a.chunk(0, total, vec![1]).await;
    })
    .await;
    case(g, &evil, "state that no VMM takes", sealane::telemetry::ErrorClass::Local, async |a| {
        a.sent().await;
        a.state = b"{\"schema\":1,\"seed\":1,\"beats\":0,\"visits\":[]}".to_vec();
        a.send_state().await;
        let digest = a.digest();
        a.step(Handoff::Final { digest, lanes: LANES }).await;
    })
    .await;
    case(g, &evil, "state of garbage", sealane::telemetry::ErrorClass::Local, async |a| {
        a.sent().await;
        a.state = vec![0xa5; 100_000];
        a.send_state().await;
        let digest = a.digest();
        a.step(Handoff::Final { digest, lanes: LANES }).await;
    })
    .await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_lanes_of_the_session_join() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let g = &mut gateway;
    // Before an offer was accepted nobody may join; the tag is of another migration; the number is not granted or is used.
    let mut attempt = evil.attempt(0).await;
    let early = attempt.open_lane(0).await;
    assert!(matches!(&early, Err(error) if error.class() == Unauthenticated), "{early:?}");
    attempt.accepted().await;
    let other = evil.attempt(1).await;
    let spliced = other.session.open_lane(attempt.migration(), sealane::types::LaneIndex(0), lane_end).await.unwrap().join().await.unwrap();
    assert_eq!(spliced, Some(Unauthenticated), "a lane of another session");
    for (name, lane) in [("beyond those granted", LANES), ("the highest", 15)] {
        let end =
            attempt.session.open_lane(attempt.migration(), sealane::types::LaneIndex(lane), lane_end).await.unwrap().join().await.unwrap();
        assert_eq!(end, Some(PeerMisbehaved), "{name}");
    }
    attempt.open_lane(0).await.unwrap();
    attempt.open_lane(1).await.unwrap();
    let twice = attempt.session.open_lane(attempt.migration(), sealane::types::LaneIndex(1), lane_end).await.unwrap().join().await.unwrap();
    assert_eq!(twice, Some(PeerMisbehaved), "a lane twice");
    // The real lanes never noticed.
    let totals = attempt.pages(1);
    attempt.end_round(1, true, totals).await;
    attempt.applied().await;
    drop((attempt, other));
    g.is_well("strange lanes", 0).await;

    case(g, &evil, "a lane that ends in the middle of a round", PeerMisbehaved, async |a| {
        a.joined().await;
        a.lanes.truncate(1);
    })
    .await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// How the gateway ends a lane on which nothing is sent.
async fn lane_end(mut io: sealane::transport::LaneIo) -> Option<sealane::telemetry::ErrorClass> {
    let mut byte = [0];
    match io.receiver.read_exact(&mut byte).await {
        Err(TransportError::Closed { class, .. }) => class,
        _ => None,
    }
}

/// A source that lives and says nothing does not keep the VM claimed.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_but_silent_source_is_left_in_every_state() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let (mut accepted, mut joined, mut round, mut sent, mut stated) =
        tokio::join!(evil.attempt(0), evil.attempt(1), evil.attempt(2), evil.attempt(3), evil.attempt(4));
    accepted.accepted().await;
    joined.joined().await;
    round.joined().await;
    let totals = round.pages(1);
    round.end_round(1, false, totals).await;
    round.applied().await;
    sent.sent().await;
    stated.sent().await;
    stated.send_state().await;
    for (name, attempt) in [("accepted", accepted), ("joined", joined), ("a round", round), ("sent", sent), ("state", stated)] {
        assert_eq!(
            tokio::time::timeout(std::time::Duration::from_secs(60), attempt.session.closed_after_failure()).await.unwrap(),
            TimedOut,
            "{name}"
        );
        let migration = attempt.migration();
        drop(attempt);
        gateway.recorded(name, migration, TimedOut).await;
    }
    gateway.is_well("silence", 0).await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

trait ClosedAfterFailure {
    async fn closed_after_failure(&self) -> sealane::telemetry::ErrorClass;
}

impl ClosedAfterFailure for sealane::transport::Session {
    async fn closed_after_failure(&self) -> sealane::telemetry::ErrorClass {
        loop {
            match self.receive().await {
                Ok(Message::Failure(failure)) => return failure.class,
                Ok(_) => {}
                Err(error) => return error.class(),
            }
        }
    }
}
