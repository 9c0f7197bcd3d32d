//! A gateway that says what it likes: typed refusals, guest unharmed.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::super::wire::{after, receive_header, receive_payload, send_message};
use super::*;

const WAIT: Duration = Duration::from_secs(5);

/// The bare protocol.
pub(super) struct Gateway {
    pub(super) stream: UnixStream,
    sequence: u64,
}

impl Gateway {
    fn connect(path: &Path) -> Self {
        Self { stream: UnixStream::connect(path).unwrap(), sequence: 0 }
    }
    /// Takes control as soon as the connection before has been noticed to be gone.
    pub(super) fn attach(path: &Path) -> Self {
        loop {
            let mut gateway = Self::connect(path);
            let answer = gateway.ask_json(&json!({"hello": {"version": 1, "role": "control"}}));
            if code(&answer) != "busy" {
                assert!(answer["hello"]["state"].is_string(), "{answer}");
                return gateway;
            }
        }
    }
    pub(super) fn send(&mut self, request: &Value, payload: &[u8]) {
        self.sequence += 1;
        let header = json!({"sequence": self.sequence, "request": request});
        send_message(&self.stream, &header, payload, None, after(WAIT)).unwrap();
    }
    fn receive(&self) -> Option<Value> {
        let received = receive_header(&self.stream, after(WAIT), WAIT).ok()?;
        receive_payload(&self.stream, received.payload_bytes, usize::MAX, after(WAIT)).ok()?;
        serde_json::from_slice(&received.header).ok()
    }
    fn ask_json(&mut self, request: &Value) -> Value {
        self.send(request, &[]);
        let mut answer = self.receive().unwrap();
        assert_eq!(answer["sequence"], self.sequence);
        answer["answer"].take()
    }
    pub(super) fn ask(&mut self, request: &str) -> Value {
        self.ask_json(&json!(request))
    }
    fn is_closed(&self) -> bool {
        receive_header(&self.stream, after(WAIT), WAIT).is_err()
    }
}

fn code(answer: &Value) -> &str {
    answer["refused"]["code"].as_str().unwrap_or("accepted")
}

#[test]
fn requests_out_of_order_are_refused_and_the_guest_is_not_touched() {
    let served = Served::new(Plain::running());
    let mut gateway = Gateway::connect(served.path());
    assert_eq!(code(&gateway.ask("pause")), "order", "before hello");
    let mut gateway = Gateway::attach(served.path());
    let prepare = json!({"prepare": {"machine": machine()}});
    let throttle = json!({"throttle": {"percent": 100}});
    for request in [json!("harvest"), json!("renew"), json!("save-state"), json!("restore-state"), prepare.clone(), throttle] {
        assert_eq!(code(&gateway.ask_json(&request)), "order", "{request}");
    }
    assert_eq!(code(&gateway.ask_json(&json!({"hello": {"version": 1, "role": "control"}}))), "order");
    assert!(served.calls().is_empty());

    let served = Served::new(Plain::incoming());
    let mut gateway = Gateway::attach(served.path());
    let requests = ["machine", "memory", "track-start", "harvest", "track-stop", "pause", "resume", "renew", "save-state", "restore-state"];
    for request in requests {
        assert_eq!(code(&gateway.ask(request)), "order", "{request}");
    }
    assert_eq!(gateway.ask_json(&prepare), json!("memory"));
    assert_eq!(code(&gateway.ask_json(&prepare)), "order", "a second twin");
    assert_eq!(code(&gateway.ask("resume")), "order", "an empty twin never runs");
    assert_eq!(code(&gateway.ask("renew")), "order", "an empty twin has no generation");
    assert_eq!(served.calls(), ["prepare"]);
}

#[test]
fn state_that_does_not_fit_is_refused_and_the_twin_stays_empty() {
    let served = Served::new(Plain::incoming());
    let mut gateway = Gateway::attach(served.path());
    gateway.ask_json(&json!({"prepare": {"machine": machine()}}));
    gateway.send(&json!("restore-state"), &[1, 2, 3]);
    assert_eq!(gateway.receive().unwrap()["answer"]["refused"]["code"], "failed");
    assert_eq!(code(&gateway.ask("resume")), "order");
}

#[test]
fn unknown_requests_are_refused_and_the_connection_lives_on() {
    let served = Served::new(Plain::running());
    let mut gateway = Gateway::attach(served.path());
    for request in [json!("explode"), json!({"throttle": {"percent": 5, "more": 1}}), json!(null), json!({"prepare": {}}), json!(7)] {
        assert_eq!(code(&gateway.ask_json(&request)), "unknown", "{request}");
    }
    assert!(gateway.ask("status")["status"]["state"].is_string());
}

#[test]
fn other_versions_are_refused_by_number() {
    let served = Served::new(Plain::running());
    let mut gateway = Gateway::connect(served.path());
    let answer = gateway.ask_json(&json!({"hello": {"version": 2, "role": "control"}}));
    assert_eq!(code(&answer), "version");
    assert!(answer["refused"]["reason"].as_str().unwrap().contains("version 1"));
}

