//! What follows a beat that failed: when the next one goes out, and what becomes of its deltas.

use std::time::{Duration, Instant, SystemTime};

use decnet_heartbeat::loopback::{Answer, Effect, Fault};
use decnet_heartbeat::{LifecycleDelta, Operation};

use crate::support::{PATIENCE, Stage, deckies, now, settled};

/// How late a busy machine may be.
const SLACK: Duration = Duration::from_secs(2);

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// A 422 for every body with a delta of a decky of such a name.
fn poison() -> Fault {
    Fault::AnswerTo(b"\"poison".to_vec(), Answer::status(422).body("cannot stomach it"))
}

/// The time between a request and the one before it.
fn gaps(stage: &Stage, count: usize) -> Vec<Duration> {
    stage.requests(count).windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

/// What the outbox' file has: the decky, and why it was rejected.
fn kept(stage: &Stage) -> Vec<(String, Option<String>)> {
    let outbox = rusqlite::Connection::open(stage.agent_dir().join("heartbeat.db")).unwrap();
    let mut select = outbox.prepare("SELECT decky, rejected FROM delta ORDER BY id").unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

fn rejected(decky: &str) -> (String, Option<String>) {
    (decky.to_owned(), Some("http-422: cannot stomach it".to_owned()))
}

#[test]
fn a_failure_on_a_reused_connection_is_tried_once_more_at_once_and_then_backed_off() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.script([Fault::CutAfterBody(Effect::Lost), Fault::CutAfterBody(Effect::Lost)]);
    tick.send(now()).unwrap();
    let waits = gaps(&stage, 4);
    let connections: Vec<_> =
        stage.master.received().iter().take(4).map(|request| request.connection).collect();
    assert_eq!(connections, [1, 1, 2, 3]);
    assert!(waits[1] < Duration::from_millis(450), "at once: {waits:?}");
    assert!(waits[2] >= Duration::from_millis(500), "not a third time: {waits:?}");
    settled(&heartbeat, |stats| stats.beats >= 2 && stats.failure.is_none());
}

#[test]
fn what_an_operation_has_overtaken_meanwhile_is_not_tried_again() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.script([Fault::CutAfterSilence(Duration::from_millis(700))]);
    heartbeat.deltas().push_all(["d", "e"].map(deployed)).unwrap();
    stage.requests(2);
    // The master hears of it, and for all that the heartbeat knows it may not have.
    let newer = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!((stats.held, stats.operations, stats.failure.is_none()), (1, 1, true));
    newer.fail("newer");
    settled(&heartbeat, |stats| stats.delivered == 3);
    let sent: Vec<_> =
        stage.master.received().iter().map(deckies).filter(|deckies| !deckies.is_empty()).collect();
    assert_eq!(sent, [vec!["e", "d"], vec!["e"], vec!["d", "d"]]);
}

#[test]
fn a_failure_on_a_fresh_connection_is_not_tried_again_at_once() {
    let stage = Stage::new();
    stage.master.script([Fault::CutAfterBody(Effect::Lost)]);
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.start().unwrap();
    let waits = gaps(&stage, 2);
    assert!(
        (Duration::from_millis(500)..Duration::from_secs(1) + SLACK).contains(&waits[0]),
        "{waits:?}"
    );
}

#[test]
fn the_waits_grow_while_it_fails_and_a_success_forgets_them() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let away = || Fault::Answer(Answer::status(429));
    stage.master.script([away(), away(), away(), Fault::Serve, away()]);
    tick.send(now()).unwrap();
    // A tick or a delta meanwhile shortens nothing.
    heartbeat.deltas().push(deployed("d")).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    let waits = gaps(&stage, 7);
    // Each is from half to all of 1 s, 2 s, 4 s, and of 1 s again.
    for (index, most) in [(1, 1), (2, 2), (3, 4), (5, 1)] {
        let most = Duration::from_secs(most);
        assert!((most / 2..most + SLACK).contains(&waits[index]), "{index}: {waits:?}");
    }
}

