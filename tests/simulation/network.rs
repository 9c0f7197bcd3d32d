//! Sessions between gateways: ordered both ways, late, cut at any message, and said again in the next one.

use sealane::types::{Incarnation, MigrationId, Round};
use sealane::wire::{Durability, ErrorClass, HandoffMessage};

use crate::world::{Event, MILLISECOND, SECOND, Time, World};

pub type SessionId = u64;

/// What gateways say, without what carries no decision.
#[derive(Debug, Clone)]
pub enum Message {
    Offer(Offer),
    Accept,
    RoundEnd { round: Round, last: bool, version: u64 },
    RoundApplied { round: Round },
    Handoff(Box<Signed>),
    Resume { migration: MigrationId, round: Round },
    Resumed { deciding: bool },
    Failure(ErrorClass),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub migration: MigrationId,
    pub epoch: u64,
    pub durability: Durability,
}

/// A handoff message and the key that signed it.
#[derive(Debug, Clone)]
pub struct Signed {
    pub message: HandoffMessage,
    pub key: [u8; 32],
}

/// What a HELLO says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    pub host: usize,
    pub incarnation: Incarnation,
    pub key: [u8; 32],
}

#[derive(Debug)]
pub struct Session {
    pub ends: [Facts; 2],
    boots: [u64; 2],
    /// From when nothing arrives any more.
    dead_at: Option<Time>,
    latest: [Time; 2],
}

impl Session {
    /// Which end a host has.
    pub fn end_of(&self, host: usize) -> usize {
        usize::from(self.ends[0].host != host)
    }

    pub fn peer_of(&self, host: usize) -> Facts {
        self.ends[1 - self.end_of(host)]
    }
}

impl World {
    /// A new session, HELLOs said; nothing when the peer cannot be reached.
    pub fn dial(&mut self, from: usize, to: usize) -> Option<SessionId> {
        if self.is_cut(from, to) || !self.hosts[to].serves() || !self.hosts[from].serves() {
            return None;
        }
        let session = self.next_id();
        let boots = [self.hosts[from].boot, self.hosts[to].boot];
        let ends = [self.facts(from)?, self.facts(to)?];
        self.sessions.insert(session, Session { ends, boots, dead_at: None, latest: [self.now; 2] });
        self.hosts[to].talks.insert(session, crate::host::Talk::Greeting);
        self.trace("dial", from, session);
        Some(session)
    }

    fn facts(&self, host: usize) -> Option<Facts> {
        let incarnation = self.hosts[host].journal.as_ref()?.incarnation();
        Some(Facts { host, incarnation, key: self.hosts[host].key })
    }

    pub fn is_cut(&self, one: usize, other: usize) -> bool {
        self.cut.contains(&(one.min(other), one.max(other)))
    }

    /// Says it on the session, if that still stands.
    pub fn send(&mut self, from: usize, session: SessionId, message: Message) {
        let slow = self.slow(from);
        let Some(open) = self.sessions.get_mut(&session) else { return };
        let to = 1 - open.end_of(from);
        let arrives = (self.now + slow).max(open.latest[to] + 1);
        open.latest[to] = arrives;
        if open.dead_at.is_some_and(|dead| dead <= self.now) {
            return;
        }
        if std::mem::take(&mut self.lose_next) {
            // A stream has no holes: what is lost for good takes the session with it.
            return self.end_session(session, arrives, 10 * SECOND);
        }
        if std::mem::take(&mut self.say_twice) {
            self.schedule(arrives, Event::Deliver { session, to, message: message.clone() });
        }
        self.schedule(arrives, Event::Deliver { session, to, message });
    }

    /// How long a message takes now.
    fn slow(&mut self, from: usize) -> Time {
        let usual = self.chance.range(100, 20 * MILLISECOND);
        let lag = self.hosts[from].lag;
        lag + if std::mem::take(&mut self.delay_next) { usual + self.chance.range(0, 40 * SECOND) } else { usual }
    }

    /// Nothing arrives from `at` on; both ends notice within `notice`.
    pub fn end_session(&mut self, session: SessionId, at: Time, notice: Time) {
        let Some(open) = self.sessions.get_mut(&session) else { return };
        if open.dead_at.is_some_and(|dead| dead <= at) {
            return;
        }
        open.dead_at = Some(at);
        for to in 0..2 {
            let noticed = at + 1 + self.chance.range(0, notice);
            self.schedule(noticed, Event::Lost { session, to });
        }
    }

    /// This end closes. What it said last may be overtaken.
    pub fn close(&mut self, host: usize, session: SessionId) {
        self.hosts[host].talks.remove(&session);
        let at = self.now + self.chance.range(0, 30 * MILLISECOND);
        self.end_session(session, at, 50 * MILLISECOND);
    }

    /// Every session between two hosts is gone, and no new one stands before the repair.
    pub fn cut_link(&mut self, one: usize, other: usize) {
        self.cut.insert((one.min(other), one.max(other)));
        let between =
            |open: &Session| open.end_of(one) != open.end_of(other) && open.ends.iter().all(|end| [one, other].contains(&end.host));
        let gone: Vec<SessionId> = self.sessions.iter().filter(|(_, open)| between(open)).map(|(id, _)| *id).collect();
        for session in gone {
            self.end_session(session, self.now, 10 * SECOND);
        }
    }

    /// The sessions of a process that is gone.
    pub fn sessions_end_with(&mut self, host: usize) {
        let gone: Vec<SessionId> =
            self.sessions.iter().filter(|(_, open)| open.ends.iter().any(|end| end.host == host)).map(|(id, _)| *id).collect();
        for session in gone {
            self.end_session(session, self.now, 15 * SECOND);
        }
    }

    /// The host at whose end something happens, if that process is still there and takes it.
    pub fn arrives_at(&mut self, session: SessionId, to: usize, lost: bool) -> Option<usize> {
        let open = self.sessions.get(&session)?;
        let (host, boot) = (open.ends[to].host, open.boots[to]);
        let alive = self.hosts[host].boot == boot && self.hosts[host].serves();
        let delivered = lost || open.dead_at.is_none_or(|dead| dead > self.now);
        (alive && delivered && self.hosts[host].talks.contains_key(&session)).then_some(host)
    }

    /// Sessions that nobody holds any more are forgotten.
    pub fn sweep_sessions(&mut self) {
        let now = self.now;
        self.sessions.retain(|_, open| open.dead_at.is_none_or(|dead| dead + 60 * SECOND > now));
    }
}
