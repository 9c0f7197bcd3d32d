//! What can be tuned, and the QUIC configurations made of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, NoneTokenLog, NoneTokenStore, VarInt};

use super::congestion::{Member, RateFactory};
use super::doorstep::TOKEN_LIFETIME;
use super::error::TransportError;
use super::handshake::QUIC_VERSION;
use super::steer::{self, SteeredIds};
use super::tls::QuicTls;
use crate::limits;

/// How this gateway speaks QUIC.
#[derive(Debug, Clone)]
pub struct TransportConfig {
    /// The one UDP address that peers connect to; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Threads, each with its own socket, that receive lanes.
    pub lane_workers: u16,
    /// UDP payload that is tried first.
    pub initial_mtu: u16,
    /// Largest UDP payload that path MTU discovery tries.
    pub mtu_upper_bound: u16,
    /// Silence after which a peer counts as gone.
    pub idle_timeout: Duration,
    /// Pause after which a sign of life is sent.
    pub keep_alive: Duration,
    /// How long a handshake, until the first bytes of the control stream or the join of a lane, may take.
    pub handshake_timeout: Duration,
    /// How long `connect` tries.
    pub connect_timeout: Duration,
    /// Bytes that a peer may have in flight towards us on a lane; less with many lanes.
    pub lane_receive_window_bytes: u32,
    /// Bytes of ours that wait for acknowledgement on a lane; less with many lanes or on a slow path.
    pub lane_send_window_bytes: u32,
    /// Kernel buffers wanted for each lane socket; the kernel may give less.
    pub socket_buffer_bytes: usize,
    /// Packets that a receiver of a lane may collect before it acknowledges.
    pub ack_threshold: u32,
    /// What decides how much may be in flight.
    pub congestion: Congestion,
}

/// What decides how much may be in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// The measured rate of the path; loss of a few percent means nothing.
    #[default]
    Rate,
    /// QUIC's usual one, to compare with: loss halves the rate.
    Cubic,
    /// The BBR that QUIC's library has, to compare with.
    Bbr,
}

impl TransportConfig {
    /// Sensible values for everything but the address.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            listen,
            lane_workers: u16::try_from(cores).unwrap_or(limits::LANES_MAX).min(limits::LANES_MAX),
            // The smallest payload that QUIC requires every path to carry; discovery finds more in a few round trips.
            initial_mtu: 1200,
            mtu_upper_bound: limits::DATAGRAM_BYTES_MAX,
            idle_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(3),
            handshake_timeout: Duration::from_secs(3),
            connect_timeout: Duration::from_secs(10),
            // Two lanes carry 1 Gbit/s over 150 ms. WHY no more: in quinn 0.11 a receiver with more than 1024 gaps in a stream
            // closes the connection. In this window that takes a tenth of all packets lost, each alone.
            lane_receive_window_bytes: 16 << 20,
            lane_send_window_bytes: 16 << 20,
            socket_buffer_bytes: 16 << 20,
            ack_threshold: 10,
            congestion: Congestion::default(),
        }
    }

    /// # Errors
    /// The first value that cannot work.
    pub(super) fn check(&self) -> Result<(), TransportError> {
        let refuse = |field, expected, got: String| Err(TransportError::Config { field, expected, got });
        if !(1..=limits::LANES_MAX).contains(&self.lane_workers) {
            return refuse("lane_workers", "1 to 16", self.lane_workers.to_string());
        }
        if !(1200..=limits::DATAGRAM_BYTES_MAX).contains(&self.initial_mtu) {
            return refuse("initial_mtu", "1200 to 65000", self.initial_mtu.to_string());
        }
        if !(self.initial_mtu..=limits::DATAGRAM_BYTES_MAX).contains(&self.mtu_upper_bound) {
            return refuse("mtu_upper_bound", "initial_mtu to 65000", self.mtu_upper_bound.to_string());
        }
        if self.idle_timeout.is_zero() || self.idle_timeout > limits::IDLE_TIMEOUT_MAX {
            return refuse("idle_timeout", "above 0 and at most 10 minutes", format!("{:?}", self.idle_timeout));
        }
        if self.keep_alive.is_zero() || self.keep_alive >= self.idle_timeout {
            return refuse("keep_alive", "above 0 and below idle_timeout", format!("{:?}", self.keep_alive));
        }
        if self.handshake_timeout.is_zero() || self.connect_timeout.is_zero() {
            return refuse("handshake_timeout", "timeouts above 0", format!("{:?}", self.handshake_timeout));
        }
        let windows = u32::from(self.mtu_upper_bound) * 16..=1 << 30;
        if !windows.contains(&self.lane_receive_window_bytes) || !windows.contains(&self.lane_send_window_bytes) {
            return refuse("lane_receive_window_bytes", "16 datagrams to 1 GiB", self.lane_receive_window_bytes.to_string());
        }
        if !(1..=1000).contains(&self.ack_threshold) {
            return refuse("ack_threshold", "1 to 1000", self.ack_threshold.to_string());
        }
        Ok(())
    }
}

