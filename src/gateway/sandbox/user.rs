//! Another user than root, and no capabilities.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User, geteuid, initgroups, setresgid, setresuid};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities};

use crate::config::Config;
use crate::telemetry::Problem;
use crate::wire::ErrorClass;

/// The user that the configuration names.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Account {
    /// # Errors
    /// There is no such user.
    pub(crate) fn find(name: &str) -> Result<Self, Problem> {
        let wrong = |why: String| Problem::new(ErrorClass::Misuse, format!("gateway.user: {why}")).with_code("configuration");
        let found = User::from_name(name).map_err(|error| wrong(format!("user `{name}`: {error}")))?;
        let found = found.ok_or_else(|| wrong(format!("there is no user `{name}` on this host")))?;
        Ok(Self { name: name.to_owned(), uid: found.uid.as_raw(), gid: found.gid.as_raw() })
    }
}

/// From here on this process is that user's, with the user's groups, for good.
///
/// # Errors
/// Only root can become somebody else.
pub(crate) fn become_user(account: &Account) -> Result<(), Problem> {
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    if geteuid() == uid {
        return Ok(());
    }
    let failed = |error: &dyn std::fmt::Display| {
        let message = format!("cannot become user `{}` from user id {}: {error}", account.name, geteuid());
        Problem::new(ErrorClass::Local, message).with_hint("start the gateway as root, or as that user, or remove `gateway.user`")
    };
    let name = CString::new(account.name.as_str()).map_err(|error| failed(&error))?;
    let changed = initgroups(&name, gid).and_then(|()| setresgid(gid, gid, gid)).and_then(|()| setresuid(uid, uid, uid));
    changed.map_err(|error| failed(&error))?;
    // The kernel has taken the capabilities with the user; somebody may have told it not to.
    clear_capabilities(CapabilitySet::empty()).map_err(|error| failed(&error))
}

/// What a gateway keeps: root that stays root reaches VMMs of other users, and asks for large socket buffers (with the filter of system
/// calls it cannot use the second for much else); and whoever may listen at a port that others may not, may go on.
pub(super) fn kept(config: &Config) -> CapabilitySet {
    let root = CapabilitySet::DAC_OVERRIDE | CapabilitySet::NET_ADMIN;
    let kept = if geteuid().is_root() { root } else { CapabilitySet::empty() };
    if config.gateway.listen.port() < 1024 { kept | CapabilitySet::NET_BIND_SERVICE } else { kept }
}

/// Has no capabilities from here on but these, as far as it had them.
pub(super) fn clear_capabilities(kept: CapabilitySet) -> std::io::Result<()> {
    let had = capabilities(None)?;
    // WHY: without ambient ones there is nothing to clear, and old kernels do not know the call.
    let _ = clear_ambient_capability_set();
    let kept = had.permitted & kept;
    Ok(set_capabilities(None, CapabilitySets { effective: kept & had.effective, permitted: kept, inheritable: CapabilitySet::empty() })?)
}
