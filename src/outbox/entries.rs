//! What is read from the outbox and what is changed in it, in SQL. Runs on the thread that has the outbox' connection,
//! inside a transaction.
//!
//! Everything is read from the view `current`, and changed in the table `unwritten` over it (see [`super::schema`]); how
//! and when that reaches the file is [`super::store`]'s matter. Only what is new may go into the file at once.

use std::collections::BTreeSet;
use std::time::SystemTime;

use rusqlite::types::{ToSqlOutput, Type, ValueRef};
use rusqlite::{CachedStatement, Connection, OptionalExtension, Row, params, params_from_iter};

use super::schema::LAST_ID;
use super::{Counts, Kept, Settled};
use crate::delta::{LifecycleDelta, Operation, Outcome, from_micros, micros};
use crate::limits;

/// Rows were added: the first one's id (the others follow it), and how many deltas fell out to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) first: i64,
    pub(super) dropped: u64,
}

/// Where new rows go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Into the file, without the way through memory: there may be many, and there is nothing that they change.
    File,
    /// Into memory, since the file refused them.
    Memory,
}

/// Adds deltas, the last one the newest. With an owner, that one posts them. `None`: there is no room, as operations in
/// flight fill it, or as they are more than it holds.
pub(super) fn add(
    db: &Connection,
    place: Place,
    deltas: &[LifecycleDelta],
    owner: Option<&str>,
) -> rusqlite::Result<Option<Added>> {
    let Some(dropped) = make_room(db, deltas.len(), if owner.is_none() { deltas.len() } else { 0 })? else {
        return Ok(None);
    };
    let (first, mut put) = (next_id(db)?, Put::new(db, place)?);
    for (id, delta) in (first..).zip(deltas) {
        put.row(id, (delta.decky(), delta.operation()), Some(delta), owner)?;
    }
    Ok(Some(Added { first, dropped }))
}

/// Adds an operation in flight, a row for each decky. `None`: as of [`add`].
pub(super) fn begin(
    db: &Connection,
    place: Place,
    operation: Operation,
    deckies: &[String],
    owner: Option<&str>,
) -> rusqlite::Result<Option<Added>> {
    let Some(dropped) = make_room(db, deckies.len(), 0)? else { return Ok(None) };
    let (first, mut put) = (next_id(db)?, Put::new(db, place)?);
    for (id, decky) in (first..).zip(deckies) {
        put.row(id, (decky, operation), None, owner)?;
    }
    Ok(Some(Added { first, dropped }))
}

/// A change that must not be lost and cannot be refused: where the file is not to be had, it is remembered.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// The master has answered for good.
    Settled(Vec<i64>, Settled),
    /// Operations that were in flight have ended. With an owner, that one posts the deltas.
    Ended(Vec<Kept>, Option<String>),
    /// Their owner leaves these to whoever delivers.
    #[cfg(feature = "cli")]
    Released(Vec<i64>),
}

impl Change {
    pub(super) fn apply(&self, db: &Connection) -> rusqlite::Result<()> {
        forget_room(db)?;
        match self {
            Self::Settled(ids, Settled::Delivered) => {
                let mut delivered = db.prepare_cached("INSERT OR REPLACE INTO unwritten (id, gone) VALUES (?1, 1)")?;
                ids.iter().try_for_each(|id| delivered.execute([id]).map(drop))
            }
            Self::Settled(ids, Settled::Rejected(reason)) => {
                let mut rejected = db.prepare_cached(
                    "INSERT OR REPLACE INTO unwritten
                     SELECT id, decky, operation, error, completed_at, ?2, NULL, age, 0 FROM current WHERE id = ?1",
                )?;
                ids.iter().try_for_each(|id| rejected.execute(params![id, reason]).map(drop))
            }
            #[cfg(feature = "cli")]
            Self::Released(ids) => {
                let mut released = db.prepare_cached(
                    "INSERT OR REPLACE INTO unwritten
                     SELECT id, decky, operation, error, completed_at, rejected, NULL, age, 0 FROM current
                     WHERE id = ?1",
                )?;
                ids.iter().try_for_each(|id| released.execute([id]).map(drop))
            }
            Self::Ended(ended, owner) => {
                let mut put = Put::new(db, Place::Memory)?;
                ended.iter().try_for_each(|Kept { id, delta }| {
                    put.row(*id, (delta.decky(), delta.operation()), Some(delta), owner.as_deref())
                })
            }
        }
    }
}

