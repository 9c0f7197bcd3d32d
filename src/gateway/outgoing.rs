//! A VM leaves: from an operator's request to the report.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::{mpsc, watch};

use crate::audit::{Entry, Event, Outcome};
use crate::config;
use crate::control::MigrateRequest;
use crate::engine::{self, EngineError, Link, Manner, Placement, SourceEnd, SourceOrder, SourcePorts, TotalBandwidth};
use crate::gateway::departures::Note;
use crate::gateway::disks::{self, DiskWish};
use crate::gateway::judge::{Case, NoPermit};
use crate::gateway::kept::twin_file;
use crate::gateway::machine::{check_machine, machine_digest};
use crate::gateway::modes::{channels, lanes_for, not_split, split_at_all};
use crate::gateway::policies::{compression, default_terms, operator_id, zstd_level};
use crate::gateway::queue::QueueFull;
use crate::gateway::registry::{Busy, Claim, Migration};
use crate::gateway::turns::{Turns, begun};
use crate::gateway::{Gateway, put_class, report};
use crate::hypervisor::attach::{AttachedSource, Timeouts};
use crate::hypervisor::qemu::{self, QemuSource};
use crate::hypervisor::{Address, HypervisorError, Machine, PagedSource, StreamSource};
use crate::limits;
use crate::migration::{Goal, Outcome as Place};
use crate::policy::{Permit, Release, Route};
use crate::telemetry::{self, Monotone, Problem, Progress, Report, RunningOn};
use crate::types::{Epoch, MigrationId, Side, Verify};
use crate::wire::{Durability, ErrorClass, StreamTerms};

/// A request that was found sensible: the VM is claimed, the peer is known.
pub(super) struct Departure {
    pub(super) migration: MigrationId,
    pub(super) case: Case,
    pub(super) vm: config::Vm,
    pub(super) peer: config::Peer,
    pub(super) address: String,
    pub(super) epoch: Epoch,
    pub(super) goal: Goal,
    pub(super) bandwidth: Option<u64>,
    pub(super) manner: Manner,
    /// Disks that move too.
    pub(super) disks: Option<DiskWish>,
    pub(super) timeout: Duration,
    pub(super) outage_max: Duration,
    pub(super) operator: u32,
    /// Whether the request names a number of lanes.
    pub(super) lanes_asked: bool,
    /// Channels on which a QEMU hands over its guest's pages.
    pub(super) channels: u16,
    pub(super) claim: Claim,
}

impl Departure {
    /// What is known of it once its guest was seen.
    pub(super) fn has_memory(&mut self, bytes: u64) {
        self.case.memory_bytes = bytes;
        if !self.lanes_asked {
            self.case.terms.lanes = lanes_for(self.case.terms.lanes, bytes);
        }
        let compared = if self.manner.verify_in_pause { bytes as f64 / VERIFY_BYTES_PER_SECOND } else { 0.0 };
        self.goal.fixed_cost = PAUSE_FIXED + Duration::from_secs_f64(compared);
    }
}

/// A guest that leaves, by how.
enum Leaving {
    /// We read its pages.
    Pages(Box<AttachedSource>),
    /// Its hypervisor sends it.
    Stream(Box<QemuSource>),
}

impl Leaving {
    fn attach(address: &Address, vm: &str) -> Result<Self, HypervisorError> {
        Ok(match address {
            Address::Attach(path) => Self::Pages(Box::new(AttachedSource::attach(path, vm, Timeouts::default())?)),
            Address::Qemu(path) => Self::Stream(Box::new(QemuSource::attach(path, vm, qemu::ANSWER_WITHIN)?)),
        })
    }

    fn machine(&self) -> &Machine {
        match self {
            Self::Pages(guest) => guest.machine(),
            Self::Stream(guest) => guest.machine(),
        }
    }

    /// The process that holds it, where a migration can be taken up again with the same.
    fn instance(&self) -> String {
        match self {
            Self::Pages(guest) => guest.attachment().instance.clone(),
            Self::Stream(_) => String::new(),
        }
    }
}

