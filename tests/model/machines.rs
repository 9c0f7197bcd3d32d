//! The machines of `src/migration/handoff.rs`, asked once for everything that can happen to them.
//!
//! A machine is pure, so what it says to an event is asked for every state that it can be in, before the search begins, and
//! looked up after that. States, records and actions become small numbers here, and nothing is decided: a state of the world
//! is then four words, and a million of them fit a test run.

use sealane::migration::{
    DestinationHandoff, DestinationRecord, DestinationState, DestinationStep, HandoffAction, Holding, OfferRecord, PreparedRecord,
    SourceDecision, SourceHandoff, SourceRecord, SourceState, SourceStep,
};
use sealane::types::{Epoch, Incarnation, MigrationId, VmUuid};
use sealane::wire::{Durability, ErrorClass, FinalDigest, Handoff};

/// A record as a number; 0 is none.
pub type Record = u8;
/// The records of one side, oldest first.
pub type Records = [Record; 5];

/// OFFER.
pub const OFFER: Record = 1;
/// DONE.
pub const DONE: Record = 2;
/// ABORT; one more when cold.
pub const ABORT: Record = 3;
/// RECLAIM; one more when cold.
pub const RECLAIM: Record = 5;
/// FENCED of the source; one more when cold.
pub const FENCED: Record = 7;
/// PREPARED; plus the digest.
pub const PREPARED: Record = 32;
/// RUN.
pub const RUN: Record = 40;
/// REFUSED.
pub const REFUSED: Record = 41;
/// FENCED of the destination.
pub const HANDED_OVER: Record = 42;
/// CLOSED.
pub const CLOSED: Record = 43;
/// COMMIT; plus eight times the digest, plus the position.
const COMMIT: Record = 64;

/// Whether it is a COMMIT, of whatever digest.
pub fn is_commit(record: Record) -> bool {
    record >= COMMIT
}

/// Whether it is a PREPARED, of whatever digest.
pub fn is_prepared(record: Record) -> bool {
    (PREPARED..RUN).contains(&record)
}

/// Digests are numbers: 1 and 2 are of this attempt (FINAL may be said anew, with other totals), 3 is of an earlier one.
pub const STRANGE_DIGEST: u8 = 3;
/// Positions of the destination's journal go this far.
pub const POSITIONS: u8 = 7;

/// A message as it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Final(u8),
    Commit(u8),
    Done,
    Abort,
    Prepared(u8),
    Running,
    Refuse,
}

/// [`HandoffAction`] with numbers for what it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    Journal(Record),
    Keep,
    Forget,
    Restore,
    Renew,
    Send(Said),
    /// REFUSE of a journal that does not know the attempt: the engine's own.
    RefuseUnknown,
    AskCommit,
    Resume,
    Destroy,
    End,
    Leave,
}

/// Bits of the network: what the source has said (8), then what the destination has said, by kind, journal and position.
pub mod bits {
    use super::{POSITIONS, STRANGE_DIGEST, Said};

    /// COMMIT of an earlier attempt, signed by the same source.
    pub const STRAY_COMMIT: u8 = 7;
    /// The first one of the destination.
    pub const DESTINATION: u8 = 8;

    /// Of the source's word.
    pub fn source(said: Said) -> u8 {
        match said {
            Said::Final(digest) => digest - 1,
            Said::Commit(STRANGE_DIGEST) => STRAY_COMMIT,
            Said::Commit(digest) => 1 + digest,
            Said::Done => 4,
            Said::Abort => 5,
            other => panic!("{other:?} is not a source's word"),
        }
    }

    /// The source's word of a bit.
    pub fn word(bit: u8) -> Option<Said> {
        Some(match bit {
            0 | 1 => Said::Final(bit + 1),
            2 | 3 => Said::Commit(bit - 1),
            4 => Said::Done,
            5 => Said::Abort,
            STRAY_COMMIT => Said::Commit(STRANGE_DIGEST),
            _ => return None,
        })
    }

