//! What a heartbeat is in a process that was forked after its start: the child's calls return errors at once, and nothing that it
//! drops or stops changes anything for the parent.
//!
//! It is a program of its own, which runs its tests one after another on one thread: a child has the descriptors of all other
//! tests, and their locks with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on fails there and then"
)]

use std::fs;
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::never;
use decnet_heartbeat::loopback::{Enrolled, Fault, LoopbackMaster, RowStatus};
use decnet_heartbeat::{
    DeltaSender, Error, Heartbeat, HeartbeatBuilder, LifecycleDelta, Operation, Outcome, Snapshot,
    Stopped, TrackedOperation,
};
use fork::{Fork, fork};
use libtest_mimic::{Arguments, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use serde_json::json;

/// Longer than anything takes; reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// The same, where no event says that something has happened.
const STEPS: u32 = 2_000;

const TESTS: [(&str, fn()); 6] = [
    ("every_call_of_a_child_is_an_error_at_once", every_call_of_a_child_is_an_error_at_once),
    (
        "a_childs_drops_and_stops_leave_the_parent_alone",
        a_childs_drops_and_stops_leave_the_parent_alone,
    ),
    ("what_ends_in_a_child_has_not_ended", what_ends_in_a_child_has_not_ended),
    (
        "a_child_never_waits_for_a_mutex_of_the_parents_threads",
        a_child_never_waits_for_a_mutex_of_the_parents_threads,
    ),
    ("a_child_starts_its_own_only_if_no_outbox_was_open_at_the_fork", a_child_starts_its_own),
    ("a_child_that_outlives_its_parent_keeps_the_delivery_lock", a_child_that_outlives_its_parent),
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

struct Stage {
    _folder: tempfile::TempDir,
    master: LoopbackMaster,
    worker: Enrolled,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let master = LoopbackMaster::start().unwrap();
        let worker = master.enrol(&folder.path().join("agent")).unwrap();
        Self { _folder: folder, master, worker }
    }

    fn builder(&self) -> HeartbeatBuilder {
        Heartbeat::builder()
            .enrolment(self.worker.enrolment().unwrap())
            .status_source(|| Snapshot::new(&json!({"deployed": false, "deckies": []})))
            // No tick: it beats for deltas alone.
            .ticks(never())
    }

    /// A heartbeat whose first beat was accepted.
    fn beating(&self) -> Heartbeat {
        let heartbeat = self.builder().start().unwrap();
        heartbeat.beats().recv_timeout(PATIENCE).unwrap();
        heartbeat
    }

    fn open(&self, deckies: &[&str]) {
        for decky in deckies {
            self.master.open_operation(&self.worker.uuid, decky, Operation::Deploy.as_str());
        }
    }

    fn status(&self, decky: &str) -> RowStatus {
        self.master.rows().into_iter().find(|row| row.decky == decky).unwrap().status
    }

    fn waits_for(&self, decky: &str, status: RowStatus) {
        let is_so = self.master.wait_until(PATIENCE, |seen| {
            seen.rows().iter().any(|row| row.decky == decky && row.status == status)
        });
        assert!(is_so, "{:?}", self.master.rows());
    }
}

/// Runs this in a child, which must end well and in time.
fn in_a_child(act: impl FnOnce()) {
    match fork().unwrap() {
        Fork::Child => process::exit(catch_unwind(AssertUnwindSafe(act)).map_or(1, |()| 0)),
        Fork::Parent(pid) => {
            let pid = Pid::from_raw(pid).unwrap();
            let descriptor = pidfd_open(pid, PidfdFlags::empty()).unwrap();
            let timeout = Timespec::try_from(PATIENCE).unwrap();
            let has_ended =
                poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)).unwrap() == 1;
            if !has_ended {
                kill_process(pid, Signal::KILL).unwrap();
            }
            let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
            assert!(has_ended, "the child hangs");
            assert_eq!(status.exit_status(), Some(0), "the child failed");
        }
    }
}

fn step() {
    let _ = never::<()>().recv_timeout(PATIENCE / STEPS);
}

