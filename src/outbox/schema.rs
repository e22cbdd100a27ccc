//! The schema of `heartbeat.db`, and its migrations. Runs on the thread that opens the file.
//!
//! The table `delta` has deltas, and the operations in flight that will become deltas:
//!
//! | column | |
//! | --- | --- |
//! | `id` | the order in which operations began or deltas were pushed; an id is never given again |
//! | `decky`, `operation` | the operation and its decky |
//! | `error` | the reason of a failure; null for a success |
//! | `completed_at` | when the operation ended, in microseconds since 1970; null while it is in flight |
//! | `rejected` | why the master rejected the delta; null otherwise |
//! | `owner` | the process that runs the operation, or sends the delta itself; null: the row waits for delivery |
//! | `age` | the seconds of delivery that the row has waited, see [`super::rows::Rows::age_queued`]; with an owner: the seconds for which it has been unknown whether that process is running |
//!
//! The table `delivered` has the last deltas that the master accepted, and when; people can read
//! it. The index `delta_owned` has the rows with an owner, because they hold older deltas of the
//! same decky and operation.

use std::time::SystemTime;

use rusqlite::config::DbConfig;
use rusqlite::types::FromSql;
use rusqlite::{Connection, Params, TransactionBehavior, ffi};

use crate::delta::micros;

/// The version of the schema. A new version needs a step in [`migrate`].
pub(super) const VERSION: i64 = 3;

/// "DNHB", the application id that distinguishes an outbox from other SQLite files. Version 1 did
/// not have it.
const APPLICATION: i64 = 0x444e_4842;

/// Checks that this is an outbox, or an empty database, and not damaged. Otherwise the error is
/// `SQLITE_NOTADB`. A page that the disk does not return is another error.
pub(super) fn check(db: &Connection) -> rusqlite::Result<()> {
    let failure = |code, problem: &str| {
        Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(problem.to_owned())))
    };
    // One snapshot, because another process may be creating the schema.
    let snapshot = db.unchecked_transaction()?;
    match version(&snapshot)? {
        None => {
            let problem = "it belongs to another program, or to a later version";
            return failure(ffi::SQLITE_NOTADB, problem);
        }
        Some(1..) if last_id(&snapshot)? > MAX_LAST_ID => {
            return failure(ffi::SQLITE_NOTADB, "it has no unused ids left");
        }
        Some(_) => drop(snapshot),
    }
    let damage: String = value(db, "PRAGMA quick_check(1)", [])?;
    // SQLite has no error code for this, only the text.
    if damage.contains("unable to get the page") || damage.contains("failed to get page") {
        return failure(ffi::SQLITE_IOERR_READ, &damage);
    }
    if damage == "ok" { Ok(()) } else { failure(ffi::SQLITE_NOTADB, &damage) }
}

/// The last id that the file has given. A damaged sequence must not lead back to ids of existing
/// rows.
pub(crate) fn last_id(db: &Connection) -> rusqlite::Result<i64> {
    let sequence = "SELECT max(seq) FROM main.sqlite_sequence
        WHERE name = 'delta' AND typeof(seq) = 'integer'";
    let newest = "SELECT max(id) FROM main.delta";
    value(db, &format!("SELECT max(ifnull(({sequence}), 0), ifnull(({newest}), 0))"), [])
}

/// The single value that a cached statement returns.
pub(super) fn value<T: FromSql>(
    db: &Connection,
    sql: &str,
    params: impl Params,
) -> rusqlite::Result<T> {
    db.prepare_cached(sql)?.query_row(params, |row| row.get(0))
}

/// The largest last id of a usable file. Ids start at the clock, which is far below. In a damaged
/// file with larger ids none might be left for the next row.
pub(crate) const MAX_LAST_ID: i64 = i64::MAX / 4 * 3;

/// The version of the schema, 0 for an empty database. `None`: it is not an outbox.
pub(super) fn version(db: &Connection) -> rusqlite::Result<Option<i64>> {
    let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let tables: i64 =
        db.query_row("SELECT count(*) FROM main.sqlite_schema", [], |row| row.get(0))?;
    Ok(match (pragma("application_id")?, pragma("user_version")?, tables) {
        (0, 0, 0) => Some(0),
        (0, 1, _) if has_schema(db, &[TABLE_1, SEQUENCE])? => Some(1),
        (APPLICATION, 2, _) if has_schema(db, &[TABLE, SEQUENCE])? => Some(2),
        (APPLICATION, VERSION, _) if has_schema(db, &[DELIVERED, TABLE, INDEX, SEQUENCE])? => {
            Some(VERSION)
        }
        _ => None,
    })
}

