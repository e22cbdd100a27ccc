//! The agent's own status source: it may panic, hang or flood, and the beats go on without it.

use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::Fault as Wire;
use serde_json::{Value, json};

use crate::log;
use crate::stage::{PATIENCE, SLACK, Stage, Subject, World};
use crate::subject::Source;

fn stage(source: Source, interval: u64) -> (Stage, Subject) {
    let stage =
        Stage::new(World { source, interval: Duration::from_secs(interval), ..World::default() });
    let subject = stage.start();
    (stage, subject)
}

/// A tick, and its beat in time.
fn beat(subject: &mut Subject, within: Duration) -> Value {
    let beats = subject.stats()["beats"].as_u64();
    let since = Instant::now();
    subject.tick();
    let stats = subject.until("the tick's beat", |stats| stats["beats"].as_u64() > beats);
    assert!(since.elapsed() < within + SLACK, "{:?}", since.elapsed());
    stats
}

/// What the beats have said of the status, in their order.
fn statuses(stage: &Stage) -> Vec<Value> {
    stage
        .master
        .received()
        .iter()
        .map(|request| request.json.as_ref().unwrap()["status"].clone())
        .collect()
}

pub fn panics() {
    let (stage, mut subject) = stage(Source::Panics, 30);
    for _ in 0..20 {
        beat(&mut subject, Duration::ZERO);
    }
    let stats = subject.until("all answers", |stats| stats["snapshot_pending_since"].is_null());
    assert_eq!((&stats["snapshots"], &stats["last_snapshot"]), (&json!(0), &Value::Null));
    assert!(stats["panics"].as_u64() >= Some(20), "{stats}");
    let last = statuses(&stage).pop().unwrap();
    assert!(
        last["error"]
            .as_str()
            .unwrap()
            .starts_with("the status source panicked: no such \\u{1b}[31mdecky\\u{a}xxx")
    );
    let lines = subject.log_lines("status source panicked");
    assert!((1..=5).contains(&lines.len()), "ever more rarely: {lines:#?}");
    log::check(&stage, &subject.log());
}

pub fn panics_every_second_time() {
    let (stage, mut subject) = stage(Source::PanicsEverySecondTime, 30);
    for _ in 0..20 {
        beat(&mut subject, Duration::ZERO);
    }
    let stats = subject.until("all answers", |stats| stats["snapshot_pending_since"].is_null());
    assert!(
        stats["snapshots"].as_u64() >= Some(10) && stats["panics"].as_u64() >= Some(10),
        "{stats}"
    );
    assert!(stats["last_snapshot"].is_string(), "{stats}");
    let (good, bad): (Vec<_>, Vec<_>) =
        statuses(&stage).into_iter().partition(|status| status["error"].is_null());
    assert!(good.len() >= 10 && bad.len() >= 10, "{good:?} {bad:?}");
    assert!(subject.log_lines("status source panicked").len() <= 5);
}

pub fn panics_with_a_stubborn_payload() {
    let (stage, mut subject) = stage(Source::PanicsWithAStubbornPayload, 30);
    for _ in 0..5 {
        beat(&mut subject, Duration::ZERO);
    }
    let stats = subject.until("all answers", |stats| stats["snapshot_pending_since"].is_null());
    assert_eq!((&stats["ended_thread"], &stats["failure"]), (&Value::Null, &Value::Null));
    assert!(stats["panics"].as_u64() >= Some(5), "{stats}");
    let last = statuses(&stage).pop().unwrap();
    assert_eq!(last["error"], "the status source panicked: a panic without a message");
    assert_eq!(subject.stop(Duration::from_secs(1))["in_time"], true);
}

pub fn never_returns() {
    let (stage, mut subject) = stage(Source::NeverReturns, 2);
    let threads = subject.footprint().threads;
    let since = subject.stats()["snapshot_pending_since"].clone();
    assert!(since.is_string(), "{since}");
    for _ in 0..5 {
        let stats = beat(&mut subject, Duration::from_secs(1));
        assert_eq!(
            stats["snapshot_pending_since"], since,
            "it owes since then, and is not asked again"
        );
    }
    for status in statuses(&stage) {
        let error = status["error"].as_str().unwrap();
        assert!(
            error.starts_with("no fresh snapshot: the status source has not answered for "),
            "{error}"
        );
    }
    assert_eq!(subject.footprint().threads, threads);
    assert_eq!(subject.stop(Duration::from_secs(1))["in_time"], true);
}

pub fn returns_after_a_minute() {
    let (stage, mut subject) = stage(Source::Takes(60), 30);
    let started = Instant::now();
    subject.push("d");
    subject.until("the delivery", |stats| stats["delivered"] == 1);
    assert!(started.elapsed() < SLACK);
    beat(&mut subject, Duration::from_secs(10));
    let fresh = |stage: &Stage| statuses(stage).last().is_some_and(|status| status["asked"] == 1);
    while !fresh(&stage) {
        assert!(
            started.elapsed() < Duration::from_secs(65),
            "what came late goes out in a beat of its own"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(started.elapsed() > Duration::from_secs(55));
    // It was asked again, since the delta's news may be newer.
    let stats =
        subject.until("the next question", |stats| stats["snapshot_pending_since"].is_string());
    assert_eq!((&stats["snapshots"], stats["last_snapshot"].is_string()), (&json!(1), true));
}

pub fn returns_50_mb() {
    const SIZE: usize = 50 << 20;
    let (stage, mut subject) = stage(Source::Of(SIZE), 30);
    let said = |stage: &Stage| {
        statuses(stage).pop().unwrap()["error"].as_str().unwrap_or_default().to_owned()
    };
    let since = Instant::now();
    while !said(&stage).contains("larger than") {
        assert!(since.elapsed() < PATIENCE, "{}", subject.log_tail());
        beat(&mut subject, Duration::from_secs(10));
    }
    let before = subject.footprint().peak;
    assert!(
        before < 6 * SIZE as u64 / 1024,
        "the source's own string, its JSON, and growing of both: {before} KiB"
    );
    for _ in 0..5 {
        beat(&mut subject, Duration::from_secs(10));
    }
    let after = subject.footprint().peak;
    assert!(after < before + SIZE as u64 / 1024, "{before} KiB, then {after} KiB");
}

/// It answers while a POST takes ten seconds: that is too old by then, and it is asked again.
pub fn answers_while_a_post_takes_its_time() {
    let (stage, mut subject) = stage(Source::Takes(1), 30);
    subject.until("the first snapshot's beat", |stats| stats["beats"] == 2);
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n".to_vec();
    stage.master.script([Wire::Endless(head, b".".to_vec(), Duration::from_secs(1))]);
    subject.push("d");
    subject.until("the beat after that", |stats| stats["beats"] == 4);
    let asked: Vec<_> = statuses(&stage).iter().map(|status| status["asked"].clone()).collect();
    assert_eq!(asked, [Value::Null, json!(1), Value::Null, json!(3)]);
}
