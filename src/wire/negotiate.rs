//! From two greetings to what both sides speak.

use crate::limits;
use crate::types::Incarnation;
use crate::wire::error::printable;
use crate::wire::{Feature, Hello, WireError};

/// Lowest protocol version spoken here.
pub const VERSION_MIN: u16 = 1;
/// Highest protocol version spoken here.
pub const VERSION_MAX: u16 = 1;

/// Streams of hypervisors that send their guests themselves.
pub const STREAM_FEATURE: &str = "stream";
/// Disks that move with such a guest.
pub const DISK_FEATURE: &str = "disks";
/// A way back from one hypervisor to the other, and guests that run at the destination before all of their pages are there.
pub const POST_COPY_FEATURE: &str = "post-copy";
/// Pages that such a guest waits for, which overtake the rest of its stream.
pub const URGENT_FEATURE: &str = "urgent-pages";

/// What both sides speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// Highest common version.
    pub version: u16,
    /// Names of the features that both sides named, sorted.
    pub features: Vec<String>,
}

impl Negotiated {
    /// Whether both sides named a feature.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|name| name == feature)
    }
}

impl Hello {
    /// The greeting of this build.
    #[must_use]
    pub fn new(incarnation: Incarnation, signing_key: [u8; 32]) -> Self {
        let features = [DISK_FEATURE, POST_COPY_FEATURE, STREAM_FEATURE, URGENT_FEATURE];
        let features = features.map(|name| Feature { name: name.to_owned(), critical: false }).to_vec();
        Self { version_min: VERSION_MIN, version_max: VERSION_MAX, features, incarnation, signing_key }
    }

    /// Checks what does not depend on the other side: versions in order, names well-formed, and no
    /// name twice.
    pub(super) fn check(&self) -> Result<(), WireError> {
        if self.version_min == 0 || self.version_min > self.version_max {
            let got = format!("{}..={}", self.version_min, self.version_max);
            return Err(WireError::Malformed { message: "hello", field: "versions", expected: "1 <= lowest <= highest", got });
        }
        // SPEC: PROTOCOL.md#must-key-of-somebody
        if is_of_small_order(&self.signing_key) {
            let got = printable(&self.signing_key);
            return Err(WireError::Malformed {
                message: "hello",
                field: "signing key",
                expected: "a key that only its owner signs with",
                got,
            });
        }
        for (index, feature) in self.features.iter().enumerate() {
            if !is_feature_name(&feature.name) {
                let got = printable(feature.name.as_bytes());
                return Err(WireError::Malformed { message: "hello", field: "feature name", expected: "1 to 32 of `a-z 0-9 -`", got });
            }
            if self.features.iter().take(index).any(|earlier| earlier.name == feature.name) {
                let got = feature.name.clone();
                return Err(WireError::Malformed { message: "hello", field: "features", expected: "every name once", got });
            }
        }
        Ok(())
    }
}

/// The y of the eight points of small order on Ed25519's curve, in each way in which 255 bits can say it, little-endian.
const SMALL_ORDER: [[u8; 32]; 7] = {
    const fn filled(first: u8, middle: u8, last: u8) -> [u8; 32] {
        let mut bytes = [middle; 32];
        bytes[0] = first;
        bytes[31] = last;
        bytes
    }
    const ORDER_8: [u8; 32] = *b"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05";
    const ORDER_8_TOO: [u8; 32] = *b"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a";
    [filled(0, 0, 0), filled(1, 0, 0), ORDER_8, ORDER_8_TOO, filled(0xec, 0xff, 0x7f), filled(0xed, 0xff, 0x7f), filled(0xee, 0xff, 0x7f)]
};

/// Whether a key is one for which anybody can sign: one signature in eight or more that is made up verifies.
fn is_of_small_order(key: &[u8; 32]) -> bool {
    SMALL_ORDER
        .iter()
        .any(|weak| weak.iter().zip(key).enumerate().all(|(at, (weak, byte))| *weak == if at == 31 { byte & 0x7f } else { *byte }))
}

