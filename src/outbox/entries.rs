//! What is read of the outbox' rows and changed in them, in plain SQL on one table, the file's or that of its copy in
//! memory (see [`super::store`]). Runs on the outbox thread, inside a transaction.
//!
//! How many rows there are of each kind is counted along, so a change costs the same however much waits.

use std::mem;
use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime};

use rusqlite::types::{ToSqlOutput, Type, ValueRef};
use rusqlite::{Connection, Params, Row, params};

use super::schema::{last_id, value};
use crate::delta::{LifecycleDelta, Outcome, from_micros, micros};
use crate::kept::{Add, Change, Counts, Kept, Poster, Settled, Stuck};
use crate::limits;

/// New rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Added {
    /// The id of the first; the others follow it.
    pub(super) first: i64,
    /// Deltas that fell out for them.
    pub(super) dropped: u64,
}

/// How many rows there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    rows: i64,
    waiting: i64,
    operations: i64,
    rejected: i64,
    /// Rows that a process owns. They never fall out.
    owned: i64,
}

pub(super) const EVERY_ID: RangeInclusive<i64> = i64::MIN..=i64::MAX;

impl Tally {
    pub(super) fn of(db: &Connection, ids: &RangeInclusive<i64>) -> rusqlite::Result<Self> {
        let mut select = db.prepare_cached(
            "SELECT count(*), count(*) FILTER (WHERE completed_at IS NOT NULL AND rejected IS NULL),
                    count(*) FILTER (WHERE completed_at IS NULL), count(rejected), count(owner)
             FROM delta WHERE id BETWEEN ?1 AND ?2",
        )?;
        select.query_row([ids.start(), ids.end()], |row| {
            let (rows, waiting, operations) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(Self { rows, waiting, operations, rejected: row.get(3)?, owned: row.get(4)? })
        })
    }

    /// These numbers in place of what was counted before, and what follows from them for the others.
    pub(super) fn update(self, counts: Counts) -> Counts {
        let [waiting, operations, rejected] =
            [self.waiting, self.operations, self.rejected].map(|number| number.max(0).unsigned_abs());
        let held = if self.may_hold() { counts.held.min(waiting) } else { 0 };
        Counts { waiting, held, operations, rejected, oldest: counts.oldest.filter(|_| waiting > 0) }
    }

    /// Whether a row may be held back: only rows with an owner do that.
    pub(super) fn may_hold(self) -> bool {
        self.owned > 0
    }

    fn add(&mut self, of: Self, times: i64) {
        self.rows += times * of.rows;
        self.waiting += times * of.waiting;
        self.operations += times * of.operations;
        self.rejected += times * of.rejected;
        self.owned += times * of.owned;
    }
}

/// The rows, inside a transaction.
pub(super) struct Rows<'a> {
    pub(super) db: &'a Connection,
    pub(super) tally: Tally,
    /// How rows name this process as their owner.
    pub(super) us: &'a str,
    /// The last id that was ever given, where that is known.
    pub(super) last: Option<i64>,
}

/// A row that is new, or in place of an operation's that was in flight: its file may be another one than that in which
/// it was begun.
const PUT: &str = "INSERT INTO delta (id, decky, operation, error, completed_at, owner) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
    ON CONFLICT (id) DO UPDATE SET error = excluded.error, completed_at = excluded.completed_at,
    owner = excluded.owner, rejected = NULL, age = 0";

/// Records a delta that is about to be deleted: for people, and for a process that moves rows out of a file that was replaced.
const REMEMBER: &str = "INSERT INTO delivered (id, decky, operation, error, completed_at, delivered_at)
    SELECT id, decky, operation, error, completed_at, ?2 FROM delta
    WHERE id = ?1 AND completed_at IS NOT NULL";

/// All but the last ones.
const FORGET: &str = "DELETE FROM delivered WHERE number <= (SELECT max(number) FROM delivered) - ?1";

const REMOVE: &str = "DELETE FROM delta WHERE id = ?1";
const REJECT: &str = "UPDATE delta SET rejected = ?2, owner = NULL WHERE id = ?1";
#[cfg(feature = "cli")]
const RELEASE: &str = "UPDATE delta SET owner = NULL, age = 0 WHERE id = ?1";

