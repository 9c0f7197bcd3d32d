//! Which policies can match a question at all, so that Cedar is not asked about the others.
//!
//! Each policy lies in one bucket for each of its actions: under the entity that its scope wants, or under what its condition wants
//! an attribute of principal or resource to be. A question takes the buckets of its principal and resource. What is left out is
//! false for this question by that one test. INVARIANT(no-skipped-forbid): a policy that could fail to evaluate is left out for no
//! condition, only for its scope. What its bucket says of a policy's scope is not asked again (`bare`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cedar_policy::pst::{BinaryOp, Clause, Expr, Literal};
use cedar_policy::{ActionConstraint, EntityUid, Policy, PolicySet, PrincipalConstraint, ResourceConstraint};
use serde_json::json;

use crate::limits;
use crate::policy::entities::Known;
use crate::policy::lint::{clauses, never_fails, parts, path};
use crate::policy::reads::Reads;

/// What has to be so for a policy to match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Need {
    /// Nothing that is known here.
    Nothing,
    /// Principal or resource is this, or in it.
    Within(EntityUid),
    /// An attribute of the principal.
    OfPrincipal(String, String),
    /// An attribute of the resource.
    OfResource(String, String),
}

/// Policies by what they need, for one action.
type Buckets = HashMap<Need, Vec<u32>>;

#[derive(Debug)]
pub(super) struct Index {
    policies: Vec<(Policy, Reads)>,
    by_action: HashMap<String, Buckets>,
    /// Sets that were put together before: questions about VMs of one group take the same.
    sets: Mutex<HashMap<Vec<u32>, Arc<Candidates>>>,
}

/// Policies that are asked, and what they read of the circumstances.
#[derive(Debug)]
pub(super) struct Candidates {
    pub(super) policies: PolicySet,
    pub(super) reads: Reads,
}

impl Index {
    pub(super) fn new<'a>(policies: impl Iterator<Item = &'a Policy>, actions: &[&str]) -> Self {
        let policies: Vec<&Policy> = policies.collect();
        let mut by_action: HashMap<String, Buckets> = actions.iter().map(|name| ((*name).to_owned(), Buckets::new())).collect();
        let mut bared = Vec::with_capacity(policies.len());
        for (number, policy) in (0..).zip(policies) {
            let need = need(policy);
            let constraint = policy.action_constraint();
            let applies = |action: &str| match &constraint {
                ActionConstraint::Any => true,
                ActionConstraint::Eq(uid) => uid.id().unescaped() == action,
                ActionConstraint::In(uids) => uids.iter().any(|uid| uid.id().unescaped() == action),
            };
            for (_, buckets) in by_action.iter_mut().filter(|(action, _)| applies(action)) {
                buckets.entry(need.clone()).or_default().push(number);
            }
            let operators = OF_OPERATORS.into_iter().any(applies);
            bared.push((bare(policy, &need, operators).unwrap_or_else(|| policy.clone()), Reads::of(policy)));
        }
        Self { policies: bared, by_action, sets: Mutex::default() }
    }

    /// Every policy that can match, and some that cannot.
    pub(super) fn candidates(&self, action: &str, principal: &Known, resource: &Known) -> Arc<Candidates> {
        let mut numbers = Vec::new();
        if let Some(buckets) = self.by_action.get(action) {
            let mut take = |need: &Need| numbers.extend(buckets.get(need).into_iter().flatten());
            take(&Need::Nothing);
            for uid in principal.within().chain(resource.within()) {
                take(&Need::Within(uid.clone()));
            }
            for (name, value) in principal.texts() {
                take(&Need::OfPrincipal(name.clone(), value.clone()));
            }
            for (name, value) in resource.texts() {
                take(&Need::OfResource(name.clone(), value.clone()));
            }
        }
        numbers.sort_unstable();
        self.set_of(numbers)
    }

    fn set_of(&self, numbers: Vec<u32>) -> Arc<Candidates> {
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = sets.get(&numbers) {
            return Arc::clone(set);
        }
        let (mut policies, mut reads) = (PolicySet::new(), Reads::NONE);
        for (policy, its) in numbers.iter().filter_map(|number| self.policies.get(usize::try_from(*number).ok()?)) {
            // Their ids are different: they come from one set.
            let _ = policies.add(policy.clone());
            reads = reads.and(*its);
        }
        let set = Arc::new(Candidates { policies, reads });
        if sets.len() >= limits::POLICY_SETS_KEPT_MAX {
            sets.clear();
        }
        sets.insert(numbers, Arc::clone(&set));
        set
    }
}

