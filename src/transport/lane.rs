//! One lane: a QUIC connection of its own, on a socket of its own, driven by a thread of its own.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::buffers::{Place, send_window};
use super::congestion::Member;
use super::endpoint::Shared;
use super::error::{LaneRefusal, TransportError, close_code, close_reason};
use super::join::JoinKey;
use super::session::LinkStats;
use super::{socket, steer, tls};
use crate::identity::PeerIdentity;
use crate::types::{LaneIndex, MigrationId};
use crate::wire::ErrorClass;

/// The two directions of a lane, as bytes. What they mean is for others to say.
#[derive(Debug)]
pub struct LaneIo {
    /// Which lane.
    pub lane: LaneIndex,
    /// Towards the peer.
    pub sender: LaneSender,
    /// From the peer.
    pub receiver: LaneReceiver,
}

impl LaneIo {
    /// A lane that we opened, to send pages.
    fn opened(lane: LaneIndex, connection: &quinn::Connection, streams: (SendStream, RecvStream), shared: &Shared) -> Self {
        let sending = Window::new(shared.sending.join(), shared.config.lane_send_window_bytes);
        Self::new(lane, connection, streams, Some(sending), None)
    }

    /// A lane that joined, to bring pages. From here on the peer may send as much as the window has.
    pub(super) fn accepted(lane: LaneIndex, connection: &quinn::Connection, streams: (SendStream, RecvStream), shared: &Shared) -> Self {
        let mut receiving = Window::new(shared.receiving.join(), shared.config.lane_receive_window_bytes);
        receiving.open(connection);
        Self::new(lane, connection, streams, None, Some(receiving))
    }

    fn new(
        lane: LaneIndex,
        connection: &quinn::Connection,
        streams: (SendStream, RecvStream),
        sending: Option<Window>,
        receiving: Option<Window>,
    ) -> Self {
        let (send, receive) = streams;
        let sender = LaneSender { stream: send, connection: connection.clone(), window: sending, sent_bytes: 0, finished: false };
        let receiver = LaneReceiver { stream: receive, connection: connection.clone(), window: receiving, received_bytes: 0 };
        Self { lane, sender, receiver }
    }

    /// Ends the lane in both directions and tells the peer why.
    pub fn close(self, class: ErrorClass, reason: &str) {
        self.sender.connection.close(close_code(Some(class)), close_reason(reason));
    }
}

/// How much a lane buffers in the direction that carries pages.
#[derive(Debug)]
struct Window {
    place: Place,
    most: u32,
    now: u32,
    /// Bytes carried when it is looked at again.
    next_look: u64,
}

impl Window {
    fn new(place: Place, most: u32) -> Self {
        Self { place, most, now: most, next_look: 0 }
    }

    fn is_due(&mut self, carried: u64) -> bool {
        let due = carried >= self.next_look;
        if due {
            self.next_look = carried.saturating_add(LOOK_EVERY_BYTES);
        }
        due
    }

    /// Whether this is news.
    fn set(&mut self, wanted: u32) -> bool {
        let changed = self.now.abs_diff(wanted) > self.now / 16;
        if changed {
            self.now = wanted;
        }
        changed
    }

    fn open(&mut self, connection: &quinn::Connection) {
        self.now = self.place.share(self.most);
        connection.set_receive_window(self.now.into());
    }

    /// The sending end follows its path.
    fn follow_path(&mut self, connection: &quinn::Connection, carried: u64) {
        if self.is_due(carried) && self.set(send_window(connection.stats().path.cwnd, self.place.share(self.most))) {
            connection.set_send_window(self.now.into());
        }
    }

    /// The receiving end makes room for other lanes, or takes the room of lanes that went.
    fn follow_share(&mut self, connection: &quinn::Connection, carried: u64) {
        if self.is_due(carried) && self.set(self.place.share(self.most)) {
            connection.set_receive_window(self.now.into());
        }
    }
}

