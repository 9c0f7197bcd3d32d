//! The launcher's side: a process with one thread, its socket on standard output.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::{Answer, Registration, Request, Start};
use crate::gateway::sandbox::{Account, become_user};
use crate::hypervisor::LaunchTemplate;
use crate::limits;
use crate::storage::{DiskPlace, make_disk};
use crate::telemetry::Problem;
use crate::types::MigrationId;
use crate::wire::ErrorClass;

/// Reads from standard input what may be started, then serves the gateway at the other end of standard output until that ends.
///
/// # Errors
/// One of the two is not as a gateway makes it, or the gateway says what it cannot mean.
pub fn run() -> Result<(), Problem> {
    let registration = serde_json::from_reader(io::stdin().lock()).map_err(|error| wrong(format!("standard input: {error}")))?;
    let socket = io::stdout().as_fd().try_clone_to_owned().map_err(|error| wrong(format!("standard output: {error}")))?;
    serve(socket, registration)
}

fn wrong(why: String) -> Problem {
    Problem::new(ErrorClass::Local, why).with_hint("a gateway starts its launcher itself")
}

/// Serves the gateway at the other end of a socket.
pub(super) fn serve(socket: OwnedFd, registration: Registration) -> Result<(), Problem> {
    match Process::begin(socket, registration)?.serve() {
        // The gateway was killed before it heard everything. VMMs run on.
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
        served => served.map_err(|error| wrong(format!("the gateway's socket: {error}"))),
    }
}

/// The next message; nothing when the gateway has ended.
fn hear(socket: &OwnedFd) -> io::Result<Option<Request>> {
    let mut bytes = vec![0; limits::LAUNCHER_MESSAGE_BYTES_MAX];
    let (_, length) = rustix::io::retry_on_intr(|| recv(socket, bytes.as_mut_slice(), RecvFlags::TRUNC))?;
    match bytes.get(..length) {
        Some([]) => Ok(None),
        Some(message) => Ok(Some(serde_json::from_slice(message)?)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "a message longer than the limit")),
    }
}

