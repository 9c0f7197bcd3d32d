//! Whether another round pays, the guest is paused, slowed down, or the attempt is given up.
//!
//! The guest's writes race the link: what is dirty after a round has to be sent while the guest is
//! paused, so `expected downtime = dirty bytes / send rate + fixed cost`. Rounds go on while they
//! bring that down, and end in a verdict when they do not.

use std::time::Duration;

use crate::types::PAGE_BYTES;

/// What an operator asks of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Goal {
    /// The longest pause that the guest may see.
    pub downtime_max: Duration,
    /// Whether vCPUs may be slowed down to get there.
    pub throttle: bool,
    /// What a pause costs besides the last pages: device state, comparison, journal, round trips.
    pub fixed_cost: Duration,
}

/// One round as it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundMeasure {
    /// Pages of the round that were not zero; zero pages cost almost nothing and say nothing about the link.
    pub content_pages: u64,
    /// From the first page read to the last page applied.
    pub duration: Duration,
    /// Pages that the guest wrote meanwhile.
    pub dirty_pages: u64,
}

/// Why an attempt does not converge; the numbers behind "does not converge, because".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// What the guest dirties, bytes a second.
    pub dirty_bytes_per_second: u64,
    /// What is sent, bytes of pages a second.
    pub send_bytes_per_second: u64,
    /// The pause that would be needed.
    pub downtime_expected: Duration,
    /// The pause that is allowed.
    pub downtime_max: Duration,
    /// Whether slowing down was tried.
    pub throttled: bool,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes / (1 << 20);
        write!(
            f,
            "does not converge, because the guest dirties {} MiB/s{} and {} MiB/s are sent: a pause of {} ms would be needed and {} ms are allowed",
            mib(self.dirty_bytes_per_second),
            if self.throttled { " even when slowed down" } else { "" },
            mib(self.send_bytes_per_second),
            self.downtime_expected.as_millis(),
            self.downtime_max.as_millis()
        )
    }
}

/// What comes after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send what is dirty while the guest goes on.
    Round,
    /// Pause the guest and send the rest.
    Stop,
    /// Another round with this share of vCPU time taken away, in percent.
    Throttle(u8),
    /// Nothing helps within what was allowed.
    GiveUp(Verdict),
}

/// The estimates of one migration.
#[derive(Debug, Clone)]
pub struct Convergence {
    goal: Goal,
    send_rate: Option<u64>,
    dirty_rate: u64,
    expected: Option<Duration>,
    best: Option<Duration>,
    rounds_without_gain: u32,
    rounds: u32,
    throttle: u8,
}

/// Rounds that may pass without making the expected pause a tenth shorter.
const PATIENCE_ROUNDS: u32 = 3;
/// Rounds in all; a guest that still gains a tenth each time has gained a factor of 500 by then.
const ROUNDS_MAX: u32 = 60;
/// Fewer content pages than this measure latency, not the link: 1 MiB.
const RATE_PAGES_MIN: u64 = 256;
/// QEMU's auto-converge steps are 20 then 10 each; ours are coarser, as each costs three rounds.
const THROTTLE_STEPS: [u8; 6] = [20, 40, 60, 80, 95, 99];

impl Convergence {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(goal: Goal) -> Self {
        Self { goal, send_rate: None, dirty_rate: 0, expected: None, best: None, rounds_without_gain: 0, rounds: 0, throttle: 0 }
    }

    /// What is asked now.
    #[must_use]
    pub fn goal(&self) -> &Goal {
        &self.goal
    }

    /// Changes the goal of a migration that is under way.
    pub fn set_goal(&mut self, goal: Goal) {
        self.goal = goal;
        self.best = None;
        self.rounds_without_gain = 0;
    }

    /// The pause that the last round lets expect.
    #[must_use]
    pub fn downtime_expected(&self) -> Option<Duration> {
        self.expected
    }

    /// Bytes a second that the guest dirtied in the last round.
    #[must_use]
    pub fn dirty_bytes_per_second(&self) -> u64 {
        self.dirty_rate
    }

    /// Bytes of pages a second that were sent.
    #[must_use]
    pub fn send_bytes_per_second(&self) -> Option<u64> {
        self.send_rate
    }

