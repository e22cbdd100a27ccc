//! `pipe` and an agent that writes more than it reads.

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::pipe::often;
use crate::support::{Agent, ChildProcess, Fixture, TIMEOUT};

/// A line that pushes one delta.
fn push(id: u64) -> String {
    let delta = json!({"decky_name": "decky-01", "operation": "mutate", "status": "succeeded"});
    let params = json!({"deltas": [delta]});
    format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "method": "push", "params": params}))
}

/// Waits until the number stays the same for a second.
fn settled(number: &AtomicU64) -> u64 {
    let end = Instant::now() + TIMEOUT;
    loop {
        let before = number.load(Ordering::SeqCst);
        thread::sleep(Duration::from_secs(1));
        if before == number.load(Ordering::SeqCst) {
            return before;
        }
        assert!(Instant::now() < end, "it is read without end");
    }
}

#[test]
fn answers_that_nobody_reads_stop_the_reading_and_not_the_beats() {
    let fixture = Fixture::new();
    let mut command = often(&fixture);
    let mut pipe = ChildProcess::start(command.stderr(std::process::Stdio::null()));
    let mut stdin = pipe.0.stdin.take().unwrap();
    let stdout = pipe.0.stdout.take().unwrap();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let begin = json!({"operation": "deploy", "deckies": ["a"]});
    let begin = json!({"jsonrpc": "2.0", "id": 0, "method": "begin", "params": begin});
    writeln!(stdin, "{begin}").unwrap();
    let written = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&written);
    let writer = thread::spawn(move || {
        for id in 1.. {
            // It fails when the program has ended.
            if stdin.write_all(push(id).as_bytes()).is_err() {
                return;
            }
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    settled(&written);
    fixture.wait_for_more_requests(3);
    let status = std::fs::read_to_string(format!("/proc/{}/status", pipe.0.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 64 * 1024, "{peak} KiB");
    // The agent stays as it is: its stdin is open, and it reads no answer.
    pipe.signal("TERM");
    assert_eq!(pipe.wait(TIMEOUT).code(), Some(0));
    writer.join().unwrap();
    drop(stdout);
}

#[test]
fn end_of_an_agent_that_read_no_answer_reports_its_operations() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let mut command = often(&fixture);
    let mut pipe = ChildProcess::start(command.stderr(std::process::Stdio::null()));
    let mut stdin = pipe.0.stdin.take().unwrap();
    let stdout = pipe.0.stdout.take().unwrap();
    // More answers than a pipe holds and are stored, so the line with `begin` waits behind them.
    for id in 0..400 {
        writeln!(stdin, r#"{{"jsonrpc":"2.0","id":{id},"method":"stats"}}"#).unwrap();
    }
    let begin = json!({"operation": "deploy", "deckies": ["a"]});
    writeln!(stdin, "{}", json!({"jsonrpc": "2.0", "id": 1, "method": "begin", "params": begin}))
        .unwrap();
    drop(stdin);
    assert_eq!(pipe.wait(TIMEOUT).code(), Some(0));
    let row = &fixture.master.rows()[0];
    assert_eq!(row.error.as_deref(), Some("the agent ended during deploy"));
    drop(stdout);
}

#[test]
fn flood_is_answered_in_order_and_takes_bounded_memory() {
    const LINES: u64 = 30_000;
    let fixture = Fixture::new();
    let mut agent = Agent::start(&mut often(&fixture));
    let mut stdin = agent.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        (1..=LINES).for_each(|id| stdin.write_all(push(id).as_bytes()).unwrap());
        stdin
    });
    for id in 1..=LINES {
        let answer = agent.answer();
        assert_eq!((&answer["id"], &answer["result"]), (&json!(id), &json!({"durable": true})));
    }
    let peak = agent.peak_memory();
    assert!(peak < 64 * 1024, "{peak} KiB");
    agent.stdin = Some(writer.join().unwrap());
    let stats = agent.result("stats", Value::Null);
    let number = |key: &str| stats[key].as_u64().unwrap();
    assert_eq!(number("delivered") + number("waiting") + number("dropped"), LINES, "{stats}");
    drop(agent.stdin.take());
    agent.pipe.wait(TIMEOUT);
}

#[test]
fn agent_that_closes_its_reading_end_is_still_served() {
    let fixture = Fixture::new();
    for _ in 0..2 {
        fixture.master.open_operation(&fixture.worker.uuid, "decky-01", "mutate");
    }
    let mut command = often(&fixture);
    let mut pipe = ChildProcess::start(&mut command);
    let mut stdin = pipe.0.stdin.take().unwrap();
    let log = BufReader::new(pipe.0.stderr.take().unwrap());
    drop(pipe.0.stdout.take());
    for id in 1..=2 {
        stdin.write_all(push(id).as_bytes()).unwrap();
        fixture.wait_for_closed_rows(id as usize);
    }
    drop(stdin);
    assert_eq!(pipe.wait(TIMEOUT).code(), Some(0));
    let lines: Vec<_> = log.lines().map_while(Result::ok).collect();
    let broken =
        |line: &&String| line.contains("answers cannot be written; requests are still done");
    assert_eq!(lines.iter().filter(broken).count(), 1, "{lines:#?}");
}
