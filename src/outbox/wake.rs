//! The wake socket, `heartbeat.db-wake`: a process that has added deltas sends an empty datagram to
//! it, so that the process that delivers sends them at once. For any thread; everything but
//! [`WakeSocket::wait`] and [`Waker::wake`] may block on the disk.
//!
//! - Only the process that has locked byte 0 of the lock file binds the socket, or removes a stale
//!   one.
//! - The socket has mode 0600 from its creation, and belongs to the owner of the folder.
//! - The path of a socket has at most 107 bytes. It is given as `/proc/self/fd/N/NAME`, where N is
//!   a descriptor of the folder, so the length of the folder's path does not matter.
//! - Anything but a socket at the path, and a socket of a stranger, is an error and is not changed.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;
use socket2::{SockAddr, Socket};

use crate::error::sanitize_path;
use crate::files::{Identity, beside, folder, identity, special};
use crate::limits;
use crate::panics::quietly;
use crate::sqlite::files::ignore_not_found;

const SUFFIX: &str = "-wake";

/// The socket of the process that delivers.
#[derive(Debug)]
pub(crate) struct WakeSocket {
    socket: UnixDatagram,
    identity: Identity,
    folder: Folder,
    is_closed: AtomicBool,
}

impl WakeSocket {
    /// Binds the socket of an outbox. The caller must have locked byte 0 of its lock file: a socket
    /// that is already there is stale, and is removed.
    pub(crate) fn bind(outbox: &Path) -> io::Result<Self> {
        let folder = Folder::open(outbox)?;
        if folder.open_socket()?.is_some() {
            ignore_not_found(fs::remove_file(folder.socket()))?;
        }
        let socket = UnixDatagram::unbound()?;
        // `bind` creates the file with this mode, less the umask.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let socket = bind(socket, &folder.socket())?;
        let bound = folder.open_socket()?.ok_or(io::ErrorKind::NotFound)?;
        fs::set_permissions(descriptor_path(&bound.0), Permissions::from_mode(0o600))?;
        folder.give_to_owner(&bound.0);
        let identity = identity(&bound.1);
        Ok(Self { socket, identity, folder, is_closed: AtomicBool::new(false) })
    }

    /// Whether this socket is at the path for this outbox.
    pub(crate) fn is_bound_for(&self, outbox: &Path) -> bool {
        fs::symlink_metadata(beside(outbox, SUFFIX))
            .is_ok_and(|found| identity(&found) == self.identity)
    }

    /// Waits for a datagram, then discards those that have arrived, up to a limit: another process
    /// may send them without end. Returns `false` if the socket was closed.
    pub(crate) fn wait(&self) -> bool {
        let received = loop {
            // The content is not read.
            match self.socket.recv(&mut []) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                received => break received.is_ok(),
            }
        };
        let _ = self.socket.set_nonblocking(true);
        let is_left = |_: &usize| !self.is_closed() && self.socket.recv(&mut []).is_ok();
        (0..limits::WAKE_DRAIN).take_while(is_left).for_each(drop);
        let is_blocking = self.socket.set_nonblocking(false).is_ok();
        received && is_blocking && !self.is_closed()
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Removes the socket and ends [`wait`](Self::wait). A socket of another process at the path is
    /// left alone.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        let _ = self.socket.shutdown(Shutdown::Read);
        let path = self.folder.socket();
        if fs::symlink_metadata(&path).is_ok_and(|found| identity(&found) == self.identity) {
            // The next process that delivers removes it otherwise.
            let _ = fs::remove_file(path);
        }
    }
}

