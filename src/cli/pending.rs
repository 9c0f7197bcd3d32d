//! Commands whose modules are not part of this binary yet. They say so, and do nothing.

use super::flags::GatewayFlags;
use super::tools::{AuditCommand, BenchFlags, DemoFlags, PkiCommand, PolicyCommand, VmmCommand};
use super::{Ending, config};
use crate::telemetry::{ErrorClass, Problem};

pub(super) fn demo(_: &DemoFlags) -> Ending {
    missing("demo")
}

pub(super) fn gateway(flags: &GatewayFlags) -> Ending {
    config::load(&flags.config)?;
    missing("gateway")
}

pub(super) fn pki(_: &PkiCommand) -> Ending {
    missing("pki")
}

pub(super) fn policy(_: &PolicyCommand) -> Ending {
    missing("policy")
}

pub(super) fn audit(_: &AuditCommand) -> Ending {
    missing("audit")
}

pub(super) fn vmm(_: &VmmCommand) -> Ending {
    missing("vmm")
}

pub(super) fn bench(_: &BenchFlags) -> Ending {
    missing("bench")
}

fn missing(command: &str) -> Ending {
    Err(Problem::new(ErrorClass::Misuse, format!("`sealane {command}` is not built into this binary yet")).with_code("not-built"))
}
