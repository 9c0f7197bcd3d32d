//! The gateway's end of the network: one UDP port that peers connect to, and the sessions in both directions.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::thread::JoinHandle;

use quinn::Connecting;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::buffers::Buffers;
use super::config::{Purpose, SESSION_DATAGRAM_BYTES, TransportConfig};
use super::door::{Door, Pass};
use super::error::{Refused, TransportError, close_code, close_reason};
use super::join::LaneTable;
use super::lane::GOODBYE;
use super::session::Session;
use super::steer::{self, SocketGroup};
use super::tls::{self, QuicTls};
use super::{socket, worker};
use crate::identity::Credentials;
use crate::limits;
use crate::types::SpiffeId;
use crate::wire::ErrorClass;

/// What sessions, lanes and workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: TransportConfig,
    pub(super) tls: QuicTls,
    pub(super) lanes: Arc<LaneTable>,
    pub(super) sending: Arc<Buffers>,
    pub(super) receiving: Arc<Buffers>,
    rooms: Arc<Semaphore>,
    stop: watch::Sender<bool>,
    running: watch::Sender<()>,
    admitted: mpsc::Sender<Result<Session, Refused>>,
}

impl Shared {
    /// Tells when everything has to end.
    pub(super) fn stop(&self) -> Stop {
        Stop(self.stop.subscribe())
    }

    /// Held by each thread of a lane for as long as it runs.
    pub(super) fn running(&self) -> watch::Receiver<()> {
        self.running.subscribe()
    }

    /// Gives a refusal to whoever audits; waits while the queue is full, so that none is lost.
    pub(super) async fn report(&self, refused: Refused) {
        tracing::debug!(peer_address = %refused.peer_address, reason = %refused.reason, "connection refused");
        let _ = self.admitted.send(Err(refused)).await;
    }
}

/// The end of everything.
#[derive(Debug)]
pub(super) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Waits for it. May be dropped and called again.
    pub(super) async fn requested(&mut self) {
        // An error says that there is nobody left to ask for it, which is an end as well.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// One listening UDP port, with everything behind it.
#[derive(Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
    local_address: SocketAddr,
    listener: quinn::Endpoint,
    admitted: Mutex<mpsc::Receiver<Result<Session, Refused>>>,
    /// Sockets for the sessions that we open: IPv4, IPv6.
    dialers: StdMutex<[Option<quinn::Endpoint>; 2]>,
    workers: StdMutex<Vec<JoinHandle<()>>>,
    runtime: Handle,
}

