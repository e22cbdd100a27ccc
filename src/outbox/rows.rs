//! Reads and changes the rows of the outbox, in plain SQL on one table: that of the file, or that
//! of its copy in memory (see [`super::store`]). Runs on the outbox thread, inside a transaction.
//!
//! The number of rows of each kind is updated with each change, so a change costs the same however
//! many rows there are.

use std::mem;
#[cfg(feature = "cli")]
use std::ops::Range;
use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime};

use rusqlite::types::{ToSqlOutput, Type, ValueRef};
use rusqlite::{Connection, Params, Row, params};

use super::schema::{last_id, value};
use crate::delta::{LifecycleDelta, Outcome, from_micros, micros};
use crate::limits;
#[cfg(feature = "cli")]
use crate::outbox::queued::RowStates;
use crate::outbox::queued::{
    DeliveryResult, NewRows, QueueCounts, QueuedDelta, RowChange, SentBy, StuckRow,
};

/// The result of an addition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InsertedRows {
    /// The id of the first row; those of the others follow it.
    pub(super) first: i64,
    /// The number of deltas that were dropped for the new rows.
    pub(super) dropped: u64,
}

/// The number of rows of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RowCounts {
    rows: i64,
    waiting: i64,
    operations: i64,
    rejected: i64,
    /// Rows that a process owns. They are never dropped.
    owned: i64,
}

pub(super) const EVERY_ID: RangeInclusive<i64> = i64::MIN..=i64::MAX;

impl RowCounts {
    pub(super) fn of(db: &Connection, ids: &RangeInclusive<i64>) -> rusqlite::Result<Self> {
        let mut select = db.prepare_cached(
            "SELECT count(*), count(*) FILTER (WHERE completed_at IS NOT NULL AND rejected IS NULL),
                    count(*) FILTER (WHERE completed_at IS NULL), count(rejected), count(owner)
             FROM delta WHERE id BETWEEN ?1 AND ?2",
        )?;
        select.query_row([ids.start(), ids.end()], |row| {
            Ok(Self {
                rows: row.get(0)?,
                waiting: row.get(1)?,
                operations: row.get(2)?,
                rejected: row.get(3)?,
                owned: row.get(4)?,
            })
        })
    }

    /// Updates earlier counts. `held` and `oldest` are only limited by the new ones.
    pub(super) fn update(self, counts: QueueCounts) -> QueueCounts {
        let unsigned = |number: i64| number.max(0).unsigned_abs();
        let waiting = unsigned(self.waiting);
        QueueCounts {
            waiting,
            held: if self.may_hold() { counts.held.min(waiting) } else { 0 },
            operations: unsigned(self.operations),
            rejected: unsigned(self.rejected),
            oldest: counts.oldest.filter(|_| waiting > 0),
        }
    }

    /// Whether a row may be held: only rows with an owner hold others.
    pub(super) fn may_hold(self) -> bool {
        self.owned > 0
    }

    /// Adds other counts this many times; -1 subtracts them.
    fn add_times(&mut self, times: i64, other: Self) {
        self.rows += times * other.rows;
        self.waiting += times * other.waiting;
        self.operations += times * other.operations;
        self.rejected += times * other.rejected;
        self.owned += times * other.owned;
    }
}

/// The rows, inside a transaction.
pub(super) struct Rows<'a> {
    pub(super) db: &'a Connection,
    pub(super) counts: RowCounts,
    /// The owner of this process's rows.
    pub(super) token: &'a str,
    /// The last id that was given, if it is known.
    pub(super) last_id: Option<i64>,
}

/// Inserts a row, or updates the row of an operation that was in flight. That row may be missing if
/// the file was replaced.
const UPSERT: &str = "INSERT INTO delta (id, decky, operation, error, completed_at, owner) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
    ON CONFLICT (id) DO UPDATE SET error = excluded.error, completed_at = excluded.completed_at,
    owner = excluded.owner, rejected = NULL, age = 0";

