//! The question before the switch: whether all that was permitted still is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::engine::EngineError;
use crate::engine::handoff::joined;
use crate::engine::source::AskCommit;
use crate::migration::{DestinationStep, SourceStep};
use crate::transport::Session;
use crate::wire::ErrorClass;

/// Asks for the permit of the switch: ahead, when the pause begins and neither processors nor disk have anything else to do for it, so
/// that the decision and its entry in the audit log take none of the pause.
pub(super) struct CommitQuestion<S = Session> {
    ask: AskCommit<S>,
    ahead: Option<Ahead<S>>,
    holds: Duration,
}

struct Ahead<S> {
    asked: Instant,
    of: Arc<S>,
    answer: JoinHandle<Result<(), EngineError>>,
    /// Whether it was waited for, and is a permit.
    permitted: bool,
}

/// How long an answer holds. WHY: what a policy, a revocation list or a certificate say anew counts within a second, here as in a
/// session that stands.
const ANSWER_HOLDS: Duration = Duration::from_secs(1);

impl CommitQuestion {
    pub(super) fn new(ask: AskCommit) -> Self {
        Self { ask, ahead: None, holds: ANSWER_HOLDS }
    }
}

impl<S: Send + Sync + 'static> CommitQuestion<S> {
    /// The switch on `session` is near. Nobody is asked again as long as half of the time is left that an answer holds.
    pub(super) fn ask_ahead(&mut self, session: &Arc<S>) {
        if self.ahead.as_ref().is_none_or(|ahead| !Arc::ptr_eq(&ahead.of, session) || ahead.asked.elapsed() >= self.holds / 2) {
            self.ahead = Some(Ahead { asked: Instant::now(), of: Arc::clone(session), answer: self.put(session), permitted: false });
        }
    }

    /// The same, where the switch comes behind what may take as long again as `lately`.
    pub(super) fn ask_before(&mut self, session: &Arc<S>, lately: Duration) {
        if lately < self.holds / 2 {
            self.ask_ahead(session);
        }
    }

    /// Waits for an answer that was asked for ahead, which may still be too old for the switch.
    ///
    /// # Errors
    /// There is no permit.
    pub(super) async fn settled(&mut self) -> Result<(), EngineError> {
        let Some(mut ahead) = self.ahead.take() else { return Ok(()) };
        if !ahead.permitted {
            joined((&mut ahead.answer).await)??;
        }
        self.ahead = Some(Ahead { permitted: true, ..ahead });
        Ok(())
    }

    /// The answer, for `session`, not older than a second. Why there is no permit is `error`, unless there is one before it.
    ///
    /// # Errors
    /// Whoever was asked panicked.
    pub(super) async fn answer(&mut self, session: &Arc<S>, error: &mut Option<EngineError>) -> Result<CommitAnswer, EngineError> {
        let ahead = self.ahead.take().filter(|ahead| Arc::ptr_eq(&ahead.of, session) && ahead.asked.elapsed() < self.holds);
        let answer = match ahead {
            Some(Ahead { permitted: true, .. }) => Ok(()),
            Some(Ahead { answer, .. }) => joined(answer.await)?,
            None => joined(self.put(session).await)?,
        };
        Ok(match answer {
            Ok(()) => CommitAnswer::Permitted,
            Err(why) => {
                let class = why.class();
                error.get_or_insert(why);
                if class == ErrorClass::Denied { CommitAnswer::Denied } else { CommitAnswer::Unanswered(class) }
            }
        })
    }

    fn put(&self, session: &Arc<S>) -> JoinHandle<Result<(), EngineError>> {
        let (ask, session) = (Arc::clone(&self.ask), Arc::clone(session));
        tokio::task::spawn_blocking(move || ask(&session))
    }
}

/// What a handoff does with the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommitAnswer {
    Permitted,
    Denied,
    /// Nobody could say.
    Unanswered(ErrorClass),
}

