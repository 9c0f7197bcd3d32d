//! Tests that policy authors write: `tests.json` beside the policies.
//!
//! ```json
//! {
//!   "entities": { "gateways": [], "operators": [], "vms": [] },
//!   "context": { "now": "2026-12-01T23:00:00Z", "route": {}, "channel": {}, "stream": {}, "memoryMiB": 4096 },
//!   "tests": [
//!     { "name": "acme may move from dc1 to dc2", "action": "release",
//!       "principal": "spiffe://dc2.example.net/gateway/gw-b", "resource": "0f0e0d0c-0b0a-0908-0706-050403020100",
//!       "context": { "stream": { "lanes": 8 } }, "expect": "allow", "policy": "p1-acme-dc1-to-dc2" }
//!   ]
//! }
//! ```
//!
//! `entities` (of the file, or of one test) replaces the entities that the set was loaded with. `context` of the file
//! holds defaults; what a test says is laid over it, object by object, and fields of the defaults that the action does
//! not have are left out. `principal` is a SPIFFE ID, or an operator for `request` and `resolveInDoubt`; `resource` is the VM's
//! UUID. What is not said of disks is that none move. `policy` is optional: the `@id` that must be among the policies that decided (or that failed to evaluate). `stream` is optional
//! too: fields of the stream as permits' obligations leave it, e.g. `{ "durability": "both" }`.
//!
//! A question alone, without `name` and what is expected, is a file for `policy explain --request`.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::limits;
use crate::policy::ask::{Adjust, Answer, Explanation, Question, why};
use crate::policy::entities::Entities;
use crate::policy::load::PolicySet;
use crate::policy::{MigrationContext, RequestContext, ResolveContext, written};
use crate::types::{SpiffeId, VmUuid};

/// What became of one test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestOutcome {
    /// Its name.
    pub name: String,
    /// Whether it is as expected.
    pub passed: bool,
    /// What was decided and why, or why the test makes no sense.
    pub detail: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    entities: Option<Entities>,
    #[serde(default)]
    context: Map<String, Value>,
    tests: Vec<Test>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Test {
    name: String,
    action: String,
    principal: String,
    resource: VmUuid,
    #[serde(default)]
    context: Map<String, Value>,
    entities: Option<Entities>,
    expect: Expect,
    policy: Option<String>,
    #[serde(default)]
    stream: Map<String, Value>,
}

/// A question as a file or an audit entry has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenQuestion {
    action: String,
    principal: String,
    resource: VmUuid,
    #[serde(default)]
    context: Map<String, Value>,
    entities: Option<Entities>,
}

/// What a policy set says to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The answer.
    pub allowed: bool,
    /// The `@id`s of the policies that decided, sorted.
    pub policy_ids: Vec<String>,
    /// Why, for people.
    pub why: String,
}

impl WrittenQuestion {
    /// From a text.
    ///
    /// # Errors
    /// The first field that is wrong, and what was expected there.
    pub fn read(text: &str) -> Result<Self, String> {
        written::read(text)
    }

    /// Whether it says itself what is known of gateways, operators and VMs.
    #[must_use]
    pub fn has_entities(&self) -> bool {
        self.entities.is_some()
    }

    /// What `set` answers. Entities of the question replace those of the set.
    ///
    /// # Errors
    /// The question makes no sense: an unknown action, a fact that is missing or has another type.
    pub fn ask(&self, set: &PolicySet) -> Result<Verdict, String> {
        let answer = self.put(set, |set, question| set.settle(self.resource, question, adjust(question)))?;
        Ok(Verdict { allowed: answer.allowed, why: why(&answer), policy_ids: answer.ids })
    }

    /// The same, policy by policy.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn explain(&self, set: &PolicySet) -> Result<Explanation, String> {
        self.put(set, |set, question| set.explain(self.resource, question))
    }

    fn put<T>(&self, set: &PolicySet, ask: impl FnOnce(&PolicySet, &Question<'_>) -> T) -> Result<T, String> {
        let replaced =
            self.entities.as_ref().map(|entities| set.with_entities(entities)).transpose().map_err(|errors| errors.to_string())?;
        let set = replaced.as_ref().unwrap_or(set);
        with_question(&self.action, &self.principal, &Map::new(), &self.context, |question| ask(set, question))
    }
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Allow,
    Deny,
}

/// Runs the tests of one `tests.json`. A file that makes no sense, or has no test, is one failed test.
#[must_use]
pub fn run_tests(set: &PolicySet, text: &str) -> Vec<TestOutcome> {
    let broken = |detail: String| vec![TestOutcome { name: "tests.json".to_owned(), passed: false, detail }];
    if text.len() > limits::POLICY_BYTES_MAX {
        return broken(format!("longer than {} bytes", limits::POLICY_BYTES_MAX));
    }
    let file: File = match written::read(text) {
        Ok(file) => file,
        Err(error) => return broken(error),
    };
    if file.tests.is_empty() {
        return broken("no test in `tests`, expected at least one".to_owned());
    }
    let set = match file.entities.as_ref().map(|entities| set.with_entities(entities)).transpose() {
        Ok(replaced) => replaced.unwrap_or_else(|| set.clone()),
        Err(errors) => return broken(errors.to_string()),
    };
    file.tests.iter().map(|test| outcome(test, run(&set, &file.context, test))).collect()
}

