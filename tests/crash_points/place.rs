//! Where each failpoint lies: at which side, and on which way a migration comes by.

use std::fmt;

/// A side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Source,
    Destination,
}

pub use Role::{Destination, Source};

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Source { "the source" } else { "the destination" })
    }
}

/// What makes a migration come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It goes through.
    Move,
    /// It is cancelled in its rounds.
    Cancel,
    /// The link is away for longer than a session lives, in the rounds.
    Outage,
    /// The same while the guest is paused for the switch.
    OutageInPause,
    /// Its destination has lost the twin behind COMMIT.
    TwinLost,
    /// The side that comes by was killed at this point before, and starts again.
    Restart(&'static str),
    /// Both sides were killed when COMMIT was written, and start again.
    RestartBoth,
}

/// Who is killed when the point is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// The gateway that reaches it.
    Reacher,
    /// The other one.
    Peer,
    Both,
    /// Nobody: the place fails.
    Error,
}

/// A failpoint, and one way to it.
#[derive(Debug, Clone)]
pub struct Place {
    pub point: &'static str,
    pub reacher: Role,
    pub way: Way,
}

/// The ways to a failpoint.
pub fn places(point: &'static str) -> Vec<Place> {
    let place = |reacher, way| Place { point, reacher, way };
    let parts: Vec<_> = point.split('.').collect();
    match parts.as_slice() {
        ["record" | "journal" | "audit" | "send", "abort" | "ABORT", _] | ["source", "resume"] => vec![place(Source, Way::Cancel)],
        ["record" | "journal" | "audit" | "send", "refused" | "REFUSE", _] | ["destination", "destroy", _] => {
            vec![place(Destination, Way::Cancel)]
        }
        ["record" | "journal" | "audit", "reclaim", _] => vec![place(Source, Way::TwinLost)],
        ["record" | "journal" | "audit", "offer" | "commit" | "done", _] | ["send", "FINAL" | "COMMIT" | "DONE", _] => {
            vec![place(Source, Way::Move)]
        }
        ["record" | "journal" | "audit", "prepared" | "run" | "closed", _] | ["send", "PREPARED" | "RUNNING", _] => {
            vec![place(Destination, Way::Move)]
        }
        ["source", "goes-on"] => vec![place(Source, Way::OutageInPause)],
        ["source", "link-lost" | "redialled" | "resume-sent" | "resumed-heard" | "lanes-reopened"] => vec![place(Source, Way::Outage)],
        ["destination", "link-lost" | "session-adopted" | "resumed-sent"] => vec![place(Destination, Way::Outage)],
        ["source", "continues"] => vec![place(Source, Way::Restart("source.round-sent"))],
        ["source", ..] => vec![place(Source, Way::Move)],
        ["destination", ..] => vec![place(Destination, Way::Move)],
        ["recovery", "rebuilt-launched"] => vec![place(Destination, Way::TwinLost)],
        ["recovery", "repeat", _] => vec![place(Source, Way::Restart("record.done.done"))],
        ["recovery", "asks"] => vec![place(Source, Way::Restart("record.commit.done"))],
        ["recovery", "answers"] => vec![place(Destination, Way::RestartBoth)],
        ["recovery", "begin" | "sweep" | "end"] => vec![place(Source, Way::Restart("record.commit.done"))],
        // The source wakes the guest that stays, of which nothing was sent; the destination the one that came.
        ["recovery", ..] => {
            vec![place(Source, Way::Restart("record.offer.done")), place(Destination, Way::Restart("record.run.done"))]
        }
        _ => panic!("nobody knows where `{point}` lies"),
    }
}
