//! What a monitor may say, and what comes of it.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::disks;
use super::super::monitor::Monitor;
use super::super::qmp::{Notice, Qmp};
use crate::hypervisor::{Disk, HypervisorError};
use crate::limits;

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":1},"package":"x"},"capabilities":["oob"]}}"#;
const WITHIN: Duration = Duration::from_secs(5);

/// A monitor that greets, takes the first command, and goes on as told.
struct Fake {
    directory: TempDir,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn new(greeting: Vec<u8>, goes_on: impl FnOnce(&mut UnixStream, &mut dyn FnMut() -> Value) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("qmp")).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&greeting).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut next = move || {
                let mut line = String::new();
                match reader.read_line(&mut line) {
                    Ok(read) if read > 0 => serde_json::from_str(&line).unwrap(),
                    _ => Value::Null,
                }
            };
            goes_on(&mut stream, &mut next);
            // The client hangs up.
            while !next().is_null() {}
        });
        Self { directory, heard: Arc::default() }
    }

    fn polite(goes_on: impl FnOnce(&mut UnixStream, &mut dyn FnMut() -> Value) + Send + 'static) -> Self {
        Self::new(format!("{GREETING}\n").into_bytes(), |stream, next| {
            let first = next();
            assert_eq!(first["execute"], "qmp_capabilities");
            answer(stream, &first["id"]);
            goes_on(stream, next);
        })
    }

    fn connect(&self, within: Duration) -> Result<Qmp, HypervisorError> {
        let heard = Arc::clone(&self.heard);
        let listener = move |notice: Notice<'_>| {
            heard.lock().unwrap().push(match notice {
                Notice::Event { name, data } => format!("{name} {data}"),
                Notice::Ended(why) => format!("ended: {why}"),
            });
        };
        Qmp::connect(&self.directory.path().join("qmp"), "vm-1", within, Box::new(listener))
    }
}

fn say(stream: &mut UnixStream, text: &str) {
    // A client that is gone has heard enough.
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.write_all(b"\n"));
}

fn answer(stream: &mut UnixStream, id: &Value) {
    say(stream, &json!({ "return": {}, "id": id }).to_string());
}

