//! What goes wrong between two gateways, and whose fault it is.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use quinn::{ConnectError, ConnectionError, ReadError, VarInt, WriteError};

use super::handshake::{INTERNAL_ALERT, NO_KEY_EXCHANGE};
use crate::identity::{IdentityError, NOT_SIGNED};
use crate::limits;
use crate::types::{LaneIndex, MigrationId, SpiffeId};
use crate::wire::{ErrorClass, WireError};

/// Why a session or a lane did not come about, or ended.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A configured value that cannot work.
    #[error("invalid `{field}`: expected {expected}, got {got}")]
    Config {
        /// The field of `TransportConfig`.
        field: &'static str,
        /// The rule.
        expected: &'static str,
        /// The value, as text.
        got: String,
    },
    /// A call that makes no sense on this session.
    #[error("cannot {action}: expected {expected}")]
    Misuse {
        /// What was asked.
        action: &'static str,
        /// What it needs.
        expected: &'static str,
    },
    /// A socket could not be made or used.
    #[error("cannot {action} UDP socket for `{address}`")]
    Socket {
        /// What failed.
        action: &'static str,
        /// The address that it is for.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A thread or its runtime could not be started.
    #[error("cannot start thread `{name}`")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Our own TLS configuration is not fit for this protocol.
    #[error("TLS configuration is unfit: expected {expected}")]
    UnfitTls {
        /// What it has to be.
        expected: &'static str,
    },
    /// The peer's certificates were refused here.
    #[error("peer at `{address}` is not authenticated: {reason}")]
    Unauthenticated {
        /// Where the peer is.
        address: SocketAddr,
        /// The verifier's reason.
        reason: String,
    },
    /// The peer's certificates name nobody that we accept.
    #[error("peer at `{address}` has no acceptable identity")]
    Identity {
        /// Where the peer is.
        address: SocketAddr,
        /// Why.
        source: IdentityError,
    },
    /// The peer is somebody, but not who it has to be.
    #[error("peer at `{address}` is the wrong one: expected `{expected}`, got `{got}`")]
    WrongPeer {
        /// Where the peer is.
        address: SocketAddr,
        /// Who it had to be.
        expected: SpiffeId,
        /// Who it is.
        got: SpiffeId,
    },
    /// The peer has the right name but another key than on the session.
    #[error("peer `{peer}` uses another key on its lane than on its session")]
    KeyChanged {
        /// Who it is.
        peer: SpiffeId,
    },
    /// The peer did not authenticate us. The reason is the peer's claim.
    #[error("peer at `{address}` refused our identity, saying `{reason}`")]
    RefusedByPeer {
        /// Where the peer is.
        address: SocketAddr,
        /// What the peer said.
        reason: String,
    },
    /// Our own key is in a token, and that did not sign; the log says why.
    #[error("the handshake with `{address}` failed here: the token that has this gateway's key did not sign")]
    NotSigned {
        /// Where the peer is.
        address: SocketAddr,
    },
    /// The two sides have no protocol, cipher or version in common.
    #[error("peer at `{address}` speaks no common protocol: {reason}")]
    Incompatible {
        /// Where the peer is.
        address: SocketAddr,
        /// What does not match.
        reason: String,
    },
    /// Nobody answers, or nobody answers any more.
    #[error("peer at `{address}` cannot be reached: {reason}")]
    Unreachable {
        /// Where the peer is, or was last.
        address: SocketAddr,
        /// What was seen.
        reason: &'static str,
    },
    /// Something took too long.
    #[error("peer at `{address}` did not {awaited} within {after:?}")]
    TimedOut {
        /// Where the peer is.
        address: SocketAddr,
        /// What was awaited.
        awaited: &'static str,
        /// For how long.
        after: Duration,
    },
    /// The peer ended the connection. The reason is the peer's claim.
    #[error("peer at `{address}` closed the connection, saying `{reason}`")]
    Closed {
        /// Where the peer is.
        address: SocketAddr,
        /// Whose fault it is in the peer's eyes; none for a normal close.
        class: Option<ErrorClass>,
        /// What the peer said.
        reason: String,
    },
    /// We ended the connection.
    #[error("the connection was closed here")]
    ClosedHere,
    /// The peer broke QUIC or TLS.
    #[error("peer at `{address}` broke the transport protocol: {reason}")]
    Misbehaved {
        /// Where the peer is.
        address: SocketAddr,
        /// How.
        reason: String,
    },
    /// The peer sent bytes that are no message.
    #[error("peer at `{address}` sent a bad message")]
    Wire {
        /// Where the peer is.
        address: SocketAddr,
        /// What is wrong with it.
        source: WireError,
    },
    /// A connection that asked to be a lane and must not be.
    #[error("lane {lane} of migration `{migration}` is refused: {why}")]
    LaneRefused {
        /// The migration that it named.
        migration: MigrationId,
        /// The lane that it named.
        lane: LaneIndex,
        /// The rule that it breaks.
        why: LaneRefusal,
    },
    /// A peer that opens a lane although it has no migration here.
    #[error("peer `{peer}` has no migration that expects lanes")]
    Uninvited {
        /// Who it is.
        peer: SpiffeId,
    },
    /// There are too many sessions already.
    #[error("there is no room for more than {sessions} sessions")]
    NoRoom {
        /// The limit.
        sessions: usize,
    },
    /// The task of a lane ended without a result: it panicked or its thread did.
    #[error("lane {lane} of migration `{migration}` ended without a result")]
    LaneLost {
        /// The migration.
        migration: MigrationId,
        /// The lane.
        lane: LaneIndex,
    },
}

