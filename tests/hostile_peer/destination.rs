//! The destination end, played by hand: it takes what it is given and says what a case wants.

use std::sync::Arc;
use std::time::Duration;

use sealane::control::{MigrateRequest, MigrationView};
use sealane::identity::Credentials;
use sealane::telemetry::{ErrorClass, Report};
use sealane::transport::{Endpoint, LaneGate, LaneIo, Session};
use sealane::types::{Epoch, Incarnation, MigrationId};
use sealane::wire::{Accept, FinalDigest, Handoff, HandoffMessage, Hello, Message, Offer, RoundApplied, RoundEnd, SignedHandoff};

use crate::lab::{EVIL, Gateway, Lab, until, vm, within};
use crate::source::random;

/// A gateway that VMs are sent to.
pub struct Sink {
    endpoint: Endpoint,
    credentials: Arc<Credentials>,
    pub incarnation: Incarnation,
}

impl Sink {
    pub fn new(lab: &Lab) -> Self {
        let credentials = lab.credentials(EVIL);
        let endpoint = Endpoint::bind(lab.transport(lab.evil_port), Arc::clone(&credentials)).unwrap();
        Self { endpoint, credentials, incarnation: Incarnation(random()) }
    }

    pub async fn session(&self) -> Session {
        loop {
            if let Ok(session) = within("session", self.endpoint.accept()).await.unwrap() {
                return session;
            }
        }
    }

    /// The next session, with both greetings said. One that the gateway has given up meanwhile is passed over.
    pub async fn greeted(&self) -> (Session, Hello) {
        loop {
            let session = self.session().await;
            let hello = Message::Hello(Hello::new(self.incarnation, self.credentials.signer().public_key()));
            match (session.send(&hello).await, within("hello", session.receive()).await) {
                (Ok(()), Ok(Message::Hello(hello))) => return (session, hello),
                (Ok(()), Ok(other)) => panic!("{other:?}"),
                _ => {}
            }
        }
    }

    /// The next offer. Sessions in which the gateway looks for what became of an earlier one are dropped.
    pub async fn offered(&self) -> Taking<'_> {
        loop {
            let (session, hello) = self.greeted().await;
            match within("offer", session.receive()).await {
                Ok(Message::Offer(offer)) => {
                    return Taking { sink: self, session, hello, offer, gate: None, digest: None, round: None };
                }
                Ok(Message::Resume(_) | Message::Handoff(_)) | Err(_) => {}
                Ok(other) => panic!("{other:?}"),
            }
        }
    }

    pub fn sign(&self, message: HandoffMessage) -> SignedHandoff {
        let signature = self.credentials.signer().sign(&message.signed_bytes()).unwrap();
        SignedHandoff { message, signature }
    }
}

/// One VM on its way to us.
pub struct Taking<'a> {
    pub sink: &'a Sink,
    pub session: Session,
    hello: Hello,
    pub offer: Offer,
    gate: Option<LaneGate>,
    pub digest: Option<FinalDigest>,
    pub round: Option<RoundEnd>,
}

async fn drain(mut io: LaneIo) {
    while let Ok(Some(_)) = io.receiver.read_chunk(1 << 20).await {}
}

