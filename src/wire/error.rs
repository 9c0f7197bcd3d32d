//! What can be wrong with bytes from a peer.

use crate::wire::ErrorClass;

/// Bytes that are not what `PROTOCOL.md` says, or a peer that speaks something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end inside a field.
    #[error("`{message}` ends inside `{field}`: expected {expected} bytes, got {got}")]
    Truncated {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// Bytes that the field needs.
        expected: usize,
        /// Bytes that were left.
        got: usize,
    },
    /// Bytes are left after the last field.
    #[error("`{message}` has {got} bytes after its last field: expected 0")]
    Trailing {
        /// Which message.
        message: &'static str,
        /// Bytes left.
        got: usize,
    },
    /// A number, a count or a length is outside its bounds.
    #[error("`{field}` of `{message}` is out of bounds: expected {min} to {max}, got {got}")]
    OutOfBounds {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// Smallest value taken.
        min: u64,
        /// Largest value taken.
        max: u64,
        /// The value that came.
        got: u64,
    },
    /// A number that names nothing.
    #[error("`{field}` of `{message}` is unknown: expected {expected}, got {got}")]
    Unknown {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// What is known.
        expected: &'static str,
        /// The number that came.
        got: u64,
    },
    /// A field with the right length that breaks a rule.
    #[error("`{field}` of `{message}` is malformed: expected {expected}, got `{got}`")]
    Malformed {
        /// Which message.
        message: &'static str,
        /// Which field.
        field: &'static str,
        /// The rule.
        expected: &'static str,
        /// What came, escaped and cut.
        got: String,
    },
    /// The ranges of protocol versions do not meet.
    #[error("no common protocol version: expected {own_min}..={own_max}, got {peer_min}..={peer_max}")]
    Version {
        /// Our lowest.
        own_min: u16,
        /// Our highest.
        own_max: u16,
        /// The peer's lowest.
        peer_min: u16,
        /// The peer's highest.
        peer_max: u16,
    },
    /// The peer requires a feature that we do not have.
    #[error("peer requires feature `{name}`, which is unknown here")]
    UnknownFeature {
        /// The feature.
        name: String,
    },
    /// We require a feature that the peer does not have.
    #[error("peer lacks feature `{name}`, which is required here")]
    MissingFeature {
        /// The feature.
        name: String,
    },
}

impl WireError {
    /// Whose fault it is: a peer that speaks something else is incompatible, everything else is
    /// misbehaviour.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Version { .. } | Self::UnknownFeature { .. } | Self::MissingFeature { .. } => ErrorClass::PeerIncompatible,
            _ => ErrorClass::PeerMisbehaved,
        }
    }
}

/// A peer's text for an error message: escaped, and cut to what fits a log line.
pub(super) fn printable(bytes: &[u8]) -> String {
    const SHOWN_BYTES_MAX: usize = 64;
    let shown = bytes.get(..SHOWN_BYTES_MAX).unwrap_or(bytes);
    String::from_utf8_lossy(shown).chars().flat_map(char::escape_default).collect()
}
