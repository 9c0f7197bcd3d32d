//! Who calls the control sockets: how many at once, and how long one may say nothing or read nothing.
//!
//! *Invariant:* `bounded-callers`: a connection ends by itself unless its caller speaks and reads, and one user's connections do not
//! take another's place.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::connect_info::ConnectInfo;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Sleep;

use crate::gateway::serve::{Caller, Refused, SocketKind};
use crate::limits;
use crate::telemetry::Problem;
use crate::wire::ErrorClass;

/// How long a caller is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// From the connection, or the end of the head, until all of the head, or of the body, is there.
    pub(super) speaks: Duration,
    /// While an answer waits, until any of it is read.
    pub(super) reads: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { speaks: limits::CALLER_SPEAKS_WITHIN, reads: limits::CALLER_READS_WITHIN }
    }
}

/// Connections at this moment, of all control sockets of a gateway together.
#[derive(Debug)]
pub(super) struct Callers {
    patience: Patience,
    present: Mutex<HashMap<u32, usize>>,
    /// Those who are told that there are too many of them.
    refused: Arc<Semaphore>,
}

impl Callers {
    pub(super) fn new(patience: Patience) -> Arc<Self> {
        let refused = Arc::new(Semaphore::new(limits::CALLERS_REFUSED_MAX));
        Arc::new(Self { patience, present: Mutex::default(), refused })
    }

    /// Root and the gateway's own user have their places whoever else is there.
    fn admit(self: &Arc<Self>, uid: u32) -> Option<Place> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let trusted = |uid| uid == 0 || uid == nix::unistd::geteuid().as_raw();
        let others: usize = present.iter().filter(|(uid, _)| !trusted(**uid)).map(|(_, count)| count).sum();
        let own = present.get(&uid).copied().unwrap_or(0);
        if own >= limits::CALLERS_PER_USER_MAX || (!trusted(uid) && others >= limits::CALLERS_MAX) {
            return None;
        }
        present.insert(uid, own + 1);
        Some(Place { callers: Arc::clone(self), uid })
    }
}

/// One connection's place among all.
struct Place {
    callers: Arc<Callers>,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut present = self.callers.present.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = present.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                present.remove(&self.uid);
            }
        }
    }
}

/// What a connection holds for as long as it lives.
enum Holds {
    Place { _place: Place },
    Refusal { _permit: OwnedSemaphorePermit },
}

/// Serves `routes` until `stop` says so, and then what is being answered.
pub(super) async fn serve(
    listener: UnixListener,
    kind: SocketKind,
    routes: Router,
    callers: Arc<Callers>,
    mut stop: watch::Receiver<bool>,
) {
    let routes = routes.layer(from_fn_with_state(callers.patience, whole));
    let full = Router::new().fallback(|| async { Refused(too_many()) });
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stop.changed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Without descriptors; connections end, and then there are some.
                tracing::error!(%error, "control socket: a caller cannot be taken");
                tokio::time::sleep(limits::ACCEPT_PAUSE).await;
                continue;
            }
        };
        let uid = stream.peer_cred().ok().map(|credentials| credentials.uid());
        let caller = Caller { uid, kind };
        // Whom the kernel does not name is told so, as one user.
        let (routes, holds) = match callers.admit(uid.unwrap_or(u32::MAX)) {
            Some(place) => (routes.clone(), Holds::Place { _place: place }),
            None => match Arc::clone(&callers.refused).try_acquire_owned() {
                Ok(permit) => (full.clone(), Holds::Refusal { _permit: permit }),
                Err(_) => continue,
            },
        };
        connections.spawn(converse(stream, caller, routes, callers.patience, stop.clone(), holds));
    }
    drop(listener);
    connections.join_all().await;
}

fn too_many() -> Problem {
    let message = format!("this user, or all users together, have as many connections to the control socket as may be ({})", {
        limits::CALLERS_PER_USER_MAX
    });
    Problem::new(ErrorClass::Denied, message).with_code("too-many-callers").with_hint("end some `watch` or `migrate` commands")
}

/// One connection: one request, and its answer.
async fn converse(stream: UnixStream, caller: Caller, routes: Router, patience: Patience, mut stop: watch::Receiver<bool>, _holds: Holds) {
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(ConnectInfo(caller));
        TowerToHyperService::new(routes.clone()).call(request)
    });
    let stream = TokioIo::new(Patient { stream, within: patience.reads, stalled: None });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(patience.speaks);
    builder.keep_alive(false).max_buf_size(limits::CONTROL_REQUEST_BYTES_MAX);
    let mut connection = std::pin::pin!(builder.serve_connection(stream, service));
    let stopped = async {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stopped => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(uid = caller.uid, error = %crate::telemetry::chain(&error), "control socket: a caller is left");
    }
}

/// The request with all of its body, or a refusal.
async fn whole(State(patience): State<Patience>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let too_long = || {
        let message = format!("request: cut off, or longer than {} bytes", limits::CONTROL_REQUEST_BYTES_MAX);
        Refused::from(Problem::new(ErrorClass::Misuse, message)).into_response()
    };
    if usize::try_from(body.size_hint().lower()).map_or(true, |bytes| bytes > limits::CONTROL_REQUEST_BYTES_MAX) {
        return too_long();
    }
    match tokio::time::timeout(patience.speaks, axum::body::to_bytes(body, limits::CONTROL_REQUEST_BYTES_MAX)).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(head, Body::from(bytes))).await,
        Ok(Err(_)) => too_long(),
        Err(_) => {
            let message = format!("request: its end did not come within {} s", patience.speaks.as_secs_f64());
            Refused::from(Problem::new(ErrorClass::TimedOut, message)).into_response()
        }
    }
}