/// Records a delta that is about to be deleted: for people, and for a process that moves rows out
/// of a file that was replaced.
const RECORD_DELIVERED: &str =
    "INSERT INTO delivered (id, decky, operation, error, completed_at, delivered_at)
    SELECT id, decky, operation, error, completed_at, ?2 FROM delta
    WHERE id = ?1 AND completed_at IS NOT NULL";

/// Deletes all records but the last ones.
const DELETE_OLD_DELIVERED: &str =
    "DELETE FROM delivered WHERE number <= (SELECT max(number) FROM delivered) - ?1";

const DELETE: &str = "DELETE FROM delta WHERE id = ?1";
const REJECT: &str = "UPDATE delta SET rejected = ?2, owner = NULL WHERE id = ?1";
#[cfg(feature = "cli")]
const RELEASE: &str = "UPDATE delta SET owner = NULL, age = 0 WHERE id = ?1";

#[cfg(feature = "cli")]
const CLAIM: &str = "UPDATE delta SET owner = ?2, age = 0
    WHERE id = ?1 AND owner IS NULL AND rejected IS NULL AND completed_at IS NOT NULL";

impl Rows<'_> {
    /// Adds rows, and drops the oldest ones if there are too many. `None`: there is no room,
    /// because processes own the other rows.
    pub(super) fn add(&mut self, new: &NewRows) -> rusqlite::Result<Option<InsertedRows>> {
        let rows = new.rows() as i64;
        let Some(dropped) = self.make_room(rows)? else { return Ok(None) };
        let owner = new.is_owned().then_some(self.token);
        // Above the clock, too: a file that was deleted has given no higher ids.
        let last_id = self.last_id.map_or_else(|| last_id(self.db), Ok)?;
        let first = 1 + last_id.max(micros(SystemTime::now()));
        self.last_id = Some(first + rows - 1);
        let owned = owner.map_or(0, |_| rows);
        let mut added = RowCounts { rows, owned, ..RowCounts::default() };
        match new {
            NewRows::Deltas(deltas, _) => {
                added.waiting = rows;
                for (id, delta) in (first..).zip(deltas) {
                    upsert(self.db, id, delta, owner)?;
                }
            }
            NewRows::Operation(operation, deckies) => {
                added.operations = rows;
                for (id, decky) in (first..).zip(deckies) {
                    let row =
                        params![id, decky, operation.as_str(), None::<&str>, None::<i64>, owner];
                    self.db.prepare_cached(UPSERT)?.execute(row)?;
                }
            }
        }
        self.counts.add_times(1, added);
        Ok(Some(InsertedRows { first, dropped }))
    }

    /// Makes one of the changes that are never lost.
    pub(super) fn apply(&mut self, change: &RowChange) -> rusqlite::Result<()> {
        match change {
            RowChange::Answered(ids, DeliveryResult::Delivered) => {
                ids.iter().try_for_each(|id| self.delete_delivered(*id))
            }
            RowChange::Answered(ids, DeliveryResult::Rejected(reason)) => {
                ids.iter().try_for_each(|id| self.change(*id, REJECT, params![id, reason]))
            }
            #[cfg(feature = "cli")]
            RowChange::Released(ids) => {
                ids.iter().try_for_each(|id| self.change(*id, RELEASE, [id]))
            }
            #[cfg(feature = "cli")]
            RowChange::Claimed(ids) => {
                let token = self.token;
                ids.clone().try_for_each(|id| self.change(id, CLAIM, params![id, token]))
            }
            RowChange::Ended(ended, sent_by) => {
                let owner = (*sent_by == SentBy::ThisProcess).then_some(self.token);
                ended.iter().try_for_each(|QueuedDelta { id, delta }| {
                    self.update_counts(*id, |db| upsert(db, *id, delta, owner))
                })
            }
            RowChange::Withdrawn(ids) => ids.clone().try_for_each(|id| self.delete(id)),
        }
    }

    /// Deletes a row that the master has accepted, or that was withdrawn. A delta is recorded as
    /// delivered.
    pub(super) fn delete_delivered(&mut self, id: i64) -> rusqlite::Result<()> {
        let now = micros(SystemTime::now());
        if self.db.prepare_cached(RECORD_DELIVERED)?.execute(params![id, now])? > 0 {
            let limit = limits::OUTBOX_DELIVERED as i64;
            self.db.prepare_cached(DELETE_OLD_DELIVERED)?.execute([limit])?;
        }
        self.delete(id)
    }

    fn delete(&mut self, id: i64) -> rusqlite::Result<()> {
        self.change(id, DELETE, [id])
    }

    /// Changes the row of this id, if it exists.
    fn change(&mut self, id: i64, sql: &str, params: impl Params) -> rusqlite::Result<()> {
        self.update_counts(id, |db| db.prepare_cached(sql)?.execute(params).map(drop))
    }

    /// Updates the counts with a change of one row.
    fn update_counts(
        &mut self,
        id: i64,
        change: impl FnOnce(&Connection) -> rusqlite::Result<()>,
    ) -> rusqlite::Result<()> {
        self.counts.add_times(-1, RowCounts::of(self.db, &(id..=id))?);
        change(self.db)?;
        self.counts.add_times(1, RowCounts::of(self.db, &(id..=id))?);
        Ok(())
    }

    /// Takes over the rows of a process that has ended. Its operations in flight have failed; the
    /// error is `reason` and the operation. The deltas that it was to send wait for delivery.
    /// Returns the number of these operations.
    pub(super) fn recover(&mut self, owner: &[u8], reason: &str) -> rusqlite::Result<usize> {
        // The owner may be text that is not UTF-8.
        let owner = ToSqlOutput::Borrowed(ValueRef::Text(owner));
        let failed = self.db.execute(
            "UPDATE delta SET error = ?2 || operation, completed_at = ?3
             WHERE owner = ?1 AND completed_at IS NULL",
            params![owner, reason, micros(SystemTime::now())],
        )?;
        self.db.execute("UPDATE delta SET owner = NULL, age = 0 WHERE owner = ?1", [&owner])?;
        self.counts = RowCounts::of(self.db, &EVERY_ID)?;
        Ok(failed)
    }

    /// Increases the age of rows without an owner, and deletes those that are too old. A damaged
    /// file may have ages below zero or above the limit. Returns the number of dropped deltas.
    pub(super) fn age_queued(&mut self, seconds: u64) -> rusqlite::Result<u64> {
        let limit = limits::OUTBOX_AGE.as_secs() as i64;
        let older = "UPDATE delta SET age = max(0, min(age, ?2)) + ?1 WHERE owner IS NULL";
        self.db.execute(older, [seconds as i64, limit])?;
        self.db.execute("DELETE FROM delta WHERE owner IS NULL AND age > ?1", [limit])?;
        let before = mem::replace(&mut self.counts, RowCounts::of(self.db, &EVERY_ID)?);
        Ok((before.waiting - self.counts.waiting).unsigned_abs())
    }

    /// Updates the age of rows with an owner: for how long it has been unknown whether the owner is
    /// running.
    pub(super) fn age_owned(&mut self, seconds: u64, unknown: &[Vec<u8>]) -> rusqlite::Result<()> {
        let limit = limits::OUTBOX_AGE.as_secs() as i64;
        for owner in owners(self.db)? {
            let is_unknown = unknown.contains(&owner);
            let owner = ToSqlOutput::Borrowed(ValueRef::Text(&owner));
            self.db.execute(
                "UPDATE delta SET age = iif(?2, max(0, min(age, ?3)) + ?4, 0) WHERE owner = ?1",
                params![owner, is_unknown, limit, seconds as i64],
            )?;
        }
        Ok(())
    }

    /// Makes room for new rows: drops rejected rows first, then the oldest, and never a row with an
    /// owner. Returns the number of dropped deltas; `None`: there is not enough room.
    fn make_room(&mut self, new: i64) -> rusqlite::Result<Option<u64>> {
        let excess = (self.counts.rows + new - limits::OUTBOX_ROWS as i64).max(0);
        if excess > self.counts.rows - self.counts.owned {
            return Ok(None);
        }
        let rejected =
            self.drop_oldest("rejected IS NOT NULL", excess.min(self.counts.rejected))?;
        let waiting = self.drop_oldest("rejected IS NULL", excess - rejected)?;
        let rows = rejected + waiting;
        self.counts.add_times(-1, RowCounts { rows, rejected, waiting, ..RowCounts::default() });
        Ok(Some(waiting.unsigned_abs()))
    }

    /// Drops up to `count` rows without an owner, the oldest first. Returns how many.
    fn drop_oldest(&self, filter: &str, count: i64) -> rusqlite::Result<i64> {
        if count == 0 {
            return Ok(0);
        }
        let oldest =
            format!("SELECT id FROM delta WHERE owner IS NULL AND {filter} ORDER BY id LIMIT ?1");
        let sql = format!("DELETE FROM delta WHERE id IN ({oldest})");
        self.db.prepare_cached(&sql)?.execute([count]).map(|count| count as i64)
    }
}

