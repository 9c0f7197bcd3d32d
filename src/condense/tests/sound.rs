use super::super::{Condenser, Expander, Grammar, PAST_KEY_BYTES};
use super::streams::{Stream, content, expanded, grammar, parcels, whole};
use crate::limits;
use crate::types::PAGE_BYTES;

#[test]
fn a_stream_comes_out_as_it_went_in_however_it_was_cut() {
    let stream = whole().bytes;
    for piece in [5000, 100_000, 1 << 20, stream.len() - 1] {
        for past_bytes in [0, 16 * PAGE_BYTES, 4 << 20] {
            let (parcels, said) = parcels(&stream, piece, past_bytes).unwrap();
            assert!(parcels.iter().all(|parcel| !parcel.is_empty() && parcel.len() <= limits::STREAM_CHUNK_BYTES_MAX));
            let (back, found) = expanded(&parcels);
            assert!(back == stream, "in pieces of {piece}");
            assert_eq!(found.unwrap(), said);
        }
    }
}

#[test]
fn what_is_known_is_not_sent_again() {
    let stream = whole().bytes;
    let size = |past_bytes| -> usize { parcels(&stream, 100_000, past_bytes).unwrap().0.iter().map(Vec::len).sum() };
    // Of 600 pages a third is zeroes, and 133 of the others are different; then come 42 pages, three times.
    assert!(size(0) > 500 * PAGE_BYTES);
    assert!(size(4 << 20) < (133 + 2 * 42 + 8) * PAGE_BYTES, "{}", size(4 << 20) / PAGE_BYTES);
}

#[test]
fn pages_are_counted_by_what_became_of_them() {
    let mut condenser = Condenser::new(grammar(), [4 << 20, 1 << 20], Box::new([3; PAST_KEY_BYTES]));
    condenser.take_in(&whole().bytes).unwrap();
    let counts = condenser.counts();
    assert_eq!((counts.zero, counts.total()), (200, 600 + 1 + 3 * 42 + 1), "{counts:?}");
    assert!(counts.duplicate > 200 && counts.delta >= 40, "{counts:?}");
    assert_eq!(condenser.why_opaque(), None);
}

/// Each of these may be sound, so it goes through as it is, and is said.
#[test]
fn what_is_not_understood_goes_through_as_it_is() {
    let page = content(1);
    let rest = b"whatever comes behind".repeat(1000);
    let streams = [
        Stream::head().put(&[b"\x01\0\0\0\x01\x04vfio\0\0\0\0\0\0\0\x01", &rest]),
        Stream::head().put(&[b"\x04\0\0\0\x01\x0evirtio-mem-pre\0\0\0\0\0\0\0\x01", &rest]),
        Stream::head().ram().part(false).page("pc.ram", 1, &page).u64(0x2068).put(&[&rest]),
        Stream::head().ram().part(false).page("pc.ram", 1, &page).u64(0x2128).put(&[&rest]),
        Stream::head().ram().part(true).page("pc.ram", 1, &page).u64(0x10).put(&[&rest]),
        Stream::head().ram().part(true).end().device(1, "timer", b"1").put(&[b"\0"]),
        Stream::default().put(&[b"QEVM\0\0\0\x03\x01\0\0\0", &rest]),
        Stream::default().put(&[b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x05\x07unknown\0\0\0\x01", &rest]),
    ];
    for stream in streams {
        let (parcels, said) = parcels(&stream.bytes, 5000, 1 << 20).unwrap();
        let (back, found) = expanded(&parcels);
        assert!(back == stream.bytes);
        assert_eq!(found.unwrap(), said);
        let mut condenser = Condenser::new(grammar(), [0, 0], Box::new([3; PAST_KEY_BYTES]));
        let taken = condenser.take_in(&stream.bytes).unwrap();
        condenser.end(&stream.bytes[taken..]).unwrap();
        assert!(condenser.why_opaque().is_some());
    }
}

#[test]
fn a_stream_of_another_hypervisor_goes_through_as_it_is() {
    let stream = b"anything".repeat(100_000);
    let mut condenser = Condenser::new(Grammar::Opaque, [1 << 20, 0], Box::new([3; PAST_KEY_BYTES]));
    assert_eq!(condenser.take_in(&stream).unwrap(), stream.len());
    condenser.end(&[]).unwrap();
    let mut expander = Expander::new(Grammar::Opaque);
    let mut back = Vec::new();
    for parcel in condenser.parcels(true) {
        expander.begin(parcel.bytes.into());
        while let Some(bytes) = expander.expand().unwrap() {
            back.extend_from_slice(bytes);
        }
    }
    let (rest, digest) = expander.end().unwrap();
    assert!(rest.is_empty() && back == stream);
    assert_eq!(digest.finish(), condenser.digest().finish());
}

/// `INVARIANT(whole-tail)`
#[test]
fn device_sections_wait_until_all_of_them_are_there() {
    let stream = whole().bytes;
    let (devices, _) = stream.split_at(stream.len() - 200);
    let mut condenser = Condenser::new(grammar(), [0, 0], Box::new([3; PAST_KEY_BYTES]));
    condenser.take_in(devices).unwrap();
    condenser.let_tail_go().unwrap();
    let sent: Vec<u8> = condenser.parcels(true).flat_map(|parcel| parcel.bytes).collect();
    assert!(!sent.windows(5).any(|window| window == b"timer"));
    let (back, ended) = expanded(&parcels(&stream, 1 << 20, 0).unwrap().0[..1]);
    assert!(!back.windows(5).any(|window| window == b"timer") && ended.is_err());
}
