//! The source end of one migration.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::engine::digest::{digest_memory, digest_totals, sha256, totals_differ};
use crate::engine::handoff::{Binding, Evidence, blocking, joined, wake};
use crate::engine::lanes::{LaneReport, LaneRound, SendShared, send_lane};
use crate::engine::limiter::Limiter;
use crate::engine::link::send_within;
use crate::engine::meter::{Figures, Meter, Stopwatch};
use crate::engine::{EngineError, Link};
use crate::hypervisor::PagedSource;
use crate::limits;
use crate::memory::{GuestRam, PageCounts, PageSet, Tracker};
use crate::migration::{
    Goal, HandoffAction, OfferRecord, Outcome, RoundMeasure, Source, SourceAction, SourceEvent, SourceRecord, SourceStep,
};
use crate::telemetry::{Phase, Progress};
use crate::transport::{LaneHandle, TransportError};
use crate::types::{Epoch, LaneIndex, MigrationId, Round, VmName, VmUuid};
use crate::wire::{AuditHead, Failure, FinalDigest, Handoff, LaneTotals, Message, Offer, RoundEnd, StateChunk, StreamTerms};

/// What is to be done.
#[derive(Debug, Clone)]
pub struct SourceOrder {
    /// This attempt.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The epoch at which this gateway owns it.
    pub epoch: Epoch,
    /// Where its VMM is attached, for the journal.
    pub address: String,
    /// Downtime and throttling.
    pub goal: Goal,
    /// Bytes a second on the wire, all lanes together.
    pub bandwidth: Option<u64>,
    /// What is asked of the stream.
    pub stream: StreamTerms,
    /// When to give up, from the start.
    pub timeout: Option<Duration>,
    /// How long to look for a destination that was given the VM and is silent.
    pub resolve_timeout: Duration,
    /// SHA-256 of the policy set that permitted the release.
    pub policy_digest: [u8; 32],
}

/// Asks policy and identity again, at commit. Errors are the words of the denial.
pub type AskCommit = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;
/// Opens a new session with the same destination and greets it.
pub type Redial = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Link, EngineError>> + Send>> + Send + Sync>;

/// The collaborators of one migration.
pub struct SourcePorts {
    /// Journal, audit log, signing key.
    pub evidence: Evidence,
    /// The session with the destination.
    pub link: Link,
    /// The guest.
    pub guest: Box<dyn PagedSource>,
    /// Policy at commit.
    pub ask_commit: AskCommit,
    /// A new session, when COMMIT was said and the old one is gone.
    pub redial: Redial,
    /// Where progress is shown.
    pub progress: watch::Sender<Progress>,
    /// What operators say meanwhile.
    pub commands: mpsc::Receiver<Command>,
}

/// What an operator may say to a running migration.
#[derive(Debug, Clone, Copy)]
pub enum Command {
    /// Stop, with the VM running on the source.
    Cancel,
    /// Change the limit, bytes a second.
    Bandwidth(Option<u64>),
    /// Change what is asked of the pause.
    DowntimeMax(Duration),
}

/// How it ended.
pub struct SourceEnd {
    /// Where the VM is; `None` when that is in doubt.
    pub outcome: Option<Outcome>,
    /// Why it did not move.
    pub error: Option<EngineError>,
    /// The figures.
    pub figures: Figures,
}

type Guest = Arc<Mutex<Box<dyn PagedSource>>>;

