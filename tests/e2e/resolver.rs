//! The system's resolver, with a name server that answers as each test wants: what a name that is not found is called.

use std::fs;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::support::{Loopback, process};

const PATIENCE: Duration = Duration::from_secs(30);

/// Where nothing else listens.
const SERVER: &str = "127.77.0.53";

/// A name server that gives every question this code and no record. `None`: it is silent.
fn serve(code: Option<u8>) {
    let socket = UdpSocket::bind((SERVER, 53)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            // A question for the root ends the test, so that its successor has the port.
            let query = &packet[..length];
            if query == b"end" {
                return;
            }
            let Some(code) = code else { continue };
            // The header, and the question: labels, a zero, type and class.
            let labels = query[12..].iter().position(|byte| *byte == 0).unwrap();
            let mut answer = query[..12 + labels + 5].to_vec();
            // An answer, with recursion, to one question.
            answer[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, 0]);
            socket.send_to(&answer, from).unwrap();
        }
    });
}

fn end_server() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"end", (SERVER, 53)).unwrap();
}

/// The first line of the log of a failed beat, under a resolver that asks that server.
fn failed_beat(code: Option<u8>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&folder.path().join("agent"));
    let conf = folder.path().join("resolv.conf");
    fs::write(&conf, format!("nameserver {SERVER}\noptions timeout:9 attempts:1\n")).unwrap();
    serve(code);
    let mut run = Command::new("unshare");
    run.args([
        "-m",
        "sh",
        "-c",
        "mount --make-rprivate / && mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"",
    ]);
    run.arg(&conf)
        .args([env!("CARGO_BIN_EXE_decnet-heartbeat"), "--agent-dir"])
        .arg(&loopback.worker.agent_dir);
    run.args(["run", "--state-file", "/nonexistent"]).stderr(Stdio::piped()).env_clear();
    let path = std::env::var_os("PATH").unwrap();
    let variables = [
        ("DECNET_HOST_UUID", "u"),
        ("DECNET_MASTER_HOST", "master.test"),
        ("DECNET_CONFIG", "/nonexistent"),
    ];
    let mut child = run.env("PATH", path).envs(variables).spawn().unwrap();
    let log = process::lines(child.stderr.take().unwrap());
    let line =
        std::iter::from_fn(|| log.recv_timeout(PATIENCE).ok()).find(|line| line.contains("class="));
    process::signal("TERM", child.id());
    process::end(&mut child, PATIENCE).unwrap();
    end_server();
    line.expect("the beat has failed")
}

/// One test, as they share the server's address.
#[test]
#[ignore = "needs root, for a mount namespace and port 53"]
fn each_way_in_which_a_name_is_not_found_is_named() {
    for (code, class, says) in [
        (
            Some(3),
            "dns",
            "the name master.test could not be looked up: failed to lookup address information: Name or service not known",
        ),
        (
            Some(2),
            "dns",
            "the name master.test could not be looked up: failed to lookup address information: Temporary failure in name resolution",
        ),
        (
            Some(0),
            "dns",
            "the name master.test could not be looked up: failed to lookup address information: No address associated with hostname",
        ),
        (None, "timeout-resolve", "timeout: resolve"),
    ] {
        let line = failed_beat(code);
        assert!(
            line.contains(&format!("class={class} ")) && line.contains(says),
            "{code:?}: {line}"
        );
    }
}
