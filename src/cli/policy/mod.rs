//! `sealane policy`: what policies say, from their files alone.

mod bundle;
mod diff;
mod explain;

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::output::{Out, Tone, printable};
use super::tools::PolicyCommand;
use super::{Ending, config};
use crate::control::Exit;
use crate::gateway::{entities, read_policies, read_policy_text};
use crate::policy::{Entities, PolicyErrors, PolicyProblem, PolicySet, run_tests};
use crate::telemetry::{ErrorClass, Problem, schema_tag};

schema_tag!(
    /// Schema of `policy check --json`.
    CheckSchema = "sealane.policy-check/1"
);
schema_tag!(
    /// Schema of `policy test --json`.
    TestSchema = "sealane.policy-test/1"
);

/// The tests beside the policies.
const TESTS: &str = "tests.json";

pub(super) fn policy(command: &PolicyCommand, out: Out) -> Ending {
    match command {
        PolicyCommand::Check { directory, config, json: _ } => check(directory, config.as_deref(), out),
        PolicyCommand::Test { directory, json: _ } => test(directory, out),
        PolicyCommand::Explain(flags) => explain::explain(flags, out),
        PolicyCommand::Diff { old, new, audit, json: _ } => diff::diff(old, new, audit, out),
        PolicyCommand::Bundle(command) => bundle::bundle(command, out),
    }
}

/// A problem in a file, as objects show it.
#[derive(Serialize)]
struct Located<'a> {
    /// Relative to where the command ran, like `directory`; absent when it is about the whole set.
    file: Option<String>,
    line: Option<usize>,
    column: Option<usize>,
    policy: Option<&'a str>,
    message: &'a str,
    hint: Option<&'a str>,
}

impl<'a> Located<'a> {
    fn new(directory: &Path, problem: &'a PolicyProblem) -> Self {
        let placed = !problem.file.is_empty();
        Self {
            file: placed.then(|| directory.join(&problem.file).display().to_string()),
            line: placed.then_some(problem.line),
            column: placed.then_some(problem.column),
            policy: problem.policy.as_deref(),
            message: &problem.what,
            hint: problem.hint.as_deref(),
        }
    }

    /// `dir/file:line:column: policy `id`: what`, and the hint below it.
    fn text(&self) -> String {
        let mut text = String::new();
        if let (Some(file), Some(line), Some(column)) = (&self.file, self.line, self.column) {
            let _ = write!(text, "{file}:{line}:{column}: ");
        }
        if let Some(policy) = self.policy {
            let _ = write!(text, "policy `{policy}`: ");
        }
        text.push_str(self.message);
        if let Some(hint) = self.hint {
            let _ = write!(text, "\n    hint: {hint}");
        }
        printable(&text)
    }
}

fn load(directory: &Path, entities: &Entities) -> Result<Result<PolicySet, PolicyErrors>, Problem> {
    let files = read_policies(directory).map_err(|(path, error)| unreadable(&path, &error))?;
    Ok(PolicySet::parse(&files, entities))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Problem {
    Problem::new(ErrorClass::Misuse, format!("cannot read `{}`: {error}", path.display())).with_code("policy")
}

fn refused(directory: &Path, problems: &[PolicyProblem]) -> Problem {
    let count = problems.len();
    let mut message = format!("policies in `{}` are refused: {count} {}", directory.display(), plural(count, "error", "errors"));
    for problem in problems {
        let _ = write!(message, "\n{}", Located::new(directory, problem).text());
    }
    Problem::new(ErrorClass::Misuse, message).with_code("policy")
}

fn plural<'a>(count: usize, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}

/// The set, or everything that is wrong with it as one problem.
fn load_or_refuse(directory: &Path, entities: &Entities) -> Result<PolicySet, Problem> {
    load(directory, entities)?.map_err(|errors| refused(directory, &errors.problems))
}

#[derive(Serialize)]
struct CheckObject<'a> {
    schema: CheckSchema,
    directory: String,
    valid: bool,
    policies: Vec<&'a str>,
    /// SHA-256, as in the audit log.
    digest: Option<String>,
    errors: Vec<Located<'a>>,
    warnings: Vec<Located<'a>>,
}

