//! A guest that was split and stays: its QEMU can neither cancel a migration that is `postcopy-active` nor let the guest go on in it, but
//! it can complete it. So the gateway takes the place of the destination, says that every page is there, and takes what is left.
//!
//! The guest of a source has not run since its devices were sent, and its memory is as it was, so it goes on behind that with `cont`, as
//! one does that was sent to its end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::facts;
use super::monitor::Monitor;
use crate::condense::RamBlock;
use crate::hypervisor::{HypervisorError, Streams};
use crate::types::PAGE_BYTES;

/// Completes a migration that is `postcopy-paused`, without a destination.
pub(super) fn complete(monitor: &Monitor, within: Duration) -> Result<(), HypervisorError> {
    let blocks = facts::blocks(&monitor.qmp);
    // What QEMU has of its own for pages that are waited for has to be there, and nothing comes of it.
    let Streams { main: stream, urgent: _urgent, .. } = monitor.resume()?;
    let local = |source| HypervisorError::Local { vm: monitor.qmp.vm().to_owned(), what: "cannot end a migration that was split", source };
    stream.set_read_timeout(Some(within)).map_err(local)?;
    stream.set_write_timeout(Some(within)).map_err(local)?;
    play(stream, &blocks).map_err(local)
}

/// Answers as a destination that has everything, until QEMU has sent what it has to say.
fn play(mut stream: UnixStream, blocks: &[RamBlock]) -> std::io::Result<()> {
    let refused = |what: &str| std::io::Error::other(format!("QEMU asked for {what}"));
    loop {
        let [kind] = take(&mut stream)?;
        if kind != COMMAND {
            break;
        }
        let [command, length] = [take(&mut stream)?, take(&mut stream)?].map(u16::from_be_bytes);
        let mut body = vec![0; usize::from(length)];
        stream.read_exact(&mut body)?;
        match command {
            PING => stream.write_all(&message(PONG, &body))?,
            RECV_BITMAP => {
                let name = body.get(1..).unwrap_or_default();
                let block =
                    blocks.iter().find(|block| block.name.as_bytes() == name).ok_or_else(|| refused("a block that it has not named"))?;
                let bytes = (block.used / PAGE_BYTES as u64).div_ceil(64) * 8;
                stream.write_all(&message(BITMAP, &body))?;
                stream.write_all(&bytes.to_be_bytes())?;
                stream.write_all(&vec![0xff; usize::try_from(bytes).map_err(std::io::Error::other)?])?;
                stream.write_all(&BITMAP_END.to_be_bytes())?;
            }
            RESUME => stream.write_all(&message(RESUME_ACK, &1_u32.to_be_bytes()))?,
            other => return Err(refused(&format!("command {other}"))),
        }
    }
    stream.write_all(&message(SHUT, &0_u32.to_be_bytes()))?;
    std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
}

fn take<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A message of the way back.
fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    [&kind.to_be_bytes(), &length.to_be_bytes(), body].concat()
}

/// The type of a section that is a command, and commands.
const COMMAND: u8 = 8;
const PING: u16 = 2;
const RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
/// Types of messages.
const SHUT: u16 = 1;
const PONG: u16 = 2;
const BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
/// What ends a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;
