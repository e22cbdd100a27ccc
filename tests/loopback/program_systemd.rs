//! Notifications to systemd or another supervisor, and faults of the supervisor.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{ChildProcess, Fixture, TIMEOUT, wait_for_line};

/// The limit for a stop, with a margin for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

fn notifying(fixture: &Fixture, socket: impl AsRef<OsStr>) -> Command {
    let mut command = fixture.run_command();
    command.args(["--interval", "50ms"]).env("NOTIFY_SOCKET", socket).stderr(Stdio::null());
    command
}

fn listen(path: &Path) -> UnixDatagram {
    let socket = UnixDatagram::bind(path).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// Receives the next notification.
fn receive(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 100];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn abstract_socket_is_notified() {
    let fixture = Fixture::new();
    let name =
        [b"decnet-heartbeat-\xff-".as_slice(), std::process::id().to_string().as_bytes()].concat();
    let systemd = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    systemd.set_read_timeout(Some(TIMEOUT)).unwrap();
    let socket = OsString::from_vec([b"@".as_slice(), &name].concat());
    let mut running = ChildProcess::start(&mut notifying(&fixture, socket));
    assert_eq!(receive(&systemd), "READY=1\n");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert_eq!(receive(&systemd), "STOPPING=1\n");
}

/// Fills the socket's queue.
fn fill(path: &Path) {
    let send_all = || {
        let socket = UnixDatagram::unbound().unwrap();
        socket.set_nonblocking(true).unwrap();
        std::iter::repeat_with(|| socket.send_to(b"FULL=1", path)).take_while(Result::is_ok).count()
    };
    // One sender may be limited by its own buffer. systemd allows 512 datagrams in the queue.
    while send_all() > 0 {}
}

#[test]
fn supervisor_that_does_not_read_delays_nothing() {
    let fixture = Fixture::new();
    let path = fixture.path("notify");
    let _systemd = listen(&path);
    fill(&path);
    let mut running =
        ChildProcess::start(notifying(&fixture, &path).env("WATCHDOG_USEC", "100000"));
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn failed_ready_notification_is_sent_again_once() {
    for watchdog in [None, Some("100000")] {
        let fixture = Fixture::new();
        let path = fixture.path("notify");
        let systemd = listen(&path);
        fill(&path);
        let mut command = notifying(&fixture, &path);
        command.envs(watchdog.map(|limit| ("WATCHDOG_USEC", limit)));
        let mut running = ChildProcess::start(&mut command);
        assert!(fixture.master.wait_for_beats(3, TIMEOUT));
        let first = std::iter::repeat_with(|| receive(&systemd))
            .find(|message| message != "FULL=1")
            .unwrap();
        assert!(first.starts_with("READY=1\n"), "{first:?}");
        let notifications = if watchdog.is_some() { 3 } else { 0 };
        let more = std::iter::repeat_with(|| receive(&systemd)).take(notifications);
        assert_eq!(more.filter(|message| message.contains("READY")).count(), 0, "once");
        assert_eq!(running.terminate(PROMPT), Some(0));
    }
}

#[test]
fn failed_ready_notification_does_not_wait_for_the_next_beat() {
    let fixture = Fixture::new();
    let path = fixture.path("notify");
    let systemd = listen(&path);
    fill(&path);
    let mut command = fixture.run_command();
    command.args(["--interval", "1h"]).env("NOTIFY_SOCKET", &path);
    let mut running = ChildProcess::start(&mut command);
    let log = running.stderr_lines();
    wait_for_line(&log, "systemd could not be notified: times=1");
    let first =
        std::iter::repeat_with(|| receive(&systemd)).find(|message| message != "FULL=1").unwrap();
    assert_eq!(first, "READY=1\n");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn watchdog_of_one_microsecond_is_no_busy_loop() {
    let fixture = Fixture::new();
    let path = fixture.path("notify");
    let systemd = listen(&path);
    let mut running = ChildProcess::start(notifying(&fixture, &path).env("WATCHDOG_USEC", "1"));
    assert_eq!(receive(&systemd), "READY=1\n");
    assert_eq!(receive(&systemd), "WATCHDOG=1\n");
    let start = Instant::now();
    for _ in 0..6 {
        assert_eq!(receive(&systemd), "WATCHDOG=1\n");
    }
    assert!(start.elapsed() > Duration::from_millis(200), "{:?}", start.elapsed());
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn watchdog_of_another_process_or_without_a_number_is_ignored() {
    for (limit, pid) in [
        ("100000", Some("1")),
        ("100000", Some("x")),
        ("0", None),
        ("x", None),
        ("-1", None),
        ("", None),
    ] {
        let fixture = Fixture::new();
        let path = fixture.path("notify");
        let systemd = listen(&path);
        let mut command = notifying(&fixture, &path);
        command.env("WATCHDOG_USEC", limit).envs(pid.map(|pid| ("WATCHDOG_PID", pid)));
        let mut running = ChildProcess::start(&mut command);
        assert_eq!(receive(&systemd), "READY=1\n");
        assert!(fixture.master.wait_for_beats(5, TIMEOUT));
        assert_eq!(running.terminate(PROMPT), Some(0));
        assert_eq!(receive(&systemd), "STOPPING=1\n", "{limit} {pid:?}");
    }
}

/// The log lines about notifications of a run of thirty beats.
fn failure_lines(socket: &OsStr) -> Vec<String> {
    let fixture = Fixture::new();
    let mut command = notifying(&fixture, socket);
    let mut running =
        ChildProcess::start(command.env("WATCHDOG_USEC", "100000").stderr(Stdio::piped()));
    let log = running.stderr_lines();
    assert!(fixture.master.wait_for_beats(30, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
    log.iter().filter(|line| line.contains("notified")).collect()
}

#[test]
fn repeated_failures_are_logged_at_a_decreasing_rate() {
    let log = failure_lines(OsStr::new("/nonexistent/notify"));
    assert!((2..=7).contains(&log.len()), "{log:#?}");
    assert!(
        log[0].contains("systemd could not be notified: times=1 error=\"No such file or directory"),
        "{log:#?}"
    );
}

#[test]
fn invalid_socket_is_logged_once() {
    let long = format!("/{}", "x".repeat(200));
    for (name, shown) in [
        (&b"notify"[..], "\"notify\""),
        (b"vsock:2:1234", "\"vsock:2:1234\""),
        (long.as_bytes(), "\"/xxx"),
    ] {
        let log = failure_lines(OsStr::from_bytes(name));
        assert_eq!(log.len(), 1, "{log:#?}");
        assert!(
            log[0].contains(&format!("systemd cannot be notified: NOTIFY_SOCKET={shown}")),
            "{log:#?}"
        );
    }
}
