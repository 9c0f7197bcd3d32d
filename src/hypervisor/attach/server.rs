//! The VMM's side: whoever implements [`AttachedGuest`] is migratable with [`bind`] and [`serve`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::protocol::{ATTACH_VERSION, Answer, AnswerHeader, Attachment, RefusalCode, Request, RequestHeader, Role, parse, printable};
use super::wire::{Deadline, WireError, after, receive_header, receive_payload, send_message};
use crate::hypervisor::{GuestStatus, Machine, RunState};
use crate::limits;
use crate::memory::PageSet;

/// A connection that has not said hello within this time is closed.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// An observer that asks nothing for this long is closed.
const OBSERVER_IDLE: Duration = Duration::from_secs(60);
/// A message that has begun is complete within this time, in either direction.
const MESSAGE_WITHIN: Duration = Duration::from_secs(60);
/// How long to wait before accepting again when the process has no descriptor or memory left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a VMM does not do what a gateway asks, in words for people. Made from any error by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(String);

impl Refusal {
    /// A refusal with these words. No guest memory or state in them.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// The words.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.0
    }
}

impl<E: std::error::Error> From<E> for Refusal {
    fn from(error: E) -> Self {
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        Self(reason)
    }
}

/// What a VMM provides to be attached to. The server checks order (`harvest` only while tracking,
/// `restore-state` only into a prepared twin, ...) before it calls, and never calls two methods at once.
pub trait AttachedGuest: Send {
    /// What the guest is made of. Asked of a running guest and of a prepared twin.
    ///
    /// # Errors
    /// The VMM cannot describe it.
    fn machine(&self) -> Result<Machine, Refusal>;
    /// The guest's memory file, as [`memory_file`](super::memory_file) makes it.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    fn memory(&self) -> Result<File, Refusal>;
    /// From now on every written page is recorded.
    ///
    /// # Errors
    /// The VMM cannot track.
    fn start_tracking(&mut self) -> Result<(), Refusal>;
    /// Pages written since the last harvest; the record starts anew.
    ///
    /// # Errors
    /// The record is lost: the gateway takes every page for dirty.
    fn harvest(&mut self) -> Result<PageSet, Refusal>;
    /// Recording ends.
    ///
    /// # Errors
    /// The VMM cannot say that it did.
    fn stop_tracking(&mut self) -> Result<(), Refusal>;
    /// Takes `percent` (0 to 99) of vCPU time away from the guest.
    ///
    /// # Errors
    /// The VMM cannot throttle.
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal>;
    /// Stops every vCPU between two instructions. Idempotent.
    ///
    /// # Errors
    /// A vCPU does not stop; all of them run on.
    fn pause(&mut self) -> Result<(), Refusal>;
    /// Lets vCPUs go on. Idempotent.
    ///
    /// # Errors
    /// A vCPU cannot go on.
    fn resume(&mut self) -> Result<(), Refusal>;
    /// All vCPU and device state of the paused guest; saving twice gives the same bytes.
    ///
    /// # Errors
    /// A part cannot be read.
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal>;
    /// Builds an empty twin of `machine` and returns its memory file.
    ///
    /// # Errors
    /// One line for each thing this host lacks; nothing was built.
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>>;
    /// Checks all of `state`, then applies it. The guest is [`RunState::Paused`] from then on.
    ///
    /// # Errors
    /// The state is malformed or does not fit; nothing was applied.
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal>;
    /// How the guest is. [`RunState::Incoming`] until state was restored.
    fn status(&mut self) -> GuestStatus;
    /// Ends the guest and frees its memory; [`serve`] returns after the answer is sent.
    fn quit(&mut self);
}

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
        guest,
        session: Mutex::default(),
        connections: Mutex::default(),
        instance: instance()?,
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
                    let spawned = std::thread::Builder::new()
                        .name("attach".to_owned())
                        .spawn_scoped(scope, move || connection.converse(server, listener));
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

fn instance() -> io::Result<String> {
    use ring::rand::SecureRandom;
    let mut bytes = [0; 16];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("no random bytes from the system"))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Whether a process of `peer` may attach to a VMM of `own`.
fn admits(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

/// What outlives a connection. Never locked while the guest is asked for: guest first, then this.
#[derive(Debug, Default)]
struct Session {
    controller: Option<u64>,
    prepared: bool,
    tracking: bool,
    throttle_percent: u8,
    /// The last harvest and the connection it was sent on, until that connection says that it arrived.
    undelivered: Option<(u64, PageSet)>,
}

struct Server {
    guest: Arc<Mutex<dyn AttachedGuest>>,
    session: Mutex<Session>,
    connections: Mutex<Vec<(u64, Arc<UnixStream>)>>,
    instance: String,
    next_id: AtomicU64,
    quitting: AtomicBool,
}

struct Reply {
    answer: Answer,
    payload: Vec<u8>,
    descriptor: Option<File>,
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self { answer, payload: Vec::new(), descriptor: None }
    }
}

