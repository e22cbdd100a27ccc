//! When a beat is sent, and what it contains.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use decnet_heartbeat::loopback::{Fault, Options, Received};
use decnet_heartbeat::{
    AppliedTopology, Heartbeat, LifecycleDelta, Observed, Operation, Snapshot, StatusSource,
    Topology,
};
use serde_json::json;

use crate::support::{
    ChildProcess, Fixture, TIMEOUT, blocking_source, json_of, nothing_deployed, now, wait_for_stats,
};

#[test]
fn first_beat_is_sent_at_once_and_identifies_the_host() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let _heartbeat = builder.agent_version("9.9").start().unwrap();
    let request = &fixture.wait_for_requests(1)[0];
    assert_eq!(
        json_of(request),
        &json!({"host_uuid": fixture.worker.uuid, "agent_version": "9.9", "status": {"deployed": false, "deckies": []}})
    );
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/swarm/heartbeat"));
    assert_eq!(request.header("content-type"), Some("application/json"));
}

#[test]
fn version_of_an_option_is_the_agents() {
    let fixture = Fixture::new();
    let _run = ChildProcess::start(fixture.run_command().args(["--agent-version", "9.9"]));
    assert_eq!(json_of(&fixture.wait_for_requests(1)[0])["agent_version"], "9.9");
}

#[test]
fn each_tick_is_a_beat() {
    let fixture = Fixture::new();
    let (_heartbeat, tick) = fixture.start_heartbeat();
    for beats in 2..5 {
        tick.send(now()).unwrap();
        assert!(fixture.master.wait_for_beats(beats, TIMEOUT));
    }
}

#[test]
fn beats_follow_the_interval_without_a_tick_channel() {
    let fixture = Fixture::new();
    let _heartbeat = Heartbeat::builder()
        .enrolment(fixture.worker.enrolment().unwrap())
        .status_source(nothing_deployed)
        .interval(Duration::from_millis(100))
        .start()
        .unwrap();
    assert!(fixture.master.wait_for_beats(12, TIMEOUT));
    let at: Vec<_> = fixture.master.received().iter().map(|request| request.at).collect();
    // From the second beat on, ten beats take ten intervals. A single beat may be late.
    let took = at[11] - at[1];
    assert!((Duration::from_millis(900)..Duration::from_millis(1_300)).contains(&took), "{took:?}");
}

#[test]
fn blocked_source_stops_no_beat_and_is_reported() {
    let fixture = Fixture::new();
    let (release, source) = blocking_source();
    let (builder, tick) = fixture.builder();
    let since = Instant::now();
    let heartbeat = builder.status_source(source).interval(Duration::from_secs(1)).start().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    for request in fixture.master.received() {
        let error = json_of(&request)["status"]["error"].as_str().unwrap().to_owned();
        assert!(
            error.starts_with("no fresh snapshot: the status source has not answered for "),
            "{error}"
        );
    }
    assert!(heartbeat.stats().snapshot_pending_since.is_some());
    // A late snapshot is sent in a beat of its own.
    drop(release);
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    assert_eq!(
        json_of(&fixture.master.received()[2])["status"],
        json!({"deployed": false, "deckies": []})
    );
    wait_for_stats(&heartbeat, |stats| stats.snapshot_pending_since.is_none());
}

#[test]
fn delta_does_not_wait_for_a_blocked_source() {
    let fixture = Fixture::new();
    let (_release, source) = blocking_source();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    let pushed = Instant::now();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    assert!(pushed.elapsed() < Duration::from_millis(1_000), "{:?}", pushed.elapsed());
}

#[test]
fn panicking_source_stops_no_beat_and_is_called_again() {
    let fixture = Fixture::new();
    let calls = AtomicU32::new(0);
    let source = move || match calls.fetch_add(1, Ordering::Relaxed) {
        0 => panic!("no such \u{1b}[31mdecky"),
        _ => nothing_deployed(),
    };
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    // If the panic handler takes longer than the first beat waits, the second beat reports it.
    let wait_for_status = |status: serde_json::Value| {
        let has_status = |request: &Received| json_of(request)["status"] == status;
        assert!(
            fixture.master.wait_until(TIMEOUT, |seen| seen.received().iter().any(has_status)),
            "{:?}",
            heartbeat.stats()
        );
    };
    wait_for_status(json!({"error": "the status source panicked: no such \\u{1b}[31mdecky"}));
    tick.send(now()).unwrap();
    wait_for_status(json!({"deployed": false, "deckies": []}));
    let stats = heartbeat.stats();
    assert_eq!((stats.panics, stats.snapshots), (1, 1));
}

