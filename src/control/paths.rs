//! Paths of the API, for the client and for the server's routes.

use crate::types::MigrationId;

/// The gateway itself.
pub const GATEWAY: &str = "/v1/gateway";
/// Reads certificates, CRLs and policies again, as a route.
pub const RELOAD: &str = "/v1/gateway/reload";
/// Its VMs.
pub const VMS: &str = "/v1/vms";
/// Its peers.
pub const PEERS: &str = "/v1/peers";
/// Migrations under way; POST starts one.
pub const MIGRATIONS: &str = "/v1/migrations";
/// One migration, as a route.
pub const MIGRATION: &str = "/v1/migrations/{id}";
/// Its events, as a route.
pub const EVENTS: &str = "/v1/migrations/{id}/events";
/// Stops it, as a route.
pub const CANCEL: &str = "/v1/migrations/{id}/cancel";
/// Changes it, as a route.
pub const SET: &str = "/v1/migrations/{id}/set";
/// Proposes, approves or withdraws what is to become of its VM in doubt, as a route.
pub const RESOLVE: &str = "/v1/migrations/{id}/resolve";
/// VMs in doubt.
pub const DOUBTS: &str = "/v1/doubts";
/// A migration that is not made.
pub const PLAN: &str = "/v1/plan";
/// Reports of finished migrations.
pub const HISTORY: &str = "/v1/history";

/// A route of one migration as a path.
#[must_use]
pub fn of(route: &str, id: MigrationId) -> String {
    route.replace("{id}", &id.to_string())
}
