//! Images of small machines: what comes back, and what does not pass.

mod damage;
mod fault;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::head::sha256;
use super::*;
use crate::hypervisor::attach::memory_file;
use crate::limits::{MACHINE_BYTES_MAX, STATE_BYTES_MAX, STRIPE_PAGES};
use crate::memory::{GuestRam, MemoryLayout, digest_ram};
use crate::types::{Epoch, MigrationId, PAGE_BYTES, PageNumber, RamRegion, VmUuid};
use crate::wire::FinalDigest;

const PAGE: u64 = PAGE_BYTES as u64;
const STATE: &[u8] = b"registers and devices";

/// RAM of a VMM: a memory file with holes.
fn shared(layout: MemoryLayout) -> GuestRam {
    GuestRam::map(memory_file(layout.bytes()).unwrap(), layout).unwrap()
}

fn flat(pages: u64) -> GuestRam {
    shared(MemoryLayout::flat(pages).unwrap())
}

/// The bytes of a page that no other page has.
fn page_of(seed: u64) -> Vec<u8> {
    (0..PAGE / 8).flat_map(|word| (seed << 16 | word | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

fn head_of(ram: &GuestRam, state: &[u8]) -> ImageHead {
    ImageHead {
        migration: MigrationId([1; 16]),
        vm: "web".parse().unwrap(),
        uuid: VmUuid([2; 16]),
        epoch: Epoch(3),
        digest: FinalDigest { state: sha256(state), lanes: [4; 32], memory: digest_ram(ram).unwrap() },
        machine: br#"{"kind":"image"}"#.to_vec(),
    }
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(ram.layout().bytes()).unwrap()];
    ram.read_written(PageNumber(0), &mut bytes).unwrap();
    bytes
}

/// A directory, where an image goes in it, and the temporary file beside it.
fn place() -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (path, temporary) = (directory.path().join("web.image"), directory.path().join("web.image.tmp"));
    (directory, path, temporary)
}

/// RAM with some pages written, and its image.
fn written(pages: u64, seeds: &[(u64, u64)]) -> (TempDir, PathBuf, ImageHead, GuestRam) {
    let (directory, path, _) = place();
    let ram = flat(pages);
    for (page, seed) in seeds {
        ram.write(PageNumber(*page), &page_of(*seed)).unwrap();
    }
    let head = head_of(&ram, STATE);
    write_image(&path, &head, &ram, STATE).unwrap();
    (directory, path, head, ram)
}

/// What one page of a guest is.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Hole,
    Zero,
    Same,
    Own,
}

fn kinds() -> impl Strategy<Value = Vec<(Kind, usize)>> {
    let kind = prop_oneof![2 => Just(Kind::Hole), 1 => Just(Kind::Zero), 1 => Just(Kind::Same), 2 => Just(Kind::Own)];
    proptest::collection::vec((kind, prop_oneof![1..4usize, 1..700usize]), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_a_guest_holds_comes_back(runs in kinds(), cut: proptest::sample::Index, state in proptest::collection::vec(any::<u8>(), 0..9000), anonymous: bool) {
        let pages: Vec<Kind> = runs.into_iter().flat_map(|(kind, count)| std::iter::repeat_n(kind, count)).collect();
        let low = 1 + cut.index(pages.len()) as u64;
        let mut regions = vec![RamRegion { guest_base: 0, bytes: low * PAGE }];
        if pages.len() as u64 > low {
            regions.push(RamRegion { guest_base: 1 << 32, bytes: (pages.len() as u64 - low) * PAGE });
        }
        let layout = MemoryLayout::new(regions).unwrap();
        let ram = if anonymous { GuestRam::anonymous(layout.clone()).unwrap() } else { shared(layout.clone()) };
        for (number, kind) in (0..).zip(&pages) {
            match kind {
                Kind::Hole => {}
                Kind::Zero => ram.write(PageNumber(number), &[0; PAGE_BYTES]).unwrap(),
                Kind::Same => ram.write(PageNumber(number), &page_of(0)).unwrap(),
                Kind::Own => ram.write(PageNumber(number), &page_of(number)).unwrap(),
            }
        }
        let head = head_of(&ram, &state);
        let (_directory, path, _) = place();
        write_image(&path, &head, &ram, &state).unwrap();
        prop_assert_eq!(read_head(&path).unwrap(), Some(head.clone()));
        let back = shared(layout);
        prop_assert_eq!(restore_image(&path, &head, &back).unwrap(), state);
        prop_assert!(contents(&back) == contents(&ram));
    }
}

#[test]
fn zero_pages_and_holes_take_no_space_anywhere() {
    let pages = 6 * STRIPE_PAGES;
    let guest = || {
        let ram = flat(pages);
        for page in 0..STRIPE_PAGES {
            ram.write(PageNumber(page), &[0; PAGE_BYTES]).unwrap();
        }
        for page in [3 * STRIPE_PAGES + 100, pages - 1] {
            ram.write(PageNumber(page), &page_of(page)).unwrap();
        }
        ram
    };
    // Digesting reads along next to written pages, so that is done to another one.
    let (ram, head) = (guest(), head_of(&guest(), STATE));
    let (_directory, path, _) = place();
    write_image(&path, &head, &ram, STATE).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.len() > pages * PAGE);
    assert!(metadata.blocks() * 512 <= 16 * PAGE, "{} bytes on disk", metadata.blocks() * 512);
    assert_eq!(ram.next_written(PageNumber(STRIPE_PAGES)), Some(PageNumber(3 * STRIPE_PAGES + 100)), "writing an image filled a hole");
    let back = flat(pages);
    restore_image(&path, &head, &back).unwrap();
    let first = back.next_written(PageNumber(0)).unwrap().0;
    assert!((3 * STRIPE_PAGES + 84..=3 * STRIPE_PAGES + 100).contains(&first), "{first}");
}

