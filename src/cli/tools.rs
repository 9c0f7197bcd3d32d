//! Flags of the commands that do not talk to a gateway: demo, bench, pki, policy, audit, vmm.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::flags::quantity;
use crate::audit::{Event, Outcome};
use crate::config::{Bandwidth, ByteSize, Label};
use crate::control::Compress;
use crate::limits::{LANES_MAX, VCPUS_MAX};
use crate::types::{MigrationId, PeerName, VmName, VmUuid};

/// Flags of `demo`.
#[derive(Debug, Args)]
pub struct DemoFlags {
    /// What runs the guest; without it KVM, or synthetic where KVM cannot be used.
    #[arg(long, value_enum)]
    pub hypervisor: Option<DemoHypervisor>,
    /// The guest's memory.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = quantity::<ByteSize>)]
    pub memory: ByteSize,
    /// The guest's vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=i64::from(VCPUS_MAX)))]
    pub vcpus: u32,
    /// How fast the built-in guest writes; the least that it can is a page for each vCPU and hundredth of a second.
    #[arg(long, value_name = "RATE", default_value = "40MiB/s", value_parser = quantity::<Bandwidth>)]
    pub dirty_rate: Bandwidth,
    /// Most that goes over the wire, e.g. 1Gbit.
    #[arg(long, value_parser = quantity::<Bandwidth>)]
    pub bandwidth: Option<Bandwidth>,
    /// Parallel connections.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(LANES_MAX)))]
    pub lanes: Option<u16>,
    /// Keep certificates, journals and audit logs in this directory, instead of removing them.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Print the report as JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// What runs the demo's guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DemoHypervisor {
    /// A real guest under KVM.
    Kvm,
    /// Linux in an unmodified QEMU, which emulates its processor: Debian's cloud kernel and a shell.
    Qemu,
    /// Threads that write memory as a guest would.
    Synthetic,
}

/// Flags of `bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group = clap::ArgGroup::new("ram").required(true).args(["image", "content"]))]
pub struct BenchFlags {
    /// What else than to move memory.
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// The memory image, a multiple of 4096 bytes.
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Generate the memory instead of reading an image.
    #[arg(long, value_enum)]
    pub content: Option<ContentFlag>,
    /// How much is generated; 2GiB without it.
    #[arg(long, value_name = "SIZE", conflicts_with = "image", value_parser = quantity::<ByteSize>)]
    pub memory: Option<ByteSize>,
    /// Another seed is other content with the same properties.
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "image")]
    pub seed: u64,
    /// How much `write-heavy` content is written each second while it moves; 100MiB/s without it.
    #[arg(long, value_name = "RATE", conflicts_with = "image", value_parser = quantity::<Bandwidth>)]
    pub dirty_rate: Option<Bandwidth>,
    /// Move it to `sealane bench listen` at this address, instead of within this process.
    #[arg(long, value_name = "IP:PORT", requires = "pki", conflicts_with = "link")]
    pub to: Option<SocketAddr>,
    /// Authority with the certificates of the gateways `source` and `destination`.
    #[arg(long, value_name = "DIR", requires = "to")]
    pub pki: Option<PathBuf>,
    /// Parallel connections.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=i64::from(LANES_MAX)))]
    pub lanes: u16,
    /// The link between the gateways.
    #[arg(long, value_enum, default_value_t = BenchLink::Loopback)]
    pub link: BenchLink,
    /// How often the memory is moved; the report is of the median.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// What makes pages smaller.
    #[arg(long, value_name = "auto|none|lz4|zstd[:N]", default_value_t = Compress::Auto)]
    pub compress: Compress,
    /// Compare all memory in the timed runs too, not only in the one that warms up.
    #[arg(long)]
    pub verify: bool,
    /// Print JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Commands of `bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Be the destination of `sealane bench --to`, on this or another host, until Ctrl-C.
    ///
    /// Memory is ready before the source starts its clock. Prints what each arrival cost here.
    Listen(BenchListenFlags),
}

/// Flags of `bench listen`.
#[derive(Debug, Args)]
pub struct BenchListenFlags {
    /// UDP address to listen at; port 0 takes a free one.
    #[arg(long, value_name = "IP:PORT")]
    pub at: SocketAddr,
    /// Authority with the certificates of the gateways `source` and `destination`; made if it is not there.
    ///
    /// The source needs a copy of it, without ca-key.pem. Whoever has it may use this listener.
    #[arg(long, value_name = "DIR")]
    pub pki: PathBuf,
    /// The largest memory that is taken.
    #[arg(long, value_name = "SIZE", default_value = "16GiB", value_parser = quantity::<ByteSize>)]
    pub max_memory: ByteSize,
    /// Print one JSON object a line on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Content of generated memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ContentFlag {
    /// As of a Linux guest: 39 % zero pages, 30 % of the rest copies, the rest text, code, heap and files.
    Realistic,
    /// Every page random.
    Incompressible,
    /// Every page zero.
    Zero,
    /// The same as realistic, and the guest goes on changing its pages a little.
    WriteHeavy,
}

