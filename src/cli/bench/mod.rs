//! `sealane bench`: memory through everything that carries a VM, between two gateways.
//!
//! `pair.rs` is the source and, on loopback, both ends; `listen.rs` is the destination for a source elsewhere.

mod arrival;
mod listen;
mod pair;
mod side;

use std::fmt::Write;

use serde::Serialize;

use self::pair::{Pair, Run, Terms, Writes};
use super::Ending;
use super::output::{Out, Tone, printable};
use super::render;
use super::tools::{BenchCommand, BenchFlags, BenchLink, ContentFlag};
use crate::config::{Bandwidth, ByteSize};
use crate::control::{Exit, exit_of_report};
use crate::hypervisor::image::ImageSource;
use crate::hypervisor::synthetic::Content;
use crate::telemetry::{ErrorClass, Outcome, Problem, Report, chain, schema_tag};
use crate::types::{MigrationId, PAGE_BYTES, VmUuid};

schema_tag!(
    /// Schema of `bench --json`.
    BenchSchema = "sealane.bench/1"
);

/// Bytes of a GiB.
const GIB: f64 = 1_073_741_824.0;
/// What is generated when nobody says how much.
const MEMORY: ByteSize = ByteSize { bytes: 2 << 30 };
/// How fast `write-heavy` content is written when nobody says how fast.
const DIRTY_RATE: Bandwidth = Bandwidth { bytes_per_second: 100 << 20 };
/// Part of the memory that it is written in.
const WORKING_SET: u64 = 8;

#[derive(Serialize)]
struct Object<'a> {
    schema: BenchSchema,
    /// The file; absent when the memory was generated.
    image: Option<String>,
    content: Option<Generated>,
    image_bytes: u64,
    /// `loopback`, or the listener's address.
    link: String,
    lanes: u16,
    compression: String,
    /// Timed runs.
    runs: usize,
    /// Of every timed run, in order.
    durations_seconds: Vec<f64>,
    timed_runs: Vec<TimedRun>,
    /// Image bytes by duration, of the median run.
    gib_per_second: f64,
    /// CPU time of this process, its kernel work included, in the median run.
    cpu_seconds: f64,
    cpu_seconds_per_gib: f64,
    /// Of the median run, all lanes together: to make frames of pages (read, look for equal ones, pack).
    encode_seconds: f64,
    /// To make pages of frames (unpack, write); absent where the destination is another process, which says its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_seconds: Option<f64>,
    /// Whose it is: `both` gateways', or the `source`'s alone when the destination is a listener, which says its own.
    cpu_of: &'static str,
    /// Whether the warm-up run compared all memory and found it equal.
    warm_up_verified: bool,
    cores: usize,
    /// Of the median run.
    report: &'a Report,
}

/// How the memory was made.
#[derive(Clone, Serialize)]
struct Generated {
    kind: &'static str,
    seed: u64,
    /// Written by the guest while it moves.
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_bytes_per_second: Option<u64>,
}

/// What is worth a look of every timed run.
#[derive(Serialize)]
struct TimedRun {
    migration_id: MigrationId,
    duration_seconds: f64,
    downtime_seconds: Option<f64>,
    cpu_seconds: f64,
    wire_bytes: u64,
    rounds: u32,
}

/// What is moved.
struct Ram {
    image: ImageSource,
    writes: Option<Writes>,
    file: Option<String>,
    content: Option<Generated>,
}

pub(super) fn bench(flags: &BenchFlags, out: Out) -> Ending {
    if let Some(BenchCommand::Listen(listen)) = &flags.command {
        return listen::listen(listen, out);
    }
    let BenchLink::Loopback = flags.link;
    let Ram { image, writes, file, content } = ram(flags)?;
    let mut pair = match (flags.to, &flags.pki) {
        (Some(address), Some(pki)) => Pair::to(address, pki, image, writes)?,
        _ => Pair::loopback(image, writes)?,
    };
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
    let timed_runs = runs.iter().map(timed).collect();
    runs.sort_by(|a, b| a.report.duration_seconds.total_cmp(&b.report.duration_seconds));
    // Of an even number, the faster of the two in the middle.
    let middle = runs.len().saturating_sub(1) / 2;
    let Some(median) = runs.get(middle) else {
        return Err(Problem::new(ErrorClass::Bug, "no run was made"));
    };
    let object = Object { image: file, content, ..object(flags, median, timed_runs, warm_up.report.verified) };
    if out.json {
        out.object(&object);
    } else {
        out.data(&text(out, &object));
    }
    Ok(Exit::Done)
}

