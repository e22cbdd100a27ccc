//! The copy of the table in memory, for the time in which the file cannot be written. SQLite
//! records which rows were changed in the copy; they are merged into the file when it can be
//! written again. Rows of other processes are in the copy only to hold older deltas. They are not
//! changed here. Runs on the outbox thread.

use std::time::SystemTime;

use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, params_from_iter};

use super::schema;
use crate::delta::micros;

/// The rows of a replaced file that a process moves to the new one. Rows that were not written to
/// the old file are always moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MovedRows {
    /// This process delivers.
    Everything,
    /// No process delivers. Rows of other owners are left to them, because they may have changed
    /// them since.
    OursAndUnowned,
    /// Another process delivers. It may have delivered the rows without an owner, which must not
    /// return.
    Ours,
}

/// The ids of rows that were added, changed or deleted in the copy.
const CHANGED: &str = "CREATE TABLE changed (id INTEGER PRIMARY KEY) STRICT";

/// The ids of rows that a replaced file had, and of deltas that were delivered from it. Another
/// process may already have moved them to the new file.
const MOVED: &str = "CREATE TABLE moved (id INTEGER PRIMARY KEY) STRICT";

/// The last id that a replaced file has given. Its row may be in the new file alone, so it is not
/// merged.
const GIVEN: &str = "CREATE TABLE given (id INTEGER PRIMARY KEY) STRICT";

/// An ended operation is newer than one in flight, and a rejected delta is newer than a waiting
/// one.
const UNLESS_NEWER: &str =
    "ON CONFLICT (id) DO UPDATE SET error = excluded.error, completed_at = excluded.completed_at,
    rejected = excluded.rejected, owner = excluded.owner, age = excluded.age
    WHERE (delta.completed_at IS NULL AND excluded.completed_at IS NOT NULL)
        OR (delta.rejected IS NULL AND excluded.rejected IS NOT NULL)";

const INSERT: &str =
    "INSERT INTO delta (id, decky, operation, error, completed_at, rejected, owner, age)";
const ROWS: &str =
    "SELECT id, decky, operation, error, completed_at, rejected, owner, age FROM delta";
const INSERT_DELIVERED: &str =
    "INSERT INTO delivered (id, decky, operation, error, completed_at, delivered_at)
    SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE ?1 NOT IN (SELECT id FROM delivered)";
const DELIVERED: &str =
    "SELECT id, decky, operation, error, completed_at, delivered_at FROM delivered";

/// Creates an empty copy. Its ids are above the clock by a random gap, so they differ from those of
/// any file that its rows may be merged into.
pub(super) fn open() -> rusqlite::Result<Connection> {
    let mut copy = Connection::open_in_memory()?;
    schema::migrate(&mut copy)?;
    schema::configure(&copy)?;
    copy.execute_batch(&format!("{CHANGED}; {MOVED}; {GIVEN}"))?;
    // With triggers no change is missed, and none is recorded that is rolled back. They do not use
    // `OR IGNORE`, because the conflict clause of the triggering statement would replace it.
    for (event, row) in [("INSERT", "new"), ("UPDATE", "new"), ("DELETE", "old")] {
        copy.execute_batch(&format!(
            "CREATE TRIGGER after_{event} AFTER {event} ON delta BEGIN
                INSERT INTO changed SELECT {row}.id WHERE {row}.id NOT IN (SELECT id FROM changed);
            END"
        ))?;
    }
    raise_last_id(&copy, micros(SystemTime::now()) + gap())?;
    Ok(copy)
}

/// Replaces all rows that were not changed in the copy with those of the file; without a file they
/// are deleted. New ids are above those of the file by a random gap, because other processes may
/// add rows to the file meanwhile.
pub(super) fn refresh(copy: &Connection, file: Option<&Connection>) -> rusqlite::Result<()> {
    let transaction = copy.unchecked_transaction()?;
    copy.execute_batch(
        "CREATE TEMP TABLE kept (id INTEGER PRIMARY KEY);
         INSERT INTO kept SELECT id FROM changed UNION SELECT id FROM moved;
         DELETE FROM delta WHERE id NOT IN (SELECT id FROM kept)",
    )?;
    if let Some(file) = file {
        let values = "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 WHERE ?1 NOT IN (SELECT id FROM kept)";
        for_each_row(file, ROWS, copy, &format!("{INSERT} {values}"))?;
        raise_last_id(copy, schema::last_id(file)? + gap())?;
    }
    copy.execute_batch(
        "DELETE FROM changed WHERE id NOT IN (SELECT id FROM kept); DROP TABLE kept",
    )?;
    transaction.commit()
}

/// Marks rows of a replaced file, so that they are merged into the new file. The ids and the
/// delivered deltas of the old file are merged, too: the new one may be an older copy of it.
pub(super) fn mark_moved(
    copy: &Connection,
    file: &Connection,
    rows: MovedRows,
    token: &str,
) -> rusqlite::Result<()> {
    let filter = match rows {
        MovedRows::Everything => "?1 IS NOT NULL",
        MovedRows::OursAndUnowned => "owner IS NULL OR owner = ?1",
        MovedRows::Ours => "owner = ?1",
    };
    // A damaged file may have given an id twice. If the file cannot be read, nothing is added.
    let delivered = format!("{DELIVERED} WHERE id NOT IN (SELECT id FROM delta) ORDER BY number");
    let _ = for_each_row(file, &delivered, copy, INSERT_DELIVERED);
    copy.execute("INSERT OR IGNORE INTO moved SELECT id FROM delivered", [])?;
    let moved = format!("INSERT OR IGNORE INTO moved SELECT id FROM delta WHERE {filter}");
    copy.execute(&moved, [token])?;
    // The last id of the file, not that of the copy, which is above the clock: a process that has
    // only an older or incomplete file could give the same id. Rows that were added to the copy are
    // in `changed`. The file may have changed since the rows were read, and this id may be that of
    // a newer row.
    let last_id = schema::last_id(file).or_else(|_| schema::last_id(copy))?;
    copy.execute("INSERT OR IGNORE INTO given VALUES (?1)", [last_id]).map(drop)
}