    /// Of the destination's word, from the journal that was offered the VM or a new one, at a position.
    pub fn destination(said: Said, new_journal: bool, position: u8) -> u8 {
        let kind = match said {
            Said::Prepared(digest) => digest - 1,
            Said::Running => 2,
            Said::Refuse => 3,
            other => panic!("{other:?} is not a destination's word"),
        };
        assert!(position < POSITIONS, "position {position}");
        DESTINATION + (kind * 2 + u8::from(new_journal)) * POSITIONS + position
    }

    /// The destination's word of a bit: what, whether from a new journal, position.
    pub fn answer(bit: u8) -> (Said, bool, u8) {
        let rest = bit - DESTINATION;
        let (position, rest) = (rest % POSITIONS, rest / POSITIONS);
        let said = match rest / 2 {
            0 => Said::Prepared(1),
            1 => Said::Prepared(2),
            2 => Said::Running,
            _ => Said::Refuse,
        };
        (said, rest % 2 == 1, position)
    }
}

/// Events of either side, as numbers behind those of its messages.
pub mod event {
    /// All of the guest is on its way, or has come: plus the digest less one.
    pub const FINAL: u8 = 0;
    pub const PERMITTED: u8 = 2;
    pub const DENIED: u8 = 3;
    pub const GIVE_UP: u8 = 4;
    pub const RECONNECTED: u8 = 5;
    pub const FAILED: u8 = 6;
    /// The operators' word: three at the source, one at the destination.
    pub const DECIDED: u8 = 7;
    pub const DECIDED_RESTART: u8 = 8;
    pub const DECIDED_RELEASE: u8 = 9;
}

const CLASS: ErrorClass = ErrorClass::Cancelled;

fn digest(number: u8) -> FinalDigest {
    FinalDigest { state: [number; 32], lanes: [0; 32], memory: 0 }
}

fn message(said: Said) -> Handoff {
    match said {
        Said::Final(number) => Handoff::Final { digest: digest(number), lanes: 1 },
        Said::Commit(number) => Handoff::Commit { digest: digest(number) },
        Said::Done => Handoff::Done,
        Said::Abort => Handoff::Abort { class: CLASS },
        Said::Prepared(number) => Handoff::Prepared { digest: digest(number) },
        Said::Running => Handoff::Running,
        Said::Refuse => Handoff::Refuse { class: CLASS },
    }
}

fn said(message: &Handoff) -> Said {
    match message {
        Handoff::Final { digest, .. } => Said::Final(digest.state[0]),
        Handoff::Commit { digest } => Said::Commit(digest.state[0]),
        Handoff::Done => Said::Done,
        Handoff::Abort { .. } => Said::Abort,
        Handoff::Prepared { digest } => Said::Prepared(digest.state[0]),
        Handoff::Running => Said::Running,
        Handoff::Refuse { .. } => Said::Refuse,
    }
}

fn act<R>(action: &HandoffAction<R>, number: impl Fn(&R) -> Record) -> Act {
    match action {
        HandoffAction::Journal(record) => Act::Journal(number(record)),
        HandoffAction::Keep => Act::Keep,
        HandoffAction::Forget => Act::Forget,
        HandoffAction::Restore => Act::Restore,
        HandoffAction::Renew => Act::Renew,
        HandoffAction::Send(message) => Act::Send(said(message)),
        HandoffAction::AskCommit => Act::AskCommit,
        HandoffAction::Resume => Act::Resume,
        HandoffAction::Destroy => Act::Destroy,
        HandoffAction::End(_) => Act::End,
        HandoffAction::LeaveToJournal => Act::Leave,
    }
}

/// What the search has to know of a state, beside its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Offered,
    AwaitPrepared(u8),
    AwaitPermit(u8),
    Committed,
    Receiving,
    Prepared(u8),
    /// REFUSED, as a restart finds it.
    Refused,
    Ended,
}

