//! `sealane policy`.

use super::Ending;
use super::output::Out;
use super::tools::PolicyCommand;
use crate::control::Exit;

pub(super) fn policy(_: &PolicyCommand, _: Out) -> Ending {
    Ok(Exit::Failed)
}
