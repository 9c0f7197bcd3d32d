use std::collections::HashSet;
use std::sync::Mutex;
use std::thread::ThreadId;

use bytes::Bytes;
use tokio::sync::mpsc;
use xxhash_rust::xxh3::Xxh3;

use super::link::Link;
use super::*;
use crate::transport::{LaneGate, LaneHandler, LaneIo, TransportError};
use crate::types::LaneIndex;
use crate::wire::ErrorClass;

/// What one lane carried, at one end.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Carried {
    lane: LaneIndex,
    bytes: u64,
    digest: u128,
}

/// Sends `chunks` of 64 KiB that differ by lane and place.
async fn send(mut io: LaneIo, chunks: u64, mut after: impl FnMut(u64)) -> Result<(Carried, ThreadId), TransportError> {
    let mut digest = Xxh3::new();
    for n in 0..chunks {
        let mut chunk = vec![u8::try_from(io.lane.0).unwrap(); 64 * 1024];
        chunk[..8].copy_from_slice(&n.to_le_bytes());
        digest.update(&chunk);
        io.sender.write(Bytes::from(chunk)).await?;
        after(n);
    }
    io.sender.finish().await?;
    let carried = Carried { lane: io.lane, bytes: io.sender.sent_bytes(), digest: digest.digest128() };
    Ok((carried, std::thread::current().id()))
}

async fn receive(mut io: LaneIo) -> Result<(Carried, ThreadId), TransportError> {
    let mut digest = Xxh3::new();
    while let Some(bytes) = io.receiver.read_chunk(1 << 20).await? {
        digest.update(&bytes);
    }
    let carried = Carried { lane: io.lane, bytes: io.receiver.received_bytes(), digest: digest.digest128() };
    Ok((carried, std::thread::current().id()))
}

pub(super) async fn drain(mut io: LaneIo) {
    while let Ok(Some(_)) = io.receiver.read_chunk(1 << 20).await {}
}

pub(super) async fn send_forever(mut io: LaneIo) {
    while io.sender.write(Bytes::from_static(&[7; 4096])).await.is_ok() {}
}

