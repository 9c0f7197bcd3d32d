//! Changing what is trusted while connections live.

use super::fixtures::{Leaf, gateway_id, write_gateway};
use super::*;

/// The chain of `leaf` as `gateway` judges it now.
fn code(gateway: &Credentials, leaf: &Leaf) -> Result<(), &'static str> {
    gateway.identify(&leaf.chain).map(drop).map_err(|error| error.refusal().unwrap().code())
}

#[test]
fn a_peer_revoked_by_a_reload_is_refused_live_and_anew() {
    let place = Place::new();
    let (a, b) = (place.gateway("a", &WORLD.good_a), place.gateway("b", &WORLD.good_b));
    let live = shake(&b.client_config(), &a.server_config()).server.unwrap();
    let chain = live.peer_certificates().unwrap();
    assert!(a.identify(chain).is_ok());

    place.write_crl("root.crl", &WORLD.root.crl(8, 0, 30, &[&WORLD.good_b.serial]));
    assert!(a.identify(chain).is_ok(), "nothing changes before the reload");
    a.reload().unwrap();

    let serial = WORLD.good_b.serial.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(a.identify(chain).unwrap_err().refusal(), Some(&RefusalReason::Revoked { serial }));
    let again = shake(&b.client_config(), &a.server_config());
    assert_eq!(refusal_reason(&again.server.map(drop).unwrap_err()).unwrap().code(), "revoked");
    let dialled = shake(&a.client_config(), &b.server_config());
    assert_eq!(refusal_reason(&dialled.client.map(drop).unwrap_err()).unwrap().code(), "revoked");
    assert!(b.identify(&WORLD.good_b.chain).is_ok(), "the other gateway has not reloaded");
}

#[test]
fn a_reload_is_all_or_nothing() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    let key = place.dir.path().join("a-key.pem");
    let good_key = fs::read(&key).unwrap();
    // A good new CRL next to a bad key: neither is taken.
    place.write_crl("root.crl", &WORLD.root.crl(8, 0, 30, &[&WORLD.good_b.serial]));
    fs::write(&key, "not a key").unwrap();
    assert!(matches!(a.reload(), Err(IdentityError::Malformed { what: "private key", .. })));
    assert_eq!(code(&a, &WORLD.good_b), Ok(()));
    let peer = place.gateway("b", &WORLD.good_b);
    assert!(shake(&a.client_config(), &peer.server_config()).server.is_ok(), "the last good key is still in use");

    fs::write(&key, good_key).unwrap();
    a.reload().unwrap();
    assert_eq!(code(&a, &WORLD.good_b), Err("revoked"));
}

#[test]
fn every_broken_file_is_refused_and_the_last_good_state_stays() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    let files = ["a-cert.pem", "a-key.pem", "a-signing-key.pem", "dc1.test/roots.pem", "dc1.test/root.crl", "dc2.test/root.crl"];
    for name in files {
        let path = place.dir.path().join(name);
        let good = fs::read(&path).unwrap();
        let half = good[..good.len() / 2].to_vec();
        let mut flipped = good.clone();
        let near_the_end = good.len() - 60;
        flipped[near_the_end] = if flipped[near_the_end] == b'A' { b'B' } else { b'A' };
        for (what, bad) in [("empty", vec![]), ("cut", half), ("garbage", b"\x30\x82\xff\xff".to_vec()), ("flipped", flipped)] {
            fs::write(&path, bad).unwrap();
            // Nothing signs a root or a key for us; a CRL's own signature shows the flip.
            if what != "flipped" || name.ends_with(".crl") {
                assert!(a.reload().is_err(), "{name} {what}");
            }
            assert_eq!(code(&a, &WORLD.good_b), Ok(()), "{name} {what}");
        }
        fs::remove_file(&path).unwrap();
        let error = a.reload().unwrap_err();
        assert!(matches!(error, IdentityError::File { .. }) && error.to_string().contains(name), "{name}: {error}");
        assert_eq!(code(&a, &WORLD.good_b), Ok(()), "{name} missing");
        fixtures::write_private(&path, &String::from_utf8(good).unwrap());
        a.reload().unwrap();
    }
}

