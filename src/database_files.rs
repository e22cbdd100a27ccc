//! What stands in the places of a SQLite database's files. It is looked at before SQLite opens it: SQLite would follow a hard
//! link, wait for a FIFO without end, and change the mode of a file that is another program's. For any thread.
//!
//! A look opens nothing for reading: closing an ordinary descriptor would drop the locks that SQLite has on the file in this
//! process.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{geteuid, truncate};

use crate::error::printable_path;
use crate::files::{beside, folder, special};
use crate::limits;
use crate::panics::quietly;

/// The database, and what SQLite keeps beside it.
pub(crate) const PARTS: [&str; 4] = ["", "-journal", "-wal", "-shm"];

/// Only the owner may read and write.
const MODE: u32 = 0o600;

/// Makes a file that has [`MODE`] before anything is written to it. The umask does not change that.
pub(crate) fn make(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
    file.set_permissions(Permissions::from_mode(MODE))
}

/// The path with its folder as it is called without symlinks, because SQLite refuses a path with one. Its last part is the
/// caller's to look at. A path that is too long for SQLite is an error, too.
pub(crate) fn in_real_folder(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| refusal(path, "names a folder; name a file"))?;
    let real = folder(path).canonicalize()?.join(name);
    let (length, most) = (real.as_os_str().len(), limits::DATABASE_PATH);
    if length > most {
        return Err(refusal(
            path,
            &format!("has a path of {length} bytes, and SQLite opens none of more than {most}; use a shorter one"),
        ));
    }
    Ok(real)
}

/// A regular file with one link, which is not open for reading or writing.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    descriptor: File,
    pub(crate) metadata: Metadata,
}

impl Place {
    /// What is at `path`; `None`: nothing. Anything but a regular file with one link is an error, `InvalidInput`.
    pub(crate) fn look(path: &Path) -> io::Result<Option<Self>> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let descriptor = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let metadata = descriptor.metadata()?;
        if let Some(what) = special(metadata.file_type()) {
            return Err(refusal(path, &format!("is {what}, not a regular file; move it away")));
        }
        match metadata.nlink() {
            // It has just been removed.
            0 => Ok(None),
            1 => Ok(Some(Self { path: path.to_owned(), descriptor, metadata })),
            links => Err(refusal(path, &format!("has {links} hard links; remove the others, or move it away"))),
        }
    }

    /// The owner must be this user, root, or the owner of the folder. `InvalidInput`: it is somebody else.
    pub(crate) fn refuse_strangers(&self, folder: &Metadata) -> io::Result<()> {
        let (us, of_folder, owner) = (geteuid().as_raw(), folder.uid(), self.metadata.uid());
        if [us, 0, of_folder].contains(&owner) {
            return Ok(());
        }
        Err(refusal(
            &self.path,
            &format!(
                "belongs to user {owner}, and neither to this user ({us}) nor to the owner of its folder ({of_folder}); \
                 run as user {owner}, or move it away"
            ),
        ))
    }

    /// Takes others' permissions from a file of this user.
    pub(crate) fn make_private(&self) -> io::Result<()> {
        let is_ours = self.metadata.uid() == geteuid().as_raw();
        if !is_ours || self.metadata.permissions().mode() & 0o077 == 0 {
            return Ok(());
        }
        fs::set_permissions(self.itself(), Permissions::from_mode(MODE))
    }

    /// Nothing is opened for writing, either.
    pub(crate) fn set_length(&self, length: u64) -> io::Result<()> {
        let length = length.try_into().map_err(io::Error::other)?;
        Ok(truncate(self.itself().as_str(), length)?)
    }

    /// A file that root has just made in another user's folder belongs to that user, who could not use it otherwise. It is known by
    /// being root's and empty.
    pub(crate) fn give_to_owner_of(&self, folder: &Metadata) {
        let is_new = self.metadata.uid() == 0 && self.metadata.len() == 0;
        if !geteuid().is_root() || folder.uid() == 0 || !is_new {
            return;
        }
        if let Err(error) = std::os::unix::fs::chown(self.itself(), Some(folder.uid()), Some(folder.gid())) {
            let (file, owner, error) = (printable_path(&self.path), folder.uid(), error.to_string());
            quietly(|| {
                log::warn!(
                    "a file could not be given to the owner of its folder, who cannot use it: file={file} owner={owner} error={error:?}"
                )
            });
        }
    }

    /// Removes an empty file of root in this user's folder: root was killed before it changed the file's owner, and this user
    /// cannot use it. Returns whether this was such a file.
    pub(crate) fn remove_if_left_by_root(&self, folder: &Metadata) -> io::Result<bool> {
        let is_left = self.metadata.uid() == 0 && self.metadata.len() == 0;
        if !is_left || geteuid().is_root() || folder.uid() != geteuid().as_raw() {
            return Ok(false);
        }
        if_there(fs::remove_file(&self.path)).map(|()| true)
    }

    /// By its descriptor, as another file may be at its path by now.
    fn itself(&self) -> String {
        format!("/proc/self/fd/{}", self.descriptor.as_raw_fd())
    }
}

