//! The source end, played by hand: everything right unless a case does otherwise.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use ring::rand::{SecureRandom, SystemRandom};
use sealane::hypervisor::PagedSource;
use sealane::hypervisor::synthetic::{SyntheticConfig, SyntheticGuest};
use sealane::identity::Credentials;
use sealane::memory::{Encoder, PageSet};
use sealane::telemetry::ErrorClass;
use sealane::transport::{Endpoint, LaneHandle, Session, TransportError};
use sealane::types::{Epoch, Incarnation, LaneIndex, MigrationId, PageNumber, Round, VmUuid};
use sealane::wire::{
    Compression, CompressionScope, Durability, FinalDigest, Handoff, HandoffMessage, Hello, LaneTotals, Message, Offer, RoundEnd,
    SignedHandoff, StateChunk, StreamTerms,
};
use tokio::sync::mpsc;

use crate::lab::{Gateway, Lab, REAL, spiffe, uuid, vm, within};

pub const LANES: u16 = 2;
/// Three stripes, so that both lanes have pages.
pub const PAGES: u64 = 1536;

pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).unwrap();
    bytes
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().try_into().unwrap()
}

/// A gateway that we are.
pub struct Evil {
    pub endpoint: Endpoint,
    pub credentials: Arc<Credentials>,
    pub incarnation: Incarnation,
    pub address: SocketAddr,
}

impl Evil {
    pub fn new(lab: &Lab, name: &str, gateway: &Gateway) -> Self {
        let credentials = lab.credentials(name);
        let endpoint = Endpoint::bind(lab.transport(0), Arc::clone(&credentials)).unwrap();
        Self { endpoint, credentials, incarnation: Incarnation(random()), address: gateway.address() }
    }

    pub fn hello(&self) -> Hello {
        Hello::new(self.incarnation, self.credentials.signer().public_key())
    }

    pub async fn connect(&self) -> Session {
        within("connect", self.endpoint.connect(self.address, &spiffe(REAL))).await.unwrap()
    }

    /// A session with both greetings said.
    pub async fn greet(&self) -> (Session, Hello) {
        let session = self.connect().await;
        session.send(&Message::Hello(self.hello())).await.unwrap();
        match within("hello", session.receive()).await.unwrap() {
            Message::Hello(hello) => (session, hello),
            other => panic!("{other:?}"),
        }
    }

    pub fn sign(&self, message: HandoffMessage) -> SignedHandoff {
        let signature = self.credentials.signer().sign(&message.signed_bytes()).unwrap();
        SignedHandoff { message, signature }
    }

    /// The beginning of a migration: a session, and a guest to offer as VM `index`.
    pub async fn attempt(&self, index: usize) -> Attempt<'_> {
        let (session, hello) = self.greet().await;
        Attempt::new(self, session, hello, index, Box::new(guest(index)))
    }

    /// The same with a guest that is already there.
    pub async fn attempt_with(&self, index: usize, guest: Box<dyn PagedSource>) -> Attempt<'_> {
        let (session, hello) = self.greet().await;
        Attempt::new(self, session, hello, index, guest)
    }
}

/// One attempt to give a VM.
pub struct Attempt<'a> {
    pub evil: &'a Evil,
    pub session: Arc<Session>,
    pub hello: Hello,
    pub guest: Box<dyn PagedSource>,
    pub offer: Offer,
    pub lanes: Vec<mpsc::Sender<Bytes>>,
    handles: Vec<LaneHandle<()>>,
    pub encoders: Vec<Encoder>,
    pub state: Vec<u8>,
    /// Every handoff message that was sent.
    pub said: Vec<SignedHandoff>,
}

pub fn guest(index: usize) -> SyntheticGuest {
    let config = SyntheticConfig { uuid: Some(uuid(index)), working_set_pages: 64, ..SyntheticConfig::new(7 + index as u64, PAGES, 1, 50) };
    let mut guest = SyntheticGuest::start("ours", &config).unwrap();
    PagedSource::pause(&mut guest).unwrap();
    guest
}

