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

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
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
    socket: OwnedFd,
    told: Mutex<Told>,
    /// Something was said.
    news: Condvar,
}

/// What it has said of each request that somebody waits for.
#[derive(Debug, Default)]
struct Told {
    last: u64,
    ready: bool,
    gone: bool,
    /// Whether one of those who wait listens for all of them.
    listening: bool,
    /// Since when it is late, if it is: most who ask are told so at once, until it says something.
    late: Option<Instant>,
    asked: BTreeMap<u64, Option<Result<Said, Refusal>>>,
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
        Arc::new(Self { name, socket, told: Mutex::default(), news: Condvar::new() })
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
        self.wait(within, |told| told.ready.then_some(()))
    }

    /// Whether it has ended, so that nothing is signed any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut told = self.told();
        // Whoever listens now hears of it.
        if !told.listening {
            self.listen(&mut told);
        }
        told.gone
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

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something and waits for the answer.
    fn ask(&self, request: impl FnOnce(u64) -> Request) -> Result<Said, HolderError> {
        let number = {
            let mut told = self.told();
            if told.asked.len() >= limits::HOLDER_WAITING_MAX {
                return Err(HolderError::Busy { waiting: told.asked.len() });
            }
            if told.late.is_some() && !told.listening {
                self.listen(&mut told);
            }
            if told.late.is_some_and(|since| since.elapsed() < limits::HOLDER_LATE_FOR) {
                return Err(HolderError::Late { within: limits::HOLDER_ANSWERS_WITHIN });
            }
            if told.late.is_some() {
                // The next one after this waits for what comes of it.
                told.late = Some(Instant::now());
            }
            told.last = told.last.wrapping_add(1);
            let number = told.last;
            told.asked.insert(number, None);
            number
        };
        let answer = self.say(&request(number)).and_then(|()| {
            let answered = |told: &mut Told| told.asked.get_mut(&number).and_then(Option::take);
            self.wait(limits::HOLDER_ANSWERS_WITHIN, answered)?.map_err(HolderError::Refused)
        });
        let mut told = self.told();
        // An answer that comes later is nobody's.
        told.asked.remove(&number);
        told.late = matches!(answer, Err(HolderError::Late { .. })).then(Instant::now);
        answer
    }

    fn say(&self, request: &Request) -> Result<(), HolderError> {
        let cannot = |why: String| HolderError::Refused(Refusal::new(ErrorClass::Bug, why));
        let bytes = serde_json::to_vec(request).map_err(|error| cannot(error.to_string()))?;
        let sent = rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
        match sent {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::AGAIN) => Err(HolderError::Busy { waiting: self.told().asked.len() }),
            Err(rustix::io::Errno::MSGSIZE) => Err(cannot("a message that is too long to be signed".to_owned())),
            Err(_) => Err(HolderError::Ended),
        }
    }

    /// Takes in all that was said so far.
    fn listen(&self, told: &mut Told) {
        let mut bytes = [0; limits::HOLDER_MESSAGE_BYTES_MAX];
        while !told.gone {
            let got = rustix::io::retry_on_intr(|| recv(&self.socket, bytes.as_mut_slice(), RecvFlags::DONTWAIT | RecvFlags::TRUNC));
            let length = match got {
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) | Ok((_, 0)) => {
                    told.gone = true;
                    return;
                }
                Ok((_, length)) => length,
            };
            // What cannot be read is no answer; whoever waits for it hears that it is late.
            let Some(answer) = bytes.get(..length).and_then(|message| serde_json::from_slice(message).ok()) else { continue };
            // To whatever question: it answers again.
            told.late = None;
            match answer {
                Answer::Ready => told.ready = true,
                Answer::Opened { number, key } => told.take(number, Ok(Said::Key(key))),
                Answer::Signed { number, signature } => told.take(number, Ok(Said::Signature(signature))),
                Answer::Refused { number, refusal } => told.take(number, Err(refusal)),
            }
        }
    }

    /// Whoever waits first listens for all, so that nobody sleeps on while the answer is there.
    fn wait<T>(&self, within: Duration, mut found: impl FnMut(&mut Told) -> Option<T>) -> Result<T, HolderError> {
        let began = Instant::now();
        let mut told = self.told();
        loop {
            if !told.listening {
                self.listen(&mut told);
            }
            if let Some(answer) = found(&mut told) {
                return Ok(answer);
            }
            if told.gone {
                return Err(HolderError::Ended);
            }
            let Some(left) = within.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                return Err(HolderError::Late { within });
            };
            if told.listening {
                told = self.news.wait_timeout(told, left).map_or_else(|poisoned| poisoned.into_inner().0, |(told, _)| told);
                continue;
            }
            told.listening = true;
            drop(told);
            let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(1), tv_nsec: i64::from(left.subsec_nanos()) };
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left));
            told = self.told();
            told.listening = false;
            self.listen(&mut told);
            self.news.notify_all();
        }
    }
}

impl Told {
    /// Keeps an answer that somebody waits for.
    fn take(&mut self, number: u64, said: Result<Said, Refusal>) {
        if let Some(asked) = self.asked.get_mut(&number) {
            *asked = Some(said);
        }
    }
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
        let _ = self.holder.say(&Request::Forget { key: self.key });
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
