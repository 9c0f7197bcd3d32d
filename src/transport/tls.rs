//! From the gateway's credentials to QUIC's cryptography, and from a connection to a verified peer.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;

use super::error::TransportError;
use crate::identity::{Credentials, PeerIdentity};

/// The gateway's credentials as QUIC wants them. Certificates, keys, roots and CRLs behind them reload by themselves.
#[derive(Clone)]
pub(super) struct QuicTls {
    credentials: Arc<Credentials>,
    client: Arc<QuicClientConfig>,
    server: Arc<QuicServerConfig>,
    key_exchange: Arc<str>,
    cipher_suite: Arc<str>,
}

impl fmt::Debug for QuicTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuicTls").finish_non_exhaustive()
    }
}

impl QuicTls {
    /// # Errors
    /// The configurations allow what this protocol must not: data before authentication, resumption, other protocols.
    pub(super) fn new(credentials: Arc<Credentials>) -> Result<Self, TransportError> {
        let unfit = |expected| TransportError::UnfitTls { expected };
        let client = credentials.client_config();
        let server = credentials.server_config();
        if client.enable_early_data || server.max_early_data_size != 0 {
            return Err(unfit("no early data"));
        }
        if server.send_tls13_tickets != 0 || server.ticketer.enabled() {
            return Err(unfit("no resumption"));
        }
        if client.alpn_protocols.is_empty() || client.alpn_protocols != server.alpn_protocols {
            return Err(unfit("the same application protocol on both sides"));
        }
        let key_exchange = names(server.crypto_provider(), |p| p.kx_groups.iter().map(|group| format!("{:?}", group.name())).collect());
        let cipher_suite =
            names(server.crypto_provider(), |p| p.cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect());
        let no_suite = |_| unfit("TLS_AES_128_GCM_SHA256 for QUIC's first packets");
        Ok(Self {
            client: Arc::new(QuicClientConfig::try_from(client).map_err(no_suite)?),
            server: Arc::new(QuicServerConfig::try_from(server).map_err(no_suite)?),
            credentials,
            key_exchange,
            cipher_suite,
        })
    }

    pub(super) fn client(&self) -> Arc<QuicClientConfig> {
        Arc::clone(&self.client)
    }

    pub(super) fn server(&self) -> Arc<QuicServerConfig> {
        Arc::clone(&self.server)
    }

    /// Who is at the other end. TLS has verified the chain already; this names it.
    pub(super) fn identify(&self, connection: &quinn::Connection) -> Result<PeerIdentity, TransportError> {
        let address = connection.remote_address();
        let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let chain = chain.ok_or_else(|| TransportError::Unauthenticated { address, reason: "no certificate".to_owned() })?;
        self.credentials.identify(&chain).map_err(|source| TransportError::Identity { address, source })
    }

    pub(super) fn facts(&self, connection: &quinn::Connection) -> ChannelFacts {
        ChannelFacts {
            tls: "1.3",
            key_exchange: self.key_exchange.to_string(),
            cipher_suite: self.cipher_suite.to_string(),
            peer_ip: connection.remote_address().ip().to_canonical(),
            rtt: connection.rtt(),
        }
    }
}

/// What is known of a session's channel, for policy and audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelFacts {
    /// The TLS version; no other is spoken.
    pub tls: &'static str,
    /// The key exchange group, or all groups that may have been agreed, `|` between them.
    pub key_exchange: String,
    /// The cipher suite, or all that may have been agreed, `|` between them.
    pub cipher_suite: String,
    /// The peer's address now.
    pub peer_ip: IpAddr,
    /// The round trip now.
    pub rtt: Duration,
}

/// WHY: quinn 0.11 does not tell what TLS agreed on, so the facts are what the configuration allows at all.
fn names(provider: &Arc<CryptoProvider>, list: impl Fn(&CryptoProvider) -> Vec<String>) -> Arc<str> {
    list(provider).join("|").into()
}

/// The TLS server name for a peer. Peers are known by SPIFFE ID, not by name; an address keeps the extension out of the handshake.
pub(super) fn server_name(address: SocketAddr) -> String {
    address.ip().to_string()
}
