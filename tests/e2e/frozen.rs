//! The agent dir on a disk that does not answer: frozen by `fsfreeze`, or with each sync delayed by 8 s. Beats stay on time, each
//! call returns in its time and says what has become of its delta, and no delta is lost or sent twice.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::Fault;
use decnet_heartbeat::{
    DeltaSender, Error, Heartbeat, LifecycleDelta, Operation, Snapshot, TrackedOperation,
};
use serde_json::json;

use crate::support::{Freezable, Loopback, process, settled};

const PATIENCE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(200);
/// A call waits a second for the disk.
const CALL: Duration = Duration::from_secs(1);
/// A busy machine wakes a thread this much later.
const SLACK: Duration = Duration::from_millis(500);
/// Between two beats: the interval, once the 250 ms that a batch is waited for, and the slack.
const GAP: Duration = Duration::from_millis(200 + 250 + 500);

/// What became of a delta, or of an operation's beginning, as its caller was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    QueuedDelta,
    NothingKept,
    InDoubt,
}

/// What a call said, which must have returned in time.
#[track_caller]
fn told<T>(call: impl FnOnce() -> Result<T, Error>) -> Told {
    let since = Instant::now();
    let answer = call();
    let took = since.elapsed();
    assert!(took < CALL + SLACK, "a call took {took:?}");
    match answer {
        Ok(_) => Told::QueuedDelta,
        Err(error) if error.is_in_doubt() => Told::InDoubt,
        Err(error) => {
            assert!(error.is_outbox(), "{error:?}");
            Told::NothingKept
        }
    }
}

/// Work of an operation that could not begin.
fn not_begun() {
    panic!("it has not begun");
}

fn deployed(decky: impl Into<String>) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

#[track_caller]
fn push(deltas: &DeltaSender, decky: &str) -> Told {
    told(|| deltas.push(deployed(decky)))
}

/// A heartbeat with an interval, whose first beat was accepted.
fn start(loopback: &Loopback) -> Heartbeat {
    start_every(INTERVAL, loopback)
}

fn start_every(interval: Duration, loopback: &Loopback) -> Heartbeat {
    let source = || Snapshot::new(&json!({"deployed": false, "deckies": []}));
    let builder = Heartbeat::builder().enrolment(loopback.worker.enrolment().unwrap());
    let before = loopback.master.received().len();
    let heartbeat = builder.interval(interval).status_source(source).start().unwrap();
    assert!(loopback.master.wait_until(PATIENCE, |seen| seen.received().len() > before));
    heartbeat
}

/// Waits for beats so long, and says that none was late since then.
#[track_caller]
fn beats_on_time(loopback: &Loopback, since: Instant, long: Duration) {
    thread::sleep(long);
    let mut last = since;
    for at in loopback.master.received().iter().map(|request| request.at).filter(|at| *at > since) {
        assert!(at - last < GAP, "no beat for {:?}", at - last);
        last = at;
    }
    assert!(last.elapsed() < GAP, "no beat for {:?}", last.elapsed());
}

/// Each delta was sent as often as its caller was told.
#[track_caller]
fn sent_as_told<'a>(loopback: &Loopback, told: impl IntoIterator<Item = (&'a str, Told)>) {
    let mut times = BTreeMap::<_, u32>::new();
    loopback.sent().into_iter().for_each(|decky| *times.entry(decky).or_default() += 1);
    for (decky, told) in told {
        let expected = u32::from(told != Told::NothingKept);
        assert_eq!(times.remove(decky).unwrap_or_default(), expected, "{decky}: {told:?}");
    }
    assert_eq!(times, BTreeMap::new(), "nobody has pushed these");
}

