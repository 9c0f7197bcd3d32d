//! The gateway as a server, to the hypervisor at the source: it takes changes, and answers when they are at the destination.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::protocol::{
    FIXED_NEWSTYLE, GREETING, INVALID, NO_ZEROES, OPTION, OPTION_REPLY, REPLY, REQUEST, answer, array, broken, command, flag, info, magic,
    option,
};
use crate::limits;
use crate::wire::DiskChange;

/// A disk that changes are taken for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdExport {
    /// What the client calls it.
    pub name: String,
    /// How long it is.
    pub bytes: u64,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAsked {
    /// A change within the export.
    Change {
        /// Comes back in the reply.
        cookie: u64,
        /// What becomes of the range.
        change: DiskChange,
        /// Where it begins.
        offset: u64,
        /// How long it is; 0 of a flush.
        bytes: u32,
        /// What is written; empty otherwise.
        data: Vec<u8>,
    },
    /// Something that is answered with this error at once.
    Refused {
        /// Comes back in the reply.
        cookie: u64,
        /// The error.
        error: u32,
    },
    /// Nothing more.
    Disconnect,
}

/// Greets a client and lets it choose; the index of its export. Nothing when it leaves without one.
///
/// # Errors
/// The client is gone, or speaks something else.
pub async fn welcome<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, exports: &[NbdExport]) -> io::Result<Option<usize>> {
    let mut hello = Vec::with_capacity(18);
    hello.extend(GREETING.to_be_bytes());
    hello.extend(OPTION.to_be_bytes());
    hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&hello).await?;
    let flags = stream.read_u32().await?;
    if flags & u32::from(FIXED_NEWSTYLE) == 0 || flags & u32::from(NO_ZEROES) == 0 {
        return Err(broken(format!("a client with the flags {flags:#x}: expected fixed newstyle without padding")));
    }
    for _ in 0..limits::NBD_OPTIONS_MAX {
        magic(stream, OPTION, "an option").await?;
        let (kind, length) = (stream.read_u32().await?, stream.read_u32().await?);
        if length > limits::NBD_OPTION_BYTES_MAX {
            return Err(broken(format!("an option of {length} bytes: expected at most {}", limits::NBD_OPTION_BYTES_MAX)));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        stream.read_exact(&mut data).await?;
        match kind {
            option::GO | option::INFO => {
                let chosen = wanted(&data).map(|name| exports.iter().position(|export| export.name.as_bytes() == name));
                match chosen {
                    None => answer_option(stream, kind, answer::INVALID, &[]).await?,
                    Some(None) => answer_option(stream, kind, answer::UNKNOWN, &[]).await?,
                    Some(Some(index)) => {
                        let bytes = exports.get(index).map_or(0, |export| export.bytes);
                        describe(stream, kind, bytes).await?;
                        if kind == option::GO {
                            return Ok(Some(index));
                        }
                    }
                }
            }
            option::ABORT => {
                let _ = answer_option(stream, kind, answer::ACK, &[]).await;
                return Ok(None);
            }
            // Structured replies, contexts, TLS: none of it helps somebody who only writes, over a socket of this host.
            _ => answer_option(stream, kind, answer::UNSUPPORTED, &[]).await?,
        }
    }
    Err(broken(format!("more than {} options", limits::NBD_OPTIONS_MAX)))
}

/// The name in an option that asks for an export.
fn wanted(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_first_chunk()?;
    let (name, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    let (count, kinds) = rest.split_first_chunk()?;
    // Which facts it wants: it gets those that there are.
    (kinds.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}

async fn describe<S: AsyncWrite + Unpin>(stream: &mut S, kind: u32, bytes: u64) -> io::Result<()> {
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend(bytes.to_be_bytes());
    export.extend((flag::HAS_FLAGS | flag::FLUSH | flag::TRIM | flag::WRITE_ZEROES).to_be_bytes());
    answer_option(stream, kind, answer::INFO, &export).await?;
    let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [1, PREFERRED_BYTES, limits::NBD_REQUEST_BYTES_MAX] {
        sizes.extend(size.to_be_bytes());
    }
    answer_option(stream, kind, answer::INFO, &sizes).await?;
    answer_option(stream, kind, answer::ACK, &[]).await
}

async fn answer_option<S: AsyncWrite + Unpin>(stream: &mut S, kind: u32, answer: u32, data: &[u8]) -> io::Result<()> {
    let mut reply = OPTION_REPLY.to_be_bytes().to_vec();
    reply.extend(kind.to_be_bytes());
    reply.extend(answer.to_be_bytes());
    reply.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    reply.extend(data);
    stream.write_all(&reply).await
}

/// The next request of a client that has chosen `export`.
///
/// # Errors
/// The client is gone, or speaks something else.
pub async fn next_request<R: AsyncRead + Unpin>(reader: &mut R, export: &NbdExport) -> io::Result<NbdAsked> {
    let head: [u8; 4] = match array(reader).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(NbdAsked::Disconnect),
        head => head?,
    };
    if u32::from_be_bytes(head) != REQUEST {
        return Err(broken(format!("a request that begins with {head:x?}")));
    }
    let (_flags, kind) = (reader.read_u16().await?, reader.read_u16().await?);
    let (cookie, offset, bytes) = (reader.read_u64().await?, reader.read_u64().await?, reader.read_u32().await?);
    let mut data = Vec::new();
    if kind == command::WRITE {
        if bytes > limits::NBD_REQUEST_BYTES_MAX {
            return Err(broken(format!("a write of {bytes} bytes: expected at most {}", limits::NBD_REQUEST_BYTES_MAX)));
        }
        data = vec![0; usize::try_from(bytes).unwrap_or(0)];
        reader.read_exact(&mut data).await?;
    }
    let change = match kind {
        command::DISCONNECT => return Ok(NbdAsked::Disconnect),
        command::FLUSH if (offset, bytes) == (0, 0) => DiskChange::Flush,
        command::WRITE => DiskChange::Write,
        command::WRITE_ZEROES => DiskChange::Zero,
        command::TRIM => DiskChange::Discard,
        _ => return Ok(NbdAsked::Refused { cookie, error: INVALID }),
    };
    let within = offset.checked_add(u64::from(bytes)).is_some_and(|end| end <= export.bytes);
    if !within || (bytes == 0 && change != DiskChange::Flush) {
        return Ok(NbdAsked::Refused { cookie, error: INVALID });
    }
    Ok(NbdAsked::Change { cookie, change, offset, bytes, data })
}

/// The answer to a request; 0 is no error.
#[must_use]
pub fn reply(cookie: u64, error: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    let parts = REPLY.to_be_bytes().into_iter().chain(error.to_be_bytes()).chain(cookie.to_be_bytes());
    bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = from);
    bytes
}

/// WHY: what the gateway looks at to find zeroes.
const PREFERRED_BYTES: u32 = 64 * 1024;
