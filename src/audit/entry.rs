//! One entry: what callers say, and the canonical line that is kept.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::error::Category;
use serde_json::{Map, Value};

use crate::audit::error::AuditError;
use crate::limits;
use crate::types::{MigrationId, VmName, VmUuid};

macro_rules! events {
    ($(#[$meta:meta] $variant:ident = $name:literal,)*) => {
        /// What happened.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Event {
            $(#[$meta] #[serde(rename = $name)] $variant,)*
        }
        impl Event {
            /// Every event.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name in the log.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}
events! {
    /// The log begins: who writes it, with which key. Always entry 0.
    LogCreated = "log-created",
    /// Bytes that no checkpoint covered were set aside when the log was opened.
    Recovered = "recovered",
    /// The gateway starts.
    GatewayStarted = "gateway-started",
    /// The gateway stops in an orderly way.
    GatewayStopped = "gateway-stopped",
    /// The process that starts VMMs for the gateway has ended.
    LauncherEnded = "launcher-ended",
    /// A process that holds a private key has ended.
    KeyHolderEnded = "key-holder-ended",
    /// A policy set is in force.
    PolicyLoaded = "policy-loaded",
    /// A policy set was refused; the one before stays in force.
    PolicyRefused = "policy-refused",
    /// Certificates and CRLs are in force.
    IdentityLoaded = "identity-loaded",
    /// Certificates or CRLs were refused; the ones before stay in force.
    IdentityRefused = "identity-refused",
    /// A peer is authenticated.
    SessionOpened = "session-opened",
    /// A peer is refused.
    SessionRefused = "session-refused",
    /// A session ends.
    SessionClosed = "session-closed",
    /// Policy was asked.
    Decision = "decision",
    /// A VM was offered.
    MigrationOffered = "migration-offered",
    /// The link of a migration was lost.
    LinkLost = "link-lost",
    /// The link of a migration stands again.
    LinkResumed = "link-resumed",
    /// Operators proposed, approved or withdrew what is to become of a VM in doubt.
    Resolution = "resolution",
    /// A step of the handoff; the journal record's name is in the detail.
    Handoff = "handoff",
    /// A migration reached its end.
    MigrationFinished = "migration-finished",
    /// A peer's head was kept, or refused.
    PeerHead = "peer-head",
    /// A peer cosigned a head of this log, or said that it keeps one that this log does not have.
    HeadCosigned = "head-cosigned",
    /// Entries before an index are no longer kept; their hashes are.
    Pruned = "pruned",
    /// The log is handed over to another signing key, or goes on with one.
    KeyChanged = "key-changed",
    /// Somebody used the control socket.
    Operator = "operator",
}

impl std::str::FromStr for Event {
    type Err = AuditError;
    fn from_str(text: &str) -> Result<Self, AuditError> {
        let found = Self::ALL.iter().copied().find(|event| event.as_str() == text);
        found.ok_or_else(|| AuditError::Entry { event: "unknown", why: format!("no event is named `{}`", text.escape_debug()) })
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was done.
    Done,
    /// Policy allowed it.
    Allow,
    /// Policy denied it.
    Deny,
    /// It was refused for another reason.
    Refused,
    /// It failed.
    Failed,
    /// Somebody stopped it.
    Cancelled,
    /// Nobody can tell.
    InDoubt,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: &[Self] = &[Self::Done, Self::Allow, Self::Deny, Self::Refused, Self::Failed, Self::Cancelled, Self::InDoubt];

    /// Its name in the log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::InDoubt => "in-doubt",
        }
    }
}

impl std::str::FromStr for Outcome {
    type Err = AuditError;
    fn from_str(text: &str) -> Result<Self, AuditError> {
        let found = Self::ALL.iter().copied().find(|outcome| outcome.as_str() == text);
        found.ok_or_else(|| AuditError::Entry { event: "unknown", why: format!("no outcome is named `{}`", text.escape_debug()) })
    }
}

/// What a caller wants to have recorded. Whoever fills `detail` sees to it that no guest byte, key or token gets in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What happened.
    pub event: Event,
    /// The operator's name of the VM.
    pub vm: Option<VmName>,
    /// The VM.
    pub uuid: Option<VmUuid>,
    /// The attempt.
    pub migration: Option<MigrationId>,
    /// The peer: a SPIFFE ID once authenticated, an address before.
    pub peer: Option<String>,
    /// What came of it.
    pub outcome: Option<Outcome>,
    /// Everything else; no floats, at most a few levels.
    pub detail: BTreeMap<String, Value>,
}

impl Entry {
    /// An entry with nothing but the event.
    #[must_use]
    pub fn new(event: Event) -> Self {
        Self { event, vm: None, uuid: None, migration: None, peer: None, outcome: None, detail: BTreeMap::new() }
    }

    /// With the VM.
    #[must_use]
    pub fn vm(mut self, name: VmName, uuid: VmUuid) -> Self {
        self.vm = Some(name);
        self.uuid = Some(uuid);
        self
    }

    /// With the attempt.
    #[must_use]
    pub fn migration(mut self, migration: MigrationId) -> Self {
        self.migration = Some(migration);
        self
    }

    /// With the peer.
    #[must_use]
    pub fn peer(mut self, peer: impl Into<String>) -> Self {
        self.peer = Some(peer.into());
        self
    }

    /// With what came of it.
    #[must_use]
    pub fn outcome(mut self, outcome: Outcome) -> Self {
        self.outcome = Some(outcome);
        self
    }

    /// With one more detail.
    #[must_use]
    pub fn detail(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(name.to_owned(), value.into());
        self
    }

    /// The fields that do not depend on the place in the log, checked.
    pub(super) fn fields(&self) -> Result<Map<String, Value>, AuditError> {
        let refuse = |why: String| AuditError::Entry { event: self.event.as_str(), why };
        let value = serde_json::to_value(Fields {
            event: self.event,
            vm: self.vm.as_ref(),
            uuid: self.uuid,
            migration: self.migration,
            peer: self.peer.as_deref(),
            outcome: self.outcome,
            detail: &self.detail,
        });
        let Ok(Value::Object(fields)) = value else { return Err(refuse("is no JSON object".to_owned())) };
        // The place in the log takes at most as much as is added here.
        let mut text = String::new();
        canonical(&Value::Object(fields.clone()), &mut text, 0).map_err(refuse)?;
        let bytes = text.len().saturating_add(PLACE_BYTES_MAX);
        if bytes > limits::AUDIT_LINE_BYTES_MAX {
            return Err(refuse(format!("has {bytes} bytes, expected at most {}", limits::AUDIT_LINE_BYTES_MAX)));
        }
        Ok(fields)
    }
}

/// Room for boot id, index, monotonic time and time with their names.
const PLACE_BYTES_MAX: usize = 240;

#[derive(Serialize)]
struct Fields<'a> {
    event: Event,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<&'a VmName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<VmUuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<MigrationId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<Outcome>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    detail: &'a BTreeMap<String, Value>,
}

/// An entry as it stands in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredEntry {
    /// Its place, from 0.
    pub index: u64,
    /// Wall clock, UTC.
    #[serde(with = "rfc3339")]
    pub time: jiff::Timestamp,
    /// Nanoseconds since the machine started; orders entries of one `boot_id` when the wall clock was changed.
    pub monotonic_ns: u64,
    /// Which start of the machine.
    pub boot_id: String,
    /// What happened.
    pub event: Event,
    /// The operator's name of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// The VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<VmUuid>,
    /// The attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// The peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// What came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Everything else.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, Value>,
}