/// A source that returns its topology at once. Its snapshot waits for a message or the end of the
/// channel.
struct BlockedSnapshot(crossbeam_channel::Receiver<()>);

fn topology(observed: Observed) -> Topology {
    let applied = AppliedTopology {
        topology_id: "t".to_owned(),
        applied_version_hash: "h".to_owned(),
        applied_at: 7,
        last_error: None,
    };
    Topology { applied: Some(applied), observed }
}

impl StatusSource for BlockedSnapshot {
    fn snapshot(&mut self) -> Snapshot {
        let _ = self.0.recv();
        let observed = Observed::Seen { bridges: vec!["b".to_owned()], containers: vec![] };
        nothing_deployed().with_topology(topology(observed))
    }

    fn applied_topology(&mut self) -> Option<Topology> {
        Some(topology(Observed::Unknown("not asked yet".to_owned())))
    }
}

#[test]
fn known_topology_is_never_left_out() {
    let fixture = Fixture::new();
    let (release, released) = bounded(0);
    let (builder, tick) = fixture.builder();
    let _heartbeat = builder
        .status_source(BlockedSnapshot(released))
        .interval(Duration::from_secs(1))
        .start()
        .unwrap();
    let topology_of =
        |index: usize| json_of(&fixture.wait_for_requests(index + 1)[index])["topology"].clone();
    let first = topology_of(0);
    assert_eq!((&first["topology_id"], &first["applied_version_hash"]), (&json!("t"), &json!("h")));
    assert!(
        first["observed"]["error"].as_str().unwrap().starts_with("no fresh snapshot"),
        "{first}"
    );
    release.send(()).unwrap();
    let known = json!({"topology_id": "t", "applied_version_hash": "h", "applied_at": 7, "last_error": null,
        "observed": {"bridges": ["b"], "containers": []}});
    assert_eq!(topology_of(1), known);
    tick.send(now()).unwrap();
    tick.send(now()).unwrap();
    let later = topology_of(2);
    assert_eq!(later["applied_version_hash"], "h");
    assert!(
        later["observed"]["error"].as_str().unwrap().starts_with("no fresh snapshot"),
        "an earlier observation is not current: {later}"
    );
}

/// A source with a delay before each result. Its first snapshot has a topology, the next ones are
/// a panic, an error, and a snapshot without a topology.
struct SlowSource {
    topology_after: Duration,
    snapshot_after: Duration,
    calls: Arc<AtomicU32>,
}

impl StatusSource for SlowSource {
    fn snapshot(&mut self) -> Snapshot {
        // The delay is what the tests are about.
        std::thread::sleep(self.snapshot_after);
        match self.calls.fetch_add(1, Ordering::Relaxed) {
            0 => nothing_deployed().with_topology(topology(seen("first"))),
            1 => panic!("no snapshot"),
            2 => Snapshot::unknown("no snapshot"),
            _ => nothing_deployed(),
        }
    }

    fn applied_topology(&mut self) -> Option<Topology> {
        std::thread::sleep(self.topology_after);
        Some(topology(Observed::Unknown("not asked yet".to_owned())))
    }
}

fn seen(bridge: &str) -> Observed {
    Observed::Seen { bridges: vec![bridge.to_owned()], containers: vec![] }
}

/// The delays are in milliseconds.
fn slow_source(topology_after: u64, snapshot_after: u64) -> SlowSource {
    let [topology_after, snapshot_after] =
        [topology_after, snapshot_after].map(Duration::from_millis);
    SlowSource { topology_after, snapshot_after, calls: Arc::default() }
}

#[test]
fn first_beat_waits_for_the_topology_despite_a_delta() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let since = Instant::now();
    let heartbeat = builder.status_source(slow_source(700, 60_000)).start().unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let request = fixture.wait_for_requests(1)[0].clone();
    assert_eq!(json_of(&request)["topology"]["applied_version_hash"], "h");
    assert!(
        (Duration::from_millis(700)..Duration::from_secs(3)).contains(&since.elapsed()),
        "{:?}",
        since.elapsed()
    );
}

