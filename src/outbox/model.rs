//! Compares the outbox on real files with a model: a list of rows, and simple rules. After any
//! sequence of steps both have the same rows.
//!
//! There are two processes: the agent, which delivers, and the program, which adds rows. The model
//! has two states: the rows that the agent knows, and the rows in the file. When a process is
//! killed, the state of the file remains.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::time::UNIX_EPOCH;

use proptest::collection::vec;
use proptest::sample::{select, subsequence};
use proptest::strategy::{Just, Strategy};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use proptest::{prop_assert, prop_assert_eq, prop_oneof};
use tempfile::TempDir;

use super::tests::{fill_the_disk, free_the_disk, open_as};
use rusqlite::Connection;

use super::*;
use crate::delta::{LifecycleDelta, Operation, from_micros, micros};

const DAY: u64 = 24 * 3600;

/// One step of a test.
#[derive(Clone, Debug)]
enum Step {
    By(Who, Change),
    /// The agent makes these changes in one transaction.
    Group(Vec<Change>),
    /// The program is killed.
    ProgramDies,
    /// The agent is killed and starts again.
    AgentRestarts,
    /// The agent reads so many deltas that may be sent.
    Fetch(usize),
    /// The master answers so many of the deltas that were read last, from this index on.
    Answer(usize, usize, DeliveryResult),
    /// The last answer is recorded again.
    AnswerAgain,
    Maintain,
    Age(u64),
    /// The agent's file takes no more pages.
    Fill,
    Free,
    /// A third process has the file locked.
    Lock,
    Unlock,
    /// The file is deleted, and the program is killed.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Agent,
    Program,
}

/// A change by one of the processes. A number is the index of a row of the process, from the oldest
/// on, modulo their count.
#[derive(Clone, Debug)]
enum Change {
    Push(Vec<Ended>),
    /// On these deckies, repeated so many times.
    Begin(Operation, Vec<&'static str>, usize),
    End(usize, EndResult, SentBy),
    /// Adds deltas that the process sends itself.
    Claim(Vec<Ended>),
    /// Releases so many of the deltas that the process was to send itself.
    Release(usize, usize),
    /// The master answers so many of the deltas that the process has sent itself.
    Answer(usize, usize, DeliveryResult),
}

/// So many equal deltas.
#[derive(Clone, Debug)]
struct Ended(&'static str, Operation, EndResult, usize);

/// How an operation ended, and in which second since 1970.
#[derive(Clone, Copy, Debug)]
enum EndResult {
    Success(u64),
    Failure(u64),
    /// The error needs a page of its own.
    LongFailure(u64),
}

impl EndResult {
    fn delta(self, decky: &str, operation: Operation) -> LifecycleDelta {
        let (delta, second) = match self {
            Self::Success(second) => (LifecycleDelta::succeeded(decky, operation), second),
            Self::Failure(second) => (LifecycleDelta::failed(decky, operation, "why"), second),
            Self::LongFailure(second) => {
                (LifecycleDelta::failed(decky, operation, "why".repeat(600)), second)
            }
        };
        delta.completed_at(UNIX_EPOCH + Duration::from_secs(second))
    }
}

/// A row of the file, and of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    id: i64,
    decky: String,
    operation: Operation,
    error: Option<String>,
    completed_at: Option<i64>,
    rejected: Option<String>,
    owner: Option<String>,
    age: u64,
}

/// Stands for a time that only the outbox knows, because it has reported the operation failed.
const RECOVERED: i64 = -1;

impl Row {
    fn in_flight(decky: &str, operation: Operation, owner: &str) -> Self {
        let owner = Some(owner.to_owned());
        let decky = decky.to_owned();
        Self {
            id: 0,
            decky,
            operation,
            error: None,
            completed_at: None,
            rejected: None,
            owner,
            age: 0,
        }
    }

    fn ended(delta: &LifecycleDelta, owner: Option<&str>) -> Self {
        let mut row = Self::in_flight(delta.decky(), delta.operation(), "");
        row.end(delta, owner);
        row
    }

    fn end(&mut self, delta: &LifecycleDelta, owner: Option<&str>) {
        self.error = match delta.outcome() {
            crate::Outcome::Succeeded => None,
            crate::Outcome::Failed(error) => Some(error.clone()),
        };
        self.completed_at = Some(micros(delta.when()));
        self.owner = owner.map(str::to_owned);
    }

    fn waits(&self) -> bool {
        self.completed_at.is_some() && self.rejected.is_none()
    }

