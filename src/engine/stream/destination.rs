//! The destination end of a stream.

mod disks;
mod messages;
mod outage;
mod split;
mod switch;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::inflow::{Beside, Inflow};
use super::lanes::{ReceiveShared, receive_lane};
use super::{Broken, Whole};
use crate::condense::{Expander, Grammar};
use crate::engine::commit_question::CommitQuestion;
use crate::engine::destination::{DestinationEnd, DestinationOrder, Return, Watch};
use crate::engine::handoff::{Binding, Evidence, Failed, blocking, joined};
use crate::engine::link::send_within;
use crate::engine::source::Command;
use crate::engine::witness::Exchange;
use crate::engine::{EngineError, Link};
use crate::hypervisor::{HypervisorError, StreamDestination, StreamStage};
use crate::journal::JournalError;
use crate::limits;
use crate::migration::{DestinationStep, Outcome, StreamDestination as Machine, StreamDestinationAction, StreamDestinationEvent};
use crate::telemetry::chain;
use crate::transport::LaneGate;
use crate::wire::{Accept, ErrorClass, Failure, FinalDigest, Message, Offer, POST_COPY_FEATURE, StreamApplied, URGENT_FEATURE};
use disks::Disks;
use split::WayBack;

type Twin = Arc<Mutex<Box<dyn StreamDestination>>>;

struct Run {
    order: Offer,
    lanes: u16,
    /// What the source is told to send at most, bytes a second.
    bandwidth_max: Option<NonZeroU64>,
    evidence: Evidence,
    link: Link,
    twin: Twin,
    stages: watch::Receiver<StreamStage>,
    commit_question: CommitQuestion,
    binding: Binding,
    machine: Machine,
    gate: Option<LaneGate>,
    flow: Arc<Inflow>,
    disks: Option<Disks>,
    /// Whether nothing but disks comes.
    disks_only: bool,
    given: watch::Receiver<u64>,
    /// What came until the stream was split.
    split: watch::Receiver<Option<Whole>>,
    /// Whether a source has come back that can send nothing of what a guest that was split lacks.
    cut_off: bool,
    /// The way back from a guest that may be split.
    way_back: Option<WayBack>,
    writing: Option<JoinHandle<Result<Whole, Broken>>>,
    /// All of the stream, once the hypervisor was given it.
    whole: Option<Whole>,
    /// Whether the hypervisor loads what it was given.
    loads: watch::Receiver<bool>,
    /// Makes room in the journal meanwhile.
    reserving: Option<JoinHandle<Result<(), JournalError>>>,
    /// Waits until the hypervisor has loaded it.
    loading: Option<JoinHandle<Result<(), EngineError>>>,
    /// Waits until a guest that was split executes.
    waking: Option<JoinHandle<Result<(), EngineError>>>,
    final_said: Option<FinalDigest>,
    heads: Exchange,
    /// What the source knows to be applied, and when it hears of the rest.
    acknowledged: u64,
    tells_at: Option<Instant>,
    failures: mpsc::Receiver<EngineError>,
    watch: Watch,
    commands: mpsc::Receiver<Command>,
    returns: mpsc::Receiver<Return>,
    outage_max: Duration,
    /// Since when the link is away.
    lost: Option<Instant>,
    policy_digest: [u8; 32],
    error: Option<EngineError>,
    ended: Option<Option<Outcome>>,
}

