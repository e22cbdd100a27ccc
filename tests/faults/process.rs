//! What happens to the process itself: clocks that jump, suspension, threads that cannot be had, stops at any moment, and
//! a second one.

use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Effect, Fault as Wire, Role};
use serde_json::json;

use crate::gate::Network;
use crate::row::{Fault, Right, Row};
use crate::stage::{SLACK, Stage, Subject, World};
use crate::subject::{NO_ROOM, Source};
use crate::tls::Impostor;

pub fn rows() -> Vec<Row> {
    const BIG: usize = 12 << 20;
    let big = World { source: Source::Of(BIG), growth: 8 * BIG as u64 / 1024, ..World::default() };
    let row = |name: &str, fault| Row::new(format!("process/stop_in_{name}"), fault, Right::Stops);
    vec![
        row("connect", Fault::Network(Network::Swallows)),
        row("handshake", Fault::Network(Network::IsMute)),
        row("send", Fault::Network(Network::StallsAfter(100_000))).with(big),
        row("wait", Fault::Always(Wire::NeverAnswer(Effect::Lost))),
        row("backoff", Fault::Always(Answer::status(503).into())),
    ]
}

/// Where Debian has the library that shows a process another clock.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// The clock jumps by ten years while it runs, either way: certificates are out of their dates by it, and say so. What is
/// timed is timed by another clock: there is neither a burst nor a silence.
pub fn wall_clock_jumps_ten_years() {
    for (jump, says) in [
        ("+10y", "has expired by this host's clock, which shows 203"),
        ("-10y", "is not yet valid by this host's clock, which shows 201"),
    ] {
        let stage = Stage::new(World::default());
        let clock = stage.path("clock");
        std::fs::write(&clock, "+0").unwrap();
        let clock_file = clock.to_str().unwrap();
        let mut subject = stage.spawn(&[
            ("LD_PRELOAD", FAKETIME),
            ("FAKETIME_TIMESTAMP_FILE", clock_file),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]);
        assert_eq!(subject.answer(), "started");
        subject.until("the first beat", |stats| stats["beats"] == 1);
        std::fs::write(&clock, jump).unwrap();
        // On the connection that is open nothing has changed.
        subject.push("open");
        subject.until("a delivery", |stats| stats["delivered"] == 1);
        let year = stage.last()["lifecycle"][0]["completed_at"].as_str().unwrap()[..3].to_owned();
        assert!(says.ends_with(&year), "the clock of this test does not jump: {year}");
        // A new connection does not look at a certificate again if it resumes a session; with another master it cannot.
        let other = Impostor::As(Role::Master).replace_credentials(&stage);
        subject.push("cut");
        let failure =
            subject.until("a failure", |stats| !stats["failure"].is_null())["failure"].clone();
        assert!(
            failure["class"] == "tls" && failure["detail"].as_str().unwrap().contains(says),
            "{failure}"
        );
        std::thread::sleep(Duration::from_secs(3));
        let count = subject.stats()["failure"]["count"].as_u64().unwrap();
        assert!((2..=4).contains(&count), "tried after about 1, 2 and 4 seconds: {count}");
        other.check();
        stage.gate.lead_to(stage.master.address());
        std::fs::write(&clock, "+0").unwrap();
        subject
            .until("all to be well", |stats| stats["delivered"] == 2 && stats["failure"].is_null());
        assert_eq!(subject.stop(Duration::from_secs(2))["in_time"], true);
        // The library leaves these behind.
        for name in ["faketime_shm", "sem.faketime_sem"] {
            let _ = std::fs::remove_file(format!("/dev/shm/{name}_{}", subject.id()));
        }
    }
}

