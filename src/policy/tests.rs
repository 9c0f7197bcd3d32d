//! The example policies, decision by decision, and everything a loader must refuse.

mod meant;
mod slices;

use super::*;
use crate::limits;
use crate::types::{SpiffeId, VmUuid};

const FLOOR: &str = include_str!("../../config/policy.d/10-floor.cedar");
const ACME: &str = include_str!("../../config/policy.d/20-tenant-acme.cedar");
const OPERATORS: &str = include_str!("../../config/policy.d/30-operators.cedar");
const TESTS: &str = include_str!("../../config/policy.d/tests.json");

const DC1: &str = "spiffe://dc1.example.net/gateway/gw-a";
const DC2: &str = "spiffe://dc2.example.net/gateway/gw-b";
const PERMIT_ALL: &str = "@id(\"all\") permit (principal, action, resource);\n";

fn file(name: &str, text: &str) -> PolicyFile {
    PolicyFile { name: name.to_owned(), text: text.to_owned() }
}

fn vm(number: u8) -> VmUuid {
    let mut bytes = [0; 16];
    bytes[15] = number;
    VmUuid(bytes)
}

fn vm_entity(number: u8, classification: &str) -> VmEntity {
    VmEntity {
        uuid: vm(number),
        name: format!("vm-{number}").parse().unwrap(),
        tenant: "acme".to_owned(),
        classification: classification.to_owned(),
        home_site: "dc1".to_owned(),
        allowed_sites: vec!["dc1".to_owned(), "dc2".to_owned()],
        migratable: true,
        postcopy_ok: false,
        groups: vec!["tenant-acme".to_owned()],
    }
}

fn entities() -> Entities {
    let gateway = |spiffe: &str, site: &str, group: &str| GatewayEntity {
        spiffe: spiffe.parse().unwrap(),
        site: site.to_owned(),
        groups: vec![group.to_owned()],
    };
    Entities {
        gateways: vec![gateway(DC1, "dc1", "dc1-gateways"), gateway(DC2, "dc2", "dc2-gateways")],
        operators: vec![OperatorEntity { id: "alice".to_owned(), teams: vec!["sre".to_owned()], mfa: true }],
        vms: vec![vm_entity(1, "internal"), vm_entity(2, "restricted")],
    }
}

fn examples() -> PolicySet {
    let files = [file("10-floor.cedar", FLOOR), file("20-tenant-acme.cedar", ACME), file("30-operators.cedar", OPERATORS)];
    PolicySet::parse(&files, &entities()).unwrap()
}

fn set(text: &str) -> PolicySet {
    PolicySet::parse(&[file("a.cedar", text)], &entities()).unwrap()
}

fn refused(text: &str) -> Vec<PolicyProblem> {
    PolicySet::parse(&[file("a.cedar", text)], &entities()).unwrap_err().problems
}

fn context() -> MigrationContext {
    MigrationContext {
        now_unix_ms: 1_796_166_000_123,
        route: Route { src_site: "dc1".to_owned(), dst_site: "dc2".to_owned(), peer_ip: "10.20.3.4".parse().unwrap() },
        channel: Channel {
            tls: "1.3".to_owned(),
            kx: "X25519".to_owned(),
            suite: "TLS13_AES_128_GCM_SHA256".to_owned(),
            crl_fresh: true,
            peer_cert_days_left: 20,
        },
        stream: stream(),
        memory_mib: 4096,
        disk_count: 2,
        disk_mib: 10_240,
    }
}

fn stream() -> Stream {
    Stream {
        mode: Mode::Precopy,
        compression: Codec::Zstd,
        compression_scope: CodecScope::Stream,
        length_padding: false,
        durability: Durability::Dest,
        lanes: 4,
        storage: Storage::All,
    }
}

