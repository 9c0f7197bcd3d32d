//! Offers whose destination may still wait for a source that has ended them: it is told.

use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Instant;

use crate::engine::{self, EngineError, Interruption, Link, Withdrawal};
use crate::gateway::Gateway;
use crate::gateway::kept::twin_file;
use crate::gateway::recovery::{FIRST_PAUSE, LONGEST_PAUSE};
use crate::migration::Outcome;
use crate::telemetry::chain;
use crate::types::{MigrationId, Side, SpiffeId};

/// Written when an offer is made, removed when its end was heard. No promise: a destination that hears nothing gives up by
/// itself, later.
const NOTE: &str = "departure";

impl Gateway {
    pub(super) fn note_departure(&self, withdrawal: &Withdrawal) -> std::io::Result<()> {
        let path = twin_file(&self.config.gateway.runtime_directory, withdrawal.migration, NOTE);
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(serde_json::to_writer(file, withdrawal)?)
    }

    pub(super) fn forget_departure(&self, migration: MigrationId) {
        // Whether or not it was made.
        let _ = std::fs::remove_file(twin_file(&self.config.gateway.runtime_directory, migration, NOTE));
    }

    fn departure(&self, migration: MigrationId) -> Option<Withdrawal> {
        let path = twin_file(&self.config.gateway.runtime_directory, migration, NOTE);
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Offers that an earlier gateway made and of which the journal says nothing: that gateway ended before they were answered.
    pub(super) fn withdraw_old_offers(self: &Arc<Self>) {
        let Ok(entries) = std::fs::read_dir(&self.config.gateway.runtime_directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ending| ending == NOTE)) {
            let name = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse::<MigrationId>().ok());
            let Some(migration) = name else { continue };
            match engine::interruption(&self.evidence(), migration) {
                // Nothing was journaled, or ABORT was and may not have been heard.
                Ok(None | Some(Interruption { outcome: Some(Outcome::Stayed), side: Side::Source, .. })) => self.tell_later(migration),
                // What is open the journal goes on with; what has ended otherwise was heard.
                Ok(Some(_)) => self.forget_departure(migration),
                Err(error) => tracing::error!(%migration, error = %chain(&error), "an old offer is not withdrawn"),
            }
        }
    }

    /// The destination of an attempt that ended here unheard may hold a twin for it. It is told once it can be reached.
    pub(super) fn tell_later(self: &Arc<Self>, migration: MigrationId) {
        let gateway = Arc::clone(self);
        let until = Instant::now() + self.config.migration.max_outage.duration;
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            while Instant::now() < until && !gateway.tell(migration).await {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            gateway.forget_departure(migration);
        });
    }

    async fn tell(self: &Arc<Self>, migration: MigrationId) -> bool {
        let evidence = self.evidence();
        let told = match (engine::interruption(&evidence, migration), self.departure(migration)) {
            (Ok(Some(Interruption { peer, side: Side::Source, .. })), _) => {
                let Some(link) = self.dial_known(&peer).await else { return self.config.peer_of(&peer).is_none() };
                engine::tell(&evidence, &self.host(), migration, &link).await
            }
            (Ok(None), Some(withdrawal)) => {
                let Some(link) = self.dial_known(&withdrawal.peer).await else { return self.config.peer_of(&withdrawal.peer).is_none() };
                engine::withdraw(&evidence, &withdrawal, &link).await
            }
            _ => Ok(()),
        };
        if let Err(error) = &told {
            tracing::debug!(%migration, error = %chain(error), "the destination was not told that the VM stays");
        }
        !matches!(told, Err(EngineError::Transport { .. } | EngineError::Silent { .. }))
    }

    async fn dial_known(&self, peer: &SpiffeId) -> Option<Link> {
        let peer = self.config.peer_of(peer).cloned()?;
        self.dial(&peer).await.ok()
    }
}
