//! Both ends, the other in a thread.

use std::fs;
use std::path::Path;
use std::thread::JoinHandle;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::*;
use crate::identity::credentials::Apart;
use crate::identity::keys::Own;
use crate::identity::tests::{Place, WORLD, fixtures, shake};
use crate::identity::{Credentials, verify_signature};

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn say(socket: &OwnedFd, answer: &Answer) {
    // Who is gone does not listen.
    let _ = send(socket, &serde_json::to_vec(answer).unwrap(), SendFlags::NOSIGNAL);
}

/// Answers until the gateway's end is closed.
fn scripted(socket: OwnedFd, mut answer: impl FnMut(&OwnedFd, u64) + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        say(&socket, &Answer::Ready);
        let mut bytes = vec![0; limits::HOLDER_MESSAGE_BYTES_MAX];
        while let Ok((_, length)) = recv(&socket, bytes.as_mut_slice(), RecvFlags::empty()) {
            match bytes.get(..length).filter(|bytes| !bytes.is_empty()).map(|bytes| serde_json::from_slice(bytes).unwrap()) {
                Some(Request::Open { number, .. } | Request::Sign { number, .. }) => answer(&socket, number),
                Some(Request::Forget { .. }) => {}
                None => return,
            }
        }
    })
}

/// A holder of the key in a file, in a thread.
fn holding(mut keys: FileKeys, fits: fn(&[u8]) -> Result<(), &'static str>) -> Arc<Holder> {
    let (own, its) = pair();
    std::thread::spawn(move || serve(&its, &mut keys, &fits));
    let holder = Holder::over(own, "the key".to_owned());
    holder.ready(Duration::from_secs(60)).unwrap();
    holder
}

fn tls_holder(path: &Path) -> Arc<Holder> {
    holding(FileKeys::of_handshakes(path.to_owned()), is_handshake)
}

fn anything(_: &[u8]) -> Result<(), &'static str> {
    Ok(())
}

fn handshake(digest: &[u8]) -> Vec<u8> {
    [&[b' '; 64], b"TLS 1.3, client CertificateVerify\0".as_slice(), digest].concat()
}

/// A key that nobody has had.
fn another() -> String {
    rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem()
}

/// A gateway whose keys are both held, from the files of its configuration.
fn held(place: &Place, name: &str, leaf: &fixtures::Leaf) -> Arc<Credentials> {
    let config = place.config(name, leaf);
    let signing = holding(FileKeys::of_evidence(config.signing_key.clone()), anything);
    let keys = Apart { tls: tls_holder(&config.key), signing, files: Arc::new(Own) };
    Credentials::load_remembering(config, place.dir.path().join(format!("ratchet-{name}")), Some(keys)).unwrap()
}

#[test]
fn a_gateway_without_keys_shakes_hands_and_signs_as_one_with_them() {
    let place = Place::new();
    let (a, b) = (held(&place, "a", &WORLD.good_a), place.gateway("b", &WORLD.good_b));
    for (client, server) in [(&a, &b), (&b, &a)] {
        let shaken = shake(&client.client_config(), &server.server_config());
        assert!(shaken.server.is_ok() && shaken.client.is_ok());
    }
    let own = crate::identity::Signer::read(&place.dir.path().join("a-signing-key.pem")).unwrap();
    let signer = a.signer();
    assert_eq!(signer.public_key(), own.public_key());
    assert_eq!(signer.sign(b"evidence").unwrap(), own.sign(b"evidence").unwrap());
}