#[test]
fn retry_after_is_heeded_in_seconds_and_as_a_date_and_is_never_less_than_a_second() {
    // Before the date is made, which the others' starts would use up.
    let since = Instant::now();
    let in_four_seconds = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(4));
    let asked = [
        ("2".to_owned(), 2),
        // A date has no fractions: up to one of the four seconds is lost.
        (in_four_seconds(), 3),
        ("0".to_owned(), 1),
        ("Sun, 06 Nov 1994 08:49:37 GMT".to_owned(), 1),
    ];
    let beating = asked.map(|(said, least)| {
        let stage = Stage::new();
        stage.master.script([Fault::Answer(Answer::status(429).header("Retry-After", &said))]);
        let heartbeat = stage.builder().0.start().unwrap();
        (stage, heartbeat, said, Duration::from_secs(least))
    });
    for (stage, _heartbeat, said, least) in beating {
        stage.requests(2);
        let wait = stage.master.received()[1].at - since;
        assert!((least..least + SLACK).contains(&wait), "{said}: {wait:?}");
    }
}

#[test]
fn a_host_that_is_refused_waits_for_its_tick_whatever_is_pushed() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.decommission(&stage.worker.uuid);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(deployed("d")).unwrap();
    // A backoff would be over by then.
    let more =
        stage.master.wait_until(Duration::from_millis(1_300), |seen| seen.received().len() > 2);
    assert!(!more, "{:?}", heartbeat.stats());
    tick.send(now()).unwrap();
    let failing = settled(&heartbeat, |stats| {
        stats.failure.as_ref().is_some_and(|failure| failure.count == 2)
    });
    assert_eq!((failing.waiting, stage.master.received().len()), (1, 3));
}

#[test]
fn a_restart_begins_afresh_though_the_master_had_asked_for_ten_minutes() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.always(Some(Fault::Answer(Answer::status(503).header("Retry-After", "600"))));
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(deployed("d")).unwrap();
    assert_eq!(heartbeat.stop(PATIENCE).undelivered, 1);
    stage.master.always(None);
    let (builder, _tick) = stage.builder();
    let since = Instant::now();
    let heartbeat = builder.start().unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert!(since.elapsed() < SLACK, "{:?}", since.elapsed());
    assert!(stats.failure.is_none() && stats.waiting == 0, "{stats:?}");
}

#[test]
fn a_rejected_delta_stays_in_the_file_with_the_reason_and_is_never_sent_again() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.always(Some(poison()));
    heartbeat.deltas().push_all(["a", "poison", "b"].map(deployed)).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 2 && stats.rejected == 1);
    assert_eq!((stats.waiting, stats.dropped), (0, 0));
    assert!(heartbeat.flush(PATIENCE), "the file knows it, too");
    assert_eq!(kept(&stage), [rejected("poison")]);
    assert_eq!(heartbeat.stop(PATIENCE).undelivered, 0);
    stage.master.always(None);
    let before = stage.master.received().len();
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    heartbeat.deltas().push(deployed("c")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.beats == 3);
    let sent: Vec<_> = stage.master.received().iter().skip(before).flat_map(deckies).collect();
    assert_eq!(sent, ["c"]);
    heartbeat.stop(PATIENCE);
    assert_eq!(kept(&stage), [rejected("poison")]);
}

#[test]
fn each_of_several_poisons_in_one_body_is_found_and_the_others_arrive() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.always(Some(poison()));
    // The oldest, the newest, and two that are neighbours.
    let name = |n| {
        if [0, 20, 21, 39].contains(&n) { format!("poison-{n:02}") } else { format!("d{n:02}") }
    };
    let names: Vec<_> = (0..40).map(name).collect();
    heartbeat.deltas().push_all(names.iter().map(|name| deployed(name))).unwrap();
    let stats = settled(&heartbeat, |stats| stats.rejected == 4 && stats.delivered == 36);
    assert_eq!((stats.waiting, stats.dropped), (0, 0));
    assert!(heartbeat.flush(PATIENCE), "the last answer is in the file");
    assert_eq!(
        kept(&stage),
        names
            .iter()
            .filter(|name| name.starts_with('p'))
            .map(|it| rejected(it))
            .collect::<Vec<_>>()
    );
    // Each costs the body, a beat without it, and a halving of it.
    let requests = stage.master.received().len();
    assert!(requests <= 1 + 4 * (2 + 7) + 4, "{requests}");
}

