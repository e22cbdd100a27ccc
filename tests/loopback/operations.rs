//! Tracked operations, from `begin` to the master's rows, for each way in which they end.

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

use crate::support::{Fixture, TIMEOUT, deckies, deltas, now, wait_for_stats};

/// Waits this long to see that no beat is sent.
const SILENCE: Duration = Duration::from_millis(500);

/// Opens a row for each of these deckies, as the master does before it sends the operation.
fn open_rows<'a>(
    fixture: &Fixture,
    operation: Operation,
    deckies: impl IntoIterator<Item = &'a str>,
) {
    for decky in deckies {
        fixture.master.open_operation(&fixture.worker.uuid, decky, operation.as_str());
    }
}

/// The rows, the oldest first: the decky, its status and its error.
fn row_ends(fixture: &Fixture) -> Vec<(String, RowStatus, Option<String>)> {
    let end = |row: LifecycleRow| (row.decky, row.status, row.error);
    fixture.master.rows().into_iter().map(end).collect()
}

fn end(decky: &str, status: RowStatus, error: Option<&str>) -> (String, RowStatus, Option<String>) {
    (decky.to_owned(), status, error.map(str::to_owned))
}

fn failed(decky: &str, error: &str) -> (String, RowStatus, Option<String>) {
    end(decky, Failed, Some(error))
}

/// All deltas that were sent, in order.
fn sent_deltas(fixture: &Fixture) -> Vec<Value> {
    fixture.master.received().iter().flat_map(deltas).collect()
}

fn in_flight(heartbeat: &Heartbeat) -> u64 {
    heartbeat.stats().operations
}

#[test]
fn success_closes_the_rows_of_all_deckies_with_its_end_time() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Deploy, ["a", "b"]);
    let operation = heartbeat.begin(Operation::Deploy, ["b", "a"]).unwrap();
    assert_eq!(operation.operation(), Operation::Deploy);
    assert_eq!(operation.open().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(in_flight(&heartbeat), 2);
    let before = SystemTime::now() - Duration::from_micros(1);
    operation.succeed();
    let after = SystemTime::now();
    fixture.wait_for_closed_rows(2);
    assert_eq!(row_ends(&fixture), [end("a", Succeeded, None), end("b", Succeeded, None)]);
    for row in fixture.master.rows() {
        let at = row.completed_at.unwrap();
        assert!((before..=after).contains(&at), "{at:?} is not from {before:?} to {after:?}");
        // It is the time that the worker sent, in UTC, and not the master's.
        let deltas: Vec<_> = sent_deltas(&fixture)
            .into_iter()
            .filter(|delta| delta["decky_name"] == *row.decky)
            .collect();
        let [delta] = deltas.as_slice() else { panic!("{deltas:?}") };
        let reported = delta["completed_at"].as_str().unwrap();
        assert_eq!(humantime::parse_rfc3339(reported).unwrap(), at);
        assert!(reported.ends_with('Z'), "{reported}");
    }
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    assert_eq!((stats.waiting, stats.held, stats.operations), (0, 0, 0));
}

#[test]
fn long_error_is_cut_to_2000_characters() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Mutate, ["d"]);
    let operation = heartbeat.begin(Operation::Mutate, ["d"]).unwrap();
    // Characters of two, three and four bytes. The limit counts characters.
    let error = "ä→𝕏".repeat(1_000);
    operation.fail(error.clone());
    fixture.wait_for_closed_rows(1);
    let cut: String = error.chars().take(2_000).collect();
    assert_eq!(row_ends(&fixture), [failed("d", &cut)]);
    assert_eq!(sent_deltas(&fixture)[0]["error"], *cut, "cut before it is sent");
}

#[test]
fn first_outcome_of_a_decky_counts() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Mutate, ["a", "b", "c", "d"]);
    let mut operation = heartbeat.begin(Operation::Mutate, ["a", "b", "c", "d"]).unwrap();
    operation.end("a", Outcome::Succeeded).unwrap();
    operation.end("b", Outcome::Failed("no such image".to_owned())).unwrap();
    for (decky, name) in [("a", "a"), ("x\n", "x")] {
        let error =
            operation.end(decky, Outcome::Failed("a second outcome".to_owned())).unwrap_err();
        assert_eq!(error.to_string(), format!("decky name: {name:?} is not open in this mutate"));
    }
    assert_eq!(operation.open().collect::<Vec<_>>(), ["c", "d"]);
    fixture.wait_for_closed_rows(2);
    assert_eq!(
        wait_for_stats(&heartbeat, |stats| stats.delivered == 2).operations,
        2,
        "the others are still in flight"
    );
    drop(operation);
    fixture.wait_for_closed_rows(4);
    let dropped = "mutate ended without a result";
    let expected = [
        end("a", Succeeded, None),
        failed("b", "no such image"),
        failed("c", dropped),
        failed("d", dropped),
    ];
    assert_eq!(row_ends(&fixture), expected);
    assert_eq!(wait_for_stats(&heartbeat, |stats| stats.delivered == 4).operations, 0);
}

