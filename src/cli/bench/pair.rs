//! The source end, and a destination: the other gateway in this process over UDP on loopback, or a listener elsewhere.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use super::arrival::prepare;
use super::side::{DESTINATION, SOURCE, Scratch, Side, cpu_seconds, identity_in, local, lost, make_authority, peer_of, random, told};
use crate::control::Compress;
use crate::engine::{Command, EngineError, Link, Manner, SourceEnd, SourceOrder, SourcePorts, greet, run_source};
use crate::gateway;
use crate::hypervisor::image::{IMAGE_KIND, ImageDestination, ImageSource};
use crate::hypervisor::{HypervisorError, PagedSource};
use crate::limits;
use crate::migration::Goal;
use crate::telemetry::{ErrorClass, Problem, Progress, Report};
use crate::transport::TransportError;
use crate::types::{Epoch, MigrationId, SpiffeId, VmName, VmUuid};
use crate::wire::{CompressionScope, Durability, StreamTerms};

/// The image's VM in messages and records.
pub(super) const VM: &str = "image";
/// As the daemon's defaults.
const DOWNTIME_MAX: Duration = Duration::from_millis(300);
const PAUSE_FIXED: Duration = Duration::from_millis(10);
const RESOLVE_FOR: Duration = Duration::from_secs(10);
/// No run that is worth measuring takes this long; a hang ends with a message.
const TIMEOUT: Duration = Duration::from_secs(600);
/// How long a listener may take to make its memory ready.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// What is asked of one run.
pub(super) struct Terms {
    pub(super) lanes: u16,
    pub(super) compress: Compress,
    pub(super) verify: bool,
}

/// A guest that goes on writing while it moves.
#[derive(Clone, Copy)]
pub(super) struct Writes {
    pub(super) pages_per_second: u64,
    pub(super) working_set_pages: u64,
}

/// What one run gave.
pub(super) struct Run {
    pub(super) report: Report,
    /// CPU time of this process: of both gateways, or of the source alone.
    pub(super) cpu_seconds: f64,
    /// Of that, about what lanes spent to make frames of pages.
    pub(super) encode: Duration,
    /// And pages of frames; nothing where the destination is another process.
    pub(super) decode: Option<Duration>,
}

/// Where the memory goes.
enum Destination {
    Here(Box<Side>),
    At(SocketAddr),
}

/// Both ends, and the RAM that goes from one to the other.
pub(super) struct Pair {
    source: Side,
    destination: Destination,
    peer: SpiffeId,
    image: ImageSource,
    writes: Option<Writes>,
    vm: VmName,
    uuid: VmUuid,
    interrupts: Signal,
    epoch: Epoch,
    _directory: Scratch,
}

/// How long a run took, the CPU time of this process meanwhile, and what the destination spent decoding.
type Measured = (Result<SourceEnd, EngineError>, Duration, f64, Option<Duration>);

impl Pair {
    /// Both gateways in this process, with certificates of an authority of their own.
    pub(super) fn loopback(image: ImageSource, writes: Option<Writes>) -> Result<Self, Problem> {
        let directory = Scratch::new()?;
        let pki = directory.path().join("ca");
        make_authority(&pki)?;
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let destination = Side::new(directory.path(), DESTINATION, identity_in(&pki, DESTINATION)?, anywhere)?;
        let source = Side::new(directory.path(), SOURCE, identity_in(&pki, SOURCE)?, anywhere)?;
        Self::new(directory, source, Destination::Here(Box::new(destination)), image, writes)
    }

