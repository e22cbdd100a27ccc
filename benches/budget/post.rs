//! One POST, beside rustls writing the same bytes and reading the same answer; and what of it is not the JSON.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::json;
use tempfile::TempDir;

use crate::PATIENCE;
use crate::disk;
use crate::floor::{ACCEPTED, After, Arrival, BareBeat, BareClient, BareMaster};
use crate::table::{Amount, Figures, Goal, Line, percentile};

/// Rounds of which the first tenth warms up and is left out.
const WARM: usize = 3_000;
const RESUMED: usize = 1_000;

/// Before each exchange: no beat follows on the heels of another, so the machine has gone to sleep meanwhile.
pub const PAUSE: Duration = Duration::from_millis(2);

/// Makes a body of 2 KB.
const STATUS: usize = 1_850;

pub fn measure() -> Result<Figures, String> {
    let warm = Stage::new(After::KeepOpen)?.measure(WARM);
    let resumed = Stage::new(After::Close)?.measure(RESUMED);
    let line = |what: &str, rounds: &Rounds| Line {
        what: what.to_owned(),
        floor: Some(Amount::Time(percentile(&rounds.bare, 50))),
        measured: Amount::Time(percentile(&rounds.ours, 50)),
        goal: Goal::AtMostTimes(1.25),
    };
    let beyond = |what: &str, rounds: &Rounds, most| Line {
        what: format!("bytes on the wire beyond the JSON, both ways, {what}"),
        floor: Some(Amount::Bytes(rounds.beyond_bare as f64)),
        measured: Amount::Bytes(rounds.beyond as f64),
        goal: Goal::AtMost(Amount::Bytes(most)),
    };
    Ok(vec![
        line("POST of 2 KB on a warm connection, p50", &warm),
        line("POST of 2 KB on a new connection, session resumed, p50", &resumed),
        beyond("connection warm", &warm, 300.0),
        beyond("session resumed", &resumed, 1_000.0),
    ]
    .into())
}

struct Rounds {
    ours: Vec<Duration>,
    bare: Vec<Duration>,
    /// Bytes on the wire for one request and its answer, less its JSON.
    beyond: u64,
    beyond_bare: u64,
}

/// A bare master, and a heartbeat that beats when it is told to.
pub struct Stage {
    pub master: BareMaster,
    pub folder: TempDir,
    after: After,
}

impl Stage {
    pub fn new(after: After) -> Result<Self, String> {
        Self::answering(ACCEPTED, after)
    }

    pub fn answering(answer: &'static str, after: After) -> Result<Self, String> {
        Ok(Self { master: BareMaster::start(answer, after), folder: disk::folder()?, after })
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let enrolment = self.master.enrol(&self.agent_dir());
        (Heartbeat::builder().enrolment(enrolment).ticks(ticks).status_source(at_hand()), tick)
    }

    /// One of ours and one bare exchange in turn, so that both meet the same machine.
    fn measure(&self, count: usize) -> Rounds {
        let (builder, tick) = self.builder();
        let heartbeat = builder.start().unwrap();
        let beats = heartbeat.beats();
        beats.recv_timeout(PATIENCE).unwrap();
        let request = self.master.arrival().request;
        let bare = BareClient::new(self.master.address, &self.agent_dir());
        let bare = BareBeat::start(bare, self.after);
        let mut rounds = Rounds { ours: Vec::new(), bare: Vec::new(), beyond: 0, beyond_bare: 0 };
        for round in 0..count {
            thread::sleep(PAUSE);
            let ours = beat(&heartbeat, &tick, &beats);
            let arrival = self.master.arrival();
            thread::sleep(PAUSE);
            let floor = bare.exchange(&request);
            let bare_arrival = self.master.arrival();
            if round >= count / 10 {
                rounds.ours.push(ours);
                rounds.bare.push(floor);
                rounds.beyond = beyond_json(&arrival, self.after);
                rounds.beyond_bare = beyond_json(&bare_arrival, self.after);
            }
        }
        let stats = heartbeat.stats();
        assert_eq!((stats.beats, stats.resumed), (count as u64 + 1, self.after == After::Close));
        rounds
    }
}

/// One beat; from its request to its answer.
fn beat(heartbeat: &Heartbeat, tick: &Sender<Instant>, beats: &Receiver<()>) -> Duration {
    tick.send(Instant::now()).unwrap();
    beats.recv_timeout(PATIENCE).unwrap();
    heartbeat.stats().round_trip.unwrap()
}

/// A source that has its snapshot at hand.
fn at_hand() -> impl FnMut() -> Snapshot + Send + 'static {
    let snapshot =
        Snapshot::new(&json!({"deployed": false, "deckies": [], "filling": "x".repeat(STATUS)}));
    move || snapshot.clone()
}

/// The request with its answer, and the handshake where there was one.
fn beyond_json(arrival: &Arrival, after: After) -> u64 {
    /// A record of TLS 1.3 beyond what is in it.
    const RECORD: u64 = 22;
    let answer = ACCEPTED.len() as u64 + RECORD;
    // A connection that is closed says so.
    let goodbye = if after == After::Close { 2 + RECORD } else { 0 };
    arrival.bytes - arrival.json() as u64 + answer + goodbye
}
