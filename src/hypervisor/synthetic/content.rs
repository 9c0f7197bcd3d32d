//! RAM content for measurements: generated from a seed, so that everybody can measure the same without an image of a guest.
//!
//! *Invariants:* `same-seed` (content, number of pages and seed decide every byte).

use super::pattern::mix;
use crate::types::{PAGE_BYTES, PageNumber};

/// What generated RAM holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// As a Linux guest that has read files and runs programs: about 39 % zero pages, 30 % of the rest are copies of others, and
    /// what remains is text, code, heap, sparse pages and compressed files.
    Realistic,
    /// Every page random: nothing to find for any codec.
    Incompressible,
    /// Every page zero, as in a guest that was just started.
    Zero,
}

/// Pages that are handed over at once, at most: 1 MiB.
const PIECE_PAGES: usize = 256;
/// Zero runs and others take turns; these are their average lengths in pages.
const ZERO_RUN: u64 = 64;
const USED_RUN: u64 = 100;
/// Inside a used run, copies and pages of their own take turns.
const COPY_RUN: u64 = 3;
const OWN_RUN: u64 = 7;
/// Consecutive pages of one kind, as of one file or one heap.
const EXTENT_PAGES: u64 = 32;

const WORDS: usize = 4096;
const SUCCESSORS: usize = 4;
const INSTRUCTIONS: usize = 512;
const SYLLABLES: &[&str] =
    &["ar", "be", "con", "de", "er", "for", "ge", "in", "lo", "ma", "ne", "or", "per", "qui", "re", "st", "ti", "un", "ver", "wa"];

type Page = [u8; PAGE_BYTES];

/// Hands every run of pages that are not zero to `put`, in order.
///
/// # Errors
/// The first error of `put`.
pub fn generate<E>(content: Content, pages: u64, seed: u64, mut put: impl FnMut(PageNumber, &[u8]) -> Result<(), E>) -> Result<(), E> {
    if content == Content::Zero {
        return Ok(());
    }
    let library = Library::new(seed);
    let mut plan = Plan { random: Random::new(seed, 0), own: 0, kind: Kind::Zero, left: 0, used_left: 0 };
    let mut piece: Vec<u8> = Vec::with_capacity(PIECE_PAGES * PAGE_BYTES);
    let mut first = 0;
    for number in 0..pages {
        let page = match content {
            Content::Realistic => plan.next().map(|id| library.page(id)),
            Content::Incompressible | Content::Zero => Some(noise(&mut Random::new(seed, number))),
        };
        if piece.is_empty() {
            first = number;
        }
        if let Some(page) = &page {
            piece.extend_from_slice(page);
        }
        if !piece.is_empty() && (page.is_none() || piece.len() == PIECE_PAGES * PAGE_BYTES) {
            put(PageNumber(first), &piece)?;
            piece.clear();
        }
    }
    if piece.is_empty() { Ok(()) } else { put(PageNumber(first), &piece) }
}

