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
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// Issues connection IDs that lead back to one socket of the group: its index, what nobody can guess, and what only we can make of both.
#[derive(Debug)]
pub(super) struct SteeredIds {
    pub(super) socket: u8,
}

const ISSUED_BYTES: usize = 8;

impl SteeredIds {
    /// A factory for [`quinn::EndpointConfig::cid_generator`].
    pub(super) fn factory(socket: u8) -> impl Fn() -> Box<dyn ConnectionIdGenerator> + Send + Sync + 'static {
        move || Box::new(Self { socket })
    }

    /// Whether it is of a connection, of whichever socket. Whoever has one was answered.
    pub(super) fn has_issued(id: &[u8]) -> bool {
        <[u8; ISSUED_BYTES]>::try_from(id).is_ok_and(|id| id == signed(id))
    }

    /// One for whoever has to come again: it leads here, and is of no connection.
    pub(super) fn passing(&self) -> ConnectionId {
        let mut id = unpredictable();
        id[0] = self.socket;
        ConnectionId::new(&id)
    }
}

/// The same beginning with what only we can make of it.
fn signed(mut id: [u8; ISSUED_BYTES]) -> [u8; ISSUED_BYTES] {
    let [beginning @ .., _, _, _, _] = id;
    let [mac @ .., _, _, _, _] = KEYS.hash_one(beginning).to_le_bytes();
    id[4..].copy_from_slice(&mac);
    id
}

impl ConnectionIdGenerator for SteeredIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = unpredictable();
        id[0] = self.socket;
        ConnectionId::new(&signed(id))
    }

    fn cid_len(&self) -> usize {
        ISSUED_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Bytes that nobody outside can guess: SipHash of a counter under keys from the system's random source.
/// Connection IDs need to be unlinkable, not secret.
fn unpredictable() -> [u8; 8] {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    KEYS.hash_one(COUNTER.fetch_add(1, Ordering::Relaxed)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    fn group(workers: u8) -> SocketGroup {
        SocketGroup::bind("127.0.0.1:0".parse().unwrap(), workers, 1 << 20).unwrap()
    }

    /// Which socket of the group gets `payload` from a sender that nobody has seen before.
    fn receiver(group: &SocketGroup, payload: &[u8]) -> usize {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(payload, group.session.local_addr().unwrap()).unwrap();
        let sockets: Vec<_> = std::iter::once(&group.session).chain(&group.workers).collect();
        let mut buffer = [0; 64];
        for _ in 0..10_000 {
            for (index, socket) in sockets.iter().enumerate() {
                match socket.recv(&mut buffer) {
                    Ok(_) => return index,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            std::thread::yield_now();
        }
        panic!("nobody got it");
    }

    fn short(byte: u8) -> Vec<u8> {
        vec![0x40, byte, 9, 9, 9, 9, 9, 9, 9, 9]
    }

    fn long(byte: u8) -> Vec<u8> {
        vec![0xc0, 0, 0, 0, 1, 8, byte, 9, 9, 9, 9, 9, 9, 9]
    }

    #[test]
    fn the_first_byte_of_the_connection_id_picks_the_socket_whoever_sends() {
        for workers in [1, 3, 4] {
            let group = group(workers);
            for byte in [0, 1, 2, 3, 4, 5, 100, 254, 255] {
                let expected = if byte == 0 { 0 } else { 1 + usize::from(byte - 1) % usize::from(workers) };
                for packet in [short(byte), long(byte)] {
                    assert_eq!(receiver(&group, &packet), expected, "{workers} workers, byte {byte}");
                    assert_eq!(receiver(&group, &packet), expected, "{workers} workers, byte {byte}, again");
                }
            }
        }
    }

    #[test]
    fn what_is_no_quic_packet_goes_to_the_session_socket() {
        let group = group(3);
        for packet in [&[0x40][..], &[0xc0, 0, 0, 0, 1], &[0xff; 6]] {
            assert_eq!(receiver(&group, packet), 0, "{packet:?}");
        }
    }

    #[test]
    fn connection_ids_lead_back_to_the_socket_that_issued_them() {
        let group = group(4);
        for socket in 0..=4 {
            let mut ids = SteeredIds { socket };
            let (first, second) = (ids.generate_cid(), ids.generate_cid());
            assert_ne!(first, second);
            assert_eq!(first.len(), ids.cid_len());
            assert_eq!(receiver(&group, &[&[0x40], &first[..]].concat()), usize::from(socket));
        }
    }

    #[test]
    fn an_id_of_a_connection_is_known_and_no_other() {
        for socket in 0..=4 {
            let mut ids = SteeredIds { socket };
            let id = ids.generate_cid();
            assert!(SteeredIds::has_issued(&id));
            assert!(!SteeredIds::has_issued(&ids.passing()) && ids.passing()[0] == socket);
            for at in 0..id.len() {
                let mut changed = id.to_vec();
                changed[at] ^= 1;
                assert!(!SteeredIds::has_issued(&changed) && !SteeredIds::has_issued(&id[..at]), "byte {at}");
            }
            assert!(!SteeredIds::has_issued(&[&id[..], &[0]].concat()));
        }
    }

    #[test]
    fn lanes_of_a_migration_get_consecutive_workers_and_never_the_session_socket() {
        for first in 0..=255 {
            let bytes: Vec<u8> = (0..16).map(|lane| lane_byte(MigrationId([first; 16]), LaneIndex(lane))).collect();
            assert!(bytes.iter().all(|byte| *byte != SESSION_BYTE));
            assert!(bytes.windows(2).all(|pair| pair[1] == pair[0] + 1), "{bytes:?}");
        }
    }

    #[test]
    fn a_second_gateway_cannot_join_the_group_by_accident() {
        let group = group(2);
        let address = group.session.local_addr().unwrap();
        assert_eq!(SocketGroup::bind(address, 2, 1 << 20).unwrap_err().kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn every_socket_has_the_one_port() {
        let group = group(4);
        let address = group.session.local_addr().unwrap();
        assert!(group.workers.iter().all(|worker| worker.local_addr().unwrap() == address));
    }
}
