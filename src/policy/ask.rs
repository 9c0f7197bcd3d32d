//! A question to an answer.

use std::fmt;

use cedar_policy::{Context, Decision, Effect, Entity, EntityUid, Response};

use crate::limits;
use crate::policy::entities::{uid, unknown_gateway, unknown_operator, unknown_vm};
use crate::policy::errors::printable;
use crate::policy::facts::{MigrationContext, RequestContext, ResolveContext, Stream};
use crate::policy::load::PolicySet;
use crate::policy::permit::{Accept, Action, Commit, Permit, Release, Request, Resolve};
use crate::types::{SpiffeId, VmUuid};

/// A question, without the VM that it is about.
#[derive(Debug, Clone, Copy)]
pub enum Question<'a> {
    /// May this operator ask for this move?
    Request(&'a str, &'a RequestContext),
    /// May this peer have the VM?
    Release(&'a SpiffeId, &'a MigrationContext),
    /// May this peer give the VM?
    Accept(&'a SpiffeId, &'a MigrationContext),
    /// May the switch with this peer happen?
    Commit(&'a SpiffeId, &'a MigrationContext),
    /// May this operator decide the fate of a VM in doubt?
    Resolve(&'a str, &'a ResolveContext),
}

impl Question<'_> {
    /// The action's name in the schema.
    #[must_use]
    pub fn action(&self) -> &'static str {
        match self {
            Self::Request(..) => Request::NAME,
            Self::Release(..) => Release::NAME,
            Self::Accept(..) => Accept::NAME,
            Self::Commit(..) => Commit::NAME,
            Self::Resolve(..) => Resolve::NAME,
        }
    }

    /// Who asks: a SPIFFE ID or an operator.
    #[must_use]
    pub fn principal(&self) -> &str {
        match self {
            Self::Request(operator, _) | Self::Resolve(operator, _) => operator,
            Self::Release(peer, _) | Self::Accept(peer, _) | Self::Commit(peer, _) => peer.as_str(),
        }
    }

    fn stream(&self) -> Option<&Stream> {
        match self {
            Self::Request(_, context) => Some(&context.stream),
            Self::Release(_, context) | Self::Accept(_, context) | Self::Commit(_, context) => Some(&context.stream),
            Self::Resolve(..) => None,
        }
    }

    fn context(&self) -> Result<Context, String> {
        match self {
            Self::Request(_, context) => context.context(),
            Self::Release(_, context) | Self::Accept(_, context) | Self::Commit(_, context) => context.context(),
            Self::Resolve(_, context) => context.context(),
        }
    }

    fn principal_uid(&self) -> Result<EntityUid, String> {
        let id = self.principal();
        match self {
            Self::Request(..) | Self::Resolve(..) if id.is_empty() || id.len() > limits::OPERATOR_ID_BYTES_MAX => {
                Err(format!("an operator's name has 1–{} bytes, got `{}`", limits::OPERATOR_ID_BYTES_MAX, id.len()))
            }
            Self::Request(..) | Self::Resolve(..) => uid("Operator", id),
            Self::Release(..) | Self::Accept(..) | Self::Commit(..) => uid("Gateway", id),
        }
    }

    /// The principal as an entity, when the configuration does not list it.
    fn unknown_principal(&self) -> Result<Entity, String> {
        match self {
            Self::Request(operator, _) | Self::Resolve(operator, _) => unknown_operator(operator),
            Self::Release(peer, _) | Self::Accept(peer, _) | Self::Commit(peer, _) => unknown_gateway(peer),
        }
    }
}

/// A policy that could not be evaluated, or a fact that does not fit the schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluationFailure {
    /// The policy's `@id`, if it was one.
    pub policy: Option<String>,
    /// What failed.
    pub what: String,
}

impl fmt::Display for EvaluationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.policy {
            Some(id) => write!(f, "policy `{id}` failed to evaluate: {}", printable(&self.what)),
            None => write!(f, "the question cannot be judged: {}", printable(&self.what)),
        }
    }
}

