//! What follows a failed beat: when the next one is sent, and what happens to its deltas.

use std::time::{Duration, Instant, SystemTime};

use decnet_heartbeat::loopback::{Answer, Effect, Fault};
use decnet_heartbeat::{LifecycleDelta, Operation};

use crate::support::{Fixture, TIMEOUT, deckies, json_of, now, wait_for_stats};

/// The delay of a busy machine.
const SLACK: Duration = Duration::from_secs(2);

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// A 422 for each body with a delta of a decky whose name starts with `bad`.
fn reject_bad_deltas() -> Fault {
    Fault::AnswerTo(b"\"bad".to_vec(), Answer::status(422).body("invalid delta"))
}

/// The times between requests.
fn gaps(fixture: &Fixture, count: usize) -> Vec<Duration> {
    fixture.wait_for_requests(count).windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

/// The rows of the outbox: the decky, and the reason of a rejected delta.
fn outbox_rows(fixture: &Fixture) -> Vec<(String, Option<String>)> {
    let outbox = rusqlite::Connection::open(fixture.outbox()).unwrap();
    let mut select = outbox.prepare("SELECT decky, rejected FROM delta ORDER BY id").unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

fn rejected(decky: &str) -> (String, Option<String>) {
    (decky.to_owned(), Some("http-422: invalid delta".to_owned()))
}

#[test]
fn failure_on_a_reused_connection_is_retried_once_at_once() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::CutAfterBody(Effect::Lost), Fault::CutAfterBody(Effect::Lost)]);
    tick.send(now()).unwrap();
    let waits = gaps(&fixture, 4);
    let connections: Vec<_> =
        fixture.master.received().iter().take(4).map(|request| request.connection).collect();
    assert_eq!(connections, [1, 1, 2, 3]);
    assert!(waits[1] < Duration::from_millis(450), "at once: {waits:?}");
    assert!(waits[2] >= Duration::from_millis(500), "not a third time: {waits:?}");
    wait_for_stats(&heartbeat, |stats| stats.beats >= 2 && stats.failure.is_none());
}

#[test]
fn delta_that_becomes_held_is_not_retried() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::CutAfterSilence(Duration::from_millis(700))]);
    heartbeat.deltas().push_all(["d", "e"].map(deployed)).unwrap();
    fixture.wait_for_requests(2);
    // The master has received the delta, which the heartbeat does not know without an answer.
    let newer = heartbeat.begin(Operation::Deploy, ["d"]).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!((stats.held, stats.operations, stats.failure.is_none()), (1, 1, true));
    newer.fail("newer");
    wait_for_stats(&heartbeat, |stats| stats.delivered == 3);
    let sent: Vec<_> = fixture
        .master
        .received()
        .iter()
        .map(deckies)
        .filter(|deckies| !deckies.is_empty())
        .collect();
    assert_eq!(sent, [vec!["e", "d"], vec!["e"], vec!["d", "d"]]);
}

#[test]
fn failure_on_a_new_connection_is_not_retried_at_once() {
    let fixture = Fixture::new();
    fixture.master.script([Fault::CutAfterBody(Effect::Lost)]);
    let (builder, _tick) = fixture.builder();
    let _heartbeat = builder.start().unwrap();
    let waits = gaps(&fixture, 2);
    assert!(
        (Duration::from_millis(500)..Duration::from_secs(1) + SLACK).contains(&waits[0]),
        "{waits:?}"
    );
}

#[test]
fn backoff_doubles_and_success_resets_it() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let busy = || Fault::Answer(Answer::status(429));
    fixture.master.script([busy(), busy(), busy(), Fault::Serve, busy()]);
    tick.send(now()).unwrap();
    // A tick or a delta does not shorten the backoff.
    heartbeat.deltas().push(deployed("d")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    let waits = gaps(&fixture, 7);
    // Each backoff is between half and all of 1 s, 2 s, 4 s, and after the success of 1 s.
    for (index, most) in [(1, 1), (2, 2), (3, 4), (5, 1)] {
        let most = Duration::from_secs(most);
        assert!((most / 2..most + SLACK).contains(&waits[index]), "{index}: {waits:?}");
    }
}

