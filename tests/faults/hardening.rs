//! The environment has no effect, and the documented systemd unit has a strict sandbox.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::test_bed::{Scenario, TestBed};

/// Variables that libraries in the dependency tree use in other programs.
pub fn environment_variables_are_ignored() {
    let bed = TestBed::new(Scenario::default());
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_nonblocking(true).unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let key_log = bed.path("key-log");
    let missing = bed.path("missing");
    let mut variables = vec![("SSLKEYLOGFILE", key_log.to_str().unwrap())];
    for name in ["SSL_CERT_FILE", "SSL_CERT_DIR", "RUST_LOG"] {
        variables.push((name, missing.to_str().unwrap()));
    }
    for name in [
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "DOCKER_HOST",
    ] {
        variables.push((name, &address));
    }
    let mut agent = bed.spawn(&variables);
    assert_eq!(agent.read_reply(), "started");
    agent.wait_for("a beat", |stats| stats["beats"] == 1);
    agent.push("d");
    agent.wait_for("a delivery", |stats| stats["delivered"] == 1);
    assert!(proxy.accept().is_err(), "the agent connected to the proxy");
    assert!(!key_log.exists(), "the agent wrote session keys to a file");
}

/// The unit or drop-in of the page on operations that has this line.
fn unit_with(line: &str) -> &'static str {
    let page = include_str!("../../src/docs/operations.md");
    let blocks = page.split("```ini\n").skip(1).filter_map(|block| block.split("```").next());
    blocks.into_iter().find(|block| has_line(block, line)).unwrap()
}

fn has_line(unit: &str, line: &str) -> bool {
    unit.lines().any(|found| found == line)
}

/// A folder with the documented unit, which starts the built program, and the unit's path.
fn unit_folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("decnet-heartbeat.service");
    let unit = unit_with("Description=DECNET heartbeat");
    let program = env!("CARGO_BIN_EXE_decnet-heartbeat");
    fs::write(&path, unit.replace("/usr/local/bin/decnet-heartbeat", program)).unwrap();
    (dir, path)
}

/// The output of `systemd-analyze`: `Err` if it exits with a failure.
fn analyze(arguments: &[&str], unit: &Path) -> Result<String, String> {
    let output = Command::new("systemd-analyze").args(arguments).arg(unit).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

/// Whether systemd accepts the unit without a warning.
fn verify(unit: &Path) -> Result<(), String> {
    let output = analyze(&["verify", "--man=no"], unit)?;
    if output.contains("decnet-") { Err(output) } else { Ok(()) }
}

/// Asserts that systemd rates the exposure of the unit below a threshold from 0 to 100. Below 20 it
/// calls a unit OK.
fn assert_exposure_below(threshold: u32, unit: &Path) {
    let threshold = format!("--threshold={threshold}");
    analyze(&["security", "--offline=true", &threshold], unit).unwrap();
}

pub fn unit_passes_systemd_analyze() {
    let (_dir, unit) = unit_folder();
    verify(&unit).unwrap();
    assert_exposure_below(20, &unit);
}

/// No missing folder prevents a start, either.
pub fn unit_restarts_except_for_exit_code_78() {
    let unit = unit_with("Description=DECNET heartbeat");
    let value = |key: &str| {
        unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap()
    };
    assert_eq!(value("Restart"), "always");
    assert_eq!(value("RestartPreventExitStatus"), "78");
    assert_eq!(value("StartLimitIntervalSec"), "0");
    assert_eq!(value("ExecReload"), "/bin/kill -HUP $MAINPID");
    assert!((1..=60).contains(&value("RestartSec").parse::<u32>().unwrap()));
    let paths = unit.lines().filter(|line| {
        ["ReadWritePaths=", "ReadOnlyPaths="].iter().any(|key| line.starts_with(key))
    });
    let paths: Vec<_> = paths.flat_map(|line| line.split_once('=').unwrap().1.split(' ')).collect();
    assert!(!paths.is_empty() && paths.iter().all(|path| path.starts_with("-/")), "{paths:?}");
}

/// The drop-in for workers with `decnet-agent` is valid only with that unit.
pub fn drop_in_binds_unit_to_agent() {
    let (dir, unit) = unit_folder();
    let drop_ins = dir.path().join("decnet-heartbeat.service.d");
    fs::create_dir(&drop_ins).unwrap();
    let drop_in = unit_with("BindsTo=decnet-agent.service");
    fs::write(drop_ins.join("agent.conf"), drop_in).unwrap();
    let without_agent = verify(&unit).unwrap_err();
    assert!(without_agent.contains("decnet-agent.service"), "{without_agent}");
    fs::write(dir.path().join("decnet-agent.service"), "[Service]\nExecStart=/bin/true\n").unwrap();
    verify(&unit).unwrap();
    for line in ["After=decnet-agent.service", "WantedBy=decnet-agent.service"] {
        assert!(has_line(drop_in, line), "{line}");
    }
}

/// The drop-ins for an agent dir of another user than root keep the sandbox strict.
pub fn drop_ins_for_another_user_pass_systemd_analyze() {
    for (line, threshold) in
        [("User=decnet", 20), ("CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE", 22)]
    {
        let (_dir, unit) = unit_folder();
        // systemd reads a drop-in after its unit.
        let whole = [&fs::read_to_string(&unit).unwrap(), "\n", unit_with(line)].concat();
        fs::write(&unit, whole).unwrap();
        verify(&unit).unwrap();
        assert_exposure_below(threshold, &unit);
    }
}
