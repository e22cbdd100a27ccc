//! The metrics file, read by a real node_exporter.

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{Loopback, process};

const PATIENCE: Duration = Duration::from_secs(30);

/// Debian's user for those who own nothing.
const NOBODY: u32 = 65_534;

/// Ends with the test, however that ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        process::signal("TERM", self.0.id());
        let _ = process::end(&mut self.0, PATIENCE);
    }
}

/// A node_exporter with nothing but this folder, under a user of its own, and where it listens.
fn exporter(folder: &Path) -> (Ended, String) {
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
        .expect("Debian's prometheus-node-exporter is there");
    let log = process::lines(child.stderr.take().unwrap());
    let listens = std::iter::from_fn(|| log.recv_timeout(PATIENCE).ok())
        .find(|line| line.contains("Listening on"));
    let address = listens.unwrap().split("address=").nth(1).unwrap().to_owned();
    (Ended(child), address)
}

fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    said
}

#[test]
#[ignore = "needs root and Debian's prometheus-node-exporter"]
fn node_exporter_shows_what_a_run_under_a_strict_umask_has_written() {
    let folder = tempfile::tempdir().unwrap();
    let loopback = Loopback::new(&folder.path().join("agent"));
    let ini = folder.path().join("decnet.ini");
    loopback.worker.write_ini(&ini).unwrap();
    // The exporter may come as far as this one.
    let shown = folder.path().join("shown");
    fs::create_dir(&shown).unwrap();
    for folder in [folder.path(), &shown] {
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
    run.args(["run", "--interval", "100ms", "--metrics-file"]).arg(shown.join("decnet.prom"));
    let run = Ended(run.env_clear().stderr(Stdio::null()).spawn().unwrap());
    assert!(loopback.master.wait_for_beats(3, PATIENCE));
    let (_exporter, address) = exporter(&shown);
    let said = scrape(&address);
    drop(run);
    let sample = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}: {said}")).parse::<f64>().unwrap()
    };
    assert_eq!(sample("node_textfile_scrape_error"), 0.0);
    assert!(sample("decnet_heartbeat_beats_total") >= 2.0);
    assert!(sample("decnet_heartbeat_certificate_expiry_timestamp_seconds") > 1e9);
    assert!(said.contains("# TYPE decnet_heartbeat_beats_total counter"), "{said}");
    assert!(said.contains(&format!("fingerprint=\"{}\"", loopback.worker.fingerprint)), "{said}");
}
