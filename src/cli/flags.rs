//! Every command and flag: one definition each. Doc comments are the help texts.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::tools::{AuditCommand, BenchFlags, DemoFlags, PkiCommand, PolicyCommand, VmmCommand};
use crate::config::{Bandwidth, InvalidQuantity, TimeSpan};
use crate::control::Compress;
use crate::types::{PeerName, Verify, VmName};

/// Live-migrates virtual machines between hosts and sites through authenticated, policy-checked tunnels.
///
/// A gateway runs at each end; commands talk to the local one over its Unix socket. `sealane demo` shows a whole
/// migration on this machine without any set-up.
///
/// Data goes to stdout, everything else to stderr; --json prints one versioned object. Bandwidths, sizes and
/// durations always have a unit. Exit codes: 0 done · 1 failed, the VM still runs on the source · 2 usage or
/// configuration · 3 denied by policy or unauthenticated · 4 peer unreachable or incompatible · 5 cancelled ·
/// 6 outcome unknown, an operator must decide · 7 timed out.
///
/// Environment: SEALANE_CONFIG and SEALANE_SOCKET stand in for --config and --socket, SEALANE_LOG filters logs (e.g. `debug`),
/// NO_COLOR turns colours off.
#[derive(Debug, Parser)]
#[command(name = "sealane", version, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Migrate a running guest between two gateways on this machine.
    ///
    /// Makes a throw-away certificate authority, starts two gateways on 127.0.0.1, starts a guest that checks its own memory,
    /// moves it while it runs, and verifies memory, state and both audit logs. Needs nothing but /dev/kvm, and not even that.
    Demo(DemoFlags),
    /// Run the gateway.
    ///
    /// Runs in the foreground and logs to stderr. SIGHUP reloads certificates, revocation lists and policies; SIGTERM
    /// finishes or cleanly aborts what is under way.
    Gateway(GatewayFlags),
    /// Start VMMs for a gateway; it starts this itself.
    #[command(hide = true)]
    Launcher,
    /// Hold a private key for a gateway; it starts this itself.
    #[command(hide = true)]
    KeyHolder {
        /// Which one, for whoever looks at processes.
        key: String,
    },
    /// Move a VM to a peer.
    ///
    /// Shows progress until the VM runs there, and prints a report. Ctrl-C cancels with the VM running on the source; a
    /// second Ctrl-C leaves the migration alone, and exits with 6 because its end was not seen. Values that are not given are the configuration's.
    ///
    /// A gateway has so many departures under way at once (`[migration] parallel`). More wait in its queue, first come, first
    /// served; `status` and `watch` show them in the phase `queued`, and `cancel` takes one out. A destination that has no room is
    /// waited for in the same queue.
    Migrate(MigrateFlags),
    /// Say what a migration would do, without doing it.
    ///
    /// Makes every check that can be made beforehand, on both sides, and estimates how long it takes.
    Plan(MigrationFlags),
    /// Copy disks ahead of a migration.
    #[command(subcommand)]
    Storage(StorageCommand),
    /// List this gateway's VMs and where they run.
    Vms(DaemonFlags),
    /// List peers, and whether they can be reached.
    Peers(DaemonFlags),
    /// Show the gateway and its migrations, or one migration.
    Status(OptionalIdFlags),
    /// Follow a migration to its end.
    ///
    /// The exit code is the migration's. With --json every event is one line.
    Watch(IdFlags),
    /// List finished migrations.
    History(DaemonFlags),
    /// Stop a migration; the VM goes on running on the source.
    ///
    /// After the switch it is too late, and the command says so.
    Cancel(IdFlags),
    /// Decide what becomes of a VM in doubt.
    ///
    /// A VM is in doubt when the other gateway was given it, or has offered it, and cannot be asked any more. Without flags this lists
    /// VMs in doubt, what the journal says of each, and what is possible. One operator proposes, another one approves, and policy
    /// (`resolveInDoubt`) says whether that is enough. Until then the gateway goes on asking the other one, and if that answers
    /// first, its answer counts.
    ///
    /// For example: sealane resolve web-1 --reclaim --evidence "power of host-b is off, CHG-7", and then, as somebody else,
    /// sealane resolve web-1 --approve
    Resolve(ResolveFlags),
    /// Change a migration under way.
    ///
    /// For example: sealane set 5f3a bandwidth=1Gbit max-downtime=500ms
    Set(SetFlags),
    /// Have the gateway read its certificates, CRLs and policies again.
    ///
    /// All of them or none: if one is not good, what was in force stays in force, and the command says why. SIGHUP does the same,
    /// and so does a change of their files unless `watch_files = false`. A migration whose peer is not admitted any more ends, with
    /// the VM running on the source, unless the VM was given away already.
    Reload(DaemonFlags),
    /// Make and revoke certificates for gateways.
    ///
    /// A small authority for those who have none. Certificates of any authority will do that have one SPIFFE ID.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Check, test and explain policies.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Read and verify audit logs.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// The reference virtual machine monitor.
    #[command(subcommand)]
    Vmm(VmmCommand),
    /// Measure migrations of a memory image, or of generated memory.
    ///
    /// Moves a file or generated content, taken as the RAM of a stopped VM, between two gateways: both in this process, or one
    /// here and the other in `sealane bench listen`, on this host or another one.
    ///
    /// For example: sealane bench --content realistic --memory 2GiB --compress lz4
    Bench(BenchFlags),
    /// Look for what this host lacks or loses.
    ///
    /// Says for each thing whether it works, what is lost without it, and what to do.
    Doctor(DoctorFlags),
    /// Check a configuration file.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a completion script for a shell.
    ///
    /// For example: sealane completion bash > /usr/share/bash-completion/completions/sealane
    Completion(CompletionFlags),
    /// Write manual pages into a directory.
    Man(ManFlags),
    /// List the failpoints of this build.
    #[cfg(feature = "failpoints")]
    #[command(hide = true)]
    Failpoints,
}

