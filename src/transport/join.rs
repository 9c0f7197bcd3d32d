//! The binding of lanes to their session, and the list of lanes that are expected.
//!
//! A lane is another QUIC connection, so it has to prove that it belongs to the session: same SPIFFE ID,
//! same leaf key, and a tag that only the two ends of both TLS connections can compute:
//!
//! ```text
//! K   = exporter(session, "EXPORTER-sealane-session-v1", migration id)
//! tag = HMAC-SHA256(K, "join" || lane number, 2 bytes little-endian || exporter(lane, "EXPORTER-Channel-Binding", ""))
//! ```
//!
//! A tag copied to another connection, lane or migration is worthless.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ring::hmac;

use super::error::{LaneRefusal, TransportError, close_code, close_reason};
use super::handshake::Agreed;
use super::lane::LaneIo;
use super::session::LinkStats;
use crate::identity::PeerIdentity;
use crate::types::{LaneIndex, MigrationId};
use crate::wire::{ErrorClass, Join};

/// What runs on the worker's thread for each lane that joins. It need not be `Send`.
pub type LaneHandler = Arc<dyn Fn(LaneIo) -> Pin<Box<dyn Future<Output = ()>>> + Send + Sync>;

/// Makes the tags of one migration's lanes.
#[derive(Clone)]
pub(super) struct JoinKey {
    migration: MigrationId,
    session: quinn::Connection,
    key: hmac::Key,
}

impl JoinKey {
    pub(super) fn new(session: &quinn::Connection, migration: MigrationId) -> Result<Self, TransportError> {
        let secret = export(session, SESSION_LABEL, &migration.0)?;
        Ok(Self { migration, session: session.clone(), key: hmac::Key::new(hmac::HMAC_SHA256, &secret) })
    }

    /// The join that opens `lane` on `connection`.
    pub(super) fn join(&self, connection: &quinn::Connection, lane: LaneIndex) -> Result<Join, TransportError> {
        let binding = export(connection, BINDING_LABEL, b"")?;
        let mut tag = [0; 32];
        tag.copy_from_slice(hmac::sign(&self.key, &tagged(lane, &binding)).as_ref());
        Ok(Join { migration: self.migration, lane, tag })
    }

    /// Whether `connection` has the key exchange and the cipher suite of the session: policy was told of that one.
    pub(super) fn has_channel_of(&self, connection: &quinn::Connection) -> bool {
        // SPEC: PROTOCOL.md#must-lane-channel
        Agreed::on(&self.session) == Agreed::on(connection)
    }

    /// Whether the join was made for this session and `connection`. In constant time.
    fn accepts(&self, join: &Join, connection: &quinn::Connection) -> Result<bool, TransportError> {
        let binding = export(connection, BINDING_LABEL, b"")?;
        // SPEC: PROTOCOL.md#must-join-tag
        Ok(hmac::verify(&self.key, &tagged(join.lane, &binding), &join.tag).is_ok())
    }
}

fn tagged(lane: LaneIndex, binding: &[u8; 32]) -> Vec<u8> {
    [b"join".as_slice(), &lane.0.to_le_bytes(), binding].concat()
}

fn export(connection: &quinn::Connection, label: &[u8], context: &[u8]) -> Result<[u8; 32], TransportError> {
    let mut out = [0; 32];
    let action = "export keying material";
    connection
        .export_keying_material(&mut out, label, context)
        .map_err(|_| TransportError::Misuse { action, expected: "a finished handshake" })?;
    Ok(out)
}

const SESSION_LABEL: &[u8] = b"EXPORTER-sealane-session-v1";
/// RFC 9266.
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// Every lane that may come, by migration.
#[derive(Default)]
pub(super) struct LaneTable {
    expected: Mutex<HashMap<MigrationId, Expectation>>,
}

struct Expectation {
    peer: PeerIdentity,
    key: JoinKey,
    granted: u16,
    handler: LaneHandler,
    /// Every lane that ever joined; a number is used once.
    lanes: BTreeMap<LaneIndex, quinn::Connection>,
}

