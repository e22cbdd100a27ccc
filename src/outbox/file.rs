//! The outbox' file: made for its owner alone before SQLite has it, opened, and moved aside when it is none of ours. Runs
//! on the outbox thread.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Instant, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::ffi::SQLITE_IOERR_SHORT_READ;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::schema;
use crate::database_files::{PARTS, Place, if_there, in_real_folder, make};
use crate::delta::{from_micros, micros};
use crate::error::{Error, printable_path};
use crate::files::{Identity, beside, folder, identity};
use crate::limits;
use crate::panics::quietly;
use crate::text::printable;

/// What an error of SQLite means for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Another process has it locked. It will come back.
    Locked,
    /// It is no database any more.
    Corrupt,
    /// A full disk, a read-only file system, a failing one.
    Unwritable,
}

impl Refusal {
    pub(super) fn of(error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt,
            // The file ends before its pages do.
            _ if error.sqlite_extended_error_code() == Some(SQLITE_IOERR_SHORT_READ) => Self::Corrupt,
            _ => Self::Unwritable,
        }
    }
}

/// Whether what is in the file is at fault. Of some files that it cannot use, SQLite says no more than that this is an
/// error: all that is done here does well on every other.
pub(super) fn is_of_the_content(error: &rusqlite::Error) -> bool {
    Refusal::of(error) == Refusal::Corrupt || error.sqlite_error_code() == Some(ErrorCode::Unknown)
}

/// Why there is no connection.
enum Failure {
    /// What is in the file is at fault: it is no outbox, or damaged.
    Damage(String),
    /// The file cannot be used now. That says nothing about what is in it.
    Unusable(Error),
}

/// A connection to the outbox at `path`, made where there is none. A file that is no outbox, or damaged, is moved aside for
/// a new one if we `may_replace` it, and only if a second, fresh connection finds the same damage: to SQLite a read that
/// fails once looks the same. All of it must be readable, too. `deadline`: up to when another process' lock is waited for.
///
/// It must be the [turn](super::lock::Turn) of this process: of two, the slower one would remove what the faster one has
/// already written.
pub(super) fn open(path: &Path, may_replace: bool, deadline: Instant) -> Result<(Connection, Identities), Error> {
    let unusable = |problem: &str| Error::outbox(Some(path), problem);
    let path = &in_real_folder(path).map_err(|source| unusable("cannot be written").because(source))?;
    let first = match prepare_and_connect(path, deadline) {
        Ok(db) => return Ok(db),
        Err(Failure::Unusable(_)) => None,
        Err(Failure::Damage(damage)) => {
            // An index of another log shows damage where there is none. Whoever has it open opens the outbox anew.
            remove_index(path).map_err(|source| unusable("cannot be written").because(source))?;
            Some(damage)
        }
    };
    let damage = match prepare_and_connect(path, deadline) {
        Ok(db) => return Ok(db),
        Err(Failure::Unusable(error)) => return Err(error),
        Err(Failure::Damage(damage)) if first.as_ref() != Some(&damage) => {
            return Err(unusable("is not read the same twice; check the disk").because(damage));
        }
        Err(Failure::Damage(damage)) if !may_replace => {
            return Err(unusable("is no outbox, or broken").because(damage));
        }
        Err(Failure::Damage(damage)) => damage,
    };
    read_through(path).map_err(|source| unusable("cannot be read").because(source))?;
    let aside = move_aside(path).map_err(|source| unusable("is broken, and cannot be moved aside").because(source))?;
    quietly(|| {
        log::error!(
            "the outbox was broken or none, it is moved aside and a new one begun: file={} aside={} error={:?}",
            printable_path(path),
            printable_path(&aside),
            printable(&damage)
        )
    });
    prepare_and_connect(path, deadline).map_err(|failure| match failure {
        Failure::Damage(damage) => unusable("cannot be made anew").because(damage),
        Failure::Unusable(error) => error,
    })
}

