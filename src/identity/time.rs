//! Seconds since the epoch, `SystemTime` and readable text.

use std::fmt;
use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;

/// Shows a time as RFC 3339 in UTC, to the second.
pub(super) struct Stamp(pub(super) SystemTime);

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::try_from(self.0).and_then(|stamp| jiff::Timestamp::from_second(stamp.as_second())) {
            Ok(stamp) => stamp.fmt(f),
            Err(_) => f.write_str("a time outside the calendar"),
        }
    }
}

/// The time of a count of seconds, which certificates may put before 1970.
pub(super) fn from_seconds(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { SystemTime::UNIX_EPOCH.checked_sub(distance) } else { SystemTime::UNIX_EPOCH.checked_add(distance) };
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The time of a moment given by rustls.
pub(super) fn from_unix(time: UnixTime) -> SystemTime {
    from_seconds(i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
}

/// For rustls; a clock before 1970 counts as 1970, where nothing is valid.
pub(super) fn to_unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// The inverse of [`from_seconds`].
pub(super) fn to_seconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
    }
}
