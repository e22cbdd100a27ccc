//! The outbox file: it is created with mode 0600 before SQLite opens it, and quarantined if it is
//! not an outbox. Runs on the outbox thread.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::fs::{self, DirEntry, Metadata, OpenOptions};
use std::io::{self, Read};
use std::iter;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Instant, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::ffi::SQLITE_IOERR_SHORT_READ;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::queued::Role;
use super::schema;
use crate::delta::{from_micros, micros};
use crate::error::{Error, sanitize_path};
use crate::files::{Identity, beside, folder, identity};
use crate::limits;
use crate::panics::quietly;
use crate::sqlite::files::{DatabaseFile, PARTS, create, ignore_not_found, with_real_folder};
use crate::text::sanitize;

/// What an error of SQLite means for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileProblem {
    /// Another process has it locked, for a limited time.
    Locked,
    /// It is not a database, or it is damaged.
    Corrupt,
    /// The disk is full, read-only or failing.
    Unwritable,
}

impl FileProblem {
    pub(super) fn of(error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt,
            // The file is shorter than its header says.
            _ if error.sqlite_extended_error_code() == Some(SQLITE_IOERR_SHORT_READ) => {
                Self::Corrupt
            }
            _ => Self::Unwritable,
        }
    }
}

pub(super) const CORRUPT: &str = "is corrupt, or not an outbox";

/// Whether the content of the file caused the error. For some unusable files SQLite returns only
/// its generic error, which the calls here do not return for other reasons.
pub(super) fn is_content_error(error: &rusqlite::Error) -> bool {
    FileProblem::of(error) == FileProblem::Corrupt
        || error.sqlite_error_code() == Some(ErrorCode::Unknown)
}

/// Why a file cannot be opened.
struct OpenFailure {
    error: Error,
    /// What is wrong with the content, if that is the reason.
    damage: Option<String>,
}

impl From<Error> for OpenFailure {
    fn from(error: Error) -> Self {
        Self { error, damage: None }
    }
}

fn error(path: &Path, problem: &str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::outbox(Some(path), problem).with_source(source)
}

/// Opens the outbox at `path`, or creates it. The process that delivers quarantines a file that is
/// corrupt or not an outbox, and creates a new one. It does that only if a second connection finds
/// the same damage, because a single failed read looks like damage to SQLite, and if the whole file
/// can be read. Waits until `deadline` for the lock of another process.
///
/// The caller must have the [write lock](super::locks::WriteLock). Of two processes without it, the
/// slower one would delete what the faster one has written.
pub(super) fn open(
    path: &Path,
    role: Role,
    deadline: Instant,
) -> Result<(Connection, Identities), Error> {
    let unwritable = |source| error(path, "cannot be written", source);
    let path = &with_real_folder(path).map_err(unwritable)?;
    let first = match prepare_and_connect(path, deadline) {
        Ok(opened) => return Ok(opened),
        Err(failure) => failure.damage,
    };
    if first.is_some() {
        // The index of another log looks like damage. Processes that have this index open will
        // reopen the outbox.
        remove_index(path).map_err(unwritable)?;
    }
    let failure = match prepare_and_connect(path, deadline) {
        Ok(opened) => return Ok(opened),
        Err(failure) => failure,
    };
    let Some(damage) = failure.damage else { return Err(failure.error) };
    if first.as_ref() != Some(&damage) {
        let problem = "was read twice with different results; check the disk";
        return Err(error(path, problem, damage));
    }
    if role != Role::Deliver {
        return Err(failure.error);
    }
    read_through(path).map_err(|source| error(path, "cannot be read", source))?;
    let quarantine = quarantine(path)
        .map_err(|source| error(path, "is corrupt, and cannot be renamed", source))?;
    quietly(|| {
        log::error!(
            "outbox file is corrupt, or not an outbox; it was renamed and a new one created: \
             file={} renamed_to={} error={:?}",
            sanitize_path(path),
            sanitize_path(&quarantine),
            sanitize(&damage)
        );
    });
    prepare_and_connect(path, deadline).map_err(|failure| failure.error)
}

