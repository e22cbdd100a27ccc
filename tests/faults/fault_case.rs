//! A row of the table: a fault, and what is expected while it lasts. One driver runs all rows.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Fault as MasterFault};
use serde_json::Value;

use crate::agent_process::{AgentProcess, Footprint};
use crate::answer::RetryAfter;
use crate::credentials::BundleFault;
use crate::docker::DockerMode;
use crate::files::{StateFile, TopologyFile};
use crate::log;
use crate::tcp_proxy::ProxyMode;
use crate::test_bed::{SLACK, Scenario, TestBed};
use crate::tls::{Impostor, OtherServer};

/// A row. Its name consists of the place of the fault and the fault.
#[derive(Clone)]
pub struct FaultCase {
    pub name: String,
    pub scenario: Scenario,
    pub fault: Fault,
    pub expect: Expect,
}

/// What goes wrong, until the driver restores everything.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Open connections are closed, and the proxy is in this mode for new ones.
    Proxy(ProxyMode),
    /// The same, and the master answers every request with this fault.
    ProxyAndMaster(ProxyMode, MasterFault),
    /// Open connections are closed.
    CloseConnections,
    /// Open connections are reset.
    ResetConnections,
    /// Nothing is forwarded on open connections any more.
    FreezeConnections,
    /// The master answers every request with this fault.
    EveryRequest(MasterFault),
    /// The master answers the next request with this fault.
    NextRequest(MasterFault),
    /// Open connections are closed, and then the master answers every request with this fault.
    EveryRequestOnNewConnection(MasterFault),
    /// The master answers every request with this answer, whose `Location` is another master.
    Answer(Answer, RetryAfter),
    /// Another server has the master's address.
    Impostor(Impostor),
    Bundle(BundleFault),
    Docker(DockerMode),
    StateFile(StateFile),
    TopologyFile(TopologyFile),
}

/// What is expected while the fault lasts.
#[derive(Clone, Debug)]
pub enum Expect {
    /// The beat fails after this many seconds, with this class and with `detail` in its detail. The
    /// next attempt is made at `retry` and is accepted.
    Fails { class: &'static str, detail: &'static str, after: Range<f64>, retry: Retry },
    /// The delta is delivered after this many seconds, and no beat fails.
    Delivers { after: Range<f64> },
    /// The delta is delivered after this many seconds, no beat fails, and a beat is accepted with
    /// one of these texts in its `status.error`.
    DeliversWithoutStatus { after: Range<f64>, errors: &'static [&'static str] },
    /// The beat is on time and accepted. It names no decky, and its `status.error` contains one of
    /// these texts.
    StatusError(&'static [&'static str]),
    /// The beat is on time and accepted, and has this value at this JSON pointer.
    Field(&'static str, Value),
    /// The same as without a fault, except for one warning with this text.
    Warns(&'static str),
    /// A stop during the fault takes no longer than its grace. The delta is delivered after the
    /// next start.
    StopsInTime,
}

/// When the next attempt is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Retry {
    /// After the first backoff: half a second to one second.
    AfterBackoff,
    /// After at least this many seconds, and at most a tenth more.
    AfterSeconds(f64),
    /// At the next tick, and not earlier.
    AtNextTick,
}

/// The grace of a stop.
const GRACE: Duration = Duration::from_secs(1);

/// A wait from which on [`Retry::AfterSeconds`] is not waited for to its end.
const LONG_WAIT: f64 = 30.0;

impl FaultCase {
    pub fn new(name: impl Into<String>, fault: Fault, expect: Expect) -> Self {
        Self { name: name.into(), scenario: Scenario::default(), fault, expect }
    }

    pub fn in_scenario(mut self, scenario: Scenario) -> Self {
        self.scenario = scenario;
        self
    }

