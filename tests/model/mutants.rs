//! Protocols that are wrong, one change each. Every one has to be caught.

use sealane::types::Side;

use crate::machines::{Act, REFUSED, RUN, Record, Said, Stage, bits, is_commit, is_prepared};
use crate::steps::Handoffs;
use crate::world::{Memory, World};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// COMMIT is said and not on disk.
    CommitUnjournaled,
    /// The guest is resumed and RUN is not on disk.
    RunUnjournaled,
    /// REFUSE is said and REFUSED is not on disk.
    RefusedUnjournaled,
    /// PREPARED is said and not on disk.
    PreparedUnjournaled,
    /// The guest is resumed before RUN is on disk.
    ResumeBeforeRecord,
    /// A record that could not be written counts as written.
    FailureIgnored,
    /// The source resumes when no answer to COMMIT comes.
    ResumedAfterCommit,
    /// The source resumes when no PREPARED comes, and goes on waiting for it.
    ResumedWithoutAbort,
    /// The source throws its copy away when it has said COMMIT.
    CopyDestroyedAtCommit,
    /// The destination runs the guest as soon as it is prepared.
    RunOnPrepared,
    /// COMMIT of an earlier attempt counts, whatever digest it gives.
    StrayCommitTaken,
    /// REFUSE of a journal that was begun anew counts, at whatever position.
    NewJournalBelieved,
    /// REFUSE of a journal that is older than its PREPARED counts.
    OlderJournalBelieved,
    /// REFUSE counts as well when it is from the position of its PREPARED.
    SamePositionBelieved,
    /// A journal that does not know the attempt refuses with its position.
    UnknownAtPosition,
    /// Operators take a VM back from a destination that is alive.
    FencedWithoutEvidence,
    /// Operators take a VM back, memory and all, from a destination that has run it.
    NeverRanUnchecked,
    /// The destination of a source that is off for good runs what it has prepared.
    HandedOverAsPrepared,
    /// The image stays while its guest runs.
    ImageKept,
    /// A guest from an image keeps its generation.
    GenerationKept,
    /// A gateway that starts resumes the memory that it finds as it is.
    FoundMemoryKept,
    /// PREPARED is said before the image is on disk.
    PreparedBeforeImage,
    /// FINAL is said before the image is on disk.
    FinalBeforeImage,
    /// A gateway that starts repeats the effect of its last record although the VM has moved on.
    MovedOnUnnoticed,
    /// A source that starts goes on with an attempt that it has committed.
    ContinuedAfterCommit,
    /// A source that goes on with an attempt keeps the image of its pause.
    ContinuedWithImage,
}

impl Mutant {
    /// Whether this record is not written.
    pub fn skips(self, record: Record) -> bool {
        match self {
            Self::CommitUnjournaled => is_commit(record),
            Self::RunUnjournaled => record == RUN,
            Self::RefusedUnjournaled => record == REFUSED,
            Self::PreparedUnjournaled => is_prepared(record),
            _ => false,
        }
    }

    /// What it makes of the actions that a machine answers with.
    pub fn alter(self) -> fn(&mut Vec<Act>) {
        match self {
            Self::ImageKept => |acts| {
                if acts.contains(&Act::Resume) {
                    acts.retain(|act| *act != Act::Forget);
                }
            },
            Self::GenerationKept => |acts| acts.retain(|act| *act != Act::Renew),
            Self::PreparedBeforeImage => |acts| last(acts, Act::Keep, |act| matches!(act, Act::Send(Said::Prepared(_)))),
            Self::FinalBeforeImage => |acts| last(acts, Act::Keep, |act| matches!(act, Act::Send(Said::Final(_)))),
            Self::ResumeBeforeRecord => |acts| last(acts, Act::Journal(RUN), |act| act == Act::Resume),
            _ => |_| (),
        }
    }

    /// Whether it does something that no machine says.
    pub fn is_rogue(self) -> bool {
        matches!(self, Self::ResumedAfterCommit | Self::ResumedWithoutAbort | Self::CopyDestroyedAtCommit | Self::RunOnPrepared)
    }

    /// What that is, if it can be done now.
    pub fn rogue(self, model: &Handoffs, world: &World) -> Option<World> {
        let side = if self == Self::RunOnPrepared { Side::Destination } else { Side::Source };
        let host = world.host(side);
        let stage = host.listens().then(|| model.stage(side, host.machine))?;
        let mut next = *world;
        match (self, stage) {
            (Self::RunOnPrepared, Stage::Prepared(digest)) => {
                let commit = bits::source(Said::Commit(digest));
                let (machine, due) = model.tables.destination.on_message(host.machine, commit)?;
                (next.destination.machine, next.destination.due) = (machine, due);
            }
            (Self::ResumedAfterCommit, Stage::Committed) | (Self::ResumedWithoutAbort, Stage::AwaitPrepared(_))
                if host.memory != Memory::None && !host.running =>
            {
                (next.source.running, next.source.ran) = (true, true);
                next.stale |= next.destination.ran;
            }
            (Self::CopyDestroyedAtCommit, Stage::Committed) if host.memory != Memory::None || host.image => {
                next.source.lose_memory();
                next.source.image = false;
            }
            _ => return None,
        }
        Some(next)
    }
}

/// Moves an action behind another.
fn last(acts: &mut Vec<Act>, which: Act, behind: fn(Act) -> bool) {
    let (from, to) = (acts.iter().position(|act| *act == which), acts.iter().position(|act| behind(*act)));
    if let (Some(from), Some(to)) = (from, to)
        && from < to
    {
        acts.remove(from);
        acts.insert(to, which);
    }
}
