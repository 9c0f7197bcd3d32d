//! `policy explain`: the questions that a gateway would ask, with the facts of its configuration.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::super::output::{Out, Tone, printable};
use super::super::tools::{PolicyAction, PolicyExplainFlags, StorageAsked};
use super::super::{Ending, config, render};
use super::load_or_refuse;
use crate::config::{Config, Peer, Vm};
use crate::control::Exit;
use crate::gateway::{address_of, channel_in_order, default_stream, entities, operator_id, read_policy_text};
use crate::policy::{Explanation, MigrationContext, PolicySet, Question, RequestContext, Route, Storage, Stream, WrittenQuestion};
use crate::telemetry::{ErrorClass, Problem, schema_tag};
use crate::types::VmUuid;

schema_tag!(
    /// Schema of `policy explain --json`.
    ExplainSchema = "sealane.policy-explain/1"
);

/// What the peer's certificate is taken to have left: a third of what `pki issue` gives.
const CERTIFICATE_DAYS_ASSUMED: i64 = 30;

/// Which way the VM would go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Direction {
    /// From here to the peer: request, release, commit.
    Leaving,
    /// From the peer to here: accept, commit.
    Arriving,
}

struct Asked {
    direction: Direction,
    explanation: Explanation,
}

pub(super) fn explain(flags: &PolicyExplainFlags, out: Out) -> Ending {
    if let Some(file) = &flags.request {
        return written(flags, file, out);
    }
    let (Some(file), Some(vm), Some(peer)) = (&flags.config, &flags.vm, &flags.peer) else {
        return Err(Problem::new(ErrorClass::Misuse, "a VM, a peer and a configuration are needed, or a request"));
    };
    let config = config::load_text(file)?;
    let vm = config.vm(vm).ok_or_else(|| unknown(file, "VM", vm.as_str(), config.vms.iter().map(|vm| vm.name.as_str())))?;
    let peer = config.peer(peer).ok_or_else(|| unknown(file, "peer", peer.as_str(), config.peers.iter().map(|peer| peer.name.as_str())))?;
    if flags.storage == StorageAsked::None && (flags.disks > 0 || flags.disk_size.bytes > 0) {
        let problem = Problem::new(ErrorClass::Misuse, "--disks and --disk-size are about disks that move, and --storage is none");
        return Err(problem.with_hint("--storage all, or only"));
    }
    let operator = operator(flags, &config)?;
    let set = load_or_refuse(&flags.directory, &entities(&config))?;
    let facts = Facts { flags, config: &config, vm, peer, operator: operator.as_deref() };
    let asked = facts.ask(&set);
    let verdicts: Vec<(Direction, bool)> = [Direction::Leaving, Direction::Arriving]
        .into_iter()
        .filter(|direction| asked.iter().any(|asked| asked.direction == *direction))
        .map(|direction| (direction, asked.iter().filter(|asked| asked.direction == direction).all(|asked| asked.explanation.allowed)))
        .collect();
    if out.json {
        out.object(&facts.object(&asked, &verdicts));
    } else {
        out.data(&facts.text(out, &asked, &verdicts));
    }
    if operator.is_none() && flags.action.is_none() {
        out.talk("`request` was not asked: name an operator with --operator");
    }
    Ok(if verdicts.iter().any(|(_, permitted)| *permitted) { Exit::Done } else { Exit::Refused })
}

fn unknown<'a>(file: &Path, what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> Problem {
    let known: Vec<&str> = known.collect();
    let message = format!("no {what} `{name}` in `{}`", file.display());
    let problem = Problem::new(ErrorClass::Misuse, message).with_code(&format!("unknown-{}", what.to_lowercase()));
    if known.is_empty() { problem } else { problem.with_hint(format!("there are: {}", known.join(", "))) }
}

/// A question from a file, as it is.
fn written(flags: &PolicyExplainFlags, file: &Path, out: Out) -> Ending {
    let misuse = |message: String| Problem::new(ErrorClass::Misuse, message).with_code("policy");
    let known = flags.config.as_deref().map(config::load_text).transpose()?.map(|config| entities(&config)).unwrap_or_default();
    let set = load_or_refuse(&flags.directory, &known)?;
    let text = read_policy_text(file).map_err(|error| misuse(format!("cannot read `{}`: {error}", file.display())))?;
    let no_question = |what: String| misuse(format!("`{}` is no question: {what}", file.display()));
    let asked = WrittenQuestion::read(&text).map_err(no_question)?;
    let explanation = asked.explain(&set).map_err(no_question)?;
    if out.json {
        out.object(&WrittenObject { schema: ExplainSchema, question: QuestionObject::new(None, &explanation) });
    } else {
        out.data(&question(out, &explanation));
    }
    if !asked.has_entities() && flags.config.is_none() {
        out.talk("nothing is known of gateways, operators and VMs: give the request `entities`, or the command --config");
    }
    Ok(if explanation.allowed { Exit::Done } else { Exit::Refused })
}

