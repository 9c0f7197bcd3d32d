//! Which departure goes next: first come, first served, as many at once as the configuration says, and no more to a peer than
//! it takes. Pure: the time comes in.
//!
//! A peer that has no room says so only when it is asked. So what it took is remembered: as many go to it as it held when it
//! said no, and after a pause one more, to see whether there is room now. Whoever was sent back keeps its place in the queue.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::types::PeerName;

/// Departures under way, and those that wait.
#[derive(Debug)]
pub(super) struct Queue {
    /// How many may be under way at once.
    parallel: usize,
    /// How many may wait.
    most: usize,
    last: Number,
    /// By number: who came first is first.
    waiting: VecDeque<(Number, PeerName)>,
    active: BTreeMap<Number, PeerName>,
    peers: BTreeMap<PeerName, Room>,
}

/// When it came, among the departures of this gateway.
pub(super) type Number = u64;

/// What is known of the room that a peer has.
#[derive(Debug, Default)]
struct Room {
    active: usize,
    /// Nothing while it has never said no.
    known: Option<Full>,
}

/// A peer that said no.
#[derive(Debug)]
struct Full {
    /// As many of ours it holds.
    holds: usize,
    /// When it may be asked whether it takes one more.
    ask_at: Instant,
    pause: Duration,
}

/// As many wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueFull;

/// Where a departure is in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is under way from now on.
    Goes,
    /// It waits.
    Waits {
        /// 1 is the first.
        position: u32,
        /// When its peer, which has no room, may be asked again; nothing where that is not what it waits for.
        ask_at: Option<Instant>,
    },
}

impl Queue {
    pub(super) fn new(parallel: usize, most: usize) -> Self {
        Self { parallel, most, last: 0, waiting: VecDeque::new(), active: BTreeMap::new(), peers: BTreeMap::new() }
    }

    /// The end of the queue.
    pub(super) fn join(&mut self, peer: &PeerName) -> Result<Number, QueueFull> {
        if self.waiting.len() >= self.most {
            return Err(QueueFull);
        }
        self.last += 1;
        self.waiting.push_back((self.last, peer.clone()));
        Ok(self.last)
    }

    /// One that does not wait, and counts all the same.
    pub(super) fn pass(&mut self, peer: &PeerName) -> Number {
        self.last += 1;
        self.start(self.last, peer.clone());
        self.last
    }

    /// Lets it go if it is its turn. `room` says whether this gateway has room for a migration at all.
    pub(super) fn ask(&mut self, number: Number, room: bool, now: Instant) -> Standing {
        let Ok(at) = self.waiting.binary_search_by_key(&number, |(number, _)| *number) else { return Standing::Goes };
        let next = self.waiting.iter().position(|(_, peer)| self.ask_at(peer, now).is_none());
        if room && self.active.len() < self.parallel && next == Some(at) {
            if let Some((number, peer)) = self.waiting.remove(at) {
                self.start(number, peer);
            }
            return Standing::Goes;
        }
        let position = u32::try_from(at).unwrap_or(u32::MAX).saturating_add(1);
        let ask_at = self.waiting.get(at).and_then(|(_, peer)| self.ask_at(peer, now));
        Standing::Waits { position, ask_at }
    }

    /// When one more may go to a peer; nothing when it may now.
    fn ask_at(&self, peer: &PeerName, now: Instant) -> Option<Instant> {
        let room = self.peers.get(peer)?;
        let full = room.known.as_ref()?;
        let one_more = room.active == full.holds && now >= full.ask_at;
        // The answer of whoever asks now is the next that is known, and then all look again.
        let next = if room.active > full.holds { now + PAUSE_MAX } else { full.ask_at };
        (room.active >= full.holds && !one_more).then_some(next)
    }

    fn start(&mut self, number: Number, peer: PeerName) {
        self.peers.entry(peer.clone()).or_default().active += 1;
        self.active.insert(number, peer);
    }

