//! `sealane demo`: a whole migration on this machine, with nothing prepared and nothing left behind.

mod lab;
mod linux;

use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Ending;
use super::output::{Out, Tone};
use super::render;
use super::tools::{DemoFlags, DemoHypervisor};
use crate::audit::{self, VerifyOptions};
use crate::control::{Client, Event, Exit, MigrateRequest, exit_of_report};
use crate::telemetry::{ErrorClass, Outcome, Phase, Problem, Report, schema_tag};
use crate::types::{MigrationId, Side, Verify};
use lab::{Heartbeats, Lab, VM};

schema_tag!(
    /// Schema of the demo's object.
    DemoSchema = "sealane.demo/1"
);

/// Heartbeats that the guest has to print before it is moved, and after.
const BEATS: u64 = 5;
/// How long a guest may take for them. A guest that is emulated slowly needs a while.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long Linux may take to boot where it is emulated.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);

/// The report of the migration, and what only the demo can see.
#[derive(Debug, Serialize)]
struct Shown {
    demo: DemoSchema,
    #[serde(flatten)]
    report: Report,
    heartbeat: Heartbeats,
    guest: GuestVerdict,
    audit_verified: AuditVerified,
}

/// What the guest says of itself.
#[derive(Debug, Serialize)]
struct GuestVerdict {
    /// Whether it runs at the destination and has found nothing wrong.
    ok: bool,
    /// In words.
    says: String,
}

#[derive(Debug, Serialize)]
struct AuditVerified {
    source: bool,
    destination: bool,
}

pub(super) fn demo(flags: &DemoFlags, out: Out) -> Ending {
    let hypervisor = choose(flags.hypervisor, out)?;
    let lab = Lab::set_up(flags, hypervisor)?;
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Problem::new(ErrorClass::Local, format!("the runtime cannot be started: {error}")))?
        .block_on(show(&lab, flags, out));
    let kept = lab.kept();
    drop(lab);
    if let Some(kept) = kept {
        out.talk(&format!("certificates, journals, audit logs and consoles are in `{}`", kept.display()));
    }
    result
}

/// KVM where it can be used; where not, that is said.
fn choose(wanted: Option<DemoHypervisor>, out: Out) -> Result<DemoHypervisor, Problem> {
    match (wanted, crate::vmm::usable()) {
        (Some(wanted @ (DemoHypervisor::Synthetic | DemoHypervisor::Qemu)), _) => Ok(wanted),
        (_, Ok(())) => Ok(DemoHypervisor::Kvm),
        (Some(DemoHypervisor::Kvm), Err(error)) => {
            Err(Problem::new(ErrorClass::Local, crate::telemetry::chain(&error)).with_hint("`--hypervisor synthetic` needs no KVM"))
        }
        (None, Err(error)) => {
            out.talk(&format!(
                "{}: using a synthetic guest instead, threads that write memory as a guest would",
                crate::telemetry::chain(&error)
            ));
            Ok(DemoHypervisor::Synthetic)
        }
    }
}

async fn show(lab: &Lab, flags: &DemoFlags, out: Out) -> Ending {
    let source = Client::new(lab.source.socket());
    lab.source.ready(&source).await?;
    lab.destination.ready(&Client::new(lab.destination.socket())).await?;
    let patience = if lab.boots() { BOOT_PATIENCE } else { PATIENCE };
    let before = lab.wait_for_beats(Side::Source, BEATS, patience).await?;
    out.talk(&format!("two gateways are up; the guest beats on the source (beat {before})"));

    let mut request = MigrateRequest::new(VM.parse().map_err(bug)?, "gw-b".parse().map_err(bug)?);
    request.verify = Some(Verify::Yes);
    request.lanes = flags.lanes;
    request.bandwidth_bytes_per_second = flags.bandwidth.map(|limit| limit.bytes_per_second);
    let cpu = lab.cpu_seconds();
    let id = source.start(&request).await.map_err(|error| error.problem())?.id;
    let mut report = follow(&source, id, out).await?;
    report.cpu_seconds = cpu.zip(lab.cpu_seconds()).map(|(before, after)| after - before);
    if report.state == Outcome::Completed {
        // A guest that arrived broken would not print these.
        lab.wait_for_beats(Side::Destination, BEATS, PATIENCE).await?;
    }
    let shown = look(lab, report);
    if out.json {
        out.object(&shown);
    } else {
        tell(out, &shown);
    }
    if let Some(error) = &shown.report.error {
        out.say_problem(error);
    }
    let all_well = shown.report.verified
        && shown.heartbeat.unbroken
        && shown.guest.ok
        && shown.audit_verified.source
        && shown.audit_verified.destination;
    Ok(match exit_of_report(&shown.report) {
        Exit::Done if !all_well => Exit::Failed,
        exit => exit,
    })
}

