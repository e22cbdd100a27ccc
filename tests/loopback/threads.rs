//! The outbox thread as a caller sees it: commits, POSTs, `flush`, and which threads run when.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use decnet_heartbeat::loopback::{Answer, Fault};
use decnet_heartbeat::{DeltaSender, Heartbeat, LifecycleDelta, Operation, OutboxLocation};
use log::{LevelFilter, Log, Metadata, Record};

use crate::support::{
    Fixture, TIMEOUT, deckies, nothing_deployed, now, poll_until, run_in_own_process,
    wait_for_stats,
};

/// A busy machine's limit for a call that does not wait.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Waits this long to see that no beat is sent.
const SILENCE: Duration = Duration::from_millis(300);

fn deployed(decky: impl Into<String>) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// Pushes the delta. Tries again if a busy disk takes longer than a second.
fn push(deltas: &DeltaSender, delta: &LifecycleDelta) {
    for _ in 0..10 {
        match deltas.push(delta.clone()) {
            Err(error)
                if error.to_string().contains("has not answered for 1 s; nothing was queued") => {}
            result => return result.unwrap(),
        }
    }
    panic!("the disk is too slow");
}

/// How often the delta of each decky was sent.
fn times_sent(fixture: &Fixture) -> BTreeMap<String, u32> {
    let mut times = BTreeMap::new();
    for decky in fixture.master.received().iter().flat_map(deckies) {
        *times.entry(decky).or_default() += 1;
    }
    times
}

#[test]
fn acknowledged_delta_is_not_sent_again_while_eight_threads_push() {
    const THREADS: usize = 8;
    const PUSHES: usize = 250;
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    thread::scope(|scope| {
        for pusher in 0..THREADS {
            let deltas = heartbeat.deltas();
            scope.spawn(move || {
                (0..PUSHES).for_each(|n| push(&deltas, &deployed(format!("d-{pusher}-{n}"))))
            });
        }
    });
    assert!(heartbeat.flush(TIMEOUT), "{:?}", heartbeat.stats());
    let times = times_sent(&fixture);
    assert_eq!(times.len(), THREADS * PUSHES);
    let again: Vec<_> = times.into_iter().filter(|(_, times)| *times > 1).collect();
    assert_eq!(again, []);
}

/// The number of commits in a write-ahead log that SQLite has not restarted.
fn commits(wal: &Path) -> usize {
    let wal = fs::read(wal).unwrap();
    let number = |place: usize| u32::from_be_bytes(wal[place..place + 4].try_into().unwrap());
    let page = usize::try_from(number(8)).unwrap();
    let salts = (number(16), number(20));
    let frames = (32..wal.len() - 24 - page + 1).step_by(24 + page);
    // The last frame of a commit contains the size of the database. Frames of an earlier log have
    // other salts.
    frames
        .filter(|frame| number(frame + 4) != 0 && (number(frame + 8), number(frame + 12)) == salts)
        .count()
}

#[test]
fn pushes_of_eight_threads_share_commits() {
    const THREADS: usize = 8;
    const PUSHES: usize = 50;
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    // The heartbeat commits nothing by itself.
    fixture.master.always(Some(Fault::Answer(Answer::status(503).header("Retry-After", "600"))));
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    // SQLite does not restart the write-ahead log during a read.
    let reader = rusqlite::Connection::open(fixture.outbox()).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM delta").unwrap();
    let wal = fixture.agent_dir().join("heartbeat.db-wal");
    push(&heartbeat.deltas(), &deployed("single"));
    let before = commits(&wal);
    push(&heartbeat.deltas(), &deployed("single"));
    assert_eq!(commits(&wal) - before, 1, "a single push is a commit");

    let before = commits(&wal);
    let start = Barrier::new(THREADS);
    thread::scope(|scope| {
        for pusher in 0..THREADS {
            let deltas = heartbeat.deltas();
            let start = &start;
            scope.spawn(move || {
                start.wait();
                (0..PUSHES).for_each(|n| push(&deltas, &deployed(format!("d-{pusher}-{n}"))));
            });
        }
    });
    let commits = commits(&wal) - before;
    assert!(commits <= THREADS * PUSHES / 2, "{commits} commits of {} pushes", THREADS * PUSHES);
    assert_eq!(heartbeat.stats().waiting, (THREADS * PUSHES + 2) as u64);
}