#[test]
fn policies_see_which_disks_move() {
    let permit = "@id(\"all\") permit (principal, action, resource);
";
    let forbid = |when: &str| {
        let forbid = "@id(\"f\") forbid (principal, action == Sealane::Action::\"accept\", resource)";
        set(&format!("{permit}{forbid} when {{ {when} }};"))
    };
    let asked = |set: &PolicySet, context: &MigrationContext| set.ask_accept(&peer(DC2), vm(1), context).is_ok();
    let none = MigrationContext { stream: Stream { storage: Storage::None, ..stream() }, disk_count: 0, disk_mib: 0, ..context() };
    let only = MigrationContext { stream: Stream { storage: Storage::Only, ..stream() }, ..context() };
    for (word, denied) in [("none", &none), ("all", &context()), ("only", &only)] {
        let set = forbid(&format!("context.stream.storage == \"{word}\""));
        for other in [&none, &context(), &only] {
            assert_eq!(asked(&set, other), other.stream.storage != denied.stream.storage, "{word}");
        }
    }
    assert!(!asked(&forbid("context.diskCount > 1"), &context()) && asked(&forbid("context.diskCount > 2"), &context()));
    assert!(!asked(&forbid("context.diskMiB >= 10240"), &context()) && asked(&forbid("context.diskMiB > 10240"), &context()));
    let huge = MigrationContext { disk_mib: u64::MAX, ..context() };
    assert!(!asked(&set(permit), &huge));
    // Facts that were written down before there were such words are about no disks.
    let mut old = serde_json::to_value(context()).unwrap();
    let members = old.as_object_mut().unwrap();
    assert!(members.remove("diskCount").is_some() && members.remove("diskMiB").is_some());
    members["stream"].as_object_mut().unwrap().remove("storage").unwrap();
    assert_eq!(serde_json::from_value::<MigrationContext>(old).unwrap(), none);
}

