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
text_conversions!(VmName, PeerName, VmUuid, GenerationId, MigrationId, Incarnation, SpiffeId);

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
