//! Other processes' SQLite files, read without leaving a trace: no mode changes, no content, and no file is made beside it. For
//! any thread.
//!
//! An ordinary connection to a file in WAL mode makes `-wal` and `-shm` even where it only reads, as this user's, and they stay.
//! So how a file is opened depends on what is beside it; see [`ReadMode`]. Looking there takes no descriptor of the file: closing one
//! would drop the locks of SQLite in this process.

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

/// Whose a file is, if there is anything in it. SQLite changes the mode of one that is empty, and as root also the owner of
/// `-wal` and `-shm`.
pub(crate) fn owner(file: &Path) -> Option<(u32, u32)> {
    let found = fs::symlink_metadata(file).ok().filter(|found| found.len() > 0)?;
    Some((found.uid(), found.gid()))
}

/// How the file is opened. What is empty counts as absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadMode {
    /// Neither `-wal` nor `-journal` is there: nobody writes. It is read as a file that does not change, which the caller makes
    /// sure of afterwards.
    Unchanging(FileVersion),
    /// There is a `-journal`: the file is not in WAL mode, and SQLite makes nothing beside it.
    Journal,
    /// There are `-wal` and `-shm`: both are only read, with SQLite's locks.
    Locking,
    /// There is a `-wal` alone: a process has died, and no other one has the file open. Or `-shm` has another owner than the
    /// file, and SQLite would change that.
    Alone,
}

impl ReadMode {
    /// What fits now. Where it is another one after the reading, what was read may be neither old nor new. An error: there is
    /// something in the place of one of its files that must not be opened.
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

    /// `within`: how long another process' lock is waited for.
    pub(crate) fn open(self, path: &Path, within: Duration) -> rusqlite::Result<Connection> {
        let database = self.connect(path, within)?;
        let first: rusqlite::Result<i64> =
            database.pragma_query_value(None, "schema_version", |row| row.get(0));
        match first.as_ref().map_err(rusqlite::Error::sqlite_error_code) {
            // An index in `-shm` that no process keeps up to date is of no use, and is not put in order here.
            Err(Some(ErrorCode::ReadOnly)) if self == Self::Locking => {
                Self::Alone.connect(path, within)
            }
            _ => Ok(database),
        }
    }

    fn connect(self, path: &Path, within: Duration) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_URI;
        let database = Connection::open_with_flags(uri(path) + self.parameters(), flags)?;
        database.busy_timeout(within)?;
        // Or closing it would write what is in `-wal` to the file.
        database.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        if self == Self::Alone {
            // The index of `-wal` is in memory then, and not in `-shm`.
            database.pragma_update(None, "locking_mode", "exclusive")?;
        }
        Ok(database)
    }
}

/// The path as SQLite reads a URI: everything that may mean something is escaped, and so is what is no text.
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
