//! The metrics file, as a real node_exporter reads it.

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{ChildProcess, Loopback, TIMEOUT, commands};

/// Debian's user `nobody`.
const NOBODY: u32 = 65_534;

/// Starts a node_exporter of another user that reads only this folder. Returns its address, too.
fn start_exporter(folder: &Path) -> (ChildProcess, String) {
    let mut exporter = Command::new("prometheus-node-exporter");
    exporter.args([
        "--collector.disable-defaults",
        "--collector.textfile",
        "--web.listen-address=127.0.0.1:0",
    ]);
    exporter
        .arg(format!("--collector.textfile.directory={}", folder.display()))
        .uid(NOBODY)
        .gid(NOBODY);
    let mut child = exporter
        .stderr(Stdio::piped())
        .spawn()
        .expect("Debian's prometheus-node-exporter is installed");
    let log = commands::lines(child.stderr.take().unwrap());
    let listens = std::iter::from_fn(|| log.recv_timeout(TIMEOUT).ok())
        .find(|line| line.contains("Listening on"));
    let address = listens.unwrap().split("address=").nth(1).unwrap().to_owned();
    (ChildProcess(child), address)
}

fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
#[ignore = "needs root and Debian's prometheus-node-exporter"]
fn node_exporter_can_read_metrics_file_written_with_strict_umask() {
    let folder = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&folder.path().join("agent"));
    let ini = folder.path().join("decnet.ini");
    loopback.worker.write_ini(&ini).unwrap();
    // The exporter's user must be able to enter these folders.
    let metrics = folder.path().join("metrics");
    fs::create_dir(&metrics).unwrap();
    for folder in [folder.path(), &metrics] {
        fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    }
    let mut run = Command::new("sh");
    run.args([
        "-c",
        "umask 077; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_decnet-heartbeat"),
        "--config",
    ])
    .arg(ini);
    run.args(["run", "--interval", "100ms", "--metrics-file"]).arg(metrics.join("decnet.prom"));
    let run = ChildProcess(run.env_clear().stderr(Stdio::null()).spawn().unwrap());
    assert!(loopback.master.wait_for_beats(3, TIMEOUT));
    let (_exporter, address) = start_exporter(&metrics);
    let samples = scrape(&address);
    drop(run);
    let sample = |name: &str| {
        let line = samples.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}: {samples}")).parse::<f64>().unwrap()
    };
    assert_eq!(sample("node_textfile_scrape_error"), 0.0);
    assert!(sample("decnet_heartbeat_beats_total") >= 2.0);
    assert!(sample("decnet_heartbeat_certificate_expiry_timestamp_seconds") > 1e9);
    assert!(samples.contains("# TYPE decnet_heartbeat_beats_total counter"), "{samples}");
    assert!(
        samples.contains(&format!("fingerprint=\"{}\"", loopback.worker.fingerprint)),
        "{samples}"
    );
}