    fn queued(&self) -> QueuedDelta {
        let delta = match &self.error {
            None => LifecycleDelta::succeeded(&self.decky, self.operation),
            Some(error) => LifecycleDelta::failed(&self.decky, self.operation, error),
        };
        QueuedDelta {
            id: self.id,
            delta: delta.completed_at(from_micros(self.completed_at.unwrap())),
        }
    }
}

/// A state of the outbox, and the rules for its changes.
#[derive(Clone, Debug, Default)]
struct Model {
    /// The oldest first.
    rows: Vec<Row>,
    /// The highest id that a row has ever had.
    newest: i64,
    /// The number of deltas that were added, and those that left the outbox.
    pushed: u64,
    delivered: u64,
    rejected: u64,
    dropped: u64,
}

impl Model {
    /// The rows to drop for new ones: rejected rows first, then deltas, the oldest first. Rows with
    /// an owner are not dropped. `None`: there is no room.
    fn excess(&self, more: usize) -> Option<BTreeSet<i64>> {
        let excess = (self.rows.len() + more).saturating_sub(limits::OUTBOX_ROWS);
        let idle = || self.rows.iter().filter(|row| row.owner.is_none());
        let rejected = idle().filter(|row| row.rejected.is_some());
        let deltas = idle().filter(|row| row.rejected.is_none());
        let dropped_ids: BTreeSet<_> =
            rejected.chain(deltas).map(|row| row.id).take(excess).collect();
        (dropped_ids.len() == excess).then_some(dropped_ids)
    }

    /// Adds rows, and returns the number of dropped deltas.
    fn add(&mut self, first: i64, new: &[Row]) -> u64 {
        let dropped_ids = self.excess(new.len()).unwrap();
        let dropped = self.remove(&dropped_ids);
        self.dropped += dropped;
        self.pushed += new.iter().filter(|row| row.waits()).count() as u64;
        self.rows.extend((first..).zip(new).map(|(id, row)| Row { id, ..row.clone() }));
        self.rows.sort_by_key(|row| row.id);
        self.newest = self.newest.max(first + new.len() as i64 - 1);
        dropped
    }

    /// Removes rows, and returns the number of waiting ones among them.
    fn remove(&mut self, dropped_ids: &BTreeSet<i64>) -> u64 {
        let waited =
            self.rows.iter().filter(|row| row.waits() && dropped_ids.contains(&row.id)).count();
        self.rows.retain(|row| !dropped_ids.contains(&row.id));
        waited as u64
    }

    fn of(&mut self, ids: &BTreeSet<i64>) -> impl Iterator<Item = &mut Row> {
        self.rows.iter_mut().filter(|row| ids.contains(&row.id))
    }

    fn end(&mut self, id: i64, delta: &LifecycleDelta, owner: Option<&str>) {
        self.rows.iter_mut().filter(|row| row.id == id).for_each(|row| row.end(delta, owner));
        self.pushed += 1;
    }

    fn release(&mut self, ids: &BTreeSet<i64>) {
        self.of(ids).for_each(|row| row.owner = None);
    }

    fn answer(&mut self, ids: &BTreeSet<i64>, result: &DeliveryResult) {
        match result {
            DeliveryResult::Delivered => self.delivered += self.remove(ids),
            DeliveryResult::Rejected(reason) => {
                self.rejected += self.of(ids).filter(|row| row.waits()).count() as u64;
                for row in self.of(ids) {
                    row.rejected = Some(reason.clone());
                    row.owner = None;
                }
            }
        }
    }

    /// Operations of processes that are not running have failed, and the deltas that they were to
    /// send wait for delivery.
    fn recover(&mut self, running: &[&str], reason: &str) {
        let has_ended =
            |row: &&mut Row| row.owner.as_deref().is_some_and(|owner| !running.contains(&owner));
        for row in self.rows.iter_mut().filter(has_ended) {
            row.owner = None;
            if row.completed_at.is_none() {
                row.error = Some(format!("{reason}{}", row.operation));
                row.completed_at = Some(RECOVERED);
                self.pushed += 1;
            }
        }
    }

    /// Ages the rows without an owner, and drops those older than seven days. Returns the number of
    /// dropped deltas.
    fn age(&mut self, days: u64) -> u64 {
        self.rows
            .iter_mut()
            .filter(|row| row.owner.is_none())
            .for_each(|row| row.age += days * DAY);
        let old = self
            .rows
            .iter()
            .filter(|row| row.owner.is_none() && row.age > 7 * DAY)
            .map(|row| row.id)
            .collect();
        let dropped = self.remove(&old);
        self.dropped += dropped;
        dropped
    }

