use super::*;
use crate::hypervisor::{Guest, HypervisorError, PagedDestination, PagedSource};

fn pages_of(set: &PageSet) -> Vec<u64> {
    set.iter().map(|page| page.0).collect()
}

#[test]
fn a_guest_moves_from_one_vmm_to_another() {
    let mut old = Served::new(Plain::running());
    let mut new = Served::new(Plain::incoming());
    let mut source = AttachedSource::attach(old.path(), "vm-1", timeouts()).unwrap();
    assert_eq!((source.machine(), source.ram().pages()), (&machine(), PAGES));
    assert_eq!(source.attachment().state, RunState::Running);
    let mut destination = AttachedDestination::prepare(new.path(), "vm-1", source.machine(), timeouts()).unwrap();

    source.start_tracking().unwrap();
    for page in [0, 64, PAGES - 1] {
        old.touch(page);
        source.ram().write(PageNumber(page), &[u8::try_from(page + 1).unwrap(); 4096]).unwrap();
    }
    let dirty = source.harvest().unwrap();
    assert_eq!(pages_of(&dirty), [0, 64, PAGES - 1]);
    source.throttle(30).unwrap();
    source.pause().unwrap();
    let mut page = [0; 4096];
    for number in dirty.iter() {
        source.ram().read(number, &mut page).unwrap();
        destination.ram().write(number, &page).unwrap();
    }
    assert!(source.harvest().unwrap().is_empty());
    source.stop_tracking().unwrap();
    let state = source.save_state().unwrap();
    destination.restore_state(&state).unwrap();
    assert_eq!(destination.save_state().unwrap(), state);
    assert_eq!(destination.status().unwrap().state, RunState::Paused);
    source.destroy().unwrap();
    old.join();
    destination.resume().unwrap();
    assert_eq!(destination.status().unwrap().state, RunState::Running);

    let mut back =
        AttachedSource::attach(Path::new(&destination.address()), "vm-1", Timeouts { request: Duration::from_millis(300), ..timeouts() });
    assert!(matches!(back, Err(HypervisorError::Refused { .. })), "one gateway controls");
    drop(destination);
    back = AttachedSource::attach(new.path(), "vm-1", timeouts());
    let mut back = back.unwrap();
    back.ram().read(PageNumber(64), &mut page).unwrap();
    assert_eq!(page, [65; 4096]);
    assert_eq!(new.calls(), ["prepare", "restore_state", "save_state", "resume"]);
    back.destroy().unwrap();
    new.join();
}

#[test]
fn everything_the_destination_lacks_is_named_one_by_one() {
    let served = Served::new(Plain::incoming());
    let big = Machine { vcpus: 9, ..machine() };
    let error = AttachedDestination::prepare(served.path(), "vm-1", &big, timeouts()).unwrap_err();
    let HypervisorError::Incompatible { lacks, .. } = error else { panic!("{error}") };
    assert_eq!(lacks, ["vcpus: 9, at most 8", "cpuid: no \\u{1b}avx"]);
    assert!(AttachedDestination::prepare(served.path(), "vm-1", &machine(), timeouts()).is_ok(), "a refused twin can be asked for again");
}

#[test]
fn a_new_gateway_is_told_what_the_dead_one_left() {
    let served = Served::new(Plain::running());
    let mut first = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    first.start_tracking().unwrap();
    first.throttle(40).unwrap();
    first.pause().unwrap();
    drop(first);
    let second = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    let found = second.attachment();
    assert_eq!((found.state, found.tracking, found.throttle_percent), (RunState::Paused, true, 40));
    assert_eq!(served.guest().state, RunState::Paused);
}