struct Run {
    order: SourceOrder,
    evidence: Evidence,
    link: Link,
    guest: Guest,
    ram: Arc<GuestRam>,
    ask_commit: AskCommit,
    redial: Redial,
    progress: watch::Sender<Progress>,
    machine: Source,
    binding: Option<Binding>,
    tracker: Option<Tracker>,
    lanes: Vec<mpsc::Sender<LaneRound>>,
    /// Keeps the lanes' threads alive.
    threads: Vec<LaneHandle<()>>,
    /// Pages by how they were sent and UDP payload, by lane.
    carried: Vec<(PageCounts, u64)>,
    reports: mpsc::Receiver<Result<LaneReport, EngineError>>,
    reports_in: mpsc::Sender<Result<LaneReport, EngineError>>,
    limiter: Arc<Limiter>,
    meter: Arc<Meter>,
    round: RoundUnderWay,
    finals: Option<JoinHandle<Result<Finals, EngineError>>>,
    digest: Option<FinalDigest>,
    pause: Option<Stopwatch>,
    error: Option<EngineError>,
    figures: Figures,
    phase: Phase,
    started: Instant,
    /// When the guest that is paused goes on here, come what may.
    pause_ends: Option<Instant>,
    /// When a destination that was given the VM and does not answer is left to the gateway.
    doubt_ends: Option<Instant>,
    reconnect_pause: Duration,
    said: Instant,
    ended: Option<Option<Outcome>>,
}

/// The round on the lanes.
#[derive(Debug)]
struct RoundUnderWay {
    round: Round,
    last: bool,
    since: Instant,
    totals: Vec<Option<LaneTotals>>,
    /// Pages that were not zero, of all rounds before.
    content_before: u64,
    said: bool,
}

/// What the pause yields besides pages.
struct Finals {
    state: Vec<u8>,
    state_digest: [u8; 32],
    memory: u128,
}

/// Runs the source end until the VM's place is decided or in doubt.
pub async fn run_source(order: SourceOrder, ports: SourcePorts) -> SourceEnd {
    let SourcePorts { evidence, link, guest, ask_commit, redial, progress, commands } = ports;
    let (reports_in, reports) = mpsc::channel(usize::from(limits::LANES_MAX) * 2);
    let ram = Arc::clone(guest.ram());
    let run = Run {
        machine: Source::new(order.goal),
        limiter: Arc::new(Limiter::new(order.bandwidth)),
        guest: Arc::new(Mutex::new(guest)),
        round: RoundUnderWay::new(Round(0), false, 0, 0),
        binding: None,
        tracker: None,
        lanes: Vec::new(),
        threads: Vec::new(),
        carried: Vec::new(),
        meter: Arc::default(),
        finals: None,
        digest: None,
        pause: None,
        error: None,
        figures: Figures::default(),
        phase: Phase::Connect,
        started: Instant::now(),
        pause_ends: None,
        doubt_ends: None,
        reconnect_pause: RECONNECT_FIRST,
        said: Instant::now(),
        ended: None,
        order,
        evidence,
        link,
        ram,
        ask_commit,
        redial,
        progress,
        reports,
        reports_in,
    };
    run.to_end(commands).await
}

impl Run {
    async fn to_end(mut self, mut commands: mpsc::Receiver<Command>) -> SourceEnd {
        let mut events = VecDeque::new();
        if let Err(error) = self.offer().await {
            events.push_back(self.give_up(error));
        }
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        while self.ended.is_none() {
            let Some(event) = events.pop_front() else {
                let next = self.next(&mut commands, &mut tick).await;
                events.extend(next);
                continue;
            };
            let given_up_early = matches!(event, SourceEvent::GiveUp(_)) && self.binding.is_none();
            match self.machine.step(event) {
                Ok(actions) => self.perform_all(actions, &mut events).await,
                Err(refusal) if self.machine.is_committed() => {
                    tracing::warn!(migration = %self.order.migration, %refusal, "ignored after COMMIT")
                }
                Err(refusal) => events.push_back(self.give_up(refusal.into())),
            }
            if given_up_early {
                self.say_failure().await;
                self.ended = Some(Some(Outcome::Stayed));
            }
        }
        self.finish().await
    }

    async fn offer(&mut self) -> Result<(), EngineError> {
        self.show(|_| {});
        let guest = Arc::clone(&self.guest);
        let machine = blocking(move || Ok(lock(&guest).machine().clone())).await?;
        let offer = Offer {
            migration: self.order.migration,
            vm: self.order.vm.clone(),
            uuid: self.order.uuid,
            epoch: self.order.epoch,
            hypervisor: machine.kind.clone(),
            regions: machine.regions.clone(),
            machine: serde_json::to_vec(&machine).map_err(|error| EngineError::Bug(error.to_string()))?,
            stream: self.order.stream.clone(),
            policy_digest: self.order.policy_digest,
        };
        self.say(Message::Offer(offer)).await
    }

