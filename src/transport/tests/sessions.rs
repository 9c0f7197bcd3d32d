use std::time::Duration;

use super::link::Link;
use super::*;
use crate::transport::TransportError;
use crate::wire::{ErrorClass, Failure, StateChunk};

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_every_size_travel_both_ways_between_verified_peers() {
    let pair = Pair::new(config()).await;
    assert_eq!((pair.ours.peer().spiffe(), pair.theirs.peer().spiffe()), (&id("gw-b"), &id("gw-a")));
    assert_eq!(pair.ours.channel().tls, "1.3");
    assert!(pair.theirs.channel().peer_ip.is_loopback());
    assert!(pair.ours.verify_again().is_ok() && pair.theirs.verify_again().is_ok());
    let large = Message::StateChunk(StateChunk {
        migration: MIGRATION,
        offset: 0,
        total: 1 << 20,
        bytes: (0..512 * 1024).map(|n: u32| n.to_le_bytes()[1]).collect(),
    });
    let small = Message::Failure(Failure { class: ErrorClass::Cancelled, reason: "enough".to_owned() });
    let mut sent = Vec::new();
    for _ in 0..8 {
        sent.extend([large.clone(), Message::Ping, small.clone()]);
    }
    for (from, to) in [(&pair.ours, &pair.theirs), (&pair.theirs, &pair.ours)] {
        let send = async {
            for message in &sent {
                from.send(message).await.unwrap();
            }
        };
        let receive = async {
            for message in &sent {
                assert_eq!(&to.receive().await.unwrap(), message);
            }
        };
        within(async { tokio::join!(send, receive) }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_calls_neither_lose_nor_tear_a_message() {
    let pair = Pair::new(config()).await;
    let chunk = |n: u64| {
        Message::StateChunk(StateChunk { migration: MIGRATION, offset: n, total: 1 << 20, bytes: vec![n.to_le_bytes()[0]; 500_000] })
    };
    let send = async {
        for n in 0..40 {
            let message = chunk(n);
            let sending = pair.ours.send(&message);
            tokio::select! {
                biased;
                sent = sending => sent.unwrap(),
                () = tokio::time::sleep(Duration::from_micros(300)) => {}
            }
        }
        pair.ours.send(&Message::Ping).await.unwrap();
    };
    let receive = async {
        let mut next = 0;
        loop {
            let received = tokio::select! {
                biased;
                received = pair.theirs.receive() => received.unwrap(),
                () = tokio::time::sleep(Duration::from_micros(300)) => continue,
            };
            if received == Message::Ping {
                return next;
            }
            // A call that was interrupted before its message was taken up has sent nothing of it.
            next = (next..40).find(|n| chunk(*n) == received).expect("a message arrives whole and in order") + 1;
        }
    };
    let ((), next) = within(async { tokio::join!(send, receive) }).await;
    assert!(next > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_another_identity_than_expected_is_refused() {
    let fleet = Fleet::new();
    let (source, destination) = (endpoint(&fleet.gateway("gw-a")), endpoint(&fleet.gateway("gw-b")));
    let error = within(source.connect(destination.local_address(), &id("gw-c"))).await.unwrap_err();
    assert!(matches!(&error, TransportError::WrongPeer { expected, got, .. } if *expected == id("gw-c") && *got == id("gw-b")), "{error}");
    assert_eq!(error.class(), ErrorClass::Unauthenticated);
    let refused = refusal(&destination).await;
    assert_eq!((refused.peer, refused.reason.class()), (Some(id("gw-a")), ErrorClass::Unauthenticated));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_authority_is_refused_with_the_verifiers_reason() {
    let (ours, other) = (Fleet::new(), Fleet::new());
    let (source, destination) = (endpoint(&ours.gateway("gw-a")), endpoint(&other.gateway("gw-b")));
    let error = within(source.connect(destination.local_address(), &id("gw-b"))).await.unwrap_err();
    assert!(matches!(error, TransportError::Unauthenticated { .. }), "{error}");
    assert!(error.to_string().contains("UnknownIssuer") || error.to_string().contains("does not chain to a root"), "{error}");
    let refused = refusal(&destination).await;
    assert_eq!(refused.reason.class(), ErrorClass::Unauthenticated, "{}", refused.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_gateway_is_refused_and_learns_it_from_connect() {
    let fleet = Fleet::new();
    let source = endpoint(&fleet.gateway("gw-a"));
    crate::identity::authority::revoke(&fleet.dir.path().join("ca"), "gw-a").unwrap();
    let destination = endpoint(&fleet.gateway("gw-b"));
    let error = within(source.connect(destination.local_address(), &id("gw-b"))).await.unwrap_err();
    assert!(matches!(error, TransportError::RefusedByPeer { .. }), "{error}");
    let refused = refusal(&destination).await;
    assert!(refused.reason.to_string().to_lowercase().contains("revoked"), "{}", refused.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reason_of_a_close_reaches_the_peer() {
    let pair = Pair::new(config()).await;
    pair.theirs.close(Some(ErrorClass::Denied), "policy said no\n");
    let error = within(pair.ours.receive()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Denied);
    assert!(error.to_string().ends_with(r"closed the connection, saying `policy said no\n`"), "{error}");
    assert!(matches!(within(pair.theirs.closed()).await, TransportError::ClosedHere));
}

#[tokio::test(flavor = "multi_thread")]
async fn finishing_delivers_every_message_and_then_the_reason() {
    let pair = Pair::new(config()).await;
    let chunk = Message::StateChunk(StateChunk { migration: MIGRATION, offset: 0, total: 1 << 20, bytes: vec![7; 512 * 1024] });
    let finish = async {
        for _ in 0..6 {
            pair.ours.send(&chunk).await.unwrap();
        }
        pair.ours.finish(Some(ErrorClass::Cancelled), "enough", Duration::from_secs(20)).await;
    };
    let receive = async {
        for _ in 0..6 {
            assert_eq!(pair.theirs.receive().await.unwrap(), chunk);
        }
        let TransportError::Closed { class: None, .. } = pair.theirs.receive().await.unwrap_err() else { panic!("a clean end") };
        assert_eq!(pair.theirs.closed().await.class(), ErrorClass::Cancelled);
    };
    within(async { tokio::join!(finish, receive) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_vanishes_ends_the_session_after_the_idle_timeout() {
    let fast = TransportConfig { idle_timeout: Duration::from_millis(600), keep_alive: Duration::from_millis(150), ..config() };
    let mut link = None;
    let pair = Pair::through(fast, |listener| link.insert(Link::to(listener)).address).await;
    link.as_ref().unwrap().cut();
    for session in [&pair.ours, &pair.theirs] {
        let error = within(session.receive()).await.unwrap_err();
        assert!(matches!(error, TransportError::Unreachable { .. }), "{error}");
        assert_eq!(error.class(), ErrorClass::PeerUnreachable);
    }
    link.unwrap().end();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_listener_on_the_ipv6_wildcard_serves_both_families() {
    let fleet = Fleet::new();
    let source = endpoint(&fleet.gateway("gw-a"));
    let everywhere = TransportConfig { listen: "[::]:0".parse().unwrap(), ..config() };
    let destination = match Endpoint::bind(everywhere, fleet.gateway("gw-b")) {
        Ok(destination) => destination,
        Err(error) => return eprintln!("SKIPPED: no IPv6 here: {error}"),
    };
    let port = destination.local_address().port();
    for ip in ["127.0.0.1", "::1"] {
        let address = SocketAddr::new(ip.parse().unwrap(), port);
        let (ours, theirs) = join_up(&source, &destination, address).await;
        assert_eq!(theirs.channel().peer_ip.to_string(), ip);
        let gate = theirs.expect_lanes(MIGRATION, 1, Arc::new(|io| Box::pin(lanes::drain(io)))).unwrap();
        let lane = ours.open_lane(MIGRATION, crate::types::LaneIndex(0), |mut io| async move { io.sender.finish().await.is_ok() });
        assert!(within(within(lane).await.unwrap().join()).await.unwrap());
        lanes::joined(&gate, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_at_an_address_is_unreachable() {
    let fleet = Fleet::new();
    let hasty = TransportConfig { connect_timeout: Duration::from_millis(300), ..config() };
    let source = Endpoint::bind(hasty, fleet.gateway("gw-a")).unwrap();
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = within(source.connect(nobody, &id("gw-b"))).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::PeerUnreachable, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_ends_sessions_lanes_tasks_and_threads() {
    let pair = Pair::new(config()).await;
    let gate = pair.theirs.expect_lanes(MIGRATION, 2, Arc::new(|io| Box::pin(lanes::drain(io)))).unwrap();
    let lane = pair.ours.open_lane(MIGRATION, crate::types::LaneIndex(0), lanes::send_forever).await.unwrap();
    lanes::joined(&gate, 1).await;
    within(pair.source.shutdown()).await;
    within(pair.destination.shutdown()).await;
    assert!(within(lane.join()).await.is_err());
    assert!(pair.ours.receive().await.is_err() && pair.theirs.receive().await.is_err());
    assert!(within(pair.destination.accept()).await.is_none());
    assert!(pair.source.connect(pair.destination.local_address(), &id("gw-b")).await.is_err());
    let Pair { source, destination, ours, theirs, .. } = pair;
    drop((ours, theirs, gate));
    for endpoint in [&source, &destination] {
        within(async {
            // Every thread and task holds what endpoints share; when all are gone the endpoint holds it alone.
            while endpoint.holders() > 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}
