//! The small certificate authority behind `sealane pki`: one root, gateways' certificates, one CRL.
//!
//! *Owns:* a directory with the root, its key, the CRL and the index of what was issued. *Never:* keys
//! in memory longer than one call; a file that others can read where a key is; half-written files.
//!
//! *Invariants:*
//! - `index-first`: a revocation is in the index before it is in a CRL, so no later CRL can lose it.
//! - `numbers-grow`: each CRL has a number larger than all before it, also after a crash.
//!
//! *Read first:* this file; `../files.rs` is how things get to disk, `show.rs` reads any certificate or CRL.

mod show;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ::time::OffsetDateTime;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, RevocationReason, RevokedCertParams, SanType,
    SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde::{Deserialize, Serialize};

use super::error::IdentityError;
use super::files;
use super::keys::{Own, read_bounded, read_private};
use super::leaf::{hex, unhex};
use crate::types::{PeerName, SpiffeId};
use crate::{limits, types};

pub use show::{Described, show};

const CA_CERTIFICATE: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const CRL: &str = "crl.pem";
const INDEX: &str = "issued.json";
const SCHEMA: &str = "sealane.authority/1";

const DAY: Duration = Duration::from_secs(86_400);
const CA_DAYS: u32 = 3650;
const CERTIFICATE_DAYS: u32 = 90;
const CRL_DAYS: u32 = 30;
/// Clocks of a fleet differ: what is issued now is valid a little earlier.
const BACKDATE: Duration = Duration::from_secs(300);

/// Where an authority keeps what a gateway has to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorityFiles {
    /// The root certificate.
    pub certificate: PathBuf,
    /// The root's private key; it stays where the authority is.
    pub key: PathBuf,
    /// The current CRL.
    pub crl: PathBuf,
}

/// The files of one gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayFiles {
    /// Its SPIFFE ID.
    pub spiffe: SpiffeId,
    /// Its certificate.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The Ed25519 key that signs evidence.
    pub signing_key: PathBuf,
    /// The public half of it, for those who verify the evidence.
    pub signing_public_key: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    schema: String,
    trust_domain: String,
    crl_number: u64,
    issued: Vec<Issued>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Issued {
    gateway: String,
    site: String,
    /// Hexadecimal, as certificates and CRLs show it.
    serial: String,
    not_after_seconds: u64,
    revoked_at_seconds: Option<u64>,
}

/// Where the authority in `dir` has its files, whether or not they are there.
#[must_use]
pub fn files_of(dir: &Path) -> AuthorityFiles {
    AuthorityFiles { certificate: dir.join(CA_CERTIFICATE), key: dir.join(CA_KEY), crl: dir.join(CRL) }
}

/// Makes a root, its key and an empty CRL in `dir`, which is created with mode 0700.
///
/// # Errors
/// An authority is there already, the trust domain is invalid, or writing fails.
pub fn init(dir: &Path, trust_domain: &str) -> Result<AuthorityFiles, IdentityError> {
    if !types::is_trust_domain(trust_domain) {
        let domain = trust_domain.chars().take(80).flat_map(char::escape_default).collect();
        return Err(IdentityError::InvalidTrustDomain { domain });
    }
    let _lock = files::create_locked(dir)?;
    for name in [CA_CERTIFICATE, CA_KEY, CRL, INDEX] {
        if dir.join(name).symlink_metadata().is_ok() {
            return Err(IdentityError::Exists { path: dir.join(name) });
        }
    }
    let now = SystemTime::now();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(generate("the root's key"))?;
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(now + DAY * CA_DAYS);
    params.serial_number = Some(random_serial()?);
    // With the serial in its name, a root that replaces this one never shares it: CRLs are found by issuer name.
    let serial = params.serial_number.as_ref().map(|serial| hex(&serial.to_bytes())).unwrap_or_default();
    params.distinguished_name = name_of(&[
        (DnType::OrganizationName, "Sealane"),
        (DnType::CommonName, &format!("{} CA {}", cut(trust_domain, 40), cut(&serial, 8))),
    ]);
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(generate("the root certificate"))?;

    files::write(&dir.join(CA_KEY), "root key", key.serialize_pem().as_bytes(), files::PRIVATE)?;
    files::write(&dir.join(CA_CERTIFICATE), "root certificate", certificate.pem().as_bytes(), files::PUBLIC)?;
    let mut index = Index { schema: SCHEMA.to_owned(), trust_domain: trust_domain.to_owned(), crl_number: 0, issued: Vec::new() };
    write_crl(dir, &mut index, now)?;
    Ok(files_of(dir))
}

