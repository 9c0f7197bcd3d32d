//! Bytes of the attach protocol on a unix stream socket: lengths, JSON header, payload, descriptors.
//!
//! Both ends take the other for hostile: every length is checked before anything is allocated,
//! memory grows only as bytes arrive, every wait has an end, and descriptors that nobody asked for are closed.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, send,
    sendmsg,
};
use serde::Serialize;

use crate::limits;

const PREFIX_BYTES: usize = 8;
/// Payloads are taken in pieces of this size, so that memory follows bytes and not promises.
const PIECE_BYTES: usize = 1 << 20;

/// A message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// The other side closed the connection between two messages.
    #[error("the connection was closed")]
    Closed,
    /// The socket failed or a wait came to its end.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// A length that is not allowed here.
    #[error("{what} has {bytes} bytes: expected at most {max}")]
    TooLong { what: &'static str, bytes: usize, max: usize },
    /// The header is not what the specification says.
    #[error("malformed header")]
    Json(#[source] serde_json::Error),
    /// More descriptors than the message may carry.
    #[error("message carries too many file descriptors")]
    Descriptors,
}

impl WireError {
    /// The error as the operating system would say it.
    pub(super) fn into_io(self) -> io::Error {
        match self {
            Self::Io(error) => error,
            Self::Closed => io::Error::new(io::ErrorKind::UnexpectedEof, "the VMM closed the connection"),
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        }
    }
}

/// Header of a message, and what the rest of it will be.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) header: Vec<u8>,
    pub(super) payload_bytes: usize,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// When a wait ends; `None` never does.
pub(super) type Deadline = Option<Instant>;

pub(super) fn after(wait: Duration) -> Deadline {
    Instant::now().checked_add(wait)
}

fn left(deadline: Deadline) -> Result<Option<Duration>, WireError> {
    let Some(deadline) = deadline else { return Ok(None) };
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(Some(left.max(Duration::from_millis(1)))),
        _ => Err(timed_out()),
    }
}

fn timed_out() -> WireError {
    WireError::Io(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"))
}

fn failed(error: io::Error) -> WireError {
    match error.kind() {
        io::ErrorKind::WouldBlock => timed_out(),
        _ => WireError::Io(error),
    }
}

/// Sends one message; `descriptor` goes with its first byte.
pub(super) fn send_message(
    stream: &UnixStream,
    header: &impl Serialize,
    payload: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
    deadline: Deadline,
) -> Result<(), WireError> {
    let header = serde_json::to_vec(header).map_err(WireError::Json)?;
    let too_long = |what, bytes, max| WireError::TooLong { what, bytes, max };
    if header.len() > limits::ATTACH_HEADER_BYTES_MAX {
        return Err(too_long("header", header.len(), limits::ATTACH_HEADER_BYTES_MAX));
    }
    let header_bytes = u32::try_from(header.len()).map_err(|_| too_long("header", header.len(), limits::ATTACH_HEADER_BYTES_MAX))?;
    let payload_bytes = u32::try_from(payload.len()).map_err(|_| too_long("payload", payload.len(), PAYLOAD_BYTES_MAX))?;
    let mut head = Vec::with_capacity(PREFIX_BYTES + header.len());
    head.extend_from_slice(&header_bytes.to_le_bytes());
    head.extend_from_slice(&payload_bytes.to_le_bytes());
    head.extend_from_slice(&header);

    let sent = send_first(stream, &head, descriptor, deadline)?;
    send_all(stream, head.get(sent..).unwrap_or_default(), deadline)?;
    send_all(stream, payload, deadline)
}

fn send_first(stream: &UnixStream, head: &[u8], descriptor: Option<BorrowedFd<'_>>, deadline: Deadline) -> Result<usize, WireError> {
    let descriptors = descriptor.as_slice();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(WireError::Descriptors);
        }
        stream.set_write_timeout(left(deadline)?).map_err(WireError::Io)?;
        match sendmsg(stream, &[IoSlice::new(head)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            outcome => return outcome.map_err(|errno| failed(errno.into())),
        }
    }
}

