//! The session: one connection with one bidirectional stream of control messages, and the lanes bound to it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use quinn::{Connection, RecvStream, SendStream, Side};
use tokio::sync::{Mutex, OwnedSemaphorePermit};
use tokio::time::timeout;

use super::congestion::Group;
use super::endpoint::Shared;
use super::error::{TransportError, close_code, close_reason};
use super::handshake::Agreed;
use super::join::{JoinKey, LaneGate, LaneHandler};
use super::lane::{LaneHandle, LaneIo, LanePlan, ended_inside};
use super::tls::ChannelFacts;
use crate::identity::PeerIdentity;
use crate::limits;
use crate::types::{LaneIndex, MigrationId};
use crate::wire::{CONTROL_HEADER_BYTES, ErrorClass, Message, decode_control_header};

/// A verified peer and the control stream to it. Dropping it ends the session.
///
/// Whoever connected has to send first: QUIC tells nobody of a stream on which nothing was sent.
pub struct Session {
    pub(super) connection: Connection,
    peer: PeerIdentity,
    agreed: Agreed,
    shared: Arc<Shared>,
    /// The lanes that we opened.
    lanes: Arc<Group>,
    outbox: Mutex<Outbox>,
    inbox: Mutex<Inbox>,
    /// Room among the sessions that peers may open; none for a session that we opened.
    _room: Option<OwnedSemaphorePermit>,
}

impl Session {
    pub(super) fn new(
        connection: Connection,
        streams: (SendStream, RecvStream),
        peer: PeerIdentity,
        agreed: Agreed,
        shared: Arc<Shared>,
        room: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let (send, receive) = streams;
        let outbox = Mutex::new(Outbox { stream: send, pending: Bytes::new() });
        let inbox = Mutex::new(Inbox { stream: receive, header: [0; CONTROL_HEADER_BYTES], filled: 0, body: None });
        Self { connection, peer, agreed, shared, lanes: Arc::default(), outbox, inbox, _room: room }
    }

    /// Who is at the other end, as verified when the session began.
    #[must_use]
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Verifies the peer's chain again, as of now: after a reload of roots or CRLs, and before a CRL expires.
    ///
    /// # Errors
    /// The peer would not be admitted any more. The session stays open until it is closed.
    pub fn verify_again(&self) -> Result<PeerIdentity, TransportError> {
        self.shared.tls.identify(&self.connection)
    }

    /// What is known of the channel.
    #[must_use]
    pub fn channel(&self) -> ChannelFacts {
        ChannelFacts::new(self.agreed, &self.connection)
    }

    /// Where the peer is now; it may move while the session lives.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// What the network did so far.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        LinkStats::of(&self.connection)
    }

    /// Sends a message. If this is dropped before its end, the message is still sent in whole, with the next one.
    ///
    /// # Errors
    /// The session is over, or the message is larger than the peer may accept.
    pub async fn send(&self, message: &Message) -> Result<(), TransportError> {
        let mut outbox = self.outbox.lock().await;
        outbox.flush(self.peer_address()).await?;
        let framed = message.encode_framed();
        if framed.len() > CONTROL_HEADER_BYTES + limits::CONTROL_BODY_BYTES_MAX {
            return Err(TransportError::Misuse { action: "send a control message", expected: "a body of at most 1 MiB" });
        }
        outbox.pending = framed.into();
        outbox.flush(self.peer_address()).await
    }

    /// The next message. If this is dropped before its end, nothing is lost. Bytes that are no message end the session.
    ///
    /// # Errors
    /// The session is over, or the peer broke the protocol.
    pub async fn receive(&self) -> Result<Message, TransportError> {
        let mut inbox = self.inbox.lock().await;
        let received = inbox.receive(self.peer_address()).await;
        if let Err(error @ (TransportError::Wire { .. } | TransportError::Misbehaved { .. })) = &received {
            self.close(Some(error.class()), &error.to_string());
        }
        received
    }

    /// Opens a lane and runs `task` on the lane's own thread. For the side that connected the session.
    ///
    /// The destination checks the join on arrival: a refusal reaches the task as [`TransportError::Closed`].
    ///
    /// # Errors
    /// The destination cannot be reached, is not the session's peer, or does not expect lanes from us.
    pub async fn open_lane<T, F, Fut>(&self, migration: MigrationId, lane: LaneIndex, task: F) -> Result<LaneHandle<T>, TransportError>
    where
        T: Send + 'static,
        F: FnOnce(LaneIo) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        if self.connection.side() != Side::Client || lane.0 >= limits::LANES_MAX {
            return Err(TransportError::Misuse { action: "open a lane", expected: "a session that we connected, and a lane below 16" });
        }
        let plan = LanePlan {
            shared: Arc::clone(&self.shared),
            address: self.peer_address(),
            peer: self.peer.clone(),
            key: JoinKey::new(&self.connection, migration)?,
            migration,
            lane,
            member: Arc::new(self.lanes.join(lane)),
        };
        plan.start(task).await
    }

    /// Lets `lanes` lanes of `migration` join, until the gate is dropped. For the side that accepted the session.
    /// Call it before the peer is told that it may open them.
    ///
    /// # Errors
    /// The migration expects lanes already, or the call makes no sense on this session.
    pub fn expect_lanes(&self, migration: MigrationId, lanes: u16, handler: LaneHandler) -> Result<LaneGate, TransportError> {
        if self.connection.side() != Side::Server || !(1..=limits::LANES_MAX).contains(&lanes) {
            return Err(TransportError::Misuse {
                action: "expect lanes",
                expected: "a session that the peer connected, and 1 to 16 lanes",
            });
        }
        let key = JoinKey::new(&self.connection, migration)?;
        self.shared.lanes.expect(key, &self.peer, lanes, handler)
    }

    /// Ends the session once the peer's QUIC has every message, or after `within`; no class for a normal end.
    pub async fn finish(&self, class: Option<ErrorClass>, reason: &str, within: Duration) {
        let delivered = timeout(within, async {
            let mut outbox = self.outbox.lock().await;
            outbox.flush(self.peer_address()).await.ok()?;
            outbox.stream.finish().ok()?;
            outbox.stream.stopped().await.ok()
        });
        let _ = delivered.await;
        self.close(class, reason);
    }

    /// Ends the session at once and tells the peer why; no class for a normal end. Messages on their way may be lost,
    /// and with many of them the reason as well: [`finish`](Self::finish) delivers first.
    pub fn close(&self, class: Option<ErrorClass>, reason: &str) {
        self.connection.close(close_code(class), close_reason(reason));
    }

    /// Waits for the end of the session and says how it came.
    pub async fn closed(&self) -> TransportError {
        let error = self.connection.closed().await;
        TransportError::from_connection(error, self.peer_address())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close(None, "the session is over");
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("peer", self.peer.spiffe()).field("address", &self.peer_address()).finish_non_exhaustive()
    }
}

