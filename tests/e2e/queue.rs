//! Many VMs at once: they wait for their turn, can be cancelled meanwhile, and all arrive.

use std::process::Child;

use serde_json::Value;

use crate::command::wait_for;
use crate::gateway::{A, B, Name};
use crate::guest::{Kind, Shape};
use crate::lab::{Lab, Setup};

/// A lab with more guests on A.
struct Fleet {
    lab: Lab,
    guests: Vec<Child>,
    ids: Vec<String>,
}

fn uuid(index: usize) -> String {
    format!("5ea1a4e0-0000-4000-8000-{:012x}", 0x1000 + index)
}

fn entries(name: Name, count: usize) -> String {
    let entry = |index| {
        let socket = if name == A { format!("socket = \"run/small-{index}.sock\"\n") } else { String::new() };
        let head = format!("\n[[vm]]\nname = \"small-{index}\"\nuuid = \"{}\"\n{socket}", uuid(index));
        let policy = "tenant = \"acme\"\nclassification = \"internal\"\nhome_site = \"site-a\"\nallowed_sites = [\"site-a\", \"site-b\"]\n";
        head + policy
    };
    (0..count).map(entry).collect()
}

impl Fleet {
    fn start(setup: Setup, count: usize) -> Self {
        let setup = [A, B].into_iter().fold(setup, |setup, name| setup.edit(name, move |text| text + &entries(name, count)));
        let mut lab = setup.prepare();
        let run = lab.gateway(A).directory().join("run");
        let shape = Shape { kind: Kind::Synthetic, memory: "16MiB", vcpus: 1, working_set: "64KiB", dirty_rate: "16KiB/s" };
        let start =
            |index| shape.start_as(&uuid(index), &run.join(format!("small-{index}.sock")), &run.join(format!("small-{index}.serial")));
        let guests = (0..count).map(start).collect();
        for name in [A, B] {
            lab.gateway_mut(name).start();
        }
        Self { lab, guests, ids: Vec::new() }
    }

    /// Starts the migration of the next guest, in the background; one that is slow goes on until it is told to hurry.
    fn migrate(&mut self, slow: bool) {
        let vm = format!("small-{}", self.ids.len());
        let flags: &[&str] = if slow { &["--compress", "none", "--bandwidth", "128KiB/s"] } else { &[] };
        let said = self.lab.gateway(A).command(&[&["migrate", &vm, "--to", "gw-b", "--detach"], flags].concat());
        said.expect(0, &[]);
        self.ids.push(said.json()["id"].as_str().unwrap().to_owned());
    }

    fn hurry(&self, index: usize) {
        self.lab.gateway(A).command(&["set", &self.ids[index], "bandwidth=10Gbit"]).expect(0, &[]);
    }

    fn status(&self) -> Value {
        let said = self.lab.gateway(A).command(&["status"]);
        said.expect(0, &[]);
        said.json()
    }

    /// A guest's migration as `status` has it.
    fn migration(&self, status: &Value, index: usize) -> Value {
        let all = status["migrations"].as_array().unwrap();
        all.iter().find(|migration| migration["id"] == self.ids[index].as_str()).unwrap().clone()
    }

    /// The guest runs at this gateway and not at the other one, and that is said.
    fn runs_only_on(&self, index: usize, name: Name) {
        let state = |name: Name| {
            let list = self.lab.gateway(name).command(&["vms"]).json();
            let vm = list["vms"].as_array().unwrap().iter().find(|vm| vm["uuid"] == uuid(index).as_str()).cloned();
            vm.unwrap()["state"].as_str().unwrap().to_owned()
        };
        wait_for(&format!("guest {index} on {name:?}"), || (state(name) == "running" && state(name.other()) == "gone").then_some(()));
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for guest in &mut self.guests {
            let _ = guest.kill();
            let _ = guest.wait();
        }
    }
}

fn phase(migration: &Value) -> &str {
    migration["progress"]["phase"].as_str().unwrap_or("")
}

