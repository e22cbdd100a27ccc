//! The lock file beside the outbox, `heartbeat.db-lock`: who delivers, and which processes that own rows still run. For any
//! thread.
//!
//! - Locks are open file description locks, each on one byte. The kernel releases a lock when its process ends, however it
//!   ends, so no pid is compared and no file is swept.
//! - Byte 0 is held by the process that delivers. The file contains the pid of that process, for people.
//! - A process that has the outbox open holds one more byte, at a random place. A row names its owner as `PLACE@INODE`: that
//!   place, and the lock file in which the owner locked it first. An owner holds that lock as long as it runs, also when the
//!   lock file is replaced. Whether it does is asked without taking the lock.
//! - The last byte is held, for a moment, by the process that opens the outbox' files, changes or leaves them: so nobody removes
//!   what another one makes, and nobody writes with an index (`-shm`) that is not the others'.
//! - A lock file that was replaced stays open here, and an owner that is locked in any open one runs. An owner that is not
//!   locked in the file that it names has ended. If that file is not open here, nothing is concluded before the lock file at
//!   its place has been seen for 60 s: an owner that runs locks its place in a new file within 10 s. A file that was removed
//!   has its inode for itself as long as somebody has it open, so no other file passes for it.
//! - An owner that is no such text was written by somebody else, or by the scheme before this one (a file for each owner, no
//!   version with it was released). It counts as ended.
//! - A forked child shares the parent's locks. So a lock is released only by the process that took it.
//!
//! `heartbeat.db` itself is never opened here: closing it would drop SQLite's own locks.

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

use nix::fcntl::{FcntlArg, fcntl};

use crate::database_files::{Place, make};
pub(super) use crate::files::beside;
use crate::files::{Identity, folder, identity};
use crate::limits;
use crate::panics::quietly;
use crate::text::printable;

/// The byte of the process that delivers.
const DELIVERY: i32 = 0;

/// The bytes of owners.
const PLACES: RangeInclusive<i32> = 1..=i32::MAX - 1;

/// The byte of the process whose turn it is to change the outbox.
const TURN: i32 = i32::MAX;

/// The lock files whose byte 0 this process holds, and whether their heartbeats have stopped. A pid would not do: another
/// container's process may have ours.
static OURS: Mutex<BTreeMap<Identity, Arc<AtomicBool>>> = Mutex::new(BTreeMap::new());

/// Who delivers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Deliverer {
    /// We do.
    Us,
    /// A heartbeat of this process that has stopped, and writes down its last acknowledgements.
    Stopping,
    /// The process of this pid, safe to print.
    Another(String),
}

/// What is known of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Runs,
    Ended,
    /// That cannot be told now. Its rows are left alone.
    Unknown,
}

/// The locks of one outbox in this process.
#[derive(Debug)]
pub(super) struct Locks {
    /// How rows name us.
    pub(super) token: String,
    /// Some row names us, or did. The token stays as it is then.
    pub(super) is_named: bool,
    place: i32,
    /// The lock file that the token names.
    named: Option<Identity>,
    /// The last one is that at its place, as of the last look.
    files: Vec<LockFile>,
    /// The last look has found a lock file that can be used.
    is_current: bool,
    /// The turn that we have, if we have one.
    turn: Weak<HeldTurn>,
}

/// The turn of this process, until its last clone is dropped. In memory there is nothing to lock.
pub(super) type Turn = Arc<HeldTurn>;

#[derive(Debug, Default)]
pub(super) struct HeldTurn(Vec<Arc<File>>);

impl Drop for HeldTurn {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| unlock(file, TURN..=TURN));
    }
}

/// An open lock file. All locks of an outbox in it are of this one open file description.
#[derive(Debug)]
struct LockFile {
    file: Arc<File>,
    identity: Identity,
    /// Since when it is at its place, as far as this process has seen.
    since: Instant,
    delivers: bool,
    /// The process that has opened it.
    pid: u32,
}

