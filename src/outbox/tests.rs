//! The outbox on real files.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::*;
use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::files::{beside, identity};
use crate::sqlite::files::PARTS;

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
        .deliverable(10, deadline())
        .unwrap()
        .into_iter()
        .map(|kept| kept.delta.decky().to_owned())
        .collect()
}

/// What waits, what of it is held, and what is in flight.
fn counted(outbox: &mut Outbox) -> (u64, u64, u64) {
    outbox.count();
    let QueueCounts { waiting, held, operations, .. } = outbox.books().counts;
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
fn what_is_kept_survives_reopening_and_comes_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (delta("first"), LifecycleDelta::succeeded("second", Operation::Deploy));
    open(dir.path()).keep(&[first.clone(), second.clone()]).unwrap();
    let mut outbox = open(dir.path());
    assert_eq!(outbox.books().counts.waiting, 2);
    let kept: Vec<_> =
        outbox.deliverable(10, deadline()).unwrap().into_iter().map(|kept| kept.delta).collect();
    assert_eq!(kept, [second, first]);
}

#[test]
fn what_is_delivered_or_rejected_never_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("a"), delta("b"), delta("c")]).unwrap();
    let kept = outbox.deliverable(10, deadline()).unwrap();
    outbox.settle(&kept[..1], &DeliveryResult::Delivered, deadline()).unwrap();
    outbox.settle(&kept[1..2], &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap();
    assert_eq!(outbox.books().counts.waiting, 1);
    drop(outbox);
    assert_eq!(deckies(&mut open(dir.path())), ["a"]);
}

#[test]
fn the_last_hundred_that_were_delivered_are_remembered_also_of_those_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let deliver = |outbox: &mut Outbox, names: std::ops::Range<usize>| {
        for n in names {
            outbox.keep(&[delta(&format!("d{n}"))]).unwrap();
            let kept = outbox.deliverable(1, deadline()).unwrap();
            let _ = outbox.settle(&kept, &DeliveryResult::Delivered, deadline());
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
    outbox.keep(&[delta(&"x".repeat(5_000))]).unwrap();
    deliver(&mut outbox, 150..160);
    free_the_disk(&mut outbox);
    outbox.tend().unwrap();
    assert_eq!(remembered().last().map(String::as_str), Some("d159"));
    deliver(&mut outbox, 160..161);
    assert_eq!(remembered(), (61..161).map(|n| format!("d{n}")).collect::<Vec<_>>());
}

#[test]
fn what_is_settled_while_the_file_is_locked_is_not_sent_again_and_written_down_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("a"), delta("b"), delta("c")]).unwrap();
    let other = Connection::open(dir.path().join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let kept = outbox.deliverable(10, deadline()).unwrap();
    let error = outbox.settle(&kept[..1], &DeliveryResult::Delivered, deadline()).unwrap_err();
    assert!(error.to_string().ends_with("cannot be written"), "{error}");
    outbox.settle(&kept[1..2], &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap_err();
    assert_eq!((deckies(&mut outbox), outbox.books().counts.waiting), (vec!["a".to_owned()], 1));
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(deckies(&mut outbox), ["a"]);
    outbox.tend().unwrap();
    assert_eq!(
        deckies(&mut open_as(dir.path(), Role::Contribute)),
        ["a"],
        "now the file knows it too"
    );
}

#[test]
fn another_process_may_add() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs) = (open(dir.path()), open_as(dir.path(), Role::Contribute));
    theirs.keep(&[delta("theirs")]).unwrap();
    assert_eq!(deckies(&mut ours), ["theirs"]);
    assert_eq!(ours.books().counts.waiting, 1);
}

#[test]
fn of_those_that_make_the_file_at_once_none_loses_anything() {
    for round in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let mut outboxes: Vec<_> = std::thread::scope(|scope| {
            let add = |n: usize| {
                let mut outbox =
                    open_as(dir.path(), if n == round { Role::Deliver } else { Role::Contribute });
                outbox.keep(&[delta(&n.to_string())]).unwrap();
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
fn its_files_are_the_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("a")]).unwrap();
    for name in ["heartbeat.db", "heartbeat.db-wal", "heartbeat.db-shm"] {
        let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn a_symlink_is_not_followed() {
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

/// What a look at a file shows, its content and all that `stat` knows but when it was read.
fn looks(path: &Path) -> Option<(String, Option<Vec<u8>>)> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::symlink_metadata(path).ok()?;
    let content = found.is_file().then(|| std::fs::read(path).unwrap());
    let of_file = (found.ino(), found.mode(), found.uid(), found.nlink());
    Some((format!("{of_file:?} {}.{:09}", found.ctime(), found.ctime_nsec()), content))
}

#[test]
fn what_is_no_file_of_its_own_is_refused_and_left_as_it_is() {
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
            let (path, other) = (dir.path().join(FILE), dir.path().join("other"));
            if is_made {
                open(dir.path()).keep(&[delta("d")]).unwrap();
            }
            let place = beside(&path, part);
            let _ = std::fs::remove_file(&place);
            std::fs::write(&other, "").unwrap();
            std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o644)).unwrap();
            make(&place, &other);
            let looked = || (looks(&place), looks(&other), looks(&path));
            let before = looked();
            for role in [Role::Deliver, Role::Contribute] {
                let (outbox, refused) =
                    Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), role).unwrap();
                let refused = chain(&refused.unwrap());
                assert!(
                    refused.contains(&format!("heartbeat.db{part} {problem}")),
                    "{part} {role:?}: {refused}"
                );
                drop(outbox);
                assert_eq!(looked(), before, "{part} {role:?}: {problem}");
            }
            #[cfg(feature = "cli")]
            if is_made {
                assert!(chain(&look(&path).unwrap_err()).contains(problem));
                assert_eq!(looked(), before, "{part}: {problem}");
            }
        }
    }
}

#[test]
fn an_outbox_below_a_symlinked_folder_works() {
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    open(&link).keep(&[delta("d")]).unwrap();
    #[cfg(feature = "cli")]
    assert_eq!(look(&link.join(FILE)).unwrap().map(|found| found.counts.waiting), Some(1));
    assert_eq!(deckies(&mut open(&real)), ["d"]);
    // It leads to another folder, where everything goes.
    let mut outbox = open(&link);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&other, &link).unwrap();
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    assert_eq!(on_disk(&other).len(), 1);
}

#[test]
fn no_name_means_anything_but_a_file_and_none_depends_on_the_folder_of_the_process() {
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
        outbox.keep(&[delta("d")]).unwrap();
        assert!(outbox.path().is_some() && dir.path().join(name).exists());
    }
}

#[test]
fn without_a_file_it_is_in_memory_and_says_so() {
    let gone = OutboxLocation::File("/nonexistent/heartbeat.db".into());
    let (mut outbox, problem) = Outbox::open_at(&gone, Path::new("/"), Role::Deliver).unwrap();
    assert_eq!(problem.unwrap().to_string(), "outbox /nonexistent/heartbeat.db: cannot be written");
    outbox.keep(&[delta("a")]).unwrap();
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

/// What is on the disk, as another program would see it: decky, error, owned or not.
fn on_disk(dir: &Path) -> Vec<(String, Option<String>, bool)> {
    let database = Connection::open(dir.join(FILE)).unwrap();
    let mut select =
        database.prepare("SELECT decky, error, owner IS NOT NULL FROM delta ORDER BY id").unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

/// The file's connection, or that of the copy where there is no file.
fn connection(outbox: &mut Outbox) -> &mut Connection {
    let store = &mut outbox.store;
    if store.file.is_none() {
        return &mut store.in_memory().unwrap().db;
    }
    &mut store.file.as_mut().unwrap().0.db
}

/// Makes the file refuse every change, as a full disk does, until it is undone.
pub(super) fn fill_the_disk(outbox: &mut Outbox) -> i64 {
    let db = connection(outbox);
    let pages: i64 = db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| row.get(0)).unwrap()
}

pub(super) fn free_the_disk(outbox: &mut Outbox) {
    connection(outbox).query_row("PRAGMA max_page_count = 1000000", [], |_| Ok(())).unwrap();
    // As if the moment in which it is left alone had passed.
    if let Some((_, why)) = outbox.store.refused {
        outbox.store.refused = Some((Instant::now(), why));
    }
}

#[test]
fn an_older_delta_is_held_back_while_a_newer_operation_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d"), delta("other")]).unwrap();
    let id = begin(&mut outbox, "d");
    outbox.keep(&[LifecycleDelta::succeeded("d", Operation::Deploy)]).unwrap();
    assert_eq!(deckies(&mut outbox), ["d", "other"], "the deploy of d, and not its mutate");
    assert_eq!(counted(&mut outbox), (3, 1, 1));
    outbox.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    let kept = outbox.deliverable(10, deadline()).unwrap();
    let outcomes: Vec<_> = kept.iter().map(|kept| kept.delta.outcome().clone()).collect();
    let failed = || Outcome::Failed("why".to_owned());
    assert_eq!(outcomes, [Outcome::Succeeded, Outcome::Succeeded, failed(), failed()]);
    assert!(kept.is_sorted_by(|newer, older| newer.id > older.id) && kept[1].id == id);
}

