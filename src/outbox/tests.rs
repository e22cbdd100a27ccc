//! Tests of the outbox with real files.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::*;
use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::error::chain;
use crate::files::{beside, identity};
use crate::sqlite::files::PARTS;

/// Each call is a transaction of its own.
impl Outbox {
    pub(super) fn open_at(
        location: &OutboxLocation,
        agent_dir: &Path,
        role: Role,
    ) -> Result<(Self, Option<Error>), Error> {
        Self::open(location.path(agent_dir), role, Arc::default())
    }

    pub(super) fn stats(&self) -> OutboxStats {
        self.stats.read()
    }

    /// The file; `None`: the outbox is in memory now.
    pub(super) fn path(&self) -> Option<&Path> {
        self.store.path.as_deref().filter(|_| self.stats().on_disk)
    }

    fn add(&mut self, new: NewRows) -> Result<i64, Error> {
        let added = self.commit(&[new], deadline()).added.remove(0);
        self.verify_after_commit();
        added
    }

    pub(super) fn push(&mut self, deltas: &[LifecycleDelta]) -> Result<(), Error> {
        self.add(NewRows::Deltas(deltas.to_vec(), SentBy::Deliverer)).map(drop)
    }

    #[cfg(feature = "cli")]
    pub(super) fn claim(&mut self, deltas: Vec<LifecycleDelta>) -> Result<Vec<QueuedDelta>, Error> {
        let first = self.add(NewRows::Deltas(deltas.clone(), SentBy::ThisProcess))?;
        Ok((first..).zip(deltas).map(|(id, delta)| QueuedDelta { id, delta }).collect())
    }

    pub(super) fn begin(
        &mut self,
        operation: Operation,
        deckies: &[String],
    ) -> Result<Vec<i64>, Error> {
        let first = self.add(NewRows::Operation(operation, deckies.to_vec()))?;
        Ok((first..).take(deckies.len()).collect())
    }

    pub(super) fn end(&mut self, ended: Vec<QueuedDelta>, sent_by: SentBy) -> Result<(), Error> {
        self.make(RowChange::Ended(ended, sent_by))
    }

    #[cfg(feature = "cli")]
    pub(super) fn release(&mut self, deltas: &[QueuedDelta]) -> Result<(), Error> {
        self.make(RowChange::Released(deltas.iter().map(|queued| queued.id).collect()))
    }

    /// Records the master's answer to these deltas.
    pub(super) fn answer(
        &mut self,
        deltas: &[QueuedDelta],
        result: &DeliveryResult,
    ) -> Result<(), Error> {
        let ids = deltas.iter().map(|queued| queued.id).collect();
        self.make(RowChange::Answered(ids, result.clone()))
    }

    fn make(&mut self, change: RowChange) -> Result<(), Error> {
        self.record_change(change);
        let changed = self.commit(&[], deadline()).changed;
        self.verify_after_commit();
        changed
    }

    pub(super) fn deliverable(&mut self, count: usize) -> Result<Vec<QueuedDelta>, Error> {
        let deliverable = self.read_deliverable(count, |_| true);
        self.recount();
        deliverable
    }
}

fn delta(decky: &str) -> LifecycleDelta {
    LifecycleDelta::failed(decky, Operation::Mutate, "why")
}

fn open(dir: &Path) -> Outbox {
    open_as(dir, Role::Deliver)
}

pub(super) fn open_as(dir: &Path, role: Role) -> Outbox {
    let (outbox, problem) = Outbox::open_at(&OutboxLocation::AgentDir, dir, role).unwrap();
    assert!(problem.is_none(), "{problem:?}");
    outbox
}

fn deckies(outbox: &mut Outbox) -> Vec<String> {
    outbox
        .deliverable(10)
        .unwrap()
        .into_iter()
        .map(|queued| queued.delta.decky().to_owned())
        .collect()
}

/// The numbers of waiting deltas, of held ones and of operations in flight.
fn counted(outbox: &mut Outbox) -> (u64, u64, u64) {
    outbox.recount();
    let QueueCounts { waiting, held, operations, .. } = outbox.stats().counts;
    (waiting, held, operations)
}

#[test]
fn sqlite_has_no_wal_reset_bug() {
    assert!(
        rusqlite::version_number() >= 3_051_003,
        "{}: a commit may get lost",
        rusqlite::version()
    );
}

#[test]
fn queued_deltas_survive_reopening_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let first = delta("first");
    let second = LifecycleDelta::succeeded("second", Operation::Deploy);
    open(dir.path()).push(&[first.clone(), second.clone()]).unwrap();
    let mut outbox = open(dir.path());
    assert_eq!(outbox.stats().counts.waiting, 2);
    let queued: Vec<_> =
        outbox.deliverable(10).unwrap().into_iter().map(|queued| queued.delta).collect();
    assert_eq!(queued, [second, first]);
}

#[test]
fn delivered_or_rejected_delta_is_not_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("a"), delta("b"), delta("c")]).unwrap();
    let queued = outbox.deliverable(10).unwrap();
    outbox.answer(&queued[..1], &DeliveryResult::Delivered).unwrap();
    outbox.answer(&queued[1..2], &DeliveryResult::Rejected("no".to_owned())).unwrap();
    assert_eq!(outbox.stats().counts.waiting, 1);
    drop(outbox);
    assert_eq!(deckies(&mut open(dir.path())), ["a"]);
}

#[test]
fn last_hundred_delivered_deltas_are_recorded_also_from_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let deliver = |outbox: &mut Outbox, names: std::ops::Range<usize>| {
        for n in names {
            outbox.push(&[delta(&format!("d{n}"))]).unwrap();
            let queued = outbox.deliverable(1).unwrap();
            let _ = outbox.answer(&queued, &DeliveryResult::Delivered);
        }
    };
    let remembered = || -> Vec<String> {
        let db = Connection::open(dir.path().join(FILE)).unwrap();
        let mut select = db.prepare("SELECT decky FROM delivered ORDER BY number").unwrap();
        select.query_map([], |row| row.get(0)).unwrap().collect::<rusqlite::Result<_>>().unwrap()
    };
    deliver(&mut outbox, 0..150);
    assert_eq!(remembered(), (50..150).map(|n| format!("d{n}")).collect::<Vec<_>>());
    fill_the_disk(&mut outbox);
    outbox.push(&[delta(&"x".repeat(5_000))]).unwrap();
    deliver(&mut outbox, 150..160);
    free_the_disk(&mut outbox);
    outbox.maintain().unwrap();
    assert_eq!(remembered().last().map(String::as_str), Some("d159"));
    deliver(&mut outbox, 160..161);
    assert_eq!(remembered(), (61..161).map(|n| format!("d{n}")).collect::<Vec<_>>());
}

#[test]
fn answers_while_the_file_is_locked_are_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("a"), delta("b"), delta("c")]).unwrap();
    let other = Connection::open(dir.path().join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let queued = outbox.deliverable(10).unwrap();
    let error = outbox.answer(&queued[..1], &DeliveryResult::Delivered).unwrap_err();
    assert!(error.to_string().ends_with("cannot be written"), "{error}");
    outbox.answer(&queued[1..2], &DeliveryResult::Rejected("no".to_owned())).unwrap_err();
    assert_eq!((deckies(&mut outbox), outbox.stats().counts.waiting), (vec!["a".to_owned()], 1));
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(deckies(&mut outbox), ["a"]);
    outbox.maintain().unwrap();
    assert_eq!(
        deckies(&mut open_as(dir.path(), Role::Contribute)),
        ["a"],
        "the file has the answers"
    );
}

#[test]
fn rows_of_another_process_are_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let mut ours = open(dir.path());
    let mut theirs = open_as(dir.path(), Role::Contribute);
    theirs.push(&[delta("theirs")]).unwrap();
    assert_eq!(deckies(&mut ours), ["theirs"]);
    assert_eq!(ours.stats().counts.waiting, 1);
}

#[test]
fn concurrent_creation_of_the_file_loses_no_delta() {
    for round in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let mut outboxes: Vec<_> = std::thread::scope(|scope| {
            let add = |n: usize| {
                let mut outbox =
                    open_as(dir.path(), if n == round { Role::Deliver } else { Role::Contribute });
                outbox.push(&[delta(&n.to_string())]).unwrap();
                outbox
            };
            let adding: Vec<_> = (0..8).map(|n| scope.spawn(move || add(n))).collect();
            adding.into_iter().map(|adding| adding.join().unwrap()).collect()
        });
        assert_eq!(deckies(&mut outboxes[0]).len(), 8);
        drop(outboxes);
        assert_eq!(deckies(&mut open(dir.path())).len(), 8);
    }
}

#[test]
fn files_have_mode_0600() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("a")]).unwrap();
    for name in ["heartbeat.db", "heartbeat.db-wal", "heartbeat.db-shm"] {
        let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn symlink_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    std::fs::write(&target, "").unwrap();
    std::os::unix::fs::symlink(&target, dir.path().join("heartbeat.db")).unwrap();
    let (outbox, problem) =
        Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver).unwrap();
    assert_eq!(outbox.path(), None);
    assert!(problem.unwrap().is_outbox());
    assert_eq!(std::fs::read(&target).unwrap(), b"");
}

/// The metadata of a file, without the time of the last read, and its content.
fn observed(path: &Path) -> Option<(String, Option<Vec<u8>>)> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::symlink_metadata(path).ok()?;
    let content = found.is_file().then(|| std::fs::read(path).unwrap());
    let of_file = (found.ino(), found.mode(), found.uid(), found.nlink());
    Some((format!("{of_file:?} {}.{:09}", found.ctime(), found.ctime_nsec()), content))
}

