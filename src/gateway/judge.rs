//! Asks policy with the facts of this gateway, and records every answer before it is acted on.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;

use crate::audit::{AuditError, AuditLog, Entry, Event, Outcome};
use crate::config::Config;
use crate::engine::EngineError;
use crate::gateway::policies::stream;
use crate::policy::{
    self, Accept, Action, Channel, Denial, MigrationContext, Permit, PolicySet, Release, Request, RequestContext, Resolve, ResolveContext,
    Route,
};
use crate::telemetry::Problem;
use crate::transport::Session;
use crate::types::{MigrationId, Side, SpiffeId, VmName, VmUuid};
use crate::wire::{ErrorClass, StreamTerms};

/// Policy as this gateway asks it.
#[derive(Debug)]
pub(super) struct Judge {
    policies: ArcSwap<PolicySet>,
    config: Arc<Config>,
    audit: AuditLog,
}

/// A question that is about one migration.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) migration: MigrationId,
    pub(super) vm: VmName,
    pub(super) uuid: VmUuid,
    pub(super) terms: StreamTerms,
    pub(super) memory_bytes: u64,
    /// Which end this gateway is.
    pub(super) side: Side,
}

/// Why there is no permit.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPermit {
    #[error("VM `{vm}` is not permitted to move")]
    Denied {
        /// Policies speak of its UUID only.
        vm: VmName,
        /// Policy's words.
        #[source]
        denial: Denial,
    },
    #[error("the decision cannot be recorded")]
    Audit(#[from] AuditError),
    #[error("the peer's certificate is no longer accepted")]
    Identity(#[source] crate::transport::TransportError),
}

impl NoPermit {
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::Denied { .. } => ErrorClass::Denied,
            Self::Audit(_) => ErrorClass::Local,
            Self::Identity(error) => error.class(),
        }
    }

    pub(super) fn problem(&self) -> Problem {
        let problem = Problem::new(self.class(), crate::telemetry::chain(self));
        match self {
            Self::Denied { .. } => problem.with_hint("`sealane policy explain` shows which policy decided"),
            Self::Audit(_) => problem.with_hint("nothing is moved without evidence; see the audit directory's disk"),
            Self::Identity(_) => problem.with_hint("the certificate or its CRL changed since the session began"),
        }
    }
}

impl NoPermit {
    /// The same at the moment of the switch.
    pub(super) fn at_commit(self, case: &Case) -> EngineError {
        match self {
            Self::Denied { vm, denial } => EngineError::Denied { vm, why: crate::telemetry::chain(&denial) },
            Self::Audit(error) => EngineError::Audit(error),
            Self::Identity(source) => EngineError::Transport { migration: case.migration, source },
        }
    }
}

impl Judge {
    pub(super) fn new(config: Arc<Config>, policies: PolicySet, audit: AuditLog) -> Self {
        Self { policies: ArcSwap::from_pointee(policies), config, audit }
    }

    pub(super) fn replace(&self, policies: PolicySet) {
        self.policies.store(Arc::new(policies));
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        self.policies.load().digest()
    }

    /// May this operator ask for this move?
    pub(super) fn request(&self, operator: &str, case: &Case, route: Route) -> Result<Permit<Request>, NoPermit> {
        let context = RequestContext { now_unix_ms: now_ms(), route, stream: stream(&case.terms), change_ticket: None };
        let answer = self.policies.load().ask_request(operator, case.uuid, &context);
        self.recorded(case, operator, None, answer)
    }

    /// May this peer have the VM?
    pub(super) fn release(&self, case: &Case, session: &Session) -> Result<Permit<Release>, NoPermit> {
        let peer = session.peer().spiffe();
        let context = self.context(case, session);
        let answer = self.policies.load().ask_release(peer, case.uuid, &context);
        self.recorded(case, peer.as_str(), Some(&context.channel), answer)
    }

