//! Two gateways in this process: certificates of an authority of their own, journals, audit logs, and UDP on loopback.

use std::fs::DirBuilder;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::audit::AuditLog;
use crate::control::Compress;
use crate::engine::{
    Command, DestinationEnd, DestinationOrder, EngineError, Evidence, Link, NoArbiter, SourceEnd, SourceOrder, SourcePorts, greet,
    run_destination, run_source,
};
use crate::gateway;
use crate::hypervisor::image::{IMAGE_KIND, ImageDestination, ImageSource};
use crate::hypervisor::{PagedDestination, PagedSource};
use crate::identity::authority::{self, AuthorityFiles};
use crate::identity::{Credentials, IdentityConfig, TrustDomainConfig};
use crate::journal::Journal;
use crate::limits;
use crate::migration::Goal;
use crate::telemetry::{ErrorClass, Problem, Progress, Report, chain};
use crate::transport::{Endpoint, TransportConfig, TransportError};
use crate::types::{Epoch, MigrationId, PageNumber, VmName, VmUuid};
use crate::wire::{CompressionScope, Durability, Hello, Message, StreamTerms};

const TRUST_DOMAIN: &str = "bench.sealane";
/// The image's VM in messages and records.
const VM: &str = "image";
const UUID: VmUuid = VmUuid(*b"sealane bench vm");
/// As the daemon's defaults.
const DOWNTIME_MAX: Duration = Duration::from_millis(300);
const PAUSE_FIXED: Duration = Duration::from_millis(10);
const RESOLVE_FOR: Duration = Duration::from_secs(10);
/// Nothing on loopback takes this long; a hang ends with a message.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What is asked of one run.
pub(super) struct Terms {
    pub(super) lanes: u16,
    pub(super) compress: Compress,
    pub(super) verify: bool,
}

/// What one run gave.
pub(super) struct Run {
    pub(super) report: Report,
}

/// One gateway: everything but the daemon around it.
struct Side {
    credentials: Arc<Credentials>,
    evidence: Evidence,
    endpoint: Endpoint,
    // Last, so that what it drives is gone before it.
    runtime: Runtime,
}

/// Both ends, and the image that goes from one to the other.
pub(super) struct Pair {
    source: Side,
    destination: Side,
    image: PathBuf,
    vm: VmName,
    interrupts: Signal,
    epoch: Epoch,
    _directory: Scratch,
}

/// A directory that goes when the bench does: it holds keys.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is the temporary directory's to remove.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Scratch {
    fn new() -> Result<Self, Problem> {
        let name: String = random::<8>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = std::env::temp_dir().join(format!("sealane-bench-{name}"));
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| Problem::new(ErrorClass::Local, format!("cannot make directory `{}`: {error}", path.display())))?;
        Ok(Self(path))
    }
}

fn random<const N: usize>() -> Result<[u8; N], Problem> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| Problem::new(ErrorClass::Local, "the system's random numbers cannot be read"))?;
    Ok(bytes)
}

fn local(what: &str, error: &dyn std::error::Error) -> Problem {
    Problem::new(ErrorClass::Local, format!("{what}: {}", chain(error)))
}

impl Side {
    fn new(directory: &Path, authority: &AuthorityFiles, name: &str) -> Result<Self, Problem> {
        let failed = |what: &str| format!("{what} of gateway `{name}`");
        let files = authority::issue(&directory.join("ca"), name, "loopback").map_err(|error| local(&failed("certificate"), &error))?;
        let trust = vec![TrustDomainConfig {
            domain: TRUST_DOMAIN.to_owned(),
            roots: authority.certificate.clone(),
            crls: vec![authority.crl.clone()],
        }];
        let config = IdentityConfig { certificate: files.certificate, key: files.key, signing_key: files.signing_key, trust };
        let credentials = Credentials::load(config).map_err(|error| local(&failed("identity"), &error))?;
        let own = directory.join(name);
        let journal = Journal::open(&own.join("state.redb")).map_err(|error| local(&failed("journal"), &error))?;
        let audit = AuditLog::open(&own.join("audit"), credentials.own_id().as_str(), gateway::audit_signer(&credentials))
            .map_err(|error| local(&failed("audit log"), &error))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .map_err(|error| local(&failed("runtime"), &error))?;
        let endpoint = {
            let _inside = runtime.enter();
            let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            Endpoint::bind(TransportConfig::new(anywhere), Arc::clone(&credentials)).map_err(|error| local(&failed("UDP port"), &error))?
        };
        let images = directory.join("images").into();
        let (journal, signer, arbiter) = (Arc::new(journal), credentials.signer(), Arc::new(NoArbiter));
        let evidence = Evidence { journal, audit, signer, images, arbiter };
        Ok(Self { credentials, evidence, endpoint, runtime })
    }