impl Rows<'_> {
    /// Adds rows. The oldest fall out for them; `None`: there is no room, as all that is in there is somebody's.
    pub(super) fn add(&mut self, add: &Add) -> rusqlite::Result<Option<Added>> {
        let Some(dropped) = self.make_room(add.rows() as i64)? else { return Ok(None) };
        let (rows, owner) = (add.rows() as i64, add.is_owned().then_some(self.us));
        // Above every id that was ever given, also by a file that somebody has removed: those lie below the clock.
        let last = self.last.map_or_else(|| last_id(self.db), Ok)?;
        let first = 1 + last.max(micros(SystemTime::now()));
        self.last = Some(first + rows - 1);
        match add {
            Add::Deltas(deltas, _) => (first..).zip(deltas).try_for_each(|(id, delta)| put(self.db, id, delta, owner)),
            Add::Operation(operation, deckies) => (first..).zip(deckies).try_for_each(|(id, decky)| {
                let row = params![id, decky, operation.as_str(), None::<&str>, None::<i64>, owner];
                self.db.prepare_cached(PUT)?.execute(row).map(drop)
            }),
        }?;
        let (waiting, operations) = if matches!(add, Add::Deltas(..)) { (rows, 0) } else { (0, rows) };
        let owned = owner.map_or(0, |_| rows);
        self.tally.add(Tally { rows, waiting, operations, rejected: 0, owned }, 1);
        Ok(Some(Added { first, dropped }))
    }

    /// Makes one of the changes that must not be lost.
    pub(super) fn apply(&mut self, change: &Change) -> rusqlite::Result<()> {
        match change {
            Change::Settled(ids, Settled::Delivered) => ids.iter().try_for_each(|id| self.deliver(*id)),
            Change::Settled(ids, Settled::Rejected(reason)) => {
                ids.iter().try_for_each(|id| self.change(*id, REJECT, params![id, reason]))
            }
            #[cfg(feature = "cli")]
            Change::Released(ids) => ids.iter().try_for_each(|id| self.change(*id, RELEASE, [id])),
            Change::Ended(ended, poster) => {
                let owner = (*poster == Poster::Us).then_some(self.us);
                let mut end = |Kept { id, delta }: &Kept| self.count_along(*id..=*id, |db| put(db, *id, delta, owner));
                ended.iter().try_for_each(&mut end)
            }
            Change::Withdrawn(ids) => ids.clone().try_for_each(|id| self.remove(id)),
        }
    }

    /// Deletes a row that the master has accepted, or that was withdrawn. A delta is recorded in `delivered`.
    pub(super) fn deliver(&mut self, id: i64) -> rusqlite::Result<()> {
        if self.db.prepare_cached(REMEMBER)?.execute(params![id, micros(SystemTime::now())])? > 0 {
            self.db.prepare_cached(FORGET)?.execute([limits::OUTBOX_DELIVERED as i64])?;
        }
        self.remove(id)
    }

    fn remove(&mut self, id: i64) -> rusqlite::Result<()> {
        self.change(id, REMOVE, [id])
    }

    /// Changes the row of this id, if it is there.
    fn change(&mut self, id: i64, sql: &str, params: impl Params) -> rusqlite::Result<()> {
        self.count_along(id..=id, |db| db.prepare_cached(sql)?.execute(params).map(drop))
    }

    /// Changes rows of these ids and no others.
    fn count_along(
        &mut self,
        ids: RangeInclusive<i64>,
        change: impl FnOnce(&Connection) -> rusqlite::Result<()>,
    ) -> rusqlite::Result<()> {
        self.tally.add(Tally::of(self.db, &ids)?, -1);
        change(self.db)?;
        self.tally.add(Tally::of(self.db, &ids)?, 1);
        Ok(())
    }

    /// Takes over the rows of a process that has ended. Its operations in flight have failed; the error is `reason` and the
    /// operation's name. The deltas that it was to post itself wait for delivery. Returns the number of these operations.
    pub(super) fn recover(&mut self, owner: &[u8], reason: &str) -> rusqlite::Result<usize> {
        // As it is, text that is not UTF-8 too.
        let owner = ToSqlOutput::Borrowed(ValueRef::Text(owner));
        let failed = self.db.execute(
            "UPDATE delta SET error = ?2 || operation, completed_at = ?3 WHERE owner = ?1 AND completed_at IS NULL",
            params![owner, reason, micros(SystemTime::now())],
        )?;
        self.db.execute("UPDATE delta SET owner = NULL, age = 0 WHERE owner = ?1", [&owner])?;
        self.tally = Tally::of(self.db, &EVERY_ID)?;
        Ok(failed)
    }

    /// Ages what waits by so many seconds, and lets go of what is too old. An age beyond the bound, or below zero, is
    /// damage. How many deltas fell out.
    pub(super) fn grow_older(&mut self, seconds: u64) -> rusqlite::Result<u64> {
        let most = limits::OUTBOX_AGE.as_secs() as i64;
        let older = "UPDATE delta SET age = max(0, min(age, ?2)) + ?1 WHERE owner IS NULL";
        self.db.execute(older, [seconds as i64, most])?;
        self.db.execute("DELETE FROM delta WHERE owner IS NULL AND age > ?1", [most])?;
        let before = mem::replace(&mut self.tally, Tally::of(self.db, &EVERY_ID)?);
        Ok((before.waiting - self.tally.waiting).unsigned_abs())
    }

    /// Of rows that somebody is at work on, the age is how long nobody could tell whether these owners run.
    pub(super) fn grow_stuck(&mut self, seconds: u64, unknown: &[Vec<u8>]) -> rusqlite::Result<()> {
        for owner in owners(self.db)? {
            let (is_unknown, owner) = (unknown.contains(&owner), ToSqlOutput::Borrowed(ValueRef::Text(&owner)));
            let (most, seconds) = (limits::OUTBOX_AGE.as_secs() as i64, seconds as i64);
            let older = "UPDATE delta SET age = iif(?2, max(0, min(age, ?3)) + ?4, 0) WHERE owner = ?1";
            self.db.execute(older, params![owner, is_unknown, most, seconds])?;
        }
        Ok(())
    }

    /// Makes room for so many rows: drops rejected rows first, then the oldest, and never a row with an owner. Returns the number
    /// of dropped deltas; `None`: there is not enough room.
    fn make_room(&mut self, more: i64) -> rusqlite::Result<Option<u64>> {
        let excess = (self.tally.rows + more - limits::OUTBOX_ROWS as i64).max(0);
        if excess > self.tally.rows - self.tally.owned {
            return Ok(None);
        }
        let of_rejected = self.drop_oldest("rejected IS NOT NULL", excess.min(self.tally.rejected))?;
        let dropped = self.drop_oldest("rejected IS NULL", excess - of_rejected)?;
        let gone = Tally { rows: of_rejected + dropped, rejected: of_rejected, waiting: dropped, ..Tally::default() };
        self.tally.add(gone, -1);
        Ok(Some(dropped.unsigned_abs()))
    }

    /// Drops at most so many rows without an owner, the oldest first. Returns how many.
    fn drop_oldest(&self, which: &str, most: i64) -> rusqlite::Result<i64> {
        if most == 0 {
            return Ok(0);
        }
        let oldest = format!("SELECT id FROM delta WHERE owner IS NULL AND {which} ORDER BY id LIMIT ?1");
        let sql = format!("DELETE FROM delta WHERE id IN ({oldest})");
        self.db.prepare_cached(&sql)?.execute([most]).map(|count| count as i64)
    }
}

