//! A UDP relay in front of a gateway: a link with a rate, a delay, losses and outages, and a NAT whose ports can change.
//!
//! Each client address gets an upstream socket of its own, as behind a NAT: the session and every lane are another client.
//! Each way has a queue and one thread that delivers from it; each socket has one thread that reads it.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::random::Random;

/// The longest datagram of UDP over IPv4.
const DATAGRAM_BYTES: usize = 65_507;
/// How long a datagram may wait for a link with a rate; later ones are dropped.
const QUEUE: Duration = Duration::from_millis(50);
/// Bytes on their way in one direction; more are dropped.
const QUEUE_BYTES: usize = 16 << 20;
/// What the kernel keeps while a reading thread has to wait for its turn; it may give less.
const SOCKET_BYTES: usize = 8 << 20;
/// How often a thread that waits looks whether the relay has ended.
const LOOK: Duration = Duration::from_millis(100);

/// What the link is like, the same both ways.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conditions {
    /// Without one it is as fast as the machine.
    pub bits_per_second: Option<u64>,
    /// One way.
    pub delay: Duration,
    /// Datagrams lost, of a million.
    pub lost_per_million: u64,
    /// Which ones are lost.
    pub seed: u64,
}

/// Which way a datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From clients to the gateway.
    In,
    /// From the gateway to clients.
    Out,
}

/// The relay; it ends when it is dropped.
pub struct Relay {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    conditions: Conditions,
    front: Arc<UdpSocket>,
    gateway: SocketAddr,
    upstreams: Mutex<HashMap<SocketAddr, Upstream>>,
    readers: Mutex<Vec<JoinHandle<()>>>,
    lines: [Line; 2],
    cut: AtomicBool,
    ended: AtomicBool,
}

/// A client's mapping in the NAT.
#[derive(Clone)]
struct Upstream {
    socket: Arc<UdpSocket>,
    /// False after a rebinding: what still comes to the old port goes nowhere.
    mapped: Arc<AtomicBool>,
}

/// One direction.
struct Line {
    queue: Mutex<Queue>,
    arrived: Condvar,
    forwarded_bytes: AtomicU64,
}

struct Queue {
    datagrams: VecDeque<Datagram>,
    bytes: usize,
    /// When the link has sent everything that it has taken.
    idle_from: Instant,
    random: Random,
}

struct Datagram {
    due: Instant,
    bytes: Vec<u8>,
    by: Arc<UdpSocket>,
    to: SocketAddr,
}

