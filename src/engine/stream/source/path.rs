//! How much is on its way, what the hypervisor is told of the path, and what it is asked beside.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom, SystemRandom};

use super::{Run, lock};
use crate::condense::{Condenser, Grammar, PAST_KEY_BYTES};
use crate::engine::EngineError;
use crate::engine::handoff::blocking;
use crate::engine::source::SourceOrder;
use crate::hypervisor::{HypervisorError, StreamGoal, StreamSource};
use crate::telemetry::{Phase, chain};
use crate::wire::{Compression, CompressionScope, Message};

/// What had come of the stream when the path was looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looked {
    pub(super) at: Instant,
    /// Bytes of parcels that the other hypervisor has.
    pub(super) applied: u64,
    /// Bytes of parcels.
    pub(super) read: u64,
    /// Bytes of the stream.
    pub(super) taken: u64,
    /// The shortest round trip until then. WHY: what waits on the path makes the next one longer, and is not the path.
    pub(super) rtt: Option<Duration>,
}

/// Whoever wants pages as they are, or pages that say nothing of each other, has none remembered.
pub(super) fn condenser(order: &SourceOrder, grammar: Grammar, guest_bytes: u64) -> Condenser {
    let terms = &order.stream;
    let remembers = terms.compression != Compression::None && terms.compression_scope == CompressionScope::Stream;
    let mut key = Box::new([0; PAST_KEY_BYTES]);
    // A guest that knew the key could make pages that are taken for equal.
    let keyed = SystemRandom::new().fill(key.as_mut_slice()).is_ok();
    // Equal pages mostly come close together, and room that is used again costs no fresh memory: of a Linux guest's 90,900 copies in
    // 2 GiB, 128 MiB find 98 %.
    let first = usize::try_from(guest_bytes).unwrap_or(usize::MAX).min(order.manner.table_bytes / 5 * 2);
    let past = if remembers && keyed { [first, order.manner.table_bytes / 5] } else { [0; 2] };
    Condenser::new(grammar, past, key)
}

impl Run {
    pub(super) fn condenser(&self) -> MutexGuard<'_, Condenser> {
        self.condenser.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fits the window to the path, and tells the hypervisor of a path that is slower than its socket seems.
    pub(super) async fn look_at_path(&mut self) {
        if self.looked.at.elapsed() < LOOK_AFTER {
            return;
        }
        let now = Looked {
            at: Instant::now(),
            applied: self.flow.applied_bytes(),
            read: self.flow.read_bytes(),
            taken: self.condenser().taken(),
            rtt: self.looked.rtt.into_iter().chain(self.threads.iter().map(|handle| handle.stats().rtt)).min(),
        };
        let before = std::mem::replace(&mut self.looked, now);
        let running = self.reading.is_some() && self.outage.is_none();
        let rtt = self.threads.iter().map(|handle| handle.stats().rtt).max();
        let path = rtt.filter(|_| running && self.flow.was_full()).map(|rtt| {
            let measured = now.applied.saturating_sub(before.applied) as f64 / (now.at - before.at).as_secs_f64().max(1e-3);
            // A single look may fall between two acknowledgements.
            self.path_rate = measured.max(self.path_rate * RATE_KEPT);
            self.fit_window(rtt, now.rtt);
            let written = written_for(&before, &now);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of bytes; saturates")]
            let rate = (self.path_rate * written) as u64;
            rate.max(1)
        });
        let wait = if path.is_some() || self.told != self.goal { TELL_EVERY } else { ASK_EVERY };
        if self.phase == Phase::PostCopy {
            let taken = now.taken.saturating_sub(before.taken);
            self.said.remaining_bytes = self.said.remaining_bytes.saturating_sub(taken);
        }
        // WHY: QEMU answers nothing while it writes the rest of a guest that it has stopped.
        if !running || self.phase != Phase::Memory || self.asked.elapsed() < wait {
            return;
        }
        self.asked = Instant::now();
        let (goal, told_before) = (self.goal, self.told);
        let asked = self.beside(move |guest| {
            path.map_or(Ok(()), |rate| guest.set_path_rate(rate))?;
            let said = guest.progress()?;
            let told = goal_in_round(goal, said.rounds);
            if told != told_before {
                guest.set_goal(told)?;
            }
            Ok((said, told))
        });
        match asked.await {
            Ok((said, told)) => (self.said, self.told) = (said, told),
            Err(error) => tracing::debug!(migration = %self.order.migration, error = %chain(&error), "the hypervisor says nothing"),
        }
    }

