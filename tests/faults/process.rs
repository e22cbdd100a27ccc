//! Faults of the process itself: clock jumps, suspension, threads that cannot be started, stops at
//! any moment, and a second heartbeat.

use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Effect, Fault as MasterFault, Role};

use crate::agent::LIMIT_MEMORY;
use crate::agent_process::AgentProcess;
use crate::fault_case::{Expect, Fault, FaultCase};
use crate::network::large_status;
use crate::tcp_proxy::ProxyMode;
use crate::test_bed::{SLACK, Scenario, TIMEOUT, TestBed, Ticks};
use crate::tls::Impostor;

pub fn cases() -> Vec<FaultCase> {
    let case = |name: &str, fault| {
        FaultCase::new(format!("process/stop_during_{name}"), fault, Expect::StopsInTime)
    };
    vec![
        case("connect", Fault::Proxy(ProxyMode::DropConnectionRequests)),
        case("handshake", Fault::Proxy(ProxyMode::Silent)),
        case("send", Fault::Proxy(ProxyMode::StallAfter(100_000))).in_scenario(large_status()),
        case("wait_for_answer", Fault::EveryRequest(MasterFault::NeverAnswer(Effect::Lost))),
        case("backoff", Fault::EveryRequest(Answer::status(503).into())),
    ]
}

/// Debian's path of the library that shows a process another clock.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// The clock jumps by ten years in either direction. Certificates are out of their dates then, and
/// the error says so. Timeouts and intervals use another clock: there is neither a burst nor a
/// silence.
pub fn clock_jump_affects_only_certificate_checks() {
    for (jump, detail) in [
        ("+10y", "has expired by this host's clock, which shows 203"),
        ("-10y", "is not yet valid by this host's clock, which shows 201"),
    ] {
        let bed = TestBed::new(Scenario::default());
        let clock = bed.path("clock");
        std::fs::write(&clock, "+0").unwrap();
        let mut agent = bed.spawn(&[
            ("LD_PRELOAD", FAKETIME),
            ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]);
        assert_eq!(agent.read_reply(), "started");
        agent.wait_for("the first beat", |stats| stats["beats"] == 1);
        std::fs::write(&clock, jump).unwrap();
        // An open connection is not affected.
        agent.push("open");
        agent.wait_for("a delivery", |stats| stats["delivered"] == 1);
        let completed_at = bed.last_body()["lifecycle"][0]["completed_at"].clone();
        let decade = &completed_at.as_str().unwrap()[..3];
        assert!(detail.ends_with(decade), "the agent's clock does not jump: {completed_at}");
        // A resumed session does not check the certificate again. With another server there is no
        // session to resume.
        let other = Impostor::WithRole(Role::Master).start(&bed);
        agent.push("closed");
        let stats = agent.wait_for("a failure", |stats| !stats["failure"].is_null());
        let failure = &stats["failure"];
        assert_eq!(failure["class"], "tls");
        assert!(failure["detail"].as_str().unwrap().contains(detail), "{failure}");
        // There is no event to wait for: the attempts in this time are counted.
        std::thread::sleep(Duration::from_secs(3));
        let count = agent.stats()["failure"]["count"].as_u64().unwrap();
        assert!((2..=4).contains(&count), "attempts after about 1, 2 and 4 seconds: {count}");
        other.assert_no_request();
        bed.proxy.set_target(bed.master.address());
        std::fs::write(&clock, "+0").unwrap();
        agent.wait_for("the recovery", |stats| {
            stats["delivered"] == 2 && stats["failure"].is_null()
        });
        assert_eq!(agent.stop(Duration::from_secs(2))["in_time"], true);
        // The library does not remove these.
        for name in ["faketime_shm", "sem.faketime_sem"] {
            let _ = std::fs::remove_file(format!("/dev/shm/{name}_{}", agent.id()));
        }
    }
}

