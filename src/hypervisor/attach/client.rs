//! The gateway's side: one driver for every VMM that serves the attach protocol.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::protocol::{ATTACH_VERSION, Answer, AnswerHeader, Attachment, RefusalCode, Request, RequestHeader, Role, parse, printable};
use super::ram_file::check_memory_file;
use super::wire::{Deadline, WireError, after, receive_header, receive_payload, send_message};
use crate::hypervisor::{Guest, GuestStatus, HypervisorError, Machine, PagedDestination, PagedSource, RunState, wake_paged};
use crate::limits;
use crate::memory::{GuestRam, MemoryLayout, PageSet};

/// Between two attempts to become the controller.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// How long a VMM may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For every request but the next two.
    pub request: Duration,
    /// For `save-state`, `restore-state` and `prepare`, which work in proportion to the guest.
    pub state: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { request: Duration::from_secs(10), state: Duration::from_secs(60) }
    }
}

/// Reads a guest's status without taking control, also while another gateway has it.
///
/// # Errors
/// The VMM is gone or breaks the protocol.
pub fn observe(path: &Path, vm: &str, timeouts: Timeouts) -> Result<(Attachment, GuestStatus), HypervisorError> {
    let mut link = Link::connect(path, vm, Role::Observe, timeouts)?;
    let status = link.status()?;
    Ok((link.attachment, status))
}

/// The same, and what the guest is made of; nothing as long as an incoming VMM has no twin.
///
/// # Errors
/// As [`observe`].
pub fn inspect(path: &Path, vm: &str, timeouts: Timeouts) -> Result<(Option<Machine>, GuestStatus), HypervisorError> {
    let mut link = Link::connect(path, vm, Role::Observe, timeouts)?;
    // A VMM may refuse to tell an observer; how the guest is, it has to tell.
    let machine = link.machine().ok();
    Ok((machine, link.status()?))
}

/// Ends a VMM that nobody needs, also one that never got a twin.
///
/// # Errors
/// The VMM is gone already, another gateway controls it, or a guest runs in it.
pub fn discard(path: &Path, vm: &str, timeouts: Timeouts) -> Result<(), HypervisorError> {
    let mut link = Link::connect(path, vm, Role::Control, timeouts)?;
    if link.attachment.state == RunState::Running {
        let reason = "a guest runs in it".to_owned();
        return Err(HypervisorError::Refused { vm: vm.to_owned(), request: "quit", reason });
    }
    link.done(&Request::Quit)
}

/// A running or paused guest, controlled through its VMM's socket.
#[derive(Debug)]
pub struct AttachedSource {
    link: Link,
    machine: Machine,
    ram: Arc<GuestRam>,
}

impl AttachedSource {
    /// Takes control of the guest that a VMM serves at `path`. `vm` is for messages.
    ///
    /// # Errors
    /// Nobody listens, another gateway controls it, the VMM has no guest yet, or it breaks the protocol.
    pub fn attach(path: &Path, vm: &str, timeouts: Timeouts) -> Result<Self, HypervisorError> {
        let mut link = Link::connect(path, vm, Role::Control, timeouts)?;
        let (machine, ram) = link.machine_and_memory()?;
        Ok(Self { link, machine, ram })
    }

    /// What an earlier gateway left behind: run state, tracking, throttle.
    #[must_use]
    pub fn attachment(&self) -> &Attachment {
        &self.link.attachment
    }
}

impl Guest for AttachedSource {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        wake_paged(self)
    }
    fn can_renew(&self) -> bool {
        true
    }
    fn renew(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Renew)
    }
    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        self.link.status()
    }
    fn destroy(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Quit)
    }
}

impl PagedSource for AttachedSource {
    fn machine(&self) -> &Machine {
        &self.machine
    }
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn start_tracking(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::TrackStart)
    }
    fn harvest(&mut self) -> Result<PageSet, HypervisorError> {
        self.link.harvest(self.ram.pages())
    }
    fn stop_tracking(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::TrackStop)
    }
    fn throttle(&mut self, percent: u8) -> Result<(), HypervisorError> {
        self.link.done(&Request::Throttle { percent })
    }
    fn pause(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Pause)
    }
    fn resume(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Resume)
    }
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        self.link.save_state()
    }
}

/// An incoming VMM, filled and started through its socket.
#[derive(Debug)]
pub struct AttachedDestination {
    link: Link,
    ram: Arc<GuestRam>,
}