/// The deltas that may go out, **newest first**: the master gives each delta to the newest open row of its decky and
/// operation, so this order lands two of one decky on their own rows. One is held back while somebody is at work on a
/// newer row of its decky and operation: the master would give it that one's.
pub(super) fn deliverable(
    db: &Connection,
    most: usize,
    wanted: Option<&dyn Fn(&Kept) -> bool>,
) -> rusqlite::Result<Vec<Kept>> {
    let mut select = db.prepare_cached(
        "WITH newest AS (SELECT decky, operation, max(id) AS id FROM current WHERE owner IS NOT NULL
                         GROUP BY decky, operation)
         SELECT d.id, d.decky, d.operation, d.error, d.completed_at
         FROM current AS d LEFT JOIN newest ON newest.decky = d.decky AND newest.operation = d.operation
         WHERE d.completed_at IS NOT NULL AND d.rejected IS NULL AND d.owner IS NULL
               AND (newest.id IS NULL OR d.id > newest.id)
         ORDER BY d.id DESC LIMIT ?1",
    )?;
    // What is wanted is decided here, so all of them are read until there are enough.
    let limit = if wanted.is_some() { -1 } else { most as i64 };
    let is_wanted = |kept: &rusqlite::Result<Kept>| match (kept, wanted) {
        (Ok(kept), Some(wanted)) => wanted(kept),
        _ => true,
    };
    select.query_map([limit], kept)?.filter(is_wanted).take(most).collect()
}

/// Whether a row waits for delivery, held back or not.
pub(super) fn waits(db: &Connection, id: i64) -> rusqlite::Result<bool> {
    let mut select = db.prepare_cached("SELECT EXISTS (SELECT 1 FROM current WHERE id = ?1 AND rejected IS NULL)")?;
    select.query_row([id], |row| row.get(0))
}

/// Whether something newer of its decky and operation is in flight or waits: this one alone would seal the newer row.
#[cfg(feature = "cli")]
pub(super) fn is_overtaken(db: &Connection, Kept { id, delta }: &Kept) -> rusqlite::Result<bool> {
    let mut select = db.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM current
                        WHERE decky = ?1 AND operation = ?2 AND id > ?3 AND rejected IS NULL)",
    )?;
    select.query_row(params![delta.decky(), delta.operation().as_str(), id], |row| row.get(0))
}

/// How many there are.
pub(super) fn counts(db: &Connection) -> rusqlite::Result<Counts> {
    let mut select = db.prepare_cached(
        "WITH newest AS (SELECT decky, operation, max(id) AS id FROM current WHERE owner IS NOT NULL
                         GROUP BY decky, operation)
         SELECT count(*) FILTER (WHERE d.completed_at IS NOT NULL AND d.rejected IS NULL),
                count(*) FILTER (WHERE d.completed_at IS NOT NULL AND d.rejected IS NULL
                                 AND (d.owner IS NOT NULL OR d.id < newest.id)),
                count(*) FILTER (WHERE d.completed_at IS NULL),
                count(*) FILTER (WHERE d.rejected IS NOT NULL),
                min(d.completed_at) FILTER (WHERE d.rejected IS NULL AND typeof(d.completed_at) = 'integer')
         FROM current AS d LEFT JOIN newest ON newest.decky = d.decky AND newest.operation = d.operation",
    )?;
    let number = |row: &Row<'_>, column| row.get::<_, i64>(column).map(i64::unsigned_abs);
    select.query_row([], |row| {
        let [waiting, held, operations, rejected] = [0, 1, 2, 3].map(|column| number(row, column));
        let (waiting, held, operations, rejected) = (waiting?, held?, operations?, rejected?);
        Ok(Counts { waiting, held, operations, rejected, oldest: row.get(4)? })
    })
}

/// Those at work on a row. Bytes, since a broken row's owner need not be UTF-8, and is to be recovered from all the same.
pub(super) fn owners(db: &Connection) -> rusqlite::Result<Vec<Vec<u8>>> {
    let mut select = db.prepare_cached("SELECT DISTINCT owner FROM current WHERE owner IS NOT NULL")?;
    select.query_map([], |row| Ok(row.get_ref(0)?.as_bytes()?.to_vec()))?.collect()
}

