//! The outbox' files: system calls on them that fail, one at a time, at every place of a start; and whose they are.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation};

use crate::support::{Loopback, beat, process, settled};

/// What the traced process does: it delivers what is in the outbox.
fn deliver(dir: &Path) {
    let loopback = Loopback::new(&dir.join("agent"));
    let (builder, tick) = loopback.builder();
    let heartbeat = builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while heartbeat.stats().delivered == 0 {
        assert!(Instant::now() < end, "nothing is sent: {:?}", heartbeat.stats());
        beat(&tick);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(loopback.sent(), ["d0"]);
}

/// An outbox with a delta that waits, left by a process that was killed if it `has_died`.
fn fill(dir: &Path, has_died: bool) {
    let loopback = Loopback::new(&dir.join("agent"));
    loopback.master.decommission(&loopback.worker.uuid);
    let (builder, tick) = loopback.builder();
    let heartbeat = builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    beat(&tick);
    settled(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(LifecycleDelta::succeeded("d0", Operation::Deploy)).unwrap();
    if has_died {
        // Without closing anything: its log stays.
        process::signal("KILL", std::process::id());
    }
}

const TEST: &str = "files::a_call_that_fails_at_any_place_of_a_start_costs_no_file_and_no_delta";
const CHILD: &str = "DECNET_HEARTBEAT_TEST_FAILING_CALLS";
const WORK: &str = "DECNET_HEARTBEAT_TEST_FAILING_CALLS_WORK";

fn child(dir: &Path, work: &str) -> Command {
    let mut child = process::again(TEST);
    child.env(CHILD, dir).env(WORK, work);
    child
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Starts on a copy of the outbox where the `nth` of these calls fails so. Whether there were so many.
fn start(outbox: &Path, call: &str, error: &str, nth: usize) -> bool {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().canonicalize().unwrap();
    copy(outbox, &dir.join("outbox"));
    let trace = dir.join("trace");
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-e",
        &format!("trace={call}"),
        "-e",
        &format!("inject={call}:error={error}:when={nth}"),
    ]);
    for suffix in ["", "-wal", "-shm", "-journal"] {
        strace.arg("-P").arg(dir.join(format!("outbox/heartbeat.db{suffix}")));
    }
    let child = child(&dir, "deliver");
    strace.arg("-o").arg(&trace).arg("--").arg(child.get_program()).args(child.get_args());
    process::run(strace.env(CHILD, &dir).env(WORK, "deliver"));
    let names =
        fs::read_dir(dir.join("outbox")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let aside: Vec<_> = names.filter(|name| name.contains("aside")).collect();
    assert!(aside.is_empty(), "{error} in {call} {nth}: {aside:?}");
    String::from_utf8_lossy(&fs::read(trace).unwrap()).contains("(INJECTED)")
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn a_call_that_fails_at_any_place_of_a_start_costs_no_file_and_no_delta() {
    if let (Some(dir), Some(work)) = (std::env::var_os(CHILD), std::env::var(WORK).ok()) {
        return match work.as_str() {
            "deliver" => deliver(Path::new(&dir)),
            work => fill(Path::new(&dir), work == "fill and die"),
        };
    }
    for work in ["fill", "fill and die"] {
        let dir = tempfile::tempdir().unwrap();
        let outbox = dir.path().join("outbox");
        fs::create_dir(&outbox).unwrap();
        let filled = child(dir.path(), work).output().unwrap();
        assert!(outbox.join("heartbeat.db").exists(), "{filled:?}");
        assert_eq!(outbox.join("heartbeat.db-wal").exists(), work == "fill and die");
        for (call, error) in [
            ("pread64", "EIO"),
            ("pread64", "ESTALE"),
            ("pwrite64", "ENOSPC"),
            ("fdatasync,fsync", "EIO"),
            ("fstat,newfstatat,statx,lstat,stat", "EIO"),
            ("fcntl", "ENOLCK"),
            ("openat", "EIO"),
            ("mmap", "ENOMEM"),
            ("ftruncate", "EIO"),
            ("read", "EIO"),
        ] {
            let count = (1..).take_while(|nth| start(&outbox, call, error, *nth)).count();
            println!("{work}: {call} {error}: {count} places");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn what_root_makes_belongs_to_the_owner_of_the_folder_and_a_strangers_file_is_refused() {
    const OWNER: u32 = 4_711;
    let dir = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&dir.path().join("agent"));
    let outbox = dir.path().join("outbox");
    fs::create_dir(&outbox).unwrap();
    chown(&outbox, Some(OWNER), Some(OWNER)).unwrap();
    let start = || {
        let (builder, tick) = loopback.builder();
        (builder.outbox(OutboxLocation::File(outbox.join("heartbeat.db"))).start().unwrap(), tick)
    };
    let (heartbeat, _tick) = start();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d0", Operation::Deploy)).unwrap();
    for part in ["", "-wal", "-shm", "-making"] {
        let found = fs::metadata(outbox.join(format!("heartbeat.db{part}"))).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (OWNER, OWNER, 0o600), "{part}");
    }
    settled(&heartbeat, |stats| stats.delivered == 1);
    heartbeat.stop(Duration::from_secs(5));
    // Somebody else's, who is neither root nor the owner of the folder.
    let file = outbox.join("heartbeat.db");
    for part in ["", "-journal", "-wal", "-shm"] {
        let strangers = outbox.join(format!("heartbeat.db{part}"));
        if !strangers.exists() {
            fs::write(&strangers, "").unwrap();
        }
        chown(&strangers, Some(OWNER + 1), Some(OWNER)).unwrap();
        fs::set_permissions(&strangers, fs::Permissions::from_mode(0o644)).unwrap();
        let looks =
            |path: &Path| fs::metadata(path).map(|m| (m.ino(), m.uid(), m.mode(), m.len(), m.ctime_nsec())).unwrap();
        let before = (looks(&file), looks(&strangers));
        let (heartbeat, tick) = start();
        beat(&tick);
        settled(&heartbeat, |stats| stats.beats > 0);
        assert!(heartbeat.stats().outbox.is_none(), "{part}");
        drop(heartbeat);
        assert_eq!((looks(&file), looks(&strangers)), before, "{part}");
        chown(&strangers, Some(OWNER), Some(OWNER)).unwrap();
        if !part.is_empty() {
            fs::remove_file(&strangers).unwrap();
        }
    }
}