pub fn terms() -> StreamTerms {
    StreamTerms {
        lanes: LANES,
        compression: Compression::Lz4,
        compression_scope: CompressionScope::Batch,
        length_padding: false,
        durability: Durability::None,
        verify: true,
    }
}

impl<'a> Attempt<'a> {
    fn new(evil: &'a Evil, session: Session, hello: Hello, index: usize, mut guest: Box<dyn PagedSource>) -> Self {
        let machine = guest.machine().clone();
        let state = guest.save_state().unwrap();
        let offer = Offer {
            migration: MigrationId(random()),
            vm: vm(index),
            uuid: uuid(index),
            epoch: Epoch(1),
            hypervisor: machine.kind.clone(),
            regions: machine.regions.clone(),
            machine: serde_json::to_vec(&machine).unwrap(),
            stream: terms(),
            policy_digest: [1; 32],
        };
        let (lanes, handles, encoders, said) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { evil, session: Arc::new(session), hello, guest, offer, lanes, handles, encoders, state, said }
    }

    pub fn migration(&self) -> MigrationId {
        self.offer.migration
    }

    pub async fn say(&self, message: Message) {
        // The gateway may have closed already: its verdict is what a case looks at.
        let _ = self.session.send(&message).await;
    }

    pub async fn hear(&self, what: &str) -> Message {
        within(what, self.session.receive()).await.unwrap_or_else(|error| panic!("{what}: {error:?}"))
    }

    /// Offers, and sees it accepted.
    pub async fn accepted(&mut self) {
        self.say(Message::Offer(self.offer.clone())).await;
        match self.hear("accept").await {
            Message::Accept(accept) => assert_eq!((accept.migration, accept.lanes), (self.migration(), self.offer.stream.lanes)),
            other => panic!("{other:?}"),
        }
    }

    pub async fn open_lane(&mut self, lane: u16) -> Result<(), TransportError> {
        let (bytes_in, mut bytes) = mpsc::channel::<Bytes>(64);
        let task = move |mut io: sealane::transport::LaneIo| async move {
            while let Some(chunk) = bytes.recv().await {
                if io.sender.write(chunk).await.is_err() {
                    return;
                }
            }
            let _ = io.sender.finish().await;
        };
        let handle = within("lane", self.session.open_lane(self.migration(), LaneIndex(lane), task)).await?;
        self.handles.push(handle);
        self.lanes.push(bytes_in);
        self.encoders.push(Encoder::new(LaneIndex(lane), self.offer.stream.lanes, &self.offer.stream, PAGES));
        Ok(())
    }

    /// Accepted, with every lane joined.
    pub async fn joined(&mut self) {
        self.accepted().await;
        for lane in 0..self.offer.stream.lanes {
            self.open_lane(lane).await.unwrap();
        }
    }

    pub fn lane(&self, lane: usize, bytes: Vec<u8>) {
        self.lanes[lane].try_send(bytes.into()).ok();
    }

    /// Sends all pages of a round and its mark on every lane; returns the totals.
    pub fn pages(&mut self, round: u32) -> Vec<LaneTotals> {
        let pages = PageSet::full(self.guest.ram().pages());
        for lane in 0..self.encoders.len() {
            let mut bytes = Vec::new();
            let mut from = Some(PageNumber(0));
            while let Some(first) = from {
                from = self.encoders[lane].encode_frame(self.guest.ram(), Round(round), &pages, first, &mut bytes).unwrap();
            }
            self.encoders[lane].round_mark(Round(round), &mut bytes);
            self.lane(lane, bytes);
        }
        self.totals()
    }

    pub fn totals(&self) -> Vec<LaneTotals> {
        self.encoders.iter().map(Encoder::totals).collect()
    }

    pub async fn end_round(&self, round: u32, last: bool, lanes: Vec<LaneTotals>) {
        self.say(Message::RoundEnd(RoundEnd { migration: self.migration(), round: Round(round), last, lanes })).await;
    }

    pub async fn applied(&self) {
        match self.hear("applied").await {
            Message::RoundApplied(_) => {}
            other => panic!("{other:?}"),
        }
    }

    /// Up to the last round in the destination's memory.
    pub async fn sent(&mut self) {
        self.joined().await;
        let totals = self.pages(1);
        self.end_round(1, true, totals).await;
        self.applied().await;
    }

