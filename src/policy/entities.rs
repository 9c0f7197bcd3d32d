//! What the gateway knows about gateways, operators and VMs, as Cedar entities.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::str::FromStr;

use cedar_policy::{Entity, EntityId, EntityTypeName, EntityUid, RestrictedExpression, Schema};
use serde::Deserialize;

use crate::limits;
use crate::policy::errors::PolicyProblem;
use crate::types::{SpiffeId, VmName, VmUuid};

/// Everything that policies know by configuration. What is not listed here still gets judged, with the
/// least favourable values (see the schema).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entities {
    /// Peer gateways.
    #[serde(default)]
    pub gateways: Vec<GatewayEntity>,
    /// Operators.
    #[serde(default)]
    pub operators: Vec<OperatorEntity>,
    /// VMs.
    #[serde(default)]
    pub vms: Vec<VmEntity>,
}

/// A peer gateway.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayEntity {
    /// Its identity; the trust domain that policies see comes from here.
    pub spiffe: SpiffeId,
    /// The site it stands in.
    pub site: String,
    /// Its groups.
    #[serde(default)]
    pub groups: Vec<String>,
}

/// Somebody who uses the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OperatorEntity {
    /// Who the socket says it is, e.g. `uid:1000`.
    pub id: String,
    /// Teams.
    #[serde(default)]
    pub teams: Vec<String>,
    /// Whether a second factor is known to have been used.
    #[serde(default)]
    pub mfa: bool,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VmEntity {
    /// The identity that policies are written about.
    pub uuid: VmUuid,
    /// The operator's name of it; for people, policies do not see it.
    pub name: VmName,
    /// Whose it is.
    pub tenant: String,
    /// `public`, `internal` or `restricted`.
    pub classification: String,
    /// Where it belongs.
    pub home_site: String,
    /// Where it may be.
    pub allowed_sites: Vec<String>,
    /// Whether it may move at all.
    pub migratable: bool,
    /// Whether its owner accepts post-copy.
    #[serde(default)]
    pub postcopy_ok: bool,
    /// Its groups.
    #[serde(default)]
    pub groups: Vec<String>,
}

impl VmEntity {
    /// A VM about which nothing is known gets what permits least.
    fn unknown(uuid: VmUuid) -> Option<Self> {
        Some(Self {
            uuid,
            name: "unknown".parse().ok()?,
            tenant: String::new(),
            classification: "restricted".to_owned(),
            home_site: String::new(),
            allowed_sites: Vec::new(),
            migratable: false,
            postcopy_ok: false,
            groups: Vec::new(),
        })
    }
}

/// The Cedar name of one entity. `kind` is one of the schema's entity types.
pub(super) fn uid(kind: &str, id: &str) -> Result<EntityUid, String> {
    let name = EntityTypeName::from_str(&format!("Sealane::{kind}")).map_err(|error| format!("`{kind}` is no entity type: {error}"))?;
    Ok(EntityUid::from_type_name_and_id(name, EntityId::new(id)))
}

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

fn entity<const N: usize>(
    uid: EntityUid,
    attributes: [(&str, RestrictedExpression); N],
    parents: HashSet<EntityUid>,
) -> Result<Entity, String> {
    let attributes: HashMap<_, _> = attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Entity::new(uid, attributes, parents).map_err(|error| error.to_string())
}

fn uids(kind: &str, ids: &[String]) -> Result<HashSet<EntityUid>, String> {
    ids.iter().map(|id| uid(kind, id)).collect()
}

fn gateway(known: &GatewayEntity) -> Result<Entity, String> {
    let attributes = [("trustDomain", text(known.spiffe.trust_domain())), ("site", text(&known.site))];
    entity(uid("Gateway", known.spiffe.as_str())?, attributes, uids("GatewayGroup", &known.groups)?)
}

fn operator(known: &OperatorEntity) -> Result<Entity, String> {
    entity(uid("Operator", &known.id)?, [("mfa", RestrictedExpression::new_bool(known.mfa))], uids("Team", &known.teams)?)
}

