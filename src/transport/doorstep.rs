//! What a crowd is told: RETRY, before QUIC's library looks at anything.
//!
//! WHY: the library derives eight keys from a stranger's first datagram before it asks [`Door`] whether to answer at all, on the threads
//! that receive guests; a flood cost up to twice as much. While so many wait that each newcomer has to prove its
//! address first, that is said here, at the price of two hashes. Without a crowd nothing is different.
//!
//! A token is what the library would have written, so it takes whoever comes again with one.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quinn::crypto::{self, AeadKey, CryptoError, HandshakeTokenKey};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, ConnectionId, UdpPoller};
use ring::hmac;
use ring::rand::SystemRandom;

use super::door::Door;
use super::handshake::{QUIC_VERSION, Server};
use super::steer::SteeredIds;

/// How long whoever was told to come again has time for it.
pub(super) const TOKEN_LIFETIME: Duration = Duration::from_secs(5);
/// What is shorter begins no connection (RFC 9000 section 14.1), and an answer would be more than a third of it.
const INITIAL_BYTES_MIN: usize = 1200;
/// RFC 9000 sections 7.2 and 17.2.
const ORIGINAL_ID_BYTES_MIN: usize = 8;
const ID_BYTES_MAX: usize = 20;
/// What the library's tokens end with.
const NONCE_BYTES: usize = 16;
const MAC_BYTES: usize = 32;

/// Signs tokens. Who has one knows all that is in it, so nothing is encrypted.
pub(super) struct TokenKey(hmac::Key);

impl TokenKey {
    /// None if the system has no random numbers.
    pub(super) fn new() -> Option<Arc<Self>> {
        Some(Arc::new(Self(hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).ok()?)))
    }

    fn mac(&self, nonce: &[u8], more: &[u8], contents: &[u8]) -> hmac::Tag {
        hmac::sign(&self.0, &[nonce, more, contents].concat())
    }

    /// The contents, if they are what the last bytes say.
    fn sealed<'a>(&self, nonce: &[u8], more: &[u8], sealed: &'a [u8]) -> Option<&'a [u8]> {
        let (contents, mac) = sealed.split_last_chunk::<MAC_BYTES>()?;
        hmac::verify(&self.0, &[nonce, more, contents].concat(), mac).is_ok().then_some(contents)
    }

    /// As the library writes one: kind, address and original connection ID, time, what it is sealed with, nonce.
    fn token(&self, address: SocketAddr, original: &[u8], now: u64) -> Vec<u8> {
        let mut token = vec![0];
        match address.ip() {
            IpAddr::V4(ip) => token.extend([&[0], ip.octets().as_slice()].concat()),
            IpAddr::V6(ip) => token.extend([&[1], ip.octets().as_slice()].concat()),
        }
        token.extend(address.port().to_be_bytes());
        token.push(u8::try_from(original.len()).unwrap_or(0));
        token.extend(original);
        token.extend(now.to_be_bytes());
        let nonce = [0; NONCE_BYTES];
        let mac = self.mac(&nonce, &[], &token);
        [&token, mac.as_ref(), &nonce].concat()
    }

    /// Whether this address was given the token, and not too long ago.
    fn is_good(&self, token: &[u8], address: SocketAddr, now: u64) -> bool {
        let contents = token.split_last_chunk::<NONCE_BYTES>().and_then(|(sealed, nonce)| self.sealed(nonce, &[], sealed));
        let Some((rest, time)) = contents.and_then(|contents| contents.split_last_chunk::<8>()) else { return false };
        let whose = match address.ip() {
            IpAddr::V4(ip) => [&[0, 0], ip.octets().as_slice(), &address.port().to_be_bytes()].concat(),
            IpAddr::V6(ip) => [&[0, 1], ip.octets().as_slice(), &address.port().to_be_bytes()].concat(),
        };
        rest.starts_with(&whose) && now <= u64::from_be_bytes(*time).saturating_add(TOKEN_LIFETIME.as_secs())
    }
}

/// The library's idea of it. Its nonces are random.
impl HandshakeTokenKey for TokenKey {
    fn aead_from_hkdf(&self, nonce: &[u8]) -> Box<dyn AeadKey> {
        Box::new(Sealed { key: Self(self.0.clone()), nonce: nonce.to_vec() })
    }
}

struct Sealed {
    key: TokenKey,
    nonce: Vec<u8>,
}

impl AeadKey for Sealed {
    fn seal(&self, data: &mut Vec<u8>, more: &[u8]) -> Result<(), CryptoError> {
        let mac = self.key.mac(&self.nonce, more, data);
        data.extend(mac.as_ref());
        Ok(())
    }

