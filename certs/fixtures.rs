//! Makes test certificates: two good gateways and every way a certificate chain can be wrong.
//!
//! Nothing here is usable in production. It knows nothing of `sealane::identity`, so that a mistake
//! there is not repeated here; the expected refusals are the stable words of `RefusalReason::code`.
//! Include it with `#[path = "../certs/fixtures.rs"] mod fixtures;`.

#![allow(dead_code, missing_docs, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test support: a fixture that cannot be made fails its test")]

#[path = "raw.rs"]
pub mod raw;

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope,
    CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose as Eku, GeneralSubtree, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose as Ku, NameConstraints, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

/// The trust domain of the good gateways.
pub const DOMAIN: &str = "dc1.test";
/// Another configured trust domain, with a root of its own.
pub const OTHER_DOMAIN: &str = "dc2.test";
/// Configured, but its root has expired.
pub const OLD_ROOT_DOMAIN: &str = "old-root.test";
/// Configured, but the CRL of its root has expired.
pub const OLD_CRL_DOMAIN: &str = "old-crl.test";
/// Configured, but its only CRL is somebody else's.
pub const NO_CRL_DOMAIN: &str = "no-crl.test";
/// Not configured anywhere.
pub const STRANGE_DOMAIN: &str = "strange.test";

/// Now and some days, at a whole second, a minute early so that nothing is issued in the future.
pub fn days(days: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() - Duration::minutes(1) + Duration::days(days)
}

/// A signing authority.
pub struct Ca {
    pub der: CertificateDer<'static>,
    pub pem: String,
    params: CertificateParams,
    key_der: Vec<u8>,
}

pub type Adjust = fn(&mut CertificateParams);

impl Ca {
    pub fn root(name: &str) -> Self {
        Self::root_with(name, |_| {})
    }

    pub fn root_with(name: &str, adjust: Adjust) -> Self {
        let params = ca_params(name, adjust);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let cert = params.self_signed(&key).unwrap();
        Self { der: cert.der().clone(), pem: cert.pem(), params, key_der: key.serialize_der() }
    }

    pub fn intermediate(&self, name: &str, adjust: Adjust) -> Self {
        let params = ca_params(name, adjust);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let cert = params.signed_by(&key, &self.issuer()).unwrap();
        Self { der: cert.der().clone(), pem: cert.pem(), params, key_der: key.serialize_der() }
    }

    /// The same name with another key: what a forger would have.
    pub fn impostor(&self) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let cert = self.params.self_signed(&key).unwrap();
        Self { der: cert.der().clone(), pem: cert.pem(), params: self.params.clone(), key_der: key.serialize_der() }
    }

    fn key(&self) -> KeyPair {
        KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(self.key_der.clone()), &PKCS_ECDSA_P256_SHA256).unwrap()
    }

    fn issuer(&self) -> Issuer<'_, KeyPair> {
        Issuer::from_params(&self.params, self.key())
    }

    /// A leaf with one URI, good unless adjusted.
    pub fn leaf(&self, uri: &str, adjust: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = leaf_params(&[uri]);
        adjust(&mut params);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        // An issuer whose own KeyUsage forbids it would be refused by rcgen; forge through a copy without KeyUsage.
        let mut unchecked = self.params.clone();
        unchecked.key_usages = Vec::new();
        let cert = params.signed_by(&key, &Issuer::from_params(&unchecked, self.key())).unwrap();
        let serial = params.serial_number.clone().unwrap().to_bytes();
        Leaf { chain: vec![cert.der().clone()], key_der: key.serialize_der(), serial }
    }

    /// A CRL with a number, its dates in days from now, and the serials revoked.
    pub fn crl(&self, number: u64, this_update: i64, next_update: i64, revoked: &[&[u8]]) -> Vec<u8> {
        self.crl_with(number, days(this_update), days(next_update), revoked, None)
    }

    /// A CRL that says of itself that the key of this identifier signed it.
    pub fn crl_saying(&self, number: u64, key_id: &[u8]) -> Vec<u8> {
        self.crl_of(number, (days(0), days(30)), &[], None, KeyIdMethod::PreSpecified(key_id.to_vec()))
    }

    pub fn crl_with(
        &self,
        number: u64,
        this_update: OffsetDateTime,
        next_update: OffsetDateTime,
        revoked: &[&[u8]],
        partition: Option<&str>,
    ) -> Vec<u8> {
        self.crl_of(number, (this_update, next_update), revoked, partition, KeyIdMethod::Sha256)
    }

    fn crl_of(
        &self,
        number: u64,
        (this_update, next_update): (OffsetDateTime, OffsetDateTime),
        revoked: &[&[u8]],
        partition: Option<&str>,
        key_identifier_method: KeyIdMethod,
    ) -> Vec<u8> {
        let entry = |serial: &&[u8]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: days(-1),
            reason_code: None,
            invalidity_date: None,
        };
        let partition = partition.map(|uri| CrlIssuingDistributionPoint {
            distribution_point: CrlDistributionPoint { uris: vec![uri.to_owned()] },
            scope: Some(CrlScope::UserCertsOnly),
        });
        let params = CertificateRevocationListParams {
            this_update,
            next_update,
            crl_number: SerialNumber::from_slice(&number.to_be_bytes()),
            issuing_distribution_point: partition,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method,
        };
        // As with leaves: what rcgen refuses to sign is what has to be tested.
        let mut unchecked = self.params.clone();
        unchecked.key_usages = Vec::new();
        params.signed_by(&Issuer::from_params(&unchecked, self.key())).unwrap().der().to_vec()
    }

    /// The serial number of this authority's own certificate.
    pub fn serial(&self) -> Vec<u8> {
        self.params.serial_number.clone().unwrap().to_bytes()
    }
}

