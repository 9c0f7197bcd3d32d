//! Ends of a QUIC connection that are no gateway: they show any certificate, or none, and look at nothing.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, SignatureScheme};

use crate::fixtures::Leaf;

const ALPN: &[u8] = b"sealane/1";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Listens with this certificate as long as the test's process lives.
pub fn listen(leaf: &Leaf) -> SocketAddr {
    let builder = rustls::ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let mut tls = builder.with_no_client_auth().with_cert_resolver(Arc::new(Presents::new(leaf)));
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        runtime().block_on(async {
            let runtime = Arc::new(quinn::TokioRuntime);
            let endpoint = quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(config), socket, runtime).unwrap();
            while let Some(incoming) = endpoint.accept().await {
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        connection.closed().await;
                    }
                });
            }
        });
    });
    address
}

/// Dials with this certificate, or with none; the first connection ID says which socket of a gateway it reaches.
pub fn client(leaf: Option<&Leaf>, first_id: Option<[u8; 8]>) -> quinn::ClientConfig {
    let builder = rustls::ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody));
    let mut tls = match leaf {
        Some(leaf) => builder.with_client_cert_resolver(Arc::new(Presents::new(leaf))),
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    if let Some(id) = first_id {
        config.initial_dst_cid_provider(Arc::new(move || quinn::ConnectionId::new(&id)));
    }
    config
}

/// Dials a gateway with this certificate, or with none; says how it is turned away.
pub fn dial(address: SocketAddr, leaf: Option<&Leaf>) -> quinn::ConnectionError {
    // The first byte says that it wants a session, not a lane.
    let config = client(leaf, Some([0, 1, 2, 3, 4, 5, 6, 7]));
    runtime().block_on(async {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let talk = async {
            match endpoint.connect_with(config, address, "gateway.test").unwrap().await {
                // A TLS 1.3 client is through before the server has looked at its certificate.
                Ok(connection) => {
                    let begin = async {
                        let (mut send, _receive) = connection.open_bi().await.ok()?;
                        send.write_all(&[0]).await.ok()?;
                        Some(connection.closed().await)
                    };
                    match begin.await {
                        Some(end) => end,
                        None => connection.closed().await,
                    }
                }
                Err(error) => error,
            }
        };
        tokio::time::timeout(Duration::from_secs(60), talk).await.expect("a stranger is turned away")
    })
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Presents any chain, whatever is wrong with it.
#[derive(Debug)]
struct Presents(Arc<CertifiedKey>);

impl Presents {
    fn new(leaf: &Leaf) -> Self {
        let key = provider().key_provider.load_private_key(leaf.key()).unwrap();
        Self(Arc::new(CertifiedKey::new(leaf.chain.clone(), key)))
    }
}

impl ResolvesServerCert for Presents {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl ResolvesClientCert for Presents {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Believes everybody.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
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
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
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
        provider().signature_verification_algorithms.supported_schemes()
    }
}