fn is_feature_name(name: &str) -> bool {
    (1..=limits::FEATURE_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// What both sides speak: the highest common version and the features that both named. A feature
/// that one side calls critical has to be named by the other.
///
/// # Errors
/// No common version, a critical feature that one side lacks, or a malformed greeting.
pub fn negotiate(own: &Hello, peer: &Hello) -> Result<Negotiated, WireError> {
    own.check()?;
    peer.check()?;
    let version = own.version_max.min(peer.version_max);
    if version < own.version_min.max(peer.version_min) {
        return Err(WireError::Version {
            own_min: own.version_min,
            own_max: own.version_max,
            peer_min: peer.version_min,
            peer_max: peer.version_max,
        });
    }
    let names = |hello: &Hello, name: &str| hello.features.iter().any(|feature| feature.name == name);
    // SPEC: PROTOCOL.md#must-know-critical
    if let Some(feature) = peer.features.iter().find(|feature| feature.critical && !names(own, &feature.name)) {
        return Err(WireError::UnknownFeature { name: feature.name.clone() });
    }
    if let Some(feature) = own.features.iter().find(|feature| feature.critical && !names(peer, &feature.name)) {
        return Err(WireError::MissingFeature { name: feature.name.clone() });
    }
    let mut features: Vec<String> = own.features.iter().map(|feature| &feature.name).filter(|name| names(peer, name)).cloned().collect();
    features.sort_unstable();
    Ok(Negotiated { version, features })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ErrorClass;

    fn hello(versions: (u16, u16), features: &[(&str, bool)]) -> Hello {
        let features = features.iter().map(|(name, critical)| Feature { name: (*name).to_owned(), critical: *critical }).collect();
        Hello { version_min: versions.0, version_max: versions.1, features, ..Hello::new(Incarnation([1; 16]), [2; 32]) }
    }

    // SPEC: PROTOCOL.md#must-highest-version
    #[test]
    fn takes_the_highest_common_version() {
        assert_eq!(negotiate(&hello((1, 3), &[]), &hello((2, 7), &[])).unwrap().version, 3);
        assert_eq!(negotiate(&hello((1, 1), &[]), &hello((1, 1), &[])).unwrap().version, 1);
        let refused = negotiate(&hello((1, 2), &[]), &hello((3, 4), &[])).unwrap_err();
        assert_eq!(refused, WireError::Version { own_min: 1, own_max: 2, peer_min: 3, peer_max: 4 });
        assert_eq!(refused.class(), ErrorClass::PeerIncompatible);
        assert_eq!(refused.to_string(), "no common protocol version: expected 1..=2, got 3..=4");
    }

    // SPEC: PROTOCOL.md#must-know-critical
    #[test]
    fn refuses_an_unknown_critical_feature_by_name() {
        let plain = hello((1, 1), &[]);
        let needs = hello((1, 1), &[("zstd", false), ("delta-v2", true)]);
        let refused = negotiate(&plain, &needs).unwrap_err();
        assert_eq!(refused, WireError::UnknownFeature { name: "delta-v2".to_owned() });
        assert!(refused.to_string().contains("`delta-v2`"));
        assert_eq!(negotiate(&needs, &plain).unwrap_err(), WireError::MissingFeature { name: "delta-v2".to_owned() });
    }

    #[test]
    fn features_are_what_both_named() {
        let own = hello((1, 1), &[("zstd", false), ("delta", true), ("mine", false)]);
        let peer = hello((1, 1), &[("delta", false), ("yours", false), ("zstd", true)]);
        let agreed = negotiate(&own, &peer).unwrap();
        assert_eq!(agreed.features, ["delta", "zstd"]);
        assert!(agreed.has("zstd") && !agreed.has("mine"));
    }

    // SPEC: PROTOCOL.md#must-key-of-somebody
    #[test]
    fn refuses_a_key_for_which_anybody_can_sign() {
        let own = hello((1, 1), &[]);
        for key in SMALL_ORDER {
            for sign in [0, 0x80] {
                let mut peer = hello((1, 1), &[]);
                peer.signing_key = key;
                peer.signing_key[31] |= sign;
                let refused = negotiate(&own, &peer).unwrap_err().to_string();
                assert!(refused.starts_with("`signing key` of `hello` is malformed: expected a key that only its owner"), "{refused}");
                peer.signing_key[7] ^= 1;
                assert!(negotiate(&own, &peer).is_ok());
            }
        }
    }

    /// The oracle: with such a key a signature that nobody made is one of every other message or so.
    #[test]
    fn anybody_can_sign_for_a_key_of_small_order() {
        let key = SMALL_ORDER[1];
        let made_up = [key, [0; 32]].concat();
        let verifies = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key).verify(b"anything", &made_up);
        assert!(verifies.is_ok(), "the library refuses such keys now: the check may go");
    }

    // SPEC: PROTOCOL.md#must-feature-once
    #[test]
    fn refuses_a_feature_named_twice_and_malformed_greetings() {
        let own = hello((1, 1), &[]);
        for peer in [
            hello((1, 1), &[("zstd", false), ("zstd", true)]),
            hello((1, 1), &[("Zstd", false)]),
            hello((1, 1), &[("", false)]),
            hello((1, 1), &[("a\u{1b}[31m", false)]),
            hello((0, 1), &[]),
            hello((2, 1), &[]),
        ] {
            let refused = negotiate(&own, &peer).unwrap_err();
            assert!(matches!(refused, WireError::Malformed { message: "hello", .. }), "{refused}");
            assert!(refused.to_string().is_ascii() && !refused.to_string().contains('\u{1b}'), "{refused}");
        }
    }
}
