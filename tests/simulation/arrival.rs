//! A migration under way at its destination, and who takes a session that a peer opens: the real outer machine, driven as
//! `src/engine/destination.rs` and `src/gateway/incoming.rs` do it.

use std::collections::VecDeque;

use sealane::engine::{Binding, Placement};
use sealane::migration::{
    Destination, DestinationAction, DestinationEvent, DestinationRecord, DestinationStep, HandoffAction, Outcome, PreparedRecord,
};
use sealane::types::{Epoch, MigrationId, Round};
use sealane::wire::{ErrorClass, FinalDigest, Handoff};

use crate::host::{Claim, Did, RunState, Stop, Talk, Vmm, vm};
use crate::live::{DestinationRun, LANES, LAST_WORDS, digest};
use crate::network::{Facts, Message, Offer, SessionId};
use crate::world::{Bug, Due, OUTAGE_MAX, SECOND, TICK, UUID, World};

type Events = VecDeque<DestinationEvent>;

impl World {
    /// As `Gateway::begin_or_go_on`: the first message of a session.
    pub fn greeted(&mut self, h: usize, session: SessionId, message: Message) -> Result<(), Stop> {
        let migration = match &message {
            Message::Offer(offer) => offer.migration,
            Message::Resume { migration, .. } => *migration,
            Message::Handoff(signed) => signed.message.migration,
            _ => {
                self.close(h, session);
                return Ok(());
            }
        };
        if let Some(run) = self.hosts[h].destinations.remove(&migration) {
            return self.source_is_back(h, run, session, message);
        }
        match message {
            Message::Offer(offer) => self.take_offer(h, session, offer),
            Message::Handoff(signed) => self.take_up(h, session, &signed),
            _ => self.take_up_later(h, session, migration),
        }
    }

    fn peer(&self, h: usize, session: SessionId) -> Result<Facts, Stop> {
        self.sessions.get(&session).map(|open| open.peer_of(h)).ok_or(Stop::Failed("session"))
    }

    fn fail(&mut self, h: usize, session: SessionId, class: ErrorClass) -> Result<(), Stop> {
        self.send(h, session, Message::Failure(class));
        self.hosts[h].talks.remove(&session);
        // The source closes when it has read it.
        let at = self.now + LAST_WORDS;
        self.end_session(session, at, SECOND);
        Ok(())
    }

    /// As `Gateway::take_up_later`.
    fn take_up_later(&mut self, h: usize, session: SessionId, migration: MigrationId) -> Result<(), Stop> {
        use crate::recovery::Records;
        let peer = self.peer(h, session)?.host;
        match self.load(h, migration) {
            Ok(Some(known)) if matches!(known.records, Records::Destination(_)) && self.host_of(&known.binding.peer) == peer => {
                self.hosts[h].talks.insert(session, Talk::TakenUp(migration));
                self.send(h, session, Message::Resumed { deciding: true });
                Ok(())
            }
            Ok(_) => self.fail(h, session, ErrorClass::Local),
            Err(_) => self.fail(h, session, ErrorClass::PeerUnreachable),
        }
    }

    /// As `Gateway::take_offer` and `admit`.
    fn take_offer(&mut self, h: usize, session: SessionId, offer: Offer) -> Result<(), Stop> {
        self.point(h, "admit")?;
        if std::mem::take(&mut self.hosts[h].deny) {
            return self.fail(h, session, ErrorClass::Denied);
        }
        let peer = self.peer(h, session)?;
        self.supersede(h, peer)?;
        let place_allows = match &self.hosts[h].place {
            Some(Placement::Away { epoch, .. }) => offer.epoch >= epoch.0,
            Some(_) => false,
            None => true,
        };
        let known = self.hosts[h].records(offer.migration).map_or(true, |records| !records.is_empty());
        if self.hosts[h].claim.is_some() || !place_allows || known {
            return self.fail(h, session, ErrorClass::Denied);
        }
        let migration = offer.migration;
        let address = format!("run/{migration}");
        self.hosts[h].vmms.insert(address.clone(), Vmm { state: RunState::Incoming, version: 0, from_image: false, renewed: false });
        self.hosts[h].claim = Some(Claim { migration, waits: false });
        let binding = Binding {
            migration,
            vm: vm(),
            uuid: UUID,
            epoch: Epoch(offer.epoch).next(),
            peer: self.hosts[peer.host].spiffe.clone(),
            peer_incarnation: peer.incarnation,
            peer_key: peer.key,
            address,
        };
        let run = DestinationRun {
            offer,
            binding,
            machine: Destination::default(),
            session,
            round: Round(0),
            final_said: None,
            lost: None,
            ended: None,
            lingers: None,
        };
        self.hosts[h].talks.insert(session, Talk::Destination(migration));
        self.due(h, TICK, Due::Destination(migration));
        self.send(h, session, Message::Accept);
        self.keep_destination(h, run)
    }

