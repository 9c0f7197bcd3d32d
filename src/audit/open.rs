//! From a directory to a writer: check everything that was signed, set aside what was not.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use ring::digest;

use crate::audit::commit::Writer;
use crate::audit::disk::{Disk, DiskFile, is_full};
use crate::audit::entry::{Entry, Event, hex};
use crate::audit::error::AuditError;
use crate::audit::keys::{Keys, named_key, open_own};
use crate::audit::note::{self, Checkpoint, Signer};
use crate::audit::peers::{Handoffs, Known};
use crate::audit::prune;
use crate::audit::segment::{self, checkpoint_path, segment_path};
use crate::audit::tile::Publisher;
use crate::audit::tree::Tree;
use crate::audit::walk::{Walk, is_checkpoint_line, parse_checkpoint_line};
use crate::limits;

/// A log ready to be written.
pub(super) struct Opened {
    pub(super) writer: Writer,
    pub(super) head: Checkpoint,
    pub(super) keys: Keys,
    pub(super) known: Known,
    pub(super) handoffs: Handoffs,
    /// What has to be recorded before anything else.
    pub(super) entries: Vec<Entry>,
    pub(super) lock: Flock<File>,
}

/// `next` is a key that the log may have been handed over to, and that has not signed yet.
pub(super) fn open(
    disk: Arc<dyn Disk>,
    dir: &Path,
    origin: &str,
    signer: Arc<dyn Signer>,
    next: Option<[u8; 32]>,
    segment_bytes_max: u64,
) -> Result<Opened, AuditError> {
    let refuse = |why: String| AuditError::Checkpoint { of: dir.display().to_string(), why };
    if !note::is_origin(origin) {
        return Err(refuse(format!("origin `{}` is empty, too long or has spaces", origin.escape_debug())));
    }
    prepare(dir)?;
    let lock = lock(dir)?;
    let (read, mut walk, damage) = take_in(disk.as_ref(), dir, origin, &signer.public_key(), next)?;
    let size = walk.signed();
    let mut entries = Vec::new();
    if size == 0 {
        entries.push(log_names(Event::LogCreated, origin, signer.as_ref()));
    }
    let (segment, segment_bytes, recovered) = resume(disk.as_ref(), dir, &walk, damage)?;
    entries.extend(recovered);
    let head = match read.head {
        Some(head) => head,
        None => note::sign(signer.as_ref(), origin, walk.tree().head()).map_err(refuse)?,
    };
    // What a crash left behind the last commit is in the tree of the walk, but not in the log any more.
    let tree = if walk.tree().size() == size { walk.tree().clone() } else { tree_of(dir, size)? };
    let mut writer = Writer {
        dir: dir.to_owned(),
        origin: origin.to_owned(),
        boot_id: boot_id(),
        signer,
        disk,
        segment,
        segment_bytes,
        segment_bytes_max,
        tree,
        publisher: read.publisher,
        behind: false,
        reserve: false,
    };
    // On a full disk the log opens all the same, for what is critical.
    writer.restore_reserve();
    prune::finish(&writer, read.pruned).map_err(|error| AuditError::io("remove pruned segments of", dir, error))?;
    Ok(Opened { writer, head, keys: read.keys, known: read.known, handoffs: read.handoffs, entries, lock })
}