fn upsert(
    db: &Connection,
    id: i64,
    delta: &LifecycleDelta,
    owner: Option<&str>,
) -> rusqlite::Result<()> {
    let error = delta.outcome().error();
    let row =
        params![id, delta.decky(), delta.operation().as_str(), error, micros(delta.when()), owner];
    db.prepare_cached(UPSERT)?.execute(row).map(drop)
}

/// The condition in SQL for a row that may be sent now.
const IS_DELIVERABLE: &str =
    "completed_at IS NOT NULL AND rejected IS NULL AND owner IS NULL AND NOT EXISTS (
    SELECT 1 FROM delta AS newer WHERE newer.owner IS NOT NULL AND newer.decky = delta.decky
    AND newer.operation = delta.operation AND newer.id > delta.id)";

/// Returns up to `count` deltas that may be sent and pass the filter, **newest first**. The master
/// assigns each delta to the newest open row of its decky and operation, so in this order two
/// deltas of one decky reach their own rows. A delta is held while a process owns a newer row of
/// the same decky and operation, because the master would assign it to that one.
pub(super) fn deliverable(
    db: &Connection,
    count: usize,
    mut filter: impl FnMut(&QueuedDelta) -> bool,
) -> rusqlite::Result<Vec<QueuedDelta>> {
    let mut select = db.prepare_cached(&format!(
        "SELECT id, decky, operation, error, completed_at FROM delta
         WHERE {IS_DELIVERABLE} ORDER BY id DESC"
    ))?;
    // The filter is not SQL, so rows are read until there are enough.
    select
        .query_map([], queued_delta)?
        .filter(|queued| queued.as_ref().map_or(true, &mut filter))
        .take(count)
        .collect()
}

