//! The gateway's end, with a thread at the other end in a token's place.

use std::thread::JoinHandle;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustls::crypto::ring::default_provider;
use rustls::sign::SigningKey as _;

use super::*;
use crate::identity::tests::fixtures::{Leaf, World};

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn uri() -> TokenUri {
    "pkcs11:token=test;object=gateway".parse().unwrap()
}

fn say(socket: &OwnedFd, answer: &Answer) {
    // Who is gone does not listen.
    let _ = send(socket, &serde_json::to_vec(answer).unwrap(), SendFlags::NOSIGNAL);
}

/// Answers until the gateway's end is closed.
fn serve(socket: OwnedFd, mut answer: impl FnMut(&OwnedFd, Request) + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        say(&socket, &Answer::Ready);
        let mut bytes = vec![0; limits::TOKEN_MESSAGE_BYTES_MAX];
        while let Ok((_, length)) = recv(&socket, bytes.as_mut_slice(), RecvFlags::empty()) {
            if length == 0 {
                return;
            }
            answer(&socket, serde_json::from_slice(&bytes[..length]).unwrap());
        }
    })
}

/// A token with these keys.
pub(in crate::identity) fn token_with(leaves: &[&Leaf]) -> Arc<Token> {
    let keys: Vec<_> = leaves.iter().map(|leaf| default_provider().key_provider.load_private_key(leaf.key()).unwrap()).collect();
    let (own, its) = pair();
    serve(its, move |socket, request| match request {
        Request::Find { number } => say(socket, &Answer::Found { number, keys: u16::try_from(keys.len()).unwrap() }),
        Request::Sign { number, key, scheme, message } => {
            let signer = keys[usize::from(key)].choose_scheme(&[SignatureScheme::from(scheme)]);
            say(
                socket,
                &match signer.map(|signer| signer.sign(&message).unwrap()) {
                    Some(signature) => Answer::Signed { number, signature },
                    None => Answer::Refused { number, why: "CKR_KEY_TYPE_INCONSISTENT".to_owned() },
                },
            );
        }
    });
    let token = Token::over(own, uri());
    token.ready(Duration::from_secs(60)).unwrap();
    token
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    default_provider().signature_verification_algorithms
}

#[test]
fn of_several_keys_the_one_of_the_certificate_is_found_by_a_signature() {
    let world = World::new();
    let token = token_with(&[&world.good_b, &world.good_c, &world.good_a]);
    let certificate = &world.good_a.chain[0];
    let key = token.key_of(certificate, &algorithms()).unwrap().expect("it is there");
    assert_eq!(key.key, 2);
    let signer = key.choose_scheme(&[SignatureScheme::RSA_PSS_SHA256, SignatureScheme::ECDSA_NISTP256_SHA256]).unwrap();
    let signature = signer.sign(b"handshake").unwrap();
    assert!(verifies(certificate, &algorithms(), signer.scheme(), b"handshake", &signature));
    assert!(!verifies(certificate, &algorithms(), signer.scheme(), b"handshakf", &signature));
    assert!(key.choose_scheme(&[SignatureScheme::ED25519]).is_none());
    let others = token_with(&[&world.good_b, &world.good_c]);
    assert!(others.key_of(certificate, &algorithms()).unwrap().is_none(), "no key of another certificate");
}

#[test]
fn a_token_that_says_no_falls_silent_or_ends_is_told_apart_and_waited_for_a_while_only() {
    let (own, its) = pair();
    let mut asked = 0;
    let thread = serve(its, move |socket, request| {
        let Request::Find { number } = request else { return };
        asked += 1;
        match asked {
            1 => say(socket, &Answer::Refused { number, why: "CKR_DEVICE_REMOVED".to_owned() }),
            // To nobody's question, then none at all.
            2 => {
                say(socket, &Answer::Found { number: number + 1000, keys: 7 });
                let _ = send(socket, b"{", SendFlags::NOSIGNAL);
            }
            _ => panic!("a token that is late is left alone for a while"),
        }
    });
    let token = Token::over(own, uri());
    token.ready(Duration::from_secs(60)).unwrap();
    let find = |token: &Token| token.ask(|number| Request::Find { number }).map(drop).unwrap_err();
    assert_eq!(find(&token), TokenError::Refused("CKR_DEVICE_REMOVED".to_owned()));
    let late = TokenError::Late { within: limits::TOKEN_ANSWERS_WITHIN };
    assert_eq!(find(&token), late);
    assert_eq!(find(&token), late, "at once");
    assert!(token.told().asked.is_empty(), "nobody waits any more");
    drop(token);
    thread.join().unwrap();

    let (own, its) = pair();
    drop(its);
    let token = Token::over(own, uri());
    assert_eq!(token.ready(Duration::from_secs(60)), Err(TokenError::Ended));
    assert_eq!(find(&token), TokenError::Ended);
}

#[test]
fn an_answer_that_comes_late_is_not_taken_for_the_answer_to_another_question() {
    let (own, its) = pair();
    serve(its, move |socket, request| {
        let Request::Find { number } = request else { return };
        say(socket, &Answer::Found { number: number - 1, keys: 1 });
        say(socket, &Answer::Found { number, keys: 2 });
    });
    let token = Token::over(own, uri());
    for _ in 0..3 {
        let Ok(Said::Keys(keys)) = token.ask(|number| Request::Find { number }) else { panic!("no answer") };
        assert_eq!(keys, 2);
    }
}

#[test]
fn more_than_can_be_signed_in_time_is_refused_at_once() {
    let (own, _its) = pair();
    let token = Token::over(own, uri());
    for number in 0..limits::TOKEN_WAITING_MAX as u64 {
        token.told().asked.insert(number + 1_000_000, None);
    }
    let busy = token.ask(|number| Request::Find { number }).map(drop).unwrap_err();
    assert_eq!(busy, TokenError::Busy { waiting: limits::TOKEN_WAITING_MAX });
}
