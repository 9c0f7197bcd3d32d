//! Dependencies: crates that move together, versions below which a crate is not safe, crates never used.

use toml::{Table, Value};

/// rust-vmm crates share types, so that two versions of one do not fit together.
const LOCK_STEP: &[&str] = &["kvm-bindings", "kvm-ioctls", "linux-loader", "seccompiler", "vm-memory", "vm-superio", "vmm-sys-util"];

/// First version without the known hole: crate, version, what it closed.
const FLOORS: &[(&str, &str, &str)] = &[
    ("kvm-ioctls", "0.19.1", "undefined behaviour in VcpuExit"),
    ("lz4_flex", "0.12.1", "RUSTSEC-2026-0041, memory leaked through invalid input"),
    ("quinn-proto", "0.11.15", "RUSTSEC-2026-0185, unbounded reassembly"),
    ("rustls", "0.23.18", "RUSTSEC-2024-0399, panic in the acceptor"),
    ("rustls-webpki", "0.103.13", "RUSTSEC-2026-0104, panic on a CRL before its signature is checked"),
    ("tokio", "1.44.2", "RUSTSEC-2025-0023, unsound broadcast channel"),
    ("vm-memory", "0.12.2", "CVE-2023-41051, out of bounds through a custom slice"),
];

/// Crates that must not come in, not even through others, and why.
const REFUSED: &[(&str, &str)] = &[
    ("openssl", "ring is the one crypto provider"),
    ("openssl-sys", "ring is the one crypto provider"),
    ("native-tls", "rustls is the one TLS"),
    ("bincode", "not maintained"),
    ("rustls-pemfile", "not maintained; rustls-pki-types reads PEM"),
    ("serde_yml", "unsound and not maintained"),
];

/// The crate that only tests may use, and who may bring it in. It is the other end of their key exchanges.
const TESTS_ONLY: (&str, &[&str]) = ("aws-lc-rs", &["rustls", "rustls-webpki"]);

fn locked(lock: &str) -> Vec<(String, String)> {
    let table: Table = lock.parse().expect("Cargo.lock is TOML");
    let packages = table.get("package").and_then(Value::as_array).expect("Cargo.lock has packages");
    let text = |package: &Value, key: &str| package.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    packages.iter().map(|package| (text(package, "name"), text(package, "version"))).collect()
}

fn numbers(version: &str) -> Vec<u64> {
    version.split(['-', '+']).next().unwrap_or_default().split('.').map(|part| part.parse().unwrap_or(0)).collect()
}

/// rust-vmm crates that are there twice or that `Cargo.toml` asks for in another version than is locked.
pub fn lock_step(manifest: &str, lock: &str) -> Vec<String> {
    let manifest: Table = manifest.parse().expect("Cargo.toml is TOML");
    let locked = locked(lock);
    let mut found = Vec::new();
    for name in LOCK_STEP {
        let versions: Vec<_> = locked.iter().filter(|(locked, _)| locked == name).map(|(_, version)| version.as_str()).collect();
        let dependency = manifest.get("dependencies").and_then(|table| table.get(name));
        let asked = dependency.and_then(|value| value.as_str().or_else(|| value.get("version")?.as_str()));
        match (asked, versions.as_slice()) {
            (Some(asked), [version]) if numbers(asked) == numbers(version) => {}
            (None, []) => {}
            _ => found.push(format!("`{name}`: Cargo.toml asks for {asked:?}, Cargo.lock has {versions:?}: expected the same one")),
        }
    }
    found
}

/// Locked crates below their floor.
pub fn floors(lock: &str) -> Vec<String> {
    let below = |(name, version): &(String, String)| {
        let floor = FLOORS.iter().find(|(known, ..)| known == name)?;
        (numbers(version) < numbers(floor.1)).then(|| format!("`{name}` {version}: expected {} or later: {}", floor.1, floor.2))
    };
    locked(lock).iter().filter_map(below).collect()
}

