//! Certificate revocation lists: reading them, keeping one of each issuer, and never going back.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::der;
use super::error::IdentityError;
use super::files;
use super::keys::{OpenFiles, Own, read_bounded};
use super::leaf::{self, hex, sha256, unhex};
use super::strength::{self, BadSignature};
use super::time::{from_seconds, to_seconds};
use crate::limits;

/// A CRL number: up to 20 octets, so it is compared as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CrlNumber(Vec<u8>);

impl CrlNumber {
    fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().skip_while(|byte| *byte == 0).collect())
    }

    fn text(&self) -> String {
        if self.0.is_empty() { "00".to_owned() } else { hex(&self.0) }
    }
}

impl Ord for CrlNumber {
    fn cmp(&self, other: &Self) -> Ordering {
        // No leading zeros: the longer number is the larger.
        self.0.len().cmp(&other.0.len()).then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for CrlNumber {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// How recent a CRL is: its number decides, then its date.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Age {
    number: CrlNumber,
    this_update: SystemTime,
}

/// One usable CRL.
pub(super) struct Crl {
    pub(super) list: webpki::CertRevocationList<'static>,
    pub(super) issuer_der: Vec<u8>,
    pub(super) next_update: SystemTime,
    /// Whether its issuer is known, and has signed it.
    pub(super) verified: bool,
    age: Age,
    sha256: [u8; 32],
    pub(super) path: PathBuf,
}

/// Reads every CRL of a trust domain and keeps the newest of each issuer. webpki takes the first CRL
/// that matches a certificate, so a second one of the same issuer would be chosen by its position.
pub(super) fn load(
    files: &dyn OpenFiles,
    paths: &[PathBuf],
    issuers: &[X509Certificate<'_>],
    now: SystemTime,
) -> Result<Vec<Crl>, IdentityError> {
    let mut newest: BTreeMap<Vec<u8>, Crl> = BTreeMap::new();
    for path in paths {
        for crl in read(files, path, issuers, now)? {
            match newest.get(&crl.issuer_der) {
                Some(kept) if kept.age == crl.age && kept.sha256 != crl.sha256 => {
                    return Err(IdentityError::CrlConflict { path: crl.path, number: crl.age.number.text() });
                }
                Some(kept) if kept.age >= crl.age => {}
                _ => drop(newest.insert(crl.issuer_der.clone(), crl)),
            }
        }
    }
    if newest.len() > limits::CRLS_PER_DOMAIN_MAX {
        return Err(IdentityError::TooMany {
            what: "CRL issuers of a trust domain",
            count: newest.len(),
            limit: limits::CRLS_PER_DOMAIN_MAX,
        });
    }
    Ok(newest.into_values().collect())
}

fn read(files: &dyn OpenFiles, path: &Path, issuers: &[X509Certificate<'_>], now: SystemTime) -> Result<Vec<Crl>, IdentityError> {
    let bytes = read_bounded(files, path, "CRL", limits::CRL_FILE_BYTES_MAX)?;
    let malformed = |expected| IdentityError::Malformed { what: "CRL", path: path.to_owned(), expected };
    let pem = bytes.starts_with(b"-----") || bytes.windows(16).any(|window| window == b"-----BEGIN X509 ");
    let ders: Vec<CertificateRevocationListDer<'static>> = if pem {
        CertificateRevocationListDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(|_| malformed("PEM or DER"))?
    } else {
        vec![CertificateRevocationListDer::from(bytes)]
    };
    if ders.is_empty() || ders.len() > limits::CRLS_PER_DOMAIN_MAX {
        let (what, limit) = ("CRL file", limits::CRLS_PER_DOMAIN_MAX);
        return Err(IdentityError::Count { what, path: path.to_owned(), count: ders.len(), limit });
    }
    let parse_all = || ders.iter().map(|der| parse(der, path, issuers, now)).collect();
    // WHY: parsers of CRLs panicked on hostile input before (RUSTSEC-2026-0104), before any signature
    // was checked; a panic here must leave the last good state in place.
    catch_unwind(AssertUnwindSafe(parse_all)).unwrap_or_else(|_| Err(malformed("a CRL that does not break its parser")))
}

fn parse(der: &[u8], path: &Path, issuers: &[X509Certificate<'_>], now: SystemTime) -> Result<Crl, IdentityError> {
    let malformed = |expected| IdentityError::Malformed { what: "CRL", path: path.to_owned(), expected };
    let list = webpki::OwnedCertRevocationList::from_der(der).map_err(|error| malformed(expected(&error)))?;
    let (_, fields) = CertificateRevocationList::from_der(der).map_err(|_| malformed("a version 2 CRL with a nextUpdate"))?;
    der::check(fields.tbs_cert_list.as_ref()).map_err(|_| malformed(WRITTEN))?;
    fields.tbs_cert_list.extensions_map().map_err(|_| malformed("each extension once"))?;
    let number = fields.crl_number().ok_or_else(|| malformed("a CRL number"))?;
    let age = Age { number: CrlNumber::new(&number.to_bytes_be()), this_update: from_seconds(fields.last_update().timestamp()) };
    let next_update = fields.next_update().ok_or_else(|| malformed("a nextUpdate"))?;
    let list = webpki::CertRevocationList::from(list);
    if list.issuing_distribution_point().is_some() {
        // A partition cannot be "the newest CRL of its issuer", which is all that this module keeps.
        return Err(malformed(PARTITION));
    }
    if age.this_update > now {
        return Err(IdentityError::CrlFromFuture { path: path.to_owned(), this_update: age.this_update, now });
    }
    if !fields.iter_revoked_certificates().all(|entry| leaf::is_shortest(entry.raw_serial())) {
        return Err(malformed("every serial number in its shortest form"));
    }
    let verified = check_signature(&fields, path, issuers)?;
    Ok(Crl {
        list,
        verified,
        issuer_der: fields.issuer().as_raw().to_vec(),
        next_update: from_seconds(next_update.timestamp()),
        age,
        sha256: sha256(der),
        path: path.to_owned(),
    })
}

/// What a CRL would have to be, where it is not.
fn expected(error: &webpki::Error) -> &'static str {
    use webpki::Error as E;
    match error {
        E::UnsupportedDeltaCrl => "a complete CRL, not a delta",
        E::UnsupportedIndirectCrl => "a direct CRL of one issuer",
        E::UnsupportedCrlIssuingDistributionPoint | E::UnsupportedRevocationReasonsPartitioning => PARTITION,
        E::UnsupportedCriticalExtension => "no critical extension but those that are understood here",
        E::UnsupportedRevocationReason => "reasons for revocation of RFC 5280",
        E::UnsupportedCrlVersion => "version 2",
        E::InvalidCrlNumber => "a CRL number of 1 to 20 octets",
        E::InvalidSerialNumber => "serial numbers",
        E::SignatureAlgorithmMismatch => "one signature algorithm, inside and outside",
        E::ExtensionValueInvalid => "each extension once, and as RFC 5280 has it",
        _ => "a version 2 CRL with a nextUpdate and a number",
    }
}

const WRITTEN: &str = "DER, with nothing that says FALSE and no GeneralizedTime before 2050";
const PARTITION: &str = "a CRL of everything its issuer issued, not a partition";

/// A CRL that names an issuer that is known must be signed by it, or a forged one with a high number would displace the real one. Those of
/// others are checked against the chain that a peer presents. Whether it was checked here.
fn check_signature(crl: &CertificateRevocationList<'_>, path: &Path, issuers: &[X509Certificate<'_>]) -> Result<bool, IdentityError> {
    if !strength::is_signed_well(crl) {
        return Err(IdentityError::CrlAlgorithm { path: path.to_owned() });
    }
    let candidates = issuers.iter().filter(|issuer| issuer.subject().as_raw() == crl.issuer().as_raw());
    // The last issuer of this name has the last word, unless one of them signed it.
    let verified = candidates.map(|issuer| strength::check_crl(crl, issuer.public_key())).reduce(Result::or);
    match verified {
        None => Ok(false),
        Some(Ok(())) => Ok(true),
        Some(Err(BadSignature::Algorithm)) => Err(IdentityError::CrlAlgorithm { path: path.to_owned() }),
        Some(Err(BadSignature::Wrong)) => Err(IdentityError::CrlForged { path: path.to_owned() }),
    }
}

/// The newest CRL seen of each issuer in each trust domain, so that an old one is never accepted again, nor another one of the same age.
#[derive(Debug, Clone, Default)]
pub(super) struct Ratchet {
    seen: BTreeMap<(String, Vec<u8>), Seen>,
    /// Where it is remembered across restarts.
    path: Option<PathBuf>,
}

/// How old it is, and its digest, where that was remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    age: Age,
    sha256: Option<[u8; 32]>,
}

/// One line of the ratchet file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    trust_domain: String,
    issuer: String,
    number: String,
    this_update_seconds: i64,
    /// Lines of earlier versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RatchetFile {
    schema: String,
    seen: Vec<Remembered>,
}

