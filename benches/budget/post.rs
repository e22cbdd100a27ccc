//! One POST, compared with rustls that writes the same bytes and reads the same answer, and the
//! bytes of it that are not the JSON.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::json;
use tempfile::TempDir;

use crate::TIMEOUT;
use crate::disk;
use crate::floor::{ACCEPTED, After, Arrival, BareBeat, BareClient, BareMaster};
use crate::table::{Amount, Figures, Goal, Line, percentile};

/// The number of rounds. The first tenth does not count.
const WARM: usize = 3_000;
const RESUMED: usize = 1_000;

/// The pause before each exchange. Between two beats of a heartbeat the processor goes to sleep,
/// too.
pub const PAUSE: Duration = Duration::from_millis(2);

/// The bytes of the status, for a body of 2 KB.
const STATUS: usize = 1_850;

pub fn measure() -> Result<Figures, String> {
    let warm = BareFixture::new(After::KeepOpen)?.measure(WARM);
    let resumed = BareFixture::new(After::Close)?.measure(RESUMED);
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

/// A bare master, and heartbeats that beat when the bench sends a tick.
pub struct BareFixture {
    pub master: BareMaster,
    pub folder: TempDir,
    after: After,
}

impl BareFixture {
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
        (
            Heartbeat::builder().enrolment(enrolment).ticks(ticks).status_source(constant_source()),
            tick,
        )
    }

    /// Alternates between a beat and a bare exchange, so that both have the same conditions.
    fn measure(&self, count: usize) -> Rounds {
        let (builder, tick) = self.builder();
        let heartbeat = builder.start().unwrap();
        let beats = heartbeat.beats();
        beats.recv_timeout(TIMEOUT).unwrap();
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

/// Sends one beat. Returns the time from its request to its answer.
fn beat(heartbeat: &Heartbeat, tick: &Sender<Instant>, beats: &Receiver<()>) -> Duration {
    tick.send(Instant::now()).unwrap();
    beats.recv_timeout(TIMEOUT).unwrap();
    heartbeat.stats().round_trip.unwrap()
}

/// A source whose snapshot is created in advance.
fn constant_source() -> impl FnMut() -> Snapshot + Send + 'static {
    let snapshot =
        Snapshot::new(&json!({"deployed": false, "deckies": [], "filling": "x".repeat(STATUS)}));
    move || snapshot.clone()
}

/// The bytes of a request, its answer, and its handshake if there was one, without the JSON.
fn beyond_json(arrival: &Arrival, after: After) -> u64 {
    /// The overhead of a TLS 1.3 record.
    const RECORD: u64 = 22;
    let answer = ACCEPTED.len() as u64 + RECORD;
    // The alert `close_notify` of a connection that is closed.
    let close_notify = if after == After::Close { 2 + RECORD } else { 0 };
    arrival.bytes - arrival.json() as u64 + answer + close_notify
}
