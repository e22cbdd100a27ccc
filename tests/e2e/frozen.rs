//! The agent dir on a disk that does not respond: it is frozen by `fsfreeze`, or each sync is
//! delayed. Beats stay on time, each call returns in time with the state of its delta, and no delta
//! is lost or sent twice.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::Fault;
use decnet_heartbeat::{DeltaSender, Error, Heartbeat, Operation, TrackedOperation};

use crate::support::{
    FreezableDisk, Loopback, TIMEOUT, commands, deployed, nothing_deployed, wait_for_stats,
};

const INTERVAL: Duration = Duration::from_millis(200);
/// How long a call waits for the disk.
const CALL_WAIT: Duration = Duration::from_secs(1);
/// How much later a busy machine wakes a thread.
const SLACK: Duration = Duration::from_millis(500);
/// The longest time between two beats: the interval, the 250 ms that a beat waits for its deltas,
/// and the slack.
const MAX_GAP: Duration = Duration::from_millis(200 + 250 + 500);

/// The result of a push, or of a call that begins an operation, for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallResult {
    Queued,
    NotQueued,
    InDoubt,
}

/// Asserts that a call returns in time.
#[track_caller]
fn call_in_time<T>(call: impl FnOnce() -> Result<T, Error>) -> CallResult {
    let since = Instant::now();
    let result = call();
    let took = since.elapsed();
    assert!(took < CALL_WAIT + SLACK, "a call took {took:?}");
    match result {
        Ok(_) => CallResult::Queued,
        Err(error) if error.is_in_doubt() => CallResult::InDoubt,
        Err(error) => {
            assert!(error.is_outbox(), "{error:?}");
            CallResult::NotQueued
        }
    }
}

/// Asserts that the time since then is less than the limit and the slack.
#[track_caller]
fn assert_within(since: Instant, limit: Duration) {
    let took = since.elapsed();
    assert!(took < limit + SLACK, "it took {took:?}, not {limit:?}");
}

/// The work of an operation that cannot begin.
fn must_not_run() {
    panic!("the operation has not begun");
}

#[track_caller]
fn push(deltas: &DeltaSender, decky: &str) -> CallResult {
    call_in_time(|| deltas.push(deployed(decky)))
}

/// Starts a heartbeat and waits for its first beat.
fn start(loopback: &Loopback) -> Heartbeat {
    start_with_interval(INTERVAL, loopback)
}

fn start_with_interval(interval: Duration, loopback: &Loopback) -> Heartbeat {
    let builder = Heartbeat::builder().enrolment(loopback.worker.enrolment().unwrap());
    let before = loopback.master.received().len();
    let heartbeat = builder.interval(interval).status_source(nothing_deployed).start().unwrap();
    assert!(loopback.master.wait_until(TIMEOUT, |seen| seen.received().len() > before));
    heartbeat
}

/// Lets beats pass for this time, and asserts that none was late since then. The end of the time is
/// no event, so it sleeps.
#[track_caller]
fn assert_beats_on_time(loopback: &Loopback, since: Instant, time: Duration) {
    thread::sleep(time);
    let mut last = since;
    for at in loopback.master.received().iter().map(|request| request.at).filter(|at| *at > since) {
        assert!(at - last < MAX_GAP, "no beat for {:?}", at - last);
        last = at;
    }
    assert!(last.elapsed() < MAX_GAP, "no beat for {:?}", last.elapsed());
}

/// Asserts that each delta was sent once, or not at all if it was not queued.
#[track_caller]
fn assert_sent<'a>(loopback: &Loopback, results: impl IntoIterator<Item = (&'a str, CallResult)>) {
    let mut times = BTreeMap::<_, u32>::new();
    loopback.sent().into_iter().for_each(|decky| *times.entry(decky).or_default() += 1);
    for (decky, result) in results {
        let expected = u32::from(result != CallResult::NotQueued);
        assert_eq!(times.remove(decky).unwrap_or_default(), expected, "{decky}: {result:?}");
    }
    assert_eq!(times, BTreeMap::new(), "these deltas were not pushed");
}

