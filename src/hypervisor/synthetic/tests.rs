use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::hypervisor::attach::{AttachedDestination, AttachedGuest, AttachedSource, Timeouts, bind, serve};
use crate::types::PageNumber;

fn config(pages_per_second: u64) -> SyntheticConfig {
    SyntheticConfig::new(7, 200, 3, pages_per_second)
}

fn beat(status: &GuestStatus) -> u64 {
    assert_eq!(status.exit_code, None, "{status:?}");
    status.last_line.as_ref().unwrap().strip_prefix("beat ").unwrap().parse().unwrap()
}

/// Sleeps until the guest has gone on; bounded, without a promise about how long that takes.
fn wait_for(mut there: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if there() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the guest does not get on");
}

fn copy(pages: &PageSet, from: &GuestRam, to: &GuestRam) {
    let mut page = [0; PAGE_BYTES];
    for number in pages.iter() {
        from.read(number, &mut page).unwrap();
        to.write(number, &page).unwrap();
    }
}

/// The least migration there is: some rounds while the guest writes, the rest while it is paused.
fn migrate(source: &mut dyn PagedSource, destination: &mut dyn PagedDestination, rounds: u32) {
    source.start_tracking().unwrap();
    let pages = source.ram().pages();
    copy(&PageSet::full(pages), source.ram(), destination.ram());
    for _ in 0..rounds {
        let mut owed = source.harvest().unwrap();
        wait_for(|| {
            owed.merge(&source.harvest().unwrap());
            owed.len() > 20
        });
        copy(&owed, source.ram(), destination.ram());
    }
    source.pause().unwrap();
    copy(&source.harvest().unwrap(), source.ram(), destination.ram());
    let state = source.save_state().unwrap();
    destination.restore_state(&state).unwrap();
    assert_eq!(destination.save_state().unwrap(), state);
}

#[test]
fn a_guest_moves_while_it_writes_and_goes_on_exactly() {
    let mut source = SyntheticGuest::start("vm-1", &config(50_000)).unwrap();
    let mut destination = SyntheticGuest::incoming("vm-1", &source.machine.clone()).unwrap();
    migrate(&mut source, &mut destination, 3);
    assert_eq!((source.wrong_pages().unwrap(), destination.wrong_pages().unwrap()), (0, 0));
    let before = beat(&source.read_status());
    assert_eq!(beat(&destination.read_status()), before);
    source.destroy().unwrap();
    assert_eq!(source.read_status().state, RunState::Ended);
    assert!(PagedSource::resume(&mut source).is_err(), "a destroyed guest never runs");
    PagedDestination::resume(&mut destination).unwrap();
    let visits = destination.writers.as_ref().unwrap().progress().visits;
    wait_for(|| beat(&destination.read_status()) > before + 2);
    // Every page is read back and checked by its writer more than once.
    wait_for(|| destination.writers.as_ref().unwrap().progress().visits.iter().zip(&visits).all(|(now, then)| now - then > 150));
    destination.pause().unwrap();
    assert_eq!(destination.wrong_pages().unwrap(), 0);
}

#[test]
fn a_page_that_was_not_moved_ends_the_guest_with_an_error() {
    let mut source = SyntheticGuest::start("vm-1", &config(50_000)).unwrap();
    let mut destination = SyntheticGuest::incoming("vm-1", &source.machine.clone()).unwrap();
    migrate(&mut source, &mut destination, 1);
    PagedDestination::ram(&destination).clear(PageNumber(63), 1).unwrap();
    assert_eq!(destination.wrong_pages().unwrap(), 1);
    PagedDestination::resume(&mut destination).unwrap();
    wait_for(|| destination.read_status().state == RunState::Ended);
    assert_eq!(destination.read_status().exit_code, Some(1));
}

#[test]
fn a_guest_that_goes_on_from_older_state_finds_out() {
    let mut source = SyntheticGuest::start("vm-1", &config(50_000)).unwrap();
    source.pause().unwrap();
    let stale = PagedSource::save_state(&mut source).unwrap();
    let visits = source.writers.as_ref().unwrap().progress().visits[0];
    PagedSource::resume(&mut source).unwrap();
    wait_for(|| source.writers.as_ref().unwrap().progress().visits[0] > visits + 5);
    let mut destination = SyntheticGuest::incoming("vm-1", &source.machine.clone()).unwrap();
    source.pause().unwrap();
    copy(&PageSet::full(200), &source.ram, &destination.ram);
    destination.restore_state(&stale).unwrap();
    PagedDestination::resume(&mut destination).unwrap();
    wait_for(|| destination.read_status().exit_code == Some(1));
}

#[test]
fn a_paused_guest_writes_nothing_and_beats_no_more() {
    let mut guest = SyntheticGuest::start("vm-1", &config(50_000)).unwrap();
    wait_for(|| beat(&guest.read_status()) > 1);
    guest.pause().unwrap();
    guest.pause().unwrap();
    guest.start_tracking().unwrap();
    let state = PagedSource::save_state(&mut guest).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.harvest().unwrap().is_empty());
    assert_eq!(PagedSource::save_state(&mut guest).unwrap(), state);
    PagedSource::resume(&mut guest).unwrap();
    assert!(PagedSource::save_state(&mut guest).is_err(), "state of a running guest is no state");
    wait_for(|| !guest.harvest().unwrap().is_empty());
}

#[test]
fn an_idle_guest_beats_and_dirties_nothing() {
    let mut guest = SyntheticGuest::start("vm-1", &config(0)).unwrap();
    guest.start_tracking().unwrap();
    wait_for(|| beat(&guest.read_status()) > 3);
    assert!(guest.harvest().unwrap().is_empty());
}