#[test]
fn once_nobody_is_at_work_nothing_counts_as_held_without_another_look() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d")]).unwrap();
    let id = begin(&mut outbox, "d");
    assert_eq!(counted(&mut outbox), (1, 1, 1));
    outbox.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    let QueueCounts { waiting, held, .. } = outbox.books().counts;
    assert_eq!((waiting, held), (2, 0));
    let ids = outbox.deliverable(2, deadline()).unwrap().into_iter().map(|kept| kept.id).collect();
    outbox.note(RowChange::Answered(ids, DeliveryResult::Delivered));
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!(outbox.books().counts, QueueCounts::default());
}

#[test]
fn of_operations_that_overlap_the_one_that_began_first_is_the_older() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let (first, second) = (begin(&mut outbox, "d"), begin(&mut outbox, "d"));
    outbox.end(ended(first, delta("d")), SentBy::Deliverer).unwrap();
    assert!(deckies(&mut outbox).is_empty(), "the newer one is in flight");
    outbox.end(ended(second, succeeded("d")), SentBy::Deliverer).unwrap();
    let ids: Vec<_> =
        outbox.deliverable(10, deadline()).unwrap().into_iter().map(|kept| kept.id).collect();
    assert_eq!(ids, [second, first]);
}

#[cfg(feature = "cli")]
#[test]
fn what_is_overtaken_is_not_to_be_posted_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut track, mut outbox) = (open_as(dir.path(), Role::Contribute), open(dir.path()));
    let id = begin(&mut track, "d");
    let ours = QueuedDelta { id, delta: succeeded("d") };
    let mut overtaken = || track.is_overtaken(&ours).unwrap();
    outbox.keep(&[delta("other"), LifecycleDelta::succeeded("d", Operation::Deploy)]).unwrap();
    assert!(!overtaken(), "by another decky's, or by another operation of this one");
    outbox.keep(&[delta("d")]).unwrap();
    assert!(overtaken(), "by a delta that waits");
    let waiting = outbox.deliverable(1, deadline()).unwrap();
    outbox.settle(&waiting, &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap();
    assert!(!overtaken(), "by one that the master will never take");
    begin(&mut outbox, "d");
    assert!(overtaken(), "by an operation in flight");
}

#[test]
fn an_operation_whose_process_died_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let mut theirs = open(dir.path());
    begin(&mut theirs, "d");
    // Its lock goes with it, as it would with a killed process.
    drop(theirs);
    let mut outbox = open(dir.path());
    let kept = outbox.deliverable(10, deadline()).unwrap();
    assert_eq!(
        kept[0].delta.outcome(),
        &Outcome::Failed("the agent restarted during mutate".to_owned())
    );
    assert!(kept[0].delta.when().elapsed().unwrap() < Duration::from_secs(60));
    assert_eq!(counted(&mut outbox), (1, 0, 0));
}

#[test]
fn an_operation_whose_process_lives_is_left_alone_until_it_dies() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    begin(&mut track, "e");
    let mut outbox = open(dir.path());
    outbox.tend().unwrap();
    assert_eq!(outbox.books().counts.operations, 2);
    track.end(ended(id, succeeded("d")), SentBy::ThisProcess).unwrap();
    assert!(deckies(&mut outbox).is_empty(), "track posts it itself");
    drop(track);
    outbox.tend().unwrap();
    let outcomes: Vec<_> = outbox
        .deliverable(10, deadline())
        .unwrap()
        .into_iter()
        .map(|kept| kept.delta.outcome().clone())
        .collect();
    let failed = Outcome::Failed("its process ended during mutate".to_owned());
    assert_eq!(
        outcomes,
        [failed, Outcome::Succeeded],
        "and the one that it could not post is ours now"
    );
}

/// The outbox that another process locks, which is this test program once more.
const LOCKED: &str = "DECNET_HEARTBEAT_TEST_LOCKED";

/// No test by itself: what the other process does.
#[test]
fn another_process() {
    let Some(outbox) = std::env::var_os(LOCKED) else { return };
    let mut locks = locks::Locks::new();
    assert_eq!(locks.deliver(Path::new(&outbox), &Arc::default()).unwrap(), Deliverer::Us);
    locks.is_named = true;
    // The test program has written something to this line.
    writeln!(std::io::stdout(), "\n{}", locks.token).unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Another process, which has the delivery lock and a place as an owner, until its input ends or it is killed.
pub(super) struct Another {
    child: std::process::Child,
    /// How rows name it.
    pub(super) token: String,
}

impl Another {
    pub(super) fn of(outbox: &Path) -> Self {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let command = command
            .args(["--exact", "outbox::tests::another_process", "--nocapture"])
            .env(LOCKED, outbox);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.as_mut().unwrap()).lines().map(Result::unwrap);
        let token = said.find(|line| line.contains('@')).unwrap();
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

impl Drop for Another {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

#[test]
fn a_second_one_that_delivers_hears_who_does_already() {
    let dir = tempfile::tempdir().unwrap();
    let other = Another::of(&dir.path().join(FILE));
    let error = Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver).unwrap_err();
    let expected = format!(
        "outbox {}: is delivered from by process {} already; stop that one, or use another file",
        dir.path().join(FILE).display(),
        other.pid()
    );
    assert_eq!(error.to_string(), expected);
    drop(other);
    open(dir.path());
}

#[test]
fn a_locked_file_is_waited_for_a_second_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let other = Connection::open(dir.path().join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let since = Instant::now();
    let error = outbox.keep(&[delta("d")]).unwrap_err().to_string();
    assert!(since.elapsed() < Duration::from_millis(1_500), "{:?}", since.elapsed());
    assert!(error.ends_with("is locked by another process; nothing was kept"), "{error}");
    let error = outbox.begin(Operation::Deploy, &["d".to_owned()]).unwrap_err();
    assert!(
        error.to_string().ends_with("is locked by another process; nothing was kept"),
        "{error}"
    );
    other.execute_batch("COMMIT").unwrap();
    outbox.keep(&[delta("later")]).unwrap();
    assert_eq!(deckies(&mut outbox), ["later"], "what was refused was not kept");
}

#[test]
fn a_file_that_is_locked_at_the_start_is_waited_for_a_second_and_is_no_broken_one() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).keep(&[delta("d")]).unwrap();
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
    outbox.keep(&[delta("e")]).unwrap();
    assert_eq!(outbox.path(), None);
    drop(other);
    outbox.tend().unwrap();
    assert_eq!(
        (deckies(&mut outbox), outbox.path().is_some()),
        (vec!["e".to_owned(), "d".to_owned()], true)
    );
}

#[test]
fn a_file_that_another_process_writes_to_is_opened_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let _other = lock_the_file(dir.path());
    let mut outbox = open_as(dir.path(), Role::Contribute);
    assert!(outbox.path().is_some());
    let error = outbox.keep(&[delta("d")]).unwrap_err().to_string();
    assert!(error.ends_with("is locked by another process; nothing was kept"), "{error}");
}

