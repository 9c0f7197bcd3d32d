//! What can go wrong with identities, in two vocabularies: refusing a peer, and failing to load our own files.

use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use super::time::Stamp;
use crate::identity::holder::{HolderError, Refusal};
use crate::types::SpiffeId;
use crate::wire::ErrorClass;

/// Why a peer's certificate chain was refused. Closed and comparable: audit records and tests name these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefusalReason {
    /// The peer presented no certificate at all.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// More certificates than a path may have.
    #[error("the peer presented a chain of {count} certificates: expected at most {limit}")]
    ChainTooLong {
        /// Certificates presented.
        count: usize,
        /// Certificates allowed.
        limit: usize,
    },
    /// A certificate that does not parse, or that has an extension twice.
    #[error("the peer's certificate is malformed: {detail}")]
    MalformedCertificate {
        /// What does not parse.
        detail: &'static str,
    },
    /// The leaf has no subjectAltName extension.
    #[error("the peer's certificate has no subjectAltName: expected one SPIFFE URI")]
    NoSubjectAltName,
    /// The leaf has names, but none is a URI.
    #[error("the peer's certificate has {names} names but no URI: expected one SPIFFE URI")]
    NoUriName {
        /// Names of other kinds.
        names: usize,
    },
    /// The leaf has more than one URI name.
    #[error("the peer's certificate has {count} URI names: expected exactly one")]
    SeveralUriNames {
        /// URI names, valid or not.
        count: usize,
    },
    /// The one URI is not a SPIFFE ID of a workload.
    #[error("the peer's certificate names `{uri}`: expected `spiffe://trust-domain/path`")]
    InvalidSpiffeId {
        /// The URI, escaped and cut to a printable length.
        uri: String,
    },
    /// Nobody configured this trust domain.
    #[error("the peer belongs to trust domain `{domain}`, which is not configured here")]
    UnknownTrustDomain {
        /// The trust domain presented.
        domain: String,
    },
    /// The leaf is a certificate authority.
    #[error("the peer's certificate is a certificate authority: expected a leaf")]
    CaCertificate,
    /// The leaf has no KeyUsage extension.
    #[error("the peer's certificate has no KeyUsage: expected digitalSignature")]
    NoKeyUsage,
    /// KeyUsage is there but may be ignored by its own word.
    #[error("the peer's certificate has a KeyUsage that is not critical")]
    KeyUsageNotCritical,
    /// KeyUsage does not allow to sign a handshake.
    #[error("the peer's certificate has a KeyUsage without digitalSignature")]
    NoDigitalSignature,
    /// KeyUsage allows to sign certificates or CRLs.
    #[error("the peer's certificate may sign certificates or CRLs: expected a leaf's KeyUsage")]
    KeyUsageOfAuthority,
    /// The leaf has no ExtendedKeyUsage extension.
    #[error("the peer's certificate has no ExtendedKeyUsage: expected serverAuth and clientAuth")]
    NoExtendedKeyUsage,
    /// ExtendedKeyUsage lacks serverAuth.
    #[error("the peer's certificate has an ExtendedKeyUsage without serverAuth")]
    NoServerAuth,
    /// ExtendedKeyUsage lacks clientAuth.
    #[error("the peer's certificate has an ExtendedKeyUsage without clientAuth")]
    NoClientAuth,
    /// A key of the chain is of a kind or length that nothing is believed by.
    #[error("a certificate in the peer's chain has a key that proves nothing: {detail}")]
    UnfitKey {
        /// What is wrong with it.
        detail: &'static str,
    },
    /// The leaf is not valid yet.
    #[error("the peer's certificate is valid from {}", Stamp(*not_before))]
    NotYetValid {
        /// When it begins to be valid.
        not_before: SystemTime,
    },
    /// The leaf has expired.
    #[error("the peer's certificate expired at {}", Stamp(*not_after))]
    Expired {
        /// When it expired.
        not_after: SystemTime,
    },
    /// The leaf's own dates contradict each other.
    #[error("a certificate of the peer's chain ends before it begins")]
    InvalidValidity,
    /// An intermediate is not valid yet.
    #[error("an issuer in the peer's chain is valid from {}", Stamp(*not_before))]
    IssuerNotYetValid {
        /// When it begins to be valid.
        not_before: SystemTime,
    },
    /// An intermediate has expired.
    #[error("an issuer in the peer's chain expired at {}", Stamp(*not_after))]
    IssuerExpired {
        /// When it expired.
        not_after: SystemTime,
    },
    /// Every root of the trust domain is outside its validity.
    #[error("no root of trust domain `{domain}` is valid now")]
    RootsExpired {
        /// The trust domain.
        domain: String,
    },
    /// No path to a root of the presented trust domain.
    #[error("the peer's certificate does not chain to a root of its trust domain `{domain}`")]
    UnknownIssuer {
        /// The trust domain presented.
        domain: String,
    },
    /// The peer cannot sign with the key of the certificate that it presents.
    #[error("the peer does not hold the key of the certificate that it presented")]
    KeyNotHeld,
    /// A signature in the chain does not verify.
    #[error("a signature in the peer's certificate chain is wrong")]
    BadSignature,
    /// An issuer in the chain is not a certificate authority.
    #[error("an issuer in the peer's chain is not a certificate authority")]
    IssuerNotAuthority,
    /// An issuer's path length constraint is exceeded.
    #[error("the peer's chain is longer than an issuer's path length allows")]
    PathLengthExceeded,
    /// An issuer's name constraints exclude the leaf, or cannot be evaluated.
    #[error("the peer's chain violates a name constraint")]
    NameConstraint,
    /// An issuer's ExtendedKeyUsage excludes ours.
    #[error("an issuer in the peer's chain may not issue for serverAuth and clientAuth")]
    IssuerPurpose,
    /// Path building was stopped by its budget.
    #[error("the peer's chain takes too much work to verify")]
    TooComplex,
    /// The leaf is revoked.
    #[error("the peer's certificate with serial `{serial}` is revoked")]
    Revoked {
        /// The serial number, hexadecimal.
        serial: String,
    },
    /// An intermediate is revoked.
    #[error("an issuer in the peer's chain is revoked")]
    IssuerRevoked,
    /// No CRL covers a certificate of the path.
    #[error("no CRL of trust domain `{domain}` covers the peer's chain")]
    CrlMissing {
        /// The trust domain.
        domain: String,
    },
    /// The CRL that covers the path is past its nextUpdate.
    #[error("the CRL of trust domain `{domain}` expired at {}", Stamp(*next_update))]
    CrlExpired {
        /// The trust domain.
        domain: String,
        /// Its nextUpdate.
        next_update: SystemTime,
    },
    /// The CRL was not signed by the issuer it names.
    #[error("the CRL of trust domain `{domain}` is not signed by the issuer it names")]
    CrlBadSignature {
        /// The trust domain.
        domain: String,
    },
    /// The CRL's issuer may not sign CRLs.
    #[error("the issuer of a CRL of trust domain `{domain}` may not sign CRLs")]
    CrlIssuerUnfit {
        /// The trust domain.
        domain: String,
    },
    /// Version, critical extension or algorithm that nobody here understands.
    #[error("the peer's chain uses something unsupported: {detail}")]
    Unsupported {
        /// What is not supported.
        detail: &'static str,
    },
    /// Anything else that the path builder refuses.
    #[error("the peer's chain was refused by path validation: {detail}")]
    Path {
        /// The path builder's words.
        detail: String,
    },
}

