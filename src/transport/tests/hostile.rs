//! Peers that do what no gateway of ours does.

use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::link::Link;
use super::*;
use crate::identity::provider;
use crate::transport::congestion::Group;
use crate::transport::join::JoinKey;
use crate::transport::tls::QuicTls;
use crate::transport::{LaneGate, LaneRefusal, TransportError, steer};
use crate::types::LaneIndex;
use crate::wire::{ErrorClass, Join};

const OTHER: MigrationId = MigrationId([0xa5; 16]);

/// A QUIC connection made by hand, with the credentials of a gateway or with none.
struct Raw {
    _endpoint: quinn::Endpoint,
    connection: Connection,
}

impl Raw {
    async fn connect(config: quinn::ClientConfig, address: SocketAddr) -> Result<Self, ConnectionError> {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = within(endpoint.connect_with(config, address, "127.0.0.1").unwrap()).await?;
        Ok(Self { _endpoint: endpoint, connection })
    }

    async fn session(credentials: &Arc<Credentials>, address: SocketAddr) -> Self {
        let tls = QuicTls::new(Arc::clone(credentials)).unwrap();
        Self::connect(config().session_client(&tls), address).await.unwrap()
    }

    async fn lane(credentials: &Arc<Credentials>, address: SocketAddr) -> Self {
        let tls = QuicTls::new(Arc::clone(credentials)).unwrap();
        let lane = LaneIndex(0);
        let member = Arc::new(Arc::<Group>::default().join(lane));
        Self::connect(config().lane_client(&tls, steer::lane_byte(MIGRATION, lane), 1452, member), address).await.unwrap()
    }

    async fn open(&self) -> (SendStream, RecvStream) {
        within(self.connection.open_bi()).await.unwrap()
    }

    async fn join(&self, join: Join) -> (SendStream, RecvStream) {
        let (mut send, receive) = self.open().await;
        send.write_all(&join.encode()).await.unwrap();
        (send, receive)
    }

    /// The class with which the other side ends the connection.
    async fn end(&self) -> Option<ErrorClass> {
        let error = within(self.connection.closed()).await;
        let ConnectionError::ApplicationClosed(close) = error else { panic!("{error}") };
        ErrorClass::from_number(u16::try_from(close.error_code.into_inner()).unwrap())
    }
}

/// A pair with two live migrations, and the source's credentials for mischief.
async fn two_migrations() -> (Pair, Arc<Credentials>, [LaneGate; 2]) {
    let pair = Pair::new(config()).await;
    let gates =
        [MIGRATION, OTHER].map(|migration| pair.theirs.expect_lanes(migration, 2, Arc::new(|io| Box::pin(lanes::drain(io)))).unwrap());
    let credentials = Arc::clone(&pair.credentials);
    (pair, credentials, gates)
}

