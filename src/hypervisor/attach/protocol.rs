//! Messages of the attach protocol; `docs/vmm-protocol.md` is the specification.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::wire::WireError;
use crate::hypervisor::{GuestStatus, Machine, RunState};
use crate::limits;

/// The one version of the attach protocol that this library speaks.
pub const ATTACH_VERSION: u32 = 1;

/// What a connection may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Role {
    /// Everything; one connection at a time.
    Control,
    /// `status` only; several at a time.
    Observe,
}

/// What a gateway asks of a VMM. State follows `restore-state` as payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    Hello { version: u32, role: Role },
    Machine,
    Memory,
    TrackStart,
    Harvest,
    TrackStop,
    Throttle { percent: u8 },
    Pause,
    Resume,
    Renew,
    SaveState,
    Prepare { machine: Machine },
    RestoreState,
    Status,
    Quit,
}

impl Request {
    /// The name that the specification and messages to people use.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Machine => "machine",
            Self::Memory => "memory",
            Self::TrackStart => "track-start",
            Self::Harvest => "harvest",
            Self::TrackStop => "track-stop",
            Self::Throttle { .. } => "throttle",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Renew => "renew",
            Self::SaveState => "save-state",
            Self::Prepare { .. } => "prepare",
            Self::RestoreState => "restore-state",
            Self::Status => "status",
            Self::Quit => "quit",
        }
    }

    /// The longest payload that may follow the request.
    pub(super) fn payload_bytes_max(&self) -> usize {
        match self {
            Self::RestoreState => limits::STATE_BYTES_MAX,
            _ => 0,
        }
    }
}

/// What a VMM says when a gateway attaches: all that an earlier gateway may have left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Version of the protocol that the VMM will speak.
    pub version: u32,
    /// A number that no other VMM process has, as text: tells a restarted VMM from this one.
    pub instance: String,
    /// Whether vCPUs execute.
    pub state: RunState,
    /// Whether an incoming VMM has built its twin.
    pub prepared: bool,
    /// Whether dirty pages are being recorded.
    pub tracking: bool,
    /// vCPU time taken away from the guest.
    pub throttle_percent: u8,
}

/// Why a VMM refuses a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RefusalCode {
    /// Another gateway controls the guest.
    Busy,
    /// The connection may not ask this.
    Forbidden,
    /// The VMM does not speak this version.
    Version,
    /// The VMM does not know the request.
    Unknown,
    /// The request is known but not now.
    Order,
    /// The message breaks a bound or is malformed.
    Malformed,
    /// The VMM tried and could not.
    Failed,
}

/// What a VMM answers. `harvest` and `state` are followed by payload; `memory` carries one
/// file descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Answer {
    Hello(Attachment),
    Machine(Machine),
    Memory,
    Done,
    Harvest { pages: u64 },
    State,
    Status(GuestStatus),
    Incompatible { lacks: Vec<String> },
    Refused { code: RefusalCode, reason: String },
}

/// Header of every request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RequestHeader<T> {
    pub(super) sequence: u64,
    pub(super) request: T,
}

/// Header of every answer; `sequence` is that of the request, or 0 when the connection is refused.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AnswerHeader {
    pub(super) sequence: u64,
    pub(super) answer: Answer,
}

/// Parses a header.
pub(super) fn parse<T: DeserializeOwned>(header: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(header).map_err(WireError::Json)
}

/// Text from the other side, cut to `bytes_max` and without control characters.
pub(in crate::hypervisor) fn printable(text: &str, bytes_max: usize) -> String {
    let mut out = String::new();
    for character in text.chars() {
        let mut piece = String::new();
        if character.is_control() {
            piece.extend(character.escape_default());
        } else {
            piece.push(character);
        }
        if out.len() + piece.len() > bytes_max {
            break;
        }
        out.push_str(&piece);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(request: &Request) {
        let bytes = serde_json::to_vec(&RequestHeader { sequence: 9, request }).unwrap();
        assert_eq!(parse::<RequestHeader<Request>>(&bytes).unwrap().request, *request);
        assert!(String::from_utf8(bytes).unwrap().contains(request.name()));
    }

    #[test]
    fn requests_round_trip_under_the_names_of_the_specification() {
        for request in [
            Request::Hello { version: 1, role: Role::Control },
            Request::Machine,
            Request::Memory,
            Request::TrackStart,
            Request::Harvest,
            Request::TrackStop,
            Request::Throttle { percent: 20 },
            Request::Pause,
            Request::Resume,
            Request::Renew,
            Request::SaveState,
            Request::RestoreState,
            Request::Status,
            Request::Quit,
        ] {
            round_trip(&request);
        }
    }

    #[test]
    fn headers_with_unknown_fields_or_wrong_types_are_refused() {
        for text in [
            "",
            "{",
            "[]",
            r#"{"sequence":1}"#,
            r#"{"sequence":-1,"request":"pause"}"#,
            r#"{"sequence":1,"request":"pause","extra":1}"#,
            r#"{"sequence":1,"request":{"throttle":{"percent":300}}}"#,
            r#"{"sequence":1,"request":{"throttle":{"percent":3,"x":1}}}"#,
            r#"{"sequence":1,"request":{"hello":{"version":1}}}"#,
            r#"{"sequence":18446744073709551616,"request":"pause"}"#,
        ] {
            assert!(parse::<RequestHeader<Request>>(text.as_bytes()).is_err(), "{text}");
        }
        let deep = format!("{{\"sequence\":1,\"request\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
        assert!(parse::<RequestHeader<serde_json::Value>>(deep.as_bytes()).is_err());
    }

    #[test]
    fn words_of_the_other_side_cannot_write_on_a_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n", 64), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable("äää", 3), "ä");
    }
}
