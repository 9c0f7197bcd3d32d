//! What operators see and do besides migrating.

use crate::command::{run, wait_for};
use crate::gateway::{A, B};
use crate::lab::{Lab, Setup, VM};

#[test]
fn a_plan_shows_every_check_and_moves_nothing() {
    let lab = Lab::start();
    let said = lab.gateway(A).command(&["plan", VM, "--to", "gw-b"]);
    said.expect(0, &[]);
    let plan = said.json();
    assert_eq!(plan["possible"], true, "{plan}");
    let checks: Vec<_> = plan["checks"].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["configuration", "policy (request)", "guest", "peer", "policy (release)"] {
        assert!(checks.contains(&name), "{plan}");
    }
    let dry = lab.migrate(A, &["--dry-run"]);
    dry.expect(0, &[]);
    assert_eq!(dry.json()["schema"], plan["schema"]);
    assert!(lab.vmms(B).is_empty());
    lab.settled_on(A);
}

#[test]
fn a_plan_that_cannot_work_names_what_fails_and_exits_as_the_migration_would() {
    let mut lab = Setup::new().without_policy(A, "release").start();
    let denied = lab.gateway(A).command(&["plan", VM, "--to", "gw-b"]);
    denied.expect(3, &["release"]);
    assert_eq!(denied.json()["possible"], false);
    lab.gateway_mut(B).kill();
    let down = lab.gateway(A).command(&["plan", VM, "--to", "gw-b"]);
    down.expect(4, &["gw-b"]);
    lab.gateway_mut(B).start();
    lab.settled_on(A);
}

#[test]
fn status_history_and_watch_know_a_migration_after_its_end() {
    let lab = Lab::start();
    let id = lab.migrate(A, &[]).expect_moved()["migration_id"].as_str().unwrap().to_owned();
    for name in [A, B] {
        let view =
            wait_for("a report", || Some(lab.gateway(name).command(&["status", &id[..8]]).json()).filter(|view| !view["report"].is_null()));
        assert_eq!((&view["id"], &view["state"]), (&id.as_str().into(), &"completed".into()));
    }
    let watched = lab.gateway(A).command(&["watch", &id]);
    watched.expect(0, &[]);
    assert_eq!(watched.json()["migration_id"], id.as_str());
    assert_eq!(lab.gateway(A).command(&["history"]).json()["reports"].as_array().unwrap().len(), 1);
    lab.settled_on(B);
}

#[test]
fn a_restarted_gateway_still_knows_how_a_migration_ended() {
    let mut lab = Lab::start();
    let id = lab.migrate(A, &[]).expect_moved()["migration_id"].as_str().unwrap().to_owned();
    for name in [A, B] {
        lab.gateway_mut(name).kill();
        lab.gateway_mut(name).start();
        for command in [["status", &id], ["status", &id[..8]]] {
            let said = lab.gateway(name).command(&command);
            said.expect(0, &[]);
            assert_eq!(said.json()["state"], "completed");
        }
        lab.gateway(name).command(&["watch", &id]).expect_moved();
        lab.gateway(name).command(&["cancel", &id]).expect(2, &["ended"]);
    }
    lab.settled_on(B);
}

#[test]
fn a_migration_can_be_started_and_left() {
    let lab = Lab::start();
    let started = lab.migrate(A, &["--detach"]);
    started.expect(0, &[]);
    let id = started.json()["id"].as_str().unwrap().to_owned();
    lab.gateway(A).start_command(&["watch", &id]).finish().expect(0, &[]);
    lab.settled_on(B);
}

#[test]
fn watch_follows_a_migration_to_its_end() {
    let lab = Setup::new().busy().start();
    let (running, id) = lab.start_slow_migration(A, &[]);
    let watch = lab.gateway(A).start_command(&["watch", &id]);
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_moved();
    let said = watch.finish();
    said.expect(0, &[]);
    let lines: Vec<serde_json::Value> = said.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (report, progress) = lines.split_last().unwrap();
    assert_eq!(report["schema"], "sealane.report/1");
    assert!(!progress.is_empty() && progress.iter().all(|line| line["schema"] == "sealane.progress/1"), "{said:#?}");
    lab.settled_on(B);
}

#[test]
fn a_bandwidth_limit_is_kept() {
    let lab = Setup::new().busy().start();
    let report = lab.migrate(A, &["--bandwidth", "8MiB/s", "--max-downtime", "1h", "--compress", "none"]).expect_moved();
    let (bytes, seconds) = (report["wire_bytes"].as_f64().unwrap(), report["duration_seconds"].as_f64().unwrap());
    // Twice: what was allowed to burst, and what is not counted as page frames.
    assert!(bytes / seconds < 2.0 * 8.0 * 1048576.0, "{report}");
    lab.settled_on(B);
}

#[test]
fn vms_and_peers_say_where_everything_is() {
    let lab = Lab::start();
    let vm = lab.vm(A);
    assert_eq!(vm["driver"], lab.shape.kind.name(), "{vm}");
    assert_eq!((&vm["memory_bytes"], &vm["vcpus"]), (&33_554_432.into(), &1.into()), "{vm}");
    assert_eq!(lab.vm(B)["state"], "gone");
    let peers = lab.gateway(A).command(&["peers"]).json();
    assert_eq!((&peers["peers"][0]["name"], &peers["peers"][0]["reachable"]), (&"gw-b".into(), &true.into()), "{peers}");
    let status = lab.gateway(A).command(&["status"]).json();
    assert_eq!(status["gateway"]["name"], "gw-a");
    assert_eq!(status["gateway"]["spiffe"], "spiffe://e2e.sealane.invalid/gateway/gw-a");
}

#[test]
fn the_view_socket_shows_and_changes_nothing() {
    let view = "control_socket = \"run/api.sock\"\nview_socket = \"run/view.sock\"";
    let lab = Setup::new().busy().replace(A, "control_socket = \"run/api.sock\"", view).start();
    let gateway = lab.gateway(A);
    let socket = gateway.directory().join("run/view.sock");
    let through_it =
        |arguments: &[&str]| run(gateway.directory(), &[arguments, &["--json", "--socket", socket.to_str().unwrap()]].concat());
    for command in ["vms", "peers", "status", "history"] {
        through_it(&[command]).expect(0, &[]);
    }
    let (running, id) = lab.start_slow_migration(A, &[]);
    through_it(&["status", &id]).expect(0, &[]);
    let steering: &[&[&str]] = &[
        &["migrate", VM, "--to", "gw-b"],
        &["plan", VM, "--to", "gw-b"],
        &["cancel", &id],
        &["set", &id, "bandwidth=1GiB/s"],
        &["reload"],
    ];
    for arguments in steering {
        through_it(arguments).expect(3, &["only shows"]);
    }
    gateway.command(&["cancel", &id]).expect(0, &[]);
    running.finish().expect_stayed(5, &[VM]);
    lab.settled_on(A);
}