fn refused(code: RefusalCode, reason: &str) -> Reply {
    Answer::Refused { code, reason: printable(reason, limits::REASON_BYTES_MAX) }.into()
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        refused(RefusalCode::Failed, refusal.reason())
    }
}

/// A guest that panicked once is still better controlled than not.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    fn admit(&self, stream: UnixStream) -> Option<Connection> {
        let own = rustix::process::geteuid().as_raw();
        let peer = rustix::net::sockopt::socket_peercred(&stream).map(|peer| peer.uid.as_raw());
        let mut connections = lock(&self.connections);
        let refusal = match peer {
            Ok(peer) if !admits(peer, own) => {
                tracing::warn!(peer, own, "attach refused: not the VMM's user nor root");
                refused(RefusalCode::Forbidden, "only the VMM's own user and root may attach")
            }
            Ok(_) if connections.len() >= limits::ATTACH_CONNECTIONS_MAX => refused(RefusalCode::Busy, "too many connections"),
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
        let header = AnswerHeader { sequence: 0, answer: refusal.answer };
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
        let mut session = lock(&self.session);
        if session.controller == Some(id) {
            session.controller = None;
        }
    }

    /// The connection goes on, so its last harvest arrived.
    fn delivered(&self, id: u64) {
        let mut session = lock(&self.session);
        if session.undelivered.as_ref().is_some_and(|(sent_on, _)| *sent_on == id) {
            session.undelivered = None;
        }
    }

    fn attachment(&self) -> Attachment {
        let state = lock(&self.guest).status().state;
        let session = lock(&self.session);
        Attachment {
            version: ATTACH_VERSION,
            instance: self.instance.clone(),
            state,
            prepared: session.prepared,
            tracking: session.tracking,
            throttle_percent: session.throttle_percent,
        }
    }

    fn hello(&self, id: u64, version: u32, role: Role) -> Reply {
        if version != ATTACH_VERSION {
            return refused(RefusalCode::Version, &format!("version {version}: this VMM speaks version {ATTACH_VERSION}"));
        }
        if role == Role::Control {
            let mut session = lock(&self.session);
            if session.controller.is_some() {
                return refused(RefusalCode::Busy, "another gateway controls this guest");
            }
            session.controller = Some(id);
        }
        Answer::Hello(self.attachment()).into()
    }

    /// Performs a request of the gateway in control, in an order that makes sense.
    fn perform(&self, id: u64, request: &Request, payload: &[u8]) -> Result<Reply, Reply> {
        let mut guest = lock(&self.guest);
        let state = guest.status().state;
        self.check_order(request, state)?;
        match request {
            Request::Hello { .. } => return Err(order("hello was said already")),
            Request::Status => return Ok(Answer::Status(bounded(guest.status())).into()),
            Request::Machine => return Ok(Answer::Machine(guest.machine()?).into()),
            Request::Memory => return Ok(Reply { descriptor: Some(guest.memory()?), ..Answer::Memory.into() }),
            Request::Harvest => return self.harvest(id, &mut *guest),
            Request::SaveState => return saved(guest.save_state()?),
            Request::Prepare { machine } => return self.prepare(&mut *guest, machine),
            Request::TrackStart if lock(&self.session).tracking => {}
            Request::TrackStart => {
                guest.start_tracking()?;
                let mut session = lock(&self.session);
                (session.tracking, session.undelivered) = (true, None);
            }
            Request::TrackStop => {
                guest.stop_tracking()?;
                let mut session = lock(&self.session);
                (session.tracking, session.undelivered) = (false, None);
            }
            Request::Throttle { percent } => {
                guest.throttle(*percent)?;
                lock(&self.session).throttle_percent = *percent;
            }
            Request::Pause => guest.pause()?,
            Request::Resume => guest.resume()?,
            Request::RestoreState => guest.restore_state(payload)?,
            Request::Quit => guest.quit(),
        }
        Ok(Answer::Done.into())
    }

    fn check_order(&self, request: &Request, state: RunState) -> Result<(), Reply> {
        let session = lock(&self.session);
        let incoming = state == RunState::Incoming;
        let wrong = match request {
            Request::Machine | Request::Memory if incoming && !session.prepared => "no twin was prepared",
            Request::Prepare { .. } if !incoming => "this VMM has a guest already",
            Request::Prepare { .. } if session.prepared => "a twin was prepared already",
            Request::RestoreState if !incoming => "this VMM has a guest already",
            Request::RestoreState if !session.prepared => "no twin was prepared",
            Request::TrackStart | Request::TrackStop | Request::Throttle { .. } if incoming => "no guest runs here yet",
            Request::Pause | Request::Resume if incoming => "no state was restored",
            Request::Harvest if !session.tracking => "dirty pages are not tracked",
            Request::SaveState if !matches!(state, RunState::Paused | RunState::Ended) => "the guest is not paused",
            Request::Throttle { percent } if *percent > 99 => "expected 0 to 99 percent",
            _ => return Ok(()),
        };
        Err(order(wrong))
    }

    fn harvest(&self, id: u64, guest: &mut dyn AttachedGuest) -> Result<Reply, Reply> {
        let mut set = guest.harvest()?;
        let mut session = lock(&self.session);
        if let Some((_, earlier)) = &session.undelivered {
            set.merge(earlier);
        }
        let payload = set.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let pages = set.pages();
        session.undelivered = Some((id, set));
        Ok(Reply { payload, ..Answer::Harvest { pages }.into() })
    }

    fn prepare(&self, guest: &mut dyn AttachedGuest, machine: &Machine) -> Result<Reply, Reply> {
        match guest.prepare(machine) {
            Ok(memory) => {
                lock(&self.session).prepared = true;
                Ok(Reply { descriptor: Some(memory), ..Answer::Memory.into() })
            }
            Err(lacks) => {
                let lacks = lacks.iter().take(limits::ATTACH_LACKS_MAX).map(|lack| printable(lack, limits::REASON_BYTES_MAX)).collect();
                Err(Answer::Incompatible { lacks }.into())
            }
        }
    }
}

