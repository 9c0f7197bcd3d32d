//! What a restarted gateway makes of its journal, and how it settles what is open.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::engine::{self, Interruption, Placement, Resolved};
use crate::gateway::disks::{LAID, SOCKET};
use crate::gateway::host::{discard, home, observe};
use crate::gateway::registry::{Claim, Migration};
use crate::gateway::{Gateway, report};
use crate::hypervisor::{Address, RunState};
use crate::migration::Outcome;
use crate::telemetry::{self, Phase, Progress, Report};
use crate::types::{Epoch, MigrationId, Side, VmName};

/// Between two tries to settle a handoff with a silent peer.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// How long the last word may take to reach the peer.
const GOODBYE: Duration = Duration::from_secs(2);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(15);

impl Gateway {
    /// Reads where every VM is. A VM that no record speaks of is where the configuration says.
    pub(super) fn load_places(&self) {
        let places = match self.journal.vms() {
            Ok(places) => places,
            Err(error) => {
                // What the journal knows may contradict the configuration: no VM is taken from there then.
                tracing::error!(error = %telemetry::chain(&error), "placements cannot be read");
                return;
            }
        };
        let mut recorded = BTreeSet::new();
        for (vm, bytes) in places {
            recorded.insert(vm.clone());
            match Placement::read(&bytes) {
                Ok(place) => self.registry.set_place(vm.clone(), self.started_again(&vm, place)),
                Err(error) => tracing::error!(%vm, error = %error, "placement of another version; the VM is not touched"),
            }
        }
        for vm in self.config.vms.iter().filter(|vm| !recorded.contains(&vm.name)) {
            if let (None, Some(address)) = (self.registry.place(&vm.name), home(vm)) {
                let place = Placement::Here { address, epoch: Epoch(1), attempt: None };
                self.registry.set_place(vm.name.clone(), place);
            }
        }
    }

    /// A VM that has to be started from its disks is where the configuration says, once somebody has started it there.
    fn started_again(&self, vm: &VmName, place: Placement) -> Placement {
        match (place, self.config.vm(vm).and_then(home)) {
            (Placement::Cold { epoch }, Some(address)) => Placement::Here { address, epoch, attempt: None },
            (place, _) => place,
        }
    }

    pub(super) fn refresh_place(&self, vm: &VmName) {
        match self.journal.vm(vm).map(|bytes| bytes.map(|bytes| Placement::read(&bytes))) {
            Ok(Some(Ok(place))) => self.registry.set_place(vm.clone(), self.started_again(vm, place)),
            Ok(None) => {}
            Ok(Some(Err(error))) => tracing::error!(%vm, error = %error, "placement cannot be read"),
            Err(error) => tracing::error!(%vm, error = %telemetry::chain(&error), "placement cannot be read"),
        }
    }

    /// Performs what the journal alone decides, for every migration in it, before anything else is served.
    pub(super) async fn recover(self: &Arc<Self>) {
        crate::failpoint::hit!("recovery.begin");
        let migrations = match self.journal.migrations() {
            Ok(migrations) => migrations,
            Err(error) => {
                tracing::error!(error = %telemetry::chain(&error), "the journal's migrations cannot be read");
                return;
            }
        };
        for migration in migrations {
            if self.continue_departure(migration).await {
                continue;
            }
            match engine::resolve(&self.evidence(), &self.host(), migration, None).await {
                Ok(Resolved::Settled) => {
                    if let Err(error) = engine::repeat_effect(&self.evidence(), &self.host(), migration).await {
                        tracing::error!(%migration, error = %telemetry::chain(&error), "the effect of its last record is not certain");
                        self.resolve_later(migration, None, None);
                    }
                }
                Ok(Resolved::Ended(outcome)) => {
                    tracing::warn!(%migration, ?outcome, "interrupted migration settled from the journal");
                    let ended = self.reopen(migration);
                    self.settled(migration, ended).await;
                    self.tell_later(migration);
                }
                Ok(Resolved::Open { vm, peer, source }) => {
                    tracing::warn!(%migration, %vm, %peer, source, "interrupted handoff: the peer will be asked");
                    let ended = self.reopen(migration);
                    self.resolve_later(migration, ended, Some(self.registry.claim_waiting(&vm, migration)));
                }
                Err(error) => {
                    tracing::error!(%migration, error = %telemetry::chain(&error), "interrupted migration not settled; will be tried again");
                    let ended = self.reopen(migration);
                    self.resolve_later(migration, ended, None);
                }
            }
        }
        self.load_places();
        self.close_proposals().await;
        let gateway = Arc::clone(self);
        if let Err(error) = tokio::task::spawn_blocking({
            let gateway = Arc::clone(self);
            let runtime = tokio::runtime::Handle::current();
            move || {
                let _inside = runtime.enter();
                gateway.find_kept();
                gateway.withdraw_old_offers();
            }
        })
        .await
        {
            tracing::error!(error = %error, "task that looks for twins");
        }
        crate::failpoint::hit!("recovery.sweep");
        if let Err(error) = tokio::task::spawn_blocking(move || gateway.sweep()).await {
            tracing::error!(error = %error, "sweep task");
        }
        self.forget_kept_disks();
        crate::failpoint::hit!("recovery.end");
    }

    /// Ends what an earlier run of this gateway left behind and no journal promises anything to.
    fn sweep(&self) {
        self.sweep_twins();
        if let Err(error) = engine::sweep_images(&self.evidence()) {
            tracing::warn!(%error, "images that nobody needs are not looked for");
        }
    }