impl Locks {
    pub(super) fn new() -> Self {
        let place = fastrand::i32(PLACES);
        Self {
            token: place.to_string(),
            is_named: false,
            place,
            named: None,
            files: Vec::new(),
            is_current: false,
            turn: Weak::new(),
        }
    }

    /// Makes sure that the lock file at its place is open, which is made where there is none, and that our place is locked in
    /// it.
    pub(super) fn look(&mut self, outbox: &Path) -> io::Result<()> {
        self.is_current = false;
        let path = beside(outbox, "-lock");
        let found = fs::symlink_metadata(&path).ok().map(|found| identity(&found));
        if found.is_none() || self.files.last().map(|file| file.identity) != found {
            let mut file = match self.files.iter().position(|file| Some(file.identity) == found) {
                Some(known) => self.files.remove(known),
                None => self.open(&path)?,
            };
            file.since = Instant::now();
            self.files.push(file);
            self.close_unused();
        }
        self.is_current = true;
        Ok(())
    }

    fn open(&mut self, path: &Path) -> io::Result<LockFile> {
        let file = Arc::new(lock_file(path)?);
        let identity = identity(&file.metadata()?);
        let file = LockFile { file, identity, since: Instant::now(), delivers: false, pid: process::id() };
        if self.is_named {
            // Another process that has locked the same place, one of two billion, keeps us alive for others.
            file.lock(self.place)?;
            return Ok(file);
        }
        while !file.lock(self.place)? {
            self.place = fastrand::i32(PLACES);
        }
        self.token = format!("{}@{}", self.place, identity.1);
        self.named = Some(identity);
        Ok(file)
    }

    /// Closes older lock files in which no other process holds a lock. The file that our rows name stays open, and so do the
    /// newest ones, because rows may name an owner that has ended.
    fn close_unused(&mut self) {
        let (mut newer, named) = (self.files.len(), self.named);
        self.files.retain(|file| {
            newer = newer.saturating_sub(1);
            newer <= limits::LOCK_FILES || named == Some(file.identity) || file.is_locked(PLACES).unwrap_or(true)
        });
    }

    /// Makes sure that others see that we run, should rows name us. A lock file that cannot be used does no harm while we are
    /// locked in an older one.
    pub(super) fn own(&mut self, outbox: &Path) -> io::Result<()> {
        let looked = self.look(outbox);
        if self.files.is_empty() { looked } else { Ok(()) }
    }

    /// Waits until it is the turn of this process; within a turn it is the same one. `TimedOut`: it was another process' until
    /// then.
    pub(super) fn turn(&mut self, outbox: &Path, by: Instant) -> io::Result<Turn> {
        if let Some(turn) = self.turn.upgrade() {
            return Ok(turn);
        }
        let mut held = HeldTurn::default();
        loop {
            self.own(outbox)?;
            let is_held = |file: &LockFile| held.0.iter().any(|held| Arc::ptr_eq(held, &file.file));
            // Others may not have noticed yet that the lock file was replaced, or it was while we waited.
            let Some(next) = self.files.iter().find(|file| !is_held(file)) else { break };
            while !next.lock(TURN)? {
                if Instant::now() >= by {
                    let problem =
                        "another process is writing to it, or is suspended while it does; resume or end that one";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
                }
                thread::sleep(limits::OUTBOX_PAUSE);
            }
            held.0.push(Arc::clone(&next.file));
        }
        let turn = Arc::new(held);
        self.turn = Arc::downgrade(&turn);
        Ok(turn)
    }

    /// Locks byte 0 of the lock file at its place, unless we have it. `has_stopped` says of our heartbeat whether it has.
    pub(super) fn deliver(&mut self, outbox: &Path, has_stopped: &Arc<AtomicBool>) -> io::Result<Deliverer> {
        self.look(outbox)?;
        let Some(current) = self.files.last_mut() else { return Err(io::ErrorKind::NotFound.into()) };
        if current.delivers {
            return Ok(Deliverer::Us);
        }
        // Both at once, so no other thread takes our lock for another process'.
        let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
        if current.lock(DELIVERY)? {
            ours.insert(current.identity, Arc::clone(has_stopped));
            drop(ours);
            current.delivers = true;
            current.write_pid();
            return Ok(Deliverer::Us);
        }
        let is_stopping = ours.get(&current.identity).is_some_and(|has_stopped| has_stopped.load(Ordering::Relaxed));
        Ok(if is_stopping { Deliverer::Stopping } else { Deliverer::Another(current.pid_text()?) })
    }