fn prepare_and_connect(path: &Path, deadline: Instant) -> Result<(Connection, Identities), Failure> {
    let unusable = |problem: &str| Error::outbox(Some(path), problem);
    prepare(path).map_err(|source| Failure::Unusable(unusable("cannot be written").because(source)))?;
    loop {
        match connect(path, deadline) {
            Ok(Ok(db)) => return verify(path, db),
            Ok(Err(damage)) => return Err(Failure::Damage(damage)),
            Err(error) if is_of_the_content(&error) => return Err(Failure::Damage(error.to_string())),
            // To two that turn a new file to WAL at once SQLite says so without waiting.
            Err(error) if Refusal::of(&error) == Refusal::Locked && Instant::now() < deadline => {
                thread::sleep(limits::OUTBOX_PAUSE);
            }
            Err(error) => return Err(Failure::Unusable(unusable("cannot be opened").because(error))),
        }
    }
}

/// The connection, if it is one to the files that are at their places, and its index is of this log.
fn verify(path: &Path, db: Connection) -> Result<(Connection, Identities), Failure> {
    let unusable = |problem: &str| Failure::Unusable(Error::outbox(Some(path), problem));
    let identities = identities(path);
    let problem = match (is_open_here(path, &identities), schema::frames(&db).unwrap_or(0)) {
        (false, _) => "was replaced while it was opened",
        (true, 1..) if fs::symlink_metadata(beside(path, "-wal")).is_ok_and(|log| log.len() == 0) => {
            // Somebody has removed the log, and nobody opens the outbox with this index any more.
            let _ = remove_index(path);
            "had an index of another log"
        }
        _ => return Ok((db, identities)),
    };
    let _ = leave(&db);
    Err(unusable(problem))
}

/// The connection is closed without a change to what is at the places of its files, which may be another outbox' by now: an
/// ordinary close would write the log to the database, and remove the log by its name.
pub(super) fn leave(db: &Connection) -> rusqlite::Result<()> {
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map(drop)
}

/// Which files the database, its log and its index are.
pub(super) type Identities = [Option<Identity>; 3];

/// The files that are at their places now.
pub(super) fn identities(path: &Path) -> Identities {
    ["", "-wal", "-shm"].map(|part| fs::symlink_metadata(beside(path, part)).ok().map(|found| identity(&found)))
}

/// Whether this process has all of them open. SQLite does not say which log it has; where nothing else does, it is believed.
fn is_open_here(path: &Path, files: &Identities) -> bool {
    let Ok(open) = open_here(path) else { return true };
    files.iter().all(|file| file.is_some_and(|file| open.contains(&file)))
}

/// The open files of this process whose names begin with the name of the outbox. Other open files are not examined, because
/// their file systems may not answer.
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

/// Whether the file and its log can be read at all, as far as an outbox may be long: SQLite calls a page damaged that the disk
/// does not give it. What this process has open otherwise is not opened, as closing it would drop the locks on it.
fn read_through(path: &Path) -> io::Result<()> {
    for part in ["", "-journal", "-wal"] {
        let path = beside(path, part);
        // The descriptor of the look is closed again, or the file would always be open here.
        let Some(found) = Place::look(&path)?.map(|place| identity(&place.metadata)) else { continue };
        if open_here(&path)?.contains(&found) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another connection of this process has it open"));
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)?;
        io::copy(&mut file.take(limits::READ_THROUGH), &mut io::sink())?;
    }
    Ok(())
}

/// `Ok(Err(damage))`: the file can be read, and what is in it is at fault.
fn connect(path: &Path, deadline: Instant) -> rusqlite::Result<Result<Connection, String>> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut db = Connection::open_with_flags(path, flags)?;
    db.busy_timeout(deadline.saturating_duration_since(Instant::now()))?;
    // Before anything is changed in it.
    if let Some(problem) = schema::problem(&db)? {
        return Ok(Err(problem));
    }
    schema::configure(&db)?;
    db.pragma_update(None, "journal_mode", "wal")?;
    db.pragma_update(None, "synchronous", "full")?;
    schema::migrate(&mut db)?;
    Ok(Ok(db))
}