/// Issues a certificate for `spiffe://TRUST-DOMAIN/gateway/NAME`, valid for 90 days, with a new key and a new signing key.
///
/// # Errors
/// The name is invalid or holds a certificate that is neither revoked nor expired (see [`renew`]), or writing fails.
pub fn issue(dir: &Path, gateway: &str, site: &str) -> Result<GatewayFiles, IdentityError> {
    check_name("gateway name", gateway)?;
    check_name("site", site)?;
    let _lock = files::lock(dir)?;
    let mut index = read_index(dir)?;
    let now = seconds(SystemTime::now());
    let paths = gateway_files(dir, &index.trust_domain, gateway)?;
    let live = |issued: &&Issued| issued.gateway == gateway && issued.revoked_at_seconds.is_none() && issued.not_after_seconds > now;
    if index.issued.iter().any(|issued| live(&issued)) {
        return Err(IdentityError::Exists { path: paths.certificate });
    }
    write_signing_key(&paths)?;
    write_certificate(dir, &mut index, gateway, site, &paths)?;
    Ok(paths)
}

/// Replaces the certificate and key of a gateway; its name, site and signing key stay. The old
/// certificate stays valid until it expires, so that the gateway can reload at leisure.
///
/// # Errors
/// Nothing unrevoked was issued under this name, or writing fails.
pub fn renew(dir: &Path, gateway: &str) -> Result<GatewayFiles, IdentityError> {
    check_name("gateway name", gateway)?;
    let _lock = files::lock(dir)?;
    let mut index = read_index(dir)?;
    let last = index.issued.iter().rev().find(|issued| issued.gateway == gateway);
    let Some(last) = last.filter(|issued| issued.revoked_at_seconds.is_none()) else {
        return Err(IdentityError::NotIssued { path: dir.to_owned(), gateway: gateway.to_owned() });
    };
    let site = last.site.clone();
    let paths = gateway_files(dir, &index.trust_domain, gateway)?;
    write_certificate(dir, &mut index, gateway, &site, &paths)?;
    Ok(paths)
}

/// Revokes every certificate of a gateway that is not revoked yet and signs a new CRL, whose path is returned.
///
/// # Errors
/// Nothing unrevoked was issued under this name, or writing fails.
pub fn revoke(dir: &Path, gateway: &str) -> Result<PathBuf, IdentityError> {
    let _lock = files::lock(dir)?;
    let mut index = read_index(dir)?;
    let now = SystemTime::now();
    let mut found = false;
    for issued in index.issued.iter_mut().filter(|issued| issued.gateway == gateway && issued.revoked_at_seconds.is_none()) {
        issued.revoked_at_seconds = Some(seconds(now));
        found = true;
    }
    if !found {
        let gateway = gateway.chars().take(80).flat_map(char::escape_default).collect();
        return Err(IdentityError::NotIssued { path: dir.to_owned(), gateway });
    }
    write_crl(dir, &mut index, now)
}

/// Signs a new CRL with the same revocations and a later nextUpdate; its path is returned.
///
/// # Errors
/// The directory holds no authority, or writing fails.
pub fn refresh_crl(dir: &Path) -> Result<PathBuf, IdentityError> {
    let _lock = files::lock(dir)?;
    let mut index = read_index(dir)?;
    write_crl(dir, &mut index, SystemTime::now())
}