#[test]
fn push_after_stop_is_sent_by_the_next_heartbeat() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let deltas = heartbeat.deltas();
    assert!(heartbeat.stop(TIMEOUT).durable);
    push(&deltas, &deployed("stopped"));
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    // This sender belongs to the earlier heartbeat, so the delta is noticed at the next tick.
    push(&deltas, &deployed("later"));
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.waiting == 0);
    let sent: Vec<_> = times_sent(&fixture).into_iter().collect();
    assert_eq!(sent, [("later".to_owned(), 1), ("stopped".to_owned(), 1)]);
}

#[test]
fn operation_that_ends_after_stop_is_reported_by_the_next_heartbeat() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let operation = heartbeat.begin(Operation::Deploy, "d").unwrap();
    let stopped = heartbeat.stop(TIMEOUT);
    assert_eq!((stopped.operations, stopped.durable), (1, true));
    let (heartbeat, tick) = fixture.start_heartbeat();
    assert_eq!(heartbeat.stats().operations, 1, "its process is running, so it is in flight");
    operation.fail("no space left");
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.operations == 0);
    let errors: Vec<_> =
        fixture.master.received().iter().filter_map(|request| request.json.clone()).collect();
    let errors: Vec<_> =
        errors.iter().filter_map(|json| json["lifecycle"][0]["error"].as_str()).collect();
    assert_eq!(errors, ["no space left"]);
}

#[test]
fn sender_of_a_memory_outbox_is_rejected_after_stop() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    let deltas = heartbeat.deltas();
    push(&deltas, &deployed("d"));
    heartbeat.stop(TIMEOUT);
    let error = deltas.push(deployed("late")).unwrap_err();
    assert!(error.is_outbox() && !error.is_in_doubt());
    assert_eq!(
        error.to_string(),
        "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas"
    );
}

#[test]
fn flush_returns_true_after_delivery_and_false_during_an_outage() {
    let mut fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    for n in 0..20 {
        push(&heartbeat.deltas(), &deployed(format!("d{n}")));
        assert!(heartbeat.flush(TIMEOUT));
        let sent = times_sent(&fixture);
        assert_eq!(
            (sent.len(), sent.get(&format!("d{n}"))),
            (n + 1, Some(&1)),
            "the delta was sent before flush returned"
        );
    }
    fixture.master.stop();
    push(&heartbeat.deltas(), &deployed("outage"));
    let since = Instant::now();
    let timeout = Duration::from_millis(300);
    assert!(!heartbeat.flush(timeout));
    let took = since.elapsed();
    assert!(took >= timeout && took < timeout + AT_ONCE, "{took:?}");
    assert_eq!(heartbeat.stats().waiting, 1);
    // A flush that waits returns when the outage has ended and the delta is delivered.
    thread::scope(|scope| {
        let flushed = scope.spawn(|| heartbeat.flush(TIMEOUT));
        fixture.master.start_again().unwrap();
        tick.send(now()).unwrap();
        assert!(flushed.join().unwrap());
    });
}

#[test]
fn flush_does_not_wait_for_held_or_rejected_deltas() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.always(Some(Fault::AnswerTo(b"\"bad\"".to_vec(), Answer::status(422))));
    push(&heartbeat.deltas(), &deployed("bad"));
    assert!(heartbeat.flush(TIMEOUT), "a rejected delta does not wait for delivery");
    assert_eq!(heartbeat.stats().rejected, 1);

    let mut fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.fail_one_beat(&heartbeat, &tick);
    push(&heartbeat.deltas(), &deployed("held"));
    let operation = heartbeat.begin(Operation::Deploy, "held").unwrap();
    fixture.master.stop();
    let since = Instant::now();
    assert!(heartbeat.flush(TIMEOUT));
    assert_eq!(heartbeat.stats().held, 1);
    assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
    drop(operation);
    assert!(!heartbeat.flush(Duration::from_millis(50)), "the delta is not held any more");
}

