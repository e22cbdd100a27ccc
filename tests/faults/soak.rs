//! A long run: a beat every 100 ms, one fault of the table after another, and pushes all the time. Nothing is lost, and
//! the process is as large in the end as it was in the beginning.

use std::collections::HashSet;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::row::{self, Right, Row};
use crate::stage::{Footprint, Stage, Subject, World};
use crate::subject::Source;

/// The time that a beat stands for. It takes less where nothing goes wrong, so simulated time passes faster than ours.
const INTERVAL: Duration = Duration::from_millis(100);

/// What a run may grow by: the allocator's doing, after answers of a hundred megabytes.
const GROWTH: u64 = 2 * 1024;

/// How long it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Of our time, for each run of the tests.
    Real(Duration),
    /// So many beats' worth.
    Simulated(Duration),
}

/// The command line's `--hours` (simulated) and `--seed`.
pub static OPTIONS: OnceLock<(Length, u64)> = OnceLock::new();

impl Length {
    pub const USUAL: Self = Self::Real(Duration::from_secs(120));

    fn is_over(self, beats: u32, since: Instant) -> bool {
        match self {
            Self::Real(length) => since.elapsed() >= length,
            Self::Simulated(length) => INTERVAL * beats >= length,
        }
    }
}

/// What has been pushed, and what the master has taken.
#[derive(Default)]
struct Ledger {
    pushed: HashSet<String>,
    arrived: HashSet<String>,
    faults: u32,
}

impl Ledger {
    fn push(&mut self, subject: &mut Subject) {
        let name = format!("d{}", self.pushed.len());
        // One that the outbox has refused is not lost: whoever pushed it knows.
        if subject.tell(&format!("push {name}")) == "pushed" {
            self.pushed.insert(name);
        }
    }

    /// Takes down what has arrived. An odd answer has accepted it, too, if the fault's row says so.
    fn note(&mut self, stage: &Stage, fault: Option<&Row>) {
        let accepts_oddly = fault.is_some_and(|row| matches!(row.right, Right::Delivers { .. }));
        for request in stage.master.take_received() {
            let accepted =
                request.status.map_or(accepts_oddly, |status| (200..300).contains(&status));
            let deltas = request.json.filter(|_| accepted).map(|mut json| json["lifecycle"].take());
            let deltas = deltas.and_then(|deltas| deltas.as_array().cloned()).unwrap_or_default();
            self.arrived.extend(
                deltas.iter().map(|delta| delta["decky_name"].as_str().unwrap().to_owned()),
            );
        }
    }
}

/// All of the table that ends by itself within a few seconds.
fn faults() -> Vec<Row> {
    let tables = super::TABLES.into_iter().flat_map(|table| table());
    tables.filter(|row| !row.name.contains("_a_day")).collect()
}

pub fn soak() {
    let (length, seed) = *OPTIONS.get_or_init(|| (Length::USUAL, fastrand::u64(..)));
    println!("soak: seed {seed}");
    fastrand::seed(seed);
    let (rows, mut ledger, since) = (faults(), Ledger::default(), Instant::now());
    let mut stage =
        Stage::new(World { interval: INTERVAL, source: Source::Decnet, ..World::default() });
    let mut subject = stage.start();
    let (mut beats, mut sizes) = (0, Vec::new());
    while !length.is_over(beats, since) {
        let row = fastrand::choice(&rows).unwrap();
        let posing = row.fault.begin(&mut stage);
        ledger.faults += 1;
        beats += beat_on(&mut subject, &mut ledger, 1..10);
        row::mend(&mut stage);
        drop(posing);
        ledger.note(&stage, Some(row));
        beats += beat_on(&mut subject, &mut ledger, 10..60);
        beats += all_well(&mut subject);
        ledger.note(&stage, None);
        sizes.push(subject.footprint());
    }
    let figures = settle(&stage, &mut subject, &mut ledger, &sizes);
    let simulated = (INTERVAL * beats).as_secs_f64() / 3600.0;
    println!(
        "soak: {simulated:.2} simulated hours in {:.0} s: {figures}",
        since.elapsed().as_secs_f64()
    );
}

/// So many beats, and a push with every third.
fn beat_on(subject: &mut Subject, ledger: &mut Ledger, beats: std::ops::Range<u32>) -> u32 {
    let beats = fastrand::u32(beats);
    for _ in 0..beats {
        if fastrand::u8(..3) == 0 {
            ledger.push(subject);
        }
        subject.tell("beat");
    }
    beats
}

/// Beats until the last fault is forgotten.
fn all_well(subject: &mut Subject) -> u32 {
    let since = Instant::now();
    for beats in 1.. {
        subject.tell("beat");
        let stats = subject.stats();
        if stats["failure"].is_null()
            && stats["waiting"] == 0
            && stats["snapshot_pending_since"].is_null()
        {
            return beats;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{stats:#}\n{}", subject.log_tail());
    }
    unreachable!("it beats for ever");
}

/// Nothing is lost, nothing has grown.
fn settle(
    stage: &Stage,
    subject: &mut Subject,
    ledger: &mut Ledger,
    sizes: &[Footprint],
) -> String {
    let rejected: Vec<String> = {
        let outbox = rusqlite::Connection::open(stage.agent_file("heartbeat.db")).unwrap();
        let mut select =
            outbox.prepare("SELECT decky FROM delta WHERE rejected IS NOT NULL").unwrap();
        select.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    };
    let stats = subject.stats();
    let lost: Vec<_> =
        ledger.pushed.difference(&ledger.arrived).filter(|name| !rejected.contains(name)).collect();
    assert!(lost.is_empty(), "lost: {lost:?}\n{stats:#}");
    // After every kind of fault has had its chance to be met once.
    let (early, late) =
        (typical(&sizes[sizes.len() / 4..sizes.len() / 2]), typical(&sizes[sizes.len() * 3 / 4..]));
    assert!(late.resident <= early.resident + GROWTH, "{early:?}, then {late:?}");
    assert_eq!(late.threads, early.threads);
    assert!(late.descriptors <= early.descriptors, "{early:?}, then {late:?}");
    format!(
        "{} faults, {} beats accepted, {} pushed, {} rejected, 0 lost; {:.1} MB and then {:.1} MB resident, {} threads, \
         {} descriptors",
        ledger.faults,
        stats["beats"],
        ledger.pushed.len(),
        rejected.len(),
        early.resident as f64 / 1024.0,
        late.resident as f64 / 1024.0,
        late.threads,
        late.descriptors,
    )
}

/// The median of each.
fn typical(sizes: &[Footprint]) -> Footprint {
    fn median<T: Ord + Copy>(sizes: &[Footprint], of: impl Fn(&Footprint) -> T) -> T {
        let mut sorted: Vec<_> = sizes.iter().map(of).collect();
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    }
    Footprint {
        threads: median(sizes, |size| size.threads),
        descriptors: median(sizes, |size| size.descriptors),
        peak: median(sizes, |size| size.peak),
        resident: median(sizes, |size| size.resident),
    }
}

/// The options that are not libtest's, taken out of the command line.
pub fn take_options(arguments: Vec<String>) -> Vec<String> {
    let (mut rest, mut length, mut seed) = (Vec::new(), Length::USUAL, fastrand::u64(..));
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .and_then(|text| text.parse::<f64>().ok())
                .expect("a number after the option")
        };
        match argument.as_str() {
            "--hours" => length = Length::Simulated(Duration::from_secs_f64(value() * 3600.0)),
            "--seed" => seed = value() as u64,
            _ => rest.push(argument),
        }
    }
    OPTIONS.set((length, seed)).expect("it is set once");
    rest
}