impl RefusalReason {
    /// A short stable word for audit records and metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::ChainTooLong { .. } => "chain-too-long",
            Self::MalformedCertificate { .. } => "malformed-certificate",
            Self::NoSubjectAltName => "no-subject-alt-name",
            Self::NoUriName { .. } => "no-uri-name",
            Self::SeveralUriNames { .. } => "several-uri-names",
            Self::InvalidSpiffeId { .. } => "invalid-spiffe-id",
            Self::UnknownTrustDomain { .. } => "unknown-trust-domain",
            Self::CaCertificate => "ca-certificate",
            Self::NoKeyUsage => "no-key-usage",
            Self::KeyUsageNotCritical => "key-usage-not-critical",
            Self::NoDigitalSignature => "no-digital-signature",
            Self::KeyUsageOfAuthority => "key-usage-of-authority",
            Self::NoExtendedKeyUsage => "no-extended-key-usage",
            Self::NoServerAuth => "no-server-auth",
            Self::NoClientAuth => "no-client-auth",
            Self::UnfitKey { .. } => "unfit-key",
            Self::NotYetValid { .. } => "not-yet-valid",
            Self::Expired { .. } => "expired",
            Self::InvalidValidity => "invalid-validity",
            Self::IssuerNotYetValid { .. } => "issuer-not-yet-valid",
            Self::IssuerExpired { .. } => "issuer-expired",
            Self::RootsExpired { .. } => "roots-expired",
            Self::UnknownIssuer { .. } => "unknown-issuer",
            Self::KeyNotHeld => "key-not-held",
            Self::BadSignature => "bad-signature",
            Self::IssuerNotAuthority => "issuer-not-authority",
            Self::PathLengthExceeded => "path-length-exceeded",
            Self::NameConstraint => "name-constraint",
            Self::IssuerPurpose => "issuer-purpose",
            Self::TooComplex => "too-complex",
            Self::Revoked { .. } => "revoked",
            Self::IssuerRevoked => "issuer-revoked",
            Self::CrlMissing { .. } => "crl-missing",
            Self::CrlExpired { .. } => "crl-expired",
            Self::CrlBadSignature { .. } => "crl-bad-signature",
            Self::CrlIssuerUnfit { .. } => "crl-issuer-unfit",
            Self::Unsupported { .. } => "unsupported",
            Self::Path { .. } => "path",
        }
    }
}

