//! Changes that the source's hypervisor has asked for and that are not on the destination's disk yet.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use crate::limits;
use crate::wire::DiskChange;

/// A change, which any lane may carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct Change {
    pub(in crate::engine) disk: u16,
    pub(in crate::engine) change: DiskChange,
    pub(in crate::engine) offset: u64,
    pub(in crate::engine) bytes: u32,
    /// What is written; empty otherwise.
    pub(in crate::engine) data: Bytes,
}

/// Who is told when a request is done: its cookie goes there.
pub(super) type Replies = mpsc::Sender<(u64, u32)>;

/// Changes on their way. `INVARIANT(disk-window)`
#[derive(Debug, Default)]
pub(in crate::engine) struct DiskOut {
    state: Mutex<State>,
    /// A change waits for a lane.
    ready: Notify,
    /// There is room for another one.
    room: Notify,
}

#[derive(Debug, Default)]
struct State {
    under_way: BTreeMap<u64, UnderWay>,
    unsent: VecDeque<u64>,
    next: u64,
    /// What changes under way write.
    bytes: usize,
    requests: HashMap<u64, Request>,
    requested: u64,
    /// Of all changes that there ever were.
    changed_bytes: u64,
    /// Whether all mirrors have begun.
    begun: bool,
    closed: bool,
}

#[derive(Debug)]
struct UnderWay {
    change: Change,
    request: u64,
    sent: bool,
}

#[derive(Debug)]
struct Request {
    left: usize,
    cookie: u64,
    replies: Replies,
}

impl DiskOut {
    /// Takes a request that was cut into changes, as soon as there is room; false when nothing is taken any more. It is answered when the
    /// destination has made the changes; as long as mirrors begin, when there is room for them here.
    pub(super) async fn submit(&self, changes: Vec<Change>, cookie: u64, replies: Replies) -> bool {
        let (request, at_once) = {
            let mut state = self.lock();
            state.requested += 1;
            let (request, left) = (state.requested, changes.len());
            // WHY: a hypervisor that begins a mirror waits for what other mirrors have asked for, with its guest.
            let at_once = (!state.begun).then(|| replies.clone());
            if state.begun {
                state.requests.insert(request, Request { left, cookie, replies });
            }
            (request, at_once)
        };
        for change in changes {
            loop {
                let told = self.room.notified();
                tokio::pin!(told);
                // From here on nothing is missed.
                told.as_mut().enable();
                match self.lock().put(&change, request) {
                    None => return false,
                    Some(true) => break,
                    Some(false) => {}
                }
                told.await;
            }
            self.ready.notify_one();
        }
        if let Some(replies) = at_once {
            let _ = replies.send((cookie, 0)).await;
        }
        true
    }

    /// All mirrors have begun: from now on what is answered is done.
    pub(in crate::engine) fn has_begun(&self) {
        self.lock().begun = true;
    }

    /// The next change for a lane, with its number and what is settled. May be dropped and called again.
    pub(in crate::engine) async fn next(&self) -> (u64, u64, Change) {
        loop {
            let (next, more) = {
                let mut state = self.lock();
                let number = state.unsent.pop_front();
                let settled = state.settled();
                let next = number.and_then(|number| {
                    let under_way = state.under_way.get_mut(&number)?;
                    under_way.sent = true;
                    Some((number, settled, under_way.change.clone()))
                });
                (next, !state.unsent.is_empty())
            };
            // One permit is kept at most, and there may be more changes than that.
            if more {
                self.ready.notify_one();
            }
            match next {
                Some(next) => return next,
                None if more => {}
                None => self.ready.notified().await,
            }
        }
    }

    /// The destination has made these changes. False when that cannot be.
    #[must_use]
    pub(in crate::engine) fn applied(&self, numbers: &[u64]) -> bool {
        let mut state = self.lock();
        for number in numbers {
            match state.under_way.get(number) {
                Some(under_way) if under_way.sent => state.answer(*number),
                // Behind an outage one may be named twice: for what came before, and for what was sent again.
                None if *number < state.next => {}
                _ => return false,
            }
        }
        drop(state);
        self.room.notify_waiters();
        true
    }

    /// Everything that is not applied goes out again, on new lanes. How many bytes that is of what was sent before.
    pub(in crate::engine) fn send_again(&self) -> u64 {
        let mut state = self.lock();
        let again = state.under_way.values().filter(|under_way| under_way.sent).map(|under_way| under_way.change.data.len() as u64).sum();
        state.unsent = state.under_way.keys().copied().collect();
        drop(state);
        self.ready.notify_one();
        again
    }

    /// How many changes there were, and the bytes of their ranges; nothing while some are under way.
    pub(in crate::engine) fn totals(&self) -> Option<(u64, u64)> {
        let state = self.lock();
        state.under_way.is_empty().then_some((state.next, state.changed_bytes))
    }

    /// The same, when none is under way any more: of those that were answered while mirrors began some may be.
    pub(in crate::engine) async fn all_applied(&self) -> (u64, u64) {
        loop {
            let told = self.room.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            if let Some(totals) = self.totals() {
                return totals;
            }
            told.await;
        }
    }

    /// Bytes of the ranges of all changes until now.
    pub(in crate::engine) fn changed_bytes(&self) -> u64 {
        self.lock().changed_bytes
    }

