//! The world: virtual time, what happens next, and what goes wrong when.

use std::collections::{BTreeMap, BTreeSet};

use sealane::engine::Placement;
use sealane::migration::Outcome;
use sealane::types::{Epoch, MigrationId, SpiffeId, VmUuid};
use sealane::wire::Durability;

use crate::chance::Chance;
use crate::checks::Truth;
use crate::disk::SyncFailure;
use crate::host::{Host, RunState, Stop, Talk, Vmm, vm};
use crate::network::{Message, Session, SessionId};

/// Virtual microseconds.
pub type Time = u64;
pub const MILLISECOND: Time = 1_000;
pub const SECOND: Time = 1_000_000;
pub const OUTAGE_MAX: Time = 60 * SECOND;
pub const TICK: Time = SECOND / 2;
pub const UUID: VmUuid = VmUuid([0x5e; 16]);
const HOSTS: usize = 3;

#[derive(Debug)]
pub enum Event {
    Deliver { session: SessionId, to: usize, message: Message },
    Lost { session: SessionId, to: usize },
    Due { host: usize, boot: u64, what: Due },
    Start(usize),
    Restart(usize),
    Mend(usize, usize),
    Cancel(usize, MigrationId),
}

/// What a gateway wanted to be woken for.
#[derive(Debug, Clone, Copy)]
pub enum Due {
    Source(MigrationId),
    Destination(MigrationId),
    Resolve(MigrationId),
    Tell(MigrationId),
    Answer(MigrationId),
}

#[derive(Debug, Clone, Copy)]
pub enum Fault {
    Gateway,
    Host,
    PeerGateway,
    PeerHost,
    Cut(Time),
    Lose,
    Twice,
    Delay,
    DiskFull,
    Sync(SyncFailure),
    Image,
    Deny,
    Cancel,
    Destroy,
    GoBack,
}

/// What has hit a process before it did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Struck {
    Nothing,
    Gateway,
    Host,
}

/// A mistake that a test plants, to see it caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    SkipSync,
    IgnoreFailed,
    ResumeBeforeForget,
    ResumeBeforeJournal,
    SayBeforeJournal,
    NoPositionCheck,
}

