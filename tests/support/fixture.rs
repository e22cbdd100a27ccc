//! A loopback master with one enrolled worker, and heartbeats that beat when the test sends a tick.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crossbeam_channel::{Sender, bounded, unbounded};
use decnet_heartbeat::loopback::{
    Answer, Enrolled, Fault, LoopbackMaster, Options, Received, Seen,
};
use decnet_heartbeat::{Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::Value;

use super::{TIMEOUT, nothing_deployed, wait_for_stats};

/// A master and a worker that is enrolled with it. The worker's files are in a temporary folder.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub master: LoopbackMaster,
    pub worker: Enrolled,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        #[cfg(feature = "cli")]
        super::signals::reset_ignored_signals();
        let dir = tempfile::tempdir().unwrap();
        let master = LoopbackMaster::start_with(options).unwrap();
        let worker = master.enrol(&dir.path().join("agent")).unwrap();
        Self { dir, master, worker }
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.worker.agent_dir.clone()
    }

    /// The default path of the outbox.
    pub fn outbox(&self) -> PathBuf {
        self.agent_dir().join("heartbeat.db")
    }

    /// The worker's `decnet.ini`, which [`write_ini`](Self::write_ini) writes.
    pub fn ini(&self) -> PathBuf {
        self.path("decnet.ini")
    }

    pub fn write_ini(&self) {
        self.worker.write_ini(&self.ini()).unwrap();
    }

    /// A builder whose status source reports that nothing is deployed. Its heartbeat beats at the
    /// start and on each tick that the test sends.
    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let builder = Heartbeat::builder()
            .enrolment(self.worker.enrolment().unwrap())
            .status_source(nothing_deployed)
            .ticks(ticks);
        (builder, tick)
    }

    /// Starts a heartbeat, and waits until its first beat is counted as accepted.
    pub fn start_heartbeat(&self) -> (Heartbeat, Sender<Instant>) {
        let (builder, tick) = self.builder();
        let heartbeat = builder.start().unwrap();
        wait_for_stats(&heartbeat, |stats| stats.beats == 1);
        (heartbeat, tick)
    }

    /// Makes one beat fail with a `Retry-After` of a second. Deltas that are pushed next wait for
    /// that second, so they share a body.
    pub fn fail_one_beat(&self, heartbeat: &Heartbeat, tick: &Sender<Instant>) {
        self.master.script([Fault::Answer(Answer::status(503).header("Retry-After", "1"))]);
        tick.send(now()).unwrap();
        wait_for_stats(heartbeat, |stats| stats.failure.is_some());
    }

    /// Waits until the master has received `count` requests, rejected ones included. Returns all
    /// requests.
    pub fn wait_for_requests(&self, count: usize) -> Vec<Received> {
        let arrived = self.master.wait_until(TIMEOUT, |seen| seen.received().len() >= count);
        let received = self.master.received();
        assert!(arrived, "{} of {count} requests: {:?}", received.len(), self.master.connections());
        received
    }

    /// Waits until the master has received `count` more requests. Returns all requests.
    pub fn wait_for_more_requests(&self, count: usize) -> Vec<Received> {
        self.wait_for_requests(self.master.received().len() + count)
    }

    /// Waits until the master has closed the rows of `count` operations.
    pub fn wait_for_closed_rows(&self, count: usize) {
        let are_closed = |seen: &Seen| {
            seen.rows().iter().filter(|row| row.completed_at.is_some()).count() >= count
        };
        assert!(self.master.wait_until(TIMEOUT, are_closed), "{:?}", self.master.rows());
    }
}

/// A status source that blocks until the sender is dropped. From then on it reports that nothing is
/// deployed.
pub fn blocking_source() -> (Sender<()>, impl FnMut() -> Snapshot + Send + 'static) {
    let (release, released) = bounded::<()>(0);
    let source = move || {
        let _ = released.recv();
        nothing_deployed()
    };
    (release, source)
}

/// The value of a tick.
pub fn now() -> Instant {
    Instant::now()
}

/// The JSON body of a request.
pub fn json_of(request: &Received) -> &Value {
    request.json.as_ref().expect("a JSON body")
}
