//! What a stop delivers, what stays queued, and how long it takes. Tests in `tests/faults` stop a
//! heartbeat during a POST.

use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use decnet_heartbeat::loopback::{Answer, Effect, Fault};
use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation, Stats, Stopped};
use serde_json::json;

use crate::support::{Fixture, TIMEOUT, blocking_source, deckies, json_of, now, wait_for_stats};

const GRACE: Duration = Duration::from_millis(400);

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// The undelivered deltas, the operations in flight, whether both stay queued, and whether the stop
/// was in time.
fn fields(stopped: Stopped) -> (u64, u64, bool, bool) {
    (stopped.undelivered, stopped.operations, stopped.durable, stopped.in_time)
}

/// Asserts that a stop has taken at most its grace, with a margin for a busy machine.
fn assert_within_grace(since: Instant) {
    let took = since.elapsed();
    assert!(took < GRACE + Duration::from_millis(600), "{took:?}");
}

#[test]
fn idle_heartbeat_stops_at_once() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let since = Instant::now();
    let stopped = heartbeat.stop(Duration::MAX);
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(stopped.in_time && stopped.undelivered == 0, "{stopped:?}");
}

#[test]
fn stop_delivers_the_last_push() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let stopped = heartbeat.stop(Duration::from_secs(10));
    assert_eq!(stopped.undelivered, 0);
    fixture.wait_for_closed_rows(1);
}

#[test]
fn blocked_source_does_not_delay_stop() {
    let fixture = Fixture::new();
    let (_release, source) = blocking_source();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    fixture.wait_for_requests(1);
    let since = Instant::now();
    assert!(heartbeat.stop(GRACE).in_time);
    assert_within_grace(since);
}

#[test]
fn last_post_ignores_backoff_and_reports_the_missing_snapshot() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::Answer(Answer::status(503).header("Retry-After", "600"))]);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push_all(["a", "b"].map(deployed)).unwrap();
    assert_eq!(fields(heartbeat.stop(TIMEOUT)), (0, 0, true, true));
    let received = fixture.wait_for_requests(3);
    assert_eq!((received.len(), deckies(&received[2])), (3, vec!["b".to_owned(), "a".to_owned()]));
    assert_eq!(
        json_of(&received[2])["status"],
        json!({"error": "no fresh snapshot: the agent is stopping"})
    );
}

#[test]
fn stop_delivers_more_than_one_body() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::Answer(Answer::status(503).header("Retry-After", "600"))]);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&format!("d{n}")))).unwrap();
    assert_eq!(fields(heartbeat.stop(TIMEOUT)), (0, 0, true, true));
    let sizes: Vec<_> =
        fixture.master.received().iter().skip(2).map(|request| deckies(request).len()).collect();
    assert_eq!(sizes, [500, 500, 100]);
}

#[test]
fn deltas_without_an_answer_are_counted_and_stay_queued() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    heartbeat.deltas().push_all(["a", "b", "c"].map(deployed)).unwrap();
    let operation = heartbeat.begin(Operation::Deploy, ["a", "d"]).unwrap();
    let since = Instant::now();
    let stopped = heartbeat.stop(GRACE);
    assert_within_grace(since);
    // The delta of `a` is held, and counts as undelivered.
    assert_eq!(fields(stopped), (3, 2, true, true));
    drop(operation);
}

#[test]
fn rejected_last_post_ends_the_stop_at_once() {
    for status in [403, 422, 503] {
        let fixture = Fixture::new();
        let (heartbeat, tick) = fixture.start_heartbeat();
        fixture.master.always(Some(Fault::Answer(Answer::status(status))));
        tick.send(now()).unwrap();
        wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
        let before = fixture.master.received().len();
        heartbeat.deltas().push_all((0..600).map(|n| deployed(&format!("d{n}")))).unwrap();
        let since = Instant::now();
        let stopped = heartbeat.stop(TIMEOUT);
        assert!(since.elapsed() < Duration::from_secs(5), "{status}: {:?}", since.elapsed());
        assert_eq!(fields(stopped), (600, 0, true, true), "{status}");
        let sent = fixture.master.received().len() - before;
        // If the backoff ended before the stop, one more beat was sent.
        assert!((1..=2).contains(&sent), "{status}: {sent}");
    }
}

#[test]
fn memory_outbox_rejects_pushes_after_any_stop() {
    let fixture = Fixture::new();
    for _ in 0..20 {
        let (builder, _tick) = fixture.builder();
        let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
        let deltas = heartbeat.deltas();
        heartbeat.stop(Duration::ZERO);
        let error = deltas.push(deployed("d")).unwrap_err();
        let expected = "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas";
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn held_delta_causes_no_post_at_stop() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let newer = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    operation.fail("older");
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.held == 1 && stats.beats >= 2);
    let before = fixture.master.received().len();
    assert_eq!(fields(heartbeat.stop(TIMEOUT)), (1, 1, true, true));
    assert!(fixture.master.received().len() <= before + 1);
    assert!(fixture.master.received().iter().all(|request| deckies(request).is_empty()));
    newer.fail("newer");
}

#[test]
fn push_during_stop_is_delivered_then_or_after_restart() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let (stop_pushing, stopped_pushing) = bounded::<()>(0);
    let (first, pushing) = bounded(1);
    let pusher = |thread: usize| {
        let deltas = heartbeat.deltas();
        let stopped_pushing = stopped_pushing.clone();
        let first = first.clone();
        std::thread::spawn(move || {
            let mut pushed = Vec::new();
            while stopped_pushing.try_recv() == Err(crossbeam_channel::TryRecvError::Empty) {
                let name = format!("d{thread}-{}", pushed.len());
                deltas.push(deployed(&name)).unwrap();
                pushed.push(name);
                let _ = first.try_send(());
            }
            pushed
        })
    };
    let pushers: Vec<_> = (0..4).map(pusher).collect();
    pushing.recv().unwrap();
    let since = Instant::now();
    let stopped = heartbeat.stop(TIMEOUT);
    // Continuous pushes do not delay the stop.
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert!(stopped.in_time && stopped.durable, "{stopped:?}");
    drop(stop_pushing);
    let mut pushed: Vec<_> =
        pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()).collect();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats > 0 && stats.waiting == 0);
    let mut sent: Vec<_> = fixture.master.received().iter().flat_map(deckies).collect();
    pushed.sort();
    sent.sort();
    // The master may have received the last POST of the stop, which was interrupted.
    sent.dedup();
    assert_eq!(sent, pushed);
}

#[test]
fn stop_during_the_search_for_a_bad_delta_loses_none() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    // The body is rejected with and without the states, and accepted without the deltas. Then half
    // of the deltas are in the POST that gets no answer.
    let rejected = || Answer::status(422).into();
    fixture.master.script([rejected(), rejected(), Fault::Serve, Fault::NeverAnswer(Effect::Lost)]);
    heartbeat.deltas().push_all((0..10).map(|n| deployed(&format!("d{n}")))).unwrap();
    assert_eq!(deckies(&fixture.wait_for_requests(5)[4]).len(), 5);
    let since = Instant::now();
    assert_eq!(fields(heartbeat.stop(GRACE)), (10, 0, true, true));
    assert_within_grace(since);
    let (builder, _tick) = fixture.builder();
    let is_delivered = |stats: &Stats| stats.delivered == 10 && stats.waiting == 0;
    assert_eq!(wait_for_stats(&builder.start().unwrap(), is_delivered).rejected, 0);
}
