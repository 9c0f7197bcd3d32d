//! A source gateway that was killed and is started anew: while its journal says OFFER and no more, the migration goes on.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::ledger::{LaneLedger, Ledger};
use super::rounds::RoundUnderWay;
use super::{Run, SourceEnd, SourceOrder, SourcePorts};
use crate::audit::Event;
use crate::engine::handoff::{Binding, Evidence, joined};
use crate::engine::lanes::SourceLane;
use crate::engine::search::Outage;
use crate::engine::{EngineError, Link, PeerFacts};
use crate::hypervisor::{HypervisorError, PagedSource};
use crate::memory::{PageCounts, Tracker};
use crate::migration::{OfferRecord, Source};
use crate::telemetry::Phase;
use crate::types::{LaneIndex, MigrationId};

/// Lets the guest of an interrupted migration go on where it is, still watched. Only while nothing is journaled behind OFFER:
/// `INVARIANT(single-runner)`, without COMMIT nobody else runs it. A guest that runs already stays as it is.
///
/// # Errors
/// The image of an earlier pause cannot be removed, or the VMM does not do it.
pub async fn continue_guest(
    evidence: &Evidence,
    migration: MigrationId,
    guest: Box<dyn PagedSource>,
) -> Result<Box<dyn PagedSource>, EngineError> {
    // INVARIANT(image-once): what was kept of a pause is the past of a guest that goes on.
    evidence.forget_image(migration).await?;
    let going_on = move || -> Result<Box<dyn PagedSource>, HypervisorError> {
        let mut guest = guest;
        guest.throttle(0)?;
        guest.resume()?;
        Ok(guest)
    };
    Ok(joined(tokio::task::spawn_blocking(going_on).await)??)
}

/// Runs the source end of a migration that an earlier gateway has begun: `order` and its ledger are as that left them, `offer`
/// is the one record in the journal, and the guest goes on ([`continue_guest`]). The session in `ports` is new, and greeted. The
/// attempt has begun at `began`.
pub async fn continue_source(order: SourceOrder, ports: SourcePorts, offer: &OfferRecord, began: Instant) -> SourceEnd {
    let (mut run, commands) = Run::new(order, ports);
    run.started = began;
    let mut events = VecDeque::new();
    if let Err(error) = run.continue_from(offer).await {
        events.push_back(run.give_up(error));
    }
    run.run(commands, events).await
}

impl Run {
    async fn continue_from(&mut self, offer: &OfferRecord) -> Result<(), EngineError> {
        let binding = Binding::from(offer);
        // Whom the VM was offered to; whether the new session is with that very peer is seen where it is taken up.
        let offered_to = Link {
            session: Arc::clone(&self.link.session),
            peer: PeerFacts { spiffe: binding.peer.clone(), incarnation: binding.peer_incarnation, signing_key: binding.peer_key },
            negotiated: self.link.negotiated.clone(),
        };
        let link = std::mem::replace(&mut self.link, offered_to);
        self.binding = Some(binding);
        // Whatever fails from here on ends the attempt in the journal.
        self.machine = Source::after_restart(self.order.goal, offer.durability, self.order.stream.lanes, self.round.round);
        let directory = self.order.ledger.clone().ok_or_else(|| EngineError::Bug("nothing to go on from".into()))?;
        let progress = |source| EngineError::Progress { migration: self.order.migration, source };
        let (ledger, left) = Ledger::open(&directory, self.ram.pages()).map_err(progress)?;
        let lane = |lane| -> io::Result<_> {
            let lane_ledger = LaneLedger::open(&directory, lane)?;
            let lane = SourceLane::after_restart(lane, left.lanes, &self.packing, lane_ledger)?;
            Ok(Arc::new(tokio::sync::Mutex::new(lane)))
        };
        self.encoders = (0..left.lanes).map(LaneIndex).map(lane).collect::<io::Result<_>>().map_err(progress)?;
        self.carried = vec![(PageCounts::default(), 0); usize::from(left.lanes)];
        // What of it never left this host nobody knows any more.
        self.left = vec![u64::MAX; usize::from(left.lanes)];
        self.round = RoundUnderWay::new(left.round, false, self.encoders.len(), 0);
        self.tracker = Some(Tracker::after_restart(left.round, left.in_flight, left.pages));
        self.keep_digests();
        self.count_first_round();
        self.machine = Source::after_restart(self.order.goal, offer.durability, left.lanes, self.round.round);
        self.figures.rounds = self.round.round.0;
        self.ledger = Some(ledger);
        self.phase = Phase::Memory;
        let now = Instant::now();
        let ends = now + self.order.outage_max;
        self.patience = Some(ends);
        let search = self.search(false, Some(link));
        self.outage = Some(Outage::new(now, ends, search));
        self.note_outage(Event::LinkLost, &[("state", self.machine.name().into()), ("why", RESTARTED.into())]).await;
        crate::failpoint::hit!("source.continues");
        self.show(|_| {});
        Ok(())
    }

    /// Writes down what is owed, for a gateway that is started anew. Before the VMM is asked for anything else.
    pub(super) fn write_owed(&mut self) -> Result<(), EngineError> {
        let lanes = self.lane_count();
        let Some(tracker) = self.tracker.take() else { return Ok(()) };
        let written = self.write(|ledger| ledger.owe(lanes, tracker.round(), tracker.owed()));
        self.tracker = Some(tracker);
        written
    }

    pub(super) fn lane_count(&self) -> u16 {
        u16::try_from(self.encoders.len()).unwrap_or(u16::MAX)
    }

    /// Without a ledger a restart ends the attempt, and nothing worse. One that is behind would be worse.
    pub(super) fn write(&mut self, entry: impl FnOnce(&Ledger) -> io::Result<()>) -> Result<(), EngineError> {
        let Some(ledger) = self.ledger.take() else { return Ok(()) };
        self.ledger = self.written(entry(&ledger))?.map(|()| ledger);
        Ok(())
    }

    /// What came of a write to the ledger: nothing where it could not be written and is gone.
    pub(super) fn written<T>(&self, result: io::Result<T>) -> Result<Option<T>, EngineError> {
        let error = match result {
            Ok(done) => return Ok(Some(done)),
            Err(error) => error,
        };
        let migration = self.order.migration;
        tracing::warn!(%migration, %error, "a restart of this gateway would end the migration");
        match self.order.ledger.as_ref().map(std::fs::remove_dir_all) {
            Some(Err(source)) if source.kind() != io::ErrorKind::NotFound => Err(EngineError::Progress { migration, source }),
            _ => Ok(None),
        }
    }
}

const RESTARTED: &str = "this gateway was started anew";