    /// An earlier attempt of the same source that lost its link is over when that offers anew.
    fn supersede(&mut self, h: usize, peer: Facts) -> Result<(), Stop> {
        let earlier = self.hosts[h].claim.map(|claim| claim.migration);
        let Some(mut run) = earlier.and_then(|migration| self.hosts[h].destinations.remove(&migration)) else { return Ok(()) };
        let superseded = self.host_of(&run.binding.peer) == peer.host && run.lost.is_some() && run.machine.is_receiving();
        if !superseded || run.lingers.is_some() {
            return self.keep_destination(h, run);
        }
        let mut events = Events::from([DestinationEvent::GiveUp(ErrorClass::Cancelled)]);
        self.destination_does_all(h, &mut run, &mut events)?;
        self.destination_is_over(h, &run)
    }

    fn keep_destination(&mut self, h: usize, run: DestinationRun) -> Result<(), Stop> {
        self.hosts[h].destinations.insert(run.binding.migration, run);
        Ok(())
    }

    fn destination_turns(&mut self, h: usize, mut run: DestinationRun, first: Option<DestinationEvent>) -> Result<(), Stop> {
        let mut events: Events = first.into_iter().collect();
        self.destination_does_all(h, &mut run, &mut events)?;
        if run.ended.is_some() && run.lingers.is_none() {
            if run.ended != Some(Some(Outcome::Moved)) {
                self.send(h, run.session, Message::Failure(ErrorClass::Local));
            }
            run.lingers = Some(self.now + LAST_WORDS);
            self.due(h, LAST_WORDS, Due::Destination(run.binding.migration));
        }
        self.keep_destination(h, run)
    }

    fn destination_does_all(&mut self, h: usize, run: &mut DestinationRun, events: &mut Events) -> Result<(), Stop> {
        while run.ended.is_none()
            && let Some(event) = events.pop_front()
        {
            self.trace(event.name(), h, 1);
            match run.machine.step(event) {
                Ok(actions) => self.destination_does(h, run, actions, events)?,
                Err(_) if run.machine.is_prepared() => {}
                Err(_) => events.push_back(DestinationEvent::GiveUp(ErrorClass::PeerMisbehaved)),
            }
        }
        Ok(())
    }