fn write_certificate(dir: &Path, index: &mut Index, gateway: &str, site: &str, paths: &GatewayFiles) -> Result<(), IdentityError> {
    let issuer = read_issuer(dir)?;
    let now = SystemTime::now();
    let not_after = now + DAY * CERTIFICATE_DAYS;
    let serial = random_serial()?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(generate("a gateway's key"))?;
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(not_after);
    params.serial_number = Some(serial.clone());
    params.distinguished_name = name_of(&[(DnType::OrganizationalUnitName, site), (DnType::CommonName, gateway)]);
    params.subject_alt_names = vec![uri(paths.spiffe.as_str())?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).map_err(generate("a gateway's certificate"))?;

    // Indexed before it exists: a certificate that nobody remembers could not be revoked.
    index.issued.push(Issued {
        gateway: gateway.to_owned(),
        site: site.to_owned(),
        serial: hex(&serial.to_bytes()),
        not_after_seconds: seconds(not_after),
        revoked_at_seconds: None,
    });
    write_index(dir, index)?;
    files::write(&paths.key, "private key", key.serialize_pem().as_bytes(), files::PRIVATE)?;
    files::write(&paths.certificate, "certificate", certificate.pem().as_bytes(), files::PUBLIC)
}

fn write_signing_key(paths: &GatewayFiles) -> Result<(), IdentityError> {
    // PKCS#8 version 1 of RFC 8410: the version 2 that ring generates is not read by every OpenSSL.
    let mut der = vec![0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    let mut seed = [0; 32];
    SystemRandom::new().fill(&mut seed).map_err(|_| IdentityError::Random)?;
    der.extend_from_slice(&seed);
    let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(der), &PKCS_ED25519).map_err(generate("a signing key"))?;
    files::write(&paths.signing_key, "signing key", key.serialize_pem().as_bytes(), files::PRIVATE)?;
    files::write(&paths.signing_public_key, "public signing key", key.public_key_pem().as_bytes(), files::PUBLIC)
}

fn write_crl(dir: &Path, index: &mut Index, now: SystemTime) -> Result<PathBuf, IdentityError> {
    let issuer = read_issuer(dir)?;
    index.crl_number = index.crl_number.checked_add(1).ok_or(IdentityError::Malformed {
        what: "index",
        path: dir.join(INDEX),
        expected: "a CRL number that can grow",
    })?;
    write_index(dir, index)?;
    let malformed = || IdentityError::Malformed { what: "index", path: dir.join(INDEX), expected: "serial numbers and times" };
    let mut revoked_certs = Vec::new();
    for issued in &index.issued {
        let Some(revoked_at) = issued.revoked_at_seconds else { continue };
        let at = i64::try_from(revoked_at).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok()).ok_or_else(malformed)?;
        revoked_certs.push(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&unhex(&issued.serial).ok_or_else(malformed)?),
            revocation_time: at,
            reason_code: Some(RevocationReason::CessationOfOperation),
            invalidity_date: None,
        });
    }
    let params = CertificateRevocationListParams {
        this_update: OffsetDateTime::from(now - BACKDATE),
        next_update: OffsetDateTime::from(now + DAY * CRL_DAYS),
        crl_number: SerialNumber::from_slice(&index.crl_number.to_be_bytes()),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let pem = params.signed_by(&issuer).and_then(|crl| crl.pem()).map_err(generate("a CRL"))?;
    let path = dir.join(CRL);
    files::write(&path, "CRL", pem.as_bytes(), files::PUBLIC)?;
    Ok(path)
}