fn delta(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// The error says whose the heartbeat is, and what to do.
fn is_refused<T>(parent: u32, result: Result<T, Error>) {
    let said = result.err().expect("an error").to_string();
    assert!(said.starts_with(&format!("this process was forked from process {parent} ")), "{said}");
    assert!(
        said.ends_with("start the heartbeat after the fork, in the process that uses it"),
        "{said}"
    );
}

/// Each call that there is, on copies that the child has.
fn call_everything(
    parent: u32,
    heartbeat: Heartbeat,
    deltas: &DeltaSender,
    mut operation: TrackedOperation,
) {
    let none = || Vec::<LifecycleDelta>::new();
    for deltas in [deltas.clone(), heartbeat.deltas()] {
        is_refused(parent, deltas.push(delta("d")));
        is_refused(parent, deltas.push_all([delta("d"), delta("e")]));
        is_refused(parent, deltas.push_all(none()));
        is_refused(parent, deltas.begin(Operation::Deploy, "d"));
        is_refused(parent, deltas.run(Operation::Deploy, "d", || ()).map(drop));
    }
    is_refused(parent, heartbeat.begin(Operation::Deploy, "d"));
    is_refused(parent, heartbeat.run(Operation::Deploy, "d", || ()).map(drop));
    is_refused(parent, operation.end("tracked", Outcome::Succeeded));
    assert_eq!(operation.open().collect::<Vec<_>>(), ["tracked"]);
    drop(operation);
    let stats = heartbeat.stats();
    assert_eq!(
        (stats.ended_thread, stats.dormant, stats.waiting),
        (Some("decnet-heartbeat"), false, 0)
    );
    assert!(heartbeat.is_stalled());
    assert!(!heartbeat.flush(PATIENCE * 2));
    assert!(heartbeat.beats().try_recv().is_err());
    let Stopped { undelivered, operations, kept, in_time, .. } = heartbeat.stop(PATIENCE * 2);
    assert_eq!((undelivered, operations, kept, in_time), (0, 0, true, true));
}

fn every_call_of_a_child_is_an_error_at_once() {
    let stage = Stage::new();
    let heartbeat = stage.beating();
    let (deltas, parent) = (heartbeat.deltas(), process::id());
    let operation = heartbeat.begin(Operation::Deploy, "tracked").unwrap();
    let mut copies = Some((heartbeat, operation));
    in_a_child(|| {
        let (heartbeat, operation) = copies.take().unwrap();
        call_everything(parent, heartbeat, &deltas, operation);
    });
}

fn a_childs_drops_and_stops_leave_the_parent_alone() {
    let stage = Stage::new();
    stage.open(&["tracked", "pushed"]);
    let heartbeat = stage.beating();
    let deltas = heartbeat.deltas();
    let operation = heartbeat.begin(Operation::Deploy, "tracked").unwrap();
    // A POST is under way for a few seconds: an answer has over a hundred bytes.
    stage.master.script([Fault::Slowly(Duration::from_millis(20))]);
    deltas.push(delta("pushed")).unwrap();
    stage.waits_for("pushed", RowStatus::Succeeded);
    let mut copies = Some((heartbeat, deltas, operation));
    in_a_child(|| {
        copies.take().unwrap().0.stop(Duration::ZERO);
    });
    assert_eq!(stage.master.connections().len(), 1, "the parent's connection was cut");
    assert_eq!(copies.as_ref().unwrap().0.stats().delivered, 0, "the POST was over before");
    in_a_child(|| drop(copies.take()));
    let (heartbeat, deltas, operation) = copies.unwrap();
    assert!(heartbeat.flush(PATIENCE));
    assert!(heartbeat.stats().failure.is_none(), "{:?}", heartbeat.stats().failure);
    assert_eq!(stage.master.connections().len(), 1, "the parent's connection was cut");
    let error = stage.builder().start().unwrap_err();
    assert!(error.to_string().contains(&format!("process {} already", process::id())), "{error:?}");
    assert_eq!((stage.status("tracked"), heartbeat.stats().operations), (RowStatus::Running, 1));
    operation.succeed();
    drop(deltas);
    stage.waits_for("tracked", RowStatus::Succeeded);
    assert_eq!(heartbeat.stop(PATIENCE).undelivered, 0);
}

fn what_ends_in_a_child_has_not_ended() {
    let stage = Stage::new();
    stage.open(&["a", "b", "c", "last"]);
    let heartbeat = stage.beating();
    let begin = |decky| heartbeat.begin(Operation::Deploy, decky).unwrap();
    let mut operations = Some([begin("a"), begin("b"), begin("c")]);
    in_a_child(|| {
        let [a, b, c] = operations.take().unwrap();
        let since = Instant::now();
        a.succeed();
        b.fail("in the child");
        drop(c);
        // Each would wait a second for an outbox thread that does not run there.
        assert!(since.elapsed() < Duration::from_secs(1));
    });
    heartbeat.deltas().push(delta("last")).unwrap();
    stage.waits_for("last", RowStatus::Succeeded);
    assert_eq!(["a", "b", "c"].map(|decky| stage.status(decky)), [RowStatus::Running; 3]);
    operations.unwrap().into_iter().for_each(TrackedOperation::succeed);
    ["a", "b", "c"].iter().for_each(|decky| stage.waits_for(decky, RowStatus::Succeeded));
}

fn a_child_never_waits_for_a_mutex_of_the_parents_threads() {
    const FORKS: usize = 100;
    let stage = Stage::new();
    let heartbeat = stage.beating();
    let (deltas, parent, is_done) = (heartbeat.deltas(), process::id(), AtomicBool::new(false));
    let operation = heartbeat.begin(Operation::Deploy, "tracked").unwrap();
    let mut copies = Some((heartbeat, operation));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    // On a busy machine the disk may take longer than a second.
                    let _ = deltas.push_all([delta("p"), delta("q")]);
                }
            });
        }
        let forked = catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..FORKS {
                in_a_child(|| {
                    let (heartbeat, operation) = copies.take().unwrap();
                    call_everything(parent, heartbeat, &deltas, operation);
                });
            }
        }));
        is_done.store(true, Ordering::Relaxed);
        assert!(forked.is_ok());
    });
}

