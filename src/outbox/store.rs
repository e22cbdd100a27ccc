//! The rows in the file, or in a copy in memory while the file cannot be written. The same SQL runs
//! on both. The changes of the copy are merged into the file in one transaction with the next
//! change that succeeds there. Runs on the outbox thread.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::Level;
use rusqlite::{Connection, TransactionBehavior};

use super::copy::{self, MovedRows};
use super::file::{self, FileProblem, Identities, identities};
use super::locks::{Locks, WriteLock};
use super::queued::Role;
use super::rows::{EVERY_ID, RowCounts, Rows};
use super::schema;
use crate::error::{Error, chain, sanitize_path};
use crate::limits;
use crate::panics::quietly;

#[derive(Debug)]
pub(super) struct Store {
    /// The path of the file. `None`: the outbox is configured to be in memory.
    pub(super) path: Option<PathBuf>,
    /// `None`: the outbox is configured to be in memory, or has lost its file.
    pub(super) file: Option<OpenFile>,
    /// `None`: the file has all rows.
    copy: Option<Table>,
    /// The version of the file as of the last refresh of the copy.
    copy_version: Option<i64>,
    /// The last write failed for this reason.
    pub(super) refusal: Option<RefusedWrite>,
    /// When the wait for another process's lock timed out, if nothing was written since.
    pub(super) lock_timeout: Option<Instant>,
    pub(super) locks: Locks,
}

#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) table: Table,
    identities: Identities,
}

/// The file refused a write.
#[derive(Clone, Copy, Debug)]
pub(super) struct RefusedWrite {
    pub(super) problem: FileProblem,
    /// The file is not written before this time.
    pub(super) retry_at: Instant,
}

/// The file has not taken a change.
#[derive(Debug)]
pub(super) struct WriteFailure {
    pub(super) problem: FileProblem,
    pub(super) source: Box<dyn StdError + Send + Sync>,
}

impl From<io::Error> for WriteFailure {
    /// The write lock could not be acquired.
    fn from(source: io::Error) -> Self {
        let is_timeout = source.kind() == io::ErrorKind::TimedOut;
        let problem = if is_timeout { FileProblem::Locked } else { FileProblem::Unwritable };
        Self { problem, source: source.into() }
    }
}

impl From<rusqlite::Error> for WriteFailure {
    fn from(source: rusqlite::Error) -> Self {
        Self { problem: FileProblem::of(&source), source: source.into() }
    }
}

/// A connection, and what is known of its rows.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) db: Connection,
    /// The version for which the fields below are valid.
    version: Option<i64>,
    counts: RowCounts,
    last_id: Option<i64>,
}

impl Table {
    fn new(db: Connection) -> Self {
        Self { db, version: None, counts: RowCounts::default(), last_id: None }
    }

    /// Merges the copy, if there is one, and makes a change, in one transaction.
    fn change<T>(
        &mut self,
        token: &str,
        copy: Option<&Connection>,
        change: impl FnOnce(&mut Rows<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let transaction = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = version(&transaction)?;
        copy.map_or(Ok(()), |copy| copy::merge(copy, &transaction))?;
        let is_known = self.version == Some(version) && copy.is_none();
        let counts = if is_known { self.counts } else { RowCounts::of(&transaction, &EVERY_ID)? };
        let last_id = self.last_id.filter(|_| is_known);
        let mut rows = Rows { db: &transaction, counts, token, last_id };
        let result = change(&mut rows)?;
        let Rows { counts, last_id, .. } = rows;
        transaction.commit()?;
        // A change of this connection does not change the version.
        self.version = Some(version);
        self.counts = counts;
        self.last_id = last_id;
        Ok(result)
    }
}

/// The version of the database, which differs after each change by another connection.
pub(super) fn version(db: &Connection) -> rusqlite::Result<i64> {
    schema::value(db, "PRAGMA data_version", [])
}

impl Drop for Store {
    /// SQLite deletes the log by its name when the last connection is closed. The log may belong to
    /// another file by now.
    fn drop(&mut self) {
        if self.is_replaced()
            && let Some(file) = &self.file
        {
            // After an error the file is closed as usual.
            let _ = file::disable_checkpoint_on_close(&file.table.db);
        }
    }
}

impl Store {
    /// A store in memory, until it is [opened](Self::open).
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        Self {
            path,
            file: None,
            copy: None,
            copy_version: None,
            refusal: None,
            lock_timeout: None,
            locks: Locks::new(),
        }
    }

