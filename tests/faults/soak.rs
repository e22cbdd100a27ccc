//! A long run: a beat every 100 ms, faults of the table in random order, and pushes all the time.
//! No delta is lost, and the process does not grow.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::agent::Source;
use crate::agent_process::{AgentProcess, Footprint};
use crate::fault_case::{self, Expect, FaultCase};
use crate::support::deckies;
use crate::test_bed::{Scenario, TestBed};

/// The time that a beat stands for. A beat without a fault takes less, so simulated time passes
/// faster than real time.
const INTERVAL: Duration = Duration::from_millis(100);

/// How much the resident memory may grow, in KiB: the allocator keeps some after answers of a
/// hundred megabytes.
const GROWTH: u64 = 2 * 1024;

/// The longest time until a restored heartbeat has no failure and nothing to send.
const RECOVERY: Duration = Duration::from_secs(30);

/// The length of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    Real(Duration),
    /// The time that the beats stand for.
    Simulated(Duration),
}

impl Length {
    pub const DEFAULT: Self = Self::Real(Duration::from_secs(120));

    fn is_reached(self, beats: u32, since: Instant) -> bool {
        match self {
            Self::Real(length) => since.elapsed() >= length,
            Self::Simulated(length) => INTERVAL * beats >= length,
        }
    }
}

/// The options `--hours` (of simulated time) and `--seed`.
pub static OPTIONS: OnceLock<(Length, u64)> = OnceLock::new();

/// The deltas that were pushed, and those that the master accepted.
#[derive(Default)]
struct Deltas {
    pushed: HashSet<String>,
    accepted: HashSet<String>,
}

impl Deltas {
    fn push(&mut self, agent: &mut AgentProcess) {
        let name = format!("d{}", self.pushed.len());
        // A delta whose push returned an error is not lost: the caller knows.
        if agent.command(&format!("push {name}")) == "pushed" {
            self.pushed.insert(name);
        }
    }

    /// Records the accepted requests. A raw answer has no status, and accepts a request if the
    /// fault's row expects it.
    fn record_accepted(&mut self, bed: &TestBed, case: Option<&FaultCase>) {
        let raw_accepts = case.is_some_and(|case| matches!(case.expect, Expect::Delivers { .. }));
        for request in bed.master.take_received() {
            let is_accepted =
                request.status.map_or(raw_accepts, |status| (200..300).contains(&status));
            if is_accepted {
                self.accepted.extend(deckies(&request));
            }
        }
    }
}

/// The rows whose fault ends within a few seconds after it was restored.
fn cases() -> Vec<FaultCase> {
    let cases = super::TABLES.into_iter().flat_map(|cases| cases());
    cases.filter(|case| !case.name.contains("_a_day")).collect()
}

pub fn soak() {
    let (length, seed) = *OPTIONS.get_or_init(|| (Length::DEFAULT, fastrand::u64(..)));
    println!("soak: seed {seed}");
    fastrand::seed(seed);
    let cases = cases();
    let since = Instant::now();
    let mut bed = TestBed::new(Scenario {
        interval: INTERVAL,
        source: Source::Decnet,
        ..Scenario::default()
    });
    let mut agent = bed.start();
    let mut deltas = Deltas::default();
    let mut beats = 0;
    let mut footprints = Vec::new();
    while !length.is_reached(beats, since) {
        let case = fastrand::choice(&cases).unwrap();
        let other = case.fault.inject(&mut bed);
        beats += beat_and_push(&mut agent, &mut deltas, 1..10);
        fault_case::restore(&mut bed);
        drop(other);
        deltas.record_accepted(&bed, Some(case));
        beats += beat_and_push(&mut agent, &mut deltas, 10..60);
        beats += beat_until_recovered(&mut agent);
        deltas.record_accepted(&bed, None);
        footprints.push(agent.footprint());
    }
    let stats = agent.stats();
    let rejected = assert_none_lost(&bed, &deltas);
    let growth = assert_no_growth(&footprints);
    println!(
        "soak: {:.2} simulated hours in {:.0} s: {} faults, {} beats accepted, {} pushed, {rejected} rejected, 0 lost; {growth}",
        (INTERVAL * beats).as_secs_f64() / 3600.0,
        since.elapsed().as_secs_f64(),
        footprints.len(),
        stats["beats"],
        deltas.pushed.len(),
    );
}