#[test]
fn an_image_is_for_its_owner_only() {
    let (_directory, path, ..) = written(2, &[(0, 1)]);
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn no_file_is_no_image() {
    let (_directory, path, _) = place();
    assert_eq!(read_head(&path).unwrap(), None);
    let ram = flat(1);
    let error = restore_image(&path, &head_of(&ram, STATE), &ram).unwrap_err();
    assert!(matches!(&error, ImageError::File { what: "open", source, .. } if source.kind() == std::io::ErrorKind::NotFound), "{error}");
    remove_image(&path).unwrap();
    remove_image(&path.with_file_name("nowhere").join("web.image")).unwrap();
    std::fs::create_dir(&path).unwrap();
    remove_image(&path).unwrap_err();
}

#[test]
fn an_image_of_something_else_is_refused_by_name() {
    type Change = fn(&mut ImageHead);
    let (_directory, path, head, _) = written(2, &[(0, 1)]);
    let cases: [(&str, Change); 8] = [
        ("migration", |head| head.migration = MigrationId([9; 16])),
        ("UUID", |head| head.uuid = VmUuid([9; 16])),
        ("VM", |head| head.vm = "db".parse().unwrap()),
        ("epoch", |head| head.epoch = Epoch(4)),
        ("final digest", |head| head.digest.state = [0; 32]),
        ("final digest", |head| head.digest.lanes = [0; 32]),
        ("final digest", |head| head.digest.memory = 0),
        ("machine", |head| head.machine.push(b' ')),
    ];
    for (expected, change) in cases {
        let mut asked = head.clone();
        change(&mut asked);
        let ram = flat(2);
        let error = restore_image(&path, &asked, &ram).unwrap_err();
        assert!(matches!(error, ImageError::Other { what, .. } if what == expected), "{error}");
        assert_eq!(ram.next_written(PageNumber(0)), None);
    }
    for pages in [1, 3] {
        let error = restore_image(&path, &head, &flat(pages)).unwrap_err();
        assert!(matches!(error, ImageError::Other { what: "pages", .. }), "{error}");
    }
}

#[test]
fn ram_that_was_not_zero_is_found_out() {
    let (_directory, path, head, _) = written(3, &[(0, 1)]);
    let ram = flat(3);
    ram.write(PageNumber(2), &page_of(7)).unwrap();
    let error = restore_image(&path, &head, &ram).unwrap_err();
    assert!(matches!(error, ImageError::Digest { what: "restored guest memory", .. }), "{error}");
}

#[test]
fn nothing_is_written_that_the_source_did_not_sign() {
    let (_directory, path, temporary) = place();
    let ram = flat(3);
    ram.write(PageNumber(1), &page_of(1)).unwrap();
    let head = head_of(&ram, STATE);
    ram.write(PageNumber(1), &page_of(2)).unwrap();
    let error = write_image(&path, &head, &ram, STATE).unwrap_err();
    assert!(matches!(error, ImageError::Digest { what: "guest memory", .. }), "{error}");
    let error = write_image(&path, &head_of(&ram, STATE), &ram, b"another state").unwrap_err();
    assert!(matches!(error, ImageError::Digest { what: "device state", .. }), "{error}");
    assert!(!path.exists() && !temporary.exists());
}

#[test]
fn memory_is_checked_also_when_the_two_sides_did_not_compare_it() {
    let (_directory, path, _) = place();
    let ram = flat(3);
    ram.write(PageNumber(1), &page_of(1)).unwrap();
    let mut head = head_of(&ram, STATE);
    head.digest.memory = 0;
    write_image(&path, &head, &ram, STATE).unwrap();
    let back = flat(3);
    restore_image(&path, &head, &back).unwrap();
    assert!(contents(&back) == contents(&ram));
    damage::flip(&path, 2 * PAGE + 5);
    restore_image(&path, &head, &flat(3)).unwrap_err();
}

#[test]
fn what_is_too_large_is_refused_before_anything_is_written() {
    let (_directory, path, temporary) = place();
    let ram = flat(1);
    let state = vec![0; STATE_BYTES_MAX + 1];
    let error = write_image(&path, &head_of(&ram, &state), &ram, &state).unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { what: "device state", .. }), "{error}");
    let head = ImageHead { machine: vec![b' '; MACHINE_BYTES_MAX + 1], ..head_of(&ram, STATE) };
    let error = write_image(&path, &head, &ram, STATE).unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { what: "machine description", .. }), "{error}");
    assert!(!path.exists() && !temporary.exists());
}

