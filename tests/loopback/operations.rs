//! A tracked operation, from `begin` to the master's rows, however it ends.

use std::error::Error as StdError;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::bounded;
use decnet_heartbeat::loopback::RowStatus::{Failed, Running, Succeeded};
use decnet_heartbeat::loopback::{LifecycleRow, RowStatus};
use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation, OutboxLocation, Outcome};
use serde_json::Value;

use crate::support::{PATIENCE, Stage, deckies, json_of, now, settled};

/// Longer than a beat that should not come would take.
const SILENCE: Duration = Duration::from_millis(500);

/// Opens a row for each of these, as the master does before it asks the worker.
fn open<'a>(stage: &Stage, operation: Operation, deckies: impl IntoIterator<Item = &'a str>) {
    for decky in deckies {
        stage.master.open_operation(&stage.worker.uuid, decky, operation.as_str());
    }
}

/// The rows in the order of their opening: the decky, how it ended, and why.
fn ends(stage: &Stage) -> Vec<(String, RowStatus, Option<String>)> {
    let end = |row: LifecycleRow| (row.decky, row.status, row.error);
    stage.master.rows().into_iter().map(end).collect()
}

fn end(decky: &str, status: RowStatus, error: Option<&str>) -> (String, RowStatus, Option<String>) {
    (decky.to_owned(), status, error.map(str::to_owned))
}

fn failed(decky: &str, error: &str) -> (String, RowStatus, Option<String>) {
    end(decky, Failed, Some(error))
}

/// All deltas that were sent, in their order.
fn sent(stage: &Stage) -> Vec<Value> {
    let of = |body: &Value| body["lifecycle"].as_array().cloned().unwrap_or_default();
    stage.master.received().iter().flat_map(|request| of(json_of(request))).collect()
}

fn in_flight(heartbeat: &Heartbeat) -> u64 {
    heartbeat.stats().operations
}

#[test]
fn a_success_seals_the_rows_of_all_its_deckies_with_the_time_of_its_end() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Deploy, ["a", "b"]);
    let operation = heartbeat.begin(Operation::Deploy, ["b", "a"]).unwrap();
    assert_eq!(operation.operation(), Operation::Deploy);
    assert_eq!(operation.open().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(in_flight(&heartbeat), 2);
    let before = SystemTime::now() - Duration::from_micros(1);
    operation.succeed();
    let after = SystemTime::now();
    stage.closed_rows(2);
    assert_eq!(ends(&stage), [end("a", Succeeded, None), end("b", Succeeded, None)]);
    for row in stage.master.rows() {
        let at = row.completed_at.unwrap();
        assert!((before..=after).contains(&at), "{at:?} is not from {before:?} to {after:?}");
        // By the worker's word and not by the master's clock, and in UTC.
        let said: Vec<_> =
            sent(&stage).into_iter().filter(|delta| delta["decky_name"] == *row.decky).collect();
        assert_eq!(said.len(), 1);
        assert_eq!(
            humantime::parse_rfc3339(said[0]["completed_at"].as_str().unwrap()).unwrap(),
            at
        );
        assert!(said[0]["completed_at"].as_str().unwrap().ends_with('Z'), "{said:?}");
    }
    let stats = settled(&heartbeat, |stats| stats.delivered == 2);
    assert_eq!((stats.waiting, stats.held, stats.operations), (0, 0, 0));
}

#[test]
fn a_long_error_arrives_with_its_first_2000_characters() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Mutate, ["d"]);
    let operation = heartbeat.begin(Operation::Mutate, ["d"]).unwrap();
    // Two, three and four bytes: a cut at 2,000 bytes would fall into a character.
    let error = "ä→𝕏".repeat(1_000);
    operation.fail(error.clone());
    stage.closed_rows(1);
    let kept: String = error.chars().take(2_000).collect();
    assert_eq!(ends(&stage), [failed("d", &kept)]);
    assert_eq!(sent(&stage)[0]["error"], *kept, "cut before it goes out");
}

#[test]
fn each_decky_is_settled_once_and_the_first_verdict_stands() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Mutate, ["a", "b", "c", "d"]);
    let mut operation = heartbeat.begin(Operation::Mutate, ["a", "b", "c", "d"]).unwrap();
    operation.end("a", Outcome::Succeeded).unwrap();
    operation.end("b", Outcome::Failed("no such image".to_owned())).unwrap();
    for (decky, name) in [("a", "a"), ("x\n", "x")] {
        let error =
            operation.end(decky, Outcome::Failed("a second outcome".to_owned())).unwrap_err();
        assert_eq!(error.to_string(), format!("decky name: {name:?} is not open in this mutate"));
    }
    assert_eq!(operation.open().collect::<Vec<_>>(), ["c", "d"]);
    stage.closed_rows(2);
    assert_eq!(
        settled(&heartbeat, |stats| stats.delivered == 2).operations,
        2,
        "the others are still in flight"
    );
    drop(operation);
    stage.closed_rows(4);
    let left = "mutate ended without a result";
    let expected = [
        end("a", Succeeded, None),
        failed("b", "no such image"),
        failed("c", left),
        failed("d", left),
    ];
    assert_eq!(ends(&stage), expected);
    assert_eq!(settled(&heartbeat, |stats| stats.delivered == 4).operations, 0);
}