#[test]
fn special_file_is_an_error_and_unchanged() {
    type Make = fn(&Path, &Path);
    let makes: [(Make, &str); 5] = [
        (
            |path, other| std::os::unix::fs::symlink(other, path).unwrap(),
            "is a symlink, not a regular file",
        ),
        (|path, other| std::fs::hard_link(other, path).unwrap(), "has 2 hard links"),
        (
            |path, _| {
                assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success())
            },
            "is a FIFO, not a regular file",
        ),
        (|path, _| std::fs::create_dir(path).unwrap(), "is a directory, not a regular file"),
        (
            |path, _| drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
            "is a socket, not a regular file",
        ),
    ];
    for ((make, problem), part) in makes.iter().flat_map(|make| PARTS.map(|part| (make, part))) {
        for is_made in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(FILE);
            let other = dir.path().join("other");
            if is_made {
                open(dir.path()).push(&[delta("d")]).unwrap();
            }
            let place = beside(&path, part);
            let _ = std::fs::remove_file(&place);
            std::fs::write(&other, "").unwrap();
            std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o644)).unwrap();
            make(&place, &other);
            let state = || (observed(&place), observed(&other), observed(&path));
            let before = state();
            for role in [Role::Deliver, Role::Contribute] {
                let (outbox, refused) =
                    Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), role).unwrap();
                let refused = chain(&refused.unwrap());
                assert!(
                    refused.contains(&format!("heartbeat.db{part} {problem}")),
                    "{part} {role:?}: {refused}"
                );
                drop(outbox);
                assert_eq!(state(), before, "{part} {role:?}: {problem}");
            }
            #[cfg(feature = "cli")]
            if is_made {
                assert!(chain(&summarize(&path).unwrap_err()).contains(problem));
                assert_eq!(state(), before, "{part}: {problem}");
            }
        }
    }
}

#[test]
fn outbox_in_a_symlinked_folder_follows_the_symlink() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    let link = dir.path().join("link");
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    open(&link).push(&[delta("d")]).unwrap();
    #[cfg(feature = "cli")]
    assert_eq!(summarize(&link.join(FILE)).unwrap().map(|found| found.counts.waiting), Some(1));
    assert_eq!(deckies(&mut open(&real)), ["d"]);
    // Now the symlink has another target. All rows are moved there.
    let mut outbox = open(&link);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&other, &link).unwrap();
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    assert_eq!(on_disk(&other).len(), 1);
}

#[test]
fn path_is_absolute_and_never_a_special_name_of_sqlite() {
    for name in [":memory:", "file:x?mode=memory", "x"] {
        let here = std::env::current_dir().unwrap().join(name);
        let path = Some(here.clone());
        assert_eq!(OutboxLocation::File(name.into()).path(Path::new("")), path);
        assert_eq!(OutboxLocation::File(name.into()).absolute(), OutboxLocation::File(here));
    }
    let dir = tempfile::tempdir().unwrap();
    for name in [":memory:", "file:x", "file:y?mode=memory"] {
        let location = OutboxLocation::File(dir.path().join(name));
        let (mut outbox, problem) = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap();
        assert!(problem.is_none(), "{problem:?}");
        outbox.push(&[delta("d")]).unwrap();
        assert!(outbox.path().is_some() && dir.path().join(name).exists());
    }
}

#[test]
fn outbox_without_a_file_is_in_memory_and_returns_the_problem() {
    let deleted = OutboxLocation::File("/nonexistent/heartbeat.db".into());
    let (mut outbox, problem) = Outbox::open_at(&deleted, Path::new("/"), Role::Deliver).unwrap();
    assert_eq!(problem.unwrap().to_string(), "outbox /nonexistent/heartbeat.db: cannot be written");
    outbox.push(&[delta("a")]).unwrap();
    assert_eq!((deckies(&mut outbox), outbox.path()), (vec!["a".to_owned()], None));
}

fn succeeded(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Mutate)
}

fn begin(outbox: &mut Outbox, decky: &str) -> i64 {
    outbox.begin(Operation::Mutate, &[decky.to_owned()]).unwrap()[0]
}

fn ended(id: i64, delta: LifecycleDelta) -> Vec<QueuedDelta> {
    vec![QueuedDelta { id, delta }]
}

/// The rows on the disk, as another program sees them: decky, error, owned or not.
fn on_disk(dir: &Path) -> Vec<(String, Option<String>, bool)> {
    let database = Connection::open(dir.join(FILE)).unwrap();
    let mut select =
        database.prepare("SELECT decky, error, owner IS NOT NULL FROM delta ORDER BY id").unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

/// The connection to the file, or to the copy if there is no file.
fn connection(outbox: &mut Outbox) -> &mut Connection {
    let store = &mut outbox.store;
    if store.file.is_none() {
        return &mut store.refresh_copy().unwrap().db;
    }
    &mut store.file.as_mut().unwrap().table.db
}

/// Makes the file refuse every change, as a full disk does.
pub(super) fn fill_the_disk(outbox: &mut Outbox) -> i64 {
    let db = connection(outbox);
    let pages: i64 = db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| row.get(0)).unwrap()
}

pub(super) fn free_the_disk(outbox: &mut Outbox) {
    connection(outbox).query_row("PRAGMA max_page_count = 1000000", [], |_| Ok(())).unwrap();
    // The pause after the failed write is skipped.
    if let Some(refusal) = &mut outbox.store.refusal {
        refusal.retry_at = Instant::now();
    }
}

#[test]
fn older_delta_is_held_while_a_newer_operation_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d"), delta("other")]).unwrap();
    let id = begin(&mut outbox, "d");
    outbox.push(&[LifecycleDelta::succeeded("d", Operation::Deploy)]).unwrap();
    assert_eq!(deckies(&mut outbox), ["d", "other"], "the deploy of d, but not its mutate");
    assert_eq!(counted(&mut outbox), (3, 1, 1));
    outbox.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    let queued = outbox.deliverable(10).unwrap();
    let outcomes: Vec<_> = queued.iter().map(|queued| queued.delta.outcome().clone()).collect();
    let failed = || Outcome::Failed("why".to_owned());
    assert_eq!(outcomes, [Outcome::Succeeded, Outcome::Succeeded, failed(), failed()]);
    assert!(queued.is_sorted_by(|newer, older| newer.id > older.id) && queued[1].id == id);
}

#[test]
fn held_count_is_zero_once_no_row_is_owned() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d")]).unwrap();
    let id = begin(&mut outbox, "d");
    assert_eq!(counted(&mut outbox), (1, 1, 1));
    outbox.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    let QueueCounts { waiting, held, .. } = outbox.stats().counts;
    assert_eq!((waiting, held), (2, 0));
    let ids = outbox.deliverable(2).unwrap().into_iter().map(|queued| queued.id).collect();
    outbox.record_change(RowChange::Answered(ids, DeliveryResult::Delivered));
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!(outbox.stats().counts, QueueCounts::default());
}

#[test]
fn overlapping_operations_are_ordered_by_their_begin() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let first = begin(&mut outbox, "d");
    let second = begin(&mut outbox, "d");
    outbox.end(ended(first, delta("d")), SentBy::Deliverer).unwrap();
    assert!(deckies(&mut outbox).is_empty(), "the newer one is in flight");
    outbox.end(ended(second, succeeded("d")), SentBy::Deliverer).unwrap();
    let ids: Vec<_> = outbox.deliverable(10).unwrap().into_iter().map(|queued| queued.id).collect();
    assert_eq!(ids, [second, first]);
}

#[cfg(feature = "cli")]
#[test]
fn delta_is_overtaken_by_a_newer_one_of_the_same_decky_and_operation() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    let mut outbox = open(dir.path());
    let id = begin(&mut track, "d");
    let ours = QueuedDelta { id, delta: succeeded("d") };
    let mut overtaken = || track.is_overtaken(&ours).unwrap();
    outbox.push(&[delta("other"), LifecycleDelta::succeeded("d", Operation::Deploy)]).unwrap();
    assert!(
        !overtaken(),
        "a delta of another decky, or of another operation, does not overtake it"
    );
    outbox.push(&[delta("d")]).unwrap();
    assert!(overtaken(), "a waiting delta overtakes it");
    let waiting = outbox.deliverable(1).unwrap();
    outbox.answer(&waiting, &DeliveryResult::Rejected("no".to_owned())).unwrap();
    assert!(!overtaken(), "a rejected delta does not overtake it");
    begin(&mut outbox, "d");
    assert!(overtaken(), "an operation in flight overtakes it");
}

#[test]
fn operation_of_an_ended_process_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let mut theirs = open(dir.path());
    begin(&mut theirs, "d");
    // Its lock is released, as that of a killed process is.
    drop(theirs);
    let mut outbox = open(dir.path());
    let queued = outbox.deliverable(10).unwrap();
    assert_eq!(
        queued[0].delta.outcome(),
        &Outcome::Failed("the agent restarted during mutate".to_owned())
    );
    assert!(queued[0].delta.when().elapsed().unwrap() < Duration::from_secs(60));
    assert_eq!(counted(&mut outbox), (1, 0, 0));
}

#[test]
fn operation_of_a_running_process_is_not_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    begin(&mut track, "e");
    let mut outbox = open(dir.path());
    outbox.maintain().unwrap();
    assert_eq!(outbox.stats().counts.operations, 2);
    track.end(ended(id, succeeded("d")), SentBy::ThisProcess).unwrap();
    assert!(deckies(&mut outbox).is_empty(), "track sends it itself");
    drop(track);
    outbox.maintain().unwrap();
    let outcomes: Vec<_> = outbox
        .deliverable(10)
        .unwrap()
        .into_iter()
        .map(|queued| queued.delta.outcome().clone())
        .collect();
    let failed = Outcome::Failed("its process ended during mutate".to_owned());
    assert_eq!(
        outcomes,
        [failed, Outcome::Succeeded],
        "the one that it could not send is delivered here"
    );
}

