//! What is left out of a question changes no answer: random policies and questions, against Cedar with everything.

use super::*;
use crate::policy::ask::{Adjust, Answer};

/// xorshift64*: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % bound
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

const ALWAYS: &[&str] = &[
    "context.now < datetime(\"2030-01-01\")",
    "context.now.toTime() < duration(\"12h\")",
    "resource.tenant == \"acme\"",
    "resource.classification == \"restricted\"",
    "resource in Sealane::VmGroup::\"tenant-acme\"",
    "resource.allowedSites.contains(\"dc2\")",
    "resource has tenant",
];
const WITH_STREAM: &[&str] = &[
    "context.route.srcSite == \"dc1\"",
    "resource.allowedSites.contains(context.route.dstSite)",
    "context.route.peerIp.isInRange(ip(\"10.0.0.0/8\"))",
    "context.route.peerIp.isIpv4()",
    "[\"postcopy\", \"hybrid\"].contains(context.stream.mode)",
    "context.stream.compression == \"none\"",
    "context.stream.compressionScope == \"page\" && context.stream.lengthPadding",
    "context.stream.durability == \"dest\"",
    "context.stream.lanes <= 4",
    "context.stream.lanes * 4611686018427387904 > 0",
    "context.stream == {mode: \"precopy\", compression: \"zstd\", compressionScope: \"stream\", lengthPadding: false, durability: \"dest\", lanes: 4, storage: \"none\"}",
    "(if context.stream.lengthPadding then context.route.srcSite else context.route.dstSite) == \"dc2\"",
    "[{at: context.route}].contains({at: context.route})",
    "context.route has peerIp",
];
const MIGRATION: &[&str] = &[
    "context.channel.tls == \"1.3\"",
    "context.channel.kx == \"X25519\"",
    "context.channel.suite like \"*AES_256*\"",
    "context.channel.crlFresh",
    "context.channel.peerCertDaysLeft >= 7",
    "context.memoryMiB <= 65536",
    "context.memoryMiB + 9223372036854700000 > 0",
    "principal.site == context.route.dstSite",
    "principal in Sealane::GatewayGroup::\"dc2-gateways\"",
    "principal.trustDomain == \"dc2.example.net\"",
];
const REQUEST: &[&str] = &["context has changeTicket && context.changeTicket like \"CHG-*\"", "principal.mfa", "context has changeTicket"];
const RESOLVE: &[&str] =
    &["context.approvers.contains(principal)", "context.fenceEvidence", "principal.mfa", "principal in Sealane::Team::\"sre\""];

/// Every form of a scope, more often the wide ones, or few policies would match.
const GATEWAYS: &[&str] = &[
    "principal is Sealane::Gateway",
    "principal is Sealane::Gateway",
    "principal",
    "principal in Sealane::GatewayGroup::\"dc2-gateways\"",
    "principal == Sealane::Gateway::\"spiffe://dc2.example.net/gateway/gw-b\"",
    "principal is Sealane::Gateway in Sealane::GatewayGroup::\"dc2-gateways\"",
];
const OPERATORS: &[&str] = &["principal is Sealane::Operator", "principal", "principal in Sealane::Team::\"sre\""];
const HANDED_OVER: &[&str] = &[
    "action in [Sealane::Action::\"release\", Sealane::Action::\"accept\", Sealane::Action::\"commit\"]",
    "action == Sealane::Action::\"release\"",
    "action",
];
const VMS: &[&str] = &[
    "resource",
    "resource",
    "resource is Sealane::Vm",
    "resource in Sealane::VmGroup::\"tenant-acme\"",
    "resource == Sealane::Vm::\"00000000-0000-0000-0000-000000000001\"",
    "resource is Sealane::Vm in Sealane::VmGroup::\"tenant-acme\"",
];

/// One that can load: what is never so is refused.
fn policy(random: &mut Random, id: usize) -> String {
    type Kind<'a> = (&'a [&'a str], &'a [&'a str], &'a [&'a [&'a str]]);
    let kinds: [Kind<'_>; 3] = [
        (GATEWAYS, HANDED_OVER, &[ALWAYS, WITH_STREAM, MIGRATION]),
        (OPERATORS, &["action in [Sealane::Action::\"request\"]"], &[ALWAYS, WITH_STREAM, REQUEST]),
        (OPERATORS, &["action == Sealane::Action::\"resolveInDoubt\""], &[ALWAYS, RESOLVE]),
    ];
    loop {
        let (principals, actions, atoms) = kinds[random.below(kinds.len())];
        let (principal, action, resource) = (random.of(principals), random.of(actions), random.of(VMS));
        let mut condition = String::new();
        for number in 0..3 {
            let group = atoms[random.below(atoms.len())];
            let (atom, not) = (random.of(group), if random.below(4) == 0 { "!" } else { "" });
            let joined = random.of(&["&&", "||"]);
            condition = if number == 0 { format!("{not}({atom})") } else { format!("({condition}) {joined} {not}({atom})") };
        }
        let (effect, clause) = (random.of(&["permit", "permit", "permit", "forbid"]), random.of(&["when", "unless"]));
        let text = format!("@id(\"p{id}\") {effect} ({principal}, {action}, {resource}) {clause} {{ {condition} }};\n");
        if PolicySet::parse(&[file("a.cedar", &text)], &Entities::default()).is_ok() {
            return text;
        }
    }
}