    pub async fn chunk(&self, offset: u64, total: u64, bytes: Vec<u8>) {
        self.say(Message::StateChunk(StateChunk { migration: self.migration(), offset, total, bytes })).await;
    }

    pub async fn send_state(&self) {
        self.chunk(0, self.state.len() as u64, self.state.clone()).await;
    }

    pub fn digest(&self) -> FinalDigest {
        let ram = self.guest.ram();
        let stripes: Vec<_> = sealane::memory::digest_stripes(ram, 0..sealane::memory::stripe_count(ram)).unwrap();
        FinalDigest {
            state: sha256(&self.state),
            lanes: sha256(&LaneTotals::canonical_bytes(&self.totals())),
            memory: sealane::memory::combine_digests(&stripes),
        }
    }

    pub fn message(&self, step: Handoff) -> HandoffMessage {
        HandoffMessage {
            migration: self.migration(),
            uuid: self.offer.uuid,
            epoch: self.offer.epoch.next(),
            sender: self.evil.incarnation,
            receiver: self.hello.incarnation,
            position: 1,
            step,
        }
    }

    pub async fn step(&mut self, step: Handoff) {
        let signed = self.evil.sign(self.message(step));
        self.said.push(signed.clone());
        self.say(Message::Handoff(signed)).await;
    }

    pub async fn heard_step(&self, what: &str) -> Handoff {
        loop {
            match self.hear(what).await {
                Message::Handoff(signed) => return signed.message.step,
                Message::AuditHead(_) | Message::AuditAnswer(_) => {}
                other => panic!("{what}: {other:?}"),
            }
        }
    }

    /// Up to PREPARED.
    pub async fn prepared(&mut self) {
        self.sent().await;
        self.send_state().await;
        let digest = self.digest();
        self.step(Handoff::Final { digest, lanes: LANES }).await;
        assert_eq!(self.heard_step("prepared").await, Handoff::Prepared { digest });
    }

    /// A whole migration without fault.
    pub async fn moved(&mut self) {
        self.prepared().await;
        self.step(Handoff::Commit { digest: self.digest() }).await;
        assert_eq!(self.heard_step("running").await, Handoff::Running);
        self.step(Handoff::Done).await;
        let Message::AuditHead(_) = self.hear("audit head").await else { panic!("no audit head") };
    }

    /// What the gateway finally says: the class of its FAILURE or, without one, of its close.
    pub async fn verdict(&self, case: &str) -> (ErrorClass, String) {
        verdict(case, &self.session).await
    }
}

pub async fn verdict(case: &str, session: &Session) -> (ErrorClass, String) {
    loop {
        match within(case, session.receive()).await {
            Ok(Message::Failure(failure)) => return (failure.class, failure.reason),
            Ok(_) => {}
            Err(_) => {
                let end = within(case, session.closed()).await;
                return (end.class(), end.to_string());
            }
        }
    }
}

/// The gateway takes a VM from an honest peer: the last word of every group.
pub async fn takes_an_honest_vm(gateway: &mut Gateway, evil: &Evil, index: usize, twins: usize) {
    let mut attempt = evil.attempt(index).await;
    attempt.moved().await;
    drop(attempt);
    gateway.is_well("an honest migration afterwards", twins).await;
}

/// Runs a case as the source of VM 0 and looks at what is left.
pub async fn case(gateway: &mut Gateway, evil: &Evil, name: &str, expected: ErrorClass, act: impl AsyncFnOnce(&mut Attempt<'_>)) {
    let mut attempt = evil.attempt(0).await;
    act(&mut attempt).await;
    let (class, reason) = attempt.verdict(name).await;
    assert_eq!(class, expected, "{name}: {reason}");
    let migration = attempt.migration();
    drop(attempt);
    gateway.recorded(name, migration, expected).await;
    gateway.is_well(name, 0).await;
    assert!(!gateway.handoff_records(migration).iter().any(|record| record == "run"), "{name}");
}

pub fn other_uuid() -> VmUuid {
    VmUuid([0xee; 16])
}
