//! Bandwidths, sizes and durations as people write them: always with a unit.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A quantity that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {kind} `{value}`: expected {expected}")]
pub struct InvalidQuantity {
    /// `bandwidth`, `size` or `duration`.
    pub kind: &'static str,
    /// As given, cut to a printable length.
    pub value: String,
    /// What it should look like.
    pub expected: &'static str,
    /// What was probably meant.
    pub hint: Option<String>,
}

/// An amount of data per time, as bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bandwidth {
    /// The whole bytes of one second; at least one.
    pub bytes_per_second: u64,
}

/// An amount of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize {
    /// In bytes.
    pub bytes: u64,
}

/// A length of time, to the microsecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimeSpan {
    /// As the standard library has it.
    pub duration: Duration,
}

impl Bandwidth {
    const EXPECTED: &'static str = "a number with a unit, e.g. `1Gbit`, `100Mbit` or `10MiB/s`";
}

impl ByteSize {
    const EXPECTED: &'static str = "a number with a unit, e.g. `256MiB` or `1GB`";
}

impl TimeSpan {
    const EXPECTED: &'static str = "a number with a unit, e.g. `300ms`, `90s` or `1h30m`";
}

impl FromStr for Bandwidth {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let refuse = |hint: Option<String>| refusal("bandwidth", text, Self::EXPECTED, hint);
        let (number, unit) = split_number(text).ok_or_else(|| refuse(None))?;
        if unit.is_empty() {
            return Err(refuse(Some(format!("write `{}Mbit` or `{}MiB/s`", number.text, number.text))));
        }
        let unit = unit.strip_suffix("/s").unwrap_or(unit);
        // In bits, so that both families are whole numbers.
        let bits = match bit_unit(unit).or_else(|| byte_unit(unit).map(|bytes| bytes * 8)) {
            Some(factor) => number.times(factor).ok_or_else(|| refuse(Some("that is too much".to_owned())))?,
            None => return Err(refuse(ambiguous(number.text, unit, "Mbit", "MiB/s"))),
        };
        let bytes = u64::try_from(bits / 8).map_err(|_| refuse(Some("that is too much".to_owned())))?;
        if bytes == 0 {
            return Err(refuse(Some("use at least `8bit`; leave it out for no limit".to_owned())));
        }
        Ok(Self { bytes_per_second: bytes })
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from(self.bytes_per_second) * 8;
        let bytes = u128::from(self.bytes_per_second);
        let exact = |amount: u128, units: &[(&'static str, u128)]| {
            units.iter().rev().find(|(_, factor)| amount.is_multiple_of(*factor)).map(|(name, factor)| (amount / factor, *name))
        };
        // Whichever family says it in fewer digits.
        let decimal = exact(bits, &BIT_UNITS).unwrap_or((bits, "bit"));
        let binary = exact(bytes, &IEC_UNITS).unwrap_or((bytes, "B"));
        if decimal.0 <= binary.0 { write!(f, "{}{}/s", decimal.0, decimal.1) } else { write!(f, "{}{}/s", binary.0, binary.1) }
    }
}

impl FromStr for ByteSize {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let refuse = |hint: Option<String>| refusal("size", text, Self::EXPECTED, hint);
        let (number, unit) = split_number(text).ok_or_else(|| refuse(None))?;
        if unit.is_empty() {
            return Err(refuse(Some(format!("write `{}MiB` or `{}GiB`", number.text, number.text))));
        }
        let factor = byte_unit(unit).ok_or_else(|| refuse(ambiguous(number.text, unit, "MiB", "MB")))?;
        let bytes = number.times(factor).and_then(|bytes| u64::try_from(bytes).ok());
        bytes.map(|bytes| Self { bytes }).ok_or_else(|| refuse(Some("that is too much".to_owned())))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = u128::from(self.bytes);
        let exact = IEC_UNITS.iter().chain(&SI_UNITS).filter(|(_, factor)| bytes != 0 && bytes.is_multiple_of(*factor));
        let (name, factor) = exact.min_by_key(|(_, factor)| bytes / factor).copied().unwrap_or(("B", 1));
        write!(f, "{}{name}", bytes / factor)
    }
}

