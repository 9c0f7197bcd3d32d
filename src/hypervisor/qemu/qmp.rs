//! QMP, the machine protocol of QEMU: JSON lines over a unix socket, answers by id, and events beside them.
//!
//! What the other side says is taken for hostile: a line is bounded before it is kept, every wait has an end, and an answer that
//! nobody waits for ends the connection. Events, states and fields that are not known are none of a client's business.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Pid;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::hypervisor::attach::{dial, printable};
use crate::hypervisor::{HypervisorError, QEMU_SCHEME};
use crate::limits;

/// Which QEMU this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    /// Major, minor, micro.
    pub(super) numbers: (u32, u32, u32),
    /// What the packager calls it.
    pub(super) package: String,
}

/// What QEMU says by itself.
#[derive(Debug)]
pub(super) enum Notice<'a> {
    /// Something happened.
    Event {
        /// Its name.
        name: &'a str,
        /// What belongs to it; null without.
        data: &'a Value,
    },
    /// Nothing more is heard, for this reason.
    Ended(&'a str),
}

/// Whoever listens is called on the connection's own thread, and must not wait there.
pub(super) type Listener = Box<dyn FnMut(Notice<'_>) + Send>;

/// One connection to a monitor. QEMU serves one at a time on a socket; others wait for their greeting.
pub(super) struct Qmp {
    vm: String,
    path: PathBuf,
    version: Version,
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
    within: Duration,
}

/// What the reader's thread and those who wait have in common.
#[derive(Debug, Default)]
struct Shared(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    last_id: u64,
    answers: BTreeMap<u64, SyncSender<Result<Value, Refused>>>,
    /// Why nothing is answered any more.
    ended: Option<String>,
}

/// An error of QEMU, in its words.
#[derive(Debug, Clone, Deserialize)]
struct Refused {
    #[serde(default)]
    desc: String,
}

/// A line of QEMU. Which of these it is, its keys say.
#[derive(Debug, Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refused>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Debug, Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
}

#[derive(Debug, Deserialize)]
struct GreetingVersion {
    qemu: Numbers,
    #[serde(default)]
    package: String,
}

#[derive(Debug, Deserialize)]
struct Numbers {
    major: u32,
    minor: u32,
    #[serde(default)]
    micro: u32,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").field("vm", &self.vm).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Qmp {
    /// Connects to the monitor at `path` and takes it into command mode; `vm` is for messages. Every answer may take `within`.
    ///
    /// # Errors
    /// Nobody listens, another client has the monitor, or it does not speak QMP.
    pub(super) fn connect(path: &Path, vm: &str, within: Duration, listener: Listener) -> Result<Self, HypervisorError> {
        let unreachable = |source| HypervisorError::Unreachable { vm: vm.to_owned(), address: address(path), source };
        let stream = dial(path, within).map_err(unreachable)?;
        stream.set_read_timeout(Some(within)).map_err(unreachable)?;
        stream.set_write_timeout(Some(within)).map_err(unreachable)?;
        let mut reader = BufReader::new(stream.try_clone().map_err(unreachable)?);
        let greeting = read_line(&mut reader).map_err(|error| {
            let busy = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            unreachable(if busy {
                io::Error::new(io::ErrorKind::TimedOut, "no greeting: another client may have the monitor")
            } else {
                error
            })
        })?;
        let broken = |reason: String| HypervisorError::Protocol { vm: vm.to_owned(), reason };
        let greeting: Greeting =
            serde_json::from_slice(&greeting).map_err(|error| broken(format!("its greeting is none of QMP: {error}")))?;
        let GreetingVersion { qemu, package } = greeting.qmp.version;
        let shared = Arc::<Shared>::default();
        // From here on the reader's thread waits as long as the connection lasts.
        stream.set_read_timeout(None).map_err(unreachable)?;
        let heard = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("qmp".to_owned())
            .stack_size(READER_STACK_BYTES)
            .spawn(move || listen(reader, &heard, listener))
            .map_err(unreachable)?;
        let qmp = Self {
            vm: vm.to_owned(),
            path: path.to_owned(),
            version: Version { numbers: (qemu.major, qemu.minor, qemu.micro), package: printable(&package, limits::NAME_BYTES_MAX) },
            writer: Mutex::new(stream),
            shared,
            within,
        };
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Where it is, as the journal has it.
    pub(super) fn address(&self) -> String {
        address(&self.path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Which process listens at the monitor, or did when that was opened.
    pub(super) fn process(&self) -> Option<Pid> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::net::sockopt::socket_peercred(&*writer).ok().map(|of| of.pid)
    }

    /// Whose it is, for messages.
    pub(super) fn vm(&self) -> &str {
        &self.vm
    }

    /// Which QEMU answers.
    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// Performs a command and waits for its answer.
    ///
    /// # Errors
    /// QEMU refuses it, does not answer in time, or is gone.
    pub(super) fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, HypervisorError> {
        self.exchange(command, arguments, None, self.within)
    }

    /// The same, for what may take as long as this.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(super) fn execute_within(&self, command: &'static str, within: Duration) -> Result<Value, HypervisorError> {
        self.exchange(command, Value::Null, None, within)
    }

    /// The same, with a descriptor for `getfd` and its like.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(super) fn execute_with(
        &self,
        command: &'static str,
        arguments: Value,
        descriptor: BorrowedFd<'_>,
    ) -> Result<Value, HypervisorError> {
        self.exchange(command, arguments, Some(descriptor), self.within)
    }