/// Reads or generates what is moved.
fn ram(flags: &BenchFlags) -> Result<Ram, Problem> {
    let misuse = |text: String| Problem::new(ErrorClass::Misuse, text);
    let uuid = VmUuid(side::random()?);
    let Some(content) = flags.content else {
        let Some(path) = &flags.image else { return Err(misuse("expected --image or --content".to_owned())) };
        let image =
            ImageSource::open(path, pair::VM, uuid).map_err(|error| misuse(format!("image `{}`: {}", path.display(), chain(&error))))?;
        return Ok(Ram { image, writes: None, file: Some(path.display().to_string()), content: None });
    };
    let bytes = flags.memory.unwrap_or(MEMORY).bytes;
    if !bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(misuse(format!("--memory is {bytes} bytes: expected a multiple of {PAGE_BYTES}")));
    }
    let pages = bytes / PAGE_BYTES as u64;
    let (kind, of) = match content {
        ContentFlag::Realistic => ("realistic", Content::Realistic),
        ContentFlag::Incompressible => ("incompressible", Content::Incompressible),
        ContentFlag::Zero => ("zero", Content::Zero),
        ContentFlag::WriteHeavy => ("write-heavy", Content::Realistic),
    };
    let heavy = content == ContentFlag::WriteHeavy;
    if flags.dirty_rate.is_some() && !heavy {
        return Err(misuse(format!("--dirty-rate has no meaning for `{kind}` content: expected --content write-heavy with it")));
    }
    let rate = heavy.then(|| flags.dirty_rate.unwrap_or(DIRTY_RATE).bytes_per_second);
    let writes = rate.map(|rate| Writes { pages_per_second: rate / PAGE_BYTES as u64, working_set_pages: pages / WORKING_SET });
    let image = ImageSource::generated(of, pages, flags.seed, pair::VM, uuid)
        .map_err(|error| misuse(format!("{bytes} bytes of generated memory: {}", chain(&error))))?;
    Ok(Ram { image, writes, file: None, content: Some(Generated { kind, seed: flags.seed, dirty_bytes_per_second: rate }) })
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

fn timed(run: &Run) -> TimedRun {
    let report = &run.report;
    TimedRun {
        migration_id: report.migration_id,
        duration_seconds: report.duration_seconds,
        downtime_seconds: report.downtime_seconds,
        cpu_seconds: run.cpu_seconds,
        wire_bytes: report.wire_bytes,
        rounds: report.rounds,
    }
}

fn object<'a>(flags: &BenchFlags, median: &'a Run, timed_runs: Vec<TimedRun>, warm_up_verified: bool) -> Object<'a> {
    let report = &median.report;
    let gib = report.guest_memory_bytes as f64 / GIB;
    Object {
        schema: BenchSchema,
        image: None,
        content: None,
        image_bytes: report.guest_memory_bytes,
        link: flags.to.map_or_else(|| "loopback".to_owned(), |address| address.to_string()),
        lanes: flags.lanes,
        compression: flags.compress.to_string(),
        runs: timed_runs.len(),
        durations_seconds: timed_runs.iter().map(|run| run.duration_seconds).collect(),
        timed_runs,
        gib_per_second: gib / report.duration_seconds.max(1e-9),
        cpu_seconds: median.cpu_seconds,
        cpu_seconds_per_gib: median.cpu_seconds / gib.max(1e-9),
        encode_seconds: median.encode.as_secs_f64(),
        decode_seconds: median.decode.map(|decode| decode.as_secs_f64()),
        cpu_of: if flags.to.is_some() { "source" } else { "both" },
        warm_up_verified,
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        report,
    }
}

fn summary(run: &Run) -> String {
    let report = &run.report;
    format!(
        "{}, {:.2} GiB/s, {} on the wire, pause {}, cpu {} (encoding {}{})",
        render::seconds(report.duration_seconds),
        report.guest_memory_bytes as f64 / GIB / report.duration_seconds.max(1e-9),
        render::bytes(report.wire_bytes),
        report.downtime_seconds.map(render::seconds).unwrap_or_default(),
        render::seconds(run.cpu_seconds),
        render::seconds(run.encode.as_secs_f64()),
        run.decode.map(|decode| format!(", decoding {}", render::seconds(decode.as_secs_f64()))).unwrap_or_default()
    )
}

fn text(out: Out, object: &Object<'_>) -> String {
    let mut text = render::report(out, object.report);
    let rate = format!("{:.2} GiB/s", object.gib_per_second);
    let name = match (&object.image, &object.content) {
        (Some(image), _) => printable(image),
        (None, Some(content)) => format!("{} content", content.kind),
        (None, None) => String::new(),
    };
    let _ = writeln!(
        text,
        "{name}: {} at {}, {:.2} cpu-s/GiB ({}), {} lanes, {}, median of {} runs on {} cores",
        render::bytes(object.image_bytes),
        out.paint(Tone::Good, &rate),
        object.cpu_seconds_per_gib,
        if object.cpu_of == "both" { "both ends" } else { "the source alone" },
        object.lanes,
        object.compression,
        object.runs,
        object.cores
    );
    text
}