/// The variable with the outbox that the other process locks. It runs this test program.
const LOCKED: &str = "DECNET_HEARTBEAT_TEST_LOCKED";

/// Not a test: the code of the other process.
#[test]
fn other_process() {
    let Some(outbox) = std::env::var_os(LOCKED) else { return };
    let mut locks = locks::Locks::new();
    assert_eq!(
        locks.acquire_delivery(Path::new(&outbox), &Arc::default()).unwrap(),
        DeliveryLock::Acquired
    );
    locks.is_token_used = true;
    // The test harness has written to the current line.
    writeln!(std::io::stdout(), "\n{}", locks.token).unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Another process. It has the delivery lock and the lock of an owner until its input ends or it is
/// killed.
pub(super) struct OtherProcess {
    child: std::process::Child,
    /// The owner of its rows.
    pub(super) token: String,
}

impl OtherProcess {
    pub(super) fn start(outbox: &Path) -> Self {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let command = command
            .args(["--exact", "outbox::tests::other_process", "--nocapture"])
            .env(LOCKED, outbox);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines().map(Result::unwrap);
        let token = lines.find(|line| line.contains('@')).unwrap();
        Self { child, token }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

#[test]
fn second_deliverer_gets_the_pid_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let other = OtherProcess::start(&dir.path().join(FILE));
    let error = Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver).unwrap_err();
    let expected = format!(
        "outbox {}: process {} already delivers from it; stop that process, or use another file",
        dir.path().join(FILE).display(),
        other.pid()
    );
    assert_eq!(error.to_string(), expected);
    drop(other);
    open(dir.path());
}

#[test]
fn wait_for_a_locked_file_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let other = Connection::open(dir.path().join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let since = Instant::now();
    let error = outbox.push(&[delta("d")]).unwrap_err().to_string();
    assert!(since.elapsed() < Duration::from_millis(1_500), "{:?}", since.elapsed());
    assert!(error.ends_with("is locked by another process; nothing was queued"), "{error}");
    let error = outbox.begin(Operation::Deploy, &["d".to_owned()]).unwrap_err();
    assert!(
        error.to_string().ends_with("is locked by another process; nothing was queued"),
        "{error}"
    );
    other.execute_batch("COMMIT").unwrap();
    outbox.push(&[delta("later")]).unwrap();
    assert_eq!(deckies(&mut outbox), ["later"], "what was refused was not queued");
}

#[test]
fn wait_for_a_locked_file_at_the_start_is_bounded_and_it_is_not_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).push(&[delta("d")]).unwrap();
    let other = Connection::open(dir.path().join(FILE)).unwrap();
    other
        .execute_batch(
            "PRAGMA locking_mode = exclusive; BEGIN IMMEDIATE; UPDATE delta SET age = age",
        )
        .unwrap();
    let since = Instant::now();
    let (mut outbox, problem) =
        Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver).unwrap();
    assert!(since.elapsed() < Duration::from_millis(1_500), "{:?}", since.elapsed());
    let problem = chain(&problem.unwrap());
    assert!(problem.contains("cannot be opened: database is locked"), "{problem}");
    outbox.push(&[delta("e")]).unwrap();
    assert_eq!(outbox.path(), None);
    drop(other);
    outbox.maintain().unwrap();
    assert_eq!(
        (deckies(&mut outbox), outbox.path().is_some()),
        (vec!["e".to_owned(), "d".to_owned()], true)
    );
}

#[test]
fn file_is_opened_while_another_process_writes() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let _other = lock_the_file(dir.path());
    let mut outbox = open_as(dir.path(), Role::Contribute);
    assert!(outbox.path().is_some());
    let error = outbox.push(&[delta("d")]).unwrap_err().to_string();
    assert!(error.ends_with("is locked by another process; nothing was queued"), "{error}");
}

#[test]
fn full_disk_degrades_the_outbox_until_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("before"), delta("delivered"), delta("rejected")]).unwrap();
    let id = begin(&mut outbox, "running");
    fill_the_disk(&mut outbox);
    let many: Vec<_> = (0..200).map(|n| delta(&format!("{n:0500}"))).collect();
    outbox.push(&many).unwrap();
    assert_eq!(outbox.path(), None, "not all rows are on the disk");
    outbox.end(ended(id, succeeded("running")), SentBy::Deliverer).unwrap_err();
    let queued = outbox.deliverable(500).unwrap();
    assert_eq!(queued.len(), 204);
    let of = |decky: &str| {
        queued.iter().filter(|queued| queued.delta.decky() == decky).cloned().collect::<Vec<_>>()
    };
    outbox.answer(&of("delivered"), &DeliveryResult::Delivered).unwrap_err();
    outbox.answer(&of("rejected"), &DeliveryResult::Rejected("no".to_owned())).unwrap_err();
    assert_eq!(outbox.deliverable(500).unwrap().len(), 202);
    assert_eq!(on_disk(dir.path()).len(), 4);
    free_the_disk(&mut outbox);
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    let before = outbox.deliverable(500).unwrap();
    drop(outbox);
    let mut outbox = open(dir.path());
    assert_eq!(outbox.deliverable(500).unwrap(), before);
    assert_eq!(before.len(), 202);
    assert!(before.windows(2).all(|pair| pair[0].id > pair[1].id));
    assert_eq!(before[201].delta.decky(), "before", "the order is unchanged");
}

#[test]
fn file_is_not_written_again_right_after_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    fill_the_disk(&mut outbox);
    let before = Instant::now();
    outbox.push(&[delta(&"d".repeat(5_000))]).unwrap();
    let refusal = outbox.store.refusal.unwrap();
    assert!(refusal.retry_at >= before + limits::OUTBOX_RETRY);
    assert_eq!(refusal.problem, FileProblem::Unwritable);
    free_the_disk(&mut outbox);
    let retry_at = Instant::now() + Duration::from_secs(60);
    outbox.store.refusal = Some(store::Refusal { retry_at, ..refusal });
    outbox.push(&[delta("e")]).unwrap();
    assert_eq!(outbox.path(), None);
    free_the_disk(&mut outbox);
    outbox.push(&[delta("f")]).unwrap();
    assert!(outbox.path().is_some());
}

#[test]
fn missing_file_is_opened_when_its_folder_exists() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("later").join(FILE);
    let location = OutboxLocation::File(path.clone());
    let (mut outbox, problem) = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap();
    assert!(problem.is_some());
    outbox.push(&[delta("d")]).unwrap();
    let id = begin(&mut outbox, "e");
    outbox.maintain().unwrap();
    assert_eq!(outbox.path(), None);
    std::fs::create_dir(dir.path().join("later")).unwrap();
    outbox.maintain().unwrap();
    assert_eq!(outbox.path(), Some(path.as_path()));
    outbox.end(ended(id, succeeded("e")), SentBy::Deliverer).unwrap();
    drop(outbox);
    let (mut outbox, problem) = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap();
    assert!(problem.is_none());
    assert_eq!(deckies(&mut outbox), ["e", "d"]);
}

#[test]
fn deleted_file_is_created_again_with_all_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d")]).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.recount();
    assert_eq!(outbox.path(), None, "no other process would find the rows there");
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.push(&[delta("e")]).unwrap();
    assert!(outbox.path().is_some(), "also with the next change");
    drop(outbox);
    assert_eq!(deckies(&mut open(dir.path())), ["e", "d"]);
}

#[test]
fn answers_while_the_file_is_missing_apply_when_it_returns() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    outbox.push(&["a", "b", "c"].map(delta)).unwrap();
    std::fs::rename(&agent, &elsewhere).unwrap();
    outbox.maintain().unwrap();
    assert_eq!(outbox.path(), None);
    let waiting = outbox.deliverable(3).unwrap();
    outbox.answer(&waiting[..1], &DeliveryResult::Delivered).unwrap();
    outbox.answer(&waiting[1..2], &DeliveryResult::Rejected("no".to_owned())).unwrap();
    outbox.push(&[delta("d")]).unwrap();
    std::fs::rename(&elsewhere, &agent).unwrap();
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    assert_eq!(deckies(&mut outbox), ["d", "a"]);
    drop(outbox);
    assert_eq!(deckies(&mut open(&agent)), ["d", "a"]);
    assert_eq!(on_disk(&agent).len(), 3, "the rejected row stays with its reason");
}

#[test]
fn rows_that_another_process_added_to_the_new_file_survive() {
    let dir = tempfile::tempdir().unwrap();
    let mut ours = open(dir.path());
    ours.push(&[delta("ours")]).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    let mut theirs = open_as(dir.path(), Role::Contribute);
    theirs.push(&[delta("theirs")]).unwrap();
    assert!(theirs.path().is_some(), "it is on the disk");
    ours.maintain().unwrap();
    assert_eq!(deckies(&mut ours), ["theirs", "ours"]);
}

