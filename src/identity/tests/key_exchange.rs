//! X25519MLKEM768 against known answers, against another implementation, and against shares that are none.

use std::collections::HashMap;

use ml_kem::{DecapsulationKey, MlKem768};
use rustls::crypto::aws_lc_rs;
use rustls::crypto::ring::kx_group::{SECP256R1, X25519};
use rustls::crypto::{ActiveKeyExchange, SupportedKxGroup};
use rustls::{HandshakeKind, NamedGroup, PeerIncompatible, PeerMisbehaved, ProtocolVersion};
use zeroize::Zeroizing;

use super::*;
use crate::identity::kem::{CIPHERTEXT_BYTES, ENCAPSULATION_KEY_BYTES, Kem, KemKey, RustCrypto, RustCryptoKey, Secret};
use crate::identity::key_exchange::{Hybrid, X25519MLKEM768};

/// What NIST says, by name.
fn known() -> HashMap<&'static str, Vec<u8>> {
    let mut known = HashMap::<_, Vec<u8>>::new();
    let mut name = "";
    for line in include_str!("../../../tests/data/ml-kem-768.txt").lines().filter(|line| !line.starts_with('#')) {
        match line.strip_prefix("  ") {
            None => name = line,
            Some(digits) => {
                let bytes = (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap());
                known.entry(name).or_default().extend(bytes);
            }
        }
    }
    known
}

fn fixed<const BYTES: usize>(bytes: &[u8]) -> Zeroizing<[u8; BYTES]> {
    Zeroizing::new(bytes.try_into().unwrap())
}

#[test]
fn keys_are_made_as_nist_says() {
    let known = known();
    let seed = fixed(&[known["keygen.d"].as_slice(), &known["keygen.z"]].concat());
    assert_eq!(RustCrypto.key_pair(&seed).1, known["keygen.ek"]);
}

#[test]
fn secrets_are_encapsulated_as_nist_says() {
    let known = known();
    let (ciphertext, secret) = RustCrypto.encapsulate(&known["encapsulation.ek"], &fixed(&known["encapsulation.m"])).unwrap();
    assert_eq!(ciphertext, known["encapsulation.c"]);
    assert_eq!(secret.as_slice(), known["encapsulation.k"]);
}

#[test]
fn secrets_are_decapsulated_as_nist_says_also_from_a_changed_ciphertext() {
    let known = known();
    #[expect(deprecated, reason = "the known answers have the long form of the key")]
    let key = DecapsulationKey::<MlKem768>::from_expanded(known["decapsulation.dk"].as_slice().try_into().unwrap()).unwrap();
    let key = RustCryptoKey(key);
    for case in ["decapsulation", "rejection"] {
        let secret = key.decapsulate(&known[format!("{case}.c").as_str()]).unwrap();
        assert_eq!(secret.as_slice(), known[format!("{case}.k").as_str()], "{case}");
    }
    assert_eq!(format!("{key:?}"), "RustCryptoKey { .. }");
}

/// The other implementation.
fn theirs() -> &'static dyn SupportedKxGroup {
    aws_lc_rs::kx_group::X25519MLKEM768
}

fn exchange(client: &dyn SupportedKxGroup, server: &dyn SupportedKxGroup) -> [Vec<u8>; 2] {
    let begun = client.start().unwrap();
    assert_eq!((begun.group(), begun.pub_key().len()), (NamedGroup::X25519MLKEM768, 1216));
    let answer = server.start_and_complete(begun.pub_key()).unwrap();
    assert_eq!((answer.group, answer.pub_key.len()), (NamedGroup::X25519MLKEM768, 1120));
    [begun.complete(&answer.pub_key).unwrap().secret_bytes().to_vec(), answer.secret.secret_bytes().to_vec()]
}

#[test]
fn both_implementations_come_to_the_same_secret() {
    let ours: &dyn SupportedKxGroup = &X25519MLKEM768;
    let mut seen = Vec::new();
    for (client, server) in [(ours, theirs()), (theirs(), ours), (ours, ours)] {
        for _ in 0..8 {
            let [one, other] = exchange(client, server);
            assert_eq!((one.len(), &one), (64, &other));
            assert!(!seen.contains(&one), "no secret comes twice");
            seen.push(one);
        }
    }
}

/// A mechanism whose secret everybody knows.
struct Open;