#[test]
fn retry_after_is_honoured_with_a_minimum_of_a_second() {
    // Taken before the date, because starting the heartbeats takes a part of its four seconds.
    let since = Instant::now();
    let in_four_seconds = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(4));
    let values = [
        ("2".to_owned(), 2),
        // A date is in whole seconds: up to one of the four seconds is lost.
        (in_four_seconds(), 3),
        ("0".to_owned(), 1),
        ("Sun, 06 Nov 1994 08:49:37 GMT".to_owned(), 1),
    ];
    let started = values.map(|(value, least)| {
        let fixture = Fixture::new();
        fixture.master.script([Fault::Answer(Answer::status(429).header("Retry-After", &value))]);
        let heartbeat = fixture.builder().0.start().unwrap();
        (fixture, heartbeat, value, Duration::from_secs(least))
    });
    for (fixture, _heartbeat, value, least) in started {
        fixture.wait_for_requests(2);
        let wait = fixture.master.received()[1].at - since;
        assert!((least..least + SLACK).contains(&wait), "{value}: {wait:?}");
    }
}

#[test]
fn rejected_host_waits_for_its_tick_despite_a_push() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.decommission(&fixture.worker.uuid);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(deployed("d")).unwrap();
    // The first backoff would end within this time.
    let more =
        fixture.master.wait_until(Duration::from_millis(1_300), |seen| seen.received().len() > 2);
    assert!(!more, "{:?}", heartbeat.stats());
    tick.send(now()).unwrap();
    let failing = wait_for_stats(&heartbeat, |stats| {
        stats.failure.as_ref().is_some_and(|failure| failure.count == 2)
    });
    assert_eq!((failing.waiting, fixture.master.received().len()), (1, 3));
}

#[test]
fn restart_ignores_an_earlier_retry_after() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.always(Some(Fault::Answer(Answer::status(503).header("Retry-After", "600"))));
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(deployed("d")).unwrap();
    assert_eq!(heartbeat.stop(TIMEOUT).undelivered, 1);
    fixture.master.always(None);
    let (builder, _tick) = fixture.builder();
    let since = Instant::now();
    let heartbeat = builder.start().unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert!(since.elapsed() < SLACK, "{:?}", since.elapsed());
    assert!(stats.failure.is_none() && stats.waiting == 0, "{stats:?}");
}

#[test]
fn rejected_delta_stays_in_the_file_and_is_never_sent_again() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.always(Some(reject_bad_deltas()));
    heartbeat.deltas().push_all(["a", "bad", "b"].map(deployed)).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.rejected == 1);
    assert_eq!((stats.waiting, stats.dropped), (0, 0));
    assert!(heartbeat.flush(TIMEOUT), "the rejection is in the file, too");
    assert_eq!(outbox_rows(&fixture), [rejected("bad")]);
    assert_eq!(heartbeat.stop(TIMEOUT).undelivered, 0);
    fixture.master.always(None);
    let before = fixture.master.received().len();
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    heartbeat.deltas().push(deployed("c")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 3);
    let sent: Vec<_> = fixture.master.received().iter().skip(before).flat_map(deckies).collect();
    assert_eq!(sent, ["c"]);
    heartbeat.stop(TIMEOUT);
    assert_eq!(outbox_rows(&fixture), [rejected("bad")]);
}

#[test]
fn each_bad_delta_of_a_body_is_found_and_the_others_are_delivered() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.always(Some(reject_bad_deltas()));
    // The oldest, the newest, and two that are neighbours.
    let name = |n| {
        if [0, 20, 21, 39].contains(&n) { format!("bad-{n:02}") } else { format!("d{n:02}") }
    };
    let names: Vec<_> = (0..40).map(name).collect();
    heartbeat.deltas().push_all(names.iter().map(|name| deployed(name))).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.rejected == 4 && stats.delivered == 36);
    assert_eq!((stats.waiting, stats.dropped), (0, 0));
    assert!(heartbeat.flush(TIMEOUT), "the last answer is in the file");
    assert_eq!(
        outbox_rows(&fixture),
        names
            .iter()
            .filter(|name| name.starts_with('b'))
            .map(|it| rejected(it))
            .collect::<Vec<_>>()
    );
    // Each bad delta causes a rejected body, one without deltas, and the halving of the body.
    let requests = fixture.master.received().len();
    assert!(requests <= 1 + 4 * (2 + 7) + 4, "{requests}");
}