/// How an operator follows and steers a departure.
pub(super) struct Strings {
    pub(super) progress: watch::Sender<Progress>,
    pub(super) commands: mpsc::Receiver<engine::Command>,
    pub(super) ended: watch::Sender<bool>,
}

/// How long the engine waits for a destination that was given the VM, lives and does not answer; the gateway asks on
/// afterwards.
const RESOLVE_FOR: Duration = Duration::from_secs(30);
/// State, journal and round trips, besides what is measured: see `docs/performance.md`.
const PAUSE_FIXED: Duration = Duration::from_millis(10);
/// What XXH3 reads a second on a slow host, both ends at the same time.
const VERIFY_BYTES_PER_SECOND: f64 = 4e9;

impl Gateway {
    /// Checks a request as far as this host alone can, and takes the VM.
    pub(super) fn prepare(self: &Arc<Self>, operator: u32, request: &MigrateRequest) -> Result<Departure, Problem> {
        let misuse = |message: String| Problem::new(ErrorClass::Misuse, message);
        let vm = self.config.vm(&request.vm).cloned().ok_or_else(|| {
            misuse(format!("no VM `{}` in the configuration of gateway `{}`", request.vm, self.config.gateway.name))
                .with_code("unknown-vm")
                .with_hint("`sealane vms` lists the VMs that this gateway knows")
        })?;
        let peer = self.config.peer(&request.to).cloned().ok_or_else(|| {
            misuse(format!(
                "no peer `{}` in the configuration of gateway `{}`: VM `{}` stays where it is",
                request.to, self.config.gateway.name, vm.name
            ))
            .with_code("unknown-peer")
            .with_hint("`sealane peers` lists the peers that this gateway knows")
            .with_running_on(RunningOn::Source)
        })?;
        let (address, epoch) = self.place_of(&vm)?;
        let defaults = &self.config.migration;
        let lanes = request.lanes.unwrap_or(defaults.lanes);
        if !(1..=limits::LANES_MAX).contains(&lanes) {
            return Err(misuse(format!("{lanes} lanes: expected 1 to {}", limits::LANES_MAX)).with_running_on(RunningOn::Source));
        }
        let migration = new_migration()?;
        let claim = self.take(&vm, migration)?;
        let mut terms = default_terms(defaults, vm.classification);
        terms.lanes = lanes;
        if let Some(compress) = request.compress {
            terms.compression = compression(compress);
        }
        carried(&vm, &Address::parse(&address), &terms)?;
        split_at_all(&vm, &Address::parse(&address), request)?;
        let channels = channels(&vm, &Address::parse(&address), request, defaults.channels)?;
        let disks = disks::wished(&vm, &address, request)?;
        let verify = request.verify.unwrap_or(defaults.verify);
        terms.verify = verify != Verify::No;
        let positive = |seconds: f64, what: &str| {
            Duration::try_from_secs_f64(seconds)
                .ok()
                .filter(|d| !d.is_zero() && *d <= limits::MIGRATION_MAX)
                .ok_or_else(|| misuse(format!("{what} of {seconds} s: expected more than 0 and at most a year")))
        };
        let downtime_max =
            request.max_downtime_seconds.map_or(Ok(defaults.max_downtime.duration), |s| positive(s, "`max_downtime_seconds`"))?;
        let timeout = request.timeout_seconds.map_or(Ok(defaults.timeout.duration), |s| positive(s, "`timeout_seconds`"))?;
        let outage_max = request.max_outage_seconds.map_or(Ok(defaults.max_outage.duration), |s| positive(s, "`max_outage_seconds`"))?;
        let bandwidth = request.bandwidth_bytes_per_second.or(defaults.bandwidth.map(|limit| limit.bytes_per_second));
        let case = Case::leaving(migration, &vm, terms, request.mode, DiskWish::asked(disks, &[]));
        let goal = Goal { downtime_max, throttle: request.throttle, fixed_cost: PAUSE_FIXED };
        let table_bytes = usize::try_from(defaults.tables.bytes).unwrap_or(usize::MAX);
        let manner = Manner { verify_in_pause: verify == Verify::Full, zstd_level: request.compress.and_then(zstd_level), table_bytes };
        Ok(Departure {
            migration,
            case,
            vm,
            peer,
            address,
            epoch,
            goal,
            bandwidth,
            manner,
            disks,
            timeout,
            outage_max,
            operator,
            lanes_asked: request.lanes.is_some(),
            channels,
            claim,
        })
    }

