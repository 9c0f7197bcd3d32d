//! Texts to a checked policy set.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use cedar_policy::ffi::DetailedError;
use cedar_policy::{Authorizer, Effect, Policy, PolicyId, Schema, ValidationMode, Validator};
use ring::digest;

use crate::limits;
use crate::policy::bundle::BundleStamp;
use crate::policy::entities::{self, Entities, KnownEntities};
use crate::policy::errors::{PolicyErrors, PolicyProblem};
use crate::policy::index::Index;
use crate::policy::obligations::Obligations;
use crate::policy::permit::{Accept, Action, Commit, Release, Request, Resolve};
use crate::policy::{SCHEMA, lint, shape, shapes};

/// One policy file, already read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyFile {
    /// Its name, for messages and for the digest.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// A checked set of policies and what they know. Immutable; replace it as a whole.
#[derive(Debug, Clone)]
pub struct PolicySet {
    pub(super) checked: Arc<Checked>,
    pub(super) known: Arc<KnownEntities>,
    pub(super) valid: Option<Arc<Valid>>,
}

/// A set from a bundle answers only while that is valid.
#[derive(Debug)]
pub(super) struct Valid {
    pub(super) unix_ms: Range<i64>,
    pub(super) stamp: BundleStamp,
}

/// What does not depend on entities.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) schema: Schema,
    pub(super) policies: cedar_policy::PolicySet,
    pub(super) authorizer: Authorizer,
    pub(super) index: Index,
    /// The permits alone, if any of them obliges.
    pub(super) permits: Option<Index>,
    /// Whether a policy reads attributes of an entity that it names.
    pub(super) reads_others: bool,
    /// By `@id`; those that oblige to nothing are left out.
    pub(super) obligations: BTreeMap<String, Obligations>,
    /// By `@id`.
    pub(super) places: BTreeMap<String, Place>,
    digest: [u8; 32],
}

/// Where a policy was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: String,
    pub(super) line: usize,
    pub(super) column: usize,
}

impl PolicySet {
    /// Parses and checks all files together.
    ///
    /// # Errors
    ///
    /// Everything that is wrong, at once: syntax, a missing or repeated `@id`, templates, anything strict
    /// validation objects to or warns about, entities that do not fit, or that there is no policy at all.
    pub fn parse(files: &[PolicyFile], entities: &Entities) -> Result<Self, PolicyErrors> {
        let schema = schema().map_err(|problem| PolicyErrors { problems: vec![problem] })?;
        let mut files: Vec<&PolicyFile> = files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut loading = Loading::default();
        loading.read(&files);
        loading.validate(&files, &schema);
        let known = entities::build(entities, &schema).unwrap_or_else(|errors| {
            loading.problems.extend(errors.problems);
            KnownEntities::none()
        });
        if !loading.problems.is_empty() {
            loading.problems.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
            return Err(PolicyErrors { problems: loading.problems });
        }
        let Loading { policies, places, obligations, .. } = loading;
        let index = Index::new(policies.policies(), &ACTIONS);
        let permits = policies.policies().filter(|policy| policy.effect() == Effect::Permit);
        let permits = (!obligations.is_empty()).then(|| Index::new(permits, &ACTIONS));
        let (reads_others, digest) = (policies.policies().any(lint::reads_others), digest_of(&files));
        let checked =
            Checked { schema, policies, authorizer: Authorizer::new(), index, permits, reads_others, obligations, places, digest };
        Ok(Self { checked: Arc::new(checked), known: Arc::new(known), valid: None })
    }

    /// The same policies with other entities.
    ///
    /// # Errors
    ///
    /// Entities that do not fit the schema.
    pub fn with_entities(&self, entities: &Entities) -> Result<Self, PolicyErrors> {
        let known = entities::build(entities, &self.checked.schema)?;
        Ok(Self { known: Arc::new(known), ..self.clone() })
    }

    /// The same policies for a while; at any other time nothing is permitted.
    pub(super) fn valid(self, unix_ms: Range<i64>, stamp: BundleStamp) -> Self {
        Self { valid: Some(Arc::new(Valid { unix_ms, stamp })), ..self }
    }

