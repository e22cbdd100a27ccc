//! Reading files that others write: bounded, never from a FIFO, and with a stamp that shows whether one has changed.
//! Runs on the thread that asks.

use std::ffi::{OsStr, OsString};
#[cfg(feature = "cli")]
use std::fs::Permissions;
use std::fs::{self, File, FileType, Metadata};
#[cfg(feature = "cli")]
use std::io::Write;
use std::io::{self, Read};
#[cfg(feature = "cli")]
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{self, Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

#[cfg(feature = "cli")]
use crate::error::sanitize_path;
use crate::limits;

/// The whole of a regular file of at most `limit` bytes.
///
/// A FIFO, a socket or a device is refused before it is opened, since opening it may block for ever.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let too_large =
        || io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes"));
    let size = regular(path)?.len();
    if size > limit {
        return Err(too_large());
    }
    let mut content = Vec::with_capacity(size as usize);
    // It may be growing.
    File::open(path)?.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit { Err(too_large()) } else { Ok(content) }
}

/// The outbox' name in the agent dir.
pub(crate) const OUTBOX: &str = "heartbeat.db";

/// Which file it is: its device and its inode.
pub(crate) type Identity = (u64, u64);

pub(crate) fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

/// Where a file is.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The path with this at its end.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The path from the root on. It is left as it is if it is empty, or if this process' folder is gone.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// What helps where a file that enrolment wrote cannot be read.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "let this user read it and its folder, or run as its owner"
        }
        io::ErrorKind::InvalidInput
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory => "put the file that the enrolment wrote in its place",
        io::ErrorKind::FileTooLarge => {
            "put the file that the enrolment wrote in its place, which has a few KiB"
        }
        io::ErrorKind::NotFound => "put it there, or correct its path",
        io::ErrorKind::OutOfMemory => "give it more memory",
        _ if error.raw_os_error() == Some(libc::ELOOP) => "correct the symlinks that lead to it",
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            "raise the limit of open files"
        }
        _ => "see to the disk; the kernel's log says more",
    }
}

/// The metadata of a regular file; that it is none is an error, as that it is not there is.
pub(crate) fn regular(path: &Path) -> io::Result<Metadata> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(metadata)
}

/// What is no regular file, in words.
pub(crate) fn special(kind: FileType) -> Option<&'static str> {
    Some(match kind {
        _ if kind.is_file() => return None,
        _ if kind.is_symlink() => "a symlink",
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    })
}

/// Whether a file that does not exist may come by itself: an enrolment may not have begun, or a file system is not mounted
/// yet. Its folder has nothing but our own outbox in it, or does not exist and the nearest one above it that does has
/// nothing; or a symlink on the way leads nowhere.
pub(crate) fn may_appear(path: &Path) -> bool {
    let is_ours = |name: &OsStr| name.as_encoded_bytes().starts_with(OUTBOX.as_bytes());
    for folder in path.ancestors().skip(1) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        match fs::read_dir(folder) {
            Ok(mut entries) => {
                return path.is_symlink()
                    || entries.all(|entry| entry.is_ok_and(|entry| is_ours(&entry.file_name())));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.is_symlink() => (),
            Err(error) => return error.kind() == io::ErrorKind::NotFound,
        }
    }
    false
}

/// Puts `content` at `path` in one step: a reader sees the old file or the new one, never half of it. What
/// [`replaceable`] refuses stays as it is. What stands beside it under the name that is needed meanwhile is removed and
/// never written through: it may be somebody's symlink. With a mode it has that one, otherwise what the umask leaves.
#[cfg(feature = "cli")]
pub(crate) fn replace(path: &Path, content: &[u8], mode: Option<u32>) -> io::Result<()> {
    replaceable(path)?;
    let next = beside(path, ".new");
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io::Error::new(
                error.kind(),
                format!("{} cannot be removed: {error}", sanitize_path(&next)),
            ));
        }
        _ => (),
    }
    let mut file = File::create_new(&next)?;
    let mode = mode.map_or(Ok(()), |mode| file.set_permissions(Permissions::from_mode(mode)));
    let written = mode.and_then(|()| file.write_all(content));
    // Once more: what is put there meanwhile is somebody's, too.
    let replaced = written.and_then(|()| replaceable(path)).and_then(|()| fs::rename(&next, path));
    replaced.inspect_err(|_| drop(fs::remove_file(&next)))
}

/// Whether [`replace`] may put a file at `path`. `InvalidInput`: something that is not a regular file is there, also a
/// symlink to one. The system's `/dev/null` would become a file, and who reads a symlink's target would see no new content.
/// A path where nothing is may be used.
#[cfg(feature = "cli")]
pub(crate) fn replaceable(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?.file_type(),
    };
    let Some(what) = special(kind) else { return Ok(()) };
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{what} is there, which is not replaced by a file"),
    ))
}

/// What changes when a file does: its inode, size and times. `None` inside when there is no such file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileVersion(Option<(u64, u64, i64, i64, i64, i64)>);

impl FileVersion {
    /// One `stat`, which follows symlinks as reading does.
    pub(crate) fn of(path: &Path) -> Self {
        Self(
            fs::metadata(path)
                .ok()
                .map(|m| (m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())),
        )
    }