#[test]
fn first_beat_waits_at_most_a_second_for_the_topology() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let since = Instant::now();
    let _heartbeat = builder.status_source(slow_source(60_000, 0)).start().unwrap();
    let request = fixture.wait_for_requests(1)[0].clone();
    assert_eq!(json_of(&request)["topology"], serde_json::Value::Null);
    assert!(
        (Duration::from_secs(1)..Duration::from_secs(3)).contains(&since.elapsed()),
        "{:?}",
        since.elapsed()
    );
}

#[test]
fn stop_right_after_start_sends_the_topology() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.status_source(slow_source(300, 60_000)).start().unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    assert_eq!(heartbeat.stop(TIMEOUT).undelivered, 0);
    let received = fixture.wait_for_requests(1);
    assert_eq!(json_of(&received[0])["topology"]["applied_version_hash"], "h");
    assert_eq!(json_of(&received[0])["lifecycle"][0]["decky_name"], "d");
}

#[test]
fn earlier_observation_is_not_sent_as_current() {
    let fixture = Fixture::new();
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.status_source(slow_source(0, 0)).start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    for beats in 2..5 {
        tick.send(now()).unwrap();
        wait_for_stats(&heartbeat, |stats| stats.beats == beats);
    }
    let topologies: Vec<_> = fixture
        .wait_for_requests(4)
        .iter()
        .map(|request| json_of(request)["topology"].clone())
        .collect();
    assert_eq!(topologies[0]["observed"]["bridges"], json!(["first"]));
    let expected =
        ["the status source panicked: no snapshot", "no snapshot", "this snapshot has no topology"];
    for (topology, error) in topologies[1..].iter().zip(expected) {
        assert_eq!(
            (&topology["applied_version_hash"], &topology["observed"]),
            (&json!("h"), &json!({"error": error}))
        );
    }
}

#[test]
fn states_that_became_stale_are_not_sent_again() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    // The open connection is closed after a silence in which the states become stale.
    fixture.master.script([Fault::CutAfterSilence(Duration::from_millis(5_200))]);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats >= 2);
    let statuses: Vec<_> = fixture
        .wait_for_requests(3)
        .iter()
        .map(|request| json_of(request)["status"].clone())
        .collect();
    assert_eq!(statuses[1], json!({"deployed": false, "deckies": []}));
    assert_eq!(
        statuses[2],
        json!({"error": "no fresh snapshot: it became stale before it was sent"})
    );
}

#[test]
fn closed_connection_is_resumed_with_the_certificate() {
    let fixture = Fixture::with(Options { idle: Duration::from_millis(50), ..Options::default() });
    let (heartbeat, tick) = fixture.start_heartbeat();
    let are_closed =
        |seen: &decnet_heartbeat::loopback::Seen| seen.connections().iter().all(|it| !it.open);
    assert!(fixture.master.wait_until(TIMEOUT, are_closed));
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    let handshakes: Vec<_> =
        fixture.master.connections().into_iter().map(|it| it.handshake.unwrap()).collect();
    assert_eq!(handshakes.iter().map(|it| it.resumed).collect::<Vec<_>>(), [false, true]);
    assert!(handshakes.iter().all(|it| it.fingerprint == fixture.worker.fingerprint));
    assert!(wait_for_stats(&heartbeat, |stats| stats.beats == 2).resumed);
    assert_eq!(heartbeat.stats().failure.map(|failure| failure.class), None);
}

#[test]
fn open_connection_is_reused() {
    let fixture = Fixture::new();
    let (_heartbeat, tick) = fixture.start_heartbeat();
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    assert_eq!(fixture.master.connections().len(), 1);
}

#[test]
fn states_after_a_timeout_are_sent_in_a_beat_of_their_own() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::CutAfterSilence(Duration::from_millis(5_200))]);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 2);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 3);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    let received = fixture.wait_for_requests(5);
    // The second beat has no time left for the states, so the third contains only them. From then
    // on, one body contains everything again.
    let statuses: Vec<_> =
        received.iter().map(|request| json_of(request)["status"].clone()).collect();
    let known = json!({"deployed": false, "deckies": []});
    assert_eq!(
        statuses[2],
        json!({"error": "no fresh snapshot: it became stale before it was sent"})
    );
    assert_eq!(statuses[3..], [known.clone(), known]);
    assert_eq!(json_of(&received[4])["lifecycle"][0]["decky_name"], "d");
}
