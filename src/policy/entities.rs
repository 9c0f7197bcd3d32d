//! What the gateway knows about gateways, operators and VMs, as Cedar entities.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;
use std::sync::LazyLock;

use cedar_policy::{Entity, EntityId, EntityTypeName, EntityUid, RestrictedExpression, Schema};
use serde::{Deserialize, Serialize};

use crate::limits;
use crate::policy::errors::{PolicyErrors, PolicyProblem};
use crate::types::{SpiffeId, VmName, VmUuid};

/// Everything that policies know by configuration. What is not listed here still gets judged, with the
/// least favourable values (see the schema).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// The schema's entity types: to parse a name takes longer than to decide.
static TYPES: LazyLock<HashMap<&str, EntityTypeName>> = LazyLock::new(|| {
    let kinds = ["Action", "Gateway", "GatewayGroup", "Operator", "Team", "Vm", "VmGroup"];
    kinds.into_iter().filter_map(|kind| Some((kind, EntityTypeName::from_str(&format!("Sealane::{kind}")).ok()?))).collect()
});

/// The Cedar name of one entity. `kind` is one of the schema's entity types.
pub(super) fn uid(kind: &str, id: &str) -> Result<EntityUid, String> {
    let name = TYPES.get(kind).ok_or_else(|| format!("`{kind}` is no entity type"))?;
    Ok(EntityUid::from_type_name_and_id(name.clone(), EntityId::new(id)))
}

/// One gateway, operator or VM, as it was described and as Cedar has it.
#[derive(Debug, Clone)]
pub(super) struct Known {
    uid: EntityUid,
    entity: Entity,
    groups: Vec<EntityUid>,
    texts: Vec<(String, String)>,
    described: Described,
}

#[derive(Debug, Clone)]
enum Described {
    Gateway(GatewayEntity),
    Operator(OperatorEntity),
    Vm(Box<VmEntity>),
}

impl Known {
    fn gateway(described: GatewayEntity) -> Result<Self, String> {
        let texts = vec![("trustDomain", described.spiffe.trust_domain().to_owned()), ("site", described.site.clone())];
        let (uid, groups) = (uid("Gateway", described.spiffe.as_str())?, uids("GatewayGroup", &described.groups)?);
        Self::new(uid, groups, texts, Vec::new(), Described::Gateway(described))
    }

    fn operator(described: OperatorEntity) -> Result<Self, String> {
        let mfa = vec![("mfa", RestrictedExpression::new_bool(described.mfa))];
        let (uid, groups) = (uid("Operator", &described.id)?, uids("Team", &described.teams)?);
        Self::new(uid, groups, Vec::new(), mfa, Described::Operator(described))
    }

    fn vm(described: VmEntity) -> Result<Self, String> {
        let classes = ["public", "internal", "restricted"];
        if !classes.contains(&described.classification.as_str()) {
            let other = &described.classification;
            return Err(format!("unknown classification `{other}`, expected `public`, `internal` or `restricted`"));
        }
        let texts = vec![
            ("tenant", described.tenant.clone()),
            ("classification", described.classification.clone()),
            ("homeSite", described.home_site.clone()),
        ];
        let others = vec![
            ("allowedSites", RestrictedExpression::new_set(described.allowed_sites.iter().map(|site| text(site)))),
            ("migratable", RestrictedExpression::new_bool(described.migratable)),
            ("postcopyOk", RestrictedExpression::new_bool(described.postcopy_ok)),
        ];
        let (uid, groups) = (uid("Vm", &described.uuid.to_string())?, uids("VmGroup", &described.groups)?);
        Self::new(uid, groups, texts, others, Described::Vm(Box::new(described)))
    }

    fn new(
        uid: EntityUid,
        groups: Vec<EntityUid>,
        texts: Vec<(&str, String)>,
        others: Vec<(&str, RestrictedExpression)>,
        described: Described,
    ) -> Result<Self, String> {
        let texts: Vec<(String, String)> = texts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let attributes = texts.iter().map(|(name, value)| (name.clone(), text(value)));
        let attributes = attributes.chain(others.into_iter().map(|(name, value)| (name.to_owned(), value))).collect();
        let entity = Entity::new(uid.clone(), attributes, groups.iter().cloned().collect()).map_err(|error| error.to_string())?;
        Ok(Self { uid, entity, groups, texts, described })
    }

    /// Itself, and every group that it is in.
    pub(super) fn within(&self) -> impl Iterator<Item = &EntityUid> {
        [&self.uid].into_iter().chain(&self.groups)
    }

