//! Private keys that are in no process that hears peers: one process for each key, which signs what its gateway may sign with it, and
//! nothing else. The key is in a file, in a credential, or in a PKCS#11 token; this is the gateway's end of a socket to that process.
//!
//! *Owns:* what is said on that socket, keys that TLS and evidence can use, and the other end. *Never:* a key on the socket; a PIN in the
//! gateway's process; a wait without an end; a signature of something that the key is not for.
//! *Read first:* [`Request`] and [`Answer`], then [`Holder::ask`]; `process.rs` is the other end, `module.rs` that for tokens, with the
//! feature `pkcs11` only.

#[cfg(feature = "pkcs11")]
mod module;
mod process;
#[cfg(any(test, feature = "pkcs11"))]
mod raw;
#[cfg(test)]
mod tests;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use serde::{Deserialize, Serialize};
use tokio::runtime::{Handle, RuntimeFlavor};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

#[cfg(feature = "pkcs11")]
pub use module::{Opened, read_pin};
pub use process::{FileKeys, Keys, Refusal, is_handshake, serve};

use super::error::IdentityError;
use crate::companion::{self, Mailbox, Unanswered};
use crate::limits;
use crate::types::TokenUri;
use crate::wire::ErrorClass;

/// Where a private key is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum KeyPlace {
    /// A file that nobody but its owner can read, or a credential as systemd lays it.
    File(PathBuf),
    /// A token, which does not give it away.
    Token(TokenPlace),
}

/// A key in a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenPlace {
    /// The library that speaks to tokens.
    pub module: PathBuf,
    /// Which key of which token.
    pub uri: TokenUri,
    /// The file with the PIN; none where the token asks for it by itself, or wants none.
    pub pin: Option<PathBuf>,
}

/// What the gateway says.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// The key is to be read, as it is now: it can be another than before. With a public key (SubjectPublicKeyInfo) the one that belongs
    /// to it is wanted.
    Open { number: u64, wanted: Option<Vec<u8>> },
    /// Sign with one that was opened. A TLS signature scheme, for keys that know more than one.
    Sign { number: u64, key: u16, scheme: u16, message: Vec<u8> },
    /// Nobody signs with it any more, as often as it was opened.
    Forget { key: u16 },
}

/// What the process says.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// First, and once: it has given up what it does not need, and listens.
    Ready,
    /// The key, and its public half (SubjectPublicKeyInfo); nothing where there is none that is wanted.
    Opened {
        number: u64,
        key: Option<(u16, Vec<u8>)>,
    },
    Signed {
        number: u64,
        signature: Vec<u8>,
    },
    Refused {
        number: u64,
        refusal: Refusal,
    },
}

/// Why a key was not opened, or did not sign.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HolderError {
    /// The process has ended.
    #[error("the process that holds it has ended: restart the gateway, its guests run on")]
    Ended,
    /// It does not answer.
    #[error("the process that holds it did not answer within {within:?}")]
    Late {
        /// The limit.
        within: Duration,
    },
    /// Too many wait already.
    #[error("{waiting} signatures are waited for already")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// The process, or the token behind it, said no.
    #[error("{}", .0.why)]
    Refused(Refusal),
}

impl HolderError {
    fn nonsense() -> Self {
        Self::Refused(Refusal::new(ErrorClass::Bug, "an answer to another question"))
    }
}

/// A process that holds a key.
pub struct Holder {
    /// The key as the configuration has it.
    name: String,
    mailbox: Arc<Mailbox<Result<Said, Refusal>>>,
    /// Since when it is late, if it is, and how many messages had come: most who ask are told so at once, until it says something.
    late: Mutex<Option<(Instant, u64)>>,
}

