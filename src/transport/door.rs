//! Who may begin a handshake: bounds on what strangers can make us hold.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{Connecting, ConnectionId, Incoming};

use super::error::{Refused, TransportError};
use crate::limits;

/// Counts the handshakes going on at one socket.
#[derive(Debug, Default)]
pub(super) struct Door {
    half_open: Mutex<HalfOpen>,
}

/// WHY: handshakes from proven and from unproven addresses are counted apart. An unproven address may be
/// forged, so it never uses up the share of its true owner, nor all the room there is.
#[derive(Debug, Default)]
struct HalfOpen {
    /// By the connection IDs that they began with.
    unproven: HashSet<ConnectionId>,
    proven: usize,
    by_origin: HashMap<Prefix, usize>,
}

/// The leading bits of an address, and how many they are.
type Prefix = (IpAddr, u8);

/// Whose an address is: the host's, and its network's. With IPv6 a host can have all addresses of its /64, and a network is what a
/// site is usually given.
fn origins(address: IpAddr) -> [(Prefix, usize); 2] {
    let (host, network) = if address.is_ipv4() { (32, 24) } else { (64, 48) };
    [(prefix(address, host), limits::HALF_OPEN_PER_HOST_MAX), (prefix(address, network), limits::HALF_OPEN_PER_NETWORK_MAX)]
}

fn prefix(address: IpAddr, bits: u8) -> Prefix {
    let leading = match address {
        IpAddr::V4(address) => IpAddr::from(Ipv4Addr::from_bits(address.to_bits() & u32::MAX << (32 - bits))),
        IpAddr::V6(address) => IpAddr::from(Ipv6Addr::from_bits(address.to_bits() & u128::MAX << (128 - bits))),
    };
    (leading, bits)
}

/// What to do with a newcomer.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Admit,
    /// Prove your address, then come again.
    Retry,
    /// No answer at all: an answer would cost us more than the question cost the stranger.
    Ignore,
}

impl HalfOpen {
    fn verdict(&self, address: IpAddr, proven: bool) -> Verdict {
        if !proven {
            return if self.unproven.len() < limits::HALF_OPEN_BEFORE_RETRY { Verdict::Admit } else { Verdict::Retry };
        }
        let of_origin = |(prefix, most)| self.by_origin.get(&prefix).is_some_and(|count| *count >= most);
        let full = self.proven >= limits::HALF_OPEN_MAX || origins(address).into_iter().any(of_origin);
        if full { Verdict::Ignore } else { Verdict::Admit }
    }
}

/// One handshake going on; dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Pass {
    door: Arc<Door>,
    whose: Whose,
}

/// Whose handshake it is.
#[derive(Debug, Clone, Copy)]
enum Whose {
    Proven(IpAddr),
    Unproven(ConnectionId),
}

impl Door {
    /// Whether a newcomer has to prove its address first.
    pub(super) fn is_crowded(&self) -> bool {
        self.lock().unproven.len() >= limits::HALF_OPEN_BEFORE_RETRY
    }

    /// Whether a handshake goes on that began with this connection ID, so that more of it may come.
    pub(super) fn knows(&self, id: &ConnectionId) -> bool {
        self.lock().unproven.contains(id)
    }

    /// Begins a handshake, or turns the newcomer away.
    pub(super) fn admit(self: &Arc<Self>, incoming: Incoming) -> Option<Result<(Connecting, Pass), Refused>> {
        let peer_address = incoming.remote_address();
        let address = peer_address.ip().to_canonical();
        let proven = incoming.remote_address_validated();
        let verdict = self.lock().verdict(address, proven);
        match verdict {
            Verdict::Ignore => incoming.ignore(),
            // Only fails for an address that is validated already, and those are never told to retry.
            Verdict::Retry => drop(incoming.retry()),
            Verdict::Admit => {
                let whose = if proven { Whose::Proven(address) } else { Whose::Unproven(incoming.orig_dst_cid()) };
                let pass = self.enter(whose);
                let begun = incoming.accept().map_err(|error| Refused {
                    peer_address,
                    peer: None,
                    reason: TransportError::from_connection(error, peer_address),
                });
                return Some(begun.map(|connecting| (connecting, pass)));
            }
        }
        None
    }