#[test]
fn flush_does_not_wait_for_later_pushes() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    // A beat takes longer than a push, so that there is always a queued delta.
    fixture.master.always(Some(Fault::Slowly(Duration::from_micros(500))));
    let done = AtomicBool::new(false);
    let flushed = thread::scope(|scope| {
        for pusher in 0..2 {
            let deltas = heartbeat.deltas();
            let done = &done;
            scope.spawn(move || {
                let names = (0..)
                    .map(|n| format!("d-{pusher}-{n}"))
                    .take_while(|_| !done.load(Ordering::Relaxed));
                names.for_each(|name| push(&deltas, &deployed(name)));
            });
        }
        let flushed = [0, 1, 2].map(|n| {
            push(&heartbeat.deltas(), &deployed(format!("flushed-{n}")));
            heartbeat.flush(TIMEOUT)
        });
        done.store(true, Ordering::Relaxed);
        flushed
    });
    assert_eq!(flushed, [true; 3]);
    let sent = times_sent(&fixture);
    assert_eq!([0, 1, 2].map(|n| sent.get(&format!("flushed-{n}")).copied()), [Some(1); 3]);
}

#[test]
fn push_with_flush_causes_one_post_and_a_held_delta_none() {
    const PUSHES: usize = 20;
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let older = heartbeat.begin(Operation::Deploy, "held").unwrap();
    let newer = heartbeat.begin(Operation::Deploy, "held").unwrap();
    let before = fixture.master.received().len();
    older.succeed();
    for n in 0..PUSHES {
        push(&heartbeat.deltas(), &deployed(format!("d{n}")));
        assert!(heartbeat.flush(TIMEOUT));
    }
    assert!(
        !fixture.master.wait_until(SILENCE, |seen| seen.received().len() > before + PUSHES),
        "too many POSTs"
    );
    newer.succeed();
    assert!(heartbeat.flush(TIMEOUT));
    assert_eq!(times_sent(&fixture).remove("held"), Some(2));
}

#[test]
fn flush_stops_waiting_for_a_delta_that_becomes_held() {
    let mut fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.stop();
    push(&heartbeat.deltas(), &deployed("d"));
    thread::scope(|scope| {
        let flushing = scope.spawn(|| heartbeat.flush(TIMEOUT));
        assert!(!heartbeat.flush(SILENCE), "the delta waits for delivery");
        let operation = heartbeat.begin(Operation::Deploy, "d").unwrap();
        assert!(flushing.join().unwrap(), "the delta is held");
        operation.succeed();
    });
}

/// Starts a heartbeat whose source pushes a delta before it returns a snapshot, from the second
/// snapshot on.
fn start_with_pushing_source(fixture: &Fixture) -> (Heartbeat, Sender<Instant>) {
    let (builder, tick) = fixture.builder();
    let deltas = Arc::new(OnceLock::<DeltaSender>::new());
    let source_deltas = Arc::clone(&deltas);
    let mut count = 0;
    let source = move || {
        if let Some(deltas) = source_deltas.get() {
            push(deltas, &deployed(format!("s{count}")));
            count += 1;
        }
        nothing_deployed()
    };
    let heartbeat = builder.status_source(source).start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    deltas.set(heartbeat.deltas()).unwrap();
    (heartbeat, tick)
}

#[test]
fn pushes_of_the_source_cause_no_extra_beats() {
    const TICKS: u64 = 10;
    let fixture = Fixture::new();
    let (heartbeat, tick) = start_with_pushing_source(&fixture);
    for beats in 1..=TICKS {
        tick.send(now()).unwrap();
        wait_for_stats(&heartbeat, |stats| stats.beats > beats);
    }
    assert!(!fixture.master.wait_for_beats(TICKS + 2, SILENCE), "{:?}", heartbeat.stats());
    let sent = times_sent(&fixture);
    assert_eq!((sent.len(), sent.values().max()), (10, Some(&1)), "{sent:?}");
}

/// The names of the threads that heartbeats have started, sorted. The kernel cuts names at 15
/// bytes.
fn heartbeat_threads() -> Vec<String> {
    let tasks =
        fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
    let names = tasks.filter_map(|comm| fs::read_to_string(comm).ok());
    let names = names.map(|name| name.trim_end().to_owned());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("decnet-")).collect();
    names.sort();
    names
}

