//! Datagrams of one lane, gathered until they fill one send.
//!
//! QUIC's library hands over at most ten datagrams at once. The kernel takes up to 64 KiB, which is 44 datagrams of an Ethernet
//! frame each, for about the price of one: at both ends, because they also arrive together where the path keeps them so.
//! What is held back is sent when it is full, when a datagram does not fit behind it, when the library had less to
//! send than it may, and otherwise once the tasks that are ready have had their turn.

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::sync::Notify;

/// What the library hands over at once, if it has so much.
const HANDED_OVER: usize = 10;

/// A socket whose sends are gathered.
pub(super) struct Gathering {
    inner: Arc<dyn AsyncUdpSocket>,
    held: Mutex<Held>,
    more: Arc<Notify>,
    /// Most bytes in one send.
    most: usize,
}

/// Datagrams of `segment` bytes each, one behind the other. Empty, nothing is held.
#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    segment: usize,
    to: Option<SocketAddr>,
    ecn: Option<EcnCodepoint>,
    /// How often something was added.
    added: u64,
}

impl Held {
    /// Whether the kernel takes `transmit` together with what is held.
    fn takes(&self, transmit: &Transmit<'_>, most: usize) -> bool {
        let length = transmit.contents.len();
        let same = self.to == Some(transmit.destination) && self.ecn == transmit.ecn;
        // Only the last datagram of a send may be shorter than the others, also where it had to stay.
        let whole = self.bytes.len().is_multiple_of(self.segment.max(1));
        let fits = whole && transmit.segment_size.map_or(length <= self.segment, |segment| segment == self.segment);
        same && fits && self.bytes.len().saturating_add(length) <= most
    }

    fn add(&mut self, transmit: &Transmit<'_>) {
        if self.bytes.is_empty() {
            self.segment = transmit.segment_size.unwrap_or(transmit.contents.len());
            (self.to, self.ecn) = (Some(transmit.destination), transmit.ecn);
        }
        self.bytes.extend_from_slice(transmit.contents);
        self.added = self.added.wrapping_add(1);
    }
}

impl Gathering {
    /// Sends through `inner`, up to `most` bytes at once. Has to be called inside a Tokio runtime, which then sends what is held back.
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>, most: usize) -> Arc<Self> {
        let more = Arc::<Notify>::default();
        let gathering = Arc::new(Self { inner, held: Mutex::default(), more: Arc::clone(&more), most });
        tokio::spawn(send_held(Arc::downgrade(&gathering), more));
        gathering
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is held. It stays held if the socket has no room now, and is lost, as a datagram may be, on any other error.
    fn flush(&self, held: &mut Held) -> io::Result<()> {
        let Some(destination) = held.to.filter(|_| !held.bytes.is_empty()) else { return Ok(()) };
        let segment_size = (held.bytes.len() > held.segment).then_some(held.segment);
        let sent = self.inner.try_send(&Transmit { destination, ecn: held.ecn, contents: &held.bytes, segment_size, src_ip: None });
        if !matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            held.bytes.clear();
        }
        sent
    }

    /// Sends what is held, unless something was added since it was `seen`.
    fn settle(&self, seen: &mut Option<u64>) -> Option<io::Result<()>> {
        let mut held = self.lock();
        (seen.replace(held.added) == Some(held.added)).then(|| self.flush(&mut held))
    }

    /// Most bytes of `segment` each that may go at once.
    fn room(&self, segment: usize) -> usize {
        segment.saturating_mul(self.inner.max_transmit_segments()).min(self.most)
    }
}

