//! The destination end of one migration.

mod messages;
mod order;
mod outage;
mod progress;
mod watch;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::commit_question::CommitQuestion;
use crate::engine::digest::{KeptUp, digest_kept, digest_totals, totals_differ};
use crate::engine::handoff::{Binding, Evidence, Failed, blocking, joined};
use crate::engine::lanes::{Applied, Decoders, LaneReport, ReceiveShared, Seal, decoders, decoders_after_restart, receive_lane};
use crate::engine::link::send_within;
use crate::engine::source::Command;
use crate::engine::witness::Exchange;
use crate::engine::{DiskFigures, EngineError, Link};
use crate::hypervisor::PagedDestination;
use crate::limits;
use crate::memory::GuestRam;
use crate::migration::{Destination, DestinationAction, DestinationEvent, DestinationRecord, DestinationStep, HandoffAction, Outcome};
use crate::storage::write_image;
use crate::transport::LaneGate;
use crate::types::{LaneIndex, Round};
use crate::wire::{Accept, Durability, ErrorClass, Failure, FinalDigest, LaneStanding, LaneTotals, Message, Offer, Resumed, RoundApplied};

use messages::StateBuffer;
pub use order::{DestinationEnd, DestinationOrder, Return};
pub(super) use progress::Progress;
pub(in crate::engine) use watch::Watch;

type Twin = Arc<Mutex<Box<dyn PagedDestination>>>;

struct Run {
    order: Offer,
    lanes: u16,
    /// What the source is told to send at most, bytes a second.
    bandwidth_max: Option<NonZeroU64>,
    evidence: Evidence,
    link: Link,
    twin: Twin,
    ram: Arc<GuestRam>,
    commit_question: CommitQuestion,
    binding: Binding,
    machine: Destination,
    gate: Option<LaneGate>,
    decoders: Decoders,
    /// Time that each lane spent to make pages of frames.
    busy: Vec<Duration>,
    /// Room for what is promised, made in the journal ahead of the pause.
    room: Option<tokio::task::JoinHandle<Result<(), crate::journal::JournalError>>>,
    /// Digests of what was received, read as it comes.
    kept_up: Option<KeptUp>,
    progress: Option<Arc<Progress>>,
    reports: mpsc::Receiver<Result<LaneReport, EngineError>>,
    seal: Arc<Seal>,
    watch: Watch,
    rounds: Rounds,
    heads: Exchange,
    state: StateBuffer,
    final_said: Option<FinalDigest>,
    commands: mpsc::Receiver<Command>,
    returns: mpsc::Receiver<Return>,
    outage_max: Duration,
    /// Since when the link is away.
    lost: Option<Instant>,
    /// What RESUMED said last, and in answer to which round.
    resumed: Option<(Round, Vec<LaneStanding>)>,
    policy_digest: [u8; 32],
    error: Option<EngineError>,
    ended: Option<Option<Outcome>>,
}

/// Which lanes have applied how much, and what the source says that it sent.
struct Rounds {
    applied: Vec<(Round, LaneTotals)>,
    said: Option<(Round, bool, Vec<LaneTotals>)>,
    /// When the one under way began.
    since: Instant,
}

/// Runs the destination end until the VM's place is decided, or the source has to be waited for.
pub async fn run_destination(order: DestinationOrder) -> DestinationEnd {
    let DestinationOrder { offer, lanes, evidence, link, twin, ask_commit, policy_digest, bandwidth_max, commands, .. } = order;
    let DestinationOrder { returns, outage_max, progress, comes_back_in, .. } = order;
    let ram = Arc::clone(twin.ram());
    // Nobody but the lanes writes it before the state is restored, so all of it need not be read in the pause.
    let kept_up = offer.stream.verify.then(|| KeptUp::start(&ram));
    let binding = Binding {
        migration: offer.migration,
        vm: offer.vm.clone(),
        uuid: offer.uuid,
        epoch: offer.epoch.next(),
        peer: link.peer.spiffe.clone(),
        peer_incarnation: link.peer.incarnation,
        peer_key: link.peer.signing_key,
        address: twin.address(),
    };
    let mut run = Run {
        lanes,
        bandwidth_max,
        evidence,
        link,
        twin: Arc::new(Mutex::new(twin)),
        decoders: decoders(lanes, &offer.stream, ram.pages(), kept_up.as_ref()),
        kept_up,
        room: None,
        busy: vec![Duration::ZERO; usize::from(lanes)],
        ram,
        commit_question: CommitQuestion::new(ask_commit),
        binding,
        machine: comes_back_in.map_or_else(Destination::default, Destination::after_restart),
        progress: None,
        gate: None,
        reports: mpsc::channel(1).1,
        seal: Arc::default(),
        watch: Watch::default(),
        rounds: Rounds { applied: Vec::new(), said: None, since: Instant::now() },
        heads: Exchange::default(),
        state: StateBuffer::default(),
        final_said: None,
        commands,
        returns,
        outage_max,
        lost: None,
        resumed: None,
        policy_digest,
        error: None,
        ended: None,
        order: offer,
    };
    let first = run.begin(progress, comes_back_in.is_some()).await;
    run.run(first).await
}

