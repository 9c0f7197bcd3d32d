//! A departure waits for its turn: in this gateway's queue, and for room at its destination.

use std::time::{Instant, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::{mpsc, watch};

use crate::engine::{Command, EngineError};
use crate::gateway::outgoing::Departure;
use crate::gateway::queue::Standing;
use crate::gateway::registry::{Claim, Ticket};
use crate::gateway::{Gateway, report};
use crate::migration::Goal;
use crate::telemetry::{Phase, Problem, Progress, RunningOn};

/// A departure's way through the queue.
pub(super) struct Turns {
    ticket: Ticket,
    /// When it left the queue for the first time: from then on its time counts.
    began: Option<(Instant, SystemTime)>,
    /// When its destination, which has no room, may be asked again.
    ask_at: Option<Instant>,
}

impl Turns {
    pub(super) fn new(ticket: Ticket) -> Self {
        Self { ticket, began: None, ask_at: None }
    }

    /// When it left the queue for the first time; now, if it has not.
    pub(super) fn began(&self) -> (Instant, SystemTime) {
        self.began.unwrap_or_else(|| (Instant::now(), SystemTime::now()))
    }

    /// The destination has taken it.
    pub(super) fn taken(&self) {
        self.ticket.taken(Instant::now());
    }

    /// The destination has no room now.
    pub(super) fn sent_back(&self, claim: &Claim) {
        let mut random = [0; 2];
        // Without random numbers there is no jitter: two gateways that fill each other may then take a few tries more.
        let _ = SystemRandom::new().fill(&mut random);
        self.ticket.sent_back(claim, Instant::now(), f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX));
    }

    /// What operators see of a departure that waits; nothing when it is its turn.
    pub(super) fn look(&mut self, departure: &Departure) -> Option<Progress> {
        let Standing::Waits { position, ask_at } = self.ticket.ask(&departure.claim, Instant::now()) else {
            self.began = Some(self.began());
            return None;
        };
        self.ask_at = ask_at;
        let mut shown = Progress::new(departure.migration);
        shown.phase = if self.began.is_some() { Phase::Connect } else { Phase::Queued };
        shown.queue_position = Some(position);
        shown.elapsed_seconds = self.began.map_or(0.0, |(began, _)| began.elapsed().as_secs_f64());
        let full = || format!("gateway `{}` has no room for another migration, and is asked again", departure.peer.name);
        shown.stalled_because = ask_at.is_some().then(full);
        Some(shown)
    }
}

impl Gateway {
    /// Waits until it is the departure's turn. Nothing was sent then, and the guest does not know of it.
    pub(super) async fn turn(
        &self,
        turns: &mut Turns,
        departure: &mut Departure,
        progress: &watch::Sender<Progress>,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<(), Problem> {
        let mut room = self.registry.room();
        let deadline = turns.began.map(|(began, _)| began + departure.timeout);
        loop {
            room.borrow_and_update();
            let Some(shown) = turns.look(departure) else { break };
            progress.send_replace(shown);
            let over = tokio::select! {
                // It lives as long as the registry.
                _ = room.changed() => None,
                () = reached(turns.ask_at) => None,
                () = reached(deadline) => Some(EngineError::TimedOut { vm: departure.vm.name.clone(), limit: departure.timeout }),
                command = commands.recv() => departure.told(command),
            };
            if let Some(error) = over {
                return Err(report::problem(&error, RunningOn::Source));
            }
        }
        progress.send_replace(Progress::new(departure.migration));
        Ok(())
    }
}

impl Departure {
    /// What an operator says to it while it waits.
    fn told(&mut self, command: Option<Command>) -> Option<EngineError> {
        match command {
            Some(Command::Bandwidth(limit)) => self.bandwidth = limit,
            Some(Command::DowntimeMax(downtime_max)) => self.goal = Goal { downtime_max, ..self.goal },
            Some(Command::CheckPeer | Command::Superseded) => {}
            Some(Command::Cancel) | None => return Some(EngineError::Cancelled { vm: self.vm.name.clone() }),
        }
        None
    }
}

async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until the destination has taken it; for ever when it ends before that.
pub(super) async fn begun(mut shown: watch::Receiver<Progress>) {
    let began = shown.wait_for(|shown| shown.phase > Phase::Connect && shown.phase < Phase::Done).await.is_ok();
    if !began {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_memory_phase_says_that_it_has_begun_and_the_end_of_one_that_was_refused_does_not() {
        let mut progress = Progress::new(crate::types::MigrationId([1; 16]));
        progress.phase = Phase::Done;
        let (sender, shown) = watch::channel(progress.clone());
        let mut begun = std::pin::pin!(begun(shown));
        let soon = std::time::Duration::from_millis(1);
        assert!(tokio::time::timeout(soon, &mut begun).await.is_err());
        progress.phase = Phase::Memory;
        sender.send_replace(progress);
        begun.await;
    }
}
