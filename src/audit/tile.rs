//! The tree and the entries in files that other programs read (C2SP tlog-tiles), under `tile/`: `0/…` and up have hashes,
//! `entries/…` has the lines, each behind its length.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::audit::disk::{Disk, is_full};
use crate::audit::segment;
use crate::audit::tree::{Hash, TILE_WIDTH, Tile, Tiles, Tree};
use crate::limits;

/// A file under `tile/`, as its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    /// The level of hashes; none for entries.
    pub(super) level: Option<usize>,
    pub(super) index: u64,
    /// 256, or fewer in the file of a tile that is not full.
    pub(super) width: usize,
}

impl Name {
    pub(super) fn hashes(level: usize, index: u64, width: usize) -> Self {
        Self { level: Some(level), index, width }
    }

    pub(super) fn entries(index: u64, width: usize) -> Self {
        Self { level: None, index, width }
    }

    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        let mut path = dir.join("tile");
        path.push(self.level.map_or_else(|| "entries".to_owned(), |level| level.to_string()));
        let mut groups = vec![format!("{:03}", self.index % 1000)];
        let mut rest = self.index / 1000;
        while rest > 0 {
            groups.push(format!("x{:03}", rest % 1000));
            rest /= 1000;
        }
        path.extend(groups.iter().rev());
        if self.width < TILE_WIDTH {
            let name = path.file_name().unwrap_or_default().to_os_string();
            path.set_file_name(format!("{}.p", name.to_string_lossy()));
            path.push(self.width.to_string());
        }
        path
    }

    /// The name of a path under `tile/`, if it is exactly that of a tile.
    fn of(dir: &Path, path: &Path) -> Option<Self> {
        let relative = path.strip_prefix(dir.join("tile")).ok()?;
        let mut parts: Vec<&str> = relative.iter().map(|part| part.to_str()).collect::<Option<_>>()?;
        let level = match parts.first()? {
            &"entries" => None,
            level => Some(level.parse().ok().filter(|level| *level < limits::AUDIT_TILE_LEVELS_MAX)?),
        };
        parts.remove(0);
        let mut width = TILE_WIDTH;
        if parts.len() >= 2 && parts.get(parts.len() - 2)?.ends_with(".p") {
            width = parts.pop()?.parse().ok().filter(|width| (1..TILE_WIDTH).contains(width))?;
        }
        let digits: String = parts.iter().map(|part| part.trim_start_matches('x').trim_end_matches(".p")).collect();
        let name = Self { level, index: digits.parse().ok()?, width };
        (name.path(dir) == path).then_some(name)
    }
}

/// The files under `tile/`.
pub(super) fn list(dir: &Path) -> io::Result<Vec<Result<Name, PathBuf>>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.join("tile")];
    while let Some(folder) = folders.pop() {
        let items = match fs::read_dir(&folder) {
            Ok(items) => items,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for item in items {
            let item = item?;
            if item.file_type()?.is_dir() {
                folders.push(item.path());
            } else {
                let path = item.path();
                found.push(Name::of(dir, &path).ok_or(path));
            }
            if found.len() > limits::AUDIT_TILES_MAX {
                return Err(io::Error::other(format!("more than {} files", limits::AUDIT_TILES_MAX)));
            }
        }
    }
    Ok(found)
}

/// The hashes of a tile's file, which must be as many as its name says.
pub(super) fn read_hashes(dir: &Path, name: Name) -> Result<Vec<Hash>, String> {
    let path = name.path(dir);
    let bytes = segment::read_file(&path, TILE_WIDTH * 32).map_err(|error| format!("tile `{}`: {error}", path.display()))?;
    if bytes.len() != name.width * 32 {
        return Err(format!("tile `{}` has {} bytes, expected {}", path.display(), bytes.len(), name.width * 32));
    }
    Ok(bytes.as_chunks::<32>().0.to_vec())
}

/// The bytes of a bundle's file.
pub(super) fn read_bundle(dir: &Path, name: Name) -> Result<Vec<u8>, String> {
    let path = name.path(dir);
    segment::read_file(&path, BUNDLE_BYTES_MAX).map_err(|error| format!("bundle `{}`: {error}", path.display()))
}

const BUNDLE_BYTES_MAX: usize = TILE_WIDTH * (limits::AUDIT_LINE_BYTES_MAX + 2);

/// Adds a line to a bundle. Lines are far shorter than the length can say.
pub(super) fn put_line(bundle: &mut Vec<u8>, line: &[u8]) {
    bundle.extend_from_slice(&u16::try_from(line.len()).unwrap_or(u16::MAX).to_be_bytes());
    bundle.extend_from_slice(line);
}

/// The first line of a bundle, and what is behind it.
pub(super) fn take_line(bundle: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bundle.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

/// What is in a log's directory.
pub(super) struct TilesOnDisk<'a> {
    pub(super) dir: &'a Path,
}

impl Tiles for TilesOnDisk<'_> {
    fn tile(&self, level: usize, index: u64, width: usize) -> Result<Vec<Hash>, String> {
        let full = Name::hashes(level, index, TILE_WIDTH);
        if fs::exists(full.path(self.dir)).unwrap_or(false) {
            return read_hashes(self.dir, full);
        }
        // The widest that is there has what narrower ones have.
        let widest = (width..TILE_WIDTH).rev().map(|width| Name::hashes(level, index, width)).find(|name| name.path(self.dir).exists());
        widest.map_or_else(|| Err(format!("tile `{}` is missing", full.path(self.dir).display())), |name| read_hashes(self.dir, name))
    }
}