    /// Its peer has taken it.
    pub(super) fn taken(&mut self, number: Number, now: Instant) {
        let Some(room) = self.active.get(&number).and_then(|peer| self.peers.get_mut(peer)) else { return };
        if let Some(full) = &mut room.known
            && room.active > full.holds
        {
            *full = Full { holds: room.active, ask_at: now, pause: PAUSE };
        }
    }

    /// Its peer has no room: it waits where it was. `jitter`, from 0 to 1, keeps two gateways that refuse each other from doing
    /// so for ever.
    pub(super) fn sent_back(&mut self, number: Number, now: Instant, jitter: f64) {
        let Some(peer) = self.active.remove(&number) else { return };
        let room = self.peers.entry(peer.clone()).or_default();
        room.active = room.active.saturating_sub(1);
        match &mut room.known {
            // Several were there at once and all were sent back: that is one answer.
            Some(full) if full.ask_at > now => full.holds = room.active,
            known => {
                let pause = known.as_ref().map_or(PAUSE, |full| full.pause);
                let wait = pause.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
                *known = Some(Full { holds: room.active, ask_at: now + wait, pause: (pause * 2).min(PAUSE_MAX) });
            }
        }
        let at = self.waiting.partition_point(|(other, _)| *other < number);
        self.waiting.insert(at, (number, peer));
    }

    /// It is over, or was given up.
    pub(super) fn leave(&mut self, number: Number) {
        let waited = self.waiting.binary_search_by_key(&number, |(number, _)| *number).ok().and_then(|at| self.waiting.remove(at));
        let peer = waited.map(|(_, peer)| peer).or_else(|| {
            let peer = self.active.remove(&number)?;
            if let Some(room) = self.peers.get_mut(&peer) {
                room.active = room.active.saturating_sub(1);
            }
            Some(peer)
        });
        // What nobody needs is not remembered: later the peer may have other limits.
        if let Some(peer) = peer
            && self.peers.get(&peer).is_some_and(|room| room.active == 0)
            && !self.waiting.iter().any(|(_, other)| *other == peer)
        {
            self.peers.remove(&peer);
        }
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

/// WHY: a destination waits a moment for room before it says no (`incoming.rs`); a migration of a small VM takes about as long.
const PAUSE: Duration = Duration::from_secs(1);
/// WHY: each time costs both gateways a session and audit entries; a large VM takes minutes.
const PAUSE_MAX: Duration = Duration::from_secs(8);

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str) -> PeerName {
        name.parse().unwrap()
    }

    /// Those that go when each asks in turn, as often as one goes.
    fn go(queue: &mut Queue, numbers: &[Number], now: Instant) -> Vec<Number> {
        let mut went = Vec::new();
        loop {
            let before = went.len();
            for number in numbers.iter().rev() {
                if !went.contains(number) && !queue.active.contains_key(number) && queue.ask(*number, true, now) == Standing::Goes {
                    went.push(*number);
                }
            }
            if went.len() == before {
                return went;
            }
        }
    }

    fn joined(queue: &mut Queue, peers: &[&str]) -> Vec<Number> {
        peers.iter().map(|name| queue.join(&peer(name)).unwrap()).collect()
    }

    #[test]
    fn first_come_is_first_served_and_so_many_at_once() {
        let (mut queue, now) = (Queue::new(2, 10), Instant::now());
        let all = joined(&mut queue, &["b"; 5]);
        assert_eq!(go(&mut queue, &all, now), all[..2], "whoever asks first");
        assert_eq!(queue.ask(all[4], true, now), Standing::Waits { position: 3, ask_at: None });
        queue.leave(all[0]);
        assert_eq!(go(&mut queue, &all[2..], now), all[2..3]);
        assert_eq!(queue.ask(all[4], true, now), Standing::Waits { position: 2, ask_at: None });
        queue.leave(all[3]);
        queue.leave(all[1]);
        assert_eq!(go(&mut queue, &all[4..], now), all[4..], "whoever was before it gave up");
        assert_eq!(queue.waiting(), 0);
    }

