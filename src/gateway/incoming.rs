//! A VM arrives: from a stranger's datagram to a running guest.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use crate::audit::{Entry, Event, Outcome};
use crate::config;
use crate::engine::{self, Command, DestinationEnd, DestinationOrder, Link, Placement, Return};
use crate::gateway::disks::{self, SOCKET};
use crate::gateway::judge::{Case, DisksAsked};
use crate::gateway::kept::{PROGRESS, twin_file};
use crate::gateway::machine::check_machine;
use crate::gateway::registry::{Busy, Claim, Migration};
use crate::gateway::twins::{Leavings, Twin, end_twin};
use crate::gateway::{Gateway, put_class, report};
use crate::hypervisor::qemu::QEMU_KIND;
use crate::hypervisor::{HypervisorError, LaunchedVmm, Machine};
use crate::limits;
use crate::memory::MemoryLayout;
use crate::migration::Outcome as Place;
use crate::policy::{Accept, Permit};
use crate::storage::LaidDisks;
use crate::telemetry::{self, Phase, Progress, Report};
use crate::transport::{Refused, Session};
use crate::types::{MigrationId, Round, Side, SpiffeId};
use crate::wire::{ErrorClass, Failure, LaneStanding, Message, Offer, Resume, Resumed, SignedHandoff};

/// How long the source may take to read why it is refused.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// An offer that is refused, in words for the source.
pub(super) struct Refusal {
    pub(super) class: ErrorClass,
    pub(super) reason: String,
}