/// The sending direction of a lane. Dropped before [`finish`](Self::finish), it tells the peer that the bytes are not complete.
#[derive(Debug)]
pub struct LaneSender {
    stream: SendStream,
    connection: quinn::Connection,
    window: Option<Window>,
    sent_bytes: u64,
    finished: bool,
}

impl LaneSender {
    /// Hands over `bytes` without copying them; waits while the send window is full.
    ///
    /// # Errors
    /// The lane is closed or its peer is gone.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        let count = bytes.len();
        let written = self.stream.write_chunk(bytes).await;
        self.count(count, written)
    }

    /// As [`write`](Self::write), for several pieces in order; leaves them empty.
    ///
    /// # Errors
    /// The lane is closed or its peer is gone.
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), TransportError> {
        let count = chunks.iter().map(Bytes::len).sum();
        let written = self.stream.write_all_chunks(chunks).await;
        self.count(count, written)
    }

    fn count(&mut self, bytes: usize, written: Result<(), quinn::WriteError>) -> Result<(), TransportError> {
        written.map_err(|error| TransportError::from_write(error, self.connection.remote_address()))?;
        self.sent_bytes = self.sent_bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
        if let Some(window) = &mut self.window {
            window.follow_path(&self.connection, self.sent_bytes);
        }
        Ok(())
    }

    /// Says that nothing follows, and waits until the peer's QUIC has everything. Whether the peer's
    /// gateway has applied it is for the control stream to say.
    ///
    /// # Errors
    /// The peer gave the lane up, or is gone, before it had everything.
    pub async fn finish(&mut self) -> Result<(), TransportError> {
        let address = self.connection.remote_address();
        self.stream.finish().map_err(|_| TransportError::ClosedHere)?;
        self.finished = true;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(TransportError::from_write(quinn::WriteError::Stopped(code), address)),
            Err(error) => Err(TransportError::from_write(error.into(), address)),
        }
    }

    /// Waits for the end of the lane's connection and says how it came. What was handed over and not acknowledged is lost then.
    pub async fn closed(&self) -> TransportError {
        TransportError::from_connection(self.connection.closed().await, self.connection.remote_address())
    }

    /// Bytes handed over so far.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// What the network did so far.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        LinkStats::of(&self.connection)
    }
}

impl Drop for LaneSender {
    fn drop(&mut self) {
        if !self.finished {
            // WHY: QUIC's own drop would end the stream as if it were complete.
            let _ = self.stream.reset(close_code(Some(ErrorClass::Cancelled)));
        }
    }
}

/// The receiving direction of a lane.
#[derive(Debug)]
pub struct LaneReceiver {
    stream: RecvStream,
    connection: quinn::Connection,
    window: Option<Window>,
    received_bytes: u64,
}

impl LaneReceiver {
    /// Fills `buffer`, or returns `false` if the peer finished before its first byte.
    ///
    /// # Errors
    /// The lane is closed, its peer is gone, or it finished inside the buffer.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<bool, TransportError> {
        let address = self.connection.remote_address();
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let read = self.stream.read(rest).await.map_err(|error| TransportError::from_read(error, address))?;
            let Some(count) = read else {
                return if filled == 0 { Ok(false) } else { Err(ended_inside(address)) };
            };
            filled = filled.saturating_add(count);
        }
        self.count(filled);
        Ok(true)
    }

    /// The next bytes as they came, at most `limit` of them, without copying; `None` if the peer has finished.
    ///
    /// # Errors
    /// The lane is closed or its peer is gone.
    pub async fn read_chunk(&mut self, limit: usize) -> Result<Option<Bytes>, TransportError> {
        let address = self.connection.remote_address();
        let chunk = self.stream.read_chunk(limit, true).await.map_err(|error| TransportError::from_read(error, address))?;
        let bytes = chunk.map(|chunk| chunk.bytes);
        self.count(bytes.as_ref().map_or(0, Bytes::len));
        Ok(bytes)
    }

    fn count(&mut self, bytes: usize) {
        self.received_bytes = self.received_bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
        if let Some(window) = &mut self.window {
            window.follow_share(&self.connection, self.received_bytes);
        }
    }

    /// Bytes read so far.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }
}

