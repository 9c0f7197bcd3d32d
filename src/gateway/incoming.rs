//! A VM arrives: from a stranger's datagram to a running guest.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};

use crate::audit::{Entry, Event, Outcome};
use crate::config;
use crate::engine::{self, DestinationOrder, Link, Placement};
use crate::gateway::judge::Case;
use crate::gateway::registry::{Busy, Claim, Migration};
use crate::gateway::{Gateway, attach, report};
use crate::hypervisor::attach::{AttachedDestination, LaunchTemplate, LaunchVariables, Timeouts};
use crate::hypervisor::{HypervisorError, Machine, PagedDestination};
use crate::limits;
use crate::memory::MemoryLayout;
use crate::migration::Outcome as Place;
use crate::telemetry::{self, Phase, Progress};
use crate::transport::{Refused, Session};
use crate::types::Side;
use crate::wire::{ErrorClass, Failure, Message, Offer, SignedHandoff};

/// How long a peer may take to say what it wants.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// How long a VMM may take to listen.
const LAUNCH: Duration = Duration::from_secs(10);

/// An offer that is refused, in words for the source.
struct Refusal {
    class: ErrorClass,
    reason: String,
}

impl Refusal {
    fn new(class: ErrorClass, reason: impl Into<String>) -> Self {
        Self { class, reason: reason.into() }
    }
}

impl From<HypervisorError> for Refusal {
    fn from(error: HypervisorError) -> Self {
        let class = if matches!(error, HypervisorError::Incompatible { .. }) { ErrorClass::PeerIncompatible } else { ErrorClass::Local };
        Self::new(class, telemetry::chain(&error))
    }
}

/// An offer that is permitted, with everything in place for it.
struct Arrival {
    offer: Offer,
    lanes: u16,
    case: Case,
    twin: Box<dyn PagedDestination>,
    policy_digest: [u8; 32],
    policy_ids: Vec<String>,
    claim: Claim,
}

impl Gateway {
    /// Takes sessions until the endpoint is shut down.
    pub(super) async fn accept_sessions(self: Arc<Self>) {
        while let Some(session) = self.endpoint.accept().await {
            let gateway = Arc::clone(&self);
            tokio::spawn(async move {
                match session {
                    Ok(session) => gateway.serve_session(session).await,
                    Err(Refused { peer_address, peer, reason, .. }) => {
                        gateway.note_refused_session(peer.map(|peer| peer.to_string()), peer_address, telemetry::chain(&reason)).await;
                    }
                }
            });
        }
    }

    async fn serve_session(self: Arc<Self>, session: Session) {
        let (spiffe, address) = (session.peer().spiffe().clone(), session.peer_address());
        let Some(peer) = self.config.peer_of(&spiffe).cloned() else {
            session.close(Some(ErrorClass::Denied), "not a configured peer");
            self.note_refused_session(Some(spiffe.to_string()), address, "the identity is not one of the configured peers".into()).await;
            return;
        };
        let mut entry = Entry::new(Event::SessionOpened).outcome(Outcome::Done);
        entry.peer = Some(spiffe.to_string());
        entry.detail.insert("address".into(), address.to_string().into());
        entry.detail.insert("certificate_serial".into(), session.peer().serial().into());
        self.note(entry).await;
        let link = match engine::greet(session, &self.hello()).await {
            Ok(link) => link,
            Err(error) => {
                self.note_refused_session(Some(spiffe.to_string()), address, telemetry::chain(&error)).await;
                return;
            }
        };
        let first = tokio::time::timeout(FIRST_MESSAGE, link.session.receive()).await;
        match first {
            Ok(Ok(Message::Offer(offer))) => self.take_offer(link, &peer, offer).await,
            Ok(Ok(Message::Handoff(signed))) => self.take_up(link, &signed).await,
            Ok(Ok(other)) => {
                link.session.close(Some(ErrorClass::PeerMisbehaved), "expected OFFER or a handoff message");
                self.note_refused_session(
                    Some(spiffe.to_string()),
                    address,
                    format!("expected OFFER or a handoff message, got {}", other.name()),
                )
                .await;
            }
            // A probe of `sealane peers` says nothing and leaves.
            Ok(Err(_)) => {}
            Err(_) => link.session.close(Some(ErrorClass::TimedOut), "nothing was asked"),
        }
    }

