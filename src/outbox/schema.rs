//! What `heartbeat.db` looks like inside, and how an older one becomes a newer one. Runs on the thread that opens it.
//!
//! There is one table, of deltas and of the operations that will become deltas:
//!
//! | column | |
//! | --- | --- |
//! | `id` | the order in which operations began (or deltas were pushed); one never comes back |
//! | `decky`, `operation` | what was done to whom |
//! | `error` | why it failed; null for a success |
//! | `completed_at` | when it ended, in microseconds since 1970; null while the operation is in flight |
//! | `rejected` | why the master will never take it; null unless it said so |
//! | `owner` | the process at work on the row: it runs the operation, or posts the delta itself; null: it waits |
//! | `age` | seconds of delivery that it has waited through, see [`super::entries::grow_older`] |
//!
//! Beside it, in memory and for each connection, is `temp.unwritten`: rows as they are by now, which the file does not
//! know yet, and `gone` where there is none any more. The view `current` is both together, and all that is ever read.
//! `temp.room` remembers how many rows that are, so that a push need not count them.

use std::time::SystemTime;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, TransactionBehavior};

use crate::delta::micros;

/// The schema's version. A migration adds a step to [`migrate`] and raises it.
pub(super) const VERSION: i64 = 2;

/// "DNHB": tells our files from any other SQLite file. Version 1 did not have it.
const APPLICATION: i64 = 0x444e_4842;

/// Why this cannot be used as an outbox; `None`: it is one, or nothing yet.
pub(super) fn problem(db: &Connection) -> rusqlite::Result<Option<&'static str>> {
    // All of it as of one moment: another process may just be making it.
    let transaction = db.unchecked_transaction()?;
    let problem = match version(&transaction)? {
        None => Some("it is another program's, or a later version's"),
        Some(0) => None,
        Some(_) => {
            let used_up = format!("SELECT {LAST_ID} > ?1");
            let used_up: bool = transaction.query_row(&used_up, [LAST_ID_AT_MOST], |row| row.get(0))?;
            used_up.then_some("its ids are used up")
        }
    };
    transaction.commit()?;
    Ok(problem)
}

/// In SQL, the last id that the file knows of. A sequence that is broken must not lead back to ids of rows that are there.
pub(crate) const LAST_ID: &str = "max(
    ifnull((SELECT max(seq) FROM main.sqlite_sequence WHERE name = 'delta' AND typeof(seq) = 'integer'), 0),
    ifnull((SELECT max(id) FROM main.delta), 0))";

/// Ids begin at the clock, far below this, and above it none may be left for the next row one day.
pub(crate) const LAST_ID_AT_MOST: i64 = i64::MAX / 4 * 3;

/// Which version of the schema this is, 0 for an empty database; `None`: it is not ours.
pub(super) fn version(db: &Connection) -> rusqlite::Result<Option<i64>> {
    let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let tables: i64 = db.query_row("SELECT count(*) FROM main.sqlite_schema", [], |row| row.get(0))?;
    Ok(match (pragma("application_id")?, pragma("user_version")?, tables) {
        (0, 0, 0) => Some(0),
        (0, 1, _) if is_made_of(db, TABLE_1)? => Some(1),
        (APPLICATION, VERSION, _) if is_made_of(db, TABLE)? => Some(VERSION),
        _ => None,
    })
}

/// Whether the table is this one, white space aside, and no trigger meddles: any program may leave any mark.
fn is_made_of(db: &Connection, table: &str) -> rusqlite::Result<bool> {
    let mut select = db.prepare(
        "SELECT CAST(ifnull(sql, '') AS BLOB) FROM main.sqlite_schema
         WHERE name IN ('delta', 'sqlite_sequence') OR type = 'trigger' ORDER BY name",
    )?;
    let made = select.query_map([], |row| row.get::<_, Vec<u8>>(0))?.collect::<rusqlite::Result<Vec<_>>>()?;
    let is = |made: &[u8], table: &str| {
        str::from_utf8(made).is_ok_and(|made| made.split_whitespace().eq(table.split_whitespace()))
    };
    Ok(matches!(made.as_slice(), [delta, sequence] if is(delta, table) && is(sequence, SEQUENCE)))
}

/// Brings an empty or older outbox to [`VERSION`], in one transaction.
pub(super) fn migrate(db: &mut Connection) -> rusqlite::Result<()> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    match version(&transaction)? {
        Some(0) => transaction.execute_batch(TABLE)?,
        Some(1) => transaction.execute_batch(&format!("ALTER TABLE delta RENAME TO old; {TABLE}; {FROM_1}"))?,
        // Ours already: another process may have been faster.
        _ => return Ok(()),
    }
    transaction.execute("DELETE FROM sqlite_sequence WHERE name = 'delta'", [])?;
    let first = "INSERT INTO sqlite_sequence SELECT 'delta', max(?1, ifnull(max(id), 0)) FROM delta";
    transaction.execute(first, [micros(SystemTime::now())])?;
    transaction.pragma_update(None, "application_id", APPLICATION)?;
    transaction.pragma_update(None, "user_version", VERSION)?;
    transaction.commit()
}

/// Above the number of statements that are used again and again: none is prepared twice.
const STATEMENTS: usize = 32;

