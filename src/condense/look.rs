//! Looks at the next bytes of a stream without taking them.

use super::Unsound;

/// Why a step cannot be taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The bytes end inside of it.
    Short,
    /// It may be sound, and is nothing that is known here.
    Unknown(&'static str),
    /// It is not sound.
    Unsound(Unsound),
}

/// Reads numbers and names, all big-endian. `from` is where in the stream the bytes begin.
#[derive(Debug)]
pub(super) struct Look<'a> {
    bytes: &'a [u8],
    at: usize,
    from: u64,
}

impl<'a> Look<'a> {
    pub(super) fn new(bytes: &'a [u8], from: u64) -> Self {
        Self { bytes, at: 0, from }
    }

    /// Bytes looked at.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Bytes that can be looked at.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], Stop> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..count)).ok_or(Stop::Short)?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        self.take(N)?.try_into().map_err(|_| Stop::Short)
    }

    pub(super) fn peek(&self) -> Result<u8, Stop> {
        self.bytes.get(self.at).copied().ok_or(Stop::Short)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_be_bytes)
    }

    /// A name of so many bytes.
    pub(super) fn name(&mut self, bytes: usize) -> Result<&'a str, Stop> {
        let name = self.take(bytes)?;
        match std::str::from_utf8(name) {
            Ok(name) if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(name),
            _ => Err(self.unsound("a printable name", &name.escape_ascii().to_string())),
        }
    }

    /// A name behind a byte that says how long it is.
    pub(super) fn short_name(&mut self) -> Result<&'a str, Stop> {
        let bytes = self.u8()?;
        self.name(usize::from(bytes))
    }

    pub(super) fn unsound(&self, expected: &'static str, got: &str) -> Stop {
        // WHY: what a stream says is shown to people, and a name has at most 255 bytes.
        let got = got.chars().take(SHOWN_MAX).collect();
        Stop::Unsound(Unsound { at: self.from + self.at as u64, expected, got })
    }
}

const SHOWN_MAX: usize = 120;