/// A random number of beats. There is a push with every third of them. Returns the number.
fn beat_and_push(agent: &mut AgentProcess, deltas: &mut Deltas, range: Range<u32>) -> u32 {
    let beats = fastrand::u32(range);
    for _ in 0..beats {
        if fastrand::u8(..3) == 0 {
            deltas.push(agent);
        }
        agent.command("beat");
    }
    beats
}

/// Beats until there is no failure and nothing to send. Returns the number of beats.
fn beat_until_recovered(agent: &mut AgentProcess) -> u32 {
    let since = Instant::now();
    for beats in 1.. {
        agent.command("beat");
        let stats = agent.stats();
        if stats["failure"].is_null()
            && stats["waiting"] == 0
            && stats["snapshot_pending_since"].is_null()
        {
            return beats;
        }
        assert!(since.elapsed() < RECOVERY, "{stats:#}\n{}", agent.log_tail());
    }
    unreachable!("the loop has no end");
}

/// Asserts that each pushed delta was accepted or rejected. Returns the number of rejected ones.
fn assert_none_lost(bed: &TestBed, deltas: &Deltas) -> usize {
    let outbox = rusqlite::Connection::open(bed.agent_file("heartbeat.db")).unwrap();
    let mut select = outbox.prepare("SELECT decky FROM delta WHERE rejected IS NOT NULL").unwrap();
    let rejected: Vec<String> =
        select.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let missing = deltas.pushed.difference(&deltas.accepted);
    let lost: Vec<_> = missing.filter(|name| !rejected.contains(name)).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
    rejected.len()
}

/// Compares the second quarter with the last one. In the first quarter memory grows until most
/// faults were injected once. Returns the figures.
fn assert_no_growth(footprints: &[Footprint]) -> String {
    let count = footprints.len();
    let early = median(&footprints[count / 4..count / 2]);
    let late = median(&footprints[count * 3 / 4..]);
    assert!(late.resident <= early.resident + GROWTH, "{early:?}, then {late:?}");
    assert_eq!(late.threads, early.threads);
    assert!(late.descriptors <= early.descriptors, "{early:?}, then {late:?}");
    format!(
        "{:.1} MB and then {:.1} MB resident, {} threads, {} descriptors",
        early.resident as f64 / 1024.0,
        late.resident as f64 / 1024.0,
        late.threads,
        late.descriptors,
    )
}

/// The median of each value.
fn median(footprints: &[Footprint]) -> Footprint {
    fn median_of<T: Ord>(footprints: &[Footprint], value: impl Fn(&Footprint) -> T) -> T {
        let mut sorted: Vec<_> = footprints.iter().map(value).collect();
        sorted.sort_unstable();
        let middle = sorted.len() / 2;
        sorted.swap_remove(middle)
    }
    Footprint {
        threads: median_of(footprints, |footprint| footprint.threads),
        descriptors: median_of(footprints, |footprint| footprint.descriptors),
        peak: median_of(footprints, |footprint| footprint.peak),
        resident: median_of(footprints, |footprint| footprint.resident),
    }
}

/// Takes the options that libtest does not know out of the command line.
pub fn take_options(arguments: Vec<String>) -> Vec<String> {
    let mut rest = Vec::new();
    let mut length = Length::DEFAULT;
    let mut seed = fastrand::u64(..);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let text = arguments.next();
            text.and_then(|text| text.parse::<f64>().ok()).expect("a number after the option")
        };
        match argument.as_str() {
            "--hours" => length = Length::Simulated(Duration::from_secs_f64(number() * 3600.0)),
            "--seed" => seed = number() as u64,
            _ => rest.push(argument),
        }
    }
    OPTIONS.set((length, seed)).expect("the options are set once");
    rest
}