    /// The driver: it injects the fault, checks what is expected, and restores everything. After
    /// that no delta is lost, and the process has not grown.
    pub fn run(&self) {
        let mut bed = TestBed::new(self.scenario);
        let mut agent = bed.start();
        agent.push("before");
        agent.wait_for("the first delta", |stats| stats["delivered"] == 1);
        let before = agent.footprint();
        if let Expect::Warns(text) = self.expect {
            assert_eq!(agent.log_lines(text), [""; 0], "the warning is logged before the fault");
        }
        let other = self.fault.inject(&mut bed);
        agent.push("during");
        let recovers_soon = self.expect.check(&mut bed, &mut agent, other);
        if recovers_soon {
            agent.wait_for("the recovery", |stats| {
                stats["waiting"] == 0 && stats["failure"].is_null()
            });
            self.check_agent(&bed, &mut agent, before);
        }
        let stopped = agent.stop(GRACE);
        assert!(stopped["in_time"] == true && stopped["undelivered"] == 0, "{stopped}");
        // The loopback master has no status for a request that it answered with raw bytes.
        let is_raw = matches!(self.expect, Expect::Delivers { .. });
        let delivered = bed.deckies_in(|status| status == Some(204) || is_raw);
        assert_eq!(delivered, ["before", "during"]);
    }

    /// The process is as large as before, and its log has the expected form.
    fn check_agent(&self, bed: &TestBed, agent: &mut AgentProcess, before: Footprint) {
        agent.tick();
        agent.wait_for("a snapshot", |stats| {
            stats["snapshot_pending_since"].is_null() && stats["failure"].is_null()
        });
        let after = agent.footprint();
        assert_eq!(after.threads, before.threads, "{before:?}, {after:?}");
        assert!(after.descriptors <= before.descriptors + 2, "{before:?}, {after:?}");
        assert!(after.peak <= before.peak + self.scenario.growth, "{before:?}, {after:?}");
        log::check_log(bed, &agent.log());
        log::check_no_key(bed, &agent.stats().to_string());
    }
}

impl Fault {
    /// Returns the other server, if the fault needs one.
    pub fn inject(&self, bed: &mut TestBed) -> Option<OtherServer> {
        match self {
            Self::Proxy(mode) => {
                bed.proxy.set_mode(mode.clone());
                bed.proxy.close_connections();
            }
            Self::ProxyAndMaster(mode, fault) => {
                bed.master.always(Some(fault.clone()));
                bed.proxy.set_mode(mode.clone());
                bed.proxy.close_connections();
            }
            Self::CloseConnections => bed.proxy.close_connections(),
            Self::ResetConnections => bed.proxy.reset_connections(),
            Self::FreezeConnections => bed.proxy.freeze_connections(),
            Self::EveryRequest(fault) => bed.master.always(Some(fault.clone())),
            Self::EveryRequestOnNewConnection(fault) => {
                bed.master.always(Some(fault.clone()));
                bed.proxy.close_connections();
            }
            Self::NextRequest(fault) => bed.master.script([fault.clone()]),
            Self::Answer(answer, retry_after) => {
                return Some(OtherServer::redirect_to(bed, retry_after.add_to(answer.clone())));
            }
            Self::Impostor(impostor) => return Some(impostor.start(bed)),
            Self::Bundle(fault) => fault.inject(bed),
            Self::Docker(mode) => bed.docker.set_mode(*mode),
            Self::StateFile(file) => put_state_file(bed, *file),
            Self::TopologyFile(file) => bed.lock = file.put(&bed.agent_file("topology.db")),
        }
        None
    }
}

/// Removes every fault.
pub fn restore(bed: &mut TestBed) {
    BundleFault::restore(bed);
    bed.lock = None;
    bed.docker.set_mode(DockerMode::Works);
    put_state_file(bed, StateFile::GOOD);
    TopologyFile::Good.put(&bed.agent_file("topology.db"));
    bed.master.always(None);
    bed.proxy.set_target(bed.master.address());
    bed.proxy.set_mode(ProxyMode::Forward);
}

