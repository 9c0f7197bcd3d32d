//! The walkthrough of README.md, run as it stands there: its blocks, in order, in one shell, with the built command.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may stop at the first surprise")]

use std::fs::{self, File};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sealane::hypervisor::attach::{Timeouts, observe};
use sealane::vmm::heartbeat_number;

/// Far more than any step takes; only a walkthrough that hangs gets here.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the README's commands name and a test may not depend on.
const PORTS: [&str; 2] = ["4433", "4434"];

#[derive(Debug, PartialEq)]
enum Guest {
    /// A KVM guest with a serial console.
    Heartbeat,
    /// Threads of the VMM, where there is no KVM.
    Synthetic,
}

/// The fenced blocks behind a mark. A block of a console is for guests that have one.
fn blocks(readme: &str, guest: &Guest) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = readme.lines();
    while let Some(line) = lines.next() {
        let wanted = match line {
            "<!-- walkthrough -->" => true,
            "<!-- walkthrough: console -->" => *guest == Guest::Heartbeat,
            _ => continue,
        };
        assert_eq!(lines.next(), Some("```sh"), "a mark stands right before its block");
        let block: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
        if wanted {
            found.push(block.join("\n"));
        }
    }
    found
}

/// One bash that stops behind every block until it is told to go on.
struct Shell {
    dir: tempfile::TempDir,
    bash: Child,
    next: usize,
}

impl Shell {
    fn start(blocks: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut script = String::new();
        for (n, block) in blocks.iter().enumerate() {
            script += &format!("until [ -e go-{n} ]; do sleep 0.02; done\nexec > out-{n} 2> err-{n}\n{block}\n: > done-{n}\n");
        }
        fs::write(dir.path().join("script"), script).unwrap();
        let built = Path::new(env!("CARGO_BIN_EXE_sealane")).parent().unwrap();
        let path = std::env::join_paths([built.to_owned()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())));
        let bash = Command::new("bash")
            .args(["-euo", "pipefail", "script"])
            .current_dir(dir.path())
            .env("PATH", path.unwrap())
            .env_remove("SEALANE_CONFIG")
            .env_remove("SEALANE_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("bash-err")).unwrap())
            .spawn()
            .unwrap();
        Self { dir, bash, next: 0 }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn fail(&self, why: &str) -> ! {
        let mut said = String::new();
        for name in ["bash-err", &format!("out-{}", self.next), &format!("err-{}", self.next), "lab/gw-a.log", "lab/gw-b.log"] {
            said += &format!("--- {name}\n{}\n", self.read(name));
        }
        panic!("block {}: {why}\n{said}", self.next);
    }

    /// Lets the next block run to its end. Every command in it has to succeed.
    fn run(&mut self) -> String {
        let n = self.next;
        File::create(self.dir.path().join(format!("go-{n}"))).unwrap();
        self.wait_for("the block does not end", |shell| {
            if shell.dir.path().join(format!("done-{n}")).exists() {
                return Some(());
            }
            if let Some(status) = shell.bash.try_wait().unwrap() {
                shell.fail(&format!("a command failed: {status}"));
            }
            None
        });
        self.next += 1;
        self.read(&format!("out-{n}"))
    }

    fn wait_for<T>(&mut self, otherwise: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            if start.elapsed() > PATIENCE {
                self.fail(otherwise);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Processes that were started in the walkthrough's directory and are there still.
    fn left_over(&self) -> Vec<i32> {
        let numbers = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let own = self.dir.path().canonicalize().unwrap();
        numbers.filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == own)).collect()
    }

    /// The beats on a console, in order. The last line may still be growing.
    fn beats(&self, console: &str) -> Vec<u64> {
        let text = self.read(console);
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete.lines().filter_map(heartbeat_number).collect()
    }

    /// The newest beat of the guest whose VMM listens on `socket`.
    fn newest_beat(&self, socket: &Path) -> Option<u64> {
        let (_, status) = observe(&self.dir.path().join(socket), "vm-1", Timeouts::default()).ok()?;
        heartbeat_number(&status.last_line?)
    }

    /// Where the VMM listens that the destination's gateway started.
    fn destination_socket(&self) -> Option<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join("lab/gw-b/run")).ok()?;
        entries.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|extension| extension == "sock"))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.bash.kill();
        let _ = self.bash.wait();
        for pid in self.left_over() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
}

fn usable_kvm() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

#[test]
fn the_walkthrough_of_the_readme_works_as_written() {
    let guest = if usable_kvm() { Guest::Heartbeat } else { Guest::Synthetic };
    println!("guest: {guest:?}");
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let mut blocks = blocks(&readme, &guest);
    assert_eq!(blocks.len(), if guest == Guest::Heartbeat { 8 } else { 7 }, "the README has all its steps");
    // Both are taken at the same time, so that they differ.
    let free = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let ports = free.each_ref().map(|socket| socket.local_addr().unwrap().port().to_string());
    drop(free);
    for block in &mut blocks {
        for (named, free) in PORTS.iter().zip(&ports) {
            *block = block.replace(&format!(" {named} "), &format!(" {free} "));
        }
        if guest == Guest::Synthetic {
            *block = block.replace("--payload heartbeat", "--payload synthetic");
        }
    }
    let mut shell = Shell::start(&blocks);

    says(&shell.run(), &["spiffe://example.net/gateway/gw-a"]);
    says(&shell.run(), &["operators-may-ask", "gateways-may-move"]);
    says(&shell.run(), &["gateway.name = gw-a", "gateway.name = gw-b", &ports[0], &ports[1]]);
    says(&shell.run(), &["gw-b in dc2", "yes", "running  here"]);
    let source = Path::new("lab/vm-1.sock");
    let before =
        shell.wait_for("the guest does not beat", |shell| shell.newest_beat(source).or_else(|| shell.beats("lab/vm-1.serial").pop()));

    let moved = shell.run();
    says(&moved, &["possible", "the VM runs on the destination", "yes: all memory and state were compared", "allow: gateways-may-move"]);
    says(&moved, &["vm-1  running  here", "to gw-b    completed", "DOWNTIME"]);
    if guest == Guest::Heartbeat {
        let consoles = shell.run();
        let shown: Vec<_> = consoles.lines().filter_map(heartbeat_number).collect();
        assert!(matches!(shown[..], [last, first] if first == last + 1), "the beats do not join:\n{consoles}");
        let all = shell.wait_for("the guest does not go on", |shell| {
            let destination = shell.beats("lab/gw-b/run/vm-1.serial");
            let enough = destination.len() >= 3;
            enough.then(|| [shell.beats("lab/vm-1.serial"), destination].concat())
        });
        assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 1), "a beat is missing or came twice: {all:?}");
    } else {
        shell.wait_for("the guest does not go on", |shell| {
            let newest = shell.newest_beat(&shell.destination_socket()?)?;
            (newest >= before + 3).then_some(())
        });
    }

    let evidence = shell.run();
    assert_eq!(evidence.matches("content       good").count(), 3, "{evidence}");
    assert_eq!(evidence.matches("signer        good").count(), 3, "{evidence}");
    assert_eq!(evidence.matches("witnesses     good").count(), 2, "{evidence}");
    says(&evidence, &["action=accept", "action=commit", "record=prepared", "record=run", "record=closed", "running_on=destination"]);

    shell.run();
    shell.wait_for("something runs on after the last step", |shell| {
        let _ = shell.bash.try_wait();
        shell.left_over().is_empty().then_some(())
    });
}
