//! Small checked values that every module may name.
//!
//! *Owns:* identifiers and newtypes with checked constructors. *Never:* behaviour, I/O, policy.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits;

/// Size of a guest page, in bytes. Everything that counts pages counts these.
pub const PAGE_BYTES: usize = 4096;

/// A value that was refused, with what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {kind} `{value}`: expected {expected}")]
pub struct InvalidValue {
    /// What the value was meant to be, e.g. `VM name`.
    pub kind: &'static str,
    /// The value as given, cut to a printable length.
    pub value: String,
    /// The rule that it breaks.
    pub expected: &'static str,
}

impl InvalidValue {
    fn new(kind: &'static str, value: &str, expected: &'static str) -> Self {
        let value = value.chars().take(80).flat_map(char::escape_default).collect();
        Self { kind, value, expected }
    }
}

/// How memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Everything before the switch.
    #[default]
    Precopy,
    /// The guest is switched at once, and what it lacks follows, what it asks for first.
    Postcopy,
    /// Passes before the switch as long as they bring it closer, then the rest behind it.
    Hybrid,
}

impl Mode {
    /// Whether the guest may run at the destination before all of its pages are there.
    #[must_use]
    pub fn may_split(self) -> bool {
        self != Self::Precopy
    }

    /// Whether it may not.
    #[must_use]
    pub fn is_precopy(&self) -> bool {
        *self == Self::Precopy
    }
}

/// The name an operator gives a VM: 1–63 of `a-z A-Z 0-9 . _ -`, not starting with `.` or `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_name(text: &str) -> bool {
    (1..=limits::NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !text.starts_with(['.', '-'])
}

impl FromStr for VmName {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new("VM name", text, "1–63 letters, digits, `.`, `_` or `-`, starting with a letter, digit or `_`"))
        }
    }
}

/// The name an operator gives a peer gateway in the configuration; same rule as [`VmName`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(String);

impl PeerName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerName {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if is_name(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new("peer name", text, "1–63 letters, digits, `.`, `_` or `-`, starting with a letter, digit or `_`"))
        }
    }
}

macro_rules! text_conversions {
    ($($type:ident),*) => {$(
        impl TryFrom<String> for $type {
            type Error = InvalidValue;
            fn try_from(text: String) -> Result<Self, InvalidValue> {
                text.parse()
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    )*};
}
text_conversions!(VmName, PeerName, VmUuid, GenerationId, MigrationId, Incarnation, SpiffeId, TokenUri);

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn parse_hex16(text: &str) -> Option<[u8; 16]> {
    let mut out = [0; 16];
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// A VM's UUID (RFC 9562), the identity that policy is written about. Shown as 8-4-4-4-12.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmUuid(pub [u8; 16]);

impl fmt::Display for VmUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for VmUuid {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let refuse = || InvalidValue::new("VM UUID", text, "32 hexadecimal digits as 8-4-4-4-12");
        let shape = text.len() == 36 && text.bytes().enumerate().all(|(i, b)| (b == b'-') == matches!(i, 8 | 13 | 18 | 23));
        if !shape {
            return Err(refuse());
        }
        parse_hex16(&text.replace('-', "")).map(Self).ok_or_else(refuse)
    }
}

/// The VM generation id that a guest reads (VMGENID): 128 random bits, new whenever the guest may repeat
/// a part of its past. Shown as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GenerationId(pub [u8; 16]);

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl FromStr for GenerationId {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        parse_hex16(text).map(Self).ok_or_else(|| InvalidValue::new("VM generation id", text, "32 hexadecimal digits"))
    }
}

/// One attempt to move one VM; 128 random bits, shown as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl FromStr for MigrationId {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        parse_hex16(text).map(Self).ok_or_else(|| InvalidValue::new("migration id", text, "32 hexadecimal digits"))
    }
}

/// The identity of one gateway journal: new when the journal is new, the same across restarts.
/// A REFUSE counts only from the incarnation that was offered the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(pub [u8; 16]);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl FromStr for Incarnation {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        parse_hex16(text).map(Self).ok_or_else(|| InvalidValue::new("incarnation", text, "32 hexadecimal digits"))
    }
}

/// How often ownership of a VM has moved; the fencing token. Grows by one with each handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch that the next owner gets.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One pass over dirty pages; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Round(pub u32);

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which lane of a migration, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct LaneIndex(pub u16);