#[test]
fn an_operation_that_is_settled_throughout_says_nothing_more_when_it_is_dropped() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    open(&stage, Operation::Deploy, ["d"]);
    let mut operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    operation.end("d", Outcome::Succeeded).unwrap();
    stage.closed_rows(1);
    drop(operation);
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    assert_eq!((ends(&stage), sent(&stage).len()), (vec![end("d", Succeeded, None)], 1));
}

#[test]
fn a_panic_between_begin_and_its_end_is_reported_as_a_failure() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Deploy, ["d"]);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
        panic!("compose is away");
    }));
    assert!(panicked.is_err());
    stage.closed_rows(1);
    assert_eq!(ends(&stage), [failed("d", "deploy panicked")]);
}

#[test]
fn a_run_lets_its_caller_go_on_and_reports_when_the_work_is_done() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Deploy, ["d"]);
    let (done, doing) = bounded::<()>(0);
    let thread = heartbeat.run(Operation::Deploy, ["d"], move || doing.recv()).unwrap();
    assert_eq!((in_flight(&heartbeat), stage.master.rows()[0].status), (1, Running));
    done.send(()).unwrap();
    thread.join().unwrap();
    stage.closed_rows(1);
    assert_eq!(ends(&stage), [end("d", Succeeded, None)]);
}

/// An error with what caused it.
#[derive(Debug)]
struct Failure(&'static str, Option<Box<Failure>>);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.1.as_deref().map(|source| source as _)
    }
}

#[test]
fn a_run_that_fails_reports_the_whole_chain_and_one_that_panics_its_message() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let names = ["chain", "panic", "repeats", "text"];
    open(&stage, Operation::Mutate, names);
    let chain = Failure(
        "compose failed",
        Some(Failure("docker is away", Some(Failure("refused", None).into())).into()),
    );
    heartbeat.run(Operation::Mutate, [names[0]], || Err(chain)).unwrap();
    let port = 80;
    let panics = move || -> Result<(), String> { panic!("port {port} is taken") };
    heartbeat.run(Operation::Mutate, [names[1]], panics).unwrap();
    // As many errors do: the layer above has the one below in its own text already.
    let repeats = Failure("docker: refused", Some(Failure("refused", None).into()));
    heartbeat.run(Operation::Mutate, [names[2]], || Err(repeats)).unwrap();
    heartbeat.run(Operation::Mutate, [names[3]], || Err("exit status: 1")).unwrap();
    stage.closed_rows(4);
    let expected = [
        failed(names[0], "compose failed: docker is away: refused"),
        failed(names[1], "mutate panicked: port 80 is taken"),
        failed(names[2], "docker: refused"),
        failed(names[3], "exit status: 1"),
    ];
    assert_eq!(ends(&stage), expected);
}

#[test]
fn an_operation_that_no_row_can_be_for_is_refused_and_its_work_not_begun() {
    let stage = Stage::new();
    let rule = "is not a valid name: use at most 128 characters of A-Z, a-z, 0-9, _, . and -";
    let too_long = format!("decky name: \"{}\"… {rule}", "d".repeat(128));
    let (heartbeat, _tick) = stage.beating();
    for (deckies, problem) in [
        (vec![], "deckies: are none; an operation needs the name of a decky"),
        (
            vec!["d".to_owned(), " ".to_owned()],
            "decky name: is empty; a delta needs the name of its decky",
        ),
        (
            vec!["d".to_owned(), "a,b\n".to_owned()],
            r#"decky name: "a,b\n" is not a valid name: use at most 128 characters of A-Z, a-z, 0-9, _, . and -"#,
        ),
        (vec!["d".repeat(129)], &too_long),
    ] {
        let error = heartbeat.begin(Operation::Deploy, deckies.clone()).unwrap_err();
        assert_eq!(error.to_string(), problem);
        let begun = Arc::new(AtomicBool::new(false));
        let begin = Arc::clone(&begun);
        let work = move || {
            begin.store(true, Ordering::Relaxed);
            Ok::<_, String>(())
        };
        assert_eq!(
            heartbeat.run(Operation::Deploy, deckies, work).unwrap_err().to_string(),
            problem
        );
        assert_eq!((Arc::strong_count(&begun), begun.load(Ordering::Relaxed)), (1, false));
    }
    assert_eq!(in_flight(&heartbeat), 0);
}

