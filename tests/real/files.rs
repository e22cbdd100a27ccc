//! The outbox' files: system calls on them that fail, one at a time, at every place of a start; and whose they are.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation};

use crate::support::{Loopback, beat, errors, process, settled};

/// What the traced process does: it delivers what is in the outbox.
fn deliver(dir: &Path) {
    let loopback = Loopback::new(&dir.join("agent"));
    let (builder, tick) = loopback.builder();
    let heartbeat = builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while heartbeat.stats().delivered == 0 {
        assert!(Instant::now() < end, "nothing is sent: {:?}", heartbeat.stats());
        beat(&tick);
        thread::sleep(Duration::from_millis(20));
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
    for part in ["", "-wal", "-shm", "-lock"] {
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

/// Runs the program on the outbox of an agent dir. Whether it has kept its delta.
fn push(dir: &Path, decky: &str) -> bool {
    let mut push = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    push.arg("--config").arg(dir.join("decnet.ini")).arg("--agent-dir").arg(dir.join("agent"));
    push.args(["push", "--no-wait", "--operation", "deploy", "--status", "succeeded", decky]);
    push.stderr(Stdio::null()).status().unwrap().success()
}

#[test]
#[ignore = "takes seconds, and starts many processes"]
fn no_delta_is_lost_while_the_files_are_removed_renamed_and_replaced() {
    for part in ["", "-wal", "-shm"] {
        for how in ["removed", "renamed", "replaced"] {
            let dir = tempfile::tempdir().unwrap();
            let loopback = Loopback::new(&dir.path().join("agent"));
            loopback.worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
            let (builder, tick) = loopback.builder();
            let heartbeat = builder.start().unwrap();
            let place = dir.path().join(format!("agent/heartbeat.db{part}"));
            let (is_over, pushes) = (AtomicBool::new(false), AtomicU32::new(0));
            // With two indexes of one log, two processes that commit at the same moment overwrite each other.
            let turns = Mutex::new(());
            let turn = || (part == "-shm").then(|| turns.lock().unwrap());
            let kept: Vec<String> = thread::scope(|scope| {
                let (is_over, pushes, dir, heartbeat, turn) = (&is_over, &pushes, dir.path(), &heartbeat, &turn);
                let library = scope.spawn(move || {
                    let numbers = (0..).take_while(|_| !is_over.load(Ordering::Relaxed));
                    let push = |n: u32| {
                        let decky = format!("l{n}");
                        let _turn = turn();
                        let pushed = heartbeat.deltas().push(LifecycleDelta::succeeded(&decky, Operation::Deploy));
                        pushes.fetch_add(1, Ordering::Relaxed);
                        pushed.is_ok().then_some(decky)
                    };
                    numbers.filter_map(push).collect::<Vec<_>>()
                });
                let program = scope.spawn(move || {
                    let numbers = (0..).take_while(|_| !is_over.load(Ordering::Relaxed)).map(|n: u32| format!("p{n}"));
                    let push = |decky: &String| {
                        let _turn = turn();
                        push(dir, decky)
                    };
                    numbers.filter(push).collect::<Vec<_>>()
                });
                for n in 0..20 {
                    // What somebody else has added must have been seen before it is taken away.
                    let seen = pushes.load(Ordering::Relaxed) + 3;
                    while pushes.load(Ordering::Relaxed) < seen || heartbeat.stats().outbox.is_none() {
                        beat(&tick);
                        thread::sleep(Duration::from_millis(5));
                    }
                    let _turn = turn();
                    // It may be gone just now.
                    let _ = match how {
                        "removed" => fs::remove_file(&place),
                        "renamed" => fs::rename(&place, place.with_extension(format!("old-{n}"))),
                        _ => {
                            let next = place.with_extension("next");
                            fs::write(&next, "").unwrap();
                            fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).unwrap();
                            fs::rename(next, &place)
                        }
                    };
                    beat(&tick);
                }
                is_over.store(true, Ordering::Relaxed);
                [library, program].into_iter().flat_map(|pushing| pushing.join().unwrap()).collect()
            });
            let missing = || {
                let sent: BTreeSet<_> = loopback.sent().into_iter().collect();
                kept.iter().filter(|decky| !sent.contains(*decky)).cloned().collect::<Vec<_>>()
            };
            let end = Instant::now() + Duration::from_secs(10);
            while !missing().is_empty() && Instant::now() < end {
                beat(&tick);
                thread::sleep(Duration::from_millis(100));
            }
            let names: Vec<_> =
                fs::read_dir(dir.path().join("agent")).unwrap().map(|e| e.unwrap().file_name()).collect();
            println!("{part} {how}: {} kept, lost {:?}", kept.len(), missing());
            assert!(missing().is_empty(), "{part} {how}: of {} {:?} {names:?}", kept.len(), missing());
        }
    }
}

#[test]
#[ignore = "needs the log of this process"]
fn what_cannot_be_read_out_of_a_replaced_file_is_an_error_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let agent_dir = dir.path().join("agent");
    errors(&agent_dir);
    let loopback = Loopback::new(&agent_dir);
    let (builder, _tick) = loopback.builder();
    let heartbeat = builder.start().unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d0", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    let file = agent_dir.join("heartbeat.db");
    rusqlite::Connection::open(&file).unwrap().execute_batch("ALTER TABLE delta RENAME TO theirs").unwrap();
    fs::remove_file(&file).unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d1", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2);
    let said = errors(&agent_dir);
    assert!(said.iter().any(|line| line.contains("could not be read, deltas that only it had are lost")), "{said:#?}");
}
