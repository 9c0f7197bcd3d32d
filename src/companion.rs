//! A process of ours beside a gateway, and what it is asked: this program, started as something else, at the other end of a socket that keeps
//! messages apart.
//!
//! *Owns:* its start, and [`Mailbox`], the gateway's end of the socket. *Never:* what is said there; a wait without an end.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg, send, socketpair,
};
use serde::Serialize;

/// Starts this program as something else, which reads on standard input what it is to know; a socket to it.
///
/// # Errors
/// It cannot be started.
pub fn companion(what: &[&str], registration: &impl Serialize) -> io::Result<OwnedFd> {
    let (own, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut registered = File::from(memfd_create("registration", MemfdFlags::CLOEXEC)?);
    registered.write_all(&serde_json::to_vec(registration)?)?;
    registered.rewind()?;
    // This program, whatever has become of its file. Ctrl-C in a terminal is for the gateway, which may still need VMMs ended.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("sealane").args(what).stdin(Stdio::from(registered)).stdout(Stdio::from(its)).process_group(0);
    // It ends with its socket, and whoever outlives it takes its exit status.
    drop(command.spawn()?);
    Ok(own)
}

/// What a message says.
#[derive(Debug)]
pub enum Said<S> {
    /// First, and once: it is who it is to be, and listens.
    Ready,
    /// Something of the request with this number.
    Of(u64, S),
}

/// Why nothing came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    /// The process has ended.
    Gone,
    /// It does not answer.
    Late,
    /// It does not read.
    Full,
    /// The request is of so many bytes, which are too many.
    Long(usize),
}

/// The gateway's end: requests that are asked by many, and what was said of each.
pub struct Mailbox<S> {
    socket: OwnedFd,
    /// A message, with the file that came along; nothing where it cannot be read.
    read: fn(&[u8], Option<OwnedFd>) -> Option<Said<S>>,
    /// The longest request, and the longest message.
    bytes_max: [usize; 2],
    told: Mutex<Told<S>>,
    /// Something was said.
    news: Condvar,
}

/// What was said of each request that somebody waits for.
#[derive(Debug)]
pub struct Told<S> {
    /// Whether it listens.
    pub ready: bool,
    /// Whether it has ended.
    pub gone: bool,
    /// How many messages came.
    pub messages: u64,
    last: u64,
    /// Whether one of those who wait listens for all of them.
    listening: bool,
    asked: BTreeMap<u64, Option<S>>,
}

impl<S> Told<S> {
    fn of(&mut self, number: u64) -> Option<&mut Option<S>> {
        self.asked.get_mut(&number)
    }

    /// How many requests somebody waits for.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.asked.len()
    }
}

impl<S> fmt::Debug for Mailbox<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl<S> Mailbox<S> {
    /// Over a socket that keeps messages apart. Requests and messages have `bytes_max` bytes at most.
    pub fn over(socket: OwnedFd, bytes_max: [usize; 2], read: fn(&[u8], Option<OwnedFd>) -> Option<Said<S>>) -> Arc<Self> {
        let told = Told { ready: false, gone: false, messages: 0, last: 0, listening: false, asked: BTreeMap::new() };
        Arc::new(Self { socket, read, bytes_max, told: Mutex::new(told), news: Condvar::new() })
    }

    /// A request that is said next: what is said of it is kept until this is dropped.
    ///
    /// # Errors
    /// So many that nobody may add one are waited for.
    pub fn number(self: &Arc<Self>, waiting_max: usize) -> Result<Asked<S>, usize> {
        let mut told = self.told();
        if told.asked.len() >= waiting_max {
            return Err(told.asked.len());
        }
        told.last = told.last.wrapping_add(1);
        let number = told.last;
        told.asked.insert(number, None);
        Ok(Asked { mailbox: Arc::clone(self), number })
    }

    /// Says something. With `patient` a process that does not read is waited for.
    ///
    /// # Errors
    /// It is not said.
    pub fn say(&self, request: &impl Serialize, patient: bool) -> Result<(), Unanswered> {
        // What cannot be written has no length that could be sent.
        let bytes = serde_json::to_vec(request).map_err(|_| Unanswered::Long(0))?;
        if bytes.len() > self.bytes_max[0] {
            return Err(Unanswered::Long(bytes.len()));
        }
        let flags = if patient { SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL | SendFlags::DONTWAIT };
        match retry_on_intr(|| send(&self.socket, &bytes, flags)) {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => Err(Unanswered::Full),
            Err(_) => Err(Unanswered::Gone),
        }
    }