impl FromStr for TimeSpan {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let refuse = |hint: Option<String>| refusal("duration", text, Self::EXPECTED, hint);
        let mut rest = text;
        let mut microseconds: u128 = 0;
        while !rest.is_empty() {
            let (number, tail) = split_number(rest).ok_or_else(|| refuse(None))?;
            let end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
            let (unit, after) = tail.split_at(end);
            if unit.is_empty() {
                return Err(refuse(Some(format!("write `{}ms` or `{}s`", number.text, number.text))));
            }
            let factor = TIME_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(|| refuse(None))?;
            let part = number.times(factor).ok_or_else(|| refuse(Some("that is too long".to_owned())))?;
            microseconds = microseconds.saturating_add(part);
            rest = after;
        }
        if text.is_empty() {
            return Err(refuse(None));
        }
        let whole = u64::try_from(microseconds).map_err(|_| refuse(Some("that is too long".to_owned())))?;
        Ok(Self { duration: Duration::from_micros(whole) })
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let microseconds = self.duration.as_micros();
        if microseconds == 0 {
            return f.write_str("0s");
        }
        let mut rest = microseconds;
        for (name, factor) in [("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)] {
            if rest >= factor {
                write!(f, "{}{name}", rest / factor)?;
                rest %= factor;
            }
        }
        Ok(())
    }
}

fn refusal(kind: &'static str, value: &str, expected: &'static str, hint: Option<String>) -> InvalidQuantity {
    InvalidQuantity { kind, value: value.chars().take(40).flat_map(char::escape_default).collect(), expected, hint }
}

fn ambiguous(number: &str, unit: &str, first: &str, second: &str) -> Option<String> {
    let upper = unit.to_ascii_uppercase();
    let vague = ["K", "M", "G", "T", "KB", "MB", "GB", "TB", "KBPS", "MBPS", "GBPS"];
    vague.contains(&upper.as_str()).then(|| format!("`{unit}` can mean several things; write e.g. `{number}{first}` or `{number}{second}`"))
}

/// A decimal number as digits, so that `1.1GiB` is exact.
#[derive(Clone, Copy)]
struct Number<'t> {
    text: &'t str,
    digits: u128,
    scale: u128,
}

impl Number<'_> {
    fn times(self, factor: u128) -> Option<u128> {
        self.digits.checked_mul(factor).map(|product| product / self.scale)
    }
}

/// Splits `10.5 MiB` into the number and `MiB`.
fn split_number(text: &str) -> Option<(Number<'_>, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // LIMIT: 20 digits are more than any u64; 9 behind the point are a billionth.
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') || whole.len() > 20 || fraction.len() > 9 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits = whole.parse::<u128>().ok()?.checked_mul(scale)?.checked_add(fraction.parse::<u128>().ok()?)?;
    Some((Number { text: number, digits, scale }, unit.strip_prefix(' ').unwrap_or(unit)))
}

fn bit_unit(unit: &str) -> Option<u128> {
    BIT_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, factor)| *factor)
}

fn byte_unit(unit: &str) -> Option<u128> {
    let unit = if unit == "KB" { "kB" } else { unit };
    IEC_UNITS.iter().chain(&SI_UNITS).find(|(name, _)| *name == unit).map(|(_, factor)| *factor)
}

const BIT_UNITS: [(&str, u128); 5] =
    [("bit", 1), ("kbit", 1_000), ("Mbit", 1_000_000), ("Gbit", 1_000_000_000), ("Tbit", 1_000_000_000_000)];
