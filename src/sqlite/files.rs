//! Checks the files of a SQLite database before SQLite opens them. SQLite would follow a hard link,
//! block on a FIFO, and change the mode of another program's file. For any thread.
//!
//! The checks open files only with `O_PATH`. Closing an ordinary descriptor would drop the locks
//! that SQLite holds on the file in this process.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{geteuid, truncate};

use crate::error::sanitize_path;
use crate::files::{beside, folder, special};
use crate::limits;
use crate::panics::quietly;

/// The suffixes of the database and of the files that SQLite creates with it.
pub(crate) const PARTS: [&str; 4] = ["", "-journal", "-wal", "-shm"];

/// The mode of the files: only the owner has access.
const MODE: u32 = 0o600;

/// Creates a file with mode 0600, whatever the umask is.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
    file.set_permissions(Permissions::from_mode(MODE))
}

/// Resolves the symlinks of the path's folder, because SQLite is opened with `NOFOLLOW` and rejects
/// a path with symlinks. The last component is not resolved; the caller checks it. A path that is
/// too long for SQLite is an error.
pub(crate) fn with_real_folder(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| refusal(path, "names a folder; name a file"))?;
    let real = folder(path).canonicalize()?.join(name);
    let length = real.as_os_str().len();
    let limit = limits::DATABASE_PATH;
    if length > limit {
        let problem = format!(
            "has a path of {length} bytes; SQLite opens at most {limit}, use a shorter path"
        );
        return Err(refusal(path, &problem));
    }
    Ok(real)
}

/// A regular file with one link, opened with `O_PATH`.
#[derive(Debug)]
pub(crate) struct DatabaseFile {
    pub(crate) path: PathBuf,
    descriptor: File,
    pub(crate) metadata: Metadata,
}

impl DatabaseFile {
    /// Opens the file at `path`. `None`: there is no file. Anything but a regular file with one
    /// link is an error, `InvalidInput`.
    pub(crate) fn open(path: &Path) -> io::Result<Option<Self>> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let descriptor = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let metadata = descriptor.metadata()?;
        if let Some(what) = special(metadata.file_type()) {
            return Err(refusal(
                path,
                &format!("is {what}, not a regular file; rename or remove it"),
            ));
        }
        match metadata.nlink() {
            // It was deleted after it was opened.
            0 => Ok(None),
            1 => Ok(Some(Self { path: path.to_owned(), descriptor, metadata })),
            links => Err(refusal(
                path,
                &format!("has {links} hard links; remove the others, or rename it"),
            )),
        }
    }

    /// Checks that the owner is this user, root, or the owner of the folder. Otherwise the error is
    /// `InvalidInput`.
    pub(crate) fn check_owner(&self, folder: &Metadata) -> io::Result<()> {
        let user = geteuid().as_raw();
        let folder_owner = folder.uid();
        let owner = self.metadata.uid();
        if [user, 0, folder_owner].contains(&owner) {
            return Ok(());
        }
        Err(refusal(
            &self.path,
            &format!(
                "belongs to user {owner}, and not to this user ({user}) or the owner of its folder ({folder_owner}); run as \
                 user {owner}, or rename it"
            ),
        ))
    }

    /// Removes the permissions of group and others from a file of this user.
    pub(crate) fn make_private(&self) -> io::Result<()> {
        let is_ours = self.metadata.uid() == geteuid().as_raw();
        if !is_ours || self.metadata.permissions().mode() & 0o077 == 0 {
            return Ok(());
        }
        fs::set_permissions(self.descriptor_path(), Permissions::from_mode(MODE))
    }

    /// Sets the length of the file, without a descriptor that is open for writing.
    pub(crate) fn set_length(&self, length: u64) -> io::Result<()> {
        let length = length.try_into().map_err(io::Error::other)?;
        Ok(truncate(self.descriptor_path().as_str(), length)?)
    }

    /// Changes the owner of a file that root has just created in another user's folder to the owner
    /// of the folder, who could not use it otherwise. Such a file belongs to root and is empty.
    pub(crate) fn chown_to_owner_of(&self, folder: &Metadata) {
        let is_new = self.metadata.uid() == 0 && self.metadata.len() == 0;
        if !geteuid().is_root() || folder.uid() == 0 || !is_new {
            return;
        }
        if let Err(error) =
            std::os::unix::fs::chown(self.descriptor_path(), Some(folder.uid()), Some(folder.gid()))
        {
            let file = sanitize_path(&self.path);
            let owner = folder.uid();
            let error = error.to_string();
            quietly(|| {
                log::warn!(
                    "could not change the owner of a new file to the owner of its folder, who cannot use it: file={file} owner={owner} error={error:?}"
                )
            });
        }
    }

    /// Removes an empty file of root in this user's folder. Root was killed before it could change
    /// the owner, and this user cannot use the file. Returns whether the file was removed.
    pub(crate) fn remove_if_abandoned_by_root(&self, folder: &Metadata) -> io::Result<bool> {
        let is_abandoned = self.metadata.uid() == 0 && self.metadata.len() == 0;
        if !is_abandoned || geteuid().is_root() || folder.uid() != geteuid().as_raw() {
            return Ok(false);
        }
        ignore_not_found(fs::remove_file(&self.path)).map(|()| true)
    }

    /// The path of the descriptor, because another file may be at the original path by now.
    fn descriptor_path(&self) -> String {
        format!("/proc/self/fd/{}", self.descriptor.as_raw_fd())
    }
}

