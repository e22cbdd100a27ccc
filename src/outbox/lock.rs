//! The lock file beside the outbox, `heartbeat.db-lock`: who delivers, and which processes that own rows still run. For any
//! thread.
//!
//! - Locks are open file description locks, each on one byte. The kernel releases a lock when its process ends, however it
//!   ends, so no pid is compared and no file is swept.
//! - Byte 0 is held by the process that delivers. The file contains the pid of that process, for people.
//! - A process that has the outbox open holds one more byte, at a random place. A row names its owner as `PLACE@INODE`: that
//!   place, and the lock file in which the owner locked it first. An owner holds that lock as long as it runs, also when the
//!   lock file is replaced. Whether it does is asked without taking the lock.
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
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::geteuid;

use crate::error::printable_path;
use crate::files::{Identity, folder, identity};
use crate::limits;
use crate::panics::quietly;
pub(super) use crate::read_only::beside;
use crate::text::printable;

/// The byte of the process that delivers.
const DELIVERY: i32 = 0;

/// The bytes of owners.
const PLACES: RangeInclusive<i32> = 1..=i32::MAX;

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
}

/// An open lock file. All locks of an outbox in it are of this one open file description.
#[derive(Debug)]
struct LockFile {
    file: File,
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
        Self { token: place.to_string(), is_named: false, place, named: None, files: Vec::new(), is_current: false }
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
        let file = lock_file(path)?;
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

    /// Closes replaced lock files in which nobody else is locked. That which our rows name stays open.
    fn close_unused(&mut self) {
        let (current, named) = (self.files.last().map(|file| file.identity), self.named);
        self.files.retain(|file| {
            let is_ours = [current, named].contains(&Some(file.identity));
            is_ours || file.is_locked(PLACES).unwrap_or(true)
        });
    }

    /// Makes sure that others see that we run, where rows name us, or will. A lock file that cannot be used does no harm while we are
    /// locked in an older one.
    pub(super) fn own(&mut self, outbox: &Path) -> io::Result<()> {
        let looked = self.look(outbox);
        if self.is_named && self.files.is_empty() { looked } else { Ok(()) }
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
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, place..=place))) {
            Ok(_) => Ok(true),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn unlock(&self, places: RangeInclusive<i32>) {
        // An error leaves the lock to the closing.
        let _ = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, places)));
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
            self.unlock(DELIVERY..=DELIVERY);
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
            self.unlock(PLACES);
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
    let path = beside(outbox, "-lock");
    let file = open_checked(OpenOptions::new().read(true), &path).ok()?;
    let is_held = is_locked(&file, DELIVERY..=DELIVERY).ok()?;
    pid_text(&file).ok()?.parse().ok().filter(|_| is_held)
}

/// A file to be locked, made where there is none: for its owner alone, as whoever can open it can lock it. What root makes
/// belongs to the folder's owner, who could not open it otherwise.
pub(super) fn lock_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    loop {
        let made = options.clone().create_new(true).open(path);
        let opened = match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open_checked(&options, path),
            made => made,
        };
        match opened {
            // It has been removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder(path).is_dir() => (),
            opened => {
                let file = opened?;
                give_to_the_folders_owner(&file, path)?;
                return Ok(file);
            }
        }
    }
}

/// Opens a file that is there. It hangs on nothing, follows no symlink, and refuses what is not a lock file of ours.
fn open_checked(options: &OpenOptions, path: &Path) -> io::Result<File> {
    check(&fs::symlink_metadata(path)?, path)?;
    let file = options.clone().custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    check(&file.metadata()?, path)?;
    Ok(file)
}

fn check(found: &Metadata, path: &Path) -> io::Result<()> {
    let owners = [geteuid().as_raw(), 0, fs::metadata(folder(path))?.uid()];
    let problem = if !found.is_file() {
        "is not a regular file"
    } else if found.nlink() > 1 {
        "has a second name (a hard link)"
    } else if !owners.contains(&found.uid()) {
        "belongs to another user"
    } else {
        return Ok(());
    };
    let problem = format!("{} {problem}; remove it", printable_path(path));
    Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

fn give_to_the_folders_owner(file: &File, path: &Path) -> io::Result<()> {
    let (found, folder) = (file.metadata()?, fs::metadata(folder(path))?);
    // One with more in it is not ours, and stays as it is.
    let is_ours = found.uid() == 0 && found.len() <= limits::OUTBOX_HOLDER as u64;
    if !geteuid().is_root() || !is_ours || folder.uid() == 0 {
        return Ok(());
    }
    if let Err(error) = fchown(file, Some(folder.uid()), Some(folder.gid())).map_err(|error| error.to_string()) {
        let file = printable_path(path);
        quietly(|| {
            log::warn!(
                "the owner of the folder cannot use the lock file, as it cannot be given to him: file={file} error={error:?}"
            )
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

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
        for _ in 0..10 {
            replace_the_lock_file(&outbox);
            ours.look(&outbox).unwrap();
        }
        assert_eq!(ours.files.len(), 2, "the first one and the last one");
        drop(theirs);
        assert_eq!(looking(&outbox).owner(ours.token.as_bytes()), Owner::Runs);
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
            ("is not a regular file", &|| symlink(&other, &lock).unwrap()),
            ("is not a regular file", &|| symlink("nowhere", &lock).unwrap()),
            ("is not a regular file", &|| fs::create_dir(&lock).unwrap()),
            ("is not a regular file", &|| assert!(Command::new("mkfifo").arg(&lock).status().unwrap().success())),
            ("has a second name (a hard link)", &|| fs::hard_link(&other, &lock).unwrap()),
        ];
        for (problem, make) in makers {
            make();
            let kind = fs::symlink_metadata(&lock).unwrap().file_type();
            let error = Locks::new().deliver(&outbox, &Arc::default()).unwrap_err();
            assert_eq!(error.to_string(), format!("{} {problem}; remove it", lock.display()));
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
        assert_eq!(error.to_string(), format!("{} belongs to another user; remove it", lock.display()));
        assert_eq!(owner(), (1001, 1001));
    }
}
