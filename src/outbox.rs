//! The only writer of `heartbeat.db`: a delta is in it from before `push` returns until the master has answered 2xx.
//!
//! - A commit is on the disk before it is acknowledged: WAL with `synchronous=FULL`.
//! - The file is its owner's alone (0600) from its first byte, and `-wal` and `-shm` take after it.
//! - A schema is made or migrated in one transaction, and `user_version` tells which it is.
//! - Where no file can be written the outbox is in memory, and says so.
//!
//! Called on the threads that push, and on the heartbeat thread, under one lock that is held for a statement or a
//! transaction, never for the network.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior, params};

use crate::delta::{LifecycleDelta, Outcome, from_micros, micros};
use crate::error::Error;
use crate::limits;

/// The outbox' name in the agent dir.
const FILE: &str = "heartbeat.db";

/// The schema's version. A migration adds a step to [`migrate`] and raises it.
const VERSION: i64 = 1;

/// Where deltas are kept until the master has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutboxLocation {
    /// `heartbeat.db` in the agent dir.
    #[default]
    AgentDir,
    /// This file.
    File(PathBuf),
    /// Memory: what is undelivered is lost when the process ends.
    Memory,
}

/// A delta with its place in the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) id: i64,
    pub(crate) delta: LifecycleDelta,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    database: Mutex<Connection>,
    path: Option<PathBuf>,
    waiting: AtomicU64,
}

impl Outbox {
    /// Opens the outbox, or one in memory where the file cannot be used; the second value then says why.
    pub(crate) fn open(location: &OutboxLocation, agent_dir: &Path) -> Result<(Self, Option<Error>), Error> {
        let path = match location {
            OutboxLocation::AgentDir => agent_dir.join(FILE),
            OutboxLocation::File(path) => path.clone(),
            OutboxLocation::Memory => return Ok((Self::in_memory()?, None)),
        };
        match Self::at(&path) {
            Ok(outbox) => Ok((outbox, None)),
            Err(error) => Ok((Self::in_memory()?, Some(error))),
        }
    }

    fn at(path: &Path) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::outbox(Some(path), "cannot be written").because(source);
        // Made by us, since SQLite would make it readable by others.
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => (),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
            Err(error) => return Err(failed(error)),
        }
        let flags =
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let opened = Connection::open_with_flags(path, flags).and_then(|mut database| {
            database.busy_timeout(limits::OUTBOX_BUSY)?;
            database.pragma_update(None, "journal_mode", "wal")?;
            database.pragma_update(None, "synchronous", "full")?;
            migrate(&mut database)?;
            let waiting = count(&database)?;
            Ok((database, waiting))
        });
        let (database, waiting) =
            opened.map_err(|source| Error::outbox(Some(path), "cannot be opened").because(source))?;
        Ok(Self { database: Mutex::new(database), path: Some(path.to_owned()), waiting: waiting.into() })
    }

    fn in_memory() -> Result<Self, Error> {
        let database = Connection::open_in_memory().and_then(|mut database| migrate(&mut database).map(|()| database));
        let database = database.map_err(|source| Error::outbox(None, "cannot be opened").because(source))?;
        Ok(Self { database: Mutex::new(database), path: None, waiting: AtomicU64::new(0) })
    }

    /// The file, or `None` for an outbox in memory.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How many deltas wait, as of the last look.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Keeps `deltas` in one transaction: all of them are on the disk when it returns, or none.
    pub(crate) fn keep(&self, deltas: &[LifecycleDelta]) -> Result<(), Error> {
        self.write("cannot keep a delta", |transaction| {
            let sql = "INSERT INTO delta (decky, operation, error, completed_at) VALUES (?1, ?2, ?3, ?4)";
            let mut insert = transaction.prepare_cached(sql)?;
            for delta in deltas {
                let error = match delta.outcome() {
                    Outcome::Succeeded => None,
                    Outcome::Failed(error) => Some(error),
                };
                insert.execute(params![delta.decky(), delta.operation().as_str(), error, micros(delta.when())])?;
            }
            Ok(())
        })
    }

    /// The deltas that wait, **newest first**: the master gives each delta to the newest open row of its decky and
    /// operation, so this order lands two of one decky on their own rows. Other processes' deltas are among them.
    pub(crate) fn waiting_deltas(&self, most: usize) -> Result<Vec<Kept>, Error> {
        let database = self.lock();
        let read = |database: &Connection| {
            self.waiting.store(count(database)?, Ordering::Relaxed);
            let sql = "SELECT id, decky, operation, error, completed_at FROM delta WHERE rejected IS NULL
                       ORDER BY id DESC LIMIT ?1";
            let mut select = database.prepare_cached(sql)?;
            select.query_map([most as i64], kept)?.collect::<rusqlite::Result<Vec<_>>>()
        };
        read(&database).map_err(|source| self.failed("cannot be read", source))
    }

    /// The master has these: they are gone from the outbox.
    pub(crate) fn delivered(&self, deltas: &[Kept]) -> Result<(), Error> {
        self.write("cannot forget a delivered delta", |transaction| {
            let mut delete = transaction.prepare_cached("DELETE FROM delta WHERE id = ?1")?;
            deltas.iter().try_for_each(|kept| delete.execute([kept.id]).map(drop))
        })
    }

    /// The master will never take this one: it is kept aside with the reason, and never sent again.
    pub(crate) fn rejected(&self, delta: &Kept, reason: &str) -> Result<(), Error> {
        self.write("cannot put a rejected delta aside", |transaction| {
            let mut update = transaction.prepare_cached("UPDATE delta SET rejected = ?2 WHERE id = ?1")?;
            update.execute(params![delta.id, reason]).map(drop)
        })
    }

    fn write(&self, doing: &str, change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>) -> Result<(), Error> {
        let mut database = self.lock();
        let run = || {
            let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
            change(&transaction)?;
            let waiting = count(&transaction)?;
            transaction.commit()?;
            self.waiting.store(waiting, Ordering::Relaxed);
            Ok(())
        };
        run().map_err(|source| self.failed(doing, source))
    }

    /// A thread that panicked while it held the lock left no transaction behind: dropping it rolled it back.
    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, doing: &str, source: rusqlite::Error) -> Error {
        Error::outbox(self.path.as_deref(), doing).because(source)
    }
}

