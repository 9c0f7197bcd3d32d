//! The circumstances of a question, as the schema's context types.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{LazyLock, Mutex, PoisonError};

use cedar_policy::{Context, RestrictedExpression};
use serde::{Deserialize, Serialize};

use crate::limits;
use crate::policy::entities::uid;
use crate::policy::reads::{Fact, Reads};

/// How memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All memory before the switch.
    Precopy,
    /// Memory after the switch, on demand.
    Postcopy,
    /// Rounds first, the rest after the switch.
    Hybrid,
}

/// What packs pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Nothing.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
    /// Any of them, as the link and the processors have it.
    Auto,
}

/// How far back a codec may look for repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodecScope {
    /// Each page by itself.
    Page,
    /// Pages of one batch.
    Batch,
    /// Everything this VM has sent.
    Stream,
}

/// Where the final image is on disk before the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Nowhere.
    None,
    /// At the destination.
    Dest,
    /// At both ends.
    Both,
}

/// Which disks move with a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// None.
    #[default]
    None,
    /// All that it can write to.
    All,
    /// The same, and the VM stays.
    Only,
}

macro_rules! words {
    ($($type:ident { $($variant:ident = $word:literal),* })*) => {$(
        impl $type {
            /// The word that policies compare with.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }
    )*};
}
words! {
    Mode { Precopy = "precopy", Postcopy = "postcopy", Hybrid = "hybrid" }
    Codec { None = "none", Lz4 = "lz4", Zstd = "zstd", Auto = "auto" }
    CodecScope { Page = "page", Batch = "batch", Stream = "stream" }
    Durability { None = "none", Dest = "dest", Both = "both" }
    Storage { None = "none", All = "all", Only = "only" }
}

/// From where to where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Route {
    /// The source's site.
    pub src_site: String,
    /// The destination's site.
    pub dst_site: String,
    /// The peer's address as this gateway sees it.
    pub peer_ip: IpAddr,
}

/// The authenticated channel to the peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Channel {
    /// TLS version, `1.3`.
    pub tls: String,
    /// Key exchange, e.g. `X25519MLKEM768`.
    pub kx: String,
    /// Cipher suite, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub suite: String,
    /// Whether every element of the peer's chain was checked against a CRL that is fresh now.
    pub crl_fresh: bool,
    /// Whole days until the peer's certificate ends; negative once it has.
    pub peer_cert_days_left: i64,
}

/// The terms of the page stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stream {
    /// How memory moves.
    pub mode: Mode,
    /// What packs pages.
    pub compression: Codec,
    /// How far back it may look.
    pub compression_scope: CodecScope,
    /// Whether frame lengths are padded to buckets.
    pub length_padding: bool,
    /// Where the final image is on disk before the switch.
    pub durability: Durability,
    /// Lanes.
    pub lanes: u16,
    /// Which disks move. Facts that were written down before there was such a word have none.
    #[serde(default)]
    pub storage: Storage,
}

/// The circumstances of `release`, `accept` and `commit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MigrationContext {
    /// Now, in milliseconds since 1970-01-01 UTC.
    #[serde(rename = "now", with = "instant")]
    pub now_unix_ms: i64,
    /// From where to where.
    pub route: Route,
    /// The channel to the peer.
    pub channel: Channel,
    /// The terms of the page stream.
    pub stream: Stream,
    /// Guest RAM, in MiB.
    #[serde(rename = "memoryMiB")]
    pub memory_mib: u64,
    /// Disks that move.
    #[serde(default)]
    pub disk_count: u32,
    /// How long they are together, in MiB, begun ones counted.
    #[serde(rename = "diskMiB", default)]
    pub disk_mib: u64,
}

/// The circumstances of `request`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequestContext {
    /// Now, in milliseconds since 1970-01-01 UTC.
    #[serde(rename = "now", with = "instant")]
    pub now_unix_ms: i64,
    /// From where to where.
    pub route: Route,
    /// The terms asked for.
    pub stream: Stream,
    /// The change ticket given, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change_ticket: Option<String>,
}

/// The circumstances of `resolveInDoubt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResolveContext {
    /// Now, in milliseconds since 1970-01-01 UTC.
    #[serde(rename = "now", with = "instant")]
    pub now_unix_ms: i64,
    /// Operators who agreed.
    pub approvers: Vec<String>,
    /// Whether it was shown that the other copy cannot run.
    pub fence_evidence: bool,
}