    fn enter(self: &Arc<Self>, whose: Whose) -> Pass {
        let mut half_open = self.lock();
        match whose {
            Whose::Proven(address) => {
                half_open.proven = half_open.proven.saturating_add(1);
                for (prefix, _) in origins(address) {
                    let count = half_open.by_origin.entry(prefix).or_default();
                    *count = count.saturating_add(1);
                }
            }
            Whose::Unproven(id) => {
                half_open.unproven.insert(id);
            }
        }
        drop(half_open);
        Pass { door: Arc::clone(self), whose }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HalfOpen> {
        self.half_open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut half_open = self.door.lock();
        let address = match self.whose {
            Whose::Proven(address) => address,
            Whose::Unproven(id) => {
                half_open.unproven.remove(&id);
                return;
            }
        };
        half_open.proven = half_open.proven.saturating_sub(1);
        for (prefix, _) in origins(address) {
            if let Entry::Occupied(mut count) = half_open.by_origin.entry(prefix) {
                *count.get_mut() = count.get().saturating_sub(1);
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: [u8; 4] = [192, 0, 2, 1];

    fn enter(door: &Arc<Door>, proven: Option<[u8; 4]>, times: usize) -> Vec<Pass> {
        let unproven = |number: usize| Whose::Unproven(ConnectionId::new(&number.to_be_bytes()));
        (0..times).map(|number| door.enter(proven.map_or_else(|| unproven(number), |address| Whose::Proven(address.into())))).collect()
    }

    #[test]
    fn a_crowd_of_forged_addresses_costs_the_true_owners_one_round_trip_only() {
        let door = Arc::new(Door::default());
        assert_eq!(door.lock().verdict(OWNER.into(), false), Verdict::Admit);
        let passes = enter(&door, None, limits::HALF_OPEN_BEFORE_RETRY);
        assert_eq!(door.lock().verdict(OWNER.into(), false), Verdict::Retry);
        assert_eq!(door.lock().verdict(OWNER.into(), true), Verdict::Admit);
        // What belongs to those who are inside is none of the crowd.
        let (inside, outside) = [0usize, limits::HALF_OPEN_BEFORE_RETRY].map(|number| ConnectionId::new(&number.to_be_bytes())).into();
        assert!(door.is_crowded() && door.knows(&inside) && !door.knows(&outside));
        drop(passes);
        assert!(!door.is_crowded() && !door.knows(&inside));
        assert_eq!(door.lock().verdict(OWNER.into(), false), Verdict::Admit);
    }

    fn from(door: &Arc<Door>, addresses: impl Iterator<Item = IpAddr>) -> Vec<Pass> {
        addresses.map(|address| door.enter(Whose::Proven(address))).collect()
    }

    #[test]
    fn one_host_gets_its_share_one_network_its_own_and_everybody_together_the_whole() {
        let door = Arc::new(Door::default());
        let mut passes = enter(&door, Some(OWNER), limits::HALF_OPEN_PER_HOST_MAX);
        assert_eq!(door.lock().verdict(OWNER.into(), true), Verdict::Ignore);
        assert_eq!(door.lock().verdict([192, 0, 2, 2].into(), true), Verdict::Admit);
        let neighbours = (100u8..).take(limits::HALF_OPEN_PER_NETWORK_MAX - passes.len()).map(|host| [192, 0, 2, host].into());
        passes.extend(from(&door, neighbours));
        assert_eq!(door.lock().verdict([192, 0, 2, 2].into(), true), Verdict::Ignore);
        assert_eq!(door.lock().verdict([192, 0, 3, 2].into(), true), Verdict::Admit);
        let others = (10u8..).take(limits::HALF_OPEN_MAX - passes.len()).map(|network| [10, 0, network, 1].into());
        passes.extend(from(&door, others));
        assert_eq!(door.lock().verdict([192, 0, 3, 2].into(), true), Verdict::Ignore);
        drop(passes);
        assert_eq!(door.lock().verdict(OWNER.into(), true), Verdict::Admit);
        assert!(door.lock().by_origin.is_empty());
    }

    #[test]
    fn an_ipv6_host_does_not_get_more_by_using_all_its_addresses() {
        let door = Arc::new(Door::default());
        let address = |network: u16, host: u64| {
            IpAddr::from(Ipv6Addr::from_bits((0x2001_0db8_u128 << 96) | u128::from(network) << 64 | u128::from(host)))
        };
        let passes = from(&door, (0u64..).take(limits::HALF_OPEN_PER_HOST_MAX).map(|host| address(1, host << 40)));
        assert_eq!(door.lock().verdict(address(1, 7), true), Verdict::Ignore);
        assert_eq!(door.lock().verdict(address(2, 7), true), Verdict::Admit);
        drop(passes);
        assert!(door.lock().by_origin.is_empty());
    }
}
