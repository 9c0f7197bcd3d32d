use clap::{CommandFactory, Parser};

use super::flags::Cli;
use super::output::Out;
use super::render;
use crate::control::{Choice, DoubtView, ProposalView, VmList, VmState, VmView};
use crate::telemetry::{ErrorClass, Outcome, PageCounts, Phase, Problem, Progress, Report, RunningOn};
use crate::types::{Epoch, MigrationId, VmUuid};

/// Every command's long help, at a fixed width.
fn help() -> String {
    fn add(command: &mut clap::Command, path: &str, text: &mut String) {
        let own = command.clone().term_width(100).render_long_help().to_string();
        text.push_str(&format!("=== {path}\n\n{}\n", own.lines().map(|line| line.trim_end().to_owned() + "\n").collect::<String>()));
        for sub in command.get_subcommands_mut() {
            let path = format!("{path} {}", sub.get_name());
            add(sub, &path, text);
        }
    }
    let mut command = Cli::command();
    command.build();
    let mut text = String::new();
    add(&mut command, "sealane", &mut text);
    text
}

#[test]
fn help_is_the_committed_text() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/help.txt");
    if std::env::var_os("SEALANE_BLESS").is_some() {
        std::fs::write(path, help()).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == help(), "help has changed; look at it, then run the test with SEALANE_BLESS=1");
}

#[test]
fn every_command_and_flag_has_help() {
    fn check(command: &clap::Command, path: &str) {
        assert!(command.get_about().is_some(), "{path}");
        for flag in command.get_arguments() {
            let help = flag.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.len() > 5, "{path} {}: {help:?}", flag.get_id());
        }
        for sub in command.get_subcommands() {
            check(sub, &format!("{path} {}", sub.get_name()));
        }
    }
    Cli::command().debug_assert();
    check(&Cli::command(), "sealane");
}