/// Waits until no delta waits, and the outbox thread is idle.
fn wait_until_sent(heartbeat: &Heartbeat) {
    wait_for_stats(heartbeat, |stats| {
        stats.waiting == 0 && stats.outbox_busy_since.is_none() && stats.outbox.is_some()
    });
    assert!(heartbeat.flush(TIMEOUT));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn queued_deltas_are_sent_once_and_beats_stay_on_time_on_frozen_disk() {
    let disk = FreezableDisk::mount();
    let mut loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    loopback.master.stop();
    let waiting = ["w0", "w1", "w2"];
    waiting
        .iter()
        .for_each(|decky| assert_eq!(push(&heartbeat.deltas(), decky), CallResult::Queued));
    disk.freeze();
    loopback.master.start_again().unwrap();
    let beats = loopback.master.received().len();
    assert!(loopback.master.wait_until(TIMEOUT, |seen| seen.received().len() > beats));
    let since = Instant::now();
    let first = push(&heartbeat.deltas(), "first");
    assert_ne!(first, CallResult::Queued, "the disk is frozen");
    let second = push(&heartbeat.deltas(), "second");
    assert_eq!(second, CallResult::NotQueued, "it waits behind the first");
    assert_beats_on_time(&loopback, since, Duration::from_secs(1));
    let stats = heartbeat.stats();
    assert!(
        stats.outbox_busy_since.is_some_and(|at| at.elapsed().unwrap() > CALL_WAIT),
        "{stats:?}"
    );
    assert!(!heartbeat.is_stalled() && !heartbeat.flush(Duration::from_millis(100)));
    disk.thaw();
    wait_until_sent(&heartbeat);
    let third = push(&heartbeat.deltas(), "third");
    assert_eq!(third, CallResult::Queued);
    wait_until_sent(&heartbeat);
    let results = waiting.map(|decky| (decky, CallResult::Queued)).into_iter();
    assert_sent(&loopback, results.chain([("first", first), ("second", second), ("third", third)]));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn delta_is_not_sent_again_if_ack_waits_for_frozen_disk() {
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    // The answer to the delta is sent byte by byte.
    loopback.master.always(Some(Fault::Slowly(Duration::from_millis(2))));
    assert_eq!(push(&heartbeat.deltas(), "d"), CallResult::Queued);
    let has_delta = |bytes: &[u8]| bytes.windows(3).any(|part| part == b"\"d\"");
    assert!(
        loopback
            .master
            .wait_until(TIMEOUT, |seen| seen.received().iter().any(|beat| has_delta(&beat.body)))
    );
    disk.freeze();
    let since = Instant::now();
    loopback.master.always(None);
    let stats = wait_for_stats(&heartbeat, |stats| {
        stats.delivered == 1 && stats.outbox_busy_since.is_some()
    });
    assert_eq!(stats.waiting, 0, "the master has the delta");
    assert_beats_on_time(&loopback, since, Duration::from_secs(2));
    assert!(!heartbeat.is_stalled());
    disk.thaw();
    wait_until_sent(&heartbeat);
    assert!(heartbeat.stop(TIMEOUT).durable);
    // It is not sent by the next heartbeat, either.
    wait_until_sent(&start(&loopback));
    assert_sent(&loopback, [("d", CallResult::Queued)]);
}

#[test]
#[ignore = "mounts, and so needs root"]
fn stop_is_bounded_on_frozen_disk_and_next_heartbeat_delivers_after_thaw() {
    let disk = FreezableDisk::mount();
    let mut loopback = Loopback::new(&disk.path().join("agent"));
    let mut expected = Vec::new();
    for (n, grace) in
        [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)].into_iter().enumerate()
    {
        let [queued, in_doubt, second_process] =
            ["queued", "in-doubt", "second"].map(|name| format!("{name}-{n}"));
        let heartbeat = start(&loopback);
        loopback.master.stop();
        expected.push((queued.clone(), push(&heartbeat.deltas(), &queued)));
        disk.freeze();
        // The outbox thread is blocked in the commit of this delta.
        let deltas = heartbeat.deltas();
        let blocked = push(&deltas, &in_doubt);
        expected.push((in_doubt, blocked));
        let since = Instant::now();
        let stopped = heartbeat.stop(grace);
        assert_within(since, grace);
        assert_eq!(stopped.undelivered, 1, "{stopped:?}");
        assert!(!stopped.durable || blocked == CallResult::NotQueued, "{stopped:?}");
        loopback.master.start_again().unwrap();

        // The second heartbeat beats at once. It delivers when the blocked thread has written its
        // delta and released the delivery lock.
        let since = Instant::now();
        let second = start(&loopback);
        assert_within(since, Duration::from_secs(6));
        assert_beats_on_time(&loopback, Instant::now(), Duration::from_millis(500));
        let result = push(&second.deltas(), &second_process);
        expected.push((second_process, result));
        assert_eq!(second.stats().delivered, 0);
        assert!(!second.is_stalled());
        disk.thaw();
        if n > 0 {
            let late = format!("late-{n}");
            let result = push(&deltas, &late);
            expected.push((late, result));
        }
        drop(deltas);
        wait_until_sent(&second);
        let since = Instant::now();
        drop(second);
        assert_within(since, Duration::from_secs(2));
    }
    assert_sent(&loopback, expected.iter().map(|(decky, result)| (decky.as_str(), *result)));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn stop_on_frozen_disk_reports_synced_deltas_as_durable() {
    let disk = FreezableDisk::mount();
    let mut loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    loopback.master.stop();
    assert_eq!(push(&heartbeat.deltas(), "d"), CallResult::Queued);
    disk.freeze();
    // Some beats read the outbox and change nothing in it.
    let beats = heartbeat.beats();
    for _ in 0..3 {
        beats.recv_timeout(TIMEOUT).unwrap();
    }
    let stopped = heartbeat.stop(Duration::from_millis(100));
    assert_eq!((stopped.undelivered, stopped.durable, stopped.in_time), (1, true, true));
    disk.thaw();
    loopback.master.start_again().unwrap();
    wait_until_sent(&start(&loopback));
    assert_sent(&loopback, [("d", CallResult::Queued)]);
}

/// The outbox thread gets no request between its last change and the freeze.
#[test]
#[ignore = "mounts, and so needs root"]
fn stop_reports_durable_if_disk_froze_after_last_change() {
    for is_delivered in [false, true] {
        let disk = FreezableDisk::mount();
        let loopback = Loopback::new(&disk.path().join("agent"));
        // Longer than the test, because a tick causes a request.
        let heartbeat = start_with_interval(Duration::from_secs(600), &loopback);
        if !is_delivered {
            loopback.master.decommission(&loopback.worker.uuid);
        }
        assert_eq!(push(&heartbeat.deltas(), "d"), CallResult::Queued);
        wait_for_stats(&heartbeat, |stats| {
            if is_delivered { stats.delivered == 1 } else { stats.failure.is_some() }
        });
        // It sleeps until the thread is idle. Waiting for an event would cause a request, too.
        thread::sleep(Duration::from_millis(200));
        disk.freeze();
        let stopped = heartbeat.stop(Duration::from_millis(100));
        let undelivered = u64::from(!is_delivered);
        assert_eq!(
            (stopped.undelivered, stopped.durable, stopped.in_time),
            (undelivered, true, true)
        );
        disk.thaw();
    }
}

#[test]
#[ignore = "mounts, and so needs root"]
fn drop_on_frozen_disk_loses_no_queued_delta() {
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    assert_eq!(push(&heartbeat.deltas(), "before"), CallResult::Queued);
    let operation = heartbeat.begin(Operation::Mutate, "tracked").unwrap();
    let deltas = heartbeat.deltas();
    wait_until_sent(&heartbeat);
    disk.freeze();
    let first = push(&deltas, "first");
    let since = Instant::now();
    drop(heartbeat);
    assert_within(since, Duration::from_secs(2));
    let since = Instant::now();
    operation.succeed();
    assert_within(since, CALL_WAIT);
    let after_drop = push(&deltas, "after-drop");
    assert_ne!(after_drop, CallResult::Queued);
    let since = Instant::now();
    drop(deltas);
    assert_within(since, Duration::ZERO);
    disk.thaw();
    let heartbeat = start(&loopback);
    wait_for_stats(&heartbeat, |stats| stats.operations == 0);
    wait_until_sent(&heartbeat);
    let expected = [
        ("before", CallResult::Queued),
        ("tracked", CallResult::Queued),
        ("first", first),
        ("after-drop", after_drop),
    ];
    assert_sent(&loopback, expected);
}

#[test]
#[ignore = "mounts, and so needs root"]
fn concurrent_calls_on_frozen_disk_return_in_time_with_correct_results() {
    const THREADS: usize = 4;
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let heartbeat = start(&loopback);
    let operation = heartbeat.begin(Operation::Mutate, "in-flight").unwrap();
    disk.freeze();
    let since = Instant::now();
    let mut expected = vec![("in-flight".to_owned(), CallResult::Queued)];
    thread::scope(|scope| {
        // The outbox thread takes the first request, so its result is in doubt. No event reports
        // that it was taken.
        let begun =
            scope.spawn(|| call_in_time(|| heartbeat.begin(Operation::Deploy, ["begun", "held"])));
        thread::sleep(Duration::from_millis(100));
        let ended = scope.spawn(|| {
            let since = Instant::now();
            operation.succeed();
            assert_within(since, CALL_WAIT);
        });
        let run =
            scope.spawn(|| call_in_time(|| heartbeat.run(Operation::Deploy, "run", must_not_run)));
        let pushers: Vec<_> = (0..THREADS)
            .map(|pusher| {
                let deltas = heartbeat.deltas();
                let names = (0..3).map(move |n| format!("p-{pusher}-{n}"));
                scope.spawn(move || {
                    names.map(|name| (name.clone(), push(&deltas, &name))).collect::<Vec<_>>()
                })
            })
            .collect();
        assert_beats_on_time(&loopback, since, Duration::from_secs(3));
        assert_ne!(begun.join().unwrap(), CallResult::Queued);
        assert_ne!(run.join().unwrap(), CallResult::Queued);
        ended.join().unwrap();
        expected.extend(pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()));
    });
    assert!(!heartbeat.is_stalled());
    disk.thaw();
    wait_until_sent(&heartbeat);
    // An operation that has not begun for its caller holds no delta, and is not reported.
    expected.push(("held".to_owned(), push(&heartbeat.deltas(), "held")));
    wait_until_sent(&heartbeat);
    let stats = wait_for_stats(&heartbeat, |stats| stats.operations == 0);
    assert_eq!((stats.held, stats.dropped), (0, 0));
    assert_sent(&loopback, expected.iter().map(|(decky, result)| (decky.as_str(), *result)));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn start_on_frozen_disk_beats_and_delivers_after_thaw() {
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    disk.freeze();
    let since = Instant::now();
    let heartbeat = start(&loopback);
    assert_within(since, Duration::from_secs(6));
    let since = Instant::now();
    let first = push(&heartbeat.deltas(), "first");
    assert_eq!(first, CallResult::NotQueued, "the outbox is not open yet");
    assert_beats_on_time(&loopback, since, Duration::from_secs(1));
    let stats = heartbeat.stats();
    assert!(
        stats.outbox.is_none() && stats.outbox_busy_since.is_some() && !heartbeat.is_stalled(),
        "{stats:?}"
    );
    disk.thaw();
    wait_for_stats(&heartbeat, |stats| stats.outbox.is_some());
    let second = push(&heartbeat.deltas(), "second");
    assert_eq!(second, CallResult::Queued);
    wait_until_sent(&heartbeat);
    assert_sent(&loopback, [("first", first), ("second", second)]);
}

#[test]
#[ignore = "mounts, and so needs root"]
fn program_beats_on_frozen_disk_and_ends_after_thaw() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let mut command = program(Command::new(PROGRAM), &loopback, dir.path());
    command.args(["run", "--interval", "200ms", "--state-file", "/no/such"]);
    command.args(["--docker-socket", "/no/such"]).stderr(Stdio::null());
    let mut running = command.spawn().unwrap();
    assert!(loopback.master.wait_for_beats(3, TIMEOUT));
    disk.freeze();
    assert_beats_on_time(&loopback, Instant::now(), Duration::from_secs(2));
    commands::signal("TERM", running.id());
    // No event reports that no beat follows.
    thread::sleep(SLACK);
    let before = loopback.master.received().len();
    thread::sleep(MAX_GAP);
    assert_eq!(loopback.master.received().len(), before, "a beat was sent after the stop");
    disk.thaw();
    assert_eq!(
        commands::wait_for_exit(&mut running, TIMEOUT).and_then(|status| status.code()),
        Some(0)
    );
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

/// Adds the options for the loopback's worker to a command that starts the program. The ini is in
/// this folder.
fn program(mut command: Command, loopback: &Loopback, folder: &Path) -> Command {
    let ini = folder.join("decnet.ini");
    loopback.worker.write_ini(&ini).unwrap();
    command.env("DECNET_CONFIG", "/no/such").arg("--config").arg(ini);
    command
}

#[test]
#[ignore = "mounts, and so needs root"]
fn tracked_operation_is_reported_in_time_if_disk_freezes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&disk.path().join("agent"));
    let mut command = program(Command::new(PROGRAM), &loopback, dir.path());
    command.args(["track", "--timeout", "5s", "--operation", "deploy"]).stderr(Stdio::null());
    let deckies: BTreeSet<_> = (0..8).map(|n| format!("d{n}")).collect();
    command.args(deckies.iter().flat_map(|decky| ["--decky", decky]));
    let mut running = command.args(["--", "fsfreeze", "-f"]).arg(disk.path()).spawn().unwrap();
    let is_reported = loopback.master.wait_until(TIMEOUT, |seen| seen.received().len() == 1);
    disk.thaw();
    assert_eq!(
        commands::wait_for_exit(&mut running, TIMEOUT).and_then(|status| status.code()),
        Some(0)
    );
    assert!(is_reported);
    assert_eq!(BTreeSet::from_iter(loopback.sent()), deckies);
}

