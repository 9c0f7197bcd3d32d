//! Whom we trust now: roots and CRLs of each trust domain, and the verification of a chain against them.
//!
//! `INVARIANT(own-roots)`: the roots are chosen by the trust domain in the presented name *before* path
//! validation, so no trust domain can issue an identity of another.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::TrustDomainConfig;
use super::crl::{self, Crl};
use super::error::{IdentityError, RefusalReason};
use super::keys::{OpenFiles, read_bounded};
use super::leaf::{self, Leaf};
use super::peer::PeerIdentity;
use super::strength;
use super::time::{from_seconds, from_unix, to_unix};
use crate::{limits, types};

/// DER contents of the OID 1.3.6.1.5.5.7.3.1.
const EKU_SERVER_AUTH: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 1];
/// DER contents of the OID 1.3.6.1.5.5.7.3.2.
const EKU_CLIENT_AUTH: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 2];

/// DER contents of the OIDs of what is heeded in a root: keyUsage, basicConstraints, nameConstraints.
const HEEDED: [&[u8]; 3] = [&[0x55, 0x1d, 15], &[0x55, 0x1d, 19], &[0x55, 0x1d, 30]];

/// Which end of a handshake the verified peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It called us.
    Client,
    /// We called it.
    Server,
}

struct Root {
    anchor: TrustAnchor<'static>,
    not_before: SystemTime,
    not_after: SystemTime,
}

struct TrustDomain {
    roots: Vec<Root>,
    crls: Vec<Crl>,
}

/// Roots and CRLs of every trust domain, as of one load.
pub(super) struct TrustState {
    domains: BTreeMap<String, TrustDomain>,
}