/// A connection that fails when what is written to it is not read.
struct Patient {
    stream: UnixStream,
    within: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn wait<T>(&mut self, context: &mut Context<'_>, step: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if step.is_ready() {
            self.stalled = None;
            return step;
        }
        let within = self.within;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(within)));
        stalled.as_mut().poll(context).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the caller does not read its answer")))
    }
}

impl AsyncRead for Patient {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let step = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.wait(context, step)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let step = Pin::new(&mut this.stream).poll_write_vectored(context, slices);
        this.wait(context, step)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as Blocking;
    use std::path::Path;

    use axum::routing::{get, post};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_millis(50);

    /// Runs callers, who block, against a server; its count of connections afterwards.
    fn with_server(patience: Patience, calls: impl FnOnce(&Path, &Arc<Callers>) + Send) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let callers = Callers::new(patience);
        let listener = runtime.block_on(async { UnixListener::bind(&path).unwrap() });
        let big = "x".repeat(8 << 20);
        let routes = Router::new()
            .route("/big", get(move || async move { big }))
            .route("/small", get(|| async { "small" }))
            .route("/length", post(|body: axum::body::Bytes| async move { body.len().to_string() }));
        let (stop_in, stop) = watch::channel(false);
        let server = runtime.spawn(serve(listener, SocketKind::Control, routes, Arc::clone(&callers), stop));
        calls(&path, &callers);
        stop_in.send_replace(true);
        runtime.block_on(server).unwrap();
        assert!(callers.present.lock().unwrap().is_empty(), "places are given back");
    }

    fn say(path: &Path, text: &str) -> Blocking {
        let mut stream = Blocking::connect(path).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// All that comes until the server ends the connection.
    fn hear(mut stream: Blocking) -> String {
        let mut text = Vec::new();
        // Data that was left unread at the other end is an error here.
        let _ = stream.read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn callers_who_say_nothing_or_only_half_are_left() {
        with_server(Patience { speaks: SHORT, reads: LONG }, |path, _| {
            hear(say(path, ""));
            hear(say(path, "GET /small HTTP/1.1\r\nhost:"));
            let half = hear(say(path, "POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf"));
            assert!(half.contains("its end did not come"), "{half}");
        });
        with_server(Patience { speaks: LONG, reads: SHORT }, |path, _| {
            assert!(hear(say(path, "GET /small HTTP/1.1\r\nhost: x\r\n\r\n")).ends_with("small"));
            let whole = hear(say(path, "POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody"));
            assert!(whole.starts_with("HTTP/1.1 200") && whole.ends_with("\r\n4"), "{whole}");
        });
    }

    #[test]
    fn a_caller_who_does_not_read_the_answer_is_left() {
        with_server(Patience { speaks: LONG, reads: SHORT }, |path, callers| {
            let deaf = say(path, "GET /big HTTP/1.1\r\nhost: x\r\n\r\n");
            for there in [true, false] {
                while callers.present.lock().unwrap().is_empty() == there {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            assert!(hear(deaf).len() < 8 << 20, "it was cut off");
            assert!(hear(say(path, "GET /big HTTP/1.1\r\nhost: x\r\n\r\n")).len() > 8 << 20, "who reads gets all");
        });
    }

    #[test]
    fn one_user_has_so_many_connections_and_leaves_the_others_theirs() {
        let callers = Callers::new(Patience::default());
        let many = |uid: u32| -> Vec<Place> { std::iter::from_fn(|| callers.admit(uid)).collect() };
        let users: Vec<_> = (1..).map(|uid| many(1_000_000 + uid)).take_while(|places| !places.is_empty()).collect();
        assert!(users[0].len() == limits::CALLERS_PER_USER_MAX && users.len() > 1);
        assert_eq!(users.iter().map(Vec::len).sum::<usize>(), limits::CALLERS_MAX);
        let root = many(0);
        assert_eq!(root.len(), limits::CALLERS_PER_USER_MAX, "root's places are its own");
        drop(users);
        assert!(callers.admit(1_000_001).is_some() && callers.admit(0).is_none());
    }

    #[test]
    fn who_is_one_too_many_is_told() {
        with_server(Patience { speaks: LONG, reads: LONG }, |path, callers| {
            let own = nix::unistd::geteuid().as_raw();
            let places: Vec<_> = std::iter::from_fn(|| callers.admit(own)).collect();
            let told = hear(say(path, "GET /small HTTP/1.1\r\nhost: x\r\n\r\n"));
            assert!(told.contains("too-many-callers"), "{told}");
            drop(places);
            assert!(hear(say(path, "GET /small HTTP/1.1\r\nhost: x\r\n\r\n")).ends_with("small"));
        });
    }

    #[test]
    fn a_request_that_is_too_long_is_refused() {
        with_server(Patience { speaks: LONG, reads: LONG }, |path, _| {
            let length = limits::CONTROL_REQUEST_BYTES_MAX + 1;
            let told = hear(say(path, &format!("POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n")));
            assert!(told.contains("longer than"), "{told}");
        });
    }
}
