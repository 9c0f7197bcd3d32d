//! `sealane demo`.

use super::Ending;
use super::output::Out;
use super::tools::DemoFlags;
use crate::control::Exit;

pub(super) fn demo(_: &DemoFlags, _: Out) -> Ending {
    Ok(Exit::Failed)
}
