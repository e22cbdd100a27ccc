//! The locks in the lock file, `heartbeat.db-lock`: which process delivers, which processes that
//! own rows are running, and which process may write. For any thread.
//!
//! - Locks are open file description locks of one byte each. The kernel releases them when their
//!   process ends, in whatever way. So no pid is compared, and no stale file has to be removed.
//! - Byte 0 is locked by the process that delivers. The file contains the pid of that process, for
//!   people.
//! - Each process that has the outbox open locks one byte at a random place. A row names its owner
//!   as `PLACE@INODE`: that place, and the inode of the lock file in which it was locked first. A
//!   process keeps this lock while it runs, also if the lock file is replaced. Other processes
//!   check the lock without taking it.
//! - The last byte is the write lock. It is locked for a short time by a process that opens,
//!   changes or closes the outbox files. So no process deletes files that another one creates, and
//!   none writes with another index (`-shm`) than the others.
//! - A lock file that was replaced stays open here. An owner that is locked in any open lock file
//!   is running. An owner that is not locked in the file that it names has ended. If that file is
//!   not open here, the state is unknown until the current lock file has existed for 60 s, because
//!   a running owner locks its place in a new lock file within 10 s. The inode of a deleted file is
//!   not reused while a process has it open, so no other file is mistaken for it.
//! - An owner in any other format counts as ended. It was written by another program, or by an
//!   earlier version with one file per owner, which was not released.
//! - A forked child shares the locks of its parent. So a lock is released only by the process that
//!   took it.
//!
//! `heartbeat.db` is never opened here, because closing it would drop SQLite's locks.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Instant;

use log::Level;
use nix::fcntl::{FcntlArg, fcntl};

use super::log_line;
pub(super) use crate::files::beside;
use crate::files::{Identity, folder, identity};
use crate::limits;
use crate::sqlite::files::{DatabaseFile, create};
use crate::text::sanitize;

/// The byte of the process that delivers.
const DELIVERY: i32 = 0;

/// The bytes of owners.
const PLACES: RangeInclusive<i32> = 1..=i32::MAX - 1;

/// The byte of the process that writes.
const WRITING: i32 = i32::MAX;

/// The lock files in which this process has locked byte 0, and whether their heartbeats have
/// stopped. Pids cannot be compared, because a process in another container may have the same one.
static DELIVERING: Mutex<BTreeMap<Identity, Arc<AtomicBool>>> = Mutex::new(BTreeMap::new());

/// The result of an attempt to lock byte 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DeliveryLock {
    Acquired,
    /// A heartbeat of this process has it. It has stopped, and writes its last acknowledgements.
    HeldByStopped,
    /// The process with this pid has it. The text is safe to print.
    HeldBy(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OwnerState {
    Running,
    Ended,
    /// The state cannot be determined now. The rows of this owner are not changed.
    Unknown,
}

/// The locks of one outbox in this process.
#[derive(Debug)]
pub(super) struct Locks {
    /// The owner of this process's rows.
    pub(super) token: String,
    /// Rows may have the token, so it must not change.
    pub(super) is_token_used: bool,
    place: i32,
    /// The lock file that the token names.
    token_file: Option<Identity>,
    /// The last one is the current one, as of the last refresh.
    files: Vec<LockFile>,
    /// The last refresh has found a usable lock file.
    is_current: bool,
    /// The write lock, if this process has it.
    write_lock: Weak<WriteLock>,
}

/// The write lock: byte [`WRITING`] of these lock files. An outbox in memory needs none.
#[derive(Debug, Default)]
pub(super) struct WriteLock(Vec<Arc<File>>);

impl Drop for WriteLock {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| unlock(file, WRITING..=WRITING));
    }
}

/// An open lock file. All locks of an outbox in it belong to this open file description.
#[derive(Debug)]
struct LockFile {
    file: Arc<File>,
    identity: Identity,
    /// Since when it has been at its path, as far as this process knows.
    current_since: Instant,
    delivers: bool,
    /// The process that has opened it.
    pid: u32,
}

impl Locks {
    pub(super) fn new() -> Self {
        let place = fastrand::i32(PLACES);
        Self {
            token: place.to_string(),
            is_token_used: false,
            place,
            token_file: None,
            files: Vec::new(),
            is_current: false,
            write_lock: Weak::new(),
        }
    }

