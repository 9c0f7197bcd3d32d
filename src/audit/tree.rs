//! The Merkle tree over the lines (RFC 6962 section 2): hashes, roots, proofs. Pure; the one place that knows how a root comes
//! from leaves.

use ring::digest;

/// SHA-256.
pub(super) type Hash = [u8; 32];

/// Hashes in a full tile: levels of the tree are kept by eights (C2SP tlog-tiles).
pub(super) const TILE_WIDTH: usize = 256;

/// Height of a tile.
const TILE_HEIGHT: u32 = 8;

/// How long the log is, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Entries.
    pub(super) size: u64,
    /// Stands for their contents and order.
    pub(super) root: Hash,
}

impl Head {
    /// The head of a log without entries: SHA-256 of nothing.
    pub(super) const EMPTY: Self = Self {
        size: 0,
        root: [
            0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27, 0xae, 0x41, 0xe4, 0x64,
            0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
        ],
    };
}

/// The hash of an entry.
pub(super) fn leaf_hash(line: &[u8]) -> Hash {
    hash(0, line, &[])
}

/// The hash of an inner node.
fn node_hash(left: &Hash, right: &Hash) -> Hash {
    hash(1, left, right)
}

fn hash(prefix: u8, first: &[u8], second: &[u8]) -> Hash {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&[prefix]);
    context.update(first);
    context.update(second);
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

/// 256 hashes, or the right end of a level with fewer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    /// 0 has the hashes of entries, 1 those of full tiles of level 0, and so on.
    pub(super) level: usize,
    /// Its place in the level.
    pub(super) index: u64,
    pub(super) hashes: Vec<Hash>,
}

/// A tree that grows.
#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    size: u64,
    /// Roots of the complete subtrees that the tree consists of, the largest first.
    peaks: Vec<Hash>,
    /// By level, the hashes of the tile that is not full yet.
    edge: Vec<Vec<Hash>>,
    /// Tiles that became full since they were last taken.
    full: Vec<Tile>,
}

impl Tree {
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Adds an entry's hash.
    pub(super) fn append(&mut self, leaf: Hash) {
        let mut hash = leaf;
        for height in 0..u64::BITS {
            if height % TILE_HEIGHT == 0 {
                self.put_in_tile((height / TILE_HEIGHT) as usize, hash);
            }
            match (self.size >> height) & 1 {
                0 => break,
                _ => hash = node_hash(&self.peaks.pop().unwrap_or_default(), &hash),
            }
        }
        self.peaks.push(hash);
        self.size = self.size.saturating_add(1);
    }

    fn put_in_tile(&mut self, level: usize, hash: Hash) {
        if self.edge.len() == level {
            self.edge.push(Vec::new());
        }
        let Some(edge) = self.edge.get_mut(level) else { return };
        edge.push(hash);
        if edge.len() == TILE_WIDTH {
            let hashes = std::mem::take(edge);
            // The size is still without the entry that fills the tile.
            self.full.push(Tile { level, index: tiles_in(self.size, level), hashes });
        }
    }

    /// Tiles that are full since the last call, those of lower levels first.
    pub(super) fn take_full(&mut self) -> Vec<Tile> {
        std::mem::take(&mut self.full)
    }

    /// The tiles at the right end, which are not full. Levels without one have none.
    pub(super) fn partial(&self) -> Vec<Tile> {
        let tile = |(level, hashes): (usize, &Vec<Hash>)| Tile { level, index: tiles_in(self.size, level), hashes: hashes.clone() };
        self.edge.iter().enumerate().filter(|(_, hashes)| !hashes.is_empty()).map(tile).collect()
    }

    /// Hashes at the right end of a level.
    pub(super) fn edge(&self, level: usize) -> &[Hash] {
        self.edge.get(level).map_or(&[], Vec::as_slice)
    }

    pub(super) fn head(&self) -> Head {
        let root = self.peaks.iter().rev().copied().reduce(|right, left| node_hash(&left, &right));
        root.map_or(Head::EMPTY, |root| Head { size: self.size, root })
    }
}

/// Full tiles of a level in a tree of `size` entries.
pub(super) fn tiles_in(size: u64, level: usize) -> u64 {
    let shift = (u32::try_from(level).unwrap_or(u32::MAX).saturating_add(1)).saturating_mul(TILE_HEIGHT);
    size.checked_shr(shift).unwrap_or(0)
}

/// Where the hashes of a tree are.
pub(super) trait Tiles {
    /// At least the first `width` hashes of a tile, or why they are not there.
    fn tile(&self, level: usize, index: u64, width: usize) -> Result<Vec<Hash>, String>;
}

/// The root of a complete subtree of `1 << height` leaves, the `index`th of them.
fn node(tiles: &dyn Tiles, height: u32, index: u64) -> Result<Hash, String> {
    let level = (height / TILE_HEIGHT) as usize;
    let width = 1_usize << (height % TILE_HEIGHT);
    let at = index.saturating_mul(width as u64);
    let from = usize::try_from(at % TILE_WIDTH as u64).unwrap_or(0);
    let hashes = tiles.tile(level, at / TILE_WIDTH as u64, from + width)?;
    let hashes = hashes.get(from..from + width).ok_or_else(|| format!("tile {} of level {level} is too short", at / TILE_WIDTH as u64))?;
    Ok(complete_root(hashes))
}