fn check(directory: &Path, file: Option<&Path>, out: Out) -> Ending {
    let entities = file.map(config::load_text).transpose()?.map(|config| entities(&config)).unwrap_or_default();
    let set = match load(directory, &entities)? {
        Ok(set) => set,
        Err(errors) => return not_valid(directory, &errors.problems, out),
    };
    let (defects, lint): (Vec<_>, Vec<_>) = set.lint().into_iter().partition(|problem| problem.defect);
    if !defects.is_empty() {
        return not_valid(directory, &defects, out);
    }
    let warnings: Vec<Located<'_>> = lint.iter().map(|problem| Located::new(directory, problem)).collect();
    for warning in &warnings {
        out.talk(&format!("{} {}", out.paint_talk(Tone::Doubtful, "warning:"), warning.text()));
    }
    let policies: Vec<&str> = set.policy_ids().collect();
    let digest = hex(&set.digest());
    if out.json {
        let (directory, digest) = (directory.display().to_string(), Some(digest));
        out.object(&CheckObject { schema: CheckSchema, directory, valid: true, policies, digest, errors: Vec::new(), warnings });
    } else {
        let count = policies.len();
        let found = plural(count, "policy", "policies");
        out.data(&format!("{count} {found} in `{}` have no errors: {}\ndigest {digest}", directory.display(), policies.join(", ")));
    }
    Ok(Exit::Done)
}

fn not_valid(directory: &Path, problems: &[PolicyProblem], out: Out) -> Ending {
    let problem = refused(directory, problems);
    if !out.json {
        return Err(problem);
    }
    let errors = problems.iter().map(|problem| Located::new(directory, problem)).collect();
    let (directory, policies, warnings) = (directory.display().to_string(), Vec::new(), Vec::new());
    out.object(&CheckObject { schema: CheckSchema, directory, valid: false, policies, digest: None, errors, warnings });
    out.say_problem(&problem);
    Ok(Exit::Usage)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Serialize)]
struct TestLine<'a> {
    name: &'a str,
    passed: bool,
    detail: &'a str,
}

#[derive(Serialize)]
struct TestObject<'a> {
    schema: TestSchema,
    directory: String,
    passed: usize,
    failed: usize,
    tests: Vec<TestLine<'a>>,
}

fn test(directory: &Path, out: Out) -> Ending {
    let set = load_or_refuse(directory, &Entities::default())?;
    let path = directory.join(TESTS);
    let text = read_policy_text(&path).map_err(|error| {
        let hint = "config/policy.d/tests.json in the source tree is an example; src/policy/fixtures.rs describes the format";
        unreadable(&path, &error).with_hint(hint)
    })?;
    let outcomes = run_tests(&set, &text);
    let failed = outcomes.iter().filter(|outcome| !outcome.passed).count();
    let passed = outcomes.len() - failed;
    if out.json {
        let tests = outcomes.iter().map(|outcome| TestLine { name: &outcome.name, passed: outcome.passed, detail: &outcome.detail });
        let directory = directory.display().to_string();
        out.object(&TestObject { schema: TestSchema, directory, passed, failed, tests: tests.collect() });
    } else {
        let mut lines = String::new();
        for outcome in &outcomes {
            let (word, tone) = if outcome.passed { ("pass", Tone::Good) } else { ("FAIL", Tone::Bad) };
            let _ = writeln!(lines, "{}  {}: {}", out.paint(tone, word), printable(&outcome.name), printable(&outcome.detail));
        }
        out.data(&lines);
        out.talk(&format!("{passed} of {} tests of `{}` passed", outcomes.len(), path.display()));
    }
    Ok(if failed == 0 { Exit::Done } else { Exit::Failed })
}