#[test]
fn a_poison_among_a_thousand_costs_a_dozen_requests_more() {
    for place in [0, 333, 599, 600, 1_099] {
        let stage = Stage::new();
        let (heartbeat, _tick) = stage.beating();
        stage.master.always(Some(poison()));
        let name = |n| if n == place { "poison".to_owned() } else { format!("d{n}") };
        heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&name(n)))).unwrap();
        settled(&heartbeat, |stats| stats.rejected == 1 && stats.delivered == 1_099);
        assert!(heartbeat.flush(PATIENCE), "the file knows it, too");
        assert_eq!(kept(&stage), [rejected("poison")]);
        let requests = stage.master.received().len();
        assert!(requests <= 1 + 4 + 2 + 10, "{place}: {requests}");
    }
}

#[test]
fn a_body_that_is_refused_only_once_costs_a_dozen_requests_more() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.script([Fault::Answer(Answer::status(422))]);
    heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&format!("d{n}")))).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1_100);
    let requests = stage.master.received().len();
    assert!(requests <= 1 + 4 + 2 + 10, "{requests}");
}

#[test]
fn a_rejected_delta_is_no_failure_of_the_beat() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.always(Some(poison()));
    heartbeat.deltas().push(LifecycleDelta::succeeded("poison", Operation::Deploy)).unwrap();
    let stats = settled(&heartbeat, |stats| stats.rejected == 1);
    assert!(stats.failure.is_none(), "{:?}", stats.failure);
}

/// A 500 for every body with this in it.
fn failing_on(part: &str) -> Fault {
    Fault::AnswerTo(part.as_bytes().to_vec(), Answer::status(500).body("Internal Server Error"))
}

#[test]
fn a_delta_on_which_the_master_fails_rests_for_ten_beats_and_stops_neither_beats_nor_other_deltas()
{
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.always(Some(failing_on("\"d.1\"")));
    heartbeat.deltas().push_all(["a", "d.1", "b"].map(deployed)).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 2 && stats.suspended == 1);
    assert_eq!((stats.rejected, stats.waiting), (0, 1));
    let tries =
        || stage.master.received().iter().filter(|request| deckies(request) == ["d.1"]).count();
    assert_eq!(tries(), 1);
    let one_beat = || {
        let before = heartbeat.stats().beats;
        tick.send(now()).unwrap();
        assert!(settled(&heartbeat, |stats| stats.beats > before).failure.is_none());
    };
    // What is pushed meanwhile arrives with the whole status, unless it is older and of the same decky.
    heartbeat.deltas().push(deployed("c")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 3);
    (0..8).for_each(|_| one_beat());
    assert_eq!(tries(), 1);
    stage.master.always(None);
    for _ in 0..3 {
        one_beat();
    }
    let stats = settled(&heartbeat, |stats| stats.delivered == 4);
    assert_eq!((stats.suspended, stats.rejected, stats.waiting, tries()), (0, 0, 0, 2));
}

#[test]
fn states_on_which_the_master_fails_rest_and_the_beats_go_on_without_them() {
    let stage = Stage::new();
    let (builder, tick) = stage.builder();
    let source =
        || decnet_heartbeat::Snapshot::new(&serde_json::json!({"deployed": false, "pad": "large"}));
    stage.master.always(Some(failing_on("\"pad\"")));
    let heartbeat = builder.status_source(source).start().unwrap();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert!(stats.failure.is_none(), "{stats:?}");
    let one_beat = || {
        let before = heartbeat.stats().beats;
        tick.send(now()).unwrap();
        settled(&heartbeat, |stats| stats.beats > before)
    };
    for _ in 0..5 {
        let fault = one_beat().status_fault.unwrap();
        assert_eq!(
            fault,
            "the states are left out because the master failed on them: http-500: Internal Server Error"
        );
    }
    stage.master.always(None);
    // Ten beats after it failed they are tried again, and then there is one body for all.
    while one_beat().status_fault.is_some() {
        assert!(stage.master.received().len() < 60);
    }
    heartbeat.deltas().push(deployed("e")).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2);
    let last = stage.master.received().pop().unwrap();
    assert_eq!(
        (deckies(&last), crate::support::json_of(&last)["status"]["pad"].as_str()),
        (vec!["e".to_owned()], Some("large"))
    );
}

#[test]
fn a_gateways_page_rejects_no_delta() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let page =
        Answer::status(400).header("Content-Type", "text/html").body("<h1>400 Bad Request</h1>");
    stage.master.always(Some(Fault::AnswerTo(b"\"d1\"".to_vec(), page)));
    heartbeat.deltas().push_all(["d0", "d1", "d2"].map(deployed)).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 2 && stats.suspended == 1);
    assert_eq!((stats.rejected, stats.waiting), (0, 1));
}