/// The link of a benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchLink {
    /// This machine's loopback interface.
    Loopback,
}

/// Commands of `pki`.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make an authority: a root certificate, its key and an empty revocation list.
    Init {
        /// Where the authority is kept.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// SPIFFE trust domain, e.g. dc1.example.net.
        #[arg(long, value_name = "NAME")]
        trust_domain: String,
    },
    /// Issue a gateway's certificate, key and signing key.
    Issue {
        /// Where the authority is kept.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The gateway; its identity becomes spiffe://TRUST-DOMAIN/gateway/NAME.
        #[arg(long, value_name = "NAME")]
        gateway: PeerName,
        /// The site that it stands in.
        #[arg(long, value_name = "SITE", required_unless_present = "renew", conflicts_with = "renew")]
        site: Option<Label>,
        /// Replace its certificate and key before they end; its name, site and signing key stay.
        #[arg(long)]
        renew: bool,
    },
    /// Revoke a gateway's certificate, and write a new revocation list.
    Revoke {
        /// Where the authority is kept.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The gateway.
        #[arg(value_name = "NAME")]
        gateway: PeerName,
    },
    /// Write a new revocation list before the old one ends.
    RefreshCrl {
        /// Where the authority is kept.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Show what a certificate or revocation list says.
    Show {
        /// A PEM file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// Commands of `policy`.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Validate policies against the schema, and refuse what nobody means.
    ///
    /// Refused are policies that can fail to evaluate, that never match, or that another one makes needless, and words that are
    /// never said. With a configuration, names in policies that it does not have are warned of.
    Check {
        /// Directory of *.cedar files.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Configuration that describes VMs, peers and operators.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Ask the questions of tests.json, and compare the answers.
    Test {
        /// Directory of *.cedar files, with tests.json beside them.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Say which policies permit or forbid a migration, and why.
    ///
    /// Asks what this gateway would ask when the VM leaves for the peer, and when it comes from it, from the raw files;
    /// no gateway has to run. The exit code is 0 when everything asked is permitted in one of the two directions, else 3.
    Explain(PolicyExplainFlags),
    /// Ask the decisions of an audit log again, of two sets of policies, and show those that differ.
    ///
    /// The exit code is 0 when none does, else 1.
    Diff {
        /// Directory of the policies before.
        #[arg(value_name = "OLD")]
        old: PathBuf,
        /// Directory of the policies after.
        #[arg(value_name = "NEW")]
        new: PathBuf,
        /// The audit log's directory.
        #[arg(long, value_name = "DIR")]
        audit: PathBuf,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Make, verify and show signed bundles of policies.
    #[command(subcommand)]
    Bundle(BundleCommand),
}

/// Commands of `policy bundle`.
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Check policies and their tests, and write the manifest that is to be signed.
    ///
    /// Each signer then runs `minisign -S -m DIR/manifest.json -x DIR/manifest.json.NAME.minisig`.
    Make {
        /// Directory with *.cedar files and tests.json, and nothing else.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// What the bundle is called; gateways pin it.
        #[arg(long, value_name = "NAME")]
        name: String,
        /// Its version, higher than every one before.
        #[arg(long, value_name = "N")]
        version: u64,
        /// When it begins to be valid; now without it.
        #[arg(long, value_name = "TIME")]
        not_before: Option<jiff::Timestamp>,
        /// When it is no longer valid, e.g. 2026-12-01T00:00:00Z. From then on gateways permit nothing.
        #[arg(long, value_name = "TIME")]
        expires: jiff::Timestamp,
    },
    /// Say what a gateway would say to a bundle.
    Verify(BundleVerifyFlags),
    /// Show what a bundle says it is, without verifying anything.
    Show {
        /// The bundle.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// Flags of `policy bundle verify`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("pinned").required(true).args(["config", "keys"]))]
pub struct BundleVerifyFlags {
    /// The bundle.
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Configuration with the keys, the threshold, the name, and the state directory, which knows the version in force.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A public key of minisign, as the second line of minisign.pub has it; several are several.
    #[arg(long = "key", value_name = "KEY", requires = "name")]
    pub keys: Vec<String>,
    /// How many of the keys have to have signed; all without it.
    #[arg(long, value_name = "N", requires = "keys")]
    pub threshold: Option<usize>,
    /// What the bundle has to be called.
    #[arg(long, value_name = "NAME", requires = "keys")]
    pub name: Option<String>,
    /// Verify for this time instead of now, e.g. 2026-12-01T23:00:00Z.
    #[arg(long, value_name = "TIME")]
    pub at: Option<jiff::Timestamp>,
    /// Print JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `policy explain`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("question").required(true).args(["request", "vm"]))]
pub struct PolicyExplainFlags {
    /// Directory of *.cedar files.
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// A question in the form of one test of tests.json, without `name` and `expect`, instead of a VM and a peer.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vm", "peer", "operator", "action", "memory", "storage", "disks", "disk_size", "peer_ip", "at"])]
    pub request: Option<PathBuf>,
    /// Configuration that describes VMs, peers and operators.
    #[arg(long, value_name = "FILE", required_unless_present = "request")]
    pub config: Option<PathBuf>,
    /// The VM that would move.
    #[arg(long, value_name = "VM", requires = "peer")]
    pub vm: Option<VmName>,
    /// The peer at the other end.
    #[arg(long, value_name = "PEER", requires = "vm")]
    pub peer: Option<PeerName>,
    /// The operator who would ask.
    #[arg(long, value_name = "NAME")]
    pub operator: Option<Label>,
    /// Which question; all of them without it.
    #[arg(long, value_enum)]
    pub action: Option<PolicyAction>,
    /// The VM's memory, as policies that bound it see it.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = quantity::<ByteSize>)]
    pub memory: ByteSize,
    /// Which disks would move.
    #[arg(long, value_enum, default_value_t = StorageAsked::None)]
    pub storage: StorageAsked,
    /// How many disks.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub disks: u32,
    /// How long they are together.
    #[arg(long, value_name = "SIZE", default_value = "0MiB", value_parser = quantity::<ByteSize>)]
    pub disk_size: ByteSize,
    /// The peer's IP address, where the configuration has a name.
    #[arg(long, value_name = "IP")]
    pub peer_ip: Option<std::net::IpAddr>,
    /// Ask for this time instead of now, e.g. 2026-12-01T23:00:00Z.
    #[arg(long, value_name = "TIME")]
    pub at: Option<jiff::Timestamp>,
    /// Print JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Disks that policy is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageAsked {
    /// None.
    None,
    /// All that the VM can write to.
    All,
    /// The same, and the VM stays.
    Only,
}

/// A question to policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyAction {
    /// May the operator ask for it?
    Request,
    /// May the peer have the VM?
    Release,
    /// May the peer give the VM?
    Accept,
    /// May the switch happen?
    Commit,
}

/// Which entries of an audit log.
#[derive(Debug, Args)]
pub struct AuditFilterFlags {
    /// Only entries of this VM.
    #[arg(long, value_name = "VM")]
    pub vm: Option<VmName>,
    /// Only entries about this peer, as recorded, e.g. spiffe://dc2.example.net/gateway/gw-b.
    #[arg(long, value_name = "PEER")]
    pub peer: Option<String>,
    /// Only entries of this migration.
    #[arg(long, value_name = "ID")]
    pub migration: Option<MigrationId>,
    /// Only entries of this kind, e.g. decision.
    #[arg(long, value_name = "EVENT")]
    pub event: Option<Event>,
    /// Only entries of this time or later, e.g. 2026-12-01T23:00:00Z.
    #[arg(long, value_name = "TIME")]
    pub since: Option<jiff::Timestamp>,
    /// Only entries before this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<jiff::Timestamp>,
    /// Only entries with this outcome: done, allow, deny, refused, failed, cancelled or in-doubt.
    #[arg(long, value_name = "OUTCOME")]
    pub outcome: Option<Outcome>,
}

/// A form to export an audit log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AuditFormat {
    /// OCSF 1.9.0, one JSON object a line.
    Ocsf,
    /// Syslog, RFC 5424.
    Syslog,
    /// The journal export format of systemd.
    Journal,
}

/// Commands of `audit`.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Print the entries of an audit log.
    Show {
        /// The log's directory.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Only the last N entries.
        #[arg(long, value_name = "N")]
        last: Option<usize>,
        /// Which entries.
        #[command(flatten)]
        filter: AuditFilterFlags,
        /// Print the entries as they are in the file.
        #[arg(long)]
        json: bool,
    },
    /// Recompute an audit log from its files and check every signature.
    ///
    /// Four verdicts: content (every entry as written, in tree and tiles), signer (every commit), completeness (nothing is missing at
    /// the end) and witnesses (peers have seen it). Says the first entry that was changed, removed or added.
    Verify {
        /// The log's directory.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// A checkpoint kept elsewhere, that the log must extend.
        #[arg(long, value_name = "FILE")]
        checkpoint: Option<PathBuf>,
        /// Public key of the gateway that wrote the log.
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Public key of a peer that must have cosigned the log. May be given more than once.
        #[arg(long, value_name = "FILE")]
        peer_key: Vec<PathBuf>,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Print a proof that an entry is in an audit log (C2SP tlog-proof).
    Prove {
        /// The log's directory.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The entry's index.
        #[arg(value_name = "INDEX")]
        index: u64,
    },
    /// Check a proof of one entry, such as those that a log keeps of its peers in `proofs/`.
    VerifyProof {
        /// The proof.
        #[arg(value_name = "FILE")]
        proof: PathBuf,
        /// Public key of the gateway that wrote the log.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Public key of a gateway that must have cosigned it. May be given more than once.
        #[arg(long, value_name = "FILE")]
        peer_key: Vec<PathBuf>,
        /// Print JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Hand an audit log over to another signing key; its gateway must not run.
    RotateKey {
        /// The log's directory.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The private key that signs it now, NAME-signing-key.pem.
        #[arg(long, value_name = "FILE")]
        old_key: PathBuf,
        /// The private key that is to sign it from now on.
        #[arg(long, value_name = "FILE")]
        new_key: PathBuf,
    },
    /// Print the entries of an audit log in the form of a collector.
    Export {
        /// The log's directory.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Which form.
        #[arg(long, value_enum)]
        format: AuditFormat,
        /// Send each entry to this socket, e.g. `/dev/log`, `/run/systemd/journal/socket` or `udp:127.0.0.1:514`.
        #[arg(long, value_name = "SOCKET")]
        to: Option<String>,
        /// Which entries.
        #[command(flatten)]
        filter: AuditFilterFlags,
    },
}

/// Commands of `vmm`.
#[derive(Debug, Subcommand)]
pub enum VmmCommand {
    /// Run one VM in this process, and serve the attach protocol.
    ///
    /// A gateway attaches to it over the socket. The guest goes on running when the gateway ends.
    Run(VmmRunFlags),
}

/// Flags of `vmm run`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("boot").required(true).args(["kernel", "payload", "incoming"]))]
pub struct VmmRunFlags {
    /// The guest's memory; what arrives decides it for `--incoming`.
    #[arg(long, value_name = "SIZE", required_unless_present = "incoming", conflicts_with = "incoming", value_parser = quantity::<ByteSize>)]
    pub memory: Option<ByteSize>,
    /// The guest's vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(VCPUS_MAX)))]
    pub vcpus: u32,
    /// Boot a Linux bzImage, an ELF kernel with a PVH entry, or a flat binary.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub cmdline: Option<String>,
    /// Run a built-in guest.
    #[arg(long, value_enum)]
    pub payload: Option<Payload>,
    /// Memory that the built-in guest keeps writing.
    #[arg(long, value_name = "SIZE", requires = "payload", value_parser = quantity::<ByteSize>)]
    pub working_set: Option<ByteSize>,
    /// How fast the built-in guest writes, e.g. 100MiB/s; as fast as it can without it.
    #[arg(long, value_name = "RATE", requires = "payload", value_parser = quantity::<Bandwidth>)]
    pub dirty_rate: Option<Bandwidth>,
    /// Be an empty VM, that waits for memory and state of another host.
    #[arg(long)]
    pub incoming: bool,
    /// The VM's UUID; a random one without it.
    #[arg(long)]
    pub uuid: Option<VmUuid>,
    /// Where the attach protocol is served.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Pages behind the guest's memory.
    #[arg(long, value_enum, default_value_t = HugepagesFlag::Advise)]
    pub hugepages: HugepagesFlag,
    /// Append the serial console to this file, instead of stdout.
    #[arg(long, value_name = "FILE")]
    pub serial: Option<PathBuf>,
    /// With --incoming: take a guest of more memory than this host has available, because it has touched little of it.
    #[arg(long)]
    pub overcommit: bool,
}

/// A built-in guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Payload {
    /// A KVM guest that keeps writing memory on every vCPU, checks it, and prints numbered heartbeats.
    Heartbeat,
    /// The same by threads of the VMM, where there is no KVM.
    Synthetic,
}

/// Pages behind the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HugepagesFlag {
    /// Small pages.
    Off,
    /// Huge pages where the host allows them for shared memory.
    Advise,
    /// Huge pages that the administrator reserved, or nothing.
    Reserved,
}
