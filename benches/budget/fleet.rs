//! A fleet that starts at once: when the beats of a thousand heartbeats reach the master.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use decnet_heartbeat::{Heartbeat, OutboxLocation, Snapshot};
use serde_json::json;

use crate::floor::{ACCEPTED, After, BareMaster};
use crate::table::{Amount, Figures, Goal, Line};

const HOSTS: usize = 1_000;
const INTERVAL: Duration = Duration::from_secs(1);

/// The time in which beats are counted. It starts a second after the start of the last heartbeat.
const WATCHED: Duration = Duration::from_secs(15);
const SLOT: Duration = Duration::from_millis(100);

pub fn measure() -> Result<Figures, String> {
    let folder = tempfile::tempdir().unwrap();
    let master = BareMaster::start(ACCEPTED, After::KeepOpen);
    let agent_dir = folder.path().join("agent");
    master.enrol(&agent_dir);
    let start = |host: usize| {
        let enrolment = master.host(&format!("00000000-0000-4000-8000-{host:012}"), &agent_dir);
        let nothing = || Snapshot::new(&json!({"deployed": false, "deckies": []}));
        let builder =
            Heartbeat::builder().enrolment(enrolment).status_source(nothing).interval(INTERVAL);
        builder.outbox(OutboxLocation::Memory).start().unwrap()
    };
    let fleet: Vec<Heartbeat> = (0..HOSTS).map(start).collect();
    let from = Instant::now() + INTERVAL;
    let until = from + WATCHED;
    let mut arrivals = Vec::new();
    while let Ok(arrival) = master.arrivals.recv_deadline(until) {
        arrivals.push((arrival.at, host(&arrival.request)));
    }
    let failed = fleet.iter().filter(|heartbeat| heartbeat.stats().failure.is_some()).count();
    assert_eq!(failed, 0, "beats that failed");
    arrivals.retain(|(at, _)| *at >= from);
    let slots = slots(arrivals.iter().map(|(at, _)| *at), from);
    let busiest = *slots.iter().max().unwrap() as f64;
    Ok(vec![
        Line {
            what: format!("{HOSTS} heartbeats started together, a beat a second: the busiest 100 ms; floor: the mean"),
            floor: Some(Amount::Count((arrivals.len() as f64 / slots.len() as f64).round())),
            measured: Amount::Count(busiest),
            goal: Goal::AtMostTimes(2.0),
        },
        Line {
            what: "missed beats of these heartbeats".to_owned(),
            floor: None,
            measured: Amount::Count(missed(&arrivals, from, until) as f64),
            goal: Goal::AtMost(Amount::Count(0.0)),
        },
    ]
    .into())
}

fn slots(arrivals: impl Iterator<Item = Instant>, from: Instant) -> Vec<usize> {
    let mut slots = vec![0; (WATCHED.as_millis() / SLOT.as_millis()) as usize];
    for at in arrivals {
        let slot = (at - from).as_millis() / SLOT.as_millis();
        if let Some(count) = slots.get_mut(slot as usize) {
            *count += 1;
        }
    }
    slots
}

/// The number of missed beats. The beats of a host are an interval apart, so a longer gap contains
/// missed ones.
fn missed(arrivals: &[(Instant, String)], from: Instant, until: Instant) -> usize {
    let between = |before: Instant, after: Instant| {
        let intervals = (after - before).as_secs_f64() / INTERVAL.as_secs_f64();
        (intervals.round() as usize).saturating_sub(1)
    };
    let mut last: HashMap<&str, Instant> = HashMap::new();
    let mut missed = 0;
    for (at, host) in arrivals {
        missed += between(last.insert(host, *at).unwrap_or(from), *at);
    }
    missed += last.values().map(|at| between(*at, until)).sum::<usize>();
    let silent = HOSTS - last.len();
    missed + silent * between(from, until)
}

fn host(request: &[u8]) -> String {
    let request = std::str::from_utf8(request).unwrap();
    let (_, rest) = request.split_once(r#"{"host_uuid":""#).unwrap();
    rest.split('"').next().unwrap().to_owned()
}