/// Policy said no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{action}` of VM `{vm}` denied to `{principal}`: {why}")]
pub struct Denial {
    /// The question's name in the schema.
    pub action: &'static str,
    /// Who asked.
    pub principal: Box<str>,
    /// The VM.
    pub vm: VmUuid,
    /// The `@id`s of forbids that matched, sorted.
    pub policy_ids: Vec<String>,
    /// What failed to evaluate.
    pub errors: Vec<EvaluationFailure>,
    /// Why, for people.
    pub why: Box<str>,
    /// Digest of the policy set that was asked.
    pub set_digest: Box<[u8; 32]>,
}

/// One policy that applies to the circumstances asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatchedPolicy {
    /// Its `@id`.
    pub id: String,
    /// Whether it permits; otherwise it forbids.
    pub permits: bool,
    /// File, line and column.
    pub place: (String, usize, usize),
}

/// How an answer came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The question's name in the schema.
    pub action: &'static str,
    /// Who asked.
    pub principal: String,
    /// Whether the configuration lists who asked.
    pub principal_known: bool,
    /// The VM.
    pub vm: VmUuid,
    /// Whether the configuration lists the VM.
    pub vm_known: bool,
    /// The answer.
    pub allowed: bool,
    /// Every policy that matched, permits that a forbid overruled included, in order of `@id`.
    pub matched: Vec<MatchedPolicy>,
    /// What failed to evaluate.
    pub errors: Vec<EvaluationFailure>,
    /// Why, for people.
    pub why: String,
    /// Digest of the policy set.
    pub set_digest: [u8; 32],
}

/// A decision and the policies that determined it.
pub(super) struct Answer {
    pub(super) allowed: bool,
    pub(super) ids: Vec<String>,
    pub(super) errors: Vec<EvaluationFailure>,
}

impl PolicySet {
    /// May this operator ask to move this VM?
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_request(&self, operator: &str, vm: VmUuid, context: &RequestContext) -> Result<Permit<Request>, Denial> {
        self.ask(vm, &Question::Request(operator, context))
    }