#[test]
#[ignore = "needs strace"]
fn report_in_doubt_is_not_sent_twice() {
    let dir = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&dir.path().join("agent"));
    let heartbeat = start(&loopback);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]);
    strace.args(["-e", "inject=fsync,fdatasync:delay_enter=1500ms", PROGRAM]);
    let mut command = program(strace, &loopback, dir.path());
    command.args(["track", "--no-wait", "--operation", "deploy", "--decky", "d"]);
    // The begin of the operation is in doubt. It is withdrawn when the command ends.
    commands::run(command.args(["--", "sleep", "5"]));
    // A beat finds what another process added.
    let beats = loopback.master.received().len();
    assert!(loopback.master.wait_until(TIMEOUT, |seen| seen.received().len() > beats + 3));
    wait_until_sent(&heartbeat);
    assert_eq!(loopback.sent(), ["d"]);
}

/// Reports an operation that begins and succeeds. A begin that is in doubt is withdrawn.
fn track(deltas: &DeltaSender, decky: &str) -> CallResult {
    let begin = || deltas.begin(Operation::Deploy, decky).map(TrackedOperation::succeed);
    match call_in_time(begin) {
        CallResult::InDoubt => CallResult::NotQueued,
        result => result,
    }
}

/// Delays each sync of this process, or those of one file, until the returned guard is dropped.
fn delay_syncs(delay: Duration, file: Option<&Path>) -> impl Drop + use<> {
    struct Strace(std::process::Child);
    impl Drop for Strace {
        fn drop(&mut self) {
            commands::signal("INT", self.0.id());
            let _ = self.0.wait();
        }
    }
    let mut strace = Command::new("strace");
    let inject = format!("inject=fsync,fdatasync:delay_enter={}", delay.as_micros());
    strace.args(["-f", "-e", "trace=fsync,fdatasync", "-e", &inject]);
    if let Some(file) = file {
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
        "strace did not attach to this process"
    );
    thread::spawn(move || lines.for_each(drop));
    strace
}