impl Kem for Open {
    fn key_pair(&self, _: &Zeroizing<[u8; 64]>) -> (Box<dyn KemKey>, Vec<u8>) {
        (Box::new(Self), vec![1; ENCAPSULATION_KEY_BYTES])
    }

    fn encapsulate(&self, key: &[u8], _: &Zeroizing<[u8; 32]>) -> Option<(Vec<u8>, Secret)> {
        assert_eq!(key, vec![1; ENCAPSULATION_KEY_BYTES]);
        Some((vec![2; CIPHERTEXT_BYTES], Zeroizing::new([3; 32])))
    }
}

impl KemKey for Open {
    fn decapsulate(&self, ciphertext: &[u8]) -> Option<Secret> {
        assert_eq!(ciphertext, vec![2; CIPHERTEXT_BYTES]);
        Some(Zeroizing::new([3; 32]))
    }
}

#[test]
fn what_ml_kem_gives_comes_first() {
    let group = Hybrid { kem: &Open, classical: X25519 };
    let begun = group.start().unwrap();
    let (name, alone) = begun.hybrid_component().unwrap();
    assert_eq!((name, alone), (NamedGroup::X25519, &begun.pub_key()[ENCAPSULATION_KEY_BYTES..]), "one X25519 key for both offers");
    let answer = group.start_and_complete(begun.pub_key()).unwrap();
    assert_eq!(answer.pub_key[..CIPHERTEXT_BYTES], [2; CIPHERTEXT_BYTES]);
    let secret = begun.complete(&answer.pub_key).unwrap();
    assert_eq!(secret.secret_bytes()[..32], [3; 32]);
    assert_ne!(secret.secret_bytes()[32..], [3; 32]);
    assert!(group.usable_for_version(ProtocolVersion::TLSv1_3) && !group.usable_for_version(ProtocolVersion::TLSv1_2));
    assert_eq!(format!("{group:?}"), "X25519MLKEM768");
}

const BAD_SHARE: rustls::Error = rustls::Error::PeerMisbehaved(PeerMisbehaved::InvalidKeyShare);

fn refused_by_the_server(share: &[u8]) -> bool {
    X25519MLKEM768.start_and_complete(share).map(drop).is_err_and(|error| error == BAD_SHARE)
}

fn refused_by_the_client(begun: Box<dyn ActiveKeyExchange>, share: &[u8]) -> bool {
    begun.complete(share).map(drop).is_err_and(|error| error == BAD_SHARE)
}

#[test]
fn a_share_of_another_length_is_refused() {
    let begun = || X25519MLKEM768.start().unwrap();
    let good = begun().pub_key().to_vec();
    let answer = theirs().start_and_complete(&good).unwrap().pub_key;
    for length in [0, 1, 32, 1088, 1184, 1215] {
        assert!(refused_by_the_server(&good[..length]), "{length}");
        assert!(refused_by_the_client(begun(), &answer[..length.min(1119)]), "{length}");
    }
    assert!(refused_by_the_server(&[good.as_slice(), &[0]].concat()));
    assert!(refused_by_the_client(begun(), &[answer.as_slice(), &[0]].concat()));
    // X25519 first, as other hybrids have it.
    assert!(refused_by_the_server(&[&good[1184..], &good[..1184]].concat()), "its coefficients are not reduced");
}

#[test]
fn a_key_with_a_coefficient_that_is_not_reduced_is_refused() {
    let good = X25519MLKEM768.start().unwrap().pub_key().to_vec();
    assert!(!refused_by_the_server(&good));
    // Two coefficients in three bytes, little-endian, 3329 being the first that is too large: in the first, in the middle and in
    // the last place.
    for at in [0, 3 * 200, 1149] {
        let mut bad = good.clone();
        bad[at..at + 3].copy_from_slice(&[0x01, 0x0d, 0x00]);
        assert!(refused_by_the_server(&bad), "the even one at {at}");
        bad[at..at + 3].copy_from_slice(&[0x00, 0x10, 0xd0]);
        assert!(refused_by_the_server(&bad), "the odd one at {at}");
        bad[at..at + 3].copy_from_slice(&[0x00, 0x0d, 0xd0]);
        assert!(!refused_by_the_server(&bad), "3328 is reduced");
    }
}

