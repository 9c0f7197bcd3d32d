//! How fast one core takes pages through each stage of their way, in GB/s of guest memory.
//!
//! `cargo bench --bench pages -- [--mib 256] [--repeat 5] [--seed 1]`: a table on stderr, one JSON object on stdout. A stage is run
//! `--repeat` times after one that does not count; the figure is the median.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people: the table and the object are its output")]

use std::error::Error;
use std::time::Instant;

use sealane::hypervisor::synthetic::{Content, generate};
use sealane::memory::{Decoder, Encoder, GuestRam, MemoryLayout, PageSet, digest_ram};
use sealane::types::{LaneIndex, PAGE_BYTES, PageNumber, Round};
use sealane::wire::{Compression, CompressionScope, Durability, FRAME_HEADER_BYTES, FrameHeader, StreamTerms};

type Done = Result<(), Box<dyn Error>>;

/// Pages that one read takes in the stage `copy`: 256 KiB, as a batch.
const COPY_PAGES: u64 = 64;

struct Options {
    mib: u64,
    repeat: usize,
    seed: u64,
}

/// One line of the table.
struct Stage {
    name: &'static str,
    content: &'static str,
    codec: &'static str,
    seconds: Vec<f64>,
    /// Frame bytes for each byte of memory, where frames are made.
    ratio: Option<f64>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options { mib: 256, repeat: 5, seed: 1 };
    // `--bench` is what cargo adds.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("`{argument}`: expected a value behind it"))?;
        let number: u64 = value.parse().map_err(|_| format!("`{argument} {value}`: expected a number"))?;
        match argument.as_str() {
            "--mib" => options.mib = number.clamp(1, 1 << 20),
            "--repeat" => options.repeat = usize::try_from(number.clamp(1, 1000))?,
            "--seed" => options.seed = number,
            other => return Err(format!("`{other}` is unknown: expected --mib, --repeat or --seed").into()),
        }
    }
    Ok(options)
}

fn ram(content: Content, options: &Options) -> Result<GuestRam, Box<dyn Error>> {
    let ram = GuestRam::anonymous(MemoryLayout::flat(options.mib * 256)?)?;
    // Every page is there, also those that stay zero: what is measured is the work, not the first touch.
    ram.clear(PageNumber(0), ram.pages())?;
    generate(content, ram.pages(), options.seed, |first, bytes| ram.write(first, bytes))?;
    Ok(ram)
}

fn terms(compression: Compression) -> StreamTerms {
    let compression_scope = CompressionScope::Batch;
    StreamTerms { lanes: 1, compression, compression_scope, length_padding: false, durability: Durability::None, verify: false }
}

/// Runs `work` once to warm up, and then as often as is asked; the seconds of each.
fn timed(repeat: usize, mut work: impl FnMut() -> Done) -> Result<Vec<f64>, Box<dyn Error>> {
    work()?;
    let mut seconds = Vec::with_capacity(repeat);
    for _ in 0..repeat {
        let began = Instant::now();
        work()?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

/// Hands every frame of one pass over all pages to `sink`.
fn encode(ram: &GuestRam, compression: Compression, mut sink: impl FnMut(&[u8])) -> Done {
    let pages = PageSet::full(ram.pages());
    let mut encoder = Encoder::new(LaneIndex(0), 1, &terms(compression), ram.pages());
    let mut frame = Vec::new();
    let mut from = Some(PageNumber(0));
    while let Some(first) = from {
        frame.clear();
        from = encoder.encode_frame(ram, Round(1), &pages, first, &mut frame)?;
        sink(&frame);
    }
    Ok(())
}

fn decode(frames: &[Vec<u8>], into: &GuestRam) -> Done {
    let mut decoder = Decoder::new(LaneIndex(0), 1, &terms(Compression::Auto), into.pages());
    for frame in frames {
        let (header, body) = frame.split_first_chunk::<FRAME_HEADER_BYTES>().ok_or("a frame without a header")?;
        decoder.apply(&FrameHeader::decode(header)?, body, into)?;
    }
    Ok(())
}

fn copy(ram: &GuestRam) -> Done {
    let mut batch = vec![0; usize::try_from(COPY_PAGES)? * PAGE_BYTES];
    for first in (0..ram.pages()).step_by(usize::try_from(COPY_PAGES)?) {
        ram.read(PageNumber(first), &mut batch)?;
        std::hint::black_box(&batch);
    }
    Ok(())
}

fn measure(options: &Options) -> Result<Vec<Stage>, Box<dyn Error>> {
    let mut stages = Vec::new();
    let contents = [("zero", Content::Zero), ("realistic", Content::Realistic), ("incompressible", Content::Incompressible)];
    let into = ram(Content::Zero, options)?;
    for (content, kind) in contents {
        let ram = ram(kind, options)?;
        let memory_bytes = ram.layout().bytes() as f64;
        let mut stage = |name, codec, seconds, ratio| stages.push(Stage { name, content, codec, seconds, ratio });
        stage("copy out", "-", timed(options.repeat, || copy(&ram))?, None);
        let digest = || -> Done {
            std::hint::black_box(digest_ram(&ram)?);
            Ok(())
        };
        stage("digest", "-", timed(options.repeat, digest)?, None);
        for (codec, compression) in [("none", Compression::None), ("lz4", Compression::Lz4)] {
            // Zero pages meet no codec.
            if kind == Content::Zero && compression != Compression::None {
                continue;
            }
            let mut frames: Vec<Vec<u8>> = Vec::new();
            encode(&ram, compression, |frame| frames.push(frame.to_vec()))?;
            let ratio = frames.iter().map(Vec::len).sum::<usize>() as f64 / memory_bytes;
            let ignored = |frame: &[u8]| {
                std::hint::black_box(frame);
            };
            let encoded = timed(options.repeat, || encode(&ram, compression, ignored))?;
            stage("encode", codec, encoded, Some(ratio));
            stage("decode", codec, timed(options.repeat, || decode(&frames, &into))?, Some(ratio));
            into.clear(PageNumber(0), into.pages())?;
        }
    }
    Ok(stages)
}

impl Stage {
    fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

fn main() -> Done {
    let options = options()?;
    let stages = measure(&options)?;
    let bytes = (options.mib << 20) as f64;
    let rate = |seconds: f64| bytes / seconds / 1e9;
    eprintln!("{:10} {:15} {:6} {:>8} {:>15} {:>7}", "stage", "content", "codec", "GB/s", "(min-max)", "ratio");
    let mut rows = Vec::new();
    for stage in &stages {
        let (slowest, fastest) = stage.seconds.iter().fold((f64::MIN, f64::MAX), |(most, least), s| (most.max(*s), least.min(*s)));
        let spread = format!("({:.2}-{:.2})", rate(slowest), rate(fastest));
        let ratio = stage.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}"));
        eprintln!("{:10} {:15} {:6} {:8.2} {spread:>15} {ratio:>7}", stage.name, stage.content, stage.codec, rate(stage.median()));
        rows.push(serde_json::json!({
            "stage": stage.name,
            "content": stage.content,
            "codec": stage.codec,
            "bytes_per_second": bytes / stage.median(),
            "bytes_per_second_min": bytes / slowest,
            "bytes_per_second_max": bytes / fastest,
            "ratio": stage.ratio,
        }));
    }
    let object = serde_json::json!({
        "schema": "sealane.pages-bench/1",
        "memory_bytes": options.mib << 20,
        "repeat": options.repeat,
        "seed": options.seed,
        "stages": rows,
    });
    println!("{object}");
    Ok(())
}