const RATCHET_SCHEMA: &str = "sealane.crl-ratchet/1";

impl Ratchet {
    /// Reads what an earlier process remembered; a missing file is the first start.
    pub(super) fn open(path: PathBuf) -> Result<Self, IdentityError> {
        let missing = |error: &IdentityError| matches!(error, IdentityError::File { source, .. } if source.kind() == ErrorKind::NotFound);
        let bytes = match read_bounded(&Own, &path, "CRL ratchet", limits::PEM_FILE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if missing(&error) => return Ok(Self { seen: BTreeMap::new(), path: Some(path) }),
            Err(error) => return Err(error),
        };
        // A file that cannot be read is not the same as none: forgetting is what an attacker would want.
        let malformed = || IdentityError::Malformed { what: "CRL ratchet", path: path.clone(), expected: "`sealane.crl-ratchet/1`" };
        let file: RatchetFile = serde_json::from_slice(&bytes).map_err(|_| malformed())?;
        if file.schema != RATCHET_SCHEMA {
            return Err(malformed());
        }
        let mut seen = BTreeMap::new();
        for line in file.seen {
            let (Some(issuer), Some(number)) = (unhex(&line.issuer), unhex(&line.number)) else { return Err(malformed()) };
            let age = Age { number: CrlNumber::new(&number), this_update: from_seconds(line.this_update_seconds) };
            let sha256 = match line.sha256 {
                None => None,
                Some(text) => Some(unhex(&text).and_then(|bytes| bytes.try_into().ok()).ok_or_else(malformed)?),
            };
            seen.insert((line.trust_domain, issuer), Seen { age, sha256 });
        }
        Ok(Self { seen, path: Some(path) })
    }