#[test]
fn a_generation_is_renewed_only_while_the_guest_is_paused_and_shown_in_the_status() {
    let served = Served::new(Plain::running());
    let mut source = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    assert_eq!(source.status().unwrap().generation, None, "a VMM that keeps none says so");
    let error = source.renew().unwrap_err();
    assert!(matches!(&error, HypervisorError::Refused { request: "renew", reason, .. } if reason == "the guest is not paused"), "{error}");
    source.pause().unwrap();
    source.renew().unwrap();
    let first = source.status().unwrap().generation.unwrap();
    source.renew().unwrap();
    let second = observe(served.path(), "vm-1", timeouts()).unwrap().1.generation.unwrap();
    assert!(first.id != second.id && (first.count, second.count) == (1, 2), "{first:?} {second:?}");
    source.resume().unwrap();
    assert_eq!(source.status().unwrap().generation, Some(second));
    served.guest().state = RunState::Ended;
    assert!(source.renew().is_err(), "a guest that has ended");
    assert_eq!(served.calls(), ["pause", "renew", "renew", "resume"]);

    let served = Served::new(Plain::incoming());
    let mut destination = AttachedDestination::prepare(served.path(), "vm-1", &machine(), timeouts()).unwrap();
    assert!(destination.renew().is_err(), "an empty twin");
    destination.restore_state(&[9]).unwrap();
    destination.renew().unwrap();
    assert_eq!(served.calls(), ["prepare", "restore_state", "renew"]);
}

#[test]
fn a_twin_is_found_again_after_its_gateway_died() {
    let served = Served::new(Plain::incoming());
    assert!(AttachedDestination::reattach(served.path(), "vm-1", timeouts()).is_err(), "there is no twin yet");
    let first = AttachedDestination::prepare(served.path(), "vm-1", &machine(), timeouts()).unwrap();
    first.ram().write(PageNumber(3), &[1; 4096]).unwrap();
    drop(first);
    let (mut second, found) = AttachedDestination::reattach(served.path(), "vm-1", timeouts()).unwrap();
    assert!(second.attachment().prepared && found == machine());
    let mut page = [0; 4096];
    second.ram().read(PageNumber(3), &mut page).unwrap();
    assert_eq!(page, [1; 4096]);
    second.restore_state(&[9, 9]).unwrap();
}

#[test]
fn a_gateway_that_dies_at_any_request_changes_nothing() {
    use super::hostile_gateway::Gateway;
    for request in ["machine", "memory", "track-start", "harvest", "status", "save-state", "pause", "resume"] {
        let served = Served::new(Plain::running());
        let before = served.guest().state;
        let mut gateway = Gateway::attach(served.path());
        gateway.ask("track-start");
        gateway.send(&serde_json::json!(request), &[]);
        drop(gateway);
        let again = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
        let expected = if request == "pause" { RunState::Paused } else { before };
        assert_eq!((again.attachment().state, again.attachment().tracking), (expected, true), "{request}");
    }
}

#[test]
fn pages_of_a_harvest_that_never_arrived_are_in_the_next_one() {
    use super::hostile_gateway::Gateway;
    let served = Served::new(Plain::running());
    let mut gateway = Gateway::attach(served.path());
    gateway.ask("track-start");
    served.touch(7);
    gateway.ask("harvest");
    drop(gateway);
    let mut source = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    source.start_tracking().unwrap();
    served.touch(99);
    assert_eq!(pages_of(&source.harvest().unwrap()), [7, 99]);
    assert!(source.harvest().unwrap().is_empty(), "asking again says that it arrived");
}

#[test]
fn a_gateway_that_missed_an_answer_goes_on_with_the_same_vmm() {
    let served = Served::new(Plain::running());
    let short = Timeouts { request: Duration::from_millis(400), ..timeouts() };
    let mut source = AttachedSource::attach(served.path(), "vm-1", short).unwrap();
    source.start_tracking().unwrap();
    served.touch(11);
    served.guest().slow = Duration::from_millis(600);
    assert!(matches!(source.harvest(), Err(HypervisorError::Unreachable { .. })));
    served.guest().slow = Duration::ZERO;
    assert_eq!(pages_of(&source.harvest().unwrap()), [11]);
}

#[test]
fn a_vmm_that_has_ended_is_noticed_without_a_question() {
    let mut served = Served::new(Plain::incoming());
    let short = Timeouts { request: Duration::from_millis(400), ..timeouts() };
    let mut destination = AttachedDestination::prepare(served.path(), "vm-1", &machine(), short).unwrap();
    // It could not answer one now.
    let held = served.guest();
    destination.ensure_there().unwrap();
    drop(held);
    destination.destroy().unwrap();
    served.join();
    assert!(matches!(destination.ensure_there(), Err(HypervisorError::Unreachable { .. })));
}

