//! Departures that an earlier gateway of this host had under way when it was killed: they go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::{self, Command, EngineError, Link, Resolved};
use crate::gateway::Gateway;
use crate::gateway::departures::Note;
use crate::gateway::judge::{Case, DisksAsked};
use crate::gateway::outgoing::{Departure, Strings};
use crate::gateway::recovery::{FIRST_PAUSE, LONGEST_PAUSE};
use crate::gateway::registry::Ticket;
use crate::gateway::report;
use crate::hypervisor::attach::{AttachedSource, Timeouts};
use crate::hypervisor::{Address, PagedSource};
use crate::migration::{Goal, OfferRecord};
use crate::telemetry::{Phase, Problem, Progress, RunningOn, chain};
use crate::types::{MigrationId, Mode, Side};
use crate::wire::ErrorClass;

/// A departure that goes on.
struct Interrupted {
    departure: Departure,
    note: Note,
    offer: OfferRecord,
    guest: Box<dyn PagedSource>,
    /// It counts as one of the departures at once, and does not wait to be one.
    ticket: Ticket,
}

impl Gateway {
    /// Takes up a departure that was cut off, while its journal says OFFER and no more and its guest is the one that was
    /// watched. False when there is nothing to go on from: the journal alone decides then.
    pub(super) async fn continue_departure(self: &Arc<Self>, migration: MigrationId) -> bool {
        let Some(interrupted) = self.interrupted_departure(migration).await else { return false };
        let (departure, note) = (&interrupted.departure, &interrupted.note);
        tracing::warn!(%migration, vm = %departure.vm.name, peer = %departure.peer.spiffe, "interrupted migration goes on");
        let strings = self.show_departure(departure, note.started, Progress::new(migration));
        let gateway = Arc::clone(self);
        tokio::spawn(gateway.go_on(interrupted, strings));
        true
    }

    async fn interrupted_departure(self: &Arc<Self>, migration: MigrationId) -> Option<Interrupted> {
        let note = self.departure(migration).filter(|note| note.order.migration == migration)?;
        let offer = match engine::unfinished(&self.evidence(), migration) {
            Ok(offer) => offer?,
            Err(error) => {
                tracing::error!(%migration, error = %chain(&error), "whether it goes on cannot be read");
                return None;
            }
        };
        let vm = self.config.vm(&note.order.vm).filter(|vm| vm.uuid == note.order.uuid).cloned()?;
        let peer = self.config.peer_of(&note.peer).cloned()?;
        let (address, instance, name) = (note.order.address.clone(), note.instance.clone(), vm.name.clone());
        let attached = tokio::task::spawn_blocking(move || {
            // A stream that was cut off cannot be taken up again.
            let Address::Attach(path) = Address::parse(&address) else { return None };
            let guest = AttachedSource::attach(&path, name.as_str(), Timeouts::default()).ok()?;
            let left = guest.attachment();
            // A VMM that was started anew, or forgot which pages were written, has another past than the destination's twin.
            let same = left.instance == instance && left.tracking;
            same.then(|| Box::new(guest) as Box<dyn PagedSource>)
        });
        let guest = attached.await.ok()??;
        let memory_bytes = guest.ram().layout().bytes();
        let guest = match engine::continue_guest(&self.evidence(), migration, guest).await {
            Ok(guest) => guest,
            Err(error) => {
                tracing::error!(%migration, error = %chain(&error), "an interrupted migration does not go on");
                return None;
            }
        };
        let claim = self.registry.claim_waiting(&vm.name, migration);
        claim.go_on();
        let order = &note.order;
        let case = Case {
            migration,
            vm: vm.name.clone(),
            uuid: vm.uuid,
            terms: order.stream.clone(),
            mode: Mode::Precopy,
            memory_bytes,
            disks: DisksAsked::default(),
            bandwidth_max: order.bandwidth_max,
            side: Side::Source,
        };
        let departure = Departure {
            migration,
            case,
            vm,
            peer,
            address: order.address.clone(),
            epoch: order.epoch,
            goal: order.goal,
            bandwidth: order.bandwidth,
            manner: order.manner,
            disks: None,
            timeout: order.timeout.unwrap_or(Duration::MAX),
            outage_max: order.outage_max,
            operator: note.operator,
            lanes_asked: true,
            channels: 1,
            claim,
        };
        let ticket = self.registry.pass_queue(&departure.peer.name);
        Some(Interrupted { departure, note, offer, guest, ticket })
    }