/// The standard library cannot bind an existing socket, which needs its mode before it is bound.
fn bind(socket: UnixDatagram, path: &Path) -> io::Result<UnixDatagram> {
    let socket = Socket::from(OwnedFd::from(socket));
    socket.bind(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

/// The side of a process that adds deltas.
#[derive(Debug)]
#[cfg(any(test, feature = "cli"))]
pub(crate) struct Waker(UnixDatagram);

#[cfg(any(test, feature = "cli"))]
impl Waker {
    /// Connects to the process that delivers from this outbox. An error means that none listens.
    pub(crate) fn connect(outbox: &Path) -> io::Result<Self> {
        let found = Folder::open(outbox)?.open_socket()?.ok_or(io::ErrorKind::NotFound)?;
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        // By its descriptor: another file may be at the path by now.
        socket.connect(descriptor_path(&found.0))?;
        Ok(Self(socket))
    }

    /// Wakes the process that delivers. Never blocks. An error means that it no longer listens.
    pub(crate) fn wake(&self) -> io::Result<()> {
        match self.0.send(&[]) {
            // Datagrams wait there, so it will wake.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            sent => sent.map(drop),
        }
    }
}

/// The folder of an outbox, opened with `O_PATH`.
#[derive(Debug)]
struct Folder {
    descriptor: File,
    metadata: Metadata,
    /// The name of the socket.
    name: PathBuf,
}

impl Folder {
    fn open(outbox: &Path) -> io::Result<Self> {
        let name = beside(Path::new(outbox.file_name().unwrap_or_default()), SUFFIX);
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let descriptor = OpenOptions::new().read(true).custom_flags(flags).open(folder(outbox))?;
        let metadata = descriptor.metadata()?;
        Ok(Self { descriptor, metadata, name })
    }

    fn socket(&self) -> PathBuf {
        Path::new(&descriptor_path(&self.descriptor)).join(&self.name)
    }

    /// Changes the owner of a socket that root has bound in another user's folder, who could not
    /// connect to it otherwise.
    fn give_to_owner(&self, socket: &File) {
        let owner = self.metadata.uid();
        if !geteuid().is_root() || owner == 0 {
            return;
        }
        let given = chown(descriptor_path(socket), Some(owner), Some(self.metadata.gid()));
        if let Err(error) = given.map_err(|error| error.to_string()) {
            quietly(|| {
                log::warn!(
                    "could not change the owner of the wake socket to the owner of its folder: owner={owner} error={error:?}"
                );
            });
        }
    }

    /// Opens the socket with `O_PATH`. `None`: nothing is at its path. Anything but a socket of this
    /// user, of root or of the owner of the folder is an error, `InvalidInput`.
    fn open_socket(&self) -> io::Result<Option<(File, Metadata)>> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let found = match OpenOptions::new().read(true).custom_flags(flags).open(self.socket()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let metadata = found.metadata()?;
        let name = sanitize_path(&self.name);
        if !metadata.file_type().is_socket() {
            let what = special(metadata.file_type()).unwrap_or("a regular file");
            return Err(refusal(format!("{name} is {what}, not a socket; move it away")));
        }
        let owners = [geteuid().as_raw(), 0, self.metadata.uid()];
        if !owners.contains(&metadata.uid()) {
            let problem = format!("{name} belongs to user {}; move it away", metadata.uid());
            return Err(refusal(problem));
        }
        Ok(Some((found, metadata)))
    }
}

fn refusal(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

/// The path of a descriptor.
fn descriptor_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn outbox() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        (dir, outbox)
    }

    #[test]
    fn datagram_wakes_and_close_ends_the_wait() {
        let (_dir, outbox) = outbox();
        assert_eq!(Waker::connect(&outbox).unwrap_err().kind(), io::ErrorKind::NotFound);
        let socket = Arc::new(WakeSocket::bind(&outbox).unwrap());
        let path = beside(&outbox, SUFFIX);
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let waker = Waker::connect(&outbox).unwrap();
        let (woken, wakes) = channel();
        let waiting = Arc::clone(&socket);
        let thread = std::thread::spawn(move || {
            while waiting.wait() {
                woken.send(()).unwrap();
            }
        });
        waker.wake().unwrap();
        wakes.recv_timeout(TIMEOUT).unwrap();
        socket.close();
        thread.join().unwrap();
        assert!(wakes.recv_timeout(TIMEOUT).is_err() && !path.exists());
        assert!(waker.wake().is_err(), "nobody listens");
    }

    #[test]
    fn flood_of_datagrams_never_blocks_the_sender_and_each_wait_discards_a_limited_number() {
        let (_dir, outbox) = outbox();
        let socket = WakeSocket::bind(&outbox).unwrap();
        let waker = Waker::connect(&outbox).unwrap();
        let queued = (0..10_000).take_while(|_| waker.0.send(&[]).is_ok()).count();
        waker.wake().unwrap();
        assert!(socket.wait());
        socket.socket.set_nonblocking(true).unwrap();
        let left = (0..10_000).take_while(|_| socket.socket.recv(&mut []).is_ok()).count();
        assert_eq!(left, queued.saturating_sub(limits::WAKE_DRAIN + 1), "queued: {queued}");
    }

    #[test]
    fn path_longer_than_that_of_a_socket_works() {
        let (dir, _) = outbox();
        let deep = (0..4).fold(dir.path().to_owned(), |folder, _| folder.join("d".repeat(100)));
        fs::create_dir_all(&deep).unwrap();
        let outbox = deep.join("heartbeat.db");
        let socket = WakeSocket::bind(&outbox).unwrap();
        Waker::connect(&outbox).unwrap().wake().unwrap();
        assert!(socket.wait() && socket.is_bound_for(&outbox));
    }

    #[test]
    fn stale_socket_is_replaced_and_a_newer_one_is_left_alone() {
        let (_dir, outbox) = outbox();
        let path = beside(&outbox, SUFFIX);
        drop(UnixDatagram::bind(&path).unwrap());
        assert_eq!(Waker::connect(&outbox).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let older = WakeSocket::bind(&outbox).unwrap();
        let newer = WakeSocket::bind(&outbox).unwrap();
        assert!(!older.is_bound_for(&outbox) && newer.is_bound_for(&outbox));
        older.close();
        Waker::connect(&outbox).unwrap().wake().unwrap();
        assert!(newer.wait());
    }

    #[test]
    fn anything_but_a_socket_is_refused_and_unchanged() {
        let (dir, outbox) = outbox();
        let path = beside(&outbox, SUFFIX);
        let other = dir.path().join("other");
        let _bound = UnixDatagram::bind(&other).unwrap();
        let makers: [(&str, &dyn Fn()); 4] = [
            ("a symlink", &|| symlink(&other, &path).unwrap()),
            ("a directory", &|| fs::create_dir(&path).unwrap()),
            ("a regular file", &|| fs::write(&path, "theirs").unwrap()),
            ("a FIFO", &|| {
                assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
            }),
        ];
        for (what, make) in makers {
            make();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            let expected = format!("heartbeat.db-wake is {what}, not a socket; move it away");
            assert_eq!(WakeSocket::bind(&outbox).unwrap_err().to_string(), expected);
            assert_eq!(Waker::connect(&outbox).unwrap_err().to_string(), expected);
            assert_eq!(fs::symlink_metadata(&path).unwrap().file_type(), kind);
            if kind.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) }.unwrap();
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn socket_bound_by_root_belongs_to_the_folders_owner_and_a_strangers_is_refused() {
        let (dir, outbox) = outbox();
        let path = beside(&outbox, SUFFIX);
        chown(&dir, Some(1000), Some(1000)).unwrap();
        let socket = WakeSocket::bind(&outbox).unwrap();
        let owner = fs::symlink_metadata(&path).map(|found| (found.uid(), found.gid()));
        assert_eq!(owner.unwrap(), (1000, 1000));
        chown(&path, Some(1001), Some(1001)).unwrap();
        let expected = "heartbeat.db-wake belongs to user 1001; move it away";
        assert_eq!(WakeSocket::bind(&outbox).unwrap_err().to_string(), expected);
        assert_eq!(Waker::connect(&outbox).unwrap_err().to_string(), expected);
        assert!(socket.is_bound_for(&outbox));
    }
}