    /// The waiting rows that must not be sent: a row of the same decky and operation that is newer,
    /// or the row itself, has an owner.
    fn held(&self) -> BTreeSet<i64> {
        let of = |row: &Row| (row.decky.clone(), row.operation);
        let owned = self.rows.iter().filter(|row| row.owner.is_some());
        let newest: HashMap<_, _> = owned.map(|row| (of(row), row.id)).collect();
        let held = |row: &&Row| {
            row.owner.is_some() || newest.get(&of(row)).is_some_and(|newest| *newest > row.id)
        };
        self.rows.iter().filter(|row| row.waits()).filter(held).map(|row| row.id).collect()
    }

    fn deliverable(&self, most: usize) -> Vec<QueuedDelta> {
        let held = self.held();
        let free = self.rows.iter().rev().filter(|row| row.waits() && !held.contains(&row.id));
        free.take(most).map(Row::queued).collect()
    }

    fn waiting(&self) -> u64 {
        self.rows.iter().filter(|row| row.waits()).count() as u64
    }

    fn counts(&self) -> QueueCounts {
        QueueCounts {
            waiting: self.waiting(),
            held: self.held().len() as u64,
            operations: self.rows.iter().filter(|row| row.completed_at.is_none()).count() as u64,
            rejected: self.rows.iter().filter(|row| row.rejected.is_some()).count() as u64,
            oldest: self
                .rows
                .iter()
                .filter(|row| row.waits())
                .filter_map(|row| row.completed_at)
                .min(),
        }
    }

    /// Whether each delta is counted once.
    fn adds_up(&self) -> bool {
        self.pushed == self.delivered + self.rejected + self.dropped + self.waiting()
    }
}

/// A process with its outbox, and the rows that it owns.
struct Process {
    outbox: Outbox,
    /// Operations in flight.
    open: Vec<(i64, String, Operation)>,
    /// Deltas that it sends itself.
    ours: Vec<QueuedDelta>,
    /// The number of deltas that were dropped since its start.
    dropped: u64,
}

impl Process {
    fn start(dir: &Path, role: Role) -> Self {
        Self { outbox: open_as(dir, role), open: Vec::new(), ours: Vec::new(), dropped: 0 }
    }

    /// Ends one of its operations in the model, not in the outbox.
    fn end(
        &mut self,
        which: usize,
        end_result: EndResult,
        sent_by: SentBy,
        models: &mut [&mut Model],
    ) -> QueuedDelta {
        let (id, decky, operation) = self.open.remove(which % self.open.len());
        let delta = end_result.delta(&decky, operation);
        let owner =
            (sent_by == SentBy::ThisProcess).then_some(self.outbox.store.locks.token.as_str());
        models.iter_mut().for_each(|model| model.end(id, &delta, owner));
        let queued = QueuedDelta { id, delta };
        if sent_by == SentBy::ThisProcess {
            self.ours.push(queued.clone());
        }
        queued
    }
}

/// The range of `many` items from index `from` on, modulo their count.
fn range<T>(from: usize, many: usize, all: &[T]) -> std::ops::Range<usize> {
    let from = from % all.len().max(1);
    from..all.len().min(from + many)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Full,
    /// The number of further waits for the lock.
    Locked(u32),
    Removed,
}

struct Scenario {
    dir: TempDir,
    agent: Process,
    program: Option<Process>,
    /// The state that the agent knows.
    now: Model,
    /// The state of the file.
    file: Model,
    fault: Fault,
    /// A connection that has the file locked.
    other: Option<Connection>,
    fetched: Vec<QueuedDelta>,
    last_answer: Option<(Vec<QueuedDelta>, DeliveryResult)>,
    began: i64,
}

/// Whether a step has changed the outbox of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Changed {
    ByAgent,
    Otherwise,
}

impl Scenario {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = Process::start(dir.path(), Role::Deliver);
        Self {
            dir,
            agent,
            program: None,
            now: Model::default(),
            file: Model::default(),
            fault: Fault::None,
            other: None,
            fetched: Vec::new(),
            last_answer: None,
            began: micros(std::time::SystemTime::now()),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join(FILE)
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let changed = match step {
            Step::By(Who::Agent, change) => self.change_by_agent(change)?,
            Step::By(Who::Program, change) => self.change_by_program(change)?,
            Step::Group(changes) => self.group(changes)?,
            Step::ProgramDies => {
                self.program = None;
                Changed::Otherwise
            }
            Step::AgentRestarts => self.restart(),
            Step::Fetch(most) => {
                self.fetched = self.agent.outbox.deliverable(*most).unwrap();
                prop_assert_eq!(&self.fetched, &self.now.deliverable(*most));
                Changed::Otherwise
            }
            Step::Answer(from, many, result) => {
                let these = self.fetched.drain(range(*from, *many, &self.fetched)).collect();
                self.answer(these, result.clone())?
            }
            Step::AnswerAgain => match self.last_answer.take() {
                Some((these, result)) => self.answer(these, result)?,
                None => Changed::Otherwise,
            },
            Step::Maintain => self.maintain()?,
            Step::Age(days) => self.age(*days)?,
            Step::Fill if self.fault == Fault::None => {
                fill_the_disk(&mut self.agent.outbox);
                self.fault = Fault::Full;
                Changed::Otherwise
            }
            Step::Lock if self.fault == Fault::None => {
                let other = Connection::open(self.path()).unwrap();
                other.execute_batch("BEGIN IMMEDIATE").unwrap();
                self.other = Some(other);
                self.fault = Fault::Locked(2);
                Changed::Otherwise
            }
            Step::Remove if self.fault == Fault::None => {
                self.program = None;
                std::fs::remove_file(self.path()).unwrap();
                self.file = Model::default();
                self.fault = Fault::Removed;
                Changed::Otherwise
            }
            Step::Free if self.fault == Fault::Full => self.free(),
            Step::Unlock if matches!(self.fault, Fault::Locked(_)) => self.unlock(),
            Step::Fill | Step::Free | Step::Lock | Step::Unlock | Step::Remove => {
                Changed::Otherwise
            }
        };
        self.check(changed)
    }

