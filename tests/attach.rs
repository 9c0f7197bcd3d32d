//! A gateway and VMMs in processes of their own: what an operator's template starts, moved between, killed.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "../examples/smallest_vmm.rs"]
#[expect(dead_code, reason = "its `main` is not called here")]
mod smallest_vmm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use sealane::hypervisor::attach::{AttachedDestination, AttachedSource, Timeouts, observe};
use sealane::hypervisor::{Guest, LaunchTemplate, LaunchVariables, LaunchedVmm};
use sealane::hypervisor::{HypervisorError, PagedDestination, PagedSource, RunState};
use sealane::memory::{GuestRam, PageSet};
use sealane::types::VmUuid;

/// Not a test of its own: this binary, started again with `SEALANE_TEST_VMM` set, is the VMM.
#[test]
fn vmm_process() {
    let Ok(role) = std::env::var("SEALANE_TEST_VMM") else { return };
    let socket = std::env::var_os("SEALANE_TEST_SOCKET").unwrap();
    if let Err(refusal) = smallest_vmm::run(Path::new(&socket), role == "incoming") {
        panic!("{}", refusal.reason());
    }
}

fn launch(dir: &Path, name: &str, role: &str) -> LaunchedVmm {
    let own = std::env::current_exe().unwrap();
    let words = ["/usr/bin/env", &format!("SEALANE_TEST_VMM={role}"), "SEALANE_TEST_SOCKET={socket}"];
    let mut arguments: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    arguments.extend([own.to_str().unwrap().to_owned(), "--exact".to_owned(), "vmm_process".to_owned()]);
    let variables = LaunchVariables {
        socket: dir.join(format!("{name}.sock")),
        vm: name.parse().unwrap(),
        uuid: VmUuid([1; 16]),
        memory_bytes: 64 * 4096,
        vcpus: 1,
        serial: dir.join("serial.log"),
        log: dir.join(format!("{name}.log")),
    };
    LaunchTemplate::new(&arguments).unwrap().launch(&variables, Duration::from_secs(30)).unwrap()
}

fn copy(pages: &PageSet, from: &GuestRam, to: &GuestRam) {
    let mut page = [0; 4096];
    for number in pages.iter() {
        from.read(number, &mut page).unwrap();
        to.write(number, &page).unwrap();
    }
}

fn counted(status: &sealane::hypervisor::GuestStatus) -> u64 {
    status.last_line.as_ref().unwrap().strip_prefix("count ").unwrap().parse().unwrap()
}

fn count(path: &Path) -> u64 {
    counted(&observe(path, "vm-1", Timeouts::default()).unwrap().1)
}

/// The guest's own rule: page `n % 64` holds the last count written to it.
fn check_memory(ram: &GuestRam, count: u64) {
    let mut page = [0; 4096];
    for number in count.saturating_sub(63).max(1)..=count {
        ram.read(sealane::types::PageNumber(number % 64), &mut page).unwrap();
        assert!(page.chunks_exact(8).all(|word| word == number.to_le_bytes()), "page of count {number}");
    }
}

fn wait_for(mut there: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if there() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the guest does not get on");
}

fn moved(dir: &Path) -> (AttachedSource, AttachedDestination, [LaunchedVmm; 2], [PathBuf; 2]) {
    let (old, new) = (launch(dir, "old", "running"), launch(dir, "new", "incoming"));
    let paths = [old.socket.clone(), new.socket.clone()];
    let mut source = AttachedSource::attach(&old.socket, "vm-1", Timeouts::default()).unwrap();
    let mut destination = AttachedDestination::prepare(&new.socket, "vm-1", source.machine(), Timeouts::default()).unwrap();
    source.start_tracking().unwrap();
    copy(&PageSet::full(64), source.ram(), destination.ram());
    for _ in 0..3 {
        copy(&source.harvest().unwrap(), source.ram(), destination.ram());
    }
    source.pause().unwrap();
    copy(&source.harvest().unwrap(), source.ram(), destination.ram());
    destination.restore_state(&source.save_state().unwrap()).unwrap();
    (source, destination, [old, new], paths)
}