impl StoredEntry {
    /// Reads a line, which must be exactly as this module would have written it.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        let entry: Self = serde_json::from_slice(line).map_err(|error| match error.classify() {
            Category::Data => format!("is no entry: {error}"),
            Category::Io | Category::Syntax | Category::Eof => format!("is no JSON: {error}"),
        })?;
        let mut text = String::with_capacity(line.len());
        entry.write(&mut text)?;
        if text.as_bytes() == line { Ok(entry) } else { Err(NOT_CANONICAL.to_owned()) }
    }

    /// Its line, field by field in the order of their names. WHY: not by way of a [`Value`], since whoever verifies a log does it
    /// with every line.
    fn write(&self, out: &mut String) -> Result<(), String> {
        out.push_str("{\"boot_id\":");
        quote(&self.boot_id, out)?;
        if !self.detail.is_empty() {
            out.push_str(",\"detail\":");
            canonical_fields(self.detail.iter(), out, 1)?;
        }
        text_field(out, "event", Some(self.event.as_str()))?;
        let _ = write!(out, ",\"index\":{}", self.index);
        text_field(out, "migration", self.migration.map(|id| id.to_string()).as_deref())?;
        let _ = write!(out, ",\"monotonic_ns\":{}", self.monotonic_ns);
        text_field(out, "outcome", self.outcome.map(Outcome::as_str))?;
        text_field(out, "peer", self.peer.as_deref())?;
        text_field(out, "time", Some(&rfc3339::text(self.time)))?;
        text_field(out, "uuid", self.uuid.map(|uuid| uuid.to_string()).as_deref())?;
        text_field(out, "vm", self.vm.as_ref().map(VmName::as_str))?;
        out.push('}');
        Ok(())
    }
}

/// The line of an entry, as it is in the log.
#[must_use]
pub fn canonical_line(entry: &StoredEntry) -> String {
    let mut text = String::new();
    // What was read from a log can be written.
    entry.write(&mut text).map(|()| text).unwrap_or_default()
}

