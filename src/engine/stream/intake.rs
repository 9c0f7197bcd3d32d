//! Where a hypervisor's stream is read from: one socket, or several, which become one stream here.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use super::Broken;
use crate::condense::{Expected, Gather};

/// What a stream is read from.
#[derive(Debug)]
pub(super) enum Intake {
    One(OwnedReadHalf),
    Several(Box<Several>),
}

/// The main channel of a stream and those that have its pages.
#[derive(Debug)]
pub(super) struct Several {
    main: Channel<OwnedReadHalf>,
    others: Vec<Channel<UnixStream>>,
    gather: Gather,
    /// How much was given of what was gathered.
    given: usize,
}

/// A socket, and what was read of it and not taken.
#[derive(Debug)]
struct Channel<S> {
    socket: S,
    held: Box<[u8]>,
    filled: usize,
    ended: bool,
}

impl Intake {
    pub(super) fn several(main: OwnedReadHalf, others: Vec<UnixStream>, expected: Expected) -> Self {
        let gather = Gather::new(expected, others.len());
        let (main, others) = (Channel::new(main), others.into_iter().map(Channel::new).collect());
        Self::Several(Box::new(Several { main, others, gather, given: 0 }))
    }

    /// What can be read now; zero at the end, and nothing when there is nothing yet.
    pub(super) fn try_read(&mut self, into: &mut [u8]) -> Result<Option<usize>, Broken> {
        match self {
            Self::One(socket) => Ok(unless_blocked(socket.try_read(into))?),
            Self::Several(several) => several.try_read(into),
        }
    }

    /// Waits until there may be more. May be dropped and called again.
    pub(super) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::One(socket) => socket.readable().await,
            Self::Several(several) => {
                let Several { main, others, .. } = &**several;
                poll_fn(|context| {
                    let main = main.wants_more().then(|| main.socket.as_ref());
                    let others = others.iter().filter(|other| other.wants_more()).map(|other| &other.socket);
                    for socket in main.into_iter().chain(others) {
                        if let Poll::Ready(ready) = socket.poll_read_ready(context) {
                            return Poll::Ready(ready);
                        }
                    }
                    Poll::Pending
                })
                .await
            }
        }
    }
}

impl Several {
    fn try_read(&mut self, into: &mut [u8]) -> Result<Option<usize>, Broken> {
        while self.gather.gathered().is_empty() {
            if !self.advance()? {
                return Ok(self.has_ended()?.then_some(0));
            }
        }
        let given = self.given;
        let gathered = self.gather.gathered();
        let rest = gathered.get(given..).unwrap_or_default();
        let count = rest.len().min(into.len());
        if let (Some(into), Some(now)) = (into.get_mut(..count), rest.get(..count)) {
            into.copy_from_slice(now);
        }
        self.given += count;
        if self.given >= gathered.len() {
            gathered.clear();
            self.given = 0;
        }
        Ok(Some(count))
    }

    /// Reads every channel once and takes what can be taken; whether there was anything.
    fn advance(&mut self) -> Result<bool, Broken> {
        let gather = &mut self.gather;
        let mut some = self.main.advance(|socket, into| socket.try_read(into), |bytes| gather.take_main(bytes))?;
        for (index, other) in self.others.iter_mut().enumerate() {
            some |= other.advance(|socket, into| socket.try_read(into), |bytes| gather.take_channel(index, bytes))?;
        }
        Ok(some)
    }

    /// Whether all channels have, in their places. Asked when nothing more can be taken.
    fn has_ended(&self) -> Result<bool, Broken> {
        // What the main channel has left waits for channels that have not come so far: nobody says that they come in this order.
        let mut others = self.others.iter().enumerate();
        let held_up = self.main.filled > 0 && others.any(|(index, other)| !other.ended && !self.gather.waits(index));
        let main_ended = self.main.ended && !held_up;
        if main_ended {
            self.gather.end_main(self.main.filled)?;
        }
        for (index, other) in self.others.iter().enumerate().filter(|(_, other)| other.ended) {
            // One that waits for the main channel may have nothing more to say.
            if main_ended || !self.gather.waits(index) {
                self.gather.end_channel(index, other.filled)?;
            }
        }
        Ok(self.main.ended && self.others.iter().all(|other| other.ended))
    }
}

/// WHY: where a channel is closed while QEMU begins, its migration can wait for that channel for ever, and then this QEMU moves no guest any
/// more (10.0, `multifd_send_sync_main`). One whose main channel is closed ends by itself, if the others are read until then.
impl Drop for Several {
    fn drop(&mut self) {
        let open: Vec<UnixStream> = self.others.drain(..).filter(|other| !other.ended).map(|other| other.socket).collect();
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        for mut socket in open {
            runtime.spawn(async move {
                let mut nowhere = tokio::io::sink();
                let _ = tokio::time::timeout(ENDS_WITHIN, tokio::io::copy(&mut socket, &mut nowhere)).await;
            });
        }
    }
}

impl<S> Channel<S> {
    fn new(socket: S) -> Self {
        Self { socket, held: vec![0; HELD_BYTES].into(), filled: 0, ended: false }
    }

    fn wants_more(&self) -> bool {
        !self.ended && self.filled < self.held.len()
    }

    /// Reads once, if there is room, and has `take` take what it can; whether anything was read or taken.
    fn advance(
        &mut self,
        read: impl Fn(&S, &mut [u8]) -> io::Result<usize>,
        take: impl FnOnce(&[u8]) -> Result<usize, crate::condense::Unsound>,
    ) -> Result<bool, Broken> {
        let mut some = false;
        if self.wants_more()
            && let Some(count) = unless_blocked(read(&self.socket, self.held.get_mut(self.filled..).unwrap_or_default()))?
        {
            (self.ended, some) = (count == 0, true);
            self.filled += count;
        }
        let taken = take(self.held.get(..self.filled).unwrap_or_default())?;
        self.held.copy_within(taken..self.filled, 0);
        self.filled -= taken;
        Ok(some || taken > 0)
    }
}