fn read_issuer(dir: &Path) -> Result<Issuer<'static, KeyPair>, IdentityError> {
    let text = |bytes: Vec<u8>, what, path: &Path| {
        String::from_utf8(bytes).map_err(|_| IdentityError::Malformed { what, path: path.to_owned(), expected: "PEM" })
    };
    let (key_path, certificate_path) = (dir.join(CA_KEY), dir.join(CA_CERTIFICATE));
    let key = text(read_private(&key_path, "root key")?, "root key", &key_path)?;
    let key = KeyPair::from_pem(&key).map_err(|_| IdentityError::Malformed { what: "root key", path: key_path, expected: "PEM" })?;
    let bytes = read_bounded(&Own, &certificate_path, "root certificate", limits::PEM_FILE_BYTES_MAX)?;
    let certificate = text(bytes, "root certificate", &certificate_path)?;
    Issuer::from_ca_cert_pem(&certificate, key).map_err(|_| IdentityError::Malformed {
        what: "root certificate",
        path: certificate_path,
        expected: "one certificate in PEM",
    })
}

fn read_index(dir: &Path) -> Result<Index, IdentityError> {
    let path = dir.join(INDEX);
    let bytes = read_bounded(&Own, &path, "index", limits::CRL_FILE_BYTES_MAX)?;
    match serde_json::from_slice::<Index>(&bytes) {
        Ok(index) if index.schema == SCHEMA && types::is_trust_domain(&index.trust_domain) => Ok(index),
        _ => Err(IdentityError::Malformed { what: "index", path, expected: "the index of an authority, `sealane.authority/1`" }),
    }
}

fn write_index(dir: &Path, index: &Index) -> Result<(), IdentityError> {
    let path = dir.join(INDEX);
    let mut bytes = serde_json::to_vec_pretty(index).map_err(|error| IdentityError::File {
        action: "write",
        what: "index",
        path: path.clone(),
        source: error.into(),
    })?;
    bytes.push(b'\n');
    files::write(&path, "index", &bytes, files::PRIVATE)
}

fn gateway_files(dir: &Path, trust_domain: &str, gateway: &str) -> Result<GatewayFiles, IdentityError> {
    let spiffe = format!("spiffe://{trust_domain}/gateway/{gateway}");
    let spiffe = spiffe.parse().map_err(|_| invalid_name("gateway name", gateway))?;
    let file = |suffix: &str| dir.join(format!("{gateway}{suffix}"));
    Ok(GatewayFiles {
        spiffe,
        certificate: file("-cert.pem"),
        key: file("-key.pem"),
        signing_key: file("-signing-key.pem"),
        signing_public_key: file("-signing-pub.pem"),
    })
}

/// Names become file names: `ca` and `x-signing` would be other files of this directory.
fn check_name(what: &'static str, name: &str) -> Result<(), IdentityError> {
    let reserved = name == "ca" || name.ends_with("-signing");
    if reserved || name.parse::<PeerName>().is_err() { Err(invalid_name(what, name)) } else { Ok(()) }
}

fn invalid_name(what: &'static str, name: &str) -> IdentityError {
    let value = name.chars().take(80).flat_map(char::escape_default).collect();
    let expected = "1–63 letters, digits, `.`, `_` or `-`, starting with a letter, digit or `_`, not `ca` and not ending in `-signing`";
    IdentityError::InvalidName { what, value, expected }
}

fn name_of(entries: &[(DnType, &str)]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in entries {
        name.push(kind.clone(), *value);
    }
    name
}

/// At most `length` characters, for name attributes that have an upper bound of 64.
fn cut(text: &str, length: usize) -> String {
    text.chars().take(length).collect()
}

fn uri(text: &str) -> Result<SanType, IdentityError> {
    Ok(SanType::URI(text.try_into().map_err(generate("a SPIFFE URI"))?))
}

fn random_serial() -> Result<SerialNumber, IdentityError> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| IdentityError::Random)?;
    // Positive and without a leading zero octet, so that every tool shows the same digits.
    if let Some(first) = bytes.first_mut() {
        *first = (*first & 0x7f) | 0x40;
    }
    Ok(SerialNumber::from_slice(&bytes))
}

fn generate(what: &'static str) -> impl Fn(rcgen::Error) -> IdentityError {
    move |source| IdentityError::Generate { what, source }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
