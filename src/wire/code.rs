//! Who is at fault: the class of every failure, the same on the wire, in the API and in exit codes.

use serde::{Deserialize, Serialize};

/// The class of a failure. Its number is the QUIC application close code and the code in a
/// [`Failure`](super::Failure) message; zero is a normal close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u16)]
pub enum ErrorClass {
    /// The peer is honest but cannot do this: versions, features, CPU, memory.
    PeerIncompatible = 1,
    /// The peer broke the protocol.
    PeerMisbehaved = 2,
    /// The peer is not who it has to be.
    Unauthenticated = 3,
    /// A policy said no.
    Denied = 4,
    /// The guest dirties memory faster than it can be moved within the limits given.
    NotConverged = 5,
    /// A deadline passed.
    TimedOut = 6,
    /// Somebody asked to stop.
    Cancelled = 7,
    /// Our own surroundings failed: disk, hypervisor, network socket.
    Local = 8,
    /// The request makes no sense: unknown VM, bad value.
    Misuse = 9,
    /// Our own broken invariant.
    Bug = 10,
    /// The peer cannot be reached.
    PeerUnreachable = 11,
    /// The outcome is not known and an operator must decide.
    InDoubt = 12,
    /// The peer has no room for it now, and may have later.
    PeerBusy = 13,
}

impl ErrorClass {
    /// Every class, in order of its number.
    pub const ALL: [Self; 13] = [
        Self::PeerIncompatible,
        Self::PeerMisbehaved,
        Self::Unauthenticated,
        Self::Denied,
        Self::NotConverged,
        Self::TimedOut,
        Self::Cancelled,
        Self::Local,
        Self::Misuse,
        Self::Bug,
        Self::PeerUnreachable,
        Self::InDoubt,
        Self::PeerBusy,
    ];

    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The class of a number from the wire.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.number() == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_zero_is_nothing() {
        for class in ErrorClass::ALL {
            assert_eq!(ErrorClass::from_number(class.number()), Some(class));
        }
        assert_eq!(ErrorClass::from_number(0), None);
        assert_eq!(ErrorClass::from_number(14), None);
    }
}
