//! The files of the outbox: system calls on them that fail at every point, files that are removed,
//! renamed or replaced, and their owners.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs::{self, DirEntry};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use decnet_heartbeat::{Error, Heartbeat, Operation, OutboxLocation};
use tempfile::TempDir;

use crate::support::{Loopback, commands, deployed, logged_errors, send_tick, wait_for_stats};

/// Starts a heartbeat whose outbox is in the subfolder `outbox`.
fn start(dir: &Path) -> (Loopback, Heartbeat, Sender<Instant>) {
    let loopback = Loopback::new(&dir.join("agent"));
    let (builder, tick) = loopback.builder();
    let heartbeat =
        builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    (loopback, heartbeat, tick)
}

/// Sends ticks until the master has the deltas of these deckies.
fn beat_until_sent(
    loopback: &Loopback,
    heartbeat: &Heartbeat,
    tick: &Sender<Instant>,
    deckies: &[String],
) {
    let beats = heartbeat.beats();
    let end = Instant::now() + Duration::from_secs(30);
    while !deckies.iter().all(|decky| loopback.sent().contains(decky)) {
        assert!(
            Instant::now() < end,
            "of {deckies:?} only {:?} were sent: {:?}",
            loopback.sent(),
            heartbeat.stats()
        );
        send_tick(tick);
        let _ = beats.recv_timeout(Duration::from_secs(1));
    }
}

/// The work of a traced process: it delivers the delta in the outbox.
fn deliver(dir: &Path) {
    let (loopback, heartbeat, tick) = start(dir);
    beat_until_sent(&loopback, &heartbeat, &tick, &["d0".to_owned()]);
    assert_eq!(loopback.sent(), ["d0"]);
}

/// The value, unless the disk did not answer or the file was locked. After a failed unlock SQLite
/// waits up to 10 s for its own lock, or reports the file as locked.
fn unless_locked<T>(result: Result<T, Error>) -> Option<T> {
    let is_locked = |error: &Error| {
        let problems =
            ["its disk has not answered", "is locked by another process; nothing was queued"];
        problems.iter().any(|problem| error.to_string().contains(problem))
    };
    result.inspect_err(|error| assert!(is_locked(error), "{error}")).ok()
}

/// Pushes deltas and runs operations. Returns the deckies of those that were queued.
fn push_and_track(heartbeat: &Heartbeat, tick: &Sender<Instant>) -> Vec<String> {
    let mut queued = Vec::new();
    for n in 1..4 {
        let pushed = unless_locked(heartbeat.deltas().push(deployed(format!("d{n}"))));
        queued.extend(pushed.map(|()| format!("d{n}")));
        let begun = unless_locked(heartbeat.begin(Operation::Mutate, [format!("m{n}")]));
        send_tick(tick);
        if let Some(operation) = begun {
            queued.push(format!("m{n}"));
            operation.succeed();
        }
    }
    queued
}

/// The work of a traced process: it queues deltas and delivers at least these.
fn run(dir: &Path) {
    let (loopback, heartbeat, tick) = start(dir);
    let queued = push_and_track(&heartbeat, &tick);
    beat_until_sent(&loopback, &heartbeat, &tick, &queued);
    let beats = heartbeat.stats().beats;
    send_tick(&tick);
    wait_for_stats(&heartbeat, |stats| stats.beats > beats);
    fs::write(dir.join("sent"), loopback.sent().join("\n")).unwrap();
}

/// The work of a traced process: it queues deltas without a master, and leaves them to the next
/// process.
fn queue_only(dir: &Path) {
    let (mut loopback, heartbeat, tick) = start(dir);
    wait_for_stats(&heartbeat, |stats| stats.beats > 0);
    loopback.master.stop();
    let queued = push_and_track(&heartbeat, &tick);
    assert!(heartbeat.stop(Duration::from_secs(20)).durable);
    fs::write(dir.join("sent"), loopback.sent().join("\n")).unwrap();
    fs::write(dir.join("queued"), queued.join("\n")).unwrap();
}

