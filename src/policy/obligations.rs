//! What a permit asks of the stream, as annotations on it. All permits that match are obeyed, the strictest first.
//!
//! ```cedar
//! @id("acme-to-dc2")
//! @require_durability("both")
//! @require_compression_scope("page")
//! @max_bandwidth("500Mbit/s")
//! permit (…);
//! ```
//!
//! | annotation | value | the stream |
//! |---|---|---|
//! | `require_compression` | `none` | is not compressed |
//! | `require_compression_scope` | `page`, `batch` | looks back no further |
//! | `require_length_padding` | `true` | has padded frames |
//! | `require_durability` | `dest`, `both` | has its image on disk there before the switch, or at more places |
//! | `require_post_quantum` | `true` | has a key exchange that a quantum computer does not break |
//! | `require_mode` | `precopy` | moves all memory before the switch |
//! | `max_lanes` | `1` and up | has at most so many lanes |
//! | `max_bandwidth` | `100Mbit/s` | takes at most that much; the source sees to it, also where the destination's policy asks |

use std::fmt;

use cedar_policy::{ActionConstraint, Effect, Policy};

use crate::limits;
use crate::policy::facts::{Codec, CodecScope, Durability, Mode, Stream};
use crate::policy::permit::{Action, Resolve};

/// The key exchange that counts as post-quantum.
const POST_QUANTUM: &str = "X25519MLKEM768";
/// For people: names that change nothing.
const NOTES: [&str; 2] = ["id", "note"];

/// What permits ask of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Obligations {
    no_compression: bool,
    compression_scope: Option<CodecScope>,
    length_padding: bool,
    durability: Option<Durability>,
    post_quantum: bool,
    mode: Option<Mode>,
    lanes_max: Option<u16>,
    bandwidth_max: Option<u64>,
}

impl Obligations {
    /// Those of one policy. An annotation that is not known would be an obligation that nobody keeps.
    pub(super) fn of(policy: &Policy) -> Result<Self, String> {
        let mut own = Self::default();
        for (name, value) in policy.annotations().filter(|(name, _)| !NOTES.contains(name)) {
            own.read(name, value)?;
        }
        if own == Self::default() {
            return Ok(own);
        }
        if policy.effect() == Effect::Forbid {
            return Err("a forbid cannot ask anything of the stream, expected a permit".to_owned());
        }
        let only = |name: &str| match policy.action_constraint() {
            ActionConstraint::Any => false,
            ActionConstraint::Eq(uid) => uid.id().unescaped() == name,
            ActionConstraint::In(uids) => uids.iter().all(|uid| uid.id().unescaped() == name),
        };
        if only(Resolve::NAME) {
            return Err(format!("`{}` is about no stream: nothing can be asked of it", Resolve::NAME));
        }
        Ok(own)
    }

