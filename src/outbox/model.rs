//! The outbox on real files held against a model of it: a list of rows, and the rules said plainly. Whatever is done, in
//! whatever order, the two agree.
//!
//! There are two processes: the agent, which delivers, and the program, which adds. The model keeps two ledgers: what the
//! agent knows by now, and what the file knew last. Where a process dies, the file is what remains.

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

/// One thing that is done.
#[derive(Clone, Debug)]
enum Step {
    By(Who, Act),
    /// The agent does these in one transaction: what is to begin, to be pushed or to be posted itself, and what ends.
    Group(Vec<Act>),
    /// The program is killed.
    ProgramDies,
    /// The agent is killed and starts again.
    AgentRestarts,
    /// The agent asks for so many that may go out.
    Fetch(usize),
    /// The master answers, for so many of those that were fetched last, from this one on.
    Settle(usize, usize, DeliveryResult),
    /// The same again.
    SettleAgain,
    Tend,
    Age(u64),
    /// The agent's file takes no more pages.
    Fill,
    Free,
    /// A third process has the file locked.
    Lock,
    Unlock,
    /// The file is removed. The program dies, too.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Agent,
    Program,
}

/// What either process can do. A number says which of those it has, from the oldest on, and starts over at their end.
#[derive(Clone, Debug)]
enum Act {
    Push(Vec<Ended>),
    /// On these deckies, so many times over.
    Begin(Operation, Vec<&'static str>, usize),
    End(usize, Verdict, SentBy),
    /// To post these itself.
    Claim(Vec<Ended>),
    /// So many of those that it was to post itself.
    Release(usize, usize),
    /// So many of those that it posted itself, and the master has answered.
    Settle(usize, usize, DeliveryResult),
}

/// Deltas, so many that are the same.
#[derive(Clone, Debug)]
struct Ended(&'static str, Operation, Verdict, usize);

/// How an operation ended, and in which second since 1970.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    Success(u64),
    Failure(u64),
    /// With a text that needs a page of its own.
    LongFailure(u64),
}

impl Verdict {
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

/// Stands for a time that only the outbox knows: it said itself that the operation has failed.
const BY_ITSELF: i64 = -1;

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

