//! What this gateway must not forget: handoff records, where its VMs are, what operators propose, finished reports.
//!
//! *Owns:* one redb file, mode 0600, locked against a second process, and the gateway's incarnation.
//! *Never:* knows what a record means, decides anything, retries a failed disk.
//! *Invariants:* `durable-before-return` (a call that returned `Ok` survives a crash of process and
//! host), `incarnation` (new when the file is new, the same as long as it lives), `fail-stop` (after an
//! I/O error every call fails until the journal is opened again, and opening writes anew what may only be in the page cache).
//! *Read first:* [`Journal::append`]. All calls block; run them off the async threads.

mod error;
#[cfg(test)]
mod tests;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use redb::backends::FileBackend;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageBackend, TableDefinition, WriteTransaction,
};
use ring::rand::{SecureRandom, SystemRandom};

pub use error::JournalError;

use crate::limits::{HISTORY_COUNT_MAX, JOURNAL_RECORD_BYTES_MAX};
use crate::types::{Incarnation, MigrationId, VmName};

/// The journal of one gateway.
pub struct Journal {
    database: Database,
    path: PathBuf,
    incarnation: Incarnation,
    position: AtomicU64,
    /// The file, where there is one, for its blocks.
    file: Option<File>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("path", &self.path).field("incarnation", &self.incarnation).finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens the journal at `path`, or makes a new one with a new incarnation.
    ///
    /// # Errors
    /// The file cannot be made or read, another process has it, or it is not a journal of this version.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file_error = |source| JournalError::File { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(file_error)?;
        // redb would create the file with the umask's mode.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(file_error)?;
        write_back(file, path)?;
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(JournalError::opening(path))?;
        let mut journal = Self::on(database, path)?;
        journal.file = Some(OpenOptions::new().write(true).open(path).map_err(file_error)?);
        // A new file's name is only durable once its directory is.
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(file_error)?;
        Ok(journal)
    }

    /// Opens the journal that `storage` holds, or makes a new one there; `name` stands for its path in errors.
    ///
    /// # Errors
    /// The storage fails, or holds something that is not a journal of this version.
    pub fn with_storage(storage: impl StorageBackend, name: &str) -> Result<Self, JournalError> {
        let path = Path::new(name);
        write_again(&storage).map_err(|source| JournalError::File { path: path.to_owned(), source })?;
        let database = Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(storage);
        Self::on(database.map_err(JournalError::opening(path))?, path)
    }

    fn on(database: Database, path: &Path) -> Result<Self, JournalError> {
        let incarnation = incarnation(&database, path)?;
        let journal = Self { database, path: path.to_owned(), incarnation, position: AtomicU64::new(0), file: None };
        let position = journal.read(|transaction| Ok(transaction.open_table(COUNTERS)?.get(POSITION)?.map_or(0, |value| value.value())))?;
        journal.position.store(position, Ordering::Release);
        Ok(journal)
    }

    /// The identity of this journal.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// How many handoff records this journal has ever held. A journal that was restored from a copy says less than it once did.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Acquire)
    }

    /// Where the journal is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a handoff record; durable when this returns. Records of one migration count from 1.
    ///
    /// # Errors
    /// The record is too large, or the disk failed; then nothing is known to be written.
    pub fn append(&self, migration: MigrationId, record: &[u8]) -> Result<u64, JournalError> {
        self.bounded("handoff record", record)?;
        let (number, position) = self.write("append a handoff record to", |transaction| append_in(transaction, migration, record))?;
        self.position.fetch_max(position, Ordering::AcqRel);
        Ok(number)
    }

    /// Adds a handoff record and replaces a VM's placement: both or neither.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn append_and_place(&self, migration: MigrationId, record: &[u8], vm: &VmName, placement: &[u8]) -> Result<u64, JournalError> {
        self.bounded("handoff record", record)?;
        self.bounded("placement record", placement)?;
        let (number, position) = self.write("append a handoff record to", |transaction| {
            transaction.open_table(PLACEMENTS)?.insert(vm.as_str(), placement)?;
            append_in(transaction, migration, record)
        })?;
        self.position.fetch_max(position, Ordering::AcqRel);
        Ok(number)
    }

    /// Sees to it that the records of a handoff have room: a disk that is full is found here, where that costs nothing.
    ///
    /// # Errors
    /// The disk has no room, or failed.
    pub fn reserve(&self) -> Result<(), JournalError> {
        // Pages that are free inside the file ...
        let room = vec![0; ROOM_BYTES];
        self.write("make room in", |transaction| {
            transaction.open_table(ROOM)?.insert((), room.as_slice())?;
            Ok(())
        })?;
        self.write("make room in", |transaction| {
            transaction.open_table(ROOM)?.remove(())?;
            Ok(())
        })?;
        // ... and blocks of the disk behind every one of them.
        let file_error = |source| JournalError::File { path: self.path.clone(), source };
        let Some(file) = &self.file else { return Ok(()) };
        let length = file.metadata().map_err(file_error)?.len();
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, length) {
            // A file system that cannot promise this has to be believed.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(file_error(error.into())),
        }
    }

    /// The records of one migration, in order.
    ///
    /// # Errors
    /// The disk failed.
    pub fn records(&self, migration: MigrationId) -> Result<Vec<(u64, Vec<u8>)>, JournalError> {
        self.read(|transaction| {
            let table = transaction.open_table(RECORDS)?;
            let mut records = Vec::new();
            for entry in table.range((&migration.0, 0)..=(&migration.0, u64::MAX))? {
                let (key, record) = entry?;
                records.push((key.value().1, record.value().to_vec()));
            }
            Ok(records)
        })
    }

    /// When a record was added, in milliseconds since 1970-01-01 UTC by this host's clock. For people: nothing is decided by it.
    ///
    /// # Errors
    /// The disk failed.
    pub fn added_at(&self, migration: MigrationId, number: u64) -> Result<Option<i64>, JournalError> {
        self.read(|transaction| Ok(transaction.open_table(TIMES)?.get((&migration.0, number))?.map(|time| time.value())))
    }

    /// Every migration that has records, in no particular order.
    ///
    /// # Errors
    /// The disk failed.
    pub fn migrations(&self) -> Result<Vec<MigrationId>, JournalError> {
        self.read(|transaction| {
            let mut found: Vec<MigrationId> = Vec::new();
            for entry in transaction.open_table(RECORDS)?.iter()? {
                let migration = MigrationId(*entry?.0.value().0);
                if found.last() != Some(&migration) {
                    found.push(migration);
                }
            }
            Ok(found)
        })
    }

    /// Drops the records of a migration that both sides have finished.
    ///
    /// # Errors
    /// The disk failed.
    pub fn forget(&self, migration: MigrationId) -> Result<(), JournalError> {
        self.write("drop handoff records from", |transaction| {
            let range = (&migration.0, 0)..=(&migration.0, u64::MAX);
            transaction.open_table(RECORDS)?.retain_in(range.clone(), |_, _| false)?;
            transaction.open_table(TIMES)?.retain_in(range, |_, _| false)?;
            Ok(())
        })
    }

    /// Keeps what operators propose for a migration in doubt; one proposal for each.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn put_proposal(&self, migration: MigrationId, proposal: &[u8]) -> Result<(), JournalError> {
        self.bounded("proposal", proposal)?;
        self.write("keep a proposal in", |transaction| {
            transaction.open_table(PROPOSALS)?.insert(&migration.0, proposal)?;
            Ok(())
        })
    }

    /// Drops the proposal for a migration, if there is one.
    ///
    /// # Errors
    /// The disk failed.
    pub fn remove_proposal(&self, migration: MigrationId) -> Result<(), JournalError> {
        self.write("drop a proposal from", |transaction| {
            transaction.open_table(PROPOSALS)?.remove(&migration.0)?;
            Ok(())
        })
    }

    /// All proposals.
    ///
    /// # Errors
    /// The disk failed.
    pub fn proposals(&self) -> Result<Vec<(MigrationId, Vec<u8>)>, JournalError> {
        self.read(|transaction| {
            let mut proposals = Vec::new();
            for entry in transaction.open_table(PROPOSALS)?.iter()? {
                let (migration, proposal) = entry?;
                proposals.push((MigrationId(*migration.value()), proposal.value().to_vec()));
            }
            Ok(proposals)
        })
    }

    /// Replaces the placement record of a VM.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn put_vm(&self, vm: &VmName, placement: &[u8]) -> Result<(), JournalError> {
        self.bounded("placement record", placement)?;
        self.write("write a placement record to", |transaction| {
            transaction.open_table(PLACEMENTS)?.insert(vm.as_str(), placement)?;
            Ok(())
        })
    }

    /// Drops the placement record of a VM, if there is one.
    ///
    /// # Errors
    /// The disk failed.
    pub fn remove_vm(&self, vm: &VmName) -> Result<(), JournalError> {
        self.write("drop a placement record from", |transaction| {
            transaction.open_table(PLACEMENTS)?.remove(vm.as_str())?;
            Ok(())
        })
    }

    /// The placement record of a VM.
    ///
    /// # Errors
    /// The disk failed.
    pub fn vm(&self, vm: &VmName) -> Result<Option<Vec<u8>>, JournalError> {
        self.read(|transaction| Ok(transaction.open_table(PLACEMENTS)?.get(vm.as_str())?.map(|placement| placement.value().to_vec())))
    }

    /// All placement records, by name.
    ///
    /// # Errors
    /// The disk failed, or a name in the file is not a VM name.
    pub fn vms(&self) -> Result<Vec<(VmName, Vec<u8>)>, JournalError> {
        let placements = self.read(|transaction| {
            let mut placements = Vec::new();
            for entry in transaction.open_table(PLACEMENTS)?.iter()? {
                let (name, placement) = entry?;
                placements.push((name.value().to_owned(), placement.value().to_vec()));
            }
            Ok(placements)
        })?;
        let checked = |(name, placement): (String, Vec<u8>)| match name.parse() {
            Ok(name) => Ok((name, placement)),
            Err(source) => Err(JournalError::Name { path: self.path.clone(), source }),
        };
        placements.into_iter().map(checked).collect()
    }

    /// Keeps a finished report, and drops the oldest beyond `keep`.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn put_history(&self, report: &[u8], keep: u32) -> Result<(), JournalError> {
        self.bounded("report", report)?;
        let keep = u64::from(keep.min(HISTORY_COUNT_MAX));
        self.write("keep a report in", |transaction| {
            let mut table = transaction.open_table(HISTORY)?;
            let next = table.last()?.map_or(1, |(number, _)| number.value().saturating_add(1));
            table.insert(next, report)?;
            while table.len()? > keep {
                table.pop_first()?;
            }
            Ok(())
        })
    }

    /// The finished reports, newest first.
    ///
    /// # Errors
    /// The disk failed.
    pub fn history(&self) -> Result<Vec<Vec<u8>>, JournalError> {
        self.read(|transaction| {
            let mut reports = Vec::new();
            for entry in transaction.open_table(HISTORY)?.iter()?.rev() {
                reports.push(entry?.1.value().to_vec());
            }
            Ok(reports)
        })
    }

    fn bounded(&self, what: &'static str, bytes: &[u8]) -> Result<(), JournalError> {
        if bytes.len() > JOURNAL_RECORD_BYTES_MAX {
            return Err(JournalError::TooLarge { what, path: self.path.clone(), bytes: bytes.len() });
        }
        Ok(())
    }

    /// INVARIANT(durable-before-return): the one way to write.
    fn write<T>(&self, what: &'static str, change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T, JournalError> {
        write(&self.database, change).map_err(|source| JournalError::disk(what, &self.path, source))
    }

    fn read<T>(&self, look: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T, JournalError> {
        let result = self.database.begin_read().map_err(redb::Error::from).and_then(|transaction| look(&transaction));
        result.map_err(|source| JournalError::disk("read", &self.path, source))
    }
}

