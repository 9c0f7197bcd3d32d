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

/// LIMIT: policy files of one gateway; one per tenant for the largest hosts.
pub const POLICY_FILES_MAX: usize = 1024;
/// LIMIT: text of all policy files together, or of one `tests.json`.
pub const POLICY_BYTES_MAX: usize = 4 << 20;
/// LIMIT: brackets inside each other in one policy. Cedar's parser takes up to 56 KiB of stack for each in a debug build, of
/// the 2 MiB of a worker thread.
pub const POLICY_NESTING_MAX: usize = 20;
/// LIMIT: depth of one policy's syntax tree. Cedar's validator takes up to 33 KiB of stack for each in a debug build, its
/// evaluator 60 KiB; the test `the_deepest_policies_do_not_exhaust_a_worker_s_stack`
/// holds both values.
pub const POLICY_DEPTH_MAX: usize = 24;
/// LIMIT: an `@id` is a name in audit entries and messages.
pub const POLICY_ID_BYTES_MAX: usize = 64;
/// LIMIT: gateways, operators and VMs known to policy.
pub const POLICY_ENTITIES_MAX: usize = 100_000;
/// LIMIT: an operator's name: `uid:` and a number, or an OIDC subject (255 bytes by its standard).
pub const OPERATOR_ID_BYTES_MAX: usize = 255;

/// LIMIT: one audit line; a decision with a hundred policy ids takes 8 KiB.
pub const AUDIT_LINE_BYTES_MAX: usize = 16 * 1024;
/// LIMIT: levels of objects and lists in an audit line.
pub const AUDIT_DETAIL_DEPTH_MAX: usize = 8;
/// LIMIT: entries that wait for one fsync; callers beyond it wait for the commit before.
pub const AUDIT_BATCH_ENTRIES_MAX: usize = 256;
/// LIMIT: bytes of one commit, and so the most that a crash leaves unsigned.
pub const AUDIT_BATCH_BYTES_MAX: usize = AUDIT_BATCH_ENTRIES_MAX * AUDIT_LINE_BYTES_MAX;
/// LIMIT: a segment grows to this and one commit; small enough to copy, large enough for 100 000 entries.
pub const AUDIT_SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// LIMIT: segments of one log: 4 TiB.
pub const AUDIT_SEGMENTS_MAX: usize = 65_536;
/// LIMIT: space kept for the entries of a handoff in flight when the disk fills: about 2 000 of them.
pub const AUDIT_RESERVE_BYTES: u64 = 1 << 20;
/// LIMIT: a log's name: `sealane/`, a trust domain (255), a gateway.
pub const AUDIT_ORIGIN_BYTES_MAX: usize = 512;
/// LIMIT: a signed head: origin, size, root, key name, signature.
pub const AUDIT_CHECKPOINT_BYTES_MAX: usize = 4 * 1024;
/// LIMIT: peers whose heads are kept in memory.
pub const AUDIT_PEERS_MAX: usize = 4096;
/// LIMIT: crashes in a row before the first entry after them.
pub const AUDIT_DROPPED_MAX: usize = 1000;

// --- identity and transport ---------------------------------------------------------------------

// --- attach protocol and reference VMM ----------------------------------------------------------

/// LIMIT: vCPUs of the reference VMM.
pub const VCPUS_MAX: u32 = 8;

// --- configuration, control, journal ------------------------------------------------------------

const _: () = assert!(MACHINE_BYTES_MAX + 64 * 1024 < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(STATE_CHUNK_BYTES_MAX < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > 64 * crate::types::PAGE_BYTES);
const _: () = assert!(2 * AUDIT_CHECKPOINT_BYTES_MAX + 1024 < AUDIT_LINE_BYTES_MAX);
