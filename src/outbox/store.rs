//! The rows in their file, or in the copy in memory that takes its place while the file does not take changes: the same SQL
//! runs on either. What was changed in the copy goes to the file with the first change that the file takes, in one
//! transaction. Runs on the outbox thread.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, TransactionBehavior};

use super::entries::{EVERY_ID, Rows, Tally};
use super::file::{self, Identities, Refusal, identities};
use super::lock::{Locks, Turn};
use super::{copy, schema};
use crate::error::{Error, chain, printable_path};
use crate::limits;
use crate::panics::quietly;

#[derive(Debug)]
pub(super) struct Store {
    /// Where it belongs; `None`: it is meant to be in memory.
    pub(super) path: Option<PathBuf>,
    /// `None`: it is meant to be in memory, or its file is gone.
    pub(super) file: Option<(Table, Identities)>,
    /// With the version of the file that it has been brought up to; `None`: the file has it all.
    copy: Option<(Table, Option<i64>)>,
    /// Up to when the file is left alone and how it refused the last time, unless it has been written since.
    pub(super) refused: Option<(Instant, Refusal)>,
    /// When another process' lock was waited for in vain, unless the file has been written since.
    pub(super) locked: Option<Instant>,
    /// Who delivers, and that we run, for the rows that name us.
    pub(super) locks: Locks,
}

/// What a process takes to the next file out of one that was replaced. What was not written to that one yet it always takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// Of the process that delivers.
    Everything,
    /// Nobody delivers. Rows of other owners are left to these: they may have done more with them by now.
    OursAndUnowned,
    /// Another process delivers. If we took the others, too, one that it has delivered meanwhile would come back.
    Ours,
}

/// The file did not take a change.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) why: Refusal,
    pub(super) source: Box<dyn StdError + Send + Sync>,
}

/// One table, and how many rows are in it.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) db: Connection,
    /// How many rows there are, and the last id. With the version of the file that it is of: another process may change it.
    known: Option<(i64, Tally, Option<i64>)>,
}

impl Table {
    /// Makes a change, after moving to it what `copy` has; or nothing has changed.
    fn change<T>(
        &mut self,
        us: &str,
        copy: Option<&Connection>,
        change: impl FnOnce(&mut Rows<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let transaction = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = version(&transaction)?;
        copy.map_or(Ok(()), |copy| copy::merge(copy, &transaction))?;
        let (tally, last) = match self.known {
            Some((of, tally, last)) if of == version && copy.is_none() => (tally, last),
            _ => (Tally::of(&transaction, &EVERY_ID)?, None),
        };
        let mut rows = Rows { db: &transaction, tally, us, last };
        let done = change(&mut rows)?;
        let (tally, last) = (rows.tally, rows.last);
        transaction.commit()?;
        // Its own changes do not change the version.
        self.known = Some((version, tally, last));
        Ok(done)
    }
}

/// Another one after each change that another connection has made.
fn version(db: &Connection) -> rusqlite::Result<i64> {
    schema::value(db, "PRAGMA data_version", [])
}

impl Drop for Store {
    /// The last process to close it removes a log by its name, which may be another file's by now.
    fn drop(&mut self) {
        if self.is_replaced()
            && let Some((file, _)) = &self.file
        {
            // An error leaves an ordinary close.
            let _ = file::leave(&file.db);
        }
    }
}

impl Store {
    /// In memory, until it is [opened](Self::open).
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        Self { path, file: None, copy: None, refused: None, locked: None, locks: Locks::new() }
    }

