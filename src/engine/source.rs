//! The source end of one migration.

mod ledger;
mod messages;
mod order;
mod outage;
mod restart;
mod rounds;
mod shown;
mod switch;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::engine::commit_question::CommitQuestion;
use crate::engine::digest::KeptUp;
use crate::engine::error::may_be_forgotten;
use crate::engine::handoff::{Binding, Evidence, Failed, blocking, joined};
use crate::engine::lanes::{LaneReport, LaneRound, Packing, SourceLane};
use crate::engine::limiter::Limiter;
use crate::engine::link::send_within;
use crate::engine::meter::{Figures, Meter, Stopwatch};
use crate::engine::search::{self, Outage};
use crate::engine::witness::Exchange;
use crate::engine::{EngineError, Link};
use crate::hypervisor::PagedSource;
use crate::limits;
use crate::memory::{GuestRam, PageCounts, Tracker};
use crate::migration::{Goal, Outcome, Source, SourceAction, SourceEvent, SourceStep};
use crate::telemetry::{Phase, Progress};
use crate::transport::LaneHandle;
use crate::types::Round;
use crate::wire::{Failure, FinalDigest, Message, Resumed};
use ledger::Ledger;
pub(in crate::engine) use ledger::{LaneLedger, Reached};
pub use order::{AskCommit, Command, Manner, Redial, SourceEnd, SourceOrder, SourcePorts};
pub use restart::{continue_guest, continue_source};
use rounds::{Finals, RoundUnderWay};

type Guest = Arc<Mutex<Box<dyn PagedSource>>>;

struct Run {
    order: SourceOrder,
    evidence: Evidence,
    link: Link,
    guest: Guest,
    ram: Arc<GuestRam>,
    commit_question: CommitQuestion,
    redial: Redial,
    progress: watch::Sender<Progress>,
    machine: Source,
    binding: Option<Binding>,
    tracker: Option<Tracker>,
    ledger: Option<Ledger>,
    packing: Packing,
    lanes: Vec<mpsc::Sender<LaneRound>>,
    /// What each lane knows, whatever becomes of its connection.
    encoders: Vec<Arc<tokio::sync::Mutex<SourceLane>>>,
    /// Keeps the lanes' threads alive.
    threads: Vec<LaneHandle<()>>,
    /// Pages by how they were sent and UDP payload, by lane.
    carried: Vec<(PageCounts, u64)>,
    /// What each lane keeps to find differences and to look back to, bytes.
    tables: Vec<usize>,
    /// Time that each lane spent to make frames.
    busy: Vec<Duration>,
    /// UDP payload of connections that are gone.
    carried_before: u64,
    /// UDP payload of each lane's connection that was lost.
    left: Vec<u64>,
    reports: mpsc::Receiver<Result<LaneReport, EngineError>>,
    reports_in: mpsc::Sender<Result<LaneReport, EngineError>>,
    limiter: Arc<Limiter>,
    meter: Arc<Meter>,
    round: RoundUnderWay,
    /// Digests of the guest's memory, read ahead.
    kept_up: Option<KeptUp>,
    finals: Option<JoinHandle<Result<Finals, EngineError>>>,
    /// State and digests of the paused guest, until the destination has them.
    paused: Option<Arc<Finals>>,
    digest: Option<FinalDigest>,
    /// The destination has the last round.
    all_applied: bool,
    pause: Option<Stopwatch>,
    error: Option<EngineError>,
    /// REFUSE came, and why comes behind it.
    refused: bool,
    figures: Figures,
    /// Heads of audit logs.
    heads: Exchange,
    woken: bool,
    phase: Phase,
    started: Instant,
    /// When the guest that is paused goes on here, come what may.
    pause_ends: Option<Instant>,
    /// When a destination that was given the VM and does not answer is left to the gateway.
    doubt_ends: Option<Instant>,
    outage: Option<Outage<Resumed>>,
    /// When outages are no longer waited out, since something came of a session.
    patience: Option<Instant>,
    /// Why the link was lost, until that is dealt with.
    lost: Option<EngineError>,
    said: Instant,
    ended: Option<Option<Outcome>>,
}

