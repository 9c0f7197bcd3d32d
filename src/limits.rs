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
/// LIMIT: guest RAM for each lane that is not asked for. At each end a lane costs a thread, a socket and a handshake of some
/// milliseconds; one lane carries 256 MiB in a quarter of a second.
pub const LANE_RAM_BYTES: u64 = 256 << 20;
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
/// LIMIT: a piece of a hypervisor's stream: codecs gain little beyond it, and a slow link needs a piece to be over soon.
pub const STREAM_CHUNK_BYTES_MAX: usize = 256 * 1024;
/// LIMIT: a stream's bytes that were sent and that the destination's hypervisor does not have: at the source they are kept to be sent
/// again, at the destination they wait for those before them. 1 Gbit/s over 150 ms takes 19 MB.
pub const STREAM_WINDOW_BYTES: u64 = 24 << 20;
/// LIMIT: pages of a stream that each end remembers, to find equal ones and send differences: what the tables of a migration take.
pub const STREAM_PAST_BYTES_MAX: usize = 1 << 29;
/// LIMIT: disks of one VM; a PC bus has room for about as many.
pub const DISKS_MAX: usize = 64;
/// LIMIT: bytes of one disk: 64 TiB, as QEMU's own formats have at most some more.
pub const DISK_BYTES_MAX: u64 = 1 << 46;
/// LIMIT: what a disk is called: the name of a guest's device, or its path in QEMU's tree of objects.
pub const DISK_NAME_BYTES_MAX: usize = 255;
/// LIMIT: changes to disks from the first that the source does not know to be applied to the last that it has sent; both ends remember
/// that many numbers. A mirror has 16 MiB under way for each disk, in pieces of 64 KiB where zeroes stand between.
pub const DISK_CHANGES_MAX: usize = 4096;
/// LIMIT: blocks of which a destination says at once what they hold: 256 MiB of a disk in 64 KiB.
pub const DISK_HELD_PART: usize = 4096;
/// LIMIT: blocks of which a source remembers what the destination holds: 1 TiB of disks in 256 MiB. Those behind are sent.
pub const DISK_HELD_BLOCKS_MAX: usize = 1 << 24;
/// LIMIT: bytes that changes under way write: kept at the source to be sent again, at the destination until its hypervisor took them.
/// 1 Gbit/s over 150 ms takes 19 MB.
pub const DISK_WINDOW_BYTES: usize = 24 << 20;
/// LIMIT: one request that a hypervisor makes of its gateway over NBD; QEMU makes none that is larger. Its mirror writes 1 MiB at once,
/// and zeroes as much as may be: with less it would wait for more round trips.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;
/// LIMIT: options that an NBD client sends before it begins; QEMU sends four.
pub const NBD_OPTIONS_MAX: usize = 32;
/// LIMIT: what one such option or its answer may have; a name and a few numbers.
pub const NBD_OPTION_BYTES_MAX: u32 = 4096;
/// LIMIT: NBD connections that a source's hypervisor may have with its gateway: one for each disk, and one that is made anew.
pub const NBD_CONNECTIONS_MAX: usize = DISKS_MAX + 1;
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
/// LIMIT: a piece of what a destination's hypervisor writes back: a request for a page has some 20 bytes, and waits for nothing.
pub const STREAM_BACK_PIECE_BYTES_MAX: usize = 64 * 1024;
/// LIMIT: what of the way back is with neither hypervisor: requests of every vCPU many times over.
pub const STREAM_BACK_WINDOW_BYTES: u64 = 1 << 20;
/// LIMIT: features that one side names in its greeting.
pub const FEATURES_MAX: usize = 64;
/// LIMIT: the name of one feature.
pub const FEATURE_NAME_BYTES_MAX: usize = 32;
/// LIMIT: the name of a driver family in an offer.
pub const HYPERVISOR_NAME_BYTES_MAX: usize = 32;
/// LIMIT: a signed checkpoint is an origin, three short lines and a few signature lines.
pub const CHECKPOINT_BYTES_MAX: usize = 4096;
/// LIMIT: one signature line of a witness: its name and 76 bytes in base64.
pub const COSIGNATURE_BYTES_MAX: usize = 1024;
/// LIMIT: pages that one block of a codec holds; 256 KiB, beyond which ratios gain 5 % and cache misses more.
pub const BATCH_PAGES_MAX: usize = 64;
/// LIMIT: a lane's Zstandard stream looks back 128 MiB at most; that much memory it takes at each end, once so much was sent.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// LIMIT: what a part of a Zstandard stream may have more than its pages: headers of the frame and of its blocks.
pub const STREAM_OVERHEAD_BYTES_MAX: usize = 64;
/// LIMIT: tables of a migration where nothing else is set: 64 MiB to find equal pages, 24 bytes a page that is not zero, and 256 MiB of
/// pages that are kept to send differences of.
pub const TABLE_BYTES: usize = 320 << 20;
/// LIMIT: what may be set for them; more than a guest's memory is of no use.
pub const TABLE_BYTES_MAX: u64 = 64 << 30;

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
/// LIMIT: a bundle's manifest: a line of 200 bytes for each file that may be in it, twice.
pub const BUNDLE_MANIFEST_BYTES_MAX: usize = 512 << 10;
/// LIMIT: keys that a gateway pins: those who review policies.
pub const BUNDLE_KEYS_MAX: usize = 16;
/// LIMIT: signatures of a bundle: of all pinned keys, and of as many that others pin.
pub const BUNDLE_SIGNATURES_MAX: usize = 2 * BUNDLE_KEYS_MAX;
/// LIMIT: one signature: two short lines and two comments; `minisign` itself ends comments at 1 and 8 KiB.
pub const BUNDLE_SIGNATURE_BYTES_MAX: usize = 10 << 10;
/// LIMIT: a name of a file in a bundle fits a line.
pub const BUNDLE_PATH_BYTES_MAX: usize = 128;
/// LIMIT: a version is a number that every reader of JSON keeps exactly.
pub const BUNDLE_VERSION_MAX: u64 = (1 << 53) - 1;
/// LIMIT: policies that `policy check` compares with each other: 16 million pairs take a second or two.
pub const POLICIES_COMPARED_MAX: usize = 4096;
/// LIMIT: sets of policies that are kept put together, of about 2 KiB a policy; one for each kind of VM and peer.
pub const POLICY_SETS_KEPT_MAX: usize = 1024;
/// LIMIT: addresses of peers that are kept as policies see them: more than a gateway has peers, some 300 bytes each.
pub const POLICY_ADDRESSES_KEPT_MAX: usize = 4096;
/// LIMIT: an `@id` is a name in audit entries and messages.
pub const POLICY_ID_BYTES_MAX: usize = 64;
/// LIMIT: gateways, operators and VMs known to policy.
pub const POLICY_ENTITIES_MAX: usize = 100_000;
/// LIMIT: an operator's name: `uid:` and a number, or an OIDC subject (255 bytes by its standard).
pub const OPERATOR_ID_BYTES_MAX: usize = 255;