    fn open<'a>(&self, data: &'a mut [u8], more: &[u8]) -> Result<&'a mut [u8], CryptoError> {
        let length = self.key.sealed(&self.nonce, more, data).ok_or(CryptoError)?.len();
        data.get_mut(..length).ok_or(CryptoError)
    }
}

/// What stands in front of one of our sockets.
pub(super) struct Greeting {
    pub(super) door: Arc<Door>,
    pub(super) server: Arc<Server>,
    pub(super) tokens: Arc<TokenKey>,
    /// Its index in the group.
    pub(super) socket: u8,
}

/// A socket, and what is said to a crowd at it.
pub(super) struct Doorstep {
    inner: Arc<dyn AsyncUdpSocket>,
    greeting: Greeting,
}

/// The beginning of a connection, as far as anybody can read it.
#[derive(Debug, PartialEq, Eq)]
struct Initial<'a> {
    original: &'a [u8],
    source: &'a [u8],
    token: &'a [u8],
}

impl<'a> Initial<'a> {
    /// None: something else, which is the library's to look at.
    fn read(datagram: &'a [u8]) -> Option<Self> {
        let (first, rest) = datagram.split_first().filter(|_| datagram.len() >= INITIAL_BYTES_MIN)?;
        let rest = rest.strip_prefix(&QUIC_VERSION.to_be_bytes())?;
        // A long header, and the kind that begins.
        if first & 0xb0 != 0x80 {
            return None;
        }
        let id = |rest: &'a [u8]| {
            let (length, rest) = rest.split_first()?;
            rest.split_at_checked(usize::from(*length)).filter(|(id, _)| id.len() <= ID_BYTES_MAX)
        };
        let (original, rest) = id(rest)?;
        let (source, rest) = id(rest)?;
        let (length, rest) = variable(rest)?;
        let token = rest.get(..length)?;
        (original.len() >= ORIGINAL_ID_BYTES_MIN).then_some(Self { original, source, token })
    }
}

/// A number of RFC 9000 section 16, as far as a datagram's lengths go: one or two bytes.
fn variable(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let value = usize::from(first & 0x3f);
    match first >> 6 {
        0 => Some((value, rest)),
        1 => rest.split_first().map(|(second, rest)| (value << 8 | usize::from(*second), rest)),
        _ => None,
    }
}

impl Greeting {
    /// What to answer instead of letting QUIC's library look: nothing at all, for a token that is none.
    fn answer(&self, datagram: &[u8], from: SocketAddr, now: u64) -> Option<Option<Vec<u8>>> {
        let initial = Initial::read(datagram)?;
        // Whoever has heard of us already speaks to an ID of ours, in the same datagram as what ends the handshake.
        if self.door.knows(&ConnectionId::new(initial.original)) || SteeredIds::has_issued(initial.original) {
            return None;
        }
        match initial.token {
            [] => Some(Some(self.retry(&initial, from, now))),
            token if self.tokens.is_good(token, from, now) => None,
            // Who has been told to come again does not listen to that again.
            _ => Some(None),
        }
    }

    /// RFC 9000 section 17.2.5.
    fn retry(&self, initial: &Initial<'_>, to: SocketAddr, now: u64) -> Vec<u8> {
        let own = SteeredIds { socket: self.socket }.passing();
        let token = self.tokens.token(to, initial.original, now);
        let length = |id: &[u8]| u8::try_from(id.len()).unwrap_or(0);
        let mut packet = vec![0xf0];
        packet.extend(QUIC_VERSION.to_be_bytes());
        for id in [initial.source, &own] {
            packet.push(length(id));
            packet.extend(id);
        }
        packet.extend(token);
        let tag = crypto::ServerConfig::retry_tag(&*self.server, QUIC_VERSION, &ConnectionId::new(initial.original), &packet);
        packet.extend(tag);
        packet
    }
}

impl Doorstep {
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>, greeting: Greeting) -> Self {
        Self { inner, greeting }
    }

    /// Answers those of a crowd among what one receive brought, and takes them out.
    fn greet(&self, received: &[u8], meta: &mut RecvMeta) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let datagrams = || received.chunks(meta.stride.max(1));
        let answer = |datagram| self.greeting.answer(datagram, meta.addr, now);
        // Only what is of one sender comes together. If one of them is for the library, it gets all.
        let Some(answers) = datagrams().map(answer).collect::<Option<Vec<_>>>() else { return };
        for contents in answers.iter().flatten() {
            // A full buffer loses it, as the network may: whoever means it asks again.
            let transmit = Transmit { destination: meta.addr, ecn: None, contents, segment_size: None, src_ip: meta.dst_ip };
            let _ = self.inner.try_send(&transmit);
        }
        meta.len = 0;
    }
}

