//! A gateway that is none: it has the certificate and the key of gateway A, and sends what it likes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ring::rand::{SecureRandom, SystemRandom};
use sealane::hypervisor::Machine;
use sealane::identity::{Credentials, IdentityConfig, PostQuantum, TrustDomainConfig};
use sealane::transport::{Endpoint, LaneIo, Session, TransportConfig};
use sealane::types::{Epoch, Incarnation, LaneIndex, MigrationId, SpiffeId};
use sealane::wire::{Compression, CompressionScope, Durability, ErrorClass, Hello, Message, Offer, StreamChunk, StreamEnd, StreamTerms};
use tokio::runtime::Runtime;

use crate::gateway::{A, B, Name};
use crate::guest::UUID;
use crate::lab::{Lab, TRUST_DOMAIN, VM};

pub struct Forger {
    runtime: Runtime,
    endpoint: Endpoint,
    credentials: Arc<Credentials>,
    incarnation: Incarnation,
    machine: Machine,
    address: std::net::SocketAddr,
}

const PATIENCE: Duration = Duration::from_secs(60);
/// What a parcel has at most, but for its head.
const PIECE_BYTES: usize = 200_000;

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).unwrap();
    bytes
}

fn spiffe(name: Name) -> SpiffeId {
    format!("spiffe://{TRUST_DOMAIN}/gateway/{}", name.gateway()).parse().unwrap()
}

impl Forger {
    pub fn new(lab: &Lab, machine: Machine) -> Self {
        let pki = lab.directory().join("pki");
        let file = |suffix: &str| pki.join(format!("{}-{suffix}.pem", A.gateway()));
        let (roots, crls) = (pki.join("ca-cert.pem"), vec![pki.join("crl.pem")]);
        let trust = TrustDomainConfig { domain: TRUST_DOMAIN.into(), roots, crls, intermediates: None };
        let credentials = Credentials::load(IdentityConfig {
            certificate: file("cert"),
            key: file("key"),
            signing_key: file("signing-key"),
            trust: vec![trust],
            post_quantum: PostQuantum::default(),
        });
        let credentials = credentials.unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let config = TransportConfig { lane_workers: 1, ..TransportConfig::new("127.0.0.1:0".parse().unwrap()) };
        let endpoint = runtime.block_on(async { Endpoint::bind(config, Arc::clone(&credentials)) }).unwrap();
        let address = lab.address(B).parse().unwrap();
        Self { runtime, endpoint, credentials, incarnation: Incarnation(random()), machine, address }
    }

    /// Offers the VM, and sends this as the stream of its hypervisor; what the destination says to it.
    #[track_caller]
    pub fn send(&self, case: &str, stream: &[u8]) -> (ErrorClass, String) {
        let said = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, self.attempt(case, stream)).await });
        said.unwrap_or_else(|_| panic!("{case}: no answer"))
    }

    async fn attempt(&self, case: &str, stream: &[u8]) -> (ErrorClass, String) {
        let session = self.endpoint.connect(self.address, &spiffe(B)).await.unwrap();
        let hello = Hello::new(self.incarnation, self.credentials.signer().public_key());
        session.send(&Message::Hello(hello)).await.unwrap();
        let Ok(Message::Hello(_)) = session.receive().await else { panic!("{case}: no HELLO") };
        let offer = self.offer();
        let migration = offer.migration;
        session.send(&Message::Offer(offer)).await.unwrap();
        match session.receive().await {
            Ok(Message::Accept(_)) => {}
            other => panic!("{case}: {other:?}"),
        }
        let (frames, bytes) = frames(stream);
        let lane = move |mut io: LaneIo| async move {
            for frame in frames {
                if io.sender.write(frame).await.is_err() {
                    return;
                }
            }
            // Until the session ends.
            std::future::pending::<()>().await;
        };
        let lane = session.open_lane(migration, LaneIndex(0), lane).await.unwrap();
        // It may have refused already.
        let _ = session.send(&Message::StreamEnd(StreamEnd { migration, bytes })).await;
        let verdict = verdict(case, &session).await;
        session.close(None, "it was refused");
        drop(lane);
        verdict
    }

    fn offer(&self) -> Offer {
        let stream = StreamTerms {
            lanes: 1,
            compression: Compression::None,
            compression_scope: CompressionScope::Stream,
            length_padding: false,
            durability: Durability::None,
            verify: true,
        };
        Offer {
            migration: MigrationId(random()),
            vm: VM.parse().unwrap(),
            uuid: UUID.parse().unwrap(),
            epoch: Epoch(1),
            hypervisor: self.machine.kind.clone(),
            regions: self.machine.regions.clone(),
            machine: serde_json::to_vec(&self.machine).unwrap(),
            stream,
            policy_digest: [1; 32],
        }
    }
}

/// The stream as parcels of nothing but bytes, and how long those are together.
fn frames(stream: &[u8]) -> (Vec<Bytes>, u64) {
    let (mut frames, mut offset) = (Vec::new(), 0);
    for (sequence, piece) in (0..).zip(stream.chunks(PIECE_BYTES)) {
        let parcel = [&[1], u32::try_from(piece.len()).unwrap().to_le_bytes().as_slice(), piece].concat();
        let mut frame = Vec::new();
        StreamChunk { offset, bytes: parcel.len(), codec: None, block: &parcel }.put(&mut frame, LaneIndex(0), sequence);
        offset += parcel.len() as u64;
        frames.push(frame.into());
    }
    (frames, offset)
}

async fn verdict(case: &str, session: &Session) -> (ErrorClass, String) {
    loop {
        match session.receive().await {
            Ok(Message::Failure(failure)) => return (failure.class, failure.reason),
            Ok(_) => {}
            Err(error) => panic!("{case}: it says no reason: {error}"),
        }
    }
}
