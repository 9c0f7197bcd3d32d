//! The driver against QEMU itself: a machine without disk or kernel is enough to be moved.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::super::*;
use crate::hypervisor::{Guest, HypervisorError, RunState, StreamDestination, StreamGoal, StreamSource, StreamStage, Streams};
use crate::types::{Mode, VmUuid};

const UUID: &str = "00000000-0000-4000-8000-000000000001";
const WITHIN: Duration = Duration::from_secs(20);

struct Qemu {
    child: Child,
    directory: TempDir,
}

impl Qemu {
    /// Nothing, and a word on it, where there is no QEMU.
    fn start(more: &[&str]) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let monitor = format!("unix:{},server=on,wait=off", directory.path().join("qmp").display());
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-accel", "tcg", "-m", "32", "-display", "none", "-uuid", UUID, "-device", "VGA"])
            .args(["-qmp", &monitor])
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                println!("SKIP: no qemu-system-x86_64: {error}");
                return None;
            }
        };
        let qemu = Self { child, directory };
        let started = Instant::now();
        while observe(&qemu.path(), "vm-1", WITHIN).is_err() && started.elapsed() < WITHIN {
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(qemu)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    fn source(&self) -> QemuSource {
        QemuSource::attach(&self.path(), "vm-1", WITHIN).unwrap()
    }

    fn state(&self) -> RunState {
        observe(&self.path(), "vm-1", WITHIN).unwrap().state
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const GOAL: StreamGoal = StreamGoal { downtime_max: Duration::from_millis(500), throttle: true };

fn until(stages: &tokio::sync::watch::Receiver<StreamStage>, wanted: StreamStage) {
    let began = Instant::now();
    while *stages.borrow() != wanted {
        assert!(began.elapsed() < WITHIN, "{:?}: expected {wanted:?}", *stages.borrow());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A guest that was sent and loaded, both ends paused.
fn moved(source: &mut QemuSource, destination: &mut QemuDestination) {
    let mut from = source.begin(GOAL, false).unwrap().main;
    let mut to = destination.begin().unwrap();
    let pump = std::thread::spawn(move || {
        let mut bytes = vec![0; 64 * 1024];
        loop {
            match from.read(&mut bytes).unwrap() {
                0 => return,
                count => to.write_all(&bytes[..count]).unwrap(),
            }
        }
    });
    until(&source.stages(), StreamStage::Stopped);
    assert_eq!(source.status().unwrap().state, RunState::Paused);
    source.go_on().unwrap();
    until(&source.stages(), StreamStage::Complete);
    pump.join().unwrap();
    until(&destination.stages(), StreamStage::Complete);
    source.ensure_complete().unwrap();
    destination.ensure_complete().unwrap();
}

#[test]
fn a_guest_is_on_both_ends_paused_and_goes_on_at_either() {
    let (Some(a), Some(b)) = (Qemu::start(&[]), Qemu::start(&["-incoming", "defer"])) else { return };
    let mut source = a.source();
    assert_eq!(source.blocked().unwrap(), None);
    assert_eq!(source.machine().uuid, UUID.parse::<VmUuid>().unwrap());
    let mut destination = QemuDestination::prepare(&b.path(), "vm-1", source.machine(), &[], None, WITHIN).unwrap();
    moved(&mut source, &mut destination);
    assert_eq!(source.status().unwrap().state, RunState::Paused);
    // Without `-S`, and it waits all the same.
    assert_eq!(destination.status().unwrap().state, RunState::Paused);
    assert!(!source.can_renew() && source.renew().is_err());
    source.wake().unwrap();
    assert_eq!(source.status().unwrap().state, RunState::Running);
    destination.destroy().unwrap();
    drop(source);
    // The guest that came back leaves once more, and this time it goes on there.
    let Some(b) = Qemu::start(&["-incoming", "defer", "-S"]) else { return };
    let mut source = a.source();
    let mut destination = QemuDestination::prepare(&b.path(), "vm-1", source.machine(), &[], None, WITHIN).unwrap();
    moved(&mut source, &mut destination);
    destination.wake().unwrap();
    destination.wake().unwrap();
    assert_eq!(destination.status().unwrap().state, RunState::Running);
    assert!(destination.destroy().is_err(), "a running guest is not thrown away");
    source.destroy().unwrap();
    drop(destination);
    assert_eq!(b.state(), RunState::Running);
}

#[test]
fn a_guest_that_stays_is_as_it_was() {
    let Some(a) = Qemu::start(&[]) else { return };
    let before = settings(&a);
    let mut source = a.source();
    let mut stream = source.begin(GOAL, false).unwrap().main;
    let drain = std::thread::spawn(move || while stream.read(&mut [0; 65536]).is_ok_and(|count| count > 0) {});
    source.set_path_rate(1 << 30).unwrap();
    source.set_goal(StreamGoal { downtime_max: Duration::from_millis(77), throttle: true }).unwrap();
    until(&source.stages(), StreamStage::Stopped);
    source.wake().unwrap();
    drain.join().unwrap();
    drop(source);
    assert_eq!(a.state(), RunState::Running);
    assert_eq!(settings(&a), before);
}

/// What a guest is sent on comes while it is read, and it is as it was when it stays.
#[test]
fn a_guest_that_is_sent_on_several_channels_and_stays_is_as_it_was() {
    let Some(a) = Qemu::start(&[]) else { return };
    let before = settings(&a);
    let mut source = a.source();
    let at = a.directory.path().join("channels");
    source.use_channels(3, at.clone());
    let Streams { main, others, .. } = source.begin(GOAL, false).unwrap();
    assert!(others.len() == 3 && !at.exists());
    let drains: Vec<_> = std::iter::once(main)
        .chain(others)
        .map(|mut stream| {
            std::thread::spawn(move || {
                let (mut bytes, mut first) = (vec![0; 65536], Vec::new());
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    first.extend_from_slice(&bytes[..count.min(4)]);
                    first.truncate(4);
                }
                first
            })
        })
        .collect();
    until(&source.stages(), StreamStage::Stopped);
    source.wake().unwrap();
    let firsts: Vec<_> = drains.into_iter().map(|drain| drain.join().unwrap()).collect();
    assert_eq!(firsts[0], b"QEVM");
    assert!(firsts[1..].iter().all(|first| first == b"\x11\x22\x33\x44"), "{firsts:?}");
    drop(source);
    assert_eq!(a.state(), RunState::Running);
    assert_eq!(settings(&a), before);
}

#[test]
fn what_qemu_packs_on_its_channels_is_refused() {
    let Some(a) = Qemu::start(&[]) else { return };
    let monitor = super::super::monitor::Monitor::connect(&a.path(), "vm-1", WITHIN).unwrap();
    monitor.qmp.execute("migrate-set-parameters", serde_json::json!({ "multifd-compression": "zlib" })).unwrap();
    drop(monitor);
    let mut source = a.source();
    source.use_channels(2, a.directory.path().join("channels"));
    let refused = source.begin(GOAL, false).unwrap_err().to_string();
    assert!(refused.contains("expected `multifd-compression` to be `none`, got `zlib`"), "{refused}");
    source.wake().unwrap();
    assert_eq!(source.status().unwrap().state, RunState::Running);
}

#[test]
fn a_gateway_that_dies_in_the_switch_leaves_a_guest_that_can_be_woken() {
    let Some(a) = Qemu::start(&[]) else { return };
    let mut source = a.source();
    let mut stream = source.begin(GOAL, false).unwrap().main;
    let drain = std::thread::spawn(move || {
        let mut bytes = [0; 65536];
        while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
    });
    until(&source.stages(), StreamStage::Stopped);
    drop(source);
    assert_eq!(a.state(), RunState::Paused);
    a.source().wake().unwrap();
    drain.join().unwrap();
    assert_eq!(a.state(), RunState::Running);
    let left = settings(&a);
    let on = |name: &str| left[0].as_array().unwrap().iter().any(|known| known["capability"] == name && known["state"] == true);
    assert!(!on("pause-before-switchover") && !on("multifd"), "{left:?}");
}

#[test]
fn another_machine_is_refused_by_what_differs() {
    let (Some(a), Some(b)) = (Qemu::start(&[]), Qemu::start(&["-incoming", "defer", "-device", "e1000", "-smp", "2"])) else { return };
    let source = a.source();
    let error = QemuDestination::prepare(&b.path(), "vm-1", source.machine(), &[], None, WITHIN).unwrap_err();
    let HypervisorError::Incompatible { lacks, .. } = error else { panic!("{error}") };
    assert!(lacks.len() == 2 && lacks[0].starts_with("vCPUs") && lacks[1].contains("child<e1000>"), "{lacks:?}");
    drop(source);
    let error = QemuDestination::prepare(&a.path(), "vm-1", a.source().machine(), &[], None, Duration::from_millis(300)).unwrap_err();
    assert!(
        error.to_string().contains("expected one that was started with `-incoming defer`") || error.to_string().contains("does not answer")
    );
}

#[test]
fn a_stream_that_is_none_ends_a_destination_with_its_own_words() {
    let Some(b) = Qemu::start(&["-incoming", "defer"]) else { return };
    let machine = inspect(&b.path(), "vm-1", WITHIN).unwrap().0;
    let log = b.directory.path().join("log");
    let mut destination = QemuDestination::prepare(&b.path(), "vm-1", &machine, &[], Some(log), WITHIN).unwrap();
    let mut stream = destination.begin().unwrap();
    stream.write_all(b"QEVM\0\0\0\x03garbage that is no section of anything").unwrap();
    drop(stream);
    until(&destination.stages(), StreamStage::Failed);
    let why = destination.failure().to_string();
    assert!(why.contains("refused `migrate-incoming`"), "{why}");
    assert!(destination.ensure_complete().is_err());
}

/// Two QEMUs with their drivers, and what carries the stream forth and back.
type Pair = (Qemu, Qemu, QemuSource, QemuDestination, [std::thread::JoinHandle<u64>; 2]);

/// Two QEMUs whose pages behind the split come slowly, once the guest is loaded at the second; nothing and a word on it where QEMU cannot.
fn split() -> Option<Pair> {
    let (a, b) = (Qemu::start(&[])?, Qemu::start(&["-incoming", "defer", "-S"])?);
    let mut source = a.source();
    if let Err(error) = source.move_as(Mode::Postcopy) {
        println!("SKIPPED: {error}");
        return None;
    }
    let mut destination = QemuDestination::prepare(&b.path(), "vm-1", source.machine(), &[], None, WITHIN).unwrap();
    source.set_path_rate(1 << 20).unwrap();
    let (from, to) = (source.begin(GOAL, false).unwrap().main, destination.begin().unwrap());
    let pump = |mut from: std::os::unix::net::UnixStream, mut to: std::os::unix::net::UnixStream, pause: Duration| {
        std::thread::spawn(move || {
            let (mut bytes, mut carried) = (vec![0; 16 * 1024], 0);
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                if to.write_all(&bytes[..count]).is_err() {
                    break;
                }
                carried += count as u64;
                std::thread::sleep(pause);
            }
            let _ = (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
            carried
        })
    };
    // Slow enough for the guest to be split in its first pass.
    let forth = pump(from.try_clone().unwrap(), to.try_clone().unwrap(), Duration::from_millis(20));
    let back = pump(to, from, Duration::ZERO);
    until(&source.stages(), StreamStage::Flowing);
    let asked = Instant::now();
    while source.split().is_err() {
        assert!(asked.elapsed() < WITHIN, "it is not active");
    }
    until(&source.stages(), StreamStage::Stopped);
    source.go_on().unwrap();
    until(&source.stages(), StreamStage::Split);
    until(&destination.stages(), StreamStage::Split);
    destination.ensure_complete().unwrap();
    Some((a, b, source, destination, [forth, back]))
}

#[test]
fn a_guest_that_is_split_waits_paused_at_both_ends_and_gets_its_pages_there() {
    let Some((_a, _b, mut source, mut destination, pumps)) = split() else { return };
    let refused = source.destroy().unwrap_err().to_string();
    assert!(refused.contains("lacks pages"), "{refused}");
    assert_eq!([source.status().unwrap().state, destination.status().unwrap().state], [RunState::Paused; 2]);
    destination.wake().unwrap();
    assert_eq!(destination.status().unwrap().state, RunState::Running);
    until(&destination.stages(), StreamStage::Complete);
    until(&source.stages(), StreamStage::Complete);
    source.ensure_complete().unwrap();
    assert_eq!(destination.status().unwrap().state, RunState::Running);
    source.destroy().unwrap();
    let [forth, back] = pumps.map(|pump| pump.join().unwrap());
    // Requests of the first pages that it touched, and the end of the way back.
    assert!(forth > 100_000 && back > 40, "{forth} {back}");
}

#[test]
fn a_guest_that_is_split_goes_on_at_the_source_if_it_stays() {
    let Some((a, _b, mut source, mut destination, pumps)) = split() else { return };
    destination.destroy().unwrap();
    source.wake().unwrap();
    assert_eq!(source.status().unwrap().state, RunState::Running);
    let _carried = pumps.map(|pump| pump.join().unwrap());
    drop(source);
    let on = settings(&a)[0].as_array().unwrap().iter().filter(|known| known["state"] == true).count();
    let fresh = Qemu::start(&[]).unwrap();
    assert_eq!(on, settings(&fresh)[0].as_array().unwrap().iter().filter(|known| known["state"] == true).count());
    // It can leave again.
    let b = Qemu::start(&["-incoming", "defer", "-S"]).unwrap();
    let mut source = a.source();
    let mut destination = QemuDestination::prepare(&b.path(), "vm-1", source.machine(), &[], None, WITHIN).unwrap();
    moved(&mut source, &mut destination);
}

#[test]
fn a_gateway_that_dies_behind_the_split_leaves_a_guest_that_can_be_woken() {
    let Some((a, _b, source, _destination, pumps)) = split() else { return };
    drop(source);
    let mut source = a.source();
    assert_eq!(source.status().unwrap().state, RunState::Paused);
    source.wake().unwrap();
    assert_eq!(source.status().unwrap().state, RunState::Running);
    drop(source);
    let _carried = pumps.map(|pump| pump.join().unwrap());
    let left = settings(&a);
    let on = |name: &str| left[0].as_array().unwrap().iter().any(|known| known["capability"] == name && known["state"] == true);
    assert!(!on("postcopy-ram") && !on("return-path") && !on("pause-before-switchover"), "{left:?}");
}

/// Capabilities and the parameters that the driver touches.
fn settings(qemu: &Qemu) -> [serde_json::Value; 2] {
    let monitor = super::super::monitor::Monitor::connect(&qemu.path(), "vm-1", WITHIN).unwrap();
    ["query-migrate-capabilities", "query-migrate-parameters"].map(|command| monitor.qmp.execute(command, serde_json::Value::Null).unwrap())
}