    fn save(&self) -> Result<(), IdentityError> {
        let Some(path) = &self.path else { return Ok(()) };
        let line = |((domain, issuer), Seen { age, sha256 }): (&(String, Vec<u8>), &Seen)| Remembered {
            trust_domain: domain.clone(),
            issuer: hex(issuer),
            number: age.number.text(),
            this_update_seconds: to_seconds(age.this_update),
            sha256: sha256.as_ref().map(|digest| hex(digest)),
        };
        let file = RatchetFile { schema: RATCHET_SCHEMA.to_owned(), seen: self.seen.iter().map(line).collect() };
        let bytes = serde_json::to_vec_pretty(&file).map_err(|error| IdentityError::File {
            action: "write",
            what: "CRL ratchet",
            path: path.clone(),
            source: error.into(),
        })?;
        files::write(path, "CRL ratchet", &bytes, files::PRIVATE)
    }

    /// Refuses when a CRL is older than one seen; otherwise remembers all of them, on disk before in memory.
    pub(super) fn advance<'a>(&mut self, crls: impl Iterator<Item = (&'a str, &'a Crl)>) -> Result<(), IdentityError> {
        let mut next = self.clone();
        for (domain, crl) in crls {
            let seen = self.seen.get(&(domain.to_owned(), crl.issuer_der.clone()));
            if let Some(Seen { age, .. }) = seen.filter(|seen| crl.age < seen.age) {
                let (found, expected) = (crl.age.number.text(), age.number.text());
                return Err(IdentityError::CrlRollback { path: crl.path.clone(), found, expected });
            }
            if seen.is_some_and(|seen| crl.age == seen.age && seen.sha256.is_some_and(|digest| digest != crl.sha256)) {
                return Err(IdentityError::CrlConflict { path: crl.path.clone(), number: crl.age.number.text() });
            }
            let seen = Seen { age: crl.age.clone(), sha256: Some(crl.sha256) };
            next.seen.insert((domain.to_owned(), crl.issuer_der.clone()), seen);
        }
        if next.seen != self.seen {
            next.save()?;
        }
        *self = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crl_numbers_compare_as_numbers_of_any_length() {
        let number = CrlNumber::new;
        assert!(number(&[2]) > number(&[1]));
        assert!(number(&[1, 0]) > number(&[255]));
        assert_eq!(number(&[0, 0, 7]), number(&[7]));
        assert!(number(&[]) < number(&[1]));
        assert!(number(&[0x7f; 20]) > number(&[0xff; 19]));
        assert_eq!((number(&[0]).text(), number(&[1, 2]).text()), ("00".to_owned(), "0102".to_owned()));
    }
}
