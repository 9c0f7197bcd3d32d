//! Views as text for people. Every number has a unit.

use std::fmt::Write;

use super::output::{Out, Tone, printable, whereabouts};
use crate::control::{
    Check, CheckVerdict, DoubtView, GatewayView, MigrationState, MigrationView, PeerView, PlanView, RecordView, VmState, VmView,
};
use crate::telemetry::{Mode, Outcome, PostCopyReport, Progress, Report, RunningOn};
use crate::types::Side;

/// `3.1 GiB`.
pub(super) fn bytes(amount: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut index = 0;
    let mut scale = 1_u64;
    while index + 1 < units.len() && amount / scale >= 1024 {
        scale <<= 10;
        index += 1;
    }
    if index == 0 {
        return format!("{amount} B");
    }
    let tenths = u128::from(amount) * 10 / u128::from(scale);
    if tenths >= 1000 { format!("{} {}", tenths / 10, units[index]) } else { format!("{}.{} {}", tenths / 10, tenths % 10, units[index]) }
}

/// `812 MiB/s`.
pub(super) fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// `140 ms`, `6.2 s`, `1 h 03 min`.
pub(super) fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return "unknown".to_owned();
    }
    if value < 0.000_95 {
        return format!("{:.0} µs", value * 1e6);
    }
    if value < 0.01 {
        return format!("{:.1} ms", value * 1e3);
    }
    if value < 0.9995 {
        return format!("{:.0} ms", value * 1e3);
    }
    if value < 59.95 {
        return format!("{value:.1} s");
    }
    // A duration is at most the 584 years of a u64 of milliseconds; beyond it this saturates.
    let whole = std::time::Duration::try_from_secs_f64(value.round()).map_or(u64::MAX, |duration| duration.as_secs());
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

/// The first digits of an id, enough for `status`, `watch` and `cancel`.
pub(super) fn short(id: crate::types::MigrationId) -> String {
    id.to_string().chars().take(8).collect()
}

/// One line of progress.
pub(super) fn progress_line(progress: &Progress) -> String {
    let mut line = progress.phase.to_string();
    if progress.phase != crate::telemetry::Phase::Queued {
        let _ = write!(line, " {:.0} %", (progress.phase_fraction * 100.0).floor());
    }
    let mut add = |text: String| {
        line.push_str(", ");
        line.push_str(&text);
    };
    // First, because a narrow terminal cuts the line.
    if let Some(why) = &progress.stalled_because {
        add(format!("stalled: {}", printable(why)));
    }
    if let Some(position) = progress.queue_position {
        add(format!("number {position} in the queue"));
    }
    if progress.phase == crate::telemetry::Phase::Storage {
        add(format!("{} of {} of disks left", bytes(progress.disk_remaining_bytes), bytes(progress.disk_total_bytes)));
        add(format!("wire {}", rate(progress.wire_bytes_per_second)));
    }
    if progress.phase == crate::telemetry::Phase::Memory {
        add(format!("round {}", progress.round));
        add(format!("{} of {} left", bytes(progress.memory_remaining_bytes), bytes(progress.memory_total_bytes)));
        add(format!("sending {} (wire {})", rate(progress.send_bytes_per_second), rate(progress.wire_bytes_per_second)));
        add(format!("dirtying {}", rate(progress.dirty_bytes_per_second)));
        if let Some(downtime) = progress.expected_downtime_seconds {
            add(format!("expected downtime {}", seconds(downtime)));
        }
        if let Some(eta) = progress.eta_seconds {
            add(format!("ETA {}", seconds(eta)));
        }
    }
    line
}

pub(super) fn vms(out: Out, vms: &[VmView]) -> String {
    let rows = vms.iter().map(|vm| {
        let tone = match vm.state {
            VmState::Running | VmState::Leaving => Tone::Good,
            VmState::Gone => Tone::Quiet,
            VmState::Paused | VmState::Arriving | VmState::Ended => Tone::Doubtful,
            VmState::Unreachable | VmState::LacksPages | VmState::InDoubt | VmState::Cold => Tone::Bad,
        };
        vec![
            Cell::plain(vm.name.as_str()),
            Cell::toned(word(&vm.state), tone),
            Cell::plain(&vm.place),
            Cell::plain(&vm.driver),
            Cell::plain(&vm.memory_bytes.map(bytes).unwrap_or_default()),
            Cell::plain(&vm.vcpus.map(|count| count.to_string()).unwrap_or_default()),
            Cell::plain(&vm.owner_epoch.to_string()),
            Cell::plain(vm.why.as_deref().unwrap_or_default()),
        ]
    });
    table(out, &["VM", "STATE", "WHERE", "DRIVER", "MEMORY", "VCPUS", "EPOCH", "WHY"], rows.collect())
}