/// LIMIT: one audit line; a decision with a hundred policy ids takes 8 KiB.
pub const AUDIT_LINE_BYTES_MAX: usize = 16 * 1024;
/// LIMIT: what a decision was made from, in its audit line: leaves as much room again for the rest.
pub const AUDIT_FACTS_BYTES_MAX: usize = AUDIT_LINE_BYTES_MAX / 2;
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
/// LIMIT: how often a handoff record that could not be recorded is tried again: a disk is given room, or a token is back, within ten minutes.
pub const AUDIT_LATER_MAX: u32 = 600;
/// LIMIT: a log's name: `sealane/`, a trust domain (255), a gateway.
pub const AUDIT_ORIGIN_BYTES_MAX: usize = 512;
/// LIMIT: a signed head: origin, size, root, key name, signature.
pub const AUDIT_CHECKPOINT_BYTES_MAX: usize = 4 * 1024;
/// LIMIT: signatures of one head: the log's and those of witnesses. C2SP signed-note asks for at least 16.
pub const AUDIT_SIGNATURES_MAX: usize = 16;
/// LIMIT: hashes of a proof: the height of a tree of 2^63 entries, and one.
pub const AUDIT_PROOF_HASHES_MAX: usize = 64;
/// LIMIT: a proof as text: the longest line in base64, hashes of 45 bytes, a signed head.
pub const AUDIT_PROOF_BYTES_MAX: usize = 32 * 1024;
/// LIMIT: levels of tiles: each stands for eight of the tree, which has at most 64.
pub const AUDIT_TILE_LEVELS_MAX: usize = 8;
/// LIMIT: files of tiles and bundles of one log; enough for 10^9 entries.
pub const AUDIT_TILES_MAX: usize = 8_000_000;
/// LIMIT: files of tiles that wait in memory when the disk does not take them; what falls out is made at the next opening.
pub const AUDIT_TILES_PENDING_MAX: usize = 64;
/// LIMIT: handoffs whose COMMIT or RUN entry can be handed to the peer without reading the log; about 1 KiB each.
pub const AUDIT_HANDOFFS_MAX: usize = 4096;
/// LIMIT: peers whose heads are kept in memory.
pub const AUDIT_PEERS_MAX: usize = 4096;
/// LIMIT: heads and answers that one session may bring in half of [`AUDIT_HEADS_EVERY`]; each may cost an entry. Two of each are what
/// an exchange can take.
pub const AUDIT_HEADS_PER_SESSION_MAX: usize = 8;
/// LIMIT: a peer in a session gets a head at least that often: what a log that goes back could hide is a minute of a session, and two entries a minute are little.
pub const AUDIT_HEADS_EVERY: std::time::Duration = std::time::Duration::from_secs(60);
/// LIMIT: crashes in a row before the first entry after them.
pub const AUDIT_DROPPED_MAX: usize = 1000;

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

