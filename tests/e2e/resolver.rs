//! The errors of the system's resolver, with a name server whose answers the test controls.

use std::fs;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::thread;

use crate::support::{Loopback, TIMEOUT, commands};

/// A loopback address on which no other program listens.
const SERVER: &str = "127.77.0.53";

/// Starts a name server that answers every question with this code and no record. `None`: it does
/// not answer.
fn serve(code: Option<u8>) {
    let socket = UdpSocket::bind((SERVER, 53)).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            // This packet is not a question. It ends the server, so that the next one gets the
            // port.
            let query = &packet[..length];
            if query == b"end" {
                return;
            }
            let Some(code) = code else { continue };
            // The question after the header consists of labels, a zero, a type and a class.
            let labels = query[12..].iter().position(|byte| *byte == 0).unwrap();
            let mut answer = query[..12 + labels + 5].to_vec();
            // An answer to one question, with recursion.
            answer[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, 0]);
            socket.send_to(&answer, from).unwrap();
        }
    });
}

fn end_server() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"end", (SERVER, 53)).unwrap();
}

/// The first log line of a failed beat, with a resolver that uses that server.
fn line_of_failed_beat(code: Option<u8>) -> String {
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
    let log = commands::lines(child.stderr.take().unwrap());
    let line =
        std::iter::from_fn(|| log.recv_timeout(TIMEOUT).ok()).find(|line| line.contains("class="));
    commands::signal("TERM", child.id());
    commands::wait_for_exit(&mut child, TIMEOUT).unwrap();
    end_server();
    line.expect("a beat failed")
}

/// One test, because all cases use the same address of the server.
#[test]
#[ignore = "needs root, for a mount namespace and port 53"]
fn error_names_the_cause_of_a_failed_lookup() {
    for (code, class, detail) in [
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
        let line = line_of_failed_beat(code);
        assert!(
            line.contains(&format!("class={class} ")) && line.contains(detail),
            "{code:?}: {line}"
        );
    }
}
