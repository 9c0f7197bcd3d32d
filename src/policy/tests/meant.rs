//! What lint finds, and what permits ask of a stream.

use super::*;

fn release(annotations: &str, condition: &str) -> String {
    format!("{annotations} permit (principal, action == Sealane::Action::\"release\", resource) when {{ {condition} }};\n")
}

#[test]
fn lint_finds_policies_that_never_decide_anything() {
    let defects = |text: &str| -> Vec<String> {
        let found = set(text).lint().into_iter().filter(|problem| problem.defect);
        found.map(|problem| format!("{}: {}", problem.policy.unwrap_or_default(), problem.what)).collect()
    };
    let tenant = |id: &str, more: &str| release(&format!("@id(\"{id}\")"), &format!("resource.tenant == \"acme\"{more}"));
    let forbid = "@id(\"f\") forbid (principal, action, resource) when { resource.tenant == \"acme\" };\n";
    for (text, found) in [
        (tenant("a", "") + &tenant("b", " && context.channel.crlFresh"), "b: is shadowed: `a`"),
        (tenant("a", "") + &tenant("b", ""), "b: is shadowed: `a`"),
        (tenant("a", " && context.channel.crlFresh") + forbid, "a: never permits: `f`"),
        (tenant("a", " && resource.tenant == \"other\""), "a: never matches: `resource.tenant` is to be `acme` and `other`"),
        (tenant("a", " && !(resource.tenant == \"acme\")"), "a: never matches: it wants"),
        (tenant("a", " && context.stream.mode == \"pre-copy\""), "a: compares `context.stream.mode` with `pre-copy`"),
        (tenant("a", " && [\"postcopy\", \"hybird\"].contains(context.stream.mode)"), "hybird"),
        (tenant("a", " && \"secret\" != resource.classification"), "secret"),
        (tenant("a", " && (if context.channel.crlFresh then Sealane::Operator::\"x\" else Sealane::Operator::\"y\").mfa"), "reads `mfa`"),
    ] {
        let defects = defects(&text);
        assert!(defects.iter().any(|defect| defect.contains(found)), "{text}: {defects:?}");
    }
    for text in [
        // Neither says less than the other.
        tenant("a", " && context.channel.crlFresh") + &tenant("b", " && context.memoryMiB < 9"),
        // A permit that asks for something is not needless, and a forbid behind a condition leaves something to permit.
        tenant("a", "") + &release("@id(\"b\") @max_lanes(\"2\")", "resource.tenant == \"acme\" && context.channel.crlFresh"),
        tenant("a", "") + "@id(\"f\") forbid (principal, action, resource) when { resource.tenant == \"acme\" && !resource.migratable };",
        tenant("a", " && [\"postcopy\", \"hybrid\"].contains(context.stream.mode) && resource.homeSite == resource.tenant"),
        [FLOOR, ACME, OPERATORS].concat(),
    ] {
        assert_eq!(defects(&text), Vec::<String>::new(), "{text}");
    }
}

#[test]
fn the_terms_of_a_permit_are_the_strictest_that_all_matching_permits_ask_for() {
    let text = release("@id(\"a\") @require_durability(\"dest\") @max_lanes(\"3\") @max_bandwidth(\"1Gbit/s\")", "true")
        + &release("@id(\"b\") @require_durability(\"both\") @require_compression_scope(\"page\")", "resource.tenant == \"acme\"")
        + &release("@id(\"c\") @require_length_padding(\"true\") @max_bandwidth(\"8Mbit/s\")", "context.stream.durability == \"both\"")
        + &release("@id(\"d\") @require_compression(\"none\")", "resource.tenant == \"nobody\"");
    let set = set(&text);
    let permit = set.ask_release(&peer(DC2), vm(1), &context()).unwrap();
    let wanted = Stream {
        durability: Durability::Both,
        lanes: 3,
        compression_scope: CodecScope::Page,
        // `c` matches only what `b` has asked for.
        length_padding: true,
        ..stream()
    };
    assert_eq!(permit.stream(), Some(&wanted));
    assert_eq!(permit.obligations().bandwidth_max(), Some(1_000_000));
    assert_eq!(permit.policy_ids(), ["a", "b", "c"]);
    // What was offered with other terms cannot be changed any more.
    let denial = set.ask_release_again(&peer(DC2), vm(1), &context()).unwrap_err();
    assert_eq!(
        &*denial.why,
        "`a`, `b` asks for compression scope `page`, and it is `stream`; durability `both`, and it is `dest`; at most 3 lanes, and there are 4"
    );
    assert_eq!(denial.policy_ids, Vec::<String>::new(), "permits do not forbid");
    assert!(set.ask_release_again(&peer(DC2), vm(1), &MigrationContext { stream: wanted, ..context() }).is_ok());
}

