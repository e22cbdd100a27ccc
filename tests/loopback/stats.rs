//! The stats of a heartbeat, as in the program's stats file.

use std::time::{Duration, SystemTime};

use decnet_heartbeat::{LifecycleDelta, Operation, Snapshot};
use serde_json::json;

use crate::support::{Fixture, errors_containing, json_of, now, record_errors, wait_for_stats};

/// The outbox's capacity in rows.
const CAPACITY: usize = 10_000;

#[test]
fn stats_as_json_count_waiting_held_in_flight_and_dropped() {
    let mut fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.stop();
    let deployed = |n: usize| LifecycleDelta::succeeded(format!("d{n}"), Operation::Deploy);
    heartbeat.deltas().push_all((0..CAPACITY).map(deployed)).unwrap();
    heartbeat.deltas().push(deployed(CAPACITY)).unwrap();
    // The three rows of the operation replace the three oldest. Two of its deckies have an older
    // delta, which is held.
    let _operation = heartbeat.begin(Operation::Deploy, ["d9000", "d9001", "new"]).unwrap();
    // Held deltas are counted at the next attempt.
    let stats = wait_for_stats(&heartbeat, |stats| stats.failure.is_some() && stats.held == 2);
    let mut json = serde_json::to_value(&stats).unwrap();
    let failure = json["failure"].take();
    assert_eq!(failure["class"], "refused");
    for time in
        [json["last_success"].take(), failure["since"].clone(), json["oldest_waiting"].take()]
    {
        let at = humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
        assert!(at.elapsed().is_ok_and(|age| age.as_secs() < 60), "{time}");
    }
    assert!(
        json["round_trip"].take().as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds))
    );
    // The number of snapshots depends on when the beats failed.
    assert!(json["snapshots"].take().as_u64().is_some_and(|count| count >= 1));
    json["snapshot_pending_since"].take();
    json["outbox_busy_since"].take();
    let time = |time: serde_json::Value| humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
    let now = SystemTime::now();
    // The next beat is one of the first retries, which may have been sent by now.
    assert!(time(json["next_beat"].take()) < now + Duration::from_secs(4));
    let valid = time(json["certificate_expires"].take()).duration_since(now).unwrap();
    assert_eq!(valid.as_secs() / 86_400, 824);
    assert!(json["last_snapshot"].take().is_string());
    let expected = json!({
        "dormant": false,
        "decommissioned": false,
        "host_uuid": fixture.worker.uuid,
        "url": fixture.master.url(),
        "fingerprint": fixture.worker.fingerprint,
        "certificate_expires": null,
        "beats": 1,
        "next_beat": null,
        "last_success": null,
        "failure": null,
        "round_trip": null,
        "resumed": false,
        "delivered": 0,
        "rejected": 0,
        "waiting": CAPACITY - 3,
        "held": 2,
        "oldest_waiting": null,
        "operations": 3,
        "dropped": 4,
        "outbox": fixture.outbox(),
        "snapshots": null,
        "last_snapshot": null,
        "snapshot_pending_since": null,
        "outbox_busy_since": null,
        "status_fault": null,
        "suspended": 0,
        "panics": 0,
        "ended_thread": null,
    });
    assert_eq!(json, expected);
}

#[test]
fn status_fault_is_set_until_the_status_is_complete() {
    let fixture = Fixture::new();
    let (builder, tick) = fixture.builder();
    let mut faults = vec!["two\nlines"].into_iter();
    let source = move || faults.next().map_or_else(|| Snapshot::new(&json!({})), Snapshot::unknown);
    let heartbeat = builder.status_source(source).start().unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    assert_eq!(stats.status_fault.as_deref(), Some("two\\u{a}lines"));
    assert_eq!(
        json_of(&fixture.wait_for_requests(1)[0])["status"],
        json!({"error": "two\nlines"}),
        "the master receives the source's text unchanged"
    );
    tick.send(now()).unwrap();
    assert_eq!(wait_for_stats(&heartbeat, |stats| stats.beats == 2).status_fault, None);
}

#[test]
fn dropped_deltas_are_logged_once_with_the_next_beat() {
    record_errors();
    let mut fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.stop();
    let mutated = |n: usize| LifecycleDelta::succeeded(format!("d{n}"), Operation::Mutate);
    heartbeat.deltas().push_all((0..CAPACITY).map(mutated)).unwrap();
    heartbeat.deltas().push_all((0..777).map(mutated)).unwrap();
    assert_eq!(heartbeat.stats().dropped, 777);
    fixture.master.start_again().unwrap();
    for beats in 2..5 {
        tick.send(now()).unwrap();
        wait_for_stats(&heartbeat, |stats| stats.beats >= beats);
    }
    let expected = format!(
        "deltas dropped undelivered, too many or too old: outbox={} deltas=777 max_rows=10000",
        fixture.outbox().display()
    );
    assert_eq!(errors_containing("deltas=777"), [expected]);
}

#[test]
fn oldest_waiting_is_none_after_delivery() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    wait_for_stats(&heartbeat, |stats| {
        stats.delivered == 1 && stats.waiting == 0 && stats.oldest_waiting.is_none()
    });
}
