//! A gateway process: its files, its life.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;

use rustix::process::Signal;
use serde_json::Value;

use crate::command::{Running, Said, run, sealane, signal, wait_for};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    A,
    B,
}

pub use Name::{A, B};

impl Name {
    pub fn other(self) -> Self {
        match self {
            A => B,
            B => A,
        }
    }

    /// As configurations call it.
    pub fn gateway(self) -> &'static str {
        match self {
            A => "gw-a",
            B => "gw-b",
        }
    }

    pub fn site(self) -> &'static str {
        match self {
            A => "site-a",
            B => "site-b",
        }
    }
}

pub struct Gateway {
    directory: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
    process: Option<Child>,
}

impl Gateway {
    pub fn new(directory: PathBuf) -> Self {
        for path in ["state", "audit", "run", "policy.d"] {
            fs::create_dir_all(directory.join(path)).unwrap();
        }
        Self { directory, environment: Vec::new(), process: None }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn config(&self) -> PathBuf {
        self.directory.join("gateway.toml")
    }

    /// From its next start on.
    pub fn set_environment(&mut self, name: &'static str, value: &Path) {
        self.environment.push((name, value.to_owned()));
    }

    /// Starts it and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        self.launch();
        wait_for("a gateway that answers", || {
            assert!(!self.has_died(), "the gateway ended: {}", self.log());
            self.answers().then_some(())
        });
    }

    /// Starts it.
    #[track_caller]
    pub fn launch(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        let log = File::options().create(true).append(true).open(self.directory.join("gateway.log")).unwrap();
        let mut command = sealane();
        command.env("SEALANE_LOG", "sealane=debug").args(["gateway", "--config"]).arg(self.config()).stdout(log.try_clone().unwrap());
        // A gateway without failpoints knows nothing of it.
        command.env("SEALANE_FAILPOINT_FILE", self.directory.join("failpoint"));
        command.envs(self.environment.iter().cloned());
        self.process = Some(command.stderr(log).spawn().unwrap());
    }

    /// Whether it serves its operators.
    pub fn answers(&self) -> bool {
        UnixStream::connect(self.directory.join("run/api.sock")).is_ok()
    }

    /// Whether it has ended by itself; it is down then.
    pub fn has_died(&mut self) -> bool {
        let ended = self.process.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some());
        if ended {
            self.process = None;
        }
        ended
    }

    /// Its process.
    #[track_caller]
    pub fn process_id(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// The process that this gateway has started as something of its own: `launcher`, or who holds the key of that name.
    pub fn companion(&self, what: &str) -> rustix::process::Pid {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.process_id())).unwrap();
        let children: String = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap() + " ").collect();
        let found = children.split_whitespace().find(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.split(|byte| *byte == 0).any(|argument| argument == what.as_bytes())
        });
        rustix::process::Pid::from_raw(found.unwrap_or_else(|| panic!("no `{what}` among {children}")).parse().unwrap()).unwrap()
    }

    /// Ends such a process.
    pub fn end_companion(&self, what: &str) {
        rustix::process::kill_process(self.companion(what), Signal::KILL).unwrap();
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, wanted: Signal) {
        signal(self.process.as_ref().unwrap(), wanted);
    }

    /// Starts it where it has to refuse.
    #[track_caller]
    pub fn start_in_vain(&self) -> Said {
        let mut command = sealane();
        command.envs(self.environment.iter().cloned()).args(["gateway", "--config"]).arg(self.config());
        Running::start(command, &self.directory).finish()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("gateway.log")).unwrap_or_default()
    }

    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.process.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends SIGTERM.
    pub fn ask_to_stop(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGTERM, and waits for the end; the exit code.
    #[track_caller]
    pub fn stop(&mut self) -> Option<i32> {
        self.ask_to_stop();
        self.stopped()
    }

    #[track_caller]
    pub fn stopped(&mut self) -> Option<i32> {
        let mut child = self.process.take().unwrap();
        wait_for("a gateway to stop", || child.try_wait().unwrap()).code()
    }

    /// SIGHUP: certificates, revocation lists and policies are read again. Waits until that is in the audit log.
    #[track_caller]
    pub fn reload(&self) {
        let outcome = |entry: &Value| ["policy-loaded", "policy-refused", "identity-refused"].iter().any(|event| entry["event"] == *event);
        let read = || self.audit().into_iter().filter(outcome).count();
        let before = read();
        self.signal(Signal::HUP);
        wait_for("a reload", || (read() > before).then_some(()));
    }

    /// A command for this gateway, with `--json`.
    pub fn start_command(&self, arguments: &[&str]) -> Running {
        let mut command = sealane();
        command.args(arguments).arg("--json").arg("--config").arg(self.config());
        Running::start(command, &self.directory)
    }

    #[track_caller]
    pub fn command(&self, arguments: &[&str]) -> Said {
        self.start_command(arguments).finish()
    }

    /// Entries of its audit log, by `sealane audit show`.
    #[track_caller]
    pub fn audit(&self) -> Vec<Value> {
        let said = run(&self.directory, &["audit".as_ref(), "show".as_ref(), "--json".as_ref(), self.directory.join("audit").as_os_str()]);
        said.expect(0, &[]);
        said.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Its audit log as it is in files: a command would take longer than what is watched.
    pub fn audit_text(&self) -> String {
        let segments = fs::read_dir(self.directory.join("audit")).unwrap().map(|entry| entry.unwrap().path());
        segments
            .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
            .map(|path| fs::read_to_string(path).unwrap())
            .collect()
    }

    /// Waits for an entry with this event and outcome that contains all these words.
    #[track_caller]
    pub fn audited(&self, event: &str, outcome: &str, words: &[&str]) -> Value {
        let wanted = |entry: &Value| {
            let text = entry.to_string();
            entry["event"] == event && entry["outcome"] == outcome && words.iter().all(|word| text.contains(word))
        };
        wait_for(&format!("audit entry `{event}`/`{outcome}` with {words:?} in\n{:#?}", self.audit()), || {
            self.audit().into_iter().find(wanted)
        })
    }

    #[track_caller]
    pub fn audit_verifies(&self) {
        run(&self.directory, &["audit".as_ref(), "verify".as_ref(), self.directory.join("audit").as_os_str()]).expect(0, &[]);
    }

    /// Sockets of VMMs that it started or was given.
    pub fn vmm_sockets(&self) -> Vec<PathBuf> {
        vmm_sockets(&self.directory)
    }
}

/// Sockets of VMMs at the gateway of this directory.
pub fn vmm_sockets(gateway: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(gateway.join("run")).unwrap();
    let sockets = entries.map(|entry| entry.unwrap().path());
    sockets.filter(|path| path.extension().is_some_and(|extension| extension == "sock") && !path.ends_with("api.sock")).collect()
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- {}\n{}", self.directory.display(), lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        self.kill();
    }
}