#[test]
fn a_full_disk_turns_it_to_memory_and_it_goes_back_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("before"), delta("delivered"), delta("rejected")]).unwrap();
    let id = begin(&mut outbox, "running");
    fill_the_disk(&mut outbox);
    let many: Vec<_> = (0..200).map(|n| delta(&format!("{n:0500}"))).collect();
    outbox.keep(&many).unwrap();
    assert_eq!(outbox.path(), None, "not all of it is on the disk");
    outbox.end(ended(id, succeeded("running")), SentBy::Deliverer).unwrap_err();
    let kept = outbox.deliverable(500, deadline()).unwrap();
    assert_eq!(kept.len(), 204);
    let of = |decky: &str| {
        kept.iter().filter(|kept| kept.delta.decky() == decky).cloned().collect::<Vec<_>>()
    };
    outbox.settle(&of("delivered"), &DeliveryResult::Delivered, deadline()).unwrap_err();
    outbox
        .settle(&of("rejected"), &DeliveryResult::Rejected("no".to_owned()), deadline())
        .unwrap_err();
    assert_eq!(outbox.deliverable(500, deadline()).unwrap().len(), 202);
    assert_eq!(on_disk(dir.path()).len(), 4);
    free_the_disk(&mut outbox);
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    let before = outbox.deliverable(500, deadline()).unwrap();
    drop(outbox);
    let mut outbox = open(dir.path());
    assert_eq!(outbox.deliverable(500, deadline()).unwrap(), before);
    assert_eq!(before.len(), 202);
    assert!(before.windows(2).all(|pair| pair[0].id > pair[1].id));
    assert_eq!(before[201].delta.decky(), "before", "the oldest is the oldest still");
}

#[test]
fn a_file_that_has_just_refused_is_left_alone_for_a_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    fill_the_disk(&mut outbox);
    let before = Instant::now();
    outbox.keep(&[delta(&"d".repeat(5_000))]).unwrap();
    let (until, why) = outbox.store.refused.unwrap();
    assert!(until >= before + limits::OUTBOX_RETRY);
    assert_eq!(why, FileProblem::Unwritable);
    free_the_disk(&mut outbox);
    outbox.store.refused = Some((Instant::now() + Duration::from_secs(60), why));
    outbox.keep(&[delta("e")]).unwrap();
    assert_eq!(outbox.path(), None);
    free_the_disk(&mut outbox);
    outbox.keep(&[delta("f")]).unwrap();
    assert!(outbox.path().is_some());
}

#[test]
fn a_file_that_cannot_be_had_at_first_is_gone_to_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("later").join(FILE);
    let location = OutboxLocation::File(path.clone());
    let (mut outbox, problem) = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap();
    assert!(problem.is_some());
    outbox.keep(&[delta("d")]).unwrap();
    let id = begin(&mut outbox, "e");
    outbox.tend().unwrap();
    assert_eq!(outbox.path(), None);
    std::fs::create_dir(dir.path().join("later")).unwrap();
    outbox.tend().unwrap();
    assert_eq!(outbox.path(), Some(path.as_path()));
    outbox.end(ended(id, succeeded("e")), SentBy::Deliverer).unwrap();
    drop(outbox);
    let (mut outbox, problem) = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap();
    assert!(problem.is_none());
    assert_eq!(deckies(&mut outbox), ["e", "d"]);
}

#[test]
fn a_file_that_is_removed_is_made_anew_with_all_that_was_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d")]).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.count();
    assert_eq!(outbox.path(), None, "nobody would find it there");
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.keep(&[delta("e")]).unwrap();
    assert!(outbox.path().is_some(), "also with the next change");
    drop(outbox);
    assert_eq!(deckies(&mut open(dir.path())), ["e", "d"]);
}

#[test]
fn what_was_settled_while_the_file_was_elsewhere_is_settled_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, elsewhere) = (dir.path().join("agent"), dir.path().join("elsewhere"));
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    outbox.keep(&["a", "b", "c"].map(delta)).unwrap();
    std::fs::rename(&agent, &elsewhere).unwrap();
    outbox.tend().unwrap();
    assert_eq!(outbox.path(), None);
    let waiting = outbox.deliverable(3, deadline()).unwrap();
    outbox.settle(&waiting[..1], &DeliveryResult::Delivered, deadline()).unwrap();
    outbox.settle(&waiting[1..2], &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap();
    outbox.keep(&[delta("d")]).unwrap();
    std::fs::rename(&elsewhere, &agent).unwrap();
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    assert_eq!(deckies(&mut outbox), ["d", "a"]);
    drop(outbox);
    assert_eq!(deckies(&mut open(&agent)), ["d", "a"]);
    assert_eq!(on_disk(&agent).len(), 3, "the rejected one is kept with its reason");
}

#[test]
fn what_another_process_adds_to_the_new_file_first_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let mut ours = open(dir.path());
    ours.keep(&[delta("ours")]).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    let mut theirs = open_as(dir.path(), Role::Contribute);
    theirs.keep(&[delta("theirs")]).unwrap();
    assert!(theirs.path().is_some(), "it is on the disk");
    ours.tend().unwrap();
    assert_eq!(deckies(&mut ours), ["theirs", "ours"]);
}

#[test]
fn what_is_no_outbox_is_moved_aside_and_nothing_of_it_is_lost() {
    let sql = |path: &Path, sql: &str| Connection::open(path).unwrap().execute_batch(sql).unwrap();
    let foreign = |path: &Path| sql(path, "CREATE TABLE theirs (a)");
    let text = |path: &Path| {
        std::fs::write(path, "not a database, and longer than a header is\n".repeat(9)).unwrap()
    };
    let broken = |path: &Path| {
        let mut outbox =
            Outbox::open_at(&OutboxLocation::File(path.to_owned()), Path::new("/"), Role::Deliver)
                .unwrap()
                .0;
        (0..200).for_each(|n| outbox.keep(&[delta(&format!("{n:0200}"))]).unwrap());
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
    // In the middle of one page of many.
    let one_page = |path: &Path| {
        let rows: Vec<_> = (0..200).map(|n| delta(&format!("{n:0200}"))).collect();
        open(path.parent().unwrap()).keep(&rows).unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        let page = bytes.len() / 4_096 / 2 * 4_096;
        bytes[page..page + 4_096].iter_mut().for_each(|byte| *byte = !*byte);
        std::fs::write(path, bytes).unwrap();
    };
    let later_version = |path: &Path| {
        open(path.parent().unwrap()).keep(&[delta("later")]).unwrap();
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
        &broken,
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
        assert!(contributor.1.is_some(), "not its to care for");
        assert!(std::fs::read(&path).unwrap() == before, "it is as it was");
        let mut outbox = open(dir.path());
        outbox.keep(&[delta("d")]).unwrap();
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let aside = names
            .filter(|name| name.to_str().unwrap().contains("heartbeat.db-aside-"))
            .collect::<Vec<_>>();
        assert_eq!(aside.len(), 1, "{aside:?}");
        assert!(std::fs::read(&aside[0]).unwrap() == before, "it is as it was");
        assert_eq!(deckies(&mut outbox), ["d"]);
    }
}

#[test]
fn a_log_that_is_damaged_costs_no_file_and_nothing_that_is_before_the_damage() {
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
        // Its end brings it to the database.
        open(dir.path()).keep(&[delta("a")]).unwrap();
        let mut killed = open(dir.path());
        ["b", "c"].iter().for_each(|decky| killed.keep(&[delta(decky)]).unwrap());
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
        outbox.keep(&[delta("after")]).unwrap();
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
fn an_empty_file_becomes_an_outbox() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE), "").unwrap();
    open_as(dir.path(), Role::Contribute).keep(&[delta("a")]).unwrap();
    assert_eq!(deckies(&mut open(dir.path())), ["a"]);
}

/// Changes the file as nobody of ours would.
fn spoil(dir: &Path, sql: &str) {
    Connection::open(dir.join(FILE)).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn text_that_is_broken_keeps_no_other_row_from_the_master() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).keep(&[delta("good")]).unwrap();
    spoil(
        dir.path(),
        "INSERT INTO delta (decky, operation, error, completed_at, owner) VALUES
             (CAST(x'61ff' AS TEXT), 'deploy', CAST(x'ff' AS TEXT), 1, NULL),
             ('theirs', 'deploy', NULL, NULL, CAST(x'ff' AS TEXT))",
    );
    let mut outbox = open(dir.path());
    assert_eq!(deckies(&mut outbox), ["theirs", "a\u{fffd}", "good"]);
    // What was in the file goes to the next one as it is.
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    let kept = outbox.deliverable(10, deadline()).unwrap();
    assert_eq!(kept[1].delta.outcome(), &Outcome::Failed("\u{fffd}".to_owned()));
    outbox.settle(&kept, &DeliveryResult::Delivered, deadline()).unwrap();
    assert!(on_disk(dir.path()).is_empty());
}