/// Makes the file unless it is there, with mode 0600 from its first byte: SQLite would make it readable by others, and
/// gives `-wal` and `-shm` the mode and the owner that it finds here. What is there, and beside it, must be regular files
/// with one link and none of a stranger's; others' permissions are taken from those that are ours.
fn prepare(path: &Path) -> io::Result<()> {
    let folder = fs::metadata(folder(path))?;
    let look = |part| own_part(path, part, &folder);
    for part in PARTS {
        look(part)?.map_or(Ok(false), |place| place.remove_if_left_by_root(&folder))?;
    }
    match look("")? {
        None => {
            remove_what_is_beside(path)?;
            make(path)?;
        }
        // SQLite writes to the database before it writes to a log.
        Some(database) if database.metadata.len() == 0 => remove_what_is_beside(path)?,
        // An index without a log: somebody has removed the log. It must not be taken for that of the next log.
        Some(_) if look("-wal")?.is_none() => remove_index(path)?,
        Some(_) => (),
    }
    look("")?.iter().for_each(|place| place.give_to_owner_of(&folder));
    PARTS.iter().try_for_each(|part| look(part)?.map_or(Ok(()), |place| place.make_private()))
}

/// `None`: there is no such file.
fn own_part(path: &Path, part: &str, folder: &Metadata) -> io::Result<Option<Place>> {
    let place = Place::look(&beside(path, part))?;
    place.iter().try_for_each(|place| place.refuse_strangers(folder))?;
    Ok(place)
}

/// Makes an index long again that somebody has cut off, if it is still this one. It is mapped into memory, and the kernel would
/// end the process where SQLite touches what is not there. SQLite makes anew what is in it. Whether it was cut off.
pub(super) fn mend_index(path: &Path, index: Identity) -> io::Result<bool> {
    let path = beside(path, "-shm");
    let is_cut_off = |found: &Metadata| found.len() < limits::INDEX_HEADER && identity(found) == index;
    if !is_cut_off(&fs::symlink_metadata(&path)?) {
        return Ok(false);
    }
    let place = Place::look(&path)?.filter(|place| is_cut_off(&place.metadata));
    place.map_or(Ok(false), |place| place.set_length(limits::INDEX).map(|()| true))
}

/// The next process to open it makes the index anew, of the log that is there.
fn remove_index(path: &Path) -> io::Result<()> {
    if_there(fs::remove_file(beside(path, "-shm")))
}

/// What is beside a new file belonged to another one, which somebody may still have open. It goes: SQLite must not take it for
/// this one's, and must not change the index of the other one.
fn remove_what_is_beside(path: &Path) -> io::Result<()> {
    ["-journal", "-wal", "-shm"].iter().try_for_each(|part| if_there(fs::remove_file(beside(path, part))))
}

/// Moves what is no outbox out of the way, with what SQLite keeps beside it. Where it is now.
fn move_aside(path: &Path) -> io::Result<PathBuf> {
    let now = from_micros(micros(SystemTime::now()));
    let name = format!("-aside-{}", humantime::format_rfc3339_seconds(now).to_string().replace(':', ""));
    let names = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name}-{n}")));
    let aside = names.map(|name| beside(path, &name)).find(|aside| fs::symlink_metadata(aside).is_err());
    let aside = aside.ok_or(io::ErrorKind::AlreadyExists)?;
    // The database last: its log must not be found beside a new one.
    for suffix in ["-shm", "-wal", "-journal", ""] {
        if_there(fs::rename(beside(path, suffix), beside(&aside, suffix)))?;
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_with_other_names_are_not_examined() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let open = ["heartbeat.db", "heartbeat.db-wal", "other"].map(|name| fs::File::create(at(name)).unwrap());
        let [database, log, other] = open.each_ref().map(|file| identity(&file.metadata().unwrap()));
        assert_eq!(open_here(&at("heartbeat.db")).unwrap(), BTreeSet::from([database, log]));
        assert_eq!(open_here(&at("other")).unwrap(), BTreeSet::from([other]));
    }

    #[test]
    fn what_is_beside_an_empty_file_belonged_to_another_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heartbeat.db");
        let beside = [beside(&path, "-wal"), beside(&path, "-shm")];
        beside.iter().chain([&path]).for_each(|file| fs::write(file, "").unwrap());
        prepare(&path).unwrap();
        assert!(path.exists() && !beside.iter().any(|file| file.exists()));
    }

    #[test]
    fn what_is_beside_a_new_file_belonged_to_another_and_is_removed() {
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