/// Locked crates that must not be there.
pub fn refused(lock: &str) -> Vec<String> {
    let reason = |(name, _): &(String, String)| {
        let entry = REFUSED.iter().find(|(refused, _)| refused == name)?;
        Some(format!("`{name}` is refused: {}", entry.1))
    };
    locked(lock).iter().filter_map(reason).collect()
}

/// What would bring the crate of tests into the program.
pub fn tests_only(manifest: &str, lock: &str) -> Vec<String> {
    let (name, holders) = TESTS_ONLY;
    let names = |word: &str| word.replace('_', "-").contains(name);
    let manifest: Table = manifest.parse().expect("Cargo.toml is TOML");
    let lock: Table = lock.parse().expect("Cargo.lock is TOML");
    let mut found = Vec::new();
    for table in ["dependencies", "build-dependencies", "features"] {
        for (key, value) in manifest.get(table).and_then(Value::as_table).into_iter().flatten() {
            if names(key) || names(&value.to_string()) {
                found.push(format!("Cargo.toml, [{table}]: `{key}` brings in `{name}`, which only tests may use"));
            }
        }
    }
    for package in lock.get("package").and_then(Value::as_array).into_iter().flatten() {
        let holder = package.get("name").and_then(Value::as_str).unwrap_or_default();
        let dependencies = package.get("dependencies").and_then(Value::as_array).into_iter().flatten();
        let uses = dependencies.filter_map(Value::as_str).any(|dependency| dependency.split(' ').next() == Some(name));
        if uses && !holders.contains(&holder) {
            found.push(format!("Cargo.lock: `{holder}` brings in `{name}`: expected only {holders:?}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(packages: &[(&str, &str)]) -> String {
        packages.iter().map(|(name, version)| format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n")).collect()
    }

    #[test]
    fn rust_vmm_crates_that_do_not_move_together_are_refused() {
        let manifest = "[dependencies]\nvm-memory = { version = \"0.18.0\" }\n";
        assert!(lock_step(manifest, &lock(&[("vm-memory", "0.18.0")])).is_empty());
        assert_eq!(lock_step(manifest, &lock(&[("vm-memory", "0.18.1")])).len(), 1);
        assert_eq!(lock_step(manifest, &lock(&[("vm-memory", "0.18.0"), ("vm-memory", "0.17.0")])).len(), 1);
        assert_eq!(lock_step(manifest, &lock(&[("vm-memory", "0.18.0"), ("vmm-sys-util", "0.14.0")])).len(), 1);
    }

    #[test]
    fn a_crate_below_its_floor_is_refused() {
        assert_eq!(floors(&lock(&[("quinn-proto", "0.11.14"), ("tokio", "1.9.0")])).len(), 2);
        assert!(floors(&lock(&[("quinn-proto", "0.11.15"), ("lz4_flex", "0.14.0"), ("other", "0.0.1")])).is_empty());
    }

    #[test]
    fn what_is_for_tests_alone_is_refused_elsewhere() {
        let lock = |holder: &str| format!("[[package]]\nname = \"{holder}\"\ndependencies = [\"aws-lc-rs\", \"ring\"]\n");
        let manifest = |table: &str| format!("[{table}]\nrustls = {{ version = \"0.23\", features = [\"aws_lc_rs\"] }}\n");
        assert_eq!(tests_only(&manifest("dev-dependencies"), &lock("rustls")), Vec::<String>::new());
        assert_eq!(tests_only(&manifest("dependencies"), &lock("rustls")).len(), 1);
        assert_eq!(tests_only(&manifest("dev-dependencies"), &lock("quinn-proto")).len(), 1);
    }

    #[test]
    fn a_refused_crate_is_refused() {
        assert_eq!(refused(&lock(&[("openssl", "0.10.0"), ("ring", "0.17.14")])).len(), 1);
    }
}
