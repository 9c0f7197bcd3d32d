//! A migration under way at its source: the real outer machine, driven as `src/engine/source.rs` drives it.

use std::collections::VecDeque;
use std::time::Duration;

use sealane::engine::Binding;
use sealane::migration::{
    Destination, Goal, HandoffAction, OfferRecord, Outcome, RoundMeasure, Source, SourceAction, SourceEvent, SourceRecord, SourceStep,
    Standing,
};
use sealane::types::{Epoch, MigrationId, Round};
use sealane::wire::{Durability, ErrorClass, FinalDigest, Handoff};

use crate::host::{Did, RunState, Stop, Talk, vm};
use crate::network::{Facts, Message, Offer, SessionId};
use crate::recovery::{Interrupted, Records};
use crate::world::{Bug, Due, MILLISECOND, OUTAGE_MAX, SECOND, TICK, Time, UUID, World};

pub const LANES: u16 = 2;
const GOAL: Goal = Goal { downtime_max: Duration::from_millis(300), throttle: false, fixed_cost: Duration::ZERO };
const PAUSE_MAX: Time = 33 * SECOND;
const DOUBT: Time = 30 * SECOND;
const ANSWER_WITHIN: Time = 30 * SECOND;
/// How long the last words may take.
pub const LAST_WORDS: Time = 2 * SECOND;

#[derive(Debug)]
pub struct SourceRun {
    pub offer: Offer,
    pub address: String,
    pub peer: Facts,
    pub machine: Source,
    pub binding: Option<Binding>,
    session: SessionId,
    rounds: u32,
    round: Round,
    finalised_at: Option<Time>,
    gives_up_at: Time,
    pause_ends: Option<Time>,
    doubt_ends: Option<Time>,
    outage: Option<Outage>,
    refused: bool,
    woken: bool,
    ended: Option<Option<Outcome>>,
    /// The last words are waited for until then.
    lingers: Option<Time>,
}

#[derive(Debug)]
struct Outage {
    ends: Time,
    next_try: Time,
    pause: Time,
    committed: bool,
    /// RESUME was said there, to this gateway.
    asked: Option<(SessionId, Facts, Time)>,
}

#[derive(Debug)]
pub struct DestinationRun {
    pub offer: Offer,
    pub binding: Binding,
    pub machine: Destination,
    pub session: SessionId,
    pub round: Round,
    pub final_said: Option<FinalDigest>,
    pub lost: Option<Time>,
    pub ended: Option<Option<Outcome>>,
    pub lingers: Option<Time>,
}

/// FINAL's digest names the memory's version, and the round that carried it.
pub fn digest(version: u64, round: Round) -> FinalDigest {
    let mut lanes = [0; 32];
    lanes[..4].copy_from_slice(&round.0.to_be_bytes());
    FinalDigest { state: [7; 32], lanes, memory: u128::from(version) }
}

type Events = VecDeque<SourceEvent>;

impl World {
    /// As `Gateway::move_away`.
    pub fn depart(&mut self, h: usize, to: usize, migration: MigrationId, durability: Durability) -> Result<bool, Stop> {
        use sealane::engine::Placement;
        let Some(Placement::Here { address, epoch, .. }) = self.hosts[h].place.clone() else { return Ok(false) };
        if self.hosts[h].claim.is_some() || self.hosts[h].vmms.get(&address).is_none_or(|vmm| vmm.state == RunState::Incoming) {
            return Ok(false);
        }
        let Some(session) = self.dial(h, to) else { return Ok(false) };
        let peer = self.sessions[&session].peer_of(h);
        let mut run = SourceRun {
            offer: Offer { migration, epoch: epoch.0, durability },
            address,
            peer,
            machine: Source::new(GOAL),
            binding: None,
            session,
            rounds: 1 + u32::try_from(self.chance.range(0, 3)).unwrap(),
            round: Round(0),
            finalised_at: None,
            gives_up_at: self.now + self.chance.range(60, 600) * SECOND,
            pause_ends: None,
            doubt_ends: None,
            outage: None,
            refused: false,
            woken: true,
            ended: None,
            lingers: None,
        };
        self.hosts[h].claim = Some(crate::host::Claim { migration, waits: false });
        self.hosts[h].talks.insert(session, Talk::Source(migration));
        self.due(h, TICK, Due::Source(migration));
        self.source_acts(h, &mut run, SourceAction::Offer)?;
        self.hosts[h].sources.insert(migration, run);
        Ok(true)
    }

