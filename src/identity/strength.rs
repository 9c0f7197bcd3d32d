//! Which keys and signatures are good enough. The TLS library verifies with a list of algorithms, and nothing outside of it counts:
//! no SHA-1, no RSA below 2048 bits, no curve but P-256, P-384 and Ed25519.

use rustls::crypto::WebPkiSupportedAlgorithms;
use x509_parser::der_parser::asn1_rs::{Any, Tag};
use x509_parser::public_key::PublicKey;
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

/// RSA keys: at least what the list of algorithms verifies with, and at most what it does not choke on.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Why signatures of this key are not believed; nothing for a good key.
pub(super) fn unfit(key: &SubjectPublicKeyInfo<'_>) -> Option<&'static str> {
    let bits = &key.subject_public_key;
    if bits.unused_bits != 0 {
        return Some("its key is no whole number of bytes");
    }
    let bytes = bits.data.as_ref();
    let encoded = contents(&key.algorithm);
    let is = |algorithm: rustls::pki_types::AlgorithmIdentifier| encoded.as_deref() == Some(algorithm.as_ref());
    if is(rustls::pki_types::alg_id::RSA_ENCRYPTION) {
        return match key.parsed() {
            Ok(PublicKey::RSA(rsa)) if RSA_BITS.contains(&rsa_bits(rsa.modulus)) => None,
            Ok(PublicKey::RSA(_)) => Some("its RSA key has not 2048 to 8192 bits"),
            _ => Some("its RSA key is none"),
        };
    }
    let point = |length: usize| bytes.len() == length && bytes.first() == Some(&4);
    let good = (is(rustls::pki_types::alg_id::ECDSA_P256) && point(65))
        || (is(rustls::pki_types::alg_id::ECDSA_P384) && point(97))
        || (is(rustls::pki_types::alg_id::ED25519) && bytes.len() == 32);
    if good { None } else { Some("its key is not P-256, P-384, Ed25519 or RSA with 2048 bits or more") }
}

fn rsa_bits(modulus: &[u8]) -> usize {
    let mut digits = modulus.iter().skip_while(|byte| **byte == 0);
    let Some(first) = digits.next() else { return 0 };
    let rest = digits.count().saturating_mul(8);
    usize::try_from(u8::BITS - first.leading_zeros()).map_or(0, |bits| bits.saturating_add(rest))
}

/// What is wrong with a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadSignature {
    /// By this algorithm nothing is believed, or not with this key.
    Algorithm,
    /// The key did not make it.
    Wrong,
}

/// The algorithms that count.
pub(super) fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}

/// Whether a CRL is signed by an algorithm that counts, whoever did it.
pub(super) fn is_signed_well(crl: &CertificateRevocationList<'_>) -> bool {
    let signed = contents(&crl.signature_algorithm);
    crl.tbs_cert_list.signature == crl.signature_algorithm
        && crl.signature_value.unused_bits == 0
        && algorithms().all.iter().any(|algorithm| signed.as_deref() == Some(algorithm.signature_alg_id().as_ref()))
}

/// Whether `key` signed a CRL.
pub(super) fn check_crl(crl: &CertificateRevocationList<'_>, key: &SubjectPublicKeyInfo<'_>) -> Result<(), BadSignature> {
    if !is_signed_well(crl) {
        return Err(BadSignature::Algorithm);
    }
    let (signed, of_key) = (contents(&crl.signature_algorithm), contents(&key.algorithm));
    let fits = |algorithm: &&&dyn rustls::pki_types::SignatureVerificationAlgorithm| {
        signed.as_deref() == Some(algorithm.signature_alg_id().as_ref())
            && of_key.as_deref() == Some(algorithm.public_key_alg_id().as_ref())
    };
    let all = algorithms();
    let algorithm = all.all.iter().find(fits).ok_or(BadSignature::Algorithm)?;
    let (key, signature) = (&key.subject_public_key.data, &crl.signature_value.data);
    algorithm.verify_signature(key, crl.tbs_cert_list.as_ref(), signature).map_err(|_| BadSignature::Wrong)
}

/// The contents of an AlgorithmIdentifier as the list has them; nothing for parameters that no algorithm there has.
pub(super) fn contents(algorithm: &AlgorithmIdentifier<'_>) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut put = |tag: u8, value: &[u8]| {
        out.extend([tag, u8::try_from(value.len()).ok().filter(|length| *length < 128)?]);
        out.extend_from_slice(value);
        Some(())
    };
    put(6, algorithm.algorithm.as_bytes())?;
    match &algorithm.parameters {
        None => {}
        Some(parameters) => put(tag_of(parameters)?, parameters.data)?,
    }
    Some(out)
}

fn tag_of(parameters: &Any<'_>) -> Option<u8> {
    match parameters.header.tag() {
        Tag::Null => Some(5),
        Tag::Oid => Some(6),
        // Of RSA-PSS.
        Tag::Sequence => Some(0x30),
        _ => None,
    }
}
