//! The checked configuration. Nothing here changes after it was checked; a reload makes a new one.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::raw::Setting;
use super::{
    Address, Bandwidth, ByteSize, Classification, Compression, DiskFormat, Durability, Existing, KeyFile, Label, Role, Sandboxing, TimeSpan,
};
use crate::types::{PeerName, SpiffeId, Verify, VmName, VmUuid};

/// A configuration without problems; made by [`load`](super::load) and [`parse`](super::parse) only.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The file it was read from.
    pub file: PathBuf,
    /// This gateway.
    pub gateway: Gateway,
    /// Its certificate, and whom it trusts.
    pub identity: Identity,
    /// Where policies come from.
    pub policy: Policies,
    /// What a migration does unless its request says otherwise.
    pub migration: Migration,
    /// The gateways it may talk to.
    pub peers: Vec<Peer>,
    /// The VMs it may move away, or has a name for.
    pub vms: Vec<Vm>,
    /// How an empty VMM for an incoming VM is started; without it none is accepted.
    pub incoming: Option<Incoming>,
    /// How empty QEMUs are started.
    pub templates: Vec<Template>,
    /// Who may use the control socket, besides root and the gateway's own user.
    pub operators: Vec<Operator>,
    /// How much at once.
    pub limits: Limits,
    /// Every value with its origin, for `config check`.
    pub settings: Vec<Setting>,
}

impl Config {
    /// The peer of that name.
    #[must_use]
    pub fn peer(&self, name: &PeerName) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == *name)
    }

    /// The peer with that identity.
    #[must_use]
    pub fn peer_of(&self, spiffe: &SpiffeId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.spiffe == *spiffe)
    }

    /// The VM of that name.
    #[must_use]
    pub fn vm(&self, name: &VmName) -> Option<&Vm> {
        self.vms.iter().find(|vm| vm.name == *name)
    }

    /// The operator with that user id.
    #[must_use]
    pub fn operator(&self, uid: u32) -> Option<&Operator> {
        self.operators.iter().find(|operator| operator.uid == uid)
    }
}

/// `[gateway]`: this gateway.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Gateway {
    /// Its name in messages.
    pub name: PeerName,
    /// The site it stands in.
    pub site: Label,
    /// UDP address that peers reach it at.
    pub listen: SocketAddr,
    /// Unix socket of the control API.
    pub control_socket: PathBuf,
    /// Unix socket of the same API without the verbs that change something.
    pub view_socket: Option<PathBuf>,
    /// Where the journal is.
    pub state_directory: PathBuf,
    /// Where the audit log is.
    pub audit_directory: PathBuf,
    /// How long its entries are kept; for ever if nothing is said.
    pub audit_keep: Option<TimeSpan>,
    /// Where the sockets of incoming VMMs are.
    pub runtime_directory: PathBuf,
    /// The user that a gateway becomes that was started as root.
    pub user: Option<String>,
    /// What is done where the kernel cannot confine the gateway.
    pub sandbox: Sandboxing,
    /// Whether certificates, CRLs and policies are read again when their files change.
    pub watch_files: bool,
}

/// `[identity]`: the gateway's certificate and whom it trusts.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Identity {
    /// PEM file: the leaf and its intermediates.
    pub certificate: PathBuf,
    /// PEM: the leaf's private key; or which key of which token.
    pub key: KeyFile,
    /// The library that speaks to tokens, where one of the keys is in one.
    pub pkcs11_module: Option<PathBuf>,
    /// The file with the token's PIN; none where the token asks for it by itself, or wants none.
    pub pkcs11_pin: Option<KeyFile>,
    /// PEM: the Ed25519 key that signs handoff messages and checkpoints; or which key of which token.
    pub signing_key: KeyFile,
    /// Whether a peer that cannot do X25519MLKEM768 is refused.
    pub require_post_quantum: bool,
    /// By trust domain; at least one.
    pub trust: Vec<Trust>,
}

/// `[[identity.trust]]`: one trust domain.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Trust {
    /// SPIFFE trust domain.
    pub domain: String,
    /// PEM file of its roots.
    pub roots: PathBuf,
    /// PEM files of its revocation lists; at least one.
    pub crls: Vec<PathBuf>,
    /// PEM file of issuers below the roots, by which lists of theirs are checked when they are read.
    pub intermediates: Option<PathBuf>,
}

impl Trust {
    /// Every file of it.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.crls.iter().chain([&self.roots]).chain(&self.intermediates)
    }
}

/// `[policy]`: where policies come from.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Policies {
    /// Every `*.cedar` of a directory, whoever wrote it.
    Directory(PathBuf),
    /// A signed bundle.
    Bundle(PolicyBundle),
}

/// Where a signed bundle is, and whose signatures count.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PolicyBundle {
    /// Its directory.
    pub directory: PathBuf,
    /// What it has to be called.
    pub name: String,
    /// Public keys of `minisign`.
    pub keys: Vec<String>,
    /// How many of them have to have signed.
    pub threshold: usize,
}

