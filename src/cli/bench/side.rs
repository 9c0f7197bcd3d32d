//! One gateway of a benchmark: identity, journal, audit log and UDP port, without the daemon around them.

use std::fs::DirBuilder;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::rand::{SecureRandom, SystemRandom};
use tokio::runtime::Runtime;

use crate::audit::AuditLog;
use crate::engine::{Ahead, EngineError, Evidence, NoArbiter};
use crate::gateway;
use crate::identity::authority;
use crate::identity::{Credentials, IdentityConfig, IdentityError, PostQuantum, TrustDomainConfig};
use crate::journal::Journal;
use crate::telemetry::{ErrorClass, Problem, chain};
use crate::transport::{Endpoint, TransportConfig, TransportError};
use crate::types::{MigrationId, SpiffeId};
use crate::wire::Hello;

const TRUST_DOMAIN: &str = "bench.sealane";
/// Names of the two gateways in their authority.
pub(super) const SOURCE: &str = "source";
pub(super) const DESTINATION: &str = "destination";

/// A directory that goes when the bench does: it holds journals, audit logs and keys.
pub(super) struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is the temporary directory's to remove.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Scratch {
    pub(super) fn new() -> Result<Self, Problem> {
        let name: String = random::<8>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = std::env::temp_dir().join(format!("sealane-bench-{name}"));
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| Problem::new(ErrorClass::Local, format!("cannot make directory `{}`: {error}", path.display())))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

pub(super) fn random<const N: usize>() -> Result<[u8; N], Problem> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| Problem::new(ErrorClass::Local, "the system's random numbers cannot be read"))?;
    Ok(bytes)
}

pub(super) fn local(what: &str, error: &dyn std::error::Error) -> Problem {
    Problem::new(ErrorClass::Local, format!("{what}: {}", chain(error)))
}

/// A failure of the engine, to be told.
pub(super) fn told(error: &EngineError) -> Problem {
    Problem::new(error.class(), chain(error))
}

pub(super) fn lost(source: TransportError) -> EngineError {
    EngineError::Transport { migration: MigrationId([0; 16]), source }
}

/// Makes an authority in `directory` and issues both gateways' certificates.
pub(super) fn make_authority(directory: &Path) -> Result<(), Problem> {
    let failed = |error: IdentityError| Problem::new(error.class(), format!("certificate authority: {}", chain(&error)));
    authority::init(directory, TRUST_DOMAIN).map_err(failed)?;
    for name in [SOURCE, DESTINATION] {
        authority::issue(directory, name, "bench").map_err(failed)?;
    }
    Ok(())
}

/// The identity of gateway `name` from a directory that holds an authority, or a copy of what such a directory issued.
pub(super) fn identity_in(directory: &Path, name: &str) -> Result<Arc<Credentials>, Problem> {
    let failed = |error: IdentityError| {
        let directory = directory.display();
        let hint = format!(
            "`sealane bench listen --pki {directory}` makes such a directory; or: sealane pki issue {directory} --gateway {name} --site bench"
        );
        // What was named does not fit: as for a configuration.
        Problem::new(ErrorClass::Misuse, format!("identity of gateway `{name}`: {}", chain(&error))).with_hint(hint)
    };
    let file = |suffix: &str| directory.join(format!("{name}{suffix}"));
    let certificate = file("-cert.pem");
    let described = authority::show(&certificate).map_err(failed)?;
    let uri = described.iter().flat_map(|object| &object.lines).find(|(label, _)| *label == "uri");
    let own: SpiffeId = uri.and_then(|(_, uri)| uri.parse().ok()).ok_or_else(|| {
        let expected = "expected a certificate with a SPIFFE ID, as `sealane pki issue` makes it";
        Problem::new(ErrorClass::Misuse, format!("certificate `{}`: {expected}", certificate.display()))
    })?;
    let authority = authority::files_of(directory);
    let trust = vec![TrustDomainConfig {
        domain: own.trust_domain().to_owned(),
        roots: authority.certificate,
        crls: vec![authority.crl],
        intermediates: None,
    }];
    let config = IdentityConfig {
        certificate,
        key: file("-key.pem"),
        signing_key: file("-signing-key.pem"),
        trust,
        post_quantum: PostQuantum::default(),
    };
    Credentials::load(config).map_err(failed)
}

/// The identity that gateway `name` of the same authority proves.
pub(super) fn peer_of(credentials: &Credentials, name: &str) -> Result<SpiffeId, Problem> {
    let text = format!("spiffe://{}/gateway/{name}", credentials.own_id().trust_domain());
    text.parse().map_err(|_| Problem::new(ErrorClass::Bug, format!("`{text}` is no SPIFFE ID")))
}

/// One gateway: everything but the daemon around it.
pub(super) struct Side {
    pub(super) credentials: Arc<Credentials>,
    pub(super) evidence: Evidence,
    pub(super) endpoint: Endpoint,
    // Last, so that what it drives is gone before it.
    pub(super) runtime: Runtime,
}

impl Side {
    /// Gateway `name`, with its journal and audit log below `directory`, at `address`.
    pub(super) fn new(directory: &Path, name: &str, credentials: Arc<Credentials>, address: SocketAddr) -> Result<Self, Problem> {
        let failed = |what: &str| format!("{what} of gateway `{name}`");
        let own = directory.join(name);
        let journal = Journal::open(&own.join("state.redb")).map_err(|error| local(&failed("journal"), &error))?;
        let audit = AuditLog::open(&own.join("audit"), credentials.own_id().as_str(), gateway::audit_signer(&credentials))
            .map_err(|error| local(&failed("audit log"), &error))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .map_err(|error| local(&failed("runtime"), &error))?;
        let endpoint = {
            let _inside = runtime.enter();
            Endpoint::bind(TransportConfig::new(address), Arc::clone(&credentials)).map_err(|error| local(&failed("UDP port"), &error))?
        };
        let images = directory.join("images").into();
        let (journal, signer, arbiter) = (Arc::new(journal), credentials.signer(), Arc::new(NoArbiter));
        let evidence = Evidence { journal, audit, signer, images, arbiter, ahead: Ahead::default() };
        Ok(Self { credentials, evidence, endpoint, runtime })
    }

    pub(super) fn hello(&self) -> Hello {
        Hello::new(self.evidence.journal.incarnation(), self.credentials.signer().public_key())
    }
}

/// Ticks of a second in `/proc`: part of Linux' ABI.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time of this process until now, in user and kernel mode, ended threads included.
pub(super) fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name may have spaces and brackets; user and system time are the 12th and 13th fields behind it.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let ticks: u32 = after.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    f64::from(ticks) / TICKS_PER_SECOND
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_of_ended_threads_counts() {
        let before = cpu_seconds();
        let work = || (0..200_000_000_u64).fold(0, |sum: u64, number| std::hint::black_box(sum ^ number));
        std::thread::spawn(work).join().unwrap();
        assert!(cpu_seconds() > before);
    }
}
