//! The only writer of `heartbeat.db`: a delta is in it from before `push` returns until the master has answered 2xx.
//!
//! - A commit is on the disk before it is acknowledged: WAL with `synchronous=FULL`.
//! - The file is its owner's alone (0600) from its first byte, and `-wal` and `-shm` take after it.
//! - One process at a time delivers from it and recovers it; any may add to it.
//! - A row that a process owns (an operation in flight, a delta that `push` posts itself) names that process,
//!   and comes free when it dies.
//! - It is an order of events: what began later has the higher id, and while a newer operation is in flight, older deltas
//!   of its decky are held back.
//! - Where the file cannot be written the outbox is in memory, says so, and goes to the file when it can. What the master
//!   has answered is never sent again meanwhile.
//! - What falls out of its bounds is counted and logged.
//!
//! A value of the outbox thread, which alone calls it: see [`crate::threads::outbox`]. Whatever here takes long delays what that
//! thread is asked for, and nothing else.

mod copy;
#[cfg(any(test, fuzzing))]
mod direct;
mod file;
#[cfg(feature = "cli")]
mod inspect;
mod locks;
#[cfg(test)]
#[cfg(feature = "cli")]
mod model;
pub(crate) mod queued;
#[cfg(feature = "cli")]
pub(crate) mod resume;
mod rows;
pub(crate) mod schema;
mod store;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::error::Error as StdError;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::delta::micros;
use crate::error::{Error, chain};
use crate::files::{OUTBOX as FILE, absolute};
use crate::limits;
pub(crate) use crate::outbox::queued::{
    DeliveryResult, NewRows, QueueCounts, QueuedDelta, RowChange, SentBy, UnjudgedRow,
};
use crate::panics::quietly;
use file::FileProblem;
#[cfg(feature = "cli")]
pub(crate) use inspect::{OutboxSummary, look};
#[cfg(feature = "cli")]
pub(crate) use locks::deliverer;
use locks::{Deliverer, Owner};
use rows::{InsertedRows, Rows};
use store::{MovedRows, Store};

/// Where deltas are kept until the master has them.
///
/// ```
/// use decnet_heartbeat::OutboxLocation;
///
/// # let (dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let file = dir.path().join("outbox.db");
/// let heartbeat = builder.outbox(OutboxLocation::File(file.clone())).start()?;
/// assert_eq!(heartbeat.stats().outbox.as_deref(), Some(file.as_path()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutboxLocation {
    /// `heartbeat.db` in the agent dir.
    #[default]
    AgentDir,
    /// This file. A relative path is of the folder in which the process is at the start.
    File(PathBuf),
    /// Memory: what is undelivered is lost when the process ends.
    Memory,
}

impl OutboxLocation {
    /// Its file; `None`: it is in memory. It stays the same where the process changes its folder later, and no name means
    /// anything to SQLite, as `:memory:` would.
    pub(crate) fn path(&self, agent_dir: &Path) -> Option<PathBuf> {
        match self {
            Self::AgentDir => Some(absolute(&agent_dir.join(FILE))),
            Self::File(path) => Some(absolute(path)),
            Self::Memory => None,
        }
    }

    /// The same place, wherever the process goes.
    pub(crate) fn absolute(self) -> Self {
        match self {
            Self::File(path) => Self::File(absolute(&path)),
            other => other,
        }
    }
}

/// What an outbox is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To deliver from it, and to recover what others left: one process at a time.
    Deliver,
    /// The same, as soon as nobody else does.
    DeliverLater,
    /// As `DeliverLater`. Rows of processes that have ended are judged only after
    /// [`limits::RESUME_TIME`]: until then this process may take them over.
    Resume,
    /// To add to it.
    #[cfg_attr(
        not(feature = "cli"),
        expect(dead_code, reason = "the program's `push` and `track` do")
    )]
    Contribute,
}