    fn free(&mut self) -> Changed {
        free_the_disk(&mut self.agent.outbox);
        self.fault = Fault::None;
        Changed::Otherwise
    }

    fn unlock(&mut self) -> Changed {
        self.other = None;
        self.fault = Fault::None;
        Changed::Otherwise
    }

    /// Whether the agent may wait for the lock. Each wait takes a second, so a test has only a few.
    fn may_wait(&mut self) -> bool {
        match &mut self.fault {
            Fault::Locked(0) => false,
            Fault::Locked(times) => {
                *times -= 1;
                true
            }
            _ => true,
        }
    }

    fn change_by_agent(&mut self, change: &Change) -> Result<Changed, TestCaseError> {
        if !self.may_wait() {
            return Ok(Changed::Otherwise);
        }
        let before = self.now.waiting();
        let changed = make_change(change, &mut self.agent, &mut [&mut self.now], self.fault)?;
        if let (Change::Push(_), true) = (change, changed) {
            // The count is updated without reading the rows.
            let waiting = self.agent.outbox.stats().counts.waiting;
            prop_assert_eq!(waiting, self.now.waiting(), "it was {}", before);
        }
        Ok(if changed { Changed::ByAgent } else { Changed::Otherwise })
    }

    fn group(&mut self, changes: &[Change]) -> Result<Changed, TestCaseError> {
        if !self.may_wait() {
            return Ok(Changed::Otherwise);
        }
        let agent = &mut self.agent;
        let models = &mut [&mut self.now];
        let us = agent.outbox.store.locks.token.clone();
        let mut adds = Vec::new();
        for change in changes {
            match change {
                Change::Push(ended) => adds.push(NewRows::Deltas(deltas(ended), SentBy::Deliverer)),
                Change::Claim(ended) => {
                    adds.push(NewRows::Deltas(deltas(ended), SentBy::ThisProcess))
                }
                Change::Begin(operation, deckies, times) => {
                    let deckies = deckies.repeat(*times).into_iter().map(str::to_owned).collect();
                    adds.push(NewRows::Operation(*operation, deckies));
                }
                Change::End(which, end_result, sent_by) if !agent.open.is_empty() => {
                    let queued = agent.end(*which, *end_result, *sent_by, models);
                    agent.outbox.record_change(RowChange::Ended(vec![queued], *sent_by));
                }
                Change::End(..) | Change::Release(..) | Change::Answer(..) => (),
            }
        }
        let CommitResult { added: firsts, changed } = agent.outbox.commit(&adds, deadline());
        prop_assert!(is_reported_correctly(&changed, self.fault), "{:?}", changed);
        let new = agent.outbox.just_added(&adds, &firsts);
        for (first, add) in firsts.into_iter().zip(&adds) {
            let rows: Vec<_> = match add {
                NewRows::Deltas(deltas, sent_by) => {
                    let owner = (*sent_by == SentBy::ThisProcess).then_some(us.as_str());
                    deltas.iter().map(|delta| Row::ended(delta, owner)).collect()
                }
                NewRows::Operation(operation, deckies) => {
                    deckies.iter().map(|decky| Row::in_flight(decky, *operation, &us)).collect()
                }
            };
            match (&first, add) {
                (Ok(first), NewRows::Deltas(deltas, SentBy::ThisProcess)) => {
                    agent.ours.extend(
                        (*first..)
                            .zip(deltas)
                            .map(|(id, delta)| QueuedDelta { id, delta: delta.clone() }),
                    );
                }
                (Ok(first), NewRows::Operation(operation, deckies)) => {
                    agent.open.extend(
                        (*first..).zip(deckies).map(|(id, decky)| (id, decky.clone(), *operation)),
                    );
                }
                _ => (),
            }
            added(first, &rows, agent, models, self.fault)?;
        }
        // The deltas that are sent without a read are those that would be read.
        if let Some(new) = new {
            prop_assert_eq!(&new, &self.now.deliverable(usize::MAX));
        }
        Ok(Changed::ByAgent)
    }

