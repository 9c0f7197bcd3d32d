//! The daemon: builds every part, in order, and ends them in reverse. The only composition root.
//!
//! *Owns:* which VM is where and which is moving (`registry`), how a migration is started and accepted,
//! the control socket's server. *Never:* protocol decisions (`migration/`), policy rules (`policy/`),
//! guests (`vmm/` is another process).
//! *Invariants:* `one-owner` (one migration at a time has a VM), `evidence-first` (a decision or a
//! refusal is in the audit log before it is acted on or answered).
//! *Read first:* `outgoing.rs`, then `incoming.rs`, `recovery.rs`, `serve.rs`.

mod bundles;
mod callers;
mod crowd;
mod departures;
mod disks;
mod host;
mod incoming;
mod judge;
mod kept;
mod keys;
mod launcher;
mod machine;
mod modes;
mod outgoing;
mod peers;
mod plan;
mod policies;
mod queue;
mod recovery;
mod registry;
mod renewal;
mod report;
mod resolution;
mod resumption;
mod sandbox;
mod serve;
mod signals;
mod start;
mod turns;
mod twins;
mod why;

pub use keys::run as run_key_holder;
pub use launcher::run as run_launcher;
pub use signals::Signals;
pub use start::run;

// For `sealane policy` and `sealane bench`, which ask and report as the daemon does.
pub(crate) use bundles::{read_bundle, verify_bundle};
pub(crate) use keys::check_tokens;
pub(crate) use policies::{
    address_of, channel_in_order, compression, default_stream, entities, operator_id, read_policies, read_policy_text, zstd_level,
};
pub(crate) use report::{put_figures, report};
pub(crate) use sandbox::kernel as sandbox_of_kernel;
pub(crate) use start::audit_signer;

use std::sync::Arc;

use crate::audit::{AuditLog, Entry, Event, Outcome};
use crate::config::Config;
use crate::control::SandboxView;
use crate::engine::{Ahead, CommonPaths, Evidence, NoArbiter, TotalBandwidth};
use crate::identity::{Apart, Credentials, PeerRole, Refusal};
use crate::journal::Journal;
use crate::telemetry;
use crate::transport::{Endpoint, TransportError};
use crate::wire::{ErrorClass, Hello};
use judge::Judge;
use registry::Registry;

/// Everything that the parts of a running gateway share.
struct Gateway {
    config: Arc<Config>,
    credentials: Arc<Credentials>,
    endpoint: Endpoint,
    journal: Arc<Journal>,
    audit: AuditLog,
    judge: Arc<Judge>,
    registry: Arc<Registry>,
    /// Starts VMMs, which this process cannot.
    launcher: launcher::Launcher,
    /// Sign for this process, which has no key.
    keys: Apart,
    sandbox: SandboxView,
    peers: peers::Reachability,
    /// Told when a peer came back for an interrupted handoff.
    taken_up: tokio::sync::Notify,
    /// Held by whoever reads and changes proposals about VMs in doubt.
    proposals: tokio::sync::Mutex<()>,
    /// What all departures together may send, where that is limited.
    bandwidth: Option<Arc<TotalBandwidth>>,
    /// Ways to peers.
    paths: CommonPaths,
    crowd: Arc<crowd::Crowd>,
    kept: kept::KeptTwins,
    files: renewal::Files,
    /// Held through a reload: one after another.
    reloading: tokio::sync::Mutex<()>,
}

impl Gateway {
    fn evidence(&self) -> Evidence {
        Evidence {
            journal: Arc::clone(&self.journal),
            audit: self.audit.clone(),
            signer: self.credentials.signer(),
            arbiter: Arc::new(NoArbiter),
            ahead: Ahead::default(),
            images: self.config.gateway.state_directory.join(IMAGES).into(),
        }
    }

    fn hello(&self) -> Hello {
        Hello::new(self.journal.incarnation(), self.credentials.signer().public_key())
    }

    /// Records what needs no answer; a log that fails is shouted about by the log itself.
    async fn note(&self, entry: Entry) {
        let audit = self.audit.clone();
        let result = tokio::task::spawn_blocking(move || audit.record(&entry)).await;
        if let Ok(Err(error)) = result {
            tracing::error!(error = %error, "audit entry not recorded");
        }
    }

    /// Of whom TLS refused, the verifier knows more than the transport: what both know is one entry.
    async fn note_refused_handshake(
        &self,
        peer: Option<String>,
        address: std::net::SocketAddr,
        error: &TransportError,
        refusal: Option<Refusal>,
    ) {
        let mut entry = refusal.map_or_else(|| Entry::new(Event::SessionRefused).outcome(Outcome::Refused), refusal_entry);
        entry.peer = peer.or(entry.peer);
        put_class(&mut entry, error.class());
        entry.detail.insert("address".into(), address.to_string().into());
        entry.detail.insert("why".into(), telemetry::chain(error).into());
        self.note(entry).await;
    }

    async fn note_refused_session(&self, peer: Option<String>, address: std::net::SocketAddr, class: ErrorClass, why: String) {
        let mut entry = Entry::new(Event::SessionRefused).outcome(Outcome::Refused);
        entry.peer = peer;
        put_class(&mut entry, class);
        entry.detail.insert("address".into(), address.to_string().into());
        entry.detail.insert("why".into(), why.into());
        self.note(entry).await;
    }
}

/// The directory of final images, inside the state directory.
const IMAGES: &str = "images";

/// What the verifier knows of whom it refused.
fn refusal_entry(refusal: Refusal) -> Entry {
    let mut entry = Entry::new(Event::SessionRefused).outcome(Outcome::Refused);
    let role = if refusal.role == PeerRole::Client { "client" } else { "server" };
    entry.detail.insert("role".into(), role.into());
    entry.detail.insert("reason".into(), refusal.reason.code().into());
    entry.detail.insert("why".into(), refusal.reason.to_string().into());
    entry.detail.insert("leaf_sha256".into(), judge::hex(&refusal.leaf_sha256).into());
    entry.detail.extend(refusal.claimed.as_ref().map(|claimed| ("claimed".to_owned(), claimed.clone().into())));
    entry.peer = refusal.claimed;
    entry
}

/// Whose fault it was, as everywhere else.
fn put_class(entry: &mut Entry, class: ErrorClass) {
    entry.detail.insert("class".into(), serde_json::to_value(class).unwrap_or_default());
}