#[test]
fn crl_numbers_never_go_back() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    place.write_crl("root.crl", &WORLD.root.crl(9, 0, 30, &[&WORLD.good_b.serial]));
    a.reload().unwrap();
    // The attacker's wish: an older, still valid CRL from before the revocation.
    place.write_crl("root.crl", &WORLD.root.crl(8, 0, 30, &[]));
    let error = a.reload().unwrap_err();
    assert!(matches!(&error, IdentityError::CrlRollback { found, expected, .. } if found == "08" && expected == "09"), "{error}");
    assert_eq!(code(&a, &WORLD.good_b), Err("revoked"));
    // The same number with an older date is as much a step back.
    place.write_crl("root.crl", &WORLD.root.crl(9, -3, 30, &[]));
    assert!(matches!(a.reload(), Err(IdentityError::CrlRollback { .. })));
    // Not even after the issuer's CRL was away for a while.
    fs::remove_file(place.crl("root.crl")).unwrap();
    place.write_crl("root.crl", &WORLD.other_root.crl(1, 0, 30, &[]));
    a.reload().unwrap();
    assert_eq!(code(&a, &WORLD.good_b), Err("crl-missing"));
    place.write_crl("root.crl", &WORLD.root.crl(8, 0, 30, &[]));
    assert!(matches!(a.reload(), Err(IdentityError::CrlRollback { .. })));
    place.write_crl("root.crl", &WORLD.root.crl(256, 0, 30, &[]));
    a.reload().unwrap();
    assert_eq!(code(&a, &WORLD.good_b), Ok(()));
}

#[test]
fn another_crl_of_the_same_number_and_date_is_refused_also_after_a_restart() {
    let place = Place::new();
    let ratchet = place.dir.path().join("ratchet.json");
    let load = || Credentials::load_remembering(place.config("a", &WORLD.good_a), ratchet.clone(), None);
    let (since, until) = (fixtures::days(0), fixtures::days(30));
    let [first, other] =
        [&[WORLD.good_b.serial.as_slice()] as &[&[u8]], &[]].map(|revoked| WORLD.root.crl_with(400, since, until, revoked, None));
    place.write_crl("root.crl", &first);
    let a = load().unwrap();
    a.reload().unwrap();
    place.write_crl("root.crl", &other);
    for refused in [a.reload().map(drop), load().map(drop)] {
        assert!(matches!(&refused, Err(IdentityError::CrlConflict { number, .. }) if number == "0190"), "{refused:?}");
    }
    assert_eq!(code(&a, &WORLD.good_b), Err("revoked"));
    // What an earlier version has remembered knows of no digest.
    let remembered: serde_json::Value = serde_json::from_slice(&fs::read(&ratchet).unwrap()).unwrap();
    let mut earlier = remembered.clone();
    for line in earlier["seen"].as_array_mut().unwrap() {
        assert!(line.as_object_mut().unwrap().remove("sha256").is_some());
    }
    fs::write(&ratchet, serde_json::to_vec(&earlier).unwrap()).unwrap();
    load().unwrap();
}

#[test]
fn the_newest_crl_of_an_issuer_wins_wherever_it_stands() {
    for newest_first in [true, false] {
        let mut place = Place::new();
        let (old, new) = (WORLD.root.crl(7, 0, 30, &[]), WORLD.root.crl(10, 0, 30, &[&WORLD.good_b.serial]));
        let (first, second) = if newest_first { (&new, &old) } else { (&old, &new) };
        place.write_crl("root.crl", first);
        place.write_crl("again.crl", second);
        let again = place.crl("again.crl");
        place.trust[0].crls.push(again);
        let a = place.gateway("a", &WORLD.good_a);
        assert_eq!(code(&a, &WORLD.good_b), Err("revoked"), "newest first: {newest_first}");
    }
}

#[test]
fn roots_are_replaced_by_a_reload() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    let next = fixtures::Ca::root("root of next year");
    let gateway = next.leaf(&gateway_id("n"), |_| {});
    assert_eq!(code(&a, &gateway), Err("unknown-issuer"));
    fs::write(place.dir.path().join("dc1.test/roots.pem"), format!("{}{}", WORLD.root.pem, next.pem)).unwrap();
    place.write_crl("gone.crl", &next.crl(1, 0, 30, &[]));
    a.reload().unwrap();
    assert_eq!((code(&a, &gateway), code(&a, &WORLD.good_b)), (Ok(()), Ok(())));
    fs::write(place.dir.path().join("dc1.test/roots.pem"), &next.pem).unwrap();
    a.reload().unwrap();
    assert_eq!((code(&a, &gateway), code(&a, &WORLD.good_b)), (Ok(()), Err("unknown-issuer")));
}