    fn kept(&self) -> QueuedDelta {
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

/// The rules.
#[derive(Clone, Debug, Default)]
struct Ledger {
    /// From the oldest to the newest.
    rows: Vec<Row>,
    /// The highest id that a row has ever had.
    newest: i64,
    /// Deltas that came into being, and what became of them.
    pushed: u64,
    delivered: u64,
    rejected: u64,
    dropped: u64,
}

impl Ledger {
    /// Of those that nobody is at work on as many go as are too many: the rejected ones, and then the deltas, each from
    /// the oldest on.
    fn too_many(&self, more: usize) -> Option<BTreeSet<i64>> {
        let excess = (self.rows.len() + more).saturating_sub(limits::OUTBOX_ROWS);
        let idle = || self.rows.iter().filter(|row| row.owner.is_none());
        let rejected = idle().filter(|row| row.rejected.is_some());
        let deltas = idle().filter(|row| row.rejected.is_none());
        let gone: BTreeSet<_> = rejected.chain(deltas).map(|row| row.id).take(excess).collect();
        (gone.len() == excess).then_some(gone)
    }

    /// How many deltas fell out.
    fn add(&mut self, first: i64, new: &[Row]) -> u64 {
        let gone = self.too_many(new.len()).unwrap();
        let dropped = self.remove(&gone);
        self.dropped += dropped;
        self.pushed += new.iter().filter(|row| row.waits()).count() as u64;
        self.rows.extend((first..).zip(new).map(|(id, row)| Row { id, ..row.clone() }));
        self.rows.sort_by_key(|row| row.id);
        self.newest = self.newest.max(first + new.len() as i64 - 1);
        dropped
    }

    /// How many of them were waiting.
    fn remove(&mut self, gone: &BTreeSet<i64>) -> u64 {
        let waited = self.rows.iter().filter(|row| row.waits() && gone.contains(&row.id)).count();
        self.rows.retain(|row| !gone.contains(&row.id));
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

    fn settle(&mut self, ids: &BTreeSet<i64>, settled: &DeliveryResult) {
        match settled {
            DeliveryResult::Delivered => self.delivered += self.remove(ids),
            DeliveryResult::Rejected(reason) => {
                self.rejected += self.of(ids).filter(|row| row.waits()).count() as u64;
                self.of(ids)
                    .for_each(|row| (row.rejected, row.owner) = (Some(reason.clone()), None));
            }
        }
    }

    /// What was in flight in a process that has died has failed, and what it was to post waits for delivery.
    fn recover(&mut self, living: &[&str], reason: &str) {
        let dead =
            |row: &&mut Row| row.owner.as_deref().is_some_and(|owner| !living.contains(&owner));
        for row in self.rows.iter_mut().filter(dead) {
            row.owner = None;
            if row.completed_at.is_none() {
                (row.error, row.completed_at) =
                    (Some(format!("{reason}{}", row.operation)), Some(BY_ITSELF));
                self.pushed += 1;
            }
        }
    }

    /// What nobody is at work on grows older, and goes after seven days. How many deltas fell out.
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

    /// Somebody is at work on a newer row of the same decky and operation, or on this one.
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
        free.take(most).map(Row::kept).collect()
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

    /// Nothing is lost and nothing comes twice.
    fn adds_up(&self) -> bool {
        self.pushed == self.delivered + self.rejected + self.dropped + self.waiting()
    }
}

/// A process with its outbox, and what it is at work on.
struct Process {
    outbox: Outbox,
    /// Operations in flight.
    open: Vec<(i64, String, Operation)>,
    /// Deltas that it is to post itself.
    ours: Vec<QueuedDelta>,
    /// Deltas that fell out since it was started.
    dropped: u64,
}

impl Process {
    fn start(dir: &Path, role: Role) -> Self {
        Self { outbox: open_as(dir, role), open: Vec::new(), ours: Vec::new(), dropped: 0 }
    }

    /// Ends one of its operations, but for the outbox.
    fn end(
        &mut self,
        which: usize,
        verdict: Verdict,
        poster: SentBy,
        ledgers: &mut [&mut Ledger],
    ) -> QueuedDelta {
        let (id, decky, operation) = self.open.remove(which % self.open.len());
        let delta = verdict.delta(&decky, operation);
        let owner =
            (poster == SentBy::ThisProcess).then_some(self.outbox.store.locks.token.as_str());
        ledgers.iter_mut().for_each(|ledger| ledger.end(id, &delta, owner));
        let kept = QueuedDelta { id, delta };
        if poster == SentBy::ThisProcess {
            self.ours.push(kept.clone());
        }
        kept
    }
}

/// So many, from this one on.
fn some<T>(from: usize, many: usize, all: &[T]) -> std::ops::Range<usize> {
    let from = from % all.len().max(1);
    from..all.len().min(from + many)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    Full,
    /// How many more times it is waited for.
    Locked(u32),
    Removed,
}

struct Bench {
    dir: TempDir,
    agent: Process,
    program: Option<Process>,
    /// What the agent knows.
    now: Ledger,
    /// What the file knows.
    file: Ledger,
    trouble: Trouble,
    /// Has the file locked.
    other: Option<Connection>,
    fetched: Vec<QueuedDelta>,
    settled: Option<(Vec<QueuedDelta>, DeliveryResult)>,
    began: i64,
}

/// How a change to the outbox went: whether the agent made one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Changed {
    ByTheAgent,
    Otherwise,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = Process::start(dir.path(), Role::Deliver);
        Self {
            dir,
            agent,
            program: None,
            now: Ledger::default(),
            file: Ledger::default(),
            trouble: Trouble::None,
            other: None,
            fetched: Vec::new(),
            settled: None,
            began: micros(std::time::SystemTime::now()),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join(FILE)
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let changed = match step {
            Step::By(Who::Agent, act) => self.by_the_agent(act)?,
            Step::By(Who::Program, act) => self.by_the_program(act)?,
            Step::Group(acts) => self.group(acts)?,
            Step::ProgramDies => {
                self.program = None;
                Changed::Otherwise
            }
            Step::AgentRestarts => self.restart(),
            Step::Fetch(most) => {
                self.fetched = self.agent.outbox.deliverable(*most, deadline()).unwrap();
                prop_assert_eq!(&self.fetched, &self.now.deliverable(*most));
                Changed::Otherwise
            }
            Step::Settle(from, many, settled) => {
                let these = self.fetched.drain(some(*from, *many, &self.fetched)).collect();
                self.settle((these, settled.clone()))?
            }
            Step::SettleAgain => match self.settled.take() {
                Some(again) => self.settle(again)?,
                None => Changed::Otherwise,
            },
            Step::Tend => self.tend()?,
            Step::Age(days) => self.age(*days)?,
            Step::Fill if self.trouble == Trouble::None => {
                fill_the_disk(&mut self.agent.outbox);
                self.trouble = Trouble::Full;
                Changed::Otherwise
            }
            Step::Lock if self.trouble == Trouble::None => {
                let other = Connection::open(self.path()).unwrap();
                other.execute_batch("BEGIN IMMEDIATE").unwrap();
                (self.other, self.trouble) = (Some(other), Trouble::Locked(2));
                Changed::Otherwise
            }
            Step::Remove if self.trouble == Trouble::None => {
                self.program = None;
                std::fs::remove_file(self.path()).unwrap();
                (self.file, self.trouble) = (Ledger::default(), Trouble::Removed);
                Changed::Otherwise
            }
            Step::Free if self.trouble == Trouble::Full => self.free(),
            Step::Unlock if matches!(self.trouble, Trouble::Locked(_)) => self.unlock(),
            Step::Fill | Step::Free | Step::Lock | Step::Unlock | Step::Remove => {
                Changed::Otherwise
            }
        };
        self.check(changed)
    }

    fn free(&mut self) -> Changed {
        free_the_disk(&mut self.agent.outbox);
        self.trouble = Trouble::None;
        Changed::Otherwise
    }

    fn unlock(&mut self) -> Changed {
        (self.other, self.trouble) = (None, Trouble::None);
        Changed::Otherwise
    }

    /// Whether the agent can change anything now: it waits for a lock a second each time, and a test has not many.
    fn has_patience(&mut self) -> bool {
        match &mut self.trouble {
            Trouble::Locked(0) => false,
            Trouble::Locked(times) => {
                *times -= 1;
                true
            }
            _ => true,
        }
    }

    fn by_the_agent(&mut self, act: &Act) -> Result<Changed, TestCaseError> {
        if !self.has_patience() {
            return Ok(Changed::Otherwise);
        }
        let before = self.now.waiting();
        let changed = perform(act, &mut self.agent, &mut [&mut self.now], self.trouble)?;
        if let (Act::Push(_), true) = (act, changed) {
            // It is brought up to date without a look at the rows.
            let waiting = self.agent.outbox.books().counts.waiting;
            prop_assert_eq!(waiting, self.now.waiting(), "it was {}", before);
        }
        Ok(if changed { Changed::ByTheAgent } else { Changed::Otherwise })
    }

    fn group(&mut self, acts: &[Act]) -> Result<Changed, TestCaseError> {
        if !self.has_patience() {
            return Ok(Changed::Otherwise);
        }
        let (agent, ledgers) = (&mut self.agent, &mut [&mut self.now]);
        let us = agent.outbox.store.locks.token.clone();
        let mut adds = Vec::new();
        for act in acts {
            match act {
                Act::Push(ended) => adds.push(NewRows::Deltas(deltas(ended), SentBy::Deliverer)),
                Act::Claim(ended) => adds.push(NewRows::Deltas(deltas(ended), SentBy::ThisProcess)),
                Act::Begin(operation, deckies, times) => {
                    let deckies = deckies.repeat(*times).into_iter().map(str::to_owned).collect();
                    adds.push(NewRows::Operation(*operation, deckies));
                }
                Act::End(which, verdict, poster) if !agent.open.is_empty() => {
                    let kept = agent.end(*which, *verdict, *poster, ledgers);
                    agent.outbox.note(RowChange::Ended(vec![kept], *poster));
                }
                Act::End(..) | Act::Release(..) | Act::Settle(..) => (),
            }
        }
        let CommitResult { added: firsts, changed } = agent.outbox.commit(&adds, deadline());
        prop_assert!(is_as_it_must_be(&changed, self.trouble), "{:?}", changed);
        let new = agent.outbox.just_added(&adds, &firsts);
        for (first, add) in firsts.into_iter().zip(&adds) {
            let rows: Vec<_> = match add {
                NewRows::Deltas(deltas, poster) => {
                    let owner = (*poster == SentBy::ThisProcess).then_some(us.as_str());
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
            added(first, &rows, agent, ledgers, self.trouble)?;
        }
        // What is sent without being read is what would be read.
        if let Some(new) = new {
            prop_assert_eq!(&new, &self.now.deliverable(usize::MAX));
        }
        Ok(Changed::ByTheAgent)
    }

    /// It has no part in the agent's troubles: it waits until they are over, unless the disk is full for the agent alone.
    fn by_the_program(&mut self, act: &Act) -> Result<Changed, TestCaseError> {
        if matches!(self.trouble, Trouble::None | Trouble::Full) {
            let program = self
                .program
                .get_or_insert_with(|| Process::start(self.dir.path(), Role::Contribute));
            perform(act, program, &mut [&mut self.file, &mut self.now], Trouble::None)?;
            prop_assert!(program.outbox.books().on_disk);
            prop_assert_eq!(program.outbox.books().dropped, program.dropped);
        }
        Ok(Changed::Otherwise)
    }

    fn restart(&mut self) -> Changed {
        self.unlock();
        let Self { dir, agent, program, .. } = self;
        let (outbox, _) =
            Outbox::open_at(&OutboxLocation::Memory, dir.path(), Role::Contribute).unwrap();
        // Dead before it is started again.
        agent.outbox = outbox;
        *agent = Process::start(dir.path(), Role::Deliver);
        self.now = self.file.clone();
        self.now.recover(&living(program.as_ref()), "the agent restarted during ");
        (self.fetched, self.settled) = (Vec::new(), None);
        Changed::ByTheAgent
    }

    fn settle(
        &mut self,
        (these, settled): (Vec<QueuedDelta>, DeliveryResult),
    ) -> Result<Changed, TestCaseError> {
        if these.is_empty() || !self.has_patience() {
            return Ok(Changed::Otherwise);
        }
        let done = self.agent.outbox.settle(&these, &settled, deadline());
        prop_assert!(done.is_ok() || self.trouble != Trouble::None, "{:?}", done);
        prop_assert!(done.is_err() || !matches!(self.trouble, Trouble::Locked(_)));
        self.now.settle(&these.iter().map(|kept| kept.id).collect(), &settled);
        self.settled = Some((these, settled));
        Ok(Changed::ByTheAgent)
    }

    fn tend(&mut self) -> Result<Changed, TestCaseError> {
        if !self.has_patience() {
            return Ok(Changed::Otherwise);
        }
        let tended = self.agent.outbox.tend();
        match self.trouble {
            Trouble::None => prop_assert!(tended.is_ok(), "{:?}", tended),
            Trouble::Removed => {
                prop_assert!(tended.is_ok(), "{:?}", tended);
                self.trouble = Trouble::None;
            }
            Trouble::Full | Trouble::Locked(_) => (),
        }
        // On the disk or in memory.
        let mut living = living(self.program.as_ref());
        living.push(&self.agent.outbox.store.locks.token);
        self.now.recover(&living, "its process ended during ");
        Ok(Changed::ByTheAgent)
    }

    fn age(&mut self, days: u64) -> Result<Changed, TestCaseError> {
        if !self.has_patience() {
            return Ok(Changed::Otherwise);
        }
        let outbox = &mut self.agent.outbox;
        let aged = outbox.age_by(Duration::from_secs(days * DAY));
        prop_assert!(aged.is_ok(), "{:?}", aged);
        self.agent.dropped += self.now.age(days);
        Ok(Changed::ByTheAgent)
    }

    /// The outbox is what the model says, and so is its file.
    fn check(&mut self, changed: Changed) -> Result<(), TestCaseError> {
        let found = self.agent.outbox.store.read(rows).unwrap();
        self.learn_times(&found)?;
        let outbox = &mut self.agent.outbox;
        agree("the rows", &found, &self.now.rows)?;
        agree(
            "the deliverable",
            &outbox.deliverable(usize::MAX >> 1, deadline()).unwrap(),
            &self.now.deliverable(usize::MAX),
        )?;
        // What takes a look at every row.
        outbox.count();
        let books = outbox.books();
        let on_disk = books.on_disk;
        prop_assert_eq!(
            books,
            OutboxStats { counts: self.now.counts(), dropped: self.agent.dropped, on_disk }
        );
        // A change that the agent makes goes to a new file.
        if self.trouble == Trouble::Removed && self.path().exists() {
            self.trouble = Trouble::None;
        }
        match (self.trouble, changed) {
            (Trouble::None, Changed::ByTheAgent) => prop_assert!(on_disk),
            (Trouble::Removed, _) => prop_assert!(!on_disk),
            _ => (),
        }
        if on_disk {
            self.file = self.now.clone();
        }
        match self.trouble {
            Trouble::Removed => prop_assert!(!self.path().exists()),
            _ => agree(
                "the file",
                &rows(&Connection::open(self.path()).unwrap()).unwrap(),
                &self.file.rows,
            )?,
        }
        prop_assert!(self.now.adds_up() && self.file.adds_up(), "{:?} {:?}", self.now, self.file);
        Ok(())
    }

    /// When the outbox said by itself that something has failed, only it knows.
    fn learn_times(&mut self, found: &[Row]) -> Result<(), TestCaseError> {
        let until = micros(std::time::SystemTime::now());
        for row in self.now.rows.iter_mut().filter(|row| row.completed_at == Some(BY_ITSELF)) {
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

    /// All troubles pass, and the file has it all.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        for step in [Step::Free, Step::Unlock, Step::Tend] {
            self.step(&step)?;
        }
        prop_assert!(self.agent.outbox.books().on_disk);
        self.step(&Step::AgentRestarts)?;
        prop_assert_eq!(self.now.counts().operations, self.operations_of_the_program());
        Ok(())
    }

    fn operations_of_the_program(&self) -> u64 {
        self.program.as_ref().map_or(0, |program| program.open.len() as u64)
    }
}

fn living(program: Option<&Process>) -> Vec<&str> {
    program.map(|program| program.outbox.store.locks.token.as_str()).into_iter().collect()
}

fn deltas(ended: &[Ended]) -> Vec<LifecycleDelta> {
    let deltas = ended.iter().map(|Ended(decky, operation, verdict, times)| {
        std::iter::repeat_n(verdict.delta(decky, *operation), *times)
    });
    deltas.flatten().collect()
}

/// Whether a change that cannot be refused was told to be on the disk where it is.
fn is_as_it_must_be(done: &Result<(), Error>, trouble: Trouble) -> bool {
    match trouble {
        Trouble::None | Trouble::Removed => done.is_ok(),
        Trouble::Locked(_) => done.is_err(),
        Trouble::Full => true,
    }
}

/// Does it, here and in the ledgers. Whether there was anything to do.
fn perform(
    act: &Act,
    process: &mut Process,
    ledgers: &mut [&mut Ledger],
    trouble: Trouble,
) -> Result<bool, TestCaseError> {
    let us = process.outbox.store.locks.token.clone();
    let noted = |done| is_as_it_must_be(&done, trouble);
    match act {
        Act::Push(ended) => {
            let deltas = deltas(ended);
            let new: Vec<_> = deltas.iter().map(|delta| Row::ended(delta, None)).collect();
            let kept = process.outbox.keep(&deltas);
            // It says nothing of ids: they are the newest.
            let newest = "SELECT ifnull(max(id), 0) FROM delta";
            let newest: i64 =
                process.outbox.store.read(|db| db.query_row(newest, [], |row| row.get(0))).unwrap();
            let first = newest + 1 - new.len() as i64;
            added(kept.map(|()| first), &new, process, ledgers, trouble)?;
        }
        Act::Begin(operation, deckies, times) => {
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
            added(ids.map(|ids| ids[0]), &new, process, ledgers, trouble)?;
        }
        Act::Claim(ended) => {
            let deltas = deltas(ended);
            let new: Vec<_> = deltas.iter().map(|delta| Row::ended(delta, Some(&us))).collect();
            let kept = process.outbox.claim(deltas.clone());
            if let Ok(kept) = &kept {
                let expected =
                    (kept[0].id..).zip(deltas).map(|(id, delta)| QueuedDelta { id, delta });
                prop_assert!(kept.iter().cloned().eq(expected), "{:?}", kept);
                process.ours.extend_from_slice(kept);
            }
            added(kept.map(|kept| kept[0].id), &new, process, ledgers, trouble)?;
        }
        Act::End(which, verdict, poster) => {
            if process.open.is_empty() {
                return Ok(false);
            }
            let kept = process.end(*which, *verdict, *poster, ledgers);
            let done = process.outbox.end(vec![kept], *poster);
            prop_assert!(noted(done));
        }
        Act::Release(from, many) => {
            let these: Vec<_> = process.ours.drain(some(*from, *many, &process.ours)).collect();
            if these.is_empty() {
                return Ok(false);
            }
            let done = process.outbox.release(&these);
            prop_assert!(noted(done));
            let ids = these.iter().map(|kept| kept.id).collect();
            ledgers.iter_mut().for_each(|ledger| ledger.release(&ids));
        }
        Act::Settle(from, many, settled) => {
            let these: Vec<_> = process.ours.drain(some(*from, *many, &process.ours)).collect();
            if these.is_empty() {
                return Ok(false);
            }
            let done = process.outbox.settle(&these, settled, deadline());
            prop_assert!(noted(done));
            let ids = these.iter().map(|kept| kept.id).collect();
            ledgers.iter_mut().for_each(|ledger| ledger.settle(&ids, settled));
        }
    }
    Ok(true)
}

/// Rows were to be added, and `first` is the first one's id.
fn added(
    first: Result<i64, Error>,
    new: &[Row],
    process: &mut Process,
    ledgers: &mut [&mut Ledger],
    trouble: Trouble,
) -> Result<(), TestCaseError> {
    let fits = ledgers[0].too_many(new.len()).is_some();
    match first {
        Ok(first) => {
            prop_assert!(fits && !matches!(trouble, Trouble::Locked(_)));
            prop_assert!(
                first > ledgers[0].newest,
                "{} is no newer than {}",
                first,
                ledgers[0].newest
            );
            process.dropped += ledgers[0].add(first, new);
            for ledger in &mut ledgers[1..] {
                ledger.add(first, new);
            }
        }
        Err(error) => {
            let text = error.to_string();
            match trouble {
                Trouble::Locked(_) => {
                    prop_assert!(
                        text.ends_with("is locked by another process; nothing was kept"),
                        "{}",
                        text
                    )
                }
                _ => {
                    let no_room =
                        format!("has no room for {} more: it holds 10000 rows, ", new.len());
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

/// Says the first difference alone: there may be ten thousand rows.
fn agree<T: Debug + PartialEq>(
    what: &str,
    found: &[T],
    expected: &[T],
) -> Result<(), TestCaseError> {
    let place = (0..found.len().max(expected.len()))
        .find(|place| found.get(*place) != expected.get(*place));
    let Some(place) = place else { return Ok(()) };
    let short = |item: Option<&T>| format!("{item:?}").chars().take(300).collect::<String>();
    let (found_here, expected_here) = (short(found.get(place)), short(expected.get(place)));
    Err(TestCaseError::fail(format!(
        "{what}: {} found, {} expected; number {place} is\n  {found_here}, not\n  {expected_here}",
        found.len(),
        expected.len()
    )))
}

/// Holds the outbox against the model in so many sequences of steps.
fn hold(cases: u32, steps: impl Strategy<Value = Vec<Step>>) {
    let config =
        Config { cases, failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    let held = TestRunner::new(config).run(&steps, |steps| {
        let mut bench = Bench::new();
        for (place, step) in steps.iter().enumerate() {
            bench.step(step).map_err(|why| {
                TestCaseError::fail(format!("after step {place}, {step:?}: {why}"))
            })?;
        }
        bench.finish()
    });
    if let Err(TestError::Fail(why, steps)) = held {
        let steps: String = steps
            .iter()
            .enumerate()
            .map(|(place, step)| format!("{place:>3} {step:?}\n"))
            .collect();
        panic!("{why}\nThe shortest such sequence:\n{steps}");
    }
    held.unwrap();
}

fn operation() -> impl Strategy<Value = Operation> {
    select(&[Operation::Deploy, Operation::Mutate][..])
}

fn short() -> impl Strategy<Value = Verdict> {
    prop_oneof![(0..99_u64).prop_map(Verdict::Success), (0..99_u64).prop_map(Verdict::Failure)]
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![2 => short(), 1 => (0..99_u64).prop_map(Verdict::LongFailure)]
}

fn poster() -> impl Strategy<Value = SentBy> {
    prop_oneof![2 => Just(SentBy::Deliverer), 1 => Just(SentBy::ThisProcess)]
}

fn settled() -> impl Strategy<Value = DeliveryResult> {
    prop_oneof![2 => Just(DeliveryResult::Delivered), 1 => Just(DeliveryResult::Rejected("no".to_owned()))]
}

fn deckies() -> impl Strategy<Value = Vec<&'static str>> {
    subsequence(&["a", "b", "c"][..], 1..=2)
}

fn ended(
    verdict: impl Strategy<Value = Verdict>,
    times: impl Strategy<Value = usize>,
) -> impl Strategy<Value = Ended> {
    let decky = select(&["a", "b", "c"][..]);
    (decky, operation(), verdict, times)
        .prop_map(|(decky, operation, verdict, times)| Ended(decky, operation, verdict, times))
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => vec(ended(verdict(), Just(1)), 1..4).prop_map(Act::Push),
        4 => (operation(), deckies()).prop_map(|(operation, deckies)| Act::Begin(operation, deckies, 1)),
        4 => (0..8_usize, verdict(), poster()).prop_map(|(which, verdict, poster)| Act::End(which, verdict, poster)),
        2 => vec(ended(verdict(), Just(1)), 1..4).prop_map(Act::Claim),
        1 => (0..8_usize, 1..4_usize).prop_map(|(from, many)| Act::Release(from, many)),
        1 => (0..8_usize, 1..4_usize, settled()).prop_map(|(from, many, settled)| Act::Settle(from, many, settled)),
    ]
}

/// What befalls an outbox whose file can be had.
fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => act().prop_map(|act| Step::By(Who::Agent, act)),
        6 => act().prop_map(|act| Step::By(Who::Program, act)),
        5 => vec(act(), 2..6).prop_map(Step::Group),
        4 => (1..10_usize).prop_map(Step::Fetch),
        6 => (0..8_usize, 1..4_usize, settled()).prop_map(|(from, many, settled)| Step::Settle(from, many, settled)),
        1 => Just(Step::SettleAgain),
        3 => Just(Step::Tend),
        2 => (1..4_u64).prop_map(Step::Age),
        1 => Just(Step::ProgramDies),
        1 => Just(Step::AgentRestarts),
    ]
}

#[test]
fn nothing_is_lost_and_nothing_comes_twice() {
    let trouble =
        prop_oneof![2 => Just(Step::Fill), 2 => Just(Step::Free), 1 => Just(Step::Remove)];
    hold(96, vec(prop_oneof![8 => step().boxed(), 1 => trouble.boxed()], 1..50));
}

/// Few, since each wait takes a second.
#[test]
fn a_locked_file_changes_nothing_but_what_cannot_be_refused() {
    let before = || vec(step(), 1..12);
    let locked = || vec(step(), 1..6);
    let steps = (before(), locked(), before()).prop_map(|(before, locked, after)| {
        [before, vec![Step::Lock], locked, vec![Step::Unlock], after].concat()
    });
    hold(6, steps);
}

#[test]
fn what_is_too_much_falls_out_from_the_oldest_on() {
    let times = || prop_oneof![1 => 1..10_usize, 2 => 1_000..5_000_usize];
    let act = move || {
        prop_oneof![
            6 => vec(ended(short(), times()), 1..3).prop_map(Act::Push),
            1 => (operation(), deckies(), times()).prop_map(|(operation, deckies, times)| {
                Act::Begin(operation, deckies, times)
            }),
            1 => vec(ended(short(), times()), 1..2).prop_map(Act::Claim),
            1 => (0..8_usize, 1_000..5_000_usize).prop_map(|(from, many)| Act::Release(from, many)),
            1 => (0..8_usize, verdict(), poster()).prop_map(|(which, verdict, poster)| {
                Act::End(which, verdict, poster)
            }),
        ]
    };
    let settle = (0..5_000_usize, times(), settled());
    let step = prop_oneof![
        6 => act().prop_map(|act| Step::By(Who::Agent, act)),
        2 => act().prop_map(|act| Step::By(Who::Program, act)),
        3 => vec(act(), 2..4).prop_map(Step::Group),
        2 => times().prop_map(Step::Fetch),
        2 => settle.prop_map(|(from, many, settled)| Step::Settle(from, many, settled)),
        1 => Just(Step::ProgramDies),
        1 => Just(Step::Tend),
    ];
    hold(6, vec(step, 4..12));
}
