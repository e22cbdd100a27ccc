//! systemd, or another supervisor, and what it may get wrong.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::run;
use crate::support::{PATIENCE, Running, Stage, lines};

/// A stop, with room for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

fn notifying(stage: &Stage, socket: impl AsRef<OsStr>) -> Command {
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "50ms"]).env("NOTIFY_SOCKET", socket).stderr(Stdio::null());
    command
}

fn listen(path: &Path) -> UnixDatagram {
    let socket = UnixDatagram::bind(path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The next notification.
fn hear(socket: &UnixDatagram) -> String {
    let mut said = [0; 100];
    let length = socket.recv(&mut said).unwrap();
    String::from_utf8(said[..length].to_vec()).unwrap()
}

#[test]
fn an_abstract_socket_is_notified() {
    let stage = Stage::new();
    let name =
        [b"decnet-heartbeat-\xff-".as_slice(), std::process::id().to_string().as_bytes()].concat();
    let systemd = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    systemd.set_read_timeout(Some(PATIENCE)).unwrap();
    let socket = OsString::from_vec([b"@".as_slice(), &name].concat());
    let mut running = Running::start(&mut notifying(&stage, socket));
    assert_eq!(hear(&systemd), "READY=1\n");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert_eq!(hear(&systemd), "STOPPING=1\n");
}

/// Until it has no room.
fn fill(path: &Path) {
    let socket = UnixDatagram::unbound().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.send_to(b"FULL=1", path).is_ok() {}
}

#[test]
fn a_supervisor_that_does_not_read_delays_nothing() {
    let stage = Stage::new();
    let path = stage.dir.path().join("notify");
    let _systemd = listen(&path);
    fill(&path);
    let mut running = Running::start(notifying(&stage, &path).env("WATCHDOG_USEC", "100000"));
    assert!(stage.master.wait_for_beats(5, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn a_readiness_that_could_not_be_sent_is_sent_again() {
    for watchdog in [None, Some("100000")] {
        let stage = Stage::new();
        let path = stage.dir.path().join("notify");
        let systemd = listen(&path);
        fill(&path);
        let mut command = notifying(&stage, &path);
        command.envs(watchdog.map(|limit| ("WATCHDOG_USEC", limit)));
        let mut running = Running::start(&mut command);
        assert!(stage.master.wait_for_beats(3, PATIENCE));
        let heard =
            std::iter::repeat_with(|| hear(&systemd)).find(|said| said != "FULL=1").unwrap();
        assert!(heard.starts_with("READY=1\n"), "{heard:?}");
        let more =
            std::iter::repeat_with(|| hear(&systemd)).take(if watchdog.is_some() { 3 } else { 0 });
        assert_eq!(more.filter(|said| said.contains("READY")).count(), 0, "once");
        assert_eq!(running.terminate(PROMPT), Some(0));
    }
}

#[test]
fn a_readiness_that_could_not_be_sent_does_not_wait_for_a_beat_that_is_far_away() {
    let stage = Stage::new();
    let path = stage.dir.path().join("notify");
    let systemd = listen(&path);
    fill(&path);
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "1h"]).env("NOTIFY_SOCKET", &path).stderr(Stdio::null());
    let mut running = Running::start(&mut command);
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    // Its beat is over.
    std::thread::sleep(Duration::from_millis(200));
    let heard = std::iter::repeat_with(|| hear(&systemd)).find(|said| said != "FULL=1").unwrap();
    assert_eq!(heard, "READY=1\n");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn a_watchdog_of_a_microsecond_is_no_busy_loop() {
    let stage = Stage::new();
    let path = stage.dir.path().join("notify");
    let systemd = listen(&path);
    let mut running = Running::start(notifying(&stage, &path).env("WATCHDOG_USEC", "1"));
    assert_eq!(hear(&systemd), "READY=1\n");
    assert_eq!(hear(&systemd), "WATCHDOG=1\n");
    let start = Instant::now();
    for _ in 0..6 {
        assert_eq!(hear(&systemd), "WATCHDOG=1\n");
    }
    assert!(start.elapsed() > Duration::from_millis(200), "{:?}", start.elapsed());
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn a_watchdog_of_another_process_or_of_no_number_is_none() {
    for (limit, pid) in [
        ("100000", Some("1")),
        ("100000", Some("x")),
        ("0", None),
        ("x", None),
        ("-1", None),
        ("", None),
    ] {
        let stage = Stage::new();
        let path = stage.dir.path().join("notify");
        let systemd = listen(&path);
        let mut command = notifying(&stage, &path);
        command.env("WATCHDOG_USEC", limit).envs(pid.map(|pid| ("WATCHDOG_PID", pid)));
        let mut running = Running::start(&mut command);
        assert_eq!(hear(&systemd), "READY=1\n");
        assert!(stage.master.wait_for_beats(5, PATIENCE));
        assert_eq!(running.terminate(PROMPT), Some(0));
        assert_eq!(hear(&systemd), "STOPPING=1\n", "{limit} {pid:?}");
    }
}

/// The lines of a run of thirty beats that cannot notify.
fn complaints(socket: &OsStr) -> Vec<String> {
    let stage = Stage::new();
    let mut command = notifying(&stage, socket);
    let mut running = Running::start(command.env("WATCHDOG_USEC", "100000").stderr(Stdio::piped()));
    let said = lines(running.0.stderr.take().unwrap());
    assert!(stage.master.wait_for_beats(30, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
    said.iter().filter(|line| line.contains("notified")).collect()
}

#[test]
fn a_socket_that_fails_each_time_is_logged_less_and_less_often() {
    let said = complaints(OsStr::new("/nonexistent/notify"));
    assert!((2..=7).contains(&said.len()), "{said:#?}");
    assert!(
        said[0]
            .contains("systemd could not be notified: times=1 error=\"No such file or directory"),
        "{said:#?}"
    );
}

#[test]
fn a_socket_that_can_be_none_is_logged_once() {
    let long = format!("/{}", "x".repeat(200));
    for (name, shown) in [
        (&b"notify"[..], "\"notify\""),
        (b"vsock:2:1234", "\"vsock:2:1234\""),
        (long.as_bytes(), "\"/xxx"),
    ] {
        let said = complaints(OsStr::from_bytes(name));
        assert_eq!(said.len(), 1, "{said:#?}");
        assert!(
            said[0].contains(&format!("systemd cannot be notified: NOTIFY_SOCKET={shown}")),
            "{said:#?}"
        );
    }
}
