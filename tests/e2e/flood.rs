//! A crowd of strangers who begin handshakes and never go on, from addresses that nobody answers at.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::gateway::{A, B};
use crate::lab::Setup;
use crate::random::number;
use crate::soak::Sample;
use crate::stranger;

/// Handshakes that differ; more would only take longer to make.
const INITIALS: usize = 500;
/// Addresses that they come from, each in a network of its own.
const ADDRESSES: u8 = 200;
/// What strangers may cost a gateway.
const GROWTH_KIB: u64 = 32 << 10;

/// Keeps what is sent, and brings nothing.
#[derive(Debug, Default)]
struct Kept(Mutex<Vec<Vec<u8>>>);

#[derive(Debug)]
struct Writable;

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Kept {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.lock().unwrap().push(transmit.contents.to_vec());
        Ok(())
    }

    fn poll_recv(&self, _: &mut Context<'_>, _: &mut [IoSliceMut<'_>], _: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(([127, 0, 0, 1], 1).into())
    }
}

/// First datagrams of handshakes, each good in itself.
fn initials(target: SocketAddr) -> Vec<Vec<u8>> {
    let kept = Arc::new(Kept::default());
    stranger::runtime().block_on(async {
        let socket = Arc::clone(&kept);
        let endpoint =
            quinn::Endpoint::new_with_abstract_socket(quinn::EndpointConfig::default(), None, socket, Arc::new(quinn::TokioRuntime))
                .unwrap();
        let mut begun = Vec::new();
        for _ in 0..INITIALS {
            // To any of the gateway's sockets.
            begun.push(endpoint.connect_with(stranger::client(None, None), target, "gateway.test").unwrap());
            tokio::task::yield_now().await;
        }
        while kept.0.lock().unwrap().len() < INITIALS {
            tokio::task::yield_now().await;
        }
        std::mem::take(&mut *kept.0.lock().unwrap())
    })
}

/// What went to and fro.
#[derive(Debug, Default, Clone, Copy)]
struct Counted {
    datagrams: u64,
    sent_bytes: u64,
    answered_bytes: u64,
}

struct Flood {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Counted>,
}

impl Flood {
    fn start(target: SocketAddr, datagrams_per_second: u64) -> Self {
        let over = Arc::<AtomicBool>::default();
        let ends = Arc::clone(&over);
        let datagrams = initials(target);
        let bound = |network| UdpSocket::bind((std::net::Ipv4Addr::new(127, 1, network, 1), 0)).unwrap();
        let sockets: Vec<UdpSocket> = (0..ADDRESSES).map(bound).collect();
        sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
        let thread = std::thread::spawn(move || {
            let (mut counted, began) = (Counted::default(), Instant::now());
            let mut answer = [0; 2048];
            let mut pairs = sockets.iter().cycle().zip(datagrams.iter().cycle());
            while !ends.load(Ordering::Relaxed) {
                let due = u64::try_from(began.elapsed().as_millis()).unwrap() * datagrams_per_second / 1000;
                for (socket, datagram) in pairs.by_ref().take(due.saturating_sub(counted.datagrams) as usize) {
                    counted.datagrams += 1;
                    // A full buffer loses it, as a network would.
                    counted.sent_bytes += socket.send_to(datagram, target).unwrap_or(0) as u64;
                    while let Ok(bytes) = socket.recv(&mut answer) {
                        counted.answered_bytes += bytes as u64;
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            // The last answers.
            std::thread::sleep(Duration::from_millis(200));
            for socket in &sockets {
                while let Ok(bytes) = socket.recv(&mut answer) {
                    counted.answered_bytes += bytes as u64;
                }
            }
            counted
        });
        Self { over, thread }
    }

    fn end(self) -> Counted {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn a_flood_of_strangers_costs_neither_memory_nor_the_guest() {
    let memory_mib = number("SEALANE_FLOOD_MEMORY_MIB").unwrap_or(32);
    let lab = Setup::new().shape(|shape| shape.memory = format!("{memory_mib}MiB").leak()).start();
    let there_and_back = || [A, B].map(|from| lab.migrate(from, &[]).expect_moved()["duration_seconds"].as_f64().unwrap());
    there_and_back();
    let without = there_and_back();
    let before = Sample::of(&lab, B).rss_kib;
    let rate = number("SEALANE_FLOOD").unwrap_or(2000);
    let flood = Flood::start(lab.address(B).parse().unwrap(), rate);
    std::thread::sleep(Duration::from_secs(1));
    let with = there_and_back();
    let after = Sample::of(&lab, B).rss_kib;
    let Counted { datagrams, sent_bytes, answered_bytes } = flood.end();
    println!(
        "flood: {datagrams} datagrams at {rate}/s, {sent_bytes} bytes sent, {answered_bytes} answered; \
         a migration of {memory_mib} MiB there and back took {without:?} s without and {with:?} s with it; gw-b {before} to {after} KiB"
    );
    assert!(datagrams > 500 && answered_bytes > 0, "that was no flood");
    assert!(answered_bytes <= 3 * sent_bytes, "whoever forges an address has it sent more than that");
    assert!(after.saturating_sub(before) <= GROWTH_KIB, "{before} KiB before, {after} KiB after");
    lab.gateway(B).audit_verifies();
    lab.settled_on(A);
}
