//! A heartbeat in a process that was forked after its start: the calls of the child return errors
//! at once, and its drops and stops do not affect the parent.
//!
//! The program has a `main` of its own because it runs its tests one after another on one thread. A
//! child inherits the open files of all tests that run, and their locks.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot continue panics"
)]

#[allow(dead_code, unused_imports, reason = "no test program uses all helpers")]
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::never;
use decnet_heartbeat::loopback::{Fault, RowStatus};
use decnet_heartbeat::{
    DeltaSender, Error, Heartbeat, HeartbeatBuilder, LifecycleDelta, Operation, Outcome, Stopped,
    TrackedOperation,
};
use fork::{Fork, fork};
use libtest_mimic::{Arguments, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use support::{Fixture, TIMEOUT};

/// The number of polls within [`TIMEOUT`].
const POLLS: u32 = 2_000;

const TESTS: [(&str, fn()); 6] = [
    ("every_call_in_child_fails_at_once", every_call_in_child_fails_at_once),
    (
        "drops_and_stops_in_child_do_not_affect_parent",
        drops_and_stops_in_child_do_not_affect_parent,
    ),
    ("operation_that_ends_in_child_is_still_open", operation_that_ends_in_child_is_still_open),
    ("child_waits_for_no_mutex_of_parent", child_waits_for_no_mutex_of_parent),
    (
        "child_can_start_heartbeat_if_no_outbox_was_open_at_fork",
        child_can_start_heartbeat_if_no_outbox_was_open_at_fork,
    ),
    ("orphaned_child_keeps_delivery_lock", orphaned_child_keeps_delivery_lock),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trial = |(name, test): (&str, fn())| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    libtest_mimic::run(&arguments, TESTS.map(trial).into()).exit_code()
}

/// A heartbeat without ticks: it beats only for deltas.
fn builder(fixture: &Fixture) -> HeartbeatBuilder {
    fixture.builder().0.ticks(never())
}

/// Starts a heartbeat without ticks and waits for its first beat.
fn start_heartbeat(fixture: &Fixture) -> Heartbeat {
    let heartbeat = builder(fixture).start().unwrap();
    heartbeat.beats().recv_timeout(TIMEOUT).unwrap();
    heartbeat
}

fn open_operations(fixture: &Fixture, deckies: &[&str]) {
    for decky in deckies {
        fixture.master.open_operation(&fixture.worker.uuid, decky, Operation::Deploy.as_str());
    }
}

fn row_status(fixture: &Fixture, decky: &str) -> RowStatus {
    fixture.master.rows().into_iter().find(|row| row.decky == decky).unwrap().status
}

fn wait_for_row_status(fixture: &Fixture, decky: &str, status: RowStatus) {
    let has_status = fixture.master.wait_until(TIMEOUT, |seen| {
        seen.rows().iter().any(|row| row.decky == decky && row.status == status)
    });
    assert!(has_status, "{:?}", fixture.master.rows());
}

fn connections(fixture: &Fixture) -> usize {
    fixture.master.connections().len()
}

/// Runs this in a forked child, and asserts that it succeeds in time.
fn run_in_child(work: impl FnOnce()) {
    match fork().unwrap() {
        Fork::Child => process::exit(catch_unwind(AssertUnwindSafe(work)).map_or(1, |()| 0)),
        Fork::Parent(pid) => {
            let pid = Pid::from_raw(pid).unwrap();
            let descriptor = pidfd_open(pid, PidfdFlags::empty()).unwrap();
            let timeout = Timespec::try_from(TIMEOUT).unwrap();
            let has_ended =
                poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)).unwrap() == 1;
            if !has_ended {
                kill_process(pid, Signal::KILL).unwrap();
            }
            let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
            assert!(has_ended, "the child does not end");
            assert_eq!(status.exit_status(), Some(0), "the child failed");
        }
    }
}

/// The pause between two polls.
fn pause() {
    let _ = never::<()>().recv_timeout(TIMEOUT / POLLS);
}

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// Asserts that the error names the parent process, and what to do.
fn assert_refused<T>(parent: u32, result: Result<T, Error>) {
    let error = result.err().expect("an error").to_string();
    let start = format!("this process was forked from process {parent}, ");
    assert!(error.starts_with(&start), "{error}");
    let end = "start the heartbeat after the fork, in the process that uses it";
    assert!(error.ends_with(end), "{error}");
}

