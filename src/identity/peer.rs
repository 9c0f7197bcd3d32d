//! Who a peer has proved to be.

use std::time::SystemTime;

use crate::types::SpiffeId;

/// The verified identity of a peer. Only verification makes one; whoever holds it may rely on it for
/// the moment of verification, and asks [`Credentials::identify`](super::Credentials::identify) again after a reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    pub(super) spiffe: SpiffeId,
    pub(super) site: Option<String>,
    pub(super) serial: String,
    pub(super) leaf_sha256: [u8; 32],
    pub(super) spki_sha256: [u8; 32],
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl PeerIdentity {
    /// The SPIFFE ID of the leaf.
    #[must_use]
    pub fn spiffe(&self) -> &SpiffeId {
        &self.spiffe
    }

    /// The site that the authority wrote into the certificate (subject `OU`), when there is exactly one.
    #[must_use]
    pub fn site(&self) -> Option<&str> {
        self.site.as_deref()
    }

    /// The serial number of the leaf, hexadecimal.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// SHA-256 of the leaf certificate.
    #[must_use]
    pub fn leaf_sha256(&self) -> [u8; 32] {
        self.leaf_sha256
    }

    /// SHA-256 of the leaf's SubjectPublicKeyInfo: lanes of one session share it.
    #[must_use]
    pub fn spki_sha256(&self) -> [u8; 32] {
        self.spki_sha256
    }

    /// When the leaf began to be valid.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When the leaf expires.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whole days until the leaf expires; negative when it has.
    #[must_use]
    pub fn days_left(&self, now: SystemTime) -> i64 {
        const DAY: u64 = 86_400;
        let days = |seconds: u64| i64::try_from(seconds / DAY).unwrap_or(i64::MAX);
        match self.not_after.duration_since(now) {
            Ok(left) => days(left.as_secs()),
            Err(past) => -days(past.duration().as_secs()) - 1,
        }
    }

    /// An identity out of thin air, for other modules' unit tests.
    #[cfg(test)]
    pub(crate) fn for_tests(spiffe: &str, key: u8) -> Self {
        use std::time::Duration;
        Self {
            spiffe: spiffe.parse().unwrap(),
            site: None,
            serial: format!("{key:02x}"),
            leaf_sha256: [key; 32],
            spki_sha256: [key; 32],
            not_before: SystemTime::UNIX_EPOCH,
            not_after: SystemTime::now() + Duration::from_secs(90 * 86_400),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn days_left_counts_whole_days_and_goes_negative() {
        let peer = PeerIdentity::for_tests("spiffe://dc1.test/gateway/a", 7);
        let day = Duration::from_secs(86_400);
        let end = peer.not_after();
        assert_eq!(peer.days_left(end), 0);
        assert_eq!(peer.days_left(end - day), 1);
        assert_eq!(peer.days_left(end - (day - Duration::from_secs(1))), 0);
        assert_eq!(peer.days_left(end + Duration::from_secs(1)), -1);
        assert_eq!(peer.days_left(end + day), -2);
    }
}
