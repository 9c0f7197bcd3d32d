//! Which VMs this gateway knows, where they are, and which of them is moving. One owner for each.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::{mpsc, watch};

use crate::engine::{Command, Placement, Return};
use crate::gateway::queue::{Number, Queue, QueueFull, Standing};
use crate::limits;
use crate::telemetry::{Progress, Report};
use crate::types::{MigrationId, PeerName, Side, VmName};

/// The VMs and migrations of this gateway.
#[derive(Debug)]
pub(super) struct Registry {
    /// Migrations at once, both directions together.
    most: usize,
    inner: Mutex<Inner>,
    /// Told when there may be room for a migration that had to wait.
    room: watch::Sender<()>,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    places: BTreeMap<VmName, Placement>,
    busy: BTreeMap<VmName, MigrationId>,
    /// Those of `busy` that only wait: for their turn, or for a peer's word, which may take for ever.
    waiting: BTreeSet<VmName>,
    migrations: BTreeMap<MigrationId, Migration>,
    ended: VecDeque<MigrationId>,
    resolving: BTreeMap<MigrationId, Arc<tokio::sync::Mutex<()>>>,
    closed: bool,
}

/// A migration as others see it.
#[derive(Debug, Clone)]
pub(super) struct Migration {
    pub(super) id: MigrationId,
    pub(super) vm: VmName,
    pub(super) peer: PeerName,
    pub(super) side: Side,
    pub(super) started: SystemTime,
    pub(super) progress: watch::Receiver<Progress>,
    /// Absent while it runs.
    pub(super) report: Option<Arc<Report>>,
    /// Told when the report is there.
    pub(super) ended: watch::Receiver<bool>,
    /// How it is steered; at a destination only to stop it when the gateway does.
    pub(super) commands: Option<mpsc::Sender<Command>>,
    /// Where a destination hears a source that comes back in a new session.
    pub(super) returns: Option<mpsc::Sender<Return>>,
}

/// Why a VM cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Busy {
    /// It is moving already.
    Vm(MigrationId),
    /// Too many migrations at once.
    Full,
    /// Another migration has this id.
    Id,
    /// The gateway is shutting down.
    Closing,
}

/// The right to move one VM; given back when dropped.
#[derive(Debug)]
pub(super) struct Claim {
    registry: Arc<Registry>,
    vm: VmName,
}

impl Claim {
    /// The VM is still nobody else's, but no longer one of the migrations at once.
    pub(super) fn wait(&self) {
        self.registry.lock().waiting.insert(self.vm.clone());
        self.registry.room.send_replace(());
    }

    /// The VM moves on, as one of the migrations at once.
    pub(super) fn go_on(&self) {
        self.registry.lock().waiting.remove(&self.vm);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        inner.busy.remove(&self.vm);
        inner.waiting.remove(&self.vm);
        drop(inner);
        self.registry.room.send_replace(());
    }
}

/// A departure's place in the queue, and then its turn; given back when dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    registry: Arc<Registry>,
    number: Number,
}

impl Ticket {
    /// Lets the departure that has `claim` go if it is its turn.
    pub(super) fn ask(&self, claim: &Claim, now: Instant) -> Standing {
        let mut guard = self.registry.lock();
        let inner = &mut *guard;
        let room = !inner.closed && inner.has_room(self.registry.most);
        let standing = inner.queue.ask(self.number, room, now);
        if standing == Standing::Goes {
            inner.waiting.remove(&claim.vm);
            drop(guard);
            // The next one may go as well.
            self.registry.room.send_replace(());
        }
        standing
    }

    /// The peer has taken the VM's offer.
    pub(super) fn taken(&self, now: Instant) {
        self.registry.lock().queue.taken(self.number, now);
        self.registry.room.send_replace(());
    }

    /// The peer has no room now: the departure that has `claim` waits again, where it was.
    pub(super) fn sent_back(&self, claim: &Claim, now: Instant, jitter: f64) {
        let mut inner = self.registry.lock();
        inner.queue.sent_back(self.number, now, jitter);
        inner.waiting.insert(claim.vm.clone());
        drop(inner);
        self.registry.room.send_replace(());
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.registry.lock().queue.leave(self.number);
        self.registry.room.send_replace(());
    }
}

impl Inner {
    fn has_room(&self, most: usize) -> bool {
        self.busy.len() - self.waiting.len() < most
    }

    /// Whether a migration with this id may take this VM.
    fn is_free(&self, vm: &VmName, migration: MigrationId) -> Result<(), Busy> {
        if self.closed {
            return Err(Busy::Closing);
        }
        // The same peer or another one may say an id again: two migrations would share their records.
        if self.migrations.contains_key(&migration) || self.busy.values().any(|other| *other == migration) {
            return Err(Busy::Id);
        }
        self.busy.get(vm).map_or(Ok(()), |other| Err(Busy::Vm(*other)))
    }
}

/// The turn to settle one interrupted handoff.
#[derive(Debug)]
pub(super) struct Turn {
    registry: Arc<Registry>,
    migration: MigrationId,
    guard: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.guard = None;
        let mut inner = self.registry.lock();
        // Peers choose the ids: what nobody waits for is not kept.
        if inner.resolving.get(&self.migration).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            inner.resolving.remove(&self.migration);
        }
    }
}

/// Finished migrations that `status` still shows.
const ENDED_SHOWN: usize = 256;

