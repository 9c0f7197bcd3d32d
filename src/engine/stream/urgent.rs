//! Pages that a guest that was split waits for: they overtake the rest of its stream, on the session. At the source its hypervisor has a
//! channel of its own for them; at the destination they go into its one stream, wherever that is.

use std::sync::Arc;

use rustix::net::RecvFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Broken;
use super::back::BackOut;
use super::intake::unless_blocked;
use crate::condense::{FOLLOWED_BYTES_MAX, Follow, Grammar, Splice, URGENT_END, Unsound, UrgentWalk};
use crate::hypervisor::Later;

/// At the source: what the hypervisor has sent on that channel and is not at the destination.
pub(super) struct Urgent {
    pub(super) out: Arc<BackOut>,
    reading: Option<JoinHandle<Result<(), Broken>>>,
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some(reading) = &self.reading {
            reading.abort();
        }
    }
}

impl Urgent {
    /// With the channel that will come, if one will, until the rest of the stream has `ended`.
    pub(super) fn open(channel: Option<Later>, grammar: Grammar, ended: watch::Receiver<bool>) -> Self {
        let out = Arc::new(BackOut::default());
        let into = Arc::clone(&out);
        let reading = tokio::spawn(async move {
            let mut kept = None;
            read(channel, &mut kept, &into, UrgentWalk::new(grammar), ended).await?;
            // A hypervisor that loses a channel of its own takes its migration for broken.
            std::future::pending().await
        });
        Self { out, reading: Some(reading) }
    }

    /// Waits until the channel fails. May be dropped and called again.
    pub(super) async fn failed(&mut self) -> Result<Result<(), Broken>, tokio::task::JoinError> {
        match &mut self.reading {
            Some(reading) => {
                let failed = reading.await;
                self.reading = None;
                failed
            }
            None => std::future::pending().await,
        }
    }
}

/// Reads what comes on the channel until the rest of the stream has ended, then what is there. That is all: QEMU writes each page before
/// that end, of which nothing is known before it was written.
async fn read(
    channel: Option<Later>,
    kept: &mut Option<UnixStream>,
    out: &BackOut,
    mut walk: UrgentWalk,
    mut ended: watch::Receiver<bool>,
) -> Result<(), Broken> {
    if let Some(mut channel) = channel {
        *kept = tokio::select! {
            stream = channel.come() => Some(stream?),
            () = over(&mut ended) => channel.now()?,
        };
    }
    tracing::info!(channel = kept.is_some(), "pages that the guest waits for overtake its stream");
    let (mut held, mut filled) = (vec![0; READ_BYTES + FOLLOWED_BYTES_MAX], 0);
    while let Some(stream) = kept.as_ref().filter(|_| !walk.has_ended()) {
        let is_over = tokio::select! {
            ready = stream.readable() => ready.map(|()| false)?,
            () = over(&mut ended) => true,
        };
        let read = at_once(stream, is_over, held.get_mut(filled..).unwrap_or_default())?;
        match read {
            Some(0) | None if is_over => break,
            // The rest of the stream ends too, or has failed.
            Some(0) => over(&mut ended).await,
            None => {}
            Some(count) => filled += count,
        }
        let taken = walk.take_in(held.get(..filled).unwrap_or_default())?;
        if taken > 0 {
            out.put(held.get(..taken).unwrap_or_default()).await;
        }
        held.copy_within(taken..filled, 0);
        filled -= taken;
    }
    if filled > 0 {
        return Err(Unsound { at: 0, expected: "whole pages that are waited for", got: format!("{filled} bytes more") }.into());
    }
    over(&mut ended).await;
    if !walk.has_ended() {
        out.put(&URGENT_END).await;
    }
    Ok(())
}

