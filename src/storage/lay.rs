//! New, empty files for the disks of a VM that arrives, and how they go away when it does not.
//!
//! A file that is there already is never written to and never deleted: it is renamed, if the configuration lets it be, and renamed
//! back. Which files are ours the note says, by inode, so that a gateway that was killed in between does not take another's for its
//! own. What came of a disk whose VM did not come may be kept beside its place, under a name of ours, for the next attempt.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::types::MigrationId;

/// What a disk's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskFormat {
    /// The bytes of the disk, with holes.
    Raw,
    /// QEMU's own.
    Qcow2 {
        /// Bytes of a cluster.
        cluster_bytes: u64,
    },
}

/// Where a disk is laid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlace {
    /// The file, or a block device that is large enough.
    pub file: PathBuf,
    /// What it is.
    pub format: DiskFormat,
    /// How long the disk is.
    pub bytes: u64,
    /// Whether a file that is there makes room.
    pub set_aside: bool,
    /// Its place among the disks of the offer.
    pub disk: u16,
}

/// A disk could not be laid; nothing is left of the others.
#[derive(Debug, thiserror::Error)]
#[error("cannot lay a disk of {bytes} bytes at `{}`: {what}", .file.display())]
pub struct LayError {
    file: PathBuf,
    bytes: u64,
    what: String,
    #[source]
    source: Option<io::Error>,
}

/// Disks that were laid, as they are noted beside their twin.
#[derive(Debug)]
#[must_use = "disks are kept or undone"]
pub struct LaidDisks {
    note: PathBuf,
    laid: Vec<Laid>,
    held: Vec<u16>,
    /// Whether some of it was kept before.
    kept: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Laid {
    /// Where the file is made.
    made_at: PathBuf,
    file: PathBuf,
    aside: PathBuf,
    /// Device and number of the inode that was made.
    inode: (u64, u64),
}

impl LaidDisks {
    /// Has a file made for each place, by [`make_disk`] in a process that may, and gives it its name. `note` is written in between,
    /// and says what to undo if this gateway is killed.
    ///
    /// # Errors
    /// [`LayError`]; whatever was made is undone.
    pub fn lay(
        note: &Path,
        migration: MigrationId,
        places: &[DiskPlace],
        make: impl Fn(&DiskPlace) -> io::Result<bool>,
    ) -> Result<Self, LayError> {
        let mut disks = Self { note: note.to_owned(), laid: Vec::new(), held: Vec::new(), kept: false };
        for place in places {
            if let Err(error) = disks.lay_one(migration, place, &make) {
                disks.undo();
                return Err(error);
            }
        }
        Ok(disks)
    }

    fn lay_one(
        &mut self,
        migration: MigrationId,
        place: &DiskPlace,
        make: impl Fn(&DiskPlace) -> io::Result<bool>,
    ) -> Result<(), LayError> {
        let failed = |what: &str| {
            let (file, bytes, what) = (place.file.clone(), place.bytes, what.to_owned());
            move |source: io::Error| LayError { file, bytes, what, source: Some(source) }
        };
        let refused = |what: String| LayError { file: place.file.clone(), bytes: place.bytes, what, source: None };
        let there = match fs::symlink_metadata(&place.file) {
            Ok(there) => Some(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("it cannot be looked at")(error)),
        };
        // A volume is there before, and behind a link of LVM's.
        if fs::metadata(&place.file).is_ok_and(|there| there.file_type().is_block_device()) {
            if place.format != DiskFormat::Raw {
                return Err(refused("a block device holds `raw` only".to_owned()));
            }
            // Nobody takes it away, so an earlier attempt may have left something there.
            self.held.push(place.disk);
            return Ok(());
        }
        if there.as_ref().is_some_and(|there| !there.is_file()) {
            return Err(refused("something is there that is no file".to_owned()));
        }
        if there.is_some() && !place.set_aside {
            return Err(refused("a file is there already: remove it, or say `existing = \"set-aside\"` of this disk".to_owned()));
        }
        if make(place).map_err(failed("it cannot be made"))? {
            self.held.push(place.disk);
            self.kept = true;
        }
        let made_at = made_at(migration, place);
        let metadata = fs::symlink_metadata(&made_at).map_err(failed("it cannot be looked at"))?;
        let aside = beside(&place.file, &format!("before-{migration}"));
        self.laid.push(Laid {
            made_at: made_at.clone(),
            file: place.file.clone(),
            aside: aside.clone(),
            inode: (metadata.dev(), metadata.ino()),
        });
        self.write_note().map_err(failed("it cannot be noted"))?;
        if there.is_some() {
            fs::rename(&place.file, &aside).map_err(failed("the file that is there cannot be renamed"))?;
        }
        // A link does not replace what has come in between.
        fs::hard_link(&made_at, &place.file).map_err(failed("it cannot be given its name"))?;
        fs::remove_file(&made_at).map_err(failed("its first name cannot be removed"))
    }