/// Waits until exactly these threads of heartbeats are running.
#[track_caller]
fn wait_for_threads(expected: &[&str]) {
    poll_until(&format!("threads {expected:?}"), || heartbeat_threads() == expected);
}

const ALL: [&str; 4] = ["decnet-heartbea", "decnet-outbox", "decnet-status", "decnet-wake"];

#[test]
fn outbox_thread_ends_with_the_last_sender_or_operation() {
    run_in_own_process("threads::outbox_thread_ends_with_the_last_sender_or_operation", || {
        let fixture = Fixture::new();
        wait_for_threads(&[]);
        let (heartbeat, _tick) = fixture.start_heartbeat();
        wait_for_threads(&ALL);
        let deltas = heartbeat.deltas();
        let operation = heartbeat.begin(Operation::Deploy, "d").unwrap();
        heartbeat.stop(TIMEOUT);
        wait_for_threads(&["decnet-outbox"]);
        drop(deltas);
        // The thread must not end. No event shows that.
        thread::sleep(Duration::from_millis(50));
        assert_eq!(heartbeat_threads(), ["decnet-outbox"]);
        operation.succeed();
        wait_for_threads(&[]);

        let (heartbeat, _tick) = fixture.start_heartbeat();
        wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
        drop(heartbeat);
        wait_for_threads(&[]);
    });
}

#[test]
fn failed_or_dormant_start_leaves_no_thread() {
    run_in_own_process("threads::failed_or_dormant_start_leaves_no_thread", || {
        let heartbeat = Heartbeat::builder().start().unwrap();
        assert!(heartbeat.stats().dormant);
        wait_for_threads(&[]);
        push(&heartbeat.deltas(), &deployed("d"));
        heartbeat.begin(Operation::Deploy, "d").unwrap().succeed();
        wait_for_threads(&[]);
        assert!(heartbeat.flush(TIMEOUT), "no delta is queued");

        let fixture = Fixture::new();
        let enrolment = || fixture.worker.enrolment().unwrap();
        fs::write(fixture.agent_dir().join("worker.key"), "no key\n").unwrap();
        let error = Heartbeat::builder().enrolment(enrolment()).start().unwrap_err();
        assert!(error.is_bundle(), "{error:?}");
        wait_for_threads(&[]);
        let error = Heartbeat::builder()
            .enrolment(enrolment())
            .interval(Duration::ZERO)
            .start()
            .unwrap_err();
        assert!(error.to_string().starts_with("interval: "), "{error:?}");
        wait_for_threads(&[]);
    });
}

/// A logger that counts the lines of the outbox thread, and panics for each of them.
struct PanickingLogger;

static OUTBOX_LINES: AtomicUsize = AtomicUsize::new(0);

impl Log for PanickingLogger {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if thread::current().name() == Some("decnet-outbox") {
            OUTBOX_LINES.fetch_add(1, Ordering::SeqCst);
            panic!("a logger that panics at {:?}", record.args());
        }
    }

    fn flush(&self) {}
}

#[test]
fn panicking_logger_does_not_end_the_outbox_thread() {
    run_in_own_process("threads::panicking_logger_does_not_end_the_outbox_thread", || {
        log::set_logger(&PanickingLogger).unwrap();
        log::set_max_level(LevelFilter::Trace);
        let fixture = Fixture::new();
        let file = fixture.outbox();
        fs::write(&file, "not a database, which the outbox thread logs\n".repeat(100)).unwrap();
        let (heartbeat, tick) = fixture.start_heartbeat();
        for n in 0..4 {
            fs::remove_file(&file).unwrap();
            tick.send(now()).unwrap();
            wait_for_stats(&heartbeat, |_| file.exists());
            push(&heartbeat.deltas(), &deployed(format!("d{n}")));
            assert!(heartbeat.flush(TIMEOUT));
        }
        wait_for_threads(&ALL);
        let stats = heartbeat.stats();
        assert_eq!((stats.delivered, stats.panics, stats.ended_thread), (4, 0, None));
        let lines = OUTBOX_LINES.load(Ordering::SeqCst);
        assert!(lines > 1, "{lines} lines were logged");
    });
}
