//! A look at the outbox' file that changes nothing: no mode, no content, no file beside it. Runs on the thread that asks.
//!
//! An ordinary connection to a file in WAL mode makes `-wal` and `-shm`, and may remove both when it is closed. So how the
//! file is opened depends on what is beside it; see [`Way`].

use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::lock::beside;
use super::{Counts, deadline, entries, schema, store};
use crate::error::Error;
use crate::limits;

/// Whose a file is, if there is anything in it. SQLite changes the mode of one that is empty, and as root also the owner of
/// `-wal` and `-shm`.
fn owner(file: &Path) -> Option<(u32, u32)> {
    let found = fs::symlink_metadata(file).ok().filter(|found| found.len() > 0)?;
    Some((found.uid(), found.gid()))
}

/// How the file is opened. What is empty counts as absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// There is no `-wal`: all of it is in the file, and no process has it open to write.
    Unchanging,
    /// There are `-wal` and `-shm`: both are only read, with SQLite's locks.
    Locking,
    /// There is a `-wal` alone: a process has died, and no other one has the file open. Or `-shm` has another owner than the
    /// file, and SQLite would change that.
    Alone,
}

impl Way {
    fn to(path: &Path) -> Self {
        match (owner(&beside(path, "-wal")), owner(&beside(path, "-shm"))) {
            (None, _) => Self::Unchanging,
            (Some(_), Some(of_shm)) if Some(of_shm) == owner(path) => Self::Locking,
            (Some(_), _) => Self::Alone,
        }
    }

    fn parameters(self) -> &'static str {
        match self {
            Self::Unchanging => "?mode=ro&immutable=1",
            Self::Locking => "?mode=ro&readonly_shm=1",
            Self::Alone => "?mode=ro&vfs=unix-none",
        }
    }

    fn open(self, path: &Path) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_URI;
        let database = Connection::open_with_flags(uri(path) + self.parameters(), flags)?;
        database.busy_timeout(limits::OUTBOX_BUSY)?;
        // Or closing it would write what is in `-wal` to the file.
        database.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        if self == Self::Alone {
            // The index of `-wal` is in memory then, and not in `-shm`.
            database.pragma_update(None, "locking_mode", "exclusive")?;
        }
        Ok(database)
    }
}

/// What is in the file. `None`: it is of an older version, which `run` takes over.
pub(crate) fn look(path: &Path) -> Result<Option<Counts>, Error> {
    let error = |problem: &str| Error::outbox(Some(path), problem);
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => (),
        Ok(_) => return Err(error("is not a regular file; a symlink is not followed")),
        Err(source) => return Err(error("cannot be read").because(source)),
    }
    if owner(&beside(path, "-wal")).is_some_and(|of_wal| owner(path) != Some(of_wal)) {
        return Err(error("has another owner than the -wal beside it; run it as the owner of both"));
    }
    let end = deadline();
    loop {
        let way = Way::to(path);
        let looked = match counts(path, way) {
            // SQLite does not read an index that no process keeps up to date.
            Err(error) if way == Way::Locking && error.sqlite_error_code() == Some(ErrorCode::ReadOnly) => {
                counts(path, Way::Alone)
            }
            looked => looked,
        };
        match looked {
            // A process that has just opened or closed it has made or removed what is beside it.
            _ if Way::to(path) != way && Instant::now() < end => (),
            Ok(Ok(counts)) => return Ok(counts),
            Ok(Err(damage)) => return Err(error("is no outbox, or broken").because(damage)),
            Err(source) if store::is_of_the_content(&source) => {
                return Err(error("is no outbox, or broken").because(source));
            }
            Err(source) => return Err(error("cannot be read").because(source)),
        }
    }
}

/// `Ok(Err(why))`: it is no outbox, or damaged.
fn counts(path: &Path, way: Way) -> rusqlite::Result<Result<Option<Counts>, String>> {
    let database = way.open(path)?;
    if let Some(problem) = schema::problem(&database)? {
        return Ok(Err(problem.to_owned()));
    }
    let damage: String = database.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if damage != "ok" {
        return Ok(Err(damage));
    }
    match schema::version(&database)? {
        // Made, and nothing written yet.
        Some(0) => Ok(Ok(Some(Counts::default()))),
        Some(schema::VERSION) => {
            schema::overlay(&database)?;
            Ok(Ok(Some(entries::counts(&database)?)))
        }
        _ => Ok(Ok(None)),
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
