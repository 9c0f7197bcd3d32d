//! From a directory to a writer: check everything that was signed, set aside what was not.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use ring::digest;

use crate::audit::chain::{Chain, Head};
use crate::audit::commit::{Replace, Writer, replace};
use crate::audit::disk::{Disk, DiskFile, is_full};
use crate::audit::entry::{Entry, Event, hex};
use crate::audit::error::AuditError;
use crate::audit::note::{self, Checkpoint, Signer};
use crate::audit::peers;
use crate::audit::segment::{self, checkpoint_path, segment_path};
use crate::audit::walk::Walk;
use crate::limits;

/// A log ready to be written.
pub(super) struct Opened {
    pub(super) writer: Writer,
    pub(super) head: Checkpoint,
    pub(super) peers: BTreeMap<String, Checkpoint>,
    /// What has to be recorded before anything else.
    pub(super) entries: Vec<Entry>,
    pub(super) lock: Flock<File>,
}

pub(super) fn open(
    disk: Arc<dyn Disk>,
    dir: &Path,
    origin: &str,
    signer: Arc<dyn Signer>,
    segment_bytes_max: u64,
) -> Result<Opened, AuditError> {
    let refuse = |why: String| AuditError::Checkpoint { of: dir.display().to_string(), why };
    if !note::is_origin(origin) {
        return Err(refuse(format!("origin `{}` is empty, too long or has spaces", origin.escape_debug())));
    }
    prepare(dir)?;
    let lock = lock(dir)?;
    let head = match read_checkpoint(dir)? {
        Some(text) => note::open(&text, &signer.public_key()).map_err(refuse)?,
        None => begin(disk.as_ref(), dir, origin, signer.as_ref())?,
    };
    if head.origin != origin {
        return Err(refuse(format!("is of log `{}`, expected `{origin}`", head.origin)));
    }
    let (walk, peers) = check(dir, &head)?;
    let mut entries = Vec::new();
    if head.size == 0 {
        let created = Entry::new(Event::LogCreated).detail("origin", origin).detail("key_name", signer.name());
        entries.push(created.detail("public_key", hex(&signer.public_key())));
    }
    let (segment, segment_bytes, recovered) = resume(disk.as_ref(), dir, &walk)?;
    entries.extend(recovered);
    let mut writer = Writer {
        dir: dir.to_owned(),
        origin: origin.to_owned(),
        boot_id: boot_id(),
        signer,
        disk,
        segment,
        segment_bytes,
        segment_bytes_max,
        chain: Chain::from(head.head()),
        reserve: false,
    };
    // On a full disk the log opens all the same, for what is critical.
    writer.restore_reserve();
    Ok(Opened { writer, head, peers, entries, lock })
}

/// The directory exists, is one, and is nobody else's business.
fn prepare(dir: &Path) -> Result<(), AuditError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| AuditError::io("create directory", dir, error))?;
    let wrap = |error| AuditError::io("restrict directory", dir, error);
    if fs::metadata(dir).map_err(wrap)?.mode() & 0o077 != 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(wrap)?;
    }
    Ok(())
}

/// `audit verify` takes the lock for a moment to see whether anybody writes, so one refusal is not the last word.
fn lock(dir: &Path) -> Result<Flock<File>, AuditError> {
    let mut file = File::open(dir).map_err(|error| AuditError::io("open directory", dir, error))?;
    for _ in 0..LOCK_ATTEMPTS {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) => file = back,
            Err((_, errno)) => return Err(AuditError::io("lock directory", dir, errno.into())),
        }
        thread::sleep(Duration::from_millis(20));
    }
    Err(AuditError::Locked { dir: dir.to_owned() })
}

const LOCK_ATTEMPTS: usize = 5;

pub(super) fn read_checkpoint(dir: &Path) -> Result<Option<String>, AuditError> {
    let path = checkpoint_path(dir);
    match segment::read_text(&path, limits::AUDIT_CHECKPOINT_BYTES_MAX) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(AuditError::io("read", &path, error)),
    }
}

/// A log begins with a signed head of nothing, so that entries without a checkpoint never are a new log.
fn begin(disk: &dyn Disk, dir: &Path, origin: &str, signer: &dyn Signer) -> Result<Checkpoint, AuditError> {
    if let Some(segment) = segment::list(dir)?.first() {
        return Err(AuditError::damaged(&segment.path, 0, "there are entries but no checkpoint"));
    }
    let refuse = |why: String| AuditError::Checkpoint { of: dir.display().to_string(), why };
    let head = note::sign(signer, origin, Head::EMPTY).map_err(refuse)?;
    let path = checkpoint_path(dir);
    replace(disk, dir, &path, head.text.as_bytes()).map_err(|error| match error {
        Replace::Before(what, error) | Replace::Fatal(what, error) => AuditError::io(what, &path, error),
    })?;
    Ok(head)
}

