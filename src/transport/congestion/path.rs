//! A simulated path for tests: one bottleneck with a queue, a delay, loss, and flows that share it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::Controller;

use super::{Member, RateControl, RateFactory};

/// What the path is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Path {
    pub(super) mbit: u64,
    pub(super) rtt: Duration,
    pub(super) queue: Duration,
    /// Of 10 000 packets.
    pub(super) lost: u64,
    pub(super) policed: bool,
}

pub(super) const PACKET: u64 = 1452;
/// Packets that a receiver collects before it acknowledges.
const ACK_EVERY: usize = 10;
const BUSY_EVERY: Duration = Duration::from_millis(10);
const ACK_DELAY: Duration = Duration::from_millis(25);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Wake {
        flow: usize,
    },
    Arrived {
        flow: usize,
        packet: u64,
    },
    /// The receiver acknowledges; the one packet that it waits for no longer, if there is any.
    Acks {
        flow: usize,
        awaited: Option<u64>,
    },
    Acked {
        flow: usize,
        packets: Vec<u64>,
    },
    /// Nothing may have come through.
    Probe {
        flow: usize,
        delivered: u64,
    },
}

/// One sender and what has become of its packets.
pub(super) struct Flow {
    pub(super) control: RateControl,
    /// Bytes in a burst, and the silence after it; none for a sender that always has more.
    pub(super) bursts: Option<(u64, Duration)>,
    burst_left: u64,
    /// The part of every 10 ms in which the sender does not get to send.
    pub(super) busy: Duration,
    outstanding: BTreeMap<u64, Instant>,
    next_packet: u64,
    received: Vec<u64>,
    pub(super) delivered: u64,
    pub(super) lost: u64,
    tokens: f64,
    refilled: Instant,
    srtt: f64,
    wakes_at: Option<Instant>,
}

pub(super) struct Simulation {
    pub(super) path: Path,
    pub(super) now: Instant,
    pub(super) start: Instant,
    pub(super) flows: Vec<Flow>,
    events: BinaryHeap<Reverse<(Instant, Event)>>,
    wire_free: Instant,
    random: u64,
    /// Longest wait in the queue since this was reset.
    pub(super) longest_queue: Duration,
}

impl Simulation {
    pub(super) fn new(path: Path) -> Self {
        let start = Instant::now();
        let events = BinaryHeap::new();
        Self { path, now: start, start, flows: vec![], events, wire_free: start, random: 7, longest_queue: Duration::ZERO }
    }

    pub(super) fn add(&mut self, after: Duration) -> usize {
        self.add_member(after, None)
    }

    pub(super) fn add_member(&mut self, after: Duration, member: Option<Member>) -> usize {
        let starts = self.start + after;
        let factory = RateFactory { initial_window: 64 * 1024, least_window: 0, member: member.map(Arc::new) };
        self.flows.push(Flow {
            control: RateControl::new(factory, starts, 1452),
            bursts: None,
            burst_left: 0,
            busy: Duration::ZERO,
            outstanding: BTreeMap::new(),
            next_packet: 0,
            received: vec![],
            delivered: 0,
            lost: 0,
            tokens: 0.0,
            refilled: starts,
            srtt: self.path.rtt.as_secs_f64(),
            wakes_at: None,
        });
        let flow = self.flows.len() - 1;
        self.events.push(Reverse((starts, Event::Wake { flow })));
        self.events.push(Reverse((starts, Event::Probe { flow, delivered: 0 })));
        flow
    }

    /// Goes on for `time`; returns what each flow delivered in it, in Mbit/s.
    pub(super) fn run(&mut self, time: Duration) -> Vec<f64> {
        let before: Vec<u64> = self.flows.iter().map(|flow| flow.delivered).collect();
        let until = self.now + time;
        while self.events.peek().is_some_and(|next| next.0.0 <= until) {
            let Some(Reverse((at, event))) = self.events.pop() else { break };
            self.now = at;
            match event {
                Event::Wake { flow } => self.send(flow),
                Event::Arrived { flow, packet } => self.arrived(flow, packet),
                Event::Acks { flow, awaited } => self.acknowledge(flow, awaited),
                Event::Acked { flow, packets } => self.acked(flow, &packets),
                Event::Probe { flow, delivered } => self.probe(flow, delivered),
            }
        }
        self.now = until;
        let mbit = |bytes: u64| bytes as f64 * 8e-6 / time.as_secs_f64();
        self.flows.iter().zip(before).map(|(flow, before)| mbit(flow.delivered - before)).collect()
    }

    fn chance(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 10_000
    }

