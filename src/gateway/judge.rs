//! Asks policy with the facts of this gateway, and records every answer before it is acted on.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;

use crate::audit::{AuditError, AuditLog, Entry, Event, Outcome};
use crate::config::{Config, Vm};
use crate::engine::EngineError;
use crate::gateway::policies::{obliged, stream};
use crate::hypervisor::{Disk, Machine};
use crate::limits;
use crate::policy::{
    self, Accept, Action, Channel, Denial, MigrationContext, Permit, PolicySet, Question, Release, Request, RequestContext, Resolve,
    ResolveContext, Route,
};
use crate::telemetry::Problem;
use crate::transport::Session;
use crate::types::{MigrationId, Mode, Side, SpiffeId, VmName, VmUuid};
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
    /// How its memory moves.
    pub(super) mode: Mode,
    pub(super) memory_bytes: u64,
    pub(super) disks: DisksAsked,
    /// Most that policy lets the source send, in bytes a second.
    pub(super) bandwidth_max: Option<u64>,
    /// Which end this gateway is.
    pub(super) side: Side,
}

/// What is to move of disks. How many and how long they are is known once the guest was seen, at the destination from the offer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DisksAsked {
    pub(super) storage: policy::Storage,
    count: u32,
    bytes: u64,
}

impl DisksAsked {
    pub(super) fn of(storage: policy::Storage, disks: &[Disk]) -> Self {
        let bytes = disks.iter().map(|disk| disk.bytes).fold(0, u64::saturating_add);
        Self { storage, count: u32::try_from(disks.len()).unwrap_or(u32::MAX), bytes }
    }
}

impl From<&Machine> for DisksAsked {
    fn from(machine: &Machine) -> Self {
        let storage = match machine {
            Machine { disks_only: true, .. } => policy::Storage::Only,
            Machine { disks, .. } if disks.is_empty() => policy::Storage::None,
            Machine { .. } => policy::Storage::All,
        };
        Self::of(storage, &machine.disks)
    }
}

impl Case {
    /// A VM that leaves, before its guest was seen.
    pub(super) fn leaving(migration: MigrationId, vm: &Vm, terms: StreamTerms, mode: Mode, disks: DisksAsked) -> Self {
        let (name, side) = (vm.name.clone(), Side::Source);
        Self { migration, vm: name, uuid: vm.uuid, terms, mode, memory_bytes: 0, disks, bandwidth_max: None, side }
    }

    /// Takes over what a permit obliges to, before anything is offered.
    pub(super) fn oblige<A: Action>(&mut self, permit: &Permit<A>) {
        if let Some(stream) = permit.stream() {
            self.terms = obliged(&self.terms, stream);
            if stream.mode == policy::Mode::Precopy {
                self.mode = Mode::Precopy;
            }
        }
        self.bandwidth_max = self.bandwidth_max.into_iter().chain(permit.obligations().bandwidth_max()).min();
    }
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
            Self::Audit(error) => problem.with_hint(crate::gateway::report::without_evidence(error)),
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

    /// The policies in force.
    pub(super) fn policies(&self) -> Arc<PolicySet> {
        self.policies.load_full()
    }

    /// May this operator ask for this move?
    pub(super) fn request(&self, operator: &str, case: &Case, route: Route) -> Result<Permit<Request>, NoPermit> {
        let stream = stream(&case.terms, case.mode, case.disks.storage);
        let context = RequestContext { now_unix_ms: now_ms(), route, stream, change_ticket: None };
        let policies = self.policies.load_full();
        let answer = policies.ask_request(operator, case.uuid, &context);
        self.recorded(case, &policies, &Question::Request(operator, &context), answer)
    }

    /// May this peer have the VM?
    pub(super) fn release(&self, case: &Case, session: &Session) -> Result<Permit<Release>, NoPermit> {
        let (peer, context, policies) =
            (session.peer().spiffe(), self.context(case, session, session.verify_again().is_ok()), self.policies.load_full());
        let answer = policies.ask_release(peer, case.uuid, &context);
        self.recorded(case, &policies, &Question::Release(peer, &context), answer)
    }

    /// May this peer still have the VM, as it was offered?
    pub(super) fn release_again(&self, case: &Case, session: &Session) -> Result<Permit<Release>, NoPermit> {
        let (peer, context, policies) =
            (session.peer().spiffe(), self.context(case, session, session.verify_again().is_ok()), self.policies.load_full());
        let answer = policies.ask_release_again(peer, case.uuid, &context);
        let answer = within_limit(case, answer);
        self.recorded(case, &policies, &Question::Release(peer, &context), answer)
    }

    /// May this peer give us the VM?
    pub(super) fn accept(&self, case: &Case, session: &Session) -> Result<Permit<Accept>, NoPermit> {
        let (peer, context, policies) =
            (session.peer().spiffe(), self.context(case, session, session.verify_again().is_ok()), self.policies.load_full());
        let answer = policies.ask_accept(peer, case.uuid, &context);
        self.recorded(case, &policies, &Question::Accept(peer, &context), answer)
    }