#[test]
fn an_image_of_the_same_migration_is_replaced_and_any_other_file_kept() {
    let (_directory, path, head, ram) = written(2, &[(0, 1)]);
    ram.write(PageNumber(1), &page_of(2)).unwrap();
    let newer = head_of(&ram, b"newer");
    write_image(&path, &newer, &ram, b"newer").unwrap();
    assert_eq!(restore_image(&path, &newer, &flat(2)).unwrap(), b"newer");
    restore_image(&path, &head, &flat(2)).unwrap_err();

    let other = ImageHead { migration: MigrationId([9; 16]), ..newer.clone() };
    let error = write_image(&path, &other, &ram, b"newer").unwrap_err();
    assert!(matches!(error, ImageError::Occupied { found, .. } if found == newer.migration), "{error}");
    assert_eq!(read_head(&path).unwrap(), Some(newer.clone()));

    std::fs::write(&path, "something that somebody wants to keep").unwrap();
    let error = write_image(&path, &newer, &ram, b"newer").unwrap_err();
    assert!(matches!(error, ImageError::Format { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "something that somebody wants to keep");
}

#[test]
fn what_a_crash_left_half_written_is_ignored_and_removed() {
    let (_directory, path, temporary) = place();
    std::fs::write(&temporary, "half").unwrap();
    assert_eq!(read_head(&path).unwrap(), None);
    let ram = flat(1);
    let head = head_of(&ram, STATE);
    write_image(&path, &head, &ram, STATE).unwrap();
    assert!(!temporary.exists());
    std::fs::write(&temporary, "half").unwrap();
    assert_eq!(read_head(&path).unwrap(), Some(head));
    remove_image(&path).unwrap();
    assert!(!temporary.exists() && !path.exists());
    std::fs::write(&temporary, "half").unwrap();
    remove_image(&path).unwrap();
    assert!(!temporary.exists());
}

#[test]
fn links_are_neither_followed_nor_written_through() {
    let (directory, path, head, ram) = written(1, &[(0, 1)]);
    let victim = directory.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let elsewhere = directory.path().join("link.image");
    std::os::unix::fs::symlink(&path, &elsewhere).unwrap();
    for error in [read_head(&elsewhere).unwrap_err(), write_image(&elsewhere, &head, &ram, STATE).unwrap_err()] {
        assert!(matches!(error, ImageError::File { what: "open", .. }), "{error}");
    }
    remove_image(&elsewhere).unwrap();
    assert_eq!(read_head(&path).unwrap(), Some(head.clone()));
    std::os::unix::fs::symlink(&victim, directory.path().join("web.image.tmp")).unwrap();
    write_image(&path, &head, &ram, STATE).unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    assert!(path.symlink_metadata().unwrap().is_file());
}