#[test]
fn a_guest_moves_between_two_vmm_processes() {
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut destination, [mut old, mut new], _paths) = moved(dir.path());
    let stopped_at = counted(&source.status().unwrap());
    assert_eq!(counted(&destination.status().unwrap()), stopped_at);
    check_memory(destination.ram(), stopped_at);
    let generation = source.status().unwrap().generation.unwrap();
    assert_eq!(destination.status().unwrap().generation, Some(generation));
    source.destroy().unwrap();
    wait_for(|| old.try_wait().unwrap().is_some());
    destination.resume().unwrap();
    assert_eq!(destination.status().unwrap().generation, Some(generation.disrupted()));
    wait_for(|| counted(&destination.status().unwrap()) > stopped_at + 100);
    destination.destroy().unwrap();
    wait_for(|| new.try_wait().unwrap().is_some());
}

#[test]
fn a_dead_gateway_leaves_a_paused_guest_paused_and_a_running_one_running() {
    let dir = tempfile::tempdir().unwrap();
    let (source, mut destination, _vmms, [old, new]) = moved(dir.path());
    destination.resume().unwrap();
    drop((source, destination));
    let (paused_at, ran_to) = (count(&old), count(&new));
    wait_for(|| count(&new) > ran_to + 50);
    assert_eq!(count(&old), paused_at);
    let mut source = AttachedSource::attach(&old, "vm-1", Timeouts::default()).unwrap();
    assert_eq!((source.attachment().state, source.attachment().tracking), (RunState::Paused, true));
    source.destroy().unwrap();
    AttachedSource::attach(&new, "vm-1", Timeouts::default()).unwrap().destroy().unwrap();
}

#[test]
fn two_guests_that_go_on_from_one_moment_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut destination, _vmms, _paths) = moved(dir.path());
    let first = source.status().unwrap().generation.unwrap();
    destination.resume().unwrap();
    assert!(matches!(destination.renew(), Err(HypervisorError::Refused { request: "renew", .. })), "it runs");
    // What an operator does who cannot know that the destination runs it.
    source.renew().unwrap();
    source.resume().unwrap();
    let (stayed, moved) = (source.status().unwrap().generation.unwrap(), destination.status().unwrap().generation.unwrap());
    assert!(stayed.id != first.id && (stayed.count, stayed.disruptions) == (2, 0), "{stayed:?}");
    assert_eq!(moved, first.disrupted());
    source.destroy().unwrap();
    destination.destroy().unwrap();
}

#[test]
fn a_vmm_that_is_killed_is_unreachable_and_its_memory_is_no_danger() {
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = launch(dir.path(), "old", "running");
    let mut source = AttachedSource::attach(&vmm.socket, "vm-1", Timeouts::default()).unwrap();
    source.start_tracking().unwrap();
    vmm.kill().unwrap();
    assert!(matches!(source.harvest(), Err(HypervisorError::Unreachable { .. })));
    copy(&PageSet::full(64), source.ram(), source.ram());
}

/// Not a test of its own: says what another user hears when it attaches.
#[test]
fn stranger_process() {
    let Some(socket) = std::env::var_os("SEALANE_TEST_STRANGER") else { return };
    let error = AttachedSource::attach(Path::new(&socket), "vm-1", Timeouts::default()).unwrap_err();
    assert!(error.to_string().contains("only the VMM's own user and root may attach"), "{error}");
}

#[test]
fn another_user_is_turned_away_even_if_the_socket_lets_it_in() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    if !std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0) {
        println!("SKIPPED: only root can become another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vmm = launch(dir.path(), "old", "running");
    for (path, mode) in [(dir.path(), 0o755), (&vmm.socket, 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    // A copy, as the build directory may be closed to others.
    let own = dir.path().join("stranger");
    std::fs::copy(std::env::current_exe().unwrap(), &own).unwrap();
    let mut stranger = std::process::Command::new(&own);
    stranger.args(["--exact", "stranger_process"]).env("SEALANE_TEST_STRANGER", &vmm.socket).current_dir("/").uid(65534).gid(65534);
    let output = stranger.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    AttachedSource::attach(&vmm.socket, "vm-1", Timeouts::default()).unwrap().destroy().unwrap();
}

#[test]
fn a_vmm_that_gateways_come_and_go_from_leaks_no_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = launch(dir.path(), "old", "running");
    let open = || std::fs::read_dir(format!("/proc/{}/fd", vmm.pid)).unwrap().count();
    let attached = || AttachedSource::attach(&vmm.socket, "vm-1", Timeouts::default()).unwrap();
    let source = attached();
    let before = open();
    drop(source);
    for _ in 0..30 {
        attached();
    }
    let mut source = attached();
    wait_for(|| open() <= before);
    source.destroy().unwrap();
}