fn ca_params(name: &str, adjust: Adjust) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = days(-10);
    params.not_after = days(400);
    params.serial_number = Some(random_serial());
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![Ku::KeyCertSign, Ku::CrlSign];
    adjust(&mut params);
    params
}

pub fn leaf_params(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = days(-1);
    params.not_after = days(90);
    params.serial_number = Some(random_serial());
    params.distinguished_name = common_name("gateway");
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![Ku::DigitalSignature];
    params.extended_key_usages = vec![Eku::ServerAuth, Eku::ClientAuth];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut out = DistinguishedName::new();
    out.push(DnType::CommonName, name);
    out
}

fn random_serial() -> SerialNumber {
    use ring::rand::SecureRandom;
    let mut bytes = [0; 16];
    ring::rand::SystemRandom::new().fill(&mut bytes).unwrap();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// A leaf, the intermediates that are presented with it, and its key.
#[derive(Clone)]
pub struct Leaf {
    pub chain: Vec<CertificateDer<'static>>,
    pub key_der: Vec<u8>,
    pub serial: Vec<u8>,
}

impl Leaf {
    /// Presents these issuers too, nearest first.
    pub fn with(mut self, issuers: &[&Ca]) -> Self {
        self.chain.extend(issuers.iter().map(|issuer| issuer.der.clone()));
        self
    }

    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_der.clone()))
    }

    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(|der| pem("CERTIFICATE", der)).collect()
    }

    pub fn key_pem(&self) -> String {
        pem("PRIVATE KEY", &self.key_der)
    }
}

/// A chain that must be refused, and the word for it.
pub struct Variant {
    pub name: &'static str,
    pub leaf: Leaf,
    /// `RefusalReason::code` of the refusal.
    pub expected: &'static str,
}

/// One trust domain as written to disk.
#[derive(Clone)]
pub struct DomainFiles {
    pub domain: String,
    pub roots: PathBuf,
    pub crls: Vec<PathBuf>,
}

/// The files of one gateway.
#[derive(Clone)]
pub struct GatewayFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub signing_key: PathBuf,
}

/// Authorities, gateways and what is wrong with the others.
pub struct World {
    pub root: Ca,
    pub other_root: Ca,
    pub intermediate: Ca,
    pub good_a: Leaf,
    pub good_b: Leaf,
    /// Of the other trust domain.
    pub good_c: Leaf,
    /// Under an intermediate that has no ExtendedKeyUsage, as most have none.
    pub good_intermediate: Leaf,
    pub variants: Vec<Variant>,
    domains: Vec<Domain>,
}

