//! What good gateways can do with each other, and what nobody can.

use std::time::{Duration, SystemTime};

use rustls::HandshakeKind;
use rustls::client::Resumption;

use super::*;

#[test]
fn two_gateways_authenticate_each_other() {
    let place = Place::new();
    let (a, b) = (place.gateway("a", &WORLD.good_a), place.gateway("b", &WORLD.good_b));
    let shaken = shake(&a.client_config(), &b.server_config());
    let (client, server) = (shaken.client.unwrap(), shaken.server.unwrap());
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!((client.alpn_protocol(), server.alpn_protocol()), (Some(ALPN), Some(ALPN)));
    assert_eq!(server.server_name(), None, "the dialled name is told to nobody");

    let seen_by_a = a.identify(client.peer_certificates().unwrap()).unwrap();
    let seen_by_b = b.identify(server.peer_certificates().unwrap()).unwrap();
    assert_eq!((seen_by_a.spiffe(), seen_by_b.spiffe()), (&b.own_id(), &a.own_id()));
    assert_eq!((seen_by_a.site(), seen_by_b.site()), (Some("site-b"), None));
    assert_eq!(seen_by_a.serial(), WORLD.good_b.serial.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    assert_ne!(seen_by_a.spki_sha256(), seen_by_b.spki_sha256());
    assert_eq!(seen_by_a.days_left(SystemTime::now()), 89);
    assert_eq!(seen_by_a.days_left(seen_by_a.not_after() + Duration::from_secs(1)), -1);
    assert!(a.drain_refusals(Duration::ZERO).is_empty() && b.drain_refusals(Duration::ZERO).is_empty());
}

#[test]
fn intermediates_and_other_trust_domains_are_accepted() {
    let place = Place::new();
    let a = place.gateway("a", &WORLD.good_a);
    for (name, leaf, id) in
        [("c", &WORLD.good_c, "spiffe://dc2.test/gateway/c"), ("i", &WORLD.good_intermediate, "spiffe://dc1.test/gateway/i")]
    {
        let other = place.gateway(name, leaf);
        for (client, server) in [(&a, &other), (&other, &a)] {
            let shaken = shake(&client.client_config(), &server.server_config());
            assert!(shaken.client.is_ok() && shaken.server.is_ok(), "{name}");
        }
        assert_eq!(a.identify(&leaf.chain).unwrap().spiffe().as_str(), id);
    }
}

#[test]
fn the_clock_of_identify_decides_about_dates() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    let code = |days: u64| {
        let later = SystemTime::now() + Duration::from_secs(days * 86_400);
        a.identify_at(&WORLD.good_b.chain, later).map_err(|error| error.refusal().unwrap().code())
    };
    assert!(code(0).is_ok() && code(29).is_ok());
    assert_eq!(code(31).unwrap_err(), "crl-expired");
    assert_eq!(code(91).unwrap_err(), "expired");
    assert_eq!(code(500).unwrap_err(), "roots-expired");
    let before = a.identify_at(&WORLD.good_b.chain, SystemTime::now() - Duration::from_secs(3 * 86_400));
    assert_eq!(before.unwrap_err().refusal().unwrap().code(), "not-yet-valid");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    let builder = ClientConfig::builder_with_provider(provider(PostQuantum::default())).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.dangerous().with_custom_certificate_verifier(Arc::new(BelievesAll)).with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let error = shake(&Arc::new(config), &a.server_config()).server.map(drop).unwrap_err();
    assert_eq!(refusal_reason(&error), Some(RefusalReason::NoCertificate));
}