    fn hello(&self) -> Hello {
        Hello::new(self.evidence.journal.incarnation(), self.credentials.signer().public_key())
    }
}

impl Pair {
    pub(super) fn new(image: &Path) -> Result<Self, Problem> {
        let directory = Scratch::new()?;
        let authority = authority::init(&directory.0.join("ca"), TRUST_DOMAIN).map_err(|error| local("certificate authority", &error))?;
        let source = Side::new(&directory.0, &authority, "source")?;
        let destination = Side::new(&directory.0, &authority, "destination")?;
        // From here on Ctrl-C cancels, so that the directory is removed.
        let interrupts = {
            let _inside = source.runtime.enter();
            signal(SignalKind::interrupt()).map_err(|error| local("signals", &error))?
        };
        let vm = VM.parse().map_err(|_| Problem::new(ErrorClass::Bug, format!("`{VM}` is no VM name")))?;
        Ok(Self { source, destination, image: image.to_owned(), vm, interrupts, epoch: Epoch(0), _directory: directory })
    }

    /// Moves the image once, into memory that is there already; reading the image is not timed.
    pub(super) fn run(&mut self, terms: &Terms) -> Result<Run, Problem> {
        let failed = |error: crate::hypervisor::HypervisorError| {
            Problem::new(ErrorClass::Misuse, format!("image `{}`: {}", self.image.display(), chain(&error)))
        };
        let guest = ImageSource::open(&self.image, VM, UUID).map_err(failed)?;
        let twin = ImageDestination::prepare(VM, guest.machine()).map_err(failed)?;
        let pages = twin.ram().pages();
        // A gateway's VMM has its memory before the first page arrives.
        twin.ram().clear(PageNumber(0), pages).map_err(|error| local("the destination's memory", &error))?;
        let memory_bytes = guest.ram().layout().bytes();
        let order = self.order(terms)?;
        let migration = order.migration;
        let started = (SystemTime::now(), Instant::now(), cpu_seconds());
        let (there, here, interrupts) = (&self.destination, &self.source, &mut self.interrupts);
        let (give_up, given_up) = oneshot::channel();
        let (source, destination, took, cpu) = std::thread::scope(|scope| {
            let destination = scope.spawn(|| there.runtime.block_on(there.arrive(Box::new(twin), given_up)));
            let source = here.runtime.block_on(here.depart(there, order, Box::new(guest), interrupts));
            let (took, cpu) = (started.1.elapsed(), cpu_seconds() - started.2);
            if source.is_err() {
                // The destination would wait for a session that does not come.
                let _ = give_up.send(());
            }
            (source, destination.join(), took, cpu)
        });
        let source = source.map_err(|error| Problem::new(error.class(), chain(&error)))?;
        // What failed at the destination the source was told, as far as anybody can be.
        drop(destination.map_err(|_| Problem::new(ErrorClass::Bug, "the destination's thread ended"))?);
        let mut report = gateway::report(migration, &self.vm, source.outcome, source.error.as_ref(), started.0);
        gateway::put_figures(&mut report, &source.figures);
        report.duration_seconds = took.as_secs_f64();
        report.cpu_seconds = Some(cpu);
        IMAGE_KIND.clone_into(&mut report.hypervisor);
        report.guest_memory_bytes = memory_bytes;
        report.authenticated.source = Some(self.source.credentials.own_id());
        report.authenticated.destination = Some(self.destination.credentials.own_id());
        report.audit.source_head = Some(self.source.evidence.audit.head().text);
        report.audit.destination_head = Some(self.destination.evidence.audit.head().text);
        Ok(Run { report })
    }