#[test]
fn an_obligation_comes_before_the_forbid_that_wants_the_same() {
    let floor = "@id(\"floor\") forbid (principal, action == Sealane::Action::\"release\", resource) unless { context.stream.durability == \"both\" };\n";
    let obliged = set(&(release("@id(\"a\") @require_durability(\"both\")", "true") + floor));
    assert!(obliged.ask_release(&peer(DC2), vm(1), &context()).is_ok());
    assert_eq!(obliged.ask_release_again(&peer(DC2), vm(1), &context()).unwrap_err().policy_ids, ["floor"]);
    // Without the obligation nothing is changed to please the forbid.
    assert!(set(&(release("@id(\"a\")", "true") + floor)).ask_release(&peer(DC2), vm(1), &context()).is_err());
}

#[test]
fn a_key_exchange_that_is_asked_for_cannot_be_given_later() {
    let set = set(&release("@id(\"a\") @require_post_quantum(\"true\")", "true"));
    let denial = set.ask_release(&peer(DC2), vm(1), &context()).unwrap_err();
    assert_eq!(&*denial.why, "`a` asks for key exchange `X25519MLKEM768`, and it is `X25519`");
    let mut hybrid = context();
    hybrid.channel.kx = "X25519MLKEM768".to_owned();
    assert!(set.ask_release(&peer(DC2), vm(1), &hybrid).is_ok());
}

#[test]
fn a_destination_grants_fewer_lanes_and_can_change_nothing_else() {
    let accept = |annotations: &str| set(&release(annotations, "true").replace("release", "accept"));
    let permit = accept("@id(\"a\") @max_lanes(\"2\")").ask_accept(&peer(DC1), vm(1), &context()).unwrap();
    assert_eq!(permit.stream().map(|stream| stream.lanes), Some(2));
    let denial = accept("@id(\"a\") @require_durability(\"both\")").ask_accept(&peer(DC1), vm(1), &context()).unwrap_err();
    assert_eq!(&*denial.why, "`a` asks for durability `both`, and it is `dest`");
}

#[test]
fn annotations_that_nobody_keeps_are_refused() {
    let kinds = [
        ("@max_lane(\"2\")", "unknown annotation `@max_lane`"),
        ("@max_lanes(\"0\")", "expected 1 to 16"),
        ("@max_lanes(\"17\")", "expected 1 to 16"),
        ("@max_bandwidth(\"100\")", "Mbit/s"),
        ("@max_bandwidth(\"0Mbit/s\")", "Mbit/s"),
        ("@max_bandwidth(\"-1Mbit/s\")", "Mbit/s"),
        ("@max_bandwidth(\"99999999999999999999Gbit/s\")", "Mbit/s"),
        ("@require_durability(\"none\")", "`dest` or `both`"),
        ("@require_compression(\"zstd\")", "`none`"),
        ("@require_compression_scope(\"stream\")", "`page` or `batch`"),
        ("@require_length_padding(\"false\")", "`true`"),
        ("@require_post_quantum(\"yes\")", "`true`"),
        ("@require_mode(\"hybrid\")", "no other mode can be asked for"),
    ];
    for (annotation, words) in kinds {
        let problems = refused(&release(&format!("@id(\"a\") {annotation}"), "true"));
        assert!(problems.iter().any(|problem| problem.what.contains(words)), "{annotation}: {problems:?}");
    }
    assert!(refused("@id(\"a\") @max_lanes(\"2\") forbid (principal, action, resource);")[0].what.contains("a forbid cannot"));
    assert!(set("@id(\"a\") @note(\"for people\") permit (principal, action, resource);").lint().is_empty());
}
