//! From attempt to attempt: how long things may take to come to rest, and what operators do when only they can.

use sealane::engine::{Decision, Placement};
use sealane::migration::{DestinationRecord as D, SourceRecord as S};
use sealane::types::MigrationId;
use sealane::wire::Durability;

use crate::host::{Host, RunState};
use crate::recovery::{Interrupted, Records};
use crate::world::{SECOND, Time, World};

/// Behind the last fault everything that can settle by itself does so within this: an outage, a search, two answers that do
/// not come, a restart.
const BOUND: Time = 300 * SECOND;

/// How all is when nothing is under way.
enum Rest {
    /// The guest runs on one host, whose gateway owns it.
    Runs,
    /// One gateway owns the guest and has no memory of it.
    Cold(usize, String, u64),
    /// Something is open.
    Not,
}

impl World {
    /// One VM that moves, or does not, `attempts` times. The first violation ends it.
    pub fn live(&mut self, attempts: u64) -> u64 {
        let mut made = 0;
        while made < attempts && self.truth.violation.is_none() {
            let durability = self.chance.pick(&[Durability::None, Durability::Destination, Durability::Both]);
            if !self.begin(durability) {
                self.come_to_rest();
                continue;
            }
            made += 1;
            let until = self.now + self.chance.range(SECOND, 240 * SECOND);
            while self.now < until && !self.attempt_ended && self.truth.violation.is_none() && self.step() {}
            // Sometimes the next attempt begins before this one is over everywhere.
            if self.chance.percent(75) {
                self.come_to_rest();
            }
        }
        self.close_all();
        made
    }

    /// Every gateway is stopped in good order and started; then every handoff has its end in every journal.
    fn close_all(&mut self) {
        self.come_to_rest();
        for h in 0..self.hosts.len() {
            // Dropped first, so that it is closed and not killed.
            self.hosts[h].journal = None;
            self.hosts[h].kill_gateway();
            self.sessions_end_with(h);
            let _ = self.start(h);
        }
        self.come_to_rest();
        for h in 0..self.hosts.len() {
            for migration in self.hosts[h].migrations().unwrap_or_default() {
                self.has_ended(h, migration, true);
            }
        }
    }

    fn come_to_rest(&mut self) {
        self.mend();
        for _ in 0..4 {
            let until = self.now + BOUND;
            while self.truth.violation.is_none() {
                match self.rest() {
                    Rest::Runs => return self.at_rest(),
                    Rest::Cold(h, address, epoch) => self.start_cold(h, address, epoch),
                    Rest::Not if self.now > until || !self.step() => break,
                    Rest::Not => {}
                }
            }
            if !self.truth.doubtful && !self.waits_for_the_gone() {
                let states: Vec<String> = self.hosts.iter().map(|host| format!("{:?} {:?}", host.place, host.vmms)).collect();
                return self.truth.violation(&format!("not at rest after {} s: {states:?}", BOUND / SECOND));
            }
            self.operators_decide();
        }
        self.truth.violation("not at rest whatever operators decide");
    }

    fn rest(&self) -> Rest {
        let still = self.hosts.iter().all(|host| {
            host.serves()
                && !host.stopped
                && host.sources.is_empty()
                && host.destinations.is_empty()
                && host.conversations.is_empty()
                && host.resolving.is_empty()
        });
        if !still {
            return Rest::Not;
        }
        let mut owners = self.hosts.iter().enumerate().filter_map(|(h, host)| match &host.place {
            Some(Placement::Here { address, epoch, .. }) => Some((h, address.clone(), *epoch)),
            Some(Placement::Cold { epoch }) => Some((h, format!("vmm/{h}"), *epoch)),
            _ => None,
        });
        let (Some((h, address, epoch)), None) = (owners.next(), owners.next()) else { return Rest::Not };
        let running = self.hosts.iter().filter(|host| host.runs()).count();
        match self.hosts[h].vmms.get(&address).map(|vmm| vmm.state) {
            Some(RunState::Running) if running == 1 => Rest::Runs,
            None if running == 0 => Rest::Cold(h, address, epoch.0),
            _ => Rest::Not,
        }
    }