const IEC_UNITS: [(&str, u128); 5] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
const SI_UNITS: [(&str, u128); 4] = [("kB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000)];
/// In microseconds.
const TIME_UNITS: [(&str, u128); 7] =
    [("us", 1), ("ms", 1_000), ("s", 1_000_000), ("m", 60_000_000), ("min", 60_000_000), ("h", 3_600_000_000), ("d", 86_400_000_000)];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bandwidths_are_read_in_bits_and_bytes() {
        for (text, bytes, shown) in [
            ("1Gbit", 125_000_000, "1Gbit/s"),
            ("1gbit/s", 125_000_000, "1Gbit/s"),
            ("100Mbit", 12_500_000, "100Mbit/s"),
            ("10MiB/s", 10 << 20, "10MiB/s"),
            ("10 MB/s", 10_000_000, "80Mbit/s"),
            ("2.5Gbit", 312_500_000, "2500Mbit/s"),
            ("8bit", 1, "1B/s"),
        ] {
            let bandwidth: Bandwidth = text.parse().unwrap();
            assert_eq!((bandwidth.bytes_per_second, bandwidth.to_string().as_str()), (bytes, shown), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_in_binary_and_decimal_units() {
        for (text, bytes, shown) in [
            ("256MiB", 256 << 20, "256MiB"),
            ("1GB", 1_000_000_000, "1GB"),
            ("1.5GiB", 3 << 29, "1536MiB"),
            ("0B", 0, "0B"),
            ("4096B", 4096, "4KiB"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!((size.bytes, size.to_string().as_str()), (bytes, shown), "{text}");
        }
    }

    #[test]
    fn durations_are_read_with_one_or_several_units() {
        for (text, milliseconds, shown) in [
            ("300ms", 300, "300ms"),
            ("1h", 3_600_000, "1h"),
            ("1h30m", 5_400_000, "1h30m"),
            ("1.5s", 1500, "1s500ms"),
            ("2min", 120_000, "2m"),
            ("1d", 86_400_000, "24h"),
        ] {
            let span: TimeSpan = text.parse().unwrap();
            assert_eq!((span.duration, span.to_string().as_str()), (Duration::from_millis(milliseconds), shown), "{text}");
        }
    }

    #[test]
    fn a_bare_number_is_refused_with_a_hint() {
        assert_eq!("100".parse::<Bandwidth>().unwrap_err().hint.unwrap(), "write `100Mbit` or `100MiB/s`");
        assert_eq!("512".parse::<ByteSize>().unwrap_err().hint.unwrap(), "write `512MiB` or `512GiB`");
        assert_eq!("300".parse::<TimeSpan>().unwrap_err().hint.unwrap(), "write `300ms` or `300s`");
    }

    #[test]
    fn units_that_mean_several_things_are_refused_with_a_hint() {
        for text in ["10M", "10mb", "1Mb", "10mbps", "1G"] {
            assert!(text.parse::<Bandwidth>().unwrap_err().hint.unwrap().contains("several things"), "{text}");
        }
        assert!("10G".parse::<ByteSize>().unwrap_err().hint.is_some());
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "Gbit",
            "-1Gbit",
            "1.2.3Gbit",
            "1e9bit",
            "0Gbit",
            "1Gbit extra",
            "99999999999999999999999Gbit",
            "1 Gbit",
            "1.Gbit",
            ".5Gbit",
        ] {
            let result = text.parse::<Bandwidth>();
            assert_eq!(result.is_err(), text != "1 Gbit", "{text}: {result:?}");
        }
        for text in ["", "ms", "1 h 2", "5 fortnights", "99999999999999999999d", "-1s", "1h-2m"] {
            assert!(text.parse::<TimeSpan>().is_err(), "{text}");
        }
        assert!("18446744073709551616B".parse::<ByteSize>().is_err());
        assert_eq!("18446744073709551615B".parse::<ByteSize>().unwrap().bytes, u64::MAX);
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back_as_the_same_value(value in 1u64..u64::MAX / 8, small in 1u64..100_000) {
            for n in [value, small, small << 20, small * 1_000_000] {
                let bandwidth = Bandwidth { bytes_per_second: n };
                prop_assert_eq!(bandwidth.to_string().parse::<Bandwidth>().unwrap(), bandwidth);
                let size = ByteSize { bytes: n };
                prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
                let span = TimeSpan { duration: Duration::from_micros(n) };
                prop_assert_eq!(span.to_string().parse::<TimeSpan>().unwrap(), span);
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,30}") {
            let _ = (text.parse::<Bandwidth>(), text.parse::<ByteSize>(), text.parse::<TimeSpan>());
        }
    }
}