/// Whether a delta waits for delivery, held or not.
pub(super) fn is_waiting(db: &Connection, id: i64) -> rusqlite::Result<bool> {
    value(db, "SELECT EXISTS (SELECT 1 FROM delta WHERE id = ?1 AND rejected IS NULL)", [id])
}

/// Whether a delta up to this id may be sent.
pub(super) fn has_deliverable_up_to(db: &Connection, id: i64) -> rusqlite::Result<bool> {
    let deliverable = format!("SELECT 1 FROM delta WHERE id <= ?1 AND {IS_DELIVERABLE}");
    value(db, &format!("SELECT EXISTS ({deliverable})"), [id])
}

/// The id of the newest row, 0 if there is none.
pub(super) fn newest_id(db: &Connection) -> rusqlite::Result<i64> {
    value(db, "SELECT ifnull(max(id), 0) FROM delta", [])
}

/// Whether a newer row of the same decky and operation is in flight or waits. If this delta were
/// sent alone, the master would assign it to the newer row.
#[cfg(feature = "cli")]
pub(super) fn is_overtaken(
    db: &Connection,
    QueuedDelta { id, delta }: &QueuedDelta,
) -> rusqlite::Result<bool> {
    let newer =
        "SELECT 1 FROM delta WHERE decky = ?1 AND operation = ?2 AND id > ?3 AND rejected IS NULL";
    let params = params![delta.decky(), delta.operation().as_str(), id];
    value(db, &format!("SELECT EXISTS ({newer})"), params)
}

