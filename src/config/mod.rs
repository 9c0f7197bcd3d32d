//! The gateway's configuration file: as typed, then checked, then immutable.
//!
//! *Owns:* `gateway.toml`, its defaults, the units people write. *Never:* starts anything, changes
//! anything, or gives out a configuration that has a problem.
//! *Invariants:* `all-at-once` (every problem of a file is reported together, with line, column and
//! key), `no-bare-numbers` (bandwidths, sizes and durations have a unit).
//! *Read first:* `settings.rs` for what there is, `check.rs` for what is refused.

mod check;
mod disks;
mod files;
mod identity;
mod problem;
mod raw;
mod settings;
#[cfg(test)]
mod tests;
mod typed;
mod units;
mod values;

use std::io::Read;
use std::path::Path;

pub use problem::{ConfigError, ConfigProblem};
pub use raw::{Origin, Setting};
pub use settings::{
    Config, Disk, Gateway, Identity, Incoming, Limits, Migration, Operator, Peer, Policies, PolicyBundle, Template, Trust, Vm,
};
pub use units::{Bandwidth, ByteSize, InvalidQuantity, TimeSpan};
pub use values::{Address, Classification, Compression, DiskFormat, Durability, Existing, KeyFile, Label, Role, Sandboxing};

use crate::limits::CONFIG_BYTES_MAX;

/// Where the configuration is when nobody says otherwise.
pub const DEFAULT_FILE: &str = "/etc/sealane/gateway.toml";
/// Where the control socket is when nobody says otherwise.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/sealane/api.sock";

/// Reads and checks a file, and every file that it names.
///
/// # Errors
/// The file cannot be read, or has problems: all of them.
pub fn load(file: &Path) -> Result<Config, ConfigError> {
    let text = read_text(file)?;
    let mut draft = check::draft(&text, file);
    files::check(&mut draft.reader);
    draft.finish()
}

/// Checks a text without looking at any other file; `file` is what the text is called, and what
/// relative paths in it are relative to.
///
/// # Errors
/// The text has problems: all of them.
pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
    check::draft(text, file).finish()
}

/// Reads a file and checks its text alone.
///
/// # Errors
/// As [`parse`], or the file cannot be read.
pub fn load_text_only(file: &Path) -> Result<Config, ConfigError> {
    parse(&read_text(file)?, file)
}

fn read_text(file: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { file: file.to_owned(), source };
    let mut text = String::new();
    let opened = std::fs::File::open(file).map_err(unreadable)?;
    opened.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLarge { file: file.to_owned() });
    }
    Ok(text)
}