/// Waits until nothing is asked of the disk and nothing waits.
fn all_is_sent(heartbeat: &Heartbeat) {
    settled(heartbeat, |stats| {
        stats.waiting == 0 && stats.outbox_busy_since.is_none() && stats.outbox.is_some()
    });
    assert!(heartbeat.flush(PATIENCE));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn deltas_that_wait_when_the_disk_freezes_are_sent_once_and_beats_stay_on_time() {
    let disk = Freezable::mount();
    let mut loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    loopback.master.stop();
    let waiting = ["w0", "w1", "w2"];
    waiting
        .iter()
        .for_each(|decky| assert_eq!(push(&heartbeat.deltas(), decky), Told::QueuedDelta));
    disk.freeze();
    loopback.master.start_again().unwrap();
    let beats = loopback.master.received().len();
    assert!(loopback.master.wait_until(PATIENCE, |seen| seen.received().len() > beats));
    let since = Instant::now();
    let first = push(&heartbeat.deltas(), "first");
    assert_ne!(first, Told::QueuedDelta, "the disk is frozen");
    let second = push(&heartbeat.deltas(), "second");
    assert_eq!(second, Told::NothingKept, "it was queued behind the first");
    beats_on_time(&loopback, since, Duration::from_secs(1));
    let stats = heartbeat.stats();
    assert!(stats.outbox_busy_since.is_some_and(|at| at.elapsed().unwrap() > CALL), "{stats:?}");
    assert!(!heartbeat.is_stalled() && !heartbeat.flush(Duration::from_millis(100)));
    disk.thaw();
    all_is_sent(&heartbeat);
    let third = push(&heartbeat.deltas(), "third");
    assert_eq!(third, Told::QueuedDelta);
    all_is_sent(&heartbeat);
    let told = waiting.map(|decky| (decky, Told::QueuedDelta)).into_iter();
    sent_as_told(&loopback, told.chain([("first", first), ("second", second), ("third", third)]));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn a_delta_whose_acknowledgement_the_disk_does_not_take_is_not_sent_again() {
    let disk = Freezable::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    // The answer to the delta comes a byte at a time.
    loopback.master.always(Some(Fault::Slowly(Duration::from_millis(2))));
    assert_eq!(push(&heartbeat.deltas(), "d"), Told::QueuedDelta);
    let has_delta = |bytes: &[u8]| bytes.windows(3).any(|part| part == b"\"d\"");
    assert!(
        loopback
            .master
            .wait_until(PATIENCE, |seen| seen.received().iter().any(|beat| has_delta(&beat.body)))
    );
    disk.freeze();
    let since = Instant::now();
    loopback.master.always(None);
    let stats =
        settled(&heartbeat, |stats| stats.delivered == 1 && stats.outbox_busy_since.is_some());
    assert_eq!(stats.waiting, 0, "the master has it");
    beats_on_time(&loopback, since, Duration::from_secs(2));
    assert!(!heartbeat.is_stalled());
    disk.thaw();
    all_is_sent(&heartbeat);
    assert!(heartbeat.stop(PATIENCE).kept);
    // Nor by the next start.
    all_is_sent(&start(&loopback));
    sent_as_told(&loopback, [("d", Told::QueuedDelta)]);
}

#[test]
#[ignore = "mounts, and so needs root"]
fn a_stop_is_bounded_at_a_frozen_disk_and_the_next_heartbeat_takes_over_after_the_thaw() {
    let disk = Freezable::mount();
    let mut loopback = Loopback::new(&disk.path().join("agent"));
    let mut expected = Vec::new();
    for (n, grace) in
        [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)].into_iter().enumerate()
    {
        let [waits, asked, beside] = ["waits", "asked", "beside"].map(|name| format!("{name}-{n}"));
        let heartbeat = start(&loopback);
        loopback.master.stop();
        expected.push((waits.clone(), push(&heartbeat.deltas(), &waits)));
        disk.freeze();
        // While the thread is stuck in the commit of this one.
        let deltas = heartbeat.deltas();
        let asked_for = push(&deltas, &asked);
        expected.push((asked, asked_for));
        let since = Instant::now();
        let stopped = heartbeat.stop(grace);
        assert!(
            since.elapsed() < grace + SLACK,
            "a stop with {grace:?} took {:?}",
            since.elapsed()
        );
        assert_eq!(stopped.undelivered, 1, "{stopped:?}");
        assert!(!stopped.kept || asked_for == Told::NothingKept, "{stopped:?}");
        loopback.master.start_again().unwrap();

        // It beats, and delivers when the lock is free, which the stuck thread has until it has written what it was asked to.
        let since = Instant::now();
        let second = start(&loopback);
        assert!(
            since.elapsed() < Duration::from_secs(6) + SLACK,
            "a start took {:?}",
            since.elapsed()
        );
        beats_on_time(&loopback, Instant::now(), Duration::from_millis(500));
        expected.push((beside.clone(), push(&second.deltas(), &beside)));
        assert_eq!(second.stats().delivered, 0);
        assert!(!second.is_stalled());
        disk.thaw();
        let told = if n == 0 { None } else { Some(push(&deltas, &format!("late-{n}"))) };
        expected.extend(told.map(|told| (format!("late-{n}"), told)));
        drop(deltas);
        all_is_sent(&second);
        let since = Instant::now();
        drop(second);
        assert!(since.elapsed() < Duration::from_secs(2) + SLACK);
    }
    sent_as_told(&loopback, expected.iter().map(|(decky, told)| (decky.as_str(), *told)));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn a_stop_at_a_frozen_disk_knows_what_is_on_it() {
    let disk = Freezable::mount();
    let mut loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    loopback.master.stop();
    assert_eq!(push(&heartbeat.deltas(), "d"), Told::QueuedDelta);
    disk.freeze();
    // Beats ask the outbox meanwhile, and change nothing in it.
    thread::sleep(INTERVAL * 5);
    let stopped = heartbeat.stop(Duration::from_millis(100));
    assert_eq!((stopped.undelivered, stopped.kept, stopped.in_time), (1, true, true));
    disk.thaw();
    loopback.master.start_again().unwrap();
    all_is_sent(&start(&loopback));
    sent_as_told(&loopback, [("d", Told::QueuedDelta)]);
}

/// No request reaches the outbox thread between its last change and the freeze.
#[test]
#[ignore = "mounts, and so needs root"]
fn a_stop_at_a_disk_that_froze_after_the_last_change_knows_what_is_on_it() {
    for is_delivered in [false, true] {
        let disk = Freezable::mount();
        let loopback = Loopback::new(&disk.path().join("agent"));
        // Longer than the test: a tick would be a request.
        let heartbeat = start_every(Duration::from_secs(600), &loopback);
        if !is_delivered {
            loopback.master.decommission(&loopback.worker.uuid);
        }
        assert_eq!(push(&heartbeat.deltas(), "d"), Told::QueuedDelta);
        settled(&heartbeat, |stats| {
            if is_delivered { stats.delivered == 1 } else { stats.failure.is_some() }
        });
        // A wait for an event would be a request, too.
        thread::sleep(Duration::from_millis(200));
        disk.freeze();
        let stopped = heartbeat.stop(Duration::from_millis(100));
        let undelivered = u64::from(!is_delivered);
        assert_eq!((stopped.undelivered, stopped.kept, stopped.in_time), (undelivered, true, true));
        disk.thaw();
    }
}

#[test]
#[ignore = "mounts, and so needs root"]
fn a_drop_at_a_frozen_disk_loses_nothing_that_was_kept() {
    let disk = Freezable::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    assert_eq!(push(&heartbeat.deltas(), "before"), Told::QueuedDelta);
    let operation = heartbeat.begin(Operation::Mutate, "tracked").unwrap();
    let deltas = heartbeat.deltas();
    all_is_sent(&heartbeat);
    disk.freeze();
    let first = push(&deltas, "first");
    let since = Instant::now();
    drop(heartbeat);
    assert!(since.elapsed() < Duration::from_secs(2) + SLACK, "{:?}", since.elapsed());
    let since = Instant::now();
    operation.succeed();
    assert!(since.elapsed() < CALL + SLACK, "{:?}", since.elapsed());
    let outlives = push(&deltas, "outlives");
    assert_ne!(outlives, Told::QueuedDelta);
    let since = Instant::now();
    drop(deltas);
    assert!(since.elapsed() < SLACK, "{:?}", since.elapsed());
    disk.thaw();
    let heartbeat = start(&loopback);
    settled(&heartbeat, |stats| stats.operations == 0);
    all_is_sent(&heartbeat);
    let expected = [
        ("before", Told::QueuedDelta),
        ("tracked", Told::QueuedDelta),
        ("first", first),
        ("outlives", outlives),
    ];
    sent_as_told(&loopback, expected);
}

#[test]
#[ignore = "mounts, and so needs root"]
fn calls_of_several_threads_at_a_frozen_disk_return_in_time_and_mean_what_they_say() {
    const THREADS: usize = 4;
    let disk = Freezable::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    let operation = heartbeat.begin(Operation::Mutate, "in-flight").unwrap();
    disk.freeze();
    let since = Instant::now();
    let mut expected = vec![("in-flight".to_owned(), Told::QueuedDelta)];
    thread::scope(|scope| {
        // What is asked for first is taken, and in doubt.
        let begun = scope.spawn(|| told(|| heartbeat.begin(Operation::Deploy, ["begun", "held"])));
        thread::sleep(Duration::from_millis(100));
        let ended = scope.spawn(|| {
            let since = Instant::now();
            operation.succeed();
            assert!(since.elapsed() < CALL + SLACK, "an end took {:?}", since.elapsed());
        });
        let run = scope.spawn(|| told(|| heartbeat.run(Operation::Deploy, "run", not_begun)));
        let pushers: Vec<_> = (0..THREADS)
            .map(|pusher| {
                let deltas = heartbeat.deltas();
                let names = (0..3).map(move |n| format!("p-{pusher}-{n}"));
                scope.spawn(move || {
                    names.map(|name| (name.clone(), push(&deltas, &name))).collect::<Vec<_>>()
                })
            })
            .collect();
        beats_on_time(&loopback, since, Duration::from_secs(3));
        assert_ne!(begun.join().unwrap(), Told::QueuedDelta);
        assert_ne!(run.join().unwrap(), Told::QueuedDelta);
        ended.join().unwrap();
        expected.extend(pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()));
    });
    assert!(!heartbeat.is_stalled());
    disk.thaw();
    all_is_sent(&heartbeat);
    // An operation whose caller has been told that it has not begun holds nothing back, and is not reported.
    expected.push(("held".to_owned(), push(&heartbeat.deltas(), "held")));
    all_is_sent(&heartbeat);
    let stats = settled(&heartbeat, |stats| stats.operations == 0);
    assert_eq!((stats.held, stats.dropped), (0, 0));
    sent_as_told(&loopback, expected.iter().map(|(decky, told)| (decky.as_str(), *told)));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn a_start_at_a_frozen_disk_beats_and_delivers_after_the_thaw() {
    let disk = Freezable::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    disk.freeze();
    let since = Instant::now();
    let heartbeat = start(&loopback);
    assert!(since.elapsed() < Duration::from_secs(6) + SLACK, "a start took {:?}", since.elapsed());
    let (since, first) = (Instant::now(), push(&heartbeat.deltas(), "first"));
    assert_eq!(first, Told::NothingKept, "the outbox is not open yet");
    beats_on_time(&loopback, since, Duration::from_secs(1));
    let stats = heartbeat.stats();
    assert!(
        stats.outbox.is_none() && stats.outbox_busy_since.is_some() && !heartbeat.is_stalled(),
        "{stats:?}"
    );
    disk.thaw();
    settled(&heartbeat, |stats| stats.outbox.is_some());
    let second = push(&heartbeat.deltas(), "second");
    assert_eq!(second, Told::QueuedDelta);
    all_is_sent(&heartbeat);
    sent_as_told(&loopback, [("first", first), ("second", second)]);
}

#[test]
#[ignore = "mounts, and so needs root"]
fn the_program_beats_at_a_frozen_disk_and_ends_after_the_thaw() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), Freezable::mount());
    let loopback = Loopback::new(&disk.path().join("agent"));
    let mut command = program(Command::new(PROGRAM), &loopback, dir.path());
    command.args(["run", "--interval", "200ms", "--state-file", "/no/such"]);
    command.args(["--docker-socket", "/no/such"]).stderr(Stdio::null());
    let mut running = command.spawn().unwrap();
    assert!(loopback.master.wait_for_beats(3, PATIENCE));
    disk.freeze();
    beats_on_time(&loopback, Instant::now(), Duration::from_secs(2));
    process::signal("TERM", running.id());
    thread::sleep(SLACK);
    let before = loopback.master.received().len();
    thread::sleep(GAP);
    assert_eq!(loopback.master.received().len(), before, "it has stopped");
    disk.thaw();
    assert_eq!(process::end(&mut running, PATIENCE).and_then(|status| status.code()), Some(0));
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

