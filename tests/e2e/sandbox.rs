//! Gateways that have given up what they do not need: what the kernel says of them, and that everything still works.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use serde_json::Value;

use crate::command::wait_for;
use crate::gateway::{A, B, Gateway};
use crate::lab::{Lab, Setup, VM, replaced};

/// Fields of `/proc/PID/status`, of every thread.
fn threads(gateway: &Gateway, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", gateway.process_id())).unwrap();
    let status = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    status.filter_map(|text| self::field(&text, field)).collect()
}

fn field(status: &str, name: &str) -> Option<String> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(|value| value.trim().to_owned()))
}

/// The same of this process, which others may have confined.
fn own(name: &str) -> Option<String> {
    field(&fs::read_to_string("/proc/self/status").unwrap(), name)
}

/// Whether this kernel can confine a gateway, asked without the program under test. One that cannot is said.
fn kernel_confines() -> bool {
    use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    let all = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::from_all(ABI::V1));
    let landlock = all.and_then(Ruleset::create).is_ok();
    let seccomp = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").is_ok_and(|actions| actions.contains("errno"));
    if !landlock || !seccomp {
        println!("SKIP this kernel cannot confine a gateway: Landlock {landlock}, seccomp {seccomp}");
    }
    landlock && seccomp
}

/// What a gateway says of its sandbox.
fn sandbox(gateway: &Gateway) -> Value {
    gateway.command(&["status"]).json()["gateway"]["sandbox"].clone()
}

#[test]
fn every_thread_of_a_gateway_is_confined_and_a_migration_does_not_mind() {
    if !kernel_confines() {
        return;
    }
    let mut lab = Setup::new().replace(B, "runtime_directory = \"run\"", "runtime_directory = \"run\"\nsandbox = \"require\"").start();
    for (name, setting) in [(A, "auto"), (B, "require")] {
        let view = sandbox(lab.gateway(name));
        assert_eq!((&view["setting"], view["landlock_abi"].is_u64(), &view["seccomp"]), (&setting.into(), true, &true.into()), "{view}");
    }
    let checked = |lab: &Lab| {
        for name in [A, B] {
            let gateway = lab.gateway(name);
            for (field, wanted) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
                let found = threads(gateway, field);
                assert!(found.len() > 1 && found.iter().all(|value| value == wanted), "{name:?} {field}: {found:?}");
            }
            // Of root's, what reaches files of others and what asks for socket buffers; without it, nothing is left.
            let kept = if nix::unistd::geteuid().is_root() { 1 << 1 | 1 << 12 } else { 0 };
            for field in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                let found = threads(gateway, field);
                assert!(found.iter().all(|value| u64::from_str_radix(value, 16).unwrap() & !kept == 0), "{name:?} {field}: {found:?}");
            }
        }
    };
    lab.migrate(A, &[]).expect_moved();
    checked(&lab);
    // The VMM that was started meanwhile is not confined: it is the launcher's.
    let vmm = lab.vmm_processes(B)[0].as_raw_nonzero();
    assert_eq!(field(&fs::read_to_string(format!("/proc/{vmm}/status")).unwrap(), "Seccomp"), own("Seccomp"));
    let started = lab.gateway(B).audited("gateway-started", "done", &["seccomp"]);
    assert_eq!(
        (&started["detail"]["sandbox"]["setting"], &started["detail"]["sandbox"]["seccomp"]),
        (&"require".into(), &true.into()),
        "{started}"
    );
    for name in [A, B] {
        lab.gateway(name).reload();
        lab.gateway_mut(name).kill();
        lab.gateway_mut(name).start();
    }
    lab.migrate(B, &[]).expect_moved();
    checked(&lab);
    lab.settled_on(A);
}

#[test]
fn a_gateway_that_is_not_to_be_confined_is_not_and_says_so() {
    let lab = Setup::new().replace(A, "runtime_directory = \"run\"", "runtime_directory = \"run\"\nsandbox = \"off\"").start();
    let view = sandbox(lab.gateway(A));
    assert_eq!((&view["setting"], &view["seccomp"]), (&"off".into(), &false.into()));
    assert!(threads(lab.gateway(A), "Seccomp").iter().all(|value| Some(value) == own("Seccomp").as_ref()));
    assert!(lab.gateway(A).log().contains("`gateway.sandbox` is off"));
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}

/// Gives a directory and all in it to a user.
fn give(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), uid));
    }
}

