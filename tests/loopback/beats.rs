//! When a beat goes out, and what it carries.

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

use crate::support::{PATIENCE, Stage, hanging, json_of, nothing_deployed, now, settled};

#[test]
fn the_first_beat_goes_out_at_once_and_says_who_we_are() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.agent_version("9.9").start().unwrap();
    let request = &stage.requests(1)[0];
    assert_eq!(
        json_of(request),
        &json!({"host_uuid": stage.worker.uuid, "agent_version": "9.9", "status": {"deployed": false, "deckies": []}})
    );
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/swarm/heartbeat"));
    assert_eq!(request.header("content-type"), Some("application/json"));
}

#[test]
fn each_tick_is_a_beat() {
    let stage = Stage::new();
    let (_heartbeat, tick) = stage.beating();
    for beats in 2..5 {
        tick.send(now()).unwrap();
        assert!(stage.master.wait_for_beats(beats, PATIENCE));
    }
}

#[test]
fn the_interval_is_kept_without_a_test_ticking() {
    let stage = Stage::new();
    let _heartbeat = Heartbeat::builder()
        .enrolment(stage.worker.enrolment().unwrap())
        .status_source(nothing_deployed)
        .interval(Duration::from_millis(100))
        .start()
        .unwrap();
    assert!(stage.master.wait_for_beats(12, PATIENCE));
    let at: Vec<_> = stage.master.received().iter().map(|request| request.at).collect();
    // From the second on they are an interval apart; ten of them are ten intervals, give or take one beat's delay.
    let ten = at[11] - at[1];
    assert!((Duration::from_millis(900)..Duration::from_millis(1_300)).contains(&ten), "{ten:?}");
}

#[test]
fn a_source_that_hangs_stops_no_beat_and_the_beat_says_so() {
    let stage = Stage::new();
    let (release, source) = hanging();
    let (builder, tick) = stage.builder();
    let since = Instant::now();
    let heartbeat = builder.status_source(source).interval(Duration::from_secs(1)).start().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE));
    for request in stage.master.received() {
        let error = json_of(&request)["status"]["error"].as_str().unwrap().to_owned();
        assert!(
            error.starts_with("no fresh snapshot: the status source has not answered for "),
            "{error}"
        );
    }
    assert!(heartbeat.stats().snapshot_pending_since.is_some());
    // What comes late goes out in a beat of its own.
    drop(release);
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    assert_eq!(
        json_of(&stage.master.received()[2])["status"],
        json!({"deployed": false, "deckies": []})
    );
    settled(&heartbeat, |stats| stats.snapshot_pending_since.is_none());
}

#[test]
fn a_delta_does_not_wait_for_a_source_that_hangs() {
    let stage = Stage::new();
    let (_release, source) = hanging();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    let pushed = Instant::now();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE));
    assert!(pushed.elapsed() < Duration::from_millis(1_000), "{:?}", pushed.elapsed());
}

#[test]
fn a_source_that_panics_stops_no_beat_and_is_asked_again() {
    let stage = Stage::new();
    let asked = AtomicU32::new(0);
    let source = move || match asked.fetch_add(1, Ordering::Relaxed) {
        0 => panic!("no such \u{1b}[31mdecky"),
        _ => nothing_deployed(),
    };
    let (builder, tick) = stage.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    // Where printing the panic takes longer than the first beat waits, it is said in the second.
    let said = |status: serde_json::Value| {
        let is_it = |request: &Received| json_of(request)["status"] == status;
        assert!(
            stage.master.wait_until(PATIENCE, |seen| seen.received().iter().any(is_it)),
            "{:?}",
            heartbeat.stats()
        );
    };
    said(json!({"error": "the status source panicked: no such \\u{1b}[31mdecky"}));
    tick.send(now()).unwrap();
    said(json!({"deployed": false, "deckies": []}));
    let stats = heartbeat.stats();
    assert_eq!((stats.panics, stats.snapshots), (1, 1));
}

/// A source that knows its topology at once and its status never.
struct Slow(crossbeam_channel::Receiver<()>);

fn topology(observed: Observed) -> Topology {
    let applied = AppliedTopology {
        topology_id: "t".to_owned(),
        applied_version_hash: "h".to_owned(),
        applied_at: 7,
        last_error: None,
    };
    Topology { applied: Some(applied), observed }
}

impl StatusSource for Slow {
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
fn a_topology_that_is_known_is_never_left_out() {
    let stage = Stage::new();
    let (release, released) = bounded(0);
    let (builder, tick) = stage.builder();
    let _heartbeat =
        builder.status_source(Slow(released)).interval(Duration::from_secs(1)).start().unwrap();
    let topology_of = |index: usize| json_of(&stage.requests(index + 1)[index])["topology"].clone();
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
        "stale is not fresh: {later}"
    );
}

