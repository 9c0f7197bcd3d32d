//! A TLS key that stays in a PKCS#11 token. Whatever speaks to tokens is code of other people's that wants files, libraries and
//! sockets, so it runs in a process of its own, outside of the gateway's sandbox; this is the gateway's end of a socket to it.
//!
//! *Owns:* what is said on that socket, and a key that TLS can use. *Never:* a PIN in the gateway's process; a wait without an end.
//! *Read first:* [`Request`] and [`Answer`], then [`Token::ask`]; `module.rs` is the other end, with the feature `pkcs11` only.

#[cfg(feature = "pkcs11")]
mod module;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom, SystemRandom};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use serde::{Deserialize, Serialize};
use tokio::runtime::{Handle, RuntimeFlavor};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

#[cfg(feature = "pkcs11")]
pub use module::{Opened, read_pin};

use super::error::IdentityError;
use crate::limits;
use crate::types::TokenUri;

/// What the process has to know; it finds it on standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenPlan {
    /// The library that speaks to tokens.
    pub module: PathBuf,
    /// Which key of which token.
    pub uri: TokenUri,
    /// The file with the PIN; none where the token asks for it by itself, or wants none.
    pub pin: Option<PathBuf>,
    /// Whose process it becomes.
    pub user: Option<String>,
}

/// What the gateway says.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// How many keys of the token the URI names.
    Find { number: u64 },
    /// Sign with one of those.
    Sign { number: u64, key: u16, scheme: u16, message: Vec<u8> },
}

/// What the process says.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// First, and once: the token is there, and has the key.
    Ready,
    Found {
        number: u64,
        keys: u16,
    },
    Signed {
        number: u64,
        signature: Vec<u8>,
    },
    Refused {
        number: u64,
        why: String,
    },
}

/// Why a token did not sign.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The process has ended.
    #[error("the process that speaks to the token has ended: restart the gateway, its guests run on")]
    Ended,
    /// It does not answer.
    #[error("the token did not answer within {within:?}")]
    Late {
        /// The limit.
        within: Duration,
    },
    /// Too many wait already.
    #[error("{waiting} signatures of the token are waited for already")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// The token, or its library, said no.
    #[error("{0}")]
    Refused(String),
}

/// A process that speaks to a token.
pub struct Token {
    uri: TokenUri,
    socket: OwnedFd,
    told: Mutex<Told>,
}

/// What it has said of each request that somebody waits for.
#[derive(Debug, Default)]
struct Told {
    last: u64,
    ready: bool,
    gone: bool,
    /// Since when it is late, if it is: most who ask are told so at once.
    late: Option<Instant>,
    asked: BTreeMap<u64, Option<Result<Said, String>>>,
}

#[derive(Debug)]
enum Said {
    Keys(u16),
    Signature(Vec<u8>),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("uri", &self.uri).finish_non_exhaustive()
    }
}

/// Between two looks at what was said to others.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

impl Token {
    /// The one at the other end of a socket that keeps messages apart.
    #[must_use]
    pub fn over(socket: OwnedFd, uri: TokenUri) -> Arc<Self> {
        Arc::new(Self { uri, socket, told: Mutex::default() })
    }

    /// Waits until the token is there.
    ///
    /// # Errors
    /// It is not; the process has said why on standard error.
    pub fn ready(&self, within: Duration) -> Result<(), TokenError> {
        self.wait(within, |told| told.ready.then_some(()))
    }

    /// Its key that belongs to the certificate, which it shows by a signature.
    pub(super) fn key_of(
        self: &Arc<Self>,
        certificate: &CertificateDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<Option<TokenKey>, IdentityError> {
        let failed = |source| IdentityError::Token { uri: self.uri.clone(), source };
        let Some((algorithm, schemes, spki)) = kind_of(certificate) else { return Ok(None) };
        let Some(first) = schemes.first().copied() else { return Ok(None) };
        let mut challenge = b"sealane: is this the key of the certificate? ".to_vec();
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| failed(TokenError::Refused("no random numbers".to_owned())))?;
        challenge.extend(random);
        let found = self.ask(|number| Request::Find { number }).map_err(failed)?;
        let Said::Keys(keys) = found else { return Err(failed(nonsense())) };
        for key in 0..keys.min(limits::TOKEN_KEYS_MAX) {
            let candidate = TokenKey { token: Arc::clone(self), key, algorithm, schemes, spki: spki.clone() };
            // A key of another kind cannot do what is asked.
            let Ok(signature) = candidate.sign(first, &challenge) else { continue };
            if verifies(certificate, algorithms, first, &challenge, &signature) {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something and waits for the answer.
    fn ask(&self, request: impl FnOnce(u64) -> Request) -> Result<Said, TokenError> {
        let number = {
            let mut told = self.told();
            if told.asked.len() >= limits::TOKEN_WAITING_MAX {
                return Err(TokenError::Busy { waiting: told.asked.len() });
            }
            if told.late.is_some_and(|since| since.elapsed() < limits::TOKEN_LATE_FOR) {
                return Err(TokenError::Late { within: limits::TOKEN_ANSWERS_WITHIN });
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
            self.wait(limits::TOKEN_ANSWERS_WITHIN, |told| told.asked.get_mut(&number).and_then(Option::take))?.map_err(TokenError::Refused)
        });
        let mut told = self.told();
        // An answer that comes later is nobody's.
        told.asked.remove(&number);
        told.late = matches!(answer, Err(TokenError::Late { .. })).then(Instant::now);
        answer
    }

    fn say(&self, request: &Request) -> Result<(), TokenError> {
        let bytes = serde_json::to_vec(request).map_err(|error| TokenError::Refused(error.to_string()))?;
        let sent = rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
        match sent {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::AGAIN) => Err(TokenError::Busy { waiting: self.told().asked.len() }),
            Err(rustix::io::Errno::MSGSIZE) => Err(TokenError::Refused("a message that is too long to be signed".to_owned())),
            Err(_) => Err(TokenError::Ended),
        }
    }

    /// Takes in all that was said so far.
    fn listen(&self, told: &mut Told) {
        let mut bytes = vec![0; limits::TOKEN_MESSAGE_BYTES_MAX];
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
            match bytes.get(..length).and_then(|message| serde_json::from_slice(message).ok()) {
                Some(Answer::Ready) => told.ready = true,
                Some(Answer::Found { number, keys }) => told.take(number, Ok(Said::Keys(keys))),
                Some(Answer::Signed { number, signature }) => told.take(number, Ok(Said::Signature(signature))),
                Some(Answer::Refused { number, why }) => told.take(number, Err(why)),
                None => {}
            }
        }
    }

    fn wait<T>(&self, within: Duration, mut found: impl FnMut(&mut Told) -> Option<T>) -> Result<T, TokenError> {
        let began = Instant::now();
        loop {
            let gone = {
                let mut told = self.told();
                self.listen(&mut told);
                if let Some(answer) = found(&mut told) {
                    return Ok(answer);
                }
                told.gone
            };
            if gone {
                return Err(TokenError::Ended);
            }
            if began.elapsed() >= within {
                return Err(TokenError::Late { within });
            }
            // Others listen too, so what is waited for may be there without a word on the socket.
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&LOOK));
        }
    }
}