impl Drop for LaneReceiver {
    fn drop(&mut self) {
        // Fails when everything was read, and then there is nothing to stop.
        let _ = self.stream.stop(close_code(Some(ErrorClass::Cancelled)));
    }
}

pub(super) fn ended_inside(address: SocketAddr) -> TransportError {
    TransportError::Misbehaved { address, reason: "the stream ended inside a message".to_owned() }
}

/// A lane that runs on its own thread. Dropping the handle ends the lane as cancelled.
pub struct LaneHandle<T> {
    migration: MigrationId,
    lane: LaneIndex,
    connection: quinn::Connection,
    result: oneshot::Receiver<T>,
    /// Its end tells the thread to give up.
    _alive: oneshot::Sender<()>,
}

impl<T> LaneHandle<T> {
    /// Waits for the task's result.
    ///
    /// # Errors
    /// The task panicked, or the endpoint was shut down.
    pub async fn join(self) -> Result<T, TransportError> {
        self.result.await.map_err(|_| TransportError::LaneLost { migration: self.migration, lane: self.lane })
    }

    /// What the network did so far.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        LinkStats::of(&self.connection)
    }
}

impl<T> fmt::Debug for LaneHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaneHandle").field("migration", &self.migration).field("lane", &self.lane).finish_non_exhaustive()
    }
}

/// What a lane's thread needs to connect and to bind itself to its session.
pub(super) struct LanePlan {
    pub(super) shared: Arc<Shared>,
    pub(super) address: SocketAddr,
    pub(super) peer: PeerIdentity,
    pub(super) key: JoinKey,
    pub(super) migration: MigrationId,
    pub(super) lane: LaneIndex,
    pub(super) member: Arc<Member>,
}