#[test]
fn a_broken_sequence_of_ids_costs_no_row() {
    for broken in ["1", "-5", "'x'", "1.5", "NULL"] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).keep(&[delta("a"), delta("b")]).unwrap();
        spoil(
            dir.path(),
            &format!("UPDATE delta SET id = id % 2 + 1; UPDATE sqlite_sequence SET seq = {broken}"),
        );
        let mut outbox = open(dir.path());
        outbox.keep(&[delta("c")]).unwrap();
        let mut deckies = deckies(&mut outbox);
        deckies.sort();
        assert_eq!(deckies, ["a", "b", "c"], "{broken}");
    }
}

#[test]
fn a_delta_with_an_id_below_all_others_goes_out_too() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).keep(&[delta("d")]).unwrap();
    spoil(dir.path(), "UPDATE delta SET id = -1");
    let mut outbox = open(dir.path());
    assert_eq!((deckies(&mut outbox), outbox.books().counts.held), (vec!["d".to_owned()], 0));
}

#[test]
fn where_no_ids_are_left_a_new_file_is_begun() {
    for used_up in [
        "UPDATE delta SET id = 9223372036854775807",
        "UPDATE sqlite_sequence SET seq = 9223372036854775806",
    ] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).keep(&[delta("d")]).unwrap();
        spoil(dir.path(), used_up);
        let mut outbox = open(dir.path());
        outbox.keep(&[delta("e")]).unwrap();
        assert_eq!(deckies(&mut outbox), ["e"]);
    }
}

#[test]
fn ages_that_cannot_be_do_not_stop_the_others() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).keep(&[delta("good"), delta("old"), delta("young")]).unwrap();
    spoil(
        dir.path(),
        "UPDATE delta SET age = 9223372036854775807 WHERE decky = 'old';
         UPDATE delta SET age = -9223372036854775807 WHERE decky = 'young'",
    );
    let mut outbox = open(dir.path());
    outbox.pass(limits::OUTBOX_AGING).unwrap();
    assert_eq!(
        (deckies(&mut outbox), outbox.books().dropped),
        (vec!["young".to_owned(), "good".to_owned()], 1)
    );
    let database = Connection::open(dir.path().join(FILE)).unwrap();
    let oldest: i64 =
        database.query_row("SELECT max(age) FROM delta", [], |row| row.get(0)).unwrap();
    assert_eq!(oldest, 3600);
}

#[test]
fn a_file_that_breaks_while_it_is_open_is_moved_aside_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let mut outbox = open(dir.path());
    outbox.keep(&(0..400).map(|n| delta(&format!("{n:0200}"))).collect::<Vec<_>>()).unwrap();
    // Into the file, out of SQLite's cache, and then broken.
    outbox.store.read(|db| db.execute_batch("PRAGMA cache_size = 0")).unwrap();
    Connection::open(&path)
        .unwrap()
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![0xa5; length as usize]).unwrap();
    for _ in 0..3 {
        let _ = outbox.keep(&[delta("meanwhile")]);
        let _ = outbox.tend();
    }
    outbox.keep(&[delta("after")]).unwrap();
    assert_eq!(deckies(&mut outbox)[0], "after");
    assert!(outbox.path().is_some());
}

#[test]
fn beyond_its_rows_the_oldest_fall_out_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let id = begin(&mut outbox, "running");
    outbox
        .keep(&(0..limits::OUTBOX_ROWS - 1).map(|n| delta(&n.to_string())).collect::<Vec<_>>())
        .unwrap();
    assert_eq!(outbox.books().dropped, 0);
    let oldest = outbox.deliverable(limits::OUTBOX_ROWS, deadline()).unwrap().pop().unwrap();
    outbox.settle(&[oldest], &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap();
    outbox.keep(&[delta("a"), delta("b"), delta("c")]).unwrap();
    assert_eq!(outbox.books().dropped, 2, "and the rejected one before them");
    let kept = outbox.deliverable(limits::OUTBOX_ROWS, deadline()).unwrap();
    assert_eq!((kept.len(), kept.last().unwrap().delta.decky()), (limits::OUTBOX_ROWS - 1, "3"));
    outbox.end(ended(id, succeeded("running")), SentBy::Deliverer).unwrap();
    let error = outbox.keep(&vec![delta("many"); limits::OUTBOX_ROWS + 1]).unwrap_err();
    assert!(error.to_string().contains("has no room for 10001 more"), "{error}");
}

#[test]
fn operations_in_flight_never_fall_out() {
    let mut outbox =
        Outbox::open_at(&OutboxLocation::Memory, Path::new("/"), Role::Deliver).unwrap().0;
    let many: Vec<_> = (0..limits::OUTBOX_ROWS).map(|n| n.to_string()).collect();
    let ids = outbox.begin(Operation::Deploy, &many).unwrap();
    let error = outbox.keep(&[delta("d")]).unwrap_err();
    let text =
        "outbox in memory: has no room for 1 more: it holds 10000 rows, less what is in flight";
    assert_eq!(error.to_string(), text);
    outbox.end(ended(ids[0], succeeded("0")), SentBy::Deliverer).unwrap();
    outbox.keep(&[delta("d")]).unwrap();
    assert_eq!(
        (counted(&mut outbox), outbox.books().dropped, outbox.books().on_disk),
        ((1, 0, 9_999), 1, false)
    );
    outbox.keep(&[delta("e")]).unwrap();
    outbox.keep(&[delta("f"), delta("g")]).unwrap_err();
    assert_eq!((deckies(&mut outbox), outbox.books().dropped), (vec!["e".to_owned()], 2));
}

#[test]
fn after_seven_days_of_waiting_a_delta_falls_out_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let day = Duration::from_secs(24 * 3600);
    outbox.keep(&[delta("old")]).unwrap();
    begin(&mut outbox, "running");
    outbox.pass(day * 4).unwrap();
    outbox.keep(&[delta("young")]).unwrap();
    outbox.pass(day * 3).unwrap();
    assert_eq!(deckies(&mut outbox), ["young", "old"], "seven days are not more than seven days");
    outbox.pass(day).unwrap();
    assert_eq!(deckies(&mut outbox), ["young"]);
    outbox.tend().unwrap();
    assert_eq!((outbox.books().dropped, counted(&mut outbox)), (1, (1, 0, 1)));
}

#[test]
fn what_waits_ages_by_the_hour_and_a_long_sleep_is_no_long_wait() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d")]).unwrap();
    let mut hours = |passed: u32| {
        outbox.aged = Instant::now() - limits::OUTBOX_AGING * passed;
        outbox.tend().unwrap();
        outbox.tend().unwrap();
        let database = Connection::open(dir.path().join(FILE)).unwrap();
        database.query_row("SELECT age / 3600 FROM delta", [], |row| row.get::<_, u32>(0)).unwrap()
    };
    assert_eq!([hours(0), hours(1), hours(1), hours(24 * 30)], [0, 1, 2, 4]);
}

#[test]
fn others_permissions_are_taken_from_a_file_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    open(dir.path()).keep(&[delta("d")]).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_fifo_or_a_folder_does_not_hang_it() {
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
        assert!(chain(&problem.unwrap()).ends_with("not a regular file; move it away"));
    }
}

#[test]
fn the_end_of_an_operation_is_on_the_disk_before_it_goes_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let id = begin(&mut outbox, "d");
    // Noted, and not made yet.
    outbox.note(RowChange::Ended(ended(id, succeeded("d")), SentBy::Deliverer));
    assert_eq!(deckies(&mut outbox), ["d"]);
    // Killed now, it must not be reported failed by the next start: the master may have heard that it succeeded.
    assert_eq!(on_disk(dir.path()), [("d".to_owned(), None, false)]);
}