fn chain(error: &HypervisorError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn answers_are_told_apart_from_events_and_unknown_ones_are_passed_on() {
    let fake = Fake::polite(|stream, next| {
        say(stream, r#"{"event":"MIGRATION","data":{"status":"active"},"timestamp":{"seconds":1,"microseconds":2}}"#);
        let request = next();
        assert_eq!(request["arguments"]["fdname"], "x");
        say(stream, r#"{"event":"WHAT_COMES_IN_QEMU_99","data":[1,{"a":null}]}"#);
        say(stream, r#"{"event":"STOP"}"#);
        say(stream, &json!({ "id": request["id"], "return": { "status": "new", "more": [] } }).to_string());
        let request = next();
        say(stream, &json!({ "id": request["id"], "error": { "class": "GenericError", "desc": "no\u{1b}[2J" } }).to_string());
    });
    let qmp = fake.connect(WITHIN).unwrap();
    assert_eq!(qmp.version().numbers, (7, 2, 1));
    let answer = qmp.execute("getfd", json!({ "fdname": "x" })).unwrap();
    assert_eq!(answer["status"], "new");
    let refused = qmp.execute("cont", Value::Null).unwrap_err();
    assert_eq!(refused.to_string(), "VMM of `vm-1` refused `cont`: no\\u{1b}[2J");
    let heard = fake.heard.lock().unwrap().clone();
    assert_eq!(heard, [r#"MIGRATION {"status":"active"}"#, r#"WHAT_COMES_IN_QEMU_99 [1,{"a":null}]"#, "STOP null"]);
}

#[test]
fn a_qemu_that_never_lets_go_of_a_migration_is_told_from_one_that_soon_does() {
    let monitor = |states: &'static [(bool, &'static str)]| {
        let fake = Fake::polite(move |stream, next| {
            for (held, status) in states.iter().chain(std::iter::repeat(&states[states.len() - 1])) {
                let request = next();
                let kind = if *held { "migration" } else { "block-node" };
                say(stream, &json!({ "id": request["id"], "return": [{ "type": "chardev", "id": "x" }, { "type": kind }] }).to_string());
                if *held {
                    let request = next();
                    say(stream, &json!({ "id": request["id"], "return": { "status": status } }).to_string());
                }
                if request.is_null() {
                    return;
                }
            }
        });
        let monitor = Monitor::connect(&fake.directory.path().join("qmp"), "vm-1", Duration::from_millis(500)).unwrap();
        monitor.ensure_let_go()
    };
    monitor(&[(true, "failed"), (true, "failed"), (false, "failed")]).unwrap();
    monitor(&[(true, "active")]).unwrap();
    let error = monitor(&[(true, "failed")]).unwrap_err().to_string();
    assert!(error.contains("a restart of its QEMU"), "{error}");
}

#[test]
fn a_descriptor_goes_with_its_command() {
    let fake = Fake::new(format!("{GREETING}\n").into_bytes(), |stream, next| {
        let first = next();
        answer(stream, &first["id"]);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 4096];
        let received =
            rustix::net::recvmsg(&*stream, &mut [std::io::IoSliceMut::new(&mut bytes)], &mut control, rustix::net::RecvFlags::CMSG_CLOEXEC)
                .unwrap();
        let request: Value = serde_json::from_slice(&bytes[..received.bytes]).unwrap();
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        UnixStream::from(descriptors.into_iter().next().unwrap()).write_all(b"through it").unwrap();
        answer(stream, &request["id"]);
    });
    let qmp = fake.connect(WITHIN).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qmp.execute_with("getfd", json!({ "fdname": "x" }), std::os::fd::AsFd::as_fd(&theirs)).unwrap();
    drop(theirs);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut ours, &mut text).unwrap();
    assert_eq!(text, "through it");
}

#[test]
fn what_is_none_of_qmp_ends_the_connection_and_every_wait() {
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let long = "x".repeat(limits::QMP_LINE_BYTES_MAX + 10);
    for (says, expected) in [
        ("hello", "none of QMP"),
        ("{}", "neither a result nor an error"),
        (r#"{"return":{},"error":{"desc":"both"},"id":2}"#, "neither a result nor an error"),
        (r#"{"return":{}}"#, "an answer to no question"),
        (r#"{"return":{},"id":77}"#, "an answer to no question"),
        (r#"{"return":{},"id":"2"}"#, "none of QMP"),
        ("\u{fffd}\u{1b}[31m", "none of QMP"),
        (deep.as_str(), "none of QMP"),
        (long.as_str(), "a line of more than"),
    ] {
        let line = says.to_owned();
        let fake = Fake::polite(move |stream, next| {
            next();
            say(stream, &line);
        });
        let qmp = fake.connect(WITHIN).unwrap();
        let error = qmp.execute("query-status", Value::Null).unwrap_err();
        assert!(chain(&error).contains(expected) && !chain(&error).contains('\u{1b}'), "{}: {expected}", chain(&error));
        let again = qmp.execute("query-status", Value::Null).unwrap_err();
        assert!(matches!(again, HypervisorError::Unreachable { .. }), "{again}");
    }
}

#[test]
fn a_greeting_that_is_none_and_one_that_does_not_come_are_errors() {
    for greeting in ["", "{}\n", "SSH-2.0\n", "{\"QMP\":{\"version\":{\"qemu\":{\"major\":-1,\"minor\":0}}}}\n"] {
        let fake = Fake::new(greeting.as_bytes().to_vec(), |_, _| {});
        let error = fake.connect(Duration::from_millis(200)).unwrap_err();
        let expected = if greeting.is_empty() { "another client may have the monitor" } else { "none of QMP" };
        assert!(chain(&error).contains(expected), "{}", chain(&error));
    }
}

#[test]
fn a_monitor_that_falls_silent_is_not_waited_for() {
    let fake = Fake::polite(|_, next| drop(next()));
    let qmp = fake.connect(Duration::from_millis(200)).unwrap();
    let error = qmp.execute("query-status", Value::Null).unwrap_err();
    assert!(chain(&error).contains("no answer to `query-status`"), "{}", chain(&error));
    assert!(qmp.execute("cont", Value::Null).is_err());
}

#[test]
fn the_listener_hears_of_the_end() {
    let fake = Fake::polite(|stream, next| {
        next();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    let qmp = fake.connect(WITHIN).unwrap();
    assert!(qmp.execute("quit", Value::Null).is_err());
    let heard = || fake.heard.lock().unwrap().last().cloned();
    while heard().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(heard().unwrap(), "ended: QEMU closed the connection");
}

#[test]
fn an_answer_of_another_form_is_a_broken_protocol() {
    let fake = Fake::polite(|stream, next| {
        let request = next();
        say(stream, &json!({ "id": request["id"], "return": [1, 2] }).to_string());
    });
    let qmp = fake.connect(WITHIN).unwrap();
    let error = qmp.ask::<String>("qom-get", Value::Null).unwrap_err();
    assert!(matches!(&error, HypervisorError::Protocol { reason, .. } if reason.contains("`qom-get`")), "{error}");
}

/// As 10.0 answers, where an overlay says of itself how the encrypted image below it is opened, and so its own name does not.
#[test]
fn an_encrypted_image_below_another_is_not_mirrored() {
    for (below, says) in [(true, "disk `d0` is encrypted, and would arrive in the clear"), (false, "no such driver")] {
        let fake = Fake::polite(move |stream, next| {
            let backing = json!({ "virtual-size": 65536, "filename": "/d/e.qcow2", "format": "qcow2", "encrypted": below });
            let image = json!({ "virtual-size": 65536, "filename": "/d/o.qcow2", "format": "qcow2", "backing-image": backing });
            let inserted = json!({ "node-name": "n0", "ro": false, "encrypted": false, "file": "/d/o.qcow2", "image": image });
            let (block, request) = (json!([{ "device": "", "qdev": "d0", "inserted": inserted }]), next());
            assert_eq!(request["execute"], "query-block");
            say(stream, &json!({ "id": request["id"], "return": block }).to_string());
            let request = next();
            let error = json!({ "class": "GenericError", "desc": "no such driver" });
            if !request.is_null() {
                assert!(!below, "{request}");
                say(stream, &json!({ "id": request["id"], "error": error }).to_string());
            }
        });
        let monitor = Monitor::connect(&fake.directory.path().join("qmp"), "vm-1", WITHIN).unwrap();
        let disk = Disk { device: "d0".to_owned(), bytes: 65536 };
        let error = disks::mirror(&monitor, &fake.directory.path().join("nbd"), &[disk], false).unwrap_err();
        assert!(chain(&error).contains(says), "{}", chain(&error));
    }
}
