//! `sealane policy`.

use super::*;

#[test]
fn policy_check_says_every_error_with_its_place() {
    let dir = here();
    std::fs::create_dir(dir.path().join("p")).unwrap();
    std::fs::write(dir.path().join("p/a.cedar"), "// fine\n\npermit (principal, action, resource);\n").unwrap();
    std::fs::write(dir.path().join("p/b.cedar"), "@id(\"b\")\npermit (principal, action, resource)\nwhen { resource.nam == \"x\" };\n")
        .unwrap();
    let check = sealane(dir.path(), "policy check p").says(2, &["p/a.cedar:3:1: ", "@id", "p/b.cedar:3:", "policy `b`", "nam", "2 errors"]);
    assert!(check.stdout.is_empty(), "{}", check.stdout);
    let object = sealane(dir.path(), "policy check p --json").says(2, &[]).json();
    assert_eq!((object["schema"].as_str(), object["valid"].as_bool()), (Some("sealane.policy-check/1"), Some(false)));
    assert_eq!((object["errors"][0]["file"].as_str(), object["errors"][0]["line"].as_u64()), (Some("p/a.cedar"), Some(3)));
    sealane(dir.path(), "policy check none").says(2, &["`none`"]);
    std::fs::remove_file(dir.path().join("p/a.cedar")).unwrap();
    std::fs::remove_file(dir.path().join("p/b.cedar")).unwrap();
    sealane(dir.path(), "policy check p").says(2, &["no policy"]);
}

#[test]
fn policy_check_warns_of_names_only_against_a_configuration() {
    let dir = here();
    let policies = example("policy.d");
    let alone = sealane(dir.path(), &format!("policy check {policies}")).says(0, &["7 policies", "p1-acme-dc1-to-dc2", "digest"]);
    assert!(!alone.stderr.contains("warning"), "{}", alone.stderr);
    let line = format!("policy check {policies} --config {} --json", example("gateway.toml"));
    let against = sealane(dir.path(), &line).says(0, &["warning:", "20-tenant-acme.cedar:4:1", "dc2-gateways"]).json();
    assert_eq!((against["valid"].as_bool(), against["policies"].as_array().unwrap().len()), (Some(true), 7));
    assert_eq!(against["digest"].as_str().unwrap().len(), 64);
    assert!(against["warnings"].as_array().unwrap().iter().any(|warning| warning["policy"] == "p5-sre-window"), "{against}");
}

/// A bad policy, and words of the reason to refuse it.
const BAD_POLICIES: [(&str, &str); 11] = [
    ("@id(\"x\") permit (principal, action == Sealane::Action::\"release\", resource) when { context.memoryMiB + 1 > 0 };", "uses `+`"),
    ("@id(\"x\") permit (principal, action, resource) when { Sealane::Operator::\"a\".mfa };", "reads `mfa`"),
    ("@id(\"x\") permit (principal, action, resource) when { resource.tenant == \"a\" && resource.tenant == \"b\" };", "never matches"),
    ("@id(\"x\") permit (principal, action, resource) when { resource.migratable && !resource.migratable };", "never matches"),
    ("@id(\"x\") permit (principal, action, resource) when { false };", "impossible"),
    ("@id(\"a\") permit (principal, action, resource); @id(\"x\") permit (principal, action, resource);", "is shadowed"),
    ("@id(\"x\") permit (principal, action, resource); @id(\"f\") forbid (principal, action, resource);", "never permits"),
    ("@id(\"x\") forbid (principal, action, resource) when { resource.classification == \"secret\" };", "`secret`"),
    ("@id(\"x\") @max_lane(\"1\") permit (principal, action, resource);", "unknown annotation"),
    ("@id(\"x\") @require_mode(\"postcopy\") permit (principal, action, resource);", "no other mode can be asked for"),
    ("@id(\"x\") permit (principal, action, resource) when { resource.tenant like 5 };", "a.cedar:1:"),
];

#[test]
fn policy_check_refuses_what_nobody_means() {
    let dir = here();
    std::fs::create_dir(dir.path().join("p")).unwrap();
    for (text, words) in BAD_POLICIES {
        std::fs::write(dir.path().join("p/a.cedar"), text).unwrap();
        sealane(dir.path(), "policy check p").says(2, &["p/a.cedar:1:", words]);
        let object = sealane(dir.path(), "policy check p --json").says(2, &[]).json();
        assert_eq!(object["valid"], false, "{text}");
    }
}

