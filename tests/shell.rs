//! The command line as a person or a script meets it: the real binary against a scripted gateway.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use sealane::control::{MigrationList, MigrationSchema, MigrationState, MigrationView, PlanView, VmList, VmState, VmView};
use sealane::telemetry::{ErrorClass, Outcome, Phase, Problem, Progress, Report, RunningOn};
use sealane::types::{Epoch, MigrationId, Side, VmUuid};
use serde_json::{Value, json};

const ID: MigrationId = MigrationId([0x5f; 16]);

/// One scripted answer: status, body, and whether the body waits for a request to be seen first.
#[derive(Clone)]
struct Answer {
    status: u16,
    body: String,
    /// Sent only after this request was seen.
    then: Option<(&'static str, String)>,
}

fn ok(body: &impl serde::Serialize) -> Answer {
    Answer { status: 200, body: serde_json::to_string(body).unwrap() + "\n", then: None }
}

fn refuse(problem: &Problem) -> Answer {
    Answer { status: sealane::control::status_of(problem), ..ok(problem) }
}

type Script = Vec<(&'static str, Vec<Answer>)>;

/// A gateway that answers from a script and remembers what it was asked.
struct Gateway {
    directory: tempfile::TempDir,
    seen: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Gateway {
    fn new(script: Script) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("api.sock")).unwrap();
        let seen = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let script = Arc::new(Mutex::new(script));
        let shared = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (script, seen) = (script.clone(), shared.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &script, &seen));
            }
        });
        Self { directory, seen }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    fn seen(&self) -> Vec<String> {
        self.seen.0.lock().unwrap().clone()
    }

    fn wait_for(&self, request: &str) {
        wait(&self.seen, request);
    }

    fn command(&self, line: &str) -> Command {
        let mut command = sealane(line);
        command.arg("--socket").arg(self.socket());
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }
}

fn wait(seen: &(Mutex<Vec<String>>, Condvar), request: &str) {
    let there = |seen: &mut Vec<String>| !seen.iter().any(|line| line.starts_with(request));
    drop(seen.1.wait_while(seen.0.lock().unwrap(), there).unwrap());
}

fn serve(mut stream: UnixStream, script: &Mutex<Script>, seen: &(Mutex<Vec<String>>, Condvar)) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if head.is_empty() {
            head = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let answer = {
        let mut script = script.lock().unwrap();
        let answers = script.iter_mut().find(|(request, _)| *request == head).map(|(_, answers)| answers);
        match answers {
            Some(answers) if answers.len() > 1 => answers.remove(0),
            Some(answers) => answers[0].clone(),
            None => refuse(&Problem::new(ErrorClass::Misuse, format!("no script for {head}"))),
        }
    };
    seen.0.lock().unwrap().push(format!("{head} {}", String::from_utf8(body).unwrap()));
    seen.1.notify_all();
    let head = format!("HTTP/1.1 {} X\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n", answer.status);
    let _ = stream.write_all((head + &answer.body).as_bytes());
    if let Some((request, rest)) = answer.then {
        wait(seen, request);
        let _ = stream.write_all(rest.as_bytes());
    }
}

fn sealane(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
    command.args(line.split_whitespace()).env_remove("SEALANE_SOCKET").env_remove("SEALANE_CONFIG").stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn check(output: &Output, exit: i32, stdout: &[&str], stderr: &[&str]) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let all = format!("exit {:?}\n--- stdout\n{out}\n--- stderr\n{err}", output.status.code());
    assert_eq!(output.status.code(), Some(exit), "{all}");
    for part in stdout {
        assert!(out.contains(part), "stdout lacks {part:?}\n{all}");
    }
    for part in stderr {
        assert!(err.contains(part), "stderr lacks {part:?}\n{all}");
    }
    assert!(!out.contains('\x1b') && !err.contains('\x1b'), "colour without a terminal\n{all}");
}

fn object(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output.stdout)))
}