/// Suspended for eight intervals: one beat says all there is to say, and then there is one every interval again.
pub fn suspended_and_resumed() {
    let interval = Duration::from_millis(500);
    let stage = Stage::new(World { interval, ticks: true, ..World::default() });
    let subject = stage.start();
    subject.signal("STOP");
    std::thread::sleep(interval * 8);
    let before = stage.master.received().len();
    let resumed = Instant::now();
    subject.signal("CONT");
    std::thread::sleep(interval * 4);
    let after: Vec<_> =
        stage.master.received()[before..].iter().map(|request| request.at - resumed).collect();
    assert!((3..=6).contains(&after.len()), "{after:?}");
    assert!(after[0] < interval + SLACK, "{after:?}");
    let burst = after.iter().filter(|at| **at < interval * 4 / 5).count();
    assert!(burst <= 2, "one for what was missed, and a tick: {after:?}");
}

/// An agent that only beats: what it does not hold cannot wake anything.
pub fn all_senders_dropped() {
    let stage = Stage::new(World::default());
    let mut subject = stage.start();
    subject.tell("forget");
    std::thread::sleep(Duration::from_millis(300));
    let before = subject.sleeps();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(subject.sleeps(), before, "no thread has woken up");
    subject.tick();
    subject.until("a beat", |stats| stats["beats"] == 2);
    assert_eq!(subject.stop(Duration::from_secs(1))["in_time"], true);
}

/// No memory for another stack.
pub fn a_thread_cannot_be_spawned() {
    let stage = Stage::new(World::default());
    let error = stage.spawn(&[(NO_ROOM, "1")]).answer()["error"].as_str().unwrap().to_owned();
    assert!(error.starts_with("cannot start the thread decnet-"), "{error}");
    // Nothing is left behind that would keep the next start from it.
    stage.start();
}

pub fn stop_while_the_outbox_is_locked() {
    let stage = Stage::new(World::default());
    let mut subject = stage.start();
    stage.master.script([Answer::status(503).header("Retry-After", "600").into()]);
    subject.tick();
    subject.until("a failure", |stats| !stats["failure"].is_null());
    subject.push("d");
    let other = rusqlite::Connection::open(stage.agent_file("heartbeat.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let stopped = subject.stop(Duration::from_secs(1));
    assert!(stopped["seconds"].as_f64().unwrap() < 1.6 && stopped["in_time"] == true, "{stopped}");
    // The master has it, and the file does not know that yet: after the next start it goes out once more.
    assert_eq!((&stopped["undelivered"], &stopped["kept"]), (&json!(0), &json!(false)));
    assert_eq!(stage.arrived(|status| status == Some(204)), ["d"]);
}

/// Forgotten, not stopped: bounded all the same, and what is undelivered is for the next start.
pub fn drop_without_stop() {
    let stage = Stage::new(World::default());
    let mut subject = stage.start();
    stage.master.always(Some(Wire::NeverAnswer(Effect::Lost)));
    subject.push("d");
    std::thread::sleep(Duration::from_millis(300));
    let seconds = subject.tell("drop")["seconds"].as_f64().unwrap();
    assert!((1.5..2.6).contains(&seconds), "{seconds}");
    stage.master.always(None);
    stage.start().until("the delivery", |stats| stats["delivered"] == 1);
}

/// What a second owner is told.
fn refused(error: &str, subject: &Subject) {
    assert!(error.contains("heartbeat.db") && error.contains(&subject.id().to_string()), "{error}");
}

pub fn two_heartbeats_in_one_process() {
    let stage = Stage::new(World::default());
    let mut subject = stage.start();
    let error = subject.tell("second");
    refused(error.as_str().unwrap(), &subject);
    subject.tick();
    subject.until("a beat of the first one", |stats| stats["beats"] == 2);
}

pub fn two_heartbeats_in_two_processes() {
    let stage = Stage::new(World::default());
    let mut first = stage.start();
    let error = stage.spawn(&[]).answer();
    refused(error["error"].as_str().unwrap(), &first);
    first.tick();
    first.until("a beat of the first one", |stats| stats["beats"] == 2);
    // Killed, it gives its place up.
    first.signal("KILL");
    drop(first);
    stage.start();
}