impl fmt::Display for LaneIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A page of guest RAM, counted through the regions of the layout without the holes:
/// page `n` is bytes `n * 4096 ..` of the guest's memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageNumber(pub u64);

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One contiguous piece of guest-physical RAM. Both fields are multiples of [`PAGE_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RamRegion {
    /// First guest-physical address.
    pub guest_base: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Which end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the VM runs before.
    Source,
    /// Where the VM runs after.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// A workload identity, `spiffe://trust-domain/path` (SPIFFE-ID standard, sections 2.1–2.4):
/// lower-case trust domain, non-empty path of `a-z A-Z 0-9 . - _` segments, no trailing slash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    text: String,
    trust_domain_end: usize,
}

const SPIFFE_SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// The trust domain, e.g. `dc1.example.net`.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.text[SPIFFE_SCHEME.len()..self.trust_domain_end]
    }

    /// The path with its leading slash, e.g. `/gateway/gw-a`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.text[self.trust_domain_end..]
    }

    /// The whole identity.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Whether `text` is a SPIFFE trust domain name.
#[must_use]
pub fn is_trust_domain(text: &str) -> bool {
    (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'))
}

impl FromStr for SpiffeId {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let refuse = || InvalidValue::new("SPIFFE ID", text, "`spiffe://trust-domain/path`");
        let rest = text.strip_prefix(SPIFFE_SCHEME).filter(|_| text.len() <= limits::SPIFFE_ID_BYTES_MAX).ok_or_else(refuse)?;
        let (domain, path) = rest.split_once('/').ok_or_else(refuse)?;
        let segment_ok = |s: &str| {
            !s.is_empty() && s != "." && s != ".." && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        if !is_trust_domain(domain) || !path.split('/').all(segment_ok) {
            return Err(refuse());
        }
        Ok(Self { text: text.to_owned(), trust_domain_end: SPIFFE_SCHEME.len() + domain.len() })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Which private key of which token, by RFC 7512: `pkcs11:token=sealane;object=gateway`. A token is named by label, serial number,
/// manufacturer or model, a key by its label or identifier.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenUri {
    text: String,
    attributes: Vec<(&'static str, Vec<u8>)>,
}

impl TokenUri {
    /// How one begins.
    pub const SCHEME: &'static str = "pkcs11:";
    /// What may be written, for messages.
    pub const EXPECTED: &'static str =
        "`pkcs11:` with `token` or `serial`, and `object` or `id`; also `manufacturer`, `model` and `type=private`, divided by `;`";
    const TOKEN: [&'static str; 4] = ["token", "serial", "manufacturer", "model"];
    const OBJECT: [&'static str; 2] = ["object", "id"];

    /// The value of an attribute, if it is there.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&[u8]> {
        self.attributes.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_slice())
    }

    /// Whether a token that says this of itself is meant.
    pub fn names_token<'a>(&self, says: impl Fn(&str) -> &'a str) -> bool {
        Self::TOKEN.iter().all(|name| self.attribute(name).is_none_or(|wanted| wanted == says(name).as_bytes()))
    }

    fn read(text: &str) -> Option<Vec<(&'static str, Vec<u8>)>> {
        let path = text.strip_prefix(Self::SCHEME).filter(|_| text.len() <= limits::TOKEN_URI_BYTES_MAX)?;
        let mut attributes: Vec<(&'static str, Vec<u8>)> = Vec::new();
        for attribute in path.split(';') {
            let (name, value) = attribute.split_once('=')?;
            let value = decoded(value).filter(|value| !value.is_empty())?;
            if name == "type" && value == b"private" {
                continue;
            }
            let name = Self::TOKEN.into_iter().chain(Self::OBJECT).find(|known| *known == name)?;
            // Everything but an identifier is text.
            if attributes.iter().any(|(known, _)| *known == name) || (name != "id" && std::str::from_utf8(&value).is_err()) {
                return None;
            }
            attributes.push((name, value));
        }
        let has = |names: &[&str]| attributes.iter().any(|(name, _)| names.contains(name));
        (has(&["token", "serial"]) && has(&Self::OBJECT)).then_some(attributes)
    }
}

/// Text of a URI without its percent signs. What RFC 3986 wants to have written with them has them.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex = |digit: Option<u8>| char::from(digit?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        match byte {
            b'%' => bytes.push(hex(rest.next())? << 4 | hex(rest.next())?),
            b'?' | b'#' | b'/' | b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' => return None,
            byte if byte.is_ascii_graphic() => bytes.push(byte),
            _ => return None,
        }
    }
    Some(bytes)
}