#[test]
fn a_gateway_that_root_started_becomes_its_user_and_so_do_its_vmms() {
    const NOBODY: u32 = 65_534;
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP only root becomes another user");
        return;
    }
    let mut lab = Setup::new()
        .shape(|shape| shape.kind = crate::guest::Kind::Synthetic)
        .replace(B, "runtime_directory = \"run\"", "runtime_directory = \"run\"\nuser = \"nobody\"")
        .prepare();
    // That user reaches the laboratory and the program, which may be in a home that is root's alone.
    let root = lab.gateway(B).directory().parent().unwrap().to_owned();
    for directory in [root.clone(), root.join("pki")] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let program = root.join("sealane");
    fs::copy(crate::command::program(), &program).unwrap();
    let config = fs::read_to_string(lab.gateway(B).config()).unwrap();
    fs::write(lab.gateway(B).config(), replaced(&config, crate::command::program().to_str().unwrap(), program.to_str().unwrap())).unwrap();
    give(lab.gateway(B).directory(), NOBODY);
    for key in ["gw-b-key.pem", "gw-b-signing-key.pem"] {
        give(&root.join("pki").join(key), NOBODY);
    }
    lab.start_guest();
    for name in [A, B] {
        lab.gateway_mut(name).start();
    }
    lab.migrate(A, &[]).expect_moved();
    let everybody = format!("{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}");
    for field in ["Uid", "Gid"] {
        assert!(threads(lab.gateway(B), field).iter().all(|ids| *ids == everybody), "{field}");
    }
    for field in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert!(threads(lab.gateway(B), field).iter().all(|value| value.bytes().all(|digit| digit == b'0')), "{field}");
    }
    let vmm = lab.vmm_processes(B)[0].as_raw_nonzero();
    assert_eq!(fs::metadata(format!("/proc/{vmm}")).unwrap().uid(), NOBODY);
    assert_eq!(fs::metadata(lab.gateway(B).directory().join("state/state.redb")).unwrap().uid(), NOBODY);
    wait_for("the guest", || (lab.vm(B)["state"] == "running").then_some(()));
    lab.gateway_mut(B).kill();
    lab.gateway_mut(B).start();
    lab.settled_on(B);
}

#[test]
fn keys_come_from_systemd_credentials() {
    let keys = |text: String| {
        let text = replaced(&text, "\"../pki/gw-a-key.pem\"", "\"credential:tls-key\"");
        replaced(&text, "\"../pki/gw-a-signing-key.pem\"", "\"credential:signing-key\"")
    };
    let mut lab = Setup::new().edit(A, keys).prepare();
    // As systemd lays them for the service, which is told where.
    let root = lab.gateway(A).directory().parent().unwrap().to_owned();
    let credentials = root.join("credentials");
    fs::create_dir(&credentials).unwrap();
    for (name, file) in [("tls-key", "gw-a-key.pem"), ("signing-key", "gw-a-signing-key.pem")] {
        fs::rename(root.join("pki").join(file), credentials.join(name)).unwrap();
        fs::set_permissions(credentials.join(name), fs::Permissions::from_mode(0o400)).unwrap();
    }
    lab.gateway(A).start_in_vain().expect(2, &["credential:tls-key", "LoadCredential"]);
    lab.gateway_mut(A).set_environment("CREDENTIALS_DIRECTORY", &credentials);
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o755)).unwrap();
    lab.gateway_mut(A).launch();
    wait_for("a refusal of credentials that everybody finds", || lab.gateway_mut(A).has_died().then_some(()));
    assert!(lab.gateway(A).log().contains("is not as systemd lays it"), "{}", lab.gateway(A).log());
    fs::set_permissions(&credentials, fs::Permissions::from_mode(0o500)).unwrap();
    lab.start_guest();
    for name in [A, B] {
        lab.gateway_mut(name).start();
    }
    lab.gateway(A).reload();
    lab.migrate(A, &[]).expect_moved();
    assert_eq!(lab.vm(B)["name"], VM);
    lab.settled_on(B);
}

#[test]
fn a_gateway_whose_launcher_has_ended_says_so_and_takes_vms_again_when_it_is_restarted() {
    let mut lab = Setup::new().shape(|shape| shape.kind = crate::guest::Kind::Synthetic).start();
    let impaired = |lab: &Lab| lab.gateway(B).command(&["status"]).json()["gateway"]["impaired"].clone();
    assert!(impaired(&lab).is_null());
    let doctor = |lab: &Lab| lab.gateway(B).command(&["doctor"]).json()["checks"].to_string();
    assert!(doctor(&lab).contains("says that all is well"));
    lab.gateway(B).end_companion("launcher");
    wait_for("the gateway to notice", || impaired(&lab).as_str().filter(|why| why.contains("restart the gateway")).map(str::to_owned));
    lab.gateway(B).audited("launcher-ended", "failed", &["the launcher of VMMs has ended"]);
    assert!(doctor(&lab).contains("the launcher of VMMs has ended"));
    lab.migrate(A, &[]).expect_stayed(1, &["the launcher of VMMs has ended, so no VM can arrive here: restart the gateway"]);
    lab.gateway_mut(B).kill();
    lab.gateway_mut(B).start();
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
}