impl TrustState {
    /// Reads everything; one wrong file refuses the whole. Issuers of our own chain are known in the trust domain that it is of.
    pub(super) fn load(
        files: &dyn OpenFiles,
        configs: &[TrustDomainConfig],
        (own_domain, own_issuers): (&str, &[CertificateDer<'_>]),
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        if configs.is_empty() {
            return Err(IdentityError::NoTrustDomain);
        }
        if configs.len() > limits::TRUST_DOMAINS_MAX {
            return Err(IdentityError::TooMany { what: "trust domains", count: configs.len(), limit: limits::TRUST_DOMAINS_MAX });
        }
        let mut domains = BTreeMap::new();
        for config in configs {
            if !types::is_trust_domain(&config.domain) {
                let domain = config.domain.chars().take(80).flat_map(char::escape_default).collect();
                return Err(IdentityError::InvalidTrustDomain { domain });
            }
            let own_issuers = if config.domain == own_domain { own_issuers } else { &[] };
            if domains.insert(config.domain.clone(), load_domain(files, config, own_issuers, now)?).is_some() {
                return Err(IdentityError::DuplicateTrustDomain { domain: config.domain.clone() });
            }
        }
        Ok(Self { domains })
    }

    /// Every CRL with the domain that it belongs to.
    pub(super) fn crls(&self) -> impl Iterator<Item = (&str, &Crl)> {
        self.domains.iter().flat_map(|(name, domain)| domain.crls.iter().map(|crl| (name.as_str(), crl)))
    }

    /// Files of CRLs whose issuers nobody knows here: a peer's chain will say who they are.
    pub(super) fn unverified_crls(&self) -> impl Iterator<Item = &Path> {
        self.crls().filter(|(_, crl)| !crl.verified).map(|(_, crl)| crl.path.as_path())
    }

    /// When the first CRL expires.
    pub(super) fn next_crl_expiry(&self) -> Option<SystemTime> {
        self.crls().map(|(_, crl)| crl.next_update).min()
    }

    /// Verifies a chain, leaf first: names, leaf rules, path to a root of the presented trust domain,
    /// dates and revocation of every certificate on the path.
    pub(super) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        algorithms: &WebPkiSupportedAlgorithms,
        now: SystemTime,
    ) -> Result<PeerIdentity, RefusalReason> {
        let (end_entity, intermediates) = chain.split_first().ok_or(RefusalReason::NoCertificate)?;
        if chain.len() > limits::CHAIN_CERTIFICATES_MAX {
            return Err(RefusalReason::ChainTooLong { count: chain.len(), limit: limits::CHAIN_CERTIFICATES_MAX });
        }
        let leaf = leaf::read(end_entity)?;
        // Also those that path validation has no need of.
        intermediates.iter().try_for_each(leaf::check_issuer)?;
        if (1..chain.len()).any(|at| chain.iter().take(at).any(|before| Some(before) == chain.get(at))) {
            return Err(RefusalReason::MalformedCertificate { detail: "its chain has a certificate twice" });
        }
        let name = leaf.spiffe.trust_domain().to_owned();
        let Some(domain) = self.domains.get(&name) else {
            return Err(RefusalReason::UnknownTrustDomain { domain: name });
        };
        domain.verify_path(&name, &leaf, end_entity, intermediates, algorithms, now)?;
        Ok(PeerIdentity {
            spiffe: leaf.spiffe,
            site: leaf.site,
            serial: leaf.serial,
            leaf_sha256: leaf.leaf_sha256,
            spki_sha256: leaf.spki_sha256,
            not_before: leaf.not_before,
            not_after: leaf.not_after,
        })
    }
}

impl TrustDomain {
    fn verify_path(
        &self,
        name: &str,
        leaf: &Leaf,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        algorithms: &WebPkiSupportedAlgorithms,
        now: SystemTime,
    ) -> Result<(), RefusalReason> {
        // webpki does not look at the dates of trust anchors.
        let anchors: Vec<_> =
            self.roots.iter().filter(|root| root.not_before <= now && now <= root.not_after).map(|root| root.anchor.clone()).collect();
        if anchors.is_empty() {
            return Err(RefusalReason::RootsExpired { domain: name.to_owned() });
        }
        let lists: Vec<_> = self.crls.iter().map(|crl| &crl.list).collect();
        let revocation = webpki::RevocationOptionsBuilder::new(&lists)
            .map_err(|_| RefusalReason::CrlMissing { domain: name.to_owned() })?
            .with_depth(webpki::RevocationCheckDepth::Chain)
            .with_status_policy(webpki::UnknownStatusPolicy::Deny)
            .with_expiration_policy(webpki::ExpirationPolicy::Enforce)
            .build();
        webpki::EndEntityCert::try_from(end_entity)
            .and_then(|certificate| {
                let time = to_unix(now);
                certificate
                    .verify_for_usage(algorithms.all, &anchors, intermediates, time, BothEnds, Some(revocation), Some(&issuers_may_issue))
                    .map(drop)
            })
            .map_err(|error| self.reason(name, leaf, now, error))
            .map_err(|reason| match reason {
                RefusalReason::BadSignature | RefusalReason::Unsupported { .. } => of_a_weak_issuer(leaf, intermediates).unwrap_or(reason),
                _ => reason,
            })
    }

