//! The agent's own status source: it may panic, block, or return too much, and the beats continue.

use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Fault as MasterFault, Received};
use serde_json::{Value, json};

use crate::agent::Source;
use crate::agent_process::AgentProcess;
use crate::log;
use crate::test_bed::{SLACK, Scenario, TIMEOUT, TestBed};

fn start(source: Source) -> (TestBed, AgentProcess) {
    start_with_interval(source, Scenario::default().interval)
}

fn start_with_interval(source: Source, interval: Duration) -> (TestBed, AgentProcess) {
    let bed = TestBed::new(Scenario { source, interval, ..Scenario::default() });
    let agent = bed.start();
    (bed, agent)
}

/// Sends a tick. Its beat is sent within this time.
fn beat(agent: &mut AgentProcess, within: Duration) -> Value {
    let beats = agent.stats()["beats"].as_u64();
    let since = Instant::now();
    agent.tick();
    let stats = agent.wait_for("the beat of the tick", |stats| stats["beats"].as_u64() > beats);
    assert!(since.elapsed() < within + SLACK, "{:?}", since.elapsed());
    stats
}

fn status_of(request: &Received) -> Value {
    request.json.as_ref().unwrap()["status"].clone()
}

/// The statuses of all requests, in their order.
fn statuses(bed: &TestBed) -> Vec<Value> {
    bed.master.received().iter().map(status_of).collect()
}

fn last_status(bed: &TestBed) -> Value {
    statuses(bed).pop().unwrap()
}

fn wait_for_source(agent: &mut AgentProcess) -> Value {
    agent.wait_for("the source", |stats| stats["snapshot_pending_since"].is_null())
}

pub fn panics_do_not_stop_beats() {
    let (bed, mut agent) = start(Source::Panics);
    for _ in 0..20 {
        beat(&mut agent, Duration::ZERO);
    }
    let stats = wait_for_source(&mut agent);
    assert_eq!(stats["snapshots"], 0);
    assert!(stats["last_snapshot"].is_null(), "{stats}");
    assert!(stats["panics"].as_u64() >= Some(20), "{stats}");
    let expected = "the status source panicked: no such \\u{1b}[31mdecky\\u{a}xxx";
    let status = last_status(&bed);
    assert!(status["error"].as_str().unwrap().starts_with(expected), "{status}");
    let lines = agent.log_lines("status source panicked");
    assert!((1..=5).contains(&lines.len()), "the rate does not decrease: {lines:#?}");
    log::check_log(&bed, &agent.log());
}

pub fn snapshots_between_panics_are_sent() {
    let (bed, mut agent) = start(Source::PanicsEverySecondTime);
    for _ in 0..20 {
        beat(&mut agent, Duration::ZERO);
    }
    let stats = wait_for_source(&mut agent);
    assert!(stats["snapshots"].as_u64() >= Some(10), "{stats}");
    assert!(stats["panics"].as_u64() >= Some(10), "{stats}");
    assert!(stats["last_snapshot"].is_string(), "{stats}");
    let (good, failed): (Vec<_>, Vec<_>) =
        statuses(&bed).into_iter().partition(|status| status["error"].is_null());
    assert!(good.len() >= 10 && failed.len() >= 10, "{good:?} {failed:?}");
    let lines = agent.log_lines("status source panicked");
    assert!((1..=5).contains(&lines.len()), "the rate does not decrease: {lines:#?}");
}

pub fn panic_payload_that_panics_on_drop_is_contained() {
    let (bed, mut agent) = start(Source::PanicsWithPanickingPayload);
    for _ in 0..5 {
        beat(&mut agent, Duration::ZERO);
    }
    let stats = wait_for_source(&mut agent);
    assert!(stats["ended_thread"].is_null() && stats["failure"].is_null(), "{stats}");
    assert!(stats["panics"].as_u64() >= Some(5), "{stats}");
    let error = last_status(&bed)["error"].clone();
    assert_eq!(error, "the status source panicked: a panic without a message");
    assert_eq!(agent.stop(Duration::from_secs(1))["in_time"], true);
}

