//! Which users can share an outbox: what `check` reports, and that it is true.

use std::fs::{self, Permissions, set_permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::{PATIENCE, Running, Stage, line_with, lines};

const ROOT: u32 = 0;
const OWNER: u32 = 4_711;
const OTHER: u32 = 4_712;

/// A worker whose agent dir belongs to some user, and a program that every user may run.
struct Worker {
    stage: Stage,
    program: PathBuf,
}

impl Worker {
    fn of(owner: u32, mode: u32) -> Self {
        let stage = Stage::new();
        let (dir, program) = (stage.dir.path(), stage.dir.path().join("decnet-heartbeat"));
        // By another process: one that a test starts meanwhile would have the copy open for writing, and nobody could run it.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_decnet-heartbeat"))
            .arg(&program)
            .status()
            .unwrap();
        assert!(copied.success());
        stage.worker.write_ini(&dir.join("decnet.ini")).unwrap();
        chown(stage.agent_dir(), Some(owner), Some(owner)).unwrap();
        for (path, mode) in [(dir, 0o755), (&program, 0o755), (&dir.join("decnet.ini"), 0o644)] {
            set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        set_permissions(stage.agent_dir(), Permissions::from_mode(mode)).unwrap();
        Self { stage, program }
    }

    fn file(&self, part: &str) -> PathBuf {
        self.stage.agent_dir().join(format!("heartbeat.db{part}"))
    }

    fn as_user(&self, user: u32) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().uid(user).gid(user).stdin(Stdio::null());
        command.arg("--config").arg(self.stage.dir.path().join("decnet.ini"));
        command
    }

    fn pushing(&self, user: u32) -> Command {
        let mut push = self.as_user(user);
        push.args(["push", "--no-wait", "--operation", "deploy", "--status", "succeeded", "d1"]);
        push
    }

    /// Whether the outbox has kept it.
    fn push(&self, user: u32) -> bool {
        self.pushing(user).output().unwrap().status.success()
    }

    /// Whether the step `outbox` is good, its message and its advice.
    fn check(&self, user: u32) -> (bool, String, String) {
        let report = self.as_user(user).args(["check", "--json"]).output().unwrap();
        let report: Value =
            serde_json::from_slice(&report.stdout).unwrap_or_else(|_| panic!("{report:?}"));
        let step = report["steps"]
            .as_array()
            .unwrap()
            .iter()
            .find(|step| step["step"] == "outbox")
            .unwrap()
            .clone();
        let text = |key: &str| step[key].as_str().unwrap_or_default().to_owned();
        (step["outcome"] == "ok", text("message"), text("advice"))
    }

    /// They use it, and nothing is said against it.
    #[track_caller]
    fn is_shared_by(&self, users: &[u32]) {
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

/// Follows the advice.
fn follow(advice: &str) {
    let words = advice.split_once("chown ").unwrap_or_else(|| panic!("{advice}")).1;
    let [whose, file] = words.splitn(3, ' ').take(2).collect::<Vec<_>>()[..] else {
        panic!("{advice}")
    };
    let done =
        Command::new("chown").arg(whose).arg(file.trim_end_matches([',', ';'])).status().unwrap();
    assert!(done.success(), "{advice}");
}

fn owner(file: &Path) -> u32 {
    fs::symlink_metadata(file).unwrap().uid()
}

#[test]
#[ignore = "needs root, for two other users"]
fn root_and_the_owner_of_the_folder_share_an_outbox_whoever_makes_it() {
    for first in [ROOT, OWNER] {
        let worker = Worker::of(OWNER, 0o755);
        for user in [ROOT, OWNER] {
            let (is_good, message, advice) = worker.check(user);
            assert_eq!((is_good, advice.as_str()), (true, ""), "{message}");
        }
        assert!(worker.push(first));
        worker.is_shared_by(&[ROOT, OWNER]);
        assert_eq!(owner(&worker.file("-lock")), OWNER);
    }
}

#[test]
#[ignore = "needs root, for two other users"]
fn a_third_user_is_told_who_can_share_an_outbox_there() {
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

    // There he can make one of his own, which is of no use to the two others.
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
fn an_outbox_of_another_user_in_roots_folder_is_refused_and_the_advice_helps() {
    let worker = Worker::of(ROOT, 0o1777);
    assert!(worker.push(OTHER));
    let (is_good, message, _) = worker.check(ROOT);
    let expected = format!("heartbeat.db belongs to user {OTHER}, and its folder to root");
    assert!(!is_good && message.ends_with(&expected), "{message}");
    assert!(!worker.push(ROOT));
    while let (false, _, advice) = worker.check(ROOT) {
        follow(&advice);
    }
    worker.is_shared_by(&[ROOT]);
}

#[test]
#[ignore = "needs root, for two other users"]
fn each_file_that_the_owner_of_the_folder_cannot_use_is_named_and_the_advice_helps() {
    for part in ["", "-journal", "-wal", "-shm", "-lock"] {
        for whose in [ROOT, OTHER] {
            let worker = Worker::of(OWNER, 0o755);
            assert!(worker.push(OWNER));
            let file = worker.file(part);
            if !file.exists() {
                fs::write(&file, "").unwrap();
                set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
            }
            chown(&file, Some(whose), Some(whose)).unwrap();
            let (is_good, message, advice) = worker.check(OWNER);
            assert!(
                !is_good && message.contains(&format!("heartbeat.db{part} belongs to ")),
                "{part} {whose}: {message}"
            );
            let (is_good, message, of_root) = worker.check(ROOT);
            assert_eq!(is_good, whose == ROOT, "{part}: {message}");
            assert!(
                of_root.contains(&format!("chown {OWNER}:{OWNER} {}", file.display())),
                "{part}: {of_root}"
            );
            assert_eq!(owner(&file), whose, "check changes nothing");
            follow(&advice);
            worker.is_shared_by(&[OWNER, ROOT]);
        }
    }
}

#[test]
#[ignore = "needs root, for another user"]
fn a_file_that_root_was_killed_in_making_keeps_the_owner_of_the_folder_from_nothing() {
    for part in ["", "-journal", "-wal", "-shm", "-lock"] {
        let worker = Worker::of(OWNER, 0o755);
        assert!(part.is_empty() || worker.push(ROOT), "{part}");
        fs::write(worker.file(part), "").unwrap();
        set_permissions(worker.file(part), Permissions::from_mode(0o600)).unwrap();
        chown(worker.file(part), Some(ROOT), Some(ROOT)).unwrap();
        assert!(worker.push(OWNER), "{part}");
        worker.is_shared_by(&[ROOT, OWNER]);
    }
}

#[test]
#[ignore = "needs root, for another user"]
fn no_umask_keeps_anybody_from_an_outbox_that_is_his() {
    for (user, umask) in [(ROOT, "0777"), (OWNER, "0777"), (ROOT, "0"), (OWNER, "0")] {
        let worker = Worker::of(OWNER, 0o755);
        let push = worker.pushing(user);
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")])
            .arg(push.get_program())
            .args(push.get_args());
        assert!(
            shell.env_clear().uid(user).gid(user).status().unwrap().success(),
            "{user}, {umask}"
        );
        let mode = |part| fs::metadata(worker.file(part)).unwrap().permissions().mode() & 0o777;
        assert_eq!(["", "-lock"].map(mode), [0o600; 2], "{user}, {umask}");
        worker.is_shared_by(&[ROOT, OWNER]);
    }
}

/// The capabilities that root has with the unit's drop-in, as setpriv wants them.
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
fn a_unit_of_root_needs_its_drop_in_for_another_users_folder_and_nothing_else() {
    let run = |worker: &Worker, capabilities: &str| {
        let mut command = Command::new("setpriv");
        command.arg(format!("--bounding-set=-all{capabilities}")).arg(&worker.program).env_clear();
        command.arg("--config").arg(worker.stage.dir.path().join("decnet.ini"));
        Running::start(
            command.args(["run", "--interval", "50ms"]).stdin(Stdio::null()).stderr(Stdio::piped()),
        )
    };
    let worker = Worker::of(OWNER, 0o755);
    let mut without = run(&worker, "");
    let lines = lines(without.0.stderr.take().unwrap());
    assert!(line_with(&lines, "outbox in memory").contains("Permission denied"));
    assert_eq!(without.terminate(PATIENCE), Some(0));
    let mut with = run(&worker, &capabilities_of_the_drop_in());
    assert!(worker.stage.master.wait_until(PATIENCE, |_| worker.file("").exists()));
    worker.stage.master.open_operation(&worker.stage.worker.uuid, "d1", "deploy");
    worker.is_shared_by(&[OWNER, ROOT]);
    worker.stage.closed_rows(1);
    assert_eq!(
        [worker.file(""), worker.file("-wal"), worker.file("-lock")].map(|file| owner(&file)),
        [OWNER; 3]
    );
    assert_eq!(with.terminate(PATIENCE), Some(0));
}
