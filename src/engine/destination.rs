//! The destination end of one migration.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::digest::{digest_memory, digest_totals, sha256, totals_differ};
use crate::engine::handoff::{Binding, Evidence, blocking, joined};
use crate::engine::lanes::{LaneReport, ReceiveShared, Seal, receive_lane};
use crate::engine::link::send_within;
use crate::engine::meter::Meter;
use crate::engine::source::{AskCommit, Command};
use crate::engine::{EngineError, Link};
use crate::hypervisor::PagedDestination;
use crate::limits;
use crate::memory::GuestRam;
use crate::migration::{
    Destination, DestinationAction, DestinationEvent, DestinationRecord, DestinationStep, HandoffAction, Outcome, PreparedRecord,
};
use crate::transport::{LaneGate, TransportError};
use crate::types::Round;
use crate::wire::{Accept, AuditHead, ErrorClass, Failure, FinalDigest, Handoff, LaneTotals, Message, Offer, RoundApplied, StateChunk};

/// What is to be received.
pub struct DestinationOrder {
    /// The offer, permitted by policy.
    pub offer: Offer,
    /// Lanes granted.
    pub lanes: u16,
    /// Journal, audit log, signing key.
    pub evidence: Evidence,
    /// The session with the source.
    pub link: Link,
    /// The empty twin.
    pub twin: Box<dyn PagedDestination>,
    /// Policy at commit.
    pub ask_commit: AskCommit,
    /// SHA-256 of the policy set that permitted the offer.
    pub policy_digest: [u8; 32],
    /// [`Command::Cancel`] says that this gateway is shutting down; everything else is steered at the source.
    pub commands: mpsc::Receiver<Command>,
}

/// How it ended here.
#[derive(Debug)]
pub struct DestinationEnd {
    /// `Moved`: the VM runs here. `Stayed`: it never will, from this attempt. `None`: the twin is
    /// prepared and the source has to say; the journal knows.
    pub outcome: Option<Outcome>,
    /// Why it did not move.
    pub error: Option<EngineError>,
    /// Where the twin's VMM is attached.
    pub address: String,
}

impl std::fmt::Debug for DestinationOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DestinationOrder").field("migration", &self.offer.migration).field("vm", &self.offer.vm).finish_non_exhaustive()
    }
}

type Twin = Arc<Mutex<Box<dyn PagedDestination>>>;

struct Run {
    order: Offer,
    lanes: u16,
    evidence: Evidence,
    link: Link,
    twin: Twin,
    ram: Arc<GuestRam>,
    ask_commit: AskCommit,
    binding: Binding,
    machine: Destination,
    gate: Option<LaneGate>,
    reports: mpsc::Receiver<Result<LaneReport, EngineError>>,
    seal: Arc<Seal>,
    watch: Watch,
    rounds: Rounds,
    state: StateBuffer,
    final_said: Option<FinalDigest>,
    commands: mpsc::Receiver<Command>,
    /// PREPARED was said: from then on REFUSED has to be on disk before the twin goes.
    promised: bool,
    error: Option<EngineError>,
    ended: Option<Option<Outcome>>,
}

/// Which lanes have applied how much, and what the source says that it sent.
struct Rounds {
    applied: Vec<(Round, LaneTotals)>,
    said: Option<(Round, bool, Vec<LaneTotals>)>,
}

/// When the source was last heard, and when it last led on.
struct Watch {
    meter: Arc<Meter>,
    bytes: u64,
    heard: Instant,
    led_on: Instant,
}

/// Device state as it arrives, in order and bounded.
#[derive(Default)]
struct StateBuffer {
    bytes: Vec<u8>,
    total: Option<u64>,
}

