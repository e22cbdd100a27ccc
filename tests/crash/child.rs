//! The process that is killed. It pushes from four threads and tracks operations on a fifth. It
//! reports on stdout what it is going to do and what has succeeded. Each line is one write, so it
//! is complete even if the process is killed after it.

use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use decnet_heartbeat::{
    DeltaSender, Enrolment, Error, Heartbeat, LifecycleDelta, Operation, Outcome, TrackedOperation,
};

use crate::child_reports::{delta_of, operation_names};
use crate::support::nothing_deployed;

pub const PUSHERS: u32 = 4;

/// Half of the outbox's capacity.
const MAX_WAITING: u64 = 5_000;

/// The main function of a child. Its arguments are its agent dir, uuid, port and number.
pub fn run(arguments: &[String]) {
    let [agent_dir, uuid, port, run] = arguments else { panic!("--child AGENT_DIR UUID PORT RUN") };
    let run: u32 = run.parse().unwrap();
    // stderr is that of the test program.
    let stderr = io::stderr();
    let config = simplelog::Config::default();
    simplelog::WriteLogger::init(log::LevelFilter::Error, config, stderr).unwrap();
    let enrolment = Enrolment::new(uuid, "127.0.0.1", Path::new(agent_dir)).unwrap();
    let heartbeat = Heartbeat::builder()
        .enrolment(enrolment.with_master_port(port.parse().unwrap()).unwrap())
        .status_source(nothing_deployed)
        .agent_version(format!("run-{run}"))
        .interval(Duration::from_millis(50))
        .start()
        .unwrap();
    report("started");
    thread::scope(|scope| {
        for pusher in 0..PUSHERS {
            let heartbeat = &heartbeat;
            scope.spawn(move || push_continuously(heartbeat, run, pusher));
        }
        scope.spawn(|| operation_names(run).iter().for_each(|name| track(&heartbeat, name)));
    });
}

fn push_continuously(heartbeat: &Heartbeat, run: u32, pusher: u32) {
    let deltas = heartbeat.deltas();
    for name in (0..).map(|n| format!("p-{run}-{pusher}-{n}")) {
        // A full outbox would drop the oldest deltas, which is not a loss by mistake. No event
        // reports the number of deltas, so it is polled.
        while heartbeat.stats().waiting > MAX_WAITING {
            thread::sleep(Duration::from_millis(1));
        }
        report(&format!("pushing {name}"));
        if push(&deltas, &delta_of(&name)) {
            report(&format!("queued {name}"));
        }
    }
}

/// Runs an operation that ends in a random way.
fn track(heartbeat: &Heartbeat, name: &str) {
    report(&format!("beginning {name}"));
    let mut tracked = begin(heartbeat, name);
    report(&format!("begun {name}"));
    // It takes as long as a few commits, so that some kills hit an operation in flight.
    for n in 0..fastrand::u8(..12) {
        push(&heartbeat.deltas(), &LifecycleDelta::succeeded(format!("x-{n}"), Operation::Mutate));
    }
    match fastrand::u8(..4) {
        0 => end(name, "succeeded", || tracked.succeed()),
        1 => end(name, &format!("failed because {name}"), || {
            tracked.fail(format!("because {name}"));
        }),
        2 => end(name, "succeeded", || tracked.end(name, Outcome::Succeeded).unwrap()),
        _ => end(name, "failed deploy ended without a result", || drop(tracked)),
    }
}

fn end(name: &str, outcome: &str, end: impl FnOnce()) {
    report(&format!("ending {name} {outcome}"));
    end();
    report(&format!("ended {name}"));
}

/// Pushes a delta, and returns whether it was queued. It is pushed again if the disk takes longer
/// than a second, as on a busy machine. It is not if the result is in doubt: then the delta may be
/// sent or not.
pub fn push(deltas: &DeltaSender, delta: &LifecycleDelta) -> bool {
    loop {
        match deltas.push(delta.clone()) {
            Ok(()) => return true,
            Err(error) if error.is_in_doubt() => return false,
            Err(error) => assert_may_retry(&error),
        }
    }
}

/// Begins an operation. It has not begun if the call fails, also if the result is in doubt.
fn begin(heartbeat: &Heartbeat, name: &str) -> TrackedOperation {
    loop {
        match heartbeat.begin(Operation::Deploy, [name]) {
            Ok(tracked) => return tracked,
            Err(error) if error.is_in_doubt() => (),
            Err(error) => assert_may_retry(&error),
        }
    }
}

fn assert_may_retry(error: &Error) {
    assert!(error.to_string().ends_with("nothing was queued, try again later"), "{error:?}");
}

fn report(line: &str) {
    io::stdout().write_all(format!("{line}\n").as_bytes()).unwrap();
}
