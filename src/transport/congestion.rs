//! Congestion control by rate: how much a path delivers is measured, and the window follows from it. In the spirit of BBR.
//!
//! Loss says little on a long path: at 1 Gbit/s and 50 ms a controller that halves on each loss needs one in 100 million
//! packets. So here a window is *rate × round trip*, and loss counts only when it is more than a few percent of a round.
//!
//! ```text
//! Startup --rate stops growing, or a queue--> Drain --queue is gone--> Cruise (8 rounds: Up, Down, then level)
//!    ^                                                                   |   every 10 s without a fresh minimum: ProbeRtt
//!    +--------------------- persistent congestion: start again ----------+
//! ```
//!
//! QUIC's pacer sends 1.25 windows in a smoothed round trip, so it only spreads bursts; the window is what bounds the
//! queue at the bottleneck. That is why the gains here are those of windows and are small.
//!
//! *Owns:* the model of one path. No clock but the instants it is given, no allocation that grows with the window.

mod delivery;
mod group;
#[cfg(test)]
mod path;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use self::delivery::{Delivery, MaxOverRounds, MinRtt};
pub(super) use self::group::{Group, Member};

/// Makes a [`RateControl`] for each path.
#[derive(Debug, Clone)]
pub(super) struct RateFactory {
    /// Bytes that may be in flight before anything is known.
    pub(super) initial_window: u64,
    /// The window is never smaller, whatever is measured.
    pub(super) least_window: u64,
    /// Lanes that share the path.
    pub(super) member: Option<Arc<Member>>,
}

impl ControllerFactory for RateFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(RateControl::new(Self::clone(&self), now, current_mtu))
    }
}

/// What the window is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Doubles in each round, to find the rate.
    Startup,
    /// Lets the queue run empty that `Startup` has made.
    Drain,
    /// Stays near the rate and asks for more in one round of eight.
    Cruise { round: u8 },
    /// Half a path, so that the path's own round trip shows.
    ProbeRtt { until: Instant, rounds: u8 },
}

/// The state for one path.
#[derive(Debug, Clone)]
pub(super) struct RateControl {
    factory: RateFactory,
    mtu: u64,
    window: u64,
    phase: Phase,
    delivery: Delivery,
    rate: MaxOverRounds,
    min_rtt: MinRtt,
    growth: Growth,
    round: Round,
    /// What losses allow, until they stop.
    ceiling: Option<u64>,
    /// When the newest packet was sent that the current acknowledgements are for, and their bytes.
    acked: Option<(Instant, u64)>,
}

/// How the rate grew in `Startup`.
#[derive(Debug, Clone, Copy, Default)]
struct Growth {
    best: u64,
    flat_rounds: u8,
}

/// Counters of the round that goes on.
#[derive(Debug, Clone, Copy, Default)]
struct Round {
    delivered: u64,
    lost: u64,
    marked: bool,
    best_rate: u64,
    shortest: Option<Duration>,
    app_limited: bool,
}

impl Round {
    fn is_lossy(&self, mtu: u64) -> bool {
        let sent = self.delivered.saturating_add(self.lost);
        self.lost > mtu * 8 && self.lost.saturating_mul(100) > sent.saturating_mul(LOSS_PERCENT)
    }
}

impl RateControl {
    fn new(factory: RateFactory, now: Instant, mtu: u16) -> Self {
        Self {
            mtu: mtu.into(),
            window: factory.initial_window,
            factory,
            phase: Phase::Startup,
            delivery: Delivery::new(now),
            rate: MaxOverRounds::default(),
            min_rtt: MinRtt::default(),
            growth: Growth::default(),
            round: Round::default(),
            ceiling: None,
            acked: None,
        }
    }

    /// Bytes that the path delivers in `time` at the measured rate.
    fn delivers(&self, time: Duration) -> u64 {
        let own = self.rate.best();
        let rate = match &self.factory.member {
            Some(member) if self.phase != Phase::Startup => member.fair(own),
            _ => own,
        };
        bytes_in(rate, time)
    }