/// Runs the destination end of a hypervisor's own stream until the VM's place is decided, or the source has to be waited for.
pub async fn run_stream_destination(order: DestinationOrder<dyn StreamDestination>) -> DestinationEnd {
    let DestinationOrder { offer, lanes, evidence, link, twin, ask_commit, policy_digest, bandwidth_max, commands, .. } = order;
    let DestinationOrder { returns, outage_max, disk_socket, held_disks, .. } = order;
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
    let flow = Arc::new(Inflow::new());
    let mut run = Run {
        lanes,
        bandwidth_max,
        evidence,
        link,
        stages: twin.stages(),
        twin: Arc::new(Mutex::new(twin)),
        commit_question: CommitQuestion::new(ask_commit),
        binding,
        machine: Machine::default(),
        gate: None,
        given: flow.given(),
        split: flow.split(),
        loads: flow.loads(),
        reserving: None,
        cut_off: false,
        way_back: None,
        flow,
        disks: None,
        disks_only: false,
        writing: None,
        whole: None,
        loading: None,
        waking: None,
        final_said: None,
        heads: Exchange::default(),
        acknowledged: 0,
        tells_at: None,
        failures: mpsc::channel(1).1,
        watch: Watch::default(),
        commands,
        returns,
        outage_max,
        lost: None,
        policy_digest,
        error: None,
        ended: None,
        order: offer,
    };
    let first = run.begin(disk_socket, held_disks).await;
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
        if let Some(writing) = self.writing.take() {
            writing.abort();
        }
        if let Some(waking) = self.waking.take() {
            let woken = waking.await;
            self.was_woken(woken);
        }
        drop(self.way_back.take());
        if let Some(error) = &self.error {
            let reason: String = chain(error).chars().take(limits::REASON_BYTES_MAX / 4).collect();
            let _ = self.say(Message::Failure(Failure { class: error.class(), reason })).await;
        }
        // The source closes when it has read the last word; closing first could lose it on the way.
        self.evidence.finish_heads(&self.link, self.order.migration, &mut self.heads, true, LINGER).await;
        // Lanes that close before the last word was read look like an outage.
        drop(self.gate.take());
        let disks = self.disks_there();
        DestinationEnd { outcome: self.ended.flatten(), error: self.error, address: self.binding.address, decode: Duration::ZERO, disks }
    }

    /// Lets the hypervisor wait for its stream, and takes the offer.
    async fn begin(&mut self, disk_socket: PathBuf, held: Vec<u16>) -> Result<(), EngineError> {
        // The gateway has compared it with the offer.
        let machine: crate::hypervisor::Machine =
            serde_json::from_slice(&self.order.machine).map_err(|error| EngineError::Bug(error.to_string()))?;
        if machine.mode.may_split() && !self.link.negotiated.has(POST_COPY_FEATURE) {
            let got = "an offer of one that may be split".to_owned();
            return Err(EngineError::OutOfPlace { expected: "a guest as both gateways have said that they take it", got });
        }
        if !machine.disks.is_empty() {
            self.disks = Some(Disks::open(&self.twin, &self.order.vm, disk_socket, machine.disks, held).await?);
        }
        self.disks_only = machine.disks_only;
        if self.disks_only {
            // INVARIANT(disks-alone): no byte of a stream is taken, and the hypervisor never waits for one.
            self.machine = Machine::disks_only();
            self.flow.ends_at(0)?;
            self.expect_lanes()?;
            return self.accept().await;
        }
        let twin = Arc::clone(&self.twin);
        let stream = blocking(move || Ok(lock(&twin).begin()?)).await?;
        let local = |source| {
            let what = "cannot write the hypervisor's stream";
            EngineError::Hypervisor(HypervisorError::Local { vm: self.order.vm.to_string(), what, source })
        };
        stream.set_nonblocking(true).map_err(local)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(local)?;
        let (read, write) = stream.into_split();
        let grammar = lock(&self.twin).grammar();
        self.way_back = machine.mode.may_split().then(|| WayBack::open(read, grammar.clone()));
        let urgent = self.way_back.as_mut().filter(|_| self.link.negotiated.has(URGENT_FEATURE));
        let beside = match (urgent, &grammar) {
            (Some(way_back), Grammar::Qemu(expected)) => Beside::of(way_back.take_urgent(grammar.clone()), expected.clone()),
            _ => Beside::default(),
        };
        let (flow, expander) = (Arc::clone(&self.flow), Expander::new(grammar));
        self.writing = Some(tokio::spawn(async move { flow.write_to(write, expander, beside).await }));
        self.expect_lanes()?;
        self.accept().await
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

    /// Lets every lane join, on the session that stands now.
    fn expect_lanes(&mut self) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let (failures_in, failures) = mpsc::channel(usize::from(limits::LANES_MAX));
        self.failures = failures;
        let (flow, meter) = (Arc::clone(&self.flow), Arc::clone(&self.watch.meter));
        let disks = self.disks.as_ref().map(|disks| Arc::clone(&disks.incoming));
        let shared = ReceiveShared { migration, flow, disks, meter, failures: failures_in };
        let handler = Arc::new(move |io| Box::pin(receive_lane(io, shared.clone())) as _);
        let gate = self.link.session.expect_lanes(migration, self.lanes, handler);
        self.gate = Some(gate.map_err(|source| EngineError::Transport { migration, source })?);
        Ok(())
    }

    async fn say(&mut self, message: Message) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let sent = send_within(&self.link.session, &message, limits::SEND_WITHIN).await;
        sent.map_err(|source| EngineError::Transport { migration, source })
    }

    fn give_up(&mut self, error: EngineError) -> StreamDestinationEvent {
        let class = error.class();
        self.error.get_or_insert(error);
        StreamDestinationEvent::GiveUp(class)
    }

    async fn next(&mut self, tick: &mut tokio::time::Interval) -> Option<StreamDestinationEvent> {
        let lacks_some = self.lacks_some();
        let written = wait(&mut self.writing);
        let loaded = wait(&mut self.loading);
        let woken = wait(&mut self.waking);
        let given = changed(&mut self.given);
        let split = changed(&mut self.split);
        let loads = changed(&mut self.loads);
        let staged = changed(&mut self.stages);
        let tells = async {
            match self.tells_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            happened = disks::happened(&mut self.disks) => self.disks_happened(happened).await,
            () = given => self.was_given().await,
            () = split => self.final_when_ready(),
            () = loads => {
                self.make_room();
                None
            }
            happened = split::happened(&mut self.way_back), if self.lost.is_none() => self.way_back_happened(happened).await,
            () = tells => self.tell_applied().await,
            () = staged => self.staged().await,
            written = written => {
                self.writing = None;
                self.was_written(written).await
            }
            loaded = loaded => {
                self.loading = None;
                match joined(loaded).and_then(|loaded| loaded) {
                    Ok(()) => self.complete(),
                    Err(error) => Some(self.give_up(error)),
                }
            }
            woken = woken => self.was_woken(woken),
            // The gate holds the other end for as long as this runs.
            Some(error) = self.failures.recv() => self.lane_failed(error),
            Some(back) = self.returns.recv() => self.source_is_back(back).await,
            () = outage::over(self.lost.filter(|_| !lacks_some), self.outage_max) => Some(self.outage_too_long()),
            message = self.link.session.receive(), if self.lost.is_none() => {
                self.watch.heard = Instant::now();
                if !matches!(message, Ok(Message::Ping)) {
                    self.watch.led_on = self.watch.heard;
                }
                self.received(message).await
            }
            _ = tick.tick(), if self.lost.is_none() => match self.watch.look() {
                Some((expected, limit)) => {
                    let error = EngineError::Silent { migration: self.order.migration, expected, limit };
                    if lacks_some {
                        return self.broken(error).await;
                    }
                    self.left_alone().then(|| self.give_up(error))
                }
                None => None,
            },
            Some(command) = self.commands.recv() => self.commanded(command),
        }
    }

    fn commanded(&mut self, command: Command) -> Option<StreamDestinationEvent> {
        match command {
            // After PREPARED only the source decides, and it is about to.
            Command::Cancel if !self.machine.is_prepared() && !self.machine.is_running() => {
                Some(self.give_up(EngineError::ShuttingDown { vm: self.order.vm.clone() }))
            }
            Command::CheckPeer if !self.machine.is_prepared() && !self.machine.is_running() => {
                self.link.admitted().err().map(|error| self.give_up(error))
            }
            Command::Superseded if self.lost.is_some() && self.machine.is_receiving() => {
                Some(self.give_up(EngineError::Cancelled { vm: self.order.vm.clone() }))
            }
            Command::Cancel | Command::CheckPeer | Command::Superseded => None,
            Command::Bandwidth(_) | Command::DowntimeMax(_) => None,
        }
    }

    async fn was_given(&mut self) -> Option<StreamDestinationEvent> {
        let given = *self.given.borrow_and_update();
        if given - self.acknowledged >= TELL_EVERY_BYTES {
            return self.tell_applied().await;
        }
        self.tells_at.get_or_insert(Instant::now() + TELL_WITHIN);
        None
    }

    async fn was_written(&mut self, written: Result<Result<Whole, Broken>, tokio::task::JoinError>) -> Option<StreamDestinationEvent> {
        match joined(written) {
            Ok(Ok(whole)) => {
                self.whole = Some(whole);
                self.final_when_ready()
            }
            Ok(Err(broken)) => {
                let why = match broken.of_peer(&self.order.vm) {
                    Some(unsound) => unsound,
                    // Whatever the hypervisor says of itself explains more.
                    None => self.why_failed(broken.of_hypervisor(&self.order.vm, "cannot write the hypervisor's stream")).await,
                };
                if self.machine.is_running() { self.left_without(&why) } else { Some(self.give_up(why)) }
            }
            Err(error) => Some(self.give_up(error)),
        }
    }

    /// What was promised is not taken back for a lane that can do no harm any more. One that is gone is the source's to open again.
    fn lane_failed(&mut self, error: EngineError) -> Option<StreamDestinationEvent> {
        let may_join_again = matches!(
            &error,
            EngineError::Transport { source, .. } if !matches!(source.class(), ErrorClass::PeerMisbehaved | ErrorClass::Unauthenticated)
        );
        if !self.machine.is_receiving() || may_join_again {
            tracing::warn!(migration = %self.order.migration, error = %chain(&error), "lane lost");
            return None;
        }
        Some(self.give_up(error))
    }

    async fn tell_applied(&mut self) -> Option<StreamDestinationEvent> {
        self.tells_at = None;
        if self.lost.is_some() {
            return None;
        }
        self.acknowledged = self.flow.given_bytes();
        let applied = StreamApplied { migration: self.order.migration, bytes: self.acknowledged };
        match self.say(Message::StreamApplied(applied)).await {
            Ok(()) => None,
            Err(error) => self.broken(error).await,
        }
    }

    async fn staged(&mut self) -> Option<StreamDestinationEvent> {
        let stage = *self.stages.borrow_and_update();
        tracing::debug!(migration = %self.order.migration, ?stage, "hypervisor");
        // One that loads is waited for where it is said to be complete.
        if stage != StreamStage::Failed || self.loading.is_some() {
            return None;
        }
        // Before what the hypervisor says of it: a stream that is refused here fails there too.
        if let Some(writing) = &mut self.writing
            && let Ok(written) = tokio::time::timeout(REFUSED_WITHIN, writing).await
        {
            self.writing = None;
            if !matches!(written, Ok(Ok(_))) {
                return self.was_written(written).await;
            }
        }
        if self.machine.is_prepared() || self.machine.is_running() {
            tracing::error!(migration = %self.order.migration, vm = %self.order.vm, "the hypervisor of the twin has ended");
            return None;
        }
        let vm = self.order.vm.to_string();
        let why = self.why_failed(HypervisorError::Refused { vm, request: "migrate-incoming", reason: "it failed".into() }).await;
        Some(self.give_up(why))
    }

    async fn why_failed(&self, otherwise: HypervisorError) -> EngineError {
        let twin = Arc::clone(&self.twin);
        let asked = blocking(move || Ok(lock(&twin).failure())).await;
        asked.map_or_else(|_| otherwise.into(), EngineError::from)
    }

    /// FINAL counts once the hypervisor was given everything that it is about.
    fn final_when_ready(&mut self) -> Option<StreamDestinationEvent> {
        let ready = self.machine.is_receiving() && self.promised().is_some() && self.disks.as_ref().is_none_or(Disks::are_settled);
        self.final_said.filter(|_| ready).map(StreamDestinationEvent::Final)
    }

    /// Whether a source that is gone means to give up. After PREPARED only its word counts, which comes on another session; after
    /// RUN the VM is here whatever it says.
    fn left_alone(&mut self) -> bool {
        if self.machine.is_prepared() {
            self.error = Some(EngineError::Undecided { vm: self.order.vm.clone(), migration: self.order.migration });
            self.ended = Some(None);
        } else if self.machine.is_running() {
            self.ended = Some(Some(Outcome::Moved));
        }
        self.ended.is_none()
    }

    async fn perform_all(&mut self, actions: Vec<StreamDestinationAction>, events: &mut VecDeque<StreamDestinationEvent>) {
        for action in actions {
            let durable = matches!(&action, StreamDestinationAction::Handoff(step) if step.is_durable());
            let error = match self.perform(action).await {
                Ok(event) => {
                    events.extend(event);
                    continue;
                }
                Err(error) => error,
            };
            match Failed::of(&error, durable, self.machine.is_running()) {
                Failed::Owed => {
                    self.error = Some(error);
                    self.ended = Some(None);
                }
                Failed::Durable => {
                    tracing::error!(migration = %self.order.migration, error = %chain(&error), "not durable");
                    self.error.get_or_insert(error);
                    events.push_back(StreamDestinationEvent::Handoff(DestinationStep::Failed));
                }
                Failed::Attempt => events.extend(self.broken(error).await),
            }
            return;
        }
    }
}

/// Waits for news; for ever when there can be none.
async fn changed<T>(news: &mut watch::Receiver<T>) {
    if news.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn wait<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

fn lock(twin: &Twin) -> MutexGuard<'_, Box<dyn StreamDestination>> {
    twin.lock().unwrap_or_else(PoisonError::into_inner)
}

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// WHY: whoever refuses a stream closes its socket a moment before it says so, and the hypervisor notices.
const REFUSED_WITHIN: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_secs(2);
/// WHY: a source with a full window waits for this; several fit into the smallest.
const TELL_EVERY_BYTES: u64 = 256 * 1024;
/// WHY: what is left is told soon enough not to be missed, and not with a message for every piece.
const TELL_WITHIN: Duration = Duration::from_millis(2);
