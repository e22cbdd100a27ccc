//! What `run` and `check` exit with where the configuration cannot be used: 78 only if a restart cannot mend that.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use decnet_heartbeat::loopback::Role;

use crate::program::program;
use crate::support::{PATIENCE, Running, Stage};

/// So long an enrolment may leave something away.
const MOMENT: Duration = Duration::from_millis(300);

fn codes(stage: &Stage) -> [Option<i32>; 2] {
    let ini = stage.dir.path().join("decnet.ini");
    [&["run"][..], &["check"]]
        .map(|command| exit(program().arg("--config").arg(&ini).args(command)))
}

fn run(stage: &Stage) -> Command {
    let mut command = program();
    command
        .arg("--config")
        .arg(stage.dir.path().join("decnet.ini"))
        .arg("run")
        .stderr(Stdio::null());
    command
}

fn exit(command: &mut Command) -> Option<i32> {
    command.stdin(Stdio::null()).output().unwrap().status.code()
}

fn worker() -> Stage {
    let stage = Stage::new();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    stage
}

#[test]
fn an_enrolment_that_is_under_way_is_1() {
    type Damage = fn(&Stage, &Path);
    let damages: [(&str, Damage); 6] = [
        ("worker.key", |stage, path| {
            let other = stage.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
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
        let stage = worker();
        damage(&stage, &stage.agent_dir().join(name));
        assert_eq!(codes(&stage), [Some(1); 2], "{name}");
    }
}

#[test]
fn a_disk_that_fails_is_1() {
    let stage = worker();
    let key = stage.agent_dir().join("worker.key");
    fs::remove_file(&key).unwrap();
    // Reading it is EIO.
    symlink("/proc/self/mem", &key).unwrap();
    assert_eq!(codes(&stage), [Some(1); 2]);
    let ini = stage.dir.path().join("decnet.ini");
    fs::remove_file(&ini).unwrap();
    symlink("/proc/self/mem", &ini).unwrap();
    assert_eq!(codes(&stage), [Some(1); 2]);
}

#[test]
fn what_a_restart_cannot_mend_is_78() {
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
                let stage = worker();
                damage(&stage.dir.path().join(name));
                assert_eq!(codes(&stage), [Some(78); 2], "{name}");
            });
        }
    });
}

/// An enrolment takes something away, and puts it back while `run` starts.
#[test]
fn what_an_enrolment_is_writing_anew_is_waited_for() {
    thread::scope(|scope| {
        for name in ["agent", "decnet.ini"] {
            scope.spawn(move || {
                let stage = worker();
                let (file, away) = (stage.dir.path().join(name), stage.dir.path().join("away"));
                fs::rename(&file, &away).unwrap();
                let mut running = Running::start(&mut run(&stage));
                running.await_thread("signals");
                thread::sleep(MOMENT);
                assert_eq!(running.0.try_wait().unwrap(), None, "{name}");
                fs::rename(&away, &file).unwrap();
                assert!(stage.master.wait_for_beats(1, PATIENCE), "{name}");
                assert_eq!(running.terminate(PATIENCE), Some(0), "{name}");
            });
        }
    });
}

#[test]
fn a_signal_ends_the_wait_for_an_enrolment() {
    let stage = worker();
    fs::remove_file(stage.dir.path().join("decnet.ini")).unwrap();
    let mut running = Running::start(&mut run(&stage));
    running.await_thread("signals");
    assert_eq!(running.terminate(PATIENCE), Some(0));
}

#[test]
fn an_ini_that_may_still_come_is_1() {
    let dir = tempfile::tempdir().unwrap();
    let ini = dir.path().join("etc/decnet.ini");
    let codes =
        || ["run", "check"].map(|command| exit(program().arg("--config").arg(&ini).arg(command)));
    assert_eq!(codes(), [Some(1); 2], "the folder above its own is empty");
    fs::create_dir(dir.path().join("etc")).unwrap();
    assert_eq!(codes(), [Some(1); 2], "its folder is empty");
    fs::write(dir.path().join("etc/other"), "").unwrap();
    assert_eq!(codes(), [Some(78); 2], "its folder has other files");
    symlink("/nonexistent/decnet.ini", &ini).unwrap();
    assert_eq!(codes(), [Some(1); 2], "it is a symlink, and what that leads to may not be mounted");
    fs::remove_file(&ini).unwrap();
    fs::write(&ini, "").unwrap();
    assert_eq!(codes(), [Some(1); 2], "it is empty");
}

#[test]
fn no_descriptor_left_is_1_whichever_file_it_was_for() {
    let stage = worker();
    let ini = stage.dir.path().join("decnet.ini");
    let mut said = String::new();
    for count in 4..12 {
        // With enough of them it beats, and is stopped.
        let script = format!("ulimit -n {count}; exec timeout 1 \"$@\"");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_decnet-heartbeat"), "--config"])
            .arg(&ini)
            .arg("run");
        let output = command.env_remove("DECNET_CONFIG").stdin(Stdio::null()).output().unwrap();
        assert!(matches!(output.status.code(), Some(1 | 124)), "{count}: {output:?}");
        said += &String::from_utf8_lossy(&output.stderr);
    }
    assert!(
        said.contains(
            "decnet.ini: cannot be read; raise the limit of open files: Too many open files"
        ),
        "{said}"
    );
}