    /// As `Gateway::continue_departure`: a gateway that was killed goes on with an attempt of which the journal says OFFER and no
    /// more. Now and then its note is lost, and the journal alone decides.
    pub fn continue_source(&mut self, h: usize, migration: MigrationId) -> Result<bool, Stop> {
        let Some(round) = self.hosts[h].ledgers.remove(&migration).filter(|_| self.chance.range(0, 5) > 0) else { return Ok(false) };
        let Some(Interrupted { binding, records: Records::Source(records) }) = self.load(h, migration)? else { return Ok(false) };
        let [SourceRecord::Offer(offer)] = records.as_slice() else { return Ok(false) };
        let watched = self.hosts[h].vmms.get(&binding.address).is_some_and(|vmm| vmm.state != RunState::Incoming);
        if !watched || !self.is_here(h, &binding, offer.epoch)? {
            return Ok(false);
        }
        self.trace("continued", h, 0);
        for action in [HandoffAction::Forget, HandoffAction::Resume] {
            match self.act::<SourceRecord>(h, &binding, action, None) {
                Ok(_) => {}
                Err(Stop::Failed(_)) => return Ok(false),
                Err(Stop::Crash) => return Err(Stop::Crash),
            }
        }
        let (now, pause) = (self.now, 100 * MILLISECOND);
        let run = SourceRun {
            offer: Offer { migration, epoch: offer.epoch.0, durability: offer.durability },
            address: binding.address.clone(),
            peer: Facts { host: self.host_of(&binding.peer), incarnation: binding.peer_incarnation, key: binding.peer_key },
            machine: Source::after_restart(GOAL, offer.durability, LANES, round),
            binding: Some(binding),
            // None that stands.
            session: SessionId::MAX,
            rounds: round.0 + 1,
            round,
            finalised_at: None,
            gives_up_at: now + self.chance.range(60, 600) * SECOND,
            pause_ends: None,
            doubt_ends: None,
            outage: Some(Outage { ends: now + OUTAGE_MAX, next_try: now + pause, pause, committed: false, asked: None }),
            refused: false,
            woken: true,
            ended: None,
            lingers: None,
        };
        self.continued += 1;
        self.hosts[h].ledgers.insert(migration, round);
        self.hosts[h].claim = Some(crate::host::Claim { migration, waits: false });
        self.due(h, TICK, Due::Source(migration));
        self.due(h, pause, Due::Source(migration));
        self.keep_source(h, run)?;
        Ok(true)
    }

    /// Feeds events, and does what comes of them, until nothing comes.
    fn source_turns(&mut self, h: usize, mut run: SourceRun, first: Option<SourceEvent>) -> Result<(), Stop> {
        let mut events: Events = first.into_iter().collect();
        while run.ended.is_none()
            && let Some(event) = events.pop_front()
        {
            self.trace(event.name(), h, 0);
            let early = matches!(event, SourceEvent::GiveUp(_)) && run.binding.is_none();
            let committed = run.machine.is_committed();
            match run.machine.step(event) {
                Ok(actions) => self.source_does(h, &mut run, actions, committed, &mut events)?,
                Err(_) if run.machine.is_committed() => {}
                Err(_) => events.push_back(SourceEvent::GiveUp(ErrorClass::PeerMisbehaved)),
            }
            if early {
                self.send(h, run.session, Message::Failure(ErrorClass::Local));
                run.ended = Some(Some(Outcome::Stayed));
            }
        }
        if run.ended.is_some() && run.lingers.is_none() { self.source_ends(h, run) } else { self.keep_source(h, run) }
    }

    fn keep_source(&mut self, h: usize, run: SourceRun) -> Result<(), Stop> {
        self.hosts[h].sources.insert(run.offer.migration, run);
        Ok(())
    }