#[test]
fn a_second_gateway_is_refused_and_an_observer_only_looks() {
    let served = Served::new(Plain::running());
    let mut first = Gateway::attach(served.path());
    let mut second = Gateway::connect(served.path());
    assert_eq!(code(&second.ask_json(&json!({"hello": {"version": 1, "role": "control"}}))), "busy");
    assert_eq!(code(&second.ask("pause")), "order", "a refused hello is no hello");
    second.ask_json(&json!({"hello": {"version": 1, "role": "observe"}}));
    assert!(second.ask("status")["status"]["state"].is_string());
    assert!(second.ask("machine")["machine"]["kind"].is_string());
    for request in ["pause", "renew", "quit", "memory", "harvest"] {
        assert_eq!(code(&second.ask(request)), "forbidden", "{request}");
    }
    assert_eq!(first.ask("pause"), json!("done"));
    assert_eq!(served.calls(), ["pause"]);
}

#[test]
fn malformed_messages_end_the_connection_and_nothing_else() {
    let raw = |header: u32, payload: u32, rest: &[u8]| [&header.to_le_bytes()[..], &payload.to_le_bytes()[..], rest].concat();
    let pause = br#"{"sequence":9,"request":"pause"}"#;
    let state = br#"{"sequence":9,"request":"restore-state"}"#;
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
    let served = Served::new(Plain::running());
    for bytes in [
        raw(u32::MAX, 0, b""),
        raw(0, 0, b""),
        raw(4, 0, b"nope"),
        raw(3, 0, b"\xff\xfe\xfd"),
        raw(length(pause), 1, &[pause, &b"x"[..]].concat()),
        raw(length(pause), u32::MAX, pause),
        raw(length(state), u32::MAX, state),
    ] {
        let mut gateway = Gateway::attach(served.path());
        gateway.stream.write_all(&bytes).unwrap();
        let answer = gateway.receive().unwrap();
        assert_eq!((answer["sequence"].as_u64(), code(&answer["answer"])), (Some(0), "malformed"), "{bytes:?}");
        assert!(gateway.is_closed());
    }
    assert!(served.calls().is_empty());
}

#[test]
fn descriptors_from_a_gateway_are_closed_and_refused() {
    let served = Served::new(Plain::running());
    let gateway = Gateway::attach(served.path());
    let file = tempfile::tempfile().unwrap();
    let header = json!({"sequence": 2, "request": "pause"});
    send_message(&gateway.stream, &header, &[], Some(file.as_fd()), after(WAIT)).unwrap();
    assert_eq!(code(&gateway.receive().unwrap()["answer"]), "malformed");
    assert!(served.calls().is_empty());
}

#[test]
fn more_connections_than_the_limit_are_turned_away_with_a_reason() {
    let served = Served::new(Plain::running());
    let held: Vec<_> = (0..crate::limits::ATTACH_CONNECTIONS_MAX).map(|_| Gateway::connect(served.path())).collect();
    let gateway = Gateway::connect(served.path());
    assert_eq!(code(&gateway.receive().unwrap()["answer"]), "busy");
    drop(held);
    assert!(AttachedSource::attach(served.path(), "vm-1", timeouts()).is_ok(), "the room is given back");
}

/// Sends one message with several descriptors attached.
pub(super) fn send_with_descriptors(stream: &UnixStream, header: &Value, file: &File, count: usize) {
    let header = serde_json::to_vec(header).unwrap();
    let bytes = [&u32::try_from(header.len()).unwrap().to_le_bytes()[..], &[0; 4], &header].concat();
    let many = vec![file.as_fd(); count];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(count))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many)));
    rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, rustix::net::SendFlags::empty()).unwrap();
}

#[test]
fn a_request_that_is_cut_or_damaged_at_any_byte_is_not_performed() {
    let served = Served::new(Plain::running());
    let header = br#"{"sequence":9,"request":"pause"}"#;
    let whole = [&u32::try_from(header.len()).unwrap().to_le_bytes()[..], &[0; 4], header].concat();
    for at in 0..whole.len() {
        let mut gateway = Gateway::attach(served.path());
        gateway.stream.write_all(&whole[..at]).unwrap();
    }
    let harmless = whole.len() - "9,\"request\":\"pause\"}".len();
    for at in (0..whole.len()).filter(|at| *at != harmless) {
        for flip in [0x01, 0x80, 0xff] {
            let mut gateway = Gateway::attach(served.path());
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            gateway.stream.write_all(&damaged).unwrap();
            gateway.stream.shutdown(std::net::Shutdown::Write).unwrap();
            while gateway.receive().is_some() {}
        }
    }
    let mut gateway = Gateway::attach(served.path());
    assert!(served.calls().is_empty(), "{:?}", served.calls());
    assert_eq!(gateway.ask("pause"), json!("done"));
}
