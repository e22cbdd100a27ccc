//! The outbox thread, from the outside: what it commits, what it sends how often, which threads there are and how long they
//! last.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Fault};
use decnet_heartbeat::{DeltaSender, Heartbeat, LifecycleDelta, Operation, OutboxLocation};
use log::{LevelFilter, Log, Metadata, Record};

use crate::support::{PATIENCE, Stage, alone, deckies, nothing_deployed, now, settled};

/// What takes no time, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Longer than a beat that should not come would take.
const SILENCE: Duration = Duration::from_millis(300);

fn deployed(decky: impl Into<String>) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// On a busy machine a push may be withdrawn after its second.
fn push(deltas: &DeltaSender, delta: &LifecycleDelta) {
    let is_kept = |_| match deltas.push(delta.clone()) {
        Err(error)
            if error.to_string().contains("has not answered for 1 s; nothing was queued") =>
        {
            false
        }
        kept => kept.is_ok_and(|()| true),
    };
    assert!((0..10).any(is_kept), "{:?}", deltas.push(delta.clone()));
}

/// How often the master was sent each decky's delta.
fn times_sent(stage: &Stage) -> BTreeMap<String, u32> {
    let mut times = BTreeMap::new();
    for decky in stage.master.received().iter().flat_map(deckies) {
        *times.entry(decky).or_default() += 1;
    }
    times
}

#[test]
fn an_acknowledged_delta_is_not_offered_again_while_eight_threads_push() {
    const THREADS: usize = 8;
    const PUSHES: usize = 250;
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    thread::scope(|scope| {
        for pusher in 0..THREADS {
            let deltas = heartbeat.deltas();
            scope.spawn(move || {
                (0..PUSHES).for_each(|n| push(&deltas, &deployed(format!("d-{pusher}-{n}"))))
            });
        }
    });
    assert!(heartbeat.flush(PATIENCE), "{:?}", heartbeat.stats());
    let times = times_sent(&stage);
    assert_eq!(times.len(), THREADS * PUSHES);
    let again: Vec<_> = times.into_iter().filter(|(_, times)| *times > 1).collect();
    assert_eq!(again, []);
}

/// The commits in a write-ahead log that has not been started anew.
fn commits(wal: &Path) -> usize {
    let wal = fs::read(wal).unwrap();
    let number = |place: usize| u32::from_be_bytes(wal[place..place + 4].try_into().unwrap());
    let (page, salts) = (usize::try_from(number(8)).unwrap(), (number(16), number(20)));
    let frames = (32..wal.len() - 24 - page + 1).step_by(24 + page);
    // A frame that ends a commit says how large the database is then; one that is left from before has other salts.
    frames
        .filter(|frame| number(frame + 4) != 0 && (number(frame + 8), number(frame + 12)) == salts)
        .count()
}

#[test]
fn pushes_of_eight_threads_share_commits() {
    const THREADS: usize = 8;
    const PUSHES: usize = 50;
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    // No acknowledgement is committed meanwhile.
    stage.master.always(Some(Fault::Answer(Answer::status(503).header("Retry-After", "600"))));
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    // While somebody reads from it, a write-ahead log is not started anew.
    let reader = rusqlite::Connection::open(stage.agent_dir().join("heartbeat.db")).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM delta").unwrap();
    let wal = stage.agent_dir().join("heartbeat.db-wal");
    push(&heartbeat.deltas(), &deployed("alone"));
    let before = commits(&wal);
    push(&heartbeat.deltas(), &deployed("alone"));
    assert_eq!(commits(&wal) - before, 1, "a push alone is a commit");

    let (before, start) = (commits(&wal), Barrier::new(THREADS));
    thread::scope(|scope| {
        for pusher in 0..THREADS {
            let (deltas, start) = (heartbeat.deltas(), &start);
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
fn what_a_sender_keeps_after_the_stop_is_sent_by_the_next_heartbeat_on_the_file() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let deltas = heartbeat.deltas();
    assert!(heartbeat.stop(PATIENCE).kept);
    push(&deltas, &deployed("between"));
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    // It is told by nobody of what comes now, and looks with each tick.
    push(&deltas, &deployed("beside"));
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2 && stats.waiting == 0);
    let sent: Vec<_> = times_sent(&stage).into_iter().collect();
    assert_eq!(sent, [("beside".to_owned(), 1), ("between".to_owned(), 1)]);
}

#[test]
fn an_operation_that_ends_after_the_stop_is_reported_by_the_next_heartbeat_on_the_file() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let operation = heartbeat.begin(Operation::Deploy, "d").unwrap();
    let stopped = heartbeat.stop(PATIENCE);
    assert_eq!((stopped.operations, stopped.kept), (1, true));
    let (heartbeat, tick) = stage.beating();
    assert_eq!(heartbeat.stats().operations, 1, "it is in flight, and nobody has died");
    operation.fail("no space left");
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1 && stats.operations == 0);
    let errors: Vec<_> =
        stage.master.received().iter().filter_map(|request| request.json.clone()).collect();
    let errors: Vec<_> =
        errors.iter().filter_map(|json| json["lifecycle"][0]["error"].as_str()).collect();
    assert_eq!(errors, ["no space left"]);
}

