//! How fast lanes carry bytes that mean nothing, and what that costs. Figures are one JSON line on standard output.
//!
//! ```text
//! cargo bench --bench lane -- loop [KEY=VALUE...]             both ends in one process, over loopback
//! cargo bench --bench lane -- pki DIR                         certificates for the two ends below
//! cargo bench --bench lane -- receive DIR ADDRESS             until it is killed
//! cargo bench --bench lane -- send DIR ADDRESS [KEY=VALUE...]
//! ```
//!
//! Keys: `lanes` (2), `seconds` (5), `payload` (largest UDP payload, 6500), `congestion` (rate, cubic, bbr: how it is compared).

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a tool for a terminal")]

use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sealane::identity::{Credentials, IdentityConfig, PostQuantum, TrustDomainConfig, authority};
use sealane::transport::{Congestion, Endpoint, LaneHandler, LaneIo, LinkStats, Session, TransportConfig, TransportError};
use sealane::types::{LaneIndex, MigrationId, SpiffeId};
use sealane::wire::{Accept, Message};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DOMAIN: &str = "bench.sealane";
/// What the engine gives a lane at once is of this order.
const CHUNK_BYTES: usize = 256 << 10;

#[derive(Debug, Clone, Copy)]
struct Options {
    lanes: u16,
    seconds: u64,
    payload: u16,
    congestion: Congestion,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self { lanes: 2, seconds: 5, payload: 6500, congestion: Congestion::Rate };
        for argument in arguments {
            let (key, value) = argument.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, got `{argument}`"))?;
            match (key, value) {
                ("lanes", _) => options.lanes = value.parse()?,
                ("seconds", _) => options.seconds = value.parse()?,
                ("payload", _) => options.payload = value.parse()?,
                ("congestion", "rate") => options.congestion = Congestion::Rate,
                ("congestion", "cubic") => options.congestion = Congestion::Cubic,
                ("congestion", "bbr") => options.congestion = Congestion::Bbr,
                _ => return Err(format!("expected lanes, seconds, payload or congestion=rate|cubic|bbr, got `{argument}`").into()),
            }
        }
        Ok(options)
    }

    fn config(self, listen: SocketAddr) -> TransportConfig {
        TransportConfig { mtu_upper_bound: self.payload, congestion: self.congestion, ..TransportConfig::new(listen) }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lane: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    match words.as_slice() {
        ["loop", ..] => runtime.block_on(both(Options::parse(arguments.get(1..).unwrap_or_default())?)),
        ["pki", dir] => make_pki(Path::new(dir)),
        ["receive", dir, address] => runtime.block_on(receive(Path::new(dir), address.parse()?)),
        ["send", dir, address, ..] => {
            let options = Options::parse(arguments.get(3..).unwrap_or_default())?;
            runtime.block_on(send(Path::new(dir), address.parse()?, options))
        }
        // As `cargo test --benches` calls it.
        _ => {
            eprintln!("usage: lane loop [KEY=VALUE...] | pki DIR | receive DIR ADDRESS | send DIR ADDRESS [KEY=VALUE...]");
            Ok(())
        }
    }
}

fn make_pki(dir: &Path) -> Result<()> {
    authority::init(dir, DOMAIN)?;
    authority::issue(dir, "sender", "bench")?;
    authority::issue(dir, "receiver", "bench")?;
    Ok(())
}

fn credentials(dir: &Path, name: &str) -> Result<Arc<Credentials>> {
    let authority = authority::files_of(dir);
    let trust =
        vec![TrustDomainConfig { domain: DOMAIN.to_owned(), roots: authority.certificate, crls: vec![authority.crl], intermediates: None }];
    let file = |ending: &str| dir.join(format!("{name}{ending}"));
    let config = IdentityConfig {
        certificate: file("-cert.pem"),
        key: file("-key.pem"),
        signing_key: file("-signing-key.pem"),
        trust,
        post_quantum: PostQuantum::default(),
    };
    Ok(Credentials::load(config)?)
}

/// A directory that goes when this does.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn both(options: Options) -> Result<()> {
    let dir = Scratch(std::env::temp_dir().join(format!("sealane-lane-{}", std::process::id())));
    make_pki(&dir.0)?;
    let anywhere: SocketAddr = "127.0.0.1:0".parse()?;
    let receiver = Endpoint::bind(options.config(anywhere), credentials(&dir.0, "receiver")?)?;
    let address = receiver.local_address();
    let serving = tokio::spawn(serve(receiver));
    send(&dir.0, address, options).await?;
    serving.abort();
    Ok(())
}

