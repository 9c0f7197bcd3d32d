//! A VMM that answers what it likes: typed errors, no panic, nothing mapped that could vanish, nothing leaked.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::{Value, json};

use super::super::wire::{after, receive_header, receive_payload, send_message};
use super::hostile_gateway::send_with_descriptors;
use super::*;
use crate::hypervisor::{HypervisorError, PagedSource};
use crate::limits;

const WAIT: Duration = Duration::from_secs(5);

/// How the VMM answers one request, if not honestly.
type Answer = fn(&UnixStream, u64) -> bool;

fn quick() -> Timeouts {
    Timeouts { request: Duration::from_millis(300), state: Duration::from_millis(300) }
}

fn send(stream: &UnixStream, sequence: u64, answer: &Value, payload: &[u8], file: Option<&File>) -> bool {
    let header = json!({"sequence": sequence, "answer": answer});
    send_message(stream, &header, payload, file.map(AsFd::as_fd), after(WAIT)).is_ok()
}

fn raw(stream: &UnixStream, header: u32, payload: u32, rest: &[u8]) -> bool {
    let mut stream = stream;
    stream.write_all(&[&header.to_le_bytes()[..], &payload.to_le_bytes()[..], rest].concat()).is_ok()
}

fn honest(stream: &UnixStream, sequence: u64, request: &str) -> bool {
    let hello =
        json!({"hello": {"version": 1, "instance": "i", "state": "paused", "prepared": false, "tracking": true, "throttle_percent": 0}});
    let bitmap = vec![0; usize::try_from(PAGES.div_ceil(64) * 8).unwrap()];
    match request {
        "hello" => send(stream, sequence, &hello, &[], None),
        "machine" => send(stream, sequence, &json!({"machine": machine()}), &[], None),
        "memory" => send(stream, sequence, &json!("memory"), &[], Some(&memory_file(PAGES * 4096).unwrap())),
        "harvest" => send(stream, sequence, &json!({"harvest": {"pages": PAGES}}), &bitmap, None),
        "save-state" => send(stream, sequence, &json!("state"), &[1], None),
        _ => send(stream, sequence, &json!("done"), &[], None),
    }
}

/// Serves connections until the listener's end; `lie` answers requests of the name `about`.
fn vmm(about: &'static str, lie: Answer) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            while let Ok(received) = receive_header(&stream, after(WAIT), WAIT) {
                receive_payload(&stream, received.payload_bytes, usize::MAX, after(WAIT)).unwrap();
                let header: Value = serde_json::from_slice(&received.header).unwrap();
                let request = &header["request"];
                let name = request.as_str().or_else(|| Some(request.as_object()?.keys().next()?.as_str())).unwrap();
                let sequence = header["sequence"].as_u64().unwrap();
                let said = if name == about { lie(&stream, sequence) } else { honest(&stream, sequence, name) };
                if !said {
                    break;
                }
            }
        }
    });
    (dir, path)
}

/// Attaches, then asks for everything; the first error.
fn converse(path: &Path) -> Result<(), HypervisorError> {
    let mut source = AttachedSource::attach(path, "vm-1", quick())?;
    source.start_tracking()?;
    source.harvest()?;
    source.pause()?;
    source.save_state()?;
    source.resume()
}

fn check(about: &'static str, lie: Answer, expected: &str) {
    let (_dir, path) = vmm(about, lie);
    let error = converse(&path).unwrap_err();
    let text = format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
    assert!(text.contains(expected), "{about}: `{text}` does not contain `{expected}`");
}

#[test]
fn an_honest_vmm_is_believed() {
    let (_dir, path) = vmm("nothing", |_, _| false);
    converse(&path).unwrap();
}