    /// May this peer give us the VM?
    pub(super) fn accept(&self, case: &Case, session: &Session) -> Result<Permit<Accept>, NoPermit> {
        let peer = session.peer().spiffe();
        let context = self.context(case, session);
        let answer = self.policies.load().ask_accept(peer, case.uuid, &context);
        self.recorded(case, peer.as_str(), Some(&context.channel), answer)
    }

    /// Is all of that still so, now that the switch is next?
    pub(super) fn commit(&self, case: &Case, session: &Session) -> Result<Permit<policy::Commit>, NoPermit> {
        session.verify_again().map_err(NoPermit::Identity)?;
        let peer = session.peer().spiffe();
        let context = self.context(case, session);
        let answer = self.policies.load().ask_commit(peer, case.uuid, &context);
        self.recorded(case, peer.as_str(), Some(&context.channel), answer)
    }

    /// May operators decide this about a VM in doubt?
    pub(super) fn resolve(
        &self,
        proposer: &str,
        case: &Case,
        approvers: Vec<String>,
        fence_evidence: bool,
    ) -> Result<Permit<Resolve>, NoPermit> {
        let context = ResolveContext { now_unix_ms: now_ms(), approvers, fence_evidence };
        let answer = self.policies.load().ask_resolve(proposer, case.uuid, &context);
        self.recorded(case, proposer, None, answer)
    }

    fn recorded<A: Action>(
        &self,
        case: &Case,
        principal: &str,
        channel: Option<&Channel>,
        answer: Result<Permit<A>, Denial>,
    ) -> Result<Permit<A>, NoPermit> {
        let mut entry = Entry::new(Event::Decision).outcome(if answer.is_ok() { Outcome::Allow } else { Outcome::Deny });
        entry.vm = Some(case.vm.clone());
        entry.uuid = Some(case.uuid);
        entry.migration = Some(case.migration);
        entry.peer = Some(principal.to_owned());
        entry.detail.insert("action".into(), A::NAME.into());
        if let Some(channel) = channel {
            entry.detail.insert("key_exchange".into(), channel.kx.clone().into());
            entry.detail.insert("cipher_suite".into(), channel.suite.clone().into());
        }
        let (ids, digest) = match &answer {
            Ok(permit) => (permit.policy_ids().to_vec(), *permit.set_digest()),
            Err(denial) => {
                entry.detail.insert("why".into(), denial.why.to_string().into());
                (denial.policy_ids.to_vec(), *denial.set_digest)
            }
        };
        entry.detail.insert("policy_ids".into(), ids.into());
        entry.detail.insert("policy_digest".into(), hex(&digest).into());
        self.audit.record(&entry)?;
        answer.map_err(|denial| NoPermit::Denied { vm: case.vm.clone(), denial })
    }

    fn context(&self, case: &Case, session: &Session) -> MigrationContext {
        let peer = session.peer();
        let facts = session.channel();
        let own_site = self.config.gateway.site.to_string();
        let peer_site = self.site_of(peer.spiffe());
        let (src_site, dst_site) = match case.side {
            Side::Source => (own_site, peer_site),
            Side::Destination => (peer_site, own_site),
        };
        MigrationContext {
            now_unix_ms: now_ms(),
            route: Route { src_site, dst_site, peer_ip: facts.peer_ip },
            channel: Channel {
                tls: facts.tls.to_owned(),
                kx: facts.key_exchange,
                suite: facts.cipher_suite,
                // A session exists only while every chain element was checked against a CRL that is fresh.
                crl_fresh: session.verify_again().is_ok(),
                peer_cert_days_left: peer.days_left(SystemTime::now()),
            },
            stream: stream(&case.terms),
            memory_mib: case.memory_bytes >> 20,
        }
    }

    /// The site of a peer by our own configuration: what its certificate claims of itself is not asked.
    fn site_of(&self, spiffe: &SpiffeId) -> String {
        self.config.peer_of(spiffe).map(|peer| peer.site.to_string()).unwrap_or_default()
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
