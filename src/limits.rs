//! Every bound in one place, with its reason. A number that limits anything from outside lives here.
//!
//! `LIMIT:` says why the value; compile-time assertions at the end hold the relations.

// --- names and identities -----------------------------------------------------------------------

/// LIMIT: a VM or peer name fits a DNS label, a file name and a log line.
pub const NAME_BYTES_MAX: usize = 63;
/// LIMIT: SPIFFE-ID standard section 2.3: implementations must support, and may stop at, 2048 bytes.
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;

// --- guest memory -------------------------------------------------------------------------------

/// LIMIT: regions of guest RAM; a PC has two or three, NUMA guests a few per node.
pub const RAM_REGIONS_MAX: usize = 64;
/// LIMIT: 64 TiB of guest RAM, four times the largest guests sold; keeps page numbers below 2^34.
pub const RAM_BYTES_MAX: u64 = 1 << 46;
/// LIMIT: 2 MiB of consecutive pages stay on one lane: long runs for scanning and batching, short
/// enough that a 64 MiB guest still fills eight lanes.
pub const STRIPE_PAGES: u64 = 512;

// --- wire ---------------------------------------------------------------------------------------

/// LIMIT: lanes of one migration; more than cores only adds contexts.
pub const LANES_MAX: u16 = 16;
/// LIMIT: one page frame's body: 64 raw pages and their record headers, with room to spare.
pub const FRAME_BODY_BYTES_MAX: usize = 512 * 1024;
/// LIMIT: one control message; the largest is a machine description.
pub const CONTROL_BODY_BYTES_MAX: usize = 1 << 20;
/// LIMIT: reason texts from a peer, shown to people as the peer's claim.
pub const REASON_BYTES_MAX: usize = 512;
/// LIMIT: a machine description (CPUID leaves, MSR indices, devices) inside an offer.
pub const MACHINE_BYTES_MAX: usize = 256 * 1024;
/// LIMIT: device state of a VM: 8 vCPUs take under 64 KiB; the rest is room for larger VMMs.
pub const STATE_BYTES_MAX: usize = 64 << 20;
/// LIMIT: one chunk of device state inside a control message.
pub const STATE_CHUNK_BYTES_MAX: usize = 512 * 1024;

// --- policy and audit ---------------------------------------------------------------------------

// --- identity and transport ---------------------------------------------------------------------

// --- attach protocol and reference VMM ----------------------------------------------------------

/// LIMIT: vCPUs of the reference VMM.
pub const VCPUS_MAX: u32 = 8;

// --- configuration, control, journal ------------------------------------------------------------

/// LIMIT: the configuration file; ten thousand VMs take under 4 MiB.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// LIMIT: problems shown for one configuration file; more than this is another kind of file.
pub const CONFIG_PROBLEMS_MAX: usize = 200;
/// LIMIT: a Unix socket's path; `sun_path` is 108 bytes with the closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// LIMIT: concurrent migrations of one gateway; each holds lanes, threads and a guest's mapping.
pub const MIGRATIONS_MAX: u32 = 64;
/// LIMIT: a request to the control API; all of them are a few short values.
pub const CONTROL_REQUEST_BYTES_MAX: usize = 64 * 1024;
/// LIMIT: an answer of the control API; the largest lists ten thousand VMs.
pub const CONTROL_RESPONSE_BYTES_MAX: usize = 16 << 20;
/// LIMIT: one line of an event stream; the largest is a report.
pub const CONTROL_EVENT_BYTES_MAX: usize = 256 * 1024;
/// LIMIT: one journal record; handoff records are under 1 KiB, placement records under 64 KiB.
pub const JOURNAL_RECORD_BYTES_MAX: usize = 256 * 1024;
/// LIMIT: finished reports that a gateway can be told to keep; about 2 KiB each, and all fit one answer.
pub const HISTORY_COUNT_MAX: u32 = 5_000;

const _: () = assert!(MACHINE_BYTES_MAX + 64 * 1024 < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(STATE_CHUNK_BYTES_MAX < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > 64 * crate::types::PAGE_BYTES);
const _: () = assert!(CONTROL_EVENT_BYTES_MAX <= CONTROL_RESPONSE_BYTES_MAX);
const _: () = assert!(HISTORY_COUNT_MAX as usize * 3 * 1024 <= CONTROL_RESPONSE_BYTES_MAX);