#[test]
fn dropping_an_ended_operation_reports_nothing() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Deploy, ["d"]);
    let mut operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    operation.end("d", Outcome::Succeeded).unwrap();
    fixture.wait_for_closed_rows(1);
    drop(operation);
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    assert_eq!(
        (row_ends(&fixture), sent_deltas(&fixture).len()),
        (vec![end("d", Succeeded, None)], 1)
    );
}

#[test]
fn panic_during_an_operation_is_reported_as_a_failure() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Deploy, ["d"]);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
        panic!("compose failed");
    }));
    assert!(panicked.is_err());
    fixture.wait_for_closed_rows(1);
    assert_eq!(row_ends(&fixture), [failed("d", "deploy panicked")]);
}

#[test]
fn run_returns_at_once_and_reports_the_end_of_the_work() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Deploy, ["d"]);
    let (finish, finished) = bounded::<()>(0);
    let thread = heartbeat.run(Operation::Deploy, ["d"], move || finished.recv()).unwrap();
    assert_eq!((in_flight(&heartbeat), fixture.master.rows()[0].status), (1, Running));
    finish.send(()).unwrap();
    thread.join().unwrap();
    fixture.wait_for_closed_rows(1);
    assert_eq!(row_ends(&fixture), [end("d", Succeeded, None)]);
}

/// An error with a source.
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
fn run_reports_error_chains_and_panic_messages() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let names = ["chain", "panic", "repeats", "text"];
    open_rows(&fixture, Operation::Mutate, names);
    let chain = Failure(
        "compose failed",
        Some(Failure("docker does not answer", Some(Failure("refused", None).into())).into()),
    );
    heartbeat.run(Operation::Mutate, [names[0]], || Err(chain)).unwrap();
    let port = 80;
    let panics = move || -> Result<(), String> { panic!("port {port} is taken") };
    heartbeat.run(Operation::Mutate, [names[1]], panics).unwrap();
    // The text contains the text of its source, as in many libraries.
    let repeats = Failure("docker: refused", Some(Failure("refused", None).into()));
    heartbeat.run(Operation::Mutate, [names[2]], || Err(repeats)).unwrap();
    heartbeat.run(Operation::Mutate, [names[3]], || Err("exit status: 1")).unwrap();
    fixture.wait_for_closed_rows(4);
    let expected = [
        failed(names[0], "compose failed: docker does not answer: refused"),
        failed(names[1], "mutate panicked: port 80 is taken"),
        failed(names[2], "docker: refused"),
        failed(names[3], "exit status: 1"),
    ];
    assert_eq!(row_ends(&fixture), expected);
}

#[test]
fn invalid_operation_is_rejected_and_its_work_is_not_started() {
    let fixture = Fixture::new();
    let rule = "is not a valid name: use at most 128 characters of A-Z, a-z, 0-9, _, . and -";
    let too_long = format!("decky name: \"{}\"… {rule}", "d".repeat(128));
    let (heartbeat, _tick) = fixture.start_heartbeat();
    for (deckies, problem) in [
        (vec![], "deckies: the list is empty; an operation needs at least one decky"),
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
        let started = Arc::new(AtomicBool::new(false));
        let start = Arc::clone(&started);
        let work = move || {
            start.store(true, Ordering::Relaxed);
            Ok::<_, String>(())
        };
        assert_eq!(
            heartbeat.run(Operation::Deploy, deckies, work).unwrap_err().to_string(),
            problem
        );
        assert_eq!((Arc::strong_count(&started), started.load(Ordering::Relaxed)), (1, false));
    }
    assert_eq!(in_flight(&heartbeat), 0);
}

#[test]
fn duplicate_decky_is_one_operation() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Deploy, ["d", "d"]);
    let operation = heartbeat.begin(Operation::Deploy, ["d", "d"]).unwrap();
    assert_eq!((operation.open().collect::<Vec<_>>(), in_flight(&heartbeat)), (vec!["d"], 1));
    operation.succeed();
    fixture.wait_for_closed_rows(1);
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.waiting == 0);
    assert_eq!(
        row_ends(&fixture),
        [end("d", Running, None), end("d", Succeeded, None)],
        "it closes the newest open row"
    );
}

