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
mod home;
mod lock;
#[cfg(feature = "cli")]
mod look;
#[cfg(test)]
#[cfg(feature = "cli")]
mod model;
pub(crate) mod schema;
mod shared;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use parking_lot::{FairMutex, FairMutexGuard};
use rusqlite::Connection;

use crate::delta::{LifecycleDelta, Operation, micros};
use crate::error::{Error, chain, printable_path};
use crate::limits;
use crate::panics::quietly;
use entries::{Added, Change, Place};
#[cfg(feature = "cli")]
pub(crate) use file::folder;
use home::{Away, Delivery};
use lock::Owner;
#[cfg(feature = "cli")]
pub(crate) use lock::deliverer;
#[cfg(feature = "cli")]
pub(crate) use look::look;
use shared::{Shared, name};
use store::{Refusal, Store};

/// The outbox' name in the agent dir.
pub(crate) const FILE: &str = "heartbeat.db";

/// Where deltas are kept until the master has them.
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use decnet_heartbeat::OutboxLocation;
/// # let (dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let file = dir.path().join("outbox.db");
/// let heartbeat = builder.outbox(OutboxLocation::File(file.clone())).start()?;
/// assert_eq!(heartbeat.stats().outbox.as_deref(), Some(file.as_path()));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
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

impl OutboxLocation {
    /// Its file; `None`: it is in memory.
    pub(crate) fn path(&self, agent_dir: &Path) -> Option<PathBuf> {
        match self {
            Self::AgentDir => Some(agent_dir.join(FILE)),
            Self::File(path) => Some(path.clone()),
            Self::Memory => None,
        }
    }
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
    /// Rows that the master has refused for good.
    pub(crate) rejected: u64,
    /// When the operation ended that the oldest waiting delta tells of, in microseconds since 1970.
    pub(crate) oldest: Option<i64>,
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
    /// Waited for in turn, so that threads that push all the time do not keep the beat from it.
    shared: FairMutex<Shared>,
    /// Changes that found the connection taken. They are made by whoever has it next.
    pending: Mutex<Vec<Change>>,
    books: Mutex<Books>,
    /// How rows name this process as their owner.
    us: String,
    /// Where it belongs; `None` for one that is meant to be in memory.
    path: Option<PathBuf>,
    role: Mutex<Delivery>,
}

impl Outbox {
    /// Opens the outbox, or one in memory where the file cannot be used; the second value then says why. To deliver, it
    /// also recovers what processes that have died were at work on.
    pub(crate) fn open(
        location: &OutboxLocation,
        agent_dir: &Path,
        role: Role,
    ) -> Result<(Self, Option<Error>), Error> {
        let path = location.path(agent_dir);
        let store = Store::in_memory().map_err(|source| Error::outbox(None, "cannot be opened").because(source))?;
        let (owner, aged) = (Owner::new(), Instant::now());
        let us = owner.token().to_owned();
        let outbox = Self {
            shared: FairMutex::new(Shared {
                store,
                owner,
                owning: false,
                left: BTreeSet::new(),
                refused: None,
                aged,
                said: 0,
            }),
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
            if let Err(error) = outbox.recover(&mut shared, "the agent restarted during ") {
                quietly(|| log::warn!("operations that were in flight are recovered later: error={:?}", chain(&error)));
            }
            outbox.sweep();
        }
        outbox.count(&shared);
        drop(shared);
        Ok((outbox, problem))
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
        // Held until the books have it: a look in between would have counted these already.
        let (added, _shared) =
            self.add(deltas.len(), None, |db, place, owner| entries::add(db, place, deltas, owner))?;
        // Without counting: a push must not cost more when many wait. The next look sets it right.
        let counts = &mut unpoisoned(&self.books).counts;
        counts.waiting = (counts.waiting + deltas.len() as u64).saturating_sub(added.dropped);
        counts.oldest = deltas.iter().map(|delta| micros(delta.when())).chain(counts.oldest).min();
        Ok(())
    }

    /// Keeps `deltas` for this process to post itself: nobody else does, until they are [released](Self::release) or it
    /// ends.
    #[cfg(feature = "cli")]
    pub(crate) fn claim(&self, deltas: Vec<LifecycleDelta>) -> Result<Vec<Kept>, Error> {
        let add = |db: &Connection, place, owner: Option<&str>| entries::add(db, place, &deltas, owner);
        let (added, shared) = self.add(deltas.len(), Some(&self.us), add)?;
        self.count(&shared);
        Ok((added.first..).zip(deltas).map(|(id, delta)| Kept { id, delta }).collect())
    }

    /// Writes an operation down as in flight, a row for each decky; their ids.
    pub(crate) fn begin(&self, operation: Operation, deckies: &[String]) -> Result<Vec<i64>, Error> {
        let begin = |db: &Connection, place, owner: Option<&str>| entries::begin(db, place, operation, deckies, owner);
        let (added, shared) = self.add(deckies.len(), Some(&self.us), begin)?;
        self.count(&shared);
        Ok((added.first..).take(deckies.len()).collect())
    }