#[derive(Debug)]
pub struct World {
    pub now: Time,
    pub chance: Chance,
    pub hosts: Vec<Host>,
    pub sessions: BTreeMap<SessionId, Session>,
    pub cut: BTreeSet<(usize, usize)>,
    pub truth: Truth,
    pub bug: Option<Bug>,
    pub lose_next: bool,
    pub say_twice: bool,
    pub delay_next: bool,
    /// Source, destination.
    pub attempt: (MigrationId, usize, usize),
    pub attempt_ended: bool,
    /// Attempts since all was last at rest.
    pub recent: Vec<MigrationId>,
    pub faults: u64,
    pub moved: u64,
    /// Attempts that a restarted source gateway went on with.
    pub continued: u64,
    queue: BTreeMap<(Time, u64), Event>,
    ids: u64,
    steps: u64,
    plan: Vec<(u64, Fault)>,
    hash: u64,
    /// What happened, line by line, when somebody wants to read it.
    pub story: Option<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, told: bool) -> Self {
        let mut chance = Chance::new(seed);
        let hosts: Vec<Host> = (0..HOSTS).map(|index| Host::new(index, 1, &mut chance)).collect();
        let mut world = Self {
            now: 0,
            chance,
            hosts,
            sessions: BTreeMap::new(),
            cut: BTreeSet::new(),
            truth: Truth::default(),
            bug,
            lose_next: false,
            say_twice: false,
            delay_next: false,
            attempt: (MigrationId([0; 16]), 0, 1),
            attempt_ended: true,
            recent: Vec::new(),
            faults: 0,
            moved: 0,
            continued: 0,
            queue: BTreeMap::new(),
            ids: 0,
            steps: 0,
            plan: Vec::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            story: told.then(Vec::new),
        };
        if bug == Some(Bug::SkipSync) {
            world.hosts.iter().for_each(|host| host.disk.skip_sync());
        }
        world.truth.given_up();
        world.start_cold(0, "vmm/0".to_owned(), 1);
        world
    }

    pub fn next_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub fn trace(&mut self, what: &str, h: usize, more: u64) {
        for byte in what.bytes().chain(self.now.to_le_bytes()).chain(more.to_le_bytes()).chain(h.to_le_bytes()) {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        if let Some(story) = &mut self.story {
            story.push(format!("{:>12.6} host {h} {what} {more}", self.now as f64 / SECOND as f64));
        }
    }

    /// Names everything that happened so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn schedule(&mut self, at: Time, event: Event) {
        let id = self.next_id();
        self.queue.insert((at, id), event);
    }

    pub fn due(&mut self, host: usize, after: Time, what: Due) {
        let boot = self.hosts[host].boot;
        self.schedule(self.now + after, Event::Due { host, boot, what });
    }

    pub fn host_of(&self, spiffe: &SpiffeId) -> usize {
        self.hosts.iter().position(|host| host.spiffe == *spiffe).unwrap()
    }

    pub fn attempt_over(&mut self, migration: MigrationId, outcome: Option<Outcome>) {
        self.attempt_ended |= migration == self.attempt.0;
        self.moved += u64::from(outcome == Some(Outcome::Moved));
    }

    /// The next thing happens. False when nothing ever will.
    pub fn step(&mut self) -> bool {
        let Some(((at, _), event)) = self.queue.pop_first() else { return false };
        self.now = at;
        // A process that is gone in the middle of it has lost what it was at.
        let _ = self.happens(event);
        self.truth.look(&mut self.hosts);
        self.restart_what_stopped();
        true
    }

    fn happens(&mut self, event: Event) -> Result<(), Stop> {
        match event {
            Event::Deliver { session, to, message } => {
                let Some(h) = self.arrives_at(session, to, false) else { return Ok(()) };
                self.hosts[h].lag = 0;
                self.delivered(h, session, message)
            }
            Event::Lost { session, to } => {
                let Some(h) = self.arrives_at(session, to, true) else { return Ok(()) };
                self.hosts[h].lag = 0;
                self.trace("link lost", h, session);
                match self.hosts[h].talks.remove(&session) {
                    Some(Talk::Source(migration)) => self.source_lost(h, migration, session),
                    Some(Talk::Destination(migration)) => self.destination_lost(h, migration, session),
                    Some(Talk::Conversation(migration)) => self.conversation_ends(h, migration, Some(session)),
                    Some(Talk::Greeting | Talk::TakenUp(_)) | None => Ok(()),
                }
            }
            Event::Due { host, boot, what } if self.hosts[host].boot == boot && self.hosts[host].serves() => {
                self.hosts[host].lag = 0;
                self.is_due(host, what)
            }
            Event::Due { .. } => Ok(()),
            Event::Start(h) => self.start(h),
            Event::Restart(h) => {
                self.hosts[h].disk.mend();
                if self.hosts[h].stopped {
                    self.hosts[h].kill_gateway();
                    self.sessions_end_with(h);
                    return self.start(h);
                }
                Ok(())
            }
            Event::Mend(one, other) => {
                self.cut.remove(&(one, other));
                Ok(())
            }
            Event::Cancel(h, migration) => self.source_cancelled(h, migration),
        }
    }

    fn delivered(&mut self, h: usize, session: SessionId, message: Message) -> Result<(), Stop> {
        let Some(talk) = self.hosts[h].talks.get(&session).copied() else { return Ok(()) };
        self.trace(name(&message), h, session);
        match talk {
            Talk::Greeting => self.greeted(h, session, message),
            Talk::Source(migration) => self.source_hears(h, migration, session, message),
            Talk::Destination(migration) => self.destination_hears(h, migration, session, message),
            Talk::Conversation(migration) => self.heard_in_conversation(h, migration, session, message),
            Talk::TakenUp(_) => match message {
                Message::Handoff(signed) => self.take_up(h, session, &signed),
                _ => {
                    self.close(h, session);
                    Ok(())
                }
            },
        }
    }

    fn is_due(&mut self, h: usize, what: Due) -> Result<(), Stop> {
        match what {
            Due::Source(migration) => {
                self.source_due(h, migration)?;
                if self.hosts[h].sources.contains_key(&migration) {
                    self.tick(h, what);
                }
                Ok(())
            }
            Due::Destination(migration) => {
                self.destination_due(h, migration)?;
                if self.hosts[h].destinations.contains_key(&migration) {
                    self.tick(h, what);
                }
                Ok(())
            }
            Due::Resolve(migration) => self.try_resolve(h, migration),
            Due::Tell(migration) => self.tell(h, migration),
            Due::Answer(migration) => self.conversation_ends(h, migration, None),
        }
    }

    /// A run looks at its deadlines now and then; one such look is always ahead.
    fn tick(&mut self, h: usize, what: Due) {
        let same = |due: &Due| match (due, what) {
            (Due::Source(one), Due::Source(other)) | (Due::Destination(one), Due::Destination(other)) => *one == other,
            _ => false,
        };
        // Those of a gateway that was killed count for nothing: a restarted one may go on with the same migration.
        let now = self.hosts[h].boot;
        let ahead =
            self.queue.values().any(|event| matches!(event, Event::Due { host, boot, what } if (*host, *boot) == (h, now) && same(what)));
        if !ahead {
            self.due(h, TICK, what);
        }
    }

    /// A gateway whose journal has stopped is started again by whoever watches it.
    fn restart_what_stopped(&mut self) {
        for h in 0..self.hosts.len() {
            let planned = || self.queue.values().any(|event| matches!(event, Event::Restart(other) if *other == h));
            if self.hosts[h].stopped && self.hosts[h].serves() && !planned() {
                let at = self.now + self.chance.range(SECOND, 60 * SECOND);
                self.schedule(at, Event::Restart(h));
            }
        }
    }

    pub fn start(&mut self, h: usize) -> Result<(), Stop> {
        self.hosts[h].powered = true;
        if self.hosts[h].serves() {
            return Ok(());
        }
        self.trace("start", h, 0);
        if !self.hosts[h].open_journal() {
            self.hosts[h].disk.mend();
            self.schedule(self.now + 5 * SECOND, Event::Start(h));
            return Ok(());
        }
        self.recover(h)
    }

    pub fn gateway_crashes(&mut self, h: usize) -> Stop {
        self.trace("gateway crash", h, 0);
        self.hosts[h].kill_gateway();
        self.sessions_end_with(h);
        let at = self.now + self.chance.range(100 * MILLISECOND, 30 * SECOND);
        self.schedule(at, Event::Start(h));
        Stop::Crash
    }

    pub fn host_crashes(&mut self, h: usize) -> Stop {
        self.trace("host crash", h, 0);
        self.truth.crashes(&self.hosts[h]);
        self.hosts[h].vmms.clear();
        self.hosts[h].ledgers.clear();
        self.hosts[h].powered = false;
        self.hosts[h].kill_gateway();
        self.hosts[h].disk.crash(&mut self.chance);
        self.sessions_end_with(h);
        let at = self.now + self.chance.range(5 * SECOND, 120 * SECOND);
        self.schedule(at, Event::Start(h));
        Stop::Crash
    }

    /// The host and its disk are gone for good; another takes its name.
    pub fn destroy(&mut self, h: usize) {
        self.trace("destroyed", h, 0);
        self.truth.is_destroyed(&self.hosts[h]);
        self.hosts[h].kill_gateway();
        self.sessions_end_with(h);
        let generation = (self.hosts[h].boot >> 32) + 1;
        self.hosts[h] = Host::new(h, generation, &mut self.chance);
        self.hosts[h].kill_gateway();
        self.hosts[h].powered = false;
        let at = self.now + self.chance.range(10 * SECOND, 100 * SECOND);
        self.schedule(at, Event::Start(h));
    }

    /// The journal is restored from the copy of when the attempt began.
    fn goes_back(&mut self, h: usize) {
        let Some(copy) = self.hosts[h].copy.take() else { return };
        self.trace("goes back", h, 0);
        self.hosts[h].kill_gateway();
        self.sessions_end_with(h);
        self.hosts[h].disk.restore(&copy);
        self.truth.doubtful = true;
        let at = self.now + self.chance.range(100 * MILLISECOND, 30 * SECOND);
        self.schedule(at, Event::Start(h));
    }

    /// What happens to a host before it does something; what only makes it harder happens here.
    pub fn strike(&mut self, h: usize, what: &'static str) -> Struck {
        self.steps += 1;
        self.trace(what, h, self.steps);
        let now = self.steps;
        let mut struck = Struck::Nothing;
        while let Some(at) = self.plan.iter().position(|(at, _)| *at <= now) {
            let (_, fault) = self.plan.swap_remove(at);
            self.faults += 1;
            let (migration, source, destination) = self.attempt;
            let peer = if h == source { destination } else { source };
            match fault {
                Fault::Gateway => struck = Struck::Gateway,
                Fault::Host => struck = Struck::Host,
                Fault::PeerGateway if peer != h => drop(self.gateway_crashes(peer)),
                Fault::PeerHost if peer != h => drop(self.host_crashes(peer)),
                Fault::PeerGateway | Fault::PeerHost => {}
                Fault::Cut(lasts) => {
                    self.cut_link(source, destination);
                    self.schedule(self.now + lasts, Event::Mend(source.min(destination), source.max(destination)));
                }
                Fault::Lose => self.lose_next = true,
                Fault::Twice => self.say_twice = true,
                Fault::Delay => self.delay_next = true,
                Fault::DiskFull => self.hosts[h].disk.fill_up(),
                Fault::Sync(how) => self.hosts[h].disk.fail_next_sync(how),
                Fault::Image => self.hosts[h].image_fault = true,
                Fault::Deny => self.hosts[h].deny = true,
                Fault::Cancel => self.schedule(self.now + 1, Event::Cancel(source, migration)),
                Fault::Destroy if peer != h => self.destroy(peer),
                Fault::Destroy => {}
                Fault::GoBack if h != destination => self.goes_back(destination),
                Fault::GoBack => self.plan.push((now + 1, Fault::GoBack)),
            }
        }
        struck
    }

    /// Before anything that may be the last thing that a process does.
    pub fn point(&mut self, h: usize, what: &'static str) -> Result<(), Stop> {
        match self.strike(h, what) {
            Struck::Nothing => Ok(()),
            Struck::Gateway => Err(self.gateway_crashes(h)),
            Struck::Host => Err(self.host_crashes(h)),
        }
    }

    /// What will go wrong in the next attempt, and at which step.
    pub fn plan_faults(&mut self) {
        let count = match self.chance.range(0, 100) {
            0..30 => 0,
            30..70 => 1,
            70..95 => self.chance.range(2, 4),
            _ => self.chance.range(4, 9),
        };
        for _ in 0..count {
            let fault = self.fault();
            let at = self.steps + 1 + self.chance.range(0, 36);
            self.plan.push((at, fault));
        }
        if self.bug == Some(Bug::NoPositionCheck) {
            // What it takes to see these mistakes is rare: the guest has run, and the journal goes back to where it had not.
            let at = self.steps + self.chance.range(22, 40);
            self.plan.extend([(at, Fault::Lose), (at + self.chance.range(1, 12), Fault::GoBack)]);
        }
        let destination = self.attempt.2;
        if self.plan.iter().any(|(_, fault)| matches!(fault, Fault::GoBack)) && self.hosts[destination].serves() {
            self.hosts[destination].copy = Some(self.hosts[destination].disk.copy());
        }
    }

    fn fault(&mut self) -> Fault {
        let how = self.chance.pick(&[SyncFailure::Retried, SyncFailure::TakenForClean, SyncFailure::Dropped]);
        match self.chance.range(0, 100) {
            0..14 => Fault::Gateway,
            14..28 => Fault::Host,
            28..34 => Fault::PeerGateway,
            34..40 => Fault::PeerHost,
            40..52 => Fault::Cut(self.chance.range(10 * MILLISECOND, 90 * SECOND)),
            52..60 => Fault::Lose,
            60..66 => Fault::Twice,
            66..70 => Fault::Delay,
            70..74 => Fault::DiskFull,
            74..80 => Fault::Sync(how),
            80..86 => Fault::Image,
            86..90 => Fault::Deny,
            90..94 => Fault::Cancel,
            94..97 => Fault::GoBack,
            _ => Fault::Destroy,
        }
    }

    /// Faults end: whatever is broken is mended and started.
    pub fn mend(&mut self) {
        self.plan.clear();
        self.cut.clear();
        (self.lose_next, self.say_twice, self.delay_next) = (false, false, false);
        for h in 0..self.hosts.len() {
            self.hosts[h].disk.mend();
            (self.hosts[h].image_fault, self.hosts[h].deny, self.hosts[h].copy) = (false, false, None);
        }
        self.sweep_sessions();
    }

    /// The guest is started from its disks.
    pub fn start_cold(&mut self, h: usize, address: String, epoch: u64) {
        self.trace("cold start", h, epoch);
        let version = self.truth.started_cold();
        self.hosts[h].vmms.insert(address.clone(), Vmm { state: RunState::Running, version, from_image: false, renewed: true });
        let place = Placement::Here { address, epoch: Epoch(epoch), attempt: None };
        if let Some(journal) = &self.hosts[h].journal {
            let _ = journal.put_vm(&vm(), &serde_json::to_vec(&place).unwrap());
        }
        self.hosts[h].place = Some(place);
        self.truth.epoch = self.truth.epoch.max(epoch);
    }

    /// Begins an attempt from where the guest is, with what may go wrong in it.
    pub fn begin(&mut self, durability: Durability) -> bool {
        let Some(source) = self.hosts.iter().position(Host::runs) else { return false };
        let mut destination = usize::try_from(self.chance.range(0, HOSTS as u64 - 1)).unwrap();
        destination += usize::from(destination >= source);
        self.attempt = (MigrationId(self.chance.bytes16()), source, destination);
        self.attempt_ended = false;
        self.plan_faults();
        self.recent.push(self.attempt.0);
        self.trace("attempt", source, destination as u64);
        // A gateway that crashed at it has begun.
        self.depart(source, destination, self.attempt.0, durability).unwrap_or(true)
    }
}

fn name(message: &Message) -> &'static str {
    match message {
        Message::Offer(_) => "OFFER",
        Message::Accept => "ACCEPT",
        Message::RoundEnd { .. } => "ROUND-END",
        Message::RoundApplied { .. } => "ROUND-APPLIED",
        Message::Handoff(signed) => match signed.message.step {
            sealane::wire::Handoff::Final { .. } => "FINAL",
            sealane::wire::Handoff::Prepared { .. } => "PREPARED",
            sealane::wire::Handoff::Commit { .. } => "COMMIT",
            sealane::wire::Handoff::Running => "RUNNING",
            sealane::wire::Handoff::Done => "DONE",
            sealane::wire::Handoff::Abort { .. } => "ABORT",
            sealane::wire::Handoff::Refuse { .. } => "REFUSE",
        },
        Message::Resume { .. } => "RESUME",
        Message::Resumed { .. } => "RESUMED",
        Message::Failure(_) => "FAILURE",
    }
}