fn put_state_file(bed: &mut TestBed, file: StateFile) {
    // The earlier thread is ended first, because it writes to the same path.
    bed.replacer = None;
    bed.replacer = file.put(&bed.path("state.json"));
}

impl Expect {
    /// Checks the expectation and restores everything. Returns whether the heartbeat recovers soon
    /// after that.
    fn check(
        &self,
        bed: &mut TestBed,
        agent: &mut AgentProcess,
        other: Option<OtherServer>,
    ) -> bool {
        let pushed_at = Instant::now();
        match self {
            Self::Fails { class, detail, after, retry } => {
                let failed_at = wait_for_failure(agent, class, detail);
                assert_within(failed_at - pushed_at, after);
                restore(bed);
                other.into_iter().for_each(OtherServer::assert_no_request);
                return retry.check(agent, failed_at);
            }
            Self::Delivers { after } => check_delivery(agent, pushed_at, after),
            Self::DeliversWithoutStatus { after, errors } => {
                check_delivery(agent, pushed_at, after);
                agent.tick();
                assert!(
                    becomes_true(|| has_accepted_status_error(bed, errors)),
                    "{}",
                    agent.log_tail()
                );
            }
            Self::StatusError(errors) => check_status_error(bed, agent, errors),
            Self::Field(pointer, value) => {
                check_beats_are_on_time(agent);
                let has_value = || bed.last_body().pointer(pointer) == Some(value);
                assert!(becomes_true(has_value), "{:#}", bed.last_body());
            }
            Self::Warns(text) => {
                check_beats_are_on_time(agent);
                assert_eq!(agent.log_lines("beat failed"), [""; 0]);
                assert!(becomes_true(|| agent.log_lines(text).len() == 1), "{}", agent.log());
                let lines = agent.log_lines(text);
                assert!(lines[0].contains("[WARN]"), "{lines:?}");
            }
            Self::StopsInTime => {
                check_stop(bed, agent);
                restore(bed);
                *agent = bed.start();
                return true;
            }
        }
        restore(bed);
        other.into_iter().for_each(OtherServer::assert_no_request);
        true
    }
}

/// Asserts that a time is in this range of seconds. A busy machine may be late by [`SLACK`].
fn assert_within(time: Duration, range: &Range<f64>) {
    let seconds = time.as_secs_f64();
    assert!(
        (range.start..range.end + SLACK.as_secs_f64()).contains(&seconds),
        "after {seconds} s, not {range:?}"
    );
}