    /// Its attributes that are texts.
    pub(super) fn texts(&self) -> &[(String, String)] {
        &self.texts
    }

    pub(super) fn entity(&self) -> &Entity {
        &self.entity
    }

    /// A verified peer that the configuration does not list.
    pub(super) fn unlisted_gateway(spiffe: &SpiffeId) -> Result<Self, String> {
        Self::gateway(GatewayEntity { spiffe: spiffe.clone(), site: String::new(), groups: Vec::new() })
    }

    /// An operator that the configuration does not list.
    pub(super) fn unlisted_operator(id: &str) -> Result<Self, String> {
        Self::operator(OperatorEntity { id: id.to_owned(), teams: Vec::new(), mfa: false })
    }

    /// A VM that the configuration does not list.
    pub(super) fn unlisted_vm(uuid: VmUuid) -> Result<Self, String> {
        Self::vm(VmEntity::unknown(uuid).ok_or("an unknown VM has no name")?)
    }
}

/// Everything that is known by configuration, ready to be asked about.
#[derive(Debug)]
pub(super) struct KnownEntities {
    pub(super) all: cedar_policy::Entities,
    each: HashMap<EntityUid, Known>,
}

impl KnownEntities {
    pub(super) fn none() -> Self {
        Self { all: cedar_policy::Entities::empty(), each: HashMap::new() }
    }

    pub(super) fn get(&self, uid: &EntityUid) -> Option<&Known> {
        self.each.get(uid)
    }

    pub(super) fn has(&self, uid: &EntityUid) -> bool {
        self.all.get(uid).is_some()
    }

    /// Whether there is a configuration at all.
    pub(super) fn names_anything(&self) -> bool {
        !self.each.is_empty()
    }

    /// Those of a question, as they were described: with them it can be asked again elsewhere.
    pub(super) fn described(&self, uids: &[EntityUid]) -> Entities {
        let mut found = Entities::default();
        for known in uids.iter().filter_map(|uid| self.each.get(uid)) {
            match &known.described {
                Described::Gateway(gateway) => found.gateways.push(gateway.clone()),
                Described::Operator(operator) => found.operators.push(operator.clone()),
                Described::Vm(vm) => found.vms.push(VmEntity::clone(vm)),
            }
        }
        found
    }
}

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

fn uids(kind: &str, ids: &[String]) -> Result<Vec<EntityUid>, String> {
    ids.iter().map(|id| uid(kind, id)).collect()
}

/// All entities, checked against the schema; or everything that is wrong with them.
pub(super) fn build(known: &Entities, schema: &Schema) -> Result<KnownEntities, PolicyErrors> {
    let mut problems = Vec::new();
    let count = known.gateways.len().saturating_add(known.operators.len()).saturating_add(known.vms.len());
    if count > limits::POLICY_ENTITIES_MAX {
        let what = format!("too many gateways, operators and VMs: `{count}`, expected at most {}", limits::POLICY_ENTITIES_MAX);
        return Err(PolicyErrors { problems: vec![PolicyProblem::of_set(what)] });
    }
    let mut note = |what: String| problems.push(PolicyProblem::of_set(what));
    let mut each = HashMap::with_capacity(count);
    let mut add = |kind: &str, id: String, made: Result<Known, String>| match made {
        Ok(known) => {
            if each.insert(known.uid.clone(), known).is_some() {
                note(format!("{kind} `{id}` is listed twice"));
            }
        }
        Err(error) => note(format!("{kind} `{id}`: {error}")),
    };
    for gateway in &known.gateways {
        add("gateway", gateway.spiffe.to_string(), Known::gateway(gateway.clone()));
    }
    for operator in &known.operators {
        add("operator", operator.id.clone(), Known::operator(operator.clone()));
    }
    for vm in &known.vms {
        add("VM", vm.uuid.to_string(), Known::vm(vm.clone()));
    }
    if !problems.is_empty() {
        return Err(PolicyErrors { problems });
    }
    // A group exists by being named.
    let groups: HashSet<&EntityUid> = each.values().flat_map(|known| &known.groups).collect();
    let groups = groups.into_iter().map(|uid| Entity::new_no_attrs(uid.clone(), HashSet::new()));
    let all = each.values().map(|known| known.entity.clone()).chain(groups);
    match cedar_policy::Entities::from_entities(all, Some(schema)) {
        Ok(all) => Ok(KnownEntities { all, each }),
        Err(error) => {
            let problems = vec![PolicyProblem::of_set(format!("entities do not fit the schema: {error}"))];
            Err(PolicyErrors { problems })
        }
    }
}