#[derive(Debug)]
enum Said {
    Key(Option<(u16, Vec<u8>)>),
    Signature(Vec<u8>),
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Holder {
    /// The one at the other end of a socket that keeps messages apart.
    #[must_use]
    pub fn over(socket: OwnedFd, name: String) -> Arc<Self> {
        let bytes_max = [limits::HOLDER_MESSAGE_BYTES_MAX; 2];
        Arc::new(Self { name, mailbox: Mailbox::over(socket, bytes_max, read), late: Mutex::default() })
    }

    /// The key as the configuration has it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until it listens.
    ///
    /// # Errors
    /// It does not; it has said why on standard error.
    pub fn ready(&self, within: Duration) -> Result<(), HolderError> {
        self.mailbox.wait(within, |told| told.ready.then_some(())).map_err(|why| self.unanswered(why, within))
    }

    /// Whether it has ended, so that nothing is signed any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.mailbox.look(|told| told.gone)
    }

    /// Its key as it is now, and the public half; of several the one of a public key.
    pub(super) fn open(self: &Arc<Self>, wanted: Option<&[u8]>) -> Result<Option<(HeldKey, Vec<u8>)>, IdentityError> {
        let failed = |source| match source {
            // It has said which key, and what about it.
            HolderError::Refused(refusal) => IdentityError::Key(refusal),
            source => IdentityError::Holder { name: self.name.clone(), source },
        };
        match patiently(|| self.ask(|number| Request::Open { number, wanted: wanted.map(<[u8]>::to_vec) })).map_err(failed)? {
            Said::Key(found) => Ok(found.map(|(key, public)| (HeldKey { holder: Arc::clone(self), key }, public))),
            Said::Signature(_) => Err(failed(HolderError::nonsense())),
        }
    }

    /// Its key that belongs to the certificate with this public key, for TLS.
    pub(super) fn tls_key(self: &Arc<Self>, public: &[u8]) -> Result<Option<TlsKey>, IdentityError> {
        let Some((algorithm, schemes)) = kind_of(public) else { return Ok(None) };
        let found = self.open(Some(public))?.filter(|(_, found)| found == public);
        Ok(found.map(|(key, spki)| TlsKey { key: Arc::new(key), algorithm, schemes, spki }))
    }

    /// Says something and waits for the answer.
    fn ask(&self, request: impl FnOnce(u64) -> Request) -> Result<Said, HolderError> {
        let within = limits::HOLDER_ANSWERS_WITHIN;
        let asked = self.mailbox.number(limits::HOLDER_WAITING_MAX).map_err(|waiting| HolderError::Busy { waiting })?;
        if self.is_late() {
            return Err(HolderError::Late { within });
        }
        let answer = self.mailbox.say(&request(asked.number), false).and_then(|()| asked.taken(within));
        let late = matches!(answer, Err(Unanswered::Late)).then(|| (Instant::now(), self.messages()));
        *self.late() = late;
        answer.map_err(|why| self.unanswered(why, within))?.map_err(HolderError::Refused)
    }

    /// Whether it was, and has said nothing since.
    fn is_late(&self) -> bool {
        let mut late = self.late();
        late.take_if(|(_, before)| *before != self.messages());
        let Some((since, _)) = late.as_mut() else { return false };
        if since.elapsed() < limits::HOLDER_LATE_FOR {
            return true;
        }
        // The next one after this waits for what comes of it.
        *since = Instant::now();
        false
    }

    fn late(&self) -> MutexGuard<'_, Option<(Instant, u64)>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn messages(&self) -> u64 {
        self.mailbox.look(|told| told.messages)
    }

    fn unanswered(&self, why: Unanswered, within: Duration) -> HolderError {
        match why {
            Unanswered::Gone => HolderError::Ended,
            Unanswered::Late => HolderError::Late { within },
            Unanswered::Full => HolderError::Busy { waiting: self.mailbox.look(|told| told.waiting()) },
            Unanswered::Long(_) => HolderError::Refused(Refusal::new(ErrorClass::Bug, "a message that is too long to be signed")),
        }
    }
}