#[test]
fn unusable_file_is_quarantined_unchanged() {
    let sql = |path: &Path, sql: &str| Connection::open(path).unwrap().execute_batch(sql).unwrap();
    let foreign = |path: &Path| sql(path, "CREATE TABLE theirs (a)");
    let text = |path: &Path| {
        std::fs::write(path, "not a database, and longer than a header is\n".repeat(9)).unwrap()
    };
    let damaged = |path: &Path| {
        let mut outbox =
            Outbox::open_at(&OutboxLocation::File(path.to_owned()), Path::new("/"), Role::Deliver)
                .unwrap()
                .0;
        (0..200).for_each(|n| outbox.push(&[delta(&format!("{n:0200}"))]).unwrap());
        drop(outbox);
        let mut bytes = std::fs::read(path).unwrap();
        bytes[4_096..].fill(0xa5);
        std::fs::write(path, bytes).unwrap();
    };
    let marked = |path: &Path| {
        sql(
            path,
            "CREATE TABLE theirs (a); PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2",
        );
    };
    let version_1 = |path: &Path| sql(path, "CREATE TABLE delta (id); PRAGMA user_version = 1");
    let with_byte_of = |path: &Path, at: usize, byte| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] = byte;
        std::fs::write(path, bytes).unwrap();
    };
    let with_byte = |path: &Path, at: usize, byte| {
        drop(
            Outbox::open_at(&OutboxLocation::File(path.to_owned()), Path::new("/"), Role::Deliver)
                .unwrap(),
        );
        with_byte_of(path, at, byte);
    };
    // One page of many is damaged.
    let one_page = |path: &Path| {
        let rows: Vec<_> = (0..200).map(|n| delta(&format!("{n:0200}"))).collect();
        open(path.parent().unwrap()).push(&rows).unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        let page = bytes.len() / 4_096 / 2 * 4_096;
        bytes[page..page + 4_096].iter_mut().for_each(|byte| *byte = !*byte);
        std::fs::write(path, bytes).unwrap();
    };
    let later_version = |path: &Path| {
        open(path.parent().unwrap()).push(&[delta("later")]).unwrap();
        sql(path, &format!("PRAGMA user_version = {}", schema::VERSION + 1));
    };
    let later_format = |path: &Path| with_byte(path, 47, 5);
    let no_encoding = |path: &Path| with_byte(path, 59, 4);
    let no_encoding_of_version_2 = |path: &Path| {
        let table = schema::TABLE;
        sql(path, &format!("{table}; PRAGMA application_id = 0x444e4842; PRAGMA user_version = 2"));
        with_byte_of(path, 59, 4);
    };
    let short = |path: &Path| {
        drop(
            Outbox::open_at(&OutboxLocation::File(path.to_owned()), Path::new("/"), Role::Deliver)
                .unwrap(),
        );
        let size = std::fs::metadata(path).unwrap().len();
        std::fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(size - 4_096 - 700)
            .unwrap();
    };
    for spoil in [
        &foreign as &dyn Fn(&Path),
        &text,
        &damaged,
        &marked,
        &version_1,
        &one_page,
        &later_version,
        &later_format,
        &no_encoding,
        &no_encoding_of_version_2,
        &short,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        spoil(&path);
        let before = std::fs::read(&path).unwrap();
        let contributor =
            Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Contribute).unwrap();
        assert!(contributor.1.is_some(), "a contributor does not quarantine");
        assert!(std::fs::read(&path).unwrap() == before, "it is unchanged");
        let mut outbox = open(dir.path());
        outbox.push(&[delta("d")]).unwrap();
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let aside = names
            .filter(|name| name.to_str().unwrap().contains("heartbeat.db-aside-"))
            .collect::<Vec<_>>();
        assert_eq!(aside.len(), 1, "{aside:?}");
        assert!(std::fs::read(&aside[0]).unwrap() == before, "it is unchanged");
        assert_eq!(deckies(&mut outbox), ["d"]);
    }
}

#[test]
fn damaged_log_loses_only_what_follows_the_damage() {
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damages: [(Damage<'_>, &[&str]); 5] = [
        (&|_| (), &["c", "b", "a"]),
        (&|log| log.fill(0xa5), &["a"]),
        (&|log| log.clear(), &["a"]),
        (&|log| log.truncate(log.len() - 700), &["b", "a"]),
        (&|log| *log.last_mut().unwrap() ^= 1, &["b", "a"]),
    ];
    for (number, (damage, left)) in damages.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        // Closing the file moves the row to the database.
        open(dir.path()).push(&[delta("a")]).unwrap();
        let mut killed = open(dir.path());
        ["b", "c"].iter().for_each(|decky| killed.push(&[delta(decky)]).unwrap());
        connection(&mut killed)
            .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .unwrap();
        drop(killed);
        let path = beside(&dir.path().join(FILE), "-wal");
        let mut log = std::fs::read(&path).unwrap();
        damage(&mut log);
        std::fs::write(&path, log).unwrap();
        let mut outbox = open(dir.path());
        assert_eq!(deckies(&mut outbox), left, "{number}");
        outbox.push(&[delta("after")]).unwrap();
        drop(outbox);
        assert_eq!(deckies(&mut open(dir.path())).len(), left.len() + 1);
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(
            !names.into_iter().any(|name| name.to_str().unwrap().contains("aside")),
            "{number}"
        );
    }
}

#[test]
fn empty_file_becomes_an_outbox() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE), "").unwrap();
    open_as(dir.path(), Role::Contribute).push(&[delta("a")]).unwrap();
    assert_eq!(deckies(&mut open(dir.path())), ["a"]);
}

/// Changes the file as another program might.
fn spoil(dir: &Path, sql: &str) {
    Connection::open(dir.join(FILE)).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn text_that_is_not_utf8_does_not_block_other_rows() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).push(&[delta("good")]).unwrap();
    spoil(
        dir.path(),
        "INSERT INTO delta (decky, operation, error, completed_at, owner) VALUES
             (CAST(x'61ff' AS TEXT), 'deploy', CAST(x'ff' AS TEXT), 1, NULL),
             ('theirs', 'deploy', NULL, NULL, CAST(x'ff' AS TEXT))",
    );
    let mut outbox = open(dir.path());
    assert_eq!(deckies(&mut outbox), ["theirs", "a\u{fffd}", "good"]);
    // The rows are moved to the next file unchanged.
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    let queued = outbox.deliverable(10).unwrap();
    assert_eq!(queued[1].delta.outcome(), &Outcome::Failed("\u{fffd}".to_owned()));
    outbox.answer(&queued, &DeliveryResult::Delivered).unwrap();
    assert!(on_disk(dir.path()).is_empty());
}

#[test]
fn damaged_id_sequence_loses_no_row() {
    for damaged in ["1", "-5", "'x'", "1.5", "NULL"] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).push(&[delta("a"), delta("b")]).unwrap();
        spoil(
            dir.path(),
            &format!(
                "UPDATE delta SET id = id % 2 + 1; UPDATE sqlite_sequence SET seq = {damaged}"
            ),
        );
        let mut outbox = open(dir.path());
        outbox.push(&[delta("c")]).unwrap();
        let mut deckies = deckies(&mut outbox);
        deckies.sort();
        assert_eq!(deckies, ["a", "b", "c"], "{damaged}");
    }
}

#[test]
fn delta_with_a_negative_id_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).push(&[delta("d")]).unwrap();
    spoil(dir.path(), "UPDATE delta SET id = -1");
    let mut outbox = open(dir.path());
    assert_eq!((deckies(&mut outbox), outbox.stats().counts.held), (vec!["d".to_owned()], 0));
}

#[test]
fn file_without_unused_ids_is_replaced() {
    for used_up in [
        "UPDATE delta SET id = 9223372036854775807",
        "UPDATE sqlite_sequence SET seq = 9223372036854775806",
    ] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).push(&[delta("d")]).unwrap();
        spoil(dir.path(), used_up);
        let mut outbox = open(dir.path());
        outbox.push(&[delta("e")]).unwrap();
        assert_eq!(deckies(&mut outbox), ["e"]);
    }
}

#[test]
fn impossible_ages_do_not_affect_other_rows() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).push(&[delta("good"), delta("old"), delta("young")]).unwrap();
    spoil(
        dir.path(),
        "UPDATE delta SET age = 9223372036854775807 WHERE decky = 'old';
         UPDATE delta SET age = -9223372036854775807 WHERE decky = 'young'",
    );
    let mut outbox = open(dir.path());
    outbox.age_by(limits::OUTBOX_AGING).unwrap();
    assert_eq!(
        (deckies(&mut outbox), outbox.stats().dropped),
        (vec!["young".to_owned(), "good".to_owned()], 1)
    );
    let database = Connection::open(dir.path().join(FILE)).unwrap();
    let oldest: i64 =
        database.query_row("SELECT max(age) FROM delta", [], |row| row.get(0)).unwrap();
    assert_eq!(oldest, 3600);
}

#[test]
fn file_that_is_damaged_while_open_is_quarantined() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let mut outbox = open(dir.path());
    outbox.push(&(0..400).map(|n| delta(&format!("{n:0200}"))).collect::<Vec<_>>()).unwrap();
    // The rows are moved to the database, removed from SQLite's cache, and then damaged.
    outbox.store.read(|db| db.execute_batch("PRAGMA cache_size = 0")).unwrap();
    Connection::open(&path)
        .unwrap()
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![0xa5; length as usize]).unwrap();
    for _ in 0..3 {
        let _ = outbox.push(&[delta("meanwhile")]);
        let _ = outbox.maintain();
    }
    outbox.push(&[delta("after")]).unwrap();
    assert_eq!(deckies(&mut outbox)[0], "after");
    assert!(outbox.path().is_some());
}

#[test]
fn row_limit_drops_the_oldest_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let id = begin(&mut outbox, "running");
    outbox
        .push(&(0..limits::OUTBOX_ROWS - 1).map(|n| delta(&n.to_string())).collect::<Vec<_>>())
        .unwrap();
    assert_eq!(outbox.stats().dropped, 0);
    let oldest = outbox.deliverable(limits::OUTBOX_ROWS).unwrap().pop().unwrap();
    outbox.answer(&[oldest], &DeliveryResult::Rejected("no".to_owned())).unwrap();
    outbox.push(&[delta("a"), delta("b"), delta("c")]).unwrap();
    assert_eq!(outbox.stats().dropped, 2, "the rejected one was dropped before them");
    let queued = outbox.deliverable(limits::OUTBOX_ROWS).unwrap();
    assert_eq!(
        (queued.len(), queued.last().unwrap().delta.decky()),
        (limits::OUTBOX_ROWS - 1, "3")
    );
    outbox.end(ended(id, succeeded("running")), SentBy::Deliverer).unwrap();
    let error = outbox.push(&vec![delta("many"); limits::OUTBOX_ROWS + 1]).unwrap_err();
    assert!(error.to_string().contains("has no room for 10001 more"), "{error}");
}