    /// The bundle that the policies are from, if they are from one.
    #[must_use]
    pub fn bundle(&self) -> Option<&BundleStamp> {
        self.valid.as_ref().map(|valid| &valid.stamp)
    }

    /// SHA-256 over the schema and every file's name and text, in order of name. Two gateways with the same digest
    /// have the same policies (not necessarily the same entities).
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.checked.digest
    }

    /// The `@id`s, sorted.
    pub fn policy_ids(&self) -> impl Iterator<Item = &str> {
        self.checked.places.keys().map(String::as_str)
    }

    /// What nobody means: policies that can fail to evaluate, that never match or that others make needless, words that are never
    /// said, and names of entities that the configuration does not have (a set that was loaded without any is not searched for
    /// those).
    #[must_use]
    pub fn lint(&self) -> Vec<PolicyProblem> {
        lint::lint(self)
    }

    pub(super) fn problem(&self, id: &str, what: String, hint: &str, defect: bool) -> Option<PolicyProblem> {
        let Place { file, line, column } = self.checked.places.get(id)?.clone();
        Some(PolicyProblem { file, line, column, policy: Some(id.to_owned()), what, hint: Some(hint.to_owned()), defect })
    }

    /// Whether a policy is written behind another one.
    pub(super) fn is_after(&self, id: &str, other: &str) -> bool {
        let place = |id: &str| self.checked.places.get(id).map(|place| (&place.file, place.line, place.column));
        place(id) > place(other)
    }
}

const ACTIONS: [&str; 5] = [Request::NAME, Release::NAME, Accept::NAME, Commit::NAME, Resolve::NAME];

fn schema() -> Result<Schema, PolicyProblem> {
    let schema = Schema::from_str(SCHEMA);
    let schema = schema.map_err(|error| PolicyProblem::of_set(format!("the built-in schema does not parse: {error}")))?;
    shapes::check(&schema).map(|()| schema).map_err(PolicyProblem::of_set)
}

