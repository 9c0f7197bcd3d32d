//! TLS inside QUIC, as quinn's own but for two things: it tells what was agreed on, and says in words why nothing was.
//!
//! WHY: quinn 0.11 keeps the key exchange group and the cipher suite to itself, and policy asks for both.

use std::any::Any;
use std::io::Cursor;
use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::crypto::{self, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, Session, UnsupportedVersion};
use quinn::{ConnectError, ConnectionId, Side, TransportErrorCode};
use quinn_proto::TransportError;
use quinn_proto::transport_parameters::TransportParameters;
use rustls::quic::{self, ClientConnection, Connection, KeyChange, Secrets, ServerConnection, Suite, Version};
use rustls::{CipherSuite, ClientConfig, NamedGroup, PeerIncompatible, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};

use crate::identity::NOT_SIGNED;

/// The one version of QUIC that is spoken.
pub(super) const QUIC_VERSION: u32 = 1;

/// What the two ends of a connection agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) key_exchange: NamedGroup,
    pub(super) cipher_suite: CipherSuite,
}

impl Agreed {
    /// None before the handshake is over, and for a connection whose TLS is not from here.
    pub(super) fn on(connection: &quinn::Connection) -> Option<Self> {
        connection.handshake_data()?.downcast().ok().map(|agreed| *agreed)
    }
}

/// TLS of connections that we open.
pub(super) struct Client {
    tls: Arc<ClientConfig>,
    common: Common,
}

/// TLS of connections that peers open.
pub(super) struct Server {
    tls: Arc<ServerConfig>,
    common: Common,
}

/// What does not depend on who opened the connection.
#[derive(Clone)]
struct Common {
    /// Protects the first packets, with keys that are no secret.
    initial: Suite,
    /// Knows the keys of RETRY packets, which are in the standard.
    retry: Arc<QuicServerConfig>,
}

/// Both ends of TLS in QUIC; none without the suite that protects QUIC's first packets.
pub(super) fn both_ends(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Option<(Arc<Client>, Arc<Server>)> {
    let suites = &server.crypto_provider().cipher_suites;
    let initial = suites.iter().find(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256)?.tls13()?.quic_suite()?;
    let common = Common { initial, retry: Arc::new(QuicServerConfig::with_initial(Arc::clone(&server), initial).ok()?) };
    Some((Arc::new(Client { tls: client, common: common.clone() }), Arc::new(Server { tls: server, common })))
}

impl crypto::ClientConfig for Client {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        parameters: &TransportParameters,
    ) -> Result<Box<dyn Session>, ConnectError> {
        if version != QUIC_VERSION {
            return Err(ConnectError::UnsupportedVersion);
        }
        let name = ServerName::try_from(server_name).map_err(|_| ConnectError::InvalidServerName(server_name.to_owned()))?.to_owned();
        let tls = ClientConnection::new(Arc::clone(&self.tls), Version::V1, name, encoded(parameters)).map(Connection::Client);
        Ok(Box::new(Handshake::new(tls, Side::Client, &self.common)))
    }
}

impl crypto::ServerConfig for Server {
    fn initial_keys(&self, version: u32, connection_id: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        if version != QUIC_VERSION {
            return Err(UnsupportedVersion);
        }
        Ok(self.common.initial_keys(connection_id, Side::Server))
    }

    fn retry_tag(&self, version: u32, original: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.common.retry.retry_tag(version, original, packet)
    }

    /// Only called with a version that `initial_keys` takes.
    fn start_session(self: Arc<Self>, _version: u32, parameters: &TransportParameters) -> Box<dyn Session> {
        let tls = ServerConnection::new(Arc::clone(&self.tls), Version::V1, encoded(parameters)).map(Connection::Server);
        Box::new(Handshake::new(tls, Side::Server, &self.common))
    }
}

impl Common {
    fn initial_keys(&self, connection_id: &ConnectionId, side: Side) -> Keys {
        keys(self.initial.keys(connection_id, tls_side(side), Version::V1))
    }
}

/// TLS of one connection. A configuration that rustls refuses fails the handshake.
struct Handshake {
    tls: Result<Connection, rustls::Error>,
    side: Side,
    common: Common,
    /// Whether quinn knows that there is something to be told.
    told: bool,
    next: Option<Secrets>,
}

impl Handshake {
    fn new(tls: Result<Connection, rustls::Error>, side: Side, common: &Common) -> Self {
        Self { tls, side, common: common.clone(), told: false, next: None }
    }

    fn tls(&self) -> Option<&Connection> {
        self.tls.as_ref().ok()
    }
}

impl Session for Handshake {
    fn initial_keys(&self, connection_id: &ConnectionId, side: Side) -> Keys {
        self.common.initial_keys(connection_id, side)
    }

