//! `sealane pki`.

use super::Ending;
use super::output::Out;
use super::tools::PkiCommand;
use crate::control::Exit;

pub(super) fn pki(_: &PkiCommand, _: Out) -> Ending {
    Ok(Exit::Failed)
}
