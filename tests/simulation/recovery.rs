//! What a gateway makes of its journal: the rules of `src/engine/recovery.rs` and `src/gateway/recovery.rs` over simulated
//! sessions and guests. The decisions are the machines'.

use sealane::engine::{Binding, Decision, JournalRecord, Placement};
use sealane::migration::{
    DestinationHandoff, DestinationRecord, DestinationState, DestinationStep, HandoffAction, Holding, Outcome, SourceDecision,
    SourceHandoff, SourceRecord, SourceStep,
};
use sealane::types::{Epoch, MigrationId};
use sealane::wire::{ErrorClass, Handoff};

use crate::host::{Claim, Did, RunState, Stop, Talk, vm};
use crate::network::{Message, SessionId, Signed};
use crate::world::{Due, MILLISECOND, OUTAGE_MAX, SECOND, Time, UUID, World};

const FIRST_PAUSE: Time = 200 * MILLISECOND;
const LONGEST_PAUSE: Time = 15 * SECOND;
const ANSWER_WITHIN: Time = 30 * SECOND;

#[derive(Debug, Clone)]
pub struct Interrupted {
    pub binding: Binding,
    pub records: Records,
}

#[derive(Debug, Clone)]
pub enum Records {
    Source(Vec<SourceRecord>),
    Destination(Vec<DestinationRecord>),
}

#[derive(Debug)]
pub enum Machine {
    Source(SourceHandoff, Vec<HandoffAction<SourceRecord>>),
    Destination(DestinationHandoff, Vec<HandoffAction<DestinationRecord>>),
}

#[derive(Debug)]
pub enum Step {
    Reconnected,
    Received { step: Handoff, incarnation_same: bool, position: u64 },
    Decided(Decision),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolved {
    Settled,
    Ended(Outcome),
    Open { peer: usize },
}

/// One interrupted handoff being talked about; there is one at a time for each migration.
#[derive(Debug)]
pub struct Conversation {
    session: SessionId,
    interrupted: Interrupted,
    machine: Machine,
    kind: Kind,
    until: Time,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Resolve,
    Tell,
    Answer,
}

impl Machine {
    /// As `Machine::is_settled` of the engine.
    fn is_settled(&self) -> bool {
        match self {
            Self::Source(machine, _) => !machine.is_committed(),
            Self::Destination(machine, _) => !matches!(machine.state(), DestinationState::Prepared { .. } | DestinationState::Running),
        }
    }
}

impl World {
    pub fn load(&self, h: usize, migration: MigrationId) -> Result<Option<Interrupted>, Stop> {
        let (mut sources, mut destinations) = (Vec::new(), Vec::new());
        for record in self.hosts[h].records(migration)? {
            match record {
                JournalRecord::Source(record) => sources.push(record),
                JournalRecord::Destination(record) => destinations.push(record),
            }
        }
        Ok(match (sources.first(), destinations.first()) {
            (Some(SourceRecord::Offer(offer)), _) => Some((Binding::from(offer.as_ref()), Records::Source(sources))),
            (_, Some(DestinationRecord::Prepared(record))) => Some((Binding::from(record.as_ref()), Records::Destination(destinations))),
            _ => None,
        }
        .map(|(binding, records)| Interrupted { binding, records }))
    }

    pub fn is_here(&self, h: usize, binding: &Binding, epoch: Epoch) -> Result<bool, Stop> {
        Ok(self.hosts[h].placement()?
            == Some(Placement::Here { address: binding.address.clone(), epoch, attempt: Some(binding.migration) }))
    }

    pub fn is_settled(&self, h: usize, interrupted: &Interrupted) -> Result<bool, Stop> {
        use {DestinationRecord as D, SourceRecord as S};
        Ok(match &interrupted.records {
            Records::Source(records) => match records.last() {
                Some(S::Offer(offer)) => !self.is_here(h, &interrupted.binding, offer.epoch)?,
                Some(S::Commit { .. }) | None => false,
                Some(S::Abort { .. } | S::Reclaim { .. } | S::Fenced { .. } | S::Done) => true,
            },
            Records::Destination(records) => match records.last() {
                Some(D::Run) => !self.is_here(h, &interrupted.binding, interrupted.binding.epoch)?,
                last => matches!(last, Some(D::Refused | D::Closed | D::Fenced)),
            },
        })
    }