impl Relay {
    /// Listens on `listen` and forwards to the gateway.
    pub fn start(listen: SocketAddr, gateway: SocketAddr, conditions: Conditions) -> Self {
        let lines = [Way::In, Way::Out].map(|way| Line::new(Random(conditions.seed.wrapping_mul(2) + way as u64)));
        let shared = Arc::new(Shared {
            conditions,
            front: Arc::new(open(listen)),
            gateway,
            upstreams: Mutex::default(),
            readers: Mutex::default(),
            lines,
            cut: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let mut threads = vec![spawn(&shared, Shared::read_front)];
        threads.extend([Way::In, Way::Out].map(|way| spawn(&shared, move |shared| shared.deliver(way))));
        Self { shared, threads }
    }

    /// Where clients send to.
    pub fn address(&self) -> SocketAddr {
        self.shared.front.local_addr().unwrap()
    }

    /// From now on everything is lost both ways, also what is on its way.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.shared.cut.store(false, Ordering::SeqCst);
    }

    /// From now on the gateway sees every client at a new port, and what it sends to the old ones is lost.
    pub fn rebind(&self) {
        for (_, upstream) in self.shared.upstreams.lock().unwrap().drain() {
            upstream.mapped.store(false, Ordering::SeqCst);
        }
    }

    /// Bytes of UDP payload that left the relay.
    pub fn forwarded_bytes(&self, way: Way) -> u64 {
        self.shared.lines[way as usize].forwarded_bytes.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // The front's thread has ended, so there will be no more of them.
        for thread in self.shared.readers.lock().unwrap().drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn read_front(self: &Arc<Self>) {
        self.read(&self.front, |bytes, client| {
            let upstream = self.upstream(client);
            self.take(Way::In, bytes, &upstream.socket, self.gateway);
        });
    }

    fn read_upstream(self: &Arc<Self>, upstream: &Upstream, client: SocketAddr) {
        self.read(&upstream.socket, |bytes, _| {
            if upstream.mapped.load(Ordering::SeqCst) {
                self.take(Way::Out, bytes, &self.front, client);
            }
        });
    }

    fn read(&self, socket: &UdpSocket, mut each: impl FnMut(&[u8], SocketAddr)) {
        let mut buffer = vec![0; DATAGRAM_BYTES];
        while !self.ended.load(Ordering::SeqCst) {
            match socket.recv_from(&mut buffer) {
                Ok((count, from)) => each(&buffer[..count], from),
                Err(error) if is_passing(error.kind()) => {}
                Err(error) => panic!("the relay cannot receive: {error}"),
            }
        }
    }

    /// The client's mapping; a new one when it has none.
    fn upstream(self: &Arc<Self>, client: SocketAddr) -> Upstream {
        let mut upstreams = self.upstreams.lock().unwrap();
        let new = || {
            let own = SocketAddr::new(self.front.local_addr().unwrap().ip(), 0);
            let upstream = Upstream { socket: Arc::new(open(own)), mapped: Arc::new(AtomicBool::new(true)) };
            let reading = upstream.clone();
            self.readers.lock().unwrap().push(spawn(self, move |shared| shared.read_upstream(&reading, client)));
            upstream
        };
        upstreams.entry(client).or_insert_with(new).clone()
    }

    /// A datagram enters the link, or is lost.
    fn take(&self, way: Way, bytes: &[u8], by: &Arc<UdpSocket>, to: SocketAddr) {
        if self.cut.load(Ordering::SeqCst) {
            return;
        }
        let line = &self.lines[way as usize];
        let mut queue = line.queue.lock().unwrap();
        if let Some(due) = queue.admit(bytes.len(), Instant::now(), &self.conditions) {
            queue.datagrams.push_back(Datagram { due, bytes: bytes.to_vec(), by: Arc::clone(by), to });
            line.arrived.notify_one();
        }
    }

    fn deliver(&self, way: Way) {
        let line = &self.lines[way as usize];
        while !self.ended.load(Ordering::SeqCst) {
            let Some(datagram) = line.next() else { continue };
            // What was on its way is lost too. A gateway that is down does not take anything.
            if self.cut.load(Ordering::SeqCst) {
                continue;
            }
            // Counted by when somebody can have it.
            let bytes = datagram.bytes.len() as u64;
            line.forwarded_bytes.fetch_add(bytes, Ordering::SeqCst);
            if datagram.by.send_to(&datagram.bytes, datagram.to).is_err() {
                line.forwarded_bytes.fetch_sub(bytes, Ordering::SeqCst);
            }
        }
    }
}

impl Line {
    fn new(random: Random) -> Self {
        let queue = Queue { datagrams: VecDeque::new(), bytes: 0, idle_from: Instant::now(), random };
        Self { queue: Mutex::new(queue), arrived: Condvar::new(), forwarded_bytes: AtomicU64::new(0) }
    }

    /// The next datagram once it is due; nothing when it is time to look around.
    fn next(&self) -> Option<Datagram> {
        let mut queue = self.queue.lock().unwrap();
        let wait = queue.datagrams.front().map_or(LOOK, |first| first.due.saturating_duration_since(Instant::now()).min(LOOK));
        if !wait.is_zero() {
            queue = self.arrived.wait_timeout(queue, wait).unwrap().0;
        }
        let now = Instant::now();
        queue.datagrams.front().filter(|first| first.due <= now)?;
        let datagram = queue.datagrams.pop_front()?;
        queue.bytes -= datagram.bytes.len();
        Some(datagram)
    }
}

impl Queue {
    /// When a datagram arrives at the other end; never when it is lost, or when the queue is full.
    fn admit(&mut self, count: usize, now: Instant, conditions: &Conditions) -> Option<Instant> {
        let lost = conditions.lost_per_million != 0 && self.random.below(1_000_000) < conditions.lost_per_million;
        let begin = self.idle_from.max(now);
        let full = begin - now > QUEUE || self.bytes + count > QUEUE_BYTES;
        if lost || full {
            return None;
        }
        let bits = 8 * count as u64;
        let sending = conditions.bits_per_second.map_or(Duration::ZERO, |rate| Duration::from_nanos(bits * 1_000_000_000 / rate));
        self.idle_from = begin + sending;
        self.bytes += count;
        Some(self.idle_from + conditions.delay)
    }
}

/// Nothing came, the process stood still for a while (signal(7)), or an ICMP message told of a gateway that is down.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted | ErrorKind::ConnectionRefused)
}

fn open(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("the relay cannot have {address}: {error}"));
    socket.set_read_timeout(Some(LOOK)).unwrap();
    // Small buffers cost throughput only.
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &SOCKET_BYTES);
    socket
}

