//! Who sends next, where several migrations share one bandwidth limit. Pure: the time comes in.
//!
//! Of those that want to send, the one that was given the least goes next, so each gets an equal share and what one leaves the
//! others take. Whoever was idle has saved nothing up. A migration in its final phase, whose guest stands still, waits for others
//! in that phase only; what it takes the rest wait for afterwards, so the limit holds over time.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// One migration of those that share.
pub(super) type Member = u64;
/// One wish to send.
pub(super) type Wish = u64;

/// A bandwidth limit and those that share it.
#[derive(Debug)]
pub(super) struct Sharing {
    /// Bytes a second, at least one.
    rate: u64,
    /// When all that was given out will have been sent at that rate.
    free_at: Option<Instant>,
    /// The same, of what was given to members in their final phase alone.
    final_free_at: Option<Instant>,
    members: BTreeMap<Member, Wanting>,
    /// What whoever was served last had been given before: the least that anybody counts as given who wants to send anew.
    given_before: u64,
    last: u64,
}

#[derive(Debug, Default)]
struct Wanting {
    is_final: bool,
    /// Bytes, in its rounds.
    given: u64,
    wishes: VecDeque<(Wish, usize)>,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// This one may send, and counts as sent.
    Send(Wish),
    /// Somebody may then.
    At(Instant),
    /// Nobody wants to.
    Nothing,
}

/// Time that passed unused is worth a burst, not more.
pub(super) const BURST: Duration = Duration::from_millis(50);