fn read(message: &[u8], _: Option<OwnedFd>) -> Option<companion::Said<Result<Said, Refusal>>> {
    Some(match serde_json::from_slice(message).ok()? {
        Answer::Ready => companion::Said::Ready,
        Answer::Opened { number, key } => companion::Said::Of(number, Ok(Said::Key(key))),
        Answer::Signed { number, signature } => companion::Said::Of(number, Ok(Said::Signature(signature))),
        Answer::Refused { number, refusal } => companion::Said::Of(number, Err(refusal)),
    })
}

/// What the key of a certificate signs with in TLS 1.3.
fn kind_of(public: &[u8]) -> Option<(SignatureAlgorithm, &'static [SignatureScheme])> {
    use rustls::pki_types::alg_id;
    let (_, key) = SubjectPublicKeyInfo::from_der(public).ok()?;
    // Within a SEQUENCE, whose contents rustls' constants are.
    let is = |wanted: rustls::pki_types::AlgorithmIdentifier| super::strength::contents(&key.algorithm).as_deref() == Some(wanted.as_ref());
    if is(alg_id::ECDSA_P256) {
        Some((SignatureAlgorithm::ECDSA, &[SignatureScheme::ECDSA_NISTP256_SHA256]))
    } else if is(alg_id::ECDSA_P384) {
        Some((SignatureAlgorithm::ECDSA, &[SignatureScheme::ECDSA_NISTP384_SHA384]))
    } else if is(alg_id::ED25519) {
        Some((SignatureAlgorithm::ED25519, &[SignatureScheme::ED25519]))
    } else if is(alg_id::RSA_ENCRYPTION) {
        Some((
            SignatureAlgorithm::RSA,
            &[SignatureScheme::RSA_PSS_SHA256, SignatureScheme::RSA_PSS_SHA384, SignatureScheme::RSA_PSS_SHA512],
        ))
    } else {
        None
    }
}

/// A thread of a runtime that has more lets the others take over what it would have done meanwhile.
fn patiently<T>(ask: impl FnOnce() -> T) -> T {
    let several = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    if several { tokio::task::block_in_place(ask) } else { ask() }
}

/// A key that was opened, until nobody has it any more. Whoever has it signed waits for at most [`limits::HOLDER_ANSWERS_WITHIN`].
#[derive(Debug)]
pub(super) struct HeldKey {
    holder: Arc<Holder>,
    key: u16,
}

impl HeldKey {
    pub(super) fn sign(&self, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, HolderError> {
        let (key, scheme) = (self.key, u16::from(scheme));
        match patiently(|| self.holder.ask(|number| Request::Sign { number, key, scheme, message: message.to_vec() }))? {
            Said::Signature(signature) => Ok(signature),
            Said::Key(_) => Err(HolderError::nonsense()),
        }
    }
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        // A process that has ended has forgotten it as well.
        let _ = self.holder.mailbox.say(&Request::Forget { key: self.key }, false);
    }
}

/// A key that is held elsewhere, for TLS.
#[derive(Debug, Clone)]
pub(super) struct TlsKey {
    key: Arc<HeldKey>,
    algorithm: SignatureAlgorithm,
    schemes: &'static [SignatureScheme],
    spki: Vec<u8>,
}

impl SigningKey for TlsKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = self.schemes.iter().copied().find(|scheme| offered.contains(scheme))?;
        Some(Box::new(TlsSigner { key: Arc::clone(&self.key), scheme }))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(SubjectPublicKeyInfoDer::from(self.spki.as_slice()))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }
}

#[derive(Debug)]
struct TlsSigner {
    key: Arc<HeldKey>,
    scheme: SignatureScheme,
}

/// What a peer is told of a handshake that was not signed; our own log has the rest.
pub const NOT_SIGNED: &str = "what has this gateway's key did not sign";

impl Signer for TlsSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.key.sign(self.scheme, message).map_err(|error| {
            tracing::error!(key = self.key.holder.name, %error, "handshakes fail until it signs again; sessions go on");
            rustls::Error::General(NOT_SIGNED.to_owned())
        })
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}