    fn machine(&self, h: usize, interrupted: &Interrupted) -> Result<Option<Machine>, Stop> {
        let holding = if self.is_settled(h, interrupted)? { Holding::Memory } else { self.held(h, &interrupted.binding) };
        Ok(match &interrupted.records {
            Records::Source(records) => SourceHandoff::recover(records, holding).map(|(machine, due)| Machine::Source(machine, due)),
            Records::Destination(records) => {
                let (machine, due) = DestinationHandoff::recover(records, holding);
                Some(Machine::Destination(machine, due))
            }
        })
    }

    fn settle(&mut self, h: usize, interrupted: &Interrupted) -> Result<(Resolved, Option<Machine>), Stop> {
        let (settled, Some(mut machine)) = (self.is_settled(h, interrupted)?, self.machine(h, interrupted)?) else {
            return Ok((Resolved::Settled, None));
        };
        if settled {
            return Ok((Resolved::Settled, Some(machine)));
        }
        let ended = match &mut machine {
            Machine::Source(_, due) => self.perform(h, interrupted, std::mem::take(due), None)?,
            Machine::Destination(_, due) => self.perform(h, interrupted, std::mem::take(due), None)?,
        };
        let peer = self.host_of(&interrupted.binding.peer);
        Ok((ended.map_or(Resolved::Open { peer }, Resolved::Ended), Some(machine)))
    }

    /// One that fails ends it: the journal is read again later.
    fn perform<R: Into<JournalRecord>>(
        &mut self,
        h: usize,
        interrupted: &Interrupted,
        actions: Vec<HandoffAction<R>>,
        session: Option<SessionId>,
    ) -> Result<Option<Outcome>, Stop> {
        let mut ended = None;
        for action in self.spoil(actions) {
            let resume = matches!(action, HandoffAction::Resume);
            match self.act(h, &interrupted.binding, action, session) {
                Ok(Did::Ended(outcome)) => ended = Some(outcome),
                Ok(Did::Left) => return Ok(None),
                Ok(Did::Ask) => self.truth.violation("policy is asked during recovery"),
                Ok(Did::Done) => {}
                // RUN is the fact, whatever became of the guest since; the source has to hear it.
                Err(Stop::Failed(_)) if resume && matches!(interrupted.records, Records::Destination(_)) => {}
                Err(stop) => return Err(stop),
            }
        }
        Ok(ended)
    }

    fn advance(
        &mut self,
        h: usize,
        interrupted: &Interrupted,
        machine: &mut Machine,
        event: Step,
        session: Option<SessionId>,
    ) -> Result<Option<Outcome>, Stop> {
        match machine {
            Machine::Source(machine, _) => {
                let step = match event {
                    Step::Reconnected => SourceStep::Reconnected,
                    Step::Received { step, incarnation_same, position } => SourceStep::Received { step, incarnation_same, position },
                    Step::Decided(Decision::Reclaim) => SourceStep::Decided(SourceDecision::Reclaim),
                    Step::Decided(Decision::Restart) => SourceStep::Decided(SourceDecision::Restart),
                    Step::Decided(Decision::Release | Decision::Refuse) => SourceStep::Decided(SourceDecision::Release),
                };
                let actions = machine.step(&step).map_err(|_| Stop::Failed("refused"))?;
                self.perform(h, interrupted, actions, session)
            }
            Machine::Destination(machine, _) => {
                let step = match event {
                    Step::Reconnected => DestinationStep::Reconnected,
                    Step::Received { step, .. } => DestinationStep::Received(step),
                    Step::Decided(Decision::Restart) => DestinationStep::SourceFenced,
                    Step::Decided(_) => DestinationStep::GiveUp(ErrorClass::Cancelled),
                };
                let actions = machine.step(&step).map_err(|_| Stop::Failed("refused"))?;
                self.perform(h, interrupted, actions, session)
            }
        }
    }

    /// As `engine::resolve` without a link.
    fn resolve(&mut self, h: usize, migration: MigrationId) -> Result<Resolved, Stop> {
        match self.load(h, migration)? {
            Some(interrupted) => Ok(self.settle(h, &interrupted)?.0),
            None => Ok(Resolved::Settled),
        }
    }

