//! What the files of an identity must be like before anything is used.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use super::fixtures::{Ca, days, gateway_id};
use super::*;

fn load_error(config: IdentityConfig) -> IdentityError {
    Credentials::load(config).map(|_| ()).unwrap_err()
}

#[test]
fn keys_that_others_can_read_are_refused_with_their_mode() {
    let place = Place::new();
    for mode in [0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o777] {
        for signing in [false, true] {
            let config = place.config("a", &WORLD.good_a);
            let path = if signing { &config.signing_key } else { &config.key };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let expected =
                format!("private key `{}` has mode {mode:04o}: expected no access for group and others, e.g. 0600", path.display());
            assert_eq!(load_error(config.clone()).to_string(), expected);
            fs::set_permissions(if signing { &config.signing_key } else { &config.key }, fs::Permissions::from_mode(0o400)).unwrap();
            assert!(Credentials::load(config).is_ok(), "0400 is as good as 0600");
        }
    }
}

#[test]
fn a_key_must_belong_to_its_certificate() {
    let place = Place::new();
    let config = place.config("a", &WORLD.good_a);
    fixtures::write_private(&config.key, &WORLD.good_b.key_pem());
    assert!(matches!(load_error(config), IdentityError::KeyMismatch { .. }));
}

#[test]
fn a_signing_key_must_be_ed25519() {
    let place = Place::new();
    let config = place.config("a", &WORLD.good_a);
    fixtures::write_private(&config.signing_key, &WORLD.good_a.key_pem());
    assert!(matches!(load_error(config), IdentityError::Malformed { what: "signing key", .. }));
}

#[test]
fn our_own_certificate_obeys_the_rules_for_peers() {
    let place = Place::new();
    for (name, code) in [
        ("two-uris", "several-uri-names"),
        ("no-san", "no-subject-alt-name"),
        ("ca-leaf", "ca-certificate"),
        ("no-eku", "no-extended-key-usage"),
    ] {
        let variant = WORLD.variants.iter().find(|variant| variant.name == name).unwrap();
        let error = load_error(place.config("x", &variant.leaf));
        assert!(matches!(&error, IdentityError::OwnCertificate { reason, .. } if reason.code() == code), "{name}: {error}");
    }
}

#[test]
fn expiry_of_our_own_certificate_does_not_keep_us_from_starting() {
    let place = Place::new();
    let variant = WORLD.variants.iter().find(|variant| variant.name == "expired").unwrap();
    let a = place.gateway("old", &variant.leaf);
    assert!(a.own_not_after() < SystemTime::now());
    let b = place.gateway("b", &WORLD.good_b);
    let refused = shake(&a.client_config(), &b.server_config()).server.map(drop).unwrap_err();
    assert_eq!(refusal_reason(&refused).unwrap().code(), "expired");
}

#[test]
fn our_own_standing_is_what_peers_with_our_trust_would_say() {
    let place = Place::new();
    let standing = |name: &str| {
        let variant = WORLD.variants.iter().find(|variant| variant.name == name).unwrap();
        place.gateway(name, &variant.leaf).own_standing().unwrap_err().refusal().unwrap().code()
    };
    assert_eq!((standing("expired"), standing("revoked"), standing("wrong-ca")), ("expired", "revoked", "unknown-issuer"));
    assert_eq!(place.gateway("a", &WORLD.good_a).own_standing().unwrap().spiffe().as_str(), gateway_id("a"));
}

#[test]
fn the_next_crl_expiry_is_the_earliest_of_all() {
    let mut place = Place::new();
    place.trust.truncate(2);
    place.trust[0].crls.retain(|path| !path.ends_with("stale.crl"));
    fs::write(place.dir.path().join("dc2.test/root.crl"), WORLD.other_root.crl(5, 0, 3, &[])).unwrap();
    let a = place.gateway("a", &WORLD.good_a);
    let left = a.next_crl_expiry().unwrap().duration_since(SystemTime::now()).unwrap();
    assert!(left < Duration::from_secs(3 * 86_400) && left > Duration::from_secs(2 * 86_400), "{left:?}");
}