    async fn say(&mut self, message: Message) -> Result<(), EngineError> {
        let migration = self.order.migration;
        // A peer that does not read holds up neither the deadline nor the guest.
        let left = self.deadline().map_or(limits::SEND_WITHIN, |at| at.saturating_duration_since(Instant::now()));
        let sent = send_within(&self.link.session, &message, left.min(limits::SEND_WITHIN)).await;
        self.said = Instant::now();
        sent.map_err(|source| EngineError::Transport { migration, source })
    }

    /// When this has to be over as it is now: the migration, the pause, or the wait for an answer to COMMIT.
    fn deadline(&self) -> Option<Instant> {
        if self.machine.is_committed() {
            return self.doubt_ends;
        }
        let end = self.order.timeout.map(|limit| self.started + limit);
        [end, self.pause_ends].into_iter().flatten().min()
    }

    fn deadline_passed(&mut self) -> Option<SourceEvent> {
        let vm = self.order.vm.clone();
        if self.machine.is_committed() {
            self.in_doubt();
            return None;
        }
        let paused_too_long = self.pause_ends.take_if(|at| *at <= Instant::now()).is_some();
        let error = match self.order.timeout.take_if(|_| !paused_too_long) {
            Some(limit) => EngineError::TimedOut { vm, limit },
            None => EngineError::PausedTooLong { vm, limit: self.pause_max() },
        };
        Some(self.give_up(error))
    }

    fn pause_max(&self) -> Duration {
        let goal = self.machine.convergence().goal();
        limits::PAUSE_SLACK + (goal.downtime_max + goal.fixed_cost) * 10
    }

    fn in_doubt(&mut self) {
        self.error = Some(EngineError::InDoubt { vm: self.order.vm.clone(), migration: self.order.migration });
        self.ended = Some(None);
    }

    /// A destination that hears nothing for too long takes this for lost.
    async fn sign_of_life(&mut self) -> Option<SourceEvent> {
        if self.said.elapsed() < limits::PING_EVERY {
            return None;
        }
        match self.say(Message::Ping).await {
            Err(error) if !self.machine.is_committed() => Some(self.give_up(error)),
            // After COMMIT the end of the session is what counts.
            _ => None,
        }
    }

    /// Keeps the first error, which is the cause, and asks the machine to give up.
    fn give_up(&mut self, error: EngineError) -> SourceEvent {
        let class = error.class();
        tracing::debug!(migration = %self.order.migration, state = self.machine.name(), error = %crate::telemetry::chain(&error), "gives up");
        self.error.get_or_insert(error);
        SourceEvent::GiveUp(class)
    }

    async fn say_failure(&mut self) {
        if let Some(error) = &self.error {
            let reason: String = crate::telemetry::chain(error).chars().take(limits::REASON_BYTES_MAX / 4).collect();
            let _ = self.say(Message::Failure(Failure { class: error.class(), reason })).await;
        }
    }