/// A generator that is as good as a measurement needs, and fast.
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: u64) -> Self {
        Self(mix(mix(seed).wrapping_add(stream)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, bound: u64) -> u64 {
        // The upper half times the bound: no division on the way of every word.
        ((self.next() >> 32) * bound) >> 32
    }

    fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap_or(0)
    }

    /// Small numbers much more often than large ones, as words and instructions are.
    fn skewed(&mut self, bound: usize) -> usize {
        let most = self.index(bound) + 1;
        let most = self.index(most) + 1;
        self.index(most)
    }

    /// A length with this average, at least 1.
    fn length(&mut self, average: u64) -> u64 {
        1 + self.below(2 * average - 1)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Zero,
    Own,
    /// From this page of their own on.
    Copy(u64),
}

/// Which page holds what, in the order of page numbers.
struct Plan {
    random: Random,
    /// Pages of their own so far; their ids are `0..own`.
    own: u64,
    kind: Kind,
    left: u64,
    used_left: u64,
}

impl Plan {
    /// The id of the content of the next page, or nothing for a zero page.
    fn next(&mut self) -> Option<u64> {
        if self.left == 0 {
            self.turn();
        }
        self.left -= 1;
        self.used_left = self.used_left.saturating_sub(1);
        match &mut self.kind {
            Kind::Zero => None,
            Kind::Own => {
                self.own += 1;
                Some(self.own - 1)
            }
            Kind::Copy(from) => {
                *from += 1;
                // Behind the last page of its own a copy begins at the first.
                Some((*from - 1) % self.own.max(1))
            }
        }
    }

    fn turn(&mut self) {
        let random = &mut self.random;
        if self.used_left == 0 && self.kind != Kind::Zero {
            (self.kind, self.left) = (Kind::Zero, random.length(ZERO_RUN));
            return;
        }
        if self.kind == Kind::Zero {
            self.used_left = random.length(USED_RUN);
        }
        let copy = self.kind == Kind::Own && self.own > 0;
        let (kind, length) =
            if copy { (Kind::Copy(random.below(self.own)), random.length(COPY_RUN)) } else { (Kind::Own, random.length(OWN_RUN)) };
        (self.kind, self.left) = (kind, length.min(self.used_left));
    }
}

/// What all pages of an image are made of.
struct Library {
    seed: u64,
    words: Vec<Vec<u8>>,
    /// What usually follows each word.
    successors: Vec<[usize; SUCCESSORS]>,
    instructions: Vec<Vec<u8>>,
}

impl Library {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed, u64::MAX);
        let word = |random: &mut Random| {
            let mut word: Vec<u8> = Vec::new();
            for _ in 0..=random.skewed(4) {
                word.extend_from_slice(SYLLABLES.get(random.index(SYLLABLES.len())).unwrap_or(&"").as_bytes());
            }
            word.push(if random.below(12) == 0 { b'\n' } else { b' ' });
            word
        };
        let words = (0..WORDS).map(|_| word(&mut random)).collect();
        let successors = (0..WORDS).map(|_| std::array::from_fn(|_| random.skewed(WORDS))).collect();
        let instruction = |random: &mut Random| {
            let length = 2 + random.index(4);
            random.next().to_le_bytes().into_iter().take(length).collect()
        };
        let instructions = (0..INSTRUCTIONS).map(|_| instruction(&mut random)).collect();
        Self { seed, words, successors, instructions }
    }

    fn page(&self, id: u64) -> Page {
        let random = &mut Random::new(self.seed, id.wrapping_add(1));
        match Random::new(!self.seed, id / EXTENT_PAGES).below(100) {
            0..20 => self.text(random),
            20..40 => self.code(random),
            40..82 => heap(self.seed, id, random),
            82..97 => sparse(random),
            _ => noise(random),
        }
    }

    fn text(&self, random: &mut Random) -> Page {
        let mut word = random.skewed(WORDS);
        filled(|put| {
            put(self.words.get(word).map_or(b" ", Vec::as_slice));
            let usual = self.successors.get(word).and_then(|next| next.get(random.skewed(SUCCESSORS)));
            word = match usual {
                Some(usual) if random.below(10) < 8 => *usual,
                _ => random.skewed(WORDS),
            };
        })
    }

    fn code(&self, random: &mut Random) -> Page {
        let mut at = random.skewed(INSTRUCTIONS);
        filled(|put| {
            put(self.instructions.get(at).map_or(b"\x90", Vec::as_slice));
            match random.below(16) {
                // An offset, which is small.
                0..2 => put(&[random.next().to_le_bytes()[0] & 0x78, 0, 0, 0]),
                // A jump target.
                2 => put(&random.next().to_le_bytes()[..2]),
                _ => {}
            }
            at = if random.below(8) < 7 { (at * 7 + random.skewed(3)) % INSTRUCTIONS } else { random.skewed(INSTRUCTIONS) };
        })
    }
}