/// Reads everything that the checkpoint covers, and stops there.
fn check(dir: &Path, head: &Checkpoint) -> Result<(Walk, BTreeMap<String, Checkpoint>), AuditError> {
    let mut walk = Walk::new(dir)?;
    let mut peers = BTreeMap::new();
    while walk.head().size < head.size {
        match walk.next()? {
            Some(entry) => peers::replay(&mut peers, &entry),
            None => {
                let size = walk.head().size;
                return Err(AuditError::damaged(dir, size, format!("the checkpoint covers {} entries, the log has {size}", head.size)));
            }
        }
    }
    if walk.head() != head.head() {
        let last = head.size.saturating_sub(1);
        return Err(AuditError::damaged(dir, last, "the entries are not those that the checkpoint covers"));
    }
    Ok((walk, peers))
}

/// INVARIANT(signed-prefix): opens the last segment at the signed end; what lies behind it is set aside.
fn resume(disk: &dyn Disk, dir: &Path, walk: &Walk) -> Result<(DiskFile, u64, Option<Entry>), AuditError> {
    let size = walk.head().size;
    // A segment that begins where the checkpoint ends holds nothing signed; one is enough, and it is where the log goes on.
    let (path, signed) = match walk.position() {
        Some((segment, bytes)) => (segment.path.clone(), bytes),
        None => (segment_path(dir, size), 0),
    };
    let mut tail = Vec::new();
    read_tail(&path, signed, &mut tail)?;
    let ahead: Vec<PathBuf> = walk.ahead().iter().map(|segment| segment.path.clone()).filter(|ahead| *ahead != path).collect();
    for path in &ahead {
        read_tail(path, 0, &mut tail)?;
    }
    if tail.iter().filter(|byte| **byte == b'\n').count() > limits::AUDIT_BATCH_ENTRIES_MAX {
        let why = format!("more than {} entries after the last signed one, which no crash leaves", limits::AUDIT_BATCH_ENTRIES_MAX);
        return Err(AuditError::damaged(&path, size, why));
    }
    let wrap = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |error| AuditError::io(what, &path, error)
    };
    let recovered = if tail.is_empty() { None } else { Some(set_aside(disk, dir, size, &tail)?) };
    for path in &ahead {
        disk.remove(path).map_err(wrap("remove", path))?;
    }
    let file = disk.open(&path).map_err(wrap("open", &path))?;
    disk.truncate(&file, signed).map_err(wrap("truncate", &path))?;
    disk.sync(&file).map_err(wrap("fsync", &path))?;
    disk.sync_dir(dir).map_err(wrap("fsync the directory of", &path))?;
    Ok((file, signed, recovered))
}

/// More than one commit behind the checkpoint is no crash.
fn read_tail(path: &Path, from: u64, tail: &mut Vec<u8>) -> Result<(), AuditError> {
    let wrap = |error| AuditError::io("read", path, error);
    let mut file = match segment::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(wrap(error)),
    };
    file.seek(SeekFrom::Start(from)).map_err(wrap)?;
    let limit = u64::try_from(limits::AUDIT_BATCH_BYTES_MAX.saturating_sub(tail.len())).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(tail).map_err(wrap)?;
    if tail.len() > limits::AUDIT_BATCH_BYTES_MAX {
        let why = format!("more than {} bytes after the last signed entry, which no crash leaves", limits::AUDIT_BATCH_BYTES_MAX);
        return Err(AuditError::damaged(path, 0, why));
    }
    Ok(())
}

/// Keeps the bytes for whoever wants to look, and says so in the log.
fn set_aside(disk: &dyn Disk, dir: &Path, size: u64, tail: &[u8]) -> Result<Entry, AuditError> {
    let free = (0..limits::AUDIT_DROPPED_MAX).map(|n| format!("dropped-{size:020}-{n}")).find(|name| !dir.join(name).exists());
    let name = free.ok_or_else(|| AuditError::damaged(dir, size, "too many `dropped-` files at this place"))?;
    let path = dir.join(&name);
    let keep = || {
        disk.remove(&path)?;
        let file = disk.open(&path)?;
        disk.append(&file, tail)?;
        disk.sync(&file)
    };
    let kept = keep().or_else(|error| {
        if !is_full(&error) {
            return Err(error);
        }
        disk.remove(&dir.join("reserve"))?;
        keep()
    });
    kept.map_err(|error| AuditError::io("write", &path, error))?;
    let hash = digest::digest(&digest::SHA256, tail);
    let entry = Entry::new(Event::Recovered).detail("dropped_bytes", tail.len()).detail("dropped_sha256", hex(hash.as_ref()));
    Ok(entry.detail("kept_as", name))
}

fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let id = text.trim();
    if id.len() == 36 && id.is_ascii() { id.to_owned() } else { "unknown".to_owned() }
}
