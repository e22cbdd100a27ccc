//! A decommissioned host: its files are deleted, and the master rejects it.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Fault};
use decnet_heartbeat::{EnrolmentSources, Heartbeat};

use crate::support::{ChildProcess, Fixture, TIMEOUT, nothing_deployed, wait_for_stats};

const INTERVAL: Duration = Duration::from_millis(50);

/// The number of intervals for which the host must be rejected.
const INTERVALS: u32 = 20;

/// Deletes the files as the agent does when it removes itself, and removes the host at the master.
fn decommission(fixture: &Fixture) {
    fs::remove_dir_all(fixture.agent_dir()).unwrap();
    fs::remove_file(fixture.ini()).unwrap();
    fixture.master.decommission(&fixture.worker.uuid);
}

#[test]
fn decommissioned_run_exits_78_after_twenty_intervals() {
    let fixture = Fixture::new();
    let mut run = ChildProcess::start(fixture.run_command().args(["--interval", "50ms"]));
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    decommission(&fixture);
    let since = Instant::now();
    let log = run.stderr_lines();
    let code = run.wait(TIMEOUT).code();
    assert!(since.elapsed() >= INTERVAL * INTERVALS, "{:?}", since.elapsed());
    let log: Vec<String> = log.iter().collect();
    assert_eq!(code, Some(78), "{log:#?}");
    let errors: Vec<_> = log.iter().filter(|line| line.contains("host decommissioned")).collect();
    let [error] = errors.as_slice() else { panic!("{log:#?}") };
    assert!(error.contains("[ERROR]") && error.contains(&fixture.worker.uuid), "{error}");
    let last = log.last().unwrap();
    assert!(
        last.starts_with("decnet-heartbeat: not enrolled: this host was decommissioned"),
        "{last}"
    );
    let rejected =
        fixture.master.received().iter().filter(|request| request.status == Some(404)).count();
    assert!(rejected as u32 > INTERVALS, "{rejected}");
}

#[test]
fn rejected_host_with_its_files_keeps_beating() {
    let fixture = Fixture::new();
    let mut run = ChildProcess::start(fixture.run_command().args(["--interval", "50ms"]));
    // The pipe must be read, so that the log does not block.
    let _log = run.stderr_lines();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    fixture.master.decommission(&fixture.worker.uuid);
    fixture.wait_for_more_requests(3 * INTERVALS as usize);
    // An operator may enrol it again.
    run.assert_is_running();
}

/// An interruption of the rejections of a host without files: its name, how it begins, and how it
/// ends.
type Interruption = (&'static str, fn(&Fixture), fn(&Fixture));

const INTERRUPTIONS: [Interruption; 6] = [
    ("accepted", |fixture| answer_once(fixture, 204), |_| ()),
    ("failed", |fixture| answer_once(fixture, 503), |_| ()),
    ("cut", |fixture| fixture.master.script([Fault::CutInBody, Fault::CutInBody]), |_| ()),
    ("ini", |fixture| fixture.write_ini(), |fixture| fs::remove_file(fixture.ini()).unwrap()),
    (
        "key",
        |fixture| {
            fs::create_dir(fixture.agent_dir()).unwrap();
            symlink("nowhere", fixture.agent_dir().join("worker.key")).unwrap();
        },
        |fixture| fs::remove_dir_all(fixture.agent_dir()).unwrap(),
    ),
    // Opening a file of the bundle fails with ENOTDIR.
    (
        "unreadable",
        |fixture| fs::write(fixture.agent_dir(), "").unwrap(),
        |fixture| fs::remove_file(fixture.agent_dir()).unwrap(),
    ),
];

fn answer_once(fixture: &Fixture, status: u16) {
    fixture.master.script([Fault::Answer(Answer::status(status))]);
}

#[test]
fn each_interruption_restarts_the_twenty_intervals() {
    thread::scope(|scope| {
        for interruption in INTERRUPTIONS {
            scope.spawn(move || assert_restarts_the_intervals(interruption));
        }
    });
}

fn assert_restarts_the_intervals((name, begin, end): Interruption) {
    let fixture = Fixture::new();
    fixture.write_ini();
    let sources =
        EnrolmentSources::from_variables([("HOME", "/nonexistent")]).config(fixture.ini());
    let heartbeat = Heartbeat::builder()
        .enrolment(sources.agent_dir(fixture.agent_dir()).read().unwrap())
        .status_source(nothing_deployed)
        .interval(INTERVAL)
        .start()
        .unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats >= 1);
    decommission(&fixture);
    // Twice the required number of rejections, interrupted after each half of that number.
    for _ in 0..4 {
        fixture.wait_for_more_requests(INTERVALS as usize / 2);
        assert!(!heartbeat.stats().decommissioned, "{name}");
        begin(&fixture);
        // The first request may have been sent before.
        fixture.wait_for_more_requests(3);
        end(&fixture);
    }
    wait_for_stats(&heartbeat, |stats| stats.decommissioned);
    // An embedded heartbeat keeps beating, and notices a new enrolment.
    answer_once(&fixture, 204);
    wait_for_stats(&heartbeat, |stats| !stats.decommissioned);
}