/// Runs the test again in its own process, whose system calls can be delayed. Returns `None` in the
/// process that started it and waited for it.
fn in_own_process(test: &str) -> Option<Loopback> {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_SLOW";
    if let Some(agent_dir) = std::env::var_os(CHILD) {
        return Some(Loopback::new(Path::new(&agent_dir)));
    }
    let dir = tempfile::tempdir().unwrap();
    commands::run(
        commands::rerun_test(&format!("frozen::{test}")).env(CHILD, dir.path().join("agent")),
    );
    None
}

#[test]
#[ignore = "needs strace"]
fn syncs_of_eight_seconds_delay_no_beat_and_lose_no_delta() {
    let name = "syncs_of_eight_seconds_delay_no_beat_and_lose_no_delta";
    let Some(loopback) = in_own_process(name) else { return };
    let heartbeat = start(&loopback);
    assert_eq!(push(&heartbeat.deltas(), "before"), CallResult::Queued);
    wait_until_sent(&heartbeat);
    let delay = delay_syncs(Duration::from_secs(8), None);
    let since = Instant::now();
    let first = push(&heartbeat.deltas(), "first");
    assert_eq!(first, CallResult::InDoubt, "its sync is in progress");
    let second = push(&heartbeat.deltas(), "second");
    assert_eq!(second, CallResult::NotQueued, "it waits behind the first");
    assert_beats_on_time(&loopback, since, Duration::from_secs(5));
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    assert!(since.elapsed() > Duration::from_secs(8), "{stats:?}");
    assert!(!heartbeat.is_stalled());
    // The sync of the acknowledgement is in progress.
    assert_beats_on_time(&loopback, since, Duration::from_secs(2));
    let third = push(&heartbeat.deltas(), "third");
    let since = Instant::now();
    let stopped = heartbeat.stop(Duration::ZERO);
    assert_within(since, Duration::ZERO);
    assert!(!stopped.durable && stopped.undelivered == 0, "{stopped:?}");
    // The acknowledgement is not on the disk yet, so the next heartbeat must not deliver.
    let next = start(&loopback);
    assert_beats_on_time(&loopback, Instant::now(), Duration::from_secs(1));
    assert_eq!(next.stats().delivered, 0);
    drop(delay);
    wait_until_sent(&next);
    assert_eq!(next.stats().delivered, 0);
    assert_sent(
        &loopback,
        [("before", CallResult::Queued), ("first", first), ("second", second), ("third", third)],
    );
}