    fn at_rest(&mut self) {
        self.truth.doubtful = false;
        for migration in std::mem::take(&mut self.recent) {
            (0..self.hosts.len()).for_each(|h| self.has_ended(h, migration, false));
        }
    }

    /// A destination that runs the VM and has not heard DONE is content until it is started again; so is one whose source is
    /// no more.
    fn has_ended(&mut self, h: usize, migration: MigrationId, restarted: bool) {
        let Ok(Some(interrupted)) = self.load(h, migration) else { return };
        let runs = matches!(&interrupted.records, Records::Destination(records) if matches!(records.last(), Some(D::Run)));
        let content = runs && (!restarted || self.is_gone(&interrupted));
        if !content && !self.is_settled(h, &interrupted).unwrap_or(false) {
            self.truth.violation(&format!("migration {migration} has no end on host {h}"));
        }
    }

    /// Whether somebody waits for the word of a journal that is no more.
    fn waits_for_the_gone(&self) -> bool {
        let waits = |h: usize| self.hosts[h].resolving.keys().filter_map(move |migration| self.load(h, *migration).ok().flatten());
        (0..self.hosts.len()).any(|h| waits(h).any(|open| self.is_gone(&open)))
    }

    /// Whether the journal of the peer is one that is no more.
    fn is_gone(&self, interrupted: &Interrupted) -> bool {
        let peer = self.host_of(&interrupted.binding.peer);
        self.hosts[peer].journal.as_ref().is_some_and(|journal| journal.incarnation() != interrupted.binding.peer_incarnation)
    }

    fn somebody_owns_it(&self) -> bool {
        self.hosts.iter().any(|host| !matches!(host.place, None | Some(Placement::Away { .. })))
    }

    /// Operators see to it that what they say is true: a peer that is to be off for good is off.
    fn operators_decide(&mut self) {
        self.trace("operators", 0, 0);
        for h in 0..self.hosts.len() {
            for migration in self.hosts[h].migrations().unwrap_or_default() {
                let Ok(Some(open)) = self.load(h, migration) else { continue };
                if self.is_settled(h, &open).unwrap_or(true) {
                    continue;
                }
                let peer = self.host_of(&open.binding.peer);
                let decision = match &open.records {
                    Records::Source(records) if matches!(records.last(), Some(S::Commit { .. })) => {
                        if !self.is_gone(&open) {
                            self.destroy(peer);
                        }
                        if self.truth.has_run(migration, peer) { Decision::Restart } else { Decision::Reclaim }
                    }
                    Records::Destination(records) if matches!(records.last(), Some(D::Run)) && self.is_gone(&open) => Decision::Restart,
                    Records::Destination(records) if matches!(records.last(), Some(D::Prepared(_))) && self.is_gone(&open) => {
                        // Several may have been prepared by attempts of the same source: one is to have the VM.
                        if self.somebody_owns_it() { Decision::Refuse } else { Decision::Restart }
                    }
                    _ => continue,
                };
                let runs = matches!(&open.records, Records::Destination(records) if matches!(records.last(), Some(D::Run)));
                if decision == Decision::Restart && !runs {
                    self.truth.given_up();
                }
                let _ = self.decide(h, migration, decision);
            }
        }
        // A guest that no journal speaks of, behind a journal that went back, is switched off with its host.
        for h in 0..self.hosts.len() {
            let owned = matches!(&self.hosts[h].place, Some(Placement::Here { address, .. }) if self.hosts[h].vmms.contains_key(address));
            if self.hosts[h].runs() && !owned {
                self.destroy(h);
            }
        }
        if !self.somebody_owns_it() && !self.hosts.iter().any(Host::runs) {
            // The host that owned it is gone: somebody else starts it.
            if let Some(h) = self.hosts.iter().position(|host| host.serves() && host.claim.is_none()) {
                self.start_cold(h, format!("vmm/{h}"), self.truth.epoch + 1);
            }
        }
    }
}
