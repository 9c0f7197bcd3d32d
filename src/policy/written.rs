//! Questions as people write them, in JSON: what is wrong with one is said with its field and what was expected there.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::limits;
use crate::policy::facts::{MigrationContext, Storage, Stream};

/// Reads a text.
pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let read = serde_path_to_error::deserialize(&mut reader).map_err(|error| said("", &error))?;
    reader.end().map_err(|error| error.to_string())?;
    Ok(read)
}

/// Reads a value, which stands under this name.
pub(super) fn read_value<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| said(name, &error))
}

/// `` `context.stream.lanes`: expected a whole number from 0 to 65535, got string "many" ``
fn said(name: &str, error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let within = error.path().to_string();
    let place = [name, within.as_str()].into_iter().filter(|part| !part.is_empty() && *part != ".").collect::<Vec<_>>().join(".");
    let what = in_plain_words(&error.inner().to_string());
    if place.is_empty() { what } else { format!("`{place}`: {what}") }
}

/// What Rust calls the types of fields, and what people do.
const TYPES: [(&str, &str); 8] = [
    ("u16", "a whole number from 0 to 65535"),
    ("u32", "a whole number from 0 to 4294967295"),
    ("u64", "a whole number that is not negative"),
    ("i64", "a whole number"),
    ("a boolean", "true or false"),
    ("a string", "a text"),
    ("a map", "an object"),
    ("a sequence", "a list"),
];

fn in_plain_words(error: &str) -> String {
    let Some((got, expected)) = error.split_once(", expected ").filter(|(got, _)| got.starts_with("invalid ")) else {
        return error.to_owned();
    };
    let (expected, place) = expected.split_once(" at line ").map_or((expected, None), |(expected, place)| (expected, Some(place)));
    let expected = match TYPES.iter().find(|(rust, _)| *rust == expected) {
        Some((_, plain)) => plain,
        None if expected.starts_with("struct ") => "an object",
        None => expected,
    };
    let got = got.split_once(": ").map_or(got, |(_, got)| got);
    let got = match got {
        "map" => "an object",
        "sequence" => "a list",
        "null" | "unit value" => "nothing",
        // A list could stand for an object, of which each field is one.
        length if length.starts_with("invalid length ") => "a list",
        other => other,
    };
    let place = place.map(|place| format!(" at line {place}")).unwrap_or_default();
    format!("expected {expected}, got {got}{place}")
}

/// What no migration has, so that an answer would mislead.
pub(super) fn possible(context: &MigrationContext) -> Result<(), String> {
    possible_stream(&context.stream)?;
    let most = limits::RAM_BYTES_MAX >> 20;
    if context.memory_mib > most {
        return Err(format!("`context.memoryMiB`: expected at most {most}, got `{}`", context.memory_mib));
    }
    if context.stream.storage == Storage::None && context.disk_count > 0 {
        let count = context.disk_count;
        return Err(format!("`context.diskCount`: expected 0 where `context.stream.storage` is `none`, or is not there, got `{count}`"));
    }
    if context.disk_count == 0 && context.disk_mib > 0 {
        return Err(format!("`context.diskMiB`: expected 0 where `context.diskCount` is, got `{}`", context.disk_mib));
    }
    Ok(())
}

/// The same of the terms.
pub(super) fn possible_stream(stream: &Stream) -> Result<(), String> {
    if (1..=limits::LANES_MAX).contains(&stream.lanes) {
        return Ok(());
    }
    Err(format!("`context.stream.lanes`: expected 1 to {}, got `{}`", limits::LANES_MAX, stream.lanes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_json() {
        for (error, plain) in [
            ("invalid type: string \"many\", expected u16", "expected a whole number from 0 to 65535, got string \"many\""),
            (
                "invalid value: integer `-1`, expected u64 at line 3 column 7",
                "expected a whole number that is not negative, got integer `-1` at line 3 column 7",
            ),
            ("invalid type: sequence, expected struct Route", "expected an object, got a list"),
            ("invalid type: null, expected a map", "expected an object, got nothing"),
            ("invalid length 0, expected struct Stream with 7 elements", "expected an object, got a list"),
            ("missing field `srcSite`", "missing field `srcSite`"),
            ("unknown field `lane`, expected one of `mode`, `lanes`", "unknown field `lane`, expected one of `mode`, `lanes`"),
        ] {
            assert_eq!(in_plain_words(error), plain);
        }
    }
}