pub(super) fn peers(out: Out, peers: &[PeerView]) -> String {
    let rows = peers.iter().map(|peer| {
        let (reachable, tone) = match peer.reachable {
            Some(true) => ("yes", Tone::Good),
            Some(false) => ("no", Tone::Bad),
            None => ("not tried", Tone::Quiet),
        };
        vec![
            Cell::plain(peer.name.as_str()),
            Cell::plain(&peer.site),
            Cell::plain(&peer.address),
            Cell::toned(reachable.to_owned(), tone),
            Cell::plain(&peer.rtt_seconds.map(seconds).unwrap_or_default()),
            Cell::plain(peer.spiffe.as_str()),
            Cell::plain(peer.why.as_deref().unwrap_or_default()),
        ]
    });
    table(out, &["PEER", "SITE", "ADDRESS", "REACHABLE", "RTT", "IDENTITY", "WHY"], rows.collect())
}

pub(super) fn gateway(view: &GatewayView) -> String {
    let mut text =
        format!("{} in {}, sealane {}, listens on {}", view.name, printable(&view.site), printable(&view.version), printable(&view.listen));
    if let Some(spiffe) = &view.spiffe {
        let _ = write!(text, "\nidentity {spiffe}");
    }
    if let Some(end) = &view.certificate_expires {
        let _ = write!(text, ", certificate until {}", printable(end));
    }
    if let Some(sandbox) = &view.sandbox {
        let files = sandbox.landlock_abi.map_or("without Landlock".to_owned(), |abi| format!("Landlock {abi}"));
        let calls = if sandbox.seccomp { "seccomp" } else { "without seccomp" };
        let _ = write!(text, "\nsandbox {}: {files}, {calls}", printable(&sandbox.setting));
    }
    if let Some(impaired) = &view.impaired {
        let _ = write!(text, "\nimpaired: {}", printable(impaired));
    }
    text.push('\n');
    text
}

pub(super) fn migrations(out: Out, migrations: &[MigrationView]) -> String {
    if migrations.is_empty() {
        return "no migrations\n".to_owned();
    }
    let rows = migrations.iter().map(|view| {
        let how = match (&view.report, &view.progress) {
            (Some(report), _) => ending(report),
            (None, Some(progress)) => progress_line(progress),
            (None, None) => String::new(),
        };
        vec![
            Cell::plain(&short(view.id)),
            Cell::plain(view.vm.as_str()),
            Cell::plain(&direction(view)),
            Cell::toned(word(&view.state), state_tone(view.state)),
            Cell::plain(&how),
        ]
    });
    table(out, &["ID", "VM", "DIRECTION", "STATE", "PROGRESS"], rows.collect())
}

pub(super) fn migration(out: Out, view: &MigrationView) -> String {
    if let Some(found) = &view.report {
        return report(out, found) + &records(&view.records);
    }
    let mut text = format!("{} {} {}: {}\n", view.id, view.vm, direction(view), out.paint(state_tone(view.state), &word(&view.state)));
    if let Some(progress) = &view.progress {
        let _ = writeln!(text, "{}", progress_line(progress));
    }
    text + &records(&view.records)
}

/// What the journal has of a migration.
fn records(records: &[RecordView]) -> String {
    let lines = records.iter().map(|record| {
        let at = record.at.as_deref().map(|at| format!(" at {}", printable(at))).unwrap_or_default();
        format!("  {:<10} {}{at}: {}\n", "journal", printable(&record.record).to_uppercase(), printable(&record.meaning))
    });
    lines.collect()
}

pub(super) fn doubts(out: Out, doubts: &[DoubtView]) -> String {
    if doubts.is_empty() {
        return "no VM is in doubt\n".to_owned();
    }
    doubts.iter().map(|view| doubt(out, view)).collect::<Vec<_>>().join("\n")
}

