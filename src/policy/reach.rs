//! Policies that never decide anything: what they say cannot be so, or another one always says it first.
//!
//! Cedar's validator finds conditions that are false by their types. Here policies are compared with each other, by the form of
//! their scope and conditions: what is reported is so, and what is written in another form is not found.

use std::collections::BTreeSet;
use std::sync::Arc;

use cedar_policy::pst::{BinaryOp, Clause, Expr, Literal, UnaryOp};
use cedar_policy::{ActionConstraint, Effect, EntityTypeName, EntityUid, Policy, PrincipalConstraint, ResourceConstraint};

use crate::limits;
use crate::policy::errors::PolicyProblem;
use crate::policy::lint::path;
use crate::policy::load::PolicySet;

/// A condition that has to be so, or has not to be so.
type Conjunct = (bool, Arc<Expr>);

struct Subject<'a> {
    id: &'a str,
    effect: Effect,
    principal: Scope,
    /// Names of actions; none is every action.
    actions: Option<BTreeSet<String>>,
    resource: Scope,
    conjuncts: Vec<Conjunct>,
    /// It asks something of the stream, whatever else permits.
    obliges: bool,
}

#[derive(PartialEq)]
enum Scope {
    Any,
    In(EntityUid),
    Eq(EntityUid),
    Is(EntityTypeName),
    IsIn(EntityTypeName, EntityUid),
}

impl From<PrincipalConstraint> for Scope {
    fn from(constraint: PrincipalConstraint) -> Self {
        match constraint {
            PrincipalConstraint::Any => Self::Any,
            PrincipalConstraint::In(uid) => Self::In(uid),
            PrincipalConstraint::Eq(uid) => Self::Eq(uid),
            PrincipalConstraint::Is(name) => Self::Is(name),
            PrincipalConstraint::IsIn(name, uid) => Self::IsIn(name, uid),
        }
    }
}

impl From<ResourceConstraint> for Scope {
    fn from(constraint: ResourceConstraint) -> Self {
        match constraint {
            ResourceConstraint::Any => Self::Any,
            ResourceConstraint::In(uid) => Self::In(uid),
            ResourceConstraint::Eq(uid) => Self::Eq(uid),
            ResourceConstraint::Is(name) => Self::Is(name),
            ResourceConstraint::IsIn(name, uid) => Self::IsIn(name, uid),
        }
    }
}

impl Scope {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (Self::Is(name), Self::Is(other) | Self::IsIn(other, _)) => name == other,
            (Self::Is(name), Self::Eq(uid)) => name == uid.type_name(),
            (Self::In(group), Self::In(other) | Self::IsIn(_, other) | Self::Eq(other)) => group == other,
            (own, other) => own == other,
        }
    }
}

impl<'a> Subject<'a> {
    fn of(set: &PolicySet, policy: &'a Policy) -> Option<Self> {
        let name = |uid: &EntityUid| uid.id().unescaped().to_owned();
        let actions = match policy.action_constraint() {
            ActionConstraint::Any => None,
            ActionConstraint::Eq(uid) => Some(BTreeSet::from([name(&uid)])),
            ActionConstraint::In(uids) => Some(uids.iter().map(name).collect()),
        };
        let pst = policy.to_pst().ok()?;
        let mut conjuncts = Vec::new();
        for clause in pst.body().clauses() {
            match clause {
                Clause::When(expr) => split(true, expr, &mut conjuncts),
                Clause::Unless(expr) => split(false, expr, &mut conjuncts),
            }
        }
        let id: &str = policy.id().as_ref();
        Some(Self {
            id,
            effect: policy.effect(),
            principal: policy.principal_constraint().into(),
            actions,
            resource: policy.resource_constraint().into(),
            conjuncts,
            obliges: set.checked.obligations.contains_key(id),
        })
    }

