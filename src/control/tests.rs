//! The client against the server stack that the gateway uses.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Json;
use axum::extract::Path as UrlPath;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};

use bytes::Bytes;

use super::{Client, ClientError, Event, MigrateRequest, VmList, paths};
use crate::limits::CONTROL_EVENT_BYTES_MAX;
use crate::telemetry::{ErrorClass, Outcome, Problem, Progress, Report, RunningOn};
use crate::types::MigrationId;

/// A body that is sent in the given pieces.
struct Pieces(VecDeque<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(hyper::body::Frame::data(piece))))
    }
}

const ID: MigrationId = MigrationId([0x5f; 16]);

/// Runs `test` against a server made of `router`.
fn against(router: axum::Router, test: impl AsyncFnOnce(Client)) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let server = async { axum::serve(listener, router).await.unwrap() };
        tokio::select! {
            () = server => panic!("the server ended"),
            () = test(Client::new(&socket)) => {}
        }
    });
}

fn events(pieces: Vec<Bytes>) -> axum::Router {
    let body = move || async move { axum::body::Body::new(Pieces(pieces.into())) };
    axum::Router::new().route(paths::EVENTS, get(body))
}

fn lines() -> Vec<u8> {
    let mut text = serde_json::to_vec(&Progress::new(ID)).unwrap();
    text.extend_from_slice(b"\n\n");
    text.extend(serde_json::to_vec(&Report::new(ID, "web".parse().unwrap(), Outcome::Completed, RunningOn::Destination)).unwrap());
    text.push(b'\n');
    text
}

#[test]
fn requests_carry_json_and_answers_are_read() {
    let start = async |headers: HeaderMap, Json(request): Json<MigrateRequest>| {
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(request.vm.as_str(), "web");
        let refusal = Problem::new(ErrorClass::Denied, "policy denies `web`").with_running_on(RunningOn::Source);
        (StatusCode::FORBIDDEN, Json(refusal))
    };
    let cancel = async |UrlPath(id): UrlPath<String>| {
        assert_eq!(id, ID.to_string());
        StatusCode::IM_A_TEAPOT
    };
    let router = axum::Router::new()
        .route(paths::VMS, get(async || Json(VmList::default())))
        .route(paths::MIGRATIONS, post(start))
        .route(paths::CANCEL, post(cancel));
    against(router, async |client| {
        assert_eq!(client.vms().await.unwrap(), VmList::default());
        let request = MigrateRequest::new("web".parse().unwrap(), "gw-b".parse().unwrap());
        let refused = client.start(&request).await.unwrap_err();
        assert!(matches!(&refused, ClientError::Refused(problem) if problem.running_on == Some(RunningOn::Source)), "{refused:?}");
        let teapot = client.cancel(ID).await.unwrap_err();
        assert!(matches!(&teapot, ClientError::Answer { reason, .. } if reason == "status 418 without a problem"), "{teapot:?}");
        let other = client.peers().await.unwrap_err();
        assert!(matches!(&other, ClientError::Answer { .. }), "{other:?}");
    });
}

#[test]
fn events_are_read_however_they_are_cut() {
    let text = lines();
    for size in [1, 7, 100, text.len()] {
        let pieces = text.chunks(size).map(Bytes::copy_from_slice).collect();
        against(events(pieces), async |client| {
            let mut watch = client.watch(ID).await.unwrap();
            assert!(matches!(watch.next().await.unwrap(), Some(Event::Progress(_))));
            assert!(matches!(watch.next().await.unwrap(), Some(Event::Report(_))));
            assert!(watch.next().await.unwrap().is_none());
            assert!(watch.next().await.unwrap().is_none());
        });
    }
}

#[test]
fn a_stream_that_ends_without_a_report_is_lost_and_stays_lost() {
    let text = serde_json::to_vec(&Progress::new(ID)).unwrap();
    against(events(vec![text.into(), Bytes::from_static(b"\n")]), async |client| {
        let mut watch = client.watch(ID).await.unwrap();
        assert!(watch.next().await.unwrap().is_some());
        for _ in 0..3 {
            assert!(matches!(watch.next().await.unwrap_err(), ClientError::Lost { changes: false, .. }));
        }
    });
}

#[test]
fn what_was_sent_before_the_connection_ended_is_still_read() {
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").unwrap();
        stream.write_all(&lines()[..lines().len() - 20]).unwrap();
    });
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let mut watch = Client::new(&socket).watch(ID).await.unwrap();
        server.join().unwrap();
        assert!(matches!(watch.next().await.unwrap(), Some(Event::Progress(_))));
        for _ in 0..3 {
            assert!(matches!(watch.next().await.unwrap_err(), ClientError::Lost { .. }));
        }
    });
}

#[test]
fn an_endless_event_is_refused() {
    let piece = Bytes::from(vec![b'x'; 64 * 1024]);
    against(events(vec![piece; 2 * CONTROL_EVENT_BYTES_MAX / (64 * 1024)]), async |client| {
        let error = client.watch(ID).await.unwrap().next().await.unwrap_err();
        assert!(matches!(&error, ClientError::Answer { reason, .. } if reason.contains("event of more than")), "{error:?}");
    });
}

#[test]
fn an_endless_answer_is_refused() {
    let piece = Bytes::from(vec![b' '; 1 << 20]);
    let body = move || async move { axum::body::Body::new(Pieces(vec![piece; 17].into())) };
    against(axum::Router::new().route(paths::VMS, get(body)), async |client| {
        assert!(matches!(client.vms().await.unwrap_err(), ClientError::Lost { .. }));
    });
}

#[test]
fn a_request_for_a_change_whose_answer_is_lost_is_in_doubt() {
    for (changes, class) in [(true, ErrorClass::InDoubt), (false, ErrorClass::Local)] {
        let lost = ClientError::Lost { socket: "/s".into(), changes, source: None };
        assert_eq!(lost.problem().class, class);
    }
}