impl AttachedDestination {
    /// Lets the incoming VMM at `path` build an empty twin of `machine`.
    ///
    /// # Errors
    /// [`HypervisorError::Incompatible`] names each thing the host lacks; otherwise the VMM is gone, busy,
    /// not waiting for a guest, or breaks the protocol.
    pub fn prepare(path: &Path, vm: &str, machine: &Machine, timeouts: Timeouts) -> Result<Self, HypervisorError> {
        let mut link = Link::connect(path, vm, Role::Control, timeouts)?;
        let layout = link.check_machine(machine)?;
        let reply = link.call(&Request::Prepare { machine: machine.clone() }, &[], 0)?;
        let ram = link.map(reply, layout)?;
        Ok(Self { link, ram })
    }

    /// Takes control of a twin that an earlier gateway prepared, for recovery after a crash.
    ///
    /// # Errors
    /// As [`AttachedSource::attach`].
    pub fn reattach(path: &Path, vm: &str, timeouts: Timeouts) -> Result<(Self, Machine), HypervisorError> {
        let mut link = Link::connect(path, vm, Role::Control, timeouts)?;
        let (machine, ram) = link.machine_and_memory()?;
        Ok((Self { link, ram }, machine))
    }

    /// The VMM as it was when control was taken.
    #[must_use]
    pub fn attachment(&self) -> &Attachment {
        &self.link.attachment
    }
}

impl Guest for AttachedDestination {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        self.resume()
    }
    fn can_renew(&self) -> bool {
        true
    }
    fn renew(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Renew)
    }
    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        self.link.status()
    }
    fn destroy(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Quit)
    }
}

impl PagedDestination for AttachedDestination {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
    fn ensure_there(&mut self) -> Result<(), HypervisorError> {
        self.link.ensure_held()
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), HypervisorError> {
        if state.len() > limits::STATE_BYTES_MAX {
            return Err(self.link.protocol(format!("state has {} bytes: expected at most {}", state.len(), limits::STATE_BYTES_MAX)));
        }
        let reply = self.link.call(&Request::RestoreState, state, 0)?;
        self.link.expect_done("restore-state", &reply)
    }
    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        self.link.save_state()
    }
    fn resume(&mut self) -> Result<(), HypervisorError> {
        self.link.done(&Request::Resume)
    }
    fn address(&self) -> String {
        self.link.address()
    }
}

#[derive(Debug)]
struct Reply {
    answer: Answer,
    payload: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

/// A connection that is made anew after it failed. `sequence` is never used twice, and a connection on
/// which an answer was missed is closed, so a late answer has no request that it could be mistaken for.
#[derive(Debug)]
struct Link {
    vm: String,
    path: PathBuf,
    role: Role,
    timeouts: Timeouts,
    sequence: u64,
    stream: Option<UnixStream>,
    attachment: Attachment,
}

impl Link {
    fn connect(path: &Path, vm: &str, role: Role, timeouts: Timeouts) -> Result<Self, HypervisorError> {
        let attachment = Attachment {
            version: ATTACH_VERSION,
            instance: String::new(),
            state: crate::hypervisor::RunState::Incoming,
            prepared: false,
            tracking: false,
            throttle_percent: 0,
        };
        let mut link = Self { vm: vm.to_owned(), path: path.to_owned(), role, timeouts, sequence: 0, stream: None, attachment };
        link.attachment = link.greet()?;
        Ok(link)
    }

    fn address(&self) -> String {
        self.path.display().to_string()
    }

    fn protocol(&self, reason: impl Into<String>) -> HypervisorError {
        HypervisorError::Protocol { vm: self.vm.clone(), reason: printable(&reason.into(), limits::REASON_BYTES_MAX) }
    }

    fn failed(&self, request: &'static str, error: WireError) -> HypervisorError {
        match error {
            WireError::Closed | WireError::Io(_) => {
                HypervisorError::Unreachable { vm: self.vm.clone(), address: self.address(), source: error.into_io() }
            }
            WireError::Json(error) => self.protocol(format!("header of `{request}`: {error}")),
            error => self.protocol(format!("message of `{request}`: {error}")),
        }
    }

    /// Connects and says hello until the VMM is free or the time is up.
    fn greet(&mut self) -> Result<Attachment, HypervisorError> {
        let deadline = after(self.timeouts.request);
        let request = Request::Hello { version: ATTACH_VERSION, role: self.role };
        let mut busy = None;
        loop {
            let stream = dial(&self.path, self.timeouts.request).map_err(|error| self.failed("hello", WireError::Io(error)))?;
            self.stream = Some(stream);
            let outcome = self.exchange(&request, &[], 0, deadline);
            let over = deadline.is_none_or(|end| std::time::Instant::now() + BUSY_PAUSE >= end);
            match outcome {
                Ok(Reply { answer: Answer::Hello(attachment), .. }) if attachment.version == ATTACH_VERSION => return Ok(attachment),
                Ok(Reply { answer: Answer::Refused { code: RefusalCode::Busy, reason }, .. }) => busy = Some(reason),
                // The time ran out in the middle of yet another attempt: what keeps us out is still the other gateway.
                Err(HypervisorError::Unreachable { .. }) if over && busy.is_some() => {}
                Err(error) => return Err(error),
                Ok(reply) => {
                    self.stream = None;
                    return Err(self.unexpected("hello", &reply));
                }
            }
            self.stream = None;
            if let (true, Some(reason)) = (over, &busy) {
                return Err(self.refused("hello", reason));
            }
            std::thread::sleep(BUSY_PAUSE);
        }
    }