/// Runs the destination end until the VM's place is decided, or the source has to be waited for.
pub async fn run_destination(order: DestinationOrder) -> DestinationEnd {
    let DestinationOrder { offer, lanes, evidence, link, twin, ask_commit, policy_digest, commands } = order;
    let (reports_in, reports) = mpsc::channel(usize::from(limits::LANES_MAX) * 2);
    let ram = Arc::clone(twin.ram());
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
    let (meter, seal) = (Arc::<Meter>::default(), Arc::<Seal>::default());
    let shared = ReceiveShared {
        migration: offer.migration,
        ram: Arc::clone(&ram),
        lanes,
        meter: Arc::clone(&meter),
        seal: Arc::clone(&seal),
        reports: reports_in,
    };
    let gate = link.session.expect_lanes(offer.migration, lanes, Arc::new(move |io| Box::pin(receive_lane(io, shared.clone()))));
    let migration = offer.migration;
    let mut run = Run {
        lanes,
        evidence,
        link,
        twin: Arc::new(Mutex::new(twin)),
        ram,
        ask_commit,
        binding,
        machine: Destination::default(),
        gate: None,
        reports,
        seal,
        watch: Watch { meter, bytes: 0, heard: Instant::now(), led_on: Instant::now() },
        rounds: Rounds { applied: vec![(Round(0), LaneTotals::default()); usize::from(lanes)], said: None },
        state: StateBuffer::default(),
        final_said: None,
        commands,
        promised: false,
        error: None,
        ended: None,
        order: offer,
    };
    let first = match gate {
        Ok(gate) => {
            run.gate = Some(gate);
            run.say(Message::Accept(Accept { migration, lanes, policy_digest })).await
        }
        Err(source) => Err(EngineError::Transport { migration, source }),
    };
    run.run(first).await
}

impl Run {
    async fn run(mut self, first: Result<(), EngineError>) -> DestinationEnd {
        let mut events = VecDeque::new();
        if let Err(error) = first {
            events.push_back(self.give_up(error));
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
        drop(self.gate.take());
        if let Some(error) = &self.error {
            let reason: String = crate::telemetry::chain(error).chars().take(limits::REASON_BYTES_MAX / 4).collect();
            let _ = self.say(Message::Failure(Failure { class: error.class(), reason })).await;
        }
        // The source closes when it has read the last word; closing first could lose it on the way. Behind its own last
        // entry it sends the head of its audit log.
        let listen = async {
            while let Ok(message) = self.link.session.receive().await {
                if let Message::AuditHead(head) = message {
                    self.evidence.keep_peer_head(&self.link.peer, &head.checkpoint).await;
                }
            }
        };
        let _ = tokio::time::timeout(LINGER, listen).await;
        DestinationEnd { outcome: self.ended.flatten(), error: self.error, address: self.binding.address }
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
                // What was promised is not taken back for a lane that can do no harm any more.
                Err(error) if self.machine.is_prepared() || self.machine.name() == "running" => {
                    tracing::warn!(migration = %self.order.migration, error = %crate::telemetry::chain(&error), "ignored after PREPARED");
                    None
                }
                Err(error) => Some(self.give_up(error)),
            },
            message = self.link.session.receive() => {
                self.watch.heard = Instant::now();
                if !matches!(message, Ok(Message::Ping)) {
                    self.watch.led_on = self.watch.heard;
                }
                self.received(message).await
            }
            _ = tick.tick() => match self.watch.look() {
                Some((expected, limit)) => self.silent(expected, limit),
                None => None,
            },
            Some(command) = self.commands.recv() => match command {
                // After PREPARED only the source decides, and it is about to.
                Command::Cancel if !self.machine.is_prepared() && self.machine.name() != "running" => {
                    Some(self.give_up(EngineError::ShuttingDown { vm: self.order.vm.clone() }))
                }
                Command::Cancel | Command::Bandwidth(_) | Command::DowntimeMax(_) => None,
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
        }
        Some(DestinationEvent::RoundComplete { round, last })
    }

    // SPEC: PROTOCOL.md#must-state-complete
    fn final_when_ready(&mut self) -> Option<DestinationEvent> {
        let ready = self.machine.name() == "await-final" && self.state.is_complete();
        self.final_said.filter(|_| ready).map(DestinationEvent::Final)
    }