#[test]
fn a_sender_in_memory_is_refused_after_the_stop() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    let deltas = heartbeat.deltas();
    push(&deltas, &deployed("d"));
    heartbeat.stop(PATIENCE);
    let error = deltas.push(deployed("late")).unwrap_err();
    assert!(error.is_outbox() && !error.is_in_doubt());
    assert_eq!(
        error.to_string(),
        "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas"
    );
}

#[test]
fn flush_is_true_when_all_is_delivered_and_false_while_the_master_is_away() {
    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    for n in 0..20 {
        push(&heartbeat.deltas(), &deployed(format!("d{n}")));
        assert!(heartbeat.flush(PATIENCE));
        let sent = times_sent(&stage);
        assert_eq!(
            (sent.len(), sent.get(&format!("d{n}"))),
            (n + 1, Some(&1)),
            "it has been sent when flush returns"
        );
    }
    stage.master.stop();
    push(&heartbeat.deltas(), &deployed("away"));
    let (since, timeout) = (Instant::now(), Duration::from_millis(300));
    assert!(!heartbeat.flush(timeout));
    let took = since.elapsed();
    assert!(took >= timeout && took < timeout + AT_ONCE, "{took:?}");
    assert_eq!(heartbeat.stats().waiting, 1);
    // Whoever waits while it comes back is told.
    thread::scope(|scope| {
        let flushed = scope.spawn(|| heartbeat.flush(PATIENCE));
        stage.master.start_again().unwrap();
        tick.send(now()).unwrap();
        assert!(flushed.join().unwrap());
    });
}

#[test]
fn flush_waits_neither_for_nothing_nor_for_what_is_held_or_rejected() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.always(Some(Fault::AnswerTo(b"\"refused\"".to_vec(), Answer::status(422))));
    push(&heartbeat.deltas(), &deployed("refused"));
    assert!(
        heartbeat.flush(PATIENCE),
        "a delta that is rejected is one that nobody waits for any more"
    );
    assert_eq!(heartbeat.stats().rejected, 1);

    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.put_off(&heartbeat, &tick);
    push(&heartbeat.deltas(), &deployed("held"));
    let operation = heartbeat.begin(Operation::Deploy, "held").unwrap();
    stage.master.stop();
    let since = Instant::now();
    assert!(heartbeat.flush(PATIENCE));
    assert_eq!(heartbeat.stats().held, 1);
    assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
    drop(operation);
    assert!(!heartbeat.flush(Duration::from_millis(50)), "now it may be sent, and is not");
}

