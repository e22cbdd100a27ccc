//! What a heartbeat knows of itself, as the program's stats file has it.

use std::time::{Duration, SystemTime};

use decnet_heartbeat::{LifecycleDelta, Operation, Snapshot};
use serde_json::json;

use crate::support::{Stage, errors_with, json_of, now, remember_errors, settled};

/// The outbox' rows at the most.
const MOST: usize = 10_000;

#[test]
fn as_json_they_count_what_waits_what_is_held_what_is_in_flight_and_what_fell_out() {
    let mut stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.stop();
    let deployed = |n: usize| LifecycleDelta::succeeded(format!("d{n}"), Operation::Deploy);
    heartbeat.deltas().push_all((0..MOST).map(deployed)).unwrap();
    heartbeat.deltas().push(deployed(MOST)).unwrap();
    // For its three rows the three oldest go, too; two of its deckies have an older delta.
    let _operation = heartbeat.begin(Operation::Deploy, ["d9000", "d9001", "new"]).unwrap();
    // What is held back of so many is counted with the next attempt.
    let stats = settled(&heartbeat, |stats| stats.failure.is_some() && stats.held == 2);
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
    // How often the source was asked depends on when the beats failed.
    assert!(json["snapshots"].take().as_u64().is_some_and(|count| count >= 1));
    json["snapshot_pending_since"].take();
    json["outbox_busy_since"].take();
    let time = |time: serde_json::Value| humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
    let now = SystemTime::now();
    // No tick is known of, so it is one of the first retries; that may have come meanwhile.
    assert!(time(json["next_beat"].take()) < now + Duration::from_secs(4));
    let valid = time(json["certificate_expires"].take()).duration_since(now).unwrap();
    assert_eq!(valid.as_secs() / 86_400, 824);
    assert!(json["last_snapshot"].take().is_string());
    let expected = json!({
        "dormant": false,
        "decommissioned": false,
        "host_uuid": stage.worker.uuid,
        "url": stage.master.url(),
        "fingerprint": stage.worker.fingerprint,
        "certificate_expires": null,
        "beats": 1,
        "next_beat": null,
        "last_success": null,
        "failure": null,
        "round_trip": null,
        "resumed": false,
        "delivered": 0,
        "rejected": 0,
        "waiting": MOST - 3,
        "held": 2,
        "oldest_waiting": null,
        "operations": 3,
        "dropped": 4,
        "outbox": stage.agent_dir().join("heartbeat.db"),
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
fn what_the_last_beat_could_not_say_is_named_until_it_can() {
    let stage = Stage::new();
    let (builder, tick) = stage.builder();
    let mut faults = vec!["two\nlines"].into_iter();
    let source = move || faults.next().map_or_else(|| Snapshot::new(&json!({})), Snapshot::unknown);
    let heartbeat = builder.status_source(source).start().unwrap();
    let stats = settled(&heartbeat, |stats| stats.beats == 1);
    assert_eq!(stats.status_fault.as_deref(), Some("two\\u{a}lines"));
    assert_eq!(
        json_of(&stage.requests(1)[0])["status"],
        json!({"error": "two\nlines"}),
        "in the source's own words"
    );
    tick.send(now()).unwrap();
    assert_eq!(settled(&heartbeat, |stats| stats.beats == 2).status_fault, None);
}

#[test]
fn what_falls_out_is_logged_once_with_the_next_beat() {
    remember_errors();
    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.stop();
    let mutated = |n: usize| LifecycleDelta::succeeded(format!("d{n}"), Operation::Mutate);
    heartbeat.deltas().push_all((0..MOST).map(mutated)).unwrap();
    heartbeat.deltas().push_all((0..777).map(mutated)).unwrap();
    assert_eq!(heartbeat.stats().dropped, 777);
    stage.master.start_again().unwrap();
    for beats in 2..5 {
        tick.send(now()).unwrap();
        settled(&heartbeat, |stats| stats.beats >= beats);
    }
    let file = stage.agent_dir().join("heartbeat.db");
    let said = "deltas dropped undelivered, too many or too old:";
    let said = format!("{said} outbox={} deltas=777 max_rows=10000", file.display());
    assert_eq!(errors_with("deltas=777"), [said]);
}

#[test]
fn once_all_is_delivered_no_delta_is_the_oldest() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| {
        stats.delivered == 1 && stats.waiting == 0 && stats.oldest_waiting.is_none()
    });
}