/// How to find the gateway, and how to print.
#[derive(Debug, Clone, Args)]
pub struct DaemonFlags {
    /// Unix socket of the gateway.
    ///
    /// Default: $SEALANE_SOCKET, else `gateway.control_socket` of the configuration, else /run/sealane/api.sock.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub socket: Option<PathBuf>,
    /// Configuration that names the gateway's socket.
    ///
    /// Default: $SEALANE_CONFIG, else /etc/sealane/gateway.toml where it can be read.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `gateway`.
#[derive(Debug, Args)]
pub struct GatewayFlags {
    /// Its configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Log JSON lines.
    #[arg(long)]
    pub log_json: bool,
}

/// What is moved, where to, and how.
#[derive(Debug, Args)]
pub struct MigrationFlags {
    /// The VM to move.
    #[arg(value_name = "VM")]
    pub vm: VmName,
    /// The peer to move it to, as the configuration names it.
    #[arg(long, value_name = "PEER")]
    pub to: PeerName,
    /// Most that goes over the wire, e.g. 1Gbit or 10MiB/s.
    ///
    /// A limit for all departures of the gateway together is in its configuration; both hold.
    #[arg(long, value_parser = quantity::<Bandwidth>)]
    pub bandwidth: Option<Bandwidth>,
    /// Longest pause wanted, e.g. 300ms.
    ///
    /// The switch is made when the pause is expected to be at most this.
    #[arg(long, value_name = "DURATION", value_parser = quantity::<TimeSpan>)]
    pub max_downtime: Option<TimeSpan>,
    /// Longest migration, e.g. 1h; after it the VM stays on the source.
    ///
    /// It counts from when the migration leaves the gateway's queue; a destination that has no room yet is waited for within it.
    #[arg(long, value_name = "DURATION", value_parser = quantity::<TimeSpan>)]
    pub timeout: Option<TimeSpan>,
    /// Longest outage of the link that is waited out, e.g. 10m.
    ///
    /// A migration whose link is away pauses and goes on where it was. After this time the VM stays on the source; if the
    /// destination was given it already, the outcome is unknown until the two gateways meet again.
    #[arg(long, value_name = "DURATION", value_parser = quantity::<TimeSpan>)]
    pub max_outage: Option<TimeSpan>,
    /// How memory moves.
    #[arg(long, value_enum, default_value_t = ModeFlag::Precopy)]
    pub mode: ModeFlag,
    /// Which disks move too.
    ///
    /// Of a QEMU's guest, `all` copies every disk that it can write to while it runs, through the same tunnel, into what the
    /// destination's `[[vm.disk]]` and template say: another file, another format. `none` is for disks that both hosts share.
    #[arg(long, value_enum, default_value_t = StorageFlag::None)]
    pub storage: StorageFlag,
    /// Compare what the disks hold on both sides in the pause; with `--storage all`.
    ///
    /// Both sides read every disk while the guest stands still: a few seconds for each GiB, and less for holes.
    #[arg(long)]
    pub verify_disks: bool,
    /// Compare all memory and state on both sides before the switch.
    ///
    /// Memory is read ahead, and again where the guest's dirty log says that it changed. `full` reads all of it in the pause, which
    /// finds what the dirty log has missed and takes about 0.15 s for each GiB.
    #[arg(long, value_name = "yes|no|full", value_parser = verify, num_args = 0..=1, default_missing_value = "yes", require_equals = true)]
    pub verify: Option<Verify>,
    /// Slow the guest down if it dirties memory faster than it can be sent.
    #[arg(long)]
    pub throttle: bool,
    /// What makes pages smaller: `auto` finds out by itself what gets them there soonest.
    #[arg(long, value_name = "auto|none|lz4|zstd[:N]")]
    pub compress: Option<Compress>,
    /// Parallel connections.
    ///
    /// Without it: one for every 256 MiB of the VM's memory, at most the number in the gateway's configuration.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(crate::limits::LANES_MAX)))]
    pub lanes: Option<u16>,
    /// Channels on which a QEMU hands its guest's pages to this gateway.
    ///
    /// With 1 they are in QEMU's one stream; with more, QEMU reads memory with so many threads (`multifd`). The other end sees no
    /// difference. Without it: the number in the gateway's configuration. Not with `--mode postcopy` or `hybrid`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(crate::limits::QEMU_CHANNELS_MAX)))]
    pub channels: Option<u16>,
    /// The gateway to ask.
    #[command(flatten)]
    pub daemon: DaemonFlags,
}

/// Commands of `storage`.
#[derive(Debug, Subcommand)]
pub enum StorageCommand {
    /// Copy the disks of a running VM to a peer, and leave the VM where it is.
    ///
    /// Of a QEMU's guest, every disk that it can write to is copied as with `migrate --storage all`, until both ends were equal for a
    /// moment. The guest runs on here and is never paused. The destination keeps the copy beside the disk's place for its
    /// `[migration] keep_disks`; `sealane migrate --storage all` within that time compares it block by block, and sends only what differs.
    ///
    /// Both gateways ask their policies, as for a migration. With exit code 0 the disks are there, and the VM runs here.
    Migrate(StorageMigrateFlags),
}

/// Flags of `storage migrate`.
#[derive(Debug, Args)]
pub struct StorageMigrateFlags {
    /// The VM whose disks are copied.
    #[arg(value_name = "VM")]
    pub vm: VmName,
    /// The peer to copy them to, as the configuration names it.
    #[arg(long, value_name = "PEER")]
    pub to: PeerName,
    /// Most that goes over the wire, e.g. 1Gbit or 10MiB/s.
    #[arg(long, value_parser = quantity::<Bandwidth>)]
    pub bandwidth: Option<Bandwidth>,
    /// Longest that it may take, e.g. 1h; what has come until then is kept.
    #[arg(long, value_name = "DURATION", value_parser = quantity::<TimeSpan>)]
    pub timeout: Option<TimeSpan>,
    /// Longest outage of the link that is waited out, e.g. 10m.
    #[arg(long, value_name = "DURATION", value_parser = quantity::<TimeSpan>)]
    pub max_outage: Option<TimeSpan>,
    /// What makes what is written smaller.
    #[arg(long, value_name = "auto|none|lz4|zstd[:N]")]
    pub compress: Option<Compress>,
    /// Only say what would happen, like `plan`.
    #[arg(long, conflicts_with = "detach")]
    pub dry_run: bool,
    /// Start it, print its id and return.
    #[arg(long)]
    pub detach: bool,
    /// The gateway to ask.
    #[command(flatten)]
    pub daemon: DaemonFlags,
}

/// Flags of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateFlags {
    /// What is moved, where to, and how.
    #[command(flatten)]
    pub migration: MigrationFlags,
    /// Only say what would happen, like `plan`.
    #[arg(long, conflicts_with = "detach")]
    pub dry_run: bool,
    /// Start it, print its id and return.
    #[arg(long)]
    pub detach: bool,
}