fn a_child_starts_its_own() {
    let stage = Stage::new();
    stage.open(&["d"]);
    let heartbeat = stage.beating();
    let (deltas, parent) = (heartbeat.deltas(), process::id());
    in_a_child(|| is_refused(parent, stage.builder().start()));
    heartbeat.stop(PATIENCE);
    // Its outbox is still open, for the sender.
    in_a_child(|| is_refused(parent, stage.builder().start()));
    drop(deltas);
    no_outbox_thread_runs();
    in_a_child(|| {
        let heartbeat = stage.builder().start().unwrap();
        heartbeat.deltas().push(delta("d")).unwrap();
        assert!(heartbeat.flush(PATIENCE));
        assert_eq!(heartbeat.stop(PATIENCE).undelivered, 0);
    });
    assert_eq!(stage.status("d"), RowStatus::Succeeded);
}

/// It closes the file within a moment, and no event says so.
fn no_outbox_thread_runs() {
    let runs = || {
        let mut tasks =
            fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
        // A thread may end before its name is read.
        tasks.any(|name| fs::read_to_string(name).is_ok_and(|name| name == "decnet-outbox\n"))
    };
    assert!((0..STEPS).any(|_| {
        let runs = runs();
        step();
        !runs
    }));
}

fn a_child_that_outlives_its_parent() {
    let stage = Stage::new();
    no_outbox_thread_runs();
    let (mut until_released, release) = io::pipe().unwrap();
    let mut release = Some(release);
    in_a_child(|| {
        let _heartbeat = stage.beating();
        if matches!(fork().unwrap(), Fork::Child) {
            drop(release.take());
            let _ = until_released.read(&mut [0]);
        }
        process::exit(0);
    });
    let error = stage.builder().start().unwrap_err();
    assert!(error.is_outbox() && error.to_string().contains(" already"), "{error:?}");
    drop(release);
    let starts = (0..STEPS).find_map(|_| {
        step();
        stage.builder().start().ok()
    });
    starts.expect("the lock is free once the child has ended").stop(PATIENCE);
}
