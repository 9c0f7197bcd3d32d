//! The vocabulary of the local API, and its client.
//!
//! *Owns:* requests, views and problems as JSON over HTTP on a Unix socket; the table that gives every
//! failure its HTTP status and exit code. *Never:* serves, decides, or knows how a migration works.
//! *Invariants:* `versioned` (every object on the wire has a `schema`, except requests and problems),
//! `one-table` (status, exit code and advice to retry come from [`row`] and nowhere else).
//! *Read first:* `vocabulary.rs`, then `problem.rs`.
//!
//! | method and path | request | answer |
//! |---|---|---|
//! | GET `/v1/gateway` | – | [`GatewayView`] |
//! | POST `/v1/gateway/reload` | `{}` | [`GatewayView`] |
//! | GET `/v1/vms` | – | [`VmList`] |
//! | GET `/v1/peers` | – | [`PeerList`] |
//! | GET `/v1/migrations` | – | [`MigrationList`]: under way, then finished since the start |
//! | POST `/v1/migrations` | [`MigrateRequest`] | [`MigrationView`] |
//! | GET `/v1/migrations/{id}` | – | [`MigrationView`] |
//! | GET `/v1/migrations/{id}/events` | – | JSON lines of [`Event`], the last is the report |
//! | POST `/v1/migrations/{id}/cancel` | `{}` | [`MigrationView`] |
//! | POST `/v1/migrations/{id}/set` | [`SetRequest`] | [`MigrationView`] |
//! | GET `/v1/doubts` | – | [`DoubtList`] |
//! | POST `/v1/migrations/{id}/resolve` | [`ResolveRequest`] | [`ResolutionView`] |
//! | POST `/v1/plan` | [`MigrateRequest`] | [`PlanView`] |
//! | GET `/v1/history` | – | [`History`] |
//!
//! A refusal is a [`Problem`] with the status of its row, as `application/problem+json`.

mod client;
mod doubt;
mod error;
pub mod paths;
mod problem;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use client::{Client, Watch};
pub use doubt::{
    Choice, ChoiceView, DoubtList, DoubtView, DoubtsSchema, ProposalView, RecordView, ResolutionSchema, ResolutionState, ResolutionView,
    ResolveRequest,
};
pub use error::ClientError;
pub use problem::{Exit, Row, exit_of, exit_of_report, row, status_of};
pub use vocabulary::{
    Check, CheckVerdict, Compress, Estimate, Event, EventError, GatewaySchema, GatewayView, History, HistorySchema, MigrateRequest,
    MigrationList, MigrationSchema, MigrationState, MigrationView, MigrationsSchema, PeerList, PeerView, PeersSchema, PlanSchema, PlanView,
    SandboxView, SetRequest, Storage, VmList, VmState, VmView, VmsSchema,
};

pub use crate::telemetry::Problem;
