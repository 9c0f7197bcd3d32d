//! Starts an incoming VMM from the operator's template.
//!
//! The VMM is no child in any sense that matters: own process group, no inherited descriptors but `/dev/null` and its log, and it runs on
//! when whoever started it dies.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use crate::hypervisor::HypervisorError;
use crate::hypervisor::attach::{dial, printable};
use crate::limits;
use crate::types::{VmName, VmUuid};

/// Between two looks at a socket that does not accept yet.
const POLL_PAUSE: Duration = Duration::from_millis(5);

/// The command line of a VMM: arguments, never a shell, with `{socket} {vm} {uuid} {memory_bytes} {vcpus} {serial}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchTemplate {
    arguments: Vec<Vec<Piece>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variable {
    Socket,
    Vm,
    Uuid,
    MemoryBytes,
    Vcpus,
    Serial,
}

const VARIABLES: [(&str, Variable); 6] = [
    ("socket", Variable::Socket),
    ("vm", Variable::Vm),
    ("uuid", Variable::Uuid),
    ("memory_bytes", Variable::MemoryBytes),
    ("vcpus", Variable::Vcpus),
    ("serial", Variable::Serial),
];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable(Variable),
}

/// A command line that is no template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// No program, or more arguments than the limit.
    #[error("VMM command line has {count} arguments: expected 1 to {max}", max = limits::LAUNCH_ARGUMENTS_MAX)]
    Count {
        /// Arguments given.
        count: usize,
    },
    /// A placeholder that does not exist, or a brace without its pair.
    #[error(
        "VMM command line argument `{argument}` has `{{{found}`: expected one of `{{socket}} {{vm}} {{uuid}} {{memory_bytes}} {{vcpus}} {{serial}}`"
    )]
    Placeholder {
        /// The argument.
        argument: String,
        /// What follows the brace.
        found: String,
    },
    /// The VMM would not know where to listen.
    #[error("VMM command line has no `{{socket}}`: the gateway could not reach it")]
    NoSocket,
}

/// What the placeholders stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchVariables {
    /// Where the VMM is to listen.
    pub socket: PathBuf,
    /// The VM's name.
    pub vm: VmName,
    /// The VM's UUID.
    pub uuid: VmUuid,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// File for the guest's serial console.
    pub serial: PathBuf,
    /// File that the VMM's own output is appended to.
    pub log: PathBuf,
}

impl LaunchTemplate {
    /// Checks a command line; `arguments[0]` is the program.
    ///
    /// # Errors
    /// [`TemplateError`] names the argument.
    pub fn new(arguments: &[String]) -> Result<Self, TemplateError> {
        if !(1..=limits::LAUNCH_ARGUMENTS_MAX).contains(&arguments.len()) {
            return Err(TemplateError::Count { count: arguments.len() });
        }
        let arguments = arguments.iter().map(|argument| pieces(argument)).collect::<Result<Vec<_>, _>>()?;
        if !arguments.iter().flatten().any(|piece| *piece == Piece::Variable(Variable::Socket)) {
            return Err(TemplateError::NoSocket);
        }
        Ok(Self { arguments })
    }

    /// The command line for one VM.
    #[must_use]
    pub fn fill(&self, variables: &LaunchVariables) -> Vec<std::ffi::OsString> {
        let fill = |pieces: &Vec<Piece>| {
            let mut out = std::ffi::OsString::new();
            for piece in pieces {
                match piece {
                    Piece::Text(text) => out.push(text),
                    Piece::Variable(Variable::Socket) => out.push(&variables.socket),
                    Piece::Variable(Variable::Vm) => out.push(variables.vm.as_str()),
                    Piece::Variable(Variable::Uuid) => out.push(variables.uuid.to_string()),
                    Piece::Variable(Variable::MemoryBytes) => out.push(variables.memory_bytes.to_string()),
                    Piece::Variable(Variable::Vcpus) => out.push(variables.vcpus.to_string()),
                    Piece::Variable(Variable::Serial) => out.push(&variables.serial),
                }
            }
            out
        };
        self.arguments.iter().map(fill).collect()
    }

    /// Starts the VMM as a child of this process and waits until its socket accepts.
    ///
    /// # Errors
    /// As of [`LaunchedVmm::begin`].
    pub fn launch(&self, variables: &LaunchVariables, within: Duration) -> Result<LaunchedVmm, HypervisorError> {
        LaunchedVmm::begin(variables, within, || self.spawn(variables).map(|child| Box::new(OwnChild(Some(child))) as Box<dyn VmmProcess>))
    }

