//! A question to an answer.

use std::fmt;

use cedar_policy::{Context, Decision, Effect, EntityUid, Response};
use serde_json::{Value, json};

use crate::limits;
use crate::policy::bundle::BundleStamp;
use crate::policy::entities::{Entities, Known, uid};
use crate::policy::errors::printable;
use crate::policy::facts::{MigrationContext, RequestContext, ResolveContext, Stream};
use crate::policy::fixtures::adjust;
use crate::policy::index::Index;
use crate::policy::load::PolicySet;
use crate::policy::obligations::Obligations;
use crate::policy::permit::{Accept, Action, Commit, Permit, Release, Request, Resolve};
use crate::policy::reads::Reads;
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

    fn now_unix_ms(&self) -> i64 {
        match self {
            Self::Request(_, context) => context.now_unix_ms,
            Self::Release(_, context) | Self::Accept(_, context) | Self::Commit(_, context) => context.now_unix_ms,
            Self::Resolve(_, context) => context.now_unix_ms,
        }
    }

    /// The session's key exchange, once there is a session.
    fn key_exchange(&self) -> Option<&str> {
        match self {
            Self::Release(_, context) | Self::Accept(_, context) | Self::Commit(_, context) => Some(&context.channel.kx),
            Self::Request(..) | Self::Resolve(..) => None,
        }
    }

    /// The circumstances that are read, with these terms of the stream.
    pub(super) fn context(&self, stream: Option<&Stream>, reads: Reads) -> Result<Context, String> {
        match self {
            Self::Request(_, context) => context.context(stream.unwrap_or(&context.stream), reads),
            Self::Release(_, context) | Self::Accept(_, context) | Self::Commit(_, context) => {
                context.context(stream.unwrap_or(&context.stream), reads)
            }
            Self::Resolve(_, context) => context.context(reads),
        }
    }

    /// The circumstances as `tests.json` has them.
    fn context_value(&self) -> serde_json::Result<Value> {
        match self {
            Self::Request(_, context) => serde_json::to_value(context),
            Self::Release(_, context) | Self::Accept(_, context) | Self::Commit(_, context) => serde_json::to_value(context),
            Self::Resolve(_, context) => serde_json::to_value(context),
        }
    }

    pub(super) fn principal_uid(&self) -> Result<EntityUid, String> {
        let id = self.principal();
        match self {
            Self::Request(..) | Self::Resolve(..) if id.is_empty() || id.len() > limits::OPERATOR_ID_BYTES_MAX => {
                Err(format!("an operator's name has 1–{} bytes, got `{}`", limits::OPERATOR_ID_BYTES_MAX, id.len()))
            }
            Self::Request(..) | Self::Resolve(..) => uid("Operator", id),
            Self::Release(..) | Self::Accept(..) | Self::Commit(..) => uid("Gateway", id),
        }
    }

    /// The principal, when the configuration does not list it.
    fn unlisted_principal(&self) -> Result<Known, String> {
        match self {
            Self::Request(operator, _) | Self::Resolve(operator, _) => Known::unlisted_operator(operator),
            Self::Release(peer, _) | Self::Accept(peer, _) | Self::Commit(peer, _) => Known::unlisted_gateway(peer),
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
    /// What the permits that matched ask of the stream.
    pub obligations: Obligations,
    /// Why, for people.
    pub why: String,
    /// Digest of the policy set.
    pub set_digest: [u8; 32],
}

/// A decision and the policies that determined it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) allowed: bool,
    pub(super) ids: Vec<String>,
    pub(super) errors: Vec<EvaluationFailure>,
    /// What the permits that matched ask of the stream.
    pub(super) obligations: Obligations,
    /// The terms that were judged, where there is a stream.
    pub(super) stream: Option<Stream>,
    /// What is asked of the stream and not so.
    pub(super) unmet: Option<String>,
}

/// What about a stream may still be changed to do what permits ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Adjust {
    /// All that is ours: nothing was offered yet.
    Terms,
    /// The number of lanes: a destination grants them.
    Lanes,
    Nothing,
}

