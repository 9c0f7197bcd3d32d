//! Who may use whom, and what the pure core must not touch.

use crate::source::{File, Path, paths, tokens};

/// A module, its ring, and what of ours it may use. A new arrow between modules is a changed line here.
///
/// `a` allows `crate::a`; `a::B` only that path; `a@x` only inside the file or folder `x` of the module.
pub const MODULES: &[(&str, u8, &str)] = &[
    ("types", 0, ""),
    ("limits", 0, ""),
    ("failpoint", 0, ""),
    ("wire", 1, ""),
    ("memory", 1, "wire"),
    ("condense", 1, "memory"),
    ("migration", 1, "wire"),
    ("policy", 1, ""),
    ("companion", 2, ""),
    ("identity", 2, "companion"),
    ("audit", 2, ""),
    ("journal", 2, ""),
    ("transport", 2, "wire identity"),
    ("hypervisor", 2, "memory condense"),
    ("vmm", 2, "memory hypervisor"),
    ("storage", 2, "wire memory"),
    ("telemetry", 2, "wire memory"),
    ("engine", 3, "failpoint wire memory condense migration policy identity audit journal transport hypervisor storage telemetry"),
    ("control", 4, "telemetry"),
    ("config", 4, "policy"),
    (
        "gateway",
        4,
        "failpoint wire memory migration policy companion identity audit journal transport hypervisor storage telemetry engine control \
         config",
    ),
    (
        "cli",
        4,
        "failpoint config control gateway telemetry identity audit policy vmm hypervisor@demo \
         wire@bench migration@bench journal@bench transport@bench hypervisor@bench engine@bench",
    ),
];

/// What every module may use.
const FREE: &[&str] = &["types", "limits", "wire::ErrorClass"];

/// What ring 1 never names: the outside world comes in as arguments.
const OUTSIDE: &[&str] = &[
    "tokio",
    "quinn",
    "nix",
    "rand",
    "std::fs",
    "std::net",
    "std::os",
    "std::env",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
];

/// Exceptions to [`OUTSIDE`]: file or folder, path, why.
const OUTSIDE_ALLOWED: &[(&str, &str, &str)] = &[
    ("src/memory/ram.rs", "std::fs::File", "a memory file is handed in to be mapped; nothing is opened"),
    ("src/memory/ram.rs", "std::os", "the descriptor of that file"),
    ("src/policy/", "std::net::IpAddr", "an address is a value; nothing is opened"),
];

/// Where `unsafe` may appear, each with its `SAFETY:`.
const UNSAFE: &[&str] = &["src/vmm/kvm", "src/memory/ram.rs", "src/main.rs"];

/// Modules that may start tasks and threads.
const SPAWN: &[&str] = &["engine", "gateway", "transport", "vmm", "hypervisor"];

fn ring(module: &str) -> Option<u8> {
    MODULES.iter().find(|(name, ..)| *name == module).map(|(_, ring, _)| *ring)
}

fn starts(path: &[String], with: &str) -> bool {
    let want: Vec<_> = with.split("::").collect();
    path.len() >= want.len() && path.iter().zip(want).all(|(have, want)| have == want)
}

/// Paths into our own crate, without `crate::`. `super::` counts when it climbs out of the module.
fn own_paths(file: &File) -> Vec<Path> {
    let inside = file.path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    let depth = inside.split('/').count();
    let mut found = paths(&file.production);
    found.retain_mut(|path| {
        let supers = path.segments.iter().take_while(|s| *s == "super").count();
        let skip = match path.segments.first().map(String::as_str) {
            Some("crate" | "sealane") => 1,
            _ if supers >= depth => supers,
            _ => 0,
        };
        path.segments.drain(..skip);
        skip > 0 && !path.segments.is_empty()
    });
    found
}

/// Uses of other modules that the table does not allow.
pub fn uses(file: &File) -> Vec<String> {
    let Some(module) = file.module() else { return Vec::new() };
    let path = &file.path;
    let allowed: Vec<&str> = match module {
        "lib" => return Vec::new(),
        "main" => vec!["cli"],
        _ => match MODULES.iter().find(|(name, ..)| *name == module) {
            Some((.., allowed)) => allowed.split_whitespace().chain(FREE.iter().copied()).chain([module]).collect(),
            None => return vec![format!("{path}: module `{module}` is not in the ring table of tests/tidy/rings.rs")],
        },
    };
    let permits = |entry: &&str, used: &[String]| match entry.split_once('@') {
        Some((name, within)) => starts(used, name) && file.belongs_to(&format!("src/{module}/{within}")),
        None => starts(used, entry),
    };
    let refused = own_paths(file).into_iter().filter(|used| !allowed.iter().any(|entry| permits(entry, &used.segments)));
    refused.map(|used| format!("{path}:{}: `{module}` may not use `{}`", used.line, used.segments.join("::"))).collect()
}

