//! The source end of a stream.

mod disks;
mod outage;
mod path;
mod split;
mod switch;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::intake::Intake;
use super::lanes::{SendShared, send_lane};
use super::outflow::Outflow;
use super::{Broken, Whole};
use crate::condense::{Condenser, Grammar};
use crate::engine::commit_question::CommitQuestion;
use crate::engine::error::may_be_forgotten;
use crate::engine::frames::Frames;
use crate::engine::handoff::{Binding, Evidence, Failed, blocking, joined};
use crate::engine::limiter::Limiter;
use crate::engine::link::send_within;
use crate::engine::meter::{Figures, Meter, Stopwatch};
use crate::engine::search::{self, Outage};
use crate::engine::source::{Command, Redial, SourceEnd, SourceOrder, SourcePorts};
use crate::engine::witness::Exchange;
use crate::engine::{EngineError, Link};
use crate::hypervisor::{HypervisorError, StreamGoal, StreamProgress, StreamSource, StreamStage, Streams};
use crate::journal::JournalError;
use crate::limits;
use crate::migration::{Outcome, SourceStep, StreamSource as Machine, StreamSourceAction, StreamSourceEvent};
use crate::telemetry::{Phase, Progress, chain};
use crate::transport::{LaneHandle, TransportError};
use crate::types::LaneIndex;
use crate::wire::{DISK_FEATURE, Failure, Message, POST_COPY_FEATURE, STREAM_FEATURE, StreamResumed, URGENT_FEATURE};
use disks::Disks;
use split::WayBack;

type Guest = Arc<Mutex<Box<dyn StreamSource>>>;

struct Run {
    order: SourceOrder,
    evidence: Evidence,
    link: Link,
    guest: Guest,
    commit_question: CommitQuestion,
    redial: Redial,
    progress: watch::Sender<Progress>,
    machine: Machine,
    binding: Option<Binding>,
    flow: Arc<Outflow>,
    disks: Option<Disks>,
    /// What a guest needs that may be split.
    way_back: Option<WayBack>,
    /// What came until it was.
    split: watch::Receiver<Option<Whole>>,
    /// Whether FINAL was said.
    finalised: bool,
    /// Whether a guest that was split lacks nothing, and that was said.
    emptied: bool,
    stages: watch::Receiver<StreamStage>,
    reading: Option<JoinHandle<Result<Whole, Broken>>>,
    /// Makes room in the journal while the hypervisor writes the rest of a guest that stands still.
    reserving: Option<JoinHandle<Result<(), JournalError>>>,
    condenser: Arc<Mutex<Condenser>>,
    /// All of the stream, once it was read.
    whole: Option<Whole>,
    goal: StreamGoal,
    /// What of it the hypervisor was told until now.
    told: StreamGoal,
    guest_bytes: u64,
    lanes: u16,
    /// Keeps the lanes' threads alive.
    threads: Vec<LaneHandle<()>>,
    failures: mpsc::Receiver<EngineError>,
    failures_in: mpsc::Sender<EngineError>,
    limiter: Arc<Limiter>,
    meter: Arc<Meter>,
    /// UDP payload of connections that are gone.
    carried_before: u64,
    said: StreamProgress,
    looked: path::Looked,
    /// What the path has lately taken in a second, bytes of parcels.
    path_rate: f64,
    asked: Instant,
    pause: Option<Stopwatch>,
    error: Option<EngineError>,
    /// REFUSE came, and why comes behind it.
    refused: bool,
    heads: Exchange,
    figures: Figures,
    woken: bool,
    phase: Phase,
    started: Instant,
    /// When the guest that is paused goes on here, come what may.
    pause_ends: Option<Instant>,
    /// When a destination that was given the VM and does not answer is left to the gateway.
    doubt_ends: Option<Instant>,
    outage: Option<Outage<StreamResumed>>,
    /// When outages are no longer waited out, since something came of a session.
    patience: Option<Instant>,
    lost: Option<EngineError>,
    heard_from_us: Instant,
    /// What came while the hypervisor was asked something.
    backlog: VecDeque<Result<Message, TransportError>>,
    ended: Option<Option<Outcome>>,
}

