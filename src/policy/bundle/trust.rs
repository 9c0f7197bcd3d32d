//! Whose signatures count: keys that are pinned where the gateway is installed, and how many of them it takes.

use std::collections::BTreeSet;
use std::fmt;

use data_encoding::BASE64;
use minisign_verify::{PublicKey, Signature};
use ring::digest::{SHA256, digest};

use super::error::{BundleError, BundleFault as Fault};
use super::manifest::check_name;
use crate::limits;

/// The number that `minisign` knows a key by. It is chosen by whoever made the key and proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyId([u8; 8]);

impl fmt::Display for KeyId {
    /// As `minisign` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", u64::from_le_bytes(self.0))
    }
}

/// Who has to have signed a bundle, and what it is called.
#[derive(Debug, Clone)]
pub struct BundleTrust {
    name: String,
    keys: Vec<Pinned>,
    threshold: usize,
    digest: [u8; 32],
}

#[derive(Debug, Clone)]
struct Pinned {
    id: KeyId,
    key: PublicKey,
}

/// A good signature of a pinned key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleSigner {
    /// The file that it is in.
    pub file: String,
    /// Whose it is.
    pub key: KeyId,
    /// What was said with it, and signed.
    pub trusted_comment: String,
}

impl BundleTrust {
    /// Pins public keys, each as the second line of a `minisign.pub` has it.
    ///
    /// # Errors
    /// A key that is none or is there twice, a threshold that no bundle could reach or any could, or a name that is none.
    pub fn new(name: &str, keys: &[String], threshold: usize) -> Result<Self, String> {
        check_name(name)?;
        if !(1..=limits::BUNDLE_KEYS_MAX).contains(&keys.len()) {
            return Err(format!("{} keys, expected 1 to {}", keys.len(), limits::BUNDLE_KEYS_MAX));
        }
        if !(1..=keys.len()).contains(&threshold) {
            return Err(format!("a threshold of {threshold}, expected 1 to {}: so many keys there are", keys.len()));
        }
        let mut seen = BTreeSet::new();
        let mut pinned = Vec::new();
        for text in keys {
            let (id, raw) = key_bytes(text)?;
            let key = PublicKey::from_base64(text).map_err(|error| format!("key `{}`: {error}", text.escape_debug()))?;
            // One key under two ids would count twice, and two keys with one id could not be told apart.
            if !seen.insert(raw.to_vec()) || pinned.iter().any(|known: &Pinned| known.id == id) {
                return Err(format!("key `{id}` is pinned twice"));
            }
            pinned.push(Pinned { id, key });
        }
        let mut bytes = format!("sealane policy trust v1\0{name}\0{threshold}\0").into_bytes();
        bytes.extend(seen.into_iter().flatten());
        let mut own = [0; 32];
        own.copy_from_slice(digest(&SHA256, &bytes).as_ref());
        Ok(Self { name: name.to_owned(), keys: pinned, threshold, digest: own })
    }

    /// What a bundle has to be called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many of the keys have to have signed.
    #[must_use]
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The keys by their ids.
    pub fn keys(&self) -> impl Iterator<Item = KeyId> {
        self.keys.iter().map(|pinned| pinned.id)
    }

    /// SHA-256 over name, threshold and keys. Versions count for as long as it stays the same.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// INVARIANT(k-of-n): at least `threshold` different pinned keys have signed these bytes. A signature by another key counts for
    /// nothing. One that cannot be read, or is not what it says, is no accident: it refuses the bundle.
    pub(super) fn verify(&self, manifest: &[u8], signatures: &[(String, Vec<u8>)]) -> Result<Vec<BundleSigner>, BundleError> {
        if signatures.is_empty() {
            return Err(BundleError::new(Fault::Unsigned, "it has no signature, expected `manifest.json.NAME.minisig` files"));
        }
        let mut signers: Vec<BundleSigner> = Vec::new();
        let mut others = Vec::new();
        for (file, bytes) in signatures {
            let (id, signature) = read_signature(file, bytes)?;
            let Some(pinned) = self.keys.iter().find(|pinned| pinned.id == id) else {
                others.push(format!("`{file}` is by key `{id}`, which is not pinned"));
                continue;
            };
            pinned.key.verify(manifest, &signature, false).map_err(|error| match error {
                minisign_verify::Error::UnexpectedAlgorithm => {
                    BundleError::new(Fault::SignatureLegacy, format!("`{file}` is a legacy signature: sign without `-l`"))
                }
                _ => {
                    let what = format!("`{file}` says it is by key `{id}`, and does not fit the manifest or its trusted comment");
                    BundleError::new(Fault::SignatureWrong, what)
                }
            })?;
            if signers.iter().any(|signer| signer.key == id) {
                others.push(format!("`{file}` is by key `{id}` too"));
                continue;
            }
            signers.push(BundleSigner { file: file.clone(), key: id, trusted_comment: signature.trusted_comment().to_owned() });
        }
        if signers.len() < self.threshold {
            let mut what = format!("{} of {} pinned keys have signed, expected {}", signers.len(), self.keys.len(), self.threshold);
            for other in others {
                what.push_str("; ");
                what.push_str(&other);
            }
            return Err(BundleError::new(Fault::TooFewSignatures, what));
        }
        Ok(signers)
    }
}