/// The pure core names nothing that reaches outside the process or asks what time it is.
pub fn purity(file: &File) -> Vec<String> {
    if file.module().and_then(ring) != Some(1) {
        return Vec::new();
    }
    let outside = |path: &Path| {
        let allowed = |(name, what, _): &(&str, &str, &str)| file.path.starts_with(name) && starts(&path.segments, what);
        let named = |what: &&str| starts(&path.segments, what) || (what.ends_with("::now") && path.segments.join("::").ends_with(what));
        OUTSIDE.iter().any(named) && !OUTSIDE_ALLOWED.iter().any(allowed)
    };
    let found = paths(&file.production).into_iter().filter(outside);
    found.map(|path| format!("{}:{}: ring 1 may not name `{}`", file.path, path.line, path.segments.join("::"))).collect()
}

/// `unsafe` stands in the listed places only, and says why it is sound.
pub fn confined(file: &File) -> Vec<String> {
    let listed = UNSAFE.iter().any(|place| file.path.starts_with(place));
    let comments: Vec<_> = file.comments.lines().collect();
    let mut found = Vec::new();
    for token in tokens(&file.code) {
        if !matches!(token.text, "unsafe" | "unsafe_code") {
            continue;
        }
        let before = &comments[token.line.saturating_sub(8)..token.line];
        if !listed {
            found.push(format!("{}:{}: `{}` outside {}", file.path, token.line, token.text, UNSAFE.join(" and ")));
        } else if token.text == "unsafe" && !before.iter().any(|line| line.contains("SAFETY:") || line.contains("# Safety")) {
            found.push(format!("{}:{}: `unsafe` without a `SAFETY:` comment above it", file.path, token.line));
        }
    }
    found
}

/// Tasks and threads are started where somebody waits for them.
pub fn spawn(file: &File) -> Vec<String> {
    let Some(module) = file.module().filter(|module| !SPAWN.contains(module)) else { return Vec::new() };
    let starts_one = |path: &Path| {
        let whole = path.segments.join("::");
        ["tokio::spawn", "task::spawn", "task::spawn_local", "thread::spawn", "thread::Builder"].iter().any(|end| whole.ends_with(end))
            || whole.contains("thread::Builder::")
    };
    let found = paths(&file.production).into_iter().filter(starts_one);
    found.map(|path| format!("{}:{}: `{module}` may not start tasks: `{}`", file.path, path.line, path.segments.join("::"))).collect()
}