    /// Nothing is taken any more, and nobody is answered.
    pub(in crate::engine) fn close(&self) {
        let mut state = self.lock();
        *state = State { closed: true, begun: state.begun, next: state.next, changed_bytes: state.changed_bytes, ..State::default() };
        drop(state);
        self.room.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn settled(&self) -> u64 {
        self.under_way.first_key_value().map_or(self.next, |(number, _)| *number)
    }

    /// Takes a change if there is room for it; nothing when nothing is taken any more.
    fn put(&mut self, change: &Change, request: u64) -> Option<bool> {
        let (number, bytes) = (self.next, self.bytes + change.data.len());
        if self.closed {
            return None;
        }
        if number - self.settled() >= limits::DISK_CHANGES_MAX as u64 || bytes > limits::DISK_WINDOW_BYTES {
            return Some(false);
        }
        (self.next, self.bytes) = (number + 1, bytes);
        self.changed_bytes = self.changed_bytes.wrapping_add(u64::from(change.bytes));
        self.under_way.insert(number, UnderWay { change: change.clone(), request, sent: false });
        self.unsent.push_back(number);
        Some(true)
    }

    fn answer(&mut self, number: u64) {
        let Some(UnderWay { change, request, .. }) = self.under_way.remove(&number) else { return };
        self.bytes -= change.data.len();
        let Some(asked) = self.requests.get_mut(&request) else { return };
        asked.left -= 1;
        if asked.left == 0
            && let Some(Request { cookie, replies, .. }) = self.requests.remove(&request)
        {
            // It has room for as many as there can be; a client that is gone needs none.
            let _ = replies.try_send((cookie, 0));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn write(offset: u64, bytes: usize) -> Change {
        let bytes_long = u32::try_from(bytes).unwrap();
        Change { disk: 0, change: DiskChange::Write, offset, bytes: bytes_long, data: Bytes::from(vec![1; bytes]) }
    }

    #[tokio::test]
    async fn nothing_is_waited_for_as_long_as_mirrors_begin() {
        let out = DiskOut::default();
        let (replies, mut replied) = mpsc::channel(8);
        assert!(out.submit(vec![write(0, 10), write(10, 10)], 77, replies.clone()).await);
        assert_eq!(replied.try_recv().unwrap(), (77, 0));
        out.has_begun();
        assert!(out.submit(vec![write(20, 5)], 78, replies).await);
        assert!(replied.try_recv().is_err() && out.totals().is_none());
        for _ in 0..3 {
            out.next().await;
        }
        assert!(out.applied(&[0, 1]) && replied.try_recv().is_err(), "no answer twice");
        let out = Arc::new(out);
        let applied = tokio::spawn({
            let out = Arc::clone(&out);
            async move { out.all_applied().await }
        });
        tokio::task::yield_now().await;
        assert!(!applied.is_finished() && out.applied(&[2]));
        assert_eq!((replied.try_recv().unwrap(), applied.await.unwrap()), ((78, 0), (3, 25)));
    }

    #[tokio::test]
    async fn a_request_is_answered_when_every_part_of_it_is_applied() {
        let out = DiskOut::default();
        out.has_begun();
        let (replies, mut replied) = mpsc::channel(8);
        assert!(out.submit(vec![write(0, 10), write(10, 10)], 77, replies.clone()).await);
        assert!(out.submit(vec![write(20, 5)], 78, replies).await);
        assert!(!out.applied(&[0]), "it was not sent");
        let numbers = [out.next().await.0, out.next().await.0, out.next().await.0];
        assert_eq!((numbers, out.totals()), ([0, 1, 2], None));
        assert!(out.applied(&[2]) && out.applied(&[1]));
        assert_eq!(replied.try_recv().unwrap(), (78, 0));
        assert!(replied.try_recv().is_err());
        assert!(out.applied(&[0]));
        assert_eq!(replied.try_recv().unwrap(), (77, 0));
        assert!(out.applied(&[0]) && !out.applied(&[3]), "named before, and never sent");
        assert_eq!(out.totals(), Some((3, 25)));
    }

    #[tokio::test]
    async fn what_is_not_applied_goes_out_again_with_what_is_settled() {
        let out = DiskOut::default();
        let (replies, _replied) = mpsc::channel(8);
        assert!(out.submit(vec![write(0, 10), write(10, 10), write(20, 10)], 1, replies).await);
        for _ in 0..3 {
            assert_eq!(out.next().await.1, 0);
        }
        assert!(out.applied(&[0, 2]));
        assert_eq!(out.send_again(), 10);
        let (number, settled, change) = out.next().await;
        assert_eq!((number, settled, change.offset), (1, 1, 10));
    }

    /// `INVARIANT(disk-window)`
    #[tokio::test]
    async fn a_full_window_is_waited_for_and_a_close_ends_the_wait() {
        let out = Arc::new(DiskOut::default());
        let (replies, _replied) = mpsc::channel(8);
        let piece = 1 << 20;
        let many = (0..200).map(|n| write(n * piece, 1 << 20)).collect();
        let asking = tokio::spawn({
            let (out, replies) = (Arc::clone(&out), replies.clone());
            async move { out.submit(many, 1, replies).await }
        });
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        let under_way = out.lock().bytes;
        assert!(
            !asking.is_finished() && under_way <= limits::DISK_WINDOW_BYTES && under_way > limits::DISK_WINDOW_BYTES / 2,
            "{under_way}"
        );
        let (number, ..) = out.next().await;
        assert!(out.applied(&[number]));
        tokio::task::yield_now().await;
        out.close();
        assert!(!asking.await.unwrap());
        assert!(!out.submit(vec![write(0, 1)], 2, replies).await);
        assert!(out.applied(&[5]), "whatever is said behind a close");
    }
}
