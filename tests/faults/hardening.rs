//! Nothing of the environment gets in, and the service's sandbox is one.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stage::{Stage, World};

/// Variables that libraries below us are known to obey elsewhere.
pub fn no_variable_of_the_environment_is_obeyed() {
    let stage = Stage::new(World::default());
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_nonblocking(true).unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let (keys, nowhere) = (stage.path("keys"), stage.path("nowhere"));
    let proxies =
        ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
    let mut variables: Vec<_> = proxies.iter().map(|name| (*name, address.as_str())).collect();
    variables.push(("SSLKEYLOGFILE", keys.to_str().unwrap()));
    variables.extend(
        ["SSL_CERT_FILE", "SSL_CERT_DIR", "RUST_LOG"].map(|name| (name, nowhere.to_str().unwrap())),
    );
    variables.push(("DOCKER_HOST", address.as_str()));
    let mut subject = stage.spawn(&variables);
    assert_eq!(subject.answer(), "started");
    subject.until("a beat", |stats| stats["beats"] == 1);
    subject.push("d");
    subject.until("a delivery", |stats| stats["delivered"] == 1);
    assert!(proxy.accept().is_err(), "somebody has called the proxy");
    assert!(!keys.exists(), "session keys were written down");
}

/// The unit or drop-in with this line, in the page on operations.
fn unit_with(line: &str) -> &'static str {
    let page = include_str!("../../src/docs/operations.md");
    let blocks = page.split("```ini\n").skip(1).filter_map(|block| block.split("```").next());
    blocks.into_iter().find(|block| block.lines().any(|it| it == line)).unwrap()
}

/// A folder with the documented unit, which starts the program that was built.
fn folder_of_units() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("decnet-heartbeat.service");
    let unit = unit_with("Description=DECNET heartbeat");
    fs::write(
        &path,
        unit.replace("/usr/local/bin/decnet-heartbeat", env!("CARGO_BIN_EXE_decnet-heartbeat")),
    )
    .unwrap();
    (dir, path)
}

/// Whether systemd is content, and what it says.
fn analyze(arguments: &[&str], unit: &Path) -> (bool, String) {
    let output = Command::new("systemd-analyze").args(arguments).arg(unit).output().unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.success(), said)
}

fn is_accepted(unit: &Path) -> Result<(), String> {
    let (accepted, said) = analyze(&["verify", "--man=no"], unit);
    if accepted && !said.contains("decnet-") { Ok(()) } else { Err(said) }
}

/// systemd accepts the documented unit, and rates its sandbox below 2.
pub fn the_unit_is_sound_and_tight() {
    let (_dir, unit) = folder_of_units();
    is_accepted(&unit).unwrap();
    // Of 100: below 20 systemd calls it OK.
    let (is_tight, said) = analyze(&["security", "--offline=true", "--threshold=20"], &unit);
    assert!(is_tight, "{said}");
}

/// It is started again and again, but for 78, and no missing folder keeps it from starting.
pub fn the_unit_keeps_trying() {
    let unit = unit_with("Description=DECNET heartbeat");
    let value = |key: &str| {
        unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap()
    };
    assert_eq!(
        ["Restart", "RestartPreventExitStatus", "StartLimitIntervalSec"].map(value),
        ["always", "78", "0"]
    );
    assert_eq!(value("ExecReload"), "/bin/kill -HUP $MAINPID");
    assert!((1..=60).contains(&value("RestartSec").parse::<u32>().unwrap()));
    let paths = unit.lines().filter(|line| {
        ["ReadWritePaths=", "ReadOnlyPaths="].iter().any(|key| line.starts_with(key))
    });
    let paths: Vec<_> = paths.flat_map(|line| line.split_once('=').unwrap().1.split(' ')).collect();
    assert!(!paths.is_empty() && paths.iter().all(|path| path.starts_with("-/")), "{paths:?}");
}

/// The drop-in for workers with `decnet-agent` is accepted beside it, and needs it.
pub fn the_drop_in_binds_it_to_the_agent() {
    let (dir, unit) = folder_of_units();
    let drop_ins = dir.path().join("decnet-heartbeat.service.d");
    fs::create_dir(&drop_ins).unwrap();
    let drop_in = unit_with("BindsTo=decnet-agent.service");
    fs::write(drop_ins.join("agent.conf"), drop_in).unwrap();
    let without_agent = is_accepted(&unit).unwrap_err();
    assert!(without_agent.contains("decnet-agent.service"), "{without_agent}");
    fs::write(dir.path().join("decnet-agent.service"), "[Service]\nExecStart=/bin/true\n").unwrap();
    is_accepted(&unit).unwrap();
    for line in ["After=decnet-agent.service", "WantedBy=decnet-agent.service"] {
        assert!(drop_in.lines().any(|it| it == line), "{line}");
    }
}

/// So are the drop-ins for a folder that belongs to another user than root, which leave the sandbox one.
pub fn the_drop_ins_for_another_users_folder_are_sound_and_tight() {
    for (line, most) in
        [("User=decnet", 20), ("CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE", 22)]
    {
        let (_dir, unit) = folder_of_units();
        // As systemd reads a drop-in: after the unit.
        let whole = [&fs::read_to_string(&unit).unwrap(), "\n", unit_with(line)].concat();
        fs::write(&unit, whole).unwrap();
        is_accepted(&unit).unwrap();
        let (is_tight, said) =
            analyze(&["security", "--offline=true", &format!("--threshold={most}")], &unit);
        assert!(is_tight, "{said}");
    }
}