/// Waits until `lanes` lanes are in: the source cannot tell, since a join has no answer.
pub(super) async fn joined(gate: &LaneGate, lanes: usize) {
    within(async {
        while gate.joined() < lanes {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

type Received = mpsc::Receiver<Result<(Carried, ThreadId), TransportError>>;

fn receiving() -> (LaneHandler, Received) {
    let (sender, received) = mpsc::channel(16);
    let handler: LaneHandler = Arc::new(move |io| {
        let sender = sender.clone();
        Box::pin(async move {
            let _ = sender.send(receive(io).await).await;
        })
    });
    (handler, received)
}

#[tokio::test(flavor = "multi_thread")]
async fn four_lanes_carry_their_bytes_intact_on_threads_of_their_own() {
    let pair = Pair::new(TransportConfig { lane_workers: 4, ..config() }).await;
    let (handler, mut received) = receiving();
    let gate = pair.theirs.expect_lanes(MIGRATION, 4, handler).unwrap();
    let mut handles = Vec::new();
    for lane in 0..4 {
        handles.push(pair.ours.open_lane(MIGRATION, LaneIndex(lane), |io| send(io, 1024, |_| ())).await.unwrap());
    }
    let (mut sent, mut arrived, mut threads) = (Vec::new(), Vec::new(), HashSet::new());
    for handle in handles {
        let (carried, thread) = within(handle.join()).await.unwrap().unwrap();
        sent.push(carried);
        threads.insert(thread);
    }
    for _ in 0..4 {
        let (carried, thread) = within(received.recv()).await.unwrap().unwrap();
        arrived.push(carried);
        threads.insert(thread);
    }
    arrived.sort_by_key(|carried| carried.lane);
    assert_eq!(sent, arrived);
    assert!(sent.iter().all(|carried| carried.bytes == 64 << 20));
    assert_eq!(threads.len(), 8, "a thread for each end of each lane");
    assert_eq!(gate.joined(), 4);
    assert!(gate.stats().iter().all(|(_, stats)| stats.received_bytes > 64 << 20 && stats.mtu_bytes >= 1200));
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_and_session_keep_their_threads_when_the_client_gets_another_address() {
    let mut link = None;
    let workers = TransportConfig { lane_workers: 3, ..config() };
    let pair = Pair::through(workers, |listener| link.insert(Link::to(listener)).address).await;
    let link = link.unwrap();
    let (handler, mut received) = receiving();
    let gate = pair.theirs.expect_lanes(MIGRATION, 3, handler).unwrap();
    let before = pair.theirs.peer_address();
    let mut handles = Vec::new();
    let go = tokio::sync::watch::Sender::new(false);
    for lane in 0..3 {
        let renumber = link.clone();
        let mut went = go.subscribe();
        let task = move |io: LaneIo| async move {
            // QUIC takes no new address before the handshake is over.
            went.wait_for(|go| *go).await.unwrap();
            let after = move |n| {
                if n % 12 == 11 {
                    renumber.renumber();
                }
            };
            send(io, 48, after).await
        };
        handles.push(pair.ours.open_lane(MIGRATION, LaneIndex(lane), task).await.unwrap());
    }
    joined(&gate, 3).await;
    go.send_replace(true);
    let mut sent = Vec::new();
    for handle in handles {
        sent.push(within(handle.join()).await.unwrap().unwrap().0);
    }
    let (mut arrived, mut threads) = (Vec::new(), HashSet::new());
    for _ in 0..3 {
        let (carried, thread) = within(received.recv()).await.unwrap().unwrap();
        arrived.push(carried);
        threads.insert(thread);
    }
    arrived.sort_by_key(|carried| carried.lane);
    assert_eq!(sent, arrived);
    assert_eq!(threads.len(), 3);
    pair.ours.send(&Message::Ping).await.unwrap();
    assert_eq!(within(pair.theirs.receive()).await.unwrap(), Message::Ping);
    assert_ne!(pair.theirs.peer_address(), before, "the address has not changed, so nothing was tested");
    link.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_reports_bytes_in_both_directions_and_a_clean_end() {
    let pair = Pair::new(config()).await;
    let handler: LaneHandler = Arc::new(|mut io| {
        Box::pin(async move {
            let mut word = [0; 4];
            while io.receiver.read_exact(&mut word).await.unwrap() {
                io.sender.write_chunks(&mut [Bytes::copy_from_slice(&word), Bytes::from_static(b"!")]).await.unwrap();
            }
            // The gate may be gone before the last acknowledgement.
            let _ = io.sender.finish().await;
        })
    });
    let _gate = pair.theirs.expect_lanes(MIGRATION, 1, handler).unwrap();
    let lane = pair.ours.open_lane(MIGRATION, LaneIndex(0), |mut io| async move {
        let mut answer = [0; 5];
        for word in [b"page", b"zero"] {
            io.sender.write(Bytes::copy_from_slice(word)).await.unwrap();
            assert!(io.receiver.read_exact(&mut answer).await.unwrap());
            assert_eq!((&answer[..4], answer[4]), (word.as_slice(), b'!'));
        }
        io.sender.finish().await.unwrap();
        assert!(!io.receiver.read_exact(&mut answer).await.unwrap(), "a clean end");
        (io.sender.sent_bytes(), io.receiver.received_bytes())
    });
    assert_eq!(within(within(lane).await.unwrap().join()).await.unwrap(), (8, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_either_end_of_a_lane_ends_the_other_with_its_reason() {
    let pair = Pair::new(config()).await;
    let ends = Arc::new(Mutex::new(Vec::new()));
    let (ended, mut end) = mpsc::channel(4);
    let handler: LaneHandler = Arc::new(move |mut io| {
        let ended = ended.clone();
        Box::pin(async move {
            let error = loop {
                if let Err(error) = io.receiver.read_chunk(1 << 20).await {
                    break error;
                }
            };
            let _ = ended.send(error.class()).await;
        })
    });
    let gate = pair.theirs.expect_lanes(MIGRATION, 2, handler).unwrap();
    let given_up = pair.ours.open_lane(MIGRATION, LaneIndex(0), send_forever).await.unwrap();
    let task_ends = Arc::clone(&ends);
    let kept = pair.ours.open_lane(MIGRATION, LaneIndex(1), move |mut io| async move {
        let error = loop {
            if let Err(error) = io.sender.write(Bytes::from_static(&[7; 4096])).await {
                break error;
            }
        };
        task_ends.lock().unwrap().push(error.class());
    });
    let kept = kept.await.unwrap();
    joined(&gate, 2).await;
    drop(given_up);
    assert_eq!(within(end.recv()).await, Some(ErrorClass::Cancelled));
    gate.close(ErrorClass::NotConverged, "the guest is too fast");
    within(kept.join()).await.unwrap();
    assert_eq!(*ends.lock().unwrap(), [ErrorClass::NotConverged]);
}