    /// The last change is so long ago by this host's clock that one more would have another time.
    pub(crate) fn is_stable(&self) -> bool {
        let changed = self.0.and_then(|(.., seconds, _)| u64::try_from(seconds).ok());
        let changed = changed.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        changed.is_some_and(|at| at.elapsed().is_ok_and(|age| age > limits::FILE_TIMES_STABLE))
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_path_of_a_name_alone_is_in_this_folder() {
        assert_eq!(folder(Path::new("heartbeat.db")), Path::new("."));
        assert_eq!(folder(Path::new("agent/heartbeat.db")), Path::new("agent"));
    }

    #[test]
    fn more_than_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert_eq!(read(&path, 4).unwrap_err().to_string(), "larger than 4 bytes");
    }

    #[test]
    fn what_helps_fits_the_cause() {
        for (code, remedy) in [
            (libc::EACCES, "let this user read it and its folder, or run as its owner"),
            (libc::EPERM, "let this user read it and its folder, or run as its owner"),
            (libc::EISDIR, "put the file that the enrolment wrote in its place"),
            (libc::ENOTDIR, "put the file that the enrolment wrote in its place"),
            (
                libc::EFBIG,
                "put the file that the enrolment wrote in its place, which has a few KiB",
            ),
            (libc::ELOOP, "correct the symlinks that lead to it"),
            (libc::EMFILE, "raise the limit of open files"),
            (libc::ENOMEM, "give it more memory"),
            (libc::EIO, "see to the disk; the kernel's log says more"),
            (libc::ESTALE, "see to the disk; the kernel's log says more"),
        ] {
            assert_eq!(super::remedy(&io::Error::from_raw_os_error(code)), remedy, "{code}");
        }
    }

    #[test]
    fn a_directory_or_a_device_is_refused_unopened() {
        for path in ["/", "/dev/zero"] {
            assert_eq!(read(Path::new(path), 10).unwrap_err().to_string(), "not a regular file");
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn a_symlink_beside_a_replaced_file_is_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next, other) =
            (dir.path().join("stats"), dir.path().join("stats.new"), dir.path().join("other"));
        fs::write(&other, b"theirs").unwrap();
        std::os::unix::fs::symlink(&other, &next).unwrap();
        replace(&path, b"ours", Some(0o640)).unwrap();
        assert_eq!(
            (fs::read(&path).unwrap(), fs::read(&other).unwrap()),
            (b"ours".to_vec(), b"theirs".to_vec())
        );
        assert!(!next.exists());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[cfg(feature = "cli")]
    #[test]
    fn only_a_regular_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        fs::write(at("file"), b"old").unwrap();
        fs::create_dir(at("folder")).unwrap();
        for (target, name) in [("file", "link"), ("nowhere", "dangling"), ("/dev/null", "null")] {
            std::os::unix::fs::symlink(target, at(name)).unwrap();
        }
        assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        for (name, what) in [
            ("socket", "a socket"),
            ("folder", "a directory"),
            ("link", "a symlink"),
            ("dangling", "a symlink"),
            ("null", "a symlink"),
            ("fifo", "a FIFO"),
        ] {
            let before = fs::symlink_metadata(at(name)).unwrap();
            let refused = replace(&at(name), b"new", None).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
            assert_eq!(
                refused.to_string(),
                format!("{what} is there, which is not replaced by a file")
            );
            let after = fs::symlink_metadata(at(name)).unwrap();
            assert_eq!(
                (before.ino(), before.file_type()),
                (after.ino(), after.file_type()),
                "{name}"
            );
        }
        assert_eq!(fs::read(at("file")).unwrap(), b"old", "behind a symlink");
        assert_eq!(
            replaceable(Path::new("/dev/null")).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(replaceable(&at("new")).is_ok());
        for name in ["new", "file"] {
            replace(&at(name), b"new", None).unwrap();
            assert_eq!(fs::read(at(name)).unwrap(), b"new");
        }
    }

    #[test]
    fn a_stamp_is_settled_once_its_change_is_some_seconds_old() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        let most = limits::FILE_TIMES_STABLE.as_secs() as i64;
        for (changed, settled) in [
            (now, false),
            (now - most + 1, false),
            (now - most - 2, true),
            (now + 60, false),
            (-1, false),
        ] {
            assert_eq!(
                FileVersion(Some((1, 1, 1, 1, changed, 1))).is_stable(),
                settled,
                "{}",
                changed - now
            );
        }
        assert!(!FileVersion(None).is_stable());
    }

    #[test]
    fn a_replaced_file_has_another_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next) = (dir.path().join("a"), dir.path().join("b"));
        assert_eq!(FileVersion::of(&path), FileVersion(None));
        fs::write(&path, b"1").unwrap();
        let before = FileVersion::of(&path);
        assert_eq!(before, FileVersion::of(&path));
        fs::write(&next, b"1").unwrap();
        fs::rename(&next, &path).unwrap();
        assert_ne!(before, FileVersion::of(&path));
    }
}
