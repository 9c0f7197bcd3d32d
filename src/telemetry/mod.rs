//! What people and machines are told about a migration: progress, report, problem, logs.
//!
//! *Owns:* the JSON vocabulary of progress and reports (field names are a contract), the one function
//! that formats an error chain, the set-up of logging. *Never:* calls back into another module,
//! blocks, or carries guest memory, device state or keys.
//! *Invariants:* `no-step-back` (what [`Monotone`] lets through never runs backwards),
//! `base-units` (JSON keys end in `_bytes`, `_seconds`, `_bytes_per_second`).
//! *Read first:* `report.rs`, then `progress.rs`.

mod log;
mod problem;
mod progress;
mod report;
mod schema;

pub use log::{LogError, chain, init_logging};
pub use problem::Problem;
pub use progress::{Monotone, Phase, Progress};
pub use report::{
    AuditHeads, Authenticated, DiskReport, DowntimeBreakdown, Mode, Outcome, PolicyVerdict, PostCopyReport, Report, RunningOn,
};
pub use schema::{ProgressSchema, ReportSchema};

pub(crate) use schema::schema_tag;

pub use crate::memory::PageCounts;
pub use crate::wire::ErrorClass;