#[test]
fn operations_in_flight_are_never_dropped() {
    let mut outbox =
        Outbox::open_at(&OutboxLocation::Memory, Path::new("/"), Role::Deliver).unwrap().0;
    let many: Vec<_> = (0..limits::OUTBOX_ROWS).map(|n| n.to_string()).collect();
    let ids = outbox.begin(Operation::Deploy, &many).unwrap();
    let error = outbox.push(&[delta("d")]).unwrap_err();
    let text = "outbox in memory: has no room for 1 more: its limit is 10000 rows, and operations in \
         flight are not dropped";
    assert_eq!(error.to_string(), text);
    outbox.end(ended(ids[0], succeeded("0")), SentBy::Deliverer).unwrap();
    outbox.push(&[delta("d")]).unwrap();
    assert_eq!(
        (counted(&mut outbox), outbox.stats().dropped, outbox.stats().on_disk),
        ((1, 0, 9_999), 1, false)
    );
    outbox.push(&[delta("e")]).unwrap();
    outbox.push(&[delta("f"), delta("g")]).unwrap_err();
    assert_eq!((deckies(&mut outbox), outbox.stats().dropped), (vec!["e".to_owned()], 2));
}

#[test]
fn delta_is_dropped_and_counted_after_seven_days() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let day = Duration::from_secs(24 * 3600);
    outbox.push(&[delta("old")]).unwrap();
    begin(&mut outbox, "running");
    outbox.age_by(day * 4).unwrap();
    outbox.push(&[delta("young")]).unwrap();
    outbox.age_by(day * 3).unwrap();
    assert_eq!(deckies(&mut outbox), ["young", "old"], "seven days are within the limit");
    outbox.age_by(day).unwrap();
    assert_eq!(deckies(&mut outbox), ["young"]);
    outbox.maintain().unwrap();
    assert_eq!((outbox.stats().dropped, counted(&mut outbox)), (1, (1, 0, 1)));
}

#[test]
fn age_grows_hourly_and_not_during_a_suspension() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d")]).unwrap();
    let mut hours = |passed: u32| {
        outbox.aged_at = Instant::now() - limits::OUTBOX_AGING * passed;
        outbox.maintain().unwrap();
        outbox.maintain().unwrap();
        let database = Connection::open(dir.path().join(FILE)).unwrap();
        database.query_row("SELECT age / 3600 FROM delta", [], |row| row.get::<_, u32>(0)).unwrap()
    };
    assert_eq!([hours(0), hours(1), hours(1), hours(24 * 30)], [0, 1, 2, 4]);
}

#[test]
fn permissions_of_others_are_removed_from_an_existing_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    open(dir.path()).push(&[delta("d")]).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn fifo_or_folder_does_not_block() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(dir.path().join("fifo"))
            .status()
            .unwrap()
            .success()
    );
    for name in ["folder", "fifo"] {
        let location = OutboxLocation::File(dir.path().join(name));
        let (_, problem) = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap();
        assert!(chain(&problem.unwrap()).ends_with("not a regular file; rename or remove it"));
    }
}

#[test]
fn end_of_an_operation_is_written_before_it_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let id = begin(&mut outbox, "d");
    // The change is recorded, but not made yet.
    outbox.record_change(RowChange::Ended(ended(id, succeeded("d")), SentBy::Deliverer));
    assert_eq!(deckies(&mut outbox), ["d"]);
    // If the process is killed now, the next start must not report the operation failed, because
    // the success may have been sent.
    assert_eq!(on_disk(dir.path()), [("d".to_owned(), None, false)]);
}

/// The number of transactions in the log. The last frame of each has the size of the database.
fn transactions(dir: &Path) -> usize {
    const HEADER: usize = 32;
    const FRAME: usize = 24 + 4_096;
    let log = std::fs::read(dir.join("heartbeat.db-wal")).unwrap();
    log[HEADER..].chunks_exact(FRAME).filter(|frame| frame[4..8] != [0; 4]).count()
}

fn push(deckies: &[&str]) -> NewRows {
    NewRows::Deltas(deckies.iter().map(|decky| delta(decky)).collect(), SentBy::Deliverer)
}

fn operation(decky: &str) -> NewRows {
    NewRows::Operation(Operation::Mutate, vec![decky.to_owned()])
}

/// The lock of another process.
fn lock_the_file(dir: &Path) -> Connection {
    let other = Connection::open(dir.join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    other
}

#[test]
fn group_is_one_transaction_in_which_only_oversized_additions_fail() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("delivered"), delta("rejected")]).unwrap();
    let queued = outbox.deliverable(2).unwrap();
    let running = begin(&mut outbox, "running");
    let before = transactions(dir.path());
    outbox.record_change(RowChange::Answered(vec![queued[1].id], DeliveryResult::Delivered));
    outbox.record_change(RowChange::Answered(
        vec![queued[0].id],
        DeliveryResult::Rejected("no".to_owned()),
    ));
    outbox.record_change(RowChange::Ended(ended(running, succeeded("running")), SentBy::Deliverer));
    let too_many = NewRows::Deltas(vec![delta("many"); limits::OUTBOX_ROWS + 1], SentBy::Deliverer);
    let CommitResult { added, changed } =
        outbox.commit(&[push(&["a", "b"]), too_many, operation("c"), push(&["d"])], deadline());
    changed.unwrap();
    assert_eq!(transactions(dir.path()), before + 1);
    let [first, too_many, begun, last] = added.try_into().unwrap();
    let first = first.unwrap();
    assert!(too_many.unwrap_err().to_string().contains("has no room for 10001 more"));
    assert!((first + 2..last.unwrap()).contains(&begun.unwrap()));
    assert_eq!(deckies(&mut outbox), ["d", "b", "a", "running"]);
    let rows = on_disk(dir.path()).into_iter().map(|(decky, ..)| decky).collect::<Vec<_>>();
    assert_eq!(rows, ["rejected", "running", "a", "b", "c", "d"]);
}

#[test]
fn lock_of_another_process_fails_additions_and_moves_changes_to_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("delivered"), delta("waiting")]).unwrap();
    let running = begin(&mut outbox, "running");
    let delivered = outbox.deliverable(2).unwrap().pop().unwrap();
    let other = lock_the_file(dir.path());
    outbox.record_change(RowChange::Answered(vec![delivered.id], DeliveryResult::Delivered));
    outbox.record_change(RowChange::Ended(ended(running, succeeded("running")), SentBy::Deliverer));
    let by = Instant::now() + Duration::from_millis(50);
    let CommitResult { added, changed } = outbox.commit(&[push(&["a"]), operation("b")], by);
    assert!(changed.unwrap_err().to_string().ends_with("cannot be written"));
    for added in added {
        let error = added.unwrap_err().to_string();
        assert!(error.ends_with("is locked by another process; nothing was queued"), "{error}");
    }
    assert_eq!(counted(&mut outbox), (2, 0, 0));
    assert_eq!(outbox.path(), None);
    drop(other);
    outbox.commit(&[], deadline()).changed.unwrap();
    assert!(outbox.path().is_some());
    let rows = on_disk(dir.path());
    assert_eq!(
        rows,
        [
            ("waiting".to_owned(), Some("why".to_owned()), false),
            ("running".to_owned(), None, false)
        ]
    );
}

#[test]
fn withdrawn_operation_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d")]).unwrap();
    let names = ["d".to_owned(), "e".to_owned()];
    let first = outbox.begin(Operation::Mutate, &names).unwrap()[0];
    assert_eq!(counted(&mut outbox), (1, 1, 2));
    outbox.record_change(RowChange::Withdrawn(first..first + 2));
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 0), vec!["d".to_owned()]));
    assert_eq!(on_disk(dir.path()).len(), 1);
}

#[test]
fn failed_or_panicked_transaction_loses_no_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("a"), delta("b")]).unwrap();
    let queued = outbox.deliverable(2).unwrap();
    outbox.record_change(RowChange::Answered(vec![queued[0].id], DeliveryResult::Delivered));
    let panics = || outbox.change::<()>(deadline(), |_, _| panic!("during the transaction"));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
    // Neither the file nor the copy takes the answer, which is too large for both.
    fill_the_disk(&mut outbox);
    let copy = &outbox.store.refresh_copy().unwrap().db;
    copy.query_row("PRAGMA max_page_count = 1", [], |_| Ok(())).unwrap();
    outbox.record_change(RowChange::Answered(
        vec![queued[1].id],
        DeliveryResult::Rejected("no".repeat(50_000)),
    ));
    let CommitResult { added, changed } = outbox.commit(&[push(&["c"])], deadline());
    assert!(
        added
            .into_iter()
            .all(|added| added.unwrap_err().to_string().ends_with("cannot queue anything"))
    );
    changed.unwrap_err();
    assert_eq!(
        deckies(&mut outbox),
        ["a"],
        "a delivered delta is not sent again, whatever the file has"
    );
    assert_eq!(outbox.path(), None);
    free_the_disk(&mut outbox);
    outbox.maintain().unwrap();
    assert!(deckies(&mut outbox).is_empty());
    let rows = on_disk(dir.path()).into_iter().map(|(decky, ..)| decky).collect::<Vec<_>>();
    assert_eq!((rows, outbox.stats().counts.rejected), (vec!["a".to_owned()], 1));
}