impl Endpoint {
    /// Listens. Has to be called inside a Tokio runtime, which then drives the sessions; lanes have their own threads.
    ///
    /// # Errors
    /// A value of `config` cannot work, the address is taken, or a thread cannot be started.
    pub fn bind(config: TransportConfig, credentials: Arc<Credentials>) -> Result<Self, TransportError> {
        config.check()?;
        let no_runtime = |_| TransportError::Misuse { action: "listen", expected: "to be inside a Tokio runtime" };
        let runtime = Handle::try_current().map_err(no_runtime)?;
        let address = config.listen;
        let workers = u8::try_from(config.lane_workers).unwrap_or(u8::MAX);
        let tls = QuicTls::new(credentials)?;
        let group = SocketGroup::bind(address, workers, config.socket_buffer_bytes).map_err(TransportError::socket("bind", address))?;
        let (admitted_sender, admitted) = mpsc::channel(limits::ACCEPT_QUEUE_MAX);
        let shared = Arc::new(Shared {
            config,
            tls,
            lanes: Arc::default(),
            sending: Arc::default(),
            receiving: Arc::default(),
            rooms: Arc::new(Semaphore::new(limits::SESSIONS_MAX)),
            stop: watch::Sender::new(false),
            running: watch::Sender::new(()),
            admitted: admitted_sender,
        });
        let server = shared.config.server(Purpose::Session, &shared.tls);
        let door = Arc::new(Door::default());
        let greeting = shared.tls.greeting(Arc::clone(&door), 0);
        let listener = socket::listener(shared.config.endpoint(SESSION_DATAGRAM_BYTES, 0), server, group.session, greeting)
            .map_err(TransportError::socket("drive", address))?;
        let local_address = listener.local_addr().map_err(TransportError::socket("read address of", address))?;
        let endpoint = Self {
            shared: Arc::clone(&shared),
            local_address,
            listener: listener.clone(),
            admitted: Mutex::new(admitted),
            dialers: StdMutex::default(),
            workers: StdMutex::default(),
            runtime,
        };
        // From here on, dropping `endpoint` ends what was started.
        for (index, socket) in (1..).zip(group.workers) {
            let thread = worker::start(index, socket, Arc::clone(&shared))?;
            endpoint.workers.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        endpoint.runtime.spawn(accept_sessions(listener, door, shared));
        Ok(endpoint)
    }

    /// The address that peers connect to.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// The next peer that has connected, authenticated and begun to speak; or a connection that was refused,
    /// session or lane, for the audit log. `None` after [`shutdown`](Self::shutdown). May be dropped and called again.
    pub async fn accept(&self) -> Option<Result<Session, Refused>> {
        let mut admitted = self.admitted.lock().await;
        let mut stop = self.shared.stop();
        tokio::select! {
            biased;
            next = admitted.recv() => next,
            () = stop.requested() => None,
        }
    }

    /// Connects to the gateway at `address`, which has to be `expected`. The caller has to send the first message soon.
    ///
    /// # Errors
    /// Nobody answers, the peer is somebody else or refuses us, or we have nothing in common.
    pub async fn connect(&self, address: SocketAddr, expected: &SpiffeId) -> Result<Session, TransportError> {
        let within = self.shared.config.connect_timeout;
        let dialer = self.dialer(address)?;
        let config = self.shared.config.session_client(&self.shared.tls);
        let connecting = dialer
            .connect_with(config, address, &tls::server_name(address))
            .map_err(|error| TransportError::from_connect(&error, address))?;
        let failed = |error| TransportError::from_connection(error, address);
        let connection =
            timeout(within, connecting).await.map_err(|_| TransportError::Unreachable { address, reason: "no answer" })?.map_err(failed)?;
        let refuse = |error: TransportError| {
            connection.close(close_code(Some(error.class())), close_reason("you are not the gateway that was called"));
            error
        };
        let peer = self.shared.tls.identify(&connection).map_err(refuse)?;
        let agreed = self.shared.tls.agreed(&connection).map_err(refuse)?;
        if peer.spiffe() != expected {
            return Err(refuse(TransportError::WrongPeer { address, expected: expected.clone(), got: peer.spiffe().clone() }));
        }
        // The listener lets us open a stream once it has verified us, which in TLS 1.3 comes after the handshake.
        let streams = timeout(within, connection.open_bi())
            .await
            .map_err(|_| TransportError::TimedOut { address, awaited: "admit the session", after: within })?
            .map_err(failed)?;
        Ok(Session::new(connection, streams, peer, agreed, Arc::clone(&self.shared), None))
    }

    /// Closes every session and lane and ends every thread.
    pub async fn shutdown(&self) {
        self.stop();
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        // Joining blocks, briefly: a worker leaves within its goodbye.
        let _ = tokio::task::spawn_blocking(move || workers.into_iter().for_each(|thread| drop(thread.join()))).await;
        self.shared.running.closed().await;
        let dialers = self.lock_dialers().clone();
        for endpoint in dialers.iter().flatten().chain([&self.listener]) {
            let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
        }
    }

    /// How many hold what endpoint, sessions, tasks and threads share.
    #[cfg(test)]
    pub(super) fn holders(&self) -> usize {
        Arc::strong_count(&self.shared)
    }

    fn stop(&self) {
        self.shared.stop.send_replace(true);
        let dialers = self.lock_dialers();
        for endpoint in dialers.iter().flatten().chain([&self.listener]) {
            endpoint.close(close_code(Some(ErrorClass::Cancelled)), close_reason("the gateway stops"));
        }
    }

    /// The socket from which sessions to peers of one address family are opened.
    fn dialer(&self, address: SocketAddr) -> Result<quinn::Endpoint, TransportError> {
        let mut dialers = self.lock_dialers();
        let [v4, v6] = &mut *dialers;
        let slot = if address.is_ipv4() { v4 } else { v6 };
        if *self.shared.stop.borrow() {
            return Err(TransportError::ClosedHere);
        }
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let _runtime = self.runtime.enter();
        let socket =
            steer::client_socket(address, self.shared.config.socket_buffer_bytes).map_err(TransportError::socket("open", address))?;
        let config = self.shared.config.endpoint(SESSION_DATAGRAM_BYTES, steer::SESSION_BYTE);
        let endpoint = socket::endpoint(config, socket).map_err(TransportError::socket("drive", address))?;
        Ok(slot.insert(endpoint).clone())
    }

    fn lock_dialers(&self) -> std::sync::MutexGuard<'_, [Option<quinn::Endpoint>; 2]> {
        self.dialers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Takes newcomers at the session socket, each handshake in a task of its own.
async fn accept_sessions(listener: quinn::Endpoint, door: Arc<Door>, shared: Arc<Shared>) {
    let mut stop = shared.stop();
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.requested() => return,
            Some(_) = handshakes.join_next() => {}
            incoming = listener.accept() => match incoming.map(|incoming| door.admit(incoming)) {
                None => return,
                Some(None) => {}
                Some(Some(Ok((connecting, pass)))) => drop(handshakes.spawn(admit(connecting, pass, Arc::clone(&shared)))),
                Some(Some(Err(refused))) => shared.report(refused).await,
            }
        }
    }
}

/// One handshake, until there is a session or a refusal.
async fn admit(connecting: Connecting, pass: Pass, shared: Arc<Shared>) {
    let peer_address = connecting.remote_address();
    let within = shared.config.handshake_timeout;
    let mut connection = None;
    let mut peer = None;
    let session = timeout(within, async {
        let failed = |error| TransportError::from_connection(error, peer_address);
        let connection = &*connection.insert(connecting.await.map_err(failed)?);
        let peer = peer.insert(shared.tls.identify(connection)?);
        let agreed = shared.tls.agreed(connection)?;
        let room = Arc::clone(&shared.rooms).try_acquire_owned().map_err(|_| TransportError::NoRoom { sessions: limits::SESSIONS_MAX })?;
        // Only now may the peer open a stream, and only one.
        connection.set_max_concurrent_bi_streams(1u8.into());
        connection.set_receive_window(limits::CONTROL_WINDOW_BYTES.into());
        let streams = connection.accept_bi().await.map_err(failed)?;
        Ok(Session::new(connection.clone(), streams, peer.clone(), agreed, Arc::clone(&shared), Some(room)))
    });
    let session = session.await;
    let session = session.unwrap_or_else(|_| {
        let awaited = if connection.is_some() { "send its first message" } else { "finish its handshake" };
        Err(TransportError::TimedOut { address: peer_address, awaited, after: within })
    });
    match session {
        Ok(session) => drop(shared.admitted.send(Ok(session)).await),
        Err(reason) => {
            if let Some(connection) = connection {
                connection.close(close_code(Some(reason.class())), close_reason(&reason.to_string()));
            }
            shared.report(Refused { peer_address, peer: peer.map(|peer| peer.spiffe().clone()), reason }).await;
        }
    }
    drop(pass);
}