/// Calls everything that there is, with the values that a child has inherited.
fn call_everything(
    parent: u32,
    heartbeat: Heartbeat,
    deltas: &DeltaSender,
    mut operation: TrackedOperation,
) {
    for deltas in [deltas.clone(), heartbeat.deltas()] {
        assert_refused(parent, deltas.push(deployed("d")));
        assert_refused(parent, deltas.push_all([deployed("d"), deployed("e")]));
        assert_refused(parent, deltas.push_all(Vec::<LifecycleDelta>::new()));
        assert_refused(parent, deltas.begin(Operation::Deploy, "d"));
        assert_refused(parent, deltas.run(Operation::Deploy, "d", || ()).map(drop));
    }
    assert_refused(parent, heartbeat.begin(Operation::Deploy, "d"));
    assert_refused(parent, heartbeat.run(Operation::Deploy, "d", || ()).map(drop));
    assert_refused(parent, operation.end("tracked", Outcome::Succeeded));
    assert_eq!(operation.open().collect::<Vec<_>>(), ["tracked"]);
    drop(operation);
    let stats = heartbeat.stats();
    assert_eq!(stats.ended_thread, Some("decnet-heartbeat"));
    assert_eq!((stats.dormant, stats.waiting), (false, 0));
    assert!(heartbeat.is_stalled());
    assert!(!heartbeat.flush(TIMEOUT * 2));
    assert!(heartbeat.beats().try_recv().is_err());
    let Stopped { undelivered, operations, durable, in_time, .. } = heartbeat.stop(TIMEOUT * 2);
    assert_eq!((undelivered, operations, durable, in_time), (0, 0, true, true));
}

fn every_call_in_child_fails_at_once() {
    let fixture = Fixture::new();
    let heartbeat = start_heartbeat(&fixture);
    let deltas = heartbeat.deltas();
    let parent = process::id();
    let operation = heartbeat.begin(Operation::Deploy, "tracked").unwrap();
    let mut inherited = Some((heartbeat, operation));
    run_in_child(|| {
        let (heartbeat, operation) = inherited.take().unwrap();
        call_everything(parent, heartbeat, &deltas, operation);
    });
}

fn drops_and_stops_in_child_do_not_affect_parent() {
    let fixture = Fixture::new();
    open_operations(&fixture, &["tracked", "pushed"]);
    let heartbeat = start_heartbeat(&fixture);
    let deltas = heartbeat.deltas();
    let operation = heartbeat.begin(Operation::Deploy, "tracked").unwrap();
    // The POST takes a few seconds: an answer has more than a hundred bytes.
    fixture.master.script([Fault::Slowly(Duration::from_millis(20))]);
    deltas.push(deployed("pushed")).unwrap();
    wait_for_row_status(&fixture, "pushed", RowStatus::Succeeded);
    let mut inherited = Some((heartbeat, deltas, operation));
    run_in_child(|| {
        inherited.take().unwrap().0.stop(Duration::ZERO);
    });
    assert_eq!(connections(&fixture), 1, "the parent's connection was closed");
    let delivered = inherited.as_ref().unwrap().0.stats().delivered;
    assert_eq!(delivered, 0, "the POST ended before the stop in the child");
    run_in_child(|| drop(inherited.take()));
    let (heartbeat, deltas, operation) = inherited.unwrap();
    assert!(heartbeat.flush(TIMEOUT));
    assert!(heartbeat.stats().failure.is_none(), "{:?}", heartbeat.stats().failure);
    assert_eq!(connections(&fixture), 1, "the parent's connection was closed");
    let error = builder(&fixture).start().unwrap_err();
    assert!(error.to_string().contains(&format!("process {} already", process::id())), "{error:?}");
    assert_eq!(row_status(&fixture, "tracked"), RowStatus::Running);
    assert_eq!(heartbeat.stats().operations, 1);
    operation.succeed();
    drop(deltas);
    wait_for_row_status(&fixture, "tracked", RowStatus::Succeeded);
    assert_eq!(heartbeat.stop(TIMEOUT).undelivered, 0);
}