/// How many transactions the file's log has: each ends with a frame that says how large the file is after it.
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

/// Another process' lock.
fn lock_the_file(dir: &Path) -> Connection {
    let other = Connection::open(dir.join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    other
}

#[test]
fn a_group_is_one_transaction_and_what_has_no_room_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("delivered"), delta("rejected")]).unwrap();
    let kept = outbox.deliverable(2, deadline()).unwrap();
    let running = begin(&mut outbox, "running");
    let before = transactions(dir.path());
    outbox.note(RowChange::Answered(vec![kept[1].id], DeliveryResult::Delivered));
    outbox.note(RowChange::Answered(vec![kept[0].id], DeliveryResult::Rejected("no".to_owned())));
    outbox.note(RowChange::Ended(ended(running, succeeded("running")), SentBy::Deliverer));
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
fn under_another_process_lock_additions_fail_and_changes_are_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("delivered"), delta("waiting")]).unwrap();
    let running = begin(&mut outbox, "running");
    let delivered = outbox.deliverable(2, deadline()).unwrap().pop().unwrap();
    let other = lock_the_file(dir.path());
    outbox.note(RowChange::Answered(vec![delivered.id], DeliveryResult::Delivered));
    outbox.note(RowChange::Ended(ended(running, succeeded("running")), SentBy::Deliverer));
    let by = Instant::now() + Duration::from_millis(50);
    let CommitResult { added, changed } = outbox.commit(&[push(&["a"]), operation("b")], by);
    assert!(changed.unwrap_err().to_string().ends_with("cannot be written"));
    for added in added {
        let error = added.unwrap_err().to_string();
        assert!(error.ends_with("is locked by another process; nothing was kept"), "{error}");
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
fn the_rows_of_an_operation_that_never_began_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d")]).unwrap();
    let names = ["d".to_owned(), "e".to_owned()];
    let first = outbox.begin(Operation::Mutate, &names).unwrap()[0];
    assert_eq!(counted(&mut outbox), (1, 1, 2));
    outbox.note(RowChange::Withdrawn(first..first + 2));
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 0), vec!["d".to_owned()]));
    assert_eq!(on_disk(dir.path()).len(), 1);
}

#[test]
fn a_transaction_that_fails_or_panics_loses_no_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("a"), delta("b")]).unwrap();
    let kept = outbox.deliverable(2, deadline()).unwrap();
    outbox.note(RowChange::Answered(vec![kept[0].id], DeliveryResult::Delivered));
    let panics = || outbox.change::<()>(deadline(), |_, _| panic!("in the middle of it"));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
    // Neither the file nor memory takes it: the master's word needs more room than there is.
    fill_the_disk(&mut outbox);
    let copy = &outbox.store.in_memory().unwrap().db;
    copy.query_row("PRAGMA max_page_count = 1", [], |_| Ok(())).unwrap();
    outbox
        .note(RowChange::Answered(vec![kept[1].id], DeliveryResult::Rejected("no".repeat(50_000))));
    let CommitResult { added, changed } = outbox.commit(&[push(&["c"])], deadline());
    assert!(
        added
            .into_iter()
            .all(|added| added.unwrap_err().to_string().ends_with("cannot keep anything"))
    );
    changed.unwrap_err();
    assert_eq!(
        deckies(&mut outbox),
        ["a"],
        "what was delivered is not offered again, whatever the disk says"
    );
    assert_eq!(outbox.path(), None);
    free_the_disk(&mut outbox);
    outbox.tend().unwrap();
    assert!(deckies(&mut outbox).is_empty());
    let rows = on_disk(dir.path()).into_iter().map(|(decky, ..)| decky).collect::<Vec<_>>();
    assert_eq!((rows, outbox.books().counts.rejected), (vec!["a".to_owned()], 1));
}

#[test]
fn a_second_one_waits_for_one_whose_heartbeat_has_stopped_and_takes_over() {
    for is_dropped in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut first = open(dir.path());
        first.keep(&[delta("d")]).unwrap();
        begin(&mut first, "running");
        let refused =
            Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver).unwrap_err();
        let us = std::process::id();
        assert!(
            refused.to_string().contains(&format!("is delivered from by process {us} already")),
            "{refused}"
        );
        first.books.note_stop();
        let mut second = open(dir.path());
        assert!(deckies(&mut second).is_empty());
        second.keep(&[delta("e")]).unwrap();
        second.tend().unwrap();
        assert!(deckies(&mut second).is_empty(), "the first one delivers");
        assert_eq!(deckies(&mut first), ["e", "d"]);
        let _stopped = if is_dropped {
            drop(first);
            None
        } else {
            first.stop_delivering().unwrap();
            Some(first)
        };
        second.tend().unwrap();
        if is_dropped {
            let failed = Outcome::Failed("its process ended during mutate".to_owned());
            let kept = second.deliverable(10, deadline()).unwrap();
            assert_eq!(deckies(&mut second), ["e", "running", "d"]);
            assert_eq!(kept[1].delta.outcome(), &failed);
        } else {
            assert_eq!(deckies(&mut second), ["e", "d"], "the operation is still in flight");
        }
    }
}

/// Removes the lock file, as somebody does who deletes the agent dir or tidies up in it.
fn stuck(path: &Path) -> Vec<UnjudgedRow> {
    look(path).unwrap().unwrap().stuck
}

fn remove_the_lock_file(dir: &Path) {
    std::fs::remove_file(locks::beside(&dir.join(FILE), "-lock")).unwrap();
}

#[test]
fn a_deliverer_whose_lock_file_was_replaced_stops_at_its_next_tick_while_another_one_delivers() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d")]).unwrap();
    remove_the_lock_file(dir.path());
    let other = Another::of(&dir.path().join(FILE));
    outbox.tend().unwrap();
    assert!(deckies(&mut outbox).is_empty());
    outbox.keep(&[delta("e")]).unwrap();
    assert_eq!(on_disk(dir.path()).len(), 2, "it still adds");
    drop(other);
    outbox.tend().unwrap();
    assert_eq!(deckies(&mut outbox), ["e", "d"]);
}

#[test]
fn a_deliverer_whose_lock_file_was_removed_has_the_next_one_at_its_next_tick() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("d")]).unwrap();
    remove_the_lock_file(dir.path());
    outbox.tend().unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
    Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver)
        .expect_err("it has the lock");
}

#[test]
fn a_lock_file_that_cannot_be_used_stops_no_delivery() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let id = begin(&mut outbox, "running");
    remove_the_lock_file(dir.path());
    let lock = locks::beside(&dir.path().join(FILE), "-lock");
    assert!(std::process::Command::new("mkfifo").arg(&lock).status().unwrap().success());
    outbox.tend().unwrap();
    outbox.end(ended(id, succeeded("running")), SentBy::Deliverer).unwrap();
    assert_eq!(deckies(&mut outbox), ["running"]);
    std::fs::remove_file(&lock).unwrap();
    outbox.tend().unwrap();
    assert!(lock.is_file());
}

#[test]
fn no_operation_fails_by_a_replaced_lock_file_while_its_process_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    let mut outbox = open(dir.path());
    remove_the_lock_file(dir.path());
    outbox.tend().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "the old lock file is still open");
    // One that has seen the new lock file only.
    drop(outbox);
    let mut outbox = open(dir.path());
    outbox.tend().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "the new lock file is too young");
    track.look_after_rows();
    outbox.store.locks.settle();
    outbox.tend().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "its process is locked in the new one, too");
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
}

#[test]
fn an_operation_of_a_replaced_lock_file_has_failed_a_minute_after_its_process_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    begin(&mut track, "d");
    // Another process may have it open still, so that no new file gets its inode.
    let _old = std::fs::File::open(locks::beside(&dir.path().join(FILE), "-lock")).unwrap();
    remove_the_lock_file(dir.path());
    drop(track);
    let mut outbox = open(dir.path());
    assert_eq!(counted(&mut outbox), (0, 0, 1));
    outbox.store.locks.settle();
    outbox.tend().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 0), vec!["d".to_owned()]));
}

