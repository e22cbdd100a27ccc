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

use nix::unistd::geteuid;

use crate::error::sanitize_path;
use crate::files::{beside, folder, special};
use crate::panics::quietly;

/// The suffixes of the database and of the files that SQLite creates with it.
pub(crate) const PARTS: [&str; 4] = ["", "-journal", "-wal", "-shm"];

/// Resolves the symlinks of the path's folder, because SQLite is opened with `NOFOLLOW` and rejects
/// a path with symlinks. The last component is not resolved; the caller checks it.
pub(crate) fn with_real_folder(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| refusal(path, "names a folder; name a file"))?;
    Ok(folder(path).canonicalize()?.join(name))
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
            return Err(refusal(path, &format!("is {what}, not a regular file; move it away")));
        }
        match metadata.nlink() {
            // It was deleted after it was opened.
            0 => Ok(None),
            1 => Ok(Some(Self { path: path.to_owned(), descriptor, metadata })),
            links => Err(refusal(
                path,
                &format!("has {links} hard links; remove the others, or move it away"),
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
                 user {owner}, or move it away"
            ),
        ))
    }

    /// Removes the permissions of group and others from a file of this user.
    pub(crate) fn make_private(&self, mode: u32) -> io::Result<()> {
        let is_ours = self.metadata.uid() == geteuid().as_raw();
        if !is_ours || self.metadata.permissions().mode() & 0o077 == 0 {
            return Ok(());
        }
        fs::set_permissions(self.descriptor_path(), Permissions::from_mode(mode))
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
            ("socket", "is a socket, not a regular file; move it away"),
            ("folder", "is a directory, not a regular file; move it away"),
            ("link", "is a symlink, not a regular file; move it away"),
            ("dangling", "is a symlink, not a regular file; move it away"),
            ("fifo", "is a FIFO, not a regular file; move it away"),
            ("two", "has 2 hard links; remove the others, or move it away"),
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
}