fn peer(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

#[test]
fn the_example_policies_decide_every_case_of_their_tests_file() {
    let outcomes = run_tests(&examples(), TESTS);
    for outcome in &outcomes {
        assert!(outcome.passed, "{}: {}", outcome.name, outcome.detail);
    }
    assert!(outcomes.len() >= 40, "{}", outcomes.len());
    let each: Vec<&str> = outcomes.iter().map(|outcome| outcome.name.as_str()).collect();
    let unique: std::collections::BTreeSet<&str> = each.iter().copied().collect();
    assert_eq!(each.len(), unique.len());
}

#[test]
fn a_change_to_any_example_policy_fails_one_of_its_tests() {
    // Planted bugs: each removes or inverts one condition of one policy.
    let mutants = [
        (0, "context.channel.tls == \"1.3\" &&", ""),
        (0, "context.channel.crlFresh &&", ""),
        (0, "context.channel.peerCertDaysLeft >= 0 &&", ""),
        (0, "resource.migratable &&", ""),
        (0, "&&\n  resource.allowedSites.contains(context.route.dstSite)", ""),
        (0, "context.channel.kx == \"X25519MLKEM768\" &&", ""),
        (0, "[\"TLS13_AES_256_GCM_SHA384\", \"TLS13_CHACHA20_POLY1305_SHA256\"].contains(context.channel.suite) &&", ""),
        (0, "context.stream.compression == \"none\" ||", ""),
        (0, "context.stream.compressionScope == \"page\" && ", ""),
        (0, " && context.stream.lengthPadding", ""),
        (0, "\"restricted\"", "\"internal\""),
        (0, "[\"postcopy\", \"hybrid\"]", "[\"postcopy\"]"),
        (0, "&& !resource.postcopyOk", ""),
        (0, "Sealane::Action::\"request\", ", ""),
        (1, "principal.trustDomain == \"dc2.example.net\" &&", ""),
        (1, "principal.site == context.route.dstSite &&", ""),
        (1, "context.route.srcSite == \"dc1\" && ", ""),
        (1, " &&\n  context.route.peerIp.isInRange(ip(\"10.20.0.0/16\"))", ""),
        (1, "principal.trustDomain == \"dc1.example.net\" &&", ""),
        (1, "principal.site == context.route.srcSite &&", ""),
        (1, " &&\n  context.memoryMiB <= 65536", ""),
        (2, "principal.mfa &&\n  context has", "context has"),
        (2, " && context.changeTicket like \"CHG-*\"", ""),
        (2, "context.now >= datetime(\"2026-12-01T22:00:00Z\") &&", ""),
        (2, "&&\n  context.now <  datetime(\"2026-12-02T04:00:00Z\")", ""),
        (2, "principal.mfa && context.fenceEvidence", "context.fenceEvidence"),
        (2, "&& context.fenceEvidence ", ""),
        (2, "context.approvers.contains(Sealane::Operator::\"oncall-security\") &&", ""),
        (2, " &&\n  !context.approvers.contains(principal)", ""),
    ];
    for (which, from, to) in mutants {
        let mut texts = [FLOOR.to_owned(), ACME.to_owned(), OPERATORS.to_owned()];
        assert!(texts[which].contains(from), "{from}");
        texts[which] = texts[which].replace(from, to);
        let files = [file("1", &texts[0]), file("2", &texts[1]), file("3", &texts[2])];
        let mutant = PolicySet::parse(&files, &entities()).unwrap();
        assert!(run_tests(&mutant, TESTS).iter().any(|outcome| !outcome.passed), "no test notices that {from:?} became {to:?}");
    }
}

#[test]
fn a_permit_says_whom_and_what_it_is_for() {
    let set = examples();
    let permit = set.ask_release(&peer(DC2), vm(1), &context()).unwrap();
    assert_eq!(permit.action(), "release");
    assert_eq!(permit.policy_ids(), ["p1-acme-dc1-to-dc2"]);
    assert_eq!(*permit.set_digest(), set.digest());
    assert_eq!((permit.principal(), permit.vm()), (DC2, vm(1)));
    assert!(permit.covers(DC2, vm(1), &stream()));
    assert!(!permit.covers(DC2, vm(2), &stream()));
    assert!(!permit.covers(DC1, vm(1), &stream()));
    assert!(!permit.covers(DC2, vm(1), &Stream { compression_scope: CodecScope::Page, ..stream() }));
}

#[test]
fn a_denial_names_the_forbid_and_reads_well() {
    let mut stale = context();
    stale.channel.crl_fresh = false;
    let denial = examples().ask_release(&peer(DC2), vm(1), &stale).unwrap_err();
    assert_eq!(denial.policy_ids, ["p2-channel-floor"]);
    assert_eq!(&*denial.why, "forbidden by `p2-channel-floor`");
    assert_eq!(denial.to_string(), format!("`release` of VM `{}` denied to `{DC2}`: forbidden by `p2-channel-floor`", vm(1)),);
}

#[test]
fn silence_denies() {
    let denial = examples().ask_release(&peer(DC1), vm(1), &context()).unwrap_err();
    assert_eq!((&*denial.why, denial.policy_ids.len(), denial.errors.len()), ("no policy permits", 0, 0));
}

#[test]
fn an_overflowing_forbid_denies_instead_of_being_skipped() {
    // Passes strict validation; Cedar alone says Allow here, because it skips the forbid.
    let text = format!(
        "{PERMIT_ALL}@id(\"boom\") forbid (principal, action == Sealane::Action::\"release\", resource) when {{ context.memoryMiB + 9223372036854775807 > 0 }};"
    );
    let set = set(&text);
    let denial = set.ask_release(&peer(DC2), vm(1), &context()).unwrap_err();
    assert_eq!(denial.errors.len(), 1);
    assert_eq!(denial.errors[0].policy.as_deref(), Some("boom"));
    assert!(denial.why.starts_with("policy `boom` failed to evaluate: "), "{}", denial.why);
    assert_eq!(denial.policy_ids, Vec::<String>::new(), "the permit did not forbid");
    let lint = set.lint();
    assert!(lint.iter().any(|problem| problem.what == "uses `+`" && problem.policy.as_deref() == Some("boom")), "{lint:?}");
    // The permit alone does allow, so the denial above comes from the error.
    assert!(self::set(PERMIT_ALL).ask_release(&peer(DC2), vm(1), &context()).is_ok());
    // And where the forbid's scope does not reach, nothing fails.
    assert!(set.ask_accept(&peer(DC2), vm(1), &context()).is_ok());
}

#[test]
fn a_policy_that_reads_an_entity_nobody_configured_denies() {
    let text = format!("{PERMIT_ALL}@id(\"ghost\") forbid (principal, action, resource) when {{ Sealane::Operator::\"ghost\".mfa }};");
    let set = set(&text);
    let denial = set.ask_accept(&peer(DC1), vm(1), &context()).unwrap_err();
    assert_eq!(denial.errors[0].policy.as_deref(), Some("ghost"));
    assert!(set.lint()[0].what.contains("ghost"), "{:?}", set.lint());
}

#[test]
fn an_erroring_permit_denies_even_when_another_permits() {
    let text = format!(
        "{PERMIT_ALL}@id(\"sum\") permit (principal, action == Sealane::Action::\"commit\", resource) when {{ 0 < context.memoryMiB * 9223372036854775807 }};"
    );
    let denial = set(&text).ask_commit(&peer(DC1), vm(1), &context()).unwrap_err();
    assert_eq!(denial.errors[0].policy.as_deref(), Some("sum"));
}

#[test]
fn an_unlisted_peer_has_its_trust_domain_and_nothing_else() {
    let stranger = peer("spiffe://dc2.example.net/gateway/new");
    assert!(examples().ask_release(&stranger, vm(1), &context()).is_err());
    let by_domain = set(
        "@id(\"d\") permit (principal, action == Sealane::Action::\"release\", resource) when { principal.trustDomain == \"dc2.example.net\" && principal.site == \"\" };",
    );
    assert!(by_domain.ask_release(&stranger, vm(1), &context()).is_ok());
    assert!(by_domain.ask_release(&peer("spiffe://dc3.example.net/gateway/new"), vm(1), &context()).is_err());
}

#[test]
fn an_unlisted_vm_and_an_unlisted_operator_get_the_least() {
    let explained = examples().explain(vm(9), &Question::Release(&peer(DC2), &context()));
    assert!(!explained.allowed && !explained.vm_known && explained.principal_known);
    let ids: Vec<&str> = explained.matched.iter().map(|matched| matched.id.as_str()).collect();
    assert_eq!(ids, ["p2-channel-floor", "p3-restricted-channel"]);
    let request = RequestContext { now_unix_ms: 0, route: context().route, stream: stream(), change_ticket: None };
    let team = set("@id(\"t\") permit (principal, action == Sealane::Action::\"request\", resource) when { !principal.mfa };");
    assert!(team.ask_request("uid:1000", vm(1), &request).is_ok());
    assert!(examples().ask_request("uid:1000", vm(1), &request).is_err());
    for bad in ["", &"x".repeat(limits::OPERATOR_ID_BYTES_MAX + 1)] {
        let denial = set(PERMIT_ALL).ask_request(bad, vm(1), &request).unwrap_err();
        assert!(denial.why.starts_with("the question cannot be judged: "), "{}", denial.why);
    }
}

#[test]
fn facts_that_do_not_fit_the_schema_deny() {
    let all = set(PERMIT_ALL);
    for now_unix_ms in [i64::MIN, i64::MAX, -70_000_000_000_000] {
        let denial = all.ask_release(&peer(DC2), vm(1), &MigrationContext { now_unix_ms, ..context() });
        assert!(denial.is_err(), "{now_unix_ms}");
    }
    let huge = MigrationContext { memory_mib: u64::MAX, ..context() };
    assert_eq!(all.ask_release(&peer(DC2), vm(1), &huge).unwrap_err().errors[0].policy, None);
}

#[test]
fn a_v4_peer_behind_a_dual_stack_socket_is_judged_by_its_v4_address() {
    let mut mapped = context();
    mapped.route.peer_ip = "::ffff:10.20.3.4".parse().unwrap();
    assert!(examples().ask_release(&peer(DC2), vm(1), &mapped).is_ok());
    mapped.route.peer_ip = "::ffff:10.21.3.4".parse().unwrap();
    assert!(examples().ask_release(&peer(DC2), vm(1), &mapped).is_err());
}

#[test]
fn explain_shows_the_permit_that_a_forbid_overruled() {
    let mut stale = context();
    stale.channel.crl_fresh = false;
    let explained = examples().explain(vm(1), &Question::Commit(&peer(DC2), &stale));
    let seen: Vec<(&str, bool)> = explained.matched.iter().map(|matched| (matched.id.as_str(), matched.permits)).collect();
    assert_eq!(seen, [("p1-acme-dc1-to-dc2", true), ("p2-channel-floor", false)]);
    assert_eq!(explained.matched[0].place.0, "20-tenant-acme.cedar");
    assert!(explained.matched[0].place.1 > 1);
}

#[test]
fn policies_that_are_wrong_are_refused_with_place_and_name() {
    let scope = "(principal, action == Sealane::Action::\"release\", resource)";
    let cases: &[(&str, &str, usize)] = &[
        // (text, part of the message, line)
        ("permit (principal, action, resource);", "no name", 1),
        ("@id(\"\") permit (principal, action, resource);", "invalid `@id`", 1),
        ("@id(\"a b\") permit (principal, action, resource);", "invalid `@id`", 1),
        ("@id permit (principal, action, resource);", "invalid `@id`", 1),
        ("\n\n@id(\"x\") permit (principal, action, resource", "unexpected", 3),
        ("@id(\"t\") permit (principal == ?principal, action, resource);", "template", 1),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ context.stream.mod == \"precopy\" }};"), "mod", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ resource.owner == \"acme\" }};"), "owner", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ principal.mfa }};"), "mfa", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ context.changeTicket == \"1\" }};"), "changeTicket", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ context.stream.lanes == \"4\" }};"), "type", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ context.memoryMiB < \"4\" }};"), "type", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ context.route.peerIp.isInRange(ip(\"10.0.0.0/99\")) }};"), "", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ context.now < datetime(\"tomorrow\") }};"), "", 2),
        (&format!("@id(\"x\") permit {scope}\nwhen {{ ip(context.channel.tls).isLoopback() }};"), "", 2),
        ("@id(\"x\")\npermit (principal, action == Sealane::Action::\"steal\", resource);", "steal", 2),
        ("@id(\"x\")\npermit (principal is Sealane::Gatway, action, resource);", "Gatway", 2),
        ("@id(\"x\")\npermit (principal is Gateway, action, resource);", "Gateway", 2),
        ("@id(\"x\") permit (principal in Sealane::Team::\"sre\", action == Sealane::Action::\"release\", resource);", "", 1),
        ("@id(\"x\") permit (principal, action, resource) when { false };", "", 1),
        ("@id(\"x\") forbid (principal, action, resource) when { principal has site && false };", "", 1),
        ("@id(\"x\") permit (principal in Sealane::Team::\"sr\u{435}\", action, resource);", "", 1),
        ("@id(\"x\") permit (principal in Sealane::Team::\"\u{202e}sre\", action, resource);", "not shown, `\\u{202e}`", 1),
        ("// for the night\n// \u{2066}shift\n@id(\"x\") permit (principal, action, resource);", "not shown, `\\u{2066}`", 2),
        ("// for the night\r@id(\"x\") permit (principal, action, resource);", "not shown, `\\u{d}`", 1),
        ("@id(\"x\") permit (principal, action, resource);\0", "not shown, `\\u{0}`", 1),
    ];
    for (text, part, line) in cases {
        let problems = refused(text);
        let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let place = format!("a.cedar:{line}:");
        assert!(all.iter().any(|problem| problem.starts_with(&place) && problem.contains(part)), "{text}\n{all:?}");
    }
}