/// Brings an empty or older database to [`VERSION`], in one transaction.
fn migrate(database: &mut Connection) -> rusqlite::Result<()> {
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version < 1 {
        // AUTOINCREMENT: an id never comes back, so ids order deltas by when they were kept.
        // `error` is null for a success; `completed_at` is in microseconds since 1970.
        transaction.execute_batch(
            "CREATE TABLE delta (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                decky TEXT NOT NULL,
                operation TEXT NOT NULL CHECK (operation IN ('deploy', 'mutate')),
                error TEXT,
                completed_at INTEGER NOT NULL,
                rejected TEXT
            ) STRICT",
        )?;
        transaction.pragma_update(None, "user_version", VERSION)?;
    }
    transaction.commit()
}

fn count(database: &Connection) -> rusqlite::Result<u64> {
    let mut select = database.prepare_cached("SELECT count(*) FROM delta WHERE rejected IS NULL")?;
    select.query_row([], |row| row.get(0)).map(i64::unsigned_abs)
}

fn kept(row: &Row<'_>) -> rusqlite::Result<Kept> {
    let (decky, operation, error): (String, String, Option<String>) = (row.get(1)?, row.get(2)?, row.get(3)?);
    let operation = operation.parse().map_err(|problem: String| {
        rusqlite::Error::FromSqlConversionFailure(2, rusqlite::types::Type::Text, problem.into())
    })?;
    let delta = match error {
        None => LifecycleDelta::succeeded(decky, operation),
        Some(error) => LifecycleDelta::failed(decky, operation, error),
    };
    Ok(Kept { id: row.get(0)?, delta: delta.completed_at(from_micros(row.get(4)?)) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::delta::Operation;

    fn delta(decky: &str) -> LifecycleDelta {
        LifecycleDelta::failed(decky, Operation::Mutate, "why")
    }

    fn open(dir: &Path) -> Outbox {
        let (outbox, problem) = Outbox::open(&OutboxLocation::AgentDir, dir).unwrap();
        assert!(problem.is_none(), "{problem:?}");
        outbox
    }

    fn deckies(outbox: &Outbox) -> Vec<String> {
        outbox.waiting_deltas(10).unwrap().into_iter().map(|kept| kept.delta.decky().to_owned()).collect()
    }

    #[test]
    fn what_is_kept_survives_reopening_and_comes_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (delta("first"), LifecycleDelta::succeeded("second", Operation::Deploy));
        open(dir.path()).keep(&[first.clone(), second.clone()]).unwrap();
        let outbox = open(dir.path());
        assert_eq!(outbox.waiting(), 2);
        let kept: Vec<_> = outbox.waiting_deltas(10).unwrap().into_iter().map(|kept| kept.delta).collect();
        assert_eq!(kept, [second, first]);
    }

    #[test]
    fn what_is_delivered_or_rejected_never_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = open(dir.path());
        outbox.keep(&[delta("a"), delta("b"), delta("c")]).unwrap();
        let kept = outbox.waiting_deltas(10).unwrap();
        outbox.delivered(&kept[..1]).unwrap();
        outbox.rejected(&kept[1], "no").unwrap();
        assert_eq!(outbox.waiting(), 1);
        drop(outbox);
        assert_eq!(deckies(&open(dir.path())), ["a"]);
    }

    #[test]
    fn another_process_may_add() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (open(dir.path()), open(dir.path()));
        theirs.keep(&[delta("theirs")]).unwrap();
        assert_eq!(deckies(&ours), ["theirs"]);
        assert_eq!(ours.waiting(), 1);
    }

    #[test]
    fn its_files_are_the_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = open(dir.path());
        outbox.keep(&[delta("a")]).unwrap();
        for name in ["heartbeat.db", "heartbeat.db-wal", "heartbeat.db-shm"] {
            let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn a_symlink_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("heartbeat.db")).unwrap();
        let (outbox, problem) = Outbox::open(&OutboxLocation::AgentDir, dir.path()).unwrap();
        assert_eq!(outbox.path(), None);
        assert!(problem.unwrap().is_outbox());
        assert_eq!(std::fs::read(&target).unwrap(), b"");
    }

    #[test]
    fn without_a_file_it_is_in_memory_and_says_so() {
        let gone = OutboxLocation::File("/nonexistent/heartbeat.db".into());
        let (outbox, problem) = Outbox::open(&gone, Path::new("/")).unwrap();
        assert_eq!(problem.unwrap().to_string(), "outbox /nonexistent/heartbeat.db: cannot be written");
        outbox.keep(&[delta("a")]).unwrap();
        assert_eq!((deckies(&outbox), outbox.path()), (vec!["a".to_owned()], None));
    }
}