impl fmt::Debug for Doorstep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorstep").field("socket", &self.greeting.socket).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Doorstep {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(&self, cx: &mut Context<'_>, buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        let received = self.inner.poll_recv(cx, buffers, metas);
        if let Poll::Ready(Ok(count)) = received
            && self.greeting.door.is_crowded()
        {
            for (buffer, meta) in buffers.iter().zip(metas).take(count) {
                if let Some(bytes) = buffer.get(..meta.len) {
                    self.greet(bytes, meta);
                }
            }
        }
        received
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_token_is_good_for_its_address_and_a_while_only_and_as_it_was_written() {
        let key = TokenKey::new().unwrap();
        for own in ["192.0.2.1:4433", "[2001:db8::1]:4433", "[::ffff:192.0.2.1]:4433"] {
            let token = key.token(address(own), &[7; 20], 1000);
            assert!(key.is_good(&token, address(own), 1000) && key.is_good(&token, address(own), 1005));
            assert!(!key.is_good(&token, address(own), 1006));
            for other in ["192.0.2.2:4433", "192.0.2.1:4434", "[2001:db8::2]:4433"] {
                assert!(!key.is_good(&token, address(other), 1000), "{own}: {other}");
            }
            for at in 0..token.len() {
                let mut changed = token.clone();
                changed[at] ^= 1;
                assert!(!key.is_good(&changed, address(own), 1000), "{own}: byte {at}");
                assert!(!key.is_good(&token[..at], address(own), 1000), "{own}: {at} bytes");
            }
            assert!(!TokenKey::new().unwrap().is_good(&token, address(own), 1000));
        }
    }

    #[test]
    fn what_is_sealed_opens_under_its_own_nonce_only() {
        let key = TokenKey::new().unwrap();
        let mut data = b"contents".to_vec();
        key.aead_from_hkdf(&[1; 16]).seal(&mut data, b"").unwrap();
        let opened = |nonce: u8, data: &mut [u8]| key.aead_from_hkdf(&[nonce; 16]).open(data, b"").map(|opened| opened.to_vec()).ok();
        assert_eq!(opened(1, &mut data.clone()), Some(b"contents".to_vec()));
        assert_eq!(opened(2, &mut data.clone()), None);
        data[0] ^= 1;
        assert_eq!(opened(1, &mut data), None);
        assert_eq!(opened(1, &mut []), None);
    }

    /// Where the parts of an INITIAL are, and what is none.
    #[test]
    fn only_what_begins_a_connection_is_answered_here() {
        let datagram = |first: u8, version: u32, original: u8, source: u8, token: &[u8]| {
            let mut datagram = vec![first];
            datagram.extend(version.to_be_bytes());
            datagram.push(original);
            datagram.extend(vec![0xaa; original.into()]);
            datagram.push(source);
            datagram.extend(vec![0xbb; source.into()]);
            datagram.extend((0x4000 | u16::try_from(token.len()).unwrap()).to_be_bytes());
            datagram.extend(token);
            datagram.resize(datagram.len().max(1200), 0);
            datagram
        };
        for first in [0xc0, 0xcf, 0x80] {
            let good = datagram(first, 1, 8, 20, b"token");
            assert_eq!(Initial::read(&good), Some(Initial { original: &[0xaa; 8], source: &[0xbb; 20], token: b"token" }));
        }
        let none = [
            datagram(0x40, 1, 8, 8, b""),
            datagram(0xe0, 1, 8, 8, b""),
            datagram(0xd0, 1, 8, 8, b""),
            datagram(0xf0, 1, 8, 8, b""),
            datagram(0xc0, 2, 8, 8, b""),
            datagram(0xc0, 1, 7, 8, b""),
            datagram(0xc0, 1, 21, 8, b""),
            datagram(0xc0, 1, 8, 21, b""),
            datagram(0xc0, 1, 8, 8, b"")[..1199].to_vec(),
            [&[0xc0, 0, 0, 0, 1, 8], [0xff; 1300].as_slice()].concat(),
        ];
        for datagram in none {
            assert_eq!(Initial::read(&datagram), None, "{:02x?}", &datagram[..16]);
        }
    }
}