/// How memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeFlag {
    /// All of it before the switch.
    Precopy,
    /// What a running guest does not need goes behind the switch, and what it needs first. Of a QEMU's guest, from QEMU 10.0 on, whose
    /// owner permits it (`postcopy_ok`): while pages are missing, the guest depends on both hosts and both gateways.
    Postcopy,
    /// As `precopy`, but a guest that does not get there in two passes, or in half of the time, is switched as with `postcopy`.
    Hybrid,
}

/// Which disks move with a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageFlag {
    /// None: they are shared, or there are none.
    #[value(alias = "shared")]
    None,
    /// All that the guest can write to.
    All,
}

/// A migration, by the beginning of its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdPrefix(pub String);

impl FromStr for IdPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if (4..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit()) {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err("expected a migration id, or at least its first 4 hexadecimal digits".to_owned())
        }
    }
}

/// Flags of commands about one migration.
#[derive(Debug, Args)]
pub struct IdFlags {
    /// The migration's id, or its first digits.
    pub id: IdPrefix,
    /// The gateway to ask.
    #[command(flatten)]
    pub daemon: DaemonFlags,
}

/// Flags of `status`.
#[derive(Debug, Args)]
pub struct OptionalIdFlags {
    /// A migration's id, or its first digits.
    pub id: Option<IdPrefix>,
    /// The gateway to ask.
    #[command(flatten)]
    pub daemon: DaemonFlags,
}

