//! The only writer of `heartbeat.db`: a delta is in it from before `push` returns until the master has answered 2xx.
//!
//! - A commit is on the disk before it is acknowledged: WAL with `synchronous=FULL`.
//! - The file is its owner's alone (0600) from its first byte, and `-wal` and `-shm` take after it.
//! - One process at a time delivers from it and recovers it; any may add to it.
//! - A row that somebody is at work on (an operation in flight, a delta that `push` posts itself) names that process,
//!   and comes free when it dies.
//! - It is an order of events: what began later has the higher id, and while a newer operation is in flight, older deltas
//!   of its decky are held back.
//! - Nobody waits for it longer than a second.
//! - Where the file cannot be written the outbox is in memory, says so, and goes to the file when it can. What the master
//!   has answered is never sent again meanwhile.
//! - What falls out of its bounds is counted and logged.
//!
//! Called on the threads that push, and on the heartbeat thread; one at a time has the connection, for a transaction and
//! never for the network.

mod entries;
mod file;
mod lock;
mod schema;
mod slot;
mod store;
#[cfg(test)]
mod tests;

use std::error::Error as StdError;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::delta::{LifecycleDelta, Operation};
use crate::error::{Error, chain, printable_path};
use crate::limits;
use crate::text::printable;
use entries::{Added, Change, Copied};
use lock::{DeliveryLock, Owner};
use slot::{Slot, Taken};
use store::{Refusal, Store};

/// The outbox' name in the agent dir.
const FILE: &str = "heartbeat.db";

/// Where deltas are kept until the master has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutboxLocation {
    /// `heartbeat.db` in the agent dir.
    #[default]
    AgentDir,
    /// This file.
    File(PathBuf),
    /// Memory: what is undelivered is lost when the process ends.
    Memory,
}

/// What an outbox is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To deliver from it, and to recover what others left: one process at a time.
    Deliver,
    /// To add to it.
    #[cfg_attr(not(feature = "cli"), expect(dead_code, reason = "the program's `push` and `track` do"))]
    Contribute,
}

/// A delta with its place in the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) id: i64,
    pub(crate) delta: LifecycleDelta,
}

/// What the master has said of a delta for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It has it: it is gone from the outbox.
    Delivered,
    /// It will never take it: it is kept aside with the reason.
    Rejected(String),
}

/// Who posts the delta of an operation that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Poster {
    /// Whoever delivers from the outbox.
    Deliverer,
    /// This process itself, until it [releases](Outbox::release) it or ends.
    Us,
}

/// How much is in the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Deltas that the master has neither accepted nor rejected.
    pub(crate) waiting: u64,
    /// Of these, the ones that must not go out now: somebody is at work on a newer row of the same decky and operation,
    /// or posts it himself.
    pub(crate) held: u64,
    /// Rows of operations in flight.
    pub(crate) operations: u64,
}

/// What the outbox knows of itself without being asked for its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Books {
    /// As of the last look.
    pub(crate) counts: Counts,
    /// Deltas that fell out undelivered, since the outbox was opened.
    pub(crate) dropped: u64,
    /// All of it is in its file.
    pub(crate) on_disk: bool,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    shared: Slot<Shared>,
    /// Changes that found the connection taken. They are made by whoever has it next.
    pending: Mutex<Vec<Change>>,
    books: Mutex<Books>,
    /// How rows name this process as their owner.
    us: String,
    /// Where it belongs; `None` for one that is meant to be in memory.
    path: Option<PathBuf>,
    role: Mutex<Delivery>,
}

/// Whether we deliver.
#[derive(Debug)]
enum Delivery {
    /// Others do.
    No,
    /// We do, and have the lock, where there is a file to lock.
    Yes(Option<DeliveryLock>),
}

/// What one thread at a time has.
#[derive(Debug)]
struct Shared {
    store: Store,
    owner: Owner,
    /// Some row names us as its owner, or did.
    owning: bool,
    /// When and how the file refused the last time, unless it has been written since.
    refused: Option<(Instant, Refusal)>,
    /// Up to when the rows have been aged.
    aged: Instant,
    /// How many of those that fell out have been logged.
    said: u64,
}

/// The file did not take a change.
struct Refused {
    why: Refusal,
    source: Box<dyn StdError + Send + Sync>,
}

/// Why the outbox is not in its file.
enum Away {
    /// Somebody else delivers from it.
    Held(Error),
    Unusable(Error),
}

