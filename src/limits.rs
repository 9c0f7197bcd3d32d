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
/// LIMIT: pages that one frame names: 256 MiB of zeroes in nine bytes is as much work as a frame may ask for.
pub const FRAME_PAGES_MAX: u64 = 1 << 16;
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
/// LIMIT: features that one side names in its greeting.
pub const FEATURES_MAX: usize = 64;
/// LIMIT: the name of one feature.
pub const FEATURE_NAME_BYTES_MAX: usize = 32;
/// LIMIT: the name of a driver family in an offer.
pub const HYPERVISOR_NAME_BYTES_MAX: usize = 32;
/// LIMIT: a signed checkpoint is an origin, three short lines and a few signature lines.
pub const CHECKPOINT_BYTES_MAX: usize = 4096;
/// LIMIT: pages that one block of a codec holds; 256 KiB, beyond which ratios gain 5 % and cache misses more.
pub const BATCH_PAGES_MAX: usize = 64;

// --- policy and audit ---------------------------------------------------------------------------

// --- identity and transport ---------------------------------------------------------------------

/// LIMIT: a leaf and the six intermediates that path building may use.
pub const CHAIN_CERTIFICATES_MAX: usize = 7;
/// LIMIT: one PEM file of keys or certificates; a bundle of 32 RSA-4096 roots is under 100 KiB.
pub const PEM_FILE_BYTES_MAX: u64 = 1 << 20;
/// LIMIT: one CRL file; 200,000 revoked certificates at 40 bytes each, far beyond any fleet of gateways.
pub const CRL_FILE_BYTES_MAX: u64 = 8 << 20;
/// LIMIT: roots of one trust domain; two during a roll-over, the rest is room.
pub const ROOTS_PER_DOMAIN_MAX: usize = 32;
/// LIMIT: CRLs of one trust domain: one for each issuer.
pub const CRLS_PER_DOMAIN_MAX: usize = 64;
/// LIMIT: trust domains that one gateway federates with.
pub const TRUST_DOMAINS_MAX: usize = 256;
/// LIMIT: refused peers remembered until they are drained into the audit log; a flood beyond it is counted.
pub const REFUSALS_KEPT_MAX: usize = 256;

/// LIMIT: UDP payload of a lane: ten segments of one send stay below the 64 KiB of a GSO send; above 6550 every such send fails.
pub const DATAGRAM_BYTES_MAX: u16 = 6500;
/// LIMIT: handshakes going on at once from proven addresses, on each socket; each costs a signature and some kilobytes.
pub const HALF_OPEN_MAX: usize = 256;
/// LIMIT: handshakes going on from unproven addresses, on each socket; the next one has to prove its address first.
pub const HALF_OPEN_BEFORE_RETRY: usize = 64;
/// LIMIT: handshakes going on from one proven address, which may be a NAT for many gateways.
pub const HALF_OPEN_PER_ADDRESS_MAX: usize = 32;
/// LIMIT: sessions at once; a gateway has tens of peers.
pub const SESSIONS_MAX: usize = 256;
/// LIMIT: admitted sessions and refusals that wait to be taken by the gateway.
pub const ACCEPT_QUEUE_MAX: usize = 64;
/// LIMIT: connection attempts that QUIC holds before we look at them.
pub const INCOMING_MAX: usize = 1024;
/// LIMIT: datagrams held for one such attempt; a hello with a hybrid key share takes two.
pub const INCOMING_BUFFER_BYTES: u64 = 64 * 1024;
/// LIMIT: datagrams held for all such attempts.
pub const INCOMING_BUFFERS_BYTES: u64 = 8 << 20;
/// LIMIT: TLS handshake bytes that may arrive out of order: two certificate chains of 4 KiB with room.
pub const CRYPTO_BUFFER_BYTES: usize = 16 * 1024;
/// LIMIT: what a peer may send before it is authorised: a join, or the head of a hello.
pub const UNAUTHORISED_WINDOW_BYTES: u32 = 16 * 1024;
/// LIMIT: control messages in flight: a few of the largest.
pub const CONTROL_WINDOW_BYTES: u32 = 4 << 20;
/// LIMIT: silence that may be configured before a peer counts as gone.
pub const IDLE_TIMEOUT_MAX: std::time::Duration = std::time::Duration::from_secs(600);

// --- attach protocol and reference VMM ----------------------------------------------------------

/// LIMIT: vCPUs of the reference VMM.
pub const VCPUS_MAX: u32 = 8;

// --- configuration, control, journal ------------------------------------------------------------

const _: () = assert!(MACHINE_BYTES_MAX + 64 * 1024 < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(STATE_CHUNK_BYTES_MAX < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > 64 * crate::types::PAGE_BYTES);
const _: () = assert!(10 * (DATAGRAM_BYTES_MAX as usize) < 65_536 - 28);
const _: () = assert!((CONTROL_WINDOW_BYTES as usize) > 2 * CONTROL_BODY_BYTES_MAX);
const _: () = assert!(HALF_OPEN_PER_ADDRESS_MAX < HALF_OPEN_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > BATCH_PAGES_MAX * (crate::types::PAGE_BYTES + 64));
const _: () = assert!(RAM_BYTES_MAX / (crate::types::PAGE_BYTES as u64) < 1 << 40);
const _: () = assert!(STRIPE_PAGES.is_multiple_of(64) && STRIPE_PAGES <= FRAME_PAGES_MAX);