    /// QEMU's answer as what it has to be.
    ///
    /// # Errors
    /// As [`execute`](Self::execute), and when the answer has another form.
    pub(super) fn ask<T: for<'de> Deserialize<'de>>(&self, command: &'static str, arguments: Value) -> Result<T, HypervisorError> {
        let answer = self.execute(command, arguments)?;
        serde_json::from_value(answer)
            .map_err(|error| self.protocol(&format!("its answer to `{command}` is another than expected: {error}")))
    }

    pub(super) fn protocol(&self, reason: &str) -> HypervisorError {
        HypervisorError::Protocol { vm: self.vm.clone(), reason: printable(reason, limits::REASON_BYTES_MAX) }
    }

    pub(super) fn refused(&self, request: &'static str, reason: &str) -> HypervisorError {
        HypervisorError::Refused { vm: self.vm.clone(), request, reason: printable(reason, limits::REASON_BYTES_MAX) }
    }

    fn unreachable(&self, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> HypervisorError {
        let source = io::Error::new(io::ErrorKind::NotConnected, why);
        HypervisorError::Unreachable { vm: self.vm.clone(), address: self.address(), source }
    }

    fn exchange(
        &self,
        command: &'static str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
        within: Duration,
    ) -> Result<Value, HypervisorError> {
        let (id, answer) = self.shared.expect().map_err(|why| self.unreachable(why))?;
        let mut request = json!({ "execute": command, "id": id });
        if let (Some(request), false) = (request.as_object_mut(), arguments.is_null()) {
            request.insert("arguments".to_owned(), arguments);
        }
        let line = format!("{request}\n");
        if let Err(source) = self.send(line.as_bytes(), descriptor) {
            self.shared.forget(id);
            return Err(HypervisorError::Unreachable { vm: self.vm.clone(), address: self.address(), source });
        }
        match answer.recv_timeout(within) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Refused { desc })) => Err(self.refused(command, &desc)),
            Err(RecvTimeoutError::Disconnected) => {
                let why = self.shared.lock().ended.clone();
                Err(self.unreachable(why.unwrap_or_else(|| "the connection ended".to_owned())))
            }
            Err(RecvTimeoutError::Timeout) => {
                // An answer that comes too late would be one that nobody waits for.
                self.hang_up();
                Err(self.unreachable(format!("no answer to `{command}` within {within:?}")))
            }
        }
    }

    fn send(&self, line: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let descriptors = descriptor.as_slice();
        let mut sent = 0;
        if !descriptors.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            sent = sendmsg(&*writer, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
        }
        writer.write_all(line.get(sent..).unwrap_or_default())
    }

    fn hang_up(&self) {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // Its thread ends with the socket, also one that is gone already.
        let _ = writer.shutdown(std::net::Shutdown::Both);
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.hang_up();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a command, and where its answer comes.
    fn expect(&self) -> Result<(u64, Receiver<Result<Value, Refused>>), String> {
        let mut waiting = self.lock();
        if let Some(why) = &waiting.ended {
            return Err(why.clone());
        }
        waiting.last_id += 1;
        let (answered, answer) = sync_channel(1);
        let id = waiting.last_id;
        waiting.answers.insert(id, answered);
        Ok((id, answer))
    }

    fn forget(&self, id: u64) {
        self.lock().answers.remove(&id);
    }
}

fn address(path: &Path) -> String {
    format!("{QEMU_SCHEME}{}", path.display())
}

/// Reads lines until the connection ends or breaks the protocol, and tells everybody who waits.
fn listen(mut reader: BufReader<UnixStream>, shared: &Shared, mut listener: Listener) {
    let why = loop {
        let line = match read_line(&mut reader) {
            Ok(line) => line,
            Err(error) => break error.to_string(),
        };
        let line: Line = match serde_json::from_slice(&line) {
            Ok(line) => line,
            Err(error) => break format!("a line that is none of QMP: {error}"),
        };
        if let Some(name) = &line.event {
            listener(Notice::Event { name, data: &line.data });
            continue;
        }
        let answer = match (line.answer, line.error) {
            (Some(answer), None) => Ok(answer),
            (None, Some(refused)) => Err(refused),
            _ => break "an answer that is neither a result nor an error".to_owned(),
        };
        let waits = line.id.and_then(|id| shared.lock().answers.remove(&id));
        // The one who waits has room for one answer.
        match waits {
            Some(waits) => drop(waits.try_send(answer)),
            None => break "an answer to no question".to_owned(),
        }
    };
    let why = printable(&why, limits::REASON_BYTES_MAX);
    // Whatever it says from here on is not read.
    let _ = reader.get_ref().shutdown(std::net::Shutdown::Both);
    {
        let mut waiting = shared.lock();
        waiting.ended = Some(why.clone());
        waiting.answers.clear();
    }
    listener(Notice::Ended(&why));
}

/// One line without its end, at most [`limits::QMP_LINE_BYTES_MAX`] bytes of it.
fn read_line(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let most = u64::try_from(limits::QMP_LINE_BYTES_MAX).unwrap_or(u64::MAX);
    let mut line = Vec::new();
    reader.take(most).read_until(b'\n', &mut line)?;
    match line.pop() {
        Some(b'\n') => Ok(line),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed the connection")),
        Some(_) if line.len() + 1 >= limits::QMP_LINE_BYTES_MAX => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line of more than {} bytes", limits::QMP_LINE_BYTES_MAX)))
        }
        Some(_) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed the connection inside a line")),
    }
}

/// When something has to have happened.
pub(super) fn by(within: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(within).unwrap_or(now)
}

/// A parser of JSON that is 128 levels deep, and a listener.
const READER_STACK_BYTES: usize = 512 * 1024;