/// What the outbox knew of itself last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OutboxStats {
    /// As of the last look.
    pub(crate) counts: QueueCounts,
    /// Deltas that fell out undelivered, since the outbox was opened.
    pub(crate) dropped: u64,
    /// All of it is in its file.
    pub(crate) on_disk: bool,
}

/// [`OutboxStats`] that any thread may read. The lock is held to copy or to change a few fields, never longer.
#[derive(Debug, Default)]
pub(crate) struct SharedOutboxStats {
    /// With how many of the deltas that count as waiting the master has accepted or rejected.
    books: Mutex<(OutboxStats, u64)>,
    /// The heartbeat has stopped, and its outbox may have something to write down yet.
    has_stopped: Arc<AtomicBool>,
    /// This process is to deliver, and another one does, as of the last count.
    is_standby: AtomicBool,
}

impl SharedOutboxStats {
    /// Without what the master has accepted or rejected.
    pub(crate) fn read(&self) -> OutboxStats {
        let (mut books, settling) = *self.lock();
        books.counts.waiting = books.counts.waiting.saturating_sub(settling);
        books
    }

    pub(crate) fn note_stop(&self) {
        self.has_stopped.store(true, Ordering::Relaxed);
    }

    #[cfg(feature = "cli")]
    pub(crate) fn is_standby(&self) -> bool {
        self.is_standby.load(Ordering::Relaxed)
    }

    /// The master has accepted or rejected so many deltas.
    pub(crate) fn settle(&self, deltas: u64) {
        self.lock().1 += deltas;
    }

    fn change(&self, change: impl FnOnce(&mut OutboxStats)) {
        change(&mut self.lock().0);
    }

    /// New numbers, in which so many more answers of the master are.
    fn update(&self, settled: u64, update: impl FnOnce(&mut OutboxStats)) {
        let (books, settling) = &mut *self.lock();
        update(books);
        *settling = settling.saturating_sub(settled);
    }

    /// A panic leaves them whole, as they are changed in single steps.
    fn lock(&self) -> MutexGuard<'_, (OutboxStats, u64)> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has become of one transaction.
#[derive(Debug)]
pub(crate) struct CommitResult {
    /// The id of each addition's first row; the others follow it.
    pub(crate) added: Vec<Result<i64, Error>>,
    /// All changes are in the file, too; or why not. They are never lost before the process ends.
    pub(crate) changed: Result<(), Error>,
}

/// The ids of the rows that were deleted last. A file that was missing for a time, or an older copy of it, may still contain them.
#[derive(Debug, Default)]
struct DeletedIds {
    ids: BTreeSet<i64>,
    /// From the one that went first on.
    order: VecDeque<i64>,
}

impl DeletedIds {
    fn insert(&mut self, id: i64) {
        if self.ids.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > limits::OUTBOX_ROWS
            && let Some(first) = self.order.pop_front()
        {
            self.ids.remove(&first);
        }
    }

    /// A row of this id is there again.
    fn remove(&mut self, id: i64) {
        if self.ids.remove(&id) {
            self.order.retain(|gone| *gone != id);
        }
    }
}

/// Whether we deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    No,
    /// Another process does, and we do as soon as it has ended.
    Wanted,
    Yes,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    store: Store,
    delivery: Delivery,
    /// The lock file at its place cannot be used, which was logged.
    has_lock_problem: bool,
    /// Changes that are neither in the file nor in its copy yet.
    pending: Vec<RowChange>,
    /// Answers of the master that are not pending any more, and not in the books yet.
    settled: u64,
    gone: DeletedIds,
    /// When rows of processes that have ended may be judged.
    judges_from: Instant,
    /// Up to when the rows have been aged.
    aged: Instant,
    /// When rows were named last of which nobody can tell whether their owners run.
    said_stuck: Option<Instant>,
    /// How many of those that fell out have been logged.
    said: u64,
    /// For whoever wants to know without asking the disk.
    books: Arc<SharedOutboxStats>,
}

