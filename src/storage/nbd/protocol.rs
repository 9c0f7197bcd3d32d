//! Numbers of the protocol that both ends have in common (`NetworkBlockDevice/nbd`, `doc/proto.md`).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// First words of a server.
pub(super) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// In front of options, and second word of a server that takes them.
pub(super) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(super) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST: u32 = 0x2560_9513;
pub(super) const REPLY: u32 = 0x6744_6698;

/// The server takes any option and says no to what it does not know; no padding behind the greeting.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) mod option {
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
}

pub(super) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const UNSUPPORTED: u32 = 1 << 31 | 1;
    pub(crate) const INVALID: u32 = 1 << 31 | 3;
    pub(crate) const UNKNOWN: u32 = 1 << 31 | 6;
}

pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(super) mod flag {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
}

pub(super) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
}

/// `EINVAL`, which NBD numbers as Linux does.
pub(super) const INVALID: u32 = 22;

pub(super) fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

pub(super) async fn array<const N: usize>(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes).await?;
    Ok(bytes)
}

pub(super) async fn magic(reader: &mut (impl AsyncRead + Unpin), wanted: u64, what: &str) -> io::Result<()> {
    let got = reader.read_u64().await?;
    if got == wanted { Ok(()) } else { Err(broken(format!("{what}: expected {wanted:#x}, got {got:#x}"))) }
}
