//! Entries in the forms of other people's collectors. What they are told is not evidence: they get no proof with it.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::audit::entry::{Event, Outcome, StoredEntry, canonical_line};

/// A form to export in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// The Open Cybersecurity Schema Framework 1.9.0, one JSON object a line: class 3002 for sessions, 6003 for all else.
    Ocsf,
    /// RFC 5424, facility 13 (log audit); the message is the entry as JSON behind the `@cee:` cookie.
    Syslog,
    /// The journal export format of systemd, as `systemd-journal-remote` reads it.
    Journal,
}

/// An entry of the log `origin` in a form; ends with a newline.
#[must_use]
pub fn export(entry: &StoredEntry, origin: &str, format: ExportFormat) -> String {
    match format {
        ExportFormat::Ocsf => format!("{}\n", ocsf(entry, origin)),
        ExportFormat::Syslog => syslog(entry, origin),
        ExportFormat::Journal => journal(entry, origin),
    }
}

/// How much somebody should care, as syslog counts (RFC 5424 section 6.2.1).
fn severity(entry: &StoredEntry) -> u8 {
    match entry.outcome {
        Some(Outcome::Failed | Outcome::InDoubt) => 3,
        Some(Outcome::Deny | Outcome::Refused) => 4,
        Some(Outcome::Cancelled) => 5,
        Some(Outcome::Done | Outcome::Allow) | None => 6,
    }
}

/// What kind of event it is for OCSF.
struct Class {
    class: u32,
    class_name: &'static str,
    category: u32,
    category_name: &'static str,
    activity: u32,
    activity_name: &'static str,
}

impl Class {
    fn of(event: Event) -> Self {
        let (activity, activity_name) = match event {
            Event::SessionOpened | Event::SessionRefused => (1, "Logon"),
            Event::SessionClosed => (2, "Logoff"),
            other => (99, other.as_str()),
        };
        let (class, class_name, category, category_name) = match activity {
            99 => (6003, "API Activity", 6, "Application Activity"),
            _ => (3002, "Authentication", 3, "Identity & Access Management"),
        };
        Self { class, class_name, category, category_name, activity, activity_name }
    }
}

fn ocsf(entry: &StoredEntry, origin: &str) -> Value {
    let Class { class, class_name, category, category_name, activity, activity_name } = Class::of(entry.event);
    let (status, status_name) = match entry.outcome {
        Some(Outcome::Done | Outcome::Allow) => (1, "Success"),
        Some(Outcome::Deny | Outcome::Refused | Outcome::Failed) => (2, "Failure"),
        Some(Outcome::Cancelled | Outcome::InDoubt) => (99, "Other"),
        None => (0, "Unknown"),
    };
    let (level, level_name) = match severity(entry) {
        3 => (4, "High"),
        4 => (3, "Medium"),
        5 => (2, "Low"),
        _ => (1, "Informational"),
    };
    let peer = entry.peer.as_deref().unwrap_or(origin);
    let mut object = json!({
        "activity_id": activity,
        "activity_name": activity_name,
        "category_uid": category,
        "category_name": category_name,
        "class_uid": class,
        "class_name": class_name,
        "type_uid": class * 100 + activity,
        "time": entry.time.as_millisecond(),
        "severity_id": level,
        "severity": level_name,
        "status_id": status,
        "status": status_name,
        "message": message(entry),
        "metadata": {
            "version": "1.9.0",
            "product": { "name": "Sealane", "vendor_name": "Sealane", "version": env!("CARGO_PKG_VERSION") },
            "uid": format!("{origin}#{}", entry.index),
            "sequence": entry.index,
            "log_name": origin,
            "event_code": entry.event.as_str(),
            "original_time": entry.time.to_string(),
        },
        "unmapped": { "boot_id": entry.boot_id, "monotonic_ns": entry.monotonic_ns, "detail": entry.detail },
    });
    let mut add = |name: &str, value: Value| {
        if let Some(fields) = object.as_object_mut() {
            fields.insert(name.to_owned(), value);
        }
    };
    if class == 3002 {
        add("user", json!({ "name": peer, "uid": peer, "type_id": 3, "type": "System" }));
        add("service", json!({ "name": "sealane", "uid": origin }));
    } else {
        add("actor", json!({ "app_name": "sealane", "app_uid": origin }));
        add("api", json!({ "operation": entry.event.as_str(), "service": { "name": "sealane" } }));
        add("src_endpoint", json!({ "name": peer }));
    }
    if let Some(vm) = &entry.vm {
        let mut resource = Map::from_iter([("type".to_owned(), json!("vm")), ("name".to_owned(), json!(vm))]);
        if let Some(uuid) = entry.uuid {
            resource.insert("uid".to_owned(), json!(uuid));
        }
        add("resources", json!([resource]));
    }
    if let (Some(migration), Some(metadata)) = (entry.migration, object.get_mut("metadata").and_then(Value::as_object_mut)) {
        metadata.insert("correlation_uid".to_owned(), json!(migration));
    }
    object
}