    /// Whether we hold byte 0 of a lock file, also of one that was replaced.
    pub(super) fn delivers(&self) -> bool {
        self.files.iter().any(|file| file.delivers)
    }

    /// Whether another process holds byte 0 of a lock file, also of one that was replaced.
    pub(super) fn another_delivers(&self) -> bool {
        self.files.iter().any(|file| file.is_locked(DELIVERY..=DELIVERY).unwrap_or(true))
    }

    /// Releases byte 0.
    pub(super) fn stop_delivering(&mut self) {
        self.files.iter_mut().for_each(LockFile::stop_delivering);
    }

    /// As if the lock file had been at its place for long.
    #[cfg(test)]
    pub(super) fn settle(&mut self) {
        self.files.iter_mut().for_each(|file| file.since -= limits::LOCK_SETTLED);
    }

    /// What is known of the owner that a row names. As of the last [look](Self::look).
    pub(super) fn owner(&self, owner: &[u8]) -> Owner {
        let Some((place, inode)) = parse(owner) else { return Owner::Ended };
        let mut is_known = self.is_current && self.files.last().is_some_and(LockFile::is_settled);
        for file in &self.files {
            match file.is_locked(place..=place) {
                Ok(true) => return Owner::Runs,
                Ok(false) => is_known |= inode == Some(file.identity.1),
                Err(_) => return Owner::Unknown,
            }
        }
        if is_known { Owner::Ended } else { Owner::Unknown }
    }
}

/// `PLACE@INODE`, or `PLACE` of one that could not lock anything when it took its name.
fn parse(owner: &[u8]) -> Option<(i32, Option<u64>)> {
    let owner = str::from_utf8(owner).ok()?;
    let (place, inode) = owner.split_once('@').map_or((owner, None), |(place, inode)| (place, Some(inode)));
    let place = place.parse().ok().filter(|place| PLACES.contains(place))?;
    let inode = inode.map(str::parse).transpose().ok()?;
    Some((place, inode))
}

impl LockFile {
    /// `false`: somebody else has it.
    fn lock(&self, place: i32) -> io::Result<bool> {
        match fcntl(&*self.file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, place..=place))) {
            Ok(_) => Ok(true),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether somebody else has locked one of them.
    fn is_locked(&self, places: RangeInclusive<i32>) -> io::Result<bool> {
        is_locked(&self.file, places)
    }

    fn is_settled(&self) -> bool {
        self.since.elapsed() >= limits::LOCK_SETTLED
    }

    /// For people: an error is none of the lock.
    fn write_pid(&self) {
        let pid = process::id().to_string();
        let written = self.file.set_len(0).and_then(|()| self.file.write_all_at(pid.as_bytes(), 0));
        if let Err(error) = written.map_err(|error| error.to_string()) {
            quietly(|| log::debug!("the lock file does not contain our pid: error={error:?}"));
        }
    }

    /// Whatever is in the file, safe to print.
    fn pid_text(&self) -> io::Result<String> {
        pid_text(&self.file).map(|text| printable(&text))
    }

    fn stop_delivering(&mut self) {
        if self.delivers && self.pid == process::id() {
            let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
            ours.remove(&self.identity);
            unlock(&self.file, DELIVERY..=DELIVERY);
            self.delivers = false;
        }
    }
}

impl Drop for LockFile {
    /// To close the file is not enough: a child process that is just being started has it, too, until it runs its program. A
    /// child that was forked and goes on must not release what its parent holds.
    fn drop(&mut self) {
        self.stop_delivering();
        if self.pid == process::id() {
            unlock(&self.file, PLACES);
        }
    }
}