/// Whether the tables have these definitions, white space aside, and there is no trigger. Another
/// program may use the same application id.
fn has_schema(db: &Connection, definitions: &[&str]) -> rusqlite::Result<bool> {
    let mut select = db.prepare(
        "SELECT CAST(ifnull(sql, '') AS BLOB) FROM main.sqlite_schema
         WHERE name IN ('delta', 'delta_owned', 'delivered', 'sqlite_sequence') OR type = 'trigger'
         ORDER BY name",
    )?;
    let found = select
        .query_map([], |row| row.get::<_, Vec<u8>>(0))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let is_same = |(found, expected): (&Vec<u8>, &&str)| {
        str::from_utf8(found)
            .is_ok_and(|found| found.split_whitespace().eq(expected.split_whitespace()))
    };
    Ok(found.len() == definitions.len() && found.iter().zip(definitions).all(is_same))
}

/// The number of frames in the log, as the index has it.
pub(super) fn frames(db: &Connection) -> rusqlite::Result<i64> {
    db.query_row("PRAGMA wal_checkpoint(NOOP)", [], |row| row.get(1))
}

/// Migrates an empty or older outbox to [`VERSION`] in one transaction. A current one is not
/// locked.
pub(super) fn migrate(db: &mut Connection) -> rusqlite::Result<()> {
    if version(db)? == Some(VERSION) {
        return Ok(());
    }
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let steps = match version(&transaction)? {
        Some(0) => format!("{TABLE}; {INDEX}; {DELIVERED}"),
        Some(1) => {
            format!("ALTER TABLE delta RENAME TO old; {TABLE}; {FROM_1}; {INDEX}; {DELIVERED}")
        }
        Some(2) => format!("{INDEX}; {DELIVERED}"),
        // Another process has migrated it.
        _ => return Ok(()),
    };
    transaction.execute_batch(&steps)?;
    let last = last_id(&transaction)?.max(micros(SystemTime::now()));
    transaction.execute_batch(&format!(
        "DELETE FROM sqlite_sequence WHERE name = 'delta';
         INSERT INTO sqlite_sequence VALUES ('delta', {last});
         PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}"
    ))?;
    transaction.commit()?;
    // Moves the pages to the database now. If `-wal` filled the disk later, there would be no room
    // for them when the file is closed. An error is not fatal, they may be moved later.
    let _ = value::<i64>(db, "PRAGMA wal_checkpoint(TRUNCATE)", []);
    // The first commit to a new log takes an additional sync: here, and not with the first push.
    let _ = db.pragma_update(None, "user_version", VERSION);
    Ok(())
}

/// More than the number of cached statements, so that none is prepared twice.
const STATEMENTS: usize = 32;

/// The current table. With AUTOINCREMENT an id is never given again, so ids show the order. They
/// start at the clock, in microseconds, so they differ from those of any other file, or copy in
/// memory, whose rows the outbox may receive. A file with another definition is not accepted, so a
/// change of this text needs a new version.
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

/// The table that SQLite creates for AUTOINCREMENT.
const SEQUENCE: &str = "CREATE TABLE sqlite_sequence(name,seq)";

/// The table of version 1.
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

/// Only rows with an owner are in the index, so that other rows need no update of it.
pub(crate) const INDEX: &str =
    "CREATE INDEX delta_owned ON delta (decky, operation, id) WHERE owner IS NOT NULL";

const DELIVERED: &str = "CREATE TABLE delivered (
    number INTEGER PRIMARY KEY,
    id INTEGER NOT NULL,
    decky TEXT NOT NULL,
    operation TEXT NOT NULL,
    error TEXT,
    completed_at INTEGER,
    delivered_at INTEGER NOT NULL
) STRICT";

/// Configures a connection.
pub(super) fn configure(database: &Connection) -> rusqlite::Result<()> {
    database.set_prepared_statement_cache_capacity(STATEMENTS);
    // Without this, a statement whose plan depends on a parameter is prepared again for each value.
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    database.pragma_update(None, "temp_store", "memory")?;
    // SQLite detects a damaged encoding only when it creates the temporary schema.
    database.query_row("SELECT count(*) FROM temp.sqlite_schema", [], |_| Ok(()))
}

#[cfg(test)]
mod tests {
    use rusqlite::StatementStatus;
    use rusqlite::types::Value;

    use super::*;

    const MARKS: &str = "PRAGMA application_id = 0x444e4842; PRAGMA user_version = 3";

    const ROWS_1: &str = "
        INSERT INTO delta VALUES (7, 'd', 'deploy', NULL, 1000, NULL), (9, 'e', 'mutate', 'why', 2000, 'no');
        PRAGMA user_version = 1";