/// Sends what is held as soon as nobody has anything to add, until there is no socket any more.
async fn send_held(socket: Weak<Gathering>, more: Arc<Notify>) {
    loop {
        more.notified().await;
        let mut seen = None;
        loop {
            tokio::task::yield_now().await;
            let Some(socket) = socket.upgrade() else { return };
            match socket.settle(&mut seen) {
                None => {}
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut poller = Arc::clone(&socket.inner).create_io_poller();
                    // An error of the socket is for the next send to say.
                    let _ = poll_fn(|cx| poller.as_mut().poll_writable(cx)).await;
                }
                // The library hears of it when it sends next.
                Some(Ok(()) | Err(_)) => break,
            }
        }
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        let mut held = std::mem::take(&mut *self.lock());
        // A goodbye, perhaps. Nobody waits for it.
        let _ = self.flush(&mut held);
        self.more.notify_one();
    }
}

impl fmt::Debug for Gathering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gathering").field("most", &self.most).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Gathering {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut held = self.lock();
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        let room = self.room(segment);
        if transmit.src_ip.is_some() || !held.takes(transmit, room) {
            self.flush(&mut held)?;
        }
        let full = transmit.contents.len() == segment.saturating_mul(HANDED_OVER);
        let hold = full && held.bytes.len() + 2 * transmit.contents.len() <= room && transmit.src_ip.is_none();
        if hold || !held.bytes.is_empty() {
            held.add(transmit);
        } else {
            return self.inner.try_send(transmit);
        }
        if hold {
            self.more.notify_one();
            return Ok(());
        }
        match self.flush(&mut held) {
            // It was taken over, and leaves when there is room.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.more.notify_one();
                Ok(())
            }
            sent => sent,
        }
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    /// To whom, what, and cut into what.
    type Sent = (SocketAddr, Vec<u8>, Option<usize>);

    /// Notes what is sent; takes nothing while `busy` counts down.
    #[derive(Debug)]
    struct Fake {
        sent: Mutex<Vec<Sent>>,
        busy: Mutex<u32>,
        segments: usize,
    }

    #[derive(Debug)]
    struct Ready;

    impl UdpPoller for Ready {
        fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncUdpSocket for Fake {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            Box::pin(Ready)
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let mut busy = self.busy.lock().unwrap();
            if *busy > 0 {
                *busy -= 1;
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.sent.lock().unwrap().push((transmit.destination, transmit.contents.to_vec(), transmit.segment_size));
            Ok(())
        }

        fn poll_recv(&self, _: &mut Context<'_>, _: &mut [IoSliceMut<'_>], _: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Ok(PEER)
        }

        fn max_transmit_segments(&self) -> usize {
            self.segments
        }
    }

    const PEER: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1));
    const OTHER: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 2));
    const MOST: usize = 65_000;

    fn pair(segments: usize) -> (Arc<Fake>, Arc<Gathering>) {
        let fake = Arc::new(Fake { sent: Mutex::default(), busy: Mutex::new(0), segments });
        (Arc::clone(&fake), Gathering::new(fake, MOST))
    }

    fn hand_over(socket: &Gathering, destination: SocketAddr, contents: &[u8], segment: usize) -> io::Result<()> {
        let segment_size = (contents.len() > segment).then_some(segment);
        socket.try_send(&Transmit { destination, ecn: None, contents, segment_size, src_ip: None })
    }

    fn lengths(fake: &Fake) -> Vec<(usize, Option<usize>)> {
        fake.sent.lock().unwrap().iter().map(|(_, bytes, segment)| (bytes.len(), *segment)).collect()
    }

    async fn turns() {
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn full_handovers_leave_together_and_the_last_ones_by_themselves() {
        let (fake, socket) = pair(64);
        let full = vec![7; 10 * 1452];
        for _ in 0..5 {
            hand_over(&socket, PEER, &full, 1452).unwrap();
        }
        assert_eq!(lengths(&fake), [(4 * 14_520, Some(1452))], "the fifth waits for more");
        turns().await;
        assert_eq!(lengths(&fake), [(4 * 14_520, Some(1452)), (14_520, Some(1452))]);
    }

    #[tokio::test]
    async fn what_is_less_than_it_may_be_leaves_at_once_with_what_is_held() {
        let (fake, socket) = pair(64);
        hand_over(&socket, PEER, &[1; 100], 1452).unwrap();
        hand_over(&socket, PEER, &[2; 14_520], 1452).unwrap();
        hand_over(&socket, PEER, &[3; 1000], 1452).unwrap();
        assert_eq!(lengths(&fake), [(100, None), (15_520, Some(1452))]);
    }

    #[tokio::test]
    async fn what_does_not_go_together_leaves_one_behind_the_other() {
        let (fake, socket) = pair(64);
        hand_over(&socket, PEER, &[1; 14_520], 1452).unwrap();
        hand_over(&socket, OTHER, &[2; 14_520], 1452).unwrap();
        hand_over(&socket, OTHER, &[3; 12_000], 1200).unwrap();
        hand_over(&socket, OTHER, &[4; 1300], 1300).unwrap();
        assert_eq!(lengths(&fake), [(14_520, Some(1452)), (14_520, Some(1452)), (12_000, Some(1200)), (1300, None)]);
        assert_eq!(fake.sent.lock().unwrap().iter().map(|(to, ..)| *to).collect::<Vec<_>>(), [PEER, OTHER, OTHER, OTHER]);
    }

    #[tokio::test]
    async fn nothing_goes_behind_a_short_datagram_that_had_to_stay() {
        let (fake, socket) = pair(64);
        hand_over(&socket, PEER, &[1; 14_520], 1452).unwrap();
        *fake.busy.lock().unwrap() = 1;
        hand_over(&socket, PEER, &[2; 1000], 1452).unwrap();
        hand_over(&socket, PEER, &[3; 1000], 1452).unwrap();
        assert_eq!(lengths(&fake), [(15_520, Some(1452)), (1000, None)]);
    }

    #[tokio::test]
    async fn a_kernel_that_takes_one_datagram_at_a_time_gets_one() {
        let (fake, socket) = pair(1);
        hand_over(&socket, PEER, &[1; 1452], 1452).unwrap();
        hand_over(&socket, PEER, &[2; 1452], 1452).unwrap();
        assert_eq!(lengths(&fake), [(1452, None), (1452, None)]);
    }

    #[tokio::test]
    async fn what_is_held_leaves_with_the_socket() {
        let (fake, socket) = pair(64);
        hand_over(&socket, PEER, &[1; 14_520], 1452).unwrap();
        drop(socket);
        assert_eq!(lengths(&fake), [(14_520, Some(1452))]);
    }

    proptest! {
        /// Whatever comes, in whatever pieces, while the socket has room or not: it leaves once, in order, cut where it was cut.
        #[test]
        fn nothing_is_lost_doubled_or_cut_elsewhere(
            pieces in prop::collection::vec((1usize..=10, 0usize..3, 0u32..4, any::<bool>()), 1..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (expected, got) = runtime.block_on(async {
                let (fake, socket) = pair(64);
                let mut expected = Vec::new();
                for (number, (count, size, busy, turn)) in (0u8..).zip(pieces) {
                    let segment = [1200, 1452, 4000][size];
                    let mut contents = vec![number; segment * count];
                    if busy == 3 {
                        contents.truncate(contents.len() - 100);
                    }
                    *fake.busy.lock().unwrap() = busy;
                    while hand_over(&socket, PEER, &contents, segment).is_err() {}
                    expected.extend(contents.chunks(segment).map(<[u8]>::to_vec));
                    if turn {
                        turns().await;
                    }
                }
                *fake.busy.lock().unwrap() = 0;
                turns().await;
                let sent = fake.sent.lock().unwrap();
                let got = sent.iter().flat_map(|(_, bytes, segment)| bytes.chunks(segment.unwrap_or(bytes.len())).map(<[u8]>::to_vec)).collect::<Vec<_>>();
                assert!(sent.iter().all(|(_, bytes, _)| bytes.len() <= MOST));
                (expected, got)
            });
            prop_assert_eq!(expected, got);
        }
    }
}
