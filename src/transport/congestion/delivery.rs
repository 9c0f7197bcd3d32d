//! Measuring a path: how fast it delivers, and how long a round trip takes when no queue stands.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far delivery was when something was sent.
#[derive(Debug, Clone, Copy)]
struct Snapshot {
    sent: Instant,
    delivered: u64,
    delivered_at: Instant,
    /// When the newest packet was sent that was acknowledged by then.
    acked_sent: Instant,
    app_limited: bool,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Bytes per second.
    pub(super) rate: u64,
    /// The application had too little to send, so the path may be faster.
    pub(super) app_limited: bool,
    /// Everything that was in flight at the end of the last round is acknowledged now.
    pub(super) round_ended: bool,
}

/// Delivery over time, and snapshots of it for what is in flight.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    snapshots: VecDeque<Snapshot>,
    delivered: u64,
    delivered_at: Instant,
    acked_sent: Instant,
    /// Until this much is delivered, measurements say nothing against the path.
    app_limited_until: u64,
    round_ends_at: u64,
    idle: bool,
}

impl Delivery {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            snapshots: VecDeque::new(),
            delivered: 0,
            delivered_at: now,
            acked_sent: now,
            app_limited_until: 0,
            round_ends_at: 0,
            idle: true,
        }
    }

    /// Something was sent. A snapshot that is a little too old gives a sample over a little more time, so few are kept.
    pub(super) fn sent(&mut self, now: Instant, min_rtt: Duration) {
        if self.idle {
            self.idle = false;
            self.delivered_at = now;
            self.acked_sent = now;
        }
        if self.snapshots.back().is_some_and(|last| now.saturating_duration_since(last.sent) <= min_rtt / SNAPSHOTS_IN_RTT) {
            return;
        }
        if self.snapshots.len() >= SNAPSHOTS_MAX {
            self.snapshots.pop_front();
        }
        self.snapshots.push_back(Snapshot {
            sent: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            acked_sent: self.acked_sent,
            app_limited: self.delivered < self.app_limited_until,
        });
    }

    pub(super) fn delivered(&mut self, now: Instant, bytes: u64) {
        self.delivered = self.delivered.saturating_add(bytes);
        self.delivered_at = now;
    }

    /// What the acknowledgement of a packet sent at `sent` says. None if it came in less than a round trip or is an old one.
    pub(super) fn sample(&mut self, now: Instant, sent: Instant, min_rtt: Duration) -> Option<Sample> {
        self.acked_sent = self.acked_sent.max(sent);
        let newer = self.snapshots.partition_point(|snapshot| snapshot.sent <= sent);
        self.snapshots.drain(..newer.checked_sub(1)?);
        let then = *self.snapshots.front()?;
        let round_ended = then.delivered >= self.round_ends_at;
        if round_ended {
            self.round_ends_at = self.delivered;
        }
        // The slower of the two: acknowledgements that come in a bunch do not make a path fast.
        let interval = now.saturating_duration_since(then.delivered_at).max(sent.saturating_duration_since(then.acked_sent));
        let rate = if interval < min_rtt { 0 } else { per_second(self.delivered - then.delivered, interval) };
        Some(Sample { rate, app_limited: then.app_limited, round_ended })
    }

    /// After a batch of acknowledgements: what is still on its way, and whether there was too little to send.
    pub(super) fn note(&mut self, in_flight: u64, app_limited: bool) {
        self.idle = in_flight == 0;
        if app_limited {
            self.app_limited_until = self.delivered.saturating_add(in_flight).saturating_add(1);
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / time.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// The largest of the samples of the last rounds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MaxOverRounds([u64; 10]);

impl MaxOverRounds {
    pub(super) fn best(&self) -> u64 {
        self.0.iter().copied().max().unwrap_or(0)
    }

    pub(super) fn sample(&mut self, value: u64) {
        let [newest, ..] = &mut self.0;
        *newest = value.max(*newest);
    }

    /// A round begins; the oldest is forgotten.
    pub(super) fn next_round(&mut self) {
        self.0.rotate_right(1);
        let [newest, ..] = &mut self.0;
        *newest = 0;
    }
}

/// The shortest round trip of the last seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MinRtt {
    shortest: Option<(Duration, Instant)>,
    renewing: bool,
}

impl MinRtt {
    /// Zero before the first sample.
    pub(super) fn get(&self) -> Duration {
        self.shortest.map_or(Duration::ZERO, |(shortest, _)| shortest)
    }

    pub(super) fn sample(&mut self, now: Instant, rtt: Duration) {
        let shortest = match self.shortest {
            // As good as the shortest: the path is as it was.
            Some((shortest, at)) if rtt > shortest && !self.renewing => (shortest, if rtt <= shortest + shortest / 16 { now } else { at }),
            _ => (rtt, now),
        };
        self.shortest = Some(shortest);
        self.renewing = false;
    }

    /// The next sample counts whatever it is, and the shortest from then on.
    pub(super) fn renew(&mut self) {
        self.renewing = true;
    }

    /// Whether the shortest has not been seen for 10 seconds.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        self.shortest.is_some_and(|(_, at)| now.saturating_duration_since(at) > MIN_RTT_FOR)
    }
}

/// A round trip is known to a few percent.
const SNAPSHOTS_IN_RTT: u32 = 64;
/// LIMIT: four round trips of snapshots; a queue that is deeper than that costs samples.
const SNAPSHOTS_MAX: usize = 256;
/// Routes change in minutes; queues of others in seconds.
const MIN_RTT_FOR: Duration = Duration::from_secs(10);