/// Why a connection must not be a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneRefusal {
    /// No migration of that id waits for lanes of this peer.
    #[error("no migration of this id expects lanes from this peer")]
    Unexpected,
    /// The session that granted the lanes has ended.
    #[error("the session of this migration is over")]
    SessionOver,
    /// It is protected otherwise than its session, of which policy was told.
    #[error("its key exchange or cipher suite is not that of the session")]
    OtherChannel,
    /// The number is not among the lanes granted.
    #[error("the lane number is beyond the lanes granted")]
    BeyondGranted,
    /// The tag was not made with this session's and this connection's keys.
    #[error("its tag does not bind it to the session")]
    BadTag,
    /// The number is or was in use.
    #[error("the lane number is already used")]
    AlreadyUsed,
}

impl TransportError {
    /// Whose fault it is.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Config { .. } | Self::Misuse { .. } => ErrorClass::Misuse,
            Self::Socket { .. } | Self::Thread { .. } | Self::UnfitTls { .. } | Self::NotSigned { .. } | Self::NoRoom { .. } => {
                ErrorClass::Local
            }
            Self::Unauthenticated { .. }
            | Self::Identity { .. }
            | Self::WrongPeer { .. }
            | Self::KeyChanged { .. }
            | Self::Uninvited { .. }
            | Self::RefusedByPeer { .. } => ErrorClass::Unauthenticated,
            Self::Incompatible { .. } => ErrorClass::PeerIncompatible,
            Self::Unreachable { .. } => ErrorClass::PeerUnreachable,
            Self::TimedOut { .. } => ErrorClass::TimedOut,
            Self::Closed { class, .. } => class.unwrap_or(ErrorClass::PeerUnreachable),
            Self::ClosedHere => ErrorClass::Cancelled,
            Self::Misbehaved { .. } => ErrorClass::PeerMisbehaved,
            Self::Wire { source, .. } => source.class(),
            Self::LaneRefused { why, .. } => match why {
                LaneRefusal::Unexpected | LaneRefusal::BadTag => ErrorClass::Unauthenticated,
                LaneRefusal::SessionOver => ErrorClass::PeerUnreachable,
                LaneRefusal::OtherChannel | LaneRefusal::BeyondGranted | LaneRefusal::AlreadyUsed => ErrorClass::PeerMisbehaved,
            },
            Self::LaneLost { .. } => ErrorClass::Bug,
        }
    }

    /// Whether this may be nothing but the network, or a peer that starts again: what an outage looks like from here.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        match self {
            // A token may come back, as a network does.
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Socket { .. } | Self::NotSigned { .. } => true,
            Self::Closed { class, .. } => matches!(class, None | Some(ErrorClass::PeerUnreachable | ErrorClass::TimedOut)),
            _ => false,
        }
    }

    /// The words of the verifier that refused the peer in its handshake.
    #[must_use]
    pub fn verifiers_words(&self) -> Option<&str> {
        if let Self::Unauthenticated { reason, .. } = self { Some(reason) } else { None }
    }

    pub(super) fn socket(action: &'static str, address: SocketAddr) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Socket { action, address, source }
    }

    /// The end of a connection in our words.
    pub(super) fn from_connection(error: ConnectionError, address: SocketAddr) -> Self {
        match error {
            ConnectionError::TransportError(error) => from_tls(error.code.into(), &error.reason, address),
            ConnectionError::ConnectionClosed(close) => from_peer_close(close.error_code.into(), &close.reason, address),
            ConnectionError::ApplicationClosed(close) => Self::Closed {
                address,
                class: u16::try_from(close.error_code.into_inner()).ok().and_then(ErrorClass::from_number),
                reason: peer_text(&close.reason),
            },
            ConnectionError::VersionMismatch => Self::Incompatible { address, reason: "no common QUIC version".to_owned() },
            ConnectionError::Reset => Self::Unreachable { address, reason: "it forgot the connection, as after a restart" },
            ConnectionError::TimedOut => Self::Unreachable { address, reason: "no answer until the idle timeout" },
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::CidsExhausted => Self::Misuse { action: "open a connection", expected: "fewer connections" },
        }
    }

    pub(super) fn from_connect(error: &ConnectError, address: SocketAddr) -> Self {
        match error {
            ConnectError::EndpointStopping => Self::ClosedHere,
            ConnectError::CidsExhausted => Self::Misuse { action: "open a connection", expected: "fewer connections" },
            ConnectError::InvalidRemoteAddress(_) | ConnectError::InvalidServerName(_) => {
                Self::Config { field: "address", expected: "an address and port that can be connected to", got: address.to_string() }
            }
            ConnectError::NoDefaultClientConfig | ConnectError::UnsupportedVersion => Self::UnfitTls { expected: "QUIC version 1" },
        }
    }

    pub(super) fn from_write(error: WriteError, address: SocketAddr) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::from_connection(error, address),
            WriteError::Stopped(code) => Self::stream_ended(code, address),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::ClosedHere,
        }
    }

    pub(super) fn from_read(error: ReadError, address: SocketAddr) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::from_connection(error, address),
            ReadError::Reset(code) => Self::stream_ended(code, address),
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => Self::ClosedHere,
        }
    }

    fn stream_ended(code: VarInt, address: SocketAddr) -> Self {
        let class = u16::try_from(code.into_inner()).ok().and_then(ErrorClass::from_number);
        Self::Closed { address, class, reason: "stream given up".to_owned() }
    }
}