    fn reconnect(&mut self) -> Result<(), HypervisorError> {
        let attachment = self.greet()?;
        if attachment.instance != self.attachment.instance {
            self.stream = None;
            return Err(self.protocol("another VMM process answers at this socket than before"));
        }
        Ok(())
    }

    /// One request and its answer, which carries at most `payload_max` bytes.
    fn call(&mut self, request: &Request, payload: &[u8], payload_max: usize) -> Result<Reply, HypervisorError> {
        let wait = match request {
            Request::SaveState | Request::RestoreState | Request::Prepare { .. } => self.timeouts.state,
            _ => self.timeouts.request,
        };
        if self.stream.is_none() {
            self.reconnect()?;
        }
        let reply = self.exchange(request, payload, payload_max, after(wait))?;
        match reply.answer {
            Answer::Refused { .. } | Answer::Incompatible { .. } => Err(self.unexpected(request.name(), &reply)),
            _ => Ok(reply),
        }
    }

    /// Whatever goes wrong here leaves no connection behind: what is left on it belongs to nobody.
    fn exchange(&mut self, request: &Request, payload: &[u8], payload_max: usize, deadline: Deadline) -> Result<Reply, HypervisorError> {
        let name = request.name();
        let gone = || WireError::Io(io::Error::from(io::ErrorKind::NotConnected));
        let stream = self.stream.take().ok_or_else(gone).map_err(|error| self.failed(name, error))?;
        self.sequence += 1;
        let header = RequestHeader { sequence: self.sequence, request };
        let sent = send_message(&stream, &header, payload, None, deadline);
        if let Err(error @ (WireError::TooLong { .. } | WireError::Json(_))) = sent {
            return Err(self.failed(name, error));
        }
        // A VMM that refuses a connection may close it before it has read: its reason comes first.
        let (sequence, reply) = match (sent, receive_reply(&stream, payload_max, deadline)) {
            (Ok(()), outcome) => outcome.map_err(|error| self.failed(name, error))?,
            (Err(_), Ok((0, reply))) => (0, reply),
            (Err(error), _) => return Err(self.failed(name, error)),
        };
        if sequence == 0 && matches!(reply.answer, Answer::Refused { .. }) {
            return Ok(reply);
        }
        if sequence != self.sequence {
            return Err(self.protocol(format!("answer to `{name}` has sequence {sequence}: expected {}", self.sequence)));
        }
        if reply.descriptor.is_some() != matches!(reply.answer, Answer::Memory) {
            return Err(self.protocol(format!("answer to `{name}` has the wrong number of file descriptors")));
        }
        self.stream = Some(stream);
        Ok(reply)
    }

    fn refused(&self, request: &'static str, reason: &str) -> HypervisorError {
        HypervisorError::Refused { vm: self.vm.clone(), request, reason: printable(reason, limits::REASON_BYTES_MAX) }
    }

    fn unexpected(&self, request: &'static str, reply: &Reply) -> HypervisorError {
        match &reply.answer {
            Answer::Refused { reason, .. } => self.refused(request, reason),
            Answer::Incompatible { lacks } if request == "prepare" => HypervisorError::Incompatible {
                vm: self.vm.clone(),
                lacks: lacks.iter().take(limits::ATTACH_LACKS_MAX).map(|lack| printable(lack, limits::REASON_BYTES_MAX)).collect(),
            },
            _ => self.protocol(format!("`{request}` has an answer that belongs to another request")),
        }
    }

    fn done(&mut self, request: &Request) -> Result<(), HypervisorError> {
        let reply = self.call(request, &[], 0)?;
        self.expect_done(request.name(), &reply)
    }

    fn expect_done(&self, request: &'static str, reply: &Reply) -> Result<(), HypervisorError> {
        if reply.answer == Answer::Done { Ok(()) } else { Err(self.unexpected(request, reply)) }
    }

    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        let reply = self.call(&Request::Status, &[], 0)?;
        let Answer::Status(mut status) = reply.answer else { return Err(self.unexpected("status", &reply)) };
        status.last_line = status.last_line.map(|line| printable(&line, limits::STATUS_LINE_BYTES_MAX));
        Ok(status)
    }

