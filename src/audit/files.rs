//! Whether the files under `tile/` are those of the log.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::audit::error::AuditError;
use crate::audit::tile::{self, Name};
use crate::audit::tree::{Hash, TILE_WIDTH, Tile, leaf_hash, tiles_in};
use crate::audit::walk::Walk;

/// The files under `tile/` beside what they must be.
pub(super) struct Files<'a> {
    dir: &'a Path,
    live: bool,
    names: BTreeSet<Name>,
    /// Files that are as they must be.
    pub(super) good: u64,
    /// A file of entries that the log does not have.
    pub(super) beyond: Option<PathBuf>,
}

impl<'a> Files<'a> {
    pub(super) fn list(dir: &'a Path, live: bool) -> Result<Self, AuditError> {
        let mut names = BTreeSet::new();
        for name in tile::list(dir).map_err(|error| AuditError::io("read tiles of", dir, error))? {
            match name {
                Ok(name) => drop(names.insert(name)),
                // A writer's file of a moment.
                Err(path) if path.extension().is_some_and(|extension| extension == "tmp") => {}
                Err(path) => return Err(AuditError::damaged(&path, 0, "its name is not one of a tile")),
            }
        }
        Ok(Self { dir, live, names, good: 0, beyond: None })
    }

    /// Tiles that must be there.
    pub(super) fn check_full(&mut self, full: Vec<Tile>) -> Result<(), AuditError> {
        for Tile { level, index, hashes } in full {
            let name = Name::hashes(level, index, TILE_WIDTH);
            let first = span(level).saturating_mul(index);
            // One that was listed before it was written.
            if self.live && !self.names.contains(&name) {
                continue;
            }
            self.check_hashes(name, &hashes)?;
            let bundle = Name::entries(index, TILE_WIDTH);
            // Those of entries that were given up are gone, or are going.
            if level == 0 && self.names.contains(&bundle) {
                self.check_bundle(bundle, &hashes, first)?;
            }
        }
        Ok(())
    }

    /// Tiles that are not full, and files that belong to no tile. What is there must be right, but may be of an earlier commit.
    pub(super) fn check_rest(&mut self, walk: &mut Walk) -> Result<(), AuditError> {
        let size = walk.tree().size();
        let from = walk.first().div_ceil(TILE_WIDTH as u64);
        if let Some(missing) = (from..size / TILE_WIDTH as u64).map(|index| Name::entries(index, TILE_WIDTH)).find(|name| self.lacks(*name))
        {
            let path = missing.path(self.dir);
            return Err(AuditError::damaged(&path, missing.index * TILE_WIDTH as u64, "the bundle is missing"));
        }
        for name in self.names.clone() {
            let level = name.level.unwrap_or(0);
            let (index, at) = (tiles_in(size, level), span(level).saturating_mul(name.index));
            let path = name.path(self.dir);
            let edge = walk.tree().edge(level);
            match (name.width == TILE_WIDTH, name.index.cmp(&index)) {
                (true, Ordering::Less) => {}
                (false, Ordering::Equal) if name.width <= edge.len() => {
                    let hashes = edge.get(..name.width).unwrap_or_default().to_vec();
                    match name.level {
                        Some(_) => self.check_hashes(name, &hashes)?,
                        None => self.check_bundle(name, &hashes, at)?,
                    }
                }
                // What became full is removed a moment later, or when the log is opened; nobody has to read it.
                (false, Ordering::Less) => {}
                _ if self.live => {}
                _ => self.beyond = Some(path),
            }
        }
        Ok(())
    }

    fn lacks(&self, name: Name) -> bool {
        !self.live && !self.names.contains(&name)
    }

    fn check_hashes(&mut self, name: Name, hashes: &[Hash]) -> Result<(), AuditError> {
        let level = name.level.unwrap_or(0);
        let at = span(level).saturating_mul(name.index);
        let damaged = |at: u64, why: String| AuditError::damaged(&name.path(self.dir), at, why);
        let found = match tile::read_hashes(self.dir, name) {
            Ok(found) => found,
            Err(_) if self.live && !name.path(self.dir).exists() => return Ok(()),
            Err(why) => return Err(damaged(at, why)),
        };
        if let Some(other) = found.iter().zip(hashes).position(|(found, hash)| found != hash) {
            let step = span(level) / TILE_WIDTH as u64;
            let at = at.saturating_add(step.saturating_mul(other as u64));
            return Err(damaged(at, format!("hash {other} of the tile is not that of the entries")));
        }
        self.good += 1;
        Ok(())
    }

    fn check_bundle(&mut self, name: Name, hashes: &[Hash], at: u64) -> Result<(), AuditError> {
        let damaged = |at: u64, why: String| AuditError::damaged(&name.path(self.dir), at, why);
        let bytes = match tile::read_bundle(self.dir, name) {
            Ok(bytes) => bytes,
            Err(_) if self.live && !name.path(self.dir).exists() => return Ok(()),
            Err(why) => return Err(damaged(at, why)),
        };
        let mut rest = bytes.as_slice();
        for (index, hash) in (at..).zip(hashes) {
            let (line, behind) =
                tile::take_line(rest).ok_or_else(|| damaged(index, "the bundle ends in the middle of an entry".to_owned()))?;
            if leaf_hash(line) != *hash {
                return Err(damaged(index, "the entry in the bundle is not that of the log".to_owned()));
            }
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(damaged(at, format!("the bundle has {} bytes too many", rest.len())));
        }
        self.good += 1;
        Ok(())
    }
}

/// Entries below one full tile.
fn span(level: usize) -> u64 {
    (TILE_WIDTH as u64).saturating_pow(u32::try_from(level).unwrap_or(u32::MAX).saturating_add(1))
}