pub(super) fn unless_blocked(read: io::Result<usize>) -> io::Result<Option<usize>> {
    match read {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is held of a channel. WHY: less than its socket, whose writer waits while pages of another are taken; more than what is taken at once.
const HELD_BYTES: usize = 256 * 1024;
/// WHY: much longer than QEMU takes to end a migration, and a bound for one that does not.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condense::RamBlock;
    use crate::types::VmUuid;

    fn several(channels: usize) -> (Intake, UnixStream, Vec<UnixStream>) {
        let blocks = vec![RamBlock { name: "pc.ram".to_owned(), used: 1 << 20, max: 1 << 20 }];
        let expected = Expected { uuid: VmUuid([7; 16]), machine: "pc".to_owned(), blocks, post_copy: false };
        let (main, theirs) = UnixStream::pair().unwrap();
        let (ours, others) = (0..channels).map(|_| UnixStream::pair().unwrap()).unzip();
        (Intake::several(main.into_split().0, ours, expected), theirs, others)
    }

    /// The end, or what comes until nothing more is there.
    async fn read(intake: &mut Intake) -> Result<Vec<u8>, Broken> {
        let (mut all, mut piece) = (Vec::new(), vec![0; 1000]);
        loop {
            match intake.try_read(&mut piece)? {
                Some(0) => return Ok(all),
                Some(count) => all.extend_from_slice(&piece[..count]),
                None => intake.readable().await?,
            }
        }
    }

    const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05\x12configuration/uuid\0\0\0\x01\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\
        \x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\x10\0\x04\x06pc.ram\0\0\0\0\0\x10\0\0";
    const EOS: &[u8] = b"\0\0\0\0\0\0\0\x10";

    fn greeting(id: u8) -> Vec<u8> {
        let mut bytes = [b"\x11\x22\x33\x44\0\0\0\x01".as_slice(), &[7; 16], &[id]].concat();
        bytes.resize(64, 0);
        bytes
    }

    fn sync() -> Vec<u8> {
        let mut bytes = b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x01".to_vec();
        bytes.resize(1344, 0);
        bytes
    }

    #[tokio::test]
    async fn sockets_become_one_stream_and_all_of_them_have_to_end() {
        use tokio::io::AsyncWriteExt;
        let (mut intake, mut main, mut others) = several(2);
        let writing = tokio::spawn(async move {
            for (id, other) in others.iter_mut().enumerate() {
                other.write_all(&[greeting(u8::try_from(id).unwrap()), sync(), sync()].concat()).await.unwrap();
            }
            let end = [EOS, b"\x7e\0\0\0\x02\x03\0\0\0\x02", EOS, b"\x7e\0\0\0\x02devices"].concat();
            main.write_all(&[HEAD, &end].concat()).await.unwrap();
            drop(main);
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(others.pop());
            tokio::time::sleep(Duration::from_millis(20)).await;
        });
        let all = read(&mut intake).await.unwrap();
        assert!(writing.is_finished() && all.starts_with(HEAD) && all.ends_with(b"\x7e\0\0\0\x02devices"), "{}", all.escape_ascii());
    }

    /// Whoever passes them on may be slower with one than with another.
    #[tokio::test]
    async fn a_main_channel_that_has_ended_waits_for_the_others() {
        let (mut intake, main, others) = several(2);
        let end = [EOS, b"\x7e\0\0\0\x02\x03\0\0\0\x02", EOS, b"\x7e\0\0\0\x02devices"].concat();
        main.try_write(&[HEAD, &end].concat()).unwrap();
        drop(main);
        let writing = tokio::spawn(async move {
            for (id, other) in others.into_iter().enumerate() {
                for part in [greeting(u8::try_from(id).unwrap()), sync(), sync()] {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    other.try_write(&part).unwrap();
                }
            }
        });
        let all = read(&mut intake).await.unwrap();
        assert!(writing.is_finished() && all.ends_with(b"\x7e\0\0\0\x02devices"), "{}", all.escape_ascii());
    }

    #[tokio::test]
    async fn a_main_channel_that_ends_too_early_is_noticed_at_once() {
        let (mut intake, main, others) = several(2);
        for (id, other) in others.iter().enumerate() {
            other.try_write(&[greeting(u8::try_from(id).unwrap()), sync()].concat()).unwrap();
        }
        main.try_write(&[HEAD, EOS, &EOS[..7]].concat()).unwrap();
        drop(main);
        let error = read(&mut intake).await.unwrap_err().to_string();
        assert!(error.contains("its end"), "{error}");
    }

    /// Behind an attempt that failed: the main channel is closed, and the others are read until their hypervisor closes them.
    #[tokio::test]
    async fn channels_are_read_on_when_their_stream_is_given_up() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (intake, mut main, mut others) = several(2);
        drop(intake);
        assert_eq!(main.read(&mut [0]).await.unwrap(), 0);
        for other in &mut others {
            other.write_all(&vec![7; 4 << 20]).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_channel_that_ends_too_early_is_noticed_at_once() {
        let (mut intake, _main, mut others) = several(2);
        others[0].try_write(&greeting(0)).unwrap();
        others.remove(0);
        let error = read(&mut intake).await.unwrap_err().to_string();
        assert!(error.contains("pages until the last section") && error.contains("channel 0"), "{error}");
    }
}