/// A source that takes a while for each of its two answers, and knows a topology.
struct Late {
    topology_after: Duration,
    snapshot_after: Duration,
    asked: Arc<AtomicU32>,
}

impl StatusSource for Late {
    fn snapshot(&mut self) -> Snapshot {
        std::thread::sleep(self.snapshot_after);
        match self.asked.fetch_add(1, Ordering::Relaxed) {
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

fn late(topology_after: u64, snapshot_after: u64) -> Late {
    let [topology_after, snapshot_after] =
        [topology_after, snapshot_after].map(Duration::from_millis);
    Late { topology_after, snapshot_after, asked: Arc::default() }
}

#[test]
fn the_first_beat_waits_a_second_for_its_topology_also_when_a_delta_comes() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let since = Instant::now();
    let heartbeat = builder.status_source(late(700, 60_000)).start().unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let request = stage.requests(1)[0].clone();
    assert_eq!(json_of(&request)["topology"]["applied_version_hash"], "h");
    assert!(
        (Duration::from_millis(700)..Duration::from_secs(3)).contains(&since.elapsed()),
        "{:?}",
        since.elapsed()
    );
}

#[test]
fn a_topology_that_takes_longer_than_a_second_does_not_hold_up_the_first_beat() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let since = Instant::now();
    let _heartbeat = builder.status_source(late(60_000, 0)).start().unwrap();
    let request = stage.requests(1)[0].clone();
    assert_eq!(json_of(&request)["topology"], serde_json::Value::Null);
    assert!(
        (Duration::from_secs(1)..Duration::from_secs(3)).contains(&since.elapsed()),
        "{:?}",
        since.elapsed()
    );
}

#[test]
fn a_stop_right_after_the_start_does_not_leave_the_topology_out() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.status_source(late(300, 60_000)).start().unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    assert_eq!(heartbeat.stop(PATIENCE).undelivered, 0);
    let received = stage.requests(1);
    assert_eq!(json_of(&received[0])["topology"]["applied_version_hash"], "h");
    assert_eq!(json_of(&received[0])["lifecycle"][0]["decky_name"], "d");
}

#[test]
fn what_an_earlier_snapshot_has_observed_is_not_sent_as_if_it_were_of_this_one() {
    let stage = Stage::new();
    let (builder, tick) = stage.builder();
    let heartbeat = builder.status_source(late(0, 0)).start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    for beats in 2..5 {
        tick.send(now()).unwrap();
        settled(&heartbeat, |stats| stats.beats == beats);
    }
    let topologies: Vec<_> =
        stage.requests(4).iter().map(|request| json_of(request)["topology"].clone()).collect();
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
fn states_that_grew_old_while_a_beat_was_sent_are_not_sent_again() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    // The connection that was there ends, after so long a silence that the states are stale by then.
    stage.master.script([Fault::CutAfterSilence(Duration::from_millis(5_200))]);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.beats >= 2);
    let statuses: Vec<_> =
        stage.requests(3).iter().map(|request| json_of(request)["status"].clone()).collect();
    assert_eq!(statuses[1], json!({"deployed": false, "deckies": []}));
    assert_eq!(
        statuses[2],
        json!({"error": "no fresh snapshot: it became stale before it was sent"})
    );
}

#[test]
fn a_connection_that_the_master_closed_is_resumed_and_shows_the_certificate() {
    let stage = Stage::with(Options { idle: Duration::from_millis(50), ..Options::default() });
    let (heartbeat, tick) = stage.beating();
    let closed =
        |seen: &decnet_heartbeat::loopback::Seen| seen.connections().iter().all(|it| !it.open);
    assert!(stage.master.wait_until(PATIENCE, closed));
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE));
    let handshakes: Vec<_> =
        stage.master.connections().into_iter().map(|it| it.handshake.unwrap()).collect();
    assert_eq!(handshakes.iter().map(|it| it.resumed).collect::<Vec<_>>(), [false, true]);
    assert!(handshakes.iter().all(|it| it.fingerprint == stage.worker.fingerprint));
    assert!(settled(&heartbeat, |stats| stats.beats == 2).resumed);
    assert_eq!(heartbeat.stats().failure.map(|failure| failure.class), None);
}

#[test]
fn a_warm_connection_is_used_again() {
    let stage = Stage::new();
    let (_heartbeat, tick) = stage.beating();
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE));
    assert_eq!(stage.master.connections().len(), 1);
}

#[test]
fn states_that_a_master_cannot_take_in_time_are_sent_apart_though_the_second_attempt_is_accepted() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.script([Fault::CutAfterSilence(Duration::from_millis(5_200))]);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.beats == 2);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.beats == 3);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    let received = stage.requests(5);
    // There is no time for the states in the second beat, so the third is theirs. Then there is one body for all again.
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
