//! Private keys: reading them, refusing exposed ones, and the gateway's Ed25519 signatures.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;

use super::error::IdentityError;
use crate::limits;

/// Signs evidence (handoff messages, checkpoints) as this gateway. Not the TLS key.
pub struct Signer {
    pair: Ed25519KeyPair,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl Signer {
    /// Reads an Ed25519 key in PKCS#8 PEM, as `openssl genpkey` and `sealane pki issue` write it.
    ///
    /// # Errors
    /// The text is no such key; `path` is named in the message.
    pub fn from_pkcs8_pem(pem: &[u8], path: &Path) -> Result<Self, IdentityError> {
        let malformed =
            || IdentityError::Malformed { what: "signing key", path: path.to_owned(), expected: "one Ed25519 private key in PKCS#8 PEM" };
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|_| malformed())?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).map_err(|_| malformed())?;
        Ok(Self { pair })
    }

    /// Reads such a key from a file that nobody but its owner may be able to read.
    ///
    /// # Errors
    /// The file cannot be read, is exposed, or holds no such key.
    pub fn read(path: &Path) -> Result<Self, IdentityError> {
        Self::from_pkcs8_pem(&read_private(path, "signing key")?, path)
    }

    /// The signature of `message`.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut out = [0; 64];
        // An Ed25519 signature always has 64 bytes; a shorter one would not verify.
        for (to, from) in out.iter_mut().zip(self.pair.sign(message).as_ref()) {
            *to = *from;
        }
        out
    }

    /// The public key that verifies the signatures.
    #[must_use]
    pub fn public_key(&self) -> [u8; 32] {
        let mut out = [0; 32];
        for (to, from) in out.iter_mut().zip(self.pair.public_key().as_ref()) {
            *to = *from;
        }
        out
    }
}

/// Whether `signature` is the Ed25519 signature of `message` under `public_key`.
#[must_use]
pub fn verify_signature(public_key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ED25519, public_key).verify(message, signature).is_ok()
}

/// Reads a file of bounded size.
pub(super) fn read_bounded(path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, IdentityError> {
    read_open(&open(path, what)?, path, what, limit)
}

/// Reads a private key file, which nobody but its owner may be able to read.
pub(super) fn read_private(path: &Path, what: &'static str) -> Result<Vec<u8>, IdentityError> {
    let file = open(path, what)?;
    // The opened file is asked, not the path, so that the answer is about what is read.
    let metadata = file.metadata().map_err(|source| IdentityError::File { action: "read", what, path: path.to_owned(), source })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::KeyExposed { path: path.to_owned(), mode });
    }
    read_open(&file, path, what, limits::PEM_FILE_BYTES_MAX)
}

/// Opens a regular file. A pipe or device would make a reload wait for whoever holds its other end.
fn open(path: &Path, what: &'static str) -> Result<File, IdentityError> {
    let failed = |source| IdentityError::File { action: "read", what, path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        Ok(file)
    } else {
        Err(IdentityError::Malformed { what, path: path.to_owned(), expected: "a regular file" })
    }
}

fn read_open(file: &File, path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, IdentityError> {
    let mut bytes = Vec::new();
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    let read = read.map_err(|source| IdentityError::File { action: "read", what, path: path.to_owned(), source })?;
    if u64::try_from(read).map_or(true, |read| read > limit) {
        return Err(IdentityError::TooLarge { what, path: path.to_owned(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
";

    /// RFC 8410 section 10.3 gives this key and its public half.
    #[test]
    fn reads_the_rfc_8410_key_and_signs_with_it() {
        let signer = Signer::from_pkcs8_pem(KEY, Path::new("k")).unwrap();
        let public = "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1";
        assert_eq!(signer.public_key().iter().map(|b| format!("{b:02x}")).collect::<String>(), public);
        let signature = signer.sign(b"evidence");
        assert!(verify_signature(&signer.public_key(), b"evidence", &signature));
        assert!(!verify_signature(&signer.public_key(), b"evidencf", &signature));
        for bit in [0, 7, 200, 511] {
            let mut bad = signature;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!verify_signature(&signer.public_key(), b"evidence", &bad), "bit {bit}");
        }
        assert!(!verify_signature(&[0; 32], b"evidence", &signature));
    }

    #[test]
    fn never_shows_key_material() {
        let signer = Signer::from_pkcs8_pem(KEY, Path::new("k")).unwrap();
        assert_eq!(format!("{signer:?}"), "Signer { .. }");
        let error = Signer::from_pkcs8_pem(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", Path::new("k")).unwrap_err();
        assert_eq!(error.to_string(), "signing key `k` is malformed: expected one Ed25519 private key in PKCS#8 PEM");
    }
}
