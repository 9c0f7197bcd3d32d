//! Somebody who stands between a gateway and a QEMU's monitor, and puts himself into every stream that begins there.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::gateway::A;
use crate::lies::{Change, Changer};
use crate::qemus::Qemus;

/// What happens to the next stream.
#[derive(Debug, Clone)]
pub enum Meddling {
    /// The stream of one, or the main channel of several, is changed.
    Main(Change),
    /// Of several channels the first one behind the main one is changed.
    Channel(Change),
    /// Another process connects where channels are waited for, so often, before QEMU is told to. It says nothing.
    Stranger(usize),
}

pub struct Between {
    meddling: Arc<Mutex<Meddling>>,
    /// The last stream as its QEMU wrote it.
    pub was: Arc<Mutex<Vec<u8>>>,
}

impl Between {
    /// From now on gateway A has its guest's monitor through this.
    #[track_caller]
    pub fn put_before(qemus: &mut Qemus) -> Self {
        let gateway = qemus.lab.gateway_mut(A);
        gateway.stop();
        let run = gateway.directory().join("run");
        let text = std::fs::read_to_string(gateway.config()).unwrap();
        std::fs::write(gateway.config(), crate::lab::replaced(&text, "run/first.qmp", "run/between.qmp")).unwrap();
        let between = Self::stand(&run.join("between.qmp"), &run.join("first.qmp"));
        qemus.lab.gateway_mut(A).start();
        between
    }

    /// Listens at `path` for whoever wants `monitor`.
    fn stand(path: &Path, monitor: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let between = Self { meddling: Arc::new(Mutex::new(Meddling::Main(Change::Nothing))), was: Arc::default() };
        let (meddling, was, monitor) = (Arc::clone(&between.meddling), Arc::clone(&between.was), monitor.to_owned());
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(server) = UnixStream::connect(&monitor) else { return };
                let (client, meddling, was) = (client.unwrap(), Arc::clone(&meddling), Arc::clone(&was));
                let (mut answers, mut back) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut answers, &mut back);
                    let _ = back.shutdown(Shutdown::Both);
                });
                thread::spawn(move || {
                    let mut strangers = None;
                    while let Some((mut bytes, descriptor)) = receive(&client) {
                        let now = meddling.lock().unwrap().clone();
                        let theirs = descriptor.map(|to| {
                            let (ours, theirs) = UnixStream::pair().unwrap();
                            let (change, was) = (now.main(), Arc::clone(&was));
                            thread::spawn(move || pass(ours, UnixStream::from(to), change, &was));
                            theirs
                        });
                        if let Some(at) = channels(&bytes) {
                            match now {
                                Meddling::Stranger(times) => strangers = Strangers::come(&at, times),
                                _ => bytes = put_into(&at, &bytes, &now),
                            }
                        }
                        if !send(&server, &bytes, theirs.as_ref()) {
                            break;
                        }
                    }
                    drop(strangers);
                    let _ = server.shutdown(Shutdown::Both);
                });
            }
        });
        between
    }

    pub fn set(&self, meddling: Meddling) {
        *self.meddling.lock().unwrap() = meddling;
    }
}

impl Meddling {
    fn main(&self) -> Change {
        match self {
            Self::Main(change) => change.clone(),
            _ => Change::Nothing,
        }
    }
}

/// Passes a stream on, changed, and keeps what it was.
fn pass(mut from: UnixStream, mut to: UnixStream, change: Change, was: &Mutex<Vec<u8>>) {
    let (mut buffer, mut changer) = (vec![0; 1 << 16], Changer::new(change));
    was.lock().unwrap().clear();
    loop {
        let Ok(count) = from.read(&mut buffer) else { return };
        was.lock().unwrap().extend_from_slice(&buffer[..count]);
        let ready = changer.feed(&buffer[..count]);
        if to.write_all(&ready).is_err() || count == 0 {
            return;
        }
        if changer.has_cut() {
            // A QEMU that sees one of its channels closed while it begins waits for that for ever, and ends no migration any more.
            drop(to);
            let _ = std::io::copy(&mut from, &mut std::io::sink());
            return;
        }
    }
}

const URI: &[u8] = b"\"unix:";

/// Where a QEMU that is told to migrate with these words would connect to.
fn channels(bytes: &[u8]) -> Option<PathBuf> {
    let begin = bytes.windows(URI.len()).position(|window| window == URI)? + URI.len();
    let length = bytes[begin..].iter().position(|byte| *byte == b'"')?;
    Some(PathBuf::from(String::from_utf8(bytes[begin..begin + length].to_vec()).unwrap()))
}

/// QEMU connects to another path instead, and what it says there is passed on.
fn put_into(at: &Path, bytes: &[u8], meddling: &Meddling) -> Vec<u8> {
    let (at, ours, meddling) = (at.to_owned(), at.with_extension("between"), meddling.clone());
    let _ = std::fs::remove_file(&ours);
    let listener = UnixListener::bind(&ours).unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap().replace(at.to_str().unwrap(), ours.to_str().unwrap());
    thread::spawn(move || {
        for (index, from) in listener.incoming().enumerate() {
            let Ok(to) = UnixStream::connect(&at) else { return };
            let change = match (&meddling, index) {
                (_, 0) => meddling.main(),
                (Meddling::Channel(change), 1) => change.clone(),
                _ => Change::Nothing,
            };
            thread::spawn(move || pass(from.unwrap(), to, change, &Mutex::default()));
        }
    });
    text.into_bytes()
}

/// Connections of a process that has no business there.
struct Strangers(Child);

impl Strangers {
    fn come(at: &Path, times: usize) -> Option<Self> {
        let program = format!(
            "import socket, sys, time\nall = [socket.socket(socket.AF_UNIX) for _ in range({times})]\n[one.connect({at:?}) for one in all]\n\
             print('there', flush=True)\ntime.sleep(60)"
        );
        let mut child = Command::new("python3").args(["-c", &program]).stdout(Stdio::piped()).spawn().ok()?;
        let mut there = [0; 5];
        child.stdout.as_mut().unwrap().read_exact(&mut there).unwrap();
        Some(Self(child))
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
