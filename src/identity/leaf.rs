//! The rules for a leaf: an X.509-SVID with exactly one SPIFFE URI, and nothing of an authority.
//!
//! `INVARIANT(raw-names)`: URI names are counted on the raw GeneralNames, unparseable ones included;
//! webpki's own iterator silently drops those.

use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use std::time::SystemTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::{OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_SUBJECT_ALT_NAME};
use x509_parser::prelude::FromDer;

use super::der;
use super::error::RefusalReason;
use super::strength;
use super::time::from_seconds;
use crate::types::{PeerName, SpiffeId};

/// GeneralName tag of a URI (RFC 5280, 4.2.1.6).
const URI_TAG: u32 = 6;

/// A leaf that keeps the rules; whether anyone we trust issued it is not known yet.
pub(super) struct Leaf {
    pub(super) spiffe: SpiffeId,
    pub(super) site: Option<String>,
    pub(super) serial: String,
    pub(super) serial_der: Vec<u8>,
    pub(super) issuer_der: Vec<u8>,
    pub(super) leaf_sha256: [u8; 32],
    pub(super) spki_sha256: [u8; 32],
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

/// Reads a leaf and applies every rule that needs no trust.
pub(super) fn read(der: &CertificateDer<'_>) -> Result<Leaf, RefusalReason> {
    let certificate = parse(der)?;
    check_presented(&certificate).map_err(malformed)?;
    let spiffe = spiffe_id(&certificate)?;
    check_basic_constraints(&certificate)?;
    check_key_usage(&certificate)?;
    check_extended_key_usage(&certificate)?;
    if let Some(detail) = strength::unfit(certificate.public_key()) {
        return Err(RefusalReason::UnfitKey { detail });
    }
    let validity = certificate.validity();
    Ok(Leaf {
        spiffe,
        site: site(&certificate),
        serial: hex(certificate.raw_serial()),
        serial_der: certificate.raw_serial().to_vec(),
        issuer_der: certificate.issuer().as_raw().to_vec(),
        leaf_sha256: sha256(der),
        spki_sha256: sha256(certificate.public_key().raw),
        not_before: from_seconds(validity.not_before.timestamp()),
        not_after: from_seconds(validity.not_after.timestamp()),
    })
}

/// The first URI that a certificate presents, as a claim for the audit log: nothing about it is verified.
pub(super) fn claimed_uri(der: &CertificateDer<'_>) -> Option<String> {
    let certificate = parse(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some(printable(uri)),
        _ => None,
    })
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, RefusalReason> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(malformed("trailing data")),
        Err(_) => Err(malformed("not an X.509 certificate")),
    }
}

/// The key of a certificate (SubjectPublicKeyInfo).
pub(super) fn public_key(der: &CertificateDer<'_>) -> Result<Vec<u8>, RefusalReason> {
    Ok(parse(der)?.public_key().raw.to_vec())
}

/// Whether a certificate that is presented behind the leaf is one at all.
pub(super) fn check_issuer(der: &CertificateDer<'_>) -> Result<(), RefusalReason> {
    match X509Certificate::from_der(der) {
        Ok(([], issuer)) => {
            check_presented(&issuer).map_err(|_| malformed("what is presented behind it is not written as RFC 5280 and DER want it"))
        }
        _ => Err(malformed("what is presented behind it is no X.509 certificate")),
    }
}