    /// Where the VM is attached, and the epoch at which this gateway owns it.
    fn place_of(&self, vm: &config::Vm) -> Result<(String, Epoch), Problem> {
        let misuse = |message: String| Problem::new(ErrorClass::Misuse, message);
        match self.registry.place(&vm.name) {
            Some(Placement::Here { address, epoch, .. }) => Ok((address, epoch)),
            Some(Placement::Away { peer, .. }) => Err(misuse(format!("VM `{}` does not run here: `{peer}` has it", vm.name))
                .with_code("vm-is-away")
                .with_running_on(RunningOn::Destination)),
            Some(Placement::Cold { .. }) => {
                Err(misuse(format!("VM `{}` has to be started from its disks first: its memory is lost", vm.name)).with_code("vm-is-cold"))
            }
            Some(Placement::Given { peer, migration, .. }) => Err(Problem::new(
                ErrorClass::InDoubt,
                format!("VM `{}` was given to `{peer}` in migration `{migration}`, which has not answered", vm.name),
            )
            .with_hint("if it is gone for good, see `sealane resolve`")
            .with_running_on(RunningOn::NeitherYet)),
            None => Err(misuse(format!(
                "VM `{}` is not attached here: its configuration has neither `socket` nor `qmp`, and it has not arrived",
                vm.name
            ))
            .with_code("vm-not-here")),
        }
    }

    /// Claims the VM for one migration, which is not under way before its turn.
    fn take(self: &Arc<Self>, vm: &config::Vm, migration: MigrationId) -> Result<Claim, Problem> {
        self.registry.reserve(&vm.name, migration).map_err(|busy| {
            let problem = match busy {
                Busy::Vm(other) => Problem::new(ErrorClass::Misuse, format!("VM `{}` is moving already, in migration `{other}`", vm.name))
                    .with_code("vm-is-moving")
                    .with_hint(format!(
                        "`sealane watch {other}` ends when that does, which is also for a VM that has just arrived; then ask again"
                    )),
                Busy::Full => Problem::new(ErrorClass::Bug, "a departure that waits needs no room"),
                Busy::Id => Problem::new(ErrorClass::Bug, format!("migration `{migration}` exists already")),
                Busy::Closing => Problem::new(ErrorClass::Local, "the gateway is shutting down"),
            };
            problem.with_running_on(RunningOn::Source)
        })
    }

    /// May this operator ask for this? The answer is recorded, and what it obliges to becomes part of the departure.
    pub(super) async fn ask_request(self: &Arc<Self>, departure: &mut Departure) -> Result<(), Problem> {
        let (judge, case, operator) = (Arc::clone(&self.judge), departure.case.clone(), operator_id(departure.operator));
        let route = Route {
            src_site: self.config.gateway.site.to_string(),
            dst_site: departure.peer.site.to_string(),
            peer_ip: crate::gateway::peers::numeric(&departure.peer.address),
        };
        let answer = tokio::task::spawn_blocking(move || judge.request(&operator, &case, route)).await.map_err(bug)?;
        let permit = answer.map_err(|no| report::named(no.problem(), &departure.vm.name).with_running_on(RunningOn::Source))?;
        departure.case.oblige(&permit);
        Ok(())
    }