fn migration(random: &mut Random) -> MigrationContext {
    let mut context = context();
    // Some of these cannot be written in Cedar at all.
    let now = [1_796_166_000_123, 0, 4_000_000_000_000, -62_167_219_200_000, -62_167_219_200_001, i64::MAX, i64::MIN];
    context.now_unix_ms = if random.below(4) == 0 { now[random.below(now.len())] } else { now[0] };
    context.route.src_site = random.of(&["dc1", "dc2", ""]).to_owned();
    context.route.dst_site = random.of(&["dc1", "dc2", "a \"quoted\" one\n"]).to_owned();
    context.route.peer_ip = random.of(&["10.20.3.4", "::ffff:10.1.1.1", "2001:db8::1", "192.0.2.1"]).parse().unwrap();
    context.channel.tls = random.of(&["1.3", "1.2"]).to_owned();
    context.channel.kx = random.of(&["X25519", "X25519MLKEM768"]).to_owned();
    context.channel.suite = random.of(&["TLS13_AES_128_GCM_SHA256", "TLS13_AES_256_GCM_SHA384"]).to_owned();
    context.channel.crl_fresh = random.below(2) == 0;
    context.channel.peer_cert_days_left = [-1, 0, 20, i64::MIN, i64::MAX][random.below(5)];
    context.stream.mode = [Mode::Precopy, Mode::Postcopy, Mode::Hybrid][random.below(3)];
    context.stream.compression = [Codec::None, Codec::Lz4, Codec::Zstd, Codec::Auto][random.below(4)];
    context.stream.compression_scope = [CodecScope::Page, CodecScope::Batch, CodecScope::Stream][random.below(3)];
    context.stream.length_padding = random.below(2) == 0;
    context.stream.durability = [Durability::None, Durability::Dest, Durability::Both][random.below(3)];
    context.stream.lanes = [1, 2, 4, 64][random.below(4)];
    context.memory_mib = [1, 4096, 100_000, i64::MAX.unsigned_abs()][random.below(4)];
    if random.below(40) == 0 {
        context.memory_mib = u64::MAX;
    }
    context
}

/// How the answers came about; `None` when the facts cannot be put to Cedar.
fn essence(answer: Result<Answer, String>) -> Option<(bool, Vec<String>, String)> {
    let answer = answer.ok().filter(|answer| answer.errors.first().is_none_or(|error| error.policy.is_some()))?;
    Some((answer.allowed, answer.ids, format!("{:?}", answer.errors)))
}

#[test]
fn slices_of_a_question_are_answered_as_the_whole() {
    let mut random = Random(20_261_128);
    let all: Vec<String> = (0..100).map(|id| policy(&mut random, id)).collect();
    let (mut allowed, mut failed, mut impossible) = (0, 0, 0);
    for _ in 0..60 {
        let some = 1 + random.below(12);
        let text: String = all.iter().filter(|_| random.below(all.len()) < some).map(String::as_str).collect();
        let set = set(if text.is_empty() { &all[0] } else { &text });
        for _ in 0..20 {
            let migration = migration(&mut random);
            let ticket = [None, Some("CHG-1".to_owned()), Some("other".to_owned())][random.below(3)].clone();
            let request = RequestContext {
                now_unix_ms: migration.now_unix_ms,
                route: migration.route.clone(),
                stream: migration.stream.clone(),
                change_ticket: ticket,
            };
            let approvers = [vec![], vec!["alice".to_owned()], vec!["bob".to_owned(), "alice".to_owned()]][random.below(3)].clone();
            let resolve = ResolveContext { now_unix_ms: migration.now_unix_ms, approvers, fence_evidence: random.below(2) == 0 };
            let peer = peer(random.of(&[DC1, DC2, "spiffe://dc3.example.net/gateway/new"]));
            let operator = random.of(&["alice", "nobody", ""]);
            let questions = [
                Question::Request(operator, &request),
                Question::Release(&peer, &migration),
                Question::Accept(&peer, &migration),
                Question::Commit(&peer, &migration),
                Question::Resolve(operator, &resolve),
            ];
            let (question, vm) = (&questions[random.below(questions.len())], vm([1, 2, 9][random.below(3)]));
            let sliced = essence(Ok(set.settle(vm, question, Adjust::Nothing)));
            assert_eq!(sliced, essence(set.ask_all(vm, question)), "{question:?}");
            match sliced {
                None => impossible += 1,
                Some((true, ..)) => allowed += 1,
                Some((_, _, errors)) => failed += usize::from(errors != "[]"),
            }
        }
    }
    // All kinds of answers were compared.
    assert!(allowed > 100 && failed > 20 && impossible > 20, "{allowed} {failed} {impossible}");
}
