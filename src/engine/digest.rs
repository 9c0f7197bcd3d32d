//! What both ends compute over a finished migration, to find that they agree.

use crate::engine::EngineError;
use crate::memory::{GuestRam, combine_digests, digest_stripes, stripe_count};
use crate::types::LaneIndex;
use crate::wire::LaneTotals;

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

/// SHA-256 over every lane's totals, as the final digest has them.
pub(super) fn digest_totals(totals: &[LaneTotals]) -> [u8; 32] {
    sha256(&LaneTotals::canonical_bytes(totals))
}

pub(super) fn totals_differ(source: &[LaneTotals], destination: &[LaneTotals]) -> Option<EngineError> {
    let lanes = source.len().max(destination.len());
    let at = |totals: &[LaneTotals], lane: usize| totals.get(lane).copied().unwrap_or_default();
    let lane = (0..lanes).find(|lane| at(source, *lane) != at(destination, *lane))?;
    let index = LaneIndex(u16::try_from(lane).unwrap_or(u16::MAX));
    Some(EngineError::Totals { lane: index, sent: at(source, lane).frames, applied: at(destination, lane).frames })
}

/// Digest of all guest RAM, on two threads.
pub(super) fn digest_memory(ram: &GuestRam) -> Result<u128, EngineError> {
    let stripes = stripe_count(ram);
    let half = stripes / 2;
    let (low, high) = std::thread::scope(|scope| {
        let high = scope.spawn(|| digest_stripes(ram, half..stripes));
        (digest_stripes(ram, 0..half), high.join())
    });
    let mut all = low?;
    all.extend(high.map_err(|_| EngineError::Bug("digest thread ended".into()))??);
    Ok(combine_digests(&all))
}