    /// Starts a migration; it goes on by itself.
    pub(super) async fn start(self: &Arc<Self>, operator: u32, request: &MigrateRequest) -> Result<MigrationId, Problem> {
        let mut departure = self.prepare(operator, request)?;
        let ticket = self.registry.queue(&departure.peer.name).map_err(|QueueFull| {
            let message = format!("VM `{}`: {} VMs wait already, the most that may", departure.vm.name, limits::DEPARTURES_QUEUED_MAX);
            Problem::new(ErrorClass::Local, message)
                .with_code("queue-full")
                .with_hint("`sealane status` shows what is under way and what waits")
                .with_running_on(RunningOn::Source)
        })?;
        self.ask_request(&mut departure).await?;
        let migration = departure.migration;
        let mut turns = Turns::new(ticket);
        let first = turns.look(&departure).unwrap_or_else(|| Progress::new(migration));
        let Strings { progress, commands, ended } = self.show_departure(&departure, SystemTime::now(), first);
        let gateway = Arc::clone(self);
        tokio::spawn(async move {
            let report = gateway.depart(departure, turns, progress, commands).await;
            gateway.finished(report, ended).await;
        });
        Ok(migration)
    }

    /// From now on operators see it and can steer it.
    pub(super) fn show_departure(&self, departure: &Departure, started: SystemTime, first: Progress) -> Strings {
        let migration = departure.migration;
        let (progress, raw) = watch::channel(first.clone());
        let (shown_in, shown) = watch::channel(first);
        let (ended, ended_out) = watch::channel(false);
        let (commands_in, commands) = mpsc::channel(limits::COMMAND_QUEUE);
        self.registry.begin(Migration {
            id: migration,
            vm: departure.vm.name.clone(),
            peer: departure.peer.name.clone(),
            side: Side::Source,
            started,
            progress: shown,
            report: None,
            ended: ended_out,
            commands: Some(commands_in),
            returns: None,
        });
        tokio::spawn(show_monotone(raw, shown_in));
        Strings { progress, commands, ended }
    }

    /// Keeps a finished migration's report, in memory and on disk, and in the audit log.
    pub(super) async fn finished(self: &Arc<Self>, mut report: Report, ended: watch::Sender<bool>) {
        let mut entry = Entry::new(Event::MigrationFinished).outcome(match report.state {
            telemetry::Outcome::Completed => Outcome::Done,
            telemetry::Outcome::Failed => Outcome::Failed,
            telemetry::Outcome::Cancelled => Outcome::Cancelled,
            telemetry::Outcome::InDoubt => Outcome::InDoubt,
        });
        entry.vm = Some(report.vm.clone());
        entry.migration = Some(report.migration_id);
        entry.detail.insert("state".into(), serde_json::to_value(report.state).unwrap_or_default());
        entry.detail.insert("running_on".into(), serde_json::to_value(report.running_on).unwrap_or_default());
        entry.detail.insert("wire_bytes".into(), report.wire_bytes.into());
        if let Some(disks) = report.disks.filter(|disks| disks.only) {
            entry.detail.insert("disks_copied".into(), serde_json::to_value(disks).unwrap_or_default());
        }
        if let Some(error) = &report.error {
            entry.detail.insert("why".into(), error.message.clone().into());
            put_class(&mut entry, error.class);
        }
        self.note(entry).await;
        if report.audit.source_head.is_none() {
            report.audit.source_head = Some(self.audit.head().text);
        }
        let (journal, keep, bytes) = (Arc::clone(&self.journal), self.config.limits.history_max, serde_json::to_vec(&report));
        if let Ok(bytes) = bytes {
            let kept = tokio::task::spawn_blocking(move || journal.put_history(&bytes, keep)).await;
            if let Ok(Err(error)) = kept {
                tracing::warn!(error = %error, "report not kept in the history");
            }
        }
        self.registry.end(report.migration_id, Arc::new(report));
        ended.send_replace(true);
    }

    async fn depart(
        self: &Arc<Self>,
        departure: Departure,
        mut turns: Turns,
        progress: watch::Sender<Progress>,
        commands: mpsc::Receiver<engine::Command>,
    ) -> Report {
        let (vm, migration) = (departure.vm.name.clone(), departure.migration);
        let spiffe = departure.peer.spiffe.clone();
        let mut report = match self.move_away(departure, &mut turns, progress, commands).await {
            Ok(report) => report,
            Err(problem) => {
                let state = if problem.class == ErrorClass::Cancelled { telemetry::Outcome::Cancelled } else { telemetry::Outcome::Failed };
                let mut report = Report::new(migration, vm, state, RunningOn::Source);
                report.policy.decision = (problem.class == ErrorClass::Denied).then(|| "deny".to_owned());
                report.error = Some(report::named(problem, &report.vm).with_running_on(RunningOn::Source));
                report.duration_seconds = turns.began().0.elapsed().as_secs_f64();
                report
            }
        };
        report.authenticated.source = Some(self.credentials.own_id());
        if report.authenticated.destination.is_none() && report.policy.decision.is_some() {
            report.authenticated.destination = Some(spiffe);
        }
        report
    }

