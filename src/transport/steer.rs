//! One UDP port, several sockets: every datagram goes to the thread that owns its connection.
//!
//! The sockets form one `SO_REUSEPORT` group. A classic BPF program reads the first byte of the
//! destination connection ID and picks the socket, so the choice does not depend on the sender's
//! address:
//!
//! | first byte | socket |
//! |---|---|
//! | 0, or no QUIC packet | 0, the session socket |
//! | b > 0 | 1 + (b - 1) mod workers |
//!
//! Connection IDs that we issue begin with the index of their socket. A client chooses the byte of
//! its very first packets, knowing nothing of the number of workers.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::LazyLock;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::{ConnectionId, ConnectionIdGenerator};
use socket2::{Domain, Protocol, Socket, Type};

use crate::types::{LaneIndex, MigrationId};

/// First byte of the connection IDs of sessions.
pub(super) const SESSION_BYTE: u8 = 0;

/// The sockets of one listening port, in the order of the group: the session's, then the workers'.
#[derive(Debug)]
pub(super) struct SocketGroup {
    pub(super) session: UdpSocket,
    pub(super) workers: Vec<UdpSocket>,
}

impl SocketGroup {
    /// Binds `1 + workers` sockets to one address and steers datagrams among them.
    pub(super) fn bind(address: SocketAddr, workers: u8, buffer_bytes: usize) -> io::Result<Self> {
        // WHY: the first bind is exclusive. With SO_REUSEPORT from the start, a second gateway of the same
        // user would silently join the group and take a share of our datagrams.
        let session = open(address, buffer_bytes)?;
        session.bind(&address.into())?;
        setsockopt(&session, sockopt::ReusePort, &true)?;
        let bound = session.local_addr()?;
        let mut members = Vec::with_capacity(workers.into());
        for _ in 0..workers {
            let member = open(address, buffer_bytes)?;
            setsockopt(&member, sockopt::ReusePort, &true)?;
            member.bind(&bound)?;
            members.push(member.into());
        }
        attach(&session, &program(workers))?;
        Ok(Self { session: session.into(), workers: members })
    }
}

/// An unbound socket for `address`, non-blocking, with large buffers, IPv6 also for IPv4 peers.
fn open(address: SocketAddr, buffer_bytes: usize) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    enlarge_buffers(&socket, buffer_bytes);
    Ok(socket)
}

/// A socket on a free port, for connections that we open to `peer`.
pub(super) fn client_socket(peer: SocketAddr, buffer_bytes: usize) -> io::Result<UdpSocket> {
    let any: SocketAddr = match peer {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = open(any, buffer_bytes)?;
    socket.bind(&any.into())?;
    Ok(socket.into())
}

/// As large as asked with `CAP_NET_ADMIN`, otherwise as large as `rmem_max` and `wmem_max` allow.
/// Small buffers cost throughput, not correctness, so a refusal is not an error.
fn enlarge_buffers(socket: &Socket, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = socket.set_recv_buffer_size(bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _ = socket.set_send_buffer_size(bytes);
    }
}

/// The steering program. The kernel hands it the UDP payload; a load past its end returns 0.
fn program(workers: u8) -> Vec<libc::sock_filter> {
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const JUMP_IF_BITS: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
    const SUBTRACT: u32 = libc::BPF_ALU | libc::BPF_SUB | libc::BPF_K;
    const MODULO: u32 = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
    const ADD: u32 = libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K;
    const RETURN_A: u32 = libc::BPF_RET | libc::BPF_A;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt, jf, k };
    vec![
        op(LOAD_BYTE, 0, 0, 0),
        op(JUMP_IF_BITS, 0, 2, 0x80),
        // Long header: flags, four bytes of version, length, then the destination connection ID.
        op(LOAD_BYTE, 0, 0, 6),
        op(JUMP, 0, 0, 1),
        // Short header: flags, then the destination connection ID.
        op(LOAD_BYTE, 0, 0, 1),
        op(JUMP_IF_EQUAL, 0, 1, u32::from(SESSION_BYTE)),
        op(RETURN, 0, 0, 0),
        op(SUBTRACT, 0, 0, 1),
        op(MODULO, 0, 0, u32::from(workers.max(1))),
        op(ADD, 0, 0, 1),
        op(RETURN_A, 0, 0, 0),
    ]
}

fn attach(socket: &Socket, program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    // The kernel copies the program; it does not write through this pointer.
    let filter = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    setsockopt(socket, sockopt::AttachReusePortCbpf, &filter)?;
    Ok(())
}

/// The byte that leads the first packets of a lane. Lanes of one migration get consecutive workers,
/// and different migrations begin at different ones.
pub(super) fn lane_byte(migration: MigrationId, lane: LaneIndex) -> u8 {
    let first = migration.0[0] % 200;
    let lane = u8::try_from(lane.0 % 32).unwrap_or(0);
    1 + first + lane
}

/// The destination connection ID of a connection's first packets.
pub(super) fn initial_connection_id(first_byte: u8) -> ConnectionId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&unpredictable());
    id[8..].copy_from_slice(&unpredictable());
    id[0] = first_byte;
    ConnectionId::new(&id)
}

/// Issues connection IDs that lead back to one socket of the group.
#[derive(Debug)]
pub(super) struct SteeredIds {
    pub(super) socket: u8,
}

impl SteeredIds {
    /// A factory for [`quinn::EndpointConfig::cid_generator`].
    pub(super) fn factory(socket: u8) -> impl Fn() -> Box<dyn ConnectionIdGenerator> + Send + Sync + 'static {
        move || Box::new(Self { socket })
    }
}

impl ConnectionIdGenerator for SteeredIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = unpredictable();
        id[0] = self.socket;
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Bytes that nobody outside can guess: SipHash of a counter under keys from the system's random source.
/// Connection IDs need to be unlinkable, not secret.
fn unpredictable() -> [u8; 8] {
    static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    KEYS.hash_one(COUNTER.fetch_add(1, Ordering::Relaxed)).to_le_bytes()
}