fn view(state: MigrationState) -> MigrationView {
    MigrationView {
        schema: MigrationSchema,
        id: ID,
        vm: "web".parse().unwrap(),
        peer: "gw-b".parse().unwrap(),
        side: Side::Source,
        state,
        progress: None,
        report: None,
        records: Vec::new(),
    }
}

fn progress(phase: Phase) -> String {
    let mut progress = Progress::new(ID);
    progress.phase = phase;
    serde_json::to_string(&progress).unwrap() + "\n"
}

fn report(state: Outcome, place: RunningOn, error: Option<Problem>) -> String {
    let mut report = Report::new(ID, "web".parse().unwrap(), state, place);
    report.error = error;
    serde_json::to_string(&report).unwrap() + "\n"
}

const START: &str = "POST /v1/migrations";
const EVENTS: &str = "GET /v1/migrations/5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f/events";
const CANCEL: &str = "POST /v1/migrations/5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f/cancel";

fn stream(body: String) -> Answer {
    Answer { status: 200, body, then: None }
}

fn migrating(events: Answer) -> Gateway {
    Gateway::new(vec![
        (START, vec![ok(&view(MigrationState::Active))]),
        (EVENTS, vec![events]),
        (CANCEL, vec![ok(&view(MigrationState::Cancelling))]),
    ])
}

#[test]
fn migrate_shows_phases_on_stderr_and_prints_one_report_on_stdout() {
    let events = progress(Phase::Connect)
        + &progress(Phase::Memory)
        + &progress(Phase::Connect)
        + &report(Outcome::Completed, RunningOn::Destination, None);
    let gateway = migrating(stream(events));
    let output = gateway.run("migrate web --to gw-b --bandwidth 1Gbit --max-downtime 300ms --json");
    check(&output, 0, &[], &["connect 0 %", "memory 0 %, round 0"]);
    assert_eq!(object(&output)["schema"], "sealane.report/1");
    assert_eq!(text(&output.stderr).matches("connect").count(), 1, "progress ran backwards");
    let asked: Value = serde_json::from_str(gateway.seen()[0].strip_prefix("POST /v1/migrations ").unwrap()).unwrap();
    assert_eq!((&asked["bandwidth_bytes_per_second"], &asked["max_downtime_seconds"]), (&json!(125_000_000), &json!(0.3)));
    let output = gateway.run("migrate web --to gw-b");
    check(&output, 0, &["completed; the VM runs on the destination", "verified"], &[]);
}

#[test]
fn the_exit_code_is_the_migrations() {
    let problem = |class| Some(Problem::new(class, "why").with_running_on(RunningOn::Source).with_hint("do this"));
    for (state, place, error, exit) in [
        (Outcome::Failed, RunningOn::Source, problem(ErrorClass::Local), 1),
        (Outcome::Failed, RunningOn::Source, problem(ErrorClass::Denied), 3),
        (Outcome::Failed, RunningOn::Source, problem(ErrorClass::PeerUnreachable), 4),
        (Outcome::Cancelled, RunningOn::Source, problem(ErrorClass::Cancelled), 5),
        (Outcome::InDoubt, RunningOn::NeitherYet, problem(ErrorClass::InDoubt), 6),
        (Outcome::Failed, RunningOn::Source, problem(ErrorClass::TimedOut), 7),
    ] {
        let gateway = migrating(stream(report(state, place, error)));
        check(&gateway.run("migrate web --to gw-b"), exit, &["web 5f5f"], &["error: why\nthe VM runs on the source\n\nhint: do this\n"]);
        check(&gateway.run(&format!("watch {ID} --json")), exit, &["sealane.report/1"], &[]);
    }
}

