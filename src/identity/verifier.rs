//! The one verifier for both directions of a handshake, and the memory of whom it refused.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};

use super::credentials::Current;
use super::error::RefusalReason;
use super::leaf;
use super::time::from_unix;
use super::trust::PeerRole;
use crate::limits;

/// A peer that was refused during a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// When.
    pub at: SystemTime,
    /// Which end of the handshake it was.
    pub role: PeerRole,
    /// The URI it presented, if any: a claim, escaped and cut, not an identity.
    pub claimed: Option<String>,
    /// SHA-256 of the leaf it presented.
    pub leaf_sha256: [u8; 32],
    /// Why.
    pub reason: RefusalReason,
}

/// The last refusals, until somebody drains them into the audit log.
#[derive(Default)]
pub(super) struct Refusals {
    kept: Mutex<VecDeque<Refusal>>,
    lost: AtomicU64,
}

impl Refusals {
    fn push(&self, refusal: Refusal) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= limits::REFUSALS_KEPT_MAX {
            kept.pop_front();
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        kept.push_back(refusal);
    }

    pub(super) fn drain(&self, older_than: Duration) -> Vec<Refusal> {
        let now = SystemTime::now();
        // After a step of the clock backwards everything is old enough.
        let old = |refusal: &Refusal| now.duration_since(refusal.at).map_or(true, |age| age >= older_than);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let young = kept.iter().position(|refusal| !old(refusal)).unwrap_or(kept.len());
        kept.drain(..young).collect()
    }

    /// Takes the last one of these words. Of two with the same certificate and reason it does not matter which.
    pub(super) fn take(&self, words: &str) -> Option<Refusal> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let place = kept.iter().rposition(|refusal| Words::of(refusal).to_string() == words)?;
        kept.remove(place)
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// The exact reason inside the general error that rustls reports, when the failure was about the peer's identity.
#[must_use]
pub fn refusal_reason(error: &rustls::Error) -> Option<RefusalReason> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            inner.downcast_ref().map(|words: &Words| words.reason.clone())
        }
        rustls::Error::NoCertificatesPresented => Some(RefusalReason::NoCertificate),
        _ => None,
    }
}

/// A reason on its way through rustls and QUIC, which print what they carry with `Debug`: people read its sentence, at both ends. It says
/// which certificate it is about, so that whoever reads it finds the [`Refusal`].
struct Words {
    reason: RefusalReason,
    leaf_sha256: [u8; 32],
}

/// How much of the leaf's SHA-256 they have.
const FINGERPRINT_BYTES: usize = 8;

impl Words {
    fn of(refusal: &Refusal) -> Self {
        Self { reason: refusal.reason.clone(), leaf_sha256: refusal.leaf_sha256 }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fingerprint = leaf::hex(self.leaf_sha256.get(..FINGERPRINT_BYTES).unwrap_or_default());
        write!(f, "{} (certificate {fingerprint})", self.reason)
    }
}

impl std::error::Error for Words {}

/// Verifies gateways by the state that is current at each handshake, so a reload needs no new TLS configuration.
pub(super) struct GatewayVerifier {
    current: Arc<Current>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for GatewayVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayVerifier").finish_non_exhaustive()
    }
}

impl GatewayVerifier {
    pub(super) fn new(current: Arc<Current>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { current, algorithms }
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let now = from_unix(now);
        let chain: Vec<_> = std::iter::once(end_entity).chain(intermediates).map(|der| CertificateDer::from(der.as_ref())).collect();
        let verified = self.current.state().trust.verify(&chain, &self.algorithms, now);
        verified.map(drop).map_err(|reason| self.refuse(end_entity, role, now, reason))
    }

    fn refuse(&self, end_entity: &CertificateDer<'_>, role: PeerRole, at: SystemTime, reason: RefusalReason) -> rustls::Error {
        let claimed = leaf::claimed_uri(end_entity);
        let leaf_sha256 = leaf::sha256(end_entity);
        self.current.refusals.push(Refusal { at, role, claimed, leaf_sha256, reason: reason.clone() });
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Words { reason, leaf_sha256 }))))
    }

    fn verify_tls13(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
        role: PeerRole,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms).map_err(|error| match error {
            // A good certificate in the wrong hands is worth a line in the audit log.
            rustls::Error::InvalidCertificate(_) => self.refuse(certificate, role, SystemTime::now(), RefusalReason::KeyNotHeld),
            other => other,
        })
    }
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

impl ServerCertVerifier for GatewayVerifier {
    /// The name that was dialled says nothing: the caller compares the SPIFFE ID with the peer it wanted.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, PeerRole::Server, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_tls13(message, certificate, signature, PeerRole::Server)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for GatewayVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    /// No hints: whom we trust is nobody's business before it is authenticated.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, PeerRole::Client, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_tls13(message, certificate, signature, PeerRole::Client)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
