//! What is true of the guest, whatever gateways believe; and what must never be.

use std::collections::BTreeSet;

use sealane::engine::{Binding, JournalRecord};
use sealane::migration::{DestinationRecord as D, Outcome, SourceRecord as S};
use sealane::types::MigrationId;
use sealane::wire::Handoff;

use crate::host::{Host, RunState, Vmm};

/// The guest is a counter: it counts while it runs, so a number names one state of its memory.
#[derive(Debug, Default)]
pub struct Truth {
    /// The newest state that ever ran.
    pub newest: u64,
    /// The highest epoch that anybody may have owned.
    pub epoch: u64,
    pub violation: Option<String>,
    /// Both ends were promised an image, the guest stands still, and nobody has run it since.
    promised: bool,
    /// The newest memory went with a host, or operators have given it up.
    may_be_cold: bool,
    /// Which attempts have run the guest where.
    ran: BTreeSet<(MigrationId, usize)>,
    /// A host was destroyed or its journal went back: what is in doubt may stay so until operators decide.
    pub doubtful: bool,
}

impl Truth {
    pub fn violation(&mut self, what: &str) {
        if self.violation.is_none() {
            self.violation = Some(what.to_owned());
        }
    }

    /// At every change of the world.
    pub fn look(&mut self, hosts: &mut [Host]) {
        let mut running = hosts.iter_mut().flat_map(|host| host.vmms.values_mut()).filter(|vmm| vmm.state == RunState::Running);
        if let Some(vmm) = running.next() {
            self.newest += 1;
            vmm.version = self.newest;
        }
        if running.next().is_some() {
            drop(running);
            self.violation("the guest runs in two places");
        }
    }

    pub fn resumes(&mut self, h: usize, host: &Host, vmm: &Vmm, migration: MigrationId) {
        self.ran.insert((migration, h));
        (self.promised, self.may_be_cold) = (false, false);
        let (version, newest) = (vmm.version, self.newest);
        if version != newest {
            self.violation(&format!("a guest resumes with memory {version}: {newest} ran"));
        }
        if vmm.from_image && !vmm.renewed {
            self.violation("a guest that came from an image resumes with its old generation");
        }
        for (migration, _) in host.images.iter().filter(|(_, image)| image.whole) {
            let may_be_used = |record| match record {
                JournalRecord::Source(record) => !matches!(record, S::Done),
                JournalRecord::Destination(record) => matches!(record, D::Prepared(_) | D::Run),
            };
            if host.records(*migration).is_ok_and(|mut records| records.pop().is_some_and(may_be_used)) {
                self.violation("a guest resumes while its image is still on the disk");
            }
        }
    }

    pub fn destroyed(&mut self, host: &Host, address: &str) {
        if host.vmms.get(address).is_some_and(|vmm| vmm.state == RunState::Running) {
            self.violation("a running guest is destroyed");
        }
    }

    pub fn said(&mut self, step: &Handoff, host: &Host, migration: MigrationId) {
        if matches!(step, Handoff::Final { .. }) && host.images.get(&migration).is_some_and(|image| image.whole) {
            self.promised = true;
        }
    }

    /// Whoever has the right to run the guest gives its image up for that.
    pub fn forgets(&mut self, host: &Host, binding: &Binding) {
        let last = host.records(binding.migration).ok().and_then(|mut records| records.pop());
        if let Some(JournalRecord::Source(S::Abort { .. } | S::Reclaim { .. } | S::Fenced { .. }) | JournalRecord::Destination(D::Run)) =
            last
        {
            self.promised = false;
        }
    }

    pub fn crashes(&mut self, host: &Host) {
        self.may_be_cold |= host.vmms.values().any(|vmm| vmm.state != RunState::Incoming && vmm.version == self.newest);
    }

    pub fn is_destroyed(&mut self, host: &Host) {
        self.crashes(host);
        self.may_be_cold |= self.promised;
        (self.promised, self.doubtful) = (false, true);
    }

    /// Operators give the memory up.
    pub fn given_up(&mut self) {
        (self.promised, self.may_be_cold) = (false, true);
    }

    pub fn has_run(&self, migration: MigrationId, h: usize) -> bool {
        self.ran.contains(&(migration, h))
    }

    pub fn ended(&mut self, outcome: Outcome) {
        if outcome == Outcome::Cold {
            self.cold();
        }
    }

    /// The guest is started from its disks.
    pub fn cold(&mut self) {
        if self.promised {
            self.violation("memory is lost that was on two disks");
        } else if !self.may_be_cold {
            self.violation("a guest is started cold, and its memory was not lost");
        }
    }

    pub fn started_cold(&mut self) -> u64 {
        self.cold();
        self.newest += 1;
        (self.promised, self.may_be_cold) = (false, false);
        self.newest
    }
}