/// After a suspension of eight intervals there is one beat for all missed ticks, and then one beat
/// per interval.
pub fn suspension_causes_no_burst() {
    let interval = Duration::from_millis(500);
    let bed = TestBed::new(Scenario { interval, ticks: Ticks::FromTimer, ..Scenario::default() });
    let agent = bed.start();
    agent.signal("STOP");
    // The fault is the suspension itself.
    std::thread::sleep(interval * 8);
    let before = bed.master.received().len();
    let resumed = Instant::now();
    agent.signal("CONT");
    // There is no event to wait for: the beats in this time are counted.
    std::thread::sleep(interval * 4);
    let times: Vec<_> =
        bed.master.received()[before..].iter().map(|request| request.at - resumed).collect();
    assert!((3..=6).contains(&times.len()), "{times:?}");
    assert!(times[0] < interval + SLACK, "{times:?}");
    let burst = times.iter().filter(|time| **time < interval * 4 / 5).count();
    assert!(burst <= 2, "more than one beat for missed ticks, and a tick: {times:?}");
}

/// An agent without a delta sender: the channels of dropped senders wake no thread.
pub fn dropped_senders_cause_no_wakeups() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    agent.command("drop_sender");
    // No event reports that all threads sleep, or that none wakes up.
    std::thread::sleep(Duration::from_millis(300));
    let before = agent.sleeps();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(agent.sleeps(), before, "a thread woke up");
    agent.tick();
    agent.wait_for("a beat", |stats| stats["beats"] == 2);
    assert_eq!(agent.stop(Duration::from_secs(1))["in_time"], true);
}

/// There is no memory for another stack.
pub fn failed_thread_start_is_an_error() {
    let bed = TestBed::new(Scenario::default());
    let reply = bed.spawn(&[(LIMIT_MEMORY, "1")]).read_reply();
    let error = reply["error"].as_str().unwrap();
    assert!(error.starts_with("cannot start the thread decnet-"), "{error}");
    // The failed start holds no lock, so the next start succeeds.
    bed.start();
}

pub fn stop_is_bounded_while_outbox_is_locked() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    bed.master.script([Answer::status(503).header("Retry-After", "600").into()]);
    agent.tick();
    agent.wait_for("a failure", |stats| !stats["failure"].is_null());
    agent.push("d");
    let other = rusqlite::Connection::open(bed.agent_file("heartbeat.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let stopped = agent.stop(Duration::from_secs(1));
    assert!(stopped["seconds"].as_f64().unwrap() < 1.6, "{stopped}");
    assert_eq!(stopped["in_time"], true, "{stopped}");
    // The master has the delta, and the file still contains it: it is sent again after the next
    // start.
    assert_eq!(stopped["undelivered"], 0, "{stopped}");
    assert_eq!(stopped["durable"], false, "{stopped}");
    assert_eq!(bed.deckies_in(|status| status == Some(204)), ["d"]);
}

/// A heartbeat that is dropped without a stop: the drop is bounded, and an undelivered delta is
/// sent after the next start.
pub fn drop_is_bounded_and_loses_no_delta() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    bed.master.always(Some(MasterFault::NeverAnswer(Effect::Lost)));
    let before = bed.master.received().len();
    agent.push("d");
    assert!(bed.master.wait_until(TIMEOUT, |seen| seen.received().len() > before));
    let seconds = agent.command("drop")["seconds"].as_f64().unwrap();
    assert!((1.5..2.6).contains(&seconds), "{seconds}");
    bed.master.always(None);
    bed.start().wait_for("the delivery", |stats| stats["delivered"] == 1);
}

/// The error names the file and the process that uses it.
fn assert_refused(error: &str, agent: &AgentProcess) {
    assert!(error.contains("heartbeat.db") && error.contains(&agent.id().to_string()), "{error}");
}

pub fn second_heartbeat_in_same_process_is_refused() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    let error = agent.command("start_second");
    assert_refused(error.as_str().unwrap(), &agent);
    agent.tick();
    agent.wait_for("a beat of the first heartbeat", |stats| stats["beats"] == 2);
}

pub fn second_heartbeat_in_other_process_is_refused() {
    let bed = TestBed::new(Scenario::default());
    let mut first = bed.start();
    let reply = bed.spawn(&[]).read_reply();
    assert_refused(reply["error"].as_str().unwrap(), &first);
    first.tick();
    first.wait_for("a beat of the first heartbeat", |stats| stats["beats"] == 2);
    // The lock is released when the process is killed.
    first.signal("KILL");
    drop(first);
    bed.start();
}
