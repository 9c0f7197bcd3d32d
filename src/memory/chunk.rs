//! Codecs for pieces of a stream whose content is not known here: each by itself, so that they can travel on any lane.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use zstd_safe::{CCtx, CParameter};

use super::unpack::Unpacker;
use crate::limits::STREAM_CHUNK_BYTES_MAX;
use crate::wire::{Codec, Compression, CompressionScope, StreamTerms};

/// WHY: a piece that shrinks by less costs the other end more than it saves.
const PACKED_PERCENT_MAX: usize = 94;
/// WHY: a stream that does not get smaller now, such as one of encrypted memory, will not in the next pieces either.
const SKIP_AFTER_FAILURE: u32 = 7;
/// WHY: a machine whose guest is leaving has better things to do than to look harder.
const ZSTD_LEVEL: i32 = 1;

/// Packs the pieces of one lane.
pub struct ChunkPacker {
    codec: Option<Codec>,
    level: i32,
    /// Pieces that are not tried.
    skip: u32,
    table: CompressTable,
    context: Option<CCtx<'static>>,
    packed: Box<[u8]>,
}

impl std::fmt::Debug for ChunkPacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkPacker").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl ChunkPacker {
    /// For these terms; `level` is of Zstandard, where that is asked for.
    #[must_use]
    pub fn new(terms: &StreamTerms, level: Option<u8>) -> Self {
        let codec = match terms.compression {
            // INVARIANT(page-scope): where pages begin is not known, so none can be packed by itself.
            _ if terms.compression_scope == CompressionScope::Page => None,
            Compression::None => None,
            Compression::Lz4 => Some(Codec::Lz4),
            Compression::Zstd | Compression::Auto => Some(Codec::Zstd),
        };
        let bytes = get_maximum_output_size(STREAM_CHUNK_BYTES_MAX).max(zstd_safe::compress_bound(STREAM_CHUNK_BYTES_MAX));
        let level = level.map_or(ZSTD_LEVEL, i32::from);
        Self { codec, level, skip: 0, table: CompressTable::large(), context: None, packed: vec![0; bytes].into() }
    }

    /// The codec and what it made of `piece`; the piece itself when that is not worth it.
    pub fn pack<'a>(&'a mut self, piece: &'a [u8]) -> (Option<Codec>, &'a [u8]) {
        if self.skip > 0 {
            self.skip -= 1;
            return (None, piece);
        }
        let Some(codec) = self.codec else { return (None, piece) };
        let packed =
            if codec == Codec::Lz4 { compress_into_with_table(piece, &mut self.packed, &mut self.table).ok() } else { self.zstd(piece) };
        match packed.filter(|packed| *packed * 100 < piece.len() * PACKED_PERCENT_MAX).and_then(|packed| self.packed.get(..packed)) {
            Some(block) => (Some(codec), block),
            None => {
                self.skip = SKIP_AFTER_FAILURE;
                (None, piece)
            }
        }
    }

    fn zstd(&mut self, piece: &[u8]) -> Option<usize> {
        if self.context.is_none() {
            let mut context = CCtx::try_create()?;
            let plain = [CParameter::CompressionLevel(self.level), CParameter::ContentSizeFlag(false), CParameter::DictIdFlag(false)];
            plain.into_iter().try_for_each(|parameter| context.set_parameter(parameter).map(drop)).ok()?;
            self.context = Some(context);
        }
        self.context.as_mut()?.compress2(&mut *self.packed, piece).ok()
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
    pub fn unpack(&mut self, codec: Option<Codec>, block: &[u8], piece: &mut [u8]) -> bool {
        match codec {
            None if block.len() == piece.len() => {
                piece.copy_from_slice(block);
                true
            }
            None => false,
            Some(codec) => self.0.unpack(codec, block, piece).is_ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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

    #[test]
    fn pieces_come_back_as_they_were() {
        let pieces = [vec![0; STREAM_CHUNK_BYTES_MAX], b"x".to_vec(), noise(5000), b"abc".repeat(1000)];
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Auto] {
            for scope in [CompressionScope::Page, CompressionScope::Batch, CompressionScope::Stream] {
                let (mut packer, mut unpacker) = (ChunkPacker::new(&terms(compression, scope), None), ChunkUnpacker::default());
                for piece in &pieces {
                    let (codec, block) = packer.pack(piece);
                    assert!(codec.is_none() || scope != CompressionScope::Page);
                    let mut back = vec![1; piece.len()];
                    assert!(unpacker.unpack(codec, block, &mut back));
                    assert!(back == *piece);
                }
            }
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_not_tried_for_a_while() {
        let mut packer = ChunkPacker::new(&terms(Compression::Auto, CompressionScope::Stream), None);
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
        let mut packer = ChunkPacker::new(&terms(Compression::Zstd, CompressionScope::Stream), None);
        let block = packer.pack(&[0; 1000]).1.to_vec();
        for (codec, block, bytes) in [
            (Some(Codec::Zstd), block.as_slice(), 999),
            (Some(Codec::Zstd), block.as_slice(), 1001),
            (Some(Codec::Zstd), b"garbage".as_slice(), 1000),
            (Some(Codec::Lz4), b"garbage".as_slice(), 1000),
            (Some(Codec::Zstd), b"".as_slice(), 1000),
            (None, b"abc".as_slice(), 2),
        ] {
            assert!(!unpacker.unpack(codec, block, &mut vec![0; bytes]), "{codec:?} {block:?} {bytes}");
        }
        assert!(unpacker.unpack(Some(Codec::Zstd), &block, &mut [1; 1000]));
    }
}