#[test]
fn trust_must_be_complete_and_unambiguous() {
    let place = Place::new();
    let good = place.config("a", &WORLD.good_a);
    let with = |change: fn(&mut Vec<TrustDomainConfig>)| {
        let mut config = good.clone();
        change(&mut config.trust);
        load_error(config).to_string()
    };
    assert_eq!(with(Vec::clear), "no trust domain is configured: expected at least one");
    assert_eq!(with(|trust| trust[0].crls.clear()), "trust domain `dc1.test` has no CRL: expected at least one CRL file");
    assert_eq!(with(|trust| trust.push(trust[0].clone())), "trust domain `dc1.test` is configured twice");
    assert!(with(|trust| trust[0].domain = "DC1.test".to_owned()).starts_with("`DC1.test` is not a trust domain"));
    assert!(with(|trust| trust[0].crls = vec![trust[0].crls[0].clone(); 65]).starts_with("65 CRL files of a trust domain are configured"));
    assert!(with(|trust| *trust = vec![trust[0].clone(); 257]).starts_with("257 trust domains are configured"));
    assert!(
        with(|trust| trust[0].roots = PathBuf::from("/nowhere/roots.pem"))
            .starts_with("cannot read root certificates `/nowhere/roots.pem`")
    );
    assert!(with(|trust| trust[0].crls[0] = PathBuf::from("/nowhere/x.crl")).starts_with("cannot read CRL `/nowhere/x.crl`"));
}

#[test]
fn only_authorities_can_be_roots() {
    let place = Place::new();
    let roots = &place.trust[0].roots;
    let signer_only = Ca::root_with("no cert sign", |params| params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign]);
    for pem in [WORLD.good_a.chain_pem(), signer_only.pem] {
        fs::write(roots, format!("{}{pem}", WORLD.root.pem)).unwrap();
        assert!(matches!(load_error(place.config("a", &WORLD.good_a)), IdentityError::RootNotAuthority { .. }));
    }
    fs::write(roots, WORLD.root.pem.repeat(33)).unwrap();
    assert!(matches!(load_error(place.config("a", &WORLD.good_a)), IdentityError::Count { count: 33, limit: 32, .. }));
    fs::write(roots, WORLD.good_a.key_pem()).unwrap();
    assert!(matches!(load_error(place.config("a", &WORLD.good_a)), IdentityError::Count { count: 0, .. }));
}

#[test]
fn unfit_crls_are_refused_when_they_are_loaded() {
    let place = Place::new();
    let root = &WORLD.root;
    let error = |crl: Vec<u8>| {
        place.write_crl("root.crl", &crl);
        load_error(place.config("a", &WORLD.good_a))
    };
    assert!(matches!(error(root.crl(7, 1, 30, &[])), IdentityError::CrlFromFuture { .. }));
    assert!(matches!(error(root.impostor().crl(900, 0, 30, &[])), IdentityError::CrlForged { .. }));
    let partition = root.crl_with(8, days(0), days(30), &[], Some("http://dc1.test/crl"));
    assert_eq!(
        error(partition).to_string(),
        format!("CRL `{}` is malformed: expected a CRL of everything its issuer issued, not a partition", place.crl("root.crl").display())
    );
    // CRLs below were never signed again after the edit; they are refused for their shape before that.
    let mut without_number = root.crl(7, 0, 30, &[]);
    let number = without_number.windows(5).position(|window| window == [0x06, 0x03, 0x55, 0x1d, 0x14]).unwrap();
    without_number[number + 4] = 0x1b;
    assert!(error(without_number).to_string().ends_with("expected a complete CRL, not a delta"));
    let mut tampered = root.crl(7, 0, 30, &[]);
    *tampered.last_mut().unwrap() ^= 1;
    assert!(matches!(error(tampered), IdentityError::CrlForged { .. }));
}