/// An RFC 3339 time, as milliseconds.
mod instant {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};

    pub(super) fn serialize<S: Serializer>(unix_ms: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        let time = jiff::Timestamp::from_millisecond(*unix_ms).map_err(ser::Error::custom)?;
        serializer.collect_str(&format_args!("{time:.3}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time: jiff::Timestamp = text.parse().map_err(|_| de::Error::custom(format!("`{text}` is no RFC 3339 time")))?;
        Ok(time.as_millisecond())
    }
}

type Pair = (String, RestrictedExpression);

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

fn flag(value: bool) -> RestrictedExpression {
    RestrictedExpression::new_bool(value)
}

/// Addresses that were asked about before: to make one has Cedar parse, which takes a sixth of a decision.
static ADDRESSES: LazyLock<Mutex<HashMap<IpAddr, RestrictedExpression>>> = LazyLock::new(Mutex::default);

fn address(address: IpAddr) -> RestrictedExpression {
    let mut known = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() >= limits::POLICY_ADDRESSES_KEPT_MAX {
        known.clear();
    }
    known.entry(address).or_insert_with(|| RestrictedExpression::new_ip(address.to_string())).clone()
}

impl Reads {
    /// A circumstance, if it is read.
    fn pair(self, fact: Fact, value: impl FnOnce() -> RestrictedExpression) -> Option<Pair> {
        self.has(fact).then(|| (fact.name().to_owned(), value()))
    }
}

/// A record of what is read of it; none when that is nothing.
fn record<const N: usize>(name: &str, pairs: [Option<Pair>; N]) -> Result<Option<Pair>, String> {
    if pairs.iter().all(Option::is_none) {
        return Ok(None);
    }
    let record = RestrictedExpression::new_record(pairs.into_iter().flatten()).map_err(|error| error.to_string())?;
    Ok(Some((name.to_owned(), record)))
}

/// The first millisecond that Cedar can write.
const YEAR_ZERO_UNIX_MS: i64 = -62_167_219_200_000;

/// Refuses a time that cannot be written, whether it is read or not.
fn now(unix_ms: i64, reads: Reads) -> Result<Option<Pair>, String> {
    let time = jiff::Timestamp::from_millisecond(unix_ms).ok().filter(|_| unix_ms >= YEAR_ZERO_UNIX_MS);
    let time = time.ok_or_else(|| format!("time `{unix_ms}` ms is outside of the calendar"))?;
    // Cedar reads exactly three digits of a second's fraction.
    Ok(reads.pair(Fact::Now, || RestrictedExpression::new_datetime(format!("{time:.3}"))))
}

impl Route {
    fn pair(&self, reads: Reads) -> Result<Option<Pair>, String> {
        // A v4 peer seen through a dual-stack socket must match the v4 ranges that policies are written with.
        let peer_ip = || address(self.peer_ip.to_canonical());
        let pairs = [
            reads.pair(Fact::SrcSite, || text(&self.src_site)),
            reads.pair(Fact::DstSite, || text(&self.dst_site)),
            reads.pair(Fact::PeerIp, peer_ip),
        ];
        record("route", pairs)
    }
}

impl Channel {
    fn pair(&self, reads: Reads) -> Result<Option<Pair>, String> {
        let pairs = [
            reads.pair(Fact::Tls, || text(&self.tls)),
            reads.pair(Fact::Kx, || text(&self.kx)),
            reads.pair(Fact::Suite, || text(&self.suite)),
            reads.pair(Fact::CrlFresh, || flag(self.crl_fresh)),
            reads.pair(Fact::PeerCertDaysLeft, || RestrictedExpression::new_long(self.peer_cert_days_left)),
        ];
        record("channel", pairs)
    }
}

impl Stream {
    fn pair(&self, reads: Reads) -> Result<Option<Pair>, String> {
        let pairs = [
            reads.pair(Fact::Mode, || text(self.mode.as_str())),
            reads.pair(Fact::Compression, || text(self.compression.as_str())),
            reads.pair(Fact::CompressionScope, || text(self.compression_scope.as_str())),
            reads.pair(Fact::LengthPadding, || flag(self.length_padding)),
            reads.pair(Fact::Durability, || text(self.durability.as_str())),
            reads.pair(Fact::Lanes, || RestrictedExpression::new_long(self.lanes.into())),
            reads.pair(Fact::Storage, || text(self.storage.as_str())),
        ];
        record("stream", pairs)
    }
}

fn context<const N: usize>(pairs: [Option<Pair>; N]) -> Result<Context, String> {
    Context::from_pairs(pairs.into_iter().flatten()).map_err(|error| error.to_string())
}

impl MigrationContext {
    pub(super) fn context(&self, stream: &Stream, reads: Reads) -> Result<Context, String> {
        let long = |what: &str, mib: u64| i64::try_from(mib).map_err(|_| format!("{what} of `{mib}` MiB does not fit"));
        let (memory, disks) = (long("guest memory", self.memory_mib)?, long("disks", self.disk_mib)?);
        context([
            now(self.now_unix_ms, reads)?,
            self.route.pair(reads)?,
            self.channel.pair(reads)?,
            stream.pair(reads)?,
            reads.pair(Fact::MemoryMib, || RestrictedExpression::new_long(memory)),
            reads.pair(Fact::DiskCount, || RestrictedExpression::new_long(self.disk_count.into())),
            reads.pair(Fact::DiskMib, || RestrictedExpression::new_long(disks)),
        ])
    }
}

impl RequestContext {
    pub(super) fn context(&self, stream: &Stream, reads: Reads) -> Result<Context, String> {
        let ticket = self.change_ticket.as_deref().and_then(|ticket| reads.pair(Fact::ChangeTicket, || text(ticket)));
        context([now(self.now_unix_ms, reads)?, self.route.pair(reads)?, stream.pair(reads)?, ticket])
    }
}

impl ResolveContext {
    pub(super) fn context(&self, reads: Reads) -> Result<Context, String> {
        let approvers: Vec<_> =
            self.approvers.iter().map(|id| uid("Operator", id).map(RestrictedExpression::new_entity_uid)).collect::<Result<_, _>>()?;
        context([
            now(self.now_unix_ms, reads)?,
            reads.pair(Fact::Approvers, || RestrictedExpression::new_set(approvers)),
            reads.pair(Fact::FenceEvidence, || flag(self.fence_evidence)),
        ])
    }
}
