//! The outbox on file systems that are full or read-only.

use std::path::Path;
use std::time::{Duration, Instant};

use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Operation, OutboxLocation, Stats};
use rusqlite::OpenFlags;

use crate::support::{
    Loopback, TIMEOUT, Tmpfs, deployed, logged_errors, send_tick, wait_for_stats,
};

/// Starts a heartbeat whose outbox is on the file system.
fn start(builder: HeartbeatBuilder, disk: &Tmpfs) -> Heartbeat {
    builder.outbox(OutboxLocation::File(disk.path().join("heartbeat.db"))).start().unwrap()
}

/// The decky of each row in the file, in their order, and whether its operation has ended.
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

/// Waits until the next beat fails. A beat that was in progress may not contain the last delta; the
/// next one does.
fn wait_for_next_failure(heartbeat: &Heartbeat) {
    let failures = |stats: &Stats| stats.failure.as_ref().map_or(0, |failure| failure.count);
    let before = failures(&heartbeat.stats());
    wait_for_stats(heartbeat, |stats| failures(stats) > before);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn outbox_is_on_disk_again_after_its_log_filled_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount();
    let loopback = Loopback::new(folder.path());
    let heartbeat = start(loopback.builder().0, &disk);
    let is_in_memory_after_push = |_| {
        heartbeat.deltas().push(deployed("d")).unwrap();
        heartbeat.stats().outbox.is_none()
    };
    assert!((0..1_000).any(is_in_memory_after_push), "the disk is not full");
    drop(heartbeat);
    let heartbeat = start(loopback.builder().0, &disk);
    heartbeat.deltas().push(deployed("d")).unwrap();
    assert!(heartbeat.stats().outbox.is_some());
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn deltas_stay_in_memory_while_disk_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount();
    let mut loopback = Loopback::new(folder.path());
    let (builder, _tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let file = wait_for_stats(&heartbeat, |stats| stats.beats == 1).outbox.unwrap();
    loopback.master.stop();
    let operation = heartbeat.begin(Operation::Deploy, ["tracked"]).unwrap();
    heartbeat.deltas().push(deployed("before")).unwrap();
    assert_eq!(logged_errors(disk.path()), [""; 0]);

    disk.fill();
    heartbeat.deltas().push(deployed("full-1")).unwrap();
    assert_eq!(heartbeat.stats().outbox, None);
    let expected = "outbox file cannot be written; deltas are in memory and do not survive a restart: outbox=/";
    let errors = logged_errors(disk.path());
    assert!(errors.len() == 1 && errors[0].starts_with(expected), "{errors:?}");
    assert!(errors[0].contains("/heartbeat.db error=\"database or disk is full"), "{errors:?}");
    heartbeat.deltas().push(deployed("full-2")).unwrap();
    assert_eq!(logged_errors(disk.path()), [""; 0], "the error is logged again");
    operation.succeed();
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.operations, stats.outbox), (4, 0, None));
    assert_eq!(rows(&file), [("tracked".to_owned(), false), ended("before")]);

    // A beat writes the deltas to the file, even if the master is stopped.
    disk.free();
    wait_for_stats(&heartbeat, |stats| stats.outbox.as_ref() == Some(&file));
    assert_eq!(rows(&file), ["tracked", "before", "full-1", "full-2"].map(ended));
    assert_eq!(loopback.sent(), [""; 0]);

    loopback.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 4 && stats.waiting == 0);
    assert!(heartbeat.flush(TIMEOUT), "the file has no delta any more");
    assert_eq!(
        loopback.sent(),
        ["full-2", "full-1", "before", "tracked"],
        "the deltas are sent newest first, each once"
    );
    assert_eq!(rows(&file), []);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn ack_on_full_disk_survives_until_disk_is_free() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount();
    let mut loopback = Loopback::new(folder.path());
    let (builder, tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let file = wait_for_stats(&heartbeat, |stats| stats.beats == 1).outbox.unwrap();
    loopback.master.stop();
    heartbeat.deltas().push(deployed("before")).unwrap();
    disk.fill();
    heartbeat.deltas().push(deployed("full")).unwrap();
    wait_for_next_failure(&heartbeat);
    loopback.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| {
        stats.delivered == 2 && stats.waiting == 0 && stats.outbox.is_none()
    });
    assert_eq!(rows(&file), [ended("before")]);
    for beats in 3..6 {
        send_tick(&tick);
        wait_for_stats(&heartbeat, |stats| stats.beats >= beats);
    }
    disk.free();
    // After each failed write the file is not used for a second, so several beats may be needed.
    let end = Instant::now() + TIMEOUT;
    while heartbeat.stats().outbox.is_none() {
        assert!(Instant::now() < end, "{:?}", heartbeat.stats());
        send_tick(&tick);
        heartbeat.beats().recv_timeout(TIMEOUT).unwrap();
    }
    assert!(heartbeat.flush(TIMEOUT), "the file has no delta any more");
    assert_eq!(loopback.sent(), ["full", "before"]);
    assert_eq!(rows(&file), []);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn stop_writes_deltas_from_memory_to_disk() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount();
    let mut loopback = Loopback::new(folder.path());
    let (builder, _tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let file = wait_for_stats(&heartbeat, |stats| stats.beats == 1).outbox.unwrap();
    loopback.master.stop();
    heartbeat.deltas().push(deployed("before")).unwrap();
    disk.fill();
    heartbeat.deltas().push(deployed("full")).unwrap();
    loopback.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.waiting == 0);
    loopback.master.stop();
    heartbeat.deltas().push(deployed("late")).unwrap();
    disk.free();
    let stopped = heartbeat.stop(Duration::from_secs(5));
    assert_eq!((stopped.undelivered, stopped.durable), (1, true));
    assert_eq!(rows(&file), [ended("late")]);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn outbox_of_start_on_full_disk_moves_to_file() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount();
    let mut loopback = Loopback::new(folder.path());
    disk.fill();
    assert_eq!(logged_errors(disk.path()), [""; 0]);
    let (builder, tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let errors = logged_errors(disk.path());
    let expected = "outbox in memory; its deltas do not survive a restart: host=";
    assert!(errors.len() == 1 && errors[0].starts_with(expected), "{errors:?}");
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    assert_eq!(stats.outbox, None);
    heartbeat.deltas().push(deployed("delivered")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    loopback.master.stop();
    heartbeat.deltas().push(deployed("waiting")).unwrap();
    disk.free();
    send_tick(&tick);
    let file = wait_for_stats(&heartbeat, |stats| stats.outbox.is_some()).outbox.unwrap();
    assert_eq!(rows(&file), [ended("waiting")]);
    loopback.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.waiting == 0);
    assert!(heartbeat.flush(TIMEOUT), "the file has no delta any more");
    assert_eq!(loopback.sent(), ["delivered", "waiting"]);
    assert_eq!(rows(&file), []);
}

