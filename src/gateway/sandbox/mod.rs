//! What a gateway gives up before it does anything: its user, its capabilities, most files, most system calls.
//!
//! *Owns:* what a gateway may still do, whatever its peers make of it. *Never:* a file or call that nothing in `gateway/` needs.
//! *Invariant:* `before-threads`: all of it is given up by the first thread, before there is a second and before a byte of a peer,
//! an operator or a file of theirs was read. What VMMs are started with is not: `launcher/` is another process.
//! *Read first:* [`enter`], then `files.rs` and `calls.rs`.

mod calls;
mod files;
mod user;

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

pub(super) use user::{Account, become_user};

use crate::config::{Config, KeyFile, Sandboxing};
use crate::control::SandboxView;
use crate::gateway::IMAGES;
use crate::telemetry::Problem;
use crate::wire::ErrorClass;

/// Makes the gateway's directories, becomes its user, and gives up the rest.
///
/// # Errors
/// Something cannot be given up, and the configuration does not want to do without.
pub(super) fn enter(config: &Config, account: Option<&Account>) -> Result<SandboxView, Problem> {
    directories(config, account)?;
    if let Some(account) = account {
        become_user(account)?;
    }
    let mut view = SandboxView { setting: config.gateway.sandbox.to_string(), ..SandboxView::default() };
    if config.gateway.sandbox == Sandboxing::Off {
        tracing::warn!("`gateway.sandbox` is off: a peer that takes this process over has all that its user has");
        return Ok(view);
    }
    let given_up = rustix::thread::set_no_new_privs(true).map_err(Into::into).and_then(|()| user::clear_capabilities(user::kept(config)));
    given_up.map_err(|error| Problem::new(ErrorClass::Local, format!("privileges cannot be given up: {error}")))?;
    match files::confine(&files::allowed(config)) {
        Ok(abi) => view.landlock_abi = Some(abi),
        Err(why) => missing(config.gateway.sandbox, "Landlock", &why)?,
    }
    match calls::confine(files::names_are_resolved(config)) {
        Ok(()) => view.seccomp = true,
        Err(why) => missing(config.gateway.sandbox, "seccomp", &why)?,
    }
    view.keys_readable = view.landlock_abi.is_some() && keys_are_readable(config);
    Ok(view)
}

/// Whether this process can read the keys that it does not need: Landlock knows directories, and theirs may be one of those it needs.
fn keys_are_readable(config: &Config) -> bool {
    let identity = &config.identity;
    let readable = [&identity.key, &identity.signing_key].into_iter().filter_map(KeyFile::path).find(|key| File::open(key).is_ok());
    if let Some(key) = &readable {
        let why = "its directory is also one of policies, of disks, of the gateway's own, or of what resolves names of peers (`/etc`)";
        tracing::warn!(key = %key.display(), why, "a gateway that is taken over can read this key: keep it in a directory of its own");
    }
    readable.is_some()
}

/// Has no capabilities and gets none, leaves no memory behind when it dies, and is not looked into: what a companion of the gateway's
/// gives up that cannot be confined by a list.
///
/// # Errors
/// Something cannot be given up.
pub(super) fn without_privileges() -> std::io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    user::clear_capabilities(rustix::thread::CapabilitySet::empty())?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    Ok(rustix::process::setrlimit(rustix::process::Resource::Core, none)?)
}

/// What a process gives up that holds the key of a file, and does nothing but read that and sign: all files but those around it, all
/// system calls but a few, and more descriptors than it needs.
///
/// # Errors
/// Something cannot be given up, and the configuration does not want to do without.
pub(super) fn hold_key(setting: Sandboxing, key: &Path) -> Result<(), Problem> {
    if setting == Sandboxing::Off {
        return Ok(());
    }
    let few = rustix::process::Rlimit { current: Some(16), maximum: Some(16) };
    let lowered = rustix::process::setrlimit(rustix::process::Resource::Nofile, few);
    lowered.map_err(|error| Problem::new(ErrorClass::Local, format!("privileges cannot be given up: {error}")))?;
    if let Err(why) = files::confine(&files::around_key(key)) {
        missing(setting, "Landlock", &why)?;
    }
    if let Err(why) = calls::confine_holder() {
        missing(setting, "seccomp", &why)?;
    }
    Ok(())
}

fn missing(setting: Sandboxing, what: &str, why: &str) -> Result<(), Problem> {
    if setting == Sandboxing::Require {
        let problem = Problem::new(ErrorClass::Local, format!("no sandbox: {what}: {why}")).with_code("sandbox");
        return Err(problem.with_hint("`gateway.sandbox = \"auto\"` does without what this kernel does not have"));
    }
    tracing::warn!(what, why, "a part of the sandbox is missing");
    Ok(())
}

/// What this kernel has: the version of Landlock's interface, and whether it takes filters of system calls.
pub(crate) fn kernel() -> (Result<u32, String>, Result<(), String>) {
    // A thread of its own gives up all of it, and ends.
    let tried = std::thread::Builder::new().name("sandbox-probe".to_owned()).spawn(|| (files::confine(&[]), calls::confine(false)));
    let none = || "cannot be tried".to_owned();
    tried.ok().and_then(|thread| thread.join().ok()).unwrap_or_else(|| (Err(none()), Err(none())))
}

/// Directories have to be there before they can be named to the kernel, and belong to whom they are for.
fn directories(config: &Config, account: Option<&Account>) -> Result<(), Problem> {
    let gateway = &config.gateway;
    let sockets = [Some(&gateway.control_socket), gateway.view_socket.as_ref()];
    let shared = sockets.into_iter().flatten().filter_map(|socket| socket.parent()).chain([gateway.runtime_directory.as_path()]);
    let images = gateway.state_directory.join(IMAGES);
    let private = [gateway.state_directory.as_path(), images.as_path(), gateway.audit_directory.as_path()];
    for (directory, mode) in private.into_iter().map(|path| (path, 0o700)).chain(shared.map(|path| (path, 0o755))) {
        make(directory, mode, account)
            .map_err(|error| Problem::new(ErrorClass::Local, format!("directory `{}` cannot be made: {error}", directory.display())))?;
    }
    Ok(())
}

fn make(directory: &Path, mode: u32, account: Option<&Account>) -> std::io::Result<()> {
    // A relative path of one part has the empty one for a parent.
    if directory.as_os_str().is_empty() || directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        make(parent, 0o755, None)?;
    }
    std::fs::DirBuilder::new().mode(mode).create(directory)?;
    account.map_or(Ok(()), |account| std::os::unix::fs::chown(directory, Some(account.uid), Some(account.gid)))
}

#[cfg(test)]
mod tests;