#[test]
fn our_own_certificate_is_replaced_but_our_name_is_not() {
    let place = Place::new();
    let (a, b) = (place.gateway("a", &WORLD.good_a), place.gateway("b", &WORLD.good_b));
    let renewed = WORLD.root.leaf(&gateway_id("a"), |_| {});
    let before = a.signer().public_key();
    write_gateway(place.dir.path(), "a", &renewed);
    a.reload().unwrap();
    let shaken = shake(&a.client_config(), &b.server_config()).server.unwrap();
    assert_eq!(shaken.peer_certificates().unwrap()[0], renewed.chain[0]);
    let shaken = shake(&b.client_config(), &a.server_config()).client.unwrap();
    assert_eq!(shaken.peer_certificates().unwrap()[0], renewed.chain[0]);
    assert_ne!(a.signer().public_key(), before);

    write_gateway(place.dir.path(), "a", &WORLD.root.leaf(&gateway_id("z"), |_| {}));
    let error = a.reload().unwrap_err();
    assert!(matches!(&error, IdentityError::IdentityChanged { found, .. } if found.as_str() == gateway_id("z")), "{error}");
    assert_eq!(a.own_id().as_str(), gateway_id("a"));
}

#[test]
fn reloads_and_handshakes_at_the_same_time_all_succeed() {
    let place = Place::new();
    let (a, b) = (place.gateway("a", &WORLD.good_a), place.gateway("b", &WORLD.good_b));
    std::thread::scope(|scope| {
        let reloads = scope.spawn(|| {
            for number in 10..60 {
                // Replaced as an administrator should: a whole file at once.
                fs::write(place.crl("new"), fixtures::pem("X509 CRL", &WORLD.root.crl(number, 0, 30, &[]))).unwrap();
                fs::rename(place.crl("new"), place.crl("root.crl")).unwrap();
                a.reload().unwrap();
            }
        });
        while !reloads.is_finished() {
            let shaken = shake(&b.client_config(), &a.server_config());
            assert!(shaken.server.is_ok() && shaken.client.is_ok());
        }
    });
}

#[test]
fn a_restart_does_not_forget_crl_numbers_when_told_where_to_remember_them() {
    let place = Place::new();
    let ratchet = place.dir.path().join("ratchet.json");
    let load = || Credentials::load_remembering(place.config("a", &WORLD.good_a), ratchet.clone(), None);
    place.write_crl("root.crl", &WORLD.root.crl(300, 0, 30, &[&WORLD.good_b.serial]));
    let a = load().unwrap();
    place.write_crl("root.crl", &WORLD.root.crl(301, 0, 30, &[&WORLD.good_b.serial]));
    a.reload().unwrap();
    drop(a);
    assert_eq!(code(&load().unwrap(), &WORLD.good_b), Err("revoked"), "the same CRL again is no step back");
    place.write_crl("root.crl", &WORLD.root.crl(300, 0, 30, &[]));
    let error = load().map(drop).unwrap_err();
    assert!(matches!(&error, IdentityError::CrlRollback { found, expected, .. } if found == "012c" && expected == "012d"), "{error}");

    place.write_crl("root.crl", &WORLD.root.crl(302, 0, 30, &[]));
    let good = fs::read(&ratchet).unwrap();
    for bad in [b"".as_slice(), b"{}", &good[..good.len() / 2]] {
        fs::write(&ratchet, bad).unwrap();
        assert!(matches!(load(), Err(IdentityError::Malformed { what: "CRL ratchet", .. })), "a damaged memory is not an empty one");
    }
    fs::write(&ratchet, good).unwrap();
    let a = load().unwrap();
    // What cannot be remembered is not put in use.
    fs::create_dir(place.dir.path().join("ratchet.json.new")).unwrap();
    place.write_crl("root.crl", &WORLD.root.crl(303, 0, 30, &[&WORLD.good_b.serial]));
    assert!(matches!(a.reload(), Err(IdentityError::File { action: "write", .. })));
    assert_eq!(code(&a, &WORLD.good_b), Ok(()));
}