    fn add(
        &self,
        rows: usize,
        owner: Option<&str>,
        add: impl Fn(&Connection, Place, Option<&str>) -> rusqlite::Result<Option<Added>>,
    ) -> Result<(Added, FairMutexGuard<'_, Shared>), Error> {
        let deadline = deadline();
        let mut shared = self.enter(deadline).map_err(|_| self.error("is busy: nothing was kept"))?;
        shared.owning |= owner.is_some();
        let added = match shared.write(self.path.as_deref(), deadline, |db| add(db, Place::File, owner)) {
            Ok(added) => added,
            Err(refused) if refused.why == Refusal::Locked => {
                return Err(self.error("is locked by another process; nothing was kept").because(refused.source));
            }
            Err(_) => {
                let remembered = shared.store.remember(|db| add(db, Place::Memory, owner));
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
        if !self.delivers() {
            self.say_dropped(&mut shared);
        }
        Ok((added, shared))
    }

    /// Operations that were begun here have ended. As what is settled, this is never lost; an error says that the file
    /// does not know it yet.
    pub(crate) fn end(&self, ended: Vec<Kept>, poster: Poster) -> Result<(), Error> {
        let owner = (poster == Poster::Us).then(|| self.us.clone());
        self.note(Change::Ended(ended, owner), deadline())
    }

    /// Leaves deltas that this process was to post to whoever delivers.
    #[cfg(feature = "cli")]
    pub(crate) fn release(&self, deltas: &[Kept]) -> Result<(), Error> {
        self.note(Change::Released(deltas.iter().map(|kept| kept.id).collect()), deadline())
    }

    /// The master has answered for good: these are never sent again. An error says that the file does not know it yet,
    /// and that after a restart before it does they would be.
    pub(crate) fn settle(&self, deltas: &[Kept], settled: &Settled, by: Instant) -> Result<(), Error> {
        self.note(Change::Settled(deltas.iter().map(|kept| kept.id).collect(), settled.clone()), by)
    }

    fn note(&self, change: Change, by: Instant) -> Result<(), Error> {
        unpoisoned(&self.pending).push(change);
        let mut shared = self.enter(by)?;
        let written = self.write_down(&mut shared, by);
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
    #[cfg(any(test, fuzzing))]
    pub(crate) fn deliverable(&self, most: usize, by: Instant) -> Result<Vec<Kept>, Error> {
        self.deliverable_where(most, by, None)
    }

    /// The same, of those that are `wanted`.
    pub(crate) fn deliverable_where(
        &self,
        most: usize,
        by: Instant,
        wanted: Option<&dyn Fn(&Kept) -> bool>,
    ) -> Result<Vec<Kept>, Error> {
        let mut shared = self.enter(by)?;
        // Where it can be, what goes out is on the disk first: an operation's end that the master has heard of and the next
        // start has not would be reported a second time, and as a failure.
        if !shared.store.is_written().unwrap_or(true)
            && let Err(error) = self.write_down(&mut shared, by)
        {
            quietly(|| log::debug!("what goes out is not on the disk: error={:?}", chain(&error)));
        }
        let looked = shared.store.read(|db| Ok((entries::counts(db)?, entries::deliverable(db, most, wanted)?)));
        self.note_down(&shared, looked.as_ref().ok().map(|(counts, _)| *counts));
        looked.map(|(_, deltas)| deltas).map_err(|source| self.error("cannot be read").because(source))
    }

    /// Whether a delta waits for delivery, held back or not.
    pub(crate) fn waits(&self, id: i64, by: Instant) -> Result<bool, Error> {
        let shared = self.enter(by)?;
        let waits = shared.store.read(|db| entries::waits(db, id));
        waits.map_err(|source| self.error("cannot be read").because(source))
    }

    /// Whether the master has to hear something newer of its decky and operation first, as it would give it this delta's row
    /// or this delta that one's.
    #[cfg(feature = "cli")]
    pub(crate) fn is_overtaken(&self, kept: &Kept) -> Result<bool, Error> {
        let shared = self.enter(deadline())?;
        let overtaken = shared.store.read(|db| entries::is_overtaken(db, kept));
        overtaken.map_err(|source| self.error("cannot be read").because(source))
    }

    /// What is to be done before a beat by the process that delivers: it goes to its file if it is not there, takes over
    /// what dead processes were at work on, lets go of what is too old, and writes down what it could not so far.
    pub(crate) fn tend(&self) -> Result<(), Error> {
        if !self.delivers() {
            return Ok(());
        }
        let deadline = deadline();
        let mut shared = self.enter(deadline)?;
        self.look_for_home(&mut shared);
        let tended = self.recover(&mut shared, "its process ended during ").and_then(|()| self.age(&mut shared));
        let tended = tended.and_then(|()| match shared.store.is_written() {
            Ok(true) => Ok(()),
            _ => self.write_down(&mut shared, deadline),
        });
        self.say_dropped(&mut shared);
        self.count(&shared);
        tended
    }

    /// The last chance for what the file did not take: it is tried once more, however fresh its refusal is.
    pub(crate) fn finish(&self, by: Instant) -> Result<(), Error> {
        if !self.delivers() || self.path.is_none() {
            return Ok(());
        }
        let mut shared = self.enter(by)?;
        if self.is_on_disk(&shared) {
            return Ok(());
        }
        if let Some((until, _)) = &mut shared.refused {
            *until = Instant::now();
        }
        self.look_for_home(&mut shared);
        let written = self.write_down(&mut shared, by);
        self.count(&shared);
        written
    }

    /// Never silent, and not for each push: the process that delivers says it with the next beat.
    fn say_dropped(&self, shared: &mut Shared) {
        let (dropped, most) = (self.books().dropped, limits::OUTBOX_ROWS);
        let unsaid = dropped - mem::replace(&mut shared.said, dropped);
        if unsaid > 0 {
            let outbox = name(self.path.as_deref());
            quietly(|| {
                log::error!(
                    "deltas fell out of the outbox undelivered, too many or too old: outbox={outbox} deltas={unsaid} most={most}"
                )
            });
        }
    }

    /// Reports the operations of dead processes failed, with `reason` and the operation's name.
    fn recover(&self, shared: &mut Shared, reason: &str) -> Result<(), Error> {
        let Some(path) = self.path.as_deref() else { return Ok(()) };
        let owners = shared.store.read(entries::owners);
        let mut dead = owners.map_err(|source| self.error("cannot be read").because(source))?;
        dead.retain(|owner| owner != self.us.as_bytes() && lock::is_dead(path, owner));
        if dead.is_empty() {
            return Ok(());
        }
        let recover = |db: &Connection| {
            dead.iter().try_fold(0, |sum, owner| entries::recover(db, owner, reason).map(|count| sum + count))
        };
        let recovered = shared.change(Some(path), deadline(), recover);
        let operations = recovered.map_err(|source| self.error("cannot be recovered").because(source))?;
        quietly(|| {
            log::warn!(
                "the processes of operations in flight have died, these are reported failed: outbox={} operations={operations}",
                printable_path(path)
            )
        });
        Ok(())
    }

    /// Removes what processes that died without leaving a row have left beside the file.
    fn sweep(&self) {
        if let Some(Err(error)) = self.path.as_deref().map(lock::sweep) {
            quietly(|| {
                log::debug!("what dead processes left beside the outbox stays there: error={:?}", error.to_string())
            });
        }
    }

    /// Ages the rows by the time that has passed, when that is worth a change. A process that was stopped has not tried
    /// to deliver meanwhile, so no step is a long one.
    fn age(&self, shared: &mut Shared) -> Result<(), Error> {
        let passed = shared.aged.elapsed();
        if passed < limits::OUTBOX_AGING {
            return Ok(());
        }
        shared.aged = Instant::now();
        self.age_by(shared, passed.min(limits::OUTBOX_AGING * 2))
    }

    fn age_by(&self, shared: &mut Shared, passed: Duration) -> Result<(), Error> {
        let older = |db: &Connection| entries::grow_older(db, passed.as_secs());
        let aged = shared.change(self.path.as_deref(), deadline(), older);
        unpoisoned(&self.books).dropped += aged.map_err(|source| self.error("cannot be read").because(source))?;
        Ok(())
    }

    /// Ages the rows as if so much time had passed.
    #[cfg(fuzzing)]
    pub(crate) fn pass(&self, time: Duration) -> Result<(), Error> {
        let mut shared = self.enter(deadline())?;
        self.age_by(&mut shared, time)
    }

    /// Nobody will ever deliver from it, and nothing outlives it: it is in memory, and its heartbeat has stopped.
    pub(crate) fn is_dead(&self) -> bool {
        !self.delivers() && self.path().is_none()
    }

    /// Lets another process deliver. What is still added here waits for it.
    pub(crate) fn stop_delivering(&self) {
        *unpoisoned(&self.role) = Delivery::No;
    }

    fn delivers(&self) -> bool {
        matches!(*unpoisoned(&self.role), Delivery::Yes(_))
    }

    /// Waits for the connection, and makes the changes that did not get it.
    fn enter(&self, deadline: Instant) -> Result<FairMutexGuard<'_, Shared>, Error> {
        let mut shared = self.shared.try_lock_until(deadline).ok_or_else(|| self.error("is busy"))?;
        let changes = mem::take(&mut *unpoisoned(&self.pending));
        if !changes.is_empty() {
            let made = shared.store.remember(|db| changes.iter().try_for_each(|change| change.apply(db)));
            if let Err(error) = made {
                quietly(|| log::debug!("the outbox cannot be changed: error={:?}", error.to_string()));
                unpoisoned(&self.pending).splice(..0, changes);
            }
        }
        Ok(shared)
    }

    /// Brings the books up to date.
    fn count(&self, shared: &Shared) {
        self.note_down(shared, shared.store.read(entries::counts).ok());
    }

    /// Where it could not be read the numbers stay as they were.
    fn note_down(&self, shared: &Shared, counted: Option<Counts>) {
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

/// Up to when the outbox is waited for at the most.
pub(crate) fn deadline() -> Instant {
    Instant::now() + limits::OUTBOX_BUSY
}

/// What is behind these locks is changed in single steps, so a panic leaves it whole.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