    fn write_note(&self) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.note)?;
        file.write_all(&serde_json::to_vec(&self.laid)?)
    }

    /// The guest has them now. A file that was set aside stays where it is.
    pub fn keep(self) {
        // Whether it is there or not.
        let _ = fs::remove_file(&self.note);
    }

    /// Disks that an earlier attempt may have left something of.
    #[must_use]
    pub fn held(&self) -> &[u16] {
        &self.held
    }

    /// Removes what was laid, and puts back what was there before. Without anything new it is kept as it was kept before.
    pub fn undo(self) {
        let keep = self.kept;
        self.take_away(keep);
    }

    /// The same, and nothing is kept.
    pub fn discard(self) {
        self.take_away(false);
    }

    /// The same, but what has come is kept for another attempt.
    pub fn keep_for_later(self) {
        self.take_away(true);
    }

    fn take_away(self, keep: bool) {
        for Laid { made_at, file, aside, inode } in self.laid {
            for path in [&file, &made_at] {
                let ours = fs::symlink_metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == inode);
                if ours && keep && fs::rename(path, kept_at(&file)).is_ok() {
                    // From now on its time counts.
                    let _ = OpenOptions::new().write(true).open(kept_at(&file)).and_then(|kept| kept.set_modified(SystemTime::now()));
                    continue;
                }
                if ours && let Err(error) = fs::remove_file(path) {
                    tracing::error!(path = %path.display(), %error, "a disk that nobody needs is not removed");
                }
            }
            // Nothing that is there is replaced.
            if fs::symlink_metadata(&aside).is_ok() && fs::hard_link(&aside, &file).is_ok() {
                let _ = fs::remove_file(&aside);
            }
        }
        let _ = fs::remove_file(&self.note);
    }

    /// What a gateway that was killed has noted; nothing when there is no such note.
    #[must_use]
    pub fn noted(note: &Path) -> Option<Self> {
        let laid = serde_json::from_slice(&fs::read(note).ok()?).ok()?;
        Some(Self { note: note.to_owned(), laid, held: Vec::new(), kept: false })
    }
}

/// A name in the same directory.
fn beside(file: &Path, what: &str) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{what}"));
    file.with_file_name(name)
}

/// Where a disk's file is made, before it has its name.
fn made_at(migration: MigrationId, place: &DiskPlace) -> PathBuf {
    beside(&place.file, &format!("{migration}.new"))
}

/// Where the disk of a VM that did not come is kept.
fn kept_at(file: &Path) -> PathBuf {
    beside(file, "sealane-kept")
}

/// Takes what is kept of a disk for the one that is made; one of another form is removed.
fn take_kept(made_at: &Path, place: &DiskPlace) -> bool {
    let kept = kept_at(&place.file);
    let Ok(there) = fs::symlink_metadata(&kept) else { return false };
    let fits = there.is_file()
        && match place.format {
            DiskFormat::Raw => there.len() == place.bytes,
            DiskFormat::Qcow2 { .. } => qcow2_bytes(&kept).is_ok_and(|bytes| bytes == place.bytes),
        };
    let taken = fits && fs::symlink_metadata(made_at).is_err() && fs::rename(&kept, made_at).is_ok();
    if !taken {
        let _ = fs::remove_file(&kept);
    }
    taken
}