    /// As `engine::repeat_effect`. What follows from a record is the machine's word, images included; only while the placement
    /// is the one that the record made, and only for a guest that stands still or is an image.
    fn repeat_effect(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        let Some(interrupted) = self.load(h, migration)? else { return Ok(()) };
        let (Records::Source(records), Some(last)) = (&interrupted.records, self.hosts[h].records(migration)?.pop()) else { return Ok(()) };
        let place = self.hosts[h].placement()?;
        if place.is_none() || place != last.placement(&interrupted.binding) {
            return Ok(());
        }
        let state = self.hosts[h].vmms.get(&interrupted.binding.address).map(|vmm| vmm.state);
        let gone = matches!(records.last(), Some(SourceRecord::Done | SourceRecord::Fenced { cold: true }));
        if state == Some(RunState::Incoming) || (gone && state == Some(RunState::Running)) {
            return Ok(());
        }
        let holding = self.held(h, &interrupted.binding);
        if let Some((_, due)) = SourceHandoff::recover(records, holding)
            && holding != Holding::Nothing
        {
            self.perform(h, &interrupted, due, None)?;
        }
        Ok(())
    }

    /// As `Gateway::recover`, when a gateway starts.
    pub fn recover(&mut self, h: usize) -> Result<(), Stop> {
        let Ok(migrations) = self.hosts[h].migrations() else { return Ok(()) };
        for migration in migrations {
            if self.continue_source(h, migration)? {
                continue;
            }
            match self.resolve(h, migration) {
                Err(Stop::Crash) => return Err(Stop::Crash),
                Ok(Resolved::Settled) => match self.repeat_effect(h, migration) {
                    Err(Stop::Crash) => return Err(Stop::Crash),
                    Err(Stop::Failed(_)) => self.resolve_later(h, migration),
                    Ok(()) => {}
                },
                Ok(Resolved::Ended(_)) => self.tell_later(h, migration),
                Ok(Resolved::Open { .. }) => {
                    self.hosts[h].claim = Some(Claim { migration, waits: true });
                    self.resolve_later(h, migration);
                }
                Err(Stop::Failed(_)) => self.resolve_later(h, migration),
            }
        }
        self.hosts[h].load_place();
        self.sweep(h);
        Ok(())
    }

    /// As `Gateway::sweep`: twins, and images, that no journal promises anything to.
    fn sweep(&mut self, h: usize) {
        let open = |record: &Option<JournalRecord>| matches!(record, Some(JournalRecord::Destination(D::Prepared(_) | D::Run | D::Closed)));
        use DestinationRecord as D;
        let twins: Vec<String> = self.hosts[h].vmms.keys().filter(|address| address.starts_with("run/")).cloned().collect();
        for address in twins {
            let migration: MigrationId = address["run/".len()..].parse().unwrap();
            let Ok(mut records) = self.hosts[h].records(migration) else { continue };
            let state = self.hosts[h].vmms[&address].state;
            if !open(&records.pop()) && state != RunState::Running {
                self.hosts[h].vmms.remove(&address);
            }
        }
        let images: Vec<MigrationId> = self.hosts[h].images.keys().copied().collect();
        for migration in images {
            if matches!(self.load(h, migration), Ok(None)) {
                self.hosts[h].images.remove(&migration);
            }
        }
    }

    pub fn resolve_later(&mut self, h: usize, migration: MigrationId) {
        if let Some(claim) = &mut self.hosts[h].claim
            && claim.migration == migration
        {
            claim.waits = true;
        }
        self.hosts[h].resolving.insert(migration, FIRST_PAUSE);
        self.due(h, FIRST_PAUSE, Due::Resolve(migration));
    }

    pub fn tell_later(&mut self, h: usize, migration: MigrationId) {
        self.hosts[h].telling.insert(migration, (self.now + OUTAGE_MAX, FIRST_PAUSE));
        self.due(h, FIRST_PAUSE, Due::Tell(migration));
    }

    /// As `Gateway::try_resolve`; it is done again until it succeeds.
    pub fn try_resolve(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        let Some(pause) = self.hosts[h].resolving.get(&migration).copied() else { return Ok(()) };
        if !self.hosts[h].conversations.contains_key(&migration) {
            match self.try_once(h, migration) {
                Err(Stop::Crash) => return Err(Stop::Crash),
                Ok(true) => return self.resolved(h, migration),
                Ok(false) | Err(Stop::Failed(_)) => {}
            }
        }
        let next = (pause * 2).min(LONGEST_PAUSE);
        self.hosts[h].resolving.insert(migration, next);
        self.due(h, next, Due::Resolve(migration));
        Ok(())
    }

