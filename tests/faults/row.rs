//! A row of the table: what goes wrong, and what is right then. One driver plays them all.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Fault as Wire};
use serde_json::Value;

use crate::answer::RetryAfter;
use crate::credentials::Bundle;
use crate::docker::Docker;
use crate::files::{StateFile, TopologyFile};
use crate::gate::Network;
use crate::log;
use crate::stage::{Footprint, SLACK, Stage, Subject, World};
use crate::tls::{Impostor, Posing};

/// A row, by its name: the table's first column, and what goes wrong.
pub struct Row {
    pub name: String,
    pub world: World,
    pub fault: Fault,
    pub right: Right,
}

/// What goes wrong, until the driver mends it.
#[derive(Clone, Debug)]
pub enum Fault {
    /// What is open is cut, and new connections fare like this.
    Network(Network),
    /// The same, and every request is answered like this.
    Both(Network, Wire),
    /// What is open is closed, or reset, or nothing goes through it any more.
    Cut,
    Reset,
    Freeze,
    /// Every request, or the next one, is answered like this.
    Always(Wire),
    Once(Wire),
    /// What is open is cut, and then every request is answered like this.
    Afresh(Wire),
    /// Every request is answered like this, and the answer names another master as the place to go to.
    Answer(Answer, RetryAfter),
    /// Another master has taken the address over.
    Master(Impostor),
    Bundle(Bundle),
    Docker(Docker),
    State(StateFile),
    Topology(TopologyFile),
}