async fn receive(dir: &Path, address: SocketAddr) -> Result<()> {
    let receiver = Endpoint::bind(TransportConfig::new(address), credentials(dir, "receiver")?)?;
    serve(receiver).await
}

async fn serve(receiver: Endpoint) -> Result<()> {
    while let Some(accepted) = receiver.accept().await {
        match accepted {
            Ok(session) => drop(tokio::spawn(admit(session))),
            Err(refused) => eprintln!("lane: refused: {}", refused.reason),
        }
    }
    Ok(())
}

/// Lets the lanes in that the sender names, and stays until it goes.
async fn admit(session: Session) -> std::result::Result<(), TransportError> {
    let Message::Accept(Accept { migration, lanes, .. }) = session.receive().await? else { return Ok(()) };
    let before = cpu_seconds();
    let handler: LaneHandler = Arc::new(|io| Box::pin(drain(io)));
    let gate = session.expect_lanes(migration, lanes, handler)?;
    session.send(&Message::Ping).await?;
    session.closed().await;
    drop(gate);
    eprintln!("lane: receiver used {:.2} cpu-s", cpu_seconds() - before);
    Ok(())
}

async fn drain(mut io: LaneIo) {
    while let Ok(Some(_)) = io.receiver.read_chunk(CHUNK_BYTES).await {}
}

async fn send(dir: &Path, address: SocketAddr, options: Options) -> Result<()> {
    let anywhere: SocketAddr = "0.0.0.0:0".parse()?;
    let sender = Endpoint::bind(options.config(anywhere), credentials(dir, "sender")?)?;
    let expected: SpiffeId = format!("spiffe://{DOMAIN}/gateway/receiver").parse()?;
    let session = sender.connect(address, &expected).await?;
    let migration = MigrationId([u8::try_from(std::process::id() % 251)?; 16]);
    session.send(&Message::Accept(Accept { migration, lanes: options.lanes, policy_digest: [0; 32], bandwidth_max: None })).await?;
    session.receive().await?;

    let (before, start) = (cpu_seconds(), Instant::now());
    let until = start + Duration::from_secs(options.seconds);
    let mut lanes = Vec::new();
    for lane in (0..options.lanes).map(LaneIndex) {
        lanes.push(session.open_lane(migration, lane, move |io| fill(io, until)).await?);
    }
    let mut ends = Vec::new();
    for lane in lanes {
        ends.push(lane.join().await??);
    }
    let seconds = start.elapsed().as_secs_f64();
    report(options, &ends, seconds, cpu_seconds() - before);
    session.close(None, "measured");
    sender.shutdown().await;
    Ok(())
}

/// Sends until then, and waits until everything has arrived.
async fn fill(mut io: LaneIo, until: Instant) -> std::result::Result<(u64, LinkStats), TransportError> {
    let chunk = Bytes::from(vec![0x5a; CHUNK_BYTES]);
    while Instant::now() < until {
        io.sender.write(chunk.clone()).await?;
    }
    let stats = io.sender.stats();
    io.sender.finish().await?;
    Ok((io.sender.sent_bytes(), stats))
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn report(options: Options, ends: &[(u64, LinkStats)], seconds: f64, cpu: f64) {
    let bytes: u64 = ends.iter().map(|(bytes, _)| bytes).sum();
    let lost: u64 = ends.iter().map(|(_, stats)| stats.lost_packets).sum();
    let packets: u64 = ends.iter().map(|(_, stats)| stats.sent_packets).sum();
    let lanes: Vec<_> = ends
        .iter()
        .map(|(bytes, stats)| {
            serde_json::json!({
                "bytes": bytes,
                "rtt_ms": stats.rtt.as_secs_f64() * 1e3,
                "window_bytes": stats.congestion_window_bytes,
                "payload_bytes": stats.mtu_bytes,
            })
        })
        .collect();
    let line = serde_json::json!({
        "congestion": format!("{:?}", options.congestion).to_lowercase(),
        "bytes_per_second": bytes as f64 / seconds,
        "mbit_per_second": bytes as f64 * 8e-6 / seconds,
        "cpu_seconds_per_gb": cpu / (bytes as f64 / 1e9),
        "lost_percent": 100.0 * lost as f64 / packets.max(1) as f64,
        "seconds": seconds,
        "lanes": lanes,
    });
    println!("{line}");
}

/// User and system time of this process; the kernel counts it in hundredths.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}