impl From<CommitAnswer> for SourceStep {
    fn from(answer: CommitAnswer) -> Self {
        match answer {
            CommitAnswer::Permitted => Self::CommitPermitted,
            CommitAnswer::Denied => Self::CommitDenied,
            CommitAnswer::Unanswered(class) => Self::GiveUp(class),
        }
    }
}

impl From<CommitAnswer> for DestinationStep {
    fn from(answer: CommitAnswer) -> Self {
        match answer {
            CommitAnswer::Permitted => Self::CommitPermitted,
            CommitAnswer::Denied => Self::CommitDenied,
            CommitAnswer::Unanswered(class) => Self::GiveUp(class),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A question whose answers are numbered, in the sessions' own numbers.
    fn numbered(holds: Duration) -> (CommitQuestion<AtomicU32>, Arc<AtomicU32>, Arc<AtomicU32>) {
        let ask = |session: &AtomicU32| {
            session.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let question = CommitQuestion { ask: Arc::new(ask), ahead: None, holds };
        (question, Arc::default(), Arc::default())
    }

    async fn permitted(question: &mut CommitQuestion<AtomicU32>, session: &Arc<AtomicU32>) -> bool {
        question.answer(session, &mut None).await.unwrap() == CommitAnswer::Permitted
    }

    fn asked(session: &AtomicU32) -> u32 {
        session.load(Ordering::SeqCst)
    }

    #[tokio::test]
    async fn what_was_asked_ahead_is_not_asked_again() {
        let (mut question, session, _) = numbered(Duration::from_secs(3600));
        question.ask_ahead(&session);
        assert!(permitted(&mut question, &session).await);
        assert_eq!(asked(&session), 1);
        assert!(permitted(&mut question, &session).await);
        assert_eq!(asked(&session), 2, "an answer is good for one switch");
    }

    #[tokio::test]
    async fn nobody_is_asked_twice_before_one_switch_unless_that_is_far() {
        let (mut question, session, other) = numbered(Duration::from_secs(3600));
        question.ask_before(&session, Duration::from_secs(1800));
        question.settled().await.unwrap();
        assert_eq!(asked(&session), 0, "it would be too old");
        question.ask_before(&session, Duration::from_secs(1));
        question.settled().await.unwrap();
        assert_eq!(asked(&session), 1);
        question.ask_ahead(&session);
        question.settled().await.unwrap();
        question.settled().await.unwrap();
        assert!(permitted(&mut question, &session).await);
        assert_eq!(asked(&session), 1);
        question.ask_ahead(&session);
        question.ask_ahead(&other);
        assert!(permitted(&mut question, &other).await);
        assert_eq!((asked(&session), asked(&other)), (2, 1), "another session is asked of");
        question.holds = Duration::ZERO;
        question.ask_ahead(&session);
        question.ask_ahead(&session);
        question.settled().await.unwrap();
        assert!(asked(&session) >= 3, "an answer that is old is asked for again");
    }

    #[tokio::test]
    async fn an_answer_that_is_too_old_or_of_another_session_does_not_count() {
        let (mut question, session, other) = numbered(Duration::ZERO);
        question.ask_ahead(&session);
        assert!(permitted(&mut question, &session).await);
        assert_eq!(asked(&session), 2);
        question.holds = Duration::from_secs(3600);
        question.ask_ahead(&session);
        assert!(permitted(&mut question, &other).await);
        assert_eq!(asked(&other), 1);
    }

    #[tokio::test]
    async fn a_refusal_that_was_asked_for_ahead_is_a_refusal() {
        let ask = |_: &()| Err(EngineError::Bug("nobody answers".into()));
        let mut question = CommitQuestion { ask: Arc::new(ask), ahead: None, holds: Duration::from_secs(3600) };
        let session = Arc::new(());
        question.ask_ahead(&session);
        assert!(matches!(question.settled().await, Err(EngineError::Bug(_))), "before the pause");
        question.ask_ahead(&session);
        let mut error = None;
        assert_eq!(question.answer(&session, &mut error).await.unwrap(), CommitAnswer::Unanswered(ErrorClass::Bug));
        assert!(matches!(error, Some(EngineError::Bug(_))));
    }
}
