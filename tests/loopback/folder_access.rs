//! `check` and the log name folders of the heartbeat's files that other users can write.

use std::fs::{Permissions, create_dir, set_permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Stdio;

use crate::check::step_of;
use crate::support::{ChildProcess, Fixture, TIMEOUT, program, wait_for_line};

fn chmod(path: &Path, mode: u32) {
    set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// The advice of `check` about the agent dir at this path.
fn advice(fixture: &Fixture, agent_dir: &Path) -> Option<String> {
    advice_of(fixture, agent_dir, "agent-dir", &[])
}

/// The advice of a step, with these arguments.
fn advice_of(
    fixture: &Fixture,
    agent_dir: &Path,
    name: &str,
    arguments: &[&Path],
) -> Option<String> {
    fixture.write_ini();
    let mut check = program();
    check.arg("--config").arg(fixture.ini()).arg("--agent-dir").arg(agent_dir);
    check.args(["check", "--json"]).args(arguments).stdin(Stdio::null());
    let step = step_of(&check.output().unwrap(), name);
    assert_eq!(step["outcome"], "ok");
    step["advice"].as_str().map(str::to_owned)
}

#[test]
fn check_names_the_folder_that_others_can_write() {
    let fixture = Fixture::new();
    let parent = fixture.dir.path();
    let dir = fixture.agent_dir();
    let assert_names = |folder: &Path, mode: &str| {
        let reason = format!("because {} has the mode {mode}: ", folder.display());
        let advice = advice(&fixture, &dir);
        assert!(
            advice.as_ref().is_some_and(|advice| advice.contains(&reason)),
            "{reason}: {advice:?}"
        );
    };
    chmod(&dir, 0o755);
    assert_eq!(advice(&fixture, &dir), None);
    for (mode, shown) in [(0o775, "0775"), (0o757, "0757"), (0o1777, "1777")] {
        chmod(&dir, mode);
        assert_names(&dir, shown);
    }
    chmod(&dir, 0o700);
    chmod(parent, 0o777);
    assert_names(parent, "0777");
    // In a sticky folder, only the owner of a file may rename it.
    chmod(parent, 0o1777);
    assert_eq!(advice(&fixture, &dir), None);
}

#[test]
fn symlink_to_the_agent_dir_hides_no_folder() {
    let fixture = Fixture::new();
    let open = fixture.path("open");
    let link = fixture.path("link");
    create_dir(&open).unwrap();
    std::fs::rename(fixture.agent_dir(), open.join("agent")).unwrap();
    symlink(open.join("agent"), &link).unwrap();
    assert_eq!(advice(&fixture, &link), None);
    chmod(&open, 0o777);
    assert!(
        advice(&fixture, &link).unwrap().contains(&format!("{} has the mode 0777", open.display()))
    );
}

#[test]
fn check_names_the_outbox_folder_that_others_can_write() {
    let fixture = Fixture::new();
    let parent = fixture.path("parent");
    let dir = fixture.agent_dir();
    let outbox_dir = parent.join("outbox");
    create_dir(&parent).unwrap();
    create_dir(&outbox_dir).unwrap();
    let outbox_advice =
        |file: &Path| advice_of(&fixture, &dir, "outbox", &[Path::new("--outbox"), file]);
    assert_eq!(outbox_advice(&outbox_dir.join("x.db")), None);
    for folder in [&outbox_dir, &parent] {
        chmod(folder, 0o777);
        let reason = format!(
            "other users may replace the heartbeat's files, because {} has the mode 0777: ",
            folder.display()
        );
        let advice = outbox_advice(&outbox_dir.join("x.db"));
        assert!(
            advice.as_ref().is_some_and(|advice| advice.starts_with(&reason)),
            "{reason}: {advice:?}"
        );
        chmod(folder, 0o755);
    }
    // The agent dir is named once.
    chmod(&dir, 0o777);
    let link = fixture.path("link");
    symlink(&dir, &link).unwrap();
    assert!(advice(&fixture, &dir).is_some());
    assert_eq!(advice_of(&fixture, &dir, "outbox", &[]), None);
    assert_eq!(outbox_advice(&link.join("x.db")), None);
}

#[test]
#[ignore = "needs root, to give a folder away"]
fn owner_of_a_parent_folder_can_write() {
    let fixture = Fixture::new();
    assert_eq!(advice(&fixture, &fixture.agent_dir()), None);
    chown(fixture.dir.path(), Some(1_000), None).unwrap();
    let reason = format!("{} belongs to the user 1000", fixture.dir.path().display());
    assert!(advice(&fixture, &fixture.agent_dir()).unwrap().contains(&reason));
    chown(fixture.agent_dir(), Some(1_000), None).unwrap();
    assert_eq!(advice(&fixture, &fixture.agent_dir()), None);
}

#[test]
fn run_warns_of_folders_that_others_can_write() {
    let fixture = Fixture::new();
    let outbox_dir = fixture.path("outbox");
    create_dir(&outbox_dir).unwrap();
    for folder in [&outbox_dir, &fixture.agent_dir()] {
        chmod(folder, 0o777);
        let mut command = fixture.run_command();
        let mut run =
            ChildProcess::start(command.arg("--outbox").arg(outbox_dir.join("outbox.db")));
        let log = run.stderr_lines();
        let line = wait_for_line(&log, "other users may replace the heartbeat's files: ");
        assert!(
            line.contains("WARN") && line.contains(&format!("folder={} ", folder.display())),
            "{line}"
        );
        assert!(
            line.ends_with(&format!("reason=\"{} has the mode 0777\"", folder.display())),
            "{line}"
        );
        assert_eq!(run.terminate(TIMEOUT), Some(0));
        chmod(folder, 0o755);
    }
}
