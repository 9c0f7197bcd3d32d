//! Signatures as `minisign` makes them, from keys that tests make up. `src/policy/bundle/trust.rs` has some of the tool itself.

use blake2::{Blake2b512, Digest};
use data_encoding::BASE64;
use ring::digest::{SHA256, digest};
use ring::signature::{Ed25519KeyPair, KeyPair};

pub fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub struct Key {
    id: [u8; 8],
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

impl Key {
    pub fn new(number: u8) -> Self {
        Self { id: [number; 8], seed: [number; 32], pair: Ed25519KeyPair::from_seed_unchecked(&[number; 32]).unwrap() }
    }

    /// This key, under the number of another.
    #[allow(dead_code, reason = "one of the tests that share this pretends to be somebody")]
    pub fn with_id_of(&self, other: &Self) -> Self {
        Self { id: other.id, seed: self.seed, pair: Ed25519KeyPair::from_seed_unchecked(&self.seed).unwrap() }
    }

    /// The second line of `minisign.pub`.
    pub fn public(&self) -> String {
        BASE64.encode(&[b"Ed", self.id.as_slice(), self.pair.public_key().as_ref()].concat())
    }

    pub fn sign(&self, message: &[u8], comment: &str) -> String {
        self.lines(b"ED", &Blake2b512::digest(message), comment)
    }

    #[allow(dead_code, reason = "one of the tests that share this is about old signatures")]
    pub fn sign_legacy(&self, message: &[u8]) -> String {
        self.lines(b"Ed", message, "legacy")
    }

    fn lines(&self, algorithm: &[u8], message: &[u8], comment: &str) -> String {
        let signature = self.pair.sign(message);
        let global = self.pair.sign(&[signature.as_ref(), comment.as_bytes()].concat());
        let line = BASE64.encode(&[algorithm, self.id.as_slice(), signature.as_ref()].concat());
        format!("untrusted comment: signature\n{line}\ntrusted comment: {comment}\n{}\n", BASE64.encode(global.as_ref()))
    }
}
