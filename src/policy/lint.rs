//! What is allowed but unwise in policies.

use std::sync::Arc;

use cedar_policy::pst::{BinaryOp, Clause, Expr, UnaryOp};
use cedar_policy::{Policy, pst};

use crate::policy::errors::PolicyProblem;
use crate::policy::load::PolicySet;

pub(super) fn lint(set: &PolicySet) -> Vec<PolicyProblem> {
    let mut found = Vec::new();
    // Without a configuration, nothing is known and so nothing can be misspelt.
    let knows_names = set.entities.iter().any(|entity| entity.uid().type_name().basename() != "Action");
    for policy in set.checked.policies.policies() {
        let id: &str = policy.id().as_ref();
        let Some(place) = set.checked.places.get(id) else { continue };
        let mut note = |what: String, hint: &str| {
            found.push(PolicyProblem {
                file: place.file.clone(),
                line: place.line,
                column: place.column,
                policy: Some(id.to_owned()),
                what,
                hint: Some(hint.to_owned()),
            });
        };
        for what in arithmetic(policy) {
            note(what, "arithmetic that overflows fails to evaluate, and that denies everything the policy applies to");
        }
        for uid in policy.entity_literals() {
            let is_action = uid.type_name().basename() == "Action";
            if knows_names && !is_action && set.entities.get(&uid).is_none() {
                note(format!("names `{uid}`, which the configuration does not have"), "a misspelt name in a forbid forbids nothing");
            }
        }
    }
    found.sort_by(|a, b| (&a.file, a.line, a.column, &a.what).cmp(&(&b.file, b.line, b.column, &b.what)));
    found.dedup();
    found
}

/// Every operation that can overflow. What this version of Cedar has and we do not know is reported too.
fn arithmetic(policy: &Policy) -> Vec<String> {
    let policy = match policy.to_pst() {
        Ok(policy) => policy,
        Err(error) => return vec![format!("cannot be searched for arithmetic: {error}")],
    };
    let mut found = Vec::new();
    let mut todo: Vec<&Arc<Expr>> = clauses(&policy).collect();
    while let Some(expr) = todo.pop() {
        match expr.as_ref() {
            Expr::Literal(_) | Expr::Var(_) | Expr::Slot(_) => {}
            Expr::UnaryOp { op, expr } => {
                if let UnaryOp::Neg | UnaryOp::ToDate = op {
                    found.push(format!("uses `{}`", if *op == UnaryOp::Neg { "-" } else { "toDate" }));
                }
                todo.push(expr);
            }
            Expr::BinaryOp { op, left, right } => {
                if let Some(name) = overflowing(*op) {
                    found.push(format!("uses `{name}`"));
                }
                todo.extend([left, right]);
            }
            Expr::GetAttr { expr, .. } | Expr::HasAttr { expr, .. } | Expr::Like { expr, .. } => todo.push(expr),
            Expr::Is { expr, in_expr, .. } => todo.extend([expr].into_iter().chain(in_expr)),
            Expr::IfThenElse { cond, then_expr, else_expr } => todo.extend([cond, then_expr, else_expr]),
            Expr::Set(elements) => todo.extend(elements),
            Expr::Record(fields) => todo.extend(fields.values()),
            _ => found.push("uses an expression that this version cannot judge".to_owned()),
        }
    }
    found
}

fn clauses(policy: &pst::Policy) -> impl Iterator<Item = &Arc<Expr>> {
    policy.body().clauses().iter().map(|clause| match clause {
        Clause::When(expr) | Clause::Unless(expr) => expr,
    })
}

fn overflowing(op: BinaryOp) -> Option<&'static str> {
    match op {
        BinaryOp::Add => Some("+"),
        BinaryOp::Sub => Some("-"),
        BinaryOp::Mul => Some("*"),
        BinaryOp::Offset => Some("offset"),
        BinaryOp::DurationSince => Some("durationSince"),
        _ => None,
    }
}
