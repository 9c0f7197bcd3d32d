//! Several sockets for one stream (`multifd`, `postcopy-preempt`). For these QEMU takes no descriptors: it connects to a path, where its
//! gateway listens until all of them are there.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::sockopt::socket_peercred;
use rustix::process::Pid;

use crate::limits;

/// Takes connections of one process, the first that has made as many as are wanted: others may connect too, and are none of them.
#[derive(Debug)]
pub(super) struct Channels {
    listener: UnixListener,
    at: PathBuf,
    /// By process, each in their order.
    taken: Vec<(Pid, Vec<UnixStream>)>,
    /// Whose were given away, and the one that came behind them if it did by then.
    of: Option<(Pid, Option<UnixStream>)>,
}

impl Channels {
    /// Listens at `at`, for this user alone.
    pub(super) fn listen(at: &Path) -> io::Result<Self> {
        // One that a gateway that was killed has left.
        let _ = fs::remove_file(at);
        let listener = UnixListener::bind(at)?;
        fs::set_permissions(at, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, at: at.to_owned(), taken: Vec::new(), of: None })
    }

    /// Behind the one that was taken, whose process may open another.
    pub(super) fn later(mut self) -> Option<Later> {
        self.of.take().map(|(process, came)| Later { channels: self, process, came })
    }

    /// Takes those that are there; all once there are so many, the main channel, which comes first, in front. Of this process alone, if one is
    /// named.
    pub(super) fn take(&mut self, wanted: usize, of: Option<Pid>) -> io::Result<Option<Vec<UnixStream>>> {
        loop {
            let whole = |(process, taken): &(Pid, Vec<UnixStream>)| taken.len() >= wanted && of.is_none_or(|of| of == *process);
            if let Some(index) = self.taken.iter().position(whole) {
                let (process, mut taken) = self.taken.swap_remove(index);
                self.of = Some((process, taken.split_off(wanted).pop()));
                for (process, others) in self.taken.drain(..) {
                    let connections = others.len();
                    tracing::warn!(?process, connections, "connections of another process are none of the hypervisor's channels");
                }
                return Ok(Some(taken));
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            let process = socket_peercred(&stream)?.pid;
            let others = self.taken.len();
            match self.taken.iter_mut().find(|(known, _)| *known == process) {
                // One more may be for later.
                Some((_, taken)) if taken.len() > wanted => {}
                Some((_, taken)) => taken.push(stream),
                None if others >= limits::CHANNEL_PROCESSES_MAX => {
                    tracing::warn!(?process, "connections of too many processes where a hypervisor's channels are waited for");
                }
                None => self.taken.push((process, vec![stream])),
            }
        }
    }
}

/// One more channel of a process, which it opens later or never.
#[derive(Debug)]
pub struct Later {
    channels: Channels,
    process: Pid,
    /// It came before anybody waited for it.
    came: Option<UnixStream>,
}

impl Later {
    /// Of this process.
    #[cfg(test)]
    pub(crate) fn of_this_process(at: &Path) -> io::Result<Self> {
        Ok(Self { channels: Channels::listen(at)?, process: rustix::process::getpid(), came: None })
    }

