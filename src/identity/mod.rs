//! Who we are, and who a peer has proved to be.
//!
//! *Owns:* certificates, keys, roots, CRLs, the TLS configurations made of them, and their reload;
//! the small certificate authority behind `sealane pki`. *Never:* transport, policy, audit; `Debug` of a key;
//! a way to switch verification off.
//!
//! *Invariants:*
//! - `own-roots`: the roots are chosen by the trust domain of the presented SPIFFE ID before path validation.
//! - `raw-names`: exactly one URI name, counted on the raw names.
//! - `fail-closed`: no CRL, an expired one, or none that covers a certificate of the path refuses the peer.
//! - `forward-only`: a CRL older than one already used is never put in use: by this process, and after a restart where a ratchet file is given.
//! - `all-or-nothing`: a reload replaces everything or nothing.
//! - `hybrid-first`: X25519MLKEM768 is offered before anything else, and alone where it is required.
//! - `full-handshake`: no tickets, no resumption, no early data: every connection proves its identity anew.
//!
//! *Read first:* `credentials.rs`, then `trust.rs`, `leaf.rs`, `verifier.rs`; `key_exchange.rs` and `holder/` stand alone.

pub mod authority;
mod credentials;
mod crl;
mod der;
mod error;
mod files;
mod holder;
mod kem;
mod key_exchange;
mod keys;
mod leaf;
mod peer;
mod strength;
#[cfg(test)]
mod tests;
mod time;
mod trust;
mod verifier;

use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring as suites};

pub use credentials::{Apart, Credentials};
pub use error::{IdentityError, RefusalReason};
pub use holder::{
    FileKeys, Holder, HolderError, KeyPlace, Keys, NOT_SIGNED, Refusal as KeyRefusal, TokenPlace, is_handshake, serve as serve_keys,
};
#[cfg(feature = "pkcs11")]
pub use holder::{Opened, read_pin};
pub use key_exchange::PostQuantum;
pub use keys::{OpenFiles, Signer, verify_signature};
pub use peer::PeerIdentity;
pub use trust::PeerRole;
pub use verifier::{Refusal, refusal_reason};

/// The only protocol that is spoken.
pub const ALPN: &[u8] = b"sealane/1";

/// Where this gateway's identity and trust are on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityConfig {
    /// Our certificate in PEM, leaf first, then its intermediates.
    pub certificate: PathBuf,
    /// Its private key in PEM, readable by its owner only.
    pub key: PathBuf,
    /// The Ed25519 key that signs evidence, PKCS#8 PEM, readable by its owner only.
    pub signing_key: PathBuf,
    /// Every trust domain whose gateways may connect.
    pub trust: Vec<TrustDomainConfig>,
    /// Which key exchange is good enough.
    pub post_quantum: PostQuantum,
}

/// A trust domain, its roots and its revocation lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustDomainConfig {
    /// Its name, e.g. `dc1.example.net`.
    pub domain: String,
    /// Its root certificates in PEM.
    pub roots: PathBuf,
    /// One CRL of each issuer on any path, the roots included; PEM or DER.
    pub crls: Vec<PathBuf>,
    /// Issuers below the roots, in PEM: whoever of them a CRL names has to have signed it. One that names nobody who is known is judged
    /// with each peer's chain.
    pub intermediates: Option<PathBuf>,
}

/// The cryptography of every connection: TLS 1.3 suites and key exchange groups, in order of preference.
#[must_use]
pub fn provider(post_quantum: PostQuantum) -> Arc<CryptoProvider> {
    let ring = suites::default_provider();
    let tls13 = ring.cipher_suites.iter().copied().filter(|suite| suite.tls13().is_some()).collect();
    Arc::new(CryptoProvider { cipher_suites: tls13, kx_groups: post_quantum.groups(), ..ring })
}
