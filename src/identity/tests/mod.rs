//! Real handshakes in memory, and the files that credentials come from.

mod files;
#[path = "../../../certs/fixtures.rs"]
pub(super) mod fixtures;
mod handshake;
mod key_exchange;
mod refusals;
mod reload;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use fixtures::{Leaf, World, write_gateway};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConnection, ResolvesClientCert};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, ServerConnection};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use tempfile::TempDir;

use super::*;

pub(super) static WORLD: LazyLock<World> = LazyLock::new(World::new);

/// A directory with the trust of [`WORLD`] and the gateways made in it.
pub(super) struct Place {
    pub(super) dir: TempDir,
    trust: Vec<TrustDomainConfig>,
}

impl Place {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let trust = WORLD.write_trust(dir.path()).into_iter();
        let trust = trust
            .map(|files| TrustDomainConfig { domain: files.domain, roots: files.roots, crls: files.crls, intermediates: None })
            .collect();
        Self { dir, trust }
    }

    pub(super) fn config(&self, name: &str, leaf: &Leaf) -> IdentityConfig {
        let files = write_gateway(self.dir.path(), name, leaf);
        IdentityConfig {
            certificate: files.certificate,
            key: files.key,
            signing_key: files.signing_key,
            trust: self.trust.clone(),
            post_quantum: PostQuantum::default(),
        }
    }

    pub(super) fn gateway(&self, name: &str, leaf: &Leaf) -> Arc<Credentials> {
        Credentials::load(self.config(name, leaf)).unwrap()
    }

    /// The file of a CRL of the first trust domain.
    fn crl(&self, name: &str) -> PathBuf {
        self.dir.path().join(fixtures::DOMAIN).join(name)
    }

    fn write_crl(&self, name: &str, der: &[u8]) {
        fs::write(self.crl(name), fixtures::pem("X509 CRL", der)).unwrap();
    }
}

/// What both ends of a handshake made of it.
pub(super) struct Shaken {
    pub(super) client: Result<ClientConnection, rustls::Error>,
    pub(super) server: Result<ServerConnection, rustls::Error>,
}

/// Carries bytes between two connections until neither has anything to say.
pub(super) fn shake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Shaken {
    let name = ServerName::try_from("any.name.at.all").unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    let (mut client_error, mut server_error) = (None, None);
    loop {
        let mut moved = false;
        while client.wants_write() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            moved = true;
            let mut wire = wire.as_slice();
            while server_error.is_none() && !wire.is_empty() {
                server.read_tls(&mut wire).unwrap();
                server_error = server.process_new_packets().err();
            }
        }
        while server.wants_write() {
            let mut wire = Vec::new();
            server.write_tls(&mut wire).unwrap();
            moved = true;
            let mut wire = wire.as_slice();
            while client_error.is_none() && !wire.is_empty() {
                client.read_tls(&mut wire).unwrap();
                client_error = client.process_new_packets().err();
            }
        }
        if !moved {
            break;
        }
    }
    if client_error.is_none() && server_error.is_none() {
        assert!(!client.is_handshaking() && !server.is_handshaking(), "stuck");
    }
    Shaken { client: client_error.map_or(Ok(client), Err), server: server_error.map_or(Ok(server), Err) }
}

/// A peer that presents what it likes and believes everything.
#[derive(Debug)]
struct Hostile(Arc<CertifiedKey>);

impl Hostile {
    fn new(leaf: &Leaf) -> Arc<Self> {
        Self::with_key(leaf, leaf)
    }

    fn with_key(leaf: &Leaf, key: &Leaf) -> Arc<Self> {
        let key = provider(PostQuantum::default()).key_provider.load_private_key(key.key()).unwrap();
        Arc::new(Self(Arc::new(CertifiedKey::new(leaf.chain.clone(), key))))
    }

    fn client(self: Arc<Self>) -> ClientConfig {
        self.client_with(provider(PostQuantum::default()))
    }

    fn client_with(self: Arc<Self>, provider: Arc<CryptoProvider>) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(BelievesAll));
        let mut config = builder.with_client_cert_resolver(self);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config
    }

    fn server(self: Arc<Self>) -> ServerConfig {
        self.server_with(provider(PostQuantum::default()))
    }

    fn server_with(self: Arc<Self>, provider: Arc<CryptoProvider>) -> ServerConfig {
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_no_client_auth().with_cert_resolver(self);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config
    }
}

impl ResolvesClientCert for Hostile {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Hostile {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct BelievesAll;

impl ServerCertVerifier for BelievesAll {
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
