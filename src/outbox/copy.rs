//! The copy in memory: the same table as the file's, while the file does not take changes. It knows which rows were changed
//! in it, and these go to the file when it takes changes again. Rows of other processes are in it only to hold older deltas
//! back, and are never changed here. Runs on the outbox thread.

use std::time::SystemTime;

use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, params_from_iter};

use super::schema;
use super::store::MovedRows;
use crate::delta::micros;

/// The ids of rows that were added, changed or removed here.
const CHANGED: &str = "CREATE TABLE changed (id INTEGER PRIMARY KEY) STRICT";

/// The ids of rows that another file had, which was replaced, and of those that were delivered from it. Others may have moved
/// them to the new one already.
const MOVED: &str = "CREATE TABLE moved (id INTEGER PRIMARY KEY) STRICT";

/// What has ended is newer than what is in flight, and what was rejected newer than what waits.
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

/// An empty copy. Its ids lie above the clock, by a random gap: whatever file its rows come to one day, the ids there are
/// others.
pub(super) fn open() -> rusqlite::Result<Connection> {
    let mut copy = Connection::open_in_memory()?;
    schema::migrate(&mut copy)?;
    schema::configure(&copy)?;
    copy.execute_batch(&format!("{CHANGED}; {MOVED}"))?;
    // SQLite itself notes them, so none is forgotten, and what is rolled back is not noted. No `OR IGNORE`: what a statement
    // does in a conflict holds in its triggers, too.
    for (event, row) in [("INSERT", "new"), ("UPDATE", "new"), ("DELETE", "old")] {
        let note = format!(
            "INSERT INTO changed SELECT {row}.id WHERE {row}.id NOT IN (SELECT id FROM changed)"
        );
        copy.execute_batch(&format!(
            "CREATE TRIGGER after_{event} AFTER {event} ON delta BEGIN {note}; END"
        ))?;
    }
    raise_last_id(&copy, micros(SystemTime::now()) + gap())?;
    Ok(copy)
}

/// Brings all rows that were not changed here up to what the file has; without one they are gone. New ids lie above the
/// file's by a random gap: other processes may add there meanwhile.
pub(super) fn refresh(copy: &Connection, file: Option<&Connection>) -> rusqlite::Result<()> {
    let transaction = copy.unchecked_transaction()?;
    copy.execute_batch(
        "CREATE TEMP TABLE kept (id INTEGER PRIMARY KEY); INSERT INTO kept SELECT id FROM changed UNION SELECT id FROM moved;
         DELETE FROM delta WHERE id NOT IN (SELECT id FROM kept)",
    )?;
    if let Some(file) = file {
        let values = "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 WHERE ?1 NOT IN (SELECT id FROM kept)";
        for_each(file, ROWS, copy, &format!("{INSERT} {values}"))?;
        raise_last_id(copy, schema::last_id(file)? + gap())?;
    }
    copy.execute_batch(
        "DELETE FROM changed WHERE id NOT IN (SELECT id FROM kept); DROP TABLE kept",
    )?;
    transaction.commit()
}

/// These rows of `file` are to be moved, as the file to which they go is another one, and there no id comes again, either. Nor
/// does what was delivered: that one may be an older copy.
pub(super) fn move_rows(
    copy: &Connection,
    file: &Connection,
    share: MovedRows,
    us: &str,
) -> rusqlite::Result<()> {
    let which = match share {
        MovedRows::Everything => "?1 IS NOT NULL",
        MovedRows::OursAndUnowned => "owner IS NULL OR owner = ?1",
        MovedRows::Ours => "owner = ?1",
    };
    // A damaged file may have given an id again. One that cannot be read has nothing to add.
    let delivered = format!("{DELIVERED} WHERE id NOT IN (SELECT id FROM delta) ORDER BY number");
    let _ = for_each(file, &delivered, copy, INSERT_DELIVERED);
    copy.execute("INSERT OR IGNORE INTO moved SELECT id FROM delivered", [])?;
    copy.execute(&format!("INSERT OR IGNORE INTO moved SELECT id FROM delta WHERE {which}"), [us])?;
    // Without the gap of this copy: above the clock an id might be given again by a process that has only an older copy or a
    // part of the file. What was added here is in `changed` anyway, and a row that is left to its owner stays as it is.
    let last = schema::last_id(file).or_else(|_| schema::last_id(copy))?;
    copy.execute(
        "INSERT OR IGNORE INTO moved SELECT ?1 WHERE ?1 NOT IN (SELECT id FROM delta)",
        [last],
    )
    .map(drop)
}

/// Moves what was changed here to a file, inside its transaction. What was moved from another file may have been delivered from
/// this one meanwhile.
pub(super) fn merge(copy: &Connection, file: &Connection) -> rusqlite::Result<()> {
    let gone =
        "SELECT id FROM changed UNION SELECT id FROM moved WHERE id NOT IN (SELECT id FROM delta)";
    for_each(copy, gone, file, "DELETE FROM delta WHERE id = ?1")?;
    let ids = "SELECT id FROM changed UNION SELECT id FROM moved";
    let rows = format!(
        "SELECT *, id IN (SELECT id FROM moved) FROM ({ROWS} WHERE id IN ({ids}) ORDER BY id)"
    );
    let values = "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 WHERE NOT ?9 OR ?1 NOT IN (SELECT id FROM delivered)";
    for_each(copy, &rows, file, &format!("{INSERT} {values} {UNLESS_NEWER}"))?;
    for_each(copy, &format!("{DELIVERED} ORDER BY number"), file, INSERT_DELIVERED)?;
    // What came and went in memory has had its id, too.
    raise_last_id(
        file,
        schema::value(copy, &format!("SELECT ifnull(max(id), 0) FROM ({ids})"), [])?,
    )
}

fn raise_last_id(db: &Connection, to: i64) -> rusqlite::Result<()> {
    db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'delta'", [to]).map(drop)
}

/// More than another process ever adds while we are in memory, or an hour on the clock.
fn gap() -> i64 {
    i64::from(fastrand::u32(..))
}

/// Runs a statement for each row of another database, with its values as they are, text that is not UTF-8 too.
fn for_each(
    from: &Connection,
    select: &str,
    to: &Connection,
    statement: &str,
) -> rusqlite::Result<()> {
    let (mut select, mut statement) = (from.prepare(select)?, to.prepare(statement)?);
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

    /// How many steps SQLite takes to bring a copy with so many changes up to a file of 1,000 other rows.
    fn steps_to_refresh(changes: i64) -> u64 {
        let add = |db: &Connection, ids: std::ops::Range<i64>| {
            let mut insert = db
                .prepare("INSERT INTO delta (id, decky, operation) VALUES (?1, 'd', 'deploy')")
                .unwrap();
            ids.for_each(|id| assert_eq!(insert.execute([id]).unwrap(), 1));
        };
        let (mut copy, mut file) = (open().unwrap(), Connection::open_in_memory().unwrap());
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
    fn a_refresh_costs_no_more_for_each_row_where_much_was_changed_in_memory() {
        let (few, many) = (steps_to_refresh(10), steps_to_refresh(1_000));
        assert!(many - few < 100 * 1_000, "{few} {many}");
    }
}
