//! A delta, from `push` to the master's row.

use std::time::Duration;

use decnet_heartbeat::loopback::{Answer, Effect, Fault, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation, Snapshot};
use serde_json::json;

use crate::support::{PATIENCE, Stage, deckies, json_of, now, settled};

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

#[test]
fn a_push_seals_its_row_without_a_tick() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.open_operation(&stage.worker.uuid, "d", "mutate");
    let delta = LifecycleDelta::failed("d", Operation::Mutate, "compose exited with 1");
    heartbeat.deltas().push(delta.clone()).unwrap();
    stage.closed_rows(1);
    let row = &stage.master.rows()[0];
    assert_eq!(
        (row.status, row.error.as_deref()),
        (RowStatus::Failed, Some("compose exited with 1"))
    );
    assert_eq!(row.completed_at, Some(delta.when()));
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!(stats.waiting, 0);
}

#[test]
fn what_the_master_cannot_hear_is_kept_and_comes_when_it_can() {
    let mut stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let rows =
        ["a", "b"].map(|decky| stage.master.open_operation(&stage.worker.uuid, decky, "deploy"));
    stage.master.stop();
    heartbeat.deltas().push_all([deployed("a"), deployed("b")]).unwrap();
    let stats = settled(&heartbeat, |stats| stats.failure.is_some());
    assert_eq!((stats.waiting, stats.failure.unwrap().class.as_str()), (2, "refused"));
    stage.master.start_again().unwrap();
    stage.closed_rows(2);
    assert_eq!(stage.master.rows().iter().map(|row| row.id).collect::<Vec<_>>(), rows);
    settled(&heartbeat, |stats| stats.waiting == 0 && stats.failure.is_none());
}

#[test]
fn of_two_operations_of_one_decky_each_lands_on_its_own_row() {
    let mut stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.stop();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "first")).unwrap();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "second")).unwrap();
    stage.master.start_again().unwrap();
    stage.closed_rows(2);
    let errors: Vec<_> = stage.master.rows().into_iter().map(|row| row.error.unwrap()).collect();
    assert_eq!(errors, ["first", "second"]);
}

#[test]
fn a_burst_is_one_request() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.put_off(&heartbeat, &tick);
    let names: Vec<_> = (0..40).map(|n| format!("d{n:02}")).collect();
    names.iter().for_each(|name| heartbeat.deltas().push(deployed(name)).unwrap());
    let received = stage.requests(3);
    assert_eq!(
        deckies(&received[2]),
        names.iter().rev().cloned().collect::<Vec<_>>(),
        "newest first"
    );
}

#[test]
fn more_than_a_body_holds_goes_out_in_several() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.put_off(&heartbeat, &tick);
    heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&format!("d{n}")))).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1_100 && stats.waiting == 0);
    let sizes: Vec<_> = stage
        .master
        .received()
        .iter()
        .map(|it| deckies(it).len())
        .filter(|size| *size > 0)
        .collect();
    assert_eq!(sizes, [500, 500, 100]);
}

#[test]
fn an_undelivered_delta_survives_the_process() {
    let mut stage = Stage::new();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let (heartbeat, _tick) = stage.beating();
    stage.master.stop();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stopped = heartbeat.stop(Duration::from_millis(300));
    assert_eq!((stopped.undelivered, stopped.kept), (1, true));
    stage.master.start_again().unwrap();
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.start().unwrap();
    stage.closed_rows(1);
}

#[test]
fn a_handle_outlives_its_heartbeat_and_still_keeps() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let deltas = heartbeat.deltas();
    heartbeat.stop(Duration::from_secs(1));
    deltas.push(deployed("late")).unwrap();
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.start().unwrap();
    let seen = stage.requests(2);
    assert_eq!(deckies(&seen[1]), ["late"]);
}

#[test]
fn in_memory_nothing_is_promised_after_a_stop() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.outbox(OutboxLocation::Memory).start().unwrap();
    assert_eq!(heartbeat.stats().outbox, None);
    let deltas = heartbeat.deltas();
    deltas.push(deployed("a")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    heartbeat.stop(Duration::from_secs(1));
    let error = deltas.push(deployed("b")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outbox in memory: the heartbeat has stopped; its outbox in memory takes no more deltas"
    );
}

#[test]
fn a_delta_that_the_master_refuses_is_put_aside_and_the_others_arrive() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let refused =
        || Fault::Answer(Answer::status(422).body("{\"detail\":\"bad \u{1b}[31mdelta\"}"));
    // Away first, so that three deltas wait; then: refused with three, accepted with none, and among the newest two
    // of the three it is the newest that is refused.
    stage.put_off(&heartbeat, &tick);
    stage.master.script([refused(), Fault::Serve, refused(), refused()]);
    heartbeat.deltas().push_all([deployed("a"), deployed("b"), deployed("bad")]).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2 && stats.rejected == 1 && stats.waiting == 0);
    let sent: Vec<_> = stage.master.received().iter().skip(2).map(deckies).collect();
    assert_eq!(sent[..4], [vec!["bad", "b", "a"], vec![], vec!["bad", "b"], vec!["bad"]]);
    assert!(!sent[4..].iter().flatten().any(|decky| decky == "bad"), "{sent:?}");
}

