//! The one table of failures: HTTP status, exit code, audited or not, safe to retry or not.

use crate::telemetry::{ErrorClass, Outcome, Problem, Report, RunningOn};

/// Exit code of a command; a contract (design section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Done and verified.
    Done = 0,
    /// Failed; the VM still runs on the source.
    Failed = 1,
    /// Usage or configuration.
    Usage = 2,
    /// Denied by policy, or unauthenticated.
    Refused = 3,
    /// Peer unreachable or incompatible.
    Peer = 4,
    /// Cancelled.
    Cancelled = 5,
    /// Outcome unknown; an operator must decide.
    Unknown = 6,
    /// Timed out.
    TimedOut = 7,
}

impl Exit {
    /// The number that the shell sees.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// What follows from the class of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The class.
    pub class: ErrorClass,
    /// Problem code, unless there is a finer one.
    pub code: &'static str,
    /// HTTP status of the answer.
    pub status: u16,
    /// Exit code of the command.
    pub exit: Exit,
    /// Whether the failure itself is an entry in the audit log.
    pub audited: bool,
    /// Whether the same request can simply be made again.
    pub retry_safe: bool,
}

const fn line(class: ErrorClass, code: &'static str, status: u16, exit: Exit, audited: bool, retry_safe: bool) -> Row {
    Row { class, code, status, exit, audited, retry_safe }
}

#[rustfmt::skip]
const TABLE: [Row; 13] = [
    //   class                         code                status exit             audited retry
    line(ErrorClass::PeerIncompatible, "peer-incompatible", 422, Exit::Peer,      true,  false),
    line(ErrorClass::PeerMisbehaved,   "peer-misbehaved",   502, Exit::Failed,    true,  false),
    line(ErrorClass::Unauthenticated,  "unauthenticated",   401, Exit::Refused,   true,  false),
    line(ErrorClass::Denied,           "denied",            403, Exit::Refused,   true,  false),
    line(ErrorClass::NotConverged,     "not-converged",     409, Exit::Failed,    true,  true),
    line(ErrorClass::TimedOut,         "timed-out",         504, Exit::TimedOut,  true,  true),
    line(ErrorClass::Cancelled,        "cancelled",         409, Exit::Cancelled, true,  true),
    line(ErrorClass::Local,            "local",             500, Exit::Failed,    true,  true),
    line(ErrorClass::Misuse,           "misuse",            400, Exit::Usage,     false, false),
    line(ErrorClass::Bug,              "bug",               500, Exit::Failed,    true,  false),
    line(ErrorClass::PeerUnreachable,  "peer-unreachable",  502, Exit::Peer,      true,  true),
    line(ErrorClass::InDoubt,          "in-doubt",          409, Exit::Unknown,   true,  false),
    line(ErrorClass::PeerBusy,         "peer-busy",         503, Exit::Peer,      true,  true),
];

/// The row of a class.
#[must_use]
pub fn row(class: ErrorClass) -> Row {
    // The table is in the order of the classes' numbers, from 1; a test holds it there.
    TABLE[usize::from(class.number()).saturating_sub(1)]
}

/// HTTP status of a problem. Objects that do not exist are 404 whatever else is wrong with the request.
#[must_use]
pub fn status_of(problem: &Problem) -> u16 {
    if problem.class == ErrorClass::Misuse && problem.code.starts_with("unknown-") { 404 } else { row(problem.class).status }
}

/// Exit code of a problem. A VM that may run nowhere needs an operator, whatever failed.
#[must_use]
pub fn exit_of(problem: &Problem) -> Exit {
    if problem.running_on == Some(RunningOn::NeitherYet) { Exit::Unknown } else { row(problem.class).exit }
}