    #[test]
    fn without_room_in_this_gateway_nobody_goes() {
        let (mut queue, now) = (Queue::new(2, 10), Instant::now());
        let first = queue.join(&peer("b")).unwrap();
        assert_eq!(queue.ask(first, false, now), Standing::Waits { position: 1, ask_at: None });
        assert_eq!(queue.ask(first, true, now), Standing::Goes);
    }

    #[test]
    fn so_many_may_wait_and_one_that_passes_counts() {
        let (mut queue, now) = (Queue::new(1, 2), Instant::now());
        let passed = queue.pass(&peer("b"));
        let all = joined(&mut queue, &["b", "b"]);
        assert_eq!(queue.join(&peer("b")), Err(QueueFull));
        assert_eq!(go(&mut queue, &all, now), all[..0]);
        queue.leave(passed);
        assert_eq!(go(&mut queue, &all, now), all[..1]);
        assert!(queue.join(&peer("b")).is_ok());
    }

    #[test]
    fn a_peer_without_room_is_asked_by_one_at_a_time_and_holds_up_nobody_else() {
        let (mut queue, mut now) = (Queue::new(4, 10), Instant::now());
        let all = joined(&mut queue, &["full", "full", "full", "full", "free"]);
        assert_eq!(go(&mut queue, &all, now), all[..4]);
        // It takes the first two.
        queue.taken(all[0], now);
        queue.taken(all[1], now);
        queue.sent_back(all[3], now, 1.0);
        queue.sent_back(all[2], now, 1.0);
        assert_eq!(queue.ask(all[3], true, now), Standing::Waits { position: 2, ask_at: Some(now + PAUSE) });
        assert_eq!(go(&mut queue, &all[2..], now), all[4..]);
        // Whoever came first asks first, and the other waits for the answer.
        now += PAUSE;
        assert_eq!(go(&mut queue, &all[2..4], now), all[2..3]);
        queue.sent_back(all[2], now, 0.0);
        assert_eq!(queue.ask(all[2], true, now), Standing::Waits { position: 1, ask_at: Some(now + PAUSE) });
        // Where one of ours has ended there is room without a pause.
        queue.leave(all[0]);
        assert_eq!(go(&mut queue, &all[2..4], now), all[2..3]);
        assert!(matches!(queue.ask(all[3], true, now), Standing::Waits { position: 1, ask_at: Some(_) }));
    }

    #[test]
    fn a_peer_that_takes_one_more_may_take_the_next() {
        let (mut queue, mut now) = (Queue::new(8, 10), Instant::now());
        let all = joined(&mut queue, &["b"; 4]);
        assert_eq!(go(&mut queue, &all[..1], now), all[..1]);
        queue.sent_back(all[0], now, 1.0);
        assert_eq!(go(&mut queue, &all, now), all[..0]);
        now += PAUSE;
        assert_eq!(go(&mut queue, &all, now), all[..1]);
        queue.taken(all[0], now);
        assert_eq!(go(&mut queue, &all, now), all[1..2]);
        queue.taken(all[1], now);
        assert_eq!(go(&mut queue, &all, now), all[2..3]);
    }

    #[test]
    fn pauses_grow_to_a_bound_and_are_forgotten_with_the_peer() {
        let (mut queue, mut now) = (Queue::new(1, 10), Instant::now());
        let number = queue.join(&peer("b")).unwrap();
        let mut pauses = Vec::new();
        for _ in 0..6 {
            assert_eq!(queue.ask(number, true, now), Standing::Goes);
            queue.sent_back(number, now, 1.0);
            let Standing::Waits { position: 1, ask_at: Some(at) } = queue.ask(number, true, now) else { panic!("it goes at once") };
            pauses.push((at - now).as_secs());
            now = at;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 8, 8]);
        queue.leave(number);
        assert!(queue.peers.is_empty());
        let next = queue.join(&peer("b")).unwrap();
        assert_eq!(queue.ask(next, true, now), Standing::Goes);
    }
}