fn put(db: &Connection, id: i64, delta: &LifecycleDelta, owner: Option<&str>) -> rusqlite::Result<()> {
    let error = match delta.outcome() {
        Outcome::Succeeded => None,
        Outcome::Failed(error) => Some(error),
    };
    let row = params![id, delta.decky(), delta.operation().as_str(), error, micros(delta.when()), owner];
    db.prepare_cached(PUT)?.execute(row).map(drop)
}

/// In SQL, whether a row may go out now.
const IS_DELIVERABLE: &str = "completed_at IS NOT NULL AND rejected IS NULL AND owner IS NULL AND NOT EXISTS (
    SELECT 1 FROM delta AS newer WHERE newer.owner IS NOT NULL AND newer.decky = delta.decky
    AND newer.operation = delta.operation AND newer.id > delta.id)";

/// The deltas that may go out, **newest first**: the master gives each delta to the newest open row of its decky and
/// operation, so this order lands two of one decky on their own rows. One is held back while a process owns a
/// newer row of its decky and operation: the master would give it that one's.
pub(super) fn deliverable(db: &Connection, most: usize, wanted: impl Fn(&Kept) -> bool) -> rusqlite::Result<Vec<Kept>> {
    let mut select = db.prepare_cached(&format!(
        "SELECT id, decky, operation, error, completed_at FROM delta WHERE {IS_DELIVERABLE} ORDER BY id DESC"
    ))?;
    // What is wanted is decided here, so they are read until there are enough.
    let is_wanted = |kept: &rusqlite::Result<Kept>| kept.as_ref().map_or(true, &wanted);
    select.query_map([], kept)?.filter(is_wanted).take(most).collect()
}

