//! What `heartbeat.db` looks like inside, and how an older one becomes a newer one. Runs on the thread that opens it.
//!
//! `delta` has deltas, and the operations that will become deltas:
//!
//! | column | |
//! | --- | --- |
//! | `id` | the order in which operations began (or deltas were pushed); one never comes back |
//! | `decky`, `operation` | what was done to whom |
//! | `error` | why it failed; null for a success |
//! | `completed_at` | when it ended, in microseconds since 1970; null while the operation is in flight |
//! | `rejected` | why the master will never take it; null unless it said so |
//! | `owner` | the process that runs the operation, or posts the delta itself; null: the row waits for delivery |
//! | `age` | seconds of delivery that it has waited through, see [`super::rows::Rows::grow_older`]; with an owner: seconds in which nobody could tell whether that process runs |
//!
//! `delivered` has the last deltas that the master accepted, for people, and when that was. The index `delta_owned` is of the
//! rows with an owner: older deltas of the same decky and operation are held until they end.

use std::time::SystemTime;

use rusqlite::config::DbConfig;
use rusqlite::types::FromSql;
use rusqlite::{Connection, Params, TransactionBehavior, ffi};

use crate::delta::micros;

/// The schema's version. A migration adds a step to [`migrate`] and raises it.
pub(super) const VERSION: i64 = 3;

/// "DNHB": tells our files from any other SQLite file. Version 1 did not have it.
const APPLICATION: i64 = 0x444e_4842;

/// Why this cannot be used as an outbox; `None`: it is one, or nothing yet. That a page cannot be read is an error, and no
/// reason.
pub(super) fn problem(db: &Connection) -> rusqlite::Result<Option<String>> {
    // All of it as of one moment: another process may just be making it.
    let moment = db.unchecked_transaction()?;
    match version(&moment)? {
        None => return Ok(Some("it is another program's, or a later version's".to_owned())),
        Some(1..) if last_id(&moment)? > LAST_ID_AT_MOST => {
            return Ok(Some("its ids are used up".to_owned()));
        }
        Some(_) => drop(moment),
    }
    let damage: String = value(db, "PRAGMA quick_check(1)", [])?;
    // In the words of SQLite, which has no code for it here.
    if damage.contains("unable to get the page") || damage.contains("failed to get page") {
        return Err(rusqlite::Error::SqliteFailure(
            ffi::Error::new(ffi::SQLITE_IOERR_READ),
            Some(damage),
        ));
    }
    Ok(Some(damage).filter(|damage| damage != "ok"))
}

/// The last id that the file knows of. A sequence that is broken must not lead back to ids of rows that are there.
pub(crate) fn last_id(db: &Connection) -> rusqlite::Result<i64> {
    let sequence = "SELECT max(seq) FROM main.sqlite_sequence WHERE name = 'delta' AND typeof(seq) = 'integer'";
    value(
        db,
        &format!(
            "SELECT max(ifnull(({sequence}), 0), ifnull((SELECT max(id) FROM main.delta), 0))"
        ),
        [],
    )
}

/// The one value that a statement gives, which is used again and again.
pub(super) fn value<T: FromSql>(
    db: &Connection,
    sql: &str,
    params: impl Params,
) -> rusqlite::Result<T> {
    db.prepare_cached(sql)?.query_row(params, |row| row.get(0))
}

/// Ids begin at the clock, far below this, and above it none may be left for the next row one day.
pub(crate) const LAST_ID_AT_MOST: i64 = i64::MAX / 4 * 3;

/// Which version of the schema this is, 0 for an empty database; `None`: it is not ours.
pub(super) fn version(db: &Connection) -> rusqlite::Result<Option<i64>> {
    let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let tables: i64 =
        db.query_row("SELECT count(*) FROM main.sqlite_schema", [], |row| row.get(0))?;
    Ok(match (pragma("application_id")?, pragma("user_version")?, tables) {
        (0, 0, 0) => Some(0),
        (0, 1, _) if is_made_of(db, &[TABLE_1, SEQUENCE])? => Some(1),
        (APPLICATION, 2, _) if is_made_of(db, &[TABLE, SEQUENCE])? => Some(2),
        (APPLICATION, VERSION, _) if is_made_of(db, &[DELIVERED, TABLE, INDEX, SEQUENCE])? => {
            Some(VERSION)
        }
        _ => None,
    })
}