/// The program, for the loopback's worker, or what starts it, with the ini in this folder.
fn program(mut command: Command, loopback: &Loopback, folder: &Path) -> Command {
    let ini = folder.join("decnet.ini");
    loopback.worker.write_ini(&ini).unwrap();
    command.env("DECNET_CONFIG", "/no/such").arg("--config").arg(ini);
    command
}

#[test]
#[ignore = "mounts, and so needs root"]
fn an_operation_is_reported_in_time_though_the_disk_freezes_meanwhile() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), Freezable::mount());
    let loopback = Loopback::new(&disk.path().join("agent"));
    let mut command = program(Command::new(PROGRAM), &loopback, dir.path());
    command.args(["track", "--timeout", "5s", "--operation", "deploy"]).stderr(Stdio::null());
    let deckies: BTreeSet<_> = (0..8).map(|n| format!("d{n}")).collect();
    command.args(deckies.iter().flat_map(|decky| ["--decky", decky]));
    let mut running = command.args(["--", "fsfreeze", "-f"]).arg(disk.path()).spawn().unwrap();
    let is_reported = loopback.master.wait_until(PATIENCE, |seen| seen.received().len() == 1);
    disk.thaw();
    assert_eq!(process::end(&mut running, PATIENCE).and_then(|status| status.code()), Some(0));
    assert!(is_reported);
    assert_eq!(BTreeSet::from_iter(loopback.sent()), deckies);
}

