//! Who may begin a handshake: bounds on what strangers can make us hold.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{Connecting, Incoming};

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
    unproven: usize,
    proven: usize,
    by_address: HashMap<IpAddr, usize>,
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
            return if self.unproven < limits::HALF_OPEN_BEFORE_RETRY { Verdict::Admit } else { Verdict::Retry };
        }
        let from_address = self.by_address.get(&address).copied().unwrap_or(0);
        let full = self.proven >= limits::HALF_OPEN_MAX || from_address >= limits::HALF_OPEN_PER_ADDRESS_MAX;
        if full { Verdict::Ignore } else { Verdict::Admit }
    }
}

/// One handshake going on; dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Pass {
    door: Arc<Door>,
    proven: Option<IpAddr>,
}

impl Door {
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
                let pass = self.enter(proven.then_some(address));
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

    fn enter(self: &Arc<Self>, proven: Option<IpAddr>) -> Pass {
        let mut half_open = self.lock();
        if let Some(address) = proven {
            half_open.proven = half_open.proven.saturating_add(1);
            let count = half_open.by_address.entry(address).or_default();
            *count = count.saturating_add(1);
        } else {
            half_open.unproven = half_open.unproven.saturating_add(1);
        }
        drop(half_open);
        Pass { door: Arc::clone(self), proven }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HalfOpen> {
        self.half_open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut half_open = self.door.lock();
        let Some(address) = self.proven else {
            half_open.unproven = half_open.unproven.saturating_sub(1);
            return;
        };
        half_open.proven = half_open.proven.saturating_sub(1);
        if let Some(count) = half_open.by_address.get_mut(&address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                half_open.by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: [u8; 4] = [192, 0, 2, 1];

    fn enter(door: &Arc<Door>, proven: Option<[u8; 4]>, times: usize) -> Vec<Pass> {
        (0..times).map(|_| door.enter(proven.map(IpAddr::from))).collect()
    }

    #[test]
    fn a_crowd_of_forged_addresses_costs_the_true_owners_one_round_trip_only() {
        let door = Arc::new(Door::default());
        assert_eq!(door.lock().verdict(OWNER.into(), false), Verdict::Admit);
        let passes = enter(&door, None, limits::HALF_OPEN_BEFORE_RETRY);
        assert_eq!(door.lock().verdict(OWNER.into(), false), Verdict::Retry);
        assert_eq!(door.lock().verdict(OWNER.into(), true), Verdict::Admit);
        drop(passes);
        assert_eq!(door.lock().verdict(OWNER.into(), false), Verdict::Admit);
    }

    #[test]
    fn one_address_gets_its_share_and_everybody_together_the_whole() {
        let door = Arc::new(Door::default());
        let mut passes = enter(&door, Some(OWNER), limits::HALF_OPEN_PER_ADDRESS_MAX);
        assert_eq!(door.lock().verdict(OWNER.into(), true), Verdict::Ignore);
        assert_eq!(door.lock().verdict([192, 0, 2, 2].into(), true), Verdict::Admit);
        passes.extend((10..).take(limits::HALF_OPEN_MAX - passes.len()).map(|host: u32| door.enter(Some(IpAddr::V4(host.into())))));
        assert_eq!(door.lock().verdict([192, 0, 2, 2].into(), true), Verdict::Ignore);
        drop(passes);
        assert_eq!(door.lock().verdict(OWNER.into(), true), Verdict::Admit);
        assert!(door.lock().by_address.is_empty());
    }
}
