//! What a heartbeat knows of itself, as the program's stats file has it.

use decnet_heartbeat::{LifecycleDelta, Operation};
use serde_json::json;

use crate::support::{Stage, errors_with, now, remember_errors, settled};

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
    let stats = settled(&heartbeat, |stats| stats.failure.is_some());
    let mut json = serde_json::to_value(&stats).unwrap();
    let failure = json["failure"].take();
    assert_eq!(failure["class"], "refused");
    for time in [json["last_success"].take(), failure["since"].clone()] {
        let at = humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
        assert!(at.elapsed().is_ok_and(|age| age.as_secs() < 60), "{time}");
    }
    assert!(json["round_trip"].take().as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)));
    // How often the source was asked depends on when the beats failed.
    assert!(json["snapshots"].take().as_u64().is_some_and(|count| count >= 1));
    json["snapshot_owed_since"].take();
    assert!(json["last_snapshot"].take().is_string());
    let expected = json!({
        "dormant": false,
        "host_uuid": stage.worker.uuid,
        "url": stage.master.url(),
        "fingerprint": stage.worker.fingerprint,
        "beats": 1,
        "last_success": null,
        "failure": null,
        "round_trip": null,
        "resumed": false,
        "delivered": 0,
        "rejected": 0,
        "waiting": MOST - 3,
        "held": 2,
        "operations": 3,
        "dropped": 4,
        "outbox": stage.agent_dir().join("heartbeat.db"),
        "snapshots": null,
        "last_snapshot": null,
        "snapshot_owed_since": null,
        "panics": 0,
    });
    assert_eq!(json, expected);
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
    let said = "deltas fell out of the outbox undelivered, too many or too old: deltas=777 most=10000";
    assert_eq!(errors_with("deltas=777"), [said]);
}
