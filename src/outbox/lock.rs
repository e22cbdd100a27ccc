//! Locked files beside the outbox: who delivers from it, and which of those who work on its rows still live. The kernel
//! lets go of a lock when its process ends, however it ends, so no pid is ever compared. For any thread.
//!
//! `heartbeat.db` itself is never opened here: closing it would drop SQLite's own locks.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
#[cfg(feature = "cli")]
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::file::folder;
use crate::limits;
pub(super) use crate::read_only::beside;
use crate::text::printable;

/// What an owner's file is called after the outbox' own name.
const OWNER: &str = "-owner-";

/// What it is called before it is locked, after its own name.
const UNLOCKED: &str = ".new";

/// How long a file may have that name: from its making to its locking takes no time, and one that is older was left behind.
const SOON: Duration = Duration::from_secs(60);

/// Held by the one process that delivers from an outbox and recovers it.
#[derive(Debug)]
pub(super) struct DeliveryLock {
    /// Its lock lasts as long as it is open.
    file: File,
}

impl DeliveryLock {
    /// Takes it. `Ok(Err(holder))` when another process, or another heartbeat of this one, has it. The file stays when
    /// the lock is let go: to remove it would let two have it.
    pub(super) fn take(outbox: &Path) -> io::Result<Result<Self, String>> {
        let mut file = lock_file(&beside(outbox, "-lock"))?;
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0)?;
                write!(file, "{}", std::process::id())?;
                Ok(Ok(Self { file }))
            }
            Err(TryLockError::WouldBlock) => {
                let mut holder = Vec::new();
                file.take(limits::OUTBOX_HOLDER).read_to_end(&mut holder)?;
                // Whatever stands in it, it is held.
                Ok(Err(printable(&String::from_utf8_lossy(&holder))))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// The process that delivers from an outbox, as far as this one may see. The kernel's list is read, since to try the lock
/// would be to keep it, for a moment, from a process that is just starting.
#[cfg(feature = "cli")]
pub(crate) fn deliverer(outbox: &Path) -> Option<u32> {
    let path = beside(outbox, "-lock");
    let inode = fs::symlink_metadata(&path).ok().filter(|metadata| metadata.is_file())?.ino();
    let mut holder = String::new();
    File::open(&path).ok()?.take(limits::OUTBOX_HOLDER).read_to_string(&mut holder).ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // `1: FLOCK  ADVISORY  WRITE 4711 fe:01:123456 0 EOF`
    let is_held = locks.lines().any(|lock| match lock.split_whitespace().collect::<Vec<_>>().as_slice() {
        [_, "FLOCK", _, "WRITE", pid, file, ..] => *pid == holder && file.ends_with(&format!(":{inode}")),
        _ => false,
    });
    holder.parse().ok().filter(|_| is_held)
}

/// A file to be locked, its owner's alone: what others can open they can lock.
pub(super) fn lock_file(path: &Path) -> io::Result<File> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "its lock is not a regular file"));
    }
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

impl Drop for DeliveryLock {
    /// To close the file is not enough: a child process that is just being started has it, too, until it runs its program.
    fn drop(&mut self) {
        // An error leaves the lock to the closing.
        let _ = self.file.unlock();
    }
}

/// Says that a process lives, to whoever finds its token in a row.
#[derive(Debug)]
pub(super) struct Owner {
    token: String,
    /// Made when there is something to own.
    file: Option<(PathBuf, File)>,
}

impl Owner {
    /// The pid is there for an operator to read; what tells two apart is the random number.
    pub(super) fn new() -> Self {
        Self { token: format!("{}-{:016x}", std::process::id(), fastrand::u64(..)), file: None }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// Makes the file, unless it is there. It appears under its name only once it is locked.
    pub(super) fn live(&mut self, outbox: &Path) -> io::Result<()> {
        if self.file.is_some() {
            return Ok(());
        }
        let path = owner_path(outbox, &self.token);
        let unlocked = beside(&path, UNLOCKED);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unlocked)?;
        let locked = file.try_lock().map_err(io::Error::from).and_then(|()| fs::rename(&unlocked, &path));
        if let Err(error) = locked {
            let _ = fs::remove_file(&unlocked);
            return Err(error);
        }
        self.file = Some((path, file));
        Ok(())
    }
}

