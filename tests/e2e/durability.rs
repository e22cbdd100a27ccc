//! That the outbox is on the disk when it says so, and its owner's alone from its first byte: by its system calls.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use decnet_heartbeat::{LifecycleDelta, Operation};

use crate::support::{Loopback, process, settled};

/// What the traced process does. How far it is it says by looking for files that are not there.
fn work(agent_dir: &Path) {
    let step = |name: &str| assert!(File::open(agent_dir.join(format!("step-{name}"))).is_err());
    let deployed = |decky: String| LifecycleDelta::succeeded(decky, Operation::Deploy);
    let mut loopback = Loopback::new(agent_dir);
    let (builder, _tick) = loopback.builder();
    step("start");
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
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
    settled(&heartbeat, |stats| stats.delivered == 72 && stats.waiting == 0);
    assert!(heartbeat.flush(Duration::from_secs(10)), "the disk knows it, too");
    step("end");
}

/// What a trace says of an agent dir.
#[derive(Default)]
struct Traced {
    /// Each step with the files that it has synced.
    steps: Vec<(String, Vec<PathBuf>)>,
    /// The outbox' files, by what follows its name: in which step they were made, and with which permissions.
    made: BTreeSet<(String, String, String)>,
}

impl Traced {
    fn read(trace: &str, agent_dir: &Path) -> Self {
        let mut traced = Self::default();
        for line in trace.lines() {
            if let Some((_, synced)) = line.split_once("sync(") {
                let file = Path::new(synced.split(['<', '>']).nth(1).unwrap());
                if let (true, Some((_, files))) =
                    (file.starts_with(agent_dir), traced.steps.last_mut())
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
                traced.steps.push((step.to_owned(), Vec::new()));
            }
            if let (Some(suffix), true) =
                (name.strip_prefix("heartbeat.db"), how.contains("O_CREAT"))
            {
                let mode = how.split(", ").nth(2).unwrap();
                let mode = mode.split(|c: char| !c.is_ascii_digit()).next().unwrap();
                let (step, _) = traced.steps.last().unwrap();
                traced.made.insert((suffix.to_owned(), step.clone(), mode.to_owned()));
            }
        }
        traced
    }
}

#[test]
#[ignore = "needs strace"]
fn each_commit_is_one_sync_and_no_file_is_ever_anybody_elses() {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_TRACED";
    if let Some(agent_dir) = std::env::var_os(CHILD) {
        return work(Path::new(&agent_dir));
    }
    let folder = tempfile::tempdir().unwrap();
    // As the kernel names it, and so the trace.
    let path = folder.path().canonicalize().unwrap();
    let (agent_dir, trace) = (path.join("agent"), path.join("trace"));
    fs::create_dir(&agent_dir).unwrap();
    let child =
        process::again("durability::each_commit_is_one_sync_and_no_file_is_ever_anybody_elses");
    // Nothing is left to the umask, and open and creat are not everywhere.
    let strace = "umask 000; exec strace -f -y -o \"$0\" -e trace=openat,?open,?creat,fsync,fdatasync -- \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", strace]).arg(&trace).arg(child.get_program()).args(child.get_args());
    process::run(shell.env(CHILD, &agent_dir));
    let traced = Traced::read(&fs::read_to_string(trace).unwrap(), &agent_dir);

    let (start, steps) = traced.steps.split_first().unwrap();
    assert_eq!(start.0, "start");
    assert!(
        start.1.contains(&agent_dir),
        "that the files are there is on the disk, too: {start:?}"
    );
    let expected = [["push"; 20].as_slice(), &["push_all", "begin", "succeed", "deliver"]].concat();
    let expected = expected
        .into_iter()
        .map(|step| (step.to_owned(), vec![agent_dir.join("heartbeat.db-wal")]));
    let (end, steps) = steps.split_last().unwrap();
    assert_eq!((end.0.as_str(), steps), ("end", expected.collect::<Vec<_>>().as_slice()));

    let made = ["", "-journal", "-lock", "-shm", "-wal"];
    let made = made.map(|suffix| (suffix.to_owned(), "start".to_owned(), "0600".to_owned()));
    assert_eq!(traced.made, made.into());
}