pub(super) fn doubt(out: Out, view: &DoubtView) -> String {
    let (state, way) = (out.paint(Tone::Bad, "in doubt"), if view.side == Side::Source { "to" } else { "from" });
    let mut text = format!("{} {}: {state}, {way} {}, epoch {}\n", view.vm, view.migration, printable(&view.peer), view.epoch);
    text += &records(std::slice::from_ref(&view.last));
    for known in &view.choices {
        let evidence = if known.needs_evidence { "; needs --evidence" } else { "" };
        let _ = writeln!(text, "  {:<10} {}{evidence}", format!("--{}", word(&known.choice)), printable(&known.meaning));
    }
    if let Some(proposal) = &view.proposal {
        let (choice, who, at) = (word(&proposal.choice), printable(&proposal.proposer), printable(&proposal.at));
        let _ = writeln!(text, "  {:<10} {choice} by {who} at {at}", "proposed");
        if let Some(evidence) = &proposal.evidence {
            let _ = writeln!(text, "  {:<10} {}", "evidence", printable(evidence));
        }
        let approvers = if proposal.approvers.is_empty() { "nobody yet".to_owned() } else { printable(&proposal.approvers.join(", ")) };
        let _ = writeln!(text, "  {:<10} {approvers}", "approved");
    }
    text
}

pub(super) fn history(out: Out, reports: &[Report]) -> String {
    if reports.is_empty() {
        return "no finished migrations\n".to_owned();
    }
    let rows = reports.iter().map(|report| {
        vec![
            Cell::plain(&short(report.migration_id)),
            Cell::plain(report.vm.as_str()),
            Cell::toned(word(&report.state), outcome_tone(report.state)),
            Cell::plain(place(report.running_on)),
            Cell::plain(&seconds(report.duration_seconds)),
            Cell::plain(&report.downtime_seconds.map(seconds).unwrap_or_default()),
            Cell::plain(&bytes(report.wire_bytes)),
            Cell::plain(report.error.as_ref().map_or("", |error| &error.message)),
        ]
    });
    table(out, &["ID", "VM", "STATE", "RUNS ON", "DURATION", "DOWNTIME", "WIRE", "ERROR"], rows.collect())
}

/// The whole report; `error` is for stderr.
pub(super) fn report(out: Out, report: &Report) -> String {
    let mut text = format!(
        "{} {}: {}; {}\n",
        report.vm,
        report.migration_id,
        out.paint(outcome_tone(report.state), &word(&report.state)),
        whereabouts(report.running_on)
    );
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<10} {value}");
    };
    row("driver", format!("{}, {}, {} rounds", printable(&report.hypervisor), mode(report.mode), report.rounds));
    row("memory", format!("{}, {} on the wire", bytes(report.guest_memory_bytes), bytes(report.wire_bytes)));
    let pages = report.pages;
    row(
        "pages",
        format!(
            "{} zero, {} duplicate, {} delta, {} compressed, {} raw",
            pages.zero, pages.duplicate, pages.delta, pages.compressed, pages.raw
        ),
    );
    row("time", seconds(report.duration_seconds));
    if let Some(downtime) = report.downtime_seconds {
        row("downtime", format!("{}{}", seconds(downtime), breakdown(report)));
    }
    if let Some(PostCopyReport { seconds: took, faults }) = report.post_copy {
        row("post-copy", format!("{} behind the switch, {faults} pages waited for", seconds(took)));
    }
    if let Some(cpu) = report.cpu_seconds {
        row("cpu", format!("{} of both gateways", seconds(cpu)));
    }
    if let Some(disks) = &report.disks {
        let compared = disks.verify_seconds.map_or("not compared".to_owned(), |took| format!("compared in {}", seconds(took)));
        let held = if disks.held_bytes > 0 { format!(", {} were there", bytes(disks.held_bytes)) } else { String::new() };
        let alone = if disks.only { "; only they were copied, and are kept there" } else { "" };
        let (count, length, written) = (disks.count, bytes(disks.bytes), bytes(disks.changed_bytes));
        row("disks", format!("{count}, {length}, {written} written there{held}, {compared}{alone}"));
    }
    let verified = if report.verified { "yes: all memory and state were compared" } else { "no" };
    row("verified", verified.to_owned());
    let who = |id: &Option<crate::types::SpiffeId>| id.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string);
    row("source", who(&report.authenticated.source));
    row("dest", who(&report.authenticated.destination));
    if let Some(decision) = &report.policy.decision {
        row("policy", format!("{}: {}", printable(decision), printable(&report.policy.policy_ids.join(", "))));
    }
    for (name, head) in [("audit src", &report.audit.source_head), ("audit dst", &report.audit.destination_head)] {
        if let Some(head) = head {
            row(name, printable(head).replace('\n', " "));
        }
    }
    text
}

