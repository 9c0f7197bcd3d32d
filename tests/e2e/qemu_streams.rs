//! Streams that lie: between a QEMU and its gateway somebody changes them. Its guest stays where it is.
//!
//! `SEALANE_QEMU_STREAMS=100` changes bits at random as well, `SEALANE_SEED` others.

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

use crate::gateway::{A, B};
use crate::guest::UUID;
use crate::lab::Setup;
use crate::qemus::Qemus;
use crate::random::{Random, number};

/// What happens to a stream.
#[derive(Debug, Clone)]
enum Change {
    /// The first of these byte strings that comes is replaced.
    Replace(Vec<(Vec<u8>, Vec<u8>)>),
    /// The bit at this place is another.
    Flip(usize, u8),
    /// It ends behind these bytes.
    CutBehind(Vec<u8>),
    /// It has more bytes.
    Append(Vec<u8>),
    Nothing,
}

fn replace(find: &[u8], by: &[u8]) -> Change {
    Change::Replace(vec![(find.to_vec(), by.to_vec())])
}

/// Passes a stream on, changed.
fn pass(mut from: UnixStream, mut to: UnixStream, change: &Change) {
    let (mut buffer, mut held, mut passed) = (vec![0; 1 << 16], Vec::new(), 0);
    let mut done = false;
    loop {
        let Ok(count) = from.read(&mut buffer) else { return };
        held.extend_from_slice(&buffer[..count]);
        let find = |held: &[u8], what: &[u8]| held.windows(what.len()).position(|window| window == what);
        let mut cut = false;
        match change {
            Change::Replace(pairs) if !done => {
                if let Some((at, (what, by))) = pairs.iter().find_map(|pair| Some((find(&held, &pair.0)?, pair))) {
                    held.splice(at..at + what.len(), by.iter().copied());
                    done = true;
                }
            }
            Change::Flip(at, bit) if (passed..passed + held.len()).contains(at) && !done => {
                held[at - passed] ^= 1 << bit;
                done = true;
            }
            Change::CutBehind(what) => {
                if let Some(at) = find(&held, what) {
                    held.truncate(at + what.len());
                    cut = true;
                }
            }
            Change::Append(more) if count == 0 => held.extend_from_slice(more),
            _ => {}
        }
        // What is looked for may be cut in two.
        let keep = if count == 0 || cut || done { 0 } else { held.len().min(64) };
        let ready: Vec<u8> = held.drain(..held.len() - keep).collect();
        passed += ready.len();
        if to.write_all(&ready).is_err() || cut || count == 0 {
            return;
        }
    }
}

/// Stands between a gateway and a monitor, and puts itself into every stream.
struct Between(Arc<Mutex<Change>>);

impl Between {
    fn stand(path: &Path, monitor: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let change = Arc::new(Mutex::new(Change::Nothing));
        let (shared, monitor) = (Arc::clone(&change), monitor.to_owned());
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(server) = UnixStream::connect(&monitor) else { return };
                let (client, shared) = (client.unwrap(), Arc::clone(&shared));
                let (mut answers, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut answers, &mut back);
                    let _ = back.shutdown(Shutdown::Both);
                });
                thread::spawn(move || {
                    while let Some((bytes, descriptor)) = receive(&client) {
                        let theirs = descriptor.map(|to| {
                            let (ours, theirs) = UnixStream::pair().unwrap();
                            let change = shared.lock().unwrap().clone();
                            thread::spawn(move || pass(ours, UnixStream::from(to), &change));
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
        Self(change)
    }

    fn set(&self, change: Change) {
        *self.0.lock().unwrap() = change;
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

fn lies() -> Vec<(Change, &'static str)> {
    let uuid: Vec<u8> = (0..32).step_by(2).map(|at| u8::from_str_radix(&UUID.replace('-', "")[at..at + 2], 16).unwrap()).collect();
    let another: Vec<u8> = uuid.iter().map(|byte| byte ^ 1).collect();
    let first_page = |flag: u8, high: u8| [&[0, 0, 0, high, 0, 0, 0, flag], b"\x06pc.ram".as_slice()].concat();
    let elsewhere = Change::Replace([2, 8].map(|flag| (first_page(flag, 0), first_page(flag, 1))).to_vec());
    let start = |id: u8| [b"\x01\0\0\0".as_slice(), &[id], b"\x03ram"].concat();
    let commanded = Change::Replace([1, 2].map(|id| (start(id), [b"\x08\0\x05\0\0".to_vec(), start(id)].concat())).to_vec());
    vec![
        (replace(b"pc-i440fx-7.2", b"pc-i440fx-7.1"), "machine type"),
        (replace(&uuid, &another), "UUID of the VM"),
        (replace(b"\x06pc.ram\0\0\0\0\x04\0\0\0", b"\x06pc.ram\0\0\0\0\x03\0\0\0"), "block as large as the VM's"),
        (elsewhere, "a page of its block"),
        (commanded, "no command"),
        (replace(b"\x05timer", b"\x05tamer"), "the device that is listed"),
        (Change::CutBehind(b"\x05timer".to_vec()), ""),
        (Change::Append(b"\x02\0\0\0\x02".to_vec()), "the end of the stream"),
    ]
}

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
    let mut tried = 0;
    for (change, expected) in lies() {
        between.set(change);
        qemus.lab.migrate(A, &[]).expect_stayed(1, &[expected]);
        qemus.is_only_at(A);
        tried += 1;
    }
    let seed = number("SEALANE_SEED").unwrap_or(1);
    let mut random = Random(seed);
    for _ in 0..number("SEALANE_QEMU_STREAMS").unwrap_or(0) {
        // In front of the first page, where everything means something.
        let (at, bit) = (usize::try_from(random.below(200)).unwrap(), u8::try_from(random.below(8)).unwrap());
        between.set(Change::Flip(at, bit));
        let said = qemus.lab.migrate(A, &[]);
        assert_ne!(said.code, 0, "bit {bit} of byte {at}: {said:?}");
        qemus.is_only_at(A);
        tried += 1;
    }
    println!("QEMU and streams that lie: {tried} refused");
    between.set(Change::Nothing);
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}
