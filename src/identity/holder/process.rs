//! The process that holds a key: what it hears, what it signs, and keys of files.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustls::SignatureScheme;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::SigningKey;
use serde::{Deserialize, Serialize};

use super::{Answer, Request};
use crate::identity::IdentityError;
use crate::identity::keys::read_private;
use crate::limits;
use crate::wire::ErrorClass;

/// What a process with a key says no with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// [`ErrorClass`] as its number.
    class: u16,
    pub(super) why: String,
}

impl Refusal {
    /// Cut to what the socket has room for.
    pub fn new(class: ErrorClass, why: impl fmt::Display) -> Self {
        Self { class: class.number(), why: why.to_string().chars().take(limits::REASON_BYTES_MAX).collect() }
    }

    /// Who is at fault.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        ErrorClass::from_number(self.class).unwrap_or(ErrorClass::Local)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl From<IdentityError> for Refusal {
    fn from(error: IdentityError) -> Self {
        let mut why = error.to_string();
        let mut below = std::error::Error::source(&error);
        while let Some(cause) = below {
            why = format!("{why}: {cause}");
            below = cause.source();
        }
        Self::new(error.class(), why)
    }
}

/// Keys at the other end of a gateway's socket.
pub trait Keys {
    /// The key as it is now, or that of several which belongs to a public key, by a number, with its public half.
    ///
    /// # Errors
    /// It cannot be read.
    fn open(&mut self, wanted: Option<&[u8]>) -> Result<Option<(u16, Vec<u8>)>, Refusal>;

    /// Nobody signs with it any more, as often as it was opened.
    fn forget(&mut self, key: u16);

    /// The signature of a message that the key is for.
    ///
    /// # Errors
    /// There is no such key, or it does not sign.
    fn sign(&mut self, key: u16, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, Refusal>;
}

/// Serves the gateway at the other end of a socket until that ends. `fits`: whether the key is for a message, else what it is for.
///
/// # Errors
/// The socket fails, or the gateway says what it cannot mean.
pub fn serve(socket: &OwnedFd, keys: &mut dyn Keys, fits: &dyn Fn(&[u8]) -> Result<(), &'static str>) -> io::Result<()> {
    say(socket, &Answer::Ready)?;
    let mut bytes = vec![0; limits::HOLDER_MESSAGE_BYTES_MAX];
    loop {
        let (_, length) = rustix::io::retry_on_intr(|| recv(socket, bytes.as_mut_slice(), RecvFlags::TRUNC))?;
        let request = match bytes.get(..length) {
            Some([]) => return Ok(()),
            Some(message) => serde_json::from_slice(message)?,
            None => return Err(io::ErrorKind::InvalidData.into()),
        };
        let (number, answer) = match request {
            Request::Forget { key } => {
                keys.forget(key);
                continue;
            }
            Request::Open { number, wanted } => (number, keys.open(wanted.as_deref()).map(|key| Answer::Opened { number, key })),
            Request::Sign { number, key, scheme, message } => {
                let fits = fits(&message).map_err(|purpose| Refusal::new(ErrorClass::Bug, format!("this key signs {purpose} alone")));
                let signed = fits.and_then(|()| keys.sign(key, SignatureScheme::from(scheme), &message));
                (number, signed.map(|signature| Answer::Signed { number, signature }))
            }
        };
        say(socket, &answer.unwrap_or_else(|refusal| Answer::Refused { number, refusal }))?;
    }
}

fn say(socket: &OwnedFd, answer: &Answer) -> io::Result<()> {
    let bytes = serde_json::to_vec(answer)?;
    // A gateway that has died is no reason to die of a signal.
    rustix::io::retry_on_intr(|| send(socket, &bytes, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Whether a message is what TLS 1.3 signs in a handshake (RFC 8446 section 4.4.3), over a digest of SHA-256 or SHA-384.
///
/// # Errors
/// It is not, and the key is for nothing else.
pub fn is_handshake(message: &[u8]) -> Result<(), &'static str> {
    let contexts: [&[u8]; 2] = [b"TLS 1.3, server CertificateVerify\0", b"TLS 1.3, client CertificateVerify\0"];
    let digest = message
        .split_first_chunk::<64>()
        .filter(|(spaces, _)| spaces.iter().all(|byte| *byte == b' '))
        .and_then(|(_, rest)| contexts.iter().find_map(|context| rest.strip_prefix(*context)));
    digest.filter(|digest| matches!(digest.len(), 32 | 48)).map(drop).ok_or("handshakes of TLS 1.3")
}

/// Keys that somebody signs with, each with a number for as long as it is used: the one public key has one number.
pub(super) struct InUse<K> {
    last: u16,
    keys: Vec<Used<K>>,
}

struct Used<K> {
    number: u16,
    public: Vec<u8>,
    key: K,
    /// How often it was opened and not forgotten.
    opened: usize,
}

impl<K> InUse<K> {
    pub(super) const fn new() -> Self {
        Self { last: 0, keys: Vec::new() }
    }

    /// Gives out a number once more. `name` is for the error: too many others are in use.
    pub(super) fn open(&mut self, public: &[u8], key: K, name: &str) -> Result<u16, Refusal> {
        if let Some(used) = self.keys.iter_mut().find(|used| used.public == public) {
            used.opened = used.opened.saturating_add(1);
            used.key = key;
            return Ok(used.number);
        }
        if self.keys.len() >= limits::HELD_KEYS_MAX {
            let why = format!("{name}: {} others before it are in use by migrations yet", self.keys.len());
            return Err(Refusal::new(ErrorClass::Local, why));
        }
        // Those in use are few, so one of the next numbers is free.
        loop {
            self.last = self.last.wrapping_add(1);
            if self.keys.iter().all(|used| used.number != self.last) {
                break;
            }
        }
        self.keys.push(Used { number: self.last, public: public.to_vec(), key, opened: 1 });
        Ok(self.last)
    }

    pub(super) fn forget(&mut self, number: u16) {
        self.keys.retain_mut(|used| {
            used.opened = used.opened.saturating_sub(usize::from(used.number == number));
            used.opened > 0
        });
    }

    /// The public half, and the key.
    pub(super) fn get(&mut self, number: u16) -> Option<(&[u8], &mut K)> {
        let used = self.keys.iter_mut().find(|used| used.number == number)?;
        Some((&used.public, &mut used.key))
    }

    /// All of them.
    #[cfg(feature = "pkcs11")]
    pub(super) fn each(&mut self) -> impl Iterator<Item = &mut K> {
        self.keys.iter_mut().map(|used| &mut used.key)
    }
}

/// The key in a file, as it is now and as it was for those who began with it.
pub struct FileKeys {
    path: PathBuf,
    /// What it is, for errors.
    what: &'static str,
    evidence: bool,
    used: InUse<Arc<dyn SigningKey>>,
}

impl fmt::Debug for FileKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileKeys").field("path", &self.path).finish_non_exhaustive()
    }
}

impl FileKeys {
    /// The key of handshakes.
    #[must_use]
    pub fn of_handshakes(path: PathBuf) -> Self {
        Self { path, what: "private key", evidence: false, used: InUse::new() }
    }

