//! Two gateways with real certificates and real UDP on loopback.

mod crowd;
mod hostile;
mod key_exchange;
mod lanes;
mod link;
mod sessions;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use super::{Endpoint, Refused, Session, TransportConfig};
use crate::identity::authority;
use crate::identity::{Credentials, IdentityConfig, PostQuantum, TrustDomainConfig};
use crate::types::{MigrationId, SpiffeId};
use crate::wire::Message;

const DOMAIN: &str = "dc1.example.net";
const MIGRATION: MigrationId = MigrationId([0x5a; 16]);

/// A certificate authority and the gateways that it knows.
struct Fleet {
    dir: TempDir,
    authority: authority::AuthorityFiles,
}

impl Fleet {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = authority::init(&dir.path().join("ca"), DOMAIN).unwrap();
        Self { dir, authority }
    }

    fn gateway(&self, name: &str) -> Arc<Credentials> {
        self.gateway_with(name, PostQuantum::default())
    }

    fn gateway_with(&self, name: &str, post_quantum: PostQuantum) -> Arc<Credentials> {
        let files = authority::issue(&self.dir.path().join("ca"), name, "site-1").unwrap();
        let trust = vec![TrustDomainConfig {
            domain: DOMAIN.to_owned(),
            roots: self.authority.certificate.clone(),
            crls: vec![self.authority.crl.clone()],
            intermediates: None,
        }];
        let config = IdentityConfig { certificate: files.certificate, key: files.key, signing_key: files.signing_key, trust, post_quantum };
        Credentials::load(config).unwrap()
    }

    fn renew(&self, name: &str) {
        authority::renew(&self.dir.path().join("ca"), name).unwrap();
    }
}

fn id(name: &str) -> SpiffeId {
    format!("spiffe://{DOMAIN}/gateway/{name}").parse().unwrap()
}

fn config() -> TransportConfig {
    TransportConfig { lane_workers: 2, ..TransportConfig::new("127.0.0.1:0".parse().unwrap()) }
}

fn endpoint(credentials: &Arc<Credentials>) -> Endpoint {
    Endpoint::bind(config(), Arc::clone(credentials)).unwrap()
}

/// A source `gw-a` and a destination `gw-b`, with the session that `gw-a` opened.
struct Pair {
    fleet: Fleet,
    credentials: Arc<Credentials>,
    source: Endpoint,
    destination: Endpoint,
    ours: Session,
    theirs: Session,
}

impl Pair {
    async fn new(config: TransportConfig) -> Self {
        Self::through(config, |address| address).await
    }

    /// As `new`, but the source connects to what `path` makes of the destination's address.
    async fn through(config: TransportConfig, path: impl FnOnce(SocketAddr) -> SocketAddr) -> Self {
        let fleet = Fleet::new();
        let credentials = fleet.gateway("gw-a");
        let source = Endpoint::bind(config.clone(), Arc::clone(&credentials)).unwrap();
        let destination = Endpoint::bind(config, fleet.gateway("gw-b")).unwrap();
        let address = path(destination.local_address());
        let (ours, theirs) = join_up(&source, &destination, address).await;
        Self { fleet, credentials, source, destination, ours, theirs }
    }

    async fn refusal(&self) -> Refused {
        refusal(&self.destination).await
    }
}

async fn join_up(source: &Endpoint, destination: &Endpoint, address: SocketAddr) -> (Session, Session) {
    let connect = async {
        let session = source.connect(address, &id("gw-b")).await.unwrap();
        session.send(&Message::Ping).await.unwrap();
        session
    };
    let accept = async {
        let session = destination.accept().await.unwrap().unwrap();
        assert_eq!(session.receive().await.unwrap(), Message::Ping);
        session
    };
    within(async { tokio::join!(connect, accept) }).await
}

async fn refusal(endpoint: &Endpoint) -> Refused {
    within(endpoint.accept()).await.unwrap().unwrap_err()
}

/// A hang is a failure, not a stuck build.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("the test hangs")
}