fn range(kind: i32, places: RangeInclusive<i32>) -> libc::flock {
    let (first, last) = (places.start(), places.end());
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: libc::off_t::from(*first),
        l_len: libc::off_t::from(*last) - libc::off_t::from(*first) + 1,
        l_pid: 0,
    }
}

fn unlock(file: &File, places: RangeInclusive<i32>) {
    // An error leaves the lock to the closing.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, places)));
}

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

/// The process that delivers from an outbox. Nothing is locked, made or changed.
#[cfg(feature = "cli")]
pub(crate) fn deliverer(outbox: &Path) -> Option<u32> {
    let place = Place::look(&beside(outbox, "-lock")).ok()??;
    let file = open(OpenOptions::new().read(true), &place).ok()??;
    let is_held = is_locked(&file, DELIVERY..=DELIVERY).ok()?;
    pid_text(&file).ok()?.parse().ok().filter(|_| is_held)
}

/// The file to be locked, made where there is none: for its owner alone, as whoever can open it can lock it. What is no lock
/// file of ours is refused and left as it is.
fn lock_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    // Others may make it, remove or replace it meanwhile.
    for _ in 0..limits::LOCK_TRIES {
        let folder = fs::metadata(folder(path))?;
        let Some(place) = Place::look(path)? else {
            match make(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => continue,
            }
        };
        place.refuse_strangers(&folder)?;
        if place.remove_if_left_by_root(&folder)? {
            continue;
        }
        place.give_to_owner_of(&folder);
        if let Some(file) = open(&options, &place)? {
            return Ok(file);
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "is replaced again and again"))
}