    /// The turn of this process to open, change or leave the file. `by`: up to when another process' is waited for.
    pub(super) fn turn(&mut self, by: Instant) -> io::Result<Turn> {
        let Some(path) = &self.path else { return Ok(Turn::default()) };
        let turn = self.locks.turn(path, by);
        if turn.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            self.locked = Some(Instant::now());
        }
        turn
    }

    /// Up to when another process' lock is waited for where no caller says so. Who waits for the outbox to open hears of it
    /// before he gives up. It is not waited for again where that was in vain a moment ago, as the callers come after it.
    pub(super) fn patience(&self) -> Instant {
        let was_locked = self.locked.is_some_and(|at| at.elapsed() < limits::OUTBOX_RETRY);
        Instant::now() + if was_locked { Duration::ZERO } else { limits::OUTBOX_BUSY - limits::OUTBOX_MARGIN }
    }

    /// Opens the file at its path. Moves there the rows in memory and those of a file that was replaced or is corrupt, but not
    /// the deleted ones (`gone`). The new file records these as delivered, for processes that still have them in the older file.
    /// The process that delivers renames a file that is not an outbox, and makes a new one.
    pub(super) fn open(&mut self, mut gone: impl Iterator<Item = i64>, share: Share, by: Instant) -> Result<(), Error> {
        let Some(path) = self.path.clone() else { return Ok(()) };
        // Closed first: what SQLite keeps beside the file that is gone must not mix with the new one's.
        self.leave_file(share).map_err(|source| self.error("cannot be left", source))?;
        let (db, identities) = file::open(&path, share == Share::Everything, by)?;
        let mut table = Table { db, known: None };
        if let Some((copy, _)) = &self.copy {
            let moved =
                table.change(&self.locks.token, Some(&copy.db), |rows| gone.try_for_each(|id| rows.deliver(id)));
            moved.map_err(|source| self.error("cannot be written", source))?;
        }
        (self.file, self.copy, self.refused) = (Some((table, identities)), None, None);
        Ok(())
    }

    /// Or the process would end where it touches what somebody has cut off. To be called before the file is used.
    pub(super) fn mend_index(&self) {
        let (Some(path), Some((_, [.., Some(index)]))) = (&self.path, &self.file) else { return };
        // What cannot be looked at is not there, or replaced, and that is seen elsewhere.
        if file::mend_index(path, *index).unwrap_or(false) {
            let outbox = self.name();
            quietly(|| {
                log::error!(
                    "the outbox's -shm was cut off, it is made anew; write to none of its files: outbox={outbox}"
                )
            });
        }
    }

    /// Takes its share of a file that was replaced, and from a broken one what that did not know.
    fn leave_file(&mut self, share: Share) -> rusqlite::Result<()> {
        let Some((file, _)) = self.file.as_ref() else { return Ok(()) };
        file::leave(&file.db)?;
        let (is_broken, us) = (self.is_broken(), self.locks.token.clone());
        let last = version(&file.db);
        self.in_memory()?;
        let (Some((file, _)), Some((copy, _))) = (&self.file, &mut self.copy) else { return Ok(()) };
        match is_broken {
            true => copy::refresh(&copy.db, None),
            false => copy::move_rows(&copy.db, &file.db, share, &us),
        }?;
        (copy.known, self.file) = (None, None);
        let read = self.copy.as_ref().and_then(|(_, version)| *version);
        if !is_broken && (read.is_none() || last.as_ref().ok() != read.as_ref()) {
            let outbox = self.name();
            let error = last.err().map_or_else(|| "its rows cannot be read".to_owned(), |error| error.to_string());
            quietly(|| {
                log::error!(
                    "the outbox was replaced and could not be read, deltas that only it had are lost: outbox={outbox} error={error:?}"
                )
            });
        }
        Ok(())
    }

    /// It is to have a file, and has not the one at its place, or a broken one.
    pub(super) fn is_away(&self) -> bool {
        self.path.as_deref().is_some_and(|path| self.is_broken() || !self.is_at(path))
    }

    fn is_broken(&self) -> bool {
        matches!(self.refused, Some((_, Refusal::Corrupt)))
    }

    fn is_at(&self, path: &Path) -> bool {
        self.file.as_ref().is_some_and(|(_, known)| *known == identities(path))
    }

    /// It has a file, and the database, `-wal` or `-shm` at its place is another one or gone.
    pub(super) fn is_replaced(&self) -> bool {
        self.file.is_some() && self.path.as_deref().is_some_and(|path| !self.is_at(path))
    }

    /// Something is not in the file yet, where there is one.
    pub(super) fn is_unwritten(&self) -> bool {
        self.file.is_some() && self.copy.is_some()
    }

    /// All of it is in the file at its place.
    pub(super) fn is_on_disk(&self) -> bool {
        self.copy.is_none() && self.path.as_deref().is_some_and(|path| self.is_at(path))
    }

    /// For the log.
    pub(super) fn name(&self) -> String {
        self.path.as_deref().map_or_else(|| "memory".to_owned(), printable_path)
    }

    pub(super) fn error(&self, problem: &str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        Error::outbox(self.path.as_deref(), problem).because(source)
    }

    /// How many rows there are, as of the last change.
    pub(super) fn tally(&self) -> Option<Tally> {
        let file = self.file.as_ref().map(|(file, _)| file);
        self.copy.as_ref().map(|(copy, _)| copy).or(file)?.known.map(|(_, tally, _)| tally)
    }

    pub(super) fn read<T>(&mut self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let db = match &self.file {
            Some((file, _)) if self.copy.is_none() => &file.db,
            _ => &self.in_memory()?.db,
        };
        // All of its statements see the same rows.
        let moment = db.unchecked_transaction()?;
        read(&moment)
    }

    /// Makes a change in the file, and it and all that was not written yet are on the disk; or, where the file refuses it,
    /// in memory. `change` hears why. `by`: up to when another process' lock is waited for.
    pub(super) fn change<T>(
        &mut self,
        turn: io::Result<Turn>,
        by: Instant,
        change: impl Fn(&mut Rows<'_>, Option<Refusal>) -> rusqlite::Result<T>,
    ) -> (rusqlite::Result<T>, Option<Refused>) {
        let refused = match self.write(turn, by, |rows| change(rows, None)) {
            Ok(done) => return (Ok(done), None),
            Err(refused) => refused,
        };
        let why = refused.as_ref().map(|refused| refused.why);
        let us = self.locks.token.clone();
        let changed = self.in_memory().and_then(|copy| copy.change(&us, None, |rows| change(rows, why)));
        (changed, refused)
    }

    /// `Err(None)`: there is no file. One that has just refused is left alone for a moment.
    fn write<T>(
        &mut self,
        turn: io::Result<Turn>,
        by: Instant,
        change: impl FnOnce(&mut Rows<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, Option<Refused>> {
        let Some((file, _)) = &mut self.file else { return Err(None) };
        if let Some((_, why)) = self.refused.filter(|(until, _)| Instant::now() < *until) {
            return Err(Some(Refused { why, source: "it could not be written a moment ago".into() }));
        }
        let copy = self.copy.as_ref().map(|(copy, _)| &copy.db);
        let within = by.saturating_duration_since(Instant::now());
        let turn = turn.map_err(|source| {
            let why = if source.kind() == io::ErrorKind::TimedOut { Refusal::Locked } else { Refusal::Unwritable };
            Refused { why, source: source.into() }
        });
        let written = turn.and_then(|_turn| {
            let written = file.db.busy_timeout(within).and_then(|()| file.change(&self.locks.token, copy, change));
            written.map_err(|source| Refused { why: Refusal::of(&source), source: source.into() })
        });
        match written {
            Ok(done) => {
                (self.copy, self.locked) = (None, None);
                if self.refused.take().is_some() {
                    quietly(|| log::error!("the outbox is on the disk again: outbox={}", self.name()));
                }
                Ok(done)
            }
            Err(refused) => {
                match refused.why {
                    Refusal::Locked => self.locked = Some(Instant::now()),
                    _ => self.leave_alone(&refused),
                }
                Err(Some(refused))
            }
        }
    }

    /// The file refuses for more than a moment: until it takes a change again, what comes is in memory.
    fn leave_alone(&mut self, refused: &Refused) {
        let until = Instant::now() + limits::OUTBOX_RETRY;
        if self.refused.replace((until, refused.why)).is_none() {
            let (outbox, error) = (self.name(), chain(refused.source.as_ref()));
            quietly(|| {
                log::error!(
                    "the outbox cannot be written, deltas are in memory and do not survive a restart: outbox={outbox} error={error:?}"
                )
            });
        }
    }

    /// The copy, made if there is none, with what other processes have changed in the file since the last time.
    pub(super) fn in_memory(&mut self) -> rusqlite::Result<&mut Table> {
        let known = self.copy.take();
        let copy = if let Some(copy) = known { copy } else { (Table { db: copy::open()?, known: None }, None) };
        let (copy, refreshed) = self.copy.insert(copy);
        if let Some((file, _)) = &self.file {
            // Of a file that cannot be read the copy keeps what it has.
            let version = version(&file.db).ok().filter(|version| *refreshed != Some(*version));
            if version.is_some() && copy::refresh(&copy.db, Some(&file.db)).is_ok() {
                (*refreshed, copy.known) = (version, None);
            }
        }
        Ok(copy)
    }
}