    /// Ends twins that an earlier run of this gateway left behind and that no journal promises anything to.
    fn sweep_twins(&self) {
        let Ok(entries) = std::fs::read_dir(&self.config.gateway.runtime_directory) else { return };
        let mut left = Vec::new();
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('.'));
            let Some((Ok(migration), what)) = name.map(|(name, what)| (name.parse::<MigrationId>(), what)) else { continue };
            let address = match what {
                "sock" => Address::Attach(path.clone()),
                "qmp" => Address::Qemu(path.clone()),
                LAID => {
                    left.push(migration);
                    continue;
                }
                SOCKET => {
                    // Nobody listens any more.
                    let _ = std::fs::remove_file(&path);
                    continue;
                }
                _ => continue,
            };
            let vm = "twin";
            if self.kept.has(migration) {
                continue;
            }
            // A journal that cannot be read may promise anything.
            if engine::may_own_twin(&self.evidence(), migration).unwrap_or(true) {
                continue;
            }
            // What nobody serves is only a file.
            let Ok(state) = observe(&address, vm) else { continue };
            if state == RunState::Running {
                tracing::error!(vm, %migration, address = %path.display(), "a guest runs that no record speaks of; it is not touched");
                continue;
            }
            match discard(&address, vm) {
                Ok(()) => tracing::warn!(vm, %migration, "ended the twin of a migration that was cut off"),
                Err(error) => tracing::warn!(vm, %migration, error = %telemetry::chain(&error), "a twin of nobody is not ended"),
            }
        }
        // Behind the twins that have them open.
        left.into_iter().for_each(|migration| self.settle_disks(migration));
    }

    /// Shows an interrupted migration as one that is under way.
    fn reopen(&self, migration: MigrationId) -> Option<watch::Sender<bool>> {
        let about = engine::interruption(&self.evidence(), migration).ok()??;
        let (ended_in, ended) = watch::channel(false);
        let mut shown = Progress::new(migration);
        shown.phase = Phase::Switchover;
        shown.stalled_because = Some("it was interrupted, and the peer is asked what came of it".to_owned());
        self.registry.begin(Migration {
            id: migration,
            vm: about.vm,
            peer: self.config.peer_of(&about.peer).map(|peer| peer.name.clone())?,
            side: about.side,
            started: SystemTime::now(),
            progress: watch::channel(shown).1,
            report: None,
            ended,
            commands: None,
            returns: None,
        });
        Some(ended_in)
    }

    /// Reports an interrupted migration that is settled now; one that was reported before is not reported twice.
    async fn settled(self: &Arc<Self>, migration: MigrationId, ended: Option<watch::Sender<bool>>) {
        let known = self.registry.migration(migration).and_then(|migration| migration.report);
        if known.is_some_and(|report| report.state != telemetry::Outcome::InDoubt) {
            return;
        }
        let about = match engine::interruption(&self.evidence(), migration) {
            Ok(Some(about)) => about,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%migration, error = %telemetry::chain(&error), "settled, but not reported");
                return;
            }
        };
        let Some(outcome) = about.outcome else { return };
        let report = self.settled_report(migration, about, outcome);
        self.finished(report, ended.unwrap_or_else(|| watch::channel(false).0)).await;
    }

    pub(super) fn settled_report(&self, migration: MigrationId, about: Interruption, outcome: Outcome) -> Report {
        let mut report = report::settled(migration, &about.vm, outcome);
        let own = Some(self.credentials.own_id());
        (report.authenticated.source, report.authenticated.destination) = match about.side {
            Side::Source => (own, Some(about.peer)),
            Side::Destination => (Some(about.peer), own),
        };
        report
    }

    /// Asks the peer of an interrupted handoff until it is settled. `INVARIANT(one-owner)`: until then the VM is claimed.
    pub(super) fn resolve_later(self: &Arc<Self>, migration: MigrationId, ended: Option<watch::Sender<bool>>, claim: Option<Claim>) {
        let gateway = Arc::clone(self);
        if let Some(claim) = &claim {
            claim.wait();
        }
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                // The peer may come first.
                let _ = tokio::time::timeout(pause, gateway.taken_up.notified()).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                if gateway.try_resolve(migration).await {
                    gateway.load_places();
                    gateway.settle_disks(migration);
                    drop(claim);
                    gateway.settled(migration, ended).await;
                    gateway.forget_departure(migration);
                    gateway.close_proposal(migration).await;
                    return;
                }
            }
        });
    }

    async fn try_resolve(self: &Arc<Self>, migration: MigrationId) -> bool {
        let (evidence, host) = (self.evidence(), self.host());
        let _turn = self.registry.resolving(migration).await;
        let peer = match engine::resolve(&evidence, &host, migration, None).await {
            Ok(Resolved::Open { peer, .. }) => peer,
            Ok(Resolved::Settled | Resolved::Ended(_)) => {
                // The record is there; its effect may not be.
                return match engine::repeat_effect(&evidence, &host, migration).await {
                    Ok(()) => true,
                    Err(error) => {
                        tracing::error!(%migration, error = %telemetry::chain(&error), "the effect of its last record is not certain");
                        false
                    }
                };
            }
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
        let resolved = engine::resolve(&evidence, &host, migration, Some(&link)).await;
        link.session.finish(None, "settled", GOODBYE).await;
        match resolved {
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
