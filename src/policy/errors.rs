//! What is wrong with a set of policies: everything at once, with places.

use std::fmt;

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyProblem {
    /// The file's name; empty when it is about the whole set or about entities.
    pub file: String,
    /// Line, from 1; 0 when there is no place in a file.
    pub line: usize,
    /// Column in characters, from 1; 0 when there is no place in a file.
    pub column: usize,
    /// The `@id` of the policy it is about, where known.
    pub policy: Option<String>,
    /// What is wrong.
    pub what: String,
    /// What may help.
    pub hint: Option<String>,
    /// Whether it is wrong whatever the configuration is; otherwise a person has to look at it.
    pub defect: bool,
}

impl PolicyProblem {
    /// A problem of the whole set.
    pub(super) fn of_set(what: impl Into<String>) -> Self {
        Self { file: String::new(), line: 0, column: 0, policy: None, what: what.into(), hint: None, defect: true }
    }

    /// A problem at byte `offset` of `text`, the contents of the file `name`.
    pub(super) fn at(name: &str, text: &str, offset: usize, what: impl Into<String>) -> Self {
        let (line, column) = place(text, offset);
        Self { file: name.to_owned(), line, column, policy: None, what: what.into(), hint: None, defect: true }
    }

    pub(super) fn of_policy(mut self, id: Option<&str>) -> Self {
        self.policy = id.map(str::to_owned);
        self
    }

    pub(super) fn with_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }
}

impl fmt::Display for PolicyProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}:{}:{}: ", printable(&self.file), self.line, self.column)?;
        }
        if let Some(id) = &self.policy {
            write!(f, "policy `{}`: ", printable(id))?;
        }
        f.write_str(&printable(&self.what))?;
        match &self.hint {
            Some(hint) => write!(f, " (hint: {})", printable(hint)),
            None => Ok(()),
        }
    }
}

/// Why there is no policy set: every problem that was found, in order of file and place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy refused, {} problem(s):{}", .problems.len(), listed(.problems))]
pub struct PolicyErrors {
    /// The problems; never empty.
    pub problems: Vec<PolicyProblem>,
}

fn listed(problems: &[PolicyProblem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

/// Line and column, from 1, of byte `offset`.
pub(super) fn place(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = text.get(..end).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (line, column)
}

/// Texts quote policy files and peers; control characters would reach the reader's terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