/// Length-prefixed, so that no two different lists of files give the same bytes.
fn digest_of(files: &[&PolicyFile]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut add = |bytes: &[u8]| {
        context.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(bytes);
    };
    add(b"sealane policy set v1");
    add(SCHEMA.as_bytes());
    for file in files {
        add(file.name.as_bytes());
        add(file.text.as_bytes());
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

#[derive(Default)]
struct Loading {
    problems: Vec<PolicyProblem>,
    policies: cedar_policy::PolicySet,
    obligations: BTreeMap<String, Obligations>,
    places: BTreeMap<String, Place>,
}

impl Loading {
    fn read(&mut self, files: &[&PolicyFile]) {
        let bytes = files.iter().fold(0_usize, |sum, file| sum.saturating_add(file.text.len()));
        if files.len() > limits::POLICY_FILES_MAX || bytes > limits::POLICY_BYTES_MAX {
            self.problems.push(PolicyProblem::of_set(format!(
                "too much policy: `{}` files of together `{bytes}` bytes, expected at most {} of {}",
                files.len(),
                limits::POLICY_FILES_MAX,
                limits::POLICY_BYTES_MAX
            )));
            return;
        }
        for pair in files.windows(2) {
            if let [first, second] = pair
                && first.name == second.name
            {
                self.problems.push(PolicyProblem::of_set(format!("file `{}` is given twice", first.name)));
            }
        }
        for file in files {
            self.read_file(file);
        }
        if self.places.is_empty() && self.problems.is_empty() {
            self.problems.push(PolicyProblem::of_set(format!("no policy: expected at least one in `{}` files, got none", files.len())));
        }
    }

    fn read_file(&mut self, file: &PolicyFile) {
        if let Err((offset, what)) = shape::check(&file.text) {
            self.problems.push(PolicyProblem::at(&file.name, &file.text, offset, what));
            return;
        }
        let parsed = match cedar_policy::PolicySet::from_str(&file.text) {
            Ok(parsed) => parsed,
            Err(errors) => {
                let problems = errors.iter().map(|error| located(file, &DetailedError::from(error)));
                self.problems.extend(problems);
                return;
            }
        };
        for template in parsed.templates() {
            let offset = offset_of(&file.text, &template.to_cedar(), 0);
            let what = "a policy template is not supported, expected a policy without `?principal` and `?resource`";
            self.problems.push(PolicyProblem::at(&file.name, &file.text, offset, what).of_policy(template.annotation("id")));
        }
        let mut from = 0;
        for policy in parsed.policies() {
            let source = policy.to_cedar().unwrap_or_default();
            let offset = offset_of(&file.text, &source, from);
            from = offset.saturating_add(source.len());
            if let Err(what) = self.take(file, policy, offset) {
                self.problems.push(PolicyProblem::at(&file.name, &file.text, offset, what).of_policy(policy.annotation("id")));
            }
        }
    }

    /// Adds one policy under the name that its author gave it.
    fn take(&mut self, file: &PolicyFile, policy: &Policy, offset: usize) -> Result<(), String> {
        let id = policy.annotation("id").ok_or("a policy has no name, expected `@id(\"...\")` before it")?;
        let named = (1..=limits::POLICY_ID_BYTES_MAX).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !named {
            return Err(format!("invalid `@id`, expected 1–{} letters, digits, `.`, `_` or `-`", limits::POLICY_ID_BYTES_MAX));
        }
        if let Some(first) = self.places.get(id) {
            return Err(format!("the `@id` is taken by the policy at {}:{}:{}", first.file, first.line, first.column));
        }
        let obligations = Obligations::of(policy)?;
        if !obligations.is_empty() {
            self.obligations.insert(id.to_owned(), obligations);
        }
        self.policies.add(policy.new_id(PolicyId::new(id))).map_err(|error| error.to_string())?;
        let (line, column) = super::errors::place(&file.text, offset);
        self.places.insert(id.to_owned(), Place { file: file.name.clone(), line, column });
        Ok(())
    }

    /// INVARIANT(checked-before-use): strict, and a warning is an error.
    fn validate(&mut self, files: &[&PolicyFile], schema: &Schema) {
        let result = Validator::new(schema.clone()).validate(&self.policies, ValidationMode::Strict);
        let errors = result.validation_errors().map(|error| (error.policy_id(), DetailedError::from(error)));
        // What is wrong with a policy also makes it impossible; saying both helps nobody.
        let wrong: BTreeSet<String> = result.validation_errors().map(|error| error.policy_id().to_string()).collect();
        let warnings = result.validation_warnings().filter(|warning| !wrong.contains(&warning.policy_id().to_string()));
        let warnings = warnings.map(|warning| (warning.policy_id(), DetailedError::from(warning)));
        for (id, error) in errors.chain(warnings) {
            let id: &str = id.as_ref();
            let place = self.places.get(id);
            let file = place.and_then(|place| files.iter().find(|file| file.name == place.file));
            let problem = match (file, place) {
                (Some(file), Some(place)) => {
                    let mut problem = located(file, &error);
                    if error.source_locations.is_empty() {
                        (problem.line, problem.column) = (place.line, place.column);
                    }
                    problem
                }
                _ => PolicyProblem::of_set(error.message.clone()),
            };
            self.problems.push(problem.of_policy(Some(id)));
        }
    }
}

fn located(file: &PolicyFile, error: &DetailedError) -> PolicyProblem {
    let label = error.source_locations.first();
    let offset = label.map_or(0, |label| label.loc.start);
    // Cedar repeats the policy's name and says what it expected in the label.
    let message = match error.message.split_once(", ") {
        Some((head, tail)) if head.starts_with("for policy `") => tail,
        _ => error.message.as_str(),
    };
    let what = match label.and_then(|label| label.label.as_deref()) {
        Some(label) if !message.contains(label) => format!("{message}: {label}"),
        _ => message.to_owned(),
    };
    PolicyProblem::at(&file.name, &file.text, offset, what).with_hint(error.help.clone())
}

fn offset_of(text: &str, part: &str, from: usize) -> usize {
    let find = |start: usize| text.get(start..).and_then(|rest| rest.find(part)).map(|found| start.saturating_add(found));
    find(from).or_else(|| find(0)).unwrap_or(0)
}
