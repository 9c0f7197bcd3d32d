//! What is written about an offer while it is open, and how its destination is told when it has ended here unheard.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::engine::{self, EngineError, Interruption, Link, SourceOrder, Withdrawal};
use crate::gateway::Gateway;
use crate::gateway::kept::twin_file;
use crate::gateway::recovery::{FIRST_PAUSE, LONGEST_PAUSE};
use crate::migration::Outcome;
use crate::telemetry::chain;
use crate::types::{MigrationId, Side, SpiffeId};

/// What a gateway that is started anew has to know of a departure: to take it up again, or to tell the destination that it is
/// over. No promise: a destination that hears nothing gives up by itself, later.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) order: SourceOrder,
    /// To whom the VM was offered.
    pub(super) peer: SpiffeId,
    /// The process that holds the guest.
    pub(super) instance: String,
    pub(super) operator: u32,
    pub(super) policy_ids: Vec<String>,
    pub(super) started: SystemTime,
}

impl From<&Note> for Withdrawal {
    fn from(note: &Note) -> Self {
        let SourceOrder { migration, vm, uuid, epoch, .. } = &note.order;
        Self { migration: *migration, vm: vm.clone(), uuid: *uuid, epoch: *epoch, peer: note.peer.clone() }
    }
}

const NOTE: &str = "departure";
const LEDGER: &str = "ledger";

/// What was noted of a departure, in this directory.
pub(super) fn noted(runtime: &Path, migration: MigrationId) -> Option<Note> {
    serde_json::from_slice(&std::fs::read(twin_file(runtime, migration, NOTE)).ok()?).ok()
}

impl Gateway {
    /// Where the source's ledger of a migration is.
    pub(super) fn ledger(&self, migration: MigrationId) -> PathBuf {
        twin_file(&self.config.gateway.runtime_directory, migration, LEDGER)
    }

    pub(super) fn note_departure(&self, note: &Note) -> std::io::Result<()> {
        let path = twin_file(&self.config.gateway.runtime_directory, note.order.migration, NOTE);
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(serde_json::to_writer(file, note)?)
    }

    pub(super) fn forget_departure(&self, migration: MigrationId) {
        // Whether or not they were made.
        let _ = std::fs::remove_file(twin_file(&self.config.gateway.runtime_directory, migration, NOTE));
        let _ = std::fs::remove_dir_all(self.ledger(migration));
    }

    pub(super) fn departure(&self, migration: MigrationId) -> Option<Note> {
        noted(&self.config.gateway.runtime_directory, migration)
    }

    /// Offers that an earlier gateway made and of which the journal says nothing: that gateway ended before they were answered.
    pub(super) fn withdraw_old_offers(self: &Arc<Self>) {
        let Ok(entries) = std::fs::read_dir(&self.config.gateway.runtime_directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ending| ending == NOTE)) {
            let name = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse::<MigrationId>().ok());
            let Some(migration) = name.filter(|migration| !self.registry.is_under_way(*migration)) else { continue };
            match engine::interruption(&self.evidence(), migration) {
                // Nothing was journaled, or ABORT was and may not have been heard.
                Ok(None | Some(Interruption { outcome: Some(Outcome::Stayed), side: Side::Source, .. })) => self.tell_later(migration),
                // What is open the journal goes on with, no faster than this says; what has ended otherwise was heard.
                Ok(Some(Interruption { outcome: None, side: Side::Source, .. })) => {}
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
            (Ok(None), Some(note)) => {
                let withdrawal = Withdrawal::from(&note);
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
