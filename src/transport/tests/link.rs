//! A NAT between two gateways: one port inside, changing addresses outside, and a cable that can be cut.

use std::collections::{BTreeSet, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Clone)]
pub(super) struct Link {
    state: Arc<State>,
    pub(super) address: SocketAddr,
}

struct State {
    inside: UdpSocket,
    listener: SocketAddr,
    outside: Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>,
    cut: AtomicBool,
    deaf: AtomicBool,
    forwarded: AtomicUsize,
    /// Datagrams that came from clients, and from the listener, and which of them get lost.
    towards: Lossy,
    back: Lossy,
    ended: AtomicBool,
}

impl Link {
    /// Forwards to `listener`, the one port that it knows.
    pub(super) fn to(listener: SocketAddr) -> Self {
        let inside = socket();
        let address = inside.local_addr().unwrap();
        let state = Arc::new(State {
            inside,
            listener,
            outside: Mutex::default(),
            cut: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            forwarded: AtomicUsize::new(0),
            towards: Lossy::default(),
            back: Lossy::default(),
            ended: AtomicBool::new(false),
        });
        let forward = Arc::clone(&state);
        std::thread::spawn(move || forward.outwards());
        Self { state, address }
    }

    /// From now on nothing passes in either direction.
    pub(super) fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
    }

    /// From now on nothing passes back to the client.
    pub(super) fn deafen(&self) {
        self.state.deaf.store(true, Ordering::SeqCst);
    }

    /// Gives every client another address outside.
    pub(super) fn renumber(&self) {
        self.state.outside.lock().unwrap().clear();
    }

    /// Loses the datagrams of clients with these numbers, the first being 0.
    pub(super) fn lose(&self, numbers: impl IntoIterator<Item = usize>) {
        self.state.towards.lost.lock().unwrap().extend(numbers);
    }

    /// Loses the datagrams of the listener with these numbers.
    pub(super) fn lose_back(&self, numbers: impl IntoIterator<Item = usize>) {
        self.state.back.lost.lock().unwrap().extend(numbers);
    }

    pub(super) fn forwarded(&self) -> usize {
        self.state.forwarded.load(Ordering::SeqCst)
    }

    pub(super) fn end(&self) {
        self.state.ended.store(true, Ordering::SeqCst);
    }
}

/// A direction in which chosen datagrams get lost.
#[derive(Default)]
struct Lossy {
    seen: AtomicUsize,
    lost: Mutex<BTreeSet<usize>>,
}

impl Lossy {
    fn loses(&self) -> bool {
        let number = self.seen.fetch_add(1, Ordering::SeqCst);
        self.lost.lock().unwrap().contains(&number)
    }
}

impl State {
    fn outwards(self: Arc<Self>) {
        let mut buffer = [0; 65_536];
        while !self.ended.load(Ordering::SeqCst) {
            let Ok((count, client)) = self.inside.recv_from(&mut buffer) else { continue };
            if self.towards.loses() || self.cut.load(Ordering::SeqCst) {
                continue;
            }
            let outside = Arc::clone(self.outside.lock().unwrap().entry(client).or_insert_with(|| self.open(client)));
            let _ = outside.send_to(&buffer[..count], self.listener);
            self.forwarded.fetch_add(1, Ordering::SeqCst);
        }
        self.outside.lock().unwrap().clear();
    }

    fn open(self: &Arc<Self>, client: SocketAddr) -> Arc<UdpSocket> {
        let outside = Arc::new(socket());
        let (state, back) = (Arc::clone(self), Arc::clone(&outside));
        std::thread::spawn(move || state.inwards(client, &back));
        outside
    }

    /// Ends when the client has another address, as a NAT forgets a mapping.
    fn inwards(&self, client: SocketAddr, outside: &Arc<UdpSocket>) {
        let mut buffer = [0; 65_536];
        while self.outside.lock().unwrap().get(&client).is_some_and(|current| Arc::ptr_eq(current, outside)) {
            let Ok((count, _)) = outside.recv_from(&mut buffer) else {
                if self.ended.load(Ordering::SeqCst) {
                    return;
                }
                continue;
            };
            if !self.back.loses() && !self.cut.load(Ordering::SeqCst) && !self.deaf.load(Ordering::SeqCst) {
                let _ = self.inside.send_to(&buffer[..count], client);
            }
        }
    }
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    socket
}
