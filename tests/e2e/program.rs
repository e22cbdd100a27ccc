//! The program beside a disk that hangs, and what its main thread asks of the kernel.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use decnet_heartbeat::loopback::{Answer, LoopbackMaster};

use crate::support::{Freezable, Loopback, process};

const PATIENCE: Duration = Duration::from_secs(30);

/// Ends with its test.
struct Running(Child);

impl Drop for Running {
    /// Its end is not waited for: it comes with the thaw, which may be later.
    fn drop(&mut self) {
        process::signal("KILL", self.0.id());
    }
}

/// `run` that beats often, for a worker whose files are here.
fn run(loopback: &Loopback, dir: &Path) -> Command {
    let ini = dir.join("decnet.ini");
    loopback.worker.write_ini(&ini).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    command.env_clear().arg("--config").arg(ini).args(["run", "--interval", "100ms"]);
    command
        .arg("--state-file")
        .arg(dir.join("state"))
        .arg("--docker-socket")
        .arg(dir.join("docker.sock"));
    command
}

/// A supervisor that hears.
fn supervisor(dir: &Path) -> UnixDatagram {
    let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn hear(socket: &UnixDatagram) -> String {
    let mut said = [0; 100];
    let length = socket.recv(&mut said).unwrap();
    String::from_utf8_lossy(&said[..length]).into_owned()
}

/// Waits for so many more requests.
fn more(master: &LoopbackMaster, count: usize) {
    let before = master.received().len();
    assert!(master.wait_until(PATIENCE, |seen| seen.received().len() >= before + count));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn a_frozen_disk_under_log_and_stats_delays_neither_beats_nor_the_watchdog_nor_a_stop() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), Freezable::mount());
    let loopback = Loopback::new(&dir.path().join("agent"));
    let systemd = supervisor(dir.path());
    let mut command = run(&loopback, dir.path());
    for (option, name) in
        [("--stats-file", "stats"), ("--metrics-file", "metrics"), ("--log-file", "log")]
    {
        command.arg(option).arg(disk.path().join(name));
    }
    command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "200000");
    let mut running = Running(command.stderr(Stdio::null()).spawn().unwrap());
    assert_eq!(hear(&systemd), "READY=1\n");
    assert!(loopback.master.wait_for_beats(3, PATIENCE));
    disk.freeze();
    // Lines for the log, too.
    loopback.master.always(Some(Answer::status(503).into()));
    more(&loopback.master, 10);
    loopback.master.always(None);
    more(&loopback.master, 10);
    (0..20).for_each(|_| assert_eq!(hear(&systemd), "WATCHDOG=1\n"));
    process::signal("TERM", running.0.id());
    // Of those that are queued only a few are older.
    let last =
        std::iter::repeat_with(|| hear(&systemd)).take(100).find(|said| said != "WATCHDOG=1\n");
    assert_eq!(last.as_deref(), Some("STOPPING=1\n"));
    // A process with a thread in the file system is gone only after the thaw, and no lines are lost that it wrote before.
    disk.thaw();
    assert_eq!(process::end(&mut running.0, PATIENCE).and_then(|status| status.code()), Some(0));
    assert!(fs::read_to_string(disk.path().join("log")).unwrap().contains("first beat accepted"));
}

#[test]
#[ignore = "needs strace"]
fn the_main_thread_of_run_touches_no_file_after_its_start() {
    let dir = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&dir.path().join("agent"));
    let systemd = supervisor(dir.path());
    let (trace, at) = (dir.path().join("trace"), |name: &str| dir.path().join(name));
    let mut command = run(&loopback, dir.path());
    command.arg("--stats-file").arg(at("stats")).arg("--metrics-file").arg(at("metrics"));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(&trace).args([
        "-e",
        "trace=%file,read,write,fsync,fdatasync,sendto",
        "--",
    ]);
    strace.arg(command.get_program()).args(command.get_args());
    strace.env("NOTIFY_SOCKET", at("notify")).stderr(Stdio::null());
    let mut running = Running(strace.spawn().unwrap());
    assert_eq!(hear(&systemd), "READY=1\n");
    assert!(loopback.master.wait_for_beats(5, PATIENCE));
    process::run(Command::new("pkill").args(["-TERM", "-P", &running.0.id().to_string()]));
    assert_eq!(process::end(&mut running.0, PATIENCE).and_then(|status| status.code()), Some(0));

    let trace = fs::read_to_string(trace).unwrap();
    let main = trace.split(' ').next().unwrap().to_owned() + " ";
    let calls: Vec<_> =
        trace.lines().filter_map(|line| line.strip_prefix(&main)).map(str::trim).collect();
    let ready = calls
        .iter()
        .position(|call| call.starts_with("sendto(") && call.contains("READY=1"))
        .unwrap();
    let stopping = calls
        .iter()
        .position(|call| call.starts_with("sendto(") && call.contains("STOPPING=1"))
        .unwrap();
    // Signals come to this thread, too, and their handler wakes another one through a socket.
    let mut between = calls[ready + 1..stopping].iter().filter(|call| !call.starts_with("---"));
    assert_eq!(between.find(|call| !call.starts_with("sendto(")), None);
    assert!(trace.contains("stats.new"), "another thread has written them");
}

/// The folder that the documented unit may write to, with `etc` in place of `/etc/decnet`.
fn writable(etc: &Path) -> PathBuf {
    let page = include_str!("../../src/docs/operations.md");
    let path = page.lines().find_map(|line| line.strip_prefix("ReadWritePaths=-")).unwrap();
    etc.join(Path::new(path).strip_prefix("/etc/decnet").unwrap())
}

#[test]
#[ignore = "mounts, and so needs root"]
fn in_the_sandbox_of_the_unit_an_agent_dir_that_is_made_anew_keeps_deltas() {
    let dir = tempfile::tempdir().unwrap();
    let (etc, away) = (dir.path().join("etc"), dir.path().join("away"));
    let loopback = Loopback::new(&etc.join("agent"));
    // As `ProtectSystem=strict` does.
    let sandbox = r#"mount --make-rslave / && mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@""#;
    let run = run(&loopback, &etc);
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", sandbox])
        .arg(writable(&etc))
        .arg(run.get_program())
        .args(run.get_args());
    let _running = Running(command.env_clear().stderr(Stdio::null()).spawn().unwrap());
    assert!(loopback.master.wait_for_beats(2, PATIENCE));
    fs::rename(etc.join("agent"), &away).unwrap();
    fs::create_dir(etc.join("agent")).unwrap();
    for name in ["ca.crt", "worker.crt", "worker.key"] {
        fs::copy(away.join(name), etc.join("agent").join(name)).unwrap();
    }
    // It has taken that over, and its outbox with it.
    let is_there = || etc.join("agent/heartbeat.db").exists();
    assert!((0..100).any(|_| {
        more(&loopback.master, 1);
        is_there()
    }));
    let mut push = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    push.env_clear().arg("--config").arg(etc.join("decnet.ini")).args([
        "push",
        "--no-wait",
        "--operation",
        "deploy",
    ]);
    process::run(push.args(["--status", "succeeded", "decky-01"]));
    for _ in 0..100 {
        more(&loopback.master, 1);
        if !loopback.sent().is_empty() {
            return;
        }
    }
    panic!("what is pushed after it is not delivered");
}