#[test]
fn writes_stay_inside_the_working_set() {
    let config = SyntheticConfig { working_set_pages: 10, ..config(100_000) };
    let mut guest = SyntheticGuest::start("vm-1", &config).unwrap();
    let mut seen = PageSet::empty(200);
    wait_for(|| {
        seen.merge(&guest.harvest().unwrap());
        seen.len() == 10
    });
    assert_eq!(seen.runs(u64::MAX).collect::<Vec<_>>(), [(PageNumber(0), 10)]);
}

#[test]
fn machines_and_states_that_do_not_fit_are_refused() {
    let guest = SyntheticGuest::start("vm-1", &config(0)).unwrap();
    let good = guest.machine.clone();
    let profile = serde_json::json!({"seed": 1, "working_set_pages": 201, "pages_per_second": 1});
    for bad in [
        Machine { kind: "kvm".to_owned(), ..good.clone() },
        Machine { vcpus: 0, ..good.clone() },
        Machine { vcpus: 1000, ..good.clone() },
        Machine { regions: vec![], ..good.clone() },
        Machine { profile: serde_json::Value::Null, ..good.clone() },
        Machine { profile, ..good.clone() },
    ] {
        assert!(matches!(SyntheticGuest::incoming("vm-1", &bad), Err(HypervisorError::Incompatible { lacks, .. }) if lacks.len() == 1));
    }
    let generation = guest.generation.unwrap();
    let right = State { schema: STATE_SCHEMA, seed: 7, beats: 1, visits: vec![0; 3], generation };
    let with = |change: fn(&mut State)| {
        let mut state = right.clone();
        change(&mut state);
        serde_json::to_vec(&state).unwrap()
    };
    for bad in [
        vec![],
        b"{}".to_vec(),
        with(|state| state.schema = 1),
        with(|state| state.seed = 8),
        with(|state| state.visits.truncate(2)),
        with(|state| state.visits[2] = u64::MAX),
        with(|state| state.generation.id.0 = [0; 16]),
        with(|state| state.generation.count = 0),
        with(|state| state.generation.disruptions = u64::MAX),
    ] {
        let mut twin = SyntheticGuest::incoming("vm-1", &good).unwrap();
        assert!(twin.restore_state(&bad).is_err());
        assert!(PagedDestination::resume(&mut twin).is_err(), "a twin without state never runs");
        assert!(twin.renew().is_err() && twin.read_status().generation.is_none());
    }
    let mut twin = SyntheticGuest::incoming("vm-1", &good).unwrap();
    twin.restore_state(&serde_json::to_vec(&right).unwrap()).unwrap();
    assert_eq!(twin.read_status().generation, Some(generation));
}

#[test]
fn a_renewed_guest_has_another_generation_and_a_running_one_is_refused() {
    let mut guest = SyntheticGuest::start("vm-1", &config(0)).unwrap();
    let first = guest.read_status().generation.unwrap();
    assert!(guest.renew().is_err());
    guest.pause().unwrap();
    assert_eq!(guest.read_status().generation, Some(first));
    guest.renew().unwrap();
    PagedSource::resume(&mut guest).unwrap();
    let renewed = guest.read_status().generation.unwrap();
    assert!(renewed.id != first.id && (renewed.count, renewed.disruptions) == (2, 0), "{renewed:?}");
    let mut other = SyntheticGuest::incoming("vm-1", &guest.machine.clone()).unwrap();
    guest.pause().unwrap();
    other.restore_state(&PagedSource::save_state(&mut guest).unwrap()).unwrap();
    other.renew().unwrap();
    let restored = other.read_status().generation.unwrap();
    assert!(restored.id != renewed.id && (restored.count, restored.disruptions) == (3, 0), "{restored:?}");
}

fn served(dir: &Path, vmm: SyntheticVmm) -> (std::path::PathBuf, std::thread::JoinHandle<io::Result<()>>) {
    let path = dir.join(format!("{}.sock", vmm.name));
    let listener = bind(&path).unwrap();
    let guest: Arc<Mutex<dyn AttachedGuest>> = Arc::new(Mutex::new(vmm));
    (path, std::thread::spawn(move || serve(&listener, guest)))
}

#[test]
fn a_guest_moves_back_and_forth_between_vmms_over_the_attach_protocol() {
    let dir = tempfile::tempdir().unwrap();
    let (path, server) = served(dir.path(), SyntheticVmm::running("hop-0", &config(20_000)).unwrap());
    let mut source = AttachedSource::attach(&path, "vm-1", Timeouts::default()).unwrap();
    let mut servers = vec![server];
    let mut last = 0;
    let first = source.status().unwrap().generation.unwrap();
    for hop in 1..6 {
        let (path, server) = served(dir.path(), SyntheticVmm::incoming(&format!("hop-{hop}")));
        servers.push(server);
        let mut destination = AttachedDestination::prepare(&path, "vm-1", source.machine(), Timeouts::default()).unwrap();
        migrate(&mut source, &mut destination, 1);
        let paused_at = beat(&source.status().unwrap());
        source.destroy().unwrap();
        for _ in 0..2 {
            destination.resume().unwrap();
            assert_eq!(destination.status().unwrap().generation, Some(Generation { disruptions: hop, ..first }));
        }
        wait_for(|| beat(&destination.status().unwrap()) > paused_at);
        assert!(paused_at >= last);
        last = paused_at;
        drop(destination);
        source = AttachedSource::attach(&path, "vm-1", Timeouts::default()).unwrap();
    }
    source.destroy().unwrap();
    for server in servers {
        server.join().unwrap().unwrap();
    }
}