impl Outbox {
    /// Opens the outbox, or one in memory where the file cannot be used; the second value then says why. To deliver, it
    /// also takes over the rows of processes that have ended.
    ///
    /// # Errors
    ///
    /// It is to deliver, and another process does.
    pub(crate) fn open(
        path: Option<PathBuf>,
        role: Role,
        books: Arc<SharedOutboxStats>,
    ) -> Result<(Self, Option<Error>), Error> {
        let delivery = match role {
            Role::Deliver | Role::Resume => Delivery::Yes,
            Role::DeliverLater => Delivery::Wanted,
            Role::Contribute => Delivery::No,
        };
        let (store, pending, gone) = (Store::new(path), Vec::new(), DeletedIds::default());
        let mut outbox = Self {
            store,
            delivery,
            has_lock_problem: false,
            pending,
            settled: 0,
            gone,
            judges_from: Instant::now(),
            aged: Instant::now(),
            said_stuck: None,
            said: 0,
            books,
        };
        let opened = match outbox.take_delivery() {
            Ok(Some(held)) if role == Role::Deliver => return Err(held),
            Ok(held) => {
                if let Some(held) = held.filter(|_| role == Role::Resume) {
                    outbox.delivery = Delivery::Wanted;
                    let error = chain(&held);
                    quietly(|| {
                        log::info!(
                            "another process delivers; deltas are added to its outbox, and no \
                             beats are sent: error={error:?}"
                        )
                    });
                }
                outbox.open_file()
            }
            Err(error) => Err(error),
        };
        if role == Role::Resume {
            outbox.judges_from += limits::RESUME_TIME;
        }
        if opened.is_ok() {
            outbox.begin_to_deliver("the agent restarted during ");
        }
        outbox.count();
        Ok((outbox, opened.err()))
    }

    /// Makes all changes that were [noted](Self::note) and these additions in one transaction. Where the file refuses
    /// it, it is made in memory; only an addition that another process' lock stands in the way of is an error then. An
    /// addition without room fails alone. `by`: up to when such a lock is waited for.
    pub(crate) fn commit(&mut self, adds: &[NewRows], by: Instant) -> CommitResult {
        self.store.locks.is_named |= adds.iter().any(NewRows::is_owned);
        let (made, changed) = self.change(by, |rows, refusal| match refusal {
            Some(FileProblem::Locked) => Ok(Vec::new()),
            _ => adds.iter().map(|add| rows.add(add)).collect(),
        });
        let each = |error: &dyn Fn() -> Error| adds.iter().map(|_| Err(error())).collect();
        let added = match made {
            Ok(made) if made.len() == adds.len() => {
                made.into_iter().zip(adds).map(|(added, add)| self.added(added, add)).collect()
            }
            Ok(_) => each(&|| {
                let locked = self.error("is locked by another process; nothing was kept");
                let source = changed.as_ref().err().and_then(StdError::source);
                source.map(ToString::to_string).into_iter().fold(locked, Error::with_source)
            }),
            Err(source) => each(&|| self.store.error("cannot keep anything", source.to_string())),
        };
        self.note_tally();
        if !self.delivers() {
            self.say_dropped();
        }
        CommitResult { added, changed }
    }

    fn added(&mut self, added: Option<InsertedRows>, add: &NewRows) -> Result<i64, Error> {
        let Some(InsertedRows { first, dropped }) = added else {
            let (rows, most) = (add.rows(), limits::OUTBOX_ROWS);
            return Err(self.error(&format!(
                "has no room for {rows} more: it holds {most} rows, less what is in flight"
            )));
        };
        // A file whose sequence is damaged gives an id again, and its row must not pass for the one that is gone.
        for id in (first..).take(add.rows()) {
            self.gone.remove(id);
        }
        self.books.change(|books| {
            books.dropped += dropped;
            if let NewRows::Deltas(deltas, _) = add {
                let times = deltas.iter().map(|delta| micros(delta.when()));
                books.counts.oldest = times.chain(books.counts.oldest).min();
            }
        });
        Ok(first)
    }

