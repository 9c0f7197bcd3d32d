//! Signed heads as text: C2SP signed-note, tlog-checkpoint and tlog-cosignature.
//!
//! ```text
//! spiffe://dc1.example.net/gateway/gw-a
//! 42
//! jx3…=
//!
//! — spiffe://dc1.example.net/gateway/gw-a 4Bk…==
//! — spiffe://dc2.example.net/gateway/gw-b pQ0…==
//! ```
//!
//! origin, size, base64 of the root; an empty line; then signatures: em dash, the key's name, base64 of a key id and what the key
//! signed. The log's own covers everything before the empty line, its newline included; a cosignature (a witness's) also covers
//! the time at which it was made.

use ring::{digest, signature};

use crate::audit::tree::{Hash, Head};
use crate::limits;

/// Signs heads. The key stays with whoever implements this.
pub trait Signer: Send + Sync {
    /// The Ed25519 signature over `bytes`.
    ///
    /// # Errors
    /// Whoever has the key did not sign; the text says why.
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String>;
    /// The key that verifies it.
    fn public_key(&self) -> [u8; 32];
    /// The key's name, for what it signs as a witness: no spaces, no `+`.
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

/// What a signature line is by, from the byte that its key id is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    /// Ed25519 over the note.
    Log = 1,
    /// Ed25519 over time and note.
    Cosignature = 4,
}

/// Whether `origin` can stand in a checkpoint.
pub(super) fn is_origin(origin: &str) -> bool {
    (1..=limits::AUDIT_ORIGIN_BYTES_MAX).contains(&origin.len()) && origin.chars().all(|c| !c.is_control() && !c.is_whitespace())
}

fn is_key_name(name: &str) -> bool {
    is_origin(name) && !name.contains('+')
}

/// Signs a head. The log's key has the name of the log.
pub(super) fn sign(signer: &dyn Signer, origin: &str, head: Head) -> Result<Checkpoint, String> {
    if !is_key_name(origin) {
        return Err(format!("key name `{}` has spaces or `+`, or is too long", origin.escape_debug()));
    }
    let body = format!("{origin}\n{}\n{}\n", head.size, base64(&head.root));
    let line = signature_line(Kind::Log, origin, &signer.public_key(), &signer.sign(body.as_bytes())?);
    Ok(Checkpoint { origin: origin.to_owned(), size: head.size, root: head.root, text: format!("{body}\n{line}") })
}

/// The signature line with which `signer` says that at `seconds` since the epoch the log was this and had only grown.
pub(super) fn cosign(signer: &dyn Signer, checkpoint: &Checkpoint, seconds: u64) -> Result<String, String> {
    let name = signer.name();
    if !is_key_name(name) {
        return Err(format!("key name `{}` has spaces or `+`, or is too long", name.escape_debug()));
    }
    let note = Note::parse(&checkpoint.text)?;
    let mut signed = seconds.to_be_bytes().to_vec();
    signed.extend_from_slice(&signer.sign(cosigned_text(seconds, note.body).as_bytes())?);
    Ok(signature_line(Kind::Cosignature, name, &signer.public_key(), &signed))
}

/// Whether a log's key signs this: a head of the log `origin`, or as a witness one of the logs `witnessed`.
#[must_use]
pub fn is_signed_by_logs(message: &[u8], origin: &str, witnessed: &[String]) -> bool {
    let Ok(text) = std::str::from_utf8(message) else { return false };
    let cosigned = text.strip_prefix("cosignature/v1\ntime ").and_then(|rest| rest.split_once('\n'));
    let (seconds, body) = cosigned.map_or((None, text), |(seconds, body)| (Some(seconds), body));
    let Ok((of, _)) = (Note { body, signatures: Vec::new() }).head() else { return false };
    match seconds {
        None => of == origin,
        Some(seconds) => {
            let canonical = seconds.parse::<u64>().is_ok_and(|number| cosigned_text(number, body) == text);
            canonical && of != origin && witnessed.iter().any(|known| known == of)
        }
    }
}