    /// Waits until it comes. May be dropped and called again.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn come(&mut self) -> io::Result<tokio::net::UnixStream> {
        if let Some(stream) = self.now()? {
            return Ok(stream);
        }
        let listener = tokio::net::UnixListener::from_std(self.channels.listener.try_clone()?)?;
        loop {
            if let Some(stream) = self.of_it(listener.accept().await?.0)? {
                return Ok(stream);
            }
        }
    }

    /// The same, if it has come.
    ///
    /// # Errors
    /// As [`come`](Self::come).
    pub fn now(&mut self) -> io::Result<Option<tokio::net::UnixStream>> {
        loop {
            let stream = match self.came.take().map_or_else(|| self.channels.listener.accept().map(|(stream, _)| stream), Ok) {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            if let Some(stream) = self.of_it(tokio::net::UnixStream::from_std(stream)?)? {
                return Ok(Some(stream));
            }
        }
    }

    fn of_it(&self, stream: tokio::net::UnixStream) -> io::Result<Option<tokio::net::UnixStream>> {
        let process = socket_peercred(&stream)?.pid;
        if process != self.process {
            tracing::warn!(?process, "a connection of another process is none of the hypervisor's channels");
            return Ok(None);
        }
        Ok(Some(stream))
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn connections_are_taken_in_their_order_and_the_path_is_gone_behind_them() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("channels");
        fs::write(&at, "left").unwrap();
        let mut channels = Channels::listen(&at).unwrap();
        assert_eq!(fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(channels.take(2, None).unwrap().is_none());
        let mut first = UnixStream::connect(&at).unwrap();
        assert!(channels.take(2, None).unwrap().is_none());
        let mut second = UnixStream::connect(&at).unwrap();
        let mut taken = channels.take(2, None).unwrap().unwrap();
        first.write_all(b"1").unwrap();
        second.write_all(b"2").unwrap();
        for (stream, said) in taken.iter_mut().zip(b"12") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            assert_eq!(byte[0], *said);
        }
        drop(channels);
        assert!(!at.exists());
    }

    /// Also where they come first.
    #[test]
    fn connections_of_another_process_are_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("channels");
        let mut channels = Channels::listen(&at).unwrap();
        let text = format!("import socket; s = socket.socket(socket.AF_UNIX); s.connect({at:?})");
        let stranger = || std::process::Command::new("python3").args(["-c", &text]).status();
        let Ok(said) = stranger() else { return println!("SKIPPED: no python3") };
        assert!(said.success());
        let mut first = UnixStream::connect(&at).unwrap();
        assert!(channels.take(2, None).unwrap().is_none());
        assert!(stranger().unwrap().success());
        assert!(channels.take(2, None).unwrap().is_none());
        let _second = UnixStream::connect(&at).unwrap();
        let mut taken = channels.take(2, None).unwrap().unwrap();
        first.write_all(b"1").unwrap();
        let mut byte = [0];
        taken[0].read_exact(&mut byte).unwrap();
        assert_eq!((taken.len(), byte), (2, *b"1"));
    }

    /// What comes later is of the same process, and the path is there as long as it may.
    #[tokio::test]
    async fn a_channel_that_comes_later_is_of_the_same_process() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("channels");
        let mut channels = Channels::listen(&at).unwrap();
        let text = format!("import socket; s = socket.socket(socket.AF_UNIX); s.connect({at:?})");
        let stranger = || std::process::Command::new("python3").args(["-c", &text]).status().is_ok_and(|said| said.success());
        if stranger() {
            assert!(channels.take(1, Some(rustix::process::getpid())).unwrap().is_none(), "it is first, and another");
        }
        let _main = UnixStream::connect(&at).unwrap();
        assert_eq!(channels.take(1, Some(rustix::process::getpid())).unwrap().unwrap().len(), 1);
        let mut later = channels.later().unwrap();
        assert!(later.now().unwrap().is_none());
        if stranger() {
            assert!(later.now().unwrap().is_none(), "one of a stranger");
        }
        let (mut ours, came) = (UnixStream::connect(&at).unwrap(), later.come().await.unwrap());
        ours.write_all(b"1").unwrap();
        came.readable().await.unwrap();
        assert_eq!(came.try_read(&mut [0; 8]).unwrap(), 1);
        let _more = UnixStream::connect(&at).unwrap();
        assert!(later.now().unwrap().is_some());
        drop(later);
        assert!(!at.exists());
    }

    #[test]
    fn connections_of_many_processes_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("channels");
        let mut channels = Channels::listen(&at).unwrap();
        let text = format!("import socket; s = socket.socket(socket.AF_UNIX); s.connect({at:?})");
        for _ in 0..limits::CHANNEL_PROCESSES_MAX + 2 {
            let Ok(said) = std::process::Command::new("python3").args(["-c", &text]).status() else {
                return println!("SKIPPED: no python3");
            };
            assert!(said.success() && channels.take(2, None).unwrap().is_none());
        }
        assert_eq!(channels.taken.len(), limits::CHANNEL_PROCESSES_MAX);
    }
}