    fn try_once(&mut self, h: usize, migration: MigrationId) -> Result<bool, Stop> {
        let Resolved::Open { peer } = self.resolve(h, migration)? else {
            self.repeat_effect(h, migration)?;
            return Ok(true);
        };
        let Some(session) = self.dial(h, peer) else { return Ok(false) };
        let Some(interrupted) = self.load(h, migration)? else { return Ok(true) };
        let (_, machine) = self.settle(h, &interrupted)?;
        if let Some(machine) = machine {
            self.converse(h, Conversation { session, interrupted, machine, kind: Kind::Resolve, until: 0 }, Step::Reconnected)?;
        }
        Ok(false)
    }

    fn resolved(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        self.hosts[h].resolving.remove(&migration);
        self.hosts[h].load_place();
        self.hosts[h].release(migration);
        Ok(())
    }

    /// As `Gateway::tell`.
    pub fn tell(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        let Some((until, pause)) = self.hosts[h].telling.get(&migration).copied() else { return Ok(()) };
        if self.now >= until {
            self.hosts[h].telling.remove(&migration);
            return Ok(());
        }
        if !self.hosts[h].conversations.contains_key(&migration)
            && let Ok(Some(interrupted)) = self.load(h, migration)
            && let Records::Source(records) = &interrupted.records
        {
            if !matches!(records.last(), Some(SourceRecord::Abort { .. })) {
                self.hosts[h].telling.remove(&migration);
                return Ok(());
            }
            let machine = SourceHandoff::recover(records, Holding::Memory).map(|(machine, _)| Machine::Source(machine, Vec::new()));
            let peer = self.host_of(&interrupted.binding.peer);
            if let (Some(machine), Some(session)) = (machine, self.dial(h, peer)) {
                self.converse(h, Conversation { session, interrupted, machine, kind: Kind::Tell, until: 0 }, Step::Reconnected)?;
            }
        }
        let next = (pause * 2).min(LONGEST_PAUSE);
        self.hosts[h].telling.insert(migration, (until, next));
        self.due(h, next, Due::Tell(migration));
        Ok(())
    }

    /// As `Interrupted::converse`: one step, and the wait for what the peer says next.
    fn converse(&mut self, h: usize, mut talk: Conversation, event: Step) -> Result<(), Stop> {
        let migration = talk.interrupted.binding.migration;
        self.hosts[h].talks.insert(talk.session, Talk::Conversation(migration));
        match self.advance(h, &talk.interrupted, &mut talk.machine, event, Some(talk.session)) {
            Err(Stop::Crash) => Err(Stop::Crash),
            Ok(None) => {
                talk.until = self.now + ANSWER_WITHIN;
                self.due(h, ANSWER_WITHIN, Due::Answer(migration));
                self.hosts[h].conversations.insert(migration, talk);
                Ok(())
            }
            Ok(Some(_)) => self.talked(h, &talk, true),
            Err(Stop::Failed(_)) => self.talked(h, &talk, false),
        }
    }

    fn talked(&mut self, h: usize, talk: &Conversation, settled: bool) -> Result<(), Stop> {
        let migration = talk.interrupted.binding.migration;
        self.close(h, talk.session);
        match talk.kind {
            Kind::Resolve if settled => self.resolved(h, migration)?,
            Kind::Tell if settled => drop(self.hosts[h].telling.remove(&migration)),
            Kind::Resolve | Kind::Tell => {}
            Kind::Answer => {
                self.hosts[h].load_place();
                if settled && self.hosts[h].resolving.contains_key(&migration) {
                    self.due(h, MILLISECOND, Due::Resolve(migration));
                }
            }
        }
        if let Some(next) = self.hosts[h].waiting.iter().position(|(waits, ..)| *waits == migration) {
            let (_, session, message) = self.hosts[h].waiting.remove(next);
            if let Message::Handoff(signed) = message {
                return self.take_up(h, session, &signed);
            }
        }
        Ok(())
    }

    pub fn heard_in_conversation(&mut self, h: usize, migration: MigrationId, session: SessionId, message: Message) -> Result<(), Stop> {
        let Some(talk) = self.hosts[h].conversations.remove(&migration) else { return Ok(()) };
        if talk.session != session {
            self.hosts[h].conversations.insert(migration, talk);
            return Ok(());
        }
        let Message::Handoff(signed) = message else { return self.talked(h, &talk, false) };
        match self.check(h, &talk.interrupted.binding, &signed) {
            Some(heard) => {
                let step = Step::Received { step: heard.step, incarnation_same: heard.incarnation_same, position: heard.position };
                self.converse(h, talk, step)
            }
            None => self.talked(h, &talk, false),
        }
    }