fn no(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// A VMM that was started and has not ended.
struct Running {
    child: Child,
    /// Readable when it has ended.
    ended: OwnedFd,
}

struct Process {
    socket: OwnedFd,
    runtime: PathBuf,
    templates: BTreeMap<String, (LaunchTemplate, u64)>,
    disks: Vec<DiskPlace>,
    files: Vec<PathBuf>,
    running: BTreeMap<u64, Running>,
}

impl Process {
    fn begin(socket: OwnedFd, registration: Registration) -> Result<Self, Problem> {
        let templates = registration.templates()?;
        let Registration { runtime_directory, user, disks, files, .. } = registration;
        if let Some(user) = user {
            become_user(&Account::find(&user)?)?;
        }
        let process = Self { socket, runtime: runtime_directory, templates, disks, files, running: BTreeMap::new() };
        process.say(&Answer::Ready).map_err(|error| Problem::new(ErrorClass::Local, error.to_string()))?;
        Ok(process)
    }

    fn say(&self, answer: &Answer) -> io::Result<()> {
        let bytes = serde_json::to_vec(answer)?;
        // A gateway that has died is no reason to die of a signal.
        rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    fn serve(mut self) -> io::Result<()> {
        loop {
            let mut waits: Vec<PollFd<'_>> = vec![PollFd::new(&self.socket, PollFlags::IN)];
            waits.extend(self.running.values().map(|running| PollFd::new(&running.ended, PollFlags::IN)));
            rustix::io::retry_on_intr(|| poll(&mut waits, None))?;
            let asked = !waits[0].revents().is_empty();
            drop(waits);
            self.reap()?;
            if !asked {
                continue;
            }
            match hear(&self.socket)? {
                // VMMs run on.
                None => return Ok(()),
                Some(Request::Start { number, what }) => {
                    let started = self.start(number, &what);
                    self.answer(number, started.map(|pid| Answer::Started { number, pid }))?;
                }
                Some(Request::Make { number, migration, place }) => {
                    let made = self.make(migration, &place);
                    self.answer(number, made.map(|kept| Answer::Made { number, kept }))?;
                }
                Some(Request::Open { number, file }) => self.open(number, file)?,
                Some(Request::End { number }) => self.end(number)?,
            }
        }
    }

    fn answer(&self, number: u64, done: io::Result<Answer>) -> io::Result<()> {
        let why = |error: io::Error| error.to_string().chars().take(limits::REASON_BYTES_MAX).collect();
        self.say(&done.unwrap_or_else(|error| Answer::Refused { number, why: why(error) }))
    }

    /// INVARIANT(templates-once): a disk is made where the configuration has one, and no longer than it says.
    fn make(&self, migration: MigrationId, place: &DiskPlace) -> io::Result<bool> {
        let fits = |known: &&DiskPlace| {
            DiskPlace { bytes: place.bytes, disk: place.disk, ..(*known).clone() } == *place && place.bytes <= known.bytes
        };
        self.disks.iter().find(fits).ok_or_else(|| no(format!("no `[[vm.disk]]` is this disk of {} bytes", place.bytes)))?;
        make_disk(migration, place)
    }

    /// INVARIANT(templates-once): program and arguments are the template's, and files are where VMMs have them.
    fn start(&mut self, number: u64, what: &Start) -> io::Result<u32> {
        let (template, most) = self.templates.get(&what.template).ok_or_else(|| no(format!("there is no template `{}`", what.template)))?;
        if what.memory_bytes > *most {
            return Err(no(format!("{} bytes of memory: template `{}` allows {most}", what.memory_bytes, what.template)));
        }
        if self.running.len() >= limits::LAUNCHED_MAX || self.running.contains_key(&number) {
            return Err(no(format!("{} VMMs that this gateway started run already", self.running.len())));
        }
        let mut child = template.spawn(&what.variables(&self.runtime))?;
        let pid = child.id();
        let ended = Pid::from_raw(pid.cast_signed())
            .ok_or(io::ErrorKind::InvalidData.into())
            .and_then(|pid| Ok::<_, io::Error>(pidfd_open(pid, PidfdFlags::empty())?));
        match ended {
            Ok(ended) => self.running.insert(number, Running { child, ended }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                return Err(error);
            }
        };
        Ok(pid)
    }

    /// INVARIANT(templates-once): one of the files that were named at the start, whatever is there now.
    fn open(&self, number: u64, file: usize) -> io::Result<()> {
        let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC).bits().cast_signed();
        let path = self.files.get(file).ok_or(io::ErrorKind::NotFound);
        let opened = path.map_err(Into::into).and_then(|path| OpenOptions::new().read(true).custom_flags(flags).open(path));
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                return self
                    .say(&Answer::NotOpened { number, errno: error.raw_os_error().unwrap_or(rustix::io::Errno::NOENT.raw_os_error()) });
            }
        };
        let (bytes, descriptors) = (serde_json::to_vec(&Answer::Opened { number })?, [opened.as_fd()]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        rustix::io::retry_on_intr(|| sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// INVARIANT(own-children-only): a number that is not of one is nothing.
    fn end(&mut self, number: u64) -> io::Result<()> {
        let Some(running) = self.running.get_mut(&number) else { return Ok(()) };
        // The whole group, as the template may have started the VMM through a wrapper. Its end is said when it has come.
        if running.child.try_wait()?.is_none()
            && let Some(group) = Pid::from_raw(running.child.id().cast_signed())
            && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            tracing::warn!(pid = running.child.id(), %error, "a VMM cannot be ended");
        }
        Ok(())
    }

    fn reap(&mut self) -> io::Result<()> {
        let mut ended = Vec::new();
        for (number, running) in &mut self.running {
            if let Some(status) = running.child.try_wait()? {
                ended.push((*number, status.into_raw()));
            }
        }
        for (number, status) in ended {
            self.running.remove(&number);
            self.say(&Answer::Ended { number, status })?;
        }
        Ok(())
    }
}
