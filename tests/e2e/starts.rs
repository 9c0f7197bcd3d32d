//! A gateway that is told to end while it starts.

use std::fs;
use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::command::{PATIENCE, sealane, signal, wait_for};
use crate::gateway::{A, Gateway};
use crate::lab::Setup;

/// A start, and the end of the last process that came of it: all of them write to one pipe, which ends with the last.
struct Start {
    process: Child,
    all_ended: mpsc::Receiver<String>,
}

impl Start {
    fn of(gateway: &Gateway) -> Self {
        let mut process = sealane();
        process.env("SEALANE_LOG", "sealane=debug").args(["gateway", "--config"]).arg(gateway.config()).stderr(Stdio::piped());
        let mut process = process.spawn().unwrap();
        let mut stderr = process.stderr.take().unwrap();
        let (ended, all_ended) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut said = String::new();
            stderr.read_to_string(&mut said).unwrap();
            ended.send(said)
        });
        Self { process, all_ended }
    }

    /// To the millisecond, which `wait_for` is not. Nothing of the gateway is there before that.
    fn wait_until_it_listens(&self) {
        let read = |path: &str| fs::read_to_string(format!("/proc/{}/{path}", self.process.id())).unwrap();
        let began = Instant::now();
        loop {
            // In this order.
            let has_started = !read(&format!("task/{}/children", self.process.id())).is_empty();
            let status = read("status");
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:\t")).unwrap();
            if u64::from_str_radix(caught, 16).unwrap() & 1 << (Signal::TERM.as_raw() - 1) != 0 {
                return;
            }
            assert!(!has_started, "it has started its companions and does not listen to signals");
            assert!(began.elapsed() < PATIENCE, "it does not listen to signals");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The exit code, and what all of its processes said, once the last has ended.
    fn end(mut self, wanted: Signal) -> (Option<i32>, String) {
        signal(&self.process, wanted);
        let status = wait_for("a gateway to end", || self.process.try_wait().unwrap());
        (status.code(), self.all_ended.recv_timeout(PATIENCE).expect("what it has started ends with it"))
    }
}

#[test]
fn a_gateway_that_is_told_to_stop_while_it_starts_stops_cleanly_and_leaves_nothing_behind() {
    let step = std::env::var("SEALANE_START_STEP").map_or(5, |milliseconds| milliseconds.parse().unwrap());
    let mut lab = Setup::new().prepare();
    let socket = lab.gateway(A).directory().join("run/api.sock");
    let mut delay = Duration::ZERO;
    // One that was ready before it was told is the last.
    for wanted in [Signal::TERM, Signal::KILL].into_iter().cycle() {
        let start = Start::of(lab.gateway(A));
        start.wait_until_it_listens();
        std::thread::sleep(delay);
        let was_ready = socket.exists();
        let (code, said) = start.end(wanted);
        if wanted == Signal::TERM {
            assert_eq!(code, Some(0), "behind {delay:?}: {said}");
            assert!(!socket.exists(), "behind {delay:?}: {said}");
            if was_ready {
                break;
            }
        }
        // One that is killed leaves its socket, for the next to take.
        let _ = fs::remove_file(&socket);
        delay += Duration::from_millis(step);
    }
    lab.gateway_mut(A).start();
    lab.gateway(A).audit_verifies();
}