/// What a dead owner was at work on: its operations have failed, with `reason` and their name for an error, and what
/// it would have posted waits for delivery. How many operations.
pub(super) fn recover(db: &Connection, owner: &[u8], reason: &str) -> rusqlite::Result<u64> {
    forget_room(db)?;
    let owner = ToSqlOutput::Borrowed(ValueRef::Text(owner));
    let in_flight: i64 =
        db.query_row("SELECT count(*) FROM current WHERE owner = ?1 AND completed_at IS NULL", [&owner], |row| {
            row.get(0)
        })?;
    db.execute(
        "INSERT OR REPLACE INTO unwritten
         SELECT id, decky, operation, iif(completed_at IS NULL, ?2 || operation, error),
                ifnull(completed_at, ?3), rejected, NULL, age, 0
         FROM current WHERE owner = ?1",
        params![owner, reason, micros(SystemTime::now())],
    )?;
    Ok(in_flight.unsigned_abs())
}

/// Adds `seconds` to the age of what waits, and lets go of what is too old. How many deltas fell out undelivered.
///
/// An age and not a date, since clocks jump: one that starts in 1970 and is put right must not cost a delta. One that no
/// row can have is brought back into what there is: a sum that is no integer would stop the aging of all.
pub(super) fn grow_older(db: &Connection, seconds: u64) -> rusqlite::Result<u64> {
    forget_room(db)?;
    let aged = params![seconds as i64, limits::OUTBOX_AGE.as_secs() as i64];
    let dropped: i64 = db.query_row(
        &format!("SELECT count(*) FROM current WHERE owner IS NULL AND rejected IS NULL AND {OLDER} > ?2"),
        aged,
        |row| row.get(0),
    )?;
    let older = format!(
        "INSERT OR REPLACE INTO unwritten
         SELECT id, decky, operation, error, completed_at, rejected, owner, {OLDER}, {OLDER} > ?2
         FROM current WHERE owner IS NULL"
    );
    db.execute(&older, aged)?;
    Ok(dropped.unsigned_abs())
}

/// An age of 0 to the most, and some seconds more.
const OLDER: &str = "(max(0, min(age, ?2)) + ?1)";

/// Every row that `from` knows, for another store.
pub(super) fn copy(from: &Connection, table: Copied, to: &Connection) -> rusqlite::Result<()> {
    forget_room(to)?;
    let table = match table {
        Copied::Everything => "current",
        Copied::Unwritten => "unwritten WHERE NOT gone",
    };
    let columns = "id, decky, operation, error, completed_at, rejected, owner, age";
    let mut select = from.prepare(&format!("SELECT {columns} FROM {table}"))?;
    let mut insert =
        to.prepare(&format!("INSERT INTO unwritten ({columns}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"))?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        // As they are, text that is not UTF-8 too.
        let values = (0..8).map(|column| row.get_ref(column).map(ToSqlOutput::Borrowed));
        insert.execute(params_from_iter(values.collect::<rusqlite::Result<Vec<_>>>()?))?;
    }
    Ok(())
}

/// All ids.
pub(super) fn ids(db: &Connection) -> rusqlite::Result<Vec<i64>> {
    db.prepare("SELECT id FROM current")?.query_map([], |row| row.get(0))?.collect()
}

/// Lets go of the rows with these ids, but for what has just been [`copy`]'d.
pub(super) fn forget(db: &Connection, ids: &BTreeSet<i64>) -> rusqlite::Result<()> {
    forget_room(db)?;
    let mut forget = db.prepare("INSERT OR IGNORE INTO unwritten (id, gone) VALUES (?1, 1)")?;
    ids.iter().try_for_each(|id| forget.execute([id]).map(drop))
}

/// How much is [`copy`]'d.
#[derive(Clone, Copy, Debug)]
pub(super) enum Copied {
    Everything,
    /// What the file does not know.
    Unwritten,
}

/// How many rows there are; how many of them nobody is at work on, and how many of those the master has rejected.
#[derive(Clone, Copy, Debug)]
struct Room {
    rows: i64,
    idle: i64,
    rejected: i64,
}