/// Runs the source end of a hypervisor's own stream until the VM's place is decided or in doubt. The attempt has begun at `began`,
/// from which its timeout counts.
pub async fn run_stream_source(order: SourceOrder, ports: SourcePorts<dyn StreamSource>, began: Instant) -> SourceEnd {
    let SourcePorts { evidence, link, guest, ask_commit, redial, progress, commands, share, path } = ports;
    let (failures_in, failures) = mpsc::channel(usize::from(limits::LANES_MAX));
    let goal = StreamGoal { downtime_max: order.goal.downtime_max, throttle: order.goal.throttle };
    let guest_bytes = guest.machine().regions.iter().map(|region| region.bytes).sum();
    let (all, disks_only) = (guest.machine().disks.clone(), guest.machine().disks_only);
    let disks = order.disks.clone().filter(|_| !all.is_empty()).map(|order| Disks::new(order, all, disks_only));
    let way_back = guest.machine().mode.may_split().then(|| WayBack::new(guest.machine().mode, guest.grammar()));
    let flow = Arc::new(Outflow::new(order.limited(order.bandwidth)));
    let mut run = Run {
        limiter: Arc::new(Limiter::new(order.limited(order.bandwidth), share)),
        stages: guest.stages(),
        condenser: Arc::new(Mutex::new(path::condenser(&order, guest.grammar(), guest_bytes))),
        guest: Arc::new(Mutex::new(guest)),
        machine: match disks {
            _ if disks_only => Machine::disks_only(),
            Some(_) => Machine::with_disks(),
            None => Machine::default(),
        },
        binding: None,
        split: flow.split(),
        flow,
        disks,
        way_back,
        finalised: false,
        emptied: false,
        reading: None,
        reserving: None,
        whole: None,
        goal,
        told: path::goal_in_round(goal, 0),
        guest_bytes,
        lanes: 0,
        threads: Vec::new(),
        meter: Arc::new(Meter::on(path)),
        carried_before: 0,
        said: StreamProgress::default(),
        looked: path::Looked { at: began, applied: 0, read: 0, taken: 0, rtt: None },
        path_rate: 0.0,
        asked: began,
        pause: None,
        error: None,
        refused: false,
        heads: Exchange::default(),
        figures: Figures::default(),
        woken: true,
        phase: Phase::Connect,
        started: began,
        pause_ends: None,
        doubt_ends: None,
        outage: None,
        patience: None,
        lost: None,
        heard_from_us: Instant::now(),
        backlog: VecDeque::new(),
        ended: None,
        order,
        evidence,
        link,
        commit_question: CommitQuestion::new(ask_commit),
        redial,
        progress,
        failures,
        failures_in,
    };
    let lost = run.offer().await.err().map(|error| run.broken(error));
    run.run(commands, lost.into_iter().collect()).await
}

impl Run {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut events: VecDeque<StreamSourceEvent>) -> SourceEnd {
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        while self.ended.is_none() {
            let Some(event) = events.pop_front() else {
                let next = self.next(&mut commands, &mut tick).await;
                events.extend(next);
                continue;
            };
            let given_up_early = matches!(event, StreamSourceEvent::GiveUp(_)) && self.binding.is_none();
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
        self.show();
        if !self.link.negotiated.has(STREAM_FEATURE) {
            let reason = "it does not carry streams of hypervisors";
            return Err(EngineError::peer(self.order.migration, crate::wire::ErrorClass::PeerIncompatible, reason));
        }
        let machine = lock(&self.guest).machine().clone();
        if self.way_back.is_some() && !self.link.negotiated.has(POST_COPY_FEATURE) {
            let reason = "it does not take guests that run before all of their pages are there";
            return Err(EngineError::peer(self.order.migration, crate::wire::ErrorClass::PeerIncompatible, reason));
        }
        if self.disks.is_some() && !self.link.negotiated.has(DISK_FEATURE) {
            let reason = "it does not take disks";
            return Err(EngineError::peer(self.order.migration, crate::wire::ErrorClass::PeerIncompatible, reason));
        }
        let offer = self.order.offer(&machine)?;
        self.say(Message::Offer(offer)).await
    }

