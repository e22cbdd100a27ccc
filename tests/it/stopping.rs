//! A stop is bounded, whatever the master does.

use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Effect, Fault};
use decnet_heartbeat::{LifecycleDelta, Operation};

use crate::support::{Stage, hanging, now};

const GRACE: Duration = Duration::from_millis(400);

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
    let stopped = heartbeat.stop(Duration::from_secs(60));
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(stopped.in_time && stopped.undelivered == 0, "{stopped:?}");
}

#[test]
fn a_post_without_an_answer_is_interrupted() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    tick.send(now()).unwrap();
    stage.requests(2);
    let since = Instant::now();
    let stopped = heartbeat.stop(GRACE);
    within_grace(since);
    assert!(stopped.in_time, "{stopped:?}");
}

#[test]
fn a_handshake_without_an_answer_is_interrupted() {
    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.stop();
    stage.master.always(Some(Fault::NeverHandshake));
    stage.master.start_again().unwrap();
    tick.send(now()).unwrap();
    assert!(stage.master.wait_until(Duration::from_secs(20), |seen| seen.connections().len() == 2));
    let since = Instant::now();
    let stopped = heartbeat.stop(GRACE);
    within_grace(since);
    assert!(stopped.in_time, "{stopped:?}");
}

#[test]
fn a_drop_is_bounded_too_and_keeps_what_is_undelivered() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    stage.requests(2);
    let since = Instant::now();
    drop(heartbeat);
    assert!(since.elapsed() < Duration::from_secs(3), "{:?}", since.elapsed());
    stage.master.always(None);
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    crate::support::settled(&heartbeat, |stats| stats.delivered == 1);
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
