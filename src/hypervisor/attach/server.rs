//! The VMM's side: whoever implements [`AttachedGuest`] is migratable with [`bind`] and [`serve`].

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::guest::{AttachedGuest, Refusal};
use super::protocol::{Answer, AnswerHeader, RefusalCode, Request, RequestHeader, Role, parse};
use super::session::{Denial, Session, lock};
use super::wire::{Deadline, WireError, after, receive_header, receive_payload, send_message};
use crate::limits;

/// A connection that has not said hello within this time is closed.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// An observer that asks nothing for this long is closed.
const OBSERVER_IDLE: Duration = Duration::from_secs(60);
/// A message that has begun is complete within this time, in either direction.
const MESSAGE_WITHIN: Duration = Duration::from_secs(60);
/// How long to wait before accepting again when the process has no descriptor or memory left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listening socket at `path` with mode 0600. A socket that nobody listens on any more is replaced.
///
/// # Errors
/// Another process listens there, or the socket cannot be made.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    use rustix::fs::{FileType, Mode};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    if let Ok(found) = rustix::fs::lstat(path)
        && FileType::from_raw_mode(found.st_mode) == FileType::Socket
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path)?;
    }
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Before bind, so that the socket never stands there with another mode.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, Mode::from_raw_mode(0o600))?;
    rustix::net::listen(&socket, 16)?;
    Ok(UnixListener::from(socket))
}

/// Serves `guest` to gateways until one of them asks it to quit.
///
/// `INVARIANT(death-changes-nothing)`: a connection that ends, at whatever byte, leaves the guest as it was.
/// `INVARIANT(harvest-delivered)`: pages belong to the gateway when it sends its next request on the same
/// connection; until then they are part of the next harvest too.
///
/// # Errors
/// The listener fails for good.
pub fn serve(listener: &UnixListener, guest: Arc<Mutex<dyn AttachedGuest>>) -> io::Result<()> {
    let server = Server {
        session: Session::new(guest)?,
        connections: Mutex::default(),
        next_id: AtomicU64::new(1),
        quitting: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        let outcome = loop {
            let accepted = listener.accept();
            if server.quitting.load(Ordering::SeqCst) {
                break Ok(());
            }
            match accepted {
                Ok((stream, _)) => {
                    let Some(connection) = server.admit(stream) else { continue };
                    let server = &server;
                    // A guest that panics ends its conversation, not its server.
                    let converse = AssertUnwindSafe(move || connection.converse(server, listener));
                    let spawned = std::thread::Builder::new()
                        .name("attach".to_owned())
                        .spawn_scoped(scope, || std::panic::catch_unwind(converse).is_ok());
                    if let Err(error) = spawned {
                        tracing::warn!(%error, "cannot serve an attach connection");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted || error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if is_shortage(&error) => std::thread::sleep(ACCEPT_PAUSE),
                Err(error) => break Err(error),
            }
        };
        server.stop(listener);
        outcome
    })
}

fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether a process of `peer` may attach to a VMM of `own`.
fn admits(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

struct Server {
    session: Session,
    connections: Mutex<Vec<(u64, Arc<UnixStream>)>>,
    next_id: AtomicU64,
    quitting: AtomicBool,
}

impl Server {
    fn admit(&self, stream: UnixStream) -> Option<Connection> {
        let own = rustix::process::geteuid().as_raw();
        let peer = rustix::net::sockopt::socket_peercred(&stream).map(|peer| peer.uid.as_raw());
        let mut connections = lock(&self.connections);
        let refusal = match peer {
            Ok(peer) if !admits(peer, own) => {
                tracing::warn!(peer, own, "attach refused: not the VMM's user nor root");
                Denial::new(RefusalCode::Forbidden, "only the VMM's own user and root may attach")
            }
            Ok(_) if connections.len() >= limits::ATTACH_CONNECTIONS_MAX => Denial::new(RefusalCode::Busy, "too many connections"),
            Ok(_) => {
                let id = self.next_id.fetch_add(1, Ordering::SeqCst);
                let stream = Arc::new(stream);
                connections.push((id, Arc::clone(&stream)));
                return Some(Connection { id, stream, role: None });
            }
            Err(error) => {
                tracing::warn!(%error, "attach refused: no peer credentials");
                return None;
            }
        };
        // Nothing was sent yet, so this fits the socket buffer and cannot block the accept loop.
        let header = AnswerHeader { sequence: 0, answer: refusal.into() };
        if let Err(error) = send_message(&stream, &header, &[], None, after(Duration::from_millis(10))) {
            tracing::debug!(%error, "a refused connection was gone already");
        }
        None
    }

    /// Ends the accept loop and every conversation.
    fn stop(&self, listener: &UnixListener) {
        self.quitting.store(true, Ordering::SeqCst);
        for (_, stream) in lock(&self.connections).iter() {
            // A connection that is closed already needs no closing.
            let _closed = stream.shutdown(std::net::Shutdown::Both);
        }
        let _woken = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
    }

    fn forget(&self, id: u64) {
        lock(&self.connections).retain(|(other, _)| *other != id);
        self.session.release(id);
    }
}

struct Connection {
    id: u64,
    stream: Arc<UnixStream>,
    role: Option<Role>,
}

/// What a gateway asked, as far as it was understood.
struct Asked {
    sequence: u64,
    request: Result<Request, Denial>,
    payload: Vec<u8>,
}

/// Frees control whatever way a conversation ends.
struct Leave<'a>(&'a Server, u64);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}

