//! A destination whose link was lost is looked for until it answers, by sources of pages and of streams alike.

use std::time::{Duration, Instant};

use ring::rand::{SecureRandom, SystemRandom};
use tokio::task::JoinHandle;

use crate::engine::link::send_within;
use crate::engine::source::Redial;
use crate::engine::{EngineError, Link};
use crate::limits;
use crate::transport::TransportError;
use crate::types::{MigrationId, Round};
use crate::wire::{ErrorClass, Message, Resume};

/// The outage under way. `T` is what a destination says that it has.
#[derive(Debug)]
pub(super) struct Outage<T> {
    pub(super) since: Instant,
    /// When it is no longer waited out.
    pub(super) ends: Instant,
    pub(super) search: Search<T>,
    pub(super) cause: Option<EngineError>,
}

impl<T> Outage<T> {
    pub(super) fn new(since: Instant, ends: Instant, search: Search<T>) -> Self {
        Self { since, ends, search, cause: None }
    }
}

/// Looks for the destination; dropped, it stops.
#[derive(Debug)]
pub(super) struct Search<T>(JoinHandle<Result<Back<T>, EngineError>>);

impl<T> Drop for Search<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A session stands again.
#[derive(Debug)]
pub(super) struct Back<T> {
    pub(super) link: Link,
    /// What the destination says it has; nothing when nothing was accepted yet.
    pub(super) resumed: Option<T>,
}

/// Waits for the end of an outage; for ever when there is none. May be dropped and called again.
pub(super) async fn back<T>(outage: &mut Option<Outage<T>>) -> Result<Back<T>, EngineError> {
    match outage {
        Some(outage) => (&mut outage.search.0).await.unwrap_or_else(|error| Err(EngineError::Bug(error.to_string()))),
        None => std::future::pending().await,
    }
}

/// What is looked for, and how.
pub(super) struct Wanted<T> {
    pub(super) redial: Redial,
    pub(super) migration: MigrationId,
    /// The last round that was begun; nothing when nothing was accepted yet.
    pub(super) round: Option<Round>,
    /// After COMMIT the destination is asked for as long as it takes.
    pub(super) committed: bool,
    /// Whether the outage before has hardly ended.
    pub(super) again: bool,
    /// The answer to RESUME, or the message that is none.
    pub(super) answer: fn(Message) -> Result<T, Message>,
}

/// Exponential, with jitter, so that many migrations that lost one link do not all come back at once.
struct Backoff(Duration);

impl Backoff {
    /// How long to wait now: between half of the step and the whole.
    fn next(&mut self) -> Duration {
        let step = self.0;
        self.0 = (step * 2).min(LONGEST);
        let mut random = [0; 2];
        // Without random numbers there is no jitter, which does no harm to one migration.
        let _ = SystemRandom::new().fill(&mut random);
        step / 2 + step / 2 * u32::from(u16::from_le_bytes(random)) / u32::from(u16::MAX)
    }
}

impl<T: Send + 'static> Wanted<T> {
    /// With `first` a session stands already, and is the one that is tried first.
    pub(super) fn search(self, mut first: Option<Link>) -> Search<T> {
        Search(tokio::spawn(async move {
            let mut pause = Backoff(if self.again { LONGEST / 2 } else { FIRST });
            loop {
                let link = match first.take() {
                    Some(link) => Ok(link),
                    None => {
                        tokio::time::sleep(pause.next()).await;
                        (self.redial)().await
                    }
                };
                let back = match link {
                    Ok(link) => self.try_resume(link).await,
                    Err(error) => Err(error),
                };
                match back {
                    Ok(back) => return Ok(back),
                    // The peer is there and will have none of it; after COMMIT it is asked for as long as it takes.
                    Err(error) if !self.committed && is_final(&error) => return Err(error),
                    Err(error) => {
                        tracing::debug!(migration = %self.migration, error = %crate::telemetry::chain(&error), "destination not back yet")
                    }
                }
            }
        }))
    }

    /// One session, and the destination's word on it.
    async fn try_resume(&self, link: Link) -> Result<Back<T>, EngineError> {
        crate::failpoint::hit!("source.redialled");
        let migration = self.migration;
        let Some(round) = self.round else { return Ok(Back { link, resumed: None }) };
        let transport = |source| EngineError::Transport { migration, source };
        send_within(&link.session, &Message::Resume(Resume { migration, round }), limits::SEND_WITHIN).await.map_err(transport)?;
        crate::failpoint::hit!("source.resume-sent");
        let answer = async {
            loop {
                match (self.answer)(link.session.receive().await.map_err(transport)?) {
                    Ok(resumed) => return Ok(resumed),
                    Err(Message::Failure(failure)) => return Err(EngineError::peer(migration, failure.class, &failure.reason)),
                    Err(Message::Ping | Message::AuditHead(_)) => {}
                    Err(other) => return Err(EngineError::OutOfPlace { expected: "RESUMED", got: other.name().to_owned() }),
                }
            }
        };
        let resumed = tokio::time::timeout(limits::ANSWER_WITHIN, answer).await.unwrap_or_else(|_| {
            let (address, after) = (link.session.peer_address(), limits::ANSWER_WITHIN);
            Err(transport(TransportError::TimedOut { address, awaited: "say where the migration goes on", after }))
        })?;
        crate::failpoint::hit!("source.resumed-heard");
        Ok(Back { link, resumed: Some(resumed) })
    }
}

/// Whether asking again can change nothing.
fn is_final(error: &EngineError) -> bool {
    match error {
        EngineError::Peer { class, .. } => *class != ErrorClass::PeerUnreachable,
        error => matches!(
            error.class(),
            ErrorClass::Unauthenticated | ErrorClass::Denied | ErrorClass::PeerMisbehaved | ErrorClass::PeerIncompatible
        ),
    }
}

/// What of the peer is not what it was.
pub(super) fn changed(before: &Link, now: &Link) -> Option<&'static str> {
    let (before, now) = (&before.peer, &now.peer);
    [
        ("identity", before.spiffe == now.spiffe),
        ("journal", before.incarnation == now.incarnation),
        ("signing key", before.signing_key == now.signing_key),
    ]
    .into_iter()
    .find_map(|(what, same)| (!same).then_some(what))
}

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