    fn read(&mut self, name: &str, value: &str) -> Result<(), String> {
        let wrong = |expected: &str| format!("`@{name}` is `{value}`, expected {expected}");
        match name {
            "require_compression" if value == Codec::None.as_str() => self.no_compression = true,
            "require_compression" => return Err(wrong("`none`")),
            "require_compression_scope" => {
                let scope = [CodecScope::Page, CodecScope::Batch].into_iter().find(|scope| scope.as_str() == value);
                self.compression_scope = Some(scope.ok_or_else(|| wrong("`page` or `batch`"))?);
            }
            "require_length_padding" if value == "true" => self.length_padding = true,
            "require_post_quantum" if value == "true" => self.post_quantum = true,
            "require_length_padding" | "require_post_quantum" => return Err(wrong("`true`")),
            "require_durability" => {
                let place = [Durability::Dest, Durability::Both].into_iter().find(|place| place.as_str() == value);
                self.durability = Some(place.ok_or_else(|| wrong("`dest` or `both`"))?);
            }
            "require_mode" if value == Mode::Precopy.as_str() => self.mode = Some(Mode::Precopy),
            "require_mode" => return Err(wrong("`precopy`: no other mode can be asked for")),
            "max_lanes" => {
                let lanes = value.parse().ok().filter(|lanes| (1..=limits::LANES_MAX).contains(lanes));
                self.lanes_max = Some(lanes.ok_or_else(|| wrong(&format!("1 to {}", limits::LANES_MAX)))?);
            }
            "max_bandwidth" => {
                let bandwidth = bytes_per_second(value);
                self.bandwidth_max = Some(bandwidth.ok_or_else(|| wrong("a whole number and `kbit/s`, `Mbit/s` or `Gbit/s`"))?);
            }
            _ => return Err(format!("unknown annotation `@{name}`, expected `@note` or one of {NAMES}")),
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The strictest of both.
    pub(super) fn merge(&mut self, other: &Self) {
        let least = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        self.no_compression |= other.no_compression;
        self.compression_scope = self.compression_scope.into_iter().chain(other.compression_scope).min_by_key(|scope| reach(*scope));
        self.length_padding |= other.length_padding;
        self.durability = self.durability.into_iter().chain(other.durability).max_by_key(|place| places(*place));
        self.post_quantum |= other.post_quantum;
        self.mode = self.mode.or(other.mode);
        self.lanes_max = self.lanes_max.into_iter().chain(other.lanes_max).min();
        self.bandwidth_max = least(self.bandwidth_max, other.bandwidth_max);
    }

    /// The stream with what can be changed about it changed.
    pub(super) fn tighten(&self, stream: &Stream) -> Stream {
        let mut stream = stream.clone();
        if self.no_compression {
            stream.compression = Codec::None;
        }
        if let Some(scope) = self.compression_scope.filter(|scope| reach(*scope) < reach(stream.compression_scope)) {
            stream.compression_scope = scope;
        }
        stream.length_padding |= self.length_padding;
        if let Some(place) = self.durability.filter(|place| places(*place) > places(stream.durability)) {
            stream.durability = place;
        }
        self.fewer_lanes(stream)
    }

    /// The stream with as many lanes as it may have: all that a destination can change.
    pub(super) fn fewer_lanes(&self, mut stream: Stream) -> Stream {
        stream.lanes = self.lanes_max.map_or(stream.lanes, |most| most.min(stream.lanes));
        stream
    }

    /// What is asked and not so, in words. `kx` is the session's key exchange, once there is a session.
    pub(super) fn unmet(&self, stream: &Stream, kx: Option<&str>) -> Option<String> {
        let mut unmet = Vec::new();
        let mut want = |kept: bool, what: String| {
            if !kept {
                unmet.push(what);
            }
        };
        want(
            !self.no_compression || stream.compression == Codec::None,
            format!("compression `none`, and it is `{}`", stream.compression.as_str()),
        );
        if let Some(scope) = self.compression_scope {
            // Without a codec nothing looks back, but equal pages are found in the scope.
            let (least, is) = (scope.as_str(), stream.compression_scope);
            want(reach(is) <= reach(scope), format!("compression scope `{least}`, and it is `{}`", is.as_str()));
        }
        want(!self.length_padding || stream.length_padding, "padded frames, and they are not".to_owned());
        if let Some(place) = self.durability {
            let is = stream.durability;
            want(places(is) >= places(place), format!("durability `{}`, and it is `{}`", place.as_str(), is.as_str()));
        }
        if let Some(kx) = kx.filter(|_| self.post_quantum) {
            want(kx == POST_QUANTUM, format!("key exchange `{POST_QUANTUM}`, and it is `{kx}`"));
        }
        if let Some(mode) = self.mode {
            want(stream.mode == mode, format!("mode `{}`, and it is `{}`", mode.as_str(), stream.mode.as_str()));
        }
        if let Some(most) = self.lanes_max {
            want(stream.lanes <= most, format!("at most {most} lanes, and there are {}", stream.lanes));
        }
        (!unmet.is_empty()).then(|| unmet.join("; "))
    }

    /// Most that may be sent, in bytes a second.
    #[must_use]
    pub fn bandwidth_max(&self) -> Option<u64> {
        self.bandwidth_max
    }
}

impl fmt::Display for Obligations {
    /// As annotations are written, without their `@`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let mut put = |name: &str, value: Option<String>| parts.extend(value.map(|value| format!("{name}={value}")));
        put("require_compression", self.no_compression.then(|| "none".to_owned()));
        put("require_compression_scope", self.compression_scope.map(|scope| scope.as_str().to_owned()));
        put("require_length_padding", self.length_padding.then(|| "true".to_owned()));
        put("require_durability", self.durability.map(|place| place.as_str().to_owned()));
        put("require_post_quantum", self.post_quantum.then(|| "true".to_owned()));
        put("require_mode", self.mode.map(|mode| mode.as_str().to_owned()));
        put("max_lanes", self.lanes_max.map(|most| most.to_string()));
        put("max_bandwidth", self.bandwidth_max.map(|most| format!("{} bytes/s", most)));
        f.write_str(&parts.join(", "))
    }
}

const NAMES: &str = "`@require_compression`, `@require_compression_scope`, `@require_length_padding`, `@require_durability`, \
    `@require_post_quantum`, `@require_mode`, `@max_lanes`, `@max_bandwidth`";

/// How far a codec looks.
fn reach(scope: CodecScope) -> u8 {
    match scope {
        CodecScope::Page => 0,
        CodecScope::Batch => 1,
        CodecScope::Stream => 2,
    }
}

/// At how many places the image is.
fn places(durability: Durability) -> u8 {
    match durability {
        Durability::None => 0,
        Durability::Dest => 1,
        Durability::Both => 2,
    }
}

/// `100Mbit/s`, in bytes.
fn bytes_per_second(text: &str) -> Option<u64> {
    let (number, factor) = [("Gbit/s", 125_000_000), ("Mbit/s", 125_000), ("kbit/s", 125)]
        .into_iter()
        .find_map(|(unit, factor)| text.strip_suffix(unit).map(|number| (number, factor)))?;
    if !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|bytes| *bytes > 0)
}