/// Whether the tables of these names are made so, white space aside, and no trigger meddles: any program may leave any mark.
fn is_made_of(db: &Connection, parts: &[&str]) -> rusqlite::Result<bool> {
    let mut select = db.prepare(
        "SELECT CAST(ifnull(sql, '') AS BLOB) FROM main.sqlite_schema
         WHERE name IN ('delta', 'delta_owned', 'delivered', 'sqlite_sequence') OR type = 'trigger' ORDER BY name",
    )?;
    let made = select
        .query_map([], |row| row.get::<_, Vec<u8>>(0))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let is = |(made, part): (&Vec<u8>, &&str)| {
        str::from_utf8(made).is_ok_and(|made| made.split_whitespace().eq(part.split_whitespace()))
    };
    Ok(made.len() == parts.len() && made.iter().zip(parts).all(is))
}

/// How many frames the index says are in the log.
pub(super) fn frames(db: &Connection) -> rusqlite::Result<i64> {
    db.query_row("PRAGMA wal_checkpoint(NOOP)", [], |row| row.get(1))
}

/// Brings an empty or older outbox to [`VERSION`], in one transaction. One of that version is not locked for it.
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
        // Ours already: another process may have been faster.
        _ => return Ok(()),
    };
    transaction.execute_batch(&steps)?;
    let last = last_id(&transaction)?.max(micros(SystemTime::now()));
    transaction.execute_batch(&format!(
        "DELETE FROM sqlite_sequence WHERE name = 'delta'; INSERT INTO sqlite_sequence VALUES ('delta', {last});
         PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}"
    ))?;
    transaction.commit()?;
    // So the database has these pages: where `-wal` takes the last of the disk, there must be room for them when it is closed.
    // Where they cannot be moved there now they may be later.
    let _ = value::<i64>(db, "PRAGMA wal_checkpoint(TRUNCATE)", []);
    // The first commit to a log costs one sync more: now, and not with the first push.
    let _ = db.pragma_update(None, "user_version", VERSION);
    Ok(())
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

/// Only rows with an owner are in it, so others cost nothing.
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

/// What a connection is set to.
pub(super) fn configure(database: &Connection) -> rusqlite::Result<()> {
    database.set_prepared_statement_cache_capacity(STATEMENTS);
    // Or a statement whose plan looks at a parameter would be prepared again for each value, which takes longer than it.
    database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    database.pragma_update(None, "temp_store", "memory")?;
    // Of a file whose encoding is damaged SQLite says so only when it makes the temporary schema.
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
    fn version_2_keeps_its_rows_and_gives_no_id_again() {
        let mut database = Connection::open_in_memory().unwrap();
        let rows = "INSERT INTO delta VALUES (7, 'd', 'deploy', 'why', NULL, NULL, '12-ab', 60);
                    UPDATE sqlite_sequence SET seq = 4000000000000000;
                    PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2";
        database.execute_batch(&format!("{TABLE};{rows}")).unwrap();
        assert_eq!(problem(&database).unwrap(), None);
        migrate(&mut database).unwrap();
        assert_eq!(
            (problem(&database).unwrap(), version(&database).unwrap()),
            (None, Some(VERSION))
        );
        let row = |sql: &str| {
            database.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        };
        let found: (i64, String, i64) = row("SELECT id, owner, age FROM delta").unwrap();
        assert_eq!(found, (7, "12-ab".to_owned(), 60));
        let last: i64 = last_id(&database).unwrap();
        assert_eq!(last, 4_000_000_000_000_000);
    }

    #[test]
    fn a_migration_that_fails_leaves_version_2_as_it_was() {
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
        // Room for the index, and none for the table of what was delivered.
        limit(&database, pages + 1);
        migrate(&mut database).unwrap_err();
        assert_eq!((version(&database).unwrap(), everything(&database)), (Some(2), before));
        limit(&database, pages + 2);
        migrate(&mut database).unwrap();
        assert_eq!(
            (problem(&database).unwrap(), version(&database).unwrap()),
            (None, Some(VERSION))
        );
    }

    #[test]
    fn no_statement_is_prepared_again_for_another_value() {
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
    fn what_is_not_ours_or_newer_is_told_apart() {
        for (sql, ours) in [
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
            assert_eq!(problem(&database).unwrap().is_none(), ours, "{sql}");
        }
    }
}
