//! The gateway's side of its launcher.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg, send, socketpair,
};

use super::{Answer, Registration, Request, Start};
use crate::config::Config;
use crate::hypervisor::{HypervisorError, LaunchVariables, LaunchedVmm, VmmProcess};
use crate::identity::OpenFiles;
use crate::limits;
use crate::storage::DiskPlace;
use crate::telemetry::Problem;
use crate::types::MigrationId;
use crate::wire::ErrorClass;

/// Between two looks at what the launcher has said.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// What everybody is told of one that is not there any more.
pub(in crate::gateway) const ENDED: &str =
    "the launcher of VMMs has ended, so no VM can arrive here: restart the gateway; the VMs that run here run on meanwhile";

/// A launcher, which has the templates of this gateway's configuration.
#[derive(Debug, Clone)]
pub(in crate::gateway) struct Launcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    runtime: PathBuf,
    /// What it opens.
    files: Vec<PathBuf>,
    told: Mutex<Told>,
}

/// What the launcher has said of each request that somebody waits for.
#[derive(Debug, Default)]
struct Told {
    last: u64,
    ready: bool,
    gone: bool,
    asked: BTreeMap<u64, State>,
}

#[derive(Debug)]
enum State {
    Asked,
    Started(u32),
    /// Whether something of it was kept.
    Made(bool),
    Refused(String),
    Opened(Option<OwnedFd>),
    NotOpened(i32),
    Ended(i32),
}

impl Launcher {
    /// Starts one. It has to be done before the gateway gives up that it can.
    ///
    /// # Errors
    /// It cannot be started, or not become the gateway's user.
    pub(in crate::gateway) fn begin(config: &Config) -> Result<Self, Problem> {
        let registration = Registration::of(config);
        registration.templates()?;
        let failed = |error: io::Error| Problem::new(ErrorClass::Local, format!("the launcher of VMMs cannot be started: {error}"));
        let launcher = Self::spawn(registration).map_err(failed)?;
        let ready = launcher.0.wait(|told| told.ready.then_some(()));
        ready.map_err(|error| failed(error).with_hint("it says why above"))?;
        Ok(launcher)
    }

    fn spawn(registration: Registration) -> io::Result<Self> {
        Ok(Self::over(companion(&["launcher"], &registration)?, registration.runtime_directory, registration.files))
    }

    /// The one at the other end of a socket.
    pub(super) fn over(socket: OwnedFd, runtime: PathBuf, files: Vec<PathBuf>) -> Self {
        Self(Arc::new(Shared { socket, runtime, files, told: Mutex::default() }))
    }

    /// Has a VMM started, whether or not it listens.
    pub(super) fn start(&self, what: &Start) -> io::Result<Box<dyn VmmProcess>> {
        self.0.start(what.clone())
    }

    /// Has a VMM started and waits until its socket accepts.
    ///
    /// # Errors
    /// As of [`LaunchedVmm::begin`].
    pub(in crate::gateway) fn launch(&self, what: &Start, within: Duration) -> Result<LaunchedVmm, HypervisorError> {
        LaunchedVmm::begin(&self.variables(what), within, || self.start(what))
    }

    /// Has an empty file made for a disk; it is given its name by whoever asks.
    pub(in crate::gateway) fn make_disk(&self, migration: MigrationId, place: &DiskPlace) -> io::Result<bool> {
        let asked = self.0.ask(|number| Request::Make { number, migration, place: place.clone() })?;
        asked.answer(|state| if let State::Made(kept) = state { Some(*kept) } else { None })
    }

    /// Whether it has ended, so that nothing can be started or made any more.
    pub(in crate::gateway) fn has_ended(&self) -> bool {
        self.0.look(|told| told.gone).unwrap_or(false)
    }

    /// Where the files of that VMM are.
    pub(in crate::gateway) fn variables(&self, what: &Start) -> LaunchVariables {
        what.variables(&self.0.runtime)
    }
}

impl OpenFiles for Launcher {
    fn open(&self, path: &Path) -> io::Result<File> {
        self.open_number(self.0.files.iter().position(|known| known == path).ok_or(io::ErrorKind::PermissionDenied)?)
    }
}

impl Launcher {
    /// Opens the file that is there in the list.
    pub(super) fn open_number(&self, file: usize) -> io::Result<File> {
        let asked = self.0.ask(|number| Request::Open { number, file })?;
        let opened = asked.taken(|state| match state {
            State::Opened(file) => Some(file.take().map(File::from).ok_or_else(|| io::ErrorKind::InvalidData.into())),
            State::NotOpened(errno) => Some(Err(io::Error::from_raw_os_error(*errno))),
            _ => None,
        });
        opened?
    }
}