/// The acknowledgement of the first delta is being synced when the deltas of the last beat are read.
#[test]
#[ignore = "needs strace"]
fn stop_waits_for_a_slow_sync_and_delivers_the_last_delta() {
    let name = "stop_waits_for_a_slow_sync_and_delivers_the_last_delta";
    let Some(loopback) = in_own_process(name) else { return };
    let heartbeat = start(&loopback);
    assert_eq!(push(&heartbeat.deltas(), "before"), CallResult::Queued);
    wait_until_sent(&heartbeat);
    let file = heartbeat.stats().outbox.unwrap().with_file_name("heartbeat.db-wal");
    let _delay = delay_syncs(Duration::from_millis(600), Some(&file.canonicalize().unwrap()));
    // Each answer takes more than a second.
    loopback.master.always(Some(Fault::Slowly(Duration::from_millis(25))));
    assert_eq!(push(&heartbeat.deltas(), "first"), CallResult::Queued);
    loopback.wait_for_delta("first");
    assert_eq!(push(&heartbeat.deltas(), "second"), CallResult::Queued);
    loopback.master.always(None);
    let stopped = heartbeat.stop(Duration::from_secs(5));
    assert_eq!((stopped.undelivered, stopped.durable, stopped.in_time), (0, true, true));
    assert_sent(&loopback, ["before", "first", "second"].map(|name| (name, CallResult::Queued)));
}