#[test]
fn second_outbox_delivers_after_a_stopped_one_is_done() {
    for is_dropped in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut first = open(dir.path());
        first.push(&[delta("d")]).unwrap();
        begin(&mut first, "running");
        let refused =
            Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver).unwrap_err();
        let us = std::process::id();
        assert!(
            refused.to_string().contains(&format!("process {us} already delivers from it")),
            "{refused}"
        );
        first.stats.record_stop();
        let mut second = open(dir.path());
        assert!(deckies(&mut second).is_empty());
        second.push(&[delta("e")]).unwrap();
        second.maintain().unwrap();
        assert!(deckies(&mut second).is_empty(), "the first outbox delivers");
        assert_eq!(deckies(&mut first), ["e", "d"]);
        let _stopped = if is_dropped {
            drop(first);
            None
        } else {
            first.stop_delivering().unwrap();
            Some(first)
        };
        second.maintain().unwrap();
        if is_dropped {
            let failed = Outcome::Failed("its process ended during mutate".to_owned());
            let queued = second.deliverable(10).unwrap();
            assert_eq!(deckies(&mut second), ["e", "running", "d"]);
            assert_eq!(queued[1].delta.outcome(), &failed);
        } else {
            assert_eq!(deckies(&mut second), ["e", "d"], "the operation is still in flight");
        }
    }
}

#[cfg(feature = "cli")]
fn stuck(path: &Path) -> Vec<StuckRow> {
    summarize(path).unwrap().unwrap().stuck
}

/// Deletes the lock file, as a person does who cleans up the agent dir.
fn remove_the_lock_file(dir: &Path) {
    std::fs::remove_file(locks::beside(&dir.join(FILE), "-lock")).unwrap();
}

#[test]
fn deliverer_yields_to_the_process_that_locked_a_new_lock_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d")]).unwrap();
    remove_the_lock_file(dir.path());
    let other = OtherProcess::start(&dir.path().join(FILE));
    outbox.maintain().unwrap();
    assert!(deckies(&mut outbox).is_empty());
    outbox.push(&[delta("e")]).unwrap();
    assert_eq!(on_disk(dir.path()).len(), 2, "it still adds");
    drop(other);
    outbox.maintain().unwrap();
    assert_eq!(deckies(&mut outbox), ["e", "d"]);
}

#[test]
fn deliverer_locks_a_new_lock_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("d")]).unwrap();
    remove_the_lock_file(dir.path());
    outbox.maintain().unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
    Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver)
        .expect_err("it has the lock");
}

#[test]
fn unusable_lock_file_does_not_stop_delivery() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let id = begin(&mut outbox, "running");
    remove_the_lock_file(dir.path());
    let lock = locks::beside(&dir.path().join(FILE), "-lock");
    assert!(std::process::Command::new("mkfifo").arg(&lock).status().unwrap().success());
    outbox.maintain().unwrap();
    outbox.end(ended(id, succeeded("running")), SentBy::Deliverer).unwrap();
    assert_eq!(deckies(&mut outbox), ["running"]);
    std::fs::remove_file(&lock).unwrap();
    outbox.maintain().unwrap();
    assert!(lock.is_file());
}

#[test]
fn replaced_lock_file_does_not_fail_operations_of_running_processes() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    let mut outbox = open(dir.path());
    remove_the_lock_file(dir.path());
    outbox.maintain().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "the old lock file is still open");
    // This process knows only the new lock file.
    drop(outbox);
    let mut outbox = open(dir.path());
    outbox.maintain().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "the new lock file is too young");
    track.maintain_owned_rows();
    outbox.store.locks.make_old();
    outbox.maintain().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "its process is locked in the new file, too");
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
}

#[test]
fn owner_in_a_replaced_lock_file_is_recovered_after_a_minute() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    begin(&mut track, "d");
    // It stays open, so that no new file gets its inode.
    let _old = std::fs::File::open(locks::beside(&dir.path().join(FILE), "-lock")).unwrap();
    remove_the_lock_file(dir.path());
    drop(track);
    let mut outbox = open(dir.path());
    assert_eq!(counted(&mut outbox), (0, 0, 1));
    outbox.store.locks.make_old();
    outbox.maintain().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 0), vec!["d".to_owned()]));
}

#[cfg(feature = "cli")]
#[test]
fn row_with_an_unknown_owner_is_stuck_after_a_day_until_its_owner_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let day = Duration::from_secs(24 * 3600);
    let lock = locks::beside(&path, "-lock");
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    remove_the_lock_file(dir.path());
    let mut outbox = open(dir.path());
    remove_the_lock_file(dir.path());
    std::fs::create_dir(&lock).unwrap();
    begin(&mut outbox, "ours");
    outbox.maintain().unwrap();
    outbox.age_by(day - Duration::from_secs(1)).unwrap();
    assert_eq!(stuck(&path), []);
    assert_eq!(outbox.stuck_logged_at, None);
    outbox.age_by(Duration::from_secs(1)).unwrap();
    let expected =
        StuckRow { id, decky: "d".to_owned(), operation: "mutate".to_owned(), duration: day };
    assert_eq!(expected.to_string(), format!("mutate of d (row {id}, for 1day)"));
    assert_eq!(stuck(&path), [expected]);
    let logged_at = outbox.stuck_logged_at;
    outbox.age_by(day * 30).unwrap();
    assert!(logged_at.is_some() && outbox.stuck_logged_at == logged_at, "once a day");
    assert_eq!(counted(&mut outbox), (0, 0, 2), "it is not changed");
    // Now it is known that its process has ended.
    std::fs::remove_dir(&lock).unwrap();
    drop(track);
    outbox.maintain().unwrap();
    outbox.store.locks.make_old();
    outbox.maintain().unwrap();
    outbox.age_by(day).unwrap();
    assert_eq!(
        (deckies(&mut outbox), stuck(&path)),
        (vec!["d".to_owned()], vec![]),
        "it waits for delivery"
    );
}

#[test]
fn contributor_moves_its_rows_to_a_new_agent_dir() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut track = open_as(&agent, Role::Contribute);
    let id = begin(&mut track, "d");
    std::fs::remove_dir_all(&agent).unwrap();
    track.maintain_owned_rows();
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    track.maintain_owned_rows();
    outbox.store.locks.make_old();
    outbox.maintain().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "it is in flight there, and its process runs");
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
}

#[test]
fn new_agent_dir_does_not_repeat_deliveries() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    outbox.push(&[delta("waits")]).unwrap();
    let mut track = open_as(&agent, Role::Contribute);
    let id = begin(&mut track, "d");
    std::fs::remove_dir_all(&agent).unwrap();
    std::fs::create_dir(&agent).unwrap();
    outbox.maintain().unwrap();
    let queued = outbox.deliverable(10).unwrap();
    assert_eq!((queued.len(), counted(&mut outbox)), (1, (1, 0, 1)));
    outbox.answer(&queued, &DeliveryResult::Delivered).unwrap();
    // It has not checked its files since, and sends its delta itself.
    let ours = ended(id, succeeded("d"));
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    track.answer(&ours, &DeliveryResult::Delivered).unwrap();
    drop(track);
    outbox.maintain().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[test]
fn delta_delivered_from_the_new_file_is_not_moved_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    track.answer(&ours, &DeliveryResult::Delivered).unwrap();
    drop(track);
    // This process has only the older file open, in which the operation is in flight.
    outbox.maintain().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[test]
fn delta_delivered_during_the_replacement_is_not_moved() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    track.answer(&ours, &DeliveryResult::Delivered).unwrap();
    drop(track);
    outbox.maintain().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[cfg(feature = "cli")]
#[test]
fn operation_ended_in_the_new_file_stays_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    outbox.maintain().unwrap();
    track.release(&ours).unwrap();
    drop(track);
    outbox.maintain().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 0), vec!["d".to_owned()]));
}

#[test]
fn delivery_by_another_process_survives_an_older_copy_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let backup = dir.path().join("backup");
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    spoil(dir.path(), &format!("VACUUM INTO '{}'", backup.display()));
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    track.answer(&ours, &DeliveryResult::Delivered).unwrap();
    drop(track);
    // The log belongs to the replaced file.
    ["-wal", "-shm"]
        .iter()
        .for_each(|part| std::fs::remove_file(beside(&dir.path().join(FILE), part)).unwrap());
    std::fs::rename(&backup, dir.path().join(FILE)).unwrap();
    outbox.maintain().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[test]
fn unowned_rows_are_moved_to_a_new_agent_dir_without_a_deliverer() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut track = open_as(&agent, Role::Contribute);
    track.push(&[delta("waits")]).unwrap();
    begin(&mut track, "d");
    std::fs::remove_dir_all(&agent).unwrap();
    std::fs::create_dir(&agent).unwrap();
    track.maintain_owned_rows();
    let mut outbox = open(&agent);
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 1), vec!["waits".to_owned()]));
}

#[test]
fn process_maintains_its_rows_while_it_has_some() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    track.push(&[delta("e")]).unwrap();
    assert!(!track.may_own_rows());
    let id = begin(&mut track, "d");
    track.maintain_owned_rows();
    assert!(track.may_own_rows());
    track.end(ended(id, succeeded("d")), SentBy::ThisProcess).unwrap();
    track.maintain_owned_rows();
    assert!(track.may_own_rows(), "it sends the delta itself");
    track.answer(&ended(id, succeeded("d")), &DeliveryResult::Delivered).unwrap();
    track.maintain_owned_rows();
    assert!(!track.may_own_rows());
}

#[test]
fn deliver_later_begins_when_the_other_process_ends() {
    let dir = tempfile::tempdir().unwrap();
    let other = OtherProcess::start(&dir.path().join(FILE));
    let mut outbox = open_as(dir.path(), Role::DeliverLater);
    outbox.push(&[delta("d")]).unwrap();
    outbox.maintain().unwrap();
    assert!(deckies(&mut outbox).is_empty());
    assert_eq!(outbox.stats().counts.waiting, 1);
    drop(other);
    outbox.maintain().unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
    Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver)
        .expect_err("it has the lock");
}