    async fn go_on(self: Arc<Self>, interrupted: Interrupted, strings: Strings) {
        let Interrupted { departure, mut note, offer, guest, ticket: _ticket } = interrupted;
        let Strings { progress, mut commands, ended } = strings;
        progress.send_modify(|shown| {
            shown.phase = Phase::Connect;
            shown.stalled_because = Some("this gateway was started anew, and looks for the destination".to_owned());
        });
        let report = match self.find_destination(&departure, &mut note, &mut commands).await {
            Ok(link) => {
                let ports = self.source_ports(&departure, link, guest, progress, commands);
                let kind = ports.guest.machine().kind.clone();
                let now = Instant::now();
                let began = note.started.elapsed().ok().and_then(|elapsed| now.checked_sub(elapsed)).unwrap_or(now);
                let end = engine::continue_source(note.order.clone(), ports, &offer, began).await;
                self.conclude(departure, note, kind, &end)
            }
            Err(why) => {
                drop(guest);
                let migration = departure.migration;
                let resolved = engine::resolve(&self.evidence(), &self.host(), migration, None).await;
                let Ok(Resolved::Ended(outcome)) = resolved else {
                    departure.claim.wait();
                    return self.resolve_later(migration, Some(ended), Some(departure.claim));
                };
                let mut report = report::settled(migration, &departure.vm.name, outcome);
                report.error = Some(report::named(why, &departure.vm.name).with_running_on(RunningOn::Source));
                report.authenticated.source = Some(self.credentials.own_id());
                self.refresh_place(&departure.vm.name);
                self.tell_later(migration);
                report
            }
        };
        self.finished(report, ended).await;
    }

    /// Dials until the destination answers, an outage has lasted too long, or an operator has had enough.
    async fn find_destination(
        self: &Arc<Self>,
        departure: &Departure,
        note: &mut Note,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<Link, Problem> {
        let (vm, migration) = (departure.vm.name.clone(), departure.migration);
        let problem = |error: EngineError| Problem::new(error.class(), chain(&error));
        let until = Instant::now() + departure.outage_max;
        let mut pause = Duration::ZERO;
        loop {
            let rest = tokio::time::sleep(pause);
            let found = async {
                rest.await;
                self.dial_again(&departure.peer, &departure.case).await
            };
            tokio::pin!(found);
            // What is said meanwhile does not begin the search anew.
            let link = loop {
                tokio::select! {
                    link = &mut found => break link,
                    command = commands.recv() => match command {
                        Some(Command::Bandwidth(limit)) => note.order.bandwidth = limit,
                        Some(Command::DowntimeMax(downtime_max)) => note.order.goal = Goal { downtime_max, ..note.order.goal },
                        Some(Command::CheckPeer | Command::Superseded) => {}
                        Some(Command::Cancel) | None => return Err(problem(EngineError::Cancelled { vm })),
                    },
                }
            };
            match link {
                Ok(link) => return Ok(link),
                Err(error) if NO_USE.contains(&error.class) => return Err(error),
                Err(error) => tracing::debug!(%migration, why = error.message, "destination not back yet"),
            }
            if Instant::now() >= until {
                return Err(problem(EngineError::Outage { vm, migration, limit: departure.outage_max, source: None }));
            }
            pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        }
    }
}

/// Asking again would change nothing.
const NO_USE: [ErrorClass; 4] = [ErrorClass::Unauthenticated, ErrorClass::Denied, ErrorClass::PeerMisbehaved, ErrorClass::PeerIncompatible];
