//! What a restarted gateway makes of its journal, and how it settles what is open.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{self, Placement, Resolved};
use crate::gateway::registry::Claim;
use crate::gateway::{Gateway, attach};
use crate::migration::Outcome;
use crate::telemetry;
use crate::types::{Epoch, MigrationId, VmName};

/// Between two tries to settle a handoff with a silent peer.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

impl Gateway {
    /// Reads where every VM is. A VM that no record speaks of is where the configuration says.
    pub(super) fn load_places(&self) {
        match self.journal.vms() {
            Ok(places) => {
                for (vm, bytes) in places {
                    match Placement::read(&bytes) {
                        Ok(place) => self.registry.set_place(vm, place),
                        Err(error) => tracing::error!(%vm, error = %error, "placement of another version; the VM is not touched"),
                    }
                }
            }
            Err(error) => tracing::error!(error = %telemetry::chain(&error), "placements cannot be read"),
        }
        for vm in &self.config.vms {
            if let (None, Some(socket)) = (self.registry.place(&vm.name), &vm.socket) {
                self.registry.set_place(vm.name.clone(), Placement::Here { address: socket.display().to_string(), epoch: Epoch(1) });
            }
        }
    }

    pub(super) fn refresh_place(&self, vm: &VmName) {
        match self.journal.vm(vm).map(|bytes| bytes.map(|bytes| Placement::read(&bytes))) {
            Ok(Some(Ok(place))) => self.registry.set_place(vm.clone(), place),
            Ok(None) => {}
            Ok(Some(Err(error))) => tracing::error!(%vm, error = %error, "placement cannot be read"),
            Err(error) => tracing::error!(%vm, error = %telemetry::chain(&error), "placement cannot be read"),
        }
    }

    /// Performs what the journal alone decides, for every migration in it, before anything else is served.
    pub(super) async fn recover(self: &Arc<Self>) {
        let migrations = match self.journal.migrations() {
            Ok(migrations) => migrations,
            Err(error) => {
                tracing::error!(error = %telemetry::chain(&error), "the journal's migrations cannot be read");
                return;
            }
        };
        for migration in migrations {
            match engine::resolve(&self.evidence(), &attach(), migration, None).await {
                Ok(Resolved::Settled) => {}
                Ok(Resolved::Ended(outcome)) => tracing::warn!(%migration, ?outcome, "interrupted migration settled from the journal"),
                Ok(Resolved::Open { vm, peer, source }) => {
                    tracing::warn!(%migration, %vm, %peer, source, "interrupted handoff: the peer will be asked");
                    self.resolve_later(migration, Some(self.registry.claim_waiting(&vm, migration)));
                }
                Err(error) => {
                    tracing::error!(%migration, error = %telemetry::chain(&error), "interrupted migration not settled; will be tried again")
                }
            }
        }
        self.load_places();
    }

    /// Asks the peer of an interrupted handoff until it is settled. `INVARIANT(one-owner)`: until then the VM is claimed.
    pub(super) fn resolve_later(self: &Arc<Self>, migration: MigrationId, claim: Option<Claim>) {
        let gateway = Arc::clone(self);
        if let Some(claim) = &claim {
            claim.wait();
        }
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                if gateway.try_resolve(migration).await {
                    gateway.load_places();
                    drop(claim);
                    return;
                }
            }
        });
    }

    async fn try_resolve(self: &Arc<Self>, migration: MigrationId) -> bool {
        let (evidence, attach) = (self.evidence(), attach());
        let _turn = self.registry.resolving(migration).await;
        let peer = match engine::resolve(&evidence, &attach, migration, None).await {
            Ok(Resolved::Open { peer, .. }) => peer,
            Ok(Resolved::Settled | Resolved::Ended(_)) => return true,
            Err(error) => {
                tracing::warn!(%migration, error = %telemetry::chain(&error), "interrupted handoff not settled");
                return false;
            }
        };
        let Some(peer) = self.config.peer_of(&peer).cloned() else {
            tracing::error!(%migration, %peer, "the peer of an open handoff is no longer configured");
            return false;
        };
        let link = match self.dial(&peer).await {
            Ok(link) => link,
            Err(problem) => {
                tracing::debug!(%migration, why = problem.message, "peer not reached");
                return false;
            }
        };
        match engine::resolve(&evidence, &attach, migration, Some(&link)).await {
            Ok(Resolved::Open { .. }) => false,
            Ok(resolved) => {
                let moved = matches!(resolved, Resolved::Ended(Outcome::Moved));
                tracing::warn!(%migration, moved, "interrupted handoff settled with the peer");
                true
            }
            Err(error) => {
                tracing::warn!(%migration, error = %telemetry::chain(&error), "interrupted handoff not settled");
                false
            }
        }
    }
}