/// How the process that fills an outbox ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Exit,
    /// It is killed, so the log of the database is not removed.
    Kill,
}

/// The work of a process that leaves a delta in the outbox.
fn fill(dir: &Path, end: End) {
    let loopback = Loopback::new(&dir.join("agent"));
    loopback.master.decommission(&loopback.worker.uuid);
    let (builder, tick) = loopback.builder();
    let heartbeat =
        builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    send_tick(&tick);
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(deployed("d0")).unwrap();
    if end == End::Kill {
        commands::signal("KILL", std::process::id());
    }
}

const TEST: &str = "files::failed_call_at_start_loses_no_file_and_no_delta";
const CHILD: &str = "DECNET_HEARTBEAT_TEST_FAILING_CALLS";
const WORK: &str = "DECNET_HEARTBEAT_TEST_FAILING_CALLS_WORK";

fn child(dir: &Path, work: &str) -> Command {
    let mut child = commands::rerun_test(TEST);
    child.env(CHILD, dir).env(WORK, work);
    child
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    // Not the wake socket of a process that was killed.
    let is_file = |entry: &DirEntry| entry.file_type().unwrap().is_file();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap).filter(is_file) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The folder of an outbox that `fill` left.
fn filled_outbox(dir: &Path, work: &str) -> PathBuf {
    let outbox = dir.join("outbox");
    fs::create_dir(&outbox).unwrap();
    let filled = child(dir, work).output().unwrap();
    assert!(outbox.join("heartbeat.db").exists(), "{filled:?}");
    assert_eq!(outbox.join("heartbeat.db-wal").exists(), work == "fill and kill");
    outbox
}

/// A fault that strace injects.
struct Fault {
    /// The names of the system calls, separated by commas.
    calls: &'static str,
    error: &'static str,
    /// Which of the calls fail, in strace's syntax.
    when: String,
}

impl Fault {
    fn new(calls: &'static str, error: &'static str, when: String) -> Self {
        Self { calls, error, when }
    }
}