    /// The program makes changes only while the agent has no fault. A full disk is simulated for
    /// the agent only.
    fn change_by_program(&mut self, change: &Change) -> Result<Changed, TestCaseError> {
        if matches!(self.fault, Fault::None | Fault::Full) {
            let program = self
                .program
                .get_or_insert_with(|| Process::start(self.dir.path(), Role::Contribute));
            make_change(change, program, &mut [&mut self.file, &mut self.now], Fault::None)?;
            prop_assert!(program.outbox.stats().on_disk);
            prop_assert_eq!(program.outbox.stats().dropped, program.dropped);
        }
        Ok(Changed::Otherwise)
    }

    fn restart(&mut self) -> Changed {
        self.unlock();
        let Self { dir, agent, program, .. } = self;
        let (outbox, _) =
            Outbox::open_at(&OutboxLocation::Memory, dir.path(), Role::Contribute).unwrap();
        // The old process ends before the new one starts.
        agent.outbox = outbox;
        *agent = Process::start(dir.path(), Role::Deliver);
        self.now = self.file.clone();
        self.now.recover(&running(program.as_ref()), "the agent restarted during ");
        self.fetched = Vec::new();
        self.last_answer = None;
        Changed::ByAgent
    }

    fn answer(
        &mut self,
        these: Vec<QueuedDelta>,
        result: DeliveryResult,
    ) -> Result<Changed, TestCaseError> {
        if these.is_empty() || !self.may_wait() {
            return Ok(Changed::Otherwise);
        }
        let done = self.agent.outbox.answer(&these, &result);
        prop_assert!(done.is_ok() || self.fault != Fault::None, "{:?}", done);
        prop_assert!(done.is_err() || !matches!(self.fault, Fault::Locked(_)));
        self.now.answer(&these.iter().map(|queued| queued.id).collect(), &result);
        self.last_answer = Some((these, result));
        Ok(Changed::ByAgent)
    }

    fn maintain(&mut self) -> Result<Changed, TestCaseError> {
        if !self.may_wait() {
            return Ok(Changed::Otherwise);
        }
        let maintained = self.agent.outbox.maintain();
        match self.fault {
            Fault::None => prop_assert!(maintained.is_ok(), "{:?}", maintained),
            Fault::Removed => {
                prop_assert!(maintained.is_ok(), "{:?}", maintained);
                self.fault = Fault::None;
            }
            Fault::Full | Fault::Locked(_) => (),
        }
        let mut running = running(self.program.as_ref());
        running.push(&self.agent.outbox.store.locks.token);
        self.now.recover(&running, "its process ended during ");
        Ok(Changed::ByAgent)
    }

    fn age(&mut self, days: u64) -> Result<Changed, TestCaseError> {
        if !self.may_wait() {
            return Ok(Changed::Otherwise);
        }
        let outbox = &mut self.agent.outbox;
        let aged = outbox.age_by(Duration::from_secs(days * DAY));
        prop_assert!(aged.is_ok(), "{:?}", aged);
        self.agent.dropped += self.now.age(days);
        Ok(Changed::ByAgent)
    }

    /// Compares the outbox and its file with the model.
    fn check(&mut self, changed: Changed) -> Result<(), TestCaseError> {
        let found = self.agent.outbox.store.read(rows).unwrap();
        self.copy_times(&found)?;
        let outbox = &mut self.agent.outbox;
        compare("the rows", &found, &self.now.rows)?;
        compare(
            "the deliverable",
            &outbox.deliverable(usize::MAX >> 1).unwrap(),
            &self.now.deliverable(usize::MAX),
        )?;
        // This reads every row.
        outbox.recount();
        let stats = outbox.stats();
        let on_disk = stats.on_disk;
        prop_assert_eq!(
            stats,
            OutboxStats { counts: self.now.counts(), dropped: self.agent.dropped, on_disk }
        );
        // A change by the agent creates a new file.
        if self.fault == Fault::Removed && self.path().exists() {
            self.fault = Fault::None;
        }
        match (self.fault, changed) {
            (Fault::None, Changed::ByAgent) => prop_assert!(on_disk),
            (Fault::Removed, _) => prop_assert!(!on_disk),
            _ => (),
        }
        if on_disk {
            self.file = self.now.clone();
        }
        match self.fault {
            Fault::Removed => prop_assert!(!self.path().exists()),
            _ => compare(
                "the file",
                &rows(&Connection::open(self.path()).unwrap()).unwrap(),
                &self.file.rows,
            )?,
        }
        prop_assert!(self.now.adds_up() && self.file.adds_up(), "{:?} {:?}", self.now, self.file);
        Ok(())
    }

