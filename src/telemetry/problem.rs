//! A failure as people and scripts see it.

use serde::{Deserialize, Serialize};

use super::RunningOn;
use crate::wire::ErrorClass;

/// A failure as people and scripts see it: what failed, whose fault it is, where the VM runs, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable identifier for scripts: the class's own, or a finer one of the same class.
    pub code: String,
    /// Whose fault; decides the HTTP status and the exit code.
    pub class: ErrorClass,
    /// What failed, with the object in backticks.
    pub message: String,
    /// Where the VM runs now, when one VM is concerned.
    #[serde(default)]
    pub running_on: Option<RunningOn>,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
}

impl Problem {
    /// A problem with its class's own code.
    #[must_use]
    pub fn new(class: ErrorClass, message: impl Into<String>) -> Self {
        Self { code: class_code(class).to_owned(), class, message: message.into(), running_on: None, hint: None }
    }

    /// The same with a finer code.
    #[must_use]
    pub fn with_code(mut self, code: &str) -> Self {
        code.clone_into(&mut self.code);
        self
    }

    /// The same with advice.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with the VM's whereabouts.
    #[must_use]
    pub fn with_running_on(mut self, place: RunningOn) -> Self {
        self.running_on = Some(place);
        self
    }
}

/// The code of a problem that is described by its class alone; equal to the class's JSON name.
fn class_code(class: ErrorClass) -> &'static str {
    match class {
        ErrorClass::PeerIncompatible => "peer-incompatible",
        ErrorClass::PeerMisbehaved => "peer-misbehaved",
        ErrorClass::Unauthenticated => "unauthenticated",
        ErrorClass::Denied => "denied",
        ErrorClass::NotConverged => "not-converged",
        ErrorClass::TimedOut => "timed-out",
        ErrorClass::Cancelled => "cancelled",
        ErrorClass::Local => "local",
        ErrorClass::Misuse => "misuse",
        ErrorClass::Bug => "bug",
        ErrorClass::PeerUnreachable => "peer-unreachable",
        ErrorClass::InDoubt => "in-doubt",
        ErrorClass::PeerBusy => "peer-busy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_problem_carries_the_json_name_of_its_class_as_code() {
        for class in ErrorClass::ALL {
            let problem = Problem::new(class, "x");
            assert_eq!(serde_json::to_value(class).unwrap(), serde_json::Value::String(problem.code));
        }
    }
}