fn why(refused: &Refused) -> LaneRefusal {
    match &refused.reason {
        TransportError::LaneRefused { why, .. } => *why,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_of_one_migration_cannot_be_spliced_into_another() {
    let (pair, credentials, gates) = two_migrations().await;
    let lane = Raw::lane(&credentials, pair.destination.local_address()).await;
    let key = JoinKey::new(&pair.ours.connection, MIGRATION).unwrap();
    let honest = key.join(&lane.connection, LaneIndex(0)).unwrap();
    let _streams = lane.join(Join { migration: OTHER, ..honest }).await;
    assert_eq!(lane.end().await, Some(ErrorClass::Unauthenticated));
    let refused = pair.refusal().await;
    assert_eq!((why(&refused), refused.peer), (LaneRefusal::BadTag, Some(id("gw-a"))));
    assert_eq!(gates.each_ref().map(LaneGate::joined), [0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_replayed_on_another_connection_or_for_another_lane_is_refused() {
    let (pair, credentials, gates) = two_migrations().await;
    let address = pair.destination.local_address();
    let (first, second) = (Raw::lane(&credentials, address).await, Raw::lane(&credentials, address).await);
    let key = JoinKey::new(&pair.ours.connection, MIGRATION).unwrap();
    let honest = key.join(&first.connection, LaneIndex(0)).unwrap();
    let _streams = second.join(honest.clone()).await;
    assert_eq!(second.end().await, Some(ErrorClass::Unauthenticated));
    assert_eq!(why(&pair.refusal().await), LaneRefusal::BadTag);
    let _streams = first.join(Join { lane: LaneIndex(1), ..honest }).await;
    assert_eq!(first.end().await, Some(ErrorClass::Unauthenticated));
    assert_eq!(why(&pair.refusal().await), LaneRefusal::BadTag);
    assert_eq!(gates[0].joined(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_number_is_used_once_and_only_if_granted() {
    let (pair, credentials, gates) = two_migrations().await;
    let address = pair.destination.local_address();
    let key = JoinKey::new(&pair.ours.connection, MIGRATION).unwrap();
    let good = Raw::lane(&credentials, address).await;
    let _streams = good.join(key.join(&good.connection, LaneIndex(1)).unwrap()).await;
    for (lane, expected) in [(1, LaneRefusal::AlreadyUsed), (2, LaneRefusal::BeyondGranted)] {
        let raw = Raw::lane(&credentials, address).await;
        // Only once the good lane is in, the same number is a second use.
        lanes::joined(&gates[0], 1).await;
        let _streams = raw.join(key.join(&raw.connection, LaneIndex(lane)).unwrap()).await;
        assert_eq!(raw.end().await, Some(ErrorClass::PeerMisbehaved));
        assert_eq!(why(&pair.refusal().await), expected);
    }
    assert!(good.connection.close_reason().is_none(), "the good lane is not disturbed");
    drop(gates);
    assert_eq!(good.end().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_gateway_of_the_same_authority_cannot_open_lanes_of_a_migration() {
    let (pair, _, gates) = two_migrations().await;
    let address = pair.destination.local_address();
    let thief = pair.fleet.gateway("gw-c");
    let raw = Raw::lane(&thief, address).await;
    assert_eq!(raw.end().await, Some(ErrorClass::Unauthenticated));
    let refused = pair.refusal().await;
    assert!(matches!(&refused.reason, TransportError::Uninvited { peer } if *peer == id("gw-c")), "{}", refused.reason);

    // With a migration of its own it may open a stream, but not name somebody else's migration.
    let thief_endpoint = endpoint(&thief);
    let (theirs, ours) = join_up(&thief_endpoint, &pair.destination, address).await;
    let own = MigrationId([3; 16]);
    let _gate = ours.expect_lanes(own, 1, Arc::new(|io| Box::pin(lanes::drain(io)))).unwrap();
    for named in [MIGRATION, MigrationId([9; 16])] {
        let raw = Raw::lane(&thief, address).await;
        let honest = JoinKey::new(&theirs.connection, own).unwrap().join(&raw.connection, LaneIndex(0)).unwrap();
        let _streams = raw.join(Join { migration: named, ..honest }).await;
        assert_eq!(raw.end().await, Some(ErrorClass::Unauthenticated));
        assert_eq!(why(&pair.refusal().await), LaneRefusal::Unexpected);
    }
    assert_eq!(gates.each_ref().map(LaneGate::joined), [0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_cannot_join_a_session_that_is_over() {
    let (pair, credentials, gates) = two_migrations().await;
    let raw = Raw::lane(&credentials, pair.destination.local_address()).await;
    let honest = JoinKey::new(&pair.ours.connection, MIGRATION).unwrap().join(&raw.connection, LaneIndex(0)).unwrap();
    pair.theirs.close(None, "over");
    let _streams = raw.join(honest).await;
    assert_eq!(raw.end().await, Some(ErrorClass::PeerUnreachable));
    assert_eq!(why(&pair.refusal().await), LaneRefusal::SessionOver);
    assert_eq!(gates[0].joined(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_with_another_key_than_its_session_is_refused() {
    let (pair, credentials, _gates) = two_migrations().await;
    pair.fleet.renew("gw-a");
    credentials.reload().unwrap();
    let error = within(pair.ours.open_lane(MIGRATION, LaneIndex(0), lanes::send_forever)).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Unauthenticated, "{error}");
    let refused = pair.refusal().await;
    assert!(matches!(&refused.reason, TransportError::KeyChanged { peer } if *peer == id("gw-a")), "{}", refused.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_after_the_gate_is_dropped_are_refused() {
    let (pair, _, gates) = two_migrations().await;
    drop(gates);
    let error = within(pair.ours.open_lane(MIGRATION, LaneIndex(0), lanes::send_forever)).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Unauthenticated, "{error}");
    assert!(matches!(pair.refusal().await.reason, TransportError::Uninvited { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_sends_no_join_is_closed_in_time() {
    let pair = Pair::new(TransportConfig { handshake_timeout: Duration::from_millis(300), ..config() }).await;
    let _gate = pair.theirs.expect_lanes(MIGRATION, 1, Arc::new(|io| Box::pin(lanes::drain(io)))).unwrap();
    let raw = Raw::lane(&pair.credentials, pair.destination.local_address()).await;
    let (mut send, _receive) = raw.open().await;
    send.write_all(b"sljn").await.unwrap();
    assert_eq!(raw.end().await, Some(ErrorClass::TimedOut));
    assert!(matches!(pair.refusal().await.reason, TransportError::TimedOut { awaited: "join with its lane", .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_certificate_is_refused() {
    let fleet = Fleet::new();
    let credentials = fleet.gateway("gw-b");
    let destination = endpoint(&credentials);
    let mut tls = rustls::ClientConfig::builder_with_provider(provider(PostQuantum::default()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Blind))
        .with_no_client_auth();
    tls.alpn_protocols = vec![crate::identity::ALPN.to_vec()];
    let tls = Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap());
    for byte in [steer::SESSION_BYTE, 1] {
        let mut client = quinn::ClientConfig::new(tls.clone());
        client.initial_dst_cid_provider(Arc::new(move || steer::initial_connection_id(byte)));
        // TLS 1.3 lets the client finish before the server has seen that there is no certificate.
        if let Ok(raw) = Raw::connect(client, destination.local_address()).await {
            let error = within(raw.connection.open_bi()).await.unwrap_err();
            assert!(matches!(error, ConnectionError::ConnectionClosed(_)), "{error}");
        }
        let refused = refusal(&destination).await;
        assert_eq!((refused.peer, refused.reason.class()), (None, ErrorClass::Unauthenticated), "{}", refused.reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversize_or_unknown_control_header_ends_the_session_before_its_body() {
    let fleet = Fleet::new();
    let (source, destination) = (fleet.gateway("gw-a"), endpoint(&fleet.gateway("gw-b")));
    for header in [[0xff, 0xff, 0xff, 0xff, 10], [1, 0, 0x10, 0, 6], [0, 0, 0, 0, 99]] {
        let raw = Raw::session(&source, destination.local_address()).await;
        let (mut send, _receive) = raw.open().await;
        send.write_all(&header).await.unwrap();
        let session = within(destination.accept()).await.unwrap().unwrap();
        let error = within(session.receive()).await.unwrap_err();
        assert!(matches!(&error, TransportError::Wire { .. }), "{error}");
        assert_eq!(raw.end().await, Some(ErrorClass::PeerMisbehaved));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_gets_one_stream_and_no_other() {
    let fleet = Fleet::new();
    let (source, destination) = (fleet.gateway("gw-a"), endpoint(&fleet.gateway("gw-b")));
    let raw = Raw::session(&source, destination.local_address()).await;
    let (mut send, _receive) = raw.open().await;
    send.write_all(&Message::Ping.encode_framed()).await.unwrap();
    let session = within(destination.accept()).await.unwrap().unwrap();
    assert_eq!(within(session.receive()).await.unwrap(), Message::Ping);
    let more = async {
        tokio::select! { _ = raw.connection.open_bi() => "two-way", _ = raw.connection.open_uni() => "one-way" }
    };
    assert!(tokio::time::timeout(Duration::from_millis(100), more).await.is_err());
    assert!(raw.connection.max_datagram_size().is_none(), "datagrams are off");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_handshake_does_not_hold_up_another() {
    let fleet = Fleet::new();
    let patient = TransportConfig { handshake_timeout: Duration::from_millis(500), ..config() };
    let destination = Endpoint::bind(patient, fleet.gateway("gw-b")).unwrap();
    let source = endpoint(&fleet.gateway("gw-a"));
    let link = Link::to(destination.local_address());
    link.deafen();
    let (stalled, stalled_id) = (endpoint(&fleet.gateway("gw-c")), id("gw-b"));
    let stall = stalled.connect(link.address, &stalled_id);
    let work = async {
        while link.forwarded() == 0 {
            tokio::task::yield_now().await;
        }
        let (_ours, theirs) = join_up(&source, &destination, destination.local_address()).await;
        assert_eq!(theirs.peer().spiffe(), &id("gw-a"));
        let refused = refusal(&destination).await;
        assert!(matches!(refused.reason, TransportError::TimedOut { .. }), "{}", refused.reason);
    };
    within(async {
        tokio::select! { _ = stall => panic!("the stalled peer got through"), () = work => {} }
    })
    .await;
    link.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_from_the_wrong_side_are_misuse() {
    let pair = Pair::new(config()).await;
    let handler: crate::transport::LaneHandler = Arc::new(|io| Box::pin(lanes::drain(io)));
    let wrong_side = pair.ours.expect_lanes(MIGRATION, 1, Arc::clone(&handler)).unwrap_err();
    let no_lanes = pair.theirs.expect_lanes(MIGRATION, 0, Arc::clone(&handler)).unwrap_err();
    let _gate = pair.theirs.expect_lanes(MIGRATION, 1, Arc::clone(&handler)).unwrap();
    let twice = pair.theirs.expect_lanes(MIGRATION, 1, handler).unwrap_err();
    let opened = pair.theirs.open_lane(MIGRATION, LaneIndex(0), lanes::send_forever).await.unwrap_err();
    let address_taken = Endpoint::bind(TransportConfig::new(pair.destination.local_address()), Arc::clone(&pair.credentials)).unwrap_err();
    assert_eq!([wrong_side, no_lanes, twice, opened].map(|error| error.class()), [ErrorClass::Misuse; 4]);
    assert_eq!(address_taken.class(), ErrorClass::Local);
}

/// A stranger that trusts everybody.
#[derive(Debug)]
pub(super) struct Blind;

impl ServerCertVerifier for Blind {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider(PostQuantum::default()).signature_verification_algorithms.supported_schemes()
    }
}
