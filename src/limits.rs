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
/// LIMIT: CPUID leaves of a vCPU; KVM itself accepts no more.
pub const CPUID_LEAVES_MAX: usize = 256;
/// LIMIT: MSRs of a vCPU; kernels list about 120, and KVM's header allows 256 in one request.
pub const MSRS_MAX: usize = 1024;
/// LIMIT: XSAVE area of a vCPU: 2.7 KiB with AVX-512, 11 KiB with AMX.
pub const XSAVE_BYTES_MAX: usize = 64 * 1024;
/// LIMIT: capability and device names in a machine's profile.
pub const MACHINE_NAMES_MAX: usize = 64;
/// LIMIT: what the 16550 keeps of received bytes.
pub const SERIAL_FIFO_BYTES_MAX: usize = 64;
/// LIMIT: one console line; a longer one is cut into several.
pub const CONSOLE_LINE_BYTES_MAX: usize = 1024;
/// LIMIT: console output kept in memory.
pub const CONSOLE_BUFFER_BYTES_MAX: usize = 1 << 20;
/// LIMIT: console lines that wait for a slow reader of standard output; more are dropped.
pub const CONSOLE_QUEUE_LINES_MAX: usize = 1024;
/// LIMIT: the smallest dirty ring that KVM accepts is a little over its reserve of 576 entries.
pub const DIRTY_RING_ENTRIES_MIN: u32 = 1024;
/// LIMIT: a vCPU that writes 500,000 pages a second fills 2,500 entries of its ring in between.
pub const DIRTY_RING_PERIOD: std::time::Duration = std::time::Duration::from_millis(5);
/// LIMIT: x86 Linux reads at most 2048 bytes of command line.
pub const KERNEL_CMDLINE_BYTES_MAX: usize = 2048;
/// LIMIT: a vCPU leaves the guest within microseconds; this is for hosts that are badly overloaded.
pub const PARK_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// LIMIT: throttled guests keep a hundredth of their time, or they look dead.
pub const THROTTLE_PERCENT_MAX: u8 = 99;
/// LIMIT: short against network time-outs of a guest, long against the cost of stopping its vCPUs.
pub const THROTTLE_PERIOD: std::time::Duration = std::time::Duration::from_millis(40);

// --- configuration, control, journal ------------------------------------------------------------

const _: () = assert!(MACHINE_BYTES_MAX + 64 * 1024 < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(STATE_CHUNK_BYTES_MAX < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > 64 * crate::types::PAGE_BYTES);