/// AUTOINCREMENT: an id never comes back, so ids tell what began later. They begin at the clock, in microseconds:
/// whatever other file (or memory) an outbox has rows in, the ids there are others. A file with another text than this is
/// none of ours: to change it is to make a new version.
pub(crate) const TABLE: &str = "CREATE TABLE delta (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    decky TEXT NOT NULL,
    operation TEXT NOT NULL CHECK (operation IN ('deploy', 'mutate')),
    error TEXT,
    completed_at INTEGER,
    rejected TEXT,
    owner TEXT,
    age INTEGER NOT NULL DEFAULT 0
) STRICT";

/// What SQLite makes for an AUTOINCREMENT.
const SEQUENCE: &str = "CREATE TABLE sqlite_sequence(name,seq)";

/// As of version 1.
const TABLE_1: &str = "CREATE TABLE delta (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    decky TEXT NOT NULL,
    operation TEXT NOT NULL CHECK (operation IN ('deploy', 'mutate')),
    error TEXT,
    completed_at INTEGER NOT NULL,
    rejected TEXT
) STRICT";

const FROM_1: &str = "INSERT INTO delta (id, decky, operation, error, completed_at, rejected)
    SELECT id, decky, operation, error, completed_at, rejected FROM old;
    DROP TABLE old";

/// The connection's own part.
pub(super) fn overlay(database: &Connection) -> rusqlite::Result<()> {
    database.set_prepared_statement_cache_capacity(STATEMENTS);
    // Or a statement whose plan looks at a parameter would be prepared again for each value, which takes longer than it.
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    database.execute_batch(
        "PRAGMA temp_store = memory;
         CREATE TEMP TABLE unwritten (
             id INTEGER PRIMARY KEY, decky TEXT, operation TEXT, error TEXT, completed_at INTEGER, rejected TEXT,
             owner TEXT, age INTEGER NOT NULL DEFAULT 0, gone INTEGER NOT NULL DEFAULT 0
         ) STRICT;
         CREATE TEMP VIEW current AS
             SELECT id, decky, operation, error, completed_at, rejected, owner, age FROM main.delta
             WHERE id NOT IN (SELECT id FROM unwritten)
             UNION ALL
             SELECT id, decky, operation, error, completed_at, rejected, owner, age FROM unwritten WHERE NOT gone;
         CREATE TEMP TABLE room (version INTEGER, rows INTEGER, idle INTEGER, rejected INTEGER) STRICT",
    )
}

#[cfg(test)]
mod tests {
    use rusqlite::StatementStatus;

    use super::*;

    const MARKS: &str = "PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2";

    const ROWS_1: &str = "
        INSERT INTO delta VALUES (7, 'd', 'deploy', NULL, 1000, NULL), (9, 'e', 'mutate', 'why', 2000, 'no');
        PRAGMA user_version = 1";

    #[test]
    fn version_1_keeps_its_rows_and_their_order() {
        let mut database = Connection::open_in_memory().unwrap();
        database.execute_batch(&format!("{TABLE_1};{ROWS_1}")).unwrap();
        assert_eq!(problem(&database).unwrap(), None);
        migrate(&mut database).unwrap();
        migrate(&mut database).unwrap();
        assert_eq!(problem(&database).unwrap(), None);
        let rows: Vec<(i64, String, Option<String>, Option<i64>)> = database
            .prepare("SELECT id, decky, rejected, completed_at FROM delta WHERE owner IS NULL AND age = 0")
            .unwrap()
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
            .unwrap()
            .collect::<rusqlite::Result<_>>()
            .unwrap();
        let expected = [(7, "d".to_owned(), None, Some(1000)), (9, "e".to_owned(), Some("no".to_owned()), Some(2000))];
        assert_eq!(rows, expected);
        let last: i64 = database.query_row("SELECT max(seq) FROM sqlite_sequence", [], |row| row.get(0)).unwrap();
        assert!(last > 9, "{last}");
    }

    #[test]
    fn no_statement_is_prepared_again_for_another_value() {
        let mut database = Connection::open_in_memory().unwrap();
        migrate(&mut database).unwrap();
        overlay(&database).unwrap();
        let mut select = database.prepare("SELECT id FROM current ORDER BY id DESC LIMIT ?1").unwrap();
        for most in 1..5 {
            assert!(!select.exists([most]).unwrap());
        }
        assert_eq!(select.get_status(StatementStatus::RePrepare), 0);
    }

    #[test]
    fn what_is_not_ours_or_newer_is_told_apart() {
        for (sql, ours) in [
            ("", true),
            ("CREATE TABLE theirs (a)", false),
            ("PRAGMA application_id = 1", false),
            ("PRAGMA user_version = 1", false),
            ("CREATE TABLE delta (id INTEGER PRIMARY KEY, decky, operation); PRAGMA user_version = 1", false),
            ("PRAGMA user_version = 3", false),
            (MARKS, false),
            (&format!("{TABLE}; CREATE TRIGGER a AFTER DELETE ON delta BEGIN SELECT 1; END; {MARKS}"), false),
            (&format!("{TABLE}; {MARKS}"), true),
            ("PRAGMA application_id = 0x444e4842; PRAGMA user_version = 3", false),
        ] {
            let database = Connection::open_in_memory().unwrap();
            database.execute_batch(sql).unwrap();
            assert_eq!(problem(&database).unwrap().is_none(), ours, "{sql}");
        }
    }
}
