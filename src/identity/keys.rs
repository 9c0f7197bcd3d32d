//! Private keys: reading them, refusing exposed ones, and the gateway's Ed25519 signatures.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::SignatureScheme;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;

use super::error::IdentityError;
use super::holder::{HeldKey, Holder, HolderError, Refusal};
use crate::limits;
use crate::wire::ErrorClass;

/// Signs evidence (handoff messages, checkpoints) as this gateway. Not the TLS key.
pub struct Signer(Key);

/// Where the key is.
enum Key {
    Here(Ed25519KeyPair),
    /// In a process that holds it, with its public half.
    Held(HeldKey, [u8; 32]),
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
        Ok(Self(Key::Here(pair)))
    }

    /// The key that a process holds, as it is now.
    pub(super) fn held(holder: &Arc<Holder>) -> Result<Self, IdentityError> {
        let wrong = || IdentityError::Key(Refusal::new(ErrorClass::Misuse, format!("signing key `{}`: it is not Ed25519", holder.name())));
        let (key, public) = holder.open(None)?.ok_or_else(wrong)?;
        let public = public.strip_prefix(ED25519_SPKI).and_then(|public| public.try_into().ok()).ok_or_else(wrong)?;
        Ok(Self(Key::Held(key, public)))
    }

    /// Reads such a key from a file that nobody but its owner may be able to read.
    ///
    /// # Errors
    /// The file cannot be read, is exposed, or holds no such key.
    pub fn read(path: &Path) -> Result<Self, IdentityError> {
        Self::from_pkcs8_pem(&read_private(path, "signing key")?, path)
    }

    /// The signature of `message`.
    ///
    /// # Errors
    /// The process that holds the key did not make it.
    pub fn sign(&self, message: &[u8]) -> Result<[u8; 64], HolderError> {
        match &self.0 {
            // An Ed25519 signature always has 64 bytes; a shorter one would not verify.
            Key::Here(pair) => Ok(pair.sign(message).as_ref().try_into().unwrap_or([0; 64])),
            Key::Held(key, _) => {
                let signature = key.sign(SignatureScheme::ED25519, message)?;
                signature.try_into().map_err(|_| HolderError::Refused(Refusal::new(ErrorClass::Bug, "a signature that is none of Ed25519")))
            }
        }
    }

    /// The public key that verifies the signatures.
    #[must_use]
    pub fn public_key(&self) -> [u8; 32] {
        match &self.0 {
            Key::Here(pair) => pair.public_key().as_ref().try_into().unwrap_or([0; 32]),
            Key::Held(_, public) => *public,
        }
    }
}

/// What an Ed25519 key begins with as SubjectPublicKeyInfo (RFC 8410).
pub(super) const ED25519_SPKI: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Whether `signature` is the Ed25519 signature of `message` under `public_key`.
#[must_use]
pub fn verify_signature(public_key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ED25519, public_key).verify(message, signature).is_ok()
}

/// Opens the files that are no secret: certificates, roots and CRLs.
pub trait OpenFiles: fmt::Debug + Send + Sync {
    /// Opens one for reading, without waiting for whoever holds the other end of a pipe.
    ///
    /// # Errors
    /// It cannot be opened.
    fn open(&self, path: &Path) -> io::Result<File>;
}

/// As this process may.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own;

impl OpenFiles for Own {
    fn open(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
    }
}

