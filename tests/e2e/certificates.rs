//! Peers that do not prove to be who they have to be: no guest byte leaves, and the refusal is in the audit log.

use std::net::SocketAddr;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::command::wait_for;
use crate::fixtures::{DomainFiles, Leaf, Variant, World, gateway_id, write_gateway};
use crate::gateway::{A, B, Name};
use crate::lab::{Lab, Setup, TRUST_DOMAIN, VM, pki_command};
use crate::stranger;

/// A lab whose gateway A is gateway `a` of the fixtures, with these peers. B does not run.
fn fixture_lab(world: &World, peers: &[(&str, String, SocketAddr)]) -> (Lab, TempDir) {
    let files = tempfile::tempdir().unwrap();
    let domains = world.write_trust(files.path());
    let own = write_gateway(files.path(), "a", &world.good_a);
    let trust = |domain: &DomainFiles| {
        format!("[[identity.trust]]\ndomain = {:?}\nroots = {:?}\ncrls = {:?}\n", domain.domain, domain.roots, domain.crls)
    };
    let identity = format!(
        "[identity]\ncertificate = {:?}\nkey = {:?}\nsigning_key = {:?}\n\n{}\n",
        own.certificate,
        own.key,
        own.signing_key,
        domains.iter().map(trust).collect::<String>()
    );
    let peer = |(name, spiffe, address): &(&str, String, SocketAddr)| {
        format!("[[peer]]\nname = {name:?}\naddress = \"{address}\"\nspiffe = {spiffe:?}\nsite = \"site-b\"\n\n")
    };
    let peers: String = peers.iter().map(peer).collect();
    let between = |text: String, start: &str, end: &str, new: &str| {
        let (start, end) = (text.find(start).unwrap(), text.find(end).unwrap());
        format!("{}{new}{}", &text[..start], &text[end..])
    };
    let edit = move |text| between(between(text, "[identity]", "[policy]", &identity), "[[peer]]", "[[vm]]", &peers);
    let mut lab = Setup::new().edit(A, edit).prepare();
    lab.start_guest();
    lab.gateway_mut(A).start();
    (lab, files)
}

fn variant<'w>(world: &'w World, name: &str) -> &'w Leaf {
    &world.variants.iter().find(|variant| variant.name == name).unwrap().leaf
}

/// What a certificate is called in the fixtures, and what the operator is told.
const BAD: &[(&str, &str)] = &[
    ("wrong-ca", "does not chain to a root of its trust domain `dc1.test`"),
    ("self-signed", "a signature in the peer's certificate chain is wrong"),
    ("expired", "expired at"),
    ("not-yet-valid", "is valid from"),
    ("revoked", "is revoked"),
    ("crl-missing", "no CRL of trust domain `dc1.test` covers the peer's chain"),
    ("crl-expired", "the CRL of trust domain `dc1.test` expired at"),
    ("two-uris", "has 2 URI names: expected exactly one"),
    ("dns-only", "no URI"),
    ("no-eku", "has no ExtendedKeyUsage"),
    ("domain-not-configured", "trust domain `strange.test`, which is not configured here"),
    ("domain-of-another-root", "does not chain to a root"),
    ("tampered-signature", "signature"),
];

#[test]
fn a_destination_with_a_bad_certificate_gets_nothing() {
    let world = World::new();
    let peers: Vec<_> = BAD.iter().map(|(name, _)| (*name, gateway_id(name), stranger::listen(variant(&world, name)))).collect();
    let (lab, _files) = fixture_lab(&world, &peers);
    for (name, words) in BAD {
        let said = lab.gateway(A).command(&["migrate", VM, "--to", name]);
        said.expect_stayed(3, &[VM, name, words]);
        assert_eq!(said.json()["wire_bytes"], 0, "{name}");
        lab.gateway(A).audited("session-refused", "refused", &[&gateway_id(name), words]);
        lab.gateway(A).audited("migration-finished", "failed", &[VM, name, words]);
    }
    lab.gateway(A).audit_verifies();
    still_beats(&lab);
}

/// Every wrong chain of the fixtures as a destination: the reason is in the audit log, next to the certificate that it is about, and not
/// one byte of the guest went out.
#[test]
fn a_destination_with_any_wrong_certificate_gets_nothing_and_the_log_says_why() {
    let world = World::new();
    let listen = |variant: &Variant| (variant.name, gateway_id(variant.name), stranger::listen(&variant.leaf));
    let peers: Vec<_> = world.variants.iter().map(listen).collect();
    let (lab, _files) = fixture_lab(&world, &peers);
    for Variant { name, .. } in &world.variants {
        let said = lab.gateway(A).command(&["migrate", VM, "--to", name]);
        said.expect_stayed(3, &[VM, name]);
        assert_eq!(said.json()["wire_bytes"], 0, "{name}");
    }
    let log = refused_for_their_reasons(&lab, &world, "server");
    refused_once_each(&lab, world.variants.len());
    let ended: Vec<_> = log.iter().filter(|entry| entry["event"] == "migration-finished").collect();
    assert_eq!(ended.len(), world.variants.len());
    for entry in ended {
        assert_eq!((&entry["outcome"], &entry["detail"]["wire_bytes"]), (&json!("failed"), &json!(0)), "{entry}");
        assert_eq!(entry["detail"]["running_on"], "source", "{entry}");
    }
    lab.gateway(A).audit_verifies();
    still_beats(&lab);
}