    /// Looks at what was said until now.
    pub fn look<T>(&self, look: impl FnOnce(&mut Told<S>) -> T) -> T {
        let mut told = self.told();
        // Whoever listens now hears of it.
        if !told.listening {
            self.listen(&mut told);
        }
        look(&mut told)
    }

    /// Waits until something was said. Whoever waits first listens for all, so that nobody sleeps on while the answer is there.
    ///
    /// # Errors
    /// It was not, within that time, or will not be.
    pub fn wait<T>(&self, within: Duration, mut found: impl FnMut(&mut Told<S>) -> Option<T>) -> Result<T, Unanswered> {
        let began = Instant::now();
        let mut told = self.told();
        loop {
            if !told.listening {
                self.listen(&mut told);
            }
            if let Some(answer) = found(&mut told) {
                return Ok(answer);
            }
            if told.gone {
                return Err(Unanswered::Gone);
            }
            let left = within.checked_sub(began.elapsed()).filter(|left| !left.is_zero()).ok_or(Unanswered::Late)?;
            if told.listening {
                told = self.news.wait_timeout(told, left).map_or_else(|poisoned| poisoned.into_inner().0, |(told, _)| told);
                continue;
            }
            told.listening = true;
            drop(told);
            let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(1), tv_nsec: i64::from(left.subsec_nanos()) };
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left));
            told = self.told();
            told.listening = false;
            self.listen(&mut told);
            self.news.notify_all();
        }
    }

    fn told(&self) -> MutexGuard<'_, Told<S>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in all that was said so far.
    fn listen(&self, told: &mut Told<S>) {
        let mut bytes = vec![0; self.bytes_max[1]];
        while !told.gone {
            let (length, file) = match hear(&self.socket, &mut bytes) {
                Err(Errno::AGAIN) => return,
                Err(_) | Ok((0, _)) => {
                    told.gone = true;
                    return;
                }
                Ok(got) => got,
            };
            // What cannot be read is no answer; whoever waits for it hears that it is late.
            let Some(said) = bytes.get(..length).and_then(|message| (self.read)(message, file)) else { continue };
            told.messages += 1;
            match said {
                Said::Ready => told.ready = true,
                // Nobody asks about the others any more.
                Said::Of(number, said) => {
                    if let Some(of) = told.asked.get_mut(&number) {
                        *of = Some(said);
                    }
                }
            }
        }
    }
}

/// A request. Without it nobody waits for the answer any more, and one that comes later is nobody's.
#[derive(Debug)]
pub struct Asked<S> {
    mailbox: Arc<Mailbox<S>>,
    /// What it is known by at the other end.
    pub number: u64,
}

impl<S> Asked<S> {
    /// Waits until something was said of it that is looked for.
    ///
    /// # Errors
    /// As of [`Mailbox::wait`].
    pub fn answer<T>(&self, within: Duration, mut found: impl FnMut(&mut S) -> Option<T>) -> Result<T, Unanswered> {
        self.mailbox.wait(within, |told| found(told.of(self.number)?.as_mut()?))
    }

    /// Waits until something was said of it, and takes that.
    ///
    /// # Errors
    /// As of [`Mailbox::wait`].
    pub fn taken(&self, within: Duration) -> Result<S, Unanswered> {
        self.mailbox.wait(within, |told| told.of(self.number)?.take())
    }

    /// Looks at what was said of it until now, and whether the process has ended.
    pub fn look<T>(&self, look: impl FnOnce(Option<&S>) -> Option<T>) -> Result<Option<T>, Unanswered> {
        self.mailbox.look(|told| match look(told.of(self.number).and_then(|of| of.as_ref())) {
            None if told.gone => Err(Unanswered::Gone),
            found => Ok(found),
        })
    }
}

impl<S> Drop for Asked<S> {
    fn drop(&mut self) {
        self.mailbox.told().asked.remove(&self.number);
    }
}

/// A message, and the descriptor that may come along.
fn hear(socket: &OwnedFd, bytes: &mut [u8]) -> rustix::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
    let got = retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags))?;
    let descriptors =
        control.drain().filter_map(|message| if let RecvAncillaryMessage::ScmRights(all) = message { Some(all) } else { None });
    Ok((got.bytes, descriptors.flatten().last()))
}