/// A line for people, on one line.
fn message(entry: &StoredEntry) -> String {
    let mut text = entry.event.as_str().to_owned();
    if let Some(outcome) = entry.outcome {
        let _ = write!(text, " {}", outcome.as_str());
    }
    if let Some(vm) = &entry.vm {
        let _ = write!(text, " vm={vm}");
    }
    if let Some(peer) = &entry.peer {
        let _ = write!(text, " peer={}", peer.escape_debug());
    }
    if let Some(Value::String(why)) = entry.detail.get("why") {
        let _ = write!(text, " why={}", why.escape_debug());
    }
    text
}

const FACILITY: u8 = 13;

fn syslog(entry: &StoredEntry, origin: &str) -> String {
    // Six digits are the most that the RFC takes, printable ASCII of a bounded length what it wants of a name.
    let host: String = origin.chars().filter(char::is_ascii_graphic).take(255).collect();
    let priority = FACILITY * 8 + severity(entry);
    let event = entry.event.as_str();
    format!("<{priority}>1 {:.6} {host} sealane - {event} - @cee: {}\n", entry.time, canonical_line(entry))
}

fn journal(entry: &StoredEntry, origin: &str) -> String {
    let mut text = String::new();
    let mut field = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{name}={value}");
    };
    field("__REALTIME_TIMESTAMP", &entry.time.as_microsecond());
    field("__MONOTONIC_TIMESTAMP", &(entry.monotonic_ns / 1000));
    field("_BOOT_ID", &entry.boot_id.replace('-', ""));
    field("MESSAGE", &message(entry));
    field("PRIORITY", &severity(entry));
    field("SYSLOG_FACILITY", &FACILITY);
    field("SYSLOG_IDENTIFIER", &"sealane");
    field("SEALANE_LOG", &origin);
    field("SEALANE_INDEX", &entry.index);
    field("SEALANE_EVENT", &entry.event.as_str());
    if let Some(outcome) = entry.outcome {
        field("SEALANE_OUTCOME", &outcome.as_str());
    }
    if let Some(vm) = &entry.vm {
        field("SEALANE_VM", vm);
    }
    if let Some(migration) = entry.migration {
        field("SEALANE_MIGRATION", &migration);
    }
    field("SEALANE_ENTRY", &canonical_line(entry));
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::entry::Entry;

    /// What OCSF 1.9.0 requires of the base event and of the two classes, and of the objects in them.
    #[test]
    fn ocsf_has_what_its_schema_requires_whatever_the_event() {
        for (event, outcome) in Event::ALL.iter().flat_map(|event| Outcome::ALL.iter().map(|outcome| (*event, *outcome))) {
            let entry = Entry::new(event).outcome(outcome);
            let stored = StoredEntry {
                index: 7,
                time: "2026-01-02T03:04:05.678901234Z".parse().unwrap(),
                monotonic_ns: 1,
                boot_id: "b".to_owned(),
                event,
                vm: None,
                uuid: None,
                migration: None,
                peer: None,
                outcome: entry.outcome,
                detail: entry.detail,
            };
            let object = ocsf(&stored, "sealane/dc1.test/a");
            let number = |name: &str| object[name].as_u64().unwrap_or_else(|| panic!("{event:?}: `{name}` in {object}"));
            let class = number("class_uid");
            assert_eq!(number("category_uid"), class / 1000);
            assert_eq!(number("type_uid"), class * 100 + number("activity_id"));
            assert_eq!(number("time"), 1_767_323_045_678);
            assert!((1..=6).contains(&number("severity_id")) && [0, 1, 2, 99].contains(&number("status_id")), "{object}");
            let metadata = &object["metadata"];
            assert!(metadata["version"] == "1.9.0" && metadata["product"]["vendor_name"].is_string(), "{object}");
            match class {
                3002 => {
                    assert!([1, 2].contains(&number("activity_id")) && object["user"]["name"].is_string(), "{object}");
                    // At least one of these.
                    assert!(object["service"]["name"].is_string() || object["dst_endpoint"].is_object(), "{object}");
                }
                6003 => {
                    assert!(object["actor"]["app_name"].is_string() && object["api"]["operation"].is_string(), "{object}");
                    assert!(object["src_endpoint"]["name"].is_string(), "{object}");
                    assert_eq!(object["activity_name"], event.as_str(), "an activity 99 has a name of its own");
                }
                other => panic!("class {other}"),
            }
        }
    }
}