    /// Whether it matches whenever `other` does.
    fn covers(&self, other: &Self) -> bool {
        let actions = match (&self.actions, &other.actions) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(own), Some(others)) => others.is_subset(own),
        };
        actions
            && self.principal.covers(&other.principal)
            && self.resource.covers(&other.resource)
            && self.conjuncts.iter().all(|own| other.conjuncts.contains(own))
    }
}

/// `a && b` into `a` and `b`, and `!(a || b)` into `!a` and `!b`.
fn split(so: bool, expr: &Arc<Expr>, into: &mut Vec<Conjunct>) {
    match expr.as_ref() {
        Expr::BinaryOp { op: BinaryOp::And, left, right } if so => [left, right].into_iter().for_each(|part| split(so, part, into)),
        Expr::BinaryOp { op: BinaryOp::Or, left, right } if !so => [left, right].into_iter().for_each(|part| split(so, part, into)),
        Expr::UnaryOp { op: UnaryOp::Not, expr } => split(!so, expr, into),
        Expr::Literal(Literal::Bool(value)) if *value == so => {}
        _ => into.push((so, Arc::clone(expr))),
    }
}

const UNREACHABLE: &str = "a policy that never matches is a mistake, or can be removed";
const SHADOWED: &str = "remove one of the two, or say what is different";

pub(super) fn lint(set: &PolicySet) -> Vec<PolicyProblem> {
    let subjects: Vec<Subject<'_>> = set.checked.policies.policies().filter_map(|policy| Subject::of(set, policy)).collect();
    let mut found: Vec<PolicyProblem> = Vec::new();
    for subject in &subjects {
        if let Some(what) = contradiction(&subject.conjuncts) {
            found.extend(set.problem(subject.id, what, UNREACHABLE, true));
        }
    }
    if subjects.len() > limits::POLICIES_COMPARED_MAX {
        let what = format!("{} policies are too many to compare with each other", subjects.len());
        found.push(PolicyProblem::of_set(what));
        return found;
    }
    for (index, subject) in subjects.iter().enumerate() {
        for (other_index, other) in subjects.iter().enumerate() {
            if index == other_index || !other.covers(subject) {
                continue;
            }
            // Of two that say the same, the later is one too many.
            let same = subject.covers(other);
            let what = match (subject.effect, other.effect) {
                (Effect::Permit, Effect::Forbid) => format!("never permits: `{}` forbids whatever it matches", other.id),
                (Effect::Forbid, Effect::Permit) => continue,
                (Effect::Permit, _) if subject.obliges => continue,
                _ if same && !other.obliges && !set.is_after(subject.id, other.id) => continue,
                _ => format!("is shadowed: `{}` matches whatever it matches", other.id),
            };
            found.extend(set.problem(subject.id, what, SHADOWED, true));
            break;
        }
    }
    found
}

/// Two conditions that cannot both be so.
fn contradiction(conjuncts: &[Conjunct]) -> Option<String> {
    let mut equal: Vec<(String, &Literal)> = Vec::new();
    for (so, expr) in conjuncts {
        if conjuncts.iter().any(|(other, same)| other != so && same == expr) {
            return Some("never matches: it wants a condition to be so and not to be so".to_owned());
        }
        let Expr::BinaryOp { op: BinaryOp::Eq, left, right } = expr.as_ref() else { continue };
        let pair = match (left.as_ref(), right.as_ref()) {
            (Expr::Literal(literal), other) | (other, Expr::Literal(literal)) => path(other).map(|path| (path, literal)),
            _ => None,
        };
        let Some((path, literal)) = pair.filter(|_| *so) else { continue };
        if let Some((_, other)) = equal.iter().find(|(known, other)| *known == path && *other != literal) {
            return Some(format!("never matches: `{path}` is to be `{}` and `{}`", shown(other), shown(literal)));
        }
        equal.push((path, literal));
    }
    None
}

fn shown(literal: &Literal) -> String {
    match literal {
        Literal::Bool(value) => value.to_string(),
        Literal::Long(value) => value.to_string(),
        Literal::String(value) => value.to_string(),
        Literal::EntityUID(uid) => uid.to_string(),
        other => format!("{other:?}"),
    }
}