/// One of the two machines.
pub trait Machine: Clone + PartialEq {
    type Event;
    /// How many of [`Machine::events`] are messages.
    const MESSAGES: u8;
    fn events(durability: Durability) -> Vec<Self::Event>;
    fn turn(&mut self, event: &Self::Event) -> Option<Vec<Act>>;
    fn fresh(durability: Durability) -> Self;
    fn rebuilt(records: &Records, holding: Holding, durability: Durability) -> (Self, Vec<Act>);
    fn stage(&self) -> Stage;
    /// Every pair of a first and a last record, and a first one alone.
    fn journals() -> Vec<Records>;
}

impl Machine for SourceHandoff {
    type Event = SourceStep;
    const MESSAGES: u8 = 8 * POSITIONS;

    fn events(_: Durability) -> Vec<SourceStep> {
        let received = (0..Self::MESSAGES).map(|bit| {
            let (said, new, position) = bits::answer(bit + bits::DESTINATION);
            SourceStep::Received { step: message(said), incarnation_same: !new, position: position.into() }
        });
        let finalised = [1, 2].map(|number| SourceStep::Finalised { digest: digest(number), lanes: 1 });
        let rest = [SourceStep::CommitPermitted, SourceStep::CommitDenied, SourceStep::GiveUp(CLASS), SourceStep::Reconnected];
        let decided = [SourceDecision::Reclaim, SourceDecision::Restart, SourceDecision::Release].map(SourceStep::Decided);
        received.chain(finalised).chain(rest).chain([SourceStep::Failed]).chain(decided).collect()
    }

    fn turn(&mut self, event: &SourceStep) -> Option<Vec<Act>> {
        Some(self.step(event).ok()?.iter().map(|action| act(action, source_number)).collect())
    }

    fn fresh(durability: Durability) -> Self {
        Self::new(durability)
    }

    fn rebuilt(records: &Records, holding: Holding, durability: Durability) -> (Self, Vec<Act>) {
        let records: Vec<_> = records.iter().filter(|record| **record != 0).map(|record| source_record(*record, durability)).collect();
        let (machine, due) = Self::recover(&records, holding).expect("the OFFER is there");
        (machine, due.iter().map(|action| act(action, source_number)).collect())
    }

    fn stage(&self) -> Stage {
        match self.state() {
            SourceState::Offered => Stage::Offered,
            SourceState::AwaitPrepared { digest, .. } => Stage::AwaitPrepared(digest.state[0]),
            SourceState::AwaitCommitPermit { digest, .. } => Stage::AwaitPermit(digest.state[0]),
            SourceState::Committed { .. } => Stage::Committed,
            _ => Stage::Ended,
        }
    }

    fn journals() -> Vec<Records> {
        let commits = [1, 2].into_iter().flat_map(|number| (0..POSITIONS).map(move |position| COMMIT + 8 * number + position));
        let last = [0, DONE, ABORT, ABORT + 1, RECLAIM, RECLAIM + 1, FENCED, FENCED + 1].into_iter().chain(commits);
        last.map(|last| [OFFER, last, 0, 0, 0]).collect()
    }
}

impl Machine for DestinationHandoff {
    type Event = DestinationStep;
    const MESSAGES: u8 = bits::DESTINATION;

    fn events(durability: Durability) -> Vec<DestinationStep> {
        // A bit that nothing has stands for one that changes nothing.
        let received = (0..Self::MESSAGES).map(|bit| message(bits::word(bit).unwrap_or(Said::Done)));
        let complete = [1, 2].map(|number| DestinationStep::TwinComplete(prepared(number, durability)));
        let rest =
            [DestinationStep::CommitPermitted, DestinationStep::CommitDenied, DestinationStep::GiveUp(CLASS), DestinationStep::Reconnected];
        let last = [DestinationStep::Failed, DestinationStep::SourceFenced];
        received.map(DestinationStep::Received).chain(complete).chain(rest).chain(last).collect()
    }

    fn turn(&mut self, event: &DestinationStep) -> Option<Vec<Act>> {
        Some(self.step(event).ok()?.iter().map(|action| act(action, destination_number)).collect())
    }

    fn fresh(_: Durability) -> Self {
        Self::default()
    }