/// Key id and Ed25519 key of a public key's text.
fn key_bytes(text: &str) -> Result<(KeyId, [u8; 32]), String> {
    let refused = || format!("`{}` is no minisign public key, expected the second line of `minisign.pub`", text.escape_debug());
    let bytes = BASE64.decode(text.as_bytes()).map_err(|_| refused())?;
    let (id, key) = match bytes.strip_prefix(b"Ed").and_then(|rest| rest.split_first_chunk::<8>()) {
        Some((id, key)) => (KeyId(*id), key),
        None => return Err(refused()),
    };
    Ok((id, key.try_into().map_err(|_| refused())?))
}

/// The four lines of a signature file, and nothing else.
fn read_signature(file: &str, bytes: &[u8]) -> Result<(KeyId, Signature), BundleError> {
    let malformed = |what: &str| BundleError::new(Fault::SignatureMalformed, format!("`{file}` is no minisign signature: {what}"));
    let text = str::from_utf8(bytes).map_err(|_| malformed("it is not text"))?;
    let lines: Vec<&str> = text.lines().collect();
    let [untrusted, signature, trusted, global] = lines.as_slice() else {
        return Err(malformed(&format!("expected 4 lines, got {}", lines.len())));
    };
    if !untrusted.starts_with("untrusted comment: ") || !trusted.starts_with("trusted comment: ") {
        return Err(malformed("expected an untrusted and a trusted comment"));
    }
    let raw = BASE64.decode(signature.as_bytes()).map_err(|_| malformed("its second line is not base64"))?;
    BASE64.decode(global.as_bytes()).map_err(|_| malformed("its fourth line is not base64"))?;
    let id = raw.get(2..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(|| malformed("its second line is too short"))?;
    let decoded = Signature::decode(text).map_err(|error| malformed(&error.to_string()))?;
    Ok((KeyId(*id), decoded))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by minisign 0.11 over [`MESSAGE`], the third one with `-l`.
    const MESSAGE: &[u8] = b"what is signed\n";
    const ALICE: &str = "RWQkYQj0KbQNJaERRh04fykt1T0PKBJMvMYU3LMB5cpxSdcTKABmfVui";
    const BOB: &str = "RWTXAQ84Ex0xZZJyQ2LARazPqBA4BrjzOYRl8z5PrWG3vpAB42I+bUbt";
    const BY_ALICE: &str = "untrusted comment: signature from minisign secret key\n\
        RUQkYQj0KbQNJQxOLtnrvHc4Lhch889ENrhyC3SjYSpx2s98fem1O2iRrD3q4R6OCvdwrI/fFQtuslsi2rHPRU7scb/jlDwZHwc=\n\
        trusted comment: from alice\n\
        5HP6bL7O3n4X68Ozrmus+3w0FFOtp8yZ37EsREAdA7JAe93qLHdCbw14IfYycLWx0jy/Pg0NacPQWm0bFVQwDQ==\n";
    const BY_BOB: &str = "untrusted comment: signature from minisign secret key\n\
        RUTXAQ84Ex0xZTbVGgKy0tef83KUZ/UH/BMCbrqVozd3CYL8yJdvoY9srqsz1SjmFJviqKmxzLvgomuszZZp2T6YBt1KcRHouAA=\n\
        trusted comment: timestamp:1795800357\tfile:msg\thashed\n\
        QjVSlP++BXnkZ7p7zMRYmwN9Ul+m45NZZwR1pQd1o6ZDqFiN9T7Q5BItdIuAIBb2FnKG755KDglElBqNZb+OBw==\n";
    const LEGACY_BY_ALICE: &str = "untrusted comment: signature from minisign secret key\n\
        RWQkYQj0KbQNJR8MYdKQq3ab5Ldeyj5H/lOSyB/T+KJqDo5ZskEsmxpT/CSGpmVgRkObhIToTQWMwYDtkaf+ccfeLBJNbfGTzAY=\n\
        trusted comment: old\n\
        GAMpS343knJUyxpKchWmfyqXVM/KY+g6L+4Au5DZY3opJRMZNzGSoa7vgTlZTY8pI5uneRB9qOjE7es6CgNtBw==\n";

    fn trust(keys: &[&str], threshold: usize) -> Result<BundleTrust, String> {
        BundleTrust::new("fleet", &keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>(), threshold)
    }

    fn verify(threshold: usize, signatures: &[&str]) -> Result<Vec<String>, Fault> {
        let files: Vec<_> = (0..).zip(signatures).map(|(n, text)| (format!("{n}.minisig"), text.as_bytes().to_vec())).collect();
        let signers = trust(&[ALICE, BOB], threshold).unwrap().verify(MESSAGE, &files);
        signers.map(|signers| signers.into_iter().map(|signer| signer.trusted_comment).collect()).map_err(|error| error.fault)
    }

    #[test]
    fn signatures_of_the_stock_tool_count_and_each_key_once() {
        assert_eq!(verify(1, &[BY_ALICE]), Ok(vec!["from alice".to_owned()]));
        assert_eq!(verify(2, &[BY_ALICE, BY_BOB]).map(|signers| signers.len()), Ok(2));
        assert_eq!(verify(2, &[BY_ALICE]), Err(Fault::TooFewSignatures));
        assert_eq!(verify(2, &[BY_ALICE, BY_ALICE]), Err(Fault::TooFewSignatures));
        assert_eq!(verify(1, &[]), Err(Fault::Unsigned));
        assert_eq!(verify(1, &[LEGACY_BY_ALICE]), Err(Fault::SignatureLegacy));
        assert_eq!(trust(&[ALICE, BOB], 2).unwrap().keys().next().map(|key| key.to_string()), Some("250DB429F4086124".to_owned()));
    }

    #[test]
    fn a_change_of_any_byte_of_a_signature_is_seen() {
        let comment = BY_ALICE.find('\n').unwrap();
        for place in comment..BY_ALICE.len() {
            for flip in [1, 4, 0x80] {
                let mut bytes = BY_ALICE.as_bytes().to_vec();
                bytes[place] ^= flip;
                let files = [("a".to_owned(), bytes), ("b".to_owned(), BY_BOB.as_bytes().to_vec())];
                let signers = trust(&[ALICE, BOB], 2).unwrap().verify(MESSAGE, &files);
                assert!(signers.is_err(), "byte {place} with {flip:#x} flipped");
            }
        }
    }

    #[test]
    fn keys_that_could_count_twice_and_thresholds_that_mean_nothing_are_refused() {
        let swapped = ALICE.replacen("RWQk", "RWQl", 1);
        for (keys, threshold, words) in [
            (vec![ALICE, BOB], 0, "threshold"),
            (vec![ALICE, BOB], 3, "threshold"),
            (vec![], 1, "0 keys"),
            (vec![ALICE, ALICE], 1, "twice"),
            // The same key under another id.
            (vec![ALICE, &swapped], 2, "twice"),
            (vec!["RWQ"], 1, "no minisign public key"),
            (vec![&ALICE[4..]], 1, "no minisign public key"),
            (vec![&BY_ALICE[54..90]], 1, "no minisign public key"),
        ] {
            let refused = trust(&keys, threshold).unwrap_err();
            assert!(refused.contains(words), "{keys:?}: {refused}");
        }
        assert!(BundleTrust::new("../x", &[ALICE.to_owned()], 1).is_err());
        assert_ne!(trust(&[ALICE, BOB], 1).unwrap().digest(), trust(&[ALICE, BOB], 2).unwrap().digest());
        assert_eq!(trust(&[ALICE, BOB], 1).unwrap().digest(), trust(&[BOB, ALICE], 1).unwrap().digest());
    }
}
