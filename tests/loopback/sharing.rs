//! Which users can share an outbox, and that `check` reports it correctly.

use std::fs::{self, Permissions, set_permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::check::step_of;
use crate::hand_over::start_run;
use crate::support::{
    ChildProcess, Fixture, TIMEOUT, in_shell_after, wait_for_file, wait_for_line,
};

const ROOT: u32 = 0;
const OWNER: u32 = 4_711;
const OTHER: u32 = 4_712;

/// A worker whose agent dir belongs to a given user, and a program that every user may run.
struct Worker {
    fixture: Fixture,
    program: PathBuf,
}

impl Worker {
    fn of(owner: u32, mode: u32) -> Self {
        let fixture = Fixture::new();
        let dir = fixture.dir.path();
        let program = fixture.path("decnet-heartbeat");
        // Copied by another process. A child process of another test could inherit the descriptor
        // of a copy that this process writes, and the copy could not be run then.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_decnet-heartbeat"))
            .arg(&program)
            .status()
            .unwrap();
        assert!(copied.success());
        fixture.write_ini();
        chown(fixture.agent_dir(), Some(owner), Some(owner)).unwrap();
        for (path, mode) in [(dir, 0o755), (&program, 0o755), (&fixture.ini(), 0o644)] {
            set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        set_permissions(fixture.agent_dir(), Permissions::from_mode(mode)).unwrap();
        Self { fixture, program }
    }

    fn file(&self, part: &str) -> PathBuf {
        self.fixture.agent_dir().join(format!("heartbeat.db{part}"))
    }

    fn as_user(&self, user: u32) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().uid(user).gid(user).stdin(Stdio::null());
        command.arg("--config").arg(self.fixture.ini());
        command
    }

    fn push_command(&self, user: u32) -> Command {
        let mut push = self.as_user(user);
        push.args(["push", "--no-wait", "--operation", "deploy", "--status", "succeeded", "d1"]);
        push
    }

    /// Whether a push of this user is queued.
    fn push(&self, user: u32) -> bool {
        self.push_command(user).output().unwrap().status.success()
    }

    /// The step `outbox` of `check`: whether it passed, its message and its advice.
    fn check(&self, user: u32) -> (bool, String, String) {
        let output = self.as_user(user).args(["check", "--json"]).output().unwrap();
        let step = step_of(&output, "outbox");
        let text = |key: &str| step[key].as_str().unwrap_or_default().to_owned();
        (step["outcome"] == "ok", text("message"), text("advice"))
    }

    /// Asserts that these users can use the outbox, and that `check` reports that.
    #[track_caller]
    fn assert_shared_by(&self, users: &[u32]) {
        for user in users {
            let (is_good, message, advice) = self.check(*user);
            assert!(
                is_good && !advice.contains("share") && !advice.contains("chown"),
                "{user}: {message}: {advice}"
            );
            assert!(self.push(*user), "{user}");
        }
    }
}

/// Runs the `chown` of the advice.
fn follow(advice: &str) {
    let words = advice.split_once("chown ").unwrap_or_else(|| panic!("{advice}")).1;
    let [owner, file] = words.splitn(3, ' ').take(2).collect::<Vec<_>>()[..] else {
        panic!("{advice}")
    };
    let status =
        Command::new("chown").arg(owner).arg(file.trim_end_matches([',', ';'])).status().unwrap();
    assert!(status.success(), "{advice}");
}

fn owner(file: &Path) -> u32 {
    fs::symlink_metadata(file).unwrap().uid()
}

#[test]
#[ignore = "needs root, for two other users"]
fn root_and_folder_owner_share_an_outbox_that_either_created() {
    for first in [ROOT, OWNER] {
        let worker = Worker::of(OWNER, 0o755);
        for user in [ROOT, OWNER] {
            let (is_good, message, advice) = worker.check(user);
            assert_eq!((is_good, advice.as_str()), (true, ""), "{message}");
        }
        assert!(worker.push(first));
        worker.assert_shared_by(&[ROOT, OWNER]);
        assert_eq!(owner(&worker.file("-lock")), OWNER);
    }
}

#[test]
#[ignore = "needs root, for two other users"]
fn push_of_the_folder_owner_is_handed_over_to_a_run_of_root() {
    let worker = Worker::of(OWNER, 0o755);
    let fixture = &worker.fixture;
    fixture.master.open_operation(&fixture.worker.uuid, "d1", "deploy");
    let _run = start_run(fixture, "1h");
    assert_eq!(owner(&worker.file("-wake")), OWNER);
    assert!(
        worker.push(OWNER),
        "with --no-wait, so it only wakes run, whose next tick is in an hour"
    );
    fixture.wait_for_closed_rows(1);
}

#[test]
#[ignore = "needs root, for two other users"]
fn third_user_is_advised_who_can_share_the_outbox() {
    let worker = Worker::of(OWNER, 0o755);
    let advised = format!("only root and user {OWNER} can share an outbox in ");
    let (is_good, message, advice) = worker.check(OTHER);
    assert!(
        !is_good && message.contains("cannot be written") && advice.contains(&advised),
        "{message}: {advice}"
    );
    assert!(worker.push(OWNER));
    let (is_good, message, advice) = worker.check(OTHER);
    assert!(
        !is_good
            && message
                .ends_with(&format!("belongs to user {OWNER}, but check runs as user {OTHER}")),
        "{message}"
    );
    assert!(advice.starts_with(&advised) && !worker.push(OTHER), "{advice}");

    // In a folder that all users can write, this user can create an outbox that root and the owner
    // of the folder cannot use.
    let worker = Worker::of(OWNER, 0o777);
    let (is_good, message, advice) = worker.check(OTHER);
    assert!(is_good && advice.starts_with(&advised), "{message}: {advice}");
    assert!(worker.push(OTHER));
    let (is_good, message, advice) = worker.check(OTHER);
    assert!(
        is_good && advice.contains(&advised) && advice.contains("chown"),
        "{message}: {advice}"
    );
    for user in [ROOT, OWNER] {
        assert!(!worker.check(user).0 && !worker.push(user), "{user}");
    }
}

#[test]
#[ignore = "needs root, for two other users"]
fn outbox_of_another_user_in_a_folder_of_root_is_rejected_and_the_advice_works() {
    let worker = Worker::of(ROOT, 0o1777);
    assert!(worker.push(OTHER));
    let (is_good, message, _) = worker.check(ROOT);
    let expected = format!("heartbeat.db belongs to user {OTHER}, and its folder to root");
    assert!(!is_good && message.ends_with(&expected), "{message}");
    assert!(!worker.push(ROOT));
    while let (false, _, advice) = worker.check(ROOT) {
        follow(&advice);
    }
    worker.assert_shared_by(&[ROOT]);
}

#[test]
#[ignore = "needs root, for two other users"]
fn each_file_with_a_wrong_owner_is_named_and_the_advice_works() {
    for part in ["", "-journal", "-wal", "-shm", "-lock"] {
        for user in [ROOT, OTHER] {
            let worker = Worker::of(OWNER, 0o755);
            assert!(worker.push(OWNER));
            let file = worker.file(part);
            if !file.exists() {
                fs::write(&file, "").unwrap();
                set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
            }
            chown(&file, Some(user), Some(user)).unwrap();
            let (is_good, message, advice) = worker.check(OWNER);
            assert!(
                !is_good && message.contains(&format!("heartbeat.db{part} belongs to ")),
                "{part} {user}: {message}"
            );
            let (is_good, message, advice_to_root) = worker.check(ROOT);
            assert_eq!(is_good, user == ROOT, "{part}: {message}");
            assert!(
                advice_to_root.contains(&format!("chown {OWNER}:{OWNER} {}", file.display())),
                "{part}: {advice_to_root}"
            );
            assert_eq!(owner(&file), user, "check changes nothing");
            follow(&advice);
            worker.assert_shared_by(&[OWNER, ROOT]);
        }
    }
}

#[test]
#[ignore = "needs root, for another user"]
fn files_left_by_a_killed_root_process_do_not_lock_out_the_owner() {
    for part in ["", "-journal", "-wal", "-shm", "-lock"] {
        let worker = Worker::of(OWNER, 0o755);
        assert!(part.is_empty() || worker.push(ROOT), "{part}");
        fs::write(worker.file(part), "").unwrap();
        set_permissions(worker.file(part), Permissions::from_mode(0o600)).unwrap();
        chown(worker.file(part), Some(ROOT), Some(ROOT)).unwrap();
        assert!(worker.push(OWNER), "{part}");
        worker.assert_shared_by(&[ROOT, OWNER]);
    }
}

#[test]
#[ignore = "needs root, for another user"]
fn no_umask_locks_out_the_owner() {
    for (user, umask) in [(ROOT, "0777"), (OWNER, "0777"), (ROOT, "0"), (OWNER, "0")] {
        let worker = Worker::of(OWNER, 0o755);
        let push = worker.push_command(user);
        let mut shell = in_shell_after(&format!("umask {umask}"), &push);
        let status = shell.uid(user).gid(user).status().unwrap();
        assert!(status.success(), "{user}, {umask}");
        let mode = |part| fs::metadata(worker.file(part)).unwrap().permissions().mode() & 0o777;
        assert_eq!(["", "-lock"].map(mode), [0o600; 2], "{user}, {umask}");
        worker.assert_shared_by(&[ROOT, OWNER]);
    }
}

/// The capabilities that the unit's drop-in gives to root, in the syntax of setpriv.
fn capabilities_of_the_drop_in() -> String {
    let page = include_str!("../../src/docs/operations.md");
    let mut sets = page.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let set = sets.next_back().unwrap().to_lowercase();
    set.split(' ')
        .map(|capability| format!(",+{}", capability.strip_prefix("cap_").unwrap()))
        .collect()
}

#[test]
#[ignore = "needs root, for another user, and setpriv"]
fn unit_of_root_needs_only_its_drop_in_for_a_folder_of_another_user() {
    let run = |worker: &Worker, capabilities: &str| {
        let mut command = Command::new("setpriv");
        command.arg(format!("--bounding-set=-all{capabilities}")).arg(&worker.program).env_clear();
        command.arg("--config").arg(worker.fixture.ini());
        ChildProcess::start(
            command.args(["run", "--interval", "50ms"]).stdin(Stdio::null()).stderr(Stdio::piped()),
        )
    };
    let worker = Worker::of(OWNER, 0o755);
    let mut without = run(&worker, "");
    let log = without.stderr_lines();
    assert!(wait_for_line(&log, "outbox in memory").contains("Permission denied"));
    assert_eq!(without.terminate(TIMEOUT), Some(0));
    let mut with = run(&worker, &capabilities_of_the_drop_in());
    let _log = with.stderr_lines();
    wait_for_file(worker.file(""));
    worker.fixture.master.open_operation(&worker.fixture.worker.uuid, "d1", "deploy");
    worker.assert_shared_by(&[OWNER, ROOT]);
    worker.fixture.wait_for_closed_rows(1);
    assert_eq!(
        [worker.file(""), worker.file("-wal"), worker.file("-lock")].map(|file| owner(&file)),
        [OWNER; 3]
    );
    assert_eq!(with.terminate(TIMEOUT), Some(0));
}