#[cfg(feature = "cli")]
#[test]
fn what_nobody_could_tell_of_for_a_day_is_named_until_it_can_be_told() {
    let dir = tempfile::tempdir().unwrap();
    let (path, day) = (dir.path().join(FILE), Duration::from_secs(24 * 3600));
    let lock = locks::beside(&path, "-lock");
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    remove_the_lock_file(dir.path());
    let mut outbox = open(dir.path());
    remove_the_lock_file(dir.path());
    std::fs::create_dir(&lock).unwrap();
    begin(&mut outbox, "ours");
    outbox.tend().unwrap();
    outbox.pass(day - Duration::from_secs(1)).unwrap();
    assert_eq!(stuck(&path), []);
    assert_eq!(outbox.said_stuck, None);
    outbox.pass(Duration::from_secs(1)).unwrap();
    let expected =
        UnjudgedRow { id, decky: "d".to_owned(), operation: "mutate".to_owned(), time: day };
    assert_eq!(expected.to_string(), format!("mutate of d (row {id}, for 1day)"));
    assert_eq!(stuck(&path), [expected]);
    let said = outbox.said_stuck;
    outbox.pass(day * 30).unwrap();
    assert!(said.is_some() && outbox.said_stuck == said, "once a day");
    assert_eq!(counted(&mut outbox), (0, 0, 2), "it is left alone");
    // Now it can be told that its process has ended.
    std::fs::remove_dir(&lock).unwrap();
    drop(track);
    outbox.tend().unwrap();
    outbox.store.locks.settle();
    outbox.tend().unwrap();
    outbox.pass(day).unwrap();
    assert_eq!(
        (deckies(&mut outbox), stuck(&path)),
        (vec!["d".to_owned()], vec![]),
        "it waits from now on"
    );
}

#[test]
fn a_process_without_a_heartbeat_takes_its_rows_to_an_agent_dir_that_was_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut track = open_as(&agent, Role::Contribute);
    let id = begin(&mut track, "d");
    std::fs::remove_dir_all(&agent).unwrap();
    track.look_after_rows();
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    track.look_after_rows();
    outbox.store.locks.settle();
    outbox.tend().unwrap();
    assert_eq!(counted(&mut outbox), (0, 0, 1), "it is in flight there, and its process runs");
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
}

#[test]
fn where_the_agent_dir_is_made_again_each_delta_is_delivered_once() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    outbox.keep(&[delta("waits")]).unwrap();
    let mut track = open_as(&agent, Role::Contribute);
    let id = begin(&mut track, "d");
    std::fs::remove_dir_all(&agent).unwrap();
    std::fs::create_dir(&agent).unwrap();
    outbox.tend().unwrap();
    let kept = outbox.deliverable(10, deadline()).unwrap();
    assert_eq!((kept.len(), counted(&mut outbox)), (1, (1, 0, 1)));
    outbox.settle(&kept, &DeliveryResult::Delivered, deadline()).unwrap();
    // It has not looked at its files since, and posts its delta itself.
    let ours = ended(id, succeeded("d"));
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    track.settle(&ours, &DeliveryResult::Delivered, deadline()).unwrap();
    drop(track);
    outbox.tend().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[test]
fn what_was_delivered_from_the_new_file_is_not_moved_there_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    track.settle(&ours, &DeliveryResult::Delivered, deadline()).unwrap();
    drop(track);
    // It has only the older file open, in which the operation is in flight.
    outbox.tend().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[test]
fn what_was_delivered_while_the_file_was_replaced_is_not_moved_to_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    track.settle(&ours, &DeliveryResult::Delivered, deadline()).unwrap();
    drop(track);
    outbox.tend().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[cfg(feature = "cli")]
#[test]
fn what_has_ended_in_the_new_file_is_not_in_flight_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    outbox.tend().unwrap();
    track.release(&ours).unwrap();
    drop(track);
    outbox.tend().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 0), vec!["d".to_owned()]));
}

#[test]
fn what_another_process_has_delivered_does_not_come_back_with_an_older_copy_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let backup = dir.path().join("backup");
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let ours = ended(begin(&mut track, "d"), succeeded("d"));
    spoil(dir.path(), &format!("VACUUM INTO '{}'", backup.display()));
    track.end(ours.clone(), SentBy::ThisProcess).unwrap();
    track.settle(&ours, &DeliveryResult::Delivered, deadline()).unwrap();
    drop(track);
    // Its log would still be there.
    ["-wal", "-shm"]
        .iter()
        .for_each(|part| std::fs::remove_file(beside(&dir.path().join(FILE), part)).unwrap());
    std::fs::rename(&backup, dir.path().join(FILE)).unwrap();
    outbox.tend().unwrap();
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((0, 0, 0), Vec::<String>::new()));
}

#[test]
fn where_nobody_delivers_what_waits_is_taken_to_an_agent_dir_that_was_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut track = open_as(&agent, Role::Contribute);
    track.keep(&[delta("waits")]).unwrap();
    begin(&mut track, "d");
    std::fs::remove_dir_all(&agent).unwrap();
    std::fs::create_dir(&agent).unwrap();
    track.look_after_rows();
    let mut outbox = open(&agent);
    assert_eq!((counted(&mut outbox), deckies(&mut outbox)), ((1, 0, 1), vec!["waits".to_owned()]));
}

#[test]
fn a_process_looks_after_its_rows_as_long_as_it_has_some() {
    let dir = tempfile::tempdir().unwrap();
    let mut track = open_as(dir.path(), Role::Contribute);
    track.keep(&[delta("e")]).unwrap();
    assert!(!track.is_named());
    let id = begin(&mut track, "d");
    track.look_after_rows();
    assert!(track.is_named());
    track.end(ended(id, succeeded("d")), SentBy::ThisProcess).unwrap();
    track.look_after_rows();
    assert!(track.is_named(), "it posts it itself");
    track.settle(&ended(id, succeeded("d")), &DeliveryResult::Delivered, deadline()).unwrap();
    track.look_after_rows();
    assert!(!track.is_named());
}

#[test]
fn one_that_delivers_later_takes_over_from_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let other = Another::of(&dir.path().join(FILE));
    let mut outbox = open_as(dir.path(), Role::DeliverLater);
    outbox.keep(&[delta("d")]).unwrap();
    outbox.tend().unwrap();
    assert!(deckies(&mut outbox).is_empty());
    assert_eq!(outbox.books().counts.waiting, 1);
    drop(other);
    outbox.tend().unwrap();
    assert_eq!(deckies(&mut outbox), ["d"]);
    Outbox::open_at(&OutboxLocation::AgentDir, dir.path(), Role::Deliver)
        .expect_err("it has the lock");
}

/// An operation of a process that lives, and an older delta that waits for it.
fn beside_a_living_one(dir: &Path) -> (Outbox, Outbox) {
    let mut outbox = open(dir);
    outbox.keep(&[delta("theirs"), delta("ours")]).unwrap();
    let mut track = open_as(dir, Role::Contribute);
    begin(&mut track, "theirs");
    (outbox, track)
}

#[test]
fn in_memory_rows_of_other_processes_hold_older_ones_back_and_are_never_judged() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, elsewhere) = (dir.path().join("agent"), dir.path().join("elsewhere"));
    std::fs::create_dir(&agent).unwrap();
    let (mut outbox, _track) = beside_a_living_one(&agent);
    fill_the_disk(&mut outbox);
    outbox.keep(&[delta(&"x".repeat(5_000))]).unwrap();
    outbox.keep(&[delta("theirs")]).unwrap();
    assert_eq!((counted(&mut outbox), outbox.path()), ((4, 1, 1), None));
    outbox.tend().unwrap_err();
    assert_eq!(counted(&mut outbox), (4, 1, 1), "its process lives");
    // Now nobody can say whether it does.
    std::fs::rename(&agent, &elsewhere).unwrap();
    outbox.tend().unwrap();
    assert_eq!(counted(&mut outbox), (4, 1, 1));
    assert_eq!(deckies(&mut outbox), ["theirs", &"x".repeat(5_000), "ours"]);
    std::fs::rename(&elsewhere, &agent).unwrap();
    outbox.tend().unwrap();
    assert_eq!((outbox.path().is_some(), counted(&mut outbox)), (true, (4, 1, 1)));
}

