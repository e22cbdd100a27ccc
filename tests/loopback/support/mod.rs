//! A loopback master with one enrolled worker, and heartbeats that beat when a test says so.

mod agent;
mod alone;
mod log;
mod openssl;
mod raw;
mod running;
mod settled;
pub mod signals;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded, unbounded};
use decnet_heartbeat::loopback::{Answer, Enrolled, Fault, LoopbackMaster, Options, Received};
use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::{Value, json};

pub use agent::{Agent, pipe};
pub use alone::alone;
pub use log::{errors_with, remember_errors};
pub use openssl::OpenSsl;
pub use raw::RawMaster;
pub use running::{Running, line_with, lines};
pub use settled::settled;

/// Longer than anything a test waits for; reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A master, and a worker that is enrolled with it.
pub struct Stage {
    pub dir: tempfile::TempDir,
    pub master: LoopbackMaster,
    pub worker: Enrolled,
}

impl Stage {
    pub fn new() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        signals::none_is_ignored();
        let dir = tempfile::tempdir().unwrap();
        let master = LoopbackMaster::start_with(options).unwrap();
        let worker = master.enrol(&dir.path().join("agent")).unwrap();
        Self { dir, master, worker }
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.worker.agent_dir.clone()
    }

    /// A builder whose heartbeat reports that nothing is deployed, and beats on the ticks that the test sends.
    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let builder = Heartbeat::builder()
            .enrolment(self.worker.enrolment().unwrap())
            .status_source(nothing_deployed)
            .ticks(ticks);
        (builder, tick)
    }

    /// A heartbeat whose first beat has been accepted, and that knows it.
    pub fn beating(&self) -> (Heartbeat, Sender<Instant>) {
        let (builder, tick) = self.builder();
        let heartbeat = builder.start().unwrap();
        settled(&heartbeat, |stats| stats.beats == 1);
        (heartbeat, tick)
    }

    /// Lets one beat fail, so that what is pushed next waits for the second after it.
    pub fn put_off(&self, heartbeat: &Heartbeat, tick: &Sender<Instant>) {
        self.master.script([Fault::Answer(Answer::status(503).header("Retry-After", "1"))]);
        tick.send(now()).unwrap();
        settled(heartbeat, |stats| stats.failure.is_some());
    }

    /// Waits until `count` requests have come in, refused ones too, and gives them.
    pub fn requests(&self, count: usize) -> Vec<Received> {
        let came = self.master.wait_until(PATIENCE, |seen| seen.received().len() >= count);
        let received = self.master.received();
        assert!(came, "{} of {count} requests: {:?}", received.len(), self.master.connections());
        received
    }

    /// Waits until that many operations are closed.
    pub fn closed_rows(&self, count: usize) {
        let closed = |seen: &decnet_heartbeat::loopback::Seen| {
            seen.rows().iter().filter(|row| row.completed_at.is_some()).count() >= count
        };
        assert!(self.master.wait_until(PATIENCE, closed), "{:?}", self.master.rows());
    }
}

pub fn nothing_deployed() -> Snapshot {
    Snapshot::new(&json!({"deployed": false, "deckies": []}))
}

/// A source that hangs until the sender is dropped; from then on nothing is deployed.
pub fn hanging() -> (Sender<()>, impl FnMut() -> Snapshot + Send + 'static) {
    let (release, released) = bounded::<()>(0);
    let source = move || {
        let _ = released.recv();
        nothing_deployed()
    };
    (release, source)
}

/// A tick.
pub fn now() -> Instant {
    Instant::now()
}

/// The JSON of a request.
pub fn json_of(request: &Received) -> &Value {
    request.json.as_ref().expect("a body of JSON")
}

/// The deckies of a request's deltas, in their order.
pub fn deckies(request: &Received) -> Vec<String> {
    let lifecycle = json_of(request)["lifecycle"].as_array().cloned().unwrap_or_default();
    lifecycle.iter().map(|delta| delta["decky_name"].as_str().unwrap().to_owned()).collect()
}