#[test]
fn a_refusal_says_what_where_the_vm_runs_and_what_to_do() {
    let problem =
        Problem::new(ErrorClass::Denied, "policy `no-dc2` forbids to move `web`").with_running_on(RunningOn::Source).with_hint("ask them");
    let gateway = Gateway::new(vec![(START, vec![refuse(&problem)])]);
    let output = gateway.run("migrate web --to gw-b --json");
    check(&output, 3, &[], &["error: policy `no-dc2` forbids to move `web`\nthe VM runs on the source\n\nhint: ask them\n"]);
    let object = object(&output);
    assert_eq!(
        (&object["schema"], &object["code"], &object["running_on"]),
        (&json!("sealane.problem/1"), &json!("denied"), &json!("source"))
    );
}

#[test]
fn without_a_gateway_nothing_has_happened_and_the_hint_says_how_to_start_it() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let missing = sealane("migrate web --to gw-b --socket").arg(&socket).output().unwrap();
    let expected = format!(
        "error: no gateway listens on `{}`: No such file or directory (os error 2)\nthe VM runs on the source\n\nhint: start it",
        socket.display()
    );
    check(&missing, 2, &[], &[&expected]);
    drop(UnixListener::bind(&socket).unwrap());
    check(&sealane("vms --socket").arg(&socket).output().unwrap(), 2, &[], &["no gateway listens on", "Connection refused"]);
}

fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

#[test]
fn the_first_interrupt_cancels_and_the_command_waits_for_the_end() {
    let end = report(Outcome::Cancelled, RunningOn::Source, Some(Problem::new(ErrorClass::Cancelled, "cancelled by `alice`")));
    let gateway = migrating(Answer { status: 200, body: progress(Phase::Memory), then: Some((CANCEL, end)) });
    let child = gateway.command("migrate web --to gw-b").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    gateway.wait_for(EVENTS);
    interrupt(&child);
    check(&child.wait_with_output().unwrap(), 5, &["cancelled; the VM runs on the source"], &["cancelled by `alice`"]);
    assert_eq!(gateway.seen().iter().filter(|line| line.starts_with(CANCEL)).count(), 1);
}

#[test]
fn the_second_interrupt_leaves_the_migration_alone() {
    let gateway = migrating(Answer { status: 200, body: progress(Phase::Memory), then: Some(("never", String::new())) });
    let mut child = gateway.command("migrate web --to gw-b").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    gateway.wait_for(EVENTS);
    interrupt(&child);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("press Ctrl-C again")));
    interrupt(&child);
    assert!(lines.any(|line| line.unwrap().contains("detached; `sealane status 5f5f5f5f` tells")));
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert_eq!(gateway.seen().iter().filter(|line| line.starts_with(CANCEL)).count(), 1);
}

#[test]
fn an_interrupt_before_the_gateway_has_answered_is_not_forgotten() {
    let end = report(Outcome::Cancelled, RunningOn::Source, Some(Problem::new(ErrorClass::Cancelled, "cancelled")));
    let late = Answer { status: 200, body: String::new(), then: Some(("nudge", ok(&view(MigrationState::Active)).body)) };
    let events = Answer { status: 200, body: String::new(), then: Some((CANCEL, end)) };
    let cancel = ok(&view(MigrationState::Cancelling));
    let gateway = Gateway::new(vec![(START, vec![late]), (EVENTS, vec![events]), (CANCEL, vec![cancel])]);
    let mut child = gateway.command("migrate web --to gw-b").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    gateway.wait_for(START);
    interrupt(&child);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("will cancel as soon as the gateway answers")));
    gateway.seen.0.lock().unwrap().push("nudge".to_owned());
    gateway.seen.1.notify_all();
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn a_gateway_that_restarts_is_found_again() {
    let gateway = Gateway::new(vec![(
        EVENTS,
        vec![stream(progress(Phase::Memory)), stream(progress(Phase::Connect) + &report(Outcome::Completed, RunningOn::Destination, None))],
    )]);
    let output = gateway.run(&format!("watch {ID}"));
    check(&output, 0, &["completed"], &["the gateway went away; looking for it"]);
}