#[derive(Serialize)]
struct WrittenObject {
    schema: ExplainSchema,
    question: QuestionObject,
}

/// How policies name the operator that was asked for.
fn operator(flags: &PolicyExplainFlags, config: &Config) -> Result<Option<String>, Problem> {
    let Some(name) = &flags.operator else {
        if flags.action == Some(PolicyAction::Request) {
            let problem = Problem::new(ErrorClass::Misuse, "--action request is about an operator, and none is named");
            return Err(problem.with_hint("name one with --operator"));
        }
        return Ok(None);
    };
    let found = config.operators.iter().find(|operator| operator.name == *name);
    let names: Vec<String> = config.operators.iter().map(|operator| operator.name.to_string()).collect();
    let found = found.ok_or_else(|| unknown(&config.file, "operator", &name.to_string(), names.iter().map(String::as_str)))?;
    Ok(Some(operator_id(found.uid)))
}

/// Everything that the questions are about.
struct Facts<'a> {
    flags: &'a PolicyExplainFlags,
    config: &'a Config,
    vm: &'a Vm,
    peer: &'a Peer,
    operator: Option<&'a str>,
}

impl Facts<'_> {
    fn ask(&self, set: &PolicySet) -> Vec<Asked> {
        let wanted = |action| self.flags.action.is_none_or(|only| only == action);
        let (leaving, arriving) = (self.context(Direction::Leaving), self.context(Direction::Arriving));
        let request = RequestContext {
            now_unix_ms: leaving.now_unix_ms,
            route: leaving.route.clone(),
            stream: leaving.stream.clone(),
            change_ticket: None,
        };
        let spiffe = &self.peer.spiffe;
        let mut asked = Vec::new();
        let mut ask = |action, direction, question: Question<'_>| {
            if wanted(action) {
                asked.push(Asked { direction, explanation: set.explain(self.vm.uuid, &question) });
            }
        };
        if let Some(operator) = self.operator {
            ask(PolicyAction::Request, Direction::Leaving, Question::Request(operator, &request));
        }
        ask(PolicyAction::Release, Direction::Leaving, Question::Release(spiffe, &leaving));
        ask(PolicyAction::Commit, Direction::Leaving, Question::Commit(spiffe, &leaving));
        ask(PolicyAction::Accept, Direction::Arriving, Question::Accept(spiffe, &arriving));
        ask(PolicyAction::Commit, Direction::Arriving, Question::Commit(spiffe, &arriving));
        asked
    }

    fn context(&self, direction: Direction) -> MigrationContext {
        let (own, theirs) = (self.config.gateway.site.to_string(), self.peer.site.to_string());
        let (src_site, dst_site) = match direction {
            Direction::Leaving => (own, theirs),
            Direction::Arriving => (theirs, own),
        };
        let peer_ip = self.flags.peer_ip.unwrap_or_else(|| address_of(self.peer));
        let storage = match self.flags.storage {
            StorageAsked::None => Storage::None,
            StorageAsked::All => Storage::All,
            StorageAsked::Only => Storage::Only,
        };
        MigrationContext {
            now_unix_ms: self.time().as_millisecond(),
            route: Route { src_site, dst_site, peer_ip },
            channel: channel_in_order(CERTIFICATE_DAYS_ASSUMED),
            stream: Stream { storage, ..default_stream(self.config, self.vm) },
            memory_mib: self.flags.memory.bytes >> 20,
            disk_count: self.flags.disks,
            disk_mib: self.flags.disk_size.bytes.div_ceil(1 << 20),
        }
    }

    fn time(&self) -> jiff::Timestamp {
        self.flags.at.unwrap_or_else(jiff::Timestamp::now)
    }

    fn title(&self, direction: Direction) -> String {
        let (vm, peer, here) = (&self.vm.name, &self.peer.name, &self.config.gateway.name);
        match direction {
            Direction::Leaving => format!("`{vm}` from `{here}` to `{peer}`"),
            Direction::Arriving => format!("`{vm}` from `{peer}` to `{here}`"),
        }
    }

    fn text(&self, out: Out, asked: &[Asked], verdicts: &[(Direction, bool)]) -> String {
        let mut text = String::new();
        for (direction, permitted) in verdicts {
            let verdict = if *permitted { out.paint(Tone::Good, "permitted") } else { out.paint(Tone::Bad, "denied") };
            let _ = writeln!(text, "{}: {verdict}", self.title(*direction));
            for asked in asked.iter().filter(|asked| asked.direction == *direction) {
                text.push_str(&question(out, &asked.explanation));
            }
        }
        let context = self.context(Direction::Leaving);
        let (channel, stream) = (&context.channel, &context.stream);
        let _ = writeln!(
            text,
            "\nasked for {}, peer at {}, {} of memory, disks: {} ({}, {}), {} lanes, {} per {}, durability {};",
            self.time(),
            context.route.peer_ip,
            render::bytes(self.flags.memory.bytes),
            stream.storage.as_str(),
            context.disk_count,
            render::bytes(self.flags.disk_size.bytes),
            stream.lanes,
            stream.compression.as_str(),
            stream.compression_scope.as_str(),
            stream.durability.as_str()
        );
        let _ = writeln!(
            text,
            "assumed: TLS {}, {}, {}, fresh CRLs, a peer certificate with {} days left",
            channel.tls, channel.kx, channel.suite, channel.peer_cert_days_left
        );
        text
    }

    fn object(&self, asked: &[Asked], verdicts: &[(Direction, bool)]) -> Object {
        let context = self.context(Direction::Leaving);
        Object {
            schema: ExplainSchema,
            vm: self.vm.name.to_string(),
            peer: self.peer.name.to_string(),
            permitted: verdicts.iter().filter(|(_, permitted)| *permitted).map(|(direction, _)| *direction).collect(),
            facts: FactsObject {
                now: self.time().to_string(),
                peer_ip: context.route.peer_ip.to_string(),
                memory_bytes: self.flags.memory.bytes,
                storage: context.stream.storage.as_str(),
                disk_count: context.disk_count,
                disk_bytes: self.flags.disk_size.bytes,
                lanes: context.stream.lanes,
                compression: context.stream.compression.as_str(),
                compression_scope: context.stream.compression_scope.as_str(),
                durability: context.stream.durability.as_str(),
                tls: context.channel.tls,
                kx: context.channel.kx,
                suite: context.channel.suite,
                peer_cert_days_left: context.channel.peer_cert_days_left,
            },
            questions: asked.iter().map(|asked| QuestionObject::new(Some(asked.direction), &asked.explanation)).collect(),
        }
    }
}