/// Exit code of a finished migration.
#[must_use]
pub fn exit_of_report(report: &Report) -> Exit {
    match (report.state, report.running_on) {
        (Outcome::InDoubt, _) | (Outcome::Failed | Outcome::Cancelled, RunningOn::NeitherYet) => Exit::Unknown,
        (Outcome::Completed, _) => Exit::Done,
        (Outcome::Cancelled, _) => Exit::Cancelled,
        (Outcome::Failed, _) => match report.error.as_ref().map(exit_of) {
            // A failed migration is not the fault of how the command was written.
            None | Some(Exit::Done | Exit::Usage) => Exit::Failed,
            Some(exit) => exit,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::MigrationId;

    #[test]
    fn every_class_has_its_own_row_and_the_code_of_its_json_name() {
        for class in ErrorClass::ALL {
            assert_eq!(row(class).class, class);
            assert_eq!(row(class).code, Problem::new(class, "").code);
            assert!((400..600).contains(&row(class).status));
            assert_ne!(row(class).exit, Exit::Done);
        }
    }

    #[test]
    fn every_exit_code_of_the_contract_can_be_reached() {
        let reached: std::collections::BTreeSet<u8> = ErrorClass::ALL.map(|class| row(class).exit.code()).into();
        assert_eq!(reached.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn exit_codes_of_classes_are_the_contract() {
        let codes = ErrorClass::ALL.map(|class| (row(class).code, row(class).exit.code()));
        let expected = [
            ("peer-incompatible", 4),
            ("peer-misbehaved", 1),
            ("unauthenticated", 3),
            ("denied", 3),
            ("not-converged", 1),
            ("timed-out", 7),
            ("cancelled", 5),
            ("local", 1),
            ("misuse", 2),
            ("bug", 1),
            ("peer-unreachable", 4),
            ("in-doubt", 6),
            ("peer-busy", 4),
        ];
        assert_eq!(codes, expected);
    }

    fn report(state: Outcome, place: RunningOn, error: Option<ErrorClass>) -> Exit {
        let mut report = Report::new(MigrationId([0; 16]), "vm".parse().unwrap(), state, place);
        report.error = error.map(|class| Problem::new(class, "x"));
        exit_of_report(&report)
    }

    #[test]
    fn a_report_exits_by_its_state_then_by_its_error() {
        use Outcome::{Cancelled, Completed, Failed, InDoubt};
        use RunningOn::{Destination, NeitherYet, Source};
        for (state, place, error, exit) in [
            (Completed, Destination, None, Exit::Done),
            (Completed, Destination, Some(ErrorClass::Local), Exit::Done),
            (Failed, Source, None, Exit::Failed),
            (Failed, Source, Some(ErrorClass::Local), Exit::Failed),
            (Failed, Source, Some(ErrorClass::Misuse), Exit::Failed),
            (Failed, Source, Some(ErrorClass::Denied), Exit::Refused),
            (Failed, Source, Some(ErrorClass::Unauthenticated), Exit::Refused),
            (Failed, Source, Some(ErrorClass::PeerUnreachable), Exit::Peer),
            (Failed, Source, Some(ErrorClass::TimedOut), Exit::TimedOut),
            (Failed, NeitherYet, Some(ErrorClass::Local), Exit::Unknown),
            (Cancelled, Source, Some(ErrorClass::Cancelled), Exit::Cancelled),
            (Cancelled, NeitherYet, Some(ErrorClass::Cancelled), Exit::Unknown),
            (InDoubt, NeitherYet, Some(ErrorClass::InDoubt), Exit::Unknown),
            (InDoubt, Source, None, Exit::Unknown),
        ] {
            assert_eq!(report(state, place, error), exit, "{state:?} {place:?} {error:?}");
        }
    }

    #[test]
    fn what_does_not_exist_is_not_found() {
        let unknown = Problem::new(ErrorClass::Misuse, "no VM `x`").with_code("unknown-vm");
        assert_eq!((status_of(&unknown), exit_of(&unknown)), (404, Exit::Usage));
        assert_eq!(status_of(&Problem::new(ErrorClass::Misuse, "x")), 400);
    }

    #[test]
    fn a_problem_with_a_vm_on_neither_side_needs_an_operator() {
        let problem = Problem::new(ErrorClass::TimedOut, "x").with_running_on(RunningOn::NeitherYet);
        assert_eq!(exit_of(&problem), Exit::Unknown);
    }
}