/// Reads a file of bounded size.
pub(super) fn read_bounded(files: &dyn OpenFiles, path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, IdentityError> {
    read_open(&open(files, path, what)?, path, what, limit)
}

/// Reads a private key file, which nobody but its owner may be able to read.
pub(super) fn read_private(path: &Path, what: &'static str) -> Result<Vec<u8>, IdentityError> {
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let laid_by_systemd = credentials.is_some_and(|directory| path.parent() == Some(&directory));
    read_private_as(path, what, laid_by_systemd)
}

fn read_private_as(path: &Path, what: &'static str, laid_by_systemd: bool) -> Result<Vec<u8>, IdentityError> {
    let file = open(&Own, path, what)?;
    // The opened file is asked, not the path, so that the answer is about what is read.
    let metadata = file.metadata().map_err(|source| IdentityError::File { action: "read", what, path: path.to_owned(), source })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if laid_by_systemd {
        credential(path, what, &metadata)?;
    } else if mode & 0o077 != 0 {
        return Err(IdentityError::KeyExposed { path: path.to_owned(), mode });
    }
    read_open(&file, path, what, limits::PEM_FILE_BYTES_MAX)
}

/// systemd lays a credential with mode 0400. It is root's, and the service's user may read it by an access list, whose mask then shows
/// where the mode of the group would be; or it belongs to the service's user. Its directory is as closed.
fn credential(path: &Path, what: &'static str, file: &Metadata) -> Result<(), IdentityError> {
    let wrong = |metadata: &Metadata, path: &Path, expected| {
        let found = format!("mode {:04o} of user id {}, group id {}", metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
        IdentityError::Credential { path: path.to_owned(), found, expected }
    };
    let ours = |metadata: &Metadata| metadata.uid() == 0 || metadata.uid() == nix::unistd::geteuid().as_raw();
    // What stands for the group is an access list's only where the group is root's.
    let closed = |metadata: &Metadata| match metadata.mode() & 0o077 {
        0 => true,
        0o040 | 0o050 => metadata.uid() == 0 && metadata.gid() == 0,
        _ => false,
    };
    let directory = path.parent().unwrap_or(path);
    let around =
        std::fs::metadata(directory).map_err(|source| IdentityError::File { action: "read", what, path: directory.to_owned(), source })?;
    if !ours(&around) || !closed(&around) {
        return Err(wrong(&around, directory, "a directory of root or the service's user that nobody else may use"));
    }
    if !ours(file) || !closed(file) || file.mode() & 0o7333 != 0 {
        return Err(wrong(file, path, "mode 0400, of root or the service's user"));
    }
    Ok(())
}

/// Opens a regular file. A pipe or device would make a reload wait for whoever holds its other end.
fn open(files: &dyn OpenFiles, path: &Path, what: &'static str) -> Result<File, IdentityError> {
    let failed = |source| IdentityError::File { action: "read", what, path: path.to_owned(), source };
    let file = files.open(path).map_err(failed)?;
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
        let signature = signer.sign(b"evidence").unwrap();
        assert!(verify_signature(&signer.public_key(), b"evidence", &signature));
        assert!(!verify_signature(&signer.public_key(), b"evidencf", &signature));
        for bit in [0, 7, 200, 511] {
            let mut bad = signature;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!verify_signature(&signer.public_key(), b"evidence", &bad), "bit {bit}");
        }
        assert!(!verify_signature(&[0; 32], b"evidence", &signature));
    }

    /// As systemd's own code lays them: 0400, with an access list where it gives the service's user access, or given to that user.
    #[test]
    fn a_systemd_credential_is_taken_as_systemd_lays_it_and_not_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode: u32| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        let path = directory.path().join("tls-key");
        std::fs::write(&path, KEY).unwrap();
        let root = nix::unistd::geteuid().is_root();
        // A mask of an access list looks like a group that may read, and only root has credentials like that.
        for (directory_mode, file_mode, taken) in [
            (0o500, 0o400, true),
            (0o700, 0o400, true),
            (0o550, 0o440, root),
            (0o700, 0o440, root),
            (0o700, 0o600, false),
            (0o700, 0o404, false),
            (0o700, 0o420, false),
            (0o700, 0o444, false),
            (0o755, 0o400, false),
            (0o770, 0o400, false),
            (0o701, 0o400, false),
        ] {
            mode(directory.path(), directory_mode);
            mode(&path, file_mode);
            let read = read_private_as(&path, "private key", true);
            assert_eq!(read.is_ok(), taken, "{directory_mode:o} {file_mode:o}: {read:?}");
            if let Err(error) = read {
                assert!(error.to_string().contains("is not as systemd lays it"), "{error}");
            }
        }
        mode(directory.path(), 0o700);
        if root {
            mode(&path, 0o400);
            for (owner, group, taken) in [(0, 0, true), (65_534, 0, false)] {
                std::os::unix::fs::chown(&path, Some(owner), Some(group)).unwrap();
                assert_eq!(read_private_as(&path, "private key", true).is_ok(), taken, "{owner}:{group}");
            }
            std::os::unix::fs::chown(&path, Some(0), Some(65_534)).unwrap();
            mode(&path, 0o440);
            assert!(read_private_as(&path, "private key", true).is_err(), "a group that may read it is no access list");
        } else {
            println!("SKIP credentials of other users: only root makes files of others");
        }
        // The same file as a key that is no credential.
        mode(&path, 0o440);
        assert!(matches!(read_private_as(&path, "private key", false), Err(IdentityError::KeyExposed { mode: 0o440, .. })));
    }

    #[test]
    fn never_shows_key_material() {
        let signer = Signer::from_pkcs8_pem(KEY, Path::new("k")).unwrap();
        assert_eq!(format!("{signer:?}"), "Signer { .. }");
        let error = Signer::from_pkcs8_pem(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", Path::new("k")).unwrap_err();
        assert_eq!(error.to_string(), "signing key `k` is malformed: expected one Ed25519 private key in PKCS#8 PEM");
    }
}