    /// Makes sure that the lock file at its path is open, and that our place is locked in it. A
    /// missing lock file is created.
    pub(super) fn refresh(&mut self, outbox: &Path) -> io::Result<()> {
        self.is_current = false;
        let path = beside(outbox, "-lock");
        let found = fs::symlink_metadata(&path).ok().map(|found| identity(&found));
        if found.is_none() || self.files.last().map(|file| file.identity) != found {
            let mut file = match self.files.iter().position(|file| Some(file.identity) == found) {
                Some(known) => self.files.remove(known),
                None => self.open(&path)?,
            };
            file.current_since = Instant::now();
            self.files.push(file);
            self.close_unused();
        }
        self.is_current = true;
        Ok(())
    }

    fn open(&mut self, path: &Path) -> io::Result<LockFile> {
        let file = Arc::new(open_lock_file(path)?);
        let identity = identity(&file.metadata()?);
        let current_since = Instant::now();
        let file = LockFile { file, identity, current_since, delivers: false, pid: process::id() };
        if self.is_token_used {
            // If another process has the same place, one of two billion, this fails. For the others
            // we are then still running, because the place is locked.
            file.lock(self.place)?;
            return Ok(file);
        }
        while !file.lock(self.place)? {
            self.place = fastrand::i32(PLACES);
        }
        self.token = format!("{}@{}", self.place, identity.1);
        self.token_file = Some(identity);
        Ok(file)
    }

    /// Closes older lock files in which no other process is locked. The one that the token names
    /// stays open, and so do the last ones: rows may name an owner of these that has ended.
    fn close_unused(&mut self) {
        let mut newer = self.files.len();
        let token_file = self.token_file;
        self.files.retain(|file| {
            newer = newer.saturating_sub(1);
            newer <= limits::LOCK_FILES
                || token_file == Some(file.identity)
                || is_locked(&file.file, PLACES).unwrap_or(true)
        });
    }

    /// Makes sure that other processes see that this one is running. If the current lock file is
    /// not usable, a lock in an older one is enough.
    pub(super) fn ensure_locked(&mut self, outbox: &Path) -> io::Result<()> {
        let refreshed = self.refresh(outbox);
        if self.files.is_empty() { refreshed } else { Ok(()) }
    }

    /// Acquires the write lock; while this process has it, returns the same one. If another process
    /// has it until `deadline`, the error is `TimedOut`.
    pub(super) fn lock_for_writing(
        &mut self,
        outbox: &Path,
        deadline: Instant,
    ) -> io::Result<Arc<WriteLock>> {
        if let Some(lock) = self.write_lock.upgrade() {
            return Ok(lock);
        }
        let mut held = WriteLock::default();
        loop {
            self.ensure_locked(outbox)?;
            let is_held = |file: &LockFile| held.0.iter().any(|held| Arc::ptr_eq(held, &file.file));
            // All open lock files are locked: the current one may have been replaced during the
            // wait, and other processes may not have noticed an earlier replacement.
            let Some(next) = self.files.iter().find(|file| !is_held(file)) else { break };
            while !next.lock(WRITING)? {
                if Instant::now() >= deadline {
                    let problem = "another process is writing to it, or was suspended while it did; \
                                   resume or end that process";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
                }
                thread::sleep(limits::OUTBOX_PAUSE);
            }
            held.0.push(Arc::clone(&next.file));
        }
        let lock = Arc::new(held);
        self.write_lock = Arc::downgrade(&lock);
        Ok(lock)
    }