/// Merges the changed and the moved rows into a file, inside its transaction. A moved row may have
/// been delivered from this file meanwhile.
pub(super) fn merge(copy: &Connection, file: &Connection) -> rusqlite::Result<()> {
    let deleted =
        "SELECT id FROM changed UNION SELECT id FROM moved WHERE id NOT IN (SELECT id FROM delta)";
    for_each_row(copy, deleted, file, "DELETE FROM delta WHERE id = ?1")?;
    let ids = "SELECT id FROM changed UNION SELECT id FROM moved";
    let rows = format!(
        "SELECT *, id IN (SELECT id FROM moved) FROM ({ROWS} WHERE id IN ({ids}) ORDER BY id)"
    );
    let values = "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8
        WHERE NOT ?9 OR ?1 NOT IN (SELECT id FROM delivered)";
    for_each_row(copy, &rows, file, &format!("{INSERT} {values} {UNLESS_NEWER}"))?;
    for_each_row(copy, &format!("{DELIVERED} ORDER BY number"), file, INSERT_DELIVERED)?;
    // Rows that were added and deleted in memory have used their ids, too.
    let last_id = format!("SELECT ifnull(max(id), 0) FROM ({ids} UNION SELECT id FROM given)");
    raise_last_id(file, schema::value(copy, &last_id, [])?)
}

fn raise_last_id(db: &Connection, to: i64) -> rusqlite::Result<()> {
    db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'delta'", [to]).map(drop)
}

/// A random number of ids: up to an hour of the clock, and more than another process adds while
/// this one is in memory.
fn gap() -> i64 {
    i64::from(fastrand::u32(..))
}

/// Runs a statement for each row of another database. The values are passed unchanged, also text
/// that is not UTF-8.
fn for_each_row(
    from: &Connection,
    select: &str,
    to: &Connection,
    statement: &str,
) -> rusqlite::Result<()> {
    let mut select = from.prepare(select)?;
    let mut statement = to.prepare(statement)?;
    let columns = select.column_count();
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let values = (0..columns).map(|column| row.get_ref(column).map(ToSqlOutput::Borrowed));
        statement.execute(params_from_iter(values.collect::<rusqlite::Result<Vec<_>>>()?))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// The steps of SQLite to refresh a copy with so many changes from a file with 1,000 other
    /// rows.
    fn steps_to_refresh(changes: i64) -> u64 {
        let add = |db: &Connection, ids: std::ops::Range<i64>| {
            let mut insert = db
                .prepare("INSERT INTO delta (id, decky, operation) VALUES (?1, 'd', 'deploy')")
                .unwrap();
            ids.for_each(|id| assert_eq!(insert.execute([id]).unwrap(), 1));
        };
        let mut copy = open().unwrap();
        let mut file = Connection::open_in_memory().unwrap();
        schema::migrate(&mut file).unwrap();
        add(&file, 0..1_000);
        add(&copy, 1_000..1_000 + changes);
        let steps = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&steps);
        let count = move || {
            count.fetch_add(1, Ordering::Relaxed);
            false
        };
        copy.progress_handler(1, Some(count)).unwrap();
        refresh(&copy, Some(&file)).unwrap();
        steps.load(Ordering::Relaxed)
    }

    #[test]
    fn row_that_was_added_after_the_rows_were_read_stays_in_the_new_file() {
        let file = || {
            let mut file = Connection::open_in_memory().unwrap();
            schema::migrate(&mut file).unwrap();
            file
        };
        let (old, new, copy) = (file(), file(), open().unwrap());
        let add = |file: &Connection, id: i64| {
            let insert = "INSERT INTO delta (id, decky, operation) VALUES (?1, 'd', 'deploy')";
            assert_eq!(file.execute(insert, [id]).unwrap(), 1);
        };
        let first =
            1 + [&old, &new].map(|file| schema::last_id(file).unwrap()).into_iter().max().unwrap();
        [&old, &new].iter().for_each(|file| add(file, first));
        refresh(&copy, Some(&old)).unwrap();
        // Another process adds a row, which this one sees only in a part of its reads.
        [&old, &new].iter().for_each(|file| add(file, first + 1));
        mark_moved(&copy, &old, MovedRows::Everything, "us").unwrap();
        merge(&copy, &new).unwrap();
        assert_eq!(schema::value::<i64>(&new, "SELECT count(*) FROM delta", []).unwrap(), 2);
        assert_eq!(schema::last_id(&new).unwrap(), first + 1);
    }

    #[test]
    fn cost_of_a_refresh_per_row_does_not_depend_on_the_number_of_changes() {
        let few = steps_to_refresh(10);
        let many = steps_to_refresh(1_000);
        assert!(many - few < 100 * 1_000, "{few} {many}");
    }
}
