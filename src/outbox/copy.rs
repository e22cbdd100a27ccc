//! The copy in memory: the same table as the file's, while the file does not take changes. It knows which rows were changed
//! in it, and these go to the file when it takes changes again. Rows of other processes are in it only to hold older deltas
//! back, and are never changed here. Runs on the outbox thread.

use std::time::SystemTime;

use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, params_from_iter};

use super::schema;
use crate::delta::micros;

/// The ids of rows that were added, changed or removed here.
const CHANGED: &str = "CREATE TABLE changed (id INTEGER PRIMARY KEY) STRICT";

const INSERT: &str = "INSERT INTO delta (id, decky, operation, error, completed_at, rejected, owner, age)";
const ROWS: &str = "SELECT id, decky, operation, error, completed_at, rejected, owner, age FROM delta";

/// An empty copy. Its ids lie above the clock, by a random gap: whatever file its rows come to one day, the ids there are
/// others.
pub(super) fn open() -> rusqlite::Result<Connection> {
    let mut copy = Connection::open_in_memory()?;
    schema::migrate(&mut copy)?;
    schema::configure(&copy)?;
    copy.execute_batch(CHANGED)?;
    // SQLite itself notes them, so none is forgotten, and what is rolled back is not noted. No `OR IGNORE`: what a statement
    // does in a conflict holds in its triggers, too.
    for (event, row) in [("INSERT", "new"), ("UPDATE", "new"), ("DELETE", "old")] {
        let note = format!("INSERT INTO changed SELECT {row}.id WHERE {row}.id NOT IN (SELECT id FROM changed)");
        copy.execute_batch(&format!("CREATE TRIGGER after_{event} AFTER {event} ON delta BEGIN {note}; END"))?;
    }
    raise_last_id(&copy, micros(SystemTime::now()) + gap())?;
    Ok(copy)
}

/// Brings all rows that were not changed here up to what the file has; without one they are gone. New ids lie above the
/// file's by a random gap: other processes may add there meanwhile.
pub(super) fn refresh(copy: &Connection, file: Option<&Connection>) -> rusqlite::Result<()> {
    let transaction = copy.unchecked_transaction()?;
    copy.execute_batch(
        "CREATE TEMP TABLE kept AS SELECT id FROM changed;
         DELETE FROM delta WHERE id NOT IN (SELECT id FROM kept)",
    )?;
    if let Some(file) = file {
        let values = "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 WHERE ?1 NOT IN (SELECT id FROM kept)";
        for_each(file, ROWS, copy, &format!("{INSERT} {values}"))?;
        raise_last_id(copy, schema::last_id(file)? + gap())?;
    }
    copy.execute_batch("DELETE FROM changed WHERE id NOT IN (SELECT id FROM kept); DROP TABLE kept")?;
    transaction.commit()
}

/// All rows count as changed, as the file to which they go is another one, and there no id comes again, either.
pub(super) fn change_all(copy: &Connection) -> rusqlite::Result<()> {
    let all = "INSERT OR IGNORE INTO changed SELECT id FROM delta UNION SELECT ?1";
    copy.execute(all, [schema::last_id(copy)?]).map(drop)
}

/// Moves what was changed here to a file, inside its transaction.
pub(super) fn merge(copy: &Connection, file: &Connection) -> rusqlite::Result<()> {
    for_each(copy, "SELECT id FROM changed", file, "DELETE FROM delta WHERE id = ?1")?;
    let changed = format!("{ROWS} WHERE id IN (SELECT id FROM changed) ORDER BY id");
    for_each(copy, &changed, file, &format!("{INSERT} VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"))?;
    let columns = "id, decky, operation, error, completed_at, delivered_at";
    let delivered = format!("SELECT {columns} FROM delivered ORDER BY number");
    for_each(copy, &delivered, file, &format!("INSERT INTO delivered ({columns}) VALUES (?1, ?2, ?3, ?4, ?5, ?6)"))?;
    // What came and went in memory has had its id, too.
    raise_last_id(file, schema::value(copy, "SELECT ifnull(max(id), 0) FROM changed", [])?)
}

fn raise_last_id(db: &Connection, to: i64) -> rusqlite::Result<()> {
    db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'delta'", [to]).map(drop)
}

/// More than another process ever adds while we are in memory, or an hour on the clock.
fn gap() -> i64 {
    i64::from(fastrand::u32(..))
}

/// Runs a statement for each row of another database, with its values as they are, text that is not UTF-8 too.
fn for_each(from: &Connection, select: &str, to: &Connection, statement: &str) -> rusqlite::Result<()> {
    let (mut select, mut statement) = (from.prepare(select)?, to.prepare(statement)?);
    let columns = select.column_count();
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let values = (0..columns).map(|column| row.get_ref(column).map(ToSqlOutput::Borrowed));
        statement.execute(params_from_iter(values.collect::<rusqlite::Result<Vec<_>>>()?))?;
    }
    Ok(())
}