#[test]
#[ignore = "needs root, to mount a file system"]
fn read_only_file_system_loses_no_delta() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount();
    let mut loopback = Loopback::new(folder.path());
    loopback.master.stop();
    let (builder, _tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    heartbeat.deltas().push(deployed("on-disk")).unwrap();
    assert!(heartbeat.stop(Duration::from_secs(5)).durable);

    disk.remount("ro");
    loopback.master.start_again().unwrap();
    assert_eq!(logged_errors(disk.path()), [""; 0]);
    let (builder, tick) = loopback.builder();
    let heartbeat = start(builder, &disk);
    let errors = logged_errors(disk.path());
    let expected = "outbox in memory; its deltas do not survive a restart: host=";
    assert!(errors.len() == 1 && errors[0].starts_with(expected), "{errors:?}");
    assert!(errors[0].contains("Read-only file system"), "{errors:?}");
    heartbeat.deltas().push(deployed("in-memory")).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    assert_eq!(stats.outbox, None);
    loopback.master.stop();
    let operation = heartbeat.begin(Operation::Deploy, ["tracked"]).unwrap();
    heartbeat.deltas().push(deployed("waiting")).unwrap();

    disk.remount("rw");
    send_tick(&tick);
    let file = wait_for_stats(&heartbeat, |stats| stats.outbox.is_some()).outbox.unwrap();
    assert_eq!(rows(&file), [ended("on-disk"), ("tracked".to_owned(), false), ended("waiting")]);
    operation.succeed();
    wait_for_next_failure(&heartbeat);
    loopback.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 4 && stats.waiting == 0);
    assert!(heartbeat.flush(TIMEOUT), "the file has no delta any more");
    assert_eq!(loopback.sent(), ["in-memory", "waiting", "tracked", "on-disk"]);
    assert_eq!(rows(&file), []);
}
