//! What Cedar allows in policies and nobody means.
//!
//! A *defect* is wrong whatever the configuration is: `policy check` and bundles refuse it. A directory with one may be in force:
//! whatever fails to evaluate there denies. The rest is for people to look at.

use std::sync::Arc;

use cedar_policy::pst::{BinaryOp, Clause, Expr, Literal, UnaryOp};
use cedar_policy::{Policy, pst};

use crate::policy::errors::PolicyProblem;
use crate::policy::load::PolicySet;
use crate::policy::reach;

pub(super) fn lint(set: &PolicySet) -> Vec<PolicyProblem> {
    let mut found = Vec::new();
    // Without a configuration, nothing is known and so nothing can be misspelt.
    let knows_names = set.known.names_anything();
    for policy in set.checked.policies.policies() {
        let id: &str = policy.id().as_ref();
        for (what, hint) in mistakes(policy) {
            found.extend(set.problem(id, what, hint, true));
        }
        for uid in policy.entity_literals() {
            let is_action = uid.type_name().basename() == "Action";
            if knows_names && !is_action && !set.known.has(&uid) {
                let what = format!("names `{uid}`, which the configuration does not have");
                found.extend(set.problem(id, what, "a misspelt name in a forbid forbids nothing", false));
            }
        }
    }
    found.extend(reach::lint(set));
    found.sort_by(|a, b| (&a.file, a.line, a.column, &a.what).cmp(&(&b.file, b.line, b.column, &b.what)));
    found.dedup();
    found
}

const OVERFLOWS: &str = "arithmetic that overflows fails to evaluate, and that denies everything the policy applies to";
const MISSING: &str = "what is not configured has no attributes: that fails to evaluate, and denies everything the policy applies to";
const NEVER: &str = "a misspelt word in a forbid forbids nothing";

/// Whether evaluation cannot fail for any question that fits the schema.
pub(super) fn never_fails(policy: &Policy) -> bool {
    !mistakes(policy).iter().any(|(_, hint)| *hint != NEVER)
}

/// Whether it reads attributes of an entity that it names, or may.
pub(super) fn reads_others(policy: &Policy) -> bool {
    mistakes(policy).iter().any(|(_, hint)| *hint != NEVER && *hint != OVERFLOWS)
}

/// Everything that can fail to evaluate, and every comparison with a word that is never there. What this version of Cedar has and we
/// do not know is reported too.
fn mistakes(policy: &Policy) -> Vec<(String, &'static str)> {
    let policy = match policy.to_pst() {
        Ok(policy) => policy,
        Err(error) => return vec![(format!("cannot be searched for mistakes: {error}"), OVERFLOWS)],
    };
    let mut found = Vec::new();
    let mut todo: Vec<&Arc<Expr>> = clauses(&policy).collect();
    while let Some(expr) = todo.pop() {
        match expr.as_ref() {
            Expr::UnaryOp { op, .. } => {
                if let UnaryOp::Neg | UnaryOp::ToDate = op {
                    found.push((format!("uses `{}`", if *op == UnaryOp::Neg { "-" } else { "toDate" }), OVERFLOWS));
                }
            }
            Expr::BinaryOp { op, left, right } => {
                if let Some(name) = overflowing(*op) {
                    found.push((format!("uses `{name}`"), OVERFLOWS));
                }
                found.extend(never_so(*op, left, right).map(|what| (what, NEVER)));
            }
            Expr::GetAttr { expr, attr } => {
                if let Some(entity) = named_entity(expr) {
                    found.push((format!("reads `{attr}` of `{entity}`"), MISSING));
                }
            }
            _ => {}
        }
        match parts(expr) {
            Some(parts) => todo.extend(parts),
            None => found.push(("uses an expression that this version cannot judge".to_owned(), OVERFLOWS)),
        }
    }
    found
}

/// The expressions that one is made of; nothing for a kind that is not known.
pub(super) fn parts(expr: &Expr) -> Option<Vec<&Arc<Expr>>> {
    Some(match expr {
        Expr::Literal(_) | Expr::Var(_) | Expr::Slot(_) => Vec::new(),
        Expr::UnaryOp { expr, .. } | Expr::GetAttr { expr, .. } | Expr::HasAttr { expr, .. } | Expr::Like { expr, .. } => vec![expr],
        Expr::BinaryOp { left, right, .. } => vec![left, right],
        Expr::Is { expr, in_expr, .. } => [expr].into_iter().chain(in_expr).collect(),
        Expr::IfThenElse { cond, then_expr, else_expr } => vec![cond, then_expr, else_expr],
        Expr::Set(elements) => elements.iter().collect(),
        Expr::Record(fields) => fields.values().collect(),
        _ => return None,
    })
}

pub(super) fn clauses(policy: &pst::Policy) -> impl Iterator<Item = &Arc<Expr>> {
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

/// An entity that is named where an attribute is read of it, or may be.
fn named_entity(base: &Arc<Expr>) -> Option<String> {
    let mut todo = vec![base];
    while let Some(expr) = todo.pop() {
        match expr.as_ref() {
            Expr::Literal(Literal::EntityUID(uid)) => return Some(uid.to_string()),
            // A condition chooses between values, and is none of them.
            Expr::IfThenElse { then_expr, else_expr, .. } => todo.extend([then_expr, else_expr]),
            other => todo.extend(parts(other).unwrap_or_default()),
        }
    }
    None
}

/// Words of the schema's comments: the gateway never says another.
const WORDS: &[(&str, &[&str])] = &[
    ("context.stream.mode", &["precopy", "postcopy", "hybrid"]),
    ("context.stream.compression", &["none", "lz4", "zstd", "auto"]),
    ("context.stream.compressionScope", &["page", "batch", "stream"]),
    ("context.stream.durability", &["none", "dest", "both"]),
    ("context.channel.tls", &["1.3"]),
    ("context.channel.kx", &["X25519MLKEM768", "X25519"]),
    ("context.channel.suite", &["TLS13_AES_256_GCM_SHA384", "TLS13_AES_128_GCM_SHA256", "TLS13_CHACHA20_POLY1305_SHA256"]),
    ("resource.classification", &["public", "internal", "restricted"]),
];

fn never_so(op: BinaryOp, left: &Expr, right: &Expr) -> Option<String> {
    let (path, compared) = match op {
        BinaryOp::Eq | BinaryOp::NotEq => match (path(left), path(right)) {
            (Some(path), None) => (path, vec![right]),
            (None, Some(path)) => (path, vec![left]),
            _ => return None,
        },
        BinaryOp::Contains => match (left, path(right)) {
            (Expr::Set(elements), Some(path)) => (path, elements.iter().map(AsRef::as_ref).collect()),
            _ => return None,
        },
        _ => return None,
    };
    let (_, words) = WORDS.iter().find(|(known, _)| *known == path)?;
    let wrong = compared.into_iter().find_map(|expr| match expr {
        Expr::Literal(Literal::String(text)) if !words.contains(&text.as_str()) => Some(text),
        _ => None,
    })?;
    Some(format!("compares `{path}` with `{wrong}`, which it never is: expected one of {}", words.join(", ")))
}

/// `context.stream.mode` and the like.
pub(super) fn path(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Var(pst::Var::Principal) => Some("principal".to_owned()),
        Expr::Var(pst::Var::Resource) => Some("resource".to_owned()),
        Expr::Var(pst::Var::Context) => Some("context".to_owned()),
        Expr::GetAttr { expr, attr } => Some(format!("{}.{attr}", path(expr)?)),
        _ => None,
    }
}