#[test]
#[ignore = "needs strace"]
fn delivery_lock_is_held_until_last_ack_is_synced() {
    let name = "delivery_lock_is_held_until_last_ack_is_synced";
    let Some(loopback) = in_own_process(name) else { return };
    let first = start(&loopback);
    assert_eq!(push(&first.deltas(), "before"), CallResult::Queued);
    wait_until_sent(&first);
    // Only syncs of commits are delayed, so that opening the outbox is not.
    let file = first.stats().outbox.unwrap().with_file_name("heartbeat.db-wal");
    let _delay = delay_syncs(Duration::from_secs(3), Some(&file.canonicalize().unwrap()));
    assert_eq!(push(&first.deltas(), "d"), CallResult::InDoubt);
    wait_for_stats(&first, |stats| stats.delivered == 2);
    let since = Instant::now();
    let stopped = first.stop(Duration::ZERO);
    assert_eq!((stopped.undelivered, stopped.durable), (0, false));
    let second = start(&loopback);
    assert_beats_on_time(&loopback, Instant::now(), Duration::from_secs(1));
    assert!(
        since.elapsed() < Duration::from_secs(3),
        "the acknowledgement may be on the disk already"
    );
    assert_eq!(second.stats().delivered, 0);
    // The second heartbeat gets the lock, and no delta is left.
    let result = loop {
        match push(&second.deltas(), "e") {
            CallResult::NotQueued => assert!(since.elapsed() < TIMEOUT),
            result => break result,
        }
    };
    wait_for_stats(&second, |stats| stats.delivered == 1);
    assert!(since.elapsed() > Duration::from_secs(2), "it did not wait for the lock");
    wait_until_sent(&second);
    assert_sent(
        &loopback,
        [("before", CallResult::Queued), ("d", CallResult::InDoubt), ("e", result)],
    );
}