    /// As much is on its way as the path needs. Where a guest waits for pages, nothing waits in front of them that need not: then pieces are
    /// small. WHY: each lane has one that it sends and one behind it, and a window without room for these would be a rate below the path's, which
    /// makes the next window smaller.
    fn fit_window(&self, rtt: Duration, shortest: Option<Duration>) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of bytes; saturates")]
        let bytes = |time: Duration| (self.path_rate * time.as_secs_f64()) as u64;
        if self.phase == Phase::PostCopy {
            let on_its_way = bytes(shortest.unwrap_or(rtt) + SPLIT_SLACK);
            self.flow.set_split_window(on_its_way, bytes(PIECE_TIME), u64::from(self.lanes) * 2);
        } else {
            self.flow.set_window(bytes(rtt * 2 + WINDOW_SLACK));
        }
    }

    /// Asks the hypervisor something. It may not answer before its socket takes more, so what the destination says is heard
    /// meanwhile: applied bytes at once, the rest afterwards.
    pub(super) async fn beside<T: Send + 'static>(
        &mut self,
        ask: impl FnOnce(&mut dyn StreamSource) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let guest = Arc::clone(&self.guest);
        let asked = blocking(move || Ok(ask(lock(&guest).as_mut())?));
        tokio::pin!(asked);
        loop {
            let listens = self.outage.is_none() && self.backlog.is_empty();
            tokio::select! {
                answer = &mut asked => return answer,
                message = self.link.session.receive(), if listens => match message {
                    Ok(Message::StreamApplied(applied)) if applied.migration == self.order.migration && self.flow.applied(applied.bytes) => {}
                    // QEMU may wait for just that.
                    Ok(Message::DiskApplied(applied)) if self.are_applied(&applied) => {}
                    message => self.backlog.push_back(message),
                },
            }
        }
    }
}

/// How many bytes of what a hypervisor writes go for one that is sent: no more than lately, nor than in all, and within bounds. What is
/// left when it stops its guest is seldom packed as well as what it has just read: of zeroes, hardly anything is sent.
fn written_for(before: &Looked, now: &Looked) -> f64 {
    // A stream that has just ended says 0: its digest was taken.
    let part = |taken: u64, read: u64| taken as f64 / (read as f64).max(1.0);
    let lately = part(now.taken.saturating_sub(before.taken), now.read.saturating_sub(before.read));
    lately.min(part(now.taken, now.read)).clamp(1.0, WRITTEN_MAX)
}

/// What the hypervisor is asked for in a round, the first of which sends everything. It pauses its guest as soon as what is left fits
/// into the pause that it is allowed, so a guest that hardly writes would pause for all of it, with most of its memory long sent.
pub(super) fn goal_in_round(goal: StreamGoal, round: u32) -> StreamGoal {
    let part = match round {
        0 | 1 => 16,
        2 => 4,
        _ => 1,
    };
    StreamGoal { downtime_max: goal.downtime_max / part, ..goal }
}

/// WHY: people look at it once a second at most.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// WHY: an estimate that changes faster is of no use to a hypervisor that decides ten times a second.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// WHY: two looks that a busy processor brings close together show a burst and no path. A hypervisor that is told of it stops its guest, whose
/// rest then takes seconds.
const LOOK_AFTER: Duration = Duration::from_millis(100);
/// WHY: a hypervisor that is told of more than its path takes stops its guest for as many times as long.
const WRITTEN_MAX: f64 = 8.0;
/// What is left of a rate at the next look, if that shows less.
const RATE_KEPT: f64 = 0.8;
/// WHY: acknowledgements are not sent for every piece, and hypervisors take some milliseconds for theirs.
const WINDOW_SLACK: Duration = Duration::from_millis(30);
/// The same, where a guest waits for pages.
const SPLIT_SLACK: Duration = Duration::from_millis(10);
/// How long a piece is on the path, where a guest waits for pages.
const PIECE_TIME: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_not_said_to_be_faster_than_what_is_left_can_be() {
        let looked = |taken, read| Looked { at: Instant::now(), applied: 0, read, taken, rtt: None };
        let written = |before: (u64, u64), now: (u64, u64)| written_for(&looked(before.0, before.1), &looked(now.0, now.1));
        assert_eq!(written((1000, 500), (4000, 1500)), 4000.0 / 1500.0, "all of it");
        assert_eq!(written((4000, 500), (6000, 1500)), 2.0, "lately");
        assert_eq!(written((1 << 20, 1 << 10), (1 << 30, 1 << 11)), WRITTEN_MAX, "zeroes");
        assert_eq!((written((10, 20), (20, 40)), written((5, 5), (0, 5)), written((0, 0), (0, 0))), (1.0, 1.0, 1.0));
    }

    #[test]
    fn the_pause_that_is_allowed_is_used_when_rounds_do_not_get_by_with_less() {
        let goal = StreamGoal { downtime_max: Duration::from_millis(320), throttle: true };
        let allowed = [0, 1, 2, 3, 60].map(|round| goal_in_round(goal, round).downtime_max.as_millis());
        assert_eq!(allowed, [20, 20, 80, 320, 320]);
        assert!(goal_in_round(goal, 1).throttle);
    }
}
