//! What two ends agree on and where they see it, over QUIC, also when the large first flight is lost on the way.

use quinn::crypto::ClientConfig as _;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionId, Side};
use quinn_proto::transport_parameters::TransportParameters;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::hostile::Blind;
use super::link::Link;
use super::*;
use crate::identity::ALPN;
use crate::transport::join::JoinKey;
use crate::transport::tls::QuicTls;
use crate::transport::{LaneRefusal, TransportError, steer};
use crate::types::LaneIndex;
use crate::wire::ErrorClass;

const HYBRID: &str = "X25519MLKEM768";
const SUITE: &str = "TLS13_AES_256_GCM_SHA384";

fn agreed(session: &Session) -> (String, String) {
    let facts = session.channel();
    (facts.key_exchange, facts.cipher_suite)
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_of_a_session_know_what_they_agreed_on() {
    let pair = Pair::new(config()).await;
    for session in [&pair.ours, &pair.theirs] {
        assert_eq!(agreed(session), (HYBRID.to_owned(), SUITE.to_owned()));
    }
}

/// A peer whose QUIC is quinn's own and whose cryptography is another implementation's.
struct Other {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Other {
    fn new(fleet: &Fleet, name: &str, groups: &[&'static dyn SupportedKxGroup]) -> Self {
        let files = authority::issue(&fleet.dir.path().join("ca"), name, "site-1").unwrap();
        let chain = CertificateDer::pem_file_iter(&files.certificate).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
        Self { chain, key, provider: Arc::new(CryptoProvider { kx_groups: groups.to_vec(), ..aws_lc_rs::default_provider() }) }
    }

    /// Connects as a session and says the first word.
    async fn connect(&self, address: SocketAddr) -> Result<quinn::Connection, quinn::ConnectionError> {
        let connection = self.dial(address, steer::SESSION_BYTE).await?;
        let (mut send, _) = within(connection.open_bi()).await?;
        send.write_all(&Message::Ping.encode_framed()).await.unwrap();
        Ok(connection)
    }

    async fn dial(&self, address: SocketAddr, first_byte: u8) -> Result<quinn::Connection, quinn::ConnectionError> {
        let builder =
            rustls::ClientConfig::builder_with_provider(Arc::clone(&self.provider)).with_safe_default_protocol_versions().unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Blind));
        let mut tls = builder.with_client_auth_cert(self.chain.clone(), self.key.clone_key()).unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        client.initial_dst_cid_provider(Arc::new(move || steer::initial_connection_id(first_byte)));
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        within(endpoint.connect_with(client, address, "127.0.0.1").unwrap()).await
    }

    /// Listens, and tells every client to come again with a token first.
    fn listen(self) -> quinn::Endpoint {
        let builder = rustls::ServerConfig::builder_with_provider(self.provider).with_safe_default_protocol_versions().unwrap();
        let mut tls = builder.with_no_client_auth().with_single_cert(self.chain, self.key).unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
        let endpoint = quinn::Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = endpoint.clone();
        tokio::spawn(async move {
            let mut connections = Vec::new();
            while let Some(incoming) = listener.accept().await {
                if incoming.remote_address_validated() {
                    connections.extend(incoming.await);
                } else {
                    incoming.retry().unwrap();
                }
            }
        });
        endpoint
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_agreed_with_another_implementation_is_known() {
    let (hybrid, x25519) = (aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519);
    for (groups, expected) in [(&[hybrid, x25519][..], HYBRID), (&[hybrid], HYBRID), (&[x25519], "X25519")] {
        let fleet = Fleet::new();
        let gateway = endpoint(&fleet.gateway("gw-b"));
        let _connection = Other::new(&fleet, "gw-a", groups).connect(gateway.local_address()).await.unwrap();
        let session = within(gateway.accept()).await.unwrap().unwrap();
        assert_eq!(agreed(&session), (expected.to_owned(), SUITE.to_owned()), "as server");

        let other = Other::new(&fleet, "gw-c", groups).listen();
        let session = within(gateway.connect(other.local_addr().unwrap(), &id("gw-c"))).await.unwrap();
        assert_eq!(agreed(&session), (expected.to_owned(), SUITE.to_owned()), "as client, behind a retry");
    }
}

// SPEC: PROTOCOL.md#must-lane-channel
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_protected_otherwise_than_its_session_is_refused() {
    let fleet = Fleet::new();
    let gateway = endpoint(&fleet.gateway("gw-b"));
    let mut other = Other::new(&fleet, "gw-a", &[aws_lc_rs::kx_group::X25519MLKEM768]);
    let connection = other.connect(gateway.local_address()).await.unwrap();
    let session = within(gateway.accept()).await.unwrap().unwrap();
    let lanes = session.expect_lanes(MIGRATION, 2, Arc::new(|_| Box::pin(std::future::pending()))).unwrap();
    let key = JoinKey::new(&connection, MIGRATION).unwrap();
    let join = async |other: &Other, lane| {
        let connection = other.dial(gateway.local_address(), steer::lane_byte(MIGRATION, lane)).await.unwrap();
        let (mut send, _) = within(connection.open_bi()).await.unwrap();
        send.write_all(&key.join(&connection, lane).unwrap().encode()).await.unwrap();
        connection
    };
    let good = join(&other, LaneIndex(0)).await;
    within(async {
        while lanes.joined() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;

    let weaker = CryptoProvider { kx_groups: vec![aws_lc_rs::kx_group::X25519], ..aws_lc_rs::default_provider() };
    let mut suite = CryptoProvider::clone(&other.provider);
    suite.cipher_suites.retain(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    for provider in [weaker, suite] {
        other.provider = Arc::new(provider);
        let bad = join(&other, LaneIndex(1)).await;
        let refused = refusal(&gateway).await;
        assert!(matches!(refused.reason, TransportError::LaneRefused { why: LaneRefusal::OtherChannel, .. }), "{}", refused.reason);
        assert!(matches!(within(bad.closed()).await, quinn::ConnectionError::ApplicationClosed(_)));
    }
    assert_eq!((lanes.joined(), good.close_reason()), (1, None));
}

/// Both the one who refuses and the one who is refused learn what is missing and what to do.
#[track_caller]
fn names_the_setting(error: &TransportError) {
    let said = error.to_string();
    assert_eq!(error.class(), ErrorClass::PeerIncompatible, "{said}");
    assert!(said.contains("X25519MLKEM768") && said.contains("`require_post_quantum = true`"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_it_is_refused_where_it_is_required() {
    let fleet = Fleet::new();
    let gateway = endpoint(&fleet.gateway_with("gw-b", PostQuantum::Required));
    let x25519 = aws_lc_rs::kx_group::X25519;

    let address = gateway.local_address();
    let seen = Other::new(&fleet, "gw-a", &[x25519]).connect(address).await.unwrap_err();
    names_the_setting(&TransportError::from_connection(seen, address));
    let refused = refusal(&gateway).await;
    assert_eq!(refused.peer, None, "nobody is authenticated");
    names_the_setting(&refused.reason);

    // The other way round the peer says it in the words of its TLS.
    let other = Other::new(&fleet, "gw-c", &[x25519]).listen();
    names_the_setting(&within(gateway.connect(other.local_addr().unwrap(), &id("gw-c"))).await.unwrap_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_that_require_it_have_sessions_with_each_other_and_with_those_that_do_not() {
    use PostQuantum::{Preferred, Required};
    for (ours, theirs) in [(Required, Required), (Preferred, Required), (Required, Preferred)] {
        let fleet = Fleet::new();
        let (source, destination) = (endpoint(&fleet.gateway_with("gw-a", ours)), endpoint(&fleet.gateway_with("gw-b", theirs)));
        let (ours, theirs) = join_up(&source, &destination, destination.local_address()).await;
        assert_eq!((agreed(&ours).0, agreed(&theirs).0), (HYBRID.to_owned(), HYBRID.to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_flight_takes_two_datagrams() {
    let fleet = Fleet::new();
    let (source, destination) = (endpoint(&fleet.gateway("gw-a")), endpoint(&fleet.gateway("gw-b")));
    let link = Link::to(destination.local_address());
    link.deafen();
    let peer = id("gw-b");
    assert!(tokio::time::timeout(Duration::from_millis(200), source.connect(link.address, &peer)).await.is_err());
    // More where this process had no processor for so long that QUIC has sent it again.
    assert!(link.forwarded() >= 2, "{} before anything is sent again", link.forwarded());
    link.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_whose_large_hellos_are_lost_in_part_still_completes() {
    // Numbers of datagrams that are lost towards the destination, and back. The first two are the client's hello.
    let cases: [(&[usize], &[usize]); 8] =
        [(&[0], &[]), (&[1], &[]), (&[0, 1], &[]), (&[0, 2], &[]), (&[], &[0]), (&[], &[1]), (&[], &[0, 1, 2]), (&[1], &[0])];
    let fleet = Fleet::new();
    let (source, destination) = (endpoint(&fleet.gateway("gw-a")), endpoint(&fleet.gateway("gw-b")));
    for (towards, back) in cases {
        let link = Link::to(destination.local_address());
        link.lose(towards.iter().copied());
        link.lose_back(back.iter().copied());
        let (ours, theirs) = join_up(&source, &destination, link.address).await;
        assert_eq!((agreed(&ours).0, agreed(&theirs).0), (HYBRID.to_owned(), HYBRID.to_owned()), "lost {towards:?}, {back:?}");
        link.end();
    }
}

/// The example of RFC 9001, appendix A.4: a RETRY packet for the connection ID of A.1.
#[test]
fn a_retry_is_believed_only_with_its_tag() {
    let fleet = Fleet::new();
    let tls = QuicTls::new(fleet.gateway("gw-a")).unwrap();
    let parameters = TransportParameters::read(Side::Server, &mut [].as_slice()).unwrap();
    let session = tls.client().start_session(1, "127.0.0.1", &parameters).unwrap();
    let original = ConnectionId::new(&[0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08]);
    let header = [0xff, 0, 0, 0, 1, 0, 8, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5];
    let mut payload = b"token".to_vec();
    payload.extend([0x04, 0xa2, 0x65, 0xba, 0x2e, 0xff, 0x4d, 0x82, 0x90, 0x58, 0xfb, 0x3f, 0x0f, 0x24, 0x96, 0xba]);
    assert!(session.is_valid_retry(&original, &header, &payload));
    for at in 0..payload.len() {
        let mut changed = payload.clone();
        changed[at] ^= 1;
        assert!(!session.is_valid_retry(&original, &header, &changed), "byte {at}");
    }
    assert!(!session.is_valid_retry(&original, &header, &payload[..15]));
    assert!(tls.client().start_session(0xff00_001d, "127.0.0.1", &parameters).is_err(), "a draft of QUIC");
}