impl Connection {
    fn converse(mut self, server: &Server, listener: &UnixListener) {
        let leave = Leave(server, self.id);
        let outcome = self.exchange_until_quit(&server.session);
        drop(leave);
        match outcome {
            Ok(()) => server.stop(listener),
            Err(WireError::Closed) => tracing::debug!("gateway detached"),
            Err(error) => {
                tracing::warn!(%error, "attach connection ended");
                if !matches!(error, WireError::Io(_)) {
                    self.say_malformed(&error);
                }
            }
        }
        let _closed = self.stream.shutdown(std::net::Shutdown::Both);
    }

    fn exchange_until_quit(&mut self, session: &Session) -> Result<(), WireError> {
        loop {
            let Asked { sequence, request, payload } = self.receive(session)?;
            let quits = matches!((&request, self.role), (Ok(Request::Quit), Some(Role::Control)));
            let reply = request.and_then(|request| {
                let reply = session.answer(self.id, self.role, &request, &payload)?;
                if let Request::Hello { role, .. } = request {
                    self.role = Some(role);
                }
                Ok(reply)
            });
            let reply = reply.unwrap_or_else(|denial| Answer::from(denial).into());
            let descriptor = reply.descriptor.as_ref().map(AsFd::as_fd);
            let header = AnswerHeader { sequence, answer: reply.answer };
            let sent = send_message(&self.stream, &header, &reply.payload, descriptor, after(MESSAGE_WITHIN));
            if quits {
                // The guest is gone whether or not the gateway is still there to hear it.
                return Ok(());
            }
            sent?;
        }
    }

    fn receive(&self, session: &Session) -> Result<Asked, WireError> {
        let first: Deadline = match self.role {
            None => after(HELLO_WITHIN),
            Some(Role::Observe) => after(OBSERVER_IDLE),
            Some(Role::Control) => None,
        };
        let received = receive_header(&self.stream, first, MESSAGE_WITHIN)?;
        session.delivered(self.id);
        if !received.descriptors.is_empty() {
            return Err(WireError::Descriptors);
        }
        let RequestHeader { sequence, request } = parse::<RequestHeader<serde_json::Value>>(&received.header)?;
        let unknown = |error: serde_json::Error| Denial::new(RefusalCode::Unknown, &error.to_string());
        let request = serde_json::from_value::<Request>(request).map_err(unknown);
        let bytes_max = request.as_ref().map_or(0, Request::payload_bytes_max);
        let payload = receive_payload(&self.stream, received.payload_bytes, bytes_max, after(MESSAGE_WITHIN))?;
        Ok(Asked { sequence, request, payload })
    }

    fn say_malformed(&self, error: &WireError) {
        let answer = Denial::new(RefusalCode::Malformed, Refusal::from(error).reason()).into();
        if let Err(error) = send_message(&self.stream, &AnswerHeader { sequence: 0, answer }, &[], None, after(Duration::from_millis(100)))
        {
            tracing::debug!(%error, "the gateway did not hear why");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_user_and_root_are_admitted() {
        assert!(admits(1000, 1000) && admits(0, 1000) && admits(0, 0));
        assert!(!admits(1000, 1001) && !admits(1000, 0));
    }

    #[test]
    fn the_socket_is_private_and_only_a_dead_one_is_replaced() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.sock");
        let listener = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        // A test that starts a process next to this one holds our descriptors for a moment.
        let again = |_| bind(&path).inspect_err(|_| std::thread::sleep(Duration::from_millis(5))).ok();
        let listener = (0..200).find_map(again);
        drop(listener.unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"not a socket").unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    }
}