/// What RFC 5280 wants of the form of every certificate, and neither library looks at.
pub(super) fn check_form(certificate: &X509Certificate<'_>) -> Result<(), &'static str> {
    // Section 4.2: "A certificate MUST NOT include more than one instance of a particular extension."
    certificate.extensions_map().map_err(|_| "an extension is there twice")?;
    // Section 4.1.2.2. A number with two encodings could be revoked by the one and presented by the other.
    let serial = certificate.raw_serial();
    let positive = serial.iter().any(|byte| *byte != 0) && serial.first().is_some_and(|byte| byte & 0x80 == 0);
    // Some authorities do not count the byte that is there for the sign.
    let bytes = serial.strip_prefix(&[0]).unwrap_or(serial).len();
    if positive && is_shortest(serial) && bytes <= SERIAL_BYTES_MAX { Ok(()) } else { Err("serialNumber") }
}

/// The same, and how it is written: for certificates that peers present.
fn check_presented(certificate: &X509Certificate<'_>) -> Result<(), &'static str> {
    check_form(certificate)?;
    der::check(certificate.tbs_certificate.as_ref())?;
    // X.690 sections 11.5 and 11.2.2: no `cA` that is FALSE, and a list of named bits ends with one that is set.
    for extension in certificate.extensions() {
        let value = extension.value;
        if extension.oid == OID_X509_EXT_BASIC_CONSTRAINTS && der::split(value).is_some_and(|(limits, _)| limits.starts_with(der::FALSE)) {
            return Err("basicConstraints: FALSE is written out");
        }
        if let [_, _, unused, .., last] = value
            && extension.oid == OID_X509_EXT_KEY_USAGE
            && last.checked_shr(u32::from(*unused)).is_none_or(|bits| bits & 1 == 0)
        {
            return Err("keyUsage");
        }
    }
    Ok(())
}

/// RFC 5280, section 4.1.2.2.
const SERIAL_BYTES_MAX: usize = 20;

/// Whether an INTEGER has no byte too many, as DER wants it.
pub(super) fn is_shortest(integer: &[u8]) -> bool {
    match integer {
        [] => false,
        [0x00, next, ..] => next & 0x80 != 0,
        [0xff, next, ..] => next & 0x80 == 0,
        _ => true,
    }
}

fn malformed(detail: &'static str) -> RefusalReason {
    RefusalReason::MalformedCertificate { detail }
}

/// Whether the list of names, and each of them, says its length in as few bytes as DER does.
fn has_short_lengths(names: &[u8]) -> bool {
    let Some((mut names, [])) = der::split(names) else { return false };
    while let Some((_, rest)) = der::split(names) {
        names = rest;
    }
    names.is_empty()
}

fn spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, RefusalReason> {
    let names = certificate.subject_alternative_name().map_err(|_| malformed("subjectAltName"))?;
    let names = &names.ok_or(RefusalReason::NoSubjectAltName)?.value.general_names;
    let encoded = certificate.extensions().iter().find(|extension| extension.oid == OID_X509_EXT_SUBJECT_ALT_NAME);
    if !encoded.is_some_and(|extension| has_short_lengths(extension.value)) {
        return Err(malformed("subjectAltName"));
    }
    if names.iter().any(|name| matches!(name, GeneralName::Invalid(tag, _) if tag.0 != URI_TAG)) {
        return Err(malformed("subjectAltName"));
    }
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(Ok(*uri)),
        GeneralName::Invalid(tag, bytes) if tag.0 == URI_TAG => Some(Err(*bytes)),
        _ => None,
    });
    let first = uris.next().ok_or(RefusalReason::NoUriName { names: names.len() })?;
    match uris.count() {
        0 => {}
        more => return Err(RefusalReason::SeveralUriNames { count: more + 1 }),
    }
    match first {
        Ok(uri) => uri.parse().map_err(|_| RefusalReason::InvalidSpiffeId { uri: printable(uri) }),
        Err(bytes) => Err(RefusalReason::InvalidSpiffeId { uri: printable(&String::from_utf8_lossy(bytes)) }),
    }
}

fn check_basic_constraints(certificate: &X509Certificate<'_>) -> Result<(), RefusalReason> {
    let constraints = certificate.basic_constraints().map_err(|_| malformed("basicConstraints"))?;
    // Sections 4.2.1.9 and 4.2.1.10: limits on what is issued, where nothing may be.
    let names = certificate.name_constraints().map_err(|_| malformed("nameConstraints"))?;
    match constraints {
        Some(constraints) if constraints.value.ca => Err(RefusalReason::CaCertificate),
        Some(constraints) if constraints.value.path_len_constraint.is_some() => Err(malformed("basicConstraints")),
        _ if names.is_some() => Err(malformed("nameConstraints of a leaf")),
        _ => Ok(()),
    }
}

fn check_key_usage(certificate: &X509Certificate<'_>) -> Result<(), RefusalReason> {
    let usage = certificate.key_usage().map_err(|_| malformed("keyUsage"))?.ok_or(RefusalReason::NoKeyUsage)?;
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(RefusalReason::KeyUsageOfAuthority);
    }
    if !usage.value.digital_signature() {
        return Err(RefusalReason::NoDigitalSignature);
    }
    if usage.critical { Ok(()) } else { Err(RefusalReason::KeyUsageNotCritical) }
}

fn check_extended_key_usage(certificate: &X509Certificate<'_>) -> Result<(), RefusalReason> {
    let usage = certificate.extended_key_usage().map_err(|_| malformed("extendedKeyUsage"))?;
    let usage = usage.ok_or(RefusalReason::NoExtendedKeyUsage)?.value;
    if !usage.server_auth {
        return Err(RefusalReason::NoServerAuth);
    }
    if usage.client_auth { Ok(()) } else { Err(RefusalReason::NoClientAuth) }
}

fn site(certificate: &X509Certificate<'_>) -> Option<String> {
    let mut units = certificate.subject().iter_organizational_unit();
    let unit = units.next().filter(|_| units.next().is_none())?.as_str().ok()?;
    // A site obeys the rule for names; anything else is an OU of somebody who means something else.
    unit.parse::<PeerName>().ok().map(|name| name.as_str().to_owned())
}

/// Text from a peer, fit for one line of a log.
fn printable(text: &str) -> String {
    text.chars().take(256).flat_map(char::escape_default).collect()
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(digest(&SHA256, bytes).as_ref()) {
        *to = *from;
    }
    out
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks_exact(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
