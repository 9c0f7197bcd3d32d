//! The files that a configuration names: there, readable, of the right kind, and not too open.

use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use x509_parser::extensions::GeneralName;

use super::raw::{FileKind, FileMention, Reader};
use crate::limits::CONFIG_BYTES_MAX;

/// Looks at every mentioned file and adds what is wrong.
pub(super) fn check(reader: &mut Reader) {
    for mention in std::mem::take(&mut reader.mentions) {
        if let Err((message, hint)) = look(reader, &mention) {
            reader.problem(mention.at, &mention.key, message, hint);
        }
    }
}

type Wrong = (String, Option<String>);

fn look(reader: &mut Reader, mention: &FileMention) -> Result<(), Wrong> {
    let shown = mention.path.display();
    let metadata = match std::fs::metadata(&mention.path) {
        // What is in it the gateway verifies; without it, it may still have the one from before.
        Err(error) if error.kind() == ErrorKind::NotFound && mention.kind == FileKind::PolicyBundle => return Ok(()),
        metadata => metadata.map_err(|error| (format!("cannot read `{shown}`: {error}"), None))?,
    };
    match mention.kind {
        FileKind::PolicyDirectory => policy_directory(&mention.path, &metadata),
        FileKind::PolicyBundle if metadata.is_dir() => Ok(()),
        FileKind::PolicyBundle => Err((format!("`{shown}` is not a directory"), None)),
        FileKind::PrivateKey => {
            let mode = metadata.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                let hint = format!("chmod 600 {shown}");
                return Err((format!("private key `{shown}` can be read by others (mode {mode:03o}): expected mode 600"), Some(hint)));
            }
            private_key(&mention.path)
        }
        FileKind::Pin => {
            let mode = metadata.permissions().mode() & 0o777;
            let hint = || Some(format!("chmod 600 {shown}"));
            if mode & 0o077 == 0 {
                Ok(())
            } else {
                Err((format!("PIN `{shown}` can be read by others (mode {mode:03o}): expected mode 600"), hint()))
            }
        }
        FileKind::Library if metadata.is_file() => Ok(()),
        FileKind::Library => Err((format!("`{shown}` is not a library"), None)),
        FileKind::Pem(label) => pem(&mention.path, label).map(drop),
        FileKind::RevocationList => revocation_list(&mention.path),
        FileKind::Certificate => own_certificate(reader, &mention.path),
    }
}

fn policy_directory(path: &Path, metadata: &Metadata) -> Result<(), Wrong> {
    let shown = path.display();
    if !metadata.is_dir() {
        return Err((format!("`{shown}` is not a directory"), None));
    }
    let entries = std::fs::read_dir(path).map_err(|error| (format!("cannot read `{shown}`: {error}"), None))?;
    let policies = entries.filter_map(Result::ok).filter(|entry| entry.path().extension().is_some_and(|suffix| suffix == "cedar"));
    if policies.count() == 0 {
        let hint = "without a policy nothing is permitted and the gateway does not start".to_owned();
        return Err((format!("no `*.cedar` file in `{shown}`"), Some(hint)));
    }
    Ok(())
}

/// Authorities hand lists out in DER, and `sealane pki` in PEM.
fn revocation_list(path: &Path) -> Result<(), Wrong> {
    match start_of(path)?.first() {
        Some(&DER_SEQUENCE) => Ok(()),
        _ => pem(path, "X509 CRL").map(drop),
    }
}

/// What everything that is signed in X.509 begins with.
const DER_SEQUENCE: u8 = 0x30;

fn start_of(path: &Path) -> Result<Vec<u8>, Wrong> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| (format!("cannot read `{}`: {error}", path.display()), None))?;
    Ok(bytes)
}

/// Looks at the file of a private key without leaving any of it behind in this process.
fn private_key(path: &Path) -> Result<(), Wrong> {
    let unreadable = |error| (format!("cannot read `{}`: {error}", path.display()), None);
    let mut file = File::open(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len().min(CONFIG_BYTES_MAX);
    let mut bytes = zeroize::Zeroizing::new(vec![0; usize::try_from(length).unwrap_or_default()]);
    // A file that becomes shorter meanwhile has no such block either.
    let _ = file.read_exact(&mut bytes);
    // `BEGIN EC PRIVATE KEY` is a private key too.
    has_block(path, &bytes, "PRIVATE KEY")
}

/// Whether a PEM block begins whose label ends like this.
fn has_block(path: &Path, bytes: &[u8], label: &str) -> Result<(), Wrong> {
    let begins = |line: &[u8]| {
        let named = line.strip_prefix(b"-----BEGIN ").and_then(|line| line.trim_ascii_end().strip_suffix(b"-----"));
        named.is_some_and(|named| named.ends_with(label.as_bytes()))
    };
    let found = bytes.split(|byte| *byte == b'\n').any(begins);
    if found { Ok(()) } else { Err((format!("`{}` has no PEM block `{label}`", path.display()), None)) }
}

/// The text of a PEM file that has at least one block of the kind.
fn pem(path: &Path, label: &str) -> Result<String, Wrong> {
    let bytes = start_of(path)?;
    has_block(path, &bytes, label)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The gateway's own identity must not be a peer's.
fn own_certificate(reader: &mut Reader, path: &Path) -> Result<(), Wrong> {
    let text = pem(path, "CERTIFICATE")?;
    let unreadable = || (format!("`{}` does not hold an X.509 certificate", path.display()), None);
    let (_, block) = x509_parser::pem::parse_x509_pem(text.as_bytes()).map_err(|_| unreadable())?;
    let certificate = block.parse_x509().map_err(|_| unreadable())?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let own = names.iter().flat_map(|names| &names.value.general_names).find_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some(*uri),
        _ => None,
    });
    let Some(own) = own else {
        return Err((format!("certificate `{}` has no SPIFFE ID as URI name", path.display()), None));
    };
    let is_own = |setting: &&super::Setting| setting.key.starts_with("peer[") && setting.key.ends_with(".spiffe") && setting.value == own;
    if let Some(peer) = reader.settings.iter().find(is_own) {
        return Err((
            format!("this certificate is for `{own}`, which is also `{}`", peer.key),
            Some("a gateway is not its own peer".to_owned()),
        ));
    }
    Ok(())
}