    /// Acquires the write lock, which is needed to open, change or close the file.
    pub(super) fn lock_for_writing(&mut self, deadline: Instant) -> io::Result<Arc<WriteLock>> {
        let Some(path) = &self.path else { return Ok(Arc::default()) };
        let lock = self.locks.lock_for_writing(path, deadline);
        if lock.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            self.lock_timeout = Some(Instant::now());
        }
        lock
    }

    /// Until when to wait for a lock of another process if the caller has no deadline. A caller
    /// that waits for the outbox to be opened gets the error before it gives up. If the last wait
    /// has just timed out, there is no other wait, because callers would have to wait for both.
    pub(super) fn lock_deadline(&self) -> Instant {
        let has_just_timed_out =
            self.lock_timeout.is_some_and(|at| at.elapsed() < limits::OUTBOX_RETRY);
        let timeout = limits::OUTBOX_BUSY - limits::OUTBOX_MARGIN;
        Instant::now() + if has_just_timed_out { Duration::ZERO } else { timeout }
    }

    /// Opens the file at its path. Moves there the rows in memory and those of a file that was
    /// replaced or is corrupt, but not the deleted ones. The new file records these as delivered,
    /// for processes that still have them in the older file.
    pub(super) fn open(
        &mut self,
        role: Role,
        deleted: impl IntoIterator<Item = i64>,
    ) -> Result<(), Error> {
        let Some(path) = self.path.clone() else { return Ok(()) };
        let deadline = self.lock_deadline();
        let _lock = self
            .lock_for_writing(deadline)
            .map_err(|source| self.error("cannot be opened", source))?;
        let moved = match role {
            Role::Deliver => MovedRows::Everything,
            _ if self.locks.another_delivers() => MovedRows::Ours,
            _ => MovedRows::OursAndUnowned,
        };
        // The old file is closed first, so that SQLite does not mix up the files beside it with
        // those of the new one.
        self.close_file(moved).map_err(|source| self.error("cannot be closed", source))?;
        let (db, identities) = file::open(&path, role, deadline)?;
        let mut table = Table::new(db);
        if let Some(copy) = &self.copy {
            table
                .change(&self.locks.token, Some(&copy.db), |rows| {
                    deleted.into_iter().try_for_each(|id| rows.delete_delivered(id))
                })
                .map_err(|source| self.error("cannot be written", source))?;
        }
        self.file = Some(OpenFile { table, identities });
        self.copy = None;
        self.refusal = None;
        Ok(())
    }

    /// Repairs an index that another program has truncated. Runs before the file is used, because
    /// an access to the missing part would kill the process.
    pub(super) fn repair_index(&self) {
        let Some(path) = &self.path else { return };
        let Some(file) = &self.file else { return };
        let [.., Some(index)] = file.identities else { return };
        // An error means that the index was deleted or replaced, which is handled elsewhere.
        if file::repair_index(path, index).unwrap_or(false) {
            self.log(
                Level::Error,
                "-shm of the outbox was truncated and is repaired; do not write to the outbox's files",
            );
        }
    }

    /// Closes a file that was replaced or is corrupt. Copies the rows to move; of a corrupt file,
    /// only the changes that it did not take.
    fn close_file(&mut self, moved: MovedRows) -> rusqlite::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        file::disable_checkpoint_on_close(&file.table.db)?;
        let is_corrupt = self.is_corrupt();
        let version = version(&file.table.db);
        self.refresh_copy()?;
        let Some(file) = &self.file else { return Ok(()) };
        let Some(copy) = &mut self.copy else { return Ok(()) };
        match is_corrupt {
            true => copy::refresh(&copy.db, None),
            false => copy::mark_moved(&copy.db, &file.table.db, moved, &self.locks.token),
        }?;
        copy.version = None;
        self.file = None;
        let is_copied = version.as_ref().is_ok_and(|version| self.copy_version == Some(*version));
        if !is_copied && !is_corrupt {
            let event = "outbox file was replaced; deltas that only it had are lost";
            let error: Box<dyn StdError> =
                version.map_or_else(Into::into, |_| "its rows cannot be read".into());
            self.log_problem(Level::Error, event, error.as_ref());
        }
        Ok(())
    }

    /// Whether the file at its path must be opened: it is not open, or it is corrupt.
    pub(super) fn needs_reopen(&self) -> bool {
        self.path.as_deref().is_some_and(|path| self.is_corrupt() || !self.has_open(path))
    }

    fn is_corrupt(&self) -> bool {
        self.refusal.is_some_and(|refusal| refusal.problem == FileProblem::Corrupt)
    }

    /// Whether the file at this path is the open one.
    fn has_open(&self, path: &Path) -> bool {
        self.file.as_ref().is_some_and(|file| file.identities == identities(path))
    }

    /// Whether a file is open, and the database, `-wal` or `-shm` at its path is another one or
    /// missing.
    pub(super) fn is_replaced(&self) -> bool {
        self.file.is_some() && self.path.as_deref().is_some_and(|path| !self.has_open(path))
    }

    /// Whether a file is open that does not have all rows.
    pub(super) fn is_unwritten(&self) -> bool {
        self.file.is_some() && self.copy.is_some()
    }

    /// Whether the file at its path has all rows.
    pub(super) fn is_on_disk(&self) -> bool {
        self.copy.is_none() && self.path.as_deref().is_some_and(|path| self.has_open(path))
    }

    /// The name for log lines.
    fn name(&self) -> String {
        self.path.as_deref().map_or_else(|| "memory".to_owned(), sanitize_path)
    }

    pub(super) fn log(&self, level: Level, event: &str) {
        quietly(|| log::log!(level, "{event}: outbox={}", self.name()));
    }

    pub(super) fn log_with(&self, level: Level, event: &str, fields: fmt::Arguments<'_>) {
        quietly(|| log::log!(level, "{event}: outbox={} {fields}", self.name()));
    }

    pub(super) fn log_problem(&self, level: Level, event: &str, error: &dyn StdError) {
        self.log_with(level, event, format_args!("error={:?}", chain(error)));
    }

    pub(super) fn error(
        &self,
        problem: &str,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Error {
        Error::outbox(self.path.as_deref(), problem).with_source(source)
    }

    /// The number of rows as of the last change.
    pub(super) fn row_counts(&self) -> Option<RowCounts> {
        let file = self.file.as_ref().map(|file| &file.table);
        let table = self.copy.as_ref().or(file)?;
        table.version.map(|_| table.counts)
    }

    pub(super) fn read<T>(
        &mut self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        let db = match &self.file {
            Some(file) if self.copy.is_none() => Ok(&file.table.db),
            _ => self.refresh_copy().map(|copy| &copy.db),
        };
        // All statements read the same snapshot.
        db.and_then(|db| read(&*db.unchecked_transaction()?))
            .map_err(|source| self.error("cannot be read", source))
    }

    /// Makes a change in the file, together with all changes that are only in memory. If the file
    /// does not take it, makes the change in memory and returns the failure, too. `change` receives
    /// the problem of the file.
    pub(super) fn change<T>(
        &mut self,
        lock: io::Result<Arc<WriteLock>>,
        deadline: Instant,
        change: impl Fn(&mut Rows<'_>, Option<FileProblem>) -> rusqlite::Result<T>,
    ) -> (rusqlite::Result<T>, Option<WriteFailure>) {
        let failure = match self.write(lock, deadline, |rows| change(rows, None)) {
            Ok(result) => return (Ok(result), None),
            Err(failure) => failure,
        };
        let problem = failure.as_ref().map(|failure| failure.problem);
        let token = self.locks.token.clone();
        let result = self
            .refresh_copy()
            .and_then(|copy| copy.change(&token, None, |rows| change(rows, problem)));
        (result, failure)
    }

    /// `Err(None)`: there is no file. A file that has just refused a write is not tried again.
    fn write<T>(
        &mut self,
        lock: io::Result<Arc<WriteLock>>,
        deadline: Instant,
        change: impl FnOnce(&mut Rows<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, Option<WriteFailure>> {
        let Some(file) = &mut self.file else { return Err(None) };
        if let Some(RefusedWrite { problem, .. }) =
            self.refusal.filter(|refusal| Instant::now() < refusal.retry_at)
        {
            let source = "the last write has just failed".into();
            return Err(Some(WriteFailure { problem, source }));
        }
        let token = &self.locks.token;
        let copy = self.copy.as_ref().map(|copy| &copy.db);
        let timeout = deadline.saturating_duration_since(Instant::now());
        let write = || -> Result<T, WriteFailure> {
            let _lock = lock?;
            file.table.db.busy_timeout(timeout)?;
            Ok(file.table.change(token, copy, change)?)
        };
        let result = write();
        match &result {
            Ok(_) => self.record_success(),
            Err(failure) if failure.problem == FileProblem::Locked => {
                self.lock_timeout = Some(Instant::now());
            }
            Err(failure) => self.record_refusal(failure),
        }
        result.map_err(Some)
    }

    fn record_success(&mut self) {
        self.copy = None;
        self.lock_timeout = None;
        if self.refusal.take().is_some() {
            self.log(Level::Error, "outbox file can be written again");
        }
    }

    /// Until the file takes a change again, new rows are in memory.
    fn record_refusal(&mut self, failure: &WriteFailure) {
        let retry_at = Instant::now() + limits::OUTBOX_RETRY;
        if self.refusal.replace(RefusedWrite { problem: failure.problem, retry_at }).is_none() {
            self.log_problem(
                Level::Error,
                "outbox file cannot be written; deltas are in memory and do not survive a restart",
                failure.source.as_ref(),
            );
        }
    }

    /// Returns the copy, with what other processes have changed in the file since the last refresh.
    pub(super) fn refresh_copy(&mut self) -> rusqlite::Result<&mut Table> {
        let copy = match self.copy.take() {
            Some(copy) => copy,
            None => {
                self.copy_version = None;
                Table::new(copy::open()?)
            }
        };
        let copy = self.copy.insert(copy);
        if let Some(file) = &self.file {
            // If the file cannot be read, the copy stays as it is.
            let version =
                version(&file.table.db).ok().filter(|version| self.copy_version != Some(*version));
            if version.is_some() && copy::refresh(&copy.db, Some(&file.table.db)).is_ok() {
                self.copy_version = version;
                copy.version = None;
            }
        }
        Ok(copy)
    }
}