#[test]
fn a_forbid_whose_attribute_is_misspelt_is_refused_not_ignored() {
    let broken = FLOOR.replace("context.stream.mode", "context.stream.mod");
    let problems = refused(&broken);
    assert!(problems.iter().all(|problem| problem.policy.as_deref() == Some("p4-postcopy-opt-in")), "{problems:?}");
    assert!(problems[0].hint.as_deref().unwrap_or_default().contains("mode"), "{problems:?}");
}

#[test]
fn all_problems_of_all_files_come_together() {
    let files = [
        file("b.cedar", "@id(\"x\") permit (principal, action, resource) when { context.nope };"),
        file("a.cedar", "permit (principal, action, resource);\n@id(\"y\") permit (principal, action, resource);"),
        file("c.cedar", "@id(\"y\") permit (principal, action, resource);\npermit oops"),
        file("d.cedar", "\n@id(\"y\") permit (principal, action, resource);"),
    ];
    let mut known = entities();
    known.vms.push(vm_entity(1, "internal"));
    known.vms.push(vm_entity(3, "secret"));
    let errors = PolicySet::parse(&files, &known).unwrap_err();
    let text = errors.to_string();
    for part in ["a.cedar:1:1", "b.cedar:1:", "c.cedar:2:", "d.cedar:2:1", "a.cedar:2:1", "listed twice", "`secret`"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn no_policy_is_an_error() {
    for files in [vec![], vec![file("a.cedar", "")], vec![file("a.cedar", "// nothing yet\n")]] {
        let errors = PolicySet::parse(&files, &entities()).unwrap_err();
        assert!(errors.to_string().contains("no policy"), "{errors}");
    }
}

#[test]
fn too_much_is_refused_before_it_is_parsed() {
    let condition = |body: String| format!("@id(\"x\") permit (principal, action, resource) when {{ {body} }};");
    let deep = limits::POLICY_NESTING_MAX;
    let nested = condition(format!("{}true{}", "(".repeat(deep), ")".repeat(deep)));
    assert!(refused(&nested)[0].what.contains("nested too deep"));
    let long = condition(format!("{} true", "true && ".repeat(limits::POLICY_DEPTH_MAX)));
    assert!(refused(&long)[0].what.contains("too many parts"));
    let many: Vec<PolicyFile> = (0..=limits::POLICY_FILES_MAX).map(|n| file(&n.to_string(), PERMIT_ALL)).collect();
    assert!(PolicySet::parse(&many, &entities()).unwrap_err().to_string().contains("too much policy"));
    let big = format!("//{}", "x".repeat(limits::POLICY_BYTES_MAX));
    assert!(refused(&big)[0].what.contains("too much policy"));
}

#[test]
fn the_deepest_policies_do_not_exhaust_a_worker_s_stack() {
    let condition =
        |body: String| format!("@id(\"x\") permit (principal, action == Sealane::Action::\"release\", resource) when {{ {body} }};");
    let shapes: [&dyn Fn(usize) -> String; 10] = [
        &|n| condition(format!("{}true", "context.channel.crlFresh && ".repeat(n))),
        &|n| condition(format!("{}context.channel.crlFresh", "context.memoryMiB == 7 || ".repeat(n))),
        &|n| condition(format!("context{} == 1", ".a".repeat(n))),
        &|n| condition(format!("context.memoryMiB{} > 0", "+1".repeat(n))),
        &|n| condition(format!("{}context.channel.crlFresh{}", "(".repeat(n), ")".repeat(n))),
        &|n| condition(format!("{}true", "if context.channel.crlFresh then true else ".repeat(n))),
        &|n| condition(format!("{}[1]{}.contains([1])", "[".repeat(n), "]".repeat(n))),
        &|n| condition(format!("{}context.channel.crlFresh{}", "!(".repeat(n), ")".repeat(n))),
        &|n| condition(format!("{}true{}", "{a: ".repeat(n), "}.a".repeat(n))),
        &|n| format!("@id(\"x\") permit (principal, action, resource) {};", "when { context has route }".repeat(n)),
    ];
    for shape in shapes {
        // The deepest that the check lets through.
        let most = (1..200).take_while(|n| super::shape::check(&shape(*n)).is_ok()).last().unwrap();
        let text = shape(most);
        let worker = std::thread::Builder::new().stack_size(2 << 20).spawn(move || {
            let set = PolicySet::parse(&[file("a.cedar", &text)], &entities()).ok()?;
            drop(set.lint());
            set.ask_release(&peer(DC2), vm(1), &context()).err().map(|denial| denial.errors)
        });
        let errors = worker.unwrap().join().unwrap().unwrap_or_default();
        assert!(most >= 6, "{}", shape(most));
        // Evaluation has its own stack check; it must not be what says no here.
        assert_eq!(errors, [], "{}", shape(most));
    }
}

#[test]
fn the_digest_follows_every_name_and_text_and_not_the_order() {
    let (a, b) =
        (file("a", "@id(\"a\") permit (principal, action, resource);"), file("b", "@id(\"b\") permit (principal, action, resource);"));
    let digest = |files: &[PolicyFile]| PolicySet::parse(files, &entities()).unwrap().digest();
    let first = digest(&[a.clone(), b.clone()]);
    assert_eq!(first, digest(&[b.clone(), a.clone()]));
    assert_ne!(first, digest(std::slice::from_ref(&a)));
    assert_ne!(first, digest(&[file("c", &a.text), b.clone()]));
    assert_ne!(first, digest(&[file("a", &format!("{} ", a.text)), b]));
}

#[test]
fn the_example_policies_have_no_arithmetic() {
    let found: Vec<_> = examples().lint().into_iter().filter(|problem| problem.what.starts_with("uses")).collect();
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn lint_finds_every_kind_of_arithmetic() {
    let wrap = |body: &str| format!("@id(\"x\") permit (principal, action == Sealane::Action::\"release\", resource) when {{ {body} }};");
    for (body, name) in [
        ("context.memoryMiB + 1 > 0", "+"),
        ("context.memoryMiB - 1 > 0", "-"),
        ("if context.memoryMiB * 2 > 0 then true else context.channel.crlFresh", "*"),
        ("-context.memoryMiB < 0", "-"),
        ("[context.now.toDate()].contains(datetime(\"2026-01-01\"))", "toDate"),
        ("context.now.offset(duration(\"1h\")) > context.now", "offset"),
        ("{x: context.now.durationSince(context.now)}.x > duration(\"1h\")", "durationSince"),
        ("!(resource.tenant == \"a\" && context.memoryMiB + 1 > 0)", "+"),
    ] {
        let found = set(&wrap(body)).lint();
        assert!(found.iter().any(|problem| problem.what == format!("uses `{name}`")), "{body}: {found:?}");
    }
    assert_eq!(set(&wrap("context.memoryMiB > -5")).lint(), []);
}

#[test]
fn a_tests_file_that_makes_no_sense_fails() {
    let set = examples();
    let one = |test: &str| format!("{{\"tests\": [{test}]}}");
    for text in [
        String::new(),
        "{}".to_owned(),
        "{\"tests\": []}".to_owned(),
        "{\"tests\": [], \"test\": []}".to_owned(),
        one("{\"name\": \"x\"}"),
        one(&format!("{{\"name\":\"x\",\"action\":\"steal\",\"principal\":\"a\",\"resource\":\"{}\",\"expect\":\"deny\"}}", vm(1))),
        // A denial that is expected does not excuse a context that is incomplete.
        one(&format!("{{\"name\":\"x\",\"action\":\"release\",\"principal\":\"{DC2}\",\"resource\":\"{}\",\"expect\":\"deny\"}}", vm(1))),
        one(&format!("{{\"name\":\"x\",\"action\":\"release\",\"principal\":\"nobody\",\"resource\":\"{}\",\"expect\":\"deny\"}}", vm(1))),
    ] {
        let outcomes = run_tests(&set, &text);
        assert!(!outcomes.is_empty() && outcomes.iter().all(|outcome| !outcome.passed), "{text}: {outcomes:?}");
    }
}

#[test]
fn a_tests_file_notices_the_wrong_policy_and_the_wrong_answer() {
    let set = examples();
    let flipped = TESTS.replacen("\"expect\": \"allow\"", "\"expect\": \"deny\"", 1);
    assert_eq!(run_tests(&set, &flipped).iter().filter(|outcome| !outcome.passed).count(), 1);
    let renamed = TESTS.replacen("\"policy\": \"p2-channel-floor\"", "\"policy\": \"p3-restricted-channel\"", 1);
    let outcomes = run_tests(&set, &renamed);
    let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed).collect();
    assert!(failed.len() == 1 && failed[0].detail.contains("expected policy"), "{failed:?}");
}

#[test]
fn what_is_left_out_by_the_index_would_not_have_matched() {
    // Every kind of scope and condition that puts a policy into a bucket, and each with its opposite.
    let scopes = [
        "principal",
        "principal is Sealane::Gateway",
        "principal in Sealane::GatewayGroup::\"dc2-gateways\"",
        "principal in Sealane::GatewayGroup::\"dc1-gateways\"",
        &format!("principal == Sealane::Gateway::\"{DC2}\""),
        &format!("principal == Sealane::Gateway::\"{DC1}\""),
    ];
    let resources = [
        "resource".to_owned(),
        "resource in Sealane::VmGroup::\"tenant-acme\"".to_owned(),
        "resource in Sealane::VmGroup::\"other\"".to_owned(),
        format!("resource == Sealane::Vm::\"{}\"", vm(1)),
        format!("resource == Sealane::Vm::\"{}\"", vm(2)),
    ];
    let conditions = [
        "true",
        "resource.tenant == \"acme\"",
        "\"other\" == resource.tenant",
        "principal.site == \"dc2\" && context.channel.crlFresh",
        "!(resource.tenant == \"acme\")",
        "resource.tenant == \"other\" || context.channel.crlFresh",
        "if resource.tenant == \"other\" then false else true",
    ];
    let mut text = String::new();
    let mut number = 0;
    for scope in scopes {
        for resource in &resources {
            for condition in conditions.iter().filter(|condition| scope.contains("Gateway") || !condition.contains("principal.site")) {
                number += 1;
                let action = "action == Sealane::Action::\"release\"";
                text += &format!("@id(\"p{number}\") permit ({scope}, {action}, {resource}) when {{ {condition} }};\n");
            }
        }
    }
    let set = set(&text);
    for (who, which) in [(DC2, 1), (DC1, 2), (DC1, 1), ("spiffe://dc3.example.net/gateway/new", 9)] {
        // Each alone, in an index of its own; and all at once by Cedar's own search.
        let (who, context) = (peer(who), context());
        let question = Question::Release(&who, &context);
        let mut alone: Vec<String> = set.explain(vm(which), &question).matched.into_iter().map(|policy| policy.id).collect();
        alone.sort();
        assert_eq!(set.settle(vm(which), &question, super::ask::Adjust::Nothing).ids, alone);
        let plain = set.ask_all(vm(which), &question).unwrap().ids;
        assert_eq!(plain, alone);
    }
    assert!(number > 190, "{number}");
}

#[test]
fn facts_of_a_question_ask_it_again() {
    let set = examples();
    let (who, context) = (peer(DC2), context());
    let question = Question::Release(&who, &context);
    let facts = set.facts(vm(1), &question).unwrap();
    let written = serde_json::json!({
        "action": "release", "principal": DC2, "resource": vm(1), "context": facts["context"], "entities": facts["entities"],
    });
    let written: WrittenQuestion = serde_json::from_value(written).unwrap();
    // Of a set that knows nobody.
    let files = [file("10-floor.cedar", FLOOR), file("20-tenant-acme.cedar", ACME), file("30-operators.cedar", OPERATORS)];
    let verdict = written.ask(&PolicySet::parse(&files, &Entities::default()).unwrap()).unwrap();
    assert_eq!((verdict.allowed, verdict.policy_ids), (true, vec!["p1-acme-dc1-to-dc2".to_owned()]));
    assert!(facts.to_string().len() < limits::AUDIT_FACTS_BYTES_MAX / 4, "{facts}");
}
