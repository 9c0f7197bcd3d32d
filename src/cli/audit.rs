//! `sealane audit`.

use super::Ending;
use super::output::Out;
use super::tools::AuditCommand;
use crate::control::Exit;

pub(super) fn audit(_: &AuditCommand, _: Out) -> Ending {
    Ok(Exit::Failed)
}
