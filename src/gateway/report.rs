//! The end of a migration as people and machines read it.

use std::time::{Duration, SystemTime};

use crate::engine::{EngineError, Figures};
use crate::migration;
use crate::telemetry::{DowntimeBreakdown, Outcome, Problem, Report, RunningOn, chain};
use crate::types::{MigrationId, VmName};
use crate::wire::ErrorClass;

/// Who decides what a report says about where the VM is.
pub(crate) fn report(
    migration: MigrationId,
    vm: &VmName,
    outcome: Option<migration::Outcome>,
    error: Option<&EngineError>,
    started: SystemTime,
) -> Report {
    let (state, running_on) = match outcome {
        Some(migration::Outcome::Moved) => (Outcome::Completed, RunningOn::Destination),
        Some(migration::Outcome::Stayed | migration::Outcome::Reclaimed) => match error.map(EngineError::class) {
            Some(ErrorClass::Cancelled) => (Outcome::Cancelled, RunningOn::Source),
            _ => (Outcome::Failed, RunningOn::Source),
        },
        None => (Outcome::InDoubt, RunningOn::NeitherYet),
    };
    let mut report = Report::new(migration, vm.clone(), state, running_on);
    report.duration_seconds = started.elapsed().unwrap_or_default().as_secs_f64();
    if state != Outcome::Completed {
        report.error = Some(match error {
            Some(error) => problem(error, running_on),
            None => Problem::new(ErrorClass::Bug, format!("migration `{migration}` of `{vm}` ended without a reason"))
                .with_running_on(running_on),
        });
    }
    report
}

pub(super) fn problem(error: &EngineError, running_on: RunningOn) -> Problem {
    let problem = Problem::new(error.class(), chain(error)).with_running_on(running_on);
    match error {
        EngineError::NotConverging { .. } => {
            problem.with_hint("allow a longer pause (`--max-downtime`), slow the guest down (`--throttle`), or give it more bandwidth")
        }
        EngineError::InDoubt { .. } => problem.with_hint("the gateway keeps asking the destination; do not start the VM by hand"),
        EngineError::Journal(_) | EngineError::Audit(_) => {
            problem.with_hint("nothing is moved without evidence; make room on the gateway's disk and try again")
        }
        EngineError::TimedOut { .. } => problem.with_hint("allow more time with `--timeout`"),
        _ => problem,
    }
}

/// Puts the engine's figures in.
pub(crate) fn put_figures(report: &mut Report, figures: &Figures) {
    report.rounds = figures.rounds;
    report.pages = figures.pages;
    report.wire_bytes = figures.wire_bytes;
    report.verified = figures.verified;
    report.downtime_seconds = figures.downtime.map(|downtime| downtime.as_secs_f64());
    report.audit.destination_head.clone_from(&figures.peer_audit_head);
    if figures.downtime.is_some() {
        let lap = |name: &str| figures.breakdown.iter().filter(|(lap, _)| *lap == name).map(|(_, d)| *d).sum::<Duration>().as_secs_f64();
        report.downtime_breakdown = Some(DowntimeBreakdown {
            pause_seconds: lap("pause"),
            last_pages_seconds: lap("last-pages"),
            state_seconds: lap("state"),
            verify_seconds: lap("digest") + lap("destination"),
            journal_seconds: lap("journal"),
            network_seconds: lap("network") + lap("policy"),
            resume_seconds: lap("resume"),
        });
    }
}