#[test]
fn bad_delta_among_a_thousand_costs_a_dozen_requests() {
    for place in [0, 333, 599, 600, 1_099] {
        let fixture = Fixture::new();
        let (heartbeat, _tick) = fixture.start_heartbeat();
        fixture.master.always(Some(reject_bad_deltas()));
        let name = |n| if n == place { "bad".to_owned() } else { format!("d{n}") };
        heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&name(n)))).unwrap();
        wait_for_stats(&heartbeat, |stats| stats.rejected == 1 && stats.delivered == 1_099);
        assert!(heartbeat.flush(TIMEOUT), "the rejection is in the file, too");
        assert_eq!(outbox_rows(&fixture), [rejected("bad")]);
        let requests = fixture.master.received().len();
        assert!(requests <= 1 + 4 + 2 + 10, "{place}: {requests}");
    }
}

#[test]
fn body_rejected_once_costs_a_dozen_requests() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.script([Fault::Answer(Answer::status(422))]);
    heartbeat.deltas().push_all((0..1_100).map(|n| deployed(&format!("d{n}")))).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1_100);
    let requests = fixture.master.received().len();
    assert!(requests <= 1 + 4 + 2 + 10, "{requests}");
}

#[test]
fn rejected_delta_is_no_failure_of_the_beat() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.always(Some(reject_bad_deltas()));
    heartbeat.deltas().push(deployed("bad")).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.rejected == 1);
    assert!(stats.failure.is_none(), "{:?}", stats.failure);
}

/// A 500 for each body that contains this text.
fn failing_on(part: &str) -> Fault {
    Fault::AnswerTo(part.as_bytes().to_vec(), Answer::status(500).body("Internal Server Error"))
}

#[test]
fn delta_that_fails_the_master_is_suspended_for_ten_beats() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.always(Some(failing_on("\"d.1\"")));
    heartbeat.deltas().push_all(["a", "d.1", "b"].map(deployed)).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.suspended == 1);
    assert_eq!((stats.rejected, stats.waiting), (0, 1));
    let tries =
        || fixture.master.received().iter().filter(|request| deckies(request) == ["d.1"]).count();
    assert_eq!(tries(), 1);
    let one_beat = || {
        let before = heartbeat.stats().beats;
        tick.send(now()).unwrap();
        assert!(wait_for_stats(&heartbeat, |stats| stats.beats > before).failure.is_none());
    };
    // Another delta is sent with the whole status.
    heartbeat.deltas().push(deployed("c")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 3);
    (0..8).for_each(|_| one_beat());
    assert_eq!(tries(), 1);
    fixture.master.always(None);
    for _ in 0..3 {
        one_beat();
    }
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 4);
    assert_eq!((stats.suspended, stats.rejected, stats.waiting, tries()), (0, 0, 0, 2));
}

#[test]
fn states_that_fail_the_master_are_suspended_for_ten_beats() {
    let fixture = Fixture::new();
    let (builder, tick) = fixture.builder();
    let source =
        || decnet_heartbeat::Snapshot::new(&serde_json::json!({"deployed": false, "pad": "large"}));
    fixture.master.always(Some(failing_on("\"pad\"")));
    let heartbeat = builder.status_source(source).start().unwrap();
    heartbeat.deltas().push(deployed("d")).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert!(stats.failure.is_none(), "{stats:?}");
    let one_beat = || {
        let before = heartbeat.stats().beats;
        tick.send(now()).unwrap();
        wait_for_stats(&heartbeat, |stats| stats.beats > before)
    };
    for _ in 0..5 {
        let fault = one_beat().status_fault.unwrap();
        assert_eq!(
            fault,
            "the states are left out because the master failed on them: http-500: Internal Server Error"
        );
    }
    fixture.master.always(None);
    // Ten beats after the failure the states are sent again. Then one body contains everything.
    while one_beat().status_fault.is_some() {
        assert!(fixture.master.received().len() < 60);
    }
    heartbeat.deltas().push(deployed("e")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    let last = fixture.master.received().pop().unwrap();
    assert_eq!(
        (deckies(&last), json_of(&last)["status"]["pad"].as_str()),
        (vec!["e".to_owned()], Some("large"))
    );
}

#[test]
fn page_of_a_gateway_rejects_no_delta() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let page =
        Answer::status(400).header("Content-Type", "text/html").body("<h1>400 Bad Request</h1>");
    fixture.master.always(Some(Fault::AnswerTo(b"\"d1\"".to_vec(), page)));
    heartbeat.deltas().push_all(["d0", "d1", "d2"].map(deployed)).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 2 && stats.suspended == 1);
    assert_eq!((stats.rejected, stats.waiting), (0, 1));
}
