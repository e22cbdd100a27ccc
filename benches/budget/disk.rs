//! The floor of everything that is committed: SQLite alone on a real disk.

use std::path::Path;
use std::time::{Duration, Instant};

use decnet_heartbeat::benching::{INDEX, TABLE};
use decnet_heartbeat::{LifecycleDelta, Operation};
use rusqlite::Connection;
use tempfile::TempDir;

/// The size from which a WAL does not grow any more: SQLite checkpoints it at 1,000 pages and then
/// writes from its start again. A commit to a file that still grows takes half as long again, and
/// several times as long while other programs write, because it also waits for the file system's
/// journal.
const GROWN: u64 = 32 + 1_000 * (24 + 4_096);

/// A folder below `target`. On some machines `/tmp` is in memory, where a commit costs nothing.
pub fn folder() -> Result<TempDir, String> {
    const TMPFS: i64 = 0x0102_1994;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let is_memory = rustix::fs::statfs(folder.path()).unwrap().f_type == TMPFS;
    if is_memory {
        Err("a target folder on a disk instead of a tmpfs".to_owned())
    } else {
        Ok(folder)
    }
}

/// Whether the WAL of this database has reached its full size.
pub fn wal_has_grown(database: &Path) -> bool {
    std::fs::metadata(database.with_extension("db-wal")).is_ok_and(|wal| wal.len() >= GROWN)
}

pub fn delta() -> LifecycleDelta {
    LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1")
}

/// A table like the outbox's, with its index and pragmas, written directly by SQLite. Its WAL has
/// reached its full size.
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
            table.delete_newest();
        }
        table
    }

    /// Inserts one row in the cheapest kind of transaction. Returns how long that took.
    pub fn commit(&self) -> Duration {
        let delta = delta();
        let since = Instant::now();
        self.insert(&delta);
        since.elapsed()
    }

    /// Inserts all rows in one transaction. Returns how long that took.
    pub fn commit_all(&self, deltas: &[LifecycleDelta]) -> Duration {
        let since = Instant::now();
        let transaction = self.0.unchecked_transaction().unwrap();
        deltas.iter().for_each(|delta| self.insert(delta));
        transaction.commit().unwrap();
        since.elapsed()
    }

    /// Deletes the newest row, as after its delivery.
    pub fn delete_newest(&self) {
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