    /// Waits for whatever happens next.
    async fn next(&mut self, commands: &mut mpsc::Receiver<Command>, tick: &mut tokio::time::Interval) -> Option<SourceEvent> {
        let deadline = self.deadline();
        let finals = async {
            match &mut self.finals {
                Some(task) => task.await,
                None => std::future::pending().await,
            }
        };
        let timed_out = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            finals = finals => {
                self.finals = None;
                match joined(finals).and_then(|result| result) {
                    Ok(finals) => self.send_state(finals).await,
                    Err(error) => Some(self.give_up(error)),
                }
            }
            report = self.reports.recv() => match report {
                Some(Ok(report)) => self.lane_reported(report).await,
                // After the last round lanes may close as they like.
                Some(Err(_)) if self.digest.is_some() => None,
                Some(Err(error)) => Some(self.give_up(error)),
                None => None,
            },
            message = self.link.session.receive() => self.received(message).await,
            command = commands.recv() => self.commanded(command),
            () = timed_out => self.deadline_passed(),
            _ = tick.tick() => {
                self.show(|_| {});
                self.sign_of_life().await
            }
        }
    }

    fn commanded(&mut self, command: Option<Command>) -> Option<SourceEvent> {
        match command {
            Some(Command::Cancel) => Some(self.give_up(EngineError::Cancelled { vm: self.order.vm.clone() })),
            Some(Command::Bandwidth(limit)) => {
                self.limiter.set(limit);
                None
            }
            Some(Command::DowntimeMax(downtime_max)) => {
                Some(SourceEvent::SetGoal(Goal { downtime_max, ..*self.machine.convergence().goal() }))
            }
            // The registry keeps the other end until the migration has ended; without it nobody can cancel.
            None => Some(self.give_up(EngineError::Cancelled { vm: self.order.vm.clone() })),
        }
    }

    async fn received(&mut self, message: Result<Message, TransportError>) -> Option<SourceEvent> {
        let message = match message {
            Ok(message) => message,
            Err(_) if self.machine.is_committed() => return self.reconnect().await,
            Err(source) => return Some(self.give_up(EngineError::Transport { migration: self.order.migration, source })),
        };
        match message {
            Message::Accept(accept)
                if accept.migration == self.order.migration && (1..=self.order.stream.lanes).contains(&accept.lanes) =>
            {
                let offer = Box::new(OfferRecord {
                    migration: self.order.migration,
                    vm: self.order.vm.clone(),
                    uuid: self.order.uuid,
                    epoch: self.order.epoch,
                    peer: self.link.peer.spiffe.clone(),
                    peer_incarnation: self.link.peer.incarnation,
                    peer_key: self.link.peer.signing_key,
                    policy_digest: self.order.policy_digest,
                    address: self.order.address.clone(),
                });
                self.binding = Some(offer.as_ref().into());
                Some(SourceEvent::Accepted { offer, lanes: accept.lanes })
            }
            Message::RoundApplied(applied) if applied.migration == self.order.migration => {
                self.round_applied(applied.round, &applied.lanes).await
            }
            Message::Handoff(signed) => {
                let Some(binding) = &self.binding else {
                    return Some(self.give_up(EngineError::OutOfPlace { expected: "ACCEPT", got: "a handoff message".into() }));
                };
                match self.evidence.check(binding, &signed) {
                    Ok((step, incarnation_same)) => {
                        if let Some(watch) = &mut self.pause {
                            watch.lap(if matches!(step, Handoff::Prepared { .. }) { "destination" } else { "network" });
                        }
                        if matches!(&step, Handoff::Prepared { digest } if self.machine.name() == "await-prepared" && self.digest != Some(*digest))
                        {
                            let error = EngineError::Digest { vm: self.order.vm.clone(), what: "the final digest" };
                            self.error.get_or_insert(error);
                        }
                        if let (Handoff::Refuse { class }, None) = (&step, &self.error) {
                            self.error = Some(EngineError::peer(self.order.migration, *class, "the destination refused the VM"));
                        }
                        Some(SourceEvent::Handoff(SourceStep::Received { step, incarnation_same }))
                    }
                    Err(error) if self.machine.is_committed() => {
                        tracing::warn!(migration = %self.order.migration, error = %error, "ignored after COMMIT");
                        None
                    }
                    Err(error) => Some(self.give_up(error)),
                }
            }
            Message::AuditHead(head) => {
                self.keep_peer_head(head).await;
                None
            }
            Message::Failure(failure) => {
                let error = EngineError::peer(self.order.migration, failure.class, &failure.reason);
                Some(self.give_up(error))
            }
            Message::Ping => None,
            other => Some(self.give_up(EngineError::OutOfPlace { expected: self.machine.name(), got: other.name().to_owned() })),
        }
    }

    async fn keep_peer_head(&mut self, head: AuditHead) {
        let (audit, peer) = (self.evidence.audit.clone(), self.link.peer.clone());
        let text = head.checkpoint.clone();
        let noted = tokio::task::spawn_blocking(move || audit.note_peer_head(&peer.spiffe, &text, &peer.signing_key)).await;
        match noted {
            Ok(Ok(())) => self.figures.peer_audit_head = Some(head.checkpoint),
            Ok(Err(error)) => {
                tracing::error!(peer = %self.link.peer.spiffe, error = %error, "the peer's audit head does not follow the one it showed before")
            }
            Err(error) => tracing::error!(error = %error, "audit task failed"),
        }
    }

    /// COMMIT was said and the session is gone: only the destination knows. Ask until it answers.
    async fn reconnect(&mut self) -> Option<SourceEvent> {
        let deadline = self.doubt_ends.unwrap_or_else(Instant::now);
        // The destination may still hold the old session for alive.
        self.link.session.close(None, "the handoff goes on in another session");
        self.show(|progress| progress.stalled_because = Some("the destination was given the VM and does not answer".into()));
        while Instant::now() + self.reconnect_pause < deadline {
            // A destination that takes sessions and drops them is not asked any faster than one that is gone.
            tokio::time::sleep(self.reconnect_pause).await;
            self.reconnect_pause = (self.reconnect_pause * 2).min(RECONNECT_LONGEST);
            match tokio::time::timeout_at(deadline.into(), (self.redial)()).await {
                Ok(Ok(link)) if link.peer.spiffe == self.link.peer.spiffe => {
                    self.link = link;
                    return Some(SourceEvent::Handoff(SourceStep::Reconnected));
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(error = %error, "destination not reached"),
                Err(_) => break,
            }
        }
        self.in_doubt();
        None
    }

    async fn perform_all(&mut self, actions: Vec<SourceAction>, events: &mut VecDeque<SourceEvent>) {
        for action in actions {
            match self.perform(action).await {
                Ok(event) => events.extend(event),
                Err(error) => {
                    if self.machine.is_committed() {
                        // The COMMIT record may or may not be on disk and was not said: only a restart can tell.
                        self.error = Some(error);
                        self.ended = Some(None);
                    } else {
                        events.push_back(self.give_up(error));
                    }
                    return;
                }
            }
        }
    }

    async fn perform(&mut self, action: SourceAction) -> Result<Option<SourceEvent>, EngineError> {
        match action {
            SourceAction::Begin { lanes } => self.begin(lanes).await.map(|()| None),
            SourceAction::SendRound(round) => {
                self.phase = Phase::Memory;
                self.send_round(round, false).await.map(|()| None)
            }
            SourceAction::Throttle(percent) => {
                let guest = Arc::clone(&self.guest);
                blocking(move || Ok(lock(&guest).throttle(percent)?)).await.map(|()| None)
            }
            SourceAction::Pause => {
                self.phase = Phase::Switchover;
                self.pause = Some(Stopwatch::start());
                self.pause_ends = Some(Instant::now() + self.pause_max());
                let guest = Arc::clone(&self.guest);
                blocking(move || Ok(lock(&guest).pause()?)).await?;
                self.lap("pause");
                Ok(Some(SourceEvent::Paused))
            }
            SourceAction::SendLast(round) => self.send_last(round).await.map(|()| None),
            SourceAction::NotConverging(verdict) => Err(EngineError::NotConverging { vm: self.order.vm.clone(), verdict }),
            SourceAction::Handoff(action) => self.handoff(action).await,
        }
    }

    fn counts(&self) -> PageCounts {
        let mut sum = PageCounts::default();
        for (counts, _) in &self.carried {
            sum.add(counts);
        }
        sum
    }

    fn lap(&mut self, what: &'static str) {
        if let Some(watch) = &mut self.pause {
            watch.lap(what);
        }
    }

    async fn begin(&mut self, lanes: u16) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let shared = SendShared {
            migration,
            ram: Arc::clone(&self.ram),
            lanes,
            terms: self.order.stream.clone(),
            limiter: Arc::clone(&self.limiter),
            meter: Arc::clone(&self.meter),
            reports: self.reports_in.clone(),
        };
        for lane in (0..lanes).map(LaneIndex) {
            let (rounds_in, rounds) = mpsc::channel(1);
            let shared = shared.clone();
            let task = move |io| send_lane(io, shared, rounds);
            let opened = self.link.session.open_lane(migration, lane, task).await;
            self.threads.push(opened.map_err(|source| EngineError::Transport { migration, source })?);
            self.lanes.push(rounds_in);
            self.carried.push((PageCounts::default(), 0));
        }
        let guest = Arc::clone(&self.guest);
        blocking(move || Ok(lock(&guest).start_tracking()?)).await?;
        let mut tracker = Tracker::new(self.ram.pages());
        tracker.owe(&PageSet::full(self.ram.pages()));
        self.tracker = Some(tracker);
        Ok(())
    }

    async fn send_round(&mut self, round: Round, last: bool) -> Result<(), EngineError> {
        let tracker = self.tracker.as_mut().ok_or_else(|| EngineError::Bug("no tracker".into()))?;
        let (begun, pages) = tracker.begin_round();
        if begun != round {
            return Err(EngineError::Bug(format!("round {round} was decided and {begun} begun")));
        }
        self.round = RoundUnderWay::new(round, last, self.lanes.len(), content(&self.counts()));
        self.figures.rounds = round.0;
        for lane in &self.lanes {
            lane.send(LaneRound { round, pages: Arc::clone(&pages) }).await.map_err(|_| EngineError::Bug("a lane ended early".into()))?;
        }
        Ok(())
    }

    /// The guest stands still. Saving its state may write guest memory, so the last harvest comes after;
    /// pages, state and digest then go out side by side.
    async fn send_last(&mut self, round: Round) -> Result<(), EngineError> {
        let guest = Arc::clone(&self.guest);
        let (state, dirty) = blocking(move || {
            let mut guest = lock(&guest);
            let state = guest.save_state()?;
            Ok((state, guest.harvest()?))
        })
        .await?;
        self.lap("state");
        if let Some(tracker) = &mut self.tracker {
            tracker.owe(&dirty);
        }
        let (ram, verify) = (Arc::clone(&self.ram), self.order.stream.verify);
        self.finals = Some(tokio::task::spawn_blocking(move || {
            let memory = if verify { digest_memory(&ram)? } else { 0 };
            Ok(Finals { state_digest: sha256(&state), state, memory })
        }));
        self.send_round(round, true).await
    }

    async fn send_state(&mut self, finals: Finals) -> Option<SourceEvent> {
        let total = finals.state.len() as u64;
        let mut offset = 0;
        for piece in finals.state.chunks(limits::STATE_CHUNK_BYTES_MAX) {
            let chunk = StateChunk { migration: self.order.migration, offset, total, bytes: piece.to_vec() };
            offset += piece.len() as u64;
            if let Err(error) = self.say(Message::StateChunk(chunk)).await {
                return Some(self.give_up(error));
            }
        }
        self.lap("digest");
        self.digest = Some(FinalDigest { state: finals.state_digest, lanes: [0; 32], memory: finals.memory });
        self.finalised().await
    }

    async fn lane_reported(&mut self, report: LaneReport) -> Option<SourceEvent> {
        let lane = usize::from(report.lane.0);
        if report.round != self.round.round || lane >= self.round.totals.len() {
            return Some(self.give_up(EngineError::Bug("a lane reported another round".into())));
        }
        self.round.totals[lane] = Some(report.totals);
        self.carried[lane] = (report.counts, report.wire_bytes);
        let lanes: Vec<LaneTotals> = self.round.totals.iter().copied().collect::<Option<_>>()?;
        self.figures.wire_bytes = self.carried.iter().map(|(_, bytes)| bytes).sum();
        let end = RoundEnd { migration: self.order.migration, round: self.round.round, last: self.round.last, lanes };
        if let Err(error) = self.say(Message::RoundEnd(end)).await {
            return Some(self.give_up(error));
        }
        self.round.said = true;
        self.lap("last-pages");
        self.finalised().await
    }

    /// FINAL can be said when the last round, the state and the digests are all out.
    async fn finalised(&mut self) -> Option<SourceEvent> {
        if !(self.round.last && self.round.said) {
            return None;
        }
        let mut digest = self.digest?;
        let totals: Vec<LaneTotals> = self.round.totals.iter().copied().collect::<Option<_>>()?;
        digest.lanes = digest_totals(&totals);
        self.digest = Some(digest);
        self.phase = Phase::Verify;
        Some(SourceEvent::Finalised(digest))
    }

    async fn round_applied(&mut self, round: Round, lanes: &[LaneTotals]) -> Option<SourceEvent> {
        let ours: Vec<LaneTotals> = self.round.totals.iter().copied().flatten().collect();
        if round != self.round.round || !self.round.said {
            return Some(
                self.give_up(EngineError::OutOfPlace { expected: "the end of the round under way", got: format!("round {round} applied") }),
            );
        }
        if let Some(error) = totals_differ(&ours, lanes) {
            return Some(self.give_up(error));
        }
        if let Some(Err(error)) = self.tracker.as_mut().map(|tracker| tracker.applied(round)) {
            return Some(self.give_up(EngineError::OutOfPlace { expected: "the oldest round in flight", got: error.to_string() }));
        }
        if self.round.last {
            return None;
        }
        let duration = self.round.since.elapsed();
        let guest = Arc::clone(&self.guest);
        let dirty = match blocking(move || Ok(lock(&guest).harvest()?)).await {
            Ok(dirty) => dirty,
            Err(error) => return Some(self.give_up(error)),
        };
        let dirty_pages = dirty.len();
        if let Some(tracker) = &mut self.tracker {
            tracker.owe(&dirty);
        }
        let content_pages = content(&self.counts()) - self.round.content_before;
        Some(SourceEvent::RoundApplied(RoundMeasure { content_pages, duration, dirty_pages }))
    }

    async fn handoff(&mut self, action: HandoffAction<SourceRecord>) -> Result<Option<SourceEvent>, EngineError> {
        let binding = self.binding.clone().ok_or_else(|| EngineError::Bug("handoff without an offer".into()))?;
        match action {
            HandoffAction::Journal(record) => {
                let (abort, commit) = (record == SourceRecord::Abort, record == SourceRecord::Commit);
                let result = self.evidence.record(&binding, record).await;
                self.lap("journal");
                match result {
                    // An ABORT that cannot be written is implied: COMMIT was never attempted, and a restart
                    // makes ABORT of an OFFER. The guest's life does not wait for the disk.
                    Err(error) if abort => {
                        tracing::error!(migration = %binding.migration, error = %error, "ABORT is not on disk; a restart will repeat it")
                    }
                    result => result?,
                }
                if commit {
                    self.doubt_ends = Some(Instant::now() + self.order.resolve_timeout);
                }
                Ok(None)
            }
            HandoffAction::Send(step) => {
                self.evidence.send(&self.link.session, &binding, step).await;
                Ok(None)
            }
            HandoffAction::AskCommit => {
                let ask = Arc::clone(&self.ask_commit);
                let answer = joined(tokio::task::spawn_blocking(move || ask()).await)?;
                self.lap("policy");
                Ok(Some(SourceEvent::Handoff(match answer {
                    Ok(()) => SourceStep::CommitPermitted,
                    Err(why) => {
                        self.error.get_or_insert(EngineError::Denied { vm: self.order.vm.clone(), why });
                        SourceStep::CommitDenied
                    }
                })))
            }
            HandoffAction::Resume => {
                let guest = Arc::clone(&self.guest);
                if let Some(tracker) = self.tracker.take() {
                    // INVARIANT(no-lost-dirt): what was harvested and not applied is still owed to whoever moves this guest next;
                    // the next migration starts with every page, so the set ends here.
                    tracing::debug!(migration = %binding.migration, pages = tracker.give_back().len(), "pages given back");
                }
                let woken = blocking(move || Ok(wake(lock(&guest).as_mut())?)).await;
                self.lap("resume");
                if let Err(error) = woken {
                    tracing::error!(vm = %binding.vm, error = %crate::telemetry::chain(&error), "guest not resumed on the source");
                    self.error.get_or_insert(error);
                }
                Ok(None)
            }
            HandoffAction::Destroy => {
                let guest = Arc::clone(&self.guest);
                if let Err(error) = blocking(move || Ok(lock(&guest).destroy()?)).await {
                    tracing::warn!(vm = %binding.vm, error = %error, "the old copy is gone already");
                }
                Ok(None)
            }
            HandoffAction::End(outcome) => {
                self.ended = Some(Some(outcome));
                Ok(None)
            }
        }
    }

    async fn finish(mut self) -> SourceEnd {
        let outcome = self.ended.flatten();
        if let (Some(watch), Some(Outcome::Moved)) = (&self.pause, outcome) {
            self.figures.downtime = Some(watch.total());
            self.figures.breakdown = watch.laps().to_vec();
        }
        if outcome == Some(Outcome::Moved) {
            self.error = None;
            self.figures.verified = self.order.stream.verify;
            self.phase = Phase::Cleanup;
            let head = self.evidence.audit.head().text;
            let _ = self.say(Message::AuditHead(AuditHead { checkpoint: head })).await;
            self.last_words().await;
        } else if outcome.is_some() {
            self.say_failure().await;
        }
        self.figures.pages = self.counts();
        self.phase = Phase::Done;
        self.show(|_| {});
        self.lanes.clear();
        self.link.session.close(None, "migration ended");
        SourceEnd { outcome, error: self.error, figures: self.figures }
    }

    /// The destination's audit head behind its last entry, if it comes soon.
    async fn last_words(&mut self) {
        let listen = async {
            while let Ok(message) = self.link.session.receive().await {
                if let Message::AuditHead(head) = message {
                    return self.keep_peer_head(head).await;
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, listen).await;
    }

    fn show(&mut self, change: impl FnOnce(&mut Progress)) {
        let convergence = self.machine.convergence();
        let total = self.ram.layout().bytes();
        let elapsed = self.started.elapsed().as_secs_f64();
        let sent = self.meter.pages() * crate::types::PAGE_BYTES as u64;
        let wire = self.meter.frame_bytes();
        let owed = self
            .tracker
            .as_ref()
            .map_or(total, |tracker| (tracker.owed_pages() + tracker.in_flight_pages()) * crate::types::PAGE_BYTES as u64);
        let mut next = Progress::new(self.order.migration);
        next.phase = self.phase;
        next.round = self.round.round.0;
        next.memory_total_bytes = total;
        next.memory_sent_bytes = sent;
        next.memory_remaining_bytes = owed;
        next.wire_bytes = wire;
        next.elapsed_seconds = elapsed;
        next.dirty_bytes_per_second = convergence.dirty_bytes_per_second();
        next.send_bytes_per_second = convergence.send_bytes_per_second().unwrap_or_default();
        next.wire_bytes_per_second = per_second(wire, elapsed);
        next.expected_downtime_seconds = convergence.downtime_expected().map(|d| d.as_secs_f64());
        next.phase_fraction = if self.phase == Phase::Memory && total > 0 { (sent as f64 / total as f64).min(1.0) } else { 0.0 };
        let rate = if next.send_bytes_per_second > 0 { next.send_bytes_per_second } else { per_second(sent, elapsed) };
        next.eta_seconds = (rate > 0 && self.phase == Phase::Memory).then(|| owed as f64 / rate as f64);
        change(&mut next);
        self.progress.send_replace(next);
    }
}

impl RoundUnderWay {
    fn new(round: Round, last: bool, lanes: usize, content_before: u64) -> Self {
        Self { round, last, since: Instant::now(), totals: vec![None; lanes], content_before, said: false }
    }
}

fn content(counts: &PageCounts) -> u64 {
    counts.total() - counts.zero
}

fn per_second(bytes: u64, seconds: f64) -> u64 {
    let micros = (seconds * 1e6).max(1.0);
    // Both are far below 2^53; the quotient of two non-negative numbers fits.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a display value; saturates")]
    let rate = (bytes as f64 * 1e6 / micros) as u64;
    rate
}

fn lock(guest: &Guest) -> std::sync::MutexGuard<'_, Box<dyn PagedSource>> {
    guest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_LONGEST: Duration = Duration::from_secs(5);
const LAST_WORDS: Duration = Duration::from_secs(2);
