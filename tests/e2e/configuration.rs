//! What is wrong with files is said before anything starts: all of it, with its place.

use crate::gateway::{A, B};
use crate::lab::{Lab, Setup, VM};

#[test]
fn everything_that_is_wrong_with_a_configuration_is_said_at_once() {
    let lab = Setup::new()
        .replace(A, "lanes = 2", "lanes = 2000")
        .replace(A, "timeout = \"10m\"", "timeout = 10")
        .replace(A, "tenant = ", "tennant = ")
        .prepare();
    let text = std::fs::read_to_string(lab.gateway(A).config()).unwrap();
    let line = |start: &str| (1 + text.lines().position(|line| line.starts_with(start)).unwrap()).to_string();
    let said = lab.gateway(A).start_in_vain();
    said.expect(2, &["migration.lanes", "migration.timeout", "vm[0].tennant", "gateway.toml"]);
    for start in ["lanes", "timeout", "tennant"] {
        let number = line(start);
        assert!(said.stderr.lines().any(|told| told.contains(start) && told.contains(&number)), "line {number} of `{start}`: {said:#?}");
    }
    // The same by the command that only checks.
    let checked = crate::command::run(lab.directory(), &["config".as_ref(), "check".as_ref(), lab.gateway(A).config().as_os_str()]);
    checked.expect(2, &["migration.lanes", "migration.timeout", "vm[0].tennant"]);
}

#[test]
fn a_command_with_a_broken_configuration_says_so_and_moves_nothing() {
    let lab = Lab::start();
    let path = lab.gateway(A).config();
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("lanes = 2", "lanes = ")).unwrap();
    lab.migrate(A, &[]).expect(2, &["gateway.toml", "not TOML"]);
    std::fs::write(&path, text).unwrap();
    lab.settled_on(A);
}

#[test]
fn a_vm_that_nobody_configured_is_refused_by_name() {
    let lab = Lab::start();
    lab.gateway(A).command(&["migrate", "web-9", "--to", "gw-b"]).expect(2, &["web-9", "gw-a"]);
    lab.settled_on(A);
}

#[test]
fn a_peer_that_nobody_configured_is_refused_by_name() {
    let lab = Lab::start();
    lab.gateway(A).command(&["migrate", VM, "--to", "gw-z"]).expect_stayed(2, &[VM, "gw-z", "gw-a"]);
    lab.settled_on(A);
}

#[test]
fn a_vm_that_is_elsewhere_cannot_be_sent_from_here() {
    let lab = Lab::start();
    let said = lab.migrate(B, &[]);
    said.expect(2, &[VM]);
    lab.migrate(A, &[]).expect_moved();
    lab.migrate(A, &[]).expect(2, &[VM, "gw-b", "the VM runs on the destination"]);
    lab.settled_on(B);
}

#[test]
fn a_vm_that_the_destination_does_not_know_stays() {
    let lab = Setup::new().replace(B, "name = \"web-1\"", "name = \"web-2\"").start();
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "not in this gateway's configuration"]);
    lab.gateway(B).audited("migration-finished", "refused", &[VM, "not in this gateway's configuration"]);
    crate::command::wait_for("a beat", || lab.newest_beat(A));
    assert_eq!(lab.running_copies(), [A]);
}

#[test]
fn a_vm_with_another_uuid_at_the_destination_stays() {
    let lab = Setup::new().replace(B, "00e2\"", "00e3\"").start();
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "UUID"]);
    lab.gateway(B).audited("migration-finished", "refused", &[VM, "UUID"]);
    assert_eq!(lab.running_copies(), [A]);
}

#[test]
fn a_guest_that_is_not_the_vm_of_the_configuration_is_not_sent() {
    let lab = Setup::new().replace(A, "00e2\"", "00e3\"").start();
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "UUID"]);
    lab.gateway(A).audited("migration-finished", "failed", &[VM, "UUID"]);
    assert_eq!(lab.running_copies(), [A]);
}

#[test]
fn a_destination_with_too_little_memory_refuses_before_anything_is_sent() {
    let lab = Setup::new().replace(B, "max_memory = \"4GiB\"", "max_memory = \"16MiB\"").start();
    let said = lab.migrate(A, &[]);
    said.expect_stayed(4, &[VM, "33554432", "16777216"]);
    assert_eq!(said.json()["wire_bytes"], 0);
    lab.gateway(B).audited("migration-finished", "refused", &[VM, "memory"]);
    assert!(lab.vmms(B).is_empty());
    lab.settled_on(A);
}

#[test]
fn a_destination_that_accepts_no_vms_says_so() {
    let without = |text: String| text[..text.find("[incoming]").unwrap()].to_owned();
    let lab = Setup::new().edit(B, without).start();
    lab.migrate(A, &[]).expect_stayed(3, &["accepts no VMs", "[incoming]"]);
    lab.gateway(B).audited("migration-finished", "refused", &[VM, "[incoming]"]);
    lab.settled_on(A);
}

#[test]
fn a_destination_whose_vmm_cannot_be_started_says_why() {
    let lab = Setup::new().replace(B, "\"--incoming\"", "\"--no-such-flag\"").start();
    lab.migrate(A, &[]).expect_stayed(1, &[VM, "--no-such-flag"]);
    lab.gateway(B).audited("migration-finished", "refused", &[VM, "no-such-flag"]);
    lab.settled_on(A);
}

#[test]
fn a_destination_that_lacks_what_the_machine_needs_names_it_before_memory_is_sent() {
    // A VMM that can host nothing like it stands for a CPU that lacks a feature: it is asked the same question, and says no by name.
    let own = std::env::current_exe().unwrap();
    let command = format!(
        "command = [\"/usr/bin/env\", \"SEALANE_TEST_PICKY_VMM={{socket}}\", {:?}, \"--exact\", \"configuration::picky_vmm_process\"]",
        own.to_str().unwrap()
    );
    let edit = move |text: String| {
        let start = text.find("command = [").unwrap();
        let end = start + text[start..].find('\n').unwrap();
        format!("{}{command}{}", &text[..start], &text[end..])
    };
    let lab = Setup::new().edit(B, edit).start();
    let said = lab.migrate(A, &[]);
    said.expect_stayed(4, &[VM, "CPU feature `avx512_bf16`", "CPU feature `la57`"]);
    assert_eq!(said.json()["wire_bytes"], 0);
    lab.gateway(B).audited("migration-finished", "refused", &[VM, "avx512_bf16", "la57"]);
    lab.settled_on(A);
}

/// Not a test of its own: this binary, started by a gateway's template, is a VMM on a lesser machine.
#[test]
fn picky_vmm_process() {
    if let Some(socket) = std::env::var_os("SEALANE_TEST_PICKY_VMM") {
        crate::picky_vmm::run(std::path::Path::new(&socket));
    }
}