    /// Is all of that still so, now that the switch is next?
    pub(super) fn commit(&self, case: &Case, session: &Session) -> Result<Permit<policy::Commit>, NoPermit> {
        session.verify_again().map_err(NoPermit::Identity)?;
        let (peer, context, policies) = (session.peer().spiffe(), self.context(case, session, true), self.policies.load_full());
        let answer = policies.ask_commit(peer, case.uuid, &context);
        let answer = within_limit(case, answer);
        self.recorded(case, &policies, &Question::Commit(peer, &context), answer)
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
        let policies = self.policies.load_full();
        let answer = policies.ask_resolve(proposer, case.uuid, &context);
        self.recorded(case, &policies, &Question::Resolve(proposer, &context), answer)
    }

    /// The answer, once it is in the audit log with everything that it was made from.
    fn recorded<A: Action>(
        &self,
        case: &Case,
        policies: &PolicySet,
        question: &Question<'_>,
        answer: Result<Permit<A>, Denial>,
    ) -> Result<Permit<A>, NoPermit> {
        let mut entry = Entry::new(Event::Decision).outcome(if answer.is_ok() { Outcome::Allow } else { Outcome::Deny });
        entry.vm = Some(case.vm.clone());
        entry.uuid = Some(case.uuid);
        entry.migration = Some(case.migration);
        entry.peer = Some(question.principal().to_owned());
        entry.detail.insert("action".into(), A::NAME.into());
        if let Question::Release(_, context) | Question::Accept(_, context) | Question::Commit(_, context) = question {
            entry.detail.insert("key_exchange".into(), context.channel.kx.clone().into());
            entry.detail.insert("cipher_suite".into(), context.channel.suite.clone().into());
        }
        let (ids, digest) = match &answer {
            Ok(permit) => {
                let obligations = permit.obligations().to_string();
                if !obligations.is_empty() {
                    entry.detail.insert("obligations".into(), obligations.into());
                }
                (permit.policy_ids().to_vec(), *permit.set_digest())
            }
            Err(denial) => {
                entry.detail.insert("why".into(), denial.why.to_string().into());
                (denial.policy_ids.to_vec(), *denial.set_digest)
            }
        };
        entry.detail.insert("policy_ids".into(), ids.into());
        entry.detail.insert("policy_digest".into(), hex(&digest).into());
        if let Some(bundle) = policies.bundle() {
            entry.detail.insert("bundle_version".into(), bundle.version.into());
        }
        // With them `policy diff` can ask other policies the same. Labels without end must not keep a decision out of the log.
        let facts = policies.facts(case.uuid, question).filter(|facts| facts.to_string().len() <= limits::AUDIT_FACTS_BYTES_MAX);
        if let Some(facts) = facts {
            entry.detail.insert("facts".into(), facts);
        }
        self.audit.record(&entry)?;
        answer.map_err(|denial| NoPermit::Denied { vm: case.vm.clone(), denial })
    }

    /// `crl_fresh`: whether every element of the peer's chain was checked against a CRL that is fresh, a moment ago. That takes a third
    /// of a millisecond, so it is done once for each question.
    fn context(&self, case: &Case, session: &Session, crl_fresh: bool) -> MigrationContext {
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
                crl_fresh,
                peer_cert_days_left: peer.days_left(SystemTime::now()),
            },
            stream: stream(&case.terms, case.mode, case.disks.storage),
            memory_mib: case.memory_bytes >> 20,
            disk_count: case.disks.count,
            disk_mib: case.disks.bytes.div_ceil(1 << 20),
        }
    }

    /// The site of a peer by our own configuration: what its certificate claims of itself is not asked.
    fn site_of(&self, spiffe: &SpiffeId) -> String {
        self.config.peer_of(spiffe).map(|peer| peer.site.to_string()).unwrap_or_default()
    }
}

/// What is sent has its limit since the offer was accepted: a permit that asks for less comes too late.
fn within_limit<A: Action>(case: &Case, answer: Result<Permit<A>, Denial>) -> Result<Permit<A>, Denial> {
    let permit = answer?;
    let most = permit.obligations().bandwidth_max();
    let Some(most) = most.filter(|most| case.bandwidth_max.is_none_or(|limit| limit > *most)) else { return Ok(permit) };
    let (ids, limit) = (permit.policy_ids().join("`, `"), case.bandwidth_max.map_or("none".to_owned(), |limit| limit.to_string()));
    Err(Denial {
        action: permit.action(),
        principal: permit.principal().into(),
        vm: permit.vm(),
        policy_ids: Vec::new(),
        errors: Vec::new(),
        why: format!("`{ids}` asks for at most {most} bytes/s, and the limit of this migration is {limit}").into(),
        set_digest: Box::new(*permit.set_digest()),
    })
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
