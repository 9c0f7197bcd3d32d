//! Tree, tiles, notes and proofs beside other people's implementations of the same formats.

use std::collections::BTreeMap;

use ct_merkle::mem_backed_tree::MemoryBackedTree;
use ct_merkle::{ConsistencyProof, InclusionProof};
use proptest::prelude::*;
use sha2::Sha256;
use tlog_tiles::{HashReader, TileReader};

use super::*;
use crate::audit::tile::{Name, TilesOnDisk};
use crate::audit::tree::{
    Hash, Head, Tiles, Tree, check_consistency, check_inclusion, leaf_hash, prove_consistency, prove_inclusion, root_at,
};

/// A tree with all its tiles in memory.
#[derive(Default)]
struct InMemory {
    tree: Tree,
    full: BTreeMap<(usize, u64), Vec<Hash>>,
}

impl InMemory {
    fn of(leaves: u64) -> Self {
        let mut all = Self::default();
        for leaf in 0..leaves {
            all.tree.append(leaf_hash(&leaf.to_le_bytes()));
        }
        let full = all.tree.take_full();
        all.full = full.into_iter().map(|tile| ((tile.level, tile.index), tile.hashes)).collect();
        all
    }
}

impl Tiles for InMemory {
    fn tile(&self, level: usize, index: u64, _: usize) -> Result<Vec<Hash>, String> {
        Ok(self.full.get(&(level, index)).cloned().unwrap_or_else(|| self.tree.edge(level).to_vec()))
    }
}

fn other_of(leaves: u64) -> MemoryBackedTree<Sha256, Vec<u8>> {
    let mut tree = MemoryBackedTree::new();
    (0..leaves).for_each(|leaf| tree.push(leaf.to_le_bytes().to_vec()));
    tree
}

/// The other implementation's tree in the tlog crate: it stores hashes by its own numbering.
struct Stored(Vec<tlog_tiles::Hash>);

impl HashReader for Stored {
    fn read_hashes(&self, indexes: &[u64]) -> Result<Vec<tlog_tiles::Hash>, tlog_tiles::Error> {
        Ok(indexes.iter().map(|index| self.0[usize::try_from(*index).unwrap()]).collect())
    }
}

fn stored(leaves: u64) -> Stored {
    let mut stored = Stored(Vec::new());
    for leaf in 0..leaves {
        let more = tlog_tiles::stored_hashes(leaf, &leaf.to_le_bytes(), &stored).unwrap();
        stored.0.extend(more);
    }
    stored
}

fn theirs(proof: &[Hash]) -> Vec<tlog_tiles::Hash> {
    proof.iter().map(|hash| tlog_tiles::Hash(*hash)).collect()
}

#[test]
fn roots_and_proofs_are_those_of_two_other_implementations() {
    let (all, stored) = (InMemory::of(700), stored(700));
    for size in (0..=40).chain([255, 256, 257, 300, 511, 512, 513, 700]) {
        let root = root_at(&all, size).unwrap();
        assert_eq!(InMemory::of(size).tree.head(), Head { size, root });
        assert_eq!(tlog_tiles::tree_hash(size, &stored).unwrap().0, root, "root of {size}");
        let other = other_of(size);
        assert_eq!(other.root().as_bytes().as_slice(), root, "root of {size}");
        for index in (0..size).filter(|index| size <= 40 || index % 37 == 0 || *index > size - 3) {
            let proof = prove_inclusion(&all, index, size).unwrap();
            check_inclusion(&proof, index, leaf_hash(&index.to_le_bytes()), Head { size, root }).unwrap();
            assert_eq!(theirs(&proof), tlog_tiles::prove_record(size, index, &stored).unwrap(), "entry {index} of {size}");
            let proof = InclusionProof::<Sha256>::from_bytes(proof.concat());
            other.root().verify_inclusion(&index.to_le_bytes().to_vec(), index, &proof).unwrap();
        }
        for old in (1..=size).filter(|old| size <= 40 || old % 41 == 0 || old.is_power_of_two()) {
            let before = Head { size: old, root: root_at(&all, old).unwrap() };
            let proof = prove_consistency(&all, old, size).unwrap();
            check_consistency(&proof, before, Head { size, root }).unwrap();
            assert_eq!(theirs(&proof), tlog_tiles::prove_tree(size, old, &stored).unwrap(), "{old} in {size}");
            if old < size {
                let proof = ConsistencyProof::<Sha256>::try_from_bytes(proof.concat()).unwrap();
                other.root().verify_consistency(&other_of(old).root(), &proof).unwrap();
            }
        }
    }
}