#[test]
fn the_end_that_another_process_reports_is_seen_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut track = open_as(dir.path(), Role::Contribute);
    let id = begin(&mut track, "d");
    fill_the_disk(&mut outbox);
    outbox.keep(&[delta(&"x".repeat(5_000))]).unwrap();
    assert_eq!(counted(&mut outbox), (1, 0, 1));
    track.end(ended(id, succeeded("d")), SentBy::Deliverer).unwrap();
    assert_eq!((counted(&mut outbox), outbox.path()), ((2, 0, 0), None));
    assert_eq!(
        outbox.deliverable(2, deadline()).unwrap()[1].delta,
        succeeded("d").completed_at(outbox.deliverable(2, deadline()).unwrap()[1].delta.when())
    );
}

/// The row as another program sees it: its age.
fn age_on_disk(dir: &Path, decky: &str) -> i64 {
    let db = Connection::open(dir.join(FILE)).unwrap();
    db.query_row("SELECT age FROM delta WHERE decky = ?1", [decky], |row| row.get(0)).unwrap()
}

#[test]
fn the_same_file_gets_the_rows_that_were_changed_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&["same", "delivered", "rejected"].map(delta)).unwrap();
    let kept = outbox.deliverable(3, deadline()).unwrap();
    fill_the_disk(&mut outbox);
    outbox.keep(&[delta(&"x".repeat(5_000))]).unwrap();
    outbox.settle(&kept[1..2], &DeliveryResult::Delivered, deadline()).unwrap_err();
    outbox.settle(&kept[..1], &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap_err();
    // Nobody of ours does that: it shows who writes the row.
    spoil(dir.path(), "UPDATE delta SET age = 1");
    // Nothing is read in between, so the copy does not know of it.
    free_the_disk(&mut outbox);
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!(on_disk(dir.path()).len(), 3);
    let ages = ["same", "rejected", &"x".repeat(5_000)].map(|decky| age_on_disk(dir.path(), decky));
    assert_eq!(ages, [1, 0, 0]);
}

#[test]
fn another_file_gets_all_that_was_not_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&["before", "delivered", "rejected", "last"].map(delta)).unwrap();
    let kept = outbox.deliverable(4, deadline()).unwrap();
    outbox.settle(&kept[2..3], &DeliveryResult::Delivered, deadline()).unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.settle(&kept[1..2], &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap();
    outbox.settle(&kept[..1], &DeliveryResult::Delivered, deadline()).unwrap();
    outbox.keep(&[delta("after")]).unwrap();
    outbox.tend().unwrap();
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
fn what_was_acknowledged_is_not_offered_again_though_an_older_copy_of_the_file_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    let backup = dir.path().join("backup");
    let mut outbox = open(dir.path());
    outbox.keep(&["waiting", "delivered"].map(delta)).unwrap();
    let running = begin(&mut outbox, "running");
    let withdrawn = begin(&mut outbox, "withdrawn");
    let back_up = format!("VACUUM INTO '{}'", backup.display());
    spoil(dir.path(), &back_up);
    let kept = outbox.deliverable(1, deadline()).unwrap();
    outbox.settle(&kept, &DeliveryResult::Delivered, deadline()).unwrap();
    outbox.end(ended(running, succeeded("running")), SentBy::Deliverer).unwrap();
    let kept = outbox.deliverable(1, deadline()).unwrap();
    outbox.settle(&kept, &DeliveryResult::Delivered, deadline()).unwrap();
    outbox.note(RowChange::Withdrawn(withdrawn..withdrawn + 1));
    outbox.commit(&[], deadline()).changed.unwrap();
    assert_eq!(deckies(&mut outbox), ["waiting"]);
    // Another file, at the same place.
    ["-wal", "-shm"]
        .iter()
        .for_each(|suffix| std::fs::remove_file(locks::beside(&path, suffix)).unwrap());
    std::fs::rename(&backup, &path).unwrap();
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    assert_eq!(
        (deckies(&mut outbox), counted(&mut outbox)),
        (vec!["waiting".to_owned()], (1, 0, 0))
    );
    assert_eq!(on_disk(dir.path()).len(), 1);
    // Its rows, in the same file.
    let row = format!(
        "INSERT INTO delta (id, decky, operation, completed_at) VALUES ({running}, 'd', 'deploy', 1)"
    );
    spoil(dir.path(), &row);
    assert_eq!(deckies(&mut outbox), ["waiting"]);
    outbox.tend().unwrap();
    assert_eq!(on_disk(dir.path()).len(), 1, "nobody waits for it");
    assert_eq!(outbox.books().counts.waiting, 1);
}

#[test]
fn an_id_that_a_damaged_file_gives_again_costs_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    // The clock was ahead.
    let ahead = micros(std::time::SystemTime::now()) + 1_000_000_000_000;
    spoil(dir.path(), &format!("UPDATE sqlite_sequence SET seq = {ahead}"));
    outbox.keep(&[delta("first")]).unwrap();
    let first = outbox.deliverable(1, deadline()).unwrap();
    outbox.settle(&first, &DeliveryResult::Delivered, deadline()).unwrap();
    spoil(dir.path(), &format!("UPDATE sqlite_sequence SET seq = {}", first[0].id - 1));
    outbox.keep(&[delta("second")]).unwrap();
    let second = outbox.deliverable(1, deadline()).unwrap();
    assert_eq!((second[0].id, second[0].delta.decky()), (first[0].id, "second"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.tend().unwrap();
    assert_eq!(deckies(&mut outbox), ["second"], "in another file, too");
    outbox.settle(&second, &DeliveryResult::Delivered, deadline()).unwrap();
    assert!(deckies(&mut outbox).is_empty());
}

#[test]
fn no_id_is_given_twice_though_the_log_that_has_it_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let before = begin(&mut outbox, "d");
    file::leave(connection(&mut outbox)).unwrap();
    drop(outbox);
    ["-wal", "-shm"]
        .iter()
        .for_each(|part| std::fs::remove_file(beside(&dir.path().join(FILE), part)).unwrap());
    assert!(begin(&mut open(dir.path()), "d") > before);
}

#[test]
fn however_often_a_file_is_replaced_its_ids_are_not_ahead_of_the_clock() {
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
fn so_many_ids_are_remembered_and_the_one_that_went_first_is_forgotten() {
    let mut gone = DeletedIds::default();
    let most = limits::OUTBOX_ROWS as i64;
    (0..most).rev().for_each(|id| gone.insert(id));
    gone.insert(5);
    assert!(gone.ids.len() == limits::OUTBOX_ROWS && gone.ids.contains(&(most - 1)));
    gone.insert(most);
    assert_eq!((gone.ids.len(), gone.order.len()), (limits::OUTBOX_ROWS, limits::OUTBOX_ROWS));
    assert!(gone.ids.contains(&0) && !gone.ids.contains(&(most - 1)));
}

#[test]
fn an_id_that_was_acknowledged_in_memory_is_never_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    outbox.keep(&[delta("first")]).unwrap();
    let first = outbox.deliverable(1, deadline()).unwrap().remove(0).id;
    fill_the_disk(&mut outbox);
    let mut newest = first;
    for n in 0..3 {
        outbox.keep(&[delta(&"x".repeat(5_000))]).unwrap();
        let kept = outbox.deliverable(1, deadline()).unwrap();
        assert!(kept[0].id > newest, "{n}");
        newest = kept[0].id;
        let _ = outbox.settle(&kept, &DeliveryResult::Delivered, deadline());
    }
    assert_eq!(outbox.path(), None);
    free_the_disk(&mut outbox);
    outbox.tend().unwrap();
    assert!(outbox.path().is_some());
    assert!(begin(&mut outbox, "d") > newest);
    // Nor by another process, nor in another file.
    drop(outbox);
    let mut outbox = open(dir.path());
    let next = begin(&mut outbox, "d");
    assert!(next > newest);
    outbox.note(RowChange::Withdrawn(next..next + 1));
    outbox.commit(&[], deadline()).changed.unwrap();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    outbox.tend().unwrap();
    assert!(outbox.path().is_some() && begin(&mut outbox, "d") > next);
}