    /// Locks byte 0 of the current lock file, unless this outbox has it. `has_stopped` is set when
    /// the heartbeat of this outbox has stopped.
    pub(super) fn acquire_delivery(
        &mut self,
        outbox: &Path,
        has_stopped: &Arc<AtomicBool>,
    ) -> io::Result<DeliveryLock> {
        self.refresh(outbox)?;
        let Some(current) = self.files.last_mut() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if current.delivers {
            return Ok(DeliveryLock::Acquired);
        }
        // Kept while the lock is taken, so that no other thread attributes it to another process.
        let mut delivering = DELIVERING.lock().unwrap_or_else(PoisonError::into_inner);
        if current.lock(DELIVERY)? {
            delivering.insert(current.identity, Arc::clone(has_stopped));
            drop(delivering);
            current.delivers = true;
            current.write_pid();
            return Ok(DeliveryLock::Acquired);
        }
        match delivering.get(&current.identity) {
            Some(stopped) if stopped.load(Ordering::Relaxed) => Ok(DeliveryLock::HeldByStopped),
            _ => pid_text(&current.file).map(|pid| DeliveryLock::HeldBy(sanitize(&pid))),
        }
    }

    /// Whether this outbox has locked byte 0 of a lock file, also of one that was replaced.
    pub(super) fn delivers(&self) -> bool {
        self.files.iter().any(|file| file.delivers)
    }

    /// Whether another process has locked byte 0 of a lock file, also of one that was replaced.
    pub(super) fn another_delivers(&self) -> bool {
        self.files.iter().any(|file| is_locked(&file.file, DELIVERY..=DELIVERY).unwrap_or(true))
    }

    /// Releases byte 0.
    pub(super) fn stop_delivering(&mut self) {
        self.files.iter_mut().for_each(LockFile::stop_delivering);
    }

    /// Makes the lock files older than [`limits::LOCK_FILE_AGE`].
    #[cfg(test)]
    pub(super) fn make_old(&mut self) {
        self.files.iter_mut().for_each(|file| file.current_since -= limits::LOCK_FILE_AGE);
    }

    /// The state of the owner of a row, as of the last [refresh](Self::refresh).
    pub(super) fn owner_state(&self, owner: &[u8]) -> OwnerState {
        let Some((place, inode)) = parse(owner) else { return OwnerState::Ended };
        let is_old = |file: &LockFile| file.current_since.elapsed() >= limits::LOCK_FILE_AGE;
        let mut is_known = self.is_current && self.files.last().is_some_and(is_old);
        for file in &self.files {
            match is_locked(&file.file, place..=place) {
                Ok(true) => return OwnerState::Running,
                Ok(false) => is_known |= inode == Some(file.identity.1),
                Err(_) => return OwnerState::Unknown,
            }
        }
        if is_known { OwnerState::Ended } else { OwnerState::Unknown }
    }
}

/// Parses `PLACE@INODE`, or `PLACE` of a process that could not lock any file when it started.
fn parse(owner: &[u8]) -> Option<(i32, Option<u64>)> {
    let owner = str::from_utf8(owner).ok()?;
    let (place, inode) =
        owner.split_once('@').map_or((owner, None), |(place, inode)| (place, Some(inode)));
    let place = place.parse().ok().filter(|place| PLACES.contains(place))?;
    let inode = inode.map(str::parse).transpose().ok()?;
    Some((place, inode))
}

impl LockFile {
    /// Locks a byte. `false`: another open file description has it locked.
    fn lock(&self, place: i32) -> io::Result<bool> {
        match fcntl(&*self.file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, place..=place))) {
            Ok(_) => Ok(true),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The pid is for people. The lock does not depend on it.
    fn write_pid(&self) {
        let pid = process::id().to_string();
        let written = self.file.set_len(0).and_then(|()| self.file.write_all_at(pid.as_bytes(), 0));
        if let Err(error) = written.map_err(|error| error.to_string()) {
            log_line(
                Level::Debug,
                format_args!("could not write the pid to the lock file: error={error:?}"),
            );
        }
    }

    fn stop_delivering(&mut self) {
        if self.delivers && self.pid == process::id() {
            let mut delivering = DELIVERING.lock().unwrap_or_else(PoisonError::into_inner);
            delivering.remove(&self.identity);
            unlock(&self.file, DELIVERY..=DELIVERY);
            self.delivers = false;
        }
    }
}

impl Drop for LockFile {
    /// Closing the file does not release its locks while a child process that is being started
    /// still has it open. A forked child must not release the locks of its parent.
    fn drop(&mut self) {
        self.stop_delivering();
        if self.pid == process::id() {
            unlock(&self.file, PLACES);
        }
    }
}