#[test]
fn flush_does_not_wait_for_what_is_pushed_later() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    // A beat takes longer than a push, so that something waits all the time.
    stage.master.always(Some(Fault::Slowly(Duration::from_micros(500))));
    let done = AtomicBool::new(false);
    let flushed = thread::scope(|scope| {
        for pusher in 0..2 {
            let (deltas, done) = (heartbeat.deltas(), &done);
            scope.spawn(move || {
                let names = (0..)
                    .map(|n| format!("d-{pusher}-{n}"))
                    .take_while(|_| !done.load(Ordering::Relaxed));
                names.for_each(|name| push(&deltas, &deployed(name)));
            });
        }
        let flushed = [0, 1, 2].map(|n| {
            push(&heartbeat.deltas(), &deployed(format!("mine-{n}")));
            heartbeat.flush(PATIENCE)
        });
        done.store(true, Ordering::Relaxed);
        flushed
    });
    assert_eq!(flushed, [true; 3]);
    let sent = times_sent(&stage);
    assert_eq!([0, 1, 2].map(|n| sent.get(&format!("mine-{n}")).copied()), [Some(1); 3]);
}

#[test]
fn a_push_with_a_flush_costs_one_post_and_what_is_held_back_costs_none() {
    const PUSHES: usize = 20;
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let older = heartbeat.begin(Operation::Deploy, "held").unwrap();
    let newer = heartbeat.begin(Operation::Deploy, "held").unwrap();
    let before = stage.master.received().len();
    older.succeed();
    for n in 0..PUSHES {
        push(&heartbeat.deltas(), &deployed(format!("d{n}")));
        assert!(heartbeat.flush(PATIENCE));
    }
    assert!(
        !stage.master.wait_until(SILENCE, |seen| seen.received().len() > before + PUSHES),
        "too many POSTs"
    );
    newer.succeed();
    assert!(heartbeat.flush(PATIENCE));
    assert_eq!(times_sent(&stage).remove("held"), Some(2));
}

#[test]
fn flush_does_not_wait_any_longer_for_what_an_operation_holds_back_meanwhile() {
    let mut stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.stop();
    push(&heartbeat.deltas(), &deployed("d"));
    thread::scope(|scope| {
        let flushing = scope.spawn(|| heartbeat.flush(PATIENCE));
        assert!(!heartbeat.flush(SILENCE), "it may be sent");
        let operation = heartbeat.begin(Operation::Deploy, "d").unwrap();
        assert!(flushing.join().unwrap(), "it may not be sent now");
        operation.succeed();
    });
}

/// A heartbeat whose source pushes a delta with each snapshot, in the way that `push` says.
fn pushing(
    stage: &Stage,
    push: impl Fn(&DeltaSender, LifecycleDelta) + Send + 'static,
) -> (Heartbeat, crossbeam_channel::Sender<Instant>) {
    let (builder, tick) = stage.builder();
    let deltas = Arc::new(OnceLock::<DeltaSender>::new());
    let (of_source, mut count) = (Arc::clone(&deltas), 0);
    let source = move || {
        if let Some(deltas) = of_source.get() {
            push(deltas, deployed(format!("s{count}")));
            count += 1;
        }
        nothing_deployed()
    };
    let heartbeat = builder.status_source(source).start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    deltas.set(heartbeat.deltas()).unwrap();
    (heartbeat, tick)
}

#[test]
fn a_source_that_pushes_causes_no_beats_and_its_deltas_are_sent_with_them() {
    const TICKS: u64 = 10;
    let stage = Stage::new();
    let (heartbeat, tick) = pushing(&stage, |deltas, delta| push(deltas, &delta));
    for beats in 1..=TICKS {
        tick.send(now()).unwrap();
        settled(&heartbeat, |stats| stats.beats > beats);
    }
    assert!(!stage.master.wait_for_beats(TICKS + 2, SILENCE), "{:?}", heartbeat.stats());
    let sent = times_sent(&stage);
    assert_eq!((sent.len(), sent.values().max()), (10, Some(&1)), "{sent:?}");
}

/// Waits until there are these threads of ours and no others.
#[track_caller]
fn await_threads(expected: &[&str]) {
    let names = || {
        let tasks =
            fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
        let names = tasks.filter_map(|comm| fs::read_to_string(comm).ok());
        let mut ours: Vec<_> = names.filter(|name| name.starts_with("decnet-")).collect();
        ours.iter_mut().for_each(|name| *name = name.trim_end().to_owned());
        ours.sort();
        ours
    };
    let end = Instant::now() + PATIENCE;
    while names() != expected {
        assert!(Instant::now() < end, "{:?} and not {expected:?}", names());
        thread::sleep(Duration::from_millis(2));
    }
}