    async fn take_offer(self: Arc<Self>, link: Link, peer: &config::Peer, offer: Offer) {
        let (migration, vm) = (offer.migration, offer.vm.clone());
        let started = SystemTime::now();
        match self.admit(&link, offer).await {
            Ok(arrival) => self.receive(link, peer, arrival, started).await,
            Err(refusal) => {
                let mut entry = Entry::new(Event::MigrationFinished).outcome(Outcome::Refused);
                entry.vm = Some(vm.clone());
                entry.migration = Some(migration);
                entry.peer = Some(peer.spiffe.to_string());
                entry.detail.insert("why".into(), refusal.reason.clone().into());
                entry.detail.insert("running_on".into(), "source".into());
                self.note(entry).await;
                tracing::info!(%migration, %vm, peer = %peer.spiffe, why = refusal.reason, "offer refused");
                let reason = cut(&refusal.reason);
                let _ = link.session.send(&Message::Failure(Failure { class: refusal.class, reason })).await;
                // The source closes when it has read it.
                let _ = tokio::time::timeout(Duration::from_secs(2), link.session.closed()).await;
            }
        }
    }

    /// Judges an offer and puts everything for it in place; says why not, one reason at a time.
    async fn admit(self: &Arc<Self>, link: &Link, offer: Offer) -> Result<Arrival, Refusal> {
        let (machine, memory_bytes) = self.read_offer(&offer)?;
        let case = Case {
            migration: offer.migration,
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            terms: offer.stream.clone(),
            memory_bytes,
            side: Side::Destination,
        };
        let (judge, judged, session) = (Arc::clone(&self.judge), case.clone(), Arc::clone(&link.session));
        let permit = tokio::task::spawn_blocking(move || judge.accept(&judged, &session))
            .await
            .map_err(|error| Refusal::new(ErrorClass::Bug, error.to_string()))?
            .map_err(|no| Refusal::new(no.class(), telemetry::chain(&no)))?;
        if !matches!(offer.stream.durability, crate::wire::Durability::None) {
            return Err(Refusal::new(ErrorClass::PeerIncompatible, "durability other than `none` is not built"));
        }
        let template = self
            .incoming
            .clone()
            .ok_or_else(|| Refusal::new(ErrorClass::Denied, "this gateway accepts no VMs: its configuration has no [incoming]"))?;
        let most = self.config.incoming.as_ref().map_or(0, |incoming| incoming.max_memory.bytes);
        if memory_bytes > most {
            let why = format!("VM `{}` needs {memory_bytes} bytes of memory: this gateway accepts {most}", offer.vm);
            return Err(Refusal::new(ErrorClass::PeerIncompatible, why));
        }
        if let Some(Placement::Here { .. }) = self.registry.place(&offer.vm) {
            return Err(Refusal::new(ErrorClass::Denied, format!("VM `{}` is here already", offer.vm)));
        }
        let claim =
            self.registry.claim(&offer.vm, offer.migration, self.config.limits.migrations_max as usize).map_err(|busy| match busy {
                Busy::Vm(other) => Refusal::new(ErrorClass::Denied, format!("VM `{}` is moving already, in migration `{other}`", offer.vm)),
                Busy::Full => Refusal::new(ErrorClass::Local, "too many migrations are under way"),
                Busy::Closing => Refusal::new(ErrorClass::PeerUnreachable, "the gateway is shutting down"),
            })?;
        let twin = self.build_twin(template, &offer, machine).await?;
        let lanes = offer.stream.lanes.clamp(1, limits::LANES_MAX);
        let (policy_digest, policy_ids) = (*permit.set_digest(), permit.policy_ids().to_vec());
        Ok(Arrival { offer, lanes, case, twin: Box::new(twin), policy_digest, policy_ids, claim })
    }

    /// What the offer says it is, checked against itself and against what this gateway knows of the VM.
    fn read_offer(&self, offer: &Offer) -> Result<(Machine, u64), Refusal> {
        let machine: Machine = serde_json::from_slice(&offer.machine)
            .map_err(|_| Refusal::new(ErrorClass::PeerMisbehaved, "the machine description is malformed"))?;
        let layout =
            MemoryLayout::new(offer.regions.clone()).map_err(|error| Refusal::new(ErrorClass::PeerMisbehaved, error.to_string()))?;
        // What the stream says it is must be what was judged: one name, one UUID, one layout.
        if machine.uuid != offer.uuid || machine.regions != offer.regions || machine.kind != offer.hypervisor {
            return Err(Refusal::new(ErrorClass::PeerMisbehaved, "the machine description contradicts the offer"));
        }
        let vm = self
            .config
            .vm(&offer.vm)
            .ok_or_else(|| Refusal::new(ErrorClass::Denied, format!("VM `{}` is not in this gateway's configuration", offer.vm)))?;
        if vm.uuid != offer.uuid {
            return Err(Refusal::new(ErrorClass::Denied, format!("VM `{}` has UUID `{}` here, not `{}`", vm.name, vm.uuid, offer.uuid)));
        }
        Ok((machine, layout.bytes()))
    }