#[test]
#[ignore = "needs strace"]
fn a_report_that_is_in_doubt_is_not_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&dir.path().join("agent"));
    let heartbeat = start(&loopback);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]);
    strace.args(["-e", "inject=fsync,fdatasync:delay_enter=1500ms", PROGRAM]);
    let mut command = program(strace, &loopback, dir.path());
    command.args(["track", "--no-wait", "--operation", "deploy", "--decky", "d"]);
    // The beginning is in doubt, and withdrawn when the command ends.
    process::run(command.args(["--", "sleep", "5"]));
    // What another process adds is found with a beat.
    let beats = loopback.master.received().len();
    assert!(loopback.master.wait_until(PATIENCE, |seen| seen.received().len() > beats + 3));
    all_is_sent(&heartbeat);
    assert_eq!(loopback.sent(), ["d"]);
}

/// Delays each sync of this process by so much from now on, or those of one file, until the guard is dropped.
fn delay_syncs(delay: Duration, of: Option<&Path>) -> impl Drop + use<> {
    struct Strace(std::process::Child);
    impl Drop for Strace {
        fn drop(&mut self) {
            process::signal("INT", self.0.id());
            let _ = self.0.wait();
        }
    }
    let mut strace = Command::new("strace");
    let inject = format!("inject=fsync,fdatasync:delay_enter={}", delay.as_micros());
    strace.args(["-f", "-e", "trace=fsync,fdatasync", "-e", &inject]);
    if let Some(file) = of {
        strace.arg("-P").arg(file);
    }
    strace
        .args(["-p", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut strace = Strace(strace.spawn().unwrap());
    let mut lines = BufReader::new(strace.0.stderr.take().unwrap()).lines();
    assert!(
        lines.any(|line| line.unwrap().contains(" attached")),
        "strace has not attached to this process"
    );
    thread::spawn(move || lines.for_each(drop));
    strace
}

/// A process of its own, as its system calls are delayed: `None` in the one that has started it, and waited for it.
fn alone(test: &str) -> Option<Loopback> {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_SLOW";
    if let Some(agent_dir) = std::env::var_os(CHILD) {
        return Some(Loopback::new(Path::new(&agent_dir)));
    }
    let dir = tempfile::tempdir().unwrap();
    process::run(process::again(&format!("frozen::{test}")).env(CHILD, dir.path().join("agent")));
    None
}

#[test]
#[ignore = "needs strace"]
fn with_eight_seconds_for_each_sync_beats_stay_on_time_and_nothing_is_lost_or_sent_twice() {
    let name =
        "with_eight_seconds_for_each_sync_beats_stay_on_time_and_nothing_is_lost_or_sent_twice";
    let Some(loopback) = alone(name) else { return };
    let heartbeat = start(&loopback);
    assert_eq!(push(&heartbeat.deltas(), "before"), Told::QueuedDelta);
    all_is_sent(&heartbeat);
    let delay = delay_syncs(Duration::from_secs(8), None);
    let since = Instant::now();
    let first = push(&heartbeat.deltas(), "first");
    assert_eq!(first, Told::InDoubt, "it is being synced");
    let second = push(&heartbeat.deltas(), "second");
    assert_eq!(second, Told::NothingKept, "it was queued behind the first");
    beats_on_time(&loopback, since, Duration::from_secs(5));
    let stats = settled(&heartbeat, |stats| stats.delivered == 2);
    assert!(since.elapsed() > Duration::from_secs(8), "{stats:?}");
    assert!(!heartbeat.is_stalled());
    // What is acknowledged is being synced, too.
    beats_on_time(&loopback, since, Duration::from_secs(2));
    let third = push(&heartbeat.deltas(), "third");
    let since = Instant::now();
    let stopped = heartbeat.stop(Duration::ZERO);
    assert!(since.elapsed() < SLACK, "{:?}", since.elapsed());
    assert!(!stopped.kept && stopped.undelivered == 0, "{stopped:?}");
    // The acknowledgement is not on the disk yet, so the next heartbeat must not deliver from it.
    let next = start(&loopback);
    beats_on_time(&loopback, Instant::now(), Duration::from_secs(1));
    assert_eq!(next.stats().delivered, 0);
    drop(delay);
    all_is_sent(&next);
    assert_eq!(next.stats().delivered, 0);
    sent_as_told(
        &loopback,
        [("before", Told::QueuedDelta), ("first", first), ("second", second), ("third", third)],
    );
}

#[test]
#[ignore = "needs strace"]
fn the_delivery_lock_is_kept_until_the_last_acknowledgement_is_on_the_disk() {
    let name = "the_delivery_lock_is_kept_until_the_last_acknowledgement_is_on_the_disk";
    let Some(loopback) = alone(name) else { return };
    let first = start(&loopback);
    assert_eq!(push(&first.deltas(), "before"), Told::QueuedDelta);
    all_is_sent(&first);
    // The commits, and nothing that an open waits for.
    let file = first.stats().outbox.unwrap().with_file_name("heartbeat.db-wal");
    let _delay = delay_syncs(Duration::from_secs(3), Some(&file.canonicalize().unwrap()));
    assert_eq!(push(&first.deltas(), "d"), Told::InDoubt);
    settled(&first, |stats| stats.delivered == 2);
    let since = Instant::now();
    let stopped = first.stop(Duration::ZERO);
    assert_eq!((stopped.undelivered, stopped.kept), (0, false));
    let second = start(&loopback);
    beats_on_time(&loopback, Instant::now(), Duration::from_secs(1));
    assert!(since.elapsed() < Duration::from_secs(3), "the acknowledgement is not on the disk yet");
    assert_eq!(second.stats().delivered, 0);
    // It takes over, and finds nothing that waits.
    let told = loop {
        match push(&second.deltas(), "e") {
            Told::NothingKept => assert!(since.elapsed() < PATIENCE),
            told => break told,
        }
    };
    settled(&second, |stats| stats.delivered == 1);
    assert!(since.elapsed() > Duration::from_secs(2), "it has waited for the lock");
    all_is_sent(&second);
    sent_as_told(&loopback, [("before", Told::QueuedDelta), ("d", Told::InDoubt), ("e", told)]);
}

#[test]
#[ignore = "needs strace"]
fn with_a_third_of_a_second_for_each_sync_deltas_are_sent_while_threads_push_and_begin_all_the_time()
 {
    let name = "with_a_third_of_a_second_for_each_sync_deltas_are_sent_while_threads_push_and_begin_all_the_time";
    let Some(loopback) = alone(name) else { return };
    // As Docker does.
    let source = || {
        thread::sleep(Duration::from_millis(100));
        Snapshot::new(&json!({"deployed": false, "deckies": []}))
    };
    let builder = Heartbeat::builder().enrolment(loopback.worker.enrolment().unwrap());
    let heartbeat = builder.interval(PATIENCE * 10).status_source(source).start().unwrap();
    assert!(loopback.master.wait_for_beats(1, PATIENCE));
    let _delay = delay_syncs(Duration::from_millis(300), None);
    let done = AtomicBool::new(false);
    let told: Vec<_> = thread::scope(|scope| {
        let pushers = (0..8).map(|pusher| {
            let (deltas, done) = (heartbeat.deltas(), &done);
            let work = move || {
                let names = (0..)
                    .map(|n| format!("d-{pusher}-{n}"))
                    .take_while(|_| !done.load(Ordering::Relaxed));
                let report = |decky: String| {
                    let told = match pusher % 2 {
                        0 => push(&deltas, &decky),
                        // What has begun in doubt is removed again.
                        _ => match told(|| {
                            deltas.begin(Operation::Deploy, &decky).map(TrackedOperation::succeed)
                        }) {
                            Told::InDoubt => Told::NothingKept,
                            told => told,
                        },
                    };
                    (decky, told)
                };
                names.map(report).collect::<Vec<_>>()
            };
            scope.spawn(work)
        });
        let pushers: Vec<_> = pushers.collect();
        let end = Instant::now() + PATIENCE;
        while heartbeat.stats().delivered < 20 && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        done.store(true, Ordering::Relaxed);
        let delivered = heartbeat.stats().delivered;
        let told = pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()).collect();
        assert!(delivered >= 20, "{delivered} were sent");
        told
    });
    all_is_sent(&heartbeat);
    sent_as_told(&loopback, told.iter().map(|(decky, told)| (decky.as_str(), *told)));
}
