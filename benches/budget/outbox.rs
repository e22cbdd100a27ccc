//! The outbox on the disk: many deltas at once, many threads at once, and an almost full outbox.

use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::{Heartbeat, Operation};

use crate::TIMEOUT;
use crate::disk::{RawTable, delta, wal_has_grown};
use crate::floor::{After, FORBIDDEN};
use crate::post::BareFixture;
use crate::table::{Amount, Figures, Goal, Line, percentile};

const BATCHES: usize = 80;
const BATCH: usize = 100;

const THREADS: usize = 8;
/// Turns of the threads and of SQLite alone, alternating.
const TURNS: usize = 8;
/// Pushes of each thread in a turn, and commits of SQLite in a turn.
const PUSHES: usize = 120;
const COMMITS: usize = 500;

const WAITING: usize = 9_900;
const BEGINS: usize = 90;

pub fn measure() -> Result<Figures, String> {
    let mut lines = vec![measure_push_all()?];
    lines.extend(measure_threads()?);
    lines.push(measure_begin()?);
    Ok(lines.into())
}

/// A heartbeat of a rejected host. It waits for a tick that does not come, so only pushes use the
/// outbox.
struct RejectedHost {
    heartbeat: Heartbeat,
    fixture: BareFixture,
}

impl RejectedHost {
    fn start() -> Result<Self, String> {
        let fixture = BareFixture::answering(FORBIDDEN, After::KeepOpen)?;
        let (builder, _tick) = fixture.builder();
        let heartbeat = builder.start().unwrap();
        heartbeat.beats().recv_timeout(TIMEOUT).unwrap();
        Ok(Self { heartbeat, fixture })
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

fn measure_push_all() -> Result<Line, String> {
    let host = RejectedHost::start()?;
    host.grow_wal();
    let raw = RawTable::new(&host.fixture.folder.path().join("raw.db"));
    let mut ours = Vec::new();
    let mut floor = Vec::new();
    for _ in 0..BATCHES {
        let batch: Vec<_> = (0..BATCH).map(|_| delta()).collect();
        floor.push(raw.commit_all(&batch));
        ours.push(host.push_all(BATCH));
    }
    let rate =
        |times: &[Duration]| Amount::PerSecond(BATCH as f64 / percentile(times, 50).as_secs_f64());
    Ok(Line {
        what: format!("durable push_all of {BATCH} deltas"),
        floor: Some(rate(&floor)),
        measured: rate(&ours),
        goal: Goal::AtLeastTimes(0.8),
    })
}

/// Threads that push as fast as they can, alternating with SQLite alone, which commits one row
/// after another.
fn measure_threads() -> Result<[Line; 2], String> {
    let host = RejectedHost::start()?;
    host.grow_wal();
    let raw = RawTable::new(&host.fixture.folder.path().join("raw.db"));
    let mut ours = Turns::default();
    let mut floor = Turns::default();
    for _ in 0..TURNS {
        floor.take(|| (0..COMMITS).map(|_| raw.commit()).collect());
        ours.take(|| {
            thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..THREADS).map(|_| scope.spawn(|| push(&host.heartbeat))).collect();
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
        let delta = delta();
        let since = Instant::now();
        deltas.push(delta).unwrap();
        since.elapsed()
    };
    (0..PUSHES).map(push).collect()
}

/// The times of single calls, and of all turns together.
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

/// Begins operations in an almost full outbox and in an almost empty one, alternating.
fn measure_begin() -> Result<Line, String> {
    let full = RejectedHost::start()?;
    let empty = RejectedHost::start()?;
    // The WAL of both must have its full size. That leaves few rows in the empty outbox.
    [&full, &empty].into_iter().for_each(RejectedHost::grow_wal);
    let mut left = WAITING - usize::try_from(full.heartbeat.stats().waiting).unwrap();
    while left > 0 {
        full.push_all(left.min(BATCH));
        left -= left.min(BATCH);
    }
    let mut operations = Vec::new();
    let mut begin = |host: &RejectedHost| {
        let since = Instant::now();
        let operation = host.heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap();
        let took = since.elapsed();
        operations.push(operation);
        took
    };
    let mut ours = Vec::new();
    let mut floor = Vec::new();
    for _ in 0..BEGINS {
        floor.push(begin(&empty));
        ours.push(begin(&full));
    }
    Ok(Line {
        what: format!("begin with {WAITING} rows queued, p50; floor: with an almost empty outbox"),
        floor: Some(Amount::Time(percentile(&floor, 50))),
        measured: Amount::Time(percentile(&ours, 50)),
        goal: Goal::AtMostTimes(2.0),
    })
}