#[test]
fn explain_answers_a_request_from_a_file() {
    let dir = here();
    let policies = example("policy.d");
    let tests: Value = serde_json::from_str(&std::fs::read_to_string(example("policy.d/tests.json")).unwrap()).unwrap();
    let request = |lanes: Value| {
        let mut request = serde_json::json!({
            "action": "release", "principal": "spiffe://dc2.example.net/gateway/gw-b", "resource": "00000000-0000-0000-0000-000000000001",
            "entities": tests["entities"], "context": tests["context"],
        });
        request["context"]["stream"]["lanes"] = lanes;
        request["context"]
            .as_object_mut()
            .unwrap()
            .retain(|name, _| ["now", "route", "channel", "stream", "memoryMiB"].contains(&name.as_str()));
        std::fs::write(dir.path().join("request.json"), request.to_string()).unwrap();
        sealane(dir.path(), &format!("policy explain {policies} --request request.json --json"))
    };
    let object = request(serde_json::json!(2)).says(0, &[]).json();
    assert_eq!(
        (&object["question"]["decision"], &object["question"]["policies"][0]["id"]),
        (&"allow".into(), &"p1-acme-dc1-to-dc2".into())
    );
    assert_eq!((&object["question"]["principal_known"], &object["question"]["vm_known"]), (&true.into(), &true.into()));
    request(serde_json::json!("many")).says(2, &["request.json", "`context.stream.lanes`: expected a whole number", "got string \"many\""]);
    std::fs::write(dir.path().join("request.json"), "{}").unwrap();
    sealane(dir.path(), &format!("policy explain {policies} --request request.json")).says(2, &["missing field"]);
}

/// A change of a request, and words of what is said of it.
const BAD_REQUESTS: [(&str, &str, &str); 17] = [
    ("/context/stream/lanes", "0", "`context.stream.lanes`: expected 1 to 16, got `0`"),
    ("/context/stream/lanes", "17", "`context.stream.lanes`: expected 1 to 16, got `17`"),
    ("/context/stream/lanes", "-1", "`context.stream.lanes`: expected a whole number from 0 to 65535, got integer `-1`"),
    ("/context/stream/lanes", "1.5", "`context.stream.lanes`: expected a whole number"),
    ("/context/stream/mode", "\"fast\"", "`context.stream.mode`: unknown variant `fast`, expected one of `precopy`"),
    ("/context/stream/lengthPadding", "\"no\"", "`context.stream.lengthPadding`: expected true or false, got string"),
    ("/context/stream", "[]", "`context.stream`: "),
    ("/context/route", "\"dc1\"", "`context.route`: expected an object, got string \"dc1\""),
    ("/context/route/peerIp", "\"here\"", "`context.route.peerIp`: "),
    ("/context/now", "\"noon\"", "`context.now`: `noon` is no RFC 3339 time"),
    ("/context/now", "7", "`context.now`: expected a text, got integer `7`"),
    ("/context/memoryMiB", "1e30", "`context.memoryMiB`: expected a whole number"),
    ("/context/memoryMiB", "70368744177664", "`context.memoryMiB`: expected at most"),
    ("/context/channel/crlFresh", "null", "`context.channel.crlFresh`: expected true or false, got nothing"),
    ("/principal", "\"gw-b\"", "`principal`: "),
    ("/resource", "\"web-1\"", "`resource`: "),
    ("/action", "\"steal\"", "`action`: unknown `steal`, expected `request`"),
];

#[test]
fn a_request_that_makes_no_sense_is_refused_with_its_field() {
    let dir = here();
    let policies = example("policy.d");
    let tests: Value = serde_json::from_str(&std::fs::read_to_string(example("policy.d/tests.json")).unwrap()).unwrap();
    let mut good = serde_json::json!({
        "action": "release", "principal": "spiffe://dc2.example.net/gateway/gw-b", "resource": "00000000-0000-0000-0000-000000000001",
        "context": tests["context"],
    });
    let fields = ["now", "route", "channel", "stream", "memoryMiB"];
    good["context"].as_object_mut().unwrap().retain(|name, _| fields.contains(&name.as_str()));
    let explain = |request: &Value, more: &str| {
        std::fs::write(dir.path().join("request.json"), request.to_string()).unwrap();
        sealane(dir.path(), &format!("policy explain {policies} --request request.json {more}"))
    };
    for (field, value, words) in BAD_REQUESTS {
        let mut bad = good.clone();
        *bad.pointer_mut(field).unwrap_or_else(|| panic!("no {field}")) = serde_json::from_str(value).unwrap();
        explain(&bad, "").says(2, &["`request.json` is no question: ", words]);
    }
    for (field, value, words) in [
        ("diskCount", 2, "`context.diskCount`: expected 0 where `context.stream.storage` is `none`"),
        ("diskMiB", 2, "`context.diskMiB`: expected 0 where `context.diskCount` is"),
        ("colour", 2, "`context.colour`: unknown field `colour`"),
    ] {
        let mut bad = good.clone();
        bad["context"][field] = value.into();
        explain(&bad, "").says(2, &[words]);
    }
    // The least is known of what nobody has described, and that is said.
    explain(&good, "")
        .says(3, &["gw-b` is unknown", "VM `00000000-0000-0000-0000-000000000001` is unknown", "nothing is known of gateways"]);
    std::fs::copy(example("gateway.toml"), dir.path().join("gateway.toml")).unwrap();
    let object = explain(&good, "--config gateway.toml --json").says(3, &[]).json();
    assert_eq!((&object["question"]["principal_known"], &object["question"]["vm_known"]), (&true.into(), &false.into()), "{object}");
    // What else describes a question is not for one that is written down.
    explain(&good, "--memory 4GiB").says(2, &["cannot be used with"]);
}

