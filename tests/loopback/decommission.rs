//! A host that was decommissioned: its files are gone, and the master does not accept it any more.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Child;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Fault};
use decnet_heartbeat::{EnrolmentSources, Heartbeat};

use crate::program::run;
use crate::support::{PATIENCE, Stage, nothing_deployed, settled};

const INTERVAL: Duration = Duration::from_millis(50);

/// Intervals for which a host must be refused.
const INTERVALS: u32 = 20;

fn ini(stage: &Stage) -> PathBuf {
    stage.dir.path().join("decnet.ini")
}

/// As the agent removes itself, and the master then answers.
fn decommission(stage: &Stage) {
    fs::remove_dir_all(stage.agent_dir()).unwrap();
    fs::remove_file(ini(stage)).unwrap();
    stage.master.decommission(&stage.worker.uuid);
}

fn await_more(stage: &Stage, count: usize) {
    let before = stage.master.received().len();
    assert!(stage.master.wait_until(PATIENCE, |seen| seen.received().len() >= before + count));
}

/// What it exits with, and what it has said.
fn ended(mut child: Child) -> (Option<i32>, String) {
    let mut stderr = child.stderr.take().unwrap();
    let (sender, all) = channel();
    let reader = thread::spawn(move || {
        let mut said = String::new();
        stderr.read_to_string(&mut said).unwrap();
        sender.send(said).unwrap();
    });
    let in_time = all.recv_timeout(PATIENCE);
    if in_time.is_err() {
        child.kill().unwrap();
    }
    reader.join().unwrap();
    (child.wait().unwrap().code(), in_time.unwrap())
}

#[test]
fn run_ends_with_78_after_twenty_intervals_and_not_before() {
    let stage = Stage::new();
    let child = run(&stage.worker, stage.dir.path()).args(["--interval", "50ms"]).spawn().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    decommission(&stage);
    let since = Instant::now();
    let (code, said) = ended(child);
    assert!(since.elapsed() >= INTERVAL * INTERVALS, "{:?}", since.elapsed());
    assert_eq!(code, Some(78), "{said}");
    let logged: Vec<_> = said.lines().filter(|line| line.contains("host decommissioned")).collect();
    let [logged] = logged.as_slice() else { panic!("{said}") };
    assert!(logged.contains("[ERROR]") && logged.contains(&stage.worker.uuid), "{logged}");
    let last = said.lines().last().unwrap();
    assert!(
        last.starts_with("decnet-heartbeat: not enrolled: this host was decommissioned"),
        "{last}"
    );
    let refused =
        stage.master.received().iter().filter(|request| request.status == Some(404)).count();
    assert!(refused as u32 > INTERVALS, "{refused}");
}

#[test]
fn a_host_that_is_refused_and_has_its_files_goes_on() {
    let stage = Stage::new();
    let mut child =
        run(&stage.worker, stage.dir.path()).args(["--interval", "50ms"]).spawn().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    stage.master.decommission(&stage.worker.uuid);
    await_more(&stage, 3 * INTERVALS as usize);
    assert_eq!(child.try_wait().unwrap(), None, "an operator may enrol it again");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Something that is done to a host, whose files are gone, and undone with the second one.
type Break = (&'static str, fn(&Stage), fn(&Stage));

const BREAKS: [Break; 6] = [
    ("accepted", |stage| answer(stage, 204), |_| ()),
    ("failed", |stage| answer(stage, 503), |_| ()),
    ("cut", |stage| stage.master.script([Fault::CutInBody, Fault::CutInBody]), |_| ()),
    (
        "ini",
        |stage| stage.worker.write_ini(&ini(stage)).unwrap(),
        |stage| fs::remove_file(ini(stage)).unwrap(),
    ),
    (
        "key",
        |stage| {
            fs::create_dir(stage.agent_dir()).unwrap();
            symlink("nowhere", stage.agent_dir().join("worker.key")).unwrap();
        },
        |stage| fs::remove_dir_all(stage.agent_dir()).unwrap(),
    ),
    // Looking for the bundle is ENOTDIR.
    (
        "unreadable",
        |stage| fs::write(stage.agent_dir(), "").unwrap(),
        |stage| fs::remove_file(stage.agent_dir()).unwrap(),
    ),
];

fn answer(stage: &Stage, status: u16) {
    stage.master.script([Fault::Answer(Answer::status(status))]);
}

#[test]
fn every_break_starts_the_twenty_intervals_anew() {
    thread::scope(|scope| {
        for case in BREAKS {
            scope.spawn(move || is_started_anew_by(case));
        }
    });
}

fn is_started_anew_by((name, happens, ends): Break) {
    let stage = Stage::new();
    stage.worker.write_ini(&ini(&stage)).unwrap();
    let sources = EnrolmentSources::from_variables([("HOME", "/nonexistent")]).config(ini(&stage));
    let heartbeat = Heartbeat::builder()
        .enrolment(sources.agent_dir(stage.agent_dir()).read().unwrap())
        .status_source(nothing_deployed)
        .interval(INTERVAL)
        .start()
        .unwrap();
    settled(&heartbeat, |stats| stats.beats >= 1);
    decommission(&stage);
    // Four times half of what it takes.
    for _ in 0..4 {
        await_more(&stage, INTERVALS as usize / 2);
        assert!(!heartbeat.stats().decommissioned, "{name}");
        happens(&stage);
        // The first may have been under way.
        await_more(&stage, 3);
        ends(&stage);
    }
    settled(&heartbeat, |stats| stats.decommissioned);
    // An embedder's goes on, and says so when it is enrolled again.
    answer(&stage, 204);
    settled(&heartbeat, |stats| !stats.decommissioned);
}