impl PolicySet {
    /// May this operator ask to move this VM? The terms that the permit has are the strictest that permits ask for.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_request(&self, operator: &str, vm: VmUuid, context: &RequestContext) -> Result<Permit<Request>, Denial> {
        self.ask(vm, &Question::Request(operator, context), Adjust::Terms)
    }

    /// May this verified peer have the VM? Asked by the source before it offers anything; the permit's terms are to be offered.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_release(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Release>, Denial> {
        self.ask(vm, &Question::Release(peer, context), Adjust::Terms)
    }

    /// The same about a VM that was offered with these terms: they must do as they are.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_release_again(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Release>, Denial> {
        self.ask(vm, &Question::Release(peer, context), Adjust::Nothing)
    }

    /// May this verified peer give the VM? Asked by the destination, which may still grant fewer lanes: the permit says how many.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_accept(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Accept>, Denial> {
        self.ask(vm, &Question::Accept(peer, context), Adjust::Lanes)
    }

    /// May the switch happen now, with this peer? Asked by both sides, about each other.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_commit(&self, peer: &SpiffeId, vm: VmUuid, context: &MigrationContext) -> Result<Permit<Commit>, Denial> {
        self.ask(vm, &Question::Commit(peer, context), Adjust::Nothing)
    }

    /// May this operator decide the fate of a VM in doubt?
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn ask_resolve(&self, operator: &str, vm: VmUuid, context: &ResolveContext) -> Result<Permit<Resolve>, Denial> {
        self.ask(vm, &Question::Resolve(operator, context), Adjust::Nothing)
    }

    fn ask<A: Action>(&self, vm: VmUuid, question: &Question<'_>, adjust: Adjust) -> Result<Permit<A>, Denial> {
        let answer = self.settle(vm, question, adjust);
        let principal = question.principal();
        if answer.allowed && question.action() == A::NAME {
            let Answer { ids, stream, obligations, .. } = answer;
            return Ok(Permit::new(ids, self.digest(), principal.to_owned(), vm, stream, obligations));
        }
        let why = why(&answer).into();
        let Answer { ids, errors, unmet, .. } = answer;
        // With errors Cedar may name the permits that would have let it pass, and so do obligations that are not met.
        let policy_ids = if unmet.is_some() || !errors.is_empty() { self.forbids(&ids) } else { ids };
        let set_digest = Box::new(self.digest());
        Err(Denial { action: question.action(), principal: principal.into(), vm, policy_ids, errors, why, set_digest })
    }

    /// The answer to a question about the stream as permits want it, as far as that can still be changed.
    pub(super) fn settle(&self, vm: VmUuid, question: &Question<'_>, adjust: Adjust) -> Answer {
        let mut stream = question.stream().cloned();
        if let (Some(permits), Some(wanted)) = (&self.checked.permits, &mut stream) {
            // A change may make another permit match. Terms only get stricter, so this ends; what has not ended is not met below.
            for _ in 0..TIGHTENINGS_MAX {
                let matching = self.answer(vm, question, Some(wanted), permits);
                let obligations = self.obligations(&matching.ids);
                let next = match adjust {
                    Adjust::Terms => obligations.tighten(wanted),
                    Adjust::Lanes => obligations.fewer_lanes(wanted.clone()),
                    Adjust::Nothing => break,
                };
                if next == *wanted {
                    break;
                }
                *wanted = next;
            }
        }
        let mut answer = self.answer(vm, question, stream.as_ref(), &self.checked.index);
        if answer.allowed {
            answer.obligations = self.obligations(&answer.ids);
            answer.unmet = stream.as_ref().and_then(|stream| answer.obligations.unmet(stream, question.key_exchange()));
            answer.allowed = answer.unmet.is_none();
        }
        answer.stream = stream;
        answer
    }

    fn obligations(&self, ids: &[String]) -> Obligations {
        let mut all = Obligations::default();
        for own in ids.iter().filter_map(|id| self.checked.obligations.get(id)) {
            all.merge(own);
        }
        all
    }

    /// Everything that this question was answered from, in the form of `tests.json`: it can be asked again, of other policies.
    /// None when a fact has no form.
    #[must_use]
    pub fn facts(&self, vm: VmUuid, question: &Question<'_>) -> Option<Value> {
        let uids: Vec<EntityUid> = [question.principal_uid(), uid("Vm", &vm.to_string())].into_iter().flatten().collect();
        let entities: Entities = self.known.described(&uids);
        Some(json!({ "context": question.context_value().ok()?, "entities": serde_json::to_value(entities).ok()? }))
    }

    /// The answer by Cedar's own search through all policies, with all circumstances and all entities: what index and slices have to
    /// come to.
    #[cfg(test)]
    pub(super) fn ask_all(&self, vm: VmUuid, question: &Question<'_>) -> Result<Answer, String> {
        let (principal, resource) = (question.principal_uid()?, uid("Vm", &vm.to_string())?);
        let mut unlisted = Vec::new();
        if !self.known.has(&principal) {
            unlisted.push(question.unlisted_principal()?.entity().clone());
        }
        if !self.known.has(&resource) {
            unlisted.push(Known::unlisted_vm(vm)?.entity().clone());
        }
        let entities = cedar_policy::Entities::clone(&self.known.all).add_entities(unlisted, None).map_err(|error| error.to_string())?;
        let (action, context) = (uid("Action", question.action())?, question.context(None, Reads::ALL)?);
        let request = cedar_policy::Request::new(principal, action, resource, context, None).map_err(|error| error.to_string())?;
        Ok(judge(&self.checked.authorizer.is_authorized(&request, &self.checked.policies, &entities)))
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
        let adjust = adjust(question);
        let answer = self.settle(vm, question, adjust);
        let mut matched = Vec::new();
        for policy in self.checked.policies.policies() {
            let id: &str = policy.id().as_ref();
            let alone = Index::new([policy].into_iter(), &[question.action()]);
            if !self.answer(vm, question, answer.stream.as_ref(), &alone).ids.is_empty() {
                let place = self.checked.places.get(id).map(|place| (place.file.clone(), place.line, place.column));
                matched.push(MatchedPolicy {
                    id: id.to_owned(),
                    permits: policy.effect() == Effect::Permit,
                    place: place.unwrap_or_default(),
                });
            }
        }
        matched.sort_by(|a, b| a.id.cmp(&b.id));
        let known = |uid: Result<EntityUid, String>| uid.is_ok_and(|uid| self.known.has(&uid));
        let permits: Vec<String> = matched.iter().filter(|policy| policy.permits).map(|policy| policy.id.clone()).collect();
        Explanation {
            action: question.action(),
            principal: question.principal().to_owned(),
            principal_known: known(question.principal_uid()),
            vm,
            vm_known: known(uid("Vm", &vm.to_string())),
            allowed: answer.allowed,
            matched,
            obligations: self.obligations(&permits),
            why: why(&answer),
            errors: answer.errors,
            set_digest: self.digest(),
        }
    }

    fn answer(&self, vm: VmUuid, question: &Question<'_>, stream: Option<&Stream>, policies: &Index) -> Answer {
        match self.evaluate(vm, question, stream, policies) {
            Ok(response) => judge(&response),
            Err(what) => {
                let errors = vec![EvaluationFailure { policy: None, what }];
                Answer { allowed: false, ids: Vec::new(), errors, obligations: Obligations::default(), stream: None, unmet: None }
            }
        }
    }

    fn evaluate(&self, vm: VmUuid, question: &Question<'_>, stream: Option<&Stream>, policies: &Index) -> Result<Response, String> {
        if let Some(valid) = self.valid.as_ref().filter(|valid| !valid.unix_ms.contains(&question.now_unix_ms())) {
            let BundleStamp { name, version, expires } = &valid.stamp;
            return Err(format!("policy bundle `{name}` version {version} is not valid now; it expires at `{expires}`"));
        }
        let (principal_uid, resource_uid) = (question.principal_uid()?, uid("Vm", &vm.to_string())?);
        let listed = self.known.get(&principal_uid).is_some() && self.known.get(&resource_uid).is_some();
        let (mut unlisted_principal, mut unlisted_resource) = (None, None);
        let principal = match self.known.get(&principal_uid) {
            Some(known) => known,
            None => unlisted_principal.insert(question.unlisted_principal()?),
        };
        let resource = match self.known.get(&resource_uid) {
            Some(known) => known,
            None => unlisted_resource.insert(Known::unlisted_vm(vm)?),
        };
        let (action, candidates) = (uid("Action", question.action())?, policies.candidates(question.action(), principal, resource));
        let context = question.context(stream, candidates.reads)?;
        // Its shape was compared with the schema when the set was loaded (`shapes.rs`).
        let request = cedar_policy::Request::new(principal_uid, action, resource_uid, context, None).map_err(|error| error.to_string())?;
        let ask = |entities: &cedar_policy::Entities| self.checked.authorizer.is_authorized(&request, &candidates.policies, entities);
        if listed {
            return Ok(ask(&self.known.all));
        }
        let both = [principal.entity().clone(), resource.entity().clone()];
        let entities = if self.checked.reads_others {
            cedar_policy::Entities::clone(&self.known.all).add_entities(both, None)
        } else {
            // All others together may be many thousands.
            cedar_policy::Entities::from_entities(both, None)
        };
        Ok(ask(&entities.map_err(|error| error.to_string())?))
    }
}

/// How often terms may be made stricter for one question; each time at least one of five gets so.
const TIGHTENINGS_MAX: usize = 6;

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
    Answer { allowed, ids, errors, obligations: Obligations::default(), stream: None, unmet: None }
}

pub(super) fn why(answer: &Answer) -> String {
    let names = || answer.ids.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ");
    match answer.errors.first() {
        Some(error) => error.to_string(),
        None if answer.allowed => format!("permitted by {}", names()),
        None if answer.unmet.is_some() => format!("{} asks for {}", names(), answer.unmet.as_deref().unwrap_or_default()),
        None if answer.ids.is_empty() => "no policy permits".to_owned(),
        None => format!("forbidden by {}", names()),
    }
}
