//! Which files a gateway may use from its start on, by Landlock: the directories that its configuration names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use crate::config::{Config, Policies};

/// Rights that are denied wherever no rule gives them. What later kernels can deny besides is not asked for: connecting to the sockets
/// of VMMs is among it, and would need rules that nobody has tried.
const KNOWN: ABI = ABI::V7;

const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | RemoveDir | RemoveFile | MakeDir | MakeReg | Truncate
});
/// For a directory in which files that somebody else has made get and lose their names.
const NAME: BitFlags<AccessFs> = make_bitflags!(AccessFs::{RemoveFile | MakeReg});
/// For a directory in which a socket is bound and removed.
const BIND: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadDir | RemoveFile | MakeSock});

const OWN_THREADS: &str = "/proc/self/task";

/// A path, and what may be done at and below it.
pub(super) type Allowed = Vec<(PathBuf, BitFlags<AccessFs>)>;

/// What a gateway with this configuration needs.
pub(super) fn allowed(config: &Config) -> Allowed {
    let gateway = &config.gateway;
    let mut rights: BTreeMap<PathBuf, BitFlags<AccessFs>> = BTreeMap::new();
    let mut allow = |path: &Path, right: BitFlags<AccessFs>| *rights.entry(path.to_owned()).or_default() |= right;
    for directory in [&gateway.state_directory, &gateway.audit_directory] {
        allow(directory, WRITE);
    }
    allow(&gateway.runtime_directory, WRITE | AccessFs::MakeSock);
    for socket in [Some(&gateway.control_socket), gateway.view_socket.as_ref()].into_iter().flatten() {
        allow(around(socket), BIND);
    }
    match &config.policy {
        // What is in it changes, and where it is a link, what that points to.
        Policies::Directory(directory) if directory.is_symlink() => named(directory, &mut allow),
        Policies::Directory(directory) => allow(directory, READ),
        // A bundle is replaced as a whole.
        Policies::Bundle(bundle) => named(&bundle.directory, &mut allow),
    }
    // The launcher makes the files of disks.
    for file in config.vms.iter().flat_map(|vm| &vm.disks).filter_map(|disk| disk.file.as_deref()) {
        allow(around(file), NAME);
    }
    // How long a lane's thread waited for a processor.
    allow(Path::new(OWN_THREADS), READ);
    // When the audit log is opened, for its clock.
    for file in ["/proc/uptime", "/proc/sys/kernel/random/boot_id"] {
        allow(Path::new(file), AccessFs::ReadFile.into());
    }
    if names_are_resolved(config) {
        // The C library resolves names: its files are replaced, not changed, when networks come and go, and it loads libraries.
        for directory in ["/etc", "/run/systemd/resolve", "/run/nscd", "/lib", "/lib64", "/usr/lib", "/usr/lib64"] {
            allow(Path::new(directory), READ);
        }
    }
    #[cfg(feature = "failpoints")]
    if let Some(file) = std::env::var_os("SEALANE_FAILPOINT_FILE") {
        named(Path::new(&file), &mut allow);
    }
    rights.into_iter().collect()
}

/// Whether the C library is asked for addresses.
pub(super) fn names_are_resolved(config: &Config) -> bool {
    config.peers.iter().any(|peer| peer.address.is_name())
}

/// For who holds a key: the directory around its file, which is replaced when the key is another.
pub(super) fn around_key(key: &Path) -> Allowed {
    let mut allowed = Allowed::new();
    named(key, &mut |path, right| allowed.push((path.to_owned(), right)));
    allowed
}

/// A file or directory that people replace: the directory around it can be read, and the one around what it points to now.
fn named(path: &Path, allow: &mut impl FnMut(&Path, BitFlags<AccessFs>)) {
    allow(around(path), READ);
    if let Ok(real) = path.canonicalize() {
        allow(around(&real), READ);
    }
}

/// The directory around a path; never the root of all.
fn around(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.parent().is_some() => parent,
        _ => path,
    }
}

/// Everything else is denied to this thread, and to all that it starts. Gives the version of Landlock that does it.
pub(super) fn confine(allowed: &[(PathBuf, BitFlags<AccessFs>)]) -> Result<u32, String> {
    let wrong = |error: landlock::RulesetError| crate::telemetry::chain(&error);
    // systemd may be told through a socket without a path.
    let abstract_notify = std::env::var_os("NOTIFY_SOCKET").is_some_and(|socket| socket.as_encoded_bytes().starts_with(b"@"));
    let scopes = if abstract_notify { Scope::Signal.into() } else { Scope::from_all(KNOWN) };
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|ruleset| ruleset.scope(scopes))
        .and_then(Ruleset::create)
        .map_err(wrong)?;
    let mut ruleset = ruleset;
    for (path, rights) in allowed {
        // What is not there cannot be used, and what is needed says so itself.
        let Ok(opened) = PathFd::new(path) else { continue };
        let rights = if path.is_dir() { *rights } else { *rights & AccessFs::from_file(KNOWN) };
        ruleset = ruleset.add_rule(PathBeneath::new(&opened, rights)).map_err(|error| format!("`{}`: {}", path.display(), wrong(error)))?;
        if path == Path::new(OWN_THREADS) {
            // WHY: a rule is about an inode, and procfs makes a new one when nobody has the old one open.
            std::mem::forget(opened);
        }
    }
    let status = ruleset.restrict_self().map_err(wrong)?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Err("the kernel has it, but it is not enabled (`lsm=`)".to_owned()),
        (RulesetStatus::NotEnforced, _) => Err("this kernel does not have it".to_owned()),
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(effective_abi as u32),
        (_, _) => Err("the kernel does not say what it does".to_owned()),
    }
}
