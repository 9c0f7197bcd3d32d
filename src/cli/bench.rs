//! `sealane bench`.

use super::Ending;
use super::output::Out;
use super::tools::BenchFlags;
use crate::control::Exit;

pub(super) fn bench(_: &BenchFlags, _: Out) -> Ending {
    Ok(Exit::Failed)
}
