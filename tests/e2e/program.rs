//! The program with files on a disk that does not respond, and the system calls of its main thread.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use decnet_heartbeat::loopback::{Answer, LoopbackMaster};

use crate::support::{FreezableDisk, Loopback, TIMEOUT, commands};

/// A process that is killed when this value is dropped.
struct Killed(Child);

impl Drop for Killed {
    /// Does not wait for its end, which may come only after a thaw.
    fn drop(&mut self) {
        commands::signal("KILL", self.0.id());
    }
}

/// `run` with a short interval, for a worker whose ini is in this folder.
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

/// The socket of a supervisor such as systemd.
fn notify_socket(dir: &Path) -> UnixDatagram {
    let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

fn receive(socket: &UnixDatagram) -> String {
    let mut message = [0; 100];
    let length = socket.recv(&mut message).unwrap();
    String::from_utf8_lossy(&message[..length]).into_owned()
}

/// Waits for this many more requests.
fn wait_for_more_requests(master: &LoopbackMaster, count: usize) {
    let before = master.received().len();
    assert!(master.wait_until(TIMEOUT, |seen| seen.received().len() >= before + count));
}

#[test]
#[ignore = "mounts, and so needs root"]
fn frozen_disk_with_log_and_stats_does_not_delay_beats_watchdog_or_stop() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FreezableDisk::mount();
    let loopback = Loopback::new(&dir.path().join("agent"));
    let systemd = notify_socket(dir.path());
    let mut command = run(&loopback, dir.path());
    for (option, name) in
        [("--stats-file", "stats"), ("--metrics-file", "metrics"), ("--log-file", "log")]
    {
        command.arg(option).arg(disk.path().join(name));
    }
    command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "200000");
    let mut running = Killed(command.stderr(Stdio::null()).spawn().unwrap());
    assert_eq!(receive(&systemd), "READY=1\n");
    assert!(loopback.master.wait_for_beats(3, TIMEOUT));
    disk.freeze();
    // Failures, so that lines are logged.
    loopback.master.always(Some(Answer::status(503).into()));
    wait_for_more_requests(&loopback.master, 10);
    loopback.master.always(None);
    wait_for_more_requests(&loopback.master, 10);
    (0..20).for_each(|_| assert_eq!(receive(&systemd), "WATCHDOG=1\n"));
    commands::signal("TERM", running.0.id());
    // A few messages that were sent before the stop are still queued.
    let last = std::iter::repeat_with(|| receive(&systemd))
        .take(100)
        .find(|message| message != "WATCHDOG=1\n");
    assert_eq!(last.as_deref(), Some("STOPPING=1\n"));
    // A thread of the process is blocked in the file system, so the process ends only after the
    // thaw. No line from before is lost.
    disk.thaw();
    assert_eq!(
        commands::wait_for_exit(&mut running.0, TIMEOUT).and_then(|status| status.code()),
        Some(0)
    );
    assert!(fs::read_to_string(disk.path().join("log")).unwrap().contains("first beat accepted"));
}

#[test]
#[ignore = "needs strace"]
fn main_thread_of_run_uses_no_file_after_start() {
    let dir = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&dir.path().join("agent"));
    let systemd = notify_socket(dir.path());
    let at = |name: &str| dir.path().join(name);
    let trace = at("trace");
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
    let mut running = Killed(strace.spawn().unwrap());
    assert_eq!(receive(&systemd), "READY=1\n");
    assert!(loopback.master.wait_for_beats(5, TIMEOUT));
    commands::run(Command::new("pkill").args(["-TERM", "-P", &running.0.id().to_string()]));
    assert_eq!(
        commands::wait_for_exit(&mut running.0, TIMEOUT).and_then(|status| status.code()),
        Some(0)
    );

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
    // This thread also handles signals, and the handler wakes another thread through a socket.
    // Its line is in two parts if another thread makes a call meanwhile.
    let is_expected = |call: &str| {
        ["---", "sendto(", "<... sendto resumed>"].iter().any(|it| call.starts_with(it))
    };
    assert_eq!(calls[ready + 1..stopping].iter().find(|call| !is_expected(call)), None);
    assert!(trace.contains("stats.new"), "no other thread wrote the stats");
}

/// The folder to which the documented unit may write, with `etc` instead of `/etc/decnet`.
fn writable(etc: &Path) -> PathBuf {
    let page = include_str!("../../src/docs/operations.md");
    let path = page.lines().find_map(|line| line.strip_prefix("ReadWritePaths=-")).unwrap();
    etc.join(Path::new(path).strip_prefix("/etc/decnet").unwrap())
}

#[test]
#[ignore = "mounts, and so needs root"]
fn recreated_agent_dir_is_writable_in_sandbox_of_unit() {
    let dir = tempfile::tempdir().unwrap();
    let etc = dir.path().join("etc");
    let renamed = dir.path().join("renamed");
    let loopback = Loopback::new(&etc.join("agent"));
    // The same mounts as with `ProtectSystem=strict`.
    let sandbox = r#"mount --make-rslave / && mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@""#;
    let run = run(&loopback, &etc);
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", sandbox])
        .arg(writable(&etc))
        .arg(run.get_program())
        .args(run.get_args());
    let _running = Killed(command.env_clear().stderr(Stdio::null()).spawn().unwrap());
    assert!(loopback.master.wait_for_beats(2, TIMEOUT));
    fs::rename(etc.join("agent"), &renamed).unwrap();
    fs::create_dir(etc.join("agent")).unwrap();
    for name in ["ca.crt", "worker.crt", "worker.key"] {
        fs::copy(renamed.join(name), etc.join("agent").join(name)).unwrap();
    }
    // The heartbeat uses the new folder when its outbox is in it.
    let has_outbox = || etc.join("agent/heartbeat.db").exists();
    assert!((0..100).any(|_| {
        wait_for_more_requests(&loopback.master, 1);
        has_outbox()
    }));
    let mut push = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    push.env_clear().arg("--config").arg(etc.join("decnet.ini")).args([
        "push",
        "--no-wait",
        "--operation",
        "deploy",
    ]);
    commands::run(push.args(["--status", "succeeded", "decky-01"]));
    for _ in 0..100 {
        wait_for_more_requests(&loopback.master, 1);
        if !loopback.sent().is_empty() {
            return;
        }
    }
    panic!("the delta was not delivered");
}
