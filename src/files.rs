//! Reads files of other programs: with a maximum size, never from a FIFO, and with a version that
//! shows changes. Runs on the calling thread.

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

/// Reads a whole regular file of at most `limit` bytes.
///
/// A FIFO, a socket or a device is an error before it is opened, because opening it may block.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let too_large =
        || io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes"));
    let size = regular(path)?.len();
    if size > limit {
        return Err(too_large());
    }
    let mut content = Vec::with_capacity(size as usize);
    // The file may be growing.
    File::open(path)?.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit { Err(too_large()) } else { Ok(content) }
}

/// The name of the outbox in the agent dir.
pub(crate) const OUTBOX: &str = "heartbeat.db";

/// The identity of a file: its device and its inode.
pub(crate) type Identity = (u64, u64);

pub(crate) fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

/// The folder of a file.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The path with `suffix` appended.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The absolute path. It is unchanged if it is empty, or if the current directory was deleted.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// What to do if a file of the enrolment cannot be read.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "let this user read it and its folder, or run as its owner"
        }
        io::ErrorKind::InvalidInput
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory => "restore the file that the enrolment wrote",
        io::ErrorKind::FileTooLarge => {
            "restore the file that the enrolment wrote, which has a few KiB"
        }
        io::ErrorKind::NotFound => "create it, or correct its path",
        io::ErrorKind::OutOfMemory => "give this process more memory",
        _ if error.raw_os_error() == Some(libc::ELOOP) => "correct the symlinks that lead to it",
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            "raise the limit of open files"
        }
        _ => "check the disk and the kernel's log",
    }
}

/// The metadata of a regular file. Any other type is an error.
pub(crate) fn regular(path: &Path) -> io::Result<Metadata> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(metadata)
}

/// The name of a file type, with its article. `None`: it is a regular file.
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

/// Whether a missing file may appear later, because an enrolment has not begun, or a file system is
/// not mounted yet. So it is if its folder, or the nearest existing parent, contains nothing but
/// the outbox, or if a symlink in its path is dangling.
pub(crate) fn may_appear(path: &Path) -> bool {
    let is_outbox = |name: &OsStr| name.as_encoded_bytes().starts_with(OUTBOX.as_bytes());
    for folder in path.ancestors().skip(1) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        match fs::read_dir(folder) {
            Ok(mut entries) => {
                return path.is_symlink()
                    || entries.all(|entry| entry.is_ok_and(|entry| is_outbox(&entry.file_name())));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !folder.is_symlink() => (),
            Err(error) => return error.kind() == io::ErrorKind::NotFound,
        }
    }
    false
}

/// Replaces the file at `path` atomically: a reader sees the old or the new content. A path that is
/// not [`check_replaceable`] is an error. The temporary file is `path` with `.new` appended; an existing
/// one is deleted and not written to, as it may be a symlink. Without a `mode` the umask applies.
#[cfg(feature = "cli")]
pub(crate) fn replace(path: &Path, content: &[u8], mode: Option<u32>) -> io::Result<()> {
    check_replaceable(path)?;
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
    // Checked again, because another program may have created a file meanwhile.
    let replaced =
        written.and_then(|()| check_replaceable(path)).and_then(|()| fs::rename(&next, path));
    replaced.inspect_err(|_| drop(fs::remove_file(&next)))
}

/// Checks whether [`replace`] may create or replace the file at `path`. Anything but a regular file
/// is an error, `InvalidInput`, also a symlink to one. Otherwise `/dev/null` would become a regular
/// file, and readers of a symlink's target would not see the new content.
#[cfg(feature = "cli")]
pub(crate) fn check_replaceable(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?.file_type(),
    };
    let Some(what) = special(kind) else { return Ok(()) };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, not a regular file")))
}

/// The version of a file: its inode, size and times. `None` inside: the file does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileVersion(Option<(u64, u64, i64, i64, i64, i64)>);

impl FileVersion {
    /// Reads the version. Costs one `stat`, which follows symlinks.
    pub(crate) fn of(path: &Path) -> Self {
        Self(
            fs::metadata(path)
                .ok()
                .map(|m| (m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())),
        )
    }

    /// Whether the last change is so old, by this host's clock, that the next one will have another
    /// time.
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
    fn folder_of_a_bare_name_is_the_current_one() {
        assert_eq!(folder(Path::new("heartbeat.db")), Path::new("."));
        assert_eq!(folder(Path::new("agent/heartbeat.db")), Path::new("agent"));
    }

    #[test]
    fn file_larger_than_the_limit_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert_eq!(read(&path, 4).unwrap_err().to_string(), "larger than 4 bytes");
    }

    #[test]
    fn remedy_fits_the_error() {
        for (code, remedy) in [
            (libc::EACCES, "let this user read it and its folder, or run as its owner"),
            (libc::EPERM, "let this user read it and its folder, or run as its owner"),
            (libc::EISDIR, "restore the file that the enrolment wrote"),
            (libc::ENOTDIR, "restore the file that the enrolment wrote"),
            (libc::EFBIG, "restore the file that the enrolment wrote, which has a few KiB"),
            (libc::ELOOP, "correct the symlinks that lead to it"),
            (libc::EMFILE, "raise the limit of open files"),
            (libc::ENOMEM, "give this process more memory"),
            (libc::EIO, "check the disk and the kernel's log"),
            (libc::ESTALE, "check the disk and the kernel's log"),
        ] {
            assert_eq!(super::remedy(&io::Error::from_raw_os_error(code)), remedy, "{code}");
        }
    }

    #[test]
    fn directory_or_device_is_not_opened() {
        for path in ["/", "/dev/zero"] {
            assert_eq!(read(Path::new(path), 10).unwrap_err().to_string(), "not a regular file");
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn symlink_in_place_of_the_temporary_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats");
        let next = dir.path().join("stats.new");
        let other = dir.path().join("other");
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
            assert_eq!(refused.to_string(), format!("it is {what}, not a regular file"));
            let after = fs::symlink_metadata(at(name)).unwrap();
            assert_eq!(
                (before.ino(), before.file_type()),
                (after.ino(), after.file_type()),
                "{name}"
            );
        }
        assert_eq!(fs::read(at("file")).unwrap(), b"old", "the target of a symlink");
        assert_eq!(
            check_replaceable(Path::new("/dev/null")).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(check_replaceable(&at("new")).is_ok());
        for name in ["new", "file"] {
            replace(&at(name), b"new", None).unwrap();
            assert_eq!(fs::read(at(name)).unwrap(), b"new");
        }
    }

    #[test]
    fn version_is_stable_some_seconds_after_the_change() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        let most = limits::FILE_TIMES_STABLE.as_secs() as i64;
        for (changed, is_stable) in [
            (now, false),
            (now - most + 1, false),
            (now - most - 2, true),
            (now + 60, false),
            (-1, false),
        ] {
            assert_eq!(
                FileVersion(Some((1, 1, 1, 1, changed, 1))).is_stable(),
                is_stable,
                "{}",
                changed - now
            );
        }
        assert!(!FileVersion(None).is_stable());
    }

    #[test]
    fn replaced_file_has_another_version() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let next = dir.path().join("b");
        assert_eq!(FileVersion::of(&path), FileVersion(None));
        fs::write(&path, b"1").unwrap();
        let before = FileVersion::of(&path);
        assert_eq!(before, FileVersion::of(&path));
        fs::write(&next, b"1").unwrap();
        fs::rename(&next, &path).unwrap();
        assert_ne!(before, FileVersion::of(&path));
    }
}
