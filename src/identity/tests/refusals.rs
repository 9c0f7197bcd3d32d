//! Every way a chain can be wrong, through real handshakes in both directions and directly.

use super::fixtures::Variant;
use super::*;

#[test]
fn the_table_is_large_and_names_every_case_once() {
    let mut names: Vec<_> = WORLD.variants.iter().map(|variant| variant.name).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all);
    assert!(all >= 120, "{all} cases");
}

#[test]
fn identify_refuses_every_variant_for_its_own_reason() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    check_all(|variant| {
        let error = gateway.identify(&variant.leaf.chain).expect_err(variant.name);
        assert_eq!(error.class(), crate::wire::ErrorClass::Unauthenticated);
        error.refusal().map(|reason| reason.code().to_owned())
    });
    assert_eq!(gateway.identify(&[]).unwrap_err().refusal(), Some(&RefusalReason::NoCertificate));
    assert!(gateway.drain_refusals(Duration::ZERO).is_empty(), "identify answers its caller; only handshakes are recorded");
}

#[test]
fn the_accepting_side_refuses_every_variant_and_keeps_the_reason() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    check_all(|variant| {
        let shaken = shake(&Arc::new(Hostile::new(&variant.leaf).client()), &gateway.server_config());
        let error = shaken.server.map(drop).expect_err(variant.name);
        assert!(shaken.client.is_err(), "{}: the peer was not told", variant.name);
        recorded(&gateway, PeerRole::Client, variant, &error)
    });
}

#[test]
fn the_dialling_side_refuses_every_variant_and_keeps_the_reason() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    check_all(|variant| {
        let shaken = shake(&gateway.client_config(), &Arc::new(Hostile::new(&variant.leaf).server()));
        let error = shaken.client.map(drop).expect_err(variant.name);
        assert!(shaken.server.is_err(), "{}: the peer was not told", variant.name);
        recorded(&gateway, PeerRole::Server, variant, &error)
    });
}