impl Registry {
    /// At most so many migrations at once, and of them so many departures.
    pub(super) fn new(most: u32, parallel: u32) -> Self {
        let inner = Inner {
            queue: Queue::new(parallel as usize, limits::DEPARTURES_QUEUED_MAX),
            places: BTreeMap::new(),
            busy: BTreeMap::new(),
            waiting: BTreeSet::new(),
            migrations: BTreeMap::new(),
            ended: VecDeque::new(),
            resolving: BTreeMap::new(),
            closed: false,
        };
        Self { most: most as usize, inner: Mutex::new(inner), room: watch::channel(()).0 }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn place(&self, vm: &VmName) -> Option<Placement> {
        self.lock().places.get(vm).cloned()
    }

    pub(super) fn set_place(&self, vm: VmName, place: Placement) {
        self.lock().places.insert(vm, place);
    }

    pub(super) fn moving(&self, vm: &VmName) -> Option<MigrationId> {
        self.lock().busy.get(vm).copied()
    }

    /// Takes a VM that arrives.
    pub(super) fn claim(self: &Arc<Self>, vm: &VmName, migration: MigrationId) -> Result<Claim, Busy> {
        let mut inner = self.lock();
        inner.is_free(vm, migration)?;
        if !inner.has_room(self.most) {
            return Err(Busy::Full);
        }
        inner.busy.insert(vm.clone(), migration);
        Ok(Claim { registry: Arc::clone(self), vm: vm.clone() })
    }

    /// Takes a VM that will leave when it is its turn.
    pub(super) fn reserve(self: &Arc<Self>, vm: &VmName, migration: MigrationId) -> Result<Claim, Busy> {
        let mut inner = self.lock();
        inner.is_free(vm, migration)?;
        inner.busy.insert(vm.clone(), migration);
        inner.waiting.insert(vm.clone());
        Ok(Claim { registry: Arc::clone(self), vm: vm.clone() })
    }

    /// A place at the end of the queue of departures.
    pub(super) fn queue(self: &Arc<Self>, peer: &PeerName) -> Result<Ticket, QueueFull> {
        let number = self.lock().queue.join(peer)?;
        Ok(Ticket { registry: Arc::clone(self), number })
    }

    /// The turn of a departure that an earlier gateway had under way.
    pub(super) fn pass_queue(self: &Arc<Self>, peer: &PeerName) -> Ticket {
        let number = self.lock().queue.pass(peer);
        Ticket { registry: Arc::clone(self), number }
    }

    /// Departures that wait for their turn.
    pub(super) fn queued(&self) -> usize {
        self.lock().queue.waiting()
    }

    /// Changes whenever there may be room for a migration that had to wait.
    pub(super) fn room(&self) -> watch::Receiver<()> {
        self.room.subscribe()
    }

    /// A VM whose interrupted handoff waits for a peer's word, found at the start.
    pub(super) fn claim_waiting(self: &Arc<Self>, vm: &VmName, migration: MigrationId) -> Claim {
        let mut inner = self.lock();
        inner.busy.insert(vm.clone(), migration);
        inner.waiting.insert(vm.clone());
        Claim { registry: Arc::clone(self), vm: vm.clone() }
    }

    /// Waits for the turn to settle an interrupted handoff: one at a time speaks for a migration.
    pub(super) async fn resolving(self: &Arc<Self>, migration: MigrationId) -> Turn {
        let turn = Arc::clone(self.lock().resolving.entry(migration).or_default());
        let guard = Some(turn.lock_owned().await);
        Turn { registry: Arc::clone(self), migration, guard }
    }

    /// The same turn, if nobody has it.
    pub(super) fn resolving_at_once(self: &Arc<Self>, migration: MigrationId) -> Option<Turn> {
        let turn = Arc::clone(self.lock().resolving.entry(migration).or_default());
        let guard = turn.try_lock_owned().ok()?;
        Some(Turn { registry: Arc::clone(self), migration, guard: Some(guard) })
    }

    /// Whether a run of this process has a migration in hand: then only its own session speaks for it. One that an earlier
    /// process left open is shown as active too, and is exactly what a peer may come back for.
    pub(super) fn is_under_way(&self, migration: MigrationId) -> bool {
        let inner = self.lock();
        inner.busy.iter().any(|(vm, other)| *other == migration && !inner.waiting.contains(vm))
    }

    pub(super) fn begin(&self, migration: Migration) {
        self.lock().migrations.insert(migration.id, migration);
    }

    pub(super) fn end(&self, id: MigrationId, report: Arc<Report>) {
        let mut inner = self.lock();
        if let Some(migration) = inner.migrations.get_mut(&id) {
            migration.report = Some(report);
            migration.commands = None;
            migration.returns = None;
        }
        inner.ended.push_back(id);
        if inner.ended.len() > ENDED_SHOWN
            && let Some(oldest) = inner.ended.pop_front()
        {
            inner.migrations.remove(&oldest);
        }
    }

    pub(super) fn migration(&self, id: MigrationId) -> Option<Migration> {
        self.lock().migrations.get(&id).cloned()
    }

    pub(super) fn migrations(&self) -> Vec<Migration> {
        self.lock().migrations.values().cloned().collect()
    }

    /// No new migration from now on; those under way are told to stop.
    pub(super) fn close(&self) -> Vec<Migration> {
        let mut inner = self.lock();
        inner.closed = true;
        inner.migrations.values().filter(|migration| migration.report.is_none()).cloned().collect()
    }
}
