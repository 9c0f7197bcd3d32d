//! A UDP socket as QUIC sees it: how large its datagrams may be, and how many of them go through the kernel at once.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime as _, TokioRuntime, UdpPoller};
use rustix::net::sockopt;

use super::doorstep::{Doorstep, Greeting};
use super::gather::Gathering;

/// The largest UDP payload that the route to `peer` carries, as far as this host knows; nothing when it knows no route.
pub(super) fn route_payload(peer: SocketAddr) -> Option<u16> {
    let any: SocketAddr = match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Nothing is sent: connecting makes the kernel look up the route.
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(peer).ok()?;
    let mtu = if peer.is_ipv4() { sockopt::ip_mtu(&socket) } else { sockopt::ipv6_mtu(&socket) };
    Some(u16::try_from(mtu.ok()?).unwrap_or(u16::MAX).saturating_sub(HEADERS_BYTES))
}

/// Drives `socket`, inside a runtime, for whoever only opens connections. Datagrams in both directions have at most as many bytes as
/// `config` lets peers send.
pub(super) fn endpoint(config: quinn::EndpointConfig, socket: UdpSocket) -> io::Result<quinn::Endpoint> {
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    drive(config, None, inner)
}

/// As [`endpoint`], for whoever listens.
pub(super) fn listener(
    config: quinn::EndpointConfig,
    server: quinn::ServerConfig,
    socket: UdpSocket,
    greeting: Greeting,
) -> io::Result<quinn::Endpoint> {
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    drive(config, Some(server), Arc::new(Doorstep::new(inner, greeting)))
}

/// As [`endpoint`], for whoever sends bulk bytes: as many datagrams at once as the kernel takes.
pub(super) fn bulk_endpoint(config: quinn::EndpointConfig, socket: UdpSocket) -> io::Result<quinn::Endpoint> {
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    drive(config, None, Gathering::new(inner, AT_ONCE_BYTES))
}

fn drive(
    config: quinn::EndpointConfig,
    server: Option<quinn::ServerConfig>,
    inner: Arc<dyn AsyncUdpSocket>,
) -> io::Result<quinn::Endpoint> {
    let payload = usize::try_from(config.get_max_udp_payload_size()).unwrap_or(usize::MAX).max(1);
    let (sends, receives) = (AT_ONCE_BYTES / payload, (u16::MAX as usize).div_ceil(payload));
    let socket = Fitted { transmit_segments: inner.max_transmit_segments().min(sends).max(1), receive_segments: receives.max(1), inner };
    quinn::Endpoint::new_with_abstract_socket(config, server, Arc::new(socket), Arc::new(TokioRuntime))
}

/// WHY: QUIC's library sends up to ten datagrams at once whatever their size, and the kernel refuses what has 64 KiB or more. It has
/// buffers for 64 of the largest, and the kernel never gives more than 64 KiB.
struct Fitted {
    inner: Arc<dyn AsyncUdpSocket>,
    transmit_segments: usize,
    receive_segments: usize,
}

impl fmt::Debug for Fitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fitted").field("transmit_segments", &self.transmit_segments).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Fitted {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        // Less when the kernel refused.
        self.inner.max_transmit_segments().min(self.transmit_segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// LIMIT: most bytes that the kernel takes in one send, with room for headers.
const AT_ONCE_BYTES: usize = 65_000;
/// Headers of IPv6 and UDP.
const HEADERS_BYTES: u16 = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_carries_almost_64_kib() {
        let payload = route_payload((Ipv4Addr::LOCALHOST, 9).into());
        assert!(payload.is_some_and(|payload| payload > 1400), "{payload:?}");
    }
}
