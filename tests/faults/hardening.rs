//! Nothing of the environment gets in, and the service's sandbox is one.

use std::net::TcpListener;
use std::process::Command;

use crate::stage::{Stage, World};

/// Variables that libraries below us are known to obey elsewhere.
pub fn no_variable_of_the_environment_is_obeyed() {
    let stage = Stage::new(World::default());
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_nonblocking(true).unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let (keys, nowhere) = (stage.path("keys"), stage.path("nowhere"));
    let proxies = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
    let mut variables: Vec<_> = proxies.iter().map(|name| (*name, address.as_str())).collect();
    variables.push(("SSLKEYLOGFILE", keys.to_str().unwrap()));
    variables.extend(["SSL_CERT_FILE", "SSL_CERT_DIR", "RUST_LOG"].map(|name| (name, nowhere.to_str().unwrap())));
    variables.push(("DOCKER_HOST", address.as_str()));
    let mut subject = stage.spawn(&variables);
    assert_eq!(subject.answer(), "started");
    subject.until("a beat", |stats| stats["beats"] == 1);
    subject.push("d");
    subject.until("a delivery", |stats| stats["delivered"] == 1);
    assert!(proxy.accept().is_err(), "somebody has called the proxy");
    assert!(!keys.exists(), "session keys were written down");
}

/// The README's unit is one that systemd accepts, and its sandbox is rated by systemd's own measure.
pub fn the_unit_is_sound_and_tight() {
    let readme = include_str!("../../README.md");
    let unit = readme.split("```ini\n").find(|block| block.starts_with("[Unit]")).unwrap().split("```").next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("decnet-heartbeat.service");
    // That the program is not installed here says nothing of the unit.
    std::fs::write(&path, unit.replace("/usr/local/bin/decnet-heartbeat", env!("CARGO_BIN_EXE_decnet-heartbeat")))
        .unwrap();
    let analyze = |arguments: &[&str]| {
        let output = Command::new("systemd-analyze").args(arguments).arg(&path).output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}");
        said
    };
    let said = analyze(&["verify", "--man=no"]);
    assert!(!said.contains("decnet-heartbeat.service"), "{said}");
    // Of 100: below 20 systemd calls it OK.
    analyze(&["security", "--offline=true", "--threshold=20"]);
}