/// Writes the files under `tile/`. They come from the segments and are written behind the commits, without a sync: whatever a crash
/// takes is made again when the log is opened.
#[derive(Debug)]
pub(super) struct Publisher {
    dir: PathBuf,
    /// Lines of the bundle that is not full yet.
    lines: Vec<u8>,
    lines_count: usize,
    /// Files of full tiles and bundles that are not written yet.
    pending: BTreeMap<Name, Vec<u8>>,
    /// Files of tiles that are not full.
    partial: Vec<Name>,
    /// The size of the tree when everything was last written.
    written: Option<u64>,
}

impl Publisher {
    /// Begins behind entry `first`, whose bundle is not written from here unless it is the first of one.
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), lines: Vec::new(), lines_count: 0, pending: BTreeMap::new(), partial: Vec::new(), written: None }
    }

    /// Takes over what an earlier writer left that was not full.
    pub(super) fn adopt(&mut self) -> io::Result<()> {
        self.partial = list(&self.dir)?.into_iter().filter_map(Result::ok).filter(|name| name.width < TILE_WIDTH).collect();
        Ok(())
    }

    /// Entry `index` was committed.
    pub(super) fn line(&mut self, index: u64, line: &[u8]) {
        put_line(&mut self.lines, line);
        self.lines_count += 1;
        let width = TILE_WIDTH as u64;
        if index % width == width - 1 {
            let bundle = std::mem::take(&mut self.lines);
            // Behind a pruned beginning the first bundle lacks lines, and is not one.
            if std::mem::take(&mut self.lines_count) == TILE_WIDTH {
                self.keep(Name::entries(index / width, TILE_WIDTH), bundle);
            }
        }
    }

    /// Tiles that became full.
    pub(super) fn tiles(&mut self, full: Vec<Tile>) {
        for Tile { level, index, hashes } in full {
            self.keep(Name::hashes(level, index, TILE_WIDTH), hashes.concat());
        }
    }

    /// While they cannot be written they wait, and beyond a bound the next opening makes them.
    fn keep(&mut self, name: Name, bytes: Vec<u8>) {
        self.pending.insert(name, bytes);
        while self.pending.len() > limits::AUDIT_TILES_PENDING_MAX {
            self.pending.pop_first();
        }
    }

    /// Full tiles that are not on disk yet.
    pub(super) fn pending(&self, level: usize, index: u64) -> Option<Vec<Hash>> {
        self.pending.get(&Name::hashes(level, index, TILE_WIDTH)).map(|bytes| bytes.as_chunks::<32>().0.to_vec())
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether there are entries whose tiles are not on disk.
    pub(super) fn is_behind(&self, tree: &Tree) -> bool {
        self.written != Some(tree.size())
    }

    /// Writes full tiles and bundles that wait.
    pub(super) fn write_full(&mut self, disk: &dyn Disk) -> io::Result<()> {
        while let Some((name, bytes)) = self.pending.first_key_value() {
            let path = name.path(&self.dir);
            if fs::metadata(&path).map_or(true, |metadata| metadata.len() != bytes.len() as u64) || !same(&path, bytes) {
                write(disk, &path, bytes)?;
            }
            self.pending.pop_first();
        }
        Ok(())
    }

    /// Writes everything up to the end of `tree`, and removes what is full by now or was shorter.
    pub(super) fn write_all(&mut self, disk: &dyn Disk, tree: &Tree) -> io::Result<()> {
        if !self.is_behind(tree) {
            return Ok(());
        }
        self.write_full(disk)?;
        let mut now = Vec::new();
        for Tile { level, index, hashes } in tree.partial() {
            let name = Name::hashes(level, index, hashes.len());
            self.write_partial(disk, name, &hashes.concat())?;
            now.push(name);
        }
        if self.lines_count > 0 && self.lines_count as u64 == tree.size() % TILE_WIDTH as u64 {
            let name = Name::entries(tree.size() / TILE_WIDTH as u64, self.lines_count);
            self.write_partial(disk, name, &self.lines)?;
            now.push(name);
        }
        for name in std::mem::replace(&mut self.partial, now) {
            if !self.partial.contains(&name) {
                let path = name.path(&self.dir);
                disk.remove(&path)?;
                if !self.partial.iter().any(|now| now.path(&self.dir).parent() == path.parent())
                    && let Some(parent) = path.parent()
                {
                    // It has others in it, or not.
                    let _ = fs::remove_dir(parent);
                }
            }
        }
        self.written = Some(tree.size());
        Ok(())
    }

    fn write_partial(&self, disk: &dyn Disk, name: Name, bytes: &[u8]) -> io::Result<()> {
        let path = name.path(&self.dir);
        if self.partial.contains(&name) && same(&path, bytes) { Ok(()) } else { write(disk, &path, bytes) }
    }
}

fn same(path: &Path, bytes: &[u8]) -> bool {
    segment::read_file(path, bytes.len()).is_ok_and(|found| found == bytes)
}

/// A reader sees the old file or the new one.
pub(super) fn write(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        disk.create_dir(parent)?;
    }
    let temporary = path.with_extension("tmp");
    let written = disk.remove(&temporary).and_then(|()| {
        let file = disk.open(&temporary)?;
        disk.give_blocks(&file, bytes.len());
        disk.append(&file, bytes)?;
        disk.rename(&temporary, path)
    });
    if let Err(error) = &written
        && is_full(error)
    {
        // Half a file would take the space that is missing.
        let _ = disk.remove(&temporary);
    }
    written
}