impl Told {
    /// Keeps an answer that somebody waits for.
    fn take(&mut self, number: u64, said: Result<Said, String>) {
        if let Some(asked) = self.asked.get_mut(&number) {
            *asked = Some(said);
        }
    }
}

fn nonsense() -> TokenError {
    TokenError::Refused("an answer to another question".to_owned())
}

type Kind = (SignatureAlgorithm, &'static [SignatureScheme], Vec<u8>);

/// What the key of a certificate signs with in TLS 1.3, and the key itself.
fn kind_of(certificate: &CertificateDer<'_>) -> Option<Kind> {
    use rustls::pki_types::alg_id;
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let key = certificate.public_key();
    // Within a SEQUENCE, whose contents rustls' constants are.
    let is = |wanted: rustls::pki_types::AlgorithmIdentifier| super::strength::contents(&key.algorithm).as_deref() == Some(wanted.as_ref());
    let (algorithm, schemes): (_, &'static [SignatureScheme]) = if is(alg_id::ECDSA_P256) {
        (SignatureAlgorithm::ECDSA, &[SignatureScheme::ECDSA_NISTP256_SHA256])
    } else if is(alg_id::ECDSA_P384) {
        (SignatureAlgorithm::ECDSA, &[SignatureScheme::ECDSA_NISTP384_SHA384])
    } else if is(alg_id::ED25519) {
        (SignatureAlgorithm::ED25519, &[SignatureScheme::ED25519])
    } else if is(alg_id::RSA_ENCRYPTION) {
        (SignatureAlgorithm::RSA, &[SignatureScheme::RSA_PSS_SHA256, SignatureScheme::RSA_PSS_SHA384, SignatureScheme::RSA_PSS_SHA512])
    } else {
        return None;
    };
    Some((algorithm, schemes, key.raw.to_vec()))
}

fn verifies(
    certificate: &CertificateDer<'_>,
    algorithms: &WebPkiSupportedAlgorithms,
    scheme: SignatureScheme,
    message: &[u8],
    signature: &[u8],
) -> bool {
    let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return false };
    let fitting = algorithms.mapping.iter().filter(|(known, _)| *known == scheme).flat_map(|(_, all)| all.iter());
    fitting.into_iter().any(|algorithm| certificate.verify_signature(*algorithm, message, signature).is_ok())
}

/// A key in a token, for TLS. It signs on the thread of the handshake, which waits for at most [`limits::TOKEN_ANSWERS_WITHIN`]; others of
/// its runtime go on meanwhile where that has more threads.
#[derive(Debug, Clone)]
pub(super) struct TokenKey {
    token: Arc<Token>,
    key: u16,
    algorithm: SignatureAlgorithm,
    schemes: &'static [SignatureScheme],
    spki: Vec<u8>,
}

impl TokenKey {
    fn sign(&self, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, TokenError> {
        let (key, scheme) = (self.key, u16::from(scheme));
        match self.token.ask(|number| Request::Sign { number, key, scheme, message: message.to_vec() })? {
            Said::Signature(signature) => Ok(signature),
            Said::Keys(_) => Err(nonsense()),
        }
    }
}

impl SigningKey for TokenKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = self.schemes.iter().copied().find(|scheme| offered.contains(scheme))?;
        Some(Box::new(TokenSigner { key: self.clone(), scheme }))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(SubjectPublicKeyInfoDer::from(self.spki.as_slice()))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }
}

#[derive(Debug)]
struct TokenSigner {
    key: TokenKey,
    scheme: SignatureScheme,
}

/// What a peer is told of a handshake that the token did not sign; our own log has the rest.
pub const NOT_SIGNED: &str = "the token that has this gateway's key did not sign";

impl Signer for TokenSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let sign = || self.key.sign(self.scheme, message);
        let several = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
        let signed = if several { tokio::task::block_in_place(sign) } else { sign() };
        signed.map_err(|error| {
            tracing::error!(key = %self.key.token.uri, %error, "handshakes fail until the token signs again; sessions go on");
            rustls::Error::General(NOT_SIGNED.to_owned())
        })
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}
