//! HELLO and first messages.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use sealane::audit::{Event, Filter};
use sealane::telemetry::ErrorClass;
use sealane::types::{Epoch, Round};
use sealane::wire::{
    Accept, AuditAnswer, AuditHead, Failure, Feature, Handoff, HandoffMessage, Hello, LaneTotals, Message, Offer, RoundApplied, RoundEnd,
    StateChunk,
};

use crate::lab::{EVIL, Gateway, Lab, until, uuid, within};
use crate::source::{Attempt, Evil, random, takes_an_honest_vm, verdict};

/// A session whose bytes are ours.
struct Raw {
    _endpoint: quinn::Endpoint,
    connection: quinn::Connection,
    send: quinn::SendStream,
    _receive: quinn::RecvStream,
}

impl Raw {
    async fn connect(evil: &Evil) -> Self {
        Self::reading(evil, 1 << 20).await
    }

    /// A peer that reads so many bytes and then no more.
    async fn reading(evil: &Evil, window: u32) -> Self {
        let tls = QuicClientConfig::try_from(evil.credentials.client_config()).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        // The first byte sends it to the socket for sessions.
        config.initial_dst_cid_provider(Arc::new(|| {
            let mut id = random::<16>();
            id[0] = 0;
            quinn::ConnectionId::new(&id)
        }));
        let mut transport = quinn::TransportConfig::default();
        transport.stream_receive_window(window.into());
        transport.keep_alive_interval(Some(Duration::from_secs(1)));
        config.transport_config(Arc::new(transport));
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = within("raw", endpoint.connect_with(config, evil.address, "127.0.0.1").unwrap()).await.unwrap();
        let (send, receive) = within("raw", connection.open_bi()).await.unwrap();
        Self { _endpoint: endpoint, connection, send, _receive: receive }
    }

    /// The class with which the gateway ends it.
    async fn end(&self, case: &str) -> Option<ErrorClass> {
        match within(case, self.connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(close) => {
                ErrorClass::from_number(u16::try_from(close.error_code.into_inner()).unwrap())
            }
            other => panic!("{case}: {other}"),
        }
    }
}

fn refusals(gateway: &Gateway) -> usize {
    gateway.entries(Filter { event: Some(Event::SessionRefused), ..Filter::default() }).len()
}