    /// Sees that the VMM holds its end of the connection, which the kernel closes for one that has ended.
    fn ensure_held(&mut self) -> Result<(), HypervisorError> {
        if let Some(stream) = &self.stream {
            let mut waits = [PollFd::new(stream, PollFlags::IN | PollFlags::RDHUP)];
            if rustix::io::retry_on_intr(|| poll(&mut waits, Some(&Timespec::default()))) == Ok(0) {
                return Ok(());
            }
        }
        self.status().map(drop)
    }

    fn save_state(&mut self) -> Result<Vec<u8>, HypervisorError> {
        let reply = self.call(&Request::SaveState, &[], limits::STATE_BYTES_MAX)?;
        if reply.answer == Answer::State { Ok(reply.payload) } else { Err(self.unexpected("save-state", &reply)) }
    }

    fn harvest(&mut self, pages: u64) -> Result<PageSet, HypervisorError> {
        let expected = usize::try_from(pages.div_ceil(64) * 8).unwrap_or(usize::MAX);
        let reply = self.call(&Request::Harvest, &[], expected)?;
        if reply.answer != (Answer::Harvest { pages }) {
            return Err(self.unexpected("harvest", &reply));
        }
        if reply.payload.len() != expected {
            return Err(self.protocol(format!("bitmap has {} bytes: expected {expected}", reply.payload.len())));
        }
        let words: Vec<u64> = reply.payload.chunks_exact(8).filter_map(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?))).collect();
        let set = PageSet::from_words(pages, &words);
        if set.words() != words {
            return Err(self.protocol("bitmap names pages beyond guest RAM"));
        }
        Ok(set)
    }

    fn machine(&mut self) -> Result<Machine, HypervisorError> {
        let reply = self.call(&Request::Machine, &[], 0)?;
        let Answer::Machine(machine) = reply.answer else { return Err(self.unexpected("machine", &reply)) };
        Ok(machine)
    }

    fn machine_and_memory(&mut self) -> Result<(Machine, Arc<GuestRam>), HypervisorError> {
        let machine = self.machine()?;
        let layout = self.check_machine(&machine)?;
        let reply = self.call(&Request::Memory, &[], 0)?;
        let ram = self.map(reply, layout)?;
        Ok((machine, ram))
    }

    fn check_machine(&self, machine: &Machine) -> Result<MemoryLayout, HypervisorError> {
        let bytes = serde_json::to_vec(machine).map_err(|error| self.protocol(format!("machine description: {error}")))?.len();
        if bytes > limits::MACHINE_BYTES_MAX {
            return Err(self.protocol(format!("machine description has {bytes} bytes: expected at most {}", limits::MACHINE_BYTES_MAX)));
        }
        if machine.kind.is_empty() || machine.kind.len() > limits::NAME_BYTES_MAX {
            return Err(self.protocol("machine kind is not a name"));
        }
        MemoryLayout::new(machine.regions.clone()).map_err(|error| self.protocol(format!("machine description: {error}")))
    }

    /// `INVARIANT(sealed-memory)`: nothing is mapped that can vanish under this process.
    fn map(&self, reply: Reply, layout: MemoryLayout) -> Result<Arc<GuestRam>, HypervisorError> {
        let Reply { answer: Answer::Memory, descriptor: Some(descriptor), .. } = reply else {
            return Err(self.unexpected("memory", &reply));
        };
        let file = check_memory_file(descriptor, layout.bytes()).map_err(|reason| self.protocol(reason))?;
        GuestRam::map(file, layout).map(Arc::new).map_err(|source| HypervisorError::Ram { vm: self.vm.clone(), source })
    }
}

fn receive_reply(stream: &UnixStream, payload_max: usize, deadline: Deadline) -> Result<(u64, Reply), WireError> {
    let within = deadline.map_or(Duration::MAX, |end| end.saturating_duration_since(std::time::Instant::now()));
    let mut received = receive_header(stream, deadline, within)?;
    let AnswerHeader { sequence, answer } = parse(&received.header)?;
    let bytes_max = if matches!(answer, Answer::Harvest { .. } | Answer::State) { payload_max } else { 0 };
    let payload = receive_payload(stream, received.payload_bytes, bytes_max, deadline)?;
    if received.descriptors.len() > 1 {
        return Err(WireError::Descriptors);
    }
    Ok((sequence, Reply { answer, payload, descriptor: received.descriptors.pop() }))
}

/// Connects with an end to the wait: a VMM that does not accept must not hold up its gateway.
pub(in crate::hypervisor) fn dial(path: &Path, within: Duration) -> io::Result<UnixStream> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(within.max(Duration::from_millis(1))))?;
    let address = SocketAddrUnix::new(path)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Err(rustix::io::Errno::INTR) => {}
            outcome => return outcome.map(|()| UnixStream::from(socket)).map_err(io::Error::from),
        }
    }
}