/// Reads everything that is signed, as `origin`'s and by this key, up to the end or the first thing that is wrong.
fn take_in(
    disk: &dyn Disk,
    dir: &Path,
    origin: &str,
    public_key: &[u8; 32],
    next: Option<[u8; 32]>,
) -> Result<(Read, Walk, Option<AuditError>), AuditError> {
    let refuse = |why: String| AuditError::Checkpoint { of: dir.display().to_string(), why };
    let mut read = Read::new(dir, named_key(dir).unwrap_or(*public_key));
    // It is written without a sync: a power cut may leave its name without its contents, or with a part of them.
    let published = match read_checkpoint(dir)?.map(|text| (note::open_bare(&text, public_key), text)) {
        Some((Ok(published), _)) => Some(published),
        Some((Err(why), text)) => {
            read.torn = Some((text, why));
            None
        }
        None => None,
    };
    let adopt = read.publisher.adopt();
    adopt.map_err(|error| AuditError::io("read tiles of", dir, error))?;
    let mut walk = Walk::new(dir)?;
    let damage = read.run(disk, &mut walk);
    // INVARIANT(key-chain).
    let handed_over = next.is_some_and(|next| read.keys.hands_over(public_key, &next));
    if let Some(head) = read.head.as_ref().filter(|_| !handed_over && !read.keys.ends_with(public_key)) {
        let why = note::open_bare(&head.text, public_key).err();
        return Err(refuse(
            why.unwrap_or_else(|| "is handed over to another key: `sealane audit rotate-key` goes on with that".to_owned()),
        ));
    }
    let published = match (published, read.torn.take()) {
        // One of an older key was left by a crash in the middle of a rotation.
        (None, Some((text, why))) => Some(open_own(&text, &read.keys).map_err(|_| refuse(why))?),
        (published, _) => published,
    };
    let size = walk.signed();
    for head in published.iter().chain(&read.head) {
        if head.origin != origin {
            return Err(refuse(format!("is of log `{}`, expected `{origin}`", head.origin)));
        }
    }
    if let Some(published) = published.filter(|published| published.size > size) {
        let why = format!("a checkpoint covers {} entries, the log has {size}", published.size);
        return Err(damage.unwrap_or_else(|| AuditError::damaged(dir, size, why)));
    }
    if walk.first() > read.pruned {
        let why = format!("entries 0 to {} are missing, and no entry says that they were given up", walk.first().saturating_sub(1));
        return Err(damage.unwrap_or_else(|| AuditError::damaged(dir, 0, why)));
    }
    Ok((read, walk, damage))
}

/// The entry that says whose log this is.
pub(super) fn log_names(event: Event, origin: &str, signer: &dyn Signer) -> Entry {
    let entry = Entry::new(event).detail("format", FORMAT).detail("origin", origin).detail("key_name", signer.name());
    entry.detail("public_key", hex(&signer.public_key()))
}

/// The format of lines, checkpoints and file names.
const FORMAT: &str = "sealane-audit/1";

/// What the entries of a log mean for whoever goes on with it.
struct Read {
    publisher: Publisher,
    known: Known,
    handoffs: Handoffs,
    head: Option<Checkpoint>,
    /// Entries before this one have been given up.
    pruned: u64,
    /// A text in the place of a checkpoint that is none, and why, until it is seen to be the beginning of one.
    torn: Option<(String, String)>,
    keys: Keys,
}

impl Read {
    fn new(dir: &Path, first_key: [u8; 32]) -> Self {
        let (known, handoffs, keys) = (Known::default(), Handoffs::default(), Keys::from(Some(first_key)));
        Self { publisher: Publisher::new(dir), known, handoffs, head: None, pruned: 0, torn: None, keys }
    }

    /// Reads up to the end or the first thing that is wrong, and makes tiles that are missing. INVARIANT(signed-prefix).
    fn run(&mut self, disk: &dyn Disk, walk: &mut Walk) -> Option<AuditError> {
        loop {
            let commit = match walk.next() {
                Ok(Some(commit)) => commit,
                Ok(None) => return None,
                Err(error) => return Some(error),
            };
            let size = commit.checkpoint.size;
            let key = self.keys.current().unwrap_or_default();
            if let Err(why) = note::open_bare(&commit.checkpoint.text, &key) {
                let why = format!("the checkpoint of {size} entries {why}");
                return Some(walk.unsign(&commit, why));
            }
            self.keys.pass(&commit.lines);
            let whole = &commit.checkpoint.text;
            self.torn.take_if(|(text, _)| text.len() < whole.len() && whole.starts_with(text.as_str()));
            for line in commit.lines {
                self.publisher.line(line.entry.index, &line.bytes);
                self.known.replay(&line.entry);
                self.pruned = self.pruned.max(prune::pruned_by(&line.entry).unwrap_or(0));
                if let (Event::Handoff, Some(migration), Ok(text)) = (line.entry.event, line.entry.migration, String::from_utf8(line.bytes))
                {
                    self.handoffs.extend(vec![(migration, line.entry.index, text)]);
                }
            }
            self.publisher.tiles(walk.tree().take_full());
            self.head = Some(commit.checkpoint);
            if let Err(error) = self.publisher.write_full(disk) {
                tracing::warn!(error = %error, "audit log: tiles are behind the log");
            }
        }
    }
}