/// An operation of another process that is running, and an older delta that it holds.
fn beside_a_running_process(dir: &Path) -> (Outbox, Outbox) {
    let mut outbox = open(dir);
    outbox.push(&[delta("theirs"), delta("ours")]).unwrap();
    let mut track = open_as(dir, Role::Contribute);
    begin(&mut track, "theirs");
    (outbox, track)
}

#[test]
fn rows_of_other_processes_in_memory_hold_older_ones_and_are_not_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&agent).unwrap();
    let (mut outbox, _track) = beside_a_running_process(&agent);
    fill_the_disk(&mut outbox);
    outbox.push(&[delta(&"x".repeat(5_000))]).unwrap();
    outbox.push(&[delta("theirs")]).unwrap();
    assert_eq!((counted(&mut outbox), outbox.path()), ((4, 1, 1), None));
    outbox.maintain().unwrap_err();
    assert_eq!(counted(&mut outbox), (4, 1, 1), "its process is running");
    // Now it cannot be determined whether it is running.
    std::fs::rename(&agent, &elsewhere).unwrap();
    outbox.maintain().unwrap();
    assert_eq!(counted(&mut outbox), (4, 1, 1));
    assert_eq!(deckies(&mut outbox), ["theirs", &"x".repeat(5_000), "ours"]);
    std::fs::rename(&elsewhere, &agent).unwrap();
    outbox.maintain().unwrap();
    assert_eq!((outbox.path().is_some(), counted(&mut outbox)), (true, (4, 1, 1)));
}

#[test]
fn end_reported_by_another_process_reaches_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    fill_the_disk(&mut outbox);
    outbox.push(&[delta(&"x".repeat(5_000))]).unwrap();
    assert_eq!(counted(&mut outbox), (1, 0, 1));
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!((counted(&mut outbox), outbox.path()), ((2, 0, 0), None));
    assert_eq!(
        outbox.deliverable(2).unwrap()[1].delta,
        succeeded("d").completed_at(outbox.deliverable(2).unwrap()[1].delta.when())
    );
}

/// The age of a row, as another program sees it.
fn age_on_disk(dir: &Path, decky: &str) -> i64 {
    let db = Connection::open(dir.join(FILE)).unwrap();
    db.query_row("SELECT age FROM delta WHERE decky = ?1", [decky], |row| row.get(0)).unwrap()
}

#[test]
fn same_file_receives_only_changed_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&["same", "delivered", "rejected"].map(delta)).unwrap();
    let queued = outbox.deliverable(3).unwrap();
    fill_the_disk(&mut outbox);
    outbox.push(&[delta(&"x".repeat(5_000))]).unwrap();
    outbox.answer(&queued[1..2], &DeliveryResult::Delivered).unwrap_err();
    outbox.answer(&queued[..1], &DeliveryResult::Rejected("no".to_owned())).unwrap_err();
    // Another program changes all rows, which shows which ones are written later.
    spoil(dir.path(), "UPDATE delta SET age = 1");
    // Nothing is read in between, so the copy does not have this change.
    free_the_disk(&mut outbox);
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!(on_disk(dir.path()).len(), 3);
    let ages = ["same", "rejected", &"x".repeat(5_000)].map(|decky| age_on_disk(dir.path(), decky));
    assert_eq!(ages, [1, 0, 0]);
}

#[test]
fn new_file_receives_all_unacknowledged_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&["before", "delivered", "rejected", "last"].map(delta)).unwrap();
    let queued = outbox.deliverable(4).unwrap();
    outbox.answer(&queued[2..3], &DeliveryResult::Delivered).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.answer(&queued[1..2], &DeliveryResult::Rejected("no".to_owned())).unwrap();
    outbox.answer(&queued[..1], &DeliveryResult::Delivered).unwrap();
    outbox.push(&[delta("after")]).unwrap();
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    let rows = on_disk(dir.path()).into_iter().map(|(decky, ..)| decky).collect::<Vec<_>>();
    assert_eq!(
        (rows, deckies(&mut outbox)),
        (
            vec!["before".to_owned(), "rejected".to_owned(), "after".to_owned()],
            vec!["after".to_owned(), "before".to_owned()]
        )
    );
}

#[test]
fn acknowledgement_survives_an_older_copy_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let backup = dir.path().join("backup");
    let mut outbox = open(dir.path());
    outbox.push(&["waiting", "delivered"].map(delta)).unwrap();
    let running = begin(&mut outbox, "running");
    let withdrawn = begin(&mut outbox, "withdrawn");
    let back_up = format!("VACUUM INTO '{}'", backup.display());
    spoil(dir.path(), &back_up);
    let queued = outbox.deliverable(1).unwrap();
    outbox.answer(&queued, &DeliveryResult::Delivered).unwrap();
    outbox.end(ended(running, succeeded("running")), SentBy::Deliverer).unwrap();
    let queued = outbox.deliverable(1).unwrap();
    outbox.answer(&queued, &DeliveryResult::Delivered).unwrap();
    outbox.record_change(RowChange::Withdrawn(withdrawn..withdrawn + 1));
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!(deckies(&mut outbox), ["waiting"]);
    // Another file, at the same place.
    ["-wal", "-shm"]
        .iter()
        .for_each(|suffix| std::fs::remove_file(locks::beside(&path, suffix)).unwrap());
    std::fs::rename(&backup, &path).unwrap();
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    assert_eq!(
        (deckies(&mut outbox), counted(&mut outbox)),
        (vec!["waiting".to_owned()], (1, 0, 0))
    );
    assert_eq!(on_disk(dir.path()).len(), 1);
    // Its row returns in the same file.
    let row = format!(
        "INSERT INTO delta (id, decky, operation, completed_at) VALUES ({running}, 'd', 'deploy', 1)"
    );
    spoil(dir.path(), &row);
    assert_eq!(deckies(&mut outbox), ["waiting"]);
    outbox.maintain().unwrap();
    assert_eq!(on_disk(dir.path()).len(), 1, "the returned row is deleted");
    assert_eq!(outbox.stats().counts.waiting, 1);
}

#[test]
fn repeated_id_of_a_damaged_file_loses_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    // The clock was ahead when the ids were given.
    let ahead = micros(std::time::SystemTime::now()) + 1_000_000_000_000;
    spoil(dir.path(), &format!("UPDATE sqlite_sequence SET seq = {ahead}"));
    outbox.push(&[delta("first")]).unwrap();
    let first = outbox.deliverable(1).unwrap();
    outbox.answer(&first, &DeliveryResult::Delivered).unwrap();
    spoil(dir.path(), &format!("UPDATE sqlite_sequence SET seq = {}", first[0].id - 1));
    outbox.push(&[delta("second")]).unwrap();
    let second = outbox.deliverable(1).unwrap();
    assert_eq!((second[0].id, second[0].delta.decky()), (first[0].id, "second"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.maintain().unwrap();
    assert_eq!(deckies(&mut outbox), ["second"], "also in another file");
    outbox.answer(&second, &DeliveryResult::Delivered).unwrap();
    assert!(deckies(&mut outbox).is_empty());
}

#[test]
fn ids_are_unique_if_the_log_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let before = begin(&mut outbox, "d");
    file::disable_checkpoint_on_close(connection(&mut outbox)).unwrap();
    drop(outbox);
    ["-wal", "-shm"]
        .iter()
        .for_each(|part| std::fs::remove_file(beside(&dir.path().join(FILE), part)).unwrap());
    assert!(begin(&mut open(dir.path()), "d") > before);
}

#[test]
fn ids_are_not_ahead_of_the_clock_after_replacements() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    for _ in 0..3 {
        begin(&mut outbox, "d");
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
    }
    let last = begin(&mut outbox, "d");
    assert!(outbox.path().is_some() && last <= micros(std::time::SystemTime::now()) + 1);
}

#[test]
fn deleted_ids_are_bounded_and_the_oldest_is_forgotten() {
    let mut deleted = DeletedIds::default();
    let most = limits::OUTBOX_ROWS as i64;
    (0..most).rev().for_each(|id| deleted.insert(id));
    deleted.insert(5);
    assert!(deleted.ids.len() == limits::OUTBOX_ROWS && deleted.ids.contains(&(most - 1)));
    deleted.insert(most);
    assert_eq!(
        (deleted.ids.len(), deleted.order.len()),
        (limits::OUTBOX_ROWS, limits::OUTBOX_ROWS)
    );
    assert!(deleted.ids.contains(&0) && !deleted.ids.contains(&(most - 1)));
}

#[test]
fn id_acknowledged_in_memory_is_not_reused() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.push(&[delta("first")]).unwrap();
    let first = outbox.deliverable(1).unwrap().remove(0).id;
    fill_the_disk(&mut outbox);
    let mut newest = first;
    for n in 0..3 {
        outbox.push(&[delta(&"x".repeat(5_000))]).unwrap();
        let queued = outbox.deliverable(1).unwrap();
        assert!(queued[0].id > newest, "{n}");
        newest = queued[0].id;
        let _ = outbox.answer(&queued, &DeliveryResult::Delivered);
    }
    assert_eq!(outbox.path(), None);
    free_the_disk(&mut outbox);
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some());
    assert!(begin(&mut outbox, "d") > newest);
    // Nor does another process reuse it, nor another file.
    drop(outbox);
    let mut outbox = open(dir.path());
    let next = begin(&mut outbox, "d");
    assert!(next > newest);
    outbox.record_change(RowChange::Withdrawn(next..next + 1));
    outbox.commit(&[], deadline()).changed.unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.maintain().unwrap();
    assert!(outbox.path().is_some() && begin(&mut outbox, "d") > next);
}

