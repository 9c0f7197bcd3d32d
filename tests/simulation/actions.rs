//! The handoff's actions, done to a simulated host. Before each of them something may happen.

use sealane::engine::{Binding, JournalRecord};
use sealane::migration::{HandoffAction, Holding};
use sealane::wire::{Handoff, HandoffMessage};

use crate::disk::SyncFailure;
use crate::host::{Did, Image, RunState, Stop, Vmm};
use crate::network::{Message, SessionId, Signed};
use crate::world::{Bug, MILLISECOND, Struck, World};

/// A handoff message that was checked.
#[derive(Debug, Clone)]
pub struct Heard {
    pub step: Handoff,
    pub incarnation_same: bool,
    pub position: u64,
}

impl World {
    /// Does one action on a host. `INVARIANT(journal-wire-effect)`: whoever calls drops what stands behind one that failed.
    pub fn act<R>(&mut self, h: usize, binding: &Binding, action: HandoffAction<R>, session: Option<SessionId>) -> Result<Did, Stop>
    where
        R: Into<JournalRecord>,
    {
        match action {
            HandoffAction::Journal(record) => self.journal(h, binding, &record.into())?,
            HandoffAction::Keep => self.keep(h, binding)?,
            HandoffAction::Forget => self.forget(h, binding)?,
            HandoffAction::Restore => self.restore(h, binding)?,
            HandoffAction::Renew => {
                self.point(h, "renew")?;
                let vmm = self.hosts[h].vmms.get_mut(&binding.address).ok_or(Stop::Failed("renew"))?;
                vmm.renewed |= vmm.state != RunState::Running;
            }
            HandoffAction::Send(step) => {
                self.point(h, "send")?;
                if let Some(session) = session {
                    self.say(h, session, binding, step);
                }
            }
            HandoffAction::AskCommit => {
                self.point(h, "ask")?;
                return Ok(Did::Ask);
            }
            HandoffAction::Resume => {
                self.point(h, "resume")?;
                self.resume(h, binding)?;
            }
            HandoffAction::Destroy => {
                self.point(h, "destroy")?;
                self.truth.destroyed(&self.hosts[h], &binding.address);
                self.hosts[h].vmms.remove(&binding.address);
            }
            HandoffAction::End(outcome) => {
                self.truth.ended(outcome);
                return Ok(Did::Ended(outcome));
            }
            HandoffAction::LeaveToJournal => return Ok(Did::Left),
        }
        Ok(Did::Done)
    }

    fn journal(&mut self, h: usize, binding: &Binding, record: &JournalRecord) -> Result<(), Stop> {
        match self.strike(h, "journal") {
            Struck::Nothing => {}
            Struck::Gateway => return Err(self.gateway_crashes(h)),
            Struck::Host => {
                // Half of them in the middle of the write.
                if self.chance.percent(50) {
                    self.hosts[h].disk.fail_next_sync(SyncFailure::Retried);
                    let _ = self.hosts[h].record(binding, record);
                }
                return Err(self.host_crashes(h));
            }
        }
        if matches!(record, JournalRecord::Source(_)) {
            // Going back to an older copy is only looked at for a journal that has given nothing away since.
            self.hosts[h].copy = None;
        }
        self.truth.epoch = self.truth.epoch.max(binding.epoch.0 + 1);
        self.hosts[h].lag += self.chance.range(100, 5 * MILLISECOND);
        self.hosts[h].record(binding, record)
    }

    fn keep(&mut self, h: usize, binding: &Binding) -> Result<(), Stop> {
        let version = self.hosts[h].vmms.get(&binding.address).ok_or(Stop::Failed("keep"))?.version;
        let struck = self.strike(h, "keep");
        let torn = std::mem::take(&mut self.hosts[h].image_fault);
        if (struck != Struck::Nothing || torn) && self.chance.percent(50) {
            self.hosts[h].images.insert(binding.migration, Image { version, whole: false });
        }
        match struck {
            Struck::Gateway => return Err(self.gateway_crashes(h)),
            Struck::Host => return Err(self.host_crashes(h)),
            Struck::Nothing if torn => return Err(Stop::Failed("keep")),
            Struck::Nothing => {}
        }
        self.hosts[h].lag += self.chance.range(MILLISECOND, 50 * MILLISECOND);
        self.hosts[h].images.insert(binding.migration, Image { version, whole: true });
        Ok(())
    }

    fn forget(&mut self, h: usize, binding: &Binding) -> Result<(), Stop> {
        let struck = self.strike(h, "forget");
        let failed = std::mem::take(&mut self.hosts[h].image_fault);
        if struck == Struck::Nothing && !failed || self.chance.percent(50) {
            self.truth.forgets(&self.hosts[h], binding);
            self.hosts[h].images.remove(&binding.migration);
        }
        match struck {
            Struck::Gateway => Err(self.gateway_crashes(h)),
            Struck::Host => Err(self.host_crashes(h)),
            Struck::Nothing if failed => Err(Stop::Failed("forget")),
            Struck::Nothing => Ok(()),
        }
    }

