//! Runs one migration: performs the actions of `migration/` and feeds it events.
//!
//! *Owns:* the tasks of a migration, the page pumps of its lanes, the order "journal, wire, effect".
//! *Never:* decides what `migration/` decides, reads configuration, serves the control socket.
//! *Invariants:* `journal-wire-effect` (defined in `migration/`; kept by performing actions in order and
//! dropping those behind a failed record), `vm-comes-back` (a source driver given to a migration is
//! given back at its end unless the guest was destroyed because it runs elsewhere), `sealed-memory` (no lane writes guest
//! memory behind the last round), `no-endless-wait` (whatever is asked of a peer ends by itself: a peer that lives and is
//! silent, or does not read, costs a bounded time).
//! *Read first:* `source.rs`, then `lanes.rs`, `destination.rs`, `handoff.rs`.

mod arbiter;
mod commit_question;
mod common_path;
mod destination;
mod digest;
mod disks;
mod error;
mod frames;
mod handoff;
mod lanes;
mod limiter;
mod link;
mod meter;
mod processors;
mod recovery;
mod search;
mod sharing;
mod source;
mod standing;
mod stream;
mod witness;

pub use arbiter::{Arbiter, NoArbiter, Owner, Ruling, Transfer};
pub use common_path::{CommonPath, CommonPaths};
pub use destination::{DestinationEnd, DestinationOrder, Return, run_destination};
pub use disks::DiskOrder;
pub use error::EngineError;
pub use handoff::{Ahead, Binding, Evidence, JournalRecord, Placement};
pub use limiter::{Share, TotalBandwidth};
pub use link::{Link, PeerFacts, greet};
pub use meter::{DiskFigures, Figures, Meter};
pub use recovery::{
    Attach, Decision, Host, Interruption, Look, Rebuild, Resolved, Withdrawal, answer, decide, has_disks, interruption, may_own_twin,
    repeat_effect, resolve, sweep_images, tell, unfinished, withdraw,
};
pub use source::{AskCommit, Command, Manner, Redial, SourceEnd, SourceOrder, SourcePorts, continue_guest, continue_source, run_source};
pub use standing::{RecordNote, Standing, decisions, doubts, notes, owners, standing};
pub use stream::{run_stream_destination, run_stream_source};
