//! A delta's way from `push` to the master's row.

use std::time::Duration;

use decnet_heartbeat::loopback::{Answer, Effect, Fault, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation, Snapshot, Stats};
use serde_json::json;

use crate::support::{Fixture, TIMEOUT, deckies, json_of, now, wait_for_stats};

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

#[test]
fn push_closes_its_row_without_a_tick() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "mutate");
    let delta = LifecycleDelta::failed("d", Operation::Mutate, "compose exited with 1");
    heartbeat.deltas().push(delta.clone()).unwrap();
    fixture.wait_for_closed_rows(1);
    let row = &fixture.master.rows()[0];
    assert_eq!(
        (row.status, row.error.as_deref()),
        (RowStatus::Failed, Some("compose exited with 1"))
    );
    assert_eq!(row.completed_at, Some(delta.when()));
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!(stats.waiting, 0);
}

#[test]
fn deltas_survive_an_outage() {
    let mut fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let rows = ["a", "b"]
        .map(|decky| fixture.master.open_operation(&fixture.worker.uuid, decky, "deploy"));
    fixture.master.stop();
    heartbeat.deltas().push_all([deployed("a"), deployed("b")]).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    assert_eq!((stats.waiting, stats.failure.unwrap().class.as_str()), (2, "refused"));
    fixture.master.start_again().unwrap();
    fixture.wait_for_closed_rows(2);
    assert_eq!(fixture.master.rows().iter().map(|row| row.id).collect::<Vec<_>>(), rows);
    wait_for_stats(&heartbeat, |stats| stats.waiting == 0 && stats.failure.is_none());
}

#[test]
fn two_operations_of_one_decky_close_their_own_rows() {
    let mut fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.stop();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "first")).unwrap();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "second")).unwrap();
    fixture.master.start_again().unwrap();
    fixture.wait_for_closed_rows(2);
    let errors: Vec<_> = fixture.master.rows().into_iter().map(|row| row.error.unwrap()).collect();
    assert_eq!(errors, ["first", "second"]);
}

#[test]
fn burst_is_one_request() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.fail_one_beat(&heartbeat, &tick);
    let names: Vec<_> = (0..40).map(|n| format!("d{n:02}")).collect();
    names.iter().for_each(|name| heartbeat.deltas().push(deployed(name)).unwrap());
    let received = fixture.wait_for_requests(3);
    assert_eq!(
        deckies(&received[2]),
        names.iter().rev().cloned().collect::<Vec<_>>(),
        "newest first"
    );
}

#[test]
fn more_than_one_body_is_sent_in_several() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.fail_one_beat(&heartbeat, &tick);
    heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&format!("d{n}")))).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1_100 && stats.waiting == 0);
    let sizes: Vec<_> = fixture
        .master
        .received()
        .iter()
        .map(|it| deckies(it).len())
        .filter(|size| *size > 0)
        .collect();
    assert_eq!(sizes, [500, 500, 100]);
}

#[test]
fn undelivered_delta_survives_restart() {
    let mut fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.stop();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stopped = heartbeat.stop(Duration::from_millis(300));
    assert_eq!((stopped.undelivered, stopped.durable), (1, true));
    fixture.master.start_again().unwrap();
    let (builder, _tick) = fixture.builder();
    let _heartbeat = builder.start().unwrap();
    fixture.wait_for_closed_rows(1);
}

#[test]
fn sender_still_queues_after_stop() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let deltas = heartbeat.deltas();
    heartbeat.stop(Duration::from_secs(1));
    deltas.push(deployed("late")).unwrap();
    let (builder, _tick) = fixture.builder();
    let _heartbeat = builder.start().unwrap();
    assert_eq!(deckies(&fixture.wait_for_requests(2)[1]), ["late"]);
}

#[test]
fn memory_outbox_rejects_push_after_stop() {
    let fixture = Fixture::new();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    assert_eq!(heartbeat.stats().outbox, None);
    let deltas = heartbeat.deltas();
    deltas.push(deployed("a")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    heartbeat.stop(Duration::from_secs(1));
    let error = deltas.push(deployed("b")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas"
    );
}

#[test]
fn rejected_delta_does_not_block_the_others() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let rejected =
        || Fault::Answer(Answer::status(422).body("{\"detail\":\"bad \u{1b}[31mdelta\"}"));
    // The body with three deltas is rejected, the one without deltas is accepted. Then the body
    // with the newest two is rejected, and the one with the newest.
    fixture.fail_one_beat(&heartbeat, &tick);
    fixture.master.script([rejected(), Fault::Serve, rejected(), rejected()]);
    heartbeat.deltas().push_all([deployed("a"), deployed("b"), deployed("bad")]).unwrap();
    wait_for_stats(&heartbeat, |stats| {
        stats.delivered == 2 && stats.rejected == 1 && stats.waiting == 0
    });
    let sent: Vec<_> = fixture.master.received().iter().skip(2).map(deckies).collect();
    assert_eq!(sent[..4], [vec!["bad", "b", "a"], vec![], vec!["bad", "b"], vec!["bad"]]);
    assert!(!sent[4..].iter().flatten().any(|decky| decky == "bad"), "{sent:?}");
}

