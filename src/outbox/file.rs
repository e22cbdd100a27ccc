//! The outbox' file before SQLite has it: made for its owner alone, and moved aside when it is none of ours. Runs on the
//! thread that opens the outbox.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Instant, SystemTime};

use super::lock::{beside, lock_file};
use crate::delta::{from_micros, micros};
use crate::limits;

/// For the owner alone.
const MODE: u32 = 0o600;

/// Makes the file unless it is there, with mode 0600 from its first byte: SQLite would make it readable by others, and
/// gives `-wal` and `-shm` the mode that it finds here. What is there must be a regular file; others' permissions are
/// taken from it.
pub(super) fn prepare(path: &Path, deadline: Instant) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(path, deadline)?;
            fs::symlink_metadata(path)?
        }
        found => found?,
    };
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file; a symlink is not followed"));
    }
    for file in [path, &beside(path, "-wal"), &beside(path, "-shm")] {
        match fs::symlink_metadata(file) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o077 != 0 => {
                fs::set_permissions(file, Permissions::from_mode(MODE))?;
            }
            _ => (),
        }
    }
    Ok(())
}

/// One process at a time: of two, the slower one would remove what the faster one has already written.
fn make(path: &Path, deadline: Instant) -> io::Result<()> {
    let _making = lock_making(path, deadline)?;
    if fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    // What is beside it belonged to another file, which is gone. SQLite must not take it for this one's.
    remove(&beside(path, "-wal"))?;
    remove(&beside(path, "-shm"))?;
    OpenOptions::new().write(true).create_new(true).mode(MODE).open(path).map(drop)
}

/// The right to make the file at `path`, until it is dropped.
fn lock_making(path: &Path, deadline: Instant) -> io::Result<File> {
    let making = lock_file(&beside(path, "-making"))?;
    loop {
        match making.try_lock() {
            Ok(()) => return Ok(making),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(limits::OUTBOX_PAUSE),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "another process is making it"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Where it is.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Moves what is no outbox out of the way, with what SQLite keeps beside it. Where it is now.
pub(super) fn move_aside(path: &Path) -> io::Result<PathBuf> {
    let now = from_micros(micros(SystemTime::now()));
    let name = format!("-aside-{}", humantime::format_rfc3339_seconds(now).to_string().replace(':', ""));
    let names = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name}-{n}")));
    let aside = names.map(|name| beside(path, &name)).find(|aside| fs::symlink_metadata(aside).is_err());
    let aside = aside.ok_or(io::ErrorKind::AlreadyExists)?;
    // The database last: its log must not be found beside a new one.
    for suffix in ["-shm", "-wal", ""] {
        match fs::rename(beside(path, suffix), beside(&aside, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => (),
        }
    }
    Ok(aside)
}

/// Which file a path leads to; `None` inside when to none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity(Option<(u64, u64)>);

impl Identity {
    pub(super) fn of(path: &Path) -> Self {
        Self(fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino())))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_beside_a_new_file_belonged_to_another_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heartbeat.db");
        let beside = [beside(&path, "-wal"), beside(&path, "-shm")];
        beside.iter().for_each(|file| fs::write(file, "another's").unwrap());
        prepare(&path, Instant::now()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert!(!beside.iter().any(|file| file.exists()));
        beside.iter().for_each(|file| fs::write(file, "this one's").unwrap());
        prepare(&path, Instant::now()).unwrap();
        assert!(beside.iter().all(|file| file.exists()));
    }

    #[test]
    fn a_file_that_another_process_is_making_is_waited_for_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("heartbeat.db");
        let making = lock_making(&path, Instant::now()).unwrap();
        let since = Instant::now();
        let error = prepare(&path, since + Duration::from_millis(50)).unwrap_err();
        assert!(since.elapsed() >= Duration::from_millis(50));
        assert_eq!((error.kind(), path.exists()), (io::ErrorKind::TimedOut, false));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| prepare(&path, Instant::now() + Duration::from_secs(20)));
            drop(making);
            waiting.join().unwrap().unwrap();
        });
        assert!(path.exists());
    }

    #[test]
    fn a_path_of_a_name_alone_is_in_this_folder() {
        assert_eq!(folder(Path::new("heartbeat.db")), Path::new("."));
        assert_eq!(folder(Path::new("agent/heartbeat.db")), Path::new("agent"));
    }
}