/// A connection that was not admitted, for the audit log.
#[derive(Debug, thiserror::Error)]
#[error("connection from `{peer_address}` is refused")]
pub struct Refused {
    /// Where it came from.
    pub peer_address: SocketAddr,
    /// Who it authenticated as, when it got that far.
    pub peer: Option<SpiffeId>,
    /// Why.
    #[source]
    pub reason: TransportError,
}

/// The QUIC close code of a class; zero is a normal close.
pub(super) fn close_code(class: Option<ErrorClass>) -> VarInt {
    VarInt::from_u32(class.map_or(0, |class| class.number().into()))
}

/// A reason for the peer, cut to what it accepts.
pub(super) fn close_reason(reason: &str) -> &[u8] {
    let end = (0..=limits::REASON_BYTES_MAX).rev().find(|end| reason.is_char_boundary(*end)).unwrap_or(0);
    reason.get(..end).unwrap_or(reason).as_bytes()
}

/// First of the QUIC error codes that carry a TLS alert in their low byte.
const CRYPTO_ERRORS: u64 = 0x100;

/// Alerts that say "I do not believe who you are" (RFC 8446 section 6.2).
const IDENTITY_ALERTS: [u64; 11] = [42, 43, 44, 45, 46, 48, 49, 51, 113, 115, 116];
/// Alerts that say "we have nothing in common": handshake failure, versions, insufficient security, ALPN.
const AGREEMENT_ALERTS: [u64; 5] = [40, 70, 71, 109, 120];

/// An error that our own QUIC or TLS found in what the peer sent.
fn from_tls(code: u64, reason: &str, address: SocketAddr) -> TransportError {
    let alert = code.wrapping_sub(CRYPTO_ERRORS);
    if code == INTERNAL_ERROR {
        TransportError::Unreachable { address, reason: OVERWHELMED }
    } else if alert == u64::from(INTERNAL_ALERT) && reason == NOT_SIGNED {
        TransportError::NotSigned { address }
    } else if IDENTITY_ALERTS.contains(&alert) {
        TransportError::Unauthenticated { address, reason: without_wrapping(reason).to_owned() }
    } else if AGREEMENT_ALERTS.contains(&alert) {
        TransportError::Incompatible { address, reason: reason.to_owned() }
    } else {
        TransportError::Misbehaved { address, reason: reason.to_owned() }
    }
}