#[test]
fn operation_in_flight_is_reported_after_restart() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    open_rows(&fixture, Operation::Deploy, ["d", "e"]);
    let operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let (finish, finished) = bounded::<()>(0);
    let work = heartbeat.run(Operation::Deploy, ["e"], move || finished.recv()).unwrap();
    let stopped = heartbeat.stop(Duration::from_secs(10));
    assert_eq!(
        (stopped.undelivered, stopped.operations, stopped.durable, stopped.in_time),
        (0, 2, true, true)
    );
    operation.fail("after the stop");
    // The other operation is in flight when the next heartbeat starts. Its process is running, so
    // the heartbeat does not end it.
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    fixture.wait_for_closed_rows(1);
    assert_eq!(wait_for_stats(&heartbeat, |stats| stats.delivered == 1).operations, 1);
    assert_eq!(row_ends(&fixture), [failed("d", "after the stop"), end("e", Running, None)]);
    finish.send(()).unwrap();
    work.join().unwrap();
    tick.send(now()).unwrap();
    fixture.wait_for_closed_rows(2);
    assert_eq!(row_ends(&fixture)[1], end("e", Succeeded, None));
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    assert_eq!((stats.waiting, stats.operations), (0, 0));
}

#[test]
fn memory_outbox_loses_operations_at_stop_and_reports_that() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    let operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let stopped = heartbeat.stop(Duration::from_secs(10));
    assert_eq!(
        (stopped.undelivered, stopped.operations, stopped.durable, stopped.in_time),
        (0, 1, false, true)
    );
    operation.succeed();
}

#[test]
fn newer_operation_holds_an_older_delta() {
    let mut fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.stop();
    open_rows(&fixture, Operation::Mutate, ["d"]);
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Mutate, "older")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    open_rows(&fixture, Operation::Mutate, ["d"]);
    let newer = heartbeat.begin(Operation::Mutate, ["d"]).unwrap();
    fixture.master.start_again().unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 2);
    assert_eq!((stats.waiting, stats.held, stats.operations), (1, 1, 1));
    // A delta of another decky, or of another operation of the decky, is not held.
    heartbeat.deltas().push(LifecycleDelta::succeeded("e", Operation::Mutate)).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 5);
    let sent_more = fixture.master.wait_until(SILENCE, |seen| seen.received().len() > 5);
    let bodies: Vec<_> = fixture.master.received().iter().map(deckies).collect();
    assert!(!sent_more, "a held delta requests no beat: {bodies:?}");
    assert_eq!(bodies, [vec![], vec![], vec!["e"], vec!["d"], vec![]]);
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.held, stats.operations), (1, 1, 1));
    newer.fail("newer");
    fixture.wait_for_closed_rows(2);
    assert_eq!(row_ends(&fixture), [failed("d", "older"), failed("d", "newer")]);
    let errors: Vec<_> =
        sent_deltas(&fixture).iter().skip(2).map(|delta| delta["error"].clone()).collect();
    assert_eq!(errors, ["newer", "older"], "newest first");
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 4);
    assert_eq!((stats.waiting, stats.held, stats.operations), (0, 0, 0));
}

#[test]
fn overlapping_operations_close_their_own_rows_in_any_order() {
    for older_first in [true, false] {
        let fixture = Fixture::new();
        let (heartbeat, tick) = fixture.start_heartbeat();
        open_rows(&fixture, Operation::Deploy, ["d"]);
        let older = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
        open_rows(&fixture, Operation::Deploy, ["d"]);
        let newer = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
        if older_first {
            older.fail("older");
            tick.send(now()).unwrap();
            let stats = wait_for_stats(&heartbeat, |stats| stats.held == 1 && stats.beats >= 2);
            assert_eq!((stats.waiting, stats.operations), (1, 1));
            assert_eq!(
                row_ends(&fixture),
                [end("d", Running, None), end("d", Running, None)],
                "the older one is held"
            );
            newer.fail("newer");
        } else {
            newer.fail("newer");
            fixture.wait_for_closed_rows(1);
            assert_eq!(
                row_ends(&fixture),
                [end("d", Running, None), failed("d", "newer")],
                "the newer one is not held"
            );
            older.fail("older");
        }
        fixture.wait_for_closed_rows(2);
        assert_eq!(
            row_ends(&fixture),
            [failed("d", "older"), failed("d", "newer")],
            "older first: {older_first}"
        );
    }
}

