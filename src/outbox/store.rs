//! The connection, and how a change reaches the file: each is made in memory first and, in the same transaction, moved to
//! the file; only new rows go there at once. What the file refuses stays in memory, and moves with the next change that it
//! takes. Runs on the thread that has the connection.

use std::collections::BTreeSet;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rusqlite::ffi::SQLITE_IOERR_SHORT_READ;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::entries::{self, Copied};
use super::file::Identity;
use super::schema::LAST_ID;
use super::{file, schema};
use crate::delta::micros;
use crate::error::Error;
use crate::limits;

#[derive(Debug)]
pub(super) struct Store {
    database: Connection,
    /// The file that this is; `None` in memory.
    file: Option<Identity>,
}

/// What the file's refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Another process has it locked. It will come back.
    Locked,
    /// It is no database any more.
    Corrupt,
    /// A full disk, a read-only file system, a failing one.
    Unwritable,
}

impl Refusal {
    pub(super) fn of(error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt,
            // The file ends before its pages do.
            _ if error.sqlite_extended_error_code() == Some(SQLITE_IOERR_SHORT_READ) => Self::Corrupt,
            _ => Self::Unwritable,
        }
    }
}

/// Whether what is in the file is at fault. Of some files that it cannot use, SQLite says no more than that this is an
/// error, and with one it comes to that only as it makes the first view: all that is done here does well on every other.
pub(super) fn is_of_the_content(error: &rusqlite::Error) -> bool {
    Refusal::of(error) == Refusal::Corrupt || error.sqlite_error_code() == Some(ErrorCode::Unknown)
}

/// A connection to the file at `path`. `Ok(Err(why))`: it is no outbox.
fn open(path: &Path, deadline: Instant) -> rusqlite::Result<Result<Connection, String>> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut database = Connection::open_with_flags(path, flags)?;
    database.busy_timeout(deadline.saturating_duration_since(Instant::now()))?;
    // Before anything is changed in it.
    if let Some(problem) = schema::problem(&database)? {
        return Ok(Err(problem.to_owned()));
    }
    let damage: String = database.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if damage != "ok" {
        return Ok(Err(damage));
    }
    database.pragma_update(None, "journal_mode", "wal")?;
    database.pragma_update(None, "synchronous", "full")?;
    schema::migrate(&mut database)?;
    schema::overlay(&database)?;
    Ok(Ok(database))
}

impl Store {
    /// A store that lasts as long as the process. Its ids begin at the clock: whatever file its rows come to one day, they
    /// are newer than what is in there.
    pub(super) fn in_memory() -> rusqlite::Result<Self> {
        let mut database = Connection::open_in_memory()?;
        schema::migrate(&mut database)?;
        schema::overlay(&database)?;
        Ok(Self { database, file: None })
    }

    /// The store in this file, made where there is none. `Ok(Err(why))`: the file is there and is no outbox.
    pub(super) fn at(path: &Path, deadline: Instant) -> Result<Result<Self, String>, Error> {
        file::prepare(path, deadline)
            .map_err(|source| Error::outbox(Some(path), "cannot be written").because(source))?;
        loop {
            return match open(path, deadline) {
                Ok(Ok(database)) => Ok(Ok(Self { database, file: Some(Identity::of(path)) })),
                Ok(Err(foreign)) => Ok(Err(foreign)),
                Err(error) if is_of_the_content(&error) => Ok(Err(error.to_string())),
                // To two that turn a new file to WAL at once SQLite says so without waiting.
                Err(error) if Refusal::of(&error) == Refusal::Locked && Instant::now() < deadline => {
                    thread::sleep(limits::OUTBOX_PAUSE);
                    continue;
                }
                Err(source) => Err(Error::outbox(Some(path), "cannot be opened").because(source)),
            };
        }
    }

    pub(super) fn is_file(&self) -> bool {
        self.file.is_some()
    }

    /// Whether `path` still leads to the file that this is.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        self.file.is_some_and(|identity| identity == Identity::of(path))
    }

    /// Everything in here is in the file, too.
    pub(super) fn is_written(&self) -> rusqlite::Result<bool> {
        let mut select = self.database.prepare_cached("SELECT NOT EXISTS (SELECT 1 FROM unwritten)")?;
        select.query_row([], |row| row.get(0))
    }

    pub(super) fn read<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        // Both or all of its statements see the same rows.
        let transaction = self.database.unchecked_transaction()?;
        let rows = read(&transaction)?;
        transaction.commit()?;
        Ok(rows)
    }

    /// Makes a change, and it and all that was not written yet are on the disk; or nothing has changed. `within`: how
    /// long another process' lock is waited for.
    pub(super) fn write<T>(
        &mut self,
        within: Duration,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.database.busy_timeout(within)?;
        let transaction = self.database.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done = change(&transaction)?;
        for step in [
            "DELETE FROM main.delta WHERE id IN (SELECT id FROM unwritten)",
            "INSERT INTO main.delta SELECT id, decky, operation, error, completed_at, rejected, owner, age
             FROM unwritten WHERE NOT gone ORDER BY id",
            // What came and went in memory has had its id, too.
            "UPDATE main.sqlite_sequence SET seq = (SELECT max(id) FROM unwritten)
             WHERE name = 'delta' AND seq < (SELECT max(id) FROM unwritten)",
            "DELETE FROM unwritten",
        ] {
            transaction.prepare_cached(step)?.execute([])?;
        }
        transaction.commit()?;
        Ok(done)
    }

    /// Makes a change in memory alone, since the file refused it.
    pub(super) fn remember<T>(
        &mut self,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let transaction = self.database.transaction_with_behavior(TransactionBehavior::Deferred)?;
        let done = change(&transaction)?;
        transaction.commit()?;
        Ok(done)
    }

    /// From here on ids lie far above the file's, to which other processes may add meanwhile. A row that is gone marks
    /// the place; writing forgets it.
    pub(super) fn leave_a_gap(&mut self) -> rusqlite::Result<()> {
        let gap = i64::from(fastrand::u32(..));
        let sql = format!(
            "INSERT INTO unwritten (id, gone)
             SELECT ?1 + max(?2, {LAST_ID}, ifnull((SELECT max(id) FROM unwritten), 0)), 1"
        );
        self.database.execute(&sql, [gap, micros(SystemTime::now())]).map(drop)
    }

    /// Takes over what another store has, this one's file permitting: all of it, or what it had not written. Of the rows
    /// that it may have had before, those that the other one does not know any more are gone.
    pub(super) fn take_over(
        &mut self,
        other: &Self,
        copied: Copied,
        before: &BTreeSet<i64>,
        within: Duration,
    ) -> rusqlite::Result<()> {
        self.write(within, |database| {
            entries::copy(&other.database, copied, database)?;
            entries::forget(database, before)
        })
    }
}