/// The same as whoever dials: none of them gets so far as to say what it wants.
#[test]
fn whoever_dials_with_any_wrong_certificate_is_turned_away_and_the_log_says_why() {
    let world = World::new();
    let nobody: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let (lab, _files) = fixture_lab(&world, &[("gw-b", gateway_id("b"), nobody)]);
    let address = lab.address(A).parse().unwrap();
    for Variant { name, leaf, .. } in &world.variants {
        let end = stranger::dial(address, Some(leaf));
        assert!(matches!(end, quinn::ConnectionError::ConnectionClosed(_)), "{name}: {end}");
    }
    let log = refused_for_their_reasons(&lab, &world, "client");
    refused_once_each(&lab, world.variants.len());
    assert!(log.iter().all(|entry| entry["event"] != "session-opened"), "{log:#?}");
    lab.gateway(A).audit_verifies();
    still_beats(&lab);
}

/// Each variant was refused in this role for its own reason; returns the audit log.
fn refused_for_their_reasons(lab: &Lab, world: &World, role: &str) -> Vec<Value> {
    let sha256 = |leaf: &Leaf| -> String { Sha256::digest(&leaf.chain[0]).iter().map(|byte| format!("{byte:02x}")).collect() };
    wait_for("a refusal of each", || {
        let log = lab.gateway(A).audit();
        let refused = |variant: &Variant| {
            let leaf = sha256(&variant.leaf);
            log.iter().any(|entry| {
                let detail = &entry["detail"];
                entry["event"] == "session-refused"
                    && entry["outcome"] == "refused"
                    && detail["role"] == role
                    && detail["reason"] == variant.expected
                    && detail["leaf_sha256"] == leaf.as_str()
            })
        };
        world.variants.iter().all(refused).then_some(log)
    })
}

/// Whoever is refused uses up one of the attempts that strangers have, and one entry says all of it.
fn refused_once_each(lab: &Lab, times: usize) {
    let log = lab.gateway(A).audit();
    let refused: Vec<_> = log.iter().filter(|entry| entry["event"] == "session-refused").collect();
    assert_eq!(refused.len(), times, "{refused:#?}");
    assert!(refused.iter().all(|entry| entry["detail"]["address"].is_string()), "{refused:#?}");
}

#[test]
fn a_destination_that_proves_to_be_somebody_else_gets_nothing() {
    let world = World::new();
    let peers = [("gw-x", gateway_id("x"), stranger::listen(&world.good_b))];
    let (lab, _files) = fixture_lab(&world, &peers);
    lab.gateway(A).command(&["migrate", VM, "--to", "gw-x"]).expect_stayed(3, &[VM, "gw-x", &gateway_id("x"), &gateway_id("b")]);
    lab.gateway(A).audited("session-refused", "refused", &[&gateway_id("x"), &gateway_id("b")]);
    still_beats(&lab);
}

#[test]
fn strangers_that_dial_are_turned_away_and_recorded() {
    let world = World::new();
    let nobody: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let (lab, _files) = fixture_lab(&world, &[("gw-b", gateway_id("b"), nobody)]);
    let address = lab.address(A).parse().unwrap();
    for (name, words) in BAD {
        let end = stranger::dial(address, Some(variant(&world, name)));
        // Nothing of why is told to whom is not believed.
        assert!(matches!(end, quinn::ConnectionError::ConnectionClosed(_)), "{name}: {end}");
        lab.gateway(A).audited("session-refused", "refused", &[words]);
    }
    stranger::dial(address, None);
    lab.gateway(A).audited("session-refused", "refused", &["no certificate"]);
    // Authenticated, and nobody that is configured.
    stranger::dial(address, Some(&world.good_c));
    lab.gateway(A).audited("session-refused", "refused", &["spiffe://dc2.test/gateway/c", "not one of the configured peers"]);
    refused_once_each(&lab, BAD.len() + 2);
    lab.gateway(A).audit_verifies();
    still_beats(&lab);
}

#[track_caller]
fn still_beats(lab: &Lab) {
    assert_eq!(lab.running_copies(), [A]);
    let before = lab.newest_beat(A).unwrap_or(0);
    wait_for("a heartbeat", || lab.newest_beat(A).filter(|now| *now > before));
    lab.heartbeat_is_unbroken();
}