pub fn blocked_source_is_not_called_again() {
    let (bed, mut agent) = start_with_interval(Source::NeverReturns, Duration::from_secs(2));
    let threads = agent.footprint().threads;
    let since = agent.stats()["snapshot_pending_since"].clone();
    assert!(since.is_string(), "{since}");
    for _ in 0..5 {
        let stats = beat(&mut agent, Duration::from_secs(1));
        assert_eq!(stats["snapshot_pending_since"], since, "the source was called again");
    }
    let expected = "no fresh snapshot: the status source has not answered for ";
    for status in statuses(&bed) {
        assert!(status["error"].as_str().unwrap().starts_with(expected), "{status}");
    }
    assert_eq!(agent.footprint().threads, threads);
    assert_eq!(agent.stop(Duration::from_secs(1))["in_time"], true);
}

pub fn late_snapshot_is_sent_in_its_own_beat() {
    let (bed, mut agent) = start(Source::ReturnsAfter(60));
    let started = Instant::now();
    agent.push("d");
    agent.wait_for("the delivery", |stats| stats["delivered"] == 1);
    assert!(started.elapsed() < SLACK);
    beat(&mut agent, Duration::from_secs(10));
    let has_snapshot = bed.master.wait_until(TIMEOUT + SLACK, |seen| {
        seen.received().last().is_some_and(|request| status_of(request)["calls"] == 1)
    });
    assert!(has_snapshot, "{:?}", statuses(&bed));
    assert!((55..65).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    // The source is called again, because the state may have changed with the delta.
    let stats =
        agent.wait_for("the next call", |stats| stats["snapshot_pending_since"].is_string());
    assert_eq!(stats["snapshots"], 1);
    assert!(stats["last_snapshot"].is_string(), "{stats}");
}

pub fn status_of_50_mb_is_replaced_by_an_error() {
    const SIZE: usize = 50 << 20;
    let (bed, mut agent) = start(Source::OfSize(SIZE));
    let is_rejected = |bed: &TestBed| {
        last_status(bed)["error"].as_str().is_some_and(|error| error.contains("larger than"))
    };
    let since = Instant::now();
    while !is_rejected(&bed) {
        assert!(since.elapsed() < TIMEOUT, "{}", agent.log_tail());
        beat(&mut agent, Duration::from_secs(10));
    }
    let before = agent.footprint().peak;
    // The string of the source, its JSON, and what both reserve while they grow.
    assert!(before < 6 * SIZE as u64 / 1024, "{before} KiB");
    for _ in 0..5 {
        beat(&mut agent, Duration::from_secs(10));
    }
    let after = agent.footprint().peak;
    assert!(after < before + SIZE as u64 / 1024, "{before} KiB, then {after} KiB");
}

/// The source returns during a POST of ten seconds. Its snapshot is too old after that, so the
/// source is called again.
pub fn snapshot_that_aged_during_a_post_is_not_sent() {
    let (bed, mut agent) = start(Source::ReturnsOnCommand);
    agent.command("snapshot");
    agent.wait_for("the beat of the first snapshot", |stats| stats["beats"] == 2);
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n".to_vec();
    bed.master.script([MasterFault::Endless(head, b".".to_vec(), Duration::from_secs(1))]);
    agent.push("d");
    assert!(bed.master.wait_until(TIMEOUT, |seen| seen.received().len() == 3));
    agent.command("snapshot");
    agent.wait_for("the second snapshot", |stats| stats["snapshots"] == 2);
    agent.wait_for("the end of the POST", |stats| stats["beats"] == 3);
    agent.command("snapshot");
    agent.wait_for("the beat of the third snapshot", |stats| stats["beats"] == 4);
    let calls: Vec<_> = statuses(&bed).iter().map(|status| status["calls"].clone()).collect();
    assert_eq!(calls, [Value::Null, json!(1), Value::Null, json!(3)]);
}