    /// Copies the times of recovered operations, which only the outbox knows.
    fn copy_times(&mut self, found: &[Row]) -> Result<(), TestCaseError> {
        let until = micros(std::time::SystemTime::now());
        for row in self.now.rows.iter_mut().filter(|row| row.completed_at == Some(RECOVERED)) {
            row.completed_at =
                found.iter().find(|found| found.id == row.id).and_then(|found| found.completed_at);
            prop_assert!(
                row.completed_at.is_some_and(|at| (self.began..=until).contains(&at)),
                "{:?}",
                row
            );
        }
        Ok(())
    }

    /// Ends all faults. Then the file has all rows.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        for step in [Step::Free, Step::Unlock, Step::Maintain] {
            self.step(&step)?;
        }
        prop_assert!(self.agent.outbox.stats().on_disk);
        self.step(&Step::AgentRestarts)?;
        prop_assert_eq!(self.now.counts().operations, self.operations_of_the_program());
        Ok(())
    }

    fn operations_of_the_program(&self) -> u64 {
        self.program.as_ref().map_or(0, |program| program.open.len() as u64)
    }
}

fn running(program: Option<&Process>) -> Vec<&str> {
    program.map(|program| program.outbox.store.locks.token.as_str()).into_iter().collect()
}

fn deltas(ended: &[Ended]) -> Vec<LifecycleDelta> {
    let deltas = ended.iter().map(|Ended(decky, operation, end_result, times)| {
        std::iter::repeat_n(end_result.delta(decky, *operation), *times)
    });
    deltas.flatten().collect()
}

/// Whether the result of a change that is never lost reports correctly that it is on the disk.
fn is_reported_correctly(done: &Result<(), Error>, fault: Fault) -> bool {
    match fault {
        Fault::None | Fault::Removed => done.is_ok(),
        Fault::Locked(_) => done.is_err(),
        Fault::Full => true,
    }
}

/// Makes a change, in the outbox and in the model. Returns whether there was one to make.
fn make_change(
    change: &Change,
    process: &mut Process,
    models: &mut [&mut Model],
    fault: Fault,
) -> Result<bool, TestCaseError> {
    let us = process.outbox.store.locks.token.clone();
    let noted = |done| is_reported_correctly(&done, fault);
    match change {
        Change::Push(ended) => {
            let deltas = deltas(ended);
            let new: Vec<_> = deltas.iter().map(|delta| Row::ended(delta, None)).collect();
            let queued = process.outbox.push(&deltas);
            // The call does not return ids. They are the newest ones.
            let newest = "SELECT ifnull(max(id), 0) FROM delta";
            let newest: i64 =
                process.outbox.store.read(|db| db.query_row(newest, [], |row| row.get(0))).unwrap();
            let first = newest + 1 - new.len() as i64;
            added(queued.map(|()| first), &new, process, models, fault)?;
        }
        Change::Begin(operation, deckies, times) => {
            let deckies: Vec<_> = deckies.repeat(*times).into_iter().map(str::to_owned).collect();
            let new: Vec<_> =
                deckies.iter().map(|decky| Row::in_flight(decky, *operation, &us)).collect();
            let ids = process.outbox.begin(*operation, &deckies);
            if let Ok(ids) = &ids {
                prop_assert!(ids.iter().copied().eq((ids[0]..).take(deckies.len())), "{:?}", ids);
                let open =
                    ids.iter().zip(&deckies).map(|(id, decky)| (*id, decky.clone(), *operation));
                process.open.extend(open);
            }
            added(ids.map(|ids| ids[0]), &new, process, models, fault)?;
        }
        Change::Claim(ended) => {
            let deltas = deltas(ended);
            let new: Vec<_> = deltas.iter().map(|delta| Row::ended(delta, Some(&us))).collect();
            let queued = process.outbox.claim(deltas.clone());
            if let Ok(queued) = &queued {
                let expected =
                    (queued[0].id..).zip(deltas).map(|(id, delta)| QueuedDelta { id, delta });
                prop_assert!(queued.iter().cloned().eq(expected), "{:?}", queued);
                process.ours.extend_from_slice(queued);
            }
            added(queued.map(|queued| queued[0].id), &new, process, models, fault)?;
        }
        Change::End(which, end_result, sent_by) => {
            if process.open.is_empty() {
                return Ok(false);
            }
            let queued = process.end(*which, *end_result, *sent_by, models);
            let done = process.outbox.end(vec![queued], *sent_by);
            prop_assert!(noted(done));
        }
        Change::Release(from, many) => {
            let these: Vec<_> = process.ours.drain(range(*from, *many, &process.ours)).collect();
            if these.is_empty() {
                return Ok(false);
            }
            let done = process.outbox.release(&these);
            prop_assert!(noted(done));
            let ids = these.iter().map(|queued| queued.id).collect();
            models.iter_mut().for_each(|model| model.release(&ids));
        }
        Change::Answer(from, many, result) => {
            let these: Vec<_> = process.ours.drain(range(*from, *many, &process.ours)).collect();
            if these.is_empty() {
                return Ok(false);
            }
            let done = process.outbox.answer(&these, result);
            prop_assert!(noted(done));
            let ids = these.iter().map(|queued| queued.id).collect();
            models.iter_mut().for_each(|model| model.answer(&ids, result));
        }
    }
    Ok(true)
}