#[test]
fn a_reload_takes_the_new_keys_and_who_began_with_the_old_ones_goes_on_with_them() {
    let place = Place::new();
    let a = held(&place, "a", &WORLD.good_a);
    let old = a.signer();
    let (config, renewed) = (place.config("a", &WORLD.good_a), WORLD.root.leaf(&fixtures::gateway_id("a"), |_| {}));
    let before = fs::read(&config.key).unwrap();
    // A certificate without its key is refused, and what was in use is.
    fixtures::write_gateway(place.dir.path(), "a", &renewed);
    let renewed_key = fs::read(&config.key).unwrap();
    fixtures::write_private(&config.key, &String::from_utf8(before).unwrap());
    assert!(matches!(a.reload(), Err(IdentityError::KeyMismatch { .. })));
    assert!(old.sign(b"x").is_ok());
    fixtures::write_private(&config.key, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let malformed = a.reload().unwrap_err();
    assert!(malformed.to_string().contains("private key") && malformed.to_string().contains("is malformed"), "{malformed}");
    assert_eq!(malformed.class(), ErrorClass::Misuse);
    fixtures::write_private(&config.key, &String::from_utf8(renewed_key).unwrap());
    a.reload().unwrap();
    let new = a.signer();
    assert_ne!(new.public_key(), old.public_key(), "the fixture writes another signing key");
    for signer in [&old, &new] {
        assert!(verify_signature(&signer.public_key(), b"evidence", &signer.sign(b"evidence").unwrap()));
    }
    assert!(a.identify(&WORLD.good_b.chain).is_ok());
}

#[test]
fn a_key_that_nobody_has_is_forgotten_and_numbers_of_others_sign_nothing() {
    let place = Place::new();
    let config = place.config("a", &WORLD.good_a);
    let holder = tls_holder(&config.key);
    let (first, public) = holder.open(None).unwrap().unwrap();
    let (second, _) = holder.open(None).unwrap().unwrap();
    assert_eq!(first.key, second.key, "one key");
    let number = first.key;
    drop(first);
    let scheme = kind_of(&public).unwrap().1[0];
    second.sign(scheme, &handshake(&[7; 32])).unwrap();
    drop(second);
    for key in [number, number + 1] {
        let key = std::mem::ManuallyDrop::new(HeldKey { holder: Arc::clone(&holder), key });
        let error = key.sign(scheme, &handshake(&[7; 32])).unwrap_err();
        assert!(error.to_string().contains("it is not open"), "{error}");
    }
}

#[test]
fn more_keys_than_migrations_can_have_are_not_kept() {
    let place = Place::new();
    let config = place.config("a", &WORLD.good_a);
    let mut keys = FileKeys::of_evidence(config.signing_key.clone());
    let mut opened = Vec::new();
    for _ in 0..limits::HELD_KEYS_MAX {
        fixtures::write_private(&config.signing_key, &another());
        opened.push(keys.open(None).unwrap().unwrap().0);
    }
    opened.sort_unstable();
    opened.dedup();
    assert_eq!(opened.len(), limits::HELD_KEYS_MAX);
    fixtures::write_private(&config.signing_key, &another());
    assert!(keys.open(None).unwrap_err().why.contains("in use by migrations"));
    keys.forget(opened[3]);
    keys.open(None).unwrap().unwrap();
}

#[test]
fn what_is_no_handshake_is_not_signed() {
    let digest = [0x5a; 32];
    let good = handshake(&digest);
    assert!(is_handshake(&good).is_ok() && is_handshake(&handshake(&[1; 48])).is_ok());
    let server = [&[b' '; 64], b"TLS 1.3, server CertificateVerify\0".as_slice(), &digest].concat();
    assert!(is_handshake(&server).is_ok());
    let mut wrong: Vec<Vec<u8>> =
        vec![Vec::new(), b"anything".to_vec(), digest.to_vec(), good[1..].to_vec(), good[..good.len() - 1].to_vec()];
    wrong.extend((0..good.len() - digest.len()).map(|at| {
        let mut changed = good.clone();
        changed[at] ^= 1;
        changed
    }));
    for length in [0, 20, 31, 33, 47, 49, 64] {
        wrong.push(handshake(&vec![0; length]));
    }
    let place = Place::new();
    let holder = tls_holder(&place.config("a", &WORLD.good_a).key);
    let (key, public) = holder.open(None).unwrap().unwrap();
    let scheme = kind_of(&public).unwrap().1[0];
    for message in wrong {
        let error = key.sign(scheme, &message).unwrap_err();
        assert!(error.to_string().contains("signs handshakes of TLS 1.3 alone"), "{message:?}: {error}");
    }
    key.sign(scheme, &good).unwrap();
}

#[test]
fn many_at_once_get_each_their_own_answer() {
    let place = Place::new();
    let config = place.config("a", &WORLD.good_a);
    let holder = holding(FileKeys::of_evidence(config.signing_key.clone()), anything);
    let signer = crate::identity::Signer::held(&holder).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let signer = &signer;
            scope.spawn(move || {
                for number in 0..50_u8 {
                    let message = [thread, number];
                    assert!(verify_signature(&signer.public_key(), &message, &signer.sign(&message).unwrap()));
                }
            });
        }
    });
}