    fn destination_does(
        &mut self,
        h: usize,
        run: &mut DestinationRun,
        actions: Vec<DestinationAction>,
        events: &mut Events,
    ) -> Result<(), Stop> {
        let (mut outer, mut handoff) = (Vec::new(), Vec::new());
        for action in actions {
            match action {
                DestinationAction::Handoff(action) => handoff.push(action),
                other => outer.push(other),
            }
        }
        for action in outer.into_iter().chain(self.spoil(handoff).into_iter().map(DestinationAction::Handoff)) {
            let durable = is_durable(&action);
            match self.destination_acts(h, run, action) {
                Ok(event) => events.extend(event),
                Err(Stop::Crash) => return Err(Stop::Crash),
                Err(Stop::Failed(_)) if durable => {
                    if self.bug == Some(Bug::IgnoreFailed) {
                        continue;
                    }
                    events.push_back(DestinationEvent::Handoff(DestinationStep::Failed));
                    return Ok(());
                }
                Err(Stop::Failed(_)) => {
                    if run.machine.name() == "running" {
                        run.ended = Some(None);
                    } else if self.left_alone(run) {
                        events.push_back(DestinationEvent::GiveUp(ErrorClass::PeerMisbehaved));
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn destination_acts(
        &mut self,
        h: usize,
        run: &mut DestinationRun,
        action: DestinationAction,
    ) -> Result<Option<DestinationEvent>, Stop> {
        match action {
            DestinationAction::ConfirmRound(round) => {
                self.point(h, "confirm")?;
                self.send(h, run.session, Message::RoundApplied { round });
                Ok(final_when_ready(run))
            }
            DestinationAction::Compare(said) => self.compare(h, run, said).map(Some),
            DestinationAction::Handoff(action) => match self.act(h, &run.binding.clone(), action, Some(run.session))? {
                Did::Done => Ok(None),
                Did::Ask => {
                    let denied = std::mem::take(&mut self.hosts[h].deny);
                    let step = if denied { DestinationStep::CommitDenied } else { DestinationStep::CommitPermitted };
                    Ok(Some(DestinationEvent::Handoff(step)))
                }
                Did::Ended(outcome) => {
                    run.ended = Some(Some(outcome));
                    Ok(None)
                }
                Did::Left => {
                    run.ended = Some(None);
                    Ok(None)
                }
            },
        }
    }

    fn compare(&mut self, h: usize, run: &DestinationRun, said: FinalDigest) -> Result<DestinationEvent, Stop> {
        self.point(h, "compare")?;
        let twin = self.hosts[h].vmms.get_mut(&run.binding.address).ok_or(Stop::Failed("twin"))?;
        if digest(twin.version, run.round) != said {
            return Err(Stop::Failed("digest"));
        }
        twin.state = RunState::Paused;
        let binding = run.binding.clone();
        Ok(DestinationEvent::Handoff(DestinationStep::TwinComplete(Box::new(PreparedRecord {
            migration: binding.migration,
            vm: binding.vm,
            uuid: binding.uuid,
            epoch: binding.epoch,
            peer: binding.peer,
            peer_incarnation: binding.peer_incarnation,
            peer_key: binding.peer_key,
            digest: said,
            address: binding.address,
            durability: run.offer.durability,
        }))))
    }

    /// As `Run::left_alone`.
    fn left_alone(&self, run: &mut DestinationRun) -> bool {
        if run.machine.is_prepared() {
            run.ended = Some(None);
        } else if run.machine.name() == "running" {
            run.ended = Some(Some(Outcome::Moved));
        }
        run.ended.is_none()
    }

    pub fn destination_hears(&mut self, h: usize, migration: MigrationId, session: SessionId, message: Message) -> Result<(), Stop> {
        let Some(mut run) = self.hosts[h].destinations.remove(&migration) else { return Ok(()) };
        if run.lingers.is_some() || session != run.session || run.lost.is_some() {
            return self.keep_destination(h, run);
        }
        let event = self.destination_reads(h, &mut run, message);
        self.destination_turns(h, run, event)
    }

    /// As `Run::received`.
    fn destination_reads(&mut self, h: usize, run: &mut DestinationRun, message: Message) -> Option<DestinationEvent> {
        let give_up = |class| Some(DestinationEvent::GiveUp(class));
        match message {
            Message::RoundEnd { round, last, version } => {
                run.round = round;
                // While nothing is promised the twin holds what has come of the guest.
                if let (true, true, Some(twin)) = (last, run.machine.is_receiving(), self.hosts[h].vmms.get_mut(&run.binding.address)) {
                    twin.version = version;
                }
                Some(DestinationEvent::RoundComplete { round, last })
            }
            Message::Handoff(signed) => match self.check(h, &run.binding, &signed) {
                Some(heard) if !heard.incarnation_same => give_up(ErrorClass::PeerMisbehaved),
                Some(heard) => match heard.step {
                    Handoff::Final { digest, lanes } if lanes == LANES && run.final_said.is_none() => {
                        run.final_said = Some(digest);
                        final_when_ready(run)
                    }
                    step => Some(DestinationEvent::Handoff(DestinationStep::Received(step))),
                },
                None => give_up(ErrorClass::PeerMisbehaved),
            },
            Message::Failure(class) => give_up(class),
            _ => give_up(ErrorClass::PeerMisbehaved),
        }
    }

    /// As `Run::source_is_back`.
    fn source_is_back(&mut self, h: usize, mut run: DestinationRun, session: SessionId, message: Message) -> Result<(), Stop> {
        let peer = self.peer(h, session)?;
        if run.lingers.is_some() {
            self.close(h, session);
            return self.keep_destination(h, run);
        }
        let same = self.host_of(&run.binding.peer) == peer.host
            && (run.binding.peer_incarnation, run.binding.peer_key) == (peer.incarnation, peer.key);
        let follows = match &message {
            Message::Offer(offer) => *offer == run.offer && run.machine.has_nothing(),
            Message::Resume { .. } | Message::Handoff(_) => true,
            _ => false,
        };
        if !same || !follows {
            self.fail(h, session, ErrorClass::PeerMisbehaved)?;
            return self.keep_destination(h, run);
        }
        self.hosts[h].talks.remove(&run.session);
        self.hosts[h].talks.insert(session, Talk::Destination(run.binding.migration));
        (run.session, run.lost) = (session, None);
        let event = match message {
            Message::Offer(_) => {
                self.send(h, session, Message::Accept);
                None
            }
            Message::Resume { round, .. } => {
                let deciding = !run.machine.is_receiving();
                if !deciding {
                    run.final_said = None;
                }
                self.point(h, "resumed")?;
                self.send(h, session, Message::Resumed { deciding });
                Some(DestinationEvent::Resumed { round })
            }
            other => self.destination_reads(h, &mut run, other),
        };
        self.destination_turns(h, run, event)
    }

    pub fn destination_lost(&mut self, h: usize, migration: MigrationId, session: SessionId) -> Result<(), Stop> {
        let Some(mut run) = self.hosts[h].destinations.remove(&migration) else { return Ok(()) };
        if session != run.session {
            return self.keep_destination(h, run);
        }
        if run.lingers.is_some() {
            return self.destination_is_over(h, &run);
        }
        if run.lost.is_none() && self.left_alone(&mut run) {
            run.lost = Some(self.now);
        }
        self.destination_turns(h, run, None)
    }

    pub fn destination_due(&mut self, h: usize, migration: MigrationId) -> Result<(), Stop> {
        let Some(mut run) = self.hosts[h].destinations.remove(&migration) else { return Ok(()) };
        if let Some(until) = run.lingers {
            return if until <= self.now { self.destination_is_over(h, &run) } else { self.keep_destination(h, run) };
        }
        let over = run.lost.take_if(|since| *since + OUTAGE_MAX <= self.now).is_some();
        self.destination_turns(h, run, over.then_some(DestinationEvent::GiveUp(ErrorClass::TimedOut)))
    }

    /// The end of `Gateway::receive`.
    fn destination_is_over(&mut self, h: usize, run: &DestinationRun) -> Result<(), Stop> {
        let migration = run.binding.migration;
        self.trace("destination over", h, u64::from(run.ended.flatten().is_some()));
        self.close(h, run.session);
        self.hosts[h].load_place();
        match run.ended.flatten() {
            Some(Outcome::Stayed | Outcome::Reclaimed) => {
                self.truth.destroyed(&self.hosts[h], &run.binding.address);
                self.hosts[h].vmms.remove(&run.binding.address);
                self.hosts[h].release(migration);
            }
            Some(Outcome::Moved | Outcome::Cold) => self.hosts[h].release(migration),
            None => self.resolve_later(h, migration),
        }
        Ok(())
    }
}

fn final_when_ready(run: &DestinationRun) -> Option<DestinationEvent> {
    run.final_said.filter(|_| run.machine.name() == "await-final").map(DestinationEvent::Final)
}

fn is_durable(action: &DestinationAction) -> bool {
    use HandoffAction::{Forget, Journal, Keep, Restore};
    matches!(action, DestinationAction::Handoff(Journal::<DestinationRecord>(_) | Keep | Forget | Restore))
}
