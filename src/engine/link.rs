//! A session after both sides have said what they speak.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::EngineError;
use crate::engine::error::NO_MIGRATION;
use crate::limits;
use crate::transport::{Session, TransportError};
use crate::types::{Incarnation, SpiffeId};
use crate::wire::{Failure, Handoff, Hello, Message, Negotiated, SignedHandoff, negotiate};

/// What the peer said in its HELLO, bound to the certificate that the session authenticated.
#[derive(Debug, Clone)]
pub struct PeerFacts {
    /// The verified identity.
    pub spiffe: SpiffeId,
    /// The peer's journal.
    pub incarnation: Incarnation,
    /// The key that signs the peer's handoff messages and audit checkpoints.
    pub signing_key: [u8; 32],
}

/// A session whose control stream is open for migration messages.
#[derive(Debug)]
pub struct Link {
    /// The session itself.
    pub session: Arc<Session>,
    /// Who is at the other end.
    pub peer: PeerFacts,
    /// What both speak.
    pub negotiated: Negotiated,
}

impl Link {
    /// Whether the peer would be admitted now, by the roots and CRLs that are in force.
    pub(super) fn admitted(&self) -> Result<(), EngineError> {
        let not_admitted = |source| EngineError::NotAdmitted { peer: self.peer.spiffe.clone(), source };
        self.session.verify_again().map(drop).map_err(not_admitted)
    }
}

fn before_migration(source: TransportError) -> EngineError {
    EngineError::Transport { migration: NO_MIGRATION, source }
}

/// Exchanges HELLOs. They cross: neither side waits for the other's before it sends its own.
///
/// # Errors
/// The session fails, or the peer speaks nothing that we speak.
pub async fn greet(session: Session, own: &Hello) -> Result<Link, EngineError> {
    let greeting = async {
        session.send(&Message::Hello(own.clone())).await.map_err(before_migration)?;
        // SPEC: PROTOCOL.md#must-hello-first
        let theirs = match session.receive().await.map_err(before_migration)? {
            Message::Hello(hello) => hello,
            other => return Err(EngineError::OutOfPlace { expected: "HELLO", got: other.name().to_owned() }),
        };
        Ok((negotiate(own, &theirs).map_err(EngineError::Wire)?, theirs))
    };
    let greeted = tokio::time::timeout(limits::GREETING_WITHIN, greeting).await.unwrap_or_else(|_| {
        let (address, after) = (session.peer_address(), limits::GREETING_WITHIN);
        Err(before_migration(TransportError::TimedOut { address, awaited: "say HELLO", after }))
    });
    let (negotiated, theirs) = match greeted {
        Ok(greeted) => greeted,
        Err(error) => {
            session.close(Some(error.class()), &crate::telemetry::chain(&error));
            return Err(error);
        }
    };
    let peer = PeerFacts { spiffe: session.peer().spiffe().clone(), incarnation: theirs.incarnation, signing_key: theirs.signing_key };
    Ok(Link { session: Arc::new(session), peer, negotiated })
}

/// Sends a message; a peer that does not read is waited for until `within`.
pub(super) async fn send_within(session: &Session, message: &Message, within: Duration) -> Result<(), TransportError> {
    let timed_out = |_| TransportError::TimedOut { address: session.peer_address(), awaited: "read a control message", after: within };
    tokio::time::timeout(within, session.send(message)).await.map_err(timed_out)?
}

/// A close that overtakes ABORT would leave a destination that has prepared waiting for a word; it answers with REFUSE.
pub(super) async fn until_abort_is_heard(session: &Session) -> bool {
    let listen = async {
        while let Ok(message) = session.receive().await {
            if let Message::Handoff(SignedHandoff { message, .. }) = message
                && matches!(message.step, Handoff::Refuse { .. })
            {
                return true;
            }
        }
        false
    };
    tokio::time::timeout(limits::LAST_WORDS, listen).await.unwrap_or(false)
}

/// REFUSE has a class and no words; the words follow, if they come soon.
pub(super) async fn hear_why(session: &Session) -> Option<Failure> {
    let listen = async {
        while let Ok(message) = session.receive().await {
            if let Message::Failure(failure) = message {
                return Some(failure);
            }
        }
        None
    };
    tokio::time::timeout(limits::LAST_WORDS, listen).await.ok().flatten()
}