#[test]
fn a_restarted_vmm_is_not_taken_for_the_one_before() {
    let mut served = Served::new(Plain::running());
    let mut source = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    source.destroy().unwrap();
    served.join();
    assert!(matches!(source.status(), Err(HypervisorError::Unreachable { .. })));
    let listener = bind(served.path()).unwrap();
    let guest: Arc<Mutex<dyn AttachedGuest>> = served.guest.clone();
    let server = std::thread::spawn(move || serve(&listener, guest));
    let error = source.resume().unwrap_err();
    assert!(error.to_string().contains("another VMM process"), "{error}");
    AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap().destroy().unwrap();
    server.join().unwrap().unwrap();
}

#[test]
fn observers_read_the_status_while_another_gateway_controls() {
    let served = Served::new(Plain::running());
    let _controller = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    let (attachment, status) = observe(served.path(), "vm-1", timeouts()).unwrap();
    assert_eq!((attachment.state, status.state), (RunState::Running, RunState::Running));
    let line = status.last_line.unwrap();
    assert!(line.starts_with("beat\\u{7} x") && line.len() <= crate::limits::STATUS_LINE_BYTES_MAX);
}

#[test]
fn attaching_where_nobody_listens_names_the_vm_and_the_place() {
    let error = AttachedSource::attach(Path::new("/no/such/vmm.sock"), "vm-1", timeouts()).unwrap_err();
    assert_eq!(error.to_string(), "VMM of `vm-1` at /no/such/vmm.sock does not answer");
}

#[test]
fn quitting_ends_the_server_and_every_observer() {
    use std::io::Read;
    let mut served = Served::new(Plain::running());
    let mut idle = std::os::unix::net::UnixStream::connect(served.path()).unwrap();
    AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap().destroy().unwrap();
    served.join();
    assert_eq!(idle.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(served.calls(), ["quit"]);
}

#[test]
fn a_vmm_that_panics_in_a_request_can_still_be_controlled() {
    let mut served = Served::new(Plain::running());
    let mut source = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
    served.guest().panics = true;
    assert!(matches!(source.pause(), Err(HypervisorError::Unreachable { .. })));
    source.resume().unwrap();
    source.destroy().unwrap();
    served.join();
}

#[test]
fn a_gateway_that_dies_at_a_request_to_the_twin_leaves_it_for_the_next() {
    use super::hostile_gateway::Gateway;
    let served = Served::new(Plain::incoming());
    let mut gateway = Gateway::attach(served.path());
    gateway.send(&serde_json::json!({"prepare": {"machine": machine()}}), &[]);
    drop(gateway);
    let mut gateway = Gateway::attach(served.path());
    gateway.send(&serde_json::json!("restore-state"), &[9; 100]);
    drop(gateway);
    let (mut destination, _) = AttachedDestination::reattach(served.path(), "vm-1", timeouts()).unwrap();
    assert_eq!((destination.attachment().state, destination.attachment().prepared), (RunState::Paused, true));
    assert_eq!(destination.save_state().unwrap(), [9; 100]);
    assert_eq!(served.guest().state, RunState::Paused, "nobody but a gateway starts it");
}

#[test]
fn attaching_and_detaching_leaks_no_descriptor() {
    use std::os::unix::fs::MetadataExt;
    let served = Served::new(Plain::running());
    let inode = served.guest().memory.metadata().unwrap().ino();
    let open = || {
        let entries = std::fs::read_dir("/proc/self/fd").unwrap();
        entries.filter(|entry| std::fs::metadata(entry.as_ref().unwrap().path()).is_ok_and(|found| found.ino() == inode)).count()
    };
    for _ in 0..30 {
        let mut source = AttachedSource::attach(served.path(), "vm-1", timeouts()).unwrap();
        source.status().unwrap();
        assert!(open() >= 2);
    }
    assert_eq!(open(), 1);
}