/// The states of the rows with these ids. Those that do not exist were delivered.
#[cfg(feature = "cli")]
pub(super) fn states(db: &Connection, ids: Range<i64>) -> rusqlite::Result<RowStates> {
    let mut select = db.prepare_cached(&format!(
        "SELECT id, rejected, {IS_DELIVERABLE} FROM delta WHERE id >= ?1 AND id < ?2 ORDER BY id"
    ))?;
    let mut states = RowStates::default();
    let mut rows = select.query([ids.start, ids.end])?;
    while let Some(row) = rows.next()? {
        let id = row.get(0)?;
        match row.get_ref(1)?.as_bytes_or_null()? {
            Some(reason) => states.rejected.push(text(reason)),
            None => states.waiting.push(id),
        }
        let is_held = row.get_ref(1)?.as_bytes_or_null()?.is_none() && !row.get::<_, bool>(2)?;
        states.held.extend(is_held.then_some(id));
    }
    Ok(states)
}

/// All counts. Reads every row.
pub(super) fn counts(db: &Connection) -> rusqlite::Result<QueueCounts> {
    let counts = RowCounts::of(db, &EVERY_ID)?;
    // A damaged file may have text as a time.
    let mut select = db.prepare_cached(&format!(
        "SELECT count(*) FILTER (WHERE NOT ({IS_DELIVERABLE})),
                min(completed_at) FILTER (WHERE typeof(completed_at) = 'integer')
         FROM delta WHERE completed_at IS NOT NULL AND rejected IS NULL"
    ))?;
    let (held, oldest): (i64, _) = select.query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(counts.update(QueueCounts { held: held.unsigned_abs(), oldest, ..QueueCounts::default() }))
}

/// The owners of rows, as bytes: a damaged file may have text that is not UTF-8.
pub(super) fn owners(db: &Connection) -> rusqlite::Result<Vec<Vec<u8>>> {
    let mut select =
        db.prepare_cached("SELECT DISTINCT owner FROM delta WHERE owner IS NOT NULL")?;
    select.query_map([], |row| Ok(row.get_ref(0)?.as_bytes()?.to_vec()))?.collect()
}

/// The rows of which it has been unknown for a day whether their owners are running, the oldest
/// first.
pub(super) fn stuck(db: &Connection) -> rusqlite::Result<Vec<StuckRow>> {
    let mut select = db.prepare_cached(
        "SELECT id, decky, operation, age FROM delta
         WHERE owner IS NOT NULL AND age >= ?1 ORDER BY id",
    )?;
    let stuck = |row: &Row<'_>| {
        Ok(StuckRow {
            id: row.get(0)?,
            decky: text(row.get_ref(1)?.as_bytes()?),
            operation: text(row.get_ref(2)?.as_bytes()?),
            duration: Duration::from_secs(row.get::<_, i64>(3)?.unsigned_abs()),
        })
    };
    select.query_map([limits::OUTBOX_STUCK.as_secs() as i64], stuck)?.collect()
}

/// Whether a row has this owner.
pub(super) fn has_owner(db: &Connection, owner: &str) -> rusqlite::Result<bool> {
    value(db, "SELECT EXISTS (SELECT 1 FROM delta WHERE owner = ?1)", [owner])
}

fn queued_delta(row: &Row<'_>) -> rusqlite::Result<QueuedDelta> {
    let decky = text(row.get_ref(1)?.as_bytes()?);
    let operation = row.get::<_, String>(2)?.parse().map_err(|problem: String| {
        rusqlite::Error::FromSqlConversionFailure(2, Type::Text, problem.into())
    })?;
    let outcome = Outcome::of_error(row.get_ref(3)?.as_bytes_or_null()?.map(text));
    let delta = LifecycleDelta::new(decky, operation, outcome);
    Ok(QueuedDelta { id: row.get(0)?, delta: delta.completed_at(from_micros(row.get(4)?)) })
}

/// The text of a damaged file may not be UTF-8. That must not prevent delivery.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
