//! Why the gateway did not do what it was asked.

use std::path::PathBuf;

use super::EventError;
use crate::telemetry::{ErrorClass, Problem, chain};

/// Why the gateway did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no gateway listens on `{}`", .socket.display())]
    NotRunning {
        /// Where we looked.
        socket: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The socket's mode keeps this user out.
    #[error("this user may not use the gateway's socket `{}`", .socket.display())]
    NotPermitted {
        /// Which one.
        socket: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The gateway said no.
    #[error("{}", .0.message)]
    Refused(Box<Problem>),
    /// The connection ended before the answer.
    #[error("the gateway on `{}` went away before it answered", .socket.display())]
    Lost {
        /// Which one.
        socket: PathBuf,
        /// Whether the request asked for a change, which then may or may not have been made.
        changes: bool,
        /// What HTTP said.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// No answer for too long.
    #[error("the gateway on `{}` does not answer", .socket.display())]
    Silent {
        /// Which one.
        socket: PathBuf,
        /// As in `Lost`.
        changes: bool,
    },
    /// The answer is not one of this API.
    #[error("the gateway on `{}` gave an answer that this program does not understand: {reason}", .socket.display())]
    Answer {
        /// Which one.
        socket: PathBuf,
        /// What was expected and what came, without the content.
        reason: String,
    },
    /// A line of an event stream is not an event.
    #[error("the gateway on `{}` sent something else than events", .socket.display())]
    Event {
        /// Which one.
        socket: PathBuf,
        /// Why.
        #[source]
        source: EventError,
    },
}

impl ClientError {
    /// The failure as people and scripts see it.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let message = chain(self);
        match self {
            Self::Refused(problem) => (**problem).clone(),
            Self::NotRunning { .. } => Problem::new(ErrorClass::Misuse, message)
                .with_code("gateway-not-running")
                .with_hint("start it with `sealane gateway --config FILE`, or name its socket with --socket PATH or --config FILE"),
            Self::NotPermitted { .. } => Problem::new(ErrorClass::Denied, message)
                .with_code("socket-not-permitted")
                .with_hint("be in the group that owns the socket, and in an [[operator]] table of the gateway's configuration"),
            Self::Lost { changes: true, .. } | Self::Silent { changes: true, .. } => Problem::new(ErrorClass::InDoubt, message)
                .with_code("answer-lost")
                .with_hint("whether the request was carried out is not known; `sealane status` and `sealane vms` tell"),
            Self::Lost { .. } => Problem::new(ErrorClass::Local, message).with_code("answer-lost"),
            Self::Silent { .. } => Problem::new(ErrorClass::TimedOut, message).with_code("gateway-silent"),
            Self::Answer { .. } | Self::Event { .. } => Problem::new(ErrorClass::Local, message)
                .with_code("answer-not-understood")
                .with_hint("is the gateway of another version than this command? `sealane status` shows its version"),
        }
    }
}