/// The kernel cuts a thread's name at 15 bytes.
const ALL: [&str; 3] = ["decnet-heartbea", "decnet-outbox", "decnet-status"];

#[test]
fn the_outbox_thread_ends_with_the_last_sender_or_operation_and_not_before() {
    alone(
        "threads::the_outbox_thread_ends_with_the_last_sender_or_operation_and_not_before",
        || {
            let stage = Stage::new();
            await_threads(&[]);
            let (heartbeat, _tick) = stage.beating();
            await_threads(&ALL);
            let (deltas, operation) =
                (heartbeat.deltas(), heartbeat.begin(Operation::Deploy, "d").unwrap());
            heartbeat.stop(PATIENCE);
            await_threads(&["decnet-outbox"]);
            drop(deltas);
            thread::sleep(Duration::from_millis(50));
            await_threads(&["decnet-outbox"]);
            operation.succeed();
            await_threads(&[]);

            let (heartbeat, _tick) = stage.beating();
            settled(&heartbeat, |stats| stats.delivered == 1);
            drop(heartbeat);
            await_threads(&[]);
        },
    );
}

#[test]
fn a_start_that_fails_or_is_dormant_leaves_no_thread() {
    alone("threads::a_start_that_fails_or_is_dormant_leaves_no_thread", || {
        let heartbeat = Heartbeat::builder().start().unwrap();
        assert!(heartbeat.stats().dormant);
        await_threads(&[]);
        push(&heartbeat.deltas(), &deployed("d"));
        heartbeat.begin(Operation::Deploy, "d").unwrap().succeed();
        await_threads(&[]);
        assert!(heartbeat.flush(PATIENCE), "nothing waits");

        let stage = Stage::new();
        let enrolment = || stage.worker.enrolment().unwrap();
        fs::write(stage.agent_dir().join("worker.key"), "no key\n").unwrap();
        let error = Heartbeat::builder().enrolment(enrolment()).start().unwrap_err();
        assert!(error.is_bundle(), "{error:?}");
        await_threads(&[]);
        let error = Heartbeat::builder()
            .enrolment(enrolment())
            .interval(Duration::ZERO)
            .start()
            .unwrap_err();
        assert!(error.to_string().starts_with("interval: "), "{error:?}");
        await_threads(&[]);
    });
}

/// It panics at each line of the outbox thread, and counts them.
struct Panics;

static LINES_OF_OUTBOX: AtomicUsize = AtomicUsize::new(0);

impl Log for Panics {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if thread::current().name() == Some("decnet-outbox") {
            LINES_OF_OUTBOX.fetch_add(1, Ordering::SeqCst);
            panic!("a logger that panics at {:?}", record.args());
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_logger_that_panics_does_not_end_the_outbox_thread() {
    alone("threads::a_logger_that_panics_does_not_end_the_outbox_thread", || {
        log::set_logger(&Panics).unwrap();
        log::set_max_level(LevelFilter::Trace);
        let stage = Stage::new();
        let file = stage.agent_dir().join("heartbeat.db");
        fs::write(&file, "this is no database, and the outbox thread says so\n".repeat(100))
            .unwrap();
        let (heartbeat, tick) = stage.beating();
        for n in 0..4 {
            fs::remove_file(&file).unwrap();
            tick.send(now()).unwrap();
            settled(&heartbeat, |_| file.exists());
            push(&heartbeat.deltas(), &deployed(format!("d{n}")));
            assert!(heartbeat.flush(PATIENCE));
        }
        await_threads(&ALL);
        let stats = heartbeat.stats();
        assert_eq!((stats.delivered, stats.panics, stats.ended_thread), (4, 0, None));
        let lines = LINES_OF_OUTBOX.load(Ordering::SeqCst);
        assert!(lines > 1, "{lines} lines were logged");
    });
}