/// Checks that the database, and each file that SQLite creates with it, is absent or a regular file
/// with one link.
pub(crate) fn check(path: &Path) -> io::Result<()> {
    PARTS.iter().try_for_each(|part| DatabaseFile::open(&beside(path, part)).map(drop))
}

/// Treats a missing file as success.
pub(crate) fn ignore_not_found(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

fn refusal(path: &Path, problem: &str) -> io::Error {
    let name = path.file_name().map_or(path, Path::new);
    io::Error::new(io::ErrorKind::InvalidInput, format!("{} {problem}", sanitize_path(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_file_with_one_link_is_accepted() {
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
            ("socket", "is a socket, not a regular file; rename or remove it"),
            ("folder", "is a directory, not a regular file; rename or remove it"),
            ("link", "is a symlink, not a regular file; rename or remove it"),
            ("dangling", "is a symlink, not a regular file; rename or remove it"),
            ("fifo", "is a FIFO, not a regular file; rename or remove it"),
            ("two", "has 2 hard links; remove the others, or rename it"),
        ] {
            let refused = DatabaseFile::open(&at(name)).unwrap_err();
            assert_eq!(
                (refused.kind(), refused.to_string()),
                (io::ErrorKind::InvalidInput, format!("{name} {problem}"))
            );
        }
        assert!(
            DatabaseFile::open(Path::new("/dev/null"))
                .unwrap_err()
                .to_string()
                .starts_with("null is a device")
        );
        assert!(DatabaseFile::open(&at("one")).unwrap().is_some());
        assert!(DatabaseFile::open(&at("nothing")).unwrap().is_none());
    }

    #[test]
    fn symlinks_of_the_folder_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        fs::create_dir(real.join("folder")).unwrap();
        std::os::unix::fs::symlink(real.join("folder"), real.join("link")).unwrap();
        assert_eq!(with_real_folder(&real.join("link/db")).unwrap(), real.join("folder/db"));
        assert_eq!(
            with_real_folder(&real.join("link")).unwrap(),
            real.join("link"),
            "the last component is not resolved"
        );
        assert_eq!(
            with_real_folder(&real.join("none/db")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        for no_file in ["/", "/tmp/.."] {
            assert_eq!(
                with_real_folder(Path::new(no_file)).unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }

    #[test]
    fn path_too_long_for_sqlite_is_rejected_with_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let deep = (0..4).fold(real.clone(), |folder, _| folder.join("d".repeat(100)));
        fs::create_dir_all(&deep).unwrap();
        std::os::unix::fs::symlink(&deep, real.join("link")).unwrap();
        let room = limits::DATABASE_PATH - deep.as_os_str().len() - 1;
        let longest = "n".repeat(room);
        let longer = "n".repeat(room + 1);
        let path = with_real_folder(&deep.join(&longest)).unwrap();
        let database = rusqlite::Connection::open(&path).unwrap();
        database.execute_batch("CREATE TABLE t (a)").unwrap();
        for folder in [deep, real.join("link")] {
            let refused = with_real_folder(&folder.join(&longer)).unwrap_err();
            let problem = "has a path of 505 bytes; SQLite opens at most 504, use a shorter path";
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
            assert_eq!(refused.to_string(), format!("{longer} {problem}"));
        }
    }
}
