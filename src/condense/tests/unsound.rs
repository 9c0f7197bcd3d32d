use super::super::{Expander, Unsound};
use super::streams::{Stream, UUID, content, expanded, grammar, parcels, whole};
use crate::limits;
use crate::types::PAGE_BYTES;

fn refused(stream: &Stream) -> Unsound {
    let at_source = parcels(&stream.bytes, 5000, 1 << 20).expect_err("the source takes it");
    // A source that looks at nothing sends it all the same.
    let mut parcels = Vec::new();
    for piece in stream.bytes.chunks(200_000) {
        let length = u32::try_from(piece.len()).unwrap();
        parcels.push([&[1], length.to_le_bytes().as_slice(), piece].concat());
    }
    let (given, ended) = expanded(&parcels);
    let at_destination = ended.expect_err("the destination takes it");
    assert_eq!(at_source.expected, at_destination.expected);
    assert!(stream.bytes.starts_with(&given));
    at_source
}

fn head(text: &[u8]) -> Stream {
    Stream::default().put(&[text])
}

fn ram() -> Stream {
    Stream::head().ram()
}

fn part() -> Stream {
    ram().part(false).page("pc.ram", 1, &content(1))
}

fn done() -> Stream {
    ram().part(true).end()
}

fn lies_about_the_vm() -> Vec<(Stream, &'static str)> {
    vec![
        (head(b"QEVM\0\0\0\x02more"), "version 3"),
        (head(b"GET / HTTP/1.1\r\n\r\n"), "version 3"),
        (head(b"QEVM\0\0\0\x03\x07\0\0\x01\x00"), "the name of a machine type"),
        (head(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"), "the name of a machine type"),
        (head(b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-9.9"), "the machine type of the VM"),
        (head(b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x01\0\0\0"), "the UUID of the VM in its configuration"),
        (head(b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x05\x12configuration/uuid\0\0\0\x01xxxxxxxxxxxxxxxx"), "the UUID of the VM, once"),
        (Stream::head().put(&[b"\x05\x12configuration/uuid\0\0\0\x01", &UUID.0]), "the UUID of the VM, once"),
        (Stream::head().put(&[b"\x05\x1aconfiguration/capabilities\0\0\0\x01\xff\0\0\0"]), "a few capabilities"),
        (Stream::head().put(&[b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram"]), "switched off"),
        (Stream::head().put(&[b"\x09what"]), "a section"),
        (Stream::head().put(&[b"\x02\0\0\0\x02more"]), "more of the section with RAM"),
        (Stream::head().put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\x01\0\0\0\x04"]), "one section with RAM"),
        (ram().ram(), "one section with RAM"),
        (Stream::head().put(&[b"\x01\0\0\0\x02\x03r\x00m\0\0\0\0\0\0\0\x04"]), "a printable name"),
        (Stream::head().put(&[b"\x08\0\x05\0\0"]), "no command"),
        (Stream::head().put(&[b"\x08\0\x07\0\x04\0\0\0\0"]), "no command"),
        (Stream::head().put(&[b"\x08\0\x0b\0\x01\0"]), "no command"),
        (Stream::head().put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"]).u64(0x1008), "the size of RAM"),
        (Stream::head().put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"]).u64(4), "the size of RAM"),
        (Stream::head().put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"]).u64((1 << 60) | 4), "the size of RAM"),
    ]
}

fn lies_about_ram_and_devices() -> Vec<(Stream, &'static str)> {
    vec![
        (sized(0x1000, &[("pc.ram", 0x2000)]), "blocks that have the size of RAM"),
        (sized(0x2000, &[("pc.ram", 0x1800)]), "blocks that have the size of RAM"),
        (sized(0x2000, &[("pc.ram", 0)]), "blocks that have the size of RAM"),
        (sized(0x2000, &[("pc.ram", 0x1000)]), "a block as large as the VM's"),
        (sized(0x4000, &[("acpi/tables", 0x3000)]), "a block as large as the VM's"),
        (sized(0x3000, &[("acpi/tables", 0x1000), ("acpi/tables", 0x1000)]), "blocks of RAM, each once"),
        (sized(0x3000, &[("somebody's", 0x1000)]), "a block of the VM"),
        (ram().part(false).u64(0x1028), "the name of a block"),
        (part().u64(0x0008).put(&[b"\x07somebod"]), "a block of RAM"),
        (part().u64((4096 * 4096) | 0x28), "a page of its block"),
        (part().u64(0xffff_ffff_ffff_f028), "a page of its block"),
        (part().u64(0x2022).put(&[b"\x01more"]), "a page of zeroes"),
        (part().u64(0x202a), "a page"),
        (part().u64(0x2204), "a page"),
        (part().u64(0x1010), "a page"),
        (part().u64(0x0200), "a page"),
        (Stream::head().put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"]).blocks().u64(0x28), "a page"),
        (part().u64(0x10).put(&[b"\x7e\0\0\0\x03more"]), "the end of the section with RAM"),
        (part().put(&[&[0; 100]]), "a page"),
        (part(), "the device sections"),
        (ram(), "the device sections"),
        (Stream::head(), "the device sections"),
        (head(b"QEVM"), "the device sections"),
        (head(b""), "the device sections"),
        (part().u64(0x2028).put(&[&[1; 4000]]), "the device sections"),
        (done().device(1, "timer", b"1").described(&[("timer", 1), ("cpu", 1)]), "the end of the section of a device"),
        (done().device(1, "timer", b"1").described(&[("cpu", 1)]), "the section of the device that is listed"),
        (done().device(1, "timer", b"1").device(2, "cpu", b"1").described(&[("timer", 1)]), "the end of the section of a device"),
        (done().put(&[b"x"]).device(1, "timer", b"1").described(&[("timer", 1)]), "the section of the device that is listed"),
        (done().device(1, "timer", b"1").put(&[b"\0\x06\0\0\0\x04{ab}"]), "a description of device sections"),
        (whole().put(&[b"\x02\0\0\0\x02"]), "the end of the stream"),
    ]
}

/// `INVARIANT(walked-first)`
#[test]
fn a_stream_that_lies_is_refused_at_both_ends() {
    for (stream, expected) in lies_about_the_vm().into_iter().chain(lies_about_ram_and_devices()) {
        let refused = refused(&stream);
        assert!(refused.expected.contains(expected), "{expected}: {refused}");
    }
}

fn sized(bytes: u64, blocks: &[(&str, u64)]) -> Stream {
    let mut stream = Stream::head().put(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"]).u64(bytes | 4);
    for (name, used) in blocks {
        stream = stream.put(&[&[u8::try_from(name.len()).unwrap()], name.as_bytes()]).u64(*used);
    }
    stream
}

#[test]
fn parcels_that_are_none_are_refused() {
    let good = parcels(&whole().bytes, 100_000, 4 << 20).unwrap().0;
    let entry = |kind: u8, number: u32, more: &[u8]| [&[kind], number.to_le_bytes().as_slice(), more].concat();
    let room = entry(7, 100, &50_u32.to_le_bytes());
    let most = u32::try_from(limits::STREAM_PAST_BYTES_MAX / PAGE_BYTES).unwrap();
    let head = Stream::head().ram().part(false).page("pc.ram", 1, &content(1)).bytes;
    let head = entry(1, u32::try_from(head.len()).unwrap(), &head);
    let cases: &[(Vec<u8>, &str)] = &[
        (vec![0; 5], "an entry of a parcel"),
        (entry(8, 1, &[0; 100]), "an entry of a parcel"),
        (vec![1, 0], "a whole entry"),
        (entry(1, 10, b"few"), "as many bytes as the entry has"),
        (entry(1, u32::MAX, b"few"), "as many bytes as the entry has"),
        (entry(2, 0, &[]), "a bounded number of pages"),
        (entry(3, u32::MAX, &[]), "a bounded number of pages"),
        (entry(3, 5, &[]), "a page of zeroes behind another page"),
        (entry(2, 1, &[1; PAGE_BYTES]), "a page where one may be"),
        (entry(4, 1, &[]), "a page that is remembered"),
        ([room.clone(), entry(4, 0, &[])].concat(), "a page that is remembered"),
        ([room.clone(), entry(5, u32::MAX, &[])].concat(), "a page that is remembered"),
        ([room.clone(), entry(6, 1, &[0; 64])].concat(), "a page that is remembered"),
        ([room.clone(), room.clone()].concat(), "bounded room for pages"),
        (entry(7, most, &1_u32.to_le_bytes()), "bounded room for pages"),
        (entry(7, u32::MAX, &u32::MAX.to_le_bytes()), "bounded room for pages"),
        ([head.clone(), room.clone()].concat(), "bounded room for pages"),
        ([head.clone(), entry(3, 1 << 16, &[])].concat(), "a page of its block"),
    ];
    for (parcel, expected) in cases {
        let mut expander = Expander::new(grammar());
        expander.begin(parcel.clone().into());
        let refused = loop {
            match expander.expand() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("taken: {expected}"),
                Err(refused) => break refused,
            }
        };
        assert!(refused.expected.contains(expected), "{expected}: {refused}");
    }
    // A parcel that is left out or comes twice is noticed, or changes the digest.
    for missing in 0..good.len() {
        let mut others = good.clone();
        others.remove(missing);
        let said = parcels(&whole().bytes, 100_000, 4 << 20).unwrap().1;
        assert_ne!(expanded(&others).1.ok(), Some(said), "without {missing}");
    }
}

/// Whatever is changed in a stream, what the destination gives its hypervisor is the beginning of what was sent, and what ends well
/// is what was sent.
#[test]
fn changed_parcels_come_to_nothing_else() {
    let stream = whole().bytes;
    let (good, said) = parcels(&stream, 100_000, 4 << 20).unwrap();
    let mut state = 7_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    let mut refused = 0;
    for _ in 0..400 {
        let mut changed = good.clone();
        let parcel = random(changed.len());
        let within = if random(2) == 0 { 300 } else { usize::MAX };
        let at = random(changed[parcel].len().min(within));
        changed[parcel][at] ^= 1 << random(8);
        let (back, ended) = expanded(&changed);
        refused += usize::from(ended.is_err());
        // How much is remembered may be another number, as long as it is enough.
        assert!(ended.ok() != Some(said) || back == stream);
    }
    assert!(refused > 50, "{refused}");
}
