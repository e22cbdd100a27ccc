//! `kill` and `faults`: children that are killed one after another, on one agent dir.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::never;
use decnet_heartbeat::loopback::{Answer, Effect, Enrolled, Fault, LoopbackMaster};
use decnet_heartbeat::{Heartbeat, Snapshot};
use serde_json::json;

use crate::Options;
use crate::told::{Book, operation_names};
use crate::verdict::Heard;

/// Longer than anything takes; reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What the outbox holds at the most.
const FULL: u32 = 10_000;

/// Rows that are delivered before the next child starts: one adds a thousand or two.
const MANY: u32 = 3_000;

/// Children are killed while the master is taken away and brought back.
pub fn kill(options: &Options) -> String {
    let mut stage = Stage::new();
    for run in 1..=options.kills {
        let child = stage.start(run);
        // Before, while and after it opens the outbox and recovers it; and while it works.
        let life =
            if fastrand::u8(..6) == 0 { fastrand::u64(..30) } else { 30 + fastrand::u64(..250) };
        for _ in 0..2 {
            pause(Duration::from_millis(life / 2));
            stage.come_or_go();
        }
        stage.kill(child);
    }
    stage.finish()
}

/// Children are killed, less often, while the master fails in the middle of requests.
pub fn faults(options: &Options) -> String {
    let mut stage = Stage::new();
    for run in 1..=(options.kills / 5).max(1) {
        let mut script: Vec<Fault> = std::iter::repeat_with(fault).take(40).collect();
        if run == 1 {
            // Once: it costs the second after which, at this interval, an answer is given up.
            script.insert(3, Fault::NeverAnswer(Effect::Applied));
        }
        stage.master.script(script);
        let child = stage.start(run);
        pause(Duration::from_millis(if run == 1 { 3_000 } else { 100 + fastrand::u64(..900) }));
        stage.kill(child);
    }
    stage.finish()
}

/// What goes wrong next, if anything does.
fn fault() -> Fault {
    let answer = |status| Answer::status(status);
    match fastrand::u8(..12) {
        0 => Fault::CutBeforeHandshake,
        1 => Fault::CutBeforeRequest,
        2 => Fault::CutInBody,
        3 => Fault::CutAfterBody(Effect::Lost),
        4 => Fault::CutAfterBody(Effect::Applied),
        5 => Fault::CutAfterAnswer,
        6 => Fault::Answer(answer(500).body("Internal Server Error")),
        // A second is as little as is asked for.
        7 if fastrand::u8(..4) == 0 => Fault::Answer(answer(503).header("Retry-After", "1")),
        7 => Fault::Raw(b"HTTP/1.1 2".to_vec()),
        _ => Fault::Serve,
    }
}

/// A master that may be away, a worker, and what its processes have said.
pub struct Stage {
    folder: tempfile::TempDir,
    pub master: LoopbackMaster,
    away: bool,
    pub worker: Enrolled,
    /// The program as it is installed.
    pub program: PathBuf,
    book: Book,
    heard: Heard,
    drained: u32,
}