    /// Everything before the engine takes over leaves the guest untouched. A destination without room is asked again when it is
    /// the departure's turn once more.
    async fn move_away(
        self: &Arc<Self>,
        mut departure: Departure,
        turns: &mut Turns,
        progress: watch::Sender<Progress>,
        mut commands: mpsc::Receiver<engine::Command>,
    ) -> Result<Report, Problem> {
        loop {
            self.turn(turns, &mut departure, &progress, &mut commands).await?;
            let (began, started) = turns.began();
            let (guest, link, note) = match self.set_out(&mut departure, started).await {
                Err(problem) if problem.class == ErrorClass::PeerBusy => {
                    turns.sent_back(&departure.claim);
                    continue;
                }
                set_out => set_out?,
            };
            let kind = guest.machine().kind.clone();
            let (order, shown) = (note.order.clone(), progress.clone());
            let end = {
                let begun = begun(progress.subscribe());
                let mut run: Pin<Box<dyn Future<Output = SourceEnd> + Send>> = match guest {
                    Leaving::Pages(guest) => {
                        let ports = self.source_ports::<dyn PagedSource>(&departure, link, guest, shown, commands);
                        Box::pin(engine::run_source(order, ports, began))
                    }
                    Leaving::Stream(guest) => {
                        let ports = self.source_ports::<dyn StreamSource>(&departure, link, guest, shown, commands);
                        Box::pin(engine::run_stream_source(order, ports, began))
                    }
                };
                tokio::select! {
                    end = &mut run => end,
                    () = begun => {
                        turns.taken();
                        run.await
                    }
                }
            };
            if !end.busy {
                return Ok(self.conclude(departure, note, kind, &end));
            }
            tracing::info!(migration = %departure.migration, vm = %departure.vm.name, peer = %departure.peer.spiffe, "no room there: waits");
            self.forget_departure(departure.migration);
            commands = end.commands;
            turns.sent_back(&departure.claim);
        }
    }

    /// Attaches to the guest, reaches the destination and asks whether it may have the VM. What is offered is noted.
    async fn set_out(self: &Arc<Self>, departure: &mut Departure, started: SystemTime) -> Result<(Leaving, Link, Note), Problem> {
        let mut guest = self.attach_to(departure).await?;
        crate::failpoint::hit!("source.attached");
        let link = self.dial(&departure.peer).await?;
        let permit = self.release(departure, &link, guest.machine()).await?;
        // Policy may have asked for more than the request.
        carried(&departure.vm, &Address::parse(&departure.address), &departure.case.terms)?;
        if let Leaving::Stream(guest) = &mut guest {
            guest.move_as(departure.case.mode).map_err(|error| not_split(&error))?;
        }
        crate::failpoint::hit!("source.released");
        let order = SourceOrder {
            migration: departure.migration,
            vm: departure.vm.name.clone(),
            uuid: departure.vm.uuid,
            epoch: departure.epoch,
            address: departure.address.clone(),
            goal: departure.goal,
            bandwidth: departure.bandwidth,
            bandwidth_max: departure.case.bandwidth_max,
            stream: departure.case.terms.clone(),
            manner: departure.manner,
            timeout: Some(departure.timeout),
            resolve_timeout: RESOLVE_FOR,
            outage_max: departure.outage_max,
            policy_digest: *permit.set_digest(),
            ledger: Some(self.ledger(departure.migration)),
            disks: departure.disks.map(|wish| self.disk_order(departure.migration, wish)),
        };
        let instance = guest.instance();
        let (peer, policy_ids) = (departure.peer.spiffe.clone(), permit.policy_ids().to_vec());
        let note = Note { order, peer, instance, operator: departure.operator, policy_ids, started };
        if let Err(error) = self.note_departure(&note) {
            // Without it a destination waits for nothing, for a while, when this gateway is killed.
            tracing::warn!(migration = %note.order.migration, %error, "the offer is not noted");
        }
        Ok((guest, link, note))
    }