fn signature_line(kind: Kind, name: &str, public_key: &[u8; 32], signature: &[u8]) -> String {
    let mut blob = key_id(kind, name, public_key).to_vec();
    blob.extend_from_slice(signature);
    format!("— {name} {}\n", base64(&blob))
}

fn cosigned_text(seconds: u64, body: &str) -> String {
    format!("cosignature/v1\ntime {seconds}\n{body}")
}

/// A note as it is written; nothing about it is believed yet.
struct Note<'a> {
    /// What is signed, with its last newline.
    body: &'a str,
    /// Name, key id and signature of each line.
    signatures: Vec<(&'a str, [u8; 4], Vec<u8>)>,
}

impl<'a> Note<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        if text.len() > limits::AUDIT_CHECKPOINT_BYTES_MAX {
            return Err(format!("has {} bytes, expected at most {}", text.len(), limits::AUDIT_CHECKPOINT_BYTES_MAX));
        }
        if text.chars().any(|c| c < ' ' && c != '\n') {
            return Err("is no signed note: it has a control character".to_owned());
        }
        let (body, signed) = text.rsplit_once("\n\n").ok_or("is no signed note: expected text, an empty line, signatures")?;
        let body = text.get(..=body.len()).unwrap_or_default();
        let lines = signed.strip_suffix('\n').ok_or("is no signed note: its last line has no end")?;
        let malformed = |line: &str| format!("is no signed note: `{}` is no signature line", line.escape_debug());
        let signature = |line: &'a str| {
            let (name, blob) = line.strip_prefix("— ")?.split_once(' ').filter(|(name, _)| is_key_name(name))?;
            let blob = unbase64(blob)?;
            let (id, signature) = blob.split_first_chunk::<4>()?;
            Some((name, *id, signature.to_vec()))
        };
        let signatures = lines.split('\n').map(|line| signature(line).ok_or_else(|| malformed(line))).collect::<Result<Vec<_>, _>>()?;
        if signatures.len() > limits::AUDIT_SIGNATURES_MAX {
            return Err(format!("has {} signatures, expected at most {}", signatures.len(), limits::AUDIT_SIGNATURES_MAX));
        }
        Ok(Self { body, signatures })
    }

    /// Origin and head of a checkpoint.
    fn head(&self) -> Result<(&'a str, Head), String> {
        let mut lines = self.body.split('\n');
        let (Some(origin), Some(size), Some(root), Some(""), None) = (lines.next(), lines.next(), lines.next(), lines.next(), lines.next())
        else {
            return Err("is no checkpoint: expected a line each of origin, size and root, and no other".to_owned());
        };
        if !is_origin(origin) {
            return Err("is no checkpoint: its origin is empty, too long or has spaces".to_owned());
        }
        let number = size.parse::<u64>().ok().filter(|number| number.to_string() == size);
        let size = number.ok_or_else(|| format!("is no checkpoint: `{}` is no size", size.escape_debug()))?;
        let root: Hash = unbase64(root)
            .and_then(|root| root.try_into().ok())
            .ok_or_else(|| format!("is no checkpoint: `{}` is not the base64 of a SHA-256", root.escape_debug()))?;
        if size == 0 && root != Head::EMPTY.root {
            return Err("is no checkpoint: the root of a log without entries is SHA-256 of nothing".to_owned());
        }
        Ok((origin, Head { size, root }))
    }

    /// What the key signed as `kind`, and under which name; the first line that names it.
    fn signature_of(&self, kind: Kind, public_key: &[u8; 32]) -> Option<(&str, &[u8])> {
        let by = |(name, id, _): &&(&str, [u8; 4], Vec<u8>)| *id == key_id(kind, name, public_key);
        self.signatures.iter().find(by).map(|(name, _, signature)| (*name, signature.as_slice()))
    }
}

