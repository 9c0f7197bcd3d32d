//! Disks that are full: nothing is moved without evidence, and the guest does not notice.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::wait_for;
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup, VM};

/// A small file system of its own; gone with the test.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at.to_owned())),
            other => {
                println!("SKIPPED: a small file system cannot be mounted here: {other:?}");
                None
            }
        }
    }

    /// Takes every byte that is left.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = fs::File::create(&path).unwrap();
        for piece in [1 << 16, 4096, 1] {
            while file.write_all(&vec![0; piece]).is_ok() {}
        }
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

/// A lab with `directory` of one gateway on a small file system.
fn lab_with_small(name: Name, directory: &str) -> Option<(Lab, Small)> {
    let mut lab = Setup::new().busy().prepare();
    let small = Small::mount(&lab.gateway(name).directory().join(directory), "8m")?;
    lab.start_guest();
    for name in [A, B] {
        lab.gateway_mut(name).start();
    }
    Some((lab, small))
}

/// A journal that failed may or may not hold its last record: only a restart can tell. An audit log just goes on.
fn make_room(lab: &mut Lab, name: Name, directory: &str) {
    if directory == "state" {
        lab.gateway_mut(name).stop();
        lab.gateway_mut(name).start();
    }
}

/// What fits behind the end of the log in its last page needs no more room. Reloads are recorded until one is not.
fn use_up_last_page(lab: &Lab, name: Name) {
    let log = lab.gateway(name).directory().join("audit/audit-00000000000000000000.jsonl");
    let bytes = || fs::metadata(&log).unwrap().len();
    for _ in 0..20 {
        let before = bytes();
        // It answers when it has tried to record it.
        lab.gateway(name).command(&["reload"]).expect(0, &[]);
        if bytes() == before {
            return;
        }
    }
    panic!("the log of {name:?} goes on although its disk is full");
}

/// With no room from the start, and with room that ends in the rounds, the guest stays; with room again it moves.
#[track_caller]
fn full(name: Name, directory: &str, object: &str) {
    let Some((mut lab, small)) = lab_with_small(name, directory) else { return };
    let filler = small.fill();
    if directory == "audit" {
        use_up_last_page(&lab, name);
    }
    lab.migrate(A, &[]).expect_stayed(1, &[VM, object]);
    lab.runs_only_on(A);
    fs::remove_file(filler).unwrap();
    make_room(&mut lab, name, directory);
    let (running, id) = lab.start_slow_migration(A, &[]);
    let filler = small.fill();
    if directory == "audit" {
        use_up_last_page(&lab, name);
    }
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_stayed(1, &[VM, object]);
    lab.runs_only_on(A);
    fs::remove_file(filler).unwrap();
    make_room(&mut lab, name, directory);
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    lab.settled_on(A);
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

#[test]
fn a_full_disk_under_the_audit_log_of_the_source_keeps_the_guest_there() {
    full(A, "audit", "audit");
}

#[test]
fn a_full_disk_under_the_audit_log_of_the_destination_keeps_the_guest_at_the_source() {
    full(B, "audit", "audit");
}

#[test]
fn a_full_disk_under_the_journal_of_the_source_keeps_the_guest_there() {
    full(A, "state", "journal");
}

#[test]
fn a_full_disk_under_the_journal_of_the_destination_keeps_the_guest_at_the_source() {
    full(B, "state", "journal");
}
