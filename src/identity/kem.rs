//! ML-KEM-768 (FIPS 203) as the key exchange needs it: the seam behind which its implementation can be another.

use std::fmt;

use ml_kem::kem::{Decapsulate, KeyExport};
use ml_kem::{DecapsulationKey, EncapsulationKey, MlKem768};
use zeroize::Zeroizing;

/// What an encapsulation key has in bytes.
pub(super) const ENCAPSULATION_KEY_BYTES: usize = 1184;
/// What a ciphertext has in bytes.
pub(super) const CIPHERTEXT_BYTES: usize = 1088;

/// A secret that both sides have; gone from memory when it is dropped.
pub(super) type Secret = Zeroizing<[u8; 32]>;

/// A key encapsulation mechanism. Randomness comes from the caller, so that known answers go the way that handshakes go.
pub(super) trait Kem: Send + Sync {
    /// Makes a key pair from 64 random bytes: `d` and `z` of FIPS 203, algorithm 19. The public half comes with it.
    fn key_pair(&self, seed: &Zeroizing<[u8; 64]>) -> (Box<dyn KemKey>, Vec<u8>);

    /// A secret for the holder of `key` and its ciphertext, from 32 random bytes: `m` of FIPS 203, algorithm 20.
    ///
    /// None when the key fails one of the checks of section 7.2: its length, or a coefficient that is not reduced.
    fn encapsulate(&self, key: &[u8], m: &Zeroizing<[u8; 32]>) -> Option<(Vec<u8>, Secret)>;
}

/// The private half of a key pair, for one exchange.
pub(super) trait KemKey: Send + Sync {
    /// The secret inside `ciphertext`; none when that has the wrong length (section 7.3).
    ///
    /// A ciphertext that was changed gives a secret that nobody else has, so that the handshake fails on its next message.
    fn decapsulate(&self, ciphertext: &[u8]) -> Option<Secret>;
}

/// The implementation in use: the crate `ml-kem`.
pub(super) struct RustCrypto;

impl Kem for RustCrypto {
    fn key_pair(&self, seed: &Zeroizing<[u8; 64]>) -> (Box<dyn KemKey>, Vec<u8>) {
        let key = DecapsulationKey::<MlKem768>::from_seed((**seed).into());
        let public = key.encapsulation_key().to_bytes().to_vec();
        (Box::new(RustCryptoKey(key)), public)
    }

    fn encapsulate(&self, key: &[u8], m: &Zeroizing<[u8; 32]>) -> Option<(Vec<u8>, Secret)> {
        let key = EncapsulationKey::<MlKem768>::new(key.try_into().ok()?).ok()?;
        let (ciphertext, mut secret) = key.encapsulate_deterministic(&(**m).into());
        Some((ciphertext.to_vec(), taken(&mut secret.0)))
    }
}

/// A key of the crate `ml-kem`, which overwrites it when it is dropped.
pub(super) struct RustCryptoKey(pub(super) DecapsulationKey<MlKem768>);

impl fmt::Debug for RustCryptoKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RustCryptoKey").finish_non_exhaustive()
    }
}

impl KemKey for RustCryptoKey {
    fn decapsulate(&self, ciphertext: &[u8]) -> Option<Secret> {
        let mut secret = self.0.decapsulate(ciphertext.try_into().ok()?);
        Some(taken(&mut secret.0))
    }
}

/// Takes a secret out of a place that does not overwrite itself.
fn taken(secret: &mut [u8; 32]) -> Secret {
    let taken = Zeroizing::new(*secret);
    zeroize::Zeroize::zeroize(secret);
    taken
}
