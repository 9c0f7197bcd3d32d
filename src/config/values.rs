//! Values that appear in the file, each with the rule that it has to keep.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::types::{InvalidValue, TokenUri, VmName};

/// A name of a site, tenant, group or team; the same rule as a VM's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(String);

impl Label {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        text.parse::<VmName>().map(|name| Self(name.as_str().to_owned())).map_err(|error| InvalidValue { kind: "name", ..error })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host and a port, not yet resolved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    /// Name or address of the host, IPv6 without brackets.
    pub host: String,
    /// UDP port, not 0.
    pub port: u16,
}

impl Address {
    /// Whether it has to be looked up.
    #[must_use]
    pub fn is_name(&self) -> bool {
        self.host.parse::<std::net::IpAddr>().is_err()
    }
}

impl FromStr for Address {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let refuse = || InvalidValue {
            kind: "address",
            value: text.chars().take(80).flat_map(char::escape_default).collect(),
            expected: "`host:port`",
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(refuse)?;
        let port: u16 = port.parse().ok().filter(|port| *port != 0).ok_or_else(refuse)?;
        let host = if let Some(v6) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            v6.parse::<std::net::Ipv6Addr>().map_err(|_| refuse())?.to_string()
        } else {
            let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
            // LIMIT: a DNS name has at most 253 characters.
            if !(1..=253).contains(&host.len()) || !host.bytes().all(name) {
                return Err(refuse());
            }
            host.to_owned()
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') { write!(f, "[{}]:{}", self.host, self.port) } else { write!(f, "{}:{}", self.host, self.port) }
    }
}

/// Where a private key is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeyFile {
    /// A file of its own.
    File(PathBuf),
    /// What systemd gives the service under this name: `LoadCredential=NAME:…`.
    Credential(String),
    /// A PKCS#11 token, which does not give it away.
    Token(TokenUri),
}

impl KeyFile {
    /// How a credential is written.
    pub(super) const CREDENTIAL: &'static str = "credential:";

    /// A credential of that name; the rule is systemd's for names, without what is confusing in a path.
    pub(super) fn credential(name: &str) -> Option<Self> {
        let fits = (1..=255).contains(&name.len()) && !name.starts_with('.');
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        (fits && name.bytes().all(plain)).then(|| Self::Credential(name.to_owned()))
    }

    /// The file. Nothing where a credential is wanted and systemd has named no directory of credentials, as it does for the service
    /// alone.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::File(path) => Some(path.clone()),
            Self::Token(_) => None,
            Self::Credential(name) => {
                let directory = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from).filter(|path| path.is_absolute());
                directory.map(|directory| directory.join(name))
            }
        }
    }
}

impl fmt::Display for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Credential(name) => write!(f, "{}{name}", Self::CREDENTIAL),
            Self::Token(uri) => uri.fmt(f),
        }
    }
}

/// Declares an enum that is written as one of a few words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $expected:literal { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant),+
        }

        impl $name {
            /// What may be written, for messages.
            pub const EXPECTED: &'static str = $expected;

            /// The word in the file.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl FromStr for $name {
            type Err = InvalidValue;

            fn from_str(text: &str) -> Result<Self, InvalidValue> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(InvalidValue {
                        kind: stringify!($name),
                        value: text.chars().take(80).flat_map(char::escape_default).collect(),
                        expected: $expected,
                    }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }
    };
}

words! {
    /// Codec of page batches.
    Compression, "`auto`, `none`, `lz4` or `zstd`" {
        /// Whatever gets the pages there soonest.
        Auto = "auto",
        /// Pages as they are.
        None = "none",
        /// LZ4 block format.
        Lz4 = "lz4",
        /// Zstandard.
        Zstd = "zstd",
    }
}
words! {
    /// Where the final image is on disk before the switch.
    Durability, "`none`, `dest` or `both`" {
        /// Nowhere.
        None = "none",
        /// At the destination.
        Destination = "dest",
        /// At both ends.
        Both = "both",
    }
}
words! {
    /// What the file of a disk is.
    DiskFormat, "`raw` or `qcow2`" {
        /// The bytes of the disk, with holes.
        Raw = "raw",
        /// QEMU's own.
        Qcow2 = "qcow2",
    }
}
words! {
    /// What becomes of a file that is where a disk is to be laid.
    Existing, "`refuse` or `set-aside`" {
        /// The VM does not come.
        Refuse = "refuse",
        /// It is renamed.
        SetAside = "set-aside",
    }
}
words! {
    /// What a gateway does where its kernel cannot confine it.
    Sandboxing, "`require`, `auto` or `off`" {
        /// It does not start.
        Require = "require",
        /// It does without what is missing, and says so.
        Auto = "auto",
        /// It is not confined.
        Off = "off",
    }
}
words! {
    /// How sensitive a VM is.
    Classification, "`public`, `internal` or `restricted`" {
        /// For everyone.
        Public = "public",
        /// For this organisation.
        Internal = "internal",
        /// For few.
        Restricted = "restricted",
    }
}
words! {
    /// What an operator may ask of the control socket, before policy is asked.
    Role, "`admin`, `operator` or `viewer`" {
        /// Everything.
        Admin = "admin",
        /// Start, change and cancel migrations.
        Operator = "operator",
        /// Look.
        Viewer = "viewer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_a_host_and_a_port() {
        for (text, host, port) in
            [("gw-b.example:4433", "gw-b.example", 4433), ("[::1]:1", "::1", 1), ("10.0.0.1:65535", "10.0.0.1", 65535)]
        {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port, address.to_string().as_str()), (host, port, text));
        }
        for text in ["", "host", "host:", ":1", "host:0", "host:65536", "::1:1", "[::1:1", "a b:1", "[x]:1", "host:1:2", "https://h:1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