    fn order(&mut self, terms: &Terms) -> Result<SourceOrder, Problem> {
        let epoch = self.epoch;
        self.epoch = epoch.next();
        Ok(SourceOrder {
            migration: MigrationId(random()?),
            vm: self.vm.clone(),
            uuid: UUID,
            epoch,
            address: format!("image:{VM}"),
            goal: Goal { downtime_max: DOWNTIME_MAX, throttle: false, fixed_cost: PAUSE_FIXED },
            bandwidth: None,
            stream: StreamTerms {
                lanes: terms.lanes,
                compression: gateway::compression(terms.compress),
                compression_scope: CompressionScope::Stream,
                length_padding: false,
                durability: Durability::None,
                verify: terms.verify,
            },
            timeout: Some(TIMEOUT),
            resolve_timeout: RESOLVE_FOR,
            // A session that ends on loopback does not come back.
            outage_max: Duration::ZERO,
            // No policy is asked: what is measured is the way of the pages.
            policy_digest: [0; 32],
            zstd_level: gateway::zstd_level(terms.compress),
            ledger: None,
        })
    }
}

impl Side {
    async fn dial(&self, there: &Self) -> Result<Link, EngineError> {
        let (address, expected) = (there.endpoint.local_address(), there.credentials.own_id());
        let session = self.endpoint.connect(address, &expected).await.map_err(lost)?;
        greet(session, &self.hello()).await
    }

    async fn depart(
        &self,
        there: &Self,
        order: SourceOrder,
        guest: Box<dyn PagedSource>,
        interrupts: &mut Signal,
    ) -> Result<SourceEnd, EngineError> {
        let link = self.dial(there).await?;
        let (commands_in, commands) = mpsc::channel(limits::COMMAND_QUEUE);
        let (progress, _shown) = watch::channel(Progress::new(order.migration));
        let ports = SourcePorts {
            evidence: self.evidence.clone(),
            link,
            guest,
            ask_commit: Arc::new(|_| Ok(())),
            redial: Arc::new(|| Box::pin(async { Err(EngineError::Bug("the session ended".into())) })),
            progress,
            commands,
        };
        let mut run = std::pin::pin!(run_source(order, ports));
        loop {
            tokio::select! {
                end = &mut run => return Ok(end),
                Some(()) = interrupts.recv() => {
                    // A run that ends at this moment does not listen any more.
                    let _ = commands_in.try_send(Command::Cancel);
                }
            }
        }
    }

    async fn arrive(&self, twin: Box<dyn PagedDestination>, given_up: oneshot::Receiver<()>) -> Result<DestinationEnd, EngineError> {
        tokio::select! {
            end = self.take(twin) => end,
            Ok(()) = given_up => Err(EngineError::Bug("the source did not come".into())),
        }
    }

    async fn take(&self, twin: Box<dyn PagedDestination>) -> Result<DestinationEnd, EngineError> {
        let session = match self.endpoint.accept().await {
            Some(Ok(session)) => session,
            Some(Err(refused)) => return Err(lost(refused.reason)),
            None => return Err(EngineError::Bug("the destination's endpoint ended".into())),
        };
        let link = greet(session, &self.hello()).await?;
        let offer = match link.session.receive().await.map_err(lost)? {
            Message::Offer(offer) => offer,
            other => return Err(EngineError::OutOfPlace { expected: "OFFER", got: other.name().to_owned() }),
        };
        let lanes = offer.stream.lanes;
        let evidence = self.evidence.clone();
        // Nobody shuts a benchmark down from outside.
        let (_steering, commands) = tokio::sync::mpsc::channel(1);
        let (_returns, returns) = tokio::sync::mpsc::channel(1);
        let order = DestinationOrder {
            offer,
            lanes,
            evidence,
            link,
            twin,
            ask_commit: Arc::new(|_| Ok(())),
            policy_digest: [0; 32],
            commands,
            returns,
            outage_max: Duration::ZERO,
            progress: None,
            comes_back_in: None,
        };
        Ok(run_destination(order).await)
    }
}

fn lost(source: TransportError) -> EngineError {
    EngineError::Transport { migration: MigrationId([0; 16]), source }
}

/// Ticks of a second in `/proc`: part of Linux' ABI.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time of this process until now, in user and kernel mode, ended threads included.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name may have spaces and brackets; user and system time are the 12th and 13th fields behind it.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let ticks: u32 = after.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    f64::from(ticks) / TICKS_PER_SECOND
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_of_ended_threads_counts() {
        let before = cpu_seconds();
        let work = || (0..200_000_000_u64).fold(0, |sum: u64, number| std::hint::black_box(sum ^ number));
        std::thread::spawn(work).join().unwrap();
        assert!(cpu_seconds() > before);
    }
}
