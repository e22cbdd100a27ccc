//! Reads SQLite files of other processes without changing them: no mode, no content, and no new
//! files. For any thread.
//!
//! An ordinary connection to a file in WAL mode creates `-wal` and `-shm` even if it only reads.
//! They would belong to this user, and stay. So the way a file is opened depends on the files that
//! exist, see [`ReadMode`]. The check opens no descriptor, because closing one would drop SQLite's
//! locks in this process.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::files::{FileVersion, beside};
use crate::sqlite::files;

/// The owner of a file that is not empty. SQLite changes the mode of an empty file, and as root
/// also the owner of `-wal` and `-shm`.
pub(crate) fn owner(file: &Path) -> Option<(u32, u32)> {
    let found = fs::symlink_metadata(file).ok().filter(|found| found.len() > 0)?;
    Some((found.uid(), found.gid()))
}

/// How the file is opened. An empty file counts as absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadMode {
    /// There is no `-wal` and no `-journal`, so no process is writing. The file is read as
    /// immutable; the caller checks afterwards that it has not changed.
    Unchanging(FileVersion),
    /// There is a `-journal`, so the file is not in WAL mode, and SQLite creates no files.
    Journal,
    /// There are `-wal` and `-shm`. Both are only read, with SQLite's locks.
    Locking,
    /// There is a `-wal` without `-shm`: a process was killed, and no other process has the file
    /// open. Or `-shm` and the file have different owners, and SQLite would change that.
    Alone,
}

impl ReadMode {
    /// The mode for the files that exist now. If the mode is different after the read, the result
    /// may be inconsistent. It is an error if one of the files must not be opened.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        files::check(path)?;
        Ok(match (owner(&beside(path, "-wal")), owner(&beside(path, "-shm"))) {
            (None, _) if beside(path, "-journal").exists() => Self::Journal,
            (None, _) => Self::Unchanging(FileVersion::of(path)),
            (Some(_), Some(of_shm)) if Some(of_shm) == owner(path) => Self::Locking,
            (Some(_), _) => Self::Alone,
        })
    }

    fn parameters(self) -> &'static str {
        match self {
            Self::Unchanging(_) => "?mode=ro&immutable=1",
            Self::Journal => "?mode=ro",
            Self::Locking => "?mode=ro&readonly_shm=1",
            Self::Alone => "?mode=ro&vfs=unix-none",
        }
    }

    /// Opens the file. A query waits for the lock of another process up to `timeout`.
    pub(crate) fn open(self, path: &Path, timeout: Duration) -> rusqlite::Result<Connection> {
        let database = self.connect(path, timeout)?;
        let first: rusqlite::Result<i64> =
            database.pragma_query_value(None, "schema_version", |row| row.get(0));
        match first.as_ref().map_err(rusqlite::Error::sqlite_error_code) {
            // The index in `-shm` is stale, as no process updates it. It must not be repaired here.
            Err(Some(ErrorCode::ReadOnly)) if self == Self::Locking => {
                Self::Alone.connect(path, timeout)
            }
            _ => Ok(database),
        }
    }

    fn connect(self, path: &Path, timeout: Duration) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_URI;
        let database = Connection::open_with_flags(uri(path) + self.parameters(), flags)?;
        database.busy_timeout(timeout)?;
        // Otherwise closing the connection would write the content of `-wal` to the file.
        database.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        if self == Self::Alone {
            // The index of `-wal` is then in memory, and not in `-shm`.
            database.pragma_update(None, "locking_mode", "exclusive")?;
        }
        Ok(database)
    }
}

/// The path as a URI for SQLite. All bytes but letters, digits and `/-_.` are escaped.
fn uri(path: &Path) -> String {
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(uri, "%{byte:02x}");
        }
    }
    uri
}