/// Checks the result of an addition, and adds the rows to the model.
fn added(
    first: Result<i64, Error>,
    new: &[Row],
    process: &mut Process,
    models: &mut [&mut Model],
    fault: Fault,
) -> Result<(), TestCaseError> {
    let fits = models[0].excess(new.len()).is_some();
    match first {
        Ok(first) => {
            prop_assert!(fits && !matches!(fault, Fault::Locked(_)));
            prop_assert!(
                first > models[0].newest,
                "{} is no newer than {}",
                first,
                models[0].newest
            );
            process.dropped += models[0].add(first, new);
            for model in &mut models[1..] {
                model.add(first, new);
            }
        }
        Err(error) => {
            let text = error.to_string();
            match fault {
                Fault::Locked(_) => {
                    prop_assert!(
                        text.ends_with("is locked by another process; nothing was queued"),
                        "{}",
                        text
                    )
                }
                _ => {
                    let no_room =
                        format!("has no room for {} more: its limit is 10000 rows, ", new.len());
                    prop_assert!(!fits && text.contains(&no_room), "{}", text);
                }
            }
        }
    }
    Ok(())
}

fn rows(db: &Connection) -> rusqlite::Result<Vec<Row>> {
    let sql = "SELECT id, decky, operation, error, completed_at, rejected, owner, age FROM delta ORDER BY id";
    let row = |row: &rusqlite::Row<'_>| {
        Ok(Row {
            id: row.get(0)?,
            decky: row.get(1)?,
            operation: row.get::<_, String>(2)?.parse().unwrap(),
            error: row.get(3)?,
            completed_at: row.get(4)?,
            rejected: row.get(5)?,
            owner: row.get(6)?,
            age: row.get::<_, i64>(7)?.unsigned_abs(),
        })
    };
    db.prepare_cached(sql)?.query_map([], row)?.collect()
}

/// Compares two lists. The error has only the first difference, because there may be 10,000 rows.
fn compare<T: Debug + PartialEq>(
    what: &str,
    found: &[T],
    expected: &[T],
) -> Result<(), TestCaseError> {
    let place = (0..found.len().max(expected.len()))
        .find(|place| found.get(*place) != expected.get(*place));
    let Some(place) = place else { return Ok(()) };
    let short = |item: Option<&T>| format!("{item:?}").chars().take(300).collect::<String>();
    let found_here = short(found.get(place));
    let expected_here = short(expected.get(place));
    Err(TestCaseError::fail(format!(
        "{what}: {} found, {} expected; item {place} is\n  {found_here}, not\n  {expected_here}",
        found.len(),
        expected.len()
    )))
}

/// Compares the outbox with the model for so many sequences of steps.
fn check_sequences(cases: u32, steps: impl Strategy<Value = Vec<Step>>) {
    let config =
        Config { cases, failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    let outcome = TestRunner::new(config).run(&steps, |steps| {
        let mut scenario = Scenario::new();
        for (place, step) in steps.iter().enumerate() {
            scenario.step(step).map_err(|why| {
                TestCaseError::fail(format!("after step {place}, {step:?}: {why}"))
            })?;
        }
        scenario.finish()
    });
    if let Err(TestError::Fail(why, steps)) = outcome {
        let steps: String = steps
            .iter()
            .enumerate()
            .map(|(place, step)| format!("{place:>3} {step:?}\n"))
            .collect();
        panic!("{why}\nThe shortest failing sequence:\n{steps}");
    }
    outcome.unwrap();
}

fn operation() -> impl Strategy<Value = Operation> {
    select(&[Operation::Deploy, Operation::Mutate][..])
}

fn short() -> impl Strategy<Value = EndResult> {
    prop_oneof![(0..99_u64).prop_map(EndResult::Success), (0..99_u64).prop_map(EndResult::Failure)]
}

fn end_result() -> impl Strategy<Value = EndResult> {
    prop_oneof![2 => short(), 1 => (0..99_u64).prop_map(EndResult::LongFailure)]
}

fn sent_by() -> impl Strategy<Value = SentBy> {
    prop_oneof![2 => Just(SentBy::Deliverer), 1 => Just(SentBy::ThisProcess)]
}

fn result() -> impl Strategy<Value = DeliveryResult> {
    prop_oneof![2 => Just(DeliveryResult::Delivered), 1 => Just(DeliveryResult::Rejected("no".to_owned()))]
}

fn deckies() -> impl Strategy<Value = Vec<&'static str>> {
    subsequence(&["a", "b", "c"][..], 1..=2)
}

