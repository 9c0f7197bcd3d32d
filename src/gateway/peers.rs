//! How peers are reached, and whether they were.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::config::{Address, Peer};
use crate::engine::{self, Link};
use crate::gateway::Gateway;
use crate::telemetry::{Problem, chain};
use crate::types::PeerName;
use crate::wire::ErrorClass;

/// What the last try to reach each peer gave.
#[derive(Debug, Default)]
pub(super) struct Reachability {
    last: Mutex<BTreeMap<PeerName, Result<Duration, String>>>,
}

impl Reachability {
    pub(super) fn last(&self, peer: &PeerName) -> Option<Result<Duration, String>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).get(peer).cloned()
    }

    fn keep(&self, peer: &PeerName, result: Result<Duration, String>) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).insert(peer.clone(), result);
    }
}

impl Gateway {
    /// Opens a session with a peer that proves to be the one configured, and greets it.
    pub(super) async fn dial(&self, peer: &Peer) -> Result<Link, Problem> {
        let result = self.try_dial(peer).await;
        self.peers.keep(
            &peer.name,
            match &result {
                Ok(link) => Ok(link.session.stats().rtt),
                Err(problem) => Err(problem.message.clone()),
            },
        );
        result
    }

    async fn try_dial(&self, peer: &Peer) -> Result<Link, Problem> {
        let named = |error: &dyn std::error::Error| format!("peer `{}` at `{}`: {}", peer.name, peer.address, chain(error));
        let address = resolve(&peer.address).await.map_err(|error| Problem::new(ErrorClass::PeerUnreachable, named(&error)))?;
        let session = match self.endpoint.connect(address, &peer.spiffe).await {
            Ok(session) => session,
            Err(error) => {
                let problem = Problem::new(error.class(), named(&error));
                if problem.class == ErrorClass::Unauthenticated {
                    let refusal = error.verifiers_words().and_then(|words| self.credentials.take_refusal(words));
                    self.note_refused_handshake(Some(peer.spiffe.to_string()), address, &error, refusal).await;
                    return Err(problem.with_hint("compare both sides' certificates with `sealane pki show`"));
                }
                return Err(problem.with_hint("`sealane peers` shows which peers answer"));
            }
        };
        engine::greet(session, &self.hello()).await.map_err(|error| Problem::new(error.class(), named(&error)))
    }
}

async fn resolve(address: &Address) -> std::io::Result<SocketAddr> {
    let mut found = tokio::net::lookup_host((address.host.as_str(), address.port)).await?;
    found.next().ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address"))
}

/// The address that a request is judged by before the peer was reached; a name that is not an address is `0.0.0.0`.
pub(super) fn numeric(address: &Address) -> IpAddr {
    address.host.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}
