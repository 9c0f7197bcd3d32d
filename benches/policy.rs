//! How long one decision takes at 1,000 policies and 10,000 VMs, in microseconds.
//!
//! `cargo bench --bench policy -- [--policies 1000] [--vms 10000] [--decisions 100000] [--seed 1]`: a table on stderr, one JSON object on
//! stdout. Every decision is about another VM, in random order, and is asked as a gateway asks it: from the facts to the permit or the
//! denial, without the audit log.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people: the table and the object are its output")]

use std::error::Error;
use std::time::Instant;

use sealane::policy::{
    Channel, Codec, CodecScope, Durability, Entities, GatewayEntity, MigrationContext, Mode, PolicyFile, PolicySet, Route, Storage, Stream,
    VmEntity,
};
use sealane::types::{SpiffeId, VmUuid};

/// That of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Options {
    policies: usize,
    vms: usize,
    decisions: usize,
    seed: u64,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options { policies: 1000, vms: 10_000, decisions: 100_000, seed: 1 };
    // `--bench` is what cargo adds.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("`{argument}`: expected a value behind it"))?;
        let number: u64 = value.parse().map_err(|_| format!("`{argument} {value}`: expected a number"))?;
        match argument.as_str() {
            "--policies" => options.policies = usize::try_from(number.clamp(10, 100_000))?,
            "--vms" => options.vms = usize::try_from(number.clamp(1, 100_000))?,
            "--decisions" => options.decisions = usize::try_from(number.clamp(100, 10_000_000))?,
            "--seed" => options.seed = number,
            other => return Err(format!("`{other}` is unknown: expected --policies, --vms, --decisions or --seed").into()),
        }
    }
    Ok(options)
}

/// How policies are written; each kind has the floor that the project ships, and the rest are of tenants.
#[derive(Clone, Copy)]
enum Kind {
    /// The tenant is in the scope: `resource in VmGroup`.
    Scope,
    /// The tenant is in the condition: `resource.tenant == `.
    Condition,
    /// The tenant is in a form that no index finds, so Cedar looks at every policy.
    Plain,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Scope => "tenant in the scope",
            Self::Condition => "tenant in the condition",
            Self::Plain => "tenant where no index finds it",
        }
    }

    fn policy(self, number: usize) -> String {
        let action = "action in [Sealane::Action::\"release\", Sealane::Action::\"accept\", Sealane::Action::\"commit\"]";
        let (resource, condition) = match self {
            Self::Scope => (format!("resource in Sealane::VmGroup::\"tenant-{number}\""), "true".to_owned()),
            Self::Condition => ("resource".to_owned(), format!("resource.tenant == \"tenant-{number}\"")),
            Self::Plain => ("resource".to_owned(), format!("[\"tenant-{number}\"].contains(resource.tenant)")),
        };
        format!(
            "@id(\"t{number}\") permit (principal is Sealane::Gateway, {action}, {resource})\n\
             when {{ {condition} && principal.trustDomain == \"example.net\" && context.route.peerIp.isInRange(ip(\"10.0.0.0/8\")) }};\n"
        )
    }
}

fn set(kind: Kind, options: &Options) -> Result<PolicySet, Box<dyn Error>> {
    let floor = include_str!("../config/policy.d/10-floor.cedar");
    let tenants = options.policies.saturating_sub(3);
    let text: String = (0..tenants).map(|number| kind.policy(number)).collect();
    let files = [("10-floor.cedar", floor.to_owned()), ("20-tenants.cedar", text)];
    let files: Vec<PolicyFile> = files.into_iter().map(|(name, text)| PolicyFile { name: name.to_owned(), text }).collect();
    let mut entities = Entities::default();
    for number in 0..100 {
        entities.gateways.push(GatewayEntity { spiffe: peer(number)?, site: "dc2".to_owned(), groups: vec!["dc2".to_owned()] });
    }
    for number in 0..options.vms {
        let tenant = format!("tenant-{}", number % tenants);
        entities.vms.push(VmEntity {
            uuid: vm(number),
            name: format!("vm-{number}").parse()?,
            tenant: tenant.clone(),
            classification: "internal".to_owned(),
            home_site: "dc1".to_owned(),
            allowed_sites: vec!["dc1".to_owned(), "dc2".to_owned()],
            migratable: true,
            postcopy_ok: false,
            groups: vec![tenant, "all".to_owned()],
        });
    }
    Ok(PolicySet::parse(&files, &entities)?)
}

fn peer(number: usize) -> Result<SpiffeId, Box<dyn Error>> {
    Ok(format!("spiffe://example.net/gateway/gw-{number}").parse()?)
}

fn vm(number: usize) -> VmUuid {
    VmUuid((number as u128 + 1).to_be_bytes())
}

fn context(now_unix_ms: i64) -> Result<MigrationContext, Box<dyn Error>> {
    Ok(MigrationContext {
        now_unix_ms,
        route: Route { src_site: "dc1".to_owned(), dst_site: "dc2".to_owned(), peer_ip: "10.1.2.3".parse()? },
        channel: Channel {
            tls: "1.3".to_owned(),
            kx: "X25519MLKEM768".to_owned(),
            suite: "TLS13_AES_256_GCM_SHA384".to_owned(),
            crl_fresh: true,
            peer_cert_days_left: 30,
        },
        stream: Stream {
            mode: Mode::Precopy,
            compression: Codec::Auto,
            compression_scope: CodecScope::Stream,
            length_padding: false,
            durability: Durability::None,
            lanes: 2,
            storage: Storage::None,
        },
        memory_mib: 4096,
        disk_count: 0,
        disk_mib: 0,
    })
}

/// xorshift64*: any order will do.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap_or(0) % bound
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let mut rows = Vec::new();
    eprintln!("{:<32} {:>9} {:>9} {:>9} {:>9}", "µs a decision", "p50", "p99", "p99.9", "load ms");
    for kind in [Kind::Scope, Kind::Condition, Kind::Plain] {
        let began = Instant::now();
        let set = set(kind, &options)?;
        let load = began.elapsed().as_secs_f64() * 1e3;
        // What Cedar does by itself is slow: fewer do.
        let decisions = if matches!(kind, Kind::Plain) { options.decisions / 20 } else { options.decisions };
        let mut random = Random(options.seed.max(1));
        let mut taken = Vec::with_capacity(decisions);
        for number in 0..decisions {
            let (peer, vm) = (peer(random.below(100))?, vm(random.below(options.vms)));
            let context = context(1_796_166_000_000 + i64::try_from(number)?)?;
            let began = Instant::now();
            let permit = set.ask_release(&peer, vm, &context);
            taken.push(began.elapsed().as_secs_f64() * 1e6);
            drop(permit?);
        }
        taken.sort_by(f64::total_cmp);
        let at = |per_mille: usize| taken[(taken.len() * per_mille / 1000).min(taken.len() - 1)];
        eprintln!("{:<32} {:>9.1} {:>9.1} {:>9.1} {load:>9.0}", kind.name(), at(500), at(990), at(999));
        rows.push(serde_json::json!({
            "policies_written": kind.name(), "p50_microseconds": at(500), "p99_microseconds": at(990), "p999_microseconds": at(999),
            "load_milliseconds": load, "decisions": decisions,
        }));
    }
    let object = serde_json::json!({
        "schema": "sealane.bench-policy/1", "policies": options.policies, "vms": options.vms, "seed": options.seed, "results": rows,
    });
    println!("{object}");
    Ok(())
}