#[test]
fn an_x25519_share_that_makes_no_secret_is_refused() {
    let begun = X25519MLKEM768.start().unwrap();
    let mut share = begun.pub_key().to_vec();
    let mut answer = theirs().start_and_complete(&share).unwrap().pub_key;
    // Zero, and one: points of small order (RFC 7748, section 6.1).
    for low in [0, 1] {
        for share in [&mut share, &mut answer] {
            let at = share.len() - 32;
            share[at..].fill(0);
            share[at] = low;
        }
        assert!(refused_by_the_server(&share), "{low}");
        assert!(refused_by_the_client(X25519MLKEM768.start().unwrap(), &answer), "{low}");
    }
}

#[test]
fn a_changed_ciphertext_makes_another_secret_and_no_error() {
    for at in [0, 1000, 1087] {
        let begun = X25519MLKEM768.start().unwrap();
        let answer = theirs().start_and_complete(begun.pub_key()).unwrap();
        let mut changed = answer.pub_key.clone();
        changed[at] ^= 1;
        let secret = begun.complete(&changed).unwrap();
        assert_ne!(secret.secret_bytes()[..32], answer.secret.secret_bytes()[..32]);
        assert_eq!(secret.secret_bytes()[32..], answer.secret.secret_bytes()[32..]);
    }
}

/// The whole other provider, with these groups only.
fn other(groups: &[&'static dyn SupportedKxGroup]) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { kx_groups: groups.to_vec(), ..aws_lc_rs::default_provider() })
}

fn group(connection: &rustls::CommonState) -> Option<NamedGroup> {
    connection.negotiated_key_exchange_group().map(|group| group.name())
}

/// Handshakes of a gateway with the other provider, in both directions: what was agreed on, and in how many round trips.
fn agreed(post_quantum: PostQuantum, groups: &[&'static dyn SupportedKxGroup]) -> [Result<(NamedGroup, HandshakeKind), rustls::Error>; 2] {
    let place = Place::new();
    let gateway = Credentials::load(IdentityConfig { post_quantum, ..place.config("a", &WORLD.good_a) }).unwrap();
    let peer = || Hostile::new(&WORLD.good_b);
    [
        shake(&gateway.client_config(), &Arc::new(peer().server_with(other(groups)))),
        shake(&Arc::new(peer().client_with(other(groups))), &gateway.server_config()),
    ]
    .map(|shaken| match (shaken.client, shaken.server) {
        (Ok(client), Ok(server)) => {
            assert_eq!(group(&client), group(&server));
            Ok((group(&client).unwrap(), client.handshake_kind().unwrap()))
        }
        // The server is the one that sees it.
        (_, Err(error)) | (Err(error), _) => Err(error),
    })
}

#[test]
fn handshakes_with_the_other_implementation_agree_on_it_at_once() {
    let expected = (NamedGroup::X25519MLKEM768, HandshakeKind::Full);
    for post_quantum in [PostQuantum::Preferred, PostQuantum::Required] {
        assert_eq!(agreed(post_quantum, &[theirs()]), [Ok(expected), Ok(expected)]);
        let all = aws_lc_rs::ALL_KX_GROUPS;
        assert_eq!(agreed(post_quantum, all)[0], Ok(expected), "a server that could do others");
    }
}

#[test]
fn a_peer_without_it_costs_no_round_trip_and_is_refused_where_it_is_required() {
    let classical = Ok((NamedGroup::X25519, HandshakeKind::Full));
    assert_eq!(agreed(PostQuantum::Preferred, &[X25519]), [classical.clone(), classical]);
    let nothing = Err(rustls::Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon));
    assert_eq!(agreed(PostQuantum::Required, &[X25519, SECP256R1]), [nothing.clone(), nothing.clone()]);
    assert_eq!(agreed(PostQuantum::Preferred, &[SECP256R1]), [nothing.clone(), nothing]);
}

#[test]
fn a_gateway_that_requires_it_takes_it_from_a_peer_that_would_rather_not() {
    let [as_client, as_server] = agreed(PostQuantum::Required, &[X25519, theirs()]);
    assert_eq!(as_client, Ok((NamedGroup::X25519MLKEM768, HandshakeKind::Full)));
    assert_eq!(as_server, Ok((NamedGroup::X25519MLKEM768, HandshakeKind::FullWithHelloRetryRequest)));
}