    /// What follows when the engine is done.
    pub(super) fn conclude(self: &Arc<Self>, departure: Departure, note: Note, hypervisor: String, end: &SourceEnd) -> Report {
        let mut report = report::report(departure.migration, &departure.vm.name, end.outcome, end.error.as_ref(), note.started);
        report::put_figures(&mut report, &end.figures);
        report::put_disks_there(&mut report, end.figures.disks);
        if !end.woken {
            report::not_woken(&mut report);
        }
        report.hypervisor = hypervisor;
        report.mode = departure.case.mode;
        report.guest_memory_bytes = departure.case.memory_bytes;
        report.authenticated.source = Some(self.credentials.own_id());
        report.authenticated.destination = Some(departure.peer.spiffe.clone());
        report.policy.decision = Some(report::decision(end.error.as_ref()));
        report.policy.policy_ids = note.policy_ids;
        self.refresh_place(&departure.vm.name);
        match end.outcome {
            // Whoever settles it sends no faster than this one.
            None if end.told => {}
            _ if end.told => self.forget_departure(departure.migration),
            _ => self.tell_later(departure.migration),
        }
        if end.outcome.is_none() || !end.woken {
            self.resolve_later(departure.migration, None, Some(departure.claim));
        }
        debug_assert!(end.outcome != Some(Place::Moved) || report.error.is_none());
        report
    }

    /// Attaches to the guest and sees to it that it is the VM that was judged.
    async fn attach_to(&self, departure: &mut Departure) -> Result<Leaving, Problem> {
        let (address, name) = (Address::parse(&departure.address), departure.vm.name.clone());
        let unreachable = |error: HypervisorError| Problem::new(ErrorClass::Local, telemetry::chain(&error)).with_code("vmm-unreachable");
        let mut guest =
            tokio::task::spawn_blocking(move || Leaving::attach(&address, name.as_str())).await.map_err(bug)?.map_err(unreachable)?;
        let (found, vm) = (guest.machine().uuid, &departure.vm);
        if found != vm.uuid {
            let message = format!("the guest at `{}` is `{found}`, not VM `{}` with UUID `{}`", departure.address, vm.name, vm.uuid);
            return Err(Problem::new(ErrorClass::Denied, message));
        }
        check_machine(vm, guest.machine()).map_err(|why| Problem::new(ErrorClass::Denied, why).with_code("machine-differs"))?;
        departure.has_memory(guest.machine().regions.iter().map(|region| region.bytes).sum());
        if let Leaving::Stream(guest) = &mut guest {
            guest.move_as(departure.case.mode).map_err(|error| not_split(&error))?;
            let at = twin_file(&self.config.gateway.runtime_directory, departure.migration, "channels");
            guest.use_channels(departure.channels, at);
            disks::take_along(&departure.vm, guest, departure.disks)?;
            departure.case.disks = DiskWish::asked(departure.disks, &guest.machine().disks);
        }
        Ok(guest)
    }

    /// May this peer have the VM? The answer and the offer are recorded before anything of the guest leaves.
    async fn release(self: &Arc<Self>, departure: &mut Departure, link: &Link, machine: &Machine) -> Result<Permit<Release>, Problem> {
        let (judge, case, session) = (Arc::clone(&self.judge), departure.case.clone(), Arc::clone(&link.session));
        let answer = tokio::task::spawn_blocking(move || judge.release(&case, &session)).await.map_err(bug)?;
        let permit = answer.map_err(|no| not_permitted(link, &no))?;
        departure.case.oblige(&permit);
        let offered = Entry::new(Event::MigrationOffered)
            .vm(departure.vm.name.clone(), departure.vm.uuid)
            .migration(departure.migration)
            .peer(departure.peer.spiffe.to_string())
            .outcome(Outcome::Done)
            .detail("machine", machine_digest(machine))
            .detail("disks", disks::listed(&machine.disks))
            .detail("disks_only", machine.disks_only);
        let audit = self.audit.clone();
        let recorded = tokio::task::spawn_blocking(move || audit.record(&offered)).await.map_err(bug)?;
        recorded.map_err(|error| Problem::new(ErrorClass::Local, telemetry::chain(&error)))?;
        Ok(permit)
    }