#[test]
fn a_decky_that_is_named_twice_is_one_operation() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Deploy, ["d", "d"]);
    let operation = heartbeat.begin(Operation::Deploy, ["d", "d"]).unwrap();
    assert_eq!((operation.open().collect::<Vec<_>>(), in_flight(&heartbeat)), (vec!["d"], 1));
    operation.succeed();
    stage.closed_rows(1);
    settled(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    assert_eq!(
        ends(&stage),
        [end("d", Running, None), end("d", Succeeded, None)],
        "the newest open row"
    );
}

#[test]
fn an_operation_in_flight_outlives_a_stop_and_the_next_start_reports_it() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    open(&stage, Operation::Deploy, ["d", "e"]);
    let operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let (done, doing) = bounded::<()>(0);
    let work = heartbeat.run(Operation::Deploy, ["e"], move || doing.recv()).unwrap();
    let stopped = heartbeat.stop(Duration::from_secs(10));
    assert_eq!(
        (stopped.undelivered, stopped.operations, stopped.kept, stopped.in_time),
        (0, 2, true, true)
    );
    operation.fail("after the stop");
    // And one that is in flight even when the next heartbeat starts: its process lives, so it is left alone.
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    stage.closed_rows(1);
    assert_eq!(settled(&heartbeat, |stats| stats.delivered == 1).operations, 1);
    assert_eq!(ends(&stage), [failed("d", "after the stop"), end("e", Running, None)]);
    done.send(()).unwrap();
    work.join().unwrap();
    tick.send(now()).unwrap();
    stage.closed_rows(2);
    assert_eq!(ends(&stage)[1], end("e", Succeeded, None));
    let stats = settled(&heartbeat, |stats| stats.delivered == 2);
    assert_eq!((stats.waiting, stats.operations), (0, 0));
}

#[test]
fn in_memory_an_operation_does_not_outlive_a_stop_and_the_stop_says_so() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    let operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let stopped = heartbeat.stop(Duration::from_secs(10));
    assert_eq!(
        (stopped.undelivered, stopped.operations, stopped.kept, stopped.in_time),
        (0, 1, false, true)
    );
    operation.succeed();
}

#[test]
fn a_newer_operation_holds_an_older_delta_back_until_both_land_on_their_own_rows() {
    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.stop();
    open(&stage, Operation::Mutate, ["d"]);
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Mutate, "older")).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    open(&stage, Operation::Mutate, ["d"]);
    let newer = heartbeat.begin(Operation::Mutate, ["d"]).unwrap();
    stage.master.start_again().unwrap();
    let stats = settled(&heartbeat, |stats| stats.beats == 2);
    assert_eq!((stats.waiting, stats.held, stats.operations), (1, 1, 1));
    // Another decky's delta, and another operation of the same one, are not held up.
    heartbeat.deltas().push(LifecycleDelta::succeeded("e", Operation::Mutate)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.beats == 5);
    let spins = stage.master.wait_until(SILENCE, |seen| seen.received().len() > 5);
    let carried: Vec<_> = stage.master.received().iter().map(deckies).collect();
    assert!(!spins, "what is held back asks for no beat: {carried:?}");
    assert_eq!(carried, [vec![], vec![], vec!["e"], vec!["d"], vec![]]);
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.held, stats.operations), (1, 1, 1));
    newer.fail("newer");
    stage.closed_rows(2);
    assert_eq!(ends(&stage), [failed("d", "older"), failed("d", "newer")]);
    let errors: Vec<_> = sent(&stage).iter().skip(2).map(|delta| delta["error"].clone()).collect();
    assert_eq!(errors, ["newer", "older"], "newest first");
    let stats = settled(&heartbeat, |stats| stats.delivered == 4);
    assert_eq!((stats.waiting, stats.held, stats.operations), (0, 0, 0));
}

#[test]
fn of_overlapping_operations_each_lands_on_its_own_row_whichever_ends_first() {
    for older_first in [true, false] {
        let stage = Stage::new();
        let (heartbeat, tick) = stage.beating();
        open(&stage, Operation::Deploy, ["d"]);
        let older = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
        open(&stage, Operation::Deploy, ["d"]);
        let newer = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
        if older_first {
            older.fail("older");
            tick.send(now()).unwrap();
            let stats = settled(&heartbeat, |stats| stats.held == 1 && stats.beats >= 2);
            assert_eq!((stats.waiting, stats.operations), (1, 1));
            assert_eq!(
                ends(&stage),
                [end("d", Running, None), end("d", Running, None)],
                "it is held back"
            );
            newer.fail("newer");
        } else {
            newer.fail("newer");
            stage.closed_rows(1);
            assert_eq!(
                ends(&stage),
                [end("d", Running, None), failed("d", "newer")],
                "it need not wait"
            );
            older.fail("older");
        }
        stage.closed_rows(2);
        assert_eq!(
            ends(&stage),
            [failed("d", "older"), failed("d", "newer")],
            "older first: {older_first}"
        );
    }
}