/// Does the work on a copy of the outbox while calls fail, and asserts that no file is renamed.
/// `None`: there were fewer calls.
fn run_with_faults(outbox: &Path, work: &str, faults: &[Fault]) -> Option<TempDir> {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().canonicalize().unwrap();
    copy(outbox, &dir.join("outbox"));
    let trace = dir.join("trace");
    let mut strace = Command::new("strace");
    let calls: Vec<_> = faults.iter().map(|fault| fault.calls).collect();
    strace.args(["-f", "-qq", "-e", &format!("trace={}", calls.join(","))]);
    for Fault { calls, error, when } in faults {
        strace.args(["-e", &format!("inject={calls}:error={error}:when={when}")]);
    }
    for suffix in ["", "-wal", "-shm", "-journal"] {
        strace.arg("-P").arg(dir.join(format!("outbox/heartbeat.db{suffix}")));
    }
    let child = child(&dir, work);
    strace.arg("-o").arg(&trace).arg("--").arg(child.get_program()).args(child.get_args());
    commands::run(strace.env(CHILD, &dir).env(WORK, work));
    let names = fs::read_dir(dir.join("outbox"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let renamed: Vec<_> = names.filter(|name| name.contains("aside")).collect();
    assert!(renamed.is_empty(), "{calls:?}: {renamed:?}");
    String::from_utf8_lossy(&fs::read(trace).unwrap()).contains("(INJECTED)").then_some(scratch)
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn failed_call_at_start_loses_no_file_and_no_delta() {
    if let (Some(dir), Some(work)) = (std::env::var_os(CHILD), std::env::var(WORK).ok()) {
        return match work.as_str() {
            "deliver" => deliver(Path::new(&dir)),
            "run" => run(Path::new(&dir)),
            "queue only" => queue_only(Path::new(&dir)),
            "read" => {
                let database =
                    rusqlite::Connection::open(Path::new(&dir).join("agent/heartbeat.db")).unwrap();
                let rows: u32 =
                    database.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap();
                assert!(rows > 0);
            }
            "fill" => fill(Path::new(&dir), End::Exit),
            "fill and kill" => fill(Path::new(&dir), End::Kill),
            work => panic!("unknown work {work}"),
        };
    }
    for work in ["fill", "fill and kill"] {
        let dir = tempfile::tempdir().unwrap();
        let outbox = filled_outbox(dir.path(), work);
        for (calls, error) in [
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
            let fails = |nth: &usize| {
                let fault = Fault::new(calls, error, nth.to_string());
                run_with_faults(&outbox, "deliver", &[fault]).is_some()
            };
            let count = (1..).take_while(fails).count();
            println!("{work}: {calls} {error}: {count} points");
        }
    }
}

/// Asserts that the delta in the outbox, and those that the process with the faults queued, are
/// sent by it or by a later process without faults. `None`: there were fewer calls.
fn assert_all_sent(outbox: &Path, work: &str, faults: &[Fault]) -> Option<()> {
    let scratch = run_with_faults(outbox, work, faults)?;
    let lines = |name| fs::read_to_string(scratch.path().join(name)).unwrap_or_default();
    let sent = lines("sent");
    let queued = lines("queued");
    let is_sent = |decky: &str| sent.lines().any(|sent| sent == decky);
    let missing = queued.lines().chain(["d0"]).filter(|decky| !is_sent(decky)).map(str::to_owned);
    let missing: Vec<_> = missing.collect();
    if !missing.is_empty() {
        let (loopback, heartbeat, tick) = start(scratch.path());
        beat_until_sent(&loopback, &heartbeat, &tick, &missing);
    }
    Some(())
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn permanently_failed_disk_loses_no_file_and_no_delta() {
    for work in ["fill", "fill and kill"] {
        let dir = tempfile::tempdir().unwrap();
        let outbox = filled_outbox(dir.path(), work);
        let all_from = |nth: usize| vec![Fault::new("pread64,read", "EIO", format!("{nth}+"))];
        // Each connection fails at the same page. So does a read of the whole file.
        let one_page = |nth: usize| {
            vec![
                Fault::new("pread64", "EIO", format!("{nth}+{nth}")),
                Fault::new("read", "EIO", "1+".to_owned()),
            ]
        };
        let count = |faults: &dyn Fn(usize) -> Vec<Fault>| {
            (1..).map_while(|nth| assert_all_sent(&outbox, "run", &faults(nth))).count()
        };
        println!("{work}: all reads fail: {} points", count(&all_from));
        println!("{work}: the reads of one page fail: {} points", count(&one_page));
    }
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn failed_call_of_running_heartbeat_loses_no_file_and_no_delta() {
    let dir = tempfile::tempdir().unwrap();
    let outbox = filled_outbox(dir.path(), "fill and kill");
    for (calls, error) in [
        ("pread64", "EIO"),
        ("pread64", "ESTALE"),
        ("pwrite64", "ENOSPC"),
        ("pwrite64", "EIO"),
        ("fdatasync,fsync", "EIO"),
        ("mmap", "ENOMEM"),
        ("ftruncate", "EIO"),
    ] {
        // With `+` all later calls fail, too.
        for (work, suffix) in [("run", "+"), ("queue only", "")] {
            let sent = |nth: usize| {
                let fault = Fault::new(calls, error, format!("{nth}{suffix}"));
                assert_all_sent(&outbox, work, &[fault])
            };
            let count = (1..).map_while(sent).count();
            println!("{work}: {calls} {error}{suffix}: {count} points");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn files_of_root_belong_to_owner_of_folder_and_files_of_other_users_are_refused() {
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
    heartbeat.deltas().push(deployed("d0")).unwrap();
    for part in ["", "-wal", "-shm", "-lock"] {
        let found = fs::metadata(outbox.join(format!("heartbeat.db{part}"))).unwrap();
        assert_eq!(
            (found.uid(), found.gid(), found.mode() & 0o777),
            (OWNER, OWNER, 0o600),
            "{part}"
        );
    }
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    heartbeat.stop(Duration::from_secs(5));
    // A file of a user who is neither root nor the owner of the folder.
    let file = outbox.join("heartbeat.db");
    for part in ["", "-journal", "-wal", "-shm"] {
        let foreign = outbox.join(format!("heartbeat.db{part}"));
        if !foreign.exists() {
            fs::write(&foreign, "").unwrap();
        }
        chown(&foreign, Some(OWNER + 1), Some(OWNER)).unwrap();
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o644)).unwrap();
        let identity = |path: &Path| {
            fs::metadata(path)
                .map(|m| (m.ino(), m.uid(), m.mode(), m.len(), m.ctime_nsec()))
                .unwrap()
        };
        let before = (identity(&file), identity(&foreign));
        let (heartbeat, tick) = start();
        send_tick(&tick);
        wait_for_stats(&heartbeat, |stats| stats.beats > 0);
        assert!(heartbeat.stats().outbox.is_none(), "{part}");
        drop(heartbeat);
        assert_eq!((identity(&file), identity(&foreign)), before, "{part}");
        chown(&foreign, Some(OWNER), Some(OWNER)).unwrap();
        if !part.is_empty() {
            fs::remove_file(&foreign).unwrap();
        }
    }
}

/// The program's `push`, for an agent dir.
fn push_command(dir: &Path, decky: &str) -> Command {
    let mut push = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    push.arg("--config").arg(dir.join("decnet.ini")).arg("--agent-dir").arg(dir.join("agent"));
    push.args(["push", "--no-wait", "--operation", "deploy", "--status", "succeeded", decky]);
    push
}

/// Pushes with the program. Returns whether the delta was queued.
fn push(dir: &Path, decky: &str) -> bool {
    push_command(dir, decky).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
#[ignore = "takes seconds, and starts many processes"]
fn removed_renamed_and_replaced_files_lose_no_delta() {
    for part in ["", "-wal", "-shm", "-lock"] {
        for how in ["removed", "renamed", "replaced", "replaced by an older copy"] {
            let dir = tempfile::tempdir().unwrap();
            let loopback = Loopback::new(&dir.path().join("agent"));
            loopback.worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
            let (builder, tick) = loopback.builder();
            let heartbeat = builder.start().unwrap();
            let place = dir.path().join(format!("agent/heartbeat.db{part}"));
            let older = dir.path().join("older");
            let next = dir.path().join("agent/next");
            // Another process copies it, because closing the file in this process would release
            // SQLite's locks on it.
            let copy = |from: &Path, to: &Path| {
                commands::run(Command::new("cp").arg("-p").arg(from).arg(to))
            };
            copy(&place, &older);
            let is_over = AtomicBool::new(false);
            let pushes = AtomicU32::new(0);
            let queued: Vec<String> = thread::scope(|scope| {
                let (is_over, pushes, dir, heartbeat) = (&is_over, &pushes, dir.path(), &heartbeat);
                let library = scope.spawn(move || {
                    let numbers = (0..).take_while(|_| !is_over.load(Ordering::Relaxed));
                    let push = |n: u32| {
                        let decky = format!("l{n}");
                        let pushed = heartbeat.deltas().push(deployed(&decky));
                        pushes.fetch_add(1, Ordering::Relaxed);
                        pushed.is_ok().then_some(decky)
                    };
                    numbers.filter_map(push).collect::<Vec<_>>()
                });
                let programs = ["p", "q"].map(|program| {
                    scope.spawn(move || {
                        let numbers = (0..).take_while(|_| !is_over.load(Ordering::Relaxed));
                        let deckies = numbers.map(|n: u32| format!("{program}{n}"));
                        deckies.filter(|decky| push(dir, decky)).collect::<Vec<_>>()
                    })
                });
                for n in 0..20 {
                    // The heartbeat must have read the deltas of the other processes before the
                    // change. No event reports pushes of other threads, so this polls.
                    let enough = pushes.load(Ordering::Relaxed) + 3;
                    while pushes.load(Ordering::Relaxed) < enough
                        || heartbeat.stats().outbox.is_none()
                    {
                        send_tick(&tick);
                        thread::sleep(Duration::from_millis(5));
                    }
                    // These fail if the file does not exist at this moment.
                    let _ = match how {
                        "removed" => fs::remove_file(&place),
                        "renamed" => fs::rename(&place, place.with_extension(format!("old-{n}"))),
                        "replaced by an older copy" => {
                            copy(&older, &next);
                            fs::rename(&next, &place)
                        }
                        _ => {
                            fs::write(&next, "").unwrap();
                            fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).unwrap();
                            fs::rename(&next, &place)
                        }
                    };
                    send_tick(&tick);
                }
                is_over.store(true, Ordering::Relaxed);
                [library]
                    .into_iter()
                    .chain(programs)
                    .flat_map(|pushing| pushing.join().unwrap())
                    .collect()
            });
            let missing = || {
                let sent: BTreeSet<_> = loopback.sent().into_iter().collect();
                queued.iter().filter(|decky| !sent.contains(*decky)).cloned().collect::<Vec<_>>()
            };
            let beats = heartbeat.beats();
            let end = Instant::now() + Duration::from_secs(10);
            while !missing().is_empty() && Instant::now() < end {
                send_tick(&tick);
                let _ = beats.recv_timeout(Duration::from_secs(1));
            }
            let names: Vec<_> = fs::read_dir(dir.path().join("agent"))
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            println!("{part} {how}: {} queued, lost {:?}", queued.len(), missing());
            assert!(
                missing().is_empty(),
                "{part} {how}: of {} {:?} {names:?}",
                queued.len(),
                missing()
            );
        }
    }
}

#[test]
#[ignore = "starts many processes"]
fn reads_of_the_outbox_by_the_host_program_lose_no_delta() {
    let dir = tempfile::tempdir().unwrap();
    let mut loopback = Loopback::new(&dir.path().join("agent"));
    loopback.worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
    let (builder, tick) = loopback.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    loopback.master.stop();
    let log = dir.path().join("agent/heartbeat.db-wal");
    let log = || fs::metadata(&log).map(|found| found.ino()).ok();
    let mut queued = Vec::new();
    let mut lost_logs = 0;
    for n in 0..20 {
        let ours = format!("l{n}");
        let theirs = format!("p{n}");
        heartbeat.deltas().push(deployed(&ours)).unwrap();
        let before = log();
        // A backup does this. Closing the files releases SQLite's locks on them in this process.
        // The index must be read, too, because SQLite uses locks on it as well.
        for part in ["", "-wal", "-shm"] {
            let _ = fs::read(dir.path().join(format!("agent/heartbeat.db{part}")));
        }
        // So another process considers itself the last one, and removes the log when it ends.
        commands::run(&mut child(dir.path(), "read"));
        lost_logs += u32::from(log() != before);
        if n % 2 == 0 {
            // It creates a new log while the heartbeat uses the old one.
            assert!(push(dir.path(), &theirs));
            queued.push(theirs);
        }
        if n % 3 == 0 {
            send_tick(&tick);
        }
        queued.push(ours);
    }
    assert!(lost_logs > 10, "{lost_logs}");
    loopback.master.start_again().unwrap();
    beat_until_sent(&loopback, &heartbeat, &tick, &queued);
    assert!(heartbeat.flush(Duration::from_secs(10)));
    let mut sent = loopback.sent();
    sent.sort();
    queued.sort();
    assert_eq!(sent, queued, "each delta is sent once");
}

/// Starts the program's `push` under strace, which suspends it in its commit and writes this trace.
fn start_suspended_push(dir: &Path, decky: &str, trace: &Path) -> Child {
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-e",
        "trace=fdatasync,fsync",
        "-e",
        "inject=fdatasync,fsync:signal=STOP:when=1",
    ]);
    strace.arg("-P").arg(dir.join("agent/heartbeat.db-wal")).arg("-o").arg(trace).arg("--");
    let push = push_command(dir, decky);
    strace.arg(push.get_program()).args(push.get_args()).stdout(Stdio::null()).spawn().unwrap()
}

/// Waits until the process is suspended, and returns its id. The trace is a file, so this polls.
fn wait_until_suspended(trace: &Path) -> u32 {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let text = fs::read_to_string(trace).unwrap_or_default();
        if let Some(line) = text.lines().find(|line| line.contains("stopped by SIGSTOP")) {
            return line.split_whitespace().next().unwrap().parse().unwrap();
        }
        assert!(Instant::now() < end, "{text}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "needs strace"]
fn suspended_writer_makes_pushes_fail_and_does_not_delay_beats() {
    for how in ["CONT", "KILL"] {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().canonicalize().unwrap();
        let loopback = Loopback::new(&dir.join("agent"));
        loopback.worker.write_ini(&dir.join("decnet.ini")).unwrap();
        let (builder, tick) = loopback.builder();
        let heartbeat = builder.start().unwrap();
        heartbeat.deltas().push(deployed("before")).unwrap();
        let trace = dir.join("trace");
        let mut tracer = start_suspended_push(&dir, "suspended", &trace);
        let pid = wait_until_suspended(&trace);

        let since = Instant::now();
        let refused = heartbeat.deltas().push(deployed("refused")).unwrap_err();
        assert!(since.elapsed() < Duration::from_secs(2) && !refused.is_in_doubt(), "{refused}");
        let source = refused.source().map(ToString::to_string);
        assert_eq!(
            (
                refused.to_string().ends_with("is locked by another process; nothing was queued"),
                source.as_deref()
            ),
            (
                true,
                Some(
                    "another process is writing to it, or was suspended while it did; resume or end that process"
                )
            )
        );
        let output = push_command(&dir, "refused").output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{stderr}");
        assert!(stderr.contains("was suspended while it did"), "{stderr}");
        for _ in 0..3 {
            let beats = heartbeat.stats().beats;
            send_tick(&tick);
            wait_for_stats(&heartbeat, |stats| stats.beats > beats);
        }

        commands::signal(how, pid);
        // Its result is in doubt for its caller, so it is not checked.
        commands::wait_for_exit(&mut tracer, Duration::from_secs(20)).unwrap();
        heartbeat.deltas().push(deployed("after")).unwrap();
        beat_until_sent(&loopback, &heartbeat, &tick, &["before".to_owned(), "after".to_owned()]);
        assert!(!loopback.sent().contains(&"refused".to_owned()));
    }
}

#[test]
#[ignore = "needs the log of this process"]
fn unreadable_replaced_file_is_logged_as_error() {
    let dir = tempfile::tempdir().unwrap();
    let agent_dir = dir.path().join("agent");
    logged_errors(&agent_dir);
    let loopback = Loopback::new(&agent_dir);
    let (builder, _tick) = loopback.builder();
    let heartbeat = builder.start().unwrap();
    heartbeat.deltas().push(deployed("d0")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    let file = agent_dir.join("heartbeat.db");
    rusqlite::Connection::open(&file)
        .unwrap()
        .execute_batch("ALTER TABLE delta RENAME TO theirs")
        .unwrap();
    fs::remove_file(&file).unwrap();
    heartbeat.deltas().push(deployed("d1")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    let errors = logged_errors(&agent_dir);
    assert!(
        errors
            .iter()
            .any(|line| line.contains("outbox file was replaced; deltas that only it had are lost")),
        "{errors:#?}"
    );
}