    /// The session is gone, or the peer says nothing for too long.
    pub fn conversation_ends(&mut self, h: usize, migration: MigrationId, lost: Option<SessionId>) -> Result<(), Stop> {
        // Nobody answers in a session that is gone.
        self.hosts[h].waiting.retain(|(_, session, _)| Some(*session) != lost);
        let over = |talk: &Conversation| lost.map_or(talk.until <= self.now, |session| session == talk.session);
        if self.hosts[h].conversations.get(&migration).is_none_or(|talk| !over(talk)) {
            return Ok(());
        }
        let Some(talk) = self.hosts[h].conversations.remove(&migration) else { return Ok(()) };
        let settled = talk.machine.is_settled();
        self.talked(h, &talk, settled)
    }

    /// As `Gateway::take_up` and `engine::answer`: a peer comes back for an interrupted handoff.
    pub fn take_up(&mut self, h: usize, session: SessionId, signed: &Signed) -> Result<(), Stop> {
        let migration = signed.message.migration;
        if self.hosts[h].is_under_way(migration) {
            self.close(h, session);
            return Ok(());
        }
        if self.hosts[h].conversations.contains_key(&migration) {
            let message = Message::Handoff(Box::new(signed.clone()));
            self.hosts[h].talks.insert(session, Talk::Conversation(migration));
            self.hosts[h].waiting.push((migration, session, message));
            return Ok(());
        }
        match self.answer(h, session, signed) {
            Err(Stop::Failed(_)) => {
                self.close(h, session);
                self.hosts[h].load_place();
                Ok(())
            }
            other => other,
        }
    }

    fn answer(&mut self, h: usize, session: SessionId, signed: &Signed) -> Result<(), Stop> {
        let Some(interrupted) = self.load(h, signed.message.migration)? else { return self.refuse_unknown(h, session, signed) };
        let peer = self.sessions.get(&session).map(|open| open.peer_of(h).host);
        if peer != Some(self.host_of(&interrupted.binding.peer)) {
            return Err(Stop::Failed("session peer"));
        }
        let heard = self.check(h, &interrupted.binding, signed).ok_or(Stop::Failed("not authentic"))?;
        let (_, Some(machine)) = self.settle(h, &interrupted)? else { return Err(Stop::Failed("no machine")) };
        let first = Step::Received { step: heard.step, incarnation_same: heard.incarnation_same, position: heard.position };
        self.converse(h, Conversation { session, interrupted, machine, kind: Kind::Answer, until: 0 }, first)
    }

    /// As `engine::recovery::refuse_unknown`.
    fn refuse_unknown(&mut self, h: usize, session: SessionId, signed: &Signed) -> Result<(), Stop> {
        let (message, Some(open)) = (&signed.message, self.sessions.get(&session)) else { return Ok(()) };
        let peer = open.peer_of(h);
        let binding = Binding {
            migration: message.migration,
            vm: vm(),
            uuid: UUID,
            epoch: message.epoch,
            peer: self.hosts[peer.host].spiffe.clone(),
            peer_incarnation: message.sender,
            peer_key: peer.key,
            address: String::new(),
        };
        if matches!(message.step, Handoff::Commit { .. } | Handoff::Final { .. }) {
            if self.hosts[h].records(message.migration)?.is_empty() {
                self.act(h, &binding, HandoffAction::Journal(DestinationRecord::Refused), None)?;
            }
            self.point(h, "refuse")?;
            self.say_at(h, session, &binding, Handoff::Refuse { class: ErrorClass::Local }, 0);
        }
        self.close(h, session);
        Ok(())
    }

    /// As `engine::decide`, by operators who know what is true.
    pub fn decide(&mut self, h: usize, migration: MigrationId, decision: Decision) -> Result<(), Stop> {
        let Some(interrupted) = self.load(h, migration)? else { return Ok(()) };
        let (resolved, machine) = self.settle(h, &interrupted)?;
        if let (Resolved::Open { .. }, Some(mut machine)) = (resolved, machine) {
            self.advance(h, &interrupted, &mut machine, Step::Decided(decision), None)?;
        }
        self.hosts[h].load_place();
        Ok(())
    }
}
