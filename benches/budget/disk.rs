//! A real disk, and SQLite on it and nothing else: the floor of everything that is committed.

use std::path::Path;
use std::time::{Duration, Instant};

use decnet_heartbeat::benching::{INDEX, TABLE};
use decnet_heartbeat::{LifecycleDelta, Operation};
use rusqlite::Connection;
use tempfile::TempDir;

/// A WAL of so many bytes has grown: SQLite checkpoints it at 1,000 pages and then writes it from its start again. A commit to
/// a file that still grows costs half as much again, and several times as much beside other programs that write, because it
/// waits for the file system's journal, too.
const GROWN: u64 = 32 + 1_000 * (24 + 4_096);

/// A folder below `target`, as `/tmp` is in memory on some machines and there a commit costs nothing.
pub fn folder() -> Result<TempDir, String> {
    const TMPFS: i64 = 0x0102_1994;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let is_memory = rustix::fs::statfs(folder.path()).unwrap().f_type == TMPFS;
    if is_memory {
        Err("a target folder on a disk, and not on a tmpfs".to_owned())
    } else {
        Ok(folder)
    }
}

/// Whether the WAL beside this database has grown once.
pub fn wal_has_grown(database: &Path) -> bool {
    std::fs::metadata(database.with_extension("db-wal")).is_ok_and(|wal| wal.len() >= GROWN)
}

pub fn delta() -> LifecycleDelta {
    LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1")
}

/// The same rows in a table like the outbox', with its index and its pragmas, written by SQLite and nothing else. Its WAL has
/// grown.
pub struct RawTable(Connection);

impl RawTable {
    pub fn new(path: &Path) -> Self {
        let database = Connection::open(path).unwrap();
        database.pragma_update(None, "journal_mode", "wal").unwrap();
        database.pragma_update(None, "synchronous", "full").unwrap();
        database.execute_batch(&format!("{TABLE}; {INDEX}")).unwrap();
        let table = Self(database);
        while !wal_has_grown(path) {
            table.commit();
            table.forget();
        }
        table
    }

    /// One row, in the cheapest transaction that there is; how long it took.
    pub fn commit(&self) -> Duration {
        let (delta, since) = (delta(), Instant::now());
        self.insert(&delta);
        since.elapsed()
    }

    /// All in one transaction; how long it took.
    pub fn commit_all(&self, deltas: &[LifecycleDelta]) -> Duration {
        let since = Instant::now();
        let transaction = self.0.unchecked_transaction().unwrap();
        deltas.iter().for_each(|delta| self.insert(delta));
        transaction.commit().unwrap();
        since.elapsed()
    }

    /// The last row is delivered.
    pub fn forget(&self) {
        self.0
            .prepare_cached("DELETE FROM delta WHERE id = (SELECT max(id) FROM delta)")
            .unwrap()
            .execute([])
            .unwrap();
    }

    fn insert(&self, delta: &LifecycleDelta) {
        let sql =
            "INSERT INTO delta (decky, operation, error, completed_at) VALUES (?1, ?2, ?3, ?4)";
        let row = (
            delta.decky(),
            delta.operation().as_str(),
            "compose exited with 1",
            1_700_000_000_000_000_i64,
        );
        self.0.prepare_cached(sql).unwrap().execute(row).unwrap();
    }
}
