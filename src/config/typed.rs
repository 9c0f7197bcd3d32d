//! How each kind of value is read from the file.

use std::net::SocketAddr;
use std::path::PathBuf;

use toml::Spanned;
use toml::de::DeValue;

use super::raw::{Reader, Typed};
use super::{
    Address, Bandwidth, ByteSize, Classification, Compression, DiskFormat, Durability, Existing, InvalidQuantity, KeyFile, Label, Role,
    Sandboxing, TimeSpan,
};
use crate::types::{PeerName, SpiffeId, TokenUri, Verify, VmName, VmUuid, is_trust_domain};

const NAME_RULE: &str = "a name of 1–63 letters, digits, `.`, `_` or `-`, starting with a letter, digit or `_`";

/// Values that are TOML strings with a `FromStr`.
macro_rules! from_text {
    ($($type:ty = $expected:expr),+ $(,)?) => {$(
        impl Typed for $type {
            const EXPECTED: &'static str = $expected;

            fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
                value.get_ref().as_str().and_then(|text| text.parse().ok()).ok_or(None)
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+};
}

from_text! {
    VmName = NAME_RULE,
    PeerName = NAME_RULE,
    Label = NAME_RULE,
    VmUuid = "a UUID: 32 hexadecimal digits as 8-4-4-4-12",
    SpiffeId = "a SPIFFE ID like `spiffe://dc1.example.net/gateway/gw-a`",
    Address = "`host:port`, e.g. `gw-b.example.net:4433`",
    SocketAddr = "an IP address and a port, e.g. `127.0.0.1:4433` or `[::]:4433`",
    Compression = Compression::EXPECTED,
    DiskFormat = DiskFormat::EXPECTED,
    Durability = Durability::EXPECTED,
    Existing = Existing::EXPECTED,
    Sandboxing = Sandboxing::EXPECTED,
    Classification = Classification::EXPECTED,
    Role = Role::EXPECTED,
}

/// Values with a unit.
macro_rules! quantity {
    ($($type:ty = $expected:expr),+ $(,)?) => {$(
        impl Typed for $type {
            const EXPECTED: &'static str = $expected;

            fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
                // A bare number gets the same advice with and without quotes.
                let text = match value.get_ref() {
                    DeValue::String(text) => text.as_ref(),
                    DeValue::Integer(number) => number.as_str(),
                    DeValue::Float(number) => number.as_str(),
                    _ => return Err(None),
                };
                text.parse().map_err(|error: InvalidQuantity| error.hint)
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+};
}

quantity! {
    Bandwidth = "a bandwidth with a unit, e.g. `\"1Gbit\"` or `\"10MiB/s\"`",
    ByteSize = "a size with a unit, e.g. `\"256MiB\"`",
    TimeSpan = "a duration with a unit, e.g. `\"300ms\"` or `\"1h\"`",
}

/// Whole numbers.
macro_rules! whole_number {
    ($($type:ty = $expected:expr),+ $(,)?) => {$(
        impl Typed for $type {
            const EXPECTED: &'static str = $expected;

            fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
                let number = value.get_ref().as_integer().and_then(|number| Self::from_str_radix(number.as_str(), number.radix()).ok());
                let quoted = value.get_ref().as_str().and_then(|text| text.parse::<Self>().ok());
                number.ok_or_else(|| quoted.map(|number| format!("write {number} without quotes")))
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+};
}

whole_number! {
    u16 = "a whole number from 0 to 65535",
    u32 = "a whole number from 0 to 4294967295",
}

impl Typed for bool {
    const EXPECTED: &'static str = "`true` or `false`";

    fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        let quoted = matches!(value.get_ref().as_str(), Some("true" | "false"));
        value.get_ref().as_bool().ok_or_else(|| quoted.then(|| "write it without quotes".to_owned()))
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Typed for Verify {
    const EXPECTED: &'static str = "`true`, `false` or `\"full\"`";

    fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        let quoted = || matches!(value.get_ref().as_str(), Some("true" | "false")).then(|| "write it without quotes".to_owned());
        match (value.get_ref().as_bool(), value.get_ref().as_str()) {
            (Some(true), _) => Ok(Self::Yes),
            (Some(false), _) => Ok(Self::No),
            (_, Some("full")) => Ok(Self::Full),
            _ => Err(quoted()),
        }
    }

    fn show(&self) -> String {
        match self {
            Self::Yes => "true",
            Self::No => "false",
            Self::Full => "full",
        }
        .to_owned()
    }
}

/// Paths are relative to the file that names them.
impl Typed for PathBuf {
    const EXPECTED: &'static str = "a path";

    fn read(reader: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        let text = value.get_ref().as_str().filter(|text| !text.is_empty()).ok_or(None)?;
        if text.starts_with("~/") {
            return Err(Some("`~` is not expanded; write the whole path".to_owned()));
        }
        if text.contains(char::is_control) {
            return Err(Some("a path without control characters".to_owned()));
        }
        Ok(reader.base.join(text))
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl Typed for KeyFile {
    const EXPECTED: &'static str = "a path, `credential:` and a name, or `pkcs11:` and which key of which token";

    fn read(reader: &mut Reader, key: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        let text = value.get_ref().as_str();
        if let Some(uri) = text.filter(|text| text.starts_with(TokenUri::SCHEME)) {
            return uri.parse().map(Self::Token).map_err(|_| Some(TokenUri::EXPECTED.to_owned()));
        }
        match text.and_then(|text| text.strip_prefix(Self::CREDENTIAL)) {
            Some(name) => {
                let hint = || "the name of a `LoadCredential=` of the service: letters, digits, `.`, `-`, `_`".to_owned();
                Self::credential(name).ok_or_else(|| Some(hint()))
            }
            None => PathBuf::read(reader, key, value).map(Self::File),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Any text.
impl Typed for String {
    const EXPECTED: &'static str = "a text";

    fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        value.get_ref().as_str().filter(|text| !text.contains('\0')).map(str::to_owned).ok_or(None)
    }

    fn show(&self) -> String {
        self.clone()
    }
}

/// The name of a SPIFFE trust domain.
#[derive(Debug, Clone)]
pub(super) struct TrustDomain(pub(super) String);

impl Typed for TrustDomain {
    const EXPECTED: &'static str = "a trust domain like `dc1.example.net`: lower case letters, digits, `.`, `-`, `_`";

    fn read(_: &mut Reader, _: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        let text = value.get_ref().as_str().ok_or(None)?;
        if let Some(rest) = text.strip_prefix("spiffe://") {
            return Err(Some(format!("write `{}` without the scheme", rest.trim_end_matches('/').escape_debug())));
        }
        if is_trust_domain(text) { Ok(Self(text.to_owned())) } else { Err(None) }
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// Lists; every wrong element is its own problem.
impl<T: Typed> Typed for Vec<T> {
    const EXPECTED: &'static str = "a list in brackets";

    fn read(reader: &mut Reader, key: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>> {
        let Some(elements) = value.get_ref().as_array() else {
            let single = value.get_ref().as_str().map(|text| format!("write [\"{}\"]", text.escape_debug()));
            return Err(single);
        };
        let mut list = Self::new();
        let mut whole = true;
        for (index, element) in elements.iter().enumerate() {
            let path = format!("{key}[{index}]");
            match T::read(reader, &path, element) {
                Ok(value) => list.push(value),
                Err(hint) => {
                    reader.wrong(element, &path, T::EXPECTED, hint);
                    whole = false;
                }
            }
        }
        if whole { Ok(list) } else { Err(None) }
    }

    fn show(&self) -> String {
        let elements: Vec<String> = self.iter().map(Typed::show).collect();
        format!("[{}]", elements.join(", "))
    }
}