    /// Starts the VMM, with its own output in its log.
    ///
    /// # Errors
    /// The log cannot be opened, or the program not be started.
    pub fn spawn(&self, variables: &LaunchVariables) -> io::Result<Child> {
        let arguments = self.fill(variables);
        let (program, rest) = arguments.split_first().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // Where the log is, others may write too; a link would lead out of there.
        let mut options = OpenOptions::new();
        let log = options.create(true).append(true).mode(0o600).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&variables.log)?;
        Command::new(program).args(rest).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0).spawn()
    }
}

fn pieces(argument: &str) -> Result<Vec<Piece>, TemplateError> {
    let mut pieces = Vec::new();
    let mut rest = argument;
    while let Some((before, after)) = rest.split_once('{') {
        let wrong = || TemplateError::Placeholder { argument: printable(argument, 80), found: printable(after, 40) };
        let (name, tail) = after.split_once('}').ok_or_else(wrong)?;
        let (_, variable) = VARIABLES.iter().find(|(known, _)| *known == name).ok_or_else(wrong)?;
        pieces.push(Piece::Text(before.to_owned()));
        pieces.push(Piece::Variable(*variable));
        rest = tail;
    }
    pieces.push(Piece::Text(rest.to_owned()));
    Ok(pieces)
}

/// The end of a VMM's log.
pub(super) fn log_tail_of(path: &Path) -> String {
    tail_of(path, 0)
}

fn tail_of(path: &Path, start: u64) -> String {
    match File::open(path) {
        Ok(log) => log_tail(log, start),
        Err(error) => format!("(its log cannot be read: {error})"),
    }
}

fn log_tail(mut log: File, start: u64) -> String {
    let mut tail = Vec::new();
    let max = u64::try_from(limits::LAUNCH_LOG_TAIL_BYTES_MAX).unwrap_or(u64::MAX);
    let read = log.metadata().and_then(|metadata| {
        log.seek(SeekFrom::Start(start.max(metadata.len().saturating_sub(max))))?;
        log.take(max).read_to_end(&mut tail)
    });
    match read {
        Ok(_) => printable(String::from_utf8_lossy(&tail).trim(), limits::LAUNCH_LOG_TAIL_BYTES_MAX),
        Err(error) => format!("(its log cannot be read: {error})"),
    }
}

/// A process that was started for a VMM, by whoever is its parent. Dropping it leaves the VMM running.
pub trait VmmProcess: std::fmt::Debug + Send {
    /// Its number.
    fn pid(&self) -> u32;

    /// How it ended, if it did.
    ///
    /// # Errors
    /// It cannot be asked about.
    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>>;

    /// Ends it, and all that it has started. A guest in it is lost.
    ///
    /// # Errors
    /// It cannot be ended.
    fn kill(&mut self) -> io::Result<()>;
}

/// A VMM that this gateway had started. Dropping it leaves the VMM running.
#[derive(Debug)]
pub struct LaunchedVmm {
    /// Where it listens.
    pub socket: PathBuf,
    /// Its process.
    pub pid: u32,
    process: Box<dyn VmmProcess>,
}

impl LaunchedVmm {
    /// Has a VMM started and waits until its socket accepts.
    ///
    /// # Errors
    /// The program cannot be started, dies early (the end of its log is in the message), does not listen
    /// within `within` (it is then ended), or something listens at the socket already.
    pub fn begin(
        variables: &LaunchVariables,
        within: Duration,
        start: impl FnOnce() -> io::Result<Box<dyn VmmProcess>>,
    ) -> Result<Self, HypervisorError> {
        let local = |what| move |source| HypervisorError::Local { vm: variables.vm.to_string(), what, source };
        if dial(&variables.socket, Duration::from_millis(100)).is_ok() {
            return Err(local("cannot start a VMM")(io::Error::new(io::ErrorKind::AddrInUse, "another VMM listens at its socket")));
        }
        // What an earlier one has said is not this one's.
        let log_start = std::fs::metadata(&variables.log).map_or(0, |log| log.len());
        let process = start().map_err(local("cannot start a VMM"))?;
        let mut vmm = Self { socket: variables.socket.clone(), pid: process.pid(), process };
        let started = Instant::now();
        loop {
            if let Some(status) = vmm.try_wait().map_err(local("cannot watch the VMM"))? {
                let said = tail_of(&variables.log, log_start);
                let why = format!("it ended with {status} before it listened and said `{said}`");
                return Err(local("cannot start a VMM")(io::Error::other(why)));
            }
            if dial(&variables.socket, Duration::from_millis(100)).is_ok() {
                return Ok(vmm);
            }
            if started.elapsed() >= within {
                vmm.kill().map_err(local("cannot end a VMM that does not listen"))?;
                return Err(local("cannot start a VMM")(io::Error::new(io::ErrorKind::TimedOut, "it did not listen in time")));
            }
            std::thread::sleep(POLL_PAUSE);
        }
    }

