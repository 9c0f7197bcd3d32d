//! Streams that lie: between a QEMU and its gateway somebody changes them. Its guest stays where it is.
//!
//! `SEALANE_QEMU_STREAMS=100` tells every lie to both ends, and changes bits at random as well, `SEALANE_SEED` others.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use sealane::hypervisor::qemu;
use sealane::wire::ErrorClass;

use crate::forger::Forger;
use crate::gateway::{A, B};
use crate::lab::Setup;
use crate::lies::{Change, Changer, Lie, lies};
use crate::qemus::{LOOK, Qemus, rom};
use crate::random::{Random, number};

/// Passes a stream on, changed, and keeps what it was.
fn pass(mut from: UnixStream, mut to: UnixStream, change: Change, was: &Mutex<Vec<u8>>) {
    let (mut buffer, mut changer) = (vec![0; 1 << 16], Changer::new(change));
    was.lock().unwrap().clear();
    loop {
        let Ok(count) = from.read(&mut buffer) else { return };
        was.lock().unwrap().extend_from_slice(&buffer[..count]);
        let ready = changer.feed(&buffer[..count]);
        if to.write_all(&ready).is_err() || changer.has_cut() || count == 0 {
            return;
        }
    }
}

/// Stands between a gateway and a monitor, and puts itself into every stream.
struct Between {
    change: Arc<Mutex<Change>>,
    /// The last stream as its QEMU wrote it.
    was: Arc<Mutex<Vec<u8>>>,
}

impl Between {
    fn stand(path: &Path, monitor: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let change = Arc::new(Mutex::new(Change::Nothing));
        let was: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (shared, kept, monitor) = (Arc::clone(&change), Arc::clone(&was), monitor.to_owned());
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(server) = UnixStream::connect(&monitor) else { return };
                let (client, shared, kept) = (client.unwrap(), Arc::clone(&shared), Arc::clone(&kept));
                let (mut answers, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut answers, &mut back);
                    let _ = back.shutdown(Shutdown::Both);
                });
                thread::spawn(move || {
                    while let Some((bytes, descriptor)) = receive(&client) {
                        let theirs = descriptor.map(|to| {
                            let (ours, theirs) = UnixStream::pair().unwrap();
                            let (change, kept) = (shared.lock().unwrap().clone(), Arc::clone(&kept));
                            thread::spawn(move || pass(ours, UnixStream::from(to), change, &kept));
                            theirs
                        });
                        if !send(&server, &bytes, theirs.as_ref()) {
                            break;
                        }
                    }
                    let _ = server.shutdown(Shutdown::Both);
                });
            }
        });
        Self { change, was }
    }

    fn set(&self, change: Change) {
        *self.change.lock().unwrap() = change;
    }
}

fn receive(from: &UnixStream) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    bytes.truncate(got);
    (got > 0).then_some((bytes, descriptor))
}

fn send(to: &UnixStream, bytes: &[u8], descriptor: Option<&UnixStream>) -> bool {
    let descriptors: Vec<_> = descriptor.into_iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    sent.is_ok_and(|sent| (&*to).write_all(&bytes[sent..]).is_ok())
}

/// Every other one for each end, or all.
fn chosen(end: usize) -> Vec<Lie> {
    let all = lies(std::fs::metadata(rom().unwrap()).unwrap().len()).into_iter().enumerate();
    all.filter(|(index, _)| number("SEALANE_QEMU_STREAMS").is_some() || index % 2 == end).map(|(_, lie)| lie).collect()
}

/// One QEMU serves all of them, one after the other, and its guest goes on.
#[test]
fn a_stream_that_lies_leaves_the_guest_where_it_is() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let gateway = qemus.lab.gateway_mut(A);
    gateway.stop();
    let run = gateway.directory().join("run");
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    std::fs::write(gateway.config(), crate::lab::replaced(&text, "run/first.qmp", "run/between.qmp")).unwrap();
    let between = Between::stand(&run.join("between.qmp"), &run.join("first.qmp"));
    qemus.lab.gateway_mut(A).start();
    let mut wrong = Vec::new();
    let lies = chosen(0);
    for Lie { name, change, expected } in &lies {
        between.set(change.clone());
        let said = qemus.lab.migrate(A, &[]);
        assert_eq!(said.code, 1, "{name}: {said:?}");
        said.expect_stayed(1, &[]);
        if !said.stderr.contains(expected) {
            wrong.push(format!("{name}: expected `{expected}`, got {}", said.stderr));
        }
        qemus.stays(name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let mut tried = lies.len();
    let seed = number("SEALANE_SEED").unwrap_or(1);
    let mut random = Random(seed);
    for _ in 0..number("SEALANE_QEMU_STREAMS").unwrap_or(0) {
        // In front of the first page, where everything means something.
        let (at, bit) = (usize::try_from(random.below(200)).unwrap(), u8::try_from(random.below(8)).unwrap());
        between.set(Change::Flip(at, bit));
        let said = qemus.lab.migrate(A, &[]);
        assert_ne!(said.code, 0, "bit {bit} of byte {at}: {said:?}");
        qemus.stays(&format!("bit {bit} of byte {at}"));
        tried += 1;
    }
    println!("QEMU and streams that lie: {tried} refused");
    qemus.is_only_at(A);
    between.set(Change::Nothing);
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}

/// The same streams from a gateway that looks at nothing: the destination refuses each before it promises anything.
#[test]
fn a_source_that_sends_streams_that_lie_is_refused() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let run = qemus.lab.gateway(A).directory().join("run");
    let gateway = qemus.lab.gateway_mut(A);
    gateway.stop();
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    std::fs::write(gateway.config(), crate::lab::replaced(&text, "run/first.qmp", "run/between.qmp")).unwrap();
    let between = Between::stand(&run.join("between.qmp"), &run.join("first.qmp"));
    qemus.lab.gateway_mut(A).start();
    // A whole stream, which its guest survives.
    between.set(Change::Append(b"\x02".to_vec()));
    qemus.lab.migrate(A, &[]).expect_stayed(1, &["the end of the stream"]);
    qemus.stays("a whole stream");
    let stream = between.was.lock().unwrap().clone();
    between.set(Change::Nothing);
    let (machine, ..) = qemu::inspect(&run.join("first.qmp.look"), "first", LOOK).unwrap();
    qemus.lab.gateway_mut(A).stop();

    let (forger, mut wrong) = (Forger::new(&qemus.lab, machine), Vec::new());
    let lies = chosen(1);
    for Lie { name, change, expected } in &lies {
        let mut changer = Changer::new(change.clone());
        let mut changed = changer.feed(&stream);
        if !changer.has_cut() {
            changed.extend(changer.feed(&[]));
        }
        assert_ne!(changed, stream, "{name}");
        let (class, reason) = forger.send(name, &changed);
        if !reason.contains(expected) || (!expected.is_empty() && class != ErrorClass::PeerMisbehaved) {
            wrong.push(format!("{name}: expected `{expected}`, got {class:?}: {reason}"));
        }
        qemus.stays(name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("streams that lie from a gateway that lies: {} refused", lies.len());
    let records = qemus.lab.gateway(B).audit();
    let promised = |entry: &serde_json::Value| entry["event"] == "handoff" && entry["detail"]["record"] != "refused";
    assert_eq!(records.iter().find(|entry| promised(entry)), None);
    qemus.lab.gateway_mut(A).start();
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}
