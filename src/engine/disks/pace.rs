//! Whether a mirror will ever be done, when its guest goes on writing.

use std::time::{Duration, Instant};

use crate::hypervisor::MirrorProgress;

/// Looks at what remains, every few seconds.
#[derive(Debug, Default)]
pub(in crate::engine) struct MirrorPace {
    looked: Option<(Instant, u64)>,
    /// Looks in a row at which it had not become less.
    idle: u32,
}

impl MirrorPace {
    /// Whether the guest has to write less, or it will not be done.
    pub(in crate::engine) fn is_hopeless(&mut self, now: Instant, said: &MirrorProgress) -> bool {
        let Some((at, before)) = self.looked else {
            self.looked = Some((now, said.remaining_bytes));
            return false;
        };
        if now < at + LOOK_EVERY {
            return false;
        }
        self.looked = Some((now, said.remaining_bytes));
        self.idle = if said.remaining_bytes <= before - before / 20 && before > 0 { 0 } else { self.idle + 1 };
        !said.ready && self.idle >= IDLE_MAX
    }

    /// The link was away: what was seen says nothing.
    pub(in crate::engine) fn forget(&mut self) {
        *self = Self::default();
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(3);
/// WHY: a burst of writes ends by itself; one that lasts for six seconds does not.
const IDLE_MAX: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// At which look, three seconds each, it is found hopeless.
    fn found(remaining: &[u64]) -> Option<usize> {
        let (mut pace, began) = (MirrorPace::default(), Instant::now());
        remaining.iter().enumerate().position(|(look, remaining)| {
            let said = MirrorProgress { total_bytes: 1000, remaining_bytes: *remaining, ready: false };
            let at = began + LOOK_EVERY * u32::try_from(look).unwrap();
            pace.is_hopeless(at, &said)
        })
    }

    #[test]
    fn what_becomes_less_is_waited_for_and_what_does_not_is_not() {
        assert_eq!(found(&[1000, 900, 800, 700, 600, 500]), None);
        assert_eq!(found(&[1000, 900, 900, 800, 790, 700]), None, "one look that shows nothing");
        assert_eq!(found(&[1000, 500, 490, 485, 480]), Some(3));
        assert_eq!(found(&[1000, 1000, 1100]), Some(2));
    }

    #[test]
    fn one_that_is_ready_needs_nothing() {
        let (mut pace, now) = (MirrorPace::default(), Instant::now());
        let said = MirrorProgress { total_bytes: 10, remaining_bytes: 5, ready: true };
        assert!((0..9).all(|look| !pace.is_hopeless(now + LOOK_EVERY * look, &said)));
    }
}