/// Actions of operators; all others are of gateways.
const OF_OPERATORS: [&str; 2] = ["request", "resolveInDoubt"];

/// The policy without what is so whenever it is a candidate: its action, what its bucket needs of principal and resource, and what kind
/// of entity they are. Cedar makes expressions of a scope anew, and looks at them, in every decision.
fn bare(policy: &Policy, need: &Need, operators: bool) -> Option<Policy> {
    let needed = |uid: &EntityUid| matches!(need, Need::Within(needed) if needed == uid);
    let principal = match policy.principal_constraint() {
        PrincipalConstraint::Any => true,
        PrincipalConstraint::Is(kind) => !operators && kind.to_string() == "Sealane::Gateway",
        PrincipalConstraint::Eq(uid) | PrincipalConstraint::In(uid) => needed(&uid),
        PrincipalConstraint::IsIn(..) => false,
    };
    let resource = match policy.resource_constraint() {
        ResourceConstraint::Any => true,
        ResourceConstraint::Is(kind) => kind.to_string() == "Sealane::Vm",
        ResourceConstraint::Eq(uid) | ResourceConstraint::In(uid) => needed(&uid),
        ResourceConstraint::IsIn(..) => false,
    };
    if !is_flat(policy) {
        return None;
    }
    let mut json = policy.to_json().ok()?;
    for (part, is_so) in [("action", true), ("principal", principal), ("resource", resource)] {
        if is_so {
            *json.get_mut(part)? = json!({ "op": "All" });
        }
    }
    Policy::from_json(Some(policy.id().clone()), json).ok()
}

/// Cedar writes and reads JSON recursively, with some 100 KiB of stack for each level in a debug build; what is deeper stays as it is.
const BARED_DEPTH_MAX: usize = 12;

fn is_flat(policy: &Policy) -> bool {
    let Ok(policy) = policy.to_pst() else { return false };
    let mut level: Vec<&Arc<Expr>> = clauses(&policy).collect();
    for _ in 0..BARED_DEPTH_MAX {
        if level.is_empty() {
            return true;
        }
        let Some(below) = level.into_iter().map(|expr| parts(expr)).collect::<Option<Vec<_>>>() else { return false };
        level = below.into_iter().flatten().collect();
    }
    false
}

fn need(policy: &Policy) -> Need {
    match policy.resource_constraint() {
        ResourceConstraint::Eq(uid) | ResourceConstraint::In(uid) | ResourceConstraint::IsIn(_, uid) => return Need::Within(uid),
        ResourceConstraint::Any | ResourceConstraint::Is(_) => {}
    }
    let principal = match policy.principal_constraint() {
        PrincipalConstraint::Eq(uid) | PrincipalConstraint::In(uid) | PrincipalConstraint::IsIn(_, uid) => Some(Need::Within(uid)),
        PrincipalConstraint::Any | PrincipalConstraint::Is(_) => None,
    };
    let condition = || if never_fails(policy) { condition(policy) } else { None };
    principal.or_else(condition).unwrap_or(Need::Nothing)
}

/// A part of the condition that wants an attribute to be a certain text.
fn condition(policy: &Policy) -> Option<Need> {
    let policy = policy.to_pst().ok()?;
    let mut todo = Vec::new();
    for clause in policy.body().clauses() {
        if let Clause::When(expr) = clause {
            todo.push(expr);
        }
    }
    let mut found = None;
    while let Some(expr) = todo.pop() {
        let Expr::BinaryOp { op, left, right } = expr.as_ref() else { continue };
        match op {
            BinaryOp::And => todo.extend([left, right]),
            BinaryOp::Eq => match wanted(left, right).or_else(|| wanted(right, left)) {
                // There are more VMs than peers, so what they have is in smaller buckets.
                Some(need @ Need::OfResource(..)) => return Some(need),
                need => found = found.or(need),
            },
            _ => {}
        }
    }
    found
}

fn wanted(attribute: &Expr, value: &Expr) -> Option<Need> {
    let Expr::Literal(Literal::String(value)) = value else { return None };
    let path = path(attribute)?;
    let (of, name) = path.split_once('.')?;
    let (name, value) = (name.to_owned(), value.to_string());
    match of {
        "principal" => Some(Need::OfPrincipal(name, value)),
        "resource" => Some(Need::OfResource(name, value)),
        _ => None,
    }
}
