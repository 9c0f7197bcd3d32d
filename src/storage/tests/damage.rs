//! Images of which something is missing, changed, or taken from another one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Changes one bit of one byte.
pub(super) fn flip(path: &Path, offset: u64) {
    let (file, mut byte) = (open(path), [0]);
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (offset % 8)], offset).unwrap();
}

fn bytes_at(path: &Path, offset: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    open(path).read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// A page, a zero page, a page.
fn small() -> (TempDir, PathBuf, ImageHead, GuestRam) {
    written(3, &[(0, 1), (2, 2)])
}

#[test]
fn an_image_cut_at_any_byte_or_longer_by_one_is_refused() {
    let (_directory, path, head, _) = small();
    let whole = open(&path);
    let bytes = whole.metadata().unwrap().len();
    whole.set_len(bytes + 1).unwrap();
    let ram = flat(3);
    for length in (0..bytes).rev() {
        assert!(read_head(&path).is_err(), "{}", length + 1);
        whole.set_len(length).unwrap();
        assert!(restore_image(&path, &head, &ram).is_err(), "{length}");
    }
    assert_eq!(ram.next_written(PageNumber(0)), None);
}

#[test]
fn a_bit_changed_in_any_byte_is_found() {
    let (_directory, path, head, _) = small();
    let bytes = std::fs::metadata(&path).unwrap().len();
    assert_eq!(bytes, 4 * PAGE + STATE.len() as u64 + 16);
    let ram = flat(3);
    for offset in 0..bytes {
        flip(&path, offset);
        assert!(restore_image(&path, &head, &ram).is_err(), "{offset}");
        assert_eq!(read_head(&path).is_err(), offset < PAGE, "{offset}");
        flip(&path, offset);
    }
    assert_eq!(ram.next_written(PageNumber(0)), None, "something reached guest RAM unchecked");
    restore_image(&path, &head, &ram).unwrap();
}

#[test]
fn a_byte_in_a_hole_is_found() {
    let (_directory, path, head, _) = written(3 * STRIPE_PAGES, &[(0, 1)]);
    flip(&path, PAGE + (STRIPE_PAGES + 77) * PAGE);
    let error = restore_image(&path, &head, &flat(3 * STRIPE_PAGES)).unwrap_err();
    assert_eq!(error.to_string(), format!("image `{}` is damaged: pages 512 to 1023 are not what was written", path.display()));
}

#[test]
fn stripes_that_changed_places_are_found_with_and_without_their_digests() {
    let (_directory, path, head, _) = written(2 * STRIPE_PAGES, &[(5, 1), (STRIPE_PAGES + 5, 2)]);
    let (one, other) = (PAGE + 5 * PAGE, PAGE + (STRIPE_PAGES + 5) * PAGE);
    let (first, second) = (bytes_at(&path, one, PAGE_BYTES), bytes_at(&path, other, PAGE_BYTES));
    open(&path).write_all_at(&second, one).unwrap();
    open(&path).write_all_at(&first, other).unwrap();
    let error = restore_image(&path, &head, &flat(2 * STRIPE_PAGES)).unwrap_err();
    assert!(error.to_string().contains("pages 0 to 511"), "{error}");

    let digests = PAGE + 2 * STRIPE_PAGES * PAGE + STATE.len() as u64;
    let (first, second) = (bytes_at(&path, digests, 16), bytes_at(&path, digests + 16, 16));
    open(&path).write_all_at(&[second, first].concat(), digests).unwrap();
    let error = restore_image(&path, &head, &flat(2 * STRIPE_PAGES)).unwrap_err();
    assert!(error.to_string().contains("stripe digests"), "{error}");
}

#[test]
fn parts_of_another_image_are_found() {
    let (_mine, path, head, _) = written(STRIPE_PAGES + 1, &[(5, 1), (STRIPE_PAGES, 3)]);
    let (_other, other, other_head, _) = written(STRIPE_PAGES + 1, &[(5, 2), (STRIPE_PAGES, 3)]);
    let (state, digests) = (PAGE + (STRIPE_PAGES + 1) * PAGE, PAGE + (STRIPE_PAGES + 1) * PAGE + STATE.len() as u64);
    let take = |offset, count| open(&path).write_all_at(&bytes_at(&other, offset, count), offset).unwrap();
    let refused = |why: &str| {
        let error = restore_image(&path, &head, &flat(STRIPE_PAGES + 1)).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    };
    take(PAGE + 5 * PAGE, PAGE_BYTES);
    refused("pages 0 to 511");
    take(digests, 32);
    refused("stripe digests");
    take(0, PAGE_BYTES);
    refused("final digest");
    // All of it together is the other image.
    restore_image(&path, &other_head, &flat(STRIPE_PAGES + 1)).unwrap();
    take(state, STATE.len());
    flip(&path, state);
    let error = restore_image(&path, &other_head, &flat(STRIPE_PAGES + 1)).unwrap_err();
    assert!(error.to_string().contains("device state"), "{error}");
}

#[test]
fn other_kinds_of_file_are_no_images() {
    let (directory, path, _) = place();
    for text in ["", "seal", "sealane.image/2\nand so on", &"not an image\n".repeat(1000)] {
        std::fs::write(&path, text).unwrap();
        let error = read_head(&path).unwrap_err();
        assert!(matches!(error, ImageError::Format { .. }), "{error}");
    }
    assert!(read_head(directory.path()).is_err());
}