/// One question, its answer, and every policy that had a say.
fn question(out: Out, explanation: &Explanation) -> String {
    let (word, tone) = if explanation.allowed { ("permit", Tone::Good) } else { ("DENY  ", Tone::Bad) };
    let mut text = format!("  {}  {:<8} {}\n", out.paint(tone, word), explanation.action, printable(&explanation.why));
    for policy in &explanation.matched {
        let effect = if policy.permits { "permits" } else { "forbids" };
        let (file, line, column) = &policy.place;
        let _ = writeln!(text, "            {effect}: `{}` at {}:{line}:{column}", policy.id, printable(file));
    }
    let obligations = explanation.obligations.to_string();
    if !obligations.is_empty() {
        let _ = writeln!(text, "            obliges: {obligations}");
    }
    // The first is the reason above.
    for error in explanation.errors.iter().skip(1) {
        let _ = writeln!(text, "            {}", printable(&error.to_string()));
    }
    if !explanation.principal_known {
        let _ = writeln!(text, "            `{}` is unknown: it is judged as nobody's", printable(&explanation.principal));
    }
    if !explanation.vm_known {
        let _ = writeln!(text, "            VM `{}` is unknown: it is judged as one that is restricted and may not move", explanation.vm);
    }
    text
}

#[derive(Serialize)]
struct Object {
    schema: ExplainSchema,
    vm: String,
    peer: String,
    /// Directions in which everything asked is permitted.
    permitted: Vec<Direction>,
    facts: FactsObject,
    questions: Vec<QuestionObject>,
}

#[derive(Serialize)]
struct FactsObject {
    now: String,
    peer_ip: String,
    memory_bytes: u64,
    storage: &'static str,
    disk_count: u32,
    disk_bytes: u64,
    lanes: u16,
    compression: &'static str,
    compression_scope: &'static str,
    durability: &'static str,
    tls: String,
    kx: String,
    suite: String,
    peer_cert_days_left: i64,
}

#[derive(Serialize)]
struct QuestionObject {
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<Direction>,
    action: &'static str,
    principal: String,
    /// Whether it is in the configuration, or among the entities of the request.
    principal_known: bool,
    vm: VmUuid,
    vm_known: bool,
    decision: &'static str,
    why: String,
    policies: Vec<PolicyObject>,
    /// What permits that matched ask of the stream, as annotations have it.
    #[serde(skip_serializing_if = "String::is_empty")]
    obligations: String,
    errors: Vec<String>,
}

#[derive(Serialize)]
struct PolicyObject {
    id: String,
    effect: &'static str,
    file: String,
    line: usize,
    column: usize,
}

impl QuestionObject {
    fn new(direction: Option<Direction>, explanation: &Explanation) -> Self {
        let policies = explanation.matched.iter().map(|policy| PolicyObject {
            id: policy.id.clone(),
            effect: if policy.permits { "permit" } else { "forbid" },
            file: policy.place.0.clone(),
            line: policy.place.1,
            column: policy.place.2,
        });
        Self {
            direction,
            action: explanation.action,
            principal: explanation.principal.clone(),
            principal_known: explanation.principal_known,
            vm: explanation.vm,
            vm_known: explanation.vm_known,
            decision: if explanation.allowed { "allow" } else { "deny" },
            why: explanation.why.clone(),
            policies: policies.collect(),
            obligations: explanation.obligations.to_string(),
            errors: explanation.errors.iter().map(ToString::to_string).collect(),
        }
    }
}
