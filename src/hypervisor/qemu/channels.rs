//! Several sockets for one stream (`multifd`). For these QEMU takes no descriptors: it connects to a path, where its gateway listens
//! until all of them are there.

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
}

impl Channels {
    /// Listens at `at`, for this user alone.
    pub(super) fn listen(at: &Path) -> io::Result<Self> {
        // One that a gateway that was killed has left.
        let _ = fs::remove_file(at);
        let listener = UnixListener::bind(at)?;
        fs::set_permissions(at, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, at: at.to_owned(), taken: Vec::new() })
    }

    /// Takes those that are there; all once there are so many, the main channel, which comes first, in front.
    pub(super) fn take(&mut self, wanted: usize) -> io::Result<Option<Vec<UnixStream>>> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            let process = socket_peercred(&stream)?.pid;
            let index = match self.taken.iter().position(|(known, _)| *known == process) {
                Some(index) => index,
                None if self.taken.len() >= limits::CHANNEL_PROCESSES_MAX => {
                    tracing::warn!(?process, "connections of too many processes where a hypervisor's channels are waited for");
                    continue;
                }
                None => {
                    self.taken.push((process, Vec::new()));
                    self.taken.len() - 1
                }
            };
            let Some((_, taken)) = self.taken.get_mut(index) else { continue };
            taken.push(stream);
            if taken.len() < wanted {
                continue;
            }
            let taken = std::mem::take(taken);
            for (process, others) in self.taken.drain(..).filter(|(_, others)| !others.is_empty()) {
                tracing::warn!(
                    ?process,
                    connections = others.len(),
                    "connections of another process are none of the hypervisor's channels"
                );
            }
            return Ok(Some(taken));
        }
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
        assert!(channels.take(2).unwrap().is_none());
        let mut first = UnixStream::connect(&at).unwrap();
        assert!(channels.take(2).unwrap().is_none());
        let mut second = UnixStream::connect(&at).unwrap();
        let mut taken = channels.take(2).unwrap().unwrap();
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
        assert!(channels.take(2).unwrap().is_none());
        assert!(stranger().unwrap().success());
        assert!(channels.take(2).unwrap().is_none());
        let _second = UnixStream::connect(&at).unwrap();
        let mut taken = channels.take(2).unwrap().unwrap();
        first.write_all(b"1").unwrap();
        let mut byte = [0];
        taken[0].read_exact(&mut byte).unwrap();
        assert_eq!((taken.len(), byte), (2, *b"1"));
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
            assert!(said.success() && channels.take(2).unwrap().is_none());
        }
        assert_eq!(channels.taken.len(), limits::CHANNEL_PROCESSES_MAX);
    }
}