/// Reads a checkpoint without believing it.
pub(super) fn read(text: &str) -> Result<Checkpoint, String> {
    let (origin, head) = Note::parse(text)?.head()?;
    Ok(Checkpoint { origin: origin.to_owned(), size: head.size, root: head.root, text: text.to_owned() })
}

/// Reads a checkpoint and checks its log's signature with `public_key`. Signatures of others are no concern.
pub(super) fn open(text: &str, public_key: &[u8; 32]) -> Result<Checkpoint, String> {
    open_counting(text, public_key).map(|(checkpoint, _)| checkpoint)
}

/// As [`open`], for a checkpoint as a log writes it itself: with its own signature and no other.
pub(super) fn open_bare(text: &str, public_key: &[u8; 32]) -> Result<Checkpoint, String> {
    match open_counting(text, public_key)? {
        (checkpoint, 1) => Ok(checkpoint),
        (_, count) => Err(format!("has {count} signatures, expected the log's own")),
    }
}

/// The checkpoint, and how many signatures it has.
fn open_counting(text: &str, public_key: &[u8; 32]) -> Result<(Checkpoint, usize), String> {
    let note = Note::parse(text)?;
    let (origin, head) = note.head()?;
    let (name, signed) = note.signature_of(Kind::Log, public_key).ok_or_else(|| {
        let names: Vec<&str> = note.signatures.iter().map(|(name, ..)| *name).collect();
        format!("is signed by another key than expected, under the name `{}`", names.join("`, `"))
    })?;
    if !verifies(public_key, note.body.as_bytes(), signed) {
        return Err("has a bad signature".to_owned());
    }
    // The name is not signed, so anybody can write another one. A log's key has the name of the log.
    if name != origin {
        return Err(format!("is signed under the name `{name}`, and is of log `{origin}`"));
    }
    let checkpoint = Checkpoint { origin: origin.to_owned(), size: head.size, root: head.root, text: text.to_owned() };
    Ok((checkpoint, note.signatures.len()))
}

/// When the owner of `public_key` cosigned the checkpoint, in seconds since the epoch; nothing if it did not.
pub(super) fn cosigned_at(text: &str, public_key: &[u8; 32]) -> Result<Option<u64>, String> {
    let note = Note::parse(text)?;
    let Some((_, blob)) = note.signature_of(Kind::Cosignature, public_key) else { return Ok(None) };
    let (seconds, signature) = blob.split_first_chunk::<8>().ok_or("has a cosignature that is too short")?;
    let seconds = u64::from_be_bytes(*seconds);
    // The format's own limit.
    if i64::try_from(seconds).is_err() || !verifies(public_key, cosigned_text(seconds, note.body).as_bytes(), signature) {
        return Err("has a bad cosignature".to_owned());
    }
    Ok(Some(seconds))
}

fn verifies(public_key: &[u8; 32], message: &[u8], signed: &[u8]) -> bool {
    signature::UnparsedPublicKey::new(&signature::ED25519, public_key).verify(message, signed).is_ok()
}

/// The id of a key (C2SP signed-note).
fn key_id(kind: Kind, name: &str, public_key: &[u8; 32]) -> [u8; 4] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(name.as_bytes());
    context.update(&[b'\n', kind as u8]);
    context.update(public_key);
    let mut out = [0; 4];
    for (out, byte) in out.iter_mut().zip(context.finish().as_ref()) {
        *out = *byte;
    }
    out
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Standard base64 with padding (RFC 4648 section 4).
pub(super) fn base64(bytes: &[u8]) -> String {
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
pub(super) fn unbase64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let data = text.trim_end_matches('=');
    for chunk in data.as_bytes().chunks(4) {
        let mut group = 0_u32;
        for (index, byte) in chunk.iter().enumerate() {
            let sextet = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            group |= u32::from(sextet) << (18 - 6 * index);
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
