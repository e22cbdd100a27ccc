//! The process that dies: it pushes from four threads and tracks operations on a fifth, and says on stdout what it is about
//! to do and what has been promised. Each line is one write, so it is said even if the next instruction is the last.

use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use decnet_heartbeat::{DeltaSender, Enrolment, Error, Heartbeat, LifecycleDelta, Operation, Outcome, Snapshot};
use serde_json::json;

use crate::told::{operation_names, pushed};

pub const PUSHERS: u32 = 4;

/// Of a child: where its master and its files are, and which of the children it is.
pub fn run(arguments: &[String]) {
    let [agent_dir, uuid, port, run] = arguments else { panic!("--child AGENT_DIR UUID PORT RUN") };
    let run: u32 = run.parse().unwrap();
    // On stderr, which is the test's.
    simplelog::WriteLogger::init(log::LevelFilter::Error, simplelog::Config::default(), io::stderr()).unwrap();
    let enrolment = Enrolment::new(uuid, "127.0.0.1", Path::new(agent_dir)).unwrap();
    let heartbeat = Heartbeat::builder()
        .enrolment(enrolment.with_master_port(port.parse().unwrap()).unwrap())
        .status_source(|| Snapshot::new(&json!({"deployed": false, "deckies": []})))
        .agent_version(format!("run-{run}"))
        .interval(Duration::from_millis(50))
        .start()
        .unwrap();
    say("started");
    thread::scope(|scope| {
        for pusher in 0..PUSHERS {
            let deltas = heartbeat.deltas();
            scope.spawn(move || {
                for name in (0..).map(|n| format!("p-{run}-{pusher}-{n}")) {
                    say(&format!("try {name}"));
                    push(&deltas, &pushed(&name));
                    say(&format!("kept {name}"));
                }
            });
        }
        scope.spawn(|| operation_names(run).iter().for_each(|name| track(&heartbeat, name)));
    });
}

/// One operation from its beginning to its end, in one of the ways in which it may end.
fn track(heartbeat: &Heartbeat, name: &str) {
    say(&format!("begin {name}"));
    let mut tracked = until_kept(|| heartbeat.begin(Operation::Deploy, [name]));
    say(&format!("begun {name}"));
    // It lasts as long as a few commits, so that a kill finds it in flight.
    for n in 0..fastrand::u8(..12) {
        push(&heartbeat.deltas(), &LifecycleDelta::succeeded(format!("x-{n}"), Operation::Mutate));
    }
    match fastrand::u8(..4) {
        0 => ending(name, "succeeded", || tracked.succeed()),
        1 => ending(name, &format!("failed because {name}"), || tracked.fail(format!("because {name}"))),
        2 => ending(name, "succeeded", || tracked.settle(name, Outcome::Succeeded).unwrap()),
        _ => ending(name, "failed deploy ended without a verdict", || drop(tracked)),
    }
}

fn ending(name: &str, verdict: &str, end: impl FnOnce()) {
    say(&format!("end {name} {verdict}"));
    end();
    say(&format!("ended {name}"));
}

pub fn push(deltas: &DeltaSender, delta: &LifecycleDelta) {
    until_kept(|| deltas.push(delta.clone()));
}

/// On a machine so busy that the outbox takes longer than the second which a push may take, it is refused.
fn until_kept<T>(keep: impl Fn() -> Result<T, Error>) -> T {
    loop {
        match keep() {
            Ok(kept) => return kept,
            Err(error) => assert!(error.to_string().ends_with("is busy: nothing was kept"), "{error:?}"),
        }
    }
}

fn say(line: &str) {
    io::stdout().write_all(format!("{line}\n").as_bytes()).unwrap();
}