/// RFC 9000, section 20.1. quinn says it of itself, for example when so much of a stream was lost that it keeps no track of the
/// gaps: a thing of the path, and another connection has another chance.
const INTERNAL_ERROR: u64 = 1;
const OVERWHELMED: &str = "QUIC could not follow what was lost on the path";

/// The verifier's own words, without what rustls wraps around them.
fn without_wrapping(reason: &str) -> &str {
    let words = reason.strip_prefix("invalid peer certificate: ").unwrap_or(reason);
    words.strip_prefix("Other(OtherError(").and_then(|words| words.strip_suffix("))")).unwrap_or(words)
}

/// A close that the peer's QUIC or TLS sent.
fn from_peer_close(code: u64, reason: &[u8], address: SocketAddr) -> TransportError {
    const CONNECTION_REFUSED: u64 = 2;
    let alert = code.wrapping_sub(CRYPTO_ERRORS);
    let said = match without_wrapping(&peer_text(reason)) {
        // As gateways say it that are older than X25519MLKEM768.
        said if said.contains("NoKxGroupsInCommon") => NO_KEY_EXCHANGE.to_owned(),
        said => said.to_owned(),
    };
    if code == CONNECTION_REFUSED {
        TransportError::Unreachable { address, reason: "it takes no more connections now" }
    } else if code == INTERNAL_ERROR {
        TransportError::Unreachable { address, reason: OVERWHELMED }
    } else if alert == u64::from(INTERNAL_ALERT) && said == NOT_SIGNED {
        TransportError::Unreachable { address, reason: "what has its key did not sign" }
    } else if IDENTITY_ALERTS.contains(&alert) {
        TransportError::RefusedByPeer { address, reason: said }
    } else if AGREEMENT_ALERTS.contains(&alert) {
        TransportError::Incompatible { address, reason: said }
    } else {
        TransportError::Closed { address, class: Some(ErrorClass::PeerMisbehaved), reason: said }
    }
}

/// A peer's text, escaped and bounded.
fn peer_text(bytes: &[u8]) -> String {
    let bytes = bytes.get(..limits::REASON_BYTES_MAX).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_alerts_say_whose_fault_it_is() {
        let address = SocketAddr::from(([192, 0, 2, 1], 4433));
        let class = |code| from_tls(code, "", address).class();
        for (alert, expected) in [
            (44, ErrorClass::Unauthenticated),
            (116, ErrorClass::Unauthenticated),
            (120, ErrorClass::PeerIncompatible),
            (50, ErrorClass::PeerMisbehaved),
        ] {
            assert_eq!(class(CRYPTO_ERRORS + alert), expected, "alert {alert}");
            assert_eq!(from_peer_close(CRYPTO_ERRORS + alert, b"", address).class(), expected, "alert {alert} from the peer");
        }
        assert_eq!(class(10), ErrorClass::PeerMisbehaved, "a QUIC error below the alerts");
        assert_eq!(from_peer_close(2, b"", address).class(), ErrorClass::PeerUnreachable);
    }

    #[test]
    fn the_verifiers_words_come_out_of_their_wrapping() {
        let wrapped = "invalid peer certificate: Other(OtherError(the peer's certificate is revoked))";
        assert_eq!(without_wrapping(wrapped), "the peer's certificate is revoked");
        assert_eq!(without_wrapping("invalid peer certificate: Expired"), "Expired");
        assert_eq!(without_wrapping("peer sent no certificates"), "peer sent no certificates");
    }

    #[test]
    fn reasons_are_cut_at_a_character_and_shown_without_control_characters() {
        let long = "é".repeat(limits::REASON_BYTES_MAX);
        assert_eq!(close_reason(&long).len(), limits::REASON_BYTES_MAX);
        assert_eq!(peer_text("ok\n\u{1b}[31m".as_bytes()), "ok\\n\\u{1b}[31m");
        assert!(peer_text(&[b'x'; 4096]).len() <= limits::REASON_BYTES_MAX);
    }
}
