//! The exit codes of `run` and `check` if the configuration cannot be used: 78 only if a restart
//! cannot help.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use decnet_heartbeat::loopback::Role;

use crate::support::{ChildProcess, Fixture, TIMEOUT, program};

/// How long the enrolment in these tests leaves a file missing.
const MISSING: Duration = Duration::from_millis(300);

/// The exit codes of `run` and `check`.
fn exit_codes(ini: &Path) -> [Option<i32>; 2] {
    ["run", "check"].map(|command| {
        let mut program = program();
        program.arg("--config").arg(ini).arg(command).stdin(Stdio::null());
        program.output().unwrap().status.code()
    })
}

fn run(fixture: &Fixture) -> Command {
    let mut command = program();
    command.arg("--config").arg(fixture.ini()).arg("run").stderr(Stdio::null());
    command
}

fn worker() -> Fixture {
    let fixture = Fixture::new();
    fixture.write_ini();
    fixture
}

#[test]
fn enrolment_in_progress_exits_1() {
    type Damage = fn(&Fixture, &Path);
    let damages: [(&str, Damage); 6] = [
        ("worker.key", |fixture, path| {
            let other = fixture.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
            fs::write(path, other.key).unwrap();
        }),
        ("worker.crt", |_, path| fs::write(path, "").unwrap()),
        ("ca.crt", |_, path| {
            let whole = fs::read(path).unwrap();
            fs::write(path, &whole[..whole.len() / 2]).unwrap();
        }),
        ("ca.crt", |_, path| fs::remove_file(path).unwrap()),
        ("worker.key", |_, path| fs::remove_file(path).unwrap()),
        ("", |_, path| {
            fs::remove_dir_all(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (name, damage) in damages {
        let fixture = worker();
        damage(&fixture, &fixture.agent_dir().join(name));
        assert_eq!(exit_codes(&fixture.ini()), [Some(1); 2], "{name}");
    }
}

#[test]
fn disk_error_exits_1() {
    let fixture = worker();
    let key = fixture.agent_dir().join("worker.key");
    fs::remove_file(&key).unwrap();
    // Reading it fails with EIO.
    symlink("/proc/self/mem", &key).unwrap();
    assert_eq!(exit_codes(&fixture.ini()), [Some(1); 2]);
    let ini = fixture.ini();
    fs::remove_file(&ini).unwrap();
    symlink("/proc/self/mem", &ini).unwrap();
    assert_eq!(exit_codes(&fixture.ini()), [Some(1); 2]);
}

#[test]
fn permanent_problem_exits_78() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("agent/worker.crt", |path| fs::write(path, "garbage").unwrap()),
        ("agent/worker.key", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("agent/ca.crt", |path| {
            fs::remove_file(path).unwrap();
            symlink(path, path).unwrap();
        }),
        ("agent", |path| fs::remove_dir_all(path).unwrap()),
        ("decnet.ini", |path| fs::write(path, "garbage").unwrap()),
        ("decnet.ini", |path| fs::remove_file(path).unwrap()),
    ];
    thread::scope(|scope| {
        for (name, damage) in damages {
            scope.spawn(move || {
                let fixture = worker();
                damage(&fixture.path(name));
                assert_eq!(exit_codes(&fixture.ini()), [Some(78); 2], "{name}");
            });
        }
    });
}

#[test]
fn run_waits_for_an_enrolment_that_replaces_files() {
    thread::scope(|scope| {
        for name in ["agent", "decnet.ini"] {
            scope.spawn(move || {
                let fixture = worker();
                let file = fixture.path(name);
                let renamed = fixture.path("renamed");
                fs::rename(&file, &renamed).unwrap();
                let mut running = ChildProcess::start(&mut run(&fixture));
                running.wait_for_thread("signals");
                // No event shows that `run` is waiting: it must not have ended by then.
                thread::sleep(MISSING);
                assert_eq!(running.0.try_wait().unwrap(), None, "{name}");
                fs::rename(&renamed, &file).unwrap();
                assert!(fixture.master.wait_for_beats(1, TIMEOUT), "{name}");
                assert_eq!(running.terminate(TIMEOUT), Some(0), "{name}");
            });
        }
    });
}

#[test]
fn signal_ends_the_wait_for_an_enrolment() {
    let fixture = worker();
    fs::remove_file(fixture.ini()).unwrap();
    let mut running = ChildProcess::start(&mut run(&fixture));
    running.wait_for_thread("signals");
    assert_eq!(running.terminate(TIMEOUT), Some(0));
}

#[test]
fn ini_that_may_still_appear_exits_1() {
    let dir = tempfile::tempdir().unwrap();
    let ini = dir.path().join("etc/decnet.ini");
    assert_eq!(exit_codes(&ini), [Some(1); 2], "its folder is missing, and the one above is empty");
    fs::create_dir(dir.path().join("etc")).unwrap();
    assert_eq!(exit_codes(&ini), [Some(1); 2], "its folder is empty");
    fs::write(dir.path().join("etc/other"), "").unwrap();
    assert_eq!(exit_codes(&ini), [Some(78); 2], "its folder has other files");
    symlink("/nonexistent/decnet.ini", &ini).unwrap();
    assert_eq!(exit_codes(&ini), [Some(1); 2], "it is a symlink, whose target may be mounted");
    fs::remove_file(&ini).unwrap();
    fs::write(&ini, "").unwrap();
    assert_eq!(exit_codes(&ini), [Some(1); 2], "it is empty");
}

#[test]
fn exhausted_descriptors_exit_1() {
    let fixture = worker();
    let ini = fixture.ini();
    let mut log = String::new();
    for count in 4..12 {
        // With enough descriptors it beats until `timeout` stops it.
        let script = format!("ulimit -n {count}; exec timeout 1 \"$@\"");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_decnet-heartbeat"), "--config"])
            .arg(&ini)
            .arg("run");
        let output = command.env_remove("DECNET_CONFIG").stdin(Stdio::null()).output().unwrap();
        assert!(matches!(output.status.code(), Some(1 | 124)), "{count}: {output:?}");
        log += &String::from_utf8_lossy(&output.stderr);
    }
    assert!(
        log.contains(
            "decnet.ini: cannot be read; raise the limit of open files: Too many open files"
        ),
        "{log}"
    );
}
