//! One host: its disk, its VMMs, and the gateway process with what that holds in memory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use sealane::engine::{Binding, JournalRecord, Placement};
use sealane::journal::Journal;
use sealane::migration::Outcome;
use sealane::types::{MigrationId, Round, SpiffeId, VmName};

use crate::chance::Chance;
use crate::disk::{Disk, Handle};
use crate::live::{DestinationRun, SourceRun};
use crate::network::SessionId;
use crate::recovery::Conversation;
use crate::world::Time;

#[derive(Debug)]
pub struct Host {
    pub spiffe: SpiffeId,
    pub key: [u8; 32],
    pub disk: Disk,
    /// The disk as it was when the attempt began, while going back to it is something that may happen.
    pub copy: Option<Vec<u8>>,
    pub images: BTreeMap<MigrationId, Image>,
    pub vmms: BTreeMap<String, Vmm>,
    pub powered: bool,
    /// Counts gateway processes.
    pub boot: u64,
    pub journal: Option<Journal>,
    /// The journal does nothing more until the gateway is started again.
    pub stopped: bool,
    /// What the gateway believes about the VM.
    pub place: Option<Placement>,
    pub claim: Option<Claim>,
    pub sources: BTreeMap<MigrationId, SourceRun>,
    /// The round of each attempt, as its source's ledger has it: outlives the gateway, not the host.
    pub ledgers: BTreeMap<MigrationId, Round>,
    pub destinations: BTreeMap<MigrationId, DestinationRun>,
    pub talks: BTreeMap<SessionId, Talk>,
    pub conversations: BTreeMap<MigrationId, Conversation>,
    /// First messages about a migration whose turn it is not.
    pub waiting: Vec<(MigrationId, SessionId, crate::network::Message)>,
    pub resolving: BTreeMap<MigrationId, Time>,
    pub telling: BTreeMap<MigrationId, (Time, Time)>,
    /// What the work of this moment has taken so far.
    pub lag: Time,
    pub image_fault: bool,
    pub deny: bool,
    /// Records that were read before, by their bytes: parsing them takes most of the time.
    parsed: RefCell<HashMap<Vec<u8>, JournalRecord>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    pub migration: MigrationId,
    /// Only a peer's word is waited for.
    pub waits: bool,
}

/// Who has this end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Talk {
    Greeting,
    Source(MigrationId),
    Destination(MigrationId),
    /// RESUMED was said by a gateway that has only its journal; a handoff message follows.
    TakenUp(MigrationId),
    Conversation(MigrationId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    Incoming,
    Paused,
    Running,
}

#[derive(Debug, Clone, Copy)]
pub struct Vmm {
    pub state: RunState,
    /// Which memory it holds: the guest counts while it runs.
    pub version: u64,
    pub from_image: bool,
    pub renewed: bool,
}

#[derive(Debug, Clone, Copy)]
pub struct Image {
    pub version: u64,
    /// A torn image is found out when it is read.
    pub whole: bool,
}

/// Why an action was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The process that was about to is gone.
    Crash,
    /// It failed; the words say what.
    Failed(&'static str),
}

/// What an action led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    Done,
    Ask,
    Ended(Outcome),
    Left,
}

pub fn vm() -> VmName {
    "vm-1".parse().unwrap()
}

impl Host {
    pub fn new(index: usize, generation: u64, chance: &mut Chance) -> Self {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&chance.bytes16());
        let mut host = Self {
            spiffe: format!("spiffe://dc{index}.example.net/gateway/gw-{index}").parse().unwrap(),
            key,
            disk: Disk::default(),
            copy: None,
            images: BTreeMap::new(),
            vmms: BTreeMap::new(),
            powered: true,
            boot: generation << 32,
            journal: None,
            stopped: false,
            place: None,
            claim: None,
            sources: BTreeMap::new(),
            ledgers: BTreeMap::new(),
            destinations: BTreeMap::new(),
            talks: BTreeMap::new(),
            conversations: BTreeMap::new(),
            waiting: Vec::new(),
            resolving: BTreeMap::new(),
            telling: BTreeMap::new(),
            lag: 0,
            image_fault: false,
            deny: false,
            parsed: RefCell::default(),
        };
        host.open_journal();
        host
    }

    /// A gateway that cannot open its journal does not start.
    pub fn open_journal(&mut self) -> bool {
        self.journal = Journal::with_storage(self.handle(), "journal").ok();
        self.stopped = false;
        self.journal.is_some()
    }

    fn handle(&self) -> Handle {
        self.disk.open()
    }

    pub fn serves(&self) -> bool {
        self.powered && self.journal.is_some()
    }

    /// The gateway's process is gone, with everything in its memory.
    pub fn kill_gateway(&mut self) {
        self.boot += 1;
        self.disk.kill_process();
        self.journal = None;
        self.claim = None;
        self.place = None;
        self.sources.clear();
        self.destinations.clear();
        self.talks.clear();
        self.conversations.clear();
        self.waiting.clear();
        self.resolving.clear();
        self.telling.clear();
    }

    /// As `Evidence::record`, without the audit log.
    pub fn record(&mut self, binding: &Binding, record: &JournalRecord) -> Result<(), Stop> {
        let journal = self.journal.as_ref().ok_or(Stop::Crash)?;
        let bytes = serde_json::to_vec(record).unwrap();
        let done = match record.placement(binding) {
            Some(placement) => journal.append_and_place(binding.migration, &bytes, &binding.vm, &serde_json::to_vec(&placement).unwrap()),
            None => journal.append(binding.migration, &bytes),
        };
        self.stopped |= done.is_err();
        done.map(drop).map_err(|_| Stop::Failed("journal"))
    }

    pub fn records(&self, migration: MigrationId) -> Result<Vec<JournalRecord>, Stop> {
        let journal = self.journal.as_ref().ok_or(Stop::Crash)?;
        let records = journal.records(migration).map_err(|_| Stop::Failed("read"))?;
        let mut parsed = self.parsed.borrow_mut();
        let mut parse = |bytes: Vec<u8>| {
            let record = || serde_json::from_slice(&bytes).unwrap();
            parsed.entry(bytes.clone()).or_insert_with(record).clone()
        };
        Ok(records.into_iter().map(|(_, bytes)| parse(bytes)).collect())
    }

    pub fn migrations(&self) -> Result<Vec<MigrationId>, Stop> {
        self.journal.as_ref().ok_or(Stop::Crash)?.migrations().map_err(|_| Stop::Failed("read"))
    }

    /// Where the journal says that the VM is.
    pub fn placement(&self) -> Result<Option<Placement>, Stop> {
        let bytes = self.journal.as_ref().ok_or(Stop::Crash)?.vm(&vm()).map_err(|_| Stop::Failed("read"))?;
        Ok(bytes.map(|bytes| Placement::read(&bytes).unwrap()))
    }

    /// As `Gateway::load_places`.
    pub fn load_place(&mut self) {
        if let Ok(Some(place)) = self.placement() {
            self.place = Some(place);
        }
    }

    pub fn runs(&self) -> bool {
        self.vmms.values().any(|vmm| vmm.state == RunState::Running)
    }

    /// As `Registry::is_under_way`.
    pub fn is_under_way(&self, migration: MigrationId) -> bool {
        self.claim.is_some_and(|claim| claim.migration == migration && !claim.waits)
    }

    pub fn release(&mut self, migration: MigrationId) {
        if self.claim.is_some_and(|claim| claim.migration == migration) {
            self.claim = None;
        }
    }
}
