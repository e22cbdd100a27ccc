//! Who else may write into the folders of the heartbeat's files is said by `check` and in the log.

use std::fs::{Permissions, create_dir, set_permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::program::{program, run};
use crate::support::{PATIENCE, Running, Stage, line_with, lines};

fn chmod(path: &Path, mode: u32) {
    set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// What `check` advises about the agent dir at this path.
fn advice(stage: &Stage, agent_dir: &Path) -> Option<String> {
    advice_of(stage, agent_dir, "agent-dir", &[])
}

/// What it advises in a step, with these arguments.
fn advice_of(stage: &Stage, agent_dir: &Path, name: &str, arguments: &[&Path]) -> Option<String> {
    let ini = stage.dir.path().join("decnet.ini");
    stage.worker.write_ini(&ini).unwrap();
    let mut check = program();
    check
        .arg("--config")
        .arg(ini)
        .arg("--agent-dir")
        .arg(agent_dir)
        .args(["check", "--json"])
        .args(arguments);
    let output = check.stdin(Stdio::null()).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let steps = report["steps"].as_array().unwrap();
    let step = steps.iter().find(|step| step["step"] == name).unwrap();
    assert_eq!(step["outcome"], "ok");
    step["advice"].as_str().map(str::to_owned)
}

#[test]
fn check_names_the_folder_that_lets_others_write() {
    let stage = Stage::new();
    let (above, dir) = (stage.dir.path(), stage.agent_dir());
    let says = |folder: &Path, mode: &str| {
        let why = format!("because {} has the mode {mode}: ", folder.display());
        let advice = advice(&stage, &dir);
        assert!(advice.as_ref().is_some_and(|advice| advice.contains(&why)), "{why}: {advice:?}");
    };
    chmod(&dir, 0o755);
    assert_eq!(advice(&stage, &dir), None);
    for (mode, shown) in [(0o775, "0775"), (0o757, "0757"), (0o1777, "1777")] {
        chmod(&dir, mode);
        says(&dir, shown);
    }
    chmod(&dir, 0o700);
    chmod(above, 0o777);
    says(above, "0777");
    // Nobody else may move what is there.
    chmod(above, 0o1777);
    assert_eq!(advice(&stage, &dir), None);
}

#[test]
fn a_symlink_to_the_agent_dir_hides_no_folder() {
    let stage = Stage::new();
    let (open, link) = (stage.dir.path().join("open"), stage.dir.path().join("link"));
    create_dir(&open).unwrap();
    std::fs::rename(stage.agent_dir(), open.join("agent")).unwrap();
    symlink(open.join("agent"), &link).unwrap();
    assert_eq!(advice(&stage, &link), None);
    chmod(&open, 0o777);
    assert!(
        advice(&stage, &link).unwrap().contains(&format!("{} has the mode 0777", open.display()))
    );
}

#[test]
fn check_names_the_folder_of_an_outbox_that_lets_others_write() {
    let stage = Stage::new();
    let (above, dir) = (stage.dir.path().join("above"), stage.agent_dir());
    let beside = above.join("beside");
    create_dir(&above).unwrap();
    create_dir(&beside).unwrap();
    let of_outbox = |file: &Path| advice_of(&stage, &dir, "outbox", &[Path::new("--outbox"), file]);
    assert_eq!(of_outbox(&beside.join("x.db")), None);
    for folder in [&beside, &above] {
        chmod(folder, 0o777);
        let why = format!(
            "other users may replace the heartbeat's files, because {} has the mode 0777: ",
            folder.display()
        );
        let advice = of_outbox(&beside.join("x.db"));
        assert!(
            advice.as_ref().is_some_and(|advice| advice.starts_with(&why)),
            "{why}: {advice:?}"
        );
        chmod(folder, 0o755);
    }
    // Of the agent dir it is said once.
    chmod(&dir, 0o777);
    let link = stage.dir.path().join("link");
    symlink(&dir, &link).unwrap();
    assert!(advice(&stage, &dir).is_some());
    assert_eq!(advice_of(&stage, &dir, "outbox", &[]), None);
    assert_eq!(of_outbox(&link.join("x.db")), None);
}

#[test]
#[ignore = "needs root, to give a folder away"]
fn a_folder_above_that_is_another_users_lets_him_write() {
    let stage = Stage::new();
    assert_eq!(advice(&stage, &stage.agent_dir()), None);
    chown(stage.dir.path(), Some(1_000), None).unwrap();
    let why = format!("{} belongs to the user 1000", stage.dir.path().display());
    assert!(advice(&stage, &stage.agent_dir()).unwrap().contains(&why));
    chown(stage.agent_dir(), Some(1_000), None).unwrap();
    assert_eq!(advice(&stage, &stage.agent_dir()), None);
}

#[test]
fn run_warns_of_others_who_may_write_beside_its_files() {
    let stage = Stage::new();
    let beside = stage.dir.path().join("beside");
    create_dir(&beside).unwrap();
    for folder in [&beside, &stage.agent_dir()] {
        chmod(folder, 0o777);
        let mut command = run(&stage.worker, stage.dir.path());
        let mut run = Running::start(command.arg("--outbox").arg(beside.join("outbox.db")));
        let lines = lines(run.0.stderr.take().unwrap());
        let line = line_with(&lines, "other users may replace the heartbeat's files: ");
        assert!(
            line.contains("WARN") && line.contains(&format!("folder={} ", folder.display())),
            "{line}"
        );
        assert!(
            line.ends_with(&format!("reason=\"{} has the mode 0777\"", folder.display())),
            "{line}"
        );
        assert_eq!(run.terminate(PATIENCE), Some(0));
        chmod(folder, 0o755);
    }
}