fn breakdown(report: &Report) -> String {
    let Some(parts) = &report.downtime_breakdown else { return String::new() };
    let parts = [
        ("pause", parts.pause_seconds),
        ("last pages", parts.last_pages_seconds),
        ("state", parts.state_seconds),
        ("verify", parts.verify_seconds),
        ("journal", parts.journal_seconds),
        ("network", parts.network_seconds),
        ("resume", parts.resume_seconds),
    ];
    let parts: Vec<String> = parts.iter().map(|(name, value)| format!("{name} {}", seconds(*value))).collect();
    format!(" ({})", parts.join(", "))
}

pub(super) fn plan(out: Out, plan: &PlanView) -> String {
    let mut text = checks(out, &plan.checks);
    if let Some(estimate) = &plan.estimate {
        let _ = writeln!(
            text,
            "estimate: {}, downtime {}, {} on the wire",
            seconds(estimate.duration_seconds),
            seconds(estimate.downtime_seconds),
            bytes(estimate.wire_bytes)
        );
    }
    let verdict = if plan.possible { out.paint(Tone::Good, "possible") } else { out.paint(Tone::Bad, "not possible") };
    let _ = writeln!(text, "{} to {}: {verdict}", plan.vm, plan.to);
    text
}

pub(super) fn checks(out: Out, checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (word, tone) = match check.verdict {
            CheckVerdict::Pass => ("pass", Tone::Good),
            CheckVerdict::Warn => ("warn", Tone::Doubtful),
            CheckVerdict::Fail => ("FAIL", Tone::Bad),
            CheckVerdict::Skipped => ("skip", Tone::Quiet),
        };
        let _ = writeln!(text, "{}  {:<width$}  {}", out.paint(tone, word), printable(&check.name), printable(&check.detail));
        if let Some(hint) = &check.hint {
            let _ = writeln!(text, "      {:<width$}  hint: {}", "", printable(hint));
        }
    }
    text
}

fn ending(report: &Report) -> String {
    let downtime = report.downtime_seconds.map(|downtime| format!(", downtime {}", seconds(downtime))).unwrap_or_default();
    format!("{}{downtime}; {}", seconds(report.duration_seconds), whereabouts(report.running_on))
}

fn direction(view: &MigrationView) -> String {
    match view.side {
        Side::Source => format!("to {}", view.peer),
        Side::Destination => format!("from {}", view.peer),
    }
}

fn place(place: RunningOn) -> &'static str {
    match place {
        RunningOn::Source => "source",
        RunningOn::Destination => "destination",
        RunningOn::NeitherYet => "neither yet",
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Precopy => "pre-copy",
        Mode::Postcopy => "post-copy",
        Mode::Hybrid => "hybrid",
    }
}

fn outcome_tone(outcome: Outcome) -> Tone {
    match outcome {
        Outcome::Completed => Tone::Good,
        Outcome::Cancelled => Tone::Doubtful,
        Outcome::Failed | Outcome::InDoubt => Tone::Bad,
    }
}

fn state_tone(state: MigrationState) -> Tone {
    match state {
        MigrationState::Active | MigrationState::Completed => Tone::Good,
        MigrationState::Cancelling | MigrationState::Cancelled => Tone::Doubtful,
        MigrationState::Failed | MigrationState::InDoubt => Tone::Bad,
    }
}

/// The word that a value is written as in JSON.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

struct Cell {
    text: String,
    tone: Option<Tone>,
}

impl Cell {
    fn plain(text: &str) -> Self {
        Self { text: printable(text).replace('\n', " "), tone: None }
    }

    fn toned(text: String, tone: Tone) -> Self {
        Self { text, tone: Some(tone) }
    }
}

/// Columns as wide as their widest cell; columns without content are left out.
fn table(out: Out, header: &[&str], rows: Vec<Vec<Cell>>) -> String {
    let widths: Vec<usize> = header
        .iter()
        .enumerate()
        .map(|(column, title)| {
            let widest = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.text.chars().count()).max().unwrap_or(0);
            if widest == 0 && !rows.is_empty() { 0 } else { widest.max(title.len()) }
        })
        .collect();
    let mut text = String::new();
    let header = header.iter().map(|title| Cell { text: (*title).to_owned(), tone: Some(Tone::Quiet) }).collect();
    for row in std::iter::once(header).chain(rows) {
        let mut line = String::new();
        let mut pending = 0;
        for (cell, width) in row.iter().zip(&widths).filter(|(_, width)| **width > 0) {
            if !cell.text.is_empty() {
                line.extend(std::iter::repeat_n(' ', pending));
                line.push_str(&cell.tone.map_or_else(|| cell.text.clone(), |tone| out.paint(tone, &cell.text)));
                pending = 0;
            }
            pending += width - cell.text.chars().count() + 2;
        }
        let _ = writeln!(text, "{line}");
    }
    text
}