/// As a forger would make a list to bring revoked gateways back, or to keep all out: the issuer's name, a higher number, another key.
#[test]
fn a_forged_crl_of_an_intermediate_is_refused_with_its_file_and_displaces_nothing() {
    let real = &WORLD.intermediate;
    let forger = real.impostor();
    let good = real.crl(7, 0, 30, &[]);
    let (_, list) = x509_parser::parse_x509_crl(&good).unwrap();
    let key_id = |extension: &x509_parser::extensions::X509Extension<'_>| match extension.parsed_extension() {
        x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(id) => Some(id.key_identifier.as_ref().unwrap().0.to_vec()),
        _ => None,
    };
    let of_real = list.extensions().iter().find_map(key_id).unwrap();
    let forged = [
        ("the forger's own key id", forger.crl(900, 0, 30, &[])),
        ("the key id of the issuer", forger.crl_saying(900, &of_real)),
        ("the key id of nobody", forger.crl_saying(900, &[7; 20])),
        ("a list that revokes everybody", forger.crl(900, 0, 30, &[&WORLD.good_intermediate.serial])),
    ];
    for (known_by, own) in [("its own chain", &WORLD.good_intermediate), ("`intermediates`", &WORLD.good_a), ("nobody", &WORLD.good_a)] {
        for (what, der) in &forged {
            let case = format!("{what}, the issuer known by {known_by}");
            let mut place = Place::new();
            if known_by == "`intermediates`" {
                let path = place.dir.path().join("intermediates.pem");
                fs::write(&path, format!("{}{}", WORLD.other_root.pem, real.pem)).unwrap();
                place.trust[0].intermediates = Some(path);
            }
            let gateway = place.gateway("a", own);
            let revoked = WORLD.variants.iter().find(|variant| variant.name == "revoked-below-intermediate").unwrap();
            let judged = |leaf: &Leaf| gateway.identify(&leaf.chain).map_err(|error| error.refusal().unwrap().code());
            assert!(judged(&WORLD.good_intermediate).is_ok(), "{case}");
            let unverified = |gateway: &Credentials| gateway.unverified_crls().contains(&place.crl("intermediate.crl"));
            assert_eq!(unverified(&gateway), known_by == "nobody", "{case}");
            place.write_crl("intermediate.crl", der);
            let reloaded = gateway.reload().map_err(|error| error.to_string());
            if known_by == "nobody" {
                // It is the peer's chain that says who the issuer is.
                assert_eq!((reloaded, unverified(&gateway)), (Ok(()), true), "{case}");
                assert_eq!(judged(&WORLD.good_intermediate).unwrap_err(), "crl-bad-signature", "{case}");
            } else {
                let expected = format!("CRL `{}` is not signed by the issuer it names", place.crl("intermediate.crl").display());
                assert_eq!(reloaded, Err(expected), "{case}");
                assert!(judged(&WORLD.good_intermediate).is_ok(), "{case}: the last good one stays");
                assert!(matches!(Credentials::load(place.config("a", own)), Err(IdentityError::CrlForged { .. })), "{case}: at a start");
            }
            assert!(matches!(judged(&revoked.leaf), Err("revoked" | "crl-bad-signature")), "{case}: {:?}", judged(&revoked.leaf));
            // The number of a list that was refused is not remembered; that of one that nobody could check is.
            place.write_crl("intermediate.crl", &real.crl(8, 0, 30, &[]));
            assert_eq!(gateway.reload().is_ok(), known_by != "nobody", "{case}");
        }
    }
}

#[test]
fn crls_that_are_wrong_byte_by_byte_are_refused_for_their_own_reason() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    let all = fixtures::raw::crls(&WORLD.root, "root 1");
    assert!(all.len() > 30, "{} cases", all.len());
    let mut wrong = Vec::new();
    for (what, der, words) in all {
        // As DER: PEM would hide what stands behind it.
        fs::write(place.crl("root.crl"), der).unwrap();
        match a.reload() {
            Err(error) if error.to_string().contains(words) && error.to_string().contains("root.crl") => {}
            other => wrong.push(format!("{what}: expected `{words}`, got {other:?}")),
        }
        assert!(a.identify(&WORLD.good_b.chain).is_ok(), "{what}: what was in force stays in force");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn roots_that_limit_themselves_in_ways_unknown_or_are_weak_are_refused() {
    let place = Place::new();
    let with = |root: Ca| {
        fs::write(&place.trust[0].roots, format!("{}{}", WORLD.root.pem, root.pem)).unwrap();
        load_error(place.config("a", &WORLD.good_a)).to_string()
    };
    let critical = with(Ca::root_with("critical", |params| {
        let mut extension = rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 55555, 1], vec![5, 0]);
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
    }));
    assert!(critical.contains("critical extension"), "{critical}");
    let twice = with(Ca::root_with("twice", |params| {
        let extension = || rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 55555, 1], vec![5, 0]);
        params.custom_extensions.extend([extension(), extension()]);
    }));
    assert!(twice.ends_with("expected X.509 certificates in PEM"), "{twice}");
    let behind = fixtures::pem("CERTIFICATE", &[&WORLD.root.der[..], &[0]].concat());
    fs::write(&place.trust[0].roots, behind).unwrap();
    assert!(matches!(load_error(place.config("a", &WORLD.good_a)), IdentityError::Malformed { what: "root certificates", .. }));
}