/// Flags of `resolve`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("step").args(["reclaim", "restart", "release", "refuse", "approve", "withdraw"]).requires("what")))]
pub struct ResolveFlags {
    /// The VM, or the migration's id or its first digits.
    #[arg(value_name = "ID|VM")]
    pub what: Option<VmName>,
    /// Propose, at the source: the other host is off for good and never ran the VM; the paused copy here goes on.
    #[arg(long)]
    pub reclaim: bool,
    /// Propose: the other host is off for good and may have run the VM; it is started here from its disks.
    #[arg(long)]
    pub restart: bool,
    /// Propose, at the source: the destination has the VM; the copy here is thrown away.
    #[arg(long)]
    pub release: bool,
    /// Propose, at the destination: it will never run the VM, and the source is free to go on.
    #[arg(long)]
    pub refuse: bool,
    /// What shows that the other host cannot run the VM; only --refuse does without.
    #[arg(long, value_name = "TEXT", requires = "step", conflicts_with_all = ["approve", "withdraw"])]
    pub evidence: Option<String>,
    /// Approve what another operator has proposed, and so decide.
    #[arg(long)]
    pub approve: bool,
    /// Take the proposal back.
    #[arg(long)]
    pub withdraw: bool,
    /// The gateway to ask.
    #[command(flatten)]
    pub daemon: DaemonFlags,
}

/// Flags of `set`.
#[derive(Debug, Args)]
pub struct SetFlags {
    /// The migration's id, or its first digits.
    pub id: IdPrefix,
    /// What to change: bandwidth=BANDWIDTH, max-downtime=DURATION.
    #[arg(value_name = "KEY=VALUE", required = true, value_parser = change)]
    pub changes: Vec<Change>,
    /// The gateway to ask.
    #[command(flatten)]
    pub daemon: DaemonFlags,
}

/// One change to a migration under way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change {
    /// `bandwidth=1Gbit`.
    Bandwidth(Bandwidth),
    /// `max-downtime=300ms`.
    MaxDowntime(TimeSpan),
}

/// Flags of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorFlags {
    /// Configuration to check as well.
    ///
    /// Default: $SEALANE_CONFIG, else /etc/sealane/gateway.toml where there is one.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Commands of `config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// List everything that is wrong with a file, or every value in effect and where it comes from.
    Check(ConfigCheckFlags),
}

/// Flags of `config check`.
#[derive(Debug, Args)]
pub struct ConfigCheckFlags {
    /// The configuration.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Do not look at the certificates, keys and policies that it names.
    #[arg(long)]
    pub text_only: bool,
    /// Print JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `completion`.
#[derive(Debug, Args)]
pub struct CompletionFlags {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Flags of `man`.
#[derive(Debug, Args)]
pub struct ManFlags {
    /// Where the pages go; it is made if it is not there.
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// Reads a quantity; the advice for a bare number is part of the message.
pub(super) fn quantity<T: FromStr<Err = InvalidQuantity>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: InvalidQuantity| match error.hint {
        Some(hint) => format!("expected {}\nhint: {hint}", error.expected),
        None => format!("expected {}", error.expected),
    })
}

fn verify(text: &str) -> Result<Verify, String> {
    text.parse().map_err(|expected| format!("expected {expected}"))
}

fn change(text: &str) -> Result<Change, String> {
    match text.split_once('=') {
        Some(("bandwidth", value)) => quantity(value).map(Change::Bandwidth),
        Some(("max-downtime", value)) => quantity(value).map(Change::MaxDowntime),
        _ => Err("expected bandwidth=BANDWIDTH or max-downtime=DURATION".to_owned()),
    }
}
