//! The outbox' files: system calls on them that fail, one at a time, at every place of a start; and whose they are.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use decnet_heartbeat::{Error, Heartbeat, LifecycleDelta, Operation, OutboxLocation};
use tempfile::TempDir;

use crate::support::{Loopback, beat, errors, process, settled};

/// With its outbox in the folder of that name.
fn start(dir: &Path) -> (Loopback, Heartbeat, Sender<Instant>) {
    let loopback = Loopback::new(&dir.join("agent"));
    let (builder, tick) = loopback.builder();
    let heartbeat =
        builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    (loopback, heartbeat, tick)
}

fn deployed(decky: &str) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// Beats until the master has all of them.
fn beats_until_sent(
    loopback: &Loopback,
    heartbeat: &Heartbeat,
    tick: &Sender<Instant>,
    deckies: &[String],
) {
    let end = Instant::now() + Duration::from_secs(30);
    while !deckies.iter().all(|decky| loopback.sent().contains(decky)) {
        assert!(
            Instant::now() < end,
            "of {deckies:?} only {:?} are sent: {:?}",
            loopback.sent(),
            heartbeat.stats()
        );
        beat(tick);
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a traced process does: it delivers what is in the outbox.
fn deliver(dir: &Path) {
    let (loopback, heartbeat, tick) = start(dir);
    beats_until_sent(&loopback, &heartbeat, &tick, &["d0".to_owned()]);
    assert_eq!(loopback.sent(), ["d0"]);
}

/// Whether it was kept. After an unlock that failed SQLite waits for itself for 10 s, or takes the file for locked: nothing
/// is kept then, or that is in doubt.
fn kept<T>(result: Result<T, Error>) -> Option<T> {
    let is_locked = |error: &Error| {
        let problems =
            ["its disk has not answered", "is locked by another process; nothing was queued"];
        problems.iter().any(|problem| error.to_string().contains(problem))
    };
    result.inspect_err(|error| assert!(is_locked(error), "{error}")).ok()
}

/// The deckies of what was kept.
fn give(heartbeat: &Heartbeat, tick: &Sender<Instant>) -> Vec<String> {
    let mut given = Vec::new();
    for n in 1..4 {
        let pushed = kept(heartbeat.deltas().push(deployed(&format!("d{n}"))));
        given.extend(pushed.map(|()| format!("d{n}")));
        let begun = kept(heartbeat.begin(Operation::Mutate, [format!("m{n}")]));
        beat(tick);
        if let Some(operation) = begun {
            given.push(format!("m{n}"));
            operation.succeed();
        }
    }
    given
}

/// What a traced process does: it beats, keeps what it is given, and delivers at least that.
fn run(dir: &Path) {
    let (loopback, heartbeat, tick) = start(dir);
    let given = give(&heartbeat, &tick);
    beats_until_sent(&loopback, &heartbeat, &tick, &given);
    let beats = heartbeat.stats().beats;
    beat(&tick);
    settled(&heartbeat, |stats| stats.beats > beats);
    fs::write(dir.join("sent"), loopback.sent().join("\n")).unwrap();
}

/// What a traced process does: it leaves what it is given to the next one, as there is no master.
fn outlast(dir: &Path) {
    let (mut loopback, heartbeat, tick) = start(dir);
    settled(&heartbeat, |stats| stats.beats > 0);
    loopback.master.stop();
    let given = give(&heartbeat, &tick);
    assert!(heartbeat.stop(Duration::from_secs(20)).kept);
    fs::write(dir.join("sent"), loopback.sent().join("\n")).unwrap();
    fs::write(dir.join("given"), given.join("\n")).unwrap();
}

/// An outbox with a delta that waits, left by a process that was killed if it `has_died`.
fn fill(dir: &Path, has_died: bool) {
    let loopback = Loopback::new(&dir.join("agent"));
    loopback.master.decommission(&loopback.worker.uuid);
    let (builder, tick) = loopback.builder();
    let heartbeat =
        builder.outbox(OutboxLocation::File(dir.join("outbox/heartbeat.db"))).start().unwrap();
    beat(&tick);
    settled(&heartbeat, |stats| stats.failure.is_some());
    heartbeat.deltas().push(deployed("d0")).unwrap();
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

/// An outbox that `fill` has left.
fn filled(dir: &Path, work: &str) -> PathBuf {
    let outbox = dir.join("outbox");
    fs::create_dir(&outbox).unwrap();
    let filled = child(dir, work).output().unwrap();
    assert!(outbox.join("heartbeat.db").exists(), "{filled:?}");
    assert_eq!(outbox.join("heartbeat.db-wal").exists(), work == "fill and die");
    outbox
}

/// Which calls fail, with which error, and when, as strace has it.
type Fault<'a> = (&'a str, &'a str, String);

/// Does the work on a copy of the outbox while calls fail. `None`: there were not so many. No file was moved aside.
fn with_failing_calls(outbox: &Path, work: &str, faults: &[Fault<'_>]) -> Option<TempDir> {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().canonicalize().unwrap();
    copy(outbox, &dir.join("outbox"));
    let trace = dir.join("trace");
    let mut strace = Command::new("strace");
    let calls: Vec<_> = faults.iter().map(|(call, ..)| *call).collect();
    strace.args(["-f", "-qq", "-e", &format!("trace={}", calls.join(","))]);
    for (call, error, when) in faults {
        strace.args(["-e", &format!("inject={call}:error={error}:when={when}")]);
    }
    for suffix in ["", "-wal", "-shm", "-journal"] {
        strace.arg("-P").arg(dir.join(format!("outbox/heartbeat.db{suffix}")));
    }
    let child = child(&dir, work);
    strace.arg("-o").arg(&trace).arg("--").arg(child.get_program()).args(child.get_args());
    process::run(strace.env(CHILD, &dir).env(WORK, work));
    let names = fs::read_dir(dir.join("outbox"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let aside: Vec<_> = names.filter(|name| name.contains("aside")).collect();
    assert!(aside.is_empty(), "{faults:?}: {aside:?}");
    String::from_utf8_lossy(&fs::read(trace).unwrap()).contains("(INJECTED)").then_some(scratch)
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn a_call_that_fails_at_any_place_of_a_start_costs_no_file_and_no_delta() {
    if let (Some(dir), Some(work)) = (std::env::var_os(CHILD), std::env::var(WORK).ok()) {
        return match work.as_str() {
            "deliver" => deliver(Path::new(&dir)),
            "run" => run(Path::new(&dir)),
            "outlast" => outlast(Path::new(&dir)),
            "look" => {
                let database =
                    rusqlite::Connection::open(Path::new(&dir).join("agent/heartbeat.db")).unwrap();
                let rows: u32 =
                    database.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap();
                assert!(rows > 0);
            }
            work => fill(Path::new(&dir), work == "fill and die"),
        };
    }
    for work in ["fill", "fill and die"] {
        let dir = tempfile::tempdir().unwrap();
        let outbox = filled(dir.path(), work);
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
            let fails = |nth: &usize| {
                with_failing_calls(&outbox, "deliver", &[(call, error, nth.to_string())]).is_some()
            };
            let count = (1..).take_while(fails).count();
            println!("{work}: {call} {error}: {count} places");
        }
    }
}

/// What was there before, and what was given to the process whose calls fail, is sent by it or by a later one for which none
/// fails. `None`: there were not so many calls.
fn all_is_sent(outbox: &Path, work: &str, faults: &[Fault<'_>]) -> Option<()> {
    let scratch = with_failing_calls(outbox, work, faults)?;
    let lines = |name| fs::read_to_string(scratch.path().join(name)).unwrap_or_default();
    let (sent, given) = (lines("sent"), lines("given"));
    let is_sent = |decky: &str| sent.lines().any(|sent| sent == decky);
    let missing = given.lines().chain(["d0"]).filter(|decky| !is_sent(decky)).map(str::to_owned);
    let missing: Vec<_> = missing.collect();
    if !missing.is_empty() {
        let (loopback, heartbeat, tick) = start(scratch.path());
        beats_until_sent(&loopback, &heartbeat, &tick, &missing);
    }
    Some(())
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn a_disk_that_fails_for_good_at_any_place_costs_no_file_and_no_delta() {
    for work in ["fill", "fill and die"] {
        let dir = tempfile::tempdir().unwrap();
        let outbox = filled(dir.path(), work);
        let all_from = |nth: usize| vec![("pread64,read", "EIO", format!("{nth}+"))];
        // Each connection fails at the same page, and so does who reads the file from its beginning to its end.
        let one_page = |nth: usize| {
            vec![("pread64", "EIO", format!("{nth}+{nth}")), ("read", "EIO", "1+".to_owned())]
        };
        for faults in [&all_from as &dyn Fn(usize) -> Vec<Fault<'static>>, &one_page] {
            let count = (1..).map_while(|nth| all_is_sent(&outbox, "run", &faults(nth))).count();
            println!("{work}: {:?}: {count} places", faults(0));
        }
    }
}

#[test]
#[ignore = "needs strace, and takes minutes"]
fn a_call_that_fails_while_a_heartbeat_runs_costs_no_file_and_no_delta() {
    let dir = tempfile::tempdir().unwrap();
    let outbox = filled(dir.path(), "fill and die");
    for (call, error) in [
        ("pread64", "EIO"),
        ("pread64", "ESTALE"),
        ("pwrite64", "ENOSPC"),
        ("pwrite64", "EIO"),
        ("fdatasync,fsync", "EIO"),
        ("mmap", "ENOMEM"),
        ("ftruncate", "EIO"),
    ] {
        for (work, lasts) in [("run", "+"), ("outlast", "")] {
            let sent =
                |nth: usize| all_is_sent(&outbox, work, &[(call, error, format!("{nth}{lasts}"))]);
            let count = (1..).map_while(sent).count();
            println!("{work}: {call} {error}{lasts}: {count} places");
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
        assert_eq!(
            (found.uid(), found.gid(), found.mode() & 0o777),
            (OWNER, OWNER, 0o600),
            "{part}"
        );
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
        let looks = |path: &Path| {
            fs::metadata(path)
                .map(|m| (m.ino(), m.uid(), m.mode(), m.len(), m.ctime_nsec()))
                .unwrap()
        };
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

/// The program, which adds to the outbox of an agent dir.
fn push_of(dir: &Path, decky: &str) -> Command {
    let mut push = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    push.arg("--config").arg(dir.join("decnet.ini")).arg("--agent-dir").arg(dir.join("agent"));
    push.args(["push", "--no-wait", "--operation", "deploy", "--status", "succeeded", decky]);
    push
}

/// Whether it has kept its delta.
fn push(dir: &Path, decky: &str) -> bool {
    push_of(dir, decky).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
#[ignore = "takes seconds, and starts many processes"]
fn no_delta_is_lost_while_the_files_are_removed_renamed_and_replaced() {
    for part in ["", "-wal", "-shm", "-lock"] {
        for how in ["removed", "renamed", "replaced", "replaced by an older one"] {
            let dir = tempfile::tempdir().unwrap();
            let loopback = Loopback::new(&dir.path().join("agent"));
            loopback.worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
            let (builder, tick) = loopback.builder();
            let heartbeat = builder.start().unwrap();
            let place = dir.path().join(format!("agent/heartbeat.db{part}"));
            let (older, next) = (dir.path().join("older"), dir.path().join("agent/next"));
            // By another process, as closing it would drop the locks that SQLite has on it in this one.
            let copy = |from: &Path, to: &Path| {
                process::run(Command::new("cp").arg("-p").arg(from).arg(to))
            };
            copy(&place, &older);
            let (is_over, pushes) = (AtomicBool::new(false), AtomicU32::new(0));
            let kept: Vec<String> = thread::scope(|scope| {
                let (is_over, pushes, dir, heartbeat) = (&is_over, &pushes, dir.path(), &heartbeat);
                let library = scope.spawn(move || {
                    let numbers = (0..).take_while(|_| !is_over.load(Ordering::Relaxed));
                    let push = |n: u32| {
                        let decky = format!("l{n}");
                        let pushed = heartbeat
                            .deltas()
                            .push(LifecycleDelta::succeeded(&decky, Operation::Deploy));
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
                    // What somebody else has added must have been seen before it is taken away.
                    let seen = pushes.load(Ordering::Relaxed) + 3;
                    while pushes.load(Ordering::Relaxed) < seen
                        || heartbeat.stats().outbox.is_none()
                    {
                        beat(&tick);
                        thread::sleep(Duration::from_millis(5));
                    }
                    // It may be gone just now.
                    let _ = match how {
                        "removed" => fs::remove_file(&place),
                        "renamed" => fs::rename(&place, place.with_extension(format!("old-{n}"))),
                        "replaced by an older one" => {
                            copy(&older, &next);
                            fs::rename(&next, &place)
                        }
                        _ => {
                            fs::write(&next, "").unwrap();
                            fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).unwrap();
                            fs::rename(&next, &place)
                        }
                    };
                    beat(&tick);
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
                kept.iter().filter(|decky| !sent.contains(*decky)).cloned().collect::<Vec<_>>()
            };
            let end = Instant::now() + Duration::from_secs(10);
            while !missing().is_empty() && Instant::now() < end {
                beat(&tick);
                thread::sleep(Duration::from_millis(100));
            }
            let names: Vec<_> = fs::read_dir(dir.path().join("agent"))
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            println!("{part} {how}: {} kept, lost {:?}", kept.len(), missing());
            assert!(
                missing().is_empty(),
                "{part} {how}: of {} {:?} {names:?}",
                kept.len(),
                missing()
            );
        }
    }
}

#[test]
#[ignore = "starts many processes"]
fn no_delta_is_lost_where_the_host_program_reads_the_outbox_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut loopback = Loopback::new(&dir.path().join("agent"));
    loopback.worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
    let (builder, tick) = loopback.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    loopback.master.stop();
    let log = dir.path().join("agent/heartbeat.db-wal");
    let log = || fs::metadata(&log).map(|found| found.ino()).ok();
    let (mut kept, mut lost_logs) = (Vec::new(), 0);
    for n in 0..20 {
        let (ours, theirs) = (format!("l{n}"), format!("p{n}"));
        heartbeat.deltas().push(deployed(&ours)).unwrap();
        let before = log();
        // As a backup does. Its end drops the locks that SQLite has on these files in this process. That on the database alone is
        // not enough: SQLite looks at those of the index, too.
        for part in ["", "-wal", "-shm"] {
            let _ = fs::read(dir.path().join(format!("agent/heartbeat.db{part}")));
        }
        // So another one takes itself for the last one, and removes the log at its end.
        process::run(&mut child(dir.path(), "look"));
        lost_logs += u32::from(log() != before);
        if n % 2 == 0 {
            // It makes a log anew, while the heartbeat has the old one.
            assert!(push(dir.path(), &theirs));
            kept.push(theirs);
        }
        if n % 3 == 0 {
            beat(&tick);
        }
        kept.push(ours);
    }
    assert!(lost_logs > 10, "{lost_logs}");
    loopback.master.start_again().unwrap();
    beats_until_sent(&loopback, &heartbeat, &tick, &kept);
    assert!(heartbeat.flush(Duration::from_secs(10)));
    let mut sent = loopback.sent();
    sent.sort();
    kept.sort();
    assert_eq!(sent, kept, "each of them once");
}

/// A push of the program that is suspended in the middle of its commit: its tracer, which writes this trace.
fn suspended_push(dir: &Path, decky: &str, trace: &Path) -> Child {
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
    let push = push_of(dir, decky);
    strace.arg(push.get_program()).args(push.get_args()).stdout(Stdio::null()).spawn().unwrap()
}

/// Waits until the process is suspended, and gives its id.
fn suspended(trace: &Path) -> u32 {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let said = fs::read_to_string(trace).unwrap_or_default();
        if let Some(line) = said.lines().find(|line| line.contains("stopped by SIGSTOP")) {
            return line.split_whitespace().next().unwrap().parse().unwrap();
        }
        assert!(Instant::now() < end, "{said}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "needs strace"]
fn while_a_process_is_suspended_within_its_turn_pushes_are_refused_and_beats_go_on() {
    for how in ["CONT", "KILL"] {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().canonicalize().unwrap();
        let loopback = Loopback::new(&dir.join("agent"));
        loopback.worker.write_ini(&dir.join("decnet.ini")).unwrap();
        let (builder, tick) = loopback.builder();
        let heartbeat = builder.start().unwrap();
        heartbeat.deltas().push(deployed("before")).unwrap();
        let trace = dir.join("trace");
        let mut tracer = suspended_push(&dir, "suspended", &trace);
        let pid = suspended(&trace);

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
        let mut program = push_of(&dir, "refused");
        let output = program.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("was suspended while it did"), "{said}");
        for _ in 0..3 {
            let beats = heartbeat.stats().beats;
            beat(&tick);
            settled(&heartbeat, |stats| stats.beats > beats);
        }

        process::signal(how, pid);
        // Its own caller has heard that it is in doubt.
        process::end(&mut tracer, Duration::from_secs(20)).unwrap();
        heartbeat.deltas().push(deployed("after")).unwrap();
        beats_until_sent(&loopback, &heartbeat, &tick, &["before".to_owned(), "after".to_owned()]);
        assert!(!loopback.sent().contains(&"refused".to_owned()));
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
    rusqlite::Connection::open(&file)
        .unwrap()
        .execute_batch("ALTER TABLE delta RENAME TO theirs")
        .unwrap();
    fs::remove_file(&file).unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d1", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2);
    let said = errors(&agent_dir);
    assert!(
        said.iter()
            .any(|line| line.contains("outbox file was replaced; deltas that only it had are lost")),
        "{said:#?}"
    );
}
