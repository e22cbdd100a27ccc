//! What a stop delivers and keeps, and that it takes no longer than it must. `process/stop_in_…` of the table of faults
//! stops it in the middle of a POST.

use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use decnet_heartbeat::loopback::{Answer, Effect, Fault};
use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation, Stopped};
use serde_json::json;

use crate::support::{PATIENCE, Stage, deckies, hanging, json_of, now, settled};

const GRACE: Duration = Duration::from_millis(400);

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// All that a stop says: what is undelivered, the operations in flight, whether both are kept, and whether it was in
/// time.
fn told(stopped: Stopped) -> (u64, u64, bool, bool) {
    (stopped.undelivered, stopped.operations, stopped.kept, stopped.in_time)
}

/// A stop takes its grace at the most; a busy machine may be late to notice.
fn within_grace(since: Instant) {
    let took = since.elapsed();
    assert!(took < GRACE + Duration::from_millis(600), "{took:?}");
}

#[test]
fn an_idle_heartbeat_stops_at_once() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let since = Instant::now();
    let stopped = heartbeat.stop(Duration::MAX);
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(stopped.in_time && stopped.undelivered == 0, "{stopped:?}");
}

#[test]
fn what_was_pushed_last_is_flushed() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let stopped = heartbeat.stop(Duration::from_secs(10));
    assert_eq!(stopped.undelivered, 0);
    stage.closed_rows(1);
}

#[test]
fn a_source_that_hangs_does_not_hold_up_a_stop() {
    let stage = Stage::new();
    let (_release, source) = hanging();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    stage.requests(1);
    let since = Instant::now();
    assert!(heartbeat.stop(GRACE).in_time);
    within_grace(since);
}

#[test]
fn the_last_post_waits_for_no_backoff_and_says_why_it_has_no_snapshot() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.script([Fault::Answer(Answer::status(503).header("Retry-After", "600"))]);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push_all(["a", "b"].map(deployed)).unwrap();
    assert_eq!(told(heartbeat.stop(PATIENCE)), (0, 0, true, true));
    let received = stage.requests(3);
    assert_eq!((received.len(), deckies(&received[2])), (3, vec!["b".to_owned(), "a".to_owned()]));
    assert_eq!(
        json_of(&received[2])["status"],
        json!({"error": "no fresh snapshot: the agent is stopping"})
    );
}

#[test]
fn more_than_a_body_holds_is_flushed_in_several() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.script([Fault::Answer(Answer::status(503).header("Retry-After", "600"))]);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&format!("d{n}")))).unwrap();
    assert_eq!(told(heartbeat.stop(PATIENCE)), (0, 0, true, true));
    let sizes: Vec<_> =
        stage.master.received().iter().skip(2).map(|request| deckies(request).len()).collect();
    assert_eq!(sizes, [500, 500, 100]);
}

#[test]
fn what_a_master_that_never_answers_has_not_accepted_is_counted_and_kept() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    heartbeat.deltas().push_all(["a", "b", "c"].map(deployed)).unwrap();
    let operation = heartbeat.begin(Operation::Deploy, ["a", "d"]).unwrap();
    let since = Instant::now();
    let stopped = heartbeat.stop(GRACE);
    within_grace(since);
    // The one of `a` is held back, and undelivered all the same.
    assert_eq!(told(stopped), (3, 2, true, true));
    drop(operation);
}

#[test]
fn a_refusal_of_the_last_post_ends_the_stop_at_once() {
    for status in [403, 422, 503] {
        let stage = Stage::new();
        let (heartbeat, tick) = stage.beating();
        stage.master.always(Some(Fault::Answer(Answer::status(status))));
        tick.send(now()).unwrap();
        settled(&heartbeat, |stats| stats.failure.is_some());
        let before = stage.master.received().len();
        heartbeat.deltas().push_all((0..600).map(|n| deployed(&format!("d{n}")))).unwrap();
        let since = Instant::now();
        let stopped = heartbeat.stop(PATIENCE);
        assert!(since.elapsed() < Duration::from_secs(5), "{status}: {:?}", since.elapsed());
        assert_eq!(told(stopped), (600, 0, true, true), "{status}");
        let sent = stage.master.received().len() - before;
        // Where the backoff ended before the stop, there was a beat of its own.
        assert!((1..=2).contains(&sent), "{status}: {sent}");
    }
}

#[test]
fn what_is_pushed_into_memory_after_a_stop_is_refused_whether_or_not_the_stop_was_in_time() {
    let stage = Stage::new();
    for _ in 0..20 {
        let (builder, _tick) = stage.builder();
        let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
        let deltas = heartbeat.deltas();
        heartbeat.stop(Duration::ZERO);
        let error = deltas.push(deployed("d")).unwrap_err();
        let said = "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas";
        assert_eq!(error.to_string(), said);
    }
}

#[test]
fn what_is_held_back_at_a_stop_costs_no_post() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let operation = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let newer = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    operation.fail("older");
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.held == 1 && stats.beats >= 2);
    let before = stage.master.received().len();
    assert_eq!(told(heartbeat.stop(PATIENCE)), (1, 1, true, true));
    assert!(stage.master.received().len() <= before + 1);
    assert!(stage.master.received().iter().all(|request| deckies(request).is_empty()));
    newer.fail("newer");
}

#[test]
fn what_is_pushed_while_it_stops_is_delivered_then_or_after_the_next_start() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let (enough, told_so) = bounded::<()>(0);
    let (first, pushing) = bounded(1);
    let pusher = |thread: usize| {
        let (deltas, told_so, first) = (heartbeat.deltas(), told_so.clone(), first.clone());
        std::thread::spawn(move || {
            let mut pushed = Vec::new();
            while told_so.try_recv() == Err(crossbeam_channel::TryRecvError::Empty) {
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
    let stopped = heartbeat.stop(PATIENCE);
    // Threads that push all the time neither keep the stop from the outbox nor make it longer.
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert!(stopped.in_time && stopped.kept, "{stopped:?}");
    drop(enough);
    let mut pushed: Vec<_> =
        pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()).collect();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats > 0 && stats.waiting == 0);
    let mut sent: Vec<_> = stage.master.received().iter().flat_map(deckies).collect();
    pushed.sort();
    sent.sort();
    // The last POST of the grace may have been interrupted after it had arrived.
    sent.dedup();
    assert_eq!(sent, pushed);
}

#[test]
fn a_stop_in_the_search_for_a_poison_keeps_every_delta() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    // Refused with the states and without them, accepted without the deltas; then half of these are on their way.
    let refused = || Answer::status(422).into();
    stage.master.script([refused(), refused(), Fault::Serve, Fault::NeverAnswer(Effect::Lost)]);
    heartbeat.deltas().push_all((0..10).map(|n| deployed(&format!("d{n}")))).unwrap();
    assert_eq!(deckies(&stage.requests(5)[4]).len(), 5);
    let since = Instant::now();
    assert_eq!(told(heartbeat.stop(GRACE)), (10, 0, true, true));
    within_grace(since);
    let (builder, _tick) = stage.builder();
    let stats = settled(&builder.start().unwrap(), |stats| stats.delivered == 10);
    assert_eq!((stats.rejected, stats.waiting), (0, 0));
}
