//! Both ends against each other, and hostile bytes against each; real QEMUs are in `tests/e2e/qemu_disks.rs`.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::limits;
use crate::wire::DiskChange;

fn exports() -> Vec<NbdExport> {
    ["one", "two"].map(|name| NbdExport { name: name.to_owned(), bytes: 1 << 20 }).to_vec()
}

#[tokio::test]
async fn a_client_enters_the_export_of_its_choice_and_changes_it() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let client = tokio::spawn(async move {
        assert_eq!(enter(&mut theirs, "two", true).await.unwrap(), 1 << 20);
        theirs.write_all(&request(7, DiskChange::Write, 4096, 3)).await.unwrap();
        theirs.write_all(b"abc").await.unwrap();
        theirs.write_all(&request(8, DiskChange::Zero, 0, 1 << 20)).await.unwrap();
        theirs.write_all(&request(9, DiskChange::Flush, 0, 0)).await.unwrap();
        let answers = [read_reply(&mut theirs).await.unwrap(), read_reply(&mut theirs).await.unwrap()];
        let [(8, Ok(())), (7, Err(full))] = answers else { panic!("{answers:?}") };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    });
    let exports = exports();
    assert_eq!(welcome(&mut ours, &exports).await.unwrap(), Some(1));
    let mut asked = Vec::new();
    for _ in 0..3 {
        asked.push(next_request(&mut ours, &exports[1]).await.unwrap());
    }
    let change = |cookie, change, offset, bytes, data: &[u8]| NbdAsked::Change { cookie, change, offset, bytes, data: data.to_vec() };
    assert_eq!(
        asked,
        [
            change(7, DiskChange::Write, 4096, 3, b"abc"),
            change(8, DiskChange::Zero, 0, 1 << 20, b""),
            change(9, DiskChange::Flush, 0, 0, b"")
        ]
    );
    ours.write_all(&reply(8, 0)).await.unwrap();
    ours.write_all(&reply(7, 28)).await.unwrap();
    client.await.unwrap();
    assert_eq!(next_request(&mut ours, &exports[1]).await.unwrap(), NbdAsked::Disconnect);
}

#[tokio::test]
async fn an_export_that_is_not_there_is_refused_by_name() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let serving = tokio::spawn(async move { welcome(&mut ours, &exports()).await.map_err(|error| error.kind()) });
    let refused = enter(&mut theirs, "three", true).await.unwrap_err().to_string();
    assert!(refused.contains("`three`"), "{refused}");
    drop(theirs);
    assert_eq!(serving.await.unwrap(), Err(std::io::ErrorKind::UnexpectedEof));
}

/// What a server says to bytes of a client that has greeted rightly.
async fn said_to(options: &[u8]) -> Result<Option<usize>, String> {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&3_u32.to_be_bytes()).await.unwrap();
    theirs.write_all(options).await.unwrap();
    theirs.shutdown().await.unwrap();
    let reading = tokio::spawn(async move { theirs.read_to_end(&mut Vec::new()).await });
    let said = welcome(&mut ours, &exports()).await.map_err(|error| error.to_string());
    drop(ours);
    // A server that hangs up with bytes unread resets the connection.
    let _ = reading.await.unwrap();
    said
}

fn option(kind: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

#[tokio::test]
async fn hostile_options_are_bounded_and_refused() {
    assert_eq!(said_to(&option(2, 0, b"")).await, Ok(None));
    for (options, says) in [
        (option(7, limits::NBD_OPTION_BYTES_MAX + 1, b""), "an option of"),
        (option(7, u32::MAX, b""), "an option of"),
        (b"IHAVEOPX".to_vec(), "an option: expected"),
        (option(8, 0, b"").repeat(limits::NBD_OPTIONS_MAX + 1), "more than"),
        // A name that is longer than its option, and one with facts that are missing: no, and then nothing.
        (option(7, 6, &[0xff; 6]), "end of file"),
        (option(7, 6, &[0, 0, 0, 0, 0, 9]), "end of file"),
        (option(7, 3, &[0; 3]), "end of file"),
    ] {
        let refused = said_to(&options).await.unwrap_err();
        assert!(refused.contains(says), "{refused}: {says}");
    }
}

#[tokio::test]
async fn requests_beyond_the_disk_are_refused_and_those_without_bounds_end_it() {
    let export = NbdExport { name: "one".to_owned(), bytes: 1 << 20 };
    let mut raw = request(1, DiskChange::Write, 0, 3);
    raw[6..8].copy_from_slice(&0_u16.to_be_bytes());
    for (bytes, wanted) in [
        (request(1, DiskChange::Zero, 1, 1 << 20), Some(NbdAsked::Refused { cookie: 1, error: 22 })),
        (request(2, DiskChange::Discard, u64::MAX, 1), Some(NbdAsked::Refused { cookie: 2, error: 22 })),
        (request(3, DiskChange::Zero, 0, 0), Some(NbdAsked::Refused { cookie: 3, error: 22 })),
        // A read.
        (raw, Some(NbdAsked::Refused { cookie: 1, error: 22 })),
        (request(4, DiskChange::Write, 0, limits::NBD_REQUEST_BYTES_MAX + 1), None),
        (request(5, DiskChange::Write, 0, u32::MAX), None),
        (vec![0; 28], None),
        (request(5, DiskChange::Write, 0, 4), None),
    ] {
        let got = next_request(&mut bytes.as_slice(), &export).await.ok();
        assert_eq!(got, wanted, "{bytes:x?}");
    }
}

#[tokio::test]
async fn a_server_that_says_anything_else_is_none() {
    let greeting = |flags: u16| [b"NBDMAGICIHAVEOPT".as_slice(), &flags.to_be_bytes()].concat();
    let answer = |kind: u32, reply: u32, length: u32, data: &[u8]| {
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        [magic.as_slice(), &kind.to_be_bytes(), &reply.to_be_bytes(), &length.to_be_bytes(), data].concat()
    };
    let export = |bytes: u64, flags: u16| [0_u16.to_be_bytes().as_slice(), &bytes.to_be_bytes(), &flags.to_be_bytes()].concat();
    let ack = answer(7, 1, 0, b"");
    for (said, says) in [
        (b"220 smtp ESMTP ready\r\n".to_vec(), "a greeting of NBD"),
        (greeting(0), "flags"),
        ([greeting(3), vec![0; 20]].concat(), "an answer to an option"),
        ([greeting(3), answer(7, 3, u32::MAX, b"")].concat(), "an answer of"),
        ([greeting(3), answer(6, 1, 0, b"")].concat(), "to option 6"),
        ([greeting(3), ack.clone()].concat(), "has no size"),
        ([greeting(3), answer(7, 3, 12, &export(9, 0x7)), ack.clone()].concat(), "has the flags"),
        ([greeting(3), answer(7, 3, 12, &export(9, 0x5)), ack.clone()].concat(), "has the flags"),
        ([greeting(3), answer(7, 3, 12, &export(u64::MAX, 0x45)), ack].concat(), "bytes: expected at most"),
        ([greeting(3), answer(7, 3, 0, b"").repeat(limits::NBD_OPTIONS_MAX)].concat(), "without end"),
    ] {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&said).await.unwrap();
        let refused = enter(&mut ours, "one", true).await.unwrap_err().to_string();
        assert!(refused.contains(says), "{refused}: {says}");
    }
}