impl Run {
    async fn run(mut self, first: Result<(), EngineError>) -> DestinationEnd {
        crate::failpoint::hit!("destination.accept.after");
        let mut events = VecDeque::new();
        if let Err(error) = first {
            events.extend(self.broken(error).await);
        }
        let mut tick = tokio::time::interval(WATCH_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while self.ended.is_none() {
            let Some(event) = events.pop_front() else {
                let next = self.next(&mut tick).await;
                events.extend(next);
                continue;
            };
            match self.machine.step(event) {
                Ok(actions) => self.perform_all(actions, &mut events).await,
                Err(refusal) if self.machine.is_prepared() => {
                    tracing::warn!(migration = %self.order.migration, %refusal, "ignored after PREPARED")
                }
                Err(refusal) => events.push_back(self.give_up(refusal.into())),
            }
        }
        if self.ended == Some(Some(Outcome::Stayed)) && self.order.stream.durability != Durability::None {
            // One that was written before anything was promised.
            if let Err(error) = self.evidence.forget_image(self.binding.migration).await {
                tracing::warn!(migration = %self.order.migration, error = %crate::telemetry::chain(&error), "an image of nobody stays behind");
            }
        }
        if let Some(error) = &self.error {
            let reason: String = crate::telemetry::chain(error).chars().take(limits::REASON_BYTES_MAX / 4).collect();
            let _ = self.say(Message::Failure(Failure { class: error.class(), reason })).await;
        }
        // The source closes when it has read the last word; closing first could lose it on the way.
        self.evidence.finish_heads(&self.link, self.order.migration, &mut self.heads, true, LINGER).await;
        // Lanes that close before the last word was read look like an outage.
        drop(self.gate.take());
        DestinationEnd {
            outcome: self.ended.flatten(),
            error: self.error,
            address: self.binding.address,
            decode: self.busy.iter().sum(),
            disks: DiskFigures::default(),
        }
    }

    /// Takes the offer, or says what an earlier gateway has received of it.
    async fn begin(&mut self, progress: Option<PathBuf>, comes_back: bool) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let progress = progress.map(|path| Progress::open(&path)).transpose();
        self.progress = progress.map_err(|source| EngineError::Progress { migration, source })?.map(Arc::new);
        let noted = |lane| self.progress.as_ref().map_or_else(LaneStanding::default, |progress| progress.of(lane));
        let lanes: Vec<LaneStanding> = (0..self.lanes).map(LaneIndex).map(noted).collect();
        if comes_back {
            self.decoders = decoders_after_restart(&self.order.stream, self.ram.pages(), &lanes, self.kept_up.as_ref());
        }
        self.expect_lanes()?;
        if !comes_back {
            return self.accept().await;
        }
        self.say(Message::Resumed(Resumed { migration, deciding: false, bandwidth_max: self.bandwidth_max, lanes })).await
    }