impl Refusal {
    pub(super) fn new(class: ErrorClass, reason: impl Into<String>) -> Self {
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
pub(super) struct Arrival {
    pub(super) offer: Offer,
    pub(super) lanes: u16,
    pub(super) case: Case,
    pub(super) twin: Twin,
    pub(super) leavings: Leavings,
    /// Files that were made for its disks.
    pub(super) laid: Option<LaidDisks>,
    /// Our child, unless an earlier gateway started it.
    pub(super) vmm: Option<LaunchedVmm>,
    pub(super) policy_digest: [u8; 32],
    pub(super) policy_ids: Vec<String>,
    pub(super) claim: Claim,
}

fn used_before(migration: MigrationId) -> Refusal {
    Refusal::new(ErrorClass::PeerMisbehaved, format!("migration `{migration}` was there before: an id is used once"))
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
                        let who = peer.clone().filter(|peer| gateway.config.peer_of(peer).is_some());
                        // Taken also where it is not recorded, or it would count as another one.
                        let refusal = reason.verifiers_words().and_then(|words| gateway.credentials.take_refusal(words));
                        if gateway.crowd.attempt(&who, Instant::now()) {
                            let peer = peer.map(|peer| peer.to_string());
                            gateway.note_refused_handshake(peer, peer_address, &reason, refusal).await;
                        }
                    }
                }
            });
        }
    }

    async fn serve_session(self: Arc<Self>, session: Session) {
        let (spiffe, address) = (session.peer().spiffe().clone(), session.peer_address());
        let Some(peer) = self.config.peer_of(&spiffe).cloned() else {
            if self.crowd.attempt(&None, Instant::now()) {
                let why = "the identity is not one of the configured peers".into();
                self.note_refused_session(Some(spiffe.to_string()), address, ErrorClass::Denied, why).await;
            }
            session.close(Some(ErrorClass::Denied), "not a configured peer");
            return;
        };
        let Some(_seat) = self.crowd.sit(&Some(spiffe.clone()), Instant::now()) else {
            session.close(Some(ErrorClass::PeerBusy), "too many sessions at once or in a row");
            return;
        };
        let mut entry = Entry::new(Event::SessionOpened).outcome(Outcome::Done);
        entry.peer = Some(spiffe.to_string());
        entry.detail.insert("address".into(), address.to_string().into());
        entry.detail.insert("certificate_serial".into(), session.peer().serial().into());
        let channel = session.channel();
        entry.detail.insert("key_exchange".into(), channel.key_exchange.into());
        entry.detail.insert("cipher_suite".into(), channel.cipher_suite.into());
        self.note(entry).await;
        let link = match engine::greet(session, &self.hello()).await {
            Ok(link) => link,
            Err(error) => {
                self.note_refused_session(Some(spiffe.to_string()), address, error.class(), telemetry::chain(&error)).await;
                return;
            }
        };
        let first = tokio::time::timeout(limits::GREETING_WITHIN, link.session.receive()).await;
        match first {
            Ok(Ok(message)) => self.begin_or_go_on(link, &peer, message).await,
            Ok(Err(error)) if error.class() == ErrorClass::PeerMisbehaved => {
                self.note_refused_session(Some(spiffe.to_string()), address, error.class(), telemetry::chain(&error)).await;
            }
            // A probe of `sealane peers` says nothing and leaves.
            Ok(Err(_)) => {}
            Err(_) => link.session.close(Some(ErrorClass::TimedOut), "nothing was asked"),
        }
    }

    /// What a peer comes for: a new migration, or one that lost its session.
    async fn begin_or_go_on(self: Arc<Self>, link: Link, peer: &config::Peer, first: Message) {
        let Some((link, first)) = self.hand_over(link, first).await else { return };
        let Some(link) = Arc::clone(&self).resume_kept(link, &first).await else { return };
        match first {
            Message::Offer(offer) => self.take_offer(link, peer, offer).await,
            Message::Handoff(signed) => self.take_up(link, &signed).await,
            Message::Resume(resume) => self.take_up_later(link, &resume).await,
            other => {
                let (expected, address) = ("expected OFFER, RESUME or a handoff message", link.session.peer_address());
                let why = format!("{expected}, got {}", other.name());
                self.note_refused_session(Some(peer.spiffe.to_string()), address, ErrorClass::PeerMisbehaved, why).await;
                link.session.close(Some(ErrorClass::PeerMisbehaved), expected);
            }
        }
    }

    /// Gives a session to the migration under way that it is about; back comes one that is about none.
    async fn hand_over(&self, link: Link, first: Message) -> Option<(Link, Message)> {
        let migration = match &first {
            Message::Offer(offer) => offer.migration,
            Message::Handoff(signed) => signed.message.migration,
            Message::Resume(resume) => resume.migration,
            _ => return Some((link, first)),
        };
        let patience = Instant::now() + limits::ANSWER_WITHIN;
        loop {
            let begun = self.registry.migration(migration);
            if let Some(returns) = begun.as_ref().and_then(|migration| migration.returns.clone()) {
                // One that ends at this moment drops the session, and the peer comes again.
                let _ = returns.send(Return { link, first }).await;
                return None;
            }
            // Its twin is still being built.
            if begun.is_none() && self.registry.is_under_way(migration) && Instant::now() > patience {
                link.session.close(Some(ErrorClass::PeerUnreachable), "the migration is not ready for its source yet");
                return None;
            }
            if begun.is_some() || !self.registry.is_under_way(migration) || Instant::now() > patience {
                return Some((link, first));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A source that lost its session comes back, and no migration of this process is the one. What the journal promised goes
    /// on; what it did not is forgotten, with whatever had come of the VM.
    async fn take_up_later(self: Arc<Self>, link: Link, resume: &Resume) {
        let migration = resume.migration;
        let known = match engine::interruption(&self.evidence(), migration) {
            Ok(about) => about.is_some_and(|about| about.side == Side::Destination && about.peer == link.peer.spiffe),
            Err(error) => {
                tracing::error!(%migration, error = %telemetry::chain(&error), "journal not read for a source that is back");
                return link.session.close(Some(ErrorClass::PeerUnreachable), "the journal cannot be read now");
            }
        };
        let answer = if known {
            Message::Resumed(Resumed { migration, deciding: true, bandwidth_max: None, lanes: vec![LaneStanding::default()] })
        } else {
            let reason = "this gateway knows nothing of the migration: it was started anew, or gave up".to_owned();
            Message::Failure(Failure { class: ErrorClass::Local, reason })
        };
        if known {
            let mut entry = Entry::new(Event::LinkResumed).outcome(Outcome::Done);
            entry.migration = Some(migration);
            entry.peer = Some(link.peer.spiffe.to_string());
            self.note(entry).await;
        }
        let said = tokio::time::timeout(limits::SEND_WITHIN, link.session.send(&answer)).await;
        let next = async {
            loop {
                match link.session.receive().await {
                    Ok(Message::Ping | Message::AuditHead(_) | Message::AuditAnswer(_)) => {}
                    other => return other,
                }
            }
        };
        match (said, tokio::time::timeout(limits::GREETING_WITHIN, next).await) {
            (Ok(Ok(())), Ok(Ok(Message::Handoff(signed)))) if known => self.take_up(link, &signed).await,
            _ => link.session.close(None, "nothing follows"),
        }
    }

    async fn take_offer(self: Arc<Self>, link: Link, peer: &config::Peer, offer: Offer) {
        let (migration, vm) = (offer.migration, offer.vm.clone());
        let started = SystemTime::now();
        match self.admit(&link, offer).await {
            Ok(arrival) => self.receive(link, peer, arrival, started, None).await,
            Err(refusal) => {
                let mut entry = Entry::new(Event::MigrationFinished).outcome(Outcome::Refused);
                put_class(&mut entry, refusal.class);
                entry.vm = Some(vm.clone());
                entry.migration = Some(migration);
                entry.peer = Some(peer.spiffe.to_string());
                entry.detail.insert("why".into(), refusal.reason.clone().into());
                entry.detail.insert("running_on".into(), "source".into());
                self.note(entry).await;
                tracing::info!(%migration, %vm, peer = %peer.spiffe, why = refusal.reason, "offer refused");
                let reason = cut(&refusal.reason);
                let last_words = async {
                    let _ = link.session.send(&Message::Failure(Failure { class: refusal.class, reason })).await;
                    // The source closes when it has read it.
                    link.session.closed().await
                };
                let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
            }
        }
    }

    /// Judges an offer and puts everything for it in place; says why not, one reason at a time.
    async fn admit(self: &Arc<Self>, link: &Link, offer: Offer) -> Result<Arrival, Refusal> {
        let (machine, memory_bytes) = self.read_offer(&offer)?;
        self.takes_disks_only(&machine).map_err(|why| Refusal::new(ErrorClass::PeerIncompatible, why))?;
        let mut case = Case {
            migration: offer.migration,
            vm: offer.vm.clone(),
            uuid: offer.uuid,
            terms: offer.stream.clone(),
            mode: machine.mode,
            memory_bytes,
            disks: DisksAsked::from(&machine),
            bandwidth_max: None,
            side: Side::Destination,
        };
        let permit = self.ask_accept(&case, link).await?;
        // As few as policy asks for; the switch is judged by what is granted.
        let lanes = permit.stream().map_or(1, |stream| stream.lanes).clamp(1, limits::LANES_MAX);
        case.terms.lanes = lanes;
        case.bandwidth_max = permit.obligations().bandwidth_max();
        let hosting = self.hosting(&offer, link)?;
        if memory_bytes > hosting.memory_bytes_max {
            let most = hosting.memory_bytes_max;
            let why = format!("VM `{}` needs {memory_bytes} bytes of memory: this gateway accepts {most}", offer.vm);
            return Err(Refusal::new(ErrorClass::PeerIncompatible, why));
        }
        crate::failpoint::hit!("destination.offer-judged");
        let claim = self.claim_for(link, &offer).await?;
        self.check_place(&offer).await?;
        let (twin, vmm, leavings, laid) = self.build_twin(hosting, &offer, machine).await?;
        crate::failpoint::hit!("destination.twin-launched");
        // What a hypervisor loads of its own stream nobody can go on with but who began.
        let goes_on = matches!(twin, Twin::Pages(_));
        if let Err(error) = if goes_on { self.note_arrival(&offer, lanes, &link.peer) } else { Ok(()) } {
            // Without it a restart costs what was received.
            tracing::warn!(migration = %offer.migration, %error, "the offer is not noted beside its twin");
        }
        let (policy_digest, policy_ids) = (*permit.set_digest(), permit.policy_ids().to_vec());
        Ok(Arrival { offer, lanes, case, twin, vmm, leavings, laid, policy_digest, policy_ids, claim })
    }

    pub(super) async fn ask_accept(self: &Arc<Self>, case: &Case, link: &Link) -> Result<Permit<Accept>, Refusal> {
        let (judge, judged, session) = (Arc::clone(&self.judge), case.clone(), Arc::clone(&link.session));
        tokio::task::spawn_blocking(move || judge.accept(&judged, &session))
            .await
            .map_err(|error| Refusal::new(ErrorClass::Bug, error.to_string()))?
            .map_err(|no| Refusal::new(no.class(), telemetry::chain(&no)))
    }

    /// Takes the VM for an offer. An earlier attempt of the same source that lost its link is over when that offers anew.
    async fn claim_for(self: &Arc<Self>, link: &Link, offer: &Offer) -> Result<Claim, Refusal> {
        let mut claimed = self.claim_within(offer, limits::ROOM_WITHIN, |busy| *busy == Busy::Full).await;
        if let Err(Busy::Vm(other)) = &claimed
            && self.kept.has(*other)
        {
            self.drop_kept(*other, |peer| peer.spiffe == link.peer.spiffe).await;
            claimed = self.registry.claim(&offer.vm, offer.migration);
        }
        if let Err(Busy::Vm(other)) = claimed
            && let Some(earlier) = self.registry.migration(other)
            && earlier.side == Side::Destination
            && self.config.peer_of(&link.peer.spiffe).is_some_and(|peer| peer.name == earlier.peer)
        {
            let ends = match earlier.commands {
                Some(commands) => !matches!(commands.try_send(Command::Superseded), Err(TrySendError::Full(_))),
                None => earlier.report.is_some(),
            };
            if ends {
                // It ends now, or has ended and is about to let go of it.
                claimed = self.claim_within(offer, limits::GREETING_WITHIN / 2, |busy| *busy == Busy::Vm(other)).await;
            }
        }
        claimed.map_err(|busy| match busy {
            Busy::Vm(other) => Refusal::new(ErrorClass::Denied, format!("VM `{}` is moving already, in migration `{other}`", offer.vm)),
            Busy::Full => Refusal::new(ErrorClass::PeerBusy, "as many migrations are under way as may be"),
            Busy::Closing => Refusal::new(ErrorClass::PeerUnreachable, "the gateway is shutting down"),
            Busy::Id => used_before(offer.migration),
        })
    }

    /// Takes the VM. What keeps it for a while only is waited for, until the end of a migration, for so long.
    async fn claim_within(&self, offer: &Offer, within: Duration, passes: impl Fn(&Busy) -> bool) -> Result<Claim, Busy> {
        let (mut room, until) = (self.registry.room(), Instant::now() + within);
        loop {
            match self.registry.claim(&offer.vm, offer.migration) {
                // It lives as long as the registry.
                Err(busy) if passes(&busy) && tokio::time::timeout_at(until.into(), room.changed()).await.is_ok() => {}
                claimed => return claimed,
            }
        }
    }

    /// What the offer says it is, checked against itself and against what this gateway knows of the VM.
    pub(super) fn read_offer(&self, offer: &Offer) -> Result<(Machine, u64), Refusal> {
        let machine: Machine = serde_json::from_slice(&offer.machine)
            .map_err(|_| Refusal::new(ErrorClass::PeerMisbehaved, "the machine description is malformed"))?;
        let layout =
            MemoryLayout::new(offer.regions.clone()).map_err(|error| Refusal::new(ErrorClass::PeerMisbehaved, error.to_string()))?;
        // What the stream says it is must be what was judged: one name, one UUID, one layout.
        if machine.uuid != offer.uuid || machine.regions != offer.regions || machine.kind != offer.hypervisor {
            return Err(Refusal::new(ErrorClass::PeerMisbehaved, "the machine description contradicts the offer"));
        }
        if machine.mode.may_split() && (machine.kind != QEMU_KIND || machine.disks_only) {
            return Err(Refusal::new(ErrorClass::PeerMisbehaved, "only a QEMU's guest that moves is split"));
        }
        let vm = self
            .config
            .vm(&offer.vm)
            .ok_or_else(|| Refusal::new(ErrorClass::Denied, format!("VM `{}` is not in this gateway's configuration", offer.vm)))?;
        if vm.uuid != offer.uuid {
            return Err(Refusal::new(ErrorClass::Denied, format!("VM `{}` has another UUID here than `{}`", vm.name, offer.uuid)));
        }
        check_machine(vm, &machine).map_err(|why| Refusal::new(ErrorClass::Denied, why))?;
        disks::check_offered(vm, &machine)
            .map_err(|(malformed, why)| Refusal::new(if malformed { ErrorClass::PeerMisbehaved } else { ErrorClass::Denied }, why))?;
        Ok((machine, layout.bytes()))
    }

    /// A VM can come if it is not here, was not given away without an answer, and comes at an epoch that follows what is
    /// known of it. The id of its migration is new.
    async fn check_place(&self, offer: &Offer) -> Result<(), Refusal> {
        let (journal, migration) = (Arc::clone(&self.journal), offer.migration);
        let records = tokio::task::spawn_blocking(move || journal.records(migration)).await;
        let records = records.map_err(|error| Refusal::new(ErrorClass::Bug, error.to_string()))?;
        if !records.map_err(|error| Refusal::new(ErrorClass::Local, telemetry::chain(&error)))?.is_empty() {
            return Err(used_before(migration));
        }
        let denied = |why: String| Err(Refusal::new(ErrorClass::Denied, format!("VM `{}` {why}", offer.vm)));
        match self.registry.place(&offer.vm) {
            Some(Placement::Here { .. }) => denied("is here already".into()),
            // INVARIANT(one-owner): the copy that waits here may have to go on.
            Some(Placement::Given { migration, peer, .. }) => {
                denied(format!("was given to `{peer}` in migration `{migration}`, which has not answered"))
            }
            Some(Placement::Away { epoch, .. }) if offer.epoch < epoch => {
                denied(format!("left at epoch {epoch}: an offer at epoch {} is older", offer.epoch))
            }
            Some(Placement::Cold { .. }) => denied("belongs here and has to be started from its disks".into()),
            Some(Placement::Away { .. }) | None => Ok(()),
        }
    }

    /// Receives a VM; `comes_back_in` is the round of a source that comes back to a twin of an earlier gateway.
    pub(super) async fn receive(
        self: Arc<Self>,
        link: Link,
        peer: &config::Peer,
        arrival: Arrival,
        started: SystemTime,
        comes_back_in: Option<Round>,
    ) {
        let Arrival { offer, lanes, case, twin, vmm, leavings, laid, policy_digest, policy_ids, claim } = arrival;
        let (migration, vm, kind) = (offer.migration, offer.vm.clone(), offer.hypervisor.clone());
        let shown = Progress { phase: Phase::Memory, memory_total_bytes: case.memory_bytes, ..Progress::new(migration) };
        let ((_progress, progress), (ended_in, ended)) = (watch::channel(shown), watch::channel(false));
        let (commands_in, commands) = mpsc::channel(limits::COMMAND_QUEUE);
        let (returns_in, returns) = mpsc::channel(1);
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
            returns: Some(returns_in),
        });
        let ask_commit = self.commit_question(&case);
        let source_spiffe = link.peer.spiffe.clone();
        let (evidence, outage_max) = (self.evidence(), self.config.migration.max_outage.duration);
        let progress = Some(twin_file(&self.config.gateway.runtime_directory, migration, PROGRESS));
        let order = DestinationOrder {
            offer,
            lanes,
            evidence,
            link,
            twin: Box::new(()),
            ask_commit,
            policy_digest,
            bandwidth_max: case.bandwidth_max.and_then(NonZeroU64::new),
            commands,
            returns,
            outage_max,
            progress,
            comes_back_in,
            held_disks: laid.as_ref().map(|laid| laid.held().to_vec()).unwrap_or_default(),
            disk_socket: twin_file(&self.config.gateway.runtime_directory, migration, SOCKET),
        };
        let end = match twin {
            Twin::Pages(twin) => engine::run_destination(order.into_twin(twin)).await,
            Twin::Stream(twin) => engine::run_stream_destination(order.into_twin(twin)).await,
        };
        self.forget_arrival(migration);
        let report = self.arrival_report(&case, kind, &end, (source_spiffe, policy_ids), started);
        self.refresh_place(&vm);
        let claim = match end.outcome {
            Some(place) => {
                let denied =
                    end.error.as_ref().is_some_and(|error| matches!(error.class(), ErrorClass::Denied | ErrorClass::Unauthenticated));
                let laid = clear_up(matches!(place, Place::Moved | Place::Cold), vmm, &leavings, laid).await;
                laid.into_iter().for_each(|laid| self.end_disks(laid, denied));
                Some(claim)
            }
            None => {
                self.resolve_later(migration, None, Some(claim));
                None
            }
        };
        self.finished(report, ended_in).await;
        drop(claim);
    }

    fn arrival_report(
        &self,
        case: &Case,
        hypervisor: String,
        end: &DestinationEnd,
        (source, policy_ids): (SpiffeId, Vec<String>),
        started: SystemTime,
    ) -> Report {
        let mut report = report::report(case.migration, &case.vm, end.outcome, end.error.as_ref(), started);
        report.hypervisor = hypervisor;
        report.guest_memory_bytes = case.memory_bytes;
        report.authenticated.source = Some(source);
        report.authenticated.destination = Some(self.credentials.own_id());
        report.policy.decision = Some(report::decision(end.error.as_ref()));
        report.policy.policy_ids = policy_ids;
        report.mode = case.mode;
        report.verified = end.outcome == Some(Place::Moved) && case.terms.verify && !case.mode.may_split();
        report::put_disks_there(&mut report, end.disks);
        report.audit.destination_head = Some(self.audit.head().text);
        report
    }

    /// A peer comes back for a handoff that was interrupted.
    async fn take_up(self: Arc<Self>, link: Link, signed: &SignedHandoff) {
        let migration = signed.message.migration;
        if self.registry.is_under_way(migration) {
            // The peer may have lost its session before we have; it comes again.
            link.session.close(Some(ErrorClass::Local), "the migration is under way in another session");
            return;
        }
        if !self.config.vms.iter().any(|vm| vm.uuid == signed.message.uuid) {
            let why = format!("a handoff message is about VM `{}`, which is not in the configuration", signed.message.uuid);
            self.note_refused_session(Some(link.peer.spiffe.to_string()), link.session.peer_address(), ErrorClass::Denied, why).await;
            link.session.close(Some(ErrorClass::Denied), "no such VM");
            return;
        }
        if self.aborted_kept(&link, signed).await {
            return link.session.close(None, "the twin is gone");
        }
        if self.kept.has(migration) {
            return link.session.close(Some(ErrorClass::PeerUnreachable), "a source comes back to its twin with RESUME");
        }
        let _turn = match self.registry.resolving_at_once(migration) {
            Some(turn) => turn,
            // Both came at once, each with its own turn and waiting for the other: one of the two says so, and it is always the same.
            None if self.credentials.own_id() < link.peer.spiffe => {
                return link.session.close(Some(ErrorClass::PeerUnreachable), "it is being settled in a session of the other direction");
            }
            None => self.registry.resolving(migration).await,
        };
        match engine::answer(&self.evidence(), &self.host(), &link, signed).await {
            Ok(resolved) => {
                tracing::info!(%migration, ?resolved, peer = %link.peer.spiffe, "interrupted handoff taken up");
                self.taken_up.notify_waiters();
            }
            Err(error) => {
                let why = telemetry::chain(&error);
                tracing::warn!(%migration, error = %why, peer = %link.peer.spiffe, "interrupted handoff not settled");
                if error.class() == ErrorClass::PeerMisbehaved {
                    let (peer, address) = (link.peer.spiffe.to_string(), link.session.peer_address());
                    self.note_refused_session(Some(peer), address, error.class(), why).await;
                }
                link.session.close(Some(error.class()), "the handoff was not settled");
            }
        }
        self.load_places();
    }
}

/// Nothing is left of a VM that did not come but its disks.
async fn clear_up(came: bool, vmm: Option<LaunchedVmm>, leavings: &Leavings, laid: Option<LaidDisks>) -> Option<LaidDisks> {
    if came {
        laid.into_iter().for_each(LaidDisks::keep);
        return None;
    }
    if let Some(vmm) = vmm {
        end_twin(vmm).await;
    }
    leavings.remove();
    laid
}

fn cut(reason: &str) -> String {
    let mut end = reason.len().min(limits::REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason[..end].to_owned()
}