impl Sharing {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        let rate = bytes_per_second.max(1);
        Self { rate, free_at: None, final_free_at: None, members: BTreeMap::new(), given_before: 0, last: 0 }
    }

    pub(super) fn join(&mut self) -> Member {
        self.last += 1;
        self.members.insert(self.last, Wanting::default());
        self.last
    }

    pub(super) fn leave(&mut self, member: Member) {
        self.members.remove(&member);
    }

    /// Whether a member is in its final phase.
    pub(super) fn set_final(&mut self, member: Member, is_final: bool) {
        if let Some(member) = self.members.get_mut(&member) {
            member.is_final = is_final;
        }
    }

    /// A member wants to send so many bytes.
    pub(super) fn want(&mut self, member: Member, bytes: usize) -> Wish {
        self.last += 1;
        if let Some(member) = self.members.get_mut(&member) {
            if member.wishes.is_empty() {
                member.given = member.given.max(self.given_before);
            }
            member.wishes.push_back((self.last, bytes));
        }
        self.last
    }

    /// A wish that was given up.
    pub(super) fn forget(&mut self, member: Member, wish: Wish) {
        if let Some(member) = self.members.get_mut(&member) {
            member.wishes.retain(|(other, _)| *other != wish);
        }
    }

    pub(super) fn next(&mut self, now: Instant) -> Next {
        // Final ones first, then who was given the least, then who asked first.
        let wanting = self.members.values_mut().filter(|member| !member.wishes.is_empty());
        let first = wanting.min_by_key(|member| (!member.is_final, if member.is_final { 0 } else { member.given }, member.wishes[0].0));
        let Some(member) = first else { return Next::Nothing };
        let free_at = if member.is_final { self.final_free_at } else { self.free_at };
        if let Some(at) = free_at.filter(|at| *at > now) {
            return Next::At(at);
        }
        let Some((wish, bytes)) = member.wishes.pop_front() else { return Next::Nothing };
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        let least = now.checked_sub(BURST).unwrap_or(now);
        let after = |free_at: Option<Instant>| Some(free_at.map_or(now, |at| at.max(least)) + cost);
        if member.is_final {
            self.final_free_at = after(self.final_free_at);
        } else {
            self.given_before = member.given;
            member.given = member.given.saturating_add(bytes as u64);
        }
        self.free_at = after(self.free_at);
        Next::Send(wish)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 1_000_000;

    /// Members that ask again as soon as they may send, each with so many wishes open and frames of so many bytes.
    struct World {
        sharing: Sharing,
        now: Instant,
        start: Instant,
        owners: BTreeMap<Wish, (Member, usize)>,
        sent: BTreeMap<Member, u64>,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            Self { sharing: Sharing::new(RATE), now, start: now, owners: BTreeMap::new(), sent: BTreeMap::new() }
        }

        fn want(&mut self, member: Member, bytes: usize) -> Wish {
            let wish = self.sharing.want(member, bytes);
            self.owners.insert(wish, (member, bytes));
            wish
        }

        /// A member with so many lanes that always have a frame.
        fn greedy(&mut self, lanes: usize, bytes: usize) -> Member {
            let member = self.sharing.join();
            for _ in 0..lanes {
                self.want(member, bytes);
            }
            member
        }

        /// Until then; whoever sends wants to send again while `again` says so.
        fn run(&mut self, seconds: f64, again: impl Fn(Member) -> bool) {
            let until = self.start + Duration::from_secs_f64(seconds);
            loop {
                match self.sharing.next(self.now) {
                    Next::Send(wish) => {
                        let (member, bytes) = self.owners.remove(&wish).unwrap();
                        *self.sent.entry(member).or_default() += bytes as u64;
                        if again(member) {
                            self.want(member, bytes);
                        }
                    }
                    Next::At(at) if at <= until => {
                        assert!(at > self.now, "time stands still");
                        self.now = at;
                    }
                    Next::At(_) | Next::Nothing => break,
                }
            }
            self.now = until;
        }

        fn sent(&self, member: Member) -> u64 {
            self.sent.get(&member).copied().unwrap_or(0)
        }
    }

    fn close(got: u64, want: u64, slack: u64) {
        assert!(got.abs_diff(want) <= slack, "{got}, not {want}");
    }

    #[test]
    fn all_that_want_to_send_get_equal_shares_whatever_their_lanes_and_frames() {
        let mut world = World::new();
        let members = [world.greedy(1, 4_000), world.greedy(8, 30_000), world.greedy(2, 100_000), world.greedy(16, 1_000)];
        world.run(10.0, |_| true);
        for member in members {
            close(world.sent(member), 10 * RATE / 4, 110_000);
        }
        close(world.sent.values().sum(), 10 * RATE, 150_000);
    }

    #[test]
    fn what_one_does_not_use_goes_to_the_others() {
        let mut world = World::new();
        let (slow, one, two) = (world.sharing.join(), world.greedy(2, 10_000), world.greedy(2, 10_000));
        for tenth in 1..=100 {
            // A tenth of what there is, where a third would be its share.
            world.want(slow, 10_000);
            world.run(f64::from(tenth) / 10.0, |member| member != slow);
        }
        close(world.sent(slow), RATE, 10_000);
        close(world.sent(one), RATE * 9 / 2, 40_000);
        close(world.sent(two), RATE * 9 / 2, 40_000);
    }

    #[test]
    fn one_alone_gets_all_and_whoever_comes_later_or_was_idle_an_equal_share_from_then_on() {
        let mut world = World::new();
        let first = world.greedy(1, 10_000);
        world.run(5.0, |_| true);
        close(world.sent(first), 5 * RATE, 60_000);
        let second = world.greedy(1, 10_000);
        world.run(7.0, |_| true);
        close(world.sent(second), RATE, 60_000);
        // Nothing was saved up meanwhile.
        world.run(8.0, |member| member == first);
        let (before, _) = (world.sent(second), world.want(second, 10_000));
        world.run(10.0, |_| true);
        close(world.sent(second) - before, RATE, 60_000);
    }

    #[test]
    fn idle_time_is_worth_a_burst() {
        let mut world = World::new();
        let member = world.greedy(1, 1_000);
        world.run(100.0, |_| false);
        let _ = world.want(member, 1_000);
        world.run(101.0, |_| true);
        close(world.sent(member), RATE + RATE / 20, 3_000);
    }

    #[test]
    fn a_final_phase_goes_first_and_waits_for_no_frame_of_the_others() {
        let mut world = World::new();
        let others = [world.greedy(4, 500_000), world.greedy(4, 500_000)];
        world.run(3.0, |_| true);
        // What the others were given is not sent for a while yet.
        assert!(matches!(world.sharing.next(world.now), Next::At(at) if at > world.now));
        let last = world.sharing.join();
        world.sharing.set_final(last, true);
        let wish = world.want(last, 10_000);
        assert_eq!(world.sharing.next(world.now), Next::Send(wish));
        let before: u64 = others.iter().map(|other| world.sent(*other)).sum();
        for _ in 0..4 {
            world.want(last, 10_000);
        }
        world.run(5.0, |_| true);
        close(world.sent(last), 2 * RATE, 100_000);
        assert!(others.iter().map(|other| world.sent(*other)).sum::<u64>() - before <= 500_000, "the others wait");
        // Nothing is lost of the limit: it is paid back.
        world.sharing.leave(last);
        world.run(60.0, |_| true);
        close(world.sent.values().sum(), 60 * RATE, 1_100_000);
    }

    #[test]
    fn two_final_phases_take_turns_and_one_that_goes_back_is_one_of_all_again() {
        let mut world = World::new();
        let members = [world.greedy(1, 10_000), world.greedy(1, 10_000), world.greedy(1, 10_000)];
        for member in &members[..2] {
            world.sharing.set_final(*member, true);
        }
        world.run(2.0, |_| true);
        close(world.sent(members[0]), RATE, 60_000);
        close(world.sent(members[1]), RATE, 60_000);
        for member in &members[..2] {
            world.sharing.set_final(*member, false);
        }
        let before = members.map(|member| world.sent(member));
        world.run(5.0, |_| true);
        for (member, before) in members.into_iter().zip(before) {
            close(world.sent(member) - before, RATE, 60_000);
        }
    }

    #[test]
    fn what_is_given_up_costs_nothing() {
        let mut world = World::new();
        let (one, two) = (world.sharing.join(), world.greedy(1, 10_000));
        let wish = world.want(one, 50_000_000);
        world.sharing.forget(one, wish);
        world.run(1.0, |_| true);
        close(world.sent(two), RATE, 60_000);
        world.sharing.leave(two);
        assert_eq!(world.sharing.next(world.now), Next::Nothing);
        let _ = world.sharing.want(two, 1);
        assert_eq!(world.sharing.next(world.now), Next::Nothing, "it is gone");
    }
}