impl Drop for Owner {
    /// Nobody owns anything any more. What its rows say is recovered as after a crash.
    fn drop(&mut self) {
        if let Some((path, _)) = &self.file {
            // A file that stays is removed by the next start.
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether the process behind `token` has ended. One that cannot be asked about lives: its work is then left alone.
pub(super) fn is_dead(outbox: &Path, token: &[u8]) -> bool {
    // It comes from a file: only what we would write may become a path.
    let ours = |byte: &u8| byte.is_ascii_hexdigit() || *byte == b'-';
    let token = str::from_utf8(token)
        .ok()
        .filter(|token| token.len() <= limits::OUTBOX_OWNER && token.as_bytes().iter().all(ours));
    let Some(token) = token else { return true };
    let path = owner_path(outbox, token);
    match File::open(&path) {
        Err(error) => error.kind() == io::ErrorKind::NotFound,
        Ok(file) => {
            let dead = file.try_lock().is_ok();
            if dead {
                let _ = fs::remove_file(path);
            }
            dead
        }
    }
}

/// Removes the files of those that died without leaving a row.
pub(super) fn sweep(outbox: &Path) -> io::Result<()> {
    // The name may be no text. What is behind it, a token, is.
    let Some(name) = outbox.file_name().map(OsStr::as_bytes) else { return Ok(()) };
    for entry in fs::read_dir(folder(outbox))? {
        let entry = entry?;
        let file = entry.file_name();
        let rest = file.as_bytes().strip_prefix(name).and_then(|rest| str::from_utf8(rest).ok());
        let token = rest.and_then(|rest| rest.strip_prefix(OWNER));
        match token {
            Some(token) if token.ends_with(UNLOCKED) => {
                let age = entry.metadata()?.modified()?.elapsed();
                if age.is_ok_and(|age| age > SOON) {
                    fs::remove_file(entry.path())?;
                }
            }
            Some(token) => drop(is_dead(outbox, token.as_bytes())),
            None => (),
        }
    }
    Ok(())
}

fn owner_path(outbox: &Path, token: &str) -> PathBuf {
    beside(outbox, &format!("{OWNER}{token}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_delivery_lock_and_the_other_hears_who() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        let held = DeliveryLock::take(&outbox).unwrap().unwrap();
        assert_eq!(DeliveryLock::take(&outbox).unwrap().unwrap_err(), std::process::id().to_string());
        // Whoever else wrote into it has not let it go.
        std::fs::write(beside(&outbox, "-lock"), b"\xff\x1b").unwrap();
        assert_eq!(DeliveryLock::take(&outbox).unwrap().unwrap_err(), "\u{fffd}\\u{1b}");
        drop(held);
        DeliveryLock::take(&outbox).unwrap().unwrap();
    }

    #[test]
    fn a_lock_that_is_let_go_is_free_though_a_child_process_is_being_started() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        let done = std::sync::atomic::AtomicBool::new(false);
        let over = std::sync::atomic::Ordering::Relaxed;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(over) {
                    std::process::Command::new("true").status().unwrap();
                }
            });
            let taken: Vec<_> = (0..2_000).map(|_| DeliveryLock::take(&outbox).unwrap().is_ok()).collect();
            done.store(true, over);
            assert!(taken.iter().all(|taken| *taken));
        });
    }

    #[test]
    fn what_a_process_left_that_died_before_its_lock_is_swept_up_when_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        for name in [&b"heartbeat.db"[..], b"a\xff"] {
            let outbox = dir.path().join(OsStr::from_bytes(name));
            let left = beside(&owner_path(&outbox, Owner::new().token()), UNLOCKED);
            let file = File::create_new(&left).unwrap();
            sweep(&outbox).unwrap();
            assert!(left.exists(), "it may be locked in a moment");
            file.set_modified(std::time::SystemTime::now() - SOON * 2).unwrap();
            sweep(&outbox).unwrap();
            assert!(!left.exists());
        }
    }

    #[test]
    fn an_owner_lives_until_it_is_dropped_or_its_lock_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        let mut owner = Owner::new();
        assert!(is_dead(&outbox, owner.token().as_bytes()), "it has made no file");
        owner.live(&outbox).unwrap();
        assert!(!is_dead(&outbox, owner.token().as_bytes()));
        let token = owner.token().to_owned();
        // As if it were killed: the lock goes, the file stays.
        let (path, file) = owner.file.take().unwrap();
        drop(file);
        // A child process that another test is just starting has it open until its `exec`.
        let is_swept = |_| {
            std::thread::sleep(Duration::from_millis(10));
            sweep(&outbox).unwrap();
            !path.exists()
        };
        assert!((0..500).any(is_swept));
        assert!(is_dead(&outbox, token.as_bytes()));
        for no_token in [&b"../../etc/passwd"[..], b"\xff", &[b'a'; 300]] {
            assert!(is_dead(&outbox, no_token));
        }
    }
}