fn revoke(lab: &Lab, name: Name) {
    pki_command(lab.directory(), &["revoke", lab.pki().to_str().unwrap(), name.gateway()]);
}

#[test]
fn a_destination_that_was_revoked_gets_nothing_after_a_reload() {
    let lab = Lab::start();
    revoke(&lab, B);
    lab.gateway(A).reload();
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "gw-b", "is revoked"]);
    lab.gateway(A).audited("session-refused", "refused", &["gateway/gw-b", "is revoked"]);
    lab.settled_on(A);
}

#[test]
fn a_source_that_was_revoked_is_refused_by_the_destination() {
    let lab = Lab::start();
    revoke(&lab, A);
    lab.gateway(B).reload();
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "gw-b"]);
    lab.gateway(B).audited("session-refused", "refused", &["is revoked"]);
    lab.settled_on(A);
}

/// By a change of the file alone: nobody tells the gateway, and nothing else ends this migration.
#[test]
fn a_destination_that_is_revoked_while_the_guest_moves_loses_its_session() {
    let lab = watched_by(A);
    let (running, _) = lab.start_slow_migration(A, &[]);
    revoke(&lab, B);
    running.finish().expect_stayed(3, &[VM, "gateway/gw-b", "would not be admitted any more", "is revoked"]);
    lab.gateway(A).audited("policy-loaded", "done", &[]);
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    lab.settled_on(A);
}

#[test]
fn a_source_that_is_revoked_while_the_guest_moves_is_sent_away() {
    let lab = watched_by(B);
    let (running, _) = lab.start_slow_migration(A, &[]);
    revoke(&lab, A);
    running.finish().expect_stayed(3, &[VM, "gateway/gw-a", "would not be admitted any more"]);
    wait_for("the empty twin to go", || lab.vmms(B).is_empty().then_some(()));
    lab.settled_on(A);
}

#[test]
fn a_reload_that_is_asked_for_says_what_came_of_it() {
    let lab = watched_by(B);
    let gateway = lab.gateway(A);
    let crl = lab.pki().join("crl.pem");
    let good = std::fs::read(&crl).unwrap();
    std::fs::write(&crl, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n").unwrap();
    gateway.command(&["reload"]).expect(2, &["crl.pem"]);
    gateway.audited("identity-refused", "refused", &["crl.pem"]);
    std::fs::write(&crl, good).unwrap();
    assert_eq!(gateway.command(&["reload"]).json()["schema"], "sealane.gateway/1");
    let (running, _) = lab.start_slow_migration(A, &[]);
    revoke(&lab, B);
    assert!(gateway.command(&["reload"]).json()["certificate_expires"].is_string());
    running.finish().expect_stayed(3, &[VM, "is revoked"]);
    lab.settled_on(A);
}

/// Only this gateway follows its files; both read the same.
fn watched_by(name: Name) -> Lab {
    let other = if name == A { B } else { A };
    Setup::new().busy().replace(other, "[gateway]", "[gateway]\nwatch_files = false").start()
}

#[test]
fn without_a_revocation_list_no_peer_is_believed() {
    let mut lab = Setup::new().replace(A, "../pki/crl.pem", "../other/crl.pem").prepare();
    // A list, but of another authority: as good as none.
    pki_command(lab.directory(), &["init", lab.directory().join("other").to_str().unwrap(), "--trust-domain", TRUST_DOMAIN]);
    lab.start_guest();
    for name in [A, B] {
        lab.gateway_mut(name).start();
    }
    lab.migrate(A, &[]).expect_stayed(3, &[VM, "CRL"]);
    lab.gateway(A).audited("session-refused", "refused", &["CRL"]);
    lab.settled_on(A);
}

#[test]
fn a_peer_that_names_another_gateway_than_configured_is_refused_on_both_sides() {
    let lab = Setup::new().replace(B, "gateway/gw-a\"", "gateway/gw-z\"").start();
    lab.migrate(A, &[]).expect_stayed(3, &[VM]);
    lab.gateway(B).audited("session-refused", "refused", &["gateway/gw-a", "not one of the configured peers"]);
    lab.settled_on(A);
}

#[test]
fn a_gateway_does_not_start_with_a_certificate_that_its_peers_would_refuse() {
    let world = World::new();
    let files = tempfile::tempdir().unwrap();
    for (name, words) in [("two-uris", "URI"), ("no-eku", "ExtendedKeyUsage")] {
        let own = write_gateway(files.path(), name, variant(&world, name));
        let lab = Setup::new()
            .replace(A, "../pki/gw-a-cert.pem", own.certificate.to_str().unwrap())
            .replace(A, "../pki/gw-a-key.pem", own.key.to_str().unwrap())
            .prepare();
        let said = lab.gateway(A).start_in_vain();
        assert!(said.code == 2 || said.code == 3, "{said:#?}");
        assert!(said.stderr.contains(words), "{said:#?}");
    }
}