/// The tree of the first `size` entries.
fn tree_of(dir: &Path, size: u64) -> Result<Tree, AuditError> {
    let mut walk = Walk::new(dir)?;
    while walk.signed() < size {
        if walk.next()?.is_none() {
            break;
        }
        walk.tree().take_full();
    }
    Ok(walk.tree().clone())
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

/// The text of the file `checkpoint`; nothing if it is not there or has only zeros. Cut in the middle of a letter, it is what is before.
pub(super) fn read_checkpoint(dir: &Path) -> Result<Option<String>, AuditError> {
    let path = checkpoint_path(dir);
    let bytes = match segment::read_file(&path, limits::AUDIT_CHECKPOINT_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(AuditError::io("read", &path, error)),
    };
    let whole = match std::str::from_utf8(&bytes) {
        Err(error) if error.error_len().is_none() => bytes.get(..error.valid_up_to()).unwrap_or_default(),
        _ => &bytes,
    };
    let text = String::from_utf8(whole.to_vec()).map_err(|error| AuditError::io("read", &path, io::Error::other(error)))?;
    Ok(Some(text).filter(|text| text.bytes().any(|byte| byte != 0)))
}

/// INVARIANT(signed-prefix): opens the last segment behind the last commit; what lies behind it is set aside, if a crash can have
/// left it.
fn resume(disk: &dyn Disk, dir: &Path, walk: &Walk, damage: Option<AuditError>) -> Result<(DiskFile, u64, Option<Entry>), AuditError> {
    let size = walk.signed();
    // A segment that begins where the last commit ends holds nothing acknowledged; one is enough, and it is where the log goes on.
    let (path, signed) = match walk.position() {
        Some((segment, bytes)) => (segment.path.clone(), bytes),
        None => (segment_path(dir, size), 0),
    };
    let mut tail = Vec::new();
    let first_damage = |error| damage.clone().unwrap_or(error);
    read_tail(&path, signed, size, &mut tail).map_err(first_damage)?;
    let ahead: Vec<PathBuf> = walk.ahead().iter().map(|segment| segment.path.clone()).filter(|ahead| *ahead != path).collect();
    for path in &ahead {
        read_tail(path, 0, size, &mut tail).map_err(first_damage)?;
    }
    if let Some(why) = no_crash(&tail) {
        return Err(damage.unwrap_or_else(|| AuditError::damaged(&path, size, why)));
    }
    if let Some(error) = damage.filter(|error| tail.is_empty() || !matches!(error, AuditError::Damaged { .. })) {
        return Err(error);
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

/// Why no crash can have left these bytes behind the last commit. A commit is one write, of which file systems keep a beginning, so
/// one that has its checkpoint was whole.
fn no_crash(tail: &[u8]) -> Option<String> {
    if tail.iter().filter(|byte| **byte == b'\n').count() > limits::AUDIT_BATCH_ENTRIES_MAX {
        return Some(format!("more than {} entries after the last signed one, which no crash leaves", limits::AUDIT_BATCH_ENTRIES_MAX));
    }
    let signed = |line: &[u8]| is_checkpoint_line(line) && parse_checkpoint_line(line).is_ok();
    tail.split(|byte| *byte == b'\n').any(signed).then(|| "the entries do not fit the checkpoint behind them".to_owned())
}

/// More than one commit behind the checkpoint is no crash.
fn read_tail(path: &Path, from: u64, size: u64, tail: &mut Vec<u8>) -> Result<(), AuditError> {
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
        return Err(AuditError::damaged(path, size, why));
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