    pub(super) fn source_ports<G: ?Sized>(
        self: &Arc<Self>,
        departure: &Departure,
        link: Link,
        guest: Box<G>,
        progress: watch::Sender<Progress>,
        commands: mpsc::Receiver<engine::Command>,
    ) -> SourcePorts<G> {
        let ask_commit = self.commit_question(&departure.case);
        let (gateway, peer, case) = (Arc::clone(self), departure.peer.clone(), departure.case.clone());
        let redial: engine::Redial = Arc::new(move || {
            let (gateway, peer, case) = (Arc::clone(&gateway), peer.clone(), case.clone());
            let migration = case.migration;
            let not_back = move |problem: Problem| EngineError::NotBack { migration, class: problem.class, why: problem.message };
            Box::pin(async move { gateway.dial_again(&peer, &case).await.map_err(not_back) })
        });
        let share = self.bandwidth.as_ref().map(TotalBandwidth::share);
        let path = self.paths.to(&departure.peer.spiffe);
        SourcePorts { evidence: self.evidence(), link, guest, ask_commit, redial, progress, commands, share, path }
    }

    /// A new session for a migration under way, with a peer that may still have the VM.
    pub(super) async fn dial_again(self: &Arc<Self>, peer: &config::Peer, case: &Case) -> Result<Link, Problem> {
        let link = self.dial(peer).await?;
        // The permit of the offer is the one that the migration has; this one says that it still would be given.
        let (judge, case, session) = (Arc::clone(&self.judge), case.clone(), Arc::clone(&link.session));
        let answer = tokio::task::spawn_blocking(move || judge.release_again(&case, &session)).await.map_err(bug)?;
        let _still = answer.map_err(|no| not_permitted(&link, &no))?;
        Ok(link)
    }

    pub(super) fn commit_question(self: &Arc<Self>, case: &Case) -> engine::AskCommit {
        let (judge, case) = (Arc::clone(&self.judge), case.clone());
        Arc::new(move |session| judge.commit(&case, session).map(drop).map_err(|no| no.at_commit(&case)))
    }
}

fn not_permitted(link: &Link, no: &NoPermit) -> Problem {
    link.session.close(Some(no.class()), "not permitted");
    no.problem()
}

/// What cannot be had of a guest that its hypervisor sends.
fn carried(vm: &config::Vm, address: &Address, terms: &StreamTerms) -> Result<(), Problem> {
    let what = match address {
        Address::Qemu(_) if terms.length_padding => "padded frames",
        Address::Qemu(_) if terms.durability != Durability::None => "an image on disk before the switch",
        _ => return Ok(()),
    };
    let why = format!("VM `{}` is a QEMU's, which sends a stream of its own: {what} of it is not built", vm.name);
    Err(Problem::new(ErrorClass::Misuse, why).with_code("not-built").with_running_on(RunningOn::Source))
}

/// Hands progress on so that it never runs backwards.
pub(super) async fn show_monotone(mut raw: watch::Receiver<Progress>, shown: watch::Sender<Progress>) {
    let mut monotone = Monotone::new();
    while raw.changed().await.is_ok() {
        let next = raw.borrow_and_update().clone();
        shown.send_replace(monotone.admit(next));
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function for map_err")]
pub(super) fn bug(error: tokio::task::JoinError) -> Problem {
    Problem::new(ErrorClass::Bug, format!("a task of the gateway ended: {error}"))
}

fn new_migration() -> Result<MigrationId, Problem> {
    let mut id = [0; 16];
    SystemRandom::new().fill(&mut id).map_err(|_| Problem::new(ErrorClass::Local, "the system's random numbers cannot be read"))?;
    Ok(MigrationId(id))
}