impl LanePlan {
    /// Starts the thread; returns once the lane has sent its join.
    pub(super) async fn start<T, F, Fut>(self, task: F) -> Result<LaneHandle<T>, TransportError>
    where
        T: Send + 'static,
        F: FnOnce(LaneIo) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (migration, lane) = (self.migration, self.lane);
        let (joined_sender, joined) = oneshot::channel();
        let (result_sender, result) = oneshot::channel();
        let (alive, cancelled) = oneshot::channel::<()>();
        let name = format!("lane-out-{lane}");
        let spawned = std::thread::Builder::new().name(name.clone()).spawn(move || {
            // Dropped last, when everything of the lane is gone.
            let _running = self.shared.running();
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(source) => {
                    let _ = joined_sender.send(Err(TransportError::Thread { name, source }));
                    return;
                }
            };
            LocalSet::new().block_on(&runtime, self.run(task, joined_sender, result_sender, cancelled));
        });
        let thread_error = |source| TransportError::Thread { name: format!("lane-out-{lane}"), source };
        drop(spawned.map_err(thread_error)?);
        let connection = joined.await.map_err(|_| thread_error(io::ErrorKind::Other.into()))??;
        Ok(LaneHandle { migration, lane, connection, result, _alive: alive })
    }

    async fn run<T, F, Fut>(
        self,
        task: F,
        joined: oneshot::Sender<Result<quinn::Connection, TransportError>>,
        result: oneshot::Sender<T>,
        mut cancelled: oneshot::Receiver<()>,
    ) where
        F: FnOnce(LaneIo) -> Fut,
        Fut: Future<Output = T>,
    {
        let mut stop = self.shared.stop();
        let within = self.shared.config.connect_timeout;
        let opening = tokio::select! {
            biased;
            _ = &mut cancelled => Err(TransportError::ClosedHere),
            () = stop.requested() => Err(TransportError::ClosedHere),
            opened = timeout(within, self.open()) => opened.unwrap_or(Err(TransportError::TimedOut {
                address: self.address,
                awaited: "admit the lane",
                after: within,
            })),
        };
        let (endpoint, connection, io) = match opening {
            Ok(opened) => opened,
            Err(error) => {
                let _ = joined.send(Err(error));
                return;
            }
        };
        let _ = joined.send(Ok(connection.clone()));
        let ended = tokio::select! {
            biased;
            _ = &mut cancelled => Err("the lane was given up"),
            () = stop.requested() => Err("the gateway stops"),
            value = task(io) => Ok(value),
        };
        // Here the task is dropped, and with it the lane's streams.
        let (class, reason) = match ended {
            Ok(value) => {
                let _ = result.send(value);
                (None, "the lane is done")
            }
            Err(reason) => (Some(ErrorClass::Cancelled), reason),
        };
        // WHY: quinn 0.11 holds a close back while the congestion window is full, and once closed it takes no
        // acknowledgement that would empty it. So let what is in flight arrive first.
        tokio::time::sleep(connection.rtt().saturating_mul(2).saturating_add(ACK_DELAY).min(GOODBYE)).await;
        connection.close(close_code(class), close_reason(reason));
        drop(connection);
        // Stay until the close has been sent, or is not worth waiting for.
        let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
    }

    async fn open(&self) -> Result<(quinn::Endpoint, quinn::Connection, LaneIo), TransportError> {
        let address = self.address;
        let config = &self.shared.config;
        let failed = |error| TransportError::from_connection(error, address);
        let socket = steer::client_socket(address, config.socket_buffer_bytes).map_err(TransportError::socket("open", address))?;
        // What the route does not carry need not be tried.
        let payload = socket::route_payload(address).map_or(config.lane_payload(), |route| route.clamp(1200, config.lane_payload()));
        let endpoint = socket::bulk_endpoint(config.endpoint(payload, 0), socket).map_err(TransportError::socket("drive", address))?;
        let first_byte = steer::lane_byte(self.migration, self.lane);
        let client = config.lane_client(&self.shared.tls, first_byte, payload, Arc::clone(&self.member));
        let connecting = endpoint
            .connect_with(client, address, &tls::server_name(address))
            .map_err(|error| TransportError::from_connect(&error, address))?;
        let connection = connecting.await.map_err(failed)?;
        self.check_peer(&connection)
            .inspect_err(|error| connection.close(close_code(Some(error.class())), close_reason("not the session's peer")))?;
        let (mut send, receive) = connection.open_bi().await.map_err(failed)?;
        let join = self.key.join(&connection, self.lane)?;
        send.write_all(&join.encode()).await.map_err(|error| TransportError::from_write(error, address))?;
        let io = LaneIo::opened(self.lane, &connection, (send, receive), &self.shared);
        Ok((endpoint, connection, io))
    }

    /// The listener of a lane has to be the very peer of the session, down to its key, and the channel as good.
    fn check_peer(&self, connection: &quinn::Connection) -> Result<(), TransportError> {
        let got = self.shared.tls.identify(connection)?;
        if got.spiffe() != self.peer.spiffe() {
            let expected = self.peer.spiffe().clone();
            return Err(TransportError::WrongPeer { address: self.address, expected, got: got.spiffe().clone() });
        }
        if got.spki_sha256() != self.peer.spki_sha256() {
            return Err(TransportError::KeyChanged { peer: got.spiffe().clone() });
        }
        if !self.key.has_channel_of(connection) {
            return Err(TransportError::LaneRefused { migration: self.migration, lane: self.lane, why: LaneRefusal::OtherChannel });
        }
        Ok(())
    }
}

/// How much a lane carries until its window is looked at again; a window that grows doubles in more than this.
const LOOK_EVERY_BYTES: u64 = 256 * 1024;
/// Twice the longest delay that QUIC's defaults give an acknowledgement.
const ACK_DELAY: Duration = Duration::from_millis(50);
/// How long a thread stays to tell its peer that it goes.
pub(super) const GOODBYE: Duration = Duration::from_millis(500);