    /// May this verified peer have the VM? Asked by the source.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_release(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Release>, Denial> {
        self.ask(vm, &Question::Release(peer, context))
    }

    /// May this verified peer give the VM? Asked by the destination.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_accept(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Accept>, Denial> {
        self.ask(vm, &Question::Accept(peer, context))
    }

    /// May the switch happen now, with this peer? Asked by both sides, about each other.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_commit(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Commit>, Denial> {
        self.ask(vm, &Question::Commit(peer, context))
    }

    /// May this operator decide the fate of a VM in doubt?
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_resolve(&self, operator: &str, vm: VmUuid, context: &ResolveContext) -> Result<Permit<Resolve>, Denial> {
        self.ask(vm, &Question::Resolve(operator, context))
    }

    fn ask<A: Action>(&self, vm: VmUuid, question: &Question<'_>) -> Result<Permit<A>, Denial> {
        let answer = self.decide(vm, question);
        let principal = question.principal();
        if answer.allowed && question.action() == A::NAME {
            return Ok(Permit::new(answer.ids, self.digest(), principal.to_owned(), vm, question.stream().cloned()));
        }
        let why = why(&answer).into();
        let Answer { ids, errors, allowed } = answer;
        // With errors Cedar may name the permits that would have let it pass: they did not forbid.
        let policy_ids = if allowed || !errors.is_empty() { self.forbids(&ids) } else { ids };
        let set_digest = Box::new(self.digest());
        Err(Denial { action: question.action(), principal: principal.into(), vm, policy_ids, errors, why, set_digest })
    }

    fn forbids(&self, ids: &[String]) -> Vec<String> {
        ids.iter().filter(|id| self.effect(id) == Some(Effect::Forbid)).cloned().collect()
    }

    fn effect(&self, id: &str) -> Option<Effect> {
        Some(self.checked.policies.policy(&cedar_policy::PolicyId::new(id))?.effect())
    }

    /// The answer to a question and how it came about, policy by policy. For people; the gateway asks `ask_*`.
    #[must_use]
    pub fn explain(&self, vm: VmUuid, question: &Question<'_>) -> Explanation {
        let answer = self.decide(vm, question);
        let mut matched = Vec::new();
        for policy in self.checked.policies.policies() {
            let id: &str = policy.id().as_ref();
            let mut alone = cedar_policy::PolicySet::new();
            if alone.add(policy.clone()).is_ok() && !self.answer(vm, question, &alone).ids.is_empty() {
                let place = self.checked.places.get(id).map(|place| (place.file.clone(), place.line, place.column));
                matched.push(MatchedPolicy {
                    id: id.to_owned(),
                    permits: policy.effect() == Effect::Permit,
                    place: place.unwrap_or_default(),
                });
            }
        }
        matched.sort_by(|a, b| a.id.cmp(&b.id));
        let known = |uid: Result<EntityUid, String>| uid.is_ok_and(|uid| self.entities.get(&uid).is_some());
        Explanation {
            action: question.action(),
            principal: question.principal().to_owned(),
            principal_known: known(question.principal_uid()),
            vm,
            vm_known: known(uid("Vm", &vm.to_string())),
            allowed: answer.allowed,
            matched,
            why: why(&answer),
            errors: answer.errors,
            set_digest: self.digest(),
        }
    }

    pub(super) fn decide(&self, vm: VmUuid, question: &Question<'_>) -> Answer {
        self.answer(vm, question, &self.checked.policies)
    }

    fn answer(&self, vm: VmUuid, question: &Question<'_>, policies: &cedar_policy::PolicySet) -> Answer {
        match self.evaluate(vm, question, policies) {
            Ok(response) => judge(&response),
            Err(what) => Answer { allowed: false, ids: Vec::new(), errors: vec![EvaluationFailure { policy: None, what }] },
        }
    }

    fn evaluate(&self, vm: VmUuid, question: &Question<'_>, policies: &cedar_policy::PolicySet) -> Result<Response, String> {
        let principal = question.principal_uid()?;
        let resource = uid("Vm", &vm.to_string())?;
        let action = uid("Action", question.action())?;
        let mut unknown = Vec::new();
        if self.entities.get(&principal).is_none() {
            unknown.push(question.unknown_principal()?);
        }
        if self.entities.get(&resource).is_none() {
            unknown.push(unknown_vm(vm)?);
        }
        let schema = &self.checked.schema;
        let request = cedar_policy::Request::new(principal, action, resource, question.context()?, Some(schema))
            .map_err(|error| error.to_string())?;
        if unknown.is_empty() {
            return Ok(self.checked.authorizer.is_authorized(&request, policies, &self.entities));
        }
        let entities = cedar_policy::Entities::clone(&self.entities);
        let entities = entities.add_entities(unknown, Some(schema)).map_err(|error| error.to_string())?;
        Ok(self.checked.authorizer.is_authorized(&request, policies, &entities))
    }
}

/// INVARIANT(no-skipped-forbid), INVARIANT(default-deny): the only place where a yes comes from.
fn judge(response: &Response) -> Answer {
    let diagnostics = response.diagnostics();
    let mut ids: Vec<String> = diagnostics.reason().map(ToString::to_string).collect();
    ids.sort_unstable();
    let mut errors: Vec<_> = diagnostics
        .errors()
        .map(|error| {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(error) = error;
            EvaluationFailure { policy: Some(error.policy_id().to_string()), what: error.inner().to_string() }
        })
        .collect();
    errors.sort_by(|a, b| a.policy.cmp(&b.policy));
    let allowed = response.decision() == Decision::Allow && errors.is_empty() && !ids.is_empty();
    Answer { allowed, ids, errors }
}

pub(super) fn why(answer: &Answer) -> String {
    let names = || answer.ids.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ");
    match answer.errors.first() {
        Some(error) => error.to_string(),
        None if answer.allowed => format!("permitted by {}", names()),
        None if answer.ids.is_empty() => "no policy permits".to_owned(),
        None => format!("forbidden by {}", names()),
    }
}