/// Refuses what is in the place of a database, or of what SQLite keeps beside it, if it is anything but a regular file with
/// one link.
pub(crate) fn check(path: &Path) -> io::Result<()> {
    PARTS.iter().try_for_each(|part| Place::look(&beside(path, part)).map(drop))
}

/// Takes a missing file for success.
pub(crate) fn if_there(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn refusal(path: &Path, problem: &str) -> io::Error {
    let name = path.file_name().map_or(path, Path::new);
    io::Error::new(io::ErrorKind::InvalidInput, format!("{} {problem}", printable_path(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_with_one_link_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        fs::write(at("one"), "").unwrap();
        fs::write(at("two"), "").unwrap();
        fs::hard_link(at("two"), at("other")).unwrap();
        std::os::unix::fs::symlink(at("one"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        for (name, problem) in [
            ("socket", "is a socket, not a regular file; move it away"),
            ("folder", "is a directory, not a regular file; move it away"),
            ("link", "is a symlink, not a regular file; move it away"),
            ("dangling", "is a symlink, not a regular file; move it away"),
            ("fifo", "is a FIFO, not a regular file; move it away"),
            ("two", "has 2 hard links; remove the others, or move it away"),
        ] {
            let refused = Place::look(&at(name)).unwrap_err();
            assert_eq!(
                (refused.kind(), refused.to_string()),
                (io::ErrorKind::InvalidInput, format!("{name} {problem}"))
            );
        }
        assert!(Place::look(Path::new("/dev/null")).unwrap_err().to_string().starts_with("null is a device"));
        assert!(Place::look(&at("one")).unwrap().is_some());
        assert!(Place::look(&at("nothing")).unwrap().is_none());
    }

    #[test]
    fn a_path_is_named_without_the_symlinks_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        fs::create_dir(real.join("folder")).unwrap();
        std::os::unix::fs::symlink(real.join("folder"), real.join("link")).unwrap();
        assert_eq!(in_real_folder(&real.join("link/db")).unwrap(), real.join("folder/db"));
        assert_eq!(in_real_folder(&real.join("link")).unwrap(), real.join("link"), "its last part is looked at later");
        assert_eq!(in_real_folder(&real.join("none/db")).unwrap_err().kind(), io::ErrorKind::NotFound);
        for no_file in ["/", "/tmp/.."] {
            assert_eq!(in_real_folder(Path::new(no_file)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
    #[test]
    fn a_path_that_sqlite_cannot_open_is_refused_with_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let deep = (0..4).fold(real.clone(), |folder, _| folder.join("d".repeat(100)));
        fs::create_dir_all(&deep).unwrap();
        std::os::unix::fs::symlink(&deep, real.join("link")).unwrap();
        let room = limits::DATABASE_PATH - deep.as_os_str().len() - 1;
        let (longest, longer) = ("n".repeat(room), "n".repeat(room + 1));
        let path = in_real_folder(&deep.join(&longest)).unwrap();
        let database = rusqlite::Connection::open(&path).unwrap();
        database.execute_batch("CREATE TABLE t (a)").unwrap();
        for folder in [deep, real.join("link")] {
            let refused = in_real_folder(&folder.join(&longer)).unwrap_err();
            let problem = "has a path of 505 bytes, and SQLite opens none of more than 504; use a shorter one";
            assert_eq!(
                (refused.kind(), refused.to_string()),
                (io::ErrorKind::InvalidInput, format!("{longer} {problem}"))
            );
        }
    }
}