/// Objects of 64 bytes: a pointer to a type, pointers to neighbours, counters, and room.
fn heap(seed: u64, id: u64, random: &mut Random) -> Page {
    let base = 0x7f00_0000_0000 | (mix(seed ^ (id / EXTENT_PAGES)) & 0x00ff_ff00_0000);
    filled(|put| {
        put(&(base + 0x40 * random.below(16)).to_le_bytes());
        put(&(base + 0x40 * random.below(0x800)).to_le_bytes());
        put(&random.below(256).to_le_bytes());
        put(&[0; 16]);
        put(&(random.below(4) << 32).to_le_bytes());
        put(&[0; 16]);
    })
}

/// A page of which little is used.
fn sparse(random: &mut Random) -> Page {
    filled(|put| {
        put(&random.next().to_le_bytes());
        put(&[0; 248]);
    })
}

fn noise(random: &mut Random) -> Page {
    filled(|put| put(&random.next().to_le_bytes()))
}

/// A page of what `more` puts, as long as there is room; the last piece is cut.
fn filled(mut more: impl FnMut(&mut dyn FnMut(&[u8]))) -> Page {
    let mut page = [0; PAGE_BYTES];
    let mut at = 0;
    while at < PAGE_BYTES {
        more(&mut |bytes| {
            for (into, from) in page.iter_mut().skip(at).zip(bytes) {
                *into = *from;
            }
            at += bytes.len();
        });
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn whole(content: Content, pages: u64, seed: u64) -> Vec<u8> {
        let mut ram = vec![0; usize::try_from(pages).unwrap() * PAGE_BYTES];
        generate(content, pages, seed, |first, bytes| {
            let at = usize::try_from(first.0).unwrap() * PAGE_BYTES;
            ram[at..at + bytes.len()].copy_from_slice(bytes);
            Ok::<(), ()>(())
        })
        .unwrap();
        ram
    }

    fn used(ram: &[u8]) -> Vec<&[u8]> {
        ram.chunks_exact(PAGE_BYTES).filter(|page| page.iter().any(|byte| *byte != 0)).collect()
    }

    #[test]
    fn the_seed_decides_every_byte() {
        assert_eq!(whole(Content::Realistic, 700, 1), whole(Content::Realistic, 700, 1));
        assert_ne!(whole(Content::Realistic, 700, 1), whole(Content::Realistic, 700, 2));
        // What is larger begins with what is smaller.
        assert_eq!(whole(Content::Realistic, 700, 1)[..300 * PAGE_BYTES], whole(Content::Realistic, 300, 1));
        assert_ne!(whole(Content::Incompressible, 3, 1), whole(Content::Incompressible, 3, 2));
    }

    #[test]
    fn realistic_content_has_the_shares_of_a_guest() {
        let ram = whole(Content::Realistic, 16_384, 1);
        let used = used(&ram);
        let zero = 100 - used.len() * 100 / 16_384;
        assert!((33..46).contains(&zero), "{zero} % zero");
        let unique: HashSet<&[u8]> = used.iter().copied().collect();
        let copies = 100 - unique.len() * 100 / used.len();
        assert!((25..36).contains(&copies), "{copies} % copies");
        let packed: usize = used.chunks(64).map(|batch| lz4_flex::compress(&batch.concat()).len()).sum();
        let percent = packed * 100 / (used.len() * PAGE_BYTES);
        assert!((25..37).contains(&percent), "LZ4 leaves {percent} %");
    }

    #[test]
    fn the_extremes_are_extreme() {
        assert!(used(&whole(Content::Zero, 100, 1)).is_empty());
        let ram = whole(Content::Incompressible, 512, 1);
        assert_eq!(used(&ram).into_iter().collect::<HashSet<_>>().len(), 512);
        assert!(lz4_flex::compress(&ram).len() > ram.len() * 99 / 100);
    }
}
