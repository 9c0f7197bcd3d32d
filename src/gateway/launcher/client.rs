//! The gateway's side of its launcher.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use super::{Answer, Registration, Request, Start};
use crate::companion::{Asked, Mailbox, Said, Unanswered, companion};
use crate::config::Config;
use crate::hypervisor::{HypervisorError, LaunchVariables, LaunchedVmm, VmmProcess};
use crate::identity::OpenFiles;
use crate::limits;
use crate::storage::DiskPlace;
use crate::telemetry::Problem;
use crate::types::MigrationId;
use crate::wire::ErrorClass;

/// What everybody is told of one that is not there any more.
pub(in crate::gateway) const ENDED: &str =
    "the launcher of VMMs has ended, so no VM can arrive here: restart the gateway; the VMs that run here run on meanwhile";

/// A launcher, which has the templates of this gateway's configuration.
#[derive(Debug, Clone)]
pub(in crate::gateway) struct Launcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    mailbox: Arc<Mailbox<State>>,
    runtime: PathBuf,
    /// What it opens.
    files: Vec<PathBuf>,
}

/// What the launcher has said last of a request that somebody waits for.
#[derive(Debug)]
enum State {
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
        let ready = launcher.0.mailbox.wait(limits::LAUNCHER_ANSWERS_WITHIN, |told| told.ready.then_some(()));
        ready.map_err(|why| failed(unanswered(why)).with_hint("it says why above"))?;
        Ok(launcher)
    }

    fn spawn(registration: Registration) -> io::Result<Self> {
        Ok(Self::over(companion(&["launcher"], &registration)?, registration.runtime_directory, registration.files))
    }

    /// The one at the other end of a socket.
    pub(super) fn over(socket: OwnedFd, runtime: PathBuf, files: Vec<PathBuf>) -> Self {
        let bytes_max = [limits::LAUNCHER_MESSAGE_BYTES_MAX, limits::LAUNCHER_ANSWER_BYTES_MAX];
        Self(Arc::new(Shared { mailbox: Mailbox::over(socket, bytes_max, read), runtime, files }))
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
        answer(&asked, |state| if let State::Made(kept) = state { Some(*kept) } else { None })
    }

    /// Whether it has ended, so that nothing can be started or made any more.
    pub(in crate::gateway) fn has_ended(&self) -> bool {
        self.0.mailbox.look(|told| told.gone)
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
        let opened = answer(&asked, |state| match state {
            State::Opened(file) => Some(file.take().map(File::from).ok_or_else(|| io::ErrorKind::InvalidData.into())),
            State::NotOpened(errno) => Some(Err(io::Error::from_raw_os_error(*errno))),
            _ => None,
        });
        opened?
    }
}

impl Shared {
    fn say(&self, request: &Request) -> io::Result<()> {
        self.mailbox.say(request, true).map_err(unanswered)
    }

    /// Says something that is answered.
    fn ask(&self, request: impl FnOnce(u64) -> Request) -> io::Result<Asked<State>> {
        let asked = self.mailbox.number(usize::MAX).map_err(|_| unanswered(Unanswered::Full))?;
        self.say(&request(asked.number))?;
        Ok(asked)
    }

    fn start(self: &Arc<Self>, what: Start) -> io::Result<Box<dyn VmmProcess>> {
        let asked = self.ask(|number| Request::Start { number, what })?;
        let started = answer(&asked, |state| match state {
            State::Started(pid) => Some(*pid),
            // It can have ended between two looks; its status is asked for next.
            State::Ended(_) => Some(0),
            _ => None,
        });
        match started {
            Ok(pid) => Ok(Box::new(Launched { shared: Arc::clone(self), asked, pid })),
            Err(error) => {
                // If it starts yet, it is nobody's.
                let _ = self.say(&Request::End { number: asked.number });
                Err(error)
            }
        }
    }
}

fn read(message: &[u8], file: Option<OwnedFd>) -> Option<Said<State>> {
    let (number, state) = match serde_json::from_slice(message).ok()? {
        Answer::Ready => return Some(Said::Ready),
        Answer::Started { number, pid } => (number, State::Started(pid)),
        Answer::Made { number, kept } => (number, State::Made(kept)),
        Answer::Refused { number, why } => (number, State::Refused(why)),
        Answer::Opened { number } => (number, State::Opened(file)),
        Answer::NotOpened { number, errno } => (number, State::NotOpened(errno)),
        Answer::Ended { number, status } => {
            tracing::info!(number, status = %ExitStatus::from_raw(status), "VMM ended");
            (number, State::Ended(status))
        }
    };
    Some(Said::Of(number, state))
}

/// Waits for what is looked for, or for a refusal.
fn answer<T>(asked: &Asked<State>, mut found: impl FnMut(&mut State) -> Option<T>) -> io::Result<T> {
    let answer = asked.answer(limits::LAUNCHER_ANSWERS_WITHIN, |state| match state {
        State::Refused(why) => Some(Err(io::Error::other(why.clone()))),
        state => found(state).map(Ok),
    });
    answer.map_err(unanswered)?
}

fn unanswered(why: Unanswered) -> io::Error {
    match why {
        Unanswered::Gone => io::Error::new(io::ErrorKind::BrokenPipe, ENDED),
        Unanswered::Late | Unanswered::Full => io::Error::new(io::ErrorKind::TimedOut, "the launcher of VMMs does not answer"),
        Unanswered::Long(bytes) => io::Error::new(io::ErrorKind::InvalidInput, format!("a message to the launcher of {bytes} bytes")),
    }
}

/// A VMM that the launcher has started. It runs on when this is dropped, and the launcher waits for its end.
#[derive(Debug)]
struct Launched {
    shared: Arc<Shared>,
    asked: Asked<State>,
    pid: u32,
}

impl VmmProcess for Launched {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.asked.look(|state| state.and_then(ended)).map_err(unanswered)
    }

    fn kill(&mut self) -> io::Result<()> {
        self.shared.say(&Request::End { number: self.asked.number })?;
        answer(&self.asked, |state| ended(state)).map(drop)
    }
}

fn ended(state: &State) -> Option<ExitStatus> {
    if let State::Ended(status) = state { Some(ExitStatus::from_raw(*status)) } else { None }
}
