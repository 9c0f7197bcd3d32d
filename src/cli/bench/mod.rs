//! `sealane bench`: a memory image through everything that carries a VM, between two gateways in this process.

mod pair;

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use self::pair::{Pair, Run, Terms};
use super::Ending;
use super::output::{Out, Tone, printable};
use super::render;
use super::tools::{BenchFlags, BenchLink};
use crate::control::{Exit, exit_of_report};
use crate::telemetry::{ErrorClass, Outcome, Problem, Report, schema_tag};

schema_tag!(
    /// Schema of `bench --json`.
    BenchSchema = "sealane.bench/1"
);

/// Bytes of a GiB.
const GIB: f64 = 1_073_741_824.0;

#[derive(Serialize)]
struct Object<'a> {
    schema: BenchSchema,
    image: String,
    image_bytes: u64,
    link: &'static str,
    lanes: u16,
    compression: String,
    /// Timed runs.
    runs: usize,
    /// Of every timed run, in order.
    durations_seconds: Vec<f64>,
    /// Image bytes by duration, of the median run.
    gib_per_second: f64,
    /// CPU time of this process, both gateways and their kernel work, in the median run.
    cpu_seconds: f64,
    cpu_seconds_per_gib: f64,
    /// Whether the warm-up run compared all memory and found it equal.
    warm_up_verified: bool,
    cores: usize,
    /// Of the median run.
    report: &'a Report,
}

pub(super) fn bench(flags: &BenchFlags, out: Out) -> Ending {
    let BenchLink::Loopback = flags.link;
    readable(&flags.image)?;
    let mut pair = Pair::new(&flags.image)?;
    let warm_up = pair.run(&Terms { lanes: flags.lanes, compress: flags.compress, verify: true })?;
    if let Some(exit) = not_completed(&warm_up, out) {
        return Ok(exit);
    }
    out.talk(&format!("warm-up: {}, memory and state compared: equal", summary(&warm_up)));
    let mut runs = Vec::new();
    for number in 1..=flags.rounds {
        let run = pair.run(&Terms { lanes: flags.lanes, compress: flags.compress, verify: flags.verify })?;
        if let Some(exit) = not_completed(&run, out) {
            return Ok(exit);
        }
        out.talk(&format!("run {number} of {}: {}", flags.rounds, summary(&run)));
        runs.push(run);
    }
    let durations: Vec<f64> = runs.iter().map(|run| run.report.duration_seconds).collect();
    runs.sort_by(|a, b| a.report.duration_seconds.total_cmp(&b.report.duration_seconds));
    // Of an even number, the faster of the two in the middle.
    let middle = runs.len().saturating_sub(1) / 2;
    let Some(median) = runs.get(middle) else {
        return Err(Problem::new(ErrorClass::Bug, "no run was made"));
    };
    let object = object(flags, median, durations, warm_up.report.verified);
    if out.json {
        out.object(&object);
    } else {
        out.data(&text(out, &object));
    }
    Ok(Exit::Done)
}

fn readable(image: &Path) -> Result<(), Problem> {
    std::fs::File::open(image)
        .map(drop)
        .map_err(|error| Problem::new(ErrorClass::Misuse, format!("cannot read image `{}`: {error}", image.display())))
}

/// The exit code of a run that cannot be measured, after its report was said.
fn not_completed(run: &Run, out: Out) -> Option<Exit> {
    if run.report.state == Outcome::Completed {
        return None;
    }
    if out.json {
        out.object(&run.report);
    } else {
        out.data(&render::report(out, &run.report));
    }
    if let Some(error) = &run.report.error {
        out.say_problem(error);
    }
    Some(exit_of_report(&run.report))
}

fn object<'a>(flags: &BenchFlags, median: &'a Run, durations_seconds: Vec<f64>, warm_up_verified: bool) -> Object<'a> {
    let report = &median.report;
    let gib = report.guest_memory_bytes as f64 / GIB;
    let cpu = report.cpu_seconds.unwrap_or_default();
    Object {
        schema: BenchSchema,
        image: flags.image.display().to_string(),
        image_bytes: report.guest_memory_bytes,
        link: "loopback",
        lanes: flags.lanes,
        compression: flags.compress.to_string(),
        runs: durations_seconds.len(),
        durations_seconds,
        gib_per_second: gib / report.duration_seconds.max(1e-9),
        cpu_seconds: cpu,
        cpu_seconds_per_gib: cpu / gib.max(1e-9),
        warm_up_verified,
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        report,
    }
}

fn summary(run: &Run) -> String {
    let report = &run.report;
    format!(
        "{}, {:.2} GiB/s, {} on the wire, pause {}, cpu {}",
        render::seconds(report.duration_seconds),
        report.guest_memory_bytes as f64 / GIB / report.duration_seconds.max(1e-9),
        render::bytes(report.wire_bytes),
        report.downtime_seconds.map(render::seconds).unwrap_or_default(),
        report.cpu_seconds.map(render::seconds).unwrap_or_default()
    )
}

fn text(out: Out, object: &Object<'_>) -> String {
    let mut text = render::report(out, object.report);
    let rate = format!("{:.2} GiB/s", object.gib_per_second);
    let _ = writeln!(
        text,
        "{}: {} at {}, {:.2} cpu-s/GiB, {} lanes, {}, median of {} runs on {} cores",
        printable(&object.image),
        render::bytes(object.image_bytes),
        out.paint(Tone::Good, &rate),
        object.cpu_seconds_per_gib,
        object.lanes,
        object.compression,
        object.runs,
        object.cores
    );
    text
}