/// Lets the oldest rows go so that `more`, of which `idle` are nobody's work, fit: first those that the master has
/// rejected, which nobody waits for, then deltas, and never what somebody is at work on. How many deltas; `None`, and
/// nothing is gone, if that is not enough.
fn make_room(db: &Connection, more: usize, idle: usize) -> rusqlite::Result<Option<u64>> {
    let room = room(db)?;
    let excess = (room.rows + more as i64 - limits::OUTBOX_ROWS as i64).max(0);
    if excess > room.idle {
        return Ok(None);
    }
    let rejected = excess.min(room.rejected);
    for (count, which) in [(rejected, "rejected IS NOT NULL"), (excess - rejected, "rejected IS NULL")] {
        if count > 0 {
            let sql = format!(
                "INSERT OR REPLACE INTO unwritten (id, gone)
                 SELECT id, 1 FROM current WHERE owner IS NULL AND {which} ORDER BY id LIMIT ?1"
            );
            db.prepare_cached(&sql)?.execute([count])?;
        }
    }
    let sql = "UPDATE room SET rows = rows + ?1, idle = idle + ?2, rejected = rejected - ?3";
    db.prepare_cached(sql)?.execute([more as i64 - excess, idle as i64 - excess, rejected])?;
    Ok(Some((excess - rejected).unsigned_abs()))
}

/// As last counted, unless another connection has changed the file since, or we have in another way than by adding.
fn room(db: &Connection) -> rusqlite::Result<Room> {
    let known = |row: &Row<'_>| Ok(Room { rows: row.get(0)?, idle: row.get(1)?, rejected: row.get(2)? });
    let version: i64 = db.prepare_cached("PRAGMA main.data_version")?.query_row([], |row| row.get(0))?;
    let mut select = db.prepare_cached("SELECT rows, idle, rejected FROM room WHERE version = ?1")?;
    if let Some(room) = select.query_row([version], known).optional()? {
        return Ok(room);
    }
    forget_room(db)?;
    let sql = "INSERT INTO room
         SELECT ?1, count(*), count(*) FILTER (WHERE owner IS NULL), count(rejected) FROM current";
    db.execute(sql, [version])?;
    select.query_row([version], known)
}

fn forget_room(db: &Connection) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM room")?.execute([]).map(drop)
}

fn next_id(db: &Connection) -> rusqlite::Result<i64> {
    let next = format!("SELECT 1 + max({LAST_ID}, ifnull((SELECT max(id) FROM unwritten), 0))");
    db.prepare_cached(&next)?.query_row([], |row| row.get(0))
}

/// Puts rows, one after another.
struct Put<'a>(CachedStatement<'a>);

impl<'a> Put<'a> {
    fn new(db: &'a Connection, place: Place) -> rusqlite::Result<Self> {
        let sql = match place {
            Place::File => {
                "INSERT INTO main.delta (id, decky, operation, error, completed_at, owner)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)"
            }
            Place::Memory => {
                "INSERT OR REPLACE INTO unwritten (id, decky, operation, error, completed_at, owner)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)"
            }
        };
        db.prepare_cached(sql).map(Self)
    }

    /// In flight unless it has `ended`.
    fn row(
        &mut self,
        id: i64,
        (decky, operation): (&str, Operation),
        ended: Option<&LifecycleDelta>,
        owner: Option<&str>,
    ) -> rusqlite::Result<()> {
        let error = ended.and_then(|delta| match delta.outcome() {
            Outcome::Succeeded => None,
            Outcome::Failed(error) => Some(error),
        });
        let completed_at = ended.map(|delta| micros(delta.when()));
        self.0.execute(params![id, decky, operation.as_str(), error, completed_at, owner]).map(drop)
    }
}

/// Text that is not UTF-8 is made so: one broken row must not keep all the others from the master.
fn kept(row: &Row<'_>) -> rusqlite::Result<Kept> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (decky, error) = (text(row.get_ref(1)?.as_bytes()?), row.get_ref(3)?.as_bytes_or_null()?.map(text));
    let operation = row
        .get::<_, String>(2)?
        .parse()
        .map_err(|problem: String| rusqlite::Error::FromSqlConversionFailure(2, Type::Text, problem.into()))?;
    let delta = match error {
        None => LifecycleDelta::succeeded(decky, operation),
        Some(error) => LifecycleDelta::failed(decky, operation, error),
    };
    Ok(Kept { id: row.get(0)?, delta: delta.completed_at(from_micros(row.get(4)?)) })
}