#[test]
fn ids_in_memory_are_above_clock_and_file_by_a_random_gap() {
    let dir = tempfile::tempdir().unwrap();
    let now = || micros(std::time::SystemTime::now());
    let missing = OutboxLocation::File(dir.path().join("missing").join(FILE));
    let gaps: Vec<_> = (0..5)
        .map(|_| {
            let before = now();
            let (mut outbox, problem) =
                Outbox::open_at(&missing, dir.path(), Role::Deliver).unwrap();
            assert!(problem.is_some());
            begin(&mut outbox, "d") - before
        })
        .collect();
    assert!(gaps.iter().max().unwrap() - gaps.iter().min().unwrap() > 60_000_000, "{gaps:?}");
    // The clock was ahead when the file was written.
    let mut outbox = open(dir.path());
    let ahead = now() + 1_000_000_000_000;
    spoil(dir.path(), &format!("UPDATE sqlite_sequence SET seq = {ahead}"));
    fill_the_disk(&mut outbox);
    outbox.push(&[delta(&"x".repeat(5_000))]).unwrap();
    assert_eq!(outbox.path(), None);
    let id = outbox.deliverable(1).unwrap()[0].id;
    assert!(id > ahead + 1_000_000, "{id} {ahead}");
}

/// The number of virtual machine instructions of SQLite during an action.
fn steps<T>(outbox: &mut Outbox, act: impl FnOnce(&mut Outbox) -> T) -> (T, u64) {
    let steps = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&steps);
    let count = move || {
        count.fetch_add(1, Ordering::Relaxed);
        false
    };
    connection(outbox).progress_handler(1, Some(count)).unwrap();
    let done = act(outbox);
    connection(outbox).progress_handler(1, None::<fn() -> bool>).unwrap();
    (done, steps.load(Ordering::Relaxed))
}

/// The steps of each change, and of reading fifty deltas, with so many waiting deltas.
fn steps_where(waiting: usize, is_in_memory: bool) -> Vec<(&'static str, u64)> {
    let dir = tempfile::tempdir().unwrap();
    let location = if is_in_memory { OutboxLocation::Memory } else { OutboxLocation::AgentDir };
    let mut outbox = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap().0;
    outbox.push(&(0..waiting).map(|n| delta(&n.to_string())).collect::<Vec<_>>()).unwrap();
    begin(&mut outbox, "5");
    let mut measured = Vec::new();
    let (id, begun) = steps(&mut outbox, |outbox| begin(outbox, "7"));
    measured.push(("begin", begun));
    measured.push(("push", steps(&mut outbox, |outbox| outbox.push(&[delta("7")]).unwrap()).1));
    let end =
        |outbox: &mut Outbox| outbox.end(ended(id, succeeded("7")), SentBy::Deliverer).unwrap();
    measured.push(("end", steps(&mut outbox, end).1));
    let find = |outbox: &mut Outbox| outbox.read_deliverable(50, |_| true).unwrap();
    let (queued, found) = steps(&mut outbox, find);
    assert_eq!(queued.len(), 50);
    measured.push(("batch", found));
    let ids = |queued: &[QueuedDelta]| queued.iter().map(|queued| queued.id).collect::<Vec<_>>();
    let answer = |ids, result| {
        move |outbox: &mut Outbox| {
            outbox.record_change(RowChange::Answered(ids, result));
            outbox.commit(&[], deadline()).changed.unwrap();
        }
    };
    let delivered = answer(ids(&queued[..25]), DeliveryResult::Delivered);
    measured.push(("delivered", steps(&mut outbox, delivered).1));
    let rejected = answer(ids(&queued[25..]), DeliveryResult::Rejected("no".to_owned()));
    measured.push(("rejected", steps(&mut outbox, rejected).1));
    let withdrawn = begin(&mut outbox, "8");
    let withdraw = move |outbox: &mut Outbox| {
        outbox.record_change(RowChange::Withdrawn(withdrawn..withdrawn + 1));
        outbox.commit(&[], deadline()).changed.unwrap();
    };
    measured.push(("withdrawn", steps(&mut outbox, withdraw).1));
    measured
}

#[test]
fn cost_of_a_change_does_not_depend_on_the_number_of_rows() {
    for is_in_memory in [false, true] {
        let few = steps_where(100, is_in_memory);
        let many = steps_where(9_000, is_in_memory);
        assert_eq!(few, many, "in memory: {is_in_memory}");
    }
}

#[test]
fn waiting_count_is_never_too_low_while_answers_are_written() {
    const DELTAS: u64 = 2_000;
    let mut outbox =
        Outbox::open_at(&OutboxLocation::Memory, Path::new("/no/such"), Role::Deliver).unwrap().0;
    outbox.push(&(0..DELTAS).map(|n| delta(&n.to_string())).collect::<Vec<_>>()).unwrap();
    let queued = outbox.read_deliverable(DELTAS as usize, |_| true).unwrap();
    let stats = Arc::clone(&outbox.stats);
    let answered = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for QueuedDelta { id, .. } in queued {
                answered.fetch_add(1, Ordering::SeqCst);
                stats.record_answers(1);
                outbox.record_change(RowChange::Answered(vec![id], DeliveryResult::Delivered));
                outbox.commit(&[], deadline());
            }
        });
        loop {
            let waiting = stats.read().counts.waiting;
            let answered = answered.load(Ordering::SeqCst);
            assert!(waiting + answered >= DELTAS, "{waiting} wait, {answered} are answered");
            if answered == DELTAS {
                break;
            }
        }
    });
    assert_eq!(stats.read().counts.waiting, 0);
}

/// What another program may do to a file of an outbox.
type Tampering = fn(&Path);

const TAMPERINGS: [(&str, Tampering); 3] = [
    ("removed", |path| std::fs::remove_file(path).unwrap()),
    ("renamed", |path| std::fs::rename(path, path.with_extension("elsewhere")).unwrap()),
    ("replaced", |path| {
        let next = path.with_extension("next");
        std::fs::write(&next, "").unwrap();
        std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(next, path).unwrap();
    }),
];

#[test]
fn deltas_survive_deletion_renaming_and_replacement_of_files() {
    for ((how, tamper), part) in
        TAMPERINGS.iter().flat_map(|one| ["", "-wal", "-shm"].map(|part| (one, part)))
    {
        let dir = tempfile::tempdir().unwrap();
        let place = beside(&dir.path().join(FILE), part);
        for role in [Role::Deliver, Role::Contribute] {
            let mut outbox = open_as(dir.path(), role);
            for n in 0..5 {
                outbox.push(&[delta(&format!("{n} before"))]).unwrap();
                tamper(&place);
                outbox.push(&[delta(&format!("{n} after"))]).unwrap();
                assert!(outbox.path().is_some(), "{part} {how}: {n}");
            }
            // The process is killed, so nothing is written at its end.
            connection(&mut outbox)
                .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
                .unwrap();
        }
        let mut outbox = open(dir.path());
        assert_eq!(outbox.deliverable(30).unwrap().len(), 20, "{part} {how}");
        assert!(schema::check(connection(&mut outbox)).is_ok());
    }
}

#[test]
fn closing_a_replaced_file_does_not_delete_the_new_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let log = dir.path().join("heartbeat.db-wal");
    let mut old = open_as(dir.path(), Role::Contribute);
    old.push(&[delta("old")]).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut new = open_as(dir.path(), Role::Contribute);
    new.push(&[delta("new")]).unwrap();
    let which = || identity(&std::fs::symlink_metadata(&log).unwrap());
    let before = which();
    old.push(&[delta("after")]).unwrap();
    assert_eq!(which(), before);
    drop((old, new));
    let rows: BTreeSet<_> = on_disk(dir.path()).into_iter().map(|(decky, ..)| decky).collect();
    assert_eq!(rows, ["after", "new", "old"].map(str::to_owned).into());
}

#[test]
fn changes_of_others_in_the_new_file_survive() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut tracks = [open_as(dir.path(), Role::Contribute), open_as(dir.path(), Role::Contribute)];
    let ids = tracks.each_mut().map(|track| begin(track, "d"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    // The first process reports the end and exits. Then the second one moves its rows, among which
    // the operation is in flight, and then the deliverer does.
    let [mut first, mut second] = tracks;
    first.end(ended(ids[0], succeeded("d")), SentBy::Deliverer).unwrap();
    drop(first);
    second.push(&[delta("e")]).unwrap();
    outbox.maintain().unwrap();
    outbox.maintain().unwrap();
    assert_eq!(counted(&mut outbox), (2, 1, 1), "one is in flight, and holds the ended one");
    second.end(ended(ids[1], succeeded("d")), SentBy::Deliverer).unwrap();
    let outcomes: Vec<_> = outbox
        .deliverable(9)
        .unwrap()
        .into_iter()
        .map(|queued| queued.delta.outcome().clone())
        .collect();
    assert_eq!(
        outcomes,
        [Outcome::Failed("why".to_owned()), Outcome::Succeeded, Outcome::Succeeded]
    );
}

#[test]
fn rows_without_a_file_are_written_at_the_stop() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("agent");
    std::fs::create_dir(&folder).unwrap();
    let mut track = open_as(&folder, Role::Contribute);
    let id = begin(&mut track, "d");
    std::fs::remove_dir_all(&folder).unwrap();
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!(track.path(), None);
    std::fs::create_dir(&folder).unwrap();
    track.stop_delivering().unwrap();
    assert_eq!(on_disk(&folder).len(), 1);
}

#[test]
fn contributor_without_a_file_uses_the_new_one_with_its_next_change() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    std::fs::remove_dir_all(&agent).unwrap();
    let mut track = open_without_a_file(&agent);
    let id = begin(&mut track, "d");
    std::fs::create_dir(&agent).unwrap();
    outbox.maintain().unwrap();
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert!(track.path().is_some());
    assert_eq!(deckies(&mut outbox), ["d"]);
}

fn open_without_a_file(dir: &Path) -> Outbox {
    let (outbox, problem) =
        Outbox::open_at(&OutboxLocation::AgentDir, dir, Role::Contribute).unwrap();
    assert!(problem.is_some());
    outbox
}