    /// How the VMM ended, if it did.
    ///
    /// # Errors
    /// The process cannot be asked about.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.process.try_wait()
    }

    /// Ends a VMM that does not listen to requests any more. The guest in it is lost.
    ///
    /// # Errors
    /// The process cannot be ended.
    pub fn kill(&mut self) -> io::Result<()> {
        self.process.kill()
    }
}

/// A child of this process.
#[derive(Debug)]
struct OwnChild(Option<Child>);

impl VmmProcess for OwnChild {
    fn pid(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.as_mut().map_or(Ok(None), Child::try_wait)
    }

    fn kill(&mut self) -> io::Result<()> {
        let Some(child) = &mut self.0 else { return Ok(()) };
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        // The whole group, as the template may have started the VMM through a wrapper.
        let group = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
        match group {
            Some(group) => rustix::process::kill_process_group(group, rustix::process::Signal::KILL)?,
            None => child.kill()?,
        }
        child.wait()?;
        Ok(())
    }
}

impl Drop for OwnChild {
    /// Somebody has to take the exit status as long as this process lives.
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        let pid = child.id();
        let waiter = std::thread::Builder::new().name("vmm-wait".to_owned()).stack_size(64 * 1024).spawn(move || {
            if let Ok(status) = child.wait() {
                tracing::info!(pid, %status, "VMM ended");
            }
        });
        if let Err(error) = waiter {
            tracing::warn!(pid, %error, "nobody waits for the VMM to end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(arguments: &[&str]) -> Result<LaunchTemplate, TemplateError> {
        LaunchTemplate::new(&arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
    }

    fn variables(dir: &std::path::Path) -> LaunchVariables {
        LaunchVariables {
            socket: dir.join("vmm.sock"),
            vm: "vm-1".parse().unwrap(),
            uuid: VmUuid([1; 16]),
            memory_bytes: 4096,
            vcpus: 2,
            serial: dir.join("serial.log"),
            log: dir.join("vmm.log"),
        }
    }

    #[test]
    fn placeholders_are_filled_inside_arguments_and_never_reach_a_shell() {
        let template = template(&["vmm", "--api={socket}", "{vm}-{vcpus}", "$(id); {uuid}", "{memory_bytes}"]).unwrap();
        let filled = template.fill(&variables(std::path::Path::new("/run/x")));
        let expected = ["vmm", "--api=/run/x/vmm.sock", "vm-1-2", "$(id); 01010101-0101-0101-0101-010101010101", "4096"];
        assert_eq!(filled, expected);
    }

    #[test]
    fn templates_with_mistakes_are_refused_by_name() {
        assert_eq!(template(&[]).unwrap_err(), TemplateError::Count { count: 0 });
        assert_eq!(template(&["vmm"]).unwrap_err(), TemplateError::NoSocket);
        for bad in ["{sock}", "{socket", "{}", "{socket }"] {
            let error = template(&["vmm", "{socket}", bad]).unwrap_err();
            assert!(error.to_string().contains(bad.trim_start_matches('{')), "{error}");
        }
    }

    #[test]
    fn a_vmm_that_dies_early_is_reported_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let variables = variables(dir.path());
        std::fs::write(&variables.log, "older run\n").unwrap();
        let template = template(&["/bin/sh", "-c", "echo no such kernel >&2; exit 3", "{socket}"]).unwrap();
        let error = template.launch(&variables, Duration::from_secs(20)).unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains("no such kernel") && text.contains('3') && !text.contains("older run"), "{text}");
    }

    #[test]
    fn a_vmm_that_does_not_listen_in_time_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let template = template(&["/bin/sh", "-c", "echo $$; sleep 1000; true", "{socket}"]).unwrap();
        let variables = variables(dir.path());
        let error = template.launch(&variables, Duration::from_millis(300)).unwrap_err();
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "it did not listen in time");
        let pid = std::fs::read_to_string(&variables.log).unwrap().trim().to_owned();
        assert!(!std::path::Path::new("/proc").join(pid).exists());
    }

    #[test]
    fn a_program_that_does_not_exist_and_a_socket_in_use_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let variables = variables(dir.path());
        assert!(template(&["/no/such/vmm", "{socket}"]).unwrap().launch(&variables, Duration::from_secs(1)).is_err());
        let _listener = crate::hypervisor::attach::bind(&variables.socket).unwrap();
        let error = template(&["/bin/true", "{socket}"]).unwrap().launch(&variables, Duration::from_secs(1)).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("another VMM"));
    }
}