async fn refused(gateway: &mut Gateway, case: &str, before: usize, class: ErrorClass) {
    until(case, || (refusals(gateway) > before).then_some(())).await;
    let last = gateway.entries(Filter { event: Some(Event::SessionRefused), ..Filter::default() }).pop().unwrap();
    assert_eq!(last.detail.get("class"), Some(&serde_json::to_value(class).unwrap()), "{case}: {last:?}");
    gateway.is_well(case, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_greeting_ends_the_session_and_is_recorded() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let feature = |critical| vec![Feature { name: "teleport".into(), critical }];
    let hello = evil.hello();
    let offer = {
        let attempt = evil.attempt(0).await;
        attempt.offer.clone()
    };
    let cases: Vec<(&str, Vec<Message>, ErrorClass)> = vec![
        ("no hello", vec![Message::Offer(offer)], ErrorClass::PeerMisbehaved),
        ("a ping first", vec![Message::Ping], ErrorClass::PeerMisbehaved),
        ("hello twice", vec![Message::Hello(hello.clone()), Message::Hello(hello.clone())], ErrorClass::PeerMisbehaved),
        (
            "unknown critical feature",
            vec![Message::Hello(Hello { features: feature(true), ..hello.clone() })],
            ErrorClass::PeerIncompatible,
        ),
        (
            "versions of tomorrow",
            vec![Message::Hello(Hello { version_min: 2, version_max: 9, ..hello.clone() })],
            ErrorClass::PeerIncompatible,
        ),
        (
            "versions upside down",
            vec![Message::Hello(Hello { version_min: 9, version_max: 1, ..hello.clone() })],
            ErrorClass::PeerMisbehaved,
        ),
        ("version zero", vec![Message::Hello(Hello { version_min: 0, ..hello.clone() })], ErrorClass::PeerMisbehaved),
        ("a key of nobody", vec![Message::Hello(Hello { signing_key: [0; 32], ..hello.clone() })], ErrorClass::PeerMisbehaved),
        (
            "a feature twice",
            vec![Message::Hello(Hello { features: [feature(false), feature(false)].concat(), ..hello.clone() })],
            ErrorClass::PeerMisbehaved,
        ),
    ];
    for (name, messages, expected) in cases {
        let before = refusals(&gateway);
        let session = evil.connect().await;
        for message in messages {
            let _ = session.send(&message).await;
        }
        assert_eq!(verdict(name, &session).await.0, expected, "{name}");
        refused(&mut gateway, name, before, expected).await;
    }
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_offer_or_a_handoff_opens_a_conversation() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let migration = sealane::types::MigrationId(random());
    let totals = vec![LaneTotals::default(); 2];
    let cases = [
        Message::Accept(Accept { migration, lanes: 1, policy_digest: [0; 32], bandwidth_max: None }),
        Message::RoundEnd(RoundEnd { migration, round: Round(1), last: true, lanes: totals.clone() }),
        Message::RoundApplied(RoundApplied { migration, round: Round(1), lanes: totals }),
        Message::StateChunk(StateChunk { migration, offset: 0, total: 1, bytes: vec![1] }),
        Message::Hello(evil.hello()),
    ];
    for message in cases {
        let name = message.name();
        let before = refusals(&gateway);
        let (session, _) = evil.greet().await;
        session.send(&message).await.unwrap();
        assert_eq!(verdict(name, &session).await.0, ErrorClass::PeerMisbehaved, "{name}");
        refused(&mut gateway, name, before, ErrorClass::PeerMisbehaved).await;
    }
    // Handoff messages about migrations that never were promise nothing and leave nothing.
    for step in [Handoff::Prepared { digest: Attempt::digest(&evil.attempt(0).await) }, Handoff::Running, Handoff::Done] {
        let (session, hello) = evil.greet().await;
        let message = HandoffMessage {
            migration,
            uuid: uuid(0),
            epoch: Epoch(7),
            sender: evil.incarnation,
            receiver: hello.incarnation,
            position: 1,
            step,
        };
        session.send(&Message::Handoff(evil.sign(message))).await.unwrap();
        verdict("a stray handoff", &session).await;
        assert_eq!(gateway.handoff_records(migration), Vec::<String>::new());
    }
    // A probe may say these and leave.
    for message in [
        Message::AuditHead(AuditHead { checkpoint: "x".into(), from: 0, consistency: Vec::new(), proof: String::new() }),
        Message::AuditAnswer(AuditAnswer { entries: 1, cosignature: "x".into() }),
        Message::Failure(Failure { class: ErrorClass::Bug, reason: "\u{1b}[2J\nfake line".into() }),
    ] {
        let (session, _) = evil.greet().await;
        session.send(&message).await.unwrap();
        verdict(message.name(), &session).await;
    }
    assert!(!gateway.log().contains('\u{1b}'), "{}", gateway.log());
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// Control messages with every kind of wrong length.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_message_end_the_session() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let hello = Message::Hello(evil.hello()).encode_framed();
    let offer: Offer = evil.attempt(0).await.offer.clone();
    let body = |kind: u8, bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_le_bytes(), &[kind][..], bytes].concat();
    let offered = Message::Offer(offer).encode_framed();
    let traversal = {
        let at = offered.windows(4).position(|bytes| bytes == b"vm-0").unwrap();
        [&offered[..at], b"../0", &offered[at + 4..]].concat()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("oversize", [(1u32 << 20) + 1].iter().flat_map(|length| length.to_le_bytes()).chain([1]).collect()),
        ("largest length", [0xff; 5].to_vec()),
        ("kind zero", body(0, &[])),
        ("kind unknown", body(11, &[])),
        ("hello cut", body(1, &hello[5..hello.len() - 1])),
        ("hello with slack", body(1, &[&hello[5..], &[0]].concat())),
        ("hello empty", body(1, &[])),
        ("ping with a body", body(10, &[0])),
        ("offer cut", [hello.clone(), body(2, &offered[5..60])].concat()),
        ("offer with slack", [hello.clone(), body(2, &[&offered[5..], &[0]].concat())].concat()),
        ("offer of a VM with a path as its name", [hello.clone(), traversal].concat()),
        ("handoff cut", [hello.clone(), body(7, &[1; 20])].concat()),
        ("failure of no class", [hello.clone(), body(9, &[0, 0, 0, 0, 0, 0])].concat()),
    ];
    for (name, bytes) in cases {
        let before = refusals(&gateway);
        let mut raw = Raw::connect(&evil).await;
        raw.send.write_all(&bytes).await.unwrap();
        assert_eq!(raw.end(name).await, Some(ErrorClass::PeerMisbehaved), "{name}");
        refused(&mut gateway, name, before, ErrorClass::PeerMisbehaved).await;
    }
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}

/// A live peer that says nothing, or one byte, does not keep its session.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_but_silent_peer_is_left() {
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let half_hello = async {
        let mut raw = Raw::connect(&evil).await;
        raw.send.write_all(&[1]).await.unwrap();
        assert_eq!(raw.end("half a header").await, Some(ErrorClass::TimedOut));
    };
    let reads_nothing = async {
        let mut raw = Raw::reading(&evil, 1).await;
        raw.send.write_all(&Message::Hello(evil.hello()).encode_framed()).await.unwrap();
        assert_eq!(raw.end("reads nothing").await, Some(ErrorClass::TimedOut));
    };
    let reads_only_hello = async {
        let hello = Message::Hello(evil.hello()).encode_framed();
        let mut raw = Raw::reading(&evil, u32::try_from(hello.len()).unwrap()).await;
        let mut refused = evil.attempt(0).await.offer.clone();
        refused.vm = "stranger".parse().unwrap();
        raw.send.write_all(&[hello, Message::Offer(refused).encode_framed()].concat()).await.unwrap();
        // It never hears the refusal, and is left all the same.
        raw.end("reads no refusal").await;
    };
    let no_offer = async {
        let (session, _) = evil.greet().await;
        assert_eq!(verdict("no offer", &session).await.0, ErrorClass::TimedOut);
    };
    let half_offer = async {
        let mut raw = Raw::connect(&evil).await;
        raw.send.write_all(&Message::Hello(evil.hello()).encode_framed()).await.unwrap();
        raw.send.write_all(&[0, 0, 1, 0, 2, 7]).await.unwrap();
        assert_eq!(raw.end("half an offer").await, Some(ErrorClass::TimedOut));
    };
    tokio::join!(half_hello, reads_nothing, reads_only_hello, no_offer, half_offer);
    gateway.is_well("silence", 0).await;
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}
