//! The outbox: it stores each delta until the master has accepted it. This is the only writer of
//! `heartbeat.db`.
//!
//! - A commit is on the disk before it is acknowledged: WAL with `synchronous=FULL`.
//! - The file has mode 0600 from its creation, and so have `-wal` and `-shm`.
//! - One process at a time delivers from it and recovers rows. Every process may add rows.
//! - A row that is owned (an operation in flight, a delta that `push` sends itself) names its
//!   process. When that process ends, the row is recovered.
//! - Ids show the order: what began later has a higher id. While a newer operation is in flight,
//!   older deltas of its decky are held.
//! - If the file cannot be written, the outbox is degraded: it continues in memory, logs that, and
//!   writes to the file as soon as it can. Deltas that the master has answered are not sent again.
//! - Deltas that exceed the limits are dropped, counted and logged.
//!
//! An outbox is a value of the outbox thread. Its calls may block on the disk.

mod copy;
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
pub(crate) mod wake;

use std::collections::{BTreeSet, VecDeque};
use std::error::Error as StdError;
use std::mem;
#[cfg(feature = "cli")]
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

use crate::delta::micros;
use crate::error::Error;
use crate::files::{OUTBOX as FILE, absolute};
use crate::limits;
#[cfg(feature = "cli")]
pub(crate) use crate::outbox::queued::RowStates;
pub(crate) use crate::outbox::queued::{
    DeliveryResult, NewRows, QueueCounts, QueuedDelta, Role, RowChange, SentBy, StuckRow,
};
use file::FileProblem;
#[cfg(feature = "cli")]
pub(crate) use inspect::{OutboxSummary, summarize};
#[cfg(feature = "cli")]
pub(crate) use locks::deliverer;
use locks::{DeliveryLock, OwnerState};
use rows::{InsertedRows, Rows};
use store::Store;
#[cfg(feature = "cli")]
use wake::Waker;

/// Where the outbox is. It stores deltas until the master has accepted them.
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
    /// This file. A relative path refers to the current directory at the start.
    File(PathBuf),
    /// Memory. Undelivered deltas are lost when the process ends.
    Memory,
}

impl OutboxLocation {
    /// The path of the file; `None` for memory. It is absolute, so it does not depend on a later
    /// change of the current directory, and SQLite does not treat it as a special name like
    /// `:memory:`.
    pub(crate) fn path(&self, agent_dir: &Path) -> Option<PathBuf> {
        match self {
            Self::AgentDir => Some(absolute(&agent_dir.join(FILE))),
            Self::File(path) => Some(absolute(path)),
            Self::Memory => None,
        }
    }

    /// The location with an absolute path.
    pub(crate) fn absolute(self) -> Self {
        match self {
            Self::File(path) => Self::File(absolute(&path)),
            other => other,
        }
    }
}

/// The counters of an outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OutboxStats {
    pub(crate) counts: QueueCounts,
    /// The number of deltas that were dropped undelivered since the outbox was opened.
    pub(crate) dropped: u64,
    /// The file has all rows.
    pub(crate) on_disk: bool,
}

/// [`OutboxStats`] for other threads. Its lock is held only to copy or change a few fields.
#[derive(Debug, Default)]
pub(crate) struct SharedOutboxStats {
    counters: Mutex<Counters>,
    /// The heartbeat has stopped. Its outbox may still be writing.
    has_stopped: Arc<AtomicBool>,
    /// This process is to deliver, and another one does, as of the last count.
    is_standby: AtomicBool,
}

#[derive(Debug, Default)]
struct Counters {
    stats: OutboxStats,
    /// The number of deltas that the master has answered, but that still count as waiting.
    answered: u64,
}

impl SharedOutboxStats {
    /// Returns the counters, without the deltas that the master has answered.
    pub(crate) fn read(&self) -> OutboxStats {
        let counters = self.lock();
        let mut stats = counters.stats;
        stats.counts.waiting = stats.counts.waiting.saturating_sub(counters.answered);
        stats
    }

    pub(crate) fn record_stop(&self) {
        self.has_stopped.store(true, Ordering::Relaxed);
    }

    #[cfg(feature = "cli")]
    pub(crate) fn is_standby(&self) -> bool {
        self.is_standby.load(Ordering::Relaxed)
    }

    /// Records that the master has accepted or rejected so many deltas.
    pub(crate) fn record_answers(&self, deltas: u64) {
        self.lock().answered += deltas;
    }