#[test]
fn detach_prints_the_id_alone() {
    let output = migrating(stream(String::new())).run("migrate web --to gw-b --detach");
    check(&output, 0, &[], &[]);
    assert_eq!((text(&output.stdout), text(&output.stderr)), (format!("{ID}\n"), String::new()));
}

#[test]
fn watch_prints_every_event_as_a_line() {
    let events = progress(Phase::Connect) + &progress(Phase::Memory) + &report(Outcome::Completed, RunningOn::Destination, None);
    let output = migrating(stream(events)).run(&format!("watch {ID} --json"));
    let schemas: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["schema"].clone()).collect();
    assert_eq!(schemas, ["sealane.progress/1", "sealane.progress/1", "sealane.report/1"]);
}

#[test]
fn the_beginning_of_an_id_is_enough_when_it_is_unique() {
    let mut other = view(MigrationState::Active);
    other.id = MigrationId([0x60; 16]);
    let list = MigrationList { migrations: vec![view(MigrationState::Active), other], ..MigrationList::default() };
    let history = json!({"schema": "sealane.history/1", "reports": []});
    let gateway = Gateway::new(vec![
        ("GET /v1/migrations", vec![ok(&list)]),
        ("GET /v1/history", vec![ok(&history)]),
        (CANCEL, vec![ok(&view(MigrationState::Cancelling))]),
    ]);
    check(&gateway.run("cancel 5F5F"), 0, &["web to gw-b: cancelling"], &["asked to stop"]);
    check(&gateway.run("cancel abcd"), 2, &[], &["no migration has an id that begins with `abcd`", "hint: `sealane status`"]);
}

#[test]
fn set_sends_only_what_changes() {
    let path = "POST /v1/migrations/5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f/set";
    let gateway = Gateway::new(vec![(path, vec![ok(&view(MigrationState::Active))])]);
    check(&gateway.run(&format!("set {ID} bandwidth=10MiB/s")), 0, &["web to gw-b: active"], &[]);
    assert_eq!(gateway.seen(), [format!("{path} {{\"bandwidth_bytes_per_second\":10485760,\"max_downtime_seconds\":null}}")]);
}

#[test]
fn a_plan_that_is_not_possible_exits_as_its_problem() {
    let plan = json!({
        "schema": "sealane.plan/1", "vm": "web", "to": "gw-b", "possible": false,
        "checks": [{"name": "policy", "verdict": "fail", "detail": "nothing permits it", "hint": "ask"}],
        "error": {"code": "denied", "class": "denied", "message": "no policy permits to move `web`", "running_on": "source"},
    });
    let _: PlanView = serde_json::from_value(plan.clone()).unwrap();
    let gateway = Gateway::new(vec![("POST /v1/plan", vec![ok(&plan)])]);
    for command in ["plan web --to gw-b", "migrate web --to gw-b --dry-run"] {
        check(&gateway.run(command), 3, &["FAIL  policy  nothing permits it", "web to gw-b: not possible"], &["error: no policy permits"]);
    }
    assert!(gateway.seen().iter().all(|line| line.contains("\"dry_run\":true")));
}