fn order(reason: &str) -> Reply {
    refused(RefusalCode::Order, reason)
}

fn saved(payload: Vec<u8>) -> Result<Reply, Reply> {
    if payload.len() > limits::STATE_BYTES_MAX {
        return Err(refused(
            RefusalCode::Failed,
            &format!("state has {} bytes: expected at most {}", payload.len(), limits::STATE_BYTES_MAX),
        ));
    }
    Ok(Reply { payload, ..Answer::State.into() })
}

fn bounded(mut status: GuestStatus) -> GuestStatus {
    status.last_line = status.last_line.map(|line| printable(&line, limits::CONSOLE_LINE_BYTES_MAX));
    status
}

struct Connection {
    id: u64,
    stream: Arc<UnixStream>,
    role: Option<Role>,
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
        let outcome = self.exchange_until_quit(server);
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

    fn exchange_until_quit(&mut self, server: &Server) -> Result<(), WireError> {
        loop {
            let (sequence, request, payload) = self.receive(server)?;
            let quits = matches!((&request, self.role), (Ok(Request::Quit), Some(Role::Control)));
            let reply = match request {
                Ok(request) => self.answer(server, &request, &payload),
                Err(unknown) => unknown,
            };
            let header = AnswerHeader { sequence, answer: reply.answer };
            let sent =
                send_message(&self.stream, &header, &reply.payload, reply.descriptor.as_ref().map(AsFd::as_fd), after(MESSAGE_WITHIN));
            if quits {
                // The guest is gone whether or not the gateway is still there to hear it.
                return Ok(());
            }
            sent?;
        }
    }

    fn receive(&self, server: &Server) -> Result<(u64, Result<Request, Reply>, Vec<u8>), WireError> {
        let first: Deadline = match self.role {
            None => after(HELLO_WITHIN),
            Some(Role::Observe) => after(OBSERVER_IDLE),
            Some(Role::Control) => None,
        };
        let received = receive_header(&self.stream, first, MESSAGE_WITHIN)?;
        server.delivered(self.id);
        if !received.descriptors.is_empty() {
            return Err(WireError::Descriptors);
        }
        let RequestHeader { sequence, request } = parse::<RequestHeader<serde_json::Value>>(&received.header)?;
        let request = serde_json::from_value::<Request>(request).map_err(|error| refused(RefusalCode::Unknown, &error.to_string()));
        let bytes_max = request.as_ref().map_or(0, Request::payload_bytes_max);
        let payload = receive_payload(&self.stream, received.payload_bytes, bytes_max, after(MESSAGE_WITHIN))?;
        Ok((sequence, request, payload))
    }

    fn answer(&mut self, server: &Server, request: &Request, payload: &[u8]) -> Reply {
        match (self.role, request) {
            (None, Request::Hello { version, role }) => {
                let reply = server.hello(self.id, *version, *role);
                if matches!(reply.answer, Answer::Hello(_)) {
                    self.role = Some(*role);
                }
                reply
            }
            (None, _) => order("expected hello first"),
            (Some(Role::Observe), Request::Status) => Answer::Status(bounded(lock(&server.guest).status())).into(),
            (Some(Role::Observe), _) => refused(RefusalCode::Forbidden, "an observer may only ask for status"),
            (Some(Role::Control), _) => server.perform(self.id, request, payload).unwrap_or_else(|reply| reply),
        }
    }

    fn say_malformed(&self, error: &WireError) {
        let answer = refused(RefusalCode::Malformed, Refusal::from(error).reason()).answer;
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
        let listener = bind(&path).unwrap();
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"not a socket").unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    }

    #[test]
    fn a_refusal_tells_the_whole_chain_of_causes() {
        let error = WireError::Io(io::Error::other("why"));
        assert_eq!(Refusal::from(error).reason(), "the connection failed: why");
    }
}