#[test]
fn ids_in_memory_lie_above_the_clock_and_the_file_by_a_random_gap() {
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
    // The file's clock was ahead.
    let mut outbox = open(dir.path());
    let ahead = now() + 1_000_000_000_000;
    spoil(dir.path(), &format!("UPDATE sqlite_sequence SET seq = {ahead}"));
    fill_the_disk(&mut outbox);
    outbox.keep(&[delta(&"x".repeat(5_000))]).unwrap();
    assert_eq!(outbox.path(), None);
    let id = outbox.deliverable(1, deadline()).unwrap()[0].id;
    assert!(id > ahead + 1_000_000, "{id} {ahead}");
}

/// How many steps of a loop SQLite takes in what is done.
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

/// What each of the changes, and the question for fifty deltas, takes where so many wait.
fn steps_where(waiting: usize, is_in_memory: bool) -> Vec<(&'static str, u64)> {
    let dir = tempfile::tempdir().unwrap();
    let location = if is_in_memory { OutboxLocation::Memory } else { OutboxLocation::AgentDir };
    let mut outbox = Outbox::open_at(&location, dir.path(), Role::Deliver).unwrap().0;
    outbox.keep(&(0..waiting).map(|n| delta(&n.to_string())).collect::<Vec<_>>()).unwrap();
    begin(&mut outbox, "5");
    let mut measured = Vec::new();
    let (id, begun) = steps(&mut outbox, |outbox| begin(outbox, "7"));
    measured.push(("begin", begun));
    measured.push(("push", steps(&mut outbox, |outbox| outbox.keep(&[delta("7")]).unwrap()).1));
    let end =
        |outbox: &mut Outbox| outbox.end(ended(id, succeeded("7")), SentBy::Deliverer).unwrap();
    measured.push(("end", steps(&mut outbox, end).1));
    let find = |outbox: &mut Outbox| outbox.deliverable_where(50, None).unwrap();
    let (kept, found) = steps(&mut outbox, find);
    assert_eq!(kept.len(), 50);
    measured.push(("batch", found));
    let ids = |kept: &[QueuedDelta]| kept.iter().map(|kept| kept.id).collect::<Vec<_>>();
    let settle = |ids, settled| {
        move |outbox: &mut Outbox| {
            outbox.note(RowChange::Answered(ids, settled));
            outbox.commit(&[], deadline()).changed.unwrap();
        }
    };
    let delivered = settle(ids(&kept[..25]), DeliveryResult::Delivered);
    measured.push(("delivered", steps(&mut outbox, delivered).1));
    let rejected = settle(ids(&kept[25..]), DeliveryResult::Rejected("no".to_owned()));
    measured.push(("rejected", steps(&mut outbox, rejected).1));
    let withdrawn = begin(&mut outbox, "8");
    let withdraw = move |outbox: &mut Outbox| {
        outbox.note(RowChange::Withdrawn(withdrawn..withdrawn + 1));
        outbox.commit(&[], deadline()).changed.unwrap();
    };
    measured.push(("withdrawn", steps(&mut outbox, withdraw).1));
    measured
}

#[test]
fn a_change_costs_the_same_however_much_waits() {
    for is_in_memory in [false, true] {
        let (few, many) = (steps_where(100, is_in_memory), steps_where(9_000, is_in_memory));
        assert_eq!(few, many, "in memory: {is_in_memory}");
    }
}

#[test]
fn what_waits_is_never_counted_too_low_while_answers_are_written_down() {
    const DELTAS: u64 = 2_000;
    let mut outbox =
        Outbox::open_at(&OutboxLocation::Memory, Path::new("/no/such"), Role::Deliver).unwrap().0;
    outbox.keep(&(0..DELTAS).map(|n| delta(&n.to_string())).collect::<Vec<_>>()).unwrap();
    let kept = outbox.deliverable_where(DELTAS as usize, None).unwrap();
    let (books, answered) = (Arc::clone(&outbox.books), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for QueuedDelta { id, .. } in kept {
                answered.fetch_add(1, Ordering::SeqCst);
                books.settle(1);
                outbox.note(RowChange::Answered(vec![id], DeliveryResult::Delivered));
                outbox.commit(&[], deadline());
            }
        });
        loop {
            let waiting = books.read().counts.waiting;
            let answered = answered.load(Ordering::SeqCst);
            assert!(waiting + answered >= DELTAS, "{waiting} wait and {answered} are answered");
            if answered == DELTAS {
                break;
            }
        }
    });
    assert_eq!(books.read().counts.waiting, 0);
}

/// What may be done to one of an outbox' files.
type Mischief = fn(&Path);

const MISCHIEFS: [(&str, Mischief); 3] = [
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
fn whatever_is_done_to_its_files_every_delta_is_in_the_one_that_is_there() {
    for ((how, mischief), part) in
        MISCHIEFS.iter().flat_map(|one| ["", "-wal", "-shm"].map(|part| (one, part)))
    {
        let dir = tempfile::tempdir().unwrap();
        let place = beside(&dir.path().join(FILE), part);
        for role in [Role::Deliver, Role::Contribute] {
            let mut outbox = open_as(dir.path(), role);
            for n in 0..5 {
                outbox.keep(&[delta(&format!("{n} before"))]).unwrap();
                mischief(&place);
                outbox.keep(&[delta(&format!("{n} after"))]).unwrap();
                assert!(outbox.path().is_some(), "{part} {how}: {n}");
            }
            // Killed: nothing is written down when it ends.
            connection(&mut outbox)
                .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
                .unwrap();
        }
        let mut outbox = open(dir.path());
        assert_eq!(outbox.deliverable(30, deadline()).unwrap().len(), 20, "{part} {how}");
        assert!(schema::problem(connection(&mut outbox)).unwrap().is_none());
    }
}

#[test]
fn a_log_that_belongs_to_another_connection_is_not_removed_when_the_old_file_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (path, log) = (dir.path().join(FILE), dir.path().join("heartbeat.db-wal"));
    let mut old = open_as(dir.path(), Role::Contribute);
    old.keep(&[delta("old")]).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut new = open_as(dir.path(), Role::Contribute);
    new.keep(&[delta("new")]).unwrap();
    let which = || identity(&std::fs::symlink_metadata(&log).unwrap());
    let before = which();
    old.keep(&[delta("after")]).unwrap();
    assert_eq!(which(), before);
    drop((old, new));
    let rows: BTreeSet<_> = on_disk(dir.path()).into_iter().map(|(decky, ..)| decky).collect();
    assert_eq!(rows, ["after", "new", "old"].map(str::to_owned).into());
}

#[test]
fn what_others_have_done_in_the_new_file_is_not_undone() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = open(dir.path());
    let mut tracks = [open_as(dir.path(), Role::Contribute), open_as(dir.path(), Role::Contribute)];
    let ids = tracks.each_mut().map(|track| begin(track, "d"));
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    // The first one ends and is gone; then the second one comes, which knows it in flight; and then who delivers.
    let [mut first, mut second] = tracks;
    first.end(ended(ids[0], succeeded("d")), SentBy::Deliverer).unwrap();
    drop(first);
    second.keep(&[delta("e")]).unwrap();
    outbox.tend().unwrap();
    outbox.tend().unwrap();
    assert_eq!(
        counted(&mut outbox),
        (2, 1, 1),
        "one is in flight, and holds the one that has ended"
    );
    second.end(ended(ids[1], succeeded("d")), SentBy::Deliverer).unwrap();
    let outcomes: Vec<_> = outbox
        .deliverable(9, deadline())
        .unwrap()
        .into_iter()
        .map(|kept| kept.delta.outcome().clone())
        .collect();
    assert_eq!(
        outcomes,
        [Outcome::Failed("why".to_owned()), Outcome::Succeeded, Outcome::Succeeded]
    );
}

#[test]
fn what_cannot_be_moved_at_once_is_moved_at_the_end() {
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
fn a_process_without_a_heartbeat_whose_folder_was_away_is_in_the_new_one_with_its_next_change() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).unwrap();
    let mut outbox = open(&agent);
    std::fs::remove_dir_all(&agent).unwrap();
    let mut track = open_without_a_file(&agent);
    let id = begin(&mut track, "d");
    std::fs::create_dir(&agent).unwrap();
    outbox.tend().unwrap();
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