fn ended(
    end_result: impl Strategy<Value = EndResult>,
    times: impl Strategy<Value = usize>,
) -> impl Strategy<Value = Ended> {
    let decky = select(&["a", "b", "c"][..]);
    (decky, operation(), end_result, times).prop_map(|(decky, operation, end_result, times)| {
        Ended(decky, operation, end_result, times)
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => vec(ended(end_result(), Just(1)), 1..4).prop_map(Change::Push),
        4 => (operation(), deckies()).prop_map(|(operation, deckies)| Change::Begin(operation, deckies, 1)),
        4 => (0..8_usize, end_result(), sent_by()).prop_map(|(which, end_result, sent_by)| Change::End(which, end_result, sent_by)),
        2 => vec(ended(end_result(), Just(1)), 1..4).prop_map(Change::Claim),
        1 => (0..8_usize, 1..4_usize).prop_map(|(from, many)| Change::Release(from, many)),
        1 => (0..8_usize, 1..4_usize, result()).prop_map(|(from, many, result)| Change::Answer(from, many, result)),
    ]
}

/// A step that needs no fault.
fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => change().prop_map(|change| Step::By(Who::Agent, change)),
        6 => change().prop_map(|change| Step::By(Who::Program, change)),
        5 => vec(change(), 2..6).prop_map(Step::Group),
        4 => (1..10_usize).prop_map(Step::Fetch),
        6 => (0..8_usize, 1..4_usize, result()).prop_map(|(from, many, result)| Step::Answer(from, many, result)),
        1 => Just(Step::AnswerAgain),
        3 => Just(Step::Maintain),
        2 => (1..4_u64).prop_map(Step::Age),
        1 => Just(Step::ProgramDies),
        1 => Just(Step::AgentRestarts),
    ]
}

#[test]
fn no_delta_is_lost_or_repeated() {
    let fault = prop_oneof![2 => Just(Step::Fill), 2 => Just(Step::Free), 1 => Just(Step::Remove)];
    check_sequences(96, vec(prop_oneof![8 => step().boxed(), 1 => fault.boxed()], 1..50));
}

/// There are few cases, because each wait takes a second.
#[test]
fn locked_file_refuses_only_additions() {
    let before = || vec(step(), 1..12);
    let locked = || vec(step(), 1..6);
    let steps = (before(), locked(), before()).prop_map(|(before, locked, after)| {
        [before, vec![Step::Lock], locked, vec![Step::Unlock], after].concat()
    });
    check_sequences(6, steps);
}

#[test]
fn row_limit_drops_the_oldest_rows() {
    let times = || prop_oneof![1 => 1..10_usize, 2 => 1_000..5_000_usize];
    let change = move || {
        prop_oneof![
            6 => vec(ended(short(), times()), 1..3).prop_map(Change::Push),
            1 => (operation(), deckies(), times()).prop_map(|(operation, deckies, times)| {
                Change::Begin(operation, deckies, times)
            }),
            1 => vec(ended(short(), times()), 1..2).prop_map(Change::Claim),
            1 => (0..8_usize, 1_000..5_000_usize).prop_map(|(from, many)| Change::Release(from, many)),
            1 => (0..8_usize, end_result(), sent_by()).prop_map(|(which, end_result, sent_by)| {
                Change::End(which, end_result, sent_by)
            }),
        ]
    };
    let answer = (0..5_000_usize, times(), result());
    let step = prop_oneof![
        6 => change().prop_map(|change| Step::By(Who::Agent, change)),
        2 => change().prop_map(|change| Step::By(Who::Program, change)),
        3 => vec(change(), 2..4).prop_map(Step::Group),
        2 => times().prop_map(Step::Fetch),
        2 => answer.prop_map(|(from, many, result)| Step::Answer(from, many, result)),
        1 => Just(Step::ProgramDies),
        1 => Just(Step::Maintain),
    ];
    check_sequences(6, vec(step, 4..12));
}
