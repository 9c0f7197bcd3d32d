//! The threads that receive lanes: each has its own socket of the group, its own runtime and its own handlers.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use quinn::Connecting;
use tokio::runtime::Builder;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use super::config::Purpose;
use super::door::{Door, Pass};
use super::endpoint::Shared;
use super::error::{Refused, TransportError, close_code, close_reason};
use super::join::LaneHandler;
use super::lane::{GOODBYE, LaneIo};
use super::socket;
use crate::types::{LaneIndex, SpiffeId};
use crate::wire::{JOIN_BYTES, Join};

/// Starts the worker with `socket`, the member `index` of the group; returns once it serves.
pub(super) fn start(index: u8, socket: UdpSocket, shared: Arc<Shared>) -> Result<JoinHandle<()>, TransportError> {
    let (started_sender, started) = sync_channel(1);
    let name = format!("lane-in-{index}");
    let thread_error = {
        let name = name.clone();
        move |source| TransportError::Thread { name, source }
    };
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let listening = Builder::new_current_thread().enable_all().build().and_then(|runtime| {
            let _inside = runtime.enter();
            let door = Arc::new(Door::default());
            let endpoint = listen(index, socket, &door, &shared)?;
            drop(_inside);
            Ok((runtime, endpoint, door))
        });
        match listening {
            Ok((runtime, endpoint, door)) => {
                let _ = started_sender.send(Ok(()));
                LocalSet::new().block_on(&runtime, serve(&endpoint, &door, &shared));
            }
            Err(error) => drop(started_sender.send(Err(error))),
        }
    });
    let started = started.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended at its start")));
    match (thread, started) {
        (Ok(thread), Ok(())) => Ok(thread),
        (Err(source), _) | (_, Err(source)) => Err(thread_error(source)),
    }
}

fn listen(index: u8, socket: UdpSocket, door: &Arc<Door>, shared: &Shared) -> io::Result<quinn::Endpoint> {
    let server = shared.config.server(Purpose::Lane, &shared.tls);
    let greeting = shared.tls.greeting(Arc::clone(door), index);
    socket::listener(shared.config.endpoint(shared.config.lane_payload(), index), server, socket, greeting)
}

async fn serve(endpoint: &quinn::Endpoint, door: &Arc<Door>, shared: &Arc<Shared>) {
    let mut stop = shared.stop();
    let mut lanes = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.requested() => break,
            Some(_) = lanes.join_next() => {}
            incoming = endpoint.accept() => match incoming.map(|incoming| door.admit(incoming)) {
                None => break,
                Some(None) => {}
                Some(Some(Ok((connecting, pass)))) => drop(lanes.spawn_local(run_lane(connecting, pass, Arc::clone(shared)))),
                Some(Some(Err(refused))) => shared.report(refused).await,
            }
        }
    }
    endpoint.close(close_code(None), close_reason("the gateway stops"));
    let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
}

/// From handshake to the end of the lane.
async fn run_lane(connecting: Connecting, pass: Pass, shared: Arc<Shared>) {
    let peer_address = connecting.remote_address();
    let within = shared.config.handshake_timeout;
    let mut progress = Progress::default();
    let admitted = timeout(within, admit(connecting, &shared, &mut progress)).await.unwrap_or_else(|_| {
        let awaited = if progress.connection.is_some() { "join with its lane" } else { "finish its handshake" };
        Err(TransportError::TimedOut { address: peer_address, awaited, after: within })
    });
    match admitted {
        Ok((handler, io)) => {
            drop(pass);
            handler(io).await;
        }
        Err(reason) => {
            if let Some(connection) = progress.connection {
                connection.close(close_code(Some(reason.class())), close_reason(&reason.to_string()));
            }
            shared.report(Refused { peer_address, peer: progress.peer, reason }).await;
        }
    }
}

/// How far a handshake came, for the report when it fails.
#[derive(Default)]
struct Progress {
    connection: Option<quinn::Connection>,
    peer: Option<SpiffeId>,
}

async fn admit(connecting: Connecting, shared: &Shared, progress: &mut Progress) -> Result<(LaneHandler, LaneIo), TransportError> {
    let address = connecting.remote_address();
    let failed = |error| TransportError::from_connection(error, address);
    let connection = connecting.await.map_err(failed)?;
    progress.connection = Some(connection.clone());
    let peer = shared.tls.identify(&connection)?;
    progress.peer = Some(peer.spiffe().clone());
    shared.lanes.invites(&peer)?;
    // Only now may the peer open a stream, and only one.
    connection.set_max_concurrent_bi_streams(1u8.into());
    let (send, mut receive) = connection.accept_bi().await.map_err(failed)?;
    let mut bytes = [0; JOIN_BYTES];
    receive.read_exact(&mut bytes).await.map_err(|error| match error {
        quinn::ReadExactError::FinishedEarly(_) => super::lane::ended_inside(address),
        quinn::ReadExactError::ReadError(error) => TransportError::from_read(error, address),
    })?;
    let join = Join::decode(&bytes).map_err(|source| TransportError::Wire { address, source })?;
    let handler = shared.lanes.claim(&join, &peer, &connection)?;
    let lane: LaneIndex = join.lane;
    Ok((handler, LaneIo::accepted(lane, &connection, (send, receive), shared)))
}