impl Shared {
    /// Makes a change on the disk. A file that has just refused is left alone for a moment.
    fn write<T>(
        &mut self,
        path: Option<&Path>,
        deadline: Instant,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Refused> {
        if let Some((at, why)) = self.refused
            && at.elapsed() < limits::OUTBOX_RETRY
        {
            return Err(Refused { why, source: "it could not be written a moment ago".into() });
        }
        let written = self.attempt(path, deadline, change);
        match &written {
            Ok(_) if self.refused.take().is_some() => log::info!("the outbox is on the disk again"),
            Err(refused) if refused.why != Refusal::Locked => self.turn_to_memory(refused),
            _ => (),
        }
        written
    }

    fn attempt<T>(
        &mut self,
        path: Option<&Path>,
        deadline: Instant,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Refused> {
        if let (true, Some(path)) = (self.owning && self.store.is_file(), path) {
            self.owner.live(path).map_err(|source| Refused { why: Refusal::Unwritable, source: source.into() })?;
        }
        let within = deadline.saturating_duration_since(Instant::now());
        let written = self.store.write(within, change);
        written.map_err(|source| Refused { why: Refusal::of(&source), source: source.into() })
    }

    /// The file refuses for more than a moment: until it takes a change again, what comes is in memory.
    fn turn_to_memory(&mut self, refused: &Refused) {
        if self.refused.is_none() {
            log::error!(
                "the outbox cannot be written, deltas are in memory and do not survive a restart: error={}",
                chain(refused.source.as_ref())
            );
            if let Err(error) = self.store.leave_a_gap() {
                log::debug!("the outbox cannot be read: error={error}");
            }
        }
        self.refused = Some((Instant::now(), refused.why));
    }
}

impl Outbox {
    /// Opens the outbox, or one in memory where the file cannot be used; the second value then says why. To deliver, it
    /// also recovers what processes that have died were at work on.
    pub(crate) fn open(
        location: &OutboxLocation,
        agent_dir: &Path,
        role: Role,
    ) -> Result<(Self, Option<Error>), Error> {
        let path = match location {
            OutboxLocation::AgentDir => Some(agent_dir.join(FILE)),
            OutboxLocation::File(path) => Some(path.clone()),
            OutboxLocation::Memory => None,
        };
        let store = Store::in_memory().map_err(|source| Error::outbox(None, "cannot be opened").because(source))?;
        let (owner, aged) = (Owner::new(), Instant::now());
        let us = owner.token().to_owned();
        let outbox = Self {
            shared: Slot::new(Shared { store, owner, owning: false, refused: None, aged, said: 0 }),
            pending: Mutex::default(),
            books: Mutex::default(),
            us,
            path,
            role: Mutex::new(if role == Role::Deliver { Delivery::Yes(None) } else { Delivery::No }),
        };
        let mut shared = outbox.enter(deadline())?;
        let problem = match outbox.go_home(&mut shared) {
            Err(Away::Held(error)) => return Err(error),
            Err(Away::Unusable(error)) => Some(error),
            Ok(()) => None,
        };
        if role == Role::Deliver && problem.is_none() {
            outbox.recover(&mut shared, "the agent restarted during ")?;
            outbox.sweep();
        }
        outbox.count(&shared);
        drop(shared);
        Ok((outbox, problem))
    }

    /// Moves from memory, or from a file that is gone or broken, to the file at its place.
    fn go_home(&self, shared: &mut Shared) -> Result<(), Away> {
        let Some(path) = self.path.as_deref() else { return Ok(()) };
        let unusable =
            |doing: &str, source: rusqlite::Error| Away::Unusable(Error::outbox(Some(path), doing).because(source));
        self.take_delivery(path)?;
        if shared.store.is_file() {
            // Closed first: what SQLite keeps beside the file that is gone must not mix with the new one's.
            self.leave_file(shared).map_err(|source| unusable("cannot be left", source))?;
        }
        let mut home = self.open_home(path)?;
        if shared.owning {
            let live = shared.owner.live(path);
            live.map_err(|source| Away::Unusable(Error::outbox(Some(path), "cannot be written").because(source)))?;
        }
        let taken = home.take_over(&shared.store, Copied::Everything, limits::OUTBOX_BUSY);
        taken.map_err(|source| unusable("cannot be written", source))?;
        (shared.store, shared.refused) = (home, None);
        Ok(())
    }

    /// Takes everything from a file that is gone, and from a broken one what it did not know.
    fn leave_file(&self, shared: &mut Shared) -> rusqlite::Result<()> {
        let copied = match shared.refused {
            Some((_, Refusal::Corrupt)) => Copied::Unwritten,
            _ => Copied::Everything,
        };
        let mut memory = Store::in_memory()?;
        memory.take_over(&shared.store, copied, Duration::ZERO)?;
        shared.store = memory;
        Ok(())
    }

    /// Takes the delivery lock, if we are to deliver and do not have it yet.
    fn take_delivery(&self, path: &Path) -> Result<(), Away> {
        let mut role = unpoisoned(&self.role);
        if !matches!(*role, Delivery::Yes(None)) {
            return Ok(());
        }
        match DeliveryLock::take(path) {
            Ok(Ok(lock)) => {
                *role = Delivery::Yes(Some(lock));
                Ok(())
            }
            Ok(Err(holder)) => {
                let problem =
                    format!("is delivered from by process {holder} already; stop that one, or use another file");
                Err(Away::Held(Error::outbox(Some(path), problem)))
            }
            Err(source) => Err(Away::Unusable(Error::outbox(Some(path), "cannot be written").because(source))),
        }
    }

    /// Opens the file. If it is none of ours, or broken, and it is ours to care for, it is moved aside for a new one.
    fn open_home(&self, path: &Path) -> Result<Store, Away> {
        let found = Store::at(path, limits::OUTBOX_BUSY).map_err(Away::Unusable)?;
        let sound = found.and_then(|store| match store.damage() {
            Ok(None) => Ok(store),
            Ok(Some(damage)) => Err(damage),
            Err(error) => Err(error.to_string()),
        });
        let problem = match sound {
            Ok(store) => return Ok(store),
            Err(problem) if self.delivers() => problem,
            Err(problem) => {
                return Err(Away::Unusable(Error::outbox(Some(path), "is no outbox, or broken").because(problem)));
            }
        };
        let aside = file::move_aside(path).map_err(|source| {
            Away::Unusable(Error::outbox(Some(path), "is broken, and cannot be moved aside").because(source))
        })?;
        log::error!(
            "the outbox was broken or none, it is moved aside and a new one begun: file={} aside={} problem={}",
            printable_path(path),
            printable_path(&aside),
            printable(&problem)
        );
        match Store::at(path, limits::OUTBOX_BUSY).map_err(Away::Unusable)? {
            Ok(store) => Ok(store),
            Err(problem) => Err(Away::Unusable(Error::outbox(Some(path), "cannot be made anew").because(problem))),
        }
    }

    /// The file, or `None` for an outbox that is in memory just now.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref().filter(|_| self.books().on_disk)
    }

    pub(crate) fn books(&self) -> Books {
        *unpoisoned(&self.books)
    }

    /// Keeps `deltas` in one transaction: all of them are on the disk when it returns, or none. (Or in memory, where
    /// the file cannot be written, or is not meant to be.)
    pub(crate) fn keep(&self, deltas: &[LifecycleDelta]) -> Result<(), Error> {
        let (added, _) = self.add(deltas.len(), |db, _| entries::add(db, deltas, None))?;
        // Without counting: a push must not cost more when many wait. The next look sets it right.
        let waiting = &mut unpoisoned(&self.books).counts.waiting;
        *waiting = (*waiting + deltas.len() as u64).saturating_sub(added.dropped);
        Ok(())
    }

    /// Keeps `deltas` for this process to post itself: nobody else does, until they are [released](Self::release) or it
    /// ends.
    #[cfg(feature = "cli")]
    pub(crate) fn claim(&self, deltas: Vec<LifecycleDelta>) -> Result<Vec<Kept>, Error> {
        let (added, shared) = self.add(deltas.len(), |db, us| entries::add(db, &deltas, Some(us)))?;
        self.count(&shared);
        Ok((added.first..).zip(deltas).map(|(id, delta)| Kept { id, delta }).collect())
    }

    /// Writes an operation down as in flight, a row for each decky; their ids.
    pub(crate) fn begin(&self, operation: Operation, deckies: &[String]) -> Result<Vec<i64>, Error> {
        let (added, shared) = self.add(deckies.len(), |db, us| entries::begin(db, operation, deckies, us))?;
        self.count(&shared);
        Ok((added.first..).take(deckies.len()).collect())
    }

    fn add(
        &self,
        rows: usize,
        add: impl Fn(&Connection, &str) -> rusqlite::Result<Option<Added>>,
    ) -> Result<(Added, Taken<'_, Shared>), Error> {
        let deadline = deadline();
        let mut shared = self.enter(deadline).map_err(|_| self.error("is busy: nothing was kept"))?;
        shared.owning = true;
        let added = match shared.write(self.path.as_deref(), deadline, |db| add(db, &self.us)) {
            Ok(added) => added,
            Err(refused) if refused.why == Refusal::Locked => {
                return Err(self.error("is locked by another process; nothing was kept").because(refused.source));
            }
            Err(_) => {
                let remembered = shared.store.remember(|db| add(db, &self.us));
                remembered.map_err(|source| self.error("cannot keep anything").because(source))?
            }
        };
        let Some(added) = added else {
            let most = limits::OUTBOX_ROWS;
            return Err(
                self.error(&format!("has no room for {rows} more: it holds {most} rows, less what is in flight"))
            );
        };
        let on_disk = self.is_on_disk(&shared);
        let mut books = unpoisoned(&self.books);
        (books.dropped, books.on_disk) = (books.dropped + added.dropped, on_disk);
        drop(books);
        Ok((added, shared))
    }

    /// Operations that were begun here have ended. As what is settled, this is never lost; an error says that the file
    /// does not know it yet.
    pub(crate) fn end(&self, ended: Vec<Kept>, poster: Poster) -> Result<(), Error> {
        let owner = (poster == Poster::Us).then(|| self.us.clone());
        self.note(Change::Ended(ended, owner))
    }

    /// Leaves deltas that this process was to post to whoever delivers.
    #[cfg(feature = "cli")]
    pub(crate) fn release(&self, deltas: &[Kept]) -> Result<(), Error> {
        self.note(Change::Released(deltas.iter().map(|kept| kept.id).collect()))
    }

    /// The master has answered for good: these are never sent again. An error says that the file does not know it yet,
    /// and that after a restart before it does they would be.
    pub(crate) fn settle(&self, deltas: &[Kept], settled: &Settled) -> Result<(), Error> {
        self.note(Change::Settled(deltas.iter().map(|kept| kept.id).collect(), settled.clone()))
    }

    fn note(&self, change: Change) -> Result<(), Error> {
        unpoisoned(&self.pending).push(change);
        let deadline = deadline();
        let mut shared = self.enter(deadline)?;
        let written = self.write_down(&mut shared, deadline);
        self.count(&shared);
        written
    }

    /// Moves what is in memory to the file.
    fn write_down(&self, shared: &mut Shared, deadline: Instant) -> Result<(), Error> {
        let written = shared.write(self.path.as_deref(), deadline, |_| Ok(()));
        written.map_err(|refused| self.error("cannot be written").because(refused.source))
    }

    /// The deltas that may go out, newest first, other processes' among them. Those are held back that have a newer
    /// operation in flight.
    pub(crate) fn deliverable(&self, most: usize) -> Result<Vec<Kept>, Error> {
        let shared = self.enter(deadline())?;
        self.count(&shared);
        let deltas = shared.store.read(|db| entries::deliverable(db, most));
        deltas.map_err(|source| self.error("cannot be read").because(source))
    }

    /// What is to be done before a beat by the process that delivers: it goes to its file if it is not there, takes over
    /// what dead processes were at work on, lets go of what is too old, and writes down what it could not so far.
    pub(crate) fn tend(&self) -> Result<(), Error> {
        if !self.delivers() {
            return Ok(());
        }
        let deadline = deadline();
        let mut shared = self.enter(deadline)?;
        if self.is_away(&shared) {
            match self.go_home(&mut shared) {
                Ok(()) => log::info!("the outbox has a file again"),
                Err(Away::Held(error) | Away::Unusable(error)) => {
                    log::debug!("the outbox has no file yet: error={}", chain(&error));
                }
            }
        }
        let tended = self.recover(&mut shared, "its process ended during ").and_then(|()| self.age(&mut shared, None));
        let tended = tended.and_then(|()| match shared.store.is_written() {
            Ok(true) => Ok(()),
            _ => self.write_down(&mut shared, deadline),
        });
        let (dropped, most) = (self.books().dropped, limits::OUTBOX_ROWS);
        let unsaid = dropped - mem::replace(&mut shared.said, dropped);
        if unsaid > 0 {
            log::error!("deltas fell out of the outbox undelivered, too many or too old: deltas={unsaid} most={most}");
        }
        self.count(&shared);
        tended
    }

    /// It is to have a file, and has not the one at its place, or a broken one.
    fn is_away(&self, shared: &Shared) -> bool {
        let broken = shared.refused.is_some_and(|(_, why)| why == Refusal::Corrupt);
        self.path.as_deref().is_some_and(|path| broken || !shared.store.is_at(path))
    }

    /// Reports the operations of dead processes failed, with `reason` and the operation's name.
    fn recover(&self, shared: &mut Shared, reason: &str) -> Result<(), Error> {
        let Some(path) = self.path.as_deref() else { return Ok(()) };
        let owners = shared.store.read(entries::owners);
        let mut dead = owners.map_err(|source| self.error("cannot be read").because(source))?;
        dead.retain(|owner| *owner != self.us && lock::is_dead(path, owner));
        if dead.is_empty() {
            return Ok(());
        }
        let recover = |db: &Connection| {
            dead.iter().try_fold(0, |sum, owner| entries::recover(db, owner, reason).map(|count| sum + count))
        };
        let recovered = shared.write(Some(path), deadline(), recover);
        let operations = recovered.map_err(|refused| self.error("cannot be recovered").because(refused.source))?;
        log::warn!(
            "the processes of operations in flight have died, these are reported failed: operations={operations}"
        );
        Ok(())
    }

    /// Removes what processes that died without leaving a row have left beside the file.
    fn sweep(&self) {
        if let Some(Err(error)) = self.path.as_deref().map(lock::sweep) {
            log::debug!("what dead processes left beside the outbox stays there: error={error}");
        }
    }

    /// Ages the rows by the time that has passed, or by so much.
    fn age(&self, shared: &mut Shared, by: Option<Duration>) -> Result<(), Error> {
        let by = by.unwrap_or_else(|| shared.aged.elapsed());
        if by < limits::OUTBOX_AGING {
            return Ok(());
        }
        let aged = shared.write(self.path.as_deref(), deadline(), |db| entries::grow_older(db, by.as_secs()));
        let dropped = aged.map_err(|refused| self.error("cannot be written").because(refused.source))?;
        unpoisoned(&self.books).dropped += dropped;
        shared.aged = Instant::now();
        Ok(())
    }

    /// Lets another process deliver. What is still added here waits for it.
    pub(crate) fn stop_delivering(&self) {
        *unpoisoned(&self.role) = Delivery::No;
    }

    fn delivers(&self) -> bool {
        matches!(*unpoisoned(&self.role), Delivery::Yes(_))
    }

    /// Waits for the connection, and makes the changes that did not get it.
    fn enter(&self, deadline: Instant) -> Result<Taken<'_, Shared>, Error> {
        let mut shared = self.shared.take(deadline).ok_or_else(|| self.error("is busy"))?;
        let changes = mem::take(&mut *unpoisoned(&self.pending));
        if !changes.is_empty() {
            let made = shared.store.remember(|db| changes.iter().try_for_each(|change| change.apply(db)));
            if let Err(error) = made {
                log::debug!("the outbox cannot be changed: error={error}");
                unpoisoned(&self.pending).splice(..0, changes);
            }
        }
        Ok(shared)
    }

    /// Brings the books up to date. Where it cannot be read the numbers stay as they were.
    fn count(&self, shared: &Shared) {
        let counted = shared.store.read(entries::counts);
        let on_disk = self.is_on_disk(shared);
        let mut books = unpoisoned(&self.books);
        books.counts = counted.unwrap_or(books.counts);
        books.on_disk = on_disk;
    }

    /// All of it is in the file at its place.
    fn is_on_disk(&self, shared: &Shared) -> bool {
        let at_home = self.path.as_deref().is_some_and(|path| shared.store.is_at(path));
        at_home && shared.store.is_written().unwrap_or(false)
    }

    fn error(&self, problem: &str) -> Error {
        Error::outbox(self.path.as_deref(), problem)
    }
}

/// Up to when the outbox is waited for.
fn deadline() -> Instant {
    Instant::now() + limits::OUTBOX_BUSY
}

/// What is behind these locks is changed in single steps, so a panic leaves it whole.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
