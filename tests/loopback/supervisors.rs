//! The supervisors in other languages on the page about embedding: each one works, and is killed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use decnet_heartbeat::loopback::RowStatus;

use crate::support::{ChildProcess, Fixture, TIMEOUT, lines, wait_for_line};

const PAGE: &str = include_str!("../../src/docs/embedding.md");
const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

/// Does the work for a decky: it succeeds, fails, or does not end.
const WORK: &str = "#!/bin/sh
case $1 in
decky-01) exit 0 ;;
decky-02) exit 3 ;;
esac
echo working $$
exec sleep 1000
";

/// The only example in this language, in a file.
fn example(language: &str, folder: &Path) -> PathBuf {
    let fence = format!("\n```{language}\n");
    let (_, rest) = PAGE.split_once(&fence).expect("an example");
    let (code, rest) = rest.split_once("\n```\n").expect("its end");
    assert!(!rest.contains(&fence), "a second example");
    assert!(code.lines().count() < 60, "{language}: {} lines", code.lines().count());
    write(&folder.join(format!("supervisor.{language}")), code)
}

fn write(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_owned()
}

/// Runs the supervisor for three deckies, and kills it in the work for the third one.
fn works_and_is_killed(fixture: &Fixture, mut supervisor: Command) {
    let deckies = ["decky-01", "decky-02", "decky-03"];
    for decky in deckies {
        fixture.master.open_operation(&fixture.worker.uuid, decky, "deploy");
    }
    supervisor.args(deckies).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut supervisor = ChildProcess::start(&mut supervisor);
    let said = lines(supervisor.0.stdout.take().unwrap());
    let working = wait_for_line(&said, "working");
    fixture.wait_for_closed_rows(2);
    assert_eq!(fixture.master.rows()[2].status, RowStatus::Running);
    supervisor.signal("KILL");
    fixture.wait_for_closed_rows(3);
    let pid = working.trim_start_matches("working ");
    assert!(Command::new("kill").arg(pid).status().unwrap().success(), "the work has not ended");
    let rows = fixture.master.rows();
    let ended: Vec<_> =
        rows.iter().map(|row| (row.status, row.error.as_deref().unwrap_or_default())).collect();
    assert_eq!(ended[0], (RowStatus::Succeeded, ""));
    assert_eq!(ended[1].0, RowStatus::Failed);
    assert!(ended[1].1.contains("status"), "{ended:?}");
    assert_eq!(ended[2], (RowStatus::Failed, "the agent ended during deploy"));
}

/// Runs the supervisor to its end: all is reported by then.
fn ends(fixture: &Fixture, mut supervisor: Command) {
    fixture.master.open_operation(&fixture.worker.uuid, "decky-01", "deploy");
    supervisor.arg("decky-01").stderr(Stdio::null());
    let code = ChildProcess::start(&mut supervisor).wait(TIMEOUT).code();
    assert_eq!(code, Some(0));
    assert_eq!(fixture.master.rows().last().unwrap().status, RowStatus::Succeeded);
}

/// The command runs the supervisor. It is extended with its environment and the work.
fn check(command: impl Fn(&Path) -> Command) {
    let fixture = Fixture::new();
    let folder = fixture.dir.path();
    let ini = folder.join("decnet.ini");
    fixture.worker.write_ini(&ini).unwrap();
    let work = write(&folder.join("work"), WORK);
    let programs = Path::new(PROGRAM).parent().unwrap().to_str().unwrap();
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap());
    let supervisor = || {
        let mut command = command(folder);
        command.env("PATH", &path).env("DECNET_CONFIG", &ini).arg(&work);
        command
    };
    works_and_is_killed(&fixture, supervisor());
    ends(&fixture, supervisor());
}

#[test]
fn the_supervisor_in_python_reports_and_is_reported() {
    check(|folder| {
        let mut command = Command::new("python3");
        command.arg(example("python", folder));
        command
    });
}

#[test]
fn the_supervisor_in_sh_reports_and_is_reported() {
    check(|folder| Command::new(example("sh", folder)));
}

#[test]
fn the_supervisor_in_c_reports_and_is_reported() {
    check(|folder| {
        let program = folder.join("supervisor");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-o"]);
        let compiled = compiler.arg(&program).arg(example("c", folder)).status().unwrap();
        assert!(compiled.success());
        Command::new(program)
    });
}
