//! Which thread uses which files: only the outbox thread waits for the agent's disk.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use decnet_heartbeat::{EnrolmentSources, Operation};

use crate::support::{Loopback, commands, deployed, send_tick, wait_for_stats};

/// The traced process.
fn run_heartbeat(dir: &Path) {
    let loopback = Loopback::new(&dir.join("agent"));
    let ini = dir.join("decnet.ini");
    loopback.worker.write_ini(&ini).unwrap();
    let enrolment = EnrolmentSources::from_variables([("HOME", dir.to_str().unwrap())])
        .config(&ini)
        .read()
        .unwrap();
    let (builder, tick) = loopback.builder();
    let heartbeat = builder.enrolment(enrolment).start().unwrap();
    let next_beat = || {
        let beats = heartbeat.stats().beats;
        send_tick(&tick);
        wait_for_stats(&heartbeat, |stats| stats.beats > beats)
    };
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    heartbeat.deltas().push(deployed("d0")).unwrap();
    heartbeat.begin(Operation::Deploy, ["d1", "d2"]).unwrap().succeed();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 3 && stats.waiting == 0);
    // Renewed credentials, another host, and an outbox whose file is deleted.
    let renewed =
        loopback.master.re_enrol(&loopback.worker.uuid, &loopback.worker.agent_dir).unwrap();
    next_beat();
    next_beat();
    assert_eq!(heartbeat.stats().fingerprint, Some(renewed.fingerprint));
    let other = loopback.master.enrol(&loopback.worker.agent_dir).unwrap();
    other.write_ini(&ini).unwrap();
    next_beat();
    next_beat();
    assert_eq!(heartbeat.stats().host_uuid, Some(other.uuid.clone()));
    fs::remove_file(loopback.worker.agent_dir.join("heartbeat.db")).unwrap();
    next_beat();
    heartbeat.deltas().push(deployed("d3")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 4 && stats.waiting == 0);
    // The host is decommissioned.
    for file in ["ca.crt", "worker.crt", "worker.key"] {
        fs::remove_file(loopback.worker.agent_dir.join(file)).unwrap();
    }
    fs::remove_file(&ini).unwrap();
    loopback.master.decommission(&other.uuid);
    for failures in 1..4 {
        send_tick(&tick);
        wait_for_stats(&heartbeat, |stats| {
            stats.failure.as_ref().is_some_and(|failure| failure.count == failures)
        });
    }
    heartbeat.deltas().push(deployed("d4")).unwrap();
    assert_eq!(heartbeat.stop(std::time::Duration::from_secs(5)).undelivered, 1);
}

#[test]
#[ignore = "needs strace"]
fn only_outbox_thread_uses_agent_dir_and_heartbeat_thread_opens_no_file() {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_TRACED";
    if let Some(dir) = std::env::var_os(CHILD) {
        return run_heartbeat(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    // The trace has the kernel's paths, without symbolic links.
    let path = dir.path().canonicalize().unwrap();
    let trace = path.join("trace");
    let test = "threads::only_outbox_thread_uses_agent_dir_and_heartbeat_thread_opens_no_file";
    let child = commands::rerun_test(test);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-s", "4096", "--decode-pids=comm", "-o"]).arg(&trace).arg("-e");
    strace.arg("trace=%file,read,write,readv,writev,pread64,pwrite64,fsync,fdatasync,ftruncate,fcntl,flock,fallocate");
    commands::run(
        strace.arg("--").arg(child.get_program()).args(child.get_args()).env(CHILD, &path),
    );

    let trace = String::from_utf8_lossy(&fs::read(trace).unwrap()).into_owned();
    // `4711<decnet-outbox> openat(…`
    let calls = trace.lines().filter_map(|line| line.split_once('<')?.1.split_once("> "));
    let ours: Vec<_> = calls.filter(|(thread, _)| thread.starts_with("decnet-")).collect();
    let of_heartbeat: Vec<_> =
        ours.iter().filter(|(thread, _)| *thread == "decnet-heartbea").collect();
    // It uses sockets to the master, and waits for the other threads.
    let is_no_file = |call: &str| {
        call.contains("<socket:[")
            || call.contains("<TCP:[")
            || call.contains("resumed>")
            || call.starts_with("+++")
    };
    let files: Vec<_> = of_heartbeat.iter().filter(|(_, call)| !is_no_file(call)).collect();
    assert!(!of_heartbeat.is_empty() && files.is_empty(), "{files:#?}");
    let in_dir = ours.iter().filter(|(_, call)| call.contains(path.to_str().unwrap()));
    let users: BTreeSet<_> = in_dir.clone().map(|(thread, _)| *thread).collect();
    assert_eq!(users, BTreeSet::from(["decnet-outbox"]));
    for file in ["decnet.ini", "agent/worker.key", "agent/heartbeat.db", "agent/heartbeat.db-wal"] {
        assert!(in_dir.clone().any(|(_, call)| call.contains(file)), "{file}");
    }
}