fn prepare_and_connect(
    path: &Path,
    deadline: Instant,
) -> Result<(Connection, Identities), OpenFailure> {
    prepare(path).map_err(|source| error(path, "cannot be written", source))?;
    loop {
        match connect(path, deadline) {
            Ok(db) => return Ok(verify(path, db)?),
            // If two processes switch a new file to WAL, SQLite returns this without waiting.
            Err(source)
                if FileProblem::of(&source) == FileProblem::Locked && Instant::now() < deadline =>
            {
                thread::sleep(limits::OUTBOX_PAUSE);
            }
            Err(source) if is_content_error(&source) => {
                let damage = source.to_string();
                let error = error(path, CORRUPT, damage.clone());
                return Err(OpenFailure { error, damage: Some(damage) });
            }
            Err(source) => return Err(error(path, "cannot be opened", source).into()),
        }
    }
}

/// Checks that the connection uses the files that are at their paths, and that its index belongs to
/// its log.
fn verify(path: &Path, db: Connection) -> Result<(Connection, Identities), Error> {
    let identities = identities(path);
    let log_is_empty =
        || fs::symlink_metadata(beside(path, "-wal")).is_ok_and(|log| log.len() == 0);
    let problem = if !is_open_here(path, &identities) {
        "was replaced while it was opened"
    } else if schema::frames(&db).unwrap_or(0) > 0 && log_is_empty() {
        // The log was deleted. No process may open the outbox with this index any more.
        let _ = remove_index(path);
        "had a -shm of another -wal"
    } else {
        return Ok((db, identities));
    };
    let _ = disable_checkpoint_on_close(&db);
    Err(Error::outbox(Some(path), problem))
}

/// Lets SQLite close the connection without a change of the files at its paths, which may belong to
/// another outbox by now. Otherwise it would write the log to the database, and delete the log by
/// its name.
pub(super) fn disable_checkpoint_on_close(db: &Connection) -> rusqlite::Result<()> {
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map(drop)
}

/// The identities of the database, its log and its index.
pub(super) type Identities = [Option<Identity>; 3];

/// The identities of the files that are at their paths now.
pub(super) fn identities(path: &Path) -> Identities {
    ["", "-wal", "-shm"]
        .map(|part| fs::symlink_metadata(beside(path, part)).ok().map(|found| identity(&found)))
}

/// Whether this process has all of these files open. SQLite does not report which log it uses.
/// Without `/proc` the answer is yes.
fn is_open_here(path: &Path, files: &Identities) -> bool {
    let Ok(open) = open_here(path) else { return true };
    files.iter().all(|file| file.is_some_and(|file| open.contains(&file)))
}

/// The files with this name, and any suffix, that this process has open. Other descriptors are not
/// examined, because their file systems may block.
fn open_here(path: &Path) -> io::Result<BTreeSet<Identity>> {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let identity = |entry: io::Result<DirEntry>| {
        let descriptor = entry.ok()?.path();
        let target = fs::read_link(&descriptor).ok()?;
        if !target.file_name()?.as_encoded_bytes().starts_with(name) {
            return None;
        }
        fs::metadata(&descriptor).ok().map(|found| identity(&found))
    };
    Ok(fs::read_dir("/proc/self/fd")?.filter_map(identity).collect())
}

/// Checks that the file and its log can be read, up to the size of an outbox. SQLite reports a page
/// as damaged if the disk does not return it. A file that this process has open is not opened
/// again, because closing it would drop SQLite's locks.
fn read_through(path: &Path) -> io::Result<()> {
    for part in ["", "-journal", "-wal"] {
        let path = beside(path, part);
        // This descriptor is closed at once, or the file would count as open here.
        let Some(found) = DatabaseFile::open(&path)?.map(|file| identity(&file.metadata)) else {
            continue;
        };
        if open_here(&path)?.contains(&found) {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "another connection of this process has it open",
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)?;
        io::copy(&mut file.take(limits::READ_THROUGH), &mut io::sink())?;
    }
    Ok(())
}

fn connect(path: &Path, deadline: Instant) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut db = Connection::open_with_flags(path, flags)?;
    db.busy_timeout(deadline.saturating_duration_since(Instant::now()))?;
    // Checked before anything is changed.
    schema::check(&db)?;
    schema::configure(&db)?;
    db.pragma_update(None, "journal_mode", "wal")?;
    db.pragma_update(None, "synchronous", "full")?;
    schema::migrate(&mut db)?;
    Ok(db)
}