/// What a connection is for; decides windows and sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Session,
    Lane,
}

impl TransportConfig {
    /// The endpoint of one of our sockets, whose peers may send `payload` bytes in a datagram; `socket` is its index in the group.
    pub(super) fn endpoint(&self, payload: u16, socket: u8) -> EndpointConfig {
        let mut config = EndpointConfig::default();
        config.cid_generator(SteeredIds::factory(socket)).supported_versions(vec![QUIC_VERSION]);
        // Only fails below 1200, which `check` excludes.
        let _ = config.max_udp_payload_size(payload);
        config
    }

    /// The largest datagram of lanes, whatever the route.
    pub(super) fn lane_payload(&self) -> u16 {
        self.mtu_upper_bound.max(SESSION_DATAGRAM_BYTES)
    }

    /// The listening side. Nothing may be opened or sent much before the peer is authorised.
    pub(super) fn server(&self, purpose: Purpose, tls: &QuicTls) -> quinn::ServerConfig {
        let mut transport = self.transport(purpose);
        transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
        transport.receive_window(VarInt::from_u32(limits::UNAUTHORISED_WINDOW_BYTES));
        if purpose == Purpose::Lane {
            transport.congestion_controller_factory(self.congestion.factory(RECEIVERS_WINDOW_BYTES, RECEIVERS_WINDOW_BYTES, None));
        }
        let mut config = quinn::ServerConfig::with_crypto(tls.server());
        let mut tokens = quinn::ValidationTokenConfig::default();
        tokens.sent(0).log(Arc::new(NoneTokenLog));
        config
            .transport_config(Arc::new(transport))
            .validation_token_config(tokens)
            .token_key(tls.tokens())
            .retry_token_lifetime(TOKEN_LIFETIME)
            .max_incoming(limits::INCOMING_MAX)
            .incoming_buffer_size(limits::INCOMING_BUFFER_BYTES)
            .incoming_buffer_size_total(limits::INCOMING_BUFFERS_BYTES)
            // QUIC's path change: a peer behind a NAT that gets a new address keeps its session and lanes.
            .migration(true);
        config
    }

    /// The connecting side of a session.
    pub(super) fn session_client(&self, tls: &QuicTls) -> quinn::ClientConfig {
        self.client(self.transport(Purpose::Session), tls, steer::SESSION_BYTE)
    }

    /// The connecting side of a lane, which shares its path with others; `first_byte` picks the socket of the listener's group,
    /// and datagrams have at most `payload` bytes.
    pub(super) fn lane_client(&self, tls: &QuicTls, first_byte: u8, payload: u16, member: Arc<Member>) -> quinn::ClientConfig {
        let mut transport = self.transport(Purpose::Lane);
        transport.mtu_discovery_config(Some(discovery(payload)));
        transport.congestion_controller_factory(self.congestion.factory(INITIAL_WINDOW_BYTES, 0, Some(member)));
        self.client(transport, tls, first_byte)
    }

