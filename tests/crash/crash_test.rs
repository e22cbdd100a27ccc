//! What the tests share: a master that is stopped at times, a worker, and the reports of its
//! processes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::never;
use decnet_heartbeat::Heartbeat;
use decnet_heartbeat::loopback::{Enrolled, LoopbackMaster};

use crate::child_reports::{ChildReports, operation_names};
use crate::received_deltas::ReceivedDeltas;
use crate::support::nothing_deployed;

/// Longer than any step takes. Reaching it is a failure.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The maximum number of deltas in the outbox.
const MAX_ROWS: u32 = 10_000;

/// The number of rows from which on they are delivered before the next child starts. A child adds
/// one or two thousand.
const MANY_ROWS: u32 = 3_000;

pub struct CrashTest {
    folder: tempfile::TempDir,
    pub master: LoopbackMaster,
    is_master_stopped: bool,
    pub worker: Enrolled,
    /// The path of the program.
    pub program: PathBuf,
    reports: ChildReports,
    received: ReceivedDeltas,
    /// How often all deltas were delivered.
    drains: u32,
}

/// A running child, and the thread that reads its lines.
pub struct RunningChild {
    child: Child,
    lines: JoinHandle<Vec<String>>,
}

impl CrashTest {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let master = LoopbackMaster::start().unwrap();
        let worker = master.enrol(&folder.path().join("agent")).unwrap();
        Self {
            folder,
            master,
            is_master_stopped: false,
            worker,
            program: env!("CARGO_BIN_EXE_decnet-heartbeat").into(),
            reports: ChildReports::default(),
            received: ReceivedDeltas::default(),
            drains: 0,
        }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn ini(&self) -> PathBuf {
        self.folder.path().join("decnet.ini")
    }

    /// Records a line of a child.
    pub fn record(&mut self, line: &str) {
        self.reports.record(line);
    }

    /// Stops or starts the master in one of four cases.
    pub fn maybe_stop_or_start_master(&mut self) {
        if fastrand::u8(..4) == 0 {
            if self.is_master_stopped { self.start_master() } else { self.stop_master() }
        }
    }

    pub fn stop_master(&mut self) {
        self.is_master_stopped = true;
        self.master.stop();
    }

    /// Starts the master if it is stopped.
    pub fn start_master(&mut self) {
        if std::mem::take(&mut self.is_master_stopped) {
            self.master.start_again().unwrap();
        }
    }

    pub fn start_child(&self, run: u32) -> RunningChild {
        for name in operation_names(run) {
            self.master.open_operation(&self.worker.uuid, &name, "deploy");
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("--child").arg(&self.worker.agent_dir).arg(&self.worker.uuid);
        command.args([self.worker.port.to_string(), run.to_string()]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let lines = thread::spawn(move || stdout.lines().map_while(Result::ok).collect());
        RunningChild { child, lines }
    }

    /// Kills a child and checks what it leaves.
    pub fn kill(&mut self, RunningChild { mut child, lines }: RunningChild) {
        assert_eq!(child.try_wait().unwrap(), None, "the child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        lines.join().unwrap().iter().for_each(|line| self.record(line));
        if self.check() > MANY_ROWS {
            self.drain();
        }
    }

    /// Checks the requests since the last check and the file of the outbox. All lines of the
    /// children must be recorded before. Returns the number of rows in the outbox.
    pub fn check(&mut self) -> u32 {
        self.record_requests();
        let rows = check_integrity(&self.worker.agent_dir.join("heartbeat.db"), self.folder.path());
        assert!(
            rows < MAX_ROWS,
            "the outbox is full and drops deltas, which is not a loss by mistake"
        );
        rows
    }

    /// The deltas that must be delivered and are not yet. Does not read the outbox.
    pub fn undelivered(&mut self) -> Vec<String> {
        self.record_requests();
        self.received.undelivered(&self.reports)
    }

    fn record_requests(&mut self) {
        self.received.record(&self.reports, &self.master.take_received());
    }

    /// Delivers all deltas with a heartbeat that is not killed.
    fn drain(&mut self) {
        self.start_master();
        self.drains += 1;
        let heartbeat = Heartbeat::builder()
            .enrolment(self.worker.enrolment().unwrap())
            .status_source(nothing_deployed)
            .agent_version(format!("run-drain-{}", self.drains))
            .interval(Duration::from_millis(50))
            .start()
            .unwrap();
        let beats = heartbeat.beats();
        loop {
            beats.recv_timeout(TIMEOUT).expect("a beat");
            let stats = heartbeat.stats();
            if stats.beats > 0 && stats.waiting == 0 && stats.failure.is_none() {
                assert_eq!((stats.operations, stats.rejected, stats.dropped), (0, 0, 0));
                break;
            }
        }
        assert_eq!(heartbeat.stop(TIMEOUT).undelivered, 0);
        self.check();
    }

    /// Delivers all deltas, and asserts that none is lost. Returns the figures.
    pub fn finish(mut self) -> String {
        self.drain();
        let Self { master, reports, received, .. } = &self;
        received.assert_complete(reports, &master.rows());
        let ended = reports.operations.values().filter(|report| report.has_ended).count();
        assert!(!reports.queued.is_empty() && ended > 0, "no child queued or ended anything");
        format!(
            "{} deltas queued, {} operations begun and {ended} ended, {} deltas accepted in {} requests, {} of them \
             duplicates, 0 lost",
            reports.queued.len(),
            reports.operations.len(),
            received.count(),
            received.requests,
            received.duplicates()
        )
    }
}

/// Checks a copy of the file, because the next child must recover the original. Returns the number
/// of rows.
fn check_integrity(database: &Path, folder: &Path) -> u32 {
    if !database.exists() {
        return 0;
    }
    let copy = folder.join("copy.db");
    fs::copy(database, &copy).unwrap();
    let wal = database.with_extension("db-wal");
    let copied = if wal.exists() { fs::copy(wal, folder.join("copy.db-wal")).unwrap() } else { 0 };
    let database = rusqlite::Connection::open(&copy).unwrap();
    let found: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(found, "ok", "with a log of {copied} bytes");
    // There is no table if the child was killed before it created one.
    let rows = database.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap_or(0);
    drop(database);
    for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if file.file_name().unwrap().to_str().unwrap().starts_with("copy.db") {
            fs::remove_file(file).unwrap();
        }
    }
    rows
}

/// Waits for a time that does not depend on any event: the tests interrupt at random moments.
pub fn pause(time: Duration) {
    let _ = never::<()>().recv_timeout(time);
}