/// As [`write_again`], while no other process has the file.
fn write_back(file: File, path: &Path) -> Result<(), JournalError> {
    let file_error = |source| JournalError::File { path: path.to_owned(), source };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(JournalError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => return Err(file_error(source)),
    }
    let storage = FileBackend::new(file).map_err(JournalError::opening(path))?;
    write_again(&storage).map_err(file_error)
}

/// INVARIANT(durable-before-return): after a failed sync the page cache may show what is not on the disk, and call it clean:
/// no later sync would write it. A journal that was left like that is read back here, so all of it is made dirty and synced
/// before anything in it is believed. A crash in between leaves what a crash during the failed write would have left.
fn write_again(storage: &impl StorageBackend) -> std::io::Result<()> {
    let (mut at, length) = (0, storage.len()?);
    let mut piece = vec![0; PIECE_BYTES];
    while at < length {
        let bytes = piece.len().min(usize::try_from(length - at).unwrap_or(usize::MAX));
        storage.read(at, &mut piece[..bytes])?;
        storage.write(at, &piece[..bytes])?;
        at += bytes as u64;
    }
    if length > 0 { storage.sync_data() } else { Ok(()) }
}

fn write<T>(database: &Database, change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T, redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    let value = change(&transaction)?;
    transaction.commit()?;
    Ok(value)
}