    fn source_does(
        &mut self,
        h: usize,
        run: &mut SourceRun,
        actions: Vec<SourceAction>,
        committed: bool,
        events: &mut Events,
    ) -> Result<(), Stop> {
        let (mut outer, mut handoff) = (Vec::new(), Vec::new());
        for action in actions {
            match action {
                SourceAction::Handoff(action) => handoff.push(action),
                other => outer.push(other),
            }
        }
        // A list is all handoff, or begins with one record.
        for action in self.spoil(handoff).into_iter().map(SourceAction::Handoff).chain(outer) {
            let durable = is_durable(&action);
            match self.source_acts(h, run, action) {
                Ok(event) => events.extend(event),
                Err(Stop::Crash) => return Err(Stop::Crash),
                Err(Stop::Failed(_)) if durable => {
                    if self.bug == Some(Bug::IgnoreFailed) {
                        continue;
                    }
                    events.push_back(SourceEvent::Handoff(SourceStep::Failed));
                    return Ok(());
                }
                Err(Stop::Failed(_)) => {
                    if committed || run.machine.is_committed() {
                        run.ended = Some(None);
                    } else {
                        events.push_back(SourceEvent::GiveUp(ErrorClass::Local));
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn source_acts(&mut self, h: usize, run: &mut SourceRun, action: SourceAction) -> Result<Option<SourceEvent>, Stop> {
        let migration = run.offer.migration;
        match action {
            SourceAction::Offer => {
                self.point(h, "offer")?;
                self.send(h, run.session, Message::Offer(run.offer.clone()));
            }
            SourceAction::Begin { .. } | SourceAction::Throttle(_) => {}
            SourceAction::SendRound(round) => {
                self.point(h, "round")?;
                run.round = round;
                self.hosts[h].ledgers.insert(migration, round);
                self.send(h, run.session, Message::RoundEnd { round, last: false, version: 0 });
            }
            SourceAction::Pause => {
                self.point(h, "reserve")?;
                let journal = self.hosts[h].journal.as_ref().ok_or(Stop::Crash)?;
                if journal.reserve().is_err() {
                    self.hosts[h].stopped = true;
                    return Err(Stop::Failed("reserve"));
                }
                run.pause_ends = Some(self.now + PAUSE_MAX);
                self.hosts[h].vmms.get_mut(&run.address).ok_or(Stop::Failed("pause"))?.state = RunState::Paused;
                return Ok(Some(SourceEvent::Paused));
            }
            SourceAction::SendLast(round) | SourceAction::SendLastAgain(round) => {
                self.point(h, "last round")?;
                run.round = round;
                self.hosts[h].ledgers.insert(migration, round);
                let version = self.hosts[h].vmms.get(&run.address).ok_or(Stop::Failed("state"))?.version;
                self.send(h, run.session, Message::RoundEnd { round, last: true, version });
                let takes = self.chance.range(MILLISECOND, 20 * MILLISECOND);
                run.finalised_at = Some(self.now + takes);
                self.due(h, takes, Due::Source(migration));
            }
            SourceAction::Reconnect => {
                self.point(h, "reconnect")?;
                self.close(h, run.session);
                let (now, pause) = (self.now, 100 * MILLISECOND);
                let committed = run.machine.is_committed();
                run.outage = Some(Outage { ends: now + OUTAGE_MAX, next_try: now + pause, pause, committed, asked: None });
                self.due(h, pause, Due::Source(migration));
            }
            SourceAction::GoOn => {
                self.point(h, "go on")?;
                (run.finalised_at, run.pause_ends) = (None, None);
                let binding = run.binding.clone().ok_or(Stop::Failed("no offer"))?;
                self.resume(h, &binding)?;
            }
            SourceAction::NotConverging(_) => return Err(Stop::Failed("does not converge")),
            SourceAction::Handoff(action) => return self.source_hands_off(h, run, action),
        }
        Ok(None)
    }

    /// As `src/engine/source/switch.rs`.
    fn source_hands_off(
        &mut self,
        h: usize,
        run: &mut SourceRun,
        action: HandoffAction<SourceRecord>,
    ) -> Result<Option<SourceEvent>, Stop> {
        let binding = run.binding.clone().ok_or(Stop::Failed("no offer"))?;
        let (commit, resume) =
            (matches!(action, HandoffAction::Journal(SourceRecord::Commit { .. })), matches!(action, HandoffAction::Resume));
        match self.act(h, &binding, action, Some(run.session)) {
            Ok(Did::Done) => {
                if commit {
                    run.doubt_ends = Some(self.now + DOUBT);
                }
            }
            Ok(Did::Ask) => {
                let denied = std::mem::take(&mut self.hosts[h].deny);
                return Ok(Some(SourceEvent::Handoff(if denied { SourceStep::CommitDenied } else { SourceStep::CommitPermitted })));
            }
            Ok(Did::Ended(outcome)) => run.ended = Some(Some(outcome)),
            Ok(Did::Left) => run.ended = Some(None),
            Err(Stop::Failed(_)) if resume => run.woken = false,
            Err(stop) => return Err(stop),
        }
        Ok(None)
    }

    /// As `Run::finish`, up to the wait for last words.
    fn source_ends(&mut self, h: usize, mut run: SourceRun) -> Result<(), Stop> {
        match run.ended.flatten() {
            Some(Outcome::Moved) | None => self.source_is_over(h, run, true),
            Some(_) if run.binding.is_some() && !run.refused && run.outage.is_none() => {
                self.send(h, run.session, Message::Failure(ErrorClass::Cancelled));
                run.lingers = Some(self.now + LAST_WORDS);
                self.due(h, LAST_WORDS, Due::Source(run.offer.migration));
                self.keep_source(h, run)
            }
            Some(_) => {
                let told = run.refused || run.binding.is_none();
                self.source_is_over(h, run, told)
            }
        }
    }

    /// The end of `Gateway::move_away`.
    fn source_is_over(&mut self, h: usize, run: SourceRun, told: bool) -> Result<(), Stop> {
        let (migration, outcome) = (run.offer.migration, run.ended.flatten());
        self.trace("source over", h, u64::from(outcome.is_some()));
        self.close(h, run.session);
        self.hosts[h].ledgers.remove(&migration);
        if let Some((session, ..)) = run.outage.and_then(|outage| outage.asked) {
            self.close(h, session);
        }
        self.hosts[h].load_place();
        if !told {
            self.tell_later(h, migration);
        }
        if outcome.is_none() || !run.woken {
            self.resolve_later(h, migration);
        } else {
            self.hosts[h].release(migration);
        }
        self.attempt_over(migration, outcome);
        Ok(())
    }

    pub fn source_hears(&mut self, h: usize, migration: MigrationId, session: SessionId, message: Message) -> Result<(), Stop> {
        let Some(mut run) = self.hosts[h].sources.remove(&migration) else { return Ok(()) };
        if run.lingers.is_some() {
            let refused = matches!(&message, Message::Handoff(signed) if matches!(signed.message.step, Handoff::Refuse { .. }));
            return if refused { self.source_is_over(h, run, true) } else { self.keep_source(h, run) };
        }
        let event = match run.outage.as_ref().and_then(|outage| outage.asked) {
            Some((asked, facts, _)) if asked == session => self.back(&mut run, session, facts, &message),
            _ if session != run.session || run.outage.is_some() => None,
            _ => self.source_reads(h, &mut run, message),
        };
        self.source_turns(h, run, event)
    }

    /// As `Run::received`.
    fn source_reads(&mut self, h: usize, run: &mut SourceRun, message: Message) -> Option<SourceEvent> {
        let give_up = |class| Some(SourceEvent::GiveUp(class));
        match message {
            Message::Accept if run.binding.is_none() => {
                let offer = Box::new(OfferRecord {
                    migration: run.offer.migration,
                    vm: vm(),
                    uuid: UUID,
                    epoch: Epoch(run.offer.epoch),
                    peer: self.hosts[run.peer.host].spiffe.clone(),
                    peer_incarnation: run.peer.incarnation,
                    peer_key: run.peer.key,
                    policy_digest: [1; 32],
                    address: run.address.clone(),
                    durability: run.offer.durability,
                });
                run.binding = Some(offer.as_ref().into());
                Some(SourceEvent::Accepted { offer, lanes: LANES })
            }
            Message::RoundApplied { round } if round != run.round => give_up(ErrorClass::PeerMisbehaved),
            Message::RoundApplied { round } => {
                let paused = self.hosts[h].vmms.get(&run.address).is_none_or(|vmm| vmm.state == RunState::Paused);
                if paused {
                    return None;
                }
                let dirty_pages = if round.0 >= run.rounds { 10 } else { 60_000 };
                let duration = Duration::from_secs(1);
                Some(SourceEvent::RoundApplied(RoundMeasure { content_pages: 100_000, duration, dirty_pages }))
            }
            Message::Handoff(signed) => {
                let Some(binding) = &run.binding else { return give_up(ErrorClass::PeerMisbehaved) };
                match self.check(h, binding, &signed) {
                    Some(heard) => {
                        run.refused |= matches!(heard.step, Handoff::Refuse { .. });
                        let (step, incarnation_same, position) = (heard.step, heard.incarnation_same, heard.position);
                        Some(SourceEvent::Handoff(SourceStep::Received { step, incarnation_same, position }))
                    }
                    None if run.machine.is_committed() => None,
                    None => give_up(ErrorClass::PeerMisbehaved),
                }
            }
            Message::Failure(class) => give_up(class),
            _ => give_up(ErrorClass::PeerMisbehaved),
        }
    }

    /// As `outage::try_resume` and `Run::back`: the destination's word in the new session.
    fn back(&mut self, run: &mut SourceRun, session: SessionId, facts: Facts, message: &Message) -> Option<SourceEvent> {
        let outage = run.outage.as_mut()?;
        match message {
            Message::Resumed { deciding } => {
                run.outage = None;
                run.session = session;
                if facts != run.peer && !run.machine.is_committed() {
                    return Some(SourceEvent::GiveUp(ErrorClass::PeerMisbehaved));
                }
                run.pause_ends = run.pause_ends.map(|_| self.now + PAUSE_MAX);
                run.doubt_ends = run.doubt_ends.map(|_| self.now + DOUBT);
                Some(SourceEvent::Resumed(if *deciding { Standing::Deciding } else { Standing::Receiving }))
            }
            Message::Failure(class) if !outage.committed && *class != ErrorClass::PeerUnreachable => Some(SourceEvent::GiveUp(*class)),
            _ => {
                outage.asked = None;
                None
            }
        }
    }

    /// The search for a destination that was lost.
    fn search(&mut self, h: usize, run: &mut SourceRun) -> Result<Option<SourceEvent>, Stop> {
        let Some(outage) = run.outage.as_mut() else { return Ok(None) };
        let patient = outage.asked.is_none_or(|(_, _, until)| until <= self.now);
        if !patient || outage.next_try > self.now {
            return Ok(None);
        }
        outage.pause = (outage.pause * 2).min(5 * SECOND);
        outage.next_try = self.now + outage.pause;
        self.due(h, outage.pause, Due::Source(run.offer.migration));
        let Some(session) = self.dial(h, run.peer.host) else { return Ok(None) };
        let Some(outage) = run.outage.as_mut() else { return Ok(None) };
        if std::mem::take(&mut self.hosts[h].deny) {
            self.close(h, session);
            return Ok((!outage.committed).then_some(SourceEvent::GiveUp(ErrorClass::Denied)));
        }
        let facts = self.sessions[&session].peer_of(h);
        self.hosts[h].talks.insert(session, Talk::Source(run.offer.migration));
        if run.binding.is_none() {
            (run.outage, run.session, run.peer) = (None, session, facts);
            return Ok(Some(SourceEvent::Resumed(Standing::Unknown)));
        }
        outage.asked = Some((session, facts, self.now + ANSWER_WITHIN));
        self.point(h, "resume session")?;
        self.send(h, session, Message::Resume { migration: run.offer.migration, round: run.round });
        Ok(None)
    }

    pub fn source_lost(&mut self, h: usize, migration: MigrationId, session: SessionId) -> Result<(), Stop> {
        let Some(mut run) = self.hosts[h].sources.remove(&migration) else { return Ok(()) };
        if run.lingers.is_some() {
            return self.source_is_over(h, run, false);
        }
        if let Some(outage) = run.outage.as_mut() {
            if outage.asked.is_some_and(|(asked, ..)| asked == session) {
                outage.asked = None;
            }
            return self.keep_source(h, run);
        }
        let event = (session == run.session).then_some(SourceEvent::LinkLost);
        self.source_turns(h, run, event)
    }

    /// Time has passed.
    pub fn source_due(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        let Some(mut run) = self.hosts[h].sources.remove(&migration) else { return Ok(()) };
        let now = self.now;
        let passed = |at: Option<Time>| at.is_some_and(|at| at <= now);
        if run.lingers.is_some() {
            return if passed(run.lingers) { self.source_is_over(h, run, false) } else { self.keep_source(h, run) };
        }
        let outage_over = passed(run.outage.as_ref().map(|outage| outage.ends));
        let event = if run.finalised_at.take_if(|at| *at <= now).is_some() && run.outage.is_none() {
            let version = self.hosts[h].vmms.get(&run.address).map_or(0, |vmm| vmm.version);
            Some(SourceEvent::Finalised(digest(version, run.round)))
        } else if run.machine.is_committed() {
            if outage_over || (run.outage.is_none() && passed(run.doubt_ends)) {
                run.ended = Some(None);
            }
            None
        } else if run.gives_up_at <= now || outage_over || (run.outage.is_none() && passed(run.pause_ends)) {
            (run.pause_ends, run.gives_up_at) = (None, Time::MAX);
            Some(SourceEvent::GiveUp(ErrorClass::TimedOut))
        } else {
            None
        };
        let event = if event.is_none() && run.ended.is_none() { self.search(h, &mut run)? } else { event };
        self.source_turns(h, run, event)
    }

    /// An operator cancels.
    pub fn source_cancelled(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        match self.hosts[h].sources.remove(&migration) {
            Some(run) if run.lingers.is_none() => self.source_turns(h, run, Some(SourceEvent::GiveUp(ErrorClass::Cancelled))),
            Some(run) => self.keep_source(h, run),
            None => Ok(()),
        }
    }
}

fn is_durable(action: &SourceAction) -> bool {
    use HandoffAction::{Forget, Journal, Keep, Restore};
    matches!(action, SourceAction::Handoff(Journal(_) | Keep | Forget | Restore))
}