fn send_all(stream: &UnixStream, mut bytes: &[u8], deadline: Deadline) -> Result<(), WireError> {
    while !bytes.is_empty() {
        stream.set_write_timeout(left(deadline)?).map_err(WireError::Io)?;
        match send(stream, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}

/// Waits until `first` for a message to begin, then at most `within` for its header.
pub(super) fn receive_header(stream: &UnixStream, first: Deadline, within: Duration) -> Result<Received, WireError> {
    let mut prefix = [0; PREFIX_BYTES];
    let (got, descriptors) = receive_first(stream, &mut prefix, first)?;
    let deadline = after(within);
    receive_exact(stream, prefix.get_mut(got..).unwrap_or_default(), deadline)?;
    let [a, b, c, d, e, f, g, h] = prefix;
    let header_bytes = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let payload_bytes = usize::try_from(u32::from_le_bytes([e, f, g, h])).unwrap_or(usize::MAX);
    if header_bytes > limits::ATTACH_HEADER_BYTES_MAX {
        return Err(WireError::TooLong { what: "header", bytes: header_bytes, max: limits::ATTACH_HEADER_BYTES_MAX });
    }
    let header = receive_bytes(stream, header_bytes, deadline)?;
    Ok(Received { header, payload_bytes, descriptors })
}

/// Takes the payload that a header announced, if it is at most `bytes_max`.
pub(super) fn receive_payload(stream: &UnixStream, bytes: usize, bytes_max: usize, deadline: Deadline) -> Result<Vec<u8>, WireError> {
    if bytes > bytes_max {
        return Err(WireError::TooLong { what: "payload", bytes, max: bytes_max });
    }
    receive_bytes(stream, bytes, deadline)
}

fn receive_first(stream: &UnixStream, into: &mut [u8], deadline: Deadline) -> Result<(usize, Vec<OwnedFd>), WireError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(limits::ATTACH_FDS_MAX))];
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        stream.set_read_timeout(left(deadline)?).map_err(WireError::Io)?;
        let message = match recvmsg(stream, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message,
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(failed(errno.into())),
        };
        let mut descriptors = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                descriptors.extend(received);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::Descriptors);
        }
        if message.bytes == 0 {
            return Err(WireError::Closed);
        }
        return Ok((message.bytes, descriptors));
    }
}

fn receive_bytes(stream: &UnixStream, bytes: usize, deadline: Deadline) -> Result<Vec<u8>, WireError> {
    let mut out = Vec::new();
    while out.len() < bytes {
        let have = out.len();
        out.resize(have + (bytes - have).min(PIECE_BYTES), 0);
        receive_exact(stream, out.get_mut(have..).unwrap_or_default(), deadline)?;
    }
    Ok(out)
}

/// Plain reads carry no descriptors: the kernel drops what is attached to later bytes.
fn receive_exact(mut stream: &UnixStream, mut into: &mut [u8], deadline: Deadline) -> Result<(), WireError> {
    while !into.is_empty() {
        stream.set_read_timeout(left(deadline)?).map_err(WireError::Io)?;
        match stream.read(into) {
            Ok(0) => return Err(WireError::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended inside a message"))),
            Ok(got) => into = into.get_mut(got..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

/// What the length field can say.
const PAYLOAD_BYTES_MAX: usize = 0xffff_ffff;

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn soon() -> Deadline {
        after(Duration::from_millis(200))
    }

    fn receive(stream: &UnixStream, payload_max: usize) -> Result<(Received, Vec<u8>), WireError> {
        let received = receive_header(stream, soon(), Duration::from_millis(200))?;
        let payload = receive_payload(stream, received.payload_bytes, payload_max, soon())?;
        Ok((received, payload))
    }

    fn raw(header: u32, payload: u32, rest: &[u8]) -> Vec<u8> {
        [&header.to_le_bytes()[..], &payload.to_le_bytes()[..], rest].concat()
    }

    #[test]
    fn a_message_arrives_with_its_payload_and_descriptor() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        let payload = vec![7; 300_000];
        let sender = std::thread::spawn(move || send_message(&a, &"x", &payload, Some(file.as_fd()), soon()).unwrap());
        let (received, payload) = receive(&b, 300_000).unwrap();
        sender.join().unwrap();
        assert_eq!((received.header.as_slice(), received.descriptors.len(), payload.len()), (&b"\"x\""[..], 1, 300_000));
    }

    #[test]
    fn lengths_beyond_their_bound_are_refused_before_memory_is_taken() {
        for bytes in [raw(u32::MAX, 0, b""), raw(2, u32::MAX, b"{}"), raw(2, 11, b"{}")] {
            let (mut a, b) = pair();
            a.write_all(&bytes).unwrap();
            assert!(matches!(receive(&b, 10), Err(WireError::TooLong { .. })), "{bytes:?}");
        }
    }

    #[test]
    fn a_promised_length_takes_no_memory_until_bytes_arrive() {
        let (mut a, b) = pair();
        a.write_all(&raw(2, u32::MAX, b"{}xx")).unwrap();
        assert!(matches!(receive(&b, usize::MAX), Err(WireError::Io(e)) if e.kind() == io::ErrorKind::TimedOut));
    }

    #[test]
    fn a_message_that_ends_early_or_stalls_is_an_error() {
        let whole = raw(2, 3, b"{}abc");
        for cut in 0..whole.len() {
            let (mut a, b) = pair();
            a.write_all(&whole[..cut]).unwrap();
            drop(a);
            let error = receive(&b, 10).unwrap_err();
            assert_eq!(matches!(error, WireError::Closed), cut == 0, "{cut}: {error}");
        }
        let (mut a, b) = pair();
        a.write_all(&whole[..9]).unwrap();
        assert!(matches!(receive(&b, 10), Err(WireError::Io(e)) if e.kind() == io::ErrorKind::TimedOut));
    }

    #[test]
    fn excess_descriptors_are_refused() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        let many = vec![file.as_fd(); 20];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&a, &[IoSlice::new(&raw(2, 0, b"{}"))], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(receive(&b, 10), Err(WireError::Descriptors)));
    }
}
