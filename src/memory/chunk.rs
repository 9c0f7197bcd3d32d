//! Codecs for pieces of a stream: each lane packs those that it carries, and any lane may carry any.

use super::Effort;
use super::pack::Packer;
use super::unpack::Unpacker;
use crate::wire::{Codec, Compression, CompressionScope, StreamTerms};

/// WHY: a stream that does not get smaller now, such as one of encrypted memory, will not in the next pieces either.
const SKIP_AFTER_FAILURE: u32 = 7;

/// Packs the pieces of one lane, from its join on.
pub struct ChunkPacker {
    packer: Packer,
    /// Pieces that are not tried.
    skip: u32,
}

impl std::fmt::Debug for ChunkPacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkPacker").field("effort", &self.packer.effort()).finish_non_exhaustive()
    }
}

impl ChunkPacker {
    /// For these terms, on a lane that carries about `lane_bytes`; `level` is of Zstandard, where that is asked for.
    #[must_use]
    pub fn new(terms: &StreamTerms, level: Option<u8>, lane_bytes: u64) -> Self {
        let effort = match (terms.compression, terms.compression_scope) {
            // INVARIANT(page-scope): a piece has many pages, so it is not packed.
            (_, CompressionScope::Page) => Effort::None,
            (Compression::Zstd, _) => level.map_or(Effort::of(Compression::Zstd), |level| Effort::Zstd(i32::from(level))),
            (compression, _) => Effort::of(compression),
        };
        Self { packer: Packer::new(terms.compression_scope, effort, lane_bytes), skip: 0 }
    }

    /// How hard to try from the next piece on, where pieces may be packed.
    pub fn set_effort(&mut self, effort: Effort) {
        if !self.packer.page_by_page() {
            self.packer.set_effort(effort);
        }
    }

    /// How hard it tries.
    #[must_use]
    pub fn effort(&self) -> Effort {
        self.packer.effort()
    }

    /// The codec and what it made of `piece`; the piece itself when that is not worth it.
    pub fn pack<'a>(&'a mut self, piece: &'a [u8]) -> (Option<Codec>, &'a [u8]) {
        if self.skip > 0 {
            self.skip -= 1;
            return (None, piece);
        }
        match self.packer.compress(piece) {
            Some((codec, bytes)) => (Some(codec), self.packer.packed(bytes)),
            None => {
                self.skip = if self.packer.effort() == Effort::None { 0 } else { SKIP_AFTER_FAILURE };
                (None, piece)
            }
        }
    }

    /// How many bytes of `piece` are left when packed fast, for whoever wonders whether packing would pay.
    pub fn probe(&mut self, piece: &[u8]) -> usize {
        self.packer.probe(piece)
    }
}

/// Unpacks the pieces of one lane.
#[derive(Default)]
pub struct ChunkUnpacker(Unpacker);

impl std::fmt::Debug for ChunkUnpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkUnpacker").finish_non_exhaustive()
    }
}

impl ChunkUnpacker {
    /// Fills `piece` with what `block` expands to; false when that is not exactly as much, or `block` is nothing that `codec` has
    /// made.
    #[must_use]
    pub fn unpack(&mut self, codec: Codec, block: &[u8], piece: &mut [u8]) -> bool {
        self.0.unpack(codec, block, piece).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::STREAM_CHUNK_BYTES_MAX;
    use crate::wire::Durability;

    fn terms(compression: Compression, compression_scope: CompressionScope) -> StreamTerms {
        StreamTerms { lanes: 1, compression, compression_scope, length_padding: false, durability: Durability::None, verify: true }
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24).to_le_bytes()[0]
        };
        (0..bytes).map(|_| next()).collect()
    }

    fn packer(compression: Compression, scope: CompressionScope) -> ChunkPacker {
        ChunkPacker::new(&terms(compression, scope), None, 1 << 26)
    }

    #[test]
    fn pieces_come_back_as_they_were() {
        let pieces = [vec![0; STREAM_CHUNK_BYTES_MAX], b"x".to_vec(), noise(5000), b"abc".repeat(1000), noise(5000)];
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Auto] {
            for scope in [CompressionScope::Page, CompressionScope::Batch, CompressionScope::Stream] {
                let (mut packer, mut unpacker) = (packer(compression, scope), ChunkUnpacker::default());
                for (number, piece) in pieces.iter().chain(&pieces).enumerate() {
                    if compression == Compression::Auto {
                        packer.set_effort([Effort::None, Effort::Zstd(1), Effort::Lz4, Effort::Zstd(3)][number % 4]);
                    }
                    let (codec, block) = packer.pack(piece);
                    assert!(codec.is_none() || scope != CompressionScope::Page);
                    let mut back = vec![1; piece.len()];
                    match codec {
                        Some(codec) => assert!(unpacker.unpack(codec, block, &mut back)),
                        None => back.copy_from_slice(block),
                    }
                    assert!(back == *piece);
                }
            }
        }
    }

    #[test]
    fn in_a_stream_a_piece_is_small_when_the_lane_had_it_before() {
        let (mut packer, piece) = (packer(Compression::Zstd, CompressionScope::Stream), noise(100_000));
        assert!(packer.pack(&piece).1.len() > 90_000);
        assert!(packer.pack(&piece).1.len() < 1_000);
    }

    #[test]
    fn what_does_not_get_smaller_is_not_tried_for_a_while() {
        let mut packer = packer(Compression::Zstd, CompressionScope::Batch);
        let (noise, zeroes) = (noise(100_000), vec![0; 100_000]);
        assert_eq!(packer.pack(&noise).0, None);
        for _ in 0..SKIP_AFTER_FAILURE {
            assert_eq!(packer.pack(&zeroes).0, None);
        }
        assert_eq!(packer.pack(&zeroes).0, Some(Codec::Zstd));
    }

    #[test]
    fn a_block_of_another_length_or_of_nothing_is_refused() {
        let mut unpacker = ChunkUnpacker::default();
        let mut packer = packer(Compression::Zstd, CompressionScope::Batch);
        let block = packer.pack(&[0; 1000]).1.to_vec();
        for (codec, block, bytes) in [
            (Codec::Zstd, block.as_slice(), 999),
            (Codec::Zstd, block.as_slice(), 1001),
            (Codec::Zstd, b"garbage".as_slice(), 1000),
            (Codec::ZstdStream, block.as_slice(), 1000),
            (Codec::Lz4, b"garbage".as_slice(), 1000),
            (Codec::Zstd, b"".as_slice(), 1000),
        ] {
            assert!(!unpacker.unpack(codec, block, &mut vec![0; bytes]), "{codec:?} {block:?} {bytes}");
        }
        assert!(unpacker.unpack(Codec::Zstd, &block, &mut [1; 1000]));
    }
}