fn range(kind: i32, places: RangeInclusive<i32>) -> libc::flock {
    let first = libc::off_t::from(*places.start());
    let last = libc::off_t::from(*places.end());
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: first,
        l_len: last - first + 1,
        l_pid: 0,
    }
}

fn unlock(file: &File, places: RangeInclusive<i32>) {
    // After an error the lock is released when the file is closed.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, places)));
}

/// Whether another open file description has one of the bytes locked.
fn is_locked(file: &File, places: RangeInclusive<i32>) -> io::Result<bool> {
    let mut found = range(libc::F_WRLCK, places);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn pid_text(file: &File) -> io::Result<String> {
    let mut text = [0; limits::OUTBOX_HOLDER];
    let length = file.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned())
}

/// The process that delivers from an outbox. No lock is taken, and no file is created or changed.
#[cfg(feature = "cli")]
pub(crate) fn deliverer(outbox: &Path) -> Option<u32> {
    let found = DatabaseFile::open(&beside(outbox, "-lock")).ok()??;
    let file = open(OpenOptions::new().read(true), &found).ok()??;
    let is_held = is_locked(&file, DELIVERY..=DELIVERY).ok()?;
    pid_text(&file).ok()?.parse().ok().filter(|_| is_held)
}

/// Opens the lock file, or creates it with mode 0600, because every user who can open it can lock
/// it. Anything else at its path is an error, and is not changed.
fn open_lock_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    // Other processes may create, delete or replace it meanwhile.
    for _ in 0..limits::LOCK_TRIES {
        let folder = fs::metadata(folder(path))?;
        let Some(found) = DatabaseFile::open(path)? else {
            match create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => continue,
            }
        };
        found.check_owner(&folder)?;
        if found.remove_if_abandoned_by_root(&folder)? {
            continue;
        }
        found.chown_to_owner_of(&folder);
        if let Some(file) = open(&options, &found)? {
            return Ok(file);
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "was replaced repeatedly while it was opened"))
}