    /// The key of evidence, which is Ed25519.
    #[must_use]
    pub fn of_evidence(path: PathBuf) -> Self {
        Self { path, what: "signing key", evidence: true, used: InUse::new() }
    }

    fn read(&self) -> Result<(Vec<u8>, Arc<dyn SigningKey>), IdentityError> {
        let expected = if self.evidence { "one Ed25519 private key in PKCS#8 PEM" } else { "one private key in PEM" };
        let malformed = || IdentityError::Malformed { what: self.what, path: self.path.clone(), expected };
        let pem = read_private(&self.path, self.what)?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| malformed())?;
        let key = any_supported_type(&key).map_err(|_| malformed())?;
        if self.evidence && key.algorithm() != rustls::SignatureAlgorithm::ED25519 {
            return Err(malformed());
        }
        let public = key.public_key().ok_or_else(malformed)?.to_vec();
        Ok((public, key))
    }
}

impl Keys for FileKeys {
    fn open(&mut self, _: Option<&[u8]>) -> Result<Option<(u16, Vec<u8>)>, Refusal> {
        let (public, key) = self.read()?;
        let name = format!("{} `{}`", self.what, self.path.display());
        let number = self.used.open(&public, key, &name)?;
        Ok(Some((number, public)))
    }

    fn forget(&mut self, key: u16) {
        self.used.forget(key);
    }

    fn sign(&mut self, key: u16, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, Refusal> {
        let (what, path) = (self.what, self.path.display());
        let cannot = |why: &str| Refusal::new(ErrorClass::Bug, format!("{what} `{path}`: {why}"));
        let (_, key) = self.used.get(key).ok_or_else(|| cannot("it is not open"))?;
        let signer = key.choose_scheme(&[scheme]).ok_or_else(|| cannot("it signs otherwise"))?;
        signer.sign(message).map_err(|error| cannot(&error.to_string()))
    }
}