fn outcome(test: &Test, run: Result<Answer, String>) -> TestOutcome {
    let name = test.name.clone();
    let answer = match run {
        Ok(answer) => answer,
        Err(detail) => return TestOutcome { name, passed: false, detail },
    };
    let decided = answer.allowed == (test.expect == Expect::Allow);
    let by = |id: &String| answer.ids.contains(id) || answer.errors.iter().any(|error| error.policy.as_ref() == Some(id));
    let named = test.policy.as_ref().is_none_or(by);
    let stream = serde_json::to_value(&answer.stream).unwrap_or_default();
    let otherwise = test.stream.iter().find(|(name, value)| stream.get(name.as_str()) != Some(*value));
    let word = if answer.allowed { "allow" } else { "deny" };
    let mut detail = format!("{word}: {}", why(&answer));
    if let Some(id) = test.policy.as_ref().filter(|_| !named) {
        detail.push_str(&format!("; expected policy `{id}` to decide"));
    }
    if let Some((name, value)) = otherwise {
        let is = stream.get(name.as_str()).unwrap_or(&Value::Null);
        detail.push_str(&format!("; expected `{name}` of the stream to be {value}, and it is {is}"));
    }
    TestOutcome { name, passed: decided && named && otherwise.is_none(), detail }
}

fn run(set: &PolicySet, defaults: &Map<String, Value>, test: &Test) -> Result<Answer, String> {
    let replaced = test.entities.as_ref().map(|entities| set.with_entities(entities)).transpose().map_err(|errors| errors.to_string())?;
    let set = replaced.as_ref().unwrap_or(set);
    with_question(&test.action, &test.principal, defaults, &test.context, |question| set.settle(test.resource, question, adjust(question)))
}

/// What a gateway would still change about the stream.
pub(super) fn adjust(question: &Question<'_>) -> Adjust {
    match question {
        Question::Request(..) | Question::Release(..) => Adjust::Terms,
        Question::Accept(..) => Adjust::Lanes,
        Question::Commit(..) | Question::Resolve(..) => Adjust::Nothing,
    }
}

fn with_question<T>(
    action: &str,
    principal: &str,
    defaults: &Map<String, Value>,
    own: &Map<String, Value>,
    ask: impl FnOnce(&Question<'_>) -> T,
) -> Result<T, String> {
    let peer = || principal.parse::<SpiffeId>().map_err(|error| format!("`principal`: {error}"));
    let migration = || -> Result<MigrationContext, String> {
        let context = context(defaults, own, &["now", "route", "channel", "stream", "memoryMiB", "diskCount", "diskMiB"])?;
        written::possible(&context)?;
        Ok(context)
    };
    match action {
        "request" => {
            let context: RequestContext = context(defaults, own, &["now", "route", "stream", "changeTicket"])?;
            written::possible_stream(&context.stream)?;
            Ok(ask(&Question::Request(principal, &context)))
        }
        "release" => Ok(ask(&Question::Release(&peer()?, &migration()?))),
        "accept" => Ok(ask(&Question::Accept(&peer()?, &migration()?))),
        "commit" => Ok(ask(&Question::Commit(&peer()?, &migration()?))),
        "resolveInDoubt" => {
            let context: ResolveContext = context(defaults, own, &["now", "approvers", "fenceEvidence"])?;
            Ok(ask(&Question::Resolve(principal, &context)))
        }
        other => Err(format!("`action`: unknown `{other}`, expected `request`, `release`, `accept`, `commit` or `resolveInDoubt`")),
    }
}

fn context<T: serde::de::DeserializeOwned>(defaults: &Map<String, Value>, own: &Map<String, Value>, fields: &[&str]) -> Result<T, String> {
    let mut merged: Map<String, Value> = defaults.iter().filter(|(name, _)| fields.contains(&name.as_str())).map(own_pair).collect();
    overlay(&mut merged, own);
    written::read_value("context", Value::Object(merged))
}

fn own_pair((name, value): (&String, &Value)) -> (String, Value) {
    (name.clone(), value.clone())
}

/// Recursion is bounded by serde_json's own depth limit.
fn overlay(base: &mut Map<String, Value>, top: &Map<String, Value>) {
    for (name, value) in top {
        match (base.get_mut(name), value) {
            (Some(Value::Object(below)), Value::Object(above)) => overlay(below, above),
            _ => drop(base.insert(name.clone(), value.clone())),
        }
    }
}