/// `[migration]`: defaults of a migration.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Migration {
    /// Lanes wanted.
    pub lanes: u16,
    /// Channels on which a QEMU hands over pages.
    pub channels: u16,
    /// Codec of page batches.
    pub compression: Compression,
    /// Longest pause wanted.
    pub max_downtime: TimeSpan,
    /// Longest migration.
    pub timeout: TimeSpan,
    /// Longest outage of the link that is waited out.
    pub max_outage: TimeSpan,
    /// How long disks of a VM that did not come are kept for another attempt.
    pub keep_disks: TimeSpan,
    /// What is compared before the switch.
    pub verify: Verify,
    /// Most memory that each migration takes at the source to find equal pages and differences.
    pub tables: ByteSize,
    /// Most that goes over the wire; unlimited when absent.
    pub bandwidth: Option<Bandwidth>,
    /// Most that goes over the wire for all departures together; unlimited when absent.
    pub bandwidth_total: Option<Bandwidth>,
    /// Departures at once; the others wait for their turn.
    pub parallel: u32,
    /// Where the final image is on disk before the switch.
    pub durability: Durability,
}

/// `[[peer]]`: another gateway.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Peer {
    /// What operators call it.
    pub name: PeerName,
    /// Where it listens.
    pub address: Address,
    /// Who it must prove to be.
    pub spiffe: SpiffeId,
    /// The site it stands in.
    pub site: Label,
    /// Groups for policy.
    pub groups: Vec<Label>,
}

/// `[[vm]]`: a virtual machine and what policy is told about it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Vm {
    /// What operators call it.
    pub name: VmName,
    /// What policy calls it.
    pub uuid: VmUuid,
    /// Socket of its running VMM, attached to at start.
    pub socket: Option<PathBuf>,
    /// Monitor of its running QEMU, instead of `socket`.
    pub qmp: Option<PathBuf>,
    /// The `[[template]]` of the QEMU that is started for it when it arrives.
    pub template: Option<Label>,
    /// Monitor of a QEMU that waits for it already, instead of `template`.
    pub incoming_qmp: Option<PathBuf>,
    /// Whose it is.
    pub tenant: Label,
    /// How sensitive it is.
    pub classification: Classification,
    /// Where it belongs.
    pub home_site: Label,
    /// Where it may be.
    pub allowed_sites: Vec<Label>,
    /// Whether it may move at all.
    pub migratable: bool,
    /// Whether its memory may be in two places at once.
    pub postcopy_ok: bool,
    /// Groups for policy.
    pub groups: Vec<Label>,
    /// How many vCPUs it has; anything else is refused.
    pub vcpus: Option<u32>,
    /// Its devices as its VMM names them; anything else is refused.
    pub devices: Option<Vec<String>>,
    /// SHA-256, in hex, of all that its VMM says it is made of; anything else is refused.
    pub machine: Option<String>,
    /// Its disks that may move with it; all that it can write to when none is listed.
    pub disks: Vec<Disk>,
}

/// `[[vm.disk]]`: a disk of a VM, and where it goes when the VM arrives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Disk {
    /// The guest's device, by its `id` in QEMU.
    pub device: String,
    /// A new file is made there; without it the template's QEMU has a disk already.
    pub file: Option<PathBuf>,
    /// What the file is.
    pub format: DiskFormat,
    /// Clusters of a `qcow2`.
    pub cluster_size: ByteSize,
    /// The longest disk that may come.
    pub max_size: ByteSize,
    /// What becomes of a file that is there.
    pub existing: Existing,
}

/// `[incoming]`: how an empty VMM is started.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Incoming {
    /// Program and arguments with placeholders.
    pub command: Vec<String>,
    /// Largest guest that is accepted.
    pub max_memory: ByteSize,
}

/// `[[template]]`: how an empty QEMU is started, for VMs that name it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Template {
    /// What VMs call it.
    pub name: Label,
    /// Program and arguments with placeholders.
    pub command: Vec<String>,
    /// Largest guest that is accepted.
    pub max_memory: ByteSize,
}

/// The words that may stand in braces in [`Incoming::command`] and [`Template::command`].
pub(super) const PLACEHOLDERS: [&str; 6] = ["socket", "vm", "uuid", "memory_bytes", "vcpus", "serial"];

/// `[[operator]]`: somebody who may use the control socket.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Operator {
    /// The name in the audit log.
    pub name: Label,
    /// Their user id, as the kernel tells it of the peer of a Unix socket.
    pub uid: u32,
    /// Teams for policy.
    pub teams: Vec<Label>,
    /// Whether their login used a second factor; for policy.
    pub mfa: bool,
    /// What they may ask.
    pub roles: Vec<Role>,
}

/// `[limits]`: how much at once.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Migrations at once, both directions together.
    pub migrations_max: u32,
    /// Finished reports kept.
    pub history_max: u32,
}