#[test]
fn of_many_migrations_three_go_at_once_one_is_cancelled_in_the_queue_and_the_others_arrive() {
    let count = std::env::var("SEALANE_FLEET").map_or(12, |count| count.parse().unwrap());
    let setup = Setup::new().replace(A, "lanes = 2", "lanes = 2\nparallel = 3\nbandwidth_total = \"1Gbit\"");
    let mut fleet = Fleet::start(setup, count);
    for index in 0..count {
        fleet.migrate(index < 3);
    }
    let status = wait_for("three that send", || {
        let status = fleet.status();
        (0..3).all(|index| phase(&fleet.migration(&status, index)) == "memory").then_some(status)
    });
    let counts = ["migrations_active", "migrations_queued"].map(|key| status["gateway"][key].as_u64().unwrap());
    assert_eq!(counts, [3, count as u64 - 3], "{status}");
    for index in 3..count {
        let waits = fleet.migration(&status, index);
        assert_eq!((waits["state"].as_str(), phase(&waits)), (Some("active"), "queued"), "{waits}");
        assert_eq!(waits["progress"]["queue_position"], index - 2, "{waits}");
    }
    // A VM that waits is taken.
    let again = fleet.lab.gateway(A).command(&["migrate", "small-7", "--to", "gw-b"]);
    again.expect_stayed(2, &["small-7", "moving already"]);

    fleet.lab.gateway(A).command(&["cancel", &fleet.ids[7]]).expect(0, &[]);
    let cancelled = fleet.lab.gateway(A).command(&["watch", &fleet.ids[7]]);
    cancelled.expect(5, &["small-7", "cancelled"]);
    let report = cancelled.stdout.lines().last().map(|line| serde_json::from_str::<Value>(line).unwrap()).unwrap();
    assert_eq!((&report["state"], &report["running_on"]), (&"cancelled".into(), &"source".into()), "{report}");
    assert_eq!((&report["wire_bytes"], &report["rounds"]), (&0.into(), &0.into()), "{report}");
    let moved_up = fleet.migration(&fleet.status(), 8);
    assert_eq!(moved_up["progress"]["queue_position"], 5, "{moved_up}");

    for index in 0..3 {
        fleet.hurry(index);
    }
    for index in (0..count).filter(|index| *index != 7) {
        wait_for(&format!("migration {index} to go through"), || {
            let migration = fleet.migration(&fleet.status(), index);
            assert!(["active", "completed"].contains(&migration["state"].as_str().unwrap()), "{migration}");
            (migration["state"] == "completed").then_some(())
        });
        fleet.runs_only_on(index, B);
    }
    fleet.runs_only_on(7, A);
    for name in [A, B] {
        fleet.lab.gateway(name).audit_verifies();
    }
}

#[test]
fn a_destination_that_is_full_is_waited_for() {
    let setup = Setup::new().edit(B, |text| text + "\n[limits]\nmigrations_max = 1\n");
    let mut fleet = Fleet::start(setup, 3);
    fleet.migrate(true);
    wait_for("one that sends", || (phase(&fleet.migration(&fleet.status(), 0)) == "memory").then_some(()));
    fleet.migrate(false);
    fleet.migrate(false);
    let full = wait_for("one that was sent back", || {
        let migration = fleet.migration(&fleet.status(), 1);
        migration["progress"]["stalled_because"].is_string().then_some(migration)
    });
    assert!(full["progress"]["stalled_because"].as_str().unwrap().contains("gw-b"), "{full}");
    fleet.hurry(0);
    for index in 0..3 {
        wait_for(&format!("migration {index} to go through"), || {
            (fleet.migration(&fleet.status(), index)["state"] == "completed").then_some(())
        });
        fleet.runs_only_on(index, B);
    }
    fleet.lab.gateway(B).audited("migration-finished", "refused", &["peer-busy"]);
}

#[test]
fn a_gateway_that_stops_ends_what_waits() {
    let setup = Setup::new().replace(A, "lanes = 2", "lanes = 2\nparallel = 1");
    let mut fleet = Fleet::start(setup, 3);
    for _ in 0..3 {
        fleet.migrate(true);
    }
    wait_for("one that sends", || (phase(&fleet.migration(&fleet.status(), 0)) == "memory").then_some(()));
    assert_eq!(fleet.lab.gateway_mut(A).stop(), Some(0));
    fleet.lab.gateway_mut(A).start();
    let history = fleet.lab.gateway(A).command(&["history"]).json();
    for index in 0..3 {
        let report = history["reports"].as_array().unwrap().iter().find(|report| report["migration_id"] == fleet.ids[index].as_str());
        let report = report.unwrap_or_else(|| panic!("no report of {index}: {history}"));
        assert_eq!((&report["state"], &report["running_on"]), (&"cancelled".into(), &"source".into()), "{report}");
        fleet.runs_only_on(index, A);
    }
}

#[test]
fn two_full_gateways_that_send_each_other_vms_do_not_block_each_other() {
    let full = |text: String| text + "\n[limits]\nmigrations_max = 1\n";
    let mut fleet = Fleet::start(Setup::new().edit(A, full).edit(B, full), 2);
    fleet.migrate(false);
    fleet.runs_only_on(0, B);
    let back = fleet.lab.gateway(B).start_command(&["migrate", "small-0", "--to", "gw-a"]);
    let there = fleet.lab.gateway(A).start_command(&["migrate", "small-1", "--to", "gw-b"]);
    back.finish().expect_moved();
    there.finish().expect_moved();
    fleet.runs_only_on(0, A);
    fleet.runs_only_on(1, B);
}
