//! What the program costs while nothing happens: its memory, its wake-ups between two ticks, and its size.
//!
//! `cargo bench --bench idle` runs the release program against a loopback master for two intervals of 30 s and reads
//! `/proc`. Linux only. `-- --interval 5s` makes it quicker, and the wake-ups count less.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot go on fails there and then")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use decnet_heartbeat::loopback::LoopbackMaster;

/// Goals: at most so much, or the bench fails.
const RESIDENT_MB: f64 = 8.0;
const BINARY_MB: f64 = 6.0;
const WAKE_UPS: u64 = 0;

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

fn main() {
    let interval = interval();
    let folder = tempfile::tempdir().unwrap();
    let master = LoopbackMaster::start().unwrap();
    let ini = folder.path().join("decnet.ini");
    master.enrol(&folder.path().join("agent")).unwrap().write_ini(&ini).unwrap();
    let mut child = run(&ini, folder.path(), interval);
    // The second beat comes after a random part of the interval; from then on the ticks are an interval apart.
    let patience = interval * 2 + Duration::from_secs(10);
    assert!(master.wait_for_beats(2, patience), "no second beat");
    let after_beat = settled(child.id());
    // Just short of the next tick. There is no event to wait for: what is measured is that none comes.
    assert!(!master.wait_for_beats(3, interval - interval / 10), "the third beat came early");
    let wake_ups = voluntary_switches(child.id()) - after_beat;
    assert!(master.wait_for_beats(3, patience), "no third beat");
    settled(child.id());
    let resident = status_kb(child.id(), "VmRSS:") / 1024.0;
    let anonymous = status_kb(child.id(), "RssAnon:") / 1024.0;
    child.kill().unwrap();
    child.wait().unwrap();

    let binary = fs::metadata(PROGRAM).unwrap().len() as f64 / 1024.0 / 1024.0;
    println!("{:<44} {:>10} {:>10}", format!("idle, interval {interval:?}"), "measured", "goal");
    println!("{:<44} {resident:>7.1} MB {RESIDENT_MB:>7.1} MB", "resident memory after three beats");
    println!("{:<44} {anonymous:>7.1} MB {:>10}", "anonymous memory of it", "");
    println!("{:<44} {wake_ups:>10} {WAKE_UPS:>10}", "wake-ups between two ticks, all threads");
    println!("{:<44} {binary:>7.1} MB {BINARY_MB:>7.1} MB", "stripped release binary");
    assert!(resident <= RESIDENT_MB && binary <= BINARY_MB && wake_ups == WAKE_UPS, "a goal is missed");
}

/// `--interval`, or 30 s. Cargo's own arguments are passed over.
fn interval() -> Duration {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--interval").skip(1);
    arguments.next().map_or(Duration::from_secs(30), |text| humantime::parse_duration(&text).expect("--interval 30s"))
}

fn run(ini: &Path, folder: &Path, interval: Duration) -> Child {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .arg("--config")
        .arg(ini)
        .arg("run")
        .args(["--interval", &format!("{}ms", interval.as_millis())]);
    command.arg("--state-file").arg(folder.join("none")).arg("--docker-socket").arg(folder.join("none"));
    command.stderr(Stdio::null()).spawn().unwrap()
}

/// The voluntary context switches once the beat is over: every thread sleeps, and two looks agree.
fn settled(process: u32) -> u64 {
    loop {
        let before = voluntary_switches(process);
        let asleep = tasks(process).all(|task| field(&task, "State:").starts_with('S'));
        std::thread::sleep(Duration::from_millis(50));
        if asleep && before == voluntary_switches(process) {
            return before;
        }
    }
}

/// How often the threads went to sleep of their own accord, and so woke up before.
fn voluntary_switches(process: u32) -> u64 {
    tasks(process).map(|task| field(&task, "voluntary_ctxt_switches:").parse::<u64>().unwrap()).sum()
}

/// `status` of each thread.
fn tasks(process: u32) -> impl Iterator<Item = String> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
}

fn status_kb(process: u32, name: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    field(&status, name).trim_end_matches(" kB").parse().unwrap()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of status").trim()
}