    fn restore(&mut self, h: usize, binding: &Binding) -> Result<(), Stop> {
        self.point(h, "restore")?;
        if std::mem::take(&mut self.hosts[h].image_fault) {
            return Err(Stop::Failed("restore"));
        }
        let image = self.hosts[h].images.get(&binding.migration).filter(|image| image.whole).ok_or(Stop::Failed("restore"))?;
        let vmm = Vmm { state: RunState::Paused, version: image.version, from_image: true, renewed: false };
        self.hosts[h].vmms.insert(binding.address.clone(), vmm);
        Ok(())
    }

    /// Starts the guest's vCPUs; the checks look at every time that this happens.
    pub fn resume(&mut self, h: usize, binding: &Binding) -> Result<(), Stop> {
        let vmm = self.hosts[h].vmms.get(&binding.address).ok_or(Stop::Failed("resume"))?;
        if vmm.state == RunState::Running {
            return Ok(());
        }
        self.truth.resumes(h, &self.hosts[h], vmm, binding.migration);
        let vmm = self.hosts[h].vmms.get_mut(&binding.address).ok_or(Stop::Failed("resume"))?;
        vmm.state = RunState::Running;
        let version = vmm.version;
        self.trace("resume", h, version);
        Ok(())
    }

    /// What the host has of the guest of a handoff.
    pub fn held(&self, h: usize, binding: &Binding) -> Holding {
        let host = &self.hosts[h];
        match (host.vmms.contains_key(&binding.address), host.images.get(&binding.migration)) {
            (true, _) => Holding::Memory,
            (false, Some(image)) if image.whole => Holding::Image,
            _ => Holding::Nothing,
        }
    }

    /// As `Evidence::send`.
    pub fn say(&mut self, h: usize, session: SessionId, binding: &Binding, step: Handoff) {
        let position = self.position(h);
        self.say_at(h, session, binding, step, position);
    }

    pub fn position(&self, h: usize) -> u64 {
        self.hosts[h].journal.as_ref().map_or(0, |journal| journal.position())
    }

    pub fn say_at(&mut self, h: usize, session: SessionId, binding: &Binding, step: Handoff, position: u64) {
        let Some(journal) = &self.hosts[h].journal else { return };
        self.truth.said(&step, &self.hosts[h], binding.migration);
        let message = HandoffMessage {
            migration: binding.migration,
            uuid: binding.uuid,
            epoch: binding.epoch,
            sender: journal.incarnation(),
            receiver: binding.peer_incarnation,
            position,
            step,
        };
        let signed = Signed { message, key: self.hosts[h].key };
        self.send(h, session, Message::Handoff(Box::new(signed)));
    }

    /// As `Evidence::check`.
    pub fn check(&self, h: usize, binding: &Binding, signed: &Signed) -> Option<Heard> {
        let message = &signed.message;
        let own = self.hosts[h].journal.as_ref()?.incarnation();
        let authentic = signed.key == binding.peer_key
            && (message.migration, message.uuid, message.epoch) == (binding.migration, binding.uuid, binding.epoch)
            && message.receiver == own;
        let position = if self.bug == Some(Bug::NoPositionCheck) { u64::MAX } else { message.position };
        let incarnation_same = message.sender == binding.peer_incarnation;
        authentic.then(|| Heard { step: message.step.clone(), incarnation_same, position })
    }

    /// The actions as the planted mistake has them.
    pub fn spoil<R>(&self, mut actions: Vec<HandoffAction<R>>) -> Vec<HandoffAction<R>> {
        let at = |actions: &[HandoffAction<R>], wanted: fn(&HandoffAction<R>) -> bool| actions.iter().position(wanted);
        let (first, second) = match self.bug {
            Some(Bug::ResumeBeforeForget) => {
                (at(&actions, |a| matches!(a, HandoffAction::Forget)), at(&actions, |a| matches!(a, HandoffAction::Resume)))
            }
            Some(Bug::SayBeforeJournal) => {
                (at(&actions, |a| matches!(a, HandoffAction::Journal(_))), at(&actions, |a| matches!(a, HandoffAction::Send(_))))
            }
            Some(Bug::ResumeBeforeJournal) => {
                (at(&actions, |a| matches!(a, HandoffAction::Journal(_))), at(&actions, |a| matches!(a, HandoffAction::Resume)))
            }
            _ => (None, None),
        };
        if let (Some(first), Some(second)) = (first, second)
            && first < second
        {
            actions.swap(first, second);
        }
        actions
    }
}