proptest! {
    /// Whatever is changed of a proof, both implementations refuse it.
    #[test]
    fn a_changed_proof_is_refused(size in 2_u64..600, at in any::<u64>(), old in any::<u64>(), change in 0_usize..5, bit in 0_usize..256) {
        let all = InMemory::of(size);
        let head = all.tree.head();
        let (index, old) = (at % size, 1 + old % (size - 1));
        let spoil = |proof: &mut Vec<Hash>| {
            let place = bit % proof.len().max(1);
            match change {
                0 if !proof.is_empty() => proof[place][bit / 8] ^= 1 << (bit % 8),
                1 if !proof.is_empty() => drop(proof.remove(place)),
                2 if proof.len() > 1 => proof.swap(0, 1),
                3 => proof.push([7; 32]),
                _ => proof.insert(0, [9; 32]),
            }
        };
        let leaf = leaf_hash(&index.to_le_bytes());
        let mut proof = prove_inclusion(&all, index, size).unwrap();
        spoil(&mut proof);
        prop_assert!(check_inclusion(&proof, index, leaf, head).is_err());
        prop_assert!(tlog_tiles::check_record(&theirs(&proof), size, tlog_tiles::Hash(head.root), index, tlog_tiles::Hash(leaf)).is_err());
        let before = Head { size: old, root: root_at(&all, old).unwrap() };
        let mut proof = prove_consistency(&all, old, size).unwrap();
        spoil(&mut proof);
        prop_assert!(check_consistency(&proof, before, head).is_err());
        prop_assert!(
            tlog_tiles::check_tree(&theirs(&proof), size, tlog_tiles::Hash(head.root), old, tlog_tiles::Hash(before.root)).is_err()
        );
        // And for another entry or another tree the right one is no good either.
        let good = prove_inclusion(&all, index, size).unwrap();
        prop_assert!(check_inclusion(&good, index, leaf_hash(b"other"), head).is_err());
        prop_assert!(check_inclusion(&good, (index + 1) % size, leaf, head).is_err());
    }
}

fn verifier(kind: u8, seed: u8) -> signed_note::StandardVerifier {
    let (name, key) = (ORIGIN, TestSigner::new(seed).public_key());
    let blob = [&[kind], key.as_slice()].concat();
    let vkey = format!("{name}+{:08x}+{}", signed_note::key_id(name, &blob), note::base64(&blob));
    signed_note::StandardVerifier::new(&vkey).unwrap()
}

#[test]
fn a_checkpoint_is_a_note_for_another_implementation() {
    let head = InMemory::of(300).tree.head();
    let ours = note::sign(TestSigner::new(1).as_ref(), ORIGIN, head).unwrap();
    let note = signed_note::Note::from_bytes(ours.text.as_bytes()).unwrap();
    let (verified, unverified) = note.verify(&signed_note::VerifierList::new(vec![Box::new(verifier(1, 1))])).unwrap();
    assert_eq!((verified.len(), unverified.len()), (1, 0));
    assert!(note.verify(&signed_note::VerifierList::new(vec![Box::new(verifier(1, 2))])).is_err());
    let theirs = tlog_tiles::Checkpoint::from_bytes(note.text()).unwrap();
    assert_eq!((theirs.origin(), theirs.size(), theirs.hash().0, theirs.extension()), (ORIGIN, 300, head.root, ""));
    // A cosignature is one more line, which whoever does not know its key passes over.
    let line = note::cosign(TestSigner::new(2).as_ref(), &ours, 1_700_000_000).unwrap();
    let both = format!("{}{line}", ours.text);
    let note = signed_note::Note::from_bytes(both.as_bytes()).unwrap();
    let (verified, unverified) = note.verify(&signed_note::VerifierList::new(vec![Box::new(verifier(1, 1))])).unwrap();
    assert_eq!((verified.len(), unverified.len()), (1, 1));
    assert_eq!(note::open(&both, &TestSigner::new(1).public_key()).unwrap().head(), head);
    assert_eq!(note::cosigned_at(&both, &TestSigner::new(2).public_key()), Ok(Some(1_700_000_000)));
    assert_eq!(note::cosigned_at(&both, &TestSigner::new(1).public_key()), Ok(None));
}