struct Domain {
    name: &'static str,
    root_pem: String,
    /// File name and contents.
    crls: Vec<(String, Vec<u8>)>,
}

pub fn gateway_id(name: &str) -> String {
    format!("spiffe://{DOMAIN}/gateway/{name}")
}

impl World {
    pub fn new() -> Self {
        let root = Ca::root("root 1");
        let other_root = Ca::root("root 2");
        let intermediate = root.intermediate("intermediate", |_| {});
        let mut world = Self {
            good_a: root.leaf(&gateway_id("a"), |_| {}),
            good_b: root.leaf(&gateway_id("b"), |params| {
                params.distinguished_name.push(DnType::OrganizationalUnitName, "site-b");
            }),
            good_c: other_root.leaf(&format!("spiffe://{OTHER_DOMAIN}/gateway/c"), |_| {}),
            good_intermediate: intermediate.leaf(&gateway_id("i"), |_| {}).with(&[&intermediate]),
            variants: Vec::new(),
            domains: Vec::new(),
            intermediate,
            other_root,
            root,
        };
        world.leaf_rules();
        world.raw_encodings();
        world.issuers_and_dates();
        world.revocation_and_domains();
        for (name, leaf, expected) in raw::leaves(&world.root, "root 1") {
            world.refuse(name, leaf, expected);
        }
        world
    }

    fn refuse(&mut self, name: &'static str, leaf: Leaf, expected: &'static str) {
        self.variants.push(Variant { name, leaf, expected });
    }

    fn refuse_adjusted(&mut self, name: &'static str, expected: &'static str, adjust: impl FnOnce(&mut CertificateParams)) {
        let leaf = self.root.leaf(&gateway_id(name), adjust);
        self.refuse(name, leaf, expected);
    }