    /// Takes in a round and decides what comes next.
    pub fn decide(&mut self, round: &RoundMeasure) -> Decision {
        self.rounds += 1;
        let sent = bytes_per_second(round.content_pages, round.duration);
        if round.content_pages >= RATE_PAGES_MIN || self.send_rate.is_none() {
            // Half old, half new: one slow round neither stops a migration nor starts a pause.
            self.send_rate = Some(self.send_rate.map_or(sent, |old| old / 2 + sent / 2).max(1));
        }
        self.dirty_rate = bytes_per_second(round.dirty_pages, round.duration);
        let rate = self.send_rate.unwrap_or(1).max(1);
        let last_pages = Duration::from_secs_f64(bytes(round.dirty_pages) as f64 / rate as f64);
        let expected = last_pages + self.goal.fixed_cost;
        self.expected = Some(expected);
        if expected <= self.goal.downtime_max {
            return Decision::Stop;
        }
        match self.best {
            Some(best) if expected > best.mul_f64(0.9) => self.rounds_without_gain += 1,
            _ => self.rounds_without_gain = 0,
        }
        self.best = Some(self.best.map_or(expected, |best| best.min(expected)));
        if self.rounds_without_gain < PATIENCE_ROUNDS && self.rounds < ROUNDS_MAX {
            return Decision::Round;
        }
        let stronger = THROTTLE_STEPS.into_iter().find(|step| *step > self.throttle);
        match stronger {
            Some(step) if self.goal.throttle => {
                self.throttle = step;
                self.rounds_without_gain = 0;
                Decision::Throttle(step)
            }
            _ => Decision::GiveUp(Verdict {
                dirty_bytes_per_second: self.dirty_rate,
                send_bytes_per_second: rate,
                downtime_expected: expected,
                downtime_max: self.goal.downtime_max,
                throttled: self.throttle > 0,
            }),
        }
    }
}

fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES as u64)
}

fn bytes_per_second(pages: u64, duration: Duration) -> u64 {
    let micros = duration.as_micros().max(1);
    u64::try_from(u128::from(bytes(pages)) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(downtime_ms: u64, throttle: bool) -> Goal {
        Goal { downtime_max: Duration::from_millis(downtime_ms), throttle, fixed_cost: Duration::from_millis(10) }
    }

    fn round(content_pages: u64, ms: u64, dirty_pages: u64) -> RoundMeasure {
        RoundMeasure { content_pages, duration: Duration::from_millis(ms), dirty_pages }
    }

    #[test]
    fn an_idle_guest_is_paused_after_one_round() {
        assert_eq!(Convergence::new(goal(50, false)).decide(&round(100_000, 1000, 10)), Decision::Stop);
    }

    #[test]
    fn rounds_go_on_while_they_gain() {
        let mut c = Convergence::new(goal(100, false));
        // 400 MB/s; dirty halves every round.
        let mut dirty = 64_000;
        let mut rounds = 0;
        while c.decide(&round(dirty, dirty / 100, dirty / 2)) == Decision::Round {
            dirty /= 2;
            rounds += 1;
            assert!(rounds < 10);
        }
        assert!(c.downtime_expected().unwrap() <= Duration::from_millis(100), "{c:?}");
        assert!(rounds >= 2);
    }

    #[test]
    fn a_guest_that_outruns_the_link_gets_a_verdict_with_numbers() {
        let mut c = Convergence::new(goal(100, false));
        let measure = round(100_000, 1000, 90_000);
        let mut decisions = Vec::new();
        for _ in 0..10 {
            decisions.push(c.decide(&measure));
            if let Decision::GiveUp(verdict) = decisions.last().unwrap() {
                assert_eq!(verdict.dirty_bytes_per_second, 90_000 * 4096);
                let text = verdict.to_string();
                assert!(
                    text.contains("does not converge, because") && text.contains("351 MiB/s") && text.contains("100 ms are allowed"),
                    "{text}"
                );
                return;
            }
        }
        panic!("no verdict in {decisions:?}");
    }

    #[test]
    fn throttling_is_tried_step_by_step_only_when_asked() {
        let mut c = Convergence::new(goal(100, true));
        let mut steps = Vec::new();
        for _ in 0..60 {
            match c.decide(&round(100_000, 1000, 90_000)) {
                Decision::Throttle(percent) => steps.push(percent),
                Decision::GiveUp(verdict) => {
                    assert!(verdict.throttled);
                    break;
                }
                Decision::Round => {}
                Decision::Stop => panic!("cannot stop"),
            }
        }
        assert_eq!(steps, THROTTLE_STEPS);
    }

    #[test]
    fn endless_small_gains_end() {
        let mut c = Convergence::new(goal(1, false));
        let mut dirty = u64::from(u32::MAX);
        for n in 0..=ROUNDS_MAX {
            if matches!(c.decide(&round(1_000_000, 1000, dirty)), Decision::GiveUp(_)) {
                assert!(n + 1 >= PATIENCE_ROUNDS);
                return;
            }
            dirty = dirty * 8 / 10;
        }
        panic!("no end");
    }

    #[test]
    fn a_tiny_round_does_not_spoil_the_rate() {
        let mut c = Convergence::new(goal(10, false));
        c.decide(&round(100_000, 1000, 50_000));
        let rate = c.send_bytes_per_second();
        c.decide(&round(3, 500, 50_000));
        assert_eq!(c.send_bytes_per_second(), rate);
    }
}