/// A field that may be missing.
fn text_field(out: &mut String, name: &str, text: Option<&str>) -> Result<(), String> {
    let Some(text) = text else { return Ok(()) };
    let _ = write!(out, ",\"{name}\":");
    quote(text, out)
}

const NOT_CANONICAL: &str = "is not in canonical form";

/// Reads JSON that must be exactly as this module would have written it.
pub(super) fn canonical_value(line: &[u8]) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| format!("is no JSON: {error}"))?;
    let mut text = String::with_capacity(line.len());
    canonical(&value, &mut text, 0)?;
    if text.as_bytes() == line { Ok(value) } else { Err(NOT_CANONICAL.to_owned()) }
}

/// Times as text with all nine digits, so that one time has one text.
mod rfc3339 {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn text(time: jiff::Timestamp) -> String {
        format!("{time:.9}")
    }

    pub(super) fn serialize<S: Serializer>(time: &jiff::Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&text(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<jiff::Timestamp, D::Error> {
        let given = String::deserialize(deserializer)?;
        let time = given.parse().map_err(|_| D::Error::custom("`time` is no RFC 3339 time"))?;
        if text(time) == given { Ok(time) } else { Err(D::Error::custom("`time` is not UTC with nine digits")) }
    }
}

/// Where in the log, and when.
pub(super) struct Place<'a> {
    pub(super) index: u64,
    pub(super) boot_id: &'a str,
}

/// When an entry was handed in.
#[derive(Debug, Clone, Copy)]
pub(super) struct When {
    pub(super) time: jiff::Timestamp,
    pub(super) monotonic_ns: u64,
}

/// The line of an entry, without the newline.
pub(super) fn line(mut fields: Map<String, Value>, when: When, place: &Place<'_>) -> Result<String, String> {
    fields.insert("index".to_owned(), place.index.into());
    fields.insert("boot_id".to_owned(), place.boot_id.into());
    fields.insert("monotonic_ns".to_owned(), when.monotonic_ns.into());
    fields.insert("time".to_owned(), rfc3339::text(when.time).into());
    let mut text = String::new();
    canonical(&Value::Object(fields), &mut text, 0)?;
    Ok(text)
}

/// JSON with sorted keys and no spaces. No floats: two programs print the same one differently.
fn canonical(value: &Value, out: &mut String, depth: usize) -> Result<(), String> {
    if depth > limits::AUDIT_DETAIL_DEPTH_MAX {
        return Err(format!("is nested deeper than {} levels", limits::AUDIT_DETAIL_DEPTH_MAX));
    }
    match value {
        Value::Number(number) if !number.is_i64() && !number.is_u64() => return Err(format!("has the float `{number}`")),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            write!(out, "{value}").map_err(|error| error.to_string())?;
        }
        Value::Array(elements) => {
            out.push('[');
            for (index, element) in elements.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                canonical(element, out, depth.saturating_add(1))?;
            }
            out.push(']');
        }
        Value::Object(fields) => canonical_fields(fields.iter(), out, depth)?,
    }
    Ok(())
}

fn canonical_fields<'a>(fields: impl Iterator<Item = (&'a String, &'a Value)>, out: &mut String, depth: usize) -> Result<(), String> {
    if depth > limits::AUDIT_DETAIL_DEPTH_MAX {
        return Err(format!("is nested deeper than {} levels", limits::AUDIT_DETAIL_DEPTH_MAX));
    }
    // A dependency makes serde_json keep the order of insertion, so sort here.
    let sorted: BTreeMap<&String, &Value> = fields.collect();
    out.push('{');
    for (index, (name, field)) in sorted.into_iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        quote(name, out)?;
        out.push(':');
        canonical(field, out, depth.saturating_add(1))?;
    }
    out.push('}');
    Ok(())
}

/// A JSON string.
fn quote(text: &str, out: &mut String) -> Result<(), String> {
    out.push_str(&serde_json::to_string(text).map_err(|error| error.to_string())?);
    Ok(())
}

/// Proof that an entry is on disk and covered by a signed checkpoint. Effects that need one take it by value, so it cannot be
/// spent twice.
#[derive(Debug)]
pub struct Receipt {
    index: u64,
    event: Event,
    migration: Option<MigrationId>,
}

impl Receipt {
    pub(super) fn new(index: u64, event: Event, migration: Option<MigrationId>) -> Self {
        Self { index, event, migration }
    }

    /// The entry's place in the log.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// What was recorded.
    #[must_use]
    pub fn event(&self) -> Event {
        self.event
    }

    /// The attempt that it was recorded for.
    #[must_use]
    pub fn migration(&self) -> Option<MigrationId> {
        self.migration
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().saturating_mul(2));
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// Exactly 32 bytes in lower-case hexadecimal.
pub(super) fn unhex32(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}