/// What is right then.
#[derive(Clone, Debug)]
pub enum Right {
    /// The beat fails after so many seconds, in this class; the error has these words in it. The next attempt is made
    /// when `again` says, and is accepted.
    Fails { class: &'static str, says: &'static str, after: Range<f64>, again: Again },
    /// A delta is delivered after so many seconds, and no beat has failed.
    Delivers { after: Range<f64> },
    /// A delta is delivered after so many seconds, no beat has failed, and one is accepted whose `status.error` has these
    /// words in it.
    LeavesOut { after: Range<f64>, says: &'static str },
    /// The beat is on time and accepted, names no decky, and its `status.error` has these words in it; with a `|` between
    /// them, the ones or the others.
    Says(&'static str),
    /// The beat is on time, accepted, and this is in its JSON at that pointer.
    Tells(&'static str, Value),
    /// As if nothing were wrong, but for one warning with these words in it.
    Warns(&'static str),
    /// A stop, in the middle of it, takes no longer than its grace. What was pushed is delivered after the next start.
    Stops,
}

/// When the next attempt is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Again {
    /// After a first backoff: half a second to one.
    Soon,
    /// After so many seconds at the least, and a tenth more at the most.
    After(f64),
    /// With the next tick, and not before.
    AtATick,
}

/// The grace of a stop.
const GRACE: Duration = Duration::from_secs(1);

impl Row {
    pub fn new(name: impl Into<String>, fault: Fault, right: Right) -> Self {
        Self { name: name.into(), world: World::default(), fault, right }
    }

    pub fn with(mut self, world: World) -> Self {
        self.world = world;
        self
    }

    /// The driver: all is well, then something goes wrong, then it is well again. Nothing was lost, nothing has piled up.
    pub fn play(&self) {
        let mut stage = Stage::new(self.world);
        let mut subject = stage.start();
        subject.push("before");
        subject.until("the first delta", |stats| stats["delivered"] == 1);
        let before = subject.footprint();
        if let Right::Warns(words) = self.right {
            assert_eq!(subject.log_lines(words), [""; 0], "there is nothing to warn of yet");
        }
        let posing = self.fault.begin(&mut stage);
        subject.push("meanwhile");
        let is_soon_well = self.right.check(&mut stage, &mut subject, posing);
        if is_soon_well {
            subject.until("all to be well", |stats| {
                stats["waiting"] == 0 && stats["failure"].is_null()
            });
            self.check_health(&stage, &mut subject, before);
        }
        let stopped = subject.stop(GRACE);
        assert!(stopped["in_time"] == true && stopped["undelivered"] == 0, "{stopped}");
        // What an odd answer has accepted, the loopback master has not noted as accepted.
        let is_odd = matches!(self.right, Right::Delivers { .. });
        assert_eq!(stage.arrived(|status| status == Some(204) || is_odd), ["before", "meanwhile"]);
    }

    /// The process is as large as before, and its log is as it should be.
    fn check_health(&self, stage: &Stage, subject: &mut Subject, before: Footprint) {
        subject.tick();
        subject.until("the status to be known again", |stats| {
            stats["snapshot_pending_since"].is_null() && stats["failure"].is_null()
        });
        let after = subject.footprint();
        assert_eq!(after.threads, before.threads, "{before:?}, {after:?}");
        assert!(after.descriptors <= before.descriptors + 2, "{before:?}, {after:?}");
        assert!(after.peak <= before.peak + self.world.growth, "{before:?}, {after:?}");
        log::check(stage, &subject.log());
        log::check_secrets(stage, &subject.stats().to_string());
    }
}

impl Fault {
    pub fn begin(&self, stage: &mut Stage) -> Option<Posing> {
        match self {
            Self::Network(network) => {
                stage.gate.set(network.clone());
                stage.gate.cut();
            }
            Self::Both(network, answer) => {
                stage.master.always(Some(answer.clone()));
                stage.gate.set(network.clone());
                stage.gate.cut();
            }
            Self::Cut => stage.gate.cut(),
            Self::Reset => stage.gate.reset(),
            Self::Freeze => stage.gate.freeze(),
            Self::Always(answer) => stage.master.always(Some(answer.clone())),
            Self::Afresh(answer) => {
                stage.master.always(Some(answer.clone()));
                stage.gate.cut();
            }
            Self::Once(answer) => stage.master.script([answer.clone()]),
            Self::Answer(answer, retry_after) => {
                return Some(Posing::elsewhere(stage, retry_after.added_to(answer.clone())));
            }
            Self::Master(impostor) => return Some(impostor.replace_credentials(stage)),
            Self::Bundle(bundle) => bundle.put(stage),
            Self::Docker(docker) => stage.docker.set(*docker),
            Self::State(file) => put_state(stage, *file),
            Self::Topology(file) => stage.locked = file.put(&stage.agent_file("topology.db")),
        }
        None
    }
}

/// Makes everything well again.
pub fn mend(stage: &mut Stage) {
    Bundle::mend(stage);
    stage.locked = None;
    stage.docker.set(Docker::Works);
    put_state(stage, StateFile::GOOD);
    TopologyFile::Good.put(&stage.agent_file("topology.db"));
    stage.master.always(None);
    stage.gate.lead_to(stage.master.address());
    stage.gate.set(Network::Works);
}

fn put_state(stage: &mut Stage, file: StateFile) {
    // Dropped first: it writes to the same path.
    stage.replacing = None;
    stage.replacing = file.put(&stage.path("state.json"));
}

impl Right {
    /// Whether all is well soon after.
    fn check(&self, stage: &mut Stage, subject: &mut Subject, posing: Option<Posing>) -> bool {
        let pushed = Instant::now();
        match self {
            Self::Fails { class, says, after, again } => {
                let failed = failure(subject, class, says);
                within(failed - pushed, after);
                mend(stage);
                posing.into_iter().for_each(Posing::check);
                return again.check(subject, failed);
            }
            Self::Delivers { after } => {
                subject.until("the delivery", |stats| stats["delivered"] == 2);
                within(pushed.elapsed(), after);
                assert_eq!(subject.log_lines("beat failed"), [""; 0]);
            }
            Self::LeavesOut { after, says } => {
                subject.until("the delivery", |stats| stats["delivered"] == 2);
                within(pushed.elapsed(), after);
                assert_eq!(subject.log_lines("beat failed"), [""; 0]);
                subject.tick();
                let is_said = || {
                    stage
                        .master
                        .received()
                        .iter()
                        .filter(|request| request.status == Some(204))
                        .any(|request| {
                            let status = &request.json.as_ref().unwrap()["status"];
                            status["error"].as_str().is_some_and(|error| error.contains(says))
                        })
                };
                assert!(soon(is_said), "{}", subject.log_tail());
            }
            Self::Says(error) => said(stage, subject, error),
            Self::Tells(pointer, value) => {
                on_time(subject);
                let tells = || stage.last().pointer(pointer) == Some(value);
                assert!(soon(tells), "{:#}", stage.last());
            }
            Self::Warns(words) => {
                on_time(subject);
                assert_eq!(subject.log_lines("beat failed"), [""; 0]);
                assert!(soon(|| subject.log_lines(words).len() == 1), "{}", subject.log());
                assert!(
                    subject.log_lines(words)[0].contains("[WARN]"),
                    "{:?}",
                    subject.log_lines(words)
                );
            }
            Self::Stops => {
                stops(subject);
                mend(stage);
                *subject = stage.start();
                return true;
            }
        }
        mend(stage);
        posing.into_iter().for_each(Posing::check);
        true
    }
}

/// A busy machine may be late.
fn within(took: Duration, right: &Range<f64>) {
    let took = took.as_secs_f64();
    assert!(
        (right.start..right.end + SLACK.as_secs_f64()).contains(&took),
        "after {took} s, not {right:?}"
    );
}

/// Whether it is so before a late snapshot would have come.
fn soon(is_so: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(15);
    while !is_so() {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Waits for a failure of this class, which the stats and the log tell with these words. When it was.
fn failure(subject: &mut Subject, class: &str, says: &str) -> Instant {
    let stats =
        subject.until(&format!("a failure of class {class}"), |stats| !stats["failure"].is_null());
    let failed = Instant::now();
    let failure = &stats["failure"];
    assert_eq!(failure["class"], class, "{failure}");
    assert!(failure["detail"].as_str().unwrap().contains(says), "{failure}");
    // On a busy machine the second one may have come before it was looked for.
    assert!((1..=2).contains(&failure["count"].as_u64().unwrap()), "{failure}");
    let said = format!("class={class} ");
    // The stats know it just before the log does.
    assert!(soon(|| !subject.log_lines(&said).is_empty()), "{}", subject.log());
    let lines = subject.log_lines(&said);
    assert!(lines.len() <= 2 && lines[0].contains("failures=1 "), "{lines:#?}");
    failed
}

impl Again {
    /// Whether the next attempt was made; one that comes only after minutes is not waited for.
    fn check(self, subject: &mut Subject, failed: Instant) -> bool {
        let not_yet = |subject: &mut Subject, seconds| {
            thread::sleep(Duration::from_secs_f64(seconds));
            assert!(!subject.stats()["failure"].is_null(), "it was tried again too soon");
        };
        let right = match self {
            Self::Soon => 0.4..1.0,
            Self::After(seconds) if seconds > 30.0 => {
                not_yet(subject, 2.5);
                return false;
            }
            Self::After(seconds) => seconds - 0.1..seconds * 1.1,
            Self::AtATick => {
                not_yet(subject, 1.5);
                subject.tick();
                1.5..1.5
            }
        };
        subject.until("the next attempt", |stats| stats["failure"].is_null());
        within(failed.elapsed(), &right);
        true
    }
}

/// The delta's beat, and that of a tick, go out in their time.
fn on_time(subject: &mut Subject) {
    let since = Instant::now();
    subject.until("the delta's beat", |stats| stats["delivered"] == 2);
    assert!(since.elapsed() < SLACK, "the delta's beat came after {:?}", since.elapsed());
    let beats = subject.stats()["beats"].as_u64();
    subject.tick();
    let since = Instant::now();
    subject.until("the tick's beat", |stats| stats["beats"].as_u64() > beats);
    // A tick's beat has patience with its snapshot, ten seconds at the most.
    assert!(
        since.elapsed() < Duration::from_secs(10) + SLACK,
        "the tick's beat came after {:?}",
        since.elapsed()
    );
}

fn said(stage: &Stage, subject: &mut Subject, error: &str) {
    on_time(subject);
    let is_said = || {
        let last = stage.last();
        let said = last["status"]["error"].as_str().unwrap_or_default();
        error.split('|').any(|words| said.contains(words))
    };
    assert!(soon(is_said), "{:#}", stage.last()["status"]);
    assert_eq!(stage.last()["status"]["deckies"], Value::Null);
    let lines = subject.log_lines(" cannot be read: error=");
    assert!(lines.len() <= 2, "once it is said, it is said: {lines:#?}");
}

fn stops(subject: &mut Subject) {
    // In the middle of it.
    thread::sleep(Duration::from_millis(300));
    let stopped = subject.stop(GRACE);
    let took = stopped["seconds"].as_f64().unwrap();
    assert!(took < GRACE.as_secs_f64() + 0.6, "{stopped}");
    assert!(stopped["in_time"] == true && stopped["kept"] == true, "{stopped}");
}