#[test]
fn two_crls_that_claim_one_number_and_time_are_refused() {
    let mut place = Place::new();
    let (from, until) = (days(0), days(30));
    place.write_crl("root.crl", &WORLD.root.crl_with(9, from, until, &[], None));
    place.write_crl("again.crl", &WORLD.root.crl_with(9, from, until, &[&WORLD.good_b.serial], None));
    let again = place.crl("again.crl");
    place.trust[0].crls.push(again);
    assert!(matches!(load_error(place.config("a", &WORLD.good_a)), IdentityError::CrlConflict { number, .. } if number == "09"));
}

#[test]
fn no_prefix_and_no_flipped_byte_of_a_crl_is_taken_for_it() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    let der = WORLD.root.crl(9, 0, 30, &[&WORLD.good_b.serial]);
    let path = place.crl("root.crl");
    let attempt = |bytes: &[u8], what: &str, index: usize| {
        fs::write(&path, bytes).unwrap();
        let _ = a.reload();
        // Either the reload is refused, or (a flip in the issuer's name) the CRL is nobody's: never "not revoked" by number 9.
        match a.identify(&WORLD.good_b.chain) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.refusal().unwrap().code(), "crl-missing", "{what} {index}"),
        }
    };
    for index in 0..der.len() {
        let mut bad = der.clone();
        bad[index] ^= 0x01;
        attempt(&bad, "flip", index);
        attempt(&der[..index], "cut", index);
    }
}

#[test]
fn oversized_files_are_refused_before_they_are_read_whole() {
    let place = Place::new();
    let limit = usize::try_from(crate::limits::PEM_FILE_BYTES_MAX).unwrap();
    let config = place.config("a", &WORLD.good_a);
    fs::write(&config.certificate, vec![b' '; limit + 1]).unwrap();
    assert!(matches!(load_error(config), IdentityError::TooLarge { what: "certificate", .. }));
    let config = place.config("a", &WORLD.good_a);
    fs::write(&place.trust[0].roots, vec![b' '; limit + 1]).unwrap();
    assert!(matches!(load_error(config), IdentityError::TooLarge { what: "root certificates", .. }));
}

#[test]
fn pipes_devices_and_directories_are_refused_without_waiting_for_them() {
    let place = Place::new();
    let pipe = place.dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    for path in [pipe, PathBuf::from("/dev/zero"), place.dir.path().to_owned()] {
        for field in 0..3 {
            let mut config = place.config("a", &WORLD.good_a);
            *[&mut config.certificate, &mut config.key, &mut config.signing_key][field] = path.clone();
            let message = load_error(config).to_string();
            assert!(message.ends_with("expected a regular file"), "{message}");
        }
    }
}

#[test]
fn a_config_is_refused_for_the_first_thing_wrong_and_named() {
    let place = Place::new();
    let mut config = place.config("a", &WORLD.good_a);
    config.certificate = PathBuf::from("/nowhere/cert.pem");
    let error = load_error(config);
    assert_eq!(error.to_string(), "cannot read certificate `/nowhere/cert.pem`");
    assert_eq!(error.class(), crate::wire::ErrorClass::Local);
    assert_eq!(gateway_id("a"), place.gateway("a", &WORLD.good_a).own_id().as_str());
}
