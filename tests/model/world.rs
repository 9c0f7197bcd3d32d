//! The state of the world: two hosts, what was ever said, and what faults are still to come.

use std::hash::{Hash, Hasher};

use sealane::migration::Holding;
use sealane::types::Side;

use crate::machines::{OFFER, PREPARED, Record, Records};
use crate::tables::{List, State};

/// A guest's memory on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    None,
    /// As it was when the guest was last here, or as it was received.
    Intact,
    /// Built from an image.
    Restored,
    /// With a new generation id.
    Renewed,
}

/// One of the two hosts, with its gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// The machine; 0 while the gateway is down.
    pub machine: State,
    /// What it has still to do.
    pub due: List,
    /// What is on disk.
    pub records: Records,
    pub memory: Memory,
    /// The final image is on disk.
    pub image: bool,
    pub running: bool,
    /// The guest has run here past the final state, or has been started here from its disks.
    pub ran: bool,
    /// The VM is, to this gateway, still where this handoff's records put it.
    pub current: bool,
    /// The journal takes nothing more until it is opened again.
    pub stopped: bool,
    /// Gone for good.
    pub destroyed: bool,
}

/// Faults that may still come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// Gateways that die.
    pub gateways: u8,
    /// Hosts that die and come back.
    pub hosts: u8,
    /// Writes of a journal or an image that fail.
    pub disks: u8,
    /// Hosts that are destroyed; the destination's journal wiped or restored from a copy.
    pub losses: u8,
    /// Records of other migrations in the destination's journal.
    pub others: u8,
    /// Later migrations to a third gateway.
    pub moves: u8,
}

/// A state of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    pub source: Host,
    pub destination: Host,
    /// Every message that was ever said. Any of it may be heard, at any time, any number of times, or never.
    pub said: u64,
    /// The destination's journal was begun anew.
    pub new_journal: bool,
    /// Records that the destination's journal has ever held.
    pub position: u8,
    /// The destination's journal has lost records.
    pub forgot: bool,
    /// The guest was paused for good and its final state is known.
    pub finalised: bool,
    /// A restarted source has let the guest go on past the first final state, and what was sent of that is old.
    pub superseded: bool,
    /// A third gateway runs the VM.
    pub elsewhere: bool,
    /// A guest was resumed, or an image used, although the VM had run past that.
    pub stale: bool,
    /// A guest from an image was resumed with its old generation id.
    pub same_generation: bool,
    /// A guest that ran was destroyed.
    pub killed: bool,
    pub faults: Faults,
}

impl World {
    /// OFFER is journaled, the guest runs at the source, the destination has an empty twin.
    pub fn new(faults: Faults, source: State, destination: State) -> Self {
        let host = Host {
            machine: destination,
            due: 0,
            records: [0; 5],
            memory: Memory::None,
            image: false,
            running: false,
            ran: false,
            current: true,
            stopped: false,
            destroyed: false,
        };
        let source = Host { machine: source, records: [OFFER, 0, 0, 0, 0], memory: Memory::Intact, running: true, ..host };
        Self {
            source,
            destination: host,
            said: 0,
            new_journal: false,
            position: 0,
            forgot: false,
            finalised: false,
            superseded: false,
            elsewhere: false,
            stale: false,
            same_generation: false,
            killed: false,
            faults,
        }
    }

    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    pub fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    pub fn has_heard_of(&self, bit: u8) -> bool {
        self.said & 1 << bit != 0
    }

    pub fn runners(&self) -> u8 {
        u8::from(self.source.running) + u8::from(self.destination.running) + u8::from(self.elsewhere)
    }

    /// Whether what this side has prepared is a final state that the guest went on from.
    pub fn has_old(&self, side: Side) -> bool {
        side == Side::Destination && self.superseded && self.destination.records[0] == PREPARED + 1
    }

    /// Both hosts and both journals are whole.
    pub fn is_whole(&self) -> bool {
        !(self.forgot || self.source.destroyed || self.destination.destroyed)
    }
}

impl Host {
    pub fn last(&self) -> Record {
        self.records.iter().copied().rfind(|record| *record != 0).unwrap_or(0)
    }

    pub fn write(&mut self, record: Record) {
        *self.records.iter_mut().find(|record| **record == 0).expect("room in the journal") = record;
    }

    pub fn holding(&self) -> Holding {
        match (self.memory, self.image) {
            (Memory::None, false) => Holding::Nothing,
            (Memory::None, true) => Holding::Image,
            _ => Holding::Memory,
        }
    }

    /// Its gateway is there and has nothing to do.
    pub fn listens(&self) -> bool {
        self.machine != 0 && self.due == 0
    }

    /// The gateway is gone, and what it had in hand; its journal is opened anew with the next one.
    pub fn stop_gateway(&mut self) {
        (self.machine, self.due, self.stopped) = (0, 0, false);
    }

    /// The guest is gone.
    pub fn lose_memory(&mut self) {
        (self.memory, self.running) = (Memory::None, false);
    }

    /// The host is gone for good, with its disks.
    pub fn destroy(&mut self) {
        self.stop_gateway();
        self.lose_memory();
        (self.records, self.image, self.destroyed) = ([0; 5], false, true);
    }

    fn word(&self) -> u64 {
        let [a, b, c, d, e] = self.records;
        let flags = [self.image, self.running, self.ran, self.current, self.stopped, self.destroyed];
        u64::from_be_bytes([a, b, c, d, e, self.machine, self.due, packed(&flags) << 2 | self.memory as u8])
    }
}

fn packed(flags: &[bool]) -> u8 {
    flags.iter().fold(0, |byte, flag| byte << 1 | u8::from(*flag))
}

impl World {
    /// All of it in four words.
    pub fn words(&self) -> [u64; 4] {
        let Faults { gateways, hosts, disks, losses, others, moves } = self.faults;
        let flags =
            [self.new_journal, self.forgot, self.finalised, self.superseded, self.elsewhere, self.stale, self.same_generation, self.killed];
        let rest = u64::from_be_bytes([gateways, hosts, disks, losses, others, moves, self.position, packed(&flags)]);
        [self.source.word(), self.destination.word(), self.said, rest]
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.words().iter().for_each(|word| hasher.write_u64(*word));
    }
}