    /// An [`Agreed`], from rustls, which has both by the end of the handshake.
    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        let tls = self.tls()?;
        let key_exchange = tls.negotiated_key_exchange_group()?.name();
        let cipher_suite = tls.negotiated_cipher_suite()?.suite();
        Some(Box::new(Agreed { key_exchange, cipher_suite }))
    }

    /// The chain as `Vec<CertificateDer>`.
    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        let chain = self.tls()?.peer_certificates()?;
        Some(Box::new(chain.iter().map(|certificate| certificate.clone().into_owned()).collect::<Vec<CertificateDer<'static>>>()))
    }

    /// There is no early data.
    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.side.is_client().then_some(false)
    }

    fn is_handshaking(&self) -> bool {
        self.tls().is_none_or(|tls| tls.is_handshaking())
    }

    fn read_handshake(&mut self, bytes: &[u8]) -> Result<bool, TransportError> {
        let tls = match &mut self.tls {
            Ok(tls) => tls,
            Err(error) => return Err(failed(TransportErrorCode::INTERNAL_ERROR, error)),
        };
        if let Err(error) = tls.read_hs(bytes) {
            let code = tls.alert().map_or(TransportErrorCode::PROTOCOL_VIOLATION, |alert| TransportErrorCode::crypto(alert.into()));
            return Err(failed(code, &error));
        }
        // The first time that the protocol is settled: the server has read the client's hello, or the client the server's.
        let settled = tls.alpn_protocol().is_some() || !tls.is_handshaking();
        Ok(settled && !std::mem::replace(&mut self.told, settled))
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let bytes = self.tls().and_then(|tls| tls.quic_transport_parameters());
        bytes.map(|bytes| TransportParameters::read(self.side, &mut Cursor::new(bytes)).map_err(TransportError::from)).transpose()
    }

    fn write_handshake(&mut self, out: &mut Vec<u8>) -> Option<Keys> {
        match self.tls.as_mut().ok()?.write_hs(out)? {
            KeyChange::Handshake { keys: new } => Some(keys(new)),
            KeyChange::OneRtt { keys: new, next } => {
                self.next = Some(next);
                Some(keys(new))
            }
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.next.as_mut()?.next_packet_keys();
        Some(KeyPair { local: Box::new(keys.local), remote: Box::new(keys.remote) })
    }

    fn is_valid_retry(&self, original: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        let Some((token, tag)) = payload.split_last_chunk::<16>() else { return false };
        // The tag keeps accidents out; its key is in the standard, so there is nothing to compare in constant time.
        crypto::ServerConfig::retry_tag(&*self.common.retry, QUIC_VERSION, original, &[header, token].concat()) == *tag
    }

    fn export_keying_material(&self, output: &mut [u8], label: &[u8], context: &[u8]) -> Result<(), ExportKeyingMaterialError> {
        let tls = self.tls().ok_or(ExportKeyingMaterialError)?;
        tls.export_keying_material(output, label, Some(context)).map(drop).map_err(|_| ExportKeyingMaterialError)
    }
}

/// What both ends read when they have no key exchange in common. The other way to come here is a gateway from before
/// X25519MLKEM768, which says it in rustls' words.
pub(super) const NO_KEY_EXCHANGE: &str = "no key exchange in common: one side has `require_post_quantum = true` in its `[identity]`, \
     and the other cannot do X25519MLKEM768; bring the older gateway up to date, or require it on neither side";

/// TLS calls it an internal error.
pub(super) const INTERNAL_ALERT: u8 = 80;

fn failed(code: TransportErrorCode, error: &rustls::Error) -> TransportError {
    let code = match error {
        rustls::Error::General(words) if words == NOT_SIGNED => TransportErrorCode::crypto(INTERNAL_ALERT),
        _ => code,
    };
    let reason = match error {
        rustls::Error::General(words) => words.clone(),
        rustls::Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon) => NO_KEY_EXCHANGE.to_owned(),
        other => other.to_string(),
    };
    TransportError { code, frame: None, reason }
}

fn encoded(parameters: &TransportParameters) -> Vec<u8> {
    let mut bytes = Vec::new();
    parameters.write(&mut bytes);
    bytes
}

fn tls_side(side: Side) -> rustls::Side {
    match side {
        Side::Client => rustls::Side::Client,
        Side::Server => rustls::Side::Server,
    }
}

fn keys(keys: quic::Keys) -> Keys {
    Keys {
        header: KeyPair { local: Box::new(keys.local.header), remote: Box::new(keys.remote.header) },
        packet: KeyPair { local: Box::new(keys.local.packet), remote: Box::new(keys.remote.packet) },
    }
}