/// Runs the source end until the VM's place is decided or in doubt. The attempt has begun at `began`, from which its timeout counts.
pub async fn run_source(order: SourceOrder, ports: SourcePorts, began: Instant) -> SourceEnd {
    let (mut run, commands) = Run::new(order, ports);
    run.started = began;
    let mut events = VecDeque::new();
    if let Err(error) = run.offer().await {
        events.push_back(run.broken(error));
    }
    run.run(commands, events).await
}

impl Run {
    fn new(order: SourceOrder, ports: SourcePorts) -> (Self, mpsc::Receiver<Command>) {
        let SourcePorts { evidence, link, guest, ask_commit, redial, progress, commands, share, path } = ports;
        let (reports_in, reports) = mpsc::channel(usize::from(limits::LANES_MAX) * 2);
        let ram = Arc::clone(guest.ram());
        let run = Self {
            machine: Source::new(order.goal),
            limiter: Arc::new(Limiter::new(order.limited(order.bandwidth), share)),
            guest: Arc::new(Mutex::new(guest)),
            round: RoundUnderWay::new(Round(0), false, 0, 0),
            binding: None,
            tracker: None,
            ledger: None,
            packing: Packing::new(&order.stream, &order.manner, ram.pages()),
            lanes: Vec::new(),
            encoders: Vec::new(),
            threads: Vec::new(),
            carried: Vec::new(),
            tables: Vec::new(),
            busy: Vec::new(),
            carried_before: 0,
            left: Vec::new(),
            meter: Arc::new(Meter::on(path)),
            kept_up: None,
            finals: None,
            paused: None,
            digest: None,
            all_applied: false,
            pause: None,
            error: None,
            refused: false,
            figures: Figures::default(),
            heads: Exchange::default(),
            woken: true,
            phase: Phase::Connect,
            started: Instant::now(),
            pause_ends: None,
            doubt_ends: None,
            outage: None,
            patience: None,
            lost: None,
            said: Instant::now(),
            ended: None,
            order,
            evidence,
            link,
            ram,
            commit_question: CommitQuestion::new(ask_commit),
            redial,
            progress,
            reports,
            reports_in,
        };
        (run, commands)
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut events: VecDeque<SourceEvent>) -> SourceEnd {
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
        self.finish(commands).await
    }