    fn round_ends(&mut self, now: Instant) {
        let round = std::mem::take(&mut self.round);
        if !round.app_limited {
            self.rate.next_round();
        }
        if let Some(member) = &self.factory.member {
            member.tell(if round.app_limited || self.phase == Phase::Startup { 0 } else { self.rate.best() });
        }
        self.heed_losses(&round);
        let is_full = self.phase == Phase::Startup && self.is_full(&round);
        self.phase = match self.phase {
            Phase::Startup if is_full => Phase::Drain,
            Phase::Cruise { round } => Phase::Cruise { round: (round + 1) % CYCLE_ROUNDS },
            Phase::ProbeRtt { until, rounds } => Phase::ProbeRtt { until, rounds: rounds.saturating_add(1) },
            phase => phase,
        };
        if self.min_rtt.is_stale(now) && !round.app_limited && !matches!(self.phase, Phase::Startup | Phase::ProbeRtt { .. }) {
            self.min_rtt.renew();
            // WHY: on a short path the allowance is most of the window, and half of it would starve on a late wake-up.
            if self.min_rtt.get() > ALLOWANCE {
                self.phase = Phase::ProbeRtt { until: now + PROBE_RTT, rounds: 0 };
            }
        }
    }

    /// Whether `Startup` has found the end of the path.
    fn is_full(&mut self, round: &Round) -> bool {
        if round.app_limited {
            return false;
        }
        if self.rate.best() >= self.growth.best.saturating_mul(5) / 4 {
            self.growth = Growth { best: self.rate.best(), flat_rounds: 0 };
        } else {
            self.growth.flat_rounds += 1;
        }
        let queue = round.shortest.unwrap_or_default().saturating_sub(self.min_rtt.get());
        self.growth.flat_rounds >= 3 || self.ceiling.is_some() || queue > ALLOWANCE.max(self.min_rtt.get() / 2)
    }

    /// A few percent are noise. More means that a queue overflows or somebody polices the rate: less, until it stops.
    fn heed_losses(&mut self, round: &Round) {
        if round.is_lossy(self.mtu) || round.marked {
            // What did arrive in this round certainly fits.
            let fits = bytes_in(round.best_rate, self.min_rtt.get()) / 100 * 95;
            self.ceiling = Some((self.window / 100 * 85).max(fits));
        } else if let Some(ceiling) = self.ceiling {
            let next = ceiling.saturating_add(ceiling / 16);
            self.ceiling = Some(next).filter(|next| *next < self.target());
        }
    }

    /// The window that phase and model want, without regard to losses.
    fn target(&self) -> u64 {
        let path = self.delivers(self.min_rtt.get());
        match self.phase {
            Phase::Startup => self.window,
            Phase::Drain => path.saturating_add(self.allowance() / 4),
            Phase::Cruise { round: 0 } => path.saturating_add(self.allowance()) / 100 * 135,
            Phase::Cruise { round: 1 } => (path / 100 * 95).saturating_add(self.allowance() / 4),
            Phase::Cruise { .. } => (path / 100 * 110).saturating_add(self.allowance()),
            Phase::ProbeRtt { .. } => path / 2,
        }
    }

    /// What a window covers beyond the path, and what stands in the queue of the bottleneck: delayed acknowledgements and
    /// threads that wake up late. Two acknowledgements' worth on a slow path, where those are the longer wait.
    fn allowance(&self) -> u64 {
        let acknowledgements = self.delivers(ACK_WAIT).min(ACK_PACKETS * self.mtu);
        self.delivers(ALLOWANCE).max(acknowledgements)
    }

    /// Whether so little was in flight that the path may carry more: the thread that sends was at something else, or had no
    /// processor. `Startup` looks whether the rate grows, and its window is ahead of what is in flight.
    fn is_unused(&self, in_flight: u64) -> bool {
        self.phase != Phase::Startup && in_flight < self.window / 4 * 3
    }