#[test]
fn a_certificate_without_its_key_is_refused_in_both_directions() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    let thief = || Hostile::with_key(&WORLD.good_b, &WORLD.good_c);
    let error = shake(&Arc::new(thief().client()), &a.server_config()).server.map(drop).unwrap_err();
    assert_eq!(refusal_reason(&error), Some(RefusalReason::KeyNotHeld));
    let error = shake(&a.client_config(), &Arc::new(thief().server())).client.map(drop).unwrap_err();
    assert_eq!(refusal_reason(&error), Some(RefusalReason::KeyNotHeld));
    let recorded: Vec<_> =
        a.drain_refusals(Duration::ZERO).into_iter().map(|refusal| (refusal.role, refusal.reason, refusal.claimed.unwrap())).collect();
    let claimed = "spiffe://dc1.test/gateway/b".to_owned();
    let expected = [(PeerRole::Client, RefusalReason::KeyNotHeld, claimed.clone()), (PeerRole::Server, RefusalReason::KeyNotHeld, claimed)];
    assert_eq!(recorded, expected);
}

#[test]
fn no_other_protocol_is_spoken() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    for protocols in [vec![], vec![b"h3".to_vec()], vec![b"sealane/2".to_vec()], vec![b"sealane/1 ".to_vec()]] {
        let mut client = Hostile::new(&WORLD.good_b).client();
        client.alpn_protocols.clone_from(&protocols);
        let result = shake(&Arc::new(client), &a.server_config()).server;
        // Without any ALPN rustls goes on, and QUIC does not: quinn requires a protocol.
        match result {
            Ok(connection) => assert!(protocols.is_empty() && connection.alpn_protocol().is_none(), "{protocols:?}"),
            Err(error) => assert_eq!(error, rustls::Error::NoApplicationProtocol),
        }
        let mut server = Hostile::new(&WORLD.good_b).server();
        server.alpn_protocols.clone_from(&protocols);
        let result = shake(&a.client_config(), &Arc::new(server)).client;
        assert!(result.is_err() || protocols.is_empty(), "{protocols:?}");
    }
}

#[test]
fn only_tls_13_exists_in_this_binary() {
    assert_eq!(rustls::ALL_VERSIONS.iter().map(|version| version.version).collect::<Vec<_>>(), [rustls::ProtocolVersion::TLSv1_3]);
    assert!(provider(PostQuantum::default()).cipher_suites.iter().all(|suite| suite.tls13().is_some()));
    // QUIC protects its first packets with this suite.
    assert!(
        provider(PostQuantum::default()).cipher_suites.iter().any(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_128_GCM_SHA256)
    );
}

#[test]
fn a_client_that_hopes_to_resume_gets_no_ticket_and_a_full_handshake() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    let mut client = Hostile::new(&WORLD.good_b).client();
    client.resumption = Resumption::in_memory_sessions(16);
    client.enable_early_data = true;
    let client = Arc::new(client);
    for round in 0..3 {
        let shaken = shake(&client, &a.server_config());
        let (mut client, server) = (shaken.client.unwrap(), shaken.server.unwrap());
        assert_eq!(client.tls13_tickets_received(), 0, "round {round}");
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full), "round {round}");
        assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full), "round {round}");
        assert!(client.early_data().is_none() && !client.is_early_data_accepted(), "round {round}");
    }
}

#[test]
fn a_server_that_offers_tickets_is_not_taken_up_on_them() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    let mut server = Hostile::new(&WORLD.good_b).server();
    server.max_early_data_size = 1 << 16;
    server.send_tls13_tickets = 4;
    let server = Arc::new(server);
    for round in 0..3 {
        let mut client = shake(&a.client_config(), &server).client.unwrap();
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full), "round {round}");
        assert!(client.early_data().is_none(), "round {round}");
    }
}

#[test]
fn the_configurations_have_everything_risky_switched_off() {
    let a = Place::new().gateway("a", &WORLD.good_a);
    let (client, server) = (a.client_config(), a.server_config());
    assert!(!client.enable_early_data && !client.enable_sni && !client.enable_secret_extraction);
    assert!(!server.enable_secret_extraction && !server.send_half_rtt_data && !server.ignore_client_order);
    assert_eq!((server.max_early_data_size, server.send_tls13_tickets, server.max_tls13_tickets), (0, 0, 0));
    assert!(!server.session_storage.can_cache() && !server.ticketer.enabled());
    assert!(format!("{:?}", client.key_log).contains("NoKeyLog") && format!("{:?}", server.key_log).contains("NoKeyLog"));
}
