//! X25519MLKEM768 (RFC 10024): a key exchange that holds as long as one of X25519 and ML-KEM-768 does.
//!
//! ```text
//!   client's share   encapsulation key (1184) | X25519 (32)
//!   server's share   ciphertext        (1088) | X25519 (32)
//!   shared secret    ML-KEM's            (32) | X25519's (32)
//! ```

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use rustls::crypto::ring::kx_group::X25519;
use rustls::crypto::{ActiveKeyExchange, CompletedKeyExchange, SharedSecret, SupportedKxGroup};
use rustls::ffdhe_groups::FfdheGroup;
use rustls::{Error, NamedGroup, PeerMisbehaved, ProtocolVersion};
use zeroize::Zeroizing;

use super::kem::{CIPHERTEXT_BYTES, ENCAPSULATION_KEY_BYTES, Kem, KemKey, RustCrypto};

/// Whether a key exchange that a quantum computer could break is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PostQuantum {
    /// X25519MLKEM768 is offered first, and X25519 for a peer that knows nothing better.
    #[default]
    Preferred,
    /// X25519MLKEM768 and nothing else.
    Required,
}

impl PostQuantum {
    /// The key exchange groups, in order of preference.
    pub(super) fn groups(self) -> Vec<&'static dyn SupportedKxGroup> {
        match self {
            Self::Preferred => vec![&X25519MLKEM768, X25519],
            Self::Required => vec![&X25519MLKEM768],
        }
    }
}

/// The group that is offered first.
pub(super) static X25519MLKEM768: Hybrid = Hybrid { kem: &RustCrypto, classical: X25519 };

/// ML-KEM-768 beside X25519. Both are here as seams: another implementation of ML-KEM comes in through `kem`.
pub(super) struct Hybrid {
    pub(super) kem: &'static dyn Kem,
    pub(super) classical: &'static dyn SupportedKxGroup,
}

impl fmt::Debug for Hybrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name())
    }
}

impl SupportedKxGroup for Hybrid {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let (key, mut share) = self.kem.key_pair(&random()?);
        let classical = self.classical.start()?;
        share.extend_from_slice(classical.pub_key());
        Ok(Box::new(Begun { key, classical, share }))
    }

    fn start_and_complete(&self, client_share: &[u8]) -> Result<CompletedKeyExchange, Error> {
        let (key, theirs) = split(client_share, ENCAPSULATION_KEY_BYTES)?;
        let (mut share, secret) = self.kem.encapsulate(key, &random()?).ok_or(BAD_SHARE)?;
        let classical = self.classical.start_and_complete(theirs)?;
        share.extend_from_slice(&classical.pub_key);
        Ok(CompletedKeyExchange { group: self.name(), pub_key: share, secret: joined(&secret, &classical.secret) })
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }

    fn usable_for_version(&self, version: ProtocolVersion) -> bool {
        version == ProtocolVersion::TLSv1_3
    }
}

/// The client's half, until the server has answered.
struct Begun {
    key: Box<dyn KemKey>,
    classical: Box<dyn ActiveKeyExchange>,
    share: Vec<u8>,
}

impl ActiveKeyExchange for Begun {
    fn complete(self: Box<Self>, server_share: &[u8]) -> Result<SharedSecret, Error> {
        let (ciphertext, theirs) = split(server_share, CIPHERTEXT_BYTES)?;
        let secret = self.key.decapsulate(ciphertext).ok_or(BAD_SHARE)?;
        Ok(joined(&secret, &self.classical.complete(theirs)?))
    }

    /// The same X25519 key is offered alone too, so that a peer without ML-KEM costs no further round trip. rustls leaves it
    /// out where X25519 is not among the groups.
    fn hybrid_component(&self) -> Option<(NamedGroup, &[u8])> {
        Some((self.classical.group(), self.classical.pub_key()))
    }

    fn complete_hybrid_component(self: Box<Self>, server_share: &[u8]) -> Result<SharedSecret, Error> {
        self.classical.complete(server_share)
    }

    fn pub_key(&self) -> &[u8] {
        &self.share
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}

const BAD_SHARE: Error = Error::PeerMisbehaved(PeerMisbehaved::InvalidKeyShare);
/// What is left of a share behind its first part.
const X25519_BYTES: usize = 32;

/// A share into its parts, which have fixed lengths.
fn split(share: &[u8], first: usize) -> Result<(&[u8], &[u8]), Error> {
    share.split_at_checked(first).filter(|(_, second)| second.len() == X25519_BYTES).ok_or(BAD_SHARE)
}

/// rustls overwrites it when it is dropped.
fn joined(post_quantum: &[u8; 32], classical: &SharedSecret) -> SharedSecret {
    // Made at once in its size: a vector that grows leaves what it held.
    SharedSecret::from([post_quantum.as_slice(), classical.secret_bytes()].concat())
}

fn random<const BYTES: usize>() -> Result<Zeroizing<[u8; BYTES]>, Error> {
    let mut bytes = Zeroizing::new([0; BYTES]);
    SystemRandom::new().fill(&mut *bytes).map_err(|_| Error::FailedToGetRandomBytes)?;
    Ok(bytes)
}