    /// Starts an empty VMM and lets it say what this host lacks.
    async fn build_twin(&self, template: LaunchTemplate, offer: &Offer, machine: Machine) -> Result<AttachedDestination, Refusal> {
        let runtime = &self.config.gateway.runtime_directory;
        // A Unix socket's path has at most 107 bytes.
        let migration = offer.migration.to_string();
        let stem = format!("{}-{}", offer.vm, migration.get(..12).unwrap_or_default());
        let variables = LaunchVariables {
            socket: runtime.join(format!("{stem}.sock")),
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            memory_bytes: machine.regions.iter().map(|region| region.bytes).sum(),
            vcpus: machine.vcpus,
            serial: runtime.join(format!("{}.serial", offer.vm)),
            log: runtime.join(format!("{stem}.log")),
        };
        let built = tokio::task::spawn_blocking(move || -> Result<AttachedDestination, HypervisorError> {
            let mut vmm = template.launch(&variables, LAUNCH)?;
            AttachedDestination::prepare(&vmm.socket.clone(), variables.vm.as_str(), &machine, Timeouts::default()).inspect_err(|_| {
                // An empty twin is nobody's guest.
                let _ = vmm.kill();
            })
        });
        Ok(built.await.map_err(|error| Refusal::new(ErrorClass::Bug, error.to_string()))??)
    }

    async fn receive(self: Arc<Self>, link: Link, peer: &config::Peer, arrival: Arrival, started: SystemTime) {
        let Arrival { offer, lanes, case, twin, policy_digest, policy_ids, claim } = arrival;
        let (migration, vm, kind) = (offer.migration, offer.vm.clone(), offer.hypervisor.clone());
        let mut shown = Progress::new(migration);
        shown.phase = Phase::Memory;
        shown.memory_total_bytes = case.memory_bytes;
        let (_progress, progress) = watch::channel(shown);
        let (ended_in, ended) = watch::channel(false);
        let (commands_in, commands) = mpsc::channel(limits::COMMAND_QUEUE);
        self.registry.begin(Migration {
            id: migration,
            vm: vm.clone(),
            peer: peer.name.clone(),
            side: Side::Destination,
            started,
            progress,
            report: None,
            ended,
            commands: Some(commands_in),
        });
        let ask_commit = self.commit_question(&case, &link.session);
        let source_spiffe = link.peer.spiffe.clone();
        let order = DestinationOrder { offer, lanes, evidence: self.evidence(), link, twin, ask_commit, policy_digest, commands };
        let end = engine::run_destination(order).await;
        let mut report = report::report(migration, &vm, end.outcome, end.error.as_ref(), started);
        report.hypervisor = kind;
        report.guest_memory_bytes = case.memory_bytes;
        report.authenticated.source = Some(source_spiffe);
        report.authenticated.destination = Some(self.credentials.own_id());
        report.policy.decision = Some(report::decision(end.error.as_ref()));
        report.policy.policy_ids = policy_ids;
        report.verified = end.outcome == Some(Place::Moved) && case.terms.verify;
        report.audit.destination_head = Some(self.audit.head().text);
        self.refresh_place(&vm);
        drop(claim);
        if end.outcome.is_none() {
            self.resolve_later(migration, None);
        }
        self.finished(report, ended_in).await;
    }

    /// A peer comes back for a handoff that was interrupted.
    async fn take_up(self: Arc<Self>, link: Link, signed: &SignedHandoff) {
        let migration = signed.message.migration;
        // Our own end of it has not seen yet that its session is gone; the peer comes again.
        if self.registry.migration(migration).is_some_and(|known| known.report.is_none()) {
            link.session.close(Some(ErrorClass::Local), "this migration is still under way here");
            return;
        }
        let _turn = self.registry.resolving(migration).await;
        match engine::answer(&self.evidence(), &attach(), &link, signed).await {
            Ok(resolved) => tracing::info!(%migration, ?resolved, peer = %link.peer.spiffe, "interrupted handoff taken up"),
            Err(error) => {
                tracing::warn!(%migration, error = %telemetry::chain(&error), peer = %link.peer.spiffe, "interrupted handoff not settled")
            }
        }
        self.load_places();
        self.taken_up.notify_waiters();
    }
}

fn cut(reason: &str) -> String {
    let mut end = reason.len().min(limits::REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason[..end].to_owned()
}
