//! Which pages the destination still has to get.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::memory::PageSet;
use crate::types::Round;

/// The dirty accounting of one migration.
///
/// `INVARIANT(no-lost-dirt)`: every page that was ever harvested is owed, in flight or applied, and
/// an applied page is neither of the other two. Asserted whenever a round ends, also in release
/// builds: a page lost here is a corrupt guest.
#[derive(Debug)]
pub struct Tracker {
    round: Round,
    harvested: PageSet,
    owed: PageSet,
    in_flight: VecDeque<(Round, Arc<PageSet>)>,
    applied: PageSet,
}

/// The destination says that it applied a round which is not the oldest in flight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("round {got} cannot be applied: expected {}, got {got}", .expected.map_or_else(|| "no round to be in flight".to_owned(), |round| format!("round {round}")))]
pub struct WrongRound {
    /// The oldest round in flight, if there is one.
    pub expected: Option<Round>,
    /// The round that came.
    pub got: Round,
}

impl Tracker {
    /// Nothing owed yet, of a VM with `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let none = PageSet::empty(pages);
        Self { round: Round(0), harvested: none.clone(), owed: none.clone(), in_flight: VecDeque::new(), applied: none }
    }

    /// As an earlier process left it: `owed` is what the destination does not have, in flight as `round` or not yet.
    #[must_use]
    pub fn after_restart(round: Round, in_flight: bool, owed: PageSet) -> Self {
        let (harvested, mut applied) = (PageSet::full(owed.pages()), PageSet::full(owed.pages()));
        applied.subtract(&owed);
        let none = PageSet::empty(owed.pages());
        let (owed, in_flight) = if in_flight { (none, VecDeque::from([(round, Arc::new(owed))])) } else { (owed, VecDeque::new()) };
        Self { round, harvested, owed, in_flight, applied }
    }

    /// Takes over pages that a harvest found dirty. What of them was applied is owed again.
    pub fn owe(&mut self, harvested: &PageSet) {
        self.harvested.merge(harvested);
        self.owed.merge(harvested);
        self.applied.subtract(harvested);
    }

    /// Everything owed is in flight from now on, as the next round. Rounds may overlap: the lanes
    /// keep the versions of a page in order.
    pub fn begin_round(&mut self) -> (Round, Arc<PageSet>) {
        self.round = Round(self.round.0.saturating_add(1));
        let pages = Arc::new(self.owed.take());
        self.in_flight.push_back((self.round, Arc::clone(&pages)));
        (self.round, pages)
    }

    /// Every page of the oldest round in flight is in the destination's RAM.
    ///
    /// # Errors
    /// Another round is the oldest, or none is in flight: the peer misbehaved.
    pub fn applied(&mut self, round: Round) -> Result<(), WrongRound> {
        match self.in_flight.pop_front() {
            Some((oldest, pages)) if oldest == round => {
                self.applied.merge(&pages);
                self.applied.subtract(&self.owed);
                for (_, newer) in &self.in_flight {
                    self.applied.subtract(newer);
                }
                self.check();
                Ok(())
            }
            Some(other) => {
                let expected = Some(other.0);
                self.in_flight.push_front(other);
                Err(WrongRound { expected, got: round })
            }
            None => Err(WrongRound { expected: None, got: round }),
        }
    }

    /// The lanes are gone, and the destination has said what it has of the rounds in flight: `missing` of them is owed again.
    pub fn resumed(&mut self, missing: &PageSet) {
        for (_, pages) in self.in_flight.drain(..) {
            self.applied.merge(&pages);
        }
        self.owed.merge(missing);
        self.applied.subtract(&self.owed);
        self.check();
    }

    /// The lanes are gone: what was in flight may or may not have arrived and is owed again.
    pub fn interrupted(&mut self) {
        for (_, pages) in self.in_flight.drain(..) {
            self.owed.merge(&pages);
        }
        self.check();
    }

    /// Gives up: the pages that the destination does not have, for whoever tracks dirt from here.
    #[must_use = "these pages are dirty and nobody else knows"]
    pub fn give_back(mut self) -> PageSet {
        self.interrupted();
        self.owed
    }

    /// The round that began last; 0 before the first.
    #[must_use]
    pub fn round(&self) -> Round {
        self.round
    }

    /// Pages of the oldest round in flight.
    #[must_use]
    pub fn in_flight(&self) -> Option<Arc<PageSet>> {
        self.in_flight.front().map(|(_, pages)| Arc::clone(pages))
    }

    /// Rounds in flight.
    #[must_use]
    pub fn rounds_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Pages owed that are in no round yet.
    #[must_use]
    pub fn owed(&self) -> &PageSet {
        &self.owed
    }

    /// How many pages are owed that are in no round yet.
    #[must_use]
    pub fn owed_pages(&self) -> u64 {
        self.owed.len()
    }

    /// Pages in flight; a page in two rounds counts twice, as it is sent twice.
    #[must_use]
    pub fn in_flight_pages(&self) -> u64 {
        self.in_flight.iter().map(|(_, pages)| pages.len()).sum()
    }

    /// Pages whose last known version is in the destination's RAM.
    #[must_use]
    pub fn applied_pages(&self) -> u64 {
        self.applied.len()
    }

    /// Whether the destination has every page that was ever harvested.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.owed.is_empty() && self.in_flight.iter().all(|(_, pages)| pages.is_empty())
    }

    fn check(&self) {
        let mut pending = self.owed.clone();
        for (_, pages) in &self.in_flight {
            pending.merge(pages);
        }
        let all = pending.words().iter().zip(self.applied.words()).zip(self.harvested.words());
        let exact =
            all.fold(true, |exact, ((pending, applied), harvested)| exact & (pending | applied == *harvested) & (pending & applied == 0));
        // INVARIANT(no-lost-dirt)
        assert!(exact, "no-lost-dirt: owed, in flight and applied pages are not the harvested ones");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PageNumber;
    use proptest::prelude::*;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(100);
        for page in pages {
            set.insert(PageNumber(*page));
        }
        set
    }

    // SPEC: PROTOCOL.md#must-round-numbers
    #[test]
    fn an_applied_page_that_gets_dirty_again_is_owed_again() {
        let mut tracker = Tracker::new(100);
        tracker.owe(&set(&[1, 2, 3]));
        let (round, pages) = tracker.begin_round();
        assert_eq!((round, &*pages), (Round(1), &set(&[1, 2, 3])));
        tracker.owe(&set(&[2, 9]));
        tracker.applied(round).unwrap();
        assert_eq!((tracker.owed_pages(), tracker.applied_pages()), (2, 2));
        tracker.owe(&set(&[1]));
        assert_eq!((tracker.owed_pages(), tracker.applied_pages()), (3, 1));
        assert!(!tracker.is_settled());
        assert_eq!(tracker.give_back(), set(&[1, 2, 9]));
    }

    #[test]
    fn a_page_in_a_newer_round_is_not_applied_by_an_older_one() {
        let mut tracker = Tracker::new(100);
        tracker.owe(&set(&[5]));
        let (first, _) = tracker.begin_round();
        tracker.owe(&set(&[5]));
        let (second, _) = tracker.begin_round();
        tracker.applied(first).unwrap();
        assert_eq!((tracker.applied_pages(), tracker.in_flight_pages()), (0, 1));
        tracker.applied(second).unwrap();
        assert!(tracker.is_settled() && tracker.applied_pages() == 1);
    }

    #[test]
    fn refuses_a_round_that_is_not_the_oldest_in_flight() {
        let mut tracker = Tracker::new(100);
        assert_eq!(tracker.applied(Round(1)), Err(WrongRound { expected: None, got: Round(1) }));
        tracker.begin_round();
        tracker.begin_round();
        let refused = tracker.applied(Round(2)).unwrap_err();
        assert_eq!(refused.to_string(), "round 2 cannot be applied: expected round 1, got 2");
        assert_eq!(tracker.rounds_in_flight(), 2);
    }

    #[test]
    #[should_panic(expected = "no-lost-dirt")]
    fn a_page_lost_on_the_way_is_noticed() {
        let mut tracker = Tracker::new(100);
        tracker.owe(&set(&[1, 2]));
        let (round, _) = tracker.begin_round();
        tracker.in_flight[0].1 = Arc::new(set(&[1]));
        let _ = tracker.applied(round);
    }

    #[test]
    fn what_an_earlier_process_left_goes_on_where_it_was() {
        let mut owed = Tracker::after_restart(Round(3), false, set(&[4, 5]));
        assert_eq!((owed.round(), owed.owed_pages(), owed.applied_pages(), owed.rounds_in_flight()), (Round(3), 2, 98, 0));
        assert_eq!(owed.begin_round().0, Round(4));
        let mut flying = Tracker::after_restart(Round(3), true, set(&[4, 5]));
        assert_eq!(flying.in_flight().as_deref(), Some(&set(&[4, 5])));
        flying.resumed(&set(&[5]));
        assert_eq!((flying.applied_pages(), flying.give_back()), (99, set(&[5])));
    }

    proptest! {
        #[test]
        fn abort_returns_every_page_the_destination_does_not_have(ops in prop::collection::vec((0u8..4, prop::collection::vec(0u64..100, 0..20)), 0..40)) {
            let mut tracker = Tracker::new(100);
            // The model keeps a version for each page: what the guest wrote, and what has arrived.
            let (mut written, mut arrived) = ([0u64; 100], [0u64; 100]);
            let mut flying: VecDeque<(Round, Vec<(usize, u64)>)> = VecDeque::new();
            for (op, pages) in ops {
                match op {
                    0 => {
                        tracker.owe(&set(&pages));
                        for page in set(&pages).iter() {
                            written[usize::try_from(page.0).unwrap()] += 1;
                        }
                    }
                    1 => {
                        let (round, pages) = tracker.begin_round();
                        let versions = pages.iter().map(|p| usize::try_from(p.0).unwrap()).map(|p| (p, written[p])).collect();
                        flying.push_back((round, versions));
                    }
                    2 => {
                        if let Some((round, versions)) = flying.pop_front() {
                            tracker.applied(round).unwrap();
                            for (page, version) in versions {
                                arrived[page] = version;
                            }
                        }
                    }
                    _ => {
                        tracker.interrupted();
                        flying.clear();
                    }
                }
            }
            let missing: Vec<u64> = (0..100usize).filter(|p| arrived[*p] != written[*p]).map(|p| p as u64).collect();
            prop_assert_eq!(tracker.give_back(), set(&missing));
        }
    }
}