impl Taking<'_> {
    pub fn migration(&self) -> MigrationId {
        self.offer.migration
    }

    pub async fn say(&self, message: Message) {
        // The source may have given up already.
        let _ = self.session.send(&message).await;
    }

    /// The next message but signs of life.
    pub async fn hear(&self, what: &str) -> Message {
        loop {
            match within(what, self.session.receive()).await.unwrap_or_else(|error| panic!("{what}: {error:?}")) {
                Message::Ping | Message::AuditHead(_) | Message::AuditAnswer(_) | Message::StateChunk(_) => {}
                other => return other,
            }
        }
    }

    pub async fn accept(&mut self, lanes: u16) {
        let granted = lanes.clamp(1, self.offer.stream.lanes);
        let gate = self.session.expect_lanes(self.migration(), granted, Arc::new(|io| Box::pin(drain(io)))).unwrap();
        self.gate = Some(gate);
        self.say(Message::Accept(Accept { migration: self.migration(), lanes, policy_digest: [2; 32], bandwidth_max: None })).await;
    }

    /// Accepts and waits for the end of the first round.
    pub async fn first_round(&mut self) {
        self.accept(self.offer.stream.lanes).await;
        self.next_round().await;
    }

    pub async fn next_round(&mut self) {
        match self.hear("round end").await {
            Message::RoundEnd(end) => self.round = Some(end),
            other => panic!("{other:?}"),
        }
    }

    pub fn applied(&self) -> RoundApplied {
        let end = self.round.clone().unwrap();
        RoundApplied { migration: end.migration, round: end.round, lanes: end.lanes }
    }

    /// All memory and state is here, and FINAL was said.
    pub async fn finalised(&mut self) {
        self.first_round().await;
        loop {
            self.say(Message::RoundApplied(self.applied())).await;
            if self.round.as_ref().unwrap().last {
                break;
            }
            self.next_round().await;
        }
        match self.hear("final").await {
            Message::Handoff(SignedHandoff { message: HandoffMessage { step: Handoff::Final { digest, .. }, .. }, .. }) => {
                self.digest = Some(digest);
            }
            other => panic!("{other:?}"),
        }
    }

    pub async fn prepared(&mut self) {
        self.finalised().await;
        self.step(Handoff::Prepared { digest: self.digest.unwrap() }).await;
    }

    /// COMMIT was said.
    pub async fn committed(&mut self) {
        self.prepared().await;
        match self.hear("commit").await {
            Message::Handoff(signed) => assert_eq!(signed.message.step, Handoff::Commit { digest: self.digest.unwrap() }),
            other => panic!("{other:?}"),
        }
    }

    pub fn message(&self, step: Handoff) -> HandoffMessage {
        HandoffMessage {
            migration: self.migration(),
            uuid: self.offer.uuid,
            epoch: Epoch(self.offer.epoch.0 + 1),
            sender: self.sink.incarnation,
            receiver: self.hello.incarnation,
            // REFUSED lies behind PREPARED in a journal.
            position: if matches!(step, Handoff::Refuse { .. }) { 2 } else { 1 },
            step,
        }
    }

    pub async fn step(&self, step: Handoff) {
        self.say(Message::Handoff(self.sink.sign(self.message(step)))).await;
    }

    pub async fn refuse(&self) {
        self.step(Handoff::Refuse { class: ErrorClass::Local }).await;
    }

    pub async fn running(&self) {
        self.step(Handoff::Running).await;
    }
}

/// Asks the gateway to send VM `index` to us.
pub async fn migrate(gateway: &Gateway, index: usize, timeout: f64) -> MigrationView {
    let mut request = MigrateRequest::new(vm(index), EVIL.parse().unwrap());
    // The guests are small, and would have one.
    request.lanes = Some(2);
    request.timeout_seconds = Some(timeout);
    request.max_downtime_seconds = Some(0.5);
    within("start", gateway.client().start(&request)).await.unwrap()
}

pub async fn report(gateway: &Gateway, case: &str, migration: MigrationId) -> Report {
    let start = std::time::Instant::now();
    loop {
        if let Some(report) = gateway.client().migration(migration).await.unwrap().report {
            return report;
        }
        assert!(start.elapsed() < Duration::from_secs(100), "{case}: no report");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A whole migration to us without fault.
pub async fn takes_an_honest_vm(gateway: &mut Gateway, sink: &Sink, index: usize) {
    let name = "an honest migration afterwards";
    let view = migrate(gateway, index, 60.0).await;
    let mut taking = sink.offered().await;
    taking.committed().await;
    taking.running().await;
    let report = report(gateway, name, view.id).await;
    assert_eq!(report.error, None, "{name}");
    drop(taking);
    until(name, || gateway.beat(index).is_none().then_some(())).await;
    gateway.is_well(name, 0).await;
}