#[test]
fn rejected_status_rejects_no_delta() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.always(Some(Fault::Answer(Answer::status(422))));
    heartbeat.deltas().push(deployed("d")).unwrap();
    // Bodies with the delta, without it, and without the status are all rejected, so the delta is
    // not the cause. They count as one failed beat.
    fixture.wait_for_requests(4);
    wait_for_stats(&heartbeat, |stats| {
        stats.failure.as_ref().is_some_and(|failure| failure.count == 1)
    });
    fixture.master.always(None);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1 && stats.rejected == 0);
}

#[test]
fn rejected_status_is_left_out_and_the_reason_is_sent() {
    let fixture = Fixture::new();
    let (builder, tick) = fixture.builder();
    fixture.master.always(Some(Fault::AnswerTo(
        b"invalid".to_vec(),
        Answer::status(422).body("bad\u{1b} value"),
    )));
    let source = || Snapshot::new(&json!({"invalid": true}));
    let heartbeat = builder.status_source(source).start().unwrap();
    let is_accepted = |stats: &Stats| stats.status_fault.is_some() && stats.beats == 1;
    assert!(wait_for_stats(&heartbeat, is_accepted).failure.is_none());
    // The whole body, a light one, and one with only the states. Later beats leave out the states
    // and report the reason.
    let error = "the states are sent alone because the master failed on a larger body: http-422: bad\\u{1b} value";
    assert_eq!(json_of(&fixture.wait_for_requests(3)[1])["status"], json!({"error": error}));
    tick.send(now()).unwrap();
    let error =
        "the states are left out because the master failed on them: http-422: bad\\u{1b} value";
    assert_eq!(json_of(&fixture.wait_for_requests(4)[3])["status"], json!({"error": error}));
    assert_eq!(
        wait_for_stats(&heartbeat, |stats| stats.beats == 2).status_fault.as_deref(),
        Some(error)
    );
    // Deltas are still sent, and an invalid delta is found.
    heartbeat.deltas().push_all(["a", "invalid", "b"].map(deployed)).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.rejected == 1);
    assert!(stats.failure.is_none(), "{stats:?}");
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats > 1 && stats.waiting == 0);
}

#[test]
fn delta_is_not_sent_again_after_a_2xx() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::CutAfterAnswer]);
    heartbeat.deltas().push(deployed("d")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    let sent: Vec<_> = fixture.master.received().iter().flat_map(deckies).collect();
    assert_eq!(sent, ["d"]);
}

#[test]
fn acknowledged_delta_is_not_sent_again_while_the_outbox_is_locked() {
    let mut fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.stop();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let other = rusqlite::Connection::open(fixture.outbox()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    fixture.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    other.execute_batch("COMMIT").unwrap();
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(4, TIMEOUT));
    let sent: Vec<_> = fixture.master.received().iter().flat_map(deckies).collect();
    assert_eq!(sent, ["d"]);
    heartbeat.stop(Duration::from_secs(5));
    let left: i64 = other.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}

#[test]
fn delta_without_an_answer_is_sent_again() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::CutAfterBody(Effect::Lost)]);
    heartbeat.deltas().push(deployed("d")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    // A failure on a reused connection is retried at once, and does not count.
    assert!(heartbeat.stats().failure.is_none());
    assert_eq!(fixture.master.received().iter().flat_map(deckies).collect::<Vec<_>>(), ["d", "d"]);
}

#[test]
fn invalid_decky_name_is_rejected_and_nothing_is_queued() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    for name in ["a b", "a,b", "a\n", "a*", "a>b", "ä", "\u{202e}a", &"x".repeat(129)] {
        for error in [
            heartbeat.deltas().push(deployed(name)).unwrap_err(),
            heartbeat.deltas().push_all([deployed("good"), deployed(name)]).unwrap_err(),
            heartbeat.begin(Operation::Deploy, ["good", name]).unwrap_err(),
            heartbeat.run(Operation::Deploy, [name], || Ok::<_, String>(())).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains(" is not a valid name: use at most 128 characters"), "{text}");
            assert!(!text.contains(['\n', '\u{202e}']) && text.chars().count() < 300, "{text}");
        }
    }
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.operations, stats.delivered), (0, 0, 0));
}

#[test]
fn queued_invalid_name_of_an_older_version_blocks_nothing() {
    let mut fixture = Fixture::new();
    fixture.master.stop();
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    heartbeat.deltas().push_all([deployed("a"), deployed("b"), deployed("c")]).unwrap();
    heartbeat.stop(Duration::ZERO);
    let outbox = rusqlite::Connection::open(fixture.outbox()).unwrap();
    assert_eq!(
        outbox.execute("UPDATE delta SET decky = 'b, and' WHERE decky = 'b'", []).unwrap(),
        1
    );
    drop(outbox);
    fixture.master.start_again().unwrap();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    wait_for_stats(&heartbeat, |stats| stats.waiting == 0 && stats.failure.is_none());
    let delivered: Vec<_> = fixture.master.received().iter().flat_map(deckies).collect();
    assert_eq!(delivered, ["c", "b, and", "a"]);
}