    #[test]
    fn migration_of_version_1_preserves_rows_and_their_order() {
        let mut database = Connection::open_in_memory().unwrap();
        database.execute_batch(&format!("{TABLE_1};{ROWS_1}")).unwrap();
        check(&database).unwrap();
        migrate(&mut database).unwrap();
        migrate(&mut database).unwrap();
        check(&database).unwrap();
        let rows: Vec<(i64, String, Option<String>, Option<i64>)> = database
            .prepare("SELECT id, decky, rejected, completed_at FROM delta WHERE owner IS NULL AND age = 0")
            .unwrap()
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
            .unwrap()
            .collect::<rusqlite::Result<_>>()
            .unwrap();
        let expected = [
            (7, "d".to_owned(), None, Some(1000)),
            (9, "e".to_owned(), Some("no".to_owned()), Some(2000)),
        ];
        assert_eq!(rows, expected);
        let last: i64 = database
            .query_row("SELECT max(seq) FROM sqlite_sequence", [], |row| row.get(0))
            .unwrap();
        assert!(last > 9, "{last}");
    }

    #[test]
    fn migration_of_version_2_preserves_rows_and_the_last_id() {
        let mut database = Connection::open_in_memory().unwrap();
        let rows = "INSERT INTO delta VALUES (7, 'd', 'deploy', 'why', NULL, NULL, '12-ab', 60);
                    UPDATE sqlite_sequence SET seq = 4000000000000000;
                    PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2";
        database.execute_batch(&format!("{TABLE};{rows}")).unwrap();
        check(&database).unwrap();
        migrate(&mut database).unwrap();
        check(&database).unwrap();
        assert_eq!(version(&database).unwrap(), Some(VERSION));
        let row = |sql: &str| {
            database.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        };
        let found: (i64, String, i64) = row("SELECT id, owner, age FROM delta").unwrap();
        assert_eq!(found, (7, "12-ab".to_owned(), 60));
        let last: i64 = last_id(&database).unwrap();
        assert_eq!(last, 4_000_000_000_000_000);
    }

    #[test]
    fn failed_migration_leaves_version_2_unchanged() {
        let mut database = Connection::open_in_memory().unwrap();
        let rows = "INSERT INTO delta VALUES (7, 'd', 'deploy', 'why', NULL, NULL, '12-ab', 60);
                    PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2";
        database.execute_batch(&format!("{TABLE};{rows}")).unwrap();
        let everything = |database: &Connection| -> Vec<(String, Option<String>)> {
            let sql = "SELECT name, sql FROM sqlite_schema UNION ALL SELECT 'last', seq FROM sqlite_sequence
                       UNION ALL SELECT 'row', id FROM delta";
            let mut select = database.prepare(sql).unwrap();
            let rows = select.query_map([], |row| {
                Ok((row.get(0)?, row.get::<_, Value>(1).map(|it| format!("{it:?}")).ok()))
            });
            rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
        };
        let before = everything(&database);
        let pages: i64 = database.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
        let limit = |database: &Connection, pages: i64| {
            database
                .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))
                .unwrap();
        };
        // Room for the index, but not for the table `delivered`.
        limit(&database, pages + 1);
        migrate(&mut database).unwrap_err();
        assert_eq!((version(&database).unwrap(), everything(&database)), (Some(2), before));
        limit(&database, pages + 2);
        migrate(&mut database).unwrap();
        check(&database).unwrap();
        assert_eq!(version(&database).unwrap(), Some(VERSION));
    }

    #[test]
    fn statement_is_not_prepared_again_for_another_value() {
        let mut database = Connection::open_in_memory().unwrap();
        migrate(&mut database).unwrap();
        configure(&database).unwrap();
        let mut select =
            database.prepare("SELECT id FROM delta ORDER BY id DESC LIMIT ?1").unwrap();
        for most in 1..5 {
            assert!(!select.exists([most]).unwrap());
        }
        assert_eq!(select.get_status(StatementStatus::RePrepare), 0);
    }

    #[test]
    fn foreign_or_later_schema_is_not_an_outbox() {
        for (sql, is_outbox) in [
            ("", true),
            ("CREATE TABLE theirs (a)", false),
            ("PRAGMA application_id = 1", false),
            ("PRAGMA user_version = 1", false),
            (
                "CREATE TABLE delta (id INTEGER PRIMARY KEY, decky, operation); PRAGMA user_version = 1",
                false,
            ),
            ("PRAGMA user_version = 4", false),
            (MARKS, false),
            (
                &format!(
                    "{TABLE}; {INDEX}; {DELIVERED}; CREATE TRIGGER a AFTER DELETE ON delta BEGIN SELECT 1; END; {MARKS}"
                ),
                false,
            ),
            (&format!("{TABLE}; {INDEX}; {DELIVERED}; {MARKS}"), true),
            (
                &format!("{TABLE}; PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2"),
                true,
            ),
            (&format!("{TABLE}; {MARKS}"), false),
            ("PRAGMA application_id = 0x444e4842; PRAGMA user_version = 4", false),
        ] {
            let database = Connection::open_in_memory().unwrap();
            database.execute_batch(sql).unwrap();
            assert_eq!(check(&database).is_ok(), is_outbox, "{sql}");
        }
    }
}