fn vm(known: &VmEntity) -> Result<Entity, String> {
    let attributes = [
        ("tenant", text(&known.tenant)),
        ("classification", text(&known.classification)),
        ("homeSite", text(&known.home_site)),
        ("allowedSites", RestrictedExpression::new_set(known.allowed_sites.iter().map(|site| text(site)))),
        ("migratable", RestrictedExpression::new_bool(known.migratable)),
        ("postcopyOk", RestrictedExpression::new_bool(known.postcopy_ok)),
    ];
    entity(uid("Vm", &known.uuid.to_string())?, attributes, uids("VmGroup", &known.groups)?)
}

/// A verified peer that the configuration does not list.
pub(super) fn unknown_gateway(spiffe: &SpiffeId) -> Result<Entity, String> {
    gateway(&GatewayEntity { spiffe: spiffe.clone(), site: String::new(), groups: Vec::new() })
}

/// An operator that the configuration does not list.
pub(super) fn unknown_operator(id: &str) -> Result<Entity, String> {
    operator(&OperatorEntity { id: id.to_owned(), teams: Vec::new(), mfa: false })
}

/// A VM that the configuration does not list.
pub(super) fn unknown_vm(uuid: VmUuid) -> Result<Entity, String> {
    vm(&VmEntity::unknown(uuid).ok_or("an unknown VM has no name")?)
}

/// All entities, checked against the schema; or everything that is wrong with them.
pub(super) fn build(known: &Entities, schema: &Schema) -> Result<cedar_policy::Entities, Vec<PolicyProblem>> {
    let mut problems = Vec::new();
    let count = known.gateways.len().saturating_add(known.operators.len()).saturating_add(known.vms.len());
    if count > limits::POLICY_ENTITIES_MAX {
        let what = format!("too many gateways, operators and VMs: `{count}`, expected at most {}", limits::POLICY_ENTITIES_MAX);
        return Err(vec![PolicyProblem::of_set(what)]);
    }
    let mut note = |what: String| problems.push(PolicyProblem::of_set(what));
    let mut seen = BTreeSet::new();
    let mut built = Vec::with_capacity(count);
    let mut add = |kind: &str, id: String, made: Result<Entity, String>| {
        if !seen.insert((kind.to_owned(), id.clone())) {
            note(format!("{kind} `{id}` is listed twice"));
            return;
        }
        match made {
            Ok(entity) => built.push(entity),
            Err(error) => note(format!("{kind} `{id}`: {error}")),
        }
    };
    for known in &known.gateways {
        add("gateway", known.spiffe.to_string(), gateway(known));
    }
    for known in &known.operators {
        add("operator", known.id.clone(), operator(known));
    }
    for known in &known.vms {
        let made = match known.classification.as_str() {
            "public" | "internal" | "restricted" => vm(known),
            other => Err(format!("unknown classification `{other}`, expected `public`, `internal` or `restricted`")),
        };
        add("VM", known.uuid.to_string(), made);
    }
    match groups(known) {
        Ok(groups) => built.extend(groups),
        Err(what) => note(what),
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    cedar_policy::Entities::from_entities(built, Some(schema))
        .map_err(|error| vec![PolicyProblem::of_set(format!("entities do not fit the schema: {error}"))])
}

/// The groups that somebody is in; a group exists by being named.
fn groups(known: &Entities) -> Result<Vec<Entity>, String> {
    let mut uids = HashSet::new();
    for group in known.gateways.iter().flat_map(|gateway| &gateway.groups) {
        uids.insert(uid("GatewayGroup", group)?);
    }
    for team in known.operators.iter().flat_map(|operator| &operator.teams) {
        uids.insert(uid("Team", team)?);
    }
    for group in known.vms.iter().flat_map(|vm| &vm.groups) {
        uids.insert(uid("VmGroup", group)?);
    }
    Ok(uids.into_iter().map(|uid| Entity::new_no_attrs(uid, HashSet::new())).collect())
}