    /// Translates webpki's verdict, telling the leaf from its issuers.
    fn reason(&self, name: &str, leaf: &Leaf, now: SystemTime, error: webpki::Error) -> RefusalReason {
        use webpki::Error as E;
        let domain = name.to_owned();
        match error {
            E::CertExpired { .. } | E::BadDerTime if now > leaf.not_after => RefusalReason::Expired { not_after: leaf.not_after },
            E::CertExpired { not_after, .. } => RefusalReason::IssuerExpired { not_after: from_unix(not_after) },
            E::CertNotValidYet { .. } if now < leaf.not_before => RefusalReason::NotYetValid { not_before: leaf.not_before },
            E::CertNotValidYet { not_before, .. } => RefusalReason::IssuerNotYetValid { not_before: from_unix(not_before) },
            E::InvalidCertValidity => RefusalReason::InvalidValidity,
            E::CertRevoked if self.revokes(leaf) => RefusalReason::Revoked { serial: leaf.serial.clone() },
            E::CertRevoked => RefusalReason::IssuerRevoked,
            E::UnknownRevocationStatus => RefusalReason::CrlMissing { domain },
            E::CrlExpired { next_update, .. } => RefusalReason::CrlExpired { domain, next_update: from_unix(next_update) },
            E::InvalidCrlSignatureForPublicKey
            | E::UnsupportedCrlSignatureAlgorithmContext(_)
            | E::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => RefusalReason::CrlBadSignature { domain },
            E::IssuerNotCrlSigner => RefusalReason::CrlIssuerUnfit { domain },
            E::UnknownIssuer => RefusalReason::UnknownIssuer { domain },
            E::InvalidSignatureForPublicKey | E::SignatureAlgorithmMismatch => RefusalReason::BadSignature,
            E::CaUsedAsEndEntity => RefusalReason::CaCertificate,
            E::EndEntityUsedAsCa => RefusalReason::IssuerNotAuthority,
            E::PathLenConstraintViolated => RefusalReason::PathLengthExceeded,
            E::NameConstraintViolation | E::MalformedNameConstraint | E::InvalidNetworkMaskConstraint => RefusalReason::NameConstraint,
            E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => RefusalReason::IssuerPurpose,
            E::MaximumPathDepthExceeded
            | E::MaximumPathBuildCallsExceeded
            | E::MaximumSignatureChecksExceeded
            | E::MaximumNameConstraintComparisonsExceeded => RefusalReason::TooComplex,
            E::UnsupportedCriticalExtension => RefusalReason::Unsupported { detail: "a critical extension" },
            E::UnsupportedCertVersion => RefusalReason::Unsupported { detail: "the certificate version" },
            E::UnsupportedSignatureAlgorithmContext(_) | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
                RefusalReason::Unsupported { detail: "a signature algorithm" }
            }
            E::BadDer | E::BadDerTime | E::TrailingData(_) | E::MalformedExtensions | E::ExtensionValueInvalid => {
                RefusalReason::MalformedCertificate { detail: "DER" }
            }
            other => RefusalReason::Path { detail: other.to_string() },
        }
    }

    fn revokes(&self, leaf: &Leaf) -> bool {
        let of_issuer = self.crls.iter().filter(|crl| crl.issuer_der == leaf.issuer_der);
        of_issuer.into_iter().any(|crl| matches!(crl.list.find_serial(&leaf.serial_der), Ok(Some(_))))
    }
}

/// Path validation says of a key that it does not take only that nothing fits: whether an issuer of the leaf, by their names, has one.
fn of_a_weak_issuer(leaf: &Leaf, intermediates: &[CertificateDer<'_>]) -> Option<RefusalReason> {
    let issuers: Vec<_> = intermediates.iter().filter_map(|der| Some(X509Certificate::from_der(der).ok()?.1)).collect();
    let mut name = leaf.issuer_der.as_slice();
    for _ in 0..issuers.len() {
        let issuer = issuers.iter().find(|issuer| issuer.subject().as_raw() == name)?;
        if let Some(detail) = strength::unfit(issuer.public_key()) {
            return Some(RefusalReason::UnfitKey { detail });
        }
        name = issuer.issuer().as_raw();
    }
    None
}

/// webpki looks at an issuer's BasicConstraints only; one whose KeyUsage lacks keyCertSign may not issue.
fn issuers_may_issue(path: &webpki::VerifiedPath<'_>) -> Result<(), webpki::Error> {
    for issuer in path.intermediate_certificates() {
        let der = issuer.der();
        let (_, issuer) = X509Certificate::from_der(&der).map_err(|_| webpki::Error::BadDer)?;
        leaf::check_form(&issuer).map_err(|_| webpki::Error::MalformedExtensions)?;
        let usage = issuer.key_usage().map_err(|_| webpki::Error::MalformedExtensions)?;
        if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
            return Err(webpki::Error::EndEntityUsedAsCa);
        }
    }
    Ok(())
}

/// What the ExtendedKeyUsage of an issuer must allow, where it has one: what gateways need of their certificates, which is both ends of
/// connections, whichever end is verified now. Issuers rarely have the extension (SPIRE's have none); the leaf's was read before.
struct BothEnds;

impl webpki::ExtendedKeyUsageValidator for BothEnds {
    fn validate(&self, purposes: webpki::KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let purposes = purposes.collect::<Result<Vec<_>, _>>()?;
        let allows = |oid| purposes.contains(&webpki::KeyPurposeId::new(oid));
        let all = purposes.is_empty() || (allows(EKU_SERVER_AUTH) && allows(EKU_CLIENT_AUTH));
        if all { Ok(()) } else { Err(webpki::Error::EmptyEkuExtension) }
    }
}

