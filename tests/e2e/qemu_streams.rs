//! Streams that lie: between a QEMU and its gateway somebody changes them. Its guest stays where it is.
//!
//! `SEALANE_QEMU_STREAMS=100` tells every lie to both ends, and changes bits at random as well, `SEALANE_SEED` others.

use sealane::hypervisor::qemu;
use sealane::wire::ErrorClass;

use crate::between::{Between, Meddling};
use crate::forger::Forger;
use crate::gateway::{A, B};
use crate::lab::Setup;
use crate::lies::{Change, Changer, Lie, lies};
use crate::qemus::{LOOK, Qemus, rom};
use crate::random::{Random, number};

/// Every other one for each end, or all.
fn chosen(end: usize) -> Vec<Lie> {
    let all = lies(std::fs::metadata(rom().unwrap()).unwrap().len()).into_iter().enumerate();
    all.filter(|(index, _)| number("SEALANE_QEMU_STREAMS").is_some() || index % 2 == end).map(|(_, lie)| lie).collect()
}

/// One QEMU serves all of them, one after the other, and its guest goes on.
#[test]
fn a_stream_that_lies_leaves_the_guest_where_it_is() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let between = Between::put_before(&mut qemus);
    let mut wrong = Vec::new();
    let lies = chosen(0);
    for Lie { name, change, expected } in &lies {
        between.set(Meddling::Main(change.clone()));
        let said = qemus.lab.migrate(A, &[]);
        assert_eq!(said.code, 1, "{name}: {said:?}");
        said.expect_stayed(1, &[]);
        if !said.stderr.contains(expected) {
            wrong.push(format!("{name}: expected `{expected}`, got {}", said.stderr));
        }
        qemus.stays(name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let mut tried = lies.len();
    let seed = number("SEALANE_SEED").unwrap_or(1);
    let mut random = Random(seed);
    for _ in 0..number("SEALANE_QEMU_STREAMS").unwrap_or(0) {
        // In front of the first page, where everything means something.
        let (at, bit) = (usize::try_from(random.below(200)).unwrap(), u8::try_from(random.below(8)).unwrap());
        between.set(Meddling::Main(Change::Flip(at, bit)));
        let said = qemus.lab.migrate(A, &[]);
        assert_ne!(said.code, 0, "bit {bit} of byte {at}: {said:?}");
        qemus.stays(&format!("bit {bit} of byte {at}"));
        tried += 1;
    }
    println!("QEMU and streams that lie: {tried} refused");
    qemus.is_only_at(A);
    between.set(Meddling::Main(Change::Nothing));
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}

/// The same streams from a gateway that looks at nothing: the destination refuses each before it promises anything.
#[test]
fn a_source_that_sends_streams_that_lie_is_refused() {
    let Some(mut qemus) = Qemus::start(Setup::new()) else { return };
    let run = qemus.lab.gateway(A).directory().join("run");
    let between = Between::put_before(&mut qemus);
    // A whole stream, which its guest survives.
    between.set(Meddling::Main(Change::Append(b"\x02".to_vec())));
    qemus.lab.migrate(A, &[]).expect_stayed(1, &["the end of the stream"]);
    qemus.stays("a whole stream");
    let stream = between.was.lock().unwrap().clone();
    between.set(Meddling::Main(Change::Nothing));
    let (machine, ..) = qemu::inspect(&run.join("first.qmp.look"), "first", LOOK).unwrap();
    qemus.lab.gateway_mut(A).stop();

    let (forger, mut wrong) = (Forger::new(&qemus.lab, machine), Vec::new());
    let lies = chosen(1);
    for Lie { name, change, expected } in &lies {
        let mut changer = Changer::new(change.clone());
        let mut changed = changer.feed(&stream);
        if !changer.has_cut() {
            changed.extend(changer.feed(&[]));
        }
        assert_ne!(changed, stream, "{name}");
        let (class, reason) = forger.send(name, &changed);
        if !reason.contains(expected) || (!expected.is_empty() && class != ErrorClass::PeerMisbehaved) {
            wrong.push(format!("{name}: expected `{expected}`, got {class:?}: {reason}"));
        }
        qemus.stays(name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("streams that lie from a gateway that lies: {} refused", lies.len());
    let records = qemus.lab.gateway(B).audit();
    let promised = |entry: &serde_json::Value| entry["event"] == "handoff" && entry["detail"]["record"] != "refused";
    assert_eq!(records.iter().find(|entry| promised(entry)), None);
    qemus.lab.gateway_mut(A).start();
    qemus.lab.migrate(A, &[]).expect_moved();
    qemus.is_only_at(B);
}
