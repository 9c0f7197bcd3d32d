//! What a certificate or CRL file says, in lines for people.

use std::fmt;
use std::path::Path;
use std::time::SystemTime;

use rustls::pki_types::pem::{PemObject, SectionKind};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::time::ASN1Time;

use crate::identity::error::IdentityError;
use crate::identity::keys::{Own, read_bounded};
use crate::identity::leaf::{hex, sha256};
use crate::identity::time::{Stamp, from_seconds};
use crate::limits;

/// One object of a file: its kind, and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// `certificate`, `CRL`, `private key (not shown)`, …
    pub kind: &'static str,
    /// Labels and values, in the order to show them.
    pub lines: Vec<(&'static str, String)>,
}

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.kind)?;
        self.lines.iter().try_for_each(|(label, value)| writeln!(f, "  {label:<20}{value}"))
    }
}

/// Describes every object of a PEM file. Private keys are named, never shown.
///
/// # Errors
/// The file cannot be read, or an object in it cannot be parsed.
pub fn show(path: &Path) -> Result<Vec<Described>, IdentityError> {
    let bytes = read_bounded(&Own, path, "file", limits::CRL_FILE_BYTES_MAX)?;
    let malformed = |expected| IdentityError::Malformed { what: "file", path: path.to_owned(), expected };
    let mut all = Vec::new();
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(&bytes) {
        let (kind, der) = section.map_err(|_| malformed("PEM"))?;
        all.push(match kind {
            SectionKind::Certificate => certificate(&der).ok_or_else(|| malformed("an X.509 certificate"))?,
            SectionKind::Crl => crl(&der).ok_or_else(|| malformed("an X.509 CRL"))?,
            SectionKind::PublicKey => Described { kind: "public key", lines: vec![("spki sha256", hex(&sha256(&der)))] },
            SectionKind::PrivateKey | SectionKind::EcPrivateKey | SectionKind::RsaPrivateKey => {
                Described { kind: "private key (not shown)", lines: Vec::new() }
            }
            _ => return Err(malformed("certificates, CRLs or keys in PEM")),
        });
    }
    if all.is_empty() { Err(malformed("certificates, CRLs or keys in PEM")) } else { Ok(all) }
}

fn certificate(der: &[u8]) -> Option<Described> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let mut lines = vec![("subject", printable(&certificate.subject().to_string()))];
    if let Ok(Some(names)) = certificate.subject_alternative_name() {
        lines.extend(names.value.general_names.iter().map(|name| match name {
            GeneralName::URI(uri) => ("uri", printable(uri)),
            other => ("other name", printable(&other.to_string())),
        }));
    }
    let validity = certificate.validity();
    lines.push(("issuer", printable(&certificate.issuer().to_string())));
    lines.push(("serial", hex(certificate.raw_serial())));
    lines.push(("valid from", stamp(validity.not_before)));
    lines.push(("valid until", until(validity.not_after)));
    let authority = matches!(certificate.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca);
    lines.push(("authority", if authority { "yes" } else { "no" }.to_owned()));
    if let Ok(Some(usage)) = certificate.key_usage() {
        lines.push(("key usage", usage.value.to_string()));
    }
    if let Ok(Some(usage)) = certificate.extended_key_usage() {
        let named = [("server auth", usage.value.server_auth), ("client auth", usage.value.client_auth), ("any", usage.value.any)];
        let mut purposes: Vec<_> = named.iter().filter(|(_, set)| *set).map(|(name, _)| (*name).to_owned()).collect();
        purposes.extend(usage.value.other.iter().map(ToString::to_string));
        lines.push(("extended usage", purposes.join(", ")));
    }
    lines.push(("certificate sha256", hex(&sha256(der))));
    lines.push(("spki sha256", hex(&sha256(certificate.public_key().raw))));
    Some(Described { kind: "certificate", lines })
}

fn crl(der: &[u8]) -> Option<Described> {
    let (_, crl) = CertificateRevocationList::from_der(der).ok()?;
    let number = crl.crl_number().map_or_else(|| "none".to_owned(), ToString::to_string);
    let mut lines = vec![
        ("issuer", printable(&crl.issuer().to_string())),
        ("number", number),
        ("issued", stamp(crl.last_update())),
        ("next update", crl.next_update().map_or_else(|| "none".to_owned(), until)),
    ];
    let revoked = |entry: &x509_parser::revocation_list::RevokedCertificate<'_>| {
        ("revoked", format!("{} at {}", hex(entry.raw_serial()), stamp(entry.revocation_date)))
    };
    lines.extend(crl.iter_revoked_certificates().map(revoked));
    Some(Described { kind: "CRL", lines })
}

fn stamp(time: ASN1Time) -> String {
    Stamp(from_seconds(time.timestamp())).to_string()
}

fn until(time: ASN1Time) -> String {
    let end = from_seconds(time.timestamp());
    match end.duration_since(SystemTime::now()) {
        Ok(left) => format!("{} ({} days left)", Stamp(end), left.as_secs() / 86_400),
        Err(_) => format!("{} (expired)", Stamp(end)),
    }
}

/// Text out of a file, fit for a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
