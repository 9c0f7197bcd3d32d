//! The gateway as a client of a hypervisor that exports its disks.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::protocol::{
    FIXED_NEWSTYLE, GREETING, NO_ZEROES, OPTION, OPTION_REPLY, REPLY, REQUEST, answer, array, broken, command, flag, info, magic, option,
};
use crate::limits;
use crate::wire::DiskChange;

/// Enters an export; its bytes.
///
/// # Errors
/// The server is gone, speaks something else, has no such export, or one that cannot be used: for changes it has to take writes,
/// flushes and zeroes.
pub async fn enter<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, name: &str, to_change: bool) -> io::Result<u64> {
    magic(stream, GREETING, "a greeting of NBD").await?;
    magic(stream, OPTION, "a server that takes options").await?;
    let flags = stream.read_u16().await?;
    if flags & FIXED_NEWSTYLE == 0 || flags & NO_ZEROES == 0 {
        return Err(broken(format!("a server with the flags {flags:#x}: expected fixed newstyle without padding")));
    }
    stream.write_u32(u32::from(FIXED_NEWSTYLE | NO_ZEROES)).await?;
    let length = u32::try_from(name.len()).map_err(|_| broken("a name without end"))?;
    let mut ask = OPTION.to_be_bytes().to_vec();
    ask.extend(option::GO.to_be_bytes());
    ask.extend((length + 6).to_be_bytes());
    ask.extend(length.to_be_bytes());
    ask.extend(name.as_bytes());
    ask.extend(0_u16.to_be_bytes());
    stream.write_all(&ask).await?;
    let mut found = None;
    for _ in 0..limits::NBD_OPTIONS_MAX {
        magic(stream, OPTION_REPLY, "an answer to an option").await?;
        let (kind, reply, length) = (stream.read_u32().await?, stream.read_u32().await?, stream.read_u32().await?);
        if kind != option::GO || length > limits::NBD_OPTION_BYTES_MAX {
            return Err(broken(format!("an answer of {length} bytes to option {kind}")));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        stream.read_exact(&mut data).await?;
        match reply {
            answer::INFO => found = export(&data).or(found),
            answer::ACK => return usable(found, name, to_change),
            _ => {
                let why = String::from_utf8_lossy(&data).chars().filter(|c| !c.is_control()).collect::<String>();
                return Err(broken(format!("export `{name}` is refused with {reply:#x}: `{why}`")));
            }
        }
    }
    Err(broken("facts of an export without end"))
}

fn export(data: &[u8]) -> Option<(u64, u16)> {
    let (kind, rest) = data.split_first_chunk()?;
    let (bytes, rest) = rest.split_first_chunk()?;
    let (flags, _) = rest.split_first_chunk()?;
    (u16::from_be_bytes(*kind) == info::EXPORT).then(|| (u64::from_be_bytes(*bytes), u16::from_be_bytes(*flags)))
}

fn usable(found: Option<(u64, u16)>, name: &str, to_change: bool) -> io::Result<u64> {
    let (bytes, flags) = found.ok_or_else(|| broken(format!("export `{name}` has no size")))?;
    let needed = flag::FLUSH | flag::WRITE_ZEROES;
    if to_change && (flags & flag::READ_ONLY != 0 || flags & needed != needed) {
        return Err(broken(format!("export `{name}` has the flags {flags:#x}: expected one that takes writes, zeroes and flushes")));
    }
    if bytes > limits::DISK_BYTES_MAX {
        return Err(broken(format!("export `{name}` has {bytes} bytes: expected at most {}", limits::DISK_BYTES_MAX)));
    }
    Ok(bytes)
}

/// The head of a request for a change; what is written follows it.
#[must_use]
pub fn request(cookie: u64, change: DiskChange, offset: u64, bytes: u32) -> Vec<u8> {
    let command = match change {
        DiskChange::Write => command::WRITE,
        DiskChange::Zero => command::WRITE_ZEROES,
        DiskChange::Discard => command::TRIM,
        DiskChange::Flush => command::FLUSH,
    };
    head(cookie, command, offset, bytes)
}

fn head(cookie: u64, command: u16, offset: u64, bytes: u32) -> Vec<u8> {
    let mut head = Vec::with_capacity(28);
    head.extend(REQUEST.to_be_bytes());
    head.extend(0_u16.to_be_bytes());
    head.extend(command.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head.extend(offset.to_be_bytes());
    head.extend(bytes.to_be_bytes());
    head
}

/// The next answer: which request, and what became of it.
///
/// # Errors
/// The server is gone or speaks something else.
pub async fn read_reply<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<(u64, io::Result<()>)> {
    let got = u32::from_be_bytes(array(reader).await?);
    if got != REPLY {
        return Err(broken(format!("a reply that begins with {got:#x}")));
    }
    let (error, cookie) = (reader.read_u32().await?, reader.read_u64().await?);
    // NBD numbers errors as Linux does.
    let result = match i32::try_from(error) {
        Ok(0) => Ok(()),
        Ok(number) => Err(io::Error::from_raw_os_error(number)),
        Err(_) => Err(broken(format!("error {error}"))),
    };
    Ok((cookie, result))
}

/// Reads `buffer` from an export; the only request of this connection that is under way.
///
/// # Errors
/// The server is gone, speaks something else, or cannot read its disk.
pub async fn read_block<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let bytes = u32::try_from(buffer.len()).map_err(|_| broken("a block without end"))?;
    stream.write_all(&head(offset, command::READ, offset, bytes)).await?;
    match read_reply(stream).await? {
        (cookie, Ok(())) if cookie == offset => stream.read_exact(buffer).await.map(drop),
        (_, Err(error)) => Err(error),
        (cookie, _) => Err(broken(format!("a reply to request {cookie}: expected {offset}"))),
    }
}
