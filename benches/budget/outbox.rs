//! What the disk takes: many deltas at once, many threads at once, and an outbox that is full.

use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::{Heartbeat, Operation};

use crate::PATIENCE;
use crate::disk::{RawTable, delta, wal_has_grown};
use crate::floor::{After, FORBIDDEN};
use crate::post::Stage;
use crate::table::{Amount, Figures, Goal, Line, percentile};

const BATCHES: usize = 80;
const BATCH: usize = 100;

const THREADS: usize = 8;
/// Turns of the threads together and of SQLite alone.
const TURNS: usize = 8;
/// Pushes of each thread in a turn, and commits of SQLite's.
const PUSHES: usize = 120;
const COMMITS: usize = 500;

const WAITING: usize = 9_900;
const BEGINS: usize = 90;

pub fn measure() -> Result<Figures, String> {
    let mut lines = vec![push_all()?];
    lines.extend(together()?);
    lines.push(begin()?);
    Ok(lines.into())
}

/// A heartbeat whose host is refused, which waits for its tick, and none comes: only the pushes have the outbox.
struct Refused {
    heartbeat: Heartbeat,
    stage: Stage,
}

impl Refused {
    fn start() -> Result<Self, String> {
        let stage = Stage::answering(FORBIDDEN, After::KeepOpen)?;
        let (builder, _tick) = stage.builder();
        let heartbeat = builder.start().unwrap();
        heartbeat.beats().recv_timeout(PATIENCE).unwrap();
        Ok(Self { heartbeat, stage })
    }

    fn grow_wal(&self) {
        let outbox = self.heartbeat.stats().outbox.expect("an outbox on the disk");
        while !wal_has_grown(&outbox) {
            self.heartbeat.deltas().push(delta()).unwrap();
        }
    }

    fn push_all(&self, count: usize) -> Duration {
        let batch: Vec<_> = (0..count).map(|_| delta()).collect();
        let since = Instant::now();
        self.heartbeat.deltas().push_all(batch).unwrap();
        since.elapsed()
    }
}

fn push_all() -> Result<Line, String> {
    let refused = Refused::start()?;
    refused.grow_wal();
    let raw = RawTable::new(&refused.stage.folder.path().join("raw.db"));
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..BATCHES {
        let batch: Vec<_> = (0..BATCH).map(|_| delta()).collect();
        floor.push(raw.commit_all(&batch));
        ours.push(refused.push_all(BATCH));
    }
    let rate =
        |times: &[Duration]| Amount::PerSecond(BATCH as f64 / percentile(times, 50).as_secs_f64());
    Ok(Line {
        what: format!("durable push_all of {BATCH}, deltas"),
        floor: Some(rate(&floor)),
        measured: rate(&ours),
        goal: Goal::AtLeastTimes(0.8),
    })
}

/// Threads that push as fast as they can, and SQLite alone committing one row after another, in turn.
fn together() -> Result<[Line; 2], String> {
    let refused = Refused::start()?;
    refused.grow_wal();
    let raw = RawTable::new(&refused.stage.folder.path().join("raw.db"));
    let (mut ours, mut floor) = (Turns::default(), Turns::default());
    for _ in 0..TURNS {
        floor.take(|| (0..COMMITS).map(|_| raw.commit()).collect());
        ours.take(|| {
            thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..THREADS).map(|_| scope.spawn(|| push(&refused.heartbeat))).collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            })
        });
    }
    Ok([
        Line {
            what: format!(
                "durable pushes of {THREADS} threads together; floor: SQLite alone, one commit each"
            ),
            floor: Some(floor.rate()),
            measured: ours.rate(),
            goal: Goal::AtLeastTimes(4.0),
        },
        Line {
            what: format!(
                "push() of {THREADS} threads together, p99; floor: a commit of SQLite's, p99"
            ),
            floor: Some(Amount::Time(percentile(&floor.each, 99))),
            measured: Amount::Time(percentile(&ours.each, 99)),
            goal: Goal::AtMostTimes(2.5),
        },
    ])
}

fn push(heartbeat: &Heartbeat) -> Vec<Duration> {
    let deltas = heartbeat.deltas();
    let push = |_| {
        let (delta, since) = (delta(), Instant::now());
        deltas.push(delta).unwrap();
        since.elapsed()
    };
    (0..PUSHES).map(push).collect()
}

#[derive(Default)]
struct Turns {
    each: Vec<Duration>,
    all: Duration,
}

impl Turns {
    fn take(&mut self, turn: impl FnOnce() -> Vec<Duration>) {
        let since = Instant::now();
        let took = turn();
        self.all += since.elapsed();
        self.each.extend(took);
    }

    fn rate(&self) -> Amount {
        Amount::PerSecond(self.each.len() as f64 / self.all.as_secs_f64())
    }
}

/// Operations that begin where much waits, and where nothing does, in turn.
fn begin() -> Result<Line, String> {
    let (full, empty) = (Refused::start()?, Refused::start()?);
    // The empty one's WAL must have grown, too; what that leaves is little.
    [&full, &empty].into_iter().for_each(Refused::grow_wal);
    let mut left = WAITING - usize::try_from(full.heartbeat.stats().waiting).unwrap();
    while left > 0 {
        full.push_all(left.min(BATCH));
        left -= left.min(BATCH);
    }
    let mut operations = Vec::new();
    let mut begin = |refused: &Refused| {
        let since = Instant::now();
        let operation = refused.heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap();
        let took = since.elapsed();
        operations.push(operation);
        took
    };
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..BEGINS {
        floor.push(begin(&empty));
        ours.push(begin(&full));
    }
    Ok(Line {
        what: format!(
            "begin with {WAITING} rows waiting, p50; floor: of an outbox that is almost empty"
        ),
        floor: Some(Amount::Time(percentile(&floor, 50))),
        measured: Amount::Time(percentile(&ours, 50)),
        goal: Goal::AtMostTimes(2.0),
    })
}