impl Stage {
    pub fn new() -> Self {
        let (folder, master) = (tempfile::tempdir().unwrap(), LoopbackMaster::start().unwrap());
        let worker = master.enrol(&folder.path().join("agent")).unwrap();
        let program = env!("CARGO_BIN_EXE_decnet-heartbeat").into();
        let (book, heard) = (Book::default(), Heard::default());
        Self { folder, master, away: false, worker, program, book, heard, drained: 0 }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn ini(&self) -> PathBuf {
        self.folder.path().join("decnet.ini")
    }

    pub fn hear(&mut self, line: &str) {
        self.book.hear(line);
    }

    /// Takes the master away or brings it back, once in a while.
    pub fn come_or_go(&mut self) {
        if fastrand::u8(..4) == 0 {
            if self.away { self.bring_back() } else { self.take_away() }
        }
    }

    /// A child, and the thread that hears what it says.
    fn start(&self, run: u32) -> (Child, JoinHandle<Vec<String>>) {
        for name in operation_names(run) {
            self.master.open_operation(&self.worker.uuid, &name, "deploy");
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .arg("--child")
            .arg(&self.worker.agent_dir)
            .args([&self.worker.uuid, &self.worker.port.to_string()]);
        let mut child = command.arg(run.to_string()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        // A line that the kill has cut short was not said.
        (child, thread::spawn(move || stdout.lines().map_while(Result::ok).collect()))
    }

    /// SIGKILL, and what it leaves behind is sound.
    fn kill(&mut self, (mut child, said): (Child, JoinHandle<Vec<String>>)) {
        assert_eq!(child.try_wait().unwrap(), None, "it has ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        said.join().unwrap().iter().for_each(|line| self.hear(line));
        if self.check() > MANY {
            self.drain();
        }
    }

    /// All that was said is in the book. How many rows the outbox has.
    pub fn check(&mut self) -> u32 {
        self.heard.hear(&self.book, &self.master.take_received());
        let rows = check_integrity(&self.worker.agent_dir.join("heartbeat.db"), self.folder.path());
        assert!(
            rows < FULL,
            "what falls out of a full outbox is no loss by mistake: this shows nothing"
        );
        rows
    }

    /// What was promised and has not been heard yet. The outbox is not looked at.
    pub fn owed(&mut self) -> Vec<String> {
        self.heard.hear(&self.book, &self.master.take_received());
        self.heard.owed(&self.book)
    }

    pub fn take_away(&mut self) {
        self.away = true;
        self.master.stop();
    }

    pub fn bring_back(&mut self) {
        if std::mem::take(&mut self.away) {
            self.master.start_again().unwrap();
        }
    }

    /// A heartbeat that nobody kills delivers what is left.
    fn drain(&mut self) {
        self.bring_back();
        self.drained += 1;
        let heartbeat = Heartbeat::builder()
            .enrolment(self.worker.enrolment().unwrap())
            .status_source(|| Snapshot::new(&json!({"deployed": false, "deckies": []})))
            .agent_version(format!("run-drain-{}", self.drained))
            .interval(Duration::from_millis(50))
            .start()
            .unwrap();
        let beats = heartbeat.beats();
        loop {
            beats.recv_timeout(PATIENCE).expect("a beat");
            let stats = heartbeat.stats();
            if stats.beats > 0 && stats.waiting == 0 && stats.failure.is_none() {
                assert_eq!((stats.operations, stats.rejected, stats.dropped), (0, 0, 0));
                break;
            }
        }
        assert_eq!(heartbeat.stop(PATIENCE).undelivered, 0);
        self.check();
    }

    /// With all delivered the master must have heard all of it.
    pub fn finish(mut self) -> String {
        self.drain();
        let Self { master, book, heard, .. } = &self;
        heard.check(book, &master.rows());
        let Book { kept, operations, .. } = book;
        let ended = operations.values().filter(|told| told.ended).count();
        assert!(!kept.is_empty() && ended > 0, "no child came to anything");
        format!(
            "{} pushes kept, {} operations begun and {ended} ended, {} deltas accepted in {} requests, {} of them again, \
             0 lost",
            kept.len(),
            operations.len(),
            heard.accepted(),
            heard.requests,
            heard.again()
        )
    }
}

/// On a copy, as a restart would find it: the next child recovers the original itself. How many rows it has.
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
    assert_eq!(found, "ok", "after a log of {copied} bytes");
    // A child that was killed before it had made the table has left none.
    let rows = database.query_row("SELECT count(*) FROM delta", [], |row| row.get(0)).unwrap_or(0);
    drop(database);
    for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if file.file_name().unwrap().to_str().unwrap().starts_with("copy.db") {
            fs::remove_file(file).unwrap();
        }
    }
    rows
}

/// There is no event to wait for: a random moment is what this is about.
pub fn pause(time: Duration) {
    let _ = never::<()>().recv_timeout(time);
}