    fn leaf_rules(&mut self) {
        let uri = |text: &str| SanType::URI(text.try_into().unwrap());
        let dns = || SanType::DnsName("gateway.test".try_into().unwrap());
        self.refuse_adjusted("no-san", "no-subject-alt-name", |p| p.subject_alt_names.clear());
        self.refuse_adjusted("dns-only", "no-uri-name", |p| p.subject_alt_names = vec![dns()]);
        self.refuse_adjusted("two-uris", "several-uri-names", |p| p.subject_alt_names.push(uri(&gateway_id("other"))));
        self.refuse_adjusted("same-uri-twice", "several-uri-names", |p| p.subject_alt_names.push(uri(&gateway_id("same-uri-twice"))));
        self.refuse_adjusted("spiffe-and-http", "several-uri-names", |p| p.subject_alt_names.push(uri("http://dc1.test/x")));
        for (name, text) in [
            ("uri-http", "https://dc1.test/gateway/a"),
            ("uri-no-path", "spiffe://dc1.test"),
            ("uri-empty-path", "spiffe://dc1.test/"),
            ("uri-upper-case", "spiffe://DC1.test/gateway/a"),
            ("uri-port", "spiffe://dc1.test:8443/gateway/a"),
            ("uri-user", "spiffe://root@dc1.test/gateway/a"),
            ("uri-query", "spiffe://dc1.test/gateway/a?x"),
            ("uri-dots", "spiffe://dc1.test/gateway/../a"),
            ("uri-escape", "spiffe://dc1.test/gateway/%61"),
            ("uri-empty", ""),
        ] {
            self.refuse_adjusted(name, "invalid-spiffe-id", |p| p.subject_alt_names = vec![uri(text)]);
        }
        let long = format!("spiffe://{DOMAIN}/{}", "x".repeat(2048));
        self.refuse_adjusted("uri-too-long", "invalid-spiffe-id", |p| p.subject_alt_names = vec![uri(&long)]);
        self.refuse_adjusted("ca-leaf", "ca-certificate", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        self.refuse_adjusted("no-key-usage", "no-key-usage", |p| p.key_usages.clear());
        self.refuse_adjusted("key-usage-encipherment", "no-digital-signature", |p| p.key_usages = vec![Ku::KeyEncipherment]);
        self.refuse_adjusted("key-usage-cert-sign", "key-usage-of-authority", |p| p.key_usages.push(Ku::KeyCertSign));
        self.refuse_adjusted("key-usage-crl-sign", "key-usage-of-authority", |p| p.key_usages.push(Ku::CrlSign));
        self.refuse_adjusted("key-usage-not-critical", "key-usage-not-critical", |p| {
            p.key_usages.clear();
            p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 15], vec![0x03, 0x02, 0x07, 0x80]));
        });
        self.refuse_adjusted("no-eku", "no-extended-key-usage", |p| p.extended_key_usages.clear());
        self.refuse_adjusted("only-server-auth", "no-client-auth", |p| p.extended_key_usages = vec![Eku::ServerAuth]);
        self.refuse_adjusted("only-client-auth", "no-server-auth", |p| p.extended_key_usages = vec![Eku::ClientAuth]);
        self.refuse_adjusted("eku-any", "no-server-auth", |p| p.extended_key_usages = vec![Eku::Any]);
        self.refuse_adjusted("eku-code-signing", "no-server-auth", |p| p.extended_key_usages = vec![Eku::CodeSigning]);
    }

    fn raw_encodings(&mut self) {
        const SAN: &[u64] = &[2, 5, 29, 17];
        let names = |names: &[(u8, &[u8])]| {
            let body: Vec<u8> = names.iter().flat_map(|(tag, text)| [&[*tag, u8::try_from(text.len()).unwrap()], *text].concat()).collect();
            [&[0x30, u8::try_from(body.len()).unwrap()], body.as_slice()].concat()
        };
        let good: &[u8] = b"spiffe://dc1.test/gateway/a";
        for (name, expected, content) in [
            // webpki's iterator would show one name here and hide the other.
            ("hidden-second-uri", "several-uri-names", names(&[(0x86, good), (0x86, b"\xff\xfe")])),
            ("hidden-first-uri", "several-uri-names", names(&[(0x86, b"\xff\xfe"), (0x86, good)])),
            ("uri-not-text", "invalid-spiffe-id", names(&[(0x86, b"spiffe://dc1.test/\xff")])),
            ("uri-with-nul", "invalid-spiffe-id", names(&[(0x86, b"spiffe://dc1.test/a\0b")])),
            ("san-empty", "no-uri-name", vec![0x30, 0]),
            ("san-truncated", "malformed-certificate", vec![0x30, 0x10, 0x86, 0x01]),
            ("san-not-a-sequence", "malformed-certificate", vec![0x04, 0x01, 0x00]),
        ] {
            self.refuse_adjusted(name, expected, |p| {
                p.subject_alt_names.clear();
                p.custom_extensions.push(CustomExtension::from_oid_content(SAN, content));
            });
        }
        let again = names(&[(0x86, good)]);
        self.refuse_adjusted("san-twice", "malformed-certificate", |p| {
            p.custom_extensions.push(CustomExtension::from_oid_content(SAN, again));
        });
        self.refuse_adjusted("critical-extension", "unsupported", |p| {
            let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 55555, 1], vec![0x05, 0x00]);
            extension.set_criticality(true);
            p.custom_extensions.push(extension);
        });
        let edit = |edit: fn(&mut Vec<u8>)| {
            let mut leaf = self.good_a.clone();
            let mut der = leaf.chain[0].to_vec();
            edit(&mut der);
            leaf.chain[0] = der.into();
            leaf
        };
        let (trailing, cut) = (edit(|der| der.push(0)), edit(|der| der.truncate(der.len() / 2)));
        let (empty, tampered) = (edit(Vec::clear), edit(|der| *der.last_mut().unwrap() ^= 1));
        let garbage = edit(|der| *der = b"-----BEGIN CERTIFICATE-----".to_vec());
        self.refuse("trailing-bytes", trailing, "malformed-certificate");
        self.refuse("truncated", cut, "malformed-certificate");
        self.refuse("empty-certificate", empty, "malformed-certificate");
        self.refuse("not-der", garbage, "malformed-certificate");
        self.refuse("tampered-signature", tampered, "bad-signature");
        let twice = [self.good_a.chain.clone(), self.good_a.chain[..1].to_vec()].concat();
        self.refuse("leaf-twice", Leaf { chain: twice, ..self.good_a.clone() }, "malformed-certificate");
        for (name, behind) in [("garbage-behind-the-leaf", &b"\x30\x03\x02\x01\x01"[..]), ("nothing-behind-the-leaf", &[])] {
            let chain = [self.good_a.chain.clone(), vec![behind.to_vec().into()]].concat();
            self.refuse(name, Leaf { chain, ..self.good_a.clone() }, "malformed-certificate");
        }
    }

    fn issuers_and_dates(&mut self) {
        self.refuse_adjusted("expired", "expired", |p| (p.not_before, p.not_after) = (days(-30), days(-1)));
        self.refuse_adjusted("not-yet-valid", "not-yet-valid", |p| p.not_before = days(1));
        self.refuse_adjusted("ends-before-it-begins", "invalid-validity", |p| (p.not_before, p.not_after) = (days(2), days(1)));
        let rogue = Ca::root("root of nobody");
        self.refuse("wrong-ca", rogue.leaf(&gateway_id("a"), |_| {}), "unknown-issuer");
        self.refuse("wrong-ca-presented", rogue.leaf(&gateway_id("a"), |_| {}).with(&[&rogue]), "unknown-issuer");
        self.refuse("forged-issuer", self.root.impostor().leaf(&gateway_id("a"), |_| {}), "bad-signature");
        let mut own = leaf_params(&[&gateway_id("a")]);
        own.distinguished_name = common_name("root 1");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let cert = own.self_signed(&key).unwrap();
        let self_signed = Leaf { chain: vec![cert.der().clone()], key_der: key.serialize_der(), serial: vec![] };
        self.refuse("self-signed", self_signed, "bad-signature");

        let missing = self.intermediate.leaf(&gateway_id("a"), |_| {});
        self.refuse("intermediate-missing", missing, "unknown-issuer");
        let expired = self.root.intermediate("expired intermediate", |p| p.not_after = days(-1));
        self.refuse("intermediate-expired", expired.leaf(&gateway_id("a"), |_| {}).with(&[&expired]), "issuer-expired");
        let young = self.root.intermediate("young intermediate", |p| p.not_before = days(1));
        self.refuse("intermediate-not-yet-valid", young.leaf(&gateway_id("a"), |_| {}).with(&[&young]), "issuer-not-yet-valid");
        let no_ca = self.root.intermediate("no authority", |p| p.is_ca = IsCa::ExplicitNoCa);
        self.refuse("issued-by-a-leaf", no_ca.leaf(&gateway_id("a"), |_| {}).with(&[&no_ca]), "issuer-not-authority");
        let no_sign = self.root.intermediate("no cert sign", |p| p.key_usages = vec![Ku::CrlSign, Ku::DigitalSignature]);
        self.refuse("issuer-without-cert-sign", no_sign.leaf(&gateway_id("a"), |_| {}).with(&[&no_sign]), "issuer-not-authority");
        let purpose = self.root.intermediate("code signing only", |p| p.extended_key_usages = vec![Eku::CodeSigning]);
        self.refuse("intermediate-purpose", purpose.leaf(&gateway_id("a"), |_| {}).with(&[&purpose]), "issuer-purpose");
        // Each would do for one end of a connection.
        let [clients, servers]: [Adjust; 2] =
            [|p| p.extended_key_usages = vec![Eku::ClientAuth], |p| p.extended_key_usages = vec![Eku::ServerAuth]];
        for (name, only) in [("issuer-for-clients-only", clients), ("issuer-for-servers-only", servers)] {
            let one = self.root.intermediate(name, only);
            self.refuse(name, one.leaf(&gateway_id("a"), |_| {}).with(&[&one]), "issuer-purpose");
        }
        let short = self.root.intermediate("path length 0", |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
        let below = short.intermediate("below path length 0", |_| {});
        self.refuse("path-length", below.leaf(&gateway_id("a"), |_| {}).with(&[&below, &short]), "path-length-exceeded");
        let constrained = self.root.intermediate("constrained", |p| {
            let permitted_subtrees = vec![GeneralSubtree::DnsName("allowed.test".to_owned())];
            p.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: vec![] });
        });
        let outside = constrained.leaf(&gateway_id("a"), |p| p.subject_alt_names.push(SanType::DnsName("x.test".try_into().unwrap())));
        self.refuse("name-constraint", outside.with(&[&constrained]), "name-constraint");
        let uri_constrained = self.root.intermediate("constrained to URIs", |p| {
            // permittedSubtrees: uniformResourceIdentifier ".test", which covers the leaf by RFC 5280 and which webpki cannot evaluate.
            let content = [&[0x30, 0x0b, 0xa0, 0x09, 0x30, 0x07, 0x86, 0x05], b".test".as_slice()].concat();
            let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 30], content);
            extension.set_criticality(true);
            p.custom_extensions.push(extension);
        });
        let unclear = uri_constrained.leaf(&gateway_id("a"), |_| {}).with(&[&uri_constrained]);
        self.refuse("uri-name-constraint", unclear, "name-constraint");

        let mut chain: Vec<Ca> = vec![self.root.intermediate("step 0", |_| {})];
        for name in ["step 1", "step 2", "step 3", "step 4", "step 5", "step 6"] {
            chain.push(chain.last().unwrap().intermediate(name, |_| {}));
        }
        let nearest_first: Vec<&Ca> = chain.iter().rev().collect();
        let deep = chain.last().unwrap().leaf(&gateway_id("a"), |_| {}).with(&nearest_first);
        self.refuse("seven-intermediates", deep, "chain-too-long");
        let padded = self.root.leaf(&gateway_id("a"), |_| {}).with(&[&rogue; 7]);
        self.refuse("padded-chain", padded, "chain-too-long");

        let crls = [
            (&purpose, "purpose"),
            (&short, "short"),
            (&below, "below"),
            (&no_ca, "no-ca"),
            (&no_sign, "no-sign"),
            (&expired, "expired"),
            (&young, "young"),
            (&constrained, "constrained"),
            (&uri_constrained, "uri-constrained"),
        ];
        let files = crls.iter().map(|(ca, name)| (format!("{name}.crl"), ca.crl(1, 0, 30, &[]))).collect();
        self.domains.push(Domain { name: DOMAIN, root_pem: self.root.pem.clone(), crls: files });
    }

    fn revocation_and_domains(&mut self) {
        let revoked = self.root.leaf(&gateway_id("revoked"), |_| {});
        let gone = self.root.intermediate("revoked intermediate", |_| {});
        let silent = self.root.intermediate("intermediate without a CRL", |_| {});
        let stale = self.root.intermediate("intermediate with an old CRL", |_| {});
        let forged = self.root.intermediate("intermediate with a forged CRL", |_| {});
        let unfit = self.root.intermediate("intermediate that may not sign CRLs", |p| p.key_usages = vec![Ku::KeyCertSign]);
        let revoked_below = self.intermediate.leaf(&gateway_id("revoked-below"), |_| {});
        let crls = &mut self.domains[0].crls;
        crls.push(("root.crl".to_owned(), self.root.crl(7, 0, 30, &[&revoked.serial, &gone.serial()])));
        crls.push(("intermediate.crl".to_owned(), self.intermediate.crl(7, 0, 30, &[&revoked_below.serial])));
        crls.push(("gone.crl".to_owned(), gone.crl(1, 0, 30, &[])));
        crls.push(("stale.crl".to_owned(), stale.crl(1, -20, -1, &[])));
        crls.push(("forged.crl".to_owned(), forged.impostor().crl(1, 0, 30, &[])));
        crls.push(("unfit.crl".to_owned(), unfit.crl(1, 0, 30, &[])));
        let below = self.intermediate.der.clone();
        self.refuse("revoked", revoked, "revoked");
        self.refuse(
            "revoked-below-intermediate",
            Leaf { chain: [revoked_below.chain.clone(), vec![below]].concat(), ..revoked_below },
            "revoked",
        );
        for (name, ca, expected) in [
            ("intermediate-revoked", &gone, "issuer-revoked"),
            ("crl-missing", &silent, "crl-missing"),
            ("crl-expired", &stale, "crl-expired"),
            ("crl-wrong-signer", &forged, "crl-bad-signature"),
            ("crl-issuer-unfit", &unfit, "crl-issuer-unfit"),
        ] {
            self.refuse(name, ca.leaf(&gateway_id(name), |_| {}).with(&[ca]), expected);
        }

        let id = |domain: &str| format!("spiffe://{domain}/gateway/a");
        self.refuse("domain-not-configured", self.root.leaf(&id(STRANGE_DOMAIN), |_| {}), "unknown-trust-domain");
        self.refuse("domain-of-another-root", self.other_root.leaf(&id(DOMAIN), |_| {}), "unknown-issuer");
        self.refuse("root-of-another-domain", self.root.leaf(&id(OTHER_DOMAIN), |_| {}), "unknown-issuer");
        let old_root = Ca::root_with("expired root", |p| p.not_after = days(-1));
        let old_crl = Ca::root("root with an old CRL");
        let no_crl = Ca::root("root without a CRL");
        self.refuse("root-expired", old_root.leaf(&id(OLD_ROOT_DOMAIN), |_| {}), "roots-expired");
        self.refuse("root-crl-expired", old_crl.leaf(&id(OLD_CRL_DOMAIN), |_| {}), "crl-expired");
        self.refuse("root-crl-missing", no_crl.leaf(&id(NO_CRL_DOMAIN), |_| {}), "crl-missing");
        for (name, ca, crl) in [
            (OTHER_DOMAIN, &self.other_root, self.other_root.crl(1, 0, 30, &[])),
            (OLD_ROOT_DOMAIN, &old_root, old_root.crl(1, 0, 30, &[])),
            (OLD_CRL_DOMAIN, &old_crl, old_crl.crl(1, -30, -1, &[])),
            (NO_CRL_DOMAIN, &no_crl, self.other_root.crl(1, 0, 30, &[])),
        ] {
            self.domains.push(Domain { name, root_pem: ca.pem.clone(), crls: vec![("root.crl".to_owned(), crl)] });
        }
    }

    /// Writes roots and CRLs, one directory for each trust domain.
    pub fn write_trust(&self, dir: &Path) -> Vec<DomainFiles> {
        let write_domain = |domain: &Domain| {
            let dir = dir.join(domain.name);
            fs::create_dir_all(&dir).unwrap();
            let roots = dir.join("roots.pem");
            fs::write(&roots, &domain.root_pem).unwrap();
            let write_crl = |(name, der): &(String, Vec<u8>)| {
                let path = dir.join(name);
                fs::write(&path, pem("X509 CRL", der)).unwrap();
                path
            };
            DomainFiles { domain: domain.name.to_owned(), roots, crls: domain.crls.iter().map(write_crl).collect() }
        };
        self.domains.iter().map(write_domain).collect()
    }
}

