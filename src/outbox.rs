//! The only writer of `heartbeat.db`: a delta is in it from before `push` returns until the master has answered 2xx.
//!
//! - A commit is on the disk before it is acknowledged: WAL with `synchronous=FULL`.
//! - The file is its owner's alone (0600) from its first byte, and `-wal` and `-shm` take after it.
//! - A schema is made or migrated in one transaction, and `user_version` tells which it is.
//! - Where no file can be written the outbox is in memory, and says so.
//! - What the master has answered is never sent again, even while the file cannot be written: it is remembered, and
//!   the file follows when it can.
//!
//! Called on the threads that push, and on the heartbeat thread, under one lock that is held for a statement or a
//! transaction, never for the network.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OpenFlags, Row, TransactionBehavior, params};

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

/// What the master has said of a delta for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It has it: it is gone from the outbox.
    Delivered,
    /// It will never take it: it is kept aside with the reason.
    Rejected(String),
}

#[derive(Debug)]
pub(crate) struct Outbox {
    shared: Mutex<Shared>,
    path: Option<PathBuf>,
    waiting: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    database: Connection,
    /// Settled, and not yet written down: the file could not be written then.
    unwritten: BTreeMap<i64, Settled>,
}

impl Shared {
    fn new(database: Connection) -> Mutex<Self> {
        Mutex::new(Self { database, unwritten: BTreeMap::new() })
    }

    fn waiting(&self) -> rusqlite::Result<u64> {
        Ok(count(&self.database)?.saturating_sub(self.unwritten.len() as u64))
    }

    /// Writes down what is settled, in one transaction.
    fn write_down(&mut self) -> rusqlite::Result<()> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
        let transaction = self.database.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for (id, settled) in &self.unwritten {
            match settled {
                Settled::Delivered => {
                    transaction.prepare_cached("DELETE FROM delta WHERE id = ?1")?.execute([id])?;
                }
                Settled::Rejected(reason) => {
                    let mut update = transaction.prepare_cached("UPDATE delta SET rejected = ?2 WHERE id = ?1")?;
                    update.execute(params![id, reason])?;
                }
            }
        }
        transaction.commit()?;
        self.unwritten.clear();
        Ok(())
    }
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
        Ok(Self { shared: Shared::new(database), path: Some(path.to_owned()), waiting: waiting.into() })
    }

    fn in_memory() -> Result<Self, Error> {
        let database = Connection::open_in_memory().and_then(|mut database| migrate(&mut database).map(|()| database));
        let database = database.map_err(|source| Error::outbox(None, "cannot be opened").because(source))?;
        Ok(Self { shared: Shared::new(database), path: None, waiting: AtomicU64::new(0) })
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
        let mut shared = self.lock();
        insert(&mut shared.database, deltas).map_err(|source| self.failed("cannot keep a delta", source))?;
        // Nothing but a count, and of what is on the disk: the next look sets it right.
        self.waiting.fetch_add(deltas.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The deltas that wait, **newest first**: the master gives each delta to the newest open row of its decky and
    /// operation, so this order lands two of one decky on their own rows. Other processes' deltas are among them.
    pub(crate) fn waiting_deltas(&self, most: usize) -> Result<Vec<Kept>, Error> {
        let mut shared = self.lock();
        if let Err(error) = shared.write_down() {
            log::debug!("what is settled cannot be written down yet: error={error}");
        }
        let read = |shared: &Shared| {
            self.waiting.store(shared.waiting()?, Ordering::Relaxed);
            let sql = "SELECT id, decky, operation, error, completed_at FROM delta WHERE rejected IS NULL
                       ORDER BY id DESC LIMIT ?1";
            let mut select = shared.database.prepare_cached(sql)?;
            let rows = select.query_map([(most + shared.unwritten.len()) as i64], kept)?;
            let unsettled = |kept: &rusqlite::Result<Kept>| {
                kept.as_ref().map_or(true, |kept| !shared.unwritten.contains_key(&kept.id))
            };
            rows.filter(unsettled).take(most).collect::<rusqlite::Result<Vec<_>>>()
        };
        read(&shared).map_err(|source| self.failed("cannot be read", source))
    }

    /// The master has answered for good: these are never sent again. An error says that the file does not know it yet,
    /// and that after a restart before it does they would be.
    pub(crate) fn settle(&self, deltas: &[Kept], settled: &Settled) -> Result<(), Error> {
        let mut shared = self.lock();
        shared.unwritten.extend(deltas.iter().map(|kept| (kept.id, settled.clone())));
        let written = shared.write_down();
        // Where it cannot even be read, the count stays as it was; the next look sets it right.
        if let Ok(waiting) = shared.waiting() {
            self.waiting.store(waiting, Ordering::Relaxed);
        }
        written.map_err(|source| self.failed("cannot note what the master has answered", source))
    }

    /// A thread that panicked while it held the lock left no transaction behind: dropping it rolled it back.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, doing: &str, source: rusqlite::Error) -> Error {
        Error::outbox(self.path.as_deref(), doing).because(source)
    }
}

fn insert(database: &mut Connection, deltas: &[LifecycleDelta]) -> rusqlite::Result<()> {
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
    {
        let sql = "INSERT INTO delta (decky, operation, error, completed_at) VALUES (?1, ?2, ?3, ?4)";
        let mut insert = transaction.prepare_cached(sql)?;
        for delta in deltas {
            let error = match delta.outcome() {
                Outcome::Succeeded => None,
                Outcome::Failed(error) => Some(error),
            };
            insert.execute(params![delta.decky(), delta.operation().as_str(), error, micros(delta.when())])?;
        }
    }
    transaction.commit()
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
        outbox.settle(&kept[..1], &Settled::Delivered).unwrap();
        outbox.settle(&kept[1..2], &Settled::Rejected("no".to_owned())).unwrap();
        assert_eq!(outbox.waiting(), 1);
        drop(outbox);
        assert_eq!(deckies(&open(dir.path())), ["a"]);
    }

    #[test]
    fn what_is_settled_while_the_file_is_locked_is_not_sent_again_and_written_down_later() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = open(dir.path());
        outbox.keep(&[delta("a"), delta("b"), delta("c")]).unwrap();
        let other = Connection::open(dir.path().join(FILE)).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let kept = outbox.waiting_deltas(10).unwrap();
        let error = outbox.settle(&kept[..1], &Settled::Delivered).unwrap_err();
        assert!(error.to_string().ends_with("cannot note what the master has answered"), "{error}");
        outbox.settle(&kept[1..2], &Settled::Rejected("no".to_owned())).unwrap_err();
        assert_eq!((deckies(&outbox), outbox.waiting()), (vec!["a".to_owned()], 1));
        other.execute_batch("COMMIT").unwrap();
        assert_eq!(deckies(&outbox), ["a"]);
        assert_eq!(deckies(&open(dir.path())), ["a"], "now the file knows it too");
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