fn load_domain(
    files: &dyn OpenFiles,
    config: &TrustDomainConfig,
    own_issuers: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<TrustDomain, IdentityError> {
    if config.crls.is_empty() {
        // An empty list would silently switch revocation off in webpki's world; here it is an error.
        return Err(IdentityError::CrlRequired { domain: config.domain.clone() });
    }
    if config.crls.len() > limits::CRLS_PER_DOMAIN_MAX {
        let (what, limit) = ("CRL files of a trust domain", limits::CRLS_PER_DOMAIN_MAX);
        return Err(IdentityError::TooMany { what, count: config.crls.len(), limit });
    }
    let path = &config.roots;
    let ders = read_certificates(files, path, "root certificates", limits::ROOTS_PER_DOMAIN_MAX)?;
    let malformed = || IdentityError::Malformed { what: "root certificates", path: path.clone(), expected: "X.509 certificates in PEM" };
    let certificates: Vec<_> = ders.iter().map(|der| whole(der)).collect::<Option<_>>().ok_or_else(malformed)?;
    let mut roots = Vec::with_capacity(ders.len());
    for (der, certificate) in ders.iter().zip(&certificates) {
        let is_ca = matches!(certificate.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca);
        let may_issue = match certificate.key_usage() {
            Ok(usage) => usage.is_none_or(|usage| usage.value.key_cert_sign()),
            Err(_) => false,
        };
        let subject = || certificate.subject().to_string().chars().take(80).flat_map(char::escape_default).collect();
        if !is_ca || !may_issue {
            return Err(IdentityError::RootNotAuthority { path: path.clone(), subject: subject() });
        }
        if let Some(why) = strength::unfit(certificate.public_key()) {
            return Err(IdentityError::RootUnfit { path: path.clone(), subject: subject(), why });
        }
        if certificate.extensions().iter().any(|extension| extension.critical && !HEEDED.contains(&extension.oid.as_bytes())) {
            let why = "it has a critical extension that is not heeded here";
            return Err(IdentityError::RootUnfit { path: path.clone(), subject: subject(), why });
        }
        roots.push(Root {
            anchor: webpki::anchor_from_trusted_cert(der).map_err(|_| malformed())?.to_owned(),
            not_before: from_seconds(certificate.validity().not_before.timestamp()),
            not_after: from_seconds(certificate.validity().not_after.timestamp()),
        });
    }
    let below = config.intermediates.as_deref();
    let ders = below.map(|path| read_certificates(files, path, "intermediates", limits::ROOTS_PER_DOMAIN_MAX));
    let ders = ders.transpose()?.unwrap_or_default();
    let malformed = || IdentityError::Malformed {
        what: "intermediates",
        path: below.unwrap_or(&config.roots).to_owned(),
        expected: "X.509 certificates in PEM",
    };
    let mut issuers = certificates;
    for der in &ders {
        issuers.push(whole(der).ok_or_else(malformed)?);
    }
    // Ours are wrong where peers say so.
    issuers.extend(own_issuers.iter().filter_map(|der| whole(der)));
    let crls = crl::load(files, &config.crls, &issuers, now)?;
    Ok(TrustDomain { roots, crls })
}

/// A certificate that is well formed, with nothing behind it.
fn whole(der: &[u8]) -> Option<X509Certificate<'_>> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    (rest.is_empty() && leaf::check_form(&certificate).is_ok()).then_some(certificate)
}

/// Reads 1 to `limit` certificates in PEM.
pub(super) fn read_certificates(
    files: &dyn OpenFiles,
    path: &std::path::Path,
    what: &'static str,
    limit: usize,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read_bounded(files, path, what, limits::PEM_FILE_BYTES_MAX)?;
    let ders: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|_| IdentityError::Malformed {
        what,
        path: path.to_owned(),
        expected: "X.509 certificates in PEM",
    })?;
    if ders.is_empty() || ders.len() > limit {
        return Err(IdentityError::Count { what, path: path.to_owned(), count: ders.len(), limit });
    }
    Ok(ders)
}