/// Whether a delta waits for delivery, held back or not.
pub(super) fn waits(db: &Connection, id: i64) -> rusqlite::Result<bool> {
    value(db, "SELECT EXISTS (SELECT 1 FROM delta WHERE id = ?1 AND rejected IS NULL)", [id])
}

/// Whether a delta up to this id may go out.
pub(super) fn delivers_up_to(db: &Connection, id: i64) -> rusqlite::Result<bool> {
    value(db, &format!("SELECT EXISTS (SELECT 1 FROM delta WHERE id <= ?1 AND {IS_DELIVERABLE})"), [id])
}

/// The id of the newest row, 0 if there is none.
pub(super) fn newest(db: &Connection) -> rusqlite::Result<i64> {
    value(db, "SELECT ifnull(max(id), 0) FROM delta", [])
}

/// Whether something newer of its decky and operation is in flight or waits: this one alone would seal the newer row.
#[cfg(feature = "cli")]
pub(super) fn is_overtaken(db: &Connection, Kept { id, delta }: &Kept) -> rusqlite::Result<bool> {
    let newer = "SELECT 1 FROM delta WHERE decky = ?1 AND operation = ?2 AND id > ?3 AND rejected IS NULL";
    value(db, &format!("SELECT EXISTS ({newer})"), params![delta.decky(), delta.operation().as_str(), id])
}

/// All numbers, with those that take a look at every row.
pub(super) fn counts(db: &Connection) -> rusqlite::Result<Counts> {
    let tally = Tally::of(db, &EVERY_ID)?;
    // Text in the place of a time is damage.
    let mut select = db.prepare_cached(&format!(
        "SELECT count(*) FILTER (WHERE NOT ({IS_DELIVERABLE})),
                min(completed_at) FILTER (WHERE typeof(completed_at) = 'integer')
         FROM delta WHERE completed_at IS NOT NULL AND rejected IS NULL"
    ))?;
    let (held, oldest): (i64, _) = select.query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(tally.update(Counts { held: held.unsigned_abs(), oldest, ..Counts::default() }))
}

/// The owners of rows, as bytes: another program may have written anything there.
pub(super) fn owners(db: &Connection) -> rusqlite::Result<Vec<Vec<u8>>> {
    let mut select = db.prepare_cached("SELECT DISTINCT owner FROM delta WHERE owner IS NOT NULL")?;
    select.query_map([], |row| Ok(row.get_ref(0)?.as_bytes()?.to_vec()))?.collect()
}

/// What nobody could tell of for a day whether its owner runs, the oldest first.
pub(super) fn stuck(db: &Connection) -> rusqlite::Result<Vec<Stuck>> {
    let mut select = db.prepare_cached(
        "SELECT id, decky, operation, age FROM delta WHERE owner IS NOT NULL AND age >= ?1 ORDER BY id",
    )?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let stuck = |row: &Row<'_>| {
        let (decky, operation) = (text(row.get_ref(1)?.as_bytes()?), text(row.get_ref(2)?.as_bytes()?));
        Ok(Stuck { id: row.get(0)?, decky, operation, time: Duration::from_secs(row.get::<_, i64>(3)?.unsigned_abs()) })
    };
    select.query_map([limits::OUTBOX_STUCK.as_secs() as i64], stuck)?.collect()
}

/// Whether a row names this owner.
pub(super) fn owns(db: &Connection, owner: &str) -> rusqlite::Result<bool> {
    value(db, "SELECT EXISTS (SELECT 1 FROM delta WHERE owner = ?1)", [owner])
}

fn kept(row: &Row<'_>) -> rusqlite::Result<Kept> {
    // Text that is no UTF-8 is damage, and no reason to send nothing.
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
