//! Everything a gateway is and trusts, loaded from files and replaced as a whole on reload.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};

use super::crl::Ratchet;
use super::error::IdentityError;
use super::holder::Holder;
use super::keys::{OpenFiles, Own, Signer, read_private};
use super::leaf::{self, Leaf};
use super::peer::PeerIdentity;
use super::trust::{TrustState, read_certificates};
use super::verifier::{GatewayVerifier, Refusal, Refusals};
use super::{ALPN, IdentityConfig, provider};
use crate::limits;
use crate::types::SpiffeId;

/// What one load of the files gave.
pub(super) struct State {
    certified: Arc<CertifiedKey>,
    own: Leaf,
    signer: Arc<Signer>,
    pub(super) trust: TrustState,
}

/// The state in use, shared by both TLS configurations.
pub(super) struct Current {
    state: ArcSwap<State>,
    pub(super) refusals: Refusals,
}

impl Current {
    pub(super) fn state(&self) -> arc_swap::Guard<Arc<State>> {
        self.state.load()
    }
}

/// What is done elsewhere for a gateway that has neither its private keys nor a way to their files.
#[derive(Debug, Clone)]
pub struct Apart {
    /// Signs handshakes.
    pub tls: Arc<Holder>,
    /// Signs evidence.
    pub signing: Arc<Holder>,
    /// Opens certificates, roots and CRLs.
    pub files: Arc<dyn OpenFiles>,
}

/// The identity of this gateway and the trust it places in others; hot-reloadable.
pub struct Credentials {
    config: IdentityConfig,
    provider: Arc<CryptoProvider>,
    apart: Option<Apart>,
    current: Arc<Current>,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    /// Held through a reload, so that reloads are one after another and numbers only grow.
    ratchet: Mutex<Ratchet>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("own_id", &self.own_id()).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads every file.
    ///
    /// Dates are judged at each handshake, not here: a gateway whose certificate or CRL has expired must
    /// still start, because it may have a guest to resume. [`own_standing`](Self::own_standing) and
    /// [`next_crl_expiry`](Self::next_crl_expiry) say so.
    ///
    /// # Errors
    /// A file is missing, malformed, exposed, or contradicts another one.
    pub fn load(config: IdentityConfig) -> Result<Arc<Self>, IdentityError> {
        Self::load_with(config, Ratchet::default(), None)
    }

    /// As [`load`](Self::load), but CRL numbers do not go back across restarts either: the newest of
    /// each issuer are remembered in the file `ratchet`. What is done `apart` is not done here.
    ///
    /// # Errors
    /// As [`load`](Self::load); also when the file is malformed, cannot be written, or knows a newer CRL.
    pub fn load_remembering(config: IdentityConfig, ratchet: PathBuf, apart: Option<Apart>) -> Result<Arc<Self>, IdentityError> {
        Self::load_with(config, Ratchet::open(ratchet)?, apart)
    }

    fn load_with(config: IdentityConfig, mut ratchet: Ratchet, apart: Option<Apart>) -> Result<Arc<Self>, IdentityError> {
        let provider = provider(config.post_quantum);
        let state = read_state(&config, &provider, apart.as_ref(), SystemTime::now())?;
        ratchet.advance(state.trust.crls())?;
        let current = Arc::new(Current { state: ArcSwap::from_pointee(state), refusals: Refusals::default() });
        let client = Arc::new(client_config(&provider, &current)?);
        let server = Arc::new(server_config(&provider, &current)?);
        Ok(Arc::new(Self { config, provider, apart, current, client, server, ratchet: Mutex::new(ratchet) }))
    }