fn bug(error: impl std::fmt::Display) -> Problem {
    Problem::new(ErrorClass::Bug, error.to_string())
}

async fn follow(client: &Client, id: MigrationId, out: Out) -> Result<Report, Problem> {
    let mut watch = client.watch(id).await.map_err(|error| error.problem())?;
    let mut phase: Option<Phase> = None;
    loop {
        match watch.next().await.map_err(|error| error.problem())? {
            Some(Event::Report(report)) => {
                out.live_end();
                return Ok(*report);
            }
            Some(Event::Progress(progress)) => {
                let line = render::progress_line(&progress);
                if out.live {
                    out.live_line(&line);
                } else if phase != Some(progress.phase) {
                    out.talk(&line);
                }
                phase = Some(progress.phase);
            }
            None => {
                return Err(Problem::new(ErrorClass::InDoubt, "the source gateway ended before its migration").with_code("gateway-lost"));
            }
        }
    }
}

/// Everything that can be seen from outside after the migration.
fn look(lab: &Lab, report: Report) -> Shown {
    let heartbeat = lab.heartbeats();
    let guest = match lab.guest_status(if report.state == Outcome::Completed { Side::Destination } else { Side::Source }) {
        Ok(status) => GuestVerdict {
            ok: status.exit_code.is_none(),
            says: match status.exit_code {
                None => "still running; it has read back nothing that it did not write".to_owned(),
                Some(code) => format!("stopped itself with code {code:#x}"),
            },
        },
        Err(error) => GuestVerdict { ok: false, says: crate::telemetry::chain(&error) },
    };
    let verified = |directory: &Path| audit::verify(directory, &VerifyOptions::default()).is_ok();
    let audit_verified =
        AuditVerified { source: verified(&lab.source.audit_directory()), destination: verified(&lab.destination.audit_directory()) };
    Shown { demo: DemoSchema, report, heartbeat, guest, audit_verified }
}

fn tell(out: Out, shown: &Shown) {
    out.data(&render::report(out, &shown.report));
    let good = |ok: bool, text: &str| out.paint(if ok { Tone::Good } else { Tone::Bad }, text);
    let beat = &shown.heartbeat;
    let number = |beat: Option<u64>| beat.map_or_else(|| "none".to_owned(), |beat| beat.to_string());
    let verdict = if beat.unbroken { "no gap, no repeat" } else { "BROKEN" };
    let verified = |ok: bool| good(ok, if ok { "verified" } else { "NOT VERIFIED" });
    out.data(&format!(
        "  heartbeat  last on the source {}, first on the destination {}, now {}: {}\n  guest      {}\n  audit logs source {}, destination {}",
        number(beat.last_on_source),
        number(beat.first_on_destination),
        number(beat.last_on_destination),
        good(beat.unbroken, verdict),
        good(shown.guest.ok, &shown.guest.says),
        verified(shown.audit_verified.source),
        verified(shown.audit_verified.destination),
    ));
}

/// Waits until `done` says something, or for `patience`.
async fn until<T>(patience: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if start.elapsed() > patience {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn ended(what: &str, status: ExitStatus, log: &str) -> Problem {
    Problem::new(ErrorClass::Local, format!("{what} ended with {status}: {log}"))
}
