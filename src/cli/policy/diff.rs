//! `policy diff`: which of the decisions in an audit log other policies would make otherwise.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::super::Ending;
use super::super::output::{Out, Tone, printable};
use super::{load_or_refuse, plural};
use crate::audit::{self, Event, Filter, StoredEntry};
use crate::control::Exit;
use crate::policy::{Entities, PolicySet, Verdict, WrittenQuestion};
use crate::telemetry::{ErrorClass, Problem, chain, schema_tag};

schema_tag!(
    /// Schema of `policy diff --json`.
    DiffSchema = "sealane.policy-diff/1"
);

#[derive(Serialize)]
struct Object {
    schema: DiffSchema,
    /// Decisions that were asked again.
    asked: usize,
    /// Decisions whose entries do not say what they were made from, or say what cannot be.
    skipped: usize,
    changed: Vec<Changed>,
}

/// A decision that comes out otherwise.
#[derive(Serialize)]
struct Changed {
    index: u64,
    time: String,
    vm: Option<String>,
    action: String,
    principal: String,
    old: Side,
    new: Side,
}

#[derive(Serialize)]
struct Side {
    decision: &'static str,
    why: String,
    policy_ids: Vec<String>,
}

impl From<Verdict> for Side {
    fn from(verdict: Verdict) -> Self {
        Self { decision: if verdict.allowed { "allow" } else { "deny" }, why: verdict.why, policy_ids: verdict.policy_ids }
    }
}

pub(super) fn diff(old: &Path, new: &Path, log: &Path, out: Out) -> Ending {
    let sets = (load_or_refuse(old, &Entities::default())?, load_or_refuse(new, &Entities::default())?);
    let unreadable = |error: &audit::AuditError| Problem::new(ErrorClass::Misuse, chain(error)).with_code("audit");
    let filter = Filter { event: Some(Event::Decision), ..Filter::default() };
    let (mut asked, mut skipped, mut changed) = (0, 0, Vec::new());
    for entry in audit::read(log, filter).map_err(|error| unreadable(&error))? {
        let entry = entry.map_err(|error| unreadable(&error).with_hint("`sealane audit verify` says what is wrong with the log"))?;
        match question(&entry).and_then(|question| compare(&entry, &question, &sets).ok()) {
            Some(difference) => {
                asked += 1;
                changed.extend(difference);
            }
            None => skipped += 1,
        }
    }
    let count = changed.len();
    let talk = format!("{count} of {asked} {} would change", plural(asked, "decision", "decisions"));
    if out.json {
        out.object(&Object { schema: DiffSchema, asked, skipped, changed });
    } else {
        out.data(&changed.iter().map(|changed| text(out, changed)).collect::<String>());
        out.talk(&talk);
    }
    if skipped > 0 {
        out.talk(&format!("{skipped} could not be asked again: their entries do not say what they were made from, or say what cannot be"));
    }
    Ok(if count == 0 { Exit::Done } else { Exit::Failed })
}

/// What was asked; none where the entry does not say it, or not in a form of this version.
fn question(entry: &StoredEntry) -> Option<WrittenQuestion> {
    let facts = entry.detail.get("facts")?;
    let (action, principal, resource) = (entry.detail.get("action")?, entry.peer.as_ref()?, entry.uuid?);
    let question = json!({
        "action": action,
        "principal": principal,
        "resource": resource,
        "context": facts.get("context")?,
        "entities": facts.get("entities")?,
    });
    serde_json::from_value(question).ok()
}

fn compare(entry: &StoredEntry, question: &WrittenQuestion, (old, new): &(PolicySet, PolicySet)) -> Result<Option<Changed>, String> {
    let (old, new) = (question.ask(old)?, question.ask(new)?);
    if old.allowed == new.allowed {
        return Ok(None);
    }
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(Some(Changed {
        index: entry.index,
        time: entry.time.to_string(),
        vm: entry.vm.as_ref().map(ToString::to_string),
        action: text(entry.detail.get("action")),
        principal: entry.peer.clone().unwrap_or_default(),
        old: old.into(),
        new: new.into(),
    }))
}

fn text(out: Out, changed: &Changed) -> String {
    let Changed { index, time, vm, action, principal, old, new } = changed;
    let tone = if new.decision == "allow" { Tone::Good } else { Tone::Bad };
    let word = out.paint(tone, &format!("{} -> {}", old.decision, new.decision));
    let mut text = format!("{index:>6}  {time}  {word}  {action} of {} for {}\n", vm.as_deref().unwrap_or("?"), printable(principal));
    let _ = writeln!(text, "        old: {}\n        new: {}", printable(&old.why), printable(&new.why));
    text
}