    /// A panic cannot leave the counters inconsistent, because each change is a single step.
    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The result of one transaction.
#[derive(Debug)]
pub(crate) struct CommitResult {
    /// The id of the first row of each addition; those of its other rows follow it.
    pub(crate) added: Vec<Result<i64, Error>>,
    /// Whether all changes are in the file. After an error they are in memory.
    pub(crate) changed: Result<(), Error>,
}

/// The ids of the rows that were deleted last. A file that was missing for a time, or an older copy
/// of it, may still have these rows.
#[derive(Debug, Default)]
struct DeletedIds {
    ids: BTreeSet<i64>,
    /// The oldest deletion first.
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

    /// Removes the id of a new row.
    fn remove(&mut self, id: i64) {
        if self.ids.remove(&id) {
            self.order.retain(|deleted| *deleted != id);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Outbox {
    store: Store,
    role: Role,
    /// The lock file is not usable, which was logged.
    has_lock_problem: bool,
    /// Changes that are neither in the file nor in its copy.
    pending: Vec<RowChange>,
    /// The number of the master's answers that are stored, but not in the stats.
    answered: u64,
    deleted: DeletedIds,
    /// When rows of processes that have ended may be recovered.
    recovers_from: Instant,
    /// How long they are left in flight after this process has begun to deliver.
    resume_time: Duration,
    /// Until when the ages of the rows are stored.
    aged_at: Instant,
    /// When stuck rows were last logged.
    stuck_logged_at: Option<Instant>,
    /// The number of dropped deltas that were logged.
    dropped_logged: u64,
    /// The version of the file and its newest id, as of the last look for changes of others.
    seen_version: Option<(i64, i64)>,
    stats: Arc<SharedOutboxStats>,
}

impl Outbox {
    /// Opens an outbox. If the file cannot be used, the outbox is in memory, and the second value
    /// is the reason. In the process that delivers, the rows of processes that have ended are
    /// recovered.
    ///
    /// # Errors
    ///
    /// The role is [`Role::Deliver`], and another process delivers.
    pub(crate) fn open(
        path: Option<PathBuf>,
        role: Role,
        stats: Arc<SharedOutboxStats>,
    ) -> Result<(Self, Option<Error>), Error> {
        let mut outbox = Self {
            store: Store::new(path),
            role: if role == Role::Resume { Role::Deliver } else { role },
            has_lock_problem: false,
            pending: Vec::new(),
            answered: 0,
            deleted: DeletedIds::default(),
            recovers_from: Instant::now(),
            resume_time: if role == Role::Resume { limits::RESUME_TIME } else { Duration::ZERO },
            aged_at: Instant::now(),
            stuck_logged_at: None,
            dropped_logged: 0,
            seen_version: None,
            stats,
        };
        let opened = match outbox.acquire_delivery() {
            Ok(Some(held)) if role == Role::Deliver => return Err(held),
            Ok(held) => {
                if let Some(held) = held.filter(|_| role == Role::Resume) {
                    outbox.role = Role::DeliverLater;
                    let event = "another process delivers; deltas are added to its outbox, and no \
                                 beats are sent";
                    outbox.store.log_problem(Level::Info, event, &held);
                }
                outbox.open_file()
            }
            Err(error) => Err(error),
        };
        outbox.recovers_from += outbox.resume_time;
        if opened.is_ok() && outbox.delivers() {
            outbox.recover_or_log("the agent restarted during ");
        }
        outbox.recount();
        Ok((outbox, opened.err()))
    }

    /// Makes the [recorded](Self::record_change) changes and these additions in one transaction. If
    /// the file refuses it, it is made in memory. An addition is an error if another process has
    /// the file locked until `deadline`, or if there is no room for it.
    pub(crate) fn commit(&mut self, new_rows: &[NewRows], deadline: Instant) -> CommitResult {
        self.store.locks.is_token_used |= new_rows.iter().any(NewRows::is_owned);
        let (inserted, changed) = self.change(deadline, |rows, problem| match problem {
            Some(FileProblem::Locked) => Ok(Vec::new()),
            _ => new_rows.iter().map(|new| rows.add(new)).collect(),
        });
        let refused = |problem: &str, source: String| {
            new_rows.iter().map(|_| Err(self.store.error(problem, source.clone()))).collect()
        };
        let added = match inserted {
            Ok(inserted) if inserted.len() == new_rows.len() => inserted
                .into_iter()
                .zip(new_rows)
                .map(|(inserted, new)| self.record_added(inserted, new))
                .collect(),
            Ok(_) => {
                let source = changed.as_ref().err().and_then(StdError::source);
                let source = source.map(ToString::to_string).unwrap_or_default();
                refused("is locked by another process; nothing was queued", source)
            }
            Err(source) => refused("cannot queue anything", source.to_string()),
        };
        self.update_stats();
        if !self.delivers() {
            self.log_dropped();
        }
        CommitResult { added, changed }
    }

    fn record_added(
        &mut self,
        inserted: Option<InsertedRows>,
        new: &NewRows,
    ) -> Result<i64, Error> {
        let Some(InsertedRows { first, dropped }) = inserted else {
            return Err(self.error(&format!(
                "has no room for {} more: its limit is {} rows, and operations in flight are not \
                 dropped",
                new.rows(),
                limits::OUTBOX_ROWS
            )));
        };
        // A file with a damaged sequence may give the id of a deleted row again.
        for id in (first..).take(new.rows()) {
            self.deleted.remove(id);
        }
        let stats = &mut self.stats.lock().stats;
        stats.dropped += dropped;
        if let NewRows::Deltas(deltas, _) = new {
            let times = deltas.iter().map(|delta| micros(delta.when()));
            stats.counts.oldest = times.chain(stats.counts.oldest).min();
        }
        Ok(first)
    }

    /// Records a change for the next transaction. It is never lost.
    pub(crate) fn record_change(&mut self, change: RowChange) {
        match &change {
            RowChange::Answered(ids, DeliveryResult::Delivered) => {
                ids.iter().for_each(|id| self.deleted.insert(*id))
            }
            RowChange::Withdrawn(ids) => ids.clone().for_each(|id| self.deleted.insert(id)),
            #[cfg(feature = "cli")]
            RowChange::Claimed(_) => self.store.locks.is_token_used = true,
            RowChange::Ended(_, SentBy::ThisProcess) => self.store.locks.is_token_used = true,
            _ => (),
        }
        self.pending.push(change);
    }

    /// Makes the recorded changes and then this one, in one transaction: in the file, or in memory
    /// if the file refuses it. The second value is then the reason.
    fn change<T>(
        &mut self,
        deadline: Instant,
        change: impl Fn(&mut Rows<'_>, Option<FileProblem>) -> rusqlite::Result<T>,
    ) -> (rusqlite::Result<T>, Result<(), Error>) {
        let lock = self.store.lock_for_writing(deadline);
        // Rows are not written to a file that was replaced. A process that does not deliver looks
        // for a missing file only here.
        let needs_reopen = match self.role {
            Role::Contribute => self.store.needs_reopen(),
            _ => self.store.is_replaced(),
        };
        if lock.is_ok() && needs_reopen {
            self.reopen();
        }
        let Self { store, pending, .. } = self;
        let (result, failure) = store.change(lock, deadline, |rows, problem| {
            pending.iter().try_for_each(|change| rows.apply(change))?;
            change(rows, problem)
        });
        if result.is_ok() {
            self.answered += pending.drain(..).map(|change| change.answered()).sum::<u64>();
        }
        let in_memory = || Some(result.as_ref().err()?.to_string().into());
        let source = failure.map(|failure| failure.source).or_else(in_memory);
        let changed =
            source.map_or(Ok(()), |source| Err(self.store.error("cannot be written", source)));
        (result, changed)
    }

    /// Returns up to `count` deltas that may be sent and pass the filter, newest first, also those
    /// of other processes.
    pub(crate) fn read_deliverable(
        &mut self,
        count: usize,
        filter: impl Fn(&QueuedDelta) -> bool,
    ) -> Result<Vec<QueuedDelta>, Error> {
        if self.role == Role::DeliverLater {
            return Ok(Vec::new());
        }
        // The end of an operation is written before it is sent, if possible. Otherwise the next
        // start would report the operation again, as failed.
        if let Err(error) = self.write_pending() {
            self.store.log_problem(Level::Debug, "could not write before sending", &error);
        }
        let deleted = &self.deleted.ids;
        let mut returned = Vec::new();
        let deliverable = self.store.read(|db| {
            rows::deliverable(db, count, |queued| {
                let is_deleted = deleted.contains(&queued.id);
                if is_deleted {
                    returned.push(queued.id);
                }
                !is_deleted && filter(queued)
            })
        });
        // Rows that were deleted have returned with an older file. They are deleted once more,
        // unless that is pending.
        if !returned.is_empty() && self.pending.is_empty() {
            self.stats.record_answers(returned.len() as u64);
            self.record_change(RowChange::Answered(returned, DeliveryResult::Delivered));
        }
        deliverable
    }

    /// Whether a delta waits for delivery, held or not.
    pub(crate) fn is_waiting(&mut self, id: i64) -> Result<bool, Error> {
        self.store.read(|db| rows::is_waiting(db, id))
    }

    /// Whether a delta up to this id may be sent.
    pub(crate) fn has_deliverable_up_to(&mut self, id: i64) -> Result<bool, Error> {
        self.store.read(|db| rows::has_deliverable_up_to(db, id))
    }

    /// The id of the newest row.
    pub(crate) fn newest_id(&mut self) -> Result<i64, Error> {
        self.store.read(rows::newest_id)
    }

    /// Whether a newer delta of the same decky and operation must be sent first. The master would
    /// assign one of the two to the row of the other.
    #[cfg(feature = "cli")]
    pub(crate) fn is_overtaken(&mut self, queued: &QueuedDelta) -> Result<bool, Error> {
        self.store.read(|db| rows::is_overtaken(db, queued))
    }

    /// Whether another process has changed the file since the last call.
    pub(crate) fn was_changed_by_others(&mut self) -> bool {
        let version = self.store.read(|db| Ok((store::version(db)?, rows::newest_id(db)?))).ok();
        version.is_none() || mem::replace(&mut self.seen_version, version) != version
    }

    /// The path of the file, if this process delivers from it. The file may be missing for a time.
    pub(crate) fn delivered_file(&self) -> Option<&Path> {
        self.store.path.as_deref().filter(|_| self.delivers())
    }

    /// Connects to the process that delivers. `None`: none listens.
    #[cfg(feature = "cli")]
    pub(crate) fn connect_waker(&self) -> Option<Waker> {
        let path = self.store.path.as_deref()?;
        let error = match Waker::connect(path) {
            Ok(waker) => return Some(waker),
            Err(error) => error,
        };
        self.store.log_problem(Level::Debug, "no process listens at the wake socket", &error);
        None
    }

    /// Whether another process delivers, as far as this one knows.
    #[cfg(feature = "cli")]
    pub(crate) fn has_deliverer(&mut self) -> bool {
        let Some(path) = &self.store.path else { return false };
        // A process may have a lock file that cannot be used here.
        self.store.locks.refresh(path).is_err() || self.store.locks.another_delivers()
    }

    /// The states of the rows with these ids.
    #[cfg(feature = "cli")]
    pub(crate) fn row_states(&mut self, ids: Range<i64>) -> Result<RowStates, Error> {
        self.store.read(|db| rows::states(db, ids))
    }

    /// Runs before a beat in the process that delivers. Reopens the file if it is not at its path,
    /// recovers the rows of processes that have ended, drops rows that are too old, and writes the
    /// changes that are not in the file yet.
    pub(crate) fn maintain(&mut self) -> Result<(), Error> {
        if self.role == Role::Contribute {
            return Ok(());
        }
        self.check_file();
        let recovered = match self.delivers() {
            true => self.recover("its process ended during ").and_then(|()| self.age()),
            false => Ok(()),
        };
        let written = recovered.and_then(|()| self.write_pending());
        self.log_dropped();
        self.recount();
        written
    }

    /// Whether this process may own rows. It must then [maintain](Self::maintain_owned_rows) them.
    pub(crate) fn may_own_rows(&self) -> bool {
        self.store.path.is_some() && self.store.locks.is_token_used
    }

    /// Makes sure that other processes see that the owner of these rows is running, also if the
    /// files were replaced.
    pub(crate) fn maintain_owned_rows(&mut self) {
        self.check_file();
        let token = self.store.locks.token.clone();
        let owns_rows = self.store.read(|db| rows::has_owner(db, &token)).unwrap_or(true);
        self.store.locks.is_token_used = owns_rows || !self.pending.is_empty();
    }

    /// Lets another process deliver. Rows that are still added here wait for it. Tries once more to
    /// write what the file did not take, because there may be no other chance.
    pub(crate) fn stop_delivering(&mut self) -> Result<(), Error> {
        if let Some(refusal) = &mut self.store.refusal {
            refusal.retry_at = Instant::now();
        }
        self.store.lock_timeout = None;
        // A process that waits for delivery must not begin it now.
        if self.role != Role::DeliverLater {
            self.check_file();
        }
        let written = self.write_pending();
        self.store.locks.stop_delivering();
        self.role = Role::Contribute;
        self.recount();
        written
    }

    /// Writes what is only in memory, if there is a file.
    fn write_pending(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() && !self.store.is_unwritten() {
            return Ok(());
        }
        let deadline = self.store.lock_deadline();
        self.commit(&[], deadline).changed
    }

    /// Logs newly dropped deltas. The process that delivers does that with each beat, not with each
    /// push.
    fn log_dropped(&mut self) {
        let dropped = self.stats.read().dropped;
        let new = dropped - mem::replace(&mut self.dropped_logged, dropped);
        if new > 0 {
            self.store.log_with(
                Level::Error,
                "deltas dropped undelivered, too many or too old",
                format_args!("deltas={new} max_rows={}", limits::OUTBOX_ROWS),
            );
        }
    }

    fn check_file(&mut self) {
        let deadline = self.store.lock_deadline();
        match self.store.lock_for_writing(deadline) {
            Ok(_lock) => self.reopen(),
            Err(error) => {
                self.store.log_problem(Level::Debug, "outbox file not checked", &error);
            }
        }
    }

    /// Opens the file at its path, if it is not the open one. Begins to deliver if no other process
    /// does any more. The caller must have the write lock.
    fn reopen(&mut self) {
        let needs_reopen = self.store.needs_reopen();
        let had_file = self.store.file.is_some();
        let delivered = self.delivers();
        let opened = match self.acquire_delivery() {
            // Without any lock, rows in the file must not be recovered.
            Err(error) if delivered && !self.store.locks.delivers() => Err(error),
            acquired => {
                self.handle_lock_result(acquired);
                if needs_reopen { self.open_file() } else { Ok(()) }
            }
        };
        match opened {
            Err(error) if had_file && self.store.file.is_none() => self.store.log_problem(
                Level::Error,
                "outbox file cannot be reopened; deltas are in memory and do not survive a restart",
                &error,
            ),
            Err(error) => {
                self.store.log_problem(Level::Debug, "outbox file still not opened", &error);
            }
            Ok(()) if needs_reopen => self.store.log(Level::Error, "outbox file reopened"),
            Ok(()) => (),
        }
        if self.delivers() && !delivered {
            self.store.log(Level::Info, "delivery started");
            // The process that delivered may have been killed, and its agent may restart it.
            self.recovers_from = Instant::now() + self.resume_time;
            self.recover_or_log("its process ended during ");
        }
    }

    fn open_file(&mut self) -> Result<(), Error> {
        self.store.open(self.role, self.deleted.order.iter().copied())
    }

    /// Begins to deliver, if this is the role and no other process does. In any case the place of
    /// this process is locked. Returns an error inside `Ok` if another process delivers.
    fn acquire_delivery(&mut self) -> Result<Option<Error>, Error> {
        let Some(path) = &self.store.path else { return Ok(None) };
        let locks = &mut self.store.locks;
        let lock = match self.role {
            Role::Contribute => locks.ensure_locked(path).map(|()| None),
            _ => locks.acquire_delivery(path, &self.stats.has_stopped).map(Some),
        };
        match lock.map_err(|source| self.store.error("cannot be written", source))? {
            None => (),
            Some(DeliveryLock::Acquired) => self.role = Role::Deliver,
            Some(DeliveryLock::HeldByStopped) => self.deliver_later(),
            Some(DeliveryLock::HeldBy(pid)) => {
                return Ok(Some(self.error(&format!(
                    "process {pid} already delivers from it; stop that process, or use another file"
                ))));
            }
        }
        Ok(None)
    }

    fn deliver_later(&mut self) {
        self.store.locks.stop_delivering();
        self.role = Role::DeliverLater;
    }

    /// Stops delivering if the lock file was replaced and another process has locked the new one.
    /// If the new lock file cannot be used, delivery continues with the older one; this is logged
    /// once.
    fn handle_lock_result(&mut self, acquired: Result<Option<Error>, Error>) {
        let had_problem = mem::replace(&mut self.has_lock_problem, acquired.is_err());
        match acquired {
            Ok(Some(held)) if self.delivers() => {
                self.deliver_later();
                let event = "delivery stopped because another process delivers";
                self.store.log_problem(Level::Error, event, &held);
            }
            Err(error) if !had_problem => self.store.log_problem(
                Level::Error,
                "lock file of the outbox cannot be used; another process may deliver, too",
                &error,
            ),
            _ => (),
        }
    }

    fn recover_or_log(&mut self, reason: &str) {
        if let Err(error) = self.recover(reason) {
            let event = "could not recover operations in flight; trying again later";
            self.store.log_problem(Level::Warn, event, &error);
        }
    }

    /// Recovers the rows of processes that have ended. Their operations in flight are reported as
    /// failed, with `reason` and the operation as the error. Only rows in the file are recovered.
    fn recover(&mut self, reason: &str) -> Result<(), Error> {
        if Instant::now() < self.recovers_from {
            return Ok(());
        }
        let ended = self.owners_in_state(OwnerState::Ended)?;
        if ended.is_empty() {
            return Ok(());
        }
        let deadline = self.store.lock_deadline();
        let (recovered, _) = self.change(deadline, |rows, _| {
            ended.iter().try_fold(0, |sum, owner| rows.recover(owner, reason).map(|n| sum + n))
        });
        let operations =
            recovered.map_err(|source| self.store.error("cannot be recovered", source))?;
        let event = "operations of processes that have ended are reported failed";
        self.store.log_with(Level::Warn, event, format_args!("operations={operations}"));
        Ok(())
    }

    /// Updates the ages of the rows by the time that has passed, once it is long enough. The time
    /// in which this process was suspended is not counted, because it has not tried to deliver.
    fn age(&mut self) -> Result<(), Error> {
        let passed = self.aged_at.elapsed();
        if passed < limits::OUTBOX_AGING {
            return Ok(());
        }
        self.aged_at = Instant::now();
        self.age_by(passed.min(limits::OUTBOX_AGING * 2))
    }

    pub(crate) fn age_by(&mut self, passed: Duration) -> Result<(), Error> {
        let has_file = self.store.file.is_some();
        let unknown = self.owners_in_state(OwnerState::Unknown)?;
        let deadline = self.store.lock_deadline();
        let (aged, _) = self.change(deadline, |rows, problem| {
            // Rows of other processes are not changed in memory.
            if has_file && problem.is_none() {
                rows.age_owned(passed.as_secs(), &unknown)?;
            }
            rows.age_queued(passed.as_secs())
        });
        let dropped = aged.map_err(|source| self.store.error("cannot be read", source))?;
        self.stats.lock().stats.dropped += dropped;
        self.log_stuck()
    }

    /// Logs the stuck rows once a day.
    fn log_stuck(&mut self) -> Result<(), Error> {
        let stuck = self.store.read(rows::stuck)?;
        let was_logged = self.stuck_logged_at.is_some_and(|at| at.elapsed() < limits::OUTBOX_STUCK);
        if stuck.is_empty() || was_logged {
            return Ok(());
        }
        self.stuck_logged_at = Some(Instant::now());
        self.store.log_with(
            Level::Warn,
            "cannot determine whether the processes of these operations are running; they and \
             older deltas wait; check the lock file",
            format_args!("rows={} first={:?}", stuck.len(), StuckRow::list(&stuck)),
        );
        Ok(())
    }

    /// The other processes in this state that own rows, in the file and here.
    fn owners_in_state(&mut self, state: OwnerState) -> Result<Vec<Vec<u8>>, Error> {
        let Some(file) = &self.store.file else { return Ok(Vec::new()) };
        let in_file = rows::owners(&file.table.db)
            .map_err(|source| self.store.error("cannot be read", source))?;
        let mut owners = self.store.read(rows::owners)?;
        let locks = &self.store.locks;
        owners.retain(|owner| {
            in_file.contains(owner)
                && owner != locks.token.as_bytes()
                && locks.owner_state(owner) == state
        });
        Ok(owners)
    }

    pub(crate) fn delivers(&self) -> bool {
        self.role == Role::Deliver
    }

    /// Whether new rows would be lost: the outbox is in memory, and its heartbeat has stopped.
    pub(crate) fn is_closed(&self) -> bool {
        !self.delivers() && !self.store.is_on_disk()
    }

    /// Whether this process is to deliver and another one does.
    pub(crate) fn is_standby(&self) -> bool {
        self.role == Role::DeliverLater
    }

    /// Updates the stats from the row counts of the last transaction. The number of held deltas
    /// needs a read of all rows; it is exact if few deltas wait, and as of the last count
    /// otherwise.
    fn update_stats(&mut self) {
        let Some(rows) = self.store.row_counts() else { return self.recount() };
        let stats = self.stats.lock().stats;
        let counts = rows.update(stats.counts);
        if rows.may_hold() && counts.waiting <= limits::FEW_DELTAS {
            return self.recount();
        }
        // The process that delivers checks the path after the answers: see `verify_after_commit`.
        let was_on_disk = self.delivers() && stats.on_disk && !self.store.is_unwritten();
        let on_disk = if was_on_disk { self.pending.is_empty() } else { self.is_on_disk() };
        self.publish(OutboxStats { counts, on_disk, ..stats });
    }

    /// Updates the stats with a read of all rows. If they cannot be read, the counts stay as they
    /// are.
    pub(crate) fn recount(&mut self) {
        self.stats.is_standby.store(self.is_standby(), Ordering::Relaxed);
        let counts = self.store.read(rows::counts);
        let on_disk = self.is_on_disk();
        let stats = self.stats.lock().stats;
        self.publish(OutboxStats { counts: counts.unwrap_or(stats.counts), on_disk, ..stats });
    }

    fn publish(&mut self, stats: OutboxStats) {
        let mut counters = self.stats.lock();
        counters.stats = stats;
        counters.answered = counters.answered.saturating_sub(mem::take(&mut self.answered));
    }

    /// Runs before anything else: see [`Store::repair_index`].
    pub(crate) fn repair_index(&self) {
        self.store.repair_index();
    }

    /// Runs after the answers to a transaction. Checks whether the file is still at its path. Also
    /// reads once, because SQLite writes to `-shm` with the first read after a change; if the disk
    /// stopped answering before that, a later read would block.
    pub(crate) fn verify_after_commit(&mut self) {
        let mut on_disk = self.is_on_disk();
        // Rows that were written to a file that was replaced meanwhile are moved, too.
        if !on_disk && self.store.is_replaced() {
            self.check_file();
            on_disk = self.is_on_disk();
        }
        self.stats.lock().stats.on_disk = on_disk;
        // An error is reported by the next read that needs its result.
        let _ = self.newest_id();
    }

    /// Whether the file at its path has all rows and changes.
    fn is_on_disk(&self) -> bool {
        self.pending.is_empty() && self.store.is_on_disk()
    }

    /// The deltas that [`Self::read_deliverable`] would return, without a read, if they are few and
    /// were all added in the last transaction.
    pub(crate) fn just_added(
        &self,
        new_rows: &[NewRows],
        added: &[Result<i64, Error>],
    ) -> Option<Vec<QueuedDelta>> {
        let waiting = self.stats.lock().stats.counts.waiting;
        let may_hold = self.store.row_counts()?.may_hold();
        let are_few = (1..=limits::FEW_DELTAS).contains(&waiting);
        if !self.delivers() || !self.pending.is_empty() || may_hold || !are_few {
            return None;
        }
        let deltas = |(new, first): (&NewRows, &Result<i64, Error>)| match (new, first) {
            (NewRows::Deltas(deltas, _), Ok(first)) => (*first..).zip(deltas.clone()).collect(),
            _ => Vec::new(),
        };
        let added = new_rows.iter().zip(added).flat_map(deltas);
        let mut queued: Vec<_> = added.map(|(id, delta)| QueuedDelta { id, delta }).collect();
        queued.reverse();
        (queued.len() as u64 == waiting).then_some(queued)
    }

    /// The number of waiting deltas as of the last transaction.
    pub(crate) fn waiting(&self) -> u64 {
        self.stats.read().counts.waiting
    }

    pub(crate) fn error(&self, problem: &str) -> Error {
        Error::outbox(self.store.path.as_deref(), problem)
    }
}

/// Until when a caller waits for the outbox.
pub(crate) fn deadline() -> Instant {
    Instant::now() + limits::OUTBOX_BUSY
}
