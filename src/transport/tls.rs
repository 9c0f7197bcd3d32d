//! From the gateway's credentials to QUIC's cryptography, and from a connection to a verified peer.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;

use super::door::Door;
use super::doorstep::{Greeting, TokenKey};
use super::error::TransportError;
use super::handshake::{self, Agreed};
use crate::identity::{Credentials, PeerIdentity};

/// The gateway's credentials as QUIC wants them. Certificates, keys, roots and CRLs behind them reload by themselves.
#[derive(Clone)]
pub(super) struct QuicTls {
    credentials: Arc<Credentials>,
    client: Arc<handshake::Client>,
    server: Arc<handshake::Server>,
    tokens: Arc<TokenKey>,
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
        let (client, server) =
            handshake::both_ends(client, server).ok_or_else(|| unfit("TLS_AES_128_GCM_SHA256 for QUIC's first packets"))?;
        let tokens = TokenKey::new().ok_or_else(|| unfit("random numbers of the system"))?;
        Ok(Self { credentials, client, server, tokens })
    }

    pub(super) fn client(&self) -> Arc<handshake::Client> {
        Arc::clone(&self.client)
    }

    pub(super) fn server(&self) -> Arc<handshake::Server> {
        Arc::clone(&self.server)
    }

    pub(super) fn tokens(&self) -> Arc<TokenKey> {
        Arc::clone(&self.tokens)
    }

    /// What a crowd at the door of one of our sockets is told.
    pub(super) fn greeting(&self, door: Arc<Door>, socket: u8) -> Greeting {
        Greeting { door, server: self.server(), tokens: self.tokens(), socket }
    }

    /// Who is at the other end. TLS has verified the chain already; this names it.
    pub(super) fn identify(&self, connection: &quinn::Connection) -> Result<PeerIdentity, TransportError> {
        let address = connection.remote_address();
        let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let chain = chain.ok_or_else(|| TransportError::Unauthenticated { address, reason: "no certificate".to_owned() })?;
        self.credentials.identify(&chain).map_err(|source| TransportError::Identity { address, source })
    }

    /// What TLS agreed on.
    pub(super) fn agreed(&self, connection: &quinn::Connection) -> Result<Agreed, TransportError> {
        let unfit = || TransportError::UnfitTls { expected: "a connection of ours whose handshake is over" };
        Agreed::on(connection).ok_or_else(unfit)
    }
}

/// What is known of a session's channel, for policy and audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelFacts {
    /// The TLS version; no other is spoken.
    pub tls: &'static str,
    /// The key exchange group that was agreed on, e.g. `X25519MLKEM768`.
    pub key_exchange: String,
    /// The cipher suite that was agreed on, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub cipher_suite: String,
    /// The peer's address now.
    pub peer_ip: IpAddr,
    /// The round trip now.
    pub rtt: Duration,
}

impl ChannelFacts {
    pub(super) fn new(agreed: Agreed, connection: &quinn::Connection) -> Self {
        Self {
            tls: "1.3",
            key_exchange: format!("{:?}", agreed.key_exchange),
            cipher_suite: format!("{:?}", agreed.cipher_suite),
            peer_ip: connection.remote_address().ip().to_canonical(),
            rtt: connection.rtt(),
        }
    }
}

/// The TLS server name for a peer. Peers are known by SPIFFE ID, not by name; an address keeps the extension out of the handshake.
pub(super) fn server_name(address: SocketAddr) -> String {
    address.ip().to_string()
}