/// How long the disk of an image is (QEMU, `docs/interop/qcow2.rst`: magic, version, backing file, then size at byte 24).
fn qcow2_bytes(path: &Path) -> io::Result<u64> {
    let mut head = [0; 32];
    File::open(path)?.read_exact(&mut head)?;
    let [.., a, b, c, d, e, f, g, h] = head;
    // One with a backing file is none of ours.
    if !head.starts_with(b"QFI\xfb") || head.iter().skip(8).take(8).any(|byte| *byte != 0) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

/// Removes what is kept of a disk for longer than this; how long it has to stay, if it has.
#[must_use]
pub fn forget_kept(file: &Path, keep: Duration) -> Option<Duration> {
    let kept = kept_at(file);
    let age = fs::symlink_metadata(&kept).ok()?.modified().ok()?.elapsed().unwrap_or_default();
    let left = keep.checked_sub(age).filter(|left| !left.is_zero());
    if left.is_none()
        && let Err(error) = fs::remove_file(&kept)
    {
        tracing::error!(path = %kept.display(), %error, "a disk that nobody needs is not removed");
    }
    left
}

/// Makes the file of a disk under its first name: what is kept of it, or an empty one. Whether something was kept.
///
/// # Errors
/// It is not there then.
pub fn make_disk(migration: MigrationId, place: &DiskPlace) -> io::Result<bool> {
    let path = made_at(migration, place);
    if take_kept(&path, place) {
        return Ok(true);
    }
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    let formatted = match place.format {
        DiskFormat::Raw => made.set_len(place.bytes),
        DiskFormat::Qcow2 { cluster_bytes } => make_qcow2(&path, cluster_bytes, place.bytes),
    };
    formatted.inspect_err(|_| drop(fs::remove_file(&path))).map(|()| false)
}

/// Writes into a file that is there.
fn make_qcow2(path: &Path, cluster_bytes: u64, bytes: u64) -> io::Result<()> {
    let mut command = Command::new(QEMU_IMG);
    command.args(["create", "-q", "-f", "qcow2", "-o", &format!("cluster_size={cluster_bytes}")]).arg(path).arg(bytes.to_string());
    let failed = |error| io::Error::other(format!("`{QEMU_IMG}` cannot be run: {error}"));
    let output = command.stdin(Stdio::null()).output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said: String =
        String::from_utf8_lossy(&output.stderr).chars().filter(|c| !c.is_control()).take(limits::REASON_BYTES_MAX / 4).collect();
    Err(io::Error::other(said))
}

const QEMU_IMG: &str = "qemu-img";

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([7; 16]);

    fn place(file: &Path, set_aside: bool) -> DiskPlace {
        DiskPlace { file: file.to_owned(), format: DiskFormat::Raw, bytes: 1 << 20, set_aside, disk: 3 }
    }

    fn lay(note: &Path, places: &[DiskPlace]) -> Result<LaidDisks, LayError> {
        LaidDisks::lay(note, ID, places, |place| make_disk(ID, place))
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_laid_and_kept_or_undone() {
        let directory = tempfile::tempdir().unwrap();
        let (note, file) = (directory.path().join("note"), directory.path().join("disk"));
        let laid = lay(&note, &[place(&file, false)]).unwrap();
        assert_eq!(names(directory.path()), ["disk", "note"]);
        assert_eq!(fs::metadata(&file).unwrap().len(), 1 << 20);
        laid.undo();
        assert_eq!(names(directory.path()), [""; 0]);
        lay(&note, &[place(&file, false)]).unwrap().keep();
        assert_eq!(names(directory.path()), ["disk"]);
    }

    #[test]
    fn what_is_there_is_neither_written_nor_lost() {
        let directory = tempfile::tempdir().unwrap();
        let (note, file) = (directory.path().join("note"), directory.path().join("disk"));
        fs::write(&file, "mine").unwrap();
        let refused = lay(&note, &[place(&file, false)]).unwrap_err().to_string();
        assert!(refused.contains("set-aside"), "{refused}");
        let laid = lay(&note, &[place(&file, true)]).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().len(), 1 << 20);
        laid.undo();
        assert_eq!((fs::read_to_string(&file).unwrap().as_str(), names(directory.path())), ("mine", vec!["disk".to_owned()]));
        lay(&note, &[place(&file, true)]).unwrap().keep();
        let aside = directory.path().join(format!("disk.before-{ID}"));
        assert_eq!(fs::read_to_string(aside).unwrap(), "mine");
        // A directory is nobody's disk.
        let refused = lay(&note, &[place(directory.path(), true)]).unwrap_err().to_string();
        assert!(refused.contains("no file"), "{refused}");
    }

    #[test]
    fn one_that_cannot_be_laid_undoes_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let (note, file) = (directory.path().join("note"), directory.path().join("disk"));
        let nowhere = directory.path().join("nowhere/disk");
        lay(&note, &[place(&file, false), place(&nowhere, false)]).unwrap_err();
        assert_eq!(names(directory.path()), [""; 0]);
    }

    #[test]
    fn a_note_undoes_only_what_it_made() {
        let directory = tempfile::tempdir().unwrap();
        let (note, file) = (directory.path().join("note"), directory.path().join("disk"));
        let _killed = lay(&note, &[place(&file, false)]).unwrap();
        // Somebody puts another one there.
        let other = directory.path().join("other");
        fs::write(&other, "theirs").unwrap();
        fs::rename(&other, &file).unwrap();
        LaidDisks::noted(&note).unwrap().undo();
        assert_eq!(fs::read_to_string(&file).unwrap(), "theirs");
        assert!(LaidDisks::noted(&note).is_none());
    }

    #[test]
    fn what_is_kept_is_taken_by_the_next_attempt_and_forgotten_in_time() {
        let directory = tempfile::tempdir().unwrap();
        let (note, file) = (directory.path().join("note"), directory.path().join("disk"));
        fs::write(&file, "mine").unwrap();
        let laid = lay(&note, &[place(&file, true)]).unwrap();
        assert_eq!(laid.held(), [0; 0]);
        OpenOptions::new().write(true).open(&file).unwrap().write_all(b"copied").unwrap();
        laid.keep_for_later();
        assert_eq!(
            (fs::read_to_string(&file).unwrap().as_str(), names(directory.path())),
            ("mine", vec!["disk".into(), "disk.sealane-kept".into()])
        );
        assert!(forget_kept(&file, Duration::from_secs(600)).is_some());
        let laid = lay(&note, &[place(&file, true)]).unwrap();
        assert_eq!((laid.held(), &fs::read(&file).unwrap()[..6]), ([3].as_slice(), b"copied".as_slice()));
        // Whatever cannot go on with it keeps it.
        laid.keep_for_later();
        let longer = DiskPlace { bytes: 2 << 20, ..place(&file, true) };
        let laid = lay(&note, &[longer]).unwrap();
        assert_eq!((laid.held(), fs::read(&file).unwrap()[0]), ([0; 0].as_slice(), 0), "another size");
        laid.keep_for_later();
        assert_eq!(forget_kept(&file, Duration::ZERO), None);
        assert_eq!(names(directory.path()), ["disk"]);
    }

    #[test]
    fn an_image_says_how_long_its_disk_is() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("image");
        let mut head = b"QFI\xfb\0\0\0\x03".to_vec();
        head.extend([0; 16]);
        head.extend((5_u64 << 30).to_be_bytes());
        fs::write(&file, &head).unwrap();
        assert_eq!(qcow2_bytes(&file).unwrap(), 5 << 30);
        for at in [0, 15] {
            let mut other = head.clone();
            other[at] = 1;
            fs::write(&file, &other).unwrap();
            assert!(qcow2_bytes(&file).is_err());
        }
    }
}
