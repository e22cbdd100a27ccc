//! The outbox on file systems that really are full or read-only.

use std::path::Path;
use std::time::{Duration, Instant};

use decnet_heartbeat::{
    Heartbeat, HeartbeatBuilder, LifecycleDelta, Operation, OutboxLocation, Stats,
};
use rusqlite::OpenFlags;

use crate::support::{Loopback, Tmpfs, beat, errors, settled};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// With its outbox on the file system.
fn start(builder: HeartbeatBuilder, disk: &Tmpfs) -> Heartbeat {
    builder.outbox(OutboxLocation::File(disk.path().join("heartbeat.db"))).start().unwrap()
}

/// The deckies of the rows in the file, in their order, and whether their operations have ended.
fn rows(file: &Path) -> Vec<(String, bool)> {
    let database =
        rusqlite::Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let mut select =
        database.prepare("SELECT decky, completed_at IS NOT NULL FROM delta ORDER BY id").unwrap();
    select
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

fn ended(decky: &str) -> (String, bool) {
    (decky.to_owned(), true)
}

/// Waits until a beat has failed. One that was under way may have gone without what was pushed last; the next has it all.
fn fails_once_more(heartbeat: &Heartbeat) {
    let failures = |stats: &Stats| stats.failure.as_ref().map_or(0, |failure| failure.count);
    let before = failures(&heartbeat.stats());
    settled(heartbeat, |stats| failures(stats) > before);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn an_outbox_whose_log_has_taken_the_whole_disk_is_on_it_again_after_a_restart() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Tmpfs::mount());
    let loopback = Loopback::new(folder.path());
    let heartbeat = start(loopback.builder().0, &disk);
    let fills_the_disk = |_| {
        heartbeat.deltas().push(deployed("d")).unwrap();
        heartbeat.stats().outbox.is_none()
    };
    assert!((0..1_000).any(fills_the_disk), "the disk has not become full");
    drop(heartbeat);
    let heartbeat = start(loopback.builder().0, &disk);
    heartbeat.deltas().push(deployed("d")).unwrap();
    assert!(heartbeat.stats().outbox.is_some());
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn what_a_full_disk_cannot_take_is_in_memory_until_it_can() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Tmpfs::mount());
    let mut loopback = Loopback::new(folder.path());
    let (builder, _tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let file = settled(&heartbeat, |stats| stats.beats == 1).outbox.unwrap();
    loopback.master.stop();
    let operation = heartbeat.begin(Operation::Deploy, ["tracked"]).unwrap();
    heartbeat.deltas().push(deployed("before")).unwrap();
    assert_eq!(errors(disk.path()), [""; 0]);

    disk.fill();
    heartbeat.deltas().push(deployed("full-1")).unwrap();
    assert_eq!(heartbeat.stats().outbox, None);
    let expected = "outbox file cannot be written; deltas are in memory and do not survive a restart: outbox=/";
    let said = errors(disk.path());
    assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}");
    assert!(said[0].contains("/heartbeat.db error=\"database or disk is full"), "{said:?}");
    heartbeat.deltas().push(deployed("full-2")).unwrap();
    assert_eq!(errors(disk.path()), [""; 0], "it is said once");
    operation.succeed();
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.operations, stats.outbox), (4, 0, None));
    assert_eq!(rows(&file), [("tracked".to_owned(), false), ended("before")]);

    // A beat does not need the master to be there to write down what it could not.
    disk.free();
    settled(&heartbeat, |stats| stats.outbox.as_ref() == Some(&file));
    assert_eq!(rows(&file), ["tracked", "before", "full-1", "full-2"].map(ended));
    assert_eq!(loopback.sent(), [""; 0]);

    loopback.master.start_again().unwrap();
    settled(&heartbeat, |stats| stats.delivered == 4 && stats.waiting == 0);
    assert!(heartbeat.flush(PATIENCE), "the file knows it, too");
    assert_eq!(
        loopback.sent(),
        ["full-2", "full-1", "before", "tracked"],
        "newest first, each once"
    );
    assert_eq!(rows(&file), []);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn what_was_delivered_while_the_disk_was_full_is_not_sent_again() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Tmpfs::mount());
    let mut loopback = Loopback::new(folder.path());
    let (builder, tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let file = settled(&heartbeat, |stats| stats.beats == 1).outbox.unwrap();
    loopback.master.stop();
    heartbeat.deltas().push(deployed("before")).unwrap();
    disk.fill();
    heartbeat.deltas().push(deployed("full")).unwrap();
    fails_once_more(&heartbeat);
    loopback.master.start_again().unwrap();
    settled(&heartbeat, |stats| {
        stats.delivered == 2 && stats.waiting == 0 && stats.outbox.is_none()
    });
    assert_eq!(rows(&file), [ended("before")]);
    for beats in 3..6 {
        beat(&tick);
        settled(&heartbeat, |stats| stats.beats >= beats);
    }
    disk.free();
    // The file is left alone for a second after each refusal, so which beat it is does not matter.
    let end = Instant::now() + PATIENCE;
    while heartbeat.stats().outbox.is_none() {
        assert!(Instant::now() < end, "{:?}", heartbeat.stats());
        beat(&tick);
        heartbeat.beats().recv_timeout(PATIENCE).unwrap();
    }
    assert!(heartbeat.flush(PATIENCE), "the file knows it, too");
    assert_eq!(loopback.sent(), ["full", "before"]);
    assert_eq!(rows(&file), []);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn a_stop_writes_down_what_the_disk_was_too_full_for() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Tmpfs::mount());
    let mut loopback = Loopback::new(folder.path());
    let (builder, _tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let file = settled(&heartbeat, |stats| stats.beats == 1).outbox.unwrap();
    loopback.master.stop();
    heartbeat.deltas().push(deployed("before")).unwrap();
    disk.fill();
    heartbeat.deltas().push(deployed("full")).unwrap();
    loopback.master.start_again().unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2 && stats.waiting == 0);
    loopback.master.stop();
    heartbeat.deltas().push(deployed("late")).unwrap();
    disk.free();
    let stopped = heartbeat.stop(Duration::from_secs(5));
    assert_eq!((stopped.undelivered, stopped.kept), (1, true));
    assert_eq!(rows(&file), [ended("late")]);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn a_start_on_a_full_disk_is_in_memory_until_there_is_room() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Tmpfs::mount());
    let mut loopback = Loopback::new(folder.path());
    disk.fill();
    assert_eq!(errors(disk.path()), [""; 0]);
    let (builder, tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let said = errors(disk.path());
    let expected = "outbox in memory; its deltas do not survive a restart: host=";
    assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}");
    let stats = settled(&heartbeat, |stats| stats.beats == 1);
    assert_eq!(stats.outbox, None);
    heartbeat.deltas().push(deployed("delivered")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    loopback.master.stop();
    heartbeat.deltas().push(deployed("waiting")).unwrap();
    disk.free();
    beat(&tick);
    let file = settled(&heartbeat, |stats| stats.outbox.is_some()).outbox.unwrap();
    assert_eq!(rows(&file), [ended("waiting")]);
    loopback.master.start_again().unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2 && stats.waiting == 0);
    assert!(heartbeat.flush(PATIENCE), "the file knows it, too");
    assert_eq!(loopback.sent(), ["delivered", "waiting"]);
    assert_eq!(rows(&file), []);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn a_read_only_file_system_keeps_what_is_on_it_until_it_can_be_written() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), Tmpfs::mount());
    let mut loopback = Loopback::new(folder.path());
    loopback.master.stop();
    let (builder, _tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    heartbeat.deltas().push(deployed("on-disk")).unwrap();
    assert!(heartbeat.stop(Duration::from_secs(5)).kept);

    disk.remount("ro");
    loopback.master.start_again().unwrap();
    assert_eq!(errors(disk.path()), [""; 0]);
    let (builder, tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let said = errors(disk.path());
    let expected = "outbox in memory; its deltas do not survive a restart: host=";
    assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}");
    assert!(said[0].contains("Read-only file system"), "{said:?}");
    heartbeat.deltas().push(deployed("in-memory")).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    assert_eq!(stats.outbox, None);
    loopback.master.stop();
    let operation = heartbeat.begin(Operation::Deploy, ["tracked"]).unwrap();
    heartbeat.deltas().push(deployed("waiting")).unwrap();

    disk.remount("rw");
    beat(&tick);
    let file = settled(&heartbeat, |stats| stats.outbox.is_some()).outbox.unwrap();
    assert_eq!(rows(&file), [ended("on-disk"), ("tracked".to_owned(), false), ended("waiting")]);
    operation.succeed();
    fails_once_more(&heartbeat);
    loopback.master.start_again().unwrap();
    settled(&heartbeat, |stats| stats.delivered == 4 && stats.waiting == 0);
    assert!(heartbeat.flush(PATIENCE), "the file knows it, too");
    assert_eq!(loopback.sent(), ["in-memory", "waiting", "tracked", "on-disk"]);
    assert_eq!(rows(&file), []);
}