/// LIMIT: UDP payload of a lane: what one send through the kernel may have.
pub const DATAGRAM_BYTES_MAX: u16 = 65_000;
/// LIMIT: handshakes going on at once from proven addresses, on each socket; each costs a signature and some kilobytes.
pub const HALF_OPEN_MAX: usize = 256;
/// LIMIT: handshakes going on from unproven addresses, on each socket; the next one has to prove its address first.
pub const HALF_OPEN_BEFORE_RETRY: usize = 64;
/// LIMIT: handshakes going on from one proven host, which may be a NAT for many gateways.
pub const HALF_OPEN_PER_HOST_MAX: usize = 32;
/// LIMIT: handshakes going on from one proven network, which may be a site of gateways; no network takes all the room there is.
pub const HALF_OPEN_PER_NETWORK_MAX: usize = 128;
/// LIMIT: the epoch of an owner; the next owner gets the next one.
pub const EPOCH_MAX: u64 = u64::MAX - 1;
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
/// LIMIT: TLS handshake bytes that may arrive out of order: two certificate chains of 4 KiB and a key share of 1216 bytes, with
/// room.
pub const CRYPTO_BUFFER_BYTES: usize = 16 * 1024;
/// LIMIT: what a peer may send before it is authorised: a join, or the head of a hello.
pub const UNAUTHORISED_WINDOW_BYTES: u32 = 16 * 1024;
/// LIMIT: buffers of all lanes of a gateway in one direction: 1 Gbit/s over 150 ms takes a third, a lost packet that is sent again
/// as much once more.
pub const LANE_BUFFERS_BYTES: u64 = 64 << 20;
/// LIMIT: the buffer of one lane, however many there are: 200 of them take what all may take.
pub const LANE_BUFFER_BYTES_MIN: u32 = 320 * 1024;
/// LIMIT: control messages in flight: a few of the largest.
pub const CONTROL_WINDOW_BYTES: u32 = 4 << 20;
/// LIMIT: silence that may be configured before a peer counts as gone.
pub const IDLE_TIMEOUT_MAX: std::time::Duration = std::time::Duration::from_secs(600);

// --- attach protocol and reference VMM ----------------------------------------------------------

