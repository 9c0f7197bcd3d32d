//! The one bounds-checked way from bytes to fields, and its mirror.

use crate::wire::error::printable;
use crate::wire::{LaneTotals, WireError};

/// Reads the fields of one message. Nothing is allocated before its length is checked.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(message: &'static str, bytes: &'a [u8]) -> Self {
        Self { message, rest: bytes }
    }

    pub(super) fn take(&mut self, field: &'static str, count: usize) -> Result<&'a [u8], WireError> {
        let truncated = WireError::Truncated { message: self.message, field, expected: count, got: self.rest.len() };
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let truncated = WireError::Truncated { message: self.message, field, expected: N, got: self.rest.len() };
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(super) fn u128(&mut self, field: &'static str) -> Result<u128, WireError> {
        self.array(field).map(u128::from_le_bytes)
    }

    /// An id that is drawn at random; all zeroes stand for none where one has to be named.
    pub(super) fn drawn(&mut self, field: &'static str) -> Result<[u8; 16], WireError> {
        let id = self.array(field)?;
        if id == [0; 16] { Err(self.malformed(field, "one that was drawn at random, not all zeroes", b"0")) } else { Ok(id) }
    }

    /// Refuses a value outside `min..=max`.
    pub(super) fn bounded<T: Copy + Into<u64>>(&self, field: &'static str, got: T, min: u64, max: u64) -> Result<T, WireError> {
        let value = got.into();
        if (min..=max).contains(&value) {
            return Ok(got);
        }
        Err(WireError::OutOfBounds { message: self.message, field, min, max, got: value })
    }

    /// A length or count as `u32`, refused outside `min..=max`.
    pub(super) fn length(&mut self, field: &'static str, min: usize, max: usize) -> Result<usize, WireError> {
        let got = self.u32(field)?;
        let got = self.bounded(field, got, min as u64, max as u64)?;
        Ok(usize::try_from(got).unwrap_or(max))
    }

    pub(super) fn bytes(&mut self, field: &'static str, max: usize) -> Result<&'a [u8], WireError> {
        let count = self.length(field, 0, max)?;
        self.take(field, count)
    }

    pub(super) fn text(&mut self, field: &'static str, max: usize) -> Result<&'a str, WireError> {
        let bytes = self.bytes(field, max)?;
        std::str::from_utf8(bytes).map_err(|_| self.malformed(field, "UTF-8", bytes))
    }

    /// A yes or no as 1 or 0.
    pub(super) fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        let got = self.u8(field)?;
        self.bounded(field, got, 0, 1).map(|got| got == 1)
    }

    /// The value whose number came, or a refusal that says what is known.
    pub(super) fn known<T>(&self, field: &'static str, expected: &'static str, got: u64, value: Option<T>) -> Result<T, WireError> {
        value.ok_or(WireError::Unknown { message: self.message, field, expected, got })
    }

    pub(super) fn malformed(&self, field: &'static str, expected: &'static str, got: &[u8]) -> WireError {
        WireError::Malformed { message: self.message, field, expected, got: printable(got) }
    }

    pub(super) fn totals(&mut self) -> Result<LaneTotals, WireError> {
        let (frames, pages, bytes) = (self.u64("frames")?, self.u64("pages")?, self.u64("bytes")?);
        Ok(LaneTotals { frames, pages, bytes, digest: self.u128("digest")? })
    }

    /// Refuses bytes after the last field.
    pub(super) fn finish(&self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(WireError::Trailing { message: self.message, got: self.rest.len() })
    }
}

/// Appends fields to a buffer, in the form that [`Reader`] takes.
pub(super) trait Writer {
    fn put(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    fn put_u128(&mut self, value: u128) {
        self.put(&value.to_le_bytes());
    }

    /// A length that does not fit is written as the largest number, which every reader refuses.
    fn put_length(&mut self, length: usize) {
        self.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    }

    fn put_totals(&mut self, totals: &LaneTotals) {
        self.put_u64(totals.frames);
        self.put_u64(totals.pages);
        self.put_u64(totals.bytes);
        self.put_u128(totals.digest);
    }

    fn put_bytes(&mut self, bytes: &[u8]) {
        self.put_length(bytes.len());
        self.put(bytes);
    }
}

impl Writer for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