/// Opens the file that was found, and hangs on nothing. `None`: another one is at its place by now, or none.
fn open(options: &OpenOptions, place: &Place) -> io::Result<Option<File>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    match options.clone().custom_flags(flags).open(&place.path) {
        Ok(file) => {
            Ok(Some(file).filter(|file| file.metadata().is_ok_and(|is| identity(&is) == identity(&place.metadata))))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ELOOP) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::process::Command;
    use std::time::Duration;

    use super::super::tests::Another;
    use super::*;

    fn outbox() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("heartbeat.db");
        (dir, outbox)
    }

    fn deliver(outbox: &Path, has_stopped: &Arc<AtomicBool>) -> (Locks, Deliverer) {
        let mut locks = Locks::new();
        let deliverer = locks.deliver(outbox, has_stopped).unwrap();
        (locks, deliverer)
    }

    /// One that has looked at the lock file.
    fn looking(outbox: &Path) -> Locks {
        let mut locks = Locks::new();
        locks.look(outbox).unwrap();
        locks
    }

    /// Removes the lock file, so that the next look makes another one.
    fn replace_the_lock_file(outbox: &Path) {
        fs::remove_file(beside(outbox, "-lock")).unwrap();
    }

    #[test]
    fn one_process_delivers_and_another_one_is_told_which() {
        let (_dir, outbox) = outbox();
        let held = Another::of(&outbox);
        let has_stopped = Arc::default();
        let take = || deliver(&outbox, &has_stopped);
        assert_eq!(take().1, Deliverer::Another(held.pid().to_string()));
        // Whatever the file contains, it is locked.
        fs::write(beside(&outbox, "-lock"), b"\xff\x1b").unwrap();
        assert_eq!(take().1, Deliverer::Another("\u{fffd}\\u{1b}".to_owned()));
        drop(held);
        let ours = take();
        assert_eq!(ours.1, Deliverer::Us);
        assert_eq!(
            take().1,
            Deliverer::Another(process::id().to_string()),
            "another one of ours, whose heartbeat runs"
        );
        has_stopped.store(true, Ordering::Relaxed);
        assert_eq!(take().1, Deliverer::Stopping);
        drop(ours);
        assert_eq!(take().1, Deliverer::Us);
    }

    #[cfg(feature = "cli")]
    #[test]
    fn the_deliverer_is_found_without_a_lock_and_without_a_trace() {
        let (dir, outbox) = outbox();
        assert_eq!(super::deliverer(&outbox), None);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        let held = Another::of(&outbox);
        assert_eq!(super::deliverer(&outbox), Some(held.pid()));
        drop(held);
        assert_eq!(super::deliverer(&outbox), None);
    }

    #[test]
    fn a_released_lock_is_free_while_a_child_process_is_being_started() {
        let (_dir, outbox) = outbox();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    Command::new("true").status().unwrap();
                }
            });
            let taken: Vec<_> = (0..2_000).map(|_| deliver(&outbox, &Arc::default()).1).collect();
            done.store(true, Ordering::Relaxed);
            assert!(taken.iter().all(|taken| *taken == Deliverer::Us));
        });
    }

    #[test]
    fn no_thread_takes_a_lock_of_this_process_for_another_ones() {
        let (_dir, outbox) = outbox();
        let has_stopped = Arc::new(AtomicBool::new(true));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let take = |_| assert!(!matches!(deliver(&outbox, &has_stopped).1, Deliverer::Another(_)));
                scope.spawn(move || (0..2_000).for_each(take));
            }
        });
    }

    #[test]
    fn an_owner_runs_until_its_process_ends_however_it_ends() {
        let (_dir, outbox) = outbox();
        let mut killed = Another::of(&outbox);
        let ours = looking(&outbox);
        let owner = |token: &str| ours.owner(token.as_bytes());
        assert_eq!(owner(&killed.token), Owner::Runs);
        killed.kill();
        assert_eq!(owner(&killed.token), Owner::Ended);
        let dropped = looking(&outbox);
        assert_eq!(owner(&dropped.token), Owner::Runs, "another outbox of this process");
        let token = dropped.token.clone();
        drop(dropped);
        assert_eq!(owner(&token), Owner::Ended);
    }

    #[test]
    fn to_ask_whether_an_owner_runs_takes_no_lock() {
        let (_dir, outbox) = outbox();
        let (ours, theirs) = (looking(&outbox), looking(&outbox));
        assert_eq!(ours.owner(b"7"), Owner::Unknown);
        assert!(theirs.files[0].lock(7).unwrap());
    }

    #[test]
    fn an_owner_that_is_no_place_has_ended() {
        let (_dir, outbox) = outbox();
        let ours = looking(&outbox);
        for owner in
            [&b"4711-0123456789abcdef"[..], b"", b"0@1", b"-1@1", b"2147483648@1", b"1@x", b"\xff", &[b'1'; 300]]
        {
            assert_eq!(ours.owner(owner), Owner::Ended, "{owner:?}");
        }
    }

    #[test]
    fn an_owner_of_a_replaced_lock_file_runs_where_that_is_still_open() {
        let (_dir, outbox) = outbox();
        let (mut ours, theirs) = (looking(&outbox), looking(&outbox));
        replace_the_lock_file(&outbox);
        ours.look(&outbox).unwrap();
        ours.settle();
        assert_eq!(ours.owner(theirs.token.as_bytes()), Owner::Runs);
        let token = theirs.token.clone();
        drop(theirs);
        assert_eq!(ours.owner(token.as_bytes()), Owner::Ended);
    }

    #[test]
    fn an_owner_that_ended_before_its_lock_file_was_replaced_has_ended_at_once() {
        let (_dir, outbox) = outbox();
        let (mut ours, theirs) = (looking(&outbox), looking(&outbox));
        let token = theirs.token.clone();
        drop(theirs);
        replace_the_lock_file(&outbox);
        ours.look(&outbox).unwrap();
        assert_eq!(ours.owner(token.as_bytes()), Owner::Ended);
    }

    #[test]
    fn a_new_lock_file_says_nothing_of_owners_of_another_one_for_a_minute() {
        let (_dir, outbox) = outbox();
        let mut theirs = looking(&outbox);
        theirs.is_named = true;
        replace_the_lock_file(&outbox);
        let mut ours = looking(&outbox);
        assert_eq!(ours.owner(theirs.token.as_bytes()), Owner::Unknown);
        ours.settle();
        assert_eq!(ours.owner(theirs.token.as_bytes()), Owner::Ended);
        // It has looked meanwhile, as it does every 10 s.
        let token = theirs.token.clone();
        theirs.own(&outbox).unwrap();
        assert_eq!((ours.owner(token.as_bytes()), &theirs.token), (Owner::Runs, &token));
    }

    #[test]
    fn a_lock_file_that_comes_back_is_as_new() {
        let (dir, outbox) = outbox();
        let (lock, aside) = (beside(&outbox, "-lock"), dir.path().join("aside"));
        let mut ours = looking(&outbox);
        ours.settle();
        fs::rename(&lock, &aside).unwrap();
        let theirs = looking(&outbox);
        fs::rename(&aside, &lock).unwrap();
        ours.look(&outbox).unwrap();
        assert_eq!(ours.owner(theirs.token.as_bytes()), Owner::Ended, "it was at its place all the time for us");
        fs::rename(&lock, &aside).unwrap();
        ours.look(&outbox).unwrap();
        fs::rename(&aside, &lock).unwrap();
        ours.look(&outbox).unwrap();
        assert_eq!(ours.owner(theirs.token.as_bytes()), Owner::Unknown);
    }

    #[test]
    fn nothing_is_concluded_where_the_lock_file_cannot_be_used() {
        let (_dir, outbox) = outbox();
        let theirs = looking(&outbox);
        replace_the_lock_file(&outbox);
        let mut ours = looking(&outbox);
        ours.settle();
        replace_the_lock_file(&outbox);
        fs::create_dir(beside(&outbox, "-lock")).unwrap();
        ours.look(&outbox).unwrap_err();
        assert_eq!(ours.owner(theirs.token.as_bytes()), Owner::Unknown);
        ours.is_named = true;
        ours.own(&outbox).unwrap();
        // It holds no lock as yet.
        Locks { is_named: true, ..Locks::new() }.own(&outbox).unwrap_err();
    }

    #[test]
    fn replaced_lock_files_that_nobody_needs_are_closed() {
        let (_dir, outbox) = outbox();
        let mut ours = looking(&outbox);
        ours.is_named = true;
        let theirs = looking(&outbox);
        for _ in 0..limits::LOCK_FILES + 10 {
            replace_the_lock_file(&outbox);
            ours.look(&outbox).unwrap();
        }
        assert_eq!(ours.files.len(), 1 + limits::LOCK_FILES + 1, "the first one, the last ones and the current one");
        drop(theirs);
        assert_eq!(looking(&outbox).owner(ours.token.as_bytes()), Owner::Runs);
    }

    #[test]
    fn one_process_at_a_time_has_its_turn_also_while_the_lock_file_is_replaced() {
        let (_dir, outbox) = outbox();
        let (mut ours, mut theirs) = (Locks::new(), looking(&outbox));
        let turn = ours.turn(&outbox, Instant::now()).unwrap();
        drop(ours.turn(&outbox, Instant::now()).unwrap());
        let (since, bound) = (Instant::now(), Duration::from_millis(50));
        let error = theirs.turn(&outbox, since + bound).unwrap_err();
        assert!(
            error.kind() == io::ErrorKind::TimedOut && since.elapsed() >= bound,
            "the inner turn has not ended the outer one"
        );
        replace_the_lock_file(&outbox);
        assert_eq!(theirs.turn(&outbox, Instant::now()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut new = Locks::new();
        let has_turn = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let turn = theirs.turn(&outbox, Instant::now() + Duration::from_secs(20)).unwrap();
                has_turn.store(true, Ordering::Relaxed);
                turn
            });
            // While it waits, too.
            std::thread::sleep(bound);
            replace_the_lock_file(&outbox);
            let turn_of_new = new.turn(&outbox, Instant::now()).unwrap();
            drop(turn);
            std::thread::sleep(bound);
            assert!(!has_turn.load(Ordering::Relaxed));
            drop(turn_of_new);
            waiting.join().unwrap();
        });
        assert_eq!(theirs.owner(ours.token.as_bytes()), Owner::Runs);
    }

    #[test]
    fn a_forked_child_releases_no_lock_of_its_parent() {
        let (_dir, outbox) = outbox();
        let (mut child, _) = deliver(&outbox, &Arc::default());
        let token = child.token.clone();
        // What its parent has open, which is the same open file description.
        let parents = child.files[0].file.try_clone().unwrap();
        child.files[0].pid -= 1;
        child.stop_delivering();
        drop(child);
        let (other, deliverer) = deliver(&outbox, &Arc::default());
        assert!(matches!(deliverer, Deliverer::Another(_)));
        assert_eq!(other.owner(token.as_bytes()), Owner::Runs);
        drop(parents);
        assert_eq!(other.owner(token.as_bytes()), Owner::Ended);
    }

    #[test]
    fn what_is_no_lock_file_is_refused_at_once_and_left_as_it_is() {
        let (dir, outbox) = outbox();
        let (lock, other) = (beside(&outbox, "-lock"), dir.path().join("other"));
        fs::write(&other, "theirs").unwrap();
        let makers: [(&str, &dyn Fn()); 5] = [
            ("is a symlink, not a regular file; move it away", &|| symlink(&other, &lock).unwrap()),
            ("is a symlink, not a regular file; move it away", &|| symlink("nowhere", &lock).unwrap()),
            ("is a directory, not a regular file; move it away", &|| fs::create_dir(&lock).unwrap()),
            ("is a FIFO, not a regular file; move it away", &|| {
                assert!(Command::new("mkfifo").arg(&lock).status().unwrap().success());
            }),
            ("has 2 hard links; remove the others, or move it away", &|| fs::hard_link(&other, &lock).unwrap()),
        ];
        for (problem, make) in makers {
            make();
            let kind = fs::symlink_metadata(&lock).unwrap().file_type();
            let error = Locks::new().deliver(&outbox, &Arc::default()).unwrap_err();
            assert_eq!(error.to_string(), format!("heartbeat.db-lock {problem}"));
            assert_eq!(fs::symlink_metadata(&lock).unwrap().file_type(), kind);
            assert_eq!(fs::read(&other).unwrap(), b"theirs");
            if kind.is_dir() { fs::remove_dir(&lock) } else { fs::remove_file(&lock) }.unwrap();
        }
        assert!(!dir.path().join("nowhere").exists());
    }

    #[test]
    fn a_lock_file_is_its_owners_alone_from_its_first_byte() {
        let (_dir, outbox) = outbox();
        looking(&outbox);
        assert_eq!(fs::metadata(beside(&outbox, "-lock")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    #[ignore = "needs root"]
    fn a_lock_file_that_root_makes_belongs_to_the_folders_owner() {
        let (dir, outbox) = outbox();
        std::os::unix::fs::chown(&dir, Some(1000), Some(1000)).unwrap();
        let lock = beside(&outbox, "-lock");
        let owner = || fs::metadata(&lock).map(|found| (found.uid(), found.gid())).unwrap();
        looking(&outbox);
        assert_eq!(owner(), (1000, 1000));
        // One that root has made and not given away, as it was killed.
        std::os::unix::fs::chown(&lock, Some(0), Some(0)).unwrap();
        looking(&outbox);
        assert_eq!(owner(), (1000, 1000));
        std::os::unix::fs::chown(&lock, Some(1001), Some(1001)).unwrap();
        let error = Locks::new().look(&outbox).unwrap_err();
        let problem = "heartbeat.db-lock belongs to user 1001, and neither to this user (0) nor to the owner of its folder (1000)";
        assert!(error.to_string().starts_with(problem), "{error}");
        assert_eq!(owner(), (1001, 1001));
    }
}