    async fn received(&mut self, message: Result<Message, TransportError>) -> Option<DestinationEvent> {
        let message = match message {
            Ok(message) => message,
            Err(source) => {
                let error = EngineError::Transport { migration: self.order.migration, source };
                return self.left_alone().then(|| self.give_up(error));
            }
        };
        match message {
            Message::RoundEnd(end) if end.migration == self.order.migration && end.lanes.len() == usize::from(self.lanes) => {
                if self.rounds.said.is_some() {
                    return Some(
                        self.give_up(EngineError::OutOfPlace {
                            expected: "the end of the round under way",
                            got: "another ROUND-END".into(),
                        }),
                    );
                }
                self.rounds.said = Some((end.round, end.last, end.lanes));
                self.round_complete()
            }
            Message::StateChunk(chunk) if chunk.migration == self.order.migration => match self.state.take_in(&chunk) {
                Ok(()) => self.final_when_ready(),
                Err(error) => Some(self.give_up(error)),
            },
            Message::Handoff(signed) => match self.evidence.check(&self.binding, &signed) {
                Ok((_, false)) => {
                    Some(self.give_up(EngineError::NotAuthentic { migration: self.order.migration, why: "sender's journal" }))
                }
                Ok((Handoff::Final { digest, lanes }, true)) if lanes == self.lanes && self.final_said.is_none() => {
                    self.final_said = Some(digest);
                    self.final_when_ready()
                }
                Ok((step, true)) => {
                    if let (Handoff::Abort { class }, None) = (&step, &self.error) {
                        self.error = Some(EngineError::peer(self.order.migration, *class, "the source keeps the VM"));
                    }
                    Some(DestinationEvent::Handoff(DestinationStep::Received(step)))
                }
                Err(error) => Some(self.give_up(error)),
            },
            Message::AuditHead(head) => {
                self.evidence.keep_peer_head(&self.link.peer, &head.checkpoint).await;
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

    async fn perform_all(&mut self, actions: Vec<DestinationAction>, events: &mut VecDeque<DestinationEvent>) {
        for action in actions {
            match self.perform(action).await {
                Ok(event) => events.extend(event),
                Err(error) if self.machine.name() == "running" => {
                    // RUN may be on disk: only a restart can tell. The twin stays as it is.
                    self.error = Some(error);
                    self.ended = Some(None);
                    return;
                }
                Err(error) if self.machine.name() == "refused" => {
                    self.error.get_or_insert(error);
                    // A promise that was said and cannot be withdrawn on disk still stands.
                    self.ended = Some(if self.promised { None } else { Some(Outcome::Stayed) });
                    return;
                }
                Err(error) if self.machine.name() == "closed" => {
                    // The VM runs here; that the source knows it is written when it says so again.
                    tracing::error!(migration = %self.order.migration, error = %error, "CLOSED is not on disk");
                    self.ended = Some(Some(Outcome::Moved));
                    return;
                }
                Err(error) => {
                    events.push_back(self.give_up(error));
                    return;
                }
            }
        }
    }

    async fn perform(&mut self, action: DestinationAction) -> Result<Option<DestinationEvent>, EngineError> {
        match action {
            DestinationAction::ConfirmRound(round) => {
                let lanes = self.rounds.applied.iter().map(|(_, totals)| *totals).collect();
                self.say(Message::RoundApplied(RoundApplied { migration: self.order.migration, round, lanes })).await?;
                Ok(self.final_when_ready())
            }
            DestinationAction::Compare(digest) => self.compare(digest).await.map(Some),
            DestinationAction::Handoff(action) => self.handoff(action).await,
        }
    }

    /// Restores the twin and computes what it holds; FINAL said what it has to be.
    async fn compare(&mut self, said: FinalDigest) -> Result<DestinationEvent, EngineError> {
        let totals: Vec<LaneTotals> = self.rounds.applied.iter().map(|(_, totals)| *totals).collect();
        let (twin, ram, vm) = (Arc::clone(&self.twin), Arc::clone(&self.ram), self.order.vm.clone());
        let (state, verify) = (std::mem::take(&mut self.state.bytes), self.order.stream.verify);
        let held = blocking(move || {
            let differs = |what| EngineError::Digest { vm: vm.clone(), what };
            let held =
                FinalDigest { state: sha256(&state), lanes: digest_totals(&totals), memory: if verify { digest_memory(&ram)? } else { 0 } };
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
            lock(&twin).restore_state(&state)?;
            Ok(held)
        })
        .await?;
        Ok(DestinationEvent::Handoff(DestinationStep::TwinComplete(Box::new(PreparedRecord {
            migration: self.binding.migration,
            vm: self.binding.vm.clone(),
            uuid: self.binding.uuid,
            epoch: self.binding.epoch,
            peer: self.binding.peer.clone(),
            peer_incarnation: self.binding.peer_incarnation,
            peer_key: self.binding.peer_key,
            digest: held,
            address: self.binding.address.clone(),
        }))))
    }

    async fn handoff(&mut self, action: HandoffAction<DestinationRecord>) -> Result<Option<DestinationEvent>, EngineError> {
        match action {
            HandoffAction::Journal(record) => {
                let refused = record == DestinationRecord::Refused;
                match self.evidence.record(&self.binding, record).await {
                    // A promise that was never said needs no withdrawal on disk: without PREPARED there is no COMMIT.
                    Err(error) if refused && !self.promised => {
                        tracing::error!(migration = %self.order.migration, error = %error, "REFUSED is not on disk");
                        Ok(None)
                    }
                    result => result.map(|()| None),
                }
            }
            HandoffAction::Send(step) => {
                self.promised |= matches!(step, Handoff::Prepared { .. });
                self.evidence.send(&self.link.session, &self.binding, step).await;
                Ok(None)
            }
            HandoffAction::AskCommit => {
                let ask = Arc::clone(&self.ask_commit);
                let answer = joined(tokio::task::spawn_blocking(move || ask()).await)?;
                Ok(Some(DestinationEvent::Handoff(match answer {
                    Ok(()) => DestinationStep::CommitPermitted,
                    Err(why) => {
                        let class = why.class();
                        self.error.get_or_insert(why);
                        if class == ErrorClass::Denied { DestinationStep::CommitDenied } else { DestinationStep::GiveUp(class) }
                    }
                })))
            }
            HandoffAction::Resume => {
                let twin = Arc::clone(&self.twin);
                blocking(move || Ok(lock(&twin).resume()?)).await.map(|()| None)
            }
            HandoffAction::Destroy => {
                let twin = Arc::clone(&self.twin);
                if let Err(error) = blocking(move || Ok(lock(&twin).destroy()?)).await {
                    tracing::warn!(vm = %self.order.vm, error = %error, "the twin is gone already");
                }
                Ok(None)
            }
            HandoffAction::End(outcome) => {
                if outcome == Outcome::Moved {
                    let checkpoint = self.evidence.audit.head().text;
                    let _ = self.say(Message::AuditHead(AuditHead { checkpoint })).await;
                }
                self.ended = Some(Some(outcome));
                Ok(None)
            }
        }
    }
}

impl Watch {
    /// What is missing, if it has been for too long.
    fn look(&mut self) -> Option<(&'static str, Duration)> {
        let (now, bytes) = (Instant::now(), self.meter.frame_bytes());
        if bytes != self.bytes {
            (self.bytes, self.heard, self.led_on) = (bytes, now, now);
        }
        if now - self.led_on > limits::STALL_MAX {
            return Some(("pages or a step", limits::STALL_MAX));
        }
        (now - self.heard > limits::SILENCE_MAX).then_some(("a sign of life", limits::SILENCE_MAX))
    }
}

impl StateBuffer {
    fn take_in(&mut self, chunk: &StateChunk) -> Result<(), EngineError> {
        let refuse = |got: String| Err(EngineError::OutOfPlace { expected: "the next piece of the device state", got });
        if chunk.total == 0 || chunk.total > limits::STATE_BYTES_MAX as u64 || *self.total.get_or_insert(chunk.total) != chunk.total {
            return refuse(format!("a state of {} bytes", chunk.total));
        }
        let next = self.bytes.len() as u64;
        if chunk.offset != next || chunk.bytes.is_empty() || chunk.offset + chunk.bytes.len() as u64 > chunk.total {
            return refuse(format!("{} bytes at {}", chunk.bytes.len(), chunk.offset));
        }
        self.bytes.extend_from_slice(&chunk.bytes);
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.total == Some(self.bytes.len() as u64)
    }
}

fn lock(twin: &Twin) -> std::sync::MutexGuard<'_, Box<dyn PagedDestination>> {
    twin.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_secs(2);