#[test]
#[ignore = "needs strace"]
fn slow_syncs_and_continuous_pushes_do_not_starve_delivery() {
    let name = "slow_syncs_and_continuous_pushes_do_not_starve_delivery";
    let Some(loopback) = in_own_process(name) else { return };
    // It takes as long as Docker does.
    let source = || {
        thread::sleep(Duration::from_millis(100));
        nothing_deployed()
    };
    let builder = Heartbeat::builder().enrolment(loopback.worker.enrolment().unwrap());
    let heartbeat = builder.interval(TIMEOUT * 10).status_source(source).start().unwrap();
    assert!(loopback.master.wait_for_beats(1, TIMEOUT));
    let _delay = delay_syncs(Duration::from_millis(300), None);
    let done = AtomicBool::new(false);
    let results: Vec<_> = thread::scope(|scope| {
        let pushers = (0..8).map(|pusher| {
            let deltas = heartbeat.deltas();
            let done = &done;
            let work = move || {
                let names = (0..)
                    .map(|n| format!("d-{pusher}-{n}"))
                    .take_while(|_| !done.load(Ordering::Relaxed));
                let report = |decky: String| {
                    let result = match pusher % 2 {
                        0 => push(&deltas, &decky),
                        _ => track(&deltas, &decky),
                    };
                    (decky, result)
                };
                names.map(report).collect::<Vec<_>>()
            };
            scope.spawn(work)
        });
        let pushers: Vec<_> = pushers.collect();
        let beats = heartbeat.beats();
        let end = Instant::now() + TIMEOUT;
        while heartbeat.stats().delivered < 20 && Instant::now() < end {
            let _ = beats.recv_timeout(MAX_GAP);
        }
        done.store(true, Ordering::Relaxed);
        let delivered = heartbeat.stats().delivered;
        let results = pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()).collect();
        assert!(delivered >= 20, "{delivered} were sent");
        results
    });
    wait_until_sent(&heartbeat);
    assert_sent(&loopback, results.iter().map(|(decky, result)| (decky.as_str(), *result)));
}