/// The cosignature of the C2SP page's form, put together by hand.
#[test]
fn a_cosignature_is_over_time_and_note() {
    let ours = note::sign(TestSigner::new(1).as_ref(), ORIGIN, InMemory::of(3).tree.head()).unwrap();
    let line = note::cosign(TestSigner::new(2).as_ref(), &ours, 1_679_315_147).unwrap();
    let blob = note::unbase64(line.trim_end().rsplit(' ').next().unwrap()).unwrap();
    let body = ours.text.split_once("\n\n").unwrap().0;
    let message = format!("cosignature/v1\ntime 1679315147\n{body}\n");
    assert_eq!(blob.len(), 4 + 8 + 64);
    assert_eq!(blob[4..12], 1_679_315_147_u64.to_be_bytes());
    assert_eq!(blob[12..], TestSigner::new(2).sign(message.as_bytes()).unwrap());
    let id = [b"spiffe://dc1.example.net/gateway/gw-a\n\x04".as_slice(), &TestSigner::new(2).public_key()].concat();
    assert_eq!(blob[..4], ring::digest::digest(&ring::digest::SHA256, &id).as_ref()[..4]);
}

/// A log's directory as a client of C2SP tlog-tiles reads it.
struct Directory<'a>(&'a Path);

impl TileReader for Directory<'_> {
    fn height(&self) -> u8 {
        8
    }

    fn read_tiles(&self, tiles: &[tlog_tiles::Tile]) -> Result<Vec<Vec<u8>>, tlog_tiles::Error> {
        // The crate has the height in its paths, the C2SP page has not.
        let read = |tile: &tlog_tiles::Tile| {
            let path = self.0.join(tile.path().replacen("tile/8/", "tile/", 1));
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        Ok(tiles.iter().map(read).collect())
    }

    fn save_tiles(&self, _: &[tlog_tiles::Tile], _: &[Vec<u8>]) {}
}

#[test]
fn another_implementation_reads_checkpoint_tiles_and_entries_of_a_log() {
    let dir = written(600);
    let note = signed_note::Note::from_bytes(&std::fs::read(dir.path().join("checkpoint")).unwrap()).unwrap();
    note.verify(&signed_note::VerifierList::new(vec![Box::new(verifier(1, 1))])).unwrap();
    let head = tlog_tiles::Checkpoint::from_bytes(note.text()).unwrap();
    assert_eq!(head.size(), 601);
    let files = Directory(dir.path());
    let hashes = tlog_tiles::TileHashReader::new(head.size(), *head.hash(), &files);
    let lines = std::fs::read_to_string(segment(dir.path())).unwrap();
    let lines: Vec<&str> = lines.lines().filter(|line| !line.starts_with("{\"checkpoint\"")).collect();
    for (index, line) in lines.iter().enumerate().step_by(50) {
        let (index, leaf) = (index as u64, tlog_tiles::record_hash(line.as_bytes()));
        let proof = tlog_tiles::prove_record(head.size(), index, &hashes).unwrap();
        tlog_tiles::check_record(&proof, head.size(), *head.hash(), index, leaf).unwrap();
    }
    let mut entries = Vec::new();
    for (index, width) in [(0, 256), (1, 256), (2, 89)] {
        let bundle = std::fs::read(Name::entries(index, width).path(dir.path())).unwrap();
        let mut rest = bundle.as_slice();
        while let Some((line, behind)) = tile::take_line(rest) {
            entries.push(String::from_utf8(line.to_vec()).unwrap());
            rest = behind;
        }
        assert_eq!((rest.len(), entries.len()), (0, usize::try_from(index * 256).unwrap() + width));
    }
    assert_eq!(entries, lines);
    // And this module reads its own files the same way.
    let tiles = TilesOnDisk { dir: dir.path() };
    assert_eq!(root_at(&tiles, head.size()).unwrap(), head.hash().0);
}

#[test]
fn tiles_have_the_paths_of_the_specification() {
    let path = |name: Name| name.path(Path::new("d")).display().to_string();
    assert_eq!(path(Name::hashes(1, 1_234_067, 256)), "d/tile/1/x001/x234/067");
    assert_eq!(path(Name::hashes(0, 0, 112)), "d/tile/0/000.p/112");
    assert_eq!(path(Name::entries(273, 256)), "d/tile/entries/273");
    for (level, index, width) in [(0, 0, 256), (0, 999, 1), (3, 1000, 255), (1, 1_234_067, 256)] {
        let theirs = tlog_tiles::Tile::new(8, level, index, width, false).path().replacen("tile/8/", "d/tile/", 1);
        assert_eq!(path(Name::hashes(level.into(), index, width.try_into().unwrap())), theirs);
    }
}
