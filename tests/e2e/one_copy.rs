//! Exactly one copy of the guest runs, at any time and in the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use sealane::hypervisor::RunState;

use crate::command::wait_for;
use crate::gateway::{A, B, Name, vmm_sockets};
use crate::guest;
use crate::lab::Lab;

/// Where the guest is once both gateways are up again and nothing is open.
#[track_caller]
pub fn settle(lab: &Lab) -> Name {
    wait_for("one running copy", || {
        let copies = lab.running_copies();
        assert!(copies.len() <= 1, "the guest runs in {} places: {copies:?}", copies.len());
        let [one] = copies.as_slice() else { return None };
        let (here, there) = (lab.vm(*one), lab.vm(one.other()));
        (here["state"] == "running" && there["state"] == "gone").then_some(*one)
    })
}

/// Looks all the time whether two copies of a lab's guest run.
pub struct OneCopy {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<PathBuf>>>,
}

impl OneCopy {
    pub fn watch(lab: &Lab) -> Self {
        let directories = [A, B].map(|name| lab.gateway(name).directory().to_owned());
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let running = || {
                let all = directories.iter().flat_map(|directory| vmm_sockets(directory));
                all.filter(|socket| guest::status(socket).is_some_and(|status| status.state == RunState::Running)).collect::<Vec<_>>()
            };
            while !seen.load(Ordering::SeqCst) {
                let one_by_one = running();
                // One look is not at one time: a guest may move between. Who ran before and runs after ran meanwhile.
                let twice: Vec<_> = if one_by_one.len() > 1 { running() } else { Vec::new() };
                let at_once: Vec<_> = twice.into_iter().filter(|socket| one_by_one.contains(socket)).collect();
                if at_once.len() > 1 {
                    return at_once;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            Vec::new()
        });
        Self { ended, thread: Some(thread) }
    }

    /// Fails the test when two were seen so far.
    #[track_caller]
    pub fn is_there(&mut self) {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.end();
        }
    }

    #[track_caller]
    pub fn was_there(mut self) {
        self.end();
    }

    #[track_caller]
    fn end(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let copies = self.thread.take().unwrap().join().unwrap();
        assert!(copies.is_empty(), "the guest ran in two places: {copies:?}");
    }
}

impl Drop for OneCopy {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