fn operation_that_ends_in_child_is_still_open() {
    let fixture = Fixture::new();
    open_operations(&fixture, &["a", "b", "c", "last"]);
    let heartbeat = start_heartbeat(&fixture);
    let begin = |decky| heartbeat.begin(Operation::Deploy, decky).unwrap();
    let mut operations = Some([begin("a"), begin("b"), begin("c")]);
    run_in_child(|| {
        let [a, b, c] = operations.take().unwrap();
        let since = Instant::now();
        a.succeed();
        b.fail("in the child");
        drop(c);
        // They do not wait for the outbox thread, which does not run in the child.
        assert!(since.elapsed() < Duration::from_secs(1));
    });
    heartbeat.deltas().push(deployed("last")).unwrap();
    wait_for_row_status(&fixture, "last", RowStatus::Succeeded);
    let statuses = ["a", "b", "c"].map(|decky| row_status(&fixture, decky));
    assert_eq!(statuses, [RowStatus::Running; 3]);
    operations.unwrap().into_iter().for_each(TrackedOperation::succeed);
    for decky in ["a", "b", "c"] {
        wait_for_row_status(&fixture, decky, RowStatus::Succeeded);
    }
}

fn child_waits_for_no_mutex_of_parent() {
    const FORKS: usize = 100;
    let fixture = Fixture::new();
    let heartbeat = start_heartbeat(&fixture);
    let deltas = heartbeat.deltas();
    let parent = process::id();
    let is_done = AtomicBool::new(false);
    let operation = heartbeat.begin(Operation::Deploy, "tracked").unwrap();
    let mut inherited = Some((heartbeat, operation));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    // On a busy machine the disk may take longer than a second.
                    let _ = deltas.push_all([deployed("p"), deployed("q")]);
                }
            });
        }
        let result = catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..FORKS {
                run_in_child(|| {
                    let (heartbeat, operation) = inherited.take().unwrap();
                    call_everything(parent, heartbeat, &deltas, operation);
                });
            }
        }));
        is_done.store(true, Ordering::Relaxed);
        assert!(result.is_ok());
    });
}

fn child_can_start_heartbeat_if_no_outbox_was_open_at_fork() {
    let fixture = Fixture::new();
    open_operations(&fixture, &["d"]);
    let heartbeat = start_heartbeat(&fixture);
    let deltas = heartbeat.deltas();
    let parent = process::id();
    run_in_child(|| assert_refused(parent, builder(&fixture).start()));
    heartbeat.stop(TIMEOUT);
    // The sender keeps the outbox open.
    run_in_child(|| assert_refused(parent, builder(&fixture).start()));
    drop(deltas);
    wait_until_outbox_thread_ends();
    run_in_child(|| {
        let heartbeat = builder(&fixture).start().unwrap();
        heartbeat.deltas().push(deployed("d")).unwrap();
        assert!(heartbeat.flush(TIMEOUT));
        assert_eq!(heartbeat.stop(TIMEOUT).undelivered, 0);
    });
    assert_eq!(row_status(&fixture, "d"), RowStatus::Succeeded);
}

/// Waits until this process has no outbox thread. No event reports that, so it polls.
fn wait_until_outbox_thread_ends() {
    let is_running = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        // A thread may end before its name is read.
        let mut names =
            tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.any(|name| name == "decnet-outbox\n")
    };
    let has_ended = (0..POLLS).any(|_| {
        let has_ended = !is_running();
        pause();
        has_ended
    });
    assert!(has_ended);
}

fn orphaned_child_keeps_delivery_lock() {
    let fixture = Fixture::new();
    wait_until_outbox_thread_ends();
    let (mut until_released, release) = io::pipe().unwrap();
    let mut release = Some(release);
    run_in_child(|| {
        let _heartbeat = start_heartbeat(&fixture);
        if matches!(fork().unwrap(), Fork::Child) {
            drop(release.take());
            let _ = until_released.read(&mut [0]);
        }
        process::exit(0);
    });
    let error = builder(&fixture).start().unwrap_err();
    assert!(error.is_outbox() && error.to_string().contains(" already"), "{error:?}");
    drop(release);
    // No event reports the end of the orphaned child, so this polls.
    let heartbeat = (0..POLLS).find_map(|_| {
        pause();
        builder(&fixture).start().ok()
    });
    heartbeat.expect("the lock is released when the child ends").stop(TIMEOUT);
}