/// Creates the file with mode 0600 if it does not exist. SQLite would create it readable by others,
/// and it gives `-wal` and `-shm` the mode and the owner of this file. Existing files must be
/// regular files with one link, and must not belong to another user. The permissions of group and
/// others are removed.
fn prepare(path: &Path) -> io::Result<()> {
    let folder = fs::metadata(folder(path))?;
    let open = |part| -> io::Result<Option<DatabaseFile>> {
        let file = DatabaseFile::open(&beside(path, part))?;
        file.iter().try_for_each(|file| file.check_owner(&folder))?;
        Ok(file)
    };
    for part in PARTS {
        open(part)?.map_or(Ok(false), |file| file.remove_if_abandoned_by_root(&folder))?;
    }
    match open("")? {
        None => {
            remove_other_parts(path)?;
            create(path)?;
        }
        // SQLite writes the database before it creates a log.
        Some(database) if database.metadata.len() == 0 => remove_other_parts(path)?,
        // The log was deleted. Its index must not be used with the next log.
        Some(_) if open("-wal")?.is_none() => remove_index(path)?,
        Some(_) => (),
    }
    open("")?.iter().for_each(|file| file.chown_to_owner_of(&folder));
    PARTS.iter().try_for_each(|part| open(part)?.map_or(Ok(()), |file| file.make_private()))
}

/// Extends an index that another program has truncated, if it is still the same file. SQLite maps
/// it into memory, and the kernel kills a process that accesses memory beyond the file's end.
/// SQLite then rebuilds the content. Returns whether it was truncated.
pub(super) fn repair_index(path: &Path, index: Identity) -> io::Result<bool> {
    let path = beside(path, "-shm");
    let is_truncated =
        |found: &Metadata| found.len() < limits::INDEX_HEADER && identity(found) == index;
    if !is_truncated(&fs::symlink_metadata(&path)?) {
        return Ok(false);
    }
    let file = DatabaseFile::open(&path)?.filter(|file| is_truncated(&file.metadata));
    file.map_or(Ok(false), |file| file.set_length(limits::INDEX).map(|()| true))
}

/// Deletes the index. The next process that opens the file rebuilds it from the log.
fn remove_index(path: &Path) -> io::Result<()> {
    ignore_not_found(fs::remove_file(beside(path, "-shm")))
}

/// Deletes the files of an older database from beside a new one. SQLite must not use them, nor
/// change the index of the old one, which another process may have open.
fn remove_other_parts(path: &Path) -> io::Result<()> {
    ["-journal", "-wal", "-shm"]
        .iter()
        .try_for_each(|part| ignore_not_found(fs::remove_file(beside(path, part))))
}

/// Renames a file that is not a usable outbox, with the files that SQLite keeps beside it. Returns
/// its new path.
fn quarantine(path: &Path) -> io::Result<PathBuf> {
    let now = from_micros(micros(SystemTime::now()));
    let name =
        format!("-aside-{}", humantime::format_rfc3339_seconds(now).to_string().replace(':', ""));
    let names = iter::once(name.clone()).chain((2..).map(|n| format!("{name}-{n}")));
    let target = names
        .map(|name| beside(path, &name))
        .find(|target| fs::symlink_metadata(target).is_err())
        .ok_or(io::ErrorKind::AlreadyExists)?;
    // The database last, so that its log is never beside a new one.
    for part in ["-shm", "-wal", "-journal", ""] {
        ignore_not_found(fs::rename(beside(path, part), beside(&target, part)))?;
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_open_files_with_the_outbox_name_are_examined() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let open = ["heartbeat.db", "heartbeat.db-wal", "other"]
            .map(|name| fs::File::create(at(name)).unwrap());
        let [database, log, other] =
            open.each_ref().map(|file| identity(&file.metadata().unwrap()));
        assert_eq!(open_here(&at("heartbeat.db")).unwrap(), BTreeSet::from([database, log]));
        assert_eq!(open_here(&at("other")).unwrap(), BTreeSet::from([other]));
    }

    #[test]
    fn log_and_index_beside_an_empty_file_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heartbeat.db");
        let beside = [beside(&path, "-wal"), beside(&path, "-shm")];
        beside.iter().chain([&path]).for_each(|file| fs::write(file, "").unwrap());
        prepare(&path).unwrap();
        assert!(path.exists() && !beside.iter().any(|file| file.exists()));
    }

    #[test]
    fn log_and_index_beside_a_new_file_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heartbeat.db");
        let beside = [beside(&path, "-wal"), beside(&path, "-shm")];
        beside.iter().for_each(|file| fs::write(file, "another's").unwrap());
        prepare(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert!(!beside.iter().any(|file| file.exists()));
        beside.iter().chain([&path]).for_each(|file| fs::write(file, "this one's").unwrap());
        prepare(&path).unwrap();
        assert!(beside.iter().all(|file| file.exists()));
    }
}