#[test]
fn a_master_that_refuses_the_status_rejects_no_delta() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.always(Some(Fault::Answer(Answer::status(422))));
    heartbeat.deltas().push(deployed("d")).unwrap();
    // With the delta, without it, and without the status, too: refused each time, so it is not the delta's fault. It is
    // one beat that failed.
    stage.requests(4);
    settled(&heartbeat, |stats| stats.failure.as_ref().is_some_and(|failure| failure.count == 1));
    stage.master.always(None);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1 && stats.rejected == 0);
}

#[test]
fn a_status_that_the_master_refuses_is_left_out_and_the_beat_says_so() {
    let stage = Stage::new();
    let (builder, tick) = stage.builder();
    stage.master.always(Some(Fault::AnswerTo(
        b"indigestible".to_vec(),
        Answer::status(422).body("cannot\u{1b} eat it"),
    )));
    let source = || Snapshot::new(&json!({"indigestible": true}));
    let heartbeat = builder.status_source(source).start().unwrap();
    let stats = settled(&heartbeat, |stats| stats.status_fault.is_some());
    assert_eq!((stats.beats, stats.failure.is_none()), (1, true));
    // Whole, light, and the states alone. The beats after it leave these out, and say why.
    let error = "the states are sent alone because the master failed on a larger body: http-422: cannot\\u{1b} eat it";
    assert_eq!(json_of(&stage.requests(3)[1])["status"], json!({"error": error}));
    tick.send(now()).unwrap();
    let error =
        "the states are left out because the master failed on them: http-422: cannot\\u{1b} eat it";
    assert_eq!(json_of(&stage.requests(4)[3])["status"], json!({"error": error}));
    assert_eq!(settled(&heartbeat, |stats| stats.beats == 2).status_fault.as_deref(), Some(error));
    // A delta goes out all the same, and one that is indigestible itself is still found.
    heartbeat.deltas().push_all(["a", "indigestible", "b"].map(deployed)).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 2 && stats.rejected == 1);
    assert!(stats.failure.is_none(), "{stats:?}");
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.beats > 1 && stats.waiting == 0);
}

#[test]
fn nothing_is_sent_again_after_a_2xx() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.script([Fault::CutAfterAnswer]);
    heartbeat.deltas().push(deployed("d")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    let sent: Vec<_> = stage.master.received().iter().flat_map(deckies).collect();
    assert_eq!(sent, ["d"]);
}

#[test]
fn nothing_is_sent_again_while_the_outbox_cannot_be_written() {
    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.stop();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let other = rusqlite::Connection::open(stage.agent_dir().join("heartbeat.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    stage.master.start_again().unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    other.execute_batch("COMMIT").unwrap();
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(4, PATIENCE));
    let sent: Vec<_> = stage.master.received().iter().flat_map(deckies).collect();
    assert_eq!(sent, ["d"]);
    heartbeat.stop(Duration::from_secs(5));
    let left: i64 = other.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}

#[test]
fn without_an_answer_it_is_sent_again() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.script([Fault::CutAfterBody(Effect::Lost)]);
    heartbeat.deltas().push(deployed("d")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    // The connection was a reused one, so the second try came at once, and it was no failure.
    assert!(heartbeat.stats().failure.is_none());
    assert_eq!(stage.master.received().iter().flat_map(deckies).collect::<Vec<_>>(), ["d", "d"]);
}

#[test]
fn a_name_that_no_decky_can_have_is_refused_and_nothing_of_it_is_kept() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    for name in ["a b", "a,b", "a\n", "a*", "a>b", "ä", "\u{202e}a", &"x".repeat(129)] {
        for error in [
            heartbeat.deltas().push(deployed(name)).unwrap_err(),
            heartbeat.deltas().push_all([deployed("good"), deployed(name)]).unwrap_err(),
            heartbeat.begin(Operation::Deploy, ["good", name]).unwrap_err(),
            heartbeat.run(Operation::Deploy, [name], || Ok::<_, String>(())).unwrap_err(),
        ] {
            let said = error.to_string();
            assert!(said.contains(" is not a valid name: use at most 128 characters"), "{said}");
            assert!(!said.contains(['\n', '\u{202e}']) && said.chars().count() < 300, "{said}");
        }
    }
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.operations, stats.delivered), (0, 0, 0));
}

#[test]
fn a_wrong_name_that_an_older_version_has_kept_holds_nothing_up() {
    let mut stage = Stage::new();
    stage.master.stop();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    heartbeat.deltas().push_all([deployed("a"), deployed("b"), deployed("c")]).unwrap();
    heartbeat.stop(Duration::ZERO);
    let outbox = rusqlite::Connection::open(stage.agent_dir().join("heartbeat.db")).unwrap();
    assert_eq!(
        outbox.execute("UPDATE delta SET decky = 'b, and' WHERE decky = 'b'", []).unwrap(),
        1
    );
    drop(outbox);
    stage.master.start_again().unwrap();
    let (heartbeat, _tick) = stage.beating();
    settled(&heartbeat, |stats| stats.waiting == 0 && stats.failure.is_none());
    let delivered: Vec<_> = stage.master.received().iter().flat_map(deckies).collect();
    assert_eq!(delivered, ["c", "b, and", "a"]);
}