fn refused(line: &str) -> String {
    let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn usage_errors_exit_2_and_say_what_was_expected() {
    for (line, expected) in [
        ("sealane migrate web", "--to <PEER>"),
        ("sealane migrate web --to b --bandwidth 100", "hint: write `100Mbit` or `100MiB/s`"),
        ("sealane migrate web --to b --bandwidth 10G", "hint: `G` can mean several things"),
        ("sealane migrate web --to b --max-downtime 300", "hint: write `300ms` or `300s`"),
        ("sealane migrate ../x --to b", "invalid VM name `../x`"),
        ("sealane migrate web --to b --lanes 0", "1..=16"),
        ("sealane migrate web --to b --mode warp", "possible values: precopy, postcopy, hybrid"),
        ("sealane migrate web --to b --socket a --config b", "cannot be used with"),
        ("sealane migrate web --to b --verify=perhaps", "expected `yes`, `no` or `full`"),
        ("sealane storage migrate web", "--to <PEER>"),
        ("sealane storage migrate web --to b --verify-disks", "unexpected argument"),
        ("sealane cancel xyz", "first 4 hexadecimal digits"),
        ("sealane set abcd", "required"),
        ("sealane set abcd speed=1", "expected bandwidth=BANDWIDTH or max-downtime=DURATION"),
        ("sealane set abcd bandwidth=5", "hint: write `5Mbit` or `5MiB/s`"),
        ("sealane resolve --approve", "<ID|VM>"),
        ("sealane resolve web --reclaim --restart", "cannot be used with"),
        ("sealane resolve web --approve --evidence off", "cannot be used with"),
        ("sealane resolve web --evidence off", "--reclaim"),
        ("sealane migrat web", "similar subcommand"),
        ("sealane vmm run --memory 1GiB --socket s", "--kernel"),
        ("sealane vmm run --memory 1GiB --payload heartbeat --kernel k --socket s", "cannot be used with"),
        ("sealane demo --memory 256", "hint: write `256MiB` or `256GiB`"),
        ("sealane gateway", "--config <FILE>"),
        ("sealane postcopy abcd", "unrecognized subcommand"),
    ] {
        let text = refused(line);
        assert!(text.contains(expected), "{line}:\n{text}");
    }
}

#[test]
fn the_whole_surface_parses() {
    for line in [
        "sealane demo --hypervisor kvm --memory 256MiB --json",
        "sealane gateway --config f",
        "sealane migrate web --to gw-b --socket s --bandwidth 1Gbit --max-downtime 300ms --timeout 1h --mode precopy --storage none --detach --json",
        "sealane migrate web --to gw-b --config f --dry-run --verify --throttle --compress lz4 --lanes 4",
        "sealane migrate web --to gw-b --verify=no",
        "sealane migrate web --to gw-b --storage all --verify-disks",
        "sealane migrate web --to gw-b --storage shared",
        "sealane storage migrate web --to gw-b --bandwidth 1Gbit --timeout 1h --max-outage 10m --compress zstd:3 --detach --json",
        "sealane storage migrate web --to gw-b --dry-run",
        "sealane plan web --to gw-b",
        "sealane vms",
        "sealane peers --json",
        "sealane status",
        "sealane status 5f3a",
        "sealane watch 5f3a --json",
        "sealane history",
        "sealane cancel 5f3a9b0c5f3a9b0c5f3a9b0c5f3a9b0c",
        "sealane set 5f3a bandwidth=1Gbit max-downtime=500ms",
        "sealane resolve",
        "sealane resolve web-1 --json",
        "sealane resolve 5f3a --reclaim --evidence off",
        "sealane resolve web-1 --refuse",
        "sealane resolve web-1 --approve",
        "sealane resolve web-1 --withdraw",
        "sealane pki init d --trust-domain dc1.example",
        "sealane pki issue d --gateway gw-a --site dc1",
        "sealane pki revoke d gw-a",
        "sealane pki show f",
        "sealane policy check d",
        "sealane policy test d",
        "sealane policy explain d --config f --vm web --peer gw-b",
        "sealane policy explain d --request f",
        "sealane policy diff old new --audit d --json",
        "sealane policy bundle make d --name fleet --version 7 --expires 2026-12-01T00:00:00Z",
        "sealane policy bundle verify d --config f --json",
        "sealane policy bundle verify d --key RWQ --key RWR --threshold 1 --name fleet --at 2026-12-01T00:00:00Z",
        "sealane policy bundle show d --json",
        "sealane audit show d",
        "sealane audit show d --vm web --peer p --since 2026-12-01T23:00:00Z --until 2026-12-02T23:00:00Z --outcome in-doubt",
        "sealane audit verify d --checkpoint f --peer-key f --peer-key g",
        "sealane audit prove d 7",
        "sealane audit verify-proof f --key g --peer-key h",
        "sealane audit export d --format ocsf --outcome deny",
        "sealane vmm run --memory 1GiB --vcpus 2 --kernel f --initramfs g --socket s",
        "sealane vmm run --memory 1GiB --payload heartbeat --working-set 64MiB --socket s",
        "sealane vmm run --incoming --uuid 6f1d6a0e-5c1b-4b52-9d5e-0a3c7c2f9b11 --socket s",
        "sealane bench --image f --lanes 2 --link loopback --rounds 3 --json",
        "sealane bench --content write-heavy --memory 2GiB --seed 7 --dirty-rate 200MiB/s --compress none",
        "sealane bench --content realistic --to 10.0.0.2:4433 --pki ca --json",
        "sealane bench listen --at 0.0.0.0:4433 --pki ca --max-memory 4GiB --json",
        "sealane doctor",
        "sealane config check f",
        "sealane completion bash",
        "sealane man d",
    ] {
        if let Err(error) = Cli::try_parse_from(line.split(' ')) {
            panic!("{line}:\n{error}");
        }
    }
}

#[test]
fn numbers_have_units_and_few_digits() {
    let sizes = [0, 1023, 1024, 1536, 102_399, 1 << 20, 4 << 30, u64::MAX].map(render::bytes);
    assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "99.9 KiB", "1.0 MiB", "4.0 GiB", "16383 PiB"]);
    let times = [0.0, 0.0005, 0.0034, 0.14, 0.9999, 6.24, 59.96, 63.0, 3780.0, f64::NAN, -1.0].map(render::seconds);
    assert_eq!(
        times,
        ["0 µs", "500 µs", "3.4 ms", "140 ms", "1.0 s", "6.2 s", "1 min 00 s", "1 min 03 s", "1 h 03 min", "unknown", "unknown"]
    );
}

#[test]
fn a_progress_line_says_phase_rates_and_whether_it_converges() {
    let mut progress = Progress::new(MigrationId([1; 16]));
    assert_eq!(render::progress_line(&progress), "prepare 0 %");
    progress.phase = Phase::Memory;
    progress.phase_fraction = 0.629;
    progress.round = 3;
    progress.memory_total_bytes = 4 << 30;
    progress.memory_remaining_bytes = 900 << 20;
    progress.send_bytes_per_second = 812 << 20;
    progress.wire_bytes_per_second = 240 << 20;
    progress.dirty_bytes_per_second = 90 << 20;
    progress.expected_downtime_seconds = Some(0.14);
    progress.eta_seconds = Some(6.0);
    assert_eq!(
        render::progress_line(&progress),
        "memory 62 %, round 3, 900 MiB of 4.0 GiB left, sending 812 MiB/s (wire 240 MiB/s), dirtying 90.0 MiB/s, expected downtime 140 ms, ETA 6.0 s"
    );
}