#[test]
fn a_burst_of_600_ends_arrives_whole_and_each_once() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let names: Vec<_> = (0..600).map(|n| format!("d{n:03}")).collect();
    open(&stage, Operation::Deploy, names.iter().map(String::as_str));
    let operation = heartbeat.begin(Operation::Deploy, names.clone()).unwrap();
    assert_eq!(in_flight(&heartbeat), 600);
    operation.succeed();
    stage.closed_rows(600);
    assert_eq!(
        ends(&stage),
        names.iter().map(|name| end(name, Succeeded, None)).collect::<Vec<_>>()
    );
    let stats = settled(&heartbeat, |stats| stats.delivered == 600);
    assert_eq!((stats.waiting, stats.held, stats.operations, sent(&stage).len()), (0, 0, 0, 600));
}

#[test]
fn an_end_waits_for_a_locked_outbox_a_second_however_many_deckies_it_is_for() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let names = ["a", "b", "c", "d"];
    open(&stage, Operation::Deploy, names);
    let operation = heartbeat.begin(Operation::Deploy, names).unwrap();
    let other = rusqlite::Connection::open(stage.agent_dir().join("heartbeat.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let since = Instant::now();
    operation.succeed();
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    // It is remembered, and need not wait for the file to be reported.
    stage.closed_rows(4);
    other.execute_batch("COMMIT").unwrap();
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 4 && stats.outbox.is_some());
    assert_eq!(ends(&stage), names.map(|name| end(name, Succeeded, None)));
    heartbeat.stop(Duration::from_secs(5));
    let left: i64 = other.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0, "once the file can be written, it knows");
}

#[test]
fn operations_that_end_at_once_on_many_threads_are_all_reported() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let names: Vec<_> = (0..200).map(|n| format!("d{n:03}")).collect();
    open(&stage, Operation::Deploy, names.iter().map(String::as_str));
    let (start, started) = bounded::<()>(0);
    let threads: Vec<_> = names
        .iter()
        .map(|name| {
            let started = started.clone();
            let work = move || match started.recv() {
                Ok(()) => Ok(()),
                Err(_) => Err("all at once"),
            };
            heartbeat.run(Operation::Deploy, [name], work).unwrap()
        })
        .collect();
    assert_eq!(in_flight(&heartbeat), 200);
    drop(start);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    stage.closed_rows(200);
    assert_eq!(
        ends(&stage),
        names.iter().map(|name| failed(name, "all at once")).collect::<Vec<_>>()
    );
    settled(&heartbeat, |stats| {
        stats.delivered == 200 && stats.waiting == 0 && stats.operations == 0
    });
}

#[test]
fn in_memory_nothing_begins_after_a_stop() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    let deltas = heartbeat.deltas();
    heartbeat.stop(PATIENCE);
    let error = deltas.begin(Operation::Deploy, ["d"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas"
    );
}

/// An error with a fault of its own.
#[derive(Debug)]
struct Faulty {
    displays: bool,
    drops: bool,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        assert!(self.displays, "it has no text");
        f.write_str("no such image")
    }
}

impl StdError for Faulty {}

impl Drop for Faulty {
    fn drop(&mut self) {
        assert!(self.drops || std::thread::panicking(), "it does not go");
    }
}

/// Throws another one of its kind when it is dropped.
struct Stubborn(u32);

impl Drop for Stubborn {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::panic_any(Stubborn(self.0 - 1));
        }
    }
}

#[test]
fn an_error_or_a_payload_that_panics_itself_is_a_report_and_no_panic_of_the_thread() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    for (displays, drops, reported) in [
        (true, false, "no such image"),
        (false, true, "mutate failed, and its error panicked when it was read: it has no text"),
        (false, false, "mutate failed, and its error panicked when it was read: it has no text"),
    ] {
        open(&stage, Operation::Mutate, ["d"]);
        let work = move || Err::<(), _>(Faulty { displays, drops });
        heartbeat.run(Operation::Mutate, ["d"], work).unwrap().join().unwrap();
        stage.closed_rows(stage.master.rows().len());
        assert_eq!(ends(&stage).pop().unwrap(), failed("d", reported));
    }
    open(&stage, Operation::Mutate, ["d"]);
    let work = || -> Result<(), String> { std::panic::panic_any(Stubborn(2)) };
    heartbeat.run(Operation::Mutate, ["d"], work).unwrap().join().unwrap();
    stage.closed_rows(4);
    assert_eq!(
        ends(&stage).pop().unwrap(),
        failed("d", "mutate panicked: a panic without a message")
    );
}