/// The root over a power of two of hashes.
fn complete_root(hashes: &[Hash]) -> Hash {
    match hashes {
        [] => Head::EMPTY.root,
        [one] => *one,
        more => {
            let (left, right) = more.split_at(more.len() / 2);
            node_hash(&complete_root(left), &complete_root(right))
        }
    }
}

/// The root over the leaves from `from` to before `to`; `from` is where such a subtree may begin.
fn subtree(tiles: &dyn Tiles, from: u64, to: u64) -> Result<Hash, String> {
    let count = to.saturating_sub(from);
    if count.is_power_of_two() {
        return node(tiles, count.trailing_zeros(), from / count);
    }
    let middle = from.saturating_add(split(count));
    Ok(node_hash(&subtree(tiles, from, middle)?, &subtree(tiles, middle, to)?))
}

/// The largest power of two smaller than `count`, which is at least 2.
fn split(count: u64) -> u64 {
    1 << (u64::BITS - 1).saturating_sub(count.saturating_sub(1).leading_zeros())
}

/// The root of the first `size` entries.
pub(super) fn root_at(tiles: &dyn Tiles, size: u64) -> Result<Hash, String> {
    if size == 0 { Ok(Head::EMPTY.root) } else { subtree(tiles, 0, size) }
}

/// That entry `index` is in the tree of `size` entries (RFC 6962 section 2.1.1).
pub(super) fn prove_inclusion(tiles: &dyn Tiles, index: u64, size: u64) -> Result<Vec<Hash>, String> {
    if index >= size {
        return Err(format!("entry {index} is not one of {size}"));
    }
    let mut proof = Vec::new();
    let (mut from, mut to) = (0, size);
    while to - from > 1 {
        let middle = from + split(to - from);
        if index < middle {
            proof.push(subtree(tiles, middle, to)?);
            to = middle;
        } else {
            proof.push(subtree(tiles, from, middle)?);
            from = middle;
        }
    }
    proof.reverse();
    Ok(proof)
}

/// That the tree of `old` entries is the beginning of that of `size` (RFC 6962 section 2.1.2). Empty for an old tree that is empty or
/// the same.
pub(super) fn prove_consistency(tiles: &dyn Tiles, old: u64, size: u64) -> Result<Vec<Hash>, String> {
    if old > size {
        return Err(format!("a tree of {old} entries is no beginning of one of {size}"));
    }
    if old == 0 || old == size {
        return Ok(Vec::new());
    }
    let mut proof = Vec::new();
    let (mut from, mut to) = (0, size);
    while to != old {
        let middle = from + split(to - from);
        if old <= middle {
            proof.push(subtree(tiles, middle, to)?);
            to = middle;
        } else {
            proof.push(subtree(tiles, from, middle)?);
            from = middle;
        }
    }
    if from != 0 {
        proof.push(subtree(tiles, from, to)?);
    }
    proof.reverse();
    Ok(proof)
}

/// Whether `proof` leads from the leaf to the head (RFC 9162 section 2.1.3.2).
pub(super) fn check_inclusion(proof: &[Hash], index: u64, leaf: Hash, head: Head) -> Result<(), &'static str> {
    if index >= head.size {
        return Err("the entry's index is not below the size of the tree");
    }
    let (mut at, mut last, mut hash) = (index, head.size - 1, leaf);
    for sibling in proof {
        if last == 0 {
            return Err("the inclusion proof is too long");
        }
        if at & 1 == 1 || at == last {
            hash = node_hash(sibling, &hash);
            while at & 1 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    match (last, hash == head.root) {
        (0, true) => Ok(()),
        (0, false) => Err("the inclusion proof leads to another root"),
        _ => Err("the inclusion proof is too short"),
    }
}

/// Whether `proof` shows that the log of `old` is the beginning of that of `new` (RFC 9162 section 2.1.4.2).
pub(super) fn check_consistency(proof: &[Hash], old: Head, new: Head) -> Result<(), &'static str> {
    if old.size > new.size {
        return Err("the log is shorter than before");
    }
    if old.size == 0 || old.size == new.size {
        return match (proof.is_empty(), old.size == 0 || old.root == new.root) {
            (true, true) => Ok(()),
            (true, false) => Err("two different logs of the same size"),
            (false, _) => Err("the consistency proof is too long"),
        };
    }
    // A tree that is complete is its own first hash.
    let (first, rest) = match proof.split_first() {
        _ if old.size.is_power_of_two() => (old.root, proof),
        Some((first, rest)) => (*first, rest),
        None => return Err("the consistency proof is too short"),
    };
    let (mut at, mut last) = (old.size - 1, new.size - 1);
    while at & 1 == 1 {
        at >>= 1;
        last >>= 1;
    }
    let (mut was, mut is) = (first, first);
    for sibling in rest {
        if last == 0 {
            return Err("the consistency proof is too long");
        }
        if at & 1 == 1 || at == last {
            was = node_hash(sibling, &was);
            is = node_hash(sibling, &is);
            while at & 1 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            is = node_hash(&is, sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    match (last, was == old.root, is == new.root) {
        (0, true, true) => Ok(()),
        (0, false, _) => Err("the consistency proof does not begin with the log as it was"),
        (0, true, false) => Err("the consistency proof does not lead to the log as it is"),
        _ => Err("the consistency proof is too short"),
    }
}
