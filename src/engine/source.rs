//! The source end of one migration.

mod rounds;
mod switch;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::engine::handoff::{Binding, Evidence, blocking, joined};
use crate::engine::lanes::{LaneReport, LaneRound};
use crate::engine::limiter::Limiter;
use crate::engine::link::send_within;
use crate::engine::meter::{Figures, Meter, Stopwatch};
use crate::engine::{EngineError, Link};
use crate::hypervisor::PagedSource;
use crate::limits;
use crate::memory::{GuestRam, PageCounts, Tracker};
use crate::migration::{Goal, OfferRecord, Outcome, Source, SourceAction, SourceEvent, SourceStep};
use crate::telemetry::{Phase, Progress};
use crate::transport::{LaneHandle, TransportError};
use crate::types::{Epoch, MigrationId, Round, VmName, VmUuid};
use crate::wire::{AuditHead, Failure, FinalDigest, Handoff, Message, Offer, StreamTerms};
use rounds::{Finals, RoundUnderWay};
use switch::RECONNECT_FIRST;

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

/// Asks policy and identity again, at commit. The error says who denies it, or why the answer cannot be had.
pub type AskCommit = Arc<dyn Fn() -> Result<(), EngineError> + Send + Sync>;
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
#[derive(Debug)]
pub struct SourceEnd {
    /// Where the VM is; `None` when that is in doubt.
    pub outcome: Option<Outcome>,
    /// False when the guest stays and could not be made to go on: its journal says that it has to.
    pub woken: bool,
    /// Why it did not move.
    pub error: Option<EngineError>,
    /// The figures.
    pub figures: Figures,
}

impl std::fmt::Debug for SourcePorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourcePorts").field("peer", &self.link.peer.spiffe).finish_non_exhaustive()
    }
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
    /// REFUSE came, and why comes behind it.
    refused: bool,
    figures: Figures,
    woken: bool,
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
        refused: false,
        figures: Figures::default(),
        woken: true,
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
    run.run(commands).await
}

impl Run {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> SourceEnd {
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
            let committed = self.machine.is_committed();
            match self.machine.step(event) {
                Ok(actions) => self.perform_all(actions, committed, &mut events).await,
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

    /// Waits for work that may be long, and says meanwhile that the source lives.
    async fn alive_through<T>(&mut self, work: impl Future<Output = Result<T, EngineError>>) -> Result<T, EngineError> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => return result,
                // Whether it arrives is seen where messages are read.
                () = tokio::time::sleep(limits::PING_EVERY) => drop(self.say(Message::Ping).await),
            }
        }
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
                if self.binding.is_none()
                    && accept.migration == self.order.migration
                    && (1..=self.order.stream.lanes).contains(&accept.lanes) =>
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
                            self.refused = true;
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
        if self.evidence.keep_peer_head(&self.link.peer, &head.checkpoint).await {
            self.figures.peer_audit_head = Some(head.checkpoint);
        }
    }

    /// `committed` says whether COMMIT was journaled before these actions were decided.
    async fn perform_all(&mut self, actions: Vec<SourceAction>, committed: bool, events: &mut VecDeque<SourceEvent>) {
        for action in actions {
            match self.perform(action).await {
                Ok(event) => events.extend(event),
                Err(error) => {
                    if committed || self.machine.is_committed() {
                        // The record may or may not be on disk: only what is read back from it can tell.
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
                // A journal that cannot be written any more is found while the guest still runs: behind a COMMIT that
                // failed only a restart can tell who owns the guest, and until then it stands still.
                let journal = Arc::clone(&self.evidence.journal);
                joined(tokio::task::spawn_blocking(move || journal.counter("switchovers")).await)??;
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

    fn lap(&mut self, what: &'static str) {
        if let Some(watch) = &mut self.pause {
            watch.lap(what);
        }
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