    async fn offer(&mut self) -> Result<(), EngineError> {
        self.show(|_| {});
        let guest = Arc::clone(&self.guest);
        let machine = blocking(move || Ok(lock(&guest).machine().clone())).await?;
        let offer = self.order.offer(&machine)?;
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

    /// When this has to be over as it is now: the migration, an outage, the pause, or the wait for an answer to COMMIT.
    fn deadline(&self) -> Option<Instant> {
        let outage = self.outage.as_ref().map(|outage| outage.ends);
        if self.machine.is_committed() {
            return outage.or(self.doubt_ends);
        }
        let end = self.order.timeout.map(|limit| self.started + limit);
        [end, outage.or(self.pause_ends)].into_iter().flatten().min()
    }

    fn deadline_passed(&mut self) -> Option<SourceEvent> {
        let vm = self.order.vm.clone();
        if self.machine.is_committed() {
            self.in_doubt();
            return None;
        }
        if self.outage.as_ref().is_some_and(|outage| outage.ends <= Instant::now()) {
            let error = self.outage_too_long();
            return Some(self.give_up(error));
        }
        let connected = self.outage.is_none();
        let paused_too_long = connected && self.pause_ends.take_if(|at| *at <= Instant::now()).is_some();
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
        if self.outage.is_none() && self.binding.is_some() && self.pause.is_none() {
            self.evidence.show_head_when_due(&self.link, self.order.migration).await;
        }
        if self.outage.is_some() || self.said.elapsed() < limits::PING_EVERY {
            return None;
        }
        match self.say(Message::Ping).await {
            Err(error) => Some(self.broken(error)),
            Ok(()) => None,
        }
    }

    /// What an outage may explain is waited out; anything else ends the attempt.
    fn broken(&mut self, error: EngineError) -> SourceEvent {
        if error.is_outage() || may_be_forgotten(&error) || (self.machine.is_committed() && matches!(error, EngineError::Transport { .. }))
        {
            self.note_cause(error);
            return SourceEvent::LinkLost;
        }
        self.give_up(error)
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
                    Ok(finals) => self.saved(Arc::new(finals)).await,
                    Err(error) => Some(self.give_up(error)),
                }
            }
            report = self.reports.recv() => match report {
                Some(Ok(report)) => self.lane_reported(report).await,
                // Once the destination has all of it lanes may close as they like.
                Some(Err(_)) if self.all_applied || self.machine.is_committed() => None,
                Some(Err(error)) => Some(self.broken(error)),
                None => None,
            },
            back = search::back(&mut self.outage) => self.back(back).await,
            message = self.link.session.receive(), if self.outage.is_none() => self.received(message).await,
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
                let limited = self.order.limited(limit);
                if limited != limit {
                    tracing::warn!(migration = %self.order.migration, bytes_per_second = ?limited, "policy permits no more bandwidth");
                }
                self.order.bandwidth = limit;
                self.limiter.set(limited);
                None
            }
            Some(Command::DowntimeMax(downtime_max)) => {
                Some(SourceEvent::SetGoal(Goal { downtime_max, ..*self.machine.convergence().goal() }))
            }
            // From COMMIT on the peer is owed an answer, whoever it is now.
            Some(Command::CheckPeer) if self.machine.is_committed() => None,
            Some(Command::CheckPeer) => self.link.admitted().err().map(|error| self.give_up(error)),
            Some(Command::Superseded) => None,
            // The registry keeps the other end until the migration has ended; without it nobody can cancel.
            None => Some(self.give_up(EngineError::Cancelled { vm: self.order.vm.clone() })),
        }
    }

    /// `committed` says whether COMMIT was journaled before these actions were decided.
    async fn perform_all(&mut self, actions: Vec<SourceAction>, committed: bool, events: &mut VecDeque<SourceEvent>) {
        for action in actions {
            let durable = matches!(&action, SourceAction::Handoff(step) if step.is_durable());
            let error = match self.perform(action).await {
                Ok(event) => {
                    events.extend(event);
                    continue;
                }
                Err(error) => error,
            };
            match Failed::of(&error, durable, committed || self.machine.is_committed()) {
                Failed::Owed => {
                    self.error = Some(error);
                    self.ended = Some(None);
                }
                Failed::Durable => {
                    tracing::error!(migration = %self.order.migration, error = %crate::telemetry::chain(&error), "not durable");
                    self.error.get_or_insert(error);
                    events.push_back(SourceEvent::Handoff(SourceStep::Failed));
                }
                Failed::Attempt => events.push_back(self.broken(error)),
            }
            return;
        }
    }

    async fn perform(&mut self, action: SourceAction) -> Result<Option<SourceEvent>, EngineError> {
        match action {
            SourceAction::Offer => self.offer().await.map(|()| None),
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
                self.commit_question.ask_ahead(&self.link.session);
                // A journal that cannot be written any more is found while the guest still runs: behind a COMMIT that
                // failed only a restart can tell who owns the guest, and until then it stands still.
                let journal = Arc::clone(&self.evidence.journal);
                joined(tokio::task::spawn_blocking(move || journal.reserve()).await)??;
                if let Some(refreshed) = self.kept_up.as_ref().map(KeptUp::refresh) {
                    self.alive_through(refreshed).await?;
                }
                // Whom policy denies the switch need not stand still for that.
                self.commit_question.settled().await?;
                self.phase = Phase::Switchover;
                self.pause = Some(Stopwatch::start());
                self.pause_ends = Some(Instant::now() + self.pause_max());
                let guest = Arc::clone(&self.guest);
                blocking(move || Ok(lock(&guest).pause()?)).await?;
                self.lap("pause");
                Ok(Some(SourceEvent::Paused))
            }
            SourceAction::SendLast(round) => self.send_last(round).await.map(|()| None),
            SourceAction::SendLastAgain(round) => self.send_last_again(round).await,
            SourceAction::Reconnect => {
                self.link_lost().await;
                Ok(None)
            }
            SourceAction::GoOn => self.go_on().await.map(|()| None),
            SourceAction::NotConverging(verdict) => Err(EngineError::NotConverging { vm: self.order.vm.clone(), verdict }),
            SourceAction::Handoff(action) => self.handoff(action).await,
        }
    }

    fn lap(&mut self, what: &'static str) {
        if let Some(watch) = &mut self.pause {
            watch.lap(what);
        }
    }
}

fn lock(guest: &Guest) -> std::sync::MutexGuard<'_, Box<dyn PagedSource>> {
    guest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
