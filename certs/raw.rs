//! Certificates and CRLs byte by byte: what no library would make, signed as it is by an authority of the fixtures.

use rcgen::SigningKey;
use time::OffsetDateTime;

use super::{Ca, Leaf, days, gateway_id};

/// One DER value of several parts.
pub fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short @ ..128) => out.push(short),
        Ok(long) => out.extend([0x81, long]),
        Err(_) => {
            out.push(0x82);
            out.extend(u16::try_from(content.len()).unwrap().to_be_bytes());
        }
    }
    out.extend(content);
    out
}

const SEQUENCE: u8 = 0x30;
const ECDSA_SHA256: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
const ECDSA_SHA1: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x04\x01";
const NOBODYS: &[u8] = b"\x06\x03\x2a\x03\x04";
const EC_KEY: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01";
const CRL_NUMBER: &[u8] = b"\x55\x1d\x14";
const DELTA: &[u8] = b"\x55\x1d\x1b";
const PARTITION: &[u8] = b"\x55\x1d\x1c";
const REASON: &[u8] = b"\x55\x1d\x15";
const UNKNOWN: &[u8] = b"\x2a\x03\x04";

fn name(common_name: &str) -> Vec<u8> {
    let value = tlv(0x0c, &[common_name.as_bytes()]);
    tlv(SEQUENCE, &[&tlv(0x31, &[&tlv(SEQUENCE, &[b"\x06\x03\x55\x04\x03", &value])])])
}

fn utc(at: OffsetDateTime) -> Vec<u8> {
    let two = |number: i32| format!("{:02}", number % 100);
    let (date, clock) = (at.date(), at.time());
    let text = [two(date.year()), two(u8::from(date.month()).into()), two(date.day().into())].concat()
        + &[two(clock.hour().into()), two(clock.minute().into()), two(clock.second().into()), "Z".to_owned()].concat();
    tlv(0x17, &[text.as_bytes()])
}

fn extension(oid: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let critical: &[u8] = if critical { b"\x01\x01\xff" } else { b"" };
    tlv(SEQUENCE, &[&tlv(6, &[oid]), critical, &tlv(4, &[value])])
}

fn names(names: &[(u8, &str)]) -> Vec<u8> {
    let all: Vec<u8> = names.iter().flat_map(|(tag, text)| tlv(*tag, &[text.as_bytes()])).collect();
    extension(b"\x55\x1d\x11", false, &tlv(SEQUENCE, &[&all]))
}

fn key(algorithm: &[u8], bits: &[u8]) -> Vec<u8> {
    tlv(SEQUENCE, &[&tlv(SEQUENCE, &[algorithm]), &tlv(3, &[&[0], bits])])
}

