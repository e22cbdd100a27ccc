//! The system calls of the outbox: each commit is synced, and its files are never accessible to
//! other users.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use decnet_heartbeat::Operation;

use crate::support::{Loopback, commands, deployed, wait_for_stats};

/// The traced process. It marks its steps in the trace by opening files that do not exist.
fn run_heartbeat(agent_dir: &Path) {
    let step = |name: &str| assert!(File::open(agent_dir.join(format!("step-{name}"))).is_err());
    let mut loopback = Loopback::new(agent_dir);
    let (builder, _tick) = loopback.builder();
    step("start");
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    loopback.master.stop();
    for n in 0..20 {
        step("push");
        heartbeat.deltas().push(deployed(format!("d{n}"))).unwrap();
    }
    step("push_all");
    heartbeat.deltas().push_all((0..50).map(|n| deployed(format!("e{n}")))).unwrap();
    step("begin");
    let operation = heartbeat.begin(Operation::Deploy, ["f0", "f1"]).unwrap();
    step("succeed");
    operation.succeed();
    step("deliver");
    loopback.master.start_again().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 72 && stats.waiting == 0);
    assert!(heartbeat.flush(Duration::from_secs(10)), "the acknowledgements are on the disk");
    step("end");
}

/// The parts of a trace that are about an agent dir.
#[derive(Default)]
struct Trace {
    /// Each step with the files that it synced.
    steps: Vec<(String, Vec<PathBuf>)>,
    /// The suffix of each file of the outbox, the step that created it, and its mode.
    created: BTreeSet<(String, String, String)>,
}

impl Trace {
    fn read(trace: &str, agent_dir: &Path) -> Self {
        let mut parsed = Self::default();
        for line in trace.lines() {
            if let Some((_, synced)) = line.split_once("sync(") {
                let file = Path::new(synced.split(['<', '>']).nth(1).unwrap());
                if let (true, Some((_, files))) =
                    (file.starts_with(agent_dir), parsed.steps.last_mut())
                {
                    files.push(file.to_owned());
                }
            }
            let Some((_, opened)) = line.split_once("open").filter(|_| line.contains('"')) else {
                continue;
            };
            let (file, how) = opened.split_once('"').unwrap().1.split_once('"').unwrap();
            let Some(name) = Path::new(file).strip_prefix(agent_dir).ok().and_then(Path::to_str)
            else {
                continue;
            };
            if let Some(step) = name.strip_prefix("step-") {
                parsed.steps.push((step.to_owned(), Vec::new()));
            }
            if let (Some(suffix), true) =
                (name.strip_prefix("heartbeat.db"), how.contains("O_CREAT"))
            {
                let mode = how.split(", ").nth(2).unwrap();
                let mode = mode.split(|c: char| !c.is_ascii_digit()).next().unwrap();
                let (step, _) = parsed.steps.last().unwrap();
                parsed.created.insert((suffix.to_owned(), step.clone(), mode.to_owned()));
            }
        }
        parsed
    }
}

#[test]
#[ignore = "needs strace"]
fn each_commit_is_one_sync_and_files_are_created_with_mode_0600() {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_TRACED";
    if let Some(agent_dir) = std::env::var_os(CHILD) {
        return run_heartbeat(Path::new(&agent_dir));
    }
    let folder = tempfile::tempdir().unwrap();
    // The trace has the kernel's paths, without symbolic links.
    let path = folder.path().canonicalize().unwrap();
    let agent_dir = path.join("agent");
    let trace = path.join("trace");
    fs::create_dir(&agent_dir).unwrap();
    let child = commands::rerun_test(
        "durability::each_commit_is_one_sync_and_files_are_created_with_mode_0600",
    );
    // The umask removes no permission. Not all architectures have open and creat.
    let strace = "umask 000; exec strace -f -y -o \"$0\" -e trace=openat,?open,?creat,fsync,fdatasync -- \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", strace]).arg(&trace).arg(child.get_program()).args(child.get_args());
    commands::run(shell.env(CHILD, &agent_dir));
    let parsed = Trace::read(&fs::read_to_string(trace).unwrap(), &agent_dir);

    let (start, steps) = parsed.steps.split_first().unwrap();
    assert_eq!(start.0, "start");
    assert!(start.1.contains(&agent_dir), "the entries of the folder are not synced: {start:?}");
    let expected = [["push"; 20].as_slice(), &["push_all", "begin", "succeed", "deliver"]].concat();
    let expected = expected
        .into_iter()
        .map(|step| (step.to_owned(), vec![agent_dir.join("heartbeat.db-wal")]));
    let (end, steps) = steps.split_last().unwrap();
    assert_eq!((end.0.as_str(), steps), ("end", expected.collect::<Vec<_>>().as_slice()));

    let created = ["", "-journal", "-lock", "-shm", "-wal"];
    let created = created.map(|suffix| (suffix.to_owned(), "start".to_owned(), "0600".to_owned()));
    assert_eq!(parsed.created, created.into());
}