/// LIMIT: one line of QEMU's monitor; lists of machines and devices take some ten KiB.
pub const QMP_LINE_BYTES_MAX: usize = 1 << 20;
/// LIMIT: devices by which two QEMUs are compared; a PC bus has room for a few hundred.
pub const QEMU_DEVICES_MAX: usize = 1024;
/// LIMIT: blocks of memory in a QEMU's stream: a guest's DIMMs, and a ROM or two of each device.
pub const QEMU_BLOCKS_MAX: usize = 2048;
/// LIMIT: channels on which a QEMU hands over pages: each is a thread of QEMU's, and a socket with what is held of it here.
pub const QEMU_CHANNELS_MAX: u16 = 16;
/// LIMIT: processes that connect where a QEMU's channels are waited for: QEMU, and a few that have no business there.
pub const CHANNEL_PROCESSES_MAX: usize = 8;
/// LIMIT: vCPUs of the reference VMM.
pub const VCPUS_MAX: u32 = 8;
/// LIMIT: JSON header of an attach message; the largest carries a machine description.
pub const ATTACH_HEADER_BYTES_MAX: usize = MACHINE_BYTES_MAX + 64 * 1024;
/// LIMIT: gateways and observers attached to one VMM at once; one controls, the rest read its status.
pub const ATTACH_CONNECTIONS_MAX: usize = 8;
/// LIMIT: file descriptors taken from one attach message; one is ever legal, the second shows the excess.
pub const ATTACH_FDS_MAX: usize = 2;
/// LIMIT: lines in which a VMM says what its host lacks; a CPUID comparison names a few leaves.
pub const ATTACH_LACKS_MAX: usize = 64;
/// LIMIT: last console line in a guest's status, shown to people.
pub const STATUS_LINE_BYTES_MAX: usize = 256;
/// LIMIT: what is shown of a VMM's log when it died before it listened.
pub const LAUNCH_LOG_TAIL_BYTES_MAX: usize = 2048;
/// LIMIT: arguments of an operator's VMM command line.
pub const LAUNCH_ARGUMENTS_MAX: usize = 256;
/// LIMIT: counters of a VM's generation; no VM gets there by moving, and one more never overflows.
pub const GENERATION_COUNT_MAX: u64 = 1 << 60;
/// LIMIT: writer threads of a synthetic guest.
pub const SYNTHETIC_WRITERS_MAX: u32 = 64;
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

/// LIMIT: a flat binary given to `vmm run --kernel`: the conventional memory below the VGA hole.
pub const FLAT_IMAGE_BYTES_MAX: u64 = 0x9_0000;

// --- configuration, control, journal ------------------------------------------------------------