    /// Reads every file again and, only if all of them are good, puts them in use at once.
    ///
    /// Live connections are not touched: their owner calls [`identify`](Self::identify) for each.
    /// Reads files, so async callers move it off their runtime.
    ///
    /// # Errors
    /// As [`load`](Self::load); also when the SPIFFE ID changed or a CRL is older than one already
    /// used. What was in use stays in use.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let mut ratchet = self.ratchet.lock().unwrap_or_else(PoisonError::into_inner);
        let state = read_state(&self.config, &self.provider, self.apart.as_ref(), SystemTime::now())?;
        let expected = self.own_id();
        if state.own.spiffe != expected {
            let path = self.config.certificate.clone();
            return Err(IdentityError::IdentityChanged { path, found: state.own.spiffe, expected });
        }
        ratchet.advance(state.trust.crls())?;
        self.current.state.store(Arc::new(state));
        Ok(())
    }

    /// The SPIFFE ID in the certificate of a file, before anything else is read.
    ///
    /// # Errors
    /// It cannot be read, or is none of a gateway's.
    pub fn id_in(certificate: &Path) -> Result<SpiffeId, IdentityError> {
        let chain = read_certificates(&Own, certificate, "certificate", limits::CHAIN_CERTIFICATES_MAX)?;
        Ok(own_leaf(certificate, &chain)?.spiffe)
    }

    /// The SPIFFE ID of our own certificate.
    #[must_use]
    pub fn own_id(&self) -> SpiffeId {
        self.current.state().own.spiffe.clone()
    }

    /// The site in our own certificate, if any.
    #[must_use]
    pub fn own_site(&self) -> Option<String> {
        self.current.state().own.site.clone()
    }

    /// When our own certificate expires.
    #[must_use]
    pub fn own_not_after(&self) -> SystemTime {
        self.current.state().own.not_after
    }

    /// TLS for dialling. Follows reloads by itself.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// TLS for accepting. Follows reloads by itself.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// Verifies the chain of a live peer as of now, in full: names, roots, dates, revocation.
    ///
    /// # Errors
    /// [`IdentityError::Refused`] with the reason.
    pub fn identify(&self, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, IdentityError> {
        self.identify_at(chain, SystemTime::now())
    }

    /// As [`identify`](Self::identify), as of another time.
    ///
    /// # Errors
    /// [`IdentityError::Refused`] with the reason.
    pub fn identify_at(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<PeerIdentity, IdentityError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        // Leaf rules demand both purposes, so either role gives the same answer.
        Ok(self.current.state().trust.verify(chain, algorithms, now)?)
    }

    /// Verifies our own chain as a peer with the same trust would: for start-up warnings and `doctor`.
    ///
    /// # Errors
    /// [`IdentityError::Refused`] with the reason that peers would have.
    pub fn own_standing(&self) -> Result<PeerIdentity, IdentityError> {
        let certified = Arc::clone(&self.current.state().certified);
        self.identify(&certified.cert)
    }

    /// The key that signs this gateway's evidence.
    #[must_use]
    pub fn signer(&self) -> Arc<Signer> {
        Arc::clone(&self.current.state().signer)
    }

    /// Files of CRLs that were not checked when they were read, because their issuer is neither a root, nor of our own chain, nor among
    /// the intermediates of the trust domain. A forged one keeps every peer out that its issuer stands above.
    #[must_use]
    pub fn unverified_crls(&self) -> Vec<PathBuf> {
        self.current.state().trust.unverified_crls().map(Path::to_path_buf).collect()
    }

    /// When the first CRL in use expires; in the past when one has.
    #[must_use]
    pub fn next_crl_expiry(&self) -> Option<SystemTime> {
        self.current.state().trust.next_crl_expiry()
    }

    /// Takes the refusals that are kept for at least this long, oldest first.
    #[must_use]
    pub fn drain_refusals(&self, older_than: Duration) -> Vec<Refusal> {
        self.current.refusals.drain(older_than)
    }

    /// Takes the refusal that a failed handshake says these words of.
    #[must_use]
    pub fn take_refusal(&self, words: &str) -> Option<Refusal> {
        self.current.refusals.take(words)
    }

    /// How many refusals were dropped because nobody drained them in time, since the start.
    #[must_use]
    pub fn lost_refusals(&self) -> u64 {
        self.current.refusals.lost()
    }
}

fn read_state(config: &IdentityConfig, provider: &CryptoProvider, apart: Option<&Apart>, now: SystemTime) -> Result<State, IdentityError> {
    let files = apart.map_or(&Own as &dyn OpenFiles, |apart| apart.files.as_ref());
    let chain = read_certificates(files, &config.certificate, "certificate", limits::CHAIN_CERTIFICATES_MAX)?;
    let own = own_leaf(&config.certificate, &chain)?;
    let (certified, signer) = match apart {
        Some(apart) => (held_key(config, &apart.tls, chain)?, Signer::held(&apart.signing)?),
        None => (read_key(config, provider, chain)?, Signer::read(&config.signing_key)?),
    };
    let own_issuers = certified.cert.get(1..).unwrap_or_default();
    let trust = TrustState::load(files, &config.trust, (own.spiffe.trust_domain(), own_issuers), now)?;
    Ok(State { certified: Arc::new(certified), own, signer: Arc::new(signer), trust })
}

fn own_leaf(path: &Path, chain: &[CertificateDer<'_>]) -> Result<Leaf, IdentityError> {
    let own = chain.first().ok_or(super::RefusalReason::NoCertificate).and_then(leaf::read);
    own.map_err(|reason| IdentityError::OwnCertificate { path: path.to_owned(), reason })
}

fn read_key(
    config: &IdentityConfig,
    provider: &CryptoProvider,
    chain: Vec<CertificateDer<'static>>,
) -> Result<CertifiedKey, IdentityError> {
    let malformed = || IdentityError::Malformed { what: "private key", path: config.key.clone(), expected: "one private key in PEM" };
    let pem = read_private(&config.key, "private key")?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| malformed())?;
    let key = provider.key_provider.load_private_key(key).map_err(|_| malformed())?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) => Ok(certified),
        // "Unknown" too: a key that cannot be compared is not known to belong.
        Err(_) => Err(IdentityError::KeyMismatch { certificate: config.certificate.clone(), key: config.key.clone() }),
    }
}

fn held_key(config: &IdentityConfig, holder: &Arc<Holder>, chain: Vec<CertificateDer<'static>>) -> Result<CertifiedKey, IdentityError> {
    let end_entity = chain.first().ok_or(super::RefusalReason::NoCertificate)?;
    let key = holder.tls_key(&leaf::public_key(end_entity)?)?;
    let mismatch = || IdentityError::KeyMismatch { certificate: config.certificate.clone(), key: config.key.clone() };
    Ok(CertifiedKey::new(chain, Arc::new(key.ok_or_else(mismatch)?)))
}

/// Presents the certificate that is current at each handshake.
struct OwnCertificate {
    current: Arc<Current>,
}

impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnCertificate").finish_non_exhaustive()
    }
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.state().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.state().certified))
    }
}

fn client_config(provider: &Arc<CryptoProvider>, current: &Arc<Current>) -> Result<ClientConfig, IdentityError> {
    let verifier = GatewayVerifier::new(Arc::clone(current), provider.signature_verification_algorithms);
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(OwnCertificate { current: Arc::clone(current) }));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // Names are not used, so none is told to the network.
    config.enable_sni = false;
    Ok(config)
}

fn server_config(provider: &Arc<CryptoProvider>, current: &Arc<Current>) -> Result<ServerConfig, IdentityError> {
    let verifier = GatewayVerifier::new(Arc::clone(current), provider.signature_verification_algorithms);
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(OwnCertificate { current: Arc::clone(current) }));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A ticket would let a peer back in without its certificate being looked at again.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    Ok(config)
}
