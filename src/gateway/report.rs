//! The end of a migration as people and machines read it.

use std::time::{Duration, SystemTime};

use crate::audit::AuditError;
use crate::engine::{DiskFigures, EngineError, Figures};
use crate::migration;
use crate::telemetry::{DiskReport, DowntimeBreakdown, Outcome, PostCopyReport, Problem, Report, RunningOn, chain};
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
        Some(migration::Outcome::Cold) => (Outcome::Failed, RunningOn::NeitherYet),
        None if matches!(error, Some(EngineError::Lacking { .. })) => (Outcome::InDoubt, RunningOn::Destination),
        None => (Outcome::InDoubt, RunningOn::NeitherYet),
    };
    let mut report = Report::new(migration, vm.clone(), state, running_on);
    report.duration_seconds = started.elapsed().unwrap_or_default().as_secs_f64();
    if state != Outcome::Completed {
        report.error = Some(match error {
            Some(error) => named(problem(error, running_on), vm),
            None => Problem::new(ErrorClass::Bug, format!("migration `{migration}` of `{vm}` ended without a reason"))
                .with_running_on(running_on),
        });
    }
    report
}

fn disk_report(disks: &DiskFigures, verified: bool) -> DiskReport {
    DiskReport {
        only: disks.only,
        count: disks.count,
        bytes: disks.bytes,
        changed_bytes: disks.changed_bytes,
        held_bytes: disks.held_bytes,
        verified: verified && disks.verify.is_some(),
        verify_seconds: disks.verify.map(|took| took.as_secs_f64()),
    }
}

/// What was to be done is done where only disks were to be copied, though the VM has not moved.
pub(super) fn put_disks_there(report: &mut Report, disks: DiskFigures) {
    if disks.only && report.running_on == RunningOn::Source {
        (report.state, report.error) = (Outcome::Completed, None);
        report.disks = Some(disk_report(&disks, false));
    }
}

/// The VM belongs to the source, and its hypervisor could not be told to let the guest go on: most likely it has ended.
pub(super) fn not_woken(report: &mut Report) {
    report.running_on = RunningOn::NeitherYet;
    if let Some(problem) = report.error.take() {
        let hint = "no copy of the guest is known to run: see what `sealane vms` and its hypervisor say. Only if that has ended is its memory lost, and \
                    it has to be started from its disks; otherwise it goes on when its hypervisor is told to";
        report.error = Some(problem.with_code("guest-not-resumed").with_running_on(RunningOn::NeitherYet).with_hint(hint));
    }
}

/// The same with the VM in its message: whoever reads it may be moving several.
pub(super) fn named(mut problem: Problem, vm: &VmName) -> Problem {
    if !problem.message.contains(&format!("`{vm}`")) {
        problem.message = format!("migration of `{vm}`: {}", problem.message);
    }
    problem
}

/// What policy said in the end, on either side.
pub(super) fn decision(error: Option<&EngineError>) -> String {
    if error.is_some_and(|error| error.class() == ErrorClass::Denied) { "deny".to_owned() } else { "allow".to_owned() }
}

/// A migration that was interrupted, once the journals have settled it. How it went until then is not known any more.
pub(super) fn settled(migration: MigrationId, vm: &VmName, outcome: migration::Outcome) -> Report {
    let message = format!("migration `{migration}` of `{vm}` was interrupted, and the journal says that the VM stays");
    let mut report = report(migration, vm, Some(outcome), None, SystemTime::now());
    report.error = match outcome {
        migration::Outcome::Moved => None,
        migration::Outcome::Stayed | migration::Outcome::Reclaimed => Some(
            Problem::new(ErrorClass::Local, message)
                .with_code("interrupted")
                .with_running_on(RunningOn::Source)
                .with_hint("the VM was not harmed; the migration can be started again"),
        ),
        migration::Outcome::Cold => Some(
            Problem::new(ErrorClass::Local, format!("VM `{vm}` belongs to this gateway, and no memory of it is left that may run"))
                .with_code("cold")
                .with_running_on(RunningOn::NeitherYet)
                .with_hint("start the VM from its disks; it is a new start of the guest"),
        ),
    };
    report
}

/// What to do about an entry that was not recorded.
pub(super) fn without_evidence(error: &AuditError) -> &'static str {
    match error {
        AuditError::Disk { .. } => "nothing is moved without evidence; make room on the audit directory's disk and try again",
        AuditError::Failed { .. } => {
            "nothing is moved without evidence; see to the audit directory's disk, restart the gateway, and try again"
        }
        AuditError::Unsigned { .. } => "nothing is moved without evidence; `sealane status` says whether the gateway has to be restarted",
        _ => "nothing is moved without evidence; `sealane audit verify` looks at the log",
    }
}

pub(super) fn problem(error: &EngineError, running_on: RunningOn) -> Problem {
    let problem = Problem::new(error.class(), chain(error)).with_running_on(running_on);
    match error {
        EngineError::NotConverging { .. } => {
            problem.with_hint("allow a longer pause (`--max-downtime`), slow the guest down (`--throttle`), or give it more bandwidth")
        }
        EngineError::InDoubt { .. } => problem.with_hint(
            "the gateway keeps asking the destination; if it is gone for good, see `sealane resolve`; do not start the VM by hand",
        ),
        EngineError::Lacking { .. } => problem.with_code("lacks-pages").with_hint(
            "the gateways go on with what is missing as soon as both are there; do not start the VM at the source, and end neither QEMU; \
             where the source's QEMU is gone, what is missing is lost: `sealane vms` at the destination says what to do",
        ),
        EngineError::Audit(error) => problem.with_hint(without_evidence(error)),
        EngineError::Journal(_) => {
            problem.with_hint("nothing is moved without its journal; see to the gateway's disk, restart the gateway, and try again")
        }
        EngineError::TimedOut { .. } => problem.with_hint("allow more time with `--timeout`"),
        EngineError::Outage { .. } => problem.with_code("outage").with_hint("allow longer outages with `--max-outage`"),
        _ => problem,
    }
}

/// Puts the engine's figures in.
pub(crate) fn put_figures(report: &mut Report, figures: &Figures) {
    report.rounds = figures.rounds;
    report.pages = figures.pages;
    report.wire_bytes = figures.wire_bytes;
    report.reconnects = figures.reconnects;
    report.stalled_seconds = figures.stalled.as_secs_f64();
    report.resent_bytes = figures.resent_bytes;
    report.table_bytes = figures.table_bytes;
    report.stream_opaque = figures.opaque.map(str::to_owned);
    report.verified = figures.verified;
    report.post_copy = figures.split.map(|split| PostCopyReport { seconds: split.took.as_secs_f64(), faults: split.faults });
    report.disks = (figures.disks.count > 0).then(|| disk_report(&figures.disks, report.state == Outcome::Completed));
    report.downtime_seconds = figures.downtime.map(|downtime| downtime.as_secs_f64());
    report.audit.destination_head.clone_from(&figures.peer_audit_head);
    if figures.downtime.is_some() {
        let lap = |name: &str| figures.breakdown.iter().filter(|(lap, _)| *lap == name).map(|(_, d)| *d).sum::<Duration>().as_secs_f64();
        report.downtime_breakdown = Some(DowntimeBreakdown {
            pause_seconds: lap("pause") + lap("disks"),
            last_pages_seconds: lap("last-pages"),
            state_seconds: lap("state"),
            verify_seconds: lap("digest") + lap("destination"),
            journal_seconds: lap("journal"),
            network_seconds: lap("network") + lap("policy"),
            resume_seconds: lap("resume"),
        });
    }
}