/// Waits until the rest of the stream has ended; for ever where it never will.
async fn over(ended: &mut watch::Receiver<bool>) {
    if ended.wait_for(|ended| *ended).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What there is. WHY: what the runtime knows of a socket may be older than what its writer did before something else that is known.
fn at_once(stream: &UnixStream, all: bool, into: &mut [u8]) -> std::io::Result<Option<usize>> {
    let read = if all {
        rustix::net::recv(stream, into, RecvFlags::DONTWAIT).map(|(count, _)| count).map_err(std::io::Error::from)
    } else {
        stream.try_read(into)
    };
    unless_blocked(read)
}

/// The rest of a stream that begins anew, and the pages that are waited for, as one stream, to its end.
pub(super) async fn splice(rest: OwnedReadHalf, channel: Later, mut splice: Splice, mut into: OwnedWriteHalf) -> Result<(), Broken> {
    let (mut channel, mut urgent) = (Some(channel), None::<UnixStream>);
    let mut piece = vec![0; READ_BYTES];
    loop {
        tokio::select! {
            stream = come(&mut channel) => (channel, urgent) = (None, Some(stream?)),
            ready = readable(urgent.as_ref()), if splice.takes_urgent() => ready?,
            ready = rest.readable(), if splice.wants_more() => {
                ready?;
                match unless_blocked(rest.try_read(&mut piece))? {
                    Some(0) => return Ok(()),
                    Some(count) => splice.take_in(piece.get(..count).unwrap_or_default())?,
                    None => {}
                }
            }
        }
        let over = splice.awaits_end();
        if over && urgent.is_none() {
            urgent = channel.take().map(|mut channel| channel.now()).transpose()?.flatten();
        }
        while splice.takes_urgent() {
            let Some(urgent) = &urgent else {
                if over {
                    splice.take_urgent(&URGENT_END)?;
                }
                break;
            };
            match at_once(urgent, over, &mut piece)? {
                Some(0) | None if over => splice.take_urgent(&URGENT_END)?,
                Some(0) => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
                Some(count) => splice.take_urgent(piece.get(..count).unwrap_or_default())?,
                None => break,
            }
        }
        into.write_all(splice.out()).await?;
        splice.out().clear();
    }
}

async fn come(channel: &mut Option<Later>) -> std::io::Result<UnixStream> {
    match channel {
        Some(channel) => channel.come().await,
        None => std::future::pending().await,
    }
}

async fn readable(stream: Option<&UnixStream>) -> std::io::Result<()> {
    match stream {
        Some(stream) => stream.readable().await,
        None => std::future::pending().await,
    }
}

/// WHY: a few pages, which are what a guest waits for at once.
const READ_BYTES: usize = 32 * 1024;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::condense::{Expected, RamBlock};
    use crate::types::{PAGE_BYTES, VmUuid};

    fn expected() -> Box<Expected> {
        let blocks = vec![RamBlock { name: "pc.ram".to_owned(), used: 1 << 20, max: 1 << 20 }];
        Box::new(Expected { uuid: VmUuid([7; 16]), machine: "pc".to_owned(), blocks, post_copy: true })
    }

    /// The first one, and others of its block.
    fn page(number: u64) -> Vec<u8> {
        let (goes_on, name) = if number == 0 { (0, b"\x06pc.ram".as_slice()) } else { (0x20, b"".as_slice()) };
        [&(number << 12 | 8 | goes_on).to_be_bytes(), name, &[5; PAGE_BYTES]].concat()
    }

    struct Opened {
        urgent: Urgent,
        ended: watch::Sender<bool>,
        channel: std::os::unix::net::UnixStream,
        _directory: tempfile::TempDir,
    }

    fn open() -> Opened {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("channels");
        let (later, ended) = (Later::of_this_process(&at).unwrap(), watch::Sender::new(false));
        let channel = std::os::unix::net::UnixStream::connect(&at).unwrap();
        let urgent = Urgent::open(Some(later), Grammar::Qemu(expected()), ended.subscribe());
        Opened { urgent, ended, channel, _directory: directory }
    }

    async fn said(out: &BackOut, bytes: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < bytes {
            let (offset, piece) = out.next().await;
            assert_eq!(offset, all.len() as u64);
            all.extend(piece);
        }
        all
    }

    /// What was written before the rest of the stream ended is all there, whatever the runtime knew of it, and behind it stands its end.
    #[tokio::test]
    async fn pages_come_at_once_and_all_of_them_before_their_end() {
        let Opened { urgent, ended, mut channel, .. } = open();
        let first = page(0);
        channel.write_all(&first[..1000]).unwrap();
        tokio::task::yield_now().await;
        channel.write_all(&first[1000..]).unwrap();
        assert_eq!(said(&urgent.out, first.len()).await, first);
        assert!(!urgent.out.is_applied() && urgent.out.applied(first.len() as u64) && urgent.out.is_applied());
        channel.write_all(&page(1)).unwrap();
        ended.send_replace(true);
        urgent.out.say_again();
        let rest = [&page(1)[..], &URGENT_END].concat();
        let mut all = Vec::new();
        while all.len() < rest.len() {
            all.extend(urgent.out.next().await.1);
        }
        assert_eq!(all, rest);
    }

    /// As QEMU does for machine types before 8.0.
    #[tokio::test]
    async fn an_end_that_the_hypervisor_says_itself_is_said_once() {
        let Opened { urgent, ended, mut channel, .. } = open();
        let all = [&page(0)[..], &URGENT_END].concat();
        channel.write_all(&all).unwrap();
        assert_eq!(said(&urgent.out, all.len()).await, all);
        ended.send_replace(true);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), urgent.out.next()).await.is_err());
    }

    #[tokio::test]
    async fn what_is_no_page_or_a_part_of_one_is_refused() {
        for bytes in [PAGE_BYTES.to_be_bytes().to_vec(), page(0)[..100].to_vec(), page(1)] {
            let Opened { mut urgent, ended, mut channel, .. } = open();
            channel.write_all(&bytes).unwrap();
            ended.send_replace(true);
            let refused = urgent.failed().await.unwrap().unwrap_err();
            assert!(matches!(refused, Broken::Unsound(_)), "{refused}");
        }
    }

    #[tokio::test]
    async fn without_a_channel_the_end_is_said_all_the_same() {
        let ended = watch::Sender::new(false);
        let urgent = Urgent::open(None, Grammar::Qemu(expected()), ended.subscribe());
        ended.send_replace(true);
        assert_eq!(urgent.out.next().await, (0, URGENT_END.to_vec()));
    }

    /// Behind a gateway that was started anew.
    #[tokio::test]
    async fn the_rest_that_begins_anew_is_one_stream() {
        use tokio::io::AsyncReadExt;
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("channels");
        let later = Later::of_this_process(&at).unwrap();
        let ((rest, mut qemu), (mut out, into)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let splicing = tokio::spawn(splice(rest.into_split().0, later, Splice::again(expected()), into.into_split().1));
        let begin = [b"\x08\0\x09\0\0\x02\0\0\0\x02".as_slice(), &page(0)].concat();
        qemu.write_all(&begin).await.unwrap();
        let mut came = vec![0; begin.len()];
        out.read_exact(&mut came).await.unwrap();
        assert_eq!(came, begin);
        let mut channel = std::os::unix::net::UnixStream::connect(&at).unwrap();
        let named = page(0);
        channel.write_all(&named).unwrap();
        let mut came = vec![0; 8 + PAGE_BYTES];
        out.read_exact(&mut came).await.unwrap();
        assert_eq!(came, [&0x28_u64.to_be_bytes()[..], &[5; PAGE_BYTES]].concat(), "in the section that is open");
        channel.write_all(&page(2)).unwrap();
        qemu.write_all(&[&URGENT_END[..], b"\x7e\0\0\0\x02\x03\0\0\0\x02", &URGENT_END, b"\x7e\0\0\0\x02\0"].concat()).await.unwrap();
        qemu.shutdown().await.unwrap();
        let mut end = Vec::new();
        out.read_to_end(&mut end).await.unwrap();
        splicing.await.unwrap().unwrap();
        assert!(end.len() > PAGE_BYTES && end.ends_with(&[&URGENT_END[..], b"\x7e\0\0\0\x02\0"].concat()), "{}", end.len());
    }
}