#[test]
fn lengths_that_lie_are_refused() {
    check("machine", |s, _| raw(s, u32::MAX, 0, b""), "header has");
    check("pause", |s, _| raw(s, 29, u32::MAX, br#"{"sequence":6,"answer":"done"}"#), "broke its protocol");
    check("pause", |s, n| send(s, n, &json!("done"), b"x", None), "payload has 1 bytes");
    check("harvest", |s, n| send(s, n, &json!({"harvest": {"pages": PAGES}}), &[0; 16], None), "bitmap has 16 bytes: expected 24");
    check("harvest", |s, n| send(s, n, &json!({"harvest": {"pages": PAGES}}), &[0; 32], None), "payload has 32 bytes");
    check("harvest", |s, n| send(s, n, &json!({"harvest": {"pages": PAGES}}), &[255; 24], None), "beyond guest RAM");
    check("harvest", |s, n| send(s, n, &json!({"harvest": {"pages": 1}}), &[0; 24], None), "belongs to another");
    check("save-state", |s, n| raw(s, 32, 1 << 31, format!(r#"{{"sequence":{n},"answer":"state"}}  "#).as_bytes()), "payload has");
}

#[test]
fn descriptors_that_are_no_guest_memory_are_refused() {
    check("memory", |s, n| send(s, n, &json!("memory"), &[], None), "wrong number of file descriptors");
    check("pause", |s, n| send(s, n, &json!("done"), &[], Some(&tempfile::tempfile().unwrap())), "wrong number of file descriptors");
    check("memory", |s, n| send(s, n, &json!("memory"), &[], Some(&tempfile::tempfile().unwrap())), "memory file");
    check("memory", |s, n| send(s, n, &json!("memory"), &[], Some(&File::open("/dev/zero").unwrap())), "memory file");
    check("memory", |s, n| send(s, n, &json!("memory"), &[], Some(&memory_file(4096).unwrap())), "the layout needs");
    let unsealed: Answer = |s, n| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("t", flags).unwrap());
        file.set_len(PAGES * 4096).unwrap();
        send(s, n, &json!("memory"), &[], Some(&file))
    };
    check("memory", unsealed, "not sealed against shrinking");
}

#[test]
fn a_memory_file_that_was_accepted_cannot_shrink() {
    let file = memory_file(PAGES * 4096).unwrap();
    assert!(file.set_len(4096).is_err() && file.set_len(PAGES * 8192).is_err());
    assert_eq!(file.metadata().unwrap().len(), PAGES * 4096);
}

#[test]
fn answers_for_another_request_are_not_taken() {
    check("pause", |s, n| send(s, n - 1, &json!("done"), &[], None), "expected");
    check("pause", |s, n| send(s, n + 1, &json!("done"), &[], None), "expected");
    check("pause", |s, n| send(s, n, &json!("state"), &[], None), "belongs to another");
    check("save-state", |s, n| send(s, n, &json!("done"), &[], None), "belongs to another");
    check("machine", |s, n| send(s, n, &json!({"incompatible": {"lacks": ["x"]}}), &[], None), "belongs to another");
    check("pause", |s, _| send(s, 0, &json!("done"), &[], None), "sequence 0");
    check("hello", |s, n| send(s, n, &json!("done"), &[], None), "belongs to another");
}

#[test]
fn a_late_answer_is_never_taken_for_the_next_one() {
    // The VMM answers `pause` after the gateway gave up; the gateway's `resume` must hear its own answer.
    let (_dir, path) = vmm("pause", |s, n| {
        std::thread::sleep(Duration::from_millis(400));
        send(s, n, &json!({"refused": {"code": "failed", "reason": "late"}}), &[], None)
    });
    let mut source = AttachedSource::attach(&path, "vm-1", quick()).unwrap();
    assert!(matches!(source.pause(), Err(HypervisorError::Unreachable { .. })));
    source.resume().unwrap();
}

#[test]
fn malformed_and_silent_vmms_are_errors_in_bounded_time() {
    check("hello", |s, _| raw(s, 4, 0, b"{{{{"), "header of `hello`");
    check("hello", |_, _| false, "closed the connection");
    check("hello", |_, _| true, "no answer in time");
    check("pause", |_, _| false, "closed the connection");
    check("harvest", |s, n| raw(s, 44, 24, format!(r#"{{"sequence":{n},"answer":{{"harvest":{{"pages":130}}}}}}"#).as_bytes()), "");
    let drip: Answer = |s, _| {
        raw(s, 100, 0, b"");
        let mut stream = s;
        (0..30).all(|_| {
            std::thread::sleep(Duration::from_millis(30));
            stream.write_all(&[1]).is_ok()
        })
    };
    check("pause", drip, "does not answer");
}

#[test]
fn machines_that_are_none_are_refused() {
    check("machine", |s, n| send(s, n, &json!({"machine": Machine { regions: vec![], ..machine() }}), &[], None), "regions");
    check("machine", |s, n| send(s, n, &json!({"machine": Machine { kind: "k".repeat(100), ..machine() }}), &[], None), "kind");
    let large: Answer = |s, n| {
        let profile = json!("p".repeat(limits::MACHINE_BYTES_MAX));
        send(s, n, &json!({"machine": Machine { profile, ..machine() }}), &[], None)
    };
    check("machine", large, "at most");
}

#[test]
fn words_of_a_vmm_are_cut_and_cannot_write_on_a_terminal() {
    let lie: Answer =
        |s, n| send(s, n, &json!({"refused": {"code": "failed", "reason": format!("\u{1b}[2J{}", "x".repeat(5000))}}), &[], None);
    let (_dir, path) = vmm("pause", lie);
    let text = converse(&path).unwrap_err().to_string();
    assert!(text.contains("\\u{1b}[2J") && text.len() < limits::REASON_BYTES_MAX + 100, "{text}");
}

fn descriptors_to(path: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok()).filter(|link| link == path).count()
}

#[test]
fn surplus_descriptors_are_closed_and_not_leaked() {
    static MARK: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let dir = tempfile::tempdir().unwrap();
    let mark = MARK.get_or_init(|| dir.path().join("mark"));
    std::fs::write(mark, b"x").unwrap();
    for (about, lie) in [
        (
            "memory",
            (|s, n| {
                send_with_descriptors(s, &json!({"sequence": n, "answer": "memory"}), &File::open(MARK.get().unwrap()).unwrap(), 2);
                true
            }) as Answer,
        ),
        ("memory", |s, n| {
            send_with_descriptors(s, &json!({"sequence": n, "answer": "memory"}), &File::open(MARK.get().unwrap()).unwrap(), 100);
            true
        }),
        ("memory", |s, n| {
            send_with_descriptors(s, &json!({"sequence": n, "answer": "memory"}), &File::open(MARK.get().unwrap()).unwrap(), 1);
            true
        }),
        ("pause", |s, n| {
            send_with_descriptors(s, &json!({"sequence": n, "answer": "done"}), &File::open(MARK.get().unwrap()).unwrap(), 1);
            true
        }),
        ("hello", |s, n| {
            send_with_descriptors(s, &json!({"sequence": n, "answer": "done"}), &File::open(MARK.get().unwrap()).unwrap(), 2);
            true
        }),
    ] {
        let (_dir, path) = vmm(about, lie);
        for _ in 0..5 {
            assert!(converse(&path).is_err());
        }
    }
    // The VMM's threads close theirs when the gateway has gone.
    let patience = std::time::Instant::now() + WAIT;
    while descriptors_to(mark) > 0 && std::time::Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(descriptors_to(mark), 0);
}
