//! The process that dies: it pushes from four threads and tracks operations on a fifth, and says on stdout what it is about
//! to do and what has been promised. Each line is one write, so it is said even if the next instruction is the last.

use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use decnet_heartbeat::{
    DeltaSender, Enrolment, Error, Heartbeat, LifecycleDelta, Operation, Outcome, Snapshot,
};
use serde_json::json;

use crate::told::{operation_names, pushed};

pub const PUSHERS: u32 = 4;

/// Half of what the outbox holds.
const MOST_WAITING: u64 = 5_000;

/// Of a child: where its master and its files are, and which of the children it is.
pub fn run(arguments: &[String]) {
    let [agent_dir, uuid, port, run] = arguments else { panic!("--child AGENT_DIR UUID PORT RUN") };
    let run: u32 = run.parse().unwrap();
    // On stderr, which is the test's.
    simplelog::WriteLogger::init(
        log::LevelFilter::Error,
        simplelog::Config::default(),
        io::stderr(),
    )
    .unwrap();
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
            let (heartbeat, deltas) = (&heartbeat, heartbeat.deltas());
            scope.spawn(move || {
                for name in (0..).map(|n| format!("p-{run}-{pusher}-{n}")) {
                    // An outbox that is full would drop the oldest, which is no loss by mistake.
                    while heartbeat.stats().waiting > MOST_WAITING {
                        thread::sleep(Duration::from_millis(1));
                    }
                    say(&format!("try {name}"));
                    if push(&deltas, &pushed(&name)) {
                        say(&format!("kept {name}"));
                    }
                }
            });
        }
        scope.spawn(|| operation_names(run).iter().for_each(|name| track(&heartbeat, name)));
    });
}

/// One operation from its beginning to its end, in one of the ways in which it may end.
fn track(heartbeat: &Heartbeat, name: &str) {
    say(&format!("begin {name}"));
    let mut tracked = until_begun(|| heartbeat.begin(Operation::Deploy, [name]));
    say(&format!("begun {name}"));
    // It lasts as long as a few commits, so that a kill finds it in flight.
    for n in 0..fastrand::u8(..12) {
        push(&heartbeat.deltas(), &LifecycleDelta::succeeded(format!("x-{n}"), Operation::Mutate));
    }
    match fastrand::u8(..4) {
        0 => ending(name, "succeeded", || tracked.succeed()),
        1 => ending(name, &format!("failed because {name}"), || {
            tracked.fail(format!("because {name}"))
        }),
        2 => ending(name, "succeeded", || tracked.end(name, Outcome::Succeeded).unwrap()),
        _ => ending(name, "failed deploy ended without a result", || drop(tracked)),
    }
}

fn ending(name: &str, verdict: &str, end: impl FnOnce()) {
    say(&format!("end {name} {verdict}"));
    end();
    say(&format!("ended {name}"));
}

/// Whether it was kept. On a machine so busy that the disk takes longer than a second, it is pushed again, unless it is in
/// doubt: then it may be sent, and nothing was promised.
pub fn push(deltas: &DeltaSender, delta: &LifecycleDelta) -> bool {
    loop {
        match deltas.push(delta.clone()) {
            Ok(()) => return true,
            Err(error) if error.is_in_doubt() => return false,
            Err(error) => check(&error),
        }
    }
}

/// On such a machine nothing has begun.
fn until_begun<T>(begin: impl Fn() -> Result<T, Error>) -> T {
    loop {
        match begin() {
            Ok(begun) => return begun,
            Err(error) if error.is_in_doubt() => (),
            Err(error) => check(&error),
        }
    }
}

fn check(error: &Error) {
    assert!(error.to_string().ends_with("nothing was queued, try again later"), "{error:?}");
}

fn say(line: &str) {
    io::stdout().write_all(format!("{line}\n").as_bytes()).unwrap();
}