#[test]
fn burst_of_600_ends_is_delivered_once_each() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let names: Vec<_> = (0..600).map(|n| format!("d{n:03}")).collect();
    open_rows(&fixture, Operation::Deploy, names.iter().map(String::as_str));
    let operation = heartbeat.begin(Operation::Deploy, names.clone()).unwrap();
    assert_eq!(in_flight(&heartbeat), 600);
    operation.succeed();
    fixture.wait_for_closed_rows(600);
    assert_eq!(
        row_ends(&fixture),
        names.iter().map(|name| end(name, Succeeded, None)).collect::<Vec<_>>()
    );
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 600);
    assert_eq!(
        (stats.waiting, stats.held, stats.operations, sent_deltas(&fixture).len()),
        (0, 0, 0, 600)
    );
}

#[test]
fn end_waits_one_second_for_a_locked_outbox() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let names = ["a", "b", "c", "d"];
    open_rows(&fixture, Operation::Deploy, names);
    let operation = heartbeat.begin(Operation::Deploy, names).unwrap();
    let other = rusqlite::Connection::open(fixture.outbox()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let since = Instant::now();
    operation.succeed();
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    // The result is in memory, and is reported before it is in the file.
    fixture.wait_for_closed_rows(4);
    other.execute_batch("COMMIT").unwrap();
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 4 && stats.outbox.is_some());
    assert_eq!(row_ends(&fixture), names.map(|name| end(name, Succeeded, None)));
    heartbeat.stop(Duration::from_secs(5));
    let left: i64 = other.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0, "the file is updated when it can be written");
}

#[test]
fn operations_that_end_at_once_on_many_threads_are_all_reported() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let names: Vec<_> = (0..200).map(|n| format!("d{n:03}")).collect();
    open_rows(&fixture, Operation::Deploy, names.iter().map(String::as_str));
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
    fixture.wait_for_closed_rows(200);
    assert_eq!(
        row_ends(&fixture),
        names.iter().map(|name| failed(name, "all at once")).collect::<Vec<_>>()
    );
    wait_for_stats(&heartbeat, |stats| {
        stats.delivered == 200 && stats.waiting == 0 && stats.operations == 0
    });
}

#[test]
fn memory_outbox_begins_no_operation_after_stop() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    let deltas = heartbeat.deltas();
    heartbeat.stop(TIMEOUT);
    let error = deltas.begin(Operation::Deploy, ["d"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas"
    );
}

/// An error that panics.
#[derive(Debug)]
enum PanickingError {
    Drop,
    Display,
    Both,
}

impl fmt::Display for PanickingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        assert!(matches!(self, Self::Drop), "it has no text");
        f.write_str("no such image")
    }
}

impl StdError for PanickingError {}

impl Drop for PanickingError {
    fn drop(&mut self) {
        let panics = matches!(self, Self::Drop | Self::Both);
        assert!(!panics || std::thread::panicking(), "it cannot be dropped");
    }
}

/// A panic payload that panics with another payload when it is dropped, this many times.
struct PanickingPayload(u32);

impl Drop for PanickingPayload {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::panic_any(PanickingPayload(self.0 - 1));
        }
    }
}

#[test]
fn panicking_errors_and_payloads_are_reported() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let no_text = "mutate failed, and its error panicked when it was read: it has no text";
    for (error, reported) in [
        (PanickingError::Drop, "no such image"),
        (PanickingError::Display, no_text),
        (PanickingError::Both, no_text),
    ] {
        open_rows(&fixture, Operation::Mutate, ["d"]);
        let work = move || Err::<(), _>(error);
        heartbeat.run(Operation::Mutate, ["d"], work).unwrap().join().unwrap();
        fixture.wait_for_closed_rows(fixture.master.rows().len());
        assert_eq!(row_ends(&fixture).pop().unwrap(), failed("d", reported));
    }
    open_rows(&fixture, Operation::Mutate, ["d"]);
    let work = || -> Result<(), String> { std::panic::panic_any(PanickingPayload(2)) };
    heartbeat.run(Operation::Mutate, ["d"], work).unwrap().join().unwrap();
    fixture.wait_for_closed_rows(4);
    assert_eq!(
        row_ends(&fixture).pop().unwrap(),
        failed("d", "mutate panicked: a panic without a message")
    );
}