fn rsa_key(bytes: usize) -> Vec<u8> {
    let modulus = [&[0], vec![0xc5; bytes].as_slice()].concat();
    let numbers = tlv(SEQUENCE, &[&tlv(2, &[&modulus]), b"\x02\x03\x01\x00\x01"]);
    key(b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00", &numbers)
}

fn sign(ca: &Ca, tbs: &[u8], algorithm: &[u8]) -> Vec<u8> {
    let signature = ca.key().sign(tbs).unwrap();
    tlv(SEQUENCE, &[tbs, &tlv(SEQUENCE, &[algorithm]), &tlv(3, &[&[0], &signature])])
}

/// A certificate in parts; a good one to begin with.
#[derive(Clone)]
struct Certificate {
    version: &'static [u8],
    serial: Vec<u8>,
    inside: &'static [u8],
    outside: &'static [u8],
    not_before: Vec<u8>,
    not_after: Vec<u8>,
    subject: Vec<u8>,
    key: Vec<u8>,
    unique_id: &'static [u8],
    extensions: Vec<Vec<u8>>,
}

impl Certificate {
    fn good() -> Self {
        let basic = extension(b"\x55\x1d\x13", true, b"\x30\x00");
        let usage = extension(b"\x55\x1d\x0f", true, b"\x03\x02\x07\x80");
        let purposes = b"\x30\x14\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02";
        let purposes = extension(b"\x55\x1d\x25", false, purposes);
        Self {
            version: b"\xa0\x03\x02\x01\x02",
            serial: b"\x11\x22\x33".to_vec(),
            inside: ECDSA_SHA256,
            outside: ECDSA_SHA256,
            not_before: utc(days(-1)),
            not_after: utc(days(90)),
            subject: name("gateway"),
            key: key(&[EC_KEY, b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"].concat(), &[vec![4], vec![7; 64]].concat()),
            unique_id: b"",
            extensions: vec![basic, usage, purposes, names(&[(0x86, &gateway_id("raw"))])],
        }
    }

    fn signed(&self, ca: &Ca, issuer: &[u8]) -> Vec<u8> {
        let validity = tlv(SEQUENCE, &[&self.not_before, &self.not_after]);
        let extensions = tlv(0xa3, &[&tlv(SEQUENCE, &[&self.extensions.concat()])]);
        let (serial, inside) = (tlv(2, &[&self.serial]), tlv(SEQUENCE, &[self.inside]));
        let (subject, key) = (&self.subject, &self.key);
        let tbs = tlv(SEQUENCE, &[self.version, &serial, &inside, issuer, &validity, subject, key, self.unique_id, &extensions]);
        sign(ca, &tbs, self.outside)
    }
}

/// Leaves that nobody may present, and the words for them. `issuer` is the common name of the authority.
pub fn leaves(ca: &Ca, issuer: &str) -> Vec<(&'static str, Leaf, &'static str)> {
    let issuer = name(issuer);
    let holder = ca.leaf(&gateway_id("raw"), |_| {});
    let leaf = |certificate: &Certificate| Leaf { chain: vec![certificate.signed(ca, &issuer).into()], ..holder.clone() };
    let mut all = Vec::new();
    let mut add = |name, expected, change: &dyn Fn(&mut Certificate)| {
        let mut certificate = Certificate::good();
        change(&mut certificate);
        all.push((name, leaf(&certificate), expected));
    };
    let point = |curve: &[u8], bytes: usize| key(&[EC_KEY, curve].concat(), &[vec![4], vec![7; bytes]].concat());
    add("key-p224", "unfit-key", &|c| c.key = point(b"\x06\x05\x2b\x81\x04\x00\x21", 56));
    add("key-p521", "unfit-key", &|c| c.key = point(b"\x06\x05\x2b\x81\x04\x00\x23", 132));
    add("key-secp256k1", "unfit-key", &|c| c.key = point(b"\x06\x05\x2b\x81\x04\x00\x0a", 64));
    add("key-p256-short", "unfit-key", &|c| c.key = point(b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07", 32));
    add("key-without-curve", "unfit-key", &|c| c.key = point(b"", 64));
    add("key-rsa-1024", "unfit-key", &|c| c.key = rsa_key(128));
    add("key-rsa-2040", "unfit-key", &|c| c.key = rsa_key(255));
    add("key-ed448", "unfit-key", &|c| c.key = key(b"\x06\x03\x2b\x65\x71", &[7; 57]));
    add("key-x25519", "unfit-key", &|c| c.key = key(b"\x06\x03\x2b\x65\x6e", &[7; 32]));
    add("key-dsa", "unfit-key", &|c| c.key = key(b"\x06\x07\x2a\x86\x48\xce\x38\x04\x01", &tlv(2, &[&[7; 64]])));
    add("serial-zero", "malformed-certificate", &|c| c.serial = vec![0]);
    add("serial-negative", "malformed-certificate", &|c| c.serial = vec![0x80]);
    add("serial-padded", "malformed-certificate", &|c| c.serial = vec![0, 0, 5]);
    add("serial-too-long", "malformed-certificate", &|c| c.serial = vec![1; 21]);
    add("version-absent", "unsupported", &|c| c.version = b"");
    add("version-2", "unsupported", &|c| c.version = b"\xa0\x03\x02\x01\x01");
    add("version-4", "unsupported", &|c| c.version = b"\xa0\x03\x02\x01\x03");
    add("signed-with-sha1", "unsupported", &|c| (c.inside, c.outside) = (ECDSA_SHA1, ECDSA_SHA1));
    add("signed-with-nothing-known", "unsupported", &|c| (c.inside, c.outside) = (NOBODYS, NOBODYS));
    add("two-signature-algorithms", "bad-signature", &|c| c.outside = ECDSA_SHA1);
    add("time-before-1970", "expired", &|c| {
        (c.not_before, c.not_after) = (tlv(0x17, &[b"500101000000Z"]), tlv(0x17, &[b"600101000000Z"]));
    });
    add("time-with-offset", "malformed-certificate", &|c| c.not_before = tlv(0x17, &[b"250101000000+0100"]));
    add("time-in-month-13", "malformed-certificate", &|c| c.not_before = tlv(0x17, &[b"251301000000Z"]));
    // RFC 5280 section 4.1.2.5, and X.690 section 11.5: what is so without a word is not written.
    add("generalized-time-before-2050", "malformed-certificate", &|c| c.not_before = tlv(0x18, &[b"20250101000000Z"]));
    add("generalized-time-in-2049", "malformed-certificate", &|c| c.not_after = tlv(0x18, &[b"20491231235959Z"]));
    add("critical-false-written-out", "malformed-certificate", &|c| {
        c.extensions.push(tlv(SEQUENCE, &[&tlv(6, &[UNKNOWN]), b"\x01\x01\x00", b"\x04\x02\x05\x00"]));
    });
    add("ca-false-written-out", "malformed-certificate", &|c| c.extensions[0] = extension(b"\x55\x1d\x13", true, b"\x30\x03\x01\x01\x00"));
    add("key-usage-with-zeros-behind", "malformed-certificate", &|c| {
        c.extensions[1] = extension(b"\x55\x1d\x0f", true, b"\x03\x03\x07\x80\x00")
    });
    add("unique-id", "malformed-certificate", &|c| c.unique_id = b"\x82\x03\x00ab");
    add("unknown-extension-twice", "malformed-certificate", &|c| {
        c.extensions.extend([extension(UNKNOWN, false, b"\x05\x00"), extension(UNKNOWN, false, b"\x05\x00")]);
    });
    add("key-identifier-twice", "malformed-certificate", &|c| {
        c.extensions.extend([extension(b"\x55\x1d\x0e", false, b"\x04\x01a"), extension(b"\x55\x1d\x0e", false, b"\x04\x01b")]);
    });
    add("key-usage-twice", "malformed-certificate", &|c| c.extensions.push(extension(b"\x55\x1d\x0f", true, b"\x03\x02\x07\x80")));
    add("key-usage-of-no-bits", "no-digital-signature", &|c| c.extensions[1] = extension(b"\x55\x1d\x0f", true, b"\x03\x01\x00"));
    add("path-length-of-a-leaf", "malformed-certificate", &|c| c.extensions[0] = extension(b"\x55\x1d\x13", true, b"\x30\x03\x02\x01\x00"));
    add("name-constraints-of-a-leaf", "malformed-certificate", &|c| {
        c.extensions.push(extension(b"\x55\x1d\x1e", true, b"\x30\x07\xa0\x05\x30\x03\x82\x01a"));
    });
    add("critical-policy", "unsupported", &|c| c.extensions.push(extension(b"\x55\x1d\x20", true, b"\x30\x06\x30\x04\x06\x02\x2a\x03")));
    add("names-of-indefinite-length", "malformed-certificate", &|c| {
        c.extensions[3] = extension(b"\x55\x1d\x11", false, b"\x30\x80\x86\x02ab\x00\x00");
    });
    let good = gateway_id("raw");
    add("name-with-a-longer-length", "malformed-certificate", &|c| {
        let long = [&[0x86, 0x81, u8::try_from(good.len()).unwrap()], good.as_bytes()].concat();
        c.extensions[3] = extension(b"\x55\x1d\x11", false, &tlv(0x30, &[&long]));
    });
    add("name-in-the-subject-only", "no-subject-alt-name", &|c| {
        c.extensions.truncate(3);
        c.subject = name(&good);
    });
    for (label, expected, list) in [
        ("uri-as-dns-name", "no-uri-name", vec![(0x82, good.as_str())]),
        ("uri-as-email", "no-uri-name", vec![(0x81, good.as_str())]),
        ("name-of-no-kind-beside", "malformed-certificate", vec![(0x8a, "x"), (0x86, good.as_str())]),
        ("uri-and-empty-uri", "several-uri-names", vec![(0x86, good.as_str()), (0x86, "")]),
        ("uri-scheme-in-capitals", "invalid-spiffe-id", vec![(0x86, "SPIFFE://dc1.test/gateway/a")]),
        ("uri-slash-behind", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.test/gateway/a/")]),
        ("uri-two-slashes", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.test//a")]),
        ("uri-empty-user", "invalid-spiffe-id", vec![(0x86, "spiffe://@dc1.test/a")]),
        ("uri-empty-port", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.test:/a")]),
        ("uri-fragment", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.test/a#")]),
        ("uri-escaped-slash", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.test/a%2fb")]),
        ("uri-escaped-domain", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1%2etest/a")]),
        ("uri-space-before", "invalid-spiffe-id", vec![(0x86, " spiffe://dc1.test/a")]),
        ("uri-line-behind", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.test/a\n")]),
        ("uri-of-letters-alike", "invalid-spiffe-id", vec![(0x86, "spiffe://dc1.t\u{435}st/a")]),
        ("uri-without-domain", "invalid-spiffe-id", vec![(0x86, "spiffe:///gateway/a")]),
        ("domain-with-a-dot-behind", "unknown-trust-domain", vec![(0x86, "spiffe://dc1.test./a")]),
        ("domain-with-more-behind", "unknown-trust-domain", vec![(0x86, "spiffe://dc1.test.evil/a")]),
    ] {
        add(label, expected, &|c| c.extensions[3] = names(&list));
    }
    all.push((
        "another-form-of-length",
        Leaf { chain: vec![of_indefinite_length(&holder.chain[0]).into()], ..holder.clone() },
        "malformed-certificate",
    ));
    all.push(("issuer-of-rsa-1024", weak_issuer(ca, &issuer, &holder), "unfit-key"));
    all
}

fn of_indefinite_length(der: &[u8]) -> Vec<u8> {
    [&[0x30, 0x80], &der[4..], &[0, 0]].concat()
}

/// A chain whose middle has a key that anybody may have broken.
fn weak_issuer(ca: &Ca, issuer: &[u8], holder: &Leaf) -> Leaf {
    let mut middle = Certificate { subject: name("weak"), key: rsa_key(128), serial: vec![0x44], ..Certificate::good() };
    middle.extensions =
        vec![extension(b"\x55\x1d\x13", true, b"\x30\x03\x01\x01\xff"), extension(b"\x55\x1d\x0f", true, b"\x03\x02\x01\x06")];
    let rsa: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00";
    let leaf = Certificate { inside: rsa, outside: rsa, ..Certificate::good() };
    Leaf { chain: vec![leaf.signed(ca, &name("weak")).into(), middle.signed(ca, issuer).into()], ..holder.clone() }
}

/// CRLs that must not be loaded, and words of why. `issuer` is the common name of the authority.
pub fn crls(ca: &Ca, issuer: &str) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let number = || extension(CRL_NUMBER, false, b"\x02\x01\x63");
    let part = |content: &[u8]| vec![number(), extension(PARTITION, true, &tlv(SEQUENCE, &[content]))];
    let entry = |oid: &[u8], critical, value: &[u8]| {
        tlv(SEQUENCE, &[b"\x02\x01\x4d", &utc(days(-1)), &tlv(SEQUENCE, &[&extension(oid, critical, value)])])
    };
    let numbered = |value: &[u8]| vec![extension(CRL_NUMBER, false, value)];
    let good = Crl {
        version: b"\x02\x01\x01",
        algorithm: ECDSA_SHA256,
        outside: ECDSA_SHA256,
        next: utc(days(30)),
        entries: vec![],
        extensions: vec![number()],
    };
    let with = |extensions| Crl { extensions, ..good.clone() };
    let of = |entries| Crl { entries, ..good.clone() };
    let partition = "expected a CRL of everything its issuer issued, not a partition";
    let all = [
        ("delta", with(vec![number(), extension(DELTA, true, b"\x02\x01\x01")]), "a complete CRL, not a delta"),
        ("delta that need not be heeded", with(vec![number(), extension(DELTA, false, b"\x02\x01\x01")]), "a complete CRL, not a delta"),
        ("indirect", with(part(b"\x84\x01\xff")), "expected a direct CRL of one issuer"),
        ("of users only", with(part(b"\x81\x01\xff")), partition),
        ("of authorities only", with(part(b"\x82\x01\xff")), partition),
        ("of attributes only", with(part(b"\x85\x01\xff")), "expected"),
        ("of some reasons only", with(part(b"\x83\x02\x01\x02")), partition),
        ("of a place", with(part(b"\xa0\x06\xa0\x04\x86\x02ab")), partition),
        ("with a critical extension", with(vec![number(), extension(UNKNOWN, true, b"\x05\x00")]), "no critical extension"),
        ("with two numbers", with(vec![number(), number()]), "each extension once"),
        (
            "with an extension twice",
            with(vec![number(), extension(UNKNOWN, false, b""), extension(UNKNOWN, false, b"")]),
            "each extension once",
        ),
        ("without a number", with(vec![extension(UNKNOWN, false, b"")]), "a CRL number"),
        ("with a negative number", with(numbered(b"\x02\x01\xff")), "a CRL number"),
        ("with a number of 21 octets", with(numbered(&tlv(2, &[&[0x7f; 21]]))), "a CRL number"),
        ("with a padded number", with(numbered(b"\x02\x03\x00\x00\x05")), "a CRL number"),
        ("of version 1", Crl { version: b"", extensions: vec![], ..good.clone() }, "version 2"),
        ("of version 3", Crl { version: b"\x02\x01\x02", ..good.clone() }, "version 2"),
        ("without nextUpdate", Crl { next: vec![], ..good.clone() }, "a nextUpdate"),
        ("signed with SHA-1", Crl { algorithm: ECDSA_SHA1, outside: ECDSA_SHA1, ..good.clone() }, "an algorithm that is not good enough"),
        ("signed with nothing known", Crl { algorithm: NOBODYS, outside: NOBODYS, ..good.clone() }, "an algorithm that is not good enough"),
        ("of two algorithms", Crl { outside: ECDSA_SHA1, ..good.clone() }, "one signature algorithm"),
        ("with an entry of another issuer", of(vec![entry(b"\x55\x1d\x1d", true, b"\x30\x04\x86\x02ab")]), "expected"),
        ("with a critical extension of an entry", of(vec![entry(UNKNOWN, true, b"\x05\x00")]), "no critical extension"),
        ("with reason 7", of(vec![entry(REASON, false, b"\x0a\x01\x07")]), "reasons for revocation"),
        ("with a serial number in a longer form", of(vec![tlv(SEQUENCE, &[b"\x02\x02\x00\x05", &utc(days(-1))])]), "shortest form"),
        (
            "with FALSE written out",
            with(vec![number(), tlv(SEQUENCE, &[&tlv(6, &[UNKNOWN]), b"\x01\x01\x00", b"\x04\x00"])]),
            "nothing that says FALSE",
        ),
        (
            "with a GeneralizedTime of 2049",
            Crl { next: tlv(0x18, &[b"20491231235959Z"]), ..good.clone() },
            "no GeneralizedTime before 2050",
        ),
        ("with half an entry", of(vec![b"\x30\x03\x02\x01".to_vec()]), "expected"),
    ];
    let mut made: Vec<_> = all.into_iter().map(|(what, crl, words)| (what, crl.signed(ca, &name(issuer)), words)).collect();
    let whole = good.signed(ca, &name(issuer));
    made.push(("of indefinite length", [&[0x30, 0x80], &whole[3..], &[0, 0]].concat(), "malformed"));
    made.push(("with a byte behind", [&whole[..], &[0]].concat(), "malformed"));
    made.push(("twice in one", [&whole[..], &whole].concat(), "malformed"));
    made.push(("a certificate", ca.der.to_vec(), "malformed"));
    made.push(("nothing", Vec::new(), "malformed"));
    made.push((
        "signed by another key of the same name",
        good.signed(&ca.impostor(), &name(issuer)),
        "is not signed by the issuer it names",
    ));
    made
}

#[derive(Clone)]
struct Crl {
    version: &'static [u8],
    algorithm: &'static [u8],
    outside: &'static [u8],
    next: Vec<u8>,
    entries: Vec<Vec<u8>>,
    extensions: Vec<Vec<u8>>,
}

impl Crl {
    fn signed(&self, ca: &Ca, issuer: &[u8]) -> Vec<u8> {
        let entries = if self.entries.is_empty() { vec![] } else { tlv(SEQUENCE, &[&self.entries.concat()]) };
        let extensions = match self.extensions.as_slice() {
            [] => vec![],
            some => tlv(0xa0, &[&tlv(SEQUENCE, &[&some.concat()])]),
        };
        let algorithm = tlv(SEQUENCE, &[self.algorithm]);
        let tbs = tlv(SEQUENCE, &[self.version, &algorithm, issuer, &utc(days(0)), &self.next, &entries, &extensions]);
        sign(ca, &tbs, self.outside)
    }
}