/// Runs every variant and reports all that went wrong, not only the first.
fn check_all(code_of: impl Fn(&Variant) -> Option<String>) {
    let wrong: Vec<_> = WORLD
        .variants
        .iter()
        .filter_map(|variant| {
            let found = code_of(variant);
            (found.as_deref() != Some(variant.expected)).then(|| format!("{}: expected {}, got {found:?}", variant.name, variant.expected))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn recorded(gateway: &Credentials, role: PeerRole, variant: &Variant, error: &rustls::Error) -> Option<String> {
    let reason = refusal_reason(error)?;
    let mut refusals = gateway.drain_refusals(Duration::ZERO);
    let refusal = refusals.pop().unwrap_or_else(|| panic!("{}: nothing recorded", variant.name));
    assert!(refusals.is_empty(), "{}: recorded twice", variant.name);
    assert_eq!((&refusal.reason, refusal.role), (&reason, role), "{}", variant.name);
    assert_eq!(refusal.leaf_sha256, super::super::leaf::sha256(&variant.leaf.chain[0]), "{}", variant.name);
    Some(reason.code().to_owned())
}

#[test]
fn messages_name_the_object_and_what_was_expected() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    let message = |name: &str| {
        let variant = WORLD.variants.iter().find(|variant| variant.name == name).unwrap();
        gateway.identify(&variant.leaf.chain).unwrap_err().to_string()
    };
    assert_eq!(message("two-uris"), "the peer's certificate has 2 URI names: expected exactly one");
    assert_eq!(message("hidden-second-uri"), "the peer's certificate has 2 URI names: expected exactly one");
    assert_eq!(message("uri-http"), "the peer's certificate names `https://dc1.test/gateway/a`: expected `spiffe://trust-domain/path`");
    assert_eq!(message("domain-not-configured"), "the peer belongs to trust domain `strange.test`, which is not configured here");
    assert_eq!(message("crl-missing"), "no CRL of trust domain `dc1.test` covers the peer's chain");
    assert_eq!(message("seven-intermediates"), "the peer presented a chain of 8 certificates: expected at most 7");
    assert!(message("uri-with-nul").contains("`spiffe://dc1.test/a\\u{0}b`"), "{}", message("uri-with-nul"));
    assert!(message("expired").starts_with("the peer's certificate expired at 20"), "{}", message("expired"));
}

#[test]
fn a_claim_is_recorded_but_bounded_and_escaped() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    for (name, claimed) in [
        ("wrong-ca", Some("spiffe://dc1.test/gateway/a")),
        ("dns-only", None),
        ("not-der", None),
        ("uri-with-nul", Some("spiffe://dc1.test/a\\u{0}b")),
    ] {
        let variant = WORLD.variants.iter().find(|variant| variant.name == name).unwrap();
        let _ = shake(&Arc::new(Hostile::new(&variant.leaf).client()), &gateway.server_config());
        assert_eq!(gateway.drain_refusals(Duration::ZERO).pop().unwrap().claimed.as_deref(), claimed, "{name}");
    }
    let long = WORLD.variants.iter().find(|variant| variant.name == "uri-too-long").unwrap();
    let _ = shake(&Arc::new(Hostile::new(&long.leaf).client()), &gateway.server_config());
    assert!(gateway.drain_refusals(Duration::ZERO).pop().unwrap().claimed.unwrap().len() <= 256);
}

/// So that what the transport and what the verifier know of one refusal can be put together.
#[test]
fn the_words_of_a_failed_handshake_find_its_refusal_and_no_other() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    let mut words = Vec::new();
    for name in ["no-eku", "expired", "revoked"] {
        let variant = WORLD.variants.iter().find(|variant| variant.name == name).unwrap();
        let error = shake(&Arc::new(Hostile::new(&variant.leaf).client()), &gateway.server_config()).server.unwrap_err().to_string();
        words.push(error.strip_prefix("invalid peer certificate: Other(OtherError(").unwrap().strip_suffix("))").unwrap().to_owned());
    }
    assert!(gateway.drain_refusals(Duration::from_secs(3600)).is_empty(), "they wait for whoever knows more");
    assert_eq!(gateway.take_refusal(&words[1]).unwrap().reason.code(), "expired");
    assert!(gateway.take_refusal(&words[1]).is_none(), "once");
    assert!(gateway.take_refusal("the peer's certificate is revoked").is_none());
    let left: Vec<_> = gateway.drain_refusals(Duration::ZERO).into_iter().map(|refusal| refusal.reason.code()).collect();
    assert_eq!(left, ["no-extended-key-usage", "revoked"]);
}

#[test]
fn a_flood_of_refusals_is_bounded_and_counted() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    let hostile = Arc::new(Hostile::new(&WORLD.variants[0].leaf).client());
    for _ in 0..crate::limits::REFUSALS_KEPT_MAX + 3 {
        let _ = shake(&hostile, &gateway.server_config());
    }
    assert_eq!(gateway.lost_refusals(), 3);
    assert_eq!(gateway.drain_refusals(Duration::ZERO).len(), crate::limits::REFUSALS_KEPT_MAX);
    assert!(gateway.drain_refusals(Duration::ZERO).is_empty());
}

#[test]
fn no_flipped_byte_and_no_prefix_of_a_chain_is_accepted() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    let good = &WORLD.good_intermediate.chain;
    assert!(gateway.identify(good).is_ok());
    for (position, certificate) in good.iter().enumerate() {
        let with = |der: Vec<u8>| {
            let mut chain = good.clone();
            chain[position] = der.into();
            gateway.identify(&chain)
        };
        for index in 0..certificate.len() {
            let mut flipped = certificate.to_vec();
            flipped[index] ^= 0x01;
            assert!(with(flipped).is_err(), "certificate {position}, byte {index} flipped");
            assert!(with(certificate[..index].to_vec()).is_err(), "certificate {position} cut at {index}");
        }
    }
}

#[test]
fn the_order_of_intermediates_and_useless_ones_do_not_matter() {
    let gateway = Place::new().gateway("a", &WORLD.good_a);
    let mut chain = WORLD.good_intermediate.chain.clone();
    chain.insert(1, WORLD.other_root.der.clone());
    chain.push(WORLD.good_b.chain[0].clone());
    assert!(gateway.identify(&chain).is_ok());
}
