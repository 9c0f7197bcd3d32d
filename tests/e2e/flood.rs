//! A crowd of strangers who begin handshakes and never go on, from addresses that nobody answers at.
//!
//! How much of a long migration's throughput a flood takes, and how much of that is only whoever floods, who needs processor time of the
//! same machine:
//!
//! ```text
//! SEALANE_FLOOD=10000 SEALANE_FLOOD_RUNS=5 SEALANE_FLOOD_MEMORY_MIB=2048 [SEALANE_FLOOD_BANDWIDTH=96MiB/s] \
//!   [SEALANE_PROGRAM=target/release/sealane] cargo test --test e2e -- --nocapture flood::
//! ```

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
use crate::guest::{Kind, Shape};
use crate::lab::{Lab, Setup};
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

/// What went to and fro, and the processor time that it took the crowd.
#[derive(Debug, Default, Clone, Copy)]
struct Counted {
    datagrams: u64,
    sent_bytes: u64,
    answered_bytes: u64,
    cpu_seconds: f64,
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
            let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            counted.cpu_seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
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

/// Whom the crowd calls on while a guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Nobody,
    /// A socket that takes datagrams and is not read: what it costs to be a crowd.
    Sink,
    Gateway,
}

const ALL: [At; 3] = [At::Nobody, At::Sink, At::Gateway];

/// One guest there and back, with a crowd or without.
#[derive(Debug)]
struct Moves {
    at: At,
    /// How long each way took, and processor time of both gateways in it.
    seconds: [f64; 2],
    cpu_seconds: [[f64; 2]; 2],
    crowd: Option<(Counted, f64)>,
}

struct Measured {
    lab: Lab,
    rate: u64,
    flags: Vec<String>,
    sink: UdpSocket,
}

impl Measured {
    fn there_and_back(&self, at: At) -> Moves {
        let target = match at {
            At::Nobody => None,
            At::Sink => Some(self.sink.local_addr().unwrap()),
            At::Gateway => Some(self.lab.address(B).parse().unwrap()),
        };
        let flood = target.map(|target| (Flood::start(target, self.rate), Instant::now()));
        std::thread::sleep(Duration::from_millis(if flood.is_some() { 1000 } else { 0 }));
        let flags: Vec<_> = self.flags.iter().map(String::as_str).collect();
        let moved = [A, B].map(|from| {
            let before = self.cpu_seconds();
            let seconds = self.lab.migrate(from, &flags).expect_moved()["duration_seconds"].as_f64().unwrap();
            let after = self.cpu_seconds();
            (seconds, [0, 1].map(|gateway| after[gateway] - before[gateway]))
        });
        let crowd = flood.map(|(flood, began)| (flood.end(), began.elapsed().as_secs_f64()));
        Moves { at, seconds: moved.map(|(seconds, _)| seconds), cpu_seconds: moved.map(|(_, cpu)| cpu), crowd }
    }

    /// Processor time of both gateways until now.
    fn cpu_seconds(&self) -> [f64; 2] {
        [A, B].map(|name| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.lab.gateway(name).process_id())).unwrap();
            // Behind the name in brackets: user time is the twelfth field, system time the next, in hundredths.
            let fields = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
            fields.map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
        })
    }
}

impl Moves {
    fn say(&self) {
        let [there, back] = [0, 1].map(|way| {
            let [a, b] = self.cpu_seconds[way];
            format!("{:.2} s (gw-a {a:.2}, gw-b {b:.2} s of processor)", self.seconds[way])
        });
        let crowd = self.crowd.map_or_else(String::new, |(counted, seconds)| {
            let Counted { datagrams, sent_bytes, answered_bytes, cpu_seconds } = counted;
            format!(
                "; {:.0} datagrams/s, {sent_bytes} bytes sent, {answered_bytes} answered, the crowd took {:.1} % of a processor",
                datagrams as f64 / seconds,
                100.0 * cpu_seconds / seconds
            )
        });
        println!("flood at {:?}: there {there}, back {back}{crowd}", self.at);
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

#[test]
fn a_flood_of_strangers_costs_neither_memory_nor_the_guest() {
    let memory_mib = number("SEALANE_FLOOD_MEMORY_MIB");
    let setup = Setup::new().shape(|shape| match memory_mib {
        None => {}
        // All of it has contents, and nearly all of it stays as it is.
        Some(mib) => *shape = Shape { kind: Kind::Synthetic, memory: format!("{mib}MiB").leak(), ..*shape },
    });
    let bandwidth = std::env::var("SEALANE_FLOOD_BANDWIDTH").ok();
    let mut flags = vec!["--compress".to_owned(), "none".to_owned()];
    flags.extend(bandwidth.iter().flat_map(|rate| ["--bandwidth".to_owned(), rate.clone()]));
    let (rate, runs) = (number("SEALANE_FLOOD").unwrap_or(2000), number("SEALANE_FLOOD_RUNS").unwrap_or(1));
    let measured = Measured { lab: setup.start(), rate, flags, sink: UdpSocket::bind("127.0.0.1:0").unwrap() };
    measured.there_and_back(At::Nobody);
    let before = Sample::of(&measured.lab, B).own_kib;
    let mut all = Vec::new();
    let mut order = ALL;
    for _ in 0..runs {
        for at in order {
            let moves = measured.there_and_back(at);
            moves.say();
            all.push(moves);
        }
        order.rotate_left(1);
    }
    let after = Sample::of(&measured.lab, B).own_kib;
    for (way, name) in ["there", "back"].into_iter().enumerate() {
        let of = |at| median(all.iter().filter(|moves| moves.at == at).map(|moves| moves.seconds[way]).collect());
        let [nobody, sink, gateway] = ALL.map(of);
        let more = |than: f64| 100.0 * (gateway / than - 1.0);
        println!(
            "flood of {rate}/s, {runs} runs, {name}: median {nobody:.2} s without, {sink:.2} s beside a sink, {gateway:.2} s: \
             {:.1} % longer than without, {:.1} % longer than beside a sink",
            more(nobody),
            more(sink)
        );
    }
    println!("flood: gw-b {before} to {after} KiB of its own");
    for (crowd, _) in all.iter().filter(|moves| moves.at == At::Gateway).filter_map(|moves| moves.crowd) {
        assert!(crowd.datagrams > 500 && crowd.answered_bytes > 0, "that was no flood: {crowd:?}");
        assert!(crowd.answered_bytes <= 3 * crowd.sent_bytes, "whoever forges an address has it sent more than that: {crowd:?}");
    }
    assert!(after.saturating_sub(before) <= GROWTH_KIB, "{before} KiB before, {after} KiB after");
    measured.lab.gateway(B).audit_verifies();
    measured.lab.settled_on(A);
}