/// Every queue has a bound. `oneshot::channel()` holds one value and is fine.
pub fn queues(file: &File) -> Vec<String> {
    let tokens = tokens(&file.production);
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let named = matches!(token.text, "unbounded_channel" | "UnboundedSender" | "UnboundedReceiver" | "unbounded");
        let mut call = at + 1;
        if text(call) == "::" && text(call + 1) == "<" {
            call += tokens[call..].iter().position(|t| t.text == "(").unwrap_or(0);
        }
        let std_channel = token.text == "channel" && at > 1 && text(at - 2) == "mpsc" && text(call) == "(" && text(call + 1) == ")";
        if named || std_channel {
            found.push(format!("{}:{}: unbounded queue `{}`", file.path, token.line, token.text));
        }
    }
    for path in paths(&file.production) {
        if path.segments == ["std", "sync", "mpsc", "channel"] {
            found.push(format!("{}:{}: unbounded queue `std::sync::mpsc::channel`", file.path, path.line));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rule: fn(&File) -> Vec<String>, path: &str, text: &str, violations: usize) {
        let found = rule(&File::new(path, text));
        assert_eq!(found.len(), violations, "{path}: {text}: {found:?}");
    }

    #[test]
    fn the_table_points_inwards_and_has_no_cycle() {
        let mut waiting: Vec<(&str, Vec<&str>)> = Vec::new();
        for (module, own, allowed) in MODULES {
            let used: Vec<_> = allowed.split_whitespace().map(|entry| entry.split(['@', ':']).next().unwrap()).collect();
            for used in &used {
                assert!(ring(used).is_some_and(|ring| ring <= *own), "`{module}` points outwards to `{used}`");
            }
            waiting.push((module, used));
        }
        while !waiting.is_empty() {
            let names: Vec<_> = waiting.iter().map(|(name, _)| *name).collect();
            waiting.retain(|(_, used)| used.iter().any(|name| names.contains(name)));
            assert!(waiting.len() < names.len(), "a cycle among {names:?}");
        }
    }

    #[test]
    fn a_planted_arrow_between_modules_is_refused() {
        check(uses, "src/wire/frame.rs", "use crate::memory::PageSet;", 1);
        check(uses, "src/wire/frame.rs", "fn f() { super::super::memory::f(); }", 1);
        check(uses, "src/wire/frame.rs", "use super::control::Message; use super::ErrorClass;", 0);
        check(uses, "src/wire/mod.rs", "use super::memory::PageSet;", 1);
        check(uses, "src/transport/lane.rs", "use crate::{wire::Frame, engine::Lanes};", 1);
        check(uses, "src/memory/encode.rs", "let x = crate::transport::Lane::new();", 1);
        check(uses, "src/audit/mod.rs", "use crate::wire::{ErrorClass, Message};", 1);
        check(uses, "src/audit/mod.rs", "use crate::{limits, types::VmName, wire::ErrorClass};", 0);
        check(uses, "src/cli/migrate.rs", "use crate::engine::Engine;", 1);
        check(uses, "src/cli/bench.rs", "use crate::engine::Engine;", 0);
        check(uses, "src/cli/bench/run.rs", "use crate::engine::Engine;", 0);
        check(uses, "src/engine/mod.rs", "use crate::vmm::Vmm;", 1);
        check(uses, "src/engine/mod.rs", "// crate::gateway\nlet s = \"crate::gateway\";", 0);
        check(uses, "src/engine/mod.rs", "#[cfg(test)]\nmod tests {\n    use crate::gateway::X;\n}", 0);
        check(uses, "src/main.rs", "fn main() { sealane::gateway::run(); }", 1);
        check(uses, "src/main.rs", "fn main() { sealane::cli::run(); }", 0);
        check(uses, "src/novelty/mod.rs", "", 1);
    }

    #[test]
    fn the_pure_core_may_not_reach_outside() {
        for (text, violations) in [
            ("use tokio::sync::mpsc;", 1),
            ("use std::{fmt, fs::File};", 1),
            ("let now = std::time::Instant::now();", 1),
            ("use std::time::SystemTime; fn f() { SystemTime::now(); }", 1),
            ("std::process::exit(1)", 1),
            ("let x = rand::random();", 1),
            ("use std::time::{Duration, Instant}; fn f(now: Instant) {}", 0),
            ("#[cfg(test)]\nmod tests { use std::fs::File; }", 0),
        ] {
            check(purity, "src/migration/source.rs", text, violations);
            check(purity, "src/engine/source.rs", text, 0);
        }
        check(purity, "src/memory/ram.rs", "use std::fs::File;", 0);
        check(purity, "src/memory/ram.rs", "std::fs::read(path)", 1);
        check(purity, "src/policy/facts.rs", "use std::net::{IpAddr, UdpSocket};", 1);
    }

    #[test]
    fn unsafe_is_confined_and_explained() {
        check(confined, "src/wire/frame.rs", "// SAFETY: no\nunsafe { x() }", 1);
        check(confined, "src/wire/frame.rs", "#![expect(unsafe_code, reason = \"\")]", 1);
        check(confined, "src/wire/frame.rs", "// unsafe\nlet s = \"unsafe\";", 0);
        check(confined, "src/memory/ram.rs", "// SAFETY: mapped above\nunsafe { x() }", 0);
        check(confined, "src/memory/ram.rs", "unsafe { x() }", 1);
        check(confined, "src/vmm/kvm/vcpu.rs", "\n\n\n// SAFETY: far away\n\n\n\n\n\n\n\n\nunsafe { x() }", 1);
    }

    #[test]
    fn tasks_are_started_in_the_listed_modules_only() {
        check(spawn, "src/cli/watch.rs", "tokio::spawn(async {});", 1);
        check(spawn, "src/audit/log.rs", "std::thread::spawn(|| ());", 1);
        check(spawn, "src/audit/log.rs", "use std::thread; fn f() { thread::Builder::new(); }", 1);
        check(spawn, "src/cli/demo.rs", "Command::new(x).spawn();", 0);
        check(spawn, "src/engine/source.rs", "tokio::spawn(async {});", 0);
    }

    #[test]
    fn a_queue_without_a_bound_is_refused_everywhere() {
        for (text, violations) in [
            ("tokio::sync::mpsc::unbounded_channel()", 1),
            ("let (a, b) = mpsc::channel();", 1),
            ("let (a, b) = mpsc::channel::<Vec<u8>>();", 1),
            ("use std::sync::mpsc::{channel, Sender};", 1),
            ("let (a, b) = mpsc::channel(8); let c = oneshot::channel(); mpsc::channel::<u8>(4)", 0),
        ] {
            check(queues, "src/engine/lanes.rs", text, violations);
        }
    }
}