/// Starts this program as something else, which reads on standard input what it is to know; a socket to it.
pub(in crate::gateway) fn companion(what: &[&str], registration: &impl serde::Serialize) -> io::Result<OwnedFd> {
    let (own, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut registered = File::from(memfd_create("registration", MemfdFlags::CLOEXEC)?);
    registered.write_all(&serde_json::to_vec(registration)?)?;
    registered.rewind()?;
    // This program, whatever has become of its file. Ctrl-C in a terminal is for the gateway, which may still need VMMs ended.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("sealane").args(what).stdin(Stdio::from(registered)).stdout(Stdio::from(its)).process_group(0);
    // It ends with its socket, and whoever outlives it takes its exit status.
    drop(command.spawn()?);
    Ok(own)
}

impl Shared {
    fn say(&self, request: &Request) -> io::Result<()> {
        let bytes = serde_json::to_vec(request)?;
        if bytes.len() > limits::LAUNCHER_MESSAGE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a message to the launcher of {} bytes", bytes.len())));
        }
        rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::NOSIGNAL)).map_err(|_| gone())?;
        Ok(())
    }

    /// Takes in all that was said so far.
    fn listen(&self, told: &mut Told) -> io::Result<()> {
        let mut bytes = vec![0; limits::LAUNCHER_ANSWER_BYTES_MAX];
        loop {
            let (length, descriptor) = match hear(&self.socket, &mut bytes) {
                Err(error) if error == rustix::io::Errno::AGAIN => return Ok(()),
                Err(_) | Ok((0, _)) => {
                    told.gone = true;
                    return Ok(());
                }
                Ok(got) => got,
            };
            let message = bytes.get(..length).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            let (number, state) = match serde_json::from_slice(message)? {
                Answer::Ready => {
                    told.ready = true;
                    continue;
                }
                Answer::Started { number, pid } => (number, State::Started(pid)),
                Answer::Made { number, kept } => (number, State::Made(kept)),
                Answer::Refused { number, why } => (number, State::Refused(why)),
                Answer::Opened { number } => (number, State::Opened(descriptor)),
                Answer::NotOpened { number, errno } => (number, State::NotOpened(errno)),
                Answer::Ended { number, status } => {
                    tracing::info!(number, status = %ExitStatus::from_raw(status), "VMM ended");
                    (number, State::Ended(status))
                }
            };
            // Nobody asks about the others any more.
            if let Some(asked) = told.asked.get_mut(&number) {
                *asked = state;
            }
        }
    }

    /// Looks at what was said now.
    fn look<T>(&self, look: impl FnOnce(&mut Told) -> T) -> io::Result<T> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        self.listen(&mut told)?;
        Ok(look(&mut told))
    }

    /// Looks until there is what is waited for.
    fn wait<T>(&self, mut found: impl FnMut(&mut Told) -> Option<T>) -> io::Result<T> {
        let began = Instant::now();
        loop {
            let (answer, gone_away) = self.look(|told| (found(told), told.gone))?;
            match answer {
                Some(answer) => return Ok(answer),
                None if gone_away => return Err(gone()),
                None if began.elapsed() > limits::LAUNCHER_ANSWERS_WITHIN => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the launcher of VMMs does not answer"));
                }
                // Others look too, so what is waited for may be there without a word on the socket.
                None => drop(poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&LOOK))),
            }
        }
    }

    /// Says something that is answered.
    fn ask(self: &Arc<Self>, request: impl FnOnce(u64) -> Request) -> io::Result<Asked> {
        let number = self.look(|told| {
            told.last += 1;
            told.asked.insert(told.last, State::Asked);
            told.last
        })?;
        let asked = Asked { shared: Arc::clone(self), number };
        self.say(&request(number))?;
        Ok(asked)
    }

    fn start(self: &Arc<Self>, what: Start) -> io::Result<Box<dyn VmmProcess>> {
        let asked = self.ask(|number| Request::Start { number, what })?;
        let started = asked.answer(|state| match state {
            State::Started(pid) => Some(*pid),
            // It can have ended between two looks; its status is asked for next.
            State::Ended(_) => Some(0),
            _ => None,
        });
        match started {
            Ok(pid) => Ok(Box::new(Launched { asked, pid })),
            Err(error) => {
                // If it starts yet, it is nobody's.
                let _ = self.say(&Request::End { number: asked.number });
                Err(error)
            }
        }
    }
}

/// Something that the launcher was asked. Without it nobody waits for the answer any more.
#[derive(Debug)]
struct Asked {
    shared: Arc<Shared>,
    number: u64,
}

impl Asked {
    /// Waits for what is looked for, or for a refusal.
    fn answer<T>(&self, mut found: impl FnMut(&State) -> Option<T>) -> io::Result<T> {
        self.taken(|state| found(state))
    }

    /// As [`answer`](Self::answer), for what can be taken once.
    fn taken<T>(&self, mut found: impl FnMut(&mut State) -> Option<T>) -> io::Result<T> {
        self.shared.wait(|told| match told.asked.get_mut(&self.number)? {
            State::Refused(why) => Some(Err(io::Error::other(why.clone()))),
            state => found(state).map(Ok),
        })?
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut told = self.shared.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.asked.remove(&self.number);
    }
}

/// A message, and the descriptor that may come along.
fn hear(socket: &OwnedFd, bytes: &mut [u8]) -> rustix::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let descriptors =
        control.drain().filter_map(|message| if let RecvAncillaryMessage::ScmRights(all) = message { Some(all) } else { None });
    Ok((got.bytes, descriptors.flatten().last()))
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, ENDED)
}

/// A VMM that the launcher has started. It runs on when this is dropped, and the launcher waits for its end.
#[derive(Debug)]
struct Launched {
    asked: Asked,
    pid: u32,
}

impl VmmProcess for Launched {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let Asked { shared, number } = &self.asked;
        let (ended, gone_away) = shared.look(|told| (ended(told, *number), told.gone))?;
        match ended {
            None if gone_away => Err(gone()),
            ended => Ok(ended),
        }
    }

    fn kill(&mut self) -> io::Result<()> {
        let Asked { shared, number } = &self.asked;
        shared.say(&Request::End { number: *number })?;
        shared.wait(|told| ended(told, *number)).map(drop)
    }
}

fn ended(told: &Told, number: u64) -> Option<ExitStatus> {
    match told.asked.get(&number) {
        Some(State::Ended(status)) => Some(ExitStatus::from_raw(*status)),
        _ => None,
    }
}