    async fn say(&mut self, message: Message) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let left = self.deadline().map_or(limits::SEND_WITHIN, |at| at.saturating_duration_since(Instant::now()));
        let sent = send_within(&self.link.session, &message, left.min(limits::SEND_WITHIN)).await;
        self.heard_from_us = Instant::now();
        sent.map_err(|source| EngineError::Transport { migration, source })
    }

    /// When this has to be over as it is now: the migration, an outage, the pause, or the wait for an answer to COMMIT.
    fn deadline(&self) -> Option<Instant> {
        let outage = self.outage.as_ref().map(|outage| outage.ends);
        if self.machine.is_committed() {
            // A guest that was split needs what is here, however long that takes.
            return outage.or(self.doubt_ends).filter(|_| !self.is_split());
        }
        let end = self.order.timeout.map(|limit| self.started + limit);
        // Unlike one whose pages are read, a guest that its hypervisor has stopped stays so in an outage: the pause has an end.
        [end, outage, self.pause_ends].into_iter().flatten().min()
    }

    fn deadline_passed(&mut self) -> Option<StreamSourceEvent> {
        let (vm, now) = (self.order.vm.clone(), Instant::now());
        if self.machine.is_committed() {
            self.error = Some(EngineError::InDoubt { vm, migration: self.order.migration });
            self.ended = Some(None);
            return None;
        }
        if self.outage.as_ref().is_some_and(|outage| outage.ends <= now) {
            let source = self.outage.as_mut().and_then(|outage| outage.cause.take()).map(Box::new);
            let (migration, limit) = (self.order.migration, self.order.outage_max);
            return Some(self.give_up(EngineError::Outage { vm, migration, limit, source }));
        }
        let paused_too_long = self.pause_ends.take_if(|at| *at <= now).is_some();
        let error = match self.order.timeout.take_if(|_| !paused_too_long) {
            Some(limit) => EngineError::TimedOut { vm, limit },
            None => EngineError::PausedTooLong { vm, limit: self.pause_max() },
        };
        Some(self.give_up(error))
    }

    fn pause_max(&self) -> Duration {
        let disks = self.disks.as_ref().map_or(Duration::ZERO, Disks::pause);
        limits::PAUSE_SLACK + (self.goal.downtime_max + self.order.goal.fixed_cost) * 10 + disks
    }

    /// What an outage may explain is waited out; anything else ends the attempt.
    fn broken(&mut self, error: EngineError) -> StreamSourceEvent {
        let committed = self.machine.is_committed() && matches!(error, EngineError::Transport { .. });
        if error.is_outage() || may_be_forgotten(&error) || committed {
            tracing::warn!(migration = %self.order.migration, state = self.machine.name(), error = %chain(&error), "link lost");
            match &mut self.outage {
                Some(outage) => drop(outage.cause.get_or_insert(error)),
                None => self.lost = Some(error),
            }
            return StreamSourceEvent::LinkLost;
        }
        self.give_up(error)
    }

    /// Keeps the first error, which is the cause, and asks the machine to give up.
    fn give_up(&mut self, error: EngineError) -> StreamSourceEvent {
        let class = error.class();
        tracing::debug!(migration = %self.order.migration, state = self.machine.name(), error = %chain(&error), "gives up");
        self.error.get_or_insert(error);
        StreamSourceEvent::GiveUp(class)
    }

    async fn say_failure(&mut self) {
        if let Some(error) = &self.error {
            let reason: String = chain(error).chars().take(limits::REASON_BYTES_MAX / 4).collect();
            let _ = self.say(Message::Failure(Failure { class: error.class(), reason })).await;
        }
    }

    /// Waits for whatever happens next.
    async fn next(&mut self, commands: &mut mpsc::Receiver<Command>, tick: &mut tokio::time::Interval) -> Option<StreamSourceEvent> {
        if let Some(message) = self.backlog.pop_front() {
            return self.received(message).await;
        }
        let deadline = self.deadline();
        let read = async {
            match &mut self.reading {
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
        let staged = async {
            match self.stages.changed().await {
                Ok(()) => {}
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // Before what the hypervisor says of it: a stream that is refused here fails there too.
            read = read => {
                self.reading = None;
                self.was_read(read).await
            }
            () = staged => self.staged().await,
            () = split::seen(&mut self.split) => self.finalised().await,
            happened = split::happened(&mut self.way_back), if self.outage.is_none() => self.way_back_happened(happened).await,
            settled = disks::settled(&mut self.disks) => self.was_settled(settled).await,
            Some(error) = self.failures.recv() => self.lane_failed(error),
            back = search::back(&mut self.outage) => self.back(back).await,
            message = self.link.session.receive(), if self.outage.is_none() => self.received(message).await,
            command = commands.recv() => self.commanded(command).await,
            () = timed_out => self.deadline_passed(),
            _ = tick.tick() => {
                self.look_at_path().await;
                self.split_when_due().await;
                if let Some(event) = self.look_at_disks().await {
                    return Some(event);
                }
                self.show();
                self.sign_of_life().await
            }
        }
    }

    fn lane_failed(&mut self, error: EngineError) -> Option<StreamSourceEvent> {
        // Once the destination has all of it lanes may close as they like.
        let has_all = self.has_all();
        if has_all || (self.machine.is_committed() && !self.is_split()) { None } else { Some(self.broken(error)) }
    }

    /// The hypervisor has come further. `Complete` and the end of its stream come in any order.
    async fn staged(&mut self) -> Option<StreamSourceEvent> {
        let stage = *self.stages.borrow_and_update();
        tracing::debug!(migration = %self.order.migration, ?stage, "hypervisor");
        match stage {
            StreamStage::Stopped => {
                self.commit_question.ask_ahead(&self.link.session);
                crate::failpoint::hit!("source.paused");
                self.phase = Phase::Switchover;
                self.pause = Some(Stopwatch::start());
                self.pause_ends = Some(Instant::now() + self.pause_max());
                self.limiter.set_final(true);
                Some(StreamSourceEvent::Stopped)
            }
            StreamStage::Complete | StreamStage::Split => self.finalised().await,
            StreamStage::Failed if self.machine.is_committed() && self.is_split() => {
                let why = self.why_failed().await;
                self.left_without(&why)
            }
            StreamStage::Failed if self.reading.is_some() || self.whole.is_some() => {
                let why = self.why_failed().await;
                Some(self.give_up(why))
            }
            StreamStage::Failed | StreamStage::Idle | StreamStage::Flowing => None,
        }
    }

    async fn why_failed(&self) -> EngineError {
        let guest = Arc::clone(&self.guest);
        let asked = blocking(move || Ok(lock(&guest).failure())).await;
        asked.map_or_else(|error| error, EngineError::from)
    }

    async fn was_read(&mut self, read: Result<Result<Whole, Broken>, tokio::task::JoinError>) -> Option<StreamSourceEvent> {
        match joined(read) {
            Ok(Ok(whole)) => {
                self.whole = Some(whole);
                if self.finalised
                    && let Err(error) = self.say_end(whole).await
                {
                    return Some(self.broken(error));
                }
                self.finalised().await
            }
            Ok(Err(broken)) => {
                let error = broken.of_hypervisor(&self.order.vm, "cannot read the hypervisor's stream").into();
                if self.machine.is_committed() { self.left_without(&error) } else { Some(self.give_up(error)) }
            }
            Err(error) => Some(self.give_up(error)),
        }
    }

    async fn commanded(&mut self, command: Option<Command>) -> Option<StreamSourceEvent> {
        match command {
            Some(Command::Bandwidth(limit)) => {
                self.order.bandwidth = limit;
                self.limiter.set(self.order.limited(limit));
                None
            }
            Some(Command::DowntimeMax(downtime_max)) => {
                self.goal.downtime_max = downtime_max;
                let goal = path::goal_in_round(self.goal, self.said.rounds);
                self.told = goal;
                if self.phase == Phase::Memory
                    && let Err(error) = self.beside(move |guest| guest.set_goal(goal)).await
                {
                    tracing::warn!(migration = %self.order.migration, error = %chain(&error), "the hypervisor does not take another goal");
                }
                None
            }
            // From COMMIT on the peer is owed an answer, whoever it is now.
            Some(Command::CheckPeer) if self.machine.is_committed() => None,
            Some(Command::CheckPeer) => self.link.admitted().err().map(|error| self.give_up(error)),
            Some(Command::Superseded) => None,
            // The registry keeps the other end until the migration has ended; without it nobody can cancel.
            Some(Command::Cancel) | None => Some(self.give_up(EngineError::Cancelled { vm: self.order.vm.clone() })),
        }
    }

    /// A destination that hears nothing for too long takes this for lost.
    async fn sign_of_life(&mut self) -> Option<StreamSourceEvent> {
        if self.outage.is_none() && self.binding.is_some() && self.pause.is_none() {
            self.evidence.show_head_when_due(&self.link, self.order.migration).await;
        }
        if self.outage.is_some() || self.heard_from_us.elapsed() < limits::PING_EVERY {
            return None;
        }
        match self.say(Message::Ping).await {
            Err(error) => Some(self.broken(error)),
            Ok(()) => None,
        }
    }

    async fn perform_all(&mut self, actions: Vec<StreamSourceAction>, committed: bool, events: &mut VecDeque<StreamSourceEvent>) {
        for action in actions {
            let durable = matches!(&action, StreamSourceAction::Handoff(step) if step.is_durable());
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
                    tracing::error!(migration = %self.order.migration, error = %chain(&error), "not durable");
                    self.error.get_or_insert(error);
                    events.push_back(StreamSourceEvent::Handoff(SourceStep::Failed));
                }
                Failed::Attempt => events.push_back(self.broken(error)),
            }
            return;
        }
    }

    async fn perform(&mut self, action: StreamSourceAction) -> Result<Option<StreamSourceEvent>, EngineError> {
        match action {
            StreamSourceAction::Offer => self.offer().await.map(|()| None),
            StreamSourceAction::Begin { lanes } => self.begin(lanes).await.map(|()| None),
            StreamSourceAction::Mirror { lanes } => self.mirror(lanes).await.map(|()| None),
            StreamSourceAction::Settle => self.settle().map(|()| None),
            StreamSourceAction::GoOn => {
                let journal = Arc::clone(&self.evidence.journal);
                // In this order: there may be one thread for both.
                let reserve = async { Some(tokio::task::spawn_blocking(move || journal.reserve())) };
                let (gone_on, reserving) = tokio::join!(self.beside(|guest| guest.go_on()), reserve);
                self.reserving = reserving;
                gone_on?;
                self.lap("pause");
                Ok(None)
            }
            StreamSourceAction::Reconnect => {
                self.link_lost().await;
                Ok(None)
            }
            StreamSourceAction::Handoff(action) => self.handoff(action).await,
        }
    }

    async fn begin(&mut self, lanes: u16) -> Result<(), EngineError> {
        self.lanes = lanes;
        let journal = Arc::clone(&self.evidence.journal);
        joined(tokio::task::spawn_blocking(move || journal.reserve()).await)??;
        let (goal, rate_max) = (self.told, self.order.limited(self.order.bandwidth));
        // What was said before this migration is none of its affair.
        self.stages.borrow_and_update();
        let beside = self.way_back.is_some() && self.link.negotiated.has(URGENT_FEATURE);
        let begun = self.beside(move |guest| {
            rate_max.map_or(Ok(()), |rate| guest.set_path_rate(rate))?;
            guest.begin(goal, beside)
        });
        let Streams { main, others, urgent } = begun.await?;
        let local = |source| {
            let what = "cannot read the hypervisor's stream";
            EngineError::Hypervisor(HypervisorError::Local { vm: self.order.vm.to_string(), what, source })
        };
        let usable = |stream: std::os::unix::net::UnixStream| {
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        };
        let (read, write) = usable(main).map_err(local)?.into_split();
        let others = others.into_iter().map(usable).collect::<Result<Vec<_>, _>>().map_err(local)?;
        let grammar = lock(&self.guest).grammar();
        if let Some(way_back) = self.way_back.as_mut().filter(|_| beside) {
            way_back.open_urgent(urgent, grammar.clone(), self.flow.ended());
        }
        let intake = match grammar {
            Grammar::Qemu(expected) if !others.is_empty() => Intake::several(read, others, *expected),
            _ => Intake::One(read),
        };
        let (flow, condenser) = (Arc::clone(&self.flow), Arc::clone(&self.condenser));
        // Without a way back it is kept as long as there is something to read.
        let unused = match &mut self.way_back {
            Some(way_back) => way_back.open(write),
            None => Some(write),
        };
        self.reading = Some(tokio::spawn(async move {
            let read = flow.read_from(intake, &condenser).await;
            drop(unused);
            read
        }));
        self.phase = Phase::Memory;
        // With disks they are open, or will be when the link is back.
        if self.disks.is_some() { Ok(()) } else { self.open_lanes().await }
    }

    /// Every lane joins, on the session that stands now.
    async fn open_lanes(&mut self) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let shared = SendShared {
            migration,
            flow: Arc::clone(&self.flow),
            disks: self.disks.as_ref().map(|disks| Arc::clone(&disks.out)),
            terms: self.order.stream.clone(),
            level: self.order.manner.zstd_level,
            lane_bytes: self.guest_bytes / u64::from(self.lanes.max(1)),
            limiter: Arc::clone(&self.limiter),
            meter: Arc::clone(&self.meter),
            frames: Frames::default(),
            failures: self.failures_in.clone(),
        };
        for lane in (0..self.lanes).map(LaneIndex) {
            let shared = shared.clone();
            let opened = self.link.session.open_lane(migration, lane, move |io| send_lane(io, shared)).await;
            self.threads.push(opened.map_err(|source| EngineError::Transport { migration, source })?);
        }
        crate::failpoint::hit!("source.lanes-open");
        Ok(())
    }

    fn lap(&mut self, what: &'static str) {
        if let Some(watch) = &mut self.pause {
            watch.lap(what);
        }
    }
}

fn lock(guest: &Guest) -> MutexGuard<'_, Box<dyn StreamSource>> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
