//! Locked files beside the outbox: who delivers from it, and which of those who work on its rows still live. The kernel
//! lets go of a lock when its process ends, however it ends, so no pid is ever compared. For any thread.
//!
//! `heartbeat.db` itself is never opened here: closing it would drop SQLite's own locks.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub(super) use crate::files::beside;
use crate::files::{Identity, folder, identity};
use crate::limits;
use crate::text::printable;

/// What an owner's file is called after the outbox' own name.
const OWNER: &str = "-owner-";

/// Held by the one process that delivers from an outbox and recovers it, as long as the file is open.
#[derive(Debug)]
pub(super) struct DeliveryLock(File, Identity);

/// The lock files that outboxes of this process have locked, and whether their heartbeats have stopped. A pid would not do:
/// another container's process may have ours.
static OURS: Mutex<BTreeMap<Identity, Arc<AtomicBool>>> = Mutex::new(BTreeMap::new());

/// Whether we deliver.
#[derive(Debug)]
pub(super) enum Delivery {
    /// Others do.
    No,
    /// Others do as yet. We begin to as soon as the lock is free.
    Wanted,
    /// We do, and have the lock, where there is a file to lock.
    Yes(Option<DeliveryLock>),
}

impl Delivery {
    /// Takes the lock, if we are to deliver and do not have it yet. One that a stopped heartbeat of this process still holds is
    /// waited for; `has_stopped` says so of ours. `Err` inside: the process of this pid, safe to print, delivers.
    pub(super) fn take(&mut self, outbox: &Path, has_stopped: &Arc<AtomicBool>) -> io::Result<Result<(), String>> {
        if matches!(self, Self::No | Self::Yes(Some(_))) {
            return Ok(Ok(()));
        }
        // The file stays when the lock is let go: to remove it would let two have it.
        let file = lock_file(&beside(outbox, "-lock"))?;
        let identity = identity(&file.metadata()?);
        // Both at once, so no other thread takes our lock for another process'.
        let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
        let is_stopping = ours.get(&identity).is_some_and(|has_stopped| has_stopped.load(Ordering::Relaxed));
        match file.try_lock() {
            Ok(()) => {
                ours.insert(identity, Arc::clone(has_stopped));
                drop(ours);
                let mut lock = DeliveryLock(file, identity);
                lock.0.set_len(0)?;
                write!(lock.0, "{}", std::process::id())?;
                *self = Self::Yes(Some(lock));
            }
            Err(TryLockError::WouldBlock) if matches!(self, Self::Wanted) || is_stopping => {
                *self = Self::Wanted;
            }
            Err(TryLockError::WouldBlock) => {
                let mut holder = Vec::new();
                file.take(limits::OUTBOX_HOLDER).read_to_end(&mut holder)?;
                // Whatever stands in it, it is held.
                return Ok(Err(printable(&String::from_utf8_lossy(&holder))));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(Ok(()))
    }
}

impl Drop for DeliveryLock {
    /// To close the file is not enough: a child process that is just being started has it, too, until it runs its program.
    fn drop(&mut self) {
        let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
        ours.remove(&self.1);
        // An error leaves the lock to the closing.
        let _ = self.0.unlock();
    }
}

/// The process that delivers from an outbox, as far as this one may see. The kernel's list is read, since to try the lock
/// would be to keep it, for a moment, from a process that is just starting.
#[cfg(feature = "cli")]
pub(crate) fn deliverer(outbox: &Path) -> Option<u32> {
    let path = beside(outbox, "-lock");
    let (_, inode) = identity(&fs::symlink_metadata(&path).ok().filter(|metadata| metadata.is_file())?);
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

/// Says that a process lives, to whoever finds its token in a row.
#[derive(Debug)]
pub(super) struct Owner {
    /// How rows name it.
    pub(super) token: String,
    /// Some row names us as its owner, or did.
    pub(super) is_wanted: bool,
    /// Made when it is wanted.
    file: Option<(PathBuf, File)>,
}

impl Owner {
    /// The pid is there for an operator to read; what tells two apart is the random number.
    pub(super) fn new() -> Self {
        Self { token: format!("{}-{:016x}", std::process::id(), fastrand::u64(..)), is_wanted: false, file: None }
    }

    /// Makes the file if it is wanted, unless it is there.
    pub(super) fn live(&mut self, outbox: &Path) -> io::Result<()> {
        if !self.is_wanted || self.file.is_some() {
            return Ok(());
        }
        let path = owner_path(outbox, &self.token);
        loop {
            let file = lock_file(&path)?;
            match file.try_lock() {
                Err(TryLockError::Error(error)) => return Err(error),
                Ok(()) if fs::exists(&path)? => {
                    self.file = Some((path, file));
                    return Ok(());
                }
                // Somebody sweeps, and has taken it for a dead one's before it was locked.
                _ => thread::sleep(limits::OUTBOX_PAUSE),
            }
        }
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
        let file = entry?.file_name();
        let rest = file.as_bytes().strip_prefix(name);
        if let Some(token) = rest.and_then(|rest| rest.strip_prefix(OWNER.as_bytes())) {
            is_dead(outbox, token);
        }
    }
    Ok(())
}

fn owner_path(outbox: &Path, token: &str) -> PathBuf {
    beside(outbox, &format!("{OWNER}{token}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Deliverer;
    use super::*;

    #[test]
    fn one_has_the_delivery_lock_and_the_other_hears_who() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        let held = Deliverer::of(&outbox);
        let has_stopped = Arc::default();
        let take = || {
            let mut delivery = Delivery::Yes(None);
            let taken = delivery.take(&outbox, &has_stopped).unwrap();
            (delivery, taken)
        };
        assert_eq!(take().1, Err(held.pid().to_string()));
        // Whoever else wrote into it has not let it go.
        std::fs::write(beside(&outbox, "-lock"), b"\xff\x1b").unwrap();
        assert_eq!(take().1, Err("\u{fffd}\\u{1b}".to_owned()));
        drop(held);
        let ours = take();
        assert!(matches!(ours, (Delivery::Yes(Some(_)), Ok(()))));
        assert_eq!(take().1, Err(std::process::id().to_string()), "another one of ours, whose heartbeat runs");
        has_stopped.store(true, Ordering::Relaxed);
        assert!(matches!(take(), (Delivery::Wanted, Ok(()))));
        drop(ours);
        assert!(matches!(take(), (Delivery::Yes(Some(_)), Ok(()))));
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
            let take = |_| {
                let mut delivery = Delivery::Yes(None);
                delivery.take(&outbox, &Arc::default()).unwrap().unwrap();
                matches!(delivery, Delivery::Yes(Some(_)))
            };
            let taken: Vec<_> = (0..2_000).map(take).collect();
            done.store(true, over);
            assert!(taken.iter().all(|taken| *taken));
        });
    }

    #[test]
    fn no_thread_takes_a_lock_of_this_process_for_another_ones() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        let has_stopped = Arc::new(AtomicBool::new(true));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let take = |_| Delivery::Yes(None).take(&outbox, &has_stopped).unwrap().unwrap();
                scope.spawn(move || (0..2_000).for_each(take));
            }
        });
    }

    #[test]
    fn what_a_process_left_that_died_before_its_lock_is_swept_up() {
        let dir = tempfile::tempdir().unwrap();
        for name in [&b"heartbeat.db"[..], b"a\xff"] {
            let outbox = dir.path().join(OsStr::from_bytes(name));
            let left = owner_path(&outbox, &Owner::new().token);
            File::create_new(&left).unwrap();
            sweep(&outbox).unwrap();
            assert!(!left.exists());
        }
    }

    #[test]
    fn an_owner_whose_file_is_swept_up_before_it_is_locked_makes_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        for _ in 0..200 {
            let mut owner = Owner::new();
            owner.is_wanted = true;
            std::thread::scope(|scope| {
                scope.spawn(|| (0..50).for_each(|_| sweep(&outbox).unwrap()));
                owner.live(&outbox).unwrap();
            });
            assert!(!is_dead(&outbox, owner.token.as_bytes()));
        }
    }

    #[test]
    fn an_owner_lives_until_it_is_dropped_or_its_lock_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        let mut owner = Owner::new();
        assert!(is_dead(&outbox, owner.token.as_bytes()), "it has made no file");
        owner.is_wanted = true;
        owner.live(&outbox).unwrap();
        assert!(!is_dead(&outbox, owner.token.as_bytes()));
        let token = owner.token.clone();
        // As if it were killed: the lock goes, the file stays.
        let (path, file) = owner.file.take().unwrap();
        drop(file);
        // A child process that another test is just starting has it open until its `exec`.
        let is_swept = |_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
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