/// The record's number within its migration, and the journal's position behind it.
fn append_in(transaction: &WriteTransaction, migration: MigrationId, record: &[u8]) -> Result<(u64, u64), redb::Error> {
    let mut table = transaction.open_table(RECORDS)?;
    let last = table.range((&migration.0, 0)..=(&migration.0, u64::MAX))?.next_back().transpose()?.map_or(0, |(key, _)| key.value().1);
    let next = last.saturating_add(1);
    table.insert((&migration.0, next), record)?;
    transaction.open_table(TIMES)?.insert((&migration.0, next), now_unix_ms())?;
    let mut counters = transaction.open_table(COUNTERS)?;
    let position = counters.get(POSITION)?.map_or(1, |value| value.value().saturating_add(1));
    counters.insert(POSITION, position)?;
    Ok((next, position))
}

fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Reads the incarnation, or makes the journal: every table, the format's version and a new incarnation.
fn incarnation(database: &Database, path: &Path) -> Result<Incarnation, JournalError> {
    let mut fresh = [0; 16];
    SystemRandom::new().fill(&mut fresh).map_err(|_| JournalError::Random)?;
    let (format, incarnation) = write(database, |transaction| {
        transaction.open_table(RECORDS)?;
        transaction.open_table(TIMES)?;
        transaction.open_table(PROPOSALS)?;
        transaction.open_table(PLACEMENTS)?;
        transaction.open_table(HISTORY)?;
        transaction.open_table(COUNTERS)?;
        let mut identity = transaction.open_table(IDENTITY)?;
        let format = identity.get("format")?.map(|value| value.value().to_vec());
        let known = identity.get("incarnation")?.map(|value| value.value().to_vec());
        if format.is_none() && known.is_none() {
            identity.insert("format", FORMAT)?;
            identity.insert("incarnation", fresh.as_slice())?;
            return Ok((FORMAT.to_vec(), fresh.to_vec()));
        }
        Ok((format.unwrap_or_default(), known.unwrap_or_default()))
    })
    .map_err(|source| JournalError::disk("open", path, source))?;
    if format != FORMAT {
        return Err(JournalError::Format { path: path.to_owned(), found: format.escape_ascii().to_string() });
    }
    let bytes = incarnation.try_into().map_err(|_| JournalError::NotAJournal { path: path.to_owned() })?;
    Ok(Incarnation(bytes))
}

/// Layout of the tables below.
const FORMAT: &[u8] = b"sealane.journal/1";
/// The whole file is a few hundred KiB; redb's default is 1 GiB.
const CACHE_BYTES: usize = 8 << 20;
/// What is read back at once when a journal is opened.
const PIECE_BYTES: usize = 64 << 10;

const IDENTITY: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("identity");
const RECORDS: TableDefinition<'_, (&[u8; 16], u64), &[u8]> = TableDefinition::new("records");
/// When each of [`RECORDS`] was added; a journal of an earlier program has none for its old ones.
const TIMES: TableDefinition<'_, (&[u8; 16], u64), i64> = TableDefinition::new("times");
const PROPOSALS: TableDefinition<'_, &[u8; 16], &[u8]> = TableDefinition::new("proposals");
const PLACEMENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("placements");
const HISTORY: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("history");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
/// What is written and removed again to make room.
const ROOM: TableDefinition<'_, (), &[u8]> = TableDefinition::new("room");
/// A handoff has at most five records of about 1 KiB, each in a commit that copies a few pages of 4 KiB.
const ROOM_BYTES: usize = 128 << 10;
/// The counter behind [`Journal::position`].
const POSITION: &str = "position";
