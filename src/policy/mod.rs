//! May this principal do this to this VM, now? Cedar decides; this module asks and never adds a rule.
//!
//! *Owns:* the schema (`config/sealane.cedarschema`, built in), the policy set in force, the signed [`bundle`] that it may
//! come from, the facts that a question carries, and [`Permit`], the proof that it was answered with yes and what
//! that asks of the stream ([`Obligations`]).
//!
//! *Never:* files, clocks, sockets, tokio (texts and `now` are handed in); a yes outside `permit.rs`; a yes
//! when any policy failed to evaluate.
//!
//! | question | asked by | about | principal |
//! |---|---|---|---|
//! | [`ask_request`](PolicySet::ask_request) | source, control socket | may they ask for this move? | operator |
//! | [`ask_release`](PolicySet::ask_release) | source, before the first guest byte | may this peer have the VM? | destination gateway |
//! | [`ask_accept`](PolicySet::ask_accept) | destination, before anything is taken | may this peer give me the VM? | source gateway |
//! | [`ask_commit`](PolicySet::ask_commit) | both, at the switch | is all of that still so? | the other gateway |
//! | [`ask_resolve`](PolicySet::ask_resolve) | either, VM in doubt | may they decide its fate? | operator |
//!
//! *Invariants.*
//! INVARIANT(default-deny): nothing is permitted unless a permit policy matched and no forbid did.
//! INVARIANT(no-skipped-forbid): Cedar skips a policy that fails to evaluate, which would open what a forbid
//! closes; here any evaluation error, like any fact that cannot be put to Cedar, is a denial.
//! INVARIANT(checked-before-use): a set exists only if it has a policy, every policy has a unique `@id`, and
//! strict validation against the schema gave neither error nor warning.
//!
//! *Read first:* `load.rs` (texts to [`PolicySet`]), then `ask.rs` (question to answer), then `permit.rs`; `index.rs` and
//! `reads.rs` for speed.

mod ask;
pub mod bundle;
mod entities;
mod errors;
mod facts;
mod fixtures;
mod index;
mod lint;
mod load;
mod obligations;
mod permit;
mod reach;
mod reads;
mod shape;
mod shapes;
#[cfg(test)]
mod tests;
mod written;

pub use ask::{Denial, EvaluationFailure, Explanation, MatchedPolicy, Question};
pub use entities::{Entities, GatewayEntity, OperatorEntity, VmEntity};
pub use errors::{PolicyErrors, PolicyProblem};
pub use facts::{Channel, Codec, CodecScope, Durability, MigrationContext, Mode, RequestContext, ResolveContext, Route, Storage, Stream};
pub use fixtures::{TestOutcome, Verdict, WrittenQuestion, run_tests};
pub use load::{PolicyFile, PolicySet};
pub use obligations::Obligations;
pub use permit::{Accept, Action, Commit, Permit, Release, Request, Resolve};

/// The Cedar schema that every policy is checked against, as text.
pub const SCHEMA: &str = include_str!("../../config/sealane.cedarschema");
