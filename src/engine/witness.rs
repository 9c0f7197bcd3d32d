//! At the end of a handoff, and every minute of a session that takes longer, each side shows the other the head of its audit log,
//! keeps and cosigns what it is shown, and keeps what the other has signed.

use std::time::{Duration, Instant};

use crate::audit::{Announcement, Answer};
use crate::engine::handoff::Evidence;
use crate::engine::link::send_within;
use crate::engine::{EngineError, Link};
use crate::limits;
use crate::types::MigrationId;
use crate::wire::{AuditAnswer, AuditHead, Message};

/// How far two sides have come with each other's heads, in one session.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    /// The peer's last head that is kept.
    pub(super) theirs: Option<String>,
    /// Whether the peer has cosigned ours.
    ours: bool,
    shown_again: bool,
    heard: usize,
    /// Since when they are counted.
    counted: Option<Instant>,
}

impl Exchange {
    /// Whether each side has what it wants of the other.
    pub(super) fn is_done(&self) -> bool {
        self.ours && self.theirs.is_some()
    }
}

impl Evidence {
    /// Shows the peer the head of the audit log, from where the peer knows it. A peer that does not get it has the next one.
    pub(super) async fn show_head(&self, link: &Link, migration: MigrationId) {
        self.show_head_from(link, migration, None).await;
    }

    /// The same, if the peer has not seen a head for a while: while a migration takes long, and where it ends without a handoff.
    pub(super) async fn show_head_when_due(&self, link: &Link, migration: MigrationId) {
        if self.audit.head_is_due(&link.peer.spiffe) {
            self.show_head(link, migration).await;
        }
    }

    async fn show_head_from(&self, link: &Link, migration: MigrationId, from: Option<u64>) {
        let (audit, peer) = (self.audit.clone(), link.peer.spiffe.clone());
        let made = tokio::task::spawn_blocking(move || audit.announce(&peer, from, Some(migration))).await;
        match made {
            Ok(Ok(Announcement { checkpoint, from, consistency, proof })) => {
                let head = AuditHead { checkpoint, from, consistency, proof: proof.unwrap_or_default() };
                self.say_of_heads(link, Message::AuditHead(head)).await;
            }
            Ok(Err(error)) => tracing::error!(peer = %link.peer.spiffe, error = %error, "the head of the audit log cannot be shown"),
            Err(error) => tracing::error!(error = %error, "audit task failed"),
        }
    }

    /// Takes in a message that is no step of a migration, at either end of one that is in the state `expected`.
    ///
    /// # Errors
    /// The peer says that it failed, or what has no place here.
    pub(super) async fn hear_aside(
        &self,
        link: &Link,
        migration: MigrationId,
        exchange: &mut Exchange,
        expected: &'static str,
        message: Message,
    ) -> Result<(), EngineError> {
        match self.hear_of_heads(link, migration, exchange, message).await {
            None | Some(Message::Ping) => Ok(()),
            Some(Message::Failure(failure)) => Err(EngineError::peer(migration, failure.class, &failure.reason)),
            Some(other) => Err(EngineError::OutOfPlace { expected, got: other.name().to_owned() }),
        }
    }

    /// Takes in a message about heads; one that is about something else comes back.
    pub(super) async fn hear_of_heads(
        &self,
        link: &Link,
        migration: MigrationId,
        exchange: &mut Exchange,
        message: Message,
    ) -> Option<Message> {
        if !matches!(message, Message::AuditHead(_) | Message::AuditAnswer(_)) {
            return Some(message);
        }
        if exchange.counted.is_none_or(|since| since.elapsed() >= limits::AUDIT_HEADS_EVERY / 2) {
            (exchange.heard, exchange.shown_again, exchange.counted) = (0, false, Some(Instant::now()));
        }
        exchange.heard = exchange.heard.saturating_add(1);
        if exchange.heard > limits::AUDIT_HEADS_PER_SESSION_MAX {
            tracing::warn!(peer = %link.peer.spiffe, "more heads of audit logs than an exchange takes: ignored");
            return None;
        }
        match message {
            Message::AuditHead(head) => self.keep_head(link, migration, exchange, head).await,
            Message::AuditAnswer(answer) => self.keep_answer(link, migration, exchange, answer).await,
            _ => {}
        }
        None
    }

    async fn keep_head(&self, link: &Link, migration: MigrationId, exchange: &mut Exchange, head: AuditHead) {
        let AuditHead { checkpoint, from, consistency, proof } = head;
        let shown = Announcement { checkpoint, from, consistency, proof: Some(proof).filter(|proof| !proof.is_empty()) };
        let (audit, peer, shown_now) = (self.audit.clone(), link.peer.clone(), shown.clone());
        let kept = tokio::task::spawn_blocking(move || audit.keep_peer_head(&peer.spiffe, &peer.signing_key, &shown_now, Some(migration)));
        let answer = match kept.await {
            Ok(Ok(Answer::Cosigned(entries, cosignature))) => {
                exchange.theirs = Some(shown.checkpoint);
                AuditAnswer { entries, cosignature }
            }
            Ok(Ok(Answer::From(entries))) => AuditAnswer { entries, cosignature: String::new() },
            Ok(Err(error)) => {
                tracing::error!(peer = %link.peer.spiffe, error = %error, "the peer's audit head is not kept");
                return;
            }
            Err(error) => return tracing::error!(error = %error, "audit task failed"),
        };
        self.say_of_heads(link, Message::AuditAnswer(answer)).await;
        // Who was called answers in kind.
        self.show_head_when_due(link, migration).await;
    }

    async fn keep_answer(&self, link: &Link, migration: MigrationId, exchange: &mut Exchange, answer: AuditAnswer) {
        let AuditAnswer { entries, cosignature } = answer;
        if cosignature.is_empty() {
            // Once: a peer whose mind changes again has no log to compare with.
            if !std::mem::replace(&mut exchange.shown_again, true) {
                self.show_head_from(link, migration, Some(entries)).await;
            }
            return;
        }
        let (audit, peer) = (self.audit.clone(), link.peer.clone());
        let kept = tokio::task::spawn_blocking(move || audit.keep_cosignature(&peer.spiffe, &peer.signing_key, entries, &cosignature));
        match kept.await {
            Ok(Ok(())) => exchange.ours = true,
            Ok(Err(error)) => tracing::error!(peer = %link.peer.spiffe, error = %error, "the peer's cosignature is not kept"),
            Err(error) => tracing::error!(error = %error, "audit task failed"),
        }
    }

    /// Listens until both have what they want, or nothing comes any more. Whoever was called says so when it is there, and stays until
    /// the caller goes; the caller goes when it has heard that, so that its own last answer has arrived.
    pub(super) async fn finish_heads(&self, link: &Link, migration: MigrationId, exchange: &mut Exchange, called: bool, within: Duration) {
        let listen = async {
            let mut said = false;
            loop {
                if called && exchange.is_done() && !std::mem::replace(&mut said, true) {
                    self.say_of_heads(link, Message::Ping).await;
                }
                let Ok(message) = link.session.receive().await else { return };
                let last = !called && exchange.is_done();
                if self.hear_of_heads(link, migration, exchange, message).await.is_some() && last {
                    return;
                }
            }
        };
        // It changes nothing any more.
        let _ = tokio::time::timeout(within, listen).await;
    }

    async fn say_of_heads(&self, link: &Link, message: Message) {
        if let Err(error) = send_within(&link.session, &message, limits::SEND_WITHIN).await {
            tracing::debug!(peer = %link.peer.spiffe, error = %error, "a word about audit logs is not sent");
        }
    }
}
