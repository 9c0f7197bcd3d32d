//! Whether a guest may repeat its past: the VM generation, which guests read to stay unique.
//!
//! A live migration keeps the id and counts a disruption. A resume that may repeat a part of the guest's past gets a new
//! random id first. These are the facts behind VMGENID and VMClock; how a guest reads them is the VMM's business.

use std::io;

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::types::GenerationId;

/// The generation of a VM. Part of its saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Two copies of a guest that both ran on from one moment never have the same.
    pub id: GenerationId,
    /// Which id of this VM it is, from 1 (VMClock: `vm_generation_counter`).
    pub count: u64,
    /// How often the guest went on as another process than the one it stopped in (VMClock: `disruption_marker`).
    pub disruptions: u64,
}

/// Bytes that are no generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("VM generation: expected an id that is not zero and counters up to {}", limits::GENERATION_COUNT_MAX)]
pub struct InvalidGeneration;

impl Generation {
    /// What [`Generation::to_bytes`] gives.
    pub const BYTES: usize = 32;

    /// The first generation of a VM.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn first() -> io::Result<Self> {
        Ok(Self { id: GenerationId(random()?), count: 1, disruptions: 0 })
    }

    /// For a guest that may repeat a part of its past: another id, and the count raised.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn renewed(self) -> io::Result<Self> {
        Ok(Self { id: GenerationId(random()?), count: self.count.saturating_add(1), ..self })
    }

    /// For a guest that goes on in another process: the same id, and the disruptions raised.
    #[must_use]
    pub fn disrupted(self) -> Self {
        Self { disruptions: self.disruptions.saturating_add(1), ..self }
    }

    /// The id and both counters, little endian.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let parts = self.id.0.into_iter().chain(self.count.to_le_bytes()).chain(self.disruptions.to_le_bytes());
        bytes.iter_mut().zip(parts).for_each(|(byte, part)| *byte = part);
        bytes
    }

    /// Reads what [`Generation::to_bytes`] gave.
    ///
    /// # Errors
    /// Another length, or values that no VM has.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, InvalidGeneration> {
        let read = || {
            let (id, rest) = bytes.split_first_chunk()?;
            let (count, rest) = rest.split_first_chunk()?;
            let disruptions = u64::from_le_bytes(rest.try_into().ok()?);
            Some(Self { id: GenerationId(*id), count: u64::from_le_bytes(*count), disruptions })
        };
        read().ok_or(InvalidGeneration)?.checked()
    }

    /// Refuses values that no VM has.
    ///
    /// # Errors
    /// The id is zero, or a counter is out of its bounds.
    pub fn checked(self) -> Result<Self, InvalidGeneration> {
        let counters = (1..=limits::GENERATION_COUNT_MAX).contains(&self.count) && self.disruptions <= limits::GENERATION_COUNT_MAX;
        if counters && self.id.0 != [0; 16] { Ok(self) } else { Err(InvalidGeneration) }
    }
}

/// 128 random bits from the system.
pub(super) fn random() -> io::Result<[u8; 16]> {
    use ring::rand::SecureRandom;
    let mut bytes = [0; 16];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("no random bytes from the system"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewing_changes_the_id_and_a_disruption_does_not() {
        let first = Generation::first().unwrap();
        let renewed = first.renewed().unwrap();
        assert_ne!(renewed.id, first.id);
        assert_eq!((renewed.count, renewed.disruptions), (2, 0));
        assert_eq!(renewed.disrupted(), Generation { disruptions: 1, ..renewed });
        assert_ne!(Generation::first().unwrap().id, first.id, "two VMs");
    }

    #[test]
    fn bytes_hold_every_field_at_its_place() {
        let generation = Generation { id: GenerationId([7; 16]), count: 2, disruptions: 3 };
        let bytes = generation.to_bytes();
        assert_eq!((&bytes[..16], bytes[16], bytes[24]), (&[7; 16][..], 2, 3));
        assert_eq!(Generation::from_bytes(&bytes), Ok(generation));
        let text = serde_json::to_string(&generation).unwrap();
        assert_eq!(text, format!(r#"{{"id":"{}","count":2,"disruptions":3}}"#, "07".repeat(16)));
        assert_eq!(serde_json::from_str::<Generation>(&text).unwrap(), generation);
    }

    #[test]
    fn values_that_no_vm_has_are_refused() {
        let good = Generation { id: GenerationId([7; 16]), count: 1, disruptions: limits::GENERATION_COUNT_MAX };
        assert!(good.checked().is_ok());
        for bad in [
            Generation { id: GenerationId([0; 16]), ..good },
            Generation { count: 0, ..good },
            Generation { count: limits::GENERATION_COUNT_MAX + 1, ..good },
            Generation { disruptions: u64::MAX, ..good },
        ] {
            assert_eq!(Generation::from_bytes(&bad.to_bytes()), Err(InvalidGeneration), "{bad:?}");
        }
        for length in [0, 31, 33] {
            assert_eq!(Generation::from_bytes(&[1; 64][..length]), Err(InvalidGeneration));
        }
    }
}