impl FromStr for TokenUri {
    type Err = InvalidValue;
    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let attributes = Self::read(text).ok_or_else(|| InvalidValue::new("PKCS#11 URI", text, Self::EXPECTED))?;
        Ok(Self { text: text.to_owned(), attributes })
    }
}

impl fmt::Display for TokenUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What is compared at both ends before the switch. Device state always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// No memory.
    No,
    /// All memory, read while the guest runs; in the pause only what it has written since, by its dirty log.
    Yes,
    /// All memory, read in the pause: also finds what the dirty log has missed.
    Full,
}

impl Verify {
    /// What may be written, for messages.
    pub const EXPECTED: &'static str = "`yes`, `no` or `full`";
}

impl std::str::FromStr for Verify {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "yes" => Ok(Self::Yes),
            "no" => Ok(Self::No),
            "full" => Ok(Self::Full),
            _ => Err(Self::EXPECTED),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_refuse_paths_spaces_and_excess() {
        for good in ["vm-1", "a", "_x", "A.b_c-9"] {
            assert_eq!(good.parse::<VmName>().unwrap().as_str(), good);
        }
        let long = "x".repeat(limits::NAME_BYTES_MAX + 1);
        for bad in ["", "../etc", "a b", "-x", ".x", "a/b", "vm\n", long.as_str()] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn spiffe_ids_split_into_domain_and_path() {
        let id: SpiffeId = "spiffe://dc1.example.net/gateway/gw-a".parse().unwrap();
        assert_eq!((id.trust_domain(), id.path()), ("dc1.example.net", "/gateway/gw-a"));
        for bad in [
            "spiffe://DC1/x",
            "spiffe://dc1",
            "spiffe://dc1/",
            "spiffe://dc1/a//b",
            "http://dc1/x",
            "spiffe:///x",
            "spiffe://dc1/../x",
            "spiffe://dc1:80/x",
            "spiffe://dc1/x?y",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn uris_of_keys_in_tokens_name_a_token_and_a_key_and_nothing_that_is_not_heeded() {
        let uri: TokenUri = "pkcs11:token=The%20Software%20PKCS%2311;id=%01%ffA;type=private;serial=1".parse().unwrap();
        assert_eq!(uri.attribute("token"), Some(&b"The Software PKCS#11"[..]));
        assert_eq!(uri.attribute("id"), Some(&[1, 0xff, b'A'][..]));
        assert_eq!(uri.attribute("object"), None);
        let says = |serial: &'static str| move |name: &str| if name == "serial" { serial } else { "The Software PKCS#11" };
        assert!(uri.names_token(says("1")) && !uri.names_token(says("2")));
        let long = format!("pkcs11:token={};object=b", "x".repeat(limits::TOKEN_URI_BYTES_MAX));
        for bad in [
            "pkcs11:",
            "pkcs11:token=a",
            "pkcs11:object=b",
            "pkcs11:manufacturer=a;object=b",
            "pkcs11:token=a;object=b;",
            "pkcs11:token=a;object=b?pin-value=1234",
            "pkcs11:token=a;object=b;type=cert",
            "pkcs11:token=a;token=b;object=c",
            "pkcs11:token=a;object=b;slot-id=1",
            "pkcs11:token=;object=b",
            "pkcs11:token=a;object=%zz",
            "pkcs11:token=a;object=%f",
            "pkcs11:token=%ff;object=b",
            "pkcs11:token=a b;object=c",
            "pkcs11:token=a/b;object=c",
            "PKCS11:token=a;object=b",
            long.as_str(),
        ] {
            assert!(bad.parse::<TokenUri>().is_err(), "{bad}");
        }
    }

    #[test]
    fn identifiers_round_trip_through_text() {
        let uuid = VmUuid([0xab; 16]);
        assert_eq!(uuid.to_string().parse::<VmUuid>().unwrap(), uuid);
        let id = MigrationId([7; 16]);
        assert_eq!(id.to_string().parse::<MigrationId>().unwrap(), id);
        let id = GenerationId([0xcd; 16]);
        assert_eq!(id.to_string().parse::<GenerationId>().unwrap(), id);
        assert!("abababab-abab-abab-abab-ababababababab".parse::<VmUuid>().is_err());
        assert!("zz".repeat(16).parse::<MigrationId>().is_err());
    }
}