    /// As quinn's pacer does it: 1.25 windows in a smoothed round trip, in bursts of 2 ms and at least ten packets.
    fn send(&mut self, index: usize) {
        loop {
            let now = self.now;
            let flow = &mut self.flows[index];
            flow.wakes_at = flow.wakes_at.filter(|at| *at > now);
            if flow.bursts.is_some() && flow.burst_left < PACKET {
                return;
            }
            let into = Duration::from_nanos(u64::try_from((now - self.start).as_nanos() % BUSY_EVERY.as_nanos()).unwrap_or(0));
            if into < flow.busy {
                let free = now + (flow.busy - into);
                if flow.wakes_at.is_none_or(|at| at < free) {
                    flow.wakes_at = Some(free);
                    self.events.push(Reverse((free, Event::Wake { flow: index })));
                }
                return;
            }
            let window = flow.control.window();
            if flow.outstanding.len() as u64 * PACKET + PACKET >= window {
                return;
            }
            let capacity = (window as f64 * 0.002 / flow.srtt).clamp(10.0 * PACKET as f64, 256.0 * PACKET as f64);
            flow.tokens += window as f64 * 1.25 * (now - flow.refilled).as_secs_f64() / flow.srtt;
            flow.tokens = flow.tokens.min(capacity);
            flow.refilled = now;
            if flow.tokens < PACKET as f64 {
                let wait = Duration::from_secs_f64((capacity - flow.tokens) * flow.srtt / (window as f64 * 1.25));
                if flow.wakes_at.is_none() {
                    flow.wakes_at = Some(now + wait);
                    self.events.push(Reverse((now + wait, Event::Wake { flow: index })));
                }
                return;
            }
            flow.tokens -= PACKET as f64;
            self.transmit(index);
        }
    }

    fn transmit(&mut self, index: usize) {
        let (now, chance) = (self.now, self.chance());
        let flow = &mut self.flows[index];
        flow.burst_left = flow.burst_left.saturating_sub(PACKET);
        let packet = flow.next_packet;
        flow.next_packet += 1;
        flow.outstanding.insert(packet, now);
        flow.control.on_sent(now, PACKET, packet);
        let start = self.wire_free.max(now);
        let allowed = if self.path.policed { Duration::from_millis(2) } else { self.path.queue };
        if chance < self.path.lost || start - now > allowed {
            return;
        }
        self.longest_queue = self.longest_queue.max(start - now);
        self.wire_free = start + Duration::from_nanos(PACKET * 8000 / self.path.mbit);
        // A policer drops what is too much and delays nothing.
        let leaves = if self.path.policed { now } else { self.wire_free };
        self.events.push(Reverse((leaves + self.path.rtt / 2, Event::Arrived { flow: index, packet })));
    }

    fn probe(&mut self, index: usize, delivered: u64) {
        let flow = &self.flows[index];
        let stuck = delivered == flow.delivered && !flow.outstanding.is_empty();
        let again = Event::Probe { flow: index, delivered: flow.delivered };
        self.events.push(Reverse((self.now + 3 * self.path.rtt + Duration::from_millis(100), again)));
        if stuck {
            self.transmit(index);
            self.transmit(index);
        }
    }

    fn arrived(&mut self, index: usize, packet: u64) {
        let flow = &mut self.flows[index];
        flow.received.push(packet);
        match flow.received.len() {
            1 => self.events.push(Reverse((self.now + ACK_DELAY, Event::Acks { flow: index, awaited: Some(packet) }))),
            ACK_EVERY => self.acknowledge(index, None),
            _ => {}
        }
    }

    fn acknowledge(&mut self, index: usize, awaited: Option<u64>) {
        let received = &mut self.flows[index].received;
        if awaited.is_none_or(|packet| received.first() == Some(&packet)) {
            let packets = std::mem::take(received);
            self.events.push(Reverse((self.now + self.path.rtt / 2, Event::Acked { flow: index, packets })));
        }
    }

    fn acked(&mut self, index: usize, acked: &[u64]) {
        let now = self.now;
        let flow = &mut self.flows[index];
        let Some(largest) = acked.iter().max().copied() else { return };
        let mut rtt = Duration::MAX;
        for packet in acked {
            let Some(sent) = flow.outstanding.remove(packet) else { continue };
            rtt = rtt.min(now - sent);
            flow.delivered += PACKET;
            flow.control.arrived(now, sent, PACKET);
        }
        if rtt < Duration::MAX {
            flow.srtt = 0.875 * flow.srtt + 0.125 * rtt.as_secs_f64();
        }
        let in_flight = flow.outstanding.len() as u64 * PACKET;
        let app_limited = flow.bursts.is_some() && flow.burst_left < PACKET;
        flow.control.on_end_acks(now, in_flight, app_limited, Some(largest));
        let kept = flow.outstanding.split_off(&largest.saturating_sub(2));
        let gone = std::mem::replace(&mut flow.outstanding, kept);
        if let Some((_, sent)) = gone.last_key_value() {
            flow.lost += gone.len() as u64;
            flow.control.on_congestion_event(now, *sent, false, gone.len() as u64 * PACKET);
        }
        if let Some((bytes, pause)) = flow.bursts
            && in_flight == 0
            && flow.burst_left < PACKET
        {
            flow.burst_left = bytes;
            self.events.push(Reverse((now + pause, Event::Wake { flow: index })));
        }
        self.send(index);
    }
}