    fn client(&self, mut transport: quinn::TransportConfig, tls: &QuicTls, first_byte: u8) -> quinn::ClientConfig {
        transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
        let mut config = quinn::ClientConfig::new(tls.client());
        config
            .transport_config(Arc::new(transport))
            .token_store(Arc::new(NoneTokenStore))
            .initial_dst_cid_provider(Arc::new(move || steer::initial_connection_id(first_byte)));
        config
    }

    /// What both sides of a connection have in common.
    fn transport(&self, purpose: Purpose) -> quinn::TransportConfig {
        let mut config = quinn::TransportConfig::default();
        let idle_ms = u32::try_from(self.idle_timeout.as_millis()).unwrap_or(u32::MAX);
        config
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle_ms))))
            .keep_alive_interval(Some(self.keep_alive))
            .crypto_buffer_size(limits::CRYPTO_BUFFER_BYTES)
            .datagram_receive_buffer_size(None)
            .datagram_send_buffer_size(0)
            .allow_spin(false)
            .congestion_controller_factory(self.congestion.factory(INITIAL_WINDOW_BYTES, 0, None))
            .initial_mtu(self.initial_mtu);
        let (receive, send, mtu) = match purpose {
            Purpose::Session => {
                (limits::CONTROL_WINDOW_BYTES, limits::CONTROL_WINDOW_BYTES, self.mtu_upper_bound.min(SESSION_DATAGRAM_BYTES))
            }
            // The end that connects says more of a lane's path. The other sends little.
            Purpose::Lane => {
                (self.lane_receive_window_bytes, self.lane_send_window_bytes, self.mtu_upper_bound.min(SESSION_DATAGRAM_BYTES))
            }
        };
        config
            .stream_receive_window(VarInt::from_u32(receive))
            .receive_window(VarInt::from_u32(receive))
            .send_window(send.into())
            .initial_mtu(self.initial_mtu.min(mtu))
            .mtu_discovery_config(Some(discovery(mtu)));
        if purpose == Purpose::Lane {
            let mut acks = AckFrequencyConfig::default();
            acks.ack_eliciting_threshold(VarInt::from_u32(self.ack_threshold));
            config.send_fairness(false).ack_frequency_config(Some(acks));
        }
        config
    }
}

fn discovery(payload: u16) -> MtuDiscoveryConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(payload);
    if payload > COARSE_FROM_BYTES {
        discovery.minimum_change(COARSE_STEP_BYTES);
    }
    discovery
}

/// Routes that carry more than any Ethernet frame. WHY coarse: quinn reads a probe's padding byte by byte, 4 ms for the largest, on the
/// thread that receives the lane; twelve probes took a twentieth of what a guest of 2 GiB takes at its destination.
const COARSE_FROM_BYTES: u16 = 16 << 10;
/// Half as many probes, and the route's whole datagram is tried all the same.
const COARSE_STEP_BYTES: u16 = 1024;

impl Congestion {
    fn factory(self, initial_window: u64, least_window: u64, member: Option<Arc<Member>>) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Rate => Arc::new(RateFactory { initial_window, least_window, member }),
            Self::Cubic => {
                let mut config = CubicConfig::default();
                config.initial_window(initial_window);
                Arc::new(config)
            }
            Self::Bbr => {
                let mut config = BbrConfig::default();
                config.initial_window(initial_window);
                Arc::new(config)
            }
        }
    }
}

/// What may be in flight before the path is known; it is spread over the first round trip.
const INITIAL_WINDOW_BYTES: u64 = 64 * 1024;
/// WHY: the receiving end of a lane sends acknowledgements and window updates only, but many. In quinn 0.11 they can fill
/// a small congestion window, and a full window holds back window updates and, for good, a close.
const RECEIVERS_WINDOW_BYTES: u64 = 1 << 20;

/// Payload of control datagrams: an Ethernet frame without IPv6 and UDP headers. Control messages gain nothing from more.
pub(super) const SESSION_DATAGRAM_BYTES: u16 = 1452;