    /// The source here, and the destination at `address`, with certificates in `pki`.
    pub(super) fn to(address: SocketAddr, pki: &Path, image: ImageSource, writes: Option<Writes>) -> Result<Self, Problem> {
        let directory = Scratch::new()?;
        let anywhere = match address {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let source = Side::new(directory.path(), SOURCE, identity_in(pki, SOURCE)?, anywhere)?;
        Self::new(directory, source, Destination::At(address), image, writes)
    }

    fn new(
        directory: Scratch,
        source: Side,
        destination: Destination,
        image: ImageSource,
        writes: Option<Writes>,
    ) -> Result<Self, Problem> {
        // From here on Ctrl-C cancels, so that the directory is removed.
        let interrupts = {
            let _inside = source.runtime.enter();
            signal(SignalKind::interrupt()).map_err(|error| local("signals", &error))?
        };
        let vm = VM.parse().map_err(|_| Problem::new(ErrorClass::Bug, format!("`{VM}` is no VM name")))?;
        let peer = peer_of(&source.credentials, DESTINATION)?;
        let uuid = image.machine().uuid;
        Ok(Self { source, destination, peer, image, writes, vm, uuid, interrupts, epoch: Epoch(1), _directory: directory })
    }

    /// Moves the memory once, into memory that is there already; making either is not timed.
    pub(super) fn run(&mut self, terms: &Terms) -> Result<Run, Problem> {
        let guest = self.guest().map_err(|error| local("the image", &error))?;
        let memory_bytes = guest.ram().layout().bytes();
        let order = self.order(terms)?;
        let (migration, began) = (order.migration, SystemTime::now());
        let (source, took, cpu_seconds, decode) = match &self.destination {
            Destination::Here(there) => {
                let twin = prepare(guest.machine())?;
                within(&self.source, there, twin, order, guest, &self.peer, &mut self.interrupts)?
            }
            Destination::At(address) => {
                let here = &self.source;
                here.runtime.block_on(here.until_ready(*address, &self.peer)).map_err(|error| told(&error))?;
                let (started, cpu) = (Instant::now(), cpu_seconds());
                let source = here.runtime.block_on(here.depart(*address, &self.peer, order, guest, &mut self.interrupts));
                (source, started.elapsed(), cpu_seconds() - cpu, None)
            }
        };
        let source = source.map_err(|error| told(&error))?;
        let mut report = gateway::report(migration, &self.vm, source.outcome, source.error.as_ref(), began);
        gateway::put_figures(&mut report, &source.figures);
        report.duration_seconds = took.as_secs_f64();
        IMAGE_KIND.clone_into(&mut report.hypervisor);
        report.guest_memory_bytes = memory_bytes;
        report.authenticated.source = Some(self.source.credentials.own_id());
        report.authenticated.destination = Some(self.peer.clone());
        report.audit.source_head = Some(self.source.evidence.audit.head().text);
        if let Destination::Here(there) = &self.destination {
            report.cpu_seconds = Some(cpu_seconds);
            report.audit.destination_head = Some(there.evidence.audit.head().text);
        }
        Ok(Run { report, cpu_seconds, encode: source.figures.encode, decode })
    }

    fn guest(&self) -> Result<Box<ImageSource>, HypervisorError> {
        let mut guest = self.image.again()?;
        if let Some(Writes { pages_per_second, working_set_pages }) = self.writes {
            guest.write_at(pages_per_second, working_set_pages);
        }
        Ok(Box::new(guest))
    }

    fn order(&mut self, terms: &Terms) -> Result<SourceOrder, Problem> {
        let epoch = self.epoch;
        self.epoch = epoch.next();
        Ok(SourceOrder {
            migration: MigrationId(random()?),
            vm: self.vm.clone(),
            uuid: self.uuid,
            epoch,
            address: format!("image:{VM}"),
            goal: Goal { downtime_max: DOWNTIME_MAX, throttle: false, fixed_cost: PAUSE_FIXED },
            bandwidth: None,
            bandwidth_max: None,
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
            // A benchmark across an outage measures the outage.
            outage_max: Duration::ZERO,
            // No policy is asked: what is measured is the way of the pages.
            policy_digest: [0; 32],
            manner: Manner { zstd_level: gateway::zstd_level(terms.compress), ..Manner::default() },
            ledger: None,
            disks: None,
        })
    }
}

/// One run between two gateways of this process.
fn within(
    here: &Side,
    there: &Side,
    twin: ImageDestination,
    order: SourceOrder,
    guest: Box<ImageSource>,
    peer: &SpiffeId,
    interrupts: &mut Signal,
) -> Result<Measured, Problem> {
    let (give_up, given_up) = oneshot::channel::<()>();
    let arrive = async {
        let arrival = there.next_arrival().await?;
        Ok::<_, Problem>(there.take(arrival.link, arrival.offer, twin).await)
    };
    let arrive = async {
        tokio::select! {
            end = arrive => end.map(Some),
            _ = given_up => Ok(None),
        }
    };
    let (started, cpu) = (Instant::now(), cpu_seconds());
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| there.runtime.block_on(arrive));
        let source = here.runtime.block_on(here.depart(there.endpoint.local_address(), peer, order, guest, interrupts));
        let measured = (started.elapsed(), cpu_seconds() - cpu);
        if source.is_err() {
            // The destination would wait for a session that does not come.
            let _ = give_up.send(());
        }
        // What failed at the destination the source was told, as far as anybody can be.
        let end = destination.join().map_err(|_| Problem::new(ErrorClass::Bug, "the destination's thread ended"))?;
        Ok((source, measured.0, measured.1, end.ok().flatten().map(|end| end.decode)))
    })
}

impl Side {
    async fn dial(&self, address: SocketAddr, expected: &SpiffeId) -> Result<Link, EngineError> {
        let session = self.endpoint.connect(address, expected).await.map_err(lost)?;
        greet(session, &self.hello()).await
    }

    /// Returns once the listener says HELLO, which it does when its memory is ready.
    async fn until_ready(&self, address: SocketAddr, peer: &SpiffeId) -> Result<(), EngineError> {
        let asked = Instant::now();
        loop {
            match self.dial(address, peer).await {
                Ok(link) => {
                    link.session.close(None, "only asked whether you are ready");
                    return Ok(());
                }
                // It is there and busy with its memory.
                Err(EngineError::Transport { source: TransportError::TimedOut { .. }, .. }) if asked.elapsed() < READY_WITHIN => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn depart(
        &self,
        address: SocketAddr,
        peer: &SpiffeId,
        order: SourceOrder,
        guest: Box<ImageSource>,
        interrupts: &mut Signal,
    ) -> Result<SourceEnd, EngineError> {
        let link = self.dial(address, peer).await?;
        let (commands_in, commands) = mpsc::channel(limits::COMMAND_QUEUE);
        let (progress, _shown) = watch::channel(Progress::new(order.migration));
        let ports = SourcePorts {
            evidence: self.evidence.clone(),
            link,
            guest: guest as Box<dyn PagedSource>,
            ask_commit: Arc::new(|_| Ok(())),
            redial: Arc::new(|| Box::pin(async { Err(EngineError::Bug("the session ended".into())) })),
            progress,
            commands,
            share: None,
            path: Arc::default(),
        };
        let mut run = std::pin::pin!(run_source(order, ports, Instant::now()));
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
}