    /// A change for the next transaction. It is never lost and cannot be refused.
    pub(crate) fn note(&mut self, change: RowChange) {
        match &change {
            RowChange::Answered(ids, DeliveryResult::Delivered) => {
                ids.iter().for_each(|id| self.gone.insert(*id))
            }
            RowChange::Withdrawn(ids) => ids.clone().for_each(|id| self.gone.insert(id)),
            RowChange::Ended(_, SentBy::ThisProcess) => self.store.locks.is_named = true,
            _ => (),
        }
        self.pending.push(change);
    }

    /// Makes a change after those that were noted, in one transaction on the disk, or in memory where the file refuses it. The
    /// second value says why it is not on the disk then.
    fn change<T>(
        &mut self,
        by: Instant,
        change: impl Fn(&mut Rows<'_>, Option<FileProblem>) -> rusqlite::Result<T>,
    ) -> (rusqlite::Result<T>, Result<(), Error>) {
        let turn = self.store.turn(by);
        // What would go to a file that nobody finds goes to the one that is there now. Who does not deliver has no other
        // moment to look for a file than its next change.
        let is_away = if self.delivery == Delivery::No {
            self.store.is_away()
        } else {
            self.store.is_replaced()
        };
        if turn.is_ok() && is_away {
            self.go_to_file();
        }
        let Self { store, pending, .. } = self;
        let (made, refused) = store.change(turn, by, |rows, refusal| {
            pending.iter().try_for_each(|change| rows.apply(change))?;
            change(rows, refusal)
        });
        if made.is_ok() {
            self.settled += pending.drain(..).map(|change| change.settled()).sum::<u64>();
        }
        let written = match (refused, &made) {
            (Some(refused), _) => Err(self.store.error("cannot be written", refused.source)),
            (None, Err(source)) => Err(self.store.error("cannot be written", source.to_string())),
            (None, Ok(_)) => Ok(()),
        };
        (made, written)
    }

    /// The deltas that may go out, newest first, other processes' among them. Those are held back that have a newer
    /// operation in flight.
    pub(crate) fn deliverable_where(
        &mut self,
        most: usize,
        wanted: Option<&dyn Fn(&QueuedDelta) -> bool>,
    ) -> Result<Vec<QueuedDelta>, Error> {
        if self.delivery == Delivery::Wanted {
            return Ok(Vec::new());
        }
        // Where it can be, what goes out is on the disk first: an operation's end that the master has heard of and the next
        // start has not would be reported a second time, and as a failure.
        if let Err(error) = self.write_down() {
            quietly(|| log::debug!("what goes out is not on the disk: error={:?}", chain(&error)));
        }
        let (gone, back) = (&self.gone.ids, RefCell::new(Vec::new()));
        let is_wanted = |kept: &QueuedDelta| match gone.contains(&kept.id) {
            true => {
                back.borrow_mut().push(kept.id);
                false
            }
            false => wanted.is_none_or(|wanted| wanted(kept)),
        };
        let found = self.store.read(|db| rows::deliverable(db, most, is_wanted));
        let back = back.into_inner();
        // Once: what is pending is tried again before the next look.
        if !back.is_empty() && self.pending.is_empty() {
            self.books.settle(back.len() as u64);
            self.note(RowChange::Answered(back, DeliveryResult::Delivered));
        }
        found.map_err(|source| self.store.error("cannot be read", source))
    }

    /// Whether a delta waits for delivery, held back or not.
    pub(crate) fn waits(&mut self, id: i64) -> Result<bool, Error> {
        self.read(|db| rows::waits(db, id))
    }

    /// Whether a delta up to this id may go out.
    pub(crate) fn delivers_up_to(&mut self, id: i64) -> Result<bool, Error> {
        self.read(|db| rows::delivers_up_to(db, id))
    }

    /// The id of the newest row.
    pub(crate) fn newest(&mut self) -> Result<i64, Error> {
        self.read(rows::newest)
    }

    /// Whether the master has to hear something newer of its decky and operation first, as it would give it this delta's row
    /// or this delta that one's.
    #[cfg(feature = "cli")]
    pub(crate) fn is_overtaken(&mut self, kept: &QueuedDelta) -> Result<bool, Error> {
        self.read(|db| rows::is_overtaken(db, kept))
    }

    fn read<T>(
        &mut self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        self.store.read(read).map_err(|source| self.store.error("cannot be read", source))
    }

    /// Runs before a beat in the process that delivers. Reopens the file if it is not at its path, takes over the rows of
    /// processes that have ended, drops rows that are too old, and writes the changes that are not in the file yet.
    pub(crate) fn tend(&mut self) -> Result<(), Error> {
        if self.delivery == Delivery::No {
            return Ok(());
        }
        self.look_for_file();
        let recovered = match self.delivers() {
            true => self.recover("its process ended during ").and_then(|()| self.age()),
            false => Ok(()),
        };
        let written = recovered.and_then(|()| self.write_down());
        self.say_dropped();
        self.count();
        written
    }

    /// Rows may name this process as their owner. It must [look after them](Self::look_after_rows) then.
    pub(crate) fn is_named(&self) -> bool {
        self.store.path.is_some() && self.store.locks.is_named
    }

    /// Makes sure that others see that the owner of our rows runs, also where the files were replaced.
    pub(crate) fn look_after_rows(&mut self) {
        self.look_for_file();
        let us = self.store.locks.token.clone();
        let is_named = self.store.read(|db| rows::owns(db, &us)).unwrap_or(true);
        self.store.locks.is_named = is_named || !self.pending.is_empty();
    }

    /// Lets another process deliver. What is still added here waits for it. The last chance for what the file did not take: it
    /// is tried once more, however fresh its refusal is.
    pub(crate) fn stop_delivering(&mut self) -> Result<(), Error> {
        if let Some((until, _)) = &mut self.store.refused {
            *until = Instant::now();
        }
        self.store.locked = None;
        // It begins nothing any more that it waits for.
        if !matches!(self.delivery, Delivery::Wanted) {
            self.look_for_file();
        }
        let written = self.write_down();
        self.store.locks.stop_delivering();
        self.delivery = Delivery::No;
        self.count();
        written
    }

    /// Moves what is in memory to the file, where there is one.
    fn write_down(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() && !self.store.is_unwritten() {
            return Ok(());
        }
        let by = self.store.patience();
        self.commit(&[], by).changed
    }

    /// Never silent, and not for each push: the process that delivers says it with the next beat.
    fn say_dropped(&mut self) {
        let (dropped, most) = (self.books.read().dropped, limits::OUTBOX_ROWS);
        let unsaid = dropped - mem::replace(&mut self.said, dropped);
        if unsaid > 0 {
            let outbox = self.store.name();
            quietly(|| {
                log::error!(
                    "deltas fell out of the outbox undelivered, too many or too old: outbox={outbox} deltas={unsaid} most={most}"
                )
            });
        }
    }

    fn look_for_file(&mut self) {
        let by = self.store.patience();
        match self.store.turn(by) {
            Ok(_turn) => self.go_to_file(),
            Err(error) => {
                let error = chain(&self.store.error("cannot be looked for", error));
                quietly(|| log::debug!("the outbox is left as it is: error={error:?}"));
            }
        }
    }

    /// Goes to the file at its place, if it is not there and that file can be had, and begins to deliver if nobody else does
    /// any more. Within a turn.
    fn go_to_file(&mut self) {
        let (is_away, had_file, delivered) =
            (self.store.is_away(), self.store.file.is_some(), self.delivers());
        let looked = match self.take_delivery() {
            // Without any lock we must not recover what is in the file.
            Err(error) if self.delivers() && !self.store.locks.delivers() => Err(error),
            taken => {
                self.note_lock(taken);
                if is_away { self.open_file() } else { Ok(()) }
            }
        };
        let outbox = self.store.name();
        match looked {
            Err(error) if had_file && self.store.file.is_none() => quietly(|| {
                log::error!(
                    "the outbox has lost its file, deltas are in memory and do not survive a restart: outbox={outbox} error={:?}",
                    chain(&error)
                )
            }),
            Err(error) => {
                quietly(|| log::debug!("the outbox has no file yet: error={:?}", chain(&error)))
            }
            Ok(()) if is_away => {
                quietly(|| log::error!("the outbox has a file again: outbox={outbox}"))
            }
            Ok(()) => (),
        }
        if self.delivers() && !delivered {
            quietly(|| log::info!("delivering from the outbox now: outbox={outbox}"));
            self.begin_to_deliver("its process ended during ");
        }
    }

    fn open_file(&mut self) -> Result<(), Error> {
        let by = self.store.patience();
        let _turn =
            self.store.turn(by).map_err(|source| self.store.error("cannot be opened", source))?;
        let share = match (self.delivers(), self.store.locks.another_delivers()) {
            (true, _) => MovedRows::Everything,
            (false, false) => MovedRows::OursAndUnowned,
            (false, true) => MovedRows::Ours,
        };
        self.store.open(self.gone.order.iter().copied(), share, by)
    }

    /// Begins to deliver, if we are to and nobody else does; our place is locked in any case. `Some`: another process does.
    fn take_delivery(&mut self) -> Result<Option<Error>, Error> {
        let Some(path) = &self.store.path else { return Ok(None) };
        if self.delivery == Delivery::No {
            let owned = self.store.locks.own(path);
            return owned
                .map(|()| None)
                .map_err(|source| self.store.error("cannot be written", source));
        }
        let deliverer = self.store.locks.deliver(path, &self.books.has_stopped);
        match deliverer.map_err(|source| self.store.error("cannot be written", source))? {
            Deliverer::Us => self.delivery = Delivery::Yes,
            Deliverer::Stopping => {
                self.store.locks.stop_delivering();
                self.delivery = Delivery::Wanted;
            }
            Deliverer::Another(pid) => {
                let problem = "is delivered from by process";
                return Ok(Some(self.error(&format!(
                    "{problem} {pid} already; stop that one, or use another file"
                ))));
            }
        }
        Ok(None)
    }

    /// Stops delivering, if another process does: the lock file was replaced, and it has locked the new one. With a lock file
    /// that cannot be used we go on with the older one, which is logged once.
    fn note_lock(&mut self, taken: Result<Option<Error>, Error>) {
        let had_problem = mem::replace(&mut self.has_lock_problem, taken.is_err());
        match taken {
            Ok(Some(held)) if self.delivers() => {
                self.store.locks.stop_delivering();
                self.delivery = Delivery::Wanted;
                let error = chain(&held);
                quietly(|| {
                    log::error!("stopped delivering, as another process does: error={error:?}")
                });
            }
            Err(error) if !had_problem => {
                let error = chain(&error);
                quietly(|| {
                    log::error!(
                        "the outbox has lost its lock file, another process may deliver, too: error={error:?}"
                    )
                });
            }
            _ => (),
        }
    }

    /// Takes over the rows of processes that have ended, if this process delivers.
    fn begin_to_deliver(&mut self, reason: &str) {
        if !self.delivers() {
            return;
        }
        if let Err(error) = self.recover(reason) {
            quietly(|| {
                log::warn!(
                    "operations that were in flight are recovered later: error={:?}",
                    chain(&error)
                )
            });
        }
    }

    /// Reports the operations of processes that have ended as failed, with `reason` and the operation's name. Their rows are in
    /// the file, and the locks beside it show whether a process is running.
    fn recover(&mut self, reason: &str) -> Result<(), Error> {
        if Instant::now() < self.judges_from {
            return Ok(());
        }
        let dead = self.owners_that_are(Owner::Ended)?;
        if dead.is_empty() {
            return Ok(());
        }
        let by = self.store.patience();
        let (recovered, _) = self.change(by, |rows, _| {
            dead.iter()
                .try_fold(0, |sum, owner| rows.recover(owner, reason).map(|count| sum + count))
        });
        let operations =
            recovered.map_err(|source| self.store.error("cannot be recovered", source))?;
        let outbox = self.store.name();
        quietly(|| {
            log::warn!(
                "the processes of operations in flight have died, these are reported failed: outbox={outbox} operations={operations}"
            )
        });
        Ok(())
    }

    /// Ages the rows by the time that has passed, when that is worth a change. A process that was stopped has not tried
    /// to deliver meanwhile, so no step is a long one.
    fn age(&mut self) -> Result<(), Error> {
        let passed = self.aged.elapsed();
        if passed < limits::OUTBOX_AGING {
            return Ok(());
        }
        self.aged = Instant::now();
        self.age_by(passed.min(limits::OUTBOX_AGING * 2))
    }

    fn age_by(&mut self, passed: Duration) -> Result<(), Error> {
        // Other processes' rows are never changed in memory.
        let (has_file, unknown) =
            (self.store.file.is_some(), self.owners_that_are(Owner::Unknown)?);
        let by = self.store.patience();
        let (aged, _) = self.change(by, |rows, refusal| {
            if has_file && refusal.is_none() {
                rows.grow_stuck(passed.as_secs(), &unknown)?;
            }
            rows.grow_older(passed.as_secs())
        });
        let dropped = aged.map_err(|source| self.store.error("cannot be read", source))?;
        self.books.change(|books| books.dropped += dropped);
        self.say_stuck()
    }

    /// Names, once a day, the rows of which nobody could tell for a day whether their owners run.
    fn say_stuck(&mut self) -> Result<(), Error> {
        let stuck = self.read(rows::stuck)?;
        if stuck.is_empty()
            || self.said_stuck.is_some_and(|said| said.elapsed() < limits::OUTBOX_STUCK)
        {
            return Ok(());
        }
        self.said_stuck = Some(Instant::now());
        let named: Vec<_> =
            stuck.iter().take(limits::OUTBOX_STUCK_NAMED).map(UnjudgedRow::to_string).collect();
        let (outbox, rows, named) = (self.store.name(), stuck.len(), named.join(", "));
        quietly(|| {
            log::warn!(
                "cannot tell whether the processes of these operations are running, they and older deltas wait; see to the lock file: outbox={outbox} rows={rows} first={named:?}"
            )
        });
        Ok(())
    }

    /// Other processes that rows name, in the file and here.
    fn owners_that_are(&mut self, wanted: Owner) -> Result<Vec<Vec<u8>>, Error> {
        let Some((file, _)) = &self.store.file else { return Ok(Vec::new()) };
        let in_file =
            rows::owners(&file.db).map_err(|source| self.store.error("cannot be read", source))?;
        let mut owners = self.read(rows::owners)?;
        let locks = &self.store.locks;
        let is_wanted =
            |owner: &[u8]| owner != locks.token.as_bytes() && locks.owner(owner) == wanted;
        owners.retain(|owner| in_file.contains(owner) && is_wanted(owner));
        Ok(owners)
    }

    pub(crate) fn delivers(&self) -> bool {
        self.delivery == Delivery::Yes
    }

    /// Nobody will ever deliver from it, and nothing outlives it: it is in memory, and its heartbeat has stopped.
    pub(crate) fn is_dead(&self) -> bool {
        !self.delivers() && !self.store.is_on_disk()
    }

    /// Brings the numbers up to date that are counted along. How many are held back takes a look at every row: it is exact
    /// where few wait, and as of the last look otherwise.
    fn note_tally(&mut self) {
        let Some(tally) = self.store.tally() else { return self.count() };
        let counts = tally.update(self.books.lock().0.counts);
        if tally.may_hold() && counts.waiting <= limits::FEW_DELTAS {
            return self.count();
        }
        // The process that delivers checks the path of the file after the answers: see `look_again`.
        let was_there =
            self.delivers() && self.books.lock().0.on_disk && !self.store.is_unwritten();
        let on_disk = if was_there { self.pending.is_empty() } else { self.is_on_disk() };
        let settled = mem::take(&mut self.settled);
        self.books.update(settled, |books| (books.counts, books.on_disk) = (counts, on_disk));
    }

    /// Brings all numbers up to date, with a look at every row. Where they cannot be read they stay as they were.
    pub(crate) fn count(&mut self) {
        self.books.is_standby.store(self.delivery == Delivery::Wanted, Ordering::Relaxed);
        let (counted, on_disk) = (self.store.read(rows::counts), self.is_on_disk());
        let settled = mem::take(&mut self.settled);
        self.books.update(settled, |books| {
            books.counts = counted.unwrap_or(books.counts);
            books.on_disk = on_disk;
        });
    }

    /// What is to be done before anything else: see [`Store::mend_index`].
    pub(crate) fn mend_index(&self) {
        self.store.mend_index();
    }

    /// Runs after the answers to a transaction. Checks whether the file is still at its path, and reads once: with the first read
    /// after a change SQLite writes to `-shm`. If the disk froze before that, a later read would block.
    pub(crate) fn look_again(&mut self) {
        let mut on_disk = self.is_on_disk();
        // What has just gone to a file that was replaced meanwhile is moved, too.
        if !on_disk && self.store.is_replaced() {
            self.look_for_file();
            on_disk = self.is_on_disk();
        }
        self.books.change(|books| books.on_disk = on_disk);
        // The next read that needs its result reports an error.
        let _ = self.newest();
    }

    /// All of it is in the file at its place.
    fn is_on_disk(&self) -> bool {
        self.pending.is_empty() && self.store.is_on_disk()
    }

    /// What was added in the last transaction, newest first, if it is little and nothing else may go out: what
    /// [`Self::deliverable_where`] would find, without reading it.
    pub(crate) fn just_added(
        &self,
        adds: &[NewRows],
        added: &[Result<i64, Error>],
    ) -> Option<Vec<QueuedDelta>> {
        let rows: usize = adds
            .iter()
            .zip(added)
            .filter(|(_, added)| added.is_ok())
            .map(|(add, _)| add.rows())
            .sum();
        let (few, waiting) = (1..=limits::FEW_DELTAS, self.books.lock().0.counts.waiting);
        let is_all =
            waiting == rows as u64 && !self.store.tally()?.may_hold() && self.pending.is_empty();
        if !is_all || !few.contains(&waiting) || !self.delivers() {
            return None;
        }
        let each = |(add, first): (&NewRows, &Result<i64, Error>)| match (add, first) {
            (NewRows::Deltas(deltas, _), Ok(first)) => (*first..).zip(deltas.clone()).collect(),
            _ => Vec::new(),
        };
        let new =
            adds.iter().zip(added).flat_map(each).map(|(id, delta)| QueuedDelta { id, delta });
        Some(new.collect::<Vec<_>>().into_iter().rev().collect())
    }

    /// Deltas that wait, as of the last transaction.
    pub(crate) fn waiting(&self) -> u64 {
        self.books.read().counts.waiting
    }

    pub(crate) fn error(&self, problem: &str) -> Error {
        Error::outbox(self.store.path.as_deref(), problem)
    }
}

/// Up to when the outbox is waited for at the most.
pub(crate) fn deadline() -> Instant {
    Instant::now() + limits::OUTBOX_BUSY
}