    /// A packet sent at `sent` has arrived.
    fn arrived(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivery.delivered(now, bytes);
        let (newest, sum) = self.acked.unwrap_or((sent, 0));
        self.acked = Some((newest.max(sent), sum.saturating_add(bytes)));
    }

    fn set_window(&mut self, acked: u64, app_limited: bool) {
        if self.phase == Phase::Startup {
            if !app_limited {
                self.window = self.window.saturating_add(acked);
            }
            if self.rate.best() > 0 {
                let most = self.delivers((self.min_rtt.get() + ALLOWANCE) * 289 / 100);
                self.window = self.window.min(most.max(self.factory.initial_window));
            }
        } else {
            self.window = self.target();
        }
        let least = self.factory.least_window.max(LEAST_PACKETS * self.mtu);
        self.window = self.window.min(self.ceiling.unwrap_or(u64::MAX)).clamp(least, WINDOW_MAX.max(least));
    }
}

impl Controller for RateControl {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.delivery.sent(now, self.min_rtt.get());
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.arrived(now, sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        let Some((sent, acked)) = self.acked.take() else { return };
        let rtt = now.saturating_duration_since(sent);
        self.min_rtt.sample(now, rtt);
        self.round.delivered = self.round.delivered.saturating_add(acked);
        self.round.shortest = Some(self.round.shortest.map_or(rtt, |shortest| shortest.min(rtt)));
        let limited = app_limited || self.is_unused(in_flight.saturating_add(acked));
        self.round.app_limited |= limited;
        let ended = match self.delivery.sample(now, sent, self.min_rtt.get()) {
            Some(sample) => {
                if !sample.app_limited || sample.rate > self.rate.best() {
                    self.rate.sample(sample.rate);
                }
                self.round.best_rate = self.round.best_rate.max(sample.rate);
                sample.round_ended
            }
            None => false,
        };
        self.delivery.note(in_flight, limited);
        // WHY: in quinn 0.11 a receiver with more than 1024 gaps in a stream closes the connection. So when a growing window
        // makes a queue overflow, not a round of it is let pass.
        if ended || self.phase == Phase::Startup && self.round.is_lossy(self.mtu) {
            self.round_ends(now);
        }
        match self.phase {
            Phase::Drain if in_flight <= self.delivers(self.min_rtt.get() + ALLOWANCE / 2) => self.phase = Phase::Cruise { round: 2 },
            Phase::ProbeRtt { until, rounds } if now >= until && rounds > 0 => self.phase = Phase::Cruise { round: 2 },
            _ => {}
        }
        self.set_window(acked, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, _sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        if is_persistent_congestion {
            // Nothing came through for several timeouts: what was known of the path need not hold any more.
            *self = Self::new(self.factory.clone(), now, u16::try_from(self.mtu).unwrap_or(u16::MAX));
            return;
        }
        self.round.lost = self.round.lost.saturating_add(lost_bytes);
        self.round.marked |= lost_bytes == 0;
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.window = self.window.max(LEAST_PACKETS * self.mtu);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.factory.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What a rate in bytes per second gives in `time`.
fn bytes_in(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

/// Time beyond the round trip that a window covers.
const ALLOWANCE: Duration = Duration::from_millis(5);
/// The longest wait for an acknowledgement, with a little more.
const ACK_WAIT: Duration = Duration::from_millis(30);
/// Packets of two acknowledgements.
const ACK_PACKETS: u64 = 20;
/// Rounds from one attempt to get more to the next.
const CYCLE_ROUNDS: u8 = 8;
/// Packets of a round, in percent, that may be lost without meaning anything.
const LOSS_PERCENT: u64 = 4;
/// How long a probe of the round trip lasts at least.
const PROBE_RTT: Duration = Duration::from_millis(200);
/// Fewer packets in flight than this and each loss waits for a timer.
const LEAST_PACKETS: u64 = 8;
/// LIMIT: of a path, 10 Gbit/s over 50 ms; windows of streams end earlier.
const WINDOW_MAX: u64 = 64 << 20;