/// Writes a gateway's certificate chain, its key and a new signing key, with the modes that they need.
pub fn write_gateway(dir: &Path, name: &str, leaf: &Leaf) -> GatewayFiles {
    fs::create_dir_all(dir).unwrap();
    let file = |suffix: &str| dir.join(format!("{name}-{suffix}.pem"));
    let files = GatewayFiles { certificate: file("cert"), key: file("key"), signing_key: file("signing-key") };
    fs::write(&files.certificate, leaf.chain_pem()).unwrap();
    write_private(&files.key, &leaf.key_pem());
    write_private(&files.signing_key, &KeyPair::generate_for(&PKCS_ED25519).unwrap().serialize_pem());
    files
}

pub fn write_private(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// PEM armour (RFC 7468).
pub fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = Vec::new();
    for group in der.chunks(3) {
        let word = group.iter().chain(&[0, 0]).take(3).fold(0u32, |word, byte| (word << 8) | u32::from(*byte));
        for digit in 0..4 {
            let index = usize::try_from((word >> (18 - 6 * digit)) & 63).unwrap();
            text.push(if digit <= group.len() { ALPHABET[index] } else { b'=' });
        }
    }
    let lines: String = text.chunks(64).map(|line| format!("{}\n", std::str::from_utf8(line).unwrap())).collect();
    format!("-----BEGIN {label}-----\n{lines}-----END {label}-----\n")
}