    /// Lets every lane join, on the session that stands now; what they carried counts from 0.
    fn expect_lanes(&mut self) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let (reports_in, reports) = mpsc::channel(usize::from(limits::LANES_MAX) * 2);
        self.reports = reports;
        self.seal = Arc::default();
        let applied = vec![(Round(0), LaneTotals::default()); usize::from(self.lanes)];
        self.rounds = Rounds { applied, said: None, since: Instant::now() };
        for (progress, lane) in self.progress.iter().flat_map(|progress| (0..self.lanes).map(move |lane| (progress, LaneIndex(lane)))) {
            progress.note(lane, LaneStanding::default()).map_err(|source| EngineError::Progress { migration, source })?;
        }
        let shared = ReceiveShared {
            migration,
            ram: Arc::clone(&self.ram),
            decoders: Arc::clone(&self.decoders),
            progress: self.progress.clone(),
            meter: Arc::clone(&self.watch.meter),
            seal: Arc::clone(&self.seal),
            applied: Applied::new(self.lanes),
            reports: reports_in,
        };
        let handler = Arc::new(move |io| Box::pin(receive_lane(io, shared.clone())) as _);
        let gate = self.link.session.expect_lanes(migration, self.lanes, handler);
        self.gate = Some(gate.map_err(|source| EngineError::Transport { migration, source })?);
        Ok(())
    }

    async fn accept(&mut self) -> Result<(), EngineError> {
        crate::failpoint::hit!("destination.accept.before");
        self.say(Message::Accept(Accept {
            migration: self.order.migration,
            lanes: self.lanes,
            policy_digest: self.policy_digest,
            bandwidth_max: self.bandwidth_max,
        }))
        .await
    }

    async fn say(&mut self, message: Message) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let sent = send_within(&self.link.session, &message, limits::SEND_WITHIN).await;
        sent.map_err(|source| EngineError::Transport { migration, source })
    }

    fn give_up(&mut self, error: EngineError) -> DestinationEvent {
        let class = error.class();
        self.error.get_or_insert(error);
        DestinationEvent::GiveUp(class)
    }

    async fn next(&mut self, tick: &mut tokio::time::Interval) -> Option<DestinationEvent> {
        tokio::select! {
            // The gate holds the other end for as long as this runs.
            Some(report) = self.reports.recv() => match report {
                Ok(report) => self.lane_reported(&report),
                // What was promised is not taken back for a lane that can do no harm any more. And a lane that is gone is the
                // source's to open again.
                Err(error) if self.machine.is_prepared() || self.machine.name() == "running" || may_join_again(&error) => {
                    tracing::warn!(migration = %self.order.migration, error = %crate::telemetry::chain(&error), "lane lost");
                    None
                }
                Err(error) => Some(self.give_up(error)),
            },
            Some(back) = self.returns.recv() => self.source_is_back(back).await,
            () = outage::over(self.lost, self.outage_max) => Some(self.outage_too_long()),
            message = self.link.session.receive(), if self.lost.is_none() => {
                self.watch.heard = Instant::now();
                if !matches!(message, Ok(Message::Ping)) {
                    self.watch.led_on = self.watch.heard;
                }
                self.received(message).await
            }
            _ = tick.tick(), if self.lost.is_none() => match self.watch.look() {
                Some((expected, limit)) => self.silent(expected, limit),
                None => None,
            },
            Some(command) = self.commands.recv() => match command {
                // After PREPARED only the source decides, and it is about to.
                Command::Cancel if !self.machine.is_prepared() && self.machine.name() != "running" => {
                    Some(self.give_up(EngineError::ShuttingDown { vm: self.order.vm.clone() }))
                }
                Command::CheckPeer if !self.machine.is_prepared() && self.machine.name() != "running" => {
                    self.link.admitted().err().map(|error| self.give_up(error))
                }
                Command::Superseded if self.lost.is_some() && self.machine.is_receiving() => {
                    Some(self.give_up(EngineError::Cancelled { vm: self.order.vm.clone() }))
                }
                Command::Cancel | Command::CheckPeer | Command::Superseded => None,
                Command::Bandwidth(_) | Command::DowntimeMax(_) => None,
            },
        }
    }

    /// The source lives and does not go on: nothing is held for it any longer than it has to be.
    fn silent(&mut self, expected: &'static str, limit: Duration) -> Option<DestinationEvent> {
        let error = EngineError::Silent { migration: self.order.migration, expected, limit };
        self.left_alone().then(|| self.give_up(error))
    }

    /// Whether a source that is gone means to give up. After PREPARED only its word counts, which comes on another
    /// session; after RUN the VM is here whatever it says.
    fn left_alone(&mut self) -> bool {
        if self.machine.is_prepared() {
            self.error = Some(EngineError::Undecided { vm: self.order.vm.clone(), migration: self.order.migration });
            self.ended = Some(None);
        } else if self.machine.name() == "running" {
            self.ended = Some(Some(Outcome::Moved));
        }
        self.ended.is_none()
    }

    fn lane_reported(&mut self, report: &LaneReport) -> Option<DestinationEvent> {
        match self.rounds.applied.get_mut(usize::from(report.lane.0)) {
            Some(applied) => *applied = (report.round, report.totals),
            None => return Some(self.give_up(EngineError::Bug("a lane beyond those granted".into()))),
        }
        if let Some(busy) = self.busy.get_mut(usize::from(report.lane.0)) {
            *busy = report.busy;
        }
        self.round_complete()
    }

    // SPEC: PROTOCOL.md#must-applied-complete
    /// A round is complete when the source has said so and every lane has applied it.
    fn round_complete(&mut self) -> Option<DestinationEvent> {
        let (round, last, said) = self.rounds.said.as_ref()?;
        if self.rounds.applied.iter().any(|(applied, _)| applied < round) {
            return None;
        }
        let applied: Vec<LaneTotals> = self.rounds.applied.iter().map(|(_, totals)| *totals).collect();
        if let Some(error) = totals_differ(said, &applied) {
            return Some(self.give_up(error));
        }
        let (round, last) = (*round, *last);
        self.rounds.said = None;
        if round.0 > limits::ROUNDS_MAX {
            let got = format!("round {round}");
            return Some(self.give_up(EngineError::OutOfPlace { expected: "an end of the rounds", got }));
        }
        if last {
            self.seal.close();
            // The guest stands still, its memory is here, and what it has to be is on its way yet.
            self.kept_up.iter().for_each(KeptUp::hurry);
            self.commit_question.ask_ahead(&self.link.session);
        }
        Some(DestinationEvent::RoundComplete { round, last })
    }

    // SPEC: PROTOCOL.md#must-state-complete
    fn final_when_ready(&mut self) -> Option<DestinationEvent> {
        let ready = self.machine.name() == "await-final" && self.state.is_complete();
        self.final_said.filter(|_| ready).map(DestinationEvent::Final)
    }

    async fn perform_all(&mut self, actions: Vec<DestinationAction>, events: &mut VecDeque<DestinationEvent>) {
        for action in actions {
            let durable = matches!(&action, DestinationAction::Handoff(step) if step.is_durable());
            let error = match self.perform(action).await {
                Ok(event) => {
                    events.extend(event);
                    continue;
                }
                Err(error) => error,
            };
            match Failed::of(&error, durable, self.machine.name() == "running") {
                Failed::Owed => {
                    self.error = Some(error);
                    self.ended = Some(None);
                }
                Failed::Durable => {
                    tracing::error!(migration = %self.order.migration, error = %crate::telemetry::chain(&error), "not durable");
                    self.error.get_or_insert(error);
                    events.push_back(DestinationEvent::Handoff(DestinationStep::Failed));
                }
                Failed::Attempt => events.extend(self.broken(error).await),
            }
            return;
        }
    }

    async fn perform(&mut self, action: DestinationAction) -> Result<Option<DestinationEvent>, EngineError> {
        match action {
            DestinationAction::ConfirmRound(round) => {
                let lanes = self.rounds.applied.iter().map(|(_, totals)| *totals).collect();
                crate::failpoint::hit!("destination.round-complete");
                self.say(Message::RoundApplied(RoundApplied { migration: self.order.migration, round, lanes })).await?;
                if self.machine.name() == "receiving" {
                    // The pause comes behind a later round, and neither the disk nor memory that came already need be waited for in it.
                    // Others use room up meanwhile.
                    if self.room.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
                        let journal = Arc::clone(&self.evidence.journal);
                        self.room = Some(tokio::task::spawn_blocking(move || journal.reserve()));
                    }
                    self.kept_up.iter().for_each(KeptUp::hurry);
                    self.commit_question.ask_before(&self.link.session, self.rounds.since.elapsed());
                }
                self.rounds.since = Instant::now();
                crate::failpoint::hit!("destination.round-confirmed");
                Ok(self.final_when_ready())
            }
            DestinationAction::Compare(digest) => {
                // What is promised has to be kept, also on a disk that fills up.
                let journal = Arc::clone(&self.evidence.journal);
                let room = self.room.take().unwrap_or_else(|| tokio::task::spawn_blocking(move || journal.reserve()));
                joined(room.await)??;
                self.compare(digest).await.map(Some)
            }
            DestinationAction::Handoff(action) => self.handoff(action).await,
        }
    }

    /// Restores the twin and computes what it holds; FINAL said what it has to be.
    async fn compare(&mut self, said: FinalDigest) -> Result<DestinationEvent, EngineError> {
        crate::failpoint::hit!("destination.compare");
        let totals: Vec<LaneTotals> = self.rounds.applied.iter().map(|(_, totals)| *totals).collect();
        let (twin, ram, vm) = (Arc::clone(&self.twin), Arc::clone(&self.ram), self.order.vm.clone());
        let ((state, state_digest), kept) = (self.state.take(), self.kept_up.as_ref().map(KeptUp::digests));
        let image = (self.order.stream.durability != Durability::None).then(|| {
            let head = Evidence::image_head(&self.binding, &said, self.order.machine.clone());
            (self.evidence.image_path(self.binding.migration), head)
        });
        let held = blocking(move || {
            let differs = |what| EngineError::Digest { vm: vm.clone(), what };
            let began = Instant::now();
            let memory = kept.map_or(Ok(0), |kept| digest_kept(&kept, &ram))?;
            let digested = began.elapsed();
            let held = FinalDigest { state: state_digest, lanes: digest_totals(&totals), memory };
            // Nothing that was not signed for reaches the hypervisor.
            for (same, what) in [
                (held.state == said.state, "device state"),
                (held.lanes == said.lanes, "lane totals"),
                (held.memory == said.memory, "guest memory"),
            ] {
                if !same {
                    return Err(differs(what));
                }
            }
            // Before the state is restored, which may write guest memory: the image is of what was signed for.
            if let Some((path, head)) = image {
                write_image(&path, &head, &ram, &state)?;
            }
            crate::failpoint::hit!("destination.compared");
            lock(&twin).restore_state(&state)?;
            tracing::debug!(vm = %vm, ?digested, restored = ?began.elapsed(), "twin complete");
            Ok(held)
        })
        .await?;
        crate::failpoint::hit!("destination.state-restored");
        Ok(DestinationEvent::Handoff(DestinationStep::TwinComplete(Box::new(self.binding.prepared(held, self.order.stream.durability)))))
    }

    async fn handoff(&mut self, action: HandoffAction<DestinationRecord>) -> Result<Option<DestinationEvent>, EngineError> {
        match action {
            HandoffAction::Journal(record) => self.evidence.record(&self.binding, record).await.map(|()| None),
            HandoffAction::Send(step) => {
                self.evidence.send(&self.link.session, &self.binding, step).await;
                Ok(None)
            }
            HandoffAction::AskCommit => {
                let answer = self.commit_question.answer(&self.link.session, &mut self.error).await?;
                crate::failpoint::hit!("destination.policy-asked");
                Ok(Some(DestinationEvent::Handoff(answer.into())))
            }
            HandoffAction::Resume => {
                let twin = Arc::clone(&self.twin);
                crate::failpoint::hit!("destination.resume.before");
                blocking(move || Ok(lock(&twin).resume()?)).await?;
                crate::failpoint::hit!("destination.resume.after");
                Ok(None)
            }
            HandoffAction::Destroy => {
                let twin = Arc::clone(&self.twin);
                crate::failpoint::hit!("destination.destroy.before");
                if let Err(error) = blocking(move || Ok(lock(&twin).destroy()?)).await {
                    tracing::warn!(vm = %self.order.vm, error = %error, "the twin is gone already");
                }
                crate::failpoint::hit!("destination.destroy.after");
                Ok(None)
            }
            HandoffAction::End(outcome) => {
                if outcome == Outcome::Moved {
                    self.heads = Exchange::default();
                    self.evidence.show_head(&self.link, self.order.migration).await;
                }
                self.ended = Some(Some(outcome));
                Ok(None)
            }
            HandoffAction::Keep => {
                // It was written before the twin was restored; here it is seen to be whole and durable.
                let (evidence, binding) = (self.evidence.clone(), self.binding.clone());
                let kept = blocking(move || evidence.kept_image(&binding)).await?;
                kept.map(|_| None).ok_or_else(|| EngineError::Bug("the final image is not there".into()))
            }
            HandoffAction::Forget => {
                if self.machine.name() == "running" {
                    // A VMM that died with the guest's memory needs the image yet.
                    let twin = Arc::clone(&self.twin);
                    blocking(move || Ok(lock(&twin).status().map(drop)?)).await?;
                }
                self.evidence.forget_image(self.binding.migration).await.map(|()| None)
            }
            HandoffAction::Renew => {
                let twin = Arc::clone(&self.twin);
                blocking(move || Ok(lock(&twin).renew()?)).await.map(|()| None)
            }
            // The twin is here as long as this runs.
            HandoffAction::Restore => Err(EngineError::Bug("a twin that is here is not restored".into())),
            HandoffAction::LeaveToJournal => {
                self.ended = Some(None);
                Ok(None)
            }
        }
    }
}

/// Whether a lane that ended like this may be opened again by the source: whatever its peer did not do wrong.
fn may_join_again(error: &EngineError) -> bool {
    matches!(error, EngineError::Transport { source, .. } if !matches!(source.class(), ErrorClass::PeerMisbehaved | ErrorClass::Unauthenticated))
}

fn lock(twin: &Twin) -> std::sync::MutexGuard<'_, Box<dyn PagedDestination>> {
    twin.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_secs(2);