/// Why credentials could not be loaded or reloaded, or a peer was refused.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The peer is refused.
    #[error(transparent)]
    Refused(#[from] RefusalReason),
    /// A file cannot be read or written.
    #[error("cannot {action} {what} `{path}`")]
    File {
        /// `read`, `write`, …
        action: &'static str,
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file exceeds its bound.
    #[error("{what} `{path}` is larger than {limit} bytes")]
    TooLarge {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// A file holds more entries than its bound.
    #[error("{what} `{path}` holds {count} entries: expected 1 to {limit}")]
    Count {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Entries found.
        count: usize,
        /// The bound.
        limit: usize,
    },
    /// A private key that others can read.
    #[error("private key `{path}` has mode {mode:04o}: expected no access for group and others, e.g. 0600")]
    KeyExposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A private key from systemd that is not as systemd lays it.
    #[error("systemd credential `{path}` is not as systemd lays it: {found}, expected {expected}")]
    Credential {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A file does not hold what it should.
    #[error("{what} `{path}` is malformed: expected {expected}")]
    Malformed {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What was expected in it.
        expected: &'static str,
    },
    /// The key does not belong to the certificate.
    #[error("private key `{key}` does not belong to certificate `{certificate}`")]
    KeyMismatch {
        /// The certificate file.
        certificate: PathBuf,
        /// The key file.
        key: PathBuf,
    },
    /// Our own certificate breaks the rules that we hold peers to.
    #[error("certificate `{path}` cannot be a gateway's: {reason}")]
    OwnCertificate {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks, in the words used for peers.
        reason: RefusalReason,
    },
    /// A reload would make this gateway somebody else.
    #[error("certificate `{path}` names `{found}`: expected `{expected}`, an identity changes by a restart only")]
    IdentityChanged {
        /// The file.
        path: PathBuf,
        /// The new identity.
        found: SpiffeId,
        /// The identity in use.
        expected: SpiffeId,
    },
    /// No trust domain is configured.
    #[error("no trust domain is configured: expected at least one")]
    NoTrustDomain,
    /// More trust domains, or CRL files of one, than the bound.
    #[error("{count} {what} are configured: expected at most {limit}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The bound.
        limit: usize,
    },
    /// A configured name is not a trust domain.
    #[error("`{domain}` is not a trust domain: expected lower-case letters, digits, `.`, `_` or `-`")]
    InvalidTrustDomain {
        /// The name.
        domain: String,
    },
    /// A trust domain appears twice.
    #[error("trust domain `{domain}` is configured twice")]
    DuplicateTrustDomain {
        /// The name.
        domain: String,
    },
    /// A trust domain without a CRL: nobody could ever be revoked.
    #[error("trust domain `{domain}` has no CRL: expected at least one CRL file")]
    CrlRequired {
        /// The trust domain.
        domain: String,
    },
    /// A root that may not issue.
    #[error("root in `{path}` with subject `{subject}` is not a certificate authority")]
    RootNotAuthority {
        /// The file.
        path: PathBuf,
        /// Its subject.
        subject: String,
    },
    /// A root that cannot be one.
    #[error("root in `{path}` with subject `{subject}` cannot be trusted: {why}")]
    RootUnfit {
        /// The file.
        path: PathBuf,
        /// Its subject.
        subject: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A CRL that is signed by an algorithm that proves nothing.
    #[error("CRL `{path}` is signed by an algorithm that is not good enough, or not by one of its issuer's key")]
    CrlAlgorithm {
        /// The file.
        path: PathBuf,
    },
    /// A CRL of the future.
    #[error("CRL `{path}` is issued in the future, at {}: this host's clock says {}", Stamp(*this_update), Stamp(*now))]
    CrlFromFuture {
        /// The file.
        path: PathBuf,
        /// Its thisUpdate.
        this_update: SystemTime,
        /// What it was compared with.
        now: SystemTime,
    },
    /// A CRL that its issuer, a root or an intermediate that is known, did not sign.
    #[error("CRL `{path}` is not signed by the issuer it names")]
    CrlForged {
        /// The file.
        path: PathBuf,
    },
    /// The process that has our key says what is wrong with it.
    #[error("{0}")]
    Key(Refusal),
    /// The process that has our key does not answer.
    #[error("key `{name}`")]
    Holder {
        /// The key as the configuration has it.
        name: String,
        /// Why.
        source: HolderError,
    },
    /// A CRL older than one already used by this process.
    #[error("CRL `{path}` has number {found}: {}", newer_than(.found, .expected))]
    CrlRollback {
        /// The file.
        path: PathBuf,
        /// Its number, hexadecimal.
        found: String,
        /// The number in use, hexadecimal.
        expected: String,
    },
    /// Two different CRLs of one issuer claim one number and time.
    #[error("CRL `{path}` differs from another CRL of its issuer with the same number {number}")]
    CrlConflict {
        /// The file.
        path: PathBuf,
        /// The number, hexadecimal.
        number: String,
    },
    /// The TLS library refuses a configuration.
    #[error("cannot configure TLS")]
    Tls(#[source] rustls::Error),
    /// The certificate library refuses to make something.
    #[error("cannot make {what}")]
    Generate {
        /// What could not be made.
        what: &'static str,
        /// Why.
        source: rcgen::Error,
    },
    /// The random generator of the system failed.
    #[error("the system's random generator failed")]
    Random,
    /// A certificate authority is already there.
    #[error("`{path}` exists: refusing to overwrite it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A name that cannot be a gateway's.
    #[error("invalid {what} `{value}`: expected {expected}")]
    InvalidName {
        /// What the name is for.
        what: &'static str,
        /// The name, escaped.
        value: String,
        /// The rule.
        expected: &'static str,
    },
    /// No certificate was issued to this gateway.
    #[error("authority `{path}` has issued nothing to gateway `{gateway}` that is not revoked already")]
    NotIssued {
        /// The directory of the authority.
        path: PathBuf,
        /// The gateway.
        gateway: String,
    },
}

impl IdentityError {
    /// Who is at fault.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Refused(_) => ErrorClass::Unauthenticated,
            Self::Key(refusal) => refusal.class(),
            Self::File { .. } | Self::Holder { .. } | Self::Tls(_) | Self::Generate { .. } | Self::Random => ErrorClass::Local,
            _ => ErrorClass::Misuse,
        }
    }

    /// The reason, when a peer was refused.
    #[must_use]
    pub fn refusal(&self) -> Option<&RefusalReason> {
        match self {
            Self::Refused(reason) => Some(reason),
            _ => None,
        }
    }
}

/// Numbers come first, and of two lists with one number the later is the newer.
fn newer_than(found: &str, used: &str) -> String {
    let later = if found == used { ", and a later thisUpdate" } else { "" };
    format!("expected {used} or later{later}, as already used")
}