#[test]
fn lists_are_tables_for_people_and_objects_for_scripts() {
    let vm = VmView {
        name: "web".parse().unwrap(),
        uuid: VmUuid([1; 16]),
        state: VmState::Running,
        place: "here".to_owned(),
        driver: "kvm".to_owned(),
        owner_epoch: Epoch(1),
        memory_bytes: Some(1 << 28),
        vcpus: Some(2),
        why: None,
    };
    let peers = json!({"schema": "sealane.peers/1", "peers": [{"name": "gw-b", "address": "b:4433", "spiffe": "spiffe://b.example/gateway/b",
        "site": "dc2", "reachable": false, "why": "no answer"}]});
    let status = json!({"schema": "sealane.gateway/1", "name": "gw-a", "site": "dc1", "version": "0.1.0", "spiffe": "spiffe://a.example/gateway/a",
        "listen": "127.0.0.1:4433", "incarnation": "00000000000000000000000000000000", "certificate_expires": null, "policy_digest": null, "migrations_active": 1});
    let gateway = Gateway::new(vec![
        ("GET /v1/vms", vec![ok(&VmList { vms: vec![vm], ..VmList::default() })]),
        ("GET /v1/peers", vec![ok(&peers)]),
        ("GET /v1/gateway", vec![ok(&status)]),
        ("GET /v1/migrations", vec![ok(&MigrationList { migrations: vec![view(MigrationState::Active)], ..MigrationList::default() })]),
        ("GET /v1/history", vec![ok(&json!({"schema": "sealane.history/1", "reports": []}))]),
    ]);
    check(&gateway.run("vms"), 0, &["VM   STATE    WHERE", "web  running  here   kvm     256 MiB"], &[]);
    check(&gateway.run("peers"), 0, &["gw-b  dc2   b:4433   no", "no answer"], &[]);
    check(&gateway.run("status"), 0, &["gw-a in dc1, sealane 0.1.0", "5f5f5f5f  web  to gw-b"], &[]);
    check(&gateway.run("history"), 0, &["no finished migrations"], &[]);
    for (command, schema) in
        [("vms", "sealane.vms/1"), ("peers", "sealane.peers/1"), ("status", "sealane.status/1"), ("history", "sealane.history/1")]
    {
        assert_eq!(object(&gateway.run(&format!("{command} --json")))["schema"], schema);
    }
}

#[test]
fn an_answer_of_another_version_is_not_taken_for_one_of_ours() {
    let gateway = Gateway::new(vec![("GET /v1/vms", vec![ok(&json!({"schema": "sealane.vms/9", "vms": []}))])]);
    check(
        &gateway.run("vms"),
        1,
        &[],
        &["does not understand: expected schema `sealane.vms/1`, got `sealane.vms/9`", "hint: is the gateway of another version"],
    );
}

#[test]
fn the_socket_comes_from_flag_then_environment_then_file() {
    let gateway = Gateway::new(vec![("GET /v1/vms", vec![ok(&VmList::default())])]);
    let file = gateway.directory.path().join("gateway.toml");
    let example = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gateway.toml")).unwrap();
    std::fs::write(&file, example.replace("/run/sealane/api.sock", "api.sock")).unwrap();
    check(&sealane("vms --config").arg(&file).output().unwrap(), 0, &["VM"], &[]);
    check(&sealane("vms").env("SEALANE_CONFIG", &file).output().unwrap(), 0, &["VM"], &[]);
    check(&sealane("vms").env("SEALANE_SOCKET", gateway.socket()).env("SEALANE_CONFIG", "/nonexistent").output().unwrap(), 0, &["VM"], &[]);
    check(&sealane("vms --socket /nonexistent").env("SEALANE_SOCKET", gateway.socket()).output().unwrap(), 2, &[], &["`/nonexistent`"]);
}

#[test]
fn config_check_lists_everything_and_says_where_values_come_from() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gateway.toml");
    let good = sealane("config check --text-only").arg(&example).output().unwrap();
    check(&good, 0, &["gateway.name = gw-a", "config/gateway.toml:9", "migration.max_downtime = 300ms"], &[]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bad.toml");
    std::fs::write(&file, "[gateway]\nname = \"a b\"\nsite = \"dc1\"\nlisten = 4433\n[migration]\nmax_downtime = 300\n").unwrap();
    let shown = file.display();
    let (one, two, three) = (
        format!("{shown}:2:8: gateway.name: expected"),
        format!("{shown}:4:10: gateway.listen: expected"),
        format!("{shown}:6:16: migration.max_downtime: expected"),
    );
    let expected = [one.as_str(), &two, &three, "hint: write `300ms` or `300s`"];
    check(&sealane("config check").arg(&file).output().unwrap(), 2, &[], &expected);
    check(&sealane("gateway --config").arg(&file).output().unwrap(), 2, &[], &expected);
    let json = sealane("config check --json").arg(&file).output().unwrap();
    check(&json, 2, &[], &expected);
    let object = object(&json);
    assert_eq!(object["valid"], false);
    assert!(object["problems"].as_array().unwrap().iter().any(|problem| problem["line"] == 2 && problem["key"] == "gateway.name"));
    check(&sealane("config check /nonexistent").output().unwrap(), 2, &[], &["cannot read configuration `/nonexistent`: No such file"]);
}

