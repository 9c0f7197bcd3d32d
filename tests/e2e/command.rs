//! One run of the program, and what it said.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Nothing here takes a tenth of it on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The program under test: what was built with the tests, unless `SEALANE_PROGRAM` says another build, to measure.
pub fn program() -> PathBuf {
    std::env::var_os("SEALANE_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_sealane").into(), PathBuf::from)
}

/// Runs it, deaf to the environment of whoever runs the tests.
pub fn sealane() -> Command {
    let mut command = Command::new(program());
    for name in ["SEALANE_CONFIG", "SEALANE_SOCKET", "SEALANE_LOG", "NO_COLOR"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Waits until `done` gives something.
#[track_caller]
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    /// Its one JSON object.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks exit code and words for people.
    #[track_caller]
    pub fn expect(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, code, "exit code of {self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not said: {self:#?}");
        }
        self
    }

    /// A migration that failed with the VM on the source: exit code, words, and the report's own idea of it.
    #[track_caller]
    pub fn expect_stayed(&self, code: i32, words: &[&str]) -> &Self {
        self.expect(code, words).expect(code, &["the VM runs on the source"]);
        let object = self.json();
        // A report has the place itself; a refusal before there was a migration has it in its problem.
        assert_eq!(object["running_on"], "source", "{object}");
        self
    }

    /// A migration that went through.
    #[track_caller]
    pub fn expect_moved(&self) -> Value {
        assert_eq!(self.code, 0, "exit code of {self:#?}");
        let report = self.json();
        assert_eq!(report["state"], "completed", "{report}");
        assert_eq!(report["running_on"], "destination", "{report}");
        assert_eq!(report["verified"], true, "{report}");
        assert_eq!(report["error"], Value::Null, "{report}");
        report
    }
}

/// A command that runs while the test goes on.
pub struct Running {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

static RUNS: AtomicUsize = AtomicUsize::new(0);

impl Running {
    pub fn start(mut command: Command, directory: &Path) -> Self {
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let (stdout, stderr) = (directory.join(format!("run-{run}.out")), directory.join(format!("run-{run}.err")));
        let child = command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap()).spawn().unwrap();
        Self { child, stdout, stderr }
    }

    pub fn interrupt(&self) {
        signal(&self.child, rustix::process::Signal::INT);
    }

    /// Fails the test when it has ended already.
    #[track_caller]
    pub fn must_go_on(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("a command ended early with {status}: {}", self.stderr());
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    #[track_caller]
    pub fn finish(mut self) -> Said {
        let status = wait_for("a command to end", || self.child.try_wait().unwrap());
        Said { code: status.code().unwrap_or(-1), stdout: std::fs::read_to_string(&self.stdout).unwrap(), stderr: self.stderr() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Runs a command to its end.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(directory: &Path, arguments: &[S]) -> Said {
    let mut command = sealane();
    command.args(arguments);
    Running::start(command, directory).finish()
}