/// What the network did for one connection since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// The round trip now.
    pub rtt: Duration,
    /// UDP payload sent, with everything that was sent again.
    pub sent_bytes: u64,
    /// UDP payload received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets that were lost and sent again.
    pub lost_packets: u64,
    /// How often the link was found congested.
    pub congestion_events: u64,
    /// Bytes that may be in flight now.
    pub congestion_window_bytes: u64,
    /// UDP payload that the path carries.
    pub mtu_bytes: u16,
}

impl LinkStats {
    /// Bytes that the path takes in a second, by the congestion window and the round trip: too little while it is being found, and
    /// a little too much afterwards.
    #[must_use]
    pub fn path_rate(&self) -> u64 {
        let micros = u64::try_from(self.rtt.as_micros()).unwrap_or(u64::MAX).max(1);
        self.congestion_window_bytes.saturating_mul(1_000_000) / micros
    }

    pub(super) fn of(connection: &Connection) -> Self {
        let stats = connection.stats();
        Self {
            rtt: stats.path.rtt,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            congestion_events: stats.path.congestion_events,
            congestion_window_bytes: stats.path.cwnd,
            mtu_bytes: stats.path.current_mtu,
        }
    }
}

struct Outbox {
    stream: SendStream,
    /// The rest of a message of which a part may be sent.
    pending: Bytes,
}

impl Outbox {
    async fn flush(&mut self, address: SocketAddr) -> Result<(), TransportError> {
        while !self.pending.is_empty() {
            let written = self.stream.write(&self.pending).await.map_err(|error| TransportError::from_write(error, address))?;
            self.pending.advance(written);
        }
        Ok(())
    }
}

struct Inbox {
    stream: RecvStream,
    header: [u8; CONTROL_HEADER_BYTES],
    /// Bytes of the header, or of the body when there is one, that are there already.
    filled: usize,
    body: Option<(u8, Vec<u8>)>,
}

impl Inbox {
    async fn receive(&mut self, address: SocketAddr) -> Result<Message, TransportError> {
        let bad_message = |source| TransportError::Wire { address, source };
        loop {
            let buffer = match &mut self.body {
                None => self.header.as_mut_slice(),
                Some((_, body)) => body.as_mut_slice(),
            };
            let rest = buffer.get_mut(self.filled..).unwrap_or_default();
            if !rest.is_empty() {
                let read = self.stream.read(rest).await.map_err(|error| TransportError::from_read(error, address))?;
                match read {
                    Some(count) => self.filled = self.filled.saturating_add(count),
                    None if self.filled == 0 && self.body.is_none() => {
                        return Err(TransportError::Closed { address, class: None, reason: "end of the control stream".to_owned() });
                    }
                    None => return Err(ended_inside(address)),
                }
                continue;
            }
            self.filled = 0;
            match self.body.take() {
                None => {
                    // The length is checked here, before anything of that length exists.
                    let (kind, body_bytes) = decode_control_header(&self.header).map_err(bad_message)?;
                    self.body = Some((kind, vec![0; body_bytes]));
                }
                Some((kind, body)) => return Message::decode(kind, &body).map_err(bad_message),
            }
        }
    }
}