#[test]
fn usage_errors_exit_2_with_nothing_on_stdout() {
    for line in ["", "migrate", "migrate web --to gw-b --bandwidth 100", "warp"] {
        let output = sealane(line).output().unwrap();
        check(&output, 2, &[], &["Usage"; 0]);
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line}");
    }
    check(&sealane("--help").output().unwrap(), 0, &["Usage: sealane <COMMAND>"], &[]);
    check(&sealane("--version").output().unwrap(), 0, &["sealane 0."], &[]);
}

#[test]
fn completions_and_manual_pages_are_made_from_the_same_definition() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        check(&sealane(&format!("completion {shell}")).output().unwrap(), 0, &["max-downtime"], &[]);
    }
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man1");
    check(&sealane("man").arg(&pages).output().unwrap(), 0, &[], &["manual pages written"]);
    let page = std::fs::read_to_string(pages.join("sealane-migrate.1")).unwrap();
    assert!(page.contains("max\\-downtime"), "{page}");
    let top = std::fs::read_to_string(pages.join("sealane.1")).unwrap();
    assert!(top.contains("outcome unknown"), "exit codes belong into the manual: {top}");
}

#[test]
fn doctor_says_what_it_found() {
    let output = sealane("doctor --json").output().unwrap();
    let checks = object(&output)["checks"].clone();
    let names: Vec<&str> = checks.as_array().unwrap().iter().filter_map(|check| check["name"].as_str()).collect();
    assert_eq!(&names[..3], ["kvm", "processor", "huge pages"]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bad.toml");
    std::fs::write(&file, "x = 1\n").unwrap();
    check(&sealane("doctor --config").arg(&file).output().unwrap(), 1, &["FAIL  configuration", "unknown key"], &[]);
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let mut child = sealane("completion bash").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    check(&output, 0, &[], &[]);
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn a_build_has_failpoints_with_the_feature_only() {
    let text = include_str!("../src/failpoint.rs");
    let list = text.split("ALL: &[&str] = &[").nth(1).unwrap().split("];").next().unwrap();
    let names: Vec<_> = list.lines().filter_map(|line| line.split('"').nth(1)).chain(["SEALANE_FAILPOINT"]).collect();
    assert!(names.len() > 40, "{names:?}");
    // A search for all of them would take minutes without optimisation, and one lies beside the other.
    let quick = |name: &&&str| !name[1..].contains(&name[..1]);
    let sample: Vec<_> = names.iter().filter(quick).rev().take(4).collect();
    assert_eq!(sample[0], &"SEALANE_FAILPOINT");
    let program = std::fs::read(env!("CARGO_BIN_EXE_sealane")).unwrap();
    let there = |name: &str| program.split(|byte| *byte == name.as_bytes()[0]).any(|rest| rest.starts_with(&name.as_bytes()[1..]));
    let wrong: Vec<_> = sample.iter().filter(|name| there(name) != cfg!(feature = "failpoints")).collect();
    assert!(wrong.is_empty(), "in the program or missing there: {wrong:?}");
    let output = Command::new(env!("CARGO_BIN_EXE_sealane")).arg("failpoints").output().unwrap();
    assert_eq!(output.status.success(), cfg!(feature = "failpoints"));
}