/// Opens the file that was found, without blocking. `None`: it was replaced or deleted.
fn open(options: &OpenOptions, found: &DatabaseFile) -> io::Result<Option<File>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    match options.clone().custom_flags(flags).open(&found.path) {
        Ok(file) => Ok(Some(file).filter(|file| {
            file.metadata().is_ok_and(|opened| identity(&opened) == identity(&found.metadata))
        })),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ELOOP) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::process::Command;
    use std::time::Duration;

    use super::super::tests::OtherProcess;
    use super::*;

    fn outbox() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        (dir, outbox)
    }

    fn acquire(outbox: &Path, has_stopped: &Arc<AtomicBool>) -> (Locks, DeliveryLock) {
        let mut locks = Locks::new();
        let result = locks.acquire_delivery(outbox, has_stopped).unwrap();
        (locks, result)
    }

    /// Locks that have opened the lock file.
    fn opened(outbox: &Path) -> Locks {
        let mut locks = Locks::new();
        locks.refresh(outbox).unwrap();
        locks
    }

    /// Deletes the lock file, so that the next refresh creates another one.
    fn replace_lock_file(outbox: &Path) {
        fs::remove_file(beside(outbox, "-lock")).unwrap();
    }

    #[test]
    fn only_one_process_delivers_and_its_pid_is_returned_to_others() {
        let (_dir, outbox) = outbox();
        let held = OtherProcess::start(&outbox);
        let has_stopped = Arc::default();
        let acquire = || acquire(&outbox, &has_stopped);
        assert_eq!(acquire().1, DeliveryLock::HeldBy(held.pid().to_string()));
        // The content of the file does not matter.
        fs::write(beside(&outbox, "-lock"), b"\xff\x1b").unwrap();
        assert_eq!(acquire().1, DeliveryLock::HeldBy("\u{fffd}\\u{1b}".to_owned()));
        drop(held);
        let ours = acquire();
        assert_eq!(ours.1, DeliveryLock::Acquired);
        assert_eq!(
            acquire().1,
            DeliveryLock::HeldBy(process::id().to_string()),
            "another outbox of this process, whose heartbeat is running"
        );
        has_stopped.store(true, Ordering::Relaxed);
        assert_eq!(acquire().1, DeliveryLock::HeldByStopped);
        drop(ours);
        assert_eq!(acquire().1, DeliveryLock::Acquired);
    }

    #[cfg(feature = "cli")]
    #[test]
    fn deliverer_is_found_without_a_lock_or_a_change() {
        let (dir, outbox) = outbox();
        assert_eq!(super::deliverer(&outbox), None);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        let held = OtherProcess::start(&outbox);
        assert_eq!(super::deliverer(&outbox), Some(held.pid()));
        drop(held);
        assert_eq!(super::deliverer(&outbox), None);
    }

    #[test]
    fn released_lock_is_free_while_a_child_process_is_being_started() {
        let (_dir, outbox) = outbox();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    Command::new("true").status().unwrap();
                }
            });
            let taken: Vec<_> = (0..2_000).map(|_| acquire(&outbox, &Arc::default()).1).collect();
            done.store(true, Ordering::Relaxed);
            assert!(taken.iter().all(|taken| *taken == DeliveryLock::Acquired));
        });
    }

    #[test]
    fn lock_of_this_process_is_not_attributed_to_another_one() {
        let (_dir, outbox) = outbox();
        let has_stopped = Arc::new(AtomicBool::new(true));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let take = |_| {
                    assert!(!matches!(acquire(&outbox, &has_stopped).1, DeliveryLock::HeldBy(_)))
                };
                scope.spawn(move || (0..2_000).for_each(take));
            }
        });
    }

    #[test]
    fn owner_is_running_until_its_process_ends() {
        let (_dir, outbox) = outbox();
        let mut killed = OtherProcess::start(&outbox);
        let ours = opened(&outbox);
        let owner = |token: &str| ours.owner_state(token.as_bytes());
        assert_eq!(owner(&killed.token), OwnerState::Running);
        killed.kill();
        assert_eq!(owner(&killed.token), OwnerState::Ended);
        let dropped = opened(&outbox);
        assert_eq!(owner(&dropped.token), OwnerState::Running, "another outbox of this process");
        let token = dropped.token.clone();
        drop(dropped);
        assert_eq!(owner(&token), OwnerState::Ended);
    }

    #[test]
    fn query_of_an_owner_takes_no_lock() {
        let (_dir, outbox) = outbox();
        let ours = opened(&outbox);
        let theirs = opened(&outbox);
        assert_eq!(ours.owner_state(b"7"), OwnerState::Unknown);
        assert!(theirs.files[0].lock(7).unwrap());
    }

    #[test]
    fn owner_in_another_format_has_ended() {
        let (_dir, outbox) = outbox();
        let ours = opened(&outbox);
        for owner in [
            &b"4711-0123456789abcdef"[..],
            b"",
            b"0@1",
            b"-1@1",
            b"2147483648@1",
            b"1@x",
            b"\xff",
            &[b'1'; 300],
        ] {
            assert_eq!(ours.owner_state(owner), OwnerState::Ended, "{owner:?}");
        }
    }

    #[test]
    fn owner_in_a_replaced_lock_file_that_is_open_is_running() {
        let (_dir, outbox) = outbox();
        let mut ours = opened(&outbox);
        let theirs = opened(&outbox);
        replace_lock_file(&outbox);
        ours.refresh(&outbox).unwrap();
        ours.make_old();
        assert_eq!(ours.owner_state(theirs.token.as_bytes()), OwnerState::Running);
        let token = theirs.token.clone();
        drop(theirs);
        assert_eq!(ours.owner_state(token.as_bytes()), OwnerState::Ended);
    }

    #[test]
    fn owner_that_ended_before_its_lock_file_was_replaced_has_ended() {
        let (_dir, outbox) = outbox();
        let mut ours = opened(&outbox);
        let theirs = opened(&outbox);
        let token = theirs.token.clone();
        drop(theirs);
        replace_lock_file(&outbox);
        ours.refresh(&outbox).unwrap();
        assert_eq!(ours.owner_state(token.as_bytes()), OwnerState::Ended);
    }

    #[test]
    fn owner_of_another_lock_file_is_unknown_for_a_minute() {
        let (_dir, outbox) = outbox();
        let mut theirs = opened(&outbox);
        theirs.is_token_used = true;
        replace_lock_file(&outbox);
        let mut ours = opened(&outbox);
        assert_eq!(ours.owner_state(theirs.token.as_bytes()), OwnerState::Unknown);
        ours.make_old();
        assert_eq!(ours.owner_state(theirs.token.as_bytes()), OwnerState::Ended);
        // The owner refreshes its locks every 10 s.
        let token = theirs.token.clone();
        theirs.ensure_locked(&outbox).unwrap();
        assert_eq!(
            (ours.owner_state(token.as_bytes()), &theirs.token),
            (OwnerState::Running, &token)
        );
    }

    #[test]
    fn restored_lock_file_counts_as_new() {
        let (dir, outbox) = outbox();
        let lock = beside(&outbox, "-lock");
        let aside = dir.path().join("aside");
        let mut ours = opened(&outbox);
        ours.make_old();
        fs::rename(&lock, &aside).unwrap();
        let theirs = opened(&outbox);
        fs::rename(&aside, &lock).unwrap();
        ours.refresh(&outbox).unwrap();
        assert_eq!(
            ours.owner_state(theirs.token.as_bytes()),
            OwnerState::Ended,
            "this process has not noticed that it was replaced"
        );
        fs::rename(&lock, &aside).unwrap();
        ours.refresh(&outbox).unwrap();
        fs::rename(&aside, &lock).unwrap();
        ours.refresh(&outbox).unwrap();
        assert_eq!(ours.owner_state(theirs.token.as_bytes()), OwnerState::Unknown);
    }

    #[test]
    fn owner_is_unknown_if_the_lock_file_is_unusable() {
        let (_dir, outbox) = outbox();
        let theirs = opened(&outbox);
        replace_lock_file(&outbox);
        let mut ours = opened(&outbox);
        ours.make_old();
        replace_lock_file(&outbox);
        fs::create_dir(beside(&outbox, "-lock")).unwrap();
        ours.refresh(&outbox).unwrap_err();
        assert_eq!(ours.owner_state(theirs.token.as_bytes()), OwnerState::Unknown);
        ours.is_token_used = true;
        ours.ensure_locked(&outbox).unwrap();
        // These hold no lock yet.
        Locks { is_token_used: true, ..Locks::new() }.ensure_locked(&outbox).unwrap_err();
    }

    #[test]
    fn unused_replaced_lock_files_are_closed() {
        let (_dir, outbox) = outbox();
        let mut ours = opened(&outbox);
        ours.is_token_used = true;
        let theirs = opened(&outbox);
        for _ in 0..limits::LOCK_FILES + 10 {
            replace_lock_file(&outbox);
            ours.refresh(&outbox).unwrap();
        }
        assert_eq!(
            ours.files.len(),
            1 + limits::LOCK_FILES + 1,
            "the first one, the last ones and the current one"
        );
        drop(theirs);
        assert_eq!(opened(&outbox).owner_state(ours.token.as_bytes()), OwnerState::Running);
    }

    #[test]
    fn only_one_process_has_the_write_lock_also_if_the_lock_file_is_replaced() {
        let (_dir, outbox) = outbox();
        let mut ours = Locks::new();
        let mut theirs = opened(&outbox);
        let lock = ours.lock_for_writing(&outbox, Instant::now()).unwrap();
        drop(ours.lock_for_writing(&outbox, Instant::now()).unwrap());
        let since = Instant::now();
        let bound = Duration::from_millis(50);
        let error = theirs.lock_for_writing(&outbox, since + bound).unwrap_err();
        assert!(
            error.kind() == io::ErrorKind::TimedOut && since.elapsed() >= bound,
            "the inner lock's release has not released the outer one"
        );
        replace_lock_file(&outbox);
        assert_eq!(
            theirs.lock_for_writing(&outbox, Instant::now()).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        let mut new = Locks::new();
        let is_locked = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let lock = theirs
                    .lock_for_writing(&outbox, Instant::now() + Duration::from_secs(20))
                    .unwrap();
                is_locked.store(true, Ordering::Relaxed);
                lock
            });
            // The file is replaced during the wait, too.
            std::thread::sleep(bound);
            replace_lock_file(&outbox);
            let lock_of_new = new.lock_for_writing(&outbox, Instant::now()).unwrap();
            drop(lock);
            std::thread::sleep(bound);
            assert!(!is_locked.load(Ordering::Relaxed));
            drop(lock_of_new);
            waiting.join().unwrap();
        });
        assert_eq!(theirs.owner_state(ours.token.as_bytes()), OwnerState::Running);
    }

    #[test]
    fn forked_child_does_not_release_locks_of_its_parent() {
        let (_dir, outbox) = outbox();
        let (mut child, _) = acquire(&outbox, &Arc::default());
        let token = child.token.clone();
        // The parent's descriptor, of the same open file description.
        let parents = child.files[0].file.try_clone().unwrap();
        child.files[0].pid -= 1;
        child.stop_delivering();
        drop(child);
        let (other, deliverer) = acquire(&outbox, &Arc::default());
        assert!(matches!(deliverer, DeliveryLock::HeldBy(_)));
        assert_eq!(other.owner_state(token.as_bytes()), OwnerState::Running);
        drop(parents);
        assert_eq!(other.owner_state(token.as_bytes()), OwnerState::Ended);
    }

    #[test]
    fn special_file_at_the_lock_files_path_is_an_error_and_unchanged() {
        let (dir, outbox) = outbox();
        let lock = beside(&outbox, "-lock");
        let other = dir.path().join("other");
        fs::write(&other, "theirs").unwrap();
        let makers: [(&str, &dyn Fn()); 5] = [
            ("is a symlink, not a regular file; rename or remove it", &|| {
                symlink(&other, &lock).unwrap()
            }),
            ("is a symlink, not a regular file; rename or remove it", &|| {
                symlink("nowhere", &lock).unwrap()
            }),
            ("is a directory, not a regular file; rename or remove it", &|| {
                fs::create_dir(&lock).unwrap()
            }),
            ("is a FIFO, not a regular file; rename or remove it", &|| {
                assert!(Command::new("mkfifo").arg(&lock).status().unwrap().success());
            }),
            ("has 2 hard links; remove the others, or rename it", &|| {
                fs::hard_link(&other, &lock).unwrap()
            }),
        ];
        for (problem, make) in makers {
            make();
            let kind = fs::symlink_metadata(&lock).unwrap().file_type();
            let error = Locks::new().acquire_delivery(&outbox, &Arc::default()).unwrap_err();
            assert_eq!(error.to_string(), format!("heartbeat.db-lock {problem}"));
            assert_eq!(fs::symlink_metadata(&lock).unwrap().file_type(), kind);
            assert_eq!(fs::read(&other).unwrap(), b"theirs");
            if kind.is_dir() { fs::remove_dir(&lock) } else { fs::remove_file(&lock) }.unwrap();
        }
        assert!(!dir.path().join("nowhere").exists());
    }

    #[test]
    fn lock_file_is_created_with_mode_0600() {
        let (_dir, outbox) = outbox();
        opened(&outbox);
        assert_eq!(
            fs::metadata(beside(&outbox, "-lock")).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    #[ignore = "needs root"]
    fn lock_file_created_by_root_belongs_to_the_folders_owner() {
        let (dir, outbox) = outbox();
        std::os::unix::fs::chown(&dir, Some(1000), Some(1000)).unwrap();
        let lock = beside(&outbox, "-lock");
        let owner = || fs::metadata(&lock).map(|found| (found.uid(), found.gid())).unwrap();
        opened(&outbox);
        assert_eq!(owner(), (1000, 1000));
        // Root was killed before it could change the owner.
        std::os::unix::fs::chown(&lock, Some(0), Some(0)).unwrap();
        opened(&outbox);
        assert_eq!(owner(), (1000, 1000));
        std::os::unix::fs::chown(&lock, Some(1001), Some(1001)).unwrap();
        let error = Locks::new().refresh(&outbox).unwrap_err();
        let problem = "heartbeat.db-lock belongs to user 1001, and not to this user (0) or the owner of its folder (1000)";
        assert!(error.to_string().starts_with(problem), "{error}");
        assert_eq!(owner(), (1001, 1001));
    }
}