/// LIMIT: the configuration file; ten thousand VMs take under 4 MiB.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// LIMIT: problems shown for one configuration file; more than this is another kind of file.
pub const CONFIG_PROBLEMS_MAX: usize = 200;
/// LIMIT: a Unix socket's path; `sun_path` is 108 bytes with the closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// LIMIT: concurrent migrations of one gateway; each holds lanes, threads and a guest's mapping.
pub const MIGRATIONS_MAX: u32 = 64;
/// LIMIT: departures that wait for their turn: every VM of a large host. Each takes a task and a few KiB, and is looked at when
/// another one ends.
pub const DEPARTURES_QUEUED_MAX: usize = 1024;
/// LIMIT: a request to the control API; all of them are a few short values.
pub const CONTROL_REQUEST_BYTES_MAX: usize = 64 * 1024;
/// LIMIT: connections of one user to the control sockets: a `watch` for each of a hundred VMs, and room beside.
pub const CALLERS_PER_USER_MAX: usize = 256;
/// LIMIT: connections of all users but root and the gateway's own. Each takes a descriptor, of which a process has 1024 unless more are
/// given to it, and some 16 KiB.
pub const CALLERS_MAX: usize = 384;
/// LIMIT: callers who are being told that they are too many; further ones find the connection closed.
pub const CALLERS_REFUSED_MAX: usize = 8;
/// LIMIT: how long a caller may take to say what it wants: programs say it at once, people who type HTTP are patient with machines.
pub const CALLER_SPEAKS_WITHIN: std::time::Duration = std::time::Duration::from_secs(10);
/// LIMIT: how long an answer waits for a caller who reads none of it, such as a terminal that was stopped.
pub const CALLER_READS_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);
/// LIMIT: how long is waited when a caller cannot be taken, for want of descriptors.
pub const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
/// LIMIT: a message to the launcher of VMMs: names and one path.
pub const LAUNCHER_MESSAGE_BYTES_MAX: usize = 64 << 10;
/// LIMIT: a message of the launcher: a few numbers, or a reason.
pub const LAUNCHER_ANSWER_BYTES_MAX: usize = 8 << 10;
/// LIMIT: VMMs of one gateway that have not ended; a host has no memory for more, and each takes two descriptors.
pub const LAUNCHED_MAX: usize = 400;
/// LIMIT: a PKCS#11 URI: a few labels of 32 bytes, all of them with percent signs.
pub const TOKEN_URI_BYTES_MAX: usize = 1024;
/// LIMIT: a message to or of a process that holds a key: a public key and a signature of RSA have 1100 bytes, what is signed fewer than
/// 1000, each written as up to four.
pub const HOLDER_MESSAGE_BYTES_MAX: usize = 16 << 10;
/// LIMIT: how long a signature may take. Slow tokens take half a second, and whoever waits is a thread that serves others too.
pub const HOLDER_ANSWERS_WITHIN: std::time::Duration = std::time::Duration::from_secs(3);
/// LIMIT: signatures of one key that are waited for at once: as many as a token makes within that time.
pub const HOLDER_WAITING_MAX: usize = 64;
/// LIMIT: how long a holder of a key that was late is left alone: a thread that waits for it serves nobody else.
pub const HOLDER_LATE_FOR: std::time::Duration = std::time::Duration::from_secs(10);
/// LIMIT: how long a key that does not answer is asked again for a message of a handoff, behind which its session is given up: less than
/// the slack of a pause, and than a peer that is silent is heard of no more.
pub const SIGNED_WITHIN: std::time::Duration = std::time::Duration::from_secs(10);
/// LIMIT: keys of a token that a URI may name: the one in use, and those that were and will be.
pub const TOKEN_KEYS_MAX: u16 = 8;
/// LIMIT: keys that one process holds at once: the one in use, and those of migrations that began before it was.
pub const HELD_KEYS_MAX: usize = 64;
/// LIMIT: how long the library of a token may take to load and log in: a network HSM is reached over TLS.
pub const TOKEN_READY_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);
/// LIMIT: how long the launcher may take for an answer: a program is loaded, its memory is given back, or `qemu-img` makes a file.
pub const LAUNCHER_ANSWERS_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);
/// LIMIT: an answer of the control API; the largest lists ten thousand VMs.
pub const CONTROL_RESPONSE_BYTES_MAX: usize = 16 << 20;
/// LIMIT: one line of an event stream; the largest is a report.
pub const CONTROL_EVENT_BYTES_MAX: usize = 256 * 1024;
/// LIMIT: one journal record; handoff records are under 1 KiB, placement records under 64 KiB.
pub const JOURNAL_RECORD_BYTES_MAX: usize = 256 * 1024;
/// LIMIT: evidence of fencing in an operator's words: a ticket, who switched off what and when; it goes into an audit entry.
pub const EVIDENCE_BYTES_MAX: usize = 1024;
/// LIMIT: finished reports that a gateway can be told to keep; about 2 KiB each, and all fit one answer.
pub const HISTORY_COUNT_MAX: u32 = 5_000;

/// LIMIT: the head of a VM's image on disk: a machine description, and a page of fixed fields.
pub const IMAGE_HEAD_BYTES_MAX: usize = MACHINE_BYTES_MAX + crate::types::PAGE_BYTES;

// --- engine -------------------------------------------------------------------------------------

/// LIMIT: how long a peer may take for its HELLO, and again for what it wants.
pub const GREETING_WITHIN: std::time::Duration = std::time::Duration::from_secs(10);
/// LIMIT: how long a control message may wait for a peer that lives and does not read.
pub const SEND_WITHIN: std::time::Duration = std::time::Duration::from_secs(10);
/// LIMIT: how long is waited at the end for a peer's last words, which change nothing any more.
pub const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(2);
/// LIMIT: how long a peer that settles an interrupted handoff may take for each answer: a guest is started, records are made.
pub const ANSWER_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);
/// LIMIT: messages of a peer that settles an interrupted handoff; a whole one has three of each side.
pub const HANDOFF_MESSAGES_MAX: usize = 16;
/// LIMIT: a source that has nothing to say says that it lives.
pub const PING_EVERY: std::time::Duration = std::time::Duration::from_secs(5);
/// LIMIT: several missing signs of life: the source's QUIC lives, its migration does not.
pub const SILENCE_MAX: std::time::Duration = std::time::Duration::from_secs(30);
/// LIMIT: signs of life without a page or a message that leads on. The slowest bandwidth limit of use, 64 KiB/s, takes 8 s a frame;
/// the digest of 1 TiB takes a few minutes.
pub const STALL_MAX: std::time::Duration = std::time::Duration::from_secs(600);
/// LIMIT: what a pause may last beyond ten times what was planned, before the guest goes on at the source.
pub const PAUSE_SLACK: std::time::Duration = std::time::Duration::from_secs(30);
/// LIMIT: rounds of one migration; a source gives up after 60.
pub const ROUNDS_MAX: u32 = 1000;