fn plain() -> Out {
    Out::new(false)
}

#[test]
fn tables_align_and_leave_out_empty_columns() {
    let vm = |name: &str, state, why: Option<&str>| VmView {
        name: name.parse().unwrap(),
        uuid: VmUuid([1; 16]),
        state,
        place: "here".to_owned(),
        driver: "kvm".to_owned(),
        owner_epoch: Epoch(2),
        memory_bytes: Some(1 << 30),
        vcpus: None,
        why: why.map(str::to_owned),
    };
    let list = VmList {
        vms: vec![vm("web-1", VmState::Running, None), vm("a", VmState::InDoubt, Some("peer `gw-b`\x1b[2J is silent"))],
        ..VmList::default()
    };
    assert_eq!(
        render::vms(plain(), &list.vms),
        "VM     STATE     WHERE  DRIVER  MEMORY   EPOCH  WHY\n\
         web-1  running   here   kvm     1.0 GiB  2\n\
         a      in-doubt  here   kvm     1.0 GiB  2      peer `gw-b`\u{fffd}[2J is silent\n"
    );
}

#[test]
fn a_report_says_where_the_vm_runs_and_whether_it_was_verified() {
    let mut report = Report::new(MigrationId([0xab; 16]), "web".parse().unwrap(), Outcome::Completed, RunningOn::Destination);
    report.hypervisor = "kvm".to_owned();
    report.rounds = 4;
    report.guest_memory_bytes = 256 << 20;
    report.wire_bytes = 100 << 20;
    report.duration_seconds = 1.26;
    report.downtime_seconds = Some(0.0123);
    report.pages = PageCounts { zero: 1, duplicate: 2, delta: 3, compressed: 4, raw: 5 };
    report.verified = true;
    report.authenticated.source = Some("spiffe://a.example/gateway/a".parse().unwrap());
    report.policy.decision = Some("allow".to_owned());
    report.policy.policy_ids = vec!["web-may-move".to_owned()];
    assert_eq!(
        render::report(plain(), &report),
        "web abababababababababababababababab: completed; the VM runs on the destination\n\
         \x20 driver     kvm, pre-copy, 4 rounds\n\
         \x20 memory     256 MiB, 100 MiB on the wire\n\
         \x20 pages      1 zero, 2 duplicate, 3 delta, 4 compressed, 5 raw\n\
         \x20 time       1.3 s\n\
         \x20 downtime   12 ms\n\
         \x20 verified   yes: all memory and state were compared\n\
         \x20 source     spiffe://a.example/gateway/a\n\
         \x20 dest       nobody\n\
         \x20 policy     allow: web-may-move\n"
    );
}

#[test]
fn a_vm_in_doubt_is_shown_with_what_is_possible_and_who_wants_what() {
    let mut doubt: DoubtView = serde_json::from_value(serde_json::json!({
        "migration": "ab".repeat(16), "vm": "web", "uuid": VmUuid([1; 16]), "side": "source", "peer": "gw-b", "epoch": 5,
        "last": {"record": "commit", "meaning": "the answer is missing", "at": "2026-11-27T02:14:37.988Z"},
        "choices": [{"choice": "reclaim", "meaning": "the copy here goes on", "needs_evidence": true}],
    }))
    .unwrap();
    let head = "web abababababababababababababababab: in doubt, to gw-b, epoch 5\n\
         \x20 journal    COMMIT at 2026-11-27T02:14:37.988Z: the answer is missing\n\
         \x20 --reclaim  the copy here goes on; needs --evidence\n";
    assert_eq!(render::doubts(plain(), &[doubt.clone()]), head);
    doubt.proposal = Some(ProposalView {
        choice: Choice::Reclaim,
        proposer: "uid:0".into(),
        evidence: Some("off\x1b[2J, CHG-7".into()),
        at: "2026-11-27T02:20:00.000Z".into(),
        approvers: vec!["uid:1001".into()],
    });
    let tail = "  proposed   reclaim by uid:0 at 2026-11-27T02:20:00.000Z\n\
         \x20 evidence   off\u{fffd}[2J, CHG-7\n\
         \x20 approved   uid:1001\n";
    assert_eq!(render::doubts(plain(), &[doubt]), format!("{head}{tail}"));
    assert_eq!(render::doubts(plain(), &[]), "no VM is in doubt\n");
}

#[test]
fn a_problem_without_a_hint_is_one_without_a_hint_in_json_too() {
    let json = serde_json::to_value(Problem::new(ErrorClass::Misuse, "x")).unwrap();
    assert_eq!(json, serde_json::json!({"code": "misuse", "class": "misuse", "message": "x", "running_on": null, "hint": null}));
}
