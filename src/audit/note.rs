//! A signed head as text, in the shape of a C2SP signed note:
//!
//! ```text
//! sealane/dc1.example.net/gw-a
//! 42
//! jx3…=
//!
//! — spiffe://dc1.example.net/gateway/gw-a 4Bk…==
//! ```
//!
//! origin, size, base64 of the root; an empty line; em dash, the key's name, base64 of four bytes of key hash and the
//! Ed25519 signature over everything before the empty line, its newline included.

use ring::{digest, signature};

use crate::audit::chain::Head;
use crate::limits;

/// Signs heads. The key stays with whoever implements this.
pub trait Signer: Send + Sync {
    /// The Ed25519 signature over `bytes`.
    fn sign(&self, bytes: &[u8]) -> [u8; 64];
    /// The key that verifies it.
    fn public_key(&self) -> [u8; 32];
    /// The key's name, for checkpoints: no spaces, no `+`.
    fn name(&self) -> &str;
}

/// A head of a log, signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which log.
    pub origin: String,
    /// Entries covered.
    pub size: u64,
    /// Stands for their contents and order.
    pub root: [u8; 32],
    /// The signed text, as sent to peers.
    pub text: String,
}

impl Checkpoint {
    pub(super) fn head(&self) -> Head {
        Head { size: self.size, root: self.root }
    }
}

/// Whether `origin` can stand in a checkpoint.
pub(super) fn is_origin(origin: &str) -> bool {
    (1..=limits::AUDIT_ORIGIN_BYTES_MAX).contains(&origin.len()) && origin.chars().all(|c| !c.is_control() && !c.is_whitespace())
}

fn is_key_name(name: &str) -> bool {
    is_origin(name) && !name.contains('+')
}

/// Signs a head.
pub(super) fn sign(signer: &dyn Signer, origin: &str, head: Head) -> Result<Checkpoint, String> {
    let name = signer.name();
    if !is_key_name(name) {
        return Err(format!("key name `{}` has spaces or `+`, or is too long", name.escape_debug()));
    }
    let body = format!("{origin}\n{}\n{}\n", head.size, base64(&head.root));
    let mut blob = key_hash(name, &signer.public_key()).to_vec();
    blob.extend_from_slice(&signer.sign(body.as_bytes()));
    let text = format!("{body}\n— {name} {}\n", base64(&blob));
    Ok(Checkpoint { origin: origin.to_owned(), size: head.size, root: head.root, text })
}

/// Reads a signed head and checks its signature with `public_key`.
pub(super) fn open(text: &str, public_key: &[u8; 32]) -> Result<Checkpoint, String> {
    if text.len() > limits::AUDIT_CHECKPOINT_BYTES_MAX {
        return Err(format!("has {} bytes, expected at most {}", text.len(), limits::AUDIT_CHECKPOINT_BYTES_MAX));
    }
    let malformed = || "is not a signed head: origin, size, root, empty line, one signature".to_owned();
    let (body_text, signed) = text.split_once("\n\n").ok_or_else(malformed)?;
    let body = text.get(..body_text.len().saturating_add(1)).ok_or_else(malformed)?;
    let mut lines = body_text.split('\n');
    let (Some(origin), Some(size_text), Some(root), None) = (lines.next(), lines.next(), lines.next(), lines.next()) else {
        return Err(malformed());
    };
    let size: u64 = size_text.parse().map_err(|_| malformed())?;
    let root: [u8; 32] = unbase64(root).and_then(|root| root.try_into().ok()).ok_or_else(malformed)?;
    if !is_origin(origin) || size.to_string() != size_text {
        return Err(malformed());
    }
    let line = signed.strip_prefix("— ").and_then(|line| line.strip_suffix('\n')).ok_or_else(malformed)?;
    let (name, blob) = line.split_once(' ').filter(|(name, _)| is_key_name(name)).ok_or_else(malformed)?;
    let blob = unbase64(blob).ok_or_else(malformed)?;
    let (hash, signature) = blob.split_first_chunk::<4>().ok_or_else(malformed)?;
    if *hash != key_hash(name, public_key) {
        return Err(format!("is signed by another key than expected, under the name `{name}`"));
    }
    signature::UnparsedPublicKey::new(&signature::ED25519, public_key)
        .verify(body.as_bytes(), signature)
        .map_err(|_| "has a bad signature".to_owned())?;
    Ok(Checkpoint { origin: origin.to_owned(), size, root, text: text.to_owned() })
}

/// The key id of a C2SP Ed25519 note signature.
fn key_hash(name: &str, public_key: &[u8; 32]) -> [u8; 4] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(name.as_bytes());
    context.update(b"\n\x01");
    context.update(public_key);
    let mut out = [0; 4];
    for (out, byte) in out.iter_mut().zip(context.finish().as_ref()) {
        *out = *byte;
    }
    out
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Standard base64 with padding (RFC 4648 section 4).
fn base64(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().enumerate().fold(0_u32, |group, (index, byte)| group | (u32::from(*byte) << (16 - 8 * index)));
        for index in 0..4 {
            let sextet = usize::try_from((group >> (18 - 6 * index)) & 63).unwrap_or(0);
            out.push(if index <= chunk.len() { char::from(ALPHABET[sextet]) } else { '=' });
        }
    }
    out
}

/// Only what [`base64`] would have written: no stray bits, no missing padding.
fn unbase64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let data = text.trim_end_matches('=');
    for chunk in data.as_bytes().chunks(4) {
        let mut group = 0_u32;
        for (index, byte) in chunk.iter().enumerate() {
            let sextet = ALPHABET.iter().position(|letter| letter == byte)?;
            group |= u32::try_from(sextet).ok()? << (18 - 6 * index);
        }
        let bytes = group.to_be_bytes();
        out.extend_from_slice(bytes.get(1..chunk.len())?);
    }
    (base64(&out) == text).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_standard_one_and_strict() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")] {
            assert_eq!(base64(plain.as_bytes()), coded);
            assert_eq!(unbase64(coded).unwrap(), plain.as_bytes());
        }
        for bad in ["Z", "Zg", "Zg=", "Zh==", "Zg===", "Zm9v=", "Zm 9v", "Zm9v\n", "====", "=Zg="] {
            assert_eq!(unbase64(bad), None, "{bad:?}");
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unbase64(&base64(&all)).unwrap(), all);
    }
}