// --- gateway ------------------------------------------------------------------------------------

/// LIMIT: how long an offer waits for a migration of this gateway to end before its source is sent away. The two ends of a
/// migration learn of its end at slightly different times, and the source then sends the next VM at once.
pub const ROOM_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);
/// LIMIT: sessions that one peer holds at once: one for each migration with it, probes, and room for others' sessions beside.
pub const SESSIONS_PER_PEER_MAX: usize = 80;
/// LIMIT: sessions that one peer opens in a row.
pub const SESSIONS_BURST: u32 = 256;
/// LIMIT: sessions of one peer in the long run: 1 GB of audit log a day if all of them come to nothing.
pub const SESSIONS_PER_SECOND: u32 = 4;
/// LIMIT: a migration or a pause longer than a year is a mistyped number, and sums of it stay far from overflow.
pub const MIGRATION_MAX: std::time::Duration = std::time::Duration::from_secs(365 * 24 * 3600);
/// LIMIT: commands of operators that wait for one migration.
pub const COMMAND_QUEUE: usize = 8;
/// LIMIT: lines of progress that wait for one slow watcher; it then sees fewer of them.
pub const EVENT_QUEUE_LINES: usize = 16;
const _: () = assert!(MACHINE_BYTES_MAX + 64 * 1024 < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(STREAM_CHUNK_BYTES_MAX + 64 <= FRAME_BODY_BYTES_MAX && STREAM_CHUNK_BYTES_MAX as u64 * 8 < STREAM_WINDOW_BYTES);
const _: () = assert!(DISK_CHANGES_MAX * 8 + 64 < CONTROL_BODY_BYTES_MAX && DISK_WINDOW_BYTES > 8 * STREAM_CHUNK_BYTES_MAX);
const _: () = assert!(STATE_CHUNK_BYTES_MAX < CONTROL_BODY_BYTES_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > 64 * crate::types::PAGE_BYTES);
const _: () = assert!((CONTROL_WINDOW_BYTES as usize) > 2 * CONTROL_BODY_BYTES_MAX);
const _: () = assert!(HALF_OPEN_PER_HOST_MAX < HALF_OPEN_PER_NETWORK_MAX && HALF_OPEN_PER_NETWORK_MAX < HALF_OPEN_MAX);
const _: () = assert!(CALLERS_PER_USER_MAX < CALLERS_MAX);
const _: () = assert!(CONTROL_EVENT_BYTES_MAX <= CONTROL_RESPONSE_BYTES_MAX);
const _: () = assert!(FRAME_BODY_BYTES_MAX > BATCH_PAGES_MAX * (crate::types::PAGE_BYTES + 64));
const _: () = assert!(RAM_BYTES_MAX / (crate::types::PAGE_BYTES as u64) < 1 << 40);
const _: () = assert!(STRIPE_PAGES.is_multiple_of(64) && STRIPE_PAGES <= FRAME_PAGES_MAX);
const _: () =
    assert!(AUDIT_LINE_BYTES_MAX * 4 / 3 + 45 * AUDIT_PROOF_HASHES_MAX + AUDIT_CHECKPOINT_BYTES_MAX + 256 < AUDIT_PROOF_BYTES_MAX);
const _: () = assert!(2 * AUDIT_CHECKPOINT_BYTES_MAX + 1024 < AUDIT_LINE_BYTES_MAX);
const _: () = assert!(HISTORY_COUNT_MAX as usize * 3 * 1024 <= CONTROL_RESPONSE_BYTES_MAX);
const _: () = assert!(SESSIONS_PER_PEER_MAX > MIGRATIONS_MAX as usize && 3 * SESSIONS_PER_PEER_MAX < SESSIONS_MAX);
const _: () = assert!(SIGNED_WITHIN.as_secs() + 2 * HOLDER_ANSWERS_WITHIN.as_secs() < SILENCE_MAX.as_secs());
const _: () = assert!(PING_EVERY.as_secs() * 3 < SILENCE_MAX.as_secs() && SILENCE_MAX.as_secs() < STALL_MAX.as_secs());