fn open_in(holder: &Holder) -> Result<Said, HolderError> {
    holder.ask(|number| Request::Open { number, wanted: None })
}

#[test]
fn one_that_says_no_falls_silent_or_ends_is_told_apart_and_waited_for_a_while_only() {
    let (own, its) = pair();
    let later = its.try_clone().unwrap();
    let mut asked = 0;
    let no = || Refusal::new(ErrorClass::Local, "CKR_DEVICE_REMOVED");
    let thread = scripted(its, move |socket, number| {
        asked += 1;
        match asked {
            1 => say(socket, &Answer::Refused { number, refusal: no() }),
            // To nobody's question, then none at all.
            2 => {
                say(socket, &Answer::Opened { number: number + 1000, key: Some((7, Vec::new())) });
                let _ = send(socket, b"{", SendFlags::NOSIGNAL);
            }
            3 => say(socket, &Answer::Opened { number, key: None }),
            _ => panic!("one that is late is left alone for a while"),
        }
    });
    let holder = Holder::over(own, "x".to_owned());
    holder.ready(Duration::from_secs(60)).unwrap();
    let find = |holder: &Holder| open_in(holder).map(drop).unwrap_err();
    assert_eq!(find(&holder), HolderError::Refused(no()));
    let late = HolderError::Late { within: limits::HOLDER_ANSWERS_WITHIN };
    assert_eq!(find(&holder), late);
    assert_eq!(find(&holder), late, "at once");
    // Nobody waits for it any more, and it shows that there is somebody.
    say(&later, &Answer::Opened { number: 2, key: None });
    assert!(matches!(open_in(&holder), Ok(Said::Key(None))), "asked again as soon as it answers");
    drop(later);
    assert_eq!(holder.mailbox.look(|told| told.waiting()), 0, "nobody waits any more");
    assert!(!holder.has_ended());
    drop(holder);
    thread.join().unwrap();

    let (own, its) = pair();
    drop(its);
    let holder = Holder::over(own, "x".to_owned());
    assert_eq!(holder.ready(Duration::from_secs(60)), Err(HolderError::Ended));
    assert_eq!(find(&holder), HolderError::Ended);
    assert!(holder.has_ended());
}

#[test]
fn an_answer_that_comes_late_is_not_taken_for_the_answer_to_another_question() {
    let (own, its) = pair();
    scripted(its, move |socket, number| {
        say(socket, &Answer::Opened { number: number - 1, key: Some((1, Vec::new())) });
        say(socket, &Answer::Opened { number, key: Some((2, Vec::new())) });
    });
    let holder = Holder::over(own, "x".to_owned());
    for _ in 0..3 {
        let Ok(Said::Key(Some((key, _)))) = open_in(&holder) else { panic!("no answer") };
        assert_eq!(key, 2);
    }
}

#[test]
fn more_than_can_be_signed_in_time_is_refused_at_once() {
    let (own, _its) = pair();
    let holder = Holder::over(own, "x".to_owned());
    let _asked: Vec<_> = (0..limits::HOLDER_WAITING_MAX).map(|_| holder.mailbox.number(usize::MAX).unwrap()).collect();
    assert_eq!(open_in(&holder).map(drop).unwrap_err(), HolderError::Busy { waiting: limits::HOLDER_WAITING_MAX });
}
