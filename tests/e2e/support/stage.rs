//! The real master with one enrolled host, and heartbeats that beat when a test says so.

use std::path::Path;
use std::time::Instant;

use crossbeam_channel::{Sender, unbounded};
use decnet_heartbeat::{DecnetStatus, Enrolment, Heartbeat, HeartbeatBuilder, Snapshot};
use serde_json::{Value, json};

use super::RealMaster;
use super::master::Worker;

/// A real master and a host that is enrolled with it.
pub struct Stage {
    pub master: RealMaster,
    folder: tempfile::TempDir,
    pub worker: Worker,
}

impl Stage {
    pub fn new() -> Self {
        let (master, folder) = (RealMaster::start(), tempfile::tempdir().unwrap());
        let worker = master.enrol("worker", folder.path());
        Self { master, folder, worker }
    }

    pub fn agent_dir(&self) -> &Path {
        self.folder.path()
    }

    pub fn enrolment(&self) -> Enrolment {
        let enrolment = Enrolment::new(&self.worker.uuid, "127.0.0.1", self.agent_dir()).unwrap();
        enrolment.with_master_port(self.master.port()).unwrap()
    }

    /// Beats on the ticks that are sent, and says that nothing is deployed unless it is given another source.
    pub fn builder(&self) -> (HeartbeatBuilder, Sender<Instant>) {
        let (tick, ticks) = unbounded();
        let source = || Snapshot::new(&json!({"deployed": false, "deckies": []}));
        (Heartbeat::builder().enrolment(self.enrolment()).ticks(ticks).status_source(source), tick)
    }

    pub fn start(&self, source: DecnetStatus) -> (Heartbeat, Sender<Instant>) {
        let (builder, tick) = self.builder();
        (builder.status_source(source).start().unwrap(), tick)
    }

    /// Waits for that many answers, and gives their statuses.
    pub fn statuses(&self, count: usize) -> Vec<u16> {
        self.master.answers(count).iter().map(|answer| answer.status.unwrap()).collect()
    }

    pub fn host(&self) -> Value {
        self.master.rows("swarm_hosts", json!({"uuid": self.worker.uuid}))[0].clone()
    }

    pub fn row(&self, id: &str) -> Value {
        self.master.rows("decky_lifecycle", json!({"id": id}))[0].clone()
    }

    pub fn shards(&self) -> Vec<Value> {
        self.master.rows("decky_shards", json!({}))
    }
}

/// A tick.
pub fn beat(tick: &Sender<Instant>) {
    tick.send(Instant::now()).unwrap();
}