/// Whether a condition becomes true. It waits longer than a late snapshot takes. The log and the
/// requests are read repeatedly, because no event reports a line that another process logs.
pub fn becomes_true(condition: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(15);
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

fn check_delivery(agent: &mut AgentProcess, pushed_at: Instant, after: &Range<f64>) {
    agent.wait_for("the delivery", |stats| stats["delivered"] == 2);
    assert_within(pushed_at.elapsed(), after);
    assert_eq!(agent.log_lines("beat failed"), [""; 0]);
}

fn has_accepted_status_error(bed: &TestBed, errors: &[&str]) -> bool {
    let received = bed.master.received();
    let accepted = received.iter().filter(|request| request.status == Some(204));
    let mut bodies = accepted.filter_map(|request| request.json.as_ref());
    bodies.any(|body| has_status_error(body, errors))
}

fn has_status_error(body: &Value, errors: &[&str]) -> bool {
    let error = body["status"]["error"].as_str().unwrap_or_default();
    errors.iter().any(|text| error.contains(text))
}

/// Waits for a failure, and checks its class and detail in the stats and in the log. Returns its
/// time.
fn wait_for_failure(agent: &mut AgentProcess, class: &str, detail: &str) -> Instant {
    assert!(!detail.is_empty(), "a row asserts the detail of its failure");
    let what = format!("a failure of class {class}");
    let stats = agent.wait_for(&what, |stats| !stats["failure"].is_null());
    let failed_at = Instant::now();
    let failure = &stats["failure"];
    assert_eq!(failure["class"], class, "{failure}");
    assert!(failure["detail"].as_str().unwrap().contains(detail), "{failure}");
    // On a busy machine the second failure may come before this line.
    assert!((1..=2).contains(&failure["count"].as_u64().unwrap()), "{failure}");
    let field = format!("class={class} ");
    // The stats change before the line is logged.
    assert!(becomes_true(|| !agent.log_lines(&field).is_empty()), "{}", agent.log());
    let lines = agent.log_lines(&field);
    assert!(lines.len() <= 2 && lines[0].contains("failures=1 "), "{lines:#?}");
    failed_at
}

impl Retry {
    /// Waits for the next attempt and checks its time. Returns whether it was made: one that comes
    /// only after minutes is not waited for.
    fn check(self, agent: &mut AgentProcess, failed_at: Instant) -> bool {
        let assert_no_attempt_for = |agent: &mut AgentProcess, seconds| {
            // There is no event to wait for: no attempt is made in this time.
            thread::sleep(Duration::from_secs_f64(seconds));
            assert!(!agent.stats()["failure"].is_null(), "the next attempt was too early");
        };
        let expected = match self {
            Self::AfterBackoff => 0.4..1.0,
            Self::AfterSeconds(seconds) if seconds > LONG_WAIT => {
                assert_no_attempt_for(agent, 2.5);
                return false;
            }
            Self::AfterSeconds(seconds) => seconds - 0.1..seconds * 1.1,
            Self::AtNextTick => {
                assert_no_attempt_for(agent, 1.5);
                agent.tick();
                1.5..1.5
            }
        };
        agent.wait_for("the next attempt", |stats| stats["failure"].is_null());
        assert_within(failed_at.elapsed(), &expected);
        true
    }
}

/// Asserts that the beat of the delta, and that of a tick, are sent on time.
fn check_beats_are_on_time(agent: &mut AgentProcess) {
    let since = Instant::now();
    agent.wait_for("the beat of the delta", |stats| stats["delivered"] == 2);
    assert!(since.elapsed() < SLACK, "the beat of the delta came after {:?}", since.elapsed());
    let beats = agent.stats()["beats"].as_u64();
    agent.tick();
    let since = Instant::now();
    agent.wait_for("the beat of the tick", |stats| stats["beats"].as_u64() > beats);
    // The beat of a tick waits up to ten seconds for its snapshot.
    assert!(
        since.elapsed() < Duration::from_secs(10) + SLACK,
        "the beat of the tick came after {:?}",
        since.elapsed()
    );
}

fn check_status_error(bed: &TestBed, agent: &mut AgentProcess, errors: &[&str]) {
    check_beats_are_on_time(agent);
    let has_error = || has_status_error(&bed.last_body(), errors);
    assert!(becomes_true(has_error), "{:#}", bed.last_body()["status"]);
    assert_eq!(bed.last_body()["status"]["deckies"], Value::Null);
    let lines = agent.log_lines(" cannot be read: error=");
    assert!(lines.len() <= 2, "the error is logged again: {lines:#?}");
}

fn check_stop(bed: &TestBed, agent: &mut AgentProcess) {
    if bed.proxy.has_stalled().is_some() {
        assert!(becomes_true(|| bed.proxy.has_stalled() == Some(true)), "{}", agent.log_tail());
    } else {
        // The attempt is in progress by then. If it blocks before the master, no event reports it.
        thread::sleep(Duration::from_millis(300));
    }
    let stopped = agent.stop(GRACE);
    let seconds = stopped["seconds"].as_f64().unwrap();
    assert!(seconds < GRACE.as_secs_f64() + 0.6, "{stopped}");
    assert!(stopped["in_time"] == true && stopped["durable"] == true, "{stopped}");
}