    fn rebuilt(records: &Records, holding: Holding, durability: Durability) -> (Self, Vec<Act>) {
        let records: Vec<_> = records.iter().filter(|record| **record != 0).map(|record| destination_record(*record, durability)).collect();
        let (machine, due) = Self::recover(&records, holding);
        (machine, due.iter().map(|action| act(action, destination_number)).collect())
    }

    fn stage(&self) -> Stage {
        match self.state() {
            DestinationState::Receiving => Stage::Receiving,
            DestinationState::AwaitCommitPermit { record } => Stage::AwaitPermit(record.digest.state[0]),
            DestinationState::Prepared { digest } => Stage::Prepared(digest.state[0]),
            DestinationState::Refused { promised: true } => Stage::Refused,
            _ => Stage::Ended,
        }
    }

    fn journals() -> Vec<Records> {
        let promised = [1, 2]
            .into_iter()
            .flat_map(|number| [0, RUN, REFUSED, HANDED_OVER, CLOSED].into_iter().map(move |last| [PREPARED + number, last, 0, 0, 0]));
        promised.chain([0, REFUSED, RUN, CLOSED, HANDED_OVER].map(|only| [only, 0, 0, 0, 0])).collect()
    }
}

fn source_number(record: &SourceRecord) -> Record {
    match record {
        SourceRecord::Offer(_) => OFFER,
        SourceRecord::Commit { digest, position } => COMMIT + 8 * digest.state[0] + u8::try_from(*position).expect("a small position"),
        SourceRecord::Abort { cold } => ABORT + u8::from(*cold),
        SourceRecord::Reclaim { cold } => RECLAIM + u8::from(*cold),
        SourceRecord::Fenced { cold } => FENCED + u8::from(*cold),
        SourceRecord::Done => DONE,
    }
}

fn source_record(number: Record, durability: Durability) -> SourceRecord {
    match number {
        OFFER => SourceRecord::Offer(Box::new(OfferRecord {
            migration: MigrationId([1; 16]),
            vm: "vm-1".parse().unwrap(),
            uuid: VmUuid([2; 16]),
            epoch: Epoch(4),
            peer: "spiffe://dc2/gateway/b".parse().unwrap(),
            peer_incarnation: Incarnation([3; 16]),
            peer_key: [4; 32],
            policy_digest: [5; 32],
            address: "socket".into(),
            durability,
        })),
        DONE => SourceRecord::Done,
        ABORT..RECLAIM => SourceRecord::Abort { cold: number > ABORT },
        RECLAIM..FENCED => SourceRecord::Reclaim { cold: number > RECLAIM },
        FENCED..9 => SourceRecord::Fenced { cold: number > FENCED },
        _ if is_commit(number) => SourceRecord::Commit { digest: digest((number - COMMIT) / 8), position: u64::from(number % 8) },
        _ => panic!("record {number} of a source"),
    }
}

fn prepared(number: u8, durability: Durability) -> Box<PreparedRecord> {
    Box::new(PreparedRecord {
        migration: MigrationId([1; 16]),
        vm: "vm-1".parse().unwrap(),
        uuid: VmUuid([2; 16]),
        epoch: Epoch(5),
        peer: "spiffe://dc1/gateway/a".parse().unwrap(),
        peer_incarnation: Incarnation([6; 16]),
        peer_key: [7; 32],
        digest: digest(number),
        address: "socket".into(),
        durability,
    })
}

fn destination_number(record: &DestinationRecord) -> Record {
    match record {
        DestinationRecord::Prepared(record) => PREPARED + record.digest.state[0],
        DestinationRecord::Run => RUN,
        DestinationRecord::Refused => REFUSED,
        DestinationRecord::Fenced => HANDED_OVER,
        DestinationRecord::Closed => CLOSED,
    }
}

fn destination_record(number: Record, durability: Durability) -> DestinationRecord {
    match number {
        RUN => DestinationRecord::Run,
        REFUSED => DestinationRecord::Refused,
        HANDED_OVER => DestinationRecord::Fenced,
        CLOSED => DestinationRecord::Closed,
        _ if is_prepared(number) => DestinationRecord::Prepared(prepared(number - PREPARED, durability)),
        _ => panic!("record {number} of a destination"),
    }
}