impl LaneTable {
    /// From now on, `lanes` lanes of `migration` may come from `peer`.
    pub(super) fn expect(
        self: &Arc<Self>,
        key: JoinKey,
        peer: &PeerIdentity,
        granted: u16,
        handler: LaneHandler,
    ) -> Result<LaneGate, TransportError> {
        let migration = key.migration;
        let mut expected = self.lock();
        if expected.contains_key(&migration) {
            return Err(TransportError::Misuse { action: "expect lanes", expected: "a migration that does not expect lanes already" });
        }
        expected.insert(migration, Expectation { peer: peer.clone(), key, granted, handler, lanes: BTreeMap::new() });
        Ok(LaneGate { table: Arc::clone(self), migration, close: (None, "lanes are closed".to_owned()) })
    }

    /// Whether any migration expects lanes from this peer and key; before that it may not open a stream.
    pub(super) fn invites(&self, peer: &PeerIdentity) -> Result<(), TransportError> {
        let expected = self.lock();
        let mut of_peer = expected.values().filter(|e| e.peer.spiffe() == peer.spiffe()).peekable();
        if of_peer.peek().is_none() {
            return Err(TransportError::Uninvited { peer: peer.spiffe().clone() });
        }
        if of_peer.any(|e| e.peer.spki_sha256() == peer.spki_sha256()) {
            Ok(())
        } else {
            Err(TransportError::KeyChanged { peer: peer.spiffe().clone() })
        }
    }

    /// Takes the lane's number, once and for all, if the join is right in every respect.
    pub(super) fn claim(&self, join: &Join, peer: &PeerIdentity, connection: &quinn::Connection) -> Result<LaneHandler, TransportError> {
        let refuse = |why| TransportError::LaneRefused { migration: join.migration, lane: join.lane, why };
        let mut expected = self.lock();
        let expectation = expected.get_mut(&join.migration).ok_or_else(|| refuse(LaneRefusal::Unexpected))?;
        if expectation.peer.spiffe() != peer.spiffe() || expectation.peer.spki_sha256() != peer.spki_sha256() {
            return Err(refuse(LaneRefusal::Unexpected));
        }
        if expectation.key.session.close_reason().is_some() {
            return Err(refuse(LaneRefusal::SessionOver));
        }
        if !expectation.key.has_channel_of(connection) {
            return Err(refuse(LaneRefusal::OtherChannel));
        }
        if !expectation.key.accepts(join, connection)? {
            return Err(refuse(LaneRefusal::BadTag));
        }
        if join.lane.0 >= expectation.granted {
            return Err(refuse(LaneRefusal::BeyondGranted));
        }
        if expectation.lanes.contains_key(&join.lane) {
            return Err(refuse(LaneRefusal::AlreadyUsed));
        }
        expectation.lanes.insert(join.lane, connection.clone());
        Ok(Arc::clone(&expectation.handler))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MigrationId, Expectation>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LaneTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaneTable").field("migrations", &self.lock().len()).finish()
    }
}

/// Holds the lanes of one migration open. Dropping it closes them, and no more can join.
#[derive(Debug)]
#[must_use = "dropping the gate closes the lanes"]
pub struct LaneGate {
    table: Arc<LaneTable>,
    migration: MigrationId,
    close: (Option<ErrorClass>, String),
}

impl LaneGate {
    /// Lanes that have joined so far.
    #[must_use]
    pub fn joined(&self) -> usize {
        self.table.lock().get(&self.migration).map_or(0, |e| e.lanes.len())
    }

    /// What the network did for each lane that has joined.
    #[must_use]
    pub fn stats(&self) -> Vec<(LaneIndex, LinkStats)> {
        let expected = self.table.lock();
        let lanes = expected.get(&self.migration).into_iter().flat_map(|e| &e.lanes);
        lanes.map(|(lane, connection)| (*lane, LinkStats::of(connection))).collect()
    }

    /// Closes the lanes and tells the peer why.
    pub fn close(mut self, class: ErrorClass, reason: &str) {
        self.close = (Some(class), reason.to_owned());
    }
}

impl Drop for LaneGate {
    fn drop(&mut self) {
        let removed = self.table.lock().remove(&self.migration);
        let (class, reason) = &self.close;
        for connection in removed.into_iter().flat_map(|e| e.lanes.into_values()) {
            connection.close(close_code(*class), close_reason(reason));
        }
    }
}
