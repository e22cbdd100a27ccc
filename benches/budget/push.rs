//! From a push to the master having it, and what a push costs the disk.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use decnet_heartbeat::benching::TABLE;
use decnet_heartbeat::{DecnetStatus, Heartbeat, LifecycleDelta, Operation};
use rusqlite::Connection;

use crate::PATIENCE;
use crate::floor::{After, BareMaster, FORBIDDEN};
use crate::post::{Stage, beat};
use crate::table::{Amount, Figures, Goal, Line, percentile};

/// Rounds of which the first tenth warms up and is left out.
const PUSHES: usize = 1_000;
const HUNG: usize = 20;
const BATCHES: usize = 80;
const BATCH: usize = 100;

pub fn measure() -> Result<Figures, String> {
    let stage = Stage::new(After::KeepOpen);
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    let (beats, deltas) = (heartbeat.beats(), heartbeat.deltas());
    beats.recv_timeout(PATIENCE).unwrap();
    stage.master.arrival();
    let raw = RawTable::new(&stage.folder.path().join("raw.db"));
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for round in 0..PUSHES {
        let post = beat(&heartbeat, &tick, &beats);
        stage.master.arrival();
        let commit = raw.insert(&[delta()]);
        let (delta, since) = (delta(), Instant::now());
        deltas.push(delta).unwrap();
        let took = stage.master.arrival().at - since;
        // Until the delivered delta is forgotten, which is a commit of its own.
        beats.recv_timeout(PATIENCE).unwrap();
        if round >= PUSHES / 10 {
            ours.push(took);
            floor.push(post + commit);
        }
    }
    assert_eq!(heartbeat.stats().delivered, PUSHES as u64);
    let line = |percent, most| Line {
        what: format!("push to the master having it, connection warm, p{percent}"),
        floor: Some(Amount::Time(percentile(&floor, percent))),
        measured: Amount::Time(percentile(&ours, percent)),
        goal: Goal::AtMostTimes(most),
    };
    Ok(vec![line(50, 1.3), line(99, 2.0)].into())
}

/// Each time a Docker that has answered so far hangs from the push on.
pub fn measure_hung() -> Result<Figures, String> {
    let stage = Stage::new(After::KeepOpen);
    let agent_dir = stage.folder.path().join("agent");
    let socket = stage.folder.path().join("docker.sock");
    let release = hanging_docker(&socket);
    let source = DecnetStatus::new(&agent_dir).state_file(stage.folder.path().join("none")).docker_socket(socket);
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.status_source(source).start().unwrap();
    // The first beat goes out without its snapshot, the next one with it.
    stage.master.arrival();
    release.send(()).unwrap();
    stage.master.arrival();
    let mut took = Vec::new();
    for _ in 0..HUNG {
        let since = Instant::now();
        heartbeat.deltas().push(delta()).unwrap();
        took.push(stage.master.arrival().at - since);
        release.send(()).unwrap();
        stage.master.arrival();
    }
    Ok(vec![Line {
        what: "push to the master having it while Docker hangs, at most".to_owned(),
        floor: None,
        measured: Amount::Time(percentile(&took, 100)),
        goal: Goal::AtMost(Amount::Time(Duration::from_millis(300))),
    }]
    .into())
}

/// A socket where a connection is closed without an answer each time the sender says so.
fn hanging_docker(socket: &Path) -> crossbeam_channel::Sender<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let (release, released) = unbounded();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 1024]);
            if released.recv().is_err() {
                return;
            }
        }
    });
    release
}

pub fn measure_outbox() -> Result<Figures, String> {
    let (folder, master) = (tempfile::tempdir().unwrap(), BareMaster::start(FORBIDDEN, After::KeepOpen));
    // A host that is refused waits for its tick, and none comes: only the pushes have the outbox.
    let (_tick, ticks) = unbounded();
    let enrolment = master.enrol(&folder.path().join("agent"));
    let heartbeat = Heartbeat::builder().enrolment(enrolment).ticks(ticks).start().unwrap();
    heartbeat.beats().recv_timeout(PATIENCE).unwrap();
    let raw = RawTable::new(&folder.path().join("raw.db"));
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..BATCHES {
        let batch: Vec<_> = (0..BATCH).map(|_| delta()).collect();
        floor.push(raw.insert(&batch));
        let since = Instant::now();
        heartbeat.deltas().push_all(batch).unwrap();
        ours.push(since.elapsed());
    }
    let rate = |times: &[Duration]| Amount::PerSecond(BATCH as f64 / percentile(times, 50).as_secs_f64());
    Ok(vec![Line {
        what: format!("durable push_all of {BATCH}, deltas"),
        floor: Some(rate(&floor)),
        measured: rate(&ours),
        goal: Goal::AtLeastTimes(0.8),
    }]
    .into())
}

fn delta() -> LifecycleDelta {
    LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1")
}

/// The same rows in a table like the outbox', written by SQLite and nothing else.
struct RawTable(Connection);

impl RawTable {
    fn new(path: &Path) -> Self {
        let database = Connection::open(path).unwrap();
        database.pragma_update(None, "journal_mode", "wal").unwrap();
        database.pragma_update(None, "synchronous", "full").unwrap();
        database.execute(TABLE, []).unwrap();
        Self(database)
    }

    /// In one transaction; how long it took.
    fn insert(&self, deltas: &[LifecycleDelta]) -> Duration {
        let since = Instant::now();
        let transaction = self.0.unchecked_transaction().unwrap();
        let sql = "INSERT INTO delta (decky, operation, error, completed_at) VALUES (?1, ?2, ?3, ?4)";
        let mut insert = transaction.prepare_cached(sql).unwrap();
        for delta in deltas {
            let row = (delta.decky(), delta.operation().as_str(), "compose exited with 1", 1_700_000_000_000_000_i64);
            insert.execute(row).unwrap();
        }
        drop(insert);
        transaction.commit().unwrap();
        since.elapsed()
    }
}