fn spawn(shared: &Arc<Shared>, run: impl FnOnce(&Arc<Shared>) + Send + 'static) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || run(&shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: &str = "127.0.0.1:0";
    /// Long enough for what must not come.
    const SILENCE: Duration = Duration::from_millis(500);

    fn socket() -> UdpSocket {
        let socket = UdpSocket::bind(ANY).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }

    /// A gateway, and a relay in front of it.
    fn pair(conditions: Conditions) -> (UdpSocket, Relay) {
        let gateway = socket();
        let relay = Relay::start(ANY.parse().unwrap(), gateway.local_addr().unwrap(), conditions);
        (gateway, relay)
    }

    fn delayed(milliseconds: u64) -> Conditions {
        Conditions { delay: Duration::from_millis(milliseconds), ..Conditions::default() }
    }

    fn received(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = vec![0; DATAGRAM_BYTES];
        let (count, from) = socket.recv_from(&mut buffer).unwrap();
        buffer.truncate(count);
        (buffer, from)
    }

    #[track_caller]
    fn gets_nothing(socket: &UdpSocket) {
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        let got = socket.recv_from(&mut [0; 64]);
        assert!(got.is_err(), "{got:?}");
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }

    #[test]
    fn a_relay_carries_datagrams_both_ways_and_counts_them() {
        let (gateway, relay) = pair(Conditions::default());
        let clients = [socket(), socket()];
        let mut seen = Vec::new();
        for (index, client) in (0_u8..).zip(&clients) {
            client.send_to(&[index; 6500], relay.address()).unwrap();
            let (bytes, from) = received(&gateway);
            assert_eq!(bytes, [index; 6500]);
            seen.push(from);
        }
        assert_ne!(seen[0], seen[1], "one client is one address");
        for (client, from) in clients.iter().zip(seen) {
            gateway.send_to(from.to_string().as_bytes(), from).unwrap();
            assert_eq!(received(client), (from.to_string().into_bytes(), relay.address()));
        }
        assert_eq!(relay.forwarded_bytes(Way::In), 13_000);
        assert_ne!(relay.forwarded_bytes(Way::Out), 0);
    }

    #[test]
    fn a_cut_link_loses_both_ways_also_what_is_on_its_way() {
        let (gateway, relay) = pair(delayed(250));
        let client = socket();
        client.send_to(b"before", relay.address()).unwrap();
        let (_, at) = received(&gateway);
        client.send_to(b"on its way", relay.address()).unwrap();
        gateway.send_to(b"on its way", at).unwrap();
        relay.cut();
        client.send_to(b"lost", relay.address()).unwrap();
        gateway.send_to(b"lost", at).unwrap();
        gets_nothing(&gateway);
        gets_nothing(&client);
        assert_eq!((relay.forwarded_bytes(Way::In), relay.forwarded_bytes(Way::Out)), (6, 0));
        relay.restore();
        client.send_to(b"after", relay.address()).unwrap();
        assert_eq!(received(&gateway), (b"after".to_vec(), at), "a cut is no rebinding");
        gateway.send_to(b"after", at).unwrap();
        assert_eq!(received(&client).0, b"after");
    }

    #[test]
    fn after_a_rebinding_a_client_has_another_address_and_answers_to_the_old_one_are_lost() {
        let (gateway, relay) = pair(Conditions::default());
        let client = socket();
        client.send_to(b"before", relay.address()).unwrap();
        let (_, before) = received(&gateway);
        relay.rebind();
        gateway.send_to(b"to the old address", before).unwrap();
        gets_nothing(&client);
        client.send_to(b"after", relay.address()).unwrap();
        let (_, after) = received(&gateway);
        assert_ne!(before, after);
        gateway.send_to(b"to the old address", before).unwrap();
        gateway.send_to(b"to the new address", after).unwrap();
        assert_eq!(received(&client).0, b"to the new address");
        gets_nothing(&client);
    }

    #[test]
    fn a_datagram_is_never_earlier_than_the_delay_and_the_order_stays() {
        let (gateway, relay) = pair(delayed(30));
        let client = socket();
        let start = Instant::now();
        for index in 0_u8..50 {
            client.send_to(&[index], relay.address()).unwrap();
        }
        for index in 0_u8..50 {
            assert_eq!(received(&gateway).0, [index]);
        }
        assert!(start.elapsed() >= Duration::from_millis(30), "{:?}", start.elapsed());
    }

    /// What a queue makes of datagrams that come at these milliseconds: when each arrives.
    fn admitted(conditions: Conditions, bytes: usize, at: impl IntoIterator<Item = u64>) -> Vec<Option<u64>> {
        let line = Line::new(Random(conditions.seed));
        let start = Instant::now();
        let mut queue = line.queue.lock().unwrap();
        let mut arrival = |at| queue.admit(bytes, start + Duration::from_millis(at), &conditions);
        let since = |due: Instant| u64::try_from(due.duration_since(start).as_millis()).unwrap();
        at.into_iter().map(|at| arrival(at).map(since)).collect()
    }

    #[test]
    fn a_rate_spaces_datagrams_and_a_full_queue_drops_the_last() {
        // A thousand bytes take 10 ms.
        let slow = Conditions { bits_per_second: Some(800_000), ..delayed(100) };
        assert_eq!(admitted(slow, 1000, [0, 0, 5, 90]), [Some(110), Some(120), Some(130), Some(200)]);
        let burst = admitted(slow, 1000, [0; 20]);
        assert_eq!(burst.iter().flatten().count(), 6, "{burst:?}");
        assert!(burst[..6].iter().all(Option::is_some), "the last ones are dropped: {burst:?}");
    }

    #[test]
    fn as_many_are_lost_as_asked_and_the_seed_says_which() {
        let lossy = |seed| Conditions { lost_per_million: 100_000, seed, ..Conditions::default() };
        let lost = |seed| admitted(lossy(seed), 1, 0..10_000).iter().map(Option::is_none).collect::<Vec<_>>();
        let count = lost(7).iter().filter(|lost| **lost).count();
        assert!((900..1100).contains(&count), "{count} of 10000 with a tenth lost");
        assert_eq!(lost(7), lost(7));
        assert_ne!(lost(7), lost(8));
    }
}