#[test]
fn policy_tests_pass_or_name_the_one_that_failed() {
    let dir = here();
    sealane(dir.path(), &format!("policy test {}", example("policy.d"))).says(0, &["61 of 61 tests", "pass  no approver"]);
    std::fs::create_dir(dir.path().join("p")).unwrap();
    std::fs::write(dir.path().join("p/a.cedar"), "@id(\"a\") permit (principal, action, resource);").unwrap();
    sealane(dir.path(), "policy test p").says(2, &["p/tests.json", "hint:"]);
    let tests = std::fs::read_to_string(example("policy.d/tests.json")).unwrap();
    std::fs::write(dir.path().join("p/tests.json"), tests).unwrap();
    sealane(dir.path(), "policy test p").says(1, &["FAIL  a gateway of another site gets nothing: allow: permitted by `a`"]);
    let object = sealane(dir.path(), "policy test p --json").says(1, &[]).json();
    assert_eq!(object["schema"].as_str(), Some("sealane.policy-test/1"));
    assert_eq!(object["failed"].as_u64().unwrap() + object["passed"].as_u64().unwrap(), 61);
    assert_eq!(object["tests"].as_array().unwrap().len(), 61);
    std::fs::write(dir.path().join("p/tests.json"), "{}").unwrap();
    sealane(dir.path(), "policy test p").says(1, &["FAIL", "missing field"]);
}

const EXPLAINED: &str = r#"
@id("out") permit (principal in Sealane::GatewayGroup::"production", action in [Sealane::Action::"release", Sealane::Action::"commit"], resource)
when { context.route.dstSite == "dc2" && context.memoryMiB <= 2048 };
@id("night") permit (principal in Sealane::Team::"vm-operators", action == Sealane::Action::"request", resource)
when { context.now < datetime("2026-01-01T06:00:00Z") };
@id("lanes") forbid (principal, action == Sealane::Action::"release", resource) when { context.stream.lanes > 4 };
"#;

#[test]
fn explain_says_who_decided_with_the_facts_of_the_configuration() {
    let dir = here();
    std::fs::create_dir(dir.path().join("p")).unwrap();
    std::fs::write(dir.path().join("p/a.cedar"), EXPLAINED).unwrap();
    std::fs::copy(example("gateway.toml"), dir.path().join("gateway.toml")).unwrap();
    let line = "policy explain p --config gateway.toml --vm web-1 --peer gw-b";
    let run = |more: &str| sealane(dir.path(), &format!("{line} {more}"));
    run("").says(
        0,
        &["`web-1` from `gw-a` to `gw-b`: permitted", "permits: `out` at a.cedar:2:1", "from `gw-b` to `gw-a`: denied", "--operator"],
    );
    run("--operator alice --at 2026-01-01T05:00:00Z").says(0, &["permits: `night`"]);
    run("--operator alice --at 2026-01-01T07:00:00Z").says(3, &["DENY    request  no policy permits"]);
    run("--action release").says(0, &["permit  release"]);
    run("--action release --memory 4GiB").says(3, &["DENY    release", "4.0 GiB of memory"]);
    run("--action accept").says(3, &["DENY    accept"]);
    let object = run("--json --operator alice --at 2026-01-01T05:00:00Z --peer-ip 10.1.2.3").json();
    assert_eq!((object["schema"].as_str(), object["permitted"][0].as_str()), (Some("sealane.policy-explain/1"), Some("leaving")));
    assert_eq!((object["facts"]["peer_ip"].as_str(), object["facts"]["memory_bytes"].as_u64()), (Some("10.1.2.3"), Some(1 << 30)));
    let questions: Vec<_> =
        object["questions"].as_array().unwrap().iter().map(|q| (q["action"].as_str().unwrap(), q["decision"].as_str().unwrap())).collect();
    assert_eq!(questions, [("request", "allow"), ("release", "allow"), ("commit", "allow"), ("accept", "deny"), ("commit", "deny")]);
    assert_eq!(object["questions"][1]["policies"][0]["id"].as_str(), Some("out"));
    // A forbid is shown beside the permit that it overrules.
    let config = std::fs::read_to_string(example("gateway.toml")).unwrap().replace("lanes = 2", "lanes = 8");
    std::fs::write(dir.path().join("gateway.toml"), config).unwrap();
    run("--action release").says(3, &["forbidden by `lanes`", "forbids: `lanes`", "permits: `out`", "8 lanes"]);
    let other = "policy explain p --config gateway.toml --vm web-2 --peer gw-b";
    sealane(dir.path(), other).says(2, &["no VM `web-2` in `gateway.toml`", "there are: web-1"]);
    run("--operator bob").says(2, &["no operator `bob`", "there are: alice"]);
    run("--action request").says(2, &["--operator"]);
}
